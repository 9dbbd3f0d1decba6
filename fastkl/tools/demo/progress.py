"""Progress bars, one look for all stages; on stderr, so that the report on stdout stays clean."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from tqdm import tqdm


def progress(items: Iterable, title: str, *, total: int | None = None) -> tqdm:
    """Iterate over items with a bar; `set_postfix_str(text, refresh=False)` on the result adds figures to it."""
    # A log file gets a line now and then, a terminal a moving bar.
    interval = 0.1 if sys.stderr.isatty() else 15.0
    return tqdm(items, desc=f"{title:<26}", total=total, dynamic_ncols=True, mininterval=interval, maxinterval=interval)
