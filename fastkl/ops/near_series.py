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
    its terms, total variation's q/p - 1, at Chebyshev nodes, with a relative error near 1e-6.
    """
    kernels, (kind, share) = series(), divergence
    if kind == "kl":
        return kernels.KL
    count, moment_count, rest = kernels.TERMS.value, kernels.MOMENT_TERMS.value, 1.0 - share
    if kind == "renyi":  # no polynomials
        return kernels.Series(kind, share, 0.0, (), (0.0,) * (2 * count))
    # f''(0), which total variation does not use.
    curvature = {"js": share * rest, "skew_kl": rest * rest, "total_variation": 0.0}[kind]

    def fit(number: int, name: str) -> list[float]:
        # 0.45 instead of 0.5 avoids a node at 0, where a second-order term would have no digits.
        numbers = torch.arange(number, dtype=torch.float64, device="cpu")
        nodes = numbers.add(0.45).mul(math.pi / number).cos()
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
        powers = torch.linalg.vander(x, N=number).flip(-1)
        return cast(list[float], torch.linalg.solve(powers, curve).tolist())

    if kind == "total_variation":
        gap = (*fit(count, "gap"), *(0.0,) * moment_count)
        return kernels.Series(kind, share, 0.0, gap, (0.0,) * (2 * count))
    return kernels.Series(
        kind,
        share,
        curvature,
        (*fit(count, "value"), *fit(moment_count, "moment")),
        (*fit(count, "u"), *fit(count, "v")),
    )
