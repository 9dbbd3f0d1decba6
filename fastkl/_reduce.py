"""Reduces one value per token to a scalar: Σ weights·x / normalizer."""

import math
from collections.abc import Sequence
from typing import get_args

import torch

from . import _checks
from ._types import Reduction

REDUCTIONS = get_args(Reduction)


def check(
    reduction: str,
    weights: torch.Tensor | None,
    normalizer: float | torch.Tensor | None,
    leading: torch.Size,
    device: torch.device,
) -> None:
    """Check the arguments of a reduction that may be "none"."""
    if weights is None and normalizer is None and type(reduction) is str and reduction == "none":
        return  # Python dominates a call with few rows
    _checks.choice("reduction", reduction, REDUCTIONS)
    if weights is not None:
        _checks.expect(
            reduction != "none",
            "weights",
            "None with reduction='none'",
            _checks.type_name(weights),
            "multiply the result instead, or use reduction='sum'",
        )
        _checks.per_row(
            "weights",
            weights,
            leading,
            device,
            _checks.FLOAT_TYPES,
            "a float tensor, what each token counts",
            "convert it with .float()",
        )
    _checks.normalizer(normalizer, reduction, device)


def tokens(
    mask: torch.Tensor | None, leading: Sequence[int], dtype: torch.dtype
) -> torch.Tensor | int:
    """Count the unmasked tokens; with a mask, as a tensor of type dtype, without synchronising."""
    return math.prod(leading) if mask is None else mask.sum(dtype=dtype)


def sequences(
    mask: torch.Tensor | None, leading: Sequence[int], dtype: torch.dtype
) -> torch.Tensor | int:
    """Count the sequences, along the last leading dimension, that have an unmasked token."""
    if mask is None:
        return math.prod(leading[:-1]) if math.prod(leading) else 0
    return (mask.any(-1) if mask.dim() else mask).sum(dtype=dtype)


def divisor(
    reduction: str,
    normalizer: float | torch.Tensor | None,
    mask: torch.Tensor | None,
    leading: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor | float:
    """Return the divisor, a number or scalar tensor, of the sum over tokens, of type dtype.

    It is 1 without tokens (sequences). A tensor 0 becomes inf, so that every finite sum and its
    gradient are 0; a negative tensor becomes NaN.
    """
    if reduction == "sum":
        return 1
    if isinstance(normalizer, torch.Tensor):
        normalizer = normalizer.reshape(()).to(dtype)
        return torch.where(
            normalizer >= 0, torch.where(normalizer == 0, math.inf, normalizer), math.nan
        )
    if normalizer is not None:
        return normalizer
    return at_least_one(
        (sequences if reduction == "sequence_mean" else tokens)(mask, leading, dtype)
    )


def at_least_one(count: torch.Tensor | int) -> torch.Tensor | int:
    """Return the count, or 1 for 0, as the divisor of a mean."""
    return count.clamp(min=1) if isinstance(count, torch.Tensor) else max(1, count)


def reduced(
    values: torch.Tensor,
    mask: torch.Tensor | None,
    weights: torch.Tensor | None,
    reduction: str,
    normalizer: float | torch.Tensor | None,
) -> torch.Tensor:
    """Sum or average values [...], which are exactly 0 where the mask is False, or return them with
    "none"; a masked token's weight may have any value.
    """
    if reduction == "none":
        return values
    if weights is not None:
        weights = weights.to(values.dtype)
        values = values * (weights if mask is None else torch.where(mask, weights, 0.0))
    total = values.sum()
    return (
        total
        if reduction == "sum"
        else quotient(
            total, divisor(reduction, normalizer, mask, values.shape, values.dtype), normalizer
        )
    )


def quotient(
    total: torch.Tensor,
    divisor: torch.Tensor | float,
    normalizer: float | torch.Tensor | None,
) -> torch.Tensor:
    """Return total / divisor; 0 for a normalizer of 0, also if the total is infinite."""
    return (
        torch.where(divisor.isinf(), 0.0, total / divisor)
        if isinstance(normalizer, torch.Tensor) and isinstance(divisor, torch.Tensor)
        else total / divisor
    )
