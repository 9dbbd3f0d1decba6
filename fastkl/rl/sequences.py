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

    def takes(self, value: torch.Tensor, per_token: torch.Tensor) -> bool:
        """Tell whether a checked value is one per sequence rather than per token."""
        packed = self.owner is not None and len(value) == self.number
        return packed or value.shape != per_token.shape

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

    def last(self, mask: torch.Tensor) -> torch.Tensor:
        """Mask the last token that counts of each sequence."""
        counted = self.sums(mask.long())
        upto = counted if self.owner is None else counted.cumsum(0)
        return mask & (mask.cumsum(-1) == self.spread(upto))


def sequences_of(name: str, per_token: torch.Tensor, cu_seqlens: torch.Tensor | None) -> Sequences:
    """Return the sequences of a checked tensor, from its shape or from the boundaries, which are
    checked.
    """
    if cu_seqlens is None:
        return Sequences(per_token.shape[:-1].numel())
    _checks.cu_seqlens(cu_seqlens, name, per_token)
    bounds, place = cu_seqlens.long(), torch.arange(len(per_token), device=cu_seqlens.device)
    right = (bounds[0] == 0) & (bounds[-1] == len(per_token)) & (bounds.diff() >= 0).all()
    owner = torch.searchsorted(bounds, place, right=True) - 1
    return Sequences(len(bounds) - 1, owner.clamp(0, len(bounds) - 1), right)


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
        counts = ((tokens > 0) if reduction == "sequence_mean" else mask).sum().clamp(min=1)
        count = max(sequences.number, 1) if reduction in ("grpo", "dr_grpo") else counts
        divisor = _reduce.divisor("mean", normalizer, None, (), loss.dtype)
        loss = loss / ((count if normalizer is None else divisor) * (max_length or 1))
    return loss if sequences.right is None else torch.where(sequences.right, loss, math.nan)
