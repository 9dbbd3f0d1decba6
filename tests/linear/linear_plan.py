"""The library's own plan of chunks: the only place of the tests that knows its names."""

import pytest
import torch

from fastkl import _heads
from fastkl.ops import chunks, gemm, linear_sum_op, lm_head, row_blocks

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
) -> list[lm_head.ChunkedHead]:
    """Make the policy's bfloat16 head and the reference's of any size, which take no memory."""
    made = []
    for learns in trainable:
        hidden, weight = (torch.empty(k, h, dtype=torch.bfloat16, device="meta") for k in (n, v))
        head = lm_head.ChunkedHead(hidden, weight, None, logits_dtype)
        if learns:
            head.grad_hidden = torch.empty_like(hidden)
            head.grad_weight, head.learns = chunks.Sum(weight), True
        head.settle(reads_again=False)
        made.append(head)
    return made


def planned(heads: list[lm_head.ChunkedHead], chunk_size: int | None = None, *rest) -> chunks.Plan:
    return chunks.plan(heads[0].hidden.shape[0], heads, chunk_size, *rest)


def workspace(heads: list[lm_head.ChunkedHead]) -> int:
    """Compute linear_token_stats' docstring's formula. Rows are padded to whole lines."""
    chosen, total = planned(heads), 0
    vocabulary = chunks.row_width(heads[0].weight.shape[0])
    for head in heads:
        if head.learns:
            total += chosen.window * vocabulary * head.hidden.dtype.itemsize
        if not head.learns or head.logits_dtype != head.hidden.dtype:
            total += chosen.chunk * vocabulary * head.logits_dtype.itemsize
        if head.grad_weight is not None:
            one_product = chosen.window >= head.hidden.shape[0]
            spared = head.grad_weight.spared_bytes if one_product else 0
            total += head.grad_weight.extra_bytes - spared
    return total
