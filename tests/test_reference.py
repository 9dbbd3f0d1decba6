"""The definition: reference.py against closed forms, high precision, the textbook form in fp64 and
autograd's numerical derivatives.
"""

from __future__ import annotations

import math

import pytest
import torch

import fastkl
from fastkl import reference, testing
from fastkl.ops import row_blocks

V = 23
FIELDS = ("logprob", "entropy", "ref_logprob", "kl", "ref_kl")


@pytest.fixture(autouse=True)
def on_the_reference():
    """Everything here is about the reference on CPU, whatever else the machine has."""
    with fastkl.use_backend("reference"):
        yield


def case(
    rows: int = 4, size: float = 0.7, kind: str = "normal3", dtype: torch.dtype = torch.float64
):
    """Logits of P and Q, tokens and a temperature per row."""
    p, q = testing.pair(kind, rows, V, size, shift=3.0, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    return (
        p,
        q,
        torch.randint(V, (rows,), generator=generator),
        0.5 + 1.5 * torch.rand(rows, generator=generator, dtype=dtype),
    )


# ---- statistics


@pytest.mark.parametrize("per_row", [False, True], ids=["number", "per_row"])
@pytest.mark.parametrize("kind", testing.KINDS)
def test_textbook_form(kind, per_row) -> None:
    """In fp64 every statistic is the textbook's to the digits that the textbook's has: 1e-12 of its
    largest terms.
    """
    p, q, tokens, temperatures = case(kind=kind)
    temperature = temperatures if per_row else 0.8
    result = reference.row_statistics(p, q, tokens, temperature)
    for name, exact in testing.truth(p, q, temperature).stats(tokens).items():
        testing.assert_near(getattr(result, name), exact, 1e-12, 1e-12, name)
        assert getattr(result, name).dtype == torch.float64


def test_against_torch_distributions() -> None:
    """KL(Categorical‖Categorical) and the entropy as torch.distributions has them."""
    p, q, tokens, _ = case()
    result = reference.row_statistics(p, q, tokens)
    policy, other = (
        torch.distributions.Categorical(logits=p),
        torch.distributions.Categorical(logits=q),
    )
    testing.assert_near(
        result.kl, torch.distributions.kl_divergence(policy, other), 1e-12, 1e-13, "kl"
    )
    testing.assert_near(
        result.ref_kl, torch.distributions.kl_divergence(other, policy), 1e-12, 1e-13, "ref_kl"
    )
    testing.assert_near(result.entropy, policy.entropy(), 1e-12, 1e-13, "entropy")
    testing.assert_near(result.logprob, policy.log_prob(tokens), 1e-12, 1e-13, "logprob")


def test_two_classes() -> None:
    """Bernoulli with logits a and b: KL = σ(a)·(a - b) + softplus(b) - softplus(a)."""
    grid = torch.linspace(-9, 9, 13, dtype=torch.float64)
    a, b = (value.flatten() for value in torch.meshgrid(grid, grid, indexing="ij"))
    result = reference.row_statistics(torch.stack([a, 0 * a], -1), torch.stack([b, 0 * b], -1))
    exact = (
        a.sigmoid() * (a - b) + torch.nn.functional.softplus(b) - torch.nn.functional.softplus(a)
    )
    testing.assert_near(result.kl, exact, 1e-12, 1e-14, "kl")
    testing.assert_near(
        result.entropy, torch.nn.functional.softplus(a) - a * a.sigmoid(), 1e-12, 1e-14, "entropy"
    )


@pytest.mark.parametrize("height", [0.5, 3.0, 20.0, 200.0])
def test_uniform_and_one_hot(height) -> None:
    """Uniform against a peak of `height`: KL(U‖Q) = log Z - height/V - log V, KL(Q‖U) = log V -
    H(Q), Z = e^height + V - 1.
    """
    uniform, peaked = torch.zeros(1, V, dtype=torch.float64), torch.zeros(1, V, dtype=torch.float64)
    peaked[0, 5] = height
    excess = math.log1p((V - 1) * math.exp(-height))
    log_z = height + excess
    entropy = math.exp(-excess) * excess + (V - 1) * math.exp(-log_z) * log_z
    result = reference.row_statistics(uniform, peaked)
    for name, exact in (
        ("kl", log_z - height / V - math.log(V)),
        ("ref_kl", math.log(V) - entropy),
        ("entropy", math.log(V)),
    ):
        testing.assert_near(
            getattr(result, name), torch.tensor([exact], dtype=torch.float64), 1e-11, 1e-13, name
        )
    # log Z - height is rounded at 1e-16, whatever is left of the entropy.
    testing.assert_near(
        reference.row_statistics(peaked).entropy,
        torch.tensor([entropy], dtype=torch.float64),
        1e-12,
        1e-15,
        "entropy of the peak",
    )


def test_geometric() -> None:
    """Truncated geometric distributions of rates a and b: KL = (b - a)·E_a[k] + log Z_b - log Z_a."""
    k, temperature = torch.arange(V, dtype=torch.float64), 1.3

    def log_z_and_mean(rate: float) -> tuple[float, float]:
        r = math.exp(-rate)
        return math.log((1 - r**V) / (1 - r)), r / (1 - r) - V * r**V / (1 - r**V)

    for a, b in ((0.1, 0.3), (1.0, 0.2), (0.5, 2.0)):
        result = reference.row_statistics(
            (-a * temperature * k)[None], (-b * temperature * k + 7)[None], None, temperature
        )
        (log_z_a, mean), (log_z_b, _) = log_z_and_mean(a), log_z_and_mean(b)
        testing.assert_near(
            result.kl,
            torch.tensor([(b - a) * mean + log_z_b - log_z_a], dtype=torch.float64),
            1e-11,
            1e-14,
            "kl",
        )
        testing.assert_near(
            result.entropy,
            torch.tensor([a * mean + log_z_a], dtype=torch.float64),
            1e-11,
            0.0,
            "entropy",
        )


@pytest.mark.parametrize("step", [1e-2, 1e-4, 1e-6, 1e-8])
def test_fisher_limit(step) -> None:
    """For Q's logits = P's + d, small, KL is its cumulant series: Var_p(d)/2 + k3/6 + k4/24, and
    half the Fisher form in the limit.
    """
    p, q, _, _ = case(size=step)
    d = (q - 3.0) - p
    weight = p.softmax(-1)
    d = d - (weight * d).sum(-1, keepdim=True)
    second, third, fourth = ((weight * d**power).sum(-1) for power in (2, 3, 4))
    exact = second / 2 + third / 6 + (fourth - 3 * second**2) / 24
    # d itself is rounded at 4 digits below 1e-16·|logit|, which is what the smallest step leaves of
    # it.
    testing.assert_near(
        reference.row_statistics(p, q).kl, exact, 1e-9 + 20 * step**3 + 1e-14 / step, 0.0, "kl"
    )


@pytest.mark.parametrize("shift", [0.0, 3.0, -1000.0])
@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2, 0.3, 1.0])
@pytest.mark.parametrize("kind", testing.KINDS)
def test_digits_near_zero(kind, size, shift) -> None:
    """In float32 both KLs keep their digits from KL 1e-9 up, whatever constant lies between the
    logits.
    """
    p, q = testing.pair(kind, 8, 4001, size, shift=shift)
    exact = testing.truth(p, q)
    result = reference.row_statistics(p, q)
    assert result.kl.dtype == torch.float32
    testing.assert_kl(result.kl, exact.kl, "kl")
    testing.assert_kl(result.ref_kl, exact.ref_kl, "ref_kl")
    testing.assert_near(result.entropy, exact.entropy, 1e-5, 1e-6, "entropy")


