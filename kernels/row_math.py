"""The arithmetic of one row: centred KL terms, a row's state, and the merge of states.

Notation, for one row with policy logits x, reference logits y and temperature T:
    s = 1/T,   d = (y - x)·s - c   for a centre c near E_p[(y - x)·s],   h(d) = expm1(d) - d,
    e = 2^(x·s·LOG2E - origin)
    S = Σe   A = Σe·(x·s·LOG2E - origin)   W = Σe·d   U = Σe·(expm1(d) - d)   R = Σe·d·expm1(d)
e alone is an entry's weight; in e^d and expm1 it is Euler's number, whose log2 is LOG2E.
`origin` is a whole number near the largest x·s·LOG2E, so that rescaling S, W, U and R is
exact.
Then, with t = (U + W)/S,
    KL(P‖Q) = U/S - (t - log1p(t))        lse_q - lse_p = c + log1p(t)
    KL(Q‖P) = ((R - U)/S)/(1 + t) - (u - log1p(u)), u = -t/(1 + t)
for every centre c. With c near the mean every bracket is as small as the KL: no cancellation.

Every multiply-add is an explicit tl.fma, compiled with fusion off, so the bits do not depend on a
compiler's fusion.
"""

from collections import namedtuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Below this |d| a polynomial replaces e^d - 1 - d, which cancels there.
SMALL_D = tl.constexpr(0.25)
# Largest sum that counts as finite.
LARGEST_SUM = tl.constexpr(3.0e38)
# Numbers of a State in memory, float32.
STATE = tl.constexpr(8)
# Initial origin: finite, so that no difference of origins is (-inf) - (-inf); a whole number, as
# all origins are.
LOWEST = tl.constexpr(-1.0e30)
# Lower clamp of an exponent: 2^-256 is 0 in float32, and 0·(-inf) would be NaN.
LOWEST_EXPONENT = tl.constexpr(-256.0)
# Factor by which the weight about one centre may grow before the centre moves to the mean.
REANCHOR_GROWTH = tl.constexpr(8.0)
# Largest |log2 of a partition function|: beyond it the float32 origin is rounded too coarsely to
# correct.
LARGEST_LOG2_SUM = tl.constexpr(4194304.0)
# Largest |shift|, and largest difference in nats of two segments' shifts: beyond it e^d of one
# segment's entries, with |d| up to LARGEST_D, may matter although e underflows in the row.
LARGEST_SHIFT = tl.constexpr(4096.0)
LARGEST_GAP = tl.constexpr(8.0)
# Limit of |E_q[d]|, relative to the centre near E_p[(y - x)·s]: beyond it float32 loses the digits
# of q·(d - E_q[d]).
LARGEST_MEAN_GAP = tl.constexpr(1.0)
# Largest |d| that the sums can represent. From 87 nats below the peak on, e^x underflows to 0, and
# e^x·e^d is lost even if not negligible; far below 0, d·h + d² (= d·expm1(d)) cancels.
LARGEST_D = tl.constexpr(60.0)
# Replaces LARGEST_D for float32 rows: an entry's gradient may be as small as the smaller of p and
# q, while its error is a rounding of the larger.
LARGEST_FAR_D = tl.constexpr(16.0)


@triton.jit
def two_sum(a, b):
    """Return a + b as hi and lo: the rounded sum and its rounding error (Knuth's two_sum)."""
    rounded = a + b
    b_part = rounded - a
    return rounded, (a - (rounded - b_part)) + (b - b_part)


@triton.jit
def subtract(y, x, COMPENSATED: tl.constexpr):
    """Return y - x as hi and lo, so that a constant shift between the tensors costs no digits.

    Without COMPENSATED, lo is a placeholder that `centred` does not read: the float32 rounding of a
    16-bit difference is far below the logits' own rounding.
    """
    return two_sum(y, -x) if COMPENSATED else (y - x, x)


@triton.jit
def scale_reference(y, ratio, HAS_RATIO: tl.constexpr):
    """Return Q's (capped) logits times the ratio of inverse temperatures, as hi and lo."""
    if HAS_RATIO:
        product = y * ratio
        finite = tl.abs(product) < float("inf")
        return product, tl.where(finite, tl.fma(y, ratio, -product), 0.0)
    else:
        return y, tl.zeros_like(y)


@triton.jit
def centred(difference, lo, scale, centre, COMPENSATED: tl.constexpr):
    """Return d = (y - x)·scale - centre; large parts of both cancel in one fma."""
    d = tl.fma(difference, scale, -centre)
    return tl.fma(lo, scale, d) if COMPENSATED else d


@triton.jit
def horner(x, coefficients):
    """Evaluate the polynomial with these coefficients, highest power first."""
    value = tl.fma(x, coefficients[0], coefficients[1])
    for i in tl.static_range(2, len(coefficients)):
        value = tl.fma(x, value, coefficients[i])
    return value


