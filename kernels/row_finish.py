"""Finish: the statistics of a row from its partial states, for the program of row_forward that
arrives last.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .row_math import (
    FINITE,
    LARGEST_LSE,
    LN2,
    LOG2E,
    LOWEST,
    STATE,
    State,
    forward_kl,
    log1p,
    merge,
    reverse_kl,
    scale_reference,
    soft_cap,
    split_sum,
)

# Above this KL, in nats, the product e^x·e^d loses digits where |d| is large; real policies stay
# far below.
LARGE_KL = tl.constexpr(8.0)
# Limit of |E_p[d]|, in nats: beyond it hi/lo float32 keeps fewer digits than the gradient of a
# peaked row needs. Also the limit of the mean difference of 16-bit logits, each of which is
# rounded.
LARGEST_DIFFERENCE = tl.constexpr(64.0)
# float32 values per row that backward needs.
SAVED = tl.constexpr(10)


class Statistics(NamedTuple):
    """Statistics of a row, and whether its sums hold.

    Base 2: origin, log2_S, lse_q and lost_q, the rounding error of lse_q. lse_q and centre count
    from shift·scale (row_forward).
    """

    origin: tl.tensor
    log2_S: tl.tensor
    lse_q: tl.tensor
    lost_q: tl.tensor
    centre: tl.tensor
    log1p_t: tl.tensor
    mean_p_d: tl.tensor
    mean_q_d: tl.tensor
    entropy: tl.tensor
    kl: tl.tensor
    ref_kl: tl.tensor
    hold: tl.tensor


class Outputs(NamedTuple):
    """Pointers to a row's saved values [10] and fields; any pointer for a field that was not asked
    for.
    """

    saved: tl.tensor
    logprob: tl.tensor
    entropy: tl.tensor
    ref_logprob: tl.tensor
    kl: tl.tensor
    ref_kl: tl.tensor


class Saved(NamedTuple):
    """The values of a row that backward needs, in memory order.

    Base 2: origin, log2_S, and lse_q with what it lost. centre with what it lost, log1p_t, the
    means E_p[d] and E_q[d], entropy.
    """

    origin: tl.tensor
    log2_S: tl.tensor
    lse_q: tl.tensor
    lost_q: tl.tensor
    centre: tl.tensor
    lost_centre: tl.tensor
    log1p_t: tl.tensor
    mean_p_d: tl.tensor
    mean_q_d: tl.tensor
    entropy: tl.tensor


class Reading(NamedTuple):
    """Compile-time: whether a row has a sampled token, and how its logits become the model's: soft
    caps, 0 for none, and a ratio.
    """

    tokens: bool
    softcap: float
    ref_softcap: float
    ratio: bool


@triton.jit
def row_outputs(row, saved_ptr, logprob_ptr, entropy_ptr, ref_logprob_ptr, kl_ptr, ref_kl_ptr):
    """The Outputs of one row."""
    return Outputs(
        saved_ptr + row * SAVED,
        logprob_ptr + row,
        entropy_ptr + row,
        ref_logprob_ptr + row,
        kl_ptr + row,
        ref_kl_ptr + row,
    )


@triton.jit
def store_state(state_ptr, s, want: tl.constexpr):
    """Write a scalar state [7]."""
    tl.store(state_ptr, s.origin)
    tl.store(state_ptr + 1, s.S)
    if want.entropy:
        tl.store(state_ptr + 2, s.A)
    if want.kl:
        tl.store(state_ptr + 3, s.W)
        tl.store(state_ptr + 4, s.U)
        tl.store(state_ptr + 6, s.centre)
    if want.reverse:
        tl.store(state_ptr + 5, s.R)


@triton.jit
def load_sums(ptr, there, empty, WANTED: tl.constexpr):
    """Load one number of each state that is there, `empty` of the others; 0 unless WANTED.

    Bypass L1, which may hold stale values.
    """
    if WANTED:
        return tl.load(ptr, mask=there, other=empty, cache_modifier=".cg")
    else:
        return tl.zeros(there.shape, tl.float32)


@triton.jit
def load_states(state_ptr, splits, SPLITS: tl.constexpr, want: tl.constexpr):
    """Load the states [splits, 7] of a row as vectors [SPLITS], a power of two; states beyond
    `splits` are empty.
    """
    index = tl.arange(0, SPLITS)
    there = index < splits
    state_ptr += index * STATE
    return State(
        load_sums(state_ptr, there, LOWEST, True),
        load_sums(state_ptr + 1, there, 0.0, True),
        load_sums(state_ptr + 2, there, 0.0, want.entropy),
        load_sums(state_ptr + 3, there, 0.0, want.kl),
        load_sums(state_ptr + 4, there, 0.0, want.kl),
        load_sums(state_ptr + 5, there, 0.0, want.reverse),
        load_sums(state_ptr + 6, there, 0.0, want.kl),
    )


@triton.jit
def q_partition(s, log2_S, log_ratio, mean_q_d, scale):
    """log2 Σ 2^((y - shift)·scale2) from P's and the centre, scale2 = s·log2(e) rounded: a rounded
    sum and what it lost.

    The sums count differences in units of s, row_backward evaluates 2^(y·scale2). Correct for the
    rounding of scale2, which shows where E_q[y - x - shift] is large.
    """
    centre2 = s.centre * LOG2E
    lse, lost = split_sum(s.origin, centre2)
    lse, more = split_sum(lse, log2_S)
    rounding = tl.div_rn(tl.fma(scale, LOG2E, -(scale * LOG2E)), scale)
    rest = tl.fma(s.centre, LOG2E, -centre2) + log_ratio * LOG2E - (s.centre + mean_q_d) * rounding
    return split_sum(lse, lost + more + rest)


@triton.jit
def row_statistics(states, shift, scale, want: tl.constexpr):
    """The Statistics of a row from the vector of its partial states."""
    s = merge(states, want)
    hold = (s.S > 0.0) & (s.S + tl.abs(s.A) + tl.abs(s.W) + tl.abs(s.U) + tl.abs(s.R) < FINITE)
    hold = hold & (tl.abs(s.origin) < LARGEST_LSE)
    log2_S = tl.log2(s.S)
    entropy = (log2_S - tl.div_rn(s.A, s.S)) * LN2
    kl = entropy * 0.0
    ref_kl = kl
    log1p_t = kl
    mean_p_d = kl
    mean_q_d = kl
    lse_q = log2_S
    lost_q = kl
    if want.kl:
        # Divide with one rounding: on a peaked row the gradient is the remainder d - E_p[d], and
        # plain division may be off by two units.
        mean_h = tl.maximum(tl.div_rn(s.U, s.S), 0.0)
        mean_p_d = tl.div_rn(s.W, s.S)
        kl = forward_kl(mean_h, mean_p_d)
        hold = hold & (kl < LARGE_KL)
        if want.reverse:
            mean_r = tl.div_rn(s.R, s.S)
            ref_kl = reverse_kl(mean_r, mean_h, mean_p_d)
            mean_q_d = tl.div_rn(s.R + s.W, s.S + s.U + s.W)
            # Reject a KL(Q‖P) that is a small difference of large terms, as beside a KL(P‖Q) that a
            # mask makes: its digits are lost.
            terms = (tl.abs(mean_r) + mean_h) / (1.0 + mean_h + mean_p_d)
            hold = hold & (ref_kl < LARGE_KL) & (terms < tl.fma(ref_kl, 8.0, 0.001))
        log1p_t = log1p(mean_h + mean_p_d)
        lse_q, lost_q = q_partition(s, log2_S, log1p_t, mean_q_d, scale)
        hold = hold & (tl.abs(lse_q) < LARGEST_LSE)
        apart = tl.abs(tl.fma(shift, scale, s.centre))
        hold = hold & (apart < LARGEST_DIFFERENCE)
        if not want.exact:
            hold = hold & (apart < scale * LARGEST_DIFFERENCE)
    return Statistics(
        s.origin,
        log2_S,
        lse_q,
        lost_q,
        s.centre,
        log1p_t,
        mean_p_d,
        mean_q_d,
        entropy,
        kl,
        ref_kl,
        hold,
    )


@triton.jit
def add_product(value, lost, a, b):
    """value + lost + a·b as a rounded sum and what it lost."""
    product = a * b
    total, more = split_sum(product, value)
    return total, lost + more + tl.fma(a, b, -product)


@triton.jit
def not_above_zero(logprob):
    """A log-probability, whose rounding may have left it above 0; NaN stays NaN."""
    return tl.where(logprob > 0.0, 0.0, logprob)


@triton.jit
def store_fields(out, entropy, kl, ref_kl, want: tl.constexpr):
    """Write the fields that depend on no token."""
    if want.entropy:
        tl.store(out.entropy, entropy.to(tl.float32))
    if want.kl:
        tl.store(out.kl, kl.to(tl.float32))
    if want.reverse:
        tl.store(out.ref_kl, ref_kl.to(tl.float32))


class Row(NamedTuple):
    """The addresses of a row of P and of Q, its length, the sampled token, 1/T, and the inverse
    temperature of Q over that of P.
    """

    p: tl.tensor
    q: tl.tensor
    V: tl.tensor
    token: tl.tensor
    scale: tl.tensor
    ratio: tl.tensor


@triton.jit
def token_logits(row, want: tl.constexpr, reading: tl.constexpr):
    """Return the sampled token's capped logits of P and of Q; NaN for a token outside 0 … V-1."""
    inside = (row.token >= 0) & (row.token < row.V)
    x = tl.load(row.p + row.token, mask=inside, other=float("nan")).to(tl.float32)
    x = soft_cap(x, reading.softcap, row.p.dtype.element_ty)
    y = x
    if want.kl:
        y = tl.load(row.q + row.token, mask=inside, other=float("nan")).to(tl.float32)
        y = soft_cap(y, reading.ref_softcap, row.q.dtype.element_ty)
    return x, y


