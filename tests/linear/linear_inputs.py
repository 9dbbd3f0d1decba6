"""Hidden states and lm_heads to test with: a Case is one call of the linear level."""

import dataclasses
import functools
import math

import family
import pytest
import torch
import torch.nn.functional as F

import fastkl
from fastkl import _heads
from fastkl.ops import chunks, gemm, linear_sum_op, row_blocks

INPUTS = ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias", "weights")
FIELDS = fastkl.TokenStats._fields
CALLS = ("stats", "none", "sum", "mean")
# Calls of small_case that take more: a teacher's list, a sampler's support, a teacher's logits.
MORE_CALLS = ("topk", "support", "given")


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

    `reduction`: that of linear_kl_divergence, "stats" for linear_token_stats, "support" for that of
    a support, "topk" for linear_topk_kl_divergence, "penalty" for LinearKLPenalty. `more`: further
    arguments. `heads`: (softcap, logit_scale) of a model that is passed as a Head. `fields`: the
    results with an upstream gradient, which is random of size `scale`; without `random` it is
    `scale`. `divergence`: computed by linear_divergence in place of the KL. `layouts`: how an input
    lies in memory, by name.
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
    divergence: family.Member | None = None
    more: dict[str, object] = dataclasses.field(default_factory=dict)
    layouts: dict[str, str] = dataclasses.field(default_factory=dict)

    def but(self, **changes) -> "Case":
        return dataclasses.replace(self, **changes)

    def typed(self, dtype: torch.dtype, ref_dtype: torch.dtype | None = None) -> "Case":
        """Round all inputs but the tokens' weights to a type; tensors given twice stay so."""
        kinds = {name: name.startswith("ref_") and ref_dtype or dtype for name in self.tensors}
        kinds["weights"] = dtype if dtype == torch.float64 else torch.float32
        made: dict[int, torch.Tensor] = {}
        rounded = {
            name: made.setdefault(id(value), value.to(kinds[name]))
            for name, value in self.tensors.items()
        }
        return self.but(tensors=rounded)

    def without(self, *names: str) -> "Case":
        return self.but(tensors={k: v for k, v in self.tensors.items() if k not in names})

    def weighted(self) -> "Case":
        return self if self.reduction in ("sum", "mean") else self.without("weights")


