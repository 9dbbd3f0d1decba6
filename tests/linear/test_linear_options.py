"""linear_token_stats and linear_kl_divergence: all options in combination, float64, and autocast."""

from __future__ import annotations

import math
import os

import cases
import linear_cases
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linear_cases import Case

from fastkl import testing

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETING:
    cases.compute_as_a_gpu()

CALLS = ("stats", "none", "sum", "mean")
LEADING = ((5,), (2, 3), (3, 4), (7,), (2, 1, 3), (1,), (12,), ())
EMPTY = ((0,), (2, 0, 3))
# Triton's interpreter truncates to bfloat16 where a GPU rounds.
TYPES = (
    (torch.float32, torch.float16)
    if INTERPRETING
    else (torch.float32, torch.bfloat16, torch.float16)
)


def with_garbage(case: Case, kinds: tuple[float, ...] = (math.nan, math.inf, -math.inf)) -> Case:
    """Where the mask is False, hidden states of NaN and infinities and ids that do not exist."""
    if case.mask is None:
        return case
    tensors = dict(case.tensors)
    for number, name in enumerate(name for name in ("hidden", "ref_hidden") if name in tensors):
        tensors[name] = tensors[name].masked_fill(
            ~case.mask[..., None], kinds[(case.seed + number) % len(kinds)]
        )
    return case.but(tensors=tensors, tokens=case.tokens.masked_fill(~case.mask, -100))


def drawn_tensors(
    draw: st.DrawFn, leading: tuple[int, ...], seed: int, with_weights: bool
) -> dict[str, torch.Tensor]:
    """Two models of one of three kinds of sharing, with and without biases, of one type or of two."""
    sharing = draw(
        st.sampled_from(("separate", "separate", "left out", "same object")), label="ref_weight"
    )
    width, vocabulary = (
        draw(st.integers(1, 9), label="H"),
        draw(st.sampled_from((1, 2, 3, 5, 17, 31, 64, 65, 70)), label="V"),
    )
    ref_width = draw(st.integers(1, 9), label="H_ref") if sharing == "separate" else width
    tensors = linear_cases.small(leading, vocabulary, width, ref_width, seed)
    policy = draw(st.sampled_from(TYPES), label="dtype")
    reference = (
        draw(st.sampled_from((policy, policy, *TYPES)), label="ref dtype")
        if sharing == "separate"
        else policy
    )
    tensors = {
        name: value.to(reference if name.startswith("ref_") else policy)
        for name, value in tensors.items()
    }
    if sharing == "same object":
        tensors["ref_weight"] = tensors["weight"]
    one_of_two = ("policy", "reference") if sharing == "separate" else ()
    biases = draw(st.sampled_from(("both", "none", "one for both", *one_of_two)), label="bias")
    if biases == "one for both" and policy == reference:
        tensors["ref_bias"] = tensors["bias"]
    removed = {"none": ("bias", "ref_bias"), "policy": ("ref_bias",), "reference": ("bias",)}.get(
        biases, ()
    )
    removed += ("ref_weight",) if sharing == "left out" else ()
    if with_weights:
        tensors["weights"] = tensors["weights"].to(
            draw(st.sampled_from((torch.float32, policy)), label="dtype of weights")
        )
    else:
        removed += ("weights",)
    return {name: value for name, value in tensors.items() if name not in removed}


@st.composite
def calls(draw: st.DrawFn) -> Case:
    """A call of either function with any options."""
    call, seed = (
        draw(st.sampled_from(CALLS), label="call"),
        draw(st.integers(0, 10000), label="seed"),
    )
    leading = draw(st.sampled_from(EMPTY if seed % 10 == 7 else LEADING), label="leading shape")
    tensors = drawn_tensors(
        draw, leading, seed, call in ("sum", "mean") and draw(st.booleans(), label="weights")
    )
    if call == "stats" and draw(st.integers(0, 3), label="no reference") == 3:
        tensors = {name: value for name, value in tensors.items() if not name.startswith("ref_")}
    generator = torch.Generator().manual_seed(seed)
    temperature: float | torch.Tensor = draw(st.sampled_from((1.0, 0.6, 2.5)), label="temperature")
    if draw(st.booleans(), label="temperature per token"):
        temperature = 0.5 + 1.5 * torch.rand(leading, generator=generator)
    learning = draw(
        st.sampled_from(("all", "some", "all", "some", "all", "some", "none")), label="learning"
    )
    fields = st.lists(st.sampled_from(linear_cases.FIELDS), min_size=1, unique=True)
    return with_garbage(
        Case(
            tensors,
            call,
            seed=seed,
            temperature=temperature,
            trainable={"all": tuple(tensors), "none": ()}.get(learning)
            or tuple(name for name in tensors if learning == "some" and draw(st.booleans())),
            tokens=torch.randint(len(tensors["weight"]), leading, generator=generator),
            mask=torch.rand(leading, generator=generator) < 0.7
            if draw(st.booleans(), label="mask")
            else None,
            softcap=draw(st.sampled_from((None, 1.5, 30.0)), label="softcap"),
            logits_dtype=draw(st.sampled_from((None, torch.float32)), label="logits_dtype"),
            chunk_size=draw(st.sampled_from((None, 1, 2, 3, 100)), label="chunk_size"),
            fields=tuple(draw(fields, label="fields")) if call == "stats" else ("kl",),
            layouts={
                name: draw(st.sampled_from(linear_cases.LAYOUTS))
                for name in tensors
                if draw(st.booleans())
            },
        )
    )


