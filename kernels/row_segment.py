"""Sum a segment of a row: one read of the logits, a tile at a time, by one warp.

Origin and centre are uniform over the threads. A tile takes one of three paths, selected only by
the row's data:
    near:     every |d| < 1 and the weight within its limit, as in nearly all tiles of a policy near
              its reference: a polynomial for h(d);
    general:  the weight within its limit: a second exponential where |d| is large;
    anchor:   some thread's weight exceeds its limit, so that the weight about this centre might
              grow more than eightfold: move origin and centre, then take the tile again.
The centre is always the mean of d over at least an eighth of the weight: sums about a distant
centre would lose digits when the centre moves.

The second read of an f-divergence starts with log2 of P's partition function as origin and with
lse_q - lse_p as centre: e is p and d is log(q/p), and no tile is anchored. A far row has no near
tile (divergence_math.py).
"""

from collections import namedtuple

import triton
import triton.language as tl

from .divergence_math import add_terms
from .row_load import (
    D_FACTOR,
    Segment,
    lane_order,
    lane_sum,
    load_tile,
    or_lanes,
    row_pad,
    segment_shift,
)
from .row_math import (
    LARGEST_D,
    LARGEST_FAR_D,
    LOG2E,
    LOWEST,
    LOWEST_EXPONENT,
    REANCHOR_GROWTH,
    RENYI,
    SMALL_D,
    TOTAL_VARIATION,
    State,
    centred,
    horner,
    recentre,
    rescale,
)

# Paths of a tile, in order of precedence.
NEAR, GENERAL, ANCHOR = map(tl.constexpr, range(3))


# A tile relative to the current origin and centre: e and D_FACTOR·d as tuples; S, each thread's sum
# of e in the tile; lane_A with the tile added.
Weights = namedtuple("Weights", "e d S lane_A")


# The sums of a segment so far.
#
# Scalars: origin, and centre times D_FACTOR. Vectors [threads]: S; limit: re-anchor when S
# exceeds it, except for an f-divergence; largest: an upper bound of |y - x - shift|·scale times
# D_FACTOR; drift: Σ(q - p) of an f-divergence. [threads, lanes]: A, 2·W, 2·U and 2·R, or 4·R with
# want.ref_kl. An f-divergence adds only tiles on the general path to S and drift.
Running = namedtuple("Running", "origin centre S limit largest drift lane_A lane_W lane_U lane_R")


@triton.jit
def empty_sums(part, tiling: tl.constexpr, want: tl.constexpr):
    """Return the sums of an empty segment; the first tile with weight takes the anchor path."""
    SECOND: tl.constexpr = want.kind.name > RENYI
    zeros = tl.zeros([tiling.threads], tl.float32)
    lanes = tl.zeros([tiling.threads, tiling.lanes], tl.float32)
    return Running(
        part.second.origin if SECOND else tl.full([], LOWEST, tl.float32),
        part.second.centre if SECOND else tl.full([], 0.0, tl.float32),
        zeros,
        zeros,
        zeros + D_FACTOR,
        zeros,
        lanes,
        lanes,
        lanes,
        lanes,
    )


@triton.jit
def h_near(d):
    """Return 2·h(d)/(D_FACTOR·d)² for |d| < 1, from D_FACTOR·d; minimax polynomial, relative error
    1.6e-6.
    """
    return horner(
        d,
        (
            0.00019977660849690437 / 64,
            0.0014262537006288767 / 32,
            0.008335255086421967 / 16,
            0.04165279492735863 / 8,
            0.16666589677333832 / 4,
            0.5000007748603821 / 2,
        ),
    )


