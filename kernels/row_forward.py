"""Forward: one read of a segment of a row, for the statistics of policy logits alone or of policy and reference logits."""

import triton
import triton.language as tl

from .row_load import lane_order, lane_sum, load_elements, load_group, row_offset, row_pad, row_ratio, row_scale, row_shift
from .row_math import (
    LARGEST_D,
    LOG2E,
    LOWEST,
    NO_WEIGHT,
    OUTWEIGHS,
    SMALL_D,
    STATE,
    centred,
    expm1_over_square,
    merge_states,
    move_centre,
    rescale_to,
    scale_reference,
    soft_cap,
    split_sum,
    subtract,
)


@triton.jit
def expm1_minus_any(d):
    """expm1(d) - d and d², for d up to LARGEST_D; relative to itself right to 3e-6, from the polynomial where it is small."""
    square = d * d
    beyond = (tl.exp2(d * LOG2E) - 1.0) - d
    return tl.where(tl.abs(d) < SMALL_D, square * expm1_over_square(d), beyond), square


@triton.jit
def load_tile(p_block, q_block, q_row, first_group, pad, order, V, shift, ratio, THREADS: tl.constexpr, LANES: tl.constexpr, GROUPS: tl.constexpr,
              WITH_KL: tl.constexpr, EXACT: tl.constexpr, REALIGN: tl.constexpr, Q_IN_BLOCKS: tl.constexpr, SOFTCAP: tl.constexpr,
              REF_SOFTCAP: tl.constexpr, HAS_RATIO: tl.constexpr, EDGE: tl.constexpr):
    """GROUPS groups per thread: x, y - x (less `shift`, with EXACT) and what its rounding lost, each a tuple of [THREADS, LANES], and which lanes lie
    inside the row."""
    xs = ()
    differences = ()
    losts = ()
    insides = ()
    for g in tl.static_range(GROUPS):
        group = first_group + g * THREADS + tl.arange(0, THREADS)[:, None]
        x = soft_cap(load_group(p_block, group, pad, V, REALIGN, EDGE, LANES), SOFTCAP, p_block.dtype.element_ty)
        inside = group * LANES + order < V
        if EDGE:
            x = tl.where(inside, x, LOWEST)
        difference = x
        lost = x
        if WITH_KL:
            if Q_IN_BLOCKS:
                y = load_group(q_block, group, pad, V, REALIGN, EDGE, LANES)
            else:
                y = load_elements(q_row, group, pad, V, EDGE, LANES)
            y = soft_cap(y, REF_SOFTCAP, q_block.dtype.element_ty)
            if HAS_RATIO:
                y, y_lost = scale_reference(y, ratio, HAS_RATIO)
            difference, lost = subtract(y, x, EXACT)
            if HAS_RATIO:
                lost = lost + y_lost
            if EXACT:
                difference, more = split_sum(difference, -shift)
                lost = lost + more
            if EDGE:
                difference = tl.where(inside, difference, 0.0)
                lost = tl.where(inside, lost, 0.0)
        xs += (x,)
        differences += (difference,)
        losts += (lost,)
        insides += (inside,)
    return xs, differences, losts, insides


