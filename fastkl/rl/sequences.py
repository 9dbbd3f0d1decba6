"""Sequences of a batch, a row each or packed one behind the other, and the means over them."""

import math
from typing import NamedTuple

import torch

from .. import _reduce
from . import _checks


class Sequences(NamedTuple):
    """Assignment of tokens to sequences: a row each, or in a packed batch all of one owner.

    number: how many sequences. owner: [total], the sequence of each packed token, `number` for a
    token behind them all. right: whether the boundaries of a packed batch were right, a 0-d bool.
    """

    number: int
    owner: torch.Tensor | None = None
    right: torch.Tensor | None = None

    def sums(self, per_token: torch.Tensor) -> torch.Tensor:
        """Sum the tokens of each sequence."""
        if self.owner is None:
            return per_token.sum(-1)
        return per_token.new_zeros(self.number + 1).index_add(0, self.owner, per_token)[:-1]

    def spread(self, per_sequence: torch.Tensor) -> torch.Tensor:
        """Give each token the value of its sequence."""
        if self.owner is None:
            return per_sequence[..., None]
        return torch.nn.functional.pad(per_sequence, (0, 1))[self.owner]


def sequences_of(logprob: torch.Tensor, cu_seqlens: torch.Tensor | None, needed: bool) -> Sequences:
    """Check logprob and return its sequences, from its shape or from the boundaries.

    needed: whether the loss asks which sequence a token is in.
    """
    _checks.float_tensor("logprob", logprob, "log-probabilities [..., T]", 1)
    if cu_seqlens is not None:
        _checks.cu_seqlens(cu_seqlens, "logprob", logprob)
        return Sequences(len(cu_seqlens) - 1, *owners(cu_seqlens, len(logprob)))
    _checks.expect(
        logprob.dim() > 1 or not needed,
        "cu_seqlens",
        "the boundaries of the sequences packed into logprob, for this reduction or level, which "
        "ask what sequence a token is in",
        None,
        "pass them, or [1, T] tensors for a single sequence",
    )
    return Sequences(logprob.shape[:-1].numel())


def owners(cu_seqlens: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the owner of each of `total` packed tokens, and whether the boundaries run from 0 to
    total.
    """
    bounds = cu_seqlens.long()
    right = (bounds[0] == 0) & (bounds[-1] == total) & (bounds.diff() >= 0).all()
    owner = torch.searchsorted(bounds, torch.arange(total, device=bounds.device), right=True) - 1
    return owner.clamp(0, len(bounds) - 1), right


def counted(value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Set the tokens that do not count to 0; a product with the mask would keep a NaN, in the value
    or in the gradient.
    """
    return torch.where(mask, value, 0.0)


def divisor(
    normalizer: float | torch.Tensor | None, count: float | torch.Tensor, dtype: torch.dtype
) -> float | torch.Tensor:
    """Return the normalizer, a tensor 0 as inf, or without one the count."""
    return count if normalizer is None else _reduce.divisor("mean", normalizer, None, (), dtype)


def total(
    per_token: torch.Tensor,
    mask: torch.Tensor,
    sequences: Sequences,
    reduction: str,
    normalizer: float | torch.Tensor | None,
    max_length: int | None = None,
) -> torch.Tensor:
    """Reduce per-token losses, 0 where the token does not count, to a scalar."""
    loss, tokens = per_token.sum(), sequences.sums(mask.long())
    if reduction == "grpo":
        loss = (per_token / sequences.spread(tokens).clamp(min=1)).sum()
    if max_length is not None:
        readable = tokens.device.type == "cpu" and not torch.compiler.is_compiling()
        if readable and tokens.numel() and int(tokens.max()) > max_length:
            raise ValueError(
                f"max_length: expected at least the tokens of each sequence, {int(tokens.max())}, "
                f"got {max_length}; pass the limit that the sampling had"
            )
    if reduction != "sum":
        counts = (tokens > 0) if reduction == "sequence_mean" else mask
        of_sequences = reduction in ("grpo", "dr_grpo")
        count = max(sequences.number, 1) if of_sequences else counts.sum().clamp(min=1)
        loss = loss / (divisor(normalizer, count, loss.dtype) * (max_length or 1))
    return loss if sequences.right is None else torch.where(sequences.right, loss, math.nan)
