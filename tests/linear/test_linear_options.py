"""The functions on hidden states: all options in combination, autocast, LinearKLPenalty against
KLPenalty on the logits that the heads would give, and the custom ops under them.
"""

import contextlib
import itertools
import math
from types import SimpleNamespace

import cases
import linear_cases
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linear_inputs import (
    CALLS,
    FIELDS,
    INPUTS,
    LAYOUTS,
    MORE_CALLS,
    Case,
    few,
    laid_out,
    leaves,
    small,
    small_case,
)
from test_linear import with_heads

import fastkl
from fastkl import testing
from fastkl.ops.linear_sum_op import ScaledInputs, scaled

LEADING = ((5,), (2, 3), (3, 4), (7,), (2, 1, 3), (1,), (12,), (), (0,), (2, 0, 3))
# Triton's interpreter truncates to bfloat16 where a GPU rounds.
TYPES = (torch.float32, torch.float16, *(() if cases.INTERPRETING else (torch.bfloat16,)))
BIASES = {"both": (), "none": ("bias", "ref_bias"), "policy's": ("ref_bias",), "other's": ("bias",)}


@st.composite
def calls(draw: st.DrawFn) -> Case:
    """Draw a call of either function with any options: two models of three kinds of sharing, with
    and without biases, of one type or of two.
    """

    def pick(label: str, *values: object) -> object:
        return draw(st.sampled_from(values), label=label)

    call, seed, leading = pick("call", *CALLS), draw(st.integers(0, 10000)), pick("shape", *LEADING)
    sharing = pick("ref_weight", "separate", "separate", "left out", "same object")
    alone, generator = sharing == "separate", torch.Generator().manual_seed(seed)
    vocabulary, policy = pick("V", 1, 2, 3, 5, 17, 31, 64, 65, 70), pick("dtype", *TYPES)
    reference = pick("ref dtype", policy, *TYPES) if alone else policy
    width = pick("H", *range(1, 10))
    ref_width = pick("H_ref", *range(1, 10)) if alone else width
    case = Case(small(leading, vocabulary, width, ref_width, seed), call, seed=seed)
    case.tensors["ref_weight"] = case.tensors[
        "weight" if sharing == "same object" else "ref_weight"
    ]
    removed = [*BIASES[pick("bias", *([*BIASES] if alone else ("both", "none")))]]
    heads = pick("heads", (None, None), ((2.0, 1.5), (None, 0.7)), ((1.5, 0.5), None))
    if sharing == "left out":
        removed += ["ref_weight", *(["ref_bias"] if heads[0] else [])]
    if call in ("stats", "none") or draw(st.booleans(), label="no weights"):
        removed.append("weights")
    if call == "stats" and pick("no reference", *range(4)) == 3:
        removed += ["ref_hidden", "ref_weight", "ref_bias"]
    case = case.without(*removed).typed(policy, reference)
    names = [*case.tensors]
    mask = torch.rand(leading, generator=generator) < 0.7
    tokens = torch.randint(vocabulary, leading, generator=generator).masked_fill(~mask, -100)
    if draw(st.booleans(), label="mask"):
        for number, name in enumerate(name for name in names if name.endswith("hidden")):
            garbage = (math.nan, math.inf, -math.inf)[(seed + number) % 3]
            case.tensors[name].masked_fill_(~mask[..., None], garbage)
        mask = laid_out(mask, pick("layout of mask", "gap", "transposed"))
    else:
        tokens, mask = tokens.clamp(min=0), None
    temperature = 0.5 + 1.5 * torch.rand(leading, generator=generator)
    second = pick("ref_temperature", None, None, 0.8) if "ref_hidden" in names else None
    fields = st.lists(st.sampled_from(FIELDS), min_size=1, unique=True)
    return case.but(
        temperature=pick("temperature", 1.0, 0.6, 2.5, temperature),
        ref_temperature=second,
        trainable=pick("learning", tuple(names), (), tuple(names[seed % 2 :: 2])),
        tokens=tokens,
        mask=mask,
        softcap=pick("softcap", None, 1.5, 30) if heads == (None, None) else None,
        heads=heads if "ref_weight" in names else (heads[0], None),
        logits_dtype=pick("logits_dtype", None, torch.float32),
        chunk_size=pick("chunk_size", None, 1, 2, 3, 100),
        fields=tuple(draw(fields, label="fields")),
        layouts={k: pick("layout", *LAYOUTS) for k in names if draw(st.booleans())},
    )


