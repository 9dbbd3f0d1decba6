"""The file of a monitor's figures: one line of JSON per step."""

import json
import math
import os

from . import _checks


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """Read the steps written by KLMonitor(jsonl=path), each as update returned it.

    A figure that was not finite reads as NaN. A truncated line that begins as an object, such as
    the last line of a killed run, is skipped, as are the NUL bytes left by a power loss.

    Raises OSError for a file that cannot be read, TypeError for anything except a path, ValueError
    for any other line that is not a JSON object.
    """
    # open() would accept a file descriptor's number, and close it.
    _checks.expect(
        isinstance(path, (str, os.PathLike)),
        "path",
        "a path, str or os.PathLike",
        path,
        "pass the file that KLMonitor(jsonl=...) wrote",
        TypeError,
    )
    steps: list[dict[str, float]] = []
    plain = {None: math.nan, True: 1.0, False: 0.0}
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, raw in enumerate(file, 1):
            line = raw.replace("\0", "").strip()
            try:
                entry = json.loads(line, parse_int=float)  # of any length
            except (ValueError, RecursionError):
                if not line or line.startswith("{"):
                    continue
                entry = None
            _checks.expect(
                isinstance(entry, dict),
                "path",
                f"one JSON object per line, also in line {number} of {os.fspath(path)!r}",
                line,
                "pass a file that KLMonitor(jsonl=...) wrote",
            )
            steps.append(
                {
                    name: plain[value] if value is None or isinstance(value, bool) else value
                    for name, value in entry.items()
                }
            )
    return steps


def append_line(path: str, metrics: dict[str, float]) -> None:
    """Append a whole line in one write, after a newline if a killed process left a partial line."""
    # JSON has no NaN; every reader accepts null.
    plain = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    line = json.dumps({**plain, "step": int(metrics["step"])}).encode() + b"\n"
    with open(path, "ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
            line = b"\n" + line
        if file.write(line) != len(line):
            raise OSError(
                f"{path}: a line of {len(line)} bytes was not written whole; is the disk full?"
            )


def appendable(path: str | os.PathLike[str]) -> str:
    """Create a file, or check that it can be appended to, and return its absolute path."""
    # open() would accept a file descriptor's number, and close it.
    _checks.expect(
        isinstance(path, (str, os.PathLike)),
        "jsonl",
        "a path, str or os.PathLike",
        path,
        "pass 'run.jsonl', for instance",
        TypeError,
    )
    # Absolute: a later change of directory must not split the file.
    path = os.path.abspath(os.fspath(path))
    try:
        open(path, "ab+", buffering=0).close()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"jsonl: expected a file that can be appended to, got {path!r} ({error}); create its "
            f"folder, or name another"
        ) from None
    return path
