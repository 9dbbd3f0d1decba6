"""Backward: one read of the logits, one write of each gradient, for any combination of upstream
gradients, and for divergences other than the KL.
"""

from collections import namedtuple

import triton
import triton.language as tl

from .divergence_math import Formula
from .fallback import GradientRow, is_fallback, write_fallback
from .row_finish import SAVED
from .row_gradient import (
    Asked,
    Place,
    Upstream,
    entry_gradients,
    gradient_terms,
    load_saved,
    write_tile,
)
from .row_load import (
    D_FACTOR,
    Reading,
    Tiling,
    block_of,
    compensates,
    load_logit,
    row_at,
    row_pad,
    wide_row,
)
from .row_math import LARGEST_MEAN_GAP, OF_KL, Kind, scale_reference, soft_cap_slope


@triton.jit
def upstream_of(upstream_ptr, row, n_rows, FIELD: tl.constexpr):
    """Load the upstream gradient of one field; 0 for a field without one."""
    return (
        tl.load(upstream_ptr + n_rows.to(tl.int64) * FIELD + row)
        if FIELD >= 0
        else tl.full([], 0.0, tl.float32)
    )


# The arguments of both kernels, among them the fields of row_load.RowArguments.
Arguments = namedtuple(
    "Arguments",
    "p q grad_p grad_q tokens saved upstream mask temperatures ratios temperature n_rows n_inner "
    "stride_p_outer stride_p_inner stride_q_outer stride_q_inner stride_grad V chunks",
)


# Compile-time: entries per chunk, the gradients requested, whether there are a row mask and per-row
# temperatures, and whether gradient rows start at the same place in a block as logits rows.
Cut = namedtuple("Cut", "chunk wrt_p wrt_q has_mask per_row grad_in_blocks")


