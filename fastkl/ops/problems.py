"""Describe logits of any leading shape and strides as kernels.launch.Problems."""

import functools
import importlib
from typing import Any

import torch

from .fields import RowArgs

Dim = tuple[int, int, int]  # size, stride of P, stride of Q


@functools.lru_cache(1024)
def _described(
    shape: torch.Size, p_strides: tuple[int, ...], q_strides: tuple[int, ...], *rest: Any
) -> Any:
    """Return the kernels.launch.Layout of logits if the leading dimensions of both tensors merge
    into two, otherwise None.

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
    if len(merged) > 2:
        return None
    *_, outer, inner = (1, 0, 0), (1, 0, 0), *merged
    return launchers().layout(shape[-1], (outer, inner), *rest)


def problems(args: RowArgs) -> list[tuple[slice | None, Any]]:
    """Return pairs (rows, kernels.launch.Problem): one Problem for all rows (None) if the leading
    dimensions merge into two; otherwise Problems for each index of the first dimension.
    """
    p, q, tokens, mask, temperature, (softcap, ref_softcap, ratio), *_ = args
    launch, other = launchers(), p if q is None else q
    temperatures = temperature if isinstance(temperature, torch.Tensor) else None
    ratios = ratio if isinstance(ratio, torch.Tensor) else None
    if not isinstance(ratio, torch.Tensor) and ratio != 1:
        ratios = torch.full((p.shape[:-1].numel(),), ratio, dtype=torch.float32, device=p.device)
    layout = _described(
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
    if layout is not None:
        number = 1.0 if temperatures is not None else temperature
        return [(None, launch.Problem(p, q, layout, tokens, mask, number, temperatures, ratios))]
    count = p.shape[1:-1].numel()
    parts: list[tuple[slice | None, Any]] = []
    for i in range(p.shape[0]):
        rows = slice(i * count, (i + 1) * count)
        for part, problem in problems(args.at(rows, p[i], None if q is None else q[i])):
            start, stop, _ = (part or slice(None)).indices(count)
            parts.append((slice(rows.start + start, rows.start + stop), problem))
    return parts


# Functions without arguments that return a module of fastkl.kernels; the import needs Triton.
launchers, outside_launchers, fused_launchers, series = (
    functools.cache(functools.partial(importlib.import_module, f"..kernels.{name}", __package__))
    for name in ("launch", "launch_outside", "launch_fused", "series")
)
