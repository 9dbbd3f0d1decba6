"""Base classes of the controllers of beta: checks of an update, its mean over processes, state.

The rules themselves are in beta.py.
"""

import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, Protocol, get_args

import torch

from . import _checks

Unit = Literal["token", "sequence"]
BOUNDS = (1e-6, 1e3)
# Keys of a penalty's `last`: the mean KL per unit, and the number of units.
KEPT = {"token": ("kl", "tokens"), "sequence": ("kl_per_sequence", "sequences")}


class Penalty(Protocol):
    """A module that keeps the statistics of its last call, such as KLPenalty or LinearKLPenalty: a
    mapping with "kl", "kl_per_sequence", "tokens" and "sequences".
    """

    last: Any


class Controller:
    """Base of all controllers: beta, the checks of an update, and the state.

    `unit` is the unit of the target's mean, None without a target.
    """

    def __init__(self, beta: float, unit: Unit | None) -> None:
        self._beta, self.unit = beta, unit

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
            kl: the mean KL in nats, per token or per sequence like the controller's target: a
                finite number, or a tensor of one entry, which is read and synchronises a GPU. A
                mean of k1 may be negative and counts as far below the target. A KLPenalty or
                LinearKLPenalty may be passed after its call: kl is then "kl" or "kl_per_sequence"
                of its `last`, by the controller's unit; a call that counted no token leaves beta
                unchanged.
            n: the number of samples averaged in kl, in the unit of `horizon`. AdaptiveBeta uses it;
                the others check it.
            unit: "token" or "sequence", the unit of kl's mean. Required for a number if the target
                is per sequence: a KL per token would move beta the wrong way.
            process_group: a group of torch.distributed, such as torch.distributed.group.WORLD. kl
                and n are this process's; all processes update with Σ kl·n / Σ n and Σ n, so their
                betas stay equal. A penalty's kl is weighted by the tokens or sequences that it
                counted, not by n. A process without samples passes n=0 and any kl.

        Raises:
            TypeError: kl or n is not a number.
            ValueError: a KL that is not finite (with a process group, on every process), n ≤ 0
                (with a process group, a sum of 0), a unit that is missing or not the controller's,
                a penalty that was not called. beta and the state are then unchanged.
        """
        if unit is not None:
            _checks.choice("unit", unit, get_args(Unit))
        _checks.expect(
            unit in (None, self.unit) or self.unit is None,
            "kl",
            f"the mean KL per {self.unit}",
            f"per {unit}",
            f"pass what the target is a mean over, or make the controller with unit={unit!r} and a "
            f"target to match",
        )
        of_penalty = hasattr(kl, "last")
        _checks.expect(
            of_penalty or unit is not None or self.unit != "sequence",
            "unit",
            "'sequence' beside the mean KL per sequence that the target is",
            unit,
            "pass unit='sequence' if kl is that (the mean per token is not), or pass the KLPenalty "
            "itself as kl",
        )
        measured, weight = _of_penalty(kl, self.unit or unit or "token") if of_penalty else (kl, n)
        if process_group is not None:
            measured, n, weight = _over_processes(measured, n, weight, process_group)
        if not of_penalty or weight:
            self._advance(
                _checks.number(
                    "kl",
                    measured,
                    "a finite number",
                    math.isfinite,
                    "pass the mean over what counts, and leave out a step whose KL is not finite",
                    tensor=True,
                ),
                _checks.number(
                    "n",
                    n,
                    "a finite number above 0",
                    lambda x: 0 < x < math.inf,
                    "n is how many samples the KL is the mean of",
                    tensor=True,
                ),
            )
        return self._beta

    def state_dict(self) -> dict[str, object]:
        """Return the values that change in training, as numbers and strings that JSON keeps
        exactly.

        The settings are not included; they come from the constructor.
        """
        return {
            "class": type(self).__name__,
            "unit": self.unit,
            **{name: getattr(self, f"_{name}") for name in self._possible()},
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue from a state_dict of the same class and unit.

        beta is part of the state and replaces the constructor's, for FixedBeta too. Any other state
        raises ValueError or TypeError and leaves the controller unchanged.
        """
        _checks.state(state, self.state_dict(), ("unit",), self._possible())
        for name in self._possible():
            setattr(self, f"_{name}", state[name])

    def _possible(self) -> dict[str, Callable[[Any], bool]]:
        """Return tests of the state's entries other than class and unit; each entry is an attribute
        with an underscore before the name.
        """
        bounds = getattr(self, "bounds", (0.0, sys.float_info.max))
        return {"beta": partial(_checks.within, *bounds)}

    def __repr__(self) -> str:
        settings = ", ".join(
            f"{name}={value!r}"
            for name, value in vars(self).items()
            if name[0] != "_" and value is not None
        )
        return f"{type(self).__name__}(beta={self._beta!r}, {settings})"

    def _advance(self, kl: float, n: float) -> None:
        """Set _beta from a checked KL; a fixed beta stays."""


