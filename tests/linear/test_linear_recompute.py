"""recompute= of the functions on hidden states: the same bits with fewer products, under the bound
on memory, in transforms, and after a backward that failed.
"""

import functools

import linear_cases
import linear_inputs
import linear_plan
import pytest
import torch
from linear_cases import assert_same, outcome
from linear_inputs import FIELDS, Case, small_case
from linear_plan import tuned
from test_linear_costs import CHUNK, H, N, V, count

import fastkl

LEARNED = (
    ("hidden", "weight"),
    ("hidden",),
    ("hidden", "weight", "ref_hidden", "ref_weight"),
    ("ref_hidden", "ref_weight"),
)
MASK, DIVISORS = torch.arange(N) % 3 != 1, torch.linspace(0.5, 2.0, N)


def stats_case(dtype=torch.bfloat16, learned: tuple = LEARNED[0], **changes) -> Case:
    sizes = {"vocabulary": V, "width": H, "ref_width": H}
    options = {"leading": (N,), "sizes": sizes, "trainable": learned, "chunk_size": None}
    return small_case("stats", dtype, **{**options, **changes})


OPTIONS = {
    "plain": {},
    "masked chunks": {"chunk_size": CHUNK, "mask": MASK},
    "float32 logits": {"logits_dtype": torch.float32},
    "masked softcap": {"softcap": 2.0, "temperature": 0.7, "mask": MASK},
    "masked ratio": {"temperature": 0.7, "ref_temperature": 1.3, "mask": MASK},
    "heads": {
        "heads": ((3.0, 0.5), (None, 2.0)),
        "temperature": DIVISORS,
        "ref_temperature": DIVISORS.flip(0),
    },
    "one weight": {},
    # Rows that are read again, for the gradient of ref_kl to the reference.
    "far rows": {},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("learned", LEARNED, ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits(implementation, learned, options, dtype) -> None:
    """Kept or computed again, with products of the same shapes: for each set of fields, of which
    each moves what it depends on.
    """
    case = stats_case(dtype, learned, **OPTIONS[options])
    if options == "one weight":
        case = case.without("ref_weight")
    if options == "far rows":
        case.tensors["hidden"][::5] *= 40
        case.tensors["ref_hidden"][::7] *= 60
    for fields in (FIELDS, FIELDS[:2], ("ref_logprob",), ("kl",), ("ref_kl",)):
        asked = case.but(fields=fields)
        again = outcome(asked, implementation.device, recompute=True)
        assert_same(outcome(asked, implementation.device, recompute=False), again)
        for name in again.keys() & {f"gradient to {name}" for name in learned}:
            other = FIELDS[:2] if "ref_" in name else ("ref_logprob",)
            assert bool(again[name].any()) or {*fields} <= {*other}, name


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("short", [0, 1], ids=["within", "above"])
def test_the_bound_on_kept_logits(monkeypatch, reference, logits_dtype, short) -> None:
    """Logits are kept up to 2 GiB of all models together by default, from shapes and types."""
    assert linear_plan.LARGEST_KEPT == 1 << 31
    tuned(monkeypatch, largest_kept=(1 + reference) * N * V * logits_dtype.itemsize - short)
    case = stats_case(logits_dtype=logits_dtype)
    case = case if reference else case.without("ref_hidden", "ref_weight", "ref_bias")
    inputs = linear_inputs.leaves(case)
    for recompute, again in ((None, short), (True, 1), (False, 0)):
        values = linear_cases.call(case, inputs, recompute=recompute)
        run = functools.partial(linear_cases.differentiate, case, inputs, values)
        assert count(run, types=None) == 2 + again * (1 + reference)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("recompute", [False, None], ids=["kept", "default"])
def test_transforms(implementation, recompute) -> None:
    """torch.func inside and outside, and batched upstream gradients of kept logits."""
    inputs = linear_inputs.leaves(stats_case(torch.float32), device=implementation.device)
    hidden, weight, ref_hidden = (inputs[name] for name in ("hidden", "weight", "ref_hidden"))

    def kl(states: torch.Tensor) -> torch.Tensor:
        return fastkl.linear_kl_divergence(states, weight, ref_hidden, recompute=recompute)

    (expected,) = torch.autograd.grad(kl(hidden).sum(), hidden)
    inner = torch.func.vmap(torch.func.grad(lambda states: kl(states).sum()))
    torch.testing.assert_close(inner(torch.stack([hidden] * 2)), torch.stack([expected] * 2))
    upstream = torch.tensor([1.0, 2.0], device=hidden.device)[:, None].expand(2, N)
    gradient = functools.partial(torch.autograd.grad, kl(hidden), hidden, retain_graph=True)
    for (found,) in (
        gradient(upstream, is_grads_batched=True),
        torch.func.vmap(gradient)(upstream),
    ):
        torch.testing.assert_close(found, torch.stack([expected, 2 * expected]))
    assert torch.equal(gradient(upstream[0])[0], expected)


def test_a_failed_backward_leaves_no_wrong_logits(monkeypatch) -> None:
    case = stats_case()
    inputs = linear_inputs.leaves(case)
    values = linear_cases.call(case, inputs)

    def fails(first: torch.Tensor, *_: object, **__: object) -> None:
        first.fill_(float("nan"))
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(torch, "mm", fails)
        linear_cases.differentiate(case, inputs, values, retain_graph=True)
    found = linear_cases.differentiate(case, inputs, values)
    assert_same(found, outcome(case, "cpu", recompute=True))
