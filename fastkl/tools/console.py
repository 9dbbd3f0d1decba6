"""Numbers, tables and progress bars for a terminal."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from tqdm import tqdm

# Most characters of a cell.
MOST = 40


def percent(share: float, digits: int = 0) -> str:
    """Format a share in percent, with two significant digits if it would round to 0%."""
    small = 0 < share <= 0.5 * 10 ** -(digits + 2)
    return f"{100 * share:.2g}%" if small else f"{share:.{digits}%}"


def table(rows: Sequence[Sequence[str]], align: str, width: int = 10**9) -> list[str]:
    """Align columns by < and >; cut the last at the line width, the others at MOST characters."""
    rows = [[*(cell[:MOST] for cell in row[:-1]), row[-1]] for row in rows]
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join(f"{{:{way}{size}}}" for way, size in zip(align, sizes, strict=True))
    lines = [form.format(*row).rstrip() for row in rows]
    return [line if len(line) <= width else line[: width - 1] + "…" for line in lines]


def progress(items: Iterable[Any], title: str) -> "tqdm[Any]":
    """Iterate over items with a bar on stderr."""
    # Update a terminal's bar often, a log file rarely.
    interval = 0.1 if sys.stderr.isatty() else 15.0
    return tqdm(
        items,
        desc=f"{title:<26}",
        dynamic_ncols=True,
        mininterval=interval,
        maxinterval=interval,
    )