def test_all_options(implementation) -> None:
    # A GPU compiles kernels for most of them, and the interpreter is slow: fewer there.
    examples = 6 if implementation.interpreted else 40 if implementation.kernels else 150

    @settings(
        max_examples=examples,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
        deadline=None,
        database=None,
    )
    @given(case=calls())
    def check(case: Case) -> None:
        linear_cases.check(implementation.device, case)

    check()


WAYS = {
    # name: (whether compiled, whether autocast is inside the function)
    "eager": (False, False),
    "compiled": (True, True),
    "compiled, autocast around": (True, False),
}


@pytest.mark.parametrize(
    "call, way, half",
    [
        *itertools.product(("stats", "mean"), WAYS, [torch.bfloat16]),
        *itertools.product(("none", "sum", "topk", "support"), ["eager"], [torch.bfloat16]),
        *itertools.product((*CALLS, "topk", "support"), ["eager"], [torch.float16]),
    ],
)
def test_autocast(implementation, call, way, half) -> None:
    """Under autocast float32 inputs give what the same inputs give that were converted by hand, and
    float32 gradients; float32 logits stay float32; a backward inside autocast has the forward's
    types.
    """
    few(implementation, half == torch.float16 and way == "eager")
    (compiled, inside), device = WAYS[way], implementation.device
    case = small_case(call, mask=torch.tensor([True, True, False, True, True]), softcap=5.0)
    autocast, nothing = torch.autocast(device, dtype=half), contextlib.nullcontext()

    def cast(case: Case, inputs: dict) -> dict[str, torch.Tensor]:
        with autocast if inside else nothing:
            return linear_cases.call(case, inputs)

    function = torch.compile(cast, fullgraph=True, backend="aot_eager") if compiled else cast
    for logits_dtype in (None, torch.float32):
        case = case.but(logits_dtype=logits_dtype)
        with nothing if inside else autocast:
            inputs, values = linear_cases.run(case, device, function)
        result = linear_cases.differentiate(case, inputs, values)
        short = linear_cases.outcome(case.typed(half), device)
        linear_cases.assert_same(result, {name: value.float() for name, value in short.items()})
    outside = linear_cases.outcome(case, device)
    assert not torch.equal(result["kl"], outside["kl"]), "nothing was converted"
    values = linear_cases.call(case, inputs)
    with autocast:
        result = linear_cases.differentiate(case, inputs, values)
    linear_cases.assert_same(result, outside)


# ---- LinearKLPenalty

SOME = torch.tensor([[True, False, True, True], [False, True, True, False]])
MASKS = {"all": None, "masked": SOME, "none": SOME & False, "no tokens": SOME[:, :0]}


