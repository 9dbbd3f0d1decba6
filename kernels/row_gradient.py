"""Gradients of a tile of a row with respect to its logits, from the row's saved values."""

from collections import namedtuple

import triton
import triton.language as tl

from .divergence_math import FAR_KL, divergence_gradients
from .row_finish import Saved
from .row_load import D_FACTOR, load_edge, or_lanes
from .row_math import (
    JS,
    LN2,
    LOG2E,
    OF_KL,
    SKEW_KL,
    SMALL_D,
    centred,
    h_over_square,
    scale_reference,
    soft_cap,
    soft_cap_slope,
    subtract,
    two_sum,
)

# The upstream gradients of a row's fields; 0 for a field without one.
Upstream = namedtuple("Upstream", "logprob entropy ref_logprob kl ref_kl lse ref_lse")


# Compile-time: the fields that have an upstream gradient, and the gradients requested.
#
# kind: of a divergence other than the KL; its upstream gradient is in the field kl.
Asked = namedtuple(
    "Asked", "logprob entropy ref_logprob kl ref_kl lse ref_lse kind wrt_p wrt_q compensated"
)


# The constants of a row's gradients: its Saved and derived values.
#
# The inverse of P's partition function Z = Σ exp(x·s) is 2^-log2_Z_p · factor_p, with log2_Z_p
# rounded; likewise Q's with saved.log2_Z_q. lse_gap, lse_gap_lo: log Z of Q minus that of P, in
# nats; log(q/p) is (y - x)·s less these two. entropy is relative to the rounded log2_Z_p. formula:
# the Formula of a divergence other than the KL.
Terms = namedtuple("Terms", "saved log2_Z_p factor_p factor_q lse_gap lse_gap_lo entropy formula")


# Location of a row's 16-byte blocks, and the factors of its entries.
#
# The row is entries pad … end - 1 of its blocks; entries from read_end on are not read and have
# gradient 0.
Place = namedtuple(
    "Place",
    "p_block q_block grad_p_block grad_q_block pad end read_end scale ratio",
)


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
def gradient_terms(saved, formula):
    """Return the Terms of a row from its Saved."""
    log2_Z_p, log2_Z_p_lo = two_sum(saved.origin, saved.log2_S)
    # As hi and lo, so that log(q/p) keeps its digits with a large centre.
    lse_gap, lse_gap_lo = two_sum(saved.centre, saved.log1p_t)
    return Terms(
        saved,
        log2_Z_p,
        tl.exp2(-log2_Z_p_lo),
        tl.exp2(-saved.log2_Z_q_lo),
        lse_gap,
        lse_gap_lo + saved.centre_lo,
        saved.entropy - log2_Z_p_lo * LN2,
        formula,
    )


@triton.jit
def entry_gradients(x, y, y_lo, scale, terms, g, asked: tl.constexpr, HAS_RATIO: tl.constexpr):
    """Return the gradients of the weighted statistics with respect to one (scaled) logit of each
    tensor, without the one-hot term of the sampled token.

    With g the upstream gradients, s = 1/T and d = (y - x)·s - centre:
        dx = s·(p·(-g.kl·(d - E_p[d]) - g.entropy·(log p + entropy) - g.logprob + g.lse)
                - g.ref_kl·(q - p))
        dy = s·(g.kl·(q - p) + q·(g.ref_kl·(d - E_q[d]) - g.ref_logprob + g.ref_lse))
    Subtract E_p[d] from d before multiplying: on a peaked row the gradient is that small remainder.
    """
    # p and q omit their factors, which are folded into the row's constants: one multiplication less
    # per entry.
    log2_p = tl.fma(x, scale * LOG2E, -terms.log2_Z_p)
    p = tl.exp2(log2_p)
    if asked.kl or asked.ref_kl:
        difference, lo = subtract(y, x, asked.compensated)
        if HAS_RATIO:
            lo = lo + y_lo
        d = centred(difference, lo, scale, terms.saved.centre, asked.compensated)
        if asked.compensated:
            d = d - terms.saved.centre_lo
    if (asked.wrt_p and asked.ref_kl) or asked.wrt_q:
        q = tl.exp2(tl.fma(y, scale * LOG2E, -terms.saved.log2_Z_q))
        true_p = p * terms.factor_p
        # No fma: for equal rows the rounded products are equal, and the gradient is exactly 0.
        q_minus_p = q * terms.factor_q - true_p
        if asked.compensated and (asked.kl or asked.ref_kl):
            # The difference of two rounded probabilities loses the digits of a small log q - log p.
            log_q_over_p = tl.fma(difference, scale, -terms.lse_gap) + tl.fma(
                lo, scale, -terms.lse_gap_lo
            )
            near = true_p * tl.fma(
                log_q_over_p * log_q_over_p, h_over_square(log_q_over_p), log_q_over_p
            )
            q_minus_p = tl.where(tl.abs(log_q_over_p) < SMALL_D, near, q_minus_p)
    grad_x, grad_y = x, x
    if asked.wrt_p:
        weight = scale * terms.factor_p
        bracket = -weight * (g.logprob - g.lse + g.entropy * terms.entropy)
        if asked.entropy:
            bracket = tl.fma(log2_p, weight * (-LN2) * g.entropy, bracket)
        if asked.kl:
            bracket = tl.fma(d - terms.saved.mean_p, -weight * g.kl, bracket)
        grad_x = p * bracket
        if asked.entropy or asked.kl:
            # An entry with p = 0 has gradient 0, even if its log is infinite.
            grad_x = tl.where(p == 0.0, 0.0, grad_x)
        if asked.ref_kl:
            grad_x = tl.fma(q_minus_p, -scale * g.ref_kl, grad_x)
    if asked.wrt_q:
        if asked.ref_logprob or asked.ref_kl or asked.ref_lse:
            weight = scale * terms.factor_q
            bracket = -weight * (g.ref_logprob - g.ref_lse)
            if asked.ref_kl:
                bracket = tl.fma(d - terms.saved.mean_q, weight * g.ref_kl, bracket)
            grad_y = tl.where(q == 0.0, 0.0, q * bracket)
            if asked.kl:
                grad_y = tl.fma(q_minus_p, scale * g.kl, grad_y)
        else:
            grad_y = q_minus_p * (scale * g.kl)
    return grad_x, grad_y


