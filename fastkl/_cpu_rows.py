"""Row statistics and gradients on a CPU in few passes over blocks that stay in cache; rows they cannot hold are left to reference.py.

With e = exp((x - top)·s), s = 1/T, S = Σ e, expectations E[·] = Σ e·(·)/S and c near E[(y - x)·s]:
    d = (y - x)·s - c,   W = E[d],   t = E[expm1(d)],   KL(P‖Q) = log1p(t) - W,   KL(Q‖P) = (W + E[d·expm1(d)])/(1 + t) - log1p(t).
Where all |d| < 1, h = expm1(d) - d and r = d·expm1(d) - h come from the moments E[d²] … E[d⁷]: t = h + W, and every sum is as small
as the result; six of them, five where all |d| < 1/2. A wider row takes one expm1 per entry.

Every step acts on one entry or sums one row in an order that its length alone decides, and each row takes the steps that its own
values ask for: the bits of a row do not depend on the rows beside it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Columns of `saved` in a row computed here; reference.FAR, 6, holds LEAN in it, and 0 or 1 in any other row.
TOP, LOG_SUM, SHIFT, CENTRE, LOG1P_T, LOG_MEAN, KIND, REF_LOGPROB, MEAN, REF_MEAN = range(10)
LEAN = 2.0
# |d| of entries from which no e·exp(d) that counts is lost where e underflows, and above which d is no longer known well enough.
LARGEST_D = 16.0
LARGEST_SHIFT = 2.0**20
# A logarithm of a probability that is 0 in float32 takes part as this: 0·(-inf) would be NaN.
LOWEST = -1e4
# Nats up to which float32 holds a KL, and the fields of Q: beside a near-certain token of Q, 1 - q comes from d.
LARGEST_KL, LARGEST_KL_OF_Q = 8.0, 2.0
# (expm1(d) - d)/d² and (d·expm1(d) - expm1(d) + d)/d², in powers of d: minimax in relative error, 0.8e-6 for |d| ≤ 1/2, 1.6e-6 for |d| ≤ 1,
# and 4.6e-6 for |d| ≤ 1/2.
NEAR, NEAREST = 1.0, 0.5
H_NEAREST = (0.4999999597, 0.1666628011, 0.04166747686, 0.008395411037, 0.001391465294)
H = (0.5000007505, 0.1666658922, 0.04165279481, 0.00833525517, 0.001426253689, 0.0001997766196)
R = (0.4999994052, 0.3333105852, 0.1250159127, 0.03370366874, 0.006921233201)


class Block(NamedTuple):
    """Rows that are computed at once: logits [k, V] of P and of Q, of any type but float64, tokens [k] and 1/T, [k, 1] or a number."""

    x: torch.Tensor
    y: torch.Tensor | None
    tokens: torch.Tensor | None
    scale: torch.Tensor | float

    def part(self, rows: slice) -> Block:
        """Some of the rows."""
        return Block(*[value[rows] if isinstance(value, torch.Tensor) else value for value in self])


class Room:
    """Float32 buffers of up to `elements` entries in which block after block is computed."""

    def __init__(self, elements: int, device: torch.device) -> None:
        self._elements, self._device = elements, device
        self._buffers: dict[str, torch.Tensor] = {}
        self._views: dict[str, torch.Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        view = self._views.get(name)
        if view is None or view.shape != shape:
            if name not in self._buffers:
                self._buffers[name] = torch.empty(self._elements, device=self._device)
            view = self._views[name] = self._buffers[name][: shape[0] * shape[1]].view(shape)
        return view


def row_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum rows [k, V] to [k], each in the same order for any k: with several threads, torch divides a sum that is alone among them."""
    if values.shape[0] == 1 and torch.get_num_threads() > 1:
        return values.expand(2, -1).sum(-1)[:1]
    return values.sum(-1)


