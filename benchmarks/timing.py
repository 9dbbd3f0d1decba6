"""Measures one provider at one case: correctness first, then time, bandwidth and memory: a row.

- A provider that fails the gate against float64 (cases.py, linear_cases.py) has its error and no time.
- Times are medians of triton.testing.do_bench, which flushes the L2 cache before each run. A run
  shorter than GRAPH_BELOW_MS is repeated in a CUDA graph (do_bench_cudagraph) where it can be
  captured: events between single launches would time the CPU. There inputs rotate among copies
  several times larger than the L2. "timed_by" says which it was.
- `wall_ms` is one call alone on the clock, launches and a synchronisation included.
- Bandwidth counts the bytes that have to move (moved_bytes), the same for every provider, against a
  copy measured in the same process. From hidden states it is TFLOP/s of the products that have to
  be done.
"""

import gc
import itertools
import math
import statistics
import sys
import time

import torch

from benchmarks.cases import PHASES, fault, gradient_of, make_inputs, truth
from benchmarks.linear_cases import (
    FLOOR,
    LinearWorkload,
    bare_products,
    expected,
    linear_fault,
    make_linear_inputs,
)
from benchmarks.work import NotOfferedError

COPY_BYTES = 2**32  # of the copied tensor: far larger than any L2
WARM_UP_MS, TIMED_MS, GRAPH_MS = 50, 250, 20
GRAPH_BELOW_MS = 0.2
ROTATE_OVER, MOST_SETS = 3, 64  # the inputs together are at least so many times the L2
FLOOR_CHUNKS = (2**62, 4096, 2048)  # tokens at a time with which the floor is tried: all, and fewer


def measure(provider, workload, device, copy=None):
    """Returns the row of one provider at one workload; copy: GB/s of a copy here, None to check only.

    status is "ok", or without figures "missing" (not here, or not this size), "not offered" (no such
    operation), "wrong" (failed the gate) or "failed" (raised), with the reason.
    """
    row = {
        **no_figures(workload, provider.name, "ok", None),
        "note": provider.note(workload.operation),
    }
    if missing := provider.why_not(workload.operation):
        return {
            **row,
            "status": "missing" if provider.missing else "not offered",
            "reason": missing,
        }
    linear = isinstance(workload, LinearWorkload)
    try:
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # it allows 8 shapes per function; each case is a shape of its own
        work = provider.operations[workload.operation]
        row |= (_linear_figures if linear else _logits_figures)(work, workload, device, copy)
    except NotOfferedError as error:
        row |= {"status": "missing", "reason": str(error)}
    except (
        Exception
    ) as error:  # a provider may fail in any way; the others still have to be measured
        row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:2000]}
    return row


def no_figures(workload, provider, status, reason):
    """Returns a row that only says why there are no figures."""
    row = {"workload": workload.as_dict(), "provider": provider, "note": None, "status": status}
    return {**row, "reason": reason, "error": {}, "times": {}, "memory": {}}


def _logits_figures(work, workload, device, copy):
    sets = _inputs(workload, device, make_inputs, copy)
    first = sets[0]
    outputs = work(first)
    gradient = gradient_of(workload, first, outputs)
    error, wrong = fault(workload, first, outputs, gradient, truth(workload, first))
    del outputs, gradient
    if wrong or not copy:
        return {"error": error, "status": "wrong" if wrong else "ok", "reason": wrong}
    found = {"error": error, "memory": _memory(workload, work, first)}
    prepared = [(inputs, work(inputs)) for inputs in sets]
    runs = {
        "forward": (work, sets),
        "backward": (lambda pair: gradient_of(workload, *pair, retain_graph=True), prepared),
        "both": (lambda inputs: gradient_of(workload, inputs, work(inputs)), sets),
    }
    times = {phase: {**timed(*runs[phase]), "wall_ms": wall_time(*runs[phase])} for phase in PHASES}
    for phase in ("forward", "both"):  # last: a capture that fails may be the end of the process
        times[phase] = by_graph(times[phase], *runs[phase])
    for phase, figures in times.items():
        moved = workload.moved_bytes(phase)
        figures |= {"bytes": moved, "gb_per_s": moved / figures["median_ms"] / 1e6}
        figures["percent_of_copy"] = 100 * figures["gb_per_s"] / copy
    return {**found, "times": times, "copy_gb_per_s": copy}


def _linear_figures(work, workload, device, copy):
    sets = _inputs(workload, device, make_linear_inputs, copy)

    def step(inputs):
        with torch.set_grad_enabled(bool(inputs.leaves)):
            outputs = work(inputs)
        return outputs, inputs.gradients(outputs)

    known = expected(workload, sets[0])
    error, wrong = linear_fault(workload, sets[0], known, *step(sets[0]))
    del known
    if wrong or not copy:
        return {"error": error, "status": "wrong" if wrong else "ok", "reason": wrong}
    memory = _peak(lambda: step(sets[0]))
    times = {**timed(step, sets), "wall_ms": wall_time(step, sets)}
    return {"error": error, "memory": memory, "times": {workload.phase: with_rate(times, workload)}}