@triton.jit
def h_general(d):
    """Return 2·h(d) and (D_FACTOR·d)², from D_FACTOR·d; relative error 3e-6, by the polynomial of
    h_over_square if d is small.
    """
    square = d * d
    series = horner(
        d,
        (
            0.008337464183568954 / 16,
            0.04175350069999695 / 8,
            0.16666695475578308 / 4,
            0.4999993145465851 / 2,
        ),
    )
    beyond = tl.fma(tl.exp2(d * (LOG2E / D_FACTOR)), 2.0, -2.0) - d
    return tl.where(tl.abs(d) < SMALL_D * D_FACTOR, square * series, beyond), square


@triton.jit
def weigh(sums, tile, part, want: tl.constexpr, CLAMP: tl.constexpr, EDGE: tl.constexpr):
    """Return the Weights of a tile. Without CLAMP, a finite logit so low that its exponent
    overflows makes lane_A NaN.
    """
    es, ds, lane_A = (), (), sums.lane_A
    for g in tl.static_range(len(tile.x)):
        exponent = tl.fma(tile.x[g], part.scale_log2, -sums.origin)
        e = tl.exp2(exponent)
        d = e
        if want.kl:
            d = centred(
                tile.difference[g], tile.lo[g], part.doubled_scale, sums.centre, want.compensated
            )
            if want.kind.name > RENYI:
                d = d - part.second.centre_lo
        if EDGE:
            e = tl.where(tile.inside[g], e, 0.0)
            d = tl.where(tile.inside[g], d, 0.0)
        if want.entropy:
            if CLAMP:
                exponent = tl.maximum(exponent, LOWEST_EXPONENT)
            lane_A = tl.fma(e, exponent, lane_A)
        es += (e,)
        ds += (d,)
    lane_S = es[0]
    for g in tl.static_range(1, len(es)):
        lane_S += es[g]
    return Weights(es, ds, lane_sum(lane_S), lane_A)


@triton.jit
def path_of(sums, weights, part, want: tl.constexpr):
    """Select the path of a tile."""
    path = (
        part.second.far
        if want.kind.name > RENYI
        else tl.where(sums.S + weights.S > sums.limit, ANCHOR, NEAR if want.kl else GENERAL)
    )
    if want.kl:
        bits = weights.d[0].to(tl.int32, bitcast=True)
        for g in tl.static_range(1, len(weights.d)):
            bits = bits | weights.d[g].to(tl.int32, bitcast=True)
        path = tl.maximum(path, (or_lanes(bits) >> 30) & 1)
    return tl.max(path, 0)


@triton.jit
def state_of(sums, shift, want: tl.constexpr):
    """Return the state of each thread [threads], summed over its lanes, without D_FACTOR."""
    zeros = sums.S * 0.0
    return State(
        sums.origin,
        sums.S,
        lane_sum(sums.lane_A) if want.entropy else zeros,
        lane_sum(sums.lane_W) * (1.0 / D_FACTOR) if want.kl else zeros,
        lane_sum(sums.lane_U) * 0.5 if want.kl else zeros,
        lane_sum(sums.lane_R) * (0.25 if want.ref_kl else 0.5)
        if want.ref_kl or want.kind.name == RENYI or want.kind.name == TOTAL_VARIATION
        else sums.drift,
        sums.centre * (1.0 / D_FACTOR),
        shift,
    )


@triton.jit
def spread(z, LANES: tl.constexpr):
    """Divide z [threads] equally over the lanes; their number is a power of two, so there is no
    rounding, and the order of lanes does not matter.
    """
    return tl.broadcast_to((z * (1.0 / LANES))[:, None], [z.shape[0], LANES])


