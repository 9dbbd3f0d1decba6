"""Estimates KL from the log-probabilities of sampled tokens alone: k1, k2, k3 and abs, and a loss
whose gradient is also correct; and the exact divergence of "this token or another".

Use these if only log-probabilities were kept; fastkl.kl_divergence has neither their noise nor
their pitfalls. An estimator with the correct value may have a wrong gradient:
tests/test_estimators.py enumerates the gradients of the losses.
"""

import math
from typing import get_args

import torch

from . import _checks
from ._types import BinaryKind, Direction, Estimator
from .reference import expm1_minus

# Lower clamp of log-probabilities (-inf, finfo.min masks), which keeps every difference finite.
_FLOOR = -1e4
# |d| beyond which k3 continues along its tangent if no clamp is given.
_LIMIT = {torch.float32: _checks.LARGEST_CLAMP, torch.float64: 600.0}
# A ratio beyond e^20 = 4.9e8 is useless as an importance weight; e^89 is infinite in float32, and
# its gradient NaN.
LARGEST_LOG_RATIO = 20.0


def estimate_kl(
    logprob: torch.Tensor,
    ref_logprob: torch.Tensor,
    *,
    estimator: Estimator = "k1",
    clamp: float | None = None,
) -> torch.Tensor:
    """Estimate KL(policy‖reference) from tokens sampled from the policy, one estimate per token.

    Equivalent, but accurate for a small d, to

        d = logprob.float() - ref_logprob.float()
        k1 = d                          # unbiased, of either sign, the noisiest near the reference
        k2 = d ** 2 / 2                 # biased by terms of third order in d, never negative
        k3 = torch.expm1(-d) + d        # unbiased, never negative, little noise near the reference
        abs = d.abs()                   # not an estimate of KL but a distance

    k3 is unbiased only if the policy covers the reference. If top-k, top-p or an action mask
    excludes tokens that the reference may choose, k3 is low by their probability under the
    reference. k1 is not affected.

    This holds for the values. As a loss on tokens sampled from the current policy, only k2 has the
    gradient of KL(policy‖reference) in expectation; k1 has 0, k3 the gradient of
    KL(reference‖policy), abs that of twice the total variation. Off-policy none is correct. Train
    on sampled_kl_loss, or with k1 (detached) inside the reward.

    Args:
        logprob, ref_logprob: [...], log-probabilities of the sampled tokens under policy and
            reference, floats of any type.
        estimator: "k1", "k2", "k3" or "abs".
        clamp: beyond |d| = clamp an estimator continues along its tangent, so its gradient keeps
            the value at the clamp. A number in (0, 50]; k1 and abs are their own tangents. None: no
            clamp, but k3 continues along its tangent beyond |d| = 50 (600 for float64), because
            e^|d| approaches overflow.

    Returns:
        [...] float32 (float64 for float64 log-probabilities), nats. Zero masked tokens with
        torch.where.

    Gradient:
        The gradient of the code above, or of the tangent, with respect to logprob and ref_logprob
        if they require it.

    Special values:
        A log-probability below -1e4, -inf included, counts as -1e4 and gets gradient 0 (its token
        has no probability to move); the other one keeps its gradient. Both -inf give d = 0. Values
        and gradients are finite for all log-probabilities ≤ 0, but a float16 gradient is ±inf
        beyond 65504, from |d| = 11.09 on: set a clamp there. NaN stays NaN in its own token.

    Raises:
        TypeError for anything except float tensors, or float64 mixed with another type. ValueError
        for different shapes or devices, an unknown estimator, or a clamp outside (0, 50].

    Source: Schulman, Approximating KL Divergence (2020), joschu.net/blog/kl-approx.html.
    """
    _checks.choice("estimator", estimator, get_args(Estimator))
    _check(logprob, ref_logprob, clamp)
    return _estimate(finite(logprob) - finite(ref_logprob), estimator, clamp)


