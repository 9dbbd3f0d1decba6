"""KL divergence against a teacher that is known by its K most probable tokens."""

import math
from typing import NamedTuple, get_args

import torch

from . import _checks, _modes, _reduce, backend, f_divergences
from ._collectives import sharded_logits
from ._dtensors import takes_dtensors
from ._heads import Given, Head, keeps_logits, prepare, whole_vocabulary
from ._types import Reduction
from .ops.engine import ENGINES
from .ops.fields import result_dtype
from .ops.linear_cells_op import ListInputs, linear_cells
from .ops.row_op import per_token
from .ops.topk_op import CellInputs, absent_entries, cells
from .ops.topk_rows import (
    LARGEST_K,
    LARGEST_MASS,
    SUMMARY,
    ListDivergence,
    Tail,
    TopkDirection,
)
from .parallel import Shards


class TopKStats(NamedTuple):
    """Per-token results of topk_stats, [...] float32. kl: as topk_kl_divergence, nats.
    student_mass, teacher_mass: the probability of the listed tokens, without gradient.
    """

    kl: torch.Tensor
    student_mass: torch.Tensor
    teacher_mass: torch.Tensor


@takes_dtensors
def topk_kl_divergence(  # noqa: PLR0913
    logits: torch.Tensor,
    topk_logprobs: torch.Tensor,
    topk_ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    direction: TopkDirection = "teacher||student",
    beta: float | None = None,
    tail: Tail = "bucket",
    clip: float | None = None,
    temperature: float | torch.Tensor = 1.0,
    weights: torch.Tensor | None = None,
    reduction: Reduction = "none",
    normalizer: float | torch.Tensor | None = None,
    shard: Shards = None,
) -> torch.Tensor:
    """Compute the divergence of a student from a teacher whose log-probabilities of K tokens are
    known, from one read of the student's logits.

    Equivalent to, for tail="bucket" and K different tokens in each row,

        log_q = (logits.float() / temperature).log_softmax(-1).gather(-1, topk_ids)
        log_p = topk_logprobs.float()
        rest_q, rest_p = ((1 - x.exp().sum(-1, keepdim=True)).log() for x in (log_q, log_p))
        log_q, log_p = torch.cat([log_q, rest_q], -1), torch.cat([log_p, rest_p], -1)
        "teacher||student": (log_p.exp() * (log_p - log_q)).sum(-1)
        "student||teacher": (log_q.exp() * (log_q - log_p)).sum(-1)
        "js": beta * KL(p‖m) + (1 - beta) * KL(q‖m) with m = beta * p + (1 - beta) * q

    but the rest and a small result keep their relative accuracy. With all V tokens listed this is
    the divergence of the two distributions; with fewer it is at most that, and grows with K.

    Args:
        logits: [..., V], the student's, as in kl_divergence.
        topk_logprobs: [..., K] natural logarithms, normalised over the teacher's whole vocabulary,
            any float type; no gradient.
        topk_ids: [..., K] int32 or int64. An entry is absent if its log-prob is -inf or its id is
            outside 0 … V-1, so padded and ragged lists pass unchanged: SGLang's and NeMo-RL's,
            TRL's -inf padding, tinker's lists padded with -1. Entries with the same id add up: if
            vLLM's K + 1 entries list the sampled token twice, set one of its two ids to -1. verl
            pads with log-prob 0 and id 0: mask those positions. A row without entries is masked and
            not counted by the default mean.
        mask: bool [...], True where the token counts.
        direction: which KL, or "js", the generalised JSD of js_divergence.
        beta: for "js", the teacher's share, a number in [0, 1]. Default: 0.5.
        tail: how unlisted tokens count. "bucket": both models' remaining mass is one more token.
            "renormalize": both models are renormalised over the listed tokens. "ignore": only the
            listed terms are summed, with unnormalised probabilities; the result may be negative and
            its gradient is not that of a divergence.
        clip: an upper bound on each token's term; a clipped term has gradient 0.
        temperature: divides only the student's logits; the teacher's log-probs include theirs.
        weights, reduction, normalizer: as in kl_divergence.
        shard: as in kl_divergence; topk_ids are ids of the whole vocabulary. All logits are
            gathered forward and, on a GPU, not kept.

    Returns:
        [...] float32 (float64 for float64 logits), nats; ≥ 0 except with "ignore" or clip.

    Gradient:
        With respect to logits. Use it as a loss: it does not depend on the sampled token, so as an
        advantage its expected gradient is zero.

    Special values:
        If the listed mass reaches 1, as 16-bit rounding may cause, the teacher's rest is 0 without
        rescaling; a KL then sums x·log(x/y) - x + y, which is never negative, and
        "student||teacher" omits the student's rest. A mass above 1.05 is an error on a CPU and
        gives NaN on a GPU.

    Memory: from forward to backward, in addition to logits and lists, 4·K + 68 bytes per token on a
    GPU up to K = 511; otherwise about 51·K + 120 ("student||teacher": 60·K + 130, "js": 117·K +
    190).

    Raises: TypeError, ValueError, RuntimeError as kl_divergence.

    Source: merging tokens into one bucket can only lower a divergence, by the data-processing
    inequality: Cover & Thomas, Elements of Information Theory (2006), section 2.8.
    """
    how = _How(direction, beta, tail, clip, temperature)
    found, counted = _topk(logits, topk_logprobs, topk_ids, mask, how, shard)
    return _reduced(found.kl, counted, weights, reduction, normalizer)