@triton.jit
def store_gradient(block, offs, grad, place, EDGE: tl.constexpr):
    """Store the gradients of a tile, for EDGE tiles only inside the row; 0 from read_end on."""
    if EDGE:
        grad = tl.where(offs < place.read_end, grad, 0.0)
        tl.store(block + offs, grad, mask=(offs >= place.pad) & (offs < place.end))
    else:
        tl.store(block + offs, grad)


@triton.jit
def entry_ratio(x, y, y_lo, scale, terms, COMPENSATED: tl.constexpr, HAS_RATIO: tl.constexpr):
    """Return log2 p, without the factor terms.factor_p, and D_FACTOR·log(q/p) of entries."""
    difference, lo = subtract(y, x, COMPENSATED)
    if HAS_RATIO:
        lo = lo + y_lo
    d = centred(difference, lo, scale * D_FACTOR, terms.lse_gap * D_FACTOR, COMPENSATED)
    return tl.fma(x, scale * LOG2E, -terms.log2_Z_p), d - terms.lse_gap_lo * D_FACTOR


# Loaded entries, tuples with one tensor per group: offsets in the row's blocks, and raw logits.
Raw = namedtuple("Raw", "offs x y")


@triton.jit
def raw_entry(raw, i: tl.constexpr, place, reading: tl.constexpr):
    """Return the capped logits of a group; Q's times the ratio of temperatures, as hi and lo."""
    x = soft_cap(raw.x[i], reading.softcap, place.p_block.dtype.element_ty)
    capped_y = soft_cap(raw.y[i], reading.ref_softcap, place.q_block.dtype.element_ty)
    y, y_lo = scale_reference(capped_y, place.ratio, reading.ratio)
    return x, capped_y, y, y_lo


@triton.jit
def write_entries(
    place, raw, terms, g, asked: tl.constexpr, reading: tl.constexpr, EDGE: tl.constexpr,
    ALL_NEAR: tl.constexpr,
):  # fmt: skip
    """Write the gradients of entries; ALL_NEAR: see divergence_gradients."""
    for i in tl.static_range(len(raw.x)):
        x, capped_y, y, y_lo = raw_entry(raw, i, place, reading)
        if asked.kind.name == OF_KL:
            grad_x, grad_y = entry_gradients(
                x, y, y_lo, place.scale, terms, g, asked, reading.ratio
            )
        else:
            log2_p, d = entry_ratio(
                x, y, y_lo, place.scale, terms, asked.compensated, reading.ratio
            )
            grad_x, grad_y = divergence_gradients(
                log2_p, d, g.kl * place.scale, terms, asked.kind, ALL_NEAR
            )
        # Without soft caps and a ratio these factors are the constant 1.
        if asked.wrt_p:
            grad_x = grad_x * soft_cap_slope(x, reading.softcap)
            store_gradient(place.grad_p_block, raw.offs[i], grad_x, place, EDGE)
        if asked.wrt_q:
            grad_y = grad_y * soft_cap_slope(capped_y, reading.ref_softcap) * place.ratio
            store_gradient(place.grad_q_block, raw.offs[i], grad_y, place, EDGE)


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
    """Write the gradients of aligned blocks, tiling.groups per thread; all loads precede the
    stores, so that no store delays them.
    """
    raw = Raw((), (), ())
    for i in tl.static_range(tiling.groups):
        group = first_group + i * tiling.threads + tl.arange(0, tiling.threads)[:, None]
        offs = group * tiling.lanes + tl.arange(0, tiling.lanes)[None, :]
        inside = (offs >= place.pad) & (offs < place.read_end)
        raw = Raw(
            raw.offs + (offs,),
            raw.x + (load_edge(place.p_block + offs, inside, EDGE).to(tl.float32),),
            raw.y + (load_edge(place.q_block + offs, inside, EDGE).to(tl.float32),),
        )
    far = 0
    if asked.kind.name == JS or asked.kind.name == SKEW_KL:
        for i in tl.static_range(tiling.groups):
            x, _, y, y_lo = raw_entry(raw, i, place, reading)
            _, d = entry_ratio(x, y, y_lo, place.scale, terms, asked.compensated, reading.ratio)
            far = or_lanes(d.to(tl.int32, bitcast=True)) | far
        far = tl.maximum(tl.max((far >> 30) & 1, 0), (terms.saved.log1p_t > FAR_KL).to(tl.int32))
    if far > 0:
        write_entries(place, raw, terms, g, asked, reading, EDGE, False)
    else:
        write_entries(place, raw, terms, g, asked, reading, EDGE, True)
