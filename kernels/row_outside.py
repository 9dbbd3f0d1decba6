"""The log-sum-exp of a row's logits over the entries not in a list, in one read."""

import triton
import triton.language as tl

from .fallback import SIGN_BIT
from .row_finish import SAVED
from .row_load import (
    Reading,
    Segment,
    Tiling,
    lane_order,
    lane_sum,
    load_logit,
    load_tile,
    row_offset,
    row_pad,
    row_scale,
)
from .row_math import LARGEST_LOG2_SUM, LN2, LOG2E, LOWEST, OF_KL, Kind, Want

# Logits below LOWEST_PRODUCT / max(log2(e)/T, 1) count as masked: their products may overflow.
LOWEST_PRODUCT = tl.constexpr(-1.0e38)
# Origin of an empty sum, below every other origin.
NO_ORIGIN = tl.constexpr(-2.0e38)


@triton.jit
def list_entries(ids_ptr, logprob_ptr, K, V, IDS: tl.constexpr):
    """Return a list's ids and its log-probs as float64, [IDS]; V and -inf for an absent entry, one
    with a log-prob of -inf or an id outside 0 … V-1.
    """
    offs_k = tl.arange(0, IDS)
    log_p = tl.load(logprob_ptr + offs_k, mask=offs_k < K, other=float("-inf")).to(tl.float64)
    ids = tl.load(ids_ptr + offs_k, mask=offs_k < K, other=V)
    present = (ids >= 0) & (ids < V) & (log_p != float("-inf"))
    return tl.where(present, ids, V).to(tl.int32), tl.where(present, log_p, float("-inf"))


@triton.jit
def wide_scale(scale, temperature_ptr, temperature, row, PER_ROW: tl.constexpr):
    """Return 1/T as float64; NaN if `scale`, its rounded value, is."""
    if PER_ROW:
        temperature = tl.load(temperature_ptr + row)
    wide = tl.full([], 1.0, tl.float64) / tl.cast(temperature, tl.float64)
    return tl.where(scale == scale, wide, scale.to(tl.float64))


@triton.jit
def compensated_scale(scale, temperature_ptr, temperature, row, PER_ROW: tl.constexpr):
    """Return log2(e)/T as hi and lo; NaN if `scale`, the rounded 1/T, is."""
    wide = wide_scale(scale, temperature_ptr, temperature, row, PER_ROW)
    wide *= tl.full([], LOG2E, tl.float64)
    hi = wide.to(tl.float32)
    return hi, (wide - hi.to(tl.float64)).to(tl.float32)


@triton.jit
def whole_exponent(peak, scale_log2, scale_lo):
    """Return ⌊peak·s·LOG2E⌋ as hi and lo, two whole numbers; (NO_ORIGIN, 0) for a peak of -inf.

    lo corrects hi for the product's rounding: by 1 next to a whole number, by more beyond 2^24.
    """
    hi = tl.floor(peak * scale_log2)
    lo = tl.floor(tl.fma(peak, scale_lo, tl.fma(peak, scale_log2, -hi)))
    none = peak == float("-inf")
    return tl.where(none, NO_ORIGIN, hi), tl.where(none, 0.0, lo)


