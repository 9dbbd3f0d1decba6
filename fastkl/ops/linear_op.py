"""The two ops under every function on hidden states: statistics and their gradients, with fake and
autograd rules; linear_sum_op.py defines the third.
"""

import itertools
import math
from collections.abc import Callable, Collection
from typing import Any, Final, NamedTuple

import torch

from .chunks import padded_rows
from .dual_op import DualOp, Rules, save_tensors
from .engine import ENGINES
from .fields import FIELDS, POLICY_FIELDS, REFERENCE_FIELDS, SAVED, Scaling, flat, row_args
from .lm_head import ChunkedHeads
from .row_op import (
    Outputs,
    RowUpstream,
    Upstream,
    empty_outputs,
    mark_constant,
    refuse_forward_mode,
    refuse_second_derivative,
    refuse_temperature_gradient,
    wanted,
)


class LinearInputs(NamedTuple):
    """Arguments of every op on hidden states: the six tensors of both heads (with ref_hidden,
    ref_weight None means weight), tensors with one entry per token [...], the scaling of the raw
    logits as in fields.Scaling, and options.

    temperatures, ratios: unless None, replace temperature and ratio. given_logits: [..., V] in
    place of the second model; with given_first they are P's, and the lm_head's are Q's.
    logits_dtype: dtype of a GEMM's logits. chunk_size: tokens per chunk, None for the default.
    divergence, share: as in fields.Divergence. group to ranks: the fields of parallel.Cut; weights
    and given logits are a shard.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    ref_hidden: torch.Tensor | None
    ref_weight: torch.Tensor | None
    ref_bias: torch.Tensor | None
    mask: torch.Tensor | None
    temperatures: torch.Tensor | None
    ratios: torch.Tensor | None
    given_logits: torch.Tensor | None
    temperature: float
    softcap: float
    ref_softcap: float
    ratio: float
    backend: str
    logits_dtype: torch.dtype
    chunk_size: int | None
    divergence: str = "kl"
    share: float = 0.0
    given_first: bool = False
    group: str = ""
    start: int = 0
    vocabulary: int = 0
    width: int = 0
    ranks: int = 0

    def heads(self, tokens: torch.Tensor | None) -> ChunkedHeads:
        """Return the heads for token ids [...] (None without log-probs)."""
        args = row_args(
            self.hidden,
            None,
            tokens,
            self.mask,
            self.temperatures,
            self.temperature,
            (self.divergence, self.share, *self[-5:]),
        )
        ratio = self.ratio if self.ratios is None else flat(self.ratios)
        return ChunkedHeads(
            self[:6],
            args._replace(scaling=Scaling(self.softcap, self.ref_softcap, ratio)),
            ENGINES[self.backend],
            self.logits_dtype,
            self.chunk_size,
            self.given_logits,
            self.given_first,
        )

    def models(self) -> "list[LinearInputs]":
        """Return the arguments of each model alone."""
        first = self._replace(ref_hidden=None, ref_weight=None, ref_bias=None)
        if self.ref_hidden is None:
            return [first]
        second = first._replace(
            hidden=self.ref_hidden,
            weight=self.weight if self.ref_weight is None else self.ref_weight,
            bias=self.ref_bias,
            softcap=self.ref_softcap,
            temperature=self.temperature / self.ratio,
        )
        if self.temperatures is not None or self.ratios is not None:
            temperature = self.temperature if self.temperatures is None else self.temperatures
            ratio = self.ratio if self.ratios is None else self.ratios
            second = second._replace(temperatures=torch.as_tensor(temperature / ratio))
        return [first, second]


SIX = LinearInputs._fields[:6]
# The number of tensors.
TENSORS: Final = 10


class StatisticsInputs(NamedTuple):
    """Further arguments of linear_statistics: token ids [...], the requested fields in one string,
    separated by commas, and whether to return all logits, which saves backward a GEMM.
    """

    tokens: torch.Tensor | None
    fields: str
    keep: bool


class GradientInputs(NamedTuple):
    """Further arguments of linear_gradients, in addition to RowUpstream: token ids, logits (or
    None) from linear_statistics, and the names of the tensors to differentiate by, separated by
    commas.
    """

    tokens: torch.Tensor | None
    logits: torch.Tensor | None
    ref_logits: torch.Tensor | None
    wrt: str


def _statistics(inputs: LinearInputs, request: StatisticsInputs) -> Outputs:
    """Compute (*FIELDS, saved, logits, ref_logits): all but the last two as row_statistics does for
    the heads' logits.

    logits, ref_logits: with `keep` those of the tokens computed, which come first, [..., V padded
    to a cache line]; otherwise None.
    """
    leading, kept = inputs.hidden.shape[:-1], kept_logits(inputs, request.keep)
    found = inputs.heads(request.tokens).forward(wanted(request.fields), kept)
    fields = [found[name].view(leading) if name in found else None for name in FIELDS]
    return *fields, found["saved"].view(*leading, SAVED), *kept


def kept_logits(inputs: LinearInputs, keep: bool) -> list[torch.Tensor | None]:
    """Return padded_rows for all logits of each model; None without `keep`."""
    return [
        padded_rows(states.shape[:-1], len(inputs.weight), states, inputs.logits_dtype)
        if keep and states is not None
        else None
        for states in (inputs.hidden, inputs.ref_hidden)
    ]


def _gradients(
    inputs: LinearInputs, request: GradientInputs, given: RowUpstream, overwrite: bool = False
) -> Outputs:
    """Compute the gradients of the upstream-weighted statistics with respect to the six tensors, in
    their types; None if not requested.

    overwrite: gradients may overwrite kept logits, which a custom op (no mutation) must not.
    """
    upstream = {name: flat(value) for name, value in given.by_field.items()}
    saved = given.saved.reshape(-1, SAVED).contiguous()
    kept, wrt = (request.logits, request.ref_logits), wanted(request.wrt)
    # Keep no reference to the heads: they hold the sums, which in_their_types frees.
    found = inputs.heads(request.tokens).backward(saved, upstream, wrt, kept, overwrite)
    return in_their_types(inputs, found, wrt)


def in_their_types(
    inputs: LinearInputs,
    gradients: dict[str, torch.Tensor],
    wrt: tuple[str, ...],
    wide: torch.dtype | None = None,
) -> Outputs:
    """Return the gradients in the order of the six tensors, each float32 sum freed once it is
    rounded; zeros without an upstream gradient.

    wide: dtype of the tensors whose sums over tokens stay in float32.
    """
    return tuple(
        [
            None
            if value is None or name not in wrt
            else gradients.pop(name).view(value.shape).to(_gradient_type(name, value, wide))
            if name in gradients
            else value.new_zeros(value.shape, dtype=_gradient_type(name, value, wide))
            for name, value in zip(SIX, inputs[:6], strict=True)
        ]
    )


def empty_gradients(inputs: LinearInputs, wrt: str, wide: torch.dtype | None = None) -> Outputs:
    """Return uninitialised tensors for the results of in_their_types."""
    return tuple(
        value.new_empty(value.shape, dtype=_gradient_type(name, value, wide))
        if value is not None and name in wanted(wrt)
        else None
        for name, value in zip(SIX, inputs[:6], strict=True)
    )


def _gradient_type(name: str, value: torch.Tensor, wide: torch.dtype | None) -> torch.dtype:
    wider = value.dtype == wide and not name.endswith("hidden")
    return torch.float32 if wider else value.dtype


# ---- autograd


def returned(gradients: dict[str, torch.Tensor | None], *requests: Any) -> Upstream:
    """Return gradients in the order of an op's arguments, the fields of LinearInputs and of the
    NamedTuples `requests`; None for arguments without one.
    """
    groups = (LinearInputs, *requests)
    return tuple([gradients.get(name) for group in groups for name in group._fields])


def overwriting(ctx: Any, gradients: Callable[..., Outputs]) -> Callable[..., Outputs] | None:
    """Wrap a function of gradients to overwrite kept logits and record it in ctx; None if it must
    not overwrite.
    """

    def run(*groups: Any) -> Outputs:
        ctx.overwritten = True
        return gradients(*groups, overwrite=True)

    return run if ctx.may_overwrite else None


def _moved_by(name: str, inputs: LinearInputs) -> tuple[str, ...]:
    """Return the fields that depend on a tensor."""
    if name == "weight" and inputs.ref_hidden is not None and inputs.ref_weight is None:
        return FIELDS
    return REFERENCE_FIELDS if name.startswith("ref_") else POLICY_FIELDS


def _save_for_backward(
    ctx: Any, groups: tuple[LinearInputs, StatisticsInputs], output: Outputs
) -> None:
    inputs, request = groups
    refuse_temperature_gradient(any(ctx.needs_input_grad[7:9]))
    saved, *kept = output[len(FIELDS) :]
    kept = kept if request.keep else [None, None]  # the op's tensors would be empty
    save_tensors(ctx, *inputs[:TENSORS], request.tokens, saved, *kept)
    ctx.settings = inputs[TENSORS:]
    ctx.may_overwrite, ctx.overwritten = hasattr(ctx, "eager"), False
    moved = {
        field
        for name in itertools.compress(SIX, ctx.needs_input_grad)
        for field in _moved_by(name, inputs)
    }
    mark_constant(ctx, output, request.fields, "logprob" in moved, "ref_logprob" in moved)


def _backward(ctx: Any, *upstream: torch.Tensor | None) -> Upstream:
    refuse_forward_mode(upstream)
    *tensors, tokens, saved, logits, ref_logits = ctx.saved_tensors
    inputs, g_fields = LinearInputs(*tensors, *ctx.settings), upstream[: len(FIELDS)]
    fields = {name for name, value in zip(FIELDS, g_fields, strict=True) if value is not None}
    # Skip zero gradients: the reference's log-probs do not depend on the policy.
    names = [
        name
        for name in itertools.compress(SIX, ctx.needs_input_grad)
        if fields.intersection(_moved_by(name, inputs))
    ]
    if not names:
        return returned({}, StatisticsInputs)
    if ctx.overwritten:
        # Recompute the logits that an earlier backward through a retained graph overwrote.
        logits = ref_logits = None
    gradients = linear_gradients(
        inputs,
        GradientInputs(tokens, logits, ref_logits, ",".join(names)),
        RowUpstream._make([saved, *g_fields, False, False]),
        unobserved=overwriting(ctx, _gradients),
    )
    return returned(
        {name: value for name, value in zip(SIX, gradients, strict=True) if name in names},
        StatisticsInputs,
    )


# ---- FLOP counts: arguments hold shapes in place of tensors; masked tokens are counted


def flops(
    inputs: LinearInputs, wrt: str = "", fields: Collection[str] = FIELDS, logits: int = 1
) -> int:
    """Count 2·N·H·V for each GEMM: the logits of the policy and, if there is one, of the reference,
    and the gradients named in wrt, for upstream gradients of `fields`.

    logits: 0 if they were kept.
    """
    shapes: Any = inputs
    policy, reference = (
        0 if states is None else 2 * math.prod(states) * shapes.weight[0]
        for states in (shapes.hidden, shapes.ref_hidden)
    )
    names, on_policy = wanted(wrt), not set(POLICY_FIELDS).isdisjoint(fields)
    products = logits + on_policy * (("hidden" in names) + ("weight" in names))
    ref_weight = "weight" if inputs.ref_weight is None else "ref_weight"
    ref_products = logits + ("ref_hidden" in names) + (ref_weight in names)
    ref_products *= not set(REFERENCE_FIELDS).isdisjoint(fields)
    return int(policy * products + reference * ref_products)


linear_statistics = DualOp(
    "linear_statistics",
    (LinearInputs, StatisticsInputs),
    _statistics,
    lambda inputs, request: (
        *empty_outputs(inputs.hidden, request.fields),
        *kept_logits(inputs, request.keep),
    ),
    outputs=len(FIELDS) + 3,
    rules=Rules(_backward, setup_context=_save_for_backward, flops=lambda inputs, _: flops(inputs)),
)
linear_gradients = DualOp(
    "linear_gradients",
    (LinearInputs, GradientInputs, RowUpstream),
    _gradients,
    lambda inputs, request, _: empty_gradients(inputs, request.wrt),
    outputs=len(SIX),
    rules=Rules(
        refuse_second_derivative,
        flops=lambda inputs, request, given: flops(
            inputs, request.wrt, given.by_field, int(request.logits is None)
        ),
    ),
)
