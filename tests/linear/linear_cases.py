"""Three ways to compute a Case of linear_inputs.py: fastkl, the truth in float64, plain torch in
the inputs' own types.

An outcome is a dict of every value and of every gradient ("gradient to weight") of one Case,
however it was computed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from linear_inputs import FIELDS, Case, leaves

import fastkl
from fastkl import testing

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
# Absolute errors that fastkl.testing allows one token, of weight 4 at the most.
NEAR_ZERO = dict.fromkeys(("logprob", "ref_logprob", "entropy"), 2e-6) | dict.fromkeys(
    ("kl", "ref_kl", "gradient to weights"), 4e-8
)


def differentiate(
    case: Case,
    inputs: dict[str, torch.Tensor],
    values: dict[str, torch.Tensor],
    retain_graph: bool = False,
) -> dict[str, torch.Tensor]:
    """Return values and gradients; zeros where nothing depends on an input."""
    results = {name: value.detach() for name, value in values.items()}
    asked = [
        name
        for name, value in values.items()
        if value.requires_grad and (name in case.fields or case.reduction != "stats")
    ]
    learning = {name: value for name, value in inputs.items() if value.requires_grad}
    if asked and learning:
        grads = torch.autograd.grad(
            [values[name] for name in asked],
            list(learning.values()),
            [upstream_for(case, name, values[name]) for name in asked],
            materialize_grads=True,
            retain_graph=retain_graph,
        )
        results |= {f"gradient to {name}": g for name, g in zip(learning, grads, strict=True)}
    return results


def upstream_for(case: Case, name: str, value: torch.Tensor) -> torch.Tensor:
    """Draw the upstream gradient of a value, the same numbers in every type."""
    if not case.random:
        return torch.full_like(value, case.scale)
    return testing.upstream_for(value, case.seed + FIELDS.index(name)) * case.scale


def arguments(case: Case, inputs: dict[str, torch.Tensor]) -> dict[str, object]:
    """Name what every call takes: both models, as Heads where the case says so, and the mask."""
    made = {"mask": on(inputs["hidden"].device, case.mask)}
    for prefix, settings in zip(("", "ref_"), case.heads, strict=True):
        weight, bias = inputs.get(f"{prefix}weight"), inputs.get(f"{prefix}bias")
        head = weight if settings is None else fastkl.Head(weight, bias, *settings)
        made |= {f"{prefix}hidden": inputs.get(f"{prefix}hidden"), f"{prefix}weight": head}
        made[f"{prefix}bias"] = bias if settings is None else None
    return made


def options(case: Case, device: str | torch.device = "cpu") -> dict[str, object]:
    """Name the settings that every call takes."""
    names = ("temperature", "ref_temperature", "softcap", "logits_dtype", "chunk_size")
    return {name: on(device, getattr(case, name)) for name in names}


def call(case: Case, inputs: dict[str, torch.Tensor], **more) -> dict[str, torch.Tensor]:
    """Compute fastkl's values. "none" computes its logits again, "stats" keeps them: both ways are
    tested.
    """
    device = inputs["hidden"].device
    given = {**arguments(case, inputs), **options(case, device), "recompute": None, **more}
    if case.reduction == "stats":
        stats = fastkl.linear_token_stats(tokens=on(device, case.tokens), **given)
        return {name: value for name, value in stats._asdict().items() if value is not None}
    if case.reduction == "none":
        given = {**given, "recompute": True, **more}
    else:
        given["weights"] = inputs.get("weights")
    return {"kl": fastkl.linear_kl_divergence(reduction=case.reduction, **given)}


def on(device: str | torch.device, value: object) -> object:
    """Move a tensor, and leave anything else as it is."""
    return value.to(device) if isinstance(value, torch.Tensor) else value


def fastkl_outcome(case: Case, device: str) -> dict[str, torch.Tensor]:
    """Compute a case on a device with fastkl."""
    inputs = leaves(case, device=device)
    return differentiate(case, inputs, call(case, inputs))


# ---- the truth, and plain torch


def textbook(p_logits: torch.Tensor, q_logits: torch.Tensor) -> testing.Truth:
    """Compute two log-softmaxes and the KLs as everyone writes them, in the logits' type."""
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return testing.Truth(
        log_p,
        log_q,
        -(log_p.exp() * log_p).sum(-1),
        (log_p.exp() * (log_p - log_q)).sum(-1),
        (log_q.exp() * (log_q - log_p)).sum(-1),
    )


