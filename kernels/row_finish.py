"""Compute a row's results from its states, in the program of row_forward that finishes last."""

from collections import namedtuple

import triton
import triton.language as tl

from .row_load import D_FACTOR, load_logit
from .row_math import (
    LARGEST_LOG2_SUM,
    LARGEST_SUM,
    LN2,
    LOG2E,
    LOWEST,
    RENYI,
    STATE,
    State,
    kl_of_means,
    log1p,
    merge,
    ref_kl_of_means,
    renyi_of_means,
    scale_reference,
    two_sum,
)

# Limit of |E_p[y - x]|·s: beyond it hi and lo have fewer digits than the gradient of a peaked row
# needs. For 16-bit logits also the limit of |E_p[y - x]|: their differences are rounded once.
LARGEST_DIFFERENCE = tl.constexpr(64.0)
# Float32 values per row saved for backward.
SAVED = tl.constexpr(10)


# Pointers to saved values [10] and fields, of one row or of row 0; any pointer for a field not
# requested.
Outputs = namedtuple("Outputs", "saved logprob entropy ref_logprob kl ref_kl lse ref_lse")


# Saved values of a row for backward, in memory order.
#
# Base 2: origin, log2_S, and log2_Z_q, of Q's partition function Z, as hi and lo. Base e: centre as
# hi and lo, log1p_t, the means E_p[d] and E_q[d] (for another divergence, the means of its
# gradients), entropy.
Saved = namedtuple(
    "Saved",
    "origin log2_S log2_Z_q log2_Z_q_lo centre centre_lo log1p_t mean_p mean_q entropy",
)


# Statistics of a row; valid: whether the float32 sums could represent it.
#
# unshifted: the Saved with y - shift in place of y (row_load.segment_shift); its entropy may be
# below 0 by rounding.
Statistics = namedtuple("Statistics", "unshifted shift kl ref_kl valid")


@triton.jit
def row_outputs(first, row):
    """Return the Outputs of one row from those of row 0."""
    return Outputs(
        first.saved + row * SAVED,
        first.logprob + row,
        first.entropy + row,
        first.ref_logprob + row,
        first.kl + row,
        first.ref_kl + row,
        first.lse + row,
        first.ref_lse + row,
    )


@triton.jit
def store_if(ptr, value, WANTED: tl.constexpr):
    """Write a number as float32 if it is WANTED."""
    if WANTED:
        tl.store(ptr, value.to(tl.float32))


@triton.jit
def store_tuple(ptr, values):
    """Write numbers next to each other, in the type of the pointer."""
    for i in tl.static_range(len(values)):
        tl.store(ptr + i, values[i].to(ptr.dtype.element_ty))


@triton.jit
def store_state(state_ptr, state, want: tl.constexpr):
    """Write a scalar state [8]."""
    wanted: tl.constexpr = State(
        True,
        True,
        want.entropy,
        want.kl,
        want.kl,
        want.ref_kl or want.kind.name >= RENYI,
        want.kl,
        want.kl and want.compensated,
    )
    for i in tl.static_range(STATE):
        store_if(state_ptr + i, state[i], wanted[i])


@triton.jit
def load_sums(ptr, mask, empty, WANTED: tl.constexpr):
    """Load one number of each state, `empty` where masked; zeros unless WANTED.

    Bypass L1, which may hold stale values.
    """
    return (
        tl.load(ptr, mask=mask, other=empty, cache_modifier=".cg")
        if WANTED
        else tl.zeros(mask.shape, tl.float32)
    )


@triton.jit
def load_states(state_ptr, mask, want: tl.constexpr):
    """Load the states at a vector of addresses, as vectors; masked ones are empty."""
    return State(
        load_sums(state_ptr, mask, LOWEST, True),
        load_sums(state_ptr + 1, mask, 0.0, True),
        load_sums(state_ptr + 2, mask, 0.0, want.entropy),
        load_sums(state_ptr + 3, mask, 0.0, want.kl),
        load_sums(state_ptr + 4, mask, 0.0, want.kl),
        load_sums(state_ptr + 5, mask, 0.0, want.ref_kl or want.kind.name >= RENYI),
        load_sums(state_ptr + 6, mask, 0.0, want.kl),
        load_sums(state_ptr + 7, mask, 0.0, want.kl and want.compensated),
    )


