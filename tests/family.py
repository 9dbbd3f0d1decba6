"""The divergences beside the KL for tests: each function with options, and the textbook's formulas,
which autograd differentiates in any float type.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

import fastkl
from fastkl import f_divergences, testing

Pair = tuple[torch.Tensor, torch.Tensor]


# kind: as in f_divergences.
class Member(NamedTuple):
    function: Callable
    kind: str
    options: dict[str, float] = {}

    @property
    def share(self) -> float:
        return next(iter(self.options.values()), 0.0)

    def __call__(self, p: torch.Tensor, q: torch.Tensor, *mask, **more) -> torch.Tensor:
        return self.function(p, q, *mask, **self.options, **more)

    # In float64, from the definition with this very share: the function exchanges P and Q for some.
    def exact(self, p: torch.Tensor, q: torch.Tensor, temperature=1.0) -> torch.Tensor:
        return f_divergences.divergence(*log_probs(p, q, temperature), self.kind, self.share)

    def exact_gradients(
        self, p: torch.Tensor, q: torch.Tensor, upstream: torch.Tensor, temperature=1.0
    ) -> Pair:
        logs = log_probs(p, q, temperature)
        weight = (upstream.double() / temperature)[..., None]
        to_p, to_q = f_divergences.gradients(*logs, self.kind, self.share)
        return weight * to_p, weight * to_q


MEMBERS = {
    **{f"js {x}": Member(fastkl.js_divergence, "js", {"beta": x}) for x in (0.1, 0.5, 0.9)},
    **{
        f"skew_kl {x}": Member(fastkl.skew_kl_divergence, "skew_kl", {"alpha": x})
        for x in (0.1, 0.5, 0.999)
    },
    **{
        f"renyi {x}": Member(fastkl.renyi_divergence, "renyi", {"alpha": x})
        for x in (0.3, 0.999, 2.0, 10.0)
    },
    "total_variation": Member(fastkl.total_variation, "total_variation"),
    "jeffreys": Member(fastkl.jeffreys_divergence, "jeffreys"),
}
# One of each kind, two where the function exchanges P and Q for one of them.
KINDS = {
    name: MEMBERS[name]
    for name in ("js 0.1", "skew_kl 0.1", "renyi 0.3", "renyi 2.0", "total_variation", "jeffreys")
}


def log_probs(p: torch.Tensor, q: torch.Tensor, temperature: float | torch.Tensor = 1.0) -> Pair:
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.double()[..., None]
    return tuple((side.double() / temperature).log_softmax(-1) for side in (p, q))


def textbook(log_p: torch.Tensor, log_q: torch.Tensor, kind: str, share: float) -> torch.Tensor:
    p, q = log_p.exp(), log_q.exp()
    if kind == "renyi":
        return (share * log_p + (1 - share) * log_q).logsumexp(-1) / (share - 1)
    if kind == "total_variation":
        return (p - q).abs().sum(-1) / 2
    if kind == "jeffreys":
        return ((p - q) * (log_p - log_q)).sum(-1)
    log_m = log_q if kind == "kl" else (share * p + (1 - share) * q).log()
    of_p = p * (log_p - log_m)
    return (
        of_p if kind in ("kl", "skew_kl") else share * of_p + (1 - share) * q * (log_q - log_m)
    ).sum(-1)


# Gradients of the textbook's formula by autograd, in the type of the logits.
def plain_gradients(
    member: Member, p: torch.Tensor, q: torch.Tensor, upstream: torch.Tensor, temperature=1.0
) -> Pair:
    if isinstance(temperature, torch.Tensor):
        temperature = temperature[..., None]
    leaves = testing.leaf(p), testing.leaf(q)
    logs = ((leaf / temperature).log_softmax(-1) for leaf in leaves)
    return torch.autograd.grad(textbook(*logs, member.kind, member.share), leaves, upstream)
