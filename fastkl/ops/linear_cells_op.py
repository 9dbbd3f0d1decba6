"""topk_op.cells from hidden states, a chunk of tokens at a time: K listed logits and the
log-sum-exp of all others, or the divergence from a teacher's list, and their gradients.
"""

import itertools
import math
from typing import Any, NamedTuple, cast

from torch import Tensor

from .dual_op import DualOp, Rules, save_tensors
from .fields import Outside, flat, rows_of
from .linear_op import (
    SIX,
    TENSORS,
    LinearInputs,
    empty_gradients,
    flops,
    in_their_types,
    kept_logits,
    overwriting,
    returned,
)
from .listed_rows import SMALL_PART, Listed
from .lm_head import ChunkedHeads
from .row_op import (
    Outputs,
    Upstream,
    refuse_forward_mode,
    refuse_second_derivative,
    refuse_temperature_gradient,
    wanted,
)
from .topk_op import (
    CellUpstream,
    absent_entries,
    empty_cells,
    fill_cell_gradients,
    fill_cells,
    fill_listed,
    listed_gradient,
    matrix,
)
from .topk_rows import ListDivergence


class ListInputs(NamedTuple):
    """Further arguments of linear_cells, in addition to a ListDivergence, whose log-probs
    exclude by_rows: ids [..., K] as in topk_op.CellInputs, whether to return all logits, which
    saves backward a GEMM, and whether the log-sum-exp of the others is needed.
    """

    ids: Tensor
    keep: bool
    rest: bool

    def by_rows(self, vocabulary: int) -> bool:
        """Return whether rows of the weight are read instead of computing all logits, from shapes
        alone.
        """
        return not self.rest and self.ids.shape[-1] * SMALL_PART <= vocabulary


class ListGradientInputs(NamedTuple):
    """Further arguments of linear_cell_gradients, in addition to a ListDivergence and a
    CellUpstream: ids, logits of linear_cells (None if not kept), and names as in
    linear_op.GradientInputs.
    """

    ids: Tensor
    logits: Tensor | None
    wrt: str
    by_rows: bool


def _cells(inputs: LinearInputs, request: ListInputs, divergence: ListDivergence) -> Outputs:
    """Compute the results of topk_op.cells for the lm_head's logits, and with `keep` the logits
    too, as returned by linear_statistics.
    """
    heads, keep = inputs.heads(None), _kept(inputs, request)
    ids, logprobs = heads.taken(matrix(request.ids)), heads.taken(matrix(divergence.logprobs))
    values, *outside, entries = empty_cells(inputs.hidden, ids, divergence)
    others = Outside._make(outside)

    def fill(rows: slice, args: Any, *_: Any) -> None:
        fill_cells(
            heads.engine,
            args,
            ids[rows],
            divergence._replace(logprobs=rows_of(logprobs, rows)),
            values[rows],
            others.at(rows),
            entries[rows],
        )

    if request.by_rows(len(inputs.weight)):
        for value in others:
            value.zero_()
        others.peak.fill_(-math.inf)
        absent, x = absent_entries(ids, len(inputs.weight)), _listed(heads, ids).logits()
        fill_listed(heads.engine, heads.args, absent, x, values, others)
    else:
        heads.each_chunk(fill, keep)
    found = heads.of_all({"values": values, **others._asdict(), "entries": entries})
    leading = inputs.hidden.shape[:-1]
    return *[value.view((*leading, *value.shape[1:])) for value in found.values()], *keep


def _gradients(
    inputs: LinearInputs,
    request: ListGradientInputs,
    divergence: ListDivergence,
    given: CellUpstream,
    overwrite: bool = False,
) -> Outputs:
    """Compute the gradients with respect to the six tensors; overwrite: as in linear_gradients."""
    heads, wrt = inputs.heads(None), wanted(request.wrt)
    heads.reuse([request.logits], overwrite)
    ids, logprobs = heads.taken(matrix(request.ids)), heads.taken(matrix(divergence.logprobs))
    per_row = flat(given.log_sum), flat(given.peak), matrix(given.saved)
    others = Outside._make([heads.taken(value) for value in per_row])
    entries = given.entries.reshape(heads.tokens, given.entries.shape[-1]).contiguous()
    entries = heads.taken(entries)
    g_values = matrix(given.g_values) if logprobs is None else flat(given.g_values)
    g_values, g_log_sum = heads.taken(g_values), heads.taken(flat(given.g_log_sum))

    def fill(rows: slice, args: Any, grad: Tensor, _: None) -> None:
        fill_cell_gradients(
            heads.engine,
            args,
            ids[rows],
            divergence._replace(logprobs=rows_of(logprobs, rows)),
            others.at(rows),
            entries[rows],
            (rows_of(g_values, rows), rows_of(g_log_sum, rows)),
            grad,
        )

    if request.by_rows and g_values is not None:
        args, listed = heads.args, _listed(heads, ids)
        x = listed.logits() if args.scaling.softcap else None
        # An absent entry's logit is the constant -inf; a masked row's may be NaN.
        absent = absent_entries(ids, len(inputs.weight))
        if args.mask is not None:
            absent |= ~args.mask[:, None]
        upstream = listed_gradient(heads.engine, args, x, g_values).masked_fill(absent, 0.0)
        found = listed.gradients(upstream, wrt)
        if "hidden" in found:
            found |= heads.of_all({"hidden": found["hidden"]})
        return in_their_types(inputs, found, wrt)
    return in_their_types(inputs, heads.gradients(("logprob",), wrt, fill), wrt)


