"""An alarm for jumps of the KL: a sequential test of its logarithm against the recent past."""

import math
import statistics
import sys
from collections import deque
from functools import partial
from typing import Any

from . import _checks

# With fewer residuals the median absolute deviation is too often far too small.
WARM_UP = 16
# Until then it is mixed with a deviation of 1 in the logarithm, weighted as this many residuals.
ASSUMED = 0.25
# Ratio of the standard deviation of normal noise to its MAD.
MAD_TO_DEVIATION = 1.4826
# In the logarithm: noise-free runs are treated as if the KL varied by 5 %.
LEAST_DEVIATION = 0.05


class SpikeDetector:
    """An alarm that rings if the mean KL of a step jumps above the range likely from recent steps.

    Equivalent to, for one step,

        x = log(max(kl, 0) + floor)
        level = median(of the last `recent` x)
        residual = x - level
        known = [r for r in the last `window` residuals if its level was above log(2 · floor)]
        centre, deviation = median(known), 1.4826 · MAD(known)          # 0 if there are none
        if len(known) < 16:
            deviation = √((1/4 + len(known) · deviation²) / (1/4 + len(known)))
        deviation = max(0.05, deviation)
        rise = residual - centre
        jump = max(log(ratio), rise)
        evidence = max(0, evidence + jump · (rise - jump / 2) / deviation²)
        ring = evidence ≥ limit                                         # then evidence = 0

    where log(2 · floor) is the level of a KL of `floor`, and evidence is the log-likelihood ratio
    (nats) of "the KL is at least `ratio` times its previous value" against "it is unchanged", for
    normal noise. A strong step rings at once; weaker ones add up. The centre of the residuals
    removes steady growth, and both medians ignore outliers. Below the floor x hardly moves, which
    says little about the noise above it, so there the noise counts as unknown.

    Measured by tests/rl/test_spikes.py with the default settings, for noise of log KL with a
    standard deviation of 0.1 | 0.2 | 0.3 | 0.4:

        false alarms per 1000 steps, at most
            normal noise                                                0.1 | 0.1 | 0.1 | 0.2
            the same, correlated by 0.5 from step to step               0.1 | 0.1 | 0.6 | 1.1
            heavy tails (Student's t, 5 degrees of freedom)             0.5 | 1.5 | 2.0 | 2.5
        lasting jumps to 3 times the KL that ring within 5 steps, at least
            normal noise                                                100 | 100 | 90 | 55 %

    A KL that grows as in training, with the step, its square or its fourth power, or exponentially,
    twice in 10 steps or slower, hardly rings, even if it begins far below the floor: less than once
    per 1000 steps in noise of up to 0.4. Nor does a KL that is flat below the floor and then grows
    by up to half the floor per step; growth by a whole floor per step is a jump and rings once.

    After a lasting jump it rings for at most `recent` // 2 + 1 steps: by then that is the new
    level. The first `recent` + 16 steps are silent. After steps all far below the floor, only a
    jump to 10 times the floor or more rings within 5 steps, until 16 steps above the floor have
    shown the noise.

    Args:
        ratio: the jump to look for, above 1. Smaller jumps ring too, from about √ratio on, if they
            last or stand out from the noise.
        limit: evidence at which it rings, nats. Larger: fewer false alarms, later alarms.
        recent: steps whose median is the current level.
        window: steps whose residuals give the noise.
        floor: negligible KL, in the unit of kl: ratios count, and noise is learnt, from about this
            KL on. The default is for nats per token.

    Raises ValueError or TypeError for wrong arguments.

    Source: Page, Continuous Inspection Schemes (1954), for the test; Hampel, The Influence Curve
    and Its Role in Robust Estimation (1974), for the median absolute deviation (MAD).
    """

    def __init__(
        self,
        ratio: float = 3.0,
        *,
        limit: float = 12.0,
        recent: int = 15,
        window: int = 64,
        floor: float = 1e-4,
    ) -> None:
        self.ratio = _checks.number(
            "ratio",
            ratio,
            "a finite number above 1, the jump to look for",
            lambda x: 1 < x < math.inf,
            "3 is the default",
        )
        self.limit = _checks.number(
            "limit",
            limit,
            "a positive finite number of nats",
            lambda x: 0 < x < math.inf,
            "12 is the default",
        )
        self.floor = _checks.number(
            "floor",
            floor,
            "a positive finite KL",
            lambda x: 0 < x < math.inf,
            "1e-4 suits nats per token",
        )
        _checks.whole_number("recent", recent, "a number of steps", "15 is the default")
        _checks.whole_number(
            "window",
            window,
            "a number of steps",
            "the noise of fewer is not known, 64 is the default",
            lowest=WARM_UP,
        )
        self._levels: deque[float] = deque(maxlen=recent)
        # None where the level was not above the floor.
        self._residuals: deque[float | None] = deque(maxlen=window)
        self._evidence = 0.0

    def __repr__(self) -> str:
        return (
            f"SpikeDetector(ratio={self.ratio:g}, limit={self.limit:g}, "
            f"recent={self._levels.maxlen}, window={self._residuals.maxlen}, "
            f"floor={self.floor:g})"
        )

    def update(self, kl: float) -> bool:
        """Add the mean KL of one step and return True if it rings.

        A KL that is not finite always rings and is not remembered.
        """
        _checks.number(
            "kl", kl, "the mean KL of a step, a number", lambda x: True, "it is kl.mean().item()"
        )
        if not math.isfinite(kl):
            return True
        x, ring = math.log(max(float(kl), 0.0) + self.floor), False
        if len(self._levels) == self._levels.maxlen:
            level = statistics.median(self._levels)
            ring = len(self._residuals) >= WARM_UP and self._judge(x - level)
            self._residuals.append(x - level if level > math.log(2 * self.floor) else None)
        self._levels.append(x)
        return ring

    def _judge(self, residual: float) -> bool:
        """Add to the evidence; if it reaches the limit, reset it and return True."""
        known = [value for value in self._residuals if value is not None]
        centre = statistics.median(known or [0.0])
        deviation = MAD_TO_DEVIATION * statistics.median(
            [abs(value - centre) for value in known] or [0.0]
        )
        if len(known) < WARM_UP:
            deviation = math.sqrt((ASSUMED + len(known) * deviation**2) / (ASSUMED + len(known)))
        rise = residual - centre
        jump = max(math.log(self.ratio), rise)
        variance = max(LEAST_DEVIATION, deviation) ** 2
        evidence = max(0.0, self._evidence + jump * (rise - jump / 2) / variance)
        self._evidence = 0.0 if evidence >= self.limit else evidence
        return evidence >= self.limit

    def state_dict(self) -> dict[str, Any]:
        """Return a plain dict for JSON or torch.save, with the settings it depends on: recent,
        window and floor.
        """
        return {
            "class": "SpikeDetector",
            "recent": self._levels.maxlen,
            "window": self._residuals.maxlen,
            "floor": self.floor,
            "levels": list(self._levels),
            "residuals": list(self._residuals),
            "evidence": self._evidence,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict().

        A state of another class, incomplete or damaged, or from a detector with another recent,
        window or floor, raises ValueError and leaves this one unchanged.
        """
        mine = self.state_dict()
        logarithm = partial(_checks.within, -2e3, 2e3)
        _checks.state(
            state,
            mine,
            ("recent", "window", "floor"),
            {
                "levels": lambda levels: (
                    len(levels) <= mine["recent"] and all(map(logarithm, levels))
                ),
                "residuals": lambda residuals: (
                    len(residuals) <= mine["window"]
                    and all(residual is None or logarithm(residual) for residual in residuals)
                ),
                "evidence": partial(_checks.within, 0, sys.float_info.max),
            },
        )
        self._levels = deque(state["levels"], maxlen=mine["recent"])
        self._residuals = deque(state["residuals"], maxlen=mine["window"])
        self._evidence = state["evidence"]
