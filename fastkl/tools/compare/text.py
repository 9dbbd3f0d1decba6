"""Texts to tokens in the store, and documents to windows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .inputs import Source
from .settings import CompareError
from .store import Document, Store, shown

# How byte-level BPE spells bytes: those that print as themselves, the others in their order from U+0100 on.
_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES = {chr(byte): byte for byte in _PRINTED} | {chr(0x100 + at): byte for at, byte in enumerate(sorted({*range(256)} - {*_PRINTED}))}


class TextTokenizer:
    """One tokenizer as this tool needs it: ids, the text and line of each token, and the special tokens that begin a text."""

    def __init__(self, tokenizer) -> None:
        self.own = tokenizer
        self.ids: dict[str, int] = tokenizer.get_vocab()
        alone, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        starts = [at for at in range(len(full)) if full[at:at + len(alone)] == alone]
        self.prefix: list[int] = full[:starts[0]] if alone and starts else []

    def encode(self, text: str) -> tuple[list[int], list[bytes], np.ndarray]:
        """(ids, the UTF-8 of each, the offset where each begins); the bytes put together are the text, whatever the tokenizer drops."""
        encoded = self.own(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
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
        text = self.own.decode([token])
        return text if text and "�" not in text else shown(self._bytes(token))

    def _bytes(self, token: int) -> bytes:
        """What it stands for: its name in the vocabulary, if that does not spell bytes."""
        name = str(self.own.convert_ids_to_tokens(token))
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", name):
            return bytes.fromhex(byte[1])
        return bytes(BYTES[character] for character in name) if BYTES.keys() >= set(name) else name.encode()


class Vocabulary(NamedTuple):
    """The tokens that are compared: the first `size` ids without `unshared`.

    alone: for each letter the ids and names of tokens that the other model lacks or has elsewhere.
    """

    size: int
    unshared: list[int]
    alone: dict[str, list[tuple[int, str]]]


def whole_vocabulary(letter: str, tokenizer: TextTokenizer, rows: int | None) -> Vocabulary:
    """Take one tokenizer's tokens for both models, as far as the other lm_head has rows for them."""
    size = max(tokenizer.ids.values()) + 1
    size = size if rows is None else min(size, rows)
    alone = sorted((number, token) for token, number in tokenizer.ids.items() if number >= size)
    return Vocabulary(size, [], {"A": [], "B": [], letter: alone})


def shared_vocabulary(a: TextTokenizer, b: TextTokenizer) -> Vocabulary:
    """Take the tokens with the same id in both; an error where ids differ of tokens that nobody added."""
    added = [tokenizer.own.get_added_vocab().keys() for tokenizer in (a, b)]
    moved = {token for token in a.ids.keys() & b.ids.keys() if a.ids[token] != b.ids[token]}
    different = sorted(moved - (added[0] & added[1]))
    both = a.ids.items() & b.ids.items()
    if different or not both:
        raise _other_tokenizer("one without a common token" if not different else
                               f"another; ids that differ: {len(different):,}; {different[0]!r} is "
                               f"{a.ids[different[0]]} in A and {b.ids[different[0]]} in B")
    alone = {letter: sorted((number, token) for token, number in tokenizer.ids.items() - both)
             for letter, tokenizer in (("A", a), ("B", b))}
    size = max(number for _, number in both) + 1
    return Vocabulary(size, sorted({number for tokens in alone.values() for number, _ in tokens if number < size}), alone)


def _other_tokenizer(got: str) -> CompareError:
    return CompareError("MODEL_B", "the tokenizer of MODEL_A", got, "compare models whose tokenizer.json and "
                        "tokenizer_config.json agree, or, where B was trained on A's tokens, choose --tokenizer A")


def add_document(store: Store, source: Source, name: str, tokenizers: dict[str, TextTokenizer],
                 vocabulary: Vocabulary) -> bool:
    """Tokenize a document into the store; False: it is none, with fewer than 2 tokens.

    An error where the tokenizers differ on it, or a model lacks one of its tokens.
    """
    start, line, context = store.count, 1, 0
    first = next(iter(tokenizers.values()))
    for text in source.texts:
        ids, texts, starts = first.encode(text)
        read = {letter: ids if tokenizer is first else tokenizer.encode(text)[0]
                for letter, tokenizer in tokenizers.items()}
        if store.count == start and source.chat:  # the template has written the special tokens
            context = len(first.prefix) if ids[:len(first.prefix)] == first.prefix else 0
        elif store.count == start:
            read = {letter: tokenizers[letter].prefix + found for letter, found in read.items()}
            context = len(first.prefix)
            store.append(first.prefix, [1] * context, [b""] * context)
        _check_tokens(read, tokenizers, vocabulary, name)
        ends = np.array([at for at, character in enumerate(text) if character == "\n"], np.int64)
        store.append(ids, line + np.searchsorted(ends, starts), texts)
        line += len(ends)
    scored = start + max(1, context)
    if store.count > scored:
        store.documents.append(Document(name, start, scored, store.count))
    return store.count > scored


def _check_tokens(read: dict[str, list[int]], tokenizers: dict[str, TextTokenizer],
                  vocabulary: Vocabulary, name: str) -> None:
    """Refuse tokens that one model alone has, and those on which the tokenizers differ."""
    for letter, ids in read.items():
        found = np.array(ids, np.int64)
        alone = found[(found >= vocabulary.size) | np.isin(found, vocabulary.unshared)]
        if len(alone):
            token, other = int(alone[0]), "AB"[letter == "A"]
            got = f"{tokenizers[letter].label(token)!r} in {name!r}, the token {token} of {letter} alone"
            raise CompareError("--text", "text in tokens that both models have", got,
                               f"leave it out of the text, or read it with --tokenizer {other}")
    first, *others = read.values()
    for second in others:
        if first != second:
            at = next((at for at, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]),
                      min(len(first), len(second)))
            label = next(iter(tokenizers.values())).label
            in_a, in_b = (repr(label(tokens[at])) if at < len(tokens) else "nothing" for tokens in (first, second))
            raise _other_tokenizer(f"other tokens for the same text: {in_a} of {name!r} is {in_b} in B")


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
