"""Surrogate objectives of the policy gradient, per token: PPO's clip, CISPO and SAPO; and the mean
log-ratio of a sequence.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch

from ..estimators import LARGEST_LOG_RATIO
from . import _checks
from .sequences import Sequences

SurrogateName = Literal["clip", "cispo", "sapo"]
CLIP = 0.2
# SAPO's temperatures for A > 0 and A ≤ 0, as published and as in TRL and verl.
TAU = (1.0, 1.05)


class Surrogate(NamedTuple):
    """A surrogate and its checked settings.

    bounds: how far the ratio may fall below 1, and how far it may rise above 1. tau: for A > 0 and
    for A ≤ 0.
    """

    name: str
    bounds: tuple[float, float]
    dual_clip: float | None
    tau: tuple[float, float]

    def losses(
        self, log_ratio: torch.Tensor, logprob: torch.Tensor, advantages: torch.Tensor
    ) -> torch.Tensor:
        """Compute the loss of each token.

        The clip is min(ratio·A, clip(ratio)·A): the ratio is bounded above for A ≥ 0, and below
        (with a dual clip also above) for A < 0. The bound is applied before the product: a minimum
        of products has the gradient 0·inf = NaN in the branch not taken.
        """
        ratio = log_ratio.clamp(max=LARGEST_LOG_RATIO).exp()
        # Numbers as tensors: torch.compile compiles a graph for each number passed to clamp.
        one = ratio.new_ones(())
        low, high = one - self.bounds[0], one + self.bounds[1]
        if self.name == "cispo":
            gain = ratio.detach().clamp(low, high) * logprob
        elif self.name == "sapo":
            tau = torch.where(advantages > 0, one * self.tau[0], one * self.tau[1])
            gain = torch.sigmoid(tau * (ratio - 1)) * 4 / tau
        else:
            highest = one * (math.inf if self.dual_clip is None else self.dual_clip)
            least, most = (
                torch.where(advantages >= 0, rising, falling)
                for rising, falling in ((-one, low), (high, highest))
            )
            # Not clamp, whose gradient at a bound is 1, 1/2 or 0, depending on torch's release.
            gain = torch.where(ratio < least, least, torch.where(ratio > most, most, ratio))
        return -advantages * gain


def checked_surrogate(
    name: str,
    clip: float | tuple[float, float],
    dual_clip: float | None,
    tau: float | tuple[float, float] | None = None,
) -> Surrogate:
    """Check a surrogate and its settings."""
    _checks.choice("surrogate", name, get_args(SurrogateName))
    bounds = _checks.number_pair(
        "clip",
        clip,
        "a number within 0 … 1, or a pair (low within 0 … 1, high ≥ 0)",
        lambda x: 0 <= x <= 1,
        "pass clip=0.2 or clip=(0.2, 0.28), for instance",
        lambda x: x >= 0,
    )
    if dual_clip is not None:
        dual_clip = _checks.number(
            "dual_clip",
            dual_clip,
            "None or a finite number above 1",
            lambda x: 1 < x < math.inf,
            "3 is common",
        )
    given = (
        TAU
        if tau is None
        else _checks.number_pair(
            "tau",
            tau,
            "a finite number above 0, or a pair of such",
            lambda x: 0 < x < math.inf,
            "pass (1.0, 1.05)",
        )
    )
    for setting, value, absent, owners in (
        ("clip", clip, bounds == (CLIP, CLIP), ("clip", "cispo")),
        ("dual_clip", dual_clip, dual_clip is None, ("clip",)),
        ("tau", tau, tau is None, ("sapo",)),
    ):
        _checks.expect(
            absent or name in owners,
            setting,
            f"no such setting with surrogate={name!r}",
            value,
            f"it belongs to {' and '.join(owners)}",
        )
    return Surrogate(name, bounds, dual_clip, given)


def mean_log_ratio(
    logprob: torch.Tensor, old_logprob: torch.Tensor, mask: torch.Tensor, sequences: Sequences
) -> torch.Tensor:
    """Give each token the mean of its sequence's log-ratios over the tokens that count."""
    tokens = sequences.sums(mask.long()).clamp(min=1)
    return sequences.spread(sequences.sums(logprob - old_logprob) / tokens)
