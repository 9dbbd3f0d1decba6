"""linear_token_stats and linear_kl_divergence: all options in combination, and autocast."""

from __future__ import annotations

import math
import os

import cases
import linear_cases
import linear_inputs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linear_inputs import CALLS, FIELDS, Case, few, small_case

from fastkl import testing

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETING:
    cases.compute_as_a_gpu()

LEADING = ((5,), (2, 3), (3, 4), (7,), (2, 1, 3), (1,), (12,), (), (0,), (2, 0, 3))
# Triton's interpreter truncates to bfloat16 where a GPU rounds.
TYPES = (torch.float32, torch.float16, *(() if INTERPRETING else (torch.bfloat16,)))
REMOVED = {"none": ("bias", "ref_bias"), "policy's": ("ref_bias",), "reference's": ("bias",)}


@st.composite
def calls(draw: st.DrawFn) -> Case:
    """Draw a call of either function with any options: two models of three kinds of sharing, with
    and without biases, of one type or of two.
    """

    def pick(label: str, *values: object) -> object:
        return draw(st.sampled_from(values), label=label)

    call, seed = pick("call", *CALLS), draw(st.integers(0, 10000), label="seed")
    leading, generator = pick("leading shape", *LEADING), torch.Generator().manual_seed(seed)
    sharing = pick("ref_weight", "separate", "separate", "left out", "same object")
    width, ref_width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    vocabulary = pick("V", 1, 2, 3, 5, 17, 31, 64, 65, 70)
    ref_width = ref_width if sharing == "separate" else width
    policy = pick("dtype", *TYPES)
    reference = pick("ref dtype", policy, *TYPES) if sharing == "separate" else policy
    case = Case(linear_inputs.small(leading, vocabulary, width, ref_width, seed), call, seed=seed)
    if sharing == "same object":
        case.tensors["ref_weight"] = case.tensors["weight"]
    biases = ("both", "none", *(("policy's", "reference's") if sharing == "separate" else ()))
    removed = list(REMOVED.get(pick("bias", *biases), ()))
    heads = pick("heads", (None, None), ((2.0, 1.5), (None, 0.7)), ((1.5, 0.5), None))
    if sharing == "left out":
        removed += ["ref_weight", *(["ref_bias"] if heads[0] else [])]
        heads = (heads[0], None)
    if call in ("stats", "none") or draw(st.booleans(), label="no weights"):
        removed.append("weights")
    if call == "stats" and pick("no reference", *range(4)) == 3:
        removed += ["ref_hidden", "ref_weight", "ref_bias"]
        heads = (heads[0], None)
    case = case.without(*removed).typed(policy, reference)
    names = [*case.tensors]
    mask = torch.rand(leading, generator=generator) < 0.7
    tokens = torch.randint(vocabulary, leading, generator=generator)
    if draw(st.booleans(), label="mask"):
        tokens = tokens.masked_fill(~mask, -100)
        mask = linear_inputs.laid_out(mask, pick("layout of mask", "gap", "transposed"))
        for number, name in enumerate(name for name in names if name.endswith("hidden")):
            garbage = (math.nan, math.inf, -math.inf)[(seed + number) % 3]
            case.tensors[name].masked_fill_(~mask[..., None], garbage)
    else:
        mask = None
    temperature = 0.5 + 1.5 * torch.rand(leading, generator=generator)
    second = pick("ref_temperature", None, None, 0.8) if "ref_hidden" in names else None
    fields = st.lists(st.sampled_from(FIELDS), min_size=1, unique=True)
    return case.but(
        temperature=pick("temperature", 1.0, 0.6, 2.5, temperature),
        ref_temperature=second,
        trainable=pick("learning", tuple(names), (), tuple(names[seed % 2 :: 2])),
        tokens=tokens,
        mask=mask,
        softcap=pick("softcap", None, 1.5, 30.0) if heads == (None, None) else None,
        heads=heads,
        logits_dtype=pick("logits_dtype", None, torch.float32),
        chunk_size=pick("chunk_size", None, 1, 2, 3, 100),
        fields=tuple(draw(fields, label="fields")) if call == "stats" else ("kl",),
        layouts={k: pick("layout", *linear_inputs.LAYOUTS) for k in names if draw(st.booleans())},
    )


def test_all_options(implementation) -> None:
    """Any combination of options: values and gradients are the truth's, but for what rounding
    explains; tokens that do not count are exactly 0.

    A GPU compiles kernels for most of them, and the interpreter is slow: fewer there.
    """
    examples = 6 if implementation.interpreted else 40 if implementation.kernels else 150
    slow, quiet = [HealthCheck.too_slow], {"deadline": None, "database": None}

    @settings(max_examples=examples, derandomize=True, suppress_health_check=slow, **quiet)
    @given(case=calls())
    def check(case: Case) -> None:
        exact = linear_cases.truth(case)
        result = linear_cases.fastkl_outcome(case, implementation.device)
        linear_cases.assert_types(result, case)
        linear_cases.assert_within(result, exact, linear_cases.rounding(case, exact))
        per_token = {f"gradient to {name}" for name in ("hidden", "ref_hidden", "weights")}
        per_token |= set(FIELDS) if case.reduction in ("stats", "none") else set()
        for name in per_token & result.keys() if case.mask is not None else ():
            assert not bool(result[name][~case.mask.to(implementation.device)].any()), name

    check()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("call", CALLS)
def test_autocast(implementation, call, half) -> None:
    """Under autocast float32 inputs give what the same inputs give that were converted by hand, and
    float32 gradients; a backward inside autocast has the forward's types.
    """
    few(implementation, half == torch.float16)
    mask, device = torch.tensor([True, True, False, True, True]), implementation.device
    case = small_case(call, mask=mask, softcap=5.0)
    results = []
    for cast in (False, True, None):
        inputs = linear_inputs.leaves(case, device=device)
        given = inputs
        if cast:
            given = {k: v if k == "weights" else v.to(half) for k, v in inputs.items()}
        with torch.autocast(device, dtype=half, enabled=cast is False):
            values = linear_cases.call(case, given)
        with torch.autocast(device, dtype=half, enabled=cast is None):
            results.append(linear_cases.differentiate(case, inputs, values))
    with torch.autocast(device, dtype=half):  # float32 logits stay float32
        wide = linear_cases.call(case.but(logits_dtype=torch.float32), given := inputs)
    short = {k: v if k == "weights" else v.to(half) for k, v in inputs.items()}
    expected = linear_cases.call(case.but(logits_dtype=torch.float32), short)
    testing.assert_same_bits(wide["kl"], expected["kl"], "float32 logits")
    outside = linear_cases.fastkl_outcome(case, device)
    for name, value in results[0].items():
        assert value.dtype == torch.float32
        testing.assert_same_bits(value, results[1][name], name)
        testing.assert_same_bits(results[2][name], outside[name], f"{name}, backward inside")
    assert not torch.equal(results[0]["kl"], outside["kl"]), "nothing was converted"
