"""Fine-tuning by PPO, GRPO or DPO on a reward that can be hacked, with the exact KL in the loss.

All three maximise the same: reward minus beta times KL(policy‖reference) per token.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastkl
from fastkl.rl import (
    FixedBeta,
    KLMonitor,
    PIDBeta,
    SpikeDetector,
    TrustRegion,
    dpo_loss,
    grpo_loss,
    ppo_loss,
)

from ..console import progress
from . import Settings
from .corpus import Corpus, windows
from .model import LanguageModel, sample

Beta = FixedBeta | PIDBeta
# The figures of a step, by their names in the report and in the monitor.
SERIES = {
    "reward": "reward",
    "kl": "kl/mean",
    "entropy": "entropy",
    "kl_p50": "kl/p50",
    "kl_p95": "kl/p95",
    "kl_p99": "kl/p99",
    "kl_max": "kl/max",
    "beta": "beta",
    "alarm": "kl/spike",
    # Of its last update, with a trust region: KL between the policies before and after it, nats per
    # token, and the share of the optimizer's step that was taken.
    "step_kl": "step_kl",
    "step_fraction": "step_fraction",
}


ADAMW: dict[str, Any] = dict(betas=(0.9, 0.95), weight_decay=0.0, fused=True)
# A model's first arguments of fastkl's functions: logits, or hidden states and head.
Inputs = tuple[Any, ...]


class PPO:
    """The clipped objective on the advantage of each token, plus the KL penalty.

    With settings.linear everything is computed from hidden states and head, else through logits.
    """

    def __init__(self, beta: Beta, settings: Settings) -> None:
        self.beta, self.settings = beta, settings
        self.options: dict[str, Any] = dict(temperature=settings.temperature)
        kind = ""
        if settings.linear:
            self.options.update(chunk_size=settings.chunk_size, recompute=True)
            kind = "linear_"
        self.token_stats = getattr(fastkl, f"{kind}token_stats")
        self.kl_divergence = getattr(fastkl, f"{kind}kl_divergence")
        penalty = fastkl.LinearKLPenalty if settings.linear else fastkl.KLPenalty
        self.penalty = penalty(beta, **self.options)

    def inputs(self, hidden: Tensor, head: nn.Linear) -> Inputs:
        """Return a model's arguments from its hidden states [B, T, H] and head [H -> V]."""
        if self.settings.linear:
            return hidden, fastkl.Head(head.weight, head.bias)
        return (head(hidden),)

    def credit(self, rewards: Tensor, draw: torch.Generator) -> Tensor:
        """Return what rewards [B, T] say of the samples; here advantages [B, T].

        The advantage is the discounted reward from a token on, minus its mean over the batch.
        """
        returns = rewards.clone()
        for t in range(rewards.shape[1] - 2, -1, -1):
            returns[:, t] += self.settings.discount * returns[:, t + 1]
        return returns - returns.mean(0)

    def loss(
        self, tokens: Tensor, policy: Inputs, ref: Inputs, credit: Tensor, old: Tensor | None
    ) -> tuple[fastkl.TokenStats, Tensor]:
        """Return (TokenStats, loss) of tokens [B, T].

        old: log-probs of the policy that sampled them, None: the same policy.
        """
        stats = self.token_stats(*policy, tokens, **self.options)
        with torch.no_grad():  # for the monitor
            stats = stats._replace(kl=self.kl_divergence(*policy, *ref, **self.options))
        return stats, ppo_loss(stats.logprob, old, credit) + self.penalty(*policy, *ref)


class GRPO(PPO):
    """No critic: a response's advantage is its reward less its group's mean.

    Not divided by the group's spread (Liu et al., 2025), so that beta keeps its unit, reward per
    nat. The exact KL of each token stands in the loss.
    """

    def credit(self, rewards: Tensor, draw: torch.Generator) -> Tensor:
        groups = rewards.sum(-1).view(-1, self.settings.group)
        return (groups - groups.mean(-1, keepdim=True)).flatten()

    def loss(
        self, tokens: Tensor, policy: Inputs, ref: Inputs, credit: Tensor, old: Tensor | None
    ) -> tuple[fastkl.TokenStats, Tensor]:
        stats = self.token_stats(*policy, tokens, *ref, **self.options)
        options: dict[str, Any] = dict(reduction="dr_grpo", max_length=tokens.shape[1])
        loss = grpo_loss(stats.logprob, old, credit, kl=stats.kl, beta=self.beta, **options)
        return stats, loss


class DPO(PPO):
    """Preferences between two responses to each prompt, sampled anew at every step.

    The KL penalty is in the loss in closed form.
    """

    def credit(self, rewards: Tensor, draw: torch.Generator) -> Tensor:
        # bool [B / 2], whether the first of two is preferred: drawn by Bradley and Terry's model of
        # the rewards, which DPO's optimum presumes.
        first, second = _pairs(rewards)
        level = torch.rand(first.shape, generator=draw, device=draw.device)
        return level < (first - second).sigmoid()

    def loss(
        self, tokens: Tensor, policy: Inputs, ref: Inputs, credit: Tensor, old: Tensor | None
    ) -> tuple[fastkl.TokenStats, Tensor]:
        stats = self.token_stats(*policy, tokens, *ref, **self.options)
        first, second = _pairs(stats.logprob)
        chosen, rejected = torch.where(credit, first, second), torch.where(credit, second, first)
        beta = self.beta.beta
        if beta == 0:
            # The limit of the loss below, up to a constant: the reference does not count.
            return stats, -0.5 * (chosen - rejected).mean()
        first, second = _pairs(stats.ref_logprob)
        refs = torch.where(credit, first, second), torch.where(credit, second, first)
        return stats, dpo_loss(chosen, rejected, *refs, beta=beta).loss / beta


