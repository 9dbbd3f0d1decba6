"""Σ weights · x / normalizer, of kl_divergence and of the penalties: values, gradients, and what is
refused.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import fastkl
from fastkl import testing

V, H = 17, 5
NORMALIZERS = {
    "default": None,
    "number": 2.5,
    "whole number": 7,
    "tensor": torch.tensor(2.5),
    "whole tensor": torch.tensor([7]),
    "float64 tensor": torch.tensor(2.5, dtype=torch.float64),
}


def batch(device: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """(p, q, mask, weights): two sequences, of three tokens and of one; masked rows hold NaN."""
    p, q = (value.view(2, 3, V) for value in testing.pair("normal3", 6, V, 0.5, dtype=dtype))
    mask = torch.tensor([[True, True, True], [True, False, False]])
    weights = torch.tensor([[0.5, -1.0, 2.0], [0.25, math.nan, math.inf]])
    p = torch.where(mask[..., None], p, math.nan)
    return tuple(value.to(device) for value in (p, q, mask, weights))


@pytest.mark.parametrize("normalizer", NORMALIZERS.values(), ids=NORMALIZERS)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("reduction", ["mean", "token_mean", "sum"])
def test_value_and_gradients(implementation, reduction, weighted, normalizer) -> None:
    if reduction == "sum" and normalizer is not None:
        pytest.skip("a sum has no normalizer")
    if isinstance(normalizer, torch.Tensor):
        normalizer = normalizer.to(implementation.device)
    p, q, mask, weights = batch(implementation.device)
    leaves = [testing.leaf(value) for value in (p, q, weights)]
    result = fastkl.kl_divergence(
        *leaves[:2],
        mask,
        weights=leaves[2] if weighted else None,
        reduction=reduction,
        normalizer=normalizer,
    )
    exact = [testing.leaf(value[mask].double()) for value in (p, q, weights)]
    kl = testing.truth(*exact[:2]).kl
    divisor = 1 if reduction == "sum" else float(4 if normalizer is None else normalizer)
    expected = (kl * exact[2] if weighted else kl).sum() / divisor
    assert result.dtype == torch.float32 and result.shape == ()
    testing.assert_near(result, expected, 2e-5, 0.0, "value")
    for leaf, value in zip(leaves[: 2 + weighted], exact, strict=False):
        (grad,) = torch.autograd.grad(result, leaf, retain_graph=True)
        (exact_grad,) = torch.autograd.grad(expected, value, retain_graph=True)
        assert bool((grad[~mask] == 0).all())
        testing.assert_near(grad[mask], exact_grad, 1e-4, 1e-7, "gradient")


def test_a_mean_in_float64_and_under_a_float64_default() -> None:
    p, q, mask, _ = batch("cpu")
    exact = fastkl.kl_divergence(
        p.double(), q.double(), mask, reduction="mean", normalizer=torch.tensor(3)
    )
    assert exact.dtype == torch.float64
    assert float(exact) == float(fastkl.kl_divergence(p.double(), q.double(), mask).sum() / 3)
    for penalty in (fastkl.KLPenalty(0.1), fastkl.KLPenalty(0.1, reduction="sequence_mean")):
        assert (
            penalty(p, q, mask, normalizer=torch.tensor(3.0, dtype=torch.float64)).dtype
            == torch.float32
        )


def losses(device: str) -> dict:
    """Every function with a mean, as (leaf, mask, normalizer) -> scalar, for a leaf [..., V] of
    logits.
    """
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(V, V, generator=generator).to(device)

    def reference(p: torch.Tensor) -> torch.Tensor:
        return torch.linspace(-1, 1, V, device=device).expand(p.shape)

    return {
        "kl_divergence": lambda p, mask, n: fastkl.kl_divergence(
            p, reference(p), mask, reduction="mean", normalizer=n
        ),
        "linear_kl_divergence": lambda p, mask, n: fastkl.linear_kl_divergence(
            p, weight, reference(p), mask=mask, reduction="token_mean", normalizer=n
        ),
        "token_mean": lambda p, mask, n: fastkl.KLPenalty(0.5)(p, reference(p), mask, normalizer=n),
        "reverse": lambda p, mask, n: fastkl.KLPenalty(
            0.5, direction="reference||policy", reduction="mean"
        )(p, reference(p), mask, normalizer=n),
        "sequence_mean": lambda p, mask, n: fastkl.KLPenalty(0.5, reduction="sequence_mean")(
            p, reference(p), mask, normalizer=n
        ),
        "linear": lambda p, mask, n: fastkl.LinearKLPenalty(0.5)(
            p, weight, reference(p), mask=mask, normalizer=n
        ),
        "linear sequence_mean": lambda p, mask, n: fastkl.LinearKLPenalty(
            0.5, reduction="sequence_mean"
        )(p, weight, reference(p), mask=mask, normalizer=n),
    }


LOSSES = list(losses("cpu"))


@pytest.mark.parametrize("name", LOSSES)
def test_accumulation(implementation, name) -> None:
    """Micro-batches of different lengths with the whole batch's count add up to its gradient; with
    their own means they do not.
    """
    loss = losses(implementation.device)[name]
    p, _, mask, _ = batch(implementation.device)
    leaf = testing.leaf(p)
    (whole,) = torch.autograd.grad(loss(leaf, mask, None), leaf)
    count = (mask.any(-1) if "sequence" in name else mask).sum()
    for normalizer in (count, int(count), None):
        total = sum(loss(leaf[rows], mask[rows], normalizer) for rows in (slice(0, 1), slice(1, 2)))
        (grad,) = torch.autograd.grad(total if normalizer is not None else total / 2, leaf)
        error = float((grad - whole)[mask].norm() / whole[mask].norm())
        assert (error < 1e-5) == (normalizer is not None or "sequence" in name), error


@pytest.mark.parametrize("name", LOSSES)
def test_a_normalizer_of_zero(implementation, name) -> None:
    p, _, mask, _ = batch(implementation.device)
    zero = torch.zeros((), dtype=torch.long, device=implementation.device)
    for counted in (mask, torch.zeros_like(mask)):
        leaf = testing.leaf(p)
        loss = losses(implementation.device)[name](leaf, counted, zero)
        loss.backward()
        assert loss.item() == 0.0 and bool((leaf.grad == 0).all())


def test_statistics_of_sequences(implementation) -> None:
    p, q, mask, _ = batch(implementation.device)
    # A third sequence, without a token.
    p, q, mask = (F.pad(value, (0,) * (2 * value.dim() - 1) + (1,)) for value in (p, q, mask))
    total, eye = fastkl.kl_divergence(p, q, mask).sum(), torch.eye(V, device=p.device)
    for reduction in ("token_mean", "sequence_mean", "sum"):
        normalizer = None if reduction == "sum" else 40
        for kind, heads in ((fastkl.KLPenalty, ()), (fastkl.LinearKLPenalty, (eye,))):
            penalty = kind(0.5, reduction=reduction)
            loss = penalty(p, *heads, q, mask=mask, normalizer=normalizer)
            testing.assert_near(loss, 0.5 * total / (normalizer or 1), 1e-5, 0.0, "loss")
            last = {"sequences": 2, "tokens": 4, "kl_per_sequence": total / 2, "kl": total / 4}
            for name, value in {**last, "loss": loss}.items():
                exact = torch.as_tensor(value, device=loss.device)
                testing.assert_near(penalty.last[name], exact, 1e-5, 0.0, name)
    for leading, sequences in ((), 1), ((3,), 1), ((2, 3), 2), ((2, 2, 3), 4), ((2, 0), 0):
        penalty = fastkl.KLPenalty(0.5)
        penalty(torch.zeros(*leading, V), torch.zeros(*leading, V))
        assert float(penalty.last["sequences"]) == sequences


def kl(**keywords):
    return lambda p: fastkl.kl_divergence(p, p, **keywords)


NO_NORMALIZER = "normalizer: expected None with reduction='{}', got int; "
WRONG = {
    "weights without a sum": (
        kl(weights=torch.ones(2, V)),
        "weights: expected None with reduction",
    ),
    "weights of another shape": (
        kl(weights=torch.ones(V, 2), reduction="sum"),
        "weights: expected the leading shape",
    ),
    "a list": (kl(weights=[1.0], reduction="sum"), "weights: expected a float tensor"),
    "a penalty's reduction": (
        kl(reduction="sequence_mean"),
        "reduction: expected one of 'none', 'mean', 'token_mean', 'sum'",
    ),
    "torch's reduction": (kl(reduction="batchmean"), "reduction: expected one of"),
    "a normalizer of none": (kl(normalizer=3), NO_NORMALIZER.format("none")),
    "a normalizer of a sum": (kl(reduction="sum", normalizer=3), NO_NORMALIZER.format("sum")),
    "a normalizer of a penalty's sum": (
        lambda p: fastkl.KLPenalty(0.1, reduction="sum")(p, p, normalizer=3),
        NO_NORMALIZER.format("sum"),
    ),
    "a normalizer of a linear penalty's sum": (
        lambda p: fastkl.LinearKLPenalty(0.1, reduction="sum")(p, p[0, :, :], p, normalizer=3),
        NO_NORMALIZER.format("sum"),
    ),
}
WRONG_NORMALIZERS = {
    ValueError: (
        *(0, 0.0, -3, math.nan, math.inf, 10**400, 1e-300),
        *(torch.ones(2), torch.ones(0), torch.ones((), device="meta")),
    ),
    TypeError: (
        *(True, "3", [3], torch.tensor(True), torch.tensor(1j)),
        *(torch.ones(1).to(torch.float8_e4m3fn), torch.ones(1).to_sparse()),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_reductions(name) -> None:
    call, words = WRONG[name]
    with pytest.raises((ValueError, TypeError)) as raised:
        call(torch.zeros(2, V, V))
    assert str(raised.value).startswith(words)
    assert raised.type is (TypeError if name == "a list" else ValueError)


@pytest.mark.parametrize("error", WRONG_NORMALIZERS)
def test_wrong_normalizers(error) -> None:
    for normalizer in WRONG_NORMALIZERS[error]:
        for loss in losses("cpu").values():
            with pytest.raises(error, match=r"(?s)^normalizer: expected .*, got .*; "):
                loss(torch.zeros(2, 3, V), None, normalizer)


# ---- under torch.compile


def test_a_compiled_step() -> None:
    p, q, mask, weights = batch("cpu")
    eye = torch.eye(V)

    def step(p: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        linear = fastkl.LinearKLPenalty(0.2, reduction="sequence_mean")(p, eye, q, mask=mask)
        mean = fastkl.kl_divergence(p, q, mask, weights=weights, reduction="mean", normalizer=n)
        return fastkl.KLPenalty(0.1)(p, q, mask, normalizer=n) + linear + mean

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for count in (3, 5, 0):
        leaves = testing.leaf(p.clone()), testing.leaf(p.clone())
        losses = [
            call(leaf, torch.tensor(count))
            for call, leaf in zip((compiled, step), leaves, strict=True)
        ]
        grads = [
            torch.autograd.grad(loss, leaf)[0] for loss, leaf in zip(losses, leaves, strict=True)
        ]
        # Three gradients add up in another order.
        assert torch.equal(*losses) and torch.allclose(*grads, rtol=1e-5, atol=1e-7)
    assert counter.frame_count == 1