def test_identical_rows_give_exactly_zero() -> None:
    """KL(P‖P) is 0 and its gradient is 0, not nearly, also where Q has a constant more (here one
    that float32 adds exactly).
    """
    p = (64 * testing.pair("normal3", 5, V, 0.0)[0]).round() / 64
    for shift in (0.0, 2.0, -512.0):
        q = (p + shift).requires_grad_()
        leaf = p.clone().requires_grad_()
        result = fastkl.token_stats(leaf, torch.zeros(5, dtype=torch.long), q)
        assert not bool(result.kl.any()) and not bool(result.ref_kl.any())
        for grad in torch.autograd.grad((result.kl + result.ref_kl).sum(), (leaf, q)):
            assert float(grad.abs().max()) <= (0.0 if shift == 0.0 else 1e-7)


# ---- the two functions that keep the digits


@pytest.mark.parametrize(
    "name, dtype, error",
    [
        # Beyond the series the subtraction costs the digits of expm1(d)/(expm1(d) - d): a factor of
        # 8 at d = 1/4, and 17 of log1p at t = 1/8.
        ("expm1_minus", torch.float64, 16 * 2**-52),
        ("expm1_minus", torch.float32, 16 * 2**-23),
        ("minus_log1p", torch.float64, 32 * 2**-52),
        ("minus_log1p", torch.float32, 32 * 2**-23),
    ],
)
def test_high_precision(name, dtype, error) -> None:
    """expm1(d) - d and t - log1p(t) against 60 digits, relative to themselves, from the tiniest
    argument up and on both sides of the series.
    """
    mpmath = pytest.importorskip("mpmath")
    edges = torch.tensor([0.125, 0.25], dtype=torch.float64)
    positive = torch.cat(
        [torch.logspace(-15, 1.5, 200, dtype=torch.float64), edges, edges - 1e-6, edges + 1e-6]
    )
    negative = -positive[positive < 0.99] if name == "minus_log1p" else -positive
    arguments = torch.cat([positive, negative]).to(dtype)
    results = getattr(reference, name)(arguments)
    assert results.dtype == dtype
    with mpmath.workdps(60):
        for argument, result in zip(arguments.tolist(), results.tolist(), strict=True):
            z = mpmath.mpf(argument)
            exact = mpmath.expm1(z) - z if name == "expm1_minus" else z - mpmath.log1p(z)
            assert abs(mpmath.mpf(result) / exact - 1) <= error, (
                f"{name}({argument!r}) = {result!r}, expected {mpmath.nstr(exact, 20)}"
            )
    assert float(getattr(reference, name)(torch.zeros(1, dtype=dtype))) == 0.0


