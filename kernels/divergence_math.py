"""Terms of the divergences other than the KL, for one entry near or far from P = Q.

Notation of fastkl/f_divergences.py: d = log(q/p), an f-divergence is Σ p·f(d), and its gradients to
the logits of P and Q, times T, are p·(u - E_p[u]) and q·(v - E_q[v]) for u = f - f', v = f'/e^d.
E_p[u] + E_q[v] is the divergence itself, so a row needs two sums: the divergence and its *moment*
E_q[v].

Near P = Q, where |d| < 1, f, u and v are polynomials with coefficients computed by the launcher for
the share, alpha or beta (ops/near_series.py): p·d²·G(d) for the divergence, p·d²·K(d) for the
moment, d·U(d) for u and d·V(d) for v. Since Σ p·(e^d - 1) = 0, the moment may be summed as
p·(f' - f''(0)·(e^d - 1)): of second order, like the divergence. But the rounding of
lse_q - lse_p, some 1e-7 of the largest d, enters the sum that should be 0. In a *far* row, where
log E_p[e^(d - E_p[d])], nearly KL(P‖Q), is above FAR_KL, all tiles take the general path, which
adds up Σ p and the *drift* Σ(q - p) as rounded: they normalise the means. On the general path the
polynomials serve below SMALL_D alone: a mean and its entries must share their errors.

Total variation, TV = ½·Σ|q - p|, has one series, q - p = p·d·R(d) near P = Q, and two more sums of
positive terms: Q(d < 0) and P(d ≥ 0). With P(d < 0) = TV + Q(d < 0) and Q(d ≥ 0) = TV + P(d ≥ 0)
its gradients are
    -p·P(d < 0) and q·Q(d < 0) where d ≥ 0,   p·P(d ≥ 0) and -q·Q(d ≥ 0) where d < 0.
At d = 0, a kink, any subgradient is correct; rounding makes few entries exactly 0.
"""

from collections import namedtuple

import triton
import triton.language as tl

from .row_load import D_FACTOR, lane_sum
from .row_math import (
    JS,
    LN2,
    LOG2E,
    RENYI,
    SKEW_KL,
    SMALL_D,
    TOTAL_VARIATION,
    h_over_square,
    horner,
    log1p,
)

# Coefficients of G, U and V; K has one less. Skew KL, whose G, K and U resemble e^(2·d) for alpha
# near 1, has one, one and two more. K starts at coefficient TERMS + 1, V at TERMS + 2.
TERMS = tl.constexpr(7)
# log E_p[e^(d - E_p[d])] of the rows that count as far.
FAR_KL = tl.constexpr(0.05)
# Largest |d| of a fallback row's entries: beyond it the smaller of p and q is negligible.
LARGEST_DOUBLE_D = tl.constexpr(700.0)


# A divergence's numbers: the share of P in the mixture (for Rényi the order alpha), 1 - share,
# f''(0), and the coefficients of G and K or of U and V.
Formula = namedtuple("Formula", "share rest curvature series")


# The Formula of a second read, log2 of P's partition function, D_FACTOR·(lse_q - lse_p) as hi and
# lo, and 1 for a far row, otherwise 0.
Second = namedtuple("Second", "formula origin centre centre_lo far")


# Terms of entries from formulas in p and q instead of polynomials: p·f, p·u and q·v.
EntryTerms = namedtuple("EntryTerms", "value to_p to_q")


# Float64 sums of a divergence other than the KL: Σ p·f, Σ p·u, Σ q·v, and Σ p
# and Σ q, which are 1 but for the errors of the log-sum-exps.
#
# Rényi's: the sum of exp(exponent - u), the largest exponent u (renyi_exponent), the number of
# entries with p ≠ q, Σ p and Σ q, and the logits x and y of an entry with the largest exponent.
Sums = namedtuple("Sums", "value u v p q x y")


@triton.jit
def expm1(z):
    """Return e^z - 1 with a small relative error."""
    return tl.where(
        tl.abs(z) < SMALL_D, tl.fma(z * z, h_over_square(z), z), tl.exp2(z * LOG2E) - 1.0
    )


