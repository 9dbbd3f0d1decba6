"""The two ops under every function on hidden states: statistics and their gradients, with fake and
autograd rules; linear_sum_op.py defines the third.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .chunks import row_width
from .dual_op import DualOp, Rules, save_tensors
from .engine import ENGINES
from .fields import FIELDS, POLICY_FIELDS, REFERENCE_FIELDS, SAVED, Scaling, flat, row_args
from .lm_head import ChunkedHeads, Six
from .row_op import (
    Outputs,
    Upstream,
    empty_outputs,
    mark_constant,
    refuse_forward_mode,
    refuse_second_derivative,
    refuse_temperature_gradient,
    wanted,
)

SIX = Six._fields


class LinearInputs(NamedTuple):
    """Arguments of every op on hidden states: the tensors of both heads as in Six, tensors with one
    entry per token [...], the scaling of the raw logits as in fields.Scaling, and options.

    temperatures, ratios: unless None, replace temperature and ratio. logits_dtype: the type that a
    GEMM rounds logits to. chunk_size: tokens of a chunk, None for a default.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_bias: Tensor | None
    mask: Tensor | None
    temperatures: Tensor | None
    ratios: Tensor | None
    temperature: float
    softcap: float
    ref_softcap: float
    ratio: float
    backend: str
    logits_dtype: torch.dtype
    chunk_size: int | None

    @property
    def six(self) -> Six:
        """The tensors of both heads."""
        return Six(*self[:6])

    def heads(self, six: Six, tokens: Tensor | None) -> ChunkedHeads:
        """Return the heads for token ids [...] (None without log-probs)."""
        args = row_args(self.hidden, None, tokens, self.mask, self.temperatures, self.temperature)
        ratio = self.ratio if self.ratios is None else flat(self.ratios)
        args = args._replace(scaling=Scaling(self.softcap, self.ref_softcap, ratio))
        engine = ENGINES[self.backend]
        return ChunkedHeads(six, args, engine, self.logits_dtype, self.chunk_size)


class StatisticsInputs(NamedTuple):
    """Further arguments of linear_statistics: token ids [...], the requested fields in one string,
    separated by commas, and whether to return all logits, which spares backward a GEMM.
    """

    tokens: Tensor | None
    fields: str
    keep: bool


class GradientInputs(NamedTuple):
    """Further arguments of linear_gradients: token ids, saved values and logits (or None) from
    linear_statistics, upstream gradients [...], and the names of Six to differentiate by, separated
    by commas.
    """

    tokens: Tensor | None
    saved: Tensor
    logits: Tensor | None
    ref_logits: Tensor | None
    g_logprob: Tensor | None
    g_entropy: Tensor | None
    g_ref_logprob: Tensor | None
    g_kl: Tensor | None
    g_ref_kl: Tensor | None
    wrt: str

    @property
    def upstream(self) -> dict[str, Tensor]:
        """The upstream gradients by field, without None."""
        by_field = zip(FIELDS, self[4:9], strict=True)
        return {name: value for name, value in by_field if value is not None}


def _statistics(inputs: LinearInputs, request: StatisticsInputs) -> Outputs:
    """Compute (logprob, entropy, ref_logprob, kl, ref_kl, saved, logits, ref_logits): the first six
    as row_statistics does for the heads' logits.

    logits, ref_logits: with `keep` those of the tokens computed, which come first, [..., V padded
    to a cache line]; else None.
    """
    results = _fake_statistics(inputs, request)
    kept, saved, vocabulary = results[-2:], results[-3], inputs.weight.shape[0]
    heads = inputs.heads(inputs.six, request.tokens)
    for value in kept:
        if value is not None:
            # Zero the entries that no GEMM writes, so that equal calls return equal bits.
            value[..., vocabulary:].zero_()
            value.view(-1, value.shape[-1])[len(heads.policy.hidden) :].zero_()
    outputs = {
        name: value.view(-1)
        for name, value in zip(FIELDS, results, strict=False)
        if value is not None
    }
    heads.forward(outputs, saved.view(-1, SAVED), kept)
    return results


