"""torch.func's transforms over the functions, and those that are not there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_dispatch import FUNCTIONS, LEAF, data, named
from test_torch import assert_same_bits, inputs, kl, stats
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import fastkl
from fastkl import testing

TRANSFORMS = {
    # name: (the transform of a function of one tensor, whether of a stack of two of them)
    "grad": (lambda f: torch.func.grad(lambda x: f(x).sum()), False),
    "vmap of grad": (lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x).sum())), True),
    "grad of vmap": (lambda f: torch.func.grad(lambda x: torch.func.vmap(f)(x).sum()), True),
    "jacrev": (torch.func.jacrev, False),
}


@pytest.mark.parametrize("name", ["kl", "linear_none"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(implementation, transform, name) -> None:
    d = {key: value.detach() for key, value in data(implementation.device).items()}
    argument = "p" if name == "kl" else "weight"
    change, stacked = TRANSFORMS[transform]

    def function(value: torch.Tensor) -> torch.Tensor:
        return FUNCTIONS[name]({**d, argument: value})[0]

    leaves = [(factor * d[argument]).requires_grad_() for factor in (1, 2)[: 1 + stacked]]
    values = [
        v
        for leaf in leaves
        for v in (function(leaf) if transform == "jacrev" else [function(leaf).sum()])
    ]
    owners = leaves * (len(values) // len(leaves))
    grads = [
        torch.autograd.grad(value, leaf, retain_graph=True)[0]
        for value, leaf in zip(values, owners, strict=True)
    ]
    expected = grads[0] if transform == "grad" else torch.stack(grads)
    given = torch.stack(leaves) if stacked else leaves[0]
    torch.testing.assert_close(change(function)(given.detach()), expected, rtol=1e-6, atol=1e-7)
    assert bool((expected != 0).any())


@pytest.mark.parametrize("name", ["kl", "linear_none"])
def test_vmap_compiled_and_exported(implementation, name) -> None:
    d = {key: value.detach() for key, value in data(implementation.device).items()}
    leaf = LEAF[name]
    stacked = torch.stack([d[leaf], 2 * d[leaf]])

    def function(value):
        return torch.vmap(lambda one: FUNCTIONS[name]({**d, leaf: one})[0])(value)

    class Module(torch.nn.Module):
        def forward(self, value):
            return function(value)

    expected = torch.stack([FUNCTIONS[name]({**d, leaf: one})[0] for one in stacked])
    torch._dynamo.reset()
    for run in (
        torch.compile(function, backend="eager", fullgraph=True),
        torch.export.export(Module(), (stacked,)).module(),
    ):
        torch.testing.assert_close(run(stacked), expected, rtol=1e-6, atol=1e-7)


def test_transforms_that_are_not_there_say_so(implementation) -> None:
    d = {key: value.detach() for key, value in data(implementation.device).items()}

    def total(p):
        return fastkl.kl_divergence(p, d["q"]).sum()

    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        torch.func.grad(lambda p: torch.func.grad(total)(p).square().sum())(d["p"])
    with pytest.raises(RuntimeError, match="forward-mode differentiation"):
        torch.func.jvp(total, (d["p"],), (d["p"],))
    with pytest.raises(RuntimeError, match="use reduction='none'"):
        torch.func.grad(lambda weight: FUNCTIONS["linear_mean"]({**d, "weight": weight})[0])(
            d["weight"]
        )
    learning = data(implementation.device)
    with pytest.raises(RuntimeError, match="create_graph=True .* use reduction='none'"):
        torch.autograd.grad(
            FUNCTIONS["linear_mean"](learning)[0], learning["weight"], create_graph=True
        )


@pytest.mark.parametrize("name", ["kl", "linear_none", "linear_mean"])
def test_tangents_are_refused_wherever_they_are(implementation, name) -> None:
    """Kernels would drop that of a temperature or of an upstream gradient: an error, not a zero."""
    d = data(implementation.device)
    with forward_ad.dual_level():
        factor = forward_ad.make_dual(
            torch.tensor(2.0, device=implementation.device),
            torch.tensor(1.0, device=implementation.device),
        )
        with pytest.raises(RuntimeError, match="upstream gradient: expected .* forward-mode"):
            torch.autograd.grad((factor * FUNCTIONS[name](d)[0]).sum(), d[LEAF[name]])
        temperature = forward_ad.make_dual(
            torch.ones(3, device=implementation.device), torch.ones(3, device=implementation.device)
        )
        with pytest.raises(RuntimeError, match="temperature: expected .* forward-mode"):
            if name == "kl":
                fastkl.kl_divergence(d["p"], d["q"], temperature=temperature)
            else:
                heads = d["hidden"], d["weight"], d["ref_hidden"]
                fastkl.linear_kl_divergence(
                    *heads, temperature=temperature, reduction=name.removeprefix("linear_")
                )


@named
def test_functionalize_and_tracing_before_dispatch_see_the_op(name) -> None:
    d = {key: value.detach() for key, value in data("cpu").items()}
    function = FUNCTIONS[name]
    leaf = LEAF[name]
    with fastkl.use_backend("reference"):
        expected = [value for value in function(d) if value is not None]
        for result in (
            torch.func.functionalize(lambda value: function({**d, leaf: value}))(d[leaf]),
            torch.func.vmap(torch.func.functionalize(lambda value: function({**d, leaf: value})))(
                d[leaf][None]
            ),
        ):
            for got, value in zip(result, expected, strict=True):
                torch.testing.assert_close(got.view(value.shape), value, rtol=1e-6, atol=1e-7)
        traced = make_fx(lambda value: function({**d, leaf: value}), pre_dispatch=True)(d[leaf])
    assert "torch.ops.fastkl." in traced.code


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0), (1, 0), (-2, 1)], ids=str)
def test_vmap(implementation, in_dims) -> None:
    data = inputs(implementation.device, (3, 2))
    turned = data.q.transpose(0, 1).contiguous() if in_dims == (1, 0) else data.q
    both = [
        (value if dim is not None else value[0]).detach().requires_grad_()
        for value, dim in zip((data.p, turned), in_dims, strict=True)
    ]
    result = torch.func.vmap(fastkl.kl_divergence, in_dims=in_dims)(*both)
    each = [
        value.expand(len(result), *value.shape) if dim is None else value.movedim(dim, 0)
        for value, dim in zip(both, in_dims, strict=True)
    ]
    expected = torch.stack([fastkl.kl_divergence(*pair) for pair in zip(*each, strict=True)])
    assert torch.equal(result, expected)
    upstream = testing.upstream_for(expected)
    grads = [torch.autograd.grad(value, both, upstream) for value in (result, expected)]
    # One that is not mapped is added up in another order.
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)


def test_vmap_nested_with_every_argument(implementation) -> None:
    data = inputs(implementation.device, grad=False)

    def one(p, tokens, q, mask, temperature):
        return tuple(fastkl.token_stats(p, tokens, q, mask=mask, temperature=temperature))

    result = torch.func.vmap(torch.func.vmap(one))(
        data.p, data.tokens, data.q, data.mask, data.temperatures
    )
    assert_same_bits(list(result), list(stats(data.p, data.q, data)))


def test_batched_upstream_gradients(implementation) -> None:
    data = inputs(implementation.device, (3,))
    result = kl(data.p, data.q, SimpleNamespace(mask=None))[0]
    upstream = torch.eye(3, device=implementation.device)
    batched = torch.autograd.grad(
        result, (data.p, data.q), upstream, is_grads_batched=True, retain_graph=True
    )
    looped = [
        torch.autograd.grad(result, (data.p, data.q), one, retain_graph=True) for one in upstream
    ]
    assert_same_bits(list(batched), [torch.stack(grads) for grads in zip(*looped, strict=True)])
