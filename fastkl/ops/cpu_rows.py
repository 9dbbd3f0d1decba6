"""Row statistics on a CPU in few passes over blocks that stay in cache; rows beyond float32's range
go to reference.py.

With e = softmax(x·s), s = 1/T, S = Σ e, near 1, E[·] = Σ e·(·)/S and c near E[(y - x)·s]:
    d = (y - x)·s - c,   W = E[d],   t = E[expm1(d)]
    KL(P‖Q) = log1p(t) - W,   KL(Q‖P) = (W + E[d·expm1(d)])/(1 + t) - log1p(t)
h = expm1(d) - d and ref_h = d·expm1(d) - h are d² times a polynomial, whose sums are as small as
the result: t = E[h] + W. This holds in near rows, whose h stays below NEAR_H in every entry, so
that -1 < d < 0.751. Other rows take one expm1 per entry.

KL only: forward and backward take one softmax each, or one in total if computed together; the
gradient to P is proportional to p·(d - W).

Each step acts on one entry, or sums one row in an order that depends only on its length; only a
row's values select its steps. So the bits of a row do not depend on other rows.
"""

import functools
from typing import NamedTuple

import torch

from .cpu_passes import (
    Block,
    Room,
    difference,
    divided,
    dot,
    is_one,
    row_sum,
    softmax,
    softmax_sum,
    wide,
)

# Columns of `saved` for rows computed here. KIND is LEAN in these rows, FAR if backward leaves
# their gradient to Q to reference.py, 0 in rows of reference.py.
TOP, LOG_SUM, SHIFT, CENTRE, LOG1P_T, LOG_MEAN, KIND, REF_LOGPROB, MEAN, REF_MEAN = range(10)
LEAN, FAR = 2.0, 1.0
# Largest |d|: above it e·exp(d) may matter although e underflows. Above the second, KIND is FAR: if
# a few far entries make the KL, the gradient to Q would be off by some 1e-7·|d|/KL of its norm.
LARGEST_CPU_D, LARGEST_D_OF_Q = 48.0, 16.0
LARGEST_CPU_SHIFT = 2.0**20
# Longest 16-bit row whose gradient uses float32 buffers of a whole row; longer ones go by column
# blocks.
LONGEST_16_BIT_ROW = 1 << 15
# Lower clamp of z = (x - top)·s: 0·(-inf) would be NaN.
LOWEST_Z = -1e4
# Largest KL, in nats, for the fields of Q: 1 - q of a near-certain token is computed from d.
LARGEST_KL_OF_Q = 2.0
# Bound of H_SERIES in near rows, exact in float32. Every d outside [-1, 0.7503] exceeds it, ±inf
# included, because the degree is even: no pass looks for the largest |d|.
NEAR_H = 47 / 128
# h/d² and ref_h/d² for |d| ≤ 1, least-squares fits reweighted until the largest relative errors are
# equal: 1.0e-7 and 7.5e-7 with float32 coefficients.
H_SERIES = (
    *(0.5, 0.1666669348, 0.04166655996, 0.008331017069),
    *(0.001389079132, 0.0002031930324, 2.497999453e-05),
)
REF_H_SERIES = (
    *(0.5, 0.3333350353, 0.1249977272, 0.03331646152),
    *(0.006950499232, 0.001227471981, 0.0001720574592),
)


def takes_whole_rows(logits: torch.Tensor) -> bool:
    """Return whether the gradient of a KL alone is computed from softmax(x), a whole row at a time;
    otherwise forward saves sums, and backward computes parts of a row.
    """
    return logits.shape[-1] <= LONGEST_16_BIT_ROW or logits.dtype == torch.float32