@triton.jit
def load_rank_states(
    state_ptr, row, splits, ranks, stride_rank, SPLITS: tl.constexpr, want: tl.constexpr
):
    """Load a row's states of all ranks, of [ranks, N, splits, 8], as vectors."""
    index = tl.arange(0, SPLITS)
    place = index // splits * stride_rank + (row * splits + index % splits) * STATE
    return load_states(state_ptr + place, index < ranks * splits, want)


@triton.jit
def q_partition(state, log2_S, log_ratio, mean_q, scale):
    """Return Q's log2-partition function log2 Σ 2^((y - shift)·scale_log2) from P's and the centre,
    as hi and lo.

    d is scaled by s, while row_backward uses the rounded scale_log2: correct by E_q[y - x - shift]
    times the difference of the scales. Without want.ref_kl E_q[d] is unknown and counts as 0.
    """
    centre_log2 = state.centre * LOG2E
    lse, lo = two_sum(state.origin, centre_log2)
    lse, more = two_sum(lse, log2_S)
    rounding = tl.div_rn(tl.fma(scale, LOG2E, -(scale * LOG2E)), scale)
    rest = (
        tl.fma(state.centre, LOG2E, -centre_log2)
        + log_ratio * LOG2E
        - (state.centre + mean_q) * rounding
    )
    return two_sum(lse, lo + more + rest)


@triton.jit
def row_statistics(states, scale, gamma, want: tl.constexpr):
    """Return the Statistics of a row from the vector of its partial states. Rényi's divergence, if
    requested, replaces the KL, and log Z the two means.
    """
    state = merge(states, scale, gamma, want)
    valid = (
        (state.S > 0.0)
        & (
            state.S + tl.abs(state.A) + tl.abs(state.W) + tl.abs(state.U) + tl.abs(state.R)
            < LARGEST_SUM
        )
        & (tl.abs(state.origin) < LARGEST_LOG2_SUM)
    )
    log2_S = tl.log2(state.S)
    entropy = (log2_S - tl.div_rn(state.A, state.S)) * LN2
    zero = entropy * 0.0
    if not want.kl:
        return Statistics(
            Saved(
                state.origin, log2_S, log2_S, zero, state.centre, zero, zero, zero, zero, entropy
            ),
            zero,
            zero,
            zero,
            valid,
        )
    else:
        # Use correctly rounded division: on a peaked row the gradient is the remainder d - E_p[d],
        # and plain division may be off by 2 ulp.
        mean_h = tl.maximum(tl.div_rn(state.U, state.S), 0.0)
        mean_p = tl.div_rn(state.W, state.S)
        kl = kl_of_means(mean_h, mean_p)
        ref_kl, mean_q = zero, zero
        if want.ref_kl:
            mean_r = tl.div_rn(state.R, state.S)
            ref_kl = ref_kl_of_means(mean_r, mean_h, mean_p)
            mean_q = tl.div_rn(state.R + state.W, state.S + state.U + state.W)
            # Reject a KL(Q‖P) that is a small difference of large terms, as with an entry masked
            # only in Q: it has too few digits.
            terms = (tl.abs(mean_r) + mean_h) / (1.0 + mean_h + mean_p)
            valid = valid & (terms < tl.fma(ref_kl, 8.0, 0.001))
        log1p_t = log1p(mean_h + mean_p)
        log2_Z_q, log2_Z_q_lo = q_partition(state, log2_S, log1p_t, mean_q, scale)
        apart = tl.abs(tl.fma(state.shift, scale, state.centre))
        valid = valid & (tl.abs(log2_Z_q) < LARGEST_LOG2_SUM) & (apart < LARGEST_DIFFERENCE)
        if not want.compensated:
            valid = valid & (apart < scale * LARGEST_DIFFERENCE)
        if want.kind.name == RENYI:
            kl = renyi_of_means(tl.div_rn(state.R, state.S), mean_h, mean_p, gamma)
            mean_p = kl * -gamma
            mean_q = mean_p
        return Statistics(
            Saved(
                state.origin, log2_S, log2_Z_q, log2_Z_q_lo, state.centre, zero, log1p_t, mean_p,
                mean_q, entropy,
            ),
            state.shift, kl, ref_kl, valid,
        )  # fmt: skip


@triton.jit
def add_product(value, lo, a, b):
    """Return value + lo + a·b as hi and lo."""
    product = a * b
    total, more = two_sum(product, value)
    return total, lo + more + tl.fma(a, b, -product)


