"""Fallback: compute rows in float64 that the float32 sums of one pass cannot represent.

Covers infinities, entries masked by a finite number in one model, peaks far apart, logits of any
size: the textbook formulas have enough digits in float64 with the row's largest logit subtracted,
and d averaged relative to its value at the peak. No sum depends on a row's alignment.
"""

from collections import namedtuple

import triton
import triton.language as tl

from .divergence_math import (
    Sums,
    add_sums,
    double_formula,
    double_terms,
    empty_sums,
    renyi_exponent,
)
from .row_finish import store_fields, store_logprob, store_tuple, token_logits
from .row_load import load_logit
from .row_math import OF_KL, RENYI, soft_cap_slope

SIGN_BIT = tl.constexpr(-2147483648)
# Factor of the saved means: with masks of finfo.min at the peaks they overflow float32 although the
# gradient does not.
MEAN_FACTOR = tl.constexpr(2.0**-64)
# Indices of the saved E_p[u] and E_q[v] of a divergence other than the KL, each as hi and lo; for
# Rényi's of Sums.x and Sums.y, and of log(Sums.value) as hi and lo.
MEAN_U, MEAN_V = tl.constexpr(5), tl.constexpr(7)


# Float64 statistics of a row: log p = (x - x_peak)·s - log_sum, log q = (y - y_peak)·s·ratio -
# log_sum - log_sum_ratio.
#
# y_at_x_peak: y at the largest x. mean_p_from_peak: E_p[d - d at P's peak]. x_at_y_peak,
# mean_q_from_peak: the same with P and Q swapped.
Fallback = namedtuple(
    "Fallback",
    "x_peak y_peak log_sum log_sum_ratio y_at_x_peak mean_p_from_peak x_at_y_peak "
    "mean_q_from_peak entropy",
)


@triton.jit
def load_entries(row_ptr, start, end, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr):
    """Load capped logits `start` … `start + BLOCK - 1` of a row as float64; -inf from `end` on."""
    offs_v = start + tl.arange(0, BLOCK)
    capped = load_logit(row_ptr, offs_v, offs_v < end, 0.0, SOFTCAP).to(tl.float64)
    return tl.where(offs_v < end, capped, float("-inf"))


@triton.jit
def log_probability_p(x, stats, scale):
    """Return log p of the logits x."""
    return (x - stats.x_peak) * scale - stats.log_sum


@triton.jit
def log_probability_q(y, stats, q_scale):
    """Return log q of the logits y."""
    return (y - stats.y_peak) * q_scale - (stats.log_sum + stats.log_sum_ratio)


@triton.jit
def peak_ratios(stats, scale, q_scale):
    """Return d at P's peak and d at Q's."""
    return (
        log_probability_q(stats.y_at_x_peak, stats, q_scale)
        - log_probability_p(stats.x_peak, stats, scale),
        log_probability_q(stats.y_peak, stats, q_scale)
        - log_probability_p(stats.x_at_y_peak, stats, scale),
    )