def _kept(inputs: LinearInputs, request: ListInputs) -> list[Tensor | None]:
    return kept_logits(inputs, request.keep and not request.by_rows(inputs.weight.shape[0]))[:1]


# ---- FLOP counts: 2·N·H·V for each GEMM, 2·N·H·K where rows are read; arguments hold shapes


def _forward_flops(inputs: LinearInputs, request: Any, _: ListDivergence) -> int:
    entries, vocabulary = int(request.ids[-1]), int(cast(Any, inputs.weight)[0])
    by_rows = not request.rest and entries * SMALL_PART <= vocabulary
    return flops(inputs) // vocabulary * (entries if by_rows else vocabulary)


def _backward_flops(inputs: LinearInputs, request: Any, *_: Any) -> int:
    entries, vocabulary = int(request.ids[-1]), int(cast(Any, inputs.weight)[0])
    logits = bool(inputs.softcap) if request.by_rows else request.logits is None
    count = flops(inputs, request.wrt, ("logprob",), logits)
    return count // vocabulary * (entries if request.by_rows else vocabulary)


def _listed(heads: ChunkedHeads, ids: Tensor) -> Listed:
    """Return the listed entries, with id 0 for an absent one."""
    head = heads.all[0]
    return Listed(head, ids.masked_fill(ids >= len(head.weight), 0), heads.args.mask)


def _save_for_backward(
    ctx: Any, groups: tuple[LinearInputs, ListInputs, ListDivergence], output: Outputs
) -> None:
    inputs, request, divergence = groups
    refuse_temperature_gradient(any(ctx.needs_input_grad[7:9]))
    *found, logits = output
    ctx.by_rows = request.by_rows(inputs.weight.shape[0])
    logits = logits if request.keep and not ctx.by_rows else None  # the op's would be empty
    save_tensors(ctx, *inputs[:TENSORS], request.ids, divergence.logprobs, *found[1:], logits)
    ctx.settings, ctx.divergence = inputs[TENSORS:], divergence[1:]
    ctx.may_overwrite, ctx.overwritten = hasattr(ctx, "eager"), False
    constant = output[2 if divergence.logprobs is None else 1 :]
    ctx.mark_non_differentiable(*[value for value in constant if value is not None])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, g_values: Tensor | None, g_log_sum: Tensor | None, *_: Tensor | None
) -> Upstream:
    refuse_forward_mode((g_values, g_log_sum))
    names = [*itertools.compress(SIX, ctx.needs_input_grad)]
    if not names or (g_values is None and g_log_sum is None):
        return returned({}, ListInputs, ListDivergence)
    *tensors, ids, logprobs, log_sum, peak, saved, entries, logits = ctx.saved_tensors
    if ctx.overwritten:
        # Recompute the logits that an earlier backward through a retained graph overwrote.
        logits = None
    gradients = linear_cell_gradients(
        LinearInputs(*tensors, *ctx.settings),
        ListGradientInputs(ids, logits, ",".join(names), ctx.by_rows),
        ListDivergence(logprobs, *ctx.divergence),
        CellUpstream(log_sum, peak, saved, entries, g_values, g_log_sum),
        unobserved=overwriting(ctx, _gradients),
    )
    return returned(
        {name: value for name, value in zip(SIX, gradients, strict=True) if name in names},
        ListInputs,
        ListDivergence,
    )


linear_cells = DualOp(
    "linear_cells",
    (LinearInputs, ListInputs, ListDivergence),
    _cells,
    lambda inputs, request, divergence: (
        *empty_cells(inputs.hidden, request.ids, divergence),
        *_kept(inputs, request),
    ),
    outputs=6,
    rules=Rules(_backward, setup_context=_save_for_backward, flops=_forward_flops),
)
linear_cell_gradients = DualOp(
    "linear_cell_gradients",
    (LinearInputs, ListGradientInputs, ListDivergence, CellUpstream),
    _gradients,
    lambda inputs, request, *_: empty_gradients(inputs, request.wrt),
    outputs=len(SIX),
    rules=Rules(refuse_second_derivative, flops=_backward_flops),
)
