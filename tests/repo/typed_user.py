# A user's code as type checkers see it: read by test_typing.py, never run. A line that ends in `#
# refused` must be an error, no other may be.

import torch
from typing_extensions import assert_type

from fastkl import (
    DistillationLoss,
    Head,
    KLPenalty,
    LinearDistillationLoss,
    LinearKLPenalty,
    TokenStats,
    binary_divergence,
    estimate_kl,
    kl_divergence,
    linear_kl_divergence,
    linear_token_stats,
    sampled_kl_loss,
    selective_log_softmax,
    token_stats,
    use_backend,
)
from fastkl.rl import (
    AdaptiveBeta,
    DPOLoss,
    FixedBeta,
    KLMonitor,
    PIDBeta,
    PPOAdaptiveBeta,
    SpikeDetector,
    divergence_mask,
    dpo_loss,
    grpo_loss,
    ppo_loss,
    read_jsonl,
    shape_rewards,
)


class Halving:
    beta: float = 0.5  # a controller of the user's own: an attribute is enough


def step(
    p: torch.Tensor,
    q: torch.Tensor,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    maybe: torch.Tensor | None,
) -> TokenStats:
    stats = token_stats(p, tokens, q, mask=mask)
    assert_type([stats.kl, stats.ref_kl, stats.ref_logprob], list[torch.Tensor])
    assert_type(token_stats(p, tokens).kl, torch.Tensor | None)
    both = linear_token_stats(p, Head(q), tokens, p, Head(q, logit_scale=0.5), ref_temperature=mask)
    assert_type(both.kl + sampled_kl_loss(p, q, direction="reference||policy"), torch.Tensor)
    assert_type(linear_token_stats(p, q, tokens).kl, torch.Tensor | None)
    linear_kl_divergence(p, Head(q), p, reduction="token_mean", normalizer=3)
    LinearKLPenalty(0.1, ref_temperature=0.7)(p, Head(q), p)
    either: TokenStats = token_stats(p, tokens, maybe)
    assert_type(either.kl, torch.Tensor | None)
    penalty = KLPenalty(AdaptiveBeta(0.1, 6.0, 100), reduction="sequence_mean")
    linear = LinearKLPenalty(FixedBeta(0.1), direction="reference||policy")
    losses = [penalty(p, q, mask, normalizer=8), linear(p, q, p, q, mask, normalizer=mask.sum())]
    assert_type([*losses, KLPenalty(0.1)(p, q, mask)], list[torch.Tensor])
    KLPenalty(Halving(), reduction="mean")
    assert_type(DistillationLoss("js", 0.3, 2.0, beta=0.1)(p, q, tokens), torch.Tensor)
    LinearDistillationLoss(direction="student||teacher")(p, Head(q), p, None, tokens, normalizer=8)
    kl_divergence(p, q, mask, weights=q, reduction="token_mean", normalizer=3)
    assert_type(kl_divergence(p, q) + selective_log_softmax(p, tokens), torch.Tensor)
    with use_backend("reference"):
        return token_stats(p, tokens, ref_logits=q, temperature=0.7)


def wrong(p: torch.Tensor, tokens: torch.Tensor) -> None:
    KLPenalty(0.1, direction="fwd")  # refused
    KLPenalty(0.1, reduction="none")  # refused
    LinearKLPenalty(0.1, direction="policy|reference")  # refused
    KLPenalty(object())  # refused
    DistillationLoss("jsd")  # refused
    LinearDistillationLoss()(p, p, p, tokens)  # refused
    LinearKLPenalty("0.1")  # refused
    KLPenalty(0.1)(p)  # refused
    KLPenalty(0.1)(p, p, normaliser=3)  # refused
    kl_divergence(p, p, reduction="sequence_mean")  # refused
    estimate_kl(p, p, estimator="k4")  # refused
    sampled_kl_loss(p, p, direction="forward")  # refused
    binary_divergence(p, p, kind="js")  # refused
    use_backend("cuda")  # refused
    token_stats(p, tokens).kl.mean()  # refused


# ---- fastkl.rl


def train(
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
    keep = divergence_mask(logprob, old, advantages, limit=(0.1, 0.2))
    grpo_loss(logprob, old, advantages, keep, surrogate="sapo", tau=(1.0, 1.1))
    figures = KLMonitor(spike=SpikeDetector()).update(logprob, mask, beta=controller, loss=loss)
    assert_type(figures, dict[str, float])
    assert_type(read_jsonl("run.jsonl"), list[dict[str, float]])
    return loss


def wrong_in_training(logprob: torch.Tensor, advantages: torch.Tensor) -> None:
    AdaptiveBeta(0.05, 6.0, 1000, "batch")  # refused
    AdaptiveBeta(0.05, 6.0, 1000).update(0.1, unit="batch")  # refused
    AdaptiveBeta(0.05, 6.0, 1000).update("0.1")  # refused
    AdaptiveBeta(0.05, 6.0, 1000).update({"kl": logprob})  # refused
    ppo_loss(logprob, None, advantages, reduction="grpo")  # refused
    grpo_loss(logprob, None, advantages, surrogate="ppo")  # refused
    dpo_loss(logprob, logprob, logprob, logprob, loss="hinge")  # refused
    grpo_loss(logprob, None, advantages, reduction="mean")  # refused
    grpo_loss(logprob, None, advantages, level="word")  # refused
    grpo_loss(logprob, None, advantages, correct_kl="no")  # refused
    grpo_loss(logprob, None, advantages, beta=object())  # refused
    shape_rewards(advantages, logprob, "0.1")  # refused
    read_jsonl(1)  # refused
