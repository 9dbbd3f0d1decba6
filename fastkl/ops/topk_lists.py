"""Divergences from a teacher's top k by torch's operations on [..., K], of topk_op.cells' results:
on a CPU, and on a GPU for long lists and split vocabularies.
"""

import math
from typing import NamedTuple

import torch

from .. import _checks, _modes, f_divergences
from .topk_op import absent_entries
from .topk_rows import LARGEST_MASS, ListDivergence


class MergedList(NamedTuple):
    """A teacher's list: sorted ids [..., K] as in topk_op.CellInputs, their log-probs in float64,
    which rows count, and the vocabulary's size.
    """

    ids: torch.Tensor
    log_p: torch.Tensor
    counted: torch.Tensor
    vocabulary: int


def divergence(
    teacher: MergedList,
    student: tuple[torch.Tensor, torch.Tensor],
    how: ListDivergence,
    checks_values: bool,
) -> tuple[torch.Tensor, ...]:
    """Return the divergence and the list's mass in the student and in the teacher, [...] float64, 0
    in a row that does not count, from a student's listed logits [..., K] and the log-sum-exp of the
    others [...], relative to the row's peak.
    """
    ids, log_p, counted, vocabulary = teacher
    listed, rest = student
    log_p, listed = (x.masked_fill(~counted[..., None], 0.0) for x in (log_p, listed))
    mass = log_p.logsumexp(-1, keepdim=True)
    too_much = counted[..., None] & (mass > math.log(LARGEST_MASS))
    # Graphs and transforms cannot branch on values: the row is NaN there.
    if checks_values and _modes.eager(too_much) and bool(too_much.any()):
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
    if how.clip:
        value = value.clamp(max=how.clip)
    total = value.sum(-1)
    if how.tail != "ignore" and not how.clip:
        total = total.clamp(min=0.0)
    # A product, so that the gradient is NaN too.
    total, student_mass = (
        x * torch.where(too_much[..., 0], torch.nan, 1.0) for x in (total, student_mass)
    )
    values = total, student_mass, mass[..., 0].exp()
    return tuple([torch.where(counted, x, 0.0) for x in values])


def _terms(log_p: torch.Tensor, log_q: torch.Tensor, how: ListDivergence) -> torch.Tensor:
    """Compute the terms of the divergence of cells [..., K + 1] or [..., K]."""
    if how.direction == "student||teacher":
        log_p, log_q = log_q, log_p
    kind = "js" if how.direction == "js" else "kl"
    terms = f_divergences.terms(log_p, log_q, kind, how.beta)
    # The KL's Terms.value contains a multiple of q - p, which sums to 0 only over all tokens.
    plain = kind == "kl" and (how.tail == "ignore" or bool(how.clip))
    return terms.to_p if plain else terms.value


def merged(
    ids: torch.Tensor, logprobs: torch.Tensor, mask: torch.Tensor | None, vocabulary: int
) -> MergedList:
    """Return a list merged. The first of equal ids gets the sum of their probabilities, the
    others 0. A row without entries does not count.
    """
    ids, log_p = ids.long(), logprobs.detach().double()
    missing = absent(ids, log_p, vocabulary)
    ids, order = ids.masked_fill(missing, vocabulary).sort(-1)
    log_p = log_p.masked_fill(missing, -torch.inf).gather(-1, order)
    first = torch.searchsorted(ids, ids)
    sums = torch.zeros_like(log_p).scatter_add(-1, first, log_p.exp())
    several = torch.searchsorted(ids, ids, right=True) > first + 1
    missing = absent_entries(ids, vocabulary)
    log_p = torch.where(several, sums.log(), log_p).masked_fill(missing, -torch.inf)
    counted = ids[..., 0] < vocabulary
    return MergedList(ids, log_p, counted if mask is None else counted & mask, vocabulary)


def absent(ids: torch.Tensor, logprobs: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Return which entries of a list are absent."""
    return (logprobs == -torch.inf) | (ids < 0) | (ids >= vocabulary)


def _log1mexp(value: torch.Tensor) -> torch.Tensor:
    """Compute log(1 - e^value), -inf for values ≥ 0."""
    value = value.clamp(max=0.0)
    return torch.where(value > -0.5, (-value.expm1()).log(), (-value.exp()).log1p())
