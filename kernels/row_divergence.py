"""Forward of the divergences that need both log-sum-exps first: a second read of the logits."""

from collections import namedtuple

import triton
import triton.language as tl

from .divergence_math import (
    MOMENT_TERMS,
    RENYI,
    TERMS,
    Kind,
    Mixture,
    absorb,
    entry_terms,
    float32_values,
    renyi_exponent,
)
from .fallback import is_fallback, load_double, load_row, log_probability_p, log_probability_q
from .row_finish import SAVED, Row
from .row_gradient import gradient_terms, load_saved
from .row_load import (
    D_FACTOR,
    Reading,
    Segment,
    Tiling,
    lane_order,
    lane_sum,
    load_tile,
    or_lanes,
    row_offset,
    row_pad,
    row_ratio,
    row_scale,
)
from .row_math import LOG2E, Want

# The saved values that row_divergence replaces, those of the KL's gradient alone: E_p[u] and
# E_q[v], of a fallback row as hi and lo.
MEAN_U = tl.constexpr(7)
MEAN_U_LO = tl.constexpr(6)
MEAN_V = tl.constexpr(8)
MEAN_V_LO = tl.constexpr(5)


# The constants of a row: its Terms (row_gradient.py), the Mixture, and polynomials' coefficients.
Constants = namedtuple("Constants", "terms mix series")


@triton.jit
def log2_p_and_d(x, difference, lo, scale, terms, COMPENSATED: tl.constexpr):
    """Return log2 p, without the factor terms.factor_p, and D_FACTOR·log(q/p) of entries, for the
    Terms of their row.
    """
    log2_p = tl.fma(x, scale * LOG2E, -terms.lse_p)
    d = tl.fma(difference, scale * D_FACTOR, terms.lse_gap * -D_FACTOR)
    rest = terms.lse_gap_lo * -D_FACTOR
    if COMPENSATED:
        rest = tl.fma(lo, scale * D_FACTOR, rest)
    return log2_p, d + rest


@triton.jit
def divergence_sums(
    row, length, constants, tiling: tl.constexpr, reading: tl.constexpr, kind: tl.constexpr
):
    """Return the parts of the first `length` entries in the divergence and in its moment, for the
    Segment of their row and its Constants.
    """
    want: tl.constexpr = Want(False, True, False, False, kind.compensated, False)
    terms = constants.terms
    TILE: tl.constexpr = tiling.threads * tiling.groups
    scale = row.doubled_scale * (1.0 / D_FACTOR)
    zeros = tl.zeros([tiling.threads, tiling.lanes], tl.float32)
    sums = (zeros, zeros)
    full_end = length // tiling.lanes // TILE * TILE
    for group in range(0, full_end, TILE):
        tile = load_tile(row, group, length, tiling.groups, tiling, want, reading, False)
        log2_ps = ()
        ds = ()
        for g in tl.static_range(tiling.groups):
            log2_p, d = log2_p_and_d(
                tile.x[g], tile.difference[g], tile.lo[g], scale, terms, kind.compensated
            )
            log2_ps += (log2_p,)
            ds += (d,)
            if g == 0:
                bits = d.to(tl.int32, bitcast=True)
            else:
                bits = bits | d.to(tl.int32, bitcast=True)
        if tl.max((or_lanes(bits) >> 30) & 1, 0) > 0:
            for g in tl.static_range(tiling.groups):
                sums = absorb(sums, log2_ps[g], ds[g], constants, kind, False)
        else:
            for g in tl.static_range(tiling.groups):
                sums = absorb(sums, log2_ps[g], ds[g], constants, kind, True)
    for group in range(full_end, tl.cdiv(length, tiling.lanes), tiling.threads):
        tile = load_tile(row, group, length, 1, tiling, want, reading, True)
        log2_p, d = log2_p_and_d(
            tile.x[0], tile.difference[0], tile.lo[0], scale, terms, kind.compensated
        )
        sums = absorb(sums, log2_p, d, constants, kind, False)
    value = tl.sum(lane_sum(sums[0]), 0) * terms.factor_p
    return value, tl.sum(lane_sum(sums[1]), 0) * terms.factor_p


