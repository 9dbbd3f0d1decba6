"""torch.func's transforms over the functions, and those that are not there."""

from collections.abc import Callable

import family
import pytest
import torch
from test_dispatch import FUNCTIONS, LEAF, assert_same, data, linear_kl, named
from test_topk import textbook
from torch.autograd import forward_ad
from torch.func import jacfwd, jacrev, jvp
from torch.fx.experimental.proxy_tensor import make_fx

import fastkl
from fastkl import testing

TRANSFORMS = {
    # name: (the transform of a function of one tensor, whether of a stack of two of them)
    "grad": (lambda f: torch.func.grad(lambda x: f(x).sum()), False),
    "vmap of grad": (lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x).sum())), True),
    "grad of vmap": (lambda f: torch.func.grad(lambda x: torch.func.vmap(f)(x).sum()), True),
    "jacrev": (jacrev, False),
}


def exact(name: str, d: dict[str, torch.Tensor]) -> torch.Tensor:
    if name == "kl":
        return testing.truth(d["p"], d["q"]).kl
    if name == "renyi":
        logs = (d[side].double().log_softmax(-1) for side in "pq")
        return torch.where(d["mask"], family.textbook(*logs, "renyi", 0.3), 0.0)
    if name == "select":
        return d["p"].double().log_softmax(-1).gather(-1, d["index"])
    wide = {key: value.double() for key, value in d.items()}
    if name in ("topk", "linear_topk"):
        logits = wide["p"] if name == "topk" else wide["hidden"] @ wide["weight"].T
        return textbook(logits, d["logprobs"], d["index"], "teacher||student", "bucket")[0]
    return testing.truth(*(wide[key] @ wide["weight"].T for key in ("hidden", "ref_hidden"))).kl


without_mean = pytest.mark.parametrize(
    "name", ["kl", "renyi", "select", "linear_none", "topk", "linear_topk"]
)


@without_mean
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(implementation, transform, name) -> None:
    d = data(implementation.device, learning=False)
    leaf = "weight" if name.startswith("linear") else "p"
    change, stacked = TRANSFORMS[transform]
    given = torch.stack([d[leaf], 2 * d[leaf]]) if stacked else d[leaf]
    results, expected = (
        change(lambda value, compute=compute: compute({**d, leaf: value}))(given)
        for compute in (lambda d: FUNCTIONS[name](d)[0], lambda d: exact(name, d))
    )
    torch.testing.assert_close(results, expected.float(), rtol=1e-4, atol=1e-6)


class Module(torch.nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.forward = function


RUNS = {
    "compile": lambda f, x: torch.compile(f, backend="eager", fullgraph=True),
    "export": lambda f, x: torch.export.export(Module(f), (x,)).module(),
}


@pytest.mark.parametrize("run", RUNS)
@without_mean
def test_vmap_compiled_and_exported(implementation, name, run) -> None:
    d, leaf = data(implementation.device, learning=False), LEAF[name]
    stacked = torch.stack([d[leaf], 2 * d[leaf]])

    def function(value):
        return torch.vmap(lambda one: FUNCTIONS[name]({**d, leaf: one})[0])(value)

    expected = torch.stack([FUNCTIONS[name]({**d, leaf: one})[0] for one in stacked])
    result = RUNS[run](function, stacked)(stacked)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-7)


def of_leaf(name: str, change: Callable) -> Callable:
    """Return a function of the data: `change` of (the first result as a function of its leaf, the
    leaf).
    """
    leaf = LEAF[name]
    return lambda d: change(lambda value: FUNCTIONS[name]({**d, leaf: value})[0].sum(), d[leaf])


