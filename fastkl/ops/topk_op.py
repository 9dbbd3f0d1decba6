"""A row of logits as K listed entries and the log-sum-exp of all others, from one read."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from .dual_op import DualOp, Rules, save_tensors
from .engine import ENGINES, Engine
from .fields import SAVED, RowArgs, flat, result_dtype, row_args
from .row_op import refuse_forward_mode, refuse_second_derivative, refuse_temperature_gradient


class CellInputs(NamedTuple):
    """Arguments of cells: logits [..., V], int64 ids [..., K], each row's increasing, V for an
    absent one, mask and temperature as in row_op.RowInputs.
    """

    logits: Tensor
    ids: Tensor
    mask: Tensor | None
    temperatures: Tensor | None
    temperature: float
    backend: str


class CellGradientInputs(NamedTuple):
    """Arguments of cell_gradients: the same, the result and the saved values of cells, and upstream
    gradients.
    """

    logits: Tensor
    ids: Tensor
    mask: Tensor | None
    temperatures: Tensor | None
    rest: Tensor
    saved: Tensor
    g_listed: Tensor | None
    g_rest: Tensor | None
    temperature: float
    backend: str


def fill_cells(
    engine: Engine, args: RowArgs, ids: Tensor, listed: Tensor, rest: Tensor, saved: Tensor
) -> None:
    """Fill listed [N, K] with x/T at the ids and rest [N] with log Σ exp(x/T) of the others, both
    float64, for x the soft-capped logits p; an absent id has -inf.
    """
    x = _at(args.p, ids.masked_fill(ids >= args.p.shape[-1], 0))
    fill_listed(engine, args, args.p.shape[-1], ids, x, listed)
    engine.outside(args, ids, rest, saved)


def fill_listed(
    engine: Engine, args: RowArgs, vocabulary: int, ids: Tensor, x: Tensor, listed: Tensor
) -> None:
    """Fill listed as fill_cells from the logits x [N, K] at the ids."""
    capped = reference.soft_cap(x, args.scaling.softcap).double()
    listed.copy_((capped * _scale(engine, args)).masked_fill_(ids >= vocabulary, float("-inf")))


def listed_gradient(engine: Engine, args: RowArgs, x: Tensor | None, g_listed: Tensor) -> Tensor:
    """Return the gradient [N, K] with respect to the logits x, needed with a soft cap alone."""
    value = g_listed * _scale(engine, args)
    if x is not None and args.scaling.softcap:
        capped = reference.soft_cap(x, args.scaling.softcap).double()
        value = value * reference.soft_cap_slope(capped, args.scaling.softcap)
    return value


def fill_cell_gradients(
    engine: Engine,
    args: RowArgs,
    ids: Tensor,
    rest: Tensor,
    saved: Tensor,
    upstream: tuple[Tensor | None, Tensor | None],
    grad: Tensor,
) -> None:
    """Fill the gradient [N, V] of upstream gradients of (listed, rest), which may overwrite the
    logits: the engine writes that of rest everywhere, and the listed entries are then overwritten.
    """
    g_listed, g_rest = upstream
    absent = ids >= args.p.shape[-1]
    if args.mask is not None:
        absent |= ~args.mask[:, None]
    # An absent id repeats the row's first one, or of a row without any writes 0 where 0 is.
    ids = torch.where(absent, ids[:, :1], ids).masked_fill(absent[:, :1], 0)
    value = torch.zeros_like(ids, dtype=torch.float64)
    if g_listed is not None:
        value = listed_gradient(engine, args, _at(args.p, ids), g_listed)
    value = torch.where(absent, value[:, :1], value).masked_fill(absent[:, :1], 0.0)
    if g_rest is None:
        grad.zero_()
    else:
        engine.outside_gradient(args, rest, saved, g_rest, grad)
    grad.scatter_(-1, ids, value.to(grad.dtype))


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


def _rows(inputs: CellInputs | CellGradientInputs) -> RowArgs:
    """Return the arguments of all rows."""
    return row_args(inputs.logits, None, None, inputs.mask, inputs.temperatures, inputs.temperature)


def matrix(value: Tensor) -> Tensor:
    """Return [..., K] as a contiguous [N, K]."""
    return value.reshape(-1, value.shape[-1]).contiguous()


def _cells(inputs: CellInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (x/T at the ids [..., K], log Σ exp(x/T) of the others [...], saved [..., SAVED]).

    The first two are float64; an absent id has -inf.
    """
    listed, rest, saved = results = _fake_cells(inputs)
    if rest.numel():
        outputs = matrix(listed), rest.view(-1), matrix(saved)
        fill_cells(ENGINES[inputs.backend], _rows(inputs), matrix(inputs.ids), *outputs)
    return results


def _fake_cells(inputs: CellInputs) -> tuple[Tensor, Tensor, Tensor]:
    logits, leading = inputs.logits, inputs.logits.shape[:-1]
    return (
        logits.new_empty(inputs.ids.shape, dtype=torch.float64),
        logits.new_empty(leading, dtype=torch.float64),
        logits.new_empty((*leading, SAVED), dtype=result_dtype(logits)),
    )


def _gradients(inputs: CellGradientInputs) -> Tensor:
    """Compute the gradient to the logits, contiguous and in their type."""
    grad, g_listed, g_rest = _fake_gradients(inputs), inputs.g_listed, inputs.g_rest
    if not inputs.rest.numel():
        return grad.zero_()
    upstream = (
        None if g_listed is None else matrix(g_listed),
        None if g_rest is None else flat(g_rest),
    )
    fill_cell_gradients(
        ENGINES[inputs.backend],
        _rows(inputs),
        matrix(inputs.ids),
        flat(inputs.rest),
        matrix(inputs.saved),
        upstream,
        grad.view(-1, grad.shape[-1]),
    )
    return grad


def _fake_gradients(inputs: CellGradientInputs) -> Tensor:
    return inputs.logits.new_empty(inputs.logits.shape)


def _save_for_backward(ctx: Any, groups: tuple[CellInputs], output: Any) -> None:
    (inputs,) = groups
    refuse_temperature_gradient(ctx.needs_input_grad[3])
    save_tensors(ctx, *inputs[:4], output[1], output[2])
    ctx.options = inputs[4:]
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, g_listed: Tensor | None, g_rest: Tensor | None, _: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    none = (None,) * 5
    if g_listed is None and g_rest is None:
        return None, *none
    refuse_forward_mode((g_listed, g_rest))
    inputs = CellGradientInputs._make([*ctx.saved_tensors, g_listed, g_rest, *ctx.options])
    return cell_gradients(inputs), *none


cells = DualOp(
    "fastkl::cells",
    (CellInputs,),
    _cells,
    _fake_cells,
    outputs=3,
    rules=Rules(_backward, setup_context=_save_for_backward, rowwise=True),
)
cell_gradients = DualOp(
    "fastkl::cell_gradients",
    (CellGradientInputs,),
    _gradients,
    _fake_gradients,
    outputs=1,
    rules=Rules(refuse_second_derivative, rowwise=True),
)
