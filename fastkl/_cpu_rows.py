"""Row statistics and gradients on a CPU in few passes over blocks that stay in cache; rows they cannot hold are left to reference.py.

With e = exp((x - top)·s), s = 1/T, S = Σ e, expectations E[·] = Σ e·(·)/S and c near E[(y - x)·s]:
    d = (y - x)·s - c,   W = E[d],   t = E[expm1(d)],   KL(P‖Q) = log1p(t) - W,   KL(Q‖P) = (W + E[d·expm1(d)])/(1 + t) - log1p(t).
Where all |d| < 1, h = expm1(d) - d and r = d·expm1(d) - h come from the moments E[d²] … E[d⁷]: t = h + W, and every sum is as small
as the result. A wider row takes one expm1 per entry.

Every step acts on one entry or sums one row in an order that its length alone decides, and each row takes the steps that its own
values ask for: the bits of a row do not depend on the rows beside it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Columns of `saved` in a row computed here; reference.FAR, 6, is 0 in them, and LEAN is 0 in any other row.
TOP, INVERSE, SHIFT, CENTRE, LOG1P_T, LOG_MEAN, _, LEAN, MEAN, REF_MEAN = range(10)
# |d| of entries from which no e·exp(d) that counts is lost where e underflows, and above which d is no longer known well enough.
LARGEST_D = 16.0
LARGEST_SHIFT = 2.0**20
# A logarithm of a probability that is 0 in float32 takes part as this: 0·(-inf) would be NaN.
LOWEST = -1e4
# Nats up to which float32 holds a KL, and the fields of Q: beside a near-certain token of Q, 1 - q comes from d.
LARGEST_KL, LARGEST_KL_OF_Q = 8.0, 1.0
# (expm1(d) - d)/d² and (d·expm1(d) - expm1(d) + d)/d², in powers of d: minimax in relative error, 1.6e-6 for |d| ≤ 1 and 4.6e-6 for
# |d| ≤ 1/2.
NEAR, NEAR_OF_Q = 1.0, 0.5
H = (0.5000007505, 0.1666658922, 0.04165279481, 0.00833525517, 0.001426253689, 0.0001997766196)
R = (0.4999994052, 0.3333105852, 0.1250159127, 0.03370366874, 0.006921233201, 0.0)


class Block(NamedTuple):
    """Rows that are computed at once: logits [k, V] of P and of Q, of any type but float64, tokens [k] and 1/T, [k, 1] or a number."""

    x: torch.Tensor
    y: torch.Tensor | None
    tokens: torch.Tensor | None
    scale: torch.Tensor | float


class Room:
    """Float32 buffers of up to `elements` entries that block after block is computed in."""

    def __init__(self, elements: int, device: torch.device) -> None:
        self._elements, self._device, self._buffers = elements, device, {}

    def __call__(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        if name not in self._buffers:
            self._buffers[name] = torch.empty(self._elements, device=self._device)
        return self._buffers[name][: shape[0] * shape[1]].view(shape)


def row_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum rows [k, V] to [k, 1], each in the same order for any k: with several threads, torch divides a sum that is alone among them."""
    if values.shape[0] == 1:
        return values.expand(2, -1).sum(-1, keepdim=True)[:1]
    return values.sum(-1, keepdim=True)


