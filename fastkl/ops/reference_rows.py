"""Runs the reference on logits of any shape: cpu_rows.py, and reference.py for fallback rows, for
which float32 does not suffice.
"""

import functools
import math

import torch

from .. import _checks, f_divergences, reference
from . import cpu_gradients, cpu_passes, cpu_rows, row_blocks
from .cpu_gradients import Sides, part_of
from .fields import SAVED, RowArgs, result_dtype, rows_of, rows_of_each

Rows = slice | torch.Tensor


def forward(args: RowArgs, outputs: dict[str, torch.Tensor], saved: torch.Tensor) -> None:
    """Fill outputs ([N] per field) and saved [N, 10], a block of rows at a time; masked rows are 0.

    cpu_rows computes nearly every row, reference.row_statistics the rest, in float64 where float32
    is not enough.
    """
    p, mask = args.p, args.mask
    if mask is not None:
        for value in (*outputs.values(), saved):
            value.zero_()
    elements = row_blocks.statistics_elements(p)
    room, step = cpu_passes.Room(elements, p.device), max(1, elements // p.shape[-1])
    for rows, x, y in row_blocks.blocks(p, args.q, mask, args.scaling.none):
        scaled = _scaled(args.at(rows, x, y))
        if scaled.tokens is not None:
            _checks.tokens_in_range(scaled.tokens, p.shape[-1])
        if isinstance(scaled.temperature, torch.Tensor):
            _checks.temperatures_positive(scaled.temperature)
        if scaled.p.dtype == torch.float64 or args.divergence.kind != "kl":
            fallback = torch.arange(x.shape[0], device=x.device)
        else:
            values, kept, valid = cpu_rows.statistics(_block(scaled), set(outputs), room, step)
            for name, value in outputs.items():
                value[rows] = values[name]
            saved[rows] = kept
            if bool(valid.all()):
                continue
            fallback = (~valid).nonzero()[:, 0]
        for part in fallback.split(step):
            numbers = rows[part] if isinstance(rows, torch.Tensor) else part + rows.start
            _by_reference(_select(scaled, part), outputs, saved, numbers)


def computes_together(args: RowArgs, grad_p: torch.Tensor) -> bool:
    """Return whether one pass over the rows gives a KL and its gradient to P."""
    p = args.p
    return (
        p.device.type == "cpu"
        and p.dtype != torch.float64
        and args.scaling.none
        and cpu_rows.takes_whole_rows(p)
    )


def kl_and_gradient(
    args: RowArgs,
    kl: torch.Tensor,
    saved: torch.Tensor,
    weights: torch.Tensor,
    grad_p: torch.Tensor,
) -> None:
    """Fill kl [N], saved [N, 10] and grad_p [N, V], which may overwrite the logits, a block of rows
    at a time; masked rows are 0.
    """
    p, q, _, mask, temperature, *_ = args
    assert q is not None
    memory = cpu_gradients.LentMemory(p, q, grad_p, row_blocks.rows_per_block(p))
    scales = _inverse(temperature)
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
            count, room = memory.own_rows, memory.own_room
            if not isinstance(rows, torch.Tensor):
                count, room = memory.rows_from(rows.start + first), memory.room
            part = slice(first, first + count)
            block = cpu_passes.Block(x, y, None, scale).part(part)
            keep = gathered or not memory.separate
            result, fallback, copies = cpu_gradients.kl_and_gradient(
                block, factor[part], grad[part], room, keep
            )
            values[part] = result.kl
            result.save(columns, part)
            if len(fallback):
                fallback = fallback + first
                row_temperature = rows_of(rows_of(temperature, rows), fallback)
                fallback_args = RowArgs(copies.x, copies.y, temperature=row_temperature)
                values[fallback], kept[fallback], grad[fallback] = _fallback_rows(
                    fallback_args, weights[rows][fallback], grad.dtype
                )
            first = part.stop
        if gathered:
            kl[rows], saved[rows], grad_p[rows] = values, kept, grad.to(grad_p.dtype)
    if mask is not None:
        for value in (kl, saved, grad_p):
            value[~mask] = 0


def outside(args: RowArgs, ids: torch.Tensor, rest: torch.Tensor, saved: torch.Tensor) -> None:
    """Fill rest [N], float64, as Engine.outside; nothing is saved."""
    saved.zero_()
    rest.zero_()
    for rows, x, _ in row_blocks.blocks(args.p, None, args.mask, False):
        capped = reference.soft_cap(x, args.scaling.softcap).double()
        exponents = _inverse64(rows_of(args.temperature, rows)) * capped
        # A column more takes the absent ids.
        padded = torch.nn.functional.pad(exponents, (0, 1), value=-math.inf)
        padded.scatter_(-1, ids[rows], -math.inf)
        rest[rows] = padded.logsumexp(-1)


def outside_gradient(
    args: RowArgs,
    rest: torch.Tensor,
    saved: torch.Tensor,
    upstream: torch.Tensor,
    grad: torch.Tensor,
) -> None:
    """Fill the gradient [N, V] of Σ upstream·rest, as Engine.outside_gradient."""
    active = upstream != 0
    if args.mask is not None:
        active &= args.mask
    if not bool(active.all()):
        grad[~active] = 0
    for rows, x, _ in row_blocks.blocks(args.p, None, active & (rest > -math.inf), False):
        scale = _inverse64(rows_of(args.temperature, rows))
        capped = reference.soft_cap(x, args.scaling.softcap).double()
        weights = (capped * scale - rest[rows][:, None]).exp()
        if args.scaling.softcap:
            weights *= reference.soft_cap_slope(capped, args.scaling.softcap)
        grad[rows] = (weights * upstream[rows][:, None] * scale).to(grad.dtype)
    grad[rest == -math.inf] = 0


def _inverse64(temperature: float | torch.Tensor) -> float | torch.Tensor:
    """Return 1/T in float64: a number, or [k, 1] for a temperature per row."""
    if isinstance(temperature, torch.Tensor):
        _checks.temperatures_positive(temperature)
        return (1.0 / temperature.double())[:, None]
    return 1.0 / temperature


def _fallback_rows(
    args: RowArgs, weights: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute KL, saved values and gradient of a few rows by forward and backward."""
    kl, saved = torch.empty_like(weights), weights.new_empty(len(weights), SAVED)
    grad = torch.empty_like(args.p, dtype=dtype, memory_format=torch.contiguous_format)
    forward(args, {"kl": kl}, saved)
    backward(args, saved, {"kl": weights}, grad, None)
    return kl, saved, grad


def _by_reference(
    args: RowArgs, outputs: dict[str, torch.Tensor], saved: torch.Tensor, numbers: torch.Tensor
) -> None:
    """Fill the rows `numbers` of outputs and saved by reference.py, in float64 where float32 is not
    enough; a divergence other than the KL by f_divergences.py in float64.
    """
    if args.divergence.kind != "kl":
        found = f_divergences.divergence(*_log_probs(args), *args.divergence)
        outputs["kl"][numbers], saved[numbers] = found.to(saved.dtype), 0
        return
    result = _statistics(args, outputs)
    far = result.saved[:, reference.FAR] != 0
    if result.saved.dtype != torch.float64 and bool(far.any()):
        result64 = _statistics(_select(args, far, torch.float64), outputs)
        for value, value64 in zip(result[:-1], result64[:-1], strict=True):
            if value is not None and value64 is not None:
                value[far] = value64.to(value.dtype)
    for name, value in outputs.items():
        value[numbers] = getattr(result, name).to(value.dtype)
    saved[numbers] = result.saved.to(saved.dtype)


def _statistics(args: RowArgs, outputs: dict[str, torch.Tensor]) -> reference.RowStatistics:
    return reference.row_statistics(
        *args[:3], args.temperature, entropy="entropy" in outputs, reverse="ref_kl" in outputs
    )


def _inverse(temperature: float | torch.Tensor) -> float | torch.Tensor:
    """Return 1/T: a number, or [k, 1] for a temperature per row."""
    if isinstance(temperature, torch.Tensor):
        return (1.0 / temperature.float())[:, None]
    return 1.0 / temperature


def _block(args: RowArgs) -> cpu_passes.Block:
    return cpu_passes.Block(args.p, args.q, args.tokens, _inverse(args.temperature))


def _select(args: RowArgs, rows: Rows, dtype: torch.dtype | None = None) -> RowArgs:
    """Return the rows `rows` of matrices, their logits in `dtype`."""
    p, q = args.p[rows], None if args.q is None else args.q[rows]
    return args.at(rows, p.to(dtype), None if q is None else q.to(dtype))


def _scaled(args: RowArgs) -> RowArgs:
    """Apply soft caps and ratio to matrices: in float64 with a ratio, because float32 would round
    the product.
    """
    softcap, ref_softcap, ratio = args.scaling
    x = reference.soft_cap(args.p, softcap)
    y = None if args.q is None else reference.soft_cap(args.q, ref_softcap)
    if y is not None and (isinstance(ratio, torch.Tensor) or ratio != 1):
        wide = ratio[:, None].double() if isinstance(ratio, torch.Tensor) else ratio
        x, y = x.double(), y.double() * wide
    return args._replace(p=x, q=y)


def backward(
    args: RowArgs,
    saved: torch.Tensor,
    upstream: dict[str, torch.Tensor],
    grad_p: torch.Tensor | None,
    grad_q: torch.Tensor | None,
) -> None:
    """Fill the gradients [N, V], a block of rows at a time, each row as forward computed it; rows
    without upstream gradient get 0.

    A block's logits are read before its gradients are written, which may overwrite them.
    """
    p, unscaled = args.p, args.scaling.none
    none = torch.zeros(saved.shape[0], dtype=torch.bool, device=saved.device)
    active = functools.reduce(torch.logical_or, [value != 0 for value in upstream.values()], none)
    if args.mask is not None:
        active &= args.mask
    sides = grad_p, grad_q
    for grad in sides:
        if grad is not None and not bool(active.all()):
            grad[~active] = 0
    room = cpu_passes.Room(row_blocks.gradient_elements(p), p.device)
    step = row_blocks.rows_per_block(p)
    for rows, x, y in row_blocks.blocks(p, args.q, active, unscaled):
        block_args = args.at(rows, x, y)
        lean = saved[rows, cpu_rows.KIND] == cpu_rows.LEAN
        if isinstance(rows, slice) and unscaled and bool(lean.all()):
            g, grads = rows_of_each(upstream, rows), part_of(sides, rows)
            cpu_gradients.gradients(_block(block_args), saved[rows], g, grads, room)
            continue
        for first in range(0, x.shape[0], step):
            part = slice(first, min(first + step, x.shape[0]))
            numbers = (
                rows[part]
                if isinstance(rows, torch.Tensor)
                else slice(rows.start + part.start, rows.start + part.stop)
            )
            scaled = _scaled(_select(block_args, part))
            g = rows_of_each(upstream, numbers)
            results = _mixed_gradients(scaled, saved[numbers], g, sides, room)
            for grad, value, slope in zip(sides, results, _slopes(scaled), strict=True):
                if grad is not None and value is not None:
                    grad[numbers] = (value if slope is None else value * slope).to(grad.dtype)


def _mixed_gradients(
    args: RowArgs,
    saved: torch.Tensor,
    upstream: dict[str, torch.Tensor],
    sides: Sides,
    room: cpu_passes.Room,
) -> Sides:
    """Compute gradients of a block's rows, each as forward computed it, in float32 or float64; None
    for a side that is None.
    """
    if args.divergence.kind != "kl":
        return _divergence_gradients(args, upstream["kl"])
    results = _empty_like(sides, args.p)
    lean = saved[:, cpu_rows.KIND] == cpu_rows.LEAN
    for is_lean in (True, False):
        numbers = (lean == is_lean).nonzero()[:, 0]
        if not numbers.numel():
            continue
        rows, g = _select(args, numbers), rows_of_each(upstream, numbers)
        if is_lean:
            grads = _empty_like(sides, rows.p)
            cpu_gradients.gradients(_block(rows), saved[numbers], g, grads, room)
        else:
            grads = _gradients(rows, saved[numbers], g, sides)
        for result, value in zip(results, grads, strict=True):
            if result is not None and value is not None:
                result[numbers] = value.to(result.dtype)
    return results


def _gradients(
    args: RowArgs, saved: torch.Tensor, upstream: dict[str, torch.Tensor], sides: Sides
) -> Sides:
    """Compute gradients of rows by reference.py; in float64 where forward used it."""
    x, y, tokens, _, temperature, *_ = args
    if x.dtype == torch.float64 and saved.dtype != torch.float64:
        # With a ratio every row is computed in float64.
        saved = reference.row_statistics(x, y, tokens, temperature).saved
    wrt_p, wrt_q = (side is not None for side in sides)
    results = reference.row_gradients(
        x, y, tokens, temperature, saved, upstream, wrt_p=wrt_p, wrt_q=wrt_q
    )
    far = saved[:, reference.FAR] != 0
    if x.dtype != torch.float64 and bool(far.any()):
        rows, g = _select(args, far, torch.float64), rows_of_each(upstream, far)
        results64 = _gradients(rows, saved[far], g, sides)
        for result, result64 in zip(results, results64, strict=True):
            if result is not None and result64 is not None:
                result[far] = result64.to(result.dtype)
    return results


def _log_probs(args: RowArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both models' log-probabilities in float64."""
    p, q, _, _, temperature, *_ = args
    assert q is not None
    scale = temperature.double()[:, None] if isinstance(temperature, torch.Tensor) else temperature
    return (p.double() / scale).log_softmax(-1), (q.double() / scale).log_softmax(-1)


def _divergence_gradients(args: RowArgs, upstream: torch.Tensor) -> Sides:
    """Compute the gradients of upstream·divergence with respect to scaled logits, in float64."""
    weights = (upstream.double() / args.temperature)[:, None]
    grad_p, grad_q = f_divergences.gradients(*_log_probs(args), *args.divergence)
    return weights * grad_p, weights * grad_q


def _empty_like(sides: Sides, x: torch.Tensor) -> Sides:
    """Return uninitialised gradients of x's rows, None for a side that is None."""
    empty = [None if side is None else torch.empty_like(x, dtype=result_dtype(x)) for side in sides]
    return empty[0], empty[1]


def _slopes(args: RowArgs) -> tuple[torch.Tensor | float | None, torch.Tensor | float | None]:
    """Return the derivatives of scaled logits with respect to the raw ones; None for 1."""
    softcap, ref_softcap, ratio = args.scaling
    slope = reference.soft_cap_slope(args.p, softcap) if softcap else None
    ref_slope: torch.Tensor | float | None = None
    scale = ratio[:, None] if isinstance(ratio, torch.Tensor) else ratio
    if args.q is not None and ref_softcap:
        ref_slope = reference.soft_cap_slope(args.q / scale, ref_softcap)
    if isinstance(scale, torch.Tensor) or scale != 1:
        ref_slope = scale if ref_slope is None else ref_slope * scale
    return slope, ref_slope