@triton.jit
def anchor(sums, tile, part, want: tl.constexpr, EDGE: tl.constexpr):
    """Raise the origin to the tile's peak if that is higher, and move the centre to the mean of d
    over all entries so far, including this tile, or over the tile alone if it outweighs the others
    eightfold.
    """
    state = state_of(sums, part.shift, want)
    peak = tl.max(tile.x[0], 1)
    for g in tl.static_range(1, len(tile.x)):
        peak = tl.maximum(peak, tl.max(tile.x[g], 1))
    state = rescale(
        state, tl.maximum(sums.origin, tl.floor(tl.max(peak, 0) * part.scale_log2)), want
    )
    for g in tl.static_range(len(tile.x)):
        e = tl.exp2(tl.fma(tile.x[g], part.scale_log2, -state.origin))
        if EDGE:
            e = tl.where(tile.inside[g], e, 0.0)
        if g == 0:
            lane_S = e
            lane_D = e * tile.difference[g]
        else:
            lane_S = lane_S + e
            lane_D = tl.fma(e, tile.difference[g], lane_D)
    tile_S = lane_sum(lane_S)
    total = tl.sum(tile_S, 0)
    before = tl.sum(state.S, 0)
    centre = state.centre
    if want.kl:
        # Use correctly rounded division: on a peaked row the whole gradient is the remainder
        # d - E_p[d] at the peak.
        mean = tl.div_rn(tl.sum(lane_sum(lane_D), 0), total) * part.doubled_scale * (1.0 / D_FACTOR)
        delta = tl.fma(mean - centre, total, tl.sum(state.W, 0)) / (before + total)
        centre = tl.where(total > before * REANCHOR_GROWTH, mean, centre + delta)
        # Recentre by the difference of the rounded centres, not by delta.
        delta = tl.where(state.S > 0.0, centre - state.centre, 0.0)
        state = recentre(state, delta, part.gamma, want)
    # The limits add up to REANCHOR_GROWTH times the weight. Each exceeds the thread's S with this
    # tile, so a tile never anchors twice.
    limit = tl.fma(before + total, (REANCHOR_GROWTH - 1.0) / tile_S.shape[0], state.S + tile_S)
    LANES: tl.constexpr = sums.lane_W.shape[1]
    # Near tiles do not update `largest`: there |d| < 1.
    largest = tl.maximum(sums.largest, tl.fma(tl.abs(centre), D_FACTOR, D_FACTOR))
    return Running(
        state.origin, centre * D_FACTOR, state.S, limit, largest, sums.drift,
        spread(state.A, LANES),
        spread(state.W * D_FACTOR, LANES),
        spread(state.U * 2.0, LANES),
        spread(state.R * (4.0 if want.ref_kl else 2.0), LANES),
    )  # fmt: skip


@triton.jit
def absorb(sums, weights, part, want: tl.constexpr, ALL_NEAR: tl.constexpr):
    """Add a tile to the sums; ALL_NEAR requires every |d| to be below 1.

    d and h below include their factors: D_FACTOR·d, 2·h(d), D_FACTOR = 2.
    """
    lane_W, lane_U, lane_R, largest = sums.lane_W, sums.lane_U, sums.lane_R, sums.largest
    drift = sums.drift
    S = sums.S if want.kind.name > RENYI and ALL_NEAR else sums.S + weights.S
    for g in tl.static_range(len(weights.e)):
        e, d = weights.e[g], weights.d[g]
        if want.kind.name > RENYI:
            lane_U, lane_W, lane_R, drift = add_terms(
                (lane_U, lane_W, lane_R, drift), e, d, part.second.formula, want.kind, ALL_NEAR
            )
        elif want.kl:
            lane_W = tl.fma(e, d, lane_W)
            # R takes 4·d·expm1(d) = 4·(d·h(d) + d²).
            if ALL_NEAR:
                h = h_near(d)
                e_square = e * (d * d)
                lane_U = tl.fma(e_square, h, lane_U)
                if want.ref_kl:
                    lane_R = tl.fma(e_square, tl.fma(d, h, 1.0), lane_R)
            else:
                largest = tl.maximum(largest, tl.max(tl.abs(d), 1) + tl.abs(sums.centre))
                h, square = h_general(d)
                lane_U = tl.fma(e, h, lane_U)
                if want.ref_kl:
                    lane_R = tl.fma(e, tl.fma(d, h, square), lane_R)
            if want.kind.name == RENYI:
                lane_R = tl.fma(e, h_general(d * part.gamma)[0], lane_R)
    return Running(
        sums.origin,
        sums.centre,
        S,
        sums.limit,
        largest,
        drift,
        weights.lane_A,
        lane_W,
        lane_U,
        lane_R,
    )


