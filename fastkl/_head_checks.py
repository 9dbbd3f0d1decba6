"""Checks of the arguments of functions on hidden states, worded as in _checks.py."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ._checks import (
    FLOAT_TYPES,
    HIGHEST_TEMPERATURE,
    LOWEST_TEMPERATURE,
    described,
    dtype_remedy,
    expect,
    is_number,
    packed_remedy,
    plain,
    same_device,
    same_device_and_precision,
    shared_vocabulary,
    shown,
    type_name,
)


def _plain_float_tensor(name: str, value: torch.Tensor, what: str) -> None:
    """Check for a tensor of one of FLOAT_TYPES that this process holds whole."""
    expect(
        isinstance(value, torch.Tensor),
        name,
        f"a tensor, {what}",
        value,
        "pass the model's own",
        TypeError,
    )
    plain(
        name,
        value,
        what,
        "compute the loss inside the forward of the FSDP module that owns it, or after its "
        "unshard(), where it is whole and its gradient is reduced",
    )
    if value.dtype not in FLOAT_TYPES:
        raise TypeError(
            f"{name}: expected float32, bfloat16, float16 or float64, {what}, got "
            f"{value.dtype}; " + dtype_remedy(name, value, "convert it with .to()")
        )
    if value.shape == (0,) and not name.endswith("hidden"):
        raise ValueError(
            f"{name}: expected {what}, got shape (0,), as of a parameter that ZeRO-3 keeps in "
            f"parts; gather it around forward and backward: with "
            f"deepspeed.zero.GatheredParameters([{name}])"
        )


class Names(NamedTuple):
    """The names of one model's tensors in messages."""

    hidden: str
    weight: str
    bias: str


def head(
    names: Names, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Check hidden states [..., H], weight [V, H] and bias [V] or None of one model, of one type on
    one device.
    """
    name = names.hidden
    _plain_float_tensor(name, hidden, "hidden states [..., H]")
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(
            f"{name}: expected hidden states [..., H] with H of at least 1, got shape "
            f"{tuple(hidden.shape)}; pass the model's last hidden states"
        )
    _plain_float_tensor(names.weight, weight, "the lm_head's weight [V, H]")
    expect(
        weight.dim() != 2 or weight.shape[0] > 0,
        names.weight,
        "a vocabulary of at least one entry",
        tuple(weight.shape),
        "pass the whole weight",
    )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{names.weight}: expected [V, {hidden.shape[-1]}], the last dimension that of {name}, "
            f"got {tuple(weight.shape)}; "
            + (
                packed_remedy(names.weight, weight)
                or "pass lm_head.weight as it is, not transposed"
            )
        )
    if bias is not None:
        _plain_float_tensor(names.bias, bias, "the lm_head's bias [V]")
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{names.bias}: expected one entry per row of {names.weight}, "
                f"({weight.shape[0]},), got {tuple(bias.shape)}; pass lm_head.bias"
            )
    for other, value in zip((names.weight, names.bias), (weight, bias), strict=True):
        if value is not None and value.dtype != hidden.dtype:
            raise TypeError(
                f"{other}: expected the type of {name}, {hidden.dtype}, got {value.dtype}; convert "
                f"one with .to(), or use torch.autocast"
            )
        if value is not None:
            same_device(other, value, name, hidden)


def no_reference(weight: object, bias: object, temperature: object) -> None:
    """Check that the second model's arguments are None, as its hidden states are."""
    for name, value in (
        ("ref_weight", weight),
        ("ref_bias", bias),
        ("ref_temperature", temperature),
    ):
        expect(
            value is None, name, "None without ref_hidden", described(value), "pass ref_hidden too"
        )


def given_logits(
    logits: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, others: Sequence[Any]
) -> None:
    """Check ref_logits [..., V], and that what they replace is None."""
    for name, value in zip(("ref_hidden", "ref_weight", "ref_bias"), others, strict=True):
        expect(
            value is None,
            name,
            "None beside ref_logits",
            described(value),
            "pass the reference's logits or its hidden states",
        )
    _plain_float_tensor("ref_logits", logits, "logits [..., V]")
    expected = (*hidden.shape[:-1], weight.shape[0])
    if logits.shape != expected:
        raise ValueError(
            f"ref_logits: expected the shape {expected}, got {tuple(logits.shape)}; slice a padded "
            f"vocabulary to the shared one: ref_logits[..., :V], or weight[:V] and bias[:V]"
        )
    expect(
        not logits.requires_grad,
        "ref_logits",
        "a tensor without gradient",
        "one that requires it",
        "pass ref_logits.detach()",
    )
    same_device_and_precision("ref_logits", logits, "hidden", hidden)


def second_head(
    first: Sequence[Any], second: Sequence[Any], names: tuple[Names, Names], own_bias: bool
) -> None:
    """Check the reference's (hidden, weight, bias) against the policy's: the same tokens and
    vocabulary.

    own_bias: the second model is a Head, which has a bias of its own even if it shares the weight.
    """
    (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias) = first, second
    head(names[1], ref_hidden, ref_weight, ref_bias)
    if ref_weight is weight and not own_bias and (bias is None) != (ref_bias is None):
        raise ValueError(
            f"ref_bias: expected {'None' if bias is None else 'a tensor'} as for {names[0].bias}, "
            f"where both models share one lm_head, got "
            f"{'None' if ref_bias is None else 'a tensor'}; pass ref_bias={names[0].bias}"
        )
    if ref_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"ref_hidden: expected the leading shape of hidden, {tuple(hidden.shape[:-1])}, got "
            f"{tuple(ref_hidden.shape[:-1])}; align the batch and time dimensions"
        )
    if ref_weight.shape[0] != weight.shape[0]:
        own, second = (
            (each.weight,) if value is None else (each.weight, each.bias)
            for each, value in zip(names, (bias, ref_bias), strict=True)
        )
        remedy = shared_vocabulary(own, weight.shape[0], second, ref_weight.shape[0])
        raise ValueError(
            f"{names[1].weight}: expected the {weight.shape[0]} rows of {names[0].weight}, got "
            f"{ref_weight.shape[0]}; {remedy}"
        )
    same_device_and_precision("ref_hidden", ref_hidden, "hidden", hidden)


