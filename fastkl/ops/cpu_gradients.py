"""Row gradients on a CPU, from the values saved by cpu_rows.statistics."""

from typing import NamedTuple

import torch

from .cpu_passes import (
    LONGEST_SHORT_ROW,
    Block,
    Room,
    difference,
    divided,
    dot,
    is_one,
    softmax,
    softmax_sum,
    wide,
)
from .cpu_rows import (
    CENTRE,
    KIND,
    LOG1P_T,
    LOG_SUM,
    LOWEST_Z,
    MEAN,
    SHIFT,
    KLRows,
    kl_only,
    takes_whole_rows,
)
from .fields import POLICY_FIELDS, REFERENCE_FIELDS, rows_of

NO_ROWS = torch.empty(0, dtype=torch.long, device="cpu")

# A tensor for P and one for Q, None if not requested.
Sides = tuple[torch.Tensor | None, torch.Tensor | None]


def part_of(sides: Sides, at: slice | torch.Tensor | tuple[slice, slice]) -> Sides:
    """Return the rows, or rows and columns, `at` of each side."""
    grad_p, grad_q = sides
    return None if grad_p is None else grad_p[at], None if grad_q is None else grad_q[at]


def kl_and_gradient(
    block: Block, factor: torch.Tensor, grad: torch.Tensor, room: Room, keep_grad: bool
) -> tuple[KLRows, torch.Tensor, Block]:
    """Compute the KL of rows that stay in cache and fill `grad` [k, V] with p·(d - W)·factor, the
    gradient to P if factor, [k, 1] or one for all rows, is -s·upstream.

    Bit-identical to `statistics` then `gradients`, with one softmax fewer. Also returns the numbers
    of the fallback rows, for which float32 does not suffice, and copies of these rows. keep_grad:
    grad must not be written before the logits are read.
    """
    e = (
        room("e", block.x.shape)
        if keep_grad or grad.dtype != torch.float32 or not grad.is_contiguous()
        else grad
    )
    result = kl_only(block, e, room)
    all_valid = result.largest_d is None and result.shift is None
    fallback = NO_ROWS if all_valid else (~result.valid())[:, 0].nonzero()[:, 0]
    copies = block.part(fallback) if fallback.numel() else block
    _about_mean(room("d", e.shape), e, result.weight, room)
    _write(e, divided(factor, result.weight), grad, None, None)
    return result, fallback, copies


def _about_mean(d: torch.Tensor, e: torch.Tensor, weight: torch.Tensor | None, room: Room) -> None:
    """Write e·(d - Σ e·d/weight) to e; d is clobbered. weight: None in short rows, for 1."""
    if d.shape[1] > LONGEST_SHORT_ROW:
        torch.mul(d.sub_(divided(dot(e, d, room("work", d.shape)), weight)), e, out=e)
    elif d.shape[0] > 1 or torch.get_num_threads() == 1:
        torch._softmax_backward_data(d, e, -1, torch.float32, grad_input=e)
    else:  # torch splits a single row's sum across threads
        e.copy_(
            torch._softmax_backward_data(d.expand(2, -1), e.expand(2, -1), -1, torch.float32)[:1]
        )


