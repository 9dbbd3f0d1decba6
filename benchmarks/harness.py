"""Measures providers side by side on one workload: correctness first, then time, bandwidth and memory.

- A provider that fails the gate against float64 (benchmarks/workloads.py) shows its error instead of a time.
- Data is random and rotates among copies until it is several times larger than the L2 cache.
- Times are medians over repetitions between CUDA events, taken while the queue of the GPU is kept full: device time without gaps between launches.
  `wall_ms` is what one call alone takes on the clock, launches and a synchronisation included.
- Bandwidth counts the bytes that have to move (Workload.moved_bytes), the same for every provider, against a copy measured in the same process.
- Without CUDA the gate runs and no figure is reported.
"""
import gc
import math
import statistics
import sys
import time
from dataclasses import dataclass

import torch

from benchmarks.workloads import differentiated, fault, make_inputs

PHASES = ("forward", "backward", "both")
COPY_BYTES = 2**32  # of the copied tensor: far larger than any L2
ROTATE_OVER = 3  # the inputs together are at least so many times the L2
SECONDS_PER_PHASE = 0.3
REPETITIONS = (7, 60)


@dataclass
class Case:
    """A workload with its inputs (one set, or several that take turns) and, once measured, the copy bandwidth of this process."""

    workload: object
    device: torch.device
    sets: list
    copy_gb_per_s: float | None = None


def make_case(workload, device, copy_gb_per_s=None):
    """Random inputs for a workload, in as many sets as it takes to exceed the L2 cache."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # it allows 8 shapes per function and then gives up; each case is a shape of its own
    count = 1
    if device.type == "cuda":
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 2**26)
        count = min(max(math.ceil(ROTATE_OVER * cache / (2 * workload.tensor_bytes)), 1), 64)
    return Case(workload, device, [make_inputs(workload, device, seed) for seed in range(count)], copy_gb_per_s)


def forward(provider, case, inputs):
    """The provider's outputs for one set of inputs."""
    return provider.operations[case.workload.operation](inputs)


def backward(case, inputs, outputs):
    """The gradient of the workload for outputs that `forward` gave."""
    (gradient,) = torch.autograd.grad(differentiated(case.workload, outputs), inputs.leaf, inputs.upstream)
    return gradient


# Time -----------------------------------------------------------------------------------------------------------


def _event():
    return torch.cuda.Event(enable_timing=True)


def _hold_queue(seconds):
    """Keeps the GPU waiting while the CPU fills its queue, so that the events see no launch overhead."""
    if hasattr(torch.cuda, "_sleep"):
        torch.cuda._sleep(int(min(seconds, 0.5) * 2e9))  # cycles, at about 2 GHz


def _queue_round(provider, case, phase, events):
    """Queues one timed repetition per set of inputs, and adds its pair of events."""
    prepared = [forward(provider, case, inputs) if phase == "backward" else None for inputs in case.sets]
    for inputs, outputs in zip(case.sets, prepared, strict=True):
        pair = (_event(), _event())
        pair[0].record()
        if phase != "backward":
            outputs = forward(provider, case, inputs)
        if phase != "forward":
            backward(case, inputs, outputs)
        pair[1].record()
        events.append(pair)
        del outputs  # a graph kept into the next repetition would double the memory in use


def time_phase(provider, case, phase):
    """Median, fastest and slowest device time in milliseconds of one phase."""
    events = []
    torch.cuda.synchronize()
    started = time.perf_counter()
    _queue_round(provider, case, phase, events)  # warms up, and tells how long a round takes to queue and to run
    queued = time.perf_counter() - started
    torch.cuda.synchronize()
    estimate = max(statistics.median(a.elapsed_time(b) for a, b in events), 1e-3) / 1e3
    count = min(max(int(SECONDS_PER_PHASE / estimate), REPETITIONS[0]), REPETITIONS[1])
    rounds = math.ceil(count / len(case.sets))
    events = []
    _hold_queue(1.5 * queued * rounds + 2e-3)
    for _ in range(rounds):
        _queue_round(provider, case, phase, events)
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in events]
    result = {"median_ms": statistics.median(times), "fastest_ms": min(times), "slowest_ms": max(times), "repetitions": len(times)}
    result["wall_ms"] = wall_time(provider, case, phase)
    result["bytes"] = case.workload.moved_bytes(phase)
    result["gb_per_s"] = result["bytes"] / result["median_ms"] / 1e6
    if case.copy_gb_per_s:
        result["percent_of_copy"] = 100 * result["gb_per_s"] / case.copy_gb_per_s
    return result


