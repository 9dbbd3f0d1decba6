"""Statistics of sampled tokens: log-probabilities, entropy and KL of a policy and its reference
from one read of their logits.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast, overload

import torch

from . import _checks, _modes, _value_checks, backend, f_divergences
from ._collectives import logits_at, sharded_logits
from ._dtensors import takes_dtensors
from .ops.engine import ENGINES
from .ops.fields import FIELDS, FIELDS_OF, result_dtype
from .ops.row_op import RowInputs, per_token, row_statistics
from .ops.topk_op import CellInputs, absent_entries, cells
from .ops.topk_rows import ListDivergence
from .parallel import WHOLE, Shards


class TokenStats(NamedTuple):
    """Per-token statistics, [...] float32 in nats.

    logprob: log π(token). entropy: H(π). ref_logprob: log π_ref(token). kl: KL(π‖π_ref). ref_kl:
    KL(π_ref‖π). lse, ref_lse: the log-sum-exps of both logits over the temperature. logprob and
    ref_logprob are None without tokens; the reference's fields and both KLs are None without
    ref_logits. A field that depends on no argument requiring gradient has requires_grad False.
    """

    logprob: torch.Tensor | None
    entropy: torch.Tensor
    ref_logprob: torch.Tensor | None
    kl: torch.Tensor | None
    ref_kl: torch.Tensor | None
    lse: torch.Tensor
    ref_lse: torch.Tensor | None


class PolicyTokenStats(TokenStats):
    """TokenStats of given tokens, as a type checker sees it."""

    logprob: torch.Tensor


class PairedTokenStats(PolicyTokenStats):
    """TokenStats with a reference, as a type checker sees it: no field is None."""

    ref_logprob: torch.Tensor
    kl: torch.Tensor
    ref_kl: torch.Tensor
    ref_lse: torch.Tensor


@overload
def token_stats(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    ref_logits: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    mask: torch.Tensor | None = None,
    support: torch.Tensor | None = None,
    shard: Shards = None,
) -> PairedTokenStats: ...
@overload
def token_stats(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    ref_logits: None = None,
    *,
    temperature: float | torch.Tensor = 1.0,
    mask: torch.Tensor | None = None,
    support: torch.Tensor | None = None,
    shard: Shards = None,
) -> PolicyTokenStats: ...
@overload
def token_stats(
    logits: torch.Tensor,
    tokens: torch.Tensor | None = None,
    ref_logits: torch.Tensor | None = None,
    *,
    temperature: float | torch.Tensor = 1.0,
    mask: torch.Tensor | None = None,
    support: torch.Tensor | None = None,
    shard: Shards = None,
) -> TokenStats: ...
@takes_dtensors
def token_stats(
    logits: torch.Tensor,
    tokens: torch.Tensor | None = None,
    ref_logits: torch.Tensor | None = None,
    *,
    temperature: float | torch.Tensor = 1.0,
    mask: torch.Tensor | None = None,
    support: torch.Tensor | None = None,
    shard: Shards = None,
) -> TokenStats:
    """Compute each token's statistics for a policy-gradient step, from one read of the logits.

    Equivalent to

        log_p = (logits.float() / temperature).log_softmax(-1)
        log_q = (ref_logits.float() / temperature).log_softmax(-1)
        logprob = log_p.gather(-1, tokens[..., None])[..., 0]
        entropy = -(log_p.exp() * log_p).sum(-1)
        ref_logprob = log_q.gather(-1, tokens[..., None])[..., 0]
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        ref_kl = (log_q.exp() * (log_q - log_p)).sum(-1)
        lse = (logits.float() / temperature).logsumexp(-1)
        ref_lse = (ref_logits.float() / temperature).logsumexp(-1)

    but each is 0 where the mask is False, and a small KL keeps its relative accuracy. Backward
    needs the inputs and 40 bytes per row.

    Args:
        logits, ref_logits: [..., V], float32, bfloat16 or float16 (float64 on the reference
            backend), any strides with a unit stride along V.
        tokens: integer ids [...]. Where the mask is False any value is allowed: with Hugging Face's
            labels pass mask=labels != -100. Elsewhere an id outside 0 … V-1 is an error on the
            reference backend; on a GPU, where a check would synchronise, it makes logprob and
            ref_logprob NaN without an out-of-bounds read. None: no log-probabilities.
        ref_logits: the reference's logits. None: no reference fields.
        temperature: divides the logits: a positive number, or a float tensor [...] (no gradient).
        mask: bool [...], True where the token counts.
        support: integer ids [..., K], the tokens that sampling kept (top-k, top-p, min-p): both
            models are restricted to them and renormalised, as if all other logits were -inf. Ids
            outside 0 … V-1 are padding; repeated ids count once. A token outside the support has
            log-probability -inf and no gradient; a row without support is masked. Computed in
            float64 from K logits per row; only the gradient has V entries; it is NaN in a row whose
            KL is infinite.
        shard: as in kl_divergence; tokens and support are ids of the whole vocabulary. On a GPU
            support= gathers K logits per row of each tensor.

    Returns:
        TokenStats of [...] float32 (float64 for float64 logits) tensors, nats.

    Gradient:
        Of every field with respect to logits and ref_logits if they require it, in one backward
        kernel. No second derivative, except with support=, where autograd gives all derivatives.

    Special values, Raises: as kl_divergence. Values that make a row NaN there make every field that
    depends on them NaN, with the kernels possibly others too. This includes lse, although
    torch.logsumexp of a row of -inf is -inf; with support= the lse of such a row is -inf.

    Source: Ouyang et al., Training language models to follow instructions with human feedback
    (2022), eq. 2, for the statistics that a step needs.
    """
    _checks.logits("logits", logits, shard is not None)
    leading = logits.shape[:-1]
    if tokens is not None:
        _checks.tokens(tokens, leading, logits.device)
        tokens = tokens.long()
    if ref_logits is not None:
        _checks.logits("ref_logits", ref_logits, shard is not None)
        if shard is None:
            _checks.same_shape("ref_logits", ref_logits, "logits", logits)
    _checks.temperature(temperature, leading, logits.device)
    _checks.mask(mask, leading, logits.device)
    both = [logits] if ref_logits is None else [logits, ref_logits]
    chosen, cut = backend.select(*both), WHOLE
    if shard is not None:
        both, cut = sharded_logits(
            shard,
            chosen == "triton",
            dict(zip(("logits", "ref_logits"), both, strict=False)),
        )
        logits, ref_logits = both[0], None if ref_logits is None else both[1]
    if support is not None:
        shape = *leading, cut.vocabulary or logits.shape[-1]
        kept = Support.of(support, mask, shape, logits.device, chosen)
        within, divisor = kept.ids.masked_fill(kept.absent, 0), kept.divisor(temperature)
        models = [(logits_at(each, within, cut).double() / divisor, 0.0) for each in both]
        return kept.statistics(models, tokens, result_dtype(logits))
    fields = FIELDS_OF[ref_logits is not None, tokens is not None]
    inputs = RowInputs(
        logits,
        ref_logits,
        tokens,
        mask,
        *per_token(temperature),
        fields,
        chosen,
        **cut.as_arguments(),
    )
    return TokenStats._make(row_statistics(inputs)[: len(FIELDS)])


class Support(NamedTuple):
    """Sorted ids [..., K] to which both models are restricted, which of them are absent as in
    topk_op.CellInputs, which rows count, the vocabulary's size, and whether values are checked.
    """

    ids: torch.Tensor
    absent: torch.Tensor
    counted: torch.Tensor
    vocabulary: int
    checks: bool

    @classmethod
    def of(
        cls,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        shape: tuple[int, ...],
        device: torch.device,
        chosen: str,
    ) -> "Support":
        """Check the ids for logits of the given shape and sort them."""
        *leading, vocabulary = shape
        _checks.tokens(ids, _checks.list_shape("support", ids, leading), device, "support")
        ids = sorted_ids(ids.long(), vocabulary)
        absent = absent_entries(ids, vocabulary)
        counted = ~absent[..., 0] if mask is None else mask & ~absent[..., 0]
        # Graphs and transforms cannot branch on values: bad ones give NaN there.
        checks = ENGINES[chosen].checks_values and _modes.eager(ids)
        return cls(ids, absent, counted, vocabulary, checks)

    def divisor(self, temperature: float | torch.Tensor) -> float | torch.Tensor:
        """Return the temperature, a number or [..., 1], with 1 for rows that do not count."""
        if not isinstance(temperature, torch.Tensor):
            return temperature
        if self.checks:
            _value_checks.temperatures_positive(temperature[self.counted])
        valid = torch.where(_value_checks.in_range(temperature), temperature, torch.nan)
        return torch.where(self.counted, valid, 1.0)[..., None]

    def statistics(
        self,
        models: Sequence[tuple[torch.Tensor, torch.Tensor | float]],
        tokens: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> TokenStats:
        """Compute the statistics of one or two models from pairs (relative, origin) in float64: the
        logits at the ids over the temperature, minus the row's origin, and that origin. Entries at
        absent ids may have any value.
        """
        rows = self.counted[..., None]
        listed = [
            value.masked_fill(self.absent, -torch.inf).masked_fill(~rows, 0.0)
            for value, _ in models
        ]
        lse = [
            value.logsumexp(-1) + origin for value, (_, origin) in zip(listed, models, strict=True)
        ]
        log_p, *log_q = logs = [value.log_softmax(-1) for value in listed]
        if tokens is not None and self.checks:
            _value_checks.tokens_in_range(tokens[self.counted], self.vocabulary)
        # e^-800 is 0 in float64; the clamp avoids 0·inf.
        found: dict[str, torch.Tensor] = {"entropy": -(log_p.exp() * log_p.clamp(-800.0)).sum(-1)}
        for prefix, values, total in zip(("", "ref_"), logs, lse, strict=False):
            found[f"{prefix}lse"] = total
            if tokens is not None:
                here = (self.ids == tokens[..., None]) & ~self.absent
                logprob = torch.where(here, values, 0.0).sum(-1)
                logprob = logprob.masked_fill(~here.any(-1), -torch.inf)
                wrong = (tokens < 0) | (tokens >= self.vocabulary)
                found[f"{prefix}logprob"] = logprob.masked_fill(wrong, torch.nan)
        for q in log_q:
            found["kl"] = f_divergences.divergence(log_p, q, "kl", 0.0)
            found["ref_kl"] = f_divergences.divergence(q, log_p, "kl", 0.0)
        return TokenStats._make(
            [
                torch.where(self.counted, found[name], 0.0).to(dtype) if name in found else None
                for name in FIELDS
            ]
        )


@takes_dtensors
def entropy_from_logits(
    logits: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    temperature: float | torch.Tensor = 1.0,
    shard: Shards = None,
) -> torch.Tensor:
    """Compute the entropy of every row.

    Equivalent to

        log_p = (logits.float() / temperature).log_softmax(-1)
        entropy = torch.where(mask, -(log_p.exp() * log_p).sum(-1), 0)

    from one read of the logits. Arguments, Raises: as token_stats.

    Returns:
        [...] float32 (float64 for float64 logits), nats, never negative. Gradient with respect to
        logits. An entry of -inf adds 0.

    Source: Shannon, A Mathematical Theory of Communication (1948), section 6.
    """
    _checks.logits("logits", logits, shard is not None)
    _checks.temperature(temperature, logits.shape[:-1], logits.device)
    _checks.mask(mask, logits.shape[:-1], logits.device)
    chosen = backend.select(logits)
    (logits,), cut = sharded_logits(shard, chosen == "triton", {"logits": logits})
    inputs = RowInputs(
        logits, None, None, mask, *per_token(temperature), "entropy", chosen, **cut.as_arguments()
    )
    return cast(torch.Tensor, row_statistics(inputs)[1])


@takes_dtensors
def selective_log_softmax(
    logits: torch.Tensor, index: torch.Tensor, *, shard: Shards = None
) -> torch.Tensor:
    """Compute log_softmax(logits) at an index without allocating the log-softmax: a drop-in
    replacement for the function of that name in trainers.

    Equivalent to logits.float().log_softmax(-1).gather(-1, index), or, for one id per row,
    .gather(-1, index[..., None])[..., 0].

    Trainers' own functions return the logits' type. This one returns float32 for 16-bit logits too:
    a bfloat16 log-probability near -5 is a multiple of 1/32, too coarse for a ratio, a KL estimate
    or an advantage. For the logits' type convert with .to(logits.dtype).

    Args:
        logits: [..., V], as in token_stats.
        index: integer ids [...], or [..., K] for K per row, from one read of the logits for any K.
            An id outside 0 … V-1 (-100 included) is an error on the reference backend; it gives NaN
            on a GPU and, for K ids per row, in torch.compile and vmap.
        shard: as in kl_divergence; index holds ids of the whole vocabulary. With K ids per row all
            logits are gathered forward and, on a GPU, not kept.
    Returns:
        float32 (float64 for float64 logits) in the shape of index, nats. Gradient with respect to
        logits; repeated ids in a row add up.
    Raises:
        As token_stats.
    """
    _checks.logits("logits", logits, shard is not None)
    leading = logits.shape[:-1]
    several = isinstance(index, torch.Tensor) and index.dim() == logits.dim()
    _checks.tokens(
        index,
        torch.Size((*leading, index.shape[-1])) if several else leading,
        logits.device,
        "index",
    )
    chosen, ids, cut = backend.select(logits), index.long(), WHOLE
    if shard is not None:
        (logits,), cut = sharded_logits(shard, chosen == "triton", {"logits": logits})
    vocabulary = cut.vocabulary or logits.shape[-1]
    if ENGINES[chosen].checks_values and _modes.eager(logits, ids):
        remedy = "leave out ignored positions, or pass index.clamp(min=0) and mask the result"
        _value_checks.tokens_in_range(ids, vocabulary, "index", remedy)
    if not several:
        inputs = RowInputs(
            logits, None, ids, None, None, 1.0, "logprob", chosen, **cut.as_arguments()
        )
        return cast(torch.Tensor, row_statistics(inputs)[0])
    dtype = result_dtype(logits)
    if not ids.shape[-1]:
        return logits.gather(-1, ids).to(dtype)
    in_order = sorted_ids(ids, vocabulary)
    # An id above the last one is given the place of the rest, and becomes NaN below.
    listed, rest, *_ = cells(
        CellInputs(logits, in_order, None, None, 1.0, chosen, dtype, **cut.as_arguments()),
        ListDivergence(),
    )
    logprobs = torch.cat([listed, rest[..., None]], -1).log_softmax(-1)
    values = logprobs.gather(-1, torch.searchsorted(in_order, ids.contiguous())).to(dtype)
    return values.masked_fill((ids < 0) | (ids >= vocabulary), torch.nan)


def sorted_ids(ids: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Sort each row of ids [..., K]; ids outside the vocabulary become `vocabulary`."""
    return ids.masked_fill((ids < 0) | (ids >= vocabulary), vocabulary).sort(-1)[0]
