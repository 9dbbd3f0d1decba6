"""The same statistics from hidden states and lm_head weights: a chunk of logits at a time, all of
them only where they are few or asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch

from . import _checks, _reduce, backend
from ._types import Reduction
from .ops import dual_op, linear_op, lm_head
from .ops.fields import FIELDS, result_dtype
from .tokens import TokenStats

if TYPE_CHECKING:
    from .tokens import PairedTokenStats

# Bytes of the logits of all models that are kept until backward without a word from the user.
LARGEST_KEPT = 1 << 31
# Asked for once: torch.compile cannot trace the question in every release.
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


@overload
def linear_token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor | Head,
    tokens: torch.Tensor,
    ref_hidden: None = None,
    ref_weight: None = None,
    *,
    bias: torch.Tensor | None = None,
    ref_bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    ref_temperature: float | torch.Tensor | None = None,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    recompute: bool | None = None,
) -> TokenStats: ...
@overload
def linear_token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor | Head,
    tokens: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor | Head | None = None,
    *,
    bias: torch.Tensor | None = None,
    ref_bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    ref_temperature: float | torch.Tensor | None = None,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    recompute: bool | None = None,
) -> PairedTokenStats: ...
def linear_token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor | Head,
    tokens: torch.Tensor,
    ref_hidden: torch.Tensor | None = None,
    ref_weight: torch.Tensor | Head | None = None,
    *,
    bias: torch.Tensor | None = None,
    ref_bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    ref_temperature: float | torch.Tensor | None = None,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    recompute: bool | None = None,
) -> TokenStats:
    """token_stats of the logits that an lm_head would give, a chunk of tokens at a time.

    Equivalent to

        logits = F.linear(hidden, weight, bias).to(logits_dtype)
        ref_logits = F.linear(ref_hidden, ref_weight, ref_bias).to(logits_dtype)
        if softcap is not None:
            logits, ref_logits = (softcap * torch.tanh(x.float() / softcap) for x in (logits, ref_logits))
        stats = token_stats(logits, tokens, ref_logits, temperature=temperature, mask=mask)

    of plain weights; a Head has its own bias, softcap and scale, and ref_temperature may divide
    ref_logits instead, in two matrix products (one without a reference). Every field and token may
    have its own upstream gradient. Where all logits take 2 GiB at the most, or with
    recompute=False, they are kept for backward, which writes their gradients in their place; else
    buffers for one chunk of logits are the only large memory, and backward computes the logits
    again. 40 bytes per token are held for it beside the inputs.

    Args:
        hidden: [..., H], the last hidden states after the final norm; float32, bfloat16 or float16
        (float64 on the reference backend).
        weight: [V, H], the lm_head's weight, in the type of hidden, or a Head. A vocabulary padded
        in one model: pass weight[:V] and bias[:V].
        tokens: integer ids [...], as for token_stats.
        ref_hidden: [..., H_ref], the reference's hidden states: they may be cached from an earlier
        pass, also one in inference mode, and their H and
            type may differ.
        ref_weight: [V, H_ref], or a Head. The same tensor as weight, also inside Heads: both share
        one weight, of which nothing is kept twice.
            Left out: the reference has the policy's weight, and all of its Head.
        bias, ref_bias: [V] or None, in the type of their weight. A shared lm_head with a bias needs
        it as both. Beside a model's Head an error.
        temperature: divides the logits: a positive number, or a float tensor [...] (no gradient).
        ref_temperature: divides the reference's logits instead, likewise. Default: temperature.
        softcap: the logits become softcap·tanh(logits/softcap), before the temperature; a positive
            number. Of both models, hence an error if either is a Head: make Heads of both.
        mask: bool [...], True where the token counts. Other tokens return exactly 0 and have
        gradient exactly 0, whatever their hidden states
            hold. The reference backend leaves them out of the products; on a GPU, where that would
            cost a synchronisation, they take part as zeros.
        logits_dtype: the type of the logits in a chunk. Default: that of hidden, float32 where
        policy and reference differ. torch.float32 keeps the
            products' float32 sums for 16-bit inputs; see Accuracy.
        chunk_size: C and G are at most this many tokens (C at most 1024). Default: from N, H, V and
        a fixed bound on memory, never from what happens
            to be free. See Memory.
        recompute: False keeps the logits of all models from forward to backward, for a product less
        for each; True computes them again; None keeps
            them where N·V·l of all models together is 2 GiB at the most. Nothing is kept where
            nothing requires gradient, under torch.no_grad and inside transforms of torch.func, and
            with None not in graphs of torch.export. See Memory.

    Returns:
        TokenStats of [...] float32 (float64 for float64 inputs) tensors, nats. The last three
        fields are None without ref_hidden.

    Gradient:
        Of every field to hidden, weight, bias, ref_hidden, ref_weight and ref_bias where they
        require it, in their types; weight gradients are summed in float32 (on a CPU what is added
        to the sum was rounded to 16-bit inputs' type). To keep a shared lm_head from learning
        through the reference, pass ref_weight=weight.detach(). Backward costs one product for each
        hidden and each weight that requires it and, without kept logits, two more (one where only
        logprob and entropy have a gradient): forward and backward with a trained lm_head and a
        reference that learns nothing, four instead of six; of logprob and entropy without a
        reference, three instead of four. A second backward through a retained graph finds gradients
        in place of the logits and computes them again. No second derivative.

    Memory:
        Beyond inputs, results and returned gradients, with b bytes per input element, l per logit,
        C ≤ 1024 tokens of a chunk and G ≥ C tokens whose gradients of logits wait for one product:

            kept:     N·V·l for each model in rows of whole 64 entries, from forward to the end of backward; then forward has no other
                      logits, and backward C·V·l for each model that learns where ref_kl has a
                      gradient to the reference
            forward:  2·C·V·l                                          for both models
            backward: C·V·l for a model that learns nothing;  G·V·b for one that learns, and C·V·l
                where l differs from b;
                      4·V·H for each 16-bit weight that requires gradient (its sum in float32)

        Beside kept logits of l = b there is no G·V·b: their gradients take their place, outside torch.compile, selective checkpointing and other
        modes that look at ops. G = N there, and where that takes no more at its peak, the returned gradient included: then one product gives a
        bfloat16 weight's gradient, without a sum. On top come copies of the hidden states, of G
        tokens' where there is a mask, of all where their leading dimensions are not one in memory;
        on a CPU 15 MB more for rows in float32. At H = 4096, V = 128256 in bfloat16: kept, 2.10 GB
        for
        N = 8192 of one model or 4096 of two, and nothing beside them; not kept, 0.53 GB forward, with a trainable weight 1.31 GB at N = 4096,
        2.36 GB at 8192, and 1.05 + 2.10 GB from there on. Without chunk_size all terms but kept
        logits and the sums, or what takes their place, stay under 1 GiB on a GPU (128 MiB on a CPU)
        or half of the sums, whichever is more. Results depend on the chunk only as a product's
        rounding depends on its shape.

    Accuracy:
        float32: that of the products. bfloat16, float16: each logit is rounded once, which
        dominates everything else, exactly as for logits that a model returns;
        logits_dtype=torch.float32 leaves that rounding out. float16 gradients of logits vanish
        where upstream gradients are small, as in torch: use a GradScaler, or "sum" and "mean" of
        linear_kl_divergence, which scale by themselves. Figures: fastkl's README, "From hidden
        states".

    autocast: as F.linear, inputs are cast to the autocast type.

    Special values: as token_stats. Raises: TypeError, ValueError, RuntimeError as token_stats.

    Source: the chunking is that of every fused linear cross-entropy; what is computed per chunk is
    token_stats.
    """
    made = prepare(
        hidden,
        weight,
        bias,
        ref_hidden,
        ref_weight,
        ref_bias,
        temperature,
        ref_temperature,
        softcap,
        mask,
        logits_dtype,
        chunk_size,
        recompute,
    )
    _checks.tokens(tokens, hidden.shape[:-1], hidden.device)
    fields = "logprob,entropy" if ref_hidden is None else ",".join(FIELDS)
    per_token, settings = made.rest()
    values = linear_op.linear_statistics(
        *made.six, tokens.long(), *per_token, fields, *settings, made.keeps_logits()
    )
    return (
        TokenStats(*values[:2], None, None, None) if ref_hidden is None else TokenStats(*values[:5])
    )


def linear_kl_divergence(
    hidden: torch.Tensor,
    weight: torch.Tensor | Head,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor | Head | None = None,
    *,
    weights: torch.Tensor | None = None,
    reduction: Reduction = "none",
    bias: torch.Tensor | None = None,
    ref_bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    ref_temperature: float | torch.Tensor | None = None,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    normalizer: float | torch.Tensor | None = None,
    recompute: bool | None = None,
) -> torch.Tensor:
    """KL(P‖Q) per token, its sum or its mean, with P's logits from (hidden, weight, bias) and Q's
    from (ref_hidden, ref_weight, ref_bias).

    Equivalent to

        p_logits, q_logits = ...                                           # as in linear_token_stats
        kl = kl_divergence(p_logits, q_logits, temperature=temperature, mask=mask)     # ref_temperature: of q_logits
        "none": kl        "sum": (weights * kl).sum()        "mean": (weights * kl).sum() / normalizer

    The order of the arguments is the direction: policy first is the RLHF penalty, teacher first the
    distillation loss. Whichever of the two requires gradient learns.

    "sum" and "mean" compute the gradients together with the value, while the logits of a chunk are
    at hand: four matrix products with a trainable lm_head, three with a frozen one, two where
    nothing requires gradient (or under torch.no_grad); one more for the other model's hidden states
    and one for its weight where those learn. What backward needs is then the finished gradients
    themselves, one tensor like each input that requires it (float32 for a float16 weight or bias):
    call it under torch.no_grad() where no backward will follow. "sum" and "mean" keep no logits,
    whatever recompute is. "none" allows any upstream gradient per token: where the logits are kept,
    see recompute, with the same numbers of products; else they are computed again in backward, in
    two products more.

    Args:
        weights: [...] float, what each token's KL counts (a sequence's advantage, beta over a
        length, …): "sum" and "mean" only. It may require
            gradient; of a masked token it may hold anything.
        reduction: "none", "sum" or "mean" (also spelt "token_mean").
        normalizer: the divisor of the mean, as in kl_divergence. Default: how many tokens count in
        this call, however they are weighted. The others: as linear_token_stats, with hidden,
        weight, bias, temperature for the first argument of KL(·‖·).

    Returns:
        [...] float32 (float64 for float64 inputs) for "none", else a scalar. Nats.

    Gradient:
        To hidden, weight, bias, ref_hidden, ref_weight, ref_bias and weights where they require it.
        A second backward over a retained graph gives the same. No second derivative. "sum" and
        "mean" have to know when they are called what requires gradient: under torch.vmap, or in a
        graph traced without, they raise instead of leaving a gradient out. They scale a finished
        gradient by the upstream one, which must be finite.

    Memory, Accuracy, autocast: as linear_token_stats; "sum" and "mean" need in forward what its
    backward needs without kept logits.

    Special values: as kl_divergence. Raises: TypeError, ValueError, RuntimeError as kl_divergence.

    Source: as kl_divergence.
    """
    made = prepare(
        hidden,
        weight,
        bias,
        ref_hidden,
        ref_weight,
        ref_bias,
        temperature,
        ref_temperature,
        softcap,
        mask,
        logits_dtype,
        chunk_size,
        recompute,
        reference_required=True,
    )
    leading, device, dtype = hidden.shape[:-1], hidden.device, result_dtype(hidden)
    _reduce.check(reduction, weights, normalizer, leading, device)
    if reduction == "none":
        per_token, settings = made.rest()
        return linear_op.linear_statistics(
            *made.six, None, *per_token, "kl", *settings, made.keeps_logits()
        )[3]
    return weighted_kl(
        made, _reduce.token_scales(weights, reduction, normalizer, mask, leading, dtype, device)
    )[0]


class _Scale(NamedTuple):
    """The numbers between one model's raw logits and its log-softmax: softcap (0: none),
    logit_scale, temperature.
    """

    softcap: float
    factor: float
    temperature: float | torch.Tensor

    @property
    def cap(self) -> float:
        """The soft cap of the raw logits: s·x under a cap of c is s·(x under a cap of c/s)."""
        return self.softcap / self.factor

    def divisor(self, dtype: torch.dtype) -> float | torch.Tensor:
        """The temperature of the raw logits."""
        if not isinstance(self.temperature, torch.Tensor):
            return self.temperature / self.factor
        return (
            self.temperature
            if self.factor == 1
            else (self.temperature.double() / self.factor).to(dtype)
        )

    def ratio_to(self, first: _Scale, dtype: torch.dtype) -> float | torch.Tensor:
        """The inverse of divisor over that of the first model; NaN where a tensor leads out of the
        range of temperatures.
        """
        if self.temperature is first.temperature:
            return self.factor / first.factor
        over, under = (
            value.double() if isinstance(value, torch.Tensor) else value
            for value in (first.temperature, self.temperature)
        )
        ratio = (over * self.factor) / (under * first.factor)
        if not isinstance(ratio, torch.Tensor):
            return ratio
        valid = (
            _in_range(ratio) & _in_range(under)
            if isinstance(under, torch.Tensor)
            else _in_range(ratio)
        )
        return torch.where(valid, ratio, float("nan")).to(dtype)


def _in_range(value: torch.Tensor) -> torch.Tensor:
    return (value >= _checks.LOWEST_TEMPERATURE) & (value <= _checks.HIGHEST_TEMPERATURE)


class Prepared(NamedTuple):
    """Checked arguments: the six tensors of the ops; mask; the scales of both models; backend,
    logits_dtype, chunk_size; recompute.
    """

    six: lm_head.Six
    mask: torch.Tensor | None
    scales: tuple[_Scale, _Scale]
    engine: tuple[str, torch.dtype, int | None]
    recompute: bool | None

    def swapped(self) -> Prepared:
        """The same with policy and reference in each other's place."""
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias = self.six
        assert ref_hidden is not None
        first, second = (weight, None) if ref_weight is None else (ref_weight, weight)
        return self._replace(
            six=(ref_hidden, first, ref_bias, hidden, second, bias),
            scales=(self.scales[1], self.scales[0]),
        )

    def rest(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The ops' other arguments: (mask, temperatures, ratios, temperature) and (softcap,
        ref_softcap, ratio, *engine).
        """
        first, second = self.scales
        dtype = result_dtype(self.six[0])
        temperature, ratio = first.divisor(dtype), second.ratio_to(first, dtype)
        temperatures, temperature = (
            (temperature, 1.0) if isinstance(temperature, torch.Tensor) else (None, temperature)
        )
        ratios, ratio = (ratio, 1.0) if isinstance(ratio, torch.Tensor) else (None, ratio)
        return (self.mask, temperatures, ratios, temperature), (
            first.cap,
            second.cap,
            ratio,
            *self.engine,
        )

    def keeps_logits(self) -> bool:
        """Whether forward keeps all logits for backward: never where there is no backward, nor
        inside a transform of torch.func, which may
        call it once for each of any number of samples. An exported graph may be for any number of
        tokens.
        """
        hidden, weight, _, ref_hidden, *_ = self.six
        if self.recompute or dual_op.transforming() or not self.learning():
            return False
        if self.recompute is False or torch.compiler.is_exporting():
            return self.recompute is False
        models = 1 if ref_hidden is None else 2
        return (
            models * hidden.shape[:-1].numel() * weight.shape[0] * self.engine[1].itemsize
            <= LARGEST_KEPT
        )

    def learning(self) -> list[str]:
        """Return the names of those of the six that require gradient."""
        return [
            name
            for name, value in zip(linear_op.SIX, self.six, strict=True)
            if value is not None and value.requires_grad and torch.is_grad_enabled()
        ]


def weighted_kl(made: Prepared, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(Σ weights·kl with gradient, kl [...] without) for weights [...] in the results' type; a
    masked token's weight does not matter.
    """
    if made.mask is not None:
        weights = torch.where(made.mask, weights, 0.0)
    wrt = ",".join(made.learning())
    per_token, settings = made.rest()
    results = linear_op.linear_weighted_kl(*made.six, weights, *per_token, wrt, *settings)
    return results[0], results[1]


