"""The two ops under every function on logits: row statistics and their gradients, with fake,
autograd and vmap rules.

A field that was not requested is None, or an empty tensor: an op's schema is one for all mixes of
fields.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _checks
from . import engine
from .dual_op import Dispatched, save_tensors
from .fields import FIELDS, SAVED, result_dtype

# What an op returns. Its schema has no outputs that may be None; one that nobody asked for is None
# all the same, see Dispatched.
Outputs = tuple[Any, ...]
Given = tuple[Tensor | None, ...]  # upstream gradients


@functools.lru_cache
def wanted(names: str) -> tuple[str, ...]:
    """The names in a comma-separated string: schemas of ops have no lists of names."""
    return tuple(names.split(",")) if names else ()


def empty_outputs(p: Tensor, fields: str) -> Outputs:
    """One tensor per field and the saved values, uninitialised, for logits or hidden states p; None
    for a field that nobody asked for.
    """
    dtype, device, leading, names = result_dtype(p), p.device, p.shape[:-1], wanted(fields)
    outputs = [
        torch.empty(leading, dtype=dtype, device=device) if name in names else None
        for name in FIELDS
    ]
    return *outputs, torch.empty((*leading, SAVED), dtype=dtype, device=device)


def _statistics(
    p: Tensor,
    q: Tensor | None,
    tokens: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    fields: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprob, entropy, ref_logprob, kl, ref_kl, saved): the fields named in `fields` [...], and
    what backward needs [..., 10].
    """
    results = empty_outputs(p, fields)
    if results[-1].numel():
        outputs = {
            name: engine.flat(value)
            for name, value in zip(FIELDS, results, strict=False)
            if value is not None
        }
        engine.forward(
            backend,
            p,
            q,
            engine.flat(tokens),
            engine.flat(mask),
            engine.flat_temperature(temperatures, temperature),
            outputs,
            _table(results[-1]),
        )
    return results


def _table(value: Tensor) -> Tensor:
    """A contiguous matrix of the last dimension's rows."""
    return (value if value.dim() == 2 else value.reshape(-1, value.shape[-1])).contiguous()


def _fake_statistics(
    p: Tensor,
    q: Tensor | None,
    tokens: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    fields: str,
    backend: str,
) -> Outputs:
    return empty_outputs(p, fields)


