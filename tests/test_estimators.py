"""estimate_kl and sampled_kl_loss: expected values and gradients by enumerating a small vocabulary, digits near 0, clamps, infinities, errors."""

from __future__ import annotations

import math

import pytest
import torch

from fastkl.estimators import DIRECTIONS, ESTIMATORS, estimate_kl, sampled_kl_loss

INF = math.inf
FLOOR = -1e4
# What a mask leaves of an impossible token: each type's smallest number, or -inf.
IMPOSSIBLE = (-INF, torch.finfo(torch.float32).min, -65504.0)
ALL = (*ESTIMATORS, *DIRECTIONS)


class World:
    """A vocabulary of 5 in float64: policy (logits `theta`), reference, and the older policy that sampled. Expectations are sums over all tokens."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.theta = torch.randn(5, dtype=torch.float64, generator=generator).requires_grad_()
        self.ref = torch.randn(5, dtype=torch.float64, generator=generator).log_softmax(-1)
        self.old = (-0.5 * self.theta.detach()).log_softmax(-1)
        self.logprob = self.theta.log_softmax(-1)

    def kl(self, direction: str) -> torch.Tensor:
        """The KL itself, with its gradient to theta."""
        first, second = (self.logprob, self.ref) if direction == DIRECTIONS[0] else (self.ref, self.logprob)
        return (first.exp() * (first - second)).sum()

    def ratio(self) -> torch.Tensor:
        """The importance ratio, with gradient."""
        return (self.logprob - self.old).exp()

    def expected(self, loss: torch.Tensor, *, off_policy: bool = False) -> tuple[float, torch.Tensor]:
        """The expected value of a loss per sampled token, and the expectation of its gradient to theta."""
        mean = ((self.old if off_policy else self.logprob.detach()).exp() * loss).sum()
        return float(mean.detach()), torch.autograd.grad(mean, self.theta, retain_graph=True)[0]

    def gradient(self, value: torch.Tensor) -> torch.Tensor:
        """The gradient to theta of a function of the whole distribution."""
        return torch.autograd.grad(value, self.theta, retain_graph=True)[0]


def assert_equal(result: torch.Tensor | float, exact: torch.Tensor | float) -> None:
    """Equal but for float64 roundings: sums of 5 terms of size 1."""
    torch.testing.assert_close(torch.as_tensor(result, dtype=torch.float64), torch.as_tensor(exact, dtype=torch.float64).detach(), rtol=0, atol=1e-14)


def far(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Wrong by a fifth at least, not by rounding."""
    return float((one - other).norm()) > 0.2 * float(other.norm())


# ---- which loss has which gradient: the table that sampled_kl_loss picks from


def test_expected_values_of_the_estimators() -> None:
    """k1 and k3 are unbiased; k2 and abs are not."""
    world = World()
    exact = world.kl(DIRECTIONS[0]).detach()
    means = {name: world.expected(estimate_kl(world.logprob, world.ref, estimator=name))[0] for name in ESTIMATORS}
    assert_equal(means["k1"], exact)
    assert_equal(means["k3"], exact)
    assert abs(means["k2"] - float(exact)) > 0.05 * float(exact) and abs(means["abs"] - float(exact)) > 0.05 * float(exact)


def test_gradients_on_policy() -> None:
    """As a loss k1 does nothing, k2 is right, k3 has the other direction's gradient, abs that of twice the total variation."""
    world = World()
    gradients = {name: world.expected(estimate_kl(world.logprob, world.ref, estimator=name))[1] for name in ESTIMATORS}
    forward, backward = (world.gradient(world.kl(direction)) for direction in DIRECTIONS)
    assert far(forward, backward)
    assert_equal(gradients["k1"], torch.zeros(5))
    assert_equal(gradients["k2"], forward)
    assert_equal(gradients["k3"], backward)
    assert_equal(gradients["abs"], world.gradient((world.logprob.exp() - world.ref.exp()).abs().sum()))
    assert far(gradients["abs"], forward) and far(gradients["abs"], backward)


