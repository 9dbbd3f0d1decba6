"""The controllers of beta: their rules, closed loops that settle, bounds, units, states that resume, and what they refuse."""

from __future__ import annotations

import copy
import json
import math
import pickle
import random

import numpy as np
import pytest
import torch

import fastkl
from fastkl.rl.beta import BOUNDS, AdaptiveBeta, FixedBeta, PIDBeta, PPOAdaptiveBeta

TARGET = 0.05
# Each with settings under which a closed loop reaches the target itself: PPO's rule stops anywhere in its band, so the band is narrow here.
TARGETED = {
    "adaptive": lambda **more: AdaptiveBeta(0.1, TARGET, 20, **more),
    "ppo": lambda **more: PPOAdaptiveBeta(0.1, TARGET, tolerance=1.05, factor=1.02, **more),
    "pid": lambda **more: PIDBeta(0.1, TARGET, **more),
    "pid with kd": lambda **more: PIDBeta(0.1, TARGET, kp=0.2, ki=0.02, kd=0.2, **more),
}
ALL = {"fixed": lambda: FixedBeta(0.1), **TARGETED}


@pytest.fixture(params=ALL.values(), ids=ALL)
def make(request: pytest.FixtureRequest):
    """Makes a controller with beta 0.1."""
    return request.param


@pytest.fixture(params=TARGETED.values(), ids=TARGETED)
def make_targeted(request: pytest.FixtureRequest):
    """Makes a controller with beta 0.1 and the target 0.05 per token."""
    return request.param


# ---- the rules


def test_fixed() -> None:
    """Whatever the KL, and 0 is a beta."""
    controller = FixedBeta(0.3)
    assert [controller.update(kl) for kl in (0.0, 1e-3, 1e6)] == [0.3] * 3 and controller.beta == 0.3
    assert FixedBeta(0).update(1.0, unit="sequence") == 0.0 and isinstance(FixedBeta(0).beta, float)


@pytest.mark.parametrize("kl, error", [(0.0, -0.2), (0.03, -0.2), (0.045, -0.1), (0.05, 0.0), (0.055, 0.1), (0.059, 0.18), (0.06, 0.2), (5.0, 0.2)])
def test_adaptive_is_zieglers_rule(kl, error) -> None:
    """beta · (1 + clip(kl/target - 1, ±0.2) · n/horizon), n = 1 unless given."""
    controller = AdaptiveBeta(0.1, 0.05, 1000)
    assert controller.update(kl, 64) == controller.beta == pytest.approx(0.1 * (1 + error * 0.064), rel=1e-14)
    assert AdaptiveBeta(0.1, 0.05, 10).update(kl) == pytest.approx(0.1 * (1 + error / 10), rel=1e-14)


@pytest.mark.parametrize("kl, factor", [(0.0, 0.5), (3.99, 0.5), (4.01, 1.0), (6.0, 1.0), (8.99, 1.0), (9.01, 2.0), (1e9, 2.0)])
def test_ppo_is_schulmans_rule(kl, factor) -> None:
    """Twice above 1.5·target, half below target/1.5, else the same; other factors and tolerances likewise."""
    assert PPOAdaptiveBeta(0.1, 6.0, unit="sequence").update(kl, unit="sequence") == 0.1 * factor
    kl, other = {0.5: (3.99, 1 / 3), 1.0: (4.01, 1.0), 2.0: (36.1, 3.0)}[factor]
    assert PPOAdaptiveBeta(0.1, 12.0, tolerance=3.0, factor=3.0).update(kl) == pytest.approx(0.1 * other, rel=1e-14)


