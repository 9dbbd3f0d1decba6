"""Vectors in a space of parameters: one tensor, or tensors by name as in named_parameters()."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from . import _checks

Tensors = torch.Tensor | dict[str, torch.Tensor]
Given = torch.Tensor | Mapping[str, torch.Tensor]


def named_tensors(name: str, value: Given) -> dict[str, torch.Tensor]:
    """Check a vector and return float32 or float64 tensors by name, "" for a tensor alone."""
    if not isinstance(value, (torch.Tensor, dict)) or isinstance(value, dict) and not value:
        got = "an empty dict" if isinstance(value, dict) else type(value).__name__
        raise TypeError(
            f"{name}: expected a tensor or a dict of tensors by name, got {got}; for a module: "
            f"dict(model.named_parameters())"
        )
    named = {"": value} if isinstance(value, torch.Tensor) else dict(value)
    for key, tensor in named.items():
        where = f"{name}[{key!r}]" if isinstance(value, dict) else name
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"{where}: expected a tensor, got {type(tensor).__name__}; leave it out of every "
                f"dict if it takes no part"
            )
        _checks.not_sharded(where, tensor, "float32 or float64", f"pass {where}.full_tensor()")
        if tensor.is_meta:
            raise ValueError(
                f"{where}: expected values, got a tensor on the meta device, which has "
                f"none; pass real tensors"
            )
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{where}: expected float32 or float64, since 16 bits do not hold a Fisher "
                f"product, got {tensor.dtype}; pass copies: .float()"
            )
    return named


def like(
    name: str, value: Given, other_name: str, other: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Check that names, shapes, types and devices are those of `other`; return it in its order."""
    named = named_tensors(name, value)
    if named.keys() != other.keys():
        raise ValueError(
            f"{name}: expected the names of {other_name}, got others: "
            f"{sorted(named.keys() ^ other.keys())} are in one of them only; "
            f"take both from the same parameters"
        )
    for key, expected in other.items():
        got = named[key]
        if (got.shape, got.dtype, got.device) != (expected.shape, expected.dtype, expected.device):
            where = f"{name}[{key!r}]" if key else name
            raise ValueError(
                f"{where}: expected as in {other_name} {tuple(expected.shape)}, {expected.dtype}, "
                f"{expected.device}, got {tuple(got.shape)}, {got.dtype}, {got.device}; take both "
                f"from the same parameters"
            )
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
    if not math.isfinite(value):
        raise ValueError(
            f"{name}: expected finite values, got an inner product of {value}; look for a NaN, an "
            f"infinity or an overflow there"
        )
    return value