# ---- gradients


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("per_row", [False, True], ids=["number", "per_row"])
@pytest.mark.parametrize("field", [*FIELDS, "kl_divergence"])
def test_gradcheck(field, per_row, masked) -> None:
    """Numerical derivatives of the public functions, for each field and both arguments at once."""
    p, q, tokens, temperatures = case()
    keywords = {
        "temperature": temperatures if per_row else 0.8,
        "mask": torch.tensor([True, True, False, True]) if masked else None,
    }

    def function(p, q):
        if field == "kl_divergence":
            return fastkl.kl_divergence(p, q, **keywords)
        return getattr(fastkl.token_stats(p, tokens, q, **keywords), field)

    result = function(p, q)
    assert result.dtype == torch.float64 and bool(
        (result != 0).eq(torch.ones(4, dtype=torch.bool) if not masked else keywords["mask"]).all()
    )
    assert torch.autograd.gradcheck(function, (p.requires_grad_(), q.requires_grad_()))


@pytest.mark.parametrize(
    "fields",
    [*((name,) for name in FIELDS), ("logprob", "entropy"), ("kl", "ref_kl"), FIELDS],
    ids="+".join,
)
@pytest.mark.parametrize("kind", ["normal3", "zipf"])
def test_gradients_of_the_textbook_form(kind, fields) -> None:
    """row_gradients for any mix of upstream gradients is autograd of the textbook form, in fp64;
    asked for one side it computes that one.

    On kinds of rows where the textbook form keeps its own digits: on peaked ones it loses four.
    """
    p, q, tokens, temperatures = case(kind=kind)
    generator = torch.Generator().manual_seed(2)
    upstream = {name: torch.randn(4, generator=generator, dtype=torch.float64) for name in fields}
    saved = reference.row_statistics(p, q, tokens, temperatures).saved
    results = reference.row_gradients(
        p, q, tokens, temperatures, saved, upstream, wrt_p=True, wrt_q=True
    )
    p, q = p.requires_grad_(), q.requires_grad_()
    exact = testing.truth(p, q, temperatures).stats(tokens)
    expected = torch.autograd.grad(
        sum((exact[name] * value).sum() for name, value in upstream.items()),
        (p, q),
        materialize_grads=True,
    )
    for result, value, side in zip(results, expected, "pq", strict=True):
        testing.assert_gradient(result, value, f"gradient of {side}", 1e-11)
    for wrt_p, wrt_q in ((True, False), (False, True)):
        one = reference.row_gradients(
            p.detach(), q.detach(), tokens, temperatures, saved, upstream, wrt_p=wrt_p, wrt_q=wrt_q
        )
        assert (one[0] is None) != wrt_p and (one[1] is None) != wrt_q
        assert torch.equal(one[0 if wrt_p else 1], results[0 if wrt_p else 1])


# ---- types, blocks, special values


