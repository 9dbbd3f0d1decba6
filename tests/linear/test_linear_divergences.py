"""linear_divergence: each divergence against the textbook's formula in float64, the number of its
matrix products, and shares that a divergence does not take.
"""

import functools
import math

import cases
import family
import linear_cases
import pytest
import torch
from family import KINDS, Member
from linear_inputs import LAYOUTS, few, with_more
from test_linear import BF16, FP32, FP64, with_heads
from test_linear_costs import CHUNK, MODES, N, V, assert_products, tensors

import fastkl

MEMBERS = {"kl": Member(fastkl.kl_divergence, "kl"), **KINDS}
each_member = pytest.mark.parametrize("name", MEMBERS)
# Two temperatures and soft caps, one for each token, one weight of two models.
HEADS = ("everything", "per token", "inherited", "one weight", "plain")


# Chunks of 3 tokens, of which some are masked; "none" computes its logits again, and keeps them.
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("heads", HEADS)
@each_member
def test_against_fp64(implementation, name, heads, reduction) -> None:
    few(implementation, (list(MEMBERS).index(name) - HEADS.index(heads)) % 5 == 0)
    case = with_heads(heads, reduction).but(divergence=MEMBERS[name])
    exact = linear_cases.check(implementation.device, case)
    if reduction == "none":
        result = linear_cases.outcome(case, implementation.device, recompute=False)
        linear_cases.assert_within(result, exact, linear_cases.rounding(case, exact))


# A weight of both models and a reference that learns; js and renyi exchange P and Q for some.
@pytest.mark.parametrize("mode", [("hidden,weight", False), ("hidden,weight,ref_hidden", True)])
@pytest.mark.parametrize(
    "reduction, recompute", [("none", True), ("none", False), ("sum", None), ("mean", None)]
)
@each_member
def test_products(implementation, name, mode, reduction, recompute) -> None:
    few(implementation, name == "js 0.1" and mode[1] and recompute is True)
    (learned, shared), member, both = mode, MEMBERS[name], MODES[mode]
    made = tensors(implementation.device, learned=learned, shared=shared)
    settings = {"reduction": reduction, "recompute": recompute, "chunk_size": CHUNK}
    settings |= {"divergence": member.kind, **member.options}
    counts = (2, both if recompute else both - 2, both) if reduction == "none" else (both, 0, 0)
    assert_products(lambda: fastkl.linear_divergence(**made, **settings), made, *counts)


# Logits in place of the second model, of which masked ones are NaN: either is the student.
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("heads", ["everything", "per token", "policy per token"])
@pytest.mark.parametrize("name", family.MEMBERS)
def test_given_logits(implementation, name, heads, reverse) -> None:
    few(implementation, (name, heads, reverse) == ("skew_kl 0.1", "everything", True))
    number = [*family.MEMBERS].index(name)
    types, layout = [(FP32, FP32), (BF16, FP32), (FP64, FP64)][number % 3], [*LAYOUTS][number % 5]
    for reduction, recompute in (("none", True), ("none", False), ("sum", None), ("mean", None)):
        case = with_more(with_heads(heads, reduction), name, reverse=reverse).typed(*types)
        case.tensors["ref_logits"][~case.mask] = math.nan
        case = case.but(layouts={"ref_logits": layout})
        exact = linear_cases.truth(case)
        result = linear_cases.outcome(case, implementation.device, recompute=recompute)
        linear_cases.assert_within(result, exact, linear_cases.rounding(case, exact))


@pytest.mark.skipif(cases.INTERPRETING, reason="products of a CPU")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("learned, back", [("hidden,weight", 2), ("hidden", 1), ("", 0)])
def test_products_beside_given_logits(learned, back, reverse) -> None:
    made = tensors("cpu", learned=learned)
    student, given = {name: made[name] for name in ("hidden", "weight")}, made["ref_hidden"]
    given = {"ref_logits": given @ made["ref_weight"].T, "reverse": reverse, "chunk_size": CHUNK}
    for more, counts in (
        ({"recompute": True}, (1, back + 1, back + 1)),
        ({"recompute": False}, (1, back, back + 1)),
        ({"reduction": "sum"}, (1 + back, 0, 0)),
    ):
        call = functools.partial(fastkl.linear_divergence, **student, **given, **more)
        assert_products(call, student, *counts)


WRONG = [
    ("ref_hidden", {"ref_logits": torch.ones(N, V)}),
    ("ref_weight", {"ref_logits": torch.ones(N, V), "ref_hidden": None}),
    *(
        ("ref_logits", {"ref_logits": wrong, "ref_hidden": None, "ref_weight": None})
        for wrong in (
            torch.ones(N, V - 1),
            torch.ones(V),
            torch.ones(N, V).long(),
            torch.ones(N, V).double(),
            torch.ones(N, V, requires_grad=True),
        )
    ),
    ("reverse", {"reverse": 1}),
    ("divergence", {"divergence": "kl_divergence"}),
    ("alpha", {"alpha": 0.5}),
    ("beta", {"beta": 0.5}),
    ("alpha", {"divergence": "js", "alpha": 0.5}),
    ("beta", {"divergence": "js", "beta": -0.1}),
    ("alpha", {"divergence": "skew_kl"}),
    ("alpha", {"divergence": "skew_kl", "alpha": 1.1}),
    ("beta", {"divergence": "skew_kl", "alpha": 0.5, "beta": 0.5}),
    ("alpha", {"divergence": "renyi"}),
    ("alpha", {"divergence": "renyi", "alpha": 0}),
    ("alpha", {"divergence": "total_variation", "alpha": 0.0}),
    ("beta", {"divergence": "jeffreys", "beta": 0.5}),
]


@pytest.mark.skipif(cases.INTERPRETING, reason="checked before a backend is chosen")
@pytest.mark.parametrize("argument, wrong", WRONG)
def test_wrong_shares(argument, wrong) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{argument}: expected .+, got .+; .+"):
        fastkl.linear_divergence(**{**tensors("cpu"), **wrong})
