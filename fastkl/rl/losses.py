"""Losses of preference and policy-gradient training over log-probabilities, with the KL where it
belongs: PPO, GRPO and GSPO, DPO.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch

from .. import _reduce
from .._types import BetaController, PenaltyReduction
from ..estimators import LARGEST_LOG_RATIO, estimate_kl, finite, sampled_kl_loss
from . import _checks
from .rewards import owners

GRPOReduction = Literal["grpo", "bnpo", "dr_grpo", "sum"]
Level = Literal["token", "sequence"]
PPO_REDUCTIONS = get_args(PenaltyReduction)
GRPO_REDUCTIONS = get_args(GRPOReduction)
LEVELS = get_args(Level)
# Floor of a response's log-probability: 10,000 tokens at their own floor.
_RESPONSE_FLOOR = -1e8


def ppo_loss(
    logprob: torch.Tensor,
    old_logprob: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    clip: float | tuple[float, float] = 0.2,
    dual_clip: float | None = None,
    reduction: PenaltyReduction = "token_mean",
    cu_seqlens: torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """PPO's clipped surrogate objective as a loss to minimise.

    Equivalent to

        ratio = (logprob - old_logprob).exp()
        gain = torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
        gain = torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)        # with dual_clip
        loss = -(gain * mask).sum() / mask.sum()                                                     # reduction "token_mean"

    with its value and gradient finite for every ratio: one above e^20 = 4.9e8 counts as e^20 and,
    like a clipped one, has no gradient; and a log-probability below -1e4, -inf included, counts as
    -1e4 and has none, so that -inf in both is a ratio of 1.

    Args:
        logprob: log π(token) in nats, [B, T] (any leading shape), with gradient; or [total],
            sequences packed one behind the other.
        old_logprob: the same under the policy that chose the tokens, without gradient; None: that
            is the policy as it is now, ratio 1.
        advantages: one per token, shaped as logprob, or per sequence, [B]; with cu_seqlens [S],
            which is how S = total of them count, too.
        mask: bool, shaped as logprob, True where the token counts.
        clip: how far the ratio may move from 1 before its gradient stops: one number, or (low,
            high) for 1 - low and 1 + high.
        dual_clip: for a negative advantage, the ratio above which its gradient stops, larger than
            1; None: no such bound.
        reduction: "token_mean", also spelt "mean": mean over the tokens that count;
            "sequence_mean": mean over sequences of the sum over each one's tokens, sequences
            without a token that counts left out; "sum".
        cu_seqlens: integers [S+1] from 0 to total: sequence s is logprob[cu_seqlens[s] :
            cu_seqlens[s + 1]]; empty ones are allowed. Without it a logprob [total] will do for
            what asks no token's sequence: "token_mean" and "sum", with advantages per token.
        normalizer: for a mean, the divisor in place of this call's own count, so that micro-batches
            and processes of different lengths weigh each token (sequence) the same: how many count
            in all micro-batches of a step; under DDP and FSDP, which average gradients, that number
            over all processes / world_size. A number above 0, or a tensor of one, where 0 gives 0.

    Returns:
        The loss, a float32 scalar (float64 for a float64 logprob). 0 where no token counts.
        Boundaries that do not run from 0 to total are an error on the CPU; on a GPU, where looking
        would cost a synchronisation, and under torch.compile, the loss is NaN.

    Gradient:
        To logprob: -ratio·A times the reduction's weight, 0 where clipped. None to old_logprob and
        advantages. Tokens that do not count have no part in value or gradient, whatever they hold,
        NaN included; a NaN in one that counts makes the loss NaN.

    Raises:
        TypeError: a tensor not of a float type, log-probabilities of float64 beside another type,
            mask not bool, a setting that is no number.
        ValueError: shapes or devices that do not fit, old_logprob with gradient, clip or dual_clip
            out of range, another reduction, cu_seqlens missing or wrong, a normalizer that is not
            above 0 or beside "sum".

    Source: Schulman et al., Proximal Policy Optimization Algorithms (2017), eq. 7; Ye et al.,
    Mastering Complex Control in MOBA Games with Deep Reinforcement Learning (2020), for the dual
    clip; Yu et al., DAPO (2025), for a higher upper bound.
    """
    _checks.choice("reduction", reduction, PPO_REDUCTIONS)
    if dual_clip is not None:
        dual_clip = _checks.number(
            "dual_clip",
            dual_clip,
            "None or a finite number above 1",
            lambda x: 1 < x < math.inf,
            "3 is common",
        )
    bounds = _checks.clip(clip)
    sequences = _sequences(logprob, cu_seqlens, reduction == "sequence_mean")
    _check_normalizer(normalizer, reduction, "token_mean", logprob)
    logprob, old_logprob, advantages, mask = _prepare(
        logprob, old_logprob, advantages, mask, sequences, cu_seqlens
    )
    ratio = _clipped_ratio(logprob - old_logprob, advantages, bounds, dual_clip)
    return _total(-advantages * ratio, mask, sequences, reduction, normalizer)


def grpo_loss(
    logprob: torch.Tensor,
    old_logprob: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    ref_logprob: torch.Tensor | None = None,
    kl: torch.Tensor | None = None,
    beta: float | torch.Tensor | BetaController = 0.0,
    clip: float | tuple[float, float] = 0.2,
    level: Level = "token",
    reduction: GRPOReduction = "grpo",
    max_length: int | None = None,
    correct_kl: bool = False,
    kl_clamp: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """GRPO's loss: the clipped surrogate of PPO plus beta times a KL to the reference, token by
    token.

    Equivalent to

        ratio = (logprob - old_logprob).exp()                                                        # level "token"
        loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
        d = logprob - ref_logprob
        loss = loss + beta * ((-d).exp() - 1 + d)                                                    # ref_logprob; times ratio: correct_kl
        loss = loss + beta * kl                                                                      # kl
        loss = ((loss * mask).sum(-1) / mask.sum(-1)).mean()                                         # reduction "grpo"

    with value and gradient finite for every ratio, as ppo_loss, and for every d, as estimate_kl and
    sampled_kl_loss, which give the KL.

    Which KL: pass `kl`. Its gradient is that of KL(policy‖reference) of each token given its
    prefix, over the whole vocabulary, without noise, on- and off-policy. ref_logprob is the
    published form, an estimate from the sampled tokens: its value is an unbiased one of
    KL(policy‖reference) on-policy only, and its gradient on-policy is that of KL(reference‖policy),
    the other direction. correct_kl at level "token" mends both, on- and off-policy; the noise
    stays.

    Args:
        logprob, old_logprob, advantages, mask, clip: as ppo_loss. The advantages of a group are its
            rewards less their mean (over their spread).
        ref_logprob: log π_ref(token), shaped as logprob, no gradient.
        kl: exact KL(policy‖reference) of each token in nats, shaped as logprob, with gradient:
            kl_divergence(policy_logits, ref_logits).
        beta: the KL's weight: a number ≥ 0, a 0-d tensor, or a controller with an attribute `beta`.
            A number 0 leaves the KL out. A tensor is not looked at: a negative one is no error, and
            0 times an infinite `kl` is NaN.
        level: "token": a ratio per token; "sequence": the geometric mean of a sequence's ratios for
            all its tokens (GSPO). Its gradient takes each token with its own advantage (GSPO-token;
            for one advantage per sequence the same). The KL stays per token.
        reduction: "grpo": mean over the B sequences of the mean over each one's tokens, a sequence
            without a token that counts as 0; "bnpo": mean over the batch's tokens that count, also
            that of DAPO if the batch is whole; "dr_grpo": sum / (B·max_length); "sum".
        max_length: with "dr_grpo", the largest number of tokens that a completion may have, the
            same in every step. That none has more is checked on the CPU only, outside
            torch.compile: elsewhere looking would cost a synchronisation.
        correct_kl: multiply the estimate from ref_logprob by the ratio of `level`, with gradient
            and not clipped. The token's is an importance weight. The sequence's geometric mean,
            which TRL and Liger multiply by, is none: with more than one token value and gradient
            are biased.
        kl_clamp: the clamp of estimate_kl and sampled_kl_loss for the estimate from ref_logprob:
            without one a token with d = -20 has a gradient of size e^20, with 5 of e^5.
        cu_seqlens: as ppo_loss; without it a logprob [total] will do for level "token" with "bnpo"
            and "sum".
        normalizer: as ppo_loss: with "bnpo" in place of the number of tokens that count, with
            "grpo" and "dr_grpo" in place of B, the number of sequences.

    Returns:
        As ppo_loss.

    Gradient:
        To logprob and kl. As ppo_loss else.

    Raises:
        As ppo_loss. ValueError also: a number beta that is negative or not finite, one above 0
        without ref_logprob or kl, both of them, a kl without gradient beside a logprob with one,
        correct_kl or kl_clamp with kl, a kl_clamp outside (0, 50], max_length missing, without its
        reduction, or less than a sequence's tokens on the CPU.

    Source: Shao et al., DeepSeekMath (2024), eqs. 3 and 4; Zheng et al., Group Sequence Policy
    Optimization (2025), for level "sequence"; Liu et al., Understanding R1-Zero-Like Training
    (2025), for "dr_grpo"; DeepSeek-AI, DeepSeek-V3.2 (2025), for correct_kl, and for its ratio at
    level "sequence" TRL 1.16, GRPOTrainer._compute_loss (per_token_kl * coef_1,
    use_bias_correction_kl), and Liger Kernel 0.8.2, chunked_loss/grpo_loss.py (kl_div *
    exp(log_importance_weights)).
    """
    _checks.choice("level", level, LEVELS)
    _checks.choice("reduction", reduction, GRPO_REDUCTIONS)
    _check_max_length(max_length, reduction)
    bounds = _checks.clip(clip)
    sequences = _sequences(
        logprob, cu_seqlens, reduction in ("grpo", "dr_grpo") or level == "sequence"
    )
    _check_normalizer(normalizer, reduction, "bnpo", logprob)
    beta = _checks.beta(beta, "logprob", logprob)
    _check_kl(logprob, ref_logprob, kl, beta, correct_kl, kl_clamp)
    logprob, old_logprob, advantages, mask = _prepare(
        logprob, old_logprob, advantages, mask, sequences, cu_seqlens
    )
    log_ratio = (
        logprob - old_logprob
        if level == "token"
        else _sequence_log_ratio(logprob, old_logprob, mask, sequences)
    )
    loss = -advantages * _clipped_ratio(log_ratio, advantages, bounds)
    if isinstance(beta, torch.Tensor) or beta > 0:
        if kl is not None:
            kl = _counted(kl.to(logprob.dtype), mask)
        else:
            assert ref_logprob is not None
            reference = _counted(finite(ref_logprob.detach()), mask)
            if correct_kl and level == "token":
                kl = sampled_kl_loss(logprob, reference, old_logprob=old_logprob, clamp=kl_clamp)
            else:
                kl = estimate_kl(logprob, reference, estimator="k3", clamp=kl_clamp)
            if correct_kl and level == "sequence":
                mean = sequences.spread(_mean_log_ratio(logprob, old_logprob, mask, sequences))
                kl = kl * mean.clamp(max=LARGEST_LOG_RATIO).exp()
        loss = loss + beta * kl
    return _total(loss, mask, sequences, reduction, normalizer, max_length)


class DPOLoss(NamedTuple):
    """Result of dpo_loss. loss: scalar, with gradient. chosen_reward, rejected_reward: implicit
    rewards, and margin: their difference; detached.
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
        loss = -((1 - label_smoothing) * F.logsigmoid(margin) + label_smoothing * F.logsigmoid(-margin)).mean()

    The policy that maximises reward - beta·KL(policy‖reference) is ∝ reference·exp(reward / beta),
    so beta·(log π - log π_ref) is a reward that π is the optimum of, up to a constant per prompt:
    no reward model, and the KL penalty is in the loss already.

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
        A log-probability below -1e8, -inf included, counts as -1e8 and has no gradient: what a
        token's -1e4 (estimate_kl) is to a response, whose sum over a long one may well be below
        -1e4. So -inf under policy and reference is a reward of 0.

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
    for name, value in (
        ("chosen", chosen),
        ("rejected", rejected),
        ("ref_chosen", ref_chosen),
        ("ref_rejected", ref_rejected),
    ):
        _checks.float_tensor(name, value, "log-probabilities of responses [B]")
        if value.dim() != 1:
            raise ValueError(
                f"{name}: expected one log-probability per response, [B], got "
                f"{tuple(value.shape)}; sum over the response's tokens"
            )
        _checks.like(name, value, "chosen", chosen)
    _check_normalizer(normalizer, "mean", "mean", chosen)
    chosen, rejected = (finite(value, _RESPONSE_FLOOR) for value in (chosen, rejected))
    ref_chosen, ref_rejected = (
        finite(value.detach(), _RESPONSE_FLOOR) for value in (ref_chosen, ref_rejected)
    )
    chosen_reward = beta * (chosen - ref_chosen)
    rejected_reward = beta * (rejected - ref_rejected)
    margin = chosen_reward - rejected_reward
    log_sigmoid = torch.nn.functional.logsigmoid
    losses = (
        -log_sigmoid(margin)
        if label_smoothing == 0
        else -(1 - label_smoothing) * log_sigmoid(margin) - label_smoothing * log_sigmoid(-margin)
    )
    divisor = _divisor(normalizer, max(losses.numel(), 1), losses.dtype)
    return DPOLoss(
        losses.sum() / divisor, chosen_reward.detach(), rejected_reward.detach(), margin.detach()
    )


