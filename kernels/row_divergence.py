"""Forward of the f-divergences: a second read of the logits, after both log-sum-exps are known."""

import triton
import triton.language as tl

from .divergence_math import FAR_KL, Formula, Second
from .fallback import is_fallback
from .row_finish import SAVED, load_rank_states, load_states, store_state, store_tuple
from .row_gradient import gradient_terms, load_saved
from .row_load import D_FACTOR, Reading, RowArguments, Tiling, compensates, row_at
from .row_math import STATE, TOTAL_VARIATION, Kind, Want
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
        "share",
        "rest",
        "curvature",
        *(f"c{i}" for i in range(15)),
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
def row_divergence(  # noqa: PLR0913
    # As in row_forward, which has run: kl_ptr takes the divergence; state_ptr and counter_ptr are
    # as row_forward left them.
    p_ptr,
    q_ptr,
    mask_ptr,
    temperature_ptr,
    ratio_ptr,
    tokens_ptr,
    state_ptr,
    counter_ptr,
    saved_ptr,
    logprob_ptr,
    entropy_ptr,
    ref_logprob_ptr,
    kl_ptr,
    ref_kl_ptr,
    lse_ptr,
    ref_lse_ptr,
    temperature: tl.float32,
    n_inner: tl.int32,
    stride_p_outer: tl.int64,
    stride_p_inner: tl.int64,
    stride_q_outer: tl.int64,
    stride_q_inner: tl.int64,
    V: tl.int32,
    segment: tl.int32,
    splits: tl.int32,
    prefetching: tl.int32,
    gamma: tl.float32,
    ranks: tl.int32,
    stride_rank: tl.int64,
    share: tl.float32,  # alpha or beta
    rest: tl.float32,  # 1 - share
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
    c12: tl.float32,
    c13: tl.float32,
    c14: tl.float32,  # coefficients of G and of K
    SPLITS: tl.constexpr,
    MERGE: tl.constexpr,
    THREADS: tl.constexpr,
    LANES: tl.constexpr,
    GROUPS: tl.constexpr,
    KIND: tl.constexpr,
    SMALL_REST: tl.constexpr,
    LG2: tl.constexpr,
    HAS_MASK: tl.constexpr,
    TEMPERATURE_PER_ROW: tl.constexpr,
    REALIGN: tl.constexpr,
    Q_IN_BLOCKS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    REF_SOFTCAP: tl.constexpr,
    HAS_RATIO: tl.constexpr,
):
    """Sum one segment of one row of an f-divergence; the row's last program to finish writes the
    result. MERGE as in row_forward.

    Math:   divergence_math.py; defined by f_divergences.divergence.
    Grid:   as row_forward.
    Reads:  N·V of p and q, 40 bytes per row; nothing of a masked row, or of a fallback row, which
            row_fallback computes.
    Writes: 6 · N · splits float32, read again by the last program; the divergence and three saved
            values per row. With MERGE, reads 6 · ranks · splits float32 in place of p and q, and
            writes no states.
    Saves:  E_p[u] and E_q[v], or for total variation Q(d < 0) and P(d ≥ 0), in place of the means
            of the KL's gradient, and the divergence in place of the entropy.
    Special values: a masked row keeps its zeros.
    """
    row = (tl.program_id(0) // (1 if MERGE else splits)).to(tl.int64)
    first = (tl.program_id(0) % (1 if MERGE else splits)) * segment
    saved_ptr += row * SAVED
    marked = tl.load(saved_ptr)
    if is_fallback(saved_ptr) | (marked != marked) | (HAS_MASK and tl.load(mask_ptr + row) == 0):
        return
    want: tl.constexpr = Want(
        False, True, False, Kind(KIND, SMALL_REST, LG2),
        compensates(p_ptr.dtype.element_ty, q_ptr.dtype.element_ty, HAS_RATIO), False,
    )  # fmt: skip
    tiling: tl.constexpr = Tiling(THREADS, LANES, GROUPS, REALIGN, Q_IN_BLOCKS)
    reading: tl.constexpr = Reading(False, SOFTCAP, REF_SOFTCAP, HAS_RATIO)
    whole = row_at(
        RowArguments(
            p_ptr, q_ptr, tokens_ptr, temperature_ptr, ratio_ptr, temperature, n_inner,
            stride_p_outer, stride_p_inner, stride_q_outer, stride_q_inner, V,
        ),
        row, TEMPERATURE_PER_ROW, HAS_RATIO,
    )  # fmt: skip
    formula = Formula(
        share, rest, curvature, (c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13, c14)
    )
    terms = gradient_terms(load_saved(saved_ptr), formula)
    IS_TV: tl.constexpr = KIND == TOTAL_VARIATION
    far = terms.saved.log1p_t > (float("inf") if IS_TV else FAR_KL)
    if MERGE:
        states = load_rank_states(state_ptr, row, splits, ranks, stride_rank, SPLITS, want)
    else:
        second = Second(
            formula, terms.log2_Z_p, terms.lse_gap * D_FACTOR, terms.lse_gap_lo * D_FACTOR,
            far.to(tl.int32),
        )  # fmt: skip
        # The sums of an f-divergence read no gamma.
        states = segment_sums(
            whole, first, tl.minimum(segment, V - first), gamma, second, tiling, want, reading
        )
        if SPLITS > 1:
            store_state(state_ptr + tl.program_id(0).to(tl.int64) * STATE, states, want)
            # Order all threads' stores before the release by one thread.
            tl.debug_barrier()
            # row_forward has counted `splits` programs.
            if tl.atomic_add(counter_ptr + row, 1, sem="acq_rel") != 2 * splits - 1:
                return
            index = tl.arange(0, SPLITS)
            states = load_states(state_ptr + (row * splits + index) * STATE, index < splits, want)
    S, moment, value, R = states.S, states.W, states.U, states.R
    if SPLITS > 1:
        S, moment, value, R = (
            tl.sum(states.S, 0), tl.sum(states.W, 0), tl.sum(states.U, 0), tl.sum(states.R, 0)
        )  # fmt: skip
    # A state holds the sums without D_FACTOR; add_terms sums a multiple of total variation. S and
    # R, the drift, cover all tiles only in a far row.
    weight = tl.where(far, tl.div_rn(1.0, S), terms.factor_p)
    factor = weight * D_FACTOR
    drift = tl.where(far, R * weight, 0.0)
    # The moment was summed less f''(0)·(q - p), which adds up to the drift.
    moment = tl.fma(drift, curvature, moment * factor)
    value = tl.where(value <= 0.0, 0.0, value * (weight * 0.5 if IS_TV else factor))
    tl.store(kl_ptr + row, value)
    # Overwrite mean_p, mean_q and the entropy.
    store_tuple(
        saved_ptr + 7,
        (
            moment if IS_TV else value - moment,
            R * factor if IS_TV else tl.fma(-drift, moment, moment),
            value,
        ),
    )
