"""One model's lm_head over chunks of tokens: tokens per GEMM, buffers, and gradient sums."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch

from . import gemm
from .fields import result_dtype

# Tokens per GEMM: enough to fill a GPU's tiles, few enough that two buffers are small compared with
# a weight.
LARGEST_CHUNK = 1024
# Default bound on the bytes of logits buffers. Not derived from free memory: results would depend
# on it.
WORKSPACE = {"cpu": 1 << 27}
WORKSPACE_ON_A_GPU = 1 << 30
# Row strides are multiples of 128 bytes for any V, so that GEMMs and row kernels read aligned rows.
ROW_ELEMENTS = 64
# A sum of fewer bytes stays in float32: cuBLAS may use split-K for so small a result, and add the
# partial sums in 16 bits.
SMALL_SUM = 1 << 26
# Chunks are multiples of a GEMM tile.
TILE = 128


class Sum:
    """A gradient summed over tokens, in float32 (float64 for float64); total: None before the first
    summand. heads: for a weight, the number of heads that add to it.
    """

    def __init__(self, like: torch.Tensor) -> None:
        self.like, self.dtype, self.heads = like, result_dtype(like), 0
        self.total: torch.Tensor | None = None

    @property
    def extra_bytes(self) -> int:
        """Bytes of a sum in a wider dtype than the gradient's; the op does not return this sum."""
        return 0 if self.dtype == self.like.dtype else self.like.numel() * self.dtype.itemsize

    @property
    def spared_bytes(self) -> int:
        """Bytes saved when one GEMM over all tokens writes the gradient in its own dtype and no
        float32 accumulator is needed.

        float16 gradients are returned in float32 and scaled later; SMALL_SUM excludes small sums.
        """
        spares = self.like.dtype == torch.bfloat16 and self.extra_bytes >= SMALL_SUM
        return self.extra_bytes if spares and self.heads == 1 else 0

    def add(self, product: Callable[..., None], *operands: torch.Tensor) -> None:
        """Call product(total, *operands, first), which adds to total, or fills it if `first`."""
        first = self.total is None
        if self.total is None:
            self.total = torch.empty(self.like.shape, dtype=self.dtype, device=self.like.device)
        product(self.total, *operands, first=first)