def prepare(
    hidden: torch.Tensor,
    weight: torch.Tensor | Head,
    bias: torch.Tensor | None,
    ref_hidden: torch.Tensor | None,
    ref_weight: torch.Tensor | Head | None,
    ref_bias: torch.Tensor | None,
    temperature: float | torch.Tensor,
    ref_temperature: float | torch.Tensor | None,
    softcap: float | None,
    mask: torch.Tensor | None,
    logits_dtype: torch.dtype | None,
    chunk_size: int | None,
    recompute: bool | None = None,
    *,
    reference_required: bool = False,
) -> Prepared:
    """Check the arguments that all functions on hidden states share, and cast what autocast casts."""
    if reference_required:
        _checks.reference_given(ref_hidden)
    inherited = ref_hidden is not None and ref_weight is None and isinstance(weight, Head)
    heads = (
        _head("weight", weight, "bias", bias, softcap),
        _head("ref_weight", weight if inherited else ref_weight, "ref_bias", ref_bias, softcap),
    )
    _checks.softcap(softcap)
    names = _names("", weight), _names("ref_", ref_weight)
    shared = heads[1].weight is heads[0].weight
    hidden, first_weight, bias = (
        _autocast(hidden),
        _autocast(heads[0].weight),
        _autocast(heads[0].bias),
    )
    ref_hidden, second_weight, ref_bias = (
        _autocast(ref_hidden),
        None if shared else _autocast(heads[1].weight),
        _autocast(heads[1].bias),
    )
    _checks.head(names[0], hidden, first_weight, bias)
    _checks.second_head(
        (hidden, first_weight, bias),
        (ref_hidden, first_weight if shared else second_weight, ref_bias),
        names,
        own_bias=inherited or isinstance(ref_weight, Head),
    )
    scales = _scales(heads, temperature, ref_temperature, hidden, ref_hidden)
    _checks.mask(mask, hidden.shape[:-1], hidden.device)
    _checks.chunk_size(chunk_size)
    _checks.recompute(recompute)
    default = (
        hidden.dtype if ref_hidden is None or ref_hidden.dtype == hidden.dtype else torch.float32
    )
    _checks.logits_dtype(logits_dtype, default)
    chosen = backend.select(
        *(value for value in (hidden, ref_hidden) if value is not None), read_rows=False
    )
    return Prepared(
        (hidden, first_weight, bias, ref_hidden, second_weight, ref_bias),
        mask,
        scales,
        (chosen, logits_dtype or default, chunk_size),
        recompute,
    )


