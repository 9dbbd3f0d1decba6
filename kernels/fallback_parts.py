"""Fallback rows whose vocabulary is split over processes: each process computes the Fallback of its
part, and every process merges all parts.

Other divergences than the KL need the log-sum-exps of the whole row first. They are gathered with
the states, for each segment, since only merging shows which rows take the fallback.
"""

import triton
import triton.language as tl

from .divergence_math import Sums, add_sums, empty_sums
from .fallback import Fallback, fallback_statistics, peak_ratios
from .row_finish import load_states, row_statistics, store_tuple
from .row_load import D_FACTOR, Reading, RowArguments, compensates, row_at, wide_row
from .row_math import LOG2E, STATE, Kind, Want


@triton.jit
def load_parts(part_ptr, mask):
    """Load the Fallbacks of parts at a vector of addresses; masked ones have no entries."""
    return Fallback(
        tl.load(part_ptr, mask=mask, other=float("-inf")),
        tl.load(part_ptr + 1, mask=mask, other=float("-inf")),
        tl.load(part_ptr + 2, mask=mask, other=0.0),
        tl.load(part_ptr + 3, mask=mask, other=0.0),
        tl.load(part_ptr + 4, mask=mask, other=float("-inf")),
        tl.load(part_ptr + 5, mask=mask, other=0.0),
        tl.load(part_ptr + 6, mask=mask, other=float("-inf")),
        tl.load(part_ptr + 7, mask=mask, other=0.0),
        tl.load(part_ptr + 8, mask=mask, other=0.0),
    )