@triton.jit
def log(x, LG2: tl.constexpr):
    """Return log x; for float32 near 1 with an absolute error of 2^-22."""
    # tl.log takes twenty instructions.
    return (
        LN2
        * tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        if LG2 and x.dtype == tl.float32
        else tl.log(x)
    )


@triton.jit
def entry_terms(p, q, d, formula, kind: tl.constexpr):
    """Return EntryTerms in the dtype of p; they lose digits if |d| is small."""
    if kind.name == TOTAL_VARIATION:
        sign = tl.where(d > 0.0, 0.5, tl.where(d < 0.0, -0.5, 0.0))
        return EntryTerms(sign * (q - p), -sign * p, sign * q)
    else:
        share = tl.cast(formula.share, p.dtype)
        rest = tl.cast(formula.rest, p.dtype)
        power = tl.exp2(d * LOG2E)
        mixture = tl.fma(power, rest, share)
        log_m = (
            log1p(rest * (power - 1.0))
            if kind.small_rest and p.dtype == tl.float32
            else log(mixture, kind.lg2)
        )
        if kind.name == JS:
            to_p = p * log_m * -share
            to_q = q * (d - log_m) * rest
            return EntryTerms(to_p + to_q, to_p, to_q)
        else:  # skew KL
            share_of_gap = (power - 1.0) * rest / mixture
            return EntryTerms(
                (q - p) * rest - p * log_m,
                p * (share_of_gap * share - log_m),
                q * (share_of_gap * rest),
            )


@triton.jit
def add_terms(sums, p, d, formula, kind: tl.constexpr, ALL_NEAR: tl.constexpr):
    """Add entries to the sums (divergence, moment, unused, Σ(q - p) per thread), from p and
    D_FACTOR·d; for total variation to (2·D_FACTOR·TV, Q(d < 0), P(d ≥ 0), unused).

    With ALL_NEAR, which requires every |d| to be below 1, Σ(q - p) is not summed.
    """
    value, moment, p_above, drift = sums
    if kind.name == TOTAL_VARIATION:
        growth = horner(d, formula.series[:TERMS]) * d if ALL_NEAR else expm1(d * 0.5) * 2.0
        gap = p * growth  # D_FACTOR·(q - p)
        moment += tl.where(d < 0.0, tl.fma(gap, 1.0 / D_FACTOR, p), 0.0)
        return value + tl.abs(gap), moment, p_above + tl.where(d < 0.0, 0.0, p), drift
    else:
        p_square = p * (d * d)
        if not ALL_NEAR:
            log_ratio = d * (1.0 / D_FACTOR)
            # exp2 of this product, as in entry_terms and expm1: the compiler computes it once.
            q = p * tl.exp2(log_ratio * LOG2E)
            far = entry_terms(p, q, log_ratio, formula, kind)
            near = tl.abs(d) < SMALL_D * D_FACTOR
            # Each entry is added by one of the formulas, and counts 0 in the other.
            value += tl.where(near, 0.0, far.value)
            moment += tl.where(near, 0.0, tl.fma(q - p, -formula.curvature, far.to_q))
            drift += lane_sum(p * expm1(log_ratio))
            p_square = tl.where(near, p_square, 0.0)
        more: tl.constexpr = kind.name == SKEW_KL
        value = tl.fma(p_square, horner(d, formula.series[: TERMS + more]), value)
        moment = tl.fma(p_square, horner(d, formula.series[TERMS + 1 : 2 * TERMS + more]), moment)
        return value, moment, p_above, drift


@triton.jit
def double_formula(formula):
    """Return a Formula with share and rest as float64, which add up to 1."""
    share = tl.cast(formula.share, tl.float64)
    rest = tl.cast(formula.rest, tl.float64)
    return Formula(
        tl.where(share < 0.5, share, 1.0 - rest),
        tl.where(share < 0.5, 1.0 - share, rest),
        formula.curvature,
        formula.series,
    )


