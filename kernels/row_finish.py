"""Finish: the statistics of rows from their partial states. Rows whose sums do not hold take the fallback here (row_fallback.py)."""

import triton
import triton.language as tl

from .row_fallback import fallback_kl, fallback_row, log_probability_p, log_probability_q, store_row
from .row_load import row_offset, row_ratio, row_scale, row_shift
from .row_math import (
    FINITE,
    LARGEST_LSE,
    LN2,
    LOG2E,
    LOWEST,
    STATE,
    forward_kl,
    log1p,
    merge_states,
    reverse_kl,
    scale_reference,
    soft_cap,
    split_sum,
)

# Above this KL, in nats, the product e^x·e^d loses digits where |d| is large; real policies stay far below.
LARGE_KL = tl.constexpr(8.0)
# Limit of |E_p[d]|, in nats: beyond it hi/lo float32 keeps fewer digits than the gradient of a peaked row needs. Also
# the limit of the mean difference of 16-bit logits, each of which is rounded.
LARGEST_DIFFERENCE = tl.constexpr(64.0)
# float32 values per row that backward needs.
SAVED = tl.constexpr(10)


@triton.jit
def load_state(state_ptr, rows, there, splits, SPLITS: tl.constexpr, FIELD: tl.constexpr, OTHER: tl.constexpr):
    """One field of the partial states of rows [ROWS], [SPLITS, ROWS]; SPLITS is a power of two, those beyond `splits` are empty states."""
    index = tl.arange(0, SPLITS)[:, None]
    return tl.load(state_ptr + (rows[None, :] * splits + index) * STATE + FIELD, mask=(index < splits) & there[None, :], other=OTHER)


@triton.jit
def q_partition(origin, log2_S, centre, log_ratio, mean_q_d, scale):
    """log2 Σ 2^((y - shift)·scale2) from P's and the centre, scale2 = s·log2(e) rounded: a rounded sum and what it lost.

    The sums count differences in units of s, row_backward evaluates 2^(y·scale2). Correct for the rounding of scale2,
    which shows where E_q[y - x - shift] is large.
    """
    centre2 = centre * LOG2E
    lse, lost = split_sum(origin, centre2)
    lse, more = split_sum(lse, log2_S)
    rounding = tl.div_rn(tl.fma(scale, LOG2E, -(scale * LOG2E)), scale)
    return split_sum(lse, lost + more + tl.fma(centre, LOG2E, -centre2) + log_ratio * LOG2E - (centre + mean_q_d) * rounding)


