"""A row of logits as K listed entries and the log-sum-exp of all others, from one read."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dual_op import DualOp, Rules, save_tensors
from .engine import ENGINES
from .fields import SAVED, flat, result_dtype, row_args
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


def _scale(inputs: CellInputs | CellGradientInputs) -> Tensor | float:
    """Return 1/T in float64 as the engine rounds it: a number or [..., 1]."""
    temperature: Tensor | float = inputs.temperature
    if inputs.temperatures is not None:
        temperature = inputs.temperatures[..., None]
    return ENGINES[inputs.backend].scale_of(temperature)


def _cells(inputs: CellInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (x/T at the ids [..., K], log Σ exp(x/T) of the others [...], saved [..., SAVED]).

    The first two are float64; an absent id has -inf.
    """
    logits, ids = inputs.logits, inputs.ids
    listed, rest, saved = results = _fake_cells(inputs)
    if not rest.numel():
        return results
    absent = ids >= logits.shape[-1]
    values = logits.gather(-1, ids.masked_fill(absent, 0)).double() * _scale(inputs)
    listed.copy_(values.masked_fill_(absent, float("-inf")))
    args = row_args(logits, None, None, *inputs[2:5])
    rows = ids.reshape(-1, ids.shape[-1]).contiguous()
    ENGINES[inputs.backend].outside(args, rows, rest.view(-1), saved.view(-1, SAVED))
    return results


def _fake_cells(inputs: CellInputs) -> tuple[Tensor, Tensor, Tensor]:
    logits, leading = inputs.logits, inputs.logits.shape[:-1]
    return (
        logits.new_empty(inputs.ids.shape, dtype=torch.float64),
        logits.new_empty(leading, dtype=torch.float64),
        logits.new_empty((*leading, SAVED), dtype=result_dtype(logits)),
    )


def _gradients(inputs: CellGradientInputs) -> Tensor:
    """Compute the gradient to the logits, contiguous and in their type: the engine writes that of
    the others' log-sum-exp everywhere, and the listed entries are then overwritten.
    """
    logits, ids = inputs.logits, inputs.ids
    grad = _fake_gradients(inputs)
    if not inputs.rest.numel():
        return grad.zero_()
    rows = grad.view(-1, grad.shape[-1])
    if inputs.g_rest is None:
        grad.zero_()
    else:
        args = row_args(logits, None, None, inputs.mask, inputs.temperatures, inputs.temperature)
        saved = inputs.saved.reshape(-1, SAVED).contiguous()
        ENGINES[inputs.backend].outside_gradient(
            args, flat(inputs.rest), saved, flat(inputs.g_rest), rows
        )
    value = torch.zeros_like(ids, dtype=torch.float64)
    if inputs.g_listed is not None:
        value = inputs.g_listed * _scale(inputs)
    # An absent id repeats the row's first one, or of a row without any writes 0 where 0 is.
    absent = ids >= logits.shape[-1]
    value = torch.where(absent, value[..., :1], value)
    value = torch.where(absent[..., :1], 0.0, value)
    ids = torch.where(absent, ids[..., :1], ids)
    ids = ids.masked_fill(absent[..., :1], 0)
    return grad.scatter_(-1, ids, value.to(grad.dtype))


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