def scaled(case: Case, prefix: str, inherits: bool, logits: torch.Tensor) -> torch.Tensor:
    """Scale, cap and divide the raw logits of one model."""
    cap, factor = case.heads[bool(prefix) and not inherits] or (case.softcap, 1.0)
    second = prefix and case.ref_temperature is not None
    temperature = case.ref_temperature if second else case.temperature
    if isinstance(temperature, torch.Tensor):
        valid = torch.ones_like(temperature, dtype=torch.bool) if case.mask is None else case.mask
        temperature = torch.where(valid, temperature, 1.0)[..., None].to(logits.device)
    logits = logits * factor
    return (logits if cap is None else cap * torch.tanh(logits / cap)) / temperature


def linear(prefix, hidden, weight, bias, finish) -> torch.Tensor:
    """Compute raw logits."""
    return F.linear(hidden, weight, bias)


def logits_of(case: Case, inputs: dict[str, torch.Tensor], head: Callable = linear) -> list:
    """Return both models' logits over their temperatures: head(prefix, hidden, weight, bias,
    finish) are the raw ones, finish makes them the model's.
    """
    logits = []
    for prefix in ("", "ref_") if "ref_hidden" in inputs else ("", ""):
        inherits = bool(prefix) and "ref_weight" not in inputs and case.heads[0] is not None
        weight = inputs.get(f"{prefix}weight", inputs["weight"])
        bias = inputs.get("bias" if inherits else f"{prefix}bias")
        hidden = inputs[f"{prefix}hidden"]
        if case.mask is not None:
            hidden = hidden.masked_fill(~case.mask.to(hidden.device)[..., None], 0.0)
        finish = functools.partial(scaled, case, prefix, inherits)
        logits.append(finish(head(prefix, hidden, weight, bias, finish)))
    return logits


def compute(
    case: Case, inputs: dict[str, torch.Tensor], head: Callable, statistics: Callable
) -> dict[str, torch.Tensor]:
    """Compute the values by definition from logits_of; statistics(p, q) is a testing.Truth."""
    exact = statistics(*logits_of(case, inputs, head))
    mask = torch.ones_like(exact.kl, dtype=torch.bool) if case.mask is None else case.mask
    mask = mask.to(exact.kl.device)
    kl = torch.where(mask, exact.kl, 0.0)
    if case.reduction == "stats":
        tokens = torch.where(mask, case.tokens.to(mask.device), 0)
        values = exact.stats(tokens)
        names = FIELDS if "ref_hidden" in inputs else FIELDS[:2]
        return {name: torch.where(mask, values[name], 0.0) for name in names}
    if case.reduction == "none":
        return {"kl": kl}
    total = (kl * inputs["weights"] if "weights" in inputs else kl).sum()
    return {"kl": total if case.reduction == "sum" else total / mask.sum().clamp(min=1)}


def truth(case: Case) -> dict[str, torch.Tensor]:
    """Compute the very inputs in float64 on the CPU, gradients by autograd."""
    inputs = leaves(case, torch.float64)
    return differentiate(case, inputs, compute(case, inputs, linear, testing.truth))


def logits_dtype(case: Case) -> torch.dtype:
    """Return the type that logits are rounded to."""
    types = {case.tensors[name].dtype for name in ("hidden", "ref_hidden") if name in case.tensors}
    return case.logits_dtype or (types.pop() if len(types) == 1 else torch.float32)