class TargetedController(Controller):
    """A controller that steers the KL to a target, with beta within bounds."""

    def __init__(
        self, initial: float, target: float, unit: Unit, bounds: tuple[float, float]
    ) -> None:
        _checks.choice("unit", unit, get_args(Unit))
        _checks.expect(
            isinstance(bounds, (tuple, list)) and len(bounds) == 2,
            "bounds",
            "a pair (lowest beta, highest beta)",
            bounds,
            "pass bounds=(1e-3, 10.0), for instance",
            TypeError,
        )
        moves = "beta moves by factors, which never leave 0"
        low, high = (positive("bounds", value, moves) for value in bounds)
        _checks.expect(low <= high, "bounds", "the lower one first", (low, high), "swap them")
        self.target = positive(
            "target", target, "a KL in nats; for no penalty at all use FixedBeta(0)"
        )
        self.bounds = (low, high)
        _checks.expect(
            low <= positive("initial", initial, moves) <= high,
            "initial",
            f"a beta within bounds, {low:g} … {high:g}",
            initial,
            "pass other bounds=(lowest, highest)",
        )
        super().__init__(float(initial), unit)

    def _clip(self, value: float) -> float:
        return min(max(value, self.bounds[0]), self.bounds[1])


def _of_penalty(penalty: Any, unit: Unit) -> tuple[Any, Any]:
    """Return the mean KL per unit, and the number of units, of a penalty's last call."""
    mean, count = KEPT[unit]
    last = penalty.last
    kept = isinstance(last, Mapping)
    _checks.expect(
        kept and mean in last and count in last,
        "kl",
        f"a penalty whose `last` holds {mean!r} and {count!r}",
        f"one with {', '.join(last) or 'nothing'}" if kept else last,
        "call the penalty before update, outside torch.func's transforms",
    )
    return last[mean], last[count]


def _over_processes(
    kl: Any, n: Any, weight: Any, group: torch.distributed.ProcessGroup
) -> tuple[float, float, float]:
    """Average kl by its weights, and sum n and the weights, over the processes of a group.

    The values are checked afterwards: if only one process raised, the others would wait.
    """
    _checks.expect(
        torch.distributed.is_available() and isinstance(group, torch.distributed.ProcessGroup),
        "process_group",
        "a ProcessGroup of torch.distributed or None",
        group,
        "pass torch.distributed.group.WORLD",
        TypeError,
    )
    kl, n, weight = (
        _checks.number(name, value, "a number", lambda x: True, "pass this process's", tensor=True)
        for name, value in (("kl", kl), ("n", n), ("n", weight))
    )
    totals = torch.tensor(
        [kl * weight if weight else 0.0, n if n >= 0 else math.nan, weight],
        dtype=torch.float64,
        device="cuda" if torch.distributed.get_backend(group) == "nccl" else "cpu",
    )
    torch.distributed.all_reduce(totals, group=group)
    total, samples, weights = totals.tolist()
    return total / weights if weights else 0.0, samples, weights


def positive(name: str, value: float, remedy: str) -> float:
    """Check for a finite number above 0."""
    return _checks.number(
        name, value, "a finite number above 0", lambda x: 0 < x < math.inf, remedy
    )
