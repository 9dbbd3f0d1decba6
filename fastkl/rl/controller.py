"""Base classes of the controllers of beta: the checks of an update, its mean over processes, state.

The rules themselves are in beta.py.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import Literal, Protocol, get_args

import torch

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


class Controller(abc.ABC):
    """Base of all controllers: beta, the checks of an update, and the state."""

    # Attributes in the state beside class and unit, by their names without the underscore.
    _STATE: tuple[str, ...] = ("beta",)

    def __init__(self, beta: float, unit: Unit | None) -> None:
        self._beta = beta
        self._unit = unit

    @property
    def beta(self) -> float:
        """Current weight; update and load_state_dict change it."""
        return self._beta

    def update(
        self,
        kl: float | torch.Tensor | Penalty,
        n: float | torch.Tensor = 1,
        *,
        unit: Unit | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> float:
        """Take a measured KL and return the new beta.

        Args:
            kl: the mean KL in nats, per token or per sequence as the controller's target: a finite
                number, or a tensor of one entry, for which this waits for the device. A mean of k1
                may be negative and counts as far below the target. A KLPenalty or LinearKLPenalty
                may be passed itself after its call: then kl is "kl" or "kl_per_sequence" of its
                `last`, by the controller's unit; a call that counted no token leaves beta alone.
            n: number of samples that the KL is the mean of, in the unit of `horizon`. AdaptiveBeta
                uses it; the others check it.
            unit: "token" or "sequence", the unit that kl is a mean over. Required for a number
                where the target is per sequence: a KL per token would move beta the wrong way.
            process_group: of torch.distributed, such as torch.distributed.group.WORLD. kl and n are
                this process's, and all processes update with Σ kl·n / Σ n and Σ n, so that their
                betas stay equal. The kl of a penalty is weighted by the tokens or sequences that it
                counted instead of n. A process without a sample passes n=0 and any kl.

        Raises:
            TypeError: kl or n is not a number.
            ValueError: a KL that is not finite (with a process group on every process), n ≤ 0 (with
                a process group a sum of 0), a unit that is missing or not the controller's, a
                penalty that was not called. beta and the state then stay as they were.
        """
        if unit is not None:
            _checks.choice("unit", unit, UNITS)
        if unit is not None and self._unit is not None and unit != self._unit:
            raise ValueError(
                f"kl: expected the mean KL per {self._unit}, got per {unit}; pass what the target "
                f"is a mean over, or make the controller with unit={unit!r} and a target to match"
            )
        measured: float | torch.Tensor
        weight: float | torch.Tensor
        if hasattr(kl, "last"):
            measured, weight = _of_penalty(kl, self._unit or unit or "token")
        elif unit is None and self._unit == "sequence":
            raise ValueError(
                "unit: expected 'sequence' beside the mean KL per sequence that the "
                "target is, got None; pass unit='sequence' if kl is that (the mean "
                "per token is not), or pass the KLPenalty itself as kl"
            )
        else:
            measured, weight = kl, n
        if process_group is not None:
            measured, n, weight = _over_processes(measured, n, weight, process_group)
        if hasattr(kl, "last") and not weight:
            return self._beta
        mean = _checks.number(
            "kl",
            measured,
            "a finite number",
            math.isfinite,
            "pass the mean over what counts, and leave out a step whose KL is not finite",
            tensor=True,
        )
        samples = _checks.number(
            "n",
            n,
            "a finite number above 0",
            lambda x: 0 < x < math.inf,
            "n is how many samples the KL is the mean of",
            tensor=True,
        )
        self._advance(mean, samples)
        return self._beta

    def state_dict(self) -> dict[str, object]:
        """Return what changes in training, as numbers and strings that JSON keeps exactly.

        The settings are the constructor's.
        """
        return {
            "class": type(self).__name__,
            "unit": self._unit,
            **{name: getattr(self, f"_{name}") for name in self._STATE},
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue from a state_dict of the same class and unit.

        beta is part of the state and replaces the constructor's, also that of FixedBeta. Any other
        state raises ValueError or TypeError and changes nothing.
        """
        _checks.state(state, self.state_dict())
        if not isinstance(state["unit"], (str, type(None))) or state["unit"] != self._unit:
            raise ValueError(
                f"state: expected unit {self._unit!r}, got {_checks.shown(repr(state['unit']))}; "
                f"load it into a controller of the unit it was saved from"
            )
        values = {name: self._checked(name, state[name]) for name in self._STATE}
        for name, value in values.items():
            setattr(self, f"_{name}", value)

    def _checked(self, name: str, value: object) -> float | None:
        """Check an entry of a state and return it."""
        return _checks.number(
            f"state[{name!r}]",
            value,
            "a finite number of at least 0",
            lambda x: 0 <= x < math.inf,
            "pass what state_dict() returned",
        )

    def __repr__(self) -> str:
        settings = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        settings |= {"unit": self._unit} if self._unit is not None else {}
        shown = (f"{name}={value!r}" for name, value in {"beta": self._beta, **settings}.items())
        return f"{type(self).__name__}({', '.join(shown)})"

    @abc.abstractmethod
    def _advance(self, kl: float, n: float) -> None:
        """Set _beta from a checked KL."""


class TargetedController(Controller):
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
        moves = "beta moves by factors, which never leave 0"
        low, high = (positive("bounds", value, moves) for value in bounds)
        if low > high:
            raise ValueError(
                f"bounds: expected the lower one first, got ({low:g}, {high:g}); swap them"
            )
        self.target = positive(
            "target", target, "a KL in nats; for no penalty at all use FixedBeta(0)"
        )
        self.bounds = (low, high)
        super().__init__(self._within("initial", positive("initial", initial, moves)), unit)

    @property
    def unit(self) -> Unit:
        """Unit that the target is a mean over: "token" or "sequence"."""
        assert self._unit is not None
        return self._unit

    def _within(self, name: str, value: float) -> float:
        if self._clip(value) != value:
            raise ValueError(
                f"{name}: expected a beta within bounds, {self.bounds[0]:g} … {self.bounds[1]:g}, "
                f"got {value:g}; pass other bounds=(lowest, highest)"
            )
        return value

    def _checked(self, name: str, value: object) -> float | None:
        checked = super()._checked(name, value)
        assert checked is not None
        return self._within(f"state[{name!r}]", checked)

    def _clip(self, value: float) -> float:
        return min(max(value, self.bounds[0]), self.bounds[1])


def _of_penalty(penalty: Penalty, unit: Unit) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the mean KL per unit, and how many it is the mean of, from a penalty's last call."""
    mean, count = KEPT[unit]
    last = penalty.last
    if not isinstance(last, Mapping) or mean not in last or count not in last:
        got = f"{_checks.type_name(last)} without them" if last else "an empty one"
        raise ValueError(
            f"kl: expected a penalty whose `last` holds {mean!r} and {count!r}, got "
            f"{got}; call the penalty before update, outside torch.func's transforms"
        )
    return last[mean], last[count]


def _over_processes(
    kl: float | torch.Tensor,
    n: float | torch.Tensor,
    weight: float | torch.Tensor,
    group: torch.distributed.ProcessGroup,
) -> tuple[float, float, float]:
    """Average kl by its weights, and add up n and the weights, over the processes of a group.

    Their values are checked afterwards: a process that raised alone would leave the others waiting.
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
    total, samples, weights = totals.tolist()
    return total / weights if weights else 0.0, samples, weights


def positive(name: str, value: float, remedy: str) -> float:
    """Check for a finite number above 0."""
    return _checks.number(
        name, value, "a finite number above 0", lambda x: 0 < x < math.inf, remedy
    )
