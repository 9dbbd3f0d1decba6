"""Measure one provider on one case, correctness before time, rates and memory; returns a row.

- A provider that fails the gate against float64 (cases.py, linear_cases.py) has no time.
- Times are medians of triton.testing.do_bench, which flushes the L2 cache before each run. A run
  shorter than GRAPH_BELOW_MS is repeated in a CUDA graph (do_bench_cudagraph) if it can be
  captured: events between single launches would time the CPU. In a graph, inputs rotate among
  copies several times larger than the L2. "timed_by" names the method.
- `wall_ms` is the wall time of one call, including launches and a synchronisation.
- Bandwidth counts the minimum bytes moved (moved_bytes), the same for every provider, relative to a
  copy measured in the same process. From hidden states it is TFLOP/s of the minimum GEMMs.
"""

import contextlib
import gc
import itertools
import math
import statistics
import sys
import timeit

import torch

from benchmarks import cases, linear_cases
from benchmarks.work import NotOfferedError, gradients

COPY_BYTES = 2**32  # size of the copied tensor: far larger than any L2
WARM_UP_MS, TIMED_MS, GRAPH_MS = 50, 250, 20
GRAPH_BELOW_MS = 0.2
ROTATE_OVER, MOST_SETS = 3, 64  # all inputs together: at least this many times the L2
FLOOR_CHUNKS = (2**62, 4096, 2048)  # chunk sizes tried for the floor, in tokens: all, and fewer
# Makers of inputs and truth, by kind of case.
KINDS = {
    cases.Workload: (cases.make_inputs, cases.truth),
    linear_cases.LinearWorkload: (linear_cases.make_linear_inputs, linear_cases.linear_truth),
}


def row_of(workload, provider, status, reason, **figures):
    """Return a row of the results. status is "ok" or, without figures and with a reason, "missing"
    (not here, or not this size), "not offered" (no such operation), "wrong" (failed the gate) or
    "failed" (raised).
    """
    return {
        "workload": workload.as_dict(),
        "provider": provider,
        "status": status,
        "reason": reason,
        **{"note": None, "error": {}, "times": {}, "memory": {}},
        **figures,
    }


def measure(provider, workload, device, copy=None):
    """Measure one provider on one workload; copy: GB/s of a copy here, None to check only."""
    named, note = (workload, provider.name), provider.note(workload.operation)
    if missing := provider.why_not(workload.operation):
        return row_of(*named, "missing" if provider.missing else "not offered", missing)
    try:
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # limit of 8 shapes per function; each case has its own
            # Timing backward alone repeats it, so forward's saved tensors must be kept.
            torch._functorch.config.donated_buffer = "backward" not in workload.phases
        work = provider.operations[workload.operation]
        return row_of(*named, **_figures(work, workload, device, copy), note=note)
    except NotOfferedError as error:
        return row_of(*named, "missing", str(error))
    except Exception as error:  # any failure: measure the other providers
        return row_of(*named, "failed", f"{type(error).__name__}: {error}"[:2000], note=note)


def _figures(work, workload, device, copy):
    make, truth = KINDS[type(workload)]
    sets = _inputs(workload, device, make, copy)

    def forward(inputs):
        with torch.set_grad_enabled(bool(inputs.leaves)):
            return work(inputs)

    def both(inputs):
        outputs = forward(inputs)
        return outputs, gradients(inputs, outputs)

    error, wrong = cases.fault(truth(workload, sets[0]), [*itertools.chain(*both(sets[0]))])
    if wrong or not copy:
        return {"status": "wrong" if wrong else "ok", "reason": wrong, "error": error}
    memory = _memory(forward, sets[0])
    pairs = [(i, forward(i)) for i in sets] if "backward" in workload.phases else []
    runs = {
        "forward": (forward, sets),
        "backward": (lambda pair: gradients(*pair, retain_graph=True), pairs),
        "both": (both, sets),
    }
    times = {p: {**timed(*runs[p]), "wall_ms": wall_time(*runs[p])} for p in workload.phases}
    for phase, figures in times.items():
        if phase != "backward":  # its forward would be outside the graph
            figures |= by_graph(figures, *runs[phase])
        figures |= workload.rates(phase, figures["median_ms"], copy)
    return {
        "status": "ok",
        "reason": None,
        "error": error,
        "memory": memory,
        "times": times,
        "copy_gb_per_s": copy,
    }