@triton.jit
def absorb_tile(origin, S, A, W, U, R, centre, largest, xs, differences, losts, insides, scale, GROUPS: tl.constexpr, WITH_ENTROPY: tl.constexpr,
                WITH_KL: tl.constexpr, WITH_REVERSE: tl.constexpr, EXACT: tl.constexpr, EDGE: tl.constexpr):
    """The states of all threads, each with its GROUPS groups added: the peak first, then the centre, then the sums."""
    peak = tl.max(xs[0], 1)
    for g in tl.static_range(1, GROUPS):
        peak = tl.maximum(peak, tl.max(xs[g], 1))
    scale2 = scale * LOG2E
    new_origin = tl.maximum(origin, tl.floor(peak * scale2))
    S, A, W, U, R = rescale_to(new_origin, origin, S, A, W, U, R, WITH_ENTROPY, WITH_KL, WITH_REVERSE)

    es = ()
    for g in tl.static_range(GROUPS):
        exponent = tl.fma(xs[g], scale2, -new_origin[:, None])
        e = tl.exp2(exponent)
        if EDGE:
            e = tl.where(insides[g], e, 0.0)
        es += (e,)
        if g == 0:
            lane_S = e
            if WITH_ENTROPY:
                lane_A = e * tl.maximum(exponent, NO_WEIGHT)
            if WITH_KL:
                lane_D = e * differences[g]
        else:
            lane_S = lane_S + e
            if WITH_ENTROPY:
                lane_A = tl.fma(e, tl.maximum(exponent, NO_WEIGHT), lane_A)
            if WITH_KL:
                lane_D = tl.fma(e, differences[g], lane_D)
    tile_S = lane_sum(lane_S)
    if WITH_ENTROPY:
        A = A + lane_sum(lane_A)
    if WITH_KL:
        # A tile that outweighs all before it brings its own centre: its mean difference, as well rounded as may be, since on a peaked row what is
        # left of d at the peak is all that its gradient is made of. Such a tile holds the thread's peak, so that its sum is 1/2 or more: a reciprocal
        # square root and a correction make the quotient, at half of what a division costs.
        tile_D = lane_sum(lane_D)
        reciprocal = tl.rsqrt(tile_S * tile_S)
        mean = tile_D * reciprocal
        own_centre = tl.fma(tl.fma(-mean, tile_S, tile_D), reciprocal, mean) * scale
        delta = tl.where((tile_S > S * OUTWEIGHS), own_centre - centre, 0.0)
        W, U, R = move_centre(S, W, U, R, tl.where(S > 0.0, delta, 0.0), WITH_REVERSE)
        centre = centre + delta
        for g in tl.static_range(GROUPS):
            largest = tl.maximum(largest, tl.max(tl.abs(differences[g]), 1))
            d = centred(differences[g], losts[g], scale, centre[:, None], EXACT)
            if EDGE:
                d = tl.where(insides[g], d, 0.0)
            h, square = expm1_minus_any(d)
            # d·expm1(d) = d·h + d²
            r = tl.fma(d, h, square)
            if g == 0:
                lane_W = es[g] * d
                lane_U = es[g] * h
                lane_R = es[g] * r
            else:
                lane_W = tl.fma(es[g], d, lane_W)
                lane_U = tl.fma(es[g], h, lane_U)
                lane_R = tl.fma(es[g], r, lane_R)
        W = W + lane_sum(lane_W)
        U = U + lane_sum(lane_U)
        if WITH_REVERSE:
            R = R + lane_sum(lane_R)
    S = S + tile_S
    return new_origin, S, A, W, U, R, centre, largest


# Row counts, strides, lengths and where a tensor starts vary from step to step: none of them may cause a recompile.
@triton.jit(do_not_specialize=[
    "temperature", "n_inner", "stride_p_outer", "stride_p_inner", "stride_q_outer", "stride_q_inner",
    "V", "splits"], do_not_specialize_on_alignment=[
    "p_ptr", "q_ptr", "state_ptr", "mask_ptr", "temperature_ptr", "ratio_ptr"])
