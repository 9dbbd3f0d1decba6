"""Policy-gradient losses from log-probabilities: PPO; GRPO, GSPO, CISPO and SAPO with a KL."""

from typing import Literal, get_args

import torch

from .._types import BetaController, PenaltyReduction
from ..estimators import LARGEST_LOG_RATIO, estimate_kl, finite, sampled_kl_loss
from . import _checks
from .sequences import loss_tensors, total
from .surrogates import CLIP, SurrogateName, checked_surrogate, mean_log_ratio

PPOReduction = Literal["none", PenaltyReduction]
GRPOReduction = Literal["none", "grpo", "bnpo", "dr_grpo", "sum"]
Level = Literal["token", "sequence"]


def ppo_loss(  # noqa: PLR0913
    logprob: torch.Tensor,
    old_logprob: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    clip: float | tuple[float, float] = CLIP,
    dual_clip: float | None = None,
    reduction: PPOReduction = "token_mean",
    cu_seqlens: torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute PPO's clipped surrogate objective as a loss to minimise.

    Equivalent to

        ratio = (logprob - old_logprob).exp()
        gain = torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
        if dual_clip is not None:
            bounded = torch.maximum(gain, dual_clip * advantages)
            gain = torch.where(advantages < 0, bounded, gain)
        loss = -(gain * mask).sum() / mask.sum()                        # reduction "token_mean"

    with value and gradient finite for every ratio. A ratio above e^20 = 4.9e8 counts as e^20 and
    has no gradient, like a clipped one; a log-probability below -1e4, -inf included, counts as -1e4
    and has no gradient, so -inf in both gives a ratio of 1.

    Args:
        logprob: log π(token) in nats, [B, T] (any leading shape), with gradient; or [total],
            concatenated packed sequences.
        old_logprob: the same under the policy that sampled the tokens, without gradient; None: the
            current policy, ratio 1.
        advantages: one per token, shaped as logprob, or per sequence, [B], with cu_seqlens [S]; if
            S = total they count as one per sequence.
        mask: bool, shaped as logprob, True where the token counts.
        clip: how far the ratio may move from 1 before its gradient stops: one number, or (low,
            high) for 1 - low and 1 + high.
        dual_clip: for a negative advantage, the ratio above which the gradient stops, larger than
            1; None: no such bound.
        reduction: "token_mean", also spelt "mean": mean over the tokens that count;
            "sequence_mean": mean, over sequences with a token that counts, of the sum over each
            one's tokens; "sum"; "none": one loss per token.
        cu_seqlens: integers [S+1] from 0 to total: sequence s is logprob[cu_seqlens[s] :
            cu_seqlens[s + 1]]; empty ones are allowed. "token_mean" and "sum" with advantages per
            token take a logprob [total] without it.
        normalizer: for a mean, the divisor in place of this call's own count, so that each token
            (sequence) has the same weight in micro-batches and processes of different lengths: the
            count over all micro-batches of a step; under DDP and FSDP, which average gradients, the
            count over all processes / world_size. A number above 0, or a tensor with one number; a
            tensor 0 gives 0.

    Returns:
        The loss, a float32 scalar (float64 for a float64 logprob). 0 if no token counts. With
        "none" shaped as logprob, exactly 0 for tokens that do not count. Boundaries that do not run
        from 0 to total are an error on the CPU; on a GPU, where a check would synchronise, and
        under torch.compile, the loss is NaN (with "none", for every token that counts).

    Gradient:
        To logprob: -ratio·A times the reduction's weight, 0 where clipped. None to old_logprob and
        advantages. Tokens that do not count affect neither value nor gradient, whatever they hold,
        NaN included; a NaN in one that counts makes the loss NaN.

    Raises:
        TypeError: a tensor not of a float type, float64 log-probabilities mixed with another type,
            mask not bool, a setting that is not a number.
        ValueError: mismatched shapes or devices, old_logprob with gradient, clip or dual_clip out
            of range, an unknown reduction, cu_seqlens missing or wrong, a normalizer that is not
            above 0 or is given with "sum" or "none".

    Source: Schulman et al., Proximal Policy Optimization Algorithms (2017), eq. 7; Ye et al.,
    Mastering Complex Control in MOBA Games with Deep Reinforcement Learning (2020), for the dual
    clip; Yu et al., DAPO (2025), for a higher upper bound.
    """
    _checks.choice("reduction", reduction, get_args(PPOReduction))
    surrogate = checked_surrogate("clip", clip, dual_clip)
    now, old, advantages, mask, sequences = loss_tensors(
        logprob,
        old_logprob,
        advantages,
        mask,
        cu_seqlens,
        boundaries_needed=reduction == "sequence_mean",
    )
    _checks.normalizer(normalizer, reduction, logprob.device)
    loss = surrogate.losses(now - old, now, advantages)
    return total(loss, mask, sequences, reduction, normalizer)


def grpo_loss(  # noqa: PLR0913
    logprob: torch.Tensor,
    old_logprob: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    ref_logprob: torch.Tensor | None = None,
    kl: torch.Tensor | None = None,
    beta: float | torch.Tensor | BetaController = 0.0,
    surrogate: SurrogateName = "clip",
    clip: float | tuple[float, float] = CLIP,
    dual_clip: float | None = None,
    tau: float | tuple[float, float] | None = None,
    level: Level = "token",
    reduction: GRPOReduction = "grpo",
    max_length: int | None = None,
    correct_kl: bool = False,
    kl_clamp: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the loss of GRPO, GSPO, CISPO or SAPO: a surrogate of the policy gradient plus beta
    times a KL to the reference, per token.

    Equivalent to

        ratio = (logprob - old_logprob).exp()                           # level "token"
        clipped, tau = ratio.clamp(1 - low, 1 + high), torch.where(advantages > 0, *tau)
        loss = {"clip": -torch.minimum(ratio * advantages, clipped * advantages),
                "cispo": -clipped.detach() * advantages * logprob,
                "sapo": -(tau * (ratio - 1)).sigmoid() * 4 / tau * advantages}[surrogate]
        if kl is None:
            d = logprob - ref_logprob
            kl = ((-d).exp() - 1 + d) * (ratio if correct_kl else 1)
        loss = loss + beta * kl
        loss = ((loss * mask).sum(-1) / mask.sum(-1)).mean()            # reduction "grpo"

    with value and gradient finite for every ratio, as in ppo_loss, and for every d, as in
    estimate_kl and sampled_kl_loss, which compute the estimate.

    Which KL: pass `kl`. Its gradient is that of KL(policy‖reference) of each token given its
    prefix, over the whole vocabulary, without noise, on- and off-policy. ref_logprob gives the
    published form, an estimate from the sampled tokens: it is an unbiased estimate of
    KL(policy‖reference) only on-policy, and even there its gradient is that of the other direction,
    KL(reference‖policy). correct_kl at level "token" corrects both, on- and off-policy; the noise
    stays.

    Args:
        logprob, old_logprob, advantages, mask: as in ppo_loss. The advantages of a group are its
            rewards minus their mean, in the published form divided by their standard deviation.
        ref_logprob: log π_ref(token), shaped as logprob, no gradient.
        kl: exact KL(policy‖reference) of each token in nats, shaped as logprob, with gradient:
            kl_divergence(policy_logits, ref_logits).
        beta: the KL's weight: a number ≥ 0, a 0-d tensor, or a controller with an attribute `beta`.
            A number 0 leaves the KL out. A tensor's value is not read: a negative one is not an
            error, and 0 times an infinite `kl` is NaN.
        surrogate: "clip", PPO's; "cispo": every token keeps its gradient, weighted by the clipped
            ratio; "sapo": the gradient fades as the ratio leaves 1. "cispo" is published with
            reduction "bnpo", "sapo" with "grpo".
        clip: as in ppo_loss, for "clip" and "cispo". CISPO is commonly used without a lower bound:
            clip=(1, 4), which is TRL's epsilon_high=5 (there the bound itself); verl's
            clip_ratio_low and clip_ratio_high are low and high.
        dual_clip: as in ppo_loss, only for "clip"; TRL's delta, if that is at least 1 + high.
        tau: SAPO's temperatures, (for advantages > 0, for others) or one for both; None: (1, 1.05),
            as published.
        level: "token": a ratio per token; "sequence": the geometric mean of a sequence's ratios for
            all its tokens (GSPO). Each token's gradient uses its own advantage (GSPO-token; the
            same for one advantage per sequence). The KL stays per token.
        reduction: "grpo": mean over the B sequences of the mean over each one's tokens, where a
            sequence with no token that counts adds 0; "bnpo": mean over the batch's tokens that
            count, which is DAPO's if the batch is whole; "dr_grpo": sum / (B·max_length); "sum";
            "none": one loss per token, KL included.
        max_length: with "dr_grpo", the largest number of tokens that a completion may have, the
            same in every step. Longer sequences are detected on the CPU only, outside
            torch.compile: on a GPU a check would synchronise.
        correct_kl: multiply the estimate from ref_logprob by the ratio of `level`, with gradient
            and unclipped. The token's ratio is an importance weight. The sequence's geometric mean,
            used by TRL and Liger, is not: with more than one token, value and gradient are biased.
        kl_clamp: the clamp of estimate_kl and sampled_kl_loss for the estimate from ref_logprob:
            without it a token with d = -20 has a gradient of size e^20; with kl_clamp=5, e^5.
        cu_seqlens: as in ppo_loss; level "token" with "bnpo", "sum" or "none" takes a logprob
            [total] without it.
        normalizer: as in ppo_loss: with "bnpo" in place of the number of tokens that count, with
            "grpo" and "dr_grpo" in place of B, the number of sequences.

    Returns:
        As ppo_loss.

    Gradient:
        To logprob and to kl. "clip": as in ppo_loss; "cispo": -clipped·A; "sapo":
        -4·s·(1 - s)·ratio·A with s = sigmoid(tau·(ratio - 1)); each times the reduction's weight.

    Raises:
        As ppo_loss. ValueError also: an unknown surrogate, a setting of a different surrogate, a
        number beta that is negative or not finite, one above 0 without ref_logprob or kl, both of
        them, a kl without gradient if logprob has one, correct_kl or kl_clamp with kl, a kl_clamp
        outside (0, 50], max_length missing, without its reduction, or less than a sequence's tokens
        on the CPU.

    Source: Shao et al., DeepSeekMath (2024), eqs. 3 and 4; Zheng et al., Group Sequence Policy
    Optimization (2025), for level "sequence"; MiniMax, MiniMax-M1 (2025), for "cispo"; Gao et al.,
    Soft Adaptive Policy Optimization (2025), for "sapo"; Liu et al., Understanding R1-Zero-Like
    Training (2025), for "dr_grpo"; DeepSeek-AI, DeepSeek-V3.2 (2025), for correct_kl; its ratio at
    level "sequence" is that of TRL 1.16, GRPOTrainer._compute_loss (per_token_kl * coef_1), and of
    Liger Kernel 0.8.2, chunked_loss/grpo_loss.py (kl_div * exp(log_importance_weights)).
    """
    _checks.choice("level", level, get_args(Level))
    _checks.choice("reduction", reduction, get_args(GRPOReduction))
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
    policy = checked_surrogate(surrogate, clip, dual_clip, tau)
    now, old, advantages, mask, sequences = loss_tensors(
        logprob,
        old_logprob,
        advantages,
        mask,
        cu_seqlens,
        boundaries_needed=reduction in ("grpo", "dr_grpo") or level == "sequence",
    )
    _checks.expect(
        reduction not in ("none", "sum") or normalizer is None,
        "normalizer",
        f"None with reduction={reduction!r}",
        normalizer,
        "it is for means, use reduction='bnpo'",
    )
    _checks.normalizer(normalizer, "mean", logprob.device)
    beta = _checks.beta(beta, "logprob", logprob)
    _check_kl(logprob, ref_logprob, kl, beta, correct_kl, kl_clamp)
    log_ratio = now - old
    if level == "sequence":
        # The difference is 0 but gives each token the gradient of its own logprob.
        log_ratio = mean_log_ratio(now.detach(), old, mask, sequences) + (now - now.detach())
    loss = policy.losses(log_ratio, now, advantages)
    if isinstance(beta, torch.Tensor) or beta > 0:
        if kl is not None:
            kl = torch.where(mask, kl.to(now.dtype), 0.0)
        else:
            assert ref_logprob is not None
            reference = torch.where(mask, finite(ref_logprob.detach()), 0.0)
            kl = (
                sampled_kl_loss(now, reference, old_logprob=old, clamp=kl_clamp)
                if correct_kl and level == "token"
                else estimate_kl(now, reference, estimator="k3", clamp=kl_clamp)
            )
            if correct_kl and level == "sequence":
                mean = mean_log_ratio(now, old, mask, sequences)
                kl = kl * mean.clamp(max=LARGEST_LOG_RATIO).exp()
        loss = loss + beta * kl
    return total(loss, mask, sequences, reduction, normalizer, max_length)


def _check_kl(
    logprob: torch.Tensor,
    ref_logprob: torch.Tensor | None,
    kl: torch.Tensor | None,
    beta: float | torch.Tensor,
    correct_kl: bool,
    kl_clamp: float | None,
) -> None:
    """Check for exactly one source of the KL, if beta requires one."""
    _checks.expect(
        isinstance(correct_kl, bool),
        "correct_kl",
        "True or False",
        correct_kl,
        "pass correct_kl=True to multiply the estimate by the ratio",
        TypeError,
    )
    _checks.clamp("kl_clamp", kl_clamp)
    given = {
        name: value
        for name, value in (("ref_logprob", ref_logprob), ("kl", kl))
        if value is not None
    }
    _checks.expect(len(given) < 2, "kl", "either kl or ref_logprob", "both", "kl is the exact one")
    _checks.expect(
        given or not (isinstance(beta, torch.Tensor) or beta > 0),
        "kl",
        "the exact KL of each token, or ref_logprob for an estimate, with beta above 0",
        "neither",
        "pass kl=kl_divergence(policy_logits, ref_logits)",
    )
    for name, value in given.items():
        _checks.float_tensor(name, value, "per token, shaped as logprob")
        _checks.like(name, value, "logprob", logprob)
    for name, setting, default in (("correct_kl", correct_kl, False), ("kl_clamp", kl_clamp, None)):
        _checks.expect(
            kl is None or setting == default,
            name,
            f"{default} with an exact kl",
            setting,
            "it is for the estimate from ref_logprob, an exact kl needs no such thing",
        )
    learning = torch.is_grad_enabled() and logprob.requires_grad
    _checks.expect(
        kl is None or kl.requires_grad or not learning,
        "kl",
        "a KL with gradient, as kl_divergence gives it from the policy's logits",
        "one without",
        "a constant in the loss would penalise nothing (shape_rewards takes a KL without gradient)",
    )
