"""Texts to tokens: the files that --text names, their documents, and the tokenizers' ids."""

from __future__ import annotations

import glob
import itertools
import json
import math
import os
import re
import sys
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..files import check_writable
from . import STDIN, STDOUT, CompareError, told

if TYPE_CHECKING:
    from .measure import Store

SHAPES = '{"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}'


# ---- files


def files(paths: Iterable[Path]) -> tuple[Path, ...]:
    """List the files that paths, folders and patterns stand for, each group sorted by name.

    A folder stands for the files directly in it that are not hidden.
    """
    found: list[Path] = []
    for path in paths:
        # os.path returns False where pathlib raises, as for a name that is too long.
        group = [path]
        if path != STDIN and (os.path.isdir(path) or not os.path.exists(path)):
            pattern = f"{glob.escape(str(path))}/*" if os.path.isdir(path) else str(path)
            names = glob.glob(pattern, recursive=True)
            group = sorted(Path(name) for name in names if os.path.isfile(name))
        if not group:
            got = f"{str(path)!r}, which is no file, and no folder or pattern of some"
            remedy = "check the name, or pass a pattern such as 'folder/**/*.txt'"
            raise CompareError("--text", "files with text", got, remedy)
        found += group
    return tuple(found)


def check_outputs(html: Path | None, json: Path | None) -> None:
    """Refuse files that cannot be written."""
    for option, path in (("--html", html), ("--json", json)):
        if path not in (None, STDOUT):
            expected = "a file in a folder that can be written to"
            with told(option, expected, repr(str(path)), "choose another name"):
                check_writable(path)


# ---- documents


def documents(path: Path, tokenizer: Any, argument: str) -> Iterator[tuple[str, str, bool]]:
    """Yield (suffix of its name, text, written by a chat template) of each document.

    A document is a whole file, or a line of a .jsonl file. argument: the model whose tokenizer has
    the chat template, as messages name it.
    """
    remedy = "check the name, or convert the file"
    with told("--text", "UTF-8 text in a file that can be read", repr(str(path)), remedy):
        content = sys.stdin.buffer.read() if path == STDIN else path.read_bytes()
        text = content.decode("utf-8-sig")
    if path.suffix.lower() != ".jsonl":
        yield "", text, False
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"line {number} of {str(path)!r}"
            yield f"#{number}", *_entry(where, line, tokenizer, argument)


def _entry(where: str, line: str, tokenizer: Any, argument: str) -> tuple[str, bool]:
    """Return the text of a line, and whether a chat template wrote it."""
    remedy = "correct it, or rename the file to .txt to compare its characters"
    with told("--text", "a JSON object a line in a .jsonl file", where, remedy):
        fields = json.loads(line)
        json.dumps(fields, ensure_ascii=False).encode()  # no half of a character
    fields = fields if isinstance(fields, dict) else {}
    prompt: Any = fields.get("prompt")
    completion: Any = fields.get("completion")
    alike = type(prompt) is type(completion) and isinstance(prompt, (str, list))
    both = prompt + completion if alike else None
    texts = [each for each in (both, fields.get("text")) if isinstance(each, str)]
    chats = [each for each in (both, fields.get("messages")) if _is_chat(each)]
    if bool(texts) == bool(chats):
        expected = f"lines of the form {SHAPES}, with text or messages"
        got = f"the fields {list(fields)} in {where}"
        raise CompareError("--text", expected, got, remedy)
    if texts:
        return texts[0], False
    expected = f"messages that the chat template of {argument} takes"
    remedy = "correct them, or add a chat_template.jinja to the model"
    with told("--text", expected, where, remedy):
        tools = fields.get("tools")
        return tokenizer.apply_chat_template(chats[0], tools=tools, tokenize=False), True


def _is_chat(messages: object) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(each, dict) and isinstance(each.get("role"), str) for each in messages)
    )


# ---- tokens


