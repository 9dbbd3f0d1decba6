"""Polynomials for the kernels' f-divergences near P = Q."""

import functools
import math
from typing import Any, cast

import torch

from .. import f_divergences
from .fields import Divergence
from .problems import series

# The kernels' variable is 2·d; the polynomials are valid for |d| < 1.
FACTOR = 2.0


@functools.lru_cache(1024)
def near_series(divergence: Divergence) -> Any:
    """Return the kernels.series.Series of a divergence; an f-divergence's polynomials interpolate
    its terms, total variation's q/p - 1, near 0 and at Chebyshev nodes, with a relative error of
    some 3e-6; for skew KL up to 1e-4 with alpha = 0.999.
    """
    kernels, (kind, share) = series(), divergence
    if kind == "kl":
        return kernels.KL
    count, rest, skew = kernels.TERMS.value, 1.0 - share, kind == "skew_kl"
    if kind == "renyi":  # no polynomials
        return kernels.Series(kind, share, 0.0, (), (0.0,) * (2 * count + 2))
    # f''(0), which total variation does not use.
    curvature = {"js": share * rest, "skew_kl": rest * rest, "total_variation": 0.0}[kind]

    # Padded with zeros to `length`.
    def fit(number: int, name: str, length: int) -> list[float]:
        # With a node near 0, u and v of small d have the digits that their means have. None at 0,
        # hence not 0.5: a second-order term has no digits there.
        numbers = torch.arange(number - 1, dtype=torch.float64, device="cpu")
        nodes = torch.cat(
            (numbers.add(0.45).mul(math.pi / (number - 1)).cos(), numbers.new_tensor([1e-3]))
        )
        # With p = 1 an entry's terms are f, u and e^d·v.
        value, u, q_v = f_divergences.terms(torch.zeros_like(nodes), nodes, kind, share)
        x = FACTOR * nodes
        curve = {
            "value": value / x.square(),
            "moment": (q_v - curvature * nodes.expm1()) / x.square(),
            "u": u / x,
            "v": q_v * (-nodes).exp() / x,
            "gap": FACTOR * nodes.expm1() / x,
        }[name]
        solved = torch.linalg.solve(torch.linalg.vander(x, N=number).flip(-1), curve)
        return [*cast(list[float], solved.tolist()), *[0.0] * (length - number)]

    if kind == "total_variation":
        gap = tuple(fit(count, "gap", 2 * count + 1))
        return kernels.Series(kind, share, 0.0, gap, (0.0,) * (2 * count + 2))
    return kernels.Series(
        kind,
        share,
        curvature,
        (
            *fit(count + skew, "value", count + 1),
            *fit(count - 1 + skew, "moment", count),
        ),
        (*fit(count + 2 * skew, "u", count + 2), *fit(count, "v", count)),
    )