def plain(case: Case, device: str) -> dict[str, torch.Tensor]:
    """Compute with plain torch: F.linear and its backward in the inputs' types, between logits and
    results float32, as everyone writes it.

    Where logits are float32 and inputs are not, products of the inputs as float32, with the
    backward of the 16-bit product. For float32 inputs everything but the products is in float64,
    which leaves the error of the products alone.
    """
    exact = all(value.dtype == torch.float32 for value in case.tensors.values())

    def head(prefix, hidden, weight, bias, finish) -> torch.Tensor:
        logits = F.linear(hidden, weight, bias)
        if exact or logits_dtype(case) == logits.dtype:
            return logits.double() if exact else logits.float()
        wide = (value if value is None else value.detach().float() for value in (weight, bias))
        return F.linear(hidden.detach().float(), *wide) + (logits.float() - logits.detach().float())

    inputs = leaves(case, device=device)
    statistics = testing.truth if exact else textbook
    return differentiate(case, inputs, compute(case, inputs, head, statistics))


# ---- how far a result may be off


def rounding(case: Case, exact: dict[str, torch.Tensor], draws: int = 6) -> dict[str, float]:
    """Return L2 errors that rounding explains: of products summed in float32, of logits and their
    gradients rounded to a type, of rounded results.

    The truth again with every logit and every gradient of a logit moved as far as its roundings
    can, up or down at random. Errors of these sizes add up at random, and a root mean square of a
    few draws is known to a third, hence 1.5 times it, and more for a few values. 1e-5 of the truth
    is what the float32
    arithmetic between logits and results may add, and to each token what fastkl.testing allows a
    value near 0; a gradient of a shorter type is rounded twice ("sum", "mean": before and after the
    upstream gradient).
    """
    generator = torch.Generator().manual_seed(0)
    squares = dict.fromkeys(exact, 0.0)

    def sign(logits: torch.Tensor) -> torch.Tensor:
        return torch.randint(2, logits.shape, generator=generator).double() * 2 - 1

    def head(prefix, hidden, weight, bias, finish) -> torch.Tensor:
        logits, kind = F.linear(hidden, weight, bias), case.tensors[f"{prefix}hidden"].dtype
        with torch.no_grad():
            up, along = sign(logits), sign(logits)
            wide = UNIT_ROUNDOFF[torch.float64 if kind == torch.float64 else torch.float32]
            # A sum of H terms; then the subtraction of the row's largest logit and its like, each
            # rounded to the size of these.
            terms = F.linear(hidden.abs(), weight.abs(), None if bias is None else bias.abs())
            largest = logits.abs().amax(-1, keepdim=True)
            shift = wide * (math.sqrt(hidden.shape[-1]) * terms + 4 * largest) * up
            # Rounded to the logits' type: the product, and with its bias again.
            if logits_dtype(case) not in (torch.float32, torch.float64):
                rounded = logits.abs() + (0 if bias is None else (logits - bias).abs())
                shift = shift + UNIT_ROUNDOFF[logits_dtype(case)] * rounded * sign(logits)
            factor = max(4 * wide, UNIT_ROUNDOFF[kind]) * along
            # A probability known to 4 roundings of itself, also where exact arithmetic leaves a
            # gradient of 0.
            slope = finish(torch.full_like(logits, 1e-9)) / 1e-9
            least = SUBNORMAL.get(kind, 0.0) + 4 * wide * finish(logits).softmax(-1) * slope
        moved = logits + shift
        if moved.requires_grad:
            moved.register_hook(lambda grad: grad + grad * factor + least * up)
        return moved

    for _ in range(draws):
        inputs = leaves(case, torch.float64)
        moved = differentiate(case, inputs, compute(case, inputs, head, testing.truth))
        for name in exact:
            squares[name] += float((moved[name] - exact[name]).norm() ** 2) / draws
    allowed = {}
    for name, value in exact.items():
        source = name.removeprefix("gradient to ")
        kind = torch.float32 if source == name else case.tensors[source].dtype
        result = (2 * UNIT_ROUNDOFF[kind] if kind != torch.float32 else 0.0) + 1e-5
        near_zero = NEAR_ZERO.get(name, 0.0) * case.tensors["hidden"].shape[:-1].numel()
        near_zero += SUBNORMAL.get(kind, 0.0) * math.sqrt(value.numel())
        # One value may be four standard deviations off, the norm of many hardly one.
        spread = max(1.5, 1 + 3 / math.sqrt(max(1, value.numel())))
        allowed[name] = result * float(value.norm()) + near_zero + spread * math.sqrt(squares[name])
    return allowed


