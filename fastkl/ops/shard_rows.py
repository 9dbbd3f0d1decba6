"""Rows whose vocabulary is split over processes. The kernels' states and the parts of fallback rows
are all-gathered and merged on every rank; divergences without mergeable states all-gather the
logits. Backward needs no communication, except on the reference, which all-gathers the logits
again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import parallel
from .fields import PerRow, RowArgs
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
    return args._replace(p=p, q=q, tokens=tokens, cut=parallel.WHOLE)


def whole(args: RowArgs) -> RowArgs:
    """Return the arguments with the logits of all ranks."""
    if not args.cut.group:
        return args
    logits = [args.p] if args.q is None else [args.p, args.q]
    p, *q = parallel.gather_columns([args.cut] * len(logits), logits)
    return args._replace(p=p, q=q[0] if q else None, cut=parallel.WHOLE)


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


def forward(args: RowArgs, outputs: dict[str, torch.Tensor], saved: torch.Tensor) -> None:
    """Fill outputs and saved as Kernels.forward does for the whole vocabulary, from two
    all_gathers.
    """
    launch, own, cut, rows = launchers(), local(args), args.cut, len(saved)
    if args.divergence.kind == "jeffreys":
        outputs = {**outputs, "ref_kl": torch.empty_like(outputs["kl"])}
    shard = launch.Shard(cut.vocabulary, cut.width, cut.ranks)
    problem = _problem(own._replace(tokens=None))
    splits = launch.plan_for(problem, outputs, shard=shard).splits
    states = saved.new_zeros(rows * (splits * launch.STATE.value + 2))
    launch.forward(problem, outputs, saved, shard=shard, state=states)
    sampled = states[-2 * rows :].view(2, rows)
    for values, logits in zip(sampled, (own.p, own.q), strict=True):
        if own.tokens is not None and logits is not None and logits.shape[-1]:
            index = own.tokens.clamp(min=0).view(*logits.shape[:-1], 1)
            at_token = logits.gather(-1, index).view(-1)
            values.copy_(torch.where(own.tokens < 0, 0.0, at_token.float()))
    gathered = parallel.all_gather(states, cut.group, cut.ranks)
    # One rank has a token's logit, the others have 0.
    p, q = gathered[:, -2 * rows :].sum(0).view(2, rows, 1)
    of_tokens = args._replace(
        p=p.to(args.p.dtype), q=None if args.q is None else q.to(args.q.dtype)
    )
    if args.tokens is not None:
        outside = (args.tokens < 0) | (args.tokens >= cut.vocabulary)
        of_tokens = of_tokens._replace(tokens=torch.where(outside, -1, 0))
    merging, problem_of_tokens = shard._replace(merges=True), _problem(of_tokens)
    launch.forward(problem_of_tokens, outputs, saved, shard=merging, state=gathered)
    parts = saved.new_zeros(rows, launch.PART_VALUES, dtype=torch.float64)
    launch.fallback(problem, outputs, saved, shard=shard, parts=parts)
    parts = parallel.all_gather(parts, cut.group, cut.ranks)
    launch.fallback(problem_of_tokens, outputs, saved, shard=merging, parts=parts)
    if args.divergence.kind == "jeffreys":
        outputs["kl"] += outputs["ref_kl"]


def _problem(args: RowArgs) -> Any:
    """Return the Problem of all rows, since all ranks gather equally often; copy logits whose
    leading dimensions do not merge.
    """
    found = problems(args)
    if len(found) > 1:
        q = None if args.q is None else args.q.contiguous()
        found = problems(args._replace(p=args.p.contiguous(), q=q))
    return found[0][1]
