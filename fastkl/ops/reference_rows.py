"""The reference's rows on logits of any shape: by cpu_rows.py, or where float32 does not suffice by
reference.py.
"""

from __future__ import annotations

import functools

import torch

from .. import _checks, reference
from . import cpu_gradients, cpu_passes, cpu_rows, row_blocks
from .cpu_gradients import Sides, part_of
from .fields import SAVED, Scaling, result_dtype
from .row_blocks import rows_of, rows_of_each


def forward(
    p: torch.Tensor,
    q: torch.Tensor | None,
    tokens: torch.Tensor | None,
    mask: torch.Tensor | None,
    temperature: float | torch.Tensor,
    outputs: dict[str, torch.Tensor],
    saved: torch.Tensor,
    scaling: Scaling,
) -> None:
    """Fill outputs ([N] per field) and saved [N, 10], a block of rows at a time; masked rows stay
    0.

    cpu_rows holds nearly every row; the others are reference.row_statistics', those far apart in
    float64.
    """
    if mask is not None:
        for value in (*outputs.values(), saved):
            value.zero_()
    elements = row_blocks.statistics_elements(p)
    room, step = cpu_passes.Room(elements, p.device), max(1, elements // p.shape[-1])
    for rows, x, y in row_blocks.blocks(p, q, mask, _unscaled(scaling)):
        x, y = _scaled(x, y, rows, scaling)
        chosen, scales = rows_of(tokens, rows), rows_of(temperature, rows)
        if chosen is not None:
            _checks.tokens_in_range(chosen, p.shape[-1])
        if isinstance(scales, torch.Tensor):
            _checks.temperatures_positive(scales)
        if x.dtype == torch.float64:
            others = torch.arange(x.shape[0], device=x.device)
        else:
            values, kept, holds = cpu_rows.statistics(
                cpu_passes.Block(x, y, chosen, _inverse(scales)), set(outputs), room, step
            )
            for name, value in outputs.items():
                value[rows] = values[name]
            saved[rows] = kept
            if bool(holds.all()):
                continue
            others = (~holds).nonzero()[:, 0]
        for some in others.split(step):
            _define(
                x[some],
                None if y is None else y[some],
                rows_of(chosen, some),
                rows_of(scales, some),
                outputs,
                saved,
                rows[some] if isinstance(rows, torch.Tensor) else some + rows.start,
            )


def computes_together(p: torch.Tensor, scaling: Scaling) -> bool:
    """Whether the reference computes a KL and its gradient to P in one pass over the rows."""
    return (
        p.device.type == "cpu"
        and p.dtype != torch.float64
        and _unscaled(scaling)
        and cpu_rows.takes_whole_rows(p)
    )


def kl_and_gradient(
    p: torch.Tensor,
    q: torch.Tensor,
    mask: torch.Tensor | None,
    temperature: float | torch.Tensor,
    kl: torch.Tensor,
    saved: torch.Tensor,
    weights: torch.Tensor,
    grad_p: torch.Tensor,
) -> None:
    """Fill kl [N], saved [N, 10] and grad_p [N, V], which may be the logits, a block of rows at a
    time; masked rows are 0.
    """
    memory, scales = (
        cpu_gradients.LentMemory(p, q, grad_p, row_blocks.rows_per_block(p)),
        _inverse(temperature),
    )
    if isinstance(temperature, torch.Tensor):
        _checks.temperatures_positive(temperature if mask is None else temperature[mask])
    factors = -weights * (scales[:, 0] if isinstance(scales, torch.Tensor) else scales)
    saved.zero_()
    saved[:, cpu_rows.KIND] = cpu_rows.LEAN
    for rows, x, y in row_blocks.blocks(p, q, mask, True):
        gathered = isinstance(rows, torch.Tensor)
        # Gathered rows are copies; write their gradients over them.
        grad, values, kept = x if gathered else grad_p[rows], kl[rows], saved[rows]
        scale, factor, columns = rows_of(scales, rows), factors[rows], kept.unbind(-1)
        first = 0
        while first < x.shape[0]:
            count, room = (
                (memory.own_rows, memory.own_room)
                if isinstance(rows, torch.Tensor)
                else (memory.rows_from(rows.start + first), memory.room)
            )
            part = slice(first, first + count)
            block = cpu_passes.Block(x, y, None, scale).part(part)
            keep = gathered or not memory.separate
            result, others, copies = cpu_gradients.kl_and_gradient(
                block, factor[part], grad[part], room, keep
            )
            values[part] = result.kl
            result.save(columns, part)
            if len(others):
                others = others + first
                found = _apart(
                    copies,
                    rows_of(rows_of(temperature, rows), others),
                    weights[rows][others],
                    grad.dtype,
                )
                values[others], kept[others], grad[others] = found
            first = part.stop
        if gathered:
            kl[rows], saved[rows], grad_p[rows] = values, kept, grad.to(grad_p.dtype)
    if mask is not None:
        for value in (kl, saved, grad_p):
            value[~mask] = 0


def _apart(
    block: cpu_passes.Block,
    temperature: float | torch.Tensor,
    weights: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return KL, saved values and gradient of a few rows by forward and backward."""
    kl, saved = torch.empty_like(weights), weights.new_empty(len(weights), SAVED)
    grad = torch.empty_like(block.x, dtype=dtype, memory_format=torch.contiguous_format)
    forward(block.x, block.y, None, None, temperature, {"kl": kl}, saved, Scaling())
    backward(
        block.x, block.y, None, None, temperature, saved, {"kl": weights}, grad, None, Scaling()
    )
    return kl, saved, grad


def _define(
    x: torch.Tensor,
    y: torch.Tensor | None,
    tokens: torch.Tensor | None,
    temperature: float | torch.Tensor,
    outputs: dict[str, torch.Tensor],
    saved: torch.Tensor,
    rows: slice | torch.Tensor,
) -> None:
    """Fill these rows of outputs and saved as reference.py defines them, rows that float32 does not
    hold in float64.
    """
    result = _statistics(x, y, tokens, temperature, outputs)
    far = result.saved[:, reference.FAR] != 0
    if result.saved.dtype != torch.float64 and bool(far.any()):
        wide = _statistics(
            *_double(far, x, y), rows_of(tokens, far), rows_of(temperature, far), outputs
        )
        for value, better in zip(result[:-1], wide[:-1], strict=True):
            if value is not None and better is not None:
                value[far] = better.to(value.dtype)
    for name, value in outputs.items():
        value[rows] = getattr(result, name).to(value.dtype)
    saved[rows] = result.saved.to(saved.dtype)


def _inverse(temperature: float | torch.Tensor) -> float | torch.Tensor:
    """1/T, [k, 1] of one per row."""
    return (
        1.0 / temperature
        if isinstance(temperature, float)
        else (1.0 / temperature.float())[:, None]
    )


def _unscaled(scaling: Scaling) -> bool:
    return not (
        scaling.softcap
        or scaling.ref_softcap
        or isinstance(scaling.ratio, torch.Tensor)
        or scaling.ratio != 1
    )


def _statistics(
    x: torch.Tensor,
    y: torch.Tensor | None,
    tokens: torch.Tensor | None,
    temperature: float | torch.Tensor,
    outputs: dict[str, torch.Tensor],
) -> reference.RowStatistics:
    return reference.row_statistics(
        x, y, tokens, temperature, entropy="entropy" in outputs, reverse="ref_kl" in outputs
    )


def _double(
    rows: torch.Tensor, x: torch.Tensor, y: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Some rows in float64."""
    return x[rows].double(), None if y is None else y[rows].double()


def _scaled(
    x: torch.Tensor, y: torch.Tensor | None, rows: slice | torch.Tensor, scaling: Scaling
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Some rows of both tensors, soft caps and ratio applied: in float64 with a ratio: float32
    would round the product.
    """
    x = reference.soft_cap(x, scaling.softcap)
    y = None if y is None else reference.soft_cap(y, scaling.ref_softcap)
    if y is None or not isinstance(scaling.ratio, torch.Tensor) and scaling.ratio == 1:
        return x, y
    ratio = (
        scaling.ratio[rows, None].double()
        if isinstance(scaling.ratio, torch.Tensor)
        else scaling.ratio
    )
    return x.double(), y.double() * ratio


def _gradients(
    x: torch.Tensor,
    y: torch.Tensor | None,
    tokens: torch.Tensor | None,
    temperature: float | torch.Tensor,
    saved: torch.Tensor,
    upstream: dict[str, torch.Tensor],
    wrt_p: bool,
    wrt_q: bool,
) -> Sides:
    """Gradients of some rows; of fallback rows from their statistics in float64."""
    if x.dtype == torch.float64 and saved.dtype != torch.float64:
        # With a ratio every row is computed in float64.
        saved = reference.row_statistics(x, y, tokens, temperature).saved
    results = reference.row_gradients(
        x, y, tokens, temperature, saved, upstream, wrt_p=wrt_p, wrt_q=wrt_q
    )
    far = saved[:, reference.FAR] != 0
    if x.dtype != torch.float64 and bool(far.any()):
        wide = _gradients(
            *_double(far, x, y),
            rows_of(tokens, far),
            rows_of(temperature, far),
            saved[far],
            {name: value[far] for name, value in upstream.items()},
            wrt_p,
            wrt_q,
        )
        for result, better in zip(results, wide, strict=True):
            if result is not None and better is not None:
                result[far] = better.to(result.dtype)
    return results


def backward(
    p: torch.Tensor,
    q: torch.Tensor | None,
    tokens: torch.Tensor | None,
    mask: torch.Tensor | None,
    temperature: float | torch.Tensor,
    saved: torch.Tensor,
    upstream: dict[str, torch.Tensor],
    grad_p: torch.Tensor | None,
    grad_q: torch.Tensor | None,
    scaling: Scaling,
) -> None:
    """Fill the gradients [N, V], a block of rows at a time, each row as forward computed it; rows
    without upstream gradient get 0.

    A block's logits are read before its gradients are written: they may be the logits themselves.
    """
    none = torch.zeros(saved.shape[0], dtype=torch.bool, device=saved.device)
    active = functools.reduce(torch.logical_or, [value != 0 for value in upstream.values()], none)
    if mask is not None:
        active &= mask
    for grad in (grad_p, grad_q):
        if grad is not None and not bool(active.all()):
            grad[~active] = 0
    room, step, sides = (
        cpu_passes.Room(row_blocks.gradient_elements(p), p.device),
        row_blocks.rows_per_block(p),
        (grad_p, grad_q),
    )
    for rows, x, y in row_blocks.blocks(p, q, active, _unscaled(scaling)):
        lean = saved[rows, cpu_rows.KIND] == cpu_rows.LEAN
        if isinstance(rows, slice) and _unscaled(scaling) and bool(lean.all()):
            cpu_gradients.gradients(
                cpu_passes.Block(x, y, rows_of(tokens, rows), _inverse(rows_of(temperature, rows))),
                saved[rows],
                rows_of_each(upstream, rows),
                part_of(sides, rows),
                room,
            )
            continue
        for first in range(0, x.shape[0], step):
            part = slice(first, first + step)
            numbers = (
                rows[part]
                if isinstance(rows, torch.Tensor)
                else slice(rows.start + first, min(rows.start + first + step, rows.stop))
            )
            x_here, y_here = _scaled(x[part], None if y is None else y[part], numbers, scaling)
            results = _mixed_gradients(
                x_here,
                y_here,
                rows_of(tokens, numbers),
                rows_of(temperature, numbers),
                saved[numbers],
                rows_of_each(upstream, numbers),
                sides,
                room,
            )
            for grad, value, slope in zip(
                sides, results, _slopes(x_here, y_here, numbers, scaling), strict=True
            ):
                if grad is not None and value is not None:
                    grad[numbers] = (value if slope is None else value * slope).to(grad.dtype)


def _mixed_gradients(
    x: torch.Tensor,
    y: torch.Tensor | None,
    tokens: torch.Tensor | None,
    temperature: float | torch.Tensor,
    saved: torch.Tensor,
    upstream: dict[str, torch.Tensor],
    sides: Sides,
    room: cpu_passes.Room,
) -> Sides:
    """Gradients of a block's rows, each as forward computed it, in float32 or float64; None for a
    side that is None.
    """
    results = _empty_like(sides, x)
    lean = saved[:, cpu_rows.KIND] == cpu_rows.LEAN
    for held in (True, False):
        some = (lean == held).nonzero()[:, 0]
        if not some.numel():
            continue
        rows = x[some], None if y is None else y[some], rows_of(tokens, some)
        scales, given = rows_of(temperature, some), rows_of_each(upstream, some)
        if held:
            here = _empty_like(sides, rows[0])
            cpu_gradients.gradients(
                cpu_passes.Block(*rows, _inverse(scales)), saved[some], given, here, room
            )
        else:
            wanted = sides[0] is not None, sides[1] is not None
            here = _gradients(*rows, scales, saved[some], given, *wanted)
        for result, value in zip(results, here, strict=True):
            if result is not None and value is not None:
                result[some] = value.to(result.dtype)
    return results


def _empty_like(sides: Sides, x: torch.Tensor) -> Sides:
    """Room for gradients of x's rows, for each side that is there."""
    empty = [None if side is None else torch.empty_like(x, dtype=result_dtype(x)) for side in sides]
    return empty[0], empty[1]


def _slopes(
    x: torch.Tensor, y: torch.Tensor | None, rows: torch.Tensor | slice, scaling: Scaling
) -> list[torch.Tensor | float | None]:
    """The derivatives of the scaled logits with respect to the raw ones; None for 1."""
    slopes: list[torch.Tensor | float | None] = [
        reference.soft_cap_slope(x, scaling.softcap) if scaling.softcap else None,
        None,
    ]
    ratio = scaling.ratio[rows, None] if isinstance(scaling.ratio, torch.Tensor) else scaling.ratio
    if y is not None and scaling.ref_softcap:
        slopes[1] = reference.soft_cap_slope(y / ratio, scaling.ref_softcap)
    if isinstance(ratio, torch.Tensor) or ratio != 1:
        slopes[1] = ratio if slopes[1] is None else slopes[1] * ratio
    return slopes
