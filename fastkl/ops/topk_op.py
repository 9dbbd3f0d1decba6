"""Reduce a row of logits in one read: to K listed entries and the log-sum-exp of all others, both
relative to the largest listed entry, or to the divergence from a teacher's list.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from . import shard_rows
from .dual_op import DualOp, Rules, save_tensors
from .engine import ENGINES, Engine
from .fields import SAVED, Outside, PerRow, RowArgs, flat, result_dtype, row_args
from .row_op import (
    Outputs,
    refuse_forward_mode,
    refuse_second_derivative,
    refuse_temperature_gradient,
)
from .topk_rows import SUMMARY, ListDivergence, fill_topk, fill_topk_gradients


class CellInputs(NamedTuple):
    """Arguments of cells: logits [..., V], int64 ids [..., K], sorted in each row, mask and
    temperature as in row_op.RowInputs, dtype as in Engine.outside, and the fields of parallel.Cut.
    An id equal to the whole vocabulary's V, and every repeat of an id, is an absent entry. With
    log-probs of a ListDivergence, ids are int32 or int64 in any order, and group is "".
    """

    logits: Tensor
    ids: Tensor
    mask: Tensor | None
    temperatures: Tensor | None
    temperature: float
    backend: str
    dtype: torch.dtype = torch.float64
    group: str = ""
    start: int = 0
    vocabulary: int = 0
    width: int = 0
    ranks: int = 0


class CellUpstream(NamedTuple):
    """Further arguments of cell_gradients and of linear_cell_gradients: forward's results and
    upstream gradients. g_values: of the listed logits [..., K], or of a divergence [...].
    """

    log_sum: Tensor
    peak: Tensor
    saved: Tensor
    entries: Tensor
    g_values: Tensor | None
    g_log_sum: Tensor | None


def absent_entries(ids: Tensor, vocabulary: int) -> Tensor:
    """Return which of the sorted ids [..., K] are absent, as in CellInputs."""
    repeated = torch.nn.functional.pad(ids[..., 1:] == ids[..., :-1], (1, 0))
    return repeated | (ids >= vocabulary)


def fill_cells(
    engine: Engine,
    args: RowArgs,
    ids: Tensor,
    divergence: ListDivergence,
    values: Tensor,
    others: Outside,
    entries: Tensor,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Fill values [N, K], float64, with (x - peak)/T at the ids, -inf at an absent one, and
    `others` relative to the same peak: the row's largest listed x, the soft-capped logit. With
    log-probs of a ListDivergence fill values [N], `others` and entries as fill_topk.
    """
    if divergence.logprobs is not None:
        return fill_topk(args, ids, divergence, others, values, entries)
    absent = absent_entries(ids, args.p.shape[-1])
    x = _at(args.p, ids.masked_fill(absent, 0))
    engine.outside(args, ids, others, dtype)
    fill_listed(engine, args, absent, x, values, others)


def fill_listed(
    engine: Engine, args: RowArgs, absent: Tensor, x: Tensor, listed: Tensor, others: Outside
) -> None:
    """Fill `listed` as fill_cells from the logits x [N, K] at the ids, and move `others` to the
    same peak.
    """
    capped = reference.soft_cap(x, args.scaling.softcap).double().masked_fill(absent, -math.inf)
    peak = capped.amax(-1, keepdim=True)
    peak = peak.masked_fill(peak == -math.inf, 0.0)
    scale = _scale(engine, args)
    listed.copy_((capped - peak) * scale)
    # A masked row's log_sum stays 0: `moved` may be NaN there.
    moved = (others.log_sum[:, None] + (others.peak[:, None] - peak) * scale)[:, 0]
    others.log_sum.copy_(
        moved if args.mask is None else torch.where(args.mask, moved, others.log_sum)
    )
    others.peak.copy_(peak[:, 0])


def listed_gradient(engine: Engine, args: RowArgs, x: Tensor | None, g_listed: Tensor) -> Tensor:
    """Return the gradient [N, K] with respect to the logits at the ids; x: these logits, None
    without a soft cap.
    """
    value = g_listed * _scale(engine, args)
    if x is not None and args.scaling.softcap:
        capped = reference.soft_cap(x, args.scaling.softcap).double()
        value = value * reference.soft_cap_slope(capped, args.scaling.softcap)
    return value


def fill_cell_gradients(
    engine: Engine,
    args: RowArgs,
    ids: Tensor,
    divergence: ListDivergence,
    others: Outside,
    entries: Tensor,
    upstream: tuple[Tensor | None, Tensor | None],
    grad: Tensor,
) -> None:
    """Fill the gradient [N, V] of upstream gradients of (values, log_sum), which may overwrite the
    logits: the engine writes that of log_sum everywhere, and the listed entries are then
    overwritten. The peak counts as a constant: it cancels in log-probabilities.
    """
    g_values, g_log_sum = upstream
    if divergence.logprobs is not None:
        assert g_values is not None
        given = ids, divergence, others, entries, g_values
        return fill_topk_gradients(engine, args, *given, grad)
    absent = absent_entries(ids, args.p.shape[-1])
    if args.mask is not None:
        absent |= ~args.mask[:, None]
    # Replace an absent id by the row's first one; a row without ids uses entry 0.
    none = absent[:, :1]
    ids = torch.where(absent, ids[:, :1], ids).masked_fill(none, 0)
    value = torch.zeros_like(ids, dtype=torch.float64)
    if g_values is not None:
        value = listed_gradient(engine, args, _at(args.p, ids), g_values)
    value = torch.where(absent, value[:, :1], value).to(grad.dtype)
    if g_log_sum is None:
        grad.zero_()
    else:
        engine.outside_gradient(args, others, g_log_sum, grad)
    grad.scatter_(-1, ids, torch.where(none, grad[:, :1], value))


