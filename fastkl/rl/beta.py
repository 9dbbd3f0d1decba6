"""Controllers of beta, the weight of the KL penalty: fixed, Ziegler's, PPO's and a PID controller, all with bounds, declared units and a state."""

from __future__ import annotations

import abc
import math
import numbers

import torch

from .. import _checks

UNITS = ("token", "sequence")
BOUNDS = (1e-6, 1e3)


class _Controller(abc.ABC):
    """What all controllers share: beta, the checks of an update, and the state."""

    _STATE = ("beta",)  # what state_dict holds beside the class and the unit: the attributes of these names with an underscore before

    def __init__(self, beta: float, unit: str | None) -> None:
        self._beta = beta
        self._unit = unit

    @property
    def beta(self) -> float:
        """The weight as it is now; update and load_state_dict change it."""
        return self._beta

    def update(self, kl: float | torch.Tensor, n: float = 1, *, unit: str | None = None) -> float:
        """Take in a measured KL and return the new beta.

        Args:
            kl: the mean KL in nats, per token or per sequence as the controller's target: a number ≥ 0, or a tensor of one, for which this
                waits for the device, as float(kl) does.
            n: how many samples the KL is the mean of, in the unit of `horizon`. AdaptiveBeta uses it; the others check it.
            unit: "token" or "sequence", what kl is a mean over, if it is to be checked against the controller's.

        Raises:
            TypeError for what is not a number. ValueError for a KL that is negative or not finite, n ≤ 0, and another unit than the
            controller's. beta and the state then stay as they were.
        """
        kl = _number("kl", kl, least=0.0, remedy="an exact KL is never negative, nor is the 'k3' of estimate_kl; leave out a batch without one")
        n = _number("n", n, above=0.0, remedy="n is how many samples the KL is the mean of")
        if unit is not None:
            _checks.choice("unit", unit, UNITS)
        if unit is not None and self._unit is not None and unit != self._unit:
            raise ValueError(f"kl: expected the mean KL per {self._unit}, got per {unit}; pass what the target is a mean over, or make the "
                             f"controller with unit={unit!r} and a target to match")
        self._advance(kl, n)
        return self._beta

    def state_dict(self) -> dict[str, object]:
        """What changes in training, as a plain dict of numbers and strings that JSON keeps exactly; the settings come from the constructor."""
        return {"class": type(self).__name__, "unit": self._unit, **{name: getattr(self, f"_{name}") for name in self._STATE}}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on from a state_dict of the same class and unit; raises ValueError or TypeError, and changes nothing, for any other."""
        if not isinstance(state, dict):
            raise TypeError(f"state: expected a dict, got {type(state).__name__}; pass what state_dict() returned")
        mine = self.state_dict()
        for name in ("class", "unit"):
            if name in state and state[name] != mine[name]:
                raise ValueError(f"state: expected {name} {mine[name]!r}, got {state[name]!r}; load it into one like that it came from")
        if state.keys() != mine.keys():
            raise ValueError(f"state: expected the entries {', '.join(sorted(mine))}, got {', '.join(sorted(map(str, state))) or 'none'}; "
                             f"pass what state_dict() returned")
        values = {name: self._checked(name, state[name]) for name in self._STATE}
        for name, value in values.items():
            setattr(self, f"_{name}", value)

    def _checked(self, name: str, value: object) -> float | None:
        """An entry of a state, if it may be one."""
        return _number(f"state[{name!r}]", value, least=0.0, remedy="pass what state_dict() returned")

    @abc.abstractmethod
    def _advance(self, kl: float, n: float) -> None:
        """Set _beta from a checked KL."""


class FixedBeta(_Controller):
    """A beta that stays: `update` checks its arguments and returns it.

    Args:
        beta: a finite number ≥ 0.

    Raises TypeError and ValueError for another.
    """

    def __init__(self, beta: float) -> None:
        super().__init__(_number("beta", beta, least=0.0, remedy="a negative beta would reward divergence"), None)

    def _advance(self, kl: float, n: float) -> None:
        pass


class _TargetedBeta(_Controller):
    """A controller that steers the KL to a target, with beta within bounds."""

    def __init__(self, initial: float, target: float, unit: str, bounds: tuple[float, float]) -> None:
        _checks.choice("unit", unit, UNITS)
        if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
            raise TypeError(f"bounds: expected a pair (lowest beta, highest beta), got {bounds!r}")
        low, high = (_number("bounds", value, above=0.0, remedy="beta moves by factors, which never leave 0") for value in bounds)
        if low > high:
            raise ValueError(f"bounds: expected the lower one first, got ({low:g}, {high:g})")
        self.bounds = (low, high)
        self.target = _number("target", target, above=0.0, remedy="a KL in nats; for no penalty at all use FixedBeta(0)")
        super().__init__(self._within("initial", _number("initial", initial, above=0.0, remedy="beta moves by factors, which never leave 0")), unit)

    @property
    def unit(self) -> str:
        """What the target is a mean over: "token" or "sequence"."""
        return self._unit

    def _within(self, name: str, value: float) -> float:
        low, high = self.bounds
        if not low <= value <= high:
            raise ValueError(f"{name}: expected a beta within bounds, {low:g} … {high:g}, got {value:g}; pass other bounds=(lowest, highest)")
        return value

    def _checked(self, name: str, value: object) -> float | None:
        return self._within(f"state[{name!r}]", super()._checked(name, value))

    def _clip(self, value: float) -> float:
        return min(max(value, self.bounds[0]), self.bounds[1])


class AdaptiveBeta(_TargetedBeta):
    """Ziegler's proportional controller.

    Equivalent to

        error = min(max(kl / target - 1, -0.2), 0.2)
        beta = beta * (1 + error * n / horizon)

    within bounds: over a horizon's worth of samples beta changes by 20 % at most (e^0.2 = 1.22 where many small updates compound).

    Args:
        initial: beta to begin with.
        target: the KL to hold, nats per `unit`: trainers commonly hold 6 per sequence, or 0.1 per token.
        horizon: in the unit of update's n, which is 1 per update unless given.
        unit: "token" or "sequence".
        bounds: the lowest and the highest beta.

    Raises TypeError and ValueError for other numbers; update also for n ≥ 5·horizon, where the rule would make beta 0 or negative.
    Source: Ziegler et al., Fine-Tuning Language Models from Human Preferences (2019), section 2.2.
    """

    def __init__(self, initial: float, target: float, horizon: float, unit: str = "token", *, bounds: tuple[float, float] = BOUNDS) -> None:
        super().__init__(initial, target, unit, bounds)
        self.horizon = _number("horizon", horizon, above=0.0, remedy="how many samples it takes beta to change by 20 %")

    def _advance(self, kl: float, n: float) -> None:
        if n >= 5 * self.horizon:
            raise ValueError(f"n: expected fewer samples than 5 horizons, {5 * self.horizon:g}, got {n:g}: one update could take beta below 0; "
                             f"count horizon in the unit of n")
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self._beta = self._clip(self._beta * (1 + error * n / self.horizon))


class PPOAdaptiveBeta(_TargetedBeta):
    """The rule of the PPO paper: beta times or by a factor while the KL is outside a band around the target.

    Equivalent to

        if kl > tolerance * target: beta = beta * factor
        if kl < target / tolerance: beta = beta / factor

    within bounds. It holds the KL somewhere in the band, not at the target; a factor above tolerance² may jump over the band for ever.

    Args:
        initial, target, unit, bounds: as AdaptiveBeta.
        tolerance: above 1 (or 1: no band). factor: above 1.

    Raises TypeError and ValueError for other numbers.
    Source: Schulman et al., Proximal Policy Optimization Algorithms (2017), section 4.
    """

    def __init__(self, initial: float, target: float, unit: str = "token", *, tolerance: float = 1.5, factor: float = 2.0,
                 bounds: tuple[float, float] = BOUNDS) -> None:
        super().__init__(initial, target, unit, bounds)
        self.tolerance = _number("tolerance", tolerance, least=1.0, remedy="the band is target / tolerance … target · tolerance")
        self.factor = _number("factor", factor, above=1.0, remedy="beta is multiplied by it where the KL is too large")

    def _advance(self, kl: float, n: float) -> None:
        if kl > self.tolerance * self.target:
            self._beta = self._clip(self._beta * self.factor)
        elif kl < self.target / self.tolerance:
            self._beta = self._clip(self._beta / self.factor)


class PIDBeta(_TargetedBeta):
    """A PID controller of log(beta), on the error log(kl / target): equal factors of KL count the same on both sides of the target.

    Equivalent to

        error = math.log(min(max(kl / target, 1 / math.e), math.e))
        settled = settled * math.exp(ki * error)                    # the integral part, `initial` at first, kept within bounds
        beta = settled * math.exp(kp * error + kd * (error - previous_error))

    within bounds, the last difference 0 at the first update. Keeping `settled` within bounds is what prevents windup: after any time at a bound
    beta leaves it with the first error of the other sign.

    Args:
        initial, target, unit, bounds: as AdaptiveBeta.
        kp, ki, kd: gains from 0 to 100, ki above 0 (without it the target is not reached). The defaults suit a KL that follows beta within about
            10 updates, and settle from 1 to 100. A KL in proportion to 1/beta that follows at once swings for ever unless
            kp + ki/2 + 2·kd < 1. kd amplifies the noise of the KL.

    Raises TypeError and ValueError for other numbers.
    Source: Åström and Murray, Feedback Systems (2008), chapter 10, for the controller and its windup.
    """

    _STATE = ("beta", "settled", "previous")

    def __init__(self, initial: float, target: float, unit: str = "token", *, kp: float = 0.3, ki: float = 0.03, kd: float = 0.0,
                 bounds: tuple[float, float] = BOUNDS) -> None:
        super().__init__(initial, target, unit, bounds)
        self.kp = _number("kp", kp, least=0.0, most=100.0, remedy="how much log(beta) moves with the error")
        self.ki = _number("ki", ki, above=0.0, most=100.0, remedy="how much log(beta) goes on moving while the error lasts")
        self.kd = _number("kd", kd, least=0.0, most=100.0, remedy="how much log(beta) moves with the error's change")
        self._settled = self._beta
        self._previous: float | None = None

    def _checked(self, name: str, value: object) -> float | None:
        if name != "previous":
            return super()._checked(name, value)
        return None if value is None else _number("state['previous']", value, remedy="pass what state_dict() returned")

    def _advance(self, kl: float, n: float) -> None:
        error = math.log(min(max(kl / self.target, 1 / math.e), math.e))
        change = 0.0 if self._previous is None else error - self._previous
        self._settled = self._clip(self._settled * math.exp(self.ki * error))
        self._beta = self._clip(self._settled * math.exp(self.kp * error + self.kd * change))
        self._previous = error


def _number(name: str, value: object, *, remedy: str, least: float = -math.inf, above: float = -math.inf, most: float = math.inf) -> float:
    """A finite number, or a tensor of one, as a float: at least `least`, above `above` and at most `most`."""
    if isinstance(value, torch.Tensor) and value.dim() == 0 and value.dtype != torch.bool and not value.is_complex():
        value = value.detach()
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        got = f"a tensor of shape {tuple(value.shape)} and {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a number, got {got}; {remedy}")
    result = float(value)
    if not (math.isfinite(result) and result >= least and result > above and result <= most):
        limits = ((" of at least", least), (" above", above), (" up to", most))
        bounds = ",".join(f"{word} {limit:g}" for word, limit in limits if math.isfinite(limit))
        raise ValueError(f"{name}: expected a finite number{bounds}, got {result:g}; {remedy}")
    return result
