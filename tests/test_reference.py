"""The definition: reference.py against closed forms, high precision, the textbook form in fp64 and
autograd's numerical derivatives.
"""

import pytest
import torch
from torch.nn.functional import softplus

import fastkl
from fastkl import reference, testing

V = 23
FIELDS = ("logprob", "entropy", "ref_logprob", "kl", "ref_kl")


def case(size: float = 0.7, kind: str = "normal3") -> tuple[torch.Tensor, ...]:
    p, q = testing.pair(kind, 4, V, size, shift=3.0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(V, (4,), generator=generator)
    return p, q, tokens, 0.5 + 1.5 * torch.rand(4, generator=generator, dtype=torch.float64)


# ---- statistics


@pytest.mark.parametrize("per_row", [False, True], ids=["number", "per_row"])
@pytest.mark.parametrize("kind", testing.KINDS)
def test_textbook_form(kind, per_row) -> None:
    p, q, tokens, temperatures = case(kind=kind)
    temperature = temperatures if per_row else 0.8
    result = reference.row_statistics(p, q, tokens, temperature)
    for name, exact in testing.truth(p, q, temperature).stats(tokens).items():
        testing.assert_near(getattr(result, name), exact, 1e-12, 1e-12, name)
        assert getattr(result, name).dtype == torch.float64


# Bernoulli with logits a and b: KL = σ(a)·(a - b) + softplus(b) - softplus(a).
def test_two_classes() -> None:
    grid = torch.linspace(-9, 9, 13, dtype=torch.float64)
    a, b = torch.cartesian_prod(grid, grid).unbind(-1)
    kl = a.sigmoid() * (a - b) + softplus(b) - softplus(a)
    result = reference.row_statistics(*(torch.stack([side, 0 * side], -1) for side in (a, b)))
    testing.assert_near(result.kl, kl, 1e-11, 1e-13, "kl")
    testing.assert_near(result.entropy, softplus(a) - a * a.sigmoid(), 1e-11, 1e-13, "entropy")


# Also where Q has a constant more, here one that float32 adds exactly.
@pytest.mark.parametrize("shift", [0.0, 2.0, -512.0])
def test_identical_rows_give_exactly_zero(shift) -> None:
    p = (64 * testing.pair("normal3", 5, V, 0.0)[0]).round() / 64
    leaves = testing.leaf(p), testing.leaf(p + shift)
    result = fastkl.token_stats(leaves[0], torch.zeros(5, dtype=torch.long), leaves[1])
    assert not bool(result.kl.any()) and not bool(result.ref_kl.any())
    grads = torch.autograd.grad((result.kl + result.ref_kl).sum(), leaves)
    assert float(torch.stack(grads).abs().max()) <= (0.0 if shift == 0.0 else 1e-7)


# Autograd through the definition, which its second derivatives need, beside entries without
# probability in both models.
def test_autograd_of_holes() -> None:
    p, q = (side.double() for side in testing.pair("normal3", 3, V, 0.3))
    p[1:, ::3] = q[1:, ::3] = -torch.inf
    leaves, ones = (testing.leaf(p), testing.leaf(q)), torch.ones(3)
    result = reference.row_statistics(*leaves)
    grads = torch.autograd.grad((result.kl + result.ref_kl).sum(), leaves)
    upstream = {"upstream": {"kl": ones, "ref_kl": ones}, "wrt_p": True, "wrt_q": True}
    expected = reference.row_gradients(p, q, None, 1.0, result.saved.detach(), **upstream)
    for grad, value in zip(grads, expected, strict=True):
        testing.assert_near(grad, value, 1e-9, 1e-12, "gradient")


@pytest.mark.parametrize("shift", [0.0, 3.0, -1000.0])
@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2, 0.3, 1.0])
@pytest.mark.parametrize("kind", testing.KINDS)
def test_digits_near_zero(kind, size, shift) -> None:
    pair, ones = testing.pair(kind, 8, 4001, size, shift=shift), torch.ones(8)
    for p, q in (pair, pair[::-1]):
        exact, result = testing.truth(p, q), reference.row_statistics(p, q)
        testing.assert_kl(result.kl, exact.kl, "kl")
        testing.assert_kl(result.ref_kl, exact.ref_kl, "ref_kl")
        asked = {"upstream": {"kl": ones}, "wrt_p": True, "wrt_q": True}
        grads = reference.row_gradients(p, q, None, 1.0, result.saved, **asked)
        for grad, value in zip(grads, testing.kl_gradients(exact, ones), strict=True):
            testing.assert_gradient(grad, value)