def test_a_policy_that_leaves_tokens_out() -> None:
    """As top-p does: k1 stays unbiased, k3 and the loss are low by the reference's probability of those tokens, the loss's gradient is right."""
    world, kept = World(), torch.tensor([0, 2, 3])
    logprob, ref = world.theta[kept].log_softmax(-1), world.ref[kept]
    exact, left_out = (logprob.exp() * (logprob - ref)).sum(), 1 - ref.exp().sum()
    k1, k3, loss = ((logprob.detach().exp() * value).sum() for value in (
        estimate_kl(logprob, ref), estimate_kl(logprob, ref, estimator="k3"), sampled_kl_loss(logprob, ref)))
    assert float(left_out) > 0.1
    assert_equal(k1.detach(), exact)
    assert_equal(torch.stack([k3, loss]).detach(), (exact - left_out).expand(2))
    assert_equal(world.gradient(loss), world.gradient(exact))


def test_k1_inside_the_reward() -> None:
    """A reward of -k1 without gradient, in a policy gradient, descends KL(policy‖reference)."""
    world = World()
    k1 = estimate_kl(world.logprob, world.ref, estimator="k1").detach()
    assert_equal(world.expected(k1 * world.logprob)[1], world.gradient(world.kl(DIRECTIONS[0])))


@pytest.mark.parametrize("estimator, live, right", [
    ("k1", True, DIRECTIONS[0]), ("k3", True, DIRECTIONS[0]), ("k2", True, None),
    ("k2", False, DIRECTIONS[0]), ("k3", False, DIRECTIONS[1]), ("k1", False, "zero"), *((name, None, None) for name in ESTIMATORS),
])
def test_gradients_off_policy(estimator, live, right) -> None:
    """Each estimator times the importance ratio, with its gradient (live) or without; and without a ratio, as if tokens were of this policy."""
    world = World()
    ratio = {True: world.ratio(), False: world.ratio().detach(), None: 1.0}[live]
    gradient = world.expected(ratio * estimate_kl(world.logprob, world.ref, estimator=estimator), off_policy=True)[1]
    if right is None:
        assert all(far(gradient, world.gradient(world.kl(direction))) for direction in DIRECTIONS)
    else:
        assert_equal(gradient, torch.zeros(5) if right == "zero" else world.gradient(world.kl(right)))


# ---- the loss that is right