def row_forward(
    p_ptr,  # [outer, inner, V] policy logits (P)
    q_ptr,  # [outer, inner, V] reference logits (Q); any pointer without WITH_KL
    state_ptr,  # [N, splits, 7] float32: origin, S, A, W, U, R, centre (counted from row_shift·scale if EXACT)
    mask_ptr,  # [N] bool; any pointer without HAS_MASK
    temperature_ptr,  # [N] float32; any pointer without TEMPERATURE_PER_ROW
    ratio_ptr,  # [N] float32, the inverse temperature of Q over that of P; any pointer without HAS_RATIO
    temperature: tl.float32, n_inner: tl.int32,
    stride_p_outer: tl.int64, stride_p_inner: tl.int64, stride_q_outer: tl.int64, stride_q_inner: tl.int64,
    V: tl.int32, splits: tl.int32,
    SEGMENT: tl.constexpr, THREADS: tl.constexpr, LANES: tl.constexpr, GROUPS: tl.constexpr,
    HAS_MASK: tl.constexpr, TEMPERATURE_PER_ROW: tl.constexpr,
    WITH_ENTROPY: tl.constexpr, WITH_KL: tl.constexpr, WITH_REVERSE: tl.constexpr,
    REALIGN: tl.constexpr, Q_IN_BLOCKS: tl.constexpr,
    SOFTCAP: tl.constexpr, REF_SOFTCAP: tl.constexpr,  # logits are CAP·tanh(logits/CAP), 0 for none: a constant of each model
    HAS_RATIO: tl.constexpr,
):
    """Partial statistics of one segment of one row.

    Math:   the sums of row_math.py over the segment, as reference.row_statistics defines them for the row.
    Grid:   (N · splits,), a row's segments next to each other; a segment is SEGMENT elements whatever N is.
    Reads:  N·V of p, N·V of q (WITH_KL), and three entries of each again if one is float32; nothing of a masked row.
    Writes: 2 to 7 of the 7 · N · splits float32, those of the fields asked for.
    Saves:  nothing beside them; row_finish makes the row's statistics of them.
    Special values: the sums turn non-finite, and row_finish takes the fallback, for an infinity, a NaN, or an entry with
            d above LARGEST_D.
    """
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    if HAS_MASK:
        if tl.load(mask_ptr + row) == 0:
            return
    scale = row_scale(temperature_ptr, temperature, row, row >= 0, TEMPERATURE_PER_ROW)
    p_row = p_ptr + row_offset(row, n_inner, stride_p_outer, stride_p_inner)
    q_row = q_ptr + row_offset(row, n_inner, stride_q_outer, stride_q_inner)
    if REALIGN:
        pad = row_pad(p_row)
    else:
        pad = 0
    p_block = p_row - pad
    q_block = q_row - pad
    order = lane_order(pad, LANES)

    first = split * SEGMENT
    EXACT: tl.constexpr = p_ptr.dtype.element_ty == tl.float32 or q_ptr.dtype.element_ty == tl.float32 or HAS_RATIO
    ratio = row_ratio(ratio_ptr, row, row >= 0, HAS_RATIO)
    shift = 0.0
    if WITH_KL and EXACT:
        shift = row_shift(p_row, q_row, V, row >= 0, ratio, SOFTCAP, REF_SOFTCAP, HAS_RATIO)
    origin = tl.full([THREADS], LOWEST, tl.float32)
    S = tl.zeros([THREADS], tl.float32)
    A = tl.zeros([THREADS], tl.float32)
    W = tl.zeros([THREADS], tl.float32)
    U = tl.zeros([THREADS], tl.float32)
    R = tl.zeros([THREADS], tl.float32)
    centre = tl.zeros([THREADS], tl.float32)
    largest = tl.zeros([THREADS], tl.float32)
    TILE_GROUPS: tl.constexpr = THREADS * GROUPS
    n_groups = tl.minimum(SEGMENT, V - first) // LANES
    full_end = first // LANES + n_groups // TILE_GROUPS * TILE_GROUPS
    for group in range(first // LANES, full_end, TILE_GROUPS):
        xs, differences, losts, insides = load_tile(p_block, q_block, q_row, group, pad, order, V, shift, ratio, THREADS, LANES, GROUPS,
                                                    WITH_KL, EXACT, REALIGN, Q_IN_BLOCKS, SOFTCAP, REF_SOFTCAP, HAS_RATIO, False)
        origin, S, A, W, U, R, centre, largest = absorb_tile(origin, S, A, W, U, R, centre, largest, xs, differences, losts, insides, scale, GROUPS,
                                                             WITH_ENTROPY, WITH_KL, WITH_REVERSE, EXACT, False)
    if full_end * LANES < tl.minimum(first + SEGMENT, V):
        xs, differences, losts, insides = load_tile(p_block, q_block, q_row, full_end, pad, order, V, shift, ratio, THREADS, LANES, GROUPS,
                                                    WITH_KL, EXACT, REALIGN, Q_IN_BLOCKS, SOFTCAP, REF_SOFTCAP, HAS_RATIO, True)
        origin, S, A, W, U, R, centre, largest = absorb_tile(origin, S, A, W, U, R, centre, largest, xs, differences, losts, insides, scale, GROUPS,
                                                             WITH_ENTROPY, WITH_KL, WITH_REVERSE, EXACT, True)

    origin, S, A, W, U, R, centre = merge_states(origin, S, A, W, U, R, centre, WITH_ENTROPY, WITH_KL, WITH_REVERSE)
    state_ptr += tl.program_id(0).to(tl.int64) * STATE
    tl.store(state_ptr, origin)
    tl.store(state_ptr + 1, S)
    if WITH_ENTROPY:
        tl.store(state_ptr + 2, A)
    if WITH_KL:
        holds = tl.fma(tl.max(largest, 0), scale, tl.abs(centre)) < LARGEST_D
        tl.store(state_ptr + 3, W)
        tl.store(state_ptr + 4, tl.where(holds, U, float("inf")))
        if WITH_REVERSE:
            tl.store(state_ptr + 5, R)
        tl.store(state_ptr + 6, centre)
