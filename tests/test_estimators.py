"""estimate_kl, sampled_kl_loss and binary_divergence: values and gradients to their last digits,
ratios, clamps, infinities, errors.
"""

import math
from decimal import Decimal, localcontext

import pytest
import torch
from torch import autograd

from fastkl import testing
from fastkl.estimators import binary_divergence, estimate_kl, sampled_kl_loss

FLOOR = -1e4
ESTIMATORS, BINARY_KINDS = ("k1", "k2", "k3", "abs"), ("kl", "tv")
DIRECTIONS = FORWARD, BACKWARD = "policy||reference", "reference||policy"
every = pytest.mark.parametrize("which", (*ESTIMATORS, *DIRECTIONS))


def either(
    logprob: torch.Tensor, ref: torch.Tensor, which: str, clamp: float | None = None
) -> torch.Tensor:
    if which in DIRECTIONS:
        return sampled_kl_loss(logprob, ref, direction=which, clamp=clamp)
    return estimate_kl(logprob, ref, estimator=which, clamp=clamp)


def loss_at(d: torch.Tensor, which: str, clamp: float | None = None) -> torch.Tensor:
    return either(d, torch.zeros_like(d), which, clamp)


def gradient(value: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value.sum(), leaf, retain_graph=True)[0]


def assert_equal(result: torch.Tensor, exact: torch.Tensor) -> None:
    torch.testing.assert_close(
        result.detach(), exact.detach().expand_as(result), rtol=0, atol=1e-14
    )


# ---- which loss has which value and gradient in expectation: the table that sampled_kl_loss picks
# from


# A vocabulary of 5 in float64: policy (logits `theta`), reference, and the older policy that
# sampled.
class World:
    generator = torch.Generator().manual_seed(3)
    theta, ref = torch.randn(2, 5, dtype=torch.float64, generator=generator)
    old, ref = (-0.5 * theta).log_softmax(-1), ref.log_softmax(-1)
    logprob = theta.requires_grad_().log_softmax(-1)
    p, q = logprob.exp(), ref.exp()
    kl = {
        FORWARD: (p * (logprob - ref)).sum(),
        BACKWARD: (q * (ref - logprob)).sum(),
        "distance": (p - q).abs().sum(),
        "zero": 0 * p.sum(),
    }


# Estimator or loss; what multiplies it: nothing, on-policy, or off-policy nothing, the ratio with
# gradient (live) or without; whose value and whose gradient it has in expectation;
# None: neither KL's.
EXPECTED = [
    ("k1", "on-policy", FORWARD, "zero"),
    ("k2", "on-policy", None, FORWARD),
    ("k3", "on-policy", FORWARD, BACKWARD),
    ("abs", "on-policy", None, "distance"),
    ("k1", "live", FORWARD, FORWARD),
    ("k2", "live", None, None),
    ("k3", "live", FORWARD, FORWARD),
    ("k1", "ratio", FORWARD, "zero"),
    ("k2", "ratio", None, FORWARD),
    ("k3", "ratio", FORWARD, BACKWARD),
    *((name, "off-policy", None, None) for name in ESTIMATORS),
    *((direction, "on-policy", direction, direction) for direction in DIRECTIONS),
]


@pytest.mark.parametrize("which, way, value, slope", EXPECTED)
def test_expectations(which, way, value, slope) -> None:
    logprob, ref, theta, ratio = World.logprob, World.ref, World.theta, World.p / World.old.exp()
    loss = either(logprob, ref, which) * {"live": ratio, "ratio": ratio.detach()}.get(way, 1.0)
    mean = ((logprob.detach() if way == "on-policy" else World.old).exp() * loss).sum()
    for name, kl in World.kl.items():
        got, exact = gradient(mean, theta), gradient(kl, theta)
        if name == slope:
            assert_equal(got, exact)
        if name == value:
            assert_equal(mean, kl)
        if name in DIRECTIONS and slope is None:
            assert float((got - exact).norm()) > 0.2 * float(exact.norm())
    assert value or abs(float(mean.detach() / World.kl[FORWARD].detach()) - 1) > 0.05


# The loss on-policy times the ratio, in value and gradient; only the policy gets one.
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_off_policy_token_by_token(direction) -> None:
    logprob, ref, ratio = World.logprob, testing.leaf(World.ref), World.p / World.old.exp()
    loss = sampled_kl_loss(logprob, ref, old_logprob=World.old, direction=direction)
    on_policy = sampled_kl_loss(logprob, ref, direction=direction)
    assert_equal(loss, ratio * on_policy)
    assert_equal(gradient(loss, logprob), ratio * gradient(on_policy, logprob))
    assert torch.autograd.grad(loss.sum(), ref, allow_unused=True) == (None,)


