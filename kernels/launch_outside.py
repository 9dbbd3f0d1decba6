"""Launcher of row_outside."""

import functools
from typing import Any

import torch
import triton

from . import config
from .layout import CACHE_SIZE, Layout, Problem
from .row_outside import row_outside
from .variant import Variant, current, row_variant, tensors


@functools.lru_cache(CACHE_SIZE)
def outside_plan(layout: Layout, ids: int, overridden: tuple[Any, ...]) -> tuple[int, int, Variant]:
    """Return (length of a segment, segments per row, row_outside) for `ids` ids per row;
    `overridden` as in launch.forward_plan.
    """
    case = layout.case
    chosen = config.select("forward", case.arch, layout.p.itemsize, layout.vocabulary)
    segment = config.segment_length(layout.vocabulary, chosen.segment)
    splits = max(1, -(-layout.vocabulary // segment))
    variant = row_variant(
        row_outside,
        case,
        chosen,
        (),
        True,
        IDS=triton.next_power_of_2(ids),
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
) -> None:
    """Fill peak and log_sum, [N] float64, with the largest of each row's entries not in `ids`
    [N, K], sorted in each row, and the log-sum-exp of these entries relative to it; fill `saved`
    [N, 10] as launch.forward does for these entries alone.
    """
    p, _, _, mask, temperatures, _ = tensors(problem)
    layout, (_, count) = problem.layout, ids.shape
    segment, splits, variant = outside_plan(layout, count, tuple(config._override.items()))
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