@triton.jit
def split_log_sum(lse, scale):
    """Return a log-sum-exp as a logit somewhat below it, a float32 number as save_stats requires of
    a peak, and the positive rest.
    """
    below = tl.minimum((lse - tl.fma(tl.abs(lse), 1.0e-6, 1.0)) / scale, 3.0e38)
    peak = below.to(tl.float32).to(tl.float64)
    return peak, lse - peak * scale


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
        "segment",
        "splits",
    ],
    do_not_specialize_on_alignment=[
        "p_ptr",
        "q_ptr",
        "mask_ptr",
        "temperature_ptr",
        "ratio_ptr",
        "state_ptr",
        "log_sums_ptr",
    ],
)
def segment_log_sums(  # noqa: PLR0913
    p_ptr,
    q_ptr,
    mask_ptr,
    temperature_ptr,
    ratio_ptr,
    state_ptr,  # as in row_forward, which has run
    log_sums_ptr,  # [N, splits, 4] float64: peak and log_sum of P, and of Q
    temperature: tl.float32,
    n_inner: tl.int32,
    stride_p_outer: tl.int64,
    stride_p_inner: tl.int64,
    stride_q_outer: tl.int64,
    stride_q_inner: tl.int64,
    V: tl.int32,
    segment: tl.int32,
    splits: tl.int32,
    BLOCK: tl.constexpr,  # entries of a segment read at a time
    HAS_MASK: tl.constexpr,
    TEMPERATURE_PER_ROW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    REF_SOFTCAP: tl.constexpr,
    HAS_RATIO: tl.constexpr,
):
    """Write the log-sum-exps of P and Q over each segment of a part of a split vocabulary, each as
    peak·s + log_sum (s·ratio for Q), since one number cannot hold -1e30 and log V.

    Math:   row_statistics of the segment's state; where that is not valid, fallback_statistics.
    Grid:   (N · splits,), as row_forward.
    Reads:  8 float32 per segment; where they are not valid, 3·V / splits of each tensor; nothing of
            a masked row.
    Writes: 4 float64 per segment, except of masked rows.
    Special values: a peak of -inf for a segment of no entries, or of -inf alone.
    """
    row = (tl.program_id(0) // splits).to(tl.int64)
    first = tl.program_id(0) % splits * segment
    if HAS_MASK and tl.load(mask_ptr + row) == 0:
        return
    want: tl.constexpr = Want(
        False, True, False, Kind(0, False, False),
        compensates(p_ptr.dtype.element_ty, q_ptr.dtype.element_ty, HAS_RATIO), False,
    )  # fmt: skip
    reading: tl.constexpr = Reading(False, SOFTCAP, REF_SOFTCAP, HAS_RATIO)
    whole = row_at(
        RowArguments(
            p_ptr, q_ptr, mask_ptr, temperature_ptr, ratio_ptr, temperature, n_inner,
            stride_p_outer, stride_p_inner, stride_q_outer, stride_q_inner, V,  # no token is read
        ),
        row, TEMPERATURE_PER_ROW, HAS_RATIO,
    )  # fmt: skip
    part = wide_row(whole, first, tl.minimum(segment, V - first))
    one = tl.arange(0, 1)
    states = load_states(state_ptr + (tl.program_id(0).to(tl.int64) + one) * STATE, one == 0, want)
    # Of the KL: gamma is not read.
    scale = whole.doubled_scale * (1.0 / D_FACTOR)
    statistics = row_statistics(states, scale, scale, want)
    unshifted = statistics.unshifted
    # These are base-2 and refer to a rounded scale: divide by that scale.
    factor = part.scale / (scale * LOG2E).to(tl.float64)
    lse = (unshifted.origin.to(tl.float64) + unshifted.log2_S.to(tl.float64)) * factor
    ref_lse = (unshifted.log2_Z_q.to(tl.float64) + unshifted.log2_Z_q_lo.to(tl.float64)) * factor
    x_peak, log_sum = split_log_sum(lse, part.scale)
    y_peak, ref_log_sum = split_log_sum(
        ref_lse + statistics.shift.to(tl.float64) * part.scale, part.q_scale
    )
    if statistics.valid == 0:
        stats = fallback_statistics(part, BLOCK, True, reading, True)
        x_peak, log_sum, y_peak = stats.x_peak, stats.log_sum, stats.y_peak
        ref_log_sum = log_sum + stats.log_sum_ratio
    store_tuple(
        log_sums_ptr + tl.program_id(0).to(tl.int64) * 4, (x_peak, log_sum, y_peak, ref_log_sum)
    )


@triton.jit
def fallback_of_log_sums(ptr, mask, scale, q_scale):
    """Return a Fallback that gives the log-probabilities, from the results of segment_log_sums at a
    vector of addresses; log_sum stands in for the means and the entropy.
    """
    x_peak, log_sum, _ = part_shares(
        tl.load(ptr, mask=mask, other=float("-inf")), tl.load(ptr + 1, mask=mask, other=0.0), scale
    )
    y_peak, ref_log_sum, _ = part_shares(
        tl.load(ptr + 2, mask=mask, other=float("-inf")),
        tl.load(ptr + 3, mask=mask, other=0.0),
        q_scale,
    )
    return Fallback(
        x_peak, y_peak, log_sum, ref_log_sum - log_sum, y_peak, log_sum, x_peak, log_sum, log_sum
    )  # fmt: skip


@triton.jit
def merge_sums(ptr, mask, kind: tl.constexpr):
    """Return the Sums of a row from those of its parts, [7] float64 at a vector of addresses."""
    empty = empty_sums(0.0, kind)
    return add_sums(
        Sums(
            tl.load(ptr, mask=mask, other=empty.value),
            tl.load(ptr + 1, mask=mask, other=empty.u),
            tl.load(ptr + 2, mask=mask, other=empty.v),
            tl.load(ptr + 3, mask=mask, other=empty.p),
            tl.load(ptr + 4, mask=mask, other=empty.q),
            tl.load(ptr + 5, mask=mask, other=empty.x),
            tl.load(ptr + 6, mask=mask, other=empty.y),
        ),
        kind,
    )


@triton.jit
def part_shares(peaks, log_sums, scale):
    """Return the peak and log_sum of a row from those of its parts, and the logarithms of the
    parts' probabilities.
    """
    peak = tl.max(peaks, 0)
    logs = (peaks - peak) * scale + log_sums
    log_sum = tl.log(tl.sum(tl.exp(logs), 0))
    return peak, log_sum, logs - log_sum


@triton.jit
def mean_of_parts(share, means, at_peaks, at_peak, gap, infinite):
    """Return E[d - d at the row's peak] from each part's mean about its own peak; a part's d is
    smaller by `gap`. Return `infinite` if a part with probability has an infinite d at its peak or
    an infinite gap.
    """
    inside = tl.where(
        (at_peaks == infinite) | (gap == infinite), infinite, means + ((at_peaks - at_peak) + gap)
    )
    return tl.sum(tl.where(share == 0.0, 0.0, share * inside), 0)


@triton.jit
def merge_parts(parts, scale, q_scale, WITH_KL: tl.constexpr):
    """Return the Fallback of a row from its parts' Fallbacks, given as vectors.

    Chain rule: d is the part's d plus the log-ratio of the part's probabilities under Q and P.
    """
    x_peak, log_sum, log_p = part_shares(parts.x_peak, parts.log_sum, scale)
    p = tl.exp(log_p)
    entropy = tl.sum(tl.where(p == 0.0, 0.0, p * (parts.entropy - log_p)), 0)
    if WITH_KL:
        y_peak, q_log_sum, log_q = part_shares(
            parts.y_peak, parts.log_sum + parts.log_sum_ratio, q_scale
        )
        q = tl.exp(log_q)
        gap = log_q - log_p
        y_at_x_peak = tl.max(tl.where(parts.x_peak == x_peak, parts.y_at_x_peak, float("-inf")), 0)
        x_at_y_peak = tl.max(tl.where(parts.y_peak == y_peak, parts.x_at_y_peak, float("-inf")), 0)
        stats = Fallback(
            x_peak, y_peak, log_sum, q_log_sum - log_sum, y_at_x_peak, log_sum, x_at_y_peak,
            log_sum, entropy,
        )  # fmt: skip
        at_x_peak, at_y_peak = peak_ratios(stats, scale, q_scale)
        at_x_peaks, at_y_peaks = peak_ratios(parts, scale, q_scale)
        return Fallback(
            x_peak, y_peak, log_sum, q_log_sum - log_sum, y_at_x_peak,
            mean_of_parts(p, parts.mean_p_from_peak, at_x_peaks, at_x_peak, gap, float("-inf")),
            x_at_y_peak,
            mean_of_parts(q, parts.mean_q_from_peak, at_y_peaks, at_y_peak, gap, float("inf")),
            entropy,
        )  # fmt: skip
    else:
        return Fallback(
            x_peak, x_peak, log_sum, log_sum * 0.0, x_peak, log_sum, x_peak, log_sum, entropy
        )