def wall_time(provider, case, phase, repetitions=7):
    """Median milliseconds on the clock of one call alone, from an idle GPU to its end."""
    times = []
    for i in range(repetitions):
        inputs = case.sets[i % len(case.sets)]
        outputs = forward(provider, case, inputs) if phase == "backward" else None
        torch.cuda.synchronize()
        started = time.perf_counter()
        if phase != "backward":
            outputs = forward(provider, case, inputs)
        if phase != "forward":
            backward(case, inputs, outputs)
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def copy_bandwidth(device, size=COPY_BYTES, repetitions=20):
    """Read plus written bytes per second of a device copy of random data, {"gb_per_s", "median_ms", "bytes"}."""
    source = torch.randint(-(2**31), 2**31 - 1, (size // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    warm_up = 10
    events = [(_event(), _event()) for _ in range(warm_up + repetitions)]
    for start, end in events:
        start.record()
        target.copy_(source)
        end.record()
    torch.cuda.synchronize()
    median = statistics.median(a.elapsed_time(b) for a, b in events[warm_up:])
    return {"gb_per_s": 2 * size / median / 1e6, "median_ms": median, "bytes": 2 * size}


# Memory ---------------------------------------------------------------------------------------------------------


def memory(provider, case):
    """What forward and backward allocate beside the inputs, and what is held between them, in bytes.

    peak_bytes: the most that was allocated at once, inputs excluded, gradient included. held_bytes: allocated between forward and backward, outputs
    excluded. `limit_ratio` is inputs and peak together over inputs and one gradient: 1 is the least that is possible.
    """
    inputs = case.sets[0]
    forward(provider, case, inputs)  # compilers and caches allocate on the first call
    release()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = forward(provider, case, inputs)
    held = torch.cuda.memory_allocated() - before - sum(output.nbytes for output in outputs)
    gradient = backward(case, inputs, outputs)
    peak = torch.cuda.max_memory_allocated() - before
    tensors = inputs.p.nbytes + inputs.q.nbytes
    return {
        "peak_bytes": peak, "held_bytes": held, "held_bytes_per_row": held / case.workload.rows, "input_bytes": tensors,
        "gradient_bytes": gradient.nbytes, "limit_ratio": (tensors + peak) / (tensors + gradient.nbytes),
    }


def release():
    """Gives memory back that nothing refers to, so that the next measurement starts from the same state."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


# One row of the results -----------------------------------------------------------------------------------------


def measure(provider, case, phases=PHASES, with_memory=True):
    """One row of the results, {"workload", "provider", "status", "reason", "error", "times", "memory"}.

    status is "ok", or without figures "missing" (not here), "wrong" (failed the gate) or "failed" (raised), with the reason.
    """
    row = {"workload": case.workload.as_dict(), "provider": provider.name, "status": "ok", "reason": None, "error": {}, "times": {}, "memory": {}}
    missing = provider.why_not(case.workload.operation)
    if missing:
        return {**row, "status": "missing", "reason": missing}
    try:
        outputs = forward(provider, case, case.sets[0])
        gradient = backward(case, case.sets[0], outputs)
        row["error"], wrong = fault(case.workload, case.sets[0], outputs, gradient)
        del outputs, gradient
        if wrong:
            return {**row, "status": "wrong", "reason": wrong}
        if case.device.type == "cuda":
            if with_memory:
                row["memory"] = memory(provider, case)
            for phase in phases:
                row["times"][phase] = time_phase(provider, case, phase)
    except Exception as error:  # a provider may fail in any way; the others still have to be measured
        reason = f"{type(error).__name__}: {error}"
        row.update(status="failed", reason=reason[:2000], times={}, memory={})
    return row


def summary(row):
    """One line of text for a row of the results."""
    head = f"{row['workload']['name']:<52} {row['provider']:<14}"
    if row["status"] != "ok":
        return f"{head} {row['status']}: {row['reason'].splitlines()[0][:120]}"
    if not row["times"]:
        return f"{head} correct, no times without a GPU"
    cells = []
    for phase, result in row["times"].items():
        percent = f" {result['percent_of_copy']:5.1f}%" if "percent_of_copy" in result else ""
        cells.append(f"{phase} {result['median_ms']:9.4f} ms{percent}")
    return f"{head} " + "  ".join(cells)
