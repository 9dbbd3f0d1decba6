"""Texts to tokens: the documents in the --text files, and their token ids."""

import itertools
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ..errors import UseError, expect, told
from ..files import STDIN

SHAPES = '{"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}'

# ---- documents


class Document(NamedTuple):
    """A text to compare on: its file, its name, and whether a chat template produced it."""

    file: str
    name: str
    text: str
    chat: bool


def documents_of(paths: Sequence[Path], tokenizer: Any) -> list[Document]:
    """Read documents: one per file, or one per line of a .jsonl file."""
    base = os.path.commonpath([p.absolute().parent for p in paths if p != STDIN] or [Path()])
    found = []
    for path in paths:
        name = "-" if path == STDIN else readable(os.path.relpath(path, base))
        found += [
            Document(readable(path), name + suffix, text, chat)
            for suffix, text, chat in _texts(path, tokenizer)
        ]
    return found


def _texts(path: Path, tokenizer: Any) -> Iterator[tuple[str, str, bool]]:
    with told(
        "--text",
        "UTF-8 text in a file that can be read",
        repr(str(path)),
        "check the name, or convert the file",
    ):
        content = sys.stdin.buffer.read() if path == STDIN else path.read_bytes()
        text = content.decode("utf-8-sig")
    if path.suffix.lower() != ".jsonl":
        yield "", text, False
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            with told(
                "--text",
                f"lines of the form {SHAPES}",
                f"line {number} of {str(path)!r}",
                "correct it, add a chat template, or rename the file to .txt to compare its "
                "characters",
            ):
                found, chat = _entry(json.loads(line), tokenizer)
                found.encode()  # raises on a lone surrogate
            yield f"#{number}", found, chat


def _entry(fields: dict[str, Any], tokenizer: Any) -> tuple[str, bool]:
    both = fields["prompt"] + fields["completion"] if "completion" in fields else None
    texts = [each for each in (both, fields.get("text")) if each and isinstance(each, str)]
    chats = [each for each in (both, fields.get("messages")) if each and isinstance(each, list)]
    if bool(texts) == bool(chats) or any(not each["role"] for each in itertools.chain(*chats)):
        raise ValueError(
            ", ".join(f"{name} is of type {type(each).__name__}" for name, each in fields.items())
            + "; expected one of text (a str), messages (a list), prompt and completion (both the "
            "same of these), and it not empty"
        )
    if texts:
        return texts[0], False
    return tokenizer.apply_chat_template(chats[0], tools=fields.get("tools"), tokenize=False), True


# ---- tokens