@pytest.mark.parametrize("off_policy", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_loss_is_unbiased_in_value_and_gradient(direction, off_policy) -> None:
    """The expectation of the value is the KL, that of the gradient its gradient, and no token's value is negative."""
    world = World()
    loss = sampled_kl_loss(world.logprob, world.ref, old_logprob=world.old if off_policy else None, direction=direction)
    value, gradient = world.expected(loss, off_policy=off_policy)
    assert_equal(value, world.kl(direction))
    assert_equal(gradient, world.gradient(world.kl(direction)))
    assert bool((loss > 0).all())


@pytest.mark.parametrize("off_policy", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_loss_is_the_docstring_token_by_token(direction, off_policy) -> None:
    """Value and gradient of each token are those of the code in the docstring."""
    world = World()
    d = world.logprob - world.ref
    ratio = world.ratio().detach() if off_policy else torch.ones(5, dtype=torch.float64)
    w = torch.exp(-d)
    value, form = (w - 1 + d, d ** 2 / 2) if direction == DIRECTIONS[0] else (1 - w * (1 + d), w - 1 + d)
    loss = sampled_kl_loss(world.logprob, world.ref, old_logprob=world.old if off_policy else None, direction=direction)
    assert_equal(loss, ratio * value)
    assert_equal(*(torch.autograd.grad(each.sum(), world.logprob, retain_graph=True)[0] for each in (loss, ratio * form)))


def test_loss_off_policy_is_the_live_ratio_times_k3() -> None:
    """Token by token: the published form of GRPO with the ratio on its KL."""
    world = World()
    loss = sampled_kl_loss(world.logprob, world.ref, old_logprob=world.old)
    live = world.ratio() * estimate_kl(world.logprob, world.ref, estimator="k3")
    assert_equal(loss, live)
    assert_equal(*(torch.autograd.grad(each.sum(), world.logprob, retain_graph=True)[0] for each in (loss, live)))


def test_variance_near_the_reference() -> None:
    """With the policy 0.05 from the reference, the loss has less than 1 % of k1's variance, in either direction."""
    world = World()
    near = (world.ref + 0.05 * torch.tensor([1.0, -1.0, 0.5, 0.0, -0.5], dtype=torch.float64)).log_softmax(-1)

    def variance(value: torch.Tensor) -> float:
        mean = (near.exp() * value).sum()
        return float((near.exp() * (value - mean) ** 2).sum())

    for direction in DIRECTIONS:
        assert variance(sampled_kl_loss(near, world.ref, direction=direction)) < 0.01 * variance(estimate_kl(near, world.ref, estimator="k1"))


def test_no_gradient_to_reference_and_old() -> None:
    """Only the policy learns, even where the reference requires grad."""
    logprob, ref, old = torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([-1.5, -1.0], requires_grad=True), torch.tensor([-1.2, -1.9])
    for direction in DIRECTIONS:
        grads = torch.autograd.grad(sampled_kl_loss(logprob, ref, old_logprob=old, direction=direction).sum(), (logprob, ref), allow_unused=True)
        assert bool((grads[0] != 0).all()) and grads[1] is None


# ---- float32: digits, clamps, infinities


def either(logprob: torch.Tensor, ref: torch.Tensor, which: str, clamp: float | None = None) -> torch.Tensor:
    """An estimator, or the loss of a direction."""
    if which in DIRECTIONS:
        return sampled_kl_loss(logprob, ref, direction=which, clamp=clamp)
    return estimate_kl(logprob, ref, estimator=which, clamp=clamp)


def loss_at(d: torch.Tensor, which: str, clamp: float | None = None) -> torch.Tensor:
    """Either, for logprob - ref_logprob = d to the bit."""
    return either(d, torch.zeros_like(d), which, clamp)


def expm1_minus(x: torch.Tensor) -> torch.Tensor:
    """e^x - 1 - x in float64: 1e-12 relative; below 1e-2 the Taylor series, of which the next term is 1e-13 of the first."""
    series = x * x * (1 / 2 + x / 6 + x ** 2 / 24 + x ** 3 / 120 + x ** 4 / 720 + x ** 5 / 5040)
    return torch.where(x.abs() < 1e-2, series, torch.expm1(x) - x)


# value and derivative to d, in float64, at d where nothing is clamped; expm1_minus(x) = e^x - 1 - x without its cancellation.
EXACT = {
    "k1": (lambda d: d, torch.ones_like),
    "k2": (lambda d: d * d / 2, lambda d: d),
    "k3": (lambda d: expm1_minus(-d), lambda d: -torch.expm1(-d)),
    "abs": (torch.abs, torch.sign),
    DIRECTIONS[0]: (lambda d: expm1_minus(-d), lambda d: d),
    DIRECTIONS[1]: (lambda d: torch.exp(-d) * expm1_minus(d), lambda d: -torch.expm1(-d)),
}


@pytest.mark.parametrize("which", ALL)
def test_digits_at_every_size(which) -> None:
    """Values and gradients to 8 float32 roundings (2^-21) of themselves, from |d| = 1e-8 to 30, of both signs; never negative but for k1.

    The worst are the two terms of opposite sign at |d| = 0.5: e^x - 1 = -0.39 to a rounding or two, in a result of 0.11.
    """
    size = torch.logspace(-8, math.log10(30), 400)
    d = torch.cat([size, -size, torch.tensor([0.5, -0.5])]).requires_grad_()
    value = loss_at(d, which)
    grad = torch.autograd.grad(value.sum(), d)[0]
    for result, function in zip((value, grad), EXACT[which], strict=True):
        exact = function(d.detach().double())
        error = (result.detach().double() - exact).abs() / exact.abs()
        assert float(error.max()) < 2.0 ** -21, float(d[error.argmax()])
    assert which == "k1" or bool((value > 0).all())
    assert value.dtype == torch.float32


@pytest.mark.parametrize("which", ALL)
def test_zero_at_zero(which) -> None:
    """The same log-probabilities give exactly 0, with gradient 0 but for k1."""
    logprob = torch.tensor([-0.0, -1.5, -40.0], requires_grad=True)
    value = either(logprob, logprob.detach(), which)
    assert not bool(value.detach().any())
    assert torch.equal(torch.autograd.grad(value.sum(), logprob)[0], torch.full((3,), 1.0 if which == "k1" else 0.0))


@pytest.mark.parametrize("clamp", [1.5, 10.0, 50])
@pytest.mark.parametrize("which", ALL)
def test_clamp_is_the_tangent(which, clamp) -> None:
    """Inside nothing changes, to the bit; beyond, the value is that at the clamp plus slope times excess, and the gradient that at the clamp."""
    inside = torch.linspace(-clamp, clamp, 41, requires_grad=True)
    plain, clamped = loss_at(inside, which), loss_at(inside, which, clamp)
    assert torch.equal(plain, clamped)
    assert torch.equal(*(torch.autograd.grad(value.sum(), inside)[0] for value in (plain, clamped)))
    for sign in (-1.0, 1.0):
        edge, excess = torch.tensor(sign * clamp, dtype=torch.float64), torch.tensor([0.1, 1.0, 30.0, 900.0], dtype=torch.float64)
        beyond = (edge + sign * excess).requires_grad_()
        value = loss_at(beyond, which, clamp)
        value_at, gradient_at = (exact(edge) for exact in EXACT[which])
        # A loss's value goes on along its own slope, which is not its gradient.
        own = {DIRECTIONS[0]: -torch.expm1(-edge), DIRECTIONS[1]: edge * torch.exp(-edge)}.get(which, gradient_at)
        torch.testing.assert_close(value.detach(), value_at + own * sign * excess, rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.autograd.grad(value.sum(), beyond)[0], gradient_at.expand(4), rtol=1e-12, atol=0)


@pytest.mark.parametrize("clamp", [None, 5.0, 50.0])
@pytest.mark.parametrize("which", ALL)
@pytest.mark.parametrize("impossible", IMPOSSIBLE)
def test_impossible_tokens(impossible, which, clamp) -> None:
    """-inf and what masks write: as -1e4, without gradient to themselves; both: d = 0. All is finite, also in the other token."""
    logprob = torch.tensor([impossible, -2.0, impossible, -2.0], requires_grad=True)
    ref = torch.tensor([-1.0, impossible, impossible, -1.0])
    counted = torch.tensor([FLOOR, -2.0, FLOOR, -2.0]) - torch.tensor([-1.0, FLOOR, FLOOR, -1.0])
    counted.requires_grad_()
    value, expected = either(logprob, ref, which, clamp), loss_at(counted, which, clamp)
    assert torch.equal(value, expected) and bool(value.isfinite().all()) and float(value[2].detach()) == 0
    grad, expected_grad = torch.autograd.grad(value.sum(), logprob)[0], torch.autograd.grad(expected.sum(), counted)[0]
    assert torch.equal(grad, torch.where(logprob < FLOOR, 0.0, expected_grad)) and float(grad[1]) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_nothing_overflows(direction, dtype) -> None:
    """Every mix of sizes, -inf among them, for policy, reference and sampler: values and gradients finite, with a clamp and without."""
    sizes = torch.tensor([0.0, -1e-6, -3.0, -40.0, -80.0, -200.0, -3e3, -1e4, -3e38, -INF], dtype=dtype)
    logprob, ref, old = (each.flatten() for each in torch.meshgrid(sizes, sizes, sizes, indexing="ij"))
    logprob.requires_grad_()
    for clamp in (None, 10.0, 50.0):
        loss = sampled_kl_loss(logprob, ref, old_logprob=old, direction=direction, clamp=clamp)
        assert bool(loss.isfinite().all()) and bool((loss >= 0).all())
        assert bool(torch.autograd.grad(loss.sum(), logprob)[0].isfinite().all())


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 50.0), (torch.float64, 600.0)])
def test_without_a_clamp(dtype, limit) -> None:
    """k2, and the gradient that is d, go on without end; what has e^|d| in it is itself to |d| = 50, in float64 600, and its tangent beyond."""
    d = torch.tensor([9000.0, -9000.0, -0.9 * limit, -1.2 * limit, 1.2 * limit], dtype=dtype, requires_grad=True)
    assert torch.equal(estimate_kl(d, torch.zeros_like(d), estimator="k2"), d * d / 2)
    assert torch.equal(torch.autograd.grad(sampled_kl_loss(d, torch.zeros_like(d)).sum(), d)[0], d)
    exact = d.detach().double()
    near = exact.clamp(-limit, limit)
    for which, slope in (("k3", -torch.expm1(-near)), (DIRECTIONS[0], -torch.expm1(-near)), (DIRECTIONS[1], near * torch.exp(-near))):
        torch.testing.assert_close(loss_at(d, which).detach().double(), EXACT[which][0](near) + slope * (exact - near), rtol=1e-6, atol=0)
        gradient = torch.autograd.grad(loss_at(d, which).sum(), d)[0].double()
        torch.testing.assert_close(gradient, exact if which == DIRECTIONS[0] else EXACT["k3"][1](near), rtol=1e-6, atol=0)


