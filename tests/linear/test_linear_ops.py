"""The custom ops under the functions on hidden states: opcheck, and what only they know."""

from __future__ import annotations

import linear_cases
import linear_inputs
import pytest
import torch
from linear_inputs import FIELDS, INPUTS, few

import fastkl

OPS, SIX = torch.ops.fastkl, INPUTS[:6]
V, H, H_REF = 11, 4, 3
# Bias, reference ("none", "own", "shared"), mask, temperatures and ratios, softcap, chunk_size,
# leading shape.
MIXES = [
    (False, "own", False, False, 0.0, None, (3,)),
    (True, "own", True, True, 2.0, 2, (2, 2)),
    (True, "shared", True, False, 0.0, 1, (3,)),
    (False, "shared", False, True, 5.0, None, (2, 1)),
    (False, "own", True, False, 0.0, None, (0, 2)),
    (False, "own", False, False, 0.0, None, ()),
]
POLICY_ALONE = [
    (False, "none", False, False, 0.0, None, (3,)),
    (True, "none", True, True, 3.0, 2, (2, 2)),
]


def arguments(implementation, mix: tuple, dtype=torch.float32, grad: bool = False) -> tuple:
    """Return the six tensors in the ops' order, (tokens, weights), (mask, temperatures, ratios,
    temperature), and the rest of the settings.

    What opcheck looks at does not depend on the kernels: every mix on the reference, and in the
    interpreter the one in which most takes part.
    """
    few(implementation, mix == MIXES[1])
    bias, reference, mask, temperatures, softcap, chunk_size, leading = mix
    width, device = H if reference == "shared" else H_REF, implementation.device
    made = linear_inputs.small(leading, V, H, width)
    absent = {"ref_weight"} if reference == "shared" else set()
    absent |= set() if bias else {"bias", "ref_bias"}
    absent |= {"ref_hidden", "ref_weight", "ref_bias"} if reference == "none" else set()
    six = [
        None if name in absent else made[name].to(device, dtype).requires_grad_(grad)
        for name in SIX
    ]
    divisors = (0.5 + made["weights"].sigmoid()).to(device) if temperatures else None
    ratios = None if divisors is None or reference == "none" else divisors.flip(0)
    per_row = (
        (made["weights"] > -0.3).to(device) if mask else None,
        divisors,
        ratios,
        1.0 if temperatures else 0.7,
    )
    scaling = (softcap, softcap / 2, 1.0 if temperatures or reference == "none" else 1.5)
    tokens = torch.ones(leading, dtype=torch.long, device=device)
    settings = (*scaling, implementation.backend, dtype, chunk_size)
    return six, (tokens, made["weights"].to(device)), per_row, settings


def wrt_of(six: list) -> str:
    """Name every tensor that is there."""
    return ",".join(name for name, value in zip(SIX, six, strict=True) if value is not None)


@pytest.mark.parametrize(
    "grad, keep", [(False, False), (True, False), (True, True)], ids=["no_grad", "grad", "kept"]
)
@pytest.mark.parametrize("mix", MIXES + POLICY_ALONE, ids=str)
def test_opcheck_statistics(implementation, mix, grad, keep) -> None:
    """Schema, fake tensors, autograd registration and AOT dispatch with dynamic shapes are right
    for every mix of arguments.
    """
    six, (tokens, _), per_row, settings = arguments(implementation, mix, grad=grad)
    fields = ",".join(FIELDS[:2] if mix[1] == "none" else FIELDS)
    given = (*six, *per_row, *settings, tokens, fields, keep)
    torch.library.opcheck(OPS.linear_statistics.default, given)


@pytest.mark.parametrize(
    "fields, keep",
    [
        (FIELDS, False),
        (FIELDS, True),
        (["kl"], False),
        (FIELDS[:2], False),
        (["ref_logprob"], True),
    ],
)
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_opcheck_gradients(implementation, mix, fields, keep) -> None:
    """The same for its backward, for upstream gradients of some fields."""
    six, (tokens, weights), per_row, settings = arguments(implementation, mix)
    given = (*six, *per_row, *settings, tokens, ",".join(FIELDS), keep)
    *_, saved, logits, ref_logits = OPS.linear_statistics(*given)
    kept = (logits, ref_logits) if keep else (None, None)
    upstream = [weights if name in fields else None for name in FIELDS]
    rest = (tokens, saved, *kept, *upstream, wrt_of(six))
    torch.library.opcheck(OPS.linear_gradients.default, (*six, *per_row, *settings, *rest))


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_opcheck_weighted_kl(implementation, mix, dtype, grad) -> None:
    """The same for value and gradients at once, and under autograd."""
    six, (_, weights), per_row, settings = arguments(implementation, mix, dtype, grad)
    given = (*six, *per_row, *settings, weights, wrt_of(six) if grad else "")
    torch.library.opcheck(OPS.linear_weighted_kl.default, given)


@pytest.mark.parametrize(
    "dtype, result",
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float32, torch.float32),
    ],
)
def test_scaled(implementation, dtype, result) -> None:
    """The product is rounded once: the factor keeps its digits beside a 16-bit gradient. opcheck
    holds.
    """
    gradient = torch.randn(7, 5).to(implementation.device, dtype)
    factor = torch.tensor(0.1234567, device=implementation.device)
    torch.library.opcheck(OPS.scaled.default, (gradient, factor, result))
    expected = (gradient.double() * factor.double()).float().to(result)
    assert torch.equal(OPS.scaled(gradient, factor, result), expected)