def sampled_kl_loss(
    logprob: torch.Tensor,
    ref_logprob: torch.Tensor,
    *,
    old_logprob: torch.Tensor | None = None,
    direction: Direction = "policy||reference",
    clamp: float | None = None,
) -> torch.Tensor:
    """Compute a loss per sampled token whose expected value is a KL and whose expected gradient is
    that KL's gradient with respect to the policy.

    Equivalent, with d = logprob - ref_logprob and w = exp(-d), but accurate for a small d, to

        ratio = 1 if old_logprob is None else (logprob - old_logprob).exp().detach()
        value, form = {"policy||reference": (w - 1 + d, d ** 2 / 2),              # k3 and k2
                       "reference||policy": (1 - w * (1 + d), w - 1 + d)}[direction]
        loss = ratio * (value.detach() + form - form.detach())

    `value` is never negative; `form` has the gradient. Off-policy, the first direction equals the
    ratio with gradient times k3, token by token: both have gradient ratio·d·∇logprob.

    Args:
        logprob: [...], log-probabilities of the sampled tokens under the trained policy.
        ref_logprob: [...], under the reference; gets no gradient.
        old_logprob: [...], under the policy that sampled the tokens, without gradient. None: the
            current policy sampled them.
        direction: "policy||reference", KL(policy‖reference), the RLHF penalty; or
            "reference||policy", whose noise grows with e^(-d).
        clamp: as estimate_kl, for `value` and `form`: the gradient is correct inside the clamp and
            has the correct sign beyond it. The ratio is not clamped by it, but at e^20.

    Returns:
        [...] float32 (float64 for float64 log-probabilities), nats. Reduce it over unmasked tokens;
        zero the others with torch.where.

    Gradient:
        With respect to logprob. Unbiased, like the value, for the KL between the two next-token
        distributions after each prefix of the batch. It ignores the effect of a token on later
        prefixes: for the gradient of a whole sequence's KL put k1 inside the reward. First
        derivatives only.

        If the policy does not cover the reference (top-k, top-p, masked actions), the value for
        "policy||reference" is low by the reference's probability of the excluded tokens, and its
        gradient is still correct; KL(reference‖policy) is infinite, which the estimate cannot show.
        Off-policy, the sampling policy must cover the trained one.

    Special values: as estimate_kl.

    Raises:
        As estimate_kl; ValueError for an unknown direction or an old_logprob that requires grad.

    Source: Schulman (2020) as estimate_kl, for the values; the gradients are the score-function
    identity Σ π·∇log π = 0 applied to each form.
    """
    _checks.choice("direction", direction, get_args(Direction))
    _check(logprob, ref_logprob, clamp, old_logprob)
    now = finite(logprob)
    d = now - finite(ref_logprob.detach())
    value_of, form_of = ("k3", "k2") if direction == "policy||reference" else ("reverse", "k3")
    form = _estimate(d, form_of, clamp)
    loss = _estimate(d.detach(), value_of, clamp) + (form - form.detach())
    if old_logprob is None:
        return loss
    return loss * (now.detach() - finite(old_logprob)).clamp(max=LARGEST_LOG_RATIO).exp()


def binary_divergence(
    logprob: torch.Tensor, ref_logprob: torch.Tensor, *, kind: BinaryKind = "kl"
) -> torch.Tensor:
    """Compute the divergence of "this token or another" under two models, exactly, from the token's
    log-probabilities.

    Equivalent, but accurate for small results and for probabilities near 0 and 1, to

        p, q = logprob.double().exp(), ref_logprob.double().exp()
        kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()   # 0 · log 0 = 0
        tv = (p - q).abs()

    the KL(P‖Q) and the total variation of two Bernoulli distributions. No sampling is involved: the
    result is the exact divergence between two events, and at most that of the two models over the
    whole vocabulary (merging tokens can only lower a divergence).

    Args:
        logprob: [...], log p of a token in nats, a float of any type.
        ref_logprob: [...], log q of the same token, for the second argument of the KL.
        kind: "kl" or "tv".

    Returns:
        [...] float32 (float64 for float64 log-probabilities), nats for "kl"; computed in float64.
        Never negative, exactly 0 for equal log-probabilities; "tv" is at most 1.

    Gradient:
        To both if they require it. With p = e^logprob and q = e^ref_logprob, "kl" has
        p·(log(p/(1 - p)) - log(q/(1 - q))) to logprob and (q - p)/(1 - q) to ref_logprob; "tv" has
        ±p and ±q, 0 where they are equal. Never NaN for finite log-probabilities. At a logprob of 0
        the first one has no finite limit; here it is finite, as if 1 - p were 2e-308.

    Special values:
        -inf is a probability of 0. A log-probability above 0 is a rounding error and counts as 0,
        without gradient. "kl" is +inf exactly where q is 0 and p in float64 is not, or q is 1 and p
        is not. A ref_logprob rounded to 0 suffices: log_softmax in float32 returns 0 above
        q = 1 - 6e-8. NaN stays NaN.

    Raises:
        As estimate_kl; ValueError for an unknown kind.

    Source: Qi et al., Rethinking the Trust Region in LLM Reinforcement Learning (2026), the binary
    approximation, with the sampling policy as P.
    """
    _checks.choice("kind", kind, get_args(BinaryKind))
    _check(logprob, ref_logprob)
    a, b = (value.double().clamp(max=0) for value in (logprob, ref_logprob))
    a = a.clamp(min=_FLOOR)  # p is 0 from -746 down; -inf - (-inf) would be NaN
    p, q, d = a.exp(), b.exp(), b - a
    # Each form keeps the derivative accurate too: expm1's is its result + 1.
    gap = torch.where(d.abs() < 1, p * torch.expm1(d.clamp(-1, 1)), q - p)
    if kind == "tv":
        result = gap.abs()
    else:
        rest, ref_rest = (
            torch.where(x > -0.5, -torch.expm1(x.clamp(min=-0.5)), 1 - x.exp()) for x in (a, b)
        )
        tiny = torch.finfo(torch.float64).tiny
        divisor, near = rest.clamp(min=tiny), 2 * gap.abs() < rest
        # log((1 - q) / (1 - p)), from gap / (1 - p), or as a difference
        rest_d = torch.where(
            near,
            torch.log1p(-torch.where(near, gap, 0.0) / divisor),
            ref_rest.clamp(min=tiny).log() - divisor.log(),
        )
        # d = 1 where p = 0 makes p·d = 0
        result = _bregman(p, torch.where(p == 0, 1.0, d), gap) + _bregman(rest, rest_d, -gap)
        result = torch.where((ref_rest == 0) & (rest > 0), math.inf, result)
    return result.to(torch.promote_types(logprob.dtype, torch.float32))


