"""Device time of short runs by replaying a CUDA graph, and whether this process's CUDA context still works.

The queue of a GPU holds about a thousand launches: behind a run of a few microseconds it cannot be kept full by launching one kernel after the other,
and what CUDA events then see is the CPU. A graph of many runs is one launch. Backward is captured apart from its forward, as
torch.cuda.make_graphed_callables does: both on one stream, out of one pool of memory, and replayed in turns.
"""
import contextlib
import math
import statistics
import time

import torch

RUNS_IN_A_GRAPH = 10  # at least: what launching a graph costs is shared among its runs


def event():
    """A CUDA event that tells the time."""
    return torch.cuda.Event(enable_timing=True)


def hold_queue(seconds):
    """Keeps the GPU waiting while the CPU fills its queue, so that the events see no launch overhead."""
    if hasattr(torch.cuda, "_sleep"):
        torch.cuda._sleep(int(min(seconds, 0.5) * 2e9))  # cycles, at about 2 GHz


def nothing(inputs):
    """What is prepared where all is timed."""


def replayed_time(sets, run, prepare, seconds, repetitions):
    """Median, fastest and slowest device time in milliseconds of run(inputs, prepare(inputs)), the preparation not counted, as part of a graph.

    A round over all sets, as often as makes RUNS_IN_A_GRAPH, is one graph; the figures are those of a replay divided by its runs. Replays last about
    `seconds`, and are between repetitions[0] and repetitions[1]. Raises where a run cannot be captured: one that waits for the GPU, before any
    capture began, so that the process can go on; anything else may leave it unfit (context_fault tells).
    """
    outside = torch.cuda.current_stream()
    side = torch.cuda.Stream()
    side.wait_stream(outside)
    try:
        return _replayed_time(list(sets) * math.ceil(RUNS_IN_A_GRAPH / len(sets)), run, prepare, seconds, repetitions, side)
    finally:
        torch.cuda.set_stream(outside)  # a capture that failed leaves its own stream behind


def _replayed_time(runs, run, prepare, seconds, repetitions, side):
    with torch.cuda.stream(side):  # autograd runs backward on the stream of its forward: nothing of it may belong to another one
        run(runs[0], prepare(runs[0]))
        with _no_waiting():
            run(runs[0], prepare(runs[0]))
    torch.cuda.synchronize()
    first, timed, prepared, pool = None, torch.cuda.CUDAGraph(), [None] * len(runs), None
    if prepare is not nothing:
        first = torch.cuda.CUDAGraph()
        with torch.cuda.graph(first, stream=side):
            prepared = [prepare(inputs) for inputs in runs]
        pool = first.pool()
    with torch.cuda.graph(timed, pool=pool, stream=side):
        for i, inputs in enumerate(runs):
            # Backward frees what its forward kept, into the pool of the graphs and in the order of every replay.
            run(inputs, prepared[i])
    times = _replays(first, timed, seconds, repetitions)
    found = {"median_ms": statistics.median(times), "fastest_ms": min(times), "slowest_ms": max(times)}
    return {**{name: value / len(runs) for name, value in found.items()}, "repetitions": len(times) * len(runs), "timed_by": "graph"}


def _replays(first, timed, seconds, repetitions):
    """Milliseconds of each replay of `timed`; `first`, where there is one, is replayed before each."""
    def queue(events):
        if first is not None:
            first.replay()
        pair = (event(), event())
        pair[0].record()
        timed.replay()
        pair[1].record()
        events.append(pair)

    events = []
    queue(events)  # the first replay loads the graph
    torch.cuda.synchronize()
    started = time.perf_counter()
    queue(events)
    queued = time.perf_counter() - started
    torch.cuda.synchronize()
    estimate = max(events[-1][0].elapsed_time(events[-1][1]), 1e-3) / 1e3
    count = min(max(int(seconds / estimate), repetitions[0]), repetitions[1])
    events = []
    hold_queue(1.5 * queued * count + 2e-3)
    for _ in range(count):
        queue(events)
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in events]


@contextlib.contextmanager
def _no_waiting():
    """What waits for the GPU inside is an error: it could not be captured."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def context_fault():
    """Why nothing more can be measured in this process; None as long as its CUDA context works.

    A kernel's illegal access makes every later call fail, and a capture that broke off keeps the allocator from giving memory back.
    """
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:  # whatever it is: this process is at its end
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return None
