"""Argument checks shared by fastkl.rl, in the wording of fastkl._checks: argument, what was expected, what came, what to do."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .._checks import FLOAT_TYPES, INTEGER_TYPES, _type_name
from .._checks import choice as choice
from .._checks import mask as mask
from .._checks import same_device as same_device


def float_tensor(name: str, value: torch.Tensor, what: str) -> None:
    """A tensor of one of FLOAT_TYPES; `what` says of what, with its shape."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a float tensor, {what}, got {type(value).__name__}")
    if value.dtype not in FLOAT_TYPES:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, {what}, got {value.dtype}; convert it with .float()")


def like(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """A tensor of the shape and on the device of another."""
    if value.shape != other.shape:
        raise ValueError(f"{name}: expected the shape of {other_name}, {tuple(other.shape)}, got {tuple(value.shape)}; align the two")
    same_device(name, value, other_name, other)


def per_token_or_sequence(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor, remedy: str) -> None:
    """A tensor shaped as per-token values, or as those without their last dimension, on their device."""
    if value.shape not in (other.shape, other.shape[:-1]):
        raise ValueError(f"{name}: expected one per sequence, {tuple(other.shape[:-1])}, or one per token, {tuple(other.shape)} as {other_name}, "
                         f"got {tuple(value.shape)}; {remedy}")
    same_device(name, value, other_name, other)


def no_gradient(name: str, value: torch.Tensor, why: str) -> None:
    """A tensor that does not require grad."""
    if value.requires_grad:
        raise ValueError(f"{name}: expected a tensor without gradient, got one that requires it; {why}: pass {name}.detach()")


def number(name: str, value: float, what: str, inside: Callable[[float], bool]) -> None:
    """A Python number for which `inside` holds, as `what` says; NaN never does."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected {what}, got {_type_name(value)}; for a tensor or numpy scalar pass float({name})")
    if not inside(value):
        raise ValueError(f"{name}: expected {what}, got {value}")


def whole_number(name: str, value: int, what: str) -> None:
    """A Python int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected {what}, got {_type_name(value)}")
    if value < 1:
        raise ValueError(f"{name}: expected {what}, at least 1, got {value}")


def beta(value: float | torch.Tensor | object, other_name: str, other: torch.Tensor) -> float | torch.Tensor:
    """The weight of a KL: a number ≥ 0, a 0-d float tensor (not looked at, no gradient), or the `beta` of a controller."""
    value = getattr(value, "beta", value)
    if not isinstance(value, torch.Tensor):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"beta: expected a number, a 0-d float tensor or a controller with an attribute `beta`, got {type(value).__name__}; "
                            f"for a numpy scalar pass float(beta)")
        if not (0 <= value < math.inf):
            raise ValueError(f"beta: expected a finite number of at least 0, got {value}; a negative beta would reward divergence")
        return float(value)
    float_tensor("beta", value, "0-d")
    if value.dim() != 0:
        raise ValueError(f"beta: expected a number or a 0-d tensor, got shape {tuple(value.shape)}; pass one weight for all tokens")
    if value.device.type != "cpu":
        same_device("beta", value, other_name, other)
    return value.detach()


def clip(value: float | tuple[float, float]) -> tuple[float, float]:
    """(how far the ratio may fall below 1, how far it may rise above 1), from one number for both or from two."""
    low, high = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value, value)
    what = "a number within 0 … 1, or a pair (low within 0 … 1, high ≥ 0)"
    number("clip", low, what, lambda x: 0 <= x <= 1)
    number("clip", high, what, lambda x: x >= 0)
    return low, high


def cu_seqlens(value: torch.Tensor, name: str, packed: torch.Tensor) -> None:
    """Integer boundaries [S+1] of the sequences packed into a tensor [total], on its device; their values looked at on the CPU only."""
    if not isinstance(value, torch.Tensor) or value.dtype not in INTEGER_TYPES:
        raise TypeError(f"cu_seqlens: expected an integer tensor [S+1] of the sequences' boundaries, got {_type_name(value)}; convert it with .int()")
    if packed.dim() != 1:
        raise ValueError(f"{name}: expected [total] beside cu_seqlens, got {tuple(packed.shape)}; pass a padded [B, T] without cu_seqlens")
    if value.dim() != 1 or len(value) == 0:
        raise ValueError(f"cu_seqlens: expected [S+1], the boundaries of S sequences with the leading 0, got {tuple(value.shape)}")
    same_device("cu_seqlens", value, name, packed)
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = value.tolist()
        if bounds[0] != 0 or bounds[-1] != len(packed) or bounds != sorted(bounds):
            raise ValueError(f"cu_seqlens: expected boundaries that rise from 0 to {len(packed)}, the length of {name}, got {bounds[:3]} … "
                             f"{bounds[-1]}; count the tokens that are in {name}")
