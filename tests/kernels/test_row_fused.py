"""row_fused, a KL and its gradient to P in one launch: values, bits, places, and rows that it
leaves to the fallback.
"""

import math
from unittest import mock

import cases
import pytest
import torch
from cases import INTERPRETING, Rows

import fastkl
from fastkl import testing
from fastkl.ops.fields import Scaling
from fastkl.tools import doctor

pytest.importorskip("triton")
from fastkl.kernels import config, launch_fused

pytestmark = pytest.mark.skipif(
    not INTERPRETING and not torch.cuda.is_available(), reason="about a kernel"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
V = 2056


@pytest.fixture(autouse=True)
def as_on_a_gpu():
    forward = config.RowConfig(32, 2, 16384, "as on a GPU")
    with config.override(forward, fused=config.RowConfig(32, 2, 544, "a quarter of a row")):
        yield


def fused(p, q, weights, *, mask=None, temperature=1.0, scaling=Scaling(), grad=None):  # noqa: B008
    grad = torch.full_like(p, math.nan) if grad is None else grad
    rows = Rows(p, q, None, mask, temperature, scaling)
    kl, saved = (p.new_full((len(p), *more), math.nan, dtype=torch.float32) for more in ((), (10,)))
    launch_fused.fused(cases.problem(rows), weights, kl, saved, grad)
    return kl, grad


def pair(kind, size, dtype=torch.float32, rows=2, vocabulary=V):
    p, q = testing.pair(kind, rows, vocabulary, size, dtype=dtype, seed=3, device=DEVICE)
    return p, q, torch.linspace(0.7, -1.3, rows, device=DEVICE)


KINDS = [("normal3", 1e-3, V), ("normal3", 1.0, V), ("very_peaked", 0.1, V)]
LENGTHS = [("normal3", 0.1, vocabulary) for vocabulary in (1, 7, 500, 1000, 2052)]


# Beside a masked row, in memory of a whole number of blocks, also of one program a row.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind, size, vocabulary", KINDS + LENGTHS)
def test_values_and_gradients(kind, size, vocabulary, dtype) -> None:
    if DEVICE == "cuda" and vocabulary != V:
        pytest.skip("programs of a GPU take turns by themselves")
    p, q, weights = pair(kind, size, dtype, 3 if vocabulary == V else 2, vocabulary)
    p, q, grad = (cases.padded(side, -vocabulary % 8) for side in (p, q, p * 0))
    kl, grad = fused(p, q, weights, grad=grad, mask=torch.arange(len(p), device=DEVICE) != 1)
    assert kl[1] == 0 and not grad[1].any()
    exact = testing.truth(p[::2], q[::2])
    testing.assert_kl(kl[::2], exact.kl, kind)
    expected = testing.kl_gradients(exact, weights[::2]).p
    testing.assert_rounded_gradient(grad[::2], expected, kind, truncated=INTERPRETING)


def test_other_pieces() -> None:
    p, q, weights = pair("normal3", 0.1)
    with config.override(fused=config.RowConfig(32, 1, 64, "three pieces of a sixteenth")):
        results = fused(p, q, weights)
    torch.testing.assert_close(results, fused(p, q, weights), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bits_alone_in_place_and_under_a_mask(dtype) -> None:
    p, q, weights = pair("normal3", 0.1, dtype, rows=3)
    kl, grad = fused(p, q, weights)
    for i in (0, 2):
        cases.assert_same(fused(p[[i]].clone(), q[[i]].clone(), weights[[i]]), (kl[[i]], grad[[i]]))
    mask = torch.tensor([True, False, True], device=DEVICE)
    p[1], q[1] = math.nan, math.inf
    over = p.clone()
    masked = fused(over, q, weights, mask=mask, grad=over)
    cases.assert_same([value[mask] for value in masked], (kl[mask], grad[mask]))
    assert masked[0][1] == 0 and not masked[1][1].any()


def test_temperatures_soft_caps_and_a_ratio() -> None:
    p, q, weights = pair("normal3", 0.3)
    temperature = torch.tensor([0.7, 1.4], device=DEVICE)
    scaling = Scaling(30.0, 20.0, torch.tensor([0.9, 1.1], device=DEVICE))
    kl, grad = fused(p, q, weights, temperature=temperature, scaling=scaling)
    rows = Rows(p, q, None, None, temperature, scaling)
    two = cases.run("triton", rows, {"kl": weights}, (torch.empty_like(p), None))
    torch.testing.assert_close(kl, two.fields["kl"], rtol=5e-6, atol=0)
    torch.testing.assert_close(grad, two.grads[0], rtol=1e-4, atol=1e-9)


def test_rows_whose_sums_do_not_hold() -> None:
    p, q, _ = pair("normal3", 0.1, rows=4)
    p[0, 5], q[1, 7], q[2, V - 1] = -math.inf, -1e9, -math.inf
    weights = torch.tensor([1.0, -2.0, 0.0, 3.0], device=DEVICE)
    exact, over, some = testing.truth(p, q), p.clone(), [0, 1, 3]
    kl, grad = fused(over, q, weights, grad=over)
    testing.assert_kl(kl, exact.kl, "far rows")
    assert kl[2] == math.inf and not grad[2].any()
    testing.assert_gradient(grad[some], testing.kl_gradients(exact, weights).p.cpu()[some])


# The chunks of a linear loss that only P learns from, where the configuration has it so.
@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("learns", [True, False], ids=["both learn", "P learns"])
def test_where_it_is_used(monkeypatch, on, learns) -> None:
    fused = mock.Mock(wraps=launch_fused.fused)
    monkeypatch.setattr(launch_fused, "fused", fused)
    monkeypatch.setattr(config, "fuses", lambda arch: on)
    generator = torch.Generator().manual_seed(0)
    weight, hidden, ref_hidden = (
        torch.randn(rows, 16, generator=generator).to(DEVICE) for rows in (500, 6, 6)
    )
    head = testing.leaf(weight)
    ref_weight = head if learns else weight
    with fastkl.use_backend("triton"):
        loss = fastkl.linear_kl_divergence(
            testing.leaf(hidden), head, ref_hidden, ref_weight, reduction="mean"
        )
    exact = testing.truth(*(states.double() @ weight.double().T for states in (hidden, ref_hidden)))
    testing.assert_near(loss, exact.kl.mean(), 1e-5, 0.0, "loss")
    assert fused.called == (on and not learns)


def test_losses_that_take_two_launches(monkeypatch) -> None:
    monkeypatch.setattr(launch_fused, "fused", lambda *arguments: pytest.fail("fused"))
    p, q, weights = pair("normal3", 0.3, vocabulary=520)
    x, y = testing.leaf(p), testing.leaf(q)
    kl = fastkl.kl_divergence
    with fastkl.use_backend("triton"):
        kl(x, q, reduction="mean", weights=weights).backward()
        kl(x, y, reduction="sum").backward()
        kl(p, q, reduction="sum")
        kl(x[:, 1:], q[:, 1:], reduction="sum").backward()
        torch.func.grad(lambda value: kl(value, q).sum())(p)
        fastkl.KLPenalty(0.1, direction="reference||policy")(x, q).backward()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_doctor_compares_one_launch_with_float64(monkeypatch, dtype) -> None:
    monkeypatch.setattr(config, "fuses", config.fuses)  # the check sets it, in a process of its own
    with fastkl.use_backend("triton"):
        assert doctor.check_sum((3, 512), torch.device(DEVICE), dtype).status == "ok"
        with pytest.raises(AssertionError, match="did not take the rows"):
            doctor.check_sum((2, 513), torch.device(DEVICE), dtype)
