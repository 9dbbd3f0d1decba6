"""The distillation loss as a module, from logits or from hidden states: cross-entropy with the
labels and a divergence from the teacher.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_args

import torch

from . import _checks, _head_checks, _modes, _reduce, _value_checks
from ._heads import Given, prepare
from ._types import DistillationDirection, DivergenceName
from .divergence import DIVERGENCES, Call, of_name
from .linear import Head, linear_token_stats
from .linear_divergences import reduced
from .parallel import Shards, VocabShard, shards_of
from .tokens import TokenStats, token_stats

# The label of an ignored token, as in torch.nn.functional.cross_entropy.
IGNORED = -100
# Arguments shown by print(model) if not None.
_ARGUMENTS = (
    *("divergence", "alpha", "temperature", "direction", "divergence_alpha", "beta"),
    *("logits_dtype", "chunk_size", "recompute"),
)


class _Distillation(torch.nn.Module):
    """The common part of both losses: the divergence, the weights, the last call's statistics."""

    def __init__(
        self,
        divergence: DivergenceName,
        alpha: float,
        temperature: float,
        direction: DistillationDirection,
        divergence_alpha: float | None,
        beta: float | None,
        elsewhere: str,
    ) -> None:
        super().__init__()
        _checks.choice("divergence", divergence, DIVERGENCES)
        _checks.choice("direction", direction, get_args(DistillationDirection))
        _checks.share("alpha", alpha)
        _checks.fixed_temperature("temperature", temperature, elsewhere)
        _checks.fixed_temperature("temperature (squared)", temperature**2, elsewhere)
        self.divergence, self.direction, self.alpha = divergence, direction, alpha
        self.temperature, self.divergence_alpha, self.beta = temperature, divergence_alpha, beta
        self._of = of_name(divergence, divergence_alpha, beta, "divergence_alpha")
        self._reverse = direction == "student||teacher"
        self.last: dict[str, torch.Tensor] = {}

    def extra_repr(self) -> str:
        """Return the arguments, for print(model)."""
        return ", ".join(
            f"{name}={getattr(self, name)!r}"
            for name in _ARGUMENTS
            if getattr(self, name, None) is not None
        )

    def _combine(
        self,
        like: torch.Tensor,
        vocabulary: int,
        labels: torch.Tensor,
        normalizer: float | torch.Tensor | None,
        teacher: tuple[Any, ...],
        statistics: Callable[..., TokenStats],
        divergence: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Check labels [...] of `like` [..., X], add up the terms with a weight above 0, and
        remember their means.

        statistics: token_stats as a function of (labels, *teacher, mask=); divergence: its sum as a
        function of the mask.
        """
        _checks.tokens(labels, like.shape[:-1], like.device, "labels")
        _checks.normalizer(normalizer, "mean", like.device)
        mask, sums = labels != IGNORED, {}
        if _modes.readable(labels):
            _value_checks.tokens_in_range(
                *(labels[mask], vocabulary, "labels"), f"give tokens that do not count {IGNORED}"
            )
        # The KL at temperature 1 comes with the log-probs.
        joint = self.divergence == "kl" and self.temperature == 1 and 0 < self.alpha < 1
        if self.alpha < 1:
            stats: Any = statistics(labels, *(teacher if joint else ()), mask=mask)
            sums["cross_entropy"] = -stats.logprob.sum()
        if joint:
            sums["divergence"] = (stats.kl if self._reverse else stats.ref_kl).sum()
        elif self.alpha > 0:
            sums["divergence"] = divergence(mask)
        if self.alpha == 1:  # no log-prob turns NaN at a wrong label
            right = ~mask | (labels >= 0) & (labels < vocabulary)
            sums["divergence"] = torch.where(right.all(), sums["divergence"], torch.nan)
        scales = {"cross_entropy": 1 - self.alpha, "divergence": self.alpha * self.temperature**2}
        total = torch.stack([scales[name] * value for name, value in sums.items()]).sum()
        loss = _reduce.reduced(total, mask, None, "mean", normalizer)
        if not _modes.transforming():  # a transform's tensors are invalid outside
            with torch.no_grad():
                tokens = mask.sum(dtype=total.dtype)
                means = {name: value / tokens.clamp(min=1) for name, value in sums.items()}
                self.last = {**means, "tokens": tokens, "loss": loss.detach().clone()}
        return loss


class DistillationLoss(_Distillation):
    """Computes a scalar loss: a weighted sum of the cross-entropy with the labels and a divergence
    between student and teacher.

    Equivalent to

        mask = labels != -100
        cross_entropy = F.cross_entropy(logits[mask].float(), labels[mask], reduction="sum")
        kl = kl_divergence(teacher_logits, logits, mask, temperature=temperature)
        loss = ((1 - alpha) * cross_entropy + alpha * temperature**2 * kl.sum()) / mask.sum()

    for the default divergence, without a tensor of probabilities: from one read of both logits at
    temperature 1, otherwise from one read of the student's for the cross-entropy plus those of the
    divergence.

    Args:
        divergence: "kl", "js", "skew_kl", "renyi", "total_variation" or "jeffreys", as in
            linear_divergence. P, its first model, is the teacher.
        alpha: the divergence's weight, a number in [0, 1]; 1 - alpha is the cross-entropy's. A term
            of weight 0 is not computed.
        temperature: divides both logits in the divergence, not in the cross-entropy; a positive
            number. Its square in the loss keeps the gradient's scale.
        direction: "teacher||student", the forward KL, or "student||teacher", the reverse KL; for
            every divergence, P and Q exchanged.
        divergence_alpha: the divergence's own alpha, for "skew_kl" and "renyi".
        beta: for "js", the share of P. Default: 0.5.

    forward(logits, teacher_logits, labels, *, normalizer=None, shard=None) takes logits [..., V]
    and integer labels [...], -100 where a token does not count (any other label outside 0 … V-1 is
    an error on a CPU and gives NaN on a GPU), and returns a float32 scalar with gradient with
    respect to the logits that require it. labels[..., t] is the token that logits[..., t, :]
    predict: for a causal model pass logits[:, :-1] and labels[:, 1:]. With no token that counts it
    returns 0. normalizer: the divisor in place of mask.sum(), as in KLPenalty. shard: as in
    kl_divergence, a pair is (student's, teacher's); labels are ids of the whole vocabulary.

    `last` holds the last call's means over the tokens that count, as detached tensors:
    "cross_entropy" and "divergence" (nats, without weights and temperature²; absent if not
    computed), and "tokens" (their count) and "loss". A call inside a transform of torch.func leaves
    it unchanged.

    Raises ValueError or TypeError for wrong arguments, as kl_divergence and token_stats do.
    Source: Hinton, Vinyals & Dean, Distilling the Knowledge in a Neural Network (2015), section 2.
    """

    def __init__(
        self,
        divergence: DivergenceName = "kl",
        alpha: float = 0.5,
        temperature: float = 1.0,
        *,
        direction: DistillationDirection = "teacher||student",
        divergence_alpha: float | None = None,
        beta: float | None = None,
    ) -> None:
        super().__init__(
            divergence, alpha, temperature, direction, divergence_alpha, beta, "kl_divergence"
        )

    def forward(
        self,
        logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        labels: torch.Tensor,
        *,
        normalizer: float | torch.Tensor | None = None,
        shard: Shards = None,
    ) -> torch.Tensor:
        """Return the loss of a batch; see the class."""
        _checks.two_logits("logits", logits, "teacher_logits", teacher_logits, shard is not None)
        own: VocabShard | None = None
        vocabulary, pair, shards = logits.shape[-1], (logits, teacher_logits), shard
        if shard is not None:
            own, _ = shards_of(shard, {"logits": logits, "teacher_logits": teacher_logits})
            vocabulary = own.vocab_size
        if not self._reverse:
            pair, shards = pair[::-1], shard[::-1] if isinstance(shard, tuple) else shard
        return self._combine(
            *(logits, vocabulary, labels, normalizer, (teacher_logits,)),
            lambda labels, *teacher, mask: token_stats(
                logits, labels, *teacher, mask=mask, shard=shard if teacher else own
            ),
            lambda mask: Call(*pair, mask, self.temperature, None, "sum", None, shards).of(
                *self._of
            ),
        )

    if TYPE_CHECKING:
        __call__ = forward


class LinearDistillationLoss(_Distillation):
    """Computes DistillationLoss from hidden states and lm_head weights, one chunk of logits at a
    time.

    Equivalent to

        logits = F.linear(hidden, weight)
        teacher_logits = F.linear(ref_hidden, ref_weight)
        loss = DistillationLoss(divergence, alpha, temperature)(logits, teacher_logits, labels)

    with logits_dtype, chunk_size and recompute as in linear_token_stats. The KL at temperature 1
    comes with the cross-entropy, at the matrix products and memory of one linear_token_stats of
    both models: four products with a trained lm_head and kept logits, six without. Otherwise the
    divergence costs the products of linear_divergence with "sum", four, and the cross-entropy those
    of linear_token_stats of the student, three or four.

    Args:
        divergence, alpha, temperature, direction, divergence_alpha, beta: as DistillationLoss.
        logits_dtype, chunk_size, recompute: as linear_token_stats.

    forward(hidden, weight, ref_hidden, ref_weight, labels, *, normalizer=None) takes the student's
    hidden states [..., H] and lm_head weight [V, H] or Head, the teacher's [..., H_ref] and
    [V, H_ref] or Head (None: the student's), and labels [...], and returns a float32 scalar with
    gradient with respect to the inputs that require it; pass weight.detach() as ref_weight to keep
    the teacher's gradient out of a shared lm_head. Pass a bias, soft cap, logit scale or shard in
    the Head. labels, normalizer, `last`: as DistillationLoss.

    Raises ValueError or TypeError for wrong arguments, as linear_divergence and linear_token_stats
    do. Source: as DistillationLoss.
    """

    def __init__(  # noqa: PLR0913
        self,
        divergence: DivergenceName = "kl",
        alpha: float = 0.5,
        temperature: float = 1.0,
        *,
        direction: DistillationDirection = "teacher||student",
        divergence_alpha: float | None = None,
        beta: float | None = None,
        logits_dtype: torch.dtype | None = None,
        chunk_size: int | None = None,
        recompute: bool | None = None,
    ) -> None:
        super().__init__(
            divergence, alpha, temperature, direction, divergence_alpha, beta, "linear_divergence"
        )
        _head_checks.options(logits_dtype, chunk_size, recompute)
        self.logits_dtype, self.chunk_size, self.recompute = logits_dtype, chunk_size, recompute

    def forward(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor | Head,
        ref_hidden: torch.Tensor,
        ref_weight: torch.Tensor | Head | None,
        labels: torch.Tensor,
        *,
        normalizer: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss of a batch; see the class."""
        kind, share, factor = self._of
        inputs = prepare(
            Given(
                hidden,
                weight,
                None,
                ref_hidden,
                ref_weight,
                None,
                self.temperature,
                None,
                None,
                None,
                self.logits_dtype,
                self.chunk_size,
                self.recompute,
            ),
            reference_required=True,
            swapped=self._reverse == (factor is not None),
        )
        statistics = functools.partial(
            linear_token_stats,
            hidden,
            weight,
            logits_dtype=self.logits_dtype,
            chunk_size=self.chunk_size,
            recompute=self.recompute,
        )

        def divergence(mask: torch.Tensor) -> torch.Tensor:
            asked = inputs._replace(mask=mask, divergence=kind, share=share)
            total = reduced(asked, None, "sum", None, self.recompute)
            return total if factor is None else factor * total

        return self._combine(
            *(inputs.hidden, inputs.vocabulary or len(inputs.weight), labels, normalizer),
            (ref_hidden, ref_weight),
            *(statistics, divergence),
        )

    if TYPE_CHECKING:
        __call__ = forward
