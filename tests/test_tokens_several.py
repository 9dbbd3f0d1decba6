"""selective_log_softmax of K ids per row: values and gradients against float64, and one read of the
logits whatever K is.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from fastkl import selective_log_softmax, testing
from fastkl.ops import engine

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check(implementation, logits: torch.Tensor, index: torch.Tensor, what: str) -> None:
    """Values and gradient are those of log_softmax and gather in float64 of the same logits."""
    leaf, exact = testing.leaf(logits.to(implementation.device)), testing.leaf(logits.double())
    result = selective_log_softmax(leaf, index.to(implementation.device))
    expected = exact.log_softmax(-1).gather(-1, index.long())
    assert result.dtype == torch.float32 and result.shape == index.shape
    testing.assert_near(result, expected, 2e-6, 2e-6, what)
    assert bool((result <= 0).all())
    upstream = testing.upstream_for(result)
    (grad,) = torch.autograd.grad(result, leaf, upstream)
    assert grad.dtype == logits.dtype
    (truth,) = torch.autograd.grad(expected, exact, upstream.double().cpu())
    testing.assert_rounded_gradient(grad, truth, what, truncated=implementation.interpreted)


@pytest.mark.parametrize("vocabulary, count", [(1, 3), (9, 1), (9, 9), (1003, 5), (1003, 100)])
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_against_fp64(implementation, dtype, vocabulary, count) -> None:
    """K ids of each row in two leading dimensions, some twice, K up to V and above."""
    logits = testing.pair("normal3", 6, vocabulary, 0.0, dtype=dtype)[0].view(2, 3, vocabulary)
    index = torch.randint(vocabulary, (2, 3, count), generator=torch.Generator().manual_seed(2))
    check(implementation, logits, index, f"{count} ids of {vocabulary}")


@pytest.mark.parametrize("kind", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_index_types_and_layouts(implementation, kind) -> None:
    """Any integer type, an index that is not contiguous, one row, no rows, no ids."""
    logits = testing.pair("normal3", 6, 203, 0.0)[0].view(2, 3, 203)
    index = (
        torch.randint(100, (4, 3, 2), generator=torch.Generator().manual_seed(2))
        .to(kind)
        .transpose(0, 2)
    )
    check(implementation, logits, index, "transposed index")
    check(implementation, logits[0, 0], index[0, 0], "one row")
    for shape in ((0, 203), (3, 203)):
        leaf = torch.randn(shape, device=implementation.device, requires_grad=True)
        result = selective_log_softmax(
            leaf,
            torch.empty(shape[0], 0 if shape[0] else 4, dtype=kind, device=implementation.device),
        )
        result.sum().backward()
        assert result.numel() == 0 and bool((leaf.grad == 0).all())


def test_digits(implementation) -> None:
    """Log-probabilities from 0 to -2000 of one row, a shift of all logits, and -inf: each has its
    own digits, none those of the least likely.
    """
    steps = torch.tensor([0.0, 1e-3, 1.0, 30.0, 400.0, 2000.0, math.inf])
    index = torch.arange(7).flip(0).expand(3, 7)
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) - 40
    logits[:, :7] = -steps
    logits[1] += 30
    logits[2, :7] = -math.inf  # of no id is there anything
    leaf = testing.leaf(logits.to(implementation.device))
    result = selective_log_softmax(leaf, index.to(implementation.device))
    exact = logits.double().log_softmax(-1).gather(-1, index)
    finite = exact.isfinite()
    assert torch.equal(result.cpu().isfinite(), finite) and bool(
        (result.cpu()[~finite] == -math.inf).all()
    )
    testing.assert_near(result.cpu()[finite], exact[finite], 2e-6, 2e-6, "log-softmax")
    result[:2, 1:].sum().backward()
    assert bool(leaf.grad.isfinite().all())


def test_huge_differences(implementation) -> None:
    """Differences of logits beyond float32's largest number are -inf, as in torch; equal ones are
    as likely.
    """
    logits = torch.zeros(2, 9)
    logits[0, :3] = torch.tensor([3e38, -3e38, 3e38])
    index = torch.tensor([[0, 1, 2], [0, 1, 2]])
    result = selective_log_softmax(
        logits.to(implementation.device), index.to(implementation.device)
    ).cpu()
    testing.assert_near(
        result[:, [0, 2]],
        torch.tensor([[0.5], [1 / 9]]).log().expand(2, 2),
        2e-6,
        2e-6,
        "log-softmax",
    )
    assert float(result[0, 1]) == -math.inf


@pytest.mark.parametrize("identity", [-1, -100, 203, 1 << 40])
def test_ids_out_of_range(implementation, identity) -> None:
    """An error on the reference; on the kernels NaN in its own entry, gradient 0 from it, the
    others as ever.
    """
    logits = testing.pair("normal3", 3, 203, 0.0)[0].to(implementation.device)
    index = torch.tensor([[5, 0], [202, 0], [7, 7]], device=implementation.device)
    bad = index.clone()
    bad[1, 1] = identity
    if not implementation.kernels:
        with pytest.raises(ValueError, match="index"):
            selective_log_softmax(logits, bad)
        return
    good, leaf = testing.leaf(logits), testing.leaf(logits)
    expected, result = selective_log_softmax(good, index), selective_log_softmax(leaf, bad)
    assert bool(result[1, 1].isnan())
    others = ~result.isnan()
    assert int(others.sum()) == 5
    testing.assert_near(result[others], expected[others], 1e-6, 1e-6, "the others")
    for value in (expected, result):
        value[others].sum().backward()
    testing.assert_near(leaf.grad, good.grad, 1e-5, 1e-6, "gradient")


def test_one_read(implementation, monkeypatch) -> None:
    """The rows are read once forward and once backward for any number of ids."""
    calls = []

    def counted(name: str, run: Callable) -> Callable:
        return lambda *inputs: (calls.append(name), run(*inputs))

    for name in ("forward", "backward"):
        monkeypatch.setattr(engine, name, counted(name, getattr(engine, name)))
    logits = testing.leaf(testing.pair("normal3", 3, 203, 0.0)[0].to(implementation.device))
    selective_log_softmax(
        logits, torch.arange(3 * 40, device=implementation.device).view(3, 40)
    ).sum().backward()
    assert calls == ["forward", "backward"]


def test_agrees_with_one_id(implementation) -> None:
    """[..., 1] is [...] with a dimension more, to the bit."""
    logits = testing.pair("normal3", 6, 203, 0.0)[0].view(2, 3, 203).to(implementation.device)
    index = torch.arange(6, device=implementation.device).view(2, 3)
    assert torch.equal(
        selective_log_softmax(logits, index[..., None])[..., 0],
        selective_log_softmax(logits, index),
    )


def test_gradcheck_in_fp64(implementation) -> None:
    """The reference in float64 by finite differences, ids that occur twice included; a second
    derivative says that there is none.
    """
    if implementation.kernels:
        pytest.skip("float64 is the reference's")
    logits = torch.randn(
        3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    index = torch.tensor([[0, 1, 0, 0], [4, 4, 4, 4], [3, 2, 1, 0]])
    assert torch.autograd.gradcheck(lambda value: selective_log_softmax(value, index), (logits,))
    (grad,) = torch.autograd.grad(
        selective_log_softmax(logits, index).square().sum(), logits, create_graph=True
    )
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        grad.sum().backward()


def test_ways_to_the_op(implementation) -> None:
    """torch.compile(fullgraph=True), vmap, grad of torch.func and no_grad give eager's bits;
    opcheck holds for both ops.
    """
    logits = testing.pair("normal3", 6, 29, 0.0)[0].view(2, 3, 29).to(implementation.device)
    index = torch.randint(29, (2, 3, 4), generator=torch.Generator().manual_seed(2)).to(
        implementation.device
    )
    leaf = testing.leaf(logits)
    expected = selective_log_softmax(leaf, index)
    upstream = testing.upstream_for(expected)
    (gradient,) = torch.autograd.grad(expected, leaf, upstream)
    torch._dynamo.reset()
    for way in (
        torch.compile(selective_log_softmax, fullgraph=True, backend="aot_eager"),
        torch.vmap(selective_log_softmax),
    ):
        again = testing.leaf(logits)
        result = way(again, index)
        assert torch.equal(result, expected) and torch.equal(
            torch.autograd.grad(result, again, upstream)[0], gradient
        )
    assert torch.equal(
        torch.func.grad(lambda value: (selective_log_softmax(value, index) * upstream).sum())(
            logits
        ),
        gradient,
    )
    with torch.no_grad():
        assert torch.equal(selective_log_softmax(leaf, index), expected)
    ops, backend = torch.ops.fastkl, implementation.backend
    torch.library.opcheck(ops.selected_logprobs.default, (leaf, index, backend))
    made = ops.selected_logprobs(logits, index, backend)
    torch.library.opcheck(ops.selected_gradients.default, (logits, index, *made, upstream, backend))


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (3, 2), (3, 2, 4), (3,)], ids=str)
def test_wrong_indices(shape) -> None:
    """Neither [...] nor [..., K], or no integers: an error that names index."""
    with pytest.raises(ValueError, match="^index: expected"):
        selective_log_softmax(torch.zeros(2, 3, 5), torch.zeros(shape, dtype=torch.long))
    for index in (torch.zeros(2, 3, 4), 3, None):
        with pytest.raises(TypeError, match="^index: expected"):
            selective_log_softmax(torch.zeros(2, 3, 5), index)
