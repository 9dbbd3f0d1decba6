"""The op of Σ weights·kl from hidden states, which computes the gradients with the value."""

from itertools import compress
from typing import Any, NamedTuple

import torch

from .dual_op import DualOp, Rules
from .linear_op import (
    SIX,
    LinearInputs,
    empty_gradients,
    flops,
    in_their_types,
    returned,
)
from .row_op import (
    Outputs,
    Upstream,
    refuse_forward_mode,
    refuse_second_derivative,
    refuse_temperature_gradient,
    wanted,
)

# Elements that `scaled` multiplies at a time on a CPU.
SCALED_AT_ONCE = 1 << 20


class SumInputs(NamedTuple):
    """Further arguments of linear_weighted_kl: weights [...], and names as in GradientInputs."""

    weights: torch.Tensor
    wrt: str


class ScaledInputs(NamedTuple):
    """Arguments of scaled: a gradient, a scalar tensor, and the type of the result."""

    gradient: torch.Tensor
    factor: torch.Tensor
    dtype: torch.dtype


def _weighted_kl(inputs: LinearInputs, request: SumInputs) -> Outputs:
    """Compute (Σ weights·kl, kl, unit, gradients of the sum with respect to the six tensors divided
    by `unit`, None if not requested).

    unit is the inverse loss scale: 1, or for float16 inputs a power of two below the largest
    weight, because a gradient of 1/N per token would underflow. Weight and bias gradients of
    float16 inputs stay in float32.
    """
    weights, wrt, ref_hidden = request.weights.contiguous(), wanted(request.wrt), inputs.ref_hidden
    unit = weights.new_ones(())
    gradients: dict[str, torch.Tensor] = {}
    if not wrt:
        kl = inputs.heads(None).forward(("kl",))["kl"]
    else:
        if inputs.hidden.dtype == torch.float16 or (
            ref_hidden is not None and ref_hidden.dtype == torch.float16
        ):
            unit = _inverse_loss_scale(inputs, weights, wrt)
        kl, gradients = inputs.heads(None).forward_and_backward((weights / unit).view(-1), wrt)
    kl = kl.view(weights.shape)
    # A token of weight 0 adds 0, even if its KL is infinite.
    total = torch.where(weights == 0, 0.0, weights * kl).sum()
    return total, kl, unit, *in_their_types(inputs, gradients, wrt, wide=torch.float16)


def _scaled(inputs: ScaledInputs) -> torch.Tensor:
    """Compute gradient · factor in `dtype`, rounded once: torch would round the factor to a 16-bit
    gradient's type first.
    """
    # A saved-tensor hook may return a non-contiguous tensor.
    gradient, factor = inputs.gradient.contiguous(), inputs.factor.reshape(1)
    result = torch.empty_like(gradient, dtype=inputs.dtype)
    # On a CPU torch.mul copies its operands to the common dtype, so multiply in parts.
    step = SCALED_AT_ONCE if gradient.device.type == "cpu" else max(1, gradient.numel())
    for part, out in zip(gradient.view(-1).split(step), result.view(-1).split(step), strict=True):
        torch.mul(part, factor, out=out)
    return result


# The alternative that does not compute the gradient with the value.
PER_TOKEN = "fastkl.linear_kl_divergence or fastkl.linear_divergence with reduction='none'"


