"""recompute= of the functions on hidden states: the same numbers with fewer products, also inside
PyTorch's graphs, hooks, checkpoints, compilers and transforms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import linear_cases
import linear_inputs
import linear_plan
import pytest
import torch
from linear_inputs import FIELDS, Case, small_case
from linear_plan import tuned
from test_linear import with_heads
from test_linear_costs import CHUNK, H, N, V, count
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import fastkl
from fastkl import testing

LEARNED = (
    ("hidden", "weight"),
    ("hidden",),
    ("hidden", "weight", "ref_hidden", "ref_weight"),
    ("ref_hidden", "ref_weight"),
)
MASK = torch.arange(N) % 3 != 1
keeping = pytest.mark.parametrize("recompute", [False, None], ids=["kept", "default"])


def stats_case(dtype=torch.bfloat16, learned: tuple = LEARNED[0], **changes) -> Case:
    """Make a case of all fields, without biases."""
    sizes = {"vocabulary": V, "width": H, "ref_width": H}
    options = {"leading": (N,), "sizes": sizes, "trainable": learned, "chunk_size": None}
    return small_case("stats", dtype, **{**options, **changes}).without("bias", "ref_bias")


def outcome(case: Case, device: str, **more) -> dict[str, torch.Tensor]:
    """Compute values and gradients."""
    inputs = linear_inputs.leaves(case, device=device)
    return linear_cases.differentiate(case, inputs, linear_cases.call(case, inputs, **more))


def assert_same(result: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Compare to the bit."""
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        testing.assert_same_bits(result[name], value, name)


def twice(case: Case, device: str, call: Callable, times: tuple = (True, False)) -> None:
    """Two backwards through call(case, inputs)'s graph give the bits of logits computed again."""
    inputs, expected = (
        linear_inputs.leaves(case, device=device),
        outcome(case, device, recompute=True),
    )
    values = call(case, inputs)
    for retain in times:
        assert_same(linear_cases.differentiate(case, inputs, values, retain), expected)


kept = functools.partial(linear_cases.call, recompute=False)

# ---- numbers

