"""linear_token_stats and linear_kl_divergence: all options in combination, and autocast."""

import contextlib
import math

import cases
import linear_cases
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linear_inputs import CALLS, FIELDS, LAYOUTS, Case, few, laid_out, leaves, small, small_case

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

    call, seed = pick("call", *CALLS), draw(st.integers(0, 10000), label="seed")
    leading, generator = pick("leading shape", *LEADING), torch.Generator().manual_seed(seed)
    sharing = pick("ref_weight", "separate", "separate", "left out", "same object")
    alone = sharing == "separate"
    width, ref_width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    vocabulary = pick("V", 1, 2, 3, 5, 17, 31, 64, 65, 70)
    policy = pick("dtype", *TYPES)
    reference = pick("ref dtype", policy, *TYPES) if alone else policy
    sizes = (vocabulary, width, ref_width if alone else width)
    case = Case(small(leading, *sizes, seed), call, seed=seed)
    if sharing == "same object":
        case.tensors["ref_weight"] = case.tensors["weight"]
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
    layouts = [*LAYOUTS][:-1]
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
        layouts={k: pick("layout", *layouts) for k in names if draw(st.booleans())},
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
        linear_cases.check(implementation.device, case)

    check()


WAYS = {
    # name: (whether compiled, whether autocast is inside the function)
    "eager": (False, False),
    "compiled": (True, True),
    "compiled, autocast around": (True, False),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("call", CALLS)
def test_autocast(implementation, call, half, way) -> None:
    """Under autocast float32 inputs give what the same inputs give that were converted by hand, and
    float32 gradients; float32 logits stay float32; a backward inside autocast has the forward's
    types.
    """
    few(implementation, half == torch.float16 and way == "eager")
    (compiled, inside), device = WAYS[way], implementation.device
    case = small_case(call, mask=torch.tensor([True, True, False, True, True]), softcap=5.0)
    autocast = torch.autocast(device, dtype=half)

    def cast(case: Case, inputs: dict) -> dict[str, torch.Tensor]:
        with autocast if inside else contextlib.nullcontext():
            return linear_cases.call(case, inputs)

    function = torch.compile(cast, fullgraph=True, backend="aot_eager") if compiled else cast
    for logits_dtype in (None, torch.float32):
        case = case.but(logits_dtype=logits_dtype)
        inputs = leaves(case, device=device)
        with contextlib.nullcontext() if inside else autocast:
            values = function(case, inputs)
        result = linear_cases.differentiate(case, inputs, values)
        short = linear_cases.outcome(case.typed(half), device)
        linear_cases.assert_same(result, {name: value.float() for name, value in short.items()})
    outside = linear_cases.outcome(case, device)
    assert not torch.equal(result["kl"], outside["kl"]), "nothing was converted"
    values = linear_cases.call(case, inputs)
    with autocast:
        result = linear_cases.differentiate(case, inputs, values)
    linear_cases.assert_same(result, outside)