# ---- digits, clamps, infinities


# e^x - 1 - x in float64: 1e-12 relative; below 1e-2 the Taylor series, of which the next term is
# 1e-13 of the first.
def expm1_minus(x: torch.Tensor) -> torch.Tensor:
    series = x * x * (1 / 2 + x / 6 + x**2 / 24 + x**3 / 120 + x**4 / 720 + x**5 / 5040)
    return torch.where(x.abs() < 1e-2, series, torch.expm1(x) - x)


def k3_slope(d: torch.Tensor) -> torch.Tensor:
    return -torch.expm1(-d)


# The value, its own slope and the gradient in float64 at d; a loss's value has a slope that is not
# its gradient.
EXACT = {
    "k1": (lambda d: d, torch.ones_like, torch.ones_like),
    "k2": (lambda d: d * d / 2, lambda d: d, lambda d: d),
    "k3": (lambda d: expm1_minus(-d), k3_slope, k3_slope),
    "abs": (torch.abs, torch.sign, torch.sign),
    FORWARD: (lambda d: expm1_minus(-d), k3_slope, lambda d: d),
    BACKWARD: (lambda d: torch.exp(-d) * expm1_minus(d), lambda d: d * torch.exp(-d), k3_slope),
}


# 8 float32 roundings (2^-21) of themselves, from |d| = 1e-8 to 30; never negative but for k1;
# exactly 0 at 0.
#
# The worst are the two terms of opposite sign at |d| = 0.5: e^x - 1 = -0.39 to a rounding or two,
# in a result of 0.11.
@every
def test_digits_at_every_size(which) -> None:
    size = torch.logspace(-8, math.log10(30), 400)
    d = torch.cat([size, -size, torch.tensor([0.5, -0.5])]).requires_grad_()
    value, (exact, _, slope) = loss_at(d, which), EXACT[which]
    for result, function in ((value, exact), (gradient(value, d), slope)):
        wanted = function(d.detach().double())
        assert float(((result.detach().double() - wanted) / wanted).abs().max()) < 2.0**-21
    assert value.dtype == torch.float32 and (which == "k1" or bool((value > 0).all()))
    logprob = torch.tensor([-0.0, -1.5, -40.0], requires_grad=True)
    value = either(logprob, logprob.detach(), which)
    assert not bool(value.any()) and gradient(value, logprob).tolist() == [float(which == "k1")] * 3


# Inside, the bits are those without one; without one e^|d| goes on to |d| = 50, in float64 600, and
# k2 without end.
@pytest.mark.parametrize(
    "dtype, clamp",
    [
        (torch.float64, 1.5),
        (torch.float64, 10.0),
        (torch.float64, 50),
        (torch.float32, None),
        (torch.float64, None),
    ],
    ids=str,
)
@every
def test_beyond_the_clamp_is_the_tangent(which, dtype, clamp) -> None:
    limit = clamp or {torch.float32: 50.0, torch.float64: 600.0}[dtype]
    inside = torch.linspace(-limit, limit, 41, dtype=dtype, requires_grad=True)
    plain, clamped = loss_at(inside, which), loss_at(inside, which, clamp)
    assert torch.equal(plain, clamped)
    # At the clamp itself torch 2.14 adds up the gradient in another way.
    torch.testing.assert_close(gradient(plain, inside), gradient(clamped, inside))
    beyond = torch.tensor([0.1, 1.0, 30.0, 900.0], dtype=dtype) + limit
    beyond = torch.cat([beyond, -beyond]).requires_grad_()
    d = beyond.detach().double()
    near, (value, slope, gradient_at) = d.clamp(-limit, limit), EXACT[which]
    quadratic = clamp is None and which in ("k2", FORWARD)
    exact = value(near) + slope(near) * (d - near)
    exact = value(d) if quadratic and which == "k2" else exact
    got, close = loss_at(beyond, which, clamp), {"rtol": 1e-12 if dtype == torch.float64 else 2e-5}
    torch.testing.assert_close(got.detach().double(), exact, atol=0, **close)
    exact = gradient_at(d if quadratic else near)
    torch.testing.assert_close(gradient(got, beyond).double(), exact, atol=0, **close)


