"""Argument checks shared by fastkl.rl, in the wording of fastkl._checks: argument, what was
expected, what came, what to do.
"""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Callable
from typing import Any

import torch

from .._checks import FLOAT_TYPES as FLOAT_TYPES
from .._checks import INTEGER_TYPES as INTEGER_TYPES
from .._checks import LARGEST_COUNT, dtype_remedy, local_or_full, same_device_and_precision
from .._checks import choice as choice
from .._checks import clamp as clamp
from .._checks import logits as logits
from .._checks import mask as mask
from .._checks import normalizer as normalizer
from .._checks import not_sharded as not_sharded
from .._checks import same_device as same_device
from .._checks import shown as shown
from .._checks import token_weights as token_weights
from .._checks import type_name as type_name

_LARGEST = sys.float_info.max


def float_tensor(name: str, value: torch.Tensor, what: str) -> None:
    """A tensor of one of FLOAT_TYPES; `what` says of what, with its shape."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"{name}: expected a float tensor, {what}, got {type(value).__name__}; pass a tensor"
        )
    if value.dtype not in FLOAT_TYPES:
        raise TypeError(
            f"{name}: expected float32, bfloat16, float16 or float64, {what}, got "
            f"{value.dtype}; " + dtype_remedy(name, value, "convert it with .float()")
        )
    not_sharded(name, value, what, local_or_full(name))


def like(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """A tensor of the shape and on the device of another, both float64 or neither."""
    if value.shape != other.shape:
        raise ValueError(
            f"{name}: expected the shape of {other_name}, {tuple(other.shape)}, got "
            f"{tuple(value.shape)}; align the two"
        )
    same_device_and_precision(name, value, other_name, other)


def per_token_or_sequence(
    name: str,
    value: torch.Tensor,
    other_name: str,
    other: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
) -> None:
    """A tensor shaped as per-token values, or as those without their last dimension, or with one
    entry per packed sequence; on their device.
    """
    sequences = other.shape[:-1] if cu_seqlens is None else (len(cu_seqlens) - 1,)
    if value.shape not in (other.shape, sequences):
        remedy = (
            "squeeze or index it to one of them, or pass cu_seqlens for packed sequences"
            if cu_seqlens is None
            else "cu_seqlens holds one entry more than there are sequences"
        )
        raise ValueError(
            f"{name}: expected one per sequence, {tuple(sequences)}, or one per token, "
            f"{tuple(other.shape)} as {other_name}, "
            f"got {tuple(value.shape)}; {remedy}"
        )
    same_device(name, value, other_name, other)


def no_gradient(name: str, value: torch.Tensor, why: str) -> None:
    """A tensor that does not require grad."""
    if value.requires_grad:
        raise ValueError(
            f"{name}: expected a tensor without gradient, got one that requires it; {why}: pass "
            f"{name}.detach()"
        )


def positive(x: float) -> bool:
    """For `number`: finite and above 0."""
    return 0 < x < math.inf


def not_negative(x: float) -> bool:
    """For `number`: finite and at least 0."""
    return 0 <= x < math.inf


def number(
    name: str,
    value: Any,
    what: str,
    inside: Callable[[float], bool],
    remedy: str,
    *,
    tensor: bool = False,
) -> float:
    """A number for which `inside` holds, as `what` says, as a float; with `tensor` also a tensor of
    one entry, for which it waits.
    """
    if tensor and isinstance(value, torch.Tensor) and value.dtype in FLOAT_TYPES + INTEGER_TYPES:
        not_sharded(name, value, "of one entry", f"pass {name}.full_tensor()")
        if value.is_meta:
            raise ValueError(
                f"{name}: expected {what}, got a tensor on the meta device, which has "
                f"no values; {remedy}"
            )
        if value.numel() != 1:
            raise ValueError(
                f"{name}: expected {what}, got a tensor of shape {tuple(value.shape)}; {remedy}"
            )
        value = value.item()
    elif isinstance(value, bool) or not (
        isinstance(value, (int, float)) or isinstance(value, numbers.Real)
    ):
        if isinstance(value, torch.Tensor) and not tensor:
            remedy = f"pass float({name})"
        raise TypeError(f"{name}: expected {what}, got {type_name(value)}; {remedy}")
    if not isinstance(value, (int, float)):
        value = _as_float(value)
    too_large = isinstance(value, int) and not -_LARGEST <= value <= _LARGEST
    if too_large or not inside(value):
        raise ValueError(f"{name}: expected {what}, got {shown(value)}; {remedy}")
    return float(value)


def _as_float(value: Any) -> float:
    """The nearest float, an infinity for a Fraction beyond the largest."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def whole_number(name: str, value: object, what: str, remedy: str) -> None:
    """A Python int of at least 1 and below 2^31."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected {what}, got {type_name(value)}; {remedy}")
    if not 1 <= value <= LARGEST_COUNT:
        limit = "at least 1" if value < 1 else "below 2^31"
        raise ValueError(f"{name}: expected {what}, {limit}, got {shown(value)}; {remedy}")


def beta(
    value: float | torch.Tensor | object, other_name: str, other: torch.Tensor
) -> float | torch.Tensor:
    """The weight of a KL: a number ≥ 0, a 0-d float tensor (not looked at, no gradient), or the
    `beta` of a controller.
    """
    if not isinstance(
        value, (int, float, torch.Tensor)
    ):  # torch.compile cannot ask a number that changes for attributes
        value = getattr(value, "beta", value)
    if not isinstance(value, torch.Tensor):
        return number(
            "beta",
            value,
            "a finite number of at least 0, a 0-d float tensor or a controller with an attribute "
            "`beta`",
            not_negative,
            "pass a weight as 0.05; a negative one would reward divergence",
        )
    float_tensor("beta", value, "0-d")
    if value.dim() != 0:
        raise ValueError(
            f"beta: expected a number or a 0-d tensor, got shape {tuple(value.shape)}; pass one "
            f"weight for all tokens"
        )
    if value.device.type != "cpu":
        same_device("beta", value, other_name, other)
    return value.detach()


def clip(value: float | tuple[float, float]) -> tuple[float, float]:
    """(how far the ratio may fall below 1, how far it may rise above 1), from one number for both
    or from two.
    """
    low, high = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value, value)
    what, remedy = (
        "a number within 0 … 1, or a pair (low within 0 … 1, high ≥ 0)",
        "pass clip=0.2 or clip=(0.2, 0.28), for instance",
    )
    return number("clip", low, what, lambda x: 0 <= x <= 1, remedy), number(
        "clip", high, what, lambda x: x >= 0, remedy
    )


def cu_seqlens(value: torch.Tensor, name: str, packed: torch.Tensor) -> None:
    """Integer boundaries [S+1] of the sequences packed into a tensor [total], on its device; their
    values looked at on the CPU only.
    """
    if not isinstance(value, torch.Tensor) or value.dtype not in INTEGER_TYPES:
        raise TypeError(
            f"cu_seqlens: expected an integer tensor [S+1] of the sequences' boundaries, got "
            f"{type_name(value)}; convert it with .int()"
        )
    not_sharded("cu_seqlens", value, "the sequences' boundaries", "pass cu_seqlens.full_tensor()")
    if packed.dim() != 1:
        raise ValueError(
            f"{name}: expected [total] beside cu_seqlens, got {tuple(packed.shape)}; pass a "
            f"padded [B, T] without cu_seqlens"
        )
    if value.dim() != 1 or len(value) == 0:
        raise ValueError(
            f"cu_seqlens: expected [S+1], the boundaries of S sequences with the leading 0, got "
            f"{tuple(value.shape)}; "
            f"for one sequence pass [0, {len(packed)}]"
        )
    same_device("cu_seqlens", value, name, packed)
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = value.tolist()
        if bounds[0] != 0 or bounds[-1] != len(packed) or bounds != sorted(bounds):
            raise ValueError(
                f"cu_seqlens: expected boundaries that rise from 0 to {len(packed)}, the length "
                f"of {name}, got {bounds[:3]} … "
                f"{bounds[-1]}; count the tokens that are in {name}"
            )


def state(state: dict[str, object], mine: dict[str, object]) -> None:
    """What state_dict() of an object returned, of the class of `mine`, which is this one's: a dict
    with the same entries.
    """
    if not isinstance(state, dict):
        raise ValueError(
            f"state: expected a dict with the entries {', '.join(sorted(mine))}, got "
            f"{type(state).__name__}; "
            f"pass what state_dict() returned"
        )
    if "class" in state and state["class"] != mine["class"]:
        raise ValueError(
            f"state: expected class {mine['class']!r}, got {state['class']!r}; load it into an "
            f"object of the class it was saved from"
        )
    if state.keys() != mine.keys():
        got = ", ".join(sorted(map(str, state))) or "none"
        raise ValueError(
            f"state: expected a dict with the entries {', '.join(sorted(mine))}, got {got}; pass "
            f"what state_dict() returned"
        )
