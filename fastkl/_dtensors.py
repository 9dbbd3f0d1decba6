"""DTensors as arguments of the functions on logits: each process computes its part, and the results
are DTensors again.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from . import _checks
from .parallel import VocabShard

Function = TypeVar("Function", bound=Callable[..., Any])


def takes_dtensors(function: Function) -> Function:
    """Decorate a function whose first argument is a tensor of logits."""

    @functools.wraps(function)
    def call(*args: Any, **more: Any) -> Any:
        first = args[0] if args else next(iter(more.values()), None)
        distributed = type(first) is not torch.Tensor and hasattr(type(first), "full_tensor")
        return on_local(function, *args, **more) if distributed else function(*args, **more)

    return cast(Function, call)


def on_local(function: Callable[..., Any], *args: Any, **more: Any) -> Any:
    """Call a function on the local parts of DTensors, with a VocabShard if the columns are split,
    and return its results as DTensors with the remaining placements.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    given: dict[str, Any] = inspect.signature(function).bind(*args, **more).arguments
    name, first = next(iter(given.items()))
    mesh, placements, leading = first.device_mesh, first.placements, first.shape[:-1]
    columns = Shard(first.ndim - 1)
    outer = tuple([Replicate() if each == columns else each for each in placements])
    for argument, value in given.items():
        if hasattr(value, "dim") and value.dim():
            wanted = placements if argument.endswith("logits") else outer
            _checks.expect(
                isinstance(value, DTensor)
                and value.device_mesh == mesh
                and value.placements == wanted
                and (wanted is outer or value.shape == first.shape)
                and not any(x.is_partial() for x in wanted),
                argument,
                f"a DTensor on the mesh of {name} with placements {wanted}, whole or split"
                + f", of shape {tuple(first.shape)}" * (wanted is placements),
                f"{value.placements} of shape {tuple(value.shape)}"
                if isinstance(value, DTensor)
                else "a plain tensor",
                "use DTensor.redistribute or DTensor.from_local",
            )
            given[argument] = value.to_local()
    if columns in placements:
        _checks.expect(
            given.get("shard") is None, "shard", "None beside DTensors", "a shard", "leave it out"
        )
        given["shard"] = VocabShard.dtensor(first)
    found = function(**given)

    def distributed(part: torch.Tensor | None) -> Any:
        if part is None:
            return None
        _checks.expect(
            part.dim() or all(each.is_replicate() for each in outer),
            name,
            "logits whose rows are not split over processes, for a sum or a mean",
            placements,
            "pass reduction='none' and sum the result",
        )
        like = torch.empty((*leading[: part.dim()], *part.shape[len(leading) :]), device="meta")
        return DTensor.from_local(
            part, mesh, outer, run_check=False, shape=like.shape, stride=like.stride()
        )

    return type(found)(*map(distributed, found)) if isinstance(found, tuple) else distributed(found)