def _dot(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return row_sum(torch.mul(a, b, out=out))


def _is_one(scale: torch.Tensor | float) -> bool:
    return not isinstance(scale, torch.Tensor) and scale == 1.0


def _difference(y: torch.Tensor, x: torch.Tensor, top: torch.Tensor, shift: torch.Tensor, room: Room) -> torch.Tensor:
    """y - x - shift in float32, for whole numbers [k, 1], taken from the side farther from 0, which loses no digit by that."""
    out = room("d", x.shape)
    y = _wide(y, out)
    if not bool(shift.any()):
        return torch.sub(y, x, out=out)
    of_y = torch.where((top + shift).abs() >= top.abs(), shift, 0.0)
    return torch.sub(y, of_y, out=out).sub_(torch.add(x, shift - of_y, out=room("work", x.shape)))


def _wide(values: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float32 else out.copy_(values)


def statistics(block: Block, fields: set[str], room: Room) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """({field: [k]}, saved [k, 10], whether they hold [k]) of a block, for the fields asked for."""
    x, y, tokens, scale = block
    shape = x.shape
    x = _wide(x, room("x", shape))
    e, work = room("e", shape), room("work", shape)
    top = x.amax(-1, keepdim=True)
    if _is_one(scale):
        torch.softmax(x, -1, out=e)
    else:
        torch.softmax(torch.sub(x, top, out=work).mul_(scale), -1, out=e)
    # e carries a factor that S does away with: exp(0) is its largest.
    weight = row_sum(e)
    largest = e.amax(-1, keepdim=True)
    log_sum = (weight / largest).log()
    saved = torch.zeros(shape[0], 10, device=x.device)
    saved[:, TOP : INVERSE + 1] = torch.cat([top, largest / weight], -1)
    results, holds = {}, log_sum.isfinite()
    if tokens is not None:
        log_p = (x.gather(-1, tokens[:, None]) - top) * scale - log_sum
        results["logprob"] = log_p
    if "entropy" in fields:
        z = torch.sub(x, top, out=work) if _is_one(scale) else work
        mean = _dot(z.clamp_(min=LOWEST), e, work) / weight
        results["entropy"] = log_sum - mean
        saved[:, LOG_MEAN] = mean[:, 0]
        holds &= mean.isfinite()
    if y is not None:
        holds &= _pair_statistics(block, x, e, weight, fields, room, results, saved)
    saved[:, LEAN] = 1.0
    return {name: value[:, 0] for name, value in results.items()}, saved, holds[:, 0]


def _pair_statistics(block: Block, x: torch.Tensor, e: torch.Tensor, weight: torch.Tensor, fields: set[str], room: Room,
                     results: dict[str, torch.Tensor], saved: torch.Tensor) -> torch.Tensor:
    """Put the fields of both tensors into `results` and `saved`; return whether they hold, [k, 1]."""
    work, top = room("work", x.shape), saved[:, :1]
    of_q = bool(fields & {"ref_kl", "ref_logprob"})
    d = _difference(block.y, x, top, torch.zeros_like(top), room)
    centre = _dot(e, d, work) / weight
    shift = torch.where(centre.abs() < 1.0, 0.0, centre.round())
    if bool(shift.any()):
        _difference(block.y, x, top, shift, room)
        centre = torch.where(shift == 0, centre, _dot(e, d, work) / weight)
    d.sub_(centre)
    if not _is_one(block.scale):
        d.mul_(block.scale)
    mean = _dot(e, d, work) / weight
    size = torch.maximum(d.amax(-1, keepdim=True), -d.amin(-1, keepdim=True))
    near = size < (NEAR_OF_Q if of_q else NEAR)
    # t, and E[d·expm1(d)] - t + E[d].
    wide = (~near)[:, 0].nonzero()[:, 0]
    if len(wide) == len(near):
        t, rest = _by_expm1(e, d, weight, mean, of_q, work)
    else:
        if len(wide):
            some_e, some_d, some = (room(name, (len(wide), x.shape[1])) for name in ("power", "third", "work"))
            torch.index_select(e, 0, wide, out=some_e)
            torch.index_select(d, 0, wide, out=some_d)
            others = _by_expm1(some_e, some_d, weight[wide], mean[wide], of_q, some)
        t, rest = _by_moments(e, d, weight, mean, room)
        if len(wide):
            t[wide], rest[wide] = others
    log1p_t = t.log1p()
    kl = (log1p_t - mean).clamp_(min=0.0)
    holds = (size < LARGEST_D) & (kl < LARGEST_KL) & (shift.abs() < LARGEST_SHIFT)
    results["kl"] = kl
    saved[:, SHIFT : LOG1P_T + 1] = torch.cat([shift, centre, log1p_t], -1)
    saved[:, MEAN] = mean[:, 0]
    if of_q:
        inverse = 1.0 / (1.0 + t)
        ref_kl = (rest * inverse + (t * inverse - log1p_t)).clamp_(min=0.0)
        results["ref_kl"] = ref_kl
        saved[:, REF_MEAN] = ((rest + t) * inverse)[:, 0]
        holds &= (kl < LARGEST_KL_OF_Q) & (ref_kl < LARGEST_KL_OF_Q)
    if block.tokens is not None:
        results["ref_logprob"] = (results["logprob"] + d.gather(-1, block.tokens[:, None]) - log1p_t).clamp_(max=0.0)
    return holds


def _by_moments(e, d, weight, mean, room) -> tuple[torch.Tensor, torch.Tensor]:
    """(t, r) where all |d| < NEAR, or NEAR_OF_Q for r; overwrites e."""
    power, third, work = room("power", d.shape), room("third", d.shape), room("work", d.shape)
    torch.mul(d, d, out=power)
    e.mul_(power)
    torch.mul(e, d, out=third)
    moments = [row_sum(e), row_sum(third), _dot(e, power, work), _dot(third, power, work)]
    power.mul_(power)
    moments += [_dot(e, power, work), _dot(third, power, work)]
    h, r = (sum(moment * factor for moment, factor in zip(moments, factors, strict=True)) / weight for factors in (H, R))
    return h + mean, r


def _by_expm1(e, d, weight, mean, of_q, work) -> tuple[torch.Tensor, torch.Tensor]:
    """(t, r) of any d; r only if of_q."""
    rise = torch.expm1(d, out=work).mul_(e)
    t = row_sum(rise) / weight
    return t, row_sum(rise.mul_(d)) / weight - t + mean if of_q else t


def gradients(block: Block, saved: torch.Tensor, upstream: dict[str, torch.Tensor], grads: tuple[torch.Tensor | None, torch.Tensor | None],
              room: Room, columns: int) -> None:
    """Fill grads [k, V] to P and Q of rows that `statistics` holds, `columns` entries of each at a time; they may be the logits themselves.

    Computes reference.row_gradients from p = e/S and d:
        dP = s·(g_logprob·onehot - p·(g_logprob + g_entropy·(log p - E[log p]) + g_kl·(d - W) + g_ref_kl·rise)),  rise = q/p - 1
        dQ = s·(g_ref_logprob·onehot + p·(g_kl·rise + (1 + rise)·(g_ref_kl·(d - E_q[d]) - g_ref_logprob)))
    """
    g = {name: value[:, None] for name, value in upstream.items()}
    for start in range(0, block.x.shape[1], columns):
        x, y, grad_p, grad_q = (None if side is None else side[:, start : start + columns] for side in (block.x, block.y, *grads))
        _gradients(block._replace(x=x, y=y), start, saved, g, grad_p, grad_q, room)


def _gradients(block: Block, start: int, saved: torch.Tensor, g: dict[str, torch.Tensor], grad_p: torch.Tensor | None,
               grad_q: torch.Tensor | None, room: Room) -> None:
    """Fill the gradients of some columns, the first of which is `start`; all logits are read before any gradient is written."""
    shape, scale = block.x.shape, block.scale
    top, inverse, shift, centre, log1p_t, log_mean, _, _, mean, ref_mean = saved[:, :, None].unbind(1)
    x, d, rise = _wide(block.x, room("x", shape)), None, None
    if g.keys() & {"kl", "ref_kl"} or (grad_q is not None and "ref_logprob" in g):
        d = _difference(block.y, x, top, shift, room).sub_(centre)
        if not _is_one(scale):
            d.mul_(scale)
        if "ref_kl" in g or grad_q is not None:
            rise = torch.sub(d, log1p_t, out=room("rise", shape)).expm1_()
    z = torch.sub(x, top, out=room("x", shape))
    if not _is_one(scale):
        z.mul_(scale)
    e = torch.exp(z, out=room("e", shape)) if "entropy" in g else z.exp_()
    # Beside a near-certain token 1 - p has few digits: with a token, the scale comes last.
    last = scale if g.keys() & {"logprob", "ref_logprob"} and not _is_one(scale) else None
    factor = inverse * scale if last is None else inverse
    if grad_q is not None and not g.keys() & {"kl", "ref_kl", "ref_logprob"}:
        grad_q.zero_()
    elif grad_q is not None:
        bracket = room("q", shape)
        if g.keys() & {"ref_kl", "ref_logprob"}:
            torch.sub(d, ref_mean, out=bracket).mul_(g.get("ref_kl", 0.0))
            if "ref_logprob" in g:
                bracket.sub_(g["ref_logprob"])
            bracket.mul_(torch.add(rise, 1.0, out=room("work", shape)))
            if "kl" in g:
                bracket.add_(torch.mul(rise, g["kl"], out=room("work", shape)))
        else:
            torch.mul(rise, g["kl"], out=bracket)
        _finish(bracket.mul_(factor), e, grad_q, block.tokens, start, g.get("ref_logprob"), last)
    if grad_p is not None and not g.keys() - {"ref_logprob"}:
        grad_p.zero_()
    elif grad_p is not None:
        terms = [(values, g[name]) for name, values in (("kl", d), ("entropy", z), ("ref_kl", rise)) if name in g]
        if "kl" in g:
            d.sub_(mean)
        if "entropy" in g:
            z.clamp_(min=LOWEST).sub_(log_mean)
        if not terms:
            _finish(e.mul_(-factor * g["logprob"]), None, grad_p, block.tokens, start, g["logprob"], last)
            return
        bracket = terms[0][0]
        if len(terms) == 1 and "logprob" not in g:
            e.mul_(-factor * terms[0][1])
        else:
            e.mul_(-factor)
            bracket.mul_(terms[0][1])
            for values, upstream in terms[1:]:
                bracket.add_(values.mul_(upstream))
            if "logprob" in g:
                bracket.add_(g["logprob"])
        _finish(bracket, e, grad_p, block.tokens, start, g.get("logprob"), last)


def _finish(values: torch.Tensor, factor: torch.Tensor | None, grad: torch.Tensor, tokens: torch.Tensor | None, start: int,
            at_token: torch.Tensor | None, last: torch.Tensor | float | None) -> None:
    """Write (values·factor, with at_token [k, 1] added at each row's token)·last into `grad`, rounded to its type once."""
    result = grad if grad.dtype == torch.float32 else values
    if factor is not None:
        torch.mul(values, factor, out=result)
    elif result is not values:
        result.copy_(values)
    if at_token is not None:
        width, index = grad.shape[1], tokens[:, None] - start
        inside = (index >= 0) & (index < width)
        result.scatter_add_(-1, index.clamp(0, width - 1), torch.where(inside, at_token, 0.0))
    if last is not None:
        result.mul_(last)
    if result is not grad:
        grad.copy_(result)