@triton.jit
def double_terms(log_p, log_q, formula, kind: tl.constexpr):
    """Return the EntryTerms of an f-divergence, in float64; p or q may be 0."""
    d = tl.where(log_p == log_q, 0.0, log_q - log_p)
    d = tl.minimum(tl.maximum(d, -LARGEST_DOUBLE_D), LARGEST_DOUBLE_D)
    return entry_terms(tl.exp(log_p), tl.exp(log_q), d, formula, kind)


@triton.jit
def renyi_exponent(log_p, of_p, of_q, formula):
    """Return α·of_p + (1 - α)·of_q of entries as float64, finite or -inf, for log p and log q, or
    their differences from those of one entry; for α > 1, -inf if p is 0, whatever q is.
    """
    power = of_p + (of_q - of_p) * formula.rest
    absent = tl.where(formula.rest > 0.0, log_p == float("-inf"), tl.exp(log_p) == 0.0)
    return tl.where(absent, float("-inf"), tl.where(power > 1.0e300, 1.0e300, power))


@triton.jit
def empty_sums(zeros, kind: tl.constexpr):
    """Return the Sums of no entries."""
    u = zeros - (1.0e300 if kind.name == RENYI else 0.0)
    return Sums(zeros, u, zeros, zeros, zeros, zeros, zeros)


@triton.jit
def add_sums(sums, kind: tl.constexpr):
    """Return the Sums of all entries, or of all parts of a row, from vectors of Sums."""
    u = tl.max(sums.u, 0) if kind.name == RENYI else tl.sum(sums.u, 0)
    x = tl.max(tl.where(sums.u == u, sums.x, float("-inf")), 0)
    y = tl.max(tl.where((sums.u == u) & (sums.x == x), sums.y, float("-inf")), 0)
    return Sums(
        tl.sum(sums.value * tl.exp(sums.u - u) if kind.name == RENYI else sums.value, 0),
        u,
        tl.sum(sums.v, 0),
        tl.sum(sums.p, 0),
        tl.sum(sums.q, 0),
        x,
        y,
    )


@triton.jit
def divergence_gradients(log2_p, d, weight, terms, kind: tl.constexpr, ALL_NEAR: tl.constexpr):
    """Return p·(u - E_p[u]) and q·(v - E_q[v]) of entries, times weight, from log2 p and
    D_FACTOR·d.

    ALL_NEAR: as for add_terms; Rényi's divergence and total variation use one formula for all d.
    """
    formula = terms.formula
    mean_u, mean_v = terms.saved.mean_p, terms.saved.mean_q
    p = tl.exp2(log2_p)
    q = tl.exp2(tl.fma(d, LOG2E / D_FACTOR, log2_p))
    log_ratio = d * (1.0 / D_FACTOR)
    weight = weight * terms.factor_p
    if kind.name == RENYI:
        # p^α·q^(1 - α)/Z is p·e^z relative to P and q·e^z relative to Q; both means are log Z.
        return (
            p
            * expm1(tl.fma(log_ratio, formula.rest, -mean_u))
            * (weight * (-formula.share / formula.rest)),
            q * expm1(tl.fma(log_ratio, -formula.share, -mean_v)) * -weight,
        )
    elif kind.name == TOTAL_VARIATION:
        # Products of probabilities: no cancellation.
        q_below, p_above, distance = mean_u, mean_v, terms.saved.entropy
        return (
            p * tl.where(d < 0.0, p_above, -(distance + q_below)) * weight,
            q * tl.where(d < 0.0, -(distance + p_above), q_below) * weight,
        )
    else:
        grad_x = p * tl.fma(
            d, horner(d, formula.series[: TERMS + 2 * (kind.name == SKEW_KL)]), -mean_u
        )
        grad_y = q * tl.fma(d, horner(d, formula.series[TERMS + 2 :]), -mean_v)
        if not ALL_NEAR:
            far = entry_terms(p, q, log_ratio, formula, kind)
            near = tl.abs(d) < SMALL_D * D_FACTOR
            grad_x = tl.where(near, grad_x, tl.fma(p, -mean_u, far.to_p))
            grad_y = tl.where(near, grad_y, tl.fma(q, -mean_v, far.to_q))
        return grad_x * weight, grad_y * weight