def errors(result: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the L2 norm of the error of every value and gradient; inf where it is not finite."""
    norms = {name: float((on("cpu", result[name]).double() - exact[name]).norm()) for name in exact}
    return {name: norm if math.isfinite(norm) else math.inf for name, norm in norms.items()}


def assert_within(
    result: dict[str, torch.Tensor],
    exact: dict[str, torch.Tensor],
    allowed: dict[str, float] | float,
) -> None:
    """Raise where a value or a gradient is off by more than the allowed L2 error over all its
    elements; a number is relative to the norm.
    """
    assert result.keys() == exact.keys()
    for name, error in errors(result, exact).items():
        assert result[name].shape == exact[name].shape, name
        norm = float(exact[name].norm())
        most = allowed[name] if isinstance(allowed, dict) else allowed * norm
        assert error <= most, f"{name}: error {error:.3g} of {norm:.3g}, allowed {most:.3g}"


def assert_types(result: dict[str, torch.Tensor], case: Case) -> None:
    """Values are float32 (float64 for float64 inputs), each gradient has the type of its input."""
    wide = torch.float64 if case.tensors["hidden"].dtype == torch.float64 else torch.float32
    for name, value in result.items():
        source = name.removeprefix("gradient to ")
        assert value.dtype == (wide if source == name else case.tensors[source].dtype), name


def plain_errors(case: Case, exact: dict[str, torch.Tensor], device: str) -> dict[str, float]:
    """Return errors of plain torch; of a sum, those of its terms, which may cancel by luck."""
    result = plain(case, device)
    found = errors(result, exact)
    if case.reduction in ("sum", "mean"):
        name = "gradient to weights"
        terms = (result[name].double().cpu() - exact[name]).abs() * case.tensors["weights"].abs()
        found["kl"] = float(terms.sum()) / abs(float(upstream_for(case, "kl", exact["kl"])))
    return found


def check(device: str, case: Case) -> dict[str, torch.Tensor]:
    """Compare with the truth, which is returned: float64 within 1e-10, float32 within 1e-5 or 1.5
    times what its products cost, 16 bits within 1.5 times plain torch's error, and 1e-5 where
    logits are float32: what fastkl's own arithmetic may cost.

    The gradients of a sum are finished before their upstream gradient is known: float16 has the
    digits that a weight of 1 for the heaviest token leaves it, and each is rounded once more when
    the upstream gradient multiplies it. Beside rounded logits that is within the 1.5. Beside
    float32 logits these roundings are most of plain torch's error too: there the upstream gradient
    is the power of two that makes the heaviest token count 1.
    """
    kinds = {value.dtype for name, value in case.tensors.items() if name != "weights"}
    wide = logits_dtype(case) == torch.float32
    if wide and kinds != {torch.float32} and case.reduction in ("sum", "mean"):
        heaviest = float(case.tensors["weights"].max())
        heaviest /= len(case.tensors["weights"]) if case.reduction == "mean" else 1
        case = case.but(random=False, scale=2.0 ** -math.ceil(math.log2(heaviest)))
    exact, result = truth(case), fastkl_outcome(case, device)
    assert_types(result, case)
    assert all(bool(value.any()) for value in exact.values()), "zero: nothing was compared"
    if kinds == {torch.float64}:
        assert_within(result, exact, 1e-10)
    else:
        own = {name: 1e-5 * float(value.norm()) * wide for name, value in exact.items()}
        other = plain_errors(case, exact, device)
        assert_within(result, exact, {name: max(1.5 * other[name], own[name]) for name in exact})
    return exact
