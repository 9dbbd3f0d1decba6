"""Tokens, their text and their values on disk, in files without a name, which end with the process: in memory is one block, however long the text."""

from __future__ import annotations

import codecs
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

TOKEN = np.dtype([("id", "<i4"), ("line", "<i4"), ("text_at", "<i8")])
# What is measured of each token: of the two distributions before it, A's and B's, in nats. A token without a context has scored = 0.
VALUES = np.dtype([("scored", "<i4"), *((name, "<f4") for name in ("kl_ab", "kl_ba", "jsd", "entropy_a", "entropy_b", "logprob_a", "logprob_b",
                                                                 "top_logprob_a", "top_logprob_b")), ("top_a", "<i4"), ("top_b", "<i4")])
BLOCK = 1 << 14


@dataclass(frozen=True)
class Document:
    """One file: its tokens are start … end - 1, special ones in front included; the first that has a value is `first`."""

    name: str
    start: int
    first: int
    end: int


class Store:
    """Three temporary files that grow together: tokens, their text, their values."""

    def __init__(self) -> None:
        self.documents: list[Document] = []
        self.count = self._text_bytes = 0
        self._tokens, self._text, self._values = (tempfile.TemporaryFile() for _ in range(3))

    def close(self) -> None:
        """Close the files, and so remove them."""
        for file in (self._tokens, self._text, self._values):
            file.close()

    @property
    def scored(self) -> int:
        """How many tokens have values once all windows are through."""
        return sum(document.end - document.first for document in self.documents)

    def append(self, ids: Sequence[int], lines: Sequence[int], texts: Sequence[bytes]) -> None:
        """Add tokens; their texts, in UTF-8, put together are the document."""
        rows = np.empty(len(texts), TOKEN)
        ends = self._text_bytes + np.cumsum([len(text) for text in texts], dtype=np.int64)
        rows["id"], rows["line"], rows["text_at"] = ids, lines, [self._text_bytes, *ends[:-1]][:len(texts)]
        self._tokens.write(rows.tobytes())
        self._text.write(b"".join(texts))
        self.count, self._text_bytes = self.count + len(rows), int(ends[-1]) if len(rows) else self._text_bytes

    def tokens(self, start: int, end: int) -> np.ndarray:
        """Rows of TOKEN."""
        return _read(self._tokens, TOKEN, start, end)

    def texts(self, start: int, end: int) -> list[str]:
        """The text of each token."""
        at, content = self._content(start, end)
        return [shown(content[low - at[0]:high - at[0]]) for low, high in zip(at, at[1:], strict=False)]

    def text(self, start: int, end: int) -> str:
        """The text of the tokens together: only at its ends it can have parts of characters."""
        return shown(self._content(start, end)[1])

    def _content(self, start: int, end: int) -> tuple[list[int], bytes]:
        at = self.tokens(start, end + 1)["text_at"].tolist()
        at += [self._text_bytes] * (end - start + 1 - len(at))
        self._text.seek(at[0])
        return at, self._text.read(at[-1] - at[0])

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
        """Exact quantiles of a non-negative column, those of torch.quantile; +inf between +inf and a number.

        The column is sorted in a file that is mapped, not read: the memory is the system's cache, and given back when others need it.
        """
        with tempfile.TemporaryFile() as file:
            for _, values in self.blocks():
                file.write(np.abs(values[name][values["scored"] > 0]).tobytes())  # abs: a zero with a sign is a zero
            file.flush()
            column = np.memmap(file, np.float32, "r+")
            column.sort()
            return [_between(column, fraction * (len(column) - 1)) for fraction in fractions]


def _between(ordered: np.ndarray, rank: float) -> float:
    """Interpolate linearly at a rank from 0 on."""
    low, share = int(rank), rank % 1
    return float(ordered[low]) if share == 0 else (1 - share) * float(ordered[low]) + share * float(ordered[low + 1])


class HiddenFile:
    """Hidden states of one model in a temporary file: all are written, then, after rewind(), read in the same order, in the model's own type."""

    def __init__(self, count: int) -> None:
        self._count, self._file, self._row, self._dtype = count, tempfile.TemporaryFile(), 0, torch.float32

    def append(self, hidden: torch.Tensor) -> None:
        """Add rows [n, H] of `count` in all; OSError before the first if the disk has no room for them."""
        first, self._row, self._dtype = not self._row, hidden[0].nbytes, hidden.dtype
        if first and self._count * self._row > shutil.disk_usage(tempfile.gettempdir()).free:
            raise OSError(errno.ENOSPC, f"no room for {self._count * self._row / 1e9:.1f} GB of hidden states")
        self._file.write(hidden.contiguous().cpu().view(torch.uint8).numpy().tobytes())

    def rewind(self) -> None:
        """From here on it is read."""
        self._file.seek(0)

    def next(self, count: int) -> torch.Tensor:
        """The next rows."""
        return torch.frombuffer(bytearray(self._file.read(count * self._row)), dtype=self._dtype).view(count, -1)


def readable(name: str | os.PathLike) -> str:
    """Make text of a file's name, whose bytes need not be UTF-8, to print and to write."""
    return shown(os.fsencode(name))


def shown(content: bytes) -> str:
    """UTF-8 as text; bytes that are part of a character appear as <0xE7>."""
    return content.decode(errors="fastkl_bytes")


codecs.register_error("fastkl_bytes", lambda error: ("".join(f"<0x{byte:02X}>" for byte in error.object[error.start:error.end]), error.end))


def _read(file, dtype: np.dtype, start: int, end: int) -> np.ndarray:
    file.seek(start * dtype.itemsize)
    return np.frombuffer(file.read((end - start) * dtype.itemsize), dtype)
