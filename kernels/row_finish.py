"""Finish: the row's statistics from its partial states; rows that one pass cannot hold are read again, exactly."""

import triton
import triton.language as tl

from .row_load import row_offset
from .row_math import CENTRE_GRID, LN2, LOG2E, SMALL_D, expm1_over_square, forward_kl, log1p, merge_states, minus_log1p, reverse_kl

# Above this KL, in nats, one pass may lose digits of the other direction; real policies stay far below.
LARGE_KL = tl.constexpr(32.0)
FINITE = tl.constexpr(3.0e38)


@triton.jit
def log_sum_exp2(row_ptr, V, scale2, BLOCK: tl.constexpr):
    """(origin, log2 Σ 2^(x·scale2 - origin)) with origin the floor of the largest x·scale2; NaN for a row of -inf, with +inf or with NaN."""
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, V, BLOCK):
        offs_v = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + offs_v, mask=offs_v < V, other=float("-inf")).to(tl.float32)
        peak = tl.maximum(peak, x)
    origin = tl.floor(tl.max(peak, 0) * scale2)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        offs_v = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + offs_v, mask=offs_v < V, other=float("-inf")).to(tl.float32)
        total += tl.exp2(tl.fma(x, scale2, -origin))
    return origin, tl.log2(tl.sum(total, 0))


@triton.jit
def exact_row(p_row, q_row, V, scale, BLOCK: tl.constexpr, WITH_KL: tl.constexpr, SPLIT_CENTRE: tl.constexpr):
    """The statistics of any row, infinities included, from probabilities normalised beforehand.

    An entry with p = 0 adds nothing to E_p, whatever log(q/p) is; one with p > 0 = q makes KL(P‖Q) infinite. A NaN makes everything NaN.
    Returns origin, log2_S, centre_hi, centre_lo, log_ratio, mean_p_d, mean_q_d, entropy as row_finish saves them, kl and ref_kl.
    """
    scale2 = scale * LOG2E
    origin, log2_S = log_sum_exp2(p_row, V, scale2, BLOCK)
    centre_hi = origin * 0.0
    centre_lo = centre_hi
    q_origin = origin
    q_log2_S = log2_S
    if WITH_KL:
        q_origin, q_log2_S = log_sum_exp2(q_row, V, scale2, BLOCK)
        centre = ((q_origin - origin) + (q_log2_S - log2_S)) * LN2
        if SPLIT_CENTRE:
            centre_hi = tl.floor(centre / scale / CENTRE_GRID + 0.5) * CENTRE_GRID
        centre_lo = tl.fma(-centre_hi, scale, centre)
    sum_plogp = tl.zeros([BLOCK], tl.float32)
    sum_h = tl.zeros([BLOCK], tl.float32)
    sum_rise = tl.zeros([BLOCK], tl.float32)
    sum_reverse = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        offs_v = start + tl.arange(0, BLOCK)
        x = tl.load(p_row + offs_v, mask=offs_v < V, other=float("-inf")).to(tl.float32)
        log2_p = tl.fma(x, scale2, -origin) - log2_S
        p = tl.exp2(log2_p)
        sum_plogp += tl.where(p == 0.0, 0.0, p * log2_p)
        if WITH_KL:
            y = tl.load(q_row + offs_v, mask=offs_v < V, other=float("-inf")).to(tl.float32)
            q = tl.exp2(tl.fma(y, scale2, -q_origin) - q_log2_S)
            d = tl.fma((y - centre_hi) - x, scale, -centre_lo)
            small = tl.abs(d) < SMALL_D
            pd = tl.where(p == 0.0, 0.0, p * d)
            near = pd * (d * expm1_over_square(d))
            h = tl.where(small, near, (q - p) - pd)
            qd = tl.where(q == 0.0, 0.0, q * d)
            sum_h += h
            sum_rise += tl.where(small, pd + near, q - p)
            sum_reverse += tl.where(small, tl.fma(d, pd + near, -near), qd - (q - p))
    kl = centre_hi
    ref_kl = centre_hi
    log_ratio = centre_hi
    mean_p_d = centre_hi
    mean_q_d = centre_hi
    if WITH_KL:
        t = tl.sum(sum_rise, 0)
        log_ratio = log1p(t)
        kl = tl.sum(sum_h, 0) - minus_log1p(t)
        ref_kl = tl.sum(sum_reverse, 0) / (1.0 + t) - minus_log1p(-t / (1.0 + t))
        kl = tl.where(kl < 0.0, 0.0, kl)
        ref_kl = tl.where(ref_kl < 0.0, 0.0, ref_kl)
        centre_lo, log_ratio, mean_p_d, mean_q_d = centre_on_p(p_row, q_row, V, scale, origin, log2_S, q_origin, q_log2_S, centre_hi, centre_lo,
                                                               log_ratio, kl, BLOCK)
    return origin, log2_S, centre_hi, centre_lo, log_ratio, mean_p_d, mean_q_d, tl.sum(sum_plogp, 0) * (-LN2), kl, ref_kl