def gradients(
    block: Block,
    saved: torch.Tensor,
    upstream: dict[str, torch.Tensor],
    grads: Sides,
    room: Room,
) -> None:
    """Fill the gradients [k, V] of rows that `statistics` computed, as many entries at a time as
    `room` has; they may overwrite the logits.

    Computes reference.row_gradients from p = e/S, d and r = q/p - 1 (ratio_minus_1):
        dP = s·(g_logprob·onehot - p·(g_logprob - g_lse + g_entropy·(log p - E[log p])
                                      + g_kl·(d - W) + g_ref_kl·r))
        dQ = s·(g_ref_logprob·onehot
                + p·(g_kl·r + (1 + r)·(g_ref_kl·(d - E_q[d]) - g_ref_logprob + g_ref_lse)))
    """
    vocabulary, elements = block.x.shape[1], room.elements
    step = max(1, elements // vocabulary)
    if upstream.keys() == {"kl"} and takes_whole_rows(block.x):
        columns = saved[:, :, None].unbind(1)
        shift = columns[SHIFT] if bool(saved[:, SHIFT].any()) else None
        centre, kl = columns[CENTRE], columns[LOG1P_T] - columns[MEAN]
        factor = upstream["kl"][:, None] * block.scale
        for first in range(0, len(saved), step):
            rows = slice(first, first + step)
            terms = rows_of(shift, rows), centre[rows], kl[rows], factor[rows]
            _kl_gradients(block.part(rows), terms, part_of(grads, rows), room)
        return
    g = {name: value[:, None] for name, value in upstream.items()}
    kept = saved.clone()[:, :, None]
    factor = kept[:, KIND] = torch.exp(-kept[:, LOG_SUM]) * block.scale
    shifted = bool(saved[:, SHIFT].any())
    # The gradient of a single field to P only is a single product.
    only = (
        next(iter(g))
        if len(g) == 1 and grads[1] is None and g.keys() & {"kl", "entropy", "ref_kl"}
        else None
    )
    if only is not None:
        kept[:, KIND] = -factor * g[only]
    for first in range(0, len(saved), step):
        rows = slice(first, first + step)
        part, part_g = (
            block.part(rows),
            {name: value[rows] for name, value in g.items()} if only is None else g,
        )
        values, part_grads = kept[rows].unbind(1), part_of(grads, rows)
        if vocabulary <= elements:
            _gradients(part, 0, values, shifted, only, part_g, part_grads, room)
            continue
        for start in range(0, vocabulary, elements):
            at = slice(None), slice(start, start + elements)
            tile = part._replace(x=part.x[at], y=None if part.y is None else part.y[at])
            _gradients(tile, start, values, shifted, only, part_g, part_of(part_grads, at), room)


def _kl_gradients(
    block: Block,
    terms: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor],
    grads: Sides,
    room: Room,
) -> None:
    """Fill the gradients of a KL alone, of whole rows; all logits are read before any gradient is
    written.

    terms: shift (None if it is 0 in every row) and centre subtracted from y - x, the KL, and
    s·upstream, [k, 1] each.
    """
    x, y, _, scale = block
    assert y is not None
    (shift, centre, kl, factor), (grad_p, grad_q) = terms, grads
    # A float32 gradient serves as the buffer of e.
    e = (
        grad_p
        if grad_p is not None and grad_p.dtype == torch.float32 and grad_p.is_contiguous()
        else room("e", x.shape)
    )
    x = wide(x, e)
    d = difference(y, x, None if shift is None else x.amax(-1, keepdim=True), shift, room).sub_(
        centre
    )
    if not is_one(scale):
        d.mul_(scale)
    weight = softmax_sum(softmax(x, scale, e))
    factor = divided(factor, weight)
    if grad_q is not None:
        q_minus_p = room("q - p", x.shape)  # times weight
        torch.sub(d, dot(e, d, q_minus_p) + kl, out=q_minus_p).expm1_().mul_(e)
        _write(q_minus_p, factor, grad_q, None, None)
    if grad_p is not None:
        _about_mean(d, e, weight, room)
        _write(e, -factor, grad_p, None, None)


def _gradients(
    block: Block,
    start: int,
    kept: tuple[torch.Tensor, ...],
    shifted: bool,
    only: str | None,
    g: dict[str, torch.Tensor],
    grads: Sides,
    room: Room,
) -> None:
    """Fill the gradients of the columns from `start` on; all logits are read before any gradient is
    written.

    kept: the columns of `saved`, [k, 1] each, with s/S in place of KIND, or -g·s/S if `only` names
    a field.
    """
    shape, scale, (grad_p, grad_q) = block.x.shape, block.scale, grads
    top, log_sum, shift, centre, log1p_t, *_ = kept
    x, d, ratio_minus_1 = wide(block.x, room("x", shape)), None, None
    if g.keys() & {"kl", "ref_kl"} or (
        grad_q is not None and g.keys() & {"ref_logprob", "ref_lse"}
    ):
        assert block.y is not None
        d = difference(block.y, x, top, shift if shifted else None, room).sub_(centre)
        if not is_one(scale):
            d.mul_(scale)
        if "ref_kl" in g or grad_q is not None:
            ratio_minus_1 = torch.sub(d, log1p_t, out=room("q/p - 1", shape)).expm1_()
    z = torch.sub(x, top, out=room("x", shape))
    if not is_one(scale):
        z.mul_(scale)
    token = None
    if g.keys() & {"logprob", "ref_logprob"}:
        assert block.tokens is not None
        token = _Token(block.tokens - start, shape[1])
    log_p = None if token is None else token.of(z) - log_sum
    e = torch.exp(z, out=room("e", shape)) if "entropy" in g else z.exp_()
    terms = _Terms(z, d, ratio_minus_1, e, token, log_p, scale)
    if grad_q is not None:
        _to_q(terms, kept, g, grad_q, room)
    if grad_p is not None:
        _to_p(terms, kept, only, g, grad_p)


