"""row_fused, a KL and its gradient to P in one launch: values, bits, places, and rows that it
leaves to the fallback.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch

import fastkl
from fastkl import testing
from fastkl.ops import engine
from fastkl.ops.fields import Scaling
from fastkl.tools import doctor

pytest.importorskip("triton")
from fastkl.kernels import config, launch_fused

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not INTERPRETING and not torch.cuda.is_available(), reason="about a kernel"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ONE_WARP = config.RowConfig(32, 2, 16384, "as on a GPU")
V = 4008


@pytest.fixture(autouse=True)
def as_on_a_gpu():
    """One warp a program, and four programs a row."""
    with config.override(
        forward=ONE_WARP, fused=config.RowConfig(32, 2, 1024, "a quarter of a row")
    ):
        yield


def fused(p, q, weights, *, mask=None, temperature=1.0, scaling=Scaling(), grad=None):  # noqa: B008
    """(KL, gradient to P of Σ weights·KL); grad: where it goes."""
    grad = torch.full_like(p, float("nan")) if grad is None else grad
    kl, saved = (
        p.new_full((len(p),), float("nan"), dtype=torch.float32),
        p.new_full((len(p), 10), float("nan"), dtype=torch.float32),
    )
    ((_, problem),) = engine.problems(p, q, None, mask, temperature, scaling)
    launch_fused.fused(problem, weights, kl, saved, grad)
    return kl, grad


def pair(kind, size, dtype, rows=2, vocabulary=V):
    p, q = testing.pair(kind, rows, vocabulary, size, dtype=dtype, seed=3)
    return p.to(DEVICE), q.to(DEVICE), torch.linspace(0.7, -1.3, rows, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("kind", "size"), [("normal3", 1e-3), ("normal3", 1.0), ("very_peaked", 0.1)]
)
def test_values_and_gradients(kind, size, dtype) -> None:
    p, q, weights = pair(kind, size, dtype)
    truth = testing.truth(p, q)
    kl, grad = fused(p, q, weights)
    testing.assert_kl(kl, truth.kl, kind)
    with config.override(fused=config.RowConfig(32, 1, 128, "two pieces of a sixteenth")):
        torch.testing.assert_close(
            fused(p[:1], q[:1], weights[:1])[0], kl[:1], rtol=1e-5, atol=1e-10
        )
    testing.assert_rounded_gradient(
        grad,
        testing.kl_gradients(truth, weights).p,
        kind,
        truncated=INTERPRETING and dtype != torch.float32,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bits_alone_in_place_and_under_a_mask(dtype) -> None:
    p, q, weights = pair("normal3", 0.1, dtype, rows=3)
    kl, grad = fused(p, q, weights)
    for i in (0, 2):
        one_kl, one_grad = fused(p[i : i + 1].clone(), q[i : i + 1].clone(), weights[i : i + 1])
        assert torch.equal(one_kl, kl[i : i + 1]) and torch.equal(one_grad, grad[i : i + 1])
    mask = torch.tensor([True, False, True], device=DEVICE)
    p[1], q[1] = float("nan"), float("inf")
    over = p.clone()
    masked_kl, masked_grad = fused(over, q, weights, mask=mask, grad=over)
    assert torch.equal(masked_kl[mask], kl[mask]) and torch.equal(masked_grad[mask], grad[mask])
    assert masked_kl[1] == 0 and not masked_grad[1].any()


def test_temperatures_soft_caps_and_a_ratio() -> None:
    """Equal to two launches up to the order of sums."""
    p, q, weights = pair("normal3", 0.3, torch.float32)
    temperature = torch.tensor([0.7, 1.4], device=DEVICE)
    scaling = Scaling(30.0, 20.0, torch.tensor([0.9, 1.1], device=DEVICE))
    kl, grad = fused(p, q, weights, temperature=temperature, scaling=scaling)
    values, saved, expected = torch.empty_like(kl), kl.new_empty(2, 10), torch.empty_like(p)
    engine.forward("triton", p, q, None, None, temperature, {"kl": values}, saved, scaling)
    engine.backward(
        "triton", p, q, None, None, temperature, saved, {"kl": weights}, expected, None, scaling
    )
    torch.testing.assert_close(kl, values, rtol=2e-6, atol=0)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-9)


def test_rows_whose_sums_do_not_hold() -> None:
    """Infinite and masked entries: from the fallback, also in place; a weight of 0 gives a gradient
    of 0.
    """
    p, q, _ = pair("normal3", 0.1, torch.float32, rows=4)
    p[0, 5] = float("-inf")
    q[1, 7] = -1e9
    q[2, V - 1] = float("-inf")
    weights = torch.tensor([1.0, -2.0, 0.0, 3.0], device=DEVICE)
    truth = testing.truth(p, q)
    over = p.clone()
    kl, grad = fused(over, q, weights, grad=over)
    testing.assert_kl(kl[[0, 1, 3]], truth.kl[[0, 1, 3]], "far rows")
    assert kl[2] == float("inf") and not grad[2].any()
    expected = testing.kl_gradients(truth, weights).p
    for i in (0, 1, 3):
        assert (grad[i].double() - expected[i]).norm() <= 1e-5 * expected[i].norm(), i


@pytest.mark.skipif(DEVICE == "cuda", reason="programs of a GPU take turns by themselves")
def test_pieces_cover_a_row_whatever_its_length() -> None:
    for vocabulary in (1, 7, 500, 1000, 2052):
        p, q = testing.pair("normal3", 2, vocabulary, 0.1, seed=1)
        width = -(-vocabulary // 4) * 4
        p, q, grad = (
            torch.nn.functional.pad(side, (0, width - vocabulary))[:, :vocabulary]
            for side in (p, q, p * 0)
        )
        kl, grad = fused(p, q, torch.ones(2), grad=grad)
        truth = testing.truth(p, q)
        testing.assert_kl(kl, truth.kl, str(vocabulary))
        expected = testing.kl_gradients(truth, torch.ones(2)).p
        assert (grad.double() - expected).norm() <= 1e-5 * expected.norm() + 1e-9, vocabulary


def test_where_it_is_used(monkeypatch) -> None:
    """The chunks of a linear loss that only P learns from, where the configuration has it so."""
    seen = []
    whole = launch_fused.fused
    monkeypatch.setattr(
        launch_fused, "fused", lambda *arguments: seen.append("fused") or whole(*arguments)
    )
    for on, learns in itertools.product((True, False), (False, True)):
        monkeypatch.setattr(config, "fuses", lambda arch, on=on: on)
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(500, 16, generator=generator).to(DEVICE).requires_grad_()
        hidden = torch.randn(24, 16, generator=generator).to(DEVICE).requires_grad_()
        ref_hidden = torch.randn(24, 16, generator=generator).to(DEVICE)
        seen.clear()
        with fastkl.use_backend("triton"):
            loss = fastkl.linear_kl_divergence(
                hidden, weight, ref_hidden, weight if learns else weight.detach(), reduction="mean"
            )
        expected = fastkl.reference.row_statistics(
            hidden.double() @ weight.double().T, ref_hidden.double() @ weight.double().T
        ).kl.mean()
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
        assert bool(seen) == (on and not learns), (on, learns)


def summed(how, p, q, mask):
    """A loss that only P learns from."""
    if how == "mean":
        return fastkl.kl_divergence(p, q, mask, temperature=1.5, reduction="mean", normalizer=5.0)
    return fastkl.KLPenalty(0.05, reduction="sequence_mean", temperature=1.5)(p, q, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["mean", "penalty"])
def test_losses_are_those_of_two_launches(monkeypatch, how, dtype) -> None:
    """Value and gradient, for upstream gradients of 1 and another, once more through a retained
    graph, in a graph, and in a batch of them.
    """
    p, q, _ = pair("normal3", 0.3, dtype, rows=4, vocabulary=520)
    p, q, mask = (
        p.view(2, 2, 520),
        q.view(2, 2, 520),
        torch.tensor([[True, True], [False, True]], device=DEVICE),
    )
    found = {}
    for on in (False, True):
        monkeypatch.setattr(config, "fuses", lambda arch, on=on: on)
        x = p.clone().requires_grad_()
        with fastkl.use_backend("triton"):
            loss = summed(how, x, q, mask)
            assert ("SummedKL" in loss.grad_fn.name()) == (
                on and dtype != torch.float16
            ) or how == "penalty"
            (first,) = torch.autograd.grad(loss, x, retain_graph=True)
            first = first.clone()
            (half,) = torch.autograd.grad(loss, x, loss.new_full((), 0.5), retain_graph=True)
            (batch,) = torch.autograd.grad(
                loss, x, loss.new_tensor([2.0, 0.0]), is_grads_batched=True
            )
            loss = summed(how, x, q, mask)
            (scaled,) = torch.autograd.grad(loss, x, loss.new_full((), 0.3))
            loss = summed(how, x, q, mask)
            (graph,) = torch.autograd.grad(loss, x, create_graph=True)
        found[on] = [loss, first, half, batch, scaled, graph]
    tolerance = (
        {"rtol": 1e-4, "atol": 1e-9} if dtype == torch.float32 else {"rtol": 4e-3, "atol": 1e-7}
    )
    for one, other in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(one, other, **tolerance)
    if dtype == torch.float32:
        with pytest.raises(RuntimeError, match="second derivatives"):
            torch.autograd.grad(found[True][-1].sum(), x)


def test_losses_that_take_two_launches(monkeypatch) -> None:
    """Weights, a gradient to Q, no gradient, rows that start anywhere, and transforms."""
    monkeypatch.setattr(launch_fused, "fused", lambda *arguments: pytest.fail("fused"))
    p, q, _ = pair("normal3", 0.3, torch.float32, vocabulary=520)
    x = p.clone().requires_grad_()
    with fastkl.use_backend("triton"):
        fastkl.kl_divergence(
            x, q, reduction="mean", weights=torch.ones(2, device=DEVICE)
        ).backward()
        fastkl.kl_divergence(x, q.clone().requires_grad_(), reduction="sum").backward()
        fastkl.kl_divergence(p, q, reduction="sum")
        fastkl.kl_divergence(x[:, 1:], q[:, 1:], reduction="sum").backward()
        torch.func.grad(lambda value: fastkl.kl_divergence(value, q, reduction="none").sum())(p)
        fastkl.KLPenalty(0.1, direction="reference||policy")(x, q).backward()


def test_doctor_compares_one_launch_with_float64(monkeypatch) -> None:
    monkeypatch.setattr(config, "fuses", config.fuses)  # the check sets it, in a process of its own
    assert doctor.check_fused((3, 512), torch.device(DEVICE)).status == "ok"
    with pytest.raises(AssertionError, match="did not take the rows"):
        doctor.check_fused((2, 513), torch.device(DEVICE))