@triton.jit
def centre_on_p(p_row, q_row, V, scale, origin, log2_S, q_origin, q_log2_S, centre_hi, centre_lo, log_ratio, kl, BLOCK: tl.constexpr):
    """centre_lo, log_ratio and the means of d under P and Q for a centre at E_p[d], where the gradient's brackets are differences of d."""
    moved_lo = tl.where(kl < FINITE, centre_lo + (log_ratio - kl), centre_lo)
    log_ratio = log_ratio - (moved_lo - centre_lo)
    sum_pd = tl.zeros([BLOCK], tl.float32)
    sum_qd = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        offs_v = start + tl.arange(0, BLOCK)
        x = tl.load(p_row + offs_v, mask=offs_v < V, other=float("-inf")).to(tl.float32)
        y = tl.load(q_row + offs_v, mask=offs_v < V, other=float("-inf")).to(tl.float32)
        p = tl.exp2(tl.fma(x, scale * LOG2E, -origin) - log2_S)
        q = tl.exp2(tl.fma(y, scale * LOG2E, -q_origin) - q_log2_S)
        d = tl.fma((y - centre_hi) - x, scale, -moved_lo)
        sum_pd += tl.where(p == 0.0, 0.0, p * d)
        sum_qd += tl.where(q == 0.0, 0.0, q * d)
    return moved_lo, log_ratio, tl.sum(sum_pd, 0), tl.sum(sum_qd, 0)


@triton.jit
def load_state(state_ptr, first, splits, SPLITS: tl.constexpr, FIELD: tl.constexpr, OTHER: tl.constexpr):
    """One field of a row's partial states, [SPLITS] (a power of two; those beyond `splits` are empty states)."""
    index = tl.arange(0, SPLITS)
    return tl.load(state_ptr + (first + index) * 8 + FIELD, mask=index < splits, other=OTHER)


@triton.jit
def merged_row(state_ptr, row, scale, splits, SPLITS: tl.constexpr, WITH_ENTROPY: tl.constexpr, WITH_KL: tl.constexpr, WITH_REVERSE: tl.constexpr):
    """The row's statistics from its partial states, as exact_row returns them, and last whether they hold."""
    first = row * splits
    origin = load_state(state_ptr, first, splits, SPLITS, 0, -1.0e30)
    S = load_state(state_ptr, first, splits, SPLITS, 1, 0.0)
    A = S * 0.0
    W = A
    U = A
    R = A
    centre_hi = A
    centre_lo = A
    if WITH_ENTROPY:
        A = load_state(state_ptr, first, splits, SPLITS, 2, 0.0)
    if WITH_KL:
        W = load_state(state_ptr, first, splits, SPLITS, 3, 0.0)
        U = load_state(state_ptr, first, splits, SPLITS, 4, 0.0)
        if WITH_REVERSE:
            R = load_state(state_ptr, first, splits, SPLITS, 5, 0.0)
        centre_hi = load_state(state_ptr, first, splits, SPLITS, 6, 0.0)
        centre_lo = load_state(state_ptr, first, splits, SPLITS, 7, 0.0)
    origin, S, A, W, U, R, centre_hi, centre_lo = merge_states(origin, S, A, W, U, R, centre_hi, centre_lo, scale,
                                                               WITH_ENTROPY, WITH_KL, WITH_REVERSE)
    holds = (S > 0.0) & (S + tl.abs(A) + tl.abs(W) + tl.abs(U) + tl.abs(R) < FINITE)
    log2_S = tl.log2(S)
    entropy = (log2_S - A / S) * LN2
    kl = entropy * 0.0
    ref_kl = kl
    log_ratio = kl
    mean_d = kl
    mean_q_d = kl
    if WITH_KL:
        mean_h = tl.maximum(U / S, 0.0)
        mean_d = W / S
        log_ratio = log1p(mean_h + mean_d)
        kl = forward_kl(mean_h, mean_d)
        holds = holds & (kl < LARGE_KL)
        if WITH_REVERSE:
            ref_kl = reverse_kl(R / S, mean_h, mean_d)
            mean_q_d = (R + W) / (S + U + W)
            holds = holds & (ref_kl < LARGE_KL)
    entropy = tl.where(entropy < 0.0, 0.0, entropy)
    return origin, log2_S, centre_hi, centre_lo, log_ratio, mean_d, mean_q_d, entropy, kl, ref_kl, holds


# Row counts, strides and lengths vary from step to step: none of them may cause a recompile.
@triton.jit(do_not_specialize=[
    "temperature", "n_inner", "stride_p_outer", "stride_p_inner", "stride_q_outer", "stride_q_inner",
    "V", "splits"])
