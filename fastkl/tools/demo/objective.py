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
class Side:
    """One model on a batch: its hidden states [B, T, H] and its head [H -> V]."""

    hidden: torch.Tensor
    head: nn.Linear

    def kept(self) -> Side:
        """As it is now, unchanged by later updates of the model, its hidden states the start of a graph."""
        return Side(self.hidden.detach().clone().requires_grad_(), copy.deepcopy(self.head))

    @torch.no_grad()
    def logits(self, rows: int) -> torch.Tensor:
        """Logits [rows, V] of the first rows."""
        return self.head(self.hidden.flatten(0, 1)[:rows])


@dataclasses.dataclass(frozen=True)
class Batch:
    """Sampled tokens [B, T], and the policy and the reference that predict them."""

    tokens: torch.Tensor
    policy: Side
    reference: Side

    def kept(self) -> Batch:
        """The batch as it is now, unchanged by later updates of the policy."""
        return dataclasses.replace(self, policy=self.policy.kept())


class ThroughLogits:
    """From logits [B, T, V] of both models."""

    def __init__(self, beta: float | FixedBeta | PIDBeta, settings: Settings) -> None:
        self.temperature = settings.temperature
        self.penalty = fastkl.KLPenalty(beta, temperature=settings.temperature)

    def stats(self, batch: Batch) -> fastkl.TokenStats:
        """Every statistic of the sampled tokens, each with its gradient to the policy."""
        logits, ref_logits = batch.policy.head(batch.policy.hidden), batch.reference.head(batch.reference.hidden)
        return fastkl.token_stats(logits, batch.tokens, ref_logits, temperature=self.temperature)

    def penalised(self, batch: Batch) -> tuple[fastkl.TokenStats, torch.Tensor]:
        """(TokenStats, KL penalty); of the fields of the reference there is `kl` alone, for the monitor: it has no gradient."""
        logits, ref_logits = batch.policy.head(batch.policy.hidden), batch.reference.head(batch.reference.hidden)
        stats = fastkl.token_stats(logits, batch.tokens, temperature=self.temperature)
        with torch.no_grad():
            kl = fastkl.kl_divergence(logits, ref_logits, temperature=self.temperature)
        return stats._replace(kl=kl), self.penalty(logits, ref_logits)

    @torch.no_grad()
    def kl(self, p: Side, q: Side) -> torch.Tensor:
        """KL(P‖Q) of each token, [B, T]."""
        return fastkl.kl_divergence(p.head(p.hidden), q.head(q.hidden), temperature=self.temperature)


class FromHiddenStates:
    """The same from hidden states and head weights: logits exist for chunk_size tokens at a time only."""

    def __init__(self, beta: float | FixedBeta | PIDBeta, settings: Settings) -> None:
        self.options = dict(temperature=settings.temperature, chunk_size=settings.chunk_size, recompute=True)
        self.penalty = fastkl.LinearKLPenalty(beta, **self.options)

    def stats(self, batch: Batch) -> fastkl.TokenStats:
        """Every statistic of the sampled tokens, each with its gradient to the policy."""
        p, q = batch.policy, batch.reference
        return fastkl.linear_token_stats(p.hidden, p.head.weight, batch.tokens, q.hidden, q.head.weight, bias=p.head.bias, ref_bias=q.head.bias,
                                         **self.options)

    def penalised(self, batch: Batch) -> tuple[fastkl.TokenStats, torch.Tensor]:
        """(TokenStats, KL penalty); of the fields of the reference there is `kl` alone, for the monitor: it has no gradient."""
        p, q = batch.policy, batch.reference
        stats = fastkl.linear_token_stats(p.hidden, p.head.weight, batch.tokens, bias=p.head.bias, **self.options)
        penalty = self.penalty(p.hidden, p.head.weight, q.hidden, q.head.weight, bias=p.head.bias, ref_bias=q.head.bias)
        return stats._replace(kl=self.kl(p, q)), penalty

    @torch.no_grad()
    def kl(self, p: Side, q: Side) -> torch.Tensor:
        """KL(P‖Q) of each token, [B, T]."""
        return fastkl.linear_kl_divergence(p.hidden, p.head.weight, q.hidden, q.head.weight, bias=p.head.bias, ref_bias=q.head.bias, **self.options)


def choose_way(beta: float | FixedBeta | PIDBeta, settings: Settings) -> ThroughLogits | FromHiddenStates:
    """The way that the settings ask for."""
    return (FromHiddenStates if settings.linear else ThroughLogits)(beta, settings)


def choose_beta(settings: Settings) -> FixedBeta | PIDBeta:
    """The weight of the penalty that the settings ask for: fixed, or steered to the target."""
    if settings.beta is not None:
        return FixedBeta(settings.beta)
    return PIDBeta(settings.initial_beta, settings.target_kl, unit="token", kp=settings.kp, ki=settings.ki, kd=settings.kd)
