"""Launchers of row_outside and row_topk."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton

from . import config
from .layout import CACHE_SIZE, Case, Layout, Problem
from .row_outside import row_outside
from .row_topk import row_topk
from .variant import Variant, current, row_variant, tensors


@functools.lru_cache(CACHE_SIZE)
def outside_plan(
    layout: Layout, ids: int, lists: tuple[torch.dtype, ...], overridden: tuple[Any, ...]
) -> tuple[int, int, Variant]:
    """Return (length of a segment, segments per row, row_outside) for `ids` ids per row; lists: the
    dtypes of unsorted ids and their log-probs, none for sorted ids; `overridden` as in
    launch.forward_plan.
    """
    case = layout.case
    chosen = config.select("forward", case.arch, layout.p.itemsize, layout.vocabulary)
    segment = config.segment_length(layout.vocabulary, chosen.segment)
    splits = max(1, -(-layout.vocabulary // segment))
    variant = row_variant(
        row_outside,
        case,
        chosen,
        lists,
        True,
        IDS=triton.next_power_of_2(ids),
        SORTED=not lists,
        SPLITS=triton.next_power_of_2(splits),
        REALIGN=case.realign,
    )
    return segment, splits, variant


def outside(
    problem: Problem,
    ids: torch.Tensor,
    log_sum: torch.Tensor,
    peak: torch.Tensor,
    saved: torch.Tensor,
    logprobs: torch.Tensor | None = None,
) -> None:
    """Fill peak and log_sum, [N] float64, with the largest of each row's entries not in `ids`
    [N, K], and the log-sum-exp of these entries relative to it; fill `saved` [N, 10] as
    launch.forward does for these entries alone. ids: sorted int64 in each row, or with their
    logprobs as in `topk`.
    """
    p, _, _, mask, temperatures, _ = tensors(problem)
    layout, (_, count) = problem.layout, ids.shape
    lists = () if logprobs is None else (ids.dtype, logprobs.dtype)
    segment, splits, variant = outside_plan(layout, count, lists, tuple(config._override.items()))
    with current(p):
        state = counters = saved
        if splits > 1:
            state = torch.empty(layout.rows * splits * 2, dtype=torch.float64, device=p.device)
            counters = torch.zeros(layout.rows, dtype=torch.int32, device=p.device)
        variant.start(
            layout.rows * splits,
            dict(
                p_ptr=p,
                mask_ptr=mask,
                temperature_ptr=temperatures,
                ids_ptr=ids,
                logprob_ptr=ids if logprobs is None else logprobs,
                totals_ptr=state,
                counter_ptr=counters,
                log_sum_ptr=log_sum,
                peak_ptr=peak,
                saved_ptr=saved,
                temperature=float(problem.temperature),
                **layout.places,
                V=layout.vocabulary,
                K=count,
                segment=segment,
                splits=splits,
            ),
        )


def topk_variant(
    case: Case,
    count: int,
    types: tuple[torch.dtype, torch.dtype],
    direction: int,
    tail: int,
    clipped: bool,
    gradient: bool,
) -> Variant:
    """Return row_topk for `count` entries per row; types: of ids and log-probs."""
    cells = triton.next_power_of_2(count + 1)
    return row_variant(
        row_topk,
        case,
        config.RowConfig(max(case.warp, cells // 4), 1, 0, "", config.ROOM),
        types,
        True,
        CELLS=cells,
        DIRECTION=direction,
        TAIL=tail,
        CLIPPED=clipped,
        WITH_GRADIENT=gradient,
    )


def topk(
    problem: Problem,
    ids: torch.Tensor,
    logprobs: torch.Tensor,
    how: tuple[int, int, float, float, float],
    others: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor] | None,
    gradient: Sequence[torch.Tensor] | None = None,
) -> None:
    """Fill values, (kl [N], masses [N, 3]) as row_topk. Or, given (upstream [N], grad [N, K],
    places [N, K] int64, grad_rest [N]), fill the last three: the gradients to the logits at these
    places and to log_sum. ids, logprobs: lists [N, K], int32 or int64 ids in any order. how:
    direction, tail, share, clip (0: none) and largest_mass. others: log_sum and peak as filled by
    `outside`.
    """
    p, _, _, mask, temperatures, _ = tensors(problem)
    layout, (direction, tail, share, clip, largest_mass) = problem.layout, how
    types, with_gradient = (ids.dtype, logprobs.dtype), gradient is not None
    case, count = layout.case, ids.shape[-1]
    variant = topk_variant(case, count, types, direction, tail, clip > 0.0, with_gradient)
    kl, masses = values or (p, p)
    upstream, grad, places, grad_rest = gradient or (p,) * 4
    with current(p):
        variant.start(
            layout.rows,
            dict(
                p_ptr=p,
                mask_ptr=mask,
                temperature_ptr=temperatures,
                ids_ptr=ids,
                logprob_ptr=logprobs,
                log_sum_ptr=others[0],
                peak_ptr=others[1],
                kl_ptr=kl,
                masses_ptr=masses,
                upstream_ptr=upstream,
                grad_ptr=grad,
                place_ptr=places,
                grad_rest_ptr=grad_rest,
                temperature=float(problem.temperature),
                **layout.places,
                V=layout.vocabulary,
                K=count,
                share=share,
                clip=clip,
                largest_mass=largest_mass,
            ),
        )