def test_types() -> None:
    """float64 stays float64; every other type is computed in float32, as its own values converted
    beforehand.
    """
    tokens = torch.tensor([0, 1, 2, 3])
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        p, q, _, _ = case(dtype=dtype)
        p, q = p.requires_grad_(), q.requires_grad_()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        result = fastkl.token_stats(p, tokens, q)
        for value, exact in zip(
            result, fastkl.token_stats(p.to(wide), tokens, q.to(wide)), strict=True
        ):
            assert value.dtype == wide and torch.equal(value, exact)
        assert all(grad.dtype == dtype for grad in torch.autograd.grad(result.kl.sum(), (p, q)))


@pytest.mark.parametrize("elements", [1, V, 3 * V + 1, 1 << 20])
def test_blocks_change_no_bit(monkeypatch, elements) -> None:
    """How many rows are worked on at a time changes no result and no gradient, with holes in the
    mask and more leading dimensions.
    """
    p, q = (
        value.reshape(2, 5, V).requires_grad_() for value in testing.pair("normal3", 10, V, 0.5)
    )
    mask = torch.tensor([[True, True, False, True, False], [False, True, True, True, True]])

    def outcome() -> list[torch.Tensor]:
        fields = fastkl.token_stats(p, torch.arange(10).reshape(2, 5), q, mask=mask)
        return [*fields, *torch.autograd.grad(sum(fields).sum(), (p, q))]

    expected = outcome()
    monkeypatch.setattr(row_blocks, "BLOCK_ELEMENTS", elements)
    for result, value in zip(outcome(), expected, strict=True):
        assert torch.equal(result, value) and bool(value.any())


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3)], ids=str)
def test_no_row_to_work_on(leading) -> None:
    """A mask that leaves out every row, and an upstream gradient of 0 for every row, give zeros for
    every leading shape.
    """
    p, q = (torch.randn(*leading, V, requires_grad=True) for _ in "pq")
    tokens = torch.zeros(leading, dtype=torch.long)
    fields = fastkl.token_stats(p, tokens, q, mask=torch.zeros(leading, dtype=torch.bool))
    assert all(value.shape == leading and not bool(value.any()) for value in fields)
    for result in (sum(fields), 0.0 * sum(fastkl.token_stats(p, tokens, q))):
        for grad in torch.autograd.grad(result.sum(), (p, q)):
            assert grad.shape == p.shape and not bool(grad.any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinities_and_nan(dtype) -> None:
    """-inf in both: as if the entry were not there; in Q alone: +inf; in P alone: finite; a NaN or
    +inf: NaN in its own row and in no other.
    """
    p, q = testing.pair("normal3", 7, V, 0.5, dtype=dtype)
    p[0, 3] = q[0, 3] = -math.inf
    q[1, 3] = -math.inf
    p[2, 3] = -math.inf
    p[3, 3], q[4, 3], p[5, 3] = math.nan, math.nan, math.inf
    leaves = p.clone().requires_grad_(), q.clone().requires_grad_()
    result = fastkl.token_stats(leaves[0], torch.zeros(7, dtype=torch.long), leaves[1])
    kept = [i for i in range(V) if i != 3]
    exact = testing.truth(p, q)
    short = testing.truth(p[:, kept], q[:, kept])
    for field in ("kl", "ref_kl"):
        testing.assert_kl(
            getattr(result, field)[0], getattr(short, field)[0], f"{field} without the entry"
        )
        testing.assert_kl(getattr(result, field)[6], getattr(exact, field)[6], field)
        assert bool(getattr(result, field)[3:6].isnan().all())
    assert result.kl[1].item() == math.inf and result.ref_kl[2].item() == math.inf
    testing.assert_kl(result.ref_kl[1], exact.ref_kl[1], "ref_kl with -inf in q")
    testing.assert_kl(result.kl[2], exact.kl[2], "kl with -inf in p")
    assert bool(result.entropy[[0, 1, 2, 4, 6]].isfinite().all()) and bool(
        result.entropy[[3, 5]].isnan().all()
    )
    grads = torch.autograd.grad(result.kl[[0, 2, 3, 4, 5, 6]].sum(), leaves)
    for grad in grads:
        assert (
            bool(grad[[0, 2, 6]].isfinite().all())
            and bool(grad[3:6].isnan().any(-1).all())
            and not bool(grad[1].any())
        )
        assert float(grad[0, 3]) == 0.0