def linear_topk_kl_divergence(  # noqa: PLR0913
    hidden: torch.Tensor,
    weight: torch.Tensor | Head,
    topk_logprobs: torch.Tensor,
    topk_ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    direction: TopkDirection = "teacher||student",
    beta: float | None = None,
    tail: Tail = "bucket",
    clip: float | None = None,
    temperature: float | torch.Tensor = 1.0,
    weights: torch.Tensor | None = None,
    reduction: Reduction = "none",
    normalizer: float | torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    recompute: bool | None = None,
) -> torch.Tensor:
    """Compute topk_kl_divergence from a student's hidden states and lm_head, a chunk of tokens at a
    time.

    Equivalent to

        logits = F.linear(hidden, weight, bias).to(logits_dtype)
        if softcap is not None:
            logits = softcap * torch.tanh(logits.float() / softcap)
        topk_kl_divergence(logits, topk_logprobs, topk_ids, mask, direction=direction, ...)

    in one matrix product forward and two backward (one for a frozen lm_head), and one more if the
    logits are not kept: see recompute. tail="renormalize" needs the listed logits only: up to
    K = V / 256 each product uses K rows of the weight per token.

    Args:
        hidden, weight, bias, softcap, logits_dtype, chunk_size, recompute: as in
            linear_token_stats, for the student only. The others: as in topk_kl_divergence.

    Returns, Special values: as topk_kl_divergence. Memory, Accuracy, autocast: as
    linear_token_stats, for one model; from forward to backward, in addition to kept logits, the
    bytes of topk_kl_divergence, where K rows of the weight are read those of a CPU.

    Gradient:
        With respect to hidden, weight and bias, in their types.

    Raises: TypeError, ValueError, RuntimeError as topk_kl_divergence and linear_token_stats.

    Source: as topk_kl_divergence.
    """
    inputs = prepare(
        Given(
            hidden,
            weight,
            bias,
            None,
            None,
            None,
            temperature,
            None,
            softcap,
            mask,
            logits_dtype,
            chunk_size,
            recompute,
        )
    )
    how = _How(direction, beta, tail, clip, temperature)
    whole_vocabulary(inputs, "top-k log-probabilities")
    leading, vocabulary = hidden.shape[:-1], inputs.weight.shape[0]
    _check(leading, hidden.device, topk_logprobs, topk_ids, how)
    request = ListInputs(topk_ids, keeps_logits(inputs, recompute), tail != "renormalize")
    by_rows, count = request.by_rows(vocabulary), topk_ids.shape[-1]
    if inputs.backend == "triton" and not by_rows and count <= LARGEST_K:
        counted = (~_absent(topk_ids, topk_logprobs, vocabulary)).any(-1)
        counted = counted if mask is None else counted & mask
        given = inputs._replace(mask=counted), request, how.for_kernels(topk_logprobs)
        kl = linear_cells(*given)[0]
        return _reduced(kl, counted, weights, reduction, normalizer)
    teacher = _merged(topk_ids, topk_logprobs, mask, vocabulary)
    listed, rest, *_ = linear_cells(
        inputs._replace(mask=teacher.counted), request._replace(ids=teacher.ids), ListDivergence()
    )
    student = listed, rest
    found, counted = _divergence(teacher, student, how, inputs.backend, result_dtype(hidden))
    return _reduced(found.kl, counted, weights, reduction, normalizer)


