"""Vectors in a space of parameters: one tensor, or tensors by name as in named_parameters()."""

import math
from collections.abc import Mapping

import torch

from . import _checks

Tensors = torch.Tensor | dict[str, torch.Tensor]
Given = torch.Tensor | Mapping[str, torch.Tensor]


def named_tensors(name: str, value: Given) -> dict[str, torch.Tensor]:
    """Check a vector and return float32 or float64 tensors by name, "" for a tensor alone."""
    _checks.expect(
        isinstance(value, torch.Tensor) or (isinstance(value, dict) and len(value) > 0),
        name,
        "a tensor or a dict of tensors by name, not empty",
        value,
        "for a module: dict(model.named_parameters())",
        TypeError,
    )
    named = {"": value} if isinstance(value, torch.Tensor) else dict(value)
    for key, tensor in named.items():
        where = f"{name}[{key!r}]" if isinstance(value, dict) else name
        _checks.expect(
            isinstance(tensor, torch.Tensor),
            where,
            "a tensor",
            tensor,
            "leave it out of every dict if it takes no part",
            TypeError,
        )
        _checks.not_sharded(where, tensor, "float32 or float64", f"pass {where}.full_tensor()")
        _checks.expect(
            not tensor.is_meta, where, "values", "a tensor on the meta device", "pass real tensors"
        )
        _checks.expect(
            tensor.dtype in (torch.float32, torch.float64),
            where,
            "float32 or float64, since 16 bits do not hold a Fisher product",
            tensor,
            "pass copies: .float()",
            TypeError,
        )
    return named


def like(
    name: str, value: Given, other_name: str, other: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Check that names, shapes, types and devices are those of `other`; return it in its order."""
    named = named_tensors(name, value)
    remedy = "take both from the same parameters"
    _checks.expect(
        named.keys() == other.keys(),
        name,
        f"the names of {other_name}",
        f"others: {sorted(named.keys() ^ other.keys())}",
        remedy,
    )
    for key, expected in other.items():
        theirs, ours = (
            f"{tuple(each.shape)}, {each.dtype}, {each.device}" for each in (expected, named[key])
        )
        where = f"{name}[{key!r}]" if key else name
        _checks.expect(ours == theirs, where, f"{theirs} as in {other_name}", ours, remedy)
    return {key: named[key] for key in other}


def packed(named: dict[str, torch.Tensor], like: Given) -> Tensors:
    """Return a vector in the form of `like`."""
    return named[""] if isinstance(like, torch.Tensor) else named


def scaled(named: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Divide by the largest entry and return it too: the square of a float32 below 1e-23 is 0, of
    one above 1e19 infinite.
    """
    device = next(iter(named.values())).device
    norms = [
        torch.linalg.vector_norm(value, math.inf).to(device, torch.float64)
        for value in named.values()
        if value.numel()
    ]
    scale = torch.stack([torch.zeros((), dtype=torch.float64, device=device), *norms]).max()
    scale = torch.where(scale == 0, 1.0, scale)
    return {name: value / scale.to(value.device) for name, value in named.items()}, scale


def dot(name: str, first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Compute the inner product, check that it is finite, and wait for the device once."""
    parts = [(first[key] * second[key]).sum() for key in first]
    value = float(torch.stack([part.to(parts[0].device, torch.float64) for part in parts]).sum())
    _checks.expect(
        math.isfinite(value),
        name,
        "finite values",
        f"an inner product of {value}",
        "look for a NaN, an infinity or an overflow there",
    )
    return value
