"""Backward: one read of the logits, one write of each gradient, for any mix of upstream gradients."""

import triton
import triton.language as tl

from .row_fallback import fallback_row, is_fallback, load_double, load_row, log_probability_p, log_probability_q, log_ratio, peak_ratios
from .row_finish import SAVED
from .row_load import row_offset, row_pad, row_ratio, row_scale
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

# Where E_q[d] is further from E_p[d], in nats, float32 sums do not know it well enough for q·(d - E_q[d]).
LARGEST_MEAN = tl.constexpr(1.0)


@triton.jit
def upstream_of(upstream_ptr, row, n_rows, FIELD: tl.constexpr):
    """The upstream gradient of one field; 0 for a field without one."""
    if FIELD >= 0:
        return tl.load(upstream_ptr + n_rows.to(tl.int64) * FIELD + row)
    else:
        return tl.full([], 0.0, tl.float32)


@triton.jit
def load_saved(saved_ptr):
    """What row_finish saved, with log-partition functions in base 2 as a rounded part for the exponent and a factor for what it lost."""
    origin = tl.load(saved_ptr)
    lse_p, lost_p = split_sum(origin, tl.load(saved_ptr + 1))
    lse_q = tl.load(saved_ptr + 2)
    lost_q = tl.load(saved_ptr + 3)
    centre = tl.load(saved_ptr + 4)
    lost_centre = tl.load(saved_ptr + 5)
    # log q - log p without its centre: how small it is must not depend on how far away the row's mean lies.
    ratio, lost_ratio = split_sum(centre, tl.load(saved_ptr + 6))
    lost_ratio += lost_centre
    mean_p_d = tl.load(saved_ptr + 7)
    mean_q_d = tl.load(saved_ptr + 8)
    entropy = tl.load(saved_ptr + 9) - lost_p * LN2
    return (lse_p, tl.exp2(-lost_p), lse_q, tl.exp2(-lost_q), centre, lost_centre, ratio, lost_ratio, mean_p_d, mean_q_d, entropy)


@triton.jit
def entry_gradients(x, y, y_lost, scale, saved, upstream, ENTROPY: tl.constexpr, REF_LOGPROB: tl.constexpr, KL: tl.constexpr,
                    REF_KL: tl.constexpr, WRT_P: tl.constexpr, WRT_Q: tl.constexpr, EXACT: tl.constexpr, HAS_RATIO: tl.constexpr):
    """Gradients of the weighted statistics with respect to one (scaled) logit of each tensor, without the sampled token's own 1.

    With g the upstream gradients, s = 1/T and d = (y - x)·s - centre:
        dx = s·(p·(-g_kl·(d - E_p[d]) - g_entropy·(log p + entropy) - g_logprob) - g_ref_kl·(q - p))
        dy = s·(g_kl·(q - p) + q·(g_ref_kl·(d - E_q[d]) - g_ref_logprob))
    The centre is at the mean under P, and d - E_p[d] is subtracted before anything is multiplied: on a peaked row the
    gradient is what is left of it.
    """
    lse_p, factor_p, lse_q, factor_q, centre, lost_centre, ratio, lost_ratio, mean_p_d, mean_q_d, entropy = saved
    g_logprob, g_entropy, g_ref_logprob, g_kl, g_ref_kl = upstream
    # p and q stay without their factors, which join the row's constants: one multiplication less per entry.
    log2_p = tl.fma(x, scale * LOG2E, -lse_p)
    p = tl.exp2(log2_p)
    d = x
    q = x
    rise = x
    if KL or REF_KL:
        difference, lost = subtract(y, x, EXACT)
        if HAS_RATIO:
            lost = lost + y_lost
        d = centred(difference, lost, scale, centre, EXACT)
        if EXACT:
            d = d - lost_centre
    if (WRT_P and REF_KL) or WRT_Q:
        q = tl.exp2(tl.fma(y, scale * LOG2E, -lse_q))
        true_p = p * factor_p
        # Two rounded products: of equal rows they are equal, and the gradient is exactly 0.
        rise = q * factor_q - true_p
        if EXACT and (KL or REF_KL):
            # The difference of two rounded probabilities loses the digits of a small log q - log p.
            log_q_over_p = tl.fma(difference, scale, -ratio) + tl.fma(lost, scale, -lost_ratio)
            near = true_p * tl.fma(log_q_over_p * log_q_over_p, expm1_over_square(log_q_over_p), log_q_over_p)
            rise = tl.where(tl.abs(log_q_over_p) < SMALL_D, near, rise)
    grad_x = x
    grad_y = x
    if WRT_P:
        weight = scale * factor_p
        bracket = -weight * (g_logprob + g_entropy * entropy)
        if ENTROPY:
            bracket = tl.fma(log2_p, weight * (-LN2) * g_entropy, bracket)
        if KL:
            bracket = tl.fma(d - mean_p_d, -weight * g_kl, bracket)
        grad_x = p * bracket
        if ENTROPY or KL:
            # An entry without probability has no gradient, also where its logarithm is infinite.
            grad_x = tl.where(p == 0.0, 0.0, grad_x)
        if REF_KL:
            grad_x = tl.fma(rise, -scale * g_ref_kl, grad_x)
    if WRT_Q:
        if REF_LOGPROB or REF_KL:
            weight = scale * factor_q
            bracket = -weight * g_ref_logprob
            if REF_KL:
                bracket = tl.fma(d - mean_q_d, weight * g_ref_kl, bracket)
            grad_y = tl.where(q == 0.0, 0.0, q * bracket)
            if KL:
                grad_y = tl.fma(rise, scale * g_kl, grad_y)
        else:
            grad_y = rise * (scale * g_kl)
    return grad_x, grad_y