NO_SECOND = "second derivatives are not implemented"
TEMPERATURE = "^temperature: expected a tensor without gradient"
REFUSED = {
    "twice": (of_leaf("kl", torch.autograd.functional.hessian), NO_SECOND),
    **{
        f"{name} twice": (of_leaf(name, lambda f, x: jacrev(jacrev(f))(x)), NO_SECOND)
        for name in ("kl", "select")
    },
    **{
        f"{name} forward": (
            of_leaf(name, lambda f, x: jacfwd(f)(x)),
            r"^\w+: expected .*, got .* forward-mode .*; ",
        )
        for name in ("linear_none", "linear_mean", "linear_stats")
    },
    **{
        f"{name} along a tangent": (
            of_leaf(name, lambda f, x: jvp(f, (x,), (x,))),
            "forward-mode",
        )
        for name in FUNCTIONS
    },
    "a sum in a batch": (
        lambda d: torch.vmap(lambda x: linear_kl({**d, "hidden": x}, reduction="sum"))(
            d["hidden"].requires_grad_()[None]
        ),
        "^hidden.*: expected to be known.*reduction='none'",
    ),
    **{
        f"temperatures of {name} in a batch": (
            lambda d, function=function: torch.vmap(lambda t: function(d, temperature=t))(
                d["temperatures"].requires_grad_()[None]
            ),
            TEMPERATURE,
        )
        for name, function in (
            ("linear_kl", linear_kl),
            ("kl", lambda d, **more: fastkl.kl_divergence(d["p"], d["q"], **more)),
        )
    },
    "a sum": (
        of_leaf("linear_mean", lambda f, x: torch.func.grad(f)(x)),
        "use fastkl.linear_kl_divergence .* reduction='none'",
    ),
    "a sum in a graph": (
        of_leaf(
            "linear_mean",
            lambda f, x: torch.autograd.grad(f(x.requires_grad_()), x, create_graph=True),
        ),
        "create_graph=True .* use fastkl.linear_kl_divergence .* reduction='none'",
    ),
}


@pytest.mark.parametrize("call, words", REFUSED.values(), ids=REFUSED)
def test_transforms_that_are_not_there_say_so(implementation, call, words) -> None:
    with pytest.raises(RuntimeError, match=words):
        call(data(implementation.device, learning=False))


@pytest.mark.parametrize("name", ["kl", "linear_none", "linear_mean"])
def test_tangents_are_refused_wherever_they_are(implementation, name) -> None:
    """Kernels would drop that of a temperature or of an upstream gradient: an error, not a zero."""
    d = data(implementation.device)
    one = torch.ones(3, device=implementation.device)
    with forward_ad.dual_level():
        factor, temperature = forward_ad.make_dual(one[0], one[0]), forward_ad.make_dual(one, one)
        with pytest.raises(RuntimeError, match="upstream gradient: expected .* forward-mode"):
            torch.autograd.grad((factor * FUNCTIONS[name](d)[0]).sum(), d[LEAF[name]])
        with pytest.raises(RuntimeError, match="temperature: expected .* forward-mode"):
            if name == "kl":
                fastkl.kl_divergence(d["p"], d["q"], temperature=temperature)
            else:
                linear_kl(d, temperature=temperature, reduction=name.removeprefix("linear_"))


@named
def test_functionalize_and_tracing_before_dispatch_see_the_op(name) -> None:
    d, leaf = data("cpu", learning=False), LEAF[name]

    def function(value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return FUNCTIONS[name]({**d, leaf: value})

    with fastkl.use_backend("reference"):
        expected, mapped = function(d[leaf]), torch.func.vmap(torch.func.functionalize(function))
        for result in (torch.func.functionalize(function)(d[leaf]), mapped(d[leaf][None])):
            for got, value in zip(result, expected, strict=True):
                torch.testing.assert_close(got.view(value.shape), value, rtol=1e-6, atol=1e-7)
        assert "torch.ops.fastkl." in make_fx(function, pre_dispatch=True)(d[leaf]).code


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0), (1, 0), (-2, 1)], ids=str)
def test_vmap(implementation, in_dims) -> None:
    pair = testing.pair("normal3", 6, 19, 0.5, device=implementation.device)
    p, q = (side.view(3, 2, 19) for side in pair)
    q = q.transpose(0, 1).contiguous() if in_dims == (1, 0) else q
    both = [
        testing.leaf(value if dim is not None else value[0])
        for value, dim in zip((p, q), in_dims, strict=True)
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
    d = data(implementation.device, learning=False)
    names = ("p", "tokens", "q", "temperatures", "mask")

    def one(*values):
        return FUNCTIONS["stats"](dict(zip(names, values, strict=True)))

    given = [torch.stack([d[name], d[name]]) for name in names]
    result = torch.func.vmap(torch.func.vmap(one))(*given)
    assert_same([*result], [torch.stack([value, value]) for value in one(*(d[n] for n in names))])


def test_batched_upstream_gradients(implementation) -> None:
    d = data(implementation.device)
    both, upstream = (d["p"], d["q"].requires_grad_()), torch.eye(3, device=implementation.device)
    result = fastkl.kl_divergence(*both)
    keywords = {"retain_graph": True}
    batched = torch.autograd.grad(result, both, upstream, is_grads_batched=True, **keywords)
    looped = [torch.autograd.grad(result, both, one, **keywords) for one in upstream]
    assert_same([*batched], [torch.stack(grads) for grads in zip(*looped, strict=True)])
