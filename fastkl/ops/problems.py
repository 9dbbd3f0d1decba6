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
def _merged_dims(
    leading: torch.Size, p_strides: tuple[int, ...], q_strides: tuple[int, ...]
) -> tuple[tuple[Dim, ...], tuple[Dim, Dim]]:
    """Return the leading dimensions, neighbours merged where both tensors allow it: (the outermost,
    the last two).
    """
    merged: list[Dim] = []
    for size, step_p, step_q in zip(leading, p_strides, q_strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * step_p and merged[-1][2] == size * step_q:
            merged[-1] = (merged[-1][0] * size, step_p, step_q)
        else:
            merged.append((size, step_p, step_q))
    *_, outer, inner = (1, 0, 0), (1, 0, 0), *merged
    return tuple(merged[:-2]), (outer, inner)


def problems(args: RowArgs) -> list[tuple[slice | None, Any]]:
    """Return (rows, kernels.launch.Problem): one for all rows (None) of up to two independent
    strides; rows of more are taken apart along the outer dimensions.
    """
    p, q = args.p, args.q
    other = p if q is None else q
    outermost, dims = _merged_dims(p.shape[:-1], p.stride()[:-1], other.stride()[:-1])
    ratio = args.scaling.ratio
    if not isinstance(ratio, torch.Tensor) and ratio != 1:
        ratio = torch.full((p.shape[:-1].numel(),), ratio, dtype=torch.float32, device=p.device)
        args = args._replace(scaling=args.scaling._replace(ratio=ratio))
    if not outermost:
        return [(None, _problem(args, p.shape[-1], dims))]
    count = dims[0][0] * dims[1][0]
    found: list[tuple[slice | None, Any]] = []
    indices = itertools.product(*(range(size) for size, _, _ in outermost))
    for at, index in enumerate(indices):
        rows = slice(at * count, (at + 1) * count)
        x = _starting_at(p, index, outermost, 1)
        y = None if q is None else _starting_at(q, index, outermost, 2)
        found.append((rows, _problem(args.at(rows, x, y), p.shape[-1], dims)))
    return found


def _problem(args: RowArgs, vocabulary: int, dims: tuple[Dim, Dim]) -> Any:
    launch = launchers()
    p, q, tokens, mask, temperature, (softcap, ref_softcap, ratio) = args
    temperatures, number = None, temperature
    if isinstance(temperature, torch.Tensor):
        temperatures, number = temperature, 1.0
    ratios = ratio if isinstance(ratio, torch.Tensor) else None
    layout = launch.layout(
        vocabulary,
        dims,
        (p.data_ptr() % launch.ADDRESSES, 0 if q is None else q.data_ptr() % launch.ADDRESSES),
        p.device,
        (
            p.dtype,
            None if q is None else q.dtype,
            None if tokens is None else tokens.dtype,
            None if temperatures is None else temperatures.dtype,
        ),
        mask is not None,
        (softcap, ref_softcap),
        ratios is not None,
    )
    return launch.Problem(p, q, layout, tokens, mask, number, temperatures, ratios)


@functools.cache
def launchers() -> ModuleType:
    """Return kernels.launch, imported at its first use: it needs Triton."""
    from ..kernels import launch

    return launch


@functools.cache
def fused_launchers() -> ModuleType:
    """Return kernels.launch_fused, likewise."""
    from ..kernels import launch_fused

    return launch_fused


def _starting_at(
    logits: torch.Tensor, index: tuple[int, ...], dims: tuple[Dim, ...], which: int
) -> torch.Tensor:
    """Return the same storage from an index of the outermost dimensions on: the kernels take a
    pointer and strides.
    """
    offset = sum(i * dim[which] for i, dim in zip(index, dims, strict=True))
    return logits.as_strided((1,), (1,), logits.storage_offset() + offset)