def test_float16_gradients_do_not_vanish(implementation) -> None:
    """A mean over many tokens has gradients per token below float16's smallest number: they come
    back with their digits after loss scaling.
    """
    few(implementation, False)
    tensors = linear_inputs.small((4096,), 300, 8, 8)
    tensors = {name: tensors[name] for name in ("hidden", "weight", "ref_hidden")}
    case = linear_inputs.Case(tensors, "mean", scale=65536.0, random=False).typed(torch.float16)
    # float16 rounds logits of size 10 by up to 2^-9 each, which moves probabilities, and with them
    # gradients, by as much.
    result = linear_cases.fastkl_outcome(case, implementation.device)
    linear_cases.assert_within(result, linear_cases.truth(case), 4e-3)


@pytest.mark.parametrize("call", ["sum", "mean"])
@pytest.mark.parametrize("temperature", [0.05, 0.1])
def test_float16_gradients_do_not_overflow(implementation, temperature, call) -> None:
    """A KL of many nats at a low temperature: gradients stay finite and have the size of the
    truth's, as plain torch's in float16, whose logits are rounded as these are.
    """
    tensors = linear_inputs.small((8 if implementation.interpreted else 64,), 500, 16, 16)
    tensors["weight"] *= 1.5
    case = linear_inputs.Case(tensors, call, temperature=temperature, random=False)
    case = case.without("ref_weight", "bias", "ref_bias", "weights").typed(torch.float16)
    exact, device = linear_cases.truth(case), implementation.device
    allowed = linear_cases.errors(linear_cases.plain(case, device), exact)
    found = linear_cases.errors(linear_cases.fastkl_outcome(case, device), exact)
    assert all(found[name] <= 1.5 * allowed[name] for name in found if name != "kl")


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(implementation) -> None:
    """Per token as a loop gives it; a sum refuses to leave out a gradient that vmap hides from it,
    and a gradient to the temperature.
    """
    tensors = linear_inputs.small((3, 2), V, H, H)
    hidden, weight, ref = (
        tensors[name].to(implementation.device).requires_grad_()
        for name in ("hidden", "weight", "ref_hidden")
    )

    def mapped(kl, *stacked: torch.Tensor) -> torch.Tensor:
        return torch.vmap(kl)(hidden, ref, *stacked)

    def kl(states, second, temperature=1.0, **more) -> torch.Tensor:
        return fastkl.linear_kl_divergence(states, weight, second, temperature=temperature, **more)

    found, expected = mapped(kl), kl(hidden, ref)
    torch.testing.assert_close(found, expected)
    learned = (hidden, weight, ref)
    gradients = (torch.autograd.grad(value.sum(), learned) for value in (found, expected))
    for got, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(got, exact)
    with pytest.raises(RuntimeError, match="^hidden.*: expected to be known.*reduction='none'"):
        mapped(lambda states, second: kl(states, second, reduction="sum"))
    temperature = torch.ones(3, 2, device=implementation.device, requires_grad=True)
    for function in (kl, lambda p, _, t: fastkl.kl_divergence(p, p, temperature=t)):
        with pytest.raises(RuntimeError, match="^temperature: expected a tensor without gradient"):
            mapped(function, temperature)


class Loss(torch.nn.Module):
    """A sum over tokens, for torch.export."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, h, w, r):
        return fastkl.linear_kl_divergence(h, w, r, reduction=self.reduction).sum()


def test_export_without_gradients_refuses_them(implementation) -> None:
    """An exported sum keeps what its example inputs required: asked for more it raises; exported
    per token, for any number of tokens, it gives all gradients.
    """
    tensors = linear_inputs.small((6,), V, H, H)
    given = [tensors[k].to(implementation.device) for k in ("hidden", "weight", "ref_hidden")]
    learned = [value.clone().requires_grad_() for value in given]
    shapes = ({0: torch.export.Dim("tokens", min=2)}, None, {0: torch.export.Dim("tokens", min=2)})
    exported = {
        reduction: torch.export.export(Loss(reduction), tuple(given), dynamic_shapes=shapes)
        for reduction in ("sum", "none")
    }
    (bounds,) = exported["none"].range_constraints.values()
    assert bounds.upper > 2**40, "the default of recompute puts no bound on the tokens"
    summed, per_token = (program.module() for program in exported.values())
    torch.testing.assert_close(summed(*given), per_token(*given))
    expected = torch.autograd.grad(Loss("sum")(*learned), learned)
    for got, exact in zip(torch.autograd.grad(per_token(*learned), learned), expected, strict=True):
        torch.testing.assert_close(got, exact)
    with pytest.raises(RuntimeError, match="hidden, weight, ref_hidden: expected to be known"):
        summed(*learned)


def test_meta_tensors() -> None:
    """A dry run without data gives shapes and types."""
    made = {"dtype": torch.bfloat16, "device": "meta"}
    hidden, weight = torch.empty(2, 3, H, requires_grad=True, **made), torch.empty(V, H, **made)
    loss = fastkl.linear_kl_divergence(hidden, weight, hidden.detach(), reduction="mean")
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert loss.shape == () and gradient.shape == hidden.shape
    assert gradient.dtype == torch.bfloat16
    assert fastkl.linear_kl_divergence(hidden, weight, hidden).shape == (2, 3)
