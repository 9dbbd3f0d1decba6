"""Log-probabilities of K ids per row from one read of the logits forward and one backward, for any
K.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .dual_op import DualOp, Rules, save_tensors
from .engine import ENGINES
from .fields import SAVED, flat, result_dtype, row_args
from .row_op import refuse_forward_mode, refuse_second_derivative


class SelectedInputs(NamedTuple):
    """Arguments of selected_logprobs: logits [..., V] and int64 ids [..., K] in 0 … V-1, K ≥ 1."""

    logits: Tensor
    ids: Tensor
    backend: str


class SelectedGradientInputs(NamedTuple):
    """Arguments of selected_gradients: the same, the results, and upstream gradients [..., K]."""

    logits: Tensor
    ids: Tensor
    logprobs: Tensor
    saved: Tensor
    upstream: Tensor
    backend: str


def _logprobs(inputs: SelectedInputs) -> tuple[Tensor, Tensor]:
    """Compute (log-probabilities [..., K], saved values [..., SAVED]).

    The engine computes the likeliest id's log-probability; the others are that minus a difference
    of logits. Both terms are ≤ 0, so nothing cancels and nothing exceeds 0.
    """
    (logits, ids, _), engine = inputs, ENGINES[inputs.backend]
    logprobs, saved = results = _fake_logprobs(inputs)
    if not logprobs.numel():
        return results
    if engine.checks_values:
        _checks.tokens_in_range(ids, logits.shape[-1])
    chosen = logits.gather(-1, ids).to(logprobs.dtype)
    best = chosen.argmax(-1, keepdim=True)
    top, top_logprob = chosen.gather(-1, best), logprobs.new_empty(ids.shape[:-1])
    args = row_args(logits, None, ids.gather(-1, best)[..., 0], None, None, 1.0)
    engine.forward(args, {"logprob": top_logprob.view(-1)}, saved.view(-1, SAVED))
    # Equal logits may both be -inf.
    distance = (top - chosen).masked_fill_(chosen == top, 0.0)
    logprobs.copy_(top_logprob[..., None] - distance)
    return results


def _fake_logprobs(inputs: SelectedInputs) -> tuple[Tensor, Tensor]:
    logprobs = inputs.logits.new_empty(inputs.ids.shape, dtype=result_dtype(inputs.logits))
    return logprobs, logprobs.new_empty((*inputs.ids.shape[:-1], SAVED))


def _gradients(inputs: SelectedGradientInputs) -> Tensor:
    """Compute the gradient to the logits, contiguous and in their type.

    The engine writes -Σ upstream · probability everywhere; the entries at `ids` are then
    overwritten, each rounded once: adding to a rounded 16-bit gradient would round twice.
    """
    logits, ids, logprobs, saved, upstream, backend = inputs
    grad = _fake_gradients(inputs)
    if not logprobs.numel():
        return grad.zero_()
    total = upstream.sum(-1, keepdim=True)
    ENGINES[backend].backward(
        row_args(logits, None, ids[..., 0], None, None, 1.0),
        saved.reshape(-1, SAVED).contiguous(),
        {"logprob": flat(total[..., 0])},
        grad.view(-1, logits.shape[-1]),
        None,
    )
    likely = logprobs > -0.5
    own = _sums_of_equal(ids, upstream) - total * likely
    # own - total·p, written with p - 1 where p is near 1.
    value = own - total * torch.where(likely, logprobs.expm1(), logprobs.exp())
    return grad.scatter_(-1, ids, value.to(grad.dtype))


def _fake_gradients(inputs: SelectedGradientInputs) -> Tensor:
    return inputs.logits.new_empty(inputs.logits.shape)


def _sums_of_equal(ids: Tensor, values: Tensor) -> Tensor:
    """Sum a row's values over the entries with the same id, at each of them."""
    ordered, order = ids.sort(-1)
    number = (ordered != ordered.roll(1, -1)).cumsum(-1)
    number = number.new_zeros(number.shape).scatter_(-1, order, (number - number[..., :1]))
    return values.new_zeros(values.shape).scatter_add_(-1, number, values).gather(-1, number)


def _save_for_backward(
    ctx: Any, groups: tuple[SelectedInputs], output: tuple[Tensor, Tensor]
) -> None:
    logits, ids, ctx.backend = groups[0]
    save_tensors(ctx, logits, ids, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, upstream: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, None, None]:
    if upstream is None:
        return None, None, None
    refuse_forward_mode((upstream,))
    inputs = SelectedGradientInputs._make((*ctx.saved_tensors, upstream, ctx.backend))
    return selected_gradients(inputs), None, None


selected_logprobs = DualOp(
    "fastkl::selected_logprobs",
    (SelectedInputs,),
    _logprobs,
    _fake_logprobs,
    outputs=2,
    rules=Rules(_backward, setup_context=_save_for_backward, rowwise=True),
)
selected_gradients = DualOp(
    "fastkl::selected_gradients",
    (SelectedGradientInputs,),
    _gradients,
    _fake_gradients,
    outputs=1,
    rules=Rules(refuse_second_derivative, rowwise=True),
)
