"""Files to tokens in the store, and documents to windows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .settings import CompareError
from .store import Document, Store, shown

# Characters tokenized at once. Tokenizers see no further: a longer document is cut where a line begins with a word, where theirs cut, too.
PIECE = 1 << 18
_CUTS = (re.compile(r"\n(?=\S)"), re.compile(r"\S(?=\s)"))

# How byte-level BPE spells bytes: those that print as themselves, the others in their order from U+0100 on.
_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES = {chr(byte): byte for byte in _PRINTED} | {chr(0x100 + at): byte for at, byte in enumerate(sorted({*range(256)} - {*_PRINTED}))}


def pieces(path: Path) -> Iterator[str]:
    """The text of a file, read once, in pieces of at most about PIECE characters; line ends stay as they are, a byte-order mark goes."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
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
        if ends := [match.end() for match in pattern.finditer(text)]:
            return ends[-1]
    return len(text) - 1


class TextTokenizer:
    """One tokenizer as this tool needs it: ids, the text and line of each token, and the special tokens that begin a text."""

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer
        self.ids: dict[str, int] = tokenizer.get_vocab()
        alone, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        starts = [at for at in range(len(full)) if full[at:at + len(alone)] == alone]
        self.prefix: list[int] = full[:starts[0]] if alone and starts else []

    def encode(self, text: str) -> tuple[list[int], list[bytes], np.ndarray]:
        """(ids, the UTF-8 of each, the offset where each begins); the bytes put together are the text, whatever the tokenizer drops."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, (starts, ends) = encoded["input_ids"], np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
        ends = np.maximum.accumulate(ends)
        ends[-1:] = len(text)
        texts = [text[low:high].encode() for low, high in zip([0, *ends.tolist()], ends.tolist(), strict=False)]
        # Tokens that share a character have their own bytes of it each; where a normalizer changed it, so that they do not add up, the first has it.
        bounds = np.flatnonzero(np.concatenate([[True], starts[1:] >= ends[:-1], [True]])).tolist()
        for first, last in zip(bounds, bounds[1:], strict=False):
            if last - first > 1:
                own = [self._bytes(token) for token in ids[first:last]]
                texts[first:last] = own if b"".join(own) == b"".join(texts[first:last]) else texts[first:last]
        return ids, texts, starts

    def label(self, token: int) -> str:
        """A token as it reads, with <0xE7> for a byte that is part of a character."""
        text = self._tokenizer.decode([token])
        return text if text and "�" not in text else shown(self._bytes(token))

    def _bytes(self, token: int) -> bytes:
        """What it stands for: its name in the vocabulary, if that does not spell bytes."""
        name = str(self._tokenizer.convert_ids_to_tokens(token))
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", name):
            return bytes.fromhex(byte[1])
        return bytes(BYTES[character] for character in name) if BYTES.keys() >= set(name) else name.encode()


def check_same_ids(a: TextTokenizer, b: TextTokenizer) -> int:
    """One more than the largest token id; an error where B's tokenizer has other ids for the same tokens."""
    different = sorted({token for token, _ in a.ids.items() ^ b.ids.items()})
    if different:
        at = " and ".join(f"{tokenizer.ids.get(different[0], 'missing')} in {letter}" for tokenizer, letter in ((a, "A"), (b, "B")))
        raise _other_tokenizer(f"another; ids that differ: {len(different):,}; {different[0]!r} is {at}")
    return max(a.ids.values()) + 1


def _other_tokenizer(got: str) -> CompareError:
    return CompareError("MODEL_B", "the tokenizer of MODEL_A", got, "compare models whose tokenizer.json and tokenizer_config.json agree")


def add_document(store: Store, path: Path, name: str, a: TextTokenizer, b: TextTokenizer) -> bool:
    """Tokenize one file into the store, as a document of this name, and check that B does it alike. False: no document, with fewer than 2 tokens."""
    start, line = store.count, 1
    store.append(a.prefix, [1] * len(a.prefix), [b""] * len(a.prefix))
    for text in pieces(path):
        ids, texts, starts = a.encode(text)
        first, second = a.prefix + ids, b.prefix + b.encode(text)[0]
        if first != second:
            at = next((at for at, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), min(len(first), len(second)))
            in_a, in_b = (repr(a.label(tokens[at])) if at < len(tokens) else "nothing" for tokens in (first, second))
            raise _other_tokenizer(f"other tokens for the same text: {in_a} of {str(path)!r} is {in_b} in B")
        ends = np.array([at for at, character in enumerate(text) if character == "\n"], np.int64)
        store.append(ids, line + np.searchsorted(ends, starts), texts)
        line += len(ends)
    first = start + max(1, len(a.prefix))
    if store.count > first:
        store.documents.append(Document(name, start, first, store.count))
    return store.count > first


@dataclass(frozen=True)
class Window:
    """The models read tokens start … last - 2; that gives the distributions of the tokens first … last - 1."""

    start: int
    first: int
    last: int


def windows(document: Document, context: int, overlap: int) -> Iterator[Window]:
    """Windows of at most `context` tokens, each beginning with the last `overlap` of the one before; every token is scored in exactly one."""
    start, first = document.start, document.first
    while first < document.end:
        last = min(start + context + 1, document.end)
        yield Window(start, first, last)
        start, first = last - 1 - overlap, last