def _at(p: Tensor, ids: Tensor) -> Tensor:
    """Return the logits [..., V] at ids [N, K]."""
    width = ids.shape[-1]
    return p.gather(-1, ids.view(*p.shape[:-1], width)).view(-1, width)


def _scale(engine: Engine, args: RowArgs) -> Tensor | float:
    """Return 1/T in float64 as the engine rounds it: a number or [N, 1]."""
    temperature = args.temperature
    return engine.scale_of(
        temperature[:, None] if isinstance(temperature, Tensor) else float(temperature)
    )


def _rows(inputs: CellInputs) -> RowArgs:
    """Return the arguments of all rows."""
    return row_args(
        inputs.logits,
        None,
        None,
        inputs.mask,
        inputs.temperatures,
        inputs.temperature,
        ("kl", 0.0, *inputs[7:]),
    )


def matrix(value: PerRow) -> PerRow:
    """Return [..., K] as a contiguous [N, K]; None as it is."""
    return value if value is None else value.reshape(-1, value.shape[-1]).contiguous()


def _cells(inputs: CellInputs, divergence: ListDivergence) -> Outputs:
    """Compute (values [..., K] or [...], *Outside of [...], entries) as fill_cells."""
    results = empty_cells(inputs.logits, inputs.ids, divergence)
    args = shard_rows.whole(_rows(inputs))
    if count := results[1].numel():
        dims = results[1].dim()
        values, log_sum, peak, saved, entries = (x.view(count, *x.shape[dims:]) for x in results)
        fill_cells(
            ENGINES[inputs.backend],
            args,
            matrix(inputs.ids),
            divergence,
            values,
            Outside(log_sum, peak, saved),
            entries,
            inputs.dtype,
        )
    return results


def empty_cells(logits: Tensor, ids: Tensor, divergence: ListDivergence) -> Outputs:
    """Return uninitialised results of cells for logits or hidden states; entries is [..., 0]
    without a divergence.
    """
    rows, lists, dtype = ids.shape[:-1], divergence.logprobs is None, result_dtype(logits)
    log_sum, peak = (torch.empty(rows, dtype=torch.float64, device=ids.device) for _ in range(2))
    saved = log_sum.new_empty((*rows, SAVED), dtype=dtype)
    values = log_sum.new_empty(ids.shape) if lists else saved.new_empty(rows)
    width = 0 if lists else ids.shape[-1] + SUMMARY
    return values, log_sum, peak, saved, saved.new_empty((*rows, width))


def _gradients(inputs: CellInputs, divergence: ListDivergence, given: CellUpstream) -> Tensor:
    """Compute the gradient to the logits, contiguous and in their type."""
    log_sum, peak, saved, entries, g_values, g_log_sum = given
    grad = inputs.logits.new_empty(inputs.logits.shape)
    if not (log_sum.numel() and grad.numel()):
        return grad.zero_()
    args, ids, rows = _rows(inputs), matrix(inputs.ids), grad.view(-1, grad.shape[-1])
    others, g_log_sum = Outside(flat(log_sum), flat(peak), matrix(saved)), flat(g_log_sum)
    g_values = matrix(g_values) if divergence.logprobs is None else flat(g_values)
    if args.cut.group:
        ids, args = ids - args.cut.start, shard_rows.local(args)
        columns = args.p.shape[-1]
        outside = (ids < 0) | (ids >= columns)
        ids, order = ids.masked_fill(outside, columns).sort(stable=True, dim=-1)
        g_values = None if g_values is None else g_values.gather(-1, order)
        (rows,) = shard_rows.zero_padding(args, (rows,))
    if rows.numel():
        fill_cell_gradients(
            ENGINES[inputs.backend],
            args,
            ids,
            divergence,
            others,
            entries.reshape(len(ids), -1).contiguous(),
            (g_values, g_log_sum),
            rows,
        )
    return grad


def _save_for_backward(ctx: Any, groups: tuple[CellInputs, ListDivergence], output: Any) -> None:
    inputs, divergence = groups
    refuse_temperature_gradient(ctx.needs_input_grad[3])
    save_tensors(ctx, *inputs[:4], divergence.logprobs, *output[1:])
    ctx.options = inputs[4:], divergence[1:]
    ctx.mark_non_differentiable(*output[2 if divergence.logprobs is None else 1 :])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, g_values: Tensor | None, g_log_sum: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    none = (None,) * (len(CellInputs._fields) + len(ListDivergence._fields) - 1)
    if g_values is None and g_log_sum is None:
        return None, *none
    refuse_forward_mode((g_values, g_log_sum))
    *tensors, logprobs, log_sum, peak, saved, entries = ctx.saved_tensors
    options, how = ctx.options
    given = CellUpstream(log_sum, peak, saved, entries, g_values, g_log_sum)
    inputs, divergence = CellInputs(*tensors, *options), ListDivergence(logprobs, *how)
    return cell_gradients(inputs, divergence, given), *none


cells = DualOp(
    "cells",
    (CellInputs, ListDivergence),
    _cells,
    lambda inputs, divergence: empty_cells(inputs.logits, inputs.ids, divergence),
    outputs=5,
    rules=Rules(_backward, setup_context=_save_for_backward, rowwise=True),
)
cell_gradients = DualOp(
    "cell_gradients",
    (CellInputs, ListDivergence, CellUpstream),
    _gradients,
    lambda inputs, *_: inputs.logits.new_empty(inputs.logits.shape),
    outputs=1,
    rules=Rules(refuse_second_derivative, rowwise=True),
)