def test_pid_is_the_textbooks_rule() -> None:
    """log(beta) = log(initial) + kp·e + ki·Σe + kd·Δe with e = log(kl/target) within ±1, on a sequence away from the bounds."""
    controller = PIDBeta(0.1, 2.0, "sequence", kp=0.4, ki=0.05, kd=0.2)
    total, previous = 0.0, None
    for kl in (2.0, 3.0, 1.5, 0.0, 100.0, 2.2, 2.0, 0.74, 5.43):
        error = max(-1.0, min(1.0, math.log(kl / 2.0) if kl else -math.inf))
        total += error
        change = error - previous if previous is not None else 0.0
        previous = error
        assert controller.update(kl, unit="sequence") == pytest.approx(0.1 * math.exp(0.4 * error + 0.05 * total + 0.2 * change), rel=1e-12)


def test_no_drift_at_the_target(make) -> None:
    """Fed the exact target, beta stays to the bit, however often; from a fresh controller and, but for kd's one echo, after other updates."""
    controller = make()
    assert [controller.update(TARGET, 7) for _ in range(1000)] == [0.1] * 1000
    for kl in (0.3, 0.01, 0.06):
        controller.update(kl)
    controller.update(TARGET), controller.update(TARGET)
    settled = controller.beta
    assert [controller.update(TARGET) for _ in range(1000)] == [settled] * 1000


def test_beta_rises_with_the_kl(make_targeted) -> None:
    """More beta for a KL above the target, less for one below; n scales the step of AdaptiveBeta alone."""
    assert make_targeted().update(2 * TARGET) > 0.1 > make_targeted().update(TARGET / 2)
    more, once = make_targeted().update(2 * TARGET, 4), make_targeted().update(2 * TARGET)
    assert more == pytest.approx(0.1 + 4 * (once - 0.1), rel=1e-12) if isinstance(make_targeted(), AdaptiveBeta) else more == once


# ---- in a loop


def closed_loop(controller, start: float, *, lag: float, noise: float = 0.0, updates: int = 1500, seed: int = 0) -> list[float]:
    """The true KL, begun and kept (at the first beta) at start·target: it follows c/beta with a first-order lag, and is measured with noise."""
    generator = random.Random(seed)
    kl, c, seen = start * controller.target, start * controller.target * controller.beta, []
    for _ in range(updates):
        kl += (c / controller.beta - kl) / lag
        seen.append(kl)
        controller.update(kl * math.exp(noise * generator.gauss(0, 1) - noise ** 2 / 2))
    return seen


@pytest.mark.parametrize("lag", [1, 10, 100])
@pytest.mark.parametrize("start", [10.0, 0.1], ids=["from 10x above", "from 10x below"])
def test_settles_at_the_target(make_targeted, start, lag) -> None:
    """Without noise the last 300 of 1500 updates all lie within 10 % of the target, having begun a factor of 10 away."""
    seen = closed_loop(make_targeted(), start, lag=lag)
    assert seen[0] == pytest.approx(start * TARGET)
    assert all(abs(kl / TARGET - 1) < 0.1 for kl in seen[-300:])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("start", [10.0, 0.1], ids=["from 10x above", "from 10x below"])
def test_settles_under_noise(make_targeted, start, seed) -> None:
    """With 20 % of noise on each measurement, the mean KL of the last 300 updates is within 10 % of the target, and none is 20 % off.

    The most noise that reaches beta is the PID's, 0.2·√((kp + kd)² + kd²) = 9 %; the lag of 10 averages it to 9 %·√(0.1/1.9) = 2 %. An
    integrator's wandering adds as much again.
    """
    seen = closed_loop(make_targeted(), start, lag=10, noise=0.2, seed=seed)[-300:]
    assert abs(sum(seen) / len(seen) / TARGET - 1) < 0.1
    assert all(0.8 < kl / TARGET < 1.2 for kl in seen)


@pytest.mark.parametrize("start", [10.0, 0.1], ids=["from 10x above", "from 10x below"])
def test_ppo_as_published_settles_in_its_band(start) -> None:
    """Tolerance 1.5 and factor 2: between target/1.5 and 1.5·target, wherever that is, where the KL follows at once."""
    seen = closed_loop(PPOAdaptiveBeta(0.1, TARGET), start, lag=1)[-300:]
    assert all(1 / 1.5 <= kl / TARGET <= 1.5 for kl in seen) and len(set(seen)) == 1