def _bregman(p: torch.Tensor, d: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
    """Compute p·(e^d - 1 - d) ≥ 0 from gap = p·(e^d - 1), which does not overflow."""
    return torch.where(d.abs() < 1, p * expm1_minus(d.clamp(-1, 1)), gap - p * d)


def _estimate(d: torch.Tensor, form: str, clamp: float | None) -> torch.Tensor:
    """Compute an Estimator of d, or "reverse", 1 - e^(-d)·(1 + d) = e^(-d)·(e^d - 1 - d).

    Beyond |d| = clamp it continues along the tangent.
    """
    if form in ("k1", "abs"):
        return d if form == "k1" else d.abs()
    limit = clamp if clamp is not None else math.inf if form == "k2" else _LIMIT[d.dtype]
    near = d.clamp(-limit, limit)
    if form == "k2":
        value, slope = near.square() / 2, near
    elif form == "k3":
        value, slope = expm1_minus(-near), -torch.expm1(-near)
    else:
        value, slope = torch.exp(-near) * expm1_minus(near), torch.exp(-near) * near
    return value + slope * (d - near)


def finite(logprob: torch.Tensor, floor: float = _FLOOR) -> torch.Tensor:
    """Return log-probabilities in float32 (float64 stays), clamped to at least `floor`; their
    gradient is 0 below.
    """
    return (logprob if logprob.dtype == torch.float64 else logprob.float()).clamp(min=floor)


def _check(
    logprob: torch.Tensor,
    ref_logprob: torch.Tensor,
    clamp: float | None = None,
    old_logprob: torch.Tensor | None = None,
) -> None:
    """Check for float tensors of one shape and device, all float64 or none, an old_logprob without
    gradient, and a clamp of None or within (0, 50].
    """
    for name, value in {
        "logprob": logprob,
        "ref_logprob": ref_logprob,
        **({} if old_logprob is None else {"old_logprob": old_logprob}),
    }.items():
        _checks.expect(
            isinstance(value, torch.Tensor) and value.dtype in _checks.FLOAT_TYPES,
            name,
            "float32, bfloat16, float16 or float64 log-probabilities [...]",
            value,
            "pass those of the tokens, as token_stats returns them",
            TypeError,
        )
        _checks.not_sharded(name, value, "log-probabilities [...]", _checks.local_or_full(name))
        _checks.expect(
            value.shape == logprob.shape,
            name,
            f"the shape of logprob, {tuple(logprob.shape)}, one entry per token",
            tuple(value.shape),
            "align the batch and time dimensions",
        )
        _checks.same_device_and_precision(name, value, "logprob", logprob)
        _checks.expect(
            name != "old_logprob" or not value.requires_grad,
            name,
            "log-probabilities without gradient, of the policy as it was when it sampled",
            "a tensor that requires grad",
            "pass old_logprob.detach(), or None for tokens sampled from the policy as it is now",
        )
    _checks.clamp("clamp", clamp)
