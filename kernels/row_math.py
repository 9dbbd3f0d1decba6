"""The arithmetic of one row: centred KL terms, the running state of a row and its one merge.

Notation, for one row with policy logits x, reference logits y and temperature T:
    s = 1/T,   d = (y - x)·s - c   for a centre c near lse(y·s) - lse(x·s),
    e = 2^(x·s·log2(e) - origin)
    S = Σe   A = Σe·(x·s·log2(e) - origin)   W = Σe·d   U = Σe·(expm1(d) - d)   R = Σe·d·expm1(d)
`origin` is a whole number near the largest log2-scaled logit, so that rescaling a sum is exact.
Then, with t = (U + W)/S,
    KL(P‖Q) = U/S - (t - log1p(t))        lse_q - lse_p = c + log1p(t)
    KL(Q‖P) = ((R - U)/S)/(1 + t) - (u - log1p(u)), u = -t/(1 + t)
for every centre c; a good one keeps all brackets as small as the KL itself, which is what keeps the
digits.

Every multiply-add is written as tl.fma and compiled with fusion off: the bits do not depend on what
a compiler chooses to fuse.
"""

from typing import NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Below this |d| a polynomial replaces e^d - 1 - d, which cancels there.
SMALL_D = tl.constexpr(0.25)
# Upper limit of every finite sum.
FINITE = tl.constexpr(3.0e38)
# float32 values of a partial state in memory.
STATE = tl.constexpr(7)
# Initial running peak: finite, so that no difference of peaks is (-inf) - (-inf); a whole number,
# as every origin.
LOWEST = tl.constexpr(-1.0e30)
# An exponent whose power of two is 0: the exponent of a logit of -inf, since 0·(-inf) would be NaN.
NO_WEIGHT = tl.constexpr(-256.0)
# Factor by which the weight about one centre may grow before the centre moves to the mean.
OUTWEIGHS = tl.constexpr(8.0)
# Largest |log2 of a partition function|: beyond it the rounding of the float32 origin is too coarse
# to correct. The fallback subtracts the row's largest logit instead.
LARGEST_LSE = tl.constexpr(4194304.0)
# Below this |x/cap| a polynomial replaces tanh, whose usual form cancels there.
SMALL_TANH = tl.constexpr(0.5)
# The largest |d| that the sums may hold: e^x is 0 from 87 below the peak on, and e^x·e^d would be
# missed if it still counted
# there; far below 0, d·expm1(d) = d·h + d² loses its digits.
LARGEST_D = tl.constexpr(60.0)
# The same of float32 rows with U > FAR_SHARE·S. Where the KL is that of few entries far away, the
# gradient to Q is about KL/|d|, against an error of log1p(t) of 2e-7.
LARGEST_FAR_D = tl.constexpr(16.0)
FAR_SHARE = tl.constexpr(0.1)


@triton.jit
def split_sum(a, b):
    """a + b as a rounded sum and what the rounding lost (Knuth)."""
    rounded = a + b
    b_part = rounded - a
    return rounded, (a - (rounded - b_part)) + (b - b_part)


@triton.jit
def subtract(y, x, EXACT: tl.constexpr):
    """y - x as a rounded difference and what the rounding lost: a constant shift between the two
    tensors then costs no digits.

    Without EXACT the loss is left out: the difference of two 16-bit logits fits float32.
    """
    if EXACT:
        difference, lost = split_sum(y, -x)
    else:
        difference = y - x
        lost = difference
    return difference, lost


@triton.jit
def scale_reference(y, ratio, HAS_RATIO: tl.constexpr):
    """Q's (capped) logits times the ratio of inverse temperatures, as a rounded product and what
    the rounding lost.
    """
    if HAS_RATIO:
        product = y * ratio
        lost = tl.fma(y, ratio, -product)
        lost = tl.where(tl.abs(product) < float("inf"), lost, 0.0)
    else:
        product = y
        lost = tl.zeros_like(y)
    return product, lost