def models(
    kind: str,
    sizes: tuple[float, float],
    *,
    tokens: int = 96,
    vocabulary: int = 500,
    width: int = 64,
    extra: int = 16,
) -> dict[str, torch.Tensor]:
    """Draw a policy and a reference of another width, whose logits differ by noise of a size that
    goes from sizes[0] to sizes[1] over the tokens.

    "random": logits N(0, 3²), KL near size²/2 up to 1. "peaked": p_max near 1 - 1e-3. The reference
    computes the policy's logits in a rotated basis, with `extra` more dimensions for the noise, so
    that no two numbers of the models are the same.
    """
    generator = torch.Generator().manual_seed(0)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    weight, hidden = normal(vocabulary, width) / math.sqrt(width), normal(tokens, width)
    if kind == "random":
        weight = 3 * weight
    else:
        peaks = torch.randint(vocabulary, (tokens,), generator=generator)
        hidden = (
            0.3 * hidden + (12 + 8 * torch.rand(tokens, 1, generator=generator)) * weight[peaks]
        )
    size = torch.logspace(*map(math.log10, sizes), tokens, dtype=torch.float64)[:, None]
    rotation = torch.linalg.qr(normal(width + extra, width + extra))[0]
    second = torch.cat([weight, normal(vocabulary, extra) / math.sqrt(extra)], 1)
    bias = 0.5 * normal(vocabulary)
    made = {
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "ref_hidden": torch.cat([hidden, size * normal(tokens, extra)], 1) @ rotation,
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
    case = case.weighted()
    return (with_more(case) if call in MORE_CALLS else case).typed(dtype)


def with_more(case: Case, divergence: str = "skew_kl 0.1", **more) -> Case:
    """Draw the further arguments of one of MORE_CALLS: lists of five ids, one absent, one repeated,
    and all of the last token's absent from a support; for any other reduction logits of its own in
    place of the second model.
    """
    generator, kind = torch.Generator().manual_seed(case.seed), case.reduction
    leading, vocabulary = case.tensors["hidden"].shape[:-1], len(case.tensors["weight"])
    ids = torch.randint(vocabulary, (*leading, 5), generator=generator)
    ids[..., 3], ids[..., 4] = -1, ids[..., 0]
    if kind == "support":
        ids[..., 1] = case.tokens
        ids.view(-1, 5)[1:][-1:] = vocabulary
        return case.but(more={"support": ids, **more})
    case = case.without("ref_hidden", "ref_weight", "ref_bias").but(heads=(case.heads[0], None))
    if kind == "topk":
        logprobs = torch.randn(*leading, 6, generator=generator).log_softmax(-1)[..., :5]
        lists = {"topk_logprobs": logprobs, "topk_ids": ids}
        more = {"direction": "js", "tail": "bucket", **lists, **more}
        more = {"beta": 0.2 if more["direction"] == "js" else None, **more}
        return case.but(more=more, ref_temperature=None)
    case.tensors["ref_logits"] = 2 * torch.randn(*leading, vocabulary, generator=generator)
    made = {"divergence": family.MEMBERS[divergence], "more": {"reverse": True, **more}}
    return case.but(reduction="none" if kind == "given" else kind, **made)


# Views of other memory, some among NaN: the least dimensions, and how the same numbers lie so.
LAYOUTS = {
    "without the last": (2, lambda value: F.pad(value, (0, 0, 0, 1), value=math.nan)[..., :-1, :]),
    "gap": (2, lambda value: F.pad(value, (1, 2), value=math.nan)[..., 1:-2]),
    "every other": (1, lambda value: value.repeat_interleave(2, -1)[..., ::2]),
    "transposed": (2, lambda value: value.mT.contiguous().mT),
    "time first": (3, lambda value: value.transpose(0, 1).contiguous().transpose(0, 1)),
}


def laid_out(value: torch.Tensor, layout: str | None) -> torch.Tensor:
    least, change = LAYOUTS.get(layout, (math.inf, None))
    return change(value) if value.dim() >= least else value


def leaves(
    case: Case, dtype: torch.dtype | None = None, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """Copy the inputs, to `dtype` where given; those in `trainable` require grad."""
    made: dict[int, torch.Tensor] = {}
    for name, value in case.tensors.items():
        if id(value) not in made:
            moved = value.to(device, dtype or value.dtype, copy=True)
            moved = laid_out(moved, case.layouts.get(name) if dtype is None else None)
            made[id(value)] = moved.detach().requires_grad_(name in case.trainable)
    return {name: made[id(value)] for name, value in case.tensors.items()}


# ---- the library's own plan of chunks: the only place of the tests that knows its names

LARGEST_KEPT = _heads.LARGEST_KEPT


def tuned(monkeypatch: pytest.MonkeyPatch, **values: int) -> None:
    places = {
        "small_sum": (chunks, "SMALL_SUM"),
        "largest_chunk": (chunks, "LARGEST_CHUNK"),
        "tile": (chunks, "TILE"),
        "workspace": (chunks, "WORKSPACE_ON_A_GPU"),
        "block": (gemm, "BLOCK_ELEMENTS"),
        "row_block": (row_blocks, "BLOCK_ELEMENTS"),
        "scaled_at_once": (linear_sum_op, "SCALED_AT_ONCE"),
        "largest_kept": (_heads, "LARGEST_KEPT"),
    }
    for name, value in values.items():
        monkeypatch.setattr(*places[name], value)
    if "workspace" in values:
        monkeypatch.setitem(chunks.WORKSPACE, "cpu", values["workspace"])


def heads_on_meta(
    n: int, h: int, v: int, trainable: tuple[bool, bool], logits_dtype: torch.dtype = torch.bfloat16
) -> list[chunks.ChunkedHead]:
    """Make the policy's bfloat16 head and the reference's of any size, which take no memory."""
    made = []
    for learns in trainable:
        hidden, weight = (torch.empty(k, h, dtype=torch.bfloat16, device="meta") for k in (n, v))
        head = chunks.ChunkedHead(hidden, weight, None, logits_dtype)
        if learns:
            head.grad_hidden = torch.empty_like(hidden)
            head.grad_weight, head.learns = chunks.Sum(weight), True
            head.grad_weight.heads = 1
        head.settle(reads_again=False)
        made.append(head)
    return made


def planned(heads, chunk_size: int | None = None, taking_part=None) -> tuple[int, int]:
    return chunks.plan(heads, chunk_size, taking_part or heads)


def workspace(heads: list[chunks.ChunkedHead]) -> int:
    """Compute linear_token_stats' docstring's formula. Rows are padded to whole lines."""
    (chunk, window), total = planned(heads), 0
    vocabulary = -(-heads[0].weight.shape[0] // chunks.ROW_ELEMENTS) * chunks.ROW_ELEMENTS
    for head in heads:
        wide = not head.learns or head.logits_dtype != head.hidden.dtype
        total += wide * chunk * vocabulary * head.logits_dtype.itemsize
        if head.grad_weight is not None:
            total += window * vocabulary * head.hidden.dtype.itemsize
            one_product = window >= head.hidden.shape[0]
            total += head.grad_weight.extra_bytes - one_product * head.grad_weight.spared_bytes
    return total