def _pairs(values: Tensor) -> tuple[Tensor, ...]:
    """Sum [B, T] over the tokens; return those of each first and each second response, [B / 2]."""
    return values.sum(-1).view(-1, 2).unbind(-1)


ALGORITHMS = {"ppo": PPO, "grpo": GRPO, "dpo": DPO}


def choose_beta(settings: Settings) -> Beta:
    """Return the penalty's weight: fixed, or steered to the target."""
    if settings.beta is not None:
        return FixedBeta(settings.beta)
    kp, ki, kd = settings.gains
    start, target = settings.initial_beta, settings.target_kl
    return PIDBeta(start, target, unit="token", kp=kp, ki=ki, kd=kd)


class FineTuned(NamedTuple):
    """A policy and how it got there.

    series: the figures of SERIES, a number per step, measured before its update. summary: of all
    tokens, as KLMonitor's. early: the policy after the first update, whose KL is still tiny, and
    its samples.
    """

    policy: LanguageModel
    series: dict[str, list[float]]
    summary: dict[str, float]
    early: tuple[LanguageModel, Tensor]


def fine_tune(
    reference: LanguageModel,
    corpus: Corpus,
    beta: Beta,
    settings: Settings,
    title: str,
    jsonl: Path | None = None,
) -> FineTuned:
    """Maximise the reward minus beta times the KL, from the reference, by settings.algorithm.

    FixedBeta(0) only measures the KL. jsonl: a file for the monitor's figures, a line per step.
    """
    device, length, group = settings.device, settings.response_length, settings.group
    policy = copy.deepcopy(reference).requires_grad_(True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.policy_rate, **ADAMW)
    decay = (1.0, settings.last_rate, settings.steps)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, *decay)
    algorithm = ALGORITHMS[settings.algorithm](beta, settings)
    choose = torch.Generator().manual_seed(settings.seed)
    draw = torch.Generator(device).manual_seed(settings.seed)
    ratio, recent, floor = settings.alarm
    monitor = KLMonitor(spike=SpikeDetector(ratio, recent=recent, floor=floor), jsonl=jsonl)
    history = []
    for step in (steps := progress(range(settings.steps), title)):
        size = settings.prompt_length, settings.samples // group
        prompts = windows(corpus.train, *size, choose, corpus.new_line).repeat_interleave(group, 0)
        tokens = sample(policy, prompts.to(device), settings, draw)
        response = tokens[:, -length:]
        rewards = corpus.rewarded.to(device)[response].float()
        credit = algorithm.credit(rewards, draw)
        if step == 1:
            early = copy.deepcopy(policy), tokens
        with torch.no_grad():
            hidden = reference.response_hidden(tokens, length)
            ref = algorithm.inputs(hidden, reference.lm_head)
        first: Any = None
        for _ in range(settings.epochs):
            hidden, old = policy.response_hidden(tokens, length), first and first.logprob
            inputs = algorithm.inputs(hidden, policy.lm_head)
            stats, loss = algorithm.loss(response, inputs, ref, credit, old)
            del inputs  # logits that backward does not need
            first = first or stats._replace(logprob=stats.logprob.detach())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            taken = take_step(optimizer, policy, tokens, algorithm)
        schedule.step()
        # One transfer from the device for all figures of the step.
        more: dict[str, Any] = dict(entropy=first.entropy, reward=rewards, beta=beta, **taken)
        figures = monitor.update(first.kl, step=step + 1, **more)
        history.append(figures)
        beta.update(figures["kl/mean"], unit="token")
        said = f"reward {figures['reward']:.3f}, KL {figures['kl/mean']:.3f} nats"
        steps.set_postfix_str(said, refresh=False)
    names = {name: key for name, key in SERIES.items() if key in figures}
    series = {name: [figures[key] for figures in history] for name, key in names.items()}
    return FineTuned(policy.eval().requires_grad_(False), series, monitor.summary(), early)


def take_step(
    optimizer: torch.optim.Optimizer, policy: LanguageModel, tokens: Tensor, algorithm: PPO
) -> dict[str, float]:
    """Update as far as the trust region allows, if there is one; return its figures then."""
    settings = algorithm.settings
    if settings.max_kl is None:
        optimizer.step()
        return {}

    @torch.no_grad()
    def inputs(model: LanguageModel) -> Inputs:
        hidden = model.response_hidden(tokens, settings.response_length)
        return algorithm.inputs(hidden, model.lm_head)

    old, kl, options = inputs(copy.deepcopy(policy)), algorithm.kl_divergence, algorithm.options
    region = TrustRegion(settings.max_kl)
    result = region.step(optimizer, lambda: kl(*old, *inputs(policy), **options).mean())
    return {"step_kl": result.kl, "step_fraction": result.fraction}
