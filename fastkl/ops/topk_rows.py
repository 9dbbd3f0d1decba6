"""A divergence from a teacher's top k and its gradient by the kernels, for whole rows of logits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dual_op import DualOp, Rules, save_tensors
from .engine import ENGINES
from .fields import SAVED, Outside, flat, row_args
from .problems import outside_launchers, problems
from .row_op import refuse_forward_mode, refuse_second_derivative, refuse_temperature_gradient
from .topk_op import matrix

# Longest list: the kernels compare each entry with all others.
LARGEST_K = 511


class TopKInputs(NamedTuple):
    """Arguments of topk_rows: logits [..., V], ids and logprobs [..., K], mask and temperature as
    in row_op.RowInputs, and kernels.launch_outside.TopK's numbers.
    """

    logits: Tensor
    ids: Tensor
    logprobs: Tensor
    mask: Tensor | None
    temperatures: Tensor | None
    temperature: float
    direction: int
    tail: int
    share: float
    clip: float
    largest_mass: float


class TopKUpstream(NamedTuple):
    """Further arguments of topk_gradients: forward's saved values, and the upstream gradient."""

    log_sum: Tensor
    peak: Tensor
    saved: Tensor
    upstream: Tensor


def _parts(inputs: TopKInputs) -> tuple[Any, list[tuple[slice, Any, Any]]]:
    """Return the RowArgs, and for each kernels.launch.Problem its rows, itself and its TopK."""
    logits, ids, logprobs, *per_row = inputs[:6]
    # A saved-tensor hook may return logits with another stride along the vocabulary.
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    args = row_args(logits, None, None, *per_row)
    ids, logprobs = matrix(ids), matrix(logprobs)
    found = []
    for part, problem in problems(args):
        rows = slice(None) if part is None else part
        given = outside_launchers().TopK(ids[rows], logprobs[rows], *inputs[6:])
        found.append((rows, problem, given))
    return args, found


def _empty(inputs: TopKInputs) -> tuple[Tensor, ...]:
    """Return uninitialised results: kl, the masses of student and teacher, which rows count, and
    an Outside.
    """
    kl, student_mass, teacher_mass = (
        torch.empty(inputs.ids.shape[:-1], dtype=torch.float32, device=inputs.ids.device)
        for _ in range(3)
    )
    log_sum, peak = (torch.empty_like(kl, dtype=torch.float64) for _ in range(2))
    counted, saved = torch.empty_like(kl, dtype=torch.bool), kl.new_empty((*kl.shape, SAVED))
    return kl, student_mass, teacher_mass, counted, log_sum, peak, saved


def _forward(inputs: TopKInputs) -> tuple[Tensor, ...]:
    """Compute the results of _empty."""
    results = _empty(inputs)
    if results[0].numel():
        *values, log_sum, peak, saved = results
        others = Outside(log_sum.view(-1), peak.view(-1), saved.view(-1, SAVED))
        for rows, problem, given in _parts(inputs)[1]:
            outside = others.at(rows)
            outside_launchers().outside(problem, given.ids, *outside, given.logprobs)
            outside_launchers().topk(
                problem, given, outside[:2], [value.view(-1)[rows] for value in values]
            )
    return results


def _gradients(inputs: TopKInputs, given: TopKUpstream) -> Tensor:
    """Compute the gradient to the logits, contiguous and in their type."""
    grad = inputs.logits.new_empty(inputs.logits.shape)
    if not grad.numel():
        return grad
    args, parts = _parts(inputs)
    others = Outside(flat(given.log_sum), flat(given.peak), matrix(given.saved))
    upstream, places = flat(given.upstream), matrix(torch.empty_like(inputs.ids, dtype=torch.int64))
    of_listed = torch.empty_like(places, dtype=torch.float32)
    of_rest = torch.empty_like(upstream, dtype=torch.float32)
    for rows, problem, lists in parts:
        gradient = [value[rows] for value in (upstream, of_listed, places, of_rest)]
        outside_launchers().topk(problem, lists, others.at(rows)[:2], None, gradient)
    matrix_grad = grad.view(-1, grad.shape[-1])
    ENGINES["triton"].outside_gradient(args, others, of_rest, matrix_grad)
    matrix_grad.scatter_(-1, places, of_listed.to(grad.dtype))
    return grad


def _save_for_backward(ctx: Any, groups: tuple[TopKInputs], output: Any) -> None:
    (inputs,) = groups
    refuse_temperature_gradient(ctx.needs_input_grad[4])
    save_tensors(ctx, *inputs[:5], *output[4:])
    ctx.options = inputs[5:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    none = (None,) * (len(TopKInputs._fields) - 1)
    if upstream is None:
        return None, *none
    refuse_forward_mode((upstream,))
    *tensors, log_sum, peak, saved = ctx.saved_tensors
    given = TopKUpstream(log_sum, peak, saved, upstream)
    return topk_gradients(TopKInputs(*tensors, *ctx.options), given), *none


topk_rows = DualOp(
    "topk_rows",
    (TopKInputs,),
    _forward,
    _empty,
    outputs=7,
    rules=Rules(_backward, setup_context=_save_for_backward, rowwise=True),
)
topk_gradients = DualOp(
    "topk_gradients",
    (TopKInputs, TopKUpstream),
    _gradients,
    lambda inputs, _: inputs.logits.new_empty(inputs.logits.shape),
    outputs=1,
    rules=Rules(refuse_second_derivative, rowwise=True),
)
