"""Logits tensors as rows, and the row statistics of either backend: what the custom ops of _ops.py run."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from . import _checks, _cpu_gradients, _cpu_rows, reference
from ._problems import Scaling, fused_launchers, launchers, problems

FIELDS = ("logprob", "entropy", "ref_logprob", "kl", "ref_kl")
SAVED = reference.SAVED  # values per row held for backward, the same number on either backend
# Elements of a block of rows on the reference, for each thread: small enough for its cache, large enough to keep torch's overhead down. Up to
# four times as many where the block's buffers still are small beside the tensors.
BLOCK_ELEMENTS = 1 << 16
# Rows whose sums are finished together: what is left to do for each is a few numbers.
ROWS_AT_ONCE = 256


def result_dtype(logits: torch.Tensor) -> torch.dtype:
    """float64 for float64 logits (reference only), else float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def flat(value: torch.Tensor | None) -> torch.Tensor | None:
    """A per-row tensor as a contiguous vector."""
    return value if value is None or (value.dim() == 1 and value.is_contiguous()) else value.reshape(-1).contiguous()


def flat_temperature(temperatures: torch.Tensor | None, temperature: float) -> float | torch.Tensor:
    """The one temperature, or one per row as a contiguous vector."""
    return temperature if temperatures is None else flat(temperatures)


def forward(backend: str, p, q, tokens, mask, temperature, outputs: dict[str, torch.Tensor], saved: torch.Tensor,
            scaling: Scaling = Scaling()) -> None:  # noqa: B008  (a tuple of numbers)
    """Fill outputs ([N] per field) and saved [N, 10] from logits of any leading shape; tokens, mask, temperature: [N] or None / float."""
    if backend == "reference":
        reference_forward(p, q, tokens, mask, temperature, outputs, saved, scaling)
        return
    for rows, problem in problems(p, q, tokens, mask, temperature, scaling):
        part = (outputs, saved) if rows is None else (_some_of_each(outputs, rows), saved[rows])
        launchers().forward(problem, *part)


def backward(backend: str, p, q, tokens, mask, temperature, saved: torch.Tensor, upstream: dict[str, torch.Tensor],
             grad_p: torch.Tensor | None, grad_q: torch.Tensor | None,
             scaling: Scaling = Scaling()) -> None:  # noqa: B008
    """Fill the gradients ([N, V], both with the same row stride) from upstream gradients [N] per field.

    They are gradients with respect to the raw logits, before `scaling`, and may be the logits themselves unless the
    gradient of ref_kl to Q is asked for: a far row is then read again.
    """
    if backend == "reference":
        reference_backward(p, q, tokens, mask, temperature, saved, upstream, grad_p, grad_q, scaling)
        return
    # A saved-tensor hook may return logits with another stride along the vocabulary.
    p = p if p.stride(-1) == 1 else p.contiguous()
    q = q if q is None or q.stride(-1) == 1 else q.contiguous()
    for rows, problem in problems(p, q, tokens, mask, temperature, scaling):
        part = (saved, upstream, grad_p, grad_q)
        if rows is not None:
            part = (saved[rows], _some_of_each(upstream, rows), _some(grad_p, rows), _some(grad_q, rows))
        launchers().backward(problem, *part)


def kl_and_gradients(backend: str, p, q, tokens, mask, temperature, kl: torch.Tensor, saved: torch.Tensor, weights: torch.Tensor,
                     grad_p: torch.Tensor | None, grad_q: torch.Tensor | None, scaling: Scaling) -> None:
    """`forward` of kl and `backward` for upstream gradients `weights` [N].

    A gradient to P alone is computed with the KL: by the reference from float32 and 16-bit rows without `scaling`, by the kernels in one launch
    where kernels.config has it so.
    """
    alone = grad_p is not None and grad_q is None
    if alone and backend == "reference" and computes_together(p, scaling):
        _reference_kl_and_gradient(p, q, mask, temperature, kl, saved, weights, grad_p)
        return
    if backend == "reference" or not alone:
        forward(backend, p, q, tokens, mask, temperature, {"kl": kl}, saved, scaling)
        backward(backend, p, q, tokens, mask, temperature, saved, {"kl": weights}, grad_p, grad_q, scaling)
        return
    for rows, problem in problems(p, q, tokens, mask, temperature, scaling):
        part = (kl, saved, weights, grad_p) if rows is None else (kl[rows], saved[rows], weights[rows], grad_p[rows])
        _kl_and_gradient(problem, *part)


