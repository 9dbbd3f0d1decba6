"""Backward of the divergences beside the KL: one read of the logits, one write of each gradient."""

from collections import namedtuple

import triton
import triton.language as tl

from .divergence_math import (
    RENYI,
    TERMS,
    TOTAL_VARIATION,
    Kind,
    Mixture,
    expm1,
    far_terms,
    float32_values,
    polynomial,
    renyi_exponent,
)
from .fallback import GradientRow, is_fallback, load_row
from .row_divergence import (
    MEAN_U,
    MEAN_V,
    fallback_log_probs,
    fallback_terms,
    load_means,
    log2_p_and_d,
)
from .row_finish import SAVED, Row
from .row_gradient import Place, gradient_terms, load_saved, store_gradient
from .row_load import (
    D_FACTOR,
    Reading,
    Tiling,
    load_edge,
    or_lanes,
    row_offset,
    row_pad,
    row_ratio,
    row_scale,
)
from .row_math import LOG2E, scale_reference, soft_cap, soft_cap_slope, subtract

# The constants of a row's gradients: its Terms (row_gradient.py), the Mixture, the coefficients of
# U and V, E_p[u] and E_q[v] (of Rényi's divergence twice log Z), and the factors of
# p·(u - E_p[u]) and q·(v - E_q[v]).
Constants = namedtuple("Constants", "terms mix series mean_u mean_v weight_p weight_q")


# Entries that a thread has read, tuples with one tensor per group: offsets in the row's blocks,
# capped logits, log2 p, and D_FACTOR·log(q/p).
Entries = namedtuple("Entries", "offs x y log2_p d")


@triton.jit
def entry_gradients(log2_p, d, row, kind: tl.constexpr, ALL_NEAR: tl.constexpr):
    """Gradients with respect to one logit of each tensor, from log2 p and D_FACTOR·log(q/p).

    ALL_NEAR requires every |d| to be below 1.
    """
    p = tl.exp2(log2_p)
    q = p
    if kind.wrt_q:
        q = tl.exp2(tl.fma(d, LOG2E / D_FACTOR, log2_p))
    if kind.name == RENYI:
        # p^α·q^(1 - α)/Z is p·e^z beside P and q·e^z beside Q.
        log_ratio = d * (1.0 / D_FACTOR)
        grad_x = p * expm1(tl.fma(log_ratio, row.mix.rest, -row.mean_u))
        grad_y = q * expm1(tl.fma(log_ratio, -row.mix.share, -row.mean_v))
    elif kind.name == TOTAL_VARIATION:
        sign = tl.where(d > 0.0, 0.5, tl.where(d < 0.0, -0.5, 0.0))
        grad_x = p * (-sign - row.mean_u)
        grad_y = q * (sign - row.mean_v)
    else:
        grad_x = p
        grad_y = q
        if kind.wrt_p:
            grad_x = p * tl.fma(d, polynomial(d, row.series, TERMS), -row.mean_u)
        if kind.wrt_q:
            grad_y = q * tl.fma(d, polynomial(d, row.series[TERMS:], TERMS), -row.mean_v)
        if not ALL_NEAR:
            far = far_terms(log2_p, d, row.mix, kind)
            near = tl.abs(d) < D_FACTOR
            grad_x = tl.where(near, grad_x, tl.fma(p, -row.mean_u, far.to_p))
            grad_y = tl.where(near, grad_y, tl.fma(q, -row.mean_v, far.to_q))
    return grad_x * row.weight_p, grad_y * row.weight_q


@triton.jit
def store_tile(
    place, tile, row, kind: tl.constexpr, reading: tl.constexpr,
    GROUPS: tl.constexpr, EDGE: tl.constexpr, ALL_NEAR: tl.constexpr,
):  # fmt: skip
    """Compute and store the gradients of a tile of Entries."""
    for i in tl.static_range(GROUPS):
        grad_x, grad_y = entry_gradients(tile.log2_p[i], tile.d[i], row, kind, ALL_NEAR)
        if kind.wrt_p:
            if reading.softcap > 0.0:
                grad_x = grad_x * soft_cap_slope(tile.x[i], reading.softcap)
            store_gradient(place.grad_p_block, tile.offs[i], grad_x, place, EDGE)
        if kind.wrt_q:
            if reading.ref_softcap > 0.0:
                grad_y = grad_y * soft_cap_slope(tile.y[i], reading.ref_softcap)
            store_gradient(place.grad_q_block, tile.offs[i], grad_y, place, EDGE)