def test_largest_ratio() -> None:
    """The ratio follows e^x up to e^20 and stays there."""
    logprob, old = torch.tensor([-1.0] * 3), torch.tensor([-3.0, -20.9, -60.0])
    on_policy = sampled_kl_loss(logprob, torch.tensor([-2.0] * 3))
    ratio = sampled_kl_loss(logprob, torch.tensor([-2.0] * 3), old_logprob=old) / on_policy
    torch.testing.assert_close(ratio.double(), torch.tensor([2.0, 19.9, 20.0], dtype=torch.float64).exp(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("which", ALL)
def test_nan_stays_in_its_token(which) -> None:
    """A NaN is not hidden, and reaches no other token's value or gradient."""
    for dtype in (torch.float32, torch.float64):
        d = torch.tensor([1.0, math.nan, -2.0], dtype=dtype, requires_grad=True)
        value = loss_at(d, which, 1.5)
        assert value.isnan().tolist() == [False, True, False]
        assert bool(torch.autograd.grad(value.sum(), d)[0][::2].isfinite().all())


# ---- types, shapes, torch


@pytest.mark.parametrize("which", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types(which, dtype) -> None:
    """16-bit log-probabilities count by their exact values and give float32; float64 gives float64; gradients come in the input's type."""
    logprob, ref = torch.tensor([-1.25, -3.0], dtype=dtype, requires_grad=True), torch.tensor([-2.0, -1.5], dtype=dtype)
    value = either(logprob, ref, which)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(value.double(), loss_at(torch.tensor([0.75, -1.5], dtype=torch.float64), which), rtol=1e-6, atol=0)
    assert torch.autograd.grad(value.sum(), logprob)[0].dtype == dtype
    d = torch.tensor([-11.0, -11.125], dtype=dtype, requires_grad=True)  # e^11.125 = 67846 is beyond float16
    gradient = torch.autograd.grad(loss_at(d, "k3").sum(), d)[0]
    assert gradient.isinf().tolist() == [False, dtype == torch.float16]


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3), (2, 1, 3)], ids=str)
def test_shapes(shape) -> None:
    """Any shape, one entry per token, expanded and empty ones too."""
    logprob = torch.full((), -1.0).expand(shape)
    for value in (estimate_kl(logprob, torch.full(shape, -2.0)), sampled_kl_loss(logprob, torch.full(shape, -2.0), old_logprob=logprob)):
        assert value.shape == shape and bool((value == value.flatten()[:1].squeeze()).all() if value.numel() else True)