def row_finish(
    state_ptr,  # [N, splits, 8] float32, written by row_forward
    p_ptr, q_ptr,  # the logits, as in row_forward
    tokens_ptr,  # [N] int64; any pointer without HAS_TOKENS
    mask_ptr, temperature_ptr,  # as in row_forward
    saved_ptr,  # [N, 8] float32: origin, log2_S, centre_hi, centre_lo, log_ratio, E_p[d], E_q[d], entropy
    logprob_ptr, entropy_ptr, ref_logprob_ptr, kl_ptr, ref_kl_ptr,  # [N] float32; any pointer where not asked for
    temperature, n_inner, stride_p_outer, stride_p_inner, stride_q_outer, stride_q_inner, V, splits,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, HAS_TOKENS: tl.constexpr, HAS_MASK: tl.constexpr, TEMPERATURE_PER_ROW: tl.constexpr,
    WITH_ENTROPY: tl.constexpr, WITH_KL: tl.constexpr, WITH_REVERSE: tl.constexpr,
):
    """Per-row results from the partial states.

    Math:   row_math.py's formulas; reference.row_statistics is the definition.
    Grid:   (N,).
    Reads:  8·splits per row and one logit of each tensor; 4·V of each tensor for a row whose sums do not hold (infinities, KL above 8 nats).
    Writes: 8 saved values and the fields asked for, per row; zeros for a masked row.
    Saves:  what row_backward needs: 32 bytes per row.
    Special values: as exact_row. A token outside 0 … V-1 reads nothing and gives NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    saved_ptr += row * 8
    if HAS_MASK:
        if tl.load(mask_ptr + row) == 0:
            tl.store(saved_ptr + tl.arange(0, 8), tl.zeros([8], tl.float32))
            if HAS_TOKENS:
                tl.store(logprob_ptr + row, 0.0)
            if WITH_ENTROPY:
                tl.store(entropy_ptr + row, 0.0)
            if WITH_KL:
                tl.store(kl_ptr + row, 0.0)
                if HAS_TOKENS:
                    tl.store(ref_logprob_ptr + row, 0.0)
            if WITH_REVERSE:
                tl.store(ref_kl_ptr + row, 0.0)
            return
    if TEMPERATURE_PER_ROW:
        scale = 1.0 / tl.load(temperature_ptr + row).to(tl.float32)
    else:
        scale = 1.0 / tl.cast(temperature, tl.float32)
    # Division by a temperature that is not positive has no meaning: NaN, not a number that looks right.
    scale = tl.where(scale > 0.0, scale, float("nan"))
    p_row = p_ptr + row_offset(row, n_inner, stride_p_outer, stride_p_inner)
    q_row = q_ptr + row_offset(row, n_inner, stride_q_outer, stride_q_inner)
    SPLIT_CENTRE: tl.constexpr = p_ptr.dtype.element_ty == tl.float32 or q_ptr.dtype.element_ty == tl.float32
    origin, log2_S, centre_hi, centre_lo, log_ratio, mean_p_d, mean_q_d, entropy, kl, ref_kl, holds = merged_row(
        state_ptr, row, scale, splits, SPLITS, WITH_ENTROPY, WITH_KL, WITH_REVERSE)
    if not holds:
        origin, log2_S, centre_hi, centre_lo, log_ratio, mean_p_d, mean_q_d, entropy, kl, ref_kl = exact_row(
            p_row, q_row, V, scale, BLOCK, WITH_KL, SPLIT_CENTRE)

    tl.store(saved_ptr, origin)
    tl.store(saved_ptr + 1, log2_S)
    tl.store(saved_ptr + 2, centre_hi)
    tl.store(saved_ptr + 3, centre_lo)
    tl.store(saved_ptr + 4, log_ratio)
    tl.store(saved_ptr + 5, mean_p_d)
    tl.store(saved_ptr + 6, mean_q_d)
    tl.store(saved_ptr + 7, entropy)
    if WITH_ENTROPY:
        tl.store(entropy_ptr + row, entropy)
    if WITH_KL:
        tl.store(kl_ptr + row, kl)
    if WITH_REVERSE:
        tl.store(ref_kl_ptr + row, ref_kl)
    if HAS_TOKENS:
        token = tl.load(tokens_ptr + row)
        inside = (token >= 0) & (token < V)
        x = tl.load(p_row + token, mask=inside, other=float("nan")).to(tl.float32)
        tl.store(logprob_ptr + row, (tl.fma(x, scale * LOG2E, -origin) - log2_S) * LN2)
        if WITH_KL:
            y = tl.load(q_row + token, mask=inside, other=float("nan")).to(tl.float32)
            # The whole part of the centre leaves the logit first, as in every difference of logits.
            coarse = tl.floor(centre_lo / scale / CENTRE_GRID + 0.5) * CENTRE_GRID
            log2_q = tl.fma((y - centre_hi) - coarse, scale * LOG2E, -origin) - log2_S
            tl.store(ref_logprob_ptr + row, log2_q * LN2 - (tl.fma(-coarse, scale, centre_lo) + log_ratio))
