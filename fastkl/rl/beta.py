"""Controllers of beta, the weight of the KL penalty: fixed, Ziegler's, PPO's and a PID controller,
all with bounds, declared units and a state.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, Protocol, get_args

import torch

from .._types import BetaController as BetaController
from . import _checks

Unit = Literal["token", "sequence"]
UNITS = get_args(Unit)
BOUNDS = (1e-6, 1e3)
# Of a penalty's `last`: the mean KL per unit, and how many units it is the mean of.
KEPT = {"token": ("kl", "tokens"), "sequence": ("kl_per_sequence", "sequences")}


class Penalty(Protocol):
    """A module that keeps the statistics of its last call, as KLPenalty and LinearKLPenalty."""

    @property
    def last(self) -> Mapping[str, torch.Tensor]:
        """The statistics by name: "kl", "kl_per_sequence", "tokens", "sequences"."""


class _Controller(abc.ABC):
    """What all controllers share: beta, the checks of an update, and the state."""

    # Attributes that state_dict holds beside the class and the unit, by their names without the
    # underscore.
    _STATE: tuple[str, ...] = ("beta",)

    def __init__(self, beta: float, unit: Unit | None) -> None:
        self._beta = beta
        self._unit = unit

    @property
    def beta(self) -> float:
        """The weight as it is now; update and load_state_dict change it."""
        return self._beta

    def update(
        self,
        kl: float | torch.Tensor | Penalty,
        n: float | torch.Tensor = 1,
        *,
        unit: Unit | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> float:
        """Take in a measured KL and return the new beta.

        Args:
            kl: the mean KL in nats, per token or per sequence as the controller's target: a finite
                number, or a tensor of one entry, for which this waits for the device. A mean of k1
                may be negative and counts as far below the target. Or the penalty itself, a
                KLPenalty or LinearKLPenalty after its call: "kl" or "kl_per_sequence" of its
                `last`, as the controller's unit asks; one that counted nothing leaves beta alone.
            n: how many samples the KL is the mean of, in the unit of `horizon`. AdaptiveBeta uses
                it; the others check it.
            unit: "token" or "sequence", what kl is a mean over. Required for a number where the
                target is per sequence: a KL per token would move beta the wrong way.
            process_group: of torch.distributed, such as torch.distributed.group.WORLD: kl and n are
                this process's, and all processes update with Σ kl·n / Σ n and Σ n, so that their
                betas stay equal. A penalty's kl is weighed with how many tokens or sequences it
                counted instead. A process without a sample passes n=0, and any kl.

        Raises:
            TypeError for what is not a number. ValueError for a KL that is not finite, n ≤ 0 (with
            a process group a sum of 0), a unit that is missing or not the controller's, and a
            penalty that was not called. beta and the state then stay as they were. With a process
            group a KL that is not finite raises on every process.
        """
        if unit is not None:
            _checks.choice("unit", unit, UNITS)
        if unit is not None and self._unit is not None and unit != self._unit:
            raise ValueError(
                f"kl: expected the mean KL per {self._unit}, got per {unit}; pass what the target "
                f"is a mean over, or make the "
                f"controller with unit={unit!r} and a target to match"
            )
        if hasattr(kl, "last"):
            measured = _of_penalty(kl, n, self._unit or unit or "token")
        elif unit is None and self._unit == "sequence":
            raise ValueError(
                "unit: expected 'sequence' beside the mean KL per sequence that the "
                "target is, got None; pass unit='sequence' if kl is that (the mean "
                "per token is not), or pass the KLPenalty itself as kl"
            )
        else:
            measured = _Measured(kl, n, n)
        if process_group is not None:
            measured = _over_processes(*measured, process_group)
        if hasattr(kl, "last") and not measured.weight:
            return self._beta
        kl = _checks.number(
            "kl",
            measured.kl,
            "a finite number",
            math.isfinite,
            "pass the mean over what counts, and leave out a step whose KL is not finite",
            tensor=True,
        )
        n = _checks.number(
            "n",
            measured.n,
            "a finite number above 0",
            _checks.positive,
            "n is how many samples the KL is the mean of",
            tensor=True,
        )
        self._advance(kl, n)
        return self._beta

    def state_dict(self) -> dict[str, object]:
        """What changes in training, as a plain dict of numbers and strings that JSON keeps exactly;
        the settings come from the constructor.
        """
        return {
            "class": type(self).__name__,
            "unit": self._unit,
            **{name: getattr(self, f"_{name}") for name in self._STATE},
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on from a state_dict of the same class and unit; raises ValueError or TypeError, and
        changes nothing, for any other.

        beta is part of the state: it takes the place of the constructor's, that of FixedBeta too.
        """
        _checks.state(state, self.state_dict())
        if not isinstance(state["unit"], (str, type(None))) or state["unit"] != self._unit:
            raise ValueError(
                f"state: expected unit {self._unit!r}, got "
                f"{_checks.shown(repr(state['unit']))}; load it into a controller of "
                f"the unit it was saved from"
            )
        values = {name: self._checked(name, state[name]) for name in self._STATE}
        for name, value in values.items():
            setattr(self, f"_{name}", value)

    def _checked(self, name: str, value: object) -> float | None:
        """An entry of a state, if it may be one."""
        return _checks.number(
            f"state[{name!r}]",
            value,
            "a finite number of at least 0",
            _checks.not_negative,
            "pass what state_dict() returned",
        )

    def __repr__(self) -> str:
        settings = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        settings |= {"unit": self._unit} if self._unit is not None else {}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in {'beta': self._beta, **settings}.items())})"

    @abc.abstractmethod
    def _advance(self, kl: float, n: float) -> None:
        """Set _beta from a checked KL."""


