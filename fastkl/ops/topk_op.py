"""Reduce a row of logits to K listed entries and the log-sum-exp of all others, both relative to
the largest listed entry, or to the divergence from a teacher's list, in one read.
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
from .topk_rows import MASSES, Teacher, fill_topk, fill_topk_gradients


class CellInputs(NamedTuple):
    """Arguments of cells: logits [..., V], int64 ids [..., K], sorted in each row, mask and
    temperature as in row_op.RowInputs, dtype as in Engine.outside, and the fields of parallel.Cut.
    An id equal to the whole vocabulary's V, and every repeat of an id, is an absent entry. With a
    Teacher's log-probs, ids are int32 or int64 in any order, and a group is an error.
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
    """Further arguments of cell_gradients and of linear_cell_gradients: forward's result and saved
    values, and upstream gradients; g_listed: with a Teacher that of the divergence.
    """

    log_sum: Tensor
    peak: Tensor
    saved: Tensor
    g_listed: Tensor | None
    g_log_sum: Tensor | None


def absent_entries(ids: Tensor, vocabulary: int) -> Tensor:
    """Return which of the sorted ids [..., K] are absent, as in CellInputs."""
    repeated = torch.nn.functional.pad(ids[..., 1:] == ids[..., :-1], (1, 0))
    return repeated | (ids >= vocabulary)


def fill_cells(
    engine: Engine,
    args: RowArgs,
    ids: Tensor,
    teacher: Teacher,
    listed: Tensor,
    others: Outside,
    masses: Tensor,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Fill listed [N, K], float64, with (x - peak)/T at the ids, -inf at an absent one, and
    `others` relative to the same peak: the row's largest listed x, the soft-capped logit. With a
    Teacher's log-probs fill_topk fills `others` and, in place of listed, kl [N] and masses.
    """
    if teacher.logprobs is not None:
        return fill_topk(args, ids, teacher, others, listed, masses)
    absent = absent_entries(ids, args.p.shape[-1])
    x = _at(args.p, ids.masked_fill(absent, 0))
    engine.outside(args, ids, others, dtype)
    fill_listed(engine, args, absent, x, listed, others)


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
    teacher: Teacher,
    others: Outside,
    upstream: tuple[Tensor | None, Tensor | None],
    grad: Tensor,
) -> None:
    """Fill the gradient [N, V] of upstream gradients of (listed, log_sum), which may overwrite the
    logits: the engine writes that of log_sum everywhere, and the listed entries are then
    overwritten. The peak counts as a constant: it cancels in log-probabilities. With a Teacher's
    log-probs, upstream is that of kl [N].
    """
    g_listed, g_log_sum = upstream
    if teacher.logprobs is not None and g_listed is not None:
        return fill_topk_gradients(engine, args, ids, teacher, others, g_listed, grad)
    absent = absent_entries(ids, args.p.shape[-1])
    if args.mask is not None:
        absent |= ~args.mask[:, None]
    # Replace an absent id by the row's first one; a row without ids uses entry 0.
    none = absent[:, :1]
    ids = torch.where(absent, ids[:, :1], ids).masked_fill(none, 0)
    value = torch.zeros_like(ids, dtype=torch.float64)
    if g_listed is not None:
        value = listed_gradient(engine, args, _at(args.p, ids), g_listed)
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


def _cells(inputs: CellInputs, teacher: Teacher) -> Outputs:
    """Compute (listed [..., K], *Outside of [...], masses) as fill_cells."""
    results = empty_cells(inputs.logits, inputs.ids, teacher)
    args = shard_rows.whole(_rows(inputs))
    listed, log_sum, peak, saved, masses = results
    if log_sum.numel():
        listed = listed.view(-1, *listed.shape[log_sum.dim() :])
        others = Outside(log_sum.view(-1), peak.view(-1), matrix(saved))
        given = args, matrix(inputs.ids), teacher, listed, others, masses.view(len(listed), -1)
        fill_cells(ENGINES[inputs.backend], *given, inputs.dtype)
    return results


def empty_cells(logits: Tensor, ids: Tensor, teacher: Teacher) -> Outputs:
    """Return uninitialised results of cells for logits or hidden states; without a Teacher's
    log-probs masses is [..., 0].
    """
    rows, lists, dtype = ids.shape[:-1], teacher.logprobs is None, result_dtype(logits)
    log_sum, peak = (torch.empty(rows, dtype=torch.float64, device=ids.device) for _ in range(2))
    saved = log_sum.new_empty((*rows, SAVED), dtype=dtype)
    listed = log_sum.new_empty(ids.shape) if lists else saved.new_empty(rows)
    return listed, log_sum, peak, saved, saved.new_empty((*rows, 0 if lists else MASSES))


def _gradients(inputs: CellInputs, teacher: Teacher, given: CellUpstream) -> Tensor:
    """Compute the gradient to the logits, contiguous and in their type."""
    log_sum, peak, saved, g_listed, g_log_sum = given
    grad = inputs.logits.new_empty(inputs.logits.shape)
    if not (log_sum.numel() and grad.numel()):
        return grad.zero_()
    args, ids, rows = _rows(inputs), matrix(inputs.ids), grad.view(-1, grad.shape[-1])
    others, g_log_sum = Outside(flat(log_sum), flat(peak), matrix(saved)), flat(g_log_sum)
    g_listed = matrix(g_listed) if teacher.logprobs is None else flat(g_listed)
    if args.cut.group:
        ids, args = ids - args.cut.start, shard_rows.local(args)
        columns = args.p.shape[-1]
        outside = (ids < 0) | (ids >= columns)
        ids, order = ids.masked_fill(outside, columns).sort(stable=True, dim=-1)
        g_listed = None if g_listed is None else g_listed.gather(-1, order)
        (rows,) = shard_rows.zero_padding(args, (rows,))
    if rows.numel():
        given_rows = args, ids, teacher, others, (g_listed, g_log_sum)
        fill_cell_gradients(ENGINES[inputs.backend], *given_rows, rows)
    return grad


def _save_for_backward(ctx: Any, groups: tuple[CellInputs, Teacher], output: Any) -> None:
    inputs, teacher = groups
    refuse_temperature_gradient(ctx.needs_input_grad[3])
    save_tensors(ctx, *inputs[:4], teacher.logprobs, *output[1:4])
    ctx.options = inputs[4:], teacher[1:]
    ctx.mark_non_differentiable(*output[2 if teacher.logprobs is None else 1 :])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, g_listed: Tensor | None, g_log_sum: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    none = (None,) * (len(CellInputs._fields) + len(Teacher._fields) - 1)
    if g_listed is None and g_log_sum is None:
        return None, *none
    refuse_forward_mode((g_listed, g_log_sum))
    *tensors, logprobs, log_sum, peak, saved = ctx.saved_tensors
    options, how = ctx.options
    given = CellUpstream(log_sum, peak, saved, g_listed, g_log_sum)
    inputs, teacher = CellInputs(*tensors, *options), Teacher(logprobs, *how)
    return cell_gradients(inputs, teacher, given), *none


cells = DualOp(
    "cells",
    (CellInputs, Teacher),
    _cells,
    lambda inputs, teacher: empty_cells(inputs.logits, inputs.ids, teacher),
    outputs=5,
    rules=Rules(_backward, setup_context=_save_for_backward, rowwise=True),
)
cell_gradients = DualOp(
    "cell_gradients",
    (CellInputs, Teacher, CellUpstream),
    _gradients,
    lambda inputs, *_: inputs.logits.new_empty(inputs.logits.shape),
    outputs=1,
    rules=Rules(refuse_second_derivative, rowwise=True),
)
