"""The controllers of beta: rules, closed loops that settle, bounds, states and wrong arguments."""

from __future__ import annotations

import math
import random
from functools import partial

import numpy as np
import pytest
import torch

from fastkl.rl import AdaptiveBeta, FixedBeta, PIDBeta, PPOAdaptiveBeta
from fastkl.rl.beta import BOUNDS

TARGET = 0.05
# Settings under which a closed loop reaches the target itself: PPO's rule stops anywhere in its
# band, so the band is narrow here.
TARGETED = {
    "adaptive": lambda **more: AdaptiveBeta(0.1, TARGET, 20, **more),
    "ppo": lambda **more: PPOAdaptiveBeta(0.1, TARGET, tolerance=1.05, factor=1.02, **more),
    "pid": lambda **more: PIDBeta(0.1, TARGET, **more),
    "pid with kd": lambda **more: PIDBeta(0.1, TARGET, kp=0.2, ki=0.02, kd=0.2, **more),
}
ALL = {"fixed": lambda: FixedBeta(0.1), **TARGETED}
every = pytest.mark.parametrize("make", ALL.values(), ids=ALL)
targeted = pytest.mark.parametrize("make", TARGETED.values(), ids=TARGETED)
from_both_sides = pytest.mark.parametrize("start", [10.0, 0.1], ids=["from above", "from below"])


# ---- the rules


# A mean of k1 may be negative, and counts as a KL of 0.
ERRORS = {
    -1e300: -0.2,
    -0.5: -0.2,
    0.0: -0.2,
    0.03: -0.2,
    0.045: -0.1,
    0.05: 0.0,
    0.055: 0.1,
    0.06: 0.2,
    5.0: 0.2,
}
FACTORS = {-0.5: 0.5, 0.0: 0.5, 3.99: 0.5, 4.01: 1.0, 6.0: 1.0, 8.99: 1.0, 9.01: 2.0, 1e9: 2.0}
ZIEGLER, BAND = partial(AdaptiveBeta, 0.1, 0.05, 1000), {3.99: 1 / 3, 4.01: 1.0, 36.1: 3.0}
WIDE = partial(PPOAdaptiveBeta, 0.1, 12.0, tolerance=3.0, factor=3.0)
RULES = [
    *((ZIEGLER, kl, 64, 1 + error * 0.064) for kl, error in ERRORS.items()),
    (ZIEGLER, 5.0, 1, 1 + 0.2 / 1000),
    (ZIEGLER, 0.0, 4990, 1 - 0.2 * 4.99),
    (partial(AdaptiveBeta, 0.1, 1e6, 1000), -0.5, 64, 1 - 0.2 * 0.064),
    *((partial(PPOAdaptiveBeta, 0.1, 6.0), kl, 1, factor) for kl, factor in FACTORS.items()),
    *((WIDE, kl, 1, factor) for kl, factor in BAND.items()),
    (partial(PIDBeta, 0.1, 6.0), -0.5, 1, math.exp(-0.33)),
    *((partial(FixedBeta, 0.1), kl, 64, 1.0) for kl in (-5.0, 0.0, 1e6)),
]


@pytest.mark.parametrize("make, kl, n, factor", RULES)
def test_rules(make, kl, n, factor) -> None:
    """The published ones, for numbers and tensors of one entry of any type."""
    controller = make()
    assert controller.update(kl, n) == controller.beta == pytest.approx(0.1 * factor, rel=1e-13)
    one = torch.tensor([[kl]], dtype=torch.float64, requires_grad=True)
    for measured, samples in ((one, torch.tensor(n)), (np.float64(kl), np.int64(n))):
        assert (
            make().update(measured, samples) == controller.beta and type(controller.beta) is float
        )


def test_pid_is_the_textbooks_rule() -> None:
    """log(beta) = log(initial) + kp·e + ki·Σe + kd·Δe with e = log(kl/target) within ±1, away from
    the bounds.
    """
    controller = PIDBeta(0.1, 2.0, "sequence", kp=0.4, ki=0.05, kd=0.2)
    total, previous = 0.0, 0.0
    for kl in (2.0, 3.0, 1.5, 0.0, 100.0, 2.2, 2.0, 0.74, 5.43):
        error = max(-1.0, min(1.0, math.log(kl / 2.0) if kl else -math.inf))
        total += error
        exact = 0.1 * math.exp(0.4 * error + 0.05 * total + 0.2 * (error - previous))
        assert controller.update(kl, unit="sequence") == pytest.approx(exact, rel=1e-12)
        previous = error


