"""The terms of the divergences beside the KL: of one entry, near P = Q and far from it.

Notation of fastkl/f_divergences.py: d = log(q/p), an f-divergence is Σ p·f(d), and its gradients to
the logits of P and Q, times T, are p·(u - E_p[u]) and q·(v - E_q[v]) for u = f - f', v = f'/e^d.
E_p[u] + E_q[v] is the divergence itself, so a row needs two sums: the divergence and its *moment*
E_q[v].

Near P = Q, where |d| < 1, f and u and v are polynomials whose coefficients the launcher computes
for the share, alpha or beta (launch_divergence.py): p·d²·G(d) for the divergence, p·d²·K(d) for the
moment, d·U(d) for u and d·V(d) for v. Since Σ p·(e^d - 1) = 0, the moment may be summed as
p·(f' - f''(0)·(e^d - 1)): of second order, like the divergence. Total variation has |d| in place of
d² and of d.
"""

from collections import namedtuple

import triton
import triton.language as tl

from .row_load import D_FACTOR
from .row_math import LN2, LOG2E, SMALL_D, h_over_square, log1p

JS = tl.constexpr(0)
SKEW_KL = tl.constexpr(1)
TOTAL_VARIATION = tl.constexpr(2)
RENYI = tl.constexpr(3)
# Coefficients of G, U and V, and of K.
TERMS = tl.constexpr(7)
MOMENT_TERMS = tl.constexpr(6)


# The share of P in the mixture (of Rényi's divergence the order alpha), 1 - share, and f''(0).
Mixture = namedtuple("Mixture", "share rest curvature")


# Compile-time: the divergence, whether rest is so small that log(m/p) needs a series, whether the
# GPU has the instruction lg2, the gradients requested (in forward: whether any is), and whether
# differences are kept as hi and lo.
Kind = namedtuple("Kind", "name small_rest lg2 wrt_p wrt_q compensated")


# The terms of entries far from P = Q: p·f, p·u and q·v, and p and q themselves.
Terms = namedtuple("Terms", "value to_p to_q p q")


@triton.jit
def float32_values(numbers, COUNT: tl.constexpr):
    """Return arguments of a kernel as float32, which they are but in the interpreter."""
    values = ()
    for i in tl.static_range(COUNT):
        values += (tl.cast(numbers[i], tl.float32),)
    return values


@triton.jit
def polynomial(x, coefficients, COUNT: tl.constexpr):
    """Return the polynomial of run-time coefficients, of the highest power first."""
    value = tl.fma(x, coefficients[0], coefficients[1])
    for i in tl.static_range(2, COUNT):
        value = tl.fma(x, value, coefficients[i])
    return value


@triton.jit
def log2(x, LG2: tl.constexpr):
    """Return log2 of normal numbers; the absolute error near 1 is 2^-22."""
    if LG2:
        # tl.log2 takes twenty instructions.
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def entry_terms(p, q, d, ratio, mix, kind: tl.constexpr, GUARD: tl.constexpr):
    """Return the Terms of entries, in the type of p; ratio = e^-|d|.

    They lose digits where |d| is small. GUARD: float64, p or q may be 0 and d infinite.
    """
    q_larger = d > 0.0
    sign = tl.where(q_larger, 0.5, tl.where(d < 0.0, -0.5, 0.0))
    if kind.name == TOTAL_VARIATION:
        return Terms(sign * (q - p), -sign * p, sign * q, p, q)
    else:
        share, rest = mix.share, mix.rest
        if GUARD:
            # In float64 the rounded numbers do not add up to 1.
            if kind.small_rest:
                rest = rest.to(tl.float64)
                share = 1.0 - rest
            else:
                share = share.to(tl.float64)
                rest = 1.0 - share
        # The mixture over the larger of p and q is 1 + t.
        t = tl.where(q_larger, share, rest) * (ratio - 1.0)
        mixture = 1.0 + t
        if GUARD or kind.small_rest:
            # 1 - share is a rounded rest.
            mixture = tl.where(q_larger, share * ratio + rest, mixture)
        if GUARD:
            log_mixture = tl.log(mixture)
        elif kind.small_rest:
            log_mixture = tl.where(mixture < 0.5, tl.log(mixture), log1p(t))
        else:
            log_mixture = log2(mixture, kind.lg2) * LN2
        log_m = tl.where(q_larger, d, 0.0) + log_mixture
        if kind.small_rest and not GUARD:
            # m/p = 1 + a; where q is not far larger than p, a is small.
            a = rest * (1.0 / ratio - 1.0)
            log_m = tl.where(q_larger & (a < 1.0), log1p(a), log_m)
        p_log_m = p * log_m
        if GUARD:
            p_log_m = tl.where(p == 0.0, 0.0, p_log_m)
        if kind.name == JS:
            q_log_m = q * (tl.where(q_larger, 0.0, d) - log_mixture)
            if GUARD:
                q_log_m = tl.where(q == 0.0, 0.0, q_log_m)
            to_p = p_log_m * -share
            to_q = q_log_m * rest
            return Terms(to_p + to_q, to_p, to_q, p, q)
        else:
            # rest·(q - p)/m
            share_of_gap = sign * (1.0 - ratio) * (rest * 2.0) / mixture
            to_p = p * (share * share_of_gap)
            if GUARD:
                to_p = tl.where(p == 0.0, 0.0, to_p)
            to_q = q * (rest * share_of_gap)
            return Terms((q - p) * rest - p_log_m, to_p - p_log_m, to_q, p, q)


