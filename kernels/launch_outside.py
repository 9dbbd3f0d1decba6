"""Launchers of row_outside and row_topk."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

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


class Terms(NamedTuple):
    """The terms that row_topk sums. direction, tail: as numbered there. share: the teacher's, of
    "js". clip: 0 for none. largest_mass: of a list; above it the result is NaN.
    """

    direction: int
    tail: int
    share: float
    clip: float
    largest_mass: float


def outside(
    problem: Problem,
    ids: torch.Tensor,
    logprobs: torch.Tensor | None,
    entries: torch.Tensor | None,
    others: Sequence[torch.Tensor],
) -> None:
    """Fill others: log_sum and peak, [N] float64, with the log-sum-exp of each row's logits not at
    `ids` [N, K], relative to the largest of them, and that one; and saved [N, 10] as launch.forward
    does for these logits alone.

    ids: sorted int64 in each row; or with logprobs [N, K] int32 or int64 in any order, and the
    logits at them are written to entries [N, K + 3] float32.
    """
    p, _, _, mask, temperatures, _ = tensors(problem)
    layout, (_, count) = problem.layout, ids.shape
    lists = () if logprobs is None else (ids.dtype, logprobs.dtype)
    segment, splits, variant = outside_plan(layout, count, lists, tuple(config._override.items()))
    with current(p):
        state = counters = others[2]
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
                entries_ptr=others[2] if entries is None else entries,
                log_sum_ptr=others[0],
                peak_ptr=others[1],
                saved_ptr=others[2],
                temperature=float(problem.temperature),
                **layout.places,
                V=layout.vocabulary,
                K=count,
                segment=segment,
                splits=splits,
            ),
        )


@functools.lru_cache(CACHE_SIZE)
def topk_variant(
    case: Case, count: int, types: tuple[torch.dtype, ...], terms: Terms, gradient: bool
) -> Variant:
    """Return row_topk for `count` entries per row; types: of ids and log-probs."""
    cells = triton.next_power_of_2(count + 1)
    # Four cells per thread.
    chosen = config.RowConfig(max(case.warp, cells // 4), 1, 0, config._UNTIMED, config.ROOM)
    return row_variant(
        row_topk,
        case,
        chosen,
        types,
        True,
        CELLS=cells,
        DIRECTION=terms.direction,
        TAIL=terms.tail,
        CLIPPED=terms.clip > 0.0,
        WITH_GRADIENT=gradient,
    )


def topk(
    problem: Problem,
    ids: torch.Tensor,
    logprobs: torch.Tensor,
    entries: torch.Tensor,
    others: Sequence[torch.Tensor],
    terms: Terms,
    kl: torch.Tensor | None,
    gradient: Sequence[torch.Tensor] | None = None,
) -> None:
    """Fill kl [N] float32 and the last three columns of entries, as row_topk. Or fill the last
    three of `gradient`, (upstream [N], grad [N, K], both float32, columns [N, K] int64, g_log_sum
    [N] float32): the gradients to the logits in these columns, and to log_sum. The others: as
    filled by `outside` or given to it.
    """
    _, _, _, mask, temperatures, _ = tensors(problem)
    variant = topk_variant(
        problem.layout.case,
        ids.shape[1],
        (ids.dtype, logprobs.dtype),
        terms,
        gradient is not None,
    )
    upstream, grad, columns, g_log_sum = gradient or (entries,) * 4
    with current(entries):
        variant.start(
            problem.layout.rows,
            dict(
                mask_ptr=mask,
                temperature_ptr=temperatures,
                ids_ptr=ids,
                logprob_ptr=logprobs,
                log_sum_ptr=others[0],
                peak_ptr=others[1],
                entries_ptr=entries,
                kl_ptr=entries if kl is None else kl,
                upstream_ptr=upstream,
                grad_listed_ptr=grad,
                columns_ptr=columns,
                g_log_sum_ptr=g_log_sum,
                temperature=float(problem.temperature),
                V=problem.layout.vocabulary,
                K=ids.shape[1],
                share=terms.share,
                clip=terms.clip,
                largest_mass=terms.largest_mass,
            ),
        )
