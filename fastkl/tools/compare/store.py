"""Tokens, their text and their values on disk, in a folder of its own: what is in memory at a time is one block, however long the text."""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

TOKEN = np.dtype([("id", "<i4"), ("line", "<i4"), ("text_at", "<i8")])
# What is measured of each token: of the two distributions before it, A's and B's, in nats. A token without a context has scored = 0.
VALUES = np.dtype([("scored", "<i4"), *((name, "<f4") for name in ("kl_ab", "kl_ba", "jsd", "entropy_a", "entropy_b", "logprob_a", "logprob_b",
                                                                 "top_logprob_a", "top_logprob_b")), ("top_a", "<i4"), ("top_b", "<i4")])
BLOCK = 1 << 14
HALF = 1 << 16


@dataclass(frozen=True)
class Document:
    """One file: its tokens are start … end - 1, special ones in front included; the first that has a value is `first`."""

    name: str
    start: int
    first: int
    end: int


class Store:
    """Three files that grow together: tokens, their text, their values."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.documents: list[Document] = []
        self.count = self._text_bytes = 0
        self._tokens, self._text, self._values = (open(folder / name, "w+b") for name in ("tokens", "text", "values"))

    def close(self) -> None:
        """Close the files; whoever made the folder removes it."""
        for file in (self._tokens, self._text, self._values):
            file.close()

    @property
    def scored(self) -> int:
        """How many tokens have values once all windows are through."""
        return sum(document.end - document.first for document in self.documents)

    def append(self, ids: Sequence[int], lines: Sequence[int], texts: Sequence[str]) -> None:
        """Add tokens; texts put together are the document."""
        encoded = [text.encode() for text in texts]
        rows = np.empty(len(encoded), TOKEN)
        rows["id"], rows["line"] = ids, lines
        ends = self._text_bytes + np.cumsum([len(text) for text in encoded], dtype=np.int64)
        rows["text_at"][:1], rows["text_at"][1:] = self._text_bytes, ends[:-1]
        self._tokens.write(rows.tobytes())
        self._text.write(b"".join(encoded))
        self.count += len(rows)
        self._text_bytes = int(ends[-1]) if len(rows) else self._text_bytes

    def tokens(self, start: int, end: int) -> np.ndarray:
        """Rows of TOKEN."""
        return _read(self._tokens, TOKEN, start, end)

    def texts(self, start: int, end: int) -> list[str]:
        """The text of each token."""
        at = self.tokens(start, min(end + 1, self.count))["text_at"].tolist()
        at += [self._text_bytes] * (end - start + 1 - len(at))
        self._text.seek(at[0])
        content = self._text.read(at[-1] - at[0])
        return [content[low - at[0]:high - at[0]].decode() for low, high in zip(at, at[1:], strict=False)]

    def write(self, first: int, values: np.ndarray) -> None:
        """The values of the tokens from `first` on; of tokens that are never written, scored stays 0."""
        self._values.truncate(self.count * VALUES.itemsize)
        self._values.seek(first * VALUES.itemsize)
        self._values.write(values.tobytes())

    def values(self, start: int, end: int) -> np.ndarray:
        """Rows of VALUES."""
        return _read(self._values, VALUES, start, end)

    def blocks(self, start: int = 0, end: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """(index of the first token, rows of VALUES), block after block."""
        end = self.count if end is None else end
        for low in range(start, end, BLOCK):
            yield low, self.values(low, min(low + BLOCK, end))

    def quantiles(self, name: str, fractions: Sequence[float]) -> list[float]:
        """Exact quantiles of a non-negative column: the smallest value that is not below the given share of the values.

        The bits of non-negative float32 numbers are ordered as the numbers are: one pass counts their upper halves, a second the lower halves within
        the buckets that hold a quantile. numpy calls these quantiles "inverted_cdf".
        """
        upper = np.zeros(HALF, np.int64)
        for bits in self._bits(name):
            upper += np.bincount(bits >> 16, minlength=HALF)
        below = np.cumsum(upper)
        ranks = [max(0, math.ceil(fraction * int(below[-1])) - 1) for fraction in fractions]
        buckets = np.searchsorted(below, ranks, side="right")
        lower = {int(bucket): np.zeros(HALF, np.int64) for bucket in buckets}
        for bits in self._bits(name):
            for bucket, counts in lower.items():
                counts += np.bincount(bits[bits >> 16 == bucket] & (HALF - 1), minlength=HALF)
        found = []
        for rank, bucket in zip(ranks, buckets.tolist(), strict=True):
            within = rank - int(below[bucket] - upper[bucket])
            low = int(np.searchsorted(np.cumsum(lower[bucket]), within, side="right"))
            found.append(float(np.array([bucket << 16 | low], np.uint32).view(np.float32)[0]))
        return found

    def _bits(self, name: str) -> Iterator[np.ndarray]:
        for _, values in self.blocks():
            # abs: a zero that carries a sign would be ordered as the largest number.
            yield np.abs(values[name][values["scored"] > 0]).view(np.uint32)


class HiddenFile:
    """Hidden states of one model in a file of the folder: all are written, then read memory-mapped in the same order, in the model's own type."""

    def __init__(self, folder: Path, count: int) -> None:
        self._path, self._count = folder / "hidden", count
        self._file = open(self._path, "wb")
        self._rows, self._dtype, self._mapped, self._read = 0, torch.float32, None, 0

    def append(self, hidden: torch.Tensor) -> None:
        """Add rows [n, H] of `count` in all; OSError before the first if the disk has no room for them."""
        needed = self._count * hidden.shape[1] * hidden.element_size()
        if not self._rows and needed > shutil.disk_usage(self._path.parent).free:
            raise OSError(errno.ENOSPC, f"no room for {needed / 1e9:.1f} GB of hidden states")
        self._rows, self._dtype = self._rows + hidden.shape[0], hidden.dtype
        self._file.write(hidden.contiguous().cpu().view(torch.uint8).numpy().tobytes())

    def next(self, count: int) -> torch.Tensor:
        """The next rows; the first call ends the writing."""
        if self._mapped is None:
            self._file.close()
            self._mapped = np.memmap(self._path, np.uint8, "r").reshape(self._rows, -1)
        self._read += count
        return torch.from_numpy(np.array(self._mapped[self._read - count:self._read])).view(self._dtype)


def _read(file, dtype: np.dtype, start: int, end: int) -> np.ndarray:
    file.seek(start * dtype.itemsize)
    return np.frombuffer(file.read((end - start) * dtype.itemsize), dtype)