@triton.jit
def fallback_statistics(
    row,
    BLOCK: tl.constexpr,
    WITH_KL: tl.constexpr,
    reading: tl.constexpr,
    PART: tl.constexpr = False,
):
    """Compute the Fallback of a WideRow.

    An entry with p = 0 adds nothing to an expectation under P; p > 0 = q makes E_p[d] infinite. A
    NaN makes all results NaN, and so do logits that are all -inf, except in a PART of a row: there
    they have a peak of -inf and, for merge_parts, a log_sum of 0.
    """
    x_largest = tl.full([BLOCK], float("-inf"), tl.float64)
    y_largest = x_largest
    for start in range(0, row.V, BLOCK):
        x_largest = tl.maximum(x_largest, load_entries(row.p, start, row.V, BLOCK, reading.softcap))
        if WITH_KL:
            y_largest = tl.maximum(
                y_largest, load_entries(row.q, start, row.V, BLOCK, reading.ref_softcap)
            )
    x_peak = tl.max(x_largest, 0)
    y_peak = tl.max(y_largest, 0)
    x_empty = (x_peak == float("-inf")) & PART
    y_empty = (y_peak == float("-inf")) & PART
    x_peak, y_peak = tl.where(x_empty, 0.0, x_peak), tl.where(y_empty, 0.0, y_peak)
    zeros = tl.zeros([BLOCK], tl.float64)
    x_weights, y_weights = zeros, zeros
    y_at_x_peak = tl.full([BLOCK], float("-inf"), tl.float64)
    x_at_y_peak = y_at_x_peak
    for start in range(0, row.V, BLOCK):
        x = load_entries(row.p, start, row.V, BLOCK, reading.softcap)
        x_weights += tl.exp((x - x_peak) * row.scale)
        if WITH_KL:
            y = load_entries(row.q, start, row.V, BLOCK, reading.ref_softcap)
            y_weights += tl.exp((y - y_peak) * row.q_scale)
            y_at_x_peak = tl.where(x == x_peak, tl.maximum(y_at_x_peak, y), y_at_x_peak)
            x_at_y_peak = tl.where(y == y_peak, tl.maximum(x_at_y_peak, x), x_at_y_peak)
    # Add instead of select, to keep a NaN among logits of -inf.
    log_sum = tl.log(tl.sum(x_weights, 0) + tl.where(x_empty, 1.0, 0.0))
    log_sum_ratio = (
        tl.log(tl.sum(y_weights, 0) + tl.where(y_empty, 1.0, 0.0)) - log_sum
        if WITH_KL
        else log_sum * 0.0
    )
    # log_sum is a placeholder for the means and the entropy; peak_ratios does not read them.
    stats = Fallback(
        x_peak, y_peak, log_sum, log_sum_ratio, tl.max(y_at_x_peak, 0), log_sum,
        tl.max(x_at_y_peak, 0), log_sum, log_sum,
    )  # fmt: skip
    d_at_x_peak, d_at_y_peak = peak_ratios(stats, row.scale, row.q_scale)
    plogp, sum_p, sum_q = zeros, zeros, zeros
    for start in range(0, row.V, BLOCK):
        log_p = log_probability_p(
            load_entries(row.p, start, row.V, BLOCK, reading.softcap), stats, row.scale
        )
        p = tl.exp(log_p)
        plogp += tl.where(p == 0.0, 0.0, p * log_p)
        if WITH_KL:
            log_q = log_probability_q(
                load_entries(row.q, start, row.V, BLOCK, reading.ref_softcap), stats, row.q_scale
            )
            q = tl.exp(log_q)
            d = log_q - log_p
            sum_p += tl.where(p == 0.0, 0.0, p * (d - d_at_x_peak))
            sum_q += tl.where(q == 0.0, 0.0, q * (d - d_at_y_peak))
    entropy = -tl.sum(plogp, 0)
    return Fallback(
        tl.where(x_empty, float("-inf"), x_peak), tl.where(y_empty, float("-inf"), y_peak),
        log_sum, log_sum_ratio, stats.y_at_x_peak, tl.sum(sum_p, 0), stats.x_at_y_peak,
        tl.sum(sum_q, 0), tl.where(entropy <= 0.0, 0.0, entropy),
    )  # fmt: skip


@triton.jit
def fallback_kl(stats, scale, q_scale):
    """Return KL(P‖Q) and KL(Q‖P), never negative; +inf also if the peak of one has no probability
    under the other, which would give (-inf) - (-inf).
    """
    d_at_x_peak, d_at_y_peak = peak_ratios(stats, scale, q_scale)
    kl = tl.where(
        d_at_x_peak == float("-inf"), float("inf"), -(d_at_x_peak + stats.mean_p_from_peak)
    )
    ref_kl = tl.where(
        d_at_y_peak == float("inf"), float("inf"), d_at_y_peak + stats.mean_q_from_peak
    )
    return tl.where(kl <= 0.0, 0.0, kl), tl.where(ref_kl <= 0.0, 0.0, ref_kl)


