"""The one place that checks arguments and words errors: argument, what was expected, what came, what to do."""

from __future__ import annotations

import math

import torch
from torch.autograd import forward_ad

FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER_TYPES = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def _type_name(value: object) -> str:
    return f"{value.dtype} tensor" if isinstance(value, torch.Tensor) else type(value).__name__


def logits(name: str, value: torch.Tensor) -> None:
    """A floating-point tensor [..., V] with V ≥ 1."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor of logits [..., V], got {type(value).__name__}")
    if value.dtype not in FLOAT_TYPES:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64 logits, got {value.dtype}; "
                        f"pass the model's output before softmax or argmax, or convert it with .float()")
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
        raise RuntimeError(f"{name}: forward-mode differentiation (torch.func.jvp, jacfwd) is not implemented, it would give zeros; use .backward(), "
                           f"torch.autograd.grad, or fastkl.reference.row_statistics")
    if value.dim() == 0:
        raise ValueError(f"{name}: expected logits [..., V] with at least one dimension, got a scalar")
    if value.shape[-1] == 0:
        raise ValueError(f"{name}: expected a vocabulary of at least one entry in the last dimension, got shape {tuple(value.shape)}")


def same_shape(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Two logits tensors of the same shape, on the same device, both float64 or neither."""
    if value.shape != other.shape:
        hint = "slice the padded vocabulary to the shared one" if value.shape[:-1] == other.shape[:-1] else "align the batch and time dimensions"
        raise ValueError(f"{name}: expected the shape of {other_name}, {tuple(other.shape)}, got {tuple(value.shape)}; {hint}")
    if value.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {value.device}; move one with .to()")
    if (value.dtype == torch.float64) != (other.dtype == torch.float64):
        raise TypeError(f"{name}: expected float64 like {other_name} or neither, got {value.dtype} and {other.dtype}; convert one with .to()")


def per_row(name: str, value: torch.Tensor, leading: torch.Size, device: torch.device) -> None:
    """A tensor with one entry per row of the logits."""
    if value.shape != leading:
        raise ValueError(f"{name}: expected the logits' leading shape {tuple(leading)}, got {tuple(value.shape)}; "
                         f"one entry per token, without the vocabulary dimension")
    if value.device != device:
        raise ValueError(f"{name}: expected the logits' device, {device}, got {value.device}; move it with .to()")


def mask(value: torch.Tensor | None, leading: torch.Size, device: torch.device) -> None:
    """None or a bool tensor of the leading shape."""
    if value is None:
        return
    if not isinstance(value, torch.Tensor) or value.dtype != torch.bool:
        raise TypeError(f"mask: expected a bool tensor, True where the token counts, got {_type_name(value)}; convert it with .bool()")
    per_row("mask", value, leading, device)


def tokens(value: torch.Tensor, leading: torch.Size, device: torch.device, name: str = "tokens") -> None:
    """An integer tensor of the leading shape."""
    if not isinstance(value, torch.Tensor) or value.dtype not in INTEGER_TYPES:
        raise TypeError(f"{name}: expected an integer tensor of token ids, got {_type_name(value)}; convert it with .long()")
    per_row(name, value, leading, device)


def temperature(value: float | torch.Tensor, leading: torch.Size, device: torch.device) -> None:
    """A positive finite number, or a float tensor of the leading shape whose values are the caller's care on a GPU (not positive: NaN)."""
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point():
            raise TypeError(f"temperature: expected a number or a float tensor, got {_type_name(value)}; convert it with .float()")
        if value.requires_grad:
            raise ValueError("temperature: expected a tensor without gradient, got one that requires it; fastkl does not differentiate "
                             "with respect to the temperature: pass temperature.detach()")
        per_row("temperature", value, leading, device)
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"temperature: expected a positive number or a float tensor of the leading shape, got {type(value).__name__}")
    elif not (0 < value < math.inf):
        raise ValueError(f"temperature: expected a positive finite number, got {value}; the logits are divided by it")


def tokens_in_range(value: torch.Tensor, vocabulary: int) -> None:
    """Token ids within 0 … V-1, where looking at them costs no synchronisation."""
    if value.numel() and (int(value.min()) < 0 or int(value.max()) >= vocabulary):
        bad = value[(value < 0) | (value >= vocabulary)][0]
        raise ValueError(f"tokens (index): expected ids in 0 … {vocabulary - 1}, got {int(bad)}; ignored positions belong under a mask (token_stats)")


def temperatures_positive(value: torch.Tensor) -> None:
    """Temperatures above 0 and finite, where looking at them costs no synchronisation."""
    good = (value > 0) & (value < math.inf)
    if not bool(good.all()):
        raise ValueError(f"temperature: expected positive finite values, got {float(value[~good][0])}; the logits are divided by it")


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """One of a few strings."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