@triton.jit
def write_tile(
    place,
    first_group,
    row,
    kind: tl.constexpr,
    tiling: tl.constexpr,
    reading: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Write the gradients of aligned blocks, tiling.groups per thread; all loads come first."""
    GROUPS: tl.constexpr = tiling.groups
    offsets = ()
    raw_xs = ()
    raw_ys = ()
    xs = ()
    ys = ()
    log2_ps = ()
    ds = ()
    thread = tl.arange(0, tiling.threads)[:, None]
    lane = tl.arange(0, tiling.lanes)[None, :]
    for i in tl.static_range(GROUPS):
        offs = (first_group + i * tiling.threads + thread) * tiling.lanes + lane
        inside = (offs >= place.pad) & (offs < place.read_end)
        offsets += (offs,)
        raw_xs += (load_edge(place.p_block + offs, inside, EDGE).to(tl.float32),)
        raw_ys += (load_edge(place.q_block + offs, inside, EDGE).to(tl.float32),)
    for i in tl.static_range(GROUPS):
        x = soft_cap(raw_xs[i], reading.softcap, place.p_block.dtype.element_ty)
        capped_y = soft_cap(raw_ys[i], reading.ref_softcap, place.q_block.dtype.element_ty)
        y, y_lo = scale_reference(capped_y, place.ratio, reading.ratio)
        difference, lo = subtract(y, x, kind.compensated)
        if reading.ratio:
            lo = lo + y_lo
        log2_p, d = log2_p_and_d(x, difference, lo, place.scale, row.terms, kind.compensated)
        xs += (x,)
        ys += (capped_y,)
        log2_ps += (log2_p,)
        ds += (d,)
        if i == 0:
            bits = d.to(tl.int32, bitcast=True)
        else:
            bits = bits | d.to(tl.int32, bitcast=True)
    tile = Entries(offsets, xs, ys, log2_ps, ds)
    if kind.name == RENYI or kind.name == TOTAL_VARIATION:
        # One formula serves all entries.
        store_tile(place, tile, row, kind, reading, GROUPS, EDGE, True)
    elif tl.max((or_lanes(bits) >> 30) & 1, 0) > 0:
        store_tile(place, tile, row, kind, reading, GROUPS, EDGE, False)
    else:
        store_tile(place, tile, row, kind, reading, GROUPS, EDGE, True)


@triton.jit
def write_fallback(
    row,
    grads,
    saved_ptr,
    constants,
    BLOCK: tl.constexpr,
    kind: tl.constexpr,
    reading: tl.constexpr,
):
    """Write the gradients of the entries grads.start … grads.end - 1 of a fallback row, computed in
    float64.
    """
    stats = load_row(saved_ptr)
    mean_u, mean_v = load_means(saved_ptr)
    scale = row.scale.to(tl.float64)
    q_scale = scale * row.ratio.to(tl.float64)
    for start in range(grads.start, grads.end, BLOCK):
        log_p, log_q, x, y = fallback_log_probs(
            row, start, grads.end, scale, q_scale, stats, BLOCK, reading
        )
        if kind.name == RENYI:
            # mean_u is log Z, and mean_v log Σp = log Σq.
            r = tl.exp(renyi_exponent(log_p, log_q, constants.mix) - mean_u)
            grad_x = r - tl.exp(log_p - mean_v)
            grad_y = r - tl.exp(log_q - mean_v)
        else:
            terms = fallback_terms(log_p, log_q, constants.mix, kind)
            # No entry of probability 0 has a gradient.
            grad_x = tl.where(terms.p == 0.0, 0.0, terms.to_p - terms.p * mean_u)
            grad_y = tl.where(terms.q == 0.0, 0.0, terms.to_q - terms.q * mean_v)
        offs_v = start + tl.arange(0, BLOCK)
        if kind.wrt_p:
            slope = soft_cap_slope(x, reading.softcap)
            value = (grad_x * constants.weight_p * slope).to(tl.float32)
            tl.store(grads.p + offs_v, value, mask=offs_v < grads.end)
        if kind.wrt_q:
            slope = soft_cap_slope(y, reading.ref_softcap)
            value = (grad_y * constants.weight_q * slope).to(tl.float32)
            tl.store(grads.q + offs_v, value, mask=offs_v < grads.end)


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
        "share",
        "rest",
        "curvature",
        *(f"c{i}" for i in range(14)),
    ],
    do_not_specialize_on_alignment=[
        "p_ptr",
        "q_ptr",
        "grad_p_ptr",
        "grad_q_ptr",
        "saved_ptr",
        "upstream_ptr",
        "mask_ptr",
        "temperature_ptr",
        "ratio_ptr",
    ],
)
def row_divergence_backward(  # noqa: PLR0913, PLR0915
    p_ptr,
    q_ptr,  # as in row_forward
    grad_p_ptr,
    grad_q_ptr,  # [N, V], rows stride_grad apart; any pointer where not requested
    saved_ptr,  # [N, 10] float32, written by row_forward, row_fallback and row_divergence
    upstream_ptr,  # [N] float32
    mask_ptr,
    temperature_ptr,
    ratio_ptr,  # as in row_forward
    temperature: tl.float32,
    n_inner: tl.int32,
    stride_p_outer: tl.int64,
    stride_p_inner: tl.int64,
    stride_q_outer: tl.int64,
    stride_q_inner: tl.int64,
    stride_grad: tl.int64,
    V: tl.int32,
    chunks: tl.int32,
    share: tl.float32,
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
    c13: tl.float32,  # U's seven coefficients and V's
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
    """Gradients of one chunk of one row with respect to either or both logits.

    Math:   entry_gradients, write_fallback for a fallback row; defined by f_divergences.gradients.
    Grid:   (N · chunks,), a row's chunks next to each other.
    Reads:  N·V of p and q; 40 bytes and the upstream gradient per row. Nothing of V in a masked row
            or in one whose upstream gradient is 0.
    Writes: N·V of each gradient asked for; exact zeros in those rows. They may overwrite the
            logits.
    Saves:  nothing.
    Special values: an entry with probability 0 has gradient 0; a row with a NaN or an infinite
            divergence has gradients that are not finite.
    """
    row = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * CHUNK
    COMPENSATED: tl.constexpr = (
        p_ptr.dtype.element_ty == tl.float32 or q_ptr.dtype.element_ty == tl.float32 or HAS_RATIO
    )
    kind: tl.constexpr = Kind(KIND, SMALL_REST, LG2, WRT_P, WRT_Q, COMPENSATED)
    tiling: tl.constexpr = Tiling(THREADS, LANES, GROUPS, False, Q_IN_BLOCKS)
    reading: tl.constexpr = Reading(False, SOFTCAP, REF_SOFTCAP, HAS_RATIO)
    upstream = tl.load(upstream_ptr + row)
    if HAS_MASK:
        upstream = tl.where(tl.load(mask_ptr + row) != 0, upstream, 0.0)
    scale = row_scale(temperature_ptr, temperature, row, row >= 0, TEMPERATURE_PER_ROW)
    ratio = row_ratio(ratio_ptr, row, row >= 0, HAS_RATIO)
    saved_ptr += row * SAVED
    p_row = p_ptr + row_offset(row, n_inner, stride_p_outer, stride_p_inner)
    q_row = q_ptr + row_offset(row, n_inner, stride_q_outer, stride_q_inner)
    grad_p_row = grad_p_ptr + row * stride_grad
    grad_q_row = grad_q_ptr + row * stride_grad
    pad = row_pad(p_row)
    # Read no entry of an inactive row.
    read_end = tl.where(upstream != 0.0, V + pad, 0)
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
    share, rest, curvature = float32_values((share, rest, curvature), 3)
    mix = Mixture(share, rest, curvature)
    place = Place(
        p_block, q_block, grad_p_block, grad_q_block, pad, V + pad, read_end, scale, ratio
    )
    weight_p = upstream * scale
    weight_q = weight_p * ratio
    if KIND == RENYI:
        weight_p = weight_p * (-mix.share / mix.rest)
        weight_q = -weight_q
    mean_u = tl.load(saved_ptr + MEAN_U)
    mean_v = tl.load(saved_ptr + MEAN_V)
    terms = gradient_terms(load_saved(saved_ptr))
    series = float32_values((c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13), 2 * TERMS)
    if is_fallback(saved_ptr) & (upstream != 0.0):
        whole = Row(p_row, q_row, V, row, scale, ratio)
        start, end = tl.maximum(first - pad, 0), tl.minimum(first + CHUNK - pad, V)
        grads = GradientRow(grad_p_row, grad_q_row, start, end)
        constants = Constants(terms, mix, series, mean_u, mean_v, weight_p, weight_q)
        write_fallback(whole, grads, saved_ptr, constants, THREADS * 2, kind, reading)
        return
    # log2_p_and_d leaves out a factor of p and q.
    weight_p = weight_p * terms.factor_p
    weight_q = weight_q * terms.factor_p
    constants = Constants(terms, mix, series, mean_u, mean_v, weight_p, weight_q)
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
        write_tile(place, group, constants, kind, tiling, reading, True)
    for group in range(full_begin, full_end, TILE_GROUPS):
        write_tile(place, group, constants, kind, tiling, reading, False)
    if full_end * LANES < end:
        write_tile(place, full_end, constants, kind, tiling, reading, True)