@triton.jit
def segment_sums(
    row, first, length, gamma, second, tiling: tl.constexpr, want: tl.constexpr,
    reading: tl.constexpr,
):  # fmt: skip
    """Return the scalar State of `length` entries of a Row from `first` on; U is +inf if some |d|
    may reach LARGEST_D or LARGEST_FAR_D. gamma, second: as in Segment.
    """
    shift = (
        segment_shift(row.p + first, row.q + first, length, row.ratio, reading)
        if want.kl and want.compensated and want.kind.name <= RENYI
        else tl.full([], 0.0, tl.float32)
    )
    pad = row_pad(row.p, tiling.realign)
    part = Segment(
        row.p + first - pad,
        row.q + first - pad,
        row.q + first,
        pad,
        lane_order(pad, tiling.lanes),
        row.V - first,
        shift,
        row.doubled_scale,
        row.doubled_scale * (LOG2E / D_FACTOR),
        row.ratio,
        gamma,
        second,
    )
    TILE: tl.constexpr = tiling.threads * tiling.groups
    # Without a KL there is no near path to keep short: always clamp instead of summing twice.
    CLAMP: tl.constexpr = not want.kl
    ANCHORS: tl.constexpr = want.kind.name <= RENYI
    sums = empty_sums(part, tiling, want)
    group = 0
    full_end = length // tiling.lanes // TILE * TILE
    while group < full_end:
        tile = load_tile(part, group, length, tiling.groups, tiling, want, reading, False)
        weights = weigh(sums, tile, part, want, CLAMP, False)
        path = path_of(sums, weights, part, want)
        if ANCHORS and path > GENERAL:  # anchor
            # A NaN never takes this path: comparisons with NaN are false. Reload the tile: keeping
            # it for this path costs registers on the others.
            tile = load_tile(part, group, length, tiling.groups, tiling, want, reading, False)
            sums = anchor(sums, tile, part, want, False)
        else:
            if path > NEAR:
                sums = absorb(sums, weights, part, want, False)
            else:
                sums = absorb(sums, weights, part, want, True)
            group += TILE
    if want.entropy and want.kl:
        A = tl.sum(lane_sum(sums.lane_A), 0)
        if A != A:
            # A column masked in both tensors by a large finite number makes A NaN: restart with
            # exponents clamped.
            sums = empty_sums(part, tiling, want)
            group = 0
    # The remainder below a tile, or the whole segment after a restart: one group per thread at a
    # time.
    while group * tiling.lanes < length:
        tile = load_tile(part, group, length, 1, tiling, want, reading, True)
        weights = weigh(sums, tile, part, want, True, True)
        if ANCHORS and path_of(sums, weights, part, want) > GENERAL:  # anchor
            sums = anchor(sums, tile, part, want, True)
        else:
            sums = absorb(sums, weights, part, want, False)
            group += tiling.threads
    state = state_of(sums, part.shift, want)
    U = tl.sum(state.U, 0)
    if want.kl and ANCHORS:
        limit = (LARGEST_FAR_D if want.compensated else LARGEST_D) * D_FACTOR
        if want.kind.name == RENYI:
            # Backward takes exp(α·d): α·|d| stays below LARGEST_D.
            limit = limit / tl.maximum((1.0 - part.gamma) * limit / (LARGEST_D * D_FACTOR), 1.0)
        U = tl.where(tl.max(sums.largest, 0) + tl.abs(sums.centre) < limit, U, float("inf"))
    return State(
        state.origin,
        tl.sum(state.S, 0),
        tl.sum(state.A, 0),
        tl.sum(state.W, 0),
        U,
        tl.sum(state.R, 0),
        state.centre,
        state.shift,
    )
