"""Measures providers side by side on one workload: correctness first, then time, bandwidth and memory.

- A provider that fails the gate against float64 (benchmarks/workloads.py) shows its error instead of a time. The answer is computed once per case.
- Data is random and rotates among copies until it is several times larger than the L2 cache.
- Times are medians over repetitions between CUDA events, taken while the queue of the GPU is kept full: device time without gaps between launches.
  Runs of less than 50 microseconds are replayed as a CUDA graph where they can be captured (benchmarks/graphs.py); "timed_by" says which it was.
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

from benchmarks.graphs import event, hold_queue, nothing, replayed_time
from benchmarks.linear_providers import bare_products, floor_chunks
from benchmarks.linear_workloads import PRODUCTS, expected, linear_fault, make_linear_inputs
from benchmarks.peers import NotOfferedError
from benchmarks.workloads import differentiated, fault, make_inputs, truth

PHASES = ("forward", "backward", "both")
COPY_BYTES = 2**32  # of the copied tensor: far larger than any L2
ROTATE_OVER = 3  # the inputs together are at least so many times the L2
SECONDS_PER_PHASE = 0.2
REPETITIONS = (7, 40)  # of up to 20 launches each: the queue holds about 1024
GRAPH_BELOW_MS = 0.05
FLOOR = "cuBLAS products"


@dataclass
class Case:
    """A workload with its inputs (one set, or several that take turns) and, once measured, the copy bandwidth of this process.

    expected: what the gate compares with, computed once for all providers.
    """

    workload: object
    device: torch.device
    sets: list
    copy_gb_per_s: float | None = None
    expected: object = None


def make_case(workload, device, copy_gb_per_s=None, make=make_inputs):
    """Random inputs for a workload, in as many sets as it takes to exceed the L2 cache."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # it allows 8 shapes per function and then gives up; each case is a shape of its own
    count = 1
    if device.type == "cuda":
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 2**26)
        count = min(max(math.ceil(ROTATE_OVER * cache / read_bytes(workload)), 1), 64)
    return Case(workload, device, [make(workload, device, seed) for seed in range(count)], copy_gb_per_s)


def read_bytes(workload):
    """What one call reads at least."""
    return workload.moved_bytes("forward") if hasattr(workload, "moved_bytes") else 2 * workload.tensor_bytes


def forward(provider, case, inputs):
    """The provider's outputs for one set of inputs."""
    return provider.operations[case.workload.operation](inputs)


def backward(case, inputs, outputs):
    """The gradient of the workload for outputs that `forward` gave."""
    (gradient,) = torch.autograd.grad(differentiated(case.workload, outputs), inputs.leaf, inputs.upstream)
    return gradient


# Time -----------------------------------------------------------------------------------------------------------


def _queue_round(sets, run, prepare, events):
    """Queues one timed repetition per set of inputs, and adds its pair of events."""
    prepared = [prepare(inputs) for inputs in sets]
    for inputs, before in zip(sets, prepared, strict=True):
        pair = (event(), event())
        pair[0].record()
        run(inputs, before)
        pair[1].record()
        events.append(pair)


def device_time(sets, run, prepare=nothing):
    """Median, fastest and slowest device time in milliseconds of run(inputs, prepare(inputs)), the preparation not counted."""
    run(sets[0], prepare(sets[0]))  # compiles, and fills the caches: no part of the estimate
    events = []
    torch.cuda.synchronize()
    started = time.perf_counter()
    _queue_round(sets, run, prepare, events)  # warms up, and tells how long a round takes to queue and to run
    queued = time.perf_counter() - started
    torch.cuda.synchronize()
    estimate = max(statistics.median(a.elapsed_time(b) for a, b in events), 1e-3) / 1e3
    count = min(max(int(SECONDS_PER_PHASE / estimate), REPETITIONS[0]), REPETITIONS[1])
    rounds = max(min(math.ceil(count / len(sets)), REPETITIONS[1] // len(sets)), 1)
    events = []
    hold_queue(1.5 * queued * rounds + 2e-3)
    for _ in range(rounds):
        _queue_round(sets, run, prepare, events)
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in events]
    return {"median_ms": statistics.median(times), "fastest_ms": min(times), "slowest_ms": max(times), "repetitions": len(times),
            "timed_by": "events"}


def short_time(figures, sets, run, prepare=nothing):
    """The figures of device_time; those of a run shorter than GRAPH_BELOW_MS by a graph instead, or with the reason why there is none.

    "by_events_ms" keeps the median of the events. Never raises: what was measured must not be lost.
    """
    if figures["median_ms"] >= GRAPH_BELOW_MS:
        return figures
    try:
        return {**replayed_time(sets, run, prepare, SECONDS_PER_PHASE, REPETITIONS), "by_events_ms": figures["median_ms"]}
    except Exception as error:
        return {**figures, "no_graph": f"{type(error).__name__}: {error}"[:300]}


def wall_time(sets, run, prepare=nothing, repetitions=7):
    """Median milliseconds on the clock of one call alone, from an idle GPU to its end."""
    times = []
    for i in range(repetitions):
        inputs = sets[i % len(sets)]
        before = prepare(inputs)
        torch.cuda.synchronize()
        started = time.perf_counter()
        run(inputs, before)
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - started))
        del before  # a graph kept into the next repetition would double the memory in use
    return statistics.median(times)