def test_pid_defaults_do_not_overshoot() -> None:
    """Where the KL follows within 1 or 10 updates: from above never below 0.95 of the target, from below never above 1.05, and there in 200."""
    for lag in (1, 10):
        above, below = (closed_loop(PIDBeta(0.1, TARGET), start, lag=lag) for start in (10.0, 0.1))
        assert min(above) > 0.95 * TARGET and max(below) < 1.05 * TARGET
        assert all(abs(kl / TARGET - 1) < 0.1 for kl in above[200:] + below[200:])


def test_gains_that_a_kl_without_lag_allows() -> None:
    """kp + ki/2 + 2·kd below 1 settles, above 1 swings for ever: the docstring's limit."""
    for kp, ki, kd in ((1.0, 0.02, 0.0), (0.01, 2.0, 0.0), (0.2, 0.1, 0.4)):
        for scale, settles in ((0.9, True), (1.1, False)):
            size = scale / (kp + ki / 2 + 2 * kd)
            seen = closed_loop(PIDBeta(0.1, TARGET, kp=size * kp, ki=size * ki, kd=size * kd), 1.5, lag=1)[-300:]
            assert all(abs(kl / TARGET - 1) < 0.01 for kl in seen) == settles


# ---- bounds


def test_bounds_hold(make_targeted) -> None:
    """Beta stops at the bounds, and a KL of 0 or beyond all measure is no error."""
    low, high = make_targeted(bounds=(0.05, 0.2)), make_targeted(bounds=(0.05, 0.2))
    for _ in range(2000):
        low.update(0.0), high.update(1e308)
    assert (low.beta, high.beta) == (0.05, 0.2)
    assert low.update(5e-324) == 0.05
    free = [make_targeted(), make_targeted()]
    for _ in range(4000):
        free[0].update(0.0), free[1].update(1e308)
    assert [controller.beta for controller in free] == list(BOUNDS)


def test_no_windup(make_targeted) -> None:
    """However long at a bound, beta leaves it with the first KL of the other side, as far as from a bound just reached."""
    for stuck, other in ((10 * TARGET, TARGET / 2), (0.0, 2 * TARGET)):
        left = []
        for updates in (300, 3000):
            controller = make_targeted(bounds=(0.05, 0.2))
            for _ in range(updates):
                controller.update(stuck)
            at_bound = controller.beta
            left.append(controller.update(other))
            assert at_bound in (0.05, 0.2) and left[-1] != at_bound
        assert left[0] == left[1]


# ---- states


def test_copies(make) -> None:
    """deepcopy and pickle give controllers that go on alone, and alike."""
    controller = make()
    controller.update(0.2)
    copies = [copy.deepcopy(controller), pickle.loads(pickle.dumps(controller))]
    before = controller.beta
    expected = [controller.update(kl) for kl in (0.2, 0.01, 0.07)]
    for each in copies:
        assert each.beta == before and [each.update(kl) for kl in (0.2, 0.01, 0.07)] == expected


def test_resume(make) -> None:
    """A state kept as JSON and loaded into a new controller mid-run gives the same betas to the bit as the run without a stop."""
    generator = random.Random(1)
    measured = [TARGET * math.exp(generator.gauss(0.5, 1)) for _ in range(60)]
    whole = make()
    expected = [whole.update(kl, 3) for kl in measured]
    for stop in (0, 1, 30):
        first, second = make(), make()
        for kl in measured[:stop]:
            first.update(kl, 3)
        second.update(1.0)  # a state of its own, which must go
        state = first.state_dict()
        second.load_state_dict(json.loads(json.dumps(state)))
        assert second.state_dict() == state and second.beta == first.beta
        assert [second.update(kl, 3) for kl in measured[stop:]] == expected[stop:]
        assert state == (make().state_dict() if stop == 0 else state), "a state is a copy"


