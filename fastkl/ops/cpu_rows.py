"""Row statistics and gradients on a CPU in few passes over blocks that stay in cache; rows beyond
float32's range go to reference.py.

With e = softmax(x·s), s = 1/T, S = Σ e, near 1, E[·] = Σ e·(·)/S and c near E[(y - x)·s]:
    d = (y - x)·s - c,   W = E[d],   t = E[expm1(d)]
    KL(P‖Q) = log1p(t) - W,   KL(Q‖P) = (W + E[d·expm1(d)])/(1 + t) - log1p(t)
Where all |d| < 1, h = expm1(d) - d and r = d·expm1(d) - h are d² times a polynomial, whose sums are
as small as the result: t = h + W. Its degree is 5, or 4 where all |d| < 1/2. A wider row takes one
expm1 per entry.

KL alone: forward and backward each take one softmax, or both together one; the gradient to P is
p·(d - W).

Every step acts on one entry or sums one row in an order that its length alone decides, and its
values alone select the steps of a row: the bits of a row do not depend on the rows beside it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from .cpu_passes import Block, Room, difference, dot, is_one, row_sum, softmax, wide

# Columns of `saved` in a row computed here; reference.FAR, 6, holds LEAN in it, and 0 or 1 in any
# other row.
TOP, LOG_SUM, SHIFT, CENTRE, LOG1P_T, LOG_MEAN, KIND, REF_LOGPROB, MEAN, REF_MEAN = range(10)
LEAN = 2.0
# Largest |d|: beyond it e·exp(d) may count where e underflows, and d has too few digits.
LARGEST_D = 16.0
LARGEST_SHIFT = 2.0**20
# Longest 16-bit row whose gradient uses float32 buffers of a whole row; longer rows go in column
# blocks.
LONGEST_16_BIT_ROW = 1 << 15
# Lower clamp of (x - top)·s: 0·(-inf) would be NaN.
LOWEST = -1e4
# Nats up to which float32 holds a KL, and the fields of Q: beside a near-certain token of Q, 1 - q
# comes from d.
LARGEST_KL, LARGEST_KL_OF_Q = 8.0, 2.0
# (expm1(d) - d)/d² and (d·expm1(d) - expm1(d) + d)/d², in powers of d: minimax in relative error,
# 0.8e-6 for |d| ≤ 1/2, 1.6e-6 for |d| ≤ 1, and 4.6e-6 for |d| ≤ 1/2.
NEAR, NEAREST = 1.0, 0.5
H_NEAREST = (0.4999999597, 0.1666628011, 0.04166747686, 0.008395411037, 0.001391465294)
H = (0.5000007505, 0.1666658922, 0.04165279481, 0.00833525517, 0.001426253689, 0.0001997766196)
R = (0.4999994052, 0.3333105852, 0.1250159127, 0.03370366874, 0.006921233201)


def takes_whole_rows(logits: torch.Tensor) -> bool:
    """Whether the gradient of a KL alone is made from softmax(x), a whole row at a time; else
    forward saves what parts of a row need.
    """
    return logits.shape[-1] <= LONGEST_16_BIT_ROW or logits.dtype == torch.float32


class _Sums(NamedTuple):
    """Sums and extremes of each row, [k]; None if not asked for. e is a softmax: weight = Σ e,
    largest = max e, S = weight/largest.
    """

    top: torch.Tensor
    weight: torch.Tensor
    largest: torch.Tensor
    log_mean: torch.Tensor | None = None
    token: torch.Tensor | None = None  # (x - top)·s at the row's token
    shift: torch.Tensor | None = None
    centre: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    size: torch.Tensor | None = None  # the largest |d|
    ref_weight: torch.Tensor | None = None
    ref_largest: torch.Tensor | None = None
    ref_token: torch.Tensor | None = None
    h: torch.Tensor | None = None  # Σ e·(expm1(d) - d)
    r: torch.Tensor | None = None  # Σ e·(d·expm1(d) - expm1(d) + d)


def statistics(
    block: Block, fields: set[str], room: Room, step: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """({field: [k]}, saved [k, 10], whether they hold [k]) of rows, `step` of them in cache at a
    time, for the fields asked for.
    """
    rows = len(block.x)
    parts = [block.part(slice(first, first + step)) for first in range(0, rows, step)]
    if fields == {"kl"} and takes_whole_rows(block.x):
        saved = torch.zeros(rows, 10, dtype=torch.float32, device=block.x.device)
        saved[:, KIND] = LEAN
        kl, held = [], []
        for first, part in zip(range(0, rows, step), parts, strict=True):
            result = kl_only(part, room("e", part.x.shape), room)
            result.save(saved.unbind(-1), slice(first, first + step))
            kl.append(result.kl)
            held.append(result.holds())
        return {"kl": torch.cat(kl)}, saved, torch.cat(held)
    both = not fields.isdisjoint(("ref_kl", "ref_logprob"))
    sums = _joined([_sums(part, "entropy" in fields, both, room) for part in parts])
    saved = torch.zeros(rows, 10, dtype=torch.float32, device=sums.top.device)
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
        holds &= _finish_pair(sums, both, results, saved)
    return results, saved, holds


def _joined(parts: list[_Sums]) -> _Sums:
    """The results of blocks, one after another."""
    if len(parts) == 1:
        return parts[0]
    return _Sums._make(
        None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)
    )


class KLRows(NamedTuple):
    """The KL of each row, [k], what was subtracted from y - x (centre, shift), the sum of its
    softmax (weight), its largest |d| (size).

    shift is None where it is 0 in every row, and size where all |d| < NEAREST.
    """

    kl: torch.Tensor
    centre: torch.Tensor
    weight: torch.Tensor
    shift: torch.Tensor | None
    size: torch.Tensor | None

    def holds(self) -> torch.Tensor:
        """Whether float32 suffices for the row, [k]."""
        holds = self.kl < LARGEST_KL
        if self.size is not None:
            holds &= self.size < LARGEST_D
        return holds if self.shift is None else holds & (self.shift.abs() < LARGEST_SHIFT)

    def all_hold(self) -> bool:
        """Whether float32 suffices for every row; needs no check where all |d| < NEAREST."""
        return (self.size is None and self.shift is None) or bool(self.holds().all())

    def save(self, columns: tuple[torch.Tensor, ...], rows: slice) -> None:
        """Put what backward needs into some rows of the columns of `saved`, which are 0, and LEAN
        for KIND.
        """
        columns[CENTRE][rows] = self.centre
        columns[LOG1P_T][rows] = self.kl
        if self.shift is not None:
            columns[SHIFT][rows] = self.shift


def kl_only(block: Block, e: torch.Tensor, room: Room) -> KLRows:
    """Compute the KL of a block that stays in cache; leaves softmax(x) in `e`, which must not alias
    x, and d in room("d").
    """
    assert block.y is not None
    x = wide(block.x, e)
    d = difference(block.y, x, None, None, room)
    softmax(x, block.scale, e)
    # softmax adds a long row up less accurately than row_sum does.
    weight = row_sum(e)
    shift, centre = _centre(block, e, weight, d, room)
    size, h, _ = _series_sums(e, d, None, False, room)
    # KL = log1p(t) - W with t = h + W. W, the rounding error of the centre, is left out: it changes
    # the KL by -h·W only.
    return KLRows(h.div_(weight).log1p_().clamp_(min=0.0), centre, weight, shift, size)


def _centre(
    block: Block, e: torch.Tensor, weight: torch.Tensor, d: torch.Tensor, room: Room
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Take E[y - x] from d = y - x and scale it, in place; return integer (shift) and remainder
    (centre) of it, [k].
    """
    assert block.y is not None
    work, shift = room("work", d.shape), None
    centre = dot(e, d, work).div_(weight)
    if not _largest(centre) < 1.0:
        shift = torch.where(centre.abs() < 1.0, 0.0, centre.round())
        x = wide(block.x, room("x", d.shape))
        difference(block.y, x, x.amax(-1, keepdim=True), shift[:, None], room)
        centre = torch.where(shift == 0, centre, dot(e, d, work) / weight)
    d.sub_(centre.unsqueeze(-1))
    if not is_one(block.scale):
        d.mul_(block.scale)
    return shift, centre