def phase_steps(provider, case, phase):
    """(run, prepare) of a phase, as device_time takes them."""
    def run(inputs, outputs):
        if phase != "backward":
            outputs = forward(provider, case, inputs)
        if phase != "forward":
            backward(case, inputs, outputs)

    return run, (lambda inputs: forward(provider, case, inputs)) if phase == "backward" else nothing


def time_phase(provider, case, phase):
    """The figures of one phase: device time, time on the clock, bytes and bandwidth."""
    return with_graphs(provider, case, {phase: _by_events(provider, case, phase)})[phase]


def _by_events(provider, case, phase):
    run, prepare = phase_steps(provider, case, phase)
    figures = device_time(case.sets, run, prepare)
    return with_bandwidth({**figures, "wall_ms": wall_time(case.sets, run, prepare, wall_repetitions(figures))}, case, phase)


def with_graphs(provider, case, times):
    """The figures of the phases, with those of short runs by graphs. After all phases: a capture that fails may be the last thing a process does."""
    return {phase: with_bandwidth(figures | short_time(figures, case.sets, *phase_steps(provider, case, phase)), case, phase)
            for phase, figures in times.items()}


def wall_repetitions(figures):
    """How often one call alone is timed: launches matter to short ones."""
    return 7 if figures["median_ms"] < 5 else 3


def with_bandwidth(figures, case, phase):
    """The figures with the bytes that have to move, per second and against a copy."""
    figures = {**figures, "bytes": case.workload.moved_bytes(phase)}
    figures["gb_per_s"] = figures["bytes"] / figures["median_ms"] / 1e6
    if case.copy_gb_per_s:
        figures["percent_of_copy"] = 100 * figures["gb_per_s"] / case.copy_gb_per_s
    return figures


