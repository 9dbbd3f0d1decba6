"""Fallback: rows that the float32 sums of one pass cannot hold, computed in float64.

Infinities, entries masked by a finite number on one side alone, peaks far apart, logits of any size: in float64 the
textbook formulas hold for all of them. Rows are read element by element, so no sum depends on where a row starts.
"""

import triton
import triton.language as tl

from .row_math import soft_cap

# Values are float32 pairs (high, low) where float32 alone would lose the digits that gradients need:
# x_top, log Σ exp((x - x_top)·s), y_top, D (2), KL (2), KL(Q‖P) (2), entropy with its sign bit set.
SIGN_BIT = tl.constexpr(-2147483648)


@triton.jit
def split_double(value):
    """A float64 as a float32 and the float32 that its rounding lost; 0 beside an infinity."""
    high = value.to(tl.float32)
    low = (value - high.to(tl.float64)).to(tl.float32)
    return high, tl.where(tl.abs(high) < float("inf"), low, 0.0)


@triton.jit
def load_double(row_ptr, start, end, ratio, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr):
    """Scaled logits `start` … `start + BLOCK - 1` of a row as float64; -inf from `end` on."""
    offs_v = start + tl.arange(0, BLOCK)
    logits = tl.load(row_ptr + offs_v, mask=offs_v < end, other=0.0).to(tl.float32)
    capped = soft_cap(logits, SOFTCAP, row_ptr.dtype.element_ty).to(tl.float64)
    return tl.where(offs_v < end, capped * ratio, float("-inf"))


@triton.jit
def log_ratio(log_p, log_q):
    """log q - log p; 0 for an entry without probability on either side."""
    return tl.where(log_p == log_q, 0.0, log_q - log_p)


@triton.jit
def fallback_statistics(p_row, q_row, V, scale, ratio, BLOCK: tl.constexpr, WITH_KL: tl.constexpr,
                        SOFTCAP: tl.constexpr, REF_SOFTCAP: tl.constexpr):
    """(x_top, log_S, y_top, D, KL, KL(Q‖P), entropy) of a row in float64.

    log_S = log Σ exp((x - x_top)·s) and D the same of Q less log_S, so that log q = (y - y_top)·s - log_S - D.
    An entry with p = 0 adds nothing to an expectation under P; p > 0 = q makes KL(P‖Q) infinite. A NaN makes all NaN.
    """
    scale = scale.to(tl.float64)
    ratio = ratio.to(tl.float64)
    x_peak = tl.full([BLOCK], float("-inf"), tl.float64)
    y_peak = tl.full([BLOCK], float("-inf"), tl.float64)
    for start in range(0, V, BLOCK):
        x_peak = tl.maximum(x_peak, load_double(p_row, start, V, 1.0, BLOCK, SOFTCAP))
        if WITH_KL:
            y_peak = tl.maximum(y_peak, load_double(q_row, start, V, ratio, BLOCK, REF_SOFTCAP))
    # Kept in float32 for backward; a ratio's product has more digits, and any number near the largest serves.
    x_top = tl.max(x_peak, 0).to(tl.float32).to(tl.float64)
    y_top = tl.max(y_peak, 0).to(tl.float32).to(tl.float64)
    x_weights = tl.zeros([BLOCK], tl.float64)
    y_weights = tl.zeros([BLOCK], tl.float64)
    for start in range(0, V, BLOCK):
        x_weights += tl.exp((load_double(p_row, start, V, 1.0, BLOCK, SOFTCAP) - x_top) * scale)
        if WITH_KL:
            y_weights += tl.exp((load_double(q_row, start, V, ratio, BLOCK, REF_SOFTCAP) - y_top) * scale)
    log_S = tl.log(tl.sum(x_weights, 0))
    D = log_S * 0.0
    if WITH_KL:
        D = tl.log(tl.sum(y_weights, 0)) - log_S
    minus_entropy = tl.zeros([BLOCK], tl.float64)
    kl = tl.zeros([BLOCK], tl.float64)
    ref_kl = tl.zeros([BLOCK], tl.float64)
    for start in range(0, V, BLOCK):
        log_p = (load_double(p_row, start, V, 1.0, BLOCK, SOFTCAP) - x_top) * scale - log_S
        p = tl.exp(log_p)
        minus_entropy += tl.where(p == 0.0, 0.0, p * log_p)
        if WITH_KL:
            log_q = (load_double(q_row, start, V, ratio, BLOCK, REF_SOFTCAP) - y_top) * scale - (log_S + D)
            q = tl.exp(log_q)
            d = log_ratio(log_p, log_q)
            kl += tl.where(p == 0.0, 0.0, -p * d)
            ref_kl += tl.where(q == 0.0, 0.0, q * d)
    kl_sum = tl.sum(kl, 0)
    ref_kl_sum = tl.sum(ref_kl, 0)
    entropy = -tl.sum(minus_entropy, 0)
    return (x_top, log_S, y_top, D, tl.where(kl_sum <= 0.0, 0.0, kl_sum), tl.where(ref_kl_sum <= 0.0, 0.0, ref_kl_sum),
            tl.where(entropy <= 0.0, 0.0, entropy))


@triton.jit
def store_statistics(saved_ptr, statistics):
    """Write a row's statistics to its saved values [10], marked as those of a fallback row."""
    x_top, log_S, y_top, D, kl, ref_kl, entropy = statistics
    D_high, D_low = split_double(D)
    kl_high, kl_low = split_double(kl)
    ref_kl_high, ref_kl_low = split_double(ref_kl)
    tl.store(saved_ptr, x_top.to(tl.float32))
    tl.store(saved_ptr + 1, log_S.to(tl.float32))
    tl.store(saved_ptr + 2, y_top.to(tl.float32))
    tl.store(saved_ptr + 3, D_high)
    tl.store(saved_ptr + 4, D_low)
    tl.store(saved_ptr + 5, kl_high)
    tl.store(saved_ptr + 6, kl_low)
    tl.store(saved_ptr + 7, ref_kl_high)
    tl.store(saved_ptr + 8, ref_kl_low)
    marked = entropy.to(tl.float32).to(tl.int32, bitcast=True) | SIGN_BIT
    tl.store(saved_ptr + 9, marked.to(tl.float32, bitcast=True))


@triton.jit
def load_statistics(saved_ptr):
    """The statistics that store_statistics wrote, as fallback_statistics returns them."""
    x_top = tl.load(saved_ptr).to(tl.float64)
    log_S = tl.load(saved_ptr + 1).to(tl.float64)
    y_top = tl.load(saved_ptr + 2).to(tl.float64)
    D = tl.load(saved_ptr + 3).to(tl.float64) + tl.load(saved_ptr + 4).to(tl.float64)
    kl = tl.load(saved_ptr + 5).to(tl.float64) + tl.load(saved_ptr + 6).to(tl.float64)
    ref_kl = tl.load(saved_ptr + 7).to(tl.float64) + tl.load(saved_ptr + 8).to(tl.float64)
    return x_top, log_S, y_top, D, kl, ref_kl, -tl.load(saved_ptr + 9).to(tl.float64)


@triton.jit
def is_fallback(saved_ptr):
    """Whether a row's saved values are those of a fallback row."""
    return tl.load(saved_ptr + 9).to(tl.int32, bitcast=True) < 0