def _sums(block: Block, entropy: bool, both: bool, room: Room) -> _Sums:
    """The sums of a block that stays in cache; both: r and the log-sum-exp of Q too."""
    x, y, tokens, scale = block
    x = wide(x, room("x", x.shape))
    work = room("work", x.shape)
    e = softmax(x, scale, room("e", x.shape), work)
    top = x.amax(-1, keepdim=True)
    weight, largest, log_mean, token = row_sum(e), e.amax(-1), None, None
    if entropy:
        z = work if not is_one(scale) else torch.sub(x, top, out=work)
        log_mean = dot(z.clamp_(min=LOWEST), e, work)
    if tokens is not None:
        tokens = tokens[:, None]
        token = ((x.gather(-1, tokens) - top) * scale)[:, 0]
    if y is None:
        return _Sums(top[:, 0], weight, largest, log_mean, token)
    d = difference(y, x, None, None, room)
    shift, centre = _centre(block, e, weight, d, room)
    mean = dot(e, d, work)
    of_q: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None] = None, None, None
    if tokens is not None:
        # The digits of 1 - q beside a near-certain token are those of Q's own sum.
        wide_y = wide(y, room("some e", x.shape))
        y_top = wide_y.amax(-1, keepdim=True)
        q = softmax(wide_y, scale, room("some d", x.shape), work)
        of_q = row_sum(q), q.amax(-1), ((wide_y.gather(-1, tokens) - y_top) * scale)[:, 0]
    size, h, r = _series_sums(e, d, mean, both, room)
    shift, size = (torch.zeros_like(centre) if value is None else value for value in (shift, size))
    return _Sums(
        top[:, 0], weight, largest, log_mean, token, shift, centre, mean, size, *of_q, h, r
    )


