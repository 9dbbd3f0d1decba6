"""Finish: the row's statistics from its partial states. Rows that one pass could not hold are left to row_exact."""

import triton
import triton.language as tl

from .row_load import row_offset, row_scale
from .row_math import LN2, LOG2E, LOWEST, STATE, forward_kl, log1p, merge_states, reverse_kl, soft_cap, split_sum

# Above this KL, in nats, one pass may lose digits of the other direction; real policies stay far below.
LARGE_KL = tl.constexpr(32.0)
FINITE = tl.constexpr(3.0e38)
# float32 values per row that backward needs.
SAVED = tl.constexpr(9)


@triton.jit
def load_state(state_ptr, first, splits, SPLITS: tl.constexpr, FIELD: tl.constexpr, OTHER: tl.constexpr):
    """One field of a row's partial states, [SPLITS] (a power of two; those beyond `splits` are empty states)."""
    index = tl.arange(0, SPLITS)
    return tl.load(state_ptr + (first + index) * STATE + FIELD, mask=index < splits, other=OTHER)


@triton.jit
def q_partition(origin, log2_S, centre, log_ratio):
    """log2 Σ 2^(y·s·log2(e)) from P's and the centre, as a rounded sum and what was lost."""
    centre2 = centre * LOG2E
    lse, lost = split_sum(origin, centre2)
    lse, more = split_sum(lse, log2_S)
    return split_sum(lse, lost + more + tl.fma(centre, LOG2E, -centre2) + log_ratio * LOG2E)


@triton.jit
def merged_row(state_ptr, row, splits, SPLITS: tl.constexpr, WITH_ENTROPY: tl.constexpr, WITH_KL: tl.constexpr, WITH_REVERSE: tl.constexpr):
    """The row's statistics from its partial states, as exact_row returns them, and whether they hold."""
    first = row * splits
    origin = load_state(state_ptr, first, splits, SPLITS, 0, LOWEST)
    S = load_state(state_ptr, first, splits, SPLITS, 1, 0.0)
    A = S * 0.0
    W = A
    U = A
    R = A
    centre = A
    if WITH_ENTROPY:
        A = load_state(state_ptr, first, splits, SPLITS, 2, 0.0)
    if WITH_KL:
        W = load_state(state_ptr, first, splits, SPLITS, 3, 0.0)
        U = load_state(state_ptr, first, splits, SPLITS, 4, 0.0)
        if WITH_REVERSE:
            R = load_state(state_ptr, first, splits, SPLITS, 5, 0.0)
        centre = load_state(state_ptr, first, splits, SPLITS, 6, 0.0)
    origin, S, A, W, U, R, centre = merge_states(origin, S, A, W, U, R, centre, WITH_ENTROPY, WITH_KL, WITH_REVERSE)
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
    lse_q = log2_S
    lost_q = kl * 0.0
    if WITH_KL:
        lse_q, lost_q = q_partition(origin, log2_S, centre, log_ratio)
    return (origin, log2_S, lse_q, lost_q, centre, log_ratio, mean_d, mean_q_d, entropy, kl, ref_kl), holds


