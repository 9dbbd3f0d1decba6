"""Hidden states and lm_heads to test with, and three ways to compute with them: fastkl, the truth
in fp64, plain torch in the inputs' own types.

An outcome is a dict of every value and of every gradient ("gradient to weight") of one Case,
however it was computed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

import fastkl
from fastkl import testing

INPUTS = ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias", "weights")
FIELDS = fastkl.TokenStats._fields
# Half the distance of neighbouring numbers, relative to them.
UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
# Half the distance of float16's subnormal numbers, times 4 for a gradient that is multiplied by its
# upstream gradient after it was rounded.
SUBNORMAL = {torch.float16: 2.0**-23}
# Absolute errors that testing.kl_tolerance and test_tokens.py allow one token, of weight 4 at the
# most.
NEAR_ZERO = {
    "logprob": 2e-6,
    "ref_logprob": 2e-6,
    "entropy": 2e-6,
    "kl": 4e-8,
    "ref_kl": 4e-8,
    "gradient to weights": 4e-8,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call and one backward. `tensors`: INPUTS that are given, on the CPU; the same object
    twice is passed as the same object twice.

    `reduction`: that of linear_kl_divergence, or "stats" for linear_token_stats. `fields`: the
    results with an upstream gradient, which is random of size `scale`, a power of two so that
    scaling is exact; without `random` it is `scale`. `layouts`: how an input lies in memory, by
    name.
    """

    tensors: dict[str, torch.Tensor]
    reduction: str = "none"
    trainable: tuple[str, ...] = INPUTS
    tokens: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    temperature: float | torch.Tensor = 1.0
    softcap: float | None = None
    logits_dtype: torch.dtype | None = None
    chunk_size: int | None = None
    fields: tuple[str, ...] = FIELDS
    scale: float = 1.0
    random: bool = True
    seed: int = 0
    layouts: dict[str, str] = dataclasses.field(default_factory=dict)

    def but(self, **changes) -> Case:
        """The same with some fields changed."""
        return dataclasses.replace(self, **changes)

    def typed(self, dtype: torch.dtype) -> Case:
        """The same with all inputs but the tokens' weights rounded to a type."""
        made: dict[int, torch.Tensor] = {}
        rounded = {
            name: value if name == "weights" else made.setdefault(id(value), value.to(dtype))
            for name, value in self.tensors.items()
        }
        return self.but(tensors=rounded)


