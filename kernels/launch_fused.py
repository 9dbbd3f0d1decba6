"""Launchers of row_fused and scale_gradient."""

import functools
from typing import Any, NamedTuple

import torch
import triton

from . import config
from .layout import ADDRESSES, CACHE_SIZE, Layout, Problem, grads_in_blocks
from .row_fused import row_fused, scale_gradient
from .row_math import STATE
from .variant import (
    FALLBACK_ROWS,
    OPTIONS,
    Variant,
    current,
    fallback_variant,
    row_variant,
    tensors,
)

# Entries per step of a scale_gradient program, and largest number of programs.
SCALE_BLOCK = 2048
SCALE_PROGRAMS = 2048


class FusedPlan(NamedTuple):
    """The launches of row_fused: segments cut into `pieces` of `piece` entries, `splits` pieces per
    row.
    """

    segment: int
    piece: int
    pieces: int
    splits: int
    phases: tuple[Variant, ...]
    fallback: Variant


@functools.lru_cache(CACHE_SIZE)
def fused_plan(layout: Layout, grad_type: torch.dtype, overridden: tuple[Any, ...]) -> FusedPlan:
    """Return the plan of row_fused (two phases in the interpreter) and of row_fallback with a
    gradient; `overridden` as in forward_plan.
    """
    case = layout.case
    chosen = config.select("fused", case.arch, layout.p.itemsize, layout.vocabulary)
    segment = config.segment_length(layout.vocabulary, chosen.segment)
    pieces = -(-segment // chosen.segment)
    splits = -(-layout.vocabulary // segment) * pieces
    phases = tuple(
        [
            row_variant(
                row_fused,
                case,
                chosen,
                (grad_type,),
                True,
                SPLITS=triton.next_power_of_2(splits),
                PREFETCH=config.prefetches(case.arch),
                PHASE=phase,
            )
            for phase in ((1, 2) if case.arch == "interpreter" else (0,))
        ]
    )
    return FusedPlan(
        segment,
        -(-segment // (8 * pieces)) * 8,
        pieces,
        splits,
        phases,
        fallback_variant(
            case,
            (grad_type,),
            HAS_TOKENS=False,
            WITH_ENTROPY=False,
            WITH_KL=True,
            WITH_REF_KL=False,
            WITH_LSE=False,
            KIND=0,
            PART=False,
            MERGE=False,
            SPLITS=0,
        ),
    )


def fuses(problem: Problem, grad_p: torch.Tensor) -> bool:
    """Return whether `fused` supports the problem: every row of logits and gradient starts on a
    16-byte boundary. config.fuses decides whether to use it.
    """
    return (
        problem.q is not None
        and not problem.layout.case.realign
        and problem.layout.case.q_in_blocks
        and grads_in_blocks(
            problem.layout, grad_p.stride(0), (grad_p.dtype, grad_p.data_ptr() % ADDRESSES)
        )
    )


def fused(
    problem: Problem,
    weights: torch.Tensor,
    kl: torch.Tensor,
    saved: torch.Tensor,
    grad_p: torch.Tensor,
) -> None:
    """Fill kl [N], saved [N, 10], and grad_p [N, V] with the gradient of Σ weights·kl to P, which
    may be P itself; see `fuses`.
    """
    p, q, tokens, mask, temperatures, ratios = tensors(problem)
    layout = problem.layout
    plan = fused_plan(layout, grad_p.dtype, tuple(config._override.items()))
    shared = dict(
        temperature=float(problem.temperature),
        **layout.places,
        stride_grad=grad_p.stride(0),
        V=layout.vocabulary,
    )
    with current(p):
        state = torch.empty(
            layout.rows * plan.splits * STATE.value, dtype=torch.float32, device=p.device
        )
        sync = torch.zeros(1 + layout.rows, dtype=torch.int32, device=p.device)
        for variant in plan.phases:
            variant.start(
                layout.rows * plan.splits,
                dict(
                    p_ptr=p,
                    q_ptr=q,
                    grad_ptr=grad_p,
                    weight_ptr=weights,
                    mask_ptr=mask,
                    temperature_ptr=temperatures,
                    ratio_ptr=ratios,
                    state_ptr=state,
                    sync_ptr=sync,
                    saved_ptr=saved,
                    kl_ptr=kl,
                    **shared,
                    segment=plan.segment,
                    piece=plan.piece,
                    pieces=plan.pieces,
                    splits=plan.splits,
                ),
            )
        plan.fallback.start(
            -(-layout.rows // FALLBACK_ROWS),
            dict(
                p_ptr=p,
                q_ptr=q,
                temperature_ptr=temperatures,
                ratio_ptr=ratios,
                tokens_ptr=tokens,
                saved_ptr=saved,
                logprob_ptr=kl,
                entropy_ptr=kl,
                ref_logprob_ptr=kl,
                kl_ptr=kl,
                ref_kl_ptr=kl,
                lse_ptr=kl,
                ref_lse_ptr=kl,
                grad_ptr=grad_p,
                weight_ptr=weights,
                part_ptr=kl,
                log_sums_ptr=kl,
                **shared,
                n_rows=layout.rows,
                share=0.0,
                rest=1.0,
                ranks=0,
                splits=1,
                segment=0,
            ),
        )


@functools.cache
def _scaler(device: torch.device, dtype: torch.dtype) -> Variant:
    """Return the Variant of scale_gradient."""
    return Variant(
        scale_gradient, {"BLOCK": SCALE_BLOCK}, {"num_warps": SCALE_BLOCK // 512, **OPTIONS}
    )


def scale(gradient: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiply a contiguous gradient [n] in place by factor [1], which stays on the device."""
    with current(gradient):
        _scaler(gradient.device, gradient.dtype).start(
            min(SCALE_PROGRAMS, -(-gradient.numel() // SCALE_BLOCK)),
            dict(grad_ptr=gradient, factor_ptr=factor.to(torch.float32), n=gradient.numel()),
        )
