"""Log-probabilities of K ids per row: one read of the logits forward, one backward, whatever K is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from . import engine
from .dual_op import Dispatched, save_tensors
from .fields import SAVED, result_dtype
from .row_op import _batched, refuse_forward_mode, refuse_second_derivative


def _logprobs(logits: Tensor, index: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """(log-probabilities [..., K], what backward needs [..., SAVED]) of int64 ids [..., K] within
    the vocabulary, K ≥ 1.

    The kernel gives that of the likeliest id, from which differences of logits lead to the others:
    a sum of two numbers of one sign, so that no digit cancels and none rises above 0.
    """
    results = _fake_logprobs(logits, index, backend)
    if not results[0].numel():
        return results
    logprobs, saved = results
    if backend == "reference":
        _checks.tokens_in_range(index, logits.shape[-1])
    chosen = logits.gather(-1, index).to(logprobs.dtype)
    best = chosen.argmax(-1, keepdim=True)
    top, of_top = chosen.gather(-1, best), logprobs.new_empty(index.shape[:-1])
    engine.forward(
        backend,
        logits,
        None,
        engine.flat(index.gather(-1, best)[..., 0]),
        None,
        1.0,
        {"logprob": of_top.view(-1)},
        saved.view(-1, SAVED),
    )
    # Equal logits may both be -inf.
    distance = (top - chosen).masked_fill_(chosen == top, 0.0)
    logprobs.copy_(of_top[..., None] - distance)
    return results


def _fake_logprobs(logits: Tensor, index: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    dtype = result_dtype(logits)
    return logits.new_empty(index.shape, dtype=dtype), logits.new_empty(
        (*index.shape[:-1], SAVED), dtype=dtype
    )


def _gradients(
    logits: Tensor, index: Tensor, logprobs: Tensor, saved: Tensor, upstream: Tensor, backend: str
) -> Tensor:
    """Gradient to the logits, contiguous and in their type.

    The kernel writes -Σ upstream · probability everywhere; the chosen entries are then written
    over, each rounded once: adding to a rounded 16-bit gradient would round twice.
    """
    grad = logits.new_empty(logits.shape)
    if not logprobs.numel():
        return grad.zero_()
    total = upstream.sum(-1, keepdim=True)
    engine.backward(
        backend,
        logits,
        None,
        engine.flat(index[..., 0]),
        None,
        1.0,
        saved.reshape(-1, SAVED).contiguous(),
        {"logprob": engine.flat(total[..., 0])},
        grad.view(-1, logits.shape[-1]),
        None,
    )
    own = _sums_of_equal(index, upstream)
    likely = logprobs > -0.5
    # own - total · p, from p - 1 where p is near 1: the digits of what is left.
    value = (own - total * likely) - total * torch.where(likely, logprobs.expm1(), logprobs.exp())
    return grad.scatter_(-1, index, value.to(grad.dtype))


def _fake_gradients(
    logits: Tensor, index: Tensor, logprobs: Tensor, saved: Tensor, upstream: Tensor, backend: str
) -> Tensor:
    return logits.new_empty(logits.shape)


def _sums_of_equal(index: Tensor, values: Tensor) -> Tensor:
    """The sum of a row's values over the entries with the same id, at each of them."""
    ordered, order = index.sort(-1)
    number = (ordered != ordered.roll(1, -1)).cumsum(-1)
    number = number.new_zeros(number.shape).scatter_(-1, order, (number - number[..., :1]))
    return values.new_zeros(values.shape).scatter_add_(-1, number, values).gather(-1, number)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, index, ctx.backend = inputs
    save_tensors(ctx, logits, index, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, upstream: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, None, None]:
    if upstream is None:
        return None, None, None
    refuse_forward_mode((upstream,))
    return selected_gradients(*ctx.saved_tensors, upstream, ctx.backend), None, None


def _batched_logprobs(
    info: Any, in_dims: Sequence[int | None], logits: Tensor, index: Tensor, backend: str
) -> tuple[tuple[Any, ...], tuple[int, int]]:
    return (*_batched(info, in_dims, (logits, index)), backend), (0, 0)


def _batched_gradients(
    info: Any, in_dims: Sequence[int | None], *inputs: Any
) -> tuple[tuple[Any, ...], int]:
    return (*_batched(info, in_dims, inputs[:-1]), inputs[-1]), 0


selected_logprobs = Dispatched(
    "fastkl::selected_logprobs",
    _logprobs,
    _fake_logprobs,
    setup_context=_save_for_backward,
    backward=_backward,
    batch=_batched_logprobs,
)
selected_gradients = Dispatched(
    "fastkl::selected_gradients",
    _gradients,
    _fake_gradients,
    backward=refuse_second_derivative,
    batch=_batched_gradients,
)