@triton.jit
def h_over_square(d):
    """Return h(d)/d² for |d| < 1/4; minimax polynomial, relative error 1.4e-6."""
    return horner(
        d, (0.008337464183568954, 0.04175350069999695, 0.16666695475578308, 0.4999993145465851)
    )


@triton.jit
def h_accurate(d):
    """Return h(d) with a relative error of 5e-7; slow, used per state and not per entry."""
    # Taylor series of (expm1(d) - d)·2/d², from expm1's terms up to d¹².
    series = tl.fma(d, 1 / 12, 1.0)
    for n in tl.static_range(9):
        series = tl.fma(d * series, 1 / (11 - n), 1.0)
    return tl.where(tl.abs(d) < 1.0, d * d * 0.5 * series, (tl.exp2(d * LOG2E) - 1.0) - d)


@triton.jit
def log1p(t):
    """Return log(1 + t), for t > -0.5 within 2 ulp."""
    # A GPU's logarithm is off by 2e-7: with a KL of 0.2 nats from a few far entries, that is 2e-5
    # of the gradient to Q. Hence 2·atanh(z), z = rest/(2 + rest), 1 + t = 2^k·(1 + rest).
    k = tl.where(t < 1.0, 0.0, tl.floor(tl.log2(1.0 + t)))
    rest = tl.where(t < 1.0, t, tl.fma(1.0 + t, tl.exp2(-k), -1.0))
    z = tl.div_rn(rest, 2.0 + rest)
    square = z * z
    series = horner(square, (2 / 15, 2 / 13, 2 / 11, 2 / 9, 2 / 7, 2 / 5, 2 / 3))
    series = tl.fma(z * square, series, z * 2.0)
    return tl.where((t > -0.5) & (t < LARGEST_SUM), tl.fma(k, LN2, series), tl.log(1.0 + t))


@triton.jit
def t_minus_log1p(t):
    """Return t - log1p(t) with a small relative error; +inf at t = -1, NaN for t = +inf."""
    series = tl.fma(t, -horner(t, (1 / 9, -1 / 8, 1 / 7, -1 / 6, 1 / 5, -1 / 4, 1 / 3)), 1 / 2)
    return tl.where(tl.abs(t) < 0.125, t * t * series, t - log1p(t))


@triton.jit
def kl_of_means(mean_h, mean_d):
    """Return KL(P‖Q) from E_p[h] and E_p[d], never negative; NaN stays NaN."""
    t = mean_h + mean_d
    # Above t = 1 the first form is a difference of two numbers much larger than the KL.
    kl = tl.where(t < 1.0, mean_h - t_minus_log1p(t), tl.log(1.0 + t) - mean_d)
    return tl.where(kl < 0.0, 0.0, kl)


@triton.jit
def ref_kl_of_means(mean_r, mean_h, mean_d):
    """Return KL(Q‖P) from E_p[d·expm1(d)], E_p[h] and E_p[d], never negative; NaN stays NaN."""
    t = mean_h + mean_d
    u = -t / (1.0 + t)
    kl = (mean_r - mean_h) / (1.0 + t) - tl.where(t < 1.0, t_minus_log1p(u), u + tl.log(1.0 + t))
    return tl.where(kl <= 0.0, 0.0, kl)


@triton.jit
def renyi_of_means(mean_r, mean_h, mean_d, gamma):
    """Return Rényi's divergence of order 1 - γ from E_p[h(γd)], E_p[h] and E_p[d], never negative;
    NaN stays NaN.
    """
    t = mean_h + mean_d
    z = tl.fma(gamma, mean_d, mean_r)
    # log(1 + z) - γ·log(1 + t); if both are small, their first orders cancel.
    small = tl.fma(-gamma, mean_h, mean_r) - t_minus_log1p(z) + gamma * t_minus_log1p(t)
    log_z = tl.where(tl.maximum(tl.abs(z), t) < 1.0, small, log1p(z) - gamma * log1p(t))
    value = tl.div_rn(log_z, -gamma)
    return tl.where(value <= 0.0, 0.0, value)


@triton.jit
def soft_cap(x, SOFTCAP: tl.constexpr, DTYPE: tl.constexpr):
    """Return SOFTCAP·tanh(x/SOFTCAP), or x if SOFTCAP is 0. DTYPE: the logits' dtype in memory.

    The error is 2e-7·SOFTCAP, far below a 16-bit logit's rounding; for float32 logits it is below
    4e-7 of the result.
    """
    if SOFTCAP > 0.0:
        # tanh z = 1 - 2/(e^2z + 1), with the reciprocal as rsqrt of a square: a division costs
        # three times as much. An infinite power gives 1.
        power = tl.exp2(x * (2.0 * LOG2E / SOFTCAP)) + 1.0
        capped = tl.fma(tl.rsqrt(power * power), -2.0 * SOFTCAP, SOFTCAP)
        if DTYPE == tl.float32:
            # Below |z| = 0.5, where the form above cancels: minimax polynomial of
            # (tanh(z)/z - 1)/z², relative error of the whole 1.6e-8.
            z = x * (1.0 / SOFTCAP)
            square = z * z
            series = horner(
                square,
                (
                    0.01721995882689953,
                    -0.053034693002700806,
                    0.13325712084770203,
                    -0.3333313763141632,
                ),
            )
            capped = tl.where(tl.abs(z) < 0.5, tl.fma(x * square, series, x), capped)
        x = capped
    return x


