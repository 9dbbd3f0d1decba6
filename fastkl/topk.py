"""KL divergence against a teacher that is known by its K most probable tokens."""

from typing import NamedTuple, get_args

import torch

from . import _checks, _reduce, backend
from ._collectives import sharded_logits
from ._dtensors import takes_dtensors
from ._heads import Given, Head, keeps_logits, prepare, whole_vocabulary
from ._types import Reduction
from .ops import topk_lists
from .ops.engine import ENGINES
from .ops.fields import result_dtype
from .ops.linear_cells_op import ListInputs, linear_cells
from .ops.row_op import per_token
from .ops.topk_op import CellInputs, cells
from .ops.topk_rows import (
    LARGEST_K,
    SUMMARY,
    ListDivergence,
    Tail,
    TopkDirection,
)
from .parallel import Shards

_Options = tuple[str, float | None, str, float | None]


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
        gives NaN on a GPU, as value and as gradient. With "renormalize" a NaN outside the list may
        be ignored.

    Memory: from forward to backward, in addition to logits and lists, 4·K + 68 bytes per token on a
    GPU up to K = 511; otherwise about 51·K + 120 ("student||teacher": 60·K + 130, "js": 117·K +
    190).

    Raises: TypeError, ValueError, RuntimeError as kl_divergence.

    Source: merging tokens into one bucket can only lower a divergence, by the data-processing
    inequality: Cover & Thomas, Elements of Information Theory (2006), section 2.8.
    """
    how = direction, beta, tail, clip
    found, counted = _topk(logits, topk_logprobs, topk_ids, mask, how, temperature, shard)
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
    whole_vocabulary(inputs, "top-k log-probabilities")
    leading, vocabulary = hidden.shape[:-1], inputs.weight.shape[0]
    how = direction, beta, tail, clip
    divergence = _checked(leading, hidden.device, topk_logprobs, topk_ids, how)
    request = ListInputs(topk_ids, keeps_logits(inputs, recompute), tail != "renormalize")
    by_rows, count = request.by_rows(vocabulary), topk_ids.shape[-1]
    if inputs.backend == "triton" and not by_rows and count <= LARGEST_K:
        counted = (~topk_lists.absent(topk_ids, topk_logprobs, vocabulary)).any(-1)
        counted = counted if mask is None else counted & mask
        kl = linear_cells(inputs._replace(mask=counted), request, divergence)[0]
        return _reduced(kl, counted, weights, reduction, normalizer)
    teacher = topk_lists.merged(topk_ids, topk_logprobs, mask, vocabulary)
    given = inputs._replace(mask=teacher.counted), request._replace(ids=teacher.ids)
    listed, rest, *_ = linear_cells(*given, ListDivergence())
    checks = ENGINES[inputs.backend].checks_values
    kl, *_ = topk_lists.divergence(teacher, (listed, rest), divergence, checks)
    return _reduced(kl.to(result_dtype(hidden)), teacher.counted, weights, reduction, normalizer)


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
    how = direction, beta, tail, clip
    return _topk(logits, topk_logprobs, topk_ids, mask, how, temperature, shard)[0]


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
    how: _Options,
    temperature: float | torch.Tensor,
    shard: Shards,
) -> tuple[TopKStats, torch.Tensor]:
    """Return the statistics from logits, and which rows count; how: as in _checked."""
    _checks.logits("logits", logits, shard is not None)
    leading = logits.shape[:-1]
    divergence = _checked(leading, logits.device, logprobs, ids, how)
    _checks.temperature(temperature, leading, logits.device)
    _checks.mask(mask, leading, logits.device)
    chosen = backend.select(logits)
    (logits,), cut = sharded_logits(shard, chosen == "triton", {"logits": logits})
    per_row = *per_token(temperature), chosen
    if chosen == "triton" and not cut.group and ids.shape[-1] <= LARGEST_K:
        kl, *_, entries = cells(CellInputs(logits, ids, mask, *per_row), divergence)
        *masses, counted = entries[..., -SUMMARY:].unbind(-1)
        return TopKStats(kl, *masses), counted > 0
    teacher = topk_lists.merged(ids, logprobs, mask, cut.vocabulary or logits.shape[-1])
    listed, rest, *_ = cells(
        CellInputs(logits, teacher.ids, teacher.counted, *per_row, **cut.as_arguments()),
        ListDivergence(),
    )
    checks, dtype = ENGINES[chosen].checks_values, result_dtype(logits)
    found = topk_lists.divergence(teacher, (listed, rest), divergence, checks)
    return TopKStats(*[value.to(dtype) for value in found]), teacher.counted


def _checked(
    leading: torch.Size,
    device: torch.device,
    logprobs: torch.Tensor,
    ids: torch.Tensor,
    how: _Options,
) -> ListDivergence:
    """Check the list and the options (direction, beta, tail, clip), for a student of leading shape
    `leading`, and return the divergence.
    """
    direction, beta, tail, clip = how
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
    _checks.choice("direction", direction, get_args(TopkDirection))
    _checks.choice("tail", tail, get_args(Tail))
    _checks.expect(
        beta is None or direction == "js",
        "beta",
        f"None for {direction!r}",
        beta,
        "leave it out",
    )
    beta = 0.5 if beta is None else beta
    _checks.share("beta", beta)
    if clip is not None:
        _checks.positive("clip", clip, "pass None for no bound")
    return ListDivergence(logprobs, direction, tail, float(beta), float(clip or 0.0))