@triton.jit
def outside_sum(  # noqa: PLR0913
    part,
    length,
    ids,
    ids_ptr,
    K,
    first,
    tiling: tl.constexpr,
    reading: tl.constexpr,
    SORTED: tl.constexpr,
):
    """Return (peak, sum) of the first `length` entries of a Segment that starts at entry `first`,
    without those at `ids`, relative to it, a list of K in memory: the largest entry, -inf if there
    is none, and Σ 2^(x·s·LOG2E - origin), with origin the whole_exponent of the peak.

    part.second: the low part of the scale.
    """
    V = first + part.remaining
    want: tl.constexpr = Want(False, False, False, Kind(OF_KL, False, False), False, False)
    TILE: tl.constexpr = tiling.threads * tiling.lanes
    place = tl.sum((ids < 0).to(tl.int32), 0)
    lowest = LOWEST_PRODUCT / tl.maximum(part.scale_log2, 1.0)
    peak = tl.full([], float("-inf"), tl.float32)
    origin, origin_lo = whole_exponent(peak, part.scale_log2, part.second)
    # Float64: a gradient is the small difference of the student's and the teacher's rest.
    total = tl.zeros([tiling.threads], tl.float64)
    listed = tl.min(tl.where(ids >= 0, ids, V), 0)
    entry = tl.arange(0, tiling.threads)[:, None] * tiling.lanes + part.order
    for start in range(0, length, TILE):
        tile = load_tile(part, start // tiling.lanes, length, 1, tiling, want, reading, True)
        x = tl.where(tile.inside[0], tile.x[0], float("-inf"))
        while listed < tl.minimum(start + TILE, length):
            x = tl.where(entry == listed - start, float("-inf"), x)
            if SORTED:
                place += 1
                listed = tl.load(ids_ptr + place, mask=place < K, other=V).to(tl.int32) - first
            else:
                listed = tl.min(tl.where(ids > listed, ids, V), 0)
        largest = tl.max(tl.max(x, 1), 0)
        peak = tl.where(largest > lowest, tl.maximum(peak, largest), peak)
        raised, raised_lo = whole_exponent(peak, part.scale_log2, part.second)
        # Use both parts of the scale: a KL of 1e-8 cannot afford an exponent off by 1e-6.
        exponent = tl.fma(x, part.second, tl.fma(x, part.scale_log2, -raised)) - raised_lo
        # A logit of +inf or NaN makes the sum NaN.
        e = tl.where(x > lowest, tl.exp2(exponent), tl.where(x == x, 0.0, x))
        # Origins are whole numbers, so rescaling is exact.
        total *= tl.exp2((origin - raised) + (origin_lo - raised_lo)).to(tl.float64)
        total += lane_sum(e).to(tl.float64)
        origin, origin_lo = raised, raised_lo
    return peak, tl.sum(total, 0)


@triton.jit
def store_outside(log_sum_ptr, peak_ptr, saved_ptr, peak, total, scale, scale_log2, scale_lo):
    """Write a row's results and saved values from its peak and sum, as returned by outside_sum."""
    offs_saved = tl.arange(0, 16)
    origin, origin_lo = whole_exponent(peak, scale_log2, scale_lo)
    huge = tl.abs(origin) > LARGEST_LOG2_SUM
    # peak·s·LOG2E - (origin + origin_lo); in a huge row with the sum's rounding.
    wide_scale_log2 = scale_log2.to(tl.float64) + scale_lo.to(tl.float64)
    above = tl.where(
        huge,
        (tl.fma(peak, scale_lo, tl.fma(peak, scale_log2, -origin)) - origin_lo).to(tl.float64),
        peak.to(tl.float64) * wide_scale_log2 - origin.to(tl.float64) - origin_lo.to(tl.float64),
    )
    # A float64 tensor, whatever the type of a bare constant.
    log_sum = tl.log(total) - above * tl.full([], LN2, tl.float64)
    empty = total == 0.0
    tl.store(log_sum_ptr, tl.where(empty, float("-inf"), log_sum))
    tl.store(peak_ptr, tl.where(empty, float("-inf"), peak.to(tl.float64)))
    marked = tl.maximum(log_sum, 0.0).to(tl.float32).to(tl.int32, bitcast=True) | SIGN_BIT
    fallback_saved = tl.where(offs_saved == 0, peak, marked.to(tl.float32, bitcast=True))
    # Backward multiplies by the rounded scale: correct for it at the peak. Add 1, because a
    # negative log2_S would mark a fallback row.
    rounding = peak.to(tl.float64) * (wide_scale_log2 - (scale * LOG2E).to(tl.float64))
    log2_S = tl.log2(total.to(tl.float32)) + (1.0 - rounding.to(tl.float32))
    saved = tl.where(offs_saved == 0, origin + origin_lo - 1.0, log2_S)
    saved = tl.where(huge, fallback_saved, saved)
    # For an empty rest, a log-sum-exp so high that every probability is 0.
    saved = tl.where(empty, tl.where(offs_saved == 0, -LOWEST, 0.0), saved)
    tl.store(saved_ptr + offs_saved, tl.where(offs_saved < 2, saved, 0.0), mask=offs_saved < SAVED)


# Row counts, strides, lengths and base addresses vary from step to step and must not cause a
# recompile.
@triton.jit(
    do_not_specialize=[
        "temperature",
        "n_inner",
        "stride_p_outer",
        "stride_p_inner",
        "stride_q_outer",
        "stride_q_inner",
        "V",
        "K",
        "segment",
        "splits",
    ],
    do_not_specialize_on_alignment=[
        "p_ptr",
        "mask_ptr",
        "temperature_ptr",
        "ids_ptr",
        "logprob_ptr",
        "totals_ptr",
        "counter_ptr",
        "entries_ptr",
        "log_sum_ptr",
        "peak_ptr",
        "saved_ptr",
    ],
)
def row_outside(  # noqa: PLR0913
    p_ptr,
    mask_ptr,
    temperature_ptr,  # as in row_forward
    ids_ptr,  # [N, K] int32 or int64; if SORTED, sorted in each row, V for an absent id
    logprob_ptr,  # [N, K], see list_entries; any pointer if SORTED
    totals_ptr,  # [N, splits, 2] float64; any pointer for one split
    counter_ptr,  # [N] int32 of zeros; any pointer for one split
    entries_ptr,  # [N, K + 3] float32, the first K of each row written; any pointer if SORTED
    log_sum_ptr,  # [N] float64
    peak_ptr,  # [N] float64
    saved_ptr,  # [N, 10] float32
    temperature: tl.float64,
    n_inner: tl.int32,
    stride_p_outer: tl.int64,
    stride_p_inner: tl.int64,
    stride_q_outer: tl.int64,
    stride_q_inner: tl.int64,
    V: tl.int32,
    K: tl.int32,
    segment: tl.int32,
    splits: tl.int32,
    IDS: tl.constexpr,  # a power of two, at least K
    SORTED: tl.constexpr,  # no limit for K; otherwise a segment takes K operations per listed id
    SPLITS: tl.constexpr,  # a power of two, at least splits
    THREADS: tl.constexpr,
    LANES: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    TEMPERATURE_PER_ROW: tl.constexpr,
    REALIGN: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Sum one segment of one row outside its list; the row's last program to finish writes the
    result.

    Math:   the largest entry not listed, and log Σ exp((x - largest)/T) over the entries not
            listed.
    Grid:   (N · splits,), a row's segments next to each other, as in row_forward.
    Reads:  N·V of p, N·K·splits of ids and (unless SORTED) of logprobs, from cache but for the
            first split; nothing of a masked row.
    Writes: 2 · N · splits float64, read again by the last program; 10 saved values and two results
            per row; unless SORTED, the N·K soft-capped logits at present ids, in the list's order.
    Saves:  values for the backward of a policy alone with the rest as its vocabulary: origin - 1,
            and log2(sum) + 1, corrected for the rounded scale at the peak; beyond LARGEST_LOG2_SUM
            the peak and the marked log_sum, as fallback.save_stats. Zeros otherwise.
    Special values: both results are -inf if no entry is left; the log-sum-exp is NaN if an entry is
            NaN or +inf. A masked row gets zeros.
    """
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    saved_ptr += row * SAVED
    if HAS_MASK:
        if tl.load(mask_ptr + row) == 0:
            if split == 0:
                tl.store(log_sum_ptr + row, 0.0)
                tl.store(peak_ptr + row, 0.0)
                tl.store(saved_ptr + tl.arange(0, 16), 0.0, mask=tl.arange(0, 16) < SAVED)
            return
    tiling: tl.constexpr = Tiling(THREADS, LANES, GROUPS, REALIGN, True)
    reading: tl.constexpr = Reading(False, SOFTCAP, 0.0, False)
    p_row = p_ptr + row_offset(row, n_inner, stride_p_outer, stride_p_inner)
    scale = row_scale(temperature_ptr, temperature, row, row >= 0, TEMPERATURE_PER_ROW)
    scale_log2, scale_lo = compensated_scale(
        scale, temperature_ptr, temperature, row, TEMPERATURE_PER_ROW
    )
    first = split * segment
    pad = row_pad(p_row, REALIGN)
    start = p_row + first - pad
    part = Segment(
        start, start, start, pad, lane_order(pad, LANES), V - first, scale, scale,
        scale_log2, scale, scale, scale_lo,  # in place of a Second
    )  # fmt: skip
    offs_k = tl.arange(0, IDS)
    ids_ptr += row * K
    if SORTED:
        ids = tl.load(ids_ptr + offs_k, mask=offs_k < K, other=V).to(tl.int32)
    else:
        ids, _ = list_entries(ids_ptr, logprob_ptr + row * K, K, V, IDS)
        inside = (ids >= first) & (ids < tl.minimum(first + segment, V))
        listed = load_logit(p_row, ids, inside, 0.0, SOFTCAP)
        tl.store(entries_ptr + row * (K + 3) + offs_k, listed, mask=inside)
    peak, total = outside_sum(
        part,
        tl.minimum(segment, V - first),
        ids - first,
        ids_ptr,
        K,
        first,
        tiling,
        reading,
        SORTED,
    )
    if SPLITS > 1:
        parts_ptr = totals_ptr + tl.program_id(0).to(tl.int64) * 2
        tl.store(parts_ptr, peak.to(tl.float64))
        tl.store(parts_ptr + 1, total)
        # Order all threads' stores before the release by one thread.
        tl.debug_barrier()
        if tl.atomic_add(counter_ptr + row, 1, sem="acq_rel") != splits - 1:
            return
        offs = tl.arange(0, SPLITS)
        parts, inside = totals_ptr + (row * splits + offs) * 2, offs < splits
        # Bypass L1, which may hold stale values.
        peaks = tl.load(parts, mask=inside, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(parts + 1, mask=inside, other=0.0, cache_modifier=".cg")
        peak = tl.max(peaks, 0).to(tl.float32)
        origin, origin_lo = whole_exponent(peak, scale_log2, scale_lo)
        origins, lows = whole_exponent(peaks.to(tl.float32), scale_log2, scale_lo)
        total = tl.sum(totals * tl.exp2((origins - origin) + (lows - origin_lo)).to(tl.float64), 0)
    store_outside(
        log_sum_ptr + row, peak_ptr + row, saved_ptr, peak, total, scale, scale_log2, scale_lo
    )
