"""Backward: one read of the logits, one write of each gradient, for any mix of upstream
gradients.
"""

import triton
import triton.language as tl

from .fallback import GradientRow, is_fallback, write_fallback
from .row_finish import SAVED, Row
from .row_gradient import (
    Asked,
    Place,
    Upstream,
    entry_gradients,
    gradient_terms,
    load_saved,
    write_tile,
)
from .row_load import Reading, Tiling, load_logit, row_offset, row_pad, row_ratio, row_scale
from .row_math import scale_reference, soft_cap_slope

# Limit of |E_q[d]|, relative to the centre near E_p[(y - x)·s]: beyond it float32 loses the digits
# of q·(d - E_q[d]).
LARGEST_MEAN_GAP = tl.constexpr(1.0)


@triton.jit
def upstream_of(upstream_ptr, row, n_rows, FIELD: tl.constexpr):
    """The upstream gradient of one field; 0 for a field without one."""
    if FIELD >= 0:
        return tl.load(upstream_ptr + n_rows.to(tl.int64) * FIELD + row)
    else:
        return tl.full([], 0.0, tl.float32)


# Row counts, strides, lengths and where a tensor starts vary from step to step: none of them may
# cause a recompile.
@triton.jit(
    do_not_specialize=[
        "temperature",
        "n_inner",
        "stride_p_outer",
        "stride_p_inner",
        "stride_q_outer",
        "stride_q_inner",
        "stride_grad",
        "V",
        "chunks",
        "n_rows",
    ],
    do_not_specialize_on_alignment=[
        "p_ptr",
        "q_ptr",
        "grad_p_ptr",
        "grad_q_ptr",
        "tokens_ptr",
        "saved_ptr",
        "upstream_ptr",
        "mask_ptr",
        "temperature_ptr",
        "ratio_ptr",
    ],
)
def row_backward(  # noqa: PLR0913, PLR0915
    p_ptr,
    q_ptr,  # [outer, inner, V] logits; q is any pointer where no reference takes part
    # [N, V], rows stride_grad apart; any pointer where not requested. They may overwrite the
    # logits, except with REF_KL and WRT_Q.
    grad_p_ptr,
    grad_q_ptr,
    tokens_ptr,  # [N] int64; any pointer without upstream gradients of log-probs
    saved_ptr,  # [N, 10] float32, written by row_forward and row_fallback
    upstream_ptr,  # [fields, N] float32: the upstream gradients, of fields that have one
    mask_ptr,
    temperature_ptr,
    ratio_ptr,  # as in row_forward
    temperature: tl.float32,
    n_rows: tl.int32,
    n_inner: tl.int32,
    stride_p_outer: tl.int64,
    stride_p_inner: tl.int64,
    stride_q_outer: tl.int64,
    stride_q_inner: tl.int64,
    stride_grad: tl.int64,
    V: tl.int32,
    chunks: tl.int32,
    CHUNK: tl.constexpr,
    THREADS: tl.constexpr,
    LANES: tl.constexpr,
    GROUPS: tl.constexpr,
    # The row of each field in upstream_ptr; -1: none.
    LOGPROB: tl.constexpr,
    ENTROPY: tl.constexpr,
    REF_LOGPROB: tl.constexpr,
    KL: tl.constexpr,
    REF_KL: tl.constexpr,
    LSE: tl.constexpr,
    REF_LSE: tl.constexpr,
    WRT_P: tl.constexpr,
    WRT_Q: tl.constexpr,
    HAS_MASK: tl.constexpr,
    TEMPERATURE_PER_ROW: tl.constexpr,
    Q_IN_BLOCKS: tl.constexpr,
    GRAD_IN_BLOCKS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    REF_SOFTCAP: tl.constexpr,
    HAS_RATIO: tl.constexpr,
):
    """Gradients of one chunk of one row with respect to either or both logits.

    Math:   entry_gradients, write_fallback for a fallback row; defined by reference.row_gradients.
    Grid:   (N · chunks,), a row's chunks next to each other.
    Reads:  N·V of p where p takes part, N·V of q where q does; 40 bytes and the upstream gradients
            per row. Nothing of V in a masked row or in one whose upstream gradients are all 0. For
            REF_KL to Q each chunk of a row whose saved E_q[d] is too inaccurate reads 3·V of both.
    Writes: N·V of each gradient asked for; exact zeros in those rows.
    Saves:  nothing.
    Special values: an entry with probability 0 has gradient exactly 0; a row with a NaN or with an
            infinite KL has gradients that are not finite.
    """
    row = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * CHUNK
    COMPENSATED: tl.constexpr = (
        p_ptr.dtype.element_ty == tl.float32 or q_ptr.dtype.element_ty == tl.float32 or HAS_RATIO
    )
    asked: tl.constexpr = Asked(
        LOGPROB >= 0,
        ENTROPY >= 0,
        REF_LOGPROB >= 0,
        KL >= 0,
        REF_KL >= 0,
        LSE >= 0,
        REF_LSE >= 0,
        WRT_P,
        WRT_Q,
        COMPENSATED,
    )
    HAS_TOKEN: tl.constexpr = (WRT_P and LOGPROB >= 0) or (WRT_Q and REF_LOGPROB >= 0)
    tiling: tl.constexpr = Tiling(THREADS, LANES, GROUPS, False, Q_IN_BLOCKS)
    reading: tl.constexpr = Reading(HAS_TOKEN, SOFTCAP, REF_SOFTCAP, HAS_RATIO)
    g = Upstream(
        upstream_of(upstream_ptr, row, n_rows, LOGPROB),
        upstream_of(upstream_ptr, row, n_rows, ENTROPY),
        upstream_of(upstream_ptr, row, n_rows, REF_LOGPROB),
        upstream_of(upstream_ptr, row, n_rows, KL),
        upstream_of(upstream_ptr, row, n_rows, REF_KL),
        upstream_of(upstream_ptr, row, n_rows, LSE),
        upstream_of(upstream_ptr, row, n_rows, REF_LSE),
    )
    activity = (
        tl.abs(g.logprob)
        + tl.abs(g.entropy)
        + tl.abs(g.ref_logprob)
        + tl.abs(g.kl)
        + tl.abs(g.ref_kl)
        + tl.abs(g.lse)
        + tl.abs(g.ref_lse)
    )
    if HAS_MASK:
        activity = tl.where(tl.load(mask_ptr + row) != 0, activity, 0.0)
    scale = row_scale(temperature_ptr, temperature, row, row >= 0, TEMPERATURE_PER_ROW)
    ratio = row_ratio(ratio_ptr, row, row >= 0, HAS_RATIO)
    saved_ptr += row * SAVED
    p_row = p_ptr + row_offset(row, n_inner, stride_p_outer, stride_p_inner)
    q_row = q_ptr + row_offset(row, n_inner, stride_q_outer, stride_q_inner)
    grad_p_row = grad_p_ptr + row * stride_grad
    grad_q_row = grad_q_ptr + row * stride_grad
    pad = row_pad(p_row)
    # Read no entry of an inactive row.
    read_end = tl.where(activity != 0.0, V + pad, 0)
    # Hints stand where the pointers are made: a hint on a function's argument is lost when it is
    # inlined.
    p_block = tl.multiple_of(p_row - pad, 16)
    q_block = q_row - pad
    if Q_IN_BLOCKS:
        q_block = tl.multiple_of(q_block, 16)
    grad_p_block = grad_p_row - pad
    grad_q_block = grad_q_row - pad
    if GRAD_IN_BLOCKS:
        grad_p_block = tl.multiple_of(
            grad_p_block, LANES * grad_p_ptr.dtype.element_ty.primitive_bitwidth // 8
        )
        grad_q_block = tl.multiple_of(
            grad_q_block, LANES * grad_q_ptr.dtype.element_ty.primitive_bitwidth // 8
        )

    token = row * 0
    if HAS_TOKEN:
        token = tl.load(tokens_ptr + row)
    needs_fallback = is_fallback(saved_ptr)
    if REF_KL >= 0 and WRT_Q:
        needs_fallback = needs_fallback | (tl.abs(tl.load(saved_ptr + 8)) > LARGEST_MEAN_GAP)
    if needs_fallback & (activity != 0.0):
        whole = Row(p_row, q_row, V, token, scale, ratio)
        start, end = tl.maximum(first - pad, 0), tl.minimum(first + CHUNK - pad, V)
        grads = GradientRow(grad_p_row, grad_q_row, start, end)
        write_fallback(whole, grads, saved_ptr, g, THREADS * 2, asked, reading)
        return
    terms = gradient_terms(load_saved(saved_ptr))
    place = Place(
        p_block, q_block, grad_p_block, grad_q_block, pad, V + pad, read_end, scale, ratio
    )
    if HAS_TOKEN:
        # The sampled token's gradient has a one-hot term: read its logits before any store, write
        # its gradient last.
        token_here = (
            (token >= 0)
            & (token + pad >= first)
            & (token + pad < tl.minimum(first + CHUNK, read_end))
        )
        token_x = load_logit(p_row, token, token_here, 0.0, SOFTCAP)
        capped_token_y = load_logit(q_row, token, token_here, 0.0, REF_SOFTCAP)
        token_y, token_y_lo = scale_reference(capped_token_y, ratio, HAS_RATIO)
        # The gradients may be written over the logits: every warp must have read the token's before
        # any writes.
        tl.debug_barrier()

    TILE_GROUPS: tl.constexpr = THREADS * GROUPS
    begin = first // LANES
    end = tl.minimum(first + CHUNK, V + pad)
    full_end = begin + tl.maximum(end - first, 0) // (TILE_GROUPS * LANES) * TILE_GROUPS
    # The first tile of a padded row, and all tiles of an inactive row, take the masked path.
    full_begin = tl.where(
        (first == 0) & (pad > 0), tl.minimum(begin + TILE_GROUPS, full_end), begin
    )
    full_begin = tl.where(read_end > 0, full_begin, full_end)
    for group in range(begin, full_begin, TILE_GROUPS):
        write_tile(place, group, terms, g, tiling, asked, reading, True)
    for group in range(full_begin, full_end, TILE_GROUPS):
        write_tile(place, group, terms, g, tiling, asked, reading, False)
    if full_end * LANES < end:
        write_tile(place, full_end, terms, g, tiling, asked, reading, True)

    if HAS_TOKEN:
        tl.debug_barrier()
        grad_x, grad_y = entry_gradients(
            token_x, token_y, token_y_lo, scale, terms, g, asked, HAS_RATIO
        )
        if WRT_P:
            tl.store(
                grad_p_row + token,
                (grad_x + scale * g.logprob) * soft_cap_slope(token_x, SOFTCAP),
                mask=token_here,
            )
        if WRT_Q:
            slope = soft_cap_slope(capped_token_y, REF_SOFTCAP) * ratio
            tl.store(grad_q_row + token, (grad_y + scale * g.ref_logprob) * slope, mask=token_here)
