"""Describes logits of any leading shape and strides as kernels.launch.Problems."""

from __future__ import annotations

import functools
import itertools
from types import ModuleType

import torch

from .fields import Scaling
from .row_blocks import rows_of

Dim = tuple[int, int, int]  # size, stride of P, stride of Q


@functools.lru_cache(1024)
def _merged_dims(
    leading: torch.Size, p_strides: tuple[int, ...], q_strides: tuple[int, ...]
) -> tuple[tuple[Dim, ...], tuple[Dim, Dim]]:
    """The leading dimensions as (size, stride of p, stride of q), neighbours merged where both
    tensors allow it: (the outermost, the last two).
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


def problems(
    p: torch.Tensor,
    q: torch.Tensor | None,
    tokens: torch.Tensor | None,
    mask: torch.Tensor | None,
    temperature: float | torch.Tensor,
    scaling: Scaling = Scaling(),  # noqa: B008
) -> list[tuple[slice | None, object]]:  # noqa: B008
    """(rows, kernels.launch.Problem): one for all rows (None) of up to two independent strides;
    more are taken apart along the outer dimensions.
    """
    launch, other = launchers(), p if q is None else q
    outermost, dims = _merged_dims(p.shape[:-1], p.stride()[:-1], other.stride()[:-1])
    temperatures, number = (
        (temperature, 1.0) if isinstance(temperature, torch.Tensor) else (None, temperature)
    )
    softcap, ref_softcap, ratio = scaling
    ratios = None
    if isinstance(ratio, torch.Tensor):
        ratios = ratio
    elif ratio != 1:
        ratios = torch.full((p.shape[:-1].numel(),), ratio, dtype=torch.float32, device=p.device)
    types = (
        p.dtype,
        None if q is None else q.dtype,
        None if tokens is None else tokens.dtype,
        None if temperatures is None else temperatures.dtype,
    )

    def problem(
        p: torch.Tensor,
        q: torch.Tensor | None,
        tokens: torch.Tensor | None,
        mask: torch.Tensor | None,
        temperatures: torch.Tensor | None,
        ratios: torch.Tensor | None,
    ) -> object:
        addresses = (
            p.data_ptr() % launch.ADDRESSES,
            0 if q is None else q.data_ptr() % launch.ADDRESSES,
        )
        layout = launch.layout(
            vocabulary,
            dims,
            addresses,
            p.device,
            types,
            mask is not None,
            (softcap, ref_softcap),
            ratios is not None,
        )
        return launch.Problem(p, q, layout, tokens, mask, number, temperatures, ratios)

    vocabulary = p.shape[-1]
    if not outermost:
        return [(None, problem(p, q, tokens, mask, temperatures, ratios))]
    count = dims[0][0] * dims[1][0]
    found: list[tuple[slice | None, object]] = []
    for at, index in enumerate(itertools.product(*(range(size) for size, _, _ in outermost))):
        rows = slice(at * count, (at + 1) * count)
        x, y = (
            _starting_at(p, index, outermost, 1),
            None if q is None else _starting_at(q, index, outermost, 2),
        )
        found.append(
            (
                rows,
                problem(
                    x,
                    y,
                    rows_of(tokens, rows),
                    rows_of(mask, rows),
                    rows_of(temperatures, rows),
                    rows_of(ratios, rows),
                ),
            )
        )
    return found


@functools.cache
def launchers() -> ModuleType:
    """kernels.launch, imported at its first use: it needs Triton."""
    from ..kernels import launch

    return launch


@functools.cache
def fused_launchers() -> ModuleType:
    """kernels.launch_fused, likewise."""
    from ..kernels import launch_fused

    return launch_fused


def _starting_at(
    logits: torch.Tensor, index: tuple[int, ...], dims: tuple[Dim, ...], which: int
) -> torch.Tensor:
    """The same storage from an index of the outermost dimensions on: the kernels take a pointer and
    strides.
    """
    offset = sum(i * dim[which] for i, dim in zip(index, dims, strict=True))
    return logits.as_strided((1,), (1,), logits.storage_offset() + offset)