@takes_dtensors
def topk_stats(  # noqa: PLR0913
    logits: torch.Tensor,
    topk_logprobs: torch.Tensor,
    topk_ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    direction: TopkDirection = "teacher||student",
    beta: float | None = None,
    tail: Tail = "bucket",
    clip: float | None = None,
    temperature: float | torch.Tensor = 1.0,
    shard: Shards = None,
) -> TopKStats:
    """Compute topk_kl_divergence per token and the mass of the listed tokens in both models.

    Returns:
        TopKStats of [...] float32 (float64 for float64 logits) tensors; a masked row is 0.

    Arguments, Gradient, Special values, Raises, Source: as topk_kl_divergence.
    """
    how = _How(direction, beta, tail, clip, temperature)
    return _topk(logits, topk_logprobs, topk_ids, mask, how, shard)[0]


class _How(NamedTuple):
    """The options of a top-k divergence."""

    direction: str
    beta: float | None
    tail: str
    clip: float | None
    temperature: float | torch.Tensor

    def for_kernels(self, logprobs: torch.Tensor) -> ListDivergence:
        """Return the divergence from a teacher with these log-probs."""
        beta = 0.5 if self.beta is None else self.beta
        return ListDivergence(logprobs, self.direction, self.tail, beta, self.clip or 0.0)


class _Teacher(NamedTuple):
    """A teacher's list: sorted ids [..., K] as in topk_op.CellInputs, their log-probs in float64,
    which rows count, and the vocabulary's size.
    """

    ids: torch.Tensor
    log_p: torch.Tensor
    counted: torch.Tensor
    vocabulary: int


def _reduced(
    kl: torch.Tensor,
    counted: torch.Tensor,
    weights: torch.Tensor | None,
    reduction: str,
    normalizer: float | torch.Tensor | None,
) -> torch.Tensor:
    """Reduce the divergence of the rows that count."""
    _reduce.check(reduction, weights, normalizer, kl.shape, kl.device)
    return _reduce.reduced(kl, counted, weights, reduction, normalizer)


def _topk(
    logits: torch.Tensor,
    logprobs: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    how: _How,
    shard: Shards,
) -> tuple[TopKStats, torch.Tensor]:
    """Return the statistics from logits, and which rows count."""
    _checks.logits("logits", logits, shard is not None)
    leading = logits.shape[:-1]
    _check(leading, logits.device, logprobs, ids, how)
    _checks.temperature(how.temperature, leading, logits.device)
    _checks.mask(mask, leading, logits.device)
    chosen = backend.select(logits)
    (logits,), cut = sharded_logits(shard, chosen == "triton", {"logits": logits})
    per_row = *per_token(how.temperature), chosen
    if chosen == "triton" and not cut.group and ids.shape[-1] <= LARGEST_K:
        inputs = CellInputs(logits, ids, mask, *per_row)
        kl, *_, entries = cells(inputs, how.for_kernels(logprobs))
        *masses, counted = entries[..., -SUMMARY:].unbind(-1)
        return TopKStats(kl, *masses), counted > 0
    teacher = _merged(ids, logprobs, mask, cut.vocabulary or logits.shape[-1])
    listed, rest, *_ = cells(
        CellInputs(logits, teacher.ids, teacher.counted, *per_row, **cut.as_arguments()),
        ListDivergence(),
    )
    return _divergence(teacher, (listed, rest), how, chosen, result_dtype(logits))


def _divergence(
    teacher: _Teacher,
    student: tuple[torch.Tensor, torch.Tensor],
    how: _How,
    chosen: str,
    dtype: torch.dtype,
) -> tuple[TopKStats, torch.Tensor]:
    """Return the statistics of a student's cells (listed logits [..., K] and log-sum-exp of the
    others [...], relative to the row's peak), and which rows count.
    """
    ids, log_p, counted, vocabulary = teacher
    listed, rest = student
    log_p, listed = (x.masked_fill(~counted[..., None], 0.0) for x in (log_p, listed))
    mass = log_p.logsumexp(-1, keepdim=True)
    too_much = counted[..., None] & (mass > math.log(LARGEST_MASS))
    # Graphs and transforms cannot branch on values: the row is NaN there.
    checks = ENGINES[chosen].checks_values and _modes.eager(too_much)
    if checks and bool(too_much.any()):
        _checks.expect(
            False,
            "topk_logprobs",
            f"log-probabilities whose sum of probabilities is at most {LARGEST_MASS}",
            f"{float(mass[too_much].max().exp()):.6g}",
            "mask padded positions with mask=, or give their entries -inf",
        )
    log_q = torch.cat([listed, rest[..., None]], -1)
    log_q = log_q - log_q.logsumexp(-1, keepdim=True)
    student_mass = log_q[..., :-1].detach().exp().sum(-1)
    if how.tail == "bucket":
        # With all V tokens listed no token remains for the mass lost to rounding.
        complete = (~absent_entries(ids, vocabulary)).sum(-1, keepdim=True) == vocabulary
        log_p = torch.cat([log_p, _log1mexp(mass).masked_fill(complete, -torch.inf)], -1)
        if how.direction == "student||teacher":
            # The student's rest adds 0 if the teacher has none.
            log_q = log_q.masked_fill(log_p == -torch.inf, -torch.inf)
    else:
        log_q = log_q[..., :-1]
        if how.tail == "renormalize":
            log_p, log_q = (x - x.logsumexp(-1, keepdim=True) for x in (log_p, log_q))
    value = _terms(log_p, log_q, how)
    if how.clip is not None:
        value = value.clamp(max=how.clip)
    total = value.sum(-1)
    if how.tail != "ignore" and how.clip is None:
        total = total.clamp(min=0.0)
    # A product, so that the gradient is NaN too.
    total, student_mass = (
        x * torch.where(too_much[..., 0], torch.nan, 1.0) for x in (total, student_mass)
    )
    values = total, student_mass, mass[..., 0].exp()
    return TopKStats(*[torch.where(counted, x, 0.0).to(dtype) for x in values]), counted


