"""Logits tensors as rows, and the row statistics of either backend: what the custom ops of _ops.py run."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch

from . import _checks, reference

FIELDS = ("logprob", "entropy", "ref_logprob", "kl", "ref_kl")
SAVED = reference.SAVED  # values per row held for backward, the same number on either backend
# Elements of a block of rows on the reference: small enough for a processor's cache, large enough to keep torch's overhead down.
BLOCK_ELEMENTS = 1 << 18


class Scaling(NamedTuple):
    """Soft caps, and the ratio that multiplies Q's capped logits.

    softcap, ref_softcap: soft caps of P's and of Q's logits, 0 for none. ratio: the inverse temperature of Q over that
    of P, a number or one per row [N], contiguous, in the type of the results; it multiplies Q's capped logits.
    """

    softcap: float = 0.0
    ref_softcap: float = 0.0
    ratio: float | torch.Tensor = 1.0


def result_dtype(logits: torch.Tensor) -> torch.dtype:
    """float64 for float64 logits (reference only), else float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def flat(value: torch.Tensor | None) -> torch.Tensor | None:
    """A per-row tensor as a contiguous vector."""
    return value if value is None or (value.dim() == 1 and value.is_contiguous()) else value.reshape(-1).contiguous()


def flat_temperature(temperatures: torch.Tensor | None, temperature: float) -> float | torch.Tensor:
    """The one temperature, or one per row as a contiguous vector."""
    return temperature if temperatures is None else flat(temperatures)


def forward(backend: str, p, q, tokens, mask, temperature, outputs: dict[str, torch.Tensor], saved: torch.Tensor,
            scaling: Scaling = Scaling()) -> None:  # noqa: B008  (a tuple of numbers)
    """Fill outputs ([N] per field) and saved [N, 10] from logits of any leading shape; tokens, mask, temperature: [N] or None / float."""
    if backend == "reference":
        reference_forward(p, q, tokens, mask, temperature, outputs, saved, scaling)
        return
    for rows, problem in problems(p, q, tokens, mask, temperature, scaling):
        part = (outputs, saved) if rows is None else (_some_of_each(outputs, rows), saved[rows])
        _launchers().forward(problem, *part)


def backward(backend: str, p, q, tokens, mask, temperature, saved: torch.Tensor, upstream: dict[str, torch.Tensor],
             grad_p: torch.Tensor | None, grad_q: torch.Tensor | None,
             scaling: Scaling = Scaling()) -> None:  # noqa: B008
    """Fill the gradients ([N, V], both with the same row stride) from upstream gradients [N] per field.

    They are gradients with respect to the raw logits, before `scaling`, and may be the logits themselves unless the
    gradient of ref_kl to Q is asked for: a far row is then read again.
    """
    if backend == "reference":
        reference_backward(p, q, tokens, mask, temperature, saved, upstream, grad_p, grad_q, scaling)
        return
    # A saved-tensor hook may return logits with another stride along the vocabulary.
    p = p if p.stride(-1) == 1 else p.contiguous()
    q = q if q is None or q.stride(-1) == 1 else q.contiguous()
    for rows, problem in problems(p, q, tokens, mask, temperature, scaling):
        part = (saved, upstream, grad_p, grad_q)
        if rows is not None:
            part = (saved[rows], _some_of_each(upstream, rows), _some(grad_p, rows), _some(grad_q, rows))
        _launchers().backward(problem, *part)


def kl_and_gradients(backend: str, p, q, tokens, mask, temperature, kl: torch.Tensor, saved: torch.Tensor, weights: torch.Tensor,
                     grad_p: torch.Tensor | None, grad_q: torch.Tensor | None, scaling: Scaling) -> None:
    """`forward` of kl and `backward` for upstream gradients `weights` [N]; in one launch for a gradient to P alone where kernels.config has it so."""
    if backend == "reference" or grad_p is None or grad_q is not None:
        forward(backend, p, q, tokens, mask, temperature, {"kl": kl}, saved, scaling)
        backward(backend, p, q, tokens, mask, temperature, saved, {"kl": weights}, grad_p, grad_q, scaling)
        return
    for rows, problem in problems(p, q, tokens, mask, temperature, scaling):
        part = (kl, saved, weights, grad_p) if rows is None else (kl[rows], saved[rows], weights[rows], grad_p[rows])
        _kl_and_gradient(problem, *part)


def _kl_and_gradient(problem: object, kl: torch.Tensor, saved: torch.Tensor, weights: torch.Tensor, grad_p: torch.Tensor) -> None:
    if fused_launchers().fuses(problem, grad_p):
        fused_launchers().fused(problem, weights.to(torch.float32).contiguous(), kl, saved, grad_p)
    else:
        _launchers().forward(problem, {"kl": kl}, saved)
        _launchers().backward(problem, saved, {"kl": weights}, grad_p, None)