def _names(prefix: str, weight: torch.Tensor | Head | None) -> _checks.Names:
    """How messages call the tensors of one model."""
    inside = (
        (f"{prefix}weight.weight", f"{prefix}weight.bias")
        if isinstance(weight, Head)
        else (f"{prefix}weight", f"{prefix}bias")
    )
    return _checks.Names(f"{prefix}hidden", *inside)


def _head(
    name: str,
    weight: torch.Tensor | Head | None,
    bias_name: str,
    bias: torch.Tensor | None,
    softcap: float | None,
) -> Head:
    """Return a model's Head; of a plain weight, with the arguments beside it."""
    if not isinstance(weight, Head):
        return Head(weight, bias, softcap)  # type: ignore[arg-type]  # None without ref_hidden; _checks.head refuses it with one
    for other, value in ((bias_name, bias), ("softcap", softcap)):
        if value is not None:
            raise ValueError(
                f"{other}: expected None beside a Head as {name}, got "
                f"{_checks.type_name(value) if other == bias_name else _checks.shown(value)}; "
                f"give each model a Head with its own"
            )
    _checks.softcap(weight.softcap, f"{name}.softcap")
    _checks.logit_scale(f"{name}.logit_scale", weight.logit_scale)
    return weight


def _scales(
    heads: tuple[Head, Head],
    temperature: float | torch.Tensor,
    ref_temperature: float | torch.Tensor | None,
    hidden: torch.Tensor,
    ref_hidden: torch.Tensor | None,
) -> tuple[_Scale, _Scale]:
    """Check both temperatures, and that float32 holds what they and the heads' numbers make
    together.
    """
    if ref_hidden is None and ref_temperature is not None:
        raise ValueError(
            f"ref_temperature: expected None without ref_hidden, got "
            f"{_checks.shown(ref_temperature)}; pass ref_hidden too"
        )
    for name, value in (
        ("temperature", temperature),
        ("ref_temperature", temperature if ref_temperature is None else ref_temperature),
    ):
        _checks.temperature(value, hidden.shape[:-1], hidden.device, name)
    first = temperature if isinstance(temperature, torch.Tensor) else float(temperature)
    second = (
        first
        if ref_temperature is None
        else ref_temperature
        if isinstance(ref_temperature, torch.Tensor)
        else float(ref_temperature)
    )
    made = []
    for name, head, value in (
        ("", heads[0], first),
        ("ref_", heads[0] if ref_hidden is None else heads[1], second),
    ):
        scale = _Scale(float(head.softcap or 0.0), float(head.logit_scale), value)
        if scale.factor != 1:
            for what, result in (
                ("softcap / logit_scale", scale.cap if scale.softcap else 1.0),
                ("temperature / logit_scale", scale.divisor(hidden.dtype)),
            ):
                if not isinstance(result, torch.Tensor):
                    _checks.within_float32(f"{name}weight.logit_scale", what, result)
        made.append(scale)
    ratio = made[1].ratio_to(made[0], hidden.dtype)
    if not isinstance(ratio, torch.Tensor):
        _checks.within_float32(
            "ref_temperature", "the quotient of both models' temperature / logit_scale", ratio
        )
    return made[0], made[1]


@overload
def _autocast(value: torch.Tensor) -> torch.Tensor: ...
@overload
def _autocast(value: None) -> None: ...
def _autocast(value: torch.Tensor | None) -> torch.Tensor | None:
    """As F.linear under autocast: float32 and 16-bit tensors in the autocast type."""
    if (
        not isinstance(value, torch.Tensor)
        or not value.is_floating_point()
        or value.dtype == torch.float64
    ):
        return value
    device = value.device.type
    if device not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return value
    return value.to(torch.get_autocast_dtype(device))
