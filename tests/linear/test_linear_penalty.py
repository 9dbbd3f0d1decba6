"""LinearKLPenalty: KLPenalty on the logits that the heads would give, in value, gradients and what
it keeps.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import linear_cases
import linear_inputs
import pytest
import torch
from linear_inputs import few
from test_linear import with_heads

import fastkl
from fastkl import testing

REDUCTIONS = ("token_mean", "mean", "sequence_mean", "sum")
MASK = torch.tensor([[True, False, True, True], [False, True, True, False]])


@pytest.mark.parametrize("models", ["plain", "everything", "inherited", "one weight"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("direction", ["policy||reference", "reference||policy"])
def test_equals_klpenalty_on_logits(implementation, direction, reduction, mask, models) -> None:
    """Value, the gradients of all tensors and `last` are float64's, with chunks smaller than the
    batch.
    """
    few(implementation, models == "everything")
    case = with_heads(models, "sum").without("weights").but(mask=mask)
    case = case.but(temperature=1.3) if models == "plain" else case
    made = {"direction": direction, "reduction": reduction}
    penalty = fastkl.LinearKLPenalty(0.7, **made, **linear_cases.options(case))
    inputs = linear_inputs.leaves(case, device=implementation.device)
    loss = penalty(**linear_cases.arguments(case, inputs))
    assert loss.shape == () and loss.dtype == torch.float32
    exact, by_logits = linear_inputs.leaves(case, torch.float64), fastkl.KLPenalty(0.7, **made)
    with fastkl.use_backend("reference"):
        expected = by_logits(*linear_cases.logits_of(case, exact), mask)
        outcome = linear_cases.differentiate(case, exact, {"kl": expected})
    result = linear_cases.differentiate(case, inputs, {"kl": loss})
    linear_cases.assert_within(result, outcome, 1e-5)
    assert penalty.last.keys() == by_logits.last.keys()
    for name, value in penalty.last.items():
        assert not value.requires_grad and value.device == loss.device
        testing.assert_near(value, by_logits.last[name].cpu(), 1e-5, 0.0, f"last {name}")


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_token_that_counts(implementation, reduction) -> None:
    """0 with gradients of exactly 0, over hidden states of NaN; likewise without tokens."""
    penalty = fastkl.LinearKLPenalty(0.3, reduction=reduction)
    for leading, mask in (((2, 4), torch.zeros(2, 4, dtype=torch.bool)), ((2, 0), None)):
        case = linear_inputs.small_case("none", leading=leading, mask=mask)
        case.tensors["hidden"].fill_(math.nan)
        inputs = linear_inputs.leaves(case, device=implementation.device)
        loss = penalty(**linear_cases.arguments(case, inputs))
        result = linear_cases.differentiate(case, inputs, {"kl": loss})
        assert len(result) == 7 and not any(bool(value.any()) for value in result.values())
        assert {name for name, value in penalty.last.items() if float(value)} == {"beta"}


def test_beta_is_read_at_each_call(implementation) -> None:
    """A controller's beta scales the loss and its gradient."""
    controller, case = SimpleNamespace(beta=0.2), linear_inputs.small_case("none")
    penalty, inputs = fastkl.LinearKLPenalty(controller), linear_inputs.leaves(case)
    inputs = linear_inputs.leaves(case, device=implementation.device)
    found = []
    for controller.beta in (0.2, 0.6):
        loss = penalty(**linear_cases.arguments(case, inputs))
        found.append(torch.autograd.grad(loss, inputs["hidden"])[0])
    torch.testing.assert_close(found[1], 3 * found[0], rtol=1e-5, atol=0)
    assert float(penalty.last["beta"]) == pytest.approx(0.6)


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("beta", -1.0, ValueError),
        ("softcap", 0.0, ValueError),
        ("softcap", 1e-46, ValueError),
        ("softcap", "30", TypeError),
        ("chunk_size", 0, ValueError),
        ("chunk_size", 2.5, TypeError),
        ("recompute", 0, TypeError),
        ("direction", "forward", ValueError),
        ("logits_dtype", "float32", TypeError),
        ("logits_dtype", torch.int8, ValueError),
        ("reduction", "none", ValueError),
        ("temperature", torch.ones(3), TypeError),
        ("ref_temperature", 0.0, ValueError),
        ("ref_temperature", "1", TypeError),
        ("ref_temperature", torch.ones(3), TypeError),
    ],
)
def test_wrong_settings(name, value, error) -> None:
    """They fail when the penalty is made."""
    with pytest.raises(error, match=f"^{name}: expected"):
        fastkl.LinearKLPenalty(**{"beta": 0.1, name: value})


@pytest.mark.parametrize(
    "name, value",
    [
        ("softcap", 30.0),
        ("logits_dtype", torch.float32),
        ("ref_temperature", 0.7),
        ("recompute", False),
        ("chunk_size", 3),
    ],
)
def test_repr(name, value) -> None:
    """The settings that differ from none are shown."""
    assert f"{name}={value}" in repr(fastkl.LinearKLPenalty(0.1, **{name: value}))
    assert f"{name}=" not in repr(fastkl.LinearKLPenalty(0.1))