@triton.jit
def hi_lo(value):
    """Return a float64 as two float32, hi and lo; lo is 0 if hi is not finite."""
    hi = value.to(tl.float32)
    return hi, tl.where(tl.abs(hi) < float("inf"), (value - hi.to(tl.float64)).to(tl.float32), 0.0)


@triton.jit
def save_stats(saved_ptr, stats, log_sum, log_sum_ratio):
    """Write a Fallback, with these two in place of its own, to a row's saved values [10], marked by
    the sign bit of the second.
    """
    high, low = hi_lo(log_sum_ratio)
    # The largest term is 1, so log_sum is never negative and its sign bit is free.
    marked = log_sum.to(tl.float32).to(tl.int32, bitcast=True) | SIGN_BIT
    store_tuple(
        saved_ptr,
        (
            stats.x_peak, marked.to(tl.float32, bitcast=True), stats.y_peak, high, low,
            stats.y_at_x_peak, stats.mean_p_from_peak * MEAN_FACTOR, stats.x_at_y_peak,
            stats.mean_q_from_peak * MEAN_FACTOR, stats.entropy,
        ),
    )  # fmt: skip


@triton.jit
def load_stats(saved_ptr, kind: tl.constexpr):
    """Return the Fallback that store_fallback wrote; of a divergence other than the KL only what
    gives the log-probabilities.
    """
    return Fallback(
        tl.load(saved_ptr).to(tl.float64),
        tl.load(saved_ptr + 2).to(tl.float64),
        (0.0 if kind.name == OF_KL else tl.load(saved_ptr + 9))
        - tl.load(saved_ptr + 1).to(tl.float64),
        load_hi_lo(saved_ptr + 3),
        tl.load(saved_ptr + 5).to(tl.float64),
        tl.load(saved_ptr + 6).to(tl.float64) / MEAN_FACTOR,
        tl.load(saved_ptr + 7).to(tl.float64),
        tl.load(saved_ptr + 8).to(tl.float64) / MEAN_FACTOR,
        tl.load(saved_ptr + 9).to(tl.float64),
    )


@triton.jit
def is_fallback(saved_ptr):
    """Return whether a row's saved values are a Fallback's."""
    return tl.load(saved_ptr + 1).to(tl.int32, bitcast=True) < 0


@triton.jit
def divergence_sums(
    row, stats, formula, BLOCK: tl.constexpr, kind: tl.constexpr, reading: tl.constexpr
):
    """Return the Sums of a row for a divergence other than the KL."""
    formula = double_formula(formula)
    value, u, v, sum_p, sum_q, at_x, at_y = empty_sums(tl.zeros([BLOCK], tl.float64), kind)
    for start in range(0, row.V, BLOCK):
        x = load_entries(row.p, start, row.V, BLOCK, reading.softcap)
        y = load_entries(row.q, start, row.V, BLOCK, reading.ref_softcap)
        log_p = log_probability_p(x, stats, row.scale)
        log_q = log_probability_q(y, stats, row.q_scale)
        if kind.name == RENYI:
            exponent = renyi_exponent(log_p, log_p, log_q, formula)
            at_x, at_y = tl.where(exponent > u, x, at_x), tl.where(exponent > u, y, at_y)
            largest = tl.maximum(u, exponent)
            value = value * tl.exp(u - largest) + tl.exp(exponent - largest)
            u = largest
            v += tl.where(log_p == log_q, 0.0, 1.0)
        else:
            terms = double_terms(log_p, log_q, formula, kind)
            value += terms.value
            u += terms.to_p
            v += terms.to_q
        sum_p += tl.exp(log_p)
        sum_q += tl.exp(log_q)
    return add_sums(Sums(value, u, v, sum_p, sum_q, at_x, at_y), kind)