def test_gradient_of_the_reference_in_estimate_kl() -> None:
    """A value: gradient to each argument that requires it, the one minus the other."""
    logprob, ref = (torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in ([-1.0, -2.0, -0.1], [-1.5, -1.0, -3.0]))
    for estimator in ESTIMATORS:
        assert torch.autograd.gradcheck(lambda p, q, name=estimator: estimate_kl(p, q, estimator=name, clamp=2.0), (logprob, ref))
        assert torch.autograd.gradgradcheck(lambda p, q, name=estimator: estimate_kl(p, q, estimator=name, clamp=0.7), (logprob, ref))


def test_compiled_and_without_synchronisation() -> None:
    """One graph under torch.compile with the same values, and tensors without data (meta) suffice: nothing looks at them."""
    generator = torch.Generator().manual_seed(0)
    logprob, ref, old = (-torch.rand(4, 7, generator=generator) * 5 for _ in range(3))

    def both(logprob: torch.Tensor, ref: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        return estimate_kl(logprob, ref, estimator="k3", clamp=2.0) + sampled_kl_loss(logprob, ref, old_logprob=old, direction=DIRECTIONS[1])

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    leaves = [logprob.clone().requires_grad_() for _ in range(2)]
    values = both(leaves[0], ref, old), compiled(leaves[1], ref, old)
    assert torch.equal(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value.sum(), leaf)[0] for value, leaf in zip(values, leaves, strict=True)))
    meta = both(*(value.to("meta").requires_grad_(i == 0) for i, value in enumerate((logprob, ref, old))))
    meta.sum().backward()
    assert meta.shape == (4, 7)


