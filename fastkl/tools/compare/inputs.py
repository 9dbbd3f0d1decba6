"""Reads what --text names: files, folders, patterns, standard input, lines of .jsonl files."""

from __future__ import annotations

import glob
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from ..files import check_writable
from .errors import sentences
from .settings import STDIN, STDOUT, CompareError

# Characters tokenized at once. Tokenizers see no further: a longer document is cut where a line
# begins with a word, where theirs cut, too.
PIECE = 1 << 18
_CUTS = (re.compile(r"\n(?=\S)"), re.compile(r"\S(?=\s)"))
SHAPES = '{"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}'


class Source(NamedTuple):
    """A document before it is tokenized.

    line: its number in a .jsonl file, or None. texts: its text in pieces. chat: a template made it.
    """

    line: int | None
    texts: Iterable[str]
    chat: bool


def files(paths: Iterable[Path]) -> tuple[Path, ...]:
    """List the files that paths, folders and patterns stand for, each group sorted by name.

    A folder stands for the files directly in it that are not hidden.
    """
    found: list[Path] = []
    for path in paths:
        # os.path says no where pathlib raises, as for a name that is too long.
        if path == STDIN or os.path.exists(path) and not os.path.isdir(path):
            group = [path]
        elif os.path.isdir(path):
            group = sorted(
                entry
                for entry in path.iterdir()
                if entry.is_file() and not entry.name.startswith(".")
            )
        else:
            group = sorted(
                Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name)
            )
        if not group:
            what = "which does not exist"
            if os.path.isdir(path):
                what = "a folder without files in it"
            elif glob.has_magic(str(path)):
                what = "a pattern that no file matches"
            remedy = "check the name, or pass a pattern such as 'folder/**/*.txt'"
            raise CompareError("--text", "files with text", f"{str(path)!r}, {what}", remedy)
        found += group
    return tuple(found)


def check_outputs(html: Path | None, json: Path | None) -> None:
    """Refuse files that cannot be written."""
    for option, path in (("--html", html), ("--json", json)):
        try:
            if path not in (None, STDOUT):
                check_writable(path)
        except OSError as error:
            got = f"{str(path)!r} ({error.strerror})"
            expected = "a file in a folder that can be written to"
            raise CompareError(option, expected, got, "choose another name") from None


def sources(path: Path, tokenizer, argument: str) -> Iterator[Source]:
    """Yield the documents of a file: the whole file, or each line of a .jsonl file.

    argument: the model whose tokenizer has the chat template, as messages name it.
    """
    if path.suffix.lower() != ".jsonl":
        yield Source(None, pieces(path), False)
        return
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                text, chat = _entry(f"line {number} of {str(path)!r}", line, tokenizer, argument)
                yield Source(number, cut([text]), chat)


def _entry(where: str, line: str, tokenizer, argument: str) -> tuple[str, bool]:
    """Return the text of a line, and whether it is a chat's."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CompareError(
            "--text",
            "a JSON object a line in a .jsonl file",
            f"{error} in {where}",
            "correct it, or rename the file to .txt",
        ) from None
    entry = entry if isinstance(entry, dict) else {}
    text, messages = entry.get("text"), entry.get("messages")
    prompt, completion = entry.get("prompt"), entry.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        text = prompt + completion
    elif _is_chat(prompt) and _is_chat(completion):
        messages = prompt + completion
    chat = _is_chat(messages)
    if isinstance(text, str) == chat:
        got = f"the fields {', '.join(map(repr, entry))[:200]}" if entry else "no such object"
        raise CompareError(
            "--text",
            f"lines of the form {SHAPES}, with text or messages",
            f"{got} in {where}",
            "convert the lines, or rename the file to .txt to compare its characters",
        )
    if chat:
        text = _rendered(where, messages, entry.get("tools"), tokenizer, argument)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CompareError(
            "--text",
            "characters in UTF-8",
            f"a lone {ascii(error.object[error.start])} in {where}",
            "correct it",
        ) from None
    return text, chat


def _is_chat(messages: object) -> bool:
    """Tell whether it is a list of messages, each with a role."""
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(message, dict) and isinstance(message.get("role"), str)
            for message in messages
        )
    )


def _rendered(where: str, messages: list, tools: object, tokenizer, argument: str) -> str:
    """Write messages as one text, as the tokenizer's chat template does."""
    if not tokenizer.chat_template:
        raise CompareError(
            argument,
            f"a tokenizer with a chat template, for the messages in {where}",
            "one without",
            'add a chat_template.jinja to it, or pass lines of the form {"text": ...}',
        )
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    except Exception as error:  # whatever a template raises
        raise CompareError(
            "--text",
            f"messages that the chat template of {argument} takes",
            f"{sentences(str(error)) or type(error).__name__} in {where}",
            "correct the messages",
        ) from None


def pieces(path: Path) -> Iterator[str]:
    """Yield the text of a file, read once, in pieces of at most about PIECE characters.

    Line ends stay as they are, a byte-order mark goes.
    """
    with _opened(path) as file:
        yield from cut(iter(lambda: file.read(PIECE), ""))


def cut(texts: Iterable[str]) -> Iterator[str]:
    """Cut texts that follow each other anew, into pieces of at most about PIECE characters."""
    rest = ""
    for text in texts:
        rest += text
        while len(rest) > PIECE:
            end = _last_cut(rest[: PIECE + 1])
            yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest


def _last_cut(text: str) -> int:
    """Find the last good place for a cut, before the last character."""
    for pattern in _CUTS:
        if ends := [match.end() for match in pattern.finditer(text)]:
            return ends[-1]
    return len(text) - 1


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """Open the file, or standard input, as UTF-8 text."""
    options = {"encoding": "utf-8-sig", "newline": ""}
    try:
        if path == STDIN:
            file = io.TextIOWrapper(sys.stdin.buffer, **options)
            try:
                yield file
            finally:
                file.detach()
        else:
            with open(path, **options) as file:
                yield file
    except UnicodeDecodeError as error:
        raise CompareError(
            "--text",
            "UTF-8 text",
            f"byte 0x{error.object[error.start]:02x} in {str(path)!r}",
            "convert the file",
        ) from None
    except OSError as error:
        raise CompareError(
            "--text",
            "a file that can be read",
            f"{str(path)!r} ({error.strerror})",
            "check the name",
        ) from None
