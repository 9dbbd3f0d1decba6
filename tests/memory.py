"""Bytes that a call allocates."""

import gc
import itertools
from collections.abc import Callable

import torch


def allocations(call) -> dict[str, int]:
    """Return the bytes that call() allocates: "peak", its result included, and "largest" tensor.

    torch.profiler reports every allocation of torch, those inside an op included.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return {"peak": max(itertools.accumulate(changes)), "largest": max(changes)}


def allocated(device: str, call: Callable) -> tuple[int, int]:
    """Return the bytes that call() allocates: the most at any time, and what is left while its
    result lives.
    """
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
        gc.collect()  # the interpreter leaves cycles behind
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events, "the profiler saw no allocation"
    del result
    levels = list(itertools.accumulate(event.nbytes() for event in events))
    return max(levels), levels[-1]


def saved(call: Callable) -> dict[int, int]:
    """Return the bytes of every storage that autograd saves in call(), by address."""
    held = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        held[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        call()
    return held