@triton.jit
def far_terms(log2_p, d, mix, kind: tl.constexpr):
    """Return the Terms from log2 p and D_FACTOR·d."""
    log2_ratio = d * (LOG2E / D_FACTOR)
    larger = tl.exp2(log2_p + tl.maximum(log2_ratio, 0.0))
    ratio = tl.exp2(-tl.abs(log2_ratio))
    p = tl.where(d > 0.0, larger * ratio, larger)
    q = tl.where(d > 0.0, larger, larger * ratio)
    return entry_terms(p, q, d * (1.0 / D_FACTOR), ratio, mix, kind, False)


@triton.jit
def absorb(sums, log2_p, d, constants, kind: tl.constexpr, ALL_NEAR: tl.constexpr):
    """Add entries to the sums (divergence, moment), from log2 p and D_FACTOR·d.

    constants.series: the coefficients of G, then of K. ALL_NEAR requires every |d| to be below 1.
    """
    value, moment = sums
    square = d * d
    if ALL_NEAR:
        p = tl.exp2(log2_p)
    else:
        far = far_terms(log2_p, d, constants.mix, kind)
        near = tl.abs(d) < D_FACTOR
        # An entry is added by one of the formulas, and as 0 by the other.
        p = tl.where(near, far.p, 0.0)
        value += tl.where(near, 0.0, far.value)
        if kind.wrt_p:
            far_moment = far.to_q
            if kind.name != TOTAL_VARIATION:
                far_moment = tl.fma(far.q - far.p, -constants.mix.curvature, far_moment)
            moment += tl.where(near, 0.0, far_moment)
    if kind.name == TOTAL_VARIATION:
        part = p * tl.abs(d) * polynomial(d, constants.series, TERMS)
        value += part
        sign = tl.where(d > 0.0, 0.5, tl.where(d < 0.0, -0.5, 0.0))
        moment += tl.fma(sign, p, part)
    else:
        p_square = p * square
        value = tl.fma(p_square, polynomial(d, constants.series, TERMS), value)
        if kind.wrt_p:
            curve = polynomial(d, constants.series[TERMS:], MOMENT_TERMS)
            moment = tl.fma(p_square, curve, moment)
    return value, moment


@triton.jit
def renyi_exponent(log_p, log_q, mix):
    """Return α·log p + (1 - α)·log q of entries as float64; for α > 1, -inf where p is 0, whatever
    q is.
    """
    # 1 - α is exact in float32 where it is small, α beside it is not.
    power = log_p + (log_q - log_p) * mix.rest
    absent = tl.where(mix.rest > 0.0, log_p == float("-inf"), tl.exp(log_p) == 0.0)
    return tl.where(absent, float("-inf"), power)


@triton.jit
def expm1(z):
    """Return e^z - 1 with a small relative error."""
    return tl.where(
        tl.abs(z) < SMALL_D, tl.fma(z * z, h_over_square(z), z), tl.exp2(z * LOG2E) - 1.0
    )
