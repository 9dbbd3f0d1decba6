"""Files of tools: read only where there is an end, written whole or not at all, and JSON that every
reader takes."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path


def write_whole(path: Path, content: bytes | Iterable[bytes | str]) -> None:
    """Write a file, text in UTF-8, so that it is either there in full or not at all: beside it, then renamed to it.

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
    """Raise OSError for what write_whole cannot write, found out before there is something to
    write; what is there stays as it is."""
    if _is_replaced(path):
        with _opened(path) as (descriptor, _):
            os.close(descriptor)
    elif path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    elif not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def check_readable(path: Path) -> None:
    """Raise OSError for what cannot be read to an end: no file, a folder, a device such as
    /dev/zero."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
        raise OSError(errno.EINVAL, "neither a regular file nor a pipe", str(path))
    if not os.access(path, os.R_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def default_picture(source: Path) -> Path:
    """Name the picture beside the file: run.png for run.jsonl and run.json, and every other name with ".png" behind
    it, so that run.seed1 and run.seed2 get two."""
    return (
        source.with_suffix(".png")
        if source.suffix.lower() in (".jsonl", ".json")
        else Path(f"{source}.png")
    )


def _is_replaced(path: Path) -> bool:
    """Tell a regular file, or the place for one, from what is written to as it is."""
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
    descriptor = os.open(
        part,
        os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC,
        0o666 if mode is None else mode & 0o700,
    )
    try:
        if mode is not None:
            os.chmod(descriptor if os.chmod in os.supports_fd else part, mode)
        yield descriptor, part
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)


def json_text(data: object) -> str:
    """JSON in the order given, one line at the end; a number that is not finite becomes null."""
    return json.dumps(_finite(data), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _finite(value):
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
