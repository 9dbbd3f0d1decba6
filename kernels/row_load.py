"""Read a row in 16-byte blocks at any alignment, with an order of addition independent of it.

A block is 16 aligned bytes: LANES elements, 4 or 8. A lane is one of these positions, not a thread
of a warp: a thread holds all lanes of a group.

A row that does not start on a 16-byte boundary (V or a stride is not a multiple of a block, a
slice) is read in the aligned blocks that contain it. Group g is the row's logical elements
g·LANES … g·LANES + LANES - 1: they lie in block g from lane `pad` on and in block g + 1 before it,
so a select by lane puts a whole group into one thread, its lanes rotated by `pad`. Sums over lanes
(lane_sum) are built as a tree that a rotation leaves unchanged to the bit: a row gives the same
result at any alignment, hence at any position of a batch.
"""

from collections import namedtuple

import triton
import triton.language as tl

from .row_math import LARGEST_SHIFT, LOWEST, scale_reference, soft_cap, subtract, two_sum

# The loop keeps D_FACTOR·d: bit 30 of its float32 pattern is set if |d| is 1 or more, or if d is an
# infinity or NaN.
D_FACTOR = tl.constexpr(2.0)


# Compile-time: whether a row has a sampled token, and how raw logits are transformed: by soft
# caps (0: none) and by a ratio of inverse temperatures.
Reading = namedtuple("Reading", "tokens softcap ref_softcap ratio")


@triton.constexpr_function
def compensates(p_type, q_type, has_ratio):
    """Return Want.compensated for logits of these dtypes."""
    return tl.float32 in (p_type, q_type) or has_ratio


