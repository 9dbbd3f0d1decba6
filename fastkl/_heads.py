"""Arguments of the functions on hidden states: a model's lm_head, the checks that all functions
share, and packing for the ops.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from . import _checks, _head_checks, backend
from .ops import dual_op
from .ops.fields import result_dtype
from .ops.linear_op import LinearInputs
from .ops.lm_head import Six

# Bytes up to which the logits of all models are kept until backward by default.
LARGEST_KEPT = 1 << 31
# Evaluated once: not every torch release can trace is_autocast_available.
_AUTOCAST_DEVICES = frozenset(
    name for name in ("cpu", "cuda") if torch.amp.is_autocast_available(name)
)


class Head(NamedTuple):
    """One model's lm_head, accepted wherever `weight` or `ref_weight` is.

    Equivalent to

        logits = F.linear(hidden, weight, bias).to(logits_dtype).float() * logit_scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)

    before the temperature. weight: [V, H]. bias: [V] or None. softcap: a positive number or None.
    logit_scale: a positive number. A Head inherits nothing from the arguments beside it or from the
    other model.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0


# Names of a model's tensors in messages, by prefix and by whether a Head was given.
_NAMES = {
    (prefix, inside): _head_checks.Names(
        f"{prefix}hidden",
        f"{prefix}weight.weight" if inside else f"{prefix}weight",
        f"{prefix}weight.bias" if inside else f"{prefix}bias",
    )
    for prefix in ("", "ref_")
    for inside in (False, True)
}


class Given(NamedTuple):
    """The arguments that all functions on hidden states share, as the user passed them."""

    hidden: torch.Tensor
    weight: torch.Tensor | Head
    bias: torch.Tensor | None
    ref_hidden: torch.Tensor | None
    ref_weight: torch.Tensor | Head | None
    ref_bias: torch.Tensor | None
    temperature: float | torch.Tensor
    ref_temperature: float | torch.Tensor | None
    softcap: float | None
    mask: torch.Tensor | None
    logits_dtype: torch.dtype | None
    chunk_size: int | None
    recompute: bool | None


def prepare(
    given: Given, *, reference_required: bool = False, swapped: bool = False
) -> LinearInputs:
    """Check the arguments, cast them under autocast, and pack them for an op.

    swapped: exchange policy and reference.
    """
    hidden, weight, _, ref_hidden, ref_weight, *_ = given
    if reference_required and ref_hidden is None:
        _head_checks.reference_given(ref_hidden)
    inherited = ref_hidden is not None and ref_weight is None and isinstance(weight, Head)
    heads = (
        _head("weight", weight, "bias", given.bias, given.softcap),
        _head(
            "ref_weight",
            weight if inherited else ref_weight,
            "ref_bias",
            given.ref_bias,
            given.softcap,
        ),
    )
    _head_checks.softcap(given.softcap)
    names = _NAMES["", isinstance(weight, Head)], _NAMES["ref_", isinstance(ref_weight, Head)]
    shared = heads[1].weight is heads[0].weight
    six = Six(
        hidden,
        heads[0].weight,
        heads[0].bias,
        ref_hidden,
        None if shared else heads[1].weight,
        heads[1].bias,
    )
    device = hidden.device.type if isinstance(hidden, torch.Tensor) else "cpu"
    if device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
        six = Six(*[_autocast(value) for value in six])
    _head_checks.head(names[0], *six[:3])
    _head_checks.second_head(
        six[:3],
        (six.ref_hidden, six.weight if shared else six.ref_weight, six.ref_bias),
        names,
        own_bias=inherited or isinstance(ref_weight, Head),
    )
    hidden, ref_hidden = six.hidden, six.ref_hidden
    scales = _scales(heads, given, hidden)
    _checks.mask(given.mask, hidden.shape[:-1], hidden.device)
    _head_checks.chunk_size(given.chunk_size)
    _head_checks.recompute(given.recompute)
    logits_dtype = hidden.dtype
    if ref_hidden is not None and ref_hidden.dtype != hidden.dtype:
        logits_dtype = torch.float32
    _head_checks.logits_dtype(given.logits_dtype, logits_dtype)
    engine = (
        backend.select(hidden, read_rows=False)
        if ref_hidden is None
        else backend.select(hidden, ref_hidden, read_rows=False)
    )
    if swapped:
        six, scales = _swapped(six), scales[::-1]
    first, second = scales
    # s·x under a soft cap of c is s·(x under a cap of c/s): the ops take caps of raw logits.
    dtype = result_dtype(six.hidden)
    temperature, ratio = first.divisor(dtype), second.ratio_to(first, dtype)
    temperatures = temperature if isinstance(temperature, torch.Tensor) else None
    ratios = ratio if isinstance(ratio, torch.Tensor) else None
    if not isinstance(ratio, torch.Tensor):
        what = "the quotient of both models' temperature / logit_scale"
        _head_checks.within_float32("ref_temperature", what, ratio)
    return LinearInputs(
        *six,
        given.mask,
        temperatures,
        ratios,
        1.0 if isinstance(temperature, torch.Tensor) else temperature,
        first.softcap / first.factor,
        second.softcap / second.factor,
        1.0 if isinstance(ratio, torch.Tensor) else ratio,
        engine,
        given.logits_dtype or logits_dtype,
        given.chunk_size,
    )


def learning(inputs: LinearInputs) -> str:
    """Return the names of Six that require gradient, comma-separated."""
    if not torch.is_grad_enabled():
        return ""
    names = []
    for name, value in zip(Six._fields, inputs[:6], strict=True):
        if value is not None and value.requires_grad:
            names.append(name)
    return ",".join(names)


