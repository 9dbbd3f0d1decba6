"""The custom ops under the functions on hidden states: opcheck, and what only they know."""

import linear_cases
import pytest
import torch
from linear_inputs import CALLS, INPUTS, few, small, small_case
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fastkl
from fastkl.ops.linear_sum_op import ScaledInputs, scaled

V, H, ops = 11, 4, torch.ops.fastkl
MASK, DIVISORS = torch.tensor([True, False, True]), torch.tensor([0.5, 1.2, 0.9])
PER_TOKEN = {"temperature": DIVISORS, "ref_temperature": DIVISORS.flip(0)}
HALF = {"heads": ((2.0, 1.0), (None, 0.7))}
# name: (inputs left out, a Case's changes), for three tokens.
MIXES = {
    "plain": (("bias", "ref_bias"), {"chunk_size": None}),
    "everything": ((), {"mask": MASK, **PER_TOKEN, **HALF}),
    "shared": (("ref_weight",), {"mask": MASK, "temperature": 0.7, "chunk_size": 1}),
    "shared, per token": (("ref_weight", "bias", "ref_bias"), {"softcap": 5.0, **PER_TOKEN}),
    "one model": (
        ("ref_hidden", "ref_weight", "ref_bias"),
        {"temperature": DIVISORS, "mask": MASK, "softcap": 3.0},
    ),
    "frozen": ((), {"trainable": ()}),
    "one field": ((), {"fields": ("kl",), "trainable": ("hidden",)}),
    "policy fields": ((), {"fields": ("logprob", "entropy")}),
    "reference field": (("ref_weight",), {"fields": ("ref_logprob",)}),
    "no tokens": ((), {"leading": (0, 2)}),
    "one token": ((), {"leading": ()}),
    "bf16": ((), {"dtype": torch.bfloat16}),
    "fp16": ((), {"dtype": torch.float16, "trainable": INPUTS[:6]}),
}


OPS = {
    False: (ops.linear_statistics.default, ops.linear_gradients.default),
    True: (ops.linear_weighted_kl.default, ops.scaled.default),
}


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastkl":
            self.seen.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("call", CALLS)
def test_opcheck(implementation, call, mix) -> None:
    """Schema, fake tensors, autograd registration and AOT dispatch with dynamic shapes are right
    for the arguments that the functions and their backward give.

    They do not depend on the kernels: the interpreter has the mix in which most takes part.
    """
    few(implementation, mix == "everything")
    if mix == "one model" and call != "stats":
        pytest.skip("a KL needs a reference")
    left_out, changes = MIXES[mix]
    sizes = {"vocabulary": V, "width": H, "ref_width": H if "ref_weight" in left_out else 3}
    case = small_case(call, **{"leading": (3,), "sizes": sizes, **changes}).without(*left_out)
    with Calls() as calls:
        linear_cases.outcome(case, implementation.device)
    forward, backward = OPS[call in ("sum", "mean")]
    assert {func for func, _ in calls.seen} == {forward, *([backward] if case.trainable else [])}
    for func, args in calls.seen:
        if func is backward:  # second derivatives are refused
            args = tree_map_only(torch.Tensor, torch.Tensor.detach, args)
        torch.library.opcheck(func, args)


@pytest.mark.parametrize(
    "dtype, result",
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float32, torch.float32),
    ],
)
def test_scaled(implementation, dtype, result) -> None:
    """The product is rounded once: the factor keeps its digits beside a 16-bit gradient."""
    gradient = torch.randn(7, 5).to(implementation.device, dtype)
    factor = torch.tensor(0.1234567, device=implementation.device)
    expected = (gradient.double() * factor.double()).float().to(result)
    assert torch.equal(scaled(ScaledInputs(gradient, factor, result)), expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(implementation) -> None:
    """A sum refuses to leave out a gradient that vmap hides from it, and one to the temperature."""
    tensors = small((3, 2), V, H, H)
    hidden, weight, ref = (
        tensors[name].to(implementation.device).requires_grad_()
        for name in ("hidden", "weight", "ref_hidden")
    )
    temperature = torch.ones(3, 2, device=implementation.device, requires_grad=True)

    def kl(states, second, temperature=1.0, **more) -> torch.Tensor:
        return fastkl.linear_kl_divergence(states, weight, second, temperature=temperature, **more)

    with pytest.raises(RuntimeError, match="^hidden.*: expected to be known.*reduction='none'"):
        torch.vmap(lambda states, second: kl(states, second, reduction="sum"))(hidden, ref)
    for function in (kl, lambda p, _, t: fastkl.kl_divergence(p, p, temperature=t)):
        with pytest.raises(RuntimeError, match="^temperature: expected a tensor without gradient"):
            torch.vmap(function)(hidden, ref, temperature)


class Loss(torch.nn.Module):
    def forward(self, hidden, weight, ref_hidden, reduction):
        return fastkl.linear_kl_divergence(hidden, weight, ref_hidden, reduction=reduction).sum()


def test_export_without_gradients_refuses_them(implementation) -> None:
    """An exported sum keeps what its example inputs required: asked for more it raises; exported
    per token, for any number of tokens, it gives all gradients.
    """
    tensors = small((6,), V, H, H)
    given = [tensors[k].to(implementation.device) for k in ("hidden", "weight", "ref_hidden")]
    learned = [value.clone().requires_grad_() for value in given]
    rows = {0: torch.export.Dim("tokens", min=2)}
    summed, per_token = (
        torch.export.export(Loss(), (*inputs, name), dynamic_shapes=(rows, None, rows, None))
        for name, inputs in (("sum", given), ("none", learned))
    )
    (bounds,) = per_token.range_constraints.values()
    assert bounds.upper > 2**40, "the default of recompute puts no bound on the tokens"
    sums = summed.module()(*given, "sum"), per_token.module()(*given, "none")
    torch.testing.assert_close(*sums)
    losses = Loss()(*learned, "sum"), per_token.module()(*learned, "none")
    torch.testing.assert_close(*(torch.autograd.grad(loss, learned) for loss in losses))
    with pytest.raises(RuntimeError, match="hidden, weight, ref_hidden: expected to be known"):
        summed.module()(*learned, "sum")


def test_meta_tensors() -> None:
    case = small_case("none", torch.bfloat16, leading=(2, 3))
    for call, shape in (("none", (2, 3)), ("mean", ())):
        found = linear_cases.outcome(case.but(reduction=call, random=False), "meta")
        assert found["kl"].is_meta and found["kl"].shape == shape
        for name, value in case.tensors.items():
            gradient = found[f"gradient to {name}"]
            assert gradient.shape == value.shape and gradient.dtype == value.dtype
