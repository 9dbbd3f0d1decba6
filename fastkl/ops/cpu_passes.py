"""Passes over a block of rows on a CPU, and their buffers."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

# Bytes of LentMemory's own memory for a gradient of at most four times that size. For a larger one
# as many as keep a loss below 1.1 gradients if all rows are near: saved values, the KL, factors and
# sums take some 70 per row. Never less than a row per buffer.
OWN_BYTES = 1 << 17
# Longest row whose softmax counts as normalised, and whose softmax backward (one pass instead of
# four) is accurate enough: Σ e is off by 1.2e-6 at most in 4096 rows of N(0, 3²) of this length, by
# 6e-6 in 64 rows of 100,000 entries.
LONGEST_SHORT_ROW = 4096


class Block(NamedTuple):
    """Rows computed together: logits [k, V] of P and of Q, of any dtype except float64, tokens [k]
    and 1/T, [k, 1] or a number.
    """

    x: torch.Tensor
    y: torch.Tensor | None
    tokens: torch.Tensor | None
    scale: torch.Tensor | float

    def part(self, rows: slice | torch.Tensor) -> "Block":
        """Return the rows `rows`."""
        x, y, tokens, scale = self
        return Block(
            x[rows],
            None if y is None else y[rows],
            None if tokens is None else tokens[rows],
            scale[rows] if isinstance(scale, torch.Tensor) else scale,
        )

    def split(self, counts: list[int]) -> "list[Block]":
        """Return consecutive blocks of counts[0], counts[1], … rows, as views."""
        sides = [
            side.split_with_sizes(counts)
            if isinstance(side, torch.Tensor)
            else [side] * len(counts)
            for side in self
        ]
        return list(map(Block, *sides))


class Room:
    """Float32 buffers by name, each as large as the largest shape requested.

    elements: entries per block, for the caller. buffers: the first buffers, contiguous.
    """

    def __init__(
        self, elements: int, device: torch.device, buffers: dict[str, torch.Tensor] | None = None
    ) -> None:
        self.elements, self._device, self._buffers = elements, device, buffers or {}
        self._views = dict(self._buffers)

    def __call__(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        view = self._views.get(name)
        if view is None or view.shape != shape:
            buffer, size = self._buffers.get(name), shape[0] * shape[1]
            if buffer is None or buffer.numel() < size:
                buffer = torch.empty(size, dtype=torch.float32, device=self._device)
                self._buffers[name] = buffer
            view = self._views[name] = buffer.view(-1)[:size].view(shape)
        return view


class LentMemory:
    """Scratch memory for blocks of rows: a small piece of its own, and gradient rows not yet
    written.

    separate: whether the gradient and the logits have different storages.
    """

    def __init__(self, p: torch.Tensor, q: torch.Tensor, grad: torch.Tensor, step: int) -> None:
        # Float32 buffers of a row: d, products and, for 16-bit logits, the softmax.
        self._names = ("d", "work", "e")[: 2 if grad.dtype == torch.float32 else 3]
        self._rows, self._vocabulary, self._step = *grad.shape, step
        logits = {side.untyped_storage().data_ptr() for side in (p, q)}
        self.separate = grad.untyped_storage().data_ptr() not in logits
        aligned = grad.storage_offset() * grad.itemsize % 4 == 0
        self._lends = self.separate and grad.is_contiguous() and aligned
        own_bytes = grad.nbytes // 11 - 70 * self._rows
        # The values of short rows alone exceed the limit.
        if grad.nbytes <= 4 * OWN_BYTES or own_bytes < grad.nbytes // 25:
            own_bytes = OWN_BYTES
        self._own_rows = max(len(self._names), own_bytes // (4 * self._vocabulary))
        self._own = grad.new_empty(self._own_rows * self._vocabulary, dtype=torch.float32)
        self._lent = self._own[:0]
        if self._lends:
            # An odd last entry of a 16-bit gradient is left out.
            self._lent = grad.view(-1)[: grad.nbytes // 4 * 4 // grad.itemsize].view(torch.float32)

    def blocks(self, begin: int | None, rows: int) -> tuple[list[int], Iterator[Room]]:
        """Return the rows of each block, and its buffers, for `rows` rows.

        begin: the gradient row of the first; None for gathered rows, which lend no memory.
        """
        unwritten = 0 if begin is None or not self._lends else self._rows - begin
        plan = _plan(rows, unwritten, self._own_rows, self._step, len(self._names))
        return [count for count, _ in plan], self._rooms(plan)

    def _rooms(self, plan: list[tuple[int, int]]) -> Iterator[Room]:
        room, last = Room(0, self._own.device), None
        for count, own in plan:
            if (count, own) != last:
                shape, buffers, last = (count, self._vocabulary), {}, (count, own)
                for i, name in enumerate(self._names):
                    memory, start = self._own, i * shape[0] * shape[1]
                    if i >= own:  # up to the end of the gradient
                        left = len(self._names) - i
                        memory, start = self._lent, self._lent.numel() - left * shape[0] * shape[1]
                    # One call instead of two, per buffer and block.
                    buffers[name] = memory.as_strided(
                        shape, (shape[1], 1), memory.storage_offset() + start
                    )
                room = Room(0, self._own.device, buffers)
            yield room


@functools.lru_cache
def _plan(
    rows: int, unwritten: int, own_rows: int, step: int, buffers: int
) -> list[tuple[int, int]]:
    """Return (rows, buffers in own memory) of each block of at most `step` rows.

    unwritten: the gradient rows from the first on. With two buffers (float32) the block's own rows
    hold e. With three (16 bits, two gradient rows for one of float32) they may hold d and products,
    but not e, the last buffer.
    """
    plan = []
    while rows:
        choices = []
        for own in range(buffers + 1):
            lent, count = buffers - own, min(rows, step, own_rows // own if own else step)
            if lent:
                gradient_rows = lent + 1 if buffers == 2 else max(2 * lent, 3)
                # One row less, for an odd last entry.
                count = min(count, (unwritten - 1) // gradient_rows)
            choices.append((count, own))
        plan.append(max(choices))
        rows, unwritten = rows - plan[-1][0], unwritten - plan[-1][0]
    return plan


def row_sum(values: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Sum rows [k, V] to [k, 1] in the same order for any k: torch splits a single row's sum across
    threads.
    """
    if values.shape[0] == 1 and torch.get_num_threads() > 1:
        return values.expand(2, -1).sum(-1, True, dtype=dtype)[:1]
    return values.sum(-1, True, dtype=dtype)