# ---- the two functions that keep the digits


# Beyond the series the subtraction costs the digits of expm1(d)/(expm1(d) - d): a factor of 8 at
# d = 1/4, and 17 of log1p at t = 1/8.
UNITS = {"expm1_minus": 16, "minus_log1p": 32}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", UNITS)
def test_high_precision(name, dtype) -> None:
    mpmath = pytest.importorskip("mpmath")
    edges = torch.tensor([0.125, 0.25], dtype=torch.float64)
    logspace = torch.logspace(-15, 1.5, 200, dtype=torch.float64)
    positive = torch.cat([logspace, edges, edges - 1e-6, edges + 1e-6])
    negative = -positive[positive < 0.99] if name == "minus_log1p" else -positive
    arguments = torch.cat([positive, negative, torch.zeros(1)]).to(dtype)
    results = getattr(reference, name)(arguments)
    assert results.dtype == dtype and float(results[-1]) == 0.0
    with mpmath.workdps(60):
        for argument, result in zip(arguments.tolist()[:-1], results.tolist()[:-1], strict=True):
            z = mpmath.mpf(argument)
            exact = mpmath.expm1(z) - z if name == "expm1_minus" else z - mpmath.log1p(z)
            error = abs(mpmath.mpf(result) / exact - 1)
            assert error <= UNITS[name] * torch.finfo(dtype).eps, (argument, result)


# ---- gradients


@pytest.mark.parametrize("masked, per_row", [(False, False), (True, True)])
def test_gradcheck(per_row, masked) -> None:
    p, q, tokens, temperatures = case()
    mask = torch.tensor([True, True, not masked, True])
    more = {"temperature": temperatures if per_row else 0.8, "mask": mask if masked else None}

    def function(p, q):
        return fastkl.kl_divergence(p, q, **more), *fastkl.token_stats(p, tokens, q, **more)

    for result in function(p, q):
        assert result.dtype == torch.float64 and torch.equal(result != 0, mask)
    assert torch.autograd.gradcheck(function, (p.requires_grad_(), q.requires_grad_()))


# Any mix of upstream gradients in float64; asked for one side it computes that one.
#
# On kinds of rows where the truth keeps its own digits: on peaked ones it loses four.
@pytest.mark.parametrize(
    "fields",
    [*((name,) for name in FIELDS), ("logprob", "entropy"), ("kl", "ref_kl"), FIELDS],
    ids="+".join,
)
@pytest.mark.parametrize("kind", ["normal3", "zipf"])
def test_gradients_in_float64(kind, fields) -> None:
    p, q, tokens, temperatures = case(kind=kind)
    generator = torch.Generator().manual_seed(2)
    upstream = {name: torch.randn(4, generator=generator, dtype=torch.float64) for name in fields}
    exact = testing.gradients(testing.truth(p, q, temperatures), upstream, tokens, temperatures)
    saved = reference.row_statistics(p, q, tokens, temperatures).saved
    both, of_p, of_q = (
        reference.row_gradients(p, q, tokens, temperatures, saved, upstream, wrt_p=on, wrt_q=too)
        for on, too in ((True, True), (True, False), (False, True))
    )
    for result, value, side in zip(both, exact, "pq", strict=True):
        testing.assert_gradient(result, value, f"gradient of {side}", 1e-11)
    assert of_p[1] is of_q[0] is None
    assert torch.equal(of_p[0], both[0]) and torch.equal(of_q[1], both[1])
