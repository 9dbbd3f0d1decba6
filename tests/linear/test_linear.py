"""linear_token_stats and linear_kl_divergence: their digits against float64 and plain torch, and
what must hold whatever the numbers are.
"""

from __future__ import annotations

import functools
import math
import os

import cases
import linear_cases
import linear_inputs
import pytest
import torch
import torch.nn.functional as F
from linear_inputs import CALLS, FIELDS, INPUTS, Case, few, small_case

from fastkl import testing

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETING:
    cases.compute_as_a_gpu()

# Sizes of the noise between the models' logits. A KL of 1e-3, from there to 10 over the tokens of a
# batch, and 10.
SIZES = {
    "random near": (0.045, 0.045),
    "random all": (0.045, 5.0),
    "random far": (5.0, 5.0),
    "peaked near": (0.33, 0.33),
    "peaked all": (0.33, 7.0),
    "peaked far": (7.0, 7.0),
}
TOKENS = 12 if INTERPRETING else 96
KL = {"near": (5e-4, 2e-3), "all": (0.1, 5.0), "far": (4.0, 16.0)}


def data(kind: str, call: str, **changes) -> Case:
    """Draw two models that far apart, in chunks that do not divide the tokens; a sampled token is
    the peak or any.

    In float16 a token's upstream gradient is of size 8, as a loss scale makes it: p·d/96 of a mean
    lies at 1e-6, where float16's numbers are 6e-8 apart, and what plain torch loses there must not
    widen the bar. The mean without a scale is compared too.
    """
    size = {"vocabulary": 130, "width": 24} if INTERPRETING else {}
    tensors = linear_inputs.models(kind.split()[0], SIZES[kind], tokens=TOKENS, **size)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(len(tensors["weight"]), (TOKENS,), generator=generator)
    tokens[::2] = F.linear(tensors["hidden"], tensors["weight"], tensors["bias"]).argmax(-1)[::2]
    options = {"chunk_size": TOKENS * 2 // 5, "scale": 1024.0 if call == "mean" else 8.0}
    case = Case(tensors, call, tokens=tokens, **{**options, **changes})
    return case.without("weights") if call in ("stats", "none") else case


def one_head(call: str, *left_out: str) -> Case:
    """Give both models one lm_head, with its bias."""
    case = data("random far", call)
    noise = torch.randn(case.tensors["hidden"].shape, generator=torch.Generator().manual_seed(3))
    case.tensors["ref_hidden"] = case.tensors["hidden"] + 0.5 * noise
    case.tensors.update(ref_weight=case.tensors["weight"], ref_bias=case.tensors["bias"])
    return case.without(*left_out)


def thousands(call: str, chunk_size: int | None) -> Case:
    """Make thousands of tokens, of which one product gives the logits of 1024 at the most while the
    products back take more, and the last ones fewer.
    """
    size = {"tokens": 2501, "vocabulary": 19, "width": 8, "extra": 4}
    tensors = linear_inputs.models("random", (0.3, 3.0), **size)
    mask = torch.rand(2501, generator=torch.Generator().manual_seed(2)) < 0.8
    scale = 1024.0 if call == "mean" else 1.0
    tokens = torch.arange(2501) % 19
    return Case(tensors, call, tokens=tokens, mask=mask, chunk_size=chunk_size, scale=scale)


def many_words(call: str) -> Case:
    """Make flat rows of 32768 entries under a loss scale: p·d is 1e-5, where float16's numbers are
    6e-8 apart, unless the scale reaches it.
    """
    tensors = linear_inputs.models("random", (1.0, 1.0), tokens=32, vocabulary=32768, width=32)
    scale, tokens = 4096.0 if call == "mean" else 128.0, torch.arange(32)
    return Case(tensors, call, tokens=tokens, temperature=3.0, scale=scale)


HALF, WIDE = (torch.bfloat16, torch.float16), torch.float32
# name: types of the policy and of the reference, and logits_dtype.
TYPES = {
    "fp32": (WIDE, WIDE, None),
    "bf16": (torch.bfloat16, torch.bfloat16, None),
    "bf16, fp32 logits": (torch.bfloat16, torch.bfloat16, WIDE),
    "fp16": (torch.float16, torch.float16, None),
    "fp16, fp32 logits": (torch.float16, torch.float16, WIDE),
}
OTHER = {
    "fp64": (torch.float64, torch.float64, None),
}
MIXED = {
    "bf16 beside fp32": (torch.bfloat16, WIDE, None),
    "fp32 beside bf16": (WIDE, torch.bfloat16, None),
    "fp16 beside bf16": (torch.float16, torch.bfloat16, None),
}
SHARED = {
    "left out": lambda call: one_head(call, "ref_weight"),
    "same object": one_head,
    "softcap": lambda call: data("random far", call, softcap=4.0),
    "temperature per token": lambda call: data(
        "random far", call, temperature=torch.linspace(0.4, 3.0, TOKENS)
    ),
}
MODELS = {kind: functools.partial(data, kind) for kind in SIZES} | SHARED
UNSCALED = {
    f"{kind}, no loss scale": lambda call, kind=kind: data(
        f"{kind} all", call, scale=1.0 if call == "mean" else 2.0**-7
    )
    for kind in ("random", "peaked")
}
CHUNKS = {
    f"chunks of {size}": functools.partial(data, "random all", chunk_size=size)
    for size in (1, 7, TOKENS - 1, TOKENS, TOKENS + 1, None)
}
THOUSANDS = {
    f"thousands, chunks of {size}": functools.partial(thousands, chunk_size=size)
    for size in (None, 1500, 2100)
}
# Masked tokens' temperatures are not looked at.
MASK = torch.tensor([[True, True, False, True], [True, False, True, True]])
PER_TOKEN = torch.tensor([[0.5, 1.0, 0.0, 2.0], [1.3, -1.0, 0.8, 1.1]])
TURNED = torch.where(MASK, torch.tensor([[1.3, 0.9, 0.8, 1.1], [0.5, 1.0, 0.7, 2.0]]), math.nan)
# name: (inputs left out, a Case's changes). Two models that scale, cap and divide their logits
# each in its own way.
HEADS = {
    "scales": (("bias", "ref_bias"), {"heads": ((None, 0.5), (None, 2.0))}),
    "one cap": (("ref_bias",), {"heads": ((None, 1.0), (1.5, 1.0)), "temperature": 0.7}),
    "everything": (
        (),
        {"heads": ((4.0, 1.7), (2.0, 0.6)), "temperature": 1.3, "ref_temperature": 0.7},
    ),
    "per token": (
        (),
        {"heads": ((3.0, 0.5), (None, 1.0)), "temperature": PER_TOKEN, "ref_temperature": TURNED},
    ),
    "reference per token": (("bias", "ref_bias"), {"ref_temperature": PER_TOKEN}),
    "policy per token": (
        ("bias", "ref_bias"),
        {"temperature": PER_TOKEN, "ref_temperature": 0.7, "softcap": 3.0},
    ),
    "plain policy": ((), {"heads": (None, (2.0, 1.5))}),
    "plain reference": ((), {"heads": ((2.0, 1.5), None)}),
    "one weight": ((), {"heads": ((3.0, 1.0), (None, 2.0))}),
    "one weight, one bias": (("bias",), {"heads": (None, (None, 1.0))}),
    "inherited": (
        ("ref_weight", "ref_bias"),
        {"heads": ((3.0, 1.3), None), "ref_temperature": 2.0},
    ),
    "one model": (
        ("ref_hidden", "ref_weight", "ref_bias"),
        {"heads": ((2.0, 1.5), None), "temperature": 0.7},
    ),
    "plain": ((), {"softcap": 2.0, "temperature": PER_TOKEN}),
}


def with_heads(name: str, call: str) -> Case:
    """Make one of HEADS over [2, 4] tokens, in several chunks, under a mask."""
    left_out, changes = HEADS[name]
    options = {"leading": (2, 4), "mask": MASK, "chunk_size": 3, "sizes": {"ref_width": 6}}
    case = small_case(call, **options, **changes)
    if "one weight" in name:
        case.tensors["ref_weight"] = case.tensors["weight"]
    return case.without(*left_out)


FEW_HEADS = (
    ("everything", "stats", "fp32"),
    ("per token", "mean", "fp32"),
    ("inherited", "none", "fp32"),
)


def grid(models: dict, types: dict, calls: tuple[str, ...] = CALLS) -> list[tuple]:
    """List every combination."""
    return [(call, name, kind) for name in models for kind in types for call in calls]


ONE_MODEL = [("stats", "one model", kind) for kind in ("fp32", "fp64")]
WITH_HEADS = {k: functools.partial(with_heads, k) for k in HEADS}
BUILDERS = WITH_HEADS | MODELS | UNSCALED | CHUNKS | THOUSANDS | {"32768 words": many_words}
ACCURACY = [
    *grid(MODELS, TYPES),
    *grid(["random all"], MIXED, ("stats", "none", "mean")),
    *grid(UNSCALED, ["fp16"], ("none", "sum", "mean")),
    *grid(CHUNKS, ["fp32"]),
    *grid(THOUSANDS, ["fp32", "bf16"]),
    *grid(["32768 words"], ["fp16"], ("none", "sum", "mean")),
    *grid([name for name in HEADS if name != "one model"], ["fp32", "fp64"]),
    *ONE_MODEL,
]


@pytest.mark.parametrize("call, models, types", ACCURACY)
def test_accuracy(implementation, call, models, types) -> None:
    """Values and every gradient, in each type: see linear_cases.check."""
    few(
        implementation,
        (types == "fp32" and models in ("random all", "peaked all"))
        or (types == "fp32" and call in ("stats", "mean") and models in [*SHARED][1:])
        or (types[:4] == "fp16" and models == f"{'random' if call in CALLS[::2] else 'peaked'} all")
        or (call in ("stats", "mean") and models in ("chunks of 1", "peaked, no loss scale"))
        or (models, call, types) in FEW_HEADS,
    )
    if implementation.kernels and types == "fp64":
        pytest.skip("float64 is the reference's")
    policy, reference, logits_dtype = (TYPES | OTHER | MIXED)[types]
    case = BUILDERS[models](call).but(logits_dtype=logits_dtype).typed(policy, reference)
    if call in ("stats", "none"):
        case = case.without("weights")
    exact = linear_cases.check(implementation.device, case)
    if models in SIZES and call == "none" and types == "fp32":
        least, most = KL[models.split()[1]]
        assert least < float(exact["kl"].mean()) < most, "the models are not as far apart"


# ---- properties


@pytest.mark.parametrize("copy", ["same object", "left out", "copy", "Heads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("call", CALLS)
def test_identical_models(implementation, call, dtype, copy) -> None:
    """Exactly 0, with gradient exactly 0 to every input, whatever both models scale by."""
    few(implementation, dtype == torch.float32 and copy != "left out")
    case = small_case(call, dtype, softcap=3.0, temperature=0.7, fields=("kl", "ref_kl"))
    for name in ("hidden", "weight", "bias"):
        value = case.tensors[name]
        case.tensors[f"ref_{name}"] = (
            value if copy in ("same object", "left out") else value.clone()
        )
    if copy == "left out":
        del case.tensors["ref_weight"]
    if copy == "Heads":
        divisors = torch.linspace(0.5, 2.0, 5)
        more = {"temperature": divisors, "ref_temperature": divisors.clone(), "softcap": None}
        case = case.but(heads=((3.0, 0.3),) * 2, **more)
    result = linear_cases.fastkl_outcome(case, implementation.device)
    assert len(result) >= 6
    for name, value in result.items():
        assert name in ("logprob", "ref_logprob", "entropy") or not bool(value.any()), name


@pytest.mark.parametrize("garbage", [math.nan, math.inf, "both", "all masked"])
@pytest.mark.parametrize("call", CALLS)
def test_masked_tokens(implementation, call, garbage) -> None:
    """Any hidden states, ids and weights where the mask is False: exactly 0 there and gradient
    exactly 0; all else is as without these tokens, and zeros where no token counts.
    """
    few(implementation, garbage in ("both", "all masked"))
    mask = torch.tensor([True, False, True, True, False]) & (garbage != "all masked")
    case = small_case(call, mask=mask)
    exact = linear_cases.truth(case)
    case.tokens[[1, 4]] = torch.tensor([-100, 1 << 40])
    number = garbage if isinstance(garbage, float) else math.nan
    for name in ("hidden", "ref_hidden"):
        case.tensors[name][1] = number
        case.tensors[name][4, ::2] = -math.inf if garbage == "both" else number
    if "weights" in case.tensors:
        case.tensors["weights"][~mask] = math.nan
    result = linear_cases.fastkl_outcome(case, implementation.device)
    linear_cases.assert_within(result, exact, 1e-5)
    for name, value in result.items():
        assert value.shape[:1] != mask.shape or not bool(value.cpu()[~mask].any()), name


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)])
@pytest.mark.parametrize("call", CALLS)
def test_no_tokens(implementation, call, leading, masked) -> None:
    """N = 0: results without elements, sums and means of 0, gradients of zeros."""
    mask = torch.ones(leading, dtype=torch.bool) if masked else None
    case = small_case(call, leading=leading, mask=mask, chunk_size=None)
    result = linear_cases.fastkl_outcome(case, implementation.device)
    linear_cases.assert_types(result, case)
    linear_cases.assert_within(result, linear_cases.truth(case), 0.0)


