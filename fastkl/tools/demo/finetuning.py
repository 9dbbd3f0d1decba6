"""Policy-gradient fine-tuning on a reward that can be hacked, with the exact KL penalty in the loss."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import torch

from fastkl.rl import FixedBeta, KLMonitor, PIDBeta, SpikeDetector

from .corpus import Corpus, line_starts, windows
from .model import LanguageModel
from .objective import Batch, choose_objective
from .progress import progress
from .sampling import sample
from .settings import Settings

REWARDED_WORD = "self"
# What is kept of each step: its name in the report, and in the monitor.
SERIES = {"reward": "reward", "kl": "kl/mean", "entropy": "entropy", "kl_p50": "kl/p50", "kl_p95": "kl/p95", "kl_p99": "kl/p99", "kl_max": "kl/max",
          "beta": "beta", "alarm": "kl/spike"}


@dataclasses.dataclass
class FineTuned:
    """A policy and how it got there.

    series: the figures of SERIES, one number per step, measured before the step's update; alarm: 1 where it rang. summary: of all tokens of the
    run, as KLMonitor's. early: the batch after the first update, where the KL is still tiny.
    """

    policy: LanguageModel
    series: dict[str, list[float]]
    summary: dict[str, float]
    early: Batch


def rewarded_tokens(corpus: Corpus) -> torch.Tensor:
    """bool [V]: the tokens that the reward counts. A naive proxy for object-oriented code: how often does a sample say `self`?"""
    return corpus.tokens_that(lambda text: text.strip() == REWARDED_WORD)


def fine_tune(reference: LanguageModel, corpus: Corpus, beta: FixedBeta | PIDBeta, settings: Settings, title: str,
              jsonl: Path | None = None) -> FineTuned:
    """REINFORCE from the reference: maximise the discounted reward minus beta times KL(policy‖reference) per token.

    FixedBeta(0) is the run without a penalty, which then only measures. jsonl: a file for the monitor's figures, a line per step.
    """
    policy = copy.deepcopy(reference).requires_grad_(True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.policy_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    objective = choose_objective(beta, settings)
    rewarded = rewarded_tokens(corpus).to(settings.device)
    starts = line_starts(corpus, corpus.train)
    choose = torch.Generator().manual_seed(settings.seed)
    draw = torch.Generator(settings.device).manual_seed(settings.seed)
    detector = SpikeDetector(settings.alarm_ratio, recent=settings.alarm_recent, floor=settings.alarm_floor)
    monitor = KLMonitor(spike=detector, jsonl=jsonl)
    series, early = {name: [] for name in SERIES}, None
    steps = progress(range(settings.steps), title)
    for step in steps:
        prompts = windows(corpus.train, settings.prompt_length, settings.samples, choose, starts).to(settings.device)
        tokens = sample(policy, prompts, settings.response_length, settings.temperature, draw)
        response = tokens[:, settings.prompt_length:]
        rewards = rewarded[response].float()

        with torch.no_grad():
            ref_hidden = reference.response_hidden(tokens, settings.response_length)
        batch = Batch(response, policy.response_hidden(tokens, settings.response_length), policy.head, ref_hidden, reference.head)
        if step == 1:
            early = batch.kept()
        stats, penalty = objective(batch)
        loss = -(advantages(rewards, settings.discount) * stats.logprob).mean() + penalty
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()

        # One transfer from the device for all figures of the step.
        figures = monitor.update(stats.kl, entropy=stats.entropy, reward=rewards, beta=beta, step=step + 1)
        beta.update(figures["kl/mean"], unit="token")
        for name, key in SERIES.items():
            series[name].append(figures[key])
        steps.set_postfix_str(f"reward {figures['reward']:.3f}, KL {figures['kl/mean']:.3f} nats", refresh=False)
    return FineTuned(policy.eval().requires_grad_(False), series, monitor.summary(), early)


def advantages(rewards: torch.Tensor, discount: float) -> torch.Tensor:
    """Discounted reward from each token on, minus the batch mean at that position: [B, T] from rewards [B, T]."""
    returns = rewards.clone()
    for t in range(rewards.shape[1] - 2, -1, -1):
        returns[:, t] += discount * returns[:, t + 1]
    return returns - returns.mean(0)