@triton.jit
def write_chunk(  # noqa: PLR0915
    args,
    formula,
    fields: tl.constexpr,
    kind: tl.constexpr,
    cut: tl.constexpr,
    tiling: tl.constexpr,
    reading: tl.constexpr,
):
    """Write the gradients of this program's chunk of a row; fields: the row of each field in the
    upstream gradients, -1 if it has none.
    """
    row = (tl.program_id(0) // args.chunks).to(tl.int64)
    first = (tl.program_id(0) % args.chunks) * cut.chunk
    asked: tl.constexpr = Asked(
        fields.logprob >= 0,
        fields.entropy >= 0,
        fields.ref_logprob >= 0,
        fields.kl >= 0,
        fields.ref_kl >= 0,
        fields.lse >= 0,
        fields.ref_lse >= 0,
        kind,
        cut.wrt_p,
        cut.wrt_q,
        compensates(args.p.dtype.element_ty, args.q.dtype.element_ty, reading.ratio),
    )
    g = Upstream(
        upstream_of(args.upstream, row, args.n_rows, fields.logprob),
        upstream_of(args.upstream, row, args.n_rows, fields.entropy),
        upstream_of(args.upstream, row, args.n_rows, fields.ref_logprob),
        upstream_of(args.upstream, row, args.n_rows, fields.kl),
        upstream_of(args.upstream, row, args.n_rows, fields.ref_kl),
        upstream_of(args.upstream, row, args.n_rows, fields.lse),
        upstream_of(args.upstream, row, args.n_rows, fields.ref_lse),
    )
    activity = (
        tl.abs(g.logprob)
        + tl.abs(g.entropy)
        + tl.abs(g.ref_logprob)
        + tl.abs(g.kl)
        + (tl.abs(g.ref_kl) + tl.abs(g.lse) + tl.abs(g.ref_lse))
    )
    if cut.has_mask:
        activity = tl.where(tl.load(args.mask + row) != 0, activity, 0.0)
    whole = row_at(args, row, cut.per_row, reading.ratio)
    scale = whole.doubled_scale * (1.0 / D_FACTOR)
    saved_ptr = args.saved + row * SAVED
    grad_p_row = args.grad_p + row * args.stride_grad
    grad_q_row = args.grad_q + row * args.stride_grad
    pad = row_pad(whole.p, True)
    # Read no entry of an inactive row.
    read_end = tl.where(activity != 0.0, args.V + pad, 0)
    place = Place(
        block_of(whole.p, pad, tiling.lanes, True),
        block_of(whole.q, pad, tiling.lanes, tiling.q_in_blocks),
        block_of(grad_p_row, pad, tiling.lanes, cut.grad_in_blocks),
        block_of(grad_q_row, pad, tiling.lanes, cut.grad_in_blocks),
        pad, args.V + pad, read_end, scale, whole.ratio,
    )  # fmt: skip
    token = tl.load(whole.token_ptr) if reading.tokens else row
    # Saved value 8 is mean_q.
    if (activity != 0.0) & (is_fallback(saved_ptr) | (
        asked.ref_kl and asked.wrt_q and tl.abs(tl.load(saved_ptr + 8)) > LARGEST_MEAN_GAP
    )):  # fmt: skip
        start, end = tl.maximum(first - pad, 0), tl.minimum(first + cut.chunk - pad, args.V)
        write_fallback(
            wide_row(whole, 0, args.V), GradientRow(grad_p_row, grad_q_row, start, end), saved_ptr,
            g, formula, tiling.threads * 2, asked, reading,
        )  # fmt: skip
        return
    terms = gradient_terms(load_saved(saved_ptr), formula)
    if reading.tokens:
        # The sampled token's gradient has a one-hot term: read its logits before any store, and
        # write its gradient last.
        token_here = (
            (token >= 0)
            & (token + pad >= first)
            & (token + pad < tl.minimum(first + cut.chunk, read_end))
        )
        token_x = load_logit(whole.p, token, token_here, 0.0, reading.softcap)
        capped_token_y = load_logit(whole.q, token, token_here, 0.0, reading.ref_softcap)
        token_y, token_y_lo = scale_reference(capped_token_y, whole.ratio, reading.ratio)
        # The gradients may overwrite the logits: every warp must read the token's logits before any
        # store.
        tl.debug_barrier()

    TILE_GROUPS: tl.constexpr = tiling.threads * tiling.groups
    begin = first // tiling.lanes
    end = tl.minimum(first + cut.chunk, args.V + pad)
    full_end = begin + tl.maximum(end - first, 0) // (TILE_GROUPS * tiling.lanes) * TILE_GROUPS
    # The first tile of a padded row, and all tiles of an inactive row, take the masked path.
    full_begin = tl.where(
        (first == 0) & (pad > 0), tl.minimum(begin + TILE_GROUPS, full_end), begin
    )
    full_begin = tl.where(read_end > 0, full_begin, full_end)
    for group in range(begin, full_begin, TILE_GROUPS):
        write_tile(place, group, terms, g, tiling, asked, reading, True)
    for group in range(full_begin, full_end, TILE_GROUPS):
        write_tile(place, group, terms, g, tiling, asked, reading, False)
    if full_end * tiling.lanes < end:
        write_tile(place, full_end, terms, g, tiling, asked, reading, True)

    if reading.tokens:
        tl.debug_barrier()
        grad_x, grad_y = entry_gradients(
            token_x, token_y, token_y_lo, scale, terms, g, asked, reading.ratio
        )
        if asked.wrt_p:
            tl.store(
                grad_p_row + token,
                (grad_x + scale * g.logprob) * soft_cap_slope(token_x, reading.softcap),
                mask=token_here,
            )
        if asked.wrt_q:
            tl.store(
                grad_q_row + token,
                (grad_y + scale * g.ref_logprob)
                * (soft_cap_slope(capped_token_y, reading.ref_softcap) * whole.ratio),
                mask=token_here,
            )


# These values vary from step to step and must not cause a recompile.
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
def row_backward(  # noqa: PLR0913
    p_ptr,
    q_ptr,  # [outer, inner, V] logits; q: any pointer without a reference
    # [N, V], rows stride_grad apart; any pointer if not requested. They may overwrite the logits,
    # except with REF_KL and WRT_Q.
    grad_p_ptr,
    grad_q_ptr,
    tokens_ptr,  # [N] int64; any pointer without upstream gradients of log-probs
    saved_ptr,  # [N, 10] float32, written by row_forward and row_fallback
    upstream_ptr,  # [fields, N] float32: the upstream gradients of the fields that have one
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
    """Write the gradients of one chunk of one row with respect to either or both logits.

    Math:   entry_gradients, write_fallback for a fallback row; defined by reference.row_gradients.
    Grid:   (N · chunks,), a row's chunks next to each other.
    Reads:  N·V of p and of q, each if used; 40 bytes and the upstream gradients per row. No logits
            of a masked row or of one whose upstream gradients are all 0. For REF_KL to Q each chunk
            of a row whose saved E_q[d] is too inaccurate reads 3·V of both.
    Writes: N·V of each gradient asked for; exact zeros in those rows.
    Saves:  nothing.
    Special values: an entry with probability 0 has gradient exactly 0, dx that of ref_kl alone; a
            row with a NaN or with an infinite KL has gradients that are not finite.
    """
    args = Arguments(
        p_ptr, q_ptr, grad_p_ptr, grad_q_ptr, tokens_ptr, saved_ptr, upstream_ptr, mask_ptr,
        temperature_ptr, ratio_ptr, temperature, n_rows, n_inner, stride_p_outer, stride_p_inner,
        stride_q_outer, stride_q_inner, stride_grad, V, chunks,
    )  # fmt: skip
    write_chunk(
        args,
        temperature,  # the KL has no Formula
        Upstream(LOGPROB, ENTROPY, REF_LOGPROB, KL, REF_KL, LSE, REF_LSE),
        Kind(OF_KL, False, False),
        Cut(CHUNK, WRT_P, WRT_Q, HAS_MASK, TEMPERATURE_PER_ROW, GRAD_IN_BLOCKS),
        Tiling(THREADS, LANES, GROUPS, False, Q_IN_BLOCKS),
        Reading(
            (WRT_P and LOGPROB >= 0) or (WRT_Q and REF_LOGPROB >= 0), SOFTCAP, REF_SOFTCAP,
            HAS_RATIO,
        ),
    )  # fmt: skip


# These values vary from step to step and must not cause a recompile.
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
        "share",
        "rest",
        "curvature",
        *(f"c{i}" for i in range(16)),
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
def row_divergence_backward(  # noqa: PLR0913
    p_ptr,
    q_ptr,
    grad_p_ptr,
    grad_q_ptr,  # as in row_backward; they may overwrite the logits
    tokens_ptr,  # any pointer
    saved_ptr,  # [N, 10] float32, written by row_forward, row_fallback and row_divergence
    upstream_ptr,  # [N] float32
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
    share: tl.float32,  # as in row_divergence; Rényi's order alpha
    rest: tl.float32,
    curvature: tl.float32,
    c0: tl.float32,
    c1: tl.float32,
    c2: tl.float32,
    c3: tl.float32,
    c4: tl.float32,
    c5: tl.float32,
    c6: tl.float32,
    c7: tl.float32,
    c8: tl.float32,
    c9: tl.float32,
    c10: tl.float32,
    c11: tl.float32,
    c12: tl.float32,
    c13: tl.float32,
    c14: tl.float32,
    c15: tl.float32,  # coefficients of U and of V (divergence_math.py)
    CHUNK: tl.constexpr,
    THREADS: tl.constexpr,
    LANES: tl.constexpr,
    GROUPS: tl.constexpr,
    KIND: tl.constexpr,
    SMALL_REST: tl.constexpr,
    LG2: tl.constexpr,
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
    """Write the gradients of one chunk of one row for a divergence other than the KL.

    Math:   divergence_gradients, fallback_gradients for a fallback row; defined by
            f_divergences.gradients.
    Grid:   as row_backward.
    Reads:  N·V of p and q; 40 bytes and the upstream gradient per row. No logits of a masked row or
            of one whose upstream gradient is 0.
    Writes: N·V of each gradient asked for; exact zeros in those rows.
    Saves:  nothing.
    Special values: an entry with probability 0 has gradient 0; a row with a NaN or an infinite
            divergence has gradients that are not finite.
    """
    args = Arguments(
        p_ptr, q_ptr, grad_p_ptr, grad_q_ptr, tokens_ptr, saved_ptr, upstream_ptr, mask_ptr,
        temperature_ptr, ratio_ptr, temperature, n_rows, n_inner, stride_p_outer, stride_p_inner,
        stride_q_outer, stride_q_inner, stride_grad, V, chunks,
    )  # fmt: skip
    series = (c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13, c14, c15)
    write_chunk(
        args,
        Formula(share, rest, curvature, series),
        Upstream(-1, -1, -1, 0, -1, -1, -1),
        Kind(KIND, SMALL_REST, LG2),
        Cut(CHUNK, WRT_P, WRT_Q, HAS_MASK, TEMPERATURE_PER_ROW, GRAD_IN_BLOCKS),
        Tiling(THREADS, LANES, GROUPS, False, Q_IN_BLOCKS),
        Reading(False, SOFTCAP, REF_SOFTCAP, HAS_RATIO),
    )