def test_states_that_are_refused(make) -> None:
    """Another class's or unit's, incomplete, with more in it, with impossible numbers: an error each, and nothing changes."""
    controller = make()
    controller.update(0.2)
    good = controller.state_dict()
    assert all(value is None or type(value) in (str, float) for value in good.values()) and {"class", "unit", "beta"} <= good.keys()
    wrong = [{}, None, [], {**good, "more": 1.0}, {**good, "class": "Other"}, {**good, "unit": "sequence"}]
    wrong += [{**good, "unit": value} for value in (3, np.array(["token", "token"]))]
    wrong += [{key: value for key, value in good.items() if key != missing} for missing in good]
    wrong += [{**good, "beta": beta} for beta in (math.nan, math.inf, -0.1, None, "0.1", True)]
    for state in wrong:
        with pytest.raises((ValueError, TypeError), match="state"):
            controller.load_state_dict(state)
        assert controller.state_dict() == good
    others = [other for other in (build() for build in ALL.values()) if type(other) is not type(controller)]
    for other in others:
        with pytest.raises(ValueError, match=f"state: expected class '{type(controller).__name__}', got '{type(other).__name__}'"):
            controller.load_state_dict(other.state_dict())


def test_states_out_of_bounds() -> None:
    """A beta, or an integral part, that the bounds do not allow is refused, the other entries unharmed."""
    for build in (lambda bounds: AdaptiveBeta(0.1, TARGET, 10, bounds=bounds), lambda bounds: PIDBeta(0.1, TARGET, bounds=bounds)):
        wide, narrow = build((1e-3, 10.0)), build((0.09, 0.11))
        for _ in range(100):
            wide.update(1.0)
        before = narrow.state_dict()
        with pytest.raises(ValueError, match=r"state\['beta'\]: expected a beta within bounds, 0.09 … 0.11"):
            narrow.load_state_dict(wide.state_dict())
        assert narrow.state_dict() == before
    controller = PIDBeta(0.1, TARGET)
    before = controller.state_dict()
    for wrong in ({"settled": 1e9}, {"previous": math.nan}, {"previous": math.inf}, {"previous": 1e9}, {"previous": -2.0}):
        with pytest.raises(ValueError, match=rf"state\['{next(iter(wrong))}'\]"):
            controller.load_state_dict({**before, "beta": 0.2, **wrong})
        assert controller.state_dict() == before, "the good entries were loaded all the same"


def test_a_state_brings_its_beta() -> None:
    """That of the run that is resumed, whatever the constructor was given."""
    controller = FixedBeta(0.3)
    controller.load_state_dict(FixedBeta(0.1).state_dict())
    assert controller.beta == 0.1


@pytest.mark.parametrize("controller, settings", [
    (FixedBeta(0.1), ""),
    (AdaptiveBeta(0.1, 6, 100, "sequence"), ", target=6.0, bounds=(1e-06, 1000.0), horizon=100.0, unit='sequence'"),
    (PPOAdaptiveBeta(0.1, 6, bounds=(0.1, 1.0)), ", target=6.0, bounds=(0.1, 1.0), tolerance=1.5, factor=2.0, unit='token'"),
    (PIDBeta(0.1, 6, ki=0.5), ", target=6.0, bounds=(1e-06, 1000.0), kp=0.3, ki=0.5, kd=0.0, unit='token'"),
], ids=lambda value: type(value).__name__)
def test_repr(controller, settings) -> None:
    """beta as it is now, and the settings."""
    controller = copy.deepcopy(controller)
    controller.update(100.0, 5, unit=getattr(controller, "unit", None))
    assert repr(controller) == f"{type(controller).__name__}(beta={controller.beta}{settings})"


# ---- what update takes and refuses