def _fake_statistics(inputs: LinearInputs, request: StatisticsInputs) -> Outputs:
    hidden, width = inputs.hidden, row_width(inputs.weight.shape[0])
    kept: list[Tensor | None] = [None, None]
    if request.keep:
        for i, states in enumerate((hidden, inputs.ref_hidden)):
            if states is not None:
                shape = (*states.shape[:-1], width)
                kept[i] = states.new_empty(shape, dtype=inputs.logits_dtype)
    return *empty_outputs(hidden, request.fields), *kept


def _gradients(inputs: LinearInputs, request: GradientInputs, overwrite: bool = False) -> Outputs:
    """Compute the gradients of the upstream-weighted statistics with respect to Six, in their
    types; None if not requested.

    overwrite: gradients may overwrite kept logits, which a custom op (no mutation) must not.
    """
    upstream = {name: flat(value) for name, value in request.upstream.items()}
    saved = request.saved.reshape(-1, SAVED).contiguous()
    kept = request.logits, request.ref_logits
    six, wrt = inputs.six, wanted(request.wrt)
    heads = inputs.heads(six, request.tokens)
    return in_their_types(six, heads.backward(saved, upstream, wrt, kept, overwrite), wrt, wide=())


def _fake_gradients(inputs: LinearInputs, request: GradientInputs) -> Outputs:
    return empty_gradients(inputs.six, request.wrt, wide=())


def _gradient_type(name: str, value: Tensor, wide: tuple[torch.dtype, ...]) -> torch.dtype:
    """Return the type in which an op returns a gradient: its tensor's, or float32 for a sum over
    tokens if that type is in `wide`.
    """
    return torch.float32 if value.dtype in wide and not name.endswith("hidden") else value.dtype


def in_their_types(
    six: Six, gradients: dict[str, Tensor], wrt: tuple[str, ...], wide: tuple[torch.dtype, ...]
) -> Outputs:
    """Return the gradients in the order of Six, each float32 sum freed once it is rounded; zeros
    without an upstream gradient.
    """
    results: list[Tensor | None] = []
    for name, value in zip(SIX, six, strict=True):
        if value is None or name not in wrt:
            results.append(None)
            continue
        dtype = _gradient_type(name, value, wide)
        if name in gradients:
            results.append(gradients.pop(name).view(value.shape).to(dtype))
        else:
            results.append(torch.zeros(value.shape, dtype=dtype, device=value.device))
    return tuple(results)


def empty_gradients(six: Six, wrt: str, wide: tuple[torch.dtype, ...]) -> Outputs:
    """Return uninitialised tensors for the results of in_their_types."""
    return tuple(
        torch.empty(value.shape, dtype=_gradient_type(name, value, wide), device=value.device)
        if value is not None and name in wanted(wrt)
        else None
        for name, value in zip(SIX, six, strict=True)
    )


# ---- autograd


def returned(gradients: dict[str, Tensor | None], request: type[tuple[Any, ...]]) -> Upstream:
    """Return gradients in the order of an op's arguments, None for arguments without one."""
    names = (*LinearInputs._fields, *request._fields)  # type: ignore[attr-defined]
    return tuple([gradients.get(name) for name in names])


def requested_names(ctx: Any) -> list[str]:
    """Return the names of Six that need a gradient."""
    return [name for name, needed in zip(SIX, ctx.needs_input_grad, strict=False) if needed]


def _save_for_backward(
    ctx: Any, groups: tuple[LinearInputs, StatisticsInputs], output: Outputs
) -> None:
    inputs, request = groups
    names = requested_names(ctx)
    refuse_temperature_gradient(any(ctx.needs_input_grad[7:9]))
    saved, *kept = output[len(FIELDS) :]
    save_tensors(ctx, *inputs[:9], request.tokens, saved, *(kept if request.keep else ()))
    ctx.settings = inputs[9:]
    ctx.may_overwrite, ctx.overwritten = hasattr(ctx, "eager"), False
    ctx.shared = inputs.ref_hidden is not None and inputs.ref_weight is None
    policy = any(name in names for name in SIX[:3])
    reference = any(name in names for name in SIX[3:]) or (ctx.shared and "weight" in names)
    mark_constant(ctx, output, request.fields, policy, reference)


