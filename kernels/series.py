"""A divergence for the launchers: kind, numbers, and polynomials near P = Q."""

import functools
from typing import NamedTuple

from .divergence_math import TERMS
from .row_math import JS, OF_KL, RENYI, SKEW_KL, TOTAL_VARIATION

__all__ = ["KINDS", "KL", "TERMS", "Series"]
KINDS = {
    "kl": OF_KL.value,
    "renyi": RENYI.value,
    "js": JS.value,
    "skew_kl": SKEW_KL.value,
    "total_variation": TOTAL_VARIATION.value,
}
# Below this share of Q in the mixture, the logarithms of far entries need a series.
SMALL_REST = 0.25


class Series(NamedTuple):
    """A divergence for the kernels: its kind, alpha or beta, f''(0), and the coefficients of the
    polynomials of divergence_math.py, highest power first.

    forward: of G and K, 15 numbers, or R for total variation; () without a second read. backward:
    of U and V, 16; () for the KL.
    """

    kind: str
    share: float
    curvature: float
    forward: tuple[float, ...]
    backward: tuple[float, ...]

    @functools.lru_cache(1024)  # noqa: B019  # numbers alone, equal by value
    def constants(self) -> tuple[tuple[str, object], ...]:
        """Return the compile-time values."""
        return (("KIND", KINDS[self.kind]), ("SMALL_REST", 1.0 - self.share < SMALL_REST))

    def numbers(self, coefficients: tuple[float, ...]) -> dict[str, float]:
        """Return the run-time values, in the order of the kernels' signatures."""
        return {
            **dict(share=self.share, rest=1.0 - self.share, curvature=self.curvature),
            **{f"c{i}": value for i, value in enumerate(coefficients)},
        }


KL = Series("kl", 0.0, 0.0, (), ())
