"""linear_topk_kl_divergence against the textbook's formulas in float64 and against
topk_kl_divergence of its logits, and what it costs; test_linear.py and test_linear_torch.py have
its properties.
"""

import functools

import cases
import linear_cases
import memory
import pytest
import torch
from linear_inputs import Case, few, models, small_case, with_more
from test_linear import BF16, FP16, FP32, FP64, TYPES, with_heads
from test_linear_costs import CHUNK, assert_products, tensors
from test_topk import DIRECTIONS, TAILS, top

import fastkl
from fastkl import testing
from fastkl.ops import linear_cells_op, listed_rows

# name: (whether logits are kept, types as in test_linear.TYPES).
SETUPS = {
    "scales": (True, "bf16"),
    "everything": (False, "fp64"),
    "per token": (None, "fp16, fp32 logits"),
    "policy per token": (False, "fp32"),
    "inherited": (True, "fp16"),
    "plain": (None, "bf16, fp32 logits"),
}


# Chunks of 3 tokens, a soft cap or a Head, temperatures of each token, and NaN under the mask.
@pytest.mark.parametrize("heads", SETUPS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_against_fp64(implementation, direction, tail, heads) -> None:
    few(implementation, heads == "policy per token")
    recompute, types = SETUPS[heads]
    dtype, _, logits_dtype = TYPES[types]
    case = with_heads(heads, "topk").but(logits_dtype=logits_dtype).typed(dtype)
    case.tensors["hidden"][~case.mask] = float("nan")
    more = {"direction": direction, "tail": tail, "beta": 0.2 if direction == "js" else None}
    for clip in (None, 0.05):
        checked = case.but(more={**case.more, **more, "clip": clip})
        exact = linear_cases.truth(checked)
        result = linear_cases.outcome(checked, implementation.device, recompute=recompute)
        linear_cases.assert_within(result, exact, linear_cases.rounding(checked, exact))
        assert not bool(result["gradient to hidden"][~case.mask].any())


# Chunks of one token; ids that several tokens list add up in a fixed order.
@pytest.mark.parametrize("call", ["topk", "support"])
@pytest.mark.parametrize("heads", SETUPS)
def test_rows_of_the_weight_in_place_of_all_logits(
    implementation, heads, call, monkeypatch
) -> None:
    few(implementation, heads == "policy per token")
    monkeypatch.setattr(linear_cells_op, "SMALL_PART", 0)
    monkeypatch.setattr(listed_rows, "WORKSPACE", {"cpu": 1})
    dtype, _, logits_dtype = TYPES[SETUPS[heads][1]]
    case = with_heads(heads, call).but(logits_dtype=logits_dtype).typed(dtype)
    case = with_more(case, tail="renormalize") if call == "topk" else case
    case.tensors["hidden"][~case.mask] = float("nan")
    exact, result = linear_cases.truth(case), linear_cases.outcome(case, implementation.device)
    linear_cases.assert_within(result, exact, linear_cases.rounding(case, exact))
    linear_cases.assert_same(linear_cases.outcome(case, implementation.device), result)


def large(direction: str, k: int, dtype: torch.dtype) -> Case:
    made = models("random", (0.05, 5.0), tokens=24, vocabulary=130, width=24)
    teacher = torch.nn.functional.linear(made["ref_hidden"], made["ref_weight"], made["ref_bias"])
    case = Case(made, "topk", chunk_size=7, scale=8.0).without("weights").typed(dtype)
    case = with_more(case, direction=direction)
    lists = dict(zip(("topk_logprobs", "topk_ids"), top(teacher, k), strict=True))
    return case.but(more={**case.more, **lists})


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
@pytest.mark.parametrize("k", [1, 20, 130])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_lengths_of_lists(implementation, direction, k, dtype) -> None:
    few(implementation, (k, dtype) == (20, FP32))
    linear_cases.check(implementation.device, large(direction, k, dtype))


# Sums, means and their divisors; a masked row and one without entries, of any temperature.
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(
    "more",
    [{}, {"reduction": "sum"}, {"reduction": "mean"}, {"reduction": "mean", "normalizer": 7}],
)
def test_equals_topk_kl_divergence_of_logits(implementation, more, recompute) -> None:
    few(implementation, recompute)
    case = small_case("topk", trainable=("hidden", "weight"), leading=(2, 4))
    hidden, weight = (case.tensors[name].to(implementation.device) for name in ("hidden", "weight"))
    logprobs, ids = (case.more[f"topk_{name}"].clone() for name in ("logprobs", "ids"))
    ids[1, 2], mask = -1, torch.ones(2, 4, dtype=torch.bool, device=hidden.device)
    mask[0, 1] = False
    hidden[0, 1] = hidden[1, 2] = torch.nan
    more = {**more, "weights": testing.upstream_for(hidden[..., 0])} if more else {}
    more["temperature"] = (~hidden[..., 0].isnan()).float()
    lists, results = [x.to(implementation.device) for x in (logprobs, ids, mask)], []
    for linear in (True, False):
        leaves = testing.leaf(hidden.clone()), testing.leaf(weight.clone())
        # 0·NaN of a product would reach its gradient.
        rows = leaves[0].masked_fill(hidden.isnan(), 0.0) @ leaves[1].T
        value = (
            fastkl.linear_topk_kl_divergence(*leaves, *lists, recompute=recompute, **more)
            if linear
            else fastkl.topk_kl_divergence(rows, *lists, **more)
        )
        results.append([value, *torch.autograd.grad((value * 0.5).sum(), leaves)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    assert not bool(results[0][1][hidden.isnan()].any())


def listed(made: dict[str, torch.Tensor], k: int = 3, **settings) -> torch.Tensor:
    ids = torch.arange(k).expand(len(made["hidden"]), k)
    logprobs = torch.full(ids.shape, -5.0)
    student = {name: made[name] for name in ("hidden", "weight")}
    return fastkl.linear_topk_kl_divergence(
        **student, topk_logprobs=logprobs, topk_ids=ids, **settings
    )


@pytest.mark.skipif(cases.INTERPRETING, reason="products of a CPU")
@pytest.mark.parametrize("recompute", [True, False, None])
@pytest.mark.parametrize("learned, back", [("hidden,weight", 2), ("hidden", 1), ("", 0)])
def test_products(learned, back, recompute) -> None:
    """One forward, two backward (one for a frozen lm_head), one more for logits computed again."""
    made, again = tensors("cpu", learned=learned), back + bool(recompute)
    call = functools.partial(listed, made, recompute=recompute, chunk_size=CHUNK)
    assert_products(call, made, 1, again, back + 1)


@pytest.mark.parametrize("recompute", [True, False])
def test_memory(recompute) -> None:
    """Without kept logits no tensor has a row for every token and an entry for every word; kept
    ones are of their own type.
    """
    made = tensors("cpu", 256, 4, 1024, learned="hidden")
    call = functools.partial(listed, made, recompute=recompute, chunk_size=CHUNK)
    run = lambda: torch.autograd.grad(call().sum(), made["hidden"])  # noqa: E731
    largest = memory.allocations(run)["largest"]
    assert largest < 256 * 1024 * 2 / 4 if recompute else largest == 256 * 1024 * 2


@pytest.mark.parametrize(
    "direction, most",
    [("teacher||student", (51, 120)), ("student||teacher", (60, 130)), ("js", (117, 190))],
)
def test_bytes_held(direction, most) -> None:
    """Of the vocabulary's size nothing without kept logits, and the docstring's figures of K."""
    made = tensors("cpu", 64, 4, 1024, learned="hidden,weight")
    call = functools.partial(listed, made, 50, direction=direction, recompute=True)
    inputs = sum(value.nbytes for value in made.values())
    assert sum(memory.saved(call).values()) <= 64 * (50 * most[0] + most[1]) + inputs