# -inf and the numbers that masks write count as -1e4, without gradient to themselves; both: d = 0.
@pytest.mark.parametrize("clamp", [None, 5.0, 50.0])
@every
@pytest.mark.parametrize("impossible", [-math.inf, torch.finfo(torch.float32).min, -65504.0])
def test_impossible_tokens(impossible, which, clamp) -> None:
    logprob = torch.tensor([impossible, -2.0, impossible, -2.0], requires_grad=True)
    ref = torch.tensor([-1.0, impossible, impossible, -1.0])
    counted = (logprob.detach().clamp(min=FLOOR) - ref.clamp(min=FLOOR)).requires_grad_()
    value, expected = either(logprob, ref, which, clamp), loss_at(counted, which, clamp)
    assert torch.equal(value, expected) and bool(value.isfinite().all())
    grad = gradient(value, logprob)
    assert torch.equal(grad, torch.where(logprob < FLOOR, 0.0, gradient(expected, counted)))
    assert float(value[2].detach()) == 0 and float(grad[1]) > 0


# For policy, reference and sampler; the ratio follows e^x up to e^20 and stays there; a NaN stays
# in its token.
@pytest.mark.parametrize("clamp", [None, 10.0, 50.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_mix_of_sizes_is_finite(direction, dtype, clamp) -> None:
    sizes = [0.0, -1e-6, -3.0, -40.0, -80.0, -200.0, -3e3, -1e4, -3e38, -math.inf]
    logprob, ref, old = torch.cartesian_prod(*[torch.tensor(sizes, dtype=dtype)] * 3).unbind(-1)
    logprob, more = logprob.clone().requires_grad_(), {"direction": direction, "clamp": clamp}
    loss = sampled_kl_loss(logprob, ref, old_logprob=old, **more)
    assert bool((loss.isfinite() & (loss >= 0)).all() & gradient(loss, logprob).isfinite().all())
    one, two, old = torch.tensor([[-1.0] * 3, [-2.0] * 3, [-3.0, -20.9, -60.0]], dtype=dtype)
    ratio = sampled_kl_loss(one, two, old_logprob=old, **more) / sampled_kl_loss(one, two, **more)
    exact = torch.tensor([2.0, 19.9, 20.0]).double().exp()
    torch.testing.assert_close(ratio.double(), exact, rtol=1e-5, atol=0)
    for which in (*ESTIMATORS, direction):
        d = torch.tensor([1.0, math.nan, -2.0], dtype=dtype, requires_grad=True)
        value = loss_at(d, which, clamp)
        assert value.isnan().tolist() == [False, True, False]
        assert bool(gradient(value, d)[::2].isfinite().all())


# ---- types, shapes, torch


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types(which, dtype) -> None:
    logprob = torch.tensor([-1.25, -3.0], dtype=dtype, requires_grad=True)
    value = either(logprob, torch.tensor([-2.0, -1.5], dtype=dtype), which)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = loss_at(torch.tensor([0.75, -1.5]).double(), which)
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)
    assert gradient(value, logprob).dtype == dtype
    d = torch.tensor([-11.0, -11.125], dtype=dtype, requires_grad=True)
    assert gradient(loss_at(d, "k3"), d).isinf().tolist() == [False, dtype == torch.float16]


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3), (2, 1, 3)], ids=str)
def test_shapes(shape) -> None:
    logprob, ref = torch.full((), -1.0).expand(shape), torch.full(shape, -2.0)
    for value in (estimate_kl(logprob, ref), sampled_kl_loss(logprob, ref, old_logprob=logprob)):
        assert value.shape == shape and len(set(value.flatten().tolist())) == min(1, value.numel())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_of_estimate_kl(estimator) -> None:
    pair = torch.tensor([[-1.0, -2.0, -0.1], [-1.5, -1.0, -3.0]]).double().requires_grad_().unbind()
    for check, clamp in ((autograd.gradcheck, 2.0), (autograd.gradgradcheck, 0.7)):
        assert check(lambda p, q, clamp=clamp: either(p, q, estimator, clamp), pair)


# ---- this token or another


def bernoulli(a: float, b: float, kind: str) -> tuple[float, float, float]:
    """The divergence of e^a and e^b and its two slopes, from 400 decimal digits."""
    with localcontext() as context:
        context.prec = 400
        log_p, log_q = Decimal(a), Decimal(b)
        p, q = log_p.exp(), log_q.exp()
        if kind == "tv":
            sign = (p > q) - (p < q)
            return float(abs(p - q)), float(sign * p), float(-sign * q)
        rest = ((1 - p) / (1 - q)).ln()
        kl = p * (log_p - log_q) + (1 - p) * rest
        return float(kl), float(p * (log_p - log_q - rest)), float((q - p) / (1 - q))


