"""The ops under every function on hidden states, with fake and autograd rules: statistics, their
gradients, and the weighted KL with both.

Six tensors describe the two heads: hidden, weight, bias, ref_hidden, ref_weight, ref_bias.
ref_weight is None beside ref_hidden where the heads share weight. `wrt` names those of the six
whose gradients are asked for, comma-separated. `keep`: the statistics return all logits too, of
which backward then makes no second product.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import engine, lm_head
from .dual_op import Dispatched, save_tensors
from .fields import FIELDS, SAVED, Scaling
from .row_op import (
    Given,
    Outputs,
    empty_outputs,
    mark_constant,
    refuse_forward_mode,
    refuse_second_derivative,
    refuse_temperature_gradient,
    wanted,
)

SIX = ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias")
# Elements that `scaled` multiplies at once on a CPU.
SCALED_AT_ONCE = 1 << 20


def _statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    tokens: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    ratios: Tensor | None,
    temperature: float,
    fields: str,
    softcap: float,
    ref_softcap: float,
    ratio: float,
    backend: str,
    logits_dtype: torch.dtype,
    chunk_size: int | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprob, entropy, ref_logprob, kl, ref_kl, saved, logits, ref_logits): the first six as
    row_statistics gives them for the heads' logits.

    logits, ref_logits: with `keep` those of the tokens that take part, which come first, [..., V
    and what fills a line]; else None.
    """
    results, kept = (
        empty_outputs(hidden, fields),
        _empty_logits(hidden, weight, ref_hidden, logits_dtype, keep),
    )
    heads = lm_head.Heads(
        (hidden, weight, bias, ref_hidden, ref_weight, ref_bias),
        logits_dtype,
        backend,
        chunk_size,
        _per_token(tokens, mask, temperatures, ratios, temperature, softcap, ref_softcap, ratio),
    )
    for value in kept:
        if value is not None:
            # The same bits at every call: nothing is left uninitialised.
            value[..., weight.shape[0] :].zero_()
            value.view(-1, value.shape[-1])[heads.policy.hidden.shape[0] :].zero_()
    heads.forward(_flat_outputs(results), results[-1].view(-1, SAVED), kept)
    return *results, *kept


def _fake_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    tokens: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    ratios: Tensor | None,
    temperature: float,
    fields: str,
    softcap: float,
    ref_softcap: float,
    ratio: float,
    backend: str,
    logits_dtype: torch.dtype,
    chunk_size: int | None,
    keep: bool,
) -> Outputs:
    return *empty_outputs(hidden, fields), *_empty_logits(
        hidden, weight, ref_hidden, logits_dtype, keep
    )


def _empty_logits(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor | None, dtype: torch.dtype, keep: bool
) -> list[Tensor | None]:
    """Return room for the logits of both models, in rows of whole lines."""
    width = lm_head.row_width(weight.shape[0])
    return [
        states.new_empty((*states.shape[:-1], width), dtype=dtype)
        if keep and states is not None
        else None
        for states in (hidden, ref_hidden)
    ]


def _gradients_that(
    *, overwrite: bool
) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Return what computes gradients. overwrite: those of logits may take the place of kept logits,
    which no op may do to its inputs.
    """

    def gradients(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
        tokens: Tensor | None,
        mask: Tensor | None,
        temperatures: Tensor | None,
        ratios: Tensor | None,
        saved: Tensor,
        logits: Tensor | None,
        ref_logits: Tensor | None,
        g_logprob: Tensor | None,
        g_entropy: Tensor | None,
        g_ref_logprob: Tensor | None,
        g_kl: Tensor | None,
        g_ref_kl: Tensor | None,
        temperature: float,
        wrt: str,
        softcap: float,
        ref_softcap: float,
        ratio: float,
        backend: str,
        logits_dtype: torch.dtype,
        chunk_size: int | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of the upstream-weighted statistics with respect to the six, in their types;
        None where not asked for.

        logits, ref_logits: as forward kept them, or None.
        """
        six = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
        heads = lm_head.Heads(
            six,
            logits_dtype,
            backend,
            chunk_size,
            _per_token(
                tokens, mask, temperatures, ratios, temperature, softcap, ref_softcap, ratio
            ),
        )
        upstream = {
            name: engine.flat(value)
            for name, value in zip(
                FIELDS, (g_logprob, g_entropy, g_ref_logprob, g_kl, g_ref_kl), strict=True
            )
            if value is not None
        }
        found = heads.backward(
            saved.reshape(-1, SAVED).contiguous(),
            upstream,
            wanted(wrt),
            (logits, ref_logits),
            overwrite,
        )
        return _in_their_types(six, found, wrt, wide=())

    return gradients


