"""The kernel that computes fallback rows in float64, see fallback.py."""

import triton
import triton.language as tl

from .divergence_math import Formula
from .fallback import (
    GradientRow,
    divergence_sums,
    fallback_statistics,
    store_fallback,
    write_fallback,
)
from .fallback_parts import fallback_of_log_sums, load_parts, merge_parts, merge_sums
from .row_finish import SAVED, Outputs, row_outputs, store_tuple
from .row_gradient import Asked, Upstream
from .row_load import Reading, RowArguments, row_at, wide_row
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
        "splits",
        "segment",
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
        "log_sums_ptr",
    ],
)
def row_fallback(  # noqa: PLR0913, PLR0915
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
    part_ptr,  # float64 values of parts, see PART and MERGE; otherwise any pointer
    log_sums_ptr,  # [ranks, N, splits, 4] float64, of segment_log_sums; any pointer without SPLITS
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
    splits: tl.int32,  # segments per row and rank, at least 1
    segment: tl.int32,  # their length
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
    PART: tl.constexpr,  # the rows are parts of longer ones: write only part
    MERGE: tl.constexpr,  # read part of all ranks in place of logits
    SPLITS: tl.constexpr,  # 0, or for a split vocabulary a power of two, at least ranks · splits
):
    """Compute the rows that row_forward or row_fused marked with a NaN as first saved value.

    Rows of a split vocabulary take two launches. PART writes part [N, splits, 9], the Fallback of
    each segment of this process's columns, or for a divergence other than the KL part [N, splits,
    7], their Sums, given log_sums. MERGE reads part of all ranks, [ranks, N, splits, …].

    Math:   Fallback, Sums and write_fallback, in float64; defined by reference.row_statistics and
            row_gradients, and f_divergences.divergence.
    Grid:   (⌈N / ROWS⌉,).
    Reads:  one saved value per row; 3·V of each tensor for a recomputed row, V more for a
            divergence other than the KL and WITH_GRADIENT. With PART or MERGE, as
            above; for a divergence other than the KL log_sums too, and with PART V once.
    Writes: 10 saved values and the fields asked for, of those rows; WITH_GRADIENT, V of the
            gradient of weight·KL to P. With PART, only part.
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
        for i_row in range(ROWS):
            if tl.max(tl.where(tl.arange(0, ROWS) == i_row, marked, 0), 0) > 0:
                row = first + i_row
                out = row_outputs(
                    Outputs(
                        saved_ptr,
                        logprob_ptr,
                        entropy_ptr,
                        ref_logprob_ptr,
                        kl_ptr,
                        ref_kl_ptr,
                        lse_ptr,
                        ref_lse_ptr,
                    ),
                    row,
                )
                located = row_at(
                    RowArguments(
                        p_ptr, q_ptr, tokens_ptr, temperature_ptr, ratio_ptr, temperature, n_inner,
                        stride_p_outer, stride_p_inner, stride_q_outer, stride_q_inner, V,
                    ),
                    row, TEMPERATURE_PER_ROW, HAS_RATIO,
                )  # fmt: skip
                whole = wide_row(located, 0, V)
                # The segments of all ranks, in order.
                index = tl.arange(0, SPLITS if SPLITS > 0 else 1)
                held = index < ranks * splits
                place = (index // splits * n_rows.to(tl.int64) + row) * splits + index % splits
                if SPLITS > 0 and KIND > 0:
                    stats = fallback_of_log_sums(
                        log_sums_ptr + place * 4, held, whole.scale, whole.q_scale
                    )
                elif MERGE:
                    stats = merge_parts(
                        load_parts(part_ptr + place * 9, held), whole.scale, whole.q_scale, WITH_KL
                    )
                elif not PART:
                    stats = fallback_statistics(whole, BLOCK, WITH_KL, reading)
                if PART:
                    for split in range(splits):
                        part = wide_row(
                            located, split * segment, tl.minimum(segment, V - split * segment)
                        )
                        values = (
                            divergence_sums(part, stats, formula, BLOCK, kind, reading)
                            if KIND > 0
                            else fallback_statistics(part, BLOCK, WITH_KL, reading, True)
                        )
                        store_tuple(part_ptr + (row * splits + split) * len(values), values)
                else:
                    # Not read for the KL.
                    sums = (
                        stats
                        if KIND == 0
                        else merge_sums(part_ptr + place * 7, held, kind)
                        if MERGE
                        else divergence_sums(whole, stats, formula, BLOCK, kind, reading)
                    )
                    store_fallback(out, whole, stats, sums, formula, want, reading)
                if WITH_GRADIENT:
                    # Make the saved values, stored by one thread, visible to all threads before
                    # write_fallback loads them.
                    tl.debug_barrier()
                    asked: tl.constexpr = Asked(
                        False, False, False, True, False, False, False, kind, True, False, False
                    )
                    zero = tl.full([], 0.0, tl.float32)
                    g = Upstream(zero, zero, zero, tl.load(weight_ptr + row), zero, zero, zero)
                    # No gradient to Q.
                    write_fallback(
                        whole, GradientRow(grad_ptr + row * stride_grad, grad_ptr, 0, V),
                        out.saved, g, formula, BLOCK, asked, reading,
                    )  # fmt: skip
