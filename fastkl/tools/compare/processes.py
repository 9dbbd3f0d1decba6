"""Split the work over torchrun's processes, and gather all results on the first."""

import datetime
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from ..errors import UseError, expect


def gathered(run: Callable[[int, int], tuple[Any, Any]]) -> tuple[list[Any], Any]:
    """Call run(rank, processes) on every process of torchrun, or run(0, 1); return (shared of each
    process, own).

    run: returns (shared, own); shared begins with a digest of the text, which must be equal on all
    processes. Only the first process returns and prints; the others exit. An exception on one
    process is raised on all.
    """
    rank, count = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE"))
    if count < 2 or "RANK" not in os.environ:
        alone, own = run(0, 1)
        return [alone], own
    if rank:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    opened = not dist.is_initialized()
    if opened:
        # Shares take unequal times, hence the long timeout; a process that ends is noticed at once.
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=1))
    try:
        found, own = run(rank, count)
    except Exception as error:
        unforeseen = RuntimeError(f"on process {rank}: {traceback.format_exc()}")
        found = error if isinstance(error, UseError) else unforeseen
    everything: list[Any] = [None] * count
    dist.all_gather_object(everything, found)
    if opened:
        dist.destroy_process_group()
    for each in everything:
        if isinstance(each, Exception):
            raise each
    expect(
        len({digest for digest, _ in everything}) == 1,
        "--text",
        "the same text for every process of torchrun",
        "others",
        "name files that are the same on every machine",
    )
    return (everything, own) if rank == 0 else sys.exit()