class _Terms(NamedTuple):
    """Terms of both gradients in a block's columns: z = (x - top)·s, d, q/p - 1, e = exp(z), and
    each row's token with its log p; None if no upstream gradient needs it.
    """

    z: torch.Tensor
    d: torch.Tensor | None
    ratio_minus_1: torch.Tensor | None
    e: torch.Tensor
    token: "_Token | None"
    log_p: torch.Tensor | None
    scale: torch.Tensor | float


def _to_q(
    terms: _Terms,
    kept: tuple[torch.Tensor, ...],
    g: dict[str, torch.Tensor],
    grad: torch.Tensor,
    room: Room,
) -> None:
    """Write dQ; `kept` as in _gradients."""
    _, d, ratio_minus_1, e, token, log_p, scale = terms
    _, _, _, _, _, _, factor, log_q, _, ref_mean = kept
    if g.keys().isdisjoint(REFERENCE_FIELDS):
        grad.zero_()
        return
    assert d is not None and ratio_minus_1 is not None
    bracket = room("q", e.shape)
    own = None
    if g.keys() & {"ref_kl", "ref_logprob", "ref_lse"}:
        torch.sub(d, ref_mean, out=bracket).mul_(g.get("ref_kl", 0.0)).add_(g.get("ref_lse", 0.0))
        if "ref_logprob" in g:
            assert token is not None and log_p is not None
            own = scale * (
                log_q.exp() * token.of(bracket)
                + log_p.exp() * token.of(ratio_minus_1) * g.get("kl", 0.0)
                - log_q.expm1() * g["ref_logprob"]
            )
            bracket.sub_(g["ref_logprob"])
        bracket.mul_(torch.add(ratio_minus_1, 1.0, out=room("work", e.shape)))
        if "kl" in g:
            bracket.add_(torch.mul(ratio_minus_1, g["kl"], out=room("work", e.shape)))
    else:
        torch.mul(ratio_minus_1, g["kl"], out=bracket)
    _write(bracket.mul_(factor), e, grad, token, own)


def _to_p(
    terms: _Terms,
    kept: tuple[torch.Tensor, ...],
    only: str | None,
    g: dict[str, torch.Tensor],
    grad: torch.Tensor,
) -> None:
    """Write dP, clobbering z, d and e; `kept` and `only` as in _gradients."""
    z, d, ratio_minus_1, e, token, log_p, scale = terms
    _, _, _, _, _, log_mean, factor, _, mean, _ = kept
    if g.keys().isdisjoint(POLICY_FIELDS):
        grad.zero_()
        return
    products = [
        (v, g[name])
        for name, v in (("kl", d), ("entropy", z), ("ref_kl", ratio_minus_1))
        if name in g and v is not None
    ]
    if "kl" in g and d is not None:
        d.sub_(mean)
    if "entropy" in g:
        z.clamp_(min=LOWEST_Z).sub_(log_mean)
    if only is not None:
        _write(products[0][0], e.mul_(factor), grad, None, None)
        return
    own, lse, logprob = None, g.get("lse", 0.0), g.get("logprob", 0.0)
    if not products:
        if log_p is not None:
            own = scale * (log_p.exp() * lse - log_p.expm1() * logprob)
        _write(e.mul_(factor * (lse - logprob)), None, grad, token, own)
        return
    bracket = products[0][0].mul_(products[0][1])
    for values, upstream in products[1:]:
        bracket.add_(values.mul_(upstream))
    if "lse" in g:
        bracket.sub_(lse)
    if "logprob" in g:
        assert token is not None and log_p is not None
        own = -scale * (log_p.exp() * token.of(bracket) + log_p.expm1() * logprob)
        bracket.add_(logprob)
    _write(bracket, e.mul_(-factor), grad, token, own)


class _Token:
    """Each row's token among a block's columns: its position, and its entry of any values."""

    def __init__(self, index: torch.Tensor, width: int) -> None:
        self.inside = ((index >= 0) & (index < width))[:, None]
        self.index = index.clamp(0, width - 1)[:, None]

    def of(self, values: torch.Tensor) -> torch.Tensor:
        return values.gather(-1, self.index)


def _write(
    values: torch.Tensor,
    factor: torch.Tensor | None,
    grad: torch.Tensor,
    token: _Token | None,
    own: torch.Tensor | None,
) -> None:
    """Write values·factor to `grad`, and `own` [k, 1] at each row's token, each rounded to the
    gradient's type once.
    """
    result = grad if grad.dtype == torch.float32 else values
    if factor is not None:
        torch.mul(values, factor, out=result)
    elif result is not values:
        result.copy_(values)
    if own is not None:
        assert token is not None
        result.scatter_(-1, token.index, torch.where(token.inside, own, token.of(result)))
    if result is not grad:
        grad.copy_(result)