def test_kinds_of_numbers(make) -> None:
    """Python, numpy and tensors of one entry of any type, with and without gradient; beta stays a float of Python."""
    one = torch.tensor(1.0, requires_grad=True)
    for kl, n in ((1, 2), (np.float32(1), np.int64(2)), (one, torch.tensor(2)), (one.bfloat16(), 2.0), (one.view(1, 1), torch.ones(1) * 2)):
        controller = make()
        assert controller.update(kl, n) == make().update(1.0, 2) and type(controller.beta) is float


@pytest.mark.parametrize("kl, n, error, words", [
    (math.nan, 1, ValueError, "kl: expected a finite number, got nan; pass the mean"),
    (-math.inf, 1, ValueError, "kl: expected a finite number, got -inf; pass the mean"),
    (math.inf, 1, ValueError, "kl: expected a finite number"),
    (torch.tensor(math.nan), 1, ValueError, "kl: expected a finite number"),
    ("0.1", 1, TypeError, "kl: expected a finite number, got str; pass the mean"),
    (None, 1, TypeError, "kl: expected .*got NoneType; pass the mean"),
    (True, 1, TypeError, "kl: expected .*got bool"),
    (torch.ones(2), 1, ValueError, r"kl: expected .*got a tensor of shape \(2,\); .*pass the mean"),
    (torch.ones(1, dtype=torch.complex64), 1, TypeError, "kl: expected .*got torch.complex64 tensor"),
    (0.1, 0, ValueError, "n: expected a finite number above 0, got 0"),
    (0.1, -1, ValueError, "n: expected a finite number above 0"),
    (0.1, math.nan, ValueError, "n: expected a finite number above 0"),
    (0.1, "1", TypeError, "n: expected a finite number above 0, got str; n is"),
])
def test_updates_that_are_refused(make, kl, n, error, words) -> None:
    """An error with the argument's name, and the controller as it was."""
    controller = make()
    controller.update(0.2)
    before = controller.state_dict()
    with pytest.raises(error, match=words):
        controller.update(kl, n)
    assert controller.state_dict() == before


def test_units(make_targeted) -> None:
    """A unit that is given must be the controller's; a name that is none is refused everywhere."""
    controller = make_targeted()
    assert controller.unit == "token" and make_targeted(unit="sequence").unit == "sequence"
    assert make_targeted().update(0.2, unit="token") == make_targeted().update(0.2)
    with pytest.raises(ValueError, match="kl: expected the mean KL per token, got per sequence; pass what the target is"):
        controller.update(6.0, unit="sequence")
    with pytest.raises(ValueError, match="kl: expected the mean KL per sequence, got per token"):
        make_targeted(unit="sequence").update(6.0, unit="token")
    assert controller.beta == 0.1
    for each in (controller, FixedBeta(0.1)):
        with pytest.raises(ValueError, match="unit: expected one of 'token', 'sequence', got 'batch'"):
            each.update(0.2, unit="batch")


def test_n_that_would_take_beta_below_zero() -> None:
    """Ziegler's rule breaks down at n = 5·horizon; below it beta stays positive and is the rule's."""
    controller = AdaptiveBeta(0.1, 0.05, 100)
    assert controller.update(0.0, 499) == pytest.approx(0.1 * (1 - 0.2 * 4.99))
    for kl in (0.0, 0.05, 1.0):
        with pytest.raises(ValueError, match="n: expected fewer samples than 5 horizons, 500, got 500"):
            controller.update(kl, 500)


