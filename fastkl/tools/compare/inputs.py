"""Texts to tokens: the documents of the files that --text names, and the tokenizers' ids."""

import itertools
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ..errors import UseError, expect, told
from ..files import STDIN

SHAPES = '{"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}'

# ---- documents


def documents(path: Path, tokenizer: Any) -> Iterator[tuple[str, str, bool]]:
    """Yield (suffix of its name, text, written by a chat template) of each document.

    A document is a whole file, or a line of a .jsonl file.
    """
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
    """A tokenizer's ids, the text of each token, and the special tokens that begin a text."""

    def __init__(self, tokenizer: Any) -> None:
        self.own, self.ids = tokenizer, tokenizer.get_vocab()
        alone, full = self.encode("a")[0], tokenizer("a")["input_ids"]
        starts = [at for at in range(len(full)) if full[at : at + len(alone)] == alone]
        self.prefix: list[int] = full[: starts[0]] if alone and starts else []

    def encode(
        self, text: str, before: Sequence[int] = ()
    ) -> tuple[list[int], list[str], list[int]]:
        """Return (ids, the text of each, the offset where each begins).

        The texts put together are the whole, whatever the tokenizer drops; of tokens that share a
        character the first has it. before: ids in front, which have no text.
        """
        options = dict(add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        encoded = self.own(text, **options)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        ends = [*itertools.accumulate((end for _, end in offsets[:-1]), max), len(text)]
        texts = [text[low:high] for low, high in itertools.pairwise([0, *ends[: len(ids)]])]
        starts = [0] * len(before) + [start for start, _ in offsets]
        return [*before, *ids], [""] * len(before) + texts, starts

    def label(self, token: int) -> str:
        """Return a token as it reads; a part of a character as the tokenizer spells it."""
        text = self.own.decode([token])
        return str(self.own.convert_ids_to_tokens(token) if "�" in text or not text else text)


class Vocabulary(NamedTuple):
    """The tokens that are compared: the first `size` ids without `unshared`.

    alone: for each letter the ids and names of tokens that the other model lacks or has elsewhere.
    """

    size: int
    unshared: frozenset[int]
    alone: dict[str, list[tuple[int, str]]]


def shared_vocabulary(
    tokenizers: dict[str, TextTokenizer], rows: dict[str, int | None]
) -> Vocabulary:
    """Choose the tokens with the same id in both tokenizers; one alone is taken for both models.

    rows: of each lm_head. Tokens of a lone tokenizer for which the other lm_head has no rows are
    left out. Raises UseError where a token that was not added to both tokenizers has two ids.
    """
    ids = {letter: tokenizer.ids for letter, tokenizer in tokenizers.items()}
    for letter in {*"AB"} - {*ids}:
        (lone,), most = ids.values(), rows[letter] or math.inf
        ids[letter] = {token: number for token, number in lone.items() if number < most}
    a, b = ids["A"], ids["B"]
    added = [set(tokenizer.own.get_added_vocab()) for tokenizer in tokenizers.values()]
    fixed = (a.keys() & b.keys()) - set.intersection(*added)
    different = sorted(token for token in fixed if a[token] != b[token])
    both = a.items() & b.items()
    if different or not both:
        raise _another(f"another; tokens with other ids: {different or 'all'}")
    alone = {each: sorted((at, token) for token, at in ids[each].items() - both) for each in "AB"}
    size = max(number for _, number in both) + 1
    unshared = {number for tokens in alone.values() for number, _ in tokens if number < size}
    return Vocabulary(size, frozenset(unshared), alone)


def _another(got: str) -> UseError:
    return UseError(
        "MODEL_B",
        "the tokenizer of MODEL_A",
        got[:200],
        "compare models whose tokenizer.json and tokenizer_config.json agree, or, where B was "
        "trained on A's tokens, choose --tokenizer A",
    )


def read_document(
    name: str,
    text: str,
    chat: bool,
    tokenizers: dict[str, TextTokenizer],
    vocabulary: Vocabulary,
) -> pd.DataFrame:
    """Return a table with a row for each token of a document, special ones in front included.

    Columns: document, its name; id; line, from 1; text, which put together are the document;
    scored, False for tokens without a value. An error where the tokenizers differ on it, or a model
    lacks one of its tokens.
    """
    # A chat template writes the special tokens, or none.
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
                "text in tokens that both models have",
                f"{label!r} in {name!r}, the token {foreign[0]} of {letter} alone",
                f"leave it out of the text, or read it with --tokenizer {other}",
            )
    ids, texts, starts = next(iter(encoded.values()))
    first = next(iter(tokenizers.values()))
    for pair in itertools.zip_longest(*(ids for ids, _, _ in encoded.values())):
        if pair[0] != pair[-1]:
            in_a, in_b = ("nothing" if token is None else first.label(token) for token in pair)
            raise _another(f"other tokens for the same text: {in_a!r} of {name!r} is {in_b!r} in B")
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
    paths: Iterable[Path],
    tokenizers: dict[str, TextTokenizer],
    vocabulary: Vocabulary,
) -> tuple[list[pd.DataFrame], list[Path]]:
    """Return the documents with a token to score, and the files without one."""
    tokenizer, found, skipped = next(iter(tokenizers.values())), [], []
    base = os.path.commonpath([p.absolute().parent for p in paths if p != STDIN] or [Path()])
    for path in paths:
        name = "-" if path == STDIN else readable(os.path.relpath(path, base))
        made = [
            read_document(name + suffix, text, chat, tokenizers, vocabulary)
            for suffix, text, chat in documents(path, tokenizer.own)
        ]
        kept = [document for document in made if document["scored"].any()]
        found += kept
        skipped += [] if kept else [path]
    expect(
        found,
        "--text",
        "files with text",
        f"fewer than 2 tokens in {' and in '.join(repr(str(path)) for path in skipped)}",
        "check the names",
    )
    return found, skipped


def readable(name: str | os.PathLike[str]) -> str:
    """Make text to print of a file's name, whose bytes need not be UTF-8."""
    return os.fsencode(name).decode(errors="replace")