OPTIONS = {
    "plain": {},
    "masked chunks": {"chunk_size": CHUNK, "mask": MASK},
    "float32 logits": {"logits_dtype": torch.float32},
    "masked softcap": {"softcap": 2.0, "temperature": 0.7, "mask": MASK},
    "masked ratio": {"temperature": 0.7, "ref_temperature": 1.3, "mask": MASK},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("learned", LEARNED, ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_bits(implementation, learned, options, dtype) -> None:
    """Kept or computed again, with products of the same shapes: for each set of fields, of which
    each moves what it depends on.
    """
    for fields in (FIELDS, FIELDS[:2], ("ref_logprob",), ("kl",), ("ref_kl",)):
        case = stats_case(dtype, learned, fields=fields, **OPTIONS[options])
        again = outcome(case, implementation.device, recompute=True)
        assert_same(outcome(case, implementation.device, recompute=False), again)
        for name in learned:
            depends = {*fields} - ({"ref_logprob"} if name[:4] != "ref_" else {*FIELDS[:2]})
            assert (
                f"gradient to {name}" not in again
                or depends == set()
                or bool(again[f"gradient to {name}"].any())
            )


@keeping
@pytest.mark.parametrize("models", ["one weight", "everything", "per token", "no tokens"])
def test_heads_biases_and_leading_dimensions(implementation, recompute, models) -> None:
    """Heads of their own bias, soft cap and scale over [2, 4] tokens, one weight shared."""
    empty = small_case("stats", leading=(0, 3), heads=((3.0, 0.5), (None, 2.0)))
    case = empty if models == "no tokens" else with_heads(models, "stats")
    found = outcome(case, implementation.device, recompute=recompute)
    assert_same(found, outcome(case, implementation.device, recompute=True))


def test_a_far_row_is_read_before_it_is_written(implementation) -> None:
    """Rows that the kernels read again, for the gradient of ref_kl to the reference."""
    case = stats_case(torch.float32, LEARNED[2])
    case.tensors["hidden"][::5] *= 40
    case.tensors["ref_hidden"][::7] *= 60
    twice(case, implementation.device, kept)


# ---- products


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("short", [0, 1], ids=["within", "above"])
def test_the_bound_on_kept_logits(monkeypatch, reference, logits_dtype, short) -> None:
    """Logits are kept up to 2 GiB of all models together by default, from shapes and types."""
    assert linear_plan.LARGEST_KEPT == 1 << 31
    tuned(monkeypatch, largest_kept=(1 + reference) * N * V * logits_dtype.itemsize - short)
    case = stats_case(logits_dtype=logits_dtype)
    case = case if reference else case.without("ref_hidden", "ref_weight")
    inputs = linear_inputs.leaves(case)
    for recompute, again in ((None, short), (True, 1), (False, 0)):
        values = linear_cases.call(case, inputs, recompute=recompute)
        run = functools.partial(linear_cases.differentiate, case, inputs, values)
        assert count(run, types=None) == 2 + again * (1 + reference)


# ---- inside PyTorch


def test_create_graph_overwrites_nothing(implementation) -> None:
    """A graph for second derivatives raises when used; the logits are still there after it."""
    case = stats_case(torch.float32, fields=("kl",))
    inputs = linear_inputs.leaves(case, device=implementation.device)
    values, found = kept(case, inputs), []
    (first,) = torch.autograd.grad(values["kl"].sum(), inputs["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        torch.autograd.grad(first.sum(), inputs["hidden"], retain_graph=True)
    run = lambda: found.append(linear_cases.differentiate(case, inputs, values))  # noqa: E731
    assert count(run, types=None) == 2
    assert_same(found[0], outcome(case, implementation.device, recompute=True))


def transposed(value: torch.Tensor) -> torch.Tensor:
    """Return another layout of the same numbers, as a hook may."""
    if value.dim() < 2 or value.requires_grad:
        return value
    return value.transpose(-1, -2).contiguous().transpose(-1, -2)


def hooked(case: Case, inputs: dict, manager: Callable) -> dict[str, torch.Tensor]:
    """Compute with kept logits under a hook on saved tensors."""
    with manager():
        return kept(case, inputs)


def selective(case: Case, inputs: dict) -> dict[str, torch.Tensor]:
    """Compute under a checkpoint whose policy caches results of ops."""
    contexts = functools.partial(
        create_selective_checkpoint_contexts, lambda *_, **__: CheckpointPolicy.MUST_SAVE
    )
    return checkpoint(kept, case, inputs, use_reentrant=False, context_fn=contexts)


hooks = torch.autograd.graph
WAYS = {
    "plain": kept,
    "default": linear_cases.call,
    "transposed": functools.partial(
        hooked, manager=lambda: hooks.saved_tensors_hooks(transposed, transposed)
    ),
    "offloaded": functools.partial(hooked, manager=hooks.save_on_cpu),
    "checkpoint": lambda case, inputs: checkpoint(kept, case, inputs, use_reentrant=False),
}
COMPILED = {
    f"{backend}, {way}": torch.compile(WAYS[way], fullgraph=True, backend=backend)
    for backend, way in (("eager", "plain"), ("aot_eager", "plain"), ("aot_eager", "default"))
}


@pytest.mark.parametrize("way", WAYS | COMPILED)
def test_a_retained_graph(implementation, way) -> None:
    """The same bits, twice: kept, offloaded and back in any layout, recomputed by a checkpoint, or
    inside a graph, whose op overwrites nothing.
    """
    twice(stats_case(), implementation.device, (WAYS | COMPILED)[way])


def test_selective_checkpointing(implementation) -> None:
    """Logits that a policy caches, as it does the op's results, reach the one backward."""
    twice(stats_case(), implementation.device, selective, times=(False,))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@keeping
def test_transforms(implementation, recompute) -> None:
    """torch.func inside and outside, and batched upstream gradients of kept logits."""
    inputs = linear_inputs.leaves(stats_case(torch.float32, ()), device=implementation.device)
    hidden, models = inputs["hidden"], (inputs["weight"], inputs["ref_hidden"])

    def kl(states: torch.Tensor) -> torch.Tensor:
        return fastkl.linear_kl_divergence(states, *models, recompute=recompute)

    leaf = hidden.clone().requires_grad_()
    (expected,) = torch.autograd.grad(kl(leaf).sum(), leaf)
    inner = torch.func.grad(lambda states: kl(states).sum())
    assert torch.equal(inner(hidden), expected)
    mapped = torch.func.vmap(inner)(torch.stack([hidden, hidden]))
    torch.testing.assert_close(mapped, torch.stack([expected, expected]))
    upstream = torch.stack([torch.ones(N), 2 * torch.ones(N)]).to(hidden)
    values = kl(leaf)
    gradient = functools.partial(torch.autograd.grad, values, leaf, retain_graph=True)
    for (found,) in (
        gradient(upstream, is_grads_batched=True),
        torch.func.vmap(gradient)(upstream),
    ):
        torch.testing.assert_close(found, torch.stack([expected, 2 * expected]))
    assert torch.equal(torch.autograd.grad(values.sum(), leaf)[0], expected)


def test_a_failed_backward_leaves_no_wrong_logits(monkeypatch) -> None:
    """Logits that were half written over are computed again."""
    case = stats_case()
    inputs = linear_inputs.leaves(case)
    values = kept(case, inputs)

    def fails(first: torch.Tensor, *_: object, **__: object) -> None:
        first.fill_(float("nan"))
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(torch, "mm", fails)
        linear_cases.differentiate(case, inputs, values, retain_graph=True)
    found = linear_cases.differentiate(case, inputs, values)
    assert_same(found, outcome(case, "cpu", recompute=True))


def test_plain_eager_calls_write_over_what_they_kept() -> None:
    """The learning model's logits give way to their gradients, the other's stay."""
    case, seen = stats_case(), []
    inputs = linear_inputs.leaves(case)
    with hooks.saved_tensors_hooks(lambda v: seen.append(v) or v, lambda value: value):
        values = kept(case, inputs)
    logits = [value for value in seen if value.shape == (N, 64)]
    before = [value.clone() for value in logits]
    linear_cases.differentiate(case, inputs, values)
    same = [torch.equal(value, old) for value, old in zip(logits, before, strict=True)]
    assert same == [False, True]
