"""Bytes that a call allocates."""

import gc
import itertools
from collections.abc import Callable

import torch


# Return the bytes that call() allocates on a CPU: "peak", its result included, the "largest"
# tensor, and what is "left" while its result lives.
#
# torch.profiler reports those of torch, inside an op too.
def allocations(call: Callable) -> dict[str, int]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    gc.collect()
    gc.freeze()  # so that the next collection scans the objects of the call, not all older ones
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
        gc.collect()  # the interpreter leaves cycles behind
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    del result
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    levels = list(itertools.accumulate(changes))
    return {"peak": max(levels), "largest": max(changes), "left": levels[-1]}


# Return the bytes that call() allocates: the most at any time, and what is left while its result
# lives.
def allocated(device: str, call: Callable) -> tuple[int, int]:
    call()
    if device != "cuda":
        found = allocations(call)
        return found["peak"], found["left"]
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
