"""Fine-tuning by PPO on a reward that can be hacked, with the exact KL in the loss.

It maximises the reward minus beta times KL(policy‖reference) per token.
"""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastkl
from fastkl.rl import FixedBeta, KLMonitor, PIDBeta, SpikeDetector, ppo_loss

from ..console import progress
from . import Settings
from .corpus import Corpus, windows
from .model import LanguageModel, sample

Beta = FixedBeta | PIDBeta


def choose_beta(settings: Settings) -> Beta:
    """Return the penalty's weight: fixed, or steered to the target."""
    if settings.beta is not None:
        return FixedBeta(settings.beta)
    kp, ki, kd = settings.gains
    start, target = settings.initial_beta, settings.target_kl
    return PIDBeta(start, target, unit="token", kp=kp, ki=ki, kd=kd)


def advantages_of(rewards: Tensor, discount: float) -> Tensor:
    """Return the discounted reward from each token on, less its mean over the batch; [B, T]."""
    returns = rewards.clone()
    for t in range(rewards.shape[1] - 2, -1, -1):
        returns[:, t] += discount * returns[:, t + 1]
    return returns - returns.mean(0)


class FineTuned(NamedTuple):
    """A policy and how it got there.

    series: KLMonitor's figures, a number per step, measured before its update. summary: of all
    tokens, as KLMonitor's.
    """

    policy: LanguageModel
    series: dict[str, list[float]]
    summary: dict[str, float]


def fine_tune(
    reference: LanguageModel,
    corpus: Corpus,
    beta: Beta,
    settings: Settings,
    title: str,
    jsonl: Path | None = None,
) -> FineTuned:
    """Maximise the reward minus beta times the KL, from the reference.

    FixedBeta(0) only measures the KL. jsonl: a file for the monitor's figures, a line per step.
    """
    device, length = settings.device, settings.response_length
    policy = copy.deepcopy(reference).requires_grad_(True)
    optimizer = torch.optim.AdamW(
        policy.parameters(), settings.policy_rate, (0.9, 0.95), weight_decay=0.0, fused=True
    )
    options: dict[str, Any] = dict(temperature=settings.temperature)
    penalty = fastkl.KLPenalty(beta, **options)
    choose = torch.Generator().manual_seed(settings.seed)
    draw = torch.Generator(device).manual_seed(settings.seed)
    ratio, recent, floor = settings.alarm
    monitor = KLMonitor(spike=SpikeDetector(ratio, recent=recent, floor=floor), jsonl=jsonl)
    history = []
    for step in (steps := progress(range(1, settings.steps + 1), title)):
        size = settings.prompt_length, settings.samples
        prompts = windows(corpus.train, *size, choose, corpus.new_line)
        tokens = sample(policy, prompts.to(device), settings, draw)
        response = tokens[:, -length:]
        rewards = corpus.rewarded.to(device)[response].float()
        with torch.no_grad():
            ref = reference.lm_head(reference.response_hidden(tokens, length))
        logits = policy.lm_head(policy.response_hidden(tokens, length))
        stats = fastkl.token_stats(logits, response, **options)
        with torch.no_grad():  # for the monitor
            kl = fastkl.kl_divergence(logits, ref, **options)
        loss = ppo_loss(stats.logprob, None, advantages_of(rewards, settings.discount))
        loss = loss + penalty(logits, ref)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        # One transfer from the device for all figures of the step.
        more: dict[str, Any] = dict(entropy=stats.entropy, reward=rewards, beta=beta)
        figures = monitor.update(kl, step=step, **more)
        history.append(figures)
        beta.update(figures["kl/mean"], unit="token")
        said = f"reward {figures['reward']:.3f}, KL {figures['kl/mean']:.3f} nats"
        steps.set_postfix_str(said, refresh=False)
    series = {name: [each[name] for each in history] for name in figures}
    return FineTuned(policy.eval().requires_grad_(False), series, monitor.summary())
