"""Files of tools: written whole or not at all, and strict JSON."""

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO


def write_whole(path: Path, content: bytes | Iterable[bytes | str]) -> None:
    """Write a file, text in UTF-8, in full or not at all: beside it, then renamed to it.

    A symbolic link stays one: the file that it leads to is written, and keeps its mode. What is
    there and is no regular file, such as a pipe or a terminal, cannot be replaced and is written to
    as it is, piece by piece. Raises OSError.
    """
    target, mode = os.path.realpath(path), _mode(path)
    with open(path, "wb") if mode is None else _part(target) as file:
        for piece in [content] if isinstance(content, bytes) else content:
            file.write(piece.encode() if isinstance(piece, str) else piece)
        file.close()
        if mode is not None:
            os.chmod(file.name, mode)
            os.replace(file.name, target)


def check_writable(path: Path) -> None:
    """Raise OSError for what write_whole cannot write, before there is something to write.

    What is there stays as it is.
    """
    if _mode(path) is not None:
        with _part(os.path.realpath(path)):
            return
    if path.is_dir() or not os.access(path, os.W_OK):
        fault = errno.EISDIR if path.is_dir() else errno.EACCES
        raise OSError(fault, os.strerror(fault), str(path))


def json_text(data: object) -> str:
    """Return JSON in the order given; a number that is not finite becomes null."""
    finite = json.loads(json.dumps(data), parse_constant=lambda name: None)
    return json.dumps(finite, indent=1, ensure_ascii=False) + "\n"


def _mode(path: Path) -> int | None:
    """Return the mode of the file to be, or None for what cannot be replaced by a file."""
    try:
        found = os.stat(path).st_mode
    except FileNotFoundError:
        umask = os.umask(0o077)  # can only be read by setting it
        os.umask(umask)
        return 0o666 & ~umask
    return found & 0o777 if os.path.isfile(path) else None


@contextlib.contextmanager
def _part(target: str) -> Iterator[IO[bytes]]:
    """Open a new file beside the target, private, removed at the end unless it was renamed."""
    folder = os.path.dirname(target)
    file = tempfile.NamedTemporaryFile(prefix=".", suffix=".part", dir=folder, delete=False)
    try:
        with file:
            yield file
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file.name)