def keeps_logits(inputs: LinearInputs, recompute: bool | None) -> bool:
    """Return whether forward keeps all logits for backward.

    Never without a backward, nor inside a transform of torch.func, which may call it for any number
    of samples. An exported graph may be for any number of tokens: only with recompute=False.
    """
    if recompute or dual_op.transforming() or not learning(inputs):
        return False
    if recompute is False or torch.compiler.is_exporting():
        return recompute is False
    models = 1 if inputs.ref_hidden is None else 2
    logits = models * inputs.hidden.shape[:-1].numel() * inputs.weight.shape[0]
    return logits * inputs.logits_dtype.itemsize <= LARGEST_KEPT


def _swapped(six: Six) -> Six:
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = six
    assert ref_hidden is not None
    first, second = (weight, None) if ref_weight is None else (ref_weight, weight)
    return Six(ref_hidden, first, ref_bias, hidden, second, bias)


def _head(
    name: str,
    weight: torch.Tensor | Head | None,
    bias_name: str,
    bias: torch.Tensor | None,
    softcap: float | None,
) -> Head:
    """Return a model's Head; for a plain weight make one of the arguments beside it."""
    if not isinstance(weight, Head):
        return Head(weight, bias, softcap)  # type: ignore[arg-type]  # None without ref_hidden; _head_checks.head refuses it with one
    for other, value in ((bias_name, bias), ("softcap", softcap)):
        if value is not None:
            raise ValueError(
                f"{other}: expected None beside a Head as {name}, got "
                f"{_checks.type_name(value) if other == bias_name else _checks.shown(value)}; give "
                f"each model a Head with its own"
            )
    _head_checks.softcap(weight.softcap, f"{name}.softcap")
    _head_checks.logit_scale(f"{name}.logit_scale", weight.logit_scale)
    return weight


class _Scale(NamedTuple):
    """The numbers between one model's raw logits and its log-softmax: softcap (0: none),
    logit_scale (factor), temperature.
    """

    softcap: float
    factor: float
    temperature: float | torch.Tensor

    def divisor(self, dtype: torch.dtype) -> float | torch.Tensor:
        """Return the temperature of the raw logits."""
        if not isinstance(self.temperature, torch.Tensor):
            return self.temperature / self.factor
        return (
            self.temperature
            if self.factor == 1
            else (self.temperature.double() / self.factor).to(dtype)
        )

    def ratio_to(self, first: _Scale, dtype: torch.dtype) -> float | torch.Tensor:
        """Return the first model's divisor over this one's; NaN for a tensor's entry out of the
        range of temperatures.
        """
        if self.temperature is first.temperature:
            return self.factor / first.factor
        numerator, denominator = (
            value.double() if isinstance(value, torch.Tensor) else value
            for value in (first.temperature, self.temperature)
        )
        ratio = (numerator * self.factor) / (denominator * first.factor)
        if not isinstance(ratio, torch.Tensor):
            return ratio
        valid = (
            _in_range(ratio) & _in_range(denominator)
            if isinstance(denominator, torch.Tensor)
            else _in_range(ratio)
        )
        return torch.where(valid, ratio, float("nan")).to(dtype)


def _in_range(value: torch.Tensor) -> torch.Tensor:
    return (value >= _checks.LOWEST_TEMPERATURE) & (value <= _checks.HIGHEST_TEMPERATURE)


def _scales(heads: tuple[Head, Head], given: Given, hidden: torch.Tensor) -> tuple[_Scale, _Scale]:
    """Check both temperatures, and that their quotients with the heads' numbers fit float32."""
    temperature, ref_temperature = given.temperature, given.ref_temperature
    leading, device = hidden.shape[:-1], hidden.device
    if given.ref_hidden is None and ref_temperature is not None:
        raise ValueError(
            f"ref_temperature: expected None without ref_hidden, got "
            f"{_checks.shown(ref_temperature)}; pass ref_hidden too"
        )
    _checks.temperature(temperature, leading, device)
    first = second = temperature if isinstance(temperature, torch.Tensor) else float(temperature)
    if ref_temperature is not None:
        _checks.temperature(ref_temperature, leading, device, "ref_temperature")
        tensor = isinstance(ref_temperature, torch.Tensor)
        second = ref_temperature if tensor else float(ref_temperature)
    ref_head = heads[0] if given.ref_hidden is None else heads[1]
    return _scale("", heads[0], first, hidden), _scale("ref_", ref_head, second, hidden)


def _scale(
    prefix: str, head: Head, temperature: float | torch.Tensor, hidden: torch.Tensor
) -> _Scale:
    """Return one model's scale after checking it."""
    scale = _Scale(float(head.softcap or 0.0), float(head.logit_scale), temperature)
    if scale.factor != 1:
        name, divisor = f"{prefix}weight.logit_scale", scale.divisor(hidden.dtype)
        if scale.softcap:
            _head_checks.within_float32(name, "softcap / logit_scale", scale.softcap / scale.factor)
        if not isinstance(divisor, torch.Tensor):
            _head_checks.within_float32(name, "temperature / logit_scale", divisor)
    return scale


def _autocast(value: Any) -> Any:
    """Cast as F.linear under autocast: float32 and 16-bit tensors to the autocast type."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    device = value.device.type
    if value.dtype == torch.float64 or device not in _AUTOCAST_DEVICES:
        return value
    return value.to(torch.get_autocast_dtype(device))