def row_blocks(logits: torch.Tensor, mask: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """Indices of the rows that count, a block at a time."""
    vocabulary = logits.shape[-1]
    rows = torch.arange(logits.numel() // vocabulary, device=logits.device) if mask is None else mask.nonzero()[:, 0]
    if rows.numel():
        yield from rows.split(max(1, BLOCK_ELEMENTS // vocabulary))


def take(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Some rows of a tensor of any leading shape and strides, without a copy of the whole."""
    if logits.dim() == 2:
        contiguous = int(rows[-1]) - int(rows[0]) == rows.numel() - 1
        return logits[int(rows[0]):int(rows[-1]) + 1] if contiguous else logits[rows]
    if logits.dim() == 1:
        return logits[None]
    return logits[torch.unravel_index(rows, logits.shape[:-1])]


def _some(value: torch.Tensor | float | None, rows: torch.Tensor | slice) -> torch.Tensor | float | None:
    """Some rows of a per-row tensor."""
    return value[rows] if isinstance(value, torch.Tensor) else value


def _some_of_each(values: dict[str, torch.Tensor], rows: slice) -> dict[str, torch.Tensor]:
    return {name: value[rows] for name, value in values.items()}


def reference_forward(p: torch.Tensor, q: torch.Tensor | None, tokens: torch.Tensor | None, mask: torch.Tensor | None,
                      temperature: float | torch.Tensor, outputs: dict[str, torch.Tensor], saved: torch.Tensor,
                      scaling: Scaling) -> None:
    """Fill outputs ([N] per field) and saved [N, 10] from reference.row_statistics, a block of rows at a time; masked rows stay 0."""
    for value in (*outputs.values(), saved):
        value.zero_()
    for rows in row_blocks(p, mask):
        chosen, scales = _some(tokens, rows), _some(temperature, rows)
        if chosen is not None:
            _checks.tokens_in_range(chosen, p.shape[-1])
        if isinstance(scales, torch.Tensor):
            _checks.temperatures_positive(scales)
        x, y = _scaled(p, q, rows, scaling)
        result = _statistics(x, y, chosen, scales, outputs)
        far = result.saved[:, reference.FAR] != 0
        if result.saved.dtype != torch.float64 and bool(far.any()):
            wide = _statistics(*_double(far, x, y), _some(chosen, far), _some(scales, far), outputs)
            for value, better in zip(result[:-1], wide[:-1], strict=True):
                if value is not None:
                    value[far] = better.to(value.dtype)
        for name, value in outputs.items():
            value[rows] = getattr(result, name).to(value.dtype)
        saved[rows] = result.saved.to(saved.dtype)


def _statistics(x, y, tokens, temperature, outputs: dict[str, torch.Tensor]) -> reference.RowStatistics:
    return reference.row_statistics(x, y, tokens, temperature, entropy="entropy" in outputs, reverse="ref_kl" in outputs)


def _double(rows: torch.Tensor, *sides: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Some rows in float64."""
    return [None if side is None else side[rows].double() for side in sides]


def _scaled(p: torch.Tensor, q: torch.Tensor | None, rows: torch.Tensor, scaling: Scaling) -> list[torch.Tensor | None]:
    """Some rows of both tensors, soft caps and ratio applied: in float64 with a ratio: float32 would round the product."""
    capped = [None if side is None else reference.soft_cap(take(side, rows), cap) for side, cap in ((p, scaling.softcap), (q, scaling.ref_softcap))]
    if q is None or not isinstance(scaling.ratio, torch.Tensor) and scaling.ratio == 1:
        return capped
    ratio = scaling.ratio[rows, None].double() if isinstance(scaling.ratio, torch.Tensor) else scaling.ratio
    return [capped[0].double(), capped[1].double() * ratio]


def _gradients(x, y, tokens, temperature, saved, upstream, wrt_p: bool, wrt_q: bool) -> list[torch.Tensor | None]:
    """Gradients of some rows; of fallback rows from their statistics in float64."""
    if x.dtype == torch.float64 and saved.dtype != torch.float64:
        # With a ratio every row is computed in float64.
        saved = reference.row_statistics(x, y, tokens, temperature).saved
    results = list(reference.row_gradients(x, y, tokens, temperature, saved, upstream, wrt_p=wrt_p, wrt_q=wrt_q))
    far = saved[:, reference.FAR] != 0
    if x.dtype != torch.float64 and bool(far.any()):
        wide = _gradients(*_double(far, x, y), _some(tokens, far), _some(temperature, far), saved[far],
                          {name: value[far] for name, value in upstream.items()}, wrt_p, wrt_q)
        for result, better in zip(results, wide, strict=True):
            if result is not None:
                result[far] = better.to(result.dtype)
    return results


def reference_backward(p: torch.Tensor, q: torch.Tensor | None, tokens: torch.Tensor | None, mask: torch.Tensor | None,
                       temperature: float | torch.Tensor, saved: torch.Tensor, upstream: dict[str, torch.Tensor],
                       grad_p: torch.Tensor | None, grad_q: torch.Tensor | None, scaling: Scaling) -> None:
    """Fill the gradients [N, V] from reference.row_gradients, a block of rows at a time; rows without upstream gradient get 0.

    A block's rows are read before any of its gradients is written: they may be the logits themselves.
    """
    active = torch.zeros(saved.shape[0], dtype=torch.bool, device=saved.device)
    for value in upstream.values():
        active |= value != 0
    if mask is not None:
        active &= mask
    inactive = (~active).nonzero()[:, 0]
    for grad in (grad_p, grad_q):
        if grad is not None:
            grad[inactive] = 0
    for rows in row_blocks(p, active):
        x, y = _scaled(p, q, rows, scaling)
        results = _gradients(x, y, _some(tokens, rows), _some(temperature, rows), saved[rows],
                             {name: value[rows] for name, value in upstream.items()}, grad_p is not None, grad_q is not None)
        slopes = _slopes(x, y, rows, scaling)
        for grad, value, slope in zip((grad_p, grad_q), results, slopes, strict=True):
            if grad is not None:
                grad[rows] = (value if slope is None else value * slope).to(grad.dtype)


def _slopes(x: torch.Tensor, y: torch.Tensor | None, rows: torch.Tensor, scaling: Scaling) -> list[torch.Tensor | float | None]:
    """The derivatives of the scaled logits with respect to the raw ones; None for 1."""
    slopes: list[torch.Tensor | float | None] = [reference.soft_cap_slope(x, scaling.softcap) if scaling.softcap else None, None]
    ratio = scaling.ratio[rows, None] if isinstance(scaling.ratio, torch.Tensor) else scaling.ratio
    if y is not None and scaling.ref_softcap:
        slopes[1] = reference.soft_cap_slope(y / ratio, scaling.ref_softcap)
    if isinstance(ratio, torch.Tensor) or ratio != 1:
        slopes[1] = ratio if slopes[1] is None else slopes[1] * ratio
    return slopes


@functools.lru_cache(1024)
def _merged_dims(leading: torch.Size, p_strides: tuple[int, ...], q_strides: tuple[int, ...]) -> tuple[tuple, tuple]:
    """The leading dimensions as (size, stride of p, stride of q), neighbours merged where both tensors allow it: (the outermost, the last two)."""
    merged: list[tuple[int, int, int]] = []
    for size, step_p, step_q in zip(leading, p_strides, q_strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * step_p and merged[-1][2] == size * step_q:
            merged[-1] = (merged[-1][0] * size, step_p, step_q)
        else:
            merged.append((size, step_p, step_q))
    return tuple(merged[:-2]), ((1, 0, 0), (1, 0, 0), *merged)[-2:]


def problems(p: torch.Tensor, q: torch.Tensor | None, tokens: torch.Tensor | None, mask: torch.Tensor | None,
             temperature: float | torch.Tensor, scaling: Scaling = Scaling()) -> list[tuple[slice | None, object]]:  # noqa: B008
    """(rows, kernels.launch.Problem): one for all rows (None) of up to two independent strides; more are taken apart along the outer dimensions."""
    launch, other = _launchers(), p if q is None else q
    outermost, dims = _merged_dims(p.shape[:-1], p.stride()[:-1], other.stride()[:-1])
    temperatures, number = (temperature, 1.0) if isinstance(temperature, torch.Tensor) else (None, temperature)
    softcap, ref_softcap, ratio = scaling
    if not isinstance(ratio, torch.Tensor):
        ratio = None if ratio == 1 else torch.full((p.shape[:-1].numel(),), ratio, dtype=torch.float32, device=p.device)
    types = (p.dtype, None if q is None else q.dtype, None if tokens is None else tokens.dtype, None if temperatures is None else temperatures.dtype)

    def problem(p, q, tokens, mask, temperatures, ratio) -> object:
        addresses = p.data_ptr() % launch.ADDRESSES, 0 if q is None else q.data_ptr() % launch.ADDRESSES
        layout = launch.layout(vocabulary, dims, addresses, p.device, types, mask is not None, (softcap, ref_softcap), ratio is not None)
        return launch.Problem(p, q, layout, tokens, mask, number, temperatures, ratio)

    vocabulary = p.shape[-1]
    if not outermost:
        return [(None, problem(p, q, tokens, mask, temperatures, ratio))]
    count, found = dims[0][0] * dims[1][0], []
    for at, index in enumerate(itertools.product(*(range(size) for size, _, _ in outermost))):
        rows = slice(at * count, (at + 1) * count)
        sides = [None if side is None else _starting_at(side, index, outermost, which) for side, which in ((p, 1), (q, 2))]
        found.append((rows, problem(*sides, *(_some(value, rows) for value in (tokens, mask, temperatures, ratio)))))
    return found


@functools.cache
def _launchers() -> ModuleType:
    """kernels.launch, imported at its first use: it needs Triton."""
    from .kernels import launch

    return launch


@functools.cache
def fused_launchers() -> ModuleType:
    """kernels.launch_fused, likewise."""
    from .kernels import launch_fused

    return launch_fused


def _starting_at(logits: torch.Tensor, index: tuple[int, ...], dims: list[tuple[int, int, int]], which: int) -> torch.Tensor:
    """The same storage from an index of the outermost dimensions on: the kernels take a pointer and strides."""
    offset = sum(i * dim[which] for i, dim in zip(index, dims, strict=True))
    return logits.as_strided((1,), (1,), logits.storage_offset() + offset)