# Results in float32 have one rounding, of 2^-24; in float64 the roundings of some ten operations,
# and of logarithms of up to 700 where 1 - p and 1 - q are small.
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 2.0**-23), (torch.float64, 1e-13)])
@pytest.mark.parametrize("kind", BINARY_KINDS)
def test_digits_of_binary_divergences(kind, dtype, limit) -> None:
    # Of probabilities from 1e-35 to 1 - 1e-35, equal to 8 digits or to none.
    sizes = [1e-35, 3e-17, 1e-8, 2e-3, 0.4, 0.51, 0.6931, 1.0, 7.0, 36.0, 80.0]
    steps = [1 + sign * 10**power for power in (-7.5, -7, -4, -1) for sign in (1, -1)]
    pairs = [(-a, -a * step) for a in sizes for step in steps] + [
        (-a, -b) for a in sizes for b in sizes
    ]
    a, b = torch.tensor(pairs, dtype=dtype).unbind(-1)
    a, b = a[a != b].requires_grad_(), b[a != b].requires_grad_()
    value = binary_divergence(a, b, kind=kind)
    results = torch.stack([value.detach(), *torch.autograd.grad(value.sum(), (a, b))], -1).double()
    exact = [bernoulli(*pair, kind) for pair in zip(a.tolist(), b.tolist(), strict=True)]
    exact = torch.tensor(exact, dtype=torch.float64)
    testing.assert_near(results, exact, limit, 2.0**-149, kind)


INFINITY, LOG2 = math.inf, math.log(2)


# log p, log q, KL and total variation; the last two positive ones are rounding errors.
@pytest.mark.parametrize(
    "a, b, kl, tv",
    [
        *((x, x, 0.0, 0.0) for x in (-INFINITY, -1e30, -746.0, -104.0, -1.0, -1e-45, 0.0)),
        (-INFINITY, -LOG2, LOG2, 0.5),
        (-LOG2, -INFINITY, INFINITY, 0.5),
        (-200.0, -INFINITY, INFINITY, 0.0),
        (-800.0, -INFINITY, 0.0, 0.0),
        (-INFINITY, -1e30, 0.0, 0.0),
        (0.0, -LOG2, LOG2, 0.5),
        (0.0, -INFINITY, INFINITY, 1.0),
        (-LOG2, 0.0, INFINITY, 0.5),
        (-1e-45, 0.0, INFINITY, 0.0),
        (-INFINITY, 0.0, INFINITY, 1.0),
        (1e-3, -LOG2, LOG2, 0.5),
        (-LOG2, 1e-3, INFINITY, 0.5),
        (math.nan, -1.0, math.nan, math.nan),
        (-1.0, math.nan, math.nan, math.nan),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certain_and_impossible_tokens(a, b, kl, tv, dtype) -> None:
    # 0·log 0 = 0; finite log-probabilities have a gradient that is no NaN, positive ones none.
    pair = [torch.tensor([x], dtype=dtype, requires_grad=True) for x in (a, b)]
    for kind, exact in (("kl", kl), ("tv", tv)):
        value = binary_divergence(*pair, kind=kind)
        assert value.tolist() == pytest.approx([exact], rel=1e-7, nan_ok=True)
        slopes = [slope.item() for slope in autograd.grad(value, pair)]
        assert not math.isfinite(a + b) or not any(map(math.isnan, slopes))
        assert all(slope == 0 for slope, x in zip(slopes, (a, b), strict=True) if x > 0 or a == b)


@pytest.mark.parametrize("kind", BINARY_KINDS)
def test_binary_divergences_of_models(kind) -> None:
    # At most that of the whole distributions; equal bits of 16-bit log-probs and their float32;
    # second derivatives, through every form and across where they meet.
    p, q = testing.pair("normal1", 64, 50, 0.1)
    log_p, log_q = (x.log_softmax(-1) for x in (p, q))
    whole = {"kl": testing.truth(p, q).kl, "tv": (log_p.exp() - log_q.exp()).abs().sum(-1) / 2}[
        kind
    ]
    binary = binary_divergence(log_p, log_q, kind=kind)
    assert bool((binary <= whole[:, None] * (1 + 1e-5)).all()) and binary.dtype == torch.float32
    half = log_p.bfloat16().requires_grad_(), log_q.bfloat16()
    value, same = (
        binary_divergence(*half, kind=kind),
        binary_divergence(half[0].float(), half[1].float(), kind=kind),
    )
    assert torch.equal(value, same) and gradient(value, half[0]).dtype == torch.bfloat16
    a, b = -torch.tensor([[0.2, 1e-3, 3.0, 0.3, 5.0], [0.3, 0.7, 1.0, 0.301, 0.02]]).double()
    a, b = a.requires_grad_(), b.requires_grad_()
    for check in (autograd.gradcheck, autograd.gradgradcheck):
        assert check(lambda x, y: binary_divergence(x, y, kind=kind), (a, b))