def measure_floor(workload, device, copy):
    """Measure the bare cuBLAS GEMMs at the fastest chunk size; "tried" has the median of each
    size.
    """
    sets = _inputs(workload, device, linear_cases.make_linear_inputs, copy)
    tried, (phase,) = {}, workload.phases
    for chunk in {min(chunk, workload.rows) for chunk in FLOOR_CHUNKS}:
        with contextlib.suppress(torch.OutOfMemoryError):  # fewer tokens at a time fit
            run = linear_cases.bare_products(workload, sets[0], chunk)
            tried[str(chunk)] = {**timed(run, sets), "chunk": chunk}
    if not tried:
        return row_of(
            workload, linear_cases.FLOOR, "failed", "OutOfMemoryError with every chunk size"
        )
    best = min(tried.values(), key=lambda figures: figures["median_ms"])
    medians = {size: figures["median_ms"] for size, figures in tried.items()}
    times = {phase: best | workload.rates(phase, best["median_ms"], copy) | {"tried": medians}}
    note = f"{linear_cases.PRODUCTS[workload.mode]} products into 16-bit buffers, and nothing else"
    return row_of(workload, linear_cases.FLOOR, "ok", None, note=note, times=times)


def _inputs(workload, device, make, copy):
    """Make random inputs; for timing, enough sets to exceed the L2 cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size if copy else 1
    count = math.ceil(ROTATE_OVER * cache / workload.moved_bytes("forward"))
    return [make(workload, device, seed) for seed in range(min(count, MOST_SETS))]


# Time


def timed(run, sets):
    """Time run(inputs), cycling through the sets; milliseconds of device time."""
    from triton.testing import do_bench

    turns = itertools.cycle(sets)
    times = do_bench(lambda: run(next(turns)), WARM_UP_MS, TIMED_MS, return_mode="all")
    return _median(times, timed_by="events")


def by_graph(figures, run, sets):
    """Replace the figures of a short run by a graph's, or add the reason for not having one.
    "by_events_ms" keeps the median from events. Never raises, so that measured figures are kept.
    """
    from triton.testing import do_bench_cudagraph

    if figures["median_ms"] >= GRAPH_BELOW_MS:
        return figures
    turns, outside = itertools.cycle(sets), torch.cuda.current_stream()
    try:
        torch.cuda.set_sync_debug_mode("error")  # a run that synchronises cannot be captured
        run(next(turns))
        torch.cuda.set_sync_debug_mode("default")
        times = do_bench_cudagraph(lambda: run(next(turns)), rep=GRAPH_MS, return_mode="all")
        return _median(times, timed_by="graph", by_events_ms=figures["median_ms"])
    except Exception as error:
        return {**figures, "no_graph": f"{type(error).__name__}: {error}"[:300]}
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.set_stream(outside)  # a failed capture leaves its own stream current


def _median(times, **others):
    ends = {"fastest_ms": min(times), "slowest_ms": max(times), "repetitions": len(times)}
    return {"median_ms": statistics.median(times), **ends, **others}


def wall_time(run, sets):
    turns = itertools.cycle(sets)
    torch.cuda.synchronize()
    calls = timeit.repeat(lambda: (run(next(turns)), torch.cuda.synchronize()), number=1, repeat=5)
    return 1e3 * statistics.median(calls)


def copy_bandwidth(device):
    source = torch.randint(2**31 - 1, (COPY_BYTES // 4,), dtype=torch.int32, device=device)
    return 2 * source.nbytes / timed(torch.empty_like(source).copy_, [source])["median_ms"] / 1e6


# Memory


def _memory(forward, inputs):
    """Return the peak allocation in addition to the inputs, including gradients. held_bytes:
    allocated between forward and backward, without outputs.
    """
    release()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = forward(inputs)
    held = torch.cuda.memory_allocated() - before - sum(o.nbytes for o in outputs)
    returned = sum(gradient.nbytes for gradient in gradients(inputs, outputs))
    peak = torch.cuda.max_memory_allocated() - before
    return {"peak_bytes": peak, "held_bytes": held, "gradient_bytes": returned}


def release():
    """Free unreferenced memory, so that each measurement starts from the same state."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def context_fault():
    """Return why this process cannot measure any more; None while its CUDA context works. A
    kernel's illegal access makes every later call fail, and an aborted capture keeps the allocator
    from freeing memory.
    """
    try:
        release()
    except Exception as error:  # any error: this process is unusable
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]
