"""The KL penalty of RLHF as a module, from logits or from hidden states."""

import sys
from typing import TYPE_CHECKING, Any, cast, get_args

import torch

from . import _checks, _head_checks, _modes, _reduce, backend
from ._dtensors import on_local
from ._heads import Given, prepare
from ._types import BetaController, Direction, PenaltyReduction
from .divergence import kl_divergence
from .linear import Head
from .linear_divergences import weighted_kl
from .ops.fields import result_dtype
from .ops.summed_op import SummedInputs, empty_gradient, summed_kl
from .parallel import Shards

# Counts of "tokens" and "sequences", or divisors computed from them.
Counts = dict[str, torch.Tensor | int]
# Arguments shown by print(model) if not None.
_ARGUMENTS = (
    *("direction", "temperature", "reduction"),
    *("softcap", "logits_dtype", "chunk_size", "ref_temperature", "recompute"),
)


class _Penalty(torch.nn.Module):
    """The common part of both penalties: beta, the reduction and the last call's statistics."""

    def __init__(
        self,
        beta: float | BetaController,
        direction: Direction,
        temperature: float,
        reduction: PenaltyReduction,
        elsewhere: str,
        ref_temperature: float | None = None,
    ) -> None:
        super().__init__()
        _checks.choice("direction", direction, get_args(Direction))
        _checks.choice("reduction", reduction, get_args(PenaltyReduction))
        for name, value in {
            "temperature": temperature,
            "ref_temperature": temperature if ref_temperature is None else ref_temperature,
        }.items():
            _checks.fixed_temperature(name, value, elsewhere)
        self.direction, self.temperature, self.reduction = direction, temperature, reduction
        self._beta = beta
        self.last: dict[str, torch.Tensor] = {}
        self.beta  # noqa: B018  (a wrong beta raises here, not in the training loop)

    @property
    def beta(self) -> float:
        """The weight of the next call."""
        value: Any = (
            self._beta
            if isinstance(self._beta, (int, float))
            else getattr(self._beta, "beta", self._beta)
        )
        _checks.expect(
            _checks.is_number(value),
            "beta",
            "a number or a controller with an attribute `beta`",
            value,
            "for a tensor or numpy scalar pass float(beta)",
            TypeError,
        )
        _checks.expect(
            0 <= value <= sys.float_info.max,
            "beta",
            "a finite number of at least 0",
            value,
            "a negative beta would reward divergence" if value < 0 else "look at what computed it",
        )
        return float(value)

    def extra_repr(self) -> str:
        """Return the arguments, for print(model)."""
        return f"beta={self.beta:g}, " + ", ".join(
            f"{name}={getattr(self, name)!r}"
            for name in _ARGUMENTS
            if getattr(self, name, None) is not None
        )

    def _divisor(
        self, divisors: Counts, normalizer: float | torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor | float:
        """Return the divisor of the sum over tokens, by default one from `_counted`."""
        unit = "sequences" if self.reduction == "sequence_mean" else "tokens"
        return (
            divisors[unit]
            if normalizer is None and self.reduction != "sum"
            else _reduce.divisor(self.reduction, normalizer, None, (), dtype)
        )

    def _remember(
        self, kl: torch.Tensor, counts: Counts, divisors: Counts, beta: float, loss: torch.Tensor
    ) -> None:
        """Keep the statistics of a call in `last`, without gradient or synchronisation."""
        if not _modes.transforming():  # a transform's tensors are invalid outside
            # As a decorator, no_grad breaks the graph of a compiled step that creates the module.
            with torch.no_grad():
                kl, total = kl.detach(), kl.sum()
                self.last = {
                    "kl": total / divisors["tokens"],
                    "max_kl": kl.max() if kl.numel() else kl.new_zeros(()),
                    "kl_per_sequence": total / divisors["sequences"],
                    **{
                        name: count if isinstance(count, torch.Tensor) else kl.new_full((), count)
                        for name, count in counts.items()
                    },
                    "beta": kl.new_ones(()) * beta,  # new_full would recompile for each beta
                    "loss": loss.detach().clone(),  # `loss += …` must not change it
                }


def _counted(like: torch.Tensor, mask: torch.Tensor | None) -> tuple[Counts, Counts]:
    """Count unmasked tokens and sequences, in the type of `like`; return the counts and, at least
    1, the divisors of means.
    """
    counts = {
        "tokens": _reduce.tokens(mask, like.shape, like.dtype),
        "sequences": _reduce.sequences(mask, like.shape, like.dtype),
    }
    return counts, {name: _reduce.at_least_one(count) for name, count in counts.items()}


class KLPenalty(_Penalty):
    """Computes beta times the exact KL divergence between policy and reference, a scalar loss.

    Equivalent to

        kl = kl_divergence(policy_logits, ref_logits, mask, temperature=temperature)
        loss = beta * kl.sum() / mask.sum()

    for direction "policy||reference" and reduction "token_mean".

    Args:
        beta: the penalty's weight: a number ≥ 0, or a controller: an object with an attribute
            `beta`, read at every call. 0 gives 0 even for an infinite KL.
        direction: "policy||reference", KL(policy‖reference), the RLHF penalty; or
            "reference||policy".
        temperature: divides both logits; a positive number.
        reduction: "token_mean" (also spelt "mean"): mean over unmasked tokens; "sequence_mean":
            mean over sequences of the sum over each sequence's tokens (the last dimension), as in a
            reward per sequence, excluding entirely masked sequences; "sum".

    forward(policy_logits, ref_logits, mask=None, *, normalizer=None, shard=None) takes [..., V]
    logits and a bool mask [...], and returns a float32 scalar with gradient with respect to the
    logits that require it. With no unmasked token it returns 0. shard: as in kl_divergence; a pair
    is (policy's, reference's).

    normalizer, for both means, replaces the number of tokens (sequences) in this call, so that
    micro-batches and processes of different lengths weight each token equally: pass the total of
    all micro-batches of a step; under DDP and FSDP, which average gradients, the total over all
    processes / world_size. A number above 0, or a tensor with one number; a tensor 0 makes the loss
    0.

    `last` holds the last call's statistics as detached tensors on the logits' device, without a
    synchronisation: "kl" (mean KL per unmasked token, nats), "max_kl", "kl_per_sequence" (mean,
    over sequences with an unmasked token, of the KL summed over a sequence's tokens), "tokens" and
    "sequences" (their counts), "beta", "loss"; only "loss" depends on the normalizer. It is empty
    before the first call; a call inside a transform of torch.func leaves it unchanged.

    Raises ValueError or TypeError for wrong arguments, as kl_divergence does.
    Source: Ziegler et al., Fine-Tuning Language Models from Human Preferences (2019), eq. 2, with
    the exact KL instead of a sampled one.
    """

    def __init__(
        self,
        beta: float | BetaController,
        *,
        direction: Direction = "policy||reference",
        temperature: float = 1.0,
        reduction: PenaltyReduction = "token_mean",
    ) -> None:
        super().__init__(beta, direction, temperature, reduction, "kl_divergence")

    def forward(
        self,
        policy_logits: torch.Tensor,
        ref_logits: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        normalizer: float | torch.Tensor | None = None,
        shard: Shards = None,
    ) -> torch.Tensor:
        """Return the penalty of a batch; see the class."""
        if type(policy_logits) is not torch.Tensor and hasattr(type(policy_logits), "full_tensor"):
            return cast(
                torch.Tensor,
                on_local(
                    self.forward,
                    policy_logits,
                    ref_logits,
                    mask,
                    normalizer=normalizer,
                    shard=shard,
                ),
            )
        first, second = policy_logits, ref_logits
        _checks.two_logits("policy_logits", first, "ref_logits", second, shard is not None)
        if self.direction == "reference||policy":
            first, second = ref_logits, policy_logits
            shard = shard[::-1] if isinstance(shard, tuple) else shard
        _checks.normalizer(normalizer, self.reduction, policy_logits.device)
        beta = self.beta
        _checks.mask(mask, first.shape[:-1], first.device)
        chosen = backend.select(first, second)
        inputs = SummedInputs(first, second, mask, self.temperature, None, 1, chosen)
        gradient = None if shard is not None else empty_gradient(inputs, normalizer)
        like = torch.empty(first.shape[:-1], dtype=result_dtype(first), device=first.device)
        counts, divisors = _counted(like, mask)
        divisor = self._divisor(divisors, normalizer, like.dtype)
        # A tensor, since a changed number would recompile. With beta 0 an infinite KL gives 0.
        scale = like.new_ones(()) * beta
        if gradient is None:
            kl = kl_divergence(first, second, mask, temperature=self.temperature, shard=shard)
            weighted = torch.where(scale == 0, 0.0, scale * kl.sum())
            loss = _reduce.quotient(weighted, divisor, normalizer)
        else:
            loss, kl = summed_kl(gradient, inputs._replace(beta=scale, divisor=divisor))
        self._remember(kl, counts, divisors, beta, loss)
        return loss

    if TYPE_CHECKING:
        __call__ = forward


class LinearKLPenalty(_Penalty):
    """Computes KLPenalty from hidden states and lm_head weights, never with all logits at once, and
    the gradients with the value.

    Equivalent to

        policy_logits = F.linear(hidden, weight, bias)
        ref_logits = F.linear(ref_hidden, ref_weight, ref_bias)
        penalty = KLPenalty(beta, direction=direction, temperature=temperature, reduction=reduction)
        loss = penalty(policy_logits, ref_logits, mask)

    with softcap, logits_dtype, chunk_size and recompute as in linear_kl_divergence. Cost and
    memory: as linear_kl_divergence with reduction "sum".

    Args:
        beta, direction, temperature, reduction: as KLPenalty.
        ref_temperature: divides the reference's logits; a positive number. Default: temperature.
        softcap, logits_dtype, chunk_size, recompute: as linear_kl_divergence, whose "sum" keeps no
            logits, whatever recompute is.

    forward(hidden, weight, ref_hidden, ref_weight=None, mask=None, *, bias=None, ref_bias=None,
    normalizer=None) takes hidden states [..., H], weights [V, H] (or a Head for either) and a bool
    mask [...], and returns a float32 scalar with gradient with respect to the inputs that require
    it; pass ref_weight=weight.detach() to keep the reference's gradient out of a shared lm_head.
    The policy comes first in either direction. With no unmasked token it returns 0.

    normalizer, `last`: as KLPenalty.

    Raises ValueError or TypeError for wrong arguments, as linear_kl_divergence does.
    Source: as KLPenalty.
    """

    def __init__(  # noqa: PLR0913
        self,
        beta: float | BetaController,
        *,
        direction: Direction = "policy||reference",
        temperature: float = 1.0,
        reduction: PenaltyReduction = "token_mean",
        softcap: float | None = None,
        logits_dtype: torch.dtype | None = None,
        chunk_size: int | None = None,
        ref_temperature: float | None = None,
        recompute: bool | None = None,
    ) -> None:
        super().__init__(
            beta, direction, temperature, reduction, "linear_kl_divergence", ref_temperature
        )
        _head_checks.softcap(softcap)
        _head_checks.options(logits_dtype, chunk_size, recompute)
        self.ref_temperature, self.softcap = ref_temperature, softcap
        self.logits_dtype, self.chunk_size, self.recompute = logits_dtype, chunk_size, recompute

    def forward(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor | Head,
        ref_hidden: torch.Tensor,
        ref_weight: torch.Tensor | Head | None = None,
        mask: torch.Tensor | None = None,
        *,
        bias: torch.Tensor | None = None,
        ref_bias: torch.Tensor | None = None,
        normalizer: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the penalty of a batch; see the class."""
        inputs = prepare(
            Given(
                hidden,
                weight,
                bias,
                ref_hidden,
                ref_weight,
                ref_bias,
                self.temperature,
                self.ref_temperature,
                self.softcap,
                mask,
                self.logits_dtype,
                self.chunk_size,
                self.recompute,
            ),
            reference_required=True,
            swapped=self.direction == "reference||policy",
        )
        _checks.normalizer(normalizer, self.reduction, hidden.device)
        like = hidden.new_empty(inputs.hidden.shape[:-1], dtype=result_dtype(hidden))
        beta, (counts, divisors) = self.beta, _counted(like, mask)
        scale = like.new_ones(()) * beta / self._divisor(divisors, normalizer, like.dtype)
        loss, kl = weighted_kl(inputs, scale.expand(like.shape))
        self._remember(kl, counts, divisors, beta, loss)
        return loss

    if TYPE_CHECKING:
        __call__ = forward
