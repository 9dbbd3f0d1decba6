"""DPPO's trust region: a mask from the divergence of "this token or another"."""

import torch

from .._types import BinaryKind
from ..estimators import binary_divergence
from . import _checks
from .sequences import loss_tensors


def divergence_mask(
    logprob: torch.Tensor,
    old_logprob: torch.Tensor | None,
    advantages: torch.Tensor,
    *,
    kind: BinaryKind = "tv",
    limit: float | tuple[float, float] = 0.15,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return which tokens DPPO's trust region keeps: False where the update would lead further out.

    Equivalent to

        divergence = binary_divergence(old_logprob, logprob, kind=kind)     # D(old‖new)
        rising = (advantages > 0) & (logprob > old_logprob) & (divergence > high)
        falling = (advantages <= 0) & (logprob < old_logprob) & (divergence > low)
        keep = ~(rising | falling)

    PPO bounds the ratio of probabilities, which improbable tokens exceed at once and probable ones
    hardly ever; this mask bounds how far the distribution moved. A token beyond the limit still
    counts if its update leads back. Multiply the advantages by the mask, so that a dropped token
    still counts in the mean and keeps its KL penalty, and leave the ratio unclipped:

        keep = divergence_mask(logprob, old_logprob, advantages)
        loss = ppo_loss(logprob, old_logprob, advantages * keep, mask, clip=(1, math.inf))

    (advantages[:, None] * keep for one per sequence); `mask & keep` as the mask removes the token
    from the mean as well. verl's dppo_tv and dppo_kl use a truncated ratio without gradient in
    place of PPO's: grpo_loss(…, surrogate="cispo", clip=(1, 19), reduction="bnpo") for its
    clip_ratio_c = 20.

    Args:
        logprob: log π(token) in nats, [B, T] (any leading shape), or [total], concatenated packed
            sequences.
        old_logprob: the same under the policy that sampled the tokens, without gradient; None: the
            current policy, which keeps every token.
        advantages: as in ppo_loss: one per token, shaped as logprob, or per sequence, [B], with
            cu_seqlens [S].
        kind: "tv", the difference of the token's probabilities, or "kl", in nats.
        limit: the divergence beyond which no update may lead further away: one number ≥ 0, or (low,
            high) for tokens whose probability is to fall (advantage ≤ 0) and to rise, verl's
            clip_ratio_low and clip_ratio_high. verl's example uses 0.15 for "tv" and 0.05 for "kl".
        cu_seqlens: as in ppo_loss.

    Returns:
        bool, shaped as logprob. A token with a NaN is kept, so that the NaN reaches the loss.

    Gradient:
        None.

    Special values:
        As ppo_loss and binary_divergence. verl's "kl" adds 1e-8 to 1 - p and 1 - q; here it is
        infinite where a logprob is rounded to 0. Such a token has no gradient to its logits anyway.

    Raises:
        As ppo_loss; ValueError for an unknown kind or a limit that is negative or NaN.

    Source: Qi et al., Rethinking the Trust Region in LLM Reinforcement Learning (2026); verl
    0.10.0.dev, compute_policy_loss_dppo_tv and compute_policy_loss_dppo_kl of
    trainer/ppo/core_algos.py.
    """
    low, high = _checks.number_pair(
        "limit",
        limit,
        "a number of at least 0, or a pair of such",
        lambda x: x >= 0,
        "pass 0.15, for instance",
    )
    now, old, advantages, *_ = loss_tensors(
        logprob, old_logprob, advantages, None, cu_seqlens, boundaries_needed=False
    )
    divergence = binary_divergence(old, now.detach(), kind=kind)
    return ~torch.where(
        advantages > 0,
        (now > old) & (divergence > high),
        (advantages <= 0) & (now < old) & (divergence > low),
    )
