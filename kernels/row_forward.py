"""Forward: statistics of policy logits, or of policy and reference logits, from one read."""

import triton
import triton.language as tl

from .row_finish import (
    Outputs,
    load_rank_states,
    load_states,
    row_outputs,
    row_statistics,
    store_state,
    store_statistics,
    store_zeros,
)
from .row_load import D_FACTOR, Reading, RowArguments, Tiling, compensates, prefetch, row_at
from .row_math import LARGEST_MEAN_GAP, STATE, Kind, State, Want
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
        "V",
        "segment",
        "splits",
        "prefetching",
        "gamma",
        "ranks",
        "stride_rank",
    ],
    do_not_specialize_on_alignment=[
        "p_ptr",
        "q_ptr",
        "mask_ptr",
        "temperature_ptr",
        "ratio_ptr",
        "tokens_ptr",
        "state_ptr",
        "counter_ptr",
        "saved_ptr",
        "logprob_ptr",
        "entropy_ptr",
        "ref_logprob_ptr",
        "kl_ptr",
        "ref_kl_ptr",
        "lse_ptr",
        "ref_lse_ptr",
    ],
)
def row_forward(  # noqa: PLR0913, PLR0915
    p_ptr,  # [outer, inner, V] policy logits (P)
    q_ptr,  # [outer, inner, V] reference logits (Q); any pointer without WITH_KL
    mask_ptr,  # [N] bool; any pointer without HAS_MASK
    temperature_ptr,  # [N] float32; any pointer without TEMPERATURE_PER_ROW
    ratio_ptr,  # [N] float32, Q's inverse temperature over P's; any pointer without HAS_RATIO
    tokens_ptr,  # [N] int64; any pointer without HAS_TOKENS
    state_ptr,  # [N, splits, 8] float32: a row_math.State each; any pointer if SPLITS is 1
    counter_ptr,  # [N] int32, finished segments, at first 0; any pointer if SPLITS is 1
    saved_ptr,  # [N, 10] float32: a row_finish.Saved per row
    logprob_ptr,  # [N] float32, like the six below; any pointer without HAS_TOKENS
    entropy_ptr,  # any pointer without WITH_ENTROPY
    ref_logprob_ptr,  # any pointer without HAS_TOKENS and WITH_KL
    kl_ptr,  # any pointer without WITH_KL
    ref_kl_ptr,  # any pointer without WITH_REF_KL
    lse_ptr,  # any pointer without WITH_LSE
    ref_lse_ptr,  # any pointer without WITH_LSE and WITH_KL
    temperature: tl.float32,
    n_inner: tl.int32,
    stride_p_outer: tl.int64,
    stride_p_inner: tl.int64,
    stride_q_outer: tl.int64,
    stride_q_inner: tl.int64,
    V: tl.int32,
    segment: tl.int32,
    splits: tl.int32,
    prefetching: tl.int32,  # 1: prefetch the segment, because few programs do not hide latency
    gamma: tl.float32,  # of Rényi's divergence: 1 - order, not 0
    ranks: tl.int32,
    stride_rank: tl.int64,  # of state_ptr with MERGE
    SPLITS: tl.constexpr,  # a power of two, at least splits; with MERGE at least ranks · splits
    MERGE: tl.constexpr,  # read no segment, but the states of all ranks, [ranks, N, splits, 8]
    THREADS: tl.constexpr,
    LANES: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    TEMPERATURE_PER_ROW: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    WITH_KL: tl.constexpr,
    WITH_REF_KL: tl.constexpr,
    WITH_LSE: tl.constexpr,
    KIND: tl.constexpr,  # the divergence in field kl: KL or Rényi's
    REALIGN: tl.constexpr,
    Q_IN_BLOCKS: tl.constexpr,
    PREFETCH: tl.constexpr,
    SOFTCAP: tl.constexpr,  # P's logits are CAP·tanh(logits/CAP); 0: no cap
    REF_SOFTCAP: tl.constexpr,  # Q's
    HAS_RATIO: tl.constexpr,
):
    """Sum one segment of one row; the last program of a row to finish writes the row's results.

    With MERGE, the states are those of all ranks of a split vocabulary: p and q are each row's
    sampled logit, V is 1, and a token is 0, or -1 outside the vocabulary.

    Math:   the sums and formulas of row_math.py; defined by reference.row_statistics.
    Grid:   (N · splits,), a row's segments next to each other; (N,) with MERGE. Segment lengths
            depend on V, the logits' dtype and the GPU's architecture, and states are merged in
            order: a row's bits depend neither on N nor on which program is last.
    Reads:  N·V of p and (WITH_KL) of q, anchored tiles again from cache; per segment three logits
            of each (want.compensated); the token's logits; nothing of a masked row. With MERGE, in
            place of the segments, 8 · ranks · splits float32 per row.
    Writes: 8 · N · splits float32, read again by the last program; 10 saved values and the fields
            asked for, per row.
    Saves:  what row_backward needs: 40 bytes per row.
    Special values: the first saved value is NaN for a fallback row (infinities, a
            NaN, an entry with |d| above LARGEST_D or LARGEST_FAR_D, tensors 64 nats apart), which
            row_fallback recomputes. A token outside 0 … V-1 reads nothing and gives NaN.
            Log-probabilities are never above 0. A masked row gets zeros.
    """
    row = (tl.program_id(0) // (1 if MERGE else splits)).to(tl.int64)
    split = tl.program_id(0) % (1 if MERGE else splits)
    want: tl.constexpr = Want(
        WITH_ENTROPY,
        WITH_KL,
        WITH_REF_KL,
        Kind(KIND, False, False),
        compensates(p_ptr.dtype.element_ty, q_ptr.dtype.element_ty, HAS_RATIO),
        WITH_LSE,
    )
    tiling: tl.constexpr = Tiling(THREADS, LANES, GROUPS, REALIGN, Q_IN_BLOCKS)
    reading: tl.constexpr = Reading(HAS_TOKENS, SOFTCAP, REF_SOFTCAP, HAS_RATIO)
    outputs = Outputs(
        saved_ptr,
        logprob_ptr,
        entropy_ptr,
        ref_logprob_ptr,
        kl_ptr,
        ref_kl_ptr,
        lse_ptr,
        ref_lse_ptr,
    )
    if HAS_MASK and tl.load(mask_ptr + row) == 0:
        if split == 0:
            store_zeros(row_outputs(outputs, row), want, reading)
        return
    whole = row_at(
        RowArguments(
            p_ptr, q_ptr, tokens_ptr, temperature_ptr, ratio_ptr, temperature, n_inner,
            stride_p_outer, stride_p_inner, stride_q_outer, stride_q_inner, V,
        ),
        row, TEMPERATURE_PER_ROW, HAS_RATIO,
    )  # fmt: skip
    first = split * segment
    length = tl.minimum(segment, V - first)
    if PREFETCH:
        prefetch(whole.p + first, length, prefetching)
        if WITH_KL:
            prefetch(whole.q + first, length, prefetching)
    if MERGE:
        states = load_rank_states(state_ptr, row, splits, ranks, stride_rank, SPLITS, want)
    else:
        state = segment_sums(whole, first, length, gamma, gamma, tiling, want, reading)
        if SPLITS > 1:
            store_state(state_ptr + tl.program_id(0).to(tl.int64) * STATE, state, want)
            # Order all threads' stores before the release by one thread.
            tl.debug_barrier()
            if tl.atomic_add(counter_ptr + row, 1, sem="acq_rel") != splits - 1:
                return
            index = tl.arange(0, SPLITS)
            states = load_states(state_ptr + (row * splits + index) * STATE, index < splits, want)
        else:
            zeros = tl.zeros([1], tl.float32)
            states = State(
                zeros + state.origin,
                zeros + state.S,
                zeros + state.A,
                zeros + state.W,
                zeros + state.U,
                zeros + state.R,
                zeros + state.centre,
                zeros + state.shift,
            )
    statistics = row_statistics(states, whole.doubled_scale * (1.0 / D_FACTOR), gamma, want)
    valid = statistics.valid
    if MERGE and WITH_REF_KL:
        # Send the row to the fallback: backward cannot recompute E_q[d] from a shard's columns.
        valid = valid & (tl.abs(statistics.unshifted.mean_q) <= LARGEST_MEAN_GAP)
    store_statistics(row_outputs(outputs, row), statistics, valid, whole, want, reading)
