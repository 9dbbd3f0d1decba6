"""Launchers of row_divergence and row_divergence_backward."""

import dataclasses
import functools
from typing import Any, NamedTuple

import torch
import triton

from . import config, launch
from .divergence_math import JS, MOMENT_TERMS, RENYI, SKEW_KL, TERMS, TOTAL_VARIATION
from .launch import Variant, _on, _tensors, row_variant
from .layout import ADDRESSES, CACHE_SIZE, Layout, Problem
from .row_divergence import row_divergence
from .row_divergence_backward import row_divergence_backward

KINDS = {
    "js": JS.value,
    "skew_kl": SKEW_KL.value,
    "total_variation": TOTAL_VARIATION.value,
    "renyi": RENYI.value,
}
__all__ = ["MOMENT_TERMS", "TERMS", "Series", "backward", "forward"]
# Where Q's share of the mixture is below this, the logarithms of far entries need a series.
SMALL_REST = 0.05


class Series(NamedTuple):
    """An f-divergence for the kernels: its kind, alpha or beta, f''(0), and the coefficients of G
    and K, and of U and V (divergence_math.py), of the highest power first.
    """

    kind: str
    share: float
    curvature: float
    forward: tuple[float, ...]
    backward: tuple[float, ...]

    def constants(self) -> dict[str, object]:
        """The compile-time values."""
        return dict(KIND=KINDS[self.kind], SMALL_REST=1.0 - self.share < SMALL_REST)

    def numbers(self, coefficients: tuple[float, ...]) -> dict[str, float]:
        """The run-time values, in the order of the kernels' signatures."""
        named = {f"c{i}": value for i, value in enumerate(coefficients)}
        return dict(share=self.share, rest=1.0 - self.share, curvature=self.curvature, **named)


def _chosen(layout: Layout) -> config.RowConfig:
    """Return forward's configuration, in backward too: with one warp, a tile is checked without a
    barrier. On sm_100 these kernels need more registers than it allows.
    """
    arch, itemsize = layout.case.arch, layout.p.itemsize
    chosen = config.select("forward", arch, itemsize, layout.vocabulary)
    return dataclasses.replace(chosen, max_registers=168) if arch == "sm_100" else chosen


@functools.lru_cache(CACHE_SIZE)
def forward_plan(
    layout: Layout, constants: tuple[Any, ...], with_moment: bool, overridden: tuple[Any, ...]
) -> tuple[int, int, Variant]:
    """(length of a segment, segments of a row, row_divergence); `overridden` as in
    launch.forward_plan.
    """
    case, kind, chosen = layout.case, dict(constants)["KIND"], _chosen(layout)
    segment = config.segment_length(layout.vocabulary, chosen.segment)
    # Of Rényi's divergence only fallback rows are left.
    splits = 1 if kind == RENYI.value else max(1, -(-layout.vocabulary // segment))
    variant = row_variant(
        row_divergence,
        case,
        chosen,
        (),
        # Skew's terms take more registers than forward's limit.
        case.q_in_blocks and kind != SKEW_KL.value,
        SPLITS=triton.next_power_of_2(splits),
        REALIGN=case.realign,
        WITH_MOMENT=with_moment,
        LG2=case.arch.startswith("sm_"),
        **dict(constants),
    )
    return segment, splits, variant


def forward(
    problem: Problem, series: Series, value: torch.Tensor, saved: torch.Tensor, with_moment: bool
) -> None:
    """Fill a divergence [N] of two tensors, and `saved` [N, 10] for its gradient if with_moment."""
    if series.kind == "renyi":
        outputs, gamma = {"kl": torch.empty_like(value), "ref_kl": value}, 1.0 - series.share
        launch.forward(problem, outputs, saved, gamma)
    else:
        launch.forward(problem, {"kl": value}, saved)
    p, q, _, mask, temperatures, ratios = _tensors(problem)
    layout = problem.layout
    segment, splits, variant = forward_plan(
        layout, tuple(series.constants().items()), with_moment, tuple(config._override.items())
    )
    with _on(p):
        state = counters = saved
        if splits > 1:
            state = torch.empty(layout.rows * splits * 2, dtype=torch.float32, device=p.device)
            counters = torch.zeros(layout.rows, dtype=torch.int32, device=p.device)
        variant.start(
            layout.rows * splits,
            dict(
                p_ptr=p,
                q_ptr=q,
                mask_ptr=mask,
                temperature_ptr=temperatures,
                ratio_ptr=ratios,
                saved_ptr=saved,
                value_ptr=value,
                state_ptr=state,
                counter_ptr=counters,
                temperature=float(problem.temperature),
                **layout.places,
                V=layout.vocabulary,
                segment=segment,
                splits=splits,
                **series.numbers(series.forward),
            ),
        )


@functools.lru_cache(CACHE_SIZE)
def backward_plan(
    layout: Layout,
    constants: tuple[Any, ...],
    stride: int,
    grad_p: tuple[torch.dtype, int] | None,
    grad_q: tuple[torch.dtype, int] | None,
    overridden: tuple[Any, ...],
) -> tuple[int, Variant]:
    """(chunks of a row, row_divergence_backward), as launch.backward_plan."""
    case, chosen = layout.case, _chosen(layout)
    chunk = chosen.threads * chosen.groups * layout.p.lanes
    chunk *= max(1, chosen.segment // chunk)
    chunks = -(-(layout.vocabulary + layout.p.lanes - 1) // chunk)
    return chunks, row_variant(
        row_divergence_backward,
        case,
        chosen,
        (grad_p and grad_p[0], grad_q and grad_q[0]),
        True,
        CHUNK=chunk,
        WRT_P=grad_p is not None,
        WRT_Q=grad_q is not None,
        LG2=case.arch.startswith("sm_"),
        GRAD_IN_BLOCKS=launch.grads_in_blocks(layout, stride, grad_p, grad_q),
        **dict(constants),
    )


def backward(
    problem: Problem,
    series: Series,
    saved: torch.Tensor,
    upstream: torch.Tensor,
    grad_p: torch.Tensor | None,
    grad_q: torch.Tensor | None,
) -> None:
    """Fill the gradients ([N, V], both with the same row stride), which may be the logits
    themselves, from upstream gradients [N].
    """
    p, q, _, mask, temperatures, ratios = _tensors(problem)
    layout = problem.layout
    grad = grad_q if grad_p is None else grad_p
    assert grad is not None
    stride_grad = grad.stride(0)
    chunks, variant = backward_plan(
        layout,
        tuple(series.constants().items()),
        stride_grad,
        None if grad_p is None else (grad_p.dtype, grad_p.data_ptr() % ADDRESSES),
        None if grad_q is None else (grad_q.dtype, grad_q.data_ptr() % ADDRESSES),
        tuple(config._override.items()),
    )
    with _on(p):
        variant.start(
            layout.rows * chunks,
            dict(
                p_ptr=p,
                q_ptr=q,
                grad_p_ptr=p if grad_p is None else grad_p,
                grad_q_ptr=p if grad_q is None else grad_q,
                saved_ptr=saved,
                upstream_ptr=upstream.to(torch.float32).contiguous(),
                mask_ptr=mask,
                temperature_ptr=temperatures,
                ratio_ptr=ratios,
                temperature=float(problem.temperature),
                **layout.places,
                stride_grad=stride_grad,
                V=layout.vocabulary,
                chunks=chunks,
                **series.numbers(series.backward),
            ),
        )