@triton.jit
def soft_cap_slope(capped, SOFTCAP: tl.constexpr):
    """Return the derivative of soft_cap at the result `capped`; 1 if SOFTCAP is 0."""
    t = capped * (1.0 / SOFTCAP) if SOFTCAP > 0.0 else 0.0
    return (1.0 - t) * (1.0 + t)


# The sums of a part of a row, defined at the top of this file; scalars, or vectors over parts.
#
# Fields not requested are zeros. shift: see row_load.segment_shift.
State = namedtuple("State", "origin S A W U R centre shift")


# The divergences; comparisons rely on the order: those after Rényi's take a second read. Jeffreys'
# is the sum of two fields, kl and ref_kl (fastkl/ops/engine.py).
OF_KL, RENYI, JS, SKEW_KL, TOTAL_VARIATION = map(tl.constexpr, range(5))


# Compile-time. name: one of the five numbers above. small_rest: whether rest, Q's share of the
# mixture m, is small enough that log(m/p) needs a series. lg2: whether the GPU has PTX's
# lg2.approx.
Kind = namedtuple("Kind", "name small_rest lg2")


# Compile-time: the statistics requested.
#
# kind: a Kind. For Rényi's divergence of order 1 - γ, R holds Σe·h(γd). For an f-divergence, whose
# origin and centre are known, U holds the divergence and W its moment; S Σp and R Σ(q - p) of tiles
# on the general path, or R P(d ≥ 0) of total variation (divergence_math.add_terms).
# compensated: keep the rounding errors of differences, for float32 logits and for ratios of
# temperatures. lse: the log-sum-exps.
Want = namedtuple("Want", "entropy kl ref_kl kind compensated lse")


@triton.jit
def recentre(state, delta, gamma, want: tl.constexpr):
    """Move the centre up by `delta`, without reading entries; gamma: see Want."""
    shrink = tl.exp2(-delta * LOG2E)
    h = h_accurate(-delta)
    W = tl.fma(-delta, state.S, state.W)
    R = state.R
    if want.ref_kl:
        R = tl.fma(shrink, tl.fma(-delta, state.U + state.W, state.R), (h - delta) * W)
    if want.kind.name == RENYI:
        power = -delta * gamma
        h_power = h_accurate(power)
        R = tl.fma(state.S, h_power, state.W * (h_power + power) * gamma)
        R = tl.fma(state.R, tl.exp2(power * LOG2E), R)
    return State(
        state.origin,
        state.S,
        state.A,
        W,
        tl.fma(state.U, shrink, tl.fma(state.S, h, state.W * (h - delta))),
        R,
        state.centre + delta,
        state.shift,
    )


@triton.jit
def rescale(state, origin, want: tl.constexpr):
    """Move a state to another origin."""
    shrink = tl.exp2(state.origin - origin)
    return State(
        origin,
        state.S * shrink,
        tl.fma(state.S, state.origin - origin, state.A) * shrink if want.entropy else state.A,
        state.W * shrink if want.kl else state.W,
        state.U * shrink if want.kl else state.U,
        state.R * shrink if want.ref_kl or want.kind.name == RENYI else state.R,
        state.centre,
        state.shift,
    )


@triton.jit
def merge(state, scale, gamma, want: tl.constexpr):
    """Merge a vector of states (axis 0) into one, with its centre at the mean over all and the
    shift of a state with the highest origin; U is +inf if shifts are LARGEST_GAP apart.

    A state with S = 0 adds nothing, whatever its centre.
    """
    origin = tl.max(state.origin, 0)
    shift = tl.max(tl.where(state.origin == origin, state.shift, -LARGEST_SHIFT), 0)
    if want.compensated:
        gaps = (state.shift - shift) * scale
        U = tl.where((tl.abs(gaps) < LARGEST_GAP) | (state.S == 0.0), state.U, float("inf"))
        state = State(
            state.origin, state.S, state.A, state.W, U, state.R, state.centre + gaps, shift
        )
    state = rescale(state, origin, want)
    total = tl.sum(state.S, 0)
    centre = total * 0.0
    if want.kl:
        # A centre off by δ leaves δ²/2 in U, whose cancellation costs the KL digits.
        centre = tl.div_rn(
            tl.sum(tl.where(state.S > 0.0, tl.fma(state.S, state.centre, state.W), 0.0), 0), total
        )
        delta = tl.where(state.S > 0.0, centre - state.centre, 0.0)
        state = recentre(state, delta, gamma, want)
    return State(
        state.origin,
        total,
        tl.sum(state.A, 0),
        tl.sum(state.W, 0),
        tl.sum(state.U, 0),
        tl.sum(state.R, 0),
        centre,
        shift,
    )
