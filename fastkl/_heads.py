"""Arguments of the functions on hidden states: a model's lm_head, the checks that all functions
share, and packing for the ops.
"""

from typing import Any, NamedTuple

import torch

from . import _checks, _head_checks, _modes, _value_checks, backend
from ._collectives import hidden_states
from .ops.fields import result_dtype
from .ops.linear_op import SIX, LinearInputs
from .ops.row_op import per_token
from .parallel import WHOLE, Cut, VocabShard, checked_cut

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
    logit_scale: a positive number. shard: if given, weight and bias are this process's rows of a
    vocabulary split over processes; the same for both models. A Head inherits nothing from other
    arguments or from the other model.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    shard: VocabShard | None = None


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
    ref_logits: torch.Tensor | None = None


def prepare(
    given: Given, *, reference_required: bool = False, swapped: bool = False
) -> LinearInputs:
    """Check the arguments, cast them under autocast and pack them for an op.

    swapped: exchange policy and reference, but given logits stay the second argument.
    """
    weight, ref_weight = given.weight, given.ref_weight
    inherits = given.ref_hidden is not None and ref_weight is None and isinstance(weight, Head)
    heads = (
        _head("", weight, given.bias, given.softcap),
        _head("ref_", weight if inherits else ref_weight, given.ref_bias, given.softcap),
    )
    _head_checks.softcap(given.softcap)
    names = _NAMES["", isinstance(weight, Head)], _NAMES["ref_", isinstance(ref_weight, Head)]
    shared = ref_weight is None or heads[1].weight is heads[0].weight
    models: list[list[Any]] = [
        [given.hidden, heads[0].weight, heads[0].bias],
        [given.ref_hidden, None if shared else heads[1].weight, heads[1].bias],
    ]
    device = given.hidden.device.type if isinstance(given.hidden, torch.Tensor) else "cpu"
    if device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
        models = [[_autocast(value) for value in model] for model in models]
    _head_checks.head(names[0], *models[0])
    sharded = heads[0].shard is not None or heads[1].shard is not None
    cut = _shard(heads, models, shared and given.ref_hidden is None) if sharded else WHOLE
    if shared:
        models[1][1] = models[0][1]
    (hidden, *_), (ref_hidden, *_) = models
    if given.ref_logits is not None:
        _head_checks.given_logits(
            given.ref_logits,
            hidden,
            heads[0].weight,
            {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": given.ref_bias},
        )
        heads = heads[0], Head(heads[0].weight)
    elif given.ref_hidden is None and not reference_required:
        _head_checks.absent(
            {
                "ref_weight": ref_weight,
                "ref_bias": given.ref_bias,
                "ref_temperature": given.ref_temperature,
            },
            "without ref_hidden",
            "pass ref_hidden too",
        )
    else:
        _head_checks.second_head(
            models[0], models[1], names, own_bias=inherits or isinstance(ref_weight, Head)
        )
    scales = _scales(heads, given, hidden)
    _checks.mask(given.mask, hidden.shape[:-1], hidden.device)
    logits_dtype = (
        hidden.dtype if ref_hidden is None or ref_hidden.dtype == hidden.dtype else torch.float32
    )
    if not (given.logits_dtype is None and given.chunk_size is None and given.recompute is None):
        _head_checks.options(given.logits_dtype, given.chunk_size, given.recompute)
        _head_checks.logits_dtype_for(given.logits_dtype, logits_dtype)
    reference = given.ref_logits if ref_hidden is None else ref_hidden
    engine = backend.select(hidden, hidden if reference is None else reference, read_rows=False)
    if swapped:
        scales = scales[::-1]
        if given.ref_logits is None:
            models.reverse()
    (policy, (ref_hidden, second_weight, second_bias)), (first, other) = models, scales
    # Capping s·x at c equals s·(x capped at c/s): the ops take caps of raw logits.
    dtype = result_dtype(hidden)
    temperatures, temperature = per_token(first.divisor(dtype))
    ratios, ratio = per_token(other.ratio_to(first, dtype))
    if ratio != 1:
        _head_checks.number(
            "ref_temperature", "the quotient of both models' temperature / logit_scale", ratio
        )
    return LinearInputs(
        policy[0],
        policy[1],
        policy[2],
        ref_hidden,
        None if shared else second_weight,
        second_bias,
        given.mask,
        temperatures,
        ratios,
        given.ref_logits,
        temperature,
        first.softcap / first.factor,
        other.softcap / other.factor,
        ratio,
        engine,
        given.logits_dtype or logits_dtype,
        given.chunk_size,
        given_first=swapped and given.ref_logits is not None,
        **({} if cut is WHOLE else cut._asdict()),
    )


def _shard(heads: tuple[Head, Head], models: list[list[Any]], alone: bool) -> Cut:
    """Check the shard of both heads, replace hidden states by those of all tokens, and return the
    weights' Cut.
    """
    shard, other = heads[0].shard, heads[0].shard if alone else heads[1].shard
    _checks.expect(
        isinstance(shard, VocabShard) and shard == other,
        "weight.shard",
        "one fastkl.VocabShard as the shard of both models' Heads",
        f"{type(shard).__name__} and {type(other).__name__}"
        if type(shard) is not type(other)
        else "two different ones",
        "pass the same VocabShard to both",
    )
    assert shard is not None
    cut = checked_cut(shard, "weight", len(heads[0].weight))
    _checks.expect(
        cut.width * (cut.ranks - 1) < cut.vocabulary,
        "weight.shard",
        f"rows of the vocabulary of {cut.vocabulary} on every rank",
        f"{cut.ranks} ranks of {cut.width}, of which the last has padding alone",
        "pad the lm_head less, or split it over fewer ranks",
    )
    rows = cut.columns(len(heads[0].weight))
    for model in models:
        if isinstance(model[0], torch.Tensor):
            model[0] = hidden_states(model[0], shard)
        if rows < len(heads[0].weight):  # a product would spread the padding's 0·NaN
            model[1:] = [None if value is None else value[:rows] for value in model[1:]]
    return cut


def whole_vocabulary(inputs: LinearInputs, beside: str) -> None:
    """Check that the vocabulary is not split over processes."""
    _checks.expect(
        not inputs.group,
        "weight.shard",
        f"None beside {beside}",
        "a shard",
        "gather the weight, or the logits for the function on logits",
    )


def learning(inputs: LinearInputs) -> str:
    """Return the names of the tensors that require gradient, comma-separated."""
    return ",".join(
        [
            name
            for name, value in zip(SIX, inputs[:6], strict=True)
            if value is not None and value.requires_grad and torch.is_grad_enabled()
        ]
    )


def keeps_logits(inputs: LinearInputs, recompute: bool | None) -> bool:
    """Return whether forward keeps all logits for backward.

    Never if no backward can follow, nor inside a transform of torch.func, which may batch any
    number of samples. An exported graph may serve any number of tokens: there, only with
    recompute=False.
    """
    if recompute or _modes.transforming() or not learning(inputs):
        return False
    if recompute is False or torch.compiler.is_exporting():
        return recompute is False
    rows = inputs.hidden.shape[:-1].numel() * (1 if inputs.ref_hidden is None else 2)
    return rows * inputs.weight.shape[0] * inputs.logits_dtype.itemsize <= LARGEST_KEPT


def _head(prefix: str, weight: Any, bias: torch.Tensor | None, softcap: float | None) -> Head:
    """Return a model's Head; for a plain weight, build one from the other arguments."""
    if not isinstance(weight, Head):
        return Head(weight, bias, softcap)
    _head_checks.absent(
        {f"{prefix}bias": bias, "softcap": softcap},
        f"beside a Head as {prefix}weight",
        "give each model a Head with its own",
    )
    _head_checks.softcap(weight.softcap, f"{prefix}weight.softcap")
    _head_checks.number(
        f"{prefix}weight.logit_scale",
        "a positive finite number",
        weight.logit_scale,
        "pass the factor of the logits in the model's config, or 1.0",
    )
    return weight


class _Scale(NamedTuple):
    """The numbers applied between one model's raw logits and its log-softmax: softcap (0: none),
    logit_scale (factor), temperature.
    """

    softcap: float
    factor: float
    temperature: float | torch.Tensor

    def divisor(self, dtype: torch.dtype) -> float | torch.Tensor:
        """Return the temperature of the raw logits."""
        if self.factor == 1:
            return self.temperature
        if isinstance(self.temperature, torch.Tensor):
            return (self.temperature.double() / self.factor).to(dtype)
        return self.temperature / self.factor

    def ratio_to(self, first: "_Scale", dtype: torch.dtype) -> float | torch.Tensor:
        """Return the first model's divisor over this one's; NaN for a tensor entry outside the
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
        valid = _value_checks.in_range(ratio) & _value_checks.in_range(denominator)
        return torch.where(valid, ratio, float("nan")).to(dtype)


def _scales(heads: tuple[Head, Head], given: Given, hidden: torch.Tensor) -> list[_Scale]:
    """Check both temperatures, and that their quotients with the heads' numbers fit float32."""
    _checks.temperature(given.temperature, hidden.shape[:-1], hidden.device)
    second = given.temperature if given.ref_temperature is None else given.ref_temperature
    if second is not given.temperature:
        _checks.temperature(second, hidden.shape[:-1], hidden.device, "ref_temperature")
    ref_head = heads[0] if given.ref_hidden is None and given.ref_logits is None else heads[1]
    scales = [
        _Scale(float(head.softcap or 0.0), float(head.logit_scale), temperature)
        for head, temperature in ((heads[0], given.temperature), (ref_head, second))
    ]
    for name, scale in zip(("weight", "ref_weight"), scales, strict=True):
        for what, value in (("softcap", scale.softcap or 1.0), ("temperature", scale.temperature)):
            if scale.factor != 1 and not isinstance(value, torch.Tensor):
                _head_checks.number(
                    f"{name}.logit_scale", f"{what} / logit_scale", value / scale.factor
                )
    return scales


def _autocast(value: Any) -> Any:
    """Cast as F.linear does under autocast: float32 and 16-bit tensors to the autocast type."""
    casts = (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.dtype != torch.float64
        and value.device.type in _AUTOCAST_DEVICES
    )
    return value.to(torch.get_autocast_dtype(value.device.type)) if casts else value
