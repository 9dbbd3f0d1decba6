"""Fallback rows whose vocabulary is split over processes: each process computes the Fallback of its
part, and every process merges all parts.
"""

import triton
import triton.language as tl

from .fallback import Fallback, peak_ratios


@triton.jit
def store_part(part_ptr, stats):
    """Write the Fallback of a part of a row, [9] float64."""
    for i in tl.static_range(9):
        tl.store(part_ptr + i, stats[i])


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
        mean_p = mean_of_parts(p, parts.mean_p_from_peak, at_x_peaks, at_x_peak, gap, float("-inf"))
        mean_q = mean_of_parts(q, parts.mean_q_from_peak, at_y_peaks, at_y_peak, gap, float("inf"))
        return Fallback(
            x_peak, y_peak, log_sum, q_log_sum - log_sum, y_at_x_peak, mean_p, x_at_y_peak,
            mean_q, entropy,
        )  # fmt: skip
    else:
        return Fallback(
            x_peak, x_peak, log_sum, log_sum * 0.0, x_peak, log_sum, x_peak, log_sum, entropy
        )
