"""fastkl.testing: the truth against other arithmetic, and comparisons that fail where wrong."""

import math
import re

import pytest
import torch

from fastkl import testing

TOKENS = torch.tensor([0, 3, 22, 7])


def sides(kind: str = "normal3", size: float = 0.7) -> tuple[torch.Tensor, torch.Tensor]:
    return testing.pair(kind, 4, 23, size, shift=3.0)


@pytest.mark.parametrize("kind", testing.KINDS)
def test_truth_against_torch_distributions(kind) -> None:
    p, q = (side.double() for side in sides(kind))
    temperature = torch.tensor([0.5, 1.0, 1.3, 4.0])
    exact = testing.truth(p, q, temperature)
    one, two = (torch.distributions.Categorical(logits=x / temperature[:, None]) for x in (p, q))
    expected = {
        "logprob": one.log_prob(TOKENS),
        "entropy": one.entropy(),
        "ref_logprob": two.log_prob(TOKENS),
        "kl": torch.distributions.kl_divergence(one, two),
        "ref_kl": torch.distributions.kl_divergence(two, one),
        "lse": (p / temperature[:, None]).logsumexp(-1),
        "ref_lse": (q / temperature[:, None]).logsumexp(-1),
    }
    for name, value in exact.stats(TOKENS).items():
        testing.assert_near(value, expected[name], 1e-12, 1e-13, name)


@pytest.mark.parametrize("field", testing.FIELDS)
def test_gradients_are_those_of_autograd(field) -> None:
    p, q = (testing.leaf(side.double()) for side in sides())
    upstream = torch.tensor([1.0, -2.0, 0.5, 0.0])
    values = testing.truth(p, q, 0.7).stats(TOKENS)[field]
    expected = torch.autograd.grad(values, (p, q), upstream.double(), materialize_grads=True)
    found = testing.gradients(testing.truth(p, q, 0.7), {field: upstream}, TOKENS, 0.7)
    for result, value in zip(found, expected, strict=True):
        testing.assert_gradient(result, value, field, 1e-11)


def test_an_impossible_entry() -> None:
    p, q = torch.zeros(2, 4), torch.zeros(2, 4)
    p[0, 1] = q[1, 1] = -math.inf
    exact = testing.truth(p, q)
    assert exact.kl.tolist() == [pytest.approx(math.log(4 / 3)), math.inf]
    assert not testing.kl_gradients(exact, torch.tensor([1.0, 0.0])).p.isnan().any()
    testing.assert_kl(exact.kl, exact.kl)


EXACT = torch.tensor([1e-6, 1.0, math.inf])
ROWS = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
WRONG = {
    "small KL": lambda: testing.assert_kl(EXACT + torch.tensor([2e-8, 0, 0]), EXACT),
    "KL": lambda: testing.assert_kl(EXACT * (1 + 3e-5), EXACT),
    "negative": lambda: testing.assert_kl(torch.tensor(-1e-12), torch.tensor(0.0)),
    "NaN": lambda: testing.assert_kl(EXACT * math.nan, EXACT),
    "finite": lambda: testing.assert_kl(torch.tensor([1e-6, 1.0, 3e38]), EXACT),
    "infinite": lambda: testing.assert_near(EXACT[2], EXACT[1], 1.0, 1.0, "value"),
    "entropy": lambda: testing.assert_stats({"entropy": EXACT[:2] + 1e-5}, {"entropy": EXACT[:2]}),
    "reverse KL": lambda: testing.assert_stats({"ref_kl": EXACT[:1] * 1.1}, {"ref_kl": EXACT[:1]}),
    "gradient": lambda: testing.assert_gradient(ROWS * (1 + 2e-5), ROWS),
    "gradient of nothing": lambda: testing.assert_gradient(ROWS + 2e-5, ROWS * 0),
    "NaN in a gradient": lambda: testing.assert_gradient(ROWS * math.nan, ROWS),
    "rounded gradient": lambda: testing.assert_rounded_gradient(
        ROWS.bfloat16() * 1.01, ROWS * 1.001
    ),
    "bits": lambda: testing.assert_same_bits(torch.zeros(3), -torch.zeros(3), "zero"),
    "shape": lambda: testing.assert_same_bits(torch.zeros(3), torch.zeros(1, 3), "zeros"),
    "no field": lambda: testing.assert_stats({}, {"kl": EXACT}),
    "a field without truth": lambda: testing.assert_stats({"kl": EXACT}, {}),
    "a field of None": lambda: testing.assert_stats({"kl": None}, {"kl": EXACT}),
}
WORDS = {
    "negative": "kl: got -9.99999.*e-13, a negative",
    **dict.fromkeys(("no field", "a field of None"), "kl: no tensor"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_results_fail(case) -> None:
    with pytest.raises(AssertionError, match=WORDS.get(case, "")):
        WRONG[case]()


COMPARISONS = {
    "assert_kl": testing.assert_kl,
    "assert_near": lambda *both: testing.assert_near(*both, 1.0, 1.0, "value"),
    "assert_stats": lambda *both: testing.assert_stats(*({"kl": value} for value in both)),
    "assert_gradient": testing.assert_gradient,
    "assert_rounded_gradient": lambda result, exact: testing.assert_rounded_gradient(
        result.half(), exact
    ),
    "assert_same_bits": lambda *both: testing.assert_same_bits(*both, "bits"),
}


@pytest.mark.parametrize("shapes", [[(1,), (4,)], [(4, 1), (4,)], [(0,), (1,)], [(1, 4), (3, 4)]])
@pytest.mark.parametrize("name", COMPARISONS)
def test_no_comparison_broadcasts(name, shapes) -> None:
    for result, exact in (shapes, shapes[::-1]):
        with pytest.raises(AssertionError, match=f"got .*{re.escape(str(result))}, expected"):
            COMPARISONS[name](torch.ones(result), torch.ones(exact))


@pytest.mark.parametrize("kind", ["very-peaked", "normal2", "normal", ""])
def test_an_unknown_kind_is_an_error(kind) -> None:
    with pytest.raises(ValueError, match=f"kind: .*'very_peaked'.*got '{kind}'"):
        testing.pair(kind, 1, 5, 1.0)
    with pytest.raises(ValueError, match="upstream: expected one of .*got 'KL'"):
        testing.gradients(testing.truth(ROWS, ROWS), {"KL": ROWS[:, 0]})


def test_right_results_pass_with_their_error() -> None:
    result = EXACT * torch.tensor([1 + 5e-3, 1 + 1e-5, 1.0])
    assert testing.assert_kl(result, EXACT) == pytest.approx(5e-3, rel=1e-3)
    assert testing.assert_near(torch.zeros(0), torch.zeros(0), 0.0, 0.0, "nothing") == 0
    assert testing.assert_gradient(ROWS * (1 + 5e-6), ROWS) == pytest.approx(5e-6, rel=0.1)
    exact = ROWS * 1.001
    assert testing.assert_rounded_gradient(exact.bfloat16(), exact) > 1e-4
    testing.assert_same_bits(ROWS * math.nan, ROWS * math.nan, "NaN")
