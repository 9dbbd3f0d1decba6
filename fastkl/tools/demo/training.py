"""Fine-tuning by PPO on a reward that can be hacked, with the exact KL in the loss.

The objective is the reward minus beta times KL(policy‖reference) per token.
"""

import copy
from pathlib import Path

import torch

import fastkl
from fastkl.rl import FixedBeta, KLMonitor, PIDBeta, SpikeDetector, ppo_loss

from ..console import progress
from . import Settings
from .corpus import Corpus, windows
from .model import LanguageModel, sample


def advantages_of(rewards: torch.Tensor, discount: float) -> torch.Tensor:
    """Return the discounted reward from each token on minus its mean over the batch, [B, T]."""
    returns = rewards.clone()
    for t in range(rewards.shape[1] - 2, -1, -1):
        returns[:, t] += discount * returns[:, t + 1]
    return returns - returns.mean(0)


def fine_tune(
    reference: LanguageModel,
    corpus: Corpus,
    beta: FixedBeta | PIDBeta,
    settings: Settings,
    title: str,
    jsonl: Path | None = None,
) -> tuple[LanguageModel, dict[str, list[float]], dict[str, float]]:
    """Maximise the reward minus beta times the KL, starting from the reference; return the policy,
    the monitor's figures per step, and its summary.

    FixedBeta(0) only measures the KL. jsonl: a file for the monitor's figures, one line per step.
    """
    device, length, temperature = settings.device, settings.response_length, settings.temperature
    policy = copy.deepcopy(reference).requires_grad_(True)
    optimizer = torch.optim.AdamW(
        policy.parameters(), settings.policy_rate, (0.9, 0.95), weight_decay=0.0, fused=True
    )
    penalty = fastkl.KLPenalty(beta, temperature=temperature)
    choose = torch.Generator().manual_seed(settings.seed)
    draw = torch.Generator(device).manual_seed(settings.seed)
    ratio, recent, floor = settings.alarm
    monitor = KLMonitor(spike=SpikeDetector(ratio, recent=recent, floor=floor), jsonl=jsonl)
    history = []
    for step in (steps := progress(range(1, settings.steps + 1), title)):
        prompts = windows(
            corpus.train, settings.prompt_length, settings.samples, choose, corpus.new_line
        )
        tokens = sample(policy, prompts.to(device), settings, draw)
        response = tokens[:, -length:]
        rewards = corpus.rewarded.to(device)[response].float()
        logits, ref = (
            model.lm_head(model.response_hidden(tokens, length)) for model in (policy, reference)
        )
        # Computed before the update; the KL is for the monitor.
        stats = fastkl.token_stats(logits, response, ref, temperature=temperature)
        loss = ppo_loss(stats.logprob, None, advantages_of(rewards, settings.discount))
        loss = loss + penalty(logits, ref)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        # All figures of the step take one transfer from the device.
        figures = monitor.update(
            stats.kl, entropy=stats.entropy, reward=rewards, beta=beta, step=step
        )
        history.append(figures)
        beta.update(figures["kl/mean"], unit="token")
        steps.set_postfix_str(
            f"reward {figures['reward']:.3f}, KL {figures['kl/mean']:.3f} nats", refresh=False
        )
    return (
        policy.eval().requires_grad_(False),
        {name: [each[name] for each in history] for name in figures},
        monitor.summary(),
    )
