"""Files to tokens in the store, and documents to windows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .settings import CompareError
from .store import Document, Store

# Characters tokenized at once. Tokenizers see no further: a longer document is cut where a line begins with a word, where theirs cut, too.
PIECE = 1 << 18
_CUTS = (re.compile(r"\n(?=\S)"), re.compile(r"\S(?=\s)"))


def pieces(path: Path) -> Iterator[str]:
    """The text of a file, in pieces of at most about PIECE characters; line ends stay as they are."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rest = ""
            while read := file.read(PIECE):
                rest += read
                while len(rest) > PIECE:
                    cut = _cut(rest[:PIECE + 1])
                    yield rest[:cut]
                    rest = rest[cut:]
            if rest:
                yield rest
    except UnicodeDecodeError as error:
        raise CompareError("--text", "UTF-8 text", f"byte 0x{error.object[error.start]:02x} in {str(path)!r}", "convert the file") from None
    except OSError as error:
        raise CompareError("--text", "a file that can be read", f"{str(path)!r} ({error.strerror})", "check the name") from None


def _cut(text: str) -> int:
    """The last good place for a cut, before the last character."""
    for pattern in _CUTS:
        found = [match.end() for match in pattern.finditer(text)]
        if found:
            return found[-1]
    return len(text) - 1


class TextTokenizer:
    """One tokenizer as this tool needs it: ids, the text and line of each token, and the special tokens that begin a text."""

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer
        alone, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        starts = [at for at in range(len(full)) if full[at:at + len(alone)] == alone]
        self.prefix: list[int] = full[:starts[0]] if alone and starts else []

    def encode(self, text: str) -> tuple[list[int], list[str], np.ndarray]:
        """(ids, the text of each, the offset where each begins); the texts put together are the text, whatever the tokenizer drops."""
        if not self._tokenizer.is_fast:  # without offsets
            ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            texts = [self._tokenizer.decode([token]) for token in ids]
            return ids, texts, np.cumsum([0, *map(len, texts)])[:-1]
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts, ends = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
        ends = np.maximum.accumulate(ends)
        ends[-1:] = len(text)
        texts = [text[low:high] for low, high in zip([0, *ends.tolist()], ends.tolist(), strict=False)]
        return encoded["input_ids"], texts, starts

    def label(self, token: int) -> str:
        """A token as it reads; one that is part of a character by its name in the vocabulary."""
        text = self._tokenizer.decode([token])
        return text if text and "�" not in text else str(self._tokenizer.convert_ids_to_tokens(token))


def add_document(store: Store, path: Path, name: str, tokenizer: TextTokenizer) -> None:
    """Tokenize one file into the store, as a document of this name."""
    start, line = store.count, 1
    store.append(tokenizer.prefix, [1] * len(tokenizer.prefix), [""] * len(tokenizer.prefix))
    for text in pieces(path):
        ids, texts, starts = tokenizer.encode(text)
        ends = np.array([at for at, character in enumerate(text) if character == "\n"], np.int64)
        store.append(ids, line + np.searchsorted(ends, starts), texts)
        line += len(ends)
    first = start + max(1, len(tokenizer.prefix))
    if store.count <= first:
        raise CompareError("--text", "at least 2 tokens in every file", f"{store.count - start} in {str(path)!r}", "leave that file out")
    store.documents.append(Document(name, start, first, store.count))


@dataclass(frozen=True)
class Window:
    """The models read tokens start … last - 2; that gives the distributions of the tokens first … last - 1."""

    start: int
    first: int
    last: int


def windows(document: Document, context: int, stride: int) -> Iterator[Window]:
    """Windows of at most `context` tokens, each beginning with the last `stride` of the one before; every token is scored in exactly one."""
    start, first = document.start, document.first
    while first < document.end:
        last = min(start + context + 1, document.end)
        yield Window(start, first, last)
        start, first = last - 1 - stride, last