def statistics(
    block: Block, fields: set[str], room: Room, step: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Compute ({field: [k]}, saved [k, 10], whether float32 suffices [k]) for the requested fields,
    `step` rows at a time.
    """
    rows = len(block.x)
    parts = [block.part(slice(first, first + step)) for first in range(0, rows, step)]
    saved = torch.zeros(rows, 10, dtype=torch.float32, device=block.x.device)
    saved[:, KIND] = LEAN
    if fields == {"kl"} and takes_whole_rows(block.x):
        kl_rows = [kl_only(part, room("e", part.x.shape), room) for part in parts]
        valid = torch.cat([each.valid()[:, 0] for each in kl_rows])
        return {"kl": save(kl_rows, saved)}, saved, valid
    both = not fields.isdisjoint(("ref_kl", "ref_logprob", "ref_lse"))
    found = [_sums(part, "entropy" in fields, both, room) for part in parts]
    columns = zip(*[each.values() for each in found], strict=True)
    sums = dict(zip(found[0], map(torch.cat, columns), strict=True))
    log_sum = _log_sum(sums["weight"], sums["largest"])
    kept, scale = {TOP: sums["top"], LOG_SUM: log_sum}, block.scale
    results, valid = {"lse": sums["top"] * scale + log_sum}, log_sum.isfinite()
    if "token" in sums:
        results["logprob"] = sums["token"] - log_sum
    if "log_mean" in sums:
        kept[LOG_MEAN] = sums["log_mean"] / sums["weight"]
        results["entropy"] = log_sum - kept[LOG_MEAN]
    if block.y is not None:
        valid &= _finish_pair(sums, both, scale, results, kept)
    for column, value in kept.items():
        saved[:, column] = value[:, 0]
    return {name: value[:, 0] for name, value in results.items()}, saved, valid[:, 0]


class KLRows(NamedTuple):
    """Each row's Σ e·h, Σ e (weight; None for 1), the centre and shift subtracted from y - x, and
    max |d|, [k, 1].

    shift is None if it is 0 in every row, largest_d if all rows are near.
    """

    h: torch.Tensor
    weight: torch.Tensor | None
    centre: torch.Tensor
    shift: torch.Tensor | None
    largest_d: torch.Tensor | None

    def valid(self) -> torch.Tensor:
        """Return whether float32 suffices for each row, [k, 1]."""
        # h is below NEAR_H in near rows.
        valid = (self.h if self.largest_d is None else self.largest_d) < LARGEST_CPU_D
        return valid if self.shift is None else valid & (self.shift.abs() < LARGEST_CPU_SHIFT)


def save(parts: list[KLRows], saved: torch.Tensor) -> torch.Tensor:
    """Write CENTRE, LOG1P_T and SHIFT of consecutive blocks, and return the KL of their rows, [k].

    saved: LEAN as KIND, which becomes FAR where max |d| says so, and 0 elsewhere.
    """
    # KL = log1p(t) - W with t = E[h] + W. Leave out W, the rounding error of the centre: it changes
    # the KL by -E[h]·W only.
    mean_h = [divided(part.h, part.weight) for part in parts]
    centre = [part.centre for part in parts]
    kl = torch.cat(mean_h).log1p_().clamp_(min=0.0)[:, 0]
    saved[:, CENTRE], saved[:, LOG1P_T] = torch.cat(centre)[:, 0], kl
    if any(part.largest_d is not None for part in parts):
        saved[:, KIND : KIND + 1] = torch.where(
            torch.cat([part.h if part.largest_d is None else part.largest_d for part in parts])
            < LARGEST_D_OF_Q,
            LEAN,
            FAR,
        )
    if any(part.shift is not None for part in parts):
        shifts = [torch.zeros_like(part.h) if part.shift is None else part.shift for part in parts]
        saved[:, SHIFT] = torch.cat(shifts)[:, 0]
    return kl


def kl_only(block: Block, e: torch.Tensor, room: Room) -> KLRows:
    """Compute the sums of a block's KL; leave softmax(x·s) in `e`, which must not alias x, and d in
    room("d").
    """
    assert block.y is not None
    x = wide(block.x, e)
    if x is not e:  # the exponentials hide the time of x's first read
        softmax(x, block.scale, e)
    d = difference(block.y, x, None, None, room)
    if x is e:
        softmax(x, block.scale, e)
    weight = softmax_sum(e)
    shift, centre = _centre(block, e, weight, d, room)
    largest_d, h, _ = _series_sums(e, d, None, False, room)
    return KLRows(h, weight, centre, shift, largest_d)


def _centre(
    block: Block, e: torch.Tensor, weight: torch.Tensor | None, d: torch.Tensor, room: Room
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Subtract E[y - x] from d = y - x and multiply by the scale, in place; return that mean as a
    whole number (shift) and the rest (centre), [k, 1].
    """
    assert block.y is not None
    work, shift = room("work", d.shape), None
    centre = divided(dot(e, d, work), weight)
    smallest, largest = torch.aminmax(centre)
    if not max(-float(smallest), float(largest)) < 1.0:
        shift = torch.where(centre.abs() < 1.0, 0.0, centre.round())
        x = wide(block.x, room("x", d.shape))
        difference(block.y, x, x.amax(-1, keepdim=True), shift, room)
        centre = torch.where(shift == 0, centre, divided(dot(e, d, work), weight))
    d.sub_(centre)
    if not is_one(block.scale):
        d.mul_(block.scale)
    return shift, centre


def _sums(block: Block, entropy: bool, both: bool, room: Room) -> dict[str, torch.Tensor]:
    """Compute sums and extremes of each row, [k, 1]; both: also ref_h and the log-sum-exp of Q.

    e is a softmax: weight = Σ e, largest = max e, Σ exp((x - top)·s) = weight/largest. token is
    (x - top)·s at the row's token, largest_d = max |d|, h = Σ e·(expm1(d) - d) and ref_h =
    Σ e·(d·expm1(d) - expm1(d) + d).
    """
    x, y, tokens, scale = block
    x = wide(x, room("x", x.shape))
    work = room("work", x.shape)
    e = softmax(x, scale, room("e", x.shape), work)
    top, weight = x.amax(-1, keepdim=True), row_sum(e)
    sums = {"top": top, "weight": weight, "largest": e.amax(-1, keepdim=True)}
    if entropy:
        z = work if not is_one(scale) else torch.sub(x, top, out=work)
        sums["log_mean"] = dot(z.clamp_(min=LOWEST_Z), e, work)
    if tokens is not None:
        tokens = tokens[:, None]
        sums["token"] = (x.gather(-1, tokens) - top) * scale
    if y is None:
        return sums
    d = difference(y, x, None, None, room)
    shift, centre = _centre(block, e, weight, d, room)
    mean = dot(e, d, work)
    if both:
        # Sum Q directly: with a near-certain token, 1 - q needs the digits of this sum.
        wide_y = wide(y, room("part of e", x.shape))
        ref_top = wide_y.amax(-1, keepdim=True)
        q = softmax(wide_y, scale, room("part of d", x.shape), work)
        ref_weight, ref_largest = row_sum(q), q.amax(-1, keepdim=True)
        sums |= {"ref_top": ref_top, "ref_weight": ref_weight, "ref_largest": ref_largest}
        if tokens is not None:
            sums["ref_token"] = (wide_y.gather(-1, tokens) - ref_top) * scale
    largest_d, h, ref_h = _series_sums(e, d, mean, both, room)
    shift, largest_d = (
        torch.zeros_like(centre) if value is None else value for value in (shift, largest_d)
    )
    sums |= {"shift": shift, "centre": centre, "mean": mean, "largest_d": largest_d, "h": h}
    return sums if ref_h is None else {**sums, "ref_h": ref_h}


def _series_sums(
    e: torch.Tensor, d: torch.Tensor, mean: torch.Tensor | None, both: bool, room: Room
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """Compute (max |d|, Σ e·h, Σ e·ref_h or None) of each row; None for max |d| if all rows are
    near, otherwise 0 in near rows.

    mean: Σ e·d, if it was computed.
    """
    work = room("work", d.shape)
    values = _series(d, H_SERIES, work)
    largest_h = values.amax(-1, True)
    h = row_sum(values.mul_(e))
    ref_h = row_sum(_series(d, REF_H_SERIES, work).mul_(e)) if both else None
    if float(largest_h.amax()) < NEAR_H:
        return None, h, ref_h
    rows = (~(largest_h < NEAR_H))[:, 0].nonzero()[:, 0]
    if rows.numel() < d.shape[0]:
        shape = rows.numel(), d.shape[1]
        e = torch.index_select(e, 0, rows, out=room("part of e", shape))
        d = torch.index_select(d, 0, rows, out=room("part of d", shape))
        work = room("work", shape)
    largest_d = torch.zeros_like(h)
    largest_d[rows] = torch.maximum(-d.amin(-1, True), d.amax(-1, True))
    product = torch.expm1(d, out=work).mul_(e)
    total = row_sum(product)
    if ref_h is not None:
        ref_total = row_sum(product.mul_(d))
    h[rows] = total - (dot(e, d, work) if mean is None else mean[rows])
    if ref_h is not None:
        ref_h[rows] = ref_total - h[rows]
    return largest_d, h, ref_h


def _series(d: torch.Tensor, factors: tuple[float, ...], work: torch.Tensor) -> torch.Tensor:
    """Compute d²·(factors[0] + factors[1]·d + …), in `work`."""
    first, *others = _numbers(factors, d.device)
    torch.add(first, d, alpha=factors[-1], out=work)
    for factor in others:
        torch.addcmul(factor, d, work, out=work)
    return work.mul_(d).mul_(d)


@functools.cache
def _numbers(factors: tuple[float, ...], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return factors[-2], …, factors[0] as tensors."""
    return torch.tensor(factors[-2::-1], dtype=torch.float32, device=device).unbind()


def _finish_pair(
    sums: dict[str, torch.Tensor],
    both: bool,
    scale: torch.Tensor | float,
    results: dict[str, torch.Tensor],
    kept: dict[int, torch.Tensor],
) -> torch.Tensor:
    """Put the fields of both tensors into `results` and the columns of `saved` into `kept`; return
    whether float32 suffices for each row, [k, 1].
    """
    mean, h = sums["mean"] / sums["weight"], sums["h"] / sums["weight"]
    t = h + mean
    log1p_t = t.log1p()
    kl = results["kl"] = (log1p_t - mean).clamp_(min=0.0)
    valid = (sums["largest_d"] < LARGEST_CPU_D) & (sums["shift"].abs() < LARGEST_CPU_SHIFT)
    kept[KIND] = torch.where(sums["largest_d"] < LARGEST_D_OF_Q, LEAN, FAR)
    kept |= {SHIFT: sums["shift"], CENTRE: sums["centre"], LOG1P_T: log1p_t, MEAN: mean}
    if both:
        ref_h = sums["ref_h"] / sums["weight"]
        inverse = 1.0 / (1.0 + t)
        ref_kl = results["ref_kl"] = (ref_h * inverse + (t * inverse - log1p_t)).clamp_(min=0.0)
        kept[REF_MEAN] = (ref_h + t) * inverse
        valid &= (
            (kl < LARGEST_KL_OF_Q)
            & (ref_kl < LARGEST_KL_OF_Q)
            & (sums["largest_d"] < LARGEST_D_OF_Q)
        )
        ref_log_sum = _log_sum(sums["ref_weight"], sums["ref_largest"])
        results["ref_lse"] = sums["ref_top"] * scale + ref_log_sum
        if "ref_token" in sums:
            results["ref_logprob"] = kept[REF_LOGPROB] = sums["ref_token"] - ref_log_sum
    return valid


def _log_sum(weight: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Compute log S, S = weight/largest, from S - 1: with a near-certain token S rounds to 1."""
    return ((weight - largest) / largest).log1p()
