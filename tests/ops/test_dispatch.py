"""The ways to a computation: who gets the custom op and who does without, that all give the same
bits, and torch.func's transforms.
"""

import contextlib
import cProfile
from collections.abc import Callable

import pytest
import torch
from cases import Calls
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import fastkl
from fastkl import _modes, testing
from fastkl.ops import (
    linear_cells_op,
    linear_op,
    linear_sum_op,
    row_op,
    topk_op,
)

DISPATCHED = (
    row_op.row_statistics,
    row_op.row_gradients,
    linear_op.linear_statistics,
    linear_op.linear_gradients,
    linear_sum_op.linear_weighted_kl,
    linear_sum_op.scaled,
    topk_op.cells,
    topk_op.cell_gradients,
    linear_cells_op.linear_cells,
    linear_cells_op.linear_cell_gradients,
)


SHAPES = {
    **dict.fromkeys(("p", "q"), (3, 7)),
    **dict.fromkeys(("hidden", "ref_hidden"), (3, 5)),
    "weight": (7, 5),
}
LEAVES = ("p", "hidden", "weight")


def data(device: str, learning: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(*shape, generator=generator) for name, shape in SHAPES.items()}
    made["tokens"], made["mask"] = torch.tensor([1, 0, 6]), torch.tensor([True, False, True])
    made["logprobs"] = torch.randn(3, 4, generator=generator).log_softmax(-1)[:, :3]
    made["temperatures"], made["index"] = torch.tensor([0.7, 1.0, 1.3]), made["tokens"].repeat(3, 1)
    made = {name: value.to(device) for name, value in made.items()}
    return {n: value.requires_grad_(learning and n in LEAVES) for n, value in made.items()}


def linear_kl(d: dict[str, torch.Tensor], **more) -> torch.Tensor:
    return fastkl.linear_kl_divergence(d["hidden"], d["weight"], d["ref_hidden"], **more)


FUNCTIONS: dict[str, Callable] = {
    "kl": lambda d: (fastkl.kl_divergence(d["p"], d["q"]),),
    "stats": lambda d: tuple(
        fastkl.token_stats(
            d["p"], d["tokens"], d["q"], temperature=d["temperatures"], mask=d["mask"]
        )
    ),
    "renyi": lambda d: (fastkl.renyi_divergence(d["p"], d["q"], d["mask"], alpha=0.3),),
    "topk": lambda d: (fastkl.topk_kl_divergence(d["p"], d["logprobs"], d["index"]),),
    "select": lambda d: (fastkl.selective_log_softmax(d["p"], d["index"]),),
    "linear_none": lambda d: (linear_kl(d),),
    "linear_mean": lambda d: (linear_kl(d, reduction="mean"),),
    "linear_topk": lambda d: (
        fastkl.linear_topk_kl_divergence(d["hidden"], d["weight"], d["logprobs"], d["index"]),
    ),
    "linear_stats": lambda d: tuple(
        fastkl.linear_token_stats(d["hidden"], d["weight"], d["tokens"], d["ref_hidden"])
    ),
}
LEAF = {name: "hidden" if name.startswith("linear") else "p" for name in FUNCTIONS}
named = pytest.mark.parametrize("name", FUNCTIONS)


def kl(d: dict[str, torch.Tensor]) -> torch.Tensor:
    return FUNCTIONS["kl"](d)[0].detach()