@triton.jit
def store_divergence(saved_ptr, stats, log_sum, sums, formula, kind: tl.constexpr):
    """Return a divergence from its Sums, and write five saved values: the low part of log_sum, and
    in place of the KL's means those of the gradients, or for Rényi's divergence what gives r.
    """
    value = sums.value
    tl.store(saved_ptr + 9, hi_lo(log_sum)[1])
    if kind.name == RENYI:
        formula = double_formula(formula)
        log_z = sums.u + tl.log(value) - formula.share * tl.log(sums.p)
        # Equal rows give exactly 0 and r = p, without the sum's rounding error.
        equal = sums.v == 0.0
        store_tuple(
            saved_ptr + MEAN_U,
            (tl.where(equal, stats.x_peak, sums.x), tl.where(equal, stats.y_peak, sums.y)),
        )
        store_tuple(saved_ptr + MEAN_V, hi_lo(tl.where(equal, log_sum, tl.log(value))))
        value = tl.where(equal, 0.0, tl.log(sums.q) - log_z / formula.rest)
    else:
        # On a peaked row the gradient is the remainder u - E_p[u]: Σ p has to cancel.
        store_tuple(saved_ptr + MEAN_U, hi_lo(sums.u / sums.p))
        store_tuple(saved_ptr + MEAN_V, hi_lo(sums.v / sums.q))
    return tl.where(value <= 0.0, 0.0, value)


@triton.jit
def load_hi_lo(ptr):
    """Load a float64 from its hi and lo."""
    return tl.load(ptr).to(tl.float64) + tl.load(ptr + 1).to(tl.float64)


@triton.jit
def fallback_gradients(  # noqa: PLR0913
    x, log_p, p, y, log_q, q, weight, row, saved_ptr, formula, kind: tl.constexpr
):
    """Return weight·T times the gradients, from the saved values of store_divergence."""
    formula = double_formula(formula)
    mean_u, mean_v = load_hi_lo(saved_ptr + MEAN_U), load_hi_lo(saved_ptr + MEAN_V)
    if kind.name == RENYI:
        # Relative to an entry, since a large log Z leaves exponents no digits. Never above 1, which
        # rounding may exceed beside logits of 1e16.
        exponent = renyi_exponent(
            log_p,
            (x - tl.load(saved_ptr + MEAN_U)) * row.scale,
            (y - tl.load(saved_ptr + MEAN_U + 1)) * row.q_scale,
            formula,
        )
        r = tl.exp(tl.where(exponent > mean_v, 0.0, exponent - mean_v))
        return (r - p) * (-formula.share / formula.rest) * weight, (q - r) * weight
    else:
        terms = double_terms(log_p, log_q, formula, kind)
        return (terms.to_p - p * mean_u) * weight, (terms.to_q - q * mean_v) * weight


@triton.jit
def store_fallback(out, row, stats, sums, formula, want: tl.constexpr, reading: tl.constexpr):
    """Write a WideRow's saved values and fields from its Fallback; for a divergence other than the
    KL also from its Sums.
    """
    log_sum, log_sum_ratio = stats.log_sum, stats.log_sum_ratio
    if want.kind.name == RENYI:
        # Normalise p and q, as its r is.
        log_sum += tl.log(sums.p)
        log_sum_ratio += tl.log(sums.q) - tl.log(sums.p)
    save_stats(out.saved, stats, log_sum, log_sum_ratio)
    kl, ref_kl = fallback_kl(stats, row.scale, row.q_scale)
    if want.kind.name > OF_KL:
        kl = store_divergence(out.saved, stats, log_sum, sums, formula, want.kind)
    store_fields(
        out, stats.entropy, kl, ref_kl, stats.x_peak * row.scale + stats.log_sum,
        stats.y_peak * row.q_scale + (stats.log_sum + stats.log_sum_ratio), want,
    )  # fmt: skip
    if reading.tokens:
        x, y = token_logits(row, want, reading)
        store_logprob(out.logprob, log_probability_p(x.to(tl.float64), stats, row.scale))
        if want.kl:
            store_logprob(out.ref_logprob, log_probability_q(y.to(tl.float64), stats, row.q_scale))


