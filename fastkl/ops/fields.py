"""The vocabulary of row statistics: fields, saved values, and the scaling of logits."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import reference

FIELDS = ("logprob", "entropy", "ref_logprob", "kl", "ref_kl")
SAVED = reference.SAVED  # values per row held for backward, the same number on either backend


class Scaling(NamedTuple):
    """Soft caps, and the ratio that multiplies Q's capped logits.

    softcap, ref_softcap: soft caps of P's and of Q's logits, 0 for none. ratio: the inverse
    temperature of Q over that of P, a number or one per row [N], contiguous, in the type of the
    results; it multiplies Q's capped logits.
    """

    softcap: float = 0.0
    ref_softcap: float = 0.0
    ratio: float | torch.Tensor = 1.0


def result_dtype(logits: torch.Tensor) -> torch.dtype:
    """float64 for float64 logits (reference only), else float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