def check_any(implementation, case: Case) -> None:
    """Values and gradients are the truth's, but for what rounding explains; tokens that do not
    count are exactly 0.
    """
    exact = linear_cases.truth(case)
    result = linear_cases.fastkl_outcome(case, implementation.device)
    linear_cases.assert_types(result, case)
    linear_cases.assert_within(result, exact, linear_cases.rounding(case, exact))
    per_token = {"gradient to hidden", "gradient to ref_hidden", "gradient to weights"}
    per_token |= set(linear_cases.FIELDS) if case.reduction in ("stats", "none") else set()
    for name in per_token & result.keys() if case.mask is not None else ():
        assert not bool(result[name][~case.mask.to(implementation.device)].any()), (
            f"{name} of tokens that do not count"
        )


def test_all_options(implementation) -> None:
    """Any combination of options. A GPU compiles kernels for most of them, and the interpreter is
    slow: fewer there.
    """
    examples = 6 if implementation.interpreted else 40 if implementation.kernels else 200

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(case=calls())
    def check(case: Case) -> None:
        check_any(implementation, case)

    check()


@pytest.mark.parametrize("softcap, temperature", [(None, 1.0), (4.0, 0.6), (2.0, "per token")])
@pytest.mark.parametrize("call", CALLS)
def test_float64(implementation, call, softcap, temperature) -> None:
    """The reference in float64: values and gradients of all inputs to 1e-10 of autograd's."""
    if implementation.kernels:
        pytest.skip("float64 is the reference's")
    temperature = (
        torch.linspace(0.3, 2.0, 5, dtype=torch.float64)
        if temperature == "per token"
        else temperature
    )
    case = Case(
        linear_cases.small(),
        call,
        tokens=torch.tensor([0, 16, 3, 3, 9]),
        mask=torch.tensor([True, True, False, True, True]),
        softcap=softcap,
        temperature=temperature,
        chunk_size=2,
    ).typed(torch.float64)
    case.tensors["weights"] = case.tensors["weights"].double()
    case = case.but(
        trainable=tuple(
            name for name in linear_cases.INPUTS if name != "weights" or call in ("sum", "mean")
        )
    )
    result, exact = linear_cases.fastkl_outcome(case, "cpu"), linear_cases.truth(case)
    linear_cases.assert_types(result, case)
    linear_cases.assert_within(result, exact, linear_cases.share(exact, 1e-10))
    assert all(bool(value.any()) for value in exact.values()), (
        "a gradient is zero: nothing was compared"
    )


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("call", CALLS)
def test_autocast(implementation, call, half) -> None:
    """Under autocast float32 inputs give what the same inputs give that were converted by hand, and
    float32 gradients.
    """
    if implementation.interpreted and half == torch.bfloat16:
        pytest.skip("a part of the cases in the interpreter")
    tensors = linear_cases.small()
    if call in ("stats", "none"):
        del tensors["weights"]
    case = Case(
        tensors,
        call,
        tokens=torch.arange(5),
        mask=torch.tensor([True, True, False, True, True]),
        softcap=5.0,
        chunk_size=2,
    )
    inputs = linear_cases.leaves(case, device=implementation.device)
    with torch.autocast(implementation.device, dtype=half):
        values = linear_cases.call(case, inputs)
    result = linear_cases.differentiate(case, inputs, values)
    assert len(result) > len(tensors) and all(
        value.dtype == torch.float32 for value in result.values()
    )
    inputs = linear_cases.leaves(case, device=implementation.device)
    converted = {
        name: value if name == "weights" else value.to(half) for name, value in inputs.items()
    }
    for name, value in linear_cases.differentiate(
        case, inputs, linear_cases.call(case, converted)
    ).items():
        testing.assert_same_bits(result[name], value, name)
    exact = linear_cases.truth(case)
    assert linear_cases.errors(result, exact)["kl"] > 1e-5 * float(exact["kl"].norm()), (
        "nothing was converted"
    )