def softcap(value: float | None, name: str = "softcap") -> None:
    """Check for None or a positive number that float32 represents, as it does its inverse."""
    if value is not None:
        what = "None for no soft cap, or a positive finite number"
        number(name, what, value, "pass the final_logit_softcapping of the model's config")


def number(name: str, what: str, value: float, remedy: str = "pass numbers nearer to 1") -> None:
    """Check for a number within 2^-126 … 2^126, the range of temperatures."""
    what = f"{what} within 2^-126 … 2^126"
    expect(is_number(value), name, what, value, remedy, TypeError)
    expect(LOWEST_TEMPERATURE <= value <= HIGHEST_TEMPERATURE, name, what, value, remedy)


def chunk_size(value: int | None) -> None:
    """Check for None or a number of tokens."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(
            f"chunk_size: expected a whole number of tokens or None, got {type_name(value)}; pass "
            f"None, which chooses one"
        )
    if value is not None and not (1 <= value < 2**63):
        raise ValueError(
            f"chunk_size: expected at least 1 token, and fewer than 2^63, got {shown(value)}; pass "
            f"None, which chooses one"
        )


def recompute(value: bool | None) -> None:
    """Check for None or a bool."""
    expect(
        value is None or isinstance(value, bool),
        "recompute",
        "True, False or None",
        value,
        "pass None, which keeps logits of up to 2 GiB",
        TypeError,
    )


def logits_dtype(value: torch.dtype, default: torch.dtype) -> None:
    """Check for the default or float32; for float64 inputs only for float64."""
    float_type("logits_dtype", value)
    allowed = {default} if default == torch.float64 else {default, torch.float32}
    if value not in allowed:
        raise ValueError(
            f"logits_dtype: expected None or {' or '.join(sorted(map(str, allowed)))} for these "
            f"inputs, got {value}; convert the inputs with .to() for logits of another type"
        )


def float_type(name: str, value: torch.dtype | None) -> None:
    """Check a type of logits before there are inputs: None or one of FLOAT_TYPES."""
    known = isinstance(value, torch.dtype)
    expect(
        value is None or (known and value in FLOAT_TYPES),
        name,
        "None, float32, bfloat16, float16 or float64",
        value,
        "pass torch.float32, for instance",
        ValueError if known else TypeError,
    )