# ---- errors


BOTH = (estimate_kl, sampled_kl_loss)
GOOD = {"logprob": torch.tensor([-1.0, -2.0]), "ref_logprob": torch.tensor([-1.5, -1.0])}


@pytest.mark.parametrize("functions, wrong, error, words", [
    (BOTH, {"logprob": [-1.0, -2.0]}, TypeError, "logprob: expected a float tensor.*got list"),
    (BOTH, {"ref_logprob": None}, TypeError, "ref_logprob: expected a float tensor.*got NoneType"),
    (BOTH, {"logprob": torch.tensor([1, 2])}, TypeError, "logprob: .*got torch.int64; pass the log-probabilities"),
    (BOTH, {"ref_logprob": torch.tensor([True, False])}, TypeError, "ref_logprob: .*got torch.bool"),
    (BOTH, {"ref_logprob": torch.zeros(2, dtype=torch.float64)}, TypeError, "ref_logprob: expected float64 like logprob or neither"),
    (BOTH, {"ref_logprob": torch.zeros(1)}, ValueError, r"ref_logprob: expected the shape of logprob, \(2,\).*got \(1,\)"),
    (BOTH, {"ref_logprob": torch.zeros(2, 1)}, ValueError, "ref_logprob: expected the shape"),
    (BOTH, {"ref_logprob": torch.zeros(2, device="meta")}, ValueError, "ref_logprob: expected the device of logprob, cpu, got meta"),
    (BOTH, {"clamp": 0.0}, ValueError, "clamp: expected a number above 0 and up to 50"),
    (BOTH, {"clamp": -1}, ValueError, "clamp: expected"),
    (BOTH, {"clamp": 50.1}, ValueError, "clamp: expected"),
    (BOTH, {"clamp": math.nan}, ValueError, "clamp: expected"),
    (BOTH, {"clamp": True}, TypeError, "clamp: expected a number or None, got bool"),
    (BOTH, {"clamp": torch.tensor(1.0)}, TypeError, r"clamp: .*pass float\(clamp\)"),
    (BOTH[:1], {"estimator": "k4"}, ValueError, "estimator: expected one of 'k1', 'k2', 'k3', 'abs', got 'k4'"),
    (BOTH[1:], {"direction": "reverse"}, ValueError, r"direction: expected one of 'policy\|\|reference', .*, got 'reverse'"),
    (BOTH[1:], {"old_logprob": torch.zeros(3)}, ValueError, "old_logprob: expected the shape of logprob"),
    (BOTH[1:], {"old_logprob": torch.zeros(2, dtype=torch.int64)}, TypeError, "old_logprob: .*got torch.int64"),
    (BOTH[1:], {"old_logprob": torch.zeros(2, requires_grad=True)}, ValueError, r"old_logprob: .*pass old_logprob.detach\(\)"),
])
def test_errors(functions, wrong, error, words) -> None:
    """With the argument's name, from both or from the one that has it."""
    for function in functions:
        with pytest.raises(error, match=words):
            function(**{**GOOD, **wrong})
