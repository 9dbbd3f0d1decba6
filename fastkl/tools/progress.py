"""Progress bars, one look for all tools; on stderr, so that the report on stdout stays clean."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from tqdm import tqdm


def progress(items: Iterable | None, title: str, *, total: int | None = None, **options) -> tqdm:
    """Iterate over items with a bar, or without items `update(count)` it; `set_postfix_str(text,
    refresh=False)` adds figures. options: of tqdm.
    """
    # A log file gets a line now and then, a terminal a moving bar.
    interval = 0.1 if sys.stderr.isatty() else 15.0
    return tqdm(
        items,
        desc=f"{title:<26}",
        total=total,
        dynamic_ncols=True,
        mininterval=interval,
        maxinterval=interval,
        **options,
    )