def _check_max_length(max_length: int | None, reduction: str) -> None:
    if reduction == "dr_grpo":
        _checks.whole_number(
            "max_length",
            max_length,
            "the largest number of tokens that a completion may have, with reduction='dr_grpo'",
            "pass the limit that the sampling had",
        )
    elif max_length is not None:
        raise ValueError(
            f"max_length: expected None with reduction={reduction!r}, got "
            f"{_checks.shown(max_length)}; only 'dr_grpo' divides by it"
        )


def _check_kl(
    logprob: torch.Tensor,
    ref_logprob: torch.Tensor | None,
    kl: torch.Tensor | None,
    beta: float | torch.Tensor,
    correct_kl: bool,
    kl_clamp: float | None,
) -> None:
    """Exactly one source of the KL, where beta asks for one."""
    if not isinstance(correct_kl, bool):
        raise TypeError(
            f"correct_kl: expected True or False, got {_checks.type_name(correct_kl)}; "
            f"pass correct_kl=True to multiply the estimate by the ratio"
        )
    _checks.clamp("kl_clamp", kl_clamp)
    if ref_logprob is not None and kl is not None:
        raise ValueError("kl: expected either kl or ref_logprob, got both; kl is the exact one")
    if ref_logprob is None and kl is None and (isinstance(beta, torch.Tensor) or beta > 0):
        raise ValueError(
            "kl: expected the exact KL of each token, or ref_logprob for an estimate, with beta "
            "above 0, got neither; "
            "pass kl=kl_divergence(policy_logits, ref_logits)"
        )
    for name, value in (("ref_logprob", ref_logprob), ("kl", kl)):
        if value is not None:
            _checks.float_tensor(name, value, "per token, shaped as logprob")
            _checks.like(name, value, "logprob", logprob)
    for name, given, default in (("correct_kl", correct_kl, False), ("kl_clamp", kl_clamp, None)):
        if kl is not None and given != default:
            raise ValueError(
                f"{name}: expected {default} with an exact kl, got {_checks.shown(given)}; "
                f"it is for the estimate from ref_logprob, an exact kl needs "
                f"no such thing"
            )
    if (
        kl is not None
        and torch.is_grad_enabled()
        and logprob.requires_grad
        and not kl.requires_grad
    ):
        raise ValueError(
            "kl: expected a KL with gradient, as kl_divergence gives it from the policy's logits, "
            "got one without; a constant in the "
            "loss would penalise nothing (shape_rewards takes a KL without gradient)"
        )


