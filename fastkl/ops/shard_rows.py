"""Rows whose vocabulary is split over processes. The kernels' states, the sums of a second read and
the parts of fallback rows are all-gathered and merged on every rank. Backward needs no
communication. The reference all-gathers the logits, and again in backward.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import torch

from .. import _collectives
from ..parallel import WHOLE, Cut
from .fields import Divergence, PerRow, RowArgs
from .near_series import near_series
from .problems import launchers, problems


def local(args: RowArgs) -> RowArgs:
    """Return the arguments for this process's columns without padding, with token ids relative to
    them, -1 for tokens elsewhere.
    """
    columns = args.cut.columns(args.p.shape[-1])
    tokens = args.tokens
    if tokens is not None:
        tokens = tokens - args.cut.start
        tokens = tokens.masked_fill((tokens < 0) | (tokens >= columns), -1)
    p, q = (None if value is None else value[..., :columns] for value in (args.p, args.q))
    assert p is not None
    return args._replace(p=p, q=q, tokens=tokens, cut=WHOLE)


def whole(args: RowArgs) -> RowArgs:
    """Return the arguments with the logits of all ranks."""
    if not args.cut.group:
        return args
    logits = [args.p] if args.q is None else [args.p, args.q]
    p, *q = _collectives.gather_columns([args.cut] * len(logits), logits, _signature(args))
    return args._replace(p=p, q=q[0] if q else None, cut=WHOLE)


def zero_padding(args: RowArgs, grads: Sequence[PerRow]) -> list[PerRow]:
    """Set the gradient [N, width] of padding columns to 0, and return views of the columns of
    `local`.
    """
    count = args.p.shape[-1]
    for grad in grads:
        if grad is not None:
            grad[:, count:] = 0
    return [None if grad is None else grad[:, :count] for grad in grads]


def backward(
    of_whole: Callable[..., None],
    args: RowArgs,
    saved: torch.Tensor,
    upstream: dict[str, torch.Tensor],
    grads: tuple[torch.Tensor | None, ...],
) -> None:
    """Fill the columns of this process of the gradients that an engine computes from all logits."""
    shape = len(saved), args.cut.vocabulary
    found = [None if grad is None else grad.new_empty(shape) for grad in grads]
    of_whole(whole(args), saved, upstream, *found)
    for grad, value in zip(grads, found, strict=True):
        if grad is not None and value is not None:
            grad.copy_(args.cut.part(value, grad.shape[-1]))


def steps(
    args: RowArgs, outputs: dict[str, torch.Tensor], saved: torch.Tensor
) -> Generator[None, None, None]:
    """Fill outputs and saved as Kernels.forward does for the whole vocabulary, from two
    all_gathers: of the segments' states, and of the parts of fallback rows, for an f-divergence
    with the sums of its second read; without rows, from one. Yield while a gather runs.
    """
    launch, own, cut, rows = launchers(), local(args), args.cut, len(saved)
    signature = _signature(args, outputs)
    if not rows:  # other ranks may have some, and would wait
        yield from _gather(cut, signature, saved)
        return
    jeffreys = args.divergence.kind == "jeffreys"
    if jeffreys:
        outputs = {**outputs, "ref_kl": torch.empty_like(outputs["kl"])}
    series = near_series(Divergence() if jeffreys else args.divergence)
    other = series.kind != "kl"
    shard = launch.Shard(cut.vocabulary, cut.width, cut.ranks)
    merging = shard._replace(merges=True)
    problem = _problem(own._replace(tokens=None))
    plan = launch.plan_for(problem, outputs, series, shard)
    states = saved.new_zeros(rows * plan.splits * launch.STATE.value)
    launch.forward(problem, outputs, saved, series, shard, states)
    log_sums = launch.log_sums(problem, plan, states) if other else saved[:0]
    values = states, _at_token(own), log_sums
    gathered, at_token, log_sums = yield from _gather(cut, signature, *values)
    # One rank has a token's logit, the others have 0.
    p, q = at_token.sum(0).unsqueeze(-1)
    of_tokens = args._replace(
        p=p.to(args.p.dtype), q=None if args.q is None else q.to(args.q.dtype)
    )
    if args.tokens is not None:
        outside = (args.tokens < 0) | (args.tokens >= cut.vocabulary)
        of_tokens = of_tokens._replace(tokens=torch.where(outside, -1, 0))
    merged = _problem(of_tokens)
    launch.forward(merged, outputs, saved, series, merging, gathered)
    width = launch.PART_SUMS if other else launch.PART_VALUES
    parts = saved.new_zeros(rows, plan.splits, width, dtype=torch.float64)
    launch.fallback(problem, outputs, saved, series, shard, parts, log_sums)
    if series.forward:
        launch.forward(problem, outputs, saved, series, shard, states, second=True)
        states, parts = yield from _gather(cut, signature, states, parts)
        launch.forward(merged, outputs, saved, series, merging, states, second=True)
    else:
        (parts,) = yield from _gather(cut, signature, parts)
    launch.fallback(merged, outputs, saved, series, merging, parts, log_sums)
    if jeffreys:
        outputs["kl"] += outputs["ref_kl"]


def _at_token(own: RowArgs) -> torch.Tensor:
    """Return the logits of P and Q at each row's token, [2, N]; 0 for tokens elsewhere."""
    found = own.p.new_zeros(2, own.p.shape[:-1].numel(), dtype=torch.float32)
    for values, logits in zip(found, (own.p, own.q), strict=True):
        if own.tokens is not None and logits is not None and logits.shape[-1]:
            index = own.tokens.clamp(min=0).view(*logits.shape[:-1], 1)
            at_token = logits.gather(-1, index).view(-1)
            values.copy_(torch.where(own.tokens < 0, 0.0, at_token.float()))
    return found


def _signature(args: RowArgs, fields: Iterable[str] = ()) -> object:
    """Return the options in which all ranks' calls must agree; of a tensor, its dtype."""
    p, q, tokens, mask, temperature, scaling, divergence, cut, call_rows = args
    options = p, q, tokens, mask, temperature, *scaling, divergence, cut.vocabulary, cut.width
    described = [x.dtype if isinstance(x, torch.Tensor) else x for x in options]
    return described, call_rows, *fields


def _gather(
    cut: Cut, signature: object, *values: torch.Tensor
) -> Generator[None, None, list[torch.Tensor]]:
    """Return the values of all ranks, each [ranks, ...], from one all_gather; yield while it runs.

    signature: as in start_gather.
    """
    started = _collectives.start_gather(values, cut.group, cut.ranks, signature)
    yield
    return _collectives.wait(started, values)


def _problem(args: RowArgs) -> Any:
    """Return the Problem of all rows, since all ranks gather equally often; copy logits whose
    leading dimensions do not merge.
    """
    found = problems(args)
    if len(found) > 1:
        q = None if args.q is None else args.q.contiguous()
        found = problems(args._replace(p=args.p.contiguous(), q=q))
    return found[0][1]