_gradients, _overwriting_gradients = (
    _gradients_that(overwrite=overwrite) for overwrite in (False, True)
)


def _fake_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    tokens: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    ratios: Tensor | None,
    saved: Tensor,
    logits: Tensor | None,
    ref_logits: Tensor | None,
    g_logprob: Tensor | None,
    g_entropy: Tensor | None,
    g_ref_logprob: Tensor | None,
    g_kl: Tensor | None,
    g_ref_kl: Tensor | None,
    temperature: float,
    wrt: str,
    softcap: float,
    ref_softcap: float,
    ratio: float,
    backend: str,
    logits_dtype: torch.dtype,
    chunk_size: int | None,
) -> Outputs:
    return _empty_gradients((hidden, weight, bias, ref_hidden, ref_weight, ref_bias), wrt, wide=())


def _weighted_kl(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    weights: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    ratios: Tensor | None,
    temperature: float,
    wrt: str,
    softcap: float,
    ref_softcap: float,
    ratio: float,
    backend: str,
    logits_dtype: torch.dtype,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(Σ weights·kl, kl, unit, gradients of the sum over `unit` with respect to the six; None where
    not asked for).

    unit is 1, or for float16 inputs a power of two below the largest weight: a gradient of 1/N per
    token would vanish in float16. Their weight and bias gradients stay in float32.
    """
    six = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    heads = lm_head.Heads(
        six,
        logits_dtype,
        backend,
        chunk_size,
        _per_token(None, mask, temperatures, ratios, temperature, softcap, ref_softcap, ratio),
    )
    weights = weights.contiguous()
    kl = torch.empty_like(weights)
    unit = weights.new_ones(())
    gradients: dict[str, Tensor] = {}
    if wrt:
        if torch.float16 in {value.dtype for value in six if value is not None}:
            size = _size(wanted(wrt), ratio if ratios is None else ratios)
            unit = float16_unit(
                torch.where(
                    weights == 0,
                    0.0,
                    weights / (temperature if temperatures is None else temperatures) * size,
                )
            )
        gradients = heads.forward_and_backward(
            {"kl": kl.view(-1)}, {"kl": engine.flat(weights / unit)}, wanted(wrt)
        )
    else:
        heads.forward({"kl": kl.view(-1)}, weights.new_empty(weights.numel(), SAVED))
    # A token without weight takes no part, whatever its KL.
    total = torch.where(weights == 0, 0.0, weights * kl).sum()
    return total, kl, unit, *_in_their_types(six, gradients, wrt, wide=(torch.float16,))


def _fake_weighted_kl(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    weights: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    ratios: Tensor | None,
    temperature: float,
    wrt: str,
    softcap: float,
    ref_softcap: float,
    ratio: float,
    backend: str,
    logits_dtype: torch.dtype,
    chunk_size: int | None,
) -> Outputs:
    six = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    return (
        weights.new_empty(()),
        weights.new_empty(weights.shape),
        weights.new_empty(()),
        *_empty_gradients(six, wrt, wide=(torch.float16,)),
    )


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient · factor (a scalar tensor) in `dtype`, rounded once: torch would round the factor to
    a 16-bit gradient's type first.
    """
    gradient = gradient.contiguous()  # a hook on saved tensors may give it back in another layout
    result = torch.empty_like(gradient, dtype=dtype)
    # On a CPU torch.mul keeps a copy in the common type: a part at a time.
    step = SCALED_AT_ONCE if gradient.device.type == "cpu" else max(1, gradient.numel())
    for part, out in zip(gradient.view(-1).split(step), result.view(-1).split(step), strict=True):
        torch.mul(part, factor.reshape(1), out=out)
    return result


def _fake_scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)


def _per_token(
    tokens: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    ratios: Tensor | None,
    temperature: float,
    softcap: float,
    ref_softcap: float,
    ratio: float,
) -> lm_head.PerToken:
    return lm_head.PerToken(
        engine.flat(tokens),
        engine.flat(mask),
        engine.flat_temperature(temperatures, temperature),
        Scaling(softcap, ref_softcap, engine.flat_temperature(ratios, ratio)),
    )


def _size(names: tuple[str, ...], ratio: Tensor | float) -> Tensor | float:
    """Return how large gradients of raw logits are, beside those of one temperature for both
    models.

    The second model's gradients have `ratio` as a factor, the first one's as much in their
    differences of log-probabilities.
    """
    if not {"hidden", "weight", "bias"} & set(names):
        return ratio
    return ratio.clamp(min=1) if isinstance(ratio, Tensor) else max(1.0, ratio)