class FixedBeta(_Controller):
    """A beta that stays: `update` checks its arguments and returns it. To change it in a run that
    is resumed, leave load_state_dict out.

    Args:
        beta: a finite number ≥ 0.

    Raises TypeError and ValueError for another.
    """

    def __init__(self, beta: float) -> None:
        super().__init__(
            _checks.number(
                "beta",
                beta,
                "a finite number of at least 0",
                _checks.not_negative,
                "a negative beta would reward divergence; pass 0.05, for instance",
            ),
            None,
        )

    def _advance(self, kl: float, n: float) -> None:
        pass


class _TargetedBeta(_Controller):
    """A controller that steers the KL to a target, with beta within bounds."""

    def __init__(
        self, initial: float, target: float, unit: Unit, bounds: tuple[float, float]
    ) -> None:
        _checks.choice("unit", unit, UNITS)
        if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
            raise TypeError(
                f"bounds: expected a pair (lowest beta, highest beta), got "
                f"{_checks.type_name(bounds)}; pass bounds=(1e-3, 10.0), for instance"
            )
        low, high = (
            _positive("bounds", value, "beta moves by factors, which never leave 0")
            for value in bounds
        )
        if low > high:
            raise ValueError(
                f"bounds: expected the lower one first, got ({low:g}, {high:g}); swap them"
            )
        self.target = _positive(
            "target", target, "a KL in nats; for no penalty at all use FixedBeta(0)"
        )
        self.bounds = (low, high)
        super().__init__(
            self._within(
                "initial",
                _positive("initial", initial, "beta moves by factors, which never leave 0"),
            ),
            unit,
        )

    @property
    def unit(self) -> Unit:
        """What the target is a mean over: "token" or "sequence"."""
        assert self._unit is not None
        return self._unit

    def _within(self, name: str, value: float) -> float:
        low, high = self.bounds
        if not low <= value <= high:
            raise ValueError(
                f"{name}: expected a beta within bounds, {low:g} … {high:g}, got {value:g}; pass "
                f"other bounds=(lowest, highest)"
            )
        return value

    def _checked(self, name: str, value: object) -> float | None:
        checked = super()._checked(name, value)
        assert checked is not None
        return self._within(f"state[{name!r}]", checked)

    def _clip(self, value: float) -> float:
        return min(max(value, self.bounds[0]), self.bounds[1])


class AdaptiveBeta(_TargetedBeta):
    """Ziegler's proportional controller.

    Equivalent to

        error = min(max(kl / target - 1, -0.2), 0.2)
        beta = beta * (1 + error * n / horizon)

    within bounds: over a horizon's worth of samples beta changes by 20 % at most (e^0.2 = 1.22
    where many small updates compound).

    Args:
        initial: beta to begin with.
        target: the KL to hold, nats per `unit`: trainers commonly hold 6 per sequence, or 0.1 per
            token.
        horizon: in the unit of update's n, which is 1 per update unless given.
        unit: "token" or "sequence"; with "sequence" update asks for unit="sequence" beside a
            number.
        bounds: the lowest and the highest beta.

    Raises TypeError and ValueError for other numbers; update also for n ≥ 5·horizon, where the rule
    would make beta 0 or negative.
    Source: Ziegler et al., Fine-Tuning Language Models from Human Preferences (2019), section 2.2,
    with a constant gain of 0.1 in place of n / horizon; that one, with the batch's samples as n, is
    in their released code: openai/lm-human-preferences, AdaptiveKLController.
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
        self.horizon = _positive(
            "horizon", horizon, "pass how many samples it takes beta to change by 20 %"
        )

    def _advance(self, kl: float, n: float) -> None:
        if n >= 5 * self.horizon:
            raise ValueError(
                f"n: expected fewer samples than 5 horizons, {5 * self.horizon:g}, got {n:g}: one "
                f"update could take beta below 0; "
                f"count horizon in the unit of n"
            )
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self._beta = self._clip(self._beta * (1 + error * n / self.horizon))


class PPOAdaptiveBeta(_TargetedBeta):
    """The rule of the PPO paper: beta times or by a factor while the KL is outside a band around
    the target.

    Equivalent to

        if kl > tolerance * target: beta = beta * factor
        if kl < target / tolerance: beta = beta / factor

    within bounds. It holds the KL somewhere in the band, not at the target; a factor above
    tolerance² may jump over the band for ever.

    Args:
        initial, target, unit, bounds: as AdaptiveBeta.
        tolerance: above 1 (or 1: no band). factor: above 1.

    Raises TypeError and ValueError for other numbers.
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


