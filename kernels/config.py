"""Launch configurations: one table, keyed by architecture, element size and vocabulary, never by the number of rows.

A row therefore gives the same bits alone and in any batch. `measured` says what an entry rests on.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

# ptxas stops at 40, 80 or 96 registers for some kernels and spills 8 bytes; given room it does not.
_ROOM = 168


@dataclasses.dataclass(frozen=True)
class RowConfig:
    """How a row is cut up.

    threads: threads of a program; groups: 16-byte blocks of each tensor that a thread holds at once; segment: elements of the row that one
    program reads (threads · groups · elements per block must divide it); measured: what chose the entry; max_registers: the limit given to
    ptxas (None: its own choice), NVIDIA only; prefetch: whether the forward kernel loads a tile while it sums the one before (backward ignores it).
    """

    threads: int
    groups: int
    segment: int
    measured: str
    max_registers: int | None = None
    prefetch: bool = True

    def options(self, arch: str, capped: bool = False) -> dict[str, int]:
        """Compiler options of this entry, for logits with or without a soft cap: its temporaries need room too."""
        limit = _ROOM if capped else self.max_registers
        return {} if limit is None or arch.startswith("gfx") else {"maxnreg": limit}


@dataclasses.dataclass(frozen=True)
class Entry:
    """The configurations for one architecture ("*": any), element size in bytes and vocabulary up to max_v (None: any)."""

    arch: str
    itemsize: int
    max_v: int | None
    forward: RowConfig
    backward: RowConfig


_STATIC = "instruction counts for sm_90 (python -m benchmarks.static_costs); not yet timed on a GPU"
_SMALL = "a vocabulary that fits one tile: the tile is kept near its size; not yet timed on a GPU"
_EMULATED = "the interpreter pays per operation, not per element: wide tiles"

TABLE = (
    Entry("interpreter", 2, None, RowConfig(1024, 4, 32768, _EMULATED), RowConfig(1024, 4, 32768, _EMULATED)),
    Entry("interpreter", 4, None, RowConfig(1024, 4, 32768, _EMULATED), RowConfig(1024, 4, 32768, _EMULATED)),
    Entry("*", 2, 2048, RowConfig(128, 1, 1024, _SMALL), RowConfig(128, 1, 1024, _SMALL)),
    Entry("*", 4, 2048, RowConfig(128, 1, 512, _SMALL, _ROOM), RowConfig(128, 1, 512, _SMALL)),
    Entry("*", 2, None, RowConfig(128, 4, 32768, _STATIC), RowConfig(128, 2, 16384, _STATIC)),
    Entry("*", 4, None, RowConfig(128, 4, 32768, _STATIC, _ROOM), RowConfig(128, 2, 16384, _STATIC)),
)

_override: dict[str, RowConfig] = {}


def select(direction: str, arch: str, itemsize: int, vocabulary: int) -> RowConfig:
    """The configuration of "forward" or "backward": the first entry of TABLE that fits."""
    if direction in _override:
        return _override[direction]
    for entry in TABLE:
        if entry.arch in (arch, "*") and entry.itemsize == itemsize and (entry.max_v is None or vocabulary <= entry.max_v):
            return getattr(entry, direction)
    raise LookupError(f"no launch configuration for {arch}, {itemsize}-byte elements, V={vocabulary}: add an Entry to kernels/config.py")


@contextlib.contextmanager
def override(forward: RowConfig | None = None, backward: RowConfig | None = None) -> Iterator[None]:
    """Use these configurations instead of the table's, for tests and for the tuner. Not for use from several threads."""
    before = dict(_override)
    _override.update({name: value for name, value in (("forward", forward), ("backward", backward)) if value is not None})
    try:
        yield
    finally:
        _override.clear()
        _override.update(before)
