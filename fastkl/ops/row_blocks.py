"""Cuts logits of any leading shape and strides into blocks of rows that stay in a CPU's cache."""

from collections.abc import Iterable, Iterator

import torch

from . import cpu_rows

# Elements of a block of rows, for each thread: small enough for its cache, large enough to keep
# torch's overhead down. Up to four times as many if the block's buffers are still small beside the
# tensors.
BLOCK_ELEMENTS = 1 << 16
# Rows that are finished together: the finishing step costs a few scalars a row.
ROWS_AT_ONCE = 256


def row_blocks(logits: torch.Tensor, mask: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """Yield the indices of unmasked rows, a block at a time."""
    vocabulary = logits.shape[-1]
    rows = (
        torch.arange(logits.numel() // vocabulary, device=logits.device)
        if mask is None
        else mask.nonzero()[:, 0]
    )
    if rows.numel():
        yield from rows.split(max(1, BLOCK_ELEMENTS // vocabulary))


def take(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return the rows `rows` of a tensor of any leading shape and strides, copying no others."""
    if logits.dim() == 2:
        contiguous = int(rows[-1]) - int(rows[0]) == rows.numel() - 1
        return logits[int(rows[0]) : int(rows[-1]) + 1] if contiguous else logits[rows]
    if logits.dim() == 1:
        return logits[None]
    return logits[torch.unravel_index(rows, logits.shape[:-1])]


def statistics_elements(logits: torch.Tensor) -> int:
    """Return the elements of a block of statistics, at least a row: its up to four float32 buffers
    take no more memory than one of the tensors.
    """
    return max(logits.shape[-1], min(_block(4, logits.nbytes // 16), logits.numel()))


def gradient_elements(logits: torch.Tensor) -> int:
    """Return the elements of a block of gradients, which may be a part of a long row: two buffers
    take 5 % of the memory of one of the tensors.
    """
    whole = logits.shape[-1] if cpu_rows.takes_whole_rows(logits) else 256
    return max(whole, _block(4, logits.nbytes // 40) // 2)


def _block(most: int, elements: int) -> int:
    """Return `elements` clamped to 1 … `most` blocks, times the threads: each thread's share of
    every operation fits its cache.
    """
    return min(most * BLOCK_ELEMENTS, max(BLOCK_ELEMENTS, elements)) * torch.get_num_threads()


def rows_per_block(logits: torch.Tensor) -> int:
    """Return the rows of a block, at least one."""
    return max(1, BLOCK_ELEMENTS * torch.get_num_threads() // logits.shape[-1])


def blocks(
    p: torch.Tensor, q: torch.Tensor | None, mask: torch.Tensor | None, several: bool
) -> Iterator[tuple[slice | torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Yield (row numbers, their logits [k, V] of P and of Q) of unmasked rows: a block at a time,
    several blocks if that needs no copy.
    """
    step = rows_per_block(p)
    most = max(step, ROWS_AT_ONCE) if several else step
    for start, x, y in _matrices(p, q, 0):
        unmasked = None if mask is None else mask[start : start + x.shape[0]]
        parts: Iterable[slice | torch.Tensor]
        if unmasked is None or bool(unmasked.all()):
            parts = [
                slice(first, min(first + most, x.shape[0])) for first in range(0, x.shape[0], most)
            ]
        else:
            parts = _runs(unmasked.nonzero()[:, 0], most, step)
        for part in parts:
            rows = (
                slice(part.start + start, part.stop + start)
                if isinstance(part, slice)
                else part + start
            )
            yield rows, x[part], None if y is None else y[part]


def _runs(rows: torch.Tensor, most: int, step: int) -> Iterator[slice | torch.Tensor]:
    """Yield row numbers in order: up to `most` as a slice if they are consecutive (logits[slice] is
    a view), else up to `step`.
    """
    for part in rows.split(most) if rows.numel() else ():
        run = _as_slice(part)
        yield from (run,) if isinstance(run, slice) or most == step else _runs(part, step, step)


def _as_slice(rows: torch.Tensor) -> slice | torch.Tensor:
    """Return increasing row numbers, as a slice if they are consecutive."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first == rows.numel() - 1 else rows


def _matrices(
    p: torch.Tensor, q: torch.Tensor | None, start: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
    """Yield (number of the first row, views [n, V] of P and of Q) that together are all rows of
    logits of any leading shape and strides.
    """
    x, y = _matrix(p), None if q is None else _matrix(q)
    if x is not None and (q is None or y is not None):
        yield start, x, y
        return
    count = p.shape[1:-1].numel()
    for i in range(p.shape[0]):
        yield from _matrices(p[i], None if q is None else q[i], start + i * count)


def _matrix(logits: torch.Tensor) -> torch.Tensor | None:
    """Return the rows as a view [N, V], None if the strides allow none."""
    if logits.dim() <= 2:
        return logits.view(-1, logits.shape[-1]) if logits.dim() == 1 else logits
    try:
        return logits.view(-1, logits.shape[-1])
    except RuntimeError:
        return None
