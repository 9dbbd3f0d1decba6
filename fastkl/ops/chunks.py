"""Plans how many tokens go into one GEMM, and sums gradients over chunks of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from .fields import result_dtype

# Tokens of one GEMM: enough for a GPU's tiles to come out even, few enough that two buffers are
# small beside a weight.
LARGEST_CHUNK = 1024
# Bytes that buffers of logits may take unless the user says otherwise: never derived from free
# memory, on which results would then depend.
WORKSPACE = {"cpu": 1 << 27}
WORKSPACE_ON_A_GPU = 1 << 30
# Row strides are whole 128-byte lines for any V: matrix units and row kernels read aligned rows.
ROW_ELEMENTS = 64
# A sum of fewer bytes stays in float32: cuBLAS may cut a GEMM with so small a result along the
# tokens, and add the parts up in 16 bits.
SMALL_SUM = 1 << 26
# Chunks are cut in whole tiles of a GEMM.
TILE = 128


class Sum:
    """A gradient summed over tokens, in float32 (float64 for float64); it is never zero-filled."""

    def __init__(self, like: torch.Tensor) -> None:
        self._like, self.dtype = like, result_dtype(like)
        self._total: torch.Tensor | None = None

    @property
    def extra_bytes(self) -> int:
        """Bytes of a sum in a wider type than the gradient's, which the op does not return."""
        return 0 if self.dtype == self._like.dtype else self._like.numel() * self.dtype.itemsize

    @property
    def returned_bytes(self) -> int:
        """Bytes of the gradient in its own type."""
        return self._like.numel() * self._like.dtype.itemsize

    @property
    def spared_bytes(self) -> int:
        """Bytes saved when one GEMM over all tokens writes the gradient in its own dtype and no
        float32 accumulator is needed.

        float16 gradients are returned in float32 and scaled later; SMALL_SUM excludes small sums.
        """
        spares = self._like.dtype == torch.bfloat16 and self.extra_bytes >= SMALL_SUM
        return self.extra_bytes if spares else 0

    def take_one_product(self) -> None:
        """Let the only GEMM round to the gradient's dtype, if that saves memory."""
        if self.spared_bytes:
            self.dtype = self._like.dtype

    def add(self, product: Callable[..., None], *operands: torch.Tensor) -> None:
        """Call product(total, *operands, first), which adds to total; at first it fills it."""
        first = self._total is None
        if self._total is None:
            self._total = torch.empty(self._like.shape, dtype=self.dtype, device=self._like.device)
        product(self._total, *operands, first=first)

    def result(self) -> torch.Tensor:
        """Return the sum; zeros if nothing was added."""
        if self._total is None:
            return torch.zeros(self._like.shape, dtype=self.dtype, device=self._like.device)
        return self._total


class SummingHead(Protocol):
    """The facts about a ChunkedHead that a plan depends on."""

    hidden: torch.Tensor
    weight: torch.Tensor
    logits_dtype: torch.dtype
    learns: bool
    overwrites: bool
    buffered: bool
    grad_weight: Sum | None


def row_width(vocabulary: int) -> int:
    """Return a vocabulary's entries padded to whole lines."""
    return -(-vocabulary // ROW_ELEMENTS) * ROW_ELEMENTS


class Plan(NamedTuple):
    """Tokens of one GEMM: chunk for the one that computes logits, window for those from the
    gradients of logits.
    """

    chunk: int
    window: int


def plan(
    tokens: int,
    heads: Sequence[SummingHead],
    chunk_size: int | None,
    taking_part: Sequence[SummingHead] | None = None,
) -> Plan:
    """Plan from the shapes, the types and a fixed bound on memory.

    heads: those of forward; taking_part: those of backward. The chunk is that of forward even if a
    head has no gradient, so that recomputed logits have the same bits. One window takes all tokens
    if their gradients overwrite kept logits, or if its peak memory is no more than that of smaller
    windows plus a float32 accumulator.
    """
    vocabulary, device = heads[0].weight.shape[0], heads[0].hidden.device.type
    workspace = WORKSPACE.get(device, WORKSPACE_ON_A_GPU)
    entry_bytes = chunks = gradients = waiting = 0
    for head in heads:
        entry_bytes += head.logits_dtype.itemsize
    taking_part = heads if taking_part is None else taking_part
    for head in taking_part:
        if head.buffered:
            chunks += vocabulary * head.logits_dtype.itemsize
        if head.learns and not head.overwrites:
            waiting += 1
            gradients += vocabulary * head.hidden.dtype.itemsize
    # Every GEMM into a weight's sum reads and writes the whole sum: prefer few large ones.
    sums = weight_sums(taking_part)
    if chunk_size is not None:
        chunk = max(1, min(chunk_size, LARGEST_CHUNK, tokens))
        return Plan(chunk, max(chunk, min(chunk_size, tokens) // chunk * chunk) if sums else chunk)
    # Half of the workspace is for chunks of logits; with a weight's sum, the window takes the rest.
    chunk = min(workspace // 2 // (vocabulary * entry_bytes), LARGEST_CHUNK)
    chunk = _cut(tokens, chunk // TILE * TILE or max(1, chunk), TILE)
    if not waiting:
        return Plan(chunk, max(chunk, tokens))
    if not sums:
        return Plan(chunk, chunk)
    chunks *= chunk
    extra = sum([weight.extra_bytes for weight in sums])
    window = (max(workspace, extra // 2) - chunks) // gradients
    window = _cut(tokens, max(chunk, window // chunk * chunk), chunk)
    if not all([heads_of == 1 and weight.spared_bytes for weight, heads_of in sums.items()]):
        return Plan(chunk, window)
    # Several windows: each sum is rounded after the last. One: its GEMMs' results lie beside it.
    returned = [weight.returned_bytes for weight in sums]
    several = extra + max(window * gradients + chunks, *returned)
    one = tokens * gradients + max(chunks, sum(returned))
    return Plan(chunk, max(tokens, window) if one <= several else window)


def weight_sums(heads: Sequence[SummingHead]) -> dict[Sum, int]:
    """Return the sums for weights, with the number of heads that add to each."""
    sums: dict[Sum, int] = {}
    for head in heads:
        if head.grad_weight is not None:
            sums[head.grad_weight] = sums.get(head.grad_weight, 0) + 1
    return sums


def _cut(tokens: int, largest: int, unit: int) -> int:
    """Return the length of the fewest pieces of at most `largest` tokens, nearly equal in whole
    units, so that no small piece is left at the end.
    """
    if tokens <= largest:
        return max(1, tokens)
    even = -(-tokens // -(-tokens // largest))
    return min(largest, -(-even // unit) * unit)