def _terms(log_p: torch.Tensor, log_q: torch.Tensor, how: _How) -> torch.Tensor:
    """Compute the terms of the divergence of cells [..., K + 1] or [..., K]."""
    if how.direction == "student||teacher":
        log_p, log_q = log_q, log_p
    kind = "js" if how.direction == "js" else "kl"
    terms = f_divergences.terms(log_p, log_q, kind, 0.5 if how.beta is None else how.beta)
    # The KL's Terms.value contains a multiple of q - p, which sums to 0 only over all tokens.
    plain = kind == "kl" and (how.tail == "ignore" or how.clip is not None)
    return terms.to_p if plain else terms.value


def _merged(
    ids: torch.Tensor, logprobs: torch.Tensor, mask: torch.Tensor | None, vocabulary: int
) -> _Teacher:
    """Return the teacher of a list. The first of equal ids gets the sum of their probabilities, the
    others 0. A row without entries does not count.
    """
    ids, log_p = ids.long(), logprobs.detach().double()
    absent = _absent(ids, log_p, vocabulary)
    ids, order = ids.masked_fill(absent, vocabulary).sort(-1)
    log_p = log_p.masked_fill(absent, -torch.inf).gather(-1, order)
    first = torch.searchsorted(ids, ids)
    sums = torch.zeros_like(log_p).scatter_add(-1, first, log_p.exp())
    several = torch.searchsorted(ids, ids, right=True) > first + 1
    absent = absent_entries(ids, vocabulary)
    log_p = torch.where(several, sums.log(), log_p).masked_fill(absent, -torch.inf)
    counted = ids[..., 0] < vocabulary
    return _Teacher(ids, log_p, counted if mask is None else counted & mask, vocabulary)


def _absent(ids: torch.Tensor, logprobs: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Return which entries of a list are absent."""
    return (logprobs == -torch.inf) | (ids < 0) | (ids >= vocabulary)


def _log1mexp(value: torch.Tensor) -> torch.Tensor:
    """Compute log(1 - e^value), -inf for values ≥ 0."""
    value = value.clamp(max=0.0)
    return torch.where(value > -0.5, (-value.expm1()).log(), (-value.exp()).log1p())


def _check(
    leading: torch.Size, device: torch.device, logprobs: torch.Tensor, ids: torch.Tensor, how: _How
) -> None:
    """Check the list and the options, for a student of leading shape `leading`."""
    given = _checks.list_shape("topk_ids", ids, leading), device
    kind, remedy = "an int32 or int64 tensor", "convert it with .long()"
    _checks.per_row("topk_ids", ids, *given, (torch.int64, torch.int32), kind, remedy)
    kind, remedy = "a float tensor of log-probabilities", "convert it with .float()"
    _checks.per_row("topk_logprobs", logprobs, *given, _checks.FLOAT_TYPES, kind, remedy)
    _checks.expect(
        not logprobs.requires_grad,
        "topk_logprobs",
        "a tensor without gradient",
        "one that requires it",
        "pass topk_logprobs.detach()",
    )
    _checks.choice("direction", how.direction, get_args(TopkDirection))
    _checks.choice("tail", how.tail, get_args(Tail))
    _checks.expect(
        how.beta is None or how.direction == "js",
        "beta",
        f"None for {how.direction!r}",
        how.beta,
        "leave it out",
    )
    _checks.share("beta", 0.5 if how.beta is None else how.beta)
    if how.clip is not None:
        _checks.positive("clip", how.clip, "pass None for no bound")
