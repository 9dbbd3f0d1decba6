"""Files of tools: read where there is an end, written whole or not at all, and strict JSON."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path


def write_whole(path: Path, content: bytes | Iterable[bytes | str]) -> None:
    """Write a file, text in UTF-8, in full or not at all: beside it, then renamed to it.

    A symbolic link stays one: the file that it leads to is written, and keeps its mode. What is
    there and is no regular file, such as a pipe or a terminal, cannot be replaced and is written to
    as it is, piece by piece. Raises OSError.
    """
    with _opened(path) as (descriptor, part):
        with open(descriptor, "wb") as file:
            for piece in [content] if isinstance(content, (bytes, str)) else content:
                file.write(piece.encode() if isinstance(piece, str) else piece)
        if part:
            os.replace(part, os.path.realpath(path))


def check_writable(path: Path) -> None:
    """Raise OSError for what write_whole cannot write, before there is something to write.

    What is there stays as it is.
    """
    if _is_replaced(path):
        with _opened(path) as (descriptor, _):
            os.close(descriptor)
    else:
        _check_access(path, os.W_OK)


def check_readable(path: Path) -> None:
    """Raise OSError for what cannot be read to an end: no file, a folder, a device."""
    mode = os.stat(path).st_mode
    _check_access(path, os.R_OK)
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
        raise OSError(errno.EINVAL, "neither a regular file nor a pipe", str(path))


def _check_access(path: Path, access: int) -> None:
    fault = errno.EISDIR if path.is_dir() else 0 if os.access(path, access) else errno.EACCES
    if fault:
        raise OSError(fault, os.strerror(fault), str(path))


def default_picture(source: Path) -> Path:
    """Name the picture beside the file: run.png for run.jsonl, run.seed1.png for run.seed1."""
    known = source.suffix.lower() in (".jsonl", ".json")
    return source.with_suffix(".png") if known else Path(f"{source}.png")


def _is_replaced(path: Path) -> bool:
    # A regular file, or the place for one; other things are written to as they are.
    return os.path.isfile(path) or not os.path.exists(path)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[int, str | None]]:
    """Yield (descriptor to write to, name of the part file, or None where nothing is replaced).

    The part file is removed at the end unless it was renamed. O_EXCL makes it a new one: a link or
    file that somebody put at its name is neither followed nor written over.
    """
    if not _is_replaced(path):
        yield os.open(path, os.O_WRONLY | os.O_CLOEXEC), None
        return
    target = os.path.realpath(path)
    try:
        mode = os.stat(target).st_mode & 0o777
    except FileNotFoundError:
        mode = None  # the umask's
    part = os.path.join(os.path.dirname(target), f".{secrets.token_hex(8)}.part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    # A private file is private from its first byte on.
    descriptor = os.open(part, flags, 0o666 if mode is None else mode & 0o700)
    try:
        if mode is not None:
            os.chmod(descriptor if os.chmod in os.supports_fd else part, mode)
        yield descriptor, part
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)


def json_text(data: object) -> str:
    """Return JSON in the order given; a number that is not finite becomes null."""
    finite = json.loads(json.dumps(data), parse_constant=lambda name: None)
    return json.dumps(finite, indent=1, ensure_ascii=False) + "\n"
