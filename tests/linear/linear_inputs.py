"""Hidden states and lm_heads to test with: a Case is one call of the linear level."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import fastkl

INPUTS = ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias", "weights")
FIELDS = fastkl.TokenStats._fields
CALLS = ("stats", "none", "sum", "mean")


def few(implementation, wanted: bool) -> None:
    """Skip a case that the interpreter has no time for, or whose numbers are not a GPU's: it
    truncates to bfloat16.
    """
    if implementation.interpreted and not wanted:
        pytest.skip("a part of the cases in the interpreter")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call and one backward. `tensors`: INPUTS that are given, on the CPU; the same object
    twice is passed as the same object twice.

    `reduction`: that of linear_kl_divergence, or "stats" for linear_token_stats. `heads`: (softcap,
    logit_scale) of a model that is passed as a Head. `fields`: the results with an upstream
    gradient, which is random of size `scale`, a power of two so that scaling is exact; without
    `random` it is `scale`. `layouts`: how an input lies in memory, by name.
    """

    tensors: dict[str, torch.Tensor]
    reduction: str = "none"
    trainable: tuple[str, ...] = INPUTS
    tokens: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    temperature: float | torch.Tensor = 1.0
    ref_temperature: float | torch.Tensor | None = None
    softcap: float | None = None
    heads: tuple = (None, None)
    logits_dtype: torch.dtype | None = None
    chunk_size: int | None = None
    fields: tuple[str, ...] = FIELDS
    scale: float = 1.0
    random: bool = True
    seed: int = 0
    layouts: dict[str, str] = dataclasses.field(default_factory=dict)

    def but(self, **changes) -> Case:
        """Change some fields."""
        return dataclasses.replace(self, **changes)

    def typed(self, dtype: torch.dtype, ref_dtype: torch.dtype | None = None) -> Case:
        """Round all inputs but the tokens' weights to a type; tensors given twice stay so."""
        made: dict[int, torch.Tensor] = {}
        kinds = {name: (name.startswith("ref_") and ref_dtype) or dtype for name in self.tensors}
        if dtype != torch.float64:
            kinds["weights"] = torch.float32
        rounded = {
            name: made.setdefault(id(value), value.to(kinds[name]))
            for name, value in self.tensors.items()
        }
        return self.but(tensors=rounded)

    def without(self, *names: str) -> Case:
        """Leave out some inputs."""
        return self.but(tensors={k: v for k, v in self.tensors.items() if k not in names})


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
    """Draw a policy and a reference of another width, whose logits differ by noise of a size that
    goes from sizes[0] to sizes[1] over the tokens.

    "random": logits N(0, 3²), KL near size²/2 up to 1. "peaked": p_max near 1 - 1e-3. The reference
    computes the policy's logits in a rotated basis, with `extra` more dimensions for the noise, so
    that no two numbers of the models are the same.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, noise = normal(vocabulary, width) / math.sqrt(width), normal(tokens, extra)
    if kind == "random":
        weight, hidden = 3 * weight, normal(tokens, width)
    else:
        height = 12 + 8 * torch.rand(tokens, 1, generator=generator, dtype=torch.float64)
        peaks = torch.randint(vocabulary, (tokens,), generator=generator)
        hidden = height * weight[peaks] + 0.3 * normal(tokens, width)
    ends = [math.log10(size) for size in sizes]
    size = torch.logspace(*ends, tokens, dtype=torch.float64)[:, None]
    rotation = torch.linalg.qr(normal(width + extra, width + extra))[0]
    bias = 0.5 * normal(vocabulary)
    second = torch.cat([weight, normal(vocabulary, extra) / math.sqrt(extra)], 1)
    made = {
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "ref_hidden": torch.cat([hidden, size * noise], 1) @ rotation,
        "ref_weight": second @ rotation,
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
    """Draw all seven inputs, of two models that have nothing to do with each other."""
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


def small_case(call: str, dtype: torch.dtype = torch.float32, **changes) -> Case:
    """Five tokens of two small models, with weights where the call takes them."""
    leading, sizes = changes.pop("leading", (5,)), changes.pop("sizes", {})
    tokens = torch.arange(math.prod(leading)).reshape(leading) % 17
    case = Case(small(leading, **sizes), call, tokens=tokens, **{"chunk_size": 2, **changes})
    return (case.without("weights") if call in ("stats", "none") else case).typed(dtype)


# Views of other memory, among NaN: a slice of more tokens, a gap after each row, every other
# element, transposed.
LAYOUTS = ("without the last", "time first", "gap", "every other", "transposed")


def laid_out(value: torch.Tensor, layout: str) -> torch.Tensor:
    """Put the same numbers elsewhere in memory."""
    if value.dim() < {"every other": 1, "time first": 3}.get(layout, 2):
        return value
    if layout in ("transposed", "time first"):
        dims = (0, -1) if layout == "transposed" else (0, 1)
        return value.transpose(*dims).contiguous().transpose(*dims)
    *leading, width = value.shape
    shape, view = {
        "without the last": ((*leading[:-1], leading[-1] + 1 if leading else 0, width), None),
        "gap": ((*leading, width + 3), slice(1, -2)),
        "every other": ((*leading, 2 * width), slice(None, None, 2)),
    }[layout]
    base = torch.full(shape, math.nan, dtype=value.dtype, device=value.device)
    return (base[..., :-1, :] if view is None else base[..., view]).copy_(value)


def leaves(
    case: Case, dtype: torch.dtype | None = None, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """Copy the inputs, to `dtype` where given; those in `trainable` require grad."""
    made: dict[int, torch.Tensor] = {}
    for name, value in case.tensors.items():
        if id(value) not in made:
            moved = value.to(device, dtype or value.dtype, copy=True)
            if name in case.layouts and dtype is None:
                moved = laid_out(moved, case.layouts[name])
            made[id(value)] = moved.detach().requires_grad_(name in case.trainable)
    return {name: made[id(value)] for name, value in case.tensors.items()}
