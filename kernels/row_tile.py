"""Loads a tile of a row: its logits of P and the differences to those of Q."""

from typing import NamedTuple

import triton
import triton.language as tl

from .row_load import load_elements, load_group
from .row_math import LOWEST, scale_reference, soft_cap, subtract, two_sum

# The loop keeps D_FACTOR·d: bit 30 of its float32 pattern is set if |d| is 1 or more, also for an
# infinity and a NaN.
D_FACTOR = tl.constexpr(2.0)


class Tiling(NamedTuple):
    """Compile-time: how a program reads a row.

    realign: rows may start off a 16-byte boundary. q_in_blocks: Q's rows start as far from one as
    P's.
    """

    threads: int
    lanes: int
    groups: int
    realign: bool
    q_in_blocks: bool


class Segment(NamedTuple):
    """The addresses of a segment and the constants of its row.

    p_block, q_block: the 16-byte boundary `pad` entries before the first one. remaining: entries
    from the first to the end of the row. order: the entry of its group that each lane holds. shift:
    row_load.row_shift. doubled_scale: D_FACTOR/T; scale_log2: log2(e)/T.
    """

    p_block: tl.tensor
    q_block: tl.tensor
    q_row: tl.tensor
    pad: tl.tensor
    order: tl.tensor
    remaining: tl.tensor
    shift: tl.tensor
    doubled_scale: tl.tensor
    scale_log2: tl.tensor
    ratio: tl.tensor


class Tile(NamedTuple):
    """Entries of a row: tuples with one [threads, lanes] tensor per group.

    difference + lo = y - x - shift. inside: whether an entry is one of the segment.
    """

    x: tl.tuple
    difference: tl.tuple
    lo: tl.tuple
    inside: tl.tuple


@triton.jit
def load_tile(
    row,
    first_group,
    end,
    GROUPS: tl.constexpr,
    tiling: tl.constexpr,
    want: tl.constexpr,
    reading: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Load GROUPS groups per thread from `first_group` on; EDGE masks entries from `end` on."""
    THREADS: tl.constexpr = tiling.threads
    LANES: tl.constexpr = tiling.lanes
    xs = ()
    differences = ()
    los = ()
    insides = ()
    for g in tl.static_range(GROUPS):
        group = first_group + g * THREADS + tl.arange(0, THREADS)[:, None]
        x = load_group(row.p_block, group, row.pad, row.remaining, tiling.realign, EDGE, LANES)
        x = soft_cap(x, reading.softcap, row.p_block.dtype.element_ty)
        inside = group * LANES + row.order < end
        if EDGE:
            x = tl.where(inside, x, LOWEST)
        difference = x
        lo = x
        if want.kl:
            if tiling.q_in_blocks:
                y = load_group(
                    row.q_block, group, row.pad, row.remaining, tiling.realign, EDGE, LANES
                )
            else:
                y = load_elements(row.q_row, group, row.pad, row.remaining, EDGE, LANES)
            y = soft_cap(y, reading.ref_softcap, row.q_row.dtype.element_ty)
            y, y_lo = scale_reference(y, row.ratio, reading.ratio)
            difference, lo = subtract(y, x, want.compensated)
            if want.compensated:
                difference, more = two_sum(difference, -row.shift)
                lo = lo + more
            if reading.ratio:
                lo = lo + y_lo
            if EDGE:
                difference = tl.where(inside, difference, 0.0)
                lo = tl.where(inside, lo, 0.0)
        xs += (x,)
        differences += (difference,)
        los += (lo,)
        insides += (inside,)
    return Tile(xs, differences, los, insides)