class TextTokenizer:
    """A tokenizer: its ids, the text of each token, and the special tokens put before a text."""

    def __init__(self, tokenizer: Any) -> None:
        self.own, self.ids = tokenizer, tokenizer.get_vocab()
        alone, full = self.encode("a")[0], tokenizer("a")["input_ids"]
        starts = [at for at in range(len(full)) if full[at : at + len(alone)] == alone]
        self.prefix: list[int] = full[: starts[0]] if alone and starts else []

    def encode(
        self, text: str, before: Sequence[int] = ()
    ) -> tuple[list[int], list[str], list[int]]:
        """Return (ids, the text of each, the start offset of each).

        The texts concatenate to the input even if the tokenizer drops characters; a character
        shared by several tokens goes to the first. before: ids put in front, with empty text.
        """
        encoded = self.own(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        ends = [*itertools.accumulate((end for _, end in offsets[:-1]), max), len(text)]
        texts = [text[low:high] for low, high in itertools.pairwise([0, *ends[: len(ids)]])]
        starts = [0] * len(before) + [start for start, _ in offsets]
        return [*before, *ids], [""] * len(before) + texts, starts

    def label(self, token: int) -> str:
        """Return a token's text, or the tokenizer's spelling for part of a character."""
        text = self.own.decode([token])
        return str(self.own.convert_ids_to_tokens(token) if "�" in text or not text else text)


class Vocabulary(NamedTuple):
    """The compared tokens: the first `size` ids without `unshared`.

    alone: for each letter the ids and names of tokens missing from the other model, or with another
    id there.
    """

    size: int
    unshared: frozenset[int]
    alone: dict[str, list[tuple[int, str]]]


def shared_vocabulary(
    tokenizers: dict[str, TextTokenizer], rows: dict[str, int | None]
) -> Vocabulary:
    """Choose the tokens with the same id in every tokenizer; a lone tokenizer serves all models.

    rows: of each lm_head, by the model's letter. With a lone tokenizer, tokens beyond another
    lm_head's rows are left out. Raises UseError if two tokenizers give a token different ids,
    unless it is an added token of both.
    """
    ids = {letter: tokenizer.ids for letter, tokenizer in tokenizers.items()}
    first = next(iter(tokenizers.values()))
    for letter in [letter for letter in rows if letter not in ids]:
        most = rows[letter] or math.inf
        ids[letter] = {token: number for token, number in first.ids.items() if number < most}
    shared = set(first.ids.items())
    for letter, own in ids.items():
        shared &= own.items()
        tokenizer = tokenizers.get(letter, first)
        added = first.own.get_added_vocab().keys() & tokenizer.own.get_added_vocab()
        fixed = (first.ids.keys() & own.keys()) - added
        different = sorted(token for token in fixed if first.ids[token] != own[token])
        if different or not shared:
            raise _another(letter, f"another; tokens with other ids: {different or 'all'}")
    alone = {
        letter: sorted((at, token) for token, at in ids[letter].items() - shared)
        for letter in sorted(ids)
    }
    size = max(number for _, number in shared) + 1
    unshared = {number for tokens in alone.values() for number, _ in tokens if number < size}
    return Vocabulary(size, frozenset(unshared), alone)


def _another(letter: str, got: str) -> UseError:
    return UseError(
        f"MODEL_{letter}",
        "the tokenizer of MODEL_A",
        got[:200],
        "compare models whose tokenizer.json and tokenizer_config.json agree, or, where "
        f"{letter} was trained on A's tokens, choose --tokenizer A",
    )


def read_document(
    document: Document, tokenizers: dict[str, TextTokenizer], vocabulary: Vocabulary
) -> pd.DataFrame:
    """Return a table with a row for each token of a document, including leading special tokens.

    Columns: document, its name; id; line, from 1; text, which concatenates to the document; scored,
    False for tokens that no window can score. Raises UseError if the tokenizers disagree on the
    document, or a model lacks one of its tokens.
    """
    _, name, text, chat = document
    # A chat template adds its own special tokens, if any.
    encoded = {
        letter: tokenizer.encode(text, [] if chat else tokenizer.prefix)
        for letter, tokenizer in tokenizers.items()
    }
    for letter, (ids, _, _) in encoded.items():
        foreign = [at for at in ids if at >= vocabulary.size or at in vocabulary.unshared]
        if foreign:
            label, other = tokenizers[letter].label(foreign[0]), "B" if letter == "A" else "A"
            raise UseError(
                "--text",
                "text in tokens that all models have",
                f"{label!r} in {name!r}, the token {foreign[0]} of {letter} alone",
                f"leave it out of the text, or read it with --tokenizer {other}",
            )
    ids, texts, starts = next(iter(encoded.values()))
    first = next(iter(tokenizers.values()))
    for letter, (others, _, _) in encoded.items():
        for pair in itertools.zip_longest(ids, others):
            if pair[0] != pair[1]:
                own, other = ("nothing" if token is None else first.label(token) for token in pair)
                raise _another(
                    letter,
                    f"other tokens for the same text: {own!r} of {name!r} is {other!r} there",
                )
    newlines = [at for at, character in enumerate(text) if character == "\n"]
    specials = len(first.prefix) if ids[: len(first.prefix)] == first.prefix else 0
    return pd.DataFrame(
        {
            "document": name,
            "id": ids,
            "line": 1 + np.searchsorted(newlines, starts),
            "text": texts,
            "scored": np.arange(len(ids)) >= max(1, specials),
        }
    )


def read(
    files: Sequence[str],
    documents: Sequence[Document],
    tokenizers: dict[str, TextTokenizer],
    vocabulary: Vocabulary,
) -> tuple[list[pd.DataFrame], list[str]]:
    """Return the tables of the documents with a token to score, and the files without one."""
    tables = [read_document(each, tokenizers, vocabulary) for each in documents]
    kept = [bool(table["scored"].any()) for table in tables]
    skipped = [
        file for file in files if file not in {d.file for d in itertools.compress(documents, kept)}
    ]
    expect(
        any(kept),
        "--text",
        "files with text",
        f"fewer than 2 tokens in {' and in '.join(map(repr, skipped))}",
        "check the names",
    )
    return list(itertools.compress(tables, kept)), skipped


def readable(name: str | os.PathLike[str]) -> str:
    """Make a file name printable; its bytes need not be UTF-8."""
    return os.fsencode(name).decode(errors="backslashreplace")
