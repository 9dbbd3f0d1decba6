"""LinearKLPenalty: KLPenalty on the logits that the heads would give, in value, gradients and what
it keeps.
"""

import math
from types import SimpleNamespace

import linear_cases
import pytest
import torch
from linear_inputs import few, leaves
from test_linear import with_heads

import fastkl
from fastkl import testing

NONE = torch.zeros(2, 4, dtype=torch.bool)
MASK = torch.tensor([[True, False, True, True], [False, True, True, False]])
MASKS = {"all": None, "masked": MASK, "none": NONE, "no tokens": NONE[:, :0]}


@pytest.mark.parametrize("models", ["plain", "everything", "inherited", "one weight"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("reduction", ["token_mean", "mean", "sequence_mean", "sum"])
@pytest.mark.parametrize("direction", ["policy||reference", "reference||policy"])
def test_equals_klpenalty_on_logits(implementation, direction, reduction, mask, models) -> None:
    """Value, the gradients of all tensors and `last` are float64's, with chunks smaller than the
    batch, whatever masked hidden states hold; exactly 0 where no token counts. A controller's beta
    is read at the call.
    """
    few(implementation, models == "everything")
    case = with_heads(models, "sum").without("weights").but(mask=MASKS[mask])
    case = case.but(temperature=1.3) if models == "plain" else case
    for name in ("hidden", "ref_hidden"):
        if mask == "no tokens":
            case.tensors[name] = case.tensors[name][:, :0]
        elif mask != "all":
            case.tensors[name][~MASKS[mask]] = math.nan
    made, controller = {"direction": direction, "reduction": reduction}, SimpleNamespace(beta=0.2)
    options = linear_cases.options(case)
    penalty = fastkl.LinearKLPenalty(controller, **made, **options)
    assert all((f" {k}=" in repr(penalty)) == (v is not None) for k, v in options.items())
    controller.beta = 0.7
    inputs = leaves(case, device=implementation.device)
    loss = penalty(**linear_cases.arguments(case, inputs))
    assert loss.shape == () and loss.dtype == torch.float32
    exact, by_logits = leaves(case, torch.float64), fastkl.KLPenalty(0.7, **made)
    with fastkl.use_backend("reference"):
        expected = by_logits(*linear_cases.logits_of(case, exact), MASKS[mask])
        outcome = linear_cases.differentiate(case, exact, {"kl": expected})
    result = linear_cases.differentiate(case, inputs, {"kl": loss})
    linear_cases.assert_within(result, outcome, 1e-5)
    assert penalty.last.keys() == by_logits.last.keys()
    for name, value in penalty.last.items():
        assert not value.requires_grad and value.device == loss.device
        testing.assert_near(value, by_logits.last[name].cpu(), 1e-5, 0.0, f"last {name}")