class ChunkedHead:
    """One model's lm_head over the tokens computed, with its buffers and gradient sums, None if not
    requested.

    hidden [N, H], weight [V, H], bias [V] or None; grad_hidden is [N, H] in hidden's dtype; two
    heads that share a weight share its gradient sum.
    """

    trains = True

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        logits_dtype: torch.dtype,
    ) -> None:
        self.hidden, self.weight, self.bias, self.logits_dtype = hidden, weight, bias, logits_dtype
        # Memory [N, V] for all logits; whether it is filled already, and whether gradients may
        # overwrite it.
        self.kept: torch.Tensor | None = None
        self.filled = self.free = False
        self.grad_hidden: torch.Tensor | None = None
        self.grad_weight: Sum | None = None
        self.grad_bias: Sum | None = None
        # Whether a gradient is requested, and whether it overwrites kept logits.
        self.learns = self.overwrites = False
        # Whether a chunk's logits have a separate buffer; otherwise their gradients overwrite them.
        self.buffered = self.trains
        # Separate buffers for logits, in turn; buffer for a window's gradients of logits; those
        # gradients; the window's first token.
        self.logits: Iterator[torch.Tensor] | None = None
        self._window: torch.Tensor | None = None
        self._grads: torch.Tensor | None = None
        self._start = 0

    def keep(self, memory: torch.Tensor, filled: bool, free: bool = False) -> None:
        """Use memory [..., at least V] for logits; those of the tokens computed come first."""
        # A saved-tensor hook may return a non-contiguous tensor. `.data` hides overwriting in
        # backward from autograd (linear_op records it).
        rows, vocabulary = memory.data.contiguous().view(-1, memory.shape[-1]), len(self.weight)
        self.kept, self.filled, self.free = rows[: len(self.hidden), :vocabulary], filled, free
        if not filled:
            # Zero the entries that no GEMM writes, so that equal calls return equal bits.
            rows[:, vocabulary:].zero_()
            rows[len(self.hidden) :].zero_()
            self.buffered = False

    def settle(self, reads_again: bool) -> None:
        """Decide which buffers logits and gradients use.

        reads_again: backward re-reads a fallback row after it may have written part of its
        gradient.
        """
        same_type = self.logits_dtype == self.hidden.dtype
        self.overwrites = self.learns and self.free and same_type
        self.buffered = self.trains and (
            not (self.learns and same_type and not reads_again)
            if self.kept is None
            else self.overwrites and reads_again
        )

    def allocate(self, chunk: int, window: int, copies: int) -> None:
        """Allocate the buffers; copies: of that for a chunk's logits."""
        if self.learns and not self.overwrites:
            self._window = self._buffer(window, self.hidden.dtype)
        if self.buffered:
            buffers = self._buffer(chunk * copies, self.logits_dtype)
            self.logits = itertools.cycle(buffers.split(chunk))

    def _buffer(self, tokens: int, dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialised [tokens, V], a view of padded rows."""
        return padded_rows((tokens,), len(self.weight), self.hidden, dtype)[:, : len(self.weight)]

    def open(self, window: slice, mask: torch.Tensor | None) -> None:
        """Begin a window: tokens whose gradients of logits are kept until one GEMM."""
        self._start, self._states = window.start, self.hidden[window]
        if mask is not None:
            # Zero masked states: 0·NaN in a GEMM would spread.
            self._states = torch.where(mask[window][:, None], self._states, 0)
        if self.overwrites and self.kept is not None:
            self._grads = self.kept[window]
        elif self._window is not None:
            self._grads = self._window[: window.stop - window.start]

    def logits_and_gradient(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the logits of a chunk of the window, and the memory for their gradients."""
        in_window = slice(rows.start - self._start, rows.stop - self._start)
        grads = None if self._grads is None else self._grads[in_window]
        logits = grads if self.kept is None else self.kept[rows]
        if self.logits is not None:
            buffer = next(self.logits)[: rows.stop - rows.start]
            logits = buffer if logits is None or not self.filled else buffer.copy_(logits)
        assert logits is not None
        if not self.filled:
            gemm.logits_into(logits, self._states[in_window], self.weight, self.bias)
        return logits, grads

    def close(self, window: slice) -> None:
        """Add the window's part of the gradients: a GEMM each for hidden states and weight."""
        grads, states, self._states = self._grads, self._states, self.hidden
        if grads is None:
            return
        if self.grad_hidden is not None:
            torch.mm(grads, self.weight, out=self.grad_hidden[window])
        if self.grad_weight is not None:
            self.grad_weight.add(gemm.add_weight_gradient, grads, states)
        if self.grad_bias is not None:
            self.grad_bias.add(gemm.add_bias_gradient, grads)


class GivenLogits(ChunkedHead):
    """Logits [..., V] in place of a model, without gradient; index: the rows computed, None: all.

    weight: the other model's, for the vocabulary's size.
    """

    trains = False

    def __init__(
        self, logits: torch.Tensor, weight: torch.Tensor, index: torch.Tensor | None
    ) -> None:
        self._rows, self._index = logits.reshape(-1, logits.shape[-1]), index
        tokens = self._rows if index is None else index
        super().__init__(weight.new_empty(len(tokens), 0), weight, None, logits.dtype)

    def logits_and_gradient(self, rows: slice) -> tuple[torch.Tensor, None]:
        """Return the logits of a chunk, and None."""
        return self._rows[rows if self._index is None else self._index[rows]], None


def padded_rows(
    leading: Sequence[int], vocabulary: int, like: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return rows [*leading, V padded to a multiple of 64] on the device of `like`: V entries
    uninitialised, the padding 0.
    """
    rows = like.new_empty((*leading, -(-vocabulary // ROW_ELEMENTS) * ROW_ELEMENTS), dtype=dtype)
    # oneDNN's AMX GEMMs multiply 16-bit rows up to a multiple of 32 entries: 0·NaN would be NaN.
    rows[..., vocabulary:] = 0
    return rows


def plan(
    heads: Sequence[ChunkedHead],
    chunk_size: int | None,
    taking_part: Sequence[ChunkedHead],
    width: int = 0,
) -> tuple[int, int]:
    """Return (chunk, window): the tokens of a GEMM that computes logits, and of a GEMM on gradients
    of logits, from the shapes, the dtypes and a fixed bound on memory.

    heads: those of forward; taking_part: those of backward. The chunk is that of forward even if a
    head needs no gradient, so that recomputed logits have the same bits. One window takes all
    tokens if their gradients overwrite kept logits, or if its peak memory is no more than that of
    smaller windows plus a float32 accumulator. width: of every shard except the last, so that all
    ranks use the same chunks, of which two coexist.
    """
    (tokens, _), vocabulary = heads[0].hidden.shape, width or len(heads[0].weight)
    workspace = WORKSPACE.get(heads[0].hidden.device.type, WORKSPACE_ON_A_GPU)
    # Each GEMM into a weight's sum reads and writes the whole sum, so prefer few large GEMMs.
    sums = {head.grad_weight for head in taking_part if head.grad_weight is not None}
    if chunk_size is not None:
        chunk = max(1, min(chunk_size, LARGEST_CHUNK, tokens))
        return chunk, max(chunk, min(chunk_size, tokens) // chunk * chunk) if sums else chunk
    # Chunks of logits get half of the workspace; with a weight's sum, the window gets the rest.
    row_bytes = vocabulary * heads[0].logits_dtype.itemsize * (2 if width else 1)
    chunk = min(workspace // 2 // (row_bytes * len(heads)), LARGEST_CHUNK)
    chunk = _cut(tokens, chunk // TILE * TILE or max(1, chunk), TILE)
    waiting = [head for head in taking_part if head.learns and not head.overwrites]
    # One chunk per window, unless a weight's sum wants large GEMMs or a chunk's gather overlaps the
    # next chunk's GEMM.
    if not (waiting and (sums or width)):
        return chunk, chunk if waiting else max(chunk, tokens)
    gradients = vocabulary * sum([head.hidden.dtype.itemsize for head in waiting])
    chunks = chunk * row_bytes * sum([head.buffered for head in taking_part])
    extra = sum([each.extra_bytes for each in sums])
    window = (max(workspace, extra // 2) - chunks) // gradients
    window = _cut(tokens, max(chunk, window // chunk * chunk), chunk)
    if not all([each.spared_bytes for each in sums]):
        return chunk, window
    # With several windows each sum is rounded after the last; with one, the GEMMs' results coexist
    # with its buffers.
    returned = [each.like.nbytes for each in sums]
    several = extra + max([window * gradients + chunks, *returned])
    one = tokens * gradients + max(chunks, sum(returned))
    return chunk, max(tokens, window) if one <= several else window


def _cut(tokens: int, largest: int, unit: int) -> int:
    """Return the length of the fewest pieces of at most `largest` tokens, nearly equal in whole
    units, so that the last piece is not small.
    """
    if tokens <= largest:
        return max(1, tokens)
    even = -(-tokens // -(-tokens // largest))
    return min(largest, -(-even // unit) * unit)
