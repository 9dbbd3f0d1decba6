"""A divergence from a teacher's top k and its gradient on the kernels, for rows of logits."""

from typing import Any, Literal, NamedTuple, get_args

import torch

from .engine import Engine
from .fields import Outside, RowArgs
from .problems import outside_launchers, problems

TopkDirection = Literal["teacher||student", "student||teacher", "js"]
Tail = Literal["bucket", "renormalize", "ignore"]
# Longest list: the work grows as K², and 511 entries and the rest fill 512 cells.
LARGEST_K = 511
# Log-probs with a larger listed mass are not from a distribution, whatever their rounding.
LARGEST_MASS = 1.05
# Results of a row beside its divergence: the list's mass in the student and in the teacher, and 1
# where the row counts.
SUMMARY = 3


class ListDivergence(NamedTuple):
    """A divergence computed on the kernels, from a teacher's log-probs [..., K] for ids in any
    order; without logprobs, cells returns lists instead. beta: the teacher's share, of "js". clip:
    0 for none.
    """

    logprobs: torch.Tensor | None = None
    direction: str = ""
    tail: str = ""
    beta: float = 0.5
    clip: float = 0.0


def fill_topk(
    args: RowArgs,
    ids: torch.Tensor,
    divergence: ListDivergence,
    others: Outside,
    kl: torch.Tensor,
    entries: torch.Tensor,
) -> None:
    """Fill kl [N], `others` as Engine.outside does, and entries [N, K + SUMMARY], all but `others`
    float32: the soft-capped logits at ids [N, K], int32 or int64, and the summary.
    """
    for rows, problem, (listed, logprobs, how) in _lists(args, ids, divergence):
        given = problem, listed, logprobs, entries[rows]
        outside_launchers().outside(*given, others.at(rows))
        outside_launchers().topk(*given, others.at(rows), how, kl[rows])


def fill_topk_gradients(
    engine: Engine,
    args: RowArgs,
    ids: torch.Tensor,
    divergence: ListDivergence,
    others: Outside,
    entries: torch.Tensor,
    upstream: torch.Tensor,
    grad: torch.Tensor,
) -> None:
    """Fill grad [N, V], which may overwrite the logits, with the gradient of Σ upstream·kl; others,
    entries: as filled by fill_topk; upstream [N] float32.
    """
    columns = torch.empty_like(ids, dtype=torch.int64)
    grad_listed, g_log_sum = torch.empty_like(ids, dtype=torch.float32), torch.empty_like(upstream)
    for rows, problem, (listed, logprobs, how) in _lists(args, ids, divergence):
        gradient = [value[rows] for value in (upstream, grad_listed, columns, g_log_sum)]
        given = problem, listed, logprobs, entries[rows], others.at(rows), how
        outside_launchers().topk(*given, None, gradient)
    engine.outside_gradient(args, others, g_log_sum, grad)
    grad.scatter_(-1, columns, grad_listed.to(grad.dtype))


def _lists(
    args: RowArgs, ids: torch.Tensor, divergence: ListDivergence
) -> list[tuple[slice, Any, Any]]:
    """Return triples (rows, kernels.launch.Problem, (ids, logprobs, launch_outside.Terms))."""
    logprobs, direction, tail, *numbers = divergence
    assert logprobs is not None
    logprobs = logprobs.reshape(ids.shape).contiguous()
    number = get_args(TopkDirection).index(direction), get_args(Tail).index(tail)
    terms = outside_launchers().Terms(*number, *numbers, LARGEST_MASS)
    parts = [(slice(None) if rows is None else rows, each) for rows, each in problems(args)]
    return [(rows, each, (ids[rows], logprobs[rows], terms)) for rows, each in parts]