@triton.jit
def centred(difference, lost, scale, centre, EXACT: tl.constexpr):
    """d = (y - x)·scale - centre; the large parts of difference and centre cancel in one fma."""
    d = tl.fma(difference, scale, -centre)
    if EXACT:
        d = tl.fma(lost, scale, d)
    return d


@triton.jit
def expm1_over_square(d):
    """(expm1(d) - d)/d² for |d| < 1/4; minimax polynomial, relative error 1.4e-6."""
    series = tl.fma(d, 0.008337464183568954, 0.04175350069999695)
    series = tl.fma(d, series, 0.16666695475578308)
    return tl.fma(d, series, 0.4999993145465851)


@triton.jit
def expm1_minus(d):
    """expm1(d) - d, accurate relative to itself to the last digits: for few values, such as those
    that move a centre.
    """
    # The Taylor series to d¹², of (expm1(d) - d)·2/d².
    series = tl.fma(d, 1 / 12, 1.0)
    for n in tl.static_range(9):
        series = tl.fma(d * series, 1 / (11 - n), 1.0)
    return tl.where(tl.abs(d) < 1.0, d * d * 0.5 * series, (tl.exp2(d * LOG2E) - 1.0) - d)


@triton.jit
def log1p(t):
    """log(1 + t), accurate relative to itself; for t near 1 and below, to the last digits."""
    # 2·atanh(z), z = t/(2 + t). A GPU's logarithm alone is off by 2e-7, which beside a KL of 0.2
    # nats that few entries make is 2e-5 of the gradient to Q.
    z = tl.div_rn(t, 2.0 + t)
    square = z * z
    series = tl.fma(square, 2 / 15, 2 / 13)
    for n in tl.static_range(5):
        series = tl.fma(square, series, 2 / (11 - 2 * n))
    series = tl.fma(z * square, series, z * 2.0)
    return tl.where((t > -0.5) & (t < 1.0), series, tl.log(1.0 + t))


@triton.jit
def minus_log1p(t):
    """t - log1p(t), accurate relative to itself; +inf at t = -1 and for t = +inf."""
    series = tl.fma(t, 1 / 9, -1 / 8)
    series = tl.fma(t, series, 1 / 7)
    series = tl.fma(t, series, -1 / 6)
    series = tl.fma(t, series, 1 / 5)
    series = tl.fma(t, series, -1 / 4)
    series = tl.fma(t, series, 1 / 3)
    series = tl.fma(t, -series, 1 / 2)
    return tl.where(tl.abs(t) < 0.125, t * t * series, t - log1p(t))


@triton.jit
def forward_kl(mean_h, mean_d):
    """KL(P‖Q) from E_p[expm1(d) - d] and E_p[d], never negative; NaN stays NaN."""
    t = mean_h + mean_d
    # Beyond t = 1 the first form would be the difference of two numbers much larger than the KL.
    kl = tl.where(t < 1.0, mean_h - minus_log1p(t), tl.log(1.0 + t) - mean_d)
    return tl.where(kl < 0.0, 0.0, kl)


@triton.jit
def reverse_kl(mean_r, mean_h, mean_d):
    """KL(Q‖P) from E_p[d·expm1(d)], E_p[expm1(d) - d] and E_p[d], never negative; NaN stays NaN."""
    t = mean_h + mean_d
    u = -t / (1.0 + t)
    kl = (mean_r - mean_h) / (1.0 + t) - tl.where(t < 1.0, minus_log1p(u), u + tl.log(1.0 + t))
    return tl.where(kl < 0.0, 0.0, kl)


