"""linear_divergence: each divergence against the textbook's formula in float64, the number of its
matrix products, and shares that a divergence does not take.
"""

import cases
import linear_cases
import pytest
from family import KINDS, Member
from linear_inputs import few
from test_linear import with_heads
from test_linear_costs import CHUNK, MODES, assert_products, tensors

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


WRONG = [
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
@pytest.mark.parametrize("argument, wrong", WRONG, ids=str)
def test_wrong_shares(argument, wrong) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{argument}: expected .+, got .+; .+"):
        fastkl.linear_divergence(**tensors("cpu"), **wrong)
