"""Progress bars, one look for all stages; on stderr, so that the report on stdout stays clean."""

from __future__ import annotations

from collections.abc import Iterable

from tqdm import tqdm


def progress(items: Iterable, title: str, *, total: int | None = None) -> tqdm:
    """Iterate over items with a bar; `set_postfix_str` on the result adds figures to it."""
    return tqdm(items, desc=f"{title:<26}", total=total, dynamic_ncols=True, leave=True)