@pytest.mark.parametrize("call", CALLS)
def test_expanded_hidden_states(implementation, call) -> None:
    """Tokens that share one row of memory: each has its own gradient."""
    few(implementation, call in ("none", "sum"))
    case = small_case(call, leading=(2, 3))
    for name in ("hidden", "ref_hidden"):
        case.tensors[name][:] = case.tensors[name][:, :1]
    inputs = linear_inputs.leaves(case, device=implementation.device)
    for name in ("hidden", "ref_hidden"):
        inputs[name] = testing.leaf(inputs[name].detach()[:, :1].expand(2, 3, -1))
    result = linear_cases.differentiate(case, inputs, linear_cases.call(case, inputs))
    linear_cases.assert_within(result, linear_cases.truth(case), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_second_backward(implementation, call, dtype) -> None:
    """Over a retained graph: the same bits, also after the first gradients were written to, as an
    optimiser or clipping does; inputs, and the memory around them, keep every bit.
    """
    few(implementation, dtype == torch.float16)
    layouts = {"hidden": "gap", "ref_hidden": "without the last", "weight": "gap"}
    mask, divisors = torch.tensor([True, False, True, True, True]), torch.linspace(0.5, 2.0, 5)
    case = small_case(call, dtype, mask=mask, temperature=divisors, layouts=layouts)
    case.tensors["hidden"][1] = math.nan
    inputs = linear_inputs.leaves(case, device=implementation.device)
    extras = [value.to(implementation.device) for value in (mask, divisors, case.tokens)]
    case = case.but(mask=extras[0], temperature=extras[1], tokens=extras[2])
    memory = [*(value.detach().untyped_storage() for value in (*inputs.values(), *extras))]
    before = [bytes(storage.cpu().tolist()) for storage in memory]
    values = linear_cases.call(case, inputs)
    first = linear_cases.differentiate(case, inputs, values, retain_graph=True)
    kept = {name: value.clone() for name, value in first.items()}
    for name, value in first.items():
        if name.startswith("gradient"):
            assert bool(value.any()), name
            value.fill_(7.0)
    for name, value in linear_cases.differentiate(case, inputs, values).items():
        testing.assert_same_bits(value, kept[name], name)
    assert [bytes(storage.cpu().tolist()) for storage in memory] == before


@pytest.mark.parametrize("call", CALLS)
def test_no_probability_in_the_reference(implementation, call) -> None:
    """A ref_bias of -inf for one entry: KL = +inf, never NaN, also summed; of the policy's and of
    both: finite, and right.
    """
    case = small_case(call)
    case.tensors["ref_bias"][3] = -math.inf
    if "weights" in case.tensors:
        case.tensors["weights"].abs_()
    for trainable in ((), INPUTS):
        inputs = linear_inputs.leaves(case.but(trainable=trainable), device=implementation.device)
        result = linear_cases.call(case, inputs)
        assert bool((result["kl"] == math.inf).all())
        assert not any(bool(value.isnan().any()) for value in result.values())
    nothing = case.but(mask=torch.zeros(5, dtype=torch.bool))
    result = linear_cases.fastkl_outcome(nothing, implementation.device)
    assert not any(bool(value.any()) for value in result.values())
    case.tensors["bias"][3] = -math.inf
    case = case.but(tokens=case.tokens.clamp(max=2))
    kept = [i for i in range(17) if i != 3]
    without = {k: v[kept] if len(v) == 17 else v for k, v in case.tensors.items()}
    exact = linear_cases.truth(case.but(tensors=without))
    result = linear_cases.fastkl_outcome(case, implementation.device)
    for name, value in result.items():
        if value.dim() and len(value) == 17:
            assert not bool(value[3].any()), name
            result[name] = value[kept]
    linear_cases.assert_within(result, exact, 1e-5)


@pytest.mark.parametrize("call", CALLS)
def test_double_backward_is_refused(implementation, call) -> None:
    """create_graph=True and a derivative of the gradient: an error, not a wrong number, even where
    the rest of the loss has a derivative.
    """
    case = small_case(call)
    inputs = linear_inputs.leaves(case, device=implementation.device)
    value = linear_cases.call(case, inputs)["kl"].sum()
    with pytest.raises(RuntimeError, match="second derivatives|create_graph=True"):
        grad = torch.autograd.grad(value, inputs["hidden"], create_graph=True)[0]
        (inputs["hidden"].sum() + value + grad.square().sum()).backward()


@pytest.mark.parametrize("learning", ["", "hidden", "bias", "ref_weight", "ref_bias", "hidden ref"])
def test_requires_grad_of_each_field(implementation, learning) -> None:
    """A field requires grad exactly if it depends on an input that does."""
    few(implementation, learning in ("bias", "ref_weight"))
    names = tuple({"ref": "ref_hidden"}.get(name, name) for name in learning.split())
    on_p = any(not name.startswith("ref_") for name in names)
    on_q = any(name.startswith("ref_") for name in names)
    expected = dict(zip(FIELDS, (on_p, on_p, on_q, on_p or on_q, on_p or on_q), strict=True))
    for call in CALLS:
        case = small_case(call, trainable=names)
        inputs = linear_inputs.leaves(case, device=implementation.device)
        for name, value in linear_cases.call(case, inputs).items():
            assert value.requires_grad == expected[name], (call, name)