@every
def test_no_drift_at_the_target(make) -> None:
    """Beta stays to the bit, from a fresh controller and, but for kd's one echo, after other
    updates.
    """
    controller = make()
    assert {controller.update(TARGET, 7) for _ in range(1000)} == {0.1}
    for kl in (0.3, 0.01, 0.06, TARGET):
        controller.update(kl)
    assert len({controller.update(TARGET) for _ in range(1000)}) == 1


# ---- in a loop


def closed_loop(
    controller, start: float, lag: float, noise: float = 0.0, seed: int = 0
) -> list[float]:
    """Returns the true KL of 1500 updates, start·target at first: it follows c/beta with a lag, and
    is measured with noise.
    """
    generator = random.Random(seed)
    kl, seen = start * controller.target, []
    c = kl * controller.beta
    for _ in range(1500):
        kl += (c / controller.beta - kl) / lag
        seen.append(kl)
        controller.update(kl * math.exp(noise * generator.gauss(0, 1) - noise**2 / 2))
    return seen


@pytest.mark.parametrize(
    "lag, noise, seed",
    [(1, 0, 0), (10, 0, 0), (100, 0, 0), *((10, 0.2, seed) for seed in range(3))],
)
@from_both_sides
@targeted
def test_settles_at_the_target(make, start, lag, noise, seed) -> None:
    """The last 300 updates lie within 10 % of the target, with noise their mean does.

    The most noise that reaches beta is the PID's, 0.2·√((kp + kd)² + kd²) = 9 %; the lag of 10
    averages it to 9 %·√(0.1/1.9) = 2 %. An integrator's wandering adds as much again.
    """
    seen = closed_loop(make(), start, lag, noise, seed)[-300:]
    assert abs(sum(seen) / len(seen) / TARGET - 1) < 0.1
    assert all(abs(kl / TARGET - 1) < (0.2 if noise else 0.1) for kl in seen)


@from_both_sides
def test_defaults_in_a_loop(start) -> None:
    """PPO's band holds a KL that follows at once; PID's defaults do not overshoot, and are there in
    200 updates.
    """
    seen = closed_loop(PPOAdaptiveBeta(0.1, TARGET), start, 1)[-300:]
    assert 1 / 1.5 <= seen[0] / TARGET <= 1.5 and len(set(seen)) == 1
    for lag in (1, 10):
        seen = [kl / TARGET for kl in closed_loop(PIDBeta(0.1, TARGET), start, lag)]
        assert min(seen) > 0.95 if start > 1 else max(seen) < 1.05
        assert all(abs(kl - 1) < 0.1 for kl in seen[200:])


@pytest.mark.parametrize("scale, settles", [(0.9, True), (1.1, False)])
@pytest.mark.parametrize("gains", [(1.0, 0.02, 0.0), (0.01, 2.0, 0.0), (0.2, 0.1, 0.4)], ids=str)
def test_gains_that_a_kl_without_lag_allows(gains, scale, settles) -> None:
    """kp + ki/2 + 2·kd below 1 settles, above 1 swings for ever: the docstring's limit."""
    kp, ki, kd = (gain * scale / (gains[0] + gains[1] / 2 + 2 * gains[2]) for gain in gains)
    seen = closed_loop(PIDBeta(0.1, TARGET, kp=kp, ki=ki, kd=kd), 1.5, 1)[-300:]
    assert all(abs(kl / TARGET - 1) < 0.01 for kl in seen) == settles


# ---- bounds


@pytest.mark.parametrize("kl, end", [(0.0, 0), (5e-324, 0), (1e308, 1)])
@pytest.mark.parametrize("bounds", [(0.05, 0.2), BOUNDS], ids=str)
@targeted
def test_bounds_hold(make, bounds, kl, end) -> None:
    """Beta stops at a bound, and leaves it with the first KL of the other side, as far as from a
    bound just reached.
    """
    controller, left = make(bounds=bounds), []
    for updates in (4000, 1000):
        for _ in range(updates):
            controller.update(kl)
        assert controller.beta == bounds[end]
        left.append(controller.update(TARGET / 2 if end else 2 * TARGET))
    assert left[0] == pytest.approx(left[1], rel=1e-12) and left[0] != bounds[end]


@pytest.mark.parametrize(
    "make",
    [
        lambda: PIDBeta(0.1, 6, kp=100, ki=100, kd=100),
        lambda: PPOAdaptiveBeta(0.1, 6, factor=1e308),
        lambda: AdaptiveBeta(0.1, 1e-300, 1e-300),
    ],
)
def test_extreme_settings_stay_finite(make) -> None:
    controller = make()
    for kl in (1e308, 0.0, 1e308):
        assert BOUNDS[0] <= controller.update(kl, getattr(controller, "horizon", 1)) <= BOUNDS[1]