@triton.jit
def store_logprob(ptr, logprob):
    """Write a log-probability, at most 0, which rounding may exceed; NaN stays NaN."""
    logprob = logprob.to(tl.float32)
    tl.store(ptr, tl.where(logprob > 0.0, 0.0, logprob))


@triton.jit
def store_fields(out, entropy, kl, ref_kl, lse, ref_lse, want: tl.constexpr):
    """Write the fields that do not depend on a token; lse, ref_lse: of x/T and y/T."""
    store_if(out.entropy, entropy, want.entropy)
    store_if(out.kl, kl, want.kl)
    store_if(out.ref_kl, ref_kl, want.ref_kl)
    store_if(out.lse, lse, want.lse)
    store_if(out.ref_lse, ref_lse, want.lse and want.kl)


@triton.jit
def token_logits(row, want: tl.constexpr, reading: tl.constexpr):
    """Return the sampled token's capped logits of P and of Q; NaN for a token outside 0 … V-1."""
    token = tl.load(row.token_ptr)
    inside = (token >= 0) & (token < row.V)
    x = load_logit(row.p, token, inside, float("nan"), reading.softcap)
    y = load_logit(row.q, token, inside, float("nan"), reading.ref_softcap) if want.kl else x
    return x, y


@triton.jit
def saved_values(statistics, scale):
    """Return the Saved of a row from its Statistics."""
    unshifted, shift = statistics.unshifted, statistics.shift
    log2_Z_q, log2_Z_q_lo = add_product(
        unshifted.log2_Z_q, unshifted.log2_Z_q_lo, shift, scale * LOG2E
    )
    centre, centre_lo = add_product(unshifted.centre, unshifted.centre_lo, shift, scale)
    # S may be below 1 if rounding raised the peak to the next whole number. Keep log2_S
    # nonnegative: its sign bit marks fallback rows.
    below = unshifted.log2_S < 0.0
    return Saved(
        tl.where(below, unshifted.origin - 1.0, unshifted.origin),
        tl.where(below, unshifted.log2_S + 1.0, unshifted.log2_S),
        log2_Z_q,
        log2_Z_q_lo,
        centre,
        centre_lo,
        unshifted.log1p_t,
        unshifted.mean_p,
        unshifted.mean_q,
        unshifted.entropy,
    )


@triton.jit
def store_statistics(out, statistics, valid, row, want: tl.constexpr, reading: tl.constexpr):
    """Write the saved values and the fields of a row; a NaN as the first saved value marks a
    fallback row.
    """
    unshifted = statistics.unshifted
    scale = row.doubled_scale * (1.0 / D_FACTOR)
    saved = saved_values(statistics, scale)
    tl.store(out.saved, tl.where(valid, saved.origin, float("nan")))
    store_tuple(out.saved + 1, saved[1:])
    store_fields(
        out,
        tl.where(unshifted.entropy <= 0.0, 0.0, unshifted.entropy),
        statistics.kl,
        statistics.ref_kl,
        tl.fma(saved.origin, LN2, saved.log2_S * LN2),
        tl.fma(saved.log2_Z_q, LN2, saved.log2_Z_q_lo * LN2),
        want,
    )
    if reading.tokens:
        # Compute half the base-2 logarithm (halving is exact): x·s·LOG2E may overflow although the
        # log-probability is finite.
        half_scale = scale * (LOG2E * 0.5)
        x, y = token_logits(row, want, reading)
        half_p = tl.fma(x, half_scale, unshifted.origin * -0.5) - unshifted.log2_S * 0.5
        store_logprob(out.logprob, half_p * (LN2 * 2.0))
        if want.kl:
            y, y_lo = scale_reference(y, row.ratio, reading.ratio)
            y, more = two_sum(y, -statistics.shift)
            half_q = tl.fma(y, half_scale, unshifted.log2_Z_q * -0.5) - unshifted.log2_Z_q_lo * 0.5
            half_q = tl.fma(y_lo + more, half_scale, half_q)
            store_logprob(out.ref_logprob, half_q * (LN2 * 2.0))


@triton.jit
def store_zeros(out, want: tl.constexpr, reading: tl.constexpr):
    """Write the zeros of a masked row."""
    for value in tl.static_range(SAVED):
        tl.store(out.saved + value, 0.0)
    zero = tl.full([], 0.0, tl.float32)
    store_fields(out, zero, zero, zero, zero, zero, want)
    store_if(out.logprob, zero, reading.tokens)
    store_if(out.ref_logprob, zero, reading.tokens and want.kl)