# The addresses of a row's gradients to P and to Q, and the entries to write: `start` … `end - 1`.
GradientRow = namedtuple("GradientRow", "p q start end")


@triton.jit
def write_fallback(
    row, grads, saved_ptr, g, formula, BLOCK: tl.constexpr, asked: tl.constexpr,
    reading: tl.constexpr,
):  # fmt: skip
    """Write a WideRow's gradients, computed in float64, for upstream gradients g."""
    HAS_Q: tl.constexpr = asked.kl or asked.ref_kl or asked.ref_logprob or asked.ref_lse
    stats = load_stats(saved_ptr, asked.kind)
    # Other rows take this path if float32 has too few digits for E_q[d].
    if asked.ref_kl and asked.wrt_q and is_fallback(saved_ptr) == 0:
        stats = fallback_statistics(row, BLOCK, True, reading)
    d_at_x_peak, d_at_y_peak = peak_ratios(stats, row.scale, row.q_scale)
    token = tl.load(row.token_ptr) if reading.tokens else 0
    for first in range(grads.start, grads.end, BLOCK):
        offs_v = first + tl.arange(0, BLOCK)
        inside = offs_v < grads.end
        x = load_entries(row.p, first, grads.end, BLOCK, reading.softcap)
        log_p = log_probability_p(x, stats, row.scale)
        p = tl.exp(log_p)
        grad_x = p * (g.lse - g.logprob - g.entropy * (log_p + stats.entropy))
        if HAS_Q:
            y = load_entries(row.q, first, grads.end, BLOCK, reading.ref_softcap)
            log_q = log_probability_q(y, stats, row.q_scale)
            q = tl.exp(log_q)
            d = log_q - log_p
            grad_y = q * (g.ref_lse - g.ref_logprob)
            if asked.kind.name > OF_KL:
                grad_x, grad_y = fallback_gradients(
                    x, log_p, p, y, log_q, q, g.kl, row, saved_ptr, formula, asked.kind
                )
            elif asked.kl:
                # Skip an infinite KL whose upstream gradient is 0: 0·inf is NaN.
                grad_x -= tl.where(
                    g.kl == 0.0, 0.0, p * (g.kl * ((d - d_at_x_peak) - stats.mean_p_from_peak))
                )
                grad_y += g.kl * (q - p)
            if asked.ref_kl:
                grad_x -= g.ref_kl * (q - p)
                grad_y += tl.where(
                    q == 0.0,
                    0.0,
                    tl.where(
                        g.ref_kl == 0.0,
                        0.0,
                        q * (g.ref_kl * ((d - d_at_y_peak) - stats.mean_q_from_peak)),
                    ),
                )
        if asked.wrt_p:
            if asked.kind.name == OF_KL:
                # An entry with p = 0 has only the gradient of KL(Q‖P); its log may be infinite.
                grad_x = tl.where(
                    p == 0.0, -g.ref_kl * q if (HAS_Q and asked.ref_kl) else 0.0, grad_x
                )
            if reading.tokens:
                grad_x += tl.where(offs_v == token, g.logprob, 0.0)
            tl.store(
                grads.p + offs_v,
                (grad_x * row.scale * soft_cap_slope(x, reading.softcap)).to(tl.float32),
                mask=inside,
            )
        if asked.wrt_q:
            if reading.tokens:
                grad_y += tl.where(offs_v == token, g.ref_logprob, 0.0)
            tl.store(
                grads.q + offs_v,
                (grad_y * row.q_scale * soft_cap_slope(y, reading.ref_softcap)).to(tl.float32),
                mask=inside,
            )
