"""Two ways to compute a Case of linear_inputs.py: fastkl, and the truth in float64; and how far
rounding may lead the first from the second.

An outcome is a dict of every value and of every gradient ("gradient to weight") of one Case,
however it was computed.
"""

import math
from collections.abc import Callable

import family
import torch
import torch.nn.functional as F
from linear_inputs import FIELDS, Case, leaves
from test_topk import textbook
from torch.utils._pytree import tree_map_only

import fastkl
from fastkl import testing
from fastkl.ops.fields import REFERENCE_FIELDS

PER_TOKEN = (*FIELDS, "gradient to weights")
STATISTICS = ("stats", "support")


def differentiate(
    case: Case,
    inputs: dict[str, torch.Tensor],
    values: dict[str, torch.Tensor],
    retain_graph: bool = False,
) -> dict[str, torch.Tensor]:
    """Return values and gradients; zeros where nothing depends on an input."""
    results = {name: value.detach() for name, value in values.items()}
    fields = case.fields if case.reduction in STATISTICS else ("kl",)
    asked = {k: value for k, value in values.items() if value.requires_grad and k in fields}
    learning = {name: value for name, value in inputs.items() if value.requires_grad}
    if asked and learning:
        grads = torch.autograd.grad(
            list(asked.values()),
            list(learning.values()),
            [upstream_for(case, name, value) for name, value in asked.items()],
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
    logits = {"ref_logits": inputs["ref_logits"]} if "ref_logits" in inputs else {}
    return {**made, **logits, **on(inputs["hidden"].device, case.more)}


def options(case: Case, device: str | torch.device = "cpu") -> dict[str, object]:
    names = ("temperature", "ref_temperature", "softcap", "logits_dtype", "chunk_size")
    return {name: on(device, getattr(case, name)) for name in names}


def call(case: Case, inputs: dict[str, torch.Tensor], **more) -> dict[str, torch.Tensor]:
    """Compute fastkl's values. "none" computes its logits again, "stats" keeps them: both ways are
    tested.
    """
    device, given, kind = inputs["hidden"].device, arguments(case, inputs), case.reduction
    if kind == "penalty":
        return {"kl": fastkl.LinearKLPenalty(0.3)(**given)}
    given |= {**options(case, device), "recompute": kind == "none" or None, **more}
    if kind == "topk":
        given = {name: value for name, value in given.items() if value is not None}
        return {"kl": fastkl.linear_topk_kl_divergence(**given)}
    if kind in STATISTICS:
        stats = fastkl.linear_token_stats(tokens=on(device, case.tokens), **given)
        return {name: value for name, value in stats._asdict().items() if value is not None}
    given |= {"weights": inputs.get("weights") if kind != "none" else None, "reduction": kind}
    if case.divergence is not None:
        given |= {"divergence": case.divergence.kind, **case.divergence.options}
        return {"kl": fastkl.linear_divergence(**given)}
    return {"kl": fastkl.linear_kl_divergence(**given)}


def run(case: Case, device: str, function: Callable = call, **more) -> tuple[dict, dict]:
    inputs = leaves(case, device=device)
    return inputs, function(case, inputs, **more)


def on(device: str | torch.device, value: object) -> object:
    return tree_map_only(torch.Tensor, lambda each: each.to(device), value)


def outcome(case: Case, device: str, function: Callable = call, **more) -> dict[str, torch.Tensor]:
    return differentiate(case, *run(case, device, function, **more))


# ---- the truth


def logits_of(
    case: Case,
    inputs: dict[str, torch.Tensor],
    product: Callable = lambda prefix, *linear: F.linear(*linear),
) -> list[torch.Tensor]:
    """Return both models' logits over their temperatures, from raw ones by `product`."""
    logits, mask = [], torch.ones(()).bool() if case.mask is None else case.mask
    second = case.temperature if case.ref_temperature is None else case.ref_temperature
    divisors = [torch.as_tensor(d, dtype=torch.float64) for d in (case.temperature, second)]
    for prefix in ("", "ref_") if "ref_hidden" in inputs else ("", ""):
        inherits = bool(prefix) and "ref_weight" not in inputs and case.heads[0] is not None
        cap, factor = case.heads[bool(prefix) and not inherits] or (case.softcap, 1.0)
        hidden = inputs[f"{prefix}hidden"].masked_fill(~mask[..., None], 0.0)
        bias = inputs.get("bias" if inherits else f"{prefix}bias")
        raw = product(prefix, hidden, inputs.get(f"{prefix}weight", inputs["weight"]), bias)
        capped = raw * factor if cap is None else cap * torch.tanh(raw * factor / cap)
        logits.append(capped / torch.where(mask, divisors[bool(prefix)], 1.0)[..., None])
    if "ref_logits" in inputs:
        given = inputs["ref_logits"].masked_fill(~mask[..., None], 0.0)
        logits[1] = given / torch.where(mask, divisors[1], 1.0)[..., None]
    return logits[::-1] if case.more.get("reverse") else logits


def truth(case: Case, *product: Callable) -> dict[str, torch.Tensor]:
    """Compute the very inputs in float64 on the CPU, by definition, gradients by autograd."""
    inputs = leaves(case, torch.float64)
    logits = logits_of(case, inputs, *product)
    mask = torch.ones(logits[0].shape[:-1]).bool() if case.mask is None else case.mask
    if case.reduction == "support":
        outside = (case.more["support"][..., None] != torch.arange(len(inputs["weight"]))).all(-2)
        # exp(-1e5) is 0, and no infinity.
        mask, logits = mask & ~outside.all(-1), [x.masked_fill(outside, -1e5) for x in logits]
    exact = testing.truth(*logits)
    values = {"kl": exact.kl}
    if case.divergence is not None:
        kind_and_share = case.divergence.kind, case.divergence.share
        values = {"kl": family.textbook(exact.log_p, exact.log_q, *kind_and_share)}
    if case.reduction == "topk":
        how = {k.removeprefix("topk_"): v for k, v in case.more.items() if v is not None}
        values = {"kl": textbook(logits[0], **how)[0]}
    if case.reduction in STATISTICS:
        values = exact.stats(torch.where(mask, case.tokens, 0))
        alone = "ref_hidden" not in inputs
        values = {k: v for k, v in values.items() if not (alone and k in REFERENCE_FIELDS)}
    values = {name: torch.where(mask, value, 0.0) for name, value in values.items()}
    if case.reduction in ("sum", "mean"):
        divisor = mask.sum().clamp(min=1) if case.reduction == "mean" else 1
        weights = torch.where(mask, inputs.get("weights", torch.ones(())), 0.0)
        values = {"kl": (values["kl"] * weights).sum() / divisor}
    return differentiate(case, inputs, values)


def rounding(case: Case, exact: dict[str, torch.Tensor], draws: int = 4) -> dict[str, float]:
    """Return L2 errors that rounding explains: of products summed in float32, of logits and their
    gradients rounded to a type, of rounded results.

    The truth again with every logit and every gradient of a logit moved as far as its roundings
    can, up or down at random: more than twice what rounding does on average. Errors of these sizes
    add up at random; of a few values one may be several standard deviations off. 1e-5 of the truth
    is what the float32 arithmetic between logits and results may add; a gradient of a shorter type
    is rounded twice ("sum", "mean": before and after the upstream gradient).
    """
    generator, squares = torch.Generator().manual_seed(0), dict.fromkeys(exact, 0.0)
    types = {name: torch.finfo(value.dtype) for name, value in case.tensors.items()}
    own, single = types["hidden"], torch.finfo(torch.float32)
    double, wide = own.dtype == "float64", min(own.eps, single.eps) / 2
    rounded = own if types.get("ref_hidden", own).dtype == own.dtype else single
    rounded = rounded if case.logits_dtype is None else torch.finfo(case.logits_dtype)

    def product(prefix, hidden, weight, bias) -> torch.Tensor:
        logits, kind = F.linear(hidden, weight, bias), types[f"{prefix}hidden"]
        up = torch.randint(2, logits.shape, generator=generator) * 2 - 1
        size = logits.detach().abs()
        # A sum of H terms, and the row's largest logit, subtracted; then the logits' type.
        terms = F.linear(hidden.detach().abs(), weight.detach().abs())
        moved = logits + up * (
            wide * (terms + size.amax(-1, keepdim=True)) + rounded.eps / 2 * size
        )
        factor, least = kind.eps / 2 + 4 * wide, 2 * kind.eps * kind.smallest_normal + 4 * wide
        if moved.requires_grad:
            moved.register_hook(lambda grad: grad + up * (factor * grad + least))
        return moved

    for _ in range(draws):
        for name, value in truth(case, product).items():
            squares[name] += float((value - exact[name]).norm() ** 2) / draws
    allowed, tokens = {}, 0 if double else case.tensors["hidden"].shape[:-1].numel()
    for name, value in exact.items():
        kind, count = types.get(name.removeprefix("gradient to "), single), value.numel()
        spread = 1 + 3 / math.sqrt(max(1, count))
        result = 1e-10 if double else 1e-5 + min(2, spread) * kind.eps / 2
        # The bound of fastkl.testing for one token.
        near_zero = tokens * (4e-8 if name in ("kl", "ref_kl") else 2e-6)
        least = 2 * kind.smallest_normal * kind.eps * math.sqrt(count) + near_zero
        allowed[name] = result * float(value.norm()) + least + spread * math.sqrt(squares[name])
    return allowed


def assert_within(
    result: dict[str, torch.Tensor],
    exact: dict[str, torch.Tensor],
    allowed: dict[str, float] | float,
) -> None:
    """Raise where a value or a gradient is off by more than the allowed L2 error over all its
    elements; a number is relative to the norm.
    """
    assert result.keys() == exact.keys()
    for name, value in exact.items():
        assert result[name].shape == value.shape, name
        most = allowed[name] if isinstance(allowed, dict) else allowed * float(value.norm())
        error = float((result[name].cpu().double() - value).norm())
        assert error <= most, f"{name}: error {error:.3g}, allowed {most:.3g}"


def assert_same(result: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        testing.assert_same_bits(result[name], value, name)


def check(device: str, case: Case) -> dict[str, torch.Tensor]:
    """Compare with the truth, which is returned: within what rounding explains, and exactly 0 where
    no token counts. Values are float32 (float64 for float64 inputs), each gradient has the type of
    its input.
    """
    exact, result = truth(case), outcome(case, device)
    assert_within(result, exact, rounding(case, exact))
    wide = torch.float64 if case.tensors["hidden"].dtype == torch.float64 else torch.float32
    types = {f"gradient to {name}": value.dtype for name, value in case.tensors.items()}
    for name, value in result.items():
        assert value.dtype == types.get(name, wide), name
        # Per token: of the leading shape, or the gradient to hidden states.
        if case.mask is not None and value.dim() and ("hidden" in name or name in PER_TOKEN):
            assert not bool(value.cpu()[~case.mask].any()), name
    return exact
