"""Run the reference on logits of any shape: cpu_rows.py, and reference.py in float64 for fallback
rows, for which float32 does not suffice.
"""

import functools
import itertools
import math

import torch

from .. import _value_checks, f_divergences, reference
from . import cpu_gradients, cpu_passes, cpu_rows, row_blocks
from .cpu_gradients import Sides, part_of
from .fields import SAVED, Outside, RowArgs, result_dtype, rows_of, rows_of_each


# Inference mode: autograd records none of these steps, and each small operation costs less. Results
# are written to the caller's tensors, so none becomes an inference tensor.
@torch.inference_mode()
def forward(args: RowArgs, outputs: dict[str, torch.Tensor], saved: torch.Tensor) -> None:
    """Fill outputs ([N] per field) and saved [N, 10], a block of rows at a time; masked rows are 0.

    cpu_rows computes nearly all rows of a KL, _by_reference the rest.
    """
    p, mask = args.p, args.mask
    if mask is not None:
        for value in (*outputs.values(), saved):
            value.zero_()
    elements = row_blocks.statistics_elements(p)
    room, step = cpu_passes.Room(elements, p.device), max(1, elements // p.shape[-1])
    most = row_blocks.ROWS_AT_ONCE if args.scaling.none else 0
    for rows, x, y in row_blocks.blocks(p, args.q, mask, most):
        scaled = _scaled(args.at(rows, x, y))
        if scaled.tokens is not None:
            _value_checks.tokens_in_range(scaled.tokens, p.shape[-1])
        if isinstance(scaled.temperature, torch.Tensor):
            _value_checks.temperatures_positive(scaled.temperature)
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
        for part in _parts(fallback, row_blocks.rows_per_block(p)):
            numbers = rows[part] if isinstance(rows, torch.Tensor) else part + rows.start
            _by_reference(_select(scaled, part, torch.float64), outputs, saved, numbers)


def computes_together(args: RowArgs, grad_p: torch.Tensor) -> bool:
    """Return whether one pass over the rows computes a KL and its gradient to P."""
    p = args.p
    return (
        p.device.type == "cpu"
        and p.dtype != torch.float64
        and args.scaling.none
        and cpu_rows.takes_whole_rows(p)
    )


@torch.inference_mode()
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
    memory = cpu_passes.LentMemory(p, q, grad_p, row_blocks.rows_per_block(p))
    scales = _inverse(temperature)
    if isinstance(temperature, torch.Tensor):
        _value_checks.temperatures_positive(temperature if mask is None else temperature[mask])
    uniform = isinstance(scales, float) and weights.stride(0) == 0
    factors = (weights[0] if uniform else weights[:, None]) * -scales
    saved.zero_()
    saved[:, cpu_rows.KIND] = cpu_rows.LEAN
    # All rows at once, except under a mask, whose gaps would cut them into single blocks.
    most = p.numel() if mask is None else row_blocks.ROWS_AT_ONCE
    for rows, x, y in row_blocks.blocks(p, q, mask, most):
        gathered = isinstance(rows, torch.Tensor)
        # Gathered rows are copies; write their gradients over them.
        grad, values, kept = x if gathered else grad_p[rows], kl[rows], saved[rows]
        block = cpu_passes.Block(x, y, None, rows_of(scales, rows))
        found, fallbacks = [], []
        begin = None if isinstance(rows, torch.Tensor) else rows.start
        counts, rooms = memory.blocks(begin, x.shape[0])
        factor = [factors] * len(counts) if uniform else factors[rows].split_with_sizes(counts)
        parts = zip(block.split(counts), factor, grad.split_with_sizes(counts), strict=True)
        starts = itertools.accumulate(counts, initial=0)
        for start, part, room in zip(starts, parts, rooms, strict=False):
            result, fallback, copies = cpu_gradients.kl_and_gradient(
                *part, room, gathered or not memory.separate
            )
            found.append(result)
            if fallback.numel():
                at = fallback + start
                row_temperature = rows_of(rows_of(temperature, rows), at)
                *results, grad[at] = _fallback_rows(
                    RowArgs(copies.x, copies.y, temperature=row_temperature),
                    weights[rows][at],
                    grad.dtype,
                )
                fallbacks.append((at, *results))
        values[:] = cpu_rows.save(found, kept)
        for at, *results in fallbacks:
            values[at], kept[at] = results
        if gathered:
            kl[rows], saved[rows], grad_p[rows] = values, kept, grad.to(grad_p.dtype)
    if mask is not None:
        for value in (kl, saved, grad_p):
            value[~mask] = 0


def outside(
    args: RowArgs, ids: torch.Tensor, others: Outside, reference_dtype: torch.dtype
) -> None:
    """Fill `others` as Engine.outside, with 0 for saved."""
    for value in others:
        value.zero_()
    for rows, x, _ in row_blocks.blocks(args.p, None, args.mask, 0):
        # An extra column takes the absent ids.
        padded = x.new_empty(len(x), x.shape[-1] + 1, dtype=reference_dtype)
        padded[:, :-1] = reference.soft_cap(x, args.scaling.softcap)
        padded[:, -1] = -math.inf
        padded.scatter_(-1, ids[rows], -math.inf)
        peak = padded.amax(-1, keepdim=True)
        exponents = _over(
            padded.sub_(peak.masked_fill(peak == -math.inf, 0.0)), rows_of(args.temperature, rows)
        )
        others.log_sum[rows] = cpu_passes.row_sum(exponents.exp_(), torch.float64)[:, 0].log_()
        others.peak[rows] = peak[:, 0].double()


def outside_gradient(
    args: RowArgs, others: Outside, upstream: torch.Tensor, grad: torch.Tensor
) -> None:
    """Fill the gradient [N, V] of Σ upstream·log_sum, as Engine.outside_gradient."""
    active = upstream != 0  # it is 0 if log_sum is -inf
    if args.mask is not None:
        active &= args.mask
    if not bool(active.all()):
        grad[~active] = 0
    factors = upstream / args.temperature
    for rows, x, _ in row_blocks.blocks(args.p, None, active, 0):
        temperature = rows_of(args.temperature, rows)
        capped = reference.soft_cap(x, args.scaling.softcap).to(result_dtype(x))
        peak, log_sum, factor = (
            value[rows][:, None].to(capped.dtype)
            for value in (others.peak, others.log_sum, factors)
        )
        weights = _over(capped - peak, temperature).sub_(log_sum).exp_().mul_(factor)
        if args.scaling.softcap:
            weights *= reference.soft_cap_slope(capped, args.scaling.softcap)
        grad[rows] = weights.to(grad.dtype)


def _over(values: torch.Tensor, temperature: float | torch.Tensor) -> torch.Tensor:
    """Return values/T."""
    if isinstance(temperature, torch.Tensor):
        _value_checks.temperatures_positive(temperature)
        return values / temperature.to(values.dtype)[:, None]
    return values if temperature == 1.0 else values / temperature


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
    """Fill the rows `numbers` of outputs and saved in float64: the KL by reference.py, other
    divergences by f_divergences.py. Float32 `saved` gets 0: backward recomputes it.
    """
    if args.divergence.kind != "kl":
        outputs["kl"][numbers] = f_divergences.divergence(*_log_probs(args), *args.divergence).to(
            saved.dtype
        )
        saved[numbers] = 0
        return
    result = reference.row_statistics(
        *args[:3], args.temperature, entropy="entropy" in outputs, reverse="ref_kl" in outputs
    )
    for name, value in outputs.items():
        value[numbers] = getattr(result, name).to(value.dtype)
    saved[numbers] = result.saved if saved.dtype == torch.float64 else 0.0


def _parts(rows: torch.Tensor, step: int) -> list[torch.Tensor]:
    # A single row twice: several threads share its sums, in another order.
    shared = torch.get_num_threads() > 1
    return [part.expand(2) if shared and len(part) == 1 else part for part in rows.split(step)]


def _inverse(temperature: float | torch.Tensor) -> float | torch.Tensor:
    """Return 1/T: a number, or [k, 1] for a temperature per row."""
    if isinstance(temperature, torch.Tensor):
        return (1.0 / temperature.float())[:, None]
    return 1.0 / temperature


def _block(args: RowArgs) -> cpu_passes.Block:
    return cpu_passes.Block(args.p, args.q, args.tokens, _inverse(args.temperature))


def _select(args: RowArgs, rows: torch.Tensor, dtype: torch.dtype | None = None) -> RowArgs:
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


@torch.inference_mode()
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
    most = row_blocks.ROWS_AT_ONCE if unscaled else 0
    for rows, x, y in row_blocks.blocks(p, args.q, active, most):
        block_args = args.at(rows, x, y)
        lean = saved[rows, cpu_rows.KIND] >= (cpu_rows.FAR if grad_q is None else cpu_rows.LEAN)
        if isinstance(rows, slice) and unscaled and bool(lean.all()):
            g, grads = rows_of_each(upstream, rows), part_of(sides, rows)
            cpu_gradients.gradients(_block(block_args), saved[rows], g, grads, room)
            continue
        numbers = torch.arange(len(saved), device=p.device)[rows]
        for is_lean in (True, False):
            for part in _parts((lean == is_lean).nonzero()[:, 0], step):
                scaled, at = _scaled(_select(block_args, part)), numbers[part]
                g, kept = rows_of_each(upstream, at), saved[at]
                if is_lean:
                    results = _empty_like(sides, scaled.p)
                    cpu_gradients.gradients(_block(scaled), kept, g, results, room)
                else:
                    results = _reference_gradients(scaled, kept, g, sides)
                for grad, value, slope in zip(sides, results, _slopes(scaled), strict=True):
                    if grad is not None and value is not None:
                        grad[at] = (value if slope is None else value * slope).to(grad.dtype)


def _reference_gradients(
    args: RowArgs, saved: torch.Tensor, upstream: dict[str, torch.Tensor], sides: Sides
) -> Sides:
    """Compute gradients of rows with respect to scaled logits in float64, as _by_reference."""
    if args.divergence.kind != "kl":
        weights = (upstream["kl"].double() / args.temperature)[:, None]
        grad_p, grad_q = f_divergences.gradients(*_log_probs(args), *args.divergence)
        return weights * grad_p, weights * grad_q
    p, q, tokens, _, temperature, *_ = args
    pair = p.double(), None if q is None else q.double()
    if saved.dtype != torch.float64:
        saved = reference.row_statistics(*pair, tokens, temperature).saved
    wrt_p, wrt_q = (side is not None for side in sides)
    return reference.row_gradients(
        *pair, tokens, temperature, saved, upstream, wrt_p=wrt_p, wrt_q=wrt_q
    )


def _log_probs(args: RowArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both models' log-probabilities in float64."""
    p, q, _, _, temperature, *_ = args
    assert q is not None
    scale = temperature.double()[:, None] if isinstance(temperature, torch.Tensor) else temperature
    return (p.double() / scale).log_softmax(-1), (q.double() / scale).log_softmax(-1)


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