class PIDBeta(_TargetedBeta):
    """A PID controller of log(beta), on the error log(kl / target): equal factors of KL count the
    same on both sides of the target.

    Equivalent to

        error = math.log(min(max(kl / target, 1 / math.e), math.e))
        settled = settled * math.exp(ki * error)                    # the integral part, `initial` at first, kept within bounds
        beta = settled * math.exp(kp * error + kd * (error - previous_error))

    within bounds, the last difference 0 at the first update. Keeping `settled` within bounds is
    what prevents windup: after any time at a bound beta leaves it with the first error of the other
    sign.

    Args:
        initial, target, unit, bounds: as AdaptiveBeta.
        kp, ki, kd: gains from 0 to 100, ki above 0 (without it the target is not reached). The
            defaults suit a KL that follows beta within about 10 updates, and settle from 1 to 100.
            A KL in proportion to 1/beta that follows at once swings for ever unless kp + ki/2 +
            2·kd < 1. kd amplifies the noise of the KL.

    Raises TypeError and ValueError for other numbers.
    Source: Åström and Murray, Feedback Systems, first edition (2008), chapter 10, for the
    controller and its windup.
    """

    _STATE = ("beta", "settled", "previous")

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
        gain = "a finite number of at least 0, up to 100"
        self.kp = _checks.number(
            "kp", kp, gain, lambda x: 0 <= x <= 100, "it is how much log(beta) moves with the error"
        )
        self.ki = _checks.number(
            "ki",
            ki,
            "a finite number above 0, up to 100",
            lambda x: 0 < x <= 100,
            "without it the target is not reached",
        )
        self.kd = _checks.number(
            "kd",
            kd,
            gain,
            lambda x: 0 <= x <= 100,
            "it is how much log(beta) moves with the error's change",
        )
        self._settled = self._beta
        self._previous: float | None = None

    def _checked(self, name: str, value: object) -> float | None:
        if name != "previous":
            return super()._checked(name, value)
        if value is None:
            return None
        return _checks.number(
            "state['previous']",
            value,
            "a number from -1 to 1, or None",
            lambda x: -1 <= x <= 1,
            "pass what state_dict() returned",
        )

    def _advance(self, kl: float, n: float) -> None:
        error = math.log(min(max(kl / self.target, 1 / math.e), math.e))
        change = 0.0 if self._previous is None else error - self._previous
        self._settled = self._clip(self._settled * math.exp(self.ki * error))
        self._beta = self._clip(self._settled * math.exp(self.kp * error + self.kd * change))
        self._previous = error


class _Measured(NamedTuple):
    """A mean KL, how many samples the rule counts, and the weight of the mean among processes."""

    kl: float | torch.Tensor
    n: float | torch.Tensor
    weight: float | torch.Tensor


def _of_penalty(penalty: Penalty, n: float | torch.Tensor, unit: Unit) -> _Measured:
    """Take the mean KL per unit, and how many it is the mean of, from a penalty's last call."""
    mean, count = KEPT[unit]
    last = penalty.last
    if not isinstance(last, Mapping) or mean not in last or count not in last:
        got = f"{_checks.type_name(last)} without them" if last else "an empty one"
        raise ValueError(
            f"kl: expected a penalty whose `last` holds {mean!r} and {count!r}, got "
            f"{got}; call the penalty before update, outside torch.func's transforms"
        )
    return _Measured(last[mean], n, last[count])


def _over_processes(
    kl: float | torch.Tensor,
    n: float | torch.Tensor,
    weight: float | torch.Tensor,
    group: torch.distributed.ProcessGroup,
) -> _Measured:
    """Average kl with its weights, and add up n and the weights, over the processes of a group.

    Values are judged only afterwards: a process that raised alone would leave the others waiting.
    """
    if not torch.distributed.is_available() or not isinstance(
        group, torch.distributed.ProcessGroup
    ):
        raise TypeError(
            f"process_group: expected a ProcessGroup of torch.distributed or None, got "
            f"{_checks.type_name(group)}; pass torch.distributed.group.WORLD"
        )
    kl, n, weight = (
        _checks.number(name, value, "a number", lambda x: True, "pass this process's", tensor=True)
        for name, value in (("kl", kl), ("n", n), ("n", weight))
    )
    device = "cuda" if torch.distributed.get_backend(group) == "nccl" else "cpu"
    totals = torch.tensor(
        [kl * weight if weight else 0.0, n if n >= 0 else math.nan, weight],
        dtype=torch.float64,
        device=device,
    )
    torch.distributed.all_reduce(totals, group=group)
    total, n, weight = totals.tolist()
    return _Measured(total / weight if weight else 0.0, n, weight)


def _positive(name: str, value: float, remedy: str) -> float:
    return _checks.number(name, value, "a finite number above 0", _checks.positive, remedy)
