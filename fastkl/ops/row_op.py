"""The two ops under every function on logits: row statistics and their gradients, with fake,
autograd and vmap rules.

A field that was not requested is None, or the op's empty tensor: one schema serves every
combination of fields.
"""

import functools
from typing import Any, NamedTuple, NoReturn

import torch
from torch.autograd import forward_ad

from .. import _checks
from .dual_op import DualOp, Rules, save_tensors
from .engine import ENGINES
from .fields import FIELDS, POLICY_FIELDS, REFERENCE_FIELDS, SAVED, flat, result_dtype, row_args

# The outputs of an op; schemas have no optional outputs, see DualOp.
Outputs = tuple[Any, ...]
Upstream = tuple[torch.Tensor | None, ...]


class RowInputs(NamedTuple):
    """Arguments of row_statistics: logits [..., V], vectors [...], and the requested fields in one
    string, separated by commas.

    temperatures, unless None, replace temperature. divergence, share: as in fields.Divergence.
    group to ranks: the fields of parallel.Cut.
    """

    p: torch.Tensor
    q: torch.Tensor | None
    tokens: torch.Tensor | None
    mask: torch.Tensor | None
    temperatures: torch.Tensor | None
    temperature: float
    fields: str
    backend: str
    divergence: str = "kl"
    share: float = 0.0
    group: str = ""
    start: int = 0
    vocabulary: int = 0
    width: int = 0
    ranks: int = 0


# The gradients of RowInputs' fields after p and q.
_NO_GRADIENTS = (None,) * (len(RowInputs._fields) - 2)


class RowUpstream(NamedTuple):
    """Further arguments of row_gradients and of linear_gradients: the values that forward saved,
    and the upstream gradient of each of FIELDS. wrt_p, wrt_q: the gradients requested of
    row_gradients; linear_gradients has `wrt`.
    """

    saved: torch.Tensor
    g_logprob: torch.Tensor | None = None
    g_entropy: torch.Tensor | None = None
    g_ref_logprob: torch.Tensor | None = None
    g_kl: torch.Tensor | None = None
    g_ref_kl: torch.Tensor | None = None
    g_lse: torch.Tensor | None = None
    g_ref_lse: torch.Tensor | None = None
    wrt_p: bool = False
    wrt_q: bool = False

    @property
    def by_field(self) -> dict[str, torch.Tensor]:
        """The upstream gradients by field, without None."""
        return {k: g for k, g in zip(FIELDS, self[1:8], strict=True) if g is not None}


def per_token(temperature: float | torch.Tensor) -> tuple[torch.Tensor | None, float]:
    """Return (temperatures, temperature) of RowInputs for a number or a tensor [...]."""
    return (
        (temperature, 1.0) if isinstance(temperature, torch.Tensor) else (None, float(temperature))
    )


@functools.lru_cache
def wanted(names: str) -> tuple[str, ...]:
    """Return the names in a comma-separated string."""
    return tuple(names.split(",")) if names else ()


@functools.lru_cache
def positions(fields: str) -> tuple[int, ...]:
    """Return the positions in FIELDS of the names in a comma-separated string."""
    return tuple([FIELDS.index(name) for name in wanted(fields)])


def empty_outputs(p: torch.Tensor, fields: str) -> Outputs:
    """Return an uninitialised tensor for each field and the saved values of logits or hidden states
    p; None for a field that was not requested.
    """
    dtype, device, leading = result_dtype(p), p.device, p.shape[:-1]
    saved = torch.empty((*leading, SAVED), dtype=dtype, device=device)
    outputs: list[torch.Tensor | None] = [None] * len(FIELDS)
    if fields:
        first, *others = positions(fields)
        outputs[first] = like = torch.empty(leading, dtype=dtype, device=device)
        for at in others:  # empty_like takes half the time of empty with a shape
            outputs[at] = torch.empty_like(like)
    return *outputs, saved


def _statistics(inputs: RowInputs) -> Outputs:
    """Compute (*FIELDS, saved): requested fields [...], and values [..., SAVED] for backward."""
    results = empty_outputs(inputs.p, inputs.fields)
    saved = results[-1]
    # Without rows a rank gathers too: other ranks may have some, and would wait.
    if saved.numel() or inputs.group:
        outputs = {FIELDS[at]: results[at] for at in positions(inputs.fields)}
        if inputs.p.dim() != 2:
            outputs = {name: value.view(-1) for name, value in outputs.items()}
            saved = saved.view(-1, SAVED)
        ENGINES[inputs.backend].forward(row_args(*inputs[:6], inputs[8:]), outputs, saved)
    return results


