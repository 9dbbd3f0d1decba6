"""Rewards for a policy-gradient step: a sequence's score and its tokens' KL penalties."""

import math

import torch

from .._types import BetaController
from ..ops.fields import result_dtype
from . import _checks
from .sequences import sequences_of


def shape_rewards(
    scores: torch.Tensor,
    kl: torch.Tensor,
    beta: float | torch.Tensor | BetaController,
    mask: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute per-token rewards: score - beta·KL on each token that counts, 0 elsewhere.

    Equivalent, for one score per sequence, to

        rewards = -beta * kl.detach()
        for b in range(B):
            if mask[b].any():
                rewards[b, mask[b].nonzero().max()] += scores[b]        # on the last that counts
        rewards = torch.where(mask, rewards, 0.0)

    without waiting for the device.

    Which KL: k1 of estimate_kl, log π - log π_ref of the chosen token. The policy gradient on these
    rewards is then the gradient of E[score] - beta·KL(policy‖reference) of whole sequences. The
    exact KL of a token has the same expectation without the noise, but does not depend on the
    chosen token: as a reward it only accounts for the later KLs that a token leads to, not for the
    token's own. With the same beta·KL in the loss as well, with gradient and reduced like the
    policy's loss (KLPenalty, or kl of grpo_loss), the gradient is correct again. Policy gradients
    on k2, k3 and abs are not the gradient of a KL.

    Args:
        scores: one per sequence, [B] for kl [B, T] or [S] for a packed kl, added on the last token
            that counts; or one per token, shaped as kl. With as many packed sequences as tokens
            they count as one per sequence.
        kl: KL of each token in nats: [B, T] (any leading shape), or with cu_seqlens [total],
            concatenated packed sequences. See above for which KL.
        beta: the penalty's weight: a number ≥ 0, a 0-d tensor, or a controller with an attribute
            `beta`. A number 0 leaves the KL out, even an infinite one. A tensor's value is not
            read: a negative one is not an error, and 0 times an infinite KL is NaN.
        mask: bool, shaped as kl, True where the token counts, i.e. the policy chose it. Padding may
            be on either side, and tool outputs may leave gaps.
        cu_seqlens: integers [S+1] from 0 to total: sequence s is kl[cu_seqlens[s] : cu_seqlens[s +
            1]]; empty ones are allowed.

    Returns:
        rewards shaped as kl, float32 (float64 for a float64 kl), detached. A token that does not
        count gets exactly 0, whatever kl and scores hold there, NaN included; the score of a
        sequence without such a token is dropped. Boundaries that do not run from 0 to total are an
        error on the CPU; on a GPU, where a check would synchronise, and under torch.compile, every
        token that counts gets NaN.

    Gradient:
        None: rewards are data. For a KL with gradient to the policy see KLPenalty and
        sampled_kl_loss.

    Raises:
        TypeError: scores or kl not of a float type, mask not bool, cu_seqlens not integers, beta
            none of the three kinds.
        ValueError: mismatched shapes or devices; wrong boundaries; a number beta that is negative
            or not finite.

    Source: Ziegler et al., Fine-Tuning Language Models from Human Preferences (2019), eq. 2; Ouyang
    et al., Training language models to follow instructions with human feedback (2022), eq. 2.
    """
    _checks.float_tensor("kl", kl, "per token, [B, T] or [total]", 1)
    _checks.float_tensor("scores", scores, "one per sequence or per token")
    _checks.mask(mask, kl.shape, kl.device)
    beta = _checks.beta(beta, "kl", kl)
    sequences = sequences_of("kl", kl, cu_seqlens)
    _checks.per_token_or_sequence("scores", scores, "kl", kl, cu_seqlens)
    dtype = result_dtype(kl)
    kl, scores = kl.detach().to(dtype), scores.detach().to(dtype)
    counts = torch.ones_like(kl, dtype=torch.bool) if mask is None else mask
    if sequences.takes(scores, kl):
        scores = torch.where(sequences.last(counts), sequences.spread(scores), 0.0)
    if sequences.right is not None:
        scores = torch.where(sequences.right, scores, math.nan)
    penalty = beta * kl if isinstance(beta, torch.Tensor) or beta > 0 else 0.0
    return torch.where(counts, scores - penalty, 0.0)