def _kl_and_gradient(problem: object, kl: torch.Tensor, saved: torch.Tensor, weights: torch.Tensor, grad_p: torch.Tensor) -> None:
    if fused_launchers().fuses(problem, grad_p):
        fused_launchers().fused(problem, weights.to(torch.float32).contiguous(), kl, saved, grad_p)
    else:
        launchers().forward(problem, {"kl": kl}, saved)
        launchers().backward(problem, saved, {"kl": weights}, grad_p, None)


def row_blocks(logits: torch.Tensor, mask: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """Indices of the rows that count, a block at a time."""
    vocabulary = logits.shape[-1]
    rows = torch.arange(logits.numel() // vocabulary, device=logits.device) if mask is None else mask.nonzero()[:, 0]
    if rows.numel():
        yield from rows.split(max(1, BLOCK_ELEMENTS // vocabulary))


def take(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Some rows of a tensor of any leading shape and strides, without a copy of the whole."""
    if logits.dim() == 2:
        contiguous = int(rows[-1]) - int(rows[0]) == rows.numel() - 1
        return logits[int(rows[0]):int(rows[-1]) + 1] if contiguous else logits[rows]
    if logits.dim() == 1:
        return logits[None]
    return logits[torch.unravel_index(rows, logits.shape[:-1])]


def _some(value: torch.Tensor | float | None, rows: torch.Tensor | slice) -> torch.Tensor | float | None:
    """Some rows of a per-row tensor."""
    return value[rows] if isinstance(value, torch.Tensor) else value


def _some_of_each(values: dict[str, torch.Tensor], rows: slice) -> dict[str, torch.Tensor]:
    return {name: value[rows] for name, value in values.items()}


def reference_forward(p: torch.Tensor, q: torch.Tensor | None, tokens: torch.Tensor | None, mask: torch.Tensor | None,
                      temperature: float | torch.Tensor, outputs: dict[str, torch.Tensor], saved: torch.Tensor,
                      scaling: Scaling) -> None:
    """Fill outputs ([N] per field) and saved [N, 10], a block of rows at a time; masked rows stay 0.

    _cpu_rows holds nearly every row; the others are reference.row_statistics', those far apart in float64.
    """
    if mask is not None:
        for value in (*outputs.values(), saved):
            value.zero_()
    elements = _elements(p)
    room, step = _cpu_rows.Room(elements, p.device), max(1, elements // p.shape[-1])
    for rows, x, y in _blocks(p, q, mask, _unscaled(scaling)):
        x, y = _scaled(x, y, rows, scaling)
        chosen, scales = _some(tokens, rows), _some(temperature, rows)
        if chosen is not None:
            _checks.tokens_in_range(chosen, p.shape[-1])
        if isinstance(scales, torch.Tensor):
            _checks.temperatures_positive(scales)
        if x.dtype == torch.float64:
            others = torch.arange(x.shape[0], device=x.device)
        else:
            values, kept, holds = _cpu_rows.statistics(_cpu_rows.Block(x, y, chosen, _inverse(scales)), set(outputs), room, step)
            for name, value in outputs.items():
                value[rows] = values[name]
            saved[rows] = kept
            if bool(holds.all()):
                continue
            others = (~holds).nonzero()[:, 0]
        for some in others.split(step):
            _define(x[some], None if y is None else y[some], _some(chosen, some), _some(scales, some), outputs, saved, _numbers(rows, some))


def computes_together(p: torch.Tensor, scaling: Scaling) -> bool:
    """Whether the reference computes a KL and its gradient to P in one pass over the rows."""
    return p.device.type == "cpu" and p.dtype != torch.float64 and _unscaled(scaling) and _cpu_rows.takes_whole_rows(p)


def _reference_kl_and_gradient(p: torch.Tensor, q: torch.Tensor, mask: torch.Tensor | None, temperature: float | torch.Tensor,
                               kl: torch.Tensor, saved: torch.Tensor, weights: torch.Tensor, grad_p: torch.Tensor) -> None:
    """Fill kl [N], saved [N, 10] and grad_p [N, V], which may be the logits, a block of rows at a time; masked rows are 0."""
    memory, scales = _cpu_gradients.LentMemory(p, q, grad_p, _step(p)), _inverse(temperature)
    if isinstance(temperature, torch.Tensor):
        _checks.temperatures_positive(temperature if mask is None else temperature[mask])
    factors = -weights * (scales[:, 0] if isinstance(scales, torch.Tensor) else scales)
    saved.zero_()
    saved[:, _cpu_rows.KIND] = _cpu_rows.LEAN
    for rows, x, y in _blocks(p, q, mask, True):
        gathered = isinstance(rows, torch.Tensor)
        # Gathered rows are copies; write their gradients over them.
        grad, values, kept = x if gathered else grad_p[rows], kl[rows], saved[rows]
        scale, factor, columns = _some(scales, rows), factors[rows], kept.unbind(-1)
        first = 0
        while first < x.shape[0]:
            count, room = (memory.own_rows, memory.own_room) if gathered else (memory.rows_from(rows.start + first), memory.room)
            part = slice(first, first + count)
            block = _cpu_rows.Block(x[part], y[part], None, _some(scale, part))
            keep = gathered or not memory.separate
            result, others, copies = _cpu_gradients.kl_and_gradient(block, factor[part], grad[part], room, keep)
            values[part] = result.kl
            result.save(columns, part)
            if len(others):
                others = others + first
                found = _apart(copies, _some(_some(temperature, rows), others), weights[rows][others], grad.dtype)
                values[others], kept[others], grad[others] = found
            first = part.stop
        if gathered:
            kl[rows], saved[rows], grad_p[rows] = values, kept, grad.to(grad_p.dtype)
    if mask is not None:
        for value in (kl, saved, grad_p):
            value[~mask] = 0


def _apart(block: _cpu_rows.Block, temperature: float | torch.Tensor, weights: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return KL, saved values and gradient of a few rows by forward and backward."""
    kl, saved = torch.empty_like(weights), weights.new_empty(len(weights), SAVED)
    grad = torch.empty_like(block.x, dtype=dtype, memory_format=torch.contiguous_format)
    reference_forward(block.x, block.y, None, None, temperature, {"kl": kl}, saved, Scaling())
    reference_backward(block.x, block.y, None, None, temperature, saved, {"kl": weights}, grad, None, Scaling())
    return kl, saved, grad


def _define(x, y, tokens, temperature, outputs: dict[str, torch.Tensor], saved: torch.Tensor, rows: slice | torch.Tensor) -> None:
    """Fill these rows of outputs and saved as reference.py defines them, rows that float32 does not hold in float64."""
    result = _statistics(x, y, tokens, temperature, outputs)
    far = result.saved[:, reference.FAR] != 0
    if result.saved.dtype != torch.float64 and bool(far.any()):
        wide = _statistics(*_double(far, x, y), _some(tokens, far), _some(temperature, far), outputs)
        for value, better in zip(result[:-1], wide[:-1], strict=True):
            if value is not None:
                value[far] = better.to(value.dtype)
    for name, value in outputs.items():
        value[rows] = getattr(result, name).to(value.dtype)
    saved[rows] = result.saved.to(saved.dtype)


def _numbers(rows: slice | torch.Tensor, some: torch.Tensor) -> torch.Tensor:
    """The row numbers of some rows of a block."""
    return rows[some] if isinstance(rows, torch.Tensor) else some + rows.start


def _inverse(temperature: float | torch.Tensor) -> float | torch.Tensor:
    """1/T, [k, 1] of one per row."""
    return 1.0 / temperature if isinstance(temperature, float) else (1.0 / temperature.float())[:, None]


def _elements(logits: torch.Tensor) -> int:
    """Elements of a block of statistics, at least a row: up to four buffers in float32, which together take no more than one of the tensors."""
    return max(logits.shape[-1], min(_block(4, logits.nbytes // 16), logits.numel()))


def _columns(logits: torch.Tensor) -> int:
    """Elements of a block of gradients, which needs no whole row of a long one: two buffers take 5 % of one of the tensors."""
    whole = logits.shape[-1] if _cpu_rows.takes_whole_rows(logits) else 256
    return max(whole, _block(4, logits.nbytes // 40) // 2)


def _block(most: int, elements: int) -> int:
    """`elements`, but at least a block and at most `most`: each thread gets its share of every operation in its own cache."""
    return min(most * BLOCK_ELEMENTS, max(BLOCK_ELEMENTS, elements)) * torch.get_num_threads()


def _step(logits: torch.Tensor) -> int:
    """Rows of a block."""
    return max(1, BLOCK_ELEMENTS * torch.get_num_threads() // logits.shape[-1])


def _unscaled(scaling: Scaling) -> bool:
    return not (scaling.softcap or scaling.ref_softcap or isinstance(scaling.ratio, torch.Tensor) or scaling.ratio != 1)


def _blocks(p: torch.Tensor, q: torch.Tensor | None, mask: torch.Tensor | None, several: bool
            ) -> Iterator[tuple[slice | torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """(row numbers, their logits [k, V] of P and of Q) of the rows that count: a block at a time, or several blocks where that needs no copy."""
    step = _step(p)
    most = max(step, ROWS_AT_ONCE) if several else step
    for start, x, y in _matrices(p, q, 0):
        counted = None if mask is None else mask[start:start + x.shape[0]]
        if counted is None or bool(counted.all()):
            parts = [slice(first, min(first + most, x.shape[0])) for first in range(0, x.shape[0], most)]
        else:
            parts = _runs(counted.nonzero()[:, 0], most, step)
        for part in parts:
            rows = slice(part.start + start, part.stop + start) if isinstance(part, slice) else part + start
            yield rows, x[part], None if y is None else y[part]


def _runs(rows: torch.Tensor, most: int, step: int) -> Iterator[slice | torch.Tensor]:
    """Row numbers in order: up to `most` at once as a slice where none is left out, which is a view, else up to `step`."""
    for some in rows.split(most) if rows.numel() else ():
        whole = _as_slice(some)
        yield from (whole,) if isinstance(whole, slice) or most == step else _runs(some, step, step)


def _as_slice(rows: torch.Tensor) -> slice | torch.Tensor:
    """Row numbers in order, as a slice where none is left out: a view instead of a copy."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first == rows.numel() - 1 else rows


def _matrices(p: torch.Tensor, q: torch.Tensor | None, start: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
    """(number of the first row, views [n, V] of P and of Q) that together are all rows of logits of any leading shape and strides."""
    sides = [None if side is None else _matrix(side) for side in (p, q)]
    if sides[0] is not None and (q is None or sides[1] is not None):
        yield start, *sides
        return
    count = p.shape[1:-1].numel()
    for i in range(p.shape[0]):
        yield from _matrices(p[i], None if q is None else q[i], start + i * count)


def _matrix(logits: torch.Tensor) -> torch.Tensor | None:
    """The rows as a view [N, V], None where the strides allow none."""
    if logits.dim() <= 2:
        return logits.view(-1, logits.shape[-1]) if logits.dim() == 1 else logits
    try:
        return logits.view(-1, logits.shape[-1])
    except RuntimeError:
        return None


def _statistics(x, y, tokens, temperature, outputs: dict[str, torch.Tensor]) -> reference.RowStatistics:
    return reference.row_statistics(x, y, tokens, temperature, entropy="entropy" in outputs, reverse="ref_kl" in outputs)


def _double(rows: torch.Tensor, *sides: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Some rows in float64."""
    return [None if side is None else side[rows].double() for side in sides]


def _scaled(x: torch.Tensor, y: torch.Tensor | None, rows: slice | torch.Tensor, scaling: Scaling) -> list[torch.Tensor | None]:
    """Some rows of both tensors, soft caps and ratio applied: in float64 with a ratio: float32 would round the product."""
    capped = [None if side is None else reference.soft_cap(side, cap) for side, cap in ((x, scaling.softcap), (y, scaling.ref_softcap))]
    if y is None or not isinstance(scaling.ratio, torch.Tensor) and scaling.ratio == 1:
        return capped
    ratio = scaling.ratio[rows, None].double() if isinstance(scaling.ratio, torch.Tensor) else scaling.ratio
    return [capped[0].double(), capped[1].double() * ratio]


def _gradients(x, y, tokens, temperature, saved, upstream, wrt_p: bool, wrt_q: bool) -> list[torch.Tensor | None]:
    """Gradients of some rows; of fallback rows from their statistics in float64."""
    if x.dtype == torch.float64 and saved.dtype != torch.float64:
        # With a ratio every row is computed in float64.
        saved = reference.row_statistics(x, y, tokens, temperature).saved
    results = list(reference.row_gradients(x, y, tokens, temperature, saved, upstream, wrt_p=wrt_p, wrt_q=wrt_q))
    far = saved[:, reference.FAR] != 0
    if x.dtype != torch.float64 and bool(far.any()):
        wide = _gradients(*_double(far, x, y), _some(tokens, far), _some(temperature, far), saved[far],
                          {name: value[far] for name, value in upstream.items()}, wrt_p, wrt_q)
        for result, better in zip(results, wide, strict=True):
            if result is not None:
                result[far] = better.to(result.dtype)
    return results


def reference_backward(p: torch.Tensor, q: torch.Tensor | None, tokens: torch.Tensor | None, mask: torch.Tensor | None,
                       temperature: float | torch.Tensor, saved: torch.Tensor, upstream: dict[str, torch.Tensor],
                       grad_p: torch.Tensor | None, grad_q: torch.Tensor | None, scaling: Scaling) -> None:
    """Fill the gradients [N, V], a block of rows at a time, each row as forward computed it; rows without upstream gradient get 0.

    A block's logits are read before its gradients are written: they may be the logits themselves.
    """
    none = torch.zeros(saved.shape[0], dtype=torch.bool, device=saved.device)
    active = functools.reduce(torch.logical_or, [value != 0 for value in upstream.values()], none)
    if mask is not None:
        active &= mask
    if not bool(active.all()):
        inactive = (~active).nonzero()[:, 0]
        for grad in (grad_p, grad_q):
            if grad is not None:
                grad[inactive] = 0
    room, step, sides = _cpu_rows.Room(_columns(p), p.device), _step(p), (grad_p, grad_q)
    for rows, x, y in _blocks(p, q, active, _unscaled(scaling)):
        lean = saved[rows, _cpu_rows.KIND] == _cpu_rows.LEAN
        if isinstance(rows, slice) and _unscaled(scaling) and bool(lean.all()):
            _cpu_gradients.gradients(_cpu_rows.Block(x, y, _some(tokens, rows), _inverse(_some(temperature, rows))), saved[rows],
                                _some_of_each(upstream, rows), [None if grad is None else grad[rows] for grad in sides], room)
            continue
        for first in range(0, x.shape[0], step):
            part = slice(first, first + step)
            numbers = rows[part] if isinstance(rows, torch.Tensor) else slice(rows.start + first, min(rows.start + first + step, rows.stop))
            x_here, y_here = _scaled(x[part], None if y is None else y[part], numbers, scaling)
            results = _mixed_gradients(x_here, y_here, _some(tokens, numbers), _some(temperature, numbers), saved[numbers],
                                       _some_of_each(upstream, numbers), sides, room)
            for grad, value, slope in zip(sides, results, _slopes(x_here, y_here, numbers, scaling), strict=True):
                if grad is not None:
                    grad[numbers] = (value if slope is None else value * slope).to(grad.dtype)


def _mixed_gradients(x, y, tokens, temperature, saved, upstream, sides, room) -> list[torch.Tensor | None]:
    """Gradients of a block's rows, each as forward computed it, in float32 or float64; None for a side that is None."""
    results = [None if grad is None else torch.empty_like(x, dtype=result_dtype(x)) for grad in sides]
    lean = saved[:, _cpu_rows.KIND] == _cpu_rows.LEAN
    for held in (True, False):
        some = (lean == held).nonzero()[:, 0]
        if not some.numel():
            continue
        rows = x[some], None if y is None else y[some], _some(tokens, some)
        scales, given = _some(temperature, some), {name: value[some] for name, value in upstream.items()}
        if held:
            here = [None if result is None else torch.empty_like(rows[0], dtype=result.dtype) for result in results]
            _cpu_gradients.gradients(_cpu_rows.Block(*rows, _inverse(scales)), saved[some], given, here, room)
        else:
            here = _gradients(*rows, scales, saved[some], given, *(grad is not None for grad in sides))
        for result, value in zip(results, here, strict=True):
            if result is not None:
                result[some] = value.to(result.dtype)
    return results


def _slopes(x: torch.Tensor, y: torch.Tensor | None, rows: torch.Tensor, scaling: Scaling) -> list[torch.Tensor | float | None]:
    """The derivatives of the scaled logits with respect to the raw ones; None for 1."""
    slopes: list[torch.Tensor | float | None] = [reference.soft_cap_slope(x, scaling.softcap) if scaling.softcap else None, None]
    ratio = scaling.ratio[rows, None] if isinstance(scaling.ratio, torch.Tensor) else scaling.ratio
    if y is not None and scaling.ref_softcap:
        slopes[1] = reference.soft_cap_slope(y / ratio, scaling.ref_softcap)
    if isinstance(ratio, torch.Tensor) or ratio != 1:
        slopes[1] = ratio if slopes[1] is None else slopes[1] * ratio
    return slopes