def _backward(ctx: Any, *upstream: Tensor | None) -> Upstream:
    refuse_forward_mode(upstream)
    g_fields: Any = upstream[: len(FIELDS)]
    fields = {name for name, value in zip(FIELDS, g_fields, strict=True) if value is not None}
    # Skip zero gradients: log-probs of the reference do not depend on the policy.
    policy, reference = (
        not fields.isdisjoint(names) for names in (POLICY_FIELDS, REFERENCE_FIELDS)
    )
    names = []
    for name in requested_names(ctx):
        depends = reference if name.startswith("ref_") else policy
        if depends or (name == "weight" and ctx.shared and reference):
            names.append(name)
    if not names:
        return returned({}, StatisticsInputs)
    *nine, tokens, saved, logits, ref_logits = (*ctx.saved_tensors, None, None)[:13]
    if ctx.overwritten:
        # Recompute the logits that an earlier backward through a retained graph overwrote.
        logits = ref_logits = None

    def overwriting(inputs: LinearInputs, request: GradientInputs) -> Outputs:
        ctx.overwritten = True
        return _gradients(inputs, request, overwrite=True)

    gradients = linear_gradients(
        LinearInputs(*nine, *ctx.settings),
        GradientInputs._make([tokens, saved, logits, ref_logits, *g_fields, ",".join(names)]),
        unobserved=overwriting if ctx.may_overwrite else None,
    )
    found = {name: value for name, value in zip(SIX, gradients, strict=True) if name in names}
    return returned(found, StatisticsInputs)


# ---- FLOP counts: arguments hold shapes in place of tensors; masked tokens are counted


def flops(
    inputs: LinearInputs, wrt: str, on_policy: bool, on_reference: bool, logits: int = 1
) -> int:
    """Count 2·N·H·V for each GEMM: the logits of the policy and, if there is one, of the reference,
    and the gradients named in wrt.

    logits: 0 if they were kept.
    """
    shapes: Any = inputs
    policy, reference = (
        0 if states is None else 2 * math.prod(states) * shapes.weight[0]
        for states in (shapes.hidden, shapes.ref_hidden)
    )
    names = wanted(wrt)
    products = logits + on_policy * (("hidden" in names) + ("weight" in names))
    ref_weight = "weight" if inputs.ref_weight is None else "ref_weight"
    ref_products = logits + ("ref_hidden" in names) + (ref_weight in names)
    return int(policy * products + reference * on_reference * ref_products)


def _flops_of_statistics(inputs: LinearInputs, request: StatisticsInputs) -> int:
    return flops(inputs, "", False, True)


def _flops_of_gradients(inputs: LinearInputs, request: GradientInputs) -> int:
    requested = request.upstream.keys()
    on_policy, on_reference = (
        not requested.isdisjoint(fields) for fields in (POLICY_FIELDS, REFERENCE_FIELDS)
    )
    return flops(inputs, request.wrt, on_policy, on_reference, int(request.logits is None))


linear_statistics = DualOp(
    "fastkl::linear_statistics",
    (LinearInputs, StatisticsInputs),
    _statistics,
    _fake_statistics,
    outputs=len(FIELDS) + 3,
    rules=Rules(_backward, setup_context=_save_for_backward, flops=_flops_of_statistics),
)
linear_gradients = DualOp(
    "fastkl::linear_gradients",
    (LinearInputs, GradientInputs),
    _gradients,
    _fake_gradients,
    outputs=len(SIX),
    rules=Rules(refuse_second_derivative, flops=_flops_of_gradients),
)
