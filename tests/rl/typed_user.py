"""A user of fastkl.rl as type checkers see it: read by tests/repo/test_typing.py, never run.

A line that ends in `# refused` must be an error, no other may be.
"""

import torch
from typing_extensions import assert_type

from fastkl import KLPenalty, LinearKLPenalty, estimate_kl
from fastkl.rl import (
    AdaptiveBeta,
    DPOLoss,
    FixedBeta,
    KLMonitor,
    PIDBeta,
    PPOAdaptiveBeta,
    SpikeDetector,
    dpo_loss,
    grpo_loss,
    ppo_loss,
    read_jsonl,
    shape_rewards,
)


def step(
    logprob: torch.Tensor,
    old: torch.Tensor,
    ref: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    controller = AdaptiveBeta(0.05, 6.0, 1000, "sequence")
    assert_type(controller.update(KLPenalty(controller, reduction="sequence_mean")), float)
    assert_type(PIDBeta(0.1, 0.05).update(0.1, mask.sum(), process_group=None), float)
    assert_type(PPOAdaptiveBeta(0.1, 0.05, unit="token").update(LinearKLPenalty(controller)), float)
    rewards = shape_rewards(advantages, estimate_kl(logprob, ref), controller, mask)
    loss = ppo_loss(
        logprob, None, rewards, mask, reduction="mean", clip=(0.2, 0.28), normalizer=8
    ) + grpo_loss(
        logprob, old, advantages, mask, ref_logprob=ref, beta=FixedBeta(0.1), level="sequence"
    )
    assert_type(dpo_loss(logprob, old, ref, ref, normalizer=2), DPOLoss)
    figures = KLMonitor(spike=SpikeDetector()).update(logprob, mask, beta=controller, loss=loss)
    assert_type(figures, dict[str, float])
    assert_type(read_jsonl("run.jsonl"), list[dict[str, float]])
    return loss


def wrong(logprob: torch.Tensor, advantages: torch.Tensor) -> None:
    AdaptiveBeta(0.05, 6.0, 1000, "batch")  # refused
    AdaptiveBeta(0.05, 6.0, 1000).update(0.1, unit="batch")  # refused
    AdaptiveBeta(0.05, 6.0, 1000).update("0.1")  # refused
    AdaptiveBeta(0.05, 6.0, 1000).update({"kl": logprob})  # refused
    ppo_loss(logprob, None, advantages, reduction="grpo")  # refused
    grpo_loss(logprob, None, advantages, reduction="mean")  # refused
    grpo_loss(logprob, None, advantages, level="word")  # refused
    grpo_loss(logprob, None, advantages, correct_kl="no")  # refused
    grpo_loss(logprob, None, advantages, beta=object())  # refused
    shape_rewards(advantages, logprob, "0.1")  # refused
    read_jsonl(1)  # refused