def _flat_outputs(results: Outputs) -> dict[str, Tensor]:
    return {
        name: value.view(-1)
        for name, value in zip(FIELDS, results, strict=False)
        if value is not None
    }


def float16_unit(weights: Tensor) -> Tensor:
    """The power of two by which the largest of |weights|, of tokens over their temperatures, counts
    4 … 8; 1 if that is 0 or not finite.

    Counting 1, a flat row's gradients lose digits to float16's smallest numbers. What is left to
    its largest, 65504, is for the differences of logits that gradients are proportional to:
    thousands.
    """
    largest = weights.abs().max() if weights.numel() else weights.new_zeros(())
    return torch.where(
        (largest > 0) & largest.isfinite(), torch.exp2(torch.ceil(torch.log2(largest)) - 3), 1.0
    )


def _gradient_type(name: str, value: Tensor, wide: tuple[torch.dtype, ...]) -> torch.dtype:
    """The type that a gradient leaves the op in; sums over tokens stay float32 for the types in
    `wide`.
    """
    return torch.float32 if value.dtype in wide and not name.endswith("hidden") else value.dtype


def _in_their_types(
    six: lm_head.Six, gradients: dict[str, Tensor], wrt: str, wide: tuple[torch.dtype, ...]
) -> Outputs:
    """The gradients in the order of SIX, each wide sum freed once it is rounded; zeros where there
    was no upstream gradient.
    """
    results: list[Tensor | None] = []
    for name, value in zip(SIX, six, strict=True):
        if value is None:
            results.append(None)
        elif name in gradients:
            results.append(
                gradients.pop(name).view(value.shape).to(_gradient_type(name, value, wide))
            )
        elif name in wanted(wrt):
            results.append(
                torch.zeros(
                    value.shape, dtype=_gradient_type(name, value, wide), device=value.device
                )
            )
        else:
            results.append(None)
    return tuple(results)


def _empty_gradients(six: lm_head.Six, wrt: str, wide: tuple[torch.dtype, ...]) -> Outputs:
    return tuple(
        torch.empty(value.shape, dtype=_gradient_type(name, value, wide), device=value.device)
        if value is not None and name in wanted(wrt)
        else None
        for name, value in zip(SIX, six, strict=True)
    )


# ---- autograd


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    tensors, (ctx.temperature, fields, *ctx.settings, keep) = inputs[:10], inputs[10:]
    refuse_temperature_gradient(ctx.needs_input_grad[8] or ctx.needs_input_grad[9])
    saved, *kept = output[len(FIELDS) :]
    save_tensors(ctx, *tensors, saved, *(kept if keep else ()))
    ctx.may_overwrite, ctx.overwritten = hasattr(ctx, "eager"), False
    ctx.shared = tensors[3] is not None and tensors[4] is None
    policy = any(ctx.needs_input_grad[:3])
    mark_constant(
        ctx,
        output,
        wanted(fields),
        policy,
        any(ctx.needs_input_grad[3:6]) or (ctx.shared and ctx.needs_input_grad[1]),
    )


