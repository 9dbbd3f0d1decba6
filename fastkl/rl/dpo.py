"""DPO and IPO over the log-probabilities of whole responses."""

import math
from typing import Literal, NamedTuple, get_args

import torch

from .. import _reduce
from ..estimators import finite
from . import _checks

Preference = Literal["sigmoid", "ipo"]
DPOReduction = Literal["none", "mean", "sum"]
# Floor of a response's log-probability: 10,000 tokens at their own floor.
_RESPONSE_FLOOR = -1e8


class DPOLoss(NamedTuple):
    """Result of dpo_loss.

    loss: scalar ([B] with reduction="none"), with gradient. chosen_reward, rejected_reward, margin:
    [B], the implicit rewards and their difference, detached.
    """

    loss: torch.Tensor
    chosen_reward: torch.Tensor
    rejected_reward: torch.Tensor
    margin: torch.Tensor


def dpo_loss(  # noqa: PLR0913
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    *,
    beta: float = 0.1,
    loss: Preference = "sigmoid",
    label_smoothing: float = 0.0,
    reduction: DPOReduction = "mean",
    normalizer: float | torch.Tensor | None = None,
) -> DPOLoss:
    """Compute the loss of direct preference optimisation (DPO), or IPO, from the log-probabilities
    of whole responses.

    Equivalent to

        chosen_reward = beta * (chosen - ref_chosen)
        rejected_reward = beta * (rejected - ref_rejected)
        margin = chosen_reward - rejected_reward
        right, wrong = F.logsigmoid(margin), F.logsigmoid(-margin)
        loss = -((1 - label_smoothing) * right + label_smoothing * wrong).mean()    # "sigmoid"
        loss = ((margin / beta - 1 / (2 * beta)) ** 2).mean()                       # "ipo"

    The policy that maximises reward - beta·KL(policy‖reference) is ∝ reference·exp(reward / beta),
    so beta·(log π - log π_ref) is the reward whose optimum is π, up to a constant per prompt: no
    reward model is needed, and the KL penalty is part of the loss. IPO pulls the margin to 1/2
    instead of increasing it without bound, so pairs always ranked the same way do not move the
    policy ever further from the reference.

    Args:
        chosen, rejected: log π of each response in nats, summed over its tokens (per-token tensors
            raise an error), [B], with gradient. With "ipo" the sum is the paper's form; TRL 1.16
            uses each response's mean per token instead: for that, divide all four by the number of
            tokens.
        ref_chosen, ref_rejected: the same under the reference, [B]; no gradient.
        beta: the weight of the KL penalty, above 0; tau in the IPO paper.
        loss: "sigmoid", DPO's, or "ipo".
        label_smoothing: the probability that a preference label is swapped, from 0 to less than
            0.5; only with "sigmoid".
        reduction: "mean", "sum", or "none", one loss per pair.
        normalizer: as in ppo_loss, in place of the number of pairs B.

    Returns:
        DPOLoss, float32 (float64 for a float64 chosen): loss, a scalar, 0 for B = 0 ([B] with
        reduction "none"); chosen_reward, rejected_reward and margin, [B]. The share of correctly
        ranked pairs is (margin > 0).float().mean().

    Gradient:
        Of loss to chosen: -beta·(sigmoid(-margin) - label_smoothing) / B, with "ipo"
        (2·margin - 1) / (beta·B); to rejected, the negative of that. The other fields are detached.

    Special values:
        A log-probability below -1e8, -inf included, counts as -1e8 and has no gradient: the sum
        over a long response may be far below estimate_kl's floor of -1e4 per token. -inf under both
        policy and reference therefore gives a reward of 0.

    Raises:
        TypeError: a tensor not of a float type, float64 mixed with another type, a setting that is
            not a number.
        ValueError: shapes that are not [B] or differ, devices that differ, beta or label_smoothing
            out of range, label_smoothing with "ipo", an unknown loss or reduction, a normalizer as
            in ppo_loss.

    Source: Rafailov et al., Direct Preference Optimization (2023), eqs. 4 to 7; Mitchell, A note on
    DPO with noisy preferences (2023), for label_smoothing; Azar et al., A General Theoretical
    Paradigm to Understand Learning from Human Preferences (2023), eq. 17, for "ipo".
    """
    _checks.choice("loss", loss, get_args(Preference))
    _checks.choice("reduction", reduction, get_args(DPOReduction))
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
    _checks.expect(
        loss == "sigmoid" or label_smoothing == 0,
        "label_smoothing",
        "0 with loss='ipo'",
        label_smoothing,
        "pass it with loss='sigmoid'",
    )
    for name, value in {
        "chosen": chosen,
        "rejected": rejected,
        "ref_chosen": ref_chosen,
        "ref_rejected": ref_rejected,
    }.items():
        _checks.float_tensor(name, value, "log-probabilities of responses [B]")
        _checks.expect(
            value.dim() == 1,
            name,
            "one log-probability per response, [B]",
            tuple(value.shape),
            "sum over the response's tokens",
        )
        _checks.like(name, value, "chosen", chosen)
    _checks.normalizer(normalizer, reduction, chosen.device)
    chosen, rejected, ref_chosen, ref_rejected = (
        finite(value, _RESPONSE_FLOOR)
        for value in (chosen, rejected, ref_chosen.detach(), ref_rejected.detach())
    )
    chosen_reward = beta * (chosen - ref_chosen)
    rejected_reward = beta * (rejected - ref_rejected)
    margin = chosen_reward - rejected_reward
    if loss == "ipo":
        losses = ((margin - 0.5) / beta).square()
    elif label_smoothing == 0:
        losses = -torch.nn.functional.logsigmoid(margin)
    else:
        right, wrong = map(torch.nn.functional.logsigmoid, (margin, -margin))
        losses = -(1 - label_smoothing) * right - label_smoothing * wrong
    losses = _reduce.reduced(losses, None, None, reduction, normalizer)
    return DPOLoss(losses, chosen_reward.detach(), rejected_reward.detach(), margin.detach())