def _gradients(inputs: RowInputs, given: RowUpstream) -> Outputs:
    """Compute (dP, dQ), gradients of the upstream-weighted statistics, contiguous, in the logits'
    types; None if not requested.
    """
    grads = _fake_gradients(inputs, given)
    p = inputs.p
    if p.numel():
        named, rows = zip(FIELDS, given[1:8], strict=True), grads
        upstream = {name: flat(value) for name, value in named if value is not None}
        if p.dim() != 2:
            rows = tuple([None if grad is None else grad.view(-1, p.shape[-1]) for grad in grads])
        args, saved = row_args(*inputs[:6], inputs[8:]), given.saved
        if saved.dim() != 2 or not saved.is_contiguous():
            saved = saved.reshape(-1, SAVED).contiguous()
        ENGINES[inputs.backend].backward(args, saved, upstream, *rows)
    return grads


def _fake_gradients(inputs: RowInputs, given: RowUpstream) -> Outputs:
    p, q, layout = inputs.p, inputs.q, torch.contiguous_format
    return (
        torch.empty_like(p, memory_format=layout) if given.wrt_p else None,
        torch.empty_like(q, memory_format=layout) if given.wrt_q and q is not None else None,
    )


def _save_for_backward(ctx: Any, groups: tuple[RowInputs], output: Outputs) -> None:
    (inputs,) = groups
    refuse_temperature_gradient(ctx.needs_input_grad[4])
    save_tensors(ctx, *inputs[:5], output[-1])
    ctx.options = inputs[5:]
    mark_constant(ctx, output, inputs.fields, *ctx.needs_input_grad[:2])


def mark_constant(ctx: Any, output: Outputs, fields: str, policy: bool, reference: bool) -> None:
    """Mark a field non-differentiable if it was not requested, or if it depends on no model that
    needs a gradient.

    policy, reference: whether the model needs a gradient.
    """
    constant = [output[at] for at in _constant(len(output), fields, policy, reference)]
    ctx.mark_non_differentiable(*[value for value in constant if value is not None])
    ctx.set_materialize_grads(False)


@functools.lru_cache
def _constant(outputs: int, fields: str, policy: bool, reference: bool) -> tuple[int, ...]:
    """Return the positions of outputs without gradient: outputs after the fields, fields not
    requested, and fields that depend on no model that needs a gradient.
    """
    moved = {*(POLICY_FIELDS if policy else ()), *(REFERENCE_FIELDS if reference else ())}
    moving = {at for at in positions(fields) if FIELDS[at] in moved}
    return tuple([at for at in range(outputs) if at not in moving])


def _backward(ctx: Any, *upstream: torch.Tensor | None) -> Upstream:
    refuse_forward_mode(upstream)
    wrt_p, wrt_q, *_ = ctx.needs_input_grad
    # Skip zero gradients: log-probs of Q do not depend on P.
    g_fields: Any = upstream[: len(FIELDS)]
    logprob, entropy, ref_logprob, kl, ref_kl, lse, ref_lse = g_fields
    both = kl is not None or ref_kl is not None
    policy = logprob is not None or entropy is not None or lse is not None
    wrt_p = wrt_p and (both or policy)
    wrt_q = wrt_q and (both or ref_logprob is not None or ref_lse is not None)
    if not (wrt_p or wrt_q):
        return None, None, *_NO_GRADIENTS
    *tensors, saved = ctx.saved_tensors
    grad_p, grad_q = row_gradients(
        RowInputs(*tensors, *ctx.options),
        RowUpstream._make([saved, *g_fields, wrt_p, wrt_q]),
    )
    return grad_p if wrt_p else None, grad_q if wrt_q else None, *_NO_GRADIENTS


def refuse_temperature_gradient(requested: bool) -> None:
    """Refuse a temperature that requires a gradient, which _checks.temperature cannot see under
    vmap.
    """
    if requested:
        raise RuntimeError(_checks.temperature_gradient("temperature"))


def refuse_forward_mode(upstream: Upstream) -> None:
    """Refuse a tangent of an upstream gradient, which kernels would drop."""
    if forward_ad._current_level >= 0:
        for value in (value for value in upstream if value is not None):
            _checks.not_forward_mode("upstream gradient", value)


def refuse_second_derivative(ctx: Any, *upstream: torch.Tensor | None) -> NoReturn:
    """Refuse, as the autograd rule of an op that computes gradients."""
    raise RuntimeError(
        "fastkl: second derivatives are not implemented: the gradient of a KL divergence was "
        "itself differentiated (create_graph=True or a double backward); use "
        "fastkl.reference.row_statistics with float64 logits and autograd for that"
    )


row_statistics = DualOp(
    "row_statistics",
    (RowInputs,),
    _statistics,
    lambda inputs: empty_outputs(inputs.p, inputs.fields),
    outputs=len(FIELDS) + 1,
    rules=Rules(_backward, setup_context=_save_for_backward, rowwise=True),
    returned=len(FIELDS),
)
row_gradients = DualOp(
    "row_gradients",
    (RowInputs, RowUpstream),
    _gradients,
    _fake_gradients,
    outputs=2,
    rules=Rules(refuse_second_derivative, rowwise=True),
)
