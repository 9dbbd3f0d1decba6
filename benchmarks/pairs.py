"""Make pairs of logits whose KL has a given size."""

import math

import torch

from benchmarks.cases import DTYPES
from fastkl import testing

DISTRIBUTIONS = ("normal 3", "normal 8", "peaked", "shift 50")


def make_pair(distribution, dtype, target, rows, vocabulary, device):
    """Make (p, q, their truth): q is p plus noise, the median KL is near `target`."""
    random = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    p = torch.randn(rows, vocabulary, **random) * (8 if distribution == "normal 8" else 3)
    if distribution == "peaked":
        # As most tokens of a trained model: one entry holds nearly all of the probability.
        peaks = torch.randint(vocabulary, (rows, 1), **random)
        p.scatter_add_(1, peaks, torch.full((rows, 1), 24.0, device=device))
    p = p.to(DTYPES[dtype])
    noise = torch.randn(p.shape, **random)
    shift = 50.0 if distribution == "shift 50" else 0.0
    low, high = -8.0, 3.0  # of log10 of the noise
    exponent = math.log10(target) / 2  # a small KL grows with the square of the noise
    for _ in range(30):
        q = (p.float() + 10**exponent * noise + shift).to(p.dtype)
        exact = testing.truth(p, q)
        reached = exact.kl.median().item()
        low, high = (exponent, high) if reached < target else (low, exponent)
        if abs(reached - target) < 0.02 * target or high - low < 1e-3:
            break
        exponent += math.log10(target / reached) / 2 if reached > 0 else math.inf
        exponent = exponent if low < exponent < high else (low + high) / 2
    return p, q, exact
