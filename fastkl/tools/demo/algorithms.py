"""How a batch of samples and their rewards becomes a loss: PPO, GRPO or DPO. All three maximise the same: reward minus beta times KL."""

from __future__ import annotations

import torch

from fastkl import TokenStats
from fastkl.rl import FixedBeta, PIDBeta, dpo_loss, grpo_loss, ppo_loss

from .objective import Batch, choose_way
from .settings import Settings


class _Algorithm:
    """per_prompt: how many responses to each prompt stand one after the other in a batch. way: where statistics and penalty come from."""

    per_prompt = 1

    def __init__(self, beta: FixedBeta | PIDBeta, settings: Settings) -> None:
        self.beta, self.settings, self.way = beta, settings, choose_way(beta, settings)


class PPO(_Algorithm):
    """The clipped objective on the advantage of each token, plus the KL penalty."""

    def credit(self, rewards: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        """Advantages [B, T] from rewards [B, T]: the discounted reward from each token on, minus the batch mean at that position."""
        returns = rewards.clone()
        for t in range(rewards.shape[1] - 2, -1, -1):
            returns[:, t] += self.settings.discount * returns[:, t + 1]
        return returns - returns.mean(0)

    def loss(self, batch: Batch, credit: torch.Tensor, old_logprob: torch.Tensor | None) -> tuple[TokenStats, torch.Tensor]:
        """(statistics, loss); old_logprob: of the policy that sampled, None where that is the policy as it is now."""
        stats, penalty = self.way.penalised(batch)
        return stats, ppo_loss(stats.logprob, old_logprob, credit) + penalty


class GRPO(_Algorithm):
    """No critic: a response's advantage is its reward less its group's mean. The exact KL of each token stands in the loss."""

    def __init__(self, beta: FixedBeta | PIDBeta, settings: Settings) -> None:
        super().__init__(beta, settings)
        self.per_prompt = settings.group

    def credit(self, rewards: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        """Advantages [B]. Not divided by the group's spread (Liu et al., 2025): so beta keeps its unit, reward per nat."""
        groups = rewards.sum(-1).view(-1, self.per_prompt)
        return (groups - groups.mean(-1, keepdim=True)).flatten()

    def loss(self, batch: Batch, credit: torch.Tensor, old_logprob: torch.Tensor | None) -> tuple[TokenStats, torch.Tensor]:
        """As PPO.loss."""
        stats = self.way.stats(batch)
        return stats, grpo_loss(stats.logprob, old_logprob, credit, kl=stats.kl, beta=self.beta, reduction="dr_grpo",
                                max_length=self.settings.response_length)


class DPO(_Algorithm):
    """Preferences between two responses to each prompt, sampled anew at every step. The KL penalty is in the loss in closed form."""

    per_prompt = 2

    def credit(self, rewards: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        """bool [B / 2]: whether the first of two is preferred. Drawn by Bradley and Terry's model of the rewards: what DPO's optimum presumes."""
        first, second = rewards.sum(-1).view(-1, 2).unbind(-1)
        return torch.rand(first.shape, generator=draw, device=draw.device) < (first - second).sigmoid()

    def loss(self, batch: Batch, credit: torch.Tensor, old_logprob: torch.Tensor | None) -> tuple[TokenStats, torch.Tensor]:
        """As PPO.loss; old_logprob is not used: preferences hold whoever sampled."""
        stats = self.way.stats(batch)
        first, second, ref_first, ref_second = (side for of in (stats.logprob, stats.ref_logprob) for side in of.sum(-1).view(-1, 2).unbind(-1))
        chosen, rejected = torch.where(credit, first, second), torch.where(credit, second, first)
        beta = self.beta.beta
        if beta == 0:
            # The limit of dpo_loss / beta, but for a constant: nothing holds the policy to the reference.
            return stats, -0.5 * (chosen - rejected).mean()
        ref_chosen, ref_rejected = torch.where(credit, ref_first, ref_second), torch.where(credit, ref_second, ref_first)
        return stats, dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta).loss / beta


ALGORITHMS = {"ppo": PPO, "grpo": GRPO, "dpo": DPO}
