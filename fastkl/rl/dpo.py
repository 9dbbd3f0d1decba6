"""DPO over the log-probabilities of whole responses."""

import math
from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid

from .. import _reduce
from ..estimators import finite
from . import _checks

# Floor of a response's log-probability: 10,000 tokens at their own floor.
_RESPONSE_FLOOR = -1e8


class DPOLoss(NamedTuple):
    """Result of dpo_loss.

    loss: scalar, with gradient. chosen_reward, rejected_reward, margin: [B], the implicit rewards
    and their difference, detached.
    """

    loss: torch.Tensor
    chosen_reward: torch.Tensor
    rejected_reward: torch.Tensor
    margin: torch.Tensor


def dpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    normalizer: float | torch.Tensor | None = None,
) -> DPOLoss:
    """Direct preference optimisation over the log-probabilities of whole responses.

    Equivalent to

        chosen_reward = beta * (chosen - ref_chosen)
        rejected_reward = beta * (rejected - ref_rejected)
        margin = chosen_reward - rejected_reward
        right, wrong = F.logsigmoid(margin), F.logsigmoid(-margin)
        loss = -((1 - label_smoothing) * right + label_smoothing * wrong).mean()

    The policy that maximises reward - beta·KL(policy‖reference) is ∝ reference·exp(reward / beta),
    so beta·(log π - log π_ref) is the reward whose optimum is π, up to a constant per prompt: no
    reward model is needed, and the KL penalty is part of the loss.

    Args:
        chosen, rejected: log π of each response in nats, the sum over its tokens (per-token ones
            are refused), [B], with gradient.
        ref_chosen, ref_rejected: the same under the reference, [B]; no gradient.
        beta: the weight of the KL penalty whose optimum is sought, above 0.
        label_smoothing: the probability that a preference is labelled the wrong way round, 0 … 0.5
            (0.5 left out).
        normalizer: as ppo_loss, in place of the number of pairs B.

    Returns:
        DPOLoss, float32 (float64 for a float64 chosen): loss, a scalar, 0 without a pair;
        chosen_reward, rejected_reward and margin, [B]. The share of pairs ranked right is (margin >
        0).float().mean().

    Gradient:
        Of loss to chosen: -beta·(sigmoid(-margin) - label_smoothing) / B, and the opposite to
        rejected. The other fields are detached.

    Special values:
        A log-probability below -1e8, -inf included, counts as -1e8 and has no gradient: the sum
        over a long response may be far below the -1e4 that estimate_kl gives a token. So -inf under
        policy and reference is a reward of 0.

    Raises:
        TypeError: a tensor not of a float type, float64 beside another type, a setting that is no
            number.
        ValueError: shapes that are not [B] or differ, devices that differ, beta or label_smoothing
            out of range, a normalizer as in ppo_loss.

    Source: Rafailov et al., Direct Preference Optimization (2023), eqs. 4 to 7; Mitchell, A note on
    DPO with noisy preferences (2023), for label_smoothing.
    """
    beta = _checks.number(
        "beta", beta, "a finite number above 0", lambda x: 0 < x < math.inf, "0.1 is common"
    )
    label_smoothing = _checks.number(
        "label_smoothing",
        label_smoothing,
        "a number from 0 to less than 0.5",
        lambda x: 0 <= x < 0.5,
        "it is the share of labels that are the wrong way round",
    )
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
    for name, value in zip(names, (chosen, rejected, ref_chosen, ref_rejected), strict=True):
        _checks.float_tensor(name, value, "log-probabilities of responses [B]")
        _checks.expect(
            value.dim() == 1,
            name,
            "one log-probability per response, [B]",
            tuple(value.shape),
            "sum over the response's tokens",
        )
        _checks.like(name, value, "chosen", chosen)
    _checks.normalizer(normalizer, "mean", chosen.device)
    chosen, rejected = (finite(value, _RESPONSE_FLOOR) for value in (chosen, rejected))
    ref_chosen, ref_rejected = (
        finite(value.detach(), _RESPONSE_FLOOR) for value in (ref_chosen, ref_rejected)
    )
    chosen_reward = beta * (chosen - ref_chosen)
    rejected_reward = beta * (rejected - ref_rejected)
    margin = chosen_reward - rejected_reward
    losses = (
        -logsigmoid(margin)
        if label_smoothing == 0
        else -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    )
    mean = losses.sum() / _reduce.divisor("mean", normalizer, None, losses.shape, losses.dtype)
    return DPOLoss(mean, chosen_reward.detach(), rejected_reward.detach(), margin.detach())
