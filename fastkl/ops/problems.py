"""Describes logits of any leading shape and strides as kernels.launch.Problems."""

from __future__ import annotations

import functools
import itertools
from types import ModuleType
from typing import Any

import torch

from .fields import RowArgs

Dim = tuple[int, int, int]  # size, stride of P, stride of Q


@functools.lru_cache(1024)
def _described(
    shape: torch.Size, p_strides: tuple[int, ...], q_strides: tuple[int, ...], *rest: Any
) -> tuple[tuple[Dim, ...], tuple[Dim, Dim], Any]:
    """Merge neighbouring dimensions where both tensors allow it; return (the outermost ones, the
    last two, their kernels.launch.Layout).

    rest: further arguments of kernels.launch.layout.
    """
    merged: list[Dim] = []
    for size, step_p, step_q in zip(shape[:-1], p_strides[:-1], q_strides[:-1], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * step_p and merged[-1][2] == size * step_q:
            merged[-1] = (merged[-1][0] * size, step_p, step_q)
        else:
            merged.append((size, step_p, step_q))
    *_, outer, inner = (1, 0, 0), (1, 0, 0), *merged
    return tuple(merged[:-2]), (outer, inner), launchers().layout(shape[-1], (outer, inner), *rest)


def problems(args: RowArgs) -> list[tuple[slice | None, Any]]:
    """Return pairs (rows, kernels.launch.Problem): one Problem for all rows (None) if the leading
    dimensions merge into two; otherwise one per index of the outer dimensions.
    """
    p, q, tokens, mask, temperature, (softcap, ref_softcap, ratio) = args
    launch, other = launchers(), p if q is None else q
    temperatures = temperature if isinstance(temperature, torch.Tensor) else None
    ratios = None
    if isinstance(ratio, torch.Tensor):
        ratios = ratio
    elif ratio != 1:
        ratios = torch.full((p.shape[:-1].numel(),), ratio, dtype=torch.float32, device=p.device)
    outermost, dims, layout = _described(
        p.shape,
        p.stride(),
        other.stride(),
        (p.data_ptr() % launch.ADDRESSES, other.data_ptr() % launch.ADDRESSES),
        p.device,
        launch.architecture(p.device),
        (
            p.dtype,
            None if q is None else q.dtype,
            None if tokens is None else tokens.dtype,
            None if temperatures is None else temperatures.dtype,
        ),
        mask is not None,
        (float(softcap), float(ref_softcap), ratios is not None),
    )
    if not outermost:
        number = 1.0 if temperatures is not None else temperature
        problem = launch.Problem(p, q, layout, tokens, mask, number, temperatures, ratios)
        return [(None, problem)]
    count = dims[0][0] * dims[1][0]
    parts: list[tuple[slice | None, Any]] = []
    indices = itertools.product(*(range(size) for size, _, _ in outermost))
    for at, index in enumerate(indices):
        rows = slice(at * count, (at + 1) * count)
        x = _part(p, index, outermost, dims, 1)
        y = None if q is None else _part(q, index, outermost, dims, 2)
        ((_, problem),) = problems(args.at(rows, x, y))
        parts.append((rows, problem))
    return parts


@functools.cache
def launchers() -> ModuleType:
    """Return kernels.launch, imported at first use because it needs Triton."""
    from ..kernels import launch

    return launch


@functools.cache
def fused_launchers() -> ModuleType:
    """Return kernels.launch_fused, likewise."""
    from ..kernels import launch_fused

    return launch_fused


def _part(
    logits: torch.Tensor,
    index: tuple[int, ...],
    outermost: tuple[Dim, ...],
    dims: tuple[Dim, Dim],
    which: int,
) -> torch.Tensor:
    """Return the view [outer, inner, V] at an index of the outermost dimensions."""
    offset = sum(i * dim[which] for i, dim in zip(index, outermost, strict=True))
    return logits.as_strided(
        (dims[0][0], dims[1][0], logits.shape[-1]),
        (dims[0][which], dims[1][which], logits.stride(-1)),
        logits.storage_offset() + offset,
    )
