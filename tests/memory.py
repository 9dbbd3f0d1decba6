"""Bytes that a call allocates."""

import gc
import itertools
from collections.abc import Callable

import torch


# Bytes of every allocation and release of call() on a CPU, in order, its result's alive.
#
# torch.profiler reports those of torch, inside an op too.
def _changes(call: Callable) -> list[int]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
        gc.collect()  # the interpreter leaves cycles behind
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    del result
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


# Return the bytes that call() allocates: "peak", its result included, and "largest" tensor.
def allocations(call: Callable) -> dict[str, int]:
    changes = _changes(call)
    return {"peak": max(itertools.accumulate(changes)), "largest": max(changes)}


# Return the bytes that call() allocates: the most at any time, and what is left while its result
# lives.
def allocated(device: str, call: Callable) -> tuple[int, int]:
    call()
    if device != "cuda":
        levels = list(itertools.accumulate(_changes(call)))
        return max(levels), levels[-1]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()  # noqa: F841 - what it holds counts
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before


def saved(call: Callable) -> dict[int, int]:
    held = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        held[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        call()
    return held
