"""The ways to a computation: who gets the custom op and who does without, that all give the same
bits, and torch.func's transforms.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastkl
from fastkl import testing
from fastkl.ops import dual_op, linear_op, linear_sum_op, row_op

DISPATCHED = (
    row_op.row_statistics,
    row_op.row_gradients,
    linear_op.linear_statistics,
    linear_op.linear_gradients,
    linear_sum_op.linear_weighted_kl,
    linear_sum_op.scaled,
)


def data(device: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Logits and hidden states that require grad, a reference of each that does not, and tokens."""
    generator = torch.Generator().manual_seed(0)
    made = {
        name: torch.randn(*shape, generator=generator).to(device, dtype)
        for name, shape in (
            ("p", (3, 7)),
            ("q", (3, 7)),
            ("hidden", (3, 5)),
            ("weight", (7, 5)),
            ("ref_hidden", (3, 5)),
        )
    }
    return {"tokens": torch.tensor([1, 0, 6], device=device), **made} | {
        "p": made["p"].requires_grad_(),
        "hidden": made["hidden"].requires_grad_(),
        "weight": torch.nn.Parameter(made["weight"]),
    }


FUNCTIONS: dict[str, Callable] = {
    "kl": lambda d: (fastkl.kl_divergence(d["p"], d["q"]),),
    "stats": lambda d: tuple(fastkl.token_stats(d["p"], d["tokens"], d["q"], temperature=0.7)),
    "linear_none": lambda d: (fastkl.linear_kl_divergence(*(d[name] for name in HEADS)),),
    "linear_mean": lambda d: (
        fastkl.linear_kl_divergence(*(d[name] for name in HEADS), reduction="mean"),
    ),
}
HEADS = ("hidden", "weight", "ref_hidden")
LEAF = {"kl": "p", "stats": "p", "linear_none": "hidden", "linear_mean": "hidden"}
named = pytest.mark.parametrize("name", FUNCTIONS)


def kl(d: dict[str, torch.Tensor]) -> torch.Tensor:
    return FUNCTIONS["kl"](d)[0].detach()