class TextTokenizer:
    """A tokenizer's ids, the text of each token, and the special tokens that begin a text."""

    def __init__(self, tokenizer: Any) -> None:
        self.own, self.ids = tokenizer, tokenizer.get_vocab()
        self.encode("a")  # an error here for a slow tokenizer
        alone, full = (
            tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True)
        )
        starts = [at for at in range(len(full)) if full[at : at + len(alone)] == alone]
        self.prefix: list[int] = full[: starts[0]] if alone and starts else []

    def encode(self, text: str) -> tuple[list[int], list[str], list[int]]:
        """Return (ids, the text of each, the offset where each begins).

        The texts put together are the whole, whatever the tokenizer drops; of tokens that share a
        character the first has it.
        """
        encoded = self.own(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
        ends = [*itertools.accumulate(ends[:-1], max), len(text)][: len(ids)]
        texts = [text[low:high] for low, high in itertools.pairwise([0, *ends])]
        return ids, texts, starts

    def label(self, token: int) -> str:
        """Return a token as it reads, with <0xE7> for a byte that is part of a character."""
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        text: str = self.own.decode([token])
        if text and "�" not in text:
            return text
        name = str(self.own.convert_ids_to_tokens(token))
        spelling: dict[int, str] = bytes_to_unicode()
        known = {character: byte for byte, character in spelling.items()}
        spelt = known.keys() >= set(name) and not re.fullmatch("<0x[0-9A-F]{2}>", name)
        return shown(bytes(known[character] for character in name)) if spelt else name


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
    left out. An error where ids differ of tokens that nobody added.
    """
    ids = {letter: tokenizer.ids for letter, tokenizer in tokenizers.items()}
    for letter in {*"AB"} - {*ids}:
        (lone,), most = ids.values(), rows[letter] or math.inf
        ids[letter] = {token: number for token, number in lone.items() if number < most}
    a, b = ids["A"], ids["B"]
    added = [set(tokenizer.own.get_added_vocab()) for tokenizer in tokenizers.values()]
    moved = sorted(token for token in a.keys() & b.keys() if a[token] != b[token])
    if different := [token for token in moved if token not in set.intersection(*added)]:
        first = f"{different[0]!r} is {a[different[0]]} in A and {b[different[0]]} in B"
        raise _another(f"another; ids that differ: {len(different):,}; {first}")
    both = a.items() & b.items()
    if not both:
        raise _another("one without a common token")
    alone = {each: sorted((at, token) for token, at in ids[each].items() - both) for each in "AB"}
    size = max(number for _, number in both) + 1
    unshared = {number for tokens in alone.values() for number, _ in tokens if number < size}
    return Vocabulary(size, frozenset(unshared), alone)


def _another(got: str) -> CompareError:
    """Make the error of tokenizers that differ."""
    remedy = (
        "compare models whose tokenizer.json and tokenizer_config.json agree, or, where B was "
        "trained on A's tokens, choose --tokenizer A"
    )
    return CompareError("MODEL_B", "the tokenizer of MODEL_A", got, remedy)


def add_document(
    store: Store,
    name: str,
    text: str,
    chat: bool,
    tokenizers: dict[str, TextTokenizer],
    vocabulary: Vocabulary,
) -> None:
    """Tokenize a document into the store; one of fewer than 2 tokens is left out.

    An error where the tokenizers differ on it, or a model lacks one of its tokens.
    """
    first = next(iter(tokenizers.values()))
    ids, texts, starts = first.encode(text)
    read = {
        letter: ids if tokenizer is first else tokenizer.encode(text)[0]
        for letter, tokenizer in tokenizers.items()
    }
    newlines = [at for at, character in enumerate(text) if character == "\n"]
    lines = [1 + bisect_left(newlines, at) for at in starts]
    context = len(first.prefix)
    if not chat:
        read = {letter: tokenizers[letter].prefix + found for letter, found in read.items()}
        ids, lines, texts = first.prefix + ids, [1] * context + lines, [""] * context + texts
    elif ids[:context] != first.prefix:  # the template writes the special tokens, or none
        context = 0
    _check_tokens(read, tokenizers, vocabulary, name)
    store.add(name, max(1, context), ids, lines, texts)


def _check_tokens(
    read: dict[str, list[int]],
    tokenizers: dict[str, TextTokenizer],
    vocabulary: Vocabulary,
    name: str,
) -> None:
    """Refuse tokens that one model alone has, and those on which the tokenizers differ."""
    for letter, ids in read.items():
        alone = (at for at in ids if at >= vocabulary.size or at in vocabulary.unshared)
        if (token := next(alone, None)) is not None:
            label, other = tokenizers[letter].label(token), "AB"[letter == "A"]
            got = f"{label!r} in {name!r}, the token {token} of {letter} alone"
            remedy = f"leave it out of the text, or read it with --tokenizer {other}"
            raise CompareError("--text", "text in tokens that both models have", got, remedy)
    label_of = next(iter(tokenizers.values())).label
    for pair in itertools.zip_longest(*read.values()):
        if pair[0] != pair[-1]:
            in_a, in_b = ("nothing" if token is None else repr(label_of(token)) for token in pair)
            raise _another(f"other tokens for the same text: {in_a} of {name!r} is {in_b} in B")


def shown(content: bytes) -> str:
    """Decode UTF-8; a byte that is part of a character reads <0xE7>."""
    text = content.decode(errors="surrogateescape")
    return re.sub("[\udc80-\udcff]", lambda byte: f"<0x{ord(byte[0]) - 0xDC00:02X}>", text)


def readable(name: str | os.PathLike[str]) -> str:
    """Make text to print of a file's name, whose bytes need not be UTF-8."""
    return "standard input" if name == STDIN else shown(os.fsencode(name))
