"""Checks that read tensor values, which synchronises a GPU; wording as in _checks.py."""

from typing import Any

import torch

from ._checks import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE, expect

_VALUES = "positive finite values within 2^-126 … 2^126"
_REMEDY = "pass 1.0 for rows to leave as they are"


def tokens_in_range(
    value: torch.Tensor,
    vocabulary: int,
    name: str = "tokens",
    remedy: str = "ignored positions belong under a mask",
) -> None:
    """Check for token ids within 0 … V-1."""
    if value.numel() and (int(value.min()) < 0 or int(value.max()) >= vocabulary):
        bad = value[(value < 0) | (value >= vocabulary)]
        expect(False, name, f"ids in 0 … {vocabulary - 1}", int(bad[0]), remedy)


def temperatures_positive(value: torch.Tensor) -> None:
    """Check for temperatures within 2^-126 … 2^126."""
    for bad in value[~in_range(value)][:1].tolist():
        expect(False, "temperature", _VALUES, bad, _REMEDY)


def in_range(temperature: Any) -> Any:
    """Return whether temperatures are within 2^-126 … 2^126, beyond float16's range."""
    wide = temperature.double() if isinstance(temperature, torch.Tensor) else temperature
    return (wide >= LOWEST_TEMPERATURE) & (wide <= HIGHEST_TEMPERATURE)


def ratios_finite(value: torch.Tensor) -> None:
    """Check ratios of two temperatures; NaN marks one out of range."""
    expect(
        value.isfinite().all(),
        "ref_temperature",
        f"{_VALUES}, in relation to temperature too",
        "one that is not",
        _REMEDY,
    )
