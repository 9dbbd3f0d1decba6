"""Argument checks shared by fastkl.rl, worded as in fastkl._checks: `argument: expected X, got Y;
remedy`.
"""

import itertools
import math
import numbers
import operator
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from .. import _modes
from .._checks import (
    FLOAT_TYPES,
    INTEGER_TYPES,
    LARGEST_COUNT,
    choice,
    clamp,
    dtype_remedy,
    expect,
    local_or_full,
    mask,
    normalizer,
    not_sharded,
    same_device,
    same_device_and_precision,
    shown,
    tensor_remedy,
    type_name,
)

# Re-exports for mypy: modules of fastkl.rl import every check from here.
__all__ = [
    "FLOAT_TYPES",
    "INTEGER_TYPES",
    "choice",
    "clamp",
    "expect",
    "mask",
    "normalizer",
    "not_sharded",
]


def float_tensor(name: str, value: torch.Tensor, what: str, least_dim: int = 0) -> None:
    """Check for a tensor of one of FLOAT_TYPES; `what` describes it, with its shape."""
    given = isinstance(value, torch.Tensor)
    expect(
        given and value.dtype in FLOAT_TYPES,
        name,
        f"a float32, bfloat16, float16 or float64 tensor, {what}",
        value,
        dtype_remedy(name, value, "convert it with .float()")
        if given
        else tensor_remedy(name, value, ""),
        TypeError,
    )
    not_sharded(name, value, what, local_or_full(name))
    expect(
        value.dim() >= least_dim,
        name,
        f"{what}, with at least {least_dim} dimension",
        "a scalar",
        "pass one entry per token, before a mean is taken",
    )


