"""The kernel that computes fallback rows in float64, see fallback.py."""

import triton
import triton.language as tl

from .divergence_math import Formula
from .fallback import GradientRow, fallback_statistics, store_fallback, write_fallback
from .fallback_parts import load_parts, merge_parts, store_part
from .row_finish import SAVED, Outputs, Row, row_outputs
from .row_gradient import Asked, Upstream
from .row_load import Reading, row_offset, row_ratio, row_scale
from .row_math import Kind, Want


# Row counts, strides, lengths and base addresses vary from step to step and must not cause a
# recompile.
@triton.jit(
    do_not_specialize=[
        "temperature",
        "n_rows",
        "n_inner",
        "stride_p_outer",
        "stride_p_inner",
        "stride_q_outer",
        "stride_q_inner",
        "stride_grad",
        "V",
        "share",
        "rest",
        "ranks",
    ],
    do_not_specialize_on_alignment=[
        "p_ptr",
        "q_ptr",
        "tokens_ptr",
        "temperature_ptr",
        "ratio_ptr",
        "saved_ptr",
        "logprob_ptr",
        "entropy_ptr",
        "ref_logprob_ptr",
        "kl_ptr",
        "ref_kl_ptr",
        "lse_ptr",
        "ref_lse_ptr",
        "grad_ptr",
        "weight_ptr",
        "part_ptr",
    ],
)
def row_fallback(  # noqa: PLR0913
    p_ptr,
    q_ptr,
    temperature_ptr,
    ratio_ptr,
    tokens_ptr,  # as in row_forward
    saved_ptr,
    logprob_ptr,
    entropy_ptr,
    ref_logprob_ptr,
    kl_ptr,
    ref_kl_ptr,
    lse_ptr,
    ref_lse_ptr,  # written by row_forward
    grad_ptr,
    weight_ptr,  # as in row_fused; any pointer without WITH_GRADIENT
    part_ptr,  # [N, 9] float64 with PART, [ranks, N, 9] with RANKS; otherwise any pointer
    temperature: tl.float32,
    n_inner: tl.int32,
    stride_p_outer: tl.int64,
    stride_p_inner: tl.int64,
    stride_q_outer: tl.int64,
    stride_q_inner: tl.int64,
    stride_grad: tl.int64,
    V: tl.int32,
    n_rows: tl.int32,
    share: tl.float32,  # as in row_divergence; Rényi's order alpha
    rest: tl.float32,
    ranks: tl.int32,
    ROWS: tl.constexpr,  # rows per program
    BLOCK: tl.constexpr,  # entries of a row read at a time
    HAS_TOKENS: tl.constexpr,
    TEMPERATURE_PER_ROW: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    WITH_KL: tl.constexpr,
    WITH_REF_KL: tl.constexpr,
    WITH_LSE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    REF_SOFTCAP: tl.constexpr,
    HAS_RATIO: tl.constexpr,
    KIND: tl.constexpr,  # the divergence in place of the KL
    PART: tl.constexpr,  # the rows are parts of longer ones: write only their Fallback
    RANKS: tl.constexpr,  # 0, or a power of two, at least ranks: read no logits, merge the parts
):
    """Compute the rows that row_forward or row_fused marked with a NaN as first saved value.

    Math:   Fallback, fallback_divergence and write_fallback, in float64; defined by
            reference.row_statistics and row_gradients, and f_divergences.divergence. With RANKS,
            merge_parts.
    Grid:   (⌈N / ROWS⌉,).
    Reads:  one saved value per row; 3·V of each tensor for a recomputed row, V more for a
            divergence other than the KL and WITH_GRADIENT. With RANKS, in place of V entries, the
            sampled logit and 9 · ranks float64.
    Writes: 10 saved values and the fields asked for, of those rows; WITH_GRADIENT, V of the
            gradient of weight·KL to P. With PART, only 9 float64 of those rows.
    Saves:  save_stats' ten values, marked by the sign of the second; for a divergence other than
            the KL the means of its gradients replace four.
    Special values: a token outside 0 … V-1 reads nothing and gives NaN. Log-probabilities are never
            above 0.
    """
    kind: tl.constexpr = Kind(KIND, False, False)
    want: tl.constexpr = Want(WITH_ENTROPY, WITH_KL, WITH_REF_KL, kind, False, WITH_LSE)
    formula = Formula(share, rest, rest, rest)
    reading: tl.constexpr = Reading(HAS_TOKENS, SOFTCAP, REF_SOFTCAP, HAS_RATIO)
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = first + tl.arange(0, ROWS)
    origins = tl.load(saved_ptr + rows * SAVED, mask=rows < n_rows, other=0.0)
    marked = (origins != origins).to(tl.int32)
    if tl.max(marked, 0) > 0:
        for index in range(ROWS):
            if tl.max(tl.where(tl.arange(0, ROWS) == index, marked, 0), 0) > 0:
                row = first + index
                scale = row_scale(
                    temperature_ptr, temperature, row, row < n_rows, TEMPERATURE_PER_ROW
                )
                ratio = row_ratio(ratio_ptr, row, row < n_rows, HAS_RATIO)
                p_row = p_ptr + row_offset(row, n_inner, stride_p_outer, stride_p_inner)
                q_row = q_ptr + row_offset(row, n_inner, stride_q_outer, stride_q_inner)
                token = row
                if HAS_TOKENS:
                    token = tl.load(tokens_ptr + row)
                outputs = Outputs(
                    saved_ptr,
                    logprob_ptr,
                    entropy_ptr,
                    ref_logprob_ptr,
                    kl_ptr,
                    ref_kl_ptr,
                    lse_ptr,
                    ref_lse_ptr,
                )
                out = row_outputs(outputs, row)
                whole = Row(p_row, q_row, V, token, scale, ratio)
                wide_scale = scale.to(tl.float64)
                q_scale = wide_scale * ratio.to(tl.float64)
                if RANKS > 0:
                    rank = tl.arange(0, RANKS)
                    parts = load_parts(
                        part_ptr + (rank * n_rows.to(tl.int64) + row) * 9, rank < ranks
                    )
                    stats = merge_parts(parts, wide_scale, q_scale, WITH_KL)
                else:
                    stats = fallback_statistics(
                        whole, wide_scale, q_scale, BLOCK, WITH_KL, reading, PART
                    )
                if PART:
                    store_part(part_ptr + row * 9, stats)
                else:
                    store_fallback(out, whole, stats, formula, BLOCK, want, reading)
                if WITH_GRADIENT:
                    # Make the saved values, stored by one thread, visible to all threads before
                    # write_fallback loads them.
                    tl.debug_barrier()
                    asked: tl.constexpr = Asked(
                        False, False, False, True, False, False, False, kind, True, False, False
                    )
                    zero = tl.full([], 0.0, tl.float32)
                    g = Upstream(zero, zero, zero, tl.load(weight_ptr + row), zero, zero, zero)
                    grad_row = grad_ptr + row * stride_grad
                    grads = GradientRow(grad_row, grad_row, 0, V)
                    write_fallback(whole, grads, out.saved, g, formula, BLOCK, asked, reading)
