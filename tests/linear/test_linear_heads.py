"""Head and ref_temperature: arguments, bits, and what backward keeps; numbers are in
test_linear.py.
"""

from __future__ import annotations

import linear_cases
import linear_inputs
import pytest
import torch
from linear_inputs import few
from test_linear import with_heads

import fastkl
from fastkl import Head, testing

LEADING = (2, 4)


def test_a_head_of_nothing_else_is_its_weight(implementation) -> None:
    """Head(weight, bias) gives the bits of weight and bias=."""
    case = linear_inputs.small_case("stats")
    inputs = linear_inputs.leaves(case, device=implementation.device)
    heads = linear_cases.call(case.but(heads=((None, 1.0), (None, 1.0))), inputs)
    for name, value in linear_cases.call(case, inputs).items():
        testing.assert_same_bits(heads[name], value, name)


@pytest.mark.parametrize("call", ["stats", "sum"])
@pytest.mark.parametrize(
    "heads, second, count",
    [
        ((True, False), "left out", 1),
        ((True, True), "same", 1),
        ((True, False), "same", 1),
        ((False, True), "same", 1),
        ((True, True), "detached", 2),
    ],
)
def test_one_weight_is_kept_once(call, heads, second, count) -> None:
    """Two models that hold one weight tensor share it, in Heads too: backward keeps it, or its
    gradient, once.
    """
    case = with_heads("one weight", call).but(heads=tuple((3.0, 0.5) if h else None for h in heads))
    inputs, kept = linear_inputs.leaves(case.without("ref_bias")), []
    inputs["ref_bias"] = None if second == "left out" else inputs["bias"]
    if second == "left out":
        del inputs["ref_weight"], inputs["ref_bias"]
    elif second == "detached":
        inputs["ref_weight"] = inputs["weight"].detach()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda value: kept.append(value.shape) or value, lambda value: value
    ):
        linear_cases.call(case, inputs)
    assert kept.count(inputs["weight"].shape) == (count if call == "stats" else 1)


@pytest.mark.parametrize("learns", ["hidden", "ref_hidden"])
def test_float16_at_a_low_temperature_of_one_model(implementation, learns) -> None:
    """A gradient that is 1/ref_temperature as large, or as small, keeps its digits in float16."""
    low, sizes = 2.0**-14, {"ref_width": 6}
    case = linear_inputs.small_case("sum", torch.float16, leading=LEADING, sizes=sizes)
    case = case.without("weights").but(trainable=(learns,), ref_temperature=low, scale=low)
    case = case.but(logits_dtype=torch.float32, random=False)
    result, name = linear_cases.fastkl_outcome(case, implementation.device), f"gradient to {learns}"
    exact = linear_cases.truth(case)[name]
    assert linear_cases.errors(result, {name: exact})[name] <= 2e-3 * float(exact.norm())


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), 2.0**127])
@pytest.mark.parametrize("name", ["temperature", "ref_temperature"])
def test_a_temperature_out_of_range(implementation, name, bad) -> None:
    """An error on the reference and NaN on the kernels, of that token alone; a masked token's may
    be anything.
    """
    few(implementation, bad == 0.0)
    wrong, mask = torch.ones(LEADING), torch.ones(LEADING, dtype=torch.bool)
    wrong[0, 0], mask[0, 0] = bad, False
    options = {"temperature": 4 * torch.ones(LEADING), "ref_temperature": 2 * torch.ones(LEADING)}
    case = linear_inputs.small_case("none", leading=LEADING, **{**options, name: wrong})
    inputs = linear_inputs.leaves(case, device=implementation.device)
    assert bool(linear_cases.call(case.but(mask=mask), inputs)["kl"].isfinite().all())
    if implementation.kernels:
        assert linear_cases.call(case, inputs)["kl"].isnan().sum() == 1
    else:
        with pytest.raises(ValueError, match=f"^{name}: expected positive finite"):
            linear_cases.call(case, inputs)