@triton.jit
def soft_cap(x, SOFTCAP: tl.constexpr, DTYPE: tl.constexpr):
    """SOFTCAP·tanh(x/SOFTCAP); x itself where SOFTCAP is 0. DTYPE is the logits' type in memory.

    The error is 2e-7·SOFTCAP, far below a 16-bit logit's own rounding; for float32 logits it is
    below 4e-7 of the result.
    """
    if SOFTCAP > 0.0:
        # tanh z = 1 - 2/(e^2z + 1), the reciprocal as a reciprocal square root: a division costs
        # three times as much. An infinite power gives 1.
        power = tl.exp2(x * (2.0 * LOG2E / SOFTCAP)) + 1.0
        capped = tl.fma(tl.rsqrt(power * power), -2.0 * SOFTCAP, SOFTCAP)
        if DTYPE == tl.float32:
            # Minimax polynomial of (tanh(z)/z - 1)/z², relative error of the whole 1.6e-8.
            z = x * (1.0 / SOFTCAP)
            square = z * z
            series = tl.fma(square, 0.01721995882689953, -0.053034693002700806)
            series = tl.fma(square, series, 0.13325712084770203)
            series = tl.fma(square, series, -0.3333313763141632)
            capped = tl.where(tl.abs(z) < SMALL_TANH, tl.fma(x * square, series, x), capped)
        x = capped
    return x


@triton.jit
def soft_cap_slope(capped, SOFTCAP: tl.constexpr):
    """Return the derivative of soft_cap where it has the value `capped`; 1 where SOFTCAP is 0."""
    if SOFTCAP > 0.0:
        t = capped * (1.0 / SOFTCAP)
        slope = (1.0 - t) * (1.0 + t)
    else:
        slope = 1.0
    return slope


class State(NamedTuple):
    """The sums of a part of a row, defined at the top of this file; scalars, or vectors over parts.

    Fields that were not asked for are zeros.
    """

    origin: tl.tensor
    S: tl.tensor
    A: tl.tensor
    W: tl.tensor
    U: tl.tensor
    R: tl.tensor
    centre: tl.tensor


class Want(NamedTuple):
    """Compile-time: the statistics asked for.

    exact: keep what the rounding of differences loses, for float32 logits and ratios of
    temperatures.
    """

    entropy: bool
    kl: bool
    reverse: bool
    exact: bool


@triton.jit
def recentre(s, delta, want: tl.constexpr):
    """Move the centre up by `delta`: exact algebra on the sums, no entry is read again."""
    shrink = tl.exp2(-delta * LOG2E)
    h = expm1_minus(-delta)
    W = tl.fma(-delta, s.S, s.W)
    R = s.R
    if want.reverse:
        R = tl.fma(shrink, tl.fma(-delta, s.U + s.W, R), (h - delta) * W)
    U = tl.fma(s.U, shrink, tl.fma(s.S, h, s.W * (h - delta)))
    return State(s.origin, s.S, s.A, W, U, R, s.centre + delta)


@triton.jit
def rescale(s, origin, want: tl.constexpr):
    """Count the sums from another origin."""
    shrink = tl.exp2(s.origin - origin)
    A = s.A
    W = s.W
    U = s.U
    R = s.R
    if want.entropy:
        A = tl.fma(s.S, s.origin - origin, A) * shrink
    if want.kl:
        W = W * shrink
        U = U * shrink
    if want.reverse:
        R = R * shrink
    return State(origin, s.S * shrink, A, W, U, R, s.centre)


@triton.jit
def merge(s, want: tl.constexpr):
    """Merge a vector of states (axis 0) to one: programs of a row and shards of a vocabulary merge
    alike.

    Put the centre at the mean of d over all of them. A state without weight (S = 0) adds nothing,
    whatever its centre.
    All must count their differences from one shift (row_load.row_shift).
    """
    s = rescale(s, tl.max(s.origin, 0), want)
    total = tl.sum(s.S, 0)
    centre = total * 0.0
    if want.kl:
        # A centre off by δ would leave U larger than the KL by δ²/2, and its digits lost.
        centre = tl.div_rn(tl.sum(tl.where(s.S > 0.0, tl.fma(s.S, s.centre, s.W), 0.0), 0), total)
        s = recentre(s, tl.where(s.S > 0.0, centre - s.centre, 0.0), want)
    return State(
        s.origin, total, tl.sum(s.A, 0), tl.sum(s.W, 0), tl.sum(s.U, 0), tl.sum(s.R, 0), centre
    )
