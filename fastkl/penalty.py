"""The KL penalty of RLHF as a module, from logits or from hidden states."""

from __future__ import annotations

import math

import torch

from . import _checks, _dispatch, _rows, linear
from .divergence import kl_divergence

DIRECTIONS = ("policy||reference", "reference||policy")
REDUCTIONS = ("token_mean", "sequence_mean", "sum")


class _Penalty(torch.nn.Module):
    """What both penalties share: beta, the reduction, and the last statistics."""

    def __init__(self, beta: float | object, direction: str, temperature: float, reduction: str, elsewhere: str) -> None:
        super().__init__()
        _checks.choice("direction", direction, DIRECTIONS)
        _checks.choice("reduction", reduction, REDUCTIONS)
        if isinstance(temperature, torch.Tensor):
            raise TypeError(f"temperature: expected a positive number, got a tensor; call {elsewhere} for a temperature per token")
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
            remedy = "a negative beta would reward divergence" if value < 0 else "look at what computed it"
            raise ValueError(f"beta: expected a finite number of at least 0, got {value}; {remedy}")
        return float(value)

    def extra_repr(self) -> str:
        """The arguments, for print(model)."""
        return f"beta={self.beta:g}, direction={self.direction!r}, temperature={self.temperature:g}, reduction={self.reduction!r}"

    def _divisors(self, like: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(how many tokens count, what the sum over tokens is divided by), for per-token values shaped as `like`."""
        count = like.new_full((), like.numel()) if mask is None else mask.sum(dtype=like.dtype)
        if self.reduction == "token_mean":
            return count, count.clamp(min=1)
        if self.reduction == "sum":
            return count, like.new_ones(())
        sequences = like.new_ones(like.shape[:-1], dtype=torch.bool) if mask is None else (mask.any(-1) if mask.dim() else mask)
        return count, sequences.sum(dtype=like.dtype).clamp(min=1)

    @torch.no_grad()
    def _remember(self, kl: torch.Tensor, count: torch.Tensor, beta: float, loss: torch.Tensor) -> None:
        if _dispatch.transforming():
            return  # these tensors are worth nothing outside the transform
        kl = kl.detach()
        self.last = {
            "kl": kl.sum() / count.clamp(min=1),
            "max_kl": kl.max() if kl.numel() else kl.new_zeros(()),
            "tokens": count,
            "beta": kl.new_ones(()) * beta,
            "loss": loss.detach(),
        }


class KLPenalty(_Penalty):
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
    counts, nats), "max_kl", "tokens" (how many counted), "beta", "loss". Empty before the first call; a call inside a transform
    of torch.func leaves them as they were.

    Raises ValueError or TypeError for wrong arguments, as kl_divergence does.
    Source: Ziegler et al., Fine-Tuning Language Models from Human Preferences (2019), eq. 2, with the KL taken exactly instead of sampled.
    """

    def __init__(self, beta: float | object, *, direction: str = "policy||reference", temperature: float = 1.0,
                 reduction: str = "token_mean") -> None:
        super().__init__(beta, direction, temperature, reduction, "kl_divergence")

    def forward(self, policy_logits: torch.Tensor, ref_logits: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The penalty of a batch; see the class."""
        _checks.logits("policy_logits", policy_logits)
        _checks.logits("ref_logits", ref_logits)
        _checks.same_shape("ref_logits", ref_logits, "policy_logits", policy_logits)
        first, second = (policy_logits, ref_logits) if self.direction == DIRECTIONS[0] else (ref_logits, policy_logits)
        kl = kl_divergence(first, second, temperature=self.temperature, mask=mask)
        beta = self.beta
        count, divisor = self._divisors(kl, mask)
        loss = beta * kl.sum() / divisor
        self._remember(kl, count, beta, loss)
        return loss


class LinearKLPenalty(_Penalty):
    """KLPenalty from hidden states and lm_head weights: never all logits at once, its gradients computed together with its value.

    Equivalent to

        policy_logits = F.linear(hidden, weight, bias)
        ref_logits = F.linear(ref_hidden, ref_weight, ref_bias)
        loss = KLPenalty(beta, direction=direction, temperature=temperature, reduction=reduction)(policy_logits, ref_logits, mask)

    with softcap, logits_dtype and chunk_size as in linear_kl_divergence, whose costs and memory it has with reduction "sum".

    Args:
        beta, direction, temperature, reduction: as KLPenalty.
        softcap, logits_dtype, chunk_size: as linear_kl_divergence.

    forward(hidden, weight, ref_hidden, ref_weight=None, mask=None, *, bias=None, ref_bias=None) takes hidden states [..., H], weights [V, H] and a
    bool mask [...], and returns a float32 scalar with gradient to whatever of them requires it; pass ref_weight=weight.detach() where a trained
    lm_head is shared and only the policy is to learn through it. The policy comes first in either direction. With no token that counts it returns 0.

    `last` as KLPenalty.

    Raises ValueError or TypeError for wrong arguments, as linear_kl_divergence does.
    Source: as KLPenalty.
    """

    def __init__(self, beta: float | object, *, direction: str = "policy||reference", temperature: float = 1.0, reduction: str = "token_mean",
                 softcap: float | None = None, logits_dtype: torch.dtype | None = None, chunk_size: int | None = None) -> None:
        super().__init__(beta, direction, temperature, reduction, "linear_kl_divergence")
        _checks.softcap(softcap)
        _checks.chunk_size(chunk_size)
        self.softcap = softcap
        self.logits_dtype = logits_dtype
        self.chunk_size = chunk_size

    def extra_repr(self) -> str:
        """The arguments, for print(model)."""
        options = {"softcap": self.softcap, "logits_dtype": self.logits_dtype, "chunk_size": self.chunk_size}
        return ", ".join([super().extra_repr(), *(f"{name}={value}" for name, value in options.items() if value is not None)])

    def forward(self, hidden: torch.Tensor, weight: torch.Tensor, ref_hidden: torch.Tensor, ref_weight: torch.Tensor | None = None,
                mask: torch.Tensor | None = None, *, bias: torch.Tensor | None = None, ref_bias: torch.Tensor | None = None) -> torch.Tensor:
        """The penalty of a batch; see the class."""
        made = linear.prepare(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, self.temperature, self.softcap, mask, self.logits_dtype,
                              self.chunk_size, reference_required=True)
        if self.direction == DIRECTIONS[1]:
            made = made.swapped()
        beta = self.beta
        like = hidden.new_empty(hidden.shape[:-1], dtype=_rows.result_dtype(hidden))
        count, divisor = self._divisors(like, mask)
        loss, kl = linear.weighted_kl(made, (beta / divisor).expand(hidden.shape[:-1]))
        self._remember(kl, count, beta, loss)
        return loss
