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
)


def _plain_float_tensor(name: str, value: torch.Tensor, what: str) -> None:
    """Check for a tensor of one of FLOAT_TYPES that is whole on this process."""
    if not isinstance(value, torch.Tensor):
        expect(False, name, f"a tensor, {what}", value, "pass the model's own", TypeError)
    plain(
        name,
        value,
        what,
        "compute the loss inside the forward of the FSDP module that owns it, or after its "
        "unshard(), where it is whole and its gradient is reduced; of a tensor-parallel lm_head "
        "pass Head(weight.to_local(), shard=VocabShard.dtensor(weight.t()))",
    )
    if value.dtype not in FLOAT_TYPES:
        raise TypeError(
            f"{name}: expected float32, bfloat16, float16 or float64, {what}, got "
            f"{value.dtype}; " + dtype_remedy(name, value, "convert it with .to()")
        )
    if value.shape == (0,) and not name.endswith("hidden"):
        raise ValueError(
            f"{name}: expected {what}, got shape (0,), as of a parameter that ZeRO-3 keeps in "
            f"parts; gather it around forward and backward: "
            f"with deepspeed.zero.GatheredParameters([{name}])"
        )


class Names(NamedTuple):
    """The names of one model's tensors in messages."""

    hidden: str
    weight: str
    bias: str


def head(
    names: Names, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Check one model's hidden states [..., H], weight [V, H] and bias [V] or None, all of one type
    on one device.
    """
    name = names.hidden
    _plain_float_tensor(name, hidden, "hidden states [..., H]")
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(
            f"{name}: expected hidden states [..., H] with H of at least 1, got shape "
            f"{tuple(hidden.shape)}; pass the model's last hidden states"
        )
    _plain_float_tensor(names.weight, weight, "the lm_head's weight [V, H]")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"{names.weight}: expected [V, {hidden.shape[-1]}] with V of at least 1, the last "
            f"dimension that of {name}, got {tuple(weight.shape)}; "
            + (
                packed_remedy(names.weight, weight)
                or "pass lm_head.weight as it is, not transposed"
            )
        )
    if bias is not None:
        _plain_float_tensor(names.bias, bias, "the lm_head's bias [V]")
        expect(
            bias.shape == weight.shape[:1],
            names.bias,
            f"one entry per row of {names.weight}, {tuple(weight.shape[:1])}",
            tuple(bias.shape),
            "pass lm_head.bias",
        )
    for other, value in zip((names.weight, names.bias), (weight, bias), strict=True):
        if value is not None and value.dtype != hidden.dtype:
            raise TypeError(
                f"{other}: expected the type of {name}, {hidden.dtype}, got {value.dtype}; convert "
                f"one with .to(), or use torch.autocast"
            )
        if value is not None and value.device != hidden.device:
            same_device(other, value, name, hidden)


def absent(given: dict[str, object], where: str, remedy: str) -> None:
    """Check that arguments without meaning are None; where: such as "beside a Head"."""
    for name, value in given.items():
        expect(value is None, name, f"None {where}", described(value), remedy)


def given_logits(
    logits: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, others: dict[str, object]
) -> None:
    """Check ref_logits [..., V], and that the arguments they replace are None."""
    absent(others, "beside ref_logits", "pass the reference's logits or its hidden states")
    _plain_float_tensor("ref_logits", logits, "logits [..., V]")
    expected = (*hidden.shape[:-1], weight.shape[0])
    expect(
        logits.shape == expected,
        "ref_logits",
        f"the shape {expected}",
        tuple(logits.shape),
        "slice a padded vocabulary to the shared one: ref_logits[..., :V], or weight[:V] and "
        "bias[:V]",
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

    own_bias: the second model is a Head, with its own bias even if it shares the weight.
    """
    (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias) = first, second
    head(names[1], ref_hidden, ref_weight, ref_bias)
    if ref_weight is weight and not own_bias and (bias is None) != (ref_bias is None):
        raise ValueError(
            f"ref_bias: expected {'None' if bias is None else 'a tensor'} as for {names[0].bias}, "
            f"where both models share one lm_head, got {'None' if ref_bias is None else 'a tensor'}"
            f"; pass ref_bias={names[0].bias}"
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
    """Check for None or a positive number that float32 can represent, and its inverse too."""
    if value is not None:
        number(
            name,
            "None for no soft cap, or a positive finite number",
            value,
            "pass the final_logit_softcapping of the model's config",
        )


def number(name: str, what: str, value: float, remedy: str = "pass numbers nearer to 1") -> None:
    """Check for a number within 2^-126 … 2^126, the range of temperatures."""
    expect(
        is_number(value) and LOWEST_TEMPERATURE <= value <= HIGHEST_TEMPERATURE,
        name,
        f"{what} within 2^-126 … 2^126",
        value,
        remedy,
        ValueError if is_number(value) else TypeError,
    )


def options(
    logits_dtype: torch.dtype | None,
    chunk_size: int | None = None,
    recompute: bool | None = None,
) -> None:
    """Check that the options are None or, in order, a float type, a number of tokens and a bool;
    logits_dtype_for checks the type against the inputs.
    """
    remedy = "pass None, which chooses one"
    expect(
        chunk_size is None or (isinstance(chunk_size, int) and not isinstance(chunk_size, bool)),
        "chunk_size",
        "a whole number of tokens or None",
        chunk_size,
        remedy,
        TypeError,
    )
    expect(
        chunk_size is None or 1 <= chunk_size < 2**63,
        "chunk_size",
        "at least 1 token, and fewer than 2^63",
        chunk_size,
        remedy,
    )
    expect(
        recompute is None or isinstance(recompute, bool),
        "recompute",
        "True, False or None",
        recompute,
        "pass None, which keeps logits of up to 2 GiB",
        TypeError,
    )
    known = isinstance(logits_dtype, torch.dtype)
    expect(
        logits_dtype is None or (known and logits_dtype in FLOAT_TYPES),
        "logits_dtype",
        "None, float32, bfloat16, float16 or float64",
        logits_dtype,
        "pass torch.float32, for instance",
        ValueError if known else TypeError,
    )


def logits_dtype_for(value: torch.dtype | None, default: torch.dtype) -> None:
    """Check for None, the default or float32; with float64 inputs, only float64."""
    widest = default in (torch.float32, torch.float64)
    allowed = (default,) if widest else (default, torch.float32)
    expect(
        value is None or value in allowed,
        "logits_dtype",
        f"None or {' or '.join(map(str, allowed))} for these inputs",
        value,
        "convert the inputs with .to() for logits of another type",
    )