@triton.jit
def fallback_log_probs(
    row, start, end, scale, q_scale, stats, BLOCK: tl.constexpr, reading: tl.constexpr
):
    """Return log p and log q of the entries `start` … of a fallback row as float64, and the logits;
    -inf from `end` on.
    """
    x = load_double(row.p, start, end, BLOCK, reading.softcap)
    y = load_double(row.q, start, end, BLOCK, reading.ref_softcap)
    return log_probability_p(x, stats, scale), log_probability_q(y, stats, q_scale), x, y


@triton.jit
def fallback_terms(log_p, log_q, mix, kind: tl.constexpr):
    """Return the Terms of a fallback row's entries as float64."""
    d = tl.where(log_p == log_q, 0.0, log_q - log_p)
    return entry_terms(tl.exp(log_p), tl.exp(log_q), d, tl.exp(-tl.abs(d)), mix, kind, True)


@triton.jit
def renyi_log_z(row, scale, q_scale, stats, mix, BLOCK: tl.constexpr, reading: tl.constexpr):
    """Return log Σ p^α·q^(1 - α) of a fallback row, and log Σp = log Σq: the saved log-sum-exp, a
    float32, leaves sums that are not 1.
    """
    largest = tl.full([BLOCK], float("-inf"), tl.float64)
    for start in range(0, row.V, BLOCK):
        log_p, log_q, _, _ = fallback_log_probs(
            row, start, row.V, scale, q_scale, stats, BLOCK, reading
        )
        largest = tl.maximum(largest, renyi_exponent(log_p, log_q, mix))
    peak = tl.max(largest, 0)
    total = tl.zeros([BLOCK], tl.float64)
    p = total
    for start in range(0, row.V, BLOCK):
        log_p, log_q, _, _ = fallback_log_probs(
            row, start, row.V, scale, q_scale, stats, BLOCK, reading
        )
        total += tl.exp(renyi_exponent(log_p, log_q, mix) - peak)
        # Of equal rows both sums are of the same numbers.
        p += tl.exp(log_p + stats.log_sum)
    # An infinite peak: P and Q without a common entry (-inf), or p > 0 = q for α > 1.
    log_z = tl.where(tl.abs(peak) < float("inf"), peak + tl.log(tl.sum(total, 0)), peak)
    # A maximum drops a NaN; a log-sum-exp does not.
    log_z += (stats.log_sum + stats.log_sum_ratio) * 0.0
    return log_z, tl.log(tl.sum(p, 0)) - stats.log_sum


@triton.jit
def store_fallback_row(
    value_ptr,
    saved_ptr,
    row,
    mix,
    BLOCK: tl.constexpr,
    reading: tl.constexpr,
    kind: tl.constexpr,
):
    """Write the divergence of a fallback row, summed in float64, and E_p[u] and E_q[v] as hi and
    lo.
    """
    stats = load_row(saved_ptr)
    scale = row.scale.to(tl.float64)
    q_scale = scale * row.ratio.to(tl.float64)
    if kind.name == RENYI:
        log_z, log_sum = renyi_log_z(row, scale, q_scale, stats, mix, BLOCK, reading)
        value = (log_z - log_sum) / -mix.rest.to(tl.float64)
        tl.store(value_ptr, tl.where(value < 0.0, 0.0, value).to(tl.float32))
        store_double(saved_ptr + MEAN_U, saved_ptr + MEAN_U_LO, log_z)
        store_double(saved_ptr + MEAN_V, saved_ptr + MEAN_V_LO, log_sum)
        return
    value = tl.zeros([BLOCK], tl.float64)
    u = value
    v = value
    p = value
    q = value
    for start in range(0, row.V, BLOCK):
        log_p, log_q, _, _ = fallback_log_probs(
            row, start, row.V, scale, q_scale, stats, BLOCK, reading
        )
        terms = fallback_terms(log_p, log_q, mix, kind)
        value += terms.value
        u += terms.to_p
        v += terms.to_q
        p += terms.p
        q += terms.q
    total = tl.sum(value, 0)
    tl.store(value_ptr, tl.where(total < 0.0, 0.0, total).to(tl.float32))
    # Divide by the sums of the probabilities, whose log-sum-exps are saved in float32: where one
    # entry has nearly all of the probability, its gradient is the remainder u - E_p[u].
    store_double(saved_ptr + MEAN_U, saved_ptr + MEAN_U_LO, tl.sum(u, 0) / tl.sum(p, 0))
    store_double(saved_ptr + MEAN_V, saved_ptr + MEAN_V_LO, tl.sum(v, 0) / tl.sum(q, 0))


