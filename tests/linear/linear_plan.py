"""The library's own plan of chunks: the only place of the tests that knows its names."""

from __future__ import annotations

import pytest
import torch

from fastkl import _heads
from fastkl.ops import chunks, gemm, linear_sum_op, lm_head, row_blocks

LARGEST_KEPT = _heads.LARGEST_KEPT


def tuned(monkeypatch: pytest.MonkeyPatch, **values: int) -> None:
    """Set bounds on memory and sizes of blocks for one test."""
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


def head_on_meta(
    n: int, h: int, v: int, *, trainable: bool, logits_dtype: torch.dtype = torch.bfloat16
) -> lm_head.ChunkedHead:
    """Make a bfloat16 head of any size, which takes no memory."""
    hidden, weight = (torch.empty(rows, h, dtype=torch.bfloat16, device="meta") for rows in (n, v))
    head = lm_head.ChunkedHead(hidden, weight, None, logits_dtype)
    if trainable:
        head.grad_hidden = torch.empty_like(hidden)
        head.grad_weight, head.learns = chunks.Sum(weight), True
    head.settle(reads_again=False)
    return head


def heads_on_meta(n: int, h: int, v: int, trainable: tuple[bool, bool], **options) -> list:
    """Make the policy's head and the reference's."""
    return [head_on_meta(n, h, v, trainable=learns, **options) for learns in trainable]


def planned(heads: list[lm_head.ChunkedHead], chunk_size: int | None = None, *rest) -> chunks.Plan:
    """Return (chunk, window) for two heads."""
    return chunks.plan(heads[0].hidden.shape[0], heads, chunk_size, *rest)


def workspace(
    policy: lm_head.ChunkedHead, ref: lm_head.ChunkedHead, chunk_size: int | None = None
) -> int:
    """Compute linear_token_stats' docstring's formula. Rows are padded to whole lines."""
    chosen = planned([policy, ref], chunk_size)
    vocabulary, total = chunks.row_width(policy.weight.shape[0]), 0
    for head in (policy, ref):
        if head.learns:
            total += chosen.window * vocabulary * head.hidden.dtype.itemsize
        if not head.learns or head.logits_dtype != head.hidden.dtype:
            total += chosen.chunk * vocabulary * head.logits_dtype.itemsize
        if head.grad_weight is not None:
            one_product = chosen.window >= head.hidden.shape[0]
            spared = head.grad_weight.spared_bytes if one_product else 0
            total += head.grad_weight.extra_bytes - spared
    return total