def outcome(name: str, d: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return outputs, and the gradients for upstream gradients that differ."""
    outputs = [value for value in FUNCTIONS[name](d) if value.requires_grad]
    leaves = [d["p"]] if LEAF[name] == "p" else [d["hidden"], d["weight"]]
    upstream = [torch.linspace(1.0, 2.0, v.numel()).to(v).view(v.shape) for v in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]


def assert_same(results: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for result, value in zip(results, expected, strict=True):
        testing.assert_same_bits(result, value, "result")
        assert bool((value != 0).any())


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastkl":
            self.names.add(func.name().removeprefix("fastkl::"))
        return func(*args, **(kwargs or {}))


@named
def test_plain_tensors_in_eager_mode_do_without_the_op(implementation, name, monkeypatch) -> None:
    for each in DISPATCHED:
        monkeypatch.setattr(each, "op", None)
    d = data(implementation.device)
    outcome(name, d)
    with torch.no_grad():
        FUNCTIONS[name](d)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("kl", {"row_statistics", "row_gradients"}),
        ("stats", {"row_statistics", "row_gradients"}),
        ("linear_none", {"linear_statistics", "linear_gradients"}),
        ("linear_mean", {"linear_weighted_kl", "scaled"}),
    ],
)
def test_a_dispatch_mode_sees_the_ops_and_the_bits_are_the_same(
    implementation, name, expected
) -> None:
    d = data(implementation.device)
    plain = outcome(name, d)
    with Seen() as seen:
        assert_same(outcome(name, d), plain)
    assert seen.names == expected


@named
def test_without_the_short_ways(implementation, name, monkeypatch) -> None:
    d = data(implementation.device)
    expected = outcome(name, d)
    monkeypatch.setattr(dual_op, "SHORT_WAYS", False)
    for each in DISPATCHED:
        monkeypatch.setattr(each, "_eager", None)
    assert_same(outcome(name, d), expected)


@named
def test_a_checkpoint_with_a_mode_around_forward_only(implementation, name) -> None:
    """A recomputation outside the mode goes another way, which has to save as many tensors."""
    d, leaf = data(implementation.device), LEAF[name]

    def total(value: torch.Tensor) -> torch.Tensor:
        return FUNCTIONS[name]({**d, leaf: value})[0].sum()

    with Seen():
        result = checkpoint(total, d[leaf], use_reentrant=False)
    grads = (torch.autograd.grad(value, d[leaf]) for value in (result, total(d[leaf])))
    assert_same(*grads)


class Wrapped(torch.Tensor):
    met: list[str] = []

    @staticmethod
    def __new__(cls, plain):
        return torch.Tensor._make_wrapper_subclass(
            cls, plain.shape, dtype=plain.dtype, device=plain.device, strides=plain.stride()
        )

    def __init__(self, plain):
        self.plain = plain

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.met.append(func.name())
        return func(
            *torch.utils._pytree.tree_map_only(cls, lambda value: value.plain, args),
            **(kwargs or {}),
        )


def test_a_subclass_meets_the_op(implementation) -> None:
    d = data(implementation.device)
    Wrapped.met.clear()
    result = fastkl.kl_divergence(Wrapped(d["p"].detach()), d["q"])
    assert Wrapped.met == ["fastkl::row_statistics"]
    testing.assert_same_bits(result, kl(d), "kl")


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
    marked = (
        torch.randn(3, 14, dtype=torch.cfloat, device=implementation.device)
        .conj()
        .imag.as_strided((3, 7), (28, 1))
    )
    assert marked.is_neg() and marked.stride(-1) == 1
    testing.assert_same_bits(
        fastkl.kl_divergence(marked, d["q"]),
        fastkl.kl_divergence(marked.resolve_neg().clone(), d["q"]),
        "kl",
    )
    upstream = torch.linspace(1.0, 2.0, 3, device=implementation.device)
    result = fastkl.kl_divergence(d["p"], d["q"])
    minus, plus = (
        torch.autograd.grad(result, d["p"], value, retain_graph=True)[0]
        for value in (torch._neg_view(upstream), upstream)
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
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value, rtol=1e-6, atol=1e-7)  # products round by layout


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "op"])
@named
def test_a_reference_from_inference_mode(implementation, name, compiled) -> None:
    d = data(implementation.device)
    with torch.inference_mode():
        made = {key: d[key].clone() for key in ("q", "ref_hidden", "tokens")}
    assert made["q"].is_inference()
    expected = outcome(name, d)
    with Seen() if compiled else torch.enable_grad():
        assert_same(outcome(name, {**d, **made}), expected)


def test_a_penalty_keeps_nothing_of_a_transform(implementation) -> None:
    d = data(implementation.device)
    penalty = fastkl.KLPenalty(0.1)
    penalty(d["p"], d["q"])
    before = dict(penalty.last)
    torch.func.grad(lambda p: penalty(2 * p, d["q"]))(d["p"].detach())
    assert penalty.last == before


# ---- what a call takes


def test_calls_of_a_step_with_few_rows(monkeypatch) -> None:
    """With a few rows a step takes as long as its Python does, which calls in Python and C count
    without a clock: 224 when this was written, no more than 240.
    """
    pytest.importorskip("triton")
    from fastkl import backend
    from fastkl.kernels import launch

    monkeypatch.setattr(launch.Variant, "start", lambda *arguments: None)
    monkeypatch.setattr(backend, "triton_problems", lambda *logits, **reading: ())
    d, upstream, events = data("cpu"), torch.ones(3), []
    before = sys.getprofile()
    with fastkl.use_backend("triton"):
        for _ in range(3):
            events.clear()
            sys.setprofile(lambda frame, event, argument: events.append(event))
            try:
                torch.autograd.grad(fastkl.kl_divergence(d["p"], d["q"]), d["p"], upstream)
            finally:
                sys.setprofile(before)
    assert sum(event in ("call", "c_call") for event in events) <= 240