@pytest.mark.parametrize("models", ["plain", "everything", "inherited", "one weight"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("reduction", ["token_mean", "mean", "sequence_mean", "sum"])
@pytest.mark.parametrize("direction", ["policy||reference", "reference||policy"])
def test_equals_klpenalty_on_logits(implementation, direction, reduction, mask, models) -> None:
    """Value, the gradients of all tensors and `last` are float64's, with chunks smaller than the
    batch, whatever masked hidden states hold; exactly 0 where no token counts. A controller's beta
    is read at the call.
    """
    few(implementation, models == "everything" and mask == "masked")
    case = with_heads(models, "sum").without("weights").but(mask=MASKS[mask])
    case = case.but(temperature=1.3) if models == "plain" else case
    for name in ("hidden", "ref_hidden"):
        if mask == "no tokens":
            case.tensors[name] = case.tensors[name][:, :0]
        elif mask != "all":
            case.tensors[name][~MASKS[mask]] = math.nan
    made, controller = {"direction": direction, "reduction": reduction}, SimpleNamespace(beta=0.2)
    penalty = fastkl.LinearKLPenalty(controller, **made, **linear_cases.options(case))
    controller.beta = 0.7
    inputs = leaves(case, device=implementation.device)
    loss = penalty(**linear_cases.arguments(case, inputs))
    assert loss.shape == () and loss.dtype == torch.float32
    exact, by_logits = leaves(case, torch.float64), fastkl.KLPenalty(0.7, **made)
    with fastkl.use_backend("reference"):
        expected = by_logits(*linear_cases.logits_of(case, exact), MASKS[mask])
        outcome = linear_cases.differentiate(case, exact, {"kl": expected})
    result = linear_cases.differentiate(case, inputs, {"kl": loss})
    linear_cases.assert_within(result, outcome, 1e-5)
    assert penalty.last.keys() == by_logits.last.keys()
    for name, value in penalty.last.items():
        assert not value.requires_grad and value.device == loss.device
        testing.assert_near(value, by_logits.last[name].cpu(), 1e-5, 0.0, f"last {name}")


# ---- the custom ops

V, H = 11, 4
MASK, DIVISORS = torch.tensor([True, False, True]), torch.tensor([0.5, 1.2, 0.9])
PER_TOKEN = {"temperature": DIVISORS, "ref_temperature": DIVISORS.flip(0)}
HALF = {"heads": ((2.0, 1.0), (None, 0.7))}
# name: (inputs left out, a Case's changes), for three tokens.
MIXES = {
    "plain": (("bias", "ref_bias"), {"chunk_size": None}),
    "everything": ((), {"mask": MASK, **PER_TOKEN, **HALF}),
    "shared": (("ref_weight",), {"mask": MASK, "temperature": 0.7, "chunk_size": 1}),
    "shared, per token": (("ref_weight", "bias", "ref_bias"), {"softcap": 5.0, **PER_TOKEN}),
    "one model": (
        ("ref_hidden", "ref_weight", "ref_bias"),
        {"temperature": DIVISORS, "mask": MASK, "softcap": 3.0},
    ),
    "frozen": ((), {"trainable": ()}),
    "one field": ((), {"fields": ("kl",), "trainable": ("hidden",)}),
    "policy fields": ((), {"fields": ("logprob", "entropy")}),
    "reference field": (("ref_weight",), {"fields": ("ref_logprob",)}),
    "no tokens": ((), {"leading": (0, 2)}),
    "one token": ((), {"leading": ()}),
    "bf16": ((), {"dtype": torch.bfloat16}),
    "fp16": ((), {"dtype": torch.float16, "trainable": INPUTS[:6]}),
}


@pytest.mark.parametrize(
    "call, mix",
    [
        *itertools.product(("stats", "mean"), MIXES),
        *itertools.product(("none", "sum", *MORE_CALLS), ("everything", "no tokens", "fp16")),
    ],
)
def test_opcheck(implementation, call, mix) -> None:
    """Schema, fake tensors, autograd registration and AOT dispatch with dynamic shapes are right
    for the arguments that the functions and their backward give.

    They do not depend on the kernels: the interpreter has the mix in which most takes part.
    """
    few(implementation, mix == "everything" and call == "mean")
    if mix == "one model" and call != "stats":
        pytest.skip("a KL needs a reference")
    left_out, changes = MIXES[mix]
    sizes = {"vocabulary": V, "width": H, "ref_width": H if "ref_weight" in left_out else 3}
    case = small_case(call, **{"leading": (3,), "sizes": sizes, **changes}).without(*left_out)
    calls = cases.check_ops(lambda: linear_cases.outcome(case, implementation.device))
    assert len(calls) >= 1 + bool(case.trainable)


@pytest.mark.parametrize(
    "dtype, result",
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float32, torch.float32),
    ],
)
def test_scaled(implementation, dtype, result) -> None:
    gradient = torch.randn(7, 5).to(implementation.device, dtype)
    factor = torch.tensor(0.1234567, device=implementation.device)
    expected = (gradient.double() * factor.double()).float().to(result)
    assert torch.equal(scaled(ScaledInputs(gradient, factor, result)), expected)


class Loss(torch.nn.Module):
    def forward(self, hidden, weight, ref_hidden, reduction):
        return fastkl.linear_kl_divergence(hidden, weight, ref_hidden, reduction=reduction).sum()


def test_export_without_gradients_refuses_them(implementation) -> None:
    """An exported sum keeps what its example inputs required: asked for more it raises; exported
    per token, for any number of tokens, it gives all gradients.
    """
    tensors = small((6,), V, H, H)
    given = [tensors[k].to(implementation.device) for k in ("hidden", "weight", "ref_hidden")]
    learned = [value.clone().requires_grad_() for value in given]
    rows = {0: torch.export.Dim("tokens", min=2)}
    summed, per_token = (
        torch.export.export(Loss(), (*inputs, name), dynamic_shapes=(rows, None, rows, None))
        for name, inputs in (("sum", given), ("none", learned))
    )
    (bounds,) = per_token.range_constraints.values()
    assert bounds.upper > 2**40, "the default of recompute puts no bound on the tokens"
    torch.testing.assert_close(summed.module()(*given, "sum"), Loss()(*given, "sum"))
    losses = Loss()(*learned, "sum"), per_token.module()(*learned, "none")
    torch.testing.assert_close(*(torch.autograd.grad(loss, learned) for loss in losses))
    with pytest.raises(RuntimeError, match="hidden, weight, ref_hidden: expected to be known"):
        summed.module()(*learned, "sum")
