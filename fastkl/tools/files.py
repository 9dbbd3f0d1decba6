"""Find and check files, write them atomically, and format strict JSON."""

import contextlib
import errno
import glob
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

from .errors import expect, told

# The path "-": standard input for a text, standard output for a result.
STDIN = STDOUT = Path("-")


def find_texts(paths: Iterable[Path]) -> tuple[Path, ...]:
    """List the files matched by paths, folders and patterns, sorted by name within each.

    A folder matches the files directly in it, without hidden ones.
    """
    found: list[Path] = []
    for path in paths:
        group = [path]
        # os.path returns False where pathlib raises, for example on a name that is too long.
        if path != STDIN and (os.path.isdir(path) or not os.path.exists(path)):
            pattern = f"{glob.escape(str(path))}/*" if os.path.isdir(path) else str(path)
            names = glob.glob(pattern, recursive=True)
            group = sorted(Path(name) for name in names if os.path.isfile(name))
        expect(
            group,
            "--text",
            "files with text",
            repr(str(path)),
            "check the name, or pass a pattern such as 'folder/**/*.txt'",
        )
        found += group
    return tuple(found)


def check_uses(
    texts: Iterable[Path], written: Mapping[str, Path | None], models: Iterable[Path] = ()
) -> None:
    """Refuse an output that cannot be written, and a file with two uses; `written`: by option.

    models: files that may be shared or be texts as well, but not written.
    """
    seen: set[object] = set()
    kept = {os.path.realpath(path) for path in models}
    outputs = [(f"--{name.replace('_', '-')}", path) for name, path in written.items() if path]
    for option, path in [*(("--text", path) for path in texts), *outputs]:
        place = (option == "--text") if path == STDIN else os.path.realpath(path)
        got, remedy = repr(str(path)), "choose another name"
        free = place not in seen and (option == "--text" or place not in kept)
        expect(free, option, "a file that has no other use", got, remedy)
        seen.add(place)
        if option != "--text" and path != STDOUT:
            with told(option, "a file in a folder that can be written to", got, remedy):
                check_writable(path)


def write_whole(
    path: Path, content: bytes | Iterable[bytes | str] | Callable[[str], object]
) -> None:
    """Write a file atomically, text in UTF-8: write a temporary file in its folder, then rename it.

    content: bytes, an iterable of pieces, or a function that writes to a file name.

    A symbolic link is followed, and an existing file keeps its mode. An existing path that is not a
    regular file, such as a pipe or a terminal, is written to directly, piece by piece; so is
    standard output, for STDOUT. Raises OSError.
    """
    pieces = [content] if isinstance(content, bytes) else () if callable(content) else content
    encoded = (piece.encode() if isinstance(piece, str) else piece for piece in pieces)
    if path == STDOUT:
        sys.stdout.buffer.writelines(encoded)
        return
    target, mode = os.path.realpath(path), _mode(path)
    with open(path, "wb") if mode is None else _part(target) as file:
        file.writelines(encoded)
        if callable(content):
            content(file.name)
        file.close()
        if mode is not None:
            os.chmod(file.name, mode)
            os.replace(file.name, target)


def check_writable(path: Path) -> None:
    """Raise OSError in advance if write_whole could not write to a path.

    An existing file is not changed.
    """
    if _mode(path) is not None:
        with _part(os.path.realpath(path)):
            return
    if path.is_dir() or not os.access(path, os.W_OK):
        fault = errno.EISDIR if path.is_dir() else errno.EACCES
        raise OSError(fault, os.strerror(fault), str(path))


def json_text(data: object) -> str:
    """Return JSON in the given order, with null for a number that is not finite."""
    finite = json.loads(json.dumps(data), parse_constant=lambda name: None)
    return json.dumps(finite, indent=1, ensure_ascii=False) + "\n"


def _mode(path: Path) -> int | None:
    """Return the mode of the file to write, or None if the path cannot be replaced by a file."""
    try:
        found = os.stat(path).st_mode
    except FileNotFoundError:
        umask = os.umask(0o077)  # can only be read by setting it
        os.umask(umask)
        return 0o666 & ~umask
    return found & 0o777 if os.path.isfile(path) else None


@contextlib.contextmanager
def _part(target: str) -> Iterator[IO[bytes]]:
    """Open a private temporary file in the target's folder, removed at the end unless renamed."""
    file = tempfile.NamedTemporaryFile(
        prefix=".", suffix=".part", dir=os.path.dirname(target), delete=False
    )
    try:
        with file:
            yield file
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file.name)
