"""Controllers of beta, the weight of the KL penalty: fixed, Ziegler's, PPO's and PID.

All have a state; controllers with a target also have its unit and bounds of beta.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from . import _checks
from .controller import BOUNDS, Controller, TargetedController, Unit, positive


class FixedBeta(Controller):
    """A constant beta; `update` checks its arguments and returns beta.

    To change beta in a resumed run, do not call load_state_dict.

    Args:
        beta: a finite number ≥ 0.

    Raises TypeError and ValueError for any other value.
    """

    def __init__(self, beta: float) -> None:
        super().__init__(
            _checks.number(
                "beta",
                beta,
                "a finite number of at least 0",
                lambda x: 0 <= x < math.inf,
                "a negative beta would reward divergence; pass 0.05, for instance",
            ),
            None,
        )


class AdaptiveBeta(TargetedController):
    """Ziegler's proportional controller.

    Equivalent to

        error = min(max(kl / target - 1, -0.2), 0.2)
        beta = beta * (1 + error * n / horizon)

    within bounds. Over one horizon of samples beta changes by at most 20 % (by a factor of
    e^0.2 = 1.22 if many small updates compound).

    Args:
        initial: the first beta.
        target: the KL to hold, nats per `unit`; common targets are 6 per sequence or 0.1 per token.
        horizon: the number of samples, in the unit of update's n (1 per update by default), over
            which beta may change by 20 %.
        unit: "token" or "sequence"; with "sequence", update requires unit="sequence" if kl is a
            number.
        bounds: the lowest and the highest beta.

    Raises TypeError and ValueError for invalid numbers; update also for n ≥ 5·horizon, where the
    rule could make beta 0 or negative.

    Source: Ziegler et al., Fine-Tuning Language Models from Human Preferences (2019), section 2.2,
    with a constant gain of 0.1 in place of n / horizon. The gain n / horizon, with the batch's
    samples as n, is that of their released code: openai/lm-human-preferences, AdaptiveKLController.
    """

    def __init__(
        self,
        initial: float,
        target: float,
        horizon: float,
        unit: Unit = "token",
        *,
        bounds: tuple[float, float] = BOUNDS,
    ) -> None:
        super().__init__(initial, target, unit, bounds)
        self.horizon = positive(
            "horizon", horizon, "pass how many samples it takes beta to change by 20 %"
        )

    def _advance(self, kl: float, n: float) -> None:
        _checks.expect(
            n < 5 * self.horizon,
            "n",
            f"fewer samples than 5 horizons, {5 * self.horizon:g}",
            n,
            "more could take beta below 0 in one update; count horizon in the unit of n",
        )
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self._beta = self._clip(self._beta * (1 + error * n / self.horizon))


class PPOAdaptiveBeta(TargetedController):
    """The PPO paper's rule: beta changes by a factor while the KL is outside a band around the
    target.

    Equivalent to

        if kl > tolerance * target: beta = beta * factor
        if kl < target / tolerance: beta = beta / factor

    within bounds. It keeps the KL inside the band, not at the target; with a factor above
    tolerance² beta may oscillate across the band forever.

    Args:
        initial, target, unit, bounds: as AdaptiveBeta.
        tolerance: above 1 (or 1: no band).
        factor: above 1.

    Raises TypeError and ValueError for invalid numbers.
    Source: Schulman et al., Proximal Policy Optimization Algorithms (2017), section 4.
    """

    def __init__(
        self,
        initial: float,
        target: float,
        unit: Unit = "token",
        *,
        tolerance: float = 1.5,
        factor: float = 2.0,
        bounds: tuple[float, float] = BOUNDS,
    ) -> None:
        super().__init__(initial, target, unit, bounds)
        self.tolerance = _checks.number(
            "tolerance",
            tolerance,
            "a finite number of at least 1",
            lambda x: 1 <= x < math.inf,
            "the band is target / tolerance … target · tolerance",
        )
        self.factor = _checks.number(
            "factor",
            factor,
            "a finite number above 1",
            lambda x: 1 < x < math.inf,
            "beta is multiplied by it where the KL is too large",
        )

    def _advance(self, kl: float, n: float) -> None:
        if kl > self.tolerance * self.target:
            self._beta = self._clip(self._beta * self.factor)
        elif kl < self.target / self.tolerance:
            self._beta = self._clip(self._beta / self.factor)


class PIDBeta(TargetedController):
    """A PID controller of log(beta) on the error log(kl / target), so equal factors of the KL count
    the same on both sides of the target.

    Equivalent to

        error = math.log(min(max(kl / target, 1 / math.e), math.e))
        settled = settled * math.exp(ki * error)        # the integral part, `initial` at first
        beta = settled * math.exp(kp * error + kd * (error - previous_error))

    with `settled` and beta within bounds, and no difference term at the first update. The bounds of
    `settled` prevent windup: however long beta was at a bound, it leaves the bound at the first
    error of the opposite sign.

    Args:
        initial, target, unit, bounds: as AdaptiveBeta.
        kp, ki, kd: gains from 0 to 100; ki must be above 0, otherwise the target is not reached.
            The defaults suit a KL that follows beta within about 10 updates, and settle from 1 to
            100. A KL proportional to 1/beta without delay oscillates forever unless
            kp + ki/2 + 2·kd < 1. kd amplifies the noise of the KL.

    Raises TypeError and ValueError for invalid numbers.
    Source: Åström and Murray, Feedback Systems, first edition (2008), chapter 10, for the
    controller and its windup.
    """

    def __init__(
        self,
        initial: float,
        target: float,
        unit: Unit = "token",
        *,
        kp: float = 0.3,
        ki: float = 0.03,
        kd: float = 0.0,
        bounds: tuple[float, float] = BOUNDS,
    ) -> None:
        super().__init__(initial, target, unit, bounds)
        gain, moves = "a number from 0 to 100", "it is how much log(beta) moves with the error"
        self.kp = _checks.number("kp", kp, gain, lambda x: 0 <= x <= 100, moves)
        self.ki = _checks.number(
            "ki",
            ki,
            "a number above 0, up to 100",
            lambda x: 0 < x <= 100,
            "without it the target is not reached",
        )
        self.kd = _checks.number("kd", kd, gain, lambda x: 0 <= x <= 100, f"{moves}'s change")
        self._settled = self._beta
        self._previous: float | None = None

    def _possible(self) -> dict[str, Callable[[Any], bool]]:
        return {
            **super()._possible(),
            "settled": partial(_checks.within, *self.bounds),
            "previous": lambda value: value is None or _checks.within(-1, 1, value),
        }

    def _advance(self, kl: float, n: float) -> None:
        error = math.log(min(max(kl / self.target, 1 / math.e), math.e))
        change = 0.0 if self._previous is None else error - self._previous
        self._settled = self._clip(self._settled * math.exp(self.ki * error))
        self._beta = self._clip(self._settled * math.exp(self.kp * error + self.kd * change))
        self._previous = error
