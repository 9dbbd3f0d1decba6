"""LinearKLPenalty: KLPenalty on the logits that the heads would give, in value, gradients and what
it keeps.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import fastkl
from fastkl import testing

V, H, H_REF = 23, 6, 4
REDUCTIONS = ("token_mean", "mean", "sequence_mean", "sum")
DIRECTIONS = ("policy||reference", "reference||policy")
NAMES = ("hidden", "weight", "ref_hidden", "ref_weight", "bias", "ref_bias")


def heads(device: str, leading: tuple[int, ...] = (2, 4)) -> dict[str, torch.Tensor]:
    """All six tensors, each requiring gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((*leading, H), (V, H), (*leading, H_REF), (V, H_REF), (V,), (V,))
    return {
        name: torch.randn(shape, generator=generator).to(device).requires_grad_()
        for name, shape in zip(NAMES, shapes, strict=True)
    }


def through_logits(
    penalty: fastkl.KLPenalty,
    made: dict[str, torch.Tensor],
    mask: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    """The same loss from logits."""
    logits = (
        F.linear(made["hidden"], made["weight"], made["bias"]),
        F.linear(made["ref_hidden"], made["ref_weight"], made["ref_bias"]),
    )
    if softcap is not None:
        logits = tuple(softcap * torch.tanh(side / softcap) for side in logits)
    return penalty(*logits, mask)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equals_klpenalty_on_logits(implementation, direction, reduction, masked, softcap) -> None:
    """Value, the gradients of all six tensors and `last`, with chunks smaller than the batch."""
    if implementation.interpreted and softcap is None:
        pytest.skip("half of the cases in the interpreter")
    made = heads(implementation.device)
    mask = (torch.arange(8) % 3 != 1).reshape(2, 4).to(implementation.device) if masked else None
    options = dict(direction=direction, reduction=reduction, temperature=1.3)
    expected_penalty, penalty = (
        fastkl.KLPenalty(0.7, **options),
        fastkl.LinearKLPenalty(0.7, **options, softcap=softcap, chunk_size=3),
    )
    expected = through_logits(expected_penalty, made, mask, softcap)
    loss = penalty(
        made["hidden"],
        made["weight"],
        made["ref_hidden"],
        made["ref_weight"],
        mask,
        bias=made["bias"],
        ref_bias=made["ref_bias"],
    )
    assert loss.shape == () and loss.dtype == torch.float32
    testing.assert_near(loss, expected, 1e-5, 0.0, "loss")
    for name, got, exact in zip(
        NAMES,
        torch.autograd.grad(loss, made.values()),
        torch.autograd.grad(expected, made.values()),
        strict=True,
    ):
        assert float((got - exact).norm() / exact.norm()) < 1e-5, name
    assert penalty.last.keys() == expected_penalty.last.keys()
    for name, value in penalty.last.items():
        assert not value.requires_grad and value.device == loss.device
        testing.assert_near(value, expected_penalty.last[name], 1e-5, 0.0, f"last {name}")


def test_a_shared_head(implementation) -> None:
    """Left out, given twice, or detached: the reference's logits come from weight; detached, it
    teaches the weight nothing.
    """
    made = heads(implementation.device)
    hidden, weight, ref_hidden = (
        made["hidden"],
        made["weight"],
        torch.randn(2, 4, H, device=implementation.device),
    )
    for direction in DIRECTIONS:
        penalty = fastkl.LinearKLPenalty(1.0, direction=direction)
        losses = [
            penalty(hidden, weight, ref_hidden),
            *(penalty(hidden, weight, ref_hidden, side) for side in (weight, weight.detach())),
        ]
        through = [
            fastkl.KLPenalty(1.0, direction=direction)(
                F.linear(hidden, weight), F.linear(ref_hidden, side)
            )
            for side in (weight, weight, weight.detach())
        ]
        for loss, expected in zip(losses, through, strict=True):
            testing.assert_near(loss, expected, 1e-5, 0.0, "loss")
            got, exact = (torch.autograd.grad(value, weight)[0] for value in (loss, expected))
            assert float((got - exact).norm() / exact.norm()) < 1e-5


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_token_that_counts(implementation, reduction) -> None:
    """0 with gradients of exactly 0, over hidden states of NaN."""
    made = heads(implementation.device)
    hidden = torch.full((2, 4, H), math.nan, device=implementation.device, requires_grad=True)
    mask = torch.zeros(2, 4, dtype=torch.bool, device=implementation.device)
    penalty = fastkl.LinearKLPenalty(0.3, reduction=reduction)
    loss = penalty(hidden, made["weight"], made["ref_hidden"], made["ref_weight"], mask)
    loss.backward()
    assert (
        loss.item() == 0.0
        and bool((hidden.grad == 0).all())
        and bool((made["weight"].grad == 0).all())
    )
    assert {name for name, value in penalty.last.items() if float(value)} == {"beta"}
    empty = torch.zeros(2, 0, H, device=implementation.device, requires_grad=True)
    loss = penalty(empty, made["weight"], empty.detach())
    loss.backward()
    assert loss.item() == 0.0 and empty.grad.shape == empty.shape


def test_beta_is_read_at_each_call(implementation) -> None:
    """A controller's beta scales the loss and its gradient."""
    made, controller = heads(implementation.device), SimpleNamespace(beta=0.2)
    penalty = fastkl.LinearKLPenalty(controller)
    arguments = [made[name] for name in ("hidden", "weight", "ref_hidden", "ref_weight")]
    (first,) = torch.autograd.grad(penalty(*arguments), made["hidden"])
    controller.beta = 0.6
    (second,) = torch.autograd.grad(penalty(*arguments), made["hidden"])
    torch.testing.assert_close(second, 3 * first, rtol=1e-5, atol=0)
    assert float(penalty.last["beta"]) == pytest.approx(0.6)


@pytest.mark.parametrize(
    "keywords, error, words",
    [
        (dict(beta=-1.0), ValueError, "beta: expected"),
        (dict(softcap=0.0), ValueError, "softcap: expected"),
        (dict(softcap=1e-46), ValueError, "softcap: expected"),
        (dict(softcap="30"), TypeError, "softcap: expected"),
        (dict(chunk_size=0), ValueError, "chunk_size: expected"),
        (dict(chunk_size=2.5), TypeError, "chunk_size: expected"),
        (dict(recompute=0), TypeError, "recompute: expected"),
        (dict(direction="forward"), ValueError, "direction: expected"),
        (dict(logits_dtype="float32"), TypeError, "logits_dtype: expected"),
        (dict(logits_dtype=torch.int8), ValueError, "logits_dtype: expected"),
        (dict(reduction="none"), ValueError, "reduction: expected"),
        (dict(temperature=torch.ones(3)), TypeError, "linear_kl_divergence"),
    ],
)
def test_wrong_settings(keywords, error, words) -> None:
    """They fail when the penalty is made."""
    with pytest.raises(error, match=words):
        fastkl.LinearKLPenalty(**{"beta": 0.1, **keywords})


def test_repr() -> None:
    """The settings that differ from none are shown."""
    text = repr(fastkl.LinearKLPenalty(0.1, softcap=30.0, logits_dtype=torch.float32))
    assert (
        "beta=0.1" in text
        and "softcap=30.0" in text
        and "logits_dtype=torch.float32" in text
        and "chunk_size" not in text
    )