@triton.jit
def row_offset(row, n_inner, stride_outer, stride_inner):
    """Return the offset in elements of a row of a [outer, inner, V] tensor; row is int64."""
    return (row // n_inner) * stride_outer + (row % n_inner) * stride_inner


@triton.jit
def row_scale(temperature_ptr, temperature, row, mask, TEMPERATURE_PER_ROW: tl.constexpr):
    """Return 1/T of a row or of a vector of rows, 1 where masked; NaN outside 2^-126 … 2^126."""
    if TEMPERATURE_PER_ROW:
        temperature = tl.load(temperature_ptr + row, mask=mask, other=1.0)
    scale = tl.div_rn(1.0, tl.cast(temperature, tl.float32))
    return tl.where((scale >= 2.0**-126) & (scale <= 2.0**126), scale, float("nan"))


# The arguments of a kernel that locate and scale its rows: pointers to logits, tokens, temperatures
# and ratios, and the layout of row_forward.
RowArguments = namedtuple(
    "RowArguments",
    "p q tokens temperatures ratios temperature n_inner stride_p_outer stride_p_inner "
    "stride_q_outer stride_q_inner V",
)


# The addresses of a row of P and of Q, its length, the address of its sampled token, D_FACTOR/T,
# and the inverse temperature of Q over that of P.
#
# The loop over a segment reads doubled_scale: halve it only after the loop, to save a register.
Row = namedtuple("Row", "p q V token_ptr doubled_scale ratio")


@triton.jit
def row_at(args, row, PER_ROW: tl.constexpr, HAS_RATIO: tl.constexpr):
    """Return the Row with this number, from RowArguments or more; row is int64."""
    return Row(
        args.p + row_offset(row, args.n_inner, args.stride_p_outer, args.stride_p_inner),
        args.q + row_offset(row, args.n_inner, args.stride_q_outer, args.stride_q_inner),
        args.V,
        args.tokens + row,
        row_scale(args.temperatures, args.temperature, row, row >= 0, PER_ROW) * D_FACTOR,
        tl.load(args.ratios + row) if HAS_RATIO else tl.full([], 1.0, tl.float32),
    )


# A part of a Row, with 1/T of P and of Q as float64.
WideRow = namedtuple("WideRow", "p q V token_ptr scale q_scale")


@triton.jit
def wide_row(row, first, length):
    """Return the WideRow of `length` entries of a Row from `first` on."""
    scale = row.doubled_scale.to(tl.float64) * (1.0 / D_FACTOR)
    return WideRow(
        row.p + first, row.q + first, length, row.token_ptr, scale,
        scale * row.ratio.to(tl.float64),
    )  # fmt: skip


@triton.jit
def load_logit(row_ptr, index, mask, other, SOFTCAP: tl.constexpr):
    """Load capped logits as float32; `other`, capped, where masked."""
    logits = tl.load(row_ptr + index, mask=mask, other=other).to(tl.float32)
    return soft_cap(logits, SOFTCAP, row_ptr.dtype.element_ty)


@triton.jit
def entry_difference(p_row, q_row, index, mask, ratio, reading: tl.constexpr):
    """Return y - x of one entry of a row or of a vector of rows."""
    x = load_logit(p_row, index, mask, 0.0, reading.softcap)
    y = load_logit(q_row, index, mask, 0.0, reading.ref_softcap)
    return scale_reference(y, ratio, reading.ratio)[0] - x


@triton.jit
def segment_shift(p_row, q_row, length, ratio, reading: tl.constexpr):
    """Return a whole number near the median of y - x at three of `length` entries, which is near a
    constant offset between the tensors if there is one; 0 if it is large or not finite.

    Subtract it before accumulating: with Q = P + 50, float32 differences would be rounded at the
    magnitude of 50. An approximate shift is enough.
    """
    mask = length > 0
    a = entry_difference(p_row, q_row, length // 4, mask, ratio, reading)
    b = entry_difference(p_row, q_row, length // 2, mask, ratio, reading)
    c = entry_difference(p_row, q_row, length - 1 - length // 4, mask, ratio, reading)
    shift = tl.floor(tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c)) + 0.5)
    return tl.where(tl.abs(shift) < LARGEST_SHIFT, shift, 0.0)


@triton.jit
def row_pad(row_ptr, REALIGN: tl.constexpr):
    """Count the elements between the last 16-byte boundary and the row's first element; 0 unless
    REALIGN.
    """
    itemsize: tl.constexpr = row_ptr.dtype.element_ty.primitive_bitwidth // 8
    return (row_ptr.to(tl.int64) % 16).to(tl.int32) // itemsize if REALIGN else 0


@triton.jit
def block_of(row_ptr, pad, LANES: tl.constexpr, IN_BLOCKS: tl.constexpr):
    """Return the address `pad` elements before a row; IN_BLOCKS: a multiple of LANES elements."""
    # Give the hint where the pointer is computed: on a function argument it is lost in inlining.
    itemsize: tl.constexpr = row_ptr.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of(row_ptr - pad, LANES * itemsize if IN_BLOCKS else 1)


@triton.jit
def lane_order(pad, LANES: tl.constexpr):
    """Return the element of its group that each lane holds, [1, LANES]."""
    return (tl.arange(0, LANES)[None, :] + (LANES - pad)) % LANES


@triton.jit
def lane_sum(z):
    """Sum over axis 1 as a tree over lanes l and l + n/2: rotating the lanes changes no bit
    (addition commutes).
    """
    THREADS: tl.constexpr = z.shape[0]
    n: tl.constexpr = z.shape[1]
    half = tl.sum(tl.reshape(z, [THREADS, 2, n // 2]), 1) if n > 4 else z
    return tl.sum(tl.sum(tl.reshape(half, [THREADS, 2, 2]), 1), 1)


@triton.jit
def or_lanes(bits):
    """Return the bitwise or over axis 1, within each thread; not tl.reduce_or, which the
    interpreter runs element by element.
    """
    LANES: tl.constexpr = bits.shape[1]
    pairs = bits if LANES == 2 else tl.reshape(bits, [bits.shape[0], LANES // 2, 2])
    low, high = tl.split(pairs)
    return low | high if LANES == 2 else or_lanes(low | high)


@triton.jit
def prefetch(ptr, length, enabled):
    """Prefetch `length` elements into L2, from the 16-byte boundary at or before ptr, if `enabled`
    is 1: one instruction of sm_90 and later.
    """
    size = length * (ptr.dtype.element_ty.primitive_bitwidth // 8) // 16 * 16 * enabled
    tl.inline_asm_elementwise(
        "{ .reg .pred any; .reg .b64 start; and.b64 start, $1, -16; setp.gt.s32 any, $2, 0;"
        " @any cp.async.bulk.prefetch.L2.global [start], $2; mov.u32 $0, 0; }",
        "=r,l,r", [ptr.to(tl.int64), size], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def select_mask(pad, LANES: tl.constexpr):
    """Return [1, 4] int32: the bits of each 32-bit word that come from a group's own block; the
    others come from the next.
    """
    # The elements of a group in both halves of a word.
    low = tl.arange(0, 4)[None, :] * (LANES // 4)
    high = low + (LANES // 4 - 1)
    return tl.where(low >= pad, 0xFFFF, 0) | tl.where(high >= pad, -65536, 0)


@triton.jit
def widen(words, DTYPE: tl.constexpr):
    """Widen 32-bit words [THREADS, 4] with elements of DTYPE to float32 [THREADS, LANES]."""
    if DTYPE == tl.float32:
        return words.to(tl.float32, bitcast=True)
    else:
        if DTYPE == tl.bfloat16:
            pairs = tl.join(words << 16, words & -65536).to(tl.float32, bitcast=True)
        else:
            halves = tl.join(words.to(tl.int16), (words >> 16).to(tl.int16))
            pairs = halves.to(tl.float16, bitcast=True).to(tl.float32)
        return tl.reshape(pairs, [words.shape[0], 8])


@triton.jit
def load_edge(ptrs, mask, EDGE: tl.constexpr):
    """Load under the mask if EDGE, with 0 elsewhere; otherwise load all."""
    return tl.load(ptrs, mask=mask, other=0) if EDGE else tl.load(ptrs)


@triton.jit
def load_group(
    block_ptr, group, pad, remaining, REALIGN: tl.constexpr, EDGE: tl.constexpr, LANES: tl.constexpr
):
    """Return float32 [THREADS, LANES]: the groups numbered `group` [THREADS, 1] of a part of a row;
    block_ptr: the 16-byte boundary at or before the part; remaining: entries from the part's first
    to the row's end.

    EDGE groups may reach past the row, where lanes are unspecified. A block is read only if it
    holds an element of the row.
    """
    words_ptr = tl.multiple_of(block_ptr.to(tl.pointer_type(tl.int32)), 16)
    offs_w = group * 4 + tl.arange(0, 4)[None, :]
    words = load_edge(words_ptr + offs_w, group * LANES - pad < remaining, EDGE)
    if REALIGN:
        # Without a pad the next block is not needed: read the same block again and select nothing
        # from it.
        next_ptr = tl.multiple_of(words_ptr + tl.where(pad > 0, 4, 0), 16)
        own = select_mask(pad, LANES)
        following = load_edge(next_ptr + offs_w, (group + 1) * LANES - pad < remaining, EDGE)
        words = (words & own) | (following & ~own)
    return widen(words, block_ptr.dtype.element_ty)


@triton.jit
def load_lanes(
    row_ptr,
    group,
    pad,
    remaining,
    EDGE: tl.constexpr,
    LANES: tl.constexpr,
    FIRST: tl.constexpr = 0,
    STEP: tl.constexpr = 1,
):
    """Return float32 [THREADS, 2, …, 2]: every STEP-th lane of each group, from FIRST on, read
    element by element, for a tensor aligned differently from the other.

    One load per lane, joined inside each thread: reshaped to [THREADS, LANES] the layout is that of
    load_group, and so is the order of every sum.
    """
    if STEP == LANES:
        offs_v = tl.reshape(group, [group.shape[0]]) * LANES + (FIRST + LANES - pad) % LANES
        return load_edge(row_ptr + offs_v, offs_v < remaining, EDGE).to(tl.float32)
    else:
        return tl.join(
            load_lanes(row_ptr, group, pad, remaining, EDGE, LANES, FIRST, STEP * 2),
            load_lanes(row_ptr, group, pad, remaining, EDGE, LANES, FIRST + STEP, STEP * 2),
        )


# Compile-time: how a program reads a row, in tiles of threads · groups groups.
#
# lanes: elements per group. groups: per thread, as in config.RowConfig. realign: rows may start off
# a 16-byte boundary. q_in_blocks: Q's rows start at the same distance from a boundary as P's.
Tiling = namedtuple("Tiling", "threads lanes groups realign q_in_blocks")


# The addresses of a segment and the constants of its row: `part` in the helpers.
#
# p_block, q_block: the 16-byte boundary `pad` entries before the first one. q_row: Q's first entry.
# remaining: entries from the first to the end of the row. order: the entry of its group that each
# lane holds. shift: see segment_shift. doubled_scale: D_FACTOR/T; scale_log2: LOG2E/T. gamma: see
# row_math.Want. second: the divergence_math.Second of an f-divergence. A kernel without Q, gamma or
# Second passes any pointer or scalar for it.
Segment = namedtuple(
    "Segment",
    "p_block q_block q_row pad order remaining shift doubled_scale scale_log2 ratio gamma second",
)


# Entries of a row: tuples with one [threads, lanes] tensor per group.
#
# difference + lo = y - x - shift. inside: whether an entry belongs to the segment.
Tile = namedtuple("Tile", "x difference lo inside")


@triton.jit
def load_tile(
    part,
    first_group,
    end,
    GROUPS: tl.constexpr,
    tiling: tl.constexpr,
    want: tl.constexpr,
    reading: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Load GROUPS groups per thread from `first_group` on; EDGE masks entries from `end` on."""
    LANES: tl.constexpr = tiling.lanes
    tile = Tile((), (), (), ())
    for g in tl.static_range(GROUPS):
        group = first_group + g * tiling.threads + tl.arange(0, tiling.threads)[:, None]
        x = load_group(part.p_block, group, part.pad, part.remaining, tiling.realign, EDGE, LANES)
        x = soft_cap(x, reading.softcap, part.p_block.dtype.element_ty)
        inside = group * LANES + part.order < end
        if EDGE:
            x = tl.where(inside, x, LOWEST)
        difference, lo = x, x
        if want.kl:
            y = (
                load_group(
                    part.q_block, group, part.pad, part.remaining, tiling.realign, EDGE, LANES
                )
                if tiling.q_in_blocks
                else tl.reshape(
                    load_lanes(part.q_row, group, part.pad, part.remaining, EDGE, LANES), x.shape
                )
            )
            y = soft_cap(y, reading.ref_softcap, part.q_row.dtype.element_ty)
            y, y_lo = scale_reference(y, part.ratio, reading.ratio)
            difference, lo = subtract(y, x, want.compensated)
            if want.compensated:
                difference, more = two_sum(difference, -part.shift)
                lo = lo + more
            if reading.ratio:
                lo = lo + y_lo
            if EDGE:
                difference = tl.where(inside, difference, 0.0)
                lo = tl.where(inside, lo, 0.0)
        tile = Tile(
            tile.x + (x,),
            tile.difference + (difference,),
            tile.lo + (lo,),
            tile.inside + (inside,),
        )
    return tile
