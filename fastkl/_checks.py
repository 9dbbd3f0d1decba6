"""Checks arguments in one wording: `argument: expected X, got Y; remedy`."""

import sys
from collections.abc import Sequence

import torch
from torch.autograd import forward_ad

from . import _modes

FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER_TYPES = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
# e^50 times 1e4 (the largest |d| - clamp) and times the largest ratio, e^20, is finite in float32.
LARGEST_CLAMP = 50.0
# 1/T and T are normal float32 numbers.
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 2.0**-126, 2.0**126
# Bound on sizes, so that a product of two fits int64.
LARGEST_COUNT = 2**31 - 1


class NotDifferentiableError(TypeError, RuntimeError):
    """Raised for a derivative that fastkl does not compute; a RuntimeError too, as in torch."""


def type_name(value: object) -> str:
    """Describe the type of a value for a message."""
    return f"{value.dtype} tensor" if isinstance(value, torch.Tensor) else type(value).__name__


def shown(value: object) -> str:
    """Show a value on one short line of a message."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:60]}…"


def is_number(value: object) -> bool:
    """Return whether a value is a Python number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def described(value: object) -> str:
    """Show a number, or the type of anything else."""
    return shown(value) if isinstance(value, (int, float)) else type_name(value)


def expect(
    holds: object,
    name: str,
    what: str,
    got: object,
    remedy: str,
    error: type[Exception] = ValueError,
) -> None:
    """Raise an error unless the condition holds; for a TypeError `got` is described by its type."""
    if not holds:
        described = type_name(got) if error is TypeError else shown(got)
        raise error(f"{name}: expected {what}, got {described}; {remedy}")


def packed_remedy(name: str, value: torch.Tensor) -> str | None:
    """Say how to unpack a tensor that bitsandbytes packed, or return None."""
    for state, function in (("quant_state", "dequantize_4bit"), ("SCB", "int8_vectorwise_dequant")):
        if getattr(value, state, None) is not None:
            return f"dequantize it: bitsandbytes.functional.{function}({name}.data, {name}.{state})"
    return None


def dtype_remedy(name: str, value: torch.Tensor, otherwise: str) -> str:
    """Say how to convert a tensor to one of FLOAT_TYPES."""
    if value.is_quantized:
        otherwise = f"dequantize it: {name}.dequantize()"
    elif value.dtype.is_floating_point:
        otherwise = "convert it with .to(torch.bfloat16), times its scale if it has one"
    return packed_remedy(name, value) or otherwise


def tensor_remedy(name: str, value: object, otherwise: str) -> str:
    """Say how to pass a tensor in place of something else; `otherwise` is for a tensor."""
    made = f"pass torch.tensor({name})" if isinstance(value, (list, tuple)) else "pass a tensor"
    return otherwise if isinstance(value, torch.Tensor) else made


def logits(name: str, value: torch.Tensor, split: bool = False) -> None:
    """Check for a floating-point tensor [..., V] with V ≥ 1, or ≥ 0 for a split vocabulary."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"{name}: expected a tensor of logits [..., V], got {type(value).__name__}; pass the "
            f"model's output.logits as a torch.Tensor"
        )
    if value.dtype not in FLOAT_TYPES:
        raise TypeError(
            f"{name}: expected float32, bfloat16, float16 or float64 logits, got {value.dtype}; "
            + dtype_remedy(
                name,
                value,
                "pass the model's output before softmax or argmax, or convert it with .float()",
            )
        )
    plain(name, value, "logits [..., V]", f"pass the whole ones: {name}.full_tensor()")
    if value.dim() == 0 or (value.shape[-1] == 0 and not split):
        raise ValueError(
            f"{name}: expected a vocabulary of at least one entry in the last dimension, got shape "
            f"{tuple(value.shape)}; pass output.logits, or one row as [V]"
        )


def not_forward_mode(name: str, value: torch.Tensor) -> None:
    """Check for a tensor without a tangent."""
    if (
        not torch.compiler.is_compiling()
        and forward_ad._current_level >= 0
        and forward_ad.unpack_dual(value).tangent is not None
    ):
        refuse_forward_mode(name)


def refuse_forward_mode(name: str) -> None:
    """Raise for a tangent, which the kernels would drop."""
    raise NotDifferentiableError(
        f"{name}: expected a tensor without a tangent, got one of forward-mode differentiation "
        f"(torch.func.jvp, jacfwd, hessian), which is not implemented; use .backward() or "
        f"torch.autograd.grad, and for second derivatives autograd of "
        f"fastkl.reference.row_statistics with float64 logits"
    )


def plain(name: str, value: torch.Tensor, what: str, remedy: str) -> None:
    """Check for a strided tensor, whole on this process and without a tangent; `remedy` is for a
    DTensor.
    """
    if type(value) is not torch.Tensor or value.is_nested or value.layout is not torch.strided:
        not_sharded(name, value, what, remedy)
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        not_forward_mode(name, value)


def not_sharded(name: str, value: torch.Tensor, what: str, remedy: str) -> None:
    """Check for a strided tensor that is whole on this process; `remedy` is for a DTensor."""
    expected = f"{name}: expected a plain tensor, {what}, got"
    if type(value) is not torch.Tensor and hasattr(type(value), "full_tensor"):
        raise TypeError(f"{expected} a DTensor, of which each process holds a part; {remedy}")
    if value.is_nested:
        raise TypeError(
            f"{expected} a nested tensor; pad it by to_padded_tensor, beside a mask, or "
            f"pass the .values() of every jagged argument"
        )
    if value.layout is not torch.strided:
        raise TypeError(f"{expected} one of layout {value.layout}; pass {name}.to_dense()")


def local_or_full(name: str) -> str:
    """Say how to convert a DTensor with one entry per token."""
    return f"pass {name}.full_tensor(), or {name}.to_local() where the others are local"


def two_logits(
    name: str, value: torch.Tensor, other_name: str, other: torch.Tensor, split: bool = False
) -> None:
    """Check logits of two models: of the same shape, unless the vocabulary is split."""
    logits(name, value, split)
    logits(other_name, other, split)
    if not split:
        same_shape(other_name, other, name, value)


def same_shape(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Check that two tensors have the same shape and device, and both are float64 or neither."""
    if value.shape != other.shape:
        hint = (
            shared_vocabulary((name,), value.shape[-1], (other_name,), other.shape[-1], "..., ")
            if value.shape[:-1] == other.shape[:-1]
            else "align the batch and time dimensions"
        )
        raise ValueError(
            f"{name}: expected the shape of {other_name}, {tuple(other.shape)}, got "
            f"{tuple(value.shape)}; {hint}"
        )
    same_device_and_precision(name, value, other_name, other)