@triton.jit
def store_row(row, p_row, q_row, tokens_ptr, saved_ptr, logprob_ptr, entropy_ptr, ref_logprob_ptr, kl_ptr, ref_kl_ptr, V, scale, statistics,
              HAS_TOKENS: tl.constexpr, WITH_ENTROPY: tl.constexpr, WITH_KL: tl.constexpr, WITH_REVERSE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Write a row's saved values and its fields; `statistics` as merged_row and exact_row return them."""
    origin, log2_S, lse_q, lost_q, centre, log_ratio, mean_p_d, mean_q_d, entropy, kl, ref_kl = statistics
    saved_ptr += row * SAVED
    tl.store(saved_ptr, origin)
    tl.store(saved_ptr + 1, log2_S)
    tl.store(saved_ptr + 2, lse_q)
    tl.store(saved_ptr + 3, lost_q)
    tl.store(saved_ptr + 4, centre)
    tl.store(saved_ptr + 5, log_ratio)
    tl.store(saved_ptr + 6, mean_p_d)
    tl.store(saved_ptr + 7, mean_q_d)
    tl.store(saved_ptr + 8, entropy)
    if WITH_ENTROPY:
        tl.store(entropy_ptr + row, entropy)
    if WITH_KL:
        tl.store(kl_ptr + row, kl)
    if WITH_REVERSE:
        tl.store(ref_kl_ptr + row, ref_kl)
    if HAS_TOKENS:
        token = tl.load(tokens_ptr + row)
        inside = (token >= 0) & (token < V)
        x = soft_cap(tl.load(p_row + token, mask=inside, other=float("nan")).to(tl.float32), SOFTCAP, p_row.dtype.element_ty)
        tl.store(logprob_ptr + row, (tl.fma(x, scale * LOG2E, -origin) - log2_S) * LN2)
        if WITH_KL:
            y = soft_cap(tl.load(q_row + token, mask=inside, other=float("nan")).to(tl.float32), SOFTCAP, q_row.dtype.element_ty)
            tl.store(ref_logprob_ptr + row, (tl.fma(y, scale * LOG2E, -lse_q) - lost_q) * LN2)


@triton.jit
def store_zeros(row, saved_ptr, logprob_ptr, entropy_ptr, ref_logprob_ptr, kl_ptr, ref_kl_ptr, HAS_TOKENS: tl.constexpr,
                WITH_ENTROPY: tl.constexpr, WITH_KL: tl.constexpr, WITH_REVERSE: tl.constexpr):
    """Write the zeros of a masked row."""
    index = tl.arange(0, 16)
    tl.store(saved_ptr + row * SAVED + index, tl.zeros([16], tl.float32), mask=index < SAVED)
    if HAS_TOKENS:
        tl.store(logprob_ptr + row, 0.0)
        if WITH_KL:
            tl.store(ref_logprob_ptr + row, 0.0)
    if WITH_ENTROPY:
        tl.store(entropy_ptr + row, 0.0)
    if WITH_KL:
        tl.store(kl_ptr + row, 0.0)
    if WITH_REVERSE:
        tl.store(ref_kl_ptr + row, 0.0)


# Row counts, strides, lengths and where a tensor starts vary from step to step: none of them may cause a recompile.
@triton.jit(do_not_specialize=[
    "temperature", "n_inner", "stride_p_outer", "stride_p_inner", "stride_q_outer", "stride_q_inner",
    "V", "splits"], do_not_specialize_on_alignment=[
    "state_ptr", "p_ptr", "q_ptr", "tokens_ptr", "mask_ptr", "temperature_ptr", "saved_ptr", "logprob_ptr", "entropy_ptr", "ref_logprob_ptr",
    "kl_ptr", "ref_kl_ptr"])
def row_finish(
    state_ptr,  # [N, splits, 8] float32, written by row_forward
    p_ptr, q_ptr,  # the logits, as in row_forward
    tokens_ptr,  # [N] int64; any pointer without HAS_TOKENS
    mask_ptr, temperature_ptr,  # as in row_forward
    saved_ptr,  # [N, 9] float32: origin, log2_S, lse_q and what it lost (base 2), centre, log_ratio, E_p[d], E_q[d], entropy
    logprob_ptr, entropy_ptr, ref_logprob_ptr, kl_ptr, ref_kl_ptr,  # [N] float32; any pointer where not asked for
    temperature, n_inner, stride_p_outer, stride_p_inner, stride_q_outer, stride_q_inner, V, splits,
    SPLITS: tl.constexpr, HAS_TOKENS: tl.constexpr, HAS_MASK: tl.constexpr, TEMPERATURE_PER_ROW: tl.constexpr,
    WITH_ENTROPY: tl.constexpr, WITH_KL: tl.constexpr, WITH_REVERSE: tl.constexpr, SOFTCAP: tl.constexpr,
):
    """Per-row results from the partial states.

    Math:   row_math.py's formulas; reference.row_statistics is the definition.
    Grid:   (N,).
    Reads:  7·splits per row and one logit of each tensor.
    Writes: 9 saved values and the fields asked for, per row; zeros for a masked row.
    Saves:  what row_backward needs: 36 bytes per row.
    Special values: a row whose sums do not hold (infinities, a NaN, KL of 32 nats or more) gets a NaN as saved origin, and no fields: row_exact
            comes next. A token outside 0 … V-1 reads nothing and gives NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    if HAS_MASK:
        if tl.load(mask_ptr + row) == 0:
            store_zeros(row, saved_ptr, logprob_ptr, entropy_ptr, ref_logprob_ptr, kl_ptr, ref_kl_ptr, HAS_TOKENS, WITH_ENTROPY, WITH_KL,
                        WITH_REVERSE)
            return
    scale = row_scale(temperature_ptr, temperature, row, TEMPERATURE_PER_ROW)
    p_row = p_ptr + row_offset(row, n_inner, stride_p_outer, stride_p_inner)
    q_row = q_ptr + row_offset(row, n_inner, stride_q_outer, stride_q_inner)
    statistics, holds = merged_row(state_ptr, row, splits, SPLITS, WITH_ENTROPY, WITH_KL, WITH_REVERSE)
    if holds:
        store_row(row, p_row, q_row, tokens_ptr, saved_ptr, logprob_ptr, entropy_ptr, ref_logprob_ptr, kl_ptr, ref_kl_ptr, V, scale, statistics,
                  HAS_TOKENS, WITH_ENTROPY, WITH_KL, WITH_REVERSE, SOFTCAP)
    else:
        tl.store(saved_ptr + row * SAVED, float("nan"))
