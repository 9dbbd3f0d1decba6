"""Fused: the KL of rows and the gradient of its weighted sum to P, with each logit read from DRAM
once.
"""

import triton
import triton.language as tl

from .row_finish import (
    Outputs,
    load_states,
    row_outputs,
    row_statistics,
    saved_values,
    store_state,
    store_statistics,
    store_zeros,
)
from .row_gradient import Asked, Place, Upstream, gradient_terms, write_tile
from .row_load import D_FACTOR, Reading, RowArguments, Tiling, compensates, prefetch, row_at
from .row_math import OF_KL, STATE, Kind, Want
from .row_segment import segment_sums


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
        "stride_grad",
        "V",
        "segment",
        "piece",
        "pieces",
        "splits",
    ],
    do_not_specialize_on_alignment=[
        "p_ptr",
        "q_ptr",
        "grad_ptr",
        "weight_ptr",
        "mask_ptr",
        "temperature_ptr",
        "ratio_ptr",
        "state_ptr",
        "sync_ptr",
        "saved_ptr",
        "kl_ptr",
    ],
)
def row_fused(  # noqa: PLR0913, PLR0915
    p_ptr,  # [outer, inner, V] logits of P; every row starts on a 16-byte boundary
    q_ptr,  # likewise of Q
    grad_ptr,  # [N, V], rows stride_grad apart, on 16-byte boundaries; may be the logits of P
    weight_ptr,  # [N] float32: the weight of each row's KL in the sum
    mask_ptr,
    temperature_ptr,
    ratio_ptr,  # as in row_forward
    state_ptr,  # [N, splits, 8] float32
    # [1 + N] int32, initially 0: the next ticket, and the number of pieces of each row summed
    sync_ptr,
    saved_ptr,
    kl_ptr,  # [N, 10] and [N] float32
    temperature: tl.float32,
    n_inner: tl.int32,
    stride_p_outer: tl.int64,
    stride_p_inner: tl.int64,
    stride_q_outer: tl.int64,
    stride_q_inner: tl.int64,
    stride_grad: tl.int64,
    V: tl.int32,
    segment: tl.int32,
    piece: tl.int32,
    pieces: tl.int32,
    splits: tl.int32,
    SPLITS: tl.constexpr,  # a power of two, at least splits
    THREADS: tl.constexpr,
    LANES: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    TEMPERATURE_PER_ROW: tl.constexpr,
    PREFETCH: tl.constexpr,
    SOFTCAP: tl.constexpr,
    REF_SOFTCAP: tl.constexpr,
    HAS_RATIO: tl.constexpr,
    # 0: the whole kernel; 1: up to the wait; 2: from the wait on (the interpreter runs programs
    # sequentially)
    PHASE: tl.constexpr,
):
    """Compute the KL of rows and the gradient of Σ weight·KL with respect to P, in one launch.

    Each program sums a piece of a row, as row_forward does a segment, publishes its state, waits
    until the row's other pieces are published, merges all of them in order and writes its piece's
    gradient. The second read of the piece hits L1 or L2.

    No deadlock as long as the GPU can hold `splits` one-warp programs of every launch that runs
    concurrently. Programs draw tickets in order, and wait only for programs of their own row.
    Suppose that every resident program of a launch waits, and take the lowest row among theirs: all
    programs of lower rows are done. If all tickets of the row are drawn, all its states are
    published and no program of it waits. If not, no later ticket is drawn either: fewer than
    `splits` programs of the launch are resident, and the next one has room to start and draws a
    ticket of this row. NVIDIA only: on AMD a .cg load does not bypass the caches in which other
    programs' stores may stay.

    Math:   row_math.py's sums and row_gradient.entry_gradients; defined by reference.row_statistics
            and row_gradients.
    Grid:   (N · splits,), by tickets; a segment (of row_forward) is cut into `pieces` pieces.
    Reads:  N·V of p and of q twice, the second time from cache; three entries of each per piece
            (want.compensated); nothing of a masked row.
    Writes: N·V of the gradient, zeros in a masked row; 8·N·splits float32; 10 saved values and the
            KL, per row.
    Saves:  row_forward's ten values, for row_fallback and for a gradient to Q.
    Special values: a fallback row gets NaN as its first saved value and no gradient: row_fallback
            writes both.
    """
    ticket = tl.atomic_add(sync_ptr, 1, sem="relaxed") if PHASE == 0 else tl.program_id(0)
    row = (ticket // splits).to(tl.int64)
    split = ticket % splits
    kind: tl.constexpr = Kind(OF_KL, False, False)
    compensated: tl.constexpr = compensates(
        p_ptr.dtype.element_ty, q_ptr.dtype.element_ty, HAS_RATIO
    )
    want: tl.constexpr = Want(False, True, False, kind, compensated, False)
    tiling: tl.constexpr = Tiling(THREADS, LANES, GROUPS, False, True)
    reading: tl.constexpr = Reading(False, SOFTCAP, REF_SOFTCAP, HAS_RATIO)
    asked: tl.constexpr = Asked(
        False, False, False, True, False, False, False, kind, True, False, compensated
    )
    TILE: tl.constexpr = THREADS * GROUPS * LANES
    begin = split // pieces * segment + split % pieces * piece
    length = tl.minimum(tl.minimum(piece, segment - split % pieces * piece), V - begin)
    whole = row_at(
        RowArguments(
            p_ptr, q_ptr, mask_ptr, temperature_ptr, ratio_ptr, temperature, n_inner,
            stride_p_outer, stride_p_inner, stride_q_outer, stride_q_inner, V,  # no token is read
        ),
        row, TEMPERATURE_PER_ROW, HAS_RATIO,
    )  # fmt: skip
    grad_row = grad_ptr + row * stride_grad
    out = row_outputs(
        Outputs(saved_ptr, kl_ptr, kl_ptr, kl_ptr, kl_ptr, kl_ptr, kl_ptr, kl_ptr), row
    )
    # Give hints where the pointers are computed: a hint on a function argument is lost in inlining.
    p_block = tl.multiple_of(whole.p + begin, 16)
    q_block = tl.multiple_of(whole.q + begin, 16)
    grad_block = tl.multiple_of(
        grad_row + begin, LANES * grad_ptr.dtype.element_ty.primitive_bitwidth // 8
    )
    if HAS_MASK and tl.load(mask_ptr + row) == 0:
        if PHASE != 1:
            for start in range(0, length, TILE):
                offs_v = start + tl.arange(0, TILE)
                tl.store(
                    grad_row + begin + offs_v, tl.zeros([TILE], tl.float32), mask=offs_v < length
                )
            if split == 0:
                store_zeros(out, want, reading)
        return
    if PREFETCH:
        prefetch(p_block, tl.maximum(length, 0), 1)
        prefetch(q_block, tl.maximum(length, 0), 1)
    if PHASE != 2:
        state = segment_sums(whole, begin, length, whole.ratio, whole.ratio, tiling, want, reading)
        store_state(state_ptr + ticket.to(tl.int64) * STATE, state, want)
    if PHASE == 0:
        # Order all threads' stores before the release by one thread.
        tl.debug_barrier()
        arrived = tl.atomic_add(sync_ptr + 1 + row, 1, sem="release") + 1
        while arrived < splits:
            # Not an acquire: that would invalidate this SM's L1, which holds the piece. load_states
            # bypasses L1.
            arrived = tl.load(sync_ptr + 1 + row, volatile=True)
        # Keep the loads of states after the last arrival in program order: the volatile load is not
        # an acquire, so this relies on the hardware's ordering.
        tl.debug_barrier()
    if PHASE != 1:
        index = tl.arange(0, SPLITS)
        states = load_states(state_ptr + (row * splits + index) * STATE, index < splits, want)
        scale = whole.doubled_scale * (1.0 / D_FACTOR)
        statistics = row_statistics(states, scale, scale, want)  # the KL has no gamma
        if split == 0:
            store_statistics(out, statistics, statistics.valid, whole, want, reading)
        if statistics.valid:
            zero = scale * 0.0
            g = Upstream(zero, zero, zero, tl.load(weight_ptr + row), zero, zero, zero)
            terms = gradient_terms(saved_values(statistics, scale), zero)
            place = Place(
                p_block, q_block, grad_block, grad_block, 0, length, length, scale, whole.ratio
            )
            full_end = length // TILE * (THREADS * GROUPS)
            for group in range(0, full_end, THREADS * GROUPS):
                write_tile(place, group, terms, g, tiling, asked, reading, False)
            if full_end * LANES < length:
                write_tile(place, full_end, terms, g, tiling, asked, reading, True)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["grad_ptr", "factor_ptr"])
def scale_gradient(
    grad_ptr,  # [n], changed in place
    factor_ptr,  # [1] float32
    n: tl.int64,
    BLOCK: tl.constexpr,
):
    """Multiply a gradient in place by a scalar on the device; return at once if it is 1.

    Math:   grad · factor in float32, rounded: a second rounding of a 16-bit gradient, exact for
            powers of two.
    Grid:   any: programs stride over blocks.
    Reads:  1 and, unless factor is 1, n of the gradient.
    Writes: n of the gradient unless factor is 1.
    Saves:  nothing.
    Special values: a gradient of 0 stays 0 even if the factor is not finite; a factor of 0 gives 0
            everywhere.
    """
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        for start in range(
            tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0).to(tl.int64) * BLOCK
        ):
            offs = start + tl.arange(0, BLOCK)
            grad = tl.load(grad_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
            scaled = tl.where(grad == 0.0, 0.0, grad * factor)
            tl.store(grad_ptr + offs, tl.where(factor == 0.0, 0.0, scaled), mask=offs < n)