@triton.jit
def saved_values(s, shift, scale, want: tl.constexpr):
    """The Saved of a row from its Statistics."""
    lse_q = s.lse_q
    lost_q = s.lost_q
    centre = s.centre
    lost_centre = s.kl * 0.0
    if want.kl:
        lse_q, lost_q = add_product(s.lse_q, s.lost_q, shift, scale * LOG2E)
        centre, lost_centre = add_product(s.centre, lost_centre, shift, scale)
    mean_p_d = s.mean_p_d
    mean_q_d = s.mean_q_d
    if not want.exact:
        # Fold the lost part into the means: row_backward subtracts no lost_centre from 16-bit
        # logits, whose gradients round more than this.
        mean_p_d += lost_centre
        mean_q_d += lost_centre
    # A peak that rounds up to a whole number leaves a sum below 1. The second saved value is never
    # negative: a negative one marks a fallback row.
    below = s.log2_S < 0.0
    return Saved(
        tl.where(below, s.origin - 1.0, s.origin),
        tl.where(below, s.log2_S + 1.0, s.log2_S),
        lse_q,
        lost_q,
        centre,
        lost_centre,
        s.log1p_t,
        mean_p_d,
        mean_q_d,
        s.entropy,
    )


@triton.jit
def store_statistics(out, s, row, shift, want: tl.constexpr, reading: tl.constexpr):
    """Write the saved values and the fields of a row; a NaN as the first saved value marks a row
    whose sums do not hold.
    """
    saved = saved_values(s, shift, row.scale, want)
    tl.store(out.saved, tl.where(s.hold, saved.origin, float("nan")))
    for i in tl.static_range(1, SAVED):
        tl.store(out.saved + i, saved[i])
    store_fields(out, tl.where(s.entropy <= 0.0, 0.0, s.entropy), s.kl, s.ref_kl, want)
    if reading.tokens:
        # Half the base-2 logarithms, which are exact halves: x·s·log2(e) of a finite
        # log-probability may overflow.
        half_scale = row.scale * (LOG2E * 0.5)
        x, y = token_logits(row, want, reading)
        half_p = tl.fma(x, half_scale, s.origin * -0.5) - s.log2_S * 0.5
        tl.store(out.logprob, not_above_zero(half_p * (LN2 * 2.0)))
        if want.kl:
            y, y_lost = scale_reference(y, row.ratio, reading.ratio)
            y, more = split_sum(y, -shift)
            half_q = tl.fma(y, half_scale, s.lse_q * -0.5) - s.lost_q * 0.5
            half_q = tl.fma(y_lost + more, half_scale, half_q)
            tl.store(out.ref_logprob, not_above_zero(half_q * (LN2 * 2.0)))


@triton.jit
def store_zeros(out, want: tl.constexpr, reading: tl.constexpr):
    """Write the zeros of a masked row."""
    for value in tl.static_range(SAVED):
        tl.store(out.saved + value, 0.0)
    zero = tl.full([], 0.0, tl.float32)
    store_fields(out, zero, zero, zero, want)
    if reading.tokens:
        tl.store(out.logprob, 0.0)
        if want.kl:
            tl.store(out.ref_logprob, 0.0)