@triton.jit
def write_tile(p_block, q_block, grad_p_block, grad_q_block, first_group, pad, V, scale, ratio, saved, upstream, read_end, THREADS: tl.constexpr,
               LANES: tl.constexpr, GROUPS: tl.constexpr, ENTROPY: tl.constexpr, REF_LOGPROB: tl.constexpr, KL: tl.constexpr,
               REF_KL: tl.constexpr, WRT_P: tl.constexpr, WRT_Q: tl.constexpr, SOFTCAP: tl.constexpr, REF_SOFTCAP: tl.constexpr,
               HAS_RATIO: tl.constexpr, EDGE: tl.constexpr):
    """The gradients of GROUPS aligned blocks per thread; all loads come first, so that no store delays them. Offsets from read_end on are not read:
    their gradient is 0."""
    EXACT: tl.constexpr = p_block.dtype.element_ty == tl.float32 or q_block.dtype.element_ty == tl.float32 or HAS_RATIO
    xs = ()
    ys = ()
    thread = tl.arange(0, THREADS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    for g in tl.static_range(GROUPS):
        offs = (first_group + g * THREADS + thread) * LANES + lane
        if EDGE:
            inside = (offs >= pad) & (offs < read_end)
            xs += (tl.load(p_block + offs, mask=inside, other=0.0).to(tl.float32),)
            ys += (tl.load(q_block + offs, mask=inside, other=0.0).to(tl.float32),)
        else:
            xs += (tl.load(p_block + offs).to(tl.float32),)
            ys += (tl.load(q_block + offs).to(tl.float32),)
    for g in tl.static_range(GROUPS):
        offs = (first_group + g * THREADS + thread) * LANES + lane
        x = soft_cap(xs[g], SOFTCAP, p_block.dtype.element_ty)
        capped_y = soft_cap(ys[g], REF_SOFTCAP, q_block.dtype.element_ty)
        y, y_lost = scale_reference(capped_y, ratio, HAS_RATIO)
        grad_x, grad_y = entry_gradients(x, y, y_lost, scale, saved, upstream, ENTROPY, REF_LOGPROB, KL, REF_KL, WRT_P, WRT_Q, EXACT, HAS_RATIO)
        if SOFTCAP > 0.0:
            grad_x = grad_x * soft_cap_slope(x, SOFTCAP)
        if REF_SOFTCAP > 0.0:
            grad_y = grad_y * soft_cap_slope(capped_y, REF_SOFTCAP)
        if HAS_RATIO:
            grad_y = grad_y * ratio
        if EDGE:
            inside = (offs >= pad) & (offs < V + pad)
            if WRT_P:
                tl.store(grad_p_block + offs, tl.where(offs < read_end, grad_x, 0.0), mask=inside)
            if WRT_Q:
                tl.store(grad_q_block + offs, tl.where(offs < read_end, grad_y, 0.0), mask=inside)
        else:
            if WRT_P:
                tl.store(grad_p_block + offs, grad_x)
            if WRT_Q:
                tl.store(grad_q_block + offs, grad_y)


@triton.jit
def write_fallback(p_row, q_row, grad_p_row, grad_q_row, token, start, end, V, scale, ratio, saved_ptr, upstream, BLOCK: tl.constexpr,
                   HAS_TOKEN: tl.constexpr, HAS_Q: tl.constexpr, KL: tl.constexpr, REF_KL: tl.constexpr, WRT_P: tl.constexpr,
                   WRT_Q: tl.constexpr, SOFTCAP: tl.constexpr, REF_SOFTCAP: tl.constexpr):
    """Write the gradients of entries `start` … `end - 1` of a row that float32 does not hold, in float64."""
    scale = scale.to(tl.float64)
    q_scale = scale * ratio.to(tl.float64)
    if REF_KL and WRT_Q:
        # Its sums held in forward, but its E_q[d] is not known to enough digits: the row is read again.
        if is_fallback(saved_ptr):
            row = load_row(saved_ptr)
        else:
            row = fallback_row(p_row, q_row, V, scale, q_scale, BLOCK, True, SOFTCAP, REF_SOFTCAP)
    else:
        row = load_row(saved_ptr)
    at_p, at_q = peak_ratios(row, scale, q_scale)
    g_logprob, g_entropy, g_ref_logprob, g_kl, g_ref_kl = upstream
    for first in range(start, end, BLOCK):
        offs_v = first + tl.arange(0, BLOCK)
        inside = offs_v < end
        x = load_double(p_row, first, end, BLOCK, SOFTCAP)
        log_p = log_probability_p(x, row, scale)
        p = tl.exp(log_p)
        grad_x = p * (-g_logprob - g_entropy * (log_p + row.entropy))
        if HAS_Q:
            y = load_double(q_row, first, end, BLOCK, REF_SOFTCAP)
            log_q = log_probability_q(y, row, q_scale)
            q = tl.exp(log_q)
            d = log_ratio(log_p, log_q)
            grad_y = q * -g_ref_logprob
            if KL:
                # An infinite KL without upstream gradient takes no part.
                grad_x -= tl.where(g_kl == 0.0, 0.0, p * (g_kl * ((d - at_p) - row.mean_p)))
                grad_y += g_kl * (q - p)
            if REF_KL:
                grad_x -= g_ref_kl * (q - p)
                grad_y += tl.where(q == 0.0, 0.0, tl.where(g_ref_kl == 0.0, 0.0, q * (g_ref_kl * ((d - at_q) - row.mean_q))))
        if WRT_P:
            # An entry without probability has no gradient, also where its logarithm is infinite.
            grad_x = tl.where(p == 0.0, -g_ref_kl * q if (HAS_Q and REF_KL) else 0.0, grad_x)
            if HAS_TOKEN:
                grad_x += tl.where(offs_v == token, g_logprob, 0.0)
            slope = soft_cap_slope(x, SOFTCAP)
            tl.store(grad_p_row + offs_v, (grad_x * scale * slope).to(tl.float32), mask=inside)
        if WRT_Q:
            if HAS_TOKEN:
                grad_y += tl.where(offs_v == token, g_ref_logprob, 0.0)
            slope = soft_cap_slope(y, REF_SOFTCAP)
            tl.store(grad_q_row + offs_v, (grad_y * q_scale * slope).to(tl.float32), mask=inside)


# Row counts, strides, lengths and where a tensor starts vary from step to step: none of them may cause a recompile.
@triton.jit(do_not_specialize=[
    "temperature", "n_inner", "stride_p_outer", "stride_p_inner", "stride_q_outer", "stride_q_inner",
    "stride_grad", "V", "chunks", "n_rows"], do_not_specialize_on_alignment=[
    "p_ptr", "q_ptr", "grad_p_ptr", "grad_q_ptr", "tokens_ptr", "saved_ptr", "upstream_ptr", "mask_ptr", "temperature_ptr", "ratio_ptr"])
def row_backward(
    p_ptr, q_ptr,  # [outer, inner, V] logits; q is any pointer where no reference takes part
    grad_p_ptr, grad_q_ptr,  # [N, V] rows stride_grad apart, may be the logits themselves but for REF_KL to Q; any pointer where not asked for
    tokens_ptr,  # [N] int64; any pointer without upstream gradients of log-probs
    saved_ptr,  # [N, 10] float32, written by row_finish
    upstream_ptr,  # [fields, N] float32: the upstream gradients that are there
    mask_ptr, temperature_ptr, ratio_ptr,  # as in row_forward
    temperature: tl.float32, n_rows: tl.int32, n_inner: tl.int32,
    stride_p_outer: tl.int64, stride_p_inner: tl.int64, stride_q_outer: tl.int64, stride_q_inner: tl.int64, stride_grad: tl.int64,
    V: tl.int32, chunks: tl.int32,
    CHUNK: tl.constexpr, THREADS: tl.constexpr, LANES: tl.constexpr, GROUPS: tl.constexpr,
    LOGPROB: tl.constexpr, ENTROPY: tl.constexpr, REF_LOGPROB: tl.constexpr, KL: tl.constexpr, REF_KL: tl.constexpr,  # upstream row; -1: none
    WRT_P: tl.constexpr, WRT_Q: tl.constexpr, HAS_MASK: tl.constexpr, TEMPERATURE_PER_ROW: tl.constexpr,
    Q_IN_BLOCKS: tl.constexpr, GRAD_IN_BLOCKS: tl.constexpr, SOFTCAP: tl.constexpr, REF_SOFTCAP: tl.constexpr, HAS_RATIO: tl.constexpr,
):
    """Gradients of one chunk of one row with respect to either or both logits.

    Math:   entry_gradients, write_fallback for a row that float32 does not hold; reference.row_gradients is the definition.
    Grid:   (N · chunks,), a row's chunks next to each other.
    Reads:  N·V of p where p takes part, N·V of q where q does; 40 bytes and the upstream gradients per row. Nothing of V in a masked row or in
            one whose upstream gradients are all 0. For REF_KL to Q each chunk of a row whose E_q[d] is not known reads 3·V of both.
    Writes: N·V of each gradient asked for; exact zeros in those rows.
    Saves:  nothing.
    Special values: an entry with probability 0 has gradient exactly 0; a row with a NaN or with an infinite KL has gradients that are not finite.
    """
    row = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * CHUNK
    upstream = (upstream_of(upstream_ptr, row, n_rows, LOGPROB), upstream_of(upstream_ptr, row, n_rows, ENTROPY),
                upstream_of(upstream_ptr, row, n_rows, REF_LOGPROB), upstream_of(upstream_ptr, row, n_rows, KL),
                upstream_of(upstream_ptr, row, n_rows, REF_KL))
    g_logprob, g_entropy, g_ref_logprob, g_kl, g_ref_kl = upstream
    activity = tl.abs(g_logprob) + tl.abs(g_entropy) + tl.abs(g_ref_logprob) + tl.abs(g_kl) + tl.abs(g_ref_kl)
    if HAS_MASK:
        activity = tl.where(tl.load(mask_ptr + row) != 0, activity, 0.0)
    scale = row_scale(temperature_ptr, temperature, row, row >= 0, TEMPERATURE_PER_ROW)
    ratio = row_ratio(ratio_ptr, row, row >= 0, HAS_RATIO)
    saved_ptr += row * SAVED
    p_row = p_ptr + row_offset(row, n_inner, stride_p_outer, stride_p_inner)
    q_row = q_ptr + row_offset(row, n_inner, stride_q_outer, stride_q_inner)
    grad_p_row = grad_p_ptr + row * stride_grad
    grad_q_row = grad_q_ptr + row * stride_grad
    pad = row_pad(p_row)
    # An inactive row is read up to here: not at all.
    read_end = tl.where(activity != 0.0, V + pad, 0)
    # Hints stand where the pointers are made: a hint on a function's argument is lost when it is inlined.
    p_block = tl.multiple_of(p_row - pad, 16)
    q_block = q_row - pad
    if Q_IN_BLOCKS:
        q_block = tl.multiple_of(q_block, 16)
    grad_p_block = grad_p_row - pad
    grad_q_block = grad_q_row - pad
    if GRAD_IN_BLOCKS:
        grad_p_block = tl.multiple_of(grad_p_block, LANES * grad_p_ptr.dtype.element_ty.primitive_bitwidth // 8)
        grad_q_block = tl.multiple_of(grad_q_block, LANES * grad_q_ptr.dtype.element_ty.primitive_bitwidth // 8)

    # The sampled token's entry has a 1 of its own. Its logits are read before anything is written, its gradient is written last.
    HAS_Q: tl.constexpr = KL >= 0 or REF_KL >= 0 or REF_LOGPROB >= 0
    HAS_TOKEN: tl.constexpr = (WRT_P and LOGPROB >= 0) or (WRT_Q and REF_LOGPROB >= 0)
    EXACT: tl.constexpr = p_ptr.dtype.element_ty == tl.float32 or q_ptr.dtype.element_ty == tl.float32 or HAS_RATIO
    token = row * 0
    if HAS_TOKEN:
        token = tl.load(tokens_ptr + row)
    far = is_fallback(saved_ptr)
    if REF_KL >= 0 and WRT_Q:
        far = far | (tl.abs(tl.load(saved_ptr + 8)) > LARGEST_MEAN)
    if far & (activity != 0.0):
        write_fallback(p_row, q_row, grad_p_row, grad_q_row, token, tl.maximum(first - pad, 0), tl.minimum(first + CHUNK - pad, V), V, scale,
                       ratio, saved_ptr, upstream, THREADS * 2, HAS_TOKEN, HAS_Q, KL >= 0, REF_KL >= 0, WRT_P, WRT_Q, SOFTCAP, REF_SOFTCAP)
        return
    saved = load_saved(saved_ptr)
    if HAS_TOKEN:
        token_here = (token >= 0) & (token + pad >= first) & (token + pad < tl.minimum(first + CHUNK, read_end))
        token_x = soft_cap(tl.load(p_row + token, mask=token_here, other=0.0).to(tl.float32), SOFTCAP, p_ptr.dtype.element_ty)
        capped_token_y = soft_cap(tl.load(q_row + token, mask=token_here, other=0.0).to(tl.float32), REF_SOFTCAP, q_ptr.dtype.element_ty)
        token_y, token_y_lost = scale_reference(capped_token_y, ratio, HAS_RATIO)
        # The gradients may be written over the logits: every warp must have read the token's before any writes.
        tl.debug_barrier()

    TILE_GROUPS: tl.constexpr = THREADS * GROUPS
    begin = first // LANES
    end = tl.minimum(first + CHUNK, V + pad)
    full_end = begin + tl.maximum(end - first, 0) // (TILE_GROUPS * LANES) * TILE_GROUPS
    # Tiles that start before the row (its first, behind a pad) or need only zeros take the masked path; the others none.
    full_begin = tl.where((first == 0) & (pad > 0), tl.minimum(begin + TILE_GROUPS, full_end), begin)
    full_begin = tl.where(read_end > 0, full_begin, full_end)
    for group in range(begin, full_begin, TILE_GROUPS):
        write_tile(p_block, q_block, grad_p_block, grad_q_block, group, pad, V, scale, ratio, saved, upstream, read_end, THREADS, LANES,
                   GROUPS, ENTROPY >= 0, REF_LOGPROB >= 0, KL >= 0, REF_KL >= 0, WRT_P, WRT_Q, SOFTCAP, REF_SOFTCAP, HAS_RATIO, True)
    for group in range(full_begin, full_end, TILE_GROUPS):
        write_tile(p_block, q_block, grad_p_block, grad_q_block, group, pad, V, scale, ratio, saved, upstream, read_end, THREADS, LANES,
                   GROUPS, ENTROPY >= 0, REF_LOGPROB >= 0, KL >= 0, REF_KL >= 0, WRT_P, WRT_Q, SOFTCAP, REF_SOFTCAP, HAS_RATIO, False)
    if full_end * LANES < end:
        write_tile(p_block, q_block, grad_p_block, grad_q_block, full_end, pad, V, scale, ratio, saved, upstream, read_end, THREADS, LANES,
                   GROUPS, ENTROPY >= 0, REF_LOGPROB >= 0, KL >= 0, REF_KL >= 0, WRT_P, WRT_Q, SOFTCAP, REF_SOFTCAP, HAS_RATIO, True)

    if HAS_TOKEN:
        tl.debug_barrier()
        grad_x, grad_y = entry_gradients(token_x, token_y, token_y_lost, scale, saved, upstream, ENTROPY >= 0, REF_LOGPROB >= 0, KL >= 0,
                                         REF_KL >= 0, WRT_P, WRT_Q, EXACT, HAS_RATIO)
        if WRT_P:
            tl.store(grad_p_row + token, (grad_x + scale * g_logprob) * soft_cap_slope(token_x, SOFTCAP), mask=token_here)
        if WRT_Q:
            slope = soft_cap_slope(capped_token_y, REF_SOFTCAP) * ratio
            tl.store(grad_q_row + token, (grad_y + scale * g_ref_logprob) * slope, mask=token_here)
