"""Gradients of rows on a CPU from the sums that cpu_rows.statistics has saved."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .cpu_passes import Block, Room, difference, dot, is_one, row_sum, softmax, wide
from .cpu_rows import (
    CENTRE,
    KIND,
    LOG1P_T,
    LOG_SUM,
    LOWEST,
    MEAN,
    SHIFT,
    KLRows,
    kl_only,
    takes_whole_rows,
)

# Entries of a row up to which softmax's backward, one pass instead of four, adds accurately enough:
# its sums lose 1e-5 of 100,000 products.
SHORT = 4096
# Bytes that LentMemory may allocate for the last rows; more where a twelfth of the gradient, or a
# row, is more.
OWN_BYTES = 1 << 18
NONE = torch.empty(0, dtype=torch.long)

# A tensor for P and one for Q, each None where nobody asked for it.
Sides = tuple[torch.Tensor | None, torch.Tensor | None]


def part_of(sides: Sides, at: slice | torch.Tensor | tuple[slice, slice]) -> Sides:
    """Some rows, or rows and columns, of each."""
    of_p, of_q = sides
    return None if of_p is None else of_p[at], None if of_q is None else of_q[at]


class LentMemory:
    """Buffers for a KL and its gradient to P, computed together: gradient rows not yet written,
    memory of their own for the last rows.

    room: buffers for the rows that rows_from allows. own_room: for up to own_rows rows, wherever
    they lie. separate: whether the gradient does not overlap the logits.
    """

    def __init__(self, p: torch.Tensor, q: torch.Tensor, grad: torch.Tensor, step: int) -> None:
        # A row takes d, the products and, of 16-bit logits, their softmax in float32.
        row = (8 if grad.dtype == torch.float32 else 12) * grad.shape[1]
        self._grad, self._lent_rows, self._step = grad, 0, 2 * step
        self.room = self.own_room = Room(0, p.device)
        logits = {side.untyped_storage().data_ptr() for side in (p, q)}
        self.separate = grad.untyped_storage().data_ptr() not in logits
        self._lends = self.separate and grad.is_contiguous() and grad.data_ptr() % 4 == 0
        self._gradient_rows = row // (grad.shape[1] * grad.element_size())
        self.own_rows = max(1, min(2 * step, max(grad.nbytes // 12, OWN_BYTES) // row))

    def rows_from(self, start: int) -> int:
        """How many rows to compute from row `start` on."""
        count = 0
        if self._lends:
            count = min(self._step, (len(self._grad) - start - 1) // (1 + self._gradient_rows))
        if count <= self.own_rows:
            self.room = self.own_room
            return self.own_rows
        if count != self._lent_rows:
            memory = self._grad.view(-1)
            memory = memory[
                (memory.numel() - count * self._gradient_rows * self._grad.shape[1]) // 2 * 2 :
            ]
            self.room = Room(
                0, self._grad.device, memory[: memory.numel() // 2 * 2].view(torch.float32)
            )
            self._lent_rows = count
        return count


def kl_and_gradient(
    block: Block, factor: torch.Tensor, grad: torch.Tensor, room: Room, keep_grad: bool
) -> tuple[KLRows, torch.Tensor, Block]:
    """Compute the KL of rows that stay in cache and fill `grad` [k, V] with p·(d - W)·factor, the
    gradient to P if factor is -s·upstream.

    To the bit what `statistics` and `gradients` compute, with one softmax less. Returns also the
    numbers of the rows for which float32 does not suffice, and copies of them. keep_grad: grad is
    not to be written before the logits are read.
    """
    e = (
        room("e", block.x.shape)
        if keep_grad or grad.dtype != torch.float32 or not grad.is_contiguous()
        else grad
    )
    result = kl_only(block, e, room)
    others = NONE if result.all_hold() else (~result.holds()).nonzero()[:, 0]
    copies = block.part(others) if len(others) else block
    _about_mean(room("d", e.shape), e, result.weight, room)
    _write(e, (factor / result.weight).unsqueeze(-1), grad, None, None)
    return result, others, copies


def _about_mean(d: torch.Tensor, e: torch.Tensor, weight: torch.Tensor, room: Room) -> None:
    """Put e·(d - Σ e·d/weight) into e, and anything into d."""
    if d.shape[1] > SHORT:
        torch.mul(d.sub_(dot(e, d, room("work", d.shape)).div_(weight).unsqueeze(-1)), e, out=e)
    elif len(d) > 1 or torch.get_num_threads() == 1:
        torch._softmax_backward_data(d, e, -1, torch.float32, grad_input=e)
    else:  # torch splits a lone row's sum across threads
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
    """Fill grads [k, V] to P and Q of rows that `statistics` holds, as many entries at a time as
    `room` has; they may be the logits themselves.

    Computes reference.row_gradients from p = e/S, d and rise = q/p - 1:
        dP = s·(g_logprob·onehot - p·(g_logprob + g_entropy·(log p - E[log p])
                                      + g_kl·(d - W) + g_ref_kl·rise))
        dQ = s·(g_ref_logprob·onehot
                + p·(g_kl·rise + (1 + rise)·(g_ref_kl·(d - E_q[d]) - g_ref_logprob)))
    """
    vocabulary, elements = block.x.shape[1], room.elements
    step = max(1, elements // vocabulary)
    if upstream.keys() == {"kl"} and takes_whole_rows(block.x):
        columns = saved[:, :, None].unbind(1)
        shift = columns[SHIFT] if bool(saved[:, SHIFT].any()) else None
        of_rows = _OfRows(
            shift,
            columns[CENTRE],
            columns[LOG1P_T] - columns[MEAN],
            upstream["kl"][:, None] * block.scale,
        )
        for first in range(0, len(saved), step):
            rows = slice(first, first + step)
            _kl_gradients(block.part(rows), of_rows.part(rows), *part_of(grads, rows), room)
        return
    g = {name: value[:, None] for name, value in upstream.items()}
    kept = saved.clone()[:, :, None]
    factor = kept[:, KIND] = torch.exp(-kept[:, LOG_SUM]) * block.scale
    shifted = bool(saved[:, SHIFT].any())
    # The gradient to P of one field is one product.
    only = (
        next(iter(g))
        if len(g) == 1 and grads[1] is None and not g.keys() & {"logprob", "ref_logprob"}
        else None
    )
    if only is not None:
        kept[:, KIND] = -factor * g[only]
    for first in range(0, len(saved), step):
        rows = slice(first, first + step)
        here, given = (
            block.part(rows),
            {name: value[rows] for name, value in g.items()} if only is None else g,
        )
        values, targets = kept[rows].unbind(1), part_of(grads, rows)
        if vocabulary <= elements:
            _gradients(here, 0, values, shifted, only, given, targets, room)
            continue
        for start in range(0, vocabulary, elements):
            at = slice(None), slice(start, start + elements)
            columns_here = here._replace(x=here.x[at], y=None if here.y is None else here.y[at])
            some = part_of(targets, at)
            _gradients(columns_here, start, values, shifted, only, given, some, room)


class _OfRows(NamedTuple):
    """Whole and rest of what is taken from y - x, the KL, and s·upstream of each row, [k, 1]; shift
    is None where it is 0 in every row.
    """

    shift: torch.Tensor | None
    centre: torch.Tensor
    kl: torch.Tensor
    factor: torch.Tensor

    def part(self, rows: slice) -> _OfRows:
        """Some of the rows."""
        shift, centre, kl, factor = self
        some_shift = None if shift is None else shift[rows]
        return _OfRows(some_shift, centre[rows], kl[rows], factor[rows])


def _kl_gradients(
    block: Block,
    of_rows: _OfRows,
    grad_p: torch.Tensor | None,
    grad_q: torch.Tensor | None,
    room: Room,
) -> None:
    """Fill the gradients of the KL alone of whole rows, times `factor`; all logits are read before
    any gradient is written.
    """
    x, y, _, scale = block
    assert y is not None
    shift, centre, kl, factor = of_rows
    # A float32 gradient is the buffer of its own e: one row less in memory.
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
    weight = row_sum(softmax(x, scale, e))
    factor = factor / weight[:, None]
    if grad_q is not None:
        rise = room("rise", x.shape)
        torch.sub(d, dot(e, d, rise)[:, None] + kl, out=rise).expm1_().mul_(e)
        _write(rise, factor, grad_q, None, None)
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
    """Fill the gradients of some columns, the first of which is `start`; all logits are read before
    any gradient is written.

    kept: the columns of `saved`, [k, 1] each, with s/S in place of KIND, or -g·s/S for the one
    field `only`.
    """
    shape, scale, (grad_p, grad_q) = block.x.shape, block.scale, grads
    top, log_sum, shift, centre, log1p_t, *_ = kept
    x, d, rise = wide(block.x, room("x", shape)), None, None
    if g.keys() & {"kl", "ref_kl"} or (grad_q is not None and "ref_logprob" in g):
        assert block.y is not None
        d = difference(block.y, x, top, shift if shifted else None, room).sub_(centre)
        if not is_one(scale):
            d.mul_(scale)
        if "ref_kl" in g or grad_q is not None:
            rise = torch.sub(d, log1p_t, out=room("rise", shape)).expm1_()
    z = torch.sub(x, top, out=room("x", shape))
    if not is_one(scale):
        z.mul_(scale)
    token = None
    if g.keys() & {"logprob", "ref_logprob"}:
        assert block.tokens is not None
        token = _Token(block.tokens - start, shape[1])
    log_p = None if token is None else token.of(z) - log_sum
    e = torch.exp(z, out=room("e", shape)) if "entropy" in g else z.exp_()
    terms = _Terms(z, d, rise, e, token, log_p, scale)
    if grad_q is not None:
        _to_q(terms, kept, g, grad_q, room)
    if grad_p is not None:
        _to_p(terms, kept, only, g, grad_p)


class _Terms(NamedTuple):
    """Terms of both gradients in some columns: z = (x - top)·s, d, rise = q/p - 1, e = exp(z), and
    each row's token with its log p; None where no upstream gradient needs one.
    """

    z: torch.Tensor
    d: torch.Tensor | None
    rise: torch.Tensor | None
    e: torch.Tensor
    token: _Token | None
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
    _, d, rise, e, token, log_p, scale = terms
    _, _, _, _, _, _, factor, log_q, _, ref_mean = kept
    if not g.keys() & {"kl", "ref_kl", "ref_logprob"}:
        grad.zero_()
        return
    assert d is not None and rise is not None
    bracket = room("q", e.shape)
    own = None
    if g.keys() & {"ref_kl", "ref_logprob"}:
        torch.sub(d, ref_mean, out=bracket).mul_(g.get("ref_kl", 0.0))
        if "ref_logprob" in g:
            assert token is not None and log_p is not None
            own = scale * (
                log_q.exp() * token.of(bracket)
                + log_p.exp() * token.of(rise) * g.get("kl", 0.0)
                - log_q.expm1() * g["ref_logprob"]
            )
            bracket.sub_(g["ref_logprob"])
        bracket.mul_(torch.add(rise, 1.0, out=room("work", e.shape)))
        if "kl" in g:
            bracket.add_(torch.mul(rise, g["kl"], out=room("work", e.shape)))
    else:
        torch.mul(rise, g["kl"], out=bracket)
    _write(bracket.mul_(factor), e, grad, token, own)


def _to_p(
    terms: _Terms,
    kept: tuple[torch.Tensor, ...],
    only: str | None,
    g: dict[str, torch.Tensor],
    grad: torch.Tensor,
) -> None:
    """Write dP over z, d and e; `kept` and `only` as in _gradients."""
    z, d, rise, e, token, log_p, scale = terms
    _, _, _, _, _, log_mean, factor, _, mean, _ = kept
    if not g.keys() - {"ref_logprob"}:
        grad.zero_()
        return
    products = [
        (v, g[name])
        for name, v in (("kl", d), ("entropy", z), ("ref_kl", rise))
        if name in g and v is not None
    ]
    if "kl" in g and d is not None:
        d.sub_(mean)
    if "entropy" in g:
        z.clamp_(min=LOWEST).sub_(log_mean)
    if only is not None:
        _write(products[0][0], e.mul_(factor), grad, None, None)
        return
    own = None
    if not products:
        assert log_p is not None
        own = -scale * log_p.expm1() * g["logprob"]
        _write(e.mul_(-factor * g["logprob"]), None, grad, token, own)
        return
    bracket = products[0][0].mul_(products[0][1])
    for values, upstream in products[1:]:
        bracket.add_(values.mul_(upstream))
    if "logprob" in g:
        assert token is not None and log_p is not None
        own = -scale * (log_p.exp() * token.of(bracket) + log_p.expm1() * g["logprob"])
        bracket.add_(g["logprob"])
    _write(bracket, e.mul_(-factor), grad, token, own)


class _Token:
    """Each row's token among some columns: its entry of any values there, and the place to write it
    to.
    """

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
    """Write values·factor into `grad`, and at each row's token its own [k, 1], rounded to the
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
