"""Files of results: written whole or not at all, in JSON that every reader takes."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path


def write_whole(path: Path, content: bytes | Iterable[bytes | str]) -> None:
    """Write a file, text in UTF-8, so that it is either there in full or not at all: beside it, then renamed to it.

    A symbolic link stays one: the file that it leads to is written. What is there and is no regular file, such as a pipe or a terminal, cannot be
    replaced and is written to as it is, piece by piece. Raises OSError.
    """
    part = _part(path)
    try:
        with open(part or path, "wb") as file:
            for piece in [content] if isinstance(content, (bytes, str)) else content:
                file.write(piece.encode() if isinstance(piece, str) else piece)
        if part:
            os.replace(part, os.path.realpath(path))
    finally:
        if part:
            part.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """OSError for what write_whole cannot write, found out before there is something to write; what is there stays as it is."""
    part = _part(path)
    if part:
        part.touch()
        part.unlink()
    elif path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    elif not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def _part(path: Path) -> Path | None:
    """The file to write first, in the folder of the one to replace; None where there is something that is no regular file."""
    if os.path.exists(path) and not os.path.isfile(path):
        return None
    target = Path(os.path.realpath(path))
    return target.with_name(f".{target.name}.{os.getpid()}.part")


def json_text(data: object) -> str:
    """JSON in the order given, one line at the end; a number that is not finite becomes null."""
    return json.dumps(_finite(data), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _finite(value):
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