def _backward(ctx: Any, *upstream: Tensor | None) -> Given:
    refuse_forward_mode(upstream)
    # Log-probs of the reference say nothing about the policy, nor its own about the reference: such
    # a gradient is not computed.
    on_policy = any(upstream[i] is not None for i in (0, 1, 3, 4))
    on_reference = any(upstream[i] is not None for i in (2, 3, 4))
    depends = (
        on_policy,
        on_policy or (ctx.shared and on_reference),
        on_policy,
        on_reference,
        on_reference,
        on_reference,
    )
    names = [
        name
        for name, asked, there in zip(SIX, ctx.needs_input_grad, depends, strict=False)
        if asked and there
    ]
    if not names:
        return (None,) * len(ctx.needs_input_grad)
    *tensors, logits, ref_logits = (*ctx.saved_tensors, None, None)[:13]
    # Compute again the logits that an earlier backward through a retained graph overwrote.
    kept = (None, None) if ctx.overwritten else (logits, ref_logits)

    def overwriting(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        ctx.overwritten = True
        return _overwriting_gradients(*inputs)

    gradients = linear_gradients(
        *tensors,
        *kept,
        *upstream[:5],
        ctx.temperature,
        ",".join(names),
        *ctx.settings,
        alone=overwriting if ctx.may_overwrite else None,
    )
    return (
        *(
            gradient if name in names else None
            for name, gradient in zip(SIX, gradients, strict=True)
        ),
        *(None,) * (len(ctx.needs_input_grad) - len(SIX)),
    )


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    ctx.types = [None if value is None else value.dtype for value in inputs[:6]]
    ctx.names = wanted(inputs[11])
    refuse_temperature_gradient(ctx.needs_input_grad[8] or ctx.needs_input_grad[9])
    missing = [
        name
        for name, asked in zip(SIX, ctx.needs_input_grad, strict=False)
        if asked and name not in ctx.names
    ]
    if missing:
        raise RuntimeError(
            f"{', '.join(missing)}: expected to be known to require gradient when the value is "
            f"computed, since the gradient is "
            f"computed with it; torch.vmap hides that, and torch.export, make_fx and "
            f"torch.jit.trace keep what the example inputs "
            f"required: use reduction='none' there, or trace with inputs that require gradient"
        )
    # Only what is asked for: checkpoints count what is saved, and where an op returns an empty
    # tensor another way has None.
    kept = [
        value if name in ctx.names else None for name, value in zip(SIX, output[3:], strict=True)
    ]
    ctx.save_for_backward(output[1] if ctx.needs_input_grad[6] else None, output[2], *kept)
    ctx.mark_non_differentiable(*[value for value in output[1:] if value is not None])
    ctx.set_materialize_grads(False)


def _backward_of_sum(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> Given:
    if upstream is None:
        return (None,) * 18
    refuse_forward_mode((upstream,))
    if torch.is_grad_enabled():
        raise RuntimeError(
            "fastkl: create_graph=True and torch.func.grad ask for a gradient that can be "
            "differentiated again, but the gradient of a "
            "sum or mean was computed with its value; use reduction='none' and sum or average its "
            "result"
        )
    kl, unit, *gradients = ctx.saved_tensors
    factor = upstream * unit
    results = [
        scaled(gradient, factor, dtype) if name in ctx.names and asked else None
        for name, gradient, dtype, asked in zip(
            SIX, gradients, ctx.types, ctx.needs_input_grad, strict=False
        )
    ]
    return *results, upstream * kl if ctx.needs_input_grad[6] else None, *(None,) * 11


# ---- what a counter of floating-point operations is told, from shapes in place of tensors: as if
# every token counted


def _flops(
    six: tuple[Any, ...], wrt: str, on_policy: bool, on_reference: bool, logits: int = 1
) -> int:
    """Of the logits of the policy and, if it takes part, of the reference, and of the gradients
    named in wrt: 2·N·H·V for each product.

    logits: 0 where they are known.
    """
    hidden, weight, _, ref_hidden, ref_weight, _ = six
    policy, reference = (
        0 if states is None else 2 * math.prod(states) * weight[0]
        for states in (hidden, ref_hidden)
    )
    names = wanted(wrt)
    products = logits + on_policy * (("hidden" in names) + ("weight" in names))
    ref_products = on_reference * (
        logits
        + ("ref_hidden" in names)
        + (("weight" if ref_weight is None else "ref_weight") in names)
    )
    return policy * products + reference * ref_products


def _flops_of_statistics(*inputs: Any) -> int:
    return _flops(inputs[:6], "", False, True)


def _flops_of_gradients(*inputs: Any) -> int:
    a = SimpleNamespace(**dict(zip(inspect.signature(_gradients).parameters, inputs, strict=True)))
    on_both = a.g_kl is not None or a.g_ref_kl is not None
    return _flops(
        inputs[:6],
        a.wrt,
        on_both or a.g_logprob is not None or a.g_entropy is not None,
        on_both or a.g_ref_logprob is not None,
        logits=int(a.logits is None),
    )


def _flops_of_weighted_kl(*inputs: Any) -> int:
    return _flops(inputs[:6], inputs[11], True, True)


linear_statistics = Dispatched(
    "fastkl::linear_statistics",
    _statistics,
    _fake_statistics,
    setup_context=_save_for_backward,
    backward=_backward,
    flops=_flops_of_statistics,
)
linear_gradients = Dispatched(
    "fastkl::linear_gradients",
    _gradients,
    _fake_gradients,
    backward=refuse_second_derivative,
    flops=_flops_of_gradients,
)
linear_weighted_kl = Dispatched(
    "fastkl::linear_weighted_kl",
    _weighted_kl,
    _fake_weighted_kl,
    setup_context=_save_gradients,
    backward=_backward_of_sum,
    flops=_flops_of_weighted_kl,
)
scaled = Dispatched("fastkl::scaled", _scaled, _fake_scaled, backward=refuse_second_derivative)