@triton.jit
def merged_rows(state_ptr, rows, there, splits, shift, scale, SPLITS: tl.constexpr, WITH_ENTROPY: tl.constexpr, WITH_KL: tl.constexpr,
                WITH_REVERSE: tl.constexpr, EXACT: tl.constexpr):
    """The statistics of rows [ROWS] from their partial states, and whether they hold.

    Returns origin, log2_S, lse_q and what it lost (base 2), centre and what it lost, log1p(t), E_p[d], E_q[d], entropy, KL
    and KL(Q‖P). The states' centres count from shift·scale (row_forward), and so do the returned lse_q and centre.
    """
    origin = load_state(state_ptr, rows, there, splits, SPLITS, 0, LOWEST)
    S = load_state(state_ptr, rows, there, splits, SPLITS, 1, 0.0)
    A = S * 0.0
    W = A
    U = A
    R = A
    centre = A
    if WITH_ENTROPY:
        A = load_state(state_ptr, rows, there, splits, SPLITS, 2, 0.0)
    if WITH_KL:
        W = load_state(state_ptr, rows, there, splits, SPLITS, 3, 0.0)
        U = load_state(state_ptr, rows, there, splits, SPLITS, 4, 0.0)
        if WITH_REVERSE:
            R = load_state(state_ptr, rows, there, splits, SPLITS, 5, 0.0)
        centre = load_state(state_ptr, rows, there, splits, SPLITS, 6, 0.0)
    origin, S, A, W, U, R, centre = merge_states(origin, S, A, W, U, R, centre, WITH_ENTROPY, WITH_KL, WITH_REVERSE)
    holds = (S > 0.0) & (S + tl.abs(A) + tl.abs(W) + tl.abs(U) + tl.abs(R) < FINITE)
    log2_S = tl.log2(S)
    entropy = (log2_S - tl.div_rn(A, S)) * LN2
    kl = entropy * 0.0
    ref_kl = kl
    log1p_t = kl
    mean_d = kl
    mean_q_d = kl
    holds = holds & (tl.abs(origin) < LARGEST_LSE)
    if WITH_KL:
        # Divide with one rounding: on a peaked row the gradient is the remainder d - E_p[d], and plain division may be off by two units.
        mean_h = tl.maximum(tl.div_rn(U, S), 0.0)
        mean_d = tl.div_rn(W, S)
        kl = forward_kl(mean_h, mean_d)
        holds = holds & (kl < LARGE_KL)
        if WITH_REVERSE:
            mean_r = tl.div_rn(R, S)
            ref_kl = reverse_kl(mean_r, mean_h, mean_d)
            mean_q_d = tl.div_rn(R + W, S + U + W)
            # Reject a KL(Q‖P) that is a small difference of large terms, as beside a KL(P‖Q) that a mask makes: its digits are lost.
            terms = (tl.abs(mean_r) + mean_h) / (1.0 + mean_h + mean_d)
            holds = holds & (ref_kl < LARGE_KL) & (terms < tl.fma(ref_kl, 8.0, 0.001))
    lse_q = log2_S
    lost_q = kl * 0.0
    if WITH_KL:
        log1p_t = log1p(mean_h + mean_d)
        lse_q, lost_q = q_partition(origin, log2_S, centre, log1p_t, mean_q_d, scale)
        holds = holds & (tl.abs(lse_q) < LARGEST_LSE)
        apart = tl.fma(shift, scale, centre)
        holds = holds & (tl.abs(apart) < LARGEST_DIFFERENCE) & (EXACT | (tl.abs(apart) < scale * LARGEST_DIFFERENCE))
    return (origin, log2_S, lse_q, lost_q, centre, log1p_t, mean_d, mean_q_d, entropy, kl, ref_kl), holds


@triton.jit
def add_product(value, lost, a, b):
    """value + lost + a·b as a rounded sum and what it lost."""
    product = a * b
    total, more = split_sum(product, value)
    return total, lost + more + tl.fma(a, b, -product)


@triton.jit
def not_above_zero(logprob):
    """A log-probability, whose rounding may have left it above 0; NaN stays NaN."""
    return tl.where(logprob > 0.0, 0.0, logprob)


@triton.jit
def store_fields(rows, stored, entropy, kl, ref_kl, entropy_ptr, kl_ptr, ref_kl_ptr, WITH_ENTROPY: tl.constexpr,
                 WITH_KL: tl.constexpr, WITH_REVERSE: tl.constexpr):
    """Write the fields that depend on no token."""
    if WITH_ENTROPY:
        tl.store(entropy_ptr + rows, entropy.to(tl.float32), mask=stored)
    if WITH_KL:
        tl.store(kl_ptr + rows, kl.to(tl.float32), mask=stored)
    if WITH_REVERSE:
        tl.store(ref_kl_ptr + rows, ref_kl.to(tl.float32), mask=stored)


@triton.jit
def token_logits(p_row, q_row, tokens_ptr, rows, stored, V, WITH_KL: tl.constexpr, SOFTCAP: tl.constexpr,
                 REF_SOFTCAP: tl.constexpr):
    """The sampled token's capped logits of P and of Q; NaN for a token outside 0 … V-1."""
    token = tl.load(tokens_ptr + rows, mask=stored, other=-1)
    inside = (token >= 0) & (token < V)
    x = soft_cap(tl.load(p_row + token, mask=inside, other=float("nan")).to(tl.float32), SOFTCAP, p_row.dtype.element_ty)
    y = x
    if WITH_KL:
        y = tl.load(q_row + token, mask=inside, other=float("nan")).to(tl.float32)
        y = soft_cap(y, REF_SOFTCAP, q_row.dtype.element_ty)
    return x, y