class _Sequences(NamedTuple):
    """Which tokens are one sequence: a row of a padded batch, or with `owner` those of a packed one
    that have the same owner.
    """

    number: int
    owner: torch.Tensor | None = None
    right: torch.Tensor | None = None  # whether the boundaries were

    def sums(self, per_token: torch.Tensor) -> torch.Tensor:
        """One sum per sequence."""
        if self.owner is None:
            return per_token.sum(-1)
        return per_token.new_zeros(self.number + 1).index_add(0, self.owner, per_token)[:-1]

    def spread(self, per_sequence: torch.Tensor) -> torch.Tensor:
        """One value per sequence, for each of its tokens."""
        return (
            per_sequence[..., None]
            if self.owner is None
            else torch.nn.functional.pad(per_sequence, (0, 1))[self.owner]
        )


def _sequences(logprob: torch.Tensor, cu_seqlens: torch.Tensor | None, needed: bool) -> _Sequences:
    """The sequences of a checked logprob, from its shape or from the boundaries, `needed` if the
    loss asks which sequence a token is in.
    """
    _checks.float_tensor("logprob", logprob, "log-probabilities [..., T]")
    if logprob.dim() == 0:
        raise ValueError(
            "logprob: expected log-probabilities [..., T] with at least one dimension, got a "
            "scalar; pass one entry per token"
        )
    if cu_seqlens is not None:
        _checks.cu_seqlens(cu_seqlens, "logprob", logprob)
        return _Sequences(len(cu_seqlens) - 1, *owners(cu_seqlens, len(logprob)))
    if logprob.dim() == 1 and needed:
        raise ValueError(
            f"cu_seqlens: expected the boundaries of the sequences packed into logprob, "
            f"{tuple(logprob.shape)}, for this reduction or "
            f"level, which ask what sequence a token is in, got None; pass them, or [1, T] "
            f"tensors for a single sequence"
        )
    return _Sequences(logprob.shape[:-1].numel())