def _gradients(
    p: Tensor,
    q: Tensor | None,
    tokens: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    saved: Tensor,
    g_logprob: Tensor | None,
    g_entropy: Tensor | None,
    g_ref_logprob: Tensor | None,
    g_kl: Tensor | None,
    g_ref_kl: Tensor | None,
    temperature: float,
    wrt_p: bool,
    wrt_q: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(dP, dQ): gradients of the upstream-weighted statistics, contiguous, in the logits' types;
    None where not asked for.
    """
    grad_p, grad_q = grads = _empty_gradients(p, q, wrt_p, wrt_q)
    if p.numel():
        upstream = {
            name: engine.flat(value)
            for name, value in zip(
                FIELDS, (g_logprob, g_entropy, g_ref_logprob, g_kl, g_ref_kl), strict=True
            )
            if value is not None
        }
        engine.backward(
            backend,
            p,
            q,
            engine.flat(tokens),
            engine.flat(mask),
            engine.flat_temperature(temperatures, temperature),
            _table(saved),
            upstream,
            None if grad_p is None else _table(grad_p),
            None if grad_q is None else _table(grad_q),
        )
    return grads


def _empty_gradients(p: Tensor, q: Tensor | None, wrt_p: bool, wrt_q: bool) -> Outputs:
    return (
        torch.empty_like(p, memory_format=torch.contiguous_format) if wrt_p else None,
        torch.empty_like(q, memory_format=torch.contiguous_format)
        if wrt_q and q is not None
        else None,
    )


def _fake_gradients(
    p: Tensor,
    q: Tensor | None,
    tokens: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    saved: Tensor,
    g_logprob: Tensor | None,
    g_entropy: Tensor | None,
    g_ref_logprob: Tensor | None,
    g_kl: Tensor | None,
    g_ref_kl: Tensor | None,
    temperature: float,
    wrt_p: bool,
    wrt_q: bool,
    backend: str,
) -> Outputs:
    return _empty_gradients(p, q, wrt_p, wrt_q)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    p, q, tokens, mask, temperatures, ctx.temperature, fields, ctx.backend = inputs
    refuse_temperature_gradient(ctx.needs_input_grad[4])
    save_tensors(ctx, p, q, tokens, mask, temperatures, output[-1])
    mark_constant(ctx, output, wanted(fields), ctx.needs_input_grad[0], ctx.needs_input_grad[1])


def mark_constant(
    ctx: Any, output: Outputs, fields: tuple[str, ...], policy: bool, reference: bool
) -> None:
    """A field says that it needs no gradient if nobody asked for it, or if what it depends on,
    policy or reference, needs none.
    """
    learns = _learning(fields, policy, reference)
    # What comes after the fields has no gradient.
    constant = [
        value
        for value, its in itertools.zip_longest(output, learns, fillvalue=False)
        if value is not None and not its
    ]
    ctx.mark_non_differentiable(*constant)
    ctx.set_materialize_grads(False)


@functools.lru_cache
def _learning(fields: tuple[str, ...], policy: bool, reference: bool) -> tuple[bool, ...]:
    """Which of FIELDS were asked for and depend on what needs a gradient."""
    depends = {
        "logprob": policy,
        "entropy": policy,
        "ref_logprob": reference,
        "kl": policy or reference,
        "ref_kl": policy or reference,
    }
    return tuple(name in fields and depends[name] for name in FIELDS)


def _backward(ctx: Any, *upstream: Tensor | None) -> Given:
    p, q, tokens, mask, temperatures, saved = ctx.saved_tensors
    refuse_forward_mode(upstream)
    wrt_p, wrt_q, *_ = ctx.needs_input_grad
    # What does not depend on an argument must not make its gradient be computed: log-probs of Q say
    # nothing about P.
    logprob, entropy, ref_logprob, kl, ref_kl = given = upstream[:5]
    both = kl is not None or ref_kl is not None
    wrt_p = wrt_p and (both or logprob is not None or entropy is not None)
    wrt_q = wrt_q and (both or ref_logprob is not None)
    if not (wrt_p or wrt_q):
        return (None,) * 8
    grad_p, grad_q = row_gradients(
        p, q, tokens, mask, temperatures, saved, *given, ctx.temperature, wrt_p, wrt_q, ctx.backend
    )
    return grad_p if wrt_p else None, grad_q if wrt_q else None, None, None, None, None, None, None


def refuse_temperature_gradient(asked: bool) -> None:
    """Refuse a temperature that requires a gradient, which _checks.temperature cannot see under
    vmap.
    """
    if asked:
        raise RuntimeError(
            "temperature: expected a tensor without gradient, got one that requires it; fastkl "
            "does not differentiate with respect to "
            "the temperature: pass temperature.detach()"
        )


def refuse_forward_mode(upstream: tuple[Tensor | None, ...]) -> None:
    """A tangent of an upstream gradient would be lost in kernels."""
    if forward_ad._current_level >= 0:
        for value in (value for value in upstream if value is not None):
            _checks.not_forward_mode("upstream gradient", value)


def refuse_second_derivative(ctx: Any, *upstream: Tensor | None) -> NoReturn:
    """The autograd rule of what computes gradients."""
    raise RuntimeError(
        "fastkl: second derivatives are not implemented: the gradient of a KL divergence was "
        "itself differentiated "
        "(create_graph=True or a double backward); use fastkl.reference.row_statistics with "
        "float64 logits and autograd for that"
    )


def _batched(info: Any, in_dims: Sequence[int | None], tensors: Sequence[Any]) -> list[Any]:
    """Every tensor with the mapped dimension first; one that is not mapped is repeated without a
    copy.
    """
    moved = []
    for value, dim in zip(tensors, in_dims, strict=False):
        if isinstance(value, Tensor):
            value = (
                value.movedim(dim, 0)
                if dim is not None
                else value.expand(info.batch_size, *value.shape)
            )
        moved.append(value)
    return moved


def _batched_statistics(
    info: Any,
    in_dims: Sequence[int | None],
    p: Tensor,
    q: Tensor | None,
    tokens: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    fields: str,
    backend: str,
) -> tuple[tuple[Any, ...], tuple[int | None, ...]]:
    inputs = (
        *_batched(info, in_dims, (p, q, tokens, mask, temperatures)),
        temperature,
        fields,
        backend,
    )
    return inputs, tuple(
        0 if name in (*wanted(fields), "saved") else None for name in (*FIELDS, "saved")
    )


def _batched_gradients(
    info: Any,
    in_dims: Sequence[int | None],
    p: Tensor,
    q: Tensor | None,
    tokens: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    saved: Tensor,
    g_logprob: Tensor | None,
    g_entropy: Tensor | None,
    g_ref_logprob: Tensor | None,
    g_kl: Tensor | None,
    g_ref_kl: Tensor | None,
    temperature: float,
    wrt_p: bool,
    wrt_q: bool,
    backend: str,
) -> tuple[tuple[Any, ...], tuple[int | None, ...]]:
    tensors = _batched(
        info,
        in_dims,
        (
            p,
            q,
            tokens,
            mask,
            temperatures,
            saved,
            g_logprob,
            g_entropy,
            g_ref_logprob,
            g_kl,
            g_ref_kl,
        ),
    )
    return (*tensors, temperature, wrt_p, wrt_q, backend), (
        0 if wrt_p else None,
        0 if wrt_q else None,
    )


row_statistics = Dispatched(
    "fastkl::row_statistics",
    _statistics,
    _fake_statistics,
    setup_context=_save_for_backward,
    backward=_backward,
    batch=_batched_statistics,
    returned=len(FIELDS),
)
row_gradients = Dispatched(
    "fastkl::row_gradients",
    _gradients,
    _fake_gradients,
    backward=refuse_second_derivative,
    batch=_batched_gradients,
)
