"""Destinations of a monitor's figures: a file with a line of JSON per step, and loggers."""

import json
import logging
import math
import os
from collections.abc import Callable
from typing import Any, Protocol

from . import _checks


class Run(Protocol):
    """A logger that takes a step's figures at once, as a run of wandb."""

    def log(self, data: dict[str, Any], /) -> object:
        """Take the figures of a step."""


class Writer(Protocol):
    """A logger that takes one figure at a time, as TensorBoard's SummaryWriter."""

    def add_scalar(self, name: str, value: float, step: int, /) -> object:
        """Take a figure."""


Logger = Run | Writer | Callable[[dict[str, float]], object]


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """Read the steps that KLMonitor(jsonl=path) wrote, each as update returned it.

    A figure that was not finite reads as NaN.
    A line that was cut off in writing, as the last one of a killed run, is left out, and so are the
    NUL bytes that a loss of power leaves.

    Raises OSError for a file that cannot be read, TypeError for anything but a path, ValueError for
    a line that is not a JSON object.
    """
    # open() would take the number of a file descriptor, and close it.
    _checks.expect(
        isinstance(path, (str, os.PathLike)),
        "path",
        "a path, str or os.PathLike",
        path,
        "pass the file that KLMonitor(jsonl=...) wrote",
        TypeError,
    )
    steps: list[dict[str, float]] = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, raw in enumerate(file, 1):
            line = raw.replace("\0", "").strip()
            if not line:
                continue
            try:
                entry = json.loads(line, parse_int=float)  # of any length
            except (ValueError, RecursionError) as error:
                # A line cut off within a string may end as an object does.
                within = getattr(error, "pos", 0) == len(line) or "Unterminated" in str(error)
                if (line.startswith("{") and (within or not line.endswith("}"))) or (
                    steps and not raw.endswith("\n")
                ):
                    continue
                entry = None
            if not isinstance(entry, dict):
                raise ValueError(
                    f"path: expected one JSON object per line, got {line[:40]!r} in line {number} "
                    f"of {os.fspath(path)}; pass a file that KLMonitor(jsonl=...) wrote"
                )
            plain = {None: math.nan, True: 1.0, False: 0.0}
            steps.append(
                {
                    name: plain[value] if value is None or isinstance(value, bool) else value
                    for name, value in entry.items()
                }
            )
    return steps


def append_line(path: str, metrics: dict[str, float]) -> None:
    """Append a whole line in one write; after half a line of a killed process, on a new line."""
    # JSON has no NaN: null, which every reader takes.
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
    # open() would take the number of a file descriptor, and close it.
    _checks.expect(
        isinstance(path, (str, os.PathLike)),
        "jsonl",
        "a path, str or os.PathLike",
        path,
        "pass 'run.jsonl', for instance",
        TypeError,
    )
    # Absolute: a later change of folder must not split the file.
    path = os.path.abspath(os.fspath(path))
    try:
        open(path, "ab+", buffering=0).close()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"jsonl: expected a file that can be appended to, got {path!r} ({error}); create its "
            f"folder, or name another"
        ) from None
    return path


def check_logger(logger: Logger) -> None:
    """Check that `send` can give it figures."""
    _checks.expect(
        not isinstance(logger, logging.Logger),
        "loggers",
        "an object with log(dict)",
        logger,
        "a logging.Logger logs text: pass lambda step: logger.info(step)",
        TypeError,
    )
    ways = (logger, getattr(logger, "log", None), getattr(logger, "add_scalar", None))
    _checks.expect(
        any(map(callable, ways)),
        "loggers",
        "objects with log(dict) or add_scalar(name, value, step), or callables",
        logger,
        "pass a wandb run, a SummaryWriter or print",
        TypeError,
    )


def send(logger: Logger, metrics: dict[str, float]) -> None:
    """Give a logger the figures of a step, in its own way."""
    way: Any = logger
    if callable(getattr(logger, "add_scalar", None)):
        for name, value in metrics.items():
            if name != "step":
                way.add_scalar(name, value, int(metrics["step"]))
    elif callable(getattr(logger, "log", None)):
        way.log(metrics)
    else:
        way(metrics)
