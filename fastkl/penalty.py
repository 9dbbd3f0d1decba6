"""The KL penalty of RLHF as a module."""

from __future__ import annotations

import math

import torch

from . import _checks
from .divergence import kl_divergence

DIRECTIONS = ("policy||reference", "reference||policy")
REDUCTIONS = ("token_mean", "sequence_mean", "sum")


class KLPenalty(torch.nn.Module):
    """beta times the exact KL divergence between policy and reference, reduced to a scalar loss.

    Equivalent to

        kl = kl_divergence(policy_logits, ref_logits, temperature=temperature, mask=mask)   # direction "policy||reference"
        loss = beta * kl.sum() / mask.sum()                                                 # reduction "token_mean"

    Args:
        beta: the penalty's weight: a number ≥ 0, or a controller: an object with an attribute `beta`, read at every call.
        direction: "policy||reference", KL(policy‖reference), the RLHF penalty; or "reference||policy".
        temperature: divides both logits; a positive number.
        reduction: "token_mean": mean over the tokens that count; "sequence_mean": mean over sequences of the sum over each sequence's tokens
            (the last dimension), as in a reward per sequence, sequences without a token that counts left out; "sum".

    forward(policy_logits, ref_logits, mask=None) takes [..., V] logits and a bool mask [...], and returns a float32 scalar with gradient to
    whichever logits require it. With no token that counts it returns 0.

    `last` holds the last call's statistics as detached tensors on the logits' device, nothing synchronised: "kl" (mean KL per token that
    counts, nats), "max_kl", "tokens" (how many counted), "beta", "loss". Empty before the first call.

    Raises ValueError or TypeError for wrong arguments, as kl_divergence does.
    Source: Ziegler et al., Fine-Tuning Language Models from Human Preferences (2019), eq. 2, with the KL taken exactly instead of sampled.
    """

    def __init__(self, beta: float | object, *, direction: str = "policy||reference", temperature: float = 1.0,
                 reduction: str = "token_mean") -> None:
        super().__init__()
        _checks.choice("direction", direction, DIRECTIONS)
        _checks.choice("reduction", reduction, REDUCTIONS)
        if isinstance(temperature, torch.Tensor):
            raise TypeError("temperature: expected a positive number, got a tensor; call kl_divergence for a temperature per token")
        _checks.temperature(temperature, torch.Size(), torch.device("cpu"))
        self.direction = direction
        self.temperature = temperature
        self.reduction = reduction
        self._beta = beta
        self.last: dict[str, torch.Tensor] = {}
        self.beta  # noqa: B018  (a wrong one fails here, not in the training loop)

    @property
    def beta(self) -> float:
        """The weight of the next call."""
        value = self._beta if isinstance(self._beta, (int, float)) else getattr(self._beta, "beta", self._beta)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"beta: expected a number or a controller with an attribute `beta`, got {type(value).__name__}; "
                            f"for a tensor or numpy scalar pass float(beta)")
        if not (0 <= value < math.inf):
            raise ValueError(f"beta: expected a finite number of at least 0, got {value}; a negative beta would reward divergence")
        return float(value)

    def extra_repr(self) -> str:
        """The arguments, for print(model)."""
        return f"beta={self.beta:g}, direction={self.direction!r}, temperature={self.temperature:g}, reduction={self.reduction!r}"

    def forward(self, policy_logits: torch.Tensor, ref_logits: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The penalty of a batch; see the class."""
        _checks.logits("policy_logits", policy_logits)
        _checks.logits("ref_logits", ref_logits)
        _checks.same_shape("ref_logits", ref_logits, "policy_logits", policy_logits)
        first, second = (policy_logits, ref_logits) if self.direction == DIRECTIONS[0] else (ref_logits, policy_logits)
        kl = kl_divergence(first, second, temperature=self.temperature, mask=mask)
        beta = self.beta
        count = kl.new_full((), kl.numel()) if mask is None else mask.sum(dtype=kl.dtype)
        if self.reduction == "token_mean":
            divisor = count.clamp(min=1)
        elif self.reduction == "sequence_mean":
            sequences = kl.new_ones(kl.shape[:-1], dtype=torch.bool) if mask is None else (mask.any(-1) if mask.dim() else mask)
            divisor = sequences.sum(dtype=kl.dtype).clamp(min=1)
        else:
            divisor = kl.new_ones(())
        total = kl.sum()
        loss = beta * total / divisor
        with torch.no_grad():
            self.last = {
                "kl": total.detach() / count.clamp(min=1),
                "max_kl": kl.detach().max() if kl.numel() else kl.new_zeros(()),
                "tokens": count,
                "beta": kl.new_ones(()) * beta,
                "loss": loss.detach(),
            }
        return loss
