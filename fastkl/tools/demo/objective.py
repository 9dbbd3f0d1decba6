"""What a training step's loss is made of, computed in one of two ways: through logits, or from hidden states without any."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import nn

import fastkl
from fastkl.rl import FixedBeta, PIDBeta

from .settings import Settings


@dataclasses.dataclass(frozen=True)
class Batch:
    """Sampled tokens [B, T], the hidden states [B, T, H] of policy and reference that predict them, and the head [H -> V] of each."""

    tokens: torch.Tensor
    hidden: torch.Tensor
    head: nn.Linear
    ref_hidden: torch.Tensor
    ref_head: nn.Linear

    def kept(self) -> Batch:
        """The batch as it is now, unchanged by later updates of the policy, its hidden states the start of a graph."""
        return dataclasses.replace(self, hidden=self.hidden.detach().clone().requires_grad_(), head=copy.deepcopy(self.head))

    @torch.no_grad()
    def logits(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [rows, V] of policy and reference, of the first rows."""
        return self.head(self.hidden.flatten(0, 1)[:rows]), self.ref_head(self.ref_hidden.flatten(0, 1)[:rows])


class ThroughLogits:
    """Statistics of the sampled tokens and the KL penalty, from logits [B, T, V] of policy and reference."""

    def __init__(self, beta: float | FixedBeta | PIDBeta, settings: Settings) -> None:
        self.temperature = settings.temperature
        self.penalty = fastkl.KLPenalty(beta, temperature=settings.temperature)

    def __call__(self, batch: Batch) -> tuple[fastkl.TokenStats, torch.Tensor]:
        """(TokenStats, penalty); of the fields of the reference there is `kl` alone, for the monitor: it has no gradient."""
        logits, ref_logits = batch.head(batch.hidden), batch.ref_head(batch.ref_hidden)
        stats = fastkl.token_stats(logits, batch.tokens, temperature=self.temperature)
        with torch.no_grad():
            kl = fastkl.kl_divergence(logits, ref_logits, temperature=self.temperature)
        return stats._replace(kl=kl), self.penalty(logits, ref_logits)


class FromHiddenStates:
    """The same from hidden states and head weights: logits exist for chunk_size tokens at a time only."""

    def __init__(self, beta: float | FixedBeta | PIDBeta, settings: Settings) -> None:
        self.options = dict(temperature=settings.temperature, chunk_size=settings.chunk_size)
        self.penalty = fastkl.LinearKLPenalty(beta, **self.options)

    def __call__(self, batch: Batch) -> tuple[fastkl.TokenStats, torch.Tensor]:
        """(TokenStats, penalty); of the fields of the reference there is `kl` alone, for the monitor: it has no gradient."""
        stats = fastkl.linear_token_stats(batch.hidden, batch.head.weight, batch.tokens, bias=batch.head.bias, **self.options)
        both = (batch.hidden, batch.head.weight, batch.ref_hidden, batch.ref_head.weight)
        biases = dict(bias=batch.head.bias, ref_bias=batch.ref_head.bias)
        with torch.no_grad():
            kl = fastkl.linear_kl_divergence(*both, **biases, **self.options)
        return stats._replace(kl=kl), self.penalty(*both, **biases)


def choose_objective(beta: float | FixedBeta | PIDBeta, settings: Settings) -> ThroughLogits | FromHiddenStates:
    """The way that the settings ask for."""
    return (FromHiddenStates if settings.linear else ThroughLogits)(beta, settings)


def choose_beta(settings: Settings) -> FixedBeta | PIDBeta:
    """The weight of the penalty that the settings ask for: fixed, or steered to the target."""
    if settings.beta is not None:
        return FixedBeta(settings.beta)
    return PIDBeta(settings.initial_beta, settings.target_kl, unit="token", kp=settings.kp, ki=settings.ki, kd=settings.kd)
