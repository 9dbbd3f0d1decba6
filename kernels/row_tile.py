"""Loads a tile of a row: its logits of P and the differences to those of Q."""

from typing import NamedTuple

import triton
import triton.language as tl

from .row_load import load_elements, load_group
from .row_math import LOWEST, scale_reference, soft_cap, split_sum, subtract

# The loop keeps D_SCALE·d: bit 30 of its float32 pattern is set if |d| is 1 or more, also for an
# infinity and a NaN.
D_SCALE = tl.constexpr(2.0)


class Tiling(NamedTuple):
    """Compile-time: how a program reads a row; rows of REALIGN start anywhere, Q_IN_BLOCKS says
    that Q's rows start where P's do.
    """

    threads: int
    lanes: int
    groups: int
    realign: bool
    q_in_blocks: bool


class Segment(NamedTuple):
    """The addresses of a segment and the constants of its row. V: entries from the segment's first
    to the end of the row.

    p_block, q_block: the 16-byte boundary at or before the first entry, `pad` entries further.
    order: the entry of its group that each lane holds. shift: row_load.row_shift. doubled_scale:
    D_SCALE/T; scale2: log2(e)/T.
    """

    p_block: tl.tensor
    q_block: tl.tensor
    q_row: tl.tensor
    pad: tl.tensor
    order: tl.tensor
    V: tl.tensor
    shift: tl.tensor
    doubled_scale: tl.tensor
    scale2: tl.tensor
    ratio: tl.tensor


class Tile(NamedTuple):
    """Entries of a row, tuples of a [threads, lanes] tensor per group.

    difference: y - x, rounded, less the row's shift; lost: what its rounding lost. inside: whether
    an entry is one of the segment.
    """

    x: tl.tuple
    difference: tl.tuple
    lost: tl.tuple
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
    """The Tile of GROUPS groups per thread from `first_group` on; EDGE leaves out entries from
    `end` on.
    """
    THREADS: tl.constexpr = tiling.threads
    LANES: tl.constexpr = tiling.lanes
    xs = ()
    differences = ()
    losts = ()
    insides = ()
    for g in tl.static_range(GROUPS):
        group = first_group + g * THREADS + tl.arange(0, THREADS)[:, None]
        x = load_group(row.p_block, group, row.pad, row.V, tiling.realign, EDGE, LANES)
        x = soft_cap(x, reading.softcap, row.p_block.dtype.element_ty)
        inside = group * LANES + row.order < end
        if EDGE:
            x = tl.where(inside, x, LOWEST)
        difference = x
        lost = x
        if want.kl:
            if tiling.q_in_blocks:
                y = load_group(row.q_block, group, row.pad, row.V, tiling.realign, EDGE, LANES)
            else:
                y = load_elements(row.q_row, group, row.pad, row.V, EDGE, LANES)
            y = soft_cap(y, reading.ref_softcap, row.q_row.dtype.element_ty)
            y, y_lost = scale_reference(y, row.ratio, reading.ratio)
            difference, lost = subtract(y, x, want.exact)
            if want.exact:
                difference, more = split_sum(difference, -row.shift)
                lost = lost + more
            if reading.ratio:
                lost = lost + y_lost
            if EDGE:
                difference = tl.where(inside, difference, 0.0)
                lost = tl.where(inside, lost, 0.0)
        xs += (x,)
        differences += (difference,)
        losts += (lost,)
        insides += (inside,)
    return Tile(xs, differences, losts, insides)