def _dot(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return row_sum(torch.mul(a, b, out=out))


def _is_one(scale: torch.Tensor | float) -> bool:
    return not isinstance(scale, torch.Tensor) and scale == 1.0


def _difference(y: torch.Tensor, x: torch.Tensor, top: torch.Tensor, shift: torch.Tensor | None, room: Room) -> torch.Tensor:
    """y - x - shift in float32, for whole numbers [k, 1], taken from the side farther from 0, which loses no digit by that."""
    out = room("d", x.shape)
    y = _wide(y, out)
    if shift is None:
        return torch.sub(y, x, out=out)
    of_y = torch.where((top + shift).abs() >= top.abs(), shift, 0.0)
    return torch.sub(y, of_y, out=out).sub_(torch.add(x, shift - of_y, out=room("work", x.shape)))


def _wide(values: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float32 else out.copy_(values)


class _Sums(NamedTuple):
    """Sums and extremes of each row, [k]: of e, with the factor that S = weight/largest does without, and of d. None: not asked for."""

    top: torch.Tensor
    weight: torch.Tensor
    largest: torch.Tensor
    log_mean: torch.Tensor | None = None
    token: torch.Tensor | None = None  # (x - top)·s at the row's token
    shift: torch.Tensor | None = None
    centre: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    smallest_d: torch.Tensor | None = None
    largest_d: torch.Tensor | None = None
    ref_weight: torch.Tensor | None = None
    ref_largest: torch.Tensor | None = None
    ref_token: torch.Tensor | None = None
    second: torch.Tensor | None = None  # Σ e·d², or Σ e·expm1(d) of a row with |d| from `near` on
    third: torch.Tensor | None = None  # Σ e·d³, or Σ e·expm1(d)·d
    fourth: torch.Tensor | None = None
    fifth: torch.Tensor | None = None
    sixth: torch.Tensor | None = None
    seventh: torch.Tensor | None = None


def statistics(block: Block, fields: set[str], room: Room, step: int) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """({field: [k]}, saved [k, 10], whether they hold [k]) of rows, `step` of them in cache at a time, for the fields asked for."""
    near = NEAREST if fields & {"ref_kl", "ref_logprob"} else NEAR
    parts = [_sums(block.part(slice(first, first + step)), "entropy" in fields, near, room) for first in range(0, block.x.shape[0], step)]
    sums = _Sums(*(None if column[0] is None else column[0] if len(column) == 1 else torch.cat(column) for column in zip(*parts, strict=True)))
    saved = torch.zeros(len(sums.top), 10, device=sums.top.device)
    log_sum = _log_sum(sums.weight, sums.largest)
    saved[:, TOP], saved[:, LOG_SUM], saved[:, KIND] = sums.top, log_sum, LEAN
    results, holds = {}, log_sum.isfinite()
    if sums.token is not None:
        results["logprob"] = sums.token - log_sum
    if sums.log_mean is not None:
        mean = sums.log_mean / sums.weight
        results["entropy"] = log_sum - mean
        saved[:, LOG_MEAN] = mean
    if block.y is not None:
        holds &= _finish_pair(sums, fields, near, results, saved)
    return results, saved, holds


def _sums(block: Block, entropy: bool, near: float, room: Room) -> _Sums:
    """The sums of a block that stays in cache."""
    x, y, tokens, scale = block
    x = _wide(x, room("x", x.shape))
    e, work, scaled = room("e", x.shape), room("work", x.shape), not _is_one(scale)
    top = x.amax(-1, keepdim=True)
    torch.softmax(torch.sub(x, top, out=work).mul_(scale) if scaled else x, -1, out=e)
    weight, largest, log_mean, token = row_sum(e), e.amax(-1), None, None
    if entropy:
        z = work if scaled else torch.sub(x, top, out=work)
        log_mean = _dot(z.clamp_(min=LOWEST), e, work)
    if tokens is not None:
        tokens = tokens[:, None]
        token = ((x.gather(-1, tokens) - top) * scale)[:, 0]
    if y is None:
        return _Sums(top[:, 0], weight, largest, log_mean, token)
    d = _difference(y, x, top, None, room)
    centre = _dot(e, d, work)[:, None]
    shift = torch.zeros_like(centre)
    if not float(centre.abs().amax()) < 1.0:
        shift = torch.where(centre.abs() < 1.0, 0.0, centre.round())
        _difference(y, x, top, shift, room)
        centre = torch.where(shift == 0, centre, _dot(e, d, work)[:, None])
    d.sub_(centre)
    if scaled:
        d.mul_(scale)
    mean, smallest, largest_d = _dot(e, d, work), d.amin(-1), d.amax(-1)
    of_q = None, None, None
    if tokens is not None:
        # The digits of 1 - q beside a near-certain token are those of Q's own sum.
        wide_y, q = _wide(y, room("power", x.shape)), room("third", x.shape)
        y_top = wide_y.amax(-1, keepdim=True)
        torch.softmax(torch.sub(wide_y, y_top, out=work).mul_(scale) if scaled else wide_y, -1, out=q)
        of_q = row_sum(q), q.amax(-1), ((wide_y.gather(-1, tokens) - y_top) * scale)[:, 0]
    size = max(-float(smallest.amin()), float(largest_d.amax()))
    if size < near:
        moments = _moments(e, d, room, size < NEAREST)
    else:
        wide = torch.maximum(-smallest, largest_d).lt(near).logical_not_().nonzero()[:, 0]
        if len(wide) == len(weight):
            moments = _by_expm1(e, d, work)
        else:
            some_e, some_d, some = (room(name, (len(wide), x.shape[1])) for name in ("power", "third", "work"))
            torch.index_select(e, 0, wide, out=some_e)
            torch.index_select(d, 0, wide, out=some_d)
            others, moments = _by_expm1(some_e, some_d, some), _moments(e, d, room, near == NEAREST)
            for moment, other in zip(moments, others, strict=True):
                moment[wide] = other
    return _Sums(top[:, 0], weight, largest, log_mean, token, shift[:, 0], centre[:, 0], mean, smallest, largest_d, *of_q, *moments)


def _moments(e: torch.Tensor, d: torch.Tensor, room: Room, nearest: bool) -> list[torch.Tensor]:
    """Σ e·d² … Σ e·d⁷, the last only where a row is not `nearest`; overwrites e."""
    power, third, work = room("power", d.shape), room("third", d.shape), room("work", d.shape)
    torch.mul(d, d, out=power)
    e.mul_(power)
    torch.mul(e, d, out=third)
    moments = [row_sum(e), row_sum(third), _dot(e, power, work), _dot(third, power, work)]
    power.mul_(power)
    sixth = _dot(e, power, work)
    return [*moments, sixth, sixth if nearest else _dot(third, power, work)]


def _by_expm1(e: torch.Tensor, d: torch.Tensor, work: torch.Tensor) -> list[torch.Tensor]:
    """Σ e·expm1(d) and Σ e·expm1(d)·d, in place of the moments."""
    rise = torch.expm1(d, out=work).mul_(e)
    total = row_sum(rise)
    return [total, row_sum(rise.mul_(d)), *[total] * 4]


def _finish_pair(sums: _Sums, fields: set[str], near: float, results: dict[str, torch.Tensor], saved: torch.Tensor) -> torch.Tensor:
    """Put the fields of both tensors into `results` and `saved`; return whether they hold, [k]."""
    size = torch.maximum(-sums.smallest_d, sums.largest_d)
    mean, is_near = sums.mean / sums.weight, size < near
    h = torch.where(size < NEAREST, _combine(sums, H_NEAREST), _combine(sums, H)) / sums.weight
    t = torch.where(is_near, h + mean, sums.second / sums.weight)
    log1p_t = t.log1p()
    kl = results["kl"] = (log1p_t - mean).clamp_(min=0.0)
    holds = (size < LARGEST_D) & (kl < LARGEST_KL) & (sums.shift.abs() < LARGEST_SHIFT)
    for column, value in ((SHIFT, sums.shift), (CENTRE, sums.centre), (LOG1P_T, log1p_t), (MEAN, mean)):
        saved[:, column] = value
    if near == NEAREST:
        # E[d·expm1(d)] - t + E[d].
        rest = torch.where(is_near, _combine(sums, R) / sums.weight, sums.third / sums.weight - t + mean)
        inverse = 1.0 / (1.0 + t)
        ref_kl = results["ref_kl"] = (rest * inverse + (t * inverse - log1p_t)).clamp_(min=0.0)
        saved[:, REF_MEAN] = (rest + t) * inverse
        holds &= (kl < LARGEST_KL_OF_Q) & (ref_kl < LARGEST_KL_OF_Q)
    if sums.ref_token is not None:
        results["ref_logprob"] = saved[:, REF_LOGPROB] = sums.ref_token - _log_sum(sums.ref_weight, sums.ref_largest)
    return holds


def _log_sum(weight: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """log S: beside a near-certain token S - 1 keeps what S rounds away."""
    return ((weight - largest) / largest).log1p()


def _combine(sums: _Sums, factors: tuple[float, ...]) -> torch.Tensor:
    """The moments times their factors."""
    total = sums.second * factors[0]
    for moment, factor in zip(sums[-5:], factors[1:], strict=False):
        total.add_(moment * factor)
    return total


def gradients(block: Block, saved: torch.Tensor, upstream: dict[str, torch.Tensor], grads: tuple[torch.Tensor | None, torch.Tensor | None],
              room: Room, elements: int) -> None:
    """Fill grads [k, V] to P and Q of rows that `statistics` holds, `elements` at a time; they may be the logits themselves.

    Computes reference.row_gradients from p = e/S and d:
        dP = s·(g_logprob·onehot - p·(g_logprob + g_entropy·(log p - E[log p]) + g_kl·(d - W) + g_ref_kl·rise)),  rise = q/p - 1
        dQ = s·(g_ref_logprob·onehot + p·(g_kl·rise + (1 + rise)·(g_ref_kl·(d - E_q[d]) - g_ref_logprob)))
    """
    g = {name: value[:, None] for name, value in upstream.items()}
    kept = saved.clone()[:, :, None]
    factor = kept[:, KIND] = torch.exp(-kept[:, LOG_SUM]) * block.scale
    shifted = bool(saved[:, SHIFT].any())
    # The gradient to P of one field is one product.
    only = next(iter(g)) if len(g) == 1 and grads[1] is None and not g.keys() & {"logprob", "ref_logprob"} else None
    if only is not None:
        kept[:, KIND] = -factor * g[only]
    vocabulary = block.x.shape[1]
    step = max(1, elements // vocabulary)
    for first in range(0, len(saved), step):
        rows = slice(first, first + step)
        here, given = block.part(rows), {name: value[rows] for name, value in g.items()} if only is None else g
        values, targets = kept[rows].unbind(1), [None if grad is None else grad[rows] for grad in grads]
        if vocabulary <= elements:
            _gradients(here, 0, values, shifted, only, given, *targets, room)
            continue
        for start in range(0, vocabulary, elements):
            x, y, *some = (None if side is None else side[:, start : start + elements] for side in (here.x, here.y, *targets))
            _gradients(here._replace(x=x, y=y), start, values, shifted, only, given, *some, room)


def _gradients(block: Block, start: int, kept: tuple[torch.Tensor, ...], shifted: bool, only: str | None, g: dict[str, torch.Tensor],
               grad_p: torch.Tensor | None, grad_q: torch.Tensor | None, room: Room) -> None:
    """Fill the gradients of some columns, the first of which is `start`; all logits are read before any gradient is written.

    kept: the columns of `saved`, [k, 1] each, with s/S in place of KIND, or -g·s/S for the one field `only`.
    """
    shape, scale = block.x.shape, block.scale
    top, log_sum, shift, centre, log1p_t, log_mean, factor, log_q, mean, ref_mean = kept
    x, d, rise = _wide(block.x, room("x", shape)), None, None
    if g.keys() & {"kl", "ref_kl"} or (grad_q is not None and "ref_logprob" in g):
        d = _difference(block.y, x, top, shift if shifted else None, room).sub_(centre)
        if not _is_one(scale):
            d.mul_(scale)
        if "ref_kl" in g or grad_q is not None:
            rise = torch.sub(d, log1p_t, out=room("rise", shape)).expm1_()
    z = torch.sub(x, top, out=room("x", shape))
    if not _is_one(scale):
        z.mul_(scale)
    token = _Token(block.tokens - start, shape[1]) if g.keys() & {"logprob", "ref_logprob"} else None
    log_p = None if token is None else token.of(z) - log_sum
    e = torch.exp(z, out=room("e", shape)) if "entropy" in g else z.exp_()
    if grad_q is not None and not g.keys() & {"kl", "ref_kl", "ref_logprob"}:
        grad_q.zero_()
    elif grad_q is not None:
        bracket, own = room("q", shape), None
        if g.keys() & {"ref_kl", "ref_logprob"}:
            torch.sub(d, ref_mean, out=bracket).mul_(g.get("ref_kl", 0.0))
            if "ref_logprob" in g:
                own = scale * (
                    log_q.exp() * token.of(bracket) + log_p.exp() * token.of(rise) * g.get("kl", 0.0) - log_q.expm1() * g["ref_logprob"]
                )
                bracket.sub_(g["ref_logprob"])
            bracket.mul_(torch.add(rise, 1.0, out=room("work", shape)))
            if "kl" in g:
                bracket.add_(torch.mul(rise, g["kl"], out=room("work", shape)))
        else:
            torch.mul(rise, g["kl"], out=bracket)
        _write(bracket.mul_(factor), e, grad_q, token, own)
    if grad_p is not None and not g.keys() - {"ref_logprob"}:
        grad_p.zero_()
    elif grad_p is not None:
        terms = [(values, g[name]) for name, values in (("kl", d), ("entropy", z), ("ref_kl", rise)) if name in g]
        if "kl" in g:
            d.sub_(mean)
        if "entropy" in g:
            z.clamp_(min=LOWEST).sub_(log_mean)
        if only is not None:
            _write(terms[0][0], e.mul_(factor), grad_p, None, None)
            return
        if not terms:
            _write(e.mul_(-factor * g["logprob"]), None, grad_p, token, -scale * log_p.expm1() * g["logprob"])
            return
        bracket = terms[0][0].mul_(terms[0][1])
        for values, upstream in terms[1:]:
            bracket.add_(values.mul_(upstream))
        own = None
        if "logprob" in g:
            own = -scale * (log_p.exp() * token.of(bracket) + log_p.expm1() * g["logprob"])
            bracket.add_(g["logprob"])
        _write(bracket, e.mul_(-factor), grad_p, token, own)


class _Token:
    """Each row's token among some columns: its entry of any values there, and the place to write it to."""

    def __init__(self, index: torch.Tensor, width: int) -> None:
        self.inside = ((index >= 0) & (index < width))[:, None]
        self.index = index.clamp(0, width - 1)[:, None]

    def of(self, values: torch.Tensor) -> torch.Tensor:
        return values.gather(-1, self.index)


def _write(values: torch.Tensor, factor: torch.Tensor | None, grad: torch.Tensor, token: _Token | None, own: torch.Tensor | None) -> None:
    """Write values·factor into `grad`, and at each row's token its own [k, 1], rounded to the gradient's type once."""
    result = grad if grad.dtype == torch.float32 else values
    if factor is not None:
        torch.mul(values, factor, out=result)
    elif result is not values:
        result.copy_(values)
    if own is not None:
        result.scatter_(-1, token.index, torch.where(token.inside, own, token.of(result)))
    if result is not grad:
        grad.copy_(result)