def _prepare(
    logprob: torch.Tensor,
    old_logprob: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor | None,
    sequences: _Sequences,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """(logprob, old_logprob, advantages per token, mask), checked, in the type to compute in, 0
    where the token does not count.
    """
    if old_logprob is not None:
        _checks.float_tensor(
            "old_logprob", old_logprob, "log-probabilities shaped as logprob, or None"
        )
        _checks.like("old_logprob", old_logprob, "logprob", logprob)
        _checks.no_gradient(
            "old_logprob", old_logprob, "the ratio is differentiated with respect to logprob alone"
        )
    _checks.float_tensor("advantages", advantages, "one per sequence or per token")
    _checks.per_token_or_sequence("advantages", advantages, "logprob", logprob, cu_seqlens)
    _checks.mask(mask, logprob.shape, logprob.device)
    advantages = advantages.detach()
    if (
        advantages.shape != logprob.shape
        or cu_seqlens is not None
        and len(advantages) == sequences.number
    ):
        advantages = sequences.spread(advantages)
    mask = torch.ones_like(logprob, dtype=torch.bool) if mask is None else mask
    now = finite(logprob)
    old = now.detach() if old_logprob is None else finite(old_logprob)
    return _counted(now, mask), _counted(old, mask), _counted(advantages.to(now.dtype), mask), mask


def _counted(value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The value where the token counts, else 0: a product with the mask would keep a NaN, in the
    value or in the gradient.
    """
    return torch.where(mask, value, 0.0)


def _clipped_ratio(
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    bounds: tuple[float, float],
    dual_clip: float | None = None,
) -> torch.Tensor:
    """The ratio r' with r'·A = min(ratio·A, clip(ratio)·A): bounded above for A ≥ 0, and below
    (with a dual clip above too) for A < 0.

    Bounded before the product, since a minimum of products gives 0·inf = NaN as the gradient of a
    branch that it did not take.
    """
    low, high = bounds
    ratio = log_ratio.clamp(max=LARGEST_LOG_RATIO).exp()
    one = ratio.new_ones(
        ()
    )  # bounds as tensors: torch.compile makes constants, and a graph each, of numbers that clamp gets
    return torch.where(
        advantages >= 0,
        ratio.clamp(max=one + high),
        ratio.clamp(min=one - low, max=None if dual_clip is None else one * dual_clip),
    )


def _mean_log_ratio(
    logprob: torch.Tensor, old_logprob: torch.Tensor, mask: torch.Tensor, sequences: _Sequences
) -> torch.Tensor:
    """Average each sequence's log-ratios over its tokens that count."""
    return sequences.sums(logprob - old_logprob) / sequences.sums(mask.long()).clamp(min=1)


def _sequence_log_ratio(
    logprob: torch.Tensor, old_logprob: torch.Tensor, mask: torch.Tensor, sequences: _Sequences
) -> torch.Tensor:
    """The mean of each sequence's log-ratios over the tokens that count, for each of its tokens,
    with the gradient of the token's own logprob.
    """
    mean = _mean_log_ratio(logprob.detach(), old_logprob, mask, sequences)
    return sequences.spread(mean) + (logprob - logprob.detach())  # 0, with a gradient


def _check_normalizer(
    normalizer: float | torch.Tensor | None, reduction: str, mean: str, like: torch.Tensor
) -> None:
    """Check the divisor of a mean; `mean` is the reduction that a message names."""
    if reduction == "sum" and normalizer is not None:
        raise ValueError(
            f"normalizer: expected None with reduction='sum', got "
            f"{_checks.type_name(normalizer)}; it is for means, use reduction={mean!r}"
        )
    _checks.normalizer(normalizer, "mean", like.device)


def _divisor(
    normalizer: float | torch.Tensor | None, count: float | torch.Tensor, dtype: torch.dtype
) -> float | torch.Tensor:
    """Return the normalizer, a tensor 0 as inf, or without one the count."""
    return count if normalizer is None else _reduce.divisor("mean", normalizer, None, (), dtype)


def _total(
    per_token: torch.Tensor,
    mask: torch.Tensor,
    sequences: _Sequences,
    reduction: str,
    normalizer: float | torch.Tensor | None,
    max_length: int | None = None,
) -> torch.Tensor:
    """The scalar loss of per-token ones that are 0 where the token does not count."""
    loss, tokens = per_token.sum(), sequences.sums(mask.long())
    batch = _divisor(normalizer, max(sequences.number, 1), loss.dtype)
    if reduction in ("token_mean", "mean", "bnpo"):
        loss = loss / _divisor(normalizer, mask.sum().clamp(min=1), loss.dtype)
    elif reduction == "sequence_mean":
        loss = loss / _divisor(normalizer, (tokens > 0).sum().clamp(min=1), loss.dtype)
    elif reduction == "dr_grpo":
        assert max_length is not None
        if (
            tokens.device.type == "cpu"
            and tokens.numel()
            and not torch.compiler.is_compiling()
            and int(tokens.max()) > max_length
        ):
            raise ValueError(
                f"max_length: expected at least the tokens of each sequence, {int(tokens.max())}, "
                f"got {max_length}; pass the limit that "
                f"the sampling had"
            )
        loss = loss / (batch * max_length)
    elif reduction == "grpo":
        loss = (per_token / sequences.spread(tokens).clamp(min=1)).sum() / batch
    return loss if sequences.right is None else torch.where(sequences.right, loss, math.nan)