def outcome(name: str, d: dict[str, torch.Tensor], outputs=None) -> list[torch.Tensor]:
    outputs = FUNCTIONS[name](d) if outputs is None else outputs
    learning = [value for value in outputs if value.requires_grad]
    upstream = [
        torch.linspace(1.0, 2.0, v.numel(), device="cpu").to(v).view(v.shape) for v in learning
    ]
    leaves = [d[leaf] for leaf in LEAVES]
    for leaf in leaves:
        leaf.grad = None
    torch.autograd.backward(learning, upstream)
    return [*outputs, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_same(results: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for result, value in zip(results, expected, strict=True):
        testing.assert_same_bits(result, value, "result")
        assert bool((value != 0).any()), "zero everywhere: nothing was compared"


@pytest.mark.parametrize(
    "name, expected",
    [
        ("kl", {"row_statistics", "row_gradients"}),
        ("stats", {"row_statistics", "row_gradients"}),
        ("renyi", {"row_statistics", "row_gradients"}),
        ("select", {"cells", "cell_gradients"}),
        ("topk", {"cells", "cell_gradients"}),
        ("linear_topk", {"linear_cells", "linear_cell_gradients"}),
        ("linear_none", {"linear_statistics", "linear_gradients"}),
        ("linear_mean", {"linear_weighted_kl", "scaled"}),
        ("linear_stats", {"linear_statistics", "linear_gradients"}),
    ],
)
def test_a_dispatch_mode_sees_the_ops(implementation, name, expected) -> None:
    with Calls() as calls:
        outcome(name, data(implementation.device))
    assert {func.name().removeprefix("fastkl::") for func, _ in calls} == expected


def without(patch: pytest.MonkeyPatch, name: str) -> contextlib.AbstractContextManager:
    patch.setattr(_modes, "SHORT_WAYS", name != "_eager")
    for each in DISPATCHED:
        patch.setattr(each, name, None)
    return contextlib.nullcontext()


# How an outcome is computed, by what it must be equal to the bit.
WAYS: dict[str, Callable] = {
    "plain tensors in eager mode, without the op": lambda patch, d: without(patch, "op"),
    "a torch that lacks a name of the short way": lambda patch, d: without(patch, "_eager"),
    "a dispatch mode": lambda patch, d: Calls(),
    "another default device": lambda patch, d: torch.device("meta"),
    "autocast": lambda patch, d: torch.autocast(d["p"].device.type, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("inference", [False, True], ids=["", "a reference from inference mode"])
@pytest.mark.parametrize("way", WAYS)
@named
def test_every_way_gives_the_same_bits(implementation, name, way, inference, monkeypatch) -> None:
    if way == "autocast" and name.startswith("linear"):
        pytest.skip("there it is a mode of the products")
    if implementation.interpreted and inference and way != "a dispatch mode":
        pytest.skip("one way in the interpreter is enough")
    d = data(implementation.device)
    expected = outcome(name, d)
    with torch.inference_mode(inference):
        d |= {key: d[key].clone() for key in ("q", "ref_hidden", "tokens", "index")}
    assert d["q"].is_inference() == inference
    with WAYS[way](monkeypatch, d):
        assert_same(outcome(name, d), expected)
        with torch.no_grad():
            values = FUNCTIONS[name](d)
    assert not any(value.requires_grad for value in values)
    assert_same([*values], expected[: len(values)])


@pytest.mark.parametrize(
    "mode, reentrant",
    [(Calls, False), (contextlib.nullcontext, False), (contextlib.nullcontext, True)],
)
@named
def test_checkpoint(implementation, name, mode, reentrant) -> None:
    """A recomputation outside the mode goes another way, which has to save as many tensors."""
    d = data(implementation.device)
    expected = outcome(name, d)

    def again(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return FUNCTIONS[name]({**d, **dict(zip(LEAVES, leaves, strict=True))})

    with mode():
        outputs = checkpoint(again, *(d[leaf] for leaf in LEAVES), use_reentrant=reentrant)
    assert_same(outcome(name, d, outputs), expected)


def test_a_subclass_meets_the_op(implementation) -> None:
    """A tensor with rules of its own is asked: TwoTensor does everything twice."""
    d = data(implementation.device, learning=False)
    result = fastkl.kl_divergence(TwoTensor(d["p"], 2 * d["p"]), d["q"])
    assert_same([result.a, result.b], [kl(d), kl({**d, "p": 2 * d["p"]})])


def test_tracers_see_the_op() -> None:
    p, q = (value.detach() for value in testing.pair("normal1", 3, 7, 0.3))
    with pytest.warns(torch.jit.TracerWarning), fastkl.use_backend("reference"):
        traced = torch.jit.trace(lambda p, q: fastkl.kl_divergence(p, q), (p, q), check_trace=False)
    assert "fastkl::row_statistics" in str(traced.graph)
    assert "fastkl.row_statistics" in make_fx(lambda p, q: fastkl.kl_divergence(p, q))(p, q).code
    result = fastkl.kl_divergence(p.to("meta"), q.to("meta"))
    assert result.is_meta and result.shape == (3,)


@pytest.mark.parametrize("gradient", [False, True], ids=["no_grad", "grad"])
def test_profilers_and_graphs_name_the_op(implementation, gradient) -> None:
    d, activities = data(implementation.device), [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        with torch.set_grad_enabled(gradient):
            result = FUNCTIONS["kl"](d)[0]
    assert "fastkl::row_statistics" in {event.key for event in profile.key_averages()}
    assert not gradient or result.grad_fn.name() == "fastkl::row_statisticsBackward"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_a_tensor_that_outlived_its_transform(implementation, mode) -> None:
    d, left = data(implementation.device), []
    torch.func.grad(lambda p: left.append(p * 1.0) or p.sum())(d["p"].detach())
    with mode():
        testing.assert_same_bits(fastkl.kl_divergence(left[0], d["q"]).detach(), kl(d), "kl")


def test_what_lies_in_memory_negated(implementation) -> None:
    """torch keeps some negatives as a mark on a view: kernels read memory."""
    d = data(implementation.device)
    numbers = torch.randn(3, 14, dtype=torch.cfloat, device=implementation.device)
    marked = numbers.conj().imag.as_strided((3, 7), (28, 1))
    assert marked.is_neg() and marked.stride(-1) == 1
    testing.assert_same_bits(
        fastkl.kl_divergence(marked, d["q"]),
        fastkl.kl_divergence(marked.resolve_neg().clone(), d["q"]),
        "kl",
    )
    result = fastkl.kl_divergence(d["p"], d["q"])
    minus, plus = (
        torch.autograd.grad(result, d["p"], change(torch.ones_like(result)), retain_graph=True)[0]
        for change in (torch._neg_view, torch.abs)
    )
    testing.assert_same_bits(minus, -plus, "gradient")


@named
def test_saved_tensors_may_come_back_in_another_layout(implementation, name) -> None:
    d = data(implementation.device)

    def pack(value: torch.Tensor) -> torch.Tensor:
        return value.mT.contiguous() if value.dim() == 2 else value

    expected = outcome(name, d)
    with torch.autograd.graph.saved_tensors_hooks(
        pack, lambda value: value.mT if value.dim() == 2 else value
    ):
        results = outcome(name, d)
    # Products round by layout.
    torch.testing.assert_close(results, expected, rtol=1e-6, atol=1e-7)


def test_a_penalty_keeps_nothing_of_a_transform(implementation) -> None:
    d = data(implementation.device)
    penalty = fastkl.KLPenalty(0.1)
    penalty(d["p"], d["q"])
    before = dict(penalty.last)
    torch.func.grad(lambda p: penalty(2 * p, d["q"]))(d["p"].detach())
    assert penalty.last == before


# ---- what a call takes


# With a few rows a step takes as long as its Python does, which calls count without a clock.
STEPS = {
    "kl": (
        lambda d: torch.autograd.grad(fastkl.kl_divergence(d["p"], d["q"]), d["p"], torch.ones(3)),
        60,
    ),
    "linear_mean": (
        lambda d: torch.autograd.grad(linear_kl(d, reduction="mean"), d["hidden"]),
        110,
    ),
}


@pytest.mark.parametrize("step, most", STEPS.values(), ids=STEPS)
def test_python_calls_of_a_step(monkeypatch, step, most) -> None:
    pytest.importorskip("triton")
    from benchmarks.overhead import python_calls
    from fastkl import backend
    from fastkl.kernels import launch

    monkeypatch.setattr(launch.Variant, "start", lambda *arguments: None)
    monkeypatch.setattr(backend, "_interpreting", lambda: True)
    d = data("cpu")
    d["weight"].requires_grad_(False)
    with fastkl.use_backend("triton"):
        step(d), step(d)
        assert 20 < python_calls(lambda: step(d)) <= most


def test_all_calls_of_a_kl_step(monkeypatch) -> None:
    """Calls in C count too: 224 when this was written."""
    pytest.importorskip("triton")
    from fastkl import backend
    from fastkl.kernels import launch

    monkeypatch.setattr(launch.Variant, "start", lambda *arguments: None)
    monkeypatch.setattr(backend, "triton_problems", lambda *logits, **reading: ())
    d = data("cpu")
    with fastkl.use_backend("triton"):
        for _ in range(3):
            with cProfile.Profile() as profile:
                STEPS["kl"][0](d)
    assert sum(one.callcount for one in profile.getstats()) <= 240