@pytest.mark.parametrize("build, error, words", [
    (lambda: FixedBeta(-0.1), ValueError, "beta: expected a finite number of at least 0, got -0.1; a negative beta"),
    (lambda: FixedBeta(math.nan), ValueError, "beta: expected"),
    (lambda: FixedBeta("0.1"), TypeError, "beta: expected a finite number of at least 0, got str; a negative"),
    (lambda: AdaptiveBeta(0.0, 6, 100), ValueError, "initial: expected a finite number above 0"),
    (lambda: AdaptiveBeta(0.1, 0.0, 100), ValueError, "target: expected a finite number above 0"),
    (lambda: AdaptiveBeta(0.1, math.inf, 100), ValueError, "target: expected a finite number above 0"),
    (lambda: AdaptiveBeta(0.1, 6, 0), ValueError, "horizon: expected a finite number above 0"),
    (lambda: AdaptiveBeta(0.1, 6, -5), ValueError, "horizon: expected a finite number above 0"),
    (lambda: AdaptiveBeta(0.1, 6, None), TypeError, "horizon: expected a finite number above 0, got NoneType; pass how many"),
    (lambda: AdaptiveBeta(0.1, 6, 100, "batch"), ValueError, "unit: expected one of 'token', 'sequence', got 'batch'"),
    (lambda: AdaptiveBeta(0.1, 6, 100, bounds=(0.2, 1.0)), ValueError, "initial: expected a beta within bounds, 0.2 … 1, got 0.1"),
    (lambda: AdaptiveBeta(0.1, 6, 100, bounds=(1.0, 0.01)), ValueError, r"bounds: expected the lower one first, got \(1, 0.01\); swap"),
    (lambda: AdaptiveBeta(0.1, 6, 100, bounds=(0.0, 1.0)), ValueError, "bounds: expected a finite number above 0"),
    (lambda: AdaptiveBeta(0.1, 6, 100, bounds=0.5), TypeError, r"bounds: expected a pair \(lowest beta, highest beta\), got float; pass"),
    (lambda: PPOAdaptiveBeta(0.1, -1.0), ValueError, "target: expected a finite number above 0"),
    (lambda: PPOAdaptiveBeta(0.1, 6, tolerance=0.9), ValueError, "tolerance: expected a finite number of at least 1"),
    (lambda: PPOAdaptiveBeta(0.1, 6, factor=1.0), ValueError, "factor: expected a finite number above 1"),
    (lambda: PIDBeta(0.1, 0), ValueError, "target: expected a finite number above 0"),
    (lambda: PIDBeta(0.1, 6, kp=-0.1), ValueError, "kp: expected a finite number of at least 0, up to 100, got -0.1"),
    (lambda: PIDBeta(0.1, 6, ki=0.0), ValueError, "ki: expected a finite number above 0, up to 100, got 0"),
    (lambda: PIDBeta(0.1, 6, kd=1e3), ValueError, "kd: expected a finite number of at least 0, up to 100, got 1000"),
])
def test_settings_that_are_refused(build, error, words) -> None:
    """Each at the constructor, with the argument's name."""
    with pytest.raises(error, match=words):
        build()


def test_extreme_settings_stay_finite() -> None:
    """The largest gains and factors meet the bounds, not an overflow."""
    for controller in (PIDBeta(0.1, 6, kp=100, ki=100, kd=100), PPOAdaptiveBeta(0.1, 6, factor=1e308), AdaptiveBeta(0.1, 1e-300, 1e-300)):
        n = 1e-300 if isinstance(controller, AdaptiveBeta) else 1
        for kl in (1e308, 0.0, 1e308):
            assert BOUNDS[0] <= controller.update(kl, n) <= BOUNDS[1]


def test_the_penalty_reads_the_controller(make) -> None:
    """KLPenalty(controller) weighs with beta as it is at each call; beta itself is not to be written."""
    controller = make()
    penalty = fastkl.KLPenalty(controller)
    policy, ref = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 1.0, 1.0]])
    for _ in range(3):
        loss = penalty(policy, ref)
        assert float(loss) == pytest.approx(controller.beta * float(penalty.last["kl"]), rel=1e-6)
        controller.update(penalty.last["kl"], unit="token")
    assert (controller.beta == 0.1) == isinstance(controller, FixedBeta)
    with pytest.raises(AttributeError):
        controller.beta = 1.0
