"""Exact: what row_finish does with a row that one pass cannot hold: it is read again, from probabilities normalised beforehand."""

import triton
import triton.language as tl

from .row_load import lane_sum, load_elements, load_group
from .row_math import FINITE, LN2, LOG2E, SMALL_D, centred, expm1_over_square, minus_log1p, soft_cap, split_sum, subtract


@triton.jit
def read_groups(source, first_group, V, THREADS: tl.constexpr, LANES: tl.constexpr, REALIGN: tl.constexpr, IN_BLOCKS: tl.constexpr,
                SOFTCAP: tl.constexpr):
    """float32 [THREADS, LANES]: the next groups of one row, -inf beyond its end. source: (aligned-down start, start, pad, lane order)."""
    block_ptr, row_ptr, pad, order = source
    group = first_group + tl.arange(0, THREADS)[:, None]
    offs_v = group * LANES + order
    if IN_BLOCKS:
        values = load_group(block_ptr, group, pad, V, REALIGN, True, LANES)
    else:
        values = load_elements(row_ptr, group, pad, V, True, LANES)
    return tl.where(offs_v < V, soft_cap(values, SOFTCAP, block_ptr.dtype.element_ty), float("-inf"))


@triton.jit
def total(z):
    """Sum of a [THREADS, LANES] accumulator, the same to the bit for rotated lanes."""
    return tl.sum(lane_sum(z), 0)


@triton.jit
def log_sum_exp(source, V, scale2, THREADS: tl.constexpr, LANES: tl.constexpr, REALIGN: tl.constexpr, IN_BLOCKS: tl.constexpr,
                SOFTCAP: tl.constexpr):
    """(largest x, log2 Σ 2^((x - largest)·scale2)); NaN for a row of -inf, with +inf or with NaN."""
    peak = tl.full([THREADS, LANES], float("-inf"), tl.float32)
    for group in range(0, tl.cdiv(V, LANES), THREADS):
        peak = tl.maximum(peak, read_groups(source, group, V, THREADS, LANES, REALIGN, IN_BLOCKS, SOFTCAP))
    largest = tl.max(tl.max(peak, 1), 0)
    weights = tl.zeros([THREADS, LANES], tl.float32)
    for group in range(0, tl.cdiv(V, LANES), THREADS):
        weights += tl.exp2((read_groups(source, group, V, THREADS, LANES, REALIGN, IN_BLOCKS, SOFTCAP) - largest) * scale2)
    return largest, tl.log2(total(weights))


