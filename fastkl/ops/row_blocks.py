"""Cut logits of any leading shape and strides into blocks of rows that stay in a CPU's cache."""

from collections.abc import Iterator

import torch

from . import cpu_rows

# Elements per block and thread: small enough for its cache, large enough to keep torch's overhead
# low. Up to four times as many if the block's buffers are still small compared with the tensors.
BLOCK_ELEMENTS = 1 << 16
# Rows finished together: the finishing step takes a few scalars per row.
ROWS_AT_ONCE = 256


def statistics_elements(logits: torch.Tensor) -> int:
    """Return the elements per block for statistics, at least a row: up to four float32 buffers take
    no more memory than one of the tensors.
    """
    return max(logits.shape[-1], min(_block(4, logits.nbytes // 16), logits.numel()))


def gradient_elements(logits: torch.Tensor) -> int:
    """Return the elements per block for gradients, possibly part of a long row: two buffers take
    1/11 of the memory of one of the tensors, or one block or row each if that is more.
    """
    whole = logits.shape[-1] if cpu_rows.takes_whole_rows(logits) else 256
    return max(whole, _block(4, logits.nbytes // 44) // 2)


def _block(most: int, elements: int) -> int:
    """Return `elements` clamped to 1 … `most` blocks, times the threads: each thread's share of
    every operation fits its cache.
    """
    return min(most * BLOCK_ELEMENTS, max(BLOCK_ELEMENTS, elements)) * torch.get_num_threads()


def rows_per_block(logits: torch.Tensor) -> int:
    """Return the rows per block, at least one."""
    return max(1, BLOCK_ELEMENTS * torch.get_num_threads() // logits.shape[-1])


def blocks(
    p: torch.Tensor,
    q: torch.Tensor | None,
    mask: torch.Tensor | None,
    most: int,
    start: int = 0,
) -> Iterator[tuple[slice | torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Yield (row numbers, their logits [k, V] of P and of Q) of unmasked rows: a block at a time,
    or up to `most` rows if that needs no copy.

    start: the number of the first row.
    """
    x, y = p, q
    try:
        # A view of one padded row would have a stride of V, unlike its gradient's.
        if p.dim() != 2:
            x, y = p.view(-1, p.shape[-1]), None if q is None else q.view(-1, p.shape[-1])
    except RuntimeError:  # the strides allow no view
        count = p.shape[1:-1].numel()
        for i in range(p.shape[0]):
            yield from blocks(p[i], None if q is None else q[i], mask, most, start + i * count)
        return
    step, count = rows_per_block(p), len(x)
    most = max(step, most)
    parts = (
        [slice(first, min(first + most, count)) for first in range(0, count, most)]
        if mask is None
        else _runs(mask[start : start + count].nonzero()[:, 0], most, step)
    )
    for part in parts:
        numbers = (
            slice(part.start + start, part.stop + start)
            if isinstance(part, slice)
            else part + start
        )
        yield numbers, x[part], None if y is None else y[part]


def _runs(rows: torch.Tensor, most: int, step: int) -> Iterator[slice | torch.Tensor]:
    """Yield increasing row numbers: up to `most` as a slice if they are consecutive (logits[slice]
    is a view), otherwise up to `step`.
    """
    for part in rows.split(most) if rows.numel() else ():
        first, last = int(part[0]), int(part[-1])
        if last - first == part.numel() - 1:
            yield slice(first, last + 1)
        elif most == step:
            yield part
        else:
            yield from _runs(part, step, step)