@triton.jit
def store_double(ptr, lo_ptr, value):
    """Write a float64 as hi and lo."""
    hi = value.to(tl.float32)
    tl.store(ptr, hi)
    tl.store(lo_ptr, (value - hi.to(tl.float64)).to(tl.float32))


@triton.jit
def load_means(saved_ptr):
    """The means that store_fallback_row wrote, as float64; of Rényi's divergence what renyi_log_z
    returned.
    """
    u = tl.load(saved_ptr + MEAN_U).to(tl.float64) + tl.load(saved_ptr + MEAN_U_LO).to(tl.float64)
    v = tl.load(saved_ptr + MEAN_V).to(tl.float64) + tl.load(saved_ptr + MEAN_V_LO).to(tl.float64)
    return u, v


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
        "V",
        "segment",
        "splits",
        "share",
        "rest",
        "curvature",
        *(f"c{i}" for i in range(13)),
    ],
    do_not_specialize_on_alignment=[
        "p_ptr",
        "q_ptr",
        "mask_ptr",
        "temperature_ptr",
        "ratio_ptr",
        "saved_ptr",
        "value_ptr",
        "state_ptr",
        "counter_ptr",
    ],
)
def row_divergence(  # noqa: PLR0913, PLR0915
    p_ptr,
    q_ptr,
    mask_ptr,
    temperature_ptr,
    ratio_ptr,  # as in row_forward
    saved_ptr,  # [N, 10] float32, written by row_forward and row_fallback
    value_ptr,  # [N] float32
    state_ptr,  # [N, splits, 2] float32; any pointer for one split
    counter_ptr,  # [N] int32 of zeros; any pointer for one split
    temperature: tl.float32,
    n_inner: tl.int32,
    stride_p_outer: tl.int64,
    stride_p_inner: tl.int64,
    stride_q_outer: tl.int64,
    stride_q_inner: tl.int64,
    V: tl.int32,
    segment: tl.int32,
    splits: tl.int32,
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
    c12: tl.float32,  # G's seven coefficients and K's six
    SPLITS: tl.constexpr,  # a power of two, at least splits
    THREADS: tl.constexpr,
    LANES: tl.constexpr,
    GROUPS: tl.constexpr,
    KIND: tl.constexpr,
    SMALL_REST: tl.constexpr,
    LG2: tl.constexpr,
    WITH_MOMENT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    TEMPERATURE_PER_ROW: tl.constexpr,
    REALIGN: tl.constexpr,
    Q_IN_BLOCKS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    REF_SOFTCAP: tl.constexpr,
    HAS_RATIO: tl.constexpr,
):
    """Sum one segment of one row of an f-divergence; the last program of a row to finish writes it.

    Of Rényi's divergence, which row_forward has written, it computes the fallback rows.

    Math:   divergence_math.py; defined by f_divergences.divergence.
    Grid:   (N · splits,), a row's segments next to each other, as in row_forward. Parts are added
            in order: a row's bits depend neither on N nor on which program is last.
    Reads:  N·V of p and q, 40 bytes per row; nothing of a masked row.
    Writes: 2 · N · splits float32, read again by the last program; the divergence and, WITH_MOMENT,
            two saved values per row.
    Saves:  E_p[u] and E_q[v] in place of the saved means of the KL's gradient.
    Special values: a fallback row is summed in float64, by its first program alone. A masked row
            gets zeros.
    """
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    if HAS_MASK:
        if tl.load(mask_ptr + row) == 0:
            if split == 0:
                tl.store(value_ptr + row, 0.0)
            return
    COMPENSATED: tl.constexpr = (
        p_ptr.dtype.element_ty == tl.float32 or q_ptr.dtype.element_ty == tl.float32 or HAS_RATIO
    )
    tiling: tl.constexpr = Tiling(THREADS, LANES, GROUPS, REALIGN, Q_IN_BLOCKS)
    reading: tl.constexpr = Reading(False, SOFTCAP, REF_SOFTCAP, HAS_RATIO)
    kind: tl.constexpr = Kind(KIND, SMALL_REST, LG2, WITH_MOMENT, WITH_MOMENT, COMPENSATED)
    saved_ptr += row * SAVED
    p_row = p_ptr + row_offset(row, n_inner, stride_p_outer, stride_p_inner)
    q_row = q_ptr + row_offset(row, n_inner, stride_q_outer, stride_q_inner)
    scale = row_scale(temperature_ptr, temperature, row, row >= 0, TEMPERATURE_PER_ROW)
    ratio = row_ratio(ratio_ptr, row, row >= 0, HAS_RATIO)
    first = split * segment
    length = tl.minimum(segment, V - first)
    share, rest, curvature = float32_values((share, rest, curvature), 3)
    mix = Mixture(share, rest, curvature)
    if is_fallback(saved_ptr):
        if split == 0:
            whole = Row(p_row, q_row, V, row, scale, ratio)
            store_fallback_row(value_ptr + row, saved_ptr, whole, mix, THREADS * 2, reading, kind)
        return
    if KIND == RENYI:
        log_z = tl.load(value_ptr + row) * -rest
        tl.store(saved_ptr + MEAN_U, log_z)
        tl.store(saved_ptr + MEAN_V, log_z)
        return
    pad = 0
    if REALIGN:
        pad = row_pad(p_row)
    zero = tl.full([], 0.0, tl.float32)
    place = Segment(
        p_row + first - pad,
        q_row + first - pad,
        q_row + first,
        pad,
        lane_order(pad, LANES),
        V - first,
        zero,
        scale * D_FACTOR,
        scale * LOG2E,
        ratio,
        zero,
    )
    series = float32_values(
        (c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12), TERMS + MOMENT_TERMS
    )
    constants = Constants(gradient_terms(load_saved(saved_ptr)), mix, series)
    value, moment = divergence_sums(place, length, constants, tiling, reading, kind)
    if SPLITS > 1:
        parts_ptr = state_ptr + tl.program_id(0).to(tl.int64) * 2
        tl.store(parts_ptr, value)
        tl.store(parts_ptr + 1, moment)
        # Order all threads' stores before the one thread's release.
        tl.debug_barrier()
        if tl.atomic_add(counter_ptr + row, 1, sem="acq_rel") != splits - 1:
            return
        offs = tl.arange(0, SPLITS)
        parts = state_ptr + (row * splits + offs) * 2
        # Bypass L1, which may hold stale values.
        inside = offs < splits
        value = tl.sum(tl.load(parts, mask=inside, other=0.0, cache_modifier=".cg"), 0)
        moment = tl.sum(tl.load(parts + 1, mask=inside, other=0.0, cache_modifier=".cg"), 0)
    # NaN stays NaN.
    tl.store(value_ptr + row, tl.where(value < 0.0, 0.0, value))
    if WITH_MOMENT:
        tl.store(saved_ptr + MEAN_U, value - moment)
        tl.store(saved_ptr + MEAN_V, moment)
