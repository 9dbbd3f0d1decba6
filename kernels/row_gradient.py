"""The gradients of a tile of a row with respect to its logits, from the row's saved values."""

from typing import NamedTuple

import triton
import triton.language as tl

from .row_finish import Saved
from .row_math import (
    LN2,
    LOG2E,
    SMALL_D,
    centred,
    expm1_over_square,
    scale_reference,
    soft_cap,
    soft_cap_slope,
    split_sum,
    subtract,
)


class Upstream(NamedTuple):
    """The upstream gradients of a row's fields; 0 for a field without one."""

    logprob: tl.tensor
    entropy: tl.tensor
    ref_logprob: tl.tensor
    kl: tl.tensor
    ref_kl: tl.tensor


class Asked(NamedTuple):
    """Compile-time: the fields that have an upstream gradient, and the tensors whose gradient is
    asked for.
    """

    logprob: bool
    entropy: bool
    ref_logprob: bool
    kl: bool
    ref_kl: bool
    wrt_p: bool
    wrt_q: bool
    exact: bool


class Terms(NamedTuple):
    """The constants of a row's gradients: each log-partition function, in base 2, as a rounded
    exponent and a factor for the rest.

    ratio, lost_ratio: log q - log p is (y - x)·s less these two.
    """

    lse_p: tl.tensor
    factor_p: tl.tensor
    lse_q: tl.tensor
    factor_q: tl.tensor
    centre: tl.tensor
    lost_centre: tl.tensor
    ratio: tl.tensor
    lost_ratio: tl.tensor
    mean_p_d: tl.tensor
    mean_q_d: tl.tensor
    entropy: tl.tensor


class Place(NamedTuple):
    """Where a row's 16-byte blocks lie, and what its entries are read with.

    The row is entries pad … end - 1 of its blocks; entries from read_end on are not read and have
    gradient 0.
    """

    p_block: tl.tensor
    q_block: tl.tensor
    grad_p_block: tl.tensor
    grad_q_block: tl.tensor
    pad: tl.tensor
    end: tl.tensor
    read_end: tl.tensor
    scale: tl.tensor
    ratio: tl.tensor


@triton.jit
def load_saved(saved_ptr):
    """Load the Saved of a row."""
    return Saved(
        tl.load(saved_ptr),
        tl.load(saved_ptr + 1),
        tl.load(saved_ptr + 2),
        tl.load(saved_ptr + 3),
        tl.load(saved_ptr + 4),
        tl.load(saved_ptr + 5),
        tl.load(saved_ptr + 6),
        tl.load(saved_ptr + 7),
        tl.load(saved_ptr + 8),
        tl.load(saved_ptr + 9),
    )


@triton.jit
def gradient_terms(saved):
    """The Terms of a row from its Saved."""
    lse_p, lost_p = split_sum(saved.origin, saved.log2_S)
    # log q - log p without its centre: its digits must not depend on the size of the centre.
    ratio, lost_ratio = split_sum(saved.centre, saved.log1p_t)
    return Terms(
        lse_p,
        tl.exp2(-lost_p),
        saved.lse_q,
        tl.exp2(-saved.lost_q),
        saved.centre,
        saved.lost_centre,
        ratio,
        lost_ratio + saved.lost_centre,
        saved.mean_p_d,
        saved.mean_q_d,
        saved.entropy - lost_p * LN2,
    )