made = {k: v.requires_grad_() for k, v in linear_inputs.small(LEADING, ref_width=6).items()}
weight, other, bias = made["weight"], made["ref_weight"], made["bias"]
ones = torch.ones
# (start of the message, words, error, arguments)
WRONG = [
    ("bias", "beside a Head", ValueError, {"weight": Head(weight), "bias": bias}),
    ("ref_bias", "beside a Head", ValueError, {"ref_weight": Head(other), "ref_bias": bias}),
    (
        "ref_bias",
        "beside a Head",
        ValueError,
        {"weight": Head(weight), "ref_weight": None, "ref_bias": bias},
    ),
    ("softcap", "beside a Head", ValueError, {"weight": Head(weight), "softcap": 3.0}),
    (
        "softcap",
        "beside a Head as ref_weight",
        ValueError,
        {"ref_weight": Head(other), "softcap": 3.0},
    ),
    ("weight.softcap", "-1", ValueError, {"weight": Head(weight, softcap=-1)}),
    ("ref_weight.softcap", "2^-126", ValueError, {"ref_weight": Head(other, softcap=1e-46)}),
    ("ref_weight.softcap", "str", TypeError, {"ref_weight": Head(other, softcap="3")}),
    ("weight.logit_scale", "2^-126", ValueError, {"weight": Head(weight, logit_scale=1e-46)}),
    ("weight.logit_scale", "positive", ValueError, {"weight": Head(weight, logit_scale=0)}),
    (
        "ref_weight.logit_scale",
        "inf",
        ValueError,
        {"ref_weight": Head(other, logit_scale=float("inf"))},
    ),
    ("weight.logit_scale", "tensor", TypeError, {"weight": Head(weight, logit_scale=bias[0])}),
    ("weight.logit_scale", "NoneType", TypeError, {"weight": Head(weight, logit_scale=None)}),
    (
        "weight.logit_scale",
        "temperature / logit_scale",
        ValueError,
        {"weight": Head(weight, logit_scale=2.0**100), "temperature": 2.0**-100},
    ),
    (
        "ref_temperature",
        "quotient",
        ValueError,
        {"temperature": 2.0**100, "ref_temperature": 2.0**-100},
    ),
    ("weight.weight", "not transposed", ValueError, {"weight": Head(weight.T)}),
    ("weight.weight", "NoneType", TypeError, {"weight": Head(None)}),
    ("ref_weight.weight", "NoneType", TypeError, {"ref_weight": Head(None)}),
    ("ref_weight.bias", "ref_weight.weight", ValueError, {"ref_weight": Head(other, bias[:-1])}),
    ("weight.bias", "float64", TypeError, {"weight": Head(weight, bias.double())}),
    ("ref_weight.weight", ": weight[:V]", ValueError, {"ref_weight": Head(other[:-1])}),
    (
        "ref_weight.weight",
        ": ref_weight.weight[:V] and ref_weight.bias[:V]",
        ValueError,
        {"weight": Head(weight[:-1]), "ref_weight": Head(other, bias)},
    ),
    (
        "ref_bias",
        "ref_bias=weight.bias",
        ValueError,
        {"weight": Head(weight, bias), "ref_weight": weight},
    ),
    ("ref_temperature", "0", ValueError, {"ref_temperature": 0.0}),
    ("ref_temperature", "str", TypeError, {"ref_temperature": "1"}),
    ("ref_temperature", "(4,)", ValueError, {"ref_temperature": ones(4)}),
    (
        "ref_temperature",
        "detach",
        ValueError,
        {"ref_temperature": ones(LEADING, requires_grad=True)},
    ),
    (
        "ref_temperature",
        "without ref_hidden",
        ValueError,
        {"ref_hidden": None, "ref_weight": None, "ref_temperature": 2.0},
    ),
    (
        "ref_weight",
        "without ref_hidden",
        ValueError,
        {"ref_hidden": None, "ref_weight": Head(other)},
    ),
]


@pytest.mark.parametrize("start, words, error, arguments", WRONG)
def test_wrong_arguments(start, words, error, arguments) -> None:
    """The message names the argument, the field of the Head included, and says what to do."""
    given = {k: v for k, v in made.items() if "bias" not in k and k != "weights"}
    with pytest.raises(error) as raised:
        tokens = torch.zeros(LEADING, dtype=torch.long)
        fastkl.linear_token_stats(tokens=tokens, **{**given, **arguments})
    message = str(raised.value)
    assert message.startswith(f"{start}: expected ") and words in message, message
    assert ", got " in message and "; " in message, message