def _series_sums(
    e: torch.Tensor, d: torch.Tensor, mean: torch.Tensor | None, both: bool, room: Room
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """(largest |d|, Σ e·h, Σ e·r or None) of each row, no largest where all are below NEAREST;
    mean: Σ e·d, if it was computed.
    """
    work = room("work", d.shape)
    nearest = _largest(d) < NEAREST
    size = None if nearest else torch.maximum(-d.amin(-1), d.amax(-1))
    h, r = _series(e, d, H_NEAREST, work), _series(e, d, R, work) if both else None
    if size is None:
        return size, h, r
    near = NEAREST if both else NEAR
    for some, is_near in (((size >= NEAREST) & (size < near), True), (~(size < near), False)):
        rows = some.nonzero()[:, 0]
        if not rows.numel():
            continue
        some_e, some_d, some_work = e, d, work
        if len(rows) < len(d):
            some_e, some_d, some_work = (
                room(name, (len(rows), d.shape[1])) for name in ("some e", "some d", "work")
            )
            torch.index_select(e, 0, rows, out=some_e)
            torch.index_select(d, 0, rows, out=some_d)
        if is_near:
            h[rows] = _series(some_e, some_d, H, some_work)
            continue
        rise = torch.expm1(some_d, out=some_work).mul_(some_e)
        first = row_sum(rise)
        if both:
            of_r = row_sum(rise.mul_(some_d))
        h[rows] = first - (dot(some_e, some_d, some_work) if mean is None else mean[rows])
        if r is not None:
            r[rows] = of_r - h[rows]
    return size, h, r


def _largest(values: torch.Tensor) -> float:
    """The largest |value|; NaN if there is one."""
    smallest, largest = torch.aminmax(values)
    return max(-float(smallest), float(largest))


def _series(
    e: torch.Tensor, d: torch.Tensor, factors: tuple[float, ...], work: torch.Tensor
) -> torch.Tensor:
    """Σ e·d²·(factors[0] + factors[1]·d + …)."""
    torch.add(_number(factors[-2], d.device), d, alpha=factors[-1], out=work)
    for factor in factors[-3::-1]:
        torch.addcmul(_number(factor, d.device), d, work, out=work)
    return row_sum(work.mul_(d).mul_(d).mul_(e))


@functools.cache
def _number(value: float, device: torch.device) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32, device=device)


def _finish_pair(
    sums: _Sums, both: bool, results: dict[str, torch.Tensor], saved: torch.Tensor
) -> torch.Tensor:
    """Put the fields of both tensors into `results` and `saved`; return whether they hold, [k]."""
    assert sums.mean is not None and sums.h is not None and sums.size is not None
    assert sums.shift is not None and sums.centre is not None
    mean, h = sums.mean / sums.weight, sums.h / sums.weight
    t = h + mean
    log1p_t = t.log1p()
    kl = results["kl"] = (log1p_t - mean).clamp_(min=0.0)
    holds = (sums.size < LARGEST_D) & (kl < LARGEST_KL) & (sums.shift.abs() < LARGEST_SHIFT)
    for column, value in (
        (SHIFT, sums.shift),
        (CENTRE, sums.centre),
        (LOG1P_T, log1p_t),
        (MEAN, mean),
    ):
        saved[:, column] = value
    if both:
        assert sums.r is not None
        rest = sums.r / sums.weight
        inverse = 1.0 / (1.0 + t)
        ref_kl = results["ref_kl"] = (rest * inverse + (t * inverse - log1p_t)).clamp_(min=0.0)
        saved[:, REF_MEAN] = (rest + t) * inverse
        holds &= (kl < LARGEST_KL_OF_Q) & (ref_kl < LARGEST_KL_OF_Q)
    if sums.ref_token is not None:
        assert sums.ref_weight is not None and sums.ref_largest is not None
        results["ref_logprob"] = saved[:, REF_LOGPROB] = sums.ref_token - _log_sum(
            sums.ref_weight, sums.ref_largest
        )
    return holds


def _log_sum(weight: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """log S: beside a near-certain token S - 1 keeps what S rounds away."""
    return ((weight - largest) / largest).log1p()
