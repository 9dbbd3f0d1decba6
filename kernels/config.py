"""Launch configurations: one table, keyed by architecture, element size and vocabulary, not by the
number of rows.

So a row gives the same bits alone and in any batch. `measured` states the basis of an entry.

The first matching entry wins: put a new one above matching entries for any architecture ("*").
`python -m benchmarks.tune` prints one for this GPU.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

# Limit with soft caps, ratios or misaligned rows, and for kernels that ptxas would otherwise
# compile to 40, 80 or 96 registers, spilling 8 bytes.
ROOM = 168


@dataclasses.dataclass(frozen=True)
class RowConfig:
    """How a row is split into segments and tiles.

    threads: threads per program. groups: 16-byte blocks of each tensor that a thread holds at once.
    segment: elements of the row that one program reads: in forward a target (segment_length), in
    backward exact, a multiple of threads · groups · elements per block. measured: the basis of the
    entry. max_registers: the limit for ptxas (None: its own choice), NVIDIA only.
    """

    threads: int
    groups: int
    segment: int
    measured: str
    max_registers: int | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """The configurations for one architecture ("*": any), element size in bytes and vocabulary up
    to max_v (None: any).

    arch: the name from layout.architecture, such as "sm_90" or "gfx942". fused: of row_fused, whose
    segments are cut into equal pieces of at most `segment` elements; None: not measured.
    """

    arch: str
    itemsize: int
    max_v: int | None
    forward: RowConfig
    backward: RowConfig
    fused: RowConfig | None = None

    def choose(self, direction: str) -> RowConfig:
        """Return the configuration of "forward", "backward" or "fused".

        Without `fused`, row_fused gets forward's threads and groups, and pieces of 8 KB of each
        tensor: 16 warps keep 256 KB in an SM's L1.
        """
        chosen: RowConfig | None = getattr(self, direction)
        return chosen or dataclasses.replace(
            self.forward,
            segment=min(self.forward.segment, 8192 // self.itemsize),
            measured=_UNTIMED,
        )


_EMULATED = "a GPU's segments in forward; wide tiles, as the interpreter pays per operation"
_H200 = "NVIDIA H200, Triton 3.6.0, 2026-11-26"
_AS_H200 = "as measured on an H200; not timed on this architecture"
_SMALL = "a short row: few threads, so that none idles"
_UNTIMED = "instructions and registers of the compiled kernel; not timed"

# A program of forward is one warp, so that origin and centre are uniform.
TABLE = (
    Entry(
        "interpreter",
        2,
        None,
        RowConfig(256, 2, 16384, _EMULATED),
        RowConfig(1024, 4, 32768, _EMULATED),
    ),
    Entry(
        "interpreter",
        4,
        None,
        RowConfig(256, 2, 8192, _EMULATED),
        RowConfig(1024, 4, 32768, _EMULATED),
    ),
    # A warp of 64 threads.
    Entry("gfx942", 2, None, RowConfig(64, 2, 16384, _UNTIMED), RowConfig(128, 2, 16384, _AS_H200)),
    Entry("gfx942", 4, None, RowConfig(64, 2, 8192, _UNTIMED), RowConfig(256, 1, 16384, _AS_H200)),
    Entry(
        "*",
        2,
        2048,
        RowConfig(32, 1, 1024, _UNTIMED),
        RowConfig(128, 1, 1024, f"{_SMALL}; not timed"),
    ),
    Entry(
        "*",
        4,
        2048,
        RowConfig(32, 1, 512, _UNTIMED),
        RowConfig(128, 1, 512, f"{_SMALL}; not timed"),
    ),
    Entry(
        "sm_90",
        2,
        None,
        RowConfig(32, 2, 16384, _UNTIMED, 128),
        RowConfig(
            128,
            2,
            16384,
            f"{_H200}, without the limit of registers: the KL to P 1.457 ms at 8192 rows of 128256 "
            "and 0.0162 ms at 64, to Q 1.464 and 0.0167 ms, token_stats 1.466 and 0.0185 ms; of 30 "
            "others none was over 2 % faster. The limit avoids spills in Triton 3.9; not timed",
            96,
        ),
    ),
    Entry(
        "sm_90",
        4,
        None,
        RowConfig(32, 2, 8192, _UNTIMED, 128),
        RowConfig(
            256,
            1,
            16384,
            f"{_H200}: the KL to P 1.483 ms at 4096 rows of 128256 and 0.0273 ms at 64; 512 "
            "threads take 1.452 and 0.0265 ms and leave no room for a soft cap",
        ),
    ),
    Entry(
        "*",
        2,
        None,
        RowConfig(32, 2, 16384, _UNTIMED, 128),
        RowConfig(128, 2, 16384, _AS_H200, ROOM),
    ),
    Entry("*", 4, None, RowConfig(32, 2, 8192, _UNTIMED, 128), RowConfig(256, 1, 16384, _AS_H200)),
)

# Maximum length of a segment: 64 KB of 16-bit logits.
LONGEST_SEGMENT = 32768
# A vocabulary of at least this size, a multiple of 128, has the segments of its shards (up to eight
# equal ones) also without them, for the same bits. Their cost (docs/parallel.md) is not timed.
SMALLEST_SHARED = 32000


def segment_length(vocabulary: int, preferred: int, width: int | None = None) -> int:
    """Return the length of a row's segments in forward, near `preferred` but at least V/16 for V up
    to 524288; the last may be shorter.

    Segments end at multiples of a sixteenth of the vocabulary, rounded up to 8 entries, so that an
    equal share of the vocabulary holds whole segments. Vocabularies above 16 · LONGEST_SEGMENT are
    cut into 32, 64, … parts instead. width: of a shard, which then holds whole segments if they can
    be that short; a split vocabulary has eight or more, for the same bits on 1, 2, 4 and 8 ranks. 0
    for a whole vocabulary: it has as many from SMALLEST_SHARED on. None: without regard to shards.
    """
    shared = width == 0 and vocabulary % 128 == 0 and vocabulary >= SMALLEST_SHARED
    fewest = 8 if width or shared else 1
    parts = max(16, 1 << ((vocabulary - 1) // LONGEST_SEGMENT).bit_length())
    part = max(8, -(-vocabulary // (8 * parts)) * 8)
    while parts > fewest and 2 * part <= preferred and not (width or 0) % (2 * part):
        part, parts = 2 * part, parts // 2
    return part


def fuses(arch: str) -> bool:
    """Return whether row_fused replaces two launches: only in the interpreter, because it has not
    run on a GPU.
    """
    return arch == "interpreter"


def prefetches(arch: str) -> bool:
    """Return whether the architecture can prefetch a whole segment with one instruction
    (cp.async.bulk.prefetch).
    """
    return arch.startswith("sm_") and int(arch[3:]) >= 90


_override: dict[str, RowConfig] = {}


def select(direction: str, arch: str, itemsize: int, vocabulary: int) -> RowConfig:
    """Return the configuration of "forward", "backward" or "fused": from `override`, else TABLE."""
    return _override.get(direction) or entry_for(arch, itemsize, vocabulary).choose(direction)


def entry_for(arch: str, itemsize: int, vocabulary: int) -> Entry:
    """Return the first entry of TABLE that fits."""
    for entry in TABLE:
        if (
            entry.arch in (arch, "*")
            and entry.itemsize == itemsize
            and (entry.max_v is None or vocabulary <= entry.max_v)
        ):
            return entry
    raise LookupError(
        f"no launch configuration for {arch}, {itemsize}-byte elements, V={vocabulary}: add an "
        f"Entry to kernels/config.py"
    )


@contextlib.contextmanager
def override(
    forward: RowConfig | None = None,
    backward: RowConfig | None = None,
    fused: RowConfig | None = None,
) -> Iterator[None]:
    """Use these configurations instead of the table's, in tests and the tuner. Not thread-safe."""
    before = dict(_override)
    _override.update(
        {
            name: value
            for name, value in (("forward", forward), ("backward", backward), ("fused", fused))
            if value is not None
        }
    )
    try:
        yield
    finally:
        _override.clear()
        _override.update(before)