def shared_vocabulary(
    names: tuple[str, ...], width: int, others: tuple[str, ...], other: int, before: str = ""
) -> str:
    """Name the slices that cut the tensors with the wider vocabulary to the smaller one."""
    wider = names if width > other else others
    slices = " and ".join(f"{each}[{before}:{min(width, other)}]" for each in wider)
    return f"slice the padded vocabulary to the shared one: {slices}"


def same_device(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Check that two tensors are on the same device."""
    if value.device != other.device:
        raise ValueError(
            f"{name}: expected the device of {other_name}, {other.device}, got {value.device}; "
            f"move one with .to()"
        )


def same_device_and_precision(
    name: str, value: torch.Tensor, other_name: str, other: torch.Tensor
) -> None:
    """Check that two tensors are on the same device, and both are float64 or neither."""
    if value.device != other.device:
        same_device(name, value, other_name, other)
    if (value.dtype == torch.float64) != (other.dtype == torch.float64):
        raise TypeError(
            f"{name}: expected float64 like {other_name} or neither, got {value.dtype} and "
            f"{other.dtype}; convert one with .to()"
        )


def per_row(
    name: str,
    value: torch.Tensor,
    leading: torch.Size,
    device: torch.device,
    types: tuple[torch.dtype, ...],
    kind: str,
    remedy: str,
) -> None:
    """Check for a tensor with one entry per token: per row of logits or of hidden states.

    kind: `types` in words; remedy: for another type.
    """
    if not isinstance(value, torch.Tensor) or value.dtype not in types:
        remedy = tensor_remedy(name, value, remedy)
        raise TypeError(f"{name}: expected {kind}, got {type_name(value)}; {remedy}")
    not_sharded(name, value, "one entry per token", local_or_full(name))
    if value.shape != leading:
        raise ValueError(
            f"{name}: expected the leading shape {tuple(leading)}, one entry per token without the "
            f"vocabulary or hidden dimension, got {tuple(value.shape)}; align batch and time"
        )
    if value.device != device:
        raise ValueError(
            f"{name}: expected the device of the other tensors, {device}, got {value.device}; move "
            f"it with .to()"
        )


def list_shape(name: str, ids: torch.Tensor, leading: Sequence[int]) -> torch.Size:
    """Return the shape [..., K] of a list per token; K = 1 for an object that per_row rejects."""
    if not isinstance(ids, torch.Tensor) or ids.is_nested:
        return torch.Size((*leading, 1))
    expect(
        ids.dim() == len(leading) + 1 and ids.shape[-1] > 0,
        name,
        f"integer ids [..., K] with K ≥ 1 and the leading shape {tuple(leading)}",
        tuple(ids.shape),
        f"one id per token is {name}[..., None]",
    )
    return torch.Size((*leading, ids.shape[-1]))


def mask(value: torch.Tensor | None, leading: torch.Size, device: torch.device) -> None:
    """Check for None or a bool tensor of the leading shape."""
    if value is not None:
        what, remedy = "a bool tensor, True where the token counts", "convert it with .bool()"
        per_row("mask", value, leading, device, (torch.bool,), what, remedy)


def tokens(
    value: torch.Tensor, leading: torch.Size, device: torch.device, name: str = "tokens"
) -> None:
    """Check for an integer tensor of the leading shape."""
    what, remedy = "an integer tensor of token ids", "convert it with .long()"
    per_row(name, value, leading, device, INTEGER_TYPES, what, remedy)


def temperature(
    value: float | torch.Tensor,
    leading: torch.Size,
    device: torch.device,
    name: str = "temperature",
) -> None:
    """Check for a number within 2^-126 … 2^126, or a float tensor [...] (values are not read)."""
    if isinstance(value, torch.Tensor):
        if value.requires_grad:
            raise ValueError(temperature_gradient(name))
        if value.dtype in FLOAT_TYPES and value.dim() == 0 and leading:
            raise ValueError(
                f"{name}: expected a number or the leading shape {tuple(leading)}, one entry per "
                f"token, got a tensor of shape (); pass float({name}), or "
                f"{name}.expand({tuple(leading)}) to stay on the device"
            )
        per_row(
            name,
            value,
            leading,
            device,
            FLOAT_TYPES,
            "a number or a float tensor",
            "convert it with .float()",
        )
        not_forward_mode(name, value)
    elif not is_number(value):
        what = "a positive number or a float tensor of the leading shape"
        floats = hasattr(value, "__float__")
        remedy = f"pass float({name})" if floats else tensor_remedy(name, value, "")
        expect(False, name, what, value, remedy, TypeError)
    elif not LOWEST_TEMPERATURE <= value <= HIGHEST_TEMPERATURE:
        what = "a positive finite number within 2^-126 … 2^126"
        expect(False, name, what, value, "pass 1.0, which leaves the logits as they are")


def fixed_temperature(name: str, value: float, elsewhere: str) -> None:
    """Check the temperature of a module, a number; the function `elsewhere` takes one per token."""
    remedy = f"call {elsewhere} for a temperature per token"
    expect(not isinstance(value, torch.Tensor), name, "a positive number", value, remedy, TypeError)
    temperature(value, torch.Size(), torch.device("cpu"), name)


def temperature_gradient(name: str) -> str:
    """Say that a temperature must not require a gradient."""
    return (
        f"{name}: expected a tensor without gradient, got one that requires it; fastkl does not "
        f"differentiate with respect to the temperature: pass {name}.detach()"
    )


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Check for one of a few strings."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(
            f"{name}: expected one of {', '.join(map(repr, allowed))}, got "
            f"{shown(repr(value)) if isinstance(value, str) else type_name(value)}; pass "
            f"{allowed[0]!r}, for instance"
        )


def clamp(name: str, value: float | None) -> None:
    """Check the bound of a difference of log-probabilities: None or a number in (0, 50]."""
    if value is not None:
        _number(name, value)
        expected = f"a number above 0 and up to {LARGEST_CLAMP:g}, since e^{name} must stay finite"
        expect(0 < value <= LARGEST_CLAMP, name, expected, value, "pass None for no clamp")


def share(name: str, value: float) -> None:
    """Check the share of a model in a mixture: a number in [0, 1]."""
    _number(name, value)
    expect(0 <= value <= 1, name, "a number in [0, 1]", value, "pass 0.5 for equal shares")


def positive(name: str, value: float, remedy: str) -> None:
    """Check for a finite number above 0."""
    _number(name, value)
    expect(0 < value <= sys.float_info.max, name, "a finite number above 0", value, remedy)


def _number(name: str, value: float) -> None:
    """Check for a Python number."""
    expect(is_number(value), name, "a number", value, f"for a tensor pass float({name})", TypeError)


def normalizer(value: float | torch.Tensor | None, reduction: str, device: torch.device) -> None:
    """Check the divisor of a mean: None, a positive number, or a tensor of one entry, which may be
    0 for an empty batch and is read only if that needs no synchronisation.
    """
    if value is None:
        return
    expect(
        reduction.endswith("mean"),
        "normalizer",
        f"None with reduction={reduction!r}",
        described(value),
        "it is for means, use reduction='mean'",
    )
    remedy = "pass the number of tokens (sequences) in all micro-batches, or that / world_size"
    if isinstance(value, torch.Tensor):
        not_sharded("normalizer", value, "how many tokens count", "pass normalizer.full_tensor()")
        single = value.numel() == 1
        expect(
            single and value.dtype in FLOAT_TYPES + INTEGER_TYPES,
            "normalizer",
            "a number or a tensor of one number",
            value if single else f"{type_name(value)} of shape {tuple(value.shape)}",
            remedy,
            TypeError if single else ValueError,
        )
        not_forward_mode("normalizer", value)
        expect(
            value.device == device,
            "normalizer",
            f"the device of the other tensors, {device}",
            value.device,
            "move it with .to()",
        )
        if not _modes.readable(value):
            return
        value = value.detach().item() or 1.0  # 0 is valid
    what, finite = "a number or a tensor of one number", torch.finfo(torch.float32)
    expect(is_number(value), "normalizer", what, value, remedy, TypeError)
    remedy = f"{remedy}, or a tensor, which may be 0"
    inside = finite.tiny <= value <= finite.max
    expect(inside, "normalizer", "a finite number above 0", value, remedy)