@triton.jit
def exact_row(p_source, q_source, V, scale, THREADS: tl.constexpr, LANES: tl.constexpr, WITH_KL: tl.constexpr, REALIGN: tl.constexpr,
              Q_IN_BLOCKS: tl.constexpr, SOFTCAP: tl.constexpr):
    """The statistics of any row, infinities included, from log-probabilities counted from each tensor's largest logit.

    An entry with p = 0 adds nothing to E_p, whatever log(q/p) is; one with p > 0 = q makes KL(P‖Q) infinite. A NaN makes everything NaN.
    Returns origin, log2_S, lse_q, lost_q, centre, lost_centre, mean_p_d, mean_q_d, entropy as row_finish saves them, kl and ref_kl.
    """
    scale2 = scale * LOG2E
    x_top, p_log2 = log_sum_exp(p_source, V, scale2, THREADS, LANES, REALIGN, True, SOFTCAP)
    y_top = x_top
    q_log2 = p_log2
    if WITH_KL:
        y_top, q_log2 = log_sum_exp(q_source, V, scale2, THREADS, LANES, REALIGN, Q_IN_BLOCKS, SOFTCAP)
    ratio = (q_log2 - p_log2) * LN2
    sum_plogp = tl.zeros([THREADS, LANES], tl.float32)
    sum_h = tl.zeros([THREADS, LANES], tl.float32)
    sum_rise = tl.zeros([THREADS, LANES], tl.float32)
    sum_reverse = tl.zeros([THREADS, LANES], tl.float32)
    for group in range(0, tl.cdiv(V, LANES), THREADS):
        x = read_groups(p_source, group, V, THREADS, LANES, REALIGN, True, SOFTCAP) - x_top
        log2_p = tl.fma(x, scale2, -p_log2)
        p = tl.exp2(log2_p)
        sum_plogp += tl.where(p == 0.0, 0.0, p * log2_p)
        if WITH_KL:
            y = read_groups(q_source, group, V, THREADS, LANES, REALIGN, Q_IN_BLOCKS, SOFTCAP) - y_top
            q = tl.exp2(tl.fma(y, scale2, -q_log2))
            d = tl.fma(y - x, scale, -ratio)
            small = tl.abs(d) < SMALL_D
            pd = tl.where(p == 0.0, 0.0, p * d)
            near = pd * (d * expm1_over_square(d))
            qd = tl.where(q == 0.0, 0.0, q * d)
            sum_h += tl.where(small, near, (q - p) - pd)
            sum_rise += tl.where(small, pd + near, q - p)
            sum_reverse += tl.where(small, tl.fma(d, pd + near, -near), qd - (q - p))
    # In the form of the other kernels: a partition function counted from 0, in two parts.
    origin = x_top * scale2
    log2_S = p_log2 + tl.fma(x_top, scale2, -origin)
    kl = ratio * 0.0
    ref_kl = kl
    centre = kl
    lost_centre = kl
    mean_p_d = kl
    mean_q_d = kl
    lse_q = kl
    lost_q = kl
    if WITH_KL:
        t = total(sum_rise)
        kl = total(sum_h) - minus_log1p(t)
        ref_kl = total(sum_reverse) / (1.0 + t) - minus_log1p(-t / (1.0 + t))
        kl = tl.where(kl < 0.0, 0.0, kl)
        ref_kl = tl.where(ref_kl < 0.0, 0.0, ref_kl)
        top = y_top * scale2
        lse_q, lost_q = split_sum(top, q_log2 + tl.fma(y_top, scale2, -top))
        # The centre at E_p[d]: the gradient's brackets are differences of d from its means.
        tops, tops_lost = subtract(y_top, x_top, True)
        apart = tops * scale
        rest = tl.fma(tops, scale, -apart) + tl.fma(tops_lost, scale, ratio)
        centre = apart + tl.where(kl < FINITE, rest - kl, rest)
        mean_p_d, mean_q_d, peak_d = means_of_d(p_source, q_source, V, scale, x_top, p_log2, y_top, q_log2, centre, 0.0, THREADS, LANES, REALIGN,
                                                Q_IN_BLOCKS, SOFTCAP)
        # The KL is known to 1e-7 of itself only, and the centre with it: once more, from the mean that is left, and counted from P's peak.
        moved = tl.where(kl < FINITE, centre + mean_p_d, centre)
        lost_centre = tl.where(tl.abs(peak_d) < FINITE, peak_d - (moved - centre), 0.0)
        centre = moved
        mean_p_d, mean_q_d, peak_d = means_of_d(p_source, q_source, V, scale, x_top, p_log2, y_top, q_log2, centre, lost_centre, THREADS, LANES,
                                                REALIGN, Q_IN_BLOCKS, SOFTCAP)
    return origin, log2_S, lse_q, lost_q, centre, lost_centre, mean_p_d, mean_q_d, total(sum_plogp) * (-LN2), kl, ref_kl


@triton.jit
def means_of_d(p_source, q_source, V, scale, x_top, p_log2, y_top, q_log2, centre, lost_centre, THREADS: tl.constexpr, LANES: tl.constexpr,
               REALIGN: tl.constexpr, Q_IN_BLOCKS: tl.constexpr, SOFTCAP: tl.constexpr):
    """E_p[d] and E_q[d] for a centre and what its rounding lost, with d as row_backward computes it, and d at P's peak."""
    peak_d = tl.full([THREADS, LANES], float("-inf"), tl.float32)
    sum_p = tl.zeros([THREADS, LANES], tl.float32)
    sum_q = tl.zeros([THREADS, LANES], tl.float32)
    sum_pd = tl.zeros([THREADS, LANES], tl.float32)
    sum_qd = tl.zeros([THREADS, LANES], tl.float32)
    for group in range(0, tl.cdiv(V, LANES), THREADS):
        x = read_groups(p_source, group, V, THREADS, LANES, REALIGN, True, SOFTCAP)
        y = read_groups(q_source, group, V, THREADS, LANES, REALIGN, Q_IN_BLOCKS, SOFTCAP)
        p = tl.exp2(tl.fma(x - x_top, scale * LOG2E, -p_log2))
        q = tl.exp2(tl.fma(y - y_top, scale * LOG2E, -q_log2))
        difference, lost = subtract(y, x, True)
        d = centred(difference, lost, scale, centre, True) - lost_centre
        peak_d = tl.where(x == x_top, tl.maximum(peak_d, d), peak_d)
        sum_pd += tl.where(p == 0.0, 0.0, p * d)
        sum_qd += tl.where(q == 0.0, 0.0, q * d)
        sum_p += p
        sum_q += q
    # Over the sums of the very same p and q: a GPU's exponentials and logarithms leave these off 1 by more than a rounding.
    return tl.div_rn(total(sum_pd), total(sum_p)), tl.div_rn(total(sum_qd), total(sum_q)), tl.max(tl.max(peak_d, 1), 0)