def models(
    kind: str,
    sizes: tuple[float, float],
    *,
    tokens: int = 96,
    vocabulary: int = 500,
    width: int = 64,
    extra: int = 16,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """A policy and a reference of another width, whose logits differ by noise of a size that goes
    from sizes[0] to sizes[1] over the tokens.

    "random": logits N(0, 3²), KL near size²/2 up to 1. "peaked": p_max near 1 - 1e-3. The reference computes the policy's logits in a rotated basis,
    with `extra` more dimensions for the noise, so that no two numbers of the models are the same.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, noise = normal(vocabulary, width) / math.sqrt(width), normal(tokens, extra)
    if kind == "random":
        weight, hidden = 3 * weight, normal(tokens, width)
    else:
        height = 12 + 8 * torch.rand(tokens, 1, generator=generator, dtype=torch.float64)
        hidden = height * weight[
            torch.randint(vocabulary, (tokens,), generator=generator)
        ] + 0.3 * normal(tokens, width)
    size = torch.logspace(math.log10(sizes[0]), math.log10(sizes[1]), tokens, dtype=torch.float64)[
        :, None
    ]
    rotation = torch.linalg.qr(normal(width + extra, width + extra))[0]
    bias = 0.5 * normal(vocabulary)
    made = {
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "ref_hidden": torch.cat([hidden, size * noise], 1) @ rotation,
        "ref_weight": torch.cat([weight, normal(vocabulary, extra) / math.sqrt(extra)], 1)
        @ rotation,
        "ref_bias": bias + sizes[0] / 4 * normal(vocabulary),
        "weights": 0.5 + normal(tokens).abs(),
    }
    return {name: value.float() for name, value in made.items()}


def small(
    leading: tuple[int, ...] = (5,),
    vocabulary: int = 17,
    width: int = 6,
    ref_width: int = 4,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """All seven inputs at random, two models that have nothing to do with each other."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "hidden": (*leading, width),
        "weight": (vocabulary, width),
        "bias": (vocabulary,),
        "ref_hidden": (*leading, ref_width),
        "ref_weight": (vocabulary, ref_width),
        "ref_bias": (vocabulary,),
        "weights": leading,
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def laid_out(value: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers elsewhere in memory, among NaN: as a slice of more tokens, with a gap after
    each row, every other element, or transposed.
    """
    if value.dim() < {"every other": 1, "time first": 3}.get(layout, 2):
        return value
    if layout in ("transposed", "time first"):
        dims = (0, -1) if layout == "transposed" else (0, 1)
        return value.transpose(*dims).contiguous().transpose(*dims)
    shape = list(value.shape)
    if layout == "without the last":
        shape[-2] += 1
    else:
        shape[-1] = 2 * shape[-1] if layout == "every other" else shape[-1] + 3
    base = torch.full(shape, math.nan, dtype=value.dtype, device=value.device)
    views = {
        "without the last": lambda: base[..., :-1, :],
        "gap": lambda: base[..., 1:-2],
        "every other": lambda: base[..., ::2],
    }
    return views[layout]().copy_(value)


LAYOUTS = ("without the last", "time first", "gap", "every other", "transposed")


def leaves(
    case: Case, dtype: torch.dtype | None = None, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """The inputs as tensors of their own, of `dtype` where given, that require grad where the case
    says so.
    """
    made: dict[int, torch.Tensor] = {}
    for name, value in case.tensors.items():
        if id(value) not in made:
            moved = value.to(device, dtype or value.dtype, copy=True)
            moved = (
                laid_out(moved, case.layouts[name])
                if name in case.layouts and dtype is None
                else moved
            )
            made[id(value)] = moved.detach().requires_grad_(name in case.trainable)
    return {name: made[id(value)] for name, value in case.tensors.items()}


def differentiate(
    case: Case,
    inputs: dict[str, torch.Tensor],
    values: dict[str, torch.Tensor],
    retain_graph: bool = False,
) -> dict[str, torch.Tensor]:
    """Values and gradients for the case's upstream gradients; zeros where nothing depends on an
    input.
    """
    results = {name: value.detach() for name, value in values.items()}
    asked = [
        name
        for name, value in values.items()
        if value.requires_grad and (name in case.fields or case.reduction != "stats")
    ]
    learning = {name: value for name, value in inputs.items() if value.requires_grad}
    if not (asked and learning):
        return results
    upstream = [upstream_for(case, name, values[name]) for name in asked]
    grads = torch.autograd.grad(
        [values[name] for name in asked],
        list(learning.values()),
        upstream,
        allow_unused=True,
        retain_graph=retain_graph,
    )
    for (name, value), grad in zip(learning.items(), grads, strict=True):
        results[f"gradient to {name}"] = torch.zeros_like(value) if grad is None else grad
    return results


def upstream_for(case: Case, name: str, value: torch.Tensor) -> torch.Tensor:
    """The upstream gradient of a value, the same numbers in every type."""
    return (
        testing.upstream_for(value, case.seed + FIELDS.index(name))
        if case.random
        else torch.ones_like(value)
    ) * case.scale


def keywords(case: Case, device: str) -> dict[str, object]:
    """The options of either function. Both ways are tested: "none" computes its logits again,
    "stats" keeps them.
    """
    moved = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in (("mask", case.mask), ("temperature", case.temperature))
    }
    return {
        **moved,
        "softcap": case.softcap,
        "logits_dtype": case.logits_dtype,
        "chunk_size": case.chunk_size,
        "recompute": case.reduction == "none" or None,
    }


def call(case: Case, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """fastkl's values."""
    device = inputs["hidden"].device
    options = {
        **keywords(case, device),
        "bias": inputs.get("bias"),
        "ref_bias": inputs.get("ref_bias"),
    }
    heads = [inputs.get(name) for name in ("ref_hidden", "ref_weight")]
    if case.reduction == "stats":
        stats = fastkl.linear_token_stats(
            inputs["hidden"], inputs["weight"], case.tokens.to(device), *heads, **options
        )
        return {name: value for name, value in stats._asdict().items() if value is not None}
    options["weights"] = inputs.get("weights") if case.reduction != "none" else None
    return {
        "kl": fastkl.linear_kl_divergence(
            inputs["hidden"], inputs["weight"], *heads, reduction=case.reduction, **options
        )
    }


def fastkl_outcome(case: Case, device: str) -> dict[str, torch.Tensor]:
    """What fastkl computes on a device."""
    inputs = leaves(case, device=device)
    return differentiate(case, inputs, call(case, inputs))


# ---- the truth, and plain torch


def textbook(
    p_logits: torch.Tensor, q_logits: torch.Tensor, temperature: float | torch.Tensor
) -> testing.Truth:
    """Two log-softmaxes and the KLs as everyone writes them, in the logits' type."""
    scale = temperature[..., None] if isinstance(temperature, torch.Tensor) else temperature
    log_p, log_q = (p_logits / scale).log_softmax(-1), (q_logits / scale).log_softmax(-1)
    return testing.Truth(
        log_p,
        log_q,
        -(log_p.exp() * log_p).sum(-1),
        (log_p.exp() * (log_p - log_q)).sum(-1),
        (log_q.exp() * (log_q - log_p)).sum(-1),
    )


def capped(case: Case, logits: torch.Tensor) -> torch.Tensor:
    """The logits under the case's softcap."""
    return logits if case.softcap is None else case.softcap * torch.tanh(logits / case.softcap)


def compute(
    case: Case, inputs: dict[str, torch.Tensor], head: Callable, statistics: Callable
) -> dict[str, torch.Tensor]:
    """The values by definition: head(hidden, weight, bias) are the logits, statistics(p, q,
    temperature) a testing.Truth.
    """
    leading, device = inputs["hidden"].shape[:-1], inputs["hidden"].device
    mask = (
        torch.ones(leading, dtype=torch.bool, device=device)
        if case.mask is None
        else case.mask.to(device)
    )
    second = inputs
    if "ref_hidden" in inputs:
        second = {
            "hidden": inputs["ref_hidden"],
            "weight": inputs.get("ref_weight", inputs["weight"]),
            "bias": inputs.get("ref_bias"),
        }
    logits = []
    for model in (inputs, second):
        logits.append(
            capped(
                case,
                head(
                    model["hidden"].masked_fill(~mask[..., None], 0.0),
                    model["weight"],
                    model.get("bias"),
                ),
            )
        )
    exact = statistics(*logits, keywords(case, device)["temperature"])
    kl = torch.where(mask, exact.kl, 0.0)
    if case.reduction == "stats":
        tokens = torch.where(mask, case.tokens.to(device), 0)[..., None]
        picked = [value.gather(-1, tokens)[..., 0] for value in (exact.log_p, exact.log_q)]
        values = dict(
            zip(FIELDS, (picked[0], exact.entropy, picked[1], exact.kl, exact.ref_kl), strict=True)
        )
        return {
            name: torch.where(mask, value, 0.0)
            for name, value in values.items()
            if "ref_hidden" in inputs or name in FIELDS[:2]
        }
    if case.reduction == "none":
        return {"kl": kl}
    total = (kl * inputs["weights"] if "weights" in inputs else kl).sum()
    return {"kl": total if case.reduction == "sum" else total / mask.sum().clamp(min=1)}


def truth(case: Case) -> dict[str, torch.Tensor]:
    """fp64 of the very inputs, gradients by autograd, on the CPU."""
    inputs = leaves(case, torch.float64)
    return differentiate(case, inputs, compute(case, inputs, F.linear, testing.truth))


def logits_dtype(case: Case) -> torch.dtype:
    """The type that logits are rounded to."""
    types = {case.tensors[name].dtype for name in ("hidden", "ref_hidden") if name in case.tensors}
    return case.logits_dtype or (types.pop() if len(types) == 1 else torch.float32)


def plain(case: Case, device: str) -> dict[str, torch.Tensor]:
    """Plain torch: F.linear and its backward in the inputs' types, between logits and results
    float32, as everyone writes it.

    Where logits are float32 and inputs are not, products of the inputs as float32, with the
    backward of the 16-bit product. For float32 inputs everything but the products is in float64,
    which leaves the error of the products alone.
    """
    exact = all(value.dtype == torch.float32 for value in case.tensors.values())

    def head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        logits = F.linear(hidden, weight, bias)
        if exact or logits_dtype(case) == logits.dtype:
            return logits.double() if exact else logits.float()
        wide = F.linear(
            hidden.float(), weight.float(), None if bias is None else bias.float()
        ).detach()
        return wide + (logits.float() - logits.float().detach())

    inputs = leaves(case, device=device)
    return differentiate(
        case, inputs, compute(case, inputs, head, testing.truth if exact else textbook)
    )


# ---- how far a result may be off


class Moved(torch.autograd.Function):
    """Logits plus `shift`; backward, their gradient times 1 + `factor`, plus `absolute`."""

    @staticmethod
    def forward(ctx, logits, shift, factor, absolute):
        """The sum."""
        ctx.save_for_backward(factor, absolute)
        return logits + shift

    @staticmethod
    def backward(ctx, grad):
        """What is left of the gradient after rounding."""
        factor, absolute = ctx.saved_tensors
        return grad + grad * factor + absolute, None, None, None


def rounding(case: Case, exact: dict[str, torch.Tensor], draws: int = 6) -> dict[str, float]:
    """L2 errors that rounding explains: of products summed in float32, of logits and their
    gradients rounded to a type, of rounded results.

    The truth again with every logit and every gradient of a logit moved as far as its roundings
    can, up or down at random. Errors of these sizes add up at random, and a root mean square of a
    few draws is known to a third, hence four times it. 1e-5 of the truth is what the float32
    arithmetic between logits and results may add, and to each token what test_tokens.py allows a
    value near 0; a gradient of a shorter type is rounded twice ("sum", "mean": before and after the
    upstream gradient).
    """
    tokens = case.tensors["hidden"].shape[:-1].numel()
    squares = dict.fromkeys(exact, 0.0)
    for seed in range(draws):
        inputs = leaves(case, torch.float64)
        moved = differentiate(
            case,
            inputs,
            compute(
                case, inputs, moving_head(case, torch.Generator().manual_seed(seed)), testing.truth
            ),
        )
        for name in exact:
            squares[name] += float((moved[name] - exact[name]).norm() ** 2) / draws
    allowed = {}
    for name, value in exact.items():
        kind = (
            case.tensors[name.removeprefix("gradient to ")].dtype
            if name.startswith("gradient to ")
            else torch.float32
        )
        result = (2 * UNIT_ROUNDOFF[kind] if kind != torch.float32 else 0.0) + 1e-5
        near_zero = NEAR_ZERO.get(name, 0.0) * tokens + SUBNORMAL.get(kind, 0.0) * math.sqrt(
            value.numel()
        )
        allowed[name] = result * float(value.norm()) + near_zero + 1.5 * math.sqrt(squares[name])
    return allowed


def moving_head(case: Case, generator: torch.Generator) -> Callable:
    """The head of rounding(): called for the policy, then for the reference."""
    types = [case.tensors[name].dtype for name in ("hidden", "ref_hidden") if name in case.tensors]
    remaining = iter((*types, types[0]))

    def head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        logits, kind = F.linear(hidden, weight, bias), next(remaining)
        with torch.no_grad():
            up, right, along = (
                torch.randint(2, logits.shape, generator=generator).double() * 2 - 1
                for _ in range(3)
            )
            wide = UNIT_ROUNDOFF[torch.float64 if kind == torch.float64 else torch.float32]
            # A sum of H terms; then the subtraction of the row's largest logit and its like, each
            # rounded to the size of these.
            terms = F.linear(hidden.abs(), weight.abs(), None if bias is None else bias.abs())
            shift = (
                wide
                * (math.sqrt(hidden.shape[-1]) * terms + 4 * logits.abs().amax(-1, keepdim=True))
                * up
            )
            # Rounded to the logits' type: the product, and with its bias again.
            if logits_dtype(case) not in (torch.float32, torch.float64):
                shift = (
                    shift
                    + UNIT_ROUNDOFF[logits_dtype(case)]
                    * (logits.abs() + (0 if bias is None else (logits - bias).abs()))
                    * right
                )
            factor = max(4 * wide, UNIT_ROUNDOFF[kind]) * along
            # A probability known to 4 roundings of itself, also where exact arithmetic leaves a
            # gradient of 0.
            temperature = (
                case.temperature[..., None]
                if isinstance(case.temperature, torch.Tensor)
                else case.temperature
            )
            absolute = (
                SUBNORMAL.get(kind, 0.0)
                + 4 * wide * (capped(case, logits) / temperature).softmax(-1) / temperature
            ) * up
        return Moved.apply(logits, shift, factor, absolute)

    return head


def errors(result: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """The L2 norm of the error of every value and gradient; inf where one is not finite."""
    norms = {
        name: float((result[name].detach().double().cpu() - value).norm())
        for name, value in exact.items()
    }
    return {name: norm if math.isfinite(norm) else math.inf for name, norm in norms.items()}


def share(exact: dict[str, torch.Tensor], relative: float) -> dict[str, float]:
    """A relative bar as L2 errors."""
    return {name: relative * float(value.norm()) for name, value in exact.items()}


def assert_within(
    result: dict[str, torch.Tensor],
    exact: dict[str, torch.Tensor],
    allowed: dict[str, float],
    what: str = "",
) -> None:
    """Raise where a value or a gradient is off by more than the allowed L2 error over all its
    elements.
    """
    assert result.keys() == exact.keys(), f"{what}: {sorted(result)}, expected {sorted(exact)}"
    for name, value in exact.items():
        assert result[name].shape == value.shape, (
            f"{what}: {name} of shape {tuple(result[name].shape)}, expected {tuple(value.shape)}"
        )
    wrong = []
    for name, error in errors(result, exact).items():
        if not error <= allowed[name]:
            norm = float(exact[name].norm()) or 1.0
            wrong.append(
                f"{name}: relative L2 error {error / norm:.3g}, allowed {allowed[name] / norm:.3g}"
            )
    assert not wrong, f"{what}: " + "; ".join(wrong)


def assert_types(result: dict[str, torch.Tensor], case: Case) -> None:
    """Values are float32 (float64 for float64 inputs), each gradient has the type of its input."""
    wide = torch.float64 if case.tensors["hidden"].dtype == torch.float64 else torch.float32
    for name, value in result.items():
        expected = (
            case.tensors[name.removeprefix("gradient to ")].dtype
            if name.startswith("gradient to ")
            else wide
        )
        assert value.dtype == expected, f"{name}: {value.dtype}, expected {expected}"


def plain_errors(case: Case, exact: dict[str, torch.Tensor], device: str) -> dict[str, float]:
    """Errors of plain torch; of a sum, those of its terms, which may cancel by luck."""
    result = plain(case, device)
    found = errors(result, exact)
    if case.reduction in ("sum", "mean"):
        terms = (
            result["gradient to weights"].double().cpu() - exact["gradient to weights"]
        ).abs() * case.tensors["weights"]
        found["kl"] = float(terms.sum()) / abs(float(upstream_for(case, "kl", exact["kl"])))
    return found


def check_16_bit(device: str, case: Case) -> None:
    """Values and every gradient within 1.5 times plain torch's error, and 1e-5 where logits are
    float32: what fastkl's own arithmetic may cost.

    The gradients of a sum are finished before their upstream gradient is known: float16 has the
    digits that a weight of 1 for the heaviest token leaves it, and each is rounded once more when
    the upstream gradient multiplies it. Beside rounded logits that is within the 1.5. Beside
    float32 logits these roundings are most of plain torch's error too: there the upstream gradient
    is the power of two that makes the heaviest token count 1.
    """
    wide = logits_dtype(case) == torch.float32
    if wide and case.reduction in ("sum", "mean"):
        heaviest = float(case.tensors["weights"].max()) / (
            len(case.tensors["weights"]) if case.reduction == "mean" else 1
        )
        case = case.but(random=False, scale=2.0 ** -math.ceil(math.log2(heaviest)))
    exact = truth(case)
    result = fastkl_outcome(case, device)
    assert_types(result, case)
    own = share(exact, 1e-5 if wide else 0.0)
    allowed = {
        name: max(1.5 * error, own[name])
        for name, error in plain_errors(case, exact, device).items()
    }
    assert_within(result, exact, allowed)
