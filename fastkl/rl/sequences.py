"""Sequences of a batch, one per row or concatenated (packed): the tensors of a loss over them, and
the means.
"""

import math
from typing import NamedTuple

import torch

from .. import _modes, _reduce
from ..estimators import finite
from . import _checks


class Sequences(NamedTuple):
    """Assignment of tokens to sequences: one row each, or by owner in a packed batch.

    number: the number of sequences. owner: [total], the sequence of each packed token, `number` for
    a token after the last sequence. right: whether the boundaries of a packed batch are valid, a
    0-d bool.
    """

    number: int
    owner: torch.Tensor | None = None
    right: torch.Tensor | None = None

    def takes(self, value: torch.Tensor, per_token: torch.Tensor) -> bool:
        """Return whether a checked value has one entry per sequence rather than per token."""
        packed = self.owner is not None and len(value) == self.number
        return packed or value.shape != per_token.shape

    def sums(self, per_token: torch.Tensor) -> torch.Tensor:
        """Sum the tokens of each sequence."""
        return (
            per_token.sum(-1)
            if self.owner is None
            else per_token.new_zeros(self.number + 1).index_add(0, self.owner, per_token)[:-1]
        )

    def spread(self, per_sequence: torch.Tensor) -> torch.Tensor:
        """Give each token the value of its sequence."""
        return (
            per_sequence[..., None]
            if self.owner is None
            else torch.nn.functional.pad(per_sequence, (0, 1))[self.owner]
        )

    def last(self, mask: torch.Tensor) -> torch.Tensor:
        """Return a mask of each sequence's last token that counts."""
        counted = self.sums(mask.long())
        upto = counted if self.owner is None else counted.cumsum(0)
        return mask & (mask.cumsum(-1) == self.spread(upto))

    def parts(self, mask: torch.Tensor, number: int) -> torch.Tensor:
        """Index (0 to number - 1) of the equal part of its sequence that each counted token is in;
        `number` for other tokens.
        """
        counted = self.sums(mask.long())
        before = 0 if self.owner is None else self.spread(counted.cumsum(0) - counted)
        place = mask.cumsum(-1) - 1 - before
        part = number * place // self.spread(counted).clamp(min=1)
        return part.clamp(0, number - 1).masked_fill(~mask, number)


def sequences_of(name: str, per_token: torch.Tensor, cu_seqlens: torch.Tensor | None) -> Sequences:
    """Return the sequences of a checked tensor, from its shape or from the boundaries, which are
    checked here.
    """
    if cu_seqlens is None:
        return Sequences(per_token.shape[:-1].numel())
    _checks.cu_seqlens(cu_seqlens, name, per_token)
    bounds, place = cu_seqlens.long(), torch.arange(len(per_token), device=cu_seqlens.device)
    right = (bounds[0] == 0) & (bounds[-1] == len(per_token)) & (bounds.diff() >= 0).all()
    owner = torch.searchsorted(bounds, place, right=True) - 1
    return Sequences(len(bounds) - 1, owner.clamp(0, len(bounds) - 1), right)


def loss_tensors(
    logprob: torch.Tensor,
    old_logprob: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    *,
    boundaries_needed: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Sequences]:
    """Check the tensors of a loss and return (logprob, old_logprob, advantages per token, mask,
    sequences), in the type to compute in, with 0 where the token does not count.

    boundaries_needed: whether the loss must know which sequence a token is in.
    """
    _checks.float_tensor("logprob", logprob, "log-probabilities [..., T]", 1)
    _checks.expect(
        cu_seqlens is not None or logprob.dim() > 1 or not boundaries_needed,
        "cu_seqlens",
        "the boundaries of the sequences packed into logprob, for this reduction or level, which "
        "ask what sequence a token is in",
        None,
        "pass them, or [1, T] tensors for a single sequence",
    )
    sequences = sequences_of("logprob", logprob, cu_seqlens)
    if old_logprob is not None:
        _checks.float_tensor(
            "old_logprob", old_logprob, "log-probabilities shaped as logprob, or None"
        )
        _checks.like("old_logprob", old_logprob, "logprob", logprob)
        _checks.expect(
            not old_logprob.requires_grad,
            "old_logprob",
            "a tensor without gradient",
            "one that requires it",
            "the ratio is differentiated with respect to logprob alone: pass old_logprob.detach()",
        )
    _checks.float_tensor("advantages", advantages, "one per sequence or per token")
    _checks.per_token_or_sequence("advantages", advantages, "logprob", logprob, cu_seqlens)
    _checks.mask(mask, logprob.shape, logprob.device)
    advantages = advantages.detach()
    if sequences.takes(advantages, logprob):
        advantages = sequences.spread(advantages)
    mask = torch.ones_like(logprob, dtype=torch.bool) if mask is None else mask
    now = finite(logprob)
    old = now.detach() if old_logprob is None else finite(old_logprob)
    # A product with the mask would keep a NaN, in the value or the gradient.
    now, old, advantages = (
        torch.where(mask, each, 0.0) for each in (now, old, advantages.to(now.dtype))
    )
    return now, old, advantages, mask, sequences


def total(
    per_token: torch.Tensor,
    mask: torch.Tensor,
    sequences: Sequences,
    reduction: str,
    normalizer: float | torch.Tensor | None,
    max_length: int | None = None,
) -> torch.Tensor:
    """Reduce per-token losses, 0 where the token does not count, to a scalar; "none" keeps them."""
    kept = reduction == "none"
    loss, tokens = per_token if kept else per_token.sum(), sequences.sums(mask.long())
    if reduction == "grpo":
        loss = (per_token / sequences.spread(tokens).clamp(min=1)).sum()
    if max_length is not None and _modes.readable(tokens) and tokens.numel():
        _checks.expect(
            tokens.max() <= max_length,
            "max_length",
            f"at least the tokens of each sequence, {int(tokens.max())}",
            max_length,
            "pass the limit that the sampling had",
        )
    if reduction not in ("none", "sum"):
        counts = ((tokens > 0) if reduction == "sequence_mean" else mask).sum().clamp(min=1)
        count = max(sequences.number, 1) if reduction in ("grpo", "dr_grpo") else counts
        divisor = _reduce.divisor("mean", normalizer, None, (), loss.dtype)
        loss = loss / ((count if normalizer is None else divisor) * (max_length or 1))
    if sequences.right is not None:
        loss = torch.where(sequences.right, loss, math.nan)
    return torch.where(mask, loss, 0.0) if kept else loss
