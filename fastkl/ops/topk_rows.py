"""A divergence from a teacher's top k and its gradient on the kernels, for rows of logits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .engine import Engine
from .fields import Outside, RowArgs
from .problems import outside_launchers, problems

# Longest list: the kernels compare each entry with all others.
LARGEST_K = 511
# Log-probs with a larger listed mass are not from a distribution, whatever their rounding.
LARGEST_MASS = 1.05
# In the order of kernels.row_topk.
DIRECTIONS = "teacher||student", "student||teacher", "js"
TAILS = "bucket", "renormalize", "ignore"
MASSES = 3


class Teacher(NamedTuple):
    """A teacher's log-probs [..., K] for ids in any order, and the divergence to compute on the
    kernels; None for no divergence. clip: 0 for none.
    """

    logprobs: Tensor | None = None
    direction: str = ""
    tail: str = ""
    beta: float = 0.5
    clip: float = 0.0


def fill_topk(
    args: RowArgs, ids: Tensor, teacher: Teacher, others: Outside, kl: Tensor, masses: Tensor
) -> None:
    """Fill kl [N], masses [N, 3] (of the list in the student and in the teacher, and 1 where the
    row counts), and `others`; ids [N, K].
    """
    for rows, problem, given in _lists(args, ids, teacher):
        outside, (listed, logprobs, _) = others.at(rows), given
        outside_launchers().outside(problem, listed, *outside, logprobs)
        outside_launchers().topk(problem, *given, outside, (kl[rows], masses[rows]))


def fill_topk_gradients(
    engine: Engine,
    args: RowArgs,
    ids: Tensor,
    teacher: Teacher,
    others: Outside,
    upstream: Tensor,
    grad: Tensor,
) -> None:
    """Fill the gradient [N, V] of Σ upstream·kl, which may overwrite the logits."""
    # A saved-tensor hook may return logits with another stride along the vocabulary.
    args = args if args.p.stride(-1) == 1 else args._replace(p=args.p.contiguous())
    places = torch.empty_like(ids, dtype=torch.int64)
    listed, rest = torch.empty_like(ids, dtype=torch.float32), torch.empty_like(upstream)
    for rows, problem, given in _lists(args, ids, teacher):
        gradient = [value[rows] for value in (upstream, listed, places, rest)]
        outside_launchers().topk(problem, *given, others.at(rows), None, gradient)
    engine.outside_gradient(args, others, rest, grad)
    grad.scatter_(-1, places, listed.to(grad.dtype))


def _lists(args: RowArgs, ids: Tensor, teacher: Teacher) -> list[tuple[slice, Any, Any]]:
    """Return triples (rows, kernels.launch.Problem, arguments of kernels.launch_outside.topk)."""
    logprobs, direction, tail, *numbers = teacher
    assert logprobs is not None
    logprobs = logprobs.reshape(ids.shape).contiguous()
    how = DIRECTIONS.index(direction), TAILS.index(tail), *numbers, LARGEST_MASS
    parts = [(slice(None) if rows is None else rows, each) for rows, each in problems(args)]
    return [(rows, each, (ids[rows], logprobs[rows], how)) for rows, each in parts]
