"""What a call allocates."""

import itertools

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