def measure_floor(workload, device):
    """Returns the row of the bare cuBLAS products: the fastest of several chunk sizes.

    "tried" holds the median of each.
    """
    sets = _inputs(workload, device, make_linear_inputs, 1.0)
    tried, best, note = {}, None, None
    for chunk in sorted({min(chunk, workload.rows) for chunk in FLOOR_CHUNKS}, reverse=True):
        try:
            work = bare_products(workload, sets[0], chunk)
            times = timed(work, sets)
        except torch.OutOfMemoryError as error:
            tried[str(chunk)] = f"out of memory: {error}"[:200]
            continue
        tried[str(chunk)], note = times["median_ms"], work.note
        if best is None or times["median_ms"] < best["median_ms"]:
            best = {**times, "chunk": chunk}
    if best is None:
        return no_figures(workload, FLOOR, "failed", "; ".join(tried.values()))
    times = {workload.phase: {**with_rate(best, workload), "tried": tried}}
    return {**no_figures(workload, FLOOR, "ok", None), "note": note, "times": times}


def with_rate(times, workload):
    """Adds the floating-point operations that have to be done, and their rate."""
    rate = workload.flop / times["median_ms"] / 1e9
    return {**times, "flop": workload.flop, "tflop_per_s": rate}


def _inputs(workload, device, make, copy):
    """Makes random inputs, for timing in as many sets as it takes to exceed the L2 cache."""
    count = 1
    if copy:
        cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 2**26)
        count = min(math.ceil(ROTATE_OVER * cache / workload.read_bytes), MOST_SETS)
    return [make(workload, device, seed) for seed in range(count)]


# Time


def timed(run, sets):
    """Times run(inputs), each time with the next of the sets; milliseconds of device time."""
    from triton.testing import do_bench

    turns = itertools.cycle(sets)
    options = {"warmup": WARM_UP_MS, "rep": TIMED_MS, "return_mode": "all"}
    return {**_median(do_bench(lambda: run(next(turns)), **options)), "timed_by": "events"}


def by_graph(figures, run, sets):
    """Replaces the figures of a short run by a graph's, or adds the reason why there is none.

    "by_events_ms" keeps the median of the events. Never raises: what was measured must not be lost.
    """
    from triton.testing import do_bench_cudagraph

    if figures["median_ms"] >= GRAPH_BELOW_MS:
        return figures
    turns, outside = itertools.cycle(sets), torch.cuda.current_stream()
    try:
        torch.cuda.set_sync_debug_mode("error")  # a run that waits for the GPU cannot be captured
        run(next(turns))
        torch.cuda.set_sync_debug_mode("default")
        times = do_bench_cudagraph(lambda: run(next(turns)), rep=GRAPH_MS, return_mode="all")
    except Exception as error:
        return {**figures, "no_graph": f"{type(error).__name__}: {error}"[:300]}
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.set_stream(outside)  # a capture that failed leaves its own stream behind
    by_events = {"timed_by": "graph", "by_events_ms": figures["median_ms"]}
    return {**figures, **_median(times), **by_events}


def _median(times):
    ends = {"fastest_ms": min(times), "slowest_ms": max(times)}
    return {"median_ms": statistics.median(times), **ends, "repetitions": len(times)}


def wall_time(run, sets, repetitions=5):
    """Returns the median milliseconds on the clock of one call alone, from an idle GPU to its end."""
    times = []
    for inputs in itertools.islice(itertools.cycle(sets), repetitions):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run(inputs)
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def copy_bandwidth(device):
    """Returns read plus written GB/s of a device copy of random data."""
    numbers = {"dtype": torch.int32, "device": device}
    source = torch.randint(-(2**31), 2**31 - 1, (COPY_BYTES // 4,), **numbers)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(target.copy_, [source])["median_ms"] / 1e6


# Memory


def _peak(step):
    """Returns the most that a step allocates at once beside what is there, and what it returns."""
    release()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs, gradients = step()
    peak = torch.cuda.max_memory_allocated() - before
    returned = sum(tensor.nbytes for tensor in (*outputs, *gradients))
    return {"peak_bytes": peak, "returned_bytes": returned}


def _memory(workload, work, inputs):
    """Returns the peak of forward and backward, and what is held between them, outputs excluded.

    limit_ratio is inputs and peak together over inputs and one gradient: 1 is the least possible.
    """
    held = []

    def step():
        before = torch.cuda.memory_allocated()
        outputs = work(inputs)
        held.append(torch.cuda.memory_allocated() - before - sum(o.nbytes for o in outputs))
        return outputs, [gradient_of(workload, inputs, outputs)]

    found, tensors = _peak(step), inputs.p.nbytes + inputs.q.nbytes
    least = tensors + inputs.leaf.nbytes
    sizes = {"held_bytes": held[0], "held_bytes_per_row": held[0] / workload.rows}
    return {**found, **sizes, "limit_ratio": (tensors + found["peak_bytes"]) / least}


def release():
    """Gives back memory without references, so that the next measurement starts from the same state."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def context_fault():
    """Says why nothing more can be measured in this process; None as long as its CUDA context works.

    A kernel's illegal access makes every later call fail, and a capture that broke off keeps the
    allocator from giving memory back.
    """
    try:
        release()
    except Exception as error:  # whatever it is: this process is at its end
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return None