def like(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Check that two tensors have the same shape and device, and both are float64 or neither."""
    expect(
        value.shape == other.shape,
        name,
        f"the shape of {other_name}, {tuple(other.shape)}",
        tuple(value.shape),
        "align the two",
    )
    same_device_and_precision(name, value, other_name, other)


def per_token_or_sequence(
    name: str,
    value: torch.Tensor,
    other_name: str,
    other: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
) -> None:
    """Check for one entry per token, or per sequence (padded or packed), on the same device."""
    sequences = other.shape[:-1] if cu_seqlens is None else (len(cu_seqlens) - 1,)
    expect(
        value.shape in (other.shape, sequences),
        name,
        f"one per sequence, {tuple(sequences)}, or one per token, {tuple(other.shape)} as "
        f"{other_name}",
        tuple(value.shape),
        "squeeze or index it to one of them, or pass cu_seqlens for packed sequences"
        if cu_seqlens is None
        else "cu_seqlens holds one entry more than there are sequences",
    )
    same_device(name, value, other_name, other)


def number(
    name: str,
    value: Any,
    what: str,
    inside: Callable[[float], bool],
    remedy: str,
    *,
    tensor: bool = False,
) -> float:
    """Return, as a float, a number for which `inside` holds.

    `what` describes it. With `tensor` it may be a tensor of one entry, which is read and
    synchronises a GPU.
    """
    if tensor and isinstance(value, torch.Tensor) and value.dtype in FLOAT_TYPES + INTEGER_TYPES:
        not_sharded(name, value, "of one entry", f"pass {name}.full_tensor()")
        if value.is_meta or value.numel() != 1:
            raise ValueError(
                f"{name}: expected {what}, got a tensor of shape {tuple(value.shape)} "
                f"{'without values' if value.is_meta else 'in place of one number'}; {remedy}"
            )
        value = value.item()
    elif isinstance(value, bool) or not (
        isinstance(value, (int, float)) or isinstance(value, numbers.Real)
    ):
        if isinstance(value, torch.Tensor) and not tensor and value.numel() == 1:
            remedy = f"pass float({name})"
        raise TypeError(f"{name}: expected {what}, got {type_name(value)}; {remedy}")
    exact = isinstance(value, int) or (
        not isinstance(value, float) and isinstance(value, numbers.Rational)
    )
    finite = not exact or abs(value) <= sys.float_info.max
    expect(finite and inside(value), name, what, value, remedy)
    return float(value)


def whole_number(
    name: str,
    value: object,
    what: str,
    remedy: str,
    lowest: int = 1,
    largest: int = LARGEST_COUNT,
) -> None:
    """Check for a Python int within a range, by default at least 1 and below 2^31."""
    expect(
        isinstance(value, int) and not isinstance(value, bool), name, what, value, remedy, TypeError
    )
    expect(
        isinstance(value, int) and lowest <= value <= largest,
        name,
        f"{what} within {lowest} … {largest}",
        value,
        remedy,
    )


def beta(
    value: float | torch.Tensor | object, other_name: str, other: torch.Tensor
) -> float | torch.Tensor:
    """Return the weight of a KL: a number ≥ 0, a 0-d float tensor, detached (its value is not
    read), or the `beta` of a controller.
    """
    # torch.compile cannot look up attributes of a number that changes.
    if not isinstance(value, (int, float, torch.Tensor)):
        value = getattr(value, "beta", value)
    if not isinstance(value, torch.Tensor):
        return number(
            "beta",
            value,
            "a finite number of at least 0, a 0-d float tensor or a controller with an attribute "
            "`beta`",
            lambda x: 0 <= x < math.inf,
            "pass a weight as 0.05; a negative one would reward divergence",
        )
    float_tensor("beta", value, "0-d")
    expect(
        value.dim() == 0,
        "beta",
        "a number or a 0-d tensor",
        value.shape,
        "pass one weight for all tokens",
    )
    if value.device.type != "cpu":
        same_device("beta", value, other_name, other)
    return value.detach()


def number_pair(
    name: str,
    value: Any,
    what: str,
    inside: Callable[[float], bool],
    remedy: str,
    inside_second: Callable[[float], bool] | None = None,
) -> tuple[float, float]:
    """Return two numbers, from a pair or one for both, each checked by `inside`, the second by
    `inside_second` if given.
    """
    first, second = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value,) * 2
    return (
        number(name, first, what, inside, remedy),
        number(name, second, what, inside if inside_second is None else inside_second, remedy),
    )


def cu_seqlens(value: torch.Tensor, name: str, packed: torch.Tensor) -> None:
    """Check the boundaries [S+1] of the sequences packed into a tensor [total].

    Their values are read on the CPU only: on a GPU a read would synchronise.
    """
    expect(
        isinstance(value, torch.Tensor) and value.dtype in INTEGER_TYPES,
        "cu_seqlens",
        "an integer tensor [S+1] of the sequences' boundaries",
        value,
        tensor_remedy("cu_seqlens", value, "convert it with .int()"),
        TypeError,
    )
    not_sharded("cu_seqlens", value, "the sequences' boundaries", "pass cu_seqlens.full_tensor()")
    expect(
        packed.dim() == 1,
        name,
        "[total] beside cu_seqlens",
        packed.shape,
        "pass a padded [B, T] without cu_seqlens",
    )
    expect(
        value.dim() == 1 and len(value) > 0,
        "cu_seqlens",
        "[S+1], the boundaries of S sequences with the leading 0",
        value.shape,
        "for one sequence pass [0, total]",
    )
    same_device("cu_seqlens", value, name, packed)
    if _modes.readable(value):
        bounds = value.tolist()
        falls = [f"{a}, then {b}" for a, b in itertools.pairwise(bounds) if b < a]
        expect(
            bounds[0] == 0 and bounds[-1] == len(packed) and not falls,
            "cu_seqlens",
            f"boundaries that do not fall, from 0 to {len(packed)}, the length of {name}",
            falls[0] if falls else f"{bounds[0]} … {bounds[-1]}",
            f"count the tokens that are in {name}",
        )


def within(low: float, high: float, value: object) -> bool:
    """Return whether a value is a number, not a bool, from low to high."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def state(
    state: dict[str, Any],
    mine: dict[str, Any],
    settings: tuple[str, ...],
    possible: Mapping[str, Callable[[Any], bool]],
) -> None:
    """Check that a state has the class, entries and settings of `mine`, this object's own state,
    and that its other entries pass their tests in `possible`; a test that raises fails.
    """
    given = state if isinstance(state, dict) else {}
    expect(
        given.keys() == mine.keys(),
        "state",
        f"a dict with the entries {', '.join(sorted(mine))}",
        ", ".join(sorted(map(str, given))) or type_name(state),
        "pass what state_dict() returned",
    )
    tests: dict[str, Callable[[Any], bool]] = {
        **{name: partial(operator.eq, mine[name]) for name in ("class", *settings)},
        **possible,
    }
    for name, test in tests.items():
        try:
            right = bool(test(state[name]))
        except (TypeError, ValueError, RuntimeError, KeyError, AttributeError):
            right = False
        expect(
            right,
            "state",
            f"{name} as an object of this class and these settings saves it, {shown(mine[name])}",
            state[name],
            "load it into such an object, or begin anew",
        )
