"""Fine-tuning on a reward that can be hacked, with the exact KL penalty in the loss."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import torch

from fastkl import TokenStats
from fastkl.rl import FixedBeta, KLMonitor, PIDBeta, SpikeDetector, TrustRegion

from ..progress import progress
from .algorithms import ALGORITHMS, DPO, GRPO, PPO
from .corpus import Corpus, line_starts, windows
from .model import LanguageModel
from .objective import Batch, Side
from .sampling import sample
from .settings import Settings

REWARDED_WORD = "self"
# What is kept of each step: its name in the report, and in the monitor.
SERIES = {"reward": "reward", "kl": "kl/mean", "entropy": "entropy", "kl_p50": "kl/p50", "kl_p95": "kl/p95", "kl_p99": "kl/p99", "kl_max": "kl/max",
          "beta": "beta", "alarm": "kl/spike"}
# Of the step's last update: KL between the policies before and after it, nats per token, and how much of the optimizer's step was taken.
TRUST_REGION = {"step_kl": "step_kl", "step_fraction": "step_fraction"}


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
    """From the reference: maximise the reward minus beta times KL(policy‖reference) per token, by the algorithm of the settings.

    FixedBeta(0) is the run without a penalty, which then only measures. jsonl: a file for the monitor's figures, a line per step.
    """
    policy = copy.deepcopy(reference).requires_grad_(True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.policy_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, settings.last_rate, settings.steps)
    algorithm = ALGORITHMS[settings.algorithm](beta, settings)
    rewarded = rewarded_tokens(corpus).to(settings.device)
    starts = line_starts(corpus, corpus.train)
    choose = torch.Generator().manual_seed(settings.seed)
    draw = torch.Generator(settings.device).manual_seed(settings.seed)
    detector = SpikeDetector(settings.alarm_ratio, recent=settings.alarm_recent, floor=settings.alarm_floor)
    monitor = KLMonitor(spike=detector, jsonl=jsonl)
    names = SERIES if settings.max_kl is None else {**SERIES, **TRUST_REGION}
    series, early = {name: [] for name in names}, None
    steps = progress(range(settings.steps), title)
    for step in steps:
        prompts = windows(corpus.train, settings.prompt_length, settings.samples // algorithm.per_prompt, choose, starts).to(settings.device)
        prompts = prompts.repeat_interleave(algorithm.per_prompt, 0)
        tokens = sample(policy, prompts, settings.response_length, settings.temperature, draw)
        response = tokens[:, settings.prompt_length:]
        rewards = rewarded[response].float()
        credit = algorithm.credit(rewards, draw)
        with torch.no_grad():
            ref_hidden = reference.response_hidden(tokens, settings.response_length)

        before, taken = None, {}
        for _ in range(settings.epochs):
            batch = Batch(response, Side(policy.response_hidden(tokens, settings.response_length), policy.head), Side(ref_hidden, reference.head))
            if step == 1 and before is None:
                early = batch.kept()
            stats, loss = algorithm.loss(batch, credit, None if before is None else before.logprob)
            before = before or TokenStats(*(None if field is None else field.detach() for field in stats))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            taken = take_step(optimizer, policy, tokens, batch, algorithm, settings)
        schedule.step()

        # One transfer from the device for all figures of the step.
        figures = monitor.update(before.kl, entropy=before.entropy, reward=rewards, beta=beta, step=step + 1, **taken)
        beta.update(figures["kl/mean"], unit="token")
        for name, key in names.items():
            series[name].append(figures[key])
        steps.set_postfix_str(f"reward {figures['reward']:.3f}, KL {figures['kl/mean']:.3f} nats", refresh=False)
    return FineTuned(policy.eval().requires_grad_(False), series, monitor.summary(), early)


def take_step(optimizer: torch.optim.Optimizer, policy: LanguageModel, tokens: torch.Tensor, batch: Batch, algorithm: PPO | GRPO | DPO,
              settings: Settings) -> dict[str, float]:
    """One update, as long as the trust region allows, if there is one: then the figures of TRUST_REGION."""
    if settings.max_kl is None:
        optimizer.step()
        return {}
    old = batch.policy.kept()

    def moved() -> torch.Tensor:
        now = Side(policy.response_hidden(tokens, settings.response_length), policy.head)
        return algorithm.way.kl(old, now).mean()

    result = TrustRegion(settings.max_kl).step(optimizer, moved)
    return {"step_kl": result.kl, "step_fraction": result.fraction}
