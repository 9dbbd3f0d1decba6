"""The library's own plan of chunks: the only place of the tests that knows its names."""

import pytest
import torch

from fastkl import _heads
from fastkl.ops import chunks, gemm, linear_sum_op, row_blocks

LARGEST_KEPT = _heads.LARGEST_KEPT


def tuned(monkeypatch: pytest.MonkeyPatch, **values: int) -> None:
    places = {
        "small_sum": (chunks, "SMALL_SUM"),
        "largest_chunk": (chunks, "LARGEST_CHUNK"),
        "tile": (chunks, "TILE"),
        "workspace": (chunks, "WORKSPACE_ON_A_GPU"),
        "block": (gemm, "BLOCK_ELEMENTS"),
        "row_block": (row_blocks, "BLOCK_ELEMENTS"),
        "scaled_at_once": (linear_sum_op, "SCALED_AT_ONCE"),
        "largest_kept": (_heads, "LARGEST_KEPT"),
    }
    for name, value in values.items():
        monkeypatch.setattr(*places[name], value)
    if "workspace" in values:
        monkeypatch.setitem(chunks.WORKSPACE, "cpu", values["workspace"])


def heads_on_meta(
    n: int, h: int, v: int, trainable: tuple[bool, bool], logits_dtype: torch.dtype = torch.bfloat16
) -> list[chunks.ChunkedHead]:
    """Make the policy's bfloat16 head and the reference's of any size, which take no memory."""
    made = []
    for learns in trainable:
        hidden, weight = (torch.empty(k, h, dtype=torch.bfloat16, device="meta") for k in (n, v))
        head = chunks.ChunkedHead(hidden, weight, None, logits_dtype)
        if learns:
            head.grad_hidden = torch.empty_like(hidden)
            head.grad_weight, head.learns = chunks.Sum(weight), True
            head.grad_weight.heads = 1
        head.settle(reads_again=False)
        made.append(head)
    return made


def planned(heads, chunk_size: int | None = None, taking_part=None) -> tuple[int, int]:
    return chunks.plan(heads, chunk_size, taking_part or heads)


def workspace(heads: list[chunks.ChunkedHead]) -> int:
    """Compute linear_token_stats' docstring's formula. Rows are padded to whole lines."""
    (chunk, window), total = planned(heads), 0
    vocabulary = chunks.row_width(heads[0].weight.shape[0])
    for head in heads:
        wide = not head.learns or head.logits_dtype != head.hidden.dtype
        total += wide * chunk * vocabulary * head.logits_dtype.itemsize
        if head.grad_weight is not None:
            total += window * vocabulary * head.hidden.dtype.itemsize
            one_product = window >= head.hidden.shape[0]
            total += head.grad_weight.extra_bytes - one_product * head.grad_weight.spared_bytes
    return total
