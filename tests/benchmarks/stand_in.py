# Stands in for a GPU: CPU tensors, a clock for CUDA events, a constant for its memory.

import multiprocessing
import os
import timeit
import types
from functools import partial

import torch
from triton import testing

from benchmarks import cases, linear_cases, processes, speed, suites, timing, work

LOGITS = (
    cases.Workload(rows=6, vocabulary=97, dtype="fp32"),
    cases.Workload(rows=4, vocabulary=97),
)
LINEAR = (
    linear_cases.LinearWorkload("loss", 12, 16, 131),
    linear_cases.LinearWorkload("forward", 12, 16, 131),
    linear_cases.LinearWorkload("js", 12, 16, 131),
)
DIVERGENCES = tuple(cases.Workload(name, 4, 97, wrt="q") for name in ("mean_js", *work.FAMILY))
SECTIONS = {
    "main": suites.Section(LOGITS, ()),
    "divergences": suites.Section(DIVERGENCES, ("fastkl",)),
    "linear": suites.Section(LINEAR, (linear_cases.FLOOR, "fastkl")),
}


# Forks processes from one that has imported these and keeps the environment of its start.
READY = multiprocessing.get_context("forkserver")
READY.set_forkserver_preload(["triton.testing", "torch.fx.experimental.symbolic_shapes"])


# Put the device in the place of CUDA, in processes too; put: setattr, or monkeypatch's.
def install(put=setattr):
    def bench(run, warmup=0, rep=0, return_mode=""):
        return [1e3 * timeit.timeit(run, number=1) + 1e-6] * 3

    sizes = dict.fromkeys(("total_memory", "multi_processor_count", "L2_cache_size"), 128)
    properties = types.SimpleNamespace(name="stand-in", major=9, minor=0, **sizes)
    cuda = {
        "is_available": lambda: True,
        "get_device_properties": lambda index: properties,
        "get_device_name": lambda index=0: "stand-in",
        "memory_allocated": lambda: 5_000_000,
        "max_memory_allocated": lambda: 8_000_000,
        "current_stream": lambda: None,
    }
    nothing = "synchronize empty_cache reset_peak_memory_stats set_sync_debug_mode set_stream"
    for name, value in {**cuda, **dict.fromkeys(nothing.split(), lambda *_: None)}.items():
        put(torch.cuda, name, value)
    put(testing, "do_bench", bench)
    put(testing, "do_bench_cudagraph", bench)
    put(timing, "COPY_BYTES", 2**16)
    put(speed, "DEVICE", "cpu")
    put(processes, "get_context", lambda _: READY)
    put(speed, "CHILD", partial(processes.Child, install))
    put(speed, "SUITES", SECTIONS)


# Load a user's own provider: right at the first case, ends its process at the second.
def provider(device):
    def kl_divergence(inputs):
        if len(inputs.p) == 4:
            os._exit(7)
        return work.plain_kl_divergence(inputs.p, inputs.q)

    return {"kl_divergence": work.Work(kl_divergence, "ours")}
