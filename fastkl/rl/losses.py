"""Policy-gradient losses over log-probabilities: PPO, and GRPO and GSPO with their KL penalty."""

import math
from typing import Literal, get_args

import torch

from .._types import BetaController, PenaltyReduction
from ..estimators import LARGEST_LOG_RATIO, estimate_kl, finite, sampled_kl_loss
from . import _checks
from .sequences import Sequences, sequences_of, total

GRPOReduction = Literal["grpo", "bnpo", "dr_grpo", "sum"]
Level = Literal["token", "sequence"]
PPO_REDUCTIONS = get_args(PenaltyReduction)
GRPO_REDUCTIONS = get_args(GRPOReduction)
LEVELS = get_args(Level)


def ppo_loss(  # noqa: PLR0913
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
        if dual_clip is not None:
            bounded = torch.maximum(gain, dual_clip * advantages)
            gain = torch.where(advantages < 0, bounded, gain)
        loss = -(gain * mask).sum() / mask.sum()                        # reduction "token_mean"

    with value and gradient finite for every ratio. A ratio above e^20 = 4.9e8 counts as e^20 and
    has no gradient, like a clipped one; a log-probability below -1e4, -inf included, counts as -1e4
    and has no gradient, so that -inf in both is a ratio of 1.

    Args:
        logprob: log π(token) in nats, [B, T] (any leading shape), with gradient; or [total],
            sequences packed one behind the other.
        old_logprob: the same under the policy that sampled the tokens, without gradient; None: the
            policy as it is now, ratio 1.
        advantages: one per token, shaped as logprob, or per sequence, [B], with cu_seqlens [S];
            where S = total they count as one per sequence.
        mask: bool, shaped as logprob, True where the token counts.
        clip: how far the ratio may move from 1 before its gradient stops: one number, or (low,
            high) for 1 - low and 1 + high.
        dual_clip: for a negative advantage, the ratio above which its gradient stops, larger than
            1; None: no such bound.
        reduction: "token_mean", also spelt "mean": mean over the tokens that count;
            "sequence_mean": mean over sequences of the sum over each one's tokens, sequences
            without a token that counts left out; "sum".
        cu_seqlens: integers [S+1] from 0 to total: sequence s is logprob[cu_seqlens[s] :
            cu_seqlens[s + 1]]; empty ones are allowed. "token_mean" and "sum" with advantages per
            token take a logprob [total] without it.
        normalizer: for a mean, the divisor in place of this call's own count, so that each token
            (sequence) has the same weight in micro-batches and processes of different lengths: the
            count over all micro-batches of a step; under DDP and FSDP, which average gradients,
            the count over all processes / world_size. A number above 0, or a tensor of one, where
            0 gives 0.

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
            mask not bool, a setting that is not a number.
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
    _checks.normalizer(normalizer, reduction, logprob.device)
    logprob, old_logprob, advantages, mask = _prepare(
        logprob, old_logprob, advantages, mask, sequences, cu_seqlens
    )
    ratio = _clipped_ratio(logprob - old_logprob, advantages, bounds, dual_clip)
    return total(-advantages * ratio, mask, sequences, reduction, normalizer)


def grpo_loss(  # noqa: PLR0913
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

        ratio = (logprob - old_logprob).exp()                           # level "token"
        loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
        if kl is None:
            d = logprob - ref_logprob
            kl = ((-d).exp() - 1 + d) * (ratio if correct_kl else 1)
        loss = loss + beta * kl
        loss = ((loss * mask).sum(-1) / mask.sum(-1)).mean()            # reduction "grpo"

    with value and gradient finite for every ratio, as in ppo_loss, and for every d, as in
    estimate_kl and sampled_kl_loss, which compute the estimate.

    Which KL: pass `kl`. Its gradient is that of KL(policy‖reference) of each token given its
    prefix, over the whole vocabulary, without noise, on- and off-policy. ref_logprob is the
    published form, an estimate from the sampled tokens: on-policy alone it is an unbiased estimate
    of KL(policy‖reference), and even there its gradient is that of the other direction,
    KL(reference‖policy). correct_kl at level "token" corrects both, on- and off-policy; the noise
    stays.

    Args:
        logprob, old_logprob, advantages, mask, clip: as in ppo_loss. The advantages of a group are
            its rewards less their mean, over their standard deviation in the published form.
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
            without it a token with d = -20 has a gradient of size e^20, with kl_clamp=5 of e^5.
        cu_seqlens: as in ppo_loss; level "token" with "bnpo" and "sum" takes a logprob [total]
            without it.
        normalizer: as in ppo_loss: with "bnpo" in place of the number of tokens that count, with
            "grpo" and "dr_grpo" in place of B, the number of sequences.

    Returns:
        As ppo_loss.

    Gradient:
        To logprob, as in ppo_loss, and to kl.

    Raises:
        As ppo_loss. ValueError also: a number beta that is negative or not finite, one above 0
        without ref_logprob or kl, both of them, a kl without gradient beside a logprob with one,
        correct_kl or kl_clamp with kl, a kl_clamp outside (0, 50], max_length missing, without its
        reduction, or less than a sequence's tokens on the CPU.

    Source: Shao et al., DeepSeekMath (2024), eqs. 3 and 4; Zheng et al., Group Sequence Policy
    Optimization (2025), for level "sequence"; Liu et al., Understanding R1-Zero-Like Training
    (2025), for "dr_grpo"; DeepSeek-AI, DeepSeek-V3.2 (2025), for correct_kl; its ratio at level
    "sequence" is that of TRL 1.16, GRPOTrainer._compute_loss (per_token_kl * coef_1), and of Liger
    Kernel 0.8.2, chunked_loss/grpo_loss.py (kl_div * exp(log_importance_weights)).
    """
    _checks.choice("level", level, LEVELS)
    _checks.choice("reduction", reduction, GRPO_REDUCTIONS)
    if reduction == "dr_grpo":
        _checks.whole_number(
            "max_length",
            max_length,
            "the largest number of tokens that a completion may have, with reduction='dr_grpo'",
            "pass the limit that the sampling had",
        )
    _checks.expect(
        reduction == "dr_grpo" or max_length is None,
        "max_length",
        f"None with reduction={reduction!r}",
        max_length,
        "only 'dr_grpo' divides by it",
    )
    bounds = _checks.clip(clip)
    sequences = _sequences(
        logprob, cu_seqlens, reduction in ("grpo", "dr_grpo") or level == "sequence"
    )
    _checks.expect(
        reduction != "sum" or normalizer is None,
        "normalizer",
        "None with reduction='sum'",
        normalizer,
        "it is for means, use reduction='bnpo'",
    )
    _checks.normalizer(normalizer, "mean", logprob.device)
    beta = _checks.beta(beta, "logprob", logprob)
    _check_kl(logprob, ref_logprob, kl, beta, correct_kl, kl_clamp)
    logprob, old_logprob, advantages, mask = _prepare(
        logprob, old_logprob, advantages, mask, sequences, cu_seqlens
    )
    log_ratio = logprob - old_logprob
    if level == "sequence":
        mean = _mean_log_ratio(logprob.detach(), old_logprob, mask, sequences)
        # The difference is 0, and gives each token the gradient of its own logprob.
        log_ratio = mean + (logprob - logprob.detach())
    loss = -advantages * _clipped_ratio(log_ratio, advantages, bounds)
    if isinstance(beta, torch.Tensor) or beta > 0:
        if kl is not None:
            kl = torch.where(mask, kl.to(logprob.dtype), 0.0)
        else:
            assert ref_logprob is not None
            reference = torch.where(mask, finite(ref_logprob.detach()), 0.0)
            if correct_kl and level == "token":
                kl = sampled_kl_loss(logprob, reference, old_logprob=old_logprob, clamp=kl_clamp)
            else:
                kl = estimate_kl(logprob, reference, estimator="k3", clamp=kl_clamp)
            if correct_kl and level == "sequence":
                mean = _mean_log_ratio(logprob, old_logprob, mask, sequences)
                kl = kl * mean.clamp(max=LARGEST_LOG_RATIO).exp()
        loss = loss + beta * kl
    return total(loss, mask, sequences, reduction, normalizer, max_length)


def _sequences(logprob: torch.Tensor, cu_seqlens: torch.Tensor | None, needed: bool) -> Sequences:
    """Check logprob and return its sequences; needed: whether the loss asks for boundaries."""
    _checks.float_tensor("logprob", logprob, "log-probabilities [..., T]", 1)
    _checks.expect(
        cu_seqlens is not None or logprob.dim() > 1 or not needed,
        "cu_seqlens",
        "the boundaries of the sequences packed into logprob, for this reduction or level, which "
        "ask what sequence a token is in",
        None,
        "pass them, or [1, T] tensors for a single sequence",
    )
    return sequences_of("logprob", logprob, cu_seqlens)


def _check_kl(
    logprob: torch.Tensor,
    ref_logprob: torch.Tensor | None,
    kl: torch.Tensor | None,
    beta: float | torch.Tensor,
    correct_kl: bool,
    kl_clamp: float | None,
) -> None:
    """Check for exactly one source of the KL, where beta asks for one."""
    _checks.expect(
        isinstance(correct_kl, bool),
        "correct_kl",
        "True or False",
        correct_kl,
        "pass correct_kl=True to multiply the estimate by the ratio",
        TypeError,
    )
    _checks.clamp("kl_clamp", kl_clamp)
    given = [value for value in (ref_logprob, kl) if value is not None]
    _checks.expect(len(given) < 2, "kl", "either kl or ref_logprob", "both", "kl is the exact one")
    _checks.expect(
        given or not (isinstance(beta, torch.Tensor) or beta > 0),
        "kl",
        "the exact KL of each token, or ref_logprob for an estimate, with beta above 0",
        "neither",
        "pass kl=kl_divergence(policy_logits, ref_logits)",
    )
    for value in given:
        name = "ref_logprob" if kl is None else "kl"
        _checks.float_tensor(name, value, "per token, shaped as logprob")
        _checks.like(name, value, "logprob", logprob)
    if kl is None:
        return
    for name, setting, default in (("correct_kl", correct_kl, False), ("kl_clamp", kl_clamp, None)):
        _checks.expect(
            setting == default,
            name,
            f"{default} with an exact kl",
            setting,
            "it is for the estimate from ref_logprob, an exact kl needs no such thing",
        )
    _checks.expect(
        kl.requires_grad or not (torch.is_grad_enabled() and logprob.requires_grad),
        "kl",
        "a KL with gradient, as kl_divergence gives it from the policy's logits",
        "one without",
        "a constant in the loss would penalise nothing (shape_rewards takes a KL without gradient)",
    )


def _prepare(
    logprob: torch.Tensor,
    old_logprob: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor | None,
    sequences: Sequences,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Check the tensors of a loss and return (logprob, old_logprob, advantages per token, mask).

    They are in the type to compute in, and 0 where the token does not count.
    """
    if old_logprob is not None:
        _checks.float_tensor(
            "old_logprob", old_logprob, "log-probabilities shaped as logprob, or None"
        )
        _checks.like("old_logprob", old_logprob, "logprob", logprob)
        _checks.expect(
            not old_logprob.requires_grad,
            "old_logprob",
            "a tensor without gradient",
            "one that requires it",
            "the ratio is differentiated with respect to logprob alone: pass old_logprob.detach()",
        )
    _checks.float_tensor("advantages", advantages, "one per sequence or per token")
    _checks.per_token_or_sequence("advantages", advantages, "logprob", logprob, cu_seqlens)
    _checks.mask(mask, logprob.shape, logprob.device)
    advantages = advantages.detach()
    if sequences.takes(advantages, logprob):
        advantages = sequences.spread(advantages)
    mask = torch.ones_like(logprob, dtype=torch.bool) if mask is None else mask
    now = finite(logprob)
    old = now.detach() if old_logprob is None else finite(old_logprob)
    given = now, old, advantages.to(now.dtype)
    # A product with the mask would keep a NaN, in the value or in the gradient.
    return *(torch.where(mask, value, 0.0) for value in given), mask


def _clipped_ratio(
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    bounds: tuple[float, float],
    dual_clip: float | None = None,
) -> torch.Tensor:
    """Return the ratio r' with r'·A = min(ratio·A, clip(ratio)·A).

    It is bounded above for A ≥ 0, and below (with a dual clip above too) for A < 0. The bound comes
    before the product: a minimum of products has the gradient 0·inf = NaN in the branch not taken.
    """
    ratio = log_ratio.clamp(max=LARGEST_LOG_RATIO).exp()
    # Bounds as tensors: torch.compile compiles a graph for each number that clamp gets.
    one = ratio.new_ones(())
    return torch.where(
        advantages >= 0,
        ratio.clamp(max=one + bounds[1]),
        ratio.clamp(min=one - bounds[0], max=None if dual_clip is None else one * dual_clip),
    )


def _mean_log_ratio(
    logprob: torch.Tensor, old_logprob: torch.Tensor, mask: torch.Tensor, sequences: Sequences
) -> torch.Tensor:
    """Give each token the mean of its sequence's log-ratios over the tokens that count."""
    tokens = sequences.sums(mask.long()).clamp(min=1)
    return sequences.spread(sequences.sums(logprob - old_logprob) / tokens)