def _inverse_loss_scale(
    inputs: LinearInputs, weights: torch.Tensor, wrt: tuple[str, ...]
) -> torch.Tensor:
    """Return the inverse loss scale of float16 gradients: the power of two u for which max|f|/u is
    in (4, 8], or 1 if that maximum is 0 or not finite, with f a token's factor of the gradients of
    raw logits.

    With max|f|/u = 1 a flat row's gradients would underflow into subnormals; the headroom up to
    float16's largest number, 65504, is for log-ratios of thousands.
    """
    # The second model's gradients have the factor `ratio`; the first's may have it through the
    # log-ratio.
    size: torch.Tensor | float = inputs.ratio if inputs.ratios is None else inputs.ratios
    if {"hidden", "weight", "bias"} & set(wrt) and not inputs.given_first:
        size = size.clamp(min=1) if isinstance(size, torch.Tensor) else max(1.0, size)
    temperature = inputs.temperature if inputs.temperatures is None else inputs.temperatures
    factors = torch.where(weights == 0, 0.0, weights / temperature * size).abs()
    largest = factors.max() if factors.numel() else factors.sum()
    return torch.where(
        (largest > 0) & largest.isfinite(), torch.exp2(torch.ceil(torch.log2(largest)) - 3), 1.0
    )


def _save_gradients(ctx: Any, groups: tuple[LinearInputs, SumInputs], output: Outputs) -> None:
    inputs, request = groups
    _, kl, unit, *gradients = output
    ctx.names, ctx.requested = wanted(request.wrt), [*compress(SIX, ctx.needs_input_grad)]
    ctx.weighs = ctx.needs_input_grad[len(inputs)]
    refuse_temperature_gradient(any(ctx.needs_input_grad[7:9]))
    if not set(ctx.requested).issubset(ctx.names):
        missing = [name for name in ctx.requested if name not in ctx.names]
        raise RuntimeError(
            f"{', '.join(missing)}: expected to be known to require gradient when the value is "
            f"computed, since the gradient is computed with it; torch.vmap hides that, and "
            f"torch.export, make_fx and torch.jit.trace keep what the example inputs required: use "
            f"{PER_TOKEN} there, or trace with inputs that require gradient"
        )
    ctx.types, kept = [], []
    # Save only requested gradients: checkpoints count saved tensors, and the op's empty tensor is
    # None in eager mode.
    for name, tensor, gradient in zip(SIX, inputs[:6], gradients, strict=True):
        if tensor is not None and name in ctx.names:
            ctx.types.append(tensor.dtype)
            kept.append(gradient)
    ctx.save_for_backward(kl if ctx.weighs else None, unit, *kept)
    ctx.mark_non_differentiable(*[value for value in output[1:] if value is not None])
    ctx.set_materialize_grads(False)


def _backward_of_sum(ctx: Any, upstream: torch.Tensor | None, *_: torch.Tensor | None) -> Upstream:
    if upstream is None:
        return returned({}, SumInputs)
    refuse_forward_mode((upstream,))
    if torch.is_grad_enabled():
        raise RuntimeError(
            "fastkl: create_graph=True and torch.func.grad ask for a gradient that can be "
            "differentiated again, but the gradient of a sum or mean was computed with its value; "
            f"use {PER_TOKEN} and sum or average its result"
        )
    kl, unit, *gradients = ctx.saved_tensors
    factor = upstream * unit
    results = {"weights": upstream * kl if ctx.weighs else None}
    for name, gradient, dtype in zip(ctx.names, gradients, ctx.types, strict=True):
        if name in ctx.requested:
            results[name] = scaled(ScaledInputs(gradient, factor, dtype))
    return returned(results, SumInputs)


linear_weighted_kl = DualOp(
    "linear_weighted_kl",
    (LinearInputs, SumInputs),
    _weighted_kl,
    lambda inputs, request: (
        request.weights.new_empty(()),
        torch.empty_like(request.weights),
        request.weights.new_empty(()),
        *empty_gradients(inputs, request.wrt, wide=torch.float16),
    ),
    outputs=len(SIX) + 3,
    rules=Rules(
        _backward_of_sum,
        setup_context=_save_gradients,
        flops=lambda inputs, request: flops(inputs, request.wrt),
    ),
)
scaled = DualOp(
    "scaled",
    (ScaledInputs,),
    _scaled,
    lambda inputs: torch.empty_like(inputs.gradient, dtype=inputs.dtype),
    outputs=1,
    rules=Rules(refuse_second_derivative),
)
