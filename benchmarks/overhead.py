"""What a call takes beside its kernels: the Python of one call with few rows, on the clock, with every launch left out.

    python3 -m benchmarks.overhead [--json FILE]

With few rows this is the whole time of a call. Each function is called as users call it, on plain tensors, and by way of its custom op, which
torch.compile, dispatch modes and tensor subclasses take (fastkl/_dispatch.py). No GPU is needed: tensors are on the CPU, kernels are not run.
"""
import argparse
import contextlib
import sys
import time
from unittest import mock

import torch

import fastkl
from benchmarks.record import output_file, provenance, write_json
from fastkl import _dispatch, backend

ROWS, VOCABULARY = 8, 128
CALLS, ROUNDS = 300, 7
STEPS = ("no gradient", "forward", "forward and backward")
WAYS = {"plain tensors": contextlib.nullcontext, "custom op": lambda: mock.patch.object(_dispatch, "_plain", lambda inputs: False)}


def functions():
    """{name: function of nothing that returns one tensor} on logits P, which require gradient, and P."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(ROWS, VOCABULARY, generator=generator) for _ in "pq")
    p.requires_grad_()
    tokens = torch.zeros(ROWS, dtype=torch.int64)
    return p, {
        "kl_divergence": lambda: fastkl.kl_divergence(p, q),
        "token_stats": lambda: fastkl.token_stats(p, tokens, q).kl,
        "selective_log_softmax": lambda: fastkl.selective_log_softmax(p, tokens),
    }


def calls(function, leaf):
    """{step: what is timed} for one function."""
    upstream = torch.ones(ROWS)
    return dict(zip(STEPS, (torch.no_grad()(function), function, lambda: torch.autograd.grad(function(), leaf, upstream)), strict=True))


def microseconds(call):
    """The time of one call: the shortest mean of several rounds, since whatever else the machine does only adds to it."""
    best = float("inf")
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, (time.perf_counter() - begin) / CALLS * 1e6)
    return best


def measure():
    """Yields {"function", "way", step: microseconds}."""
    from fastkl.kernels import launch

    without_launches = mock.patch.object(launch.Variant, "start", lambda *arguments: None)
    on_a_cpu = mock.patch.object(backend, "triton_problems", lambda *logits, **reading: ())
    with without_launches, on_a_cpu, fastkl.use_backend("triton"):
        leaf, named = functions()
        for name, function in named.items():
            for way, context in WAYS.items():
                with context():
                    yield {"function": name, "way": way, **{step: round(microseconds(call), 1) for step, call in calls(function, leaf).items()}}


def main(argv=None):
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the records to FILE")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    print("Microseconds of Python in a call, launches left out:")
    print(f"{'function':<24}{'way':<16}" + "".join(f"{step:>22}" for step in STEPS))
    records = []
    for record in measure():
        records.append(record)
        print(f"{record['function']:<24}{record['way']:<16}" + "".join(f"{record[step]:>22.1f}" for step in STEPS), flush=True)
    if arguments.json:
        command = " ".join(["python3 -m benchmarks.overhead", *(sys.argv[1:] if argv is None else argv)])
        write_json(arguments.json, {**provenance(command), "rows": ROWS, "vocabulary": VOCABULARY, "records": records})
    return 0


if __name__ == "__main__":
    sys.exit(main())