@triton.jit
def store_rows(rows, stored, p_row, q_row, tokens_ptr, saved_ptr, logprob_ptr, entropy_ptr, ref_logprob_ptr, kl_ptr, ref_kl_ptr, V, scale, ratio,
               shift, statistics, HAS_TOKENS: tl.constexpr, WITH_ENTROPY: tl.constexpr, WITH_KL: tl.constexpr, WITH_REVERSE: tl.constexpr,
               SOFTCAP: tl.constexpr, REF_SOFTCAP: tl.constexpr, HAS_RATIO: tl.constexpr):
    """Write the saved values and the fields of several rows, where `stored`; `statistics` as merged_rows returns them."""
    origin, log2_S, lse_q, lost_q, centre, log1p_t, mean_p_d, mean_q_d, entropy, kl, ref_kl = statistics
    scale2 = scale * LOG2E
    full_lse_q = lse_q
    full_lost_q = lost_q
    lost_centre = kl * 0.0
    if WITH_KL:
        full_lse_q, full_lost_q = add_product(lse_q, lost_q, shift, scale2)
        centre, lost_centre = add_product(centre, lost_centre, shift, scale)
    if p_row.dtype.element_ty != tl.float32 and q_row.dtype.element_ty != tl.float32 and not HAS_RATIO:
        # Fold the lost part into the means: row_backward subtracts no lost_centre from 16-bit logits, whose gradients round more than this.
        mean_p_d += lost_centre
        mean_q_d += lost_centre
    # A peak that rounds up to a whole number leaves a sum below 1. The second saved value is never negative: a negative
    # one marks a fallback row.
    below = log2_S < 0.0
    saved_ptr += rows * SAVED
    tl.store(saved_ptr, tl.where(below, origin - 1.0, origin), mask=stored)
    tl.store(saved_ptr + 1, tl.where(below, log2_S + 1.0, log2_S), mask=stored)
    tl.store(saved_ptr + 2, full_lse_q, mask=stored)
    tl.store(saved_ptr + 3, full_lost_q, mask=stored)
    tl.store(saved_ptr + 4, centre, mask=stored)
    tl.store(saved_ptr + 5, lost_centre, mask=stored)
    tl.store(saved_ptr + 6, log1p_t, mask=stored)
    tl.store(saved_ptr + 7, mean_p_d, mask=stored)
    tl.store(saved_ptr + 8, mean_q_d, mask=stored)
    tl.store(saved_ptr + 9, entropy, mask=stored)
    store_fields(rows, stored, tl.where(entropy <= 0.0, 0.0, entropy), kl, ref_kl, entropy_ptr, kl_ptr, ref_kl_ptr,
                 WITH_ENTROPY, WITH_KL, WITH_REVERSE)
    if HAS_TOKENS:
        x, y = token_logits(p_row, q_row, tokens_ptr, rows, stored, V, WITH_KL, SOFTCAP, REF_SOFTCAP)
        tl.store(logprob_ptr + rows, not_above_zero((tl.fma(x, scale2, -origin) - log2_S) * LN2), mask=stored)
        if WITH_KL:
            y, y_lost = scale_reference(y, ratio, HAS_RATIO)
            y, more = split_sum(y, -shift)
            log2_q = tl.fma(y_lost + more, scale2, tl.fma(y, scale2, -lse_q) - lost_q)
            tl.store(ref_logprob_ptr + rows, not_above_zero(log2_q * LN2), mask=stored)


@triton.jit
def store_fallback(row, stored, p_row, q_row, tokens_ptr, saved_ptr, logprob_ptr, entropy_ptr, ref_logprob_ptr, kl_ptr, ref_kl_ptr, V, scale, ratio,
                   BLOCK: tl.constexpr, HAS_TOKENS: tl.constexpr, WITH_ENTROPY: tl.constexpr, WITH_KL: tl.constexpr,
                   WITH_REVERSE: tl.constexpr, SOFTCAP: tl.constexpr, REF_SOFTCAP: tl.constexpr):
    """Write the saved values and the fields of one row that is read again."""
    scale = scale.to(tl.float64)
    q_scale = scale * ratio.to(tl.float64)
    statistics = fallback_row(p_row, q_row, V, scale, q_scale, BLOCK, WITH_KL, SOFTCAP, REF_SOFTCAP)
    store_row(saved_ptr + row * SAVED, statistics)
    kl, ref_kl = fallback_kl(statistics, scale, q_scale)
    store_fields(row, stored, statistics.entropy, kl, ref_kl, entropy_ptr, kl_ptr, ref_kl_ptr, WITH_ENTROPY, WITH_KL, WITH_REVERSE)
    if HAS_TOKENS:
        x, y = token_logits(p_row, q_row, tokens_ptr, row, stored, V, WITH_KL, SOFTCAP, REF_SOFTCAP)
        log_p = log_probability_p(x.to(tl.float64), statistics, scale)
        tl.store(logprob_ptr + row, not_above_zero(log_p.to(tl.float32)), mask=stored)
        if WITH_KL:
            log_q = log_probability_q(y.to(tl.float64), statistics, q_scale)
            tl.store(ref_logprob_ptr + row, not_above_zero(log_q.to(tl.float32)), mask=stored)