def softmax_sum(e: torch.Tensor) -> torch.Tensor | None:
    """Return Σ e of a softmax, [k, 1]; None in short rows, for 1. In long ones torch's softmax
    divides by a less accurate sum than row_sum's.
    """
    return row_sum(e) if e.shape[1] > LONGEST_SHORT_ROW else None


def divided(values: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Return values/weight; None counts as 1."""
    return values if weight is None else values / weight


def dot(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Compute Σ a·b of each row, [k, 1]; the products go to `out`."""
    return row_sum(torch.mul(a, b, out=out))


def is_one(scale: torch.Tensor | float) -> bool:
    """Return whether a scale is the number 1, so that no pass is needed."""
    return isinstance(scale, float) and scale == 1.0


def difference(
    y: torch.Tensor,
    x: torch.Tensor,
    top: torch.Tensor | None,
    shift: torch.Tensor | None,
    room: Room,
) -> torch.Tensor:
    """Compute y - x - shift in float32.

    shift: whole numbers [k, 1], subtracted from the operand of larger magnitude, which is exact.
    """
    out = room("d", x.shape)
    y = wide(y, out)
    if shift is None:
        return torch.sub(y, x, out=out)
    assert top is not None
    of_y = torch.where((top + shift).abs() >= top.abs(), shift, 0.0)
    return torch.sub(y, of_y, out=out).sub_(torch.add(x, shift - of_y, out=room("work", x.shape)))


def wide(values: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Return the values in float32: themselves, or a copy in `out`."""
    return values if values.dtype == torch.float32 else out.copy_(values)


def softmax(
    x: torch.Tensor,
    scale: torch.Tensor | float,
    out: torch.Tensor,
    work: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute softmax(x·scale) of float32 logits; `out` may be x.

    work: afterwards (x - top)·scale, unless scale is 1.
    """
    if not is_one(scale):
        x = torch.sub(x, x.amax(-1, keepdim=True), out=out if work is None else work).mul_(scale)
    return torch.softmax(x, -1, out=out)