def copy_bandwidth(device, size=COPY_BYTES, repetitions=20):
    """Read plus written bytes per second of a device copy of random data, {"gb_per_s", "median_ms", "bytes"}."""
    source = torch.randint(-(2**31), 2**31 - 1, (size // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    warm_up = 10
    events = [(event(), event()) for _ in range(warm_up + repetitions)]
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


def gate(provider, case):
    """(errors, what is wrong or None) of one call against float64."""
    inputs = case.sets[0]
    if case.expected is None:
        case.expected = truth(case.workload, inputs)
        release()  # the blocks in float64
    outputs = forward(provider, case, inputs)
    return fault(case.workload, inputs, outputs, backward(case, inputs, outputs), case.expected)


def measure(provider, case, phases=PHASES, with_memory=True):
    """One row of the results (row_of) for an operation on logits."""
    def fill(row):
        row["error"], wrong = gate(provider, case)
        if wrong:
            row.update(status="wrong", reason=wrong)
        elif case.device.type == "cuda":
            if with_memory:
                row["memory"] = memory(provider, case)
            for phase in phases:
                row["times"][phase] = _by_events(provider, case, phase)
            row["times"] = with_graphs(provider, case, row["times"])

    return row_of(provider, case, fill)


def row_of(provider, case, fill):
    """One row of the results, empty_row filled in by fill(row).

    status is "ok", or without figures "missing" (not here, or not offered), "wrong" (failed the gate) or "failed" (raised), with the reason.
    """
    row = empty_row(case.workload, provider.name, note=provider.note(case.workload.operation))
    missing = provider.why_not(case.workload.operation)
    if missing:
        return {**row, "status": "missing", "reason": missing}
    try:
        fill(row)
    except NotOfferedError as error:
        row.update(status="missing", reason=str(error))
    except Exception as error:  # a provider may fail in any way; the others still have to be measured
        reason = f"{type(error).__name__}: {error}"
        row.update(status="failed", reason=reason[:2000], times={}, memory={})
    return row


def empty_row(workload, provider, status="ok", reason=None, note=None):
    """A row without figures. note: in one line which work the provider does."""
    return {"workload": workload.as_dict(), "provider": provider, "note": note, "status": status, "reason": reason,
            "error": {}, "times": {}, "memory": {}}


def summary(row):
    """One line of text for a row of the results."""
    head = f"{row['workload']['name']:<52} {row['provider']:<14}"
    if row["status"] != "ok" or not row["times"]:
        return f"{head} {_why_no_times(row)}"
    cells = []
    for phase, result in row["times"].items():
        percent = f" {result['percent_of_copy']:5.1f}%" if "percent_of_copy" in result else ""
        by_graph = " (graph)" if result.get("timed_by") == "graph" else ""
        cells.append(f"{phase} {result['median_ms']:9.4f} ms{percent}{by_graph}")
    return f"{head} " + "  ".join(cells)


def _why_no_times(row):
    """What stands in the place of figures."""
    return "correct, no times without a GPU" if row["status"] == "ok" else f"{row['status']}: {row['reason'].splitlines()[0][:120]}"


# From hidden states ---------------------------------------------------------------------------------------------


def make_linear_case(workload, device, known=None):
    """Random inputs for a LinearWorkload and what the gate compares with; known: that, where an earlier case of this workload has it."""
    case = make_case(workload, device, make=make_linear_inputs)
    case.expected = known or expected(workload, case.sets[0])
    release()
    return case


def linear_step(provider, case, inputs):
    """(outputs, gradients) of one call: forward without gradient, or forward and backward."""
    with torch.set_grad_enabled(bool(inputs.leaves)):
        outputs = forward(provider, case, inputs)
    return outputs, inputs.gradients(outputs)


def measure_linear(provider, case, floor=None):
    """One row of the results (row_of) for a LinearWorkload; `floor` is the row of measure_floor, without which there are no ratios."""
    def fill(row):
        outputs, gradients = linear_step(provider, case, case.sets[0])
        row["error"], wrong = linear_fault(case.workload, case.sets[0], case.expected, outputs, gradients)
        del outputs, gradients
        if wrong:
            row.update(status="wrong", reason=wrong)
        elif case.device.type == "cuda":
            row["memory"] = linear_memory(provider, case)
            times = device_time(case.sets, lambda inputs, _: linear_step(provider, case, inputs))
            times["wall_ms"] = wall_time(case.sets, lambda inputs, _: linear_step(provider, case, inputs), repetitions=wall_repetitions(times))
            row["times"][case.workload.phase] = with_rates(times, case.workload, floor)

    return row_of(provider, case, fill)


def measure_floor(case):
    """The row of the bare cuBLAS products of a LinearWorkload: the fastest of several chunk sizes; "tried" holds the median of each."""
    tried, best = {}, None
    for chunk in floor_chunks(case.workload.rows):
        try:
            times = device_time(case.sets, bare_products(case.workload, case.sets[0], chunk))
        except torch.OutOfMemoryError as error:
            tried[str(chunk)] = f"out of memory: {error}"[:200]
        else:
            tried[str(chunk)] = times["median_ms"]
            if best is None or times["median_ms"] < best["median_ms"]:
                best = {**times, "chunk": chunk}
        release()
    note = f"{PRODUCTS[case.workload.mode]} products into 16-bit buffers, and nothing else"
    row = empty_row(case.workload, FLOOR, note=note)
    if best is None:
        return {**row, "status": "failed", "reason": "; ".join(tried.values())}
    return {**row, "times": {case.workload.phase: {**with_rates(best, case.workload), "tried": tried}}}


def with_rates(times, workload, floor=None):
    """The times with what they mean: floating-point operations of the products that have to be done, per second, and the ratio to the floor."""
    times = {**times, "flop": workload.flop, "tflop_per_s": workload.flop / times["median_ms"] / 1e9}
    if floor and floor["times"]:
        times["ratio_to_floor"] = times["median_ms"] / floor["times"][workload.phase]["median_ms"]
    return times


def linear_memory(provider, case):
    """What one call allocates beside its inputs, in bytes; a call before this one has filled the caches.

    peak_bytes: the most that was allocated at once, inputs excluded. returned_bytes: outputs and gradients, some of them in the peak.
    """
    release()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs, gradients = linear_step(provider, case, case.sets[0])
    peak = torch.cuda.max_memory_allocated() - before
    returned = sum(tensor.nbytes for tensor in (*outputs, *gradients))
    return {"peak_bytes": peak, "returned_bytes": returned}


LINEAR_HEAD = f"{'mode and shape':<40} {'provider':<15} {'median ms':>10} {'x floor':>8} {'TFLOP/s':>8} {'peak':>12}  error"


def linear_summary(row):
    """One line of text for a row of a LinearWorkload, under LINEAR_HEAD."""
    head = f"{row['workload']['name']:<40} {row['provider']:<15}"
    if row["status"] != "ok" or not row["times"]:
        return f"{head} {_why_no_times(row)}"
    (times,) = row["times"].values()
    ratio = f"{times['ratio_to_floor']:8.3f}" if "ratio_to_floor" in times else f"{'-':>8}"
    peak = f"{row['memory']['peak_bytes'] / 1e9:9.3f} GB" if row["memory"] else f"{'-':>12}"
    error = "  ".join(f"{name} {value:.0e}" for name, value in row["error"].items() if "," not in name)
    return f"{head} {times['median_ms']:10.3f} {ratio} {times['tflop_per_s']:8.1f} {peak}  {error}"


def linear_table(rows):
    """The lines of a table: providers side by side for each workload, in the order in which the workloads came."""
    names = list(dict.fromkeys(row["workload"]["name"] for row in rows))
    return [LINEAR_HEAD, *(linear_summary(row) for row in sorted(rows, key=lambda row: names.index(row["workload"]["name"])))]