@triton.jit
def store_zeros(rows, stored, saved_ptr, logprob_ptr, entropy_ptr, ref_logprob_ptr, kl_ptr, ref_kl_ptr, HAS_TOKENS: tl.constexpr,
                WITH_ENTROPY: tl.constexpr, WITH_KL: tl.constexpr, WITH_REVERSE: tl.constexpr):
    """Write the zeros of masked rows."""
    zeros = tl.zeros([rows.shape[0]], tl.float32)
    for value in tl.static_range(SAVED):
        tl.store(saved_ptr + rows * SAVED + value, zeros, mask=stored)
    if HAS_TOKENS:
        tl.store(logprob_ptr + rows, zeros, mask=stored)
        if WITH_KL:
            tl.store(ref_logprob_ptr + rows, zeros, mask=stored)
    if WITH_ENTROPY:
        tl.store(entropy_ptr + rows, zeros, mask=stored)
    if WITH_KL:
        tl.store(kl_ptr + rows, zeros, mask=stored)
    if WITH_REVERSE:
        tl.store(ref_kl_ptr + rows, zeros, mask=stored)


# Row counts, strides, lengths and where a tensor starts vary from step to step: none of them may cause a recompile.
@triton.jit(do_not_specialize=[
    "temperature", "n_rows", "n_inner", "stride_p_outer", "stride_p_inner", "stride_q_outer", "stride_q_inner",
    "V"], do_not_specialize_on_alignment=[
    "state_ptr", "p_ptr", "q_ptr", "tokens_ptr", "mask_ptr", "temperature_ptr", "saved_ptr", "logprob_ptr", "entropy_ptr", "ref_logprob_ptr",
    "kl_ptr", "ref_kl_ptr", "ratio_ptr"])