@triton.jit
def entry_gradients(x, y, y_lost, scale, terms, g, asked: tl.constexpr, HAS_RATIO: tl.constexpr):
    """Gradients of the weighted statistics with respect to one (scaled) logit of each tensor,
    without the one-hot term of the sampled token.

    With g the upstream gradients, s = 1/T and d = (y - x)·s - centre:
        dx = s·(p·(-g.kl·(d - E_p[d]) - g.entropy·(log p + entropy) - g.logprob) - g.ref_kl·(q - p))
        dy = s·(g.kl·(q - p) + q·(g.ref_kl·(d - E_q[d]) - g.ref_logprob))
    The centre is at the mean under P, and d - E_p[d] is subtracted before anything is multiplied:
    on a peaked row the gradient is what is left of it.
    """
    # p and q stay without their factors, which join the row's constants: one multiplication less
    # per entry.
    log2_p = tl.fma(x, scale * LOG2E, -terms.lse_p)
    p = tl.exp2(log2_p)
    d = x
    q = x
    rise = x
    if asked.kl or asked.ref_kl:
        difference, lost = subtract(y, x, asked.exact)
        if HAS_RATIO:
            lost = lost + y_lost
        d = centred(difference, lost, scale, terms.centre, asked.exact)
        if asked.exact:
            d = d - terms.lost_centre
    if (asked.wrt_p and asked.ref_kl) or asked.wrt_q:
        q = tl.exp2(tl.fma(y, scale * LOG2E, -terms.lse_q))
        true_p = p * terms.factor_p
        # Two rounded products: of equal rows they are equal, and the gradient is exactly 0.
        rise = q * terms.factor_q - true_p
        if asked.exact and (asked.kl or asked.ref_kl):
            # The difference of two rounded probabilities loses the digits of a small log q - log p.
            log_q_over_p = tl.fma(difference, scale, -terms.ratio) + tl.fma(
                lost, scale, -terms.lost_ratio
            )
            near = true_p * tl.fma(
                log_q_over_p * log_q_over_p, expm1_over_square(log_q_over_p), log_q_over_p
            )
            rise = tl.where(tl.abs(log_q_over_p) < SMALL_D, near, rise)
    grad_x = x
    grad_y = x
    if asked.wrt_p:
        weight = scale * terms.factor_p
        bracket = -weight * (g.logprob + g.entropy * terms.entropy)
        if asked.entropy:
            bracket = tl.fma(log2_p, weight * (-LN2) * g.entropy, bracket)
        if asked.kl:
            bracket = tl.fma(d - terms.mean_p_d, -weight * g.kl, bracket)
        grad_x = p * bracket
        if asked.entropy or asked.kl:
            # An entry without probability has no gradient, also where its logarithm is infinite.
            grad_x = tl.where(p == 0.0, 0.0, grad_x)
        if asked.ref_kl:
            grad_x = tl.fma(rise, -scale * g.ref_kl, grad_x)
    if asked.wrt_q:
        if asked.ref_logprob or asked.ref_kl:
            weight = scale * terms.factor_q
            bracket = -weight * g.ref_logprob
            if asked.ref_kl:
                bracket = tl.fma(d - terms.mean_q_d, weight * g.ref_kl, bracket)
            grad_y = tl.where(q == 0.0, 0.0, q * bracket)
            if asked.kl:
                grad_y = tl.fma(rise, scale * g.kl, grad_y)
        else:
            grad_y = rise * (scale * g.kl)
    return grad_x, grad_y


@triton.jit
def write_tile(
    place,
    first_group,
    terms,
    g,
    tiling: tl.constexpr,
    asked: tl.constexpr,
    reading: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Write the gradients of aligned blocks, tiling.groups per thread; all loads come first, so
    that no store delays them.
    """
    THREADS: tl.constexpr = tiling.threads
    LANES: tl.constexpr = tiling.lanes
    xs = ()
    ys = ()
    thread = tl.arange(0, THREADS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    for i in tl.static_range(tiling.groups):
        offs = (first_group + i * THREADS + thread) * LANES + lane
        if EDGE:
            inside = (offs >= place.pad) & (offs < place.read_end)
            xs += (tl.load(place.p_block + offs, mask=inside, other=0.0).to(tl.float32),)
            ys += (tl.load(place.q_block + offs, mask=inside, other=0.0).to(tl.float32),)
        else:
            xs += (tl.load(place.p_block + offs).to(tl.float32),)
            ys += (tl.load(place.q_block + offs).to(tl.float32),)
    for i in tl.static_range(tiling.groups):
        offs = (first_group + i * THREADS + thread) * LANES + lane
        x = soft_cap(xs[i], reading.softcap, place.p_block.dtype.element_ty)
        capped_y = soft_cap(ys[i], reading.ref_softcap, place.q_block.dtype.element_ty)
        y, y_lost = scale_reference(capped_y, place.ratio, reading.ratio)
        grad_x, grad_y = entry_gradients(x, y, y_lost, place.scale, terms, g, asked, reading.ratio)
        if reading.softcap > 0.0:
            grad_x = grad_x * soft_cap_slope(x, reading.softcap)
        if reading.ref_softcap > 0.0:
            grad_y = grad_y * soft_cap_slope(capped_y, reading.ref_softcap)
        if reading.ratio:
            grad_y = grad_y * place.ratio
        if EDGE:
            inside = (offs >= place.pad) & (offs < place.end)
            if asked.wrt_p:
                tl.store(
                    place.grad_p_block + offs,
                    tl.where(offs < place.read_end, grad_x, 0.0),
                    mask=inside,
                )
            if asked.wrt_q:
                tl.store(
                    place.grad_q_block + offs,
                    tl.where(offs < place.read_end, grad_y, 0.0),
                    mask=inside,
                )
        else:
            if asked.wrt_p:
                tl.store(place.grad_p_block + offs, grad_x)
            if asked.wrt_q:
                tl.store(place.grad_q_block + offs, grad_y)
