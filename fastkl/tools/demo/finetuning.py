"""Policy-gradient fine-tuning on a reward that can be hacked, with the exact KL penalty in the loss."""

from __future__ import annotations

import copy
import dataclasses

import torch

import fastkl

from .corpus import Corpus, line_starts, windows
from .model import LanguageModel
from .progress import progress
from .sampling import sample
from .settings import Settings

REWARDED_WORD = "self"
# Rows of logits kept after the first update, where the KL is still tiny, for the comparison with the naive code.
ROWS_KEPT = 128


@dataclasses.dataclass
class FineTuned:
    """A policy and how it got there.

    series: "reward", "kl" and "entropy", one number per step, measured before the step's update; early_logits: rows of policy and reference
    logits after the first update.
    """

    policy: LanguageModel
    series: dict[str, list[float]]
    early_logits: tuple[torch.Tensor, torch.Tensor]


def rewarded_tokens(corpus: Corpus) -> torch.Tensor:
    """bool [V]: the tokens that the reward counts. A naive proxy for object-oriented code: how often does a sample say `self`?"""
    return corpus.tokens_that(lambda text: text.strip() == REWARDED_WORD)


def fine_tune(reference: LanguageModel, corpus: Corpus, beta: float, settings: Settings, title: str) -> FineTuned:
    """REINFORCE from the reference: maximise the discounted reward minus beta times KL(policy‖reference) per token.

    beta = 0 is the run without a penalty: KLPenalty then only measures.
    """
    policy = copy.deepcopy(reference).requires_grad_(True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.policy_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    penalty = fastkl.KLPenalty(beta, temperature=settings.temperature)
    rewarded = rewarded_tokens(corpus).to(settings.device)
    starts = line_starts(corpus, corpus.train)
    choose = torch.Generator().manual_seed(settings.seed)
    draw = torch.Generator(settings.device).manual_seed(settings.seed)
    series, early = {"reward": [], "kl": [], "entropy": []}, None
    steps = progress(range(settings.steps), title)
    for step in steps:
        prompts = windows(corpus.train, settings.prompt_length, settings.samples, choose, starts).to(settings.device)
        tokens = sample(policy, prompts, settings.response_length, settings.temperature, draw)
        response = tokens[:, settings.prompt_length:]
        rewards = rewarded[response].float()

        logits = policy.response_logits(tokens, settings.response_length)
        with torch.no_grad():
            ref_logits = reference.response_logits(tokens, settings.response_length)
        stats = fastkl.token_stats(logits, response, temperature=settings.temperature)
        loss = -(advantages(rewards, settings.discount) * stats.logprob).mean() + penalty(logits, ref_logits)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()

        if step == 1:
            early = tuple(side.detach().flatten(0, 1)[:ROWS_KEPT].clone() for side in (logits, ref_logits))
        # One transfer from the device for all figures of the step.
        figures = torch.stack([rewards.mean(), penalty.last["kl"], stats.entropy.detach().mean()]).tolist()
        for name, figure in zip(series, figures, strict=True):
            series[name].append(figure)
        steps.set_postfix_str(f"reward {figures[0]:.3f}, KL {figures[1]:.3f} nats", refresh=False)
    return FineTuned(policy.eval().requires_grad_(False), series, early)


def advantages(rewards: torch.Tensor, discount: float) -> torch.Tensor:
    """Discounted reward from each token on, minus the batch mean at that position: [B, T] from rewards [B, T]."""
    returns = rewards.clone()
    for t in range(rewards.shape[1] - 2, -1, -1):
        returns[:, t] += discount * returns[:, t + 1]
    return returns - returns.mean(0)
