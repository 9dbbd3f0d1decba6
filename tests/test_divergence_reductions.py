"""Σ weights · x / normalizer, of the divergences and of the penalties: values and gradients."""

import functools
import itertools
import math

import family
import pytest
import torch

import fastkl
from fastkl import testing

V, H = 17, 5
TENSORS = torch.tensor(2.5), torch.tensor([7]), torch.tensor(2.5, dtype=torch.float64)
NORMALIZERS = [None, 2.5, 7, *TENSORS]
MEMBERS = {"kl": family.Member(fastkl.kl_divergence, "kl"), **family.KINDS}


# (p, q, mask, weights): two sequences, of three tokens and of one; masked rows hold NaN.
def batch(device: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    p, q = (value.view(2, 3, V) for value in testing.pair("normal3", 6, V, 0.5, dtype=dtype))
    mask = torch.tensor([[True, True, True], [True, False, False]])
    weights = torch.tensor([[0.5, -1.0, 2.0], [0.25, math.nan, math.inf]])
    p = torch.where(mask[..., None], p, math.nan)
    return tuple(value.to(device) for value in (p, q, mask, weights))


@pytest.mark.parametrize(
    "reduction, normalizer",
    [("sum", None), *itertools.product(["mean", "token_mean"], NORMALIZERS)],
)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", MEMBERS)
def test_value_and_gradients(implementation, name, reduction, weighted, normalizer) -> None:
    p, q, mask, weights = batch(implementation.device)
    leaves = [testing.leaf(value) for value in (p, q, weights)]
    more = {"weights": leaves[2]} if weighted else {}
    if isinstance(normalizer, torch.Tensor):
        normalizer = normalizer.to(implementation.device)
    more |= {"reduction": reduction, "normalizer": normalizer}
    result = MEMBERS[name](*leaves[:2], mask, **more)
    exact = [testing.leaf(value[mask].double()) for value in (p, q, weights)]
    logs, member = family.log_probs(*exact[:2]), MEMBERS[name]
    values = family.textbook(*logs, member.kind, member.share) * (exact[2] if weighted else 1)
    expected = values.sum() / float(
        {"sum": 1}.get(reduction, 4 if normalizer is None else normalizer)
    )
    assert result.dtype == torch.float32 and result.shape == ()
    testing.assert_near(result, expected, 2e-5, 0.0, "value")
    sides = (result, leaves[: 2 + weighted]), (expected, exact[: 2 + weighted])
    for grad, value in zip(*(torch.autograd.grad(*side) for side in sides), strict=True):
        assert bool((grad[~mask] == 0).all())
        testing.assert_near(grad[mask], value, 1e-4, 1e-7, "gradient")


def test_a_normalizer_changes_no_type() -> None:
    p, q, mask, _ = batch("cpu")
    wide, three = (p.double(), q.double(), mask), torch.tensor(3)
    exact = fastkl.kl_divergence(*wide, reduction="mean", normalizer=three)
    assert exact.dtype == torch.float64
    assert float(exact) == float(fastkl.kl_divergence(*wide).sum() / 3)
    for penalty in (fastkl.KLPenalty(0.1), fastkl.KLPenalty(0.1, reduction="sequence_mean")):
        assert penalty(p, q, mask, normalizer=three.double()).dtype == torch.float32


WEIGHT = torch.randn(V, V, generator=torch.Generator().manual_seed(1))


# The function of hidden states p, q [..., V] with one lm_head for both.
def of_states(function):
    return lambda p, q, mask, normalizer: function(
        p, WEIGHT.to(p.device), q, mask=mask, normalizer=normalizer
    )


# Every function with a mean, as (p, q, mask, normalizer=) -> scalar.
LOSSES = {
    "kl_divergence": functools.partial(fastkl.kl_divergence, reduction="mean"),
    "linear_kl_divergence": of_states(
        functools.partial(fastkl.linear_kl_divergence, reduction="token_mean")
    ),
    "js_divergence": functools.partial(fastkl.js_divergence, beta=0.1, reduction="mean"),
    "token_mean": fastkl.KLPenalty(0.5),
    "reverse": fastkl.KLPenalty(0.5, direction="reference||policy", reduction="mean"),
    "sequence_mean": fastkl.KLPenalty(0.5, reduction="sequence_mean"),
    "linear": of_states(fastkl.LinearKLPenalty(0.5)),
    "linear sequence_mean": of_states(fastkl.LinearKLPenalty(0.5, reduction="sequence_mean")),
}


# Micro-batches of different lengths with the whole batch's count add up to its gradient; with their
# own means they do not.
@pytest.mark.parametrize("name", LOSSES)
def test_accumulation(implementation, name) -> None:
    loss, (p, q, mask, _) = LOSSES[name], batch(implementation.device)
    leaf = testing.leaf(p)
    (whole,) = torch.autograd.grad(loss(leaf, q, mask, normalizer=None), leaf)
    count = (mask.any(-1) if "sequence" in name else mask).sum()
    for normalizer in (count, int(count), None):
        total = sum(
            loss(*(value[rows] for value in (leaf, q, mask)), normalizer=normalizer)
            for rows in (slice(0, 1), slice(1, 2))
        )
        (grad,) = torch.autograd.grad(total if normalizer is not None else total / 2, leaf)
        error = float((grad - whole)[mask].norm() / whole[mask].norm())
        assert (error < 1e-5) == (normalizer is not None or "sequence" in name), error


@pytest.mark.parametrize("some", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_a_normalizer_of_zero(implementation, name, some) -> None:
    p, q, mask, _ = batch(implementation.device)
    leaf, zero = testing.leaf(p), torch.zeros((), dtype=torch.long, device=p.device)
    loss = LOSSES[name](leaf, q, mask & some, normalizer=zero)
    loss.backward()
    assert loss.item() == 0.0 and bool((leaf.grad == 0).all())


@pytest.mark.parametrize("learns", [True, False])
def test_a_normalizer_of_zero_over_an_infinite_sum(implementation, learns) -> None:
    p, q = (side[:1].clone() for side in batch(implementation.device)[:2])
    penalty = fastkl.KLPenalty(0.1)
    q[0, 0, 0] = -math.inf
    p.requires_grad_(learns)
    mean = fastkl.kl_divergence(p, q, reduction="mean", normalizer=p.new_zeros(()))
    for loss in (mean, penalty(p, q, normalizer=p.new_zeros(()))):
        assert loss == 0 and not (learns and torch.autograd.grad(loss, p)[0].any())
    with torch.no_grad():
        kept = penalty(p, p + torch.arange(V, device=p.device))
        kept += 10
    assert float(penalty.last["loss"]) == pytest.approx(float(kept) - 10, rel=1e-4)
