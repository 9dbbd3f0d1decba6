"""The sums of a segment of a row: one read of the logits, a tile at a time, by the warp of a
program.

Origin and centre are uniform over the threads. The values of a tile alone select one of three
paths:
    near:     every |d| < 1 and no new peak, as in nearly all tiles of a policy near its reference:
              a polynomial for expm1(d) - d;
    general:  no new peak: a second exponential where |d| is large;
    anchor:   the tile might raise the weight about this centre more than eightfold: move origin
              and centre, then read it again.
The centre is always the mean of d over at least an eighth of the weight: sums about a distant
centre would lose their digits when the centre moves.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .row_load import lane_sum, or_lanes
from .row_math import (
    FAR_SHARE,
    LARGEST_D,
    LARGEST_FAR_D,
    LOG2E,
    LOWEST,
    NO_WEIGHT,
    OUTWEIGHS,
    SMALL_D,
    State,
    centred,
    recentre,
    rescale,
)
from .row_tile import D_SCALE, load_tile


class Weights(NamedTuple):
    """A tile about the present origin and centre: e and D_SCALE·d as tuples, each thread's sum of
    e, and lane_A with the tile added.
    """

    e: tl.tuple
    d: tl.tuple
    share: tl.tensor
    lane_A: tl.tensor


class Running(NamedTuple):
    """The sums of a segment so far.

    Scalars: origin; centre, times D_SCALE. Vectors [threads]: S; limit: the S that re-anchors;
    largest: a bound of |y - x|·scale less the row's shift, times D_SCALE. [threads, lanes]: A, 2·W,
    2·U and 4·R.
    """

    origin: tl.tensor
    centre: tl.tensor
    S: tl.tensor
    limit: tl.tensor
    largest: tl.tensor
    lane_A: tl.tensor
    lane_W: tl.tensor
    lane_U: tl.tensor
    lane_R: tl.tensor


@triton.jit
def empty_sums(tiling: tl.constexpr):
    """The sums of an empty segment; the first tile with weight takes the anchor path."""
    THREADS: tl.constexpr = tiling.threads
    LANES: tl.constexpr = tiling.lanes
    zero = tl.full([], 0.0, tl.float32)
    zeros = tl.zeros([THREADS], tl.float32)
    lanes = tl.zeros([THREADS, LANES], tl.float32)
    return Running(
        tl.full([], LOWEST, tl.float32),
        zero,
        zeros,
        zeros,
        zeros + D_SCALE,
        lanes,
        lanes,
        lanes,
        lanes,
    )


@triton.jit
def near_expm1(d):
    """2·(expm1(d) - d)/(D_SCALE·d)² for |d| < 1, from D_SCALE·d; minimax polynomial, relative error
    1.6e-6.
    """
    series = tl.fma(d, 0.00019977660849690437 / 64, 0.0014262537006288767 / 32)
    series = tl.fma(d, series, 0.008335255086421967 / 16)
    series = tl.fma(d, series, 0.04165279492735863 / 8)
    series = tl.fma(d, series, 0.16666589677333832 / 4)
    return tl.fma(d, series, 0.5000007748603821 / 2)


@triton.jit
def general_expm1(d):
    """2·(expm1(d) - d) and (D_SCALE·d)², from D_SCALE·d; relative error 3e-6, from the polynomial
    of expm1_over_square where d is small.
    """
    square = d * d
    series = tl.fma(d, 0.008337464183568954 / 16, 0.04175350069999695 / 8)
    series = tl.fma(d, series, 0.16666695475578308 / 4)
    series = tl.fma(d, series, 0.4999993145465851 / 2)
    beyond = tl.fma(tl.exp2(d * (LOG2E / D_SCALE)), 2.0, -2.0) - d
    return tl.where(tl.abs(d) < SMALL_D * D_SCALE, square * series, beyond), square


@triton.jit
def weigh(
    s, tile, row, GROUPS: tl.constexpr, want: tl.constexpr, CLAMP: tl.constexpr, EDGE: tl.constexpr
):
    """The Weights of a tile. Without CLAMP, a finite logit so low that its exponent overflows makes
    lane_A NaN.
    """
    es = ()
    ds = ()
    lane_A = s.lane_A
    for g in tl.static_range(GROUPS):
        exponent = tl.fma(tile.x[g], row.scale2, -s.origin)
        e = tl.exp2(exponent)
        d = e
        if want.kl:
            d = centred(tile.difference[g], tile.lost[g], row.doubled_scale, s.centre, want.exact)
        if EDGE:
            e = tl.where(tile.inside[g], e, 0.0)
            if want.kl:
                d = tl.where(tile.inside[g], d, 0.0)
        if want.entropy:
            if CLAMP:
                exponent = tl.maximum(exponent, NO_WEIGHT)
            lane_A = tl.fma(e, exponent, lane_A)
        es += (e,)
        ds += (d,)
        if g == 0:
            lane_S = e
        else:
            lane_S = lane_S + e
    return Weights(es, ds, lane_sum(lane_S), lane_A)


@triton.jit
def path_of(s, weights, GROUPS: tl.constexpr, want: tl.constexpr):
    """The path that a tile takes: 0 near, 1 general, 2 anchor."""
    path = tl.where(s.S + weights.share > s.limit, 2, 0)
    if want.kl:
        bits = weights.d[0].to(tl.int32, bitcast=True)
        for g in tl.static_range(1, GROUPS):
            bits = bits | weights.d[g].to(tl.int32, bitcast=True)
        path = tl.maximum(path, (or_lanes(bits) >> 30) & 1)
    else:
        path = tl.maximum(path, 1)
    return tl.max(path, 0)


@triton.jit
def state_of(s, want: tl.constexpr):
    """The state of each thread [threads], summed over its lanes; its centre is not scaled."""
    zeros = s.S * 0.0
    return State(
        s.origin,
        s.S,
        lane_sum(s.lane_A) if want.entropy else zeros,
        lane_sum(s.lane_W) * (1.0 / D_SCALE) if want.kl else zeros,
        lane_sum(s.lane_U) * 0.5 if want.kl else zeros,
        lane_sum(s.lane_R) * 0.25 if want.reverse else zeros,
        s.centre * (1.0 / D_SCALE),
    )


@triton.jit
def spread(z, LANES: tl.constexpr):
    """An equal part of z [threads] in each lane, exactly: wherever a row starts, its sums are the
    same.
    """
    return tl.broadcast_to((z * (1.0 / LANES))[:, None], [z.shape[0], LANES])


@triton.jit
def anchor(s, tile, row, GROUPS: tl.constexpr, want: tl.constexpr, EDGE: tl.constexpr):
    """Move the origin to the peak, if the tile holds it, and the centre to the mean of d over all
    entries so far, this tile included.
    """
    state = state_of(s, want)
    peak = tl.max(tile.x[0], 1)
    for g in tl.static_range(1, GROUPS):
        peak = tl.maximum(peak, tl.max(tile.x[g], 1))
    state = rescale(state, tl.maximum(s.origin, tl.floor(tl.max(peak, 0) * row.scale2)), want)
    for g in tl.static_range(GROUPS):
        e = tl.exp2(tl.fma(tile.x[g], row.scale2, -state.origin))
        if EDGE:
            e = tl.where(tile.inside[g], e, 0.0)
        if g == 0:
            lane_S = e
            lane_D = e * tile.difference[g]
        else:
            lane_S = lane_S + e
            lane_D = tl.fma(e, tile.difference[g], lane_D)
    shares = lane_sum(lane_S)
    total = tl.sum(shares, 0)
    before = tl.sum(state.S, 0)
    W = state.W
    U = state.U
    R = state.R
    centre = state.centre
    if want.kl:
        # Round the mean difference once: on a peaked row the whole gradient is the remainder d -
        # E_p[d] at the peak.
        mean = tl.div_rn(tl.sum(lane_sum(lane_D), 0), total) * row.doubled_scale * (1.0 / D_SCALE)
        delta = tl.fma(mean - centre, total, tl.sum(W, 0)) / (before + total)
        centre = tl.where(total > before * OUTWEIGHS, mean, centre + delta)
        # The sums move by the difference of the two rounded centres.
        moved = recentre(state, tl.where(state.S > 0.0, centre - state.centre, 0.0), want)
        W = moved.W
        U = moved.U
        R = moved.R
    # The limits add up to OUTWEIGHS times the weight. Each is above the thread's S with this tile:
    # the second read never anchors again.
    limit = tl.fma(before + total, (OUTWEIGHS - 1.0) / shares.shape[0], state.S + shares)
    LANES: tl.constexpr = s.lane_W.shape[1]
    # A near tile has |d| < 1.
    largest = tl.maximum(s.largest, tl.fma(tl.abs(centre), D_SCALE, D_SCALE))
    return Running(
        state.origin, centre * D_SCALE, state.S, limit, largest,
        spread(state.A, LANES),
        spread(W * D_SCALE, LANES),
        spread(U * 2.0, LANES),
        spread(R * 4.0, LANES),
    )  # fmt: skip


@triton.jit
def absorb(s, weights, GROUPS: tl.constexpr, want: tl.constexpr, NEAR: tl.constexpr):
    """Add a tile to the sums; NEAR requires every |d| to be below 1."""
    lane_W = s.lane_W
    lane_U = s.lane_U
    lane_R = s.lane_R
    largest = s.largest
    for g in tl.static_range(GROUPS):
        e = weights.e[g]
        if want.kl:
            d = weights.d[g]
            lane_W = tl.fma(e, d, lane_W)
            # 2·h, h = expm1(d) - d, and 4·d·expm1(d) = 4·(d·h + d²)
            if NEAR:
                h = near_expm1(d)
                e_square = e * (d * d)
                lane_U = tl.fma(e_square, h, lane_U)
                if want.reverse:
                    lane_R = tl.fma(e_square, tl.fma(d, h, 1.0), lane_R)
            else:
                largest = tl.maximum(largest, tl.max(tl.abs(d), 1) + tl.abs(s.centre))
                h, square = general_expm1(d)
                lane_U = tl.fma(e, h, lane_U)
                if want.reverse:
                    lane_R = tl.fma(e, tl.fma(d, h, square), lane_R)
    return Running(
        s.origin,
        s.centre,
        s.S + weights.share,
        s.limit,
        largest,
        weights.lane_A,
        lane_W,
        lane_U,
        lane_R,
    )


@triton.jit
def segment_sums(row, length, tiling: tl.constexpr, want: tl.constexpr, reading: tl.constexpr):
    """The scalar State of the first `length` entries; U is +inf if some |d| may reach LARGEST_D or
    LARGEST_FAR_D.
    """
    GROUPS: tl.constexpr = tiling.groups
    TILE: tl.constexpr = tiling.threads * tiling.groups
    # A row that has entropy alone never takes the near path.
    CLAMP: tl.constexpr = not want.kl
    s = empty_sums(tiling)
    group = 0
    full_end = length // tiling.lanes // TILE * TILE
    while group < full_end:
        tile = load_tile(row, group, length, GROUPS, tiling, want, reading, False)
        weights = weigh(s, tile, row, GROUPS, want, CLAMP, False)
        path = path_of(s, weights, GROUPS, want)
        if path > 1:
            # A NaN never takes this path: comparisons with NaN are false.
            tile = load_tile(row, group, length, GROUPS, tiling, want, reading, False)
            s = anchor(s, tile, row, GROUPS, want, False)
        else:
            if path > 0:
                s = absorb(s, weights, GROUPS, want, False)
            else:
                s = absorb(s, weights, GROUPS, want, True)
            group += TILE
    if want.entropy and want.kl:
        A = tl.sum(lane_sum(s.lane_A), 0)
        if A != A:
            # A column that both tensors mask by a large finite number makes A NaN: start over with
            # exponents clamped.
            s = empty_sums(tiling)
            group = 0
    # Less than a tile is left, or all of it: one group of each thread at a time.
    while group * tiling.lanes < length:
        tile = load_tile(row, group, length, 1, tiling, want, reading, True)
        weights = weigh(s, tile, row, 1, want, True, True)
        if path_of(s, weights, 1, want) > 1:
            s = anchor(s, tile, row, 1, want, True)
        else:
            s = absorb(s, weights, 1, want, False)
            group += tiling.threads
    state = state_of(s, want)
    S = tl.sum(state.S, 0)
    U = tl.sum(state.U, 0)
    if want.kl:
        limit = LARGEST_D * D_SCALE
        if want.exact:
            limit = tl.where(U > S * FAR_SHARE, LARGEST_FAR_D * D_SCALE, limit)
        U = tl.where(tl.max(s.largest, 0) + tl.abs(s.centre) < limit, U, float("inf"))
    return State(
        state.origin,
        S,
        tl.sum(state.A, 0),
        tl.sum(state.W, 0),
        U,
        tl.sum(state.R, 0),
        state.centre,
    )
