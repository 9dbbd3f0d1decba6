"""Launchers of row_fused and scale_gradient."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton

from . import config
from .launch import (
    FALLBACK_BLOCK,
    FALLBACK_ROWS,
    OPTIONS,
    Variant,
    _in_order,
    _on,
    _options,
    _tensors,
    fallback_options,
)
from .layout import ADDRESSES, CACHE_SIZE, Case, Layout, Problem, Rows
from .row_fallback import row_fallback
from .row_fused import row_fused, scale_gradient
from .row_math import STATE

# Entries that a program of scale_gradient takes at a time, and programs that share a GPU.
SCALE_BLOCK = 2048
SCALE_PROGRAMS = 2048


@functools.cache
def fused_variants(
    case: Case, chosen: config.RowConfig, most_splits: int
) -> tuple[tuple[Variant, ...], Variant]:
    """row_fused, in the interpreter as its two phases, and row_fallback with a gradient."""
    constants = dict(
        **case.constants,
        SPLITS=most_splits,
        THREADS=chosen.threads,
        GROUPS=chosen.groups,
        PREFETCH=config.prefetches(case.arch),
        HAS_TOKENS=False,
        WITH_ENTROPY=False,
        WITH_KL=True,
        WITH_REF_KL=False,
        ROWS=FALLBACK_ROWS,
        BLOCK=FALLBACK_BLOCK,
        WITH_GRADIENT=True,
    )
    options = _options(chosen, case)
    phases = (1, 2) if case.arch == "interpreter" else (0,)
    return (
        tuple(
            [
                Variant(row_fused, _in_order(row_fused, **constants, PHASE=phase), options)
                for phase in phases
            ]
        ),
        Variant(row_fallback, _in_order(row_fallback, **constants), fallback_options(case)),
    )


class FusedPlan(NamedTuple):
    """The launches of row_fused: segments cut into `pieces` of `piece` entries, `splits` pieces a
    row.
    """

    segment: int
    piece: int
    pieces: int
    splits: int
    phases: tuple[Variant, ...]
    fallback: Variant


@functools.lru_cache(CACHE_SIZE)
def _fused_plan(layout: Layout, overridden: tuple[Any, ...]) -> FusedPlan:
    """Return the plan of row_fused; `overridden` as in _forward_plan."""
    chosen = config.select("fused", layout.case.arch, layout.p.itemsize, layout.vocabulary)
    segment = config.segment_length(layout.vocabulary, chosen.segment)
    pieces = -(-segment // chosen.segment)
    splits = -(-layout.vocabulary // segment) * pieces
    return FusedPlan(
        segment,
        -(-segment // (8 * pieces)) * 8,
        pieces,
        splits,
        *fused_variants(layout.case, chosen, triton.next_power_of_2(splits)),
    )


def fuses(problem: Problem, grad_p: torch.Tensor) -> bool:
    """Whether `fused` takes the problem: every row of logits and gradient starts on a 16-byte
    boundary. config.fuses decides whether it should.
    """
    layout = problem.layout
    grad = Rows(
        grad_p.element_size(),
        grad_p.data_ptr() % ADDRESSES,
        layout.inner * grad_p.stride(0),
        grad_p.stride(0),
    )
    return (
        problem.q is not None
        and not layout.case.realign
        and layout.case.q_in_blocks
        and layout.p.same_blocks(grad, layout.inner, layout.outer)
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
    p, q, tokens, mask, temperatures, ratios = _tensors(problem)
    layout = problem.layout
    plan = _fused_plan(layout, tuple(config._override.items()))
    shared = dict(
        temperature=float(problem.temperature),
        **layout.places,
        stride_grad=grad_p.stride(0),
        V=layout.vocabulary,
    )
    with _on(p):
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
                grad_ptr=grad_p,
                weight_ptr=weights,
                **shared,
                n_rows=layout.rows,
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
    with _on(gradient):
        _scaler(gradient.device, gradient.dtype).start(
            min(SCALE_PROGRAMS, -(-gradient.numel() // SCALE_BLOCK)),
            dict(grad_ptr=gradient, factor_ptr=factor.to(torch.float32), n=gradient.numel()),
        )