def row_finish(
    state_ptr,  # [N, splits, 7] float32, written by row_forward
    p_ptr, q_ptr,  # the logits, as in row_forward
    tokens_ptr,  # [N] int64; any pointer without HAS_TOKENS
    mask_ptr, temperature_ptr, ratio_ptr,  # as in row_forward
    # [N, 10] float32: origin, log2_S, lse_q and what it lost (base 2), centre and what it lost, log1p(t), E_p[d], E_q[d], entropy; for a
    # fallback row store_row's ten values, marked by the sign of the second
    saved_ptr,
    # [N] float32; any pointer for logprob without HAS_TOKENS, ref_logprob without it or WITH_KL, kl without WITH_KL, the others without their WITH_
    logprob_ptr, entropy_ptr, ref_logprob_ptr, kl_ptr, ref_kl_ptr,
    temperature: tl.float32, n_rows: tl.int32, n_inner: tl.int32,
    stride_p_outer: tl.int64, stride_p_inner: tl.int64, stride_q_outer: tl.int64, stride_q_inner: tl.int64,
    V: tl.int32,
    SEGMENT: tl.constexpr,  # of row_forward
    ROWS: tl.constexpr, BLOCK: tl.constexpr,  # elements of a row that is read again at a time
    SPLITS: tl.constexpr, HAS_TOKENS: tl.constexpr, HAS_MASK: tl.constexpr, TEMPERATURE_PER_ROW: tl.constexpr,
    WITH_ENTROPY: tl.constexpr, WITH_KL: tl.constexpr, WITH_REVERSE: tl.constexpr,
    SOFTCAP: tl.constexpr, REF_SOFTCAP: tl.constexpr, HAS_RATIO: tl.constexpr,
    READ_AGAIN: tl.constexpr,  # False leaves a fallback row unfinished: NaN as its first saved value (tests only)
):
    """Per-row results from the partial states.

    Math:   row_math.py's formulas, row_fallback.py's for a row whose sums do not hold; reference.row_statistics is the definition.
    Grid:   (⌈N / ROWS⌉,): ROWS rows at once in the threads of a program.
    Reads:  7·splits per row and up to four logits of each tensor; 3·V of each for a row that is read again; nothing of a masked row.
    Writes: 10 saved values and the fields asked for, per row; zeros for a masked row.
    Saves:  what row_backward needs: 40 bytes per row.
    Special values: a row whose sums do not hold (infinities, a NaN, KL of 8 nats or more, tensors 64 nats apart) is read again. A token outside
            0 … V-1 reads nothing and gives NaN. Log-probabilities are never above 0.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = first + tl.arange(0, ROWS)
    there = rows < n_rows
    if HAS_MASK:
        counts = tl.load(mask_ptr + rows, mask=there, other=0) != 0
        store_zeros(rows, there & (counts == 0), saved_ptr, logprob_ptr, entropy_ptr, ref_logprob_ptr, kl_ptr, ref_kl_ptr, HAS_TOKENS,
                    WITH_ENTROPY, WITH_KL, WITH_REVERSE)
        there = there & counts
    scale = row_scale(temperature_ptr, temperature, rows, there, TEMPERATURE_PER_ROW)
    p_rows = p_ptr + row_offset(rows, n_inner, stride_p_outer, stride_p_inner)
    q_rows = q_ptr + row_offset(rows, n_inner, stride_q_outer, stride_q_inner)
    ratios = row_ratio(ratio_ptr, rows, there, HAS_RATIO)
    shift = tl.zeros([ROWS], tl.float32)
    EXACT: tl.constexpr = p_ptr.dtype.element_ty == tl.float32 or q_ptr.dtype.element_ty == tl.float32 or HAS_RATIO
    if WITH_KL and EXACT:
        shift = row_shift(p_rows, q_rows, V, there, ratios, SOFTCAP, REF_SOFTCAP, HAS_RATIO)
    splits = tl.maximum(tl.cdiv(V, SEGMENT), 1)
    statistics, holds = merged_rows(state_ptr, rows, there, splits, shift, scale, SPLITS, WITH_ENTROPY, WITH_KL, WITH_REVERSE, EXACT)
    store_rows(rows, there & holds, p_rows, q_rows, tokens_ptr, saved_ptr, logprob_ptr, entropy_ptr, ref_logprob_ptr, kl_ptr, ref_kl_ptr, V, scale,
               ratios, shift, statistics, HAS_TOKENS, WITH_ENTROPY, WITH_KL, WITH_REVERSE, SOFTCAP, REF_SOFTCAP, HAS_RATIO)
    again = there & (holds == 0)
    if not READ_AGAIN:
        tl.store(saved_ptr + rows * SAVED, tl.full([ROWS], float("nan"), tl.float32), mask=again)
    elif tl.max(again.to(tl.int32), 0) > 0:
        for index in range(ROWS):
            if tl.max(tl.where(tl.arange(0, ROWS) == index, again.to(tl.int32), 0), 0) > 0:
                row = first + index
                row_there = row < n_rows
                row_scale_here = row_scale(temperature_ptr, temperature, row, row_there, TEMPERATURE_PER_ROW)
                p_row = p_ptr + row_offset(row, n_inner, stride_p_outer, stride_p_inner)
                q_row = q_ptr + row_offset(row, n_inner, stride_q_outer, stride_q_inner)
                ratio = row_ratio(ratio_ptr, row, row_there, HAS_RATIO)
                store_fallback(row, row_there, p_row, q_row, tokens_ptr, saved_ptr, logprob_ptr, entropy_ptr, ref_logprob_ptr, kl_ptr, ref_kl_ptr, V,
                               row_scale_here, ratio, BLOCK, HAS_TOKENS, WITH_ENTROPY, WITH_KL, WITH_REVERSE, SOFTCAP, REF_SOFTCAP)
