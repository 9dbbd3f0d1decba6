"""The sum of KL over the tokens and its gradient on a CPU, in one thread: time beside plain torch's
and torch.compile's, and peak memory.

    python3 -m benchmarks.cpu [--json FILE] [--write]

--write puts the figures into benchmarks/results/cpu/times.json and makes the page of results anew.
Every provider runs in this process, in turns; a ratio is the median over rounds of a provider's
thread CPU time over plain torch's in the same round, so that other programs count little. Memory is
the most that torch allocates at once beside the inputs, the gradient among it.
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

import fastkl
from benchmarks.record import ROOT, markdown, origin, output_file, provenance, write_json

RESULT = ROOT / "benchmarks" / "results" / "cpu" / "times.json"
SHAPES = ((64, 32000), (256, 50257), (32, 128256), (512, 1000))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDS = 11
PHASES = ("forward", "both")


def plain(p, q):
    """The lines that fastkl replaces: two log_softmax and a sum, in float32."""
    log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).sum()


def providers():
    """{name: function of two logits tensors}; plain torch first, which the others are compared
    with.
    """
    return {
        "torch": plain,
        "fastkl": lambda p, q: fastkl.kl_divergence(p, q, reduction="sum"),
        "fastkl, per token": lambda p, q: fastkl.kl_divergence(p, q).sum(),
        "torch.compile": torch.compile(plain, dynamic=False),
    }


def inputs(rows, vocabulary, dtype):
    """Logits of P, which require gradient, and of Q = P + 0.1·noise: a KL near 0.005."""
    generator = torch.Generator().manual_seed(0)
    p = 3 * torch.randn(rows, vocabulary, generator=generator)
    q = p + 0.1 * torch.randn(rows, vocabulary, generator=generator)
    return p.to(dtype).requires_grad_(), q.to(dtype)


def seconds(function, p, q):
    """Thread CPU time of forward, and of forward and backward."""
    begin = time.thread_time()
    loss = function(p, q)
    middle = time.thread_time()
    torch.autograd.grad(loss, p)
    return middle - begin, time.thread_time() - begin


def peak_bytes(function, p, q):
    """The most that torch allocates at once in a forward and backward."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        seconds(function, p, q)
    changes = [
        event.nbytes()
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    return int(torch.tensor(changes).cumsum(0).max())


def error(function, p, q):
    """Worst relative error of the KL against float64, of the first rows, each alone."""
    worst = 0.0
    for i in range(min(8, len(p))):
        log_p, log_q = p[i].detach().double().log_softmax(-1), q[i].double().log_softmax(-1)
        exact = float((log_p.exp() * (log_p - log_q)).sum())
        worst = max(
            worst, abs(float(function(p[i : i + 1].detach(), q[i : i + 1])) - exact) / exact
        )
    return worst


def measure(shapes=SHAPES, rounds=ROUNDS):
    """Yields a record for each shape, type and provider."""
    named = providers()
    for rows, vocabulary in shapes:
        for name, dtype in DTYPES.items():
            torch._dynamo.reset()
            p, q = inputs(rows, vocabulary, dtype)
            for function in named.values():
                seconds(function, p, q)
            times = {provider: [] for provider in named}
            for number in range(rounds):
                for provider in list(named)[:: 1 if number % 2 else -1]:
                    times[provider].append(seconds(named[provider], p, q))
            for provider, function in named.items():
                yield {
                    "rows": rows,
                    "vocabulary": vocabulary,
                    "dtype": name,
                    "provider": provider,
                    **_figures(times[provider], times["torch"]),
                    "peak_tensors": round(
                        peak_bytes(function, p, q) / (p.numel() * p.element_size()), 2
                    ),
                    "error": error(function, p, q),
                }


def _figures(times, plains):
    """{phase: {"median_ms", "ratio": to plain torch in the same round}}."""
    return {
        phase: {
            "median_ms": round(1e3 * statistics.median(one[i] for one in times), 2),
            "ratio": round(
                statistics.median(
                    one[i] / other[i] for one, other in zip(times, plains, strict=True)
                ),
                3,
            ),
        }
        for i, phase in enumerate(PHASES)
    }


def processor():
    """The processor's name."""
    lines = (
        Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if Path("/proc/cpuinfo").exists()
        else []
    )
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor() or "unknown processor",
    )


def table(data):
    """The figures as a table; times in milliseconds."""
    lines = [
        [
            f"{row['rows']} × {row['vocabulary']} {row['dtype']}",
            row["provider"],
            f"{row['forward']['median_ms']:g}",
            f"{row['both']['median_ms']:g}",
            f"{row['both']['ratio']:.2f}",
            f"{row['peak_tensors']:g}",
            f"{row['error']:.0e}",
        ]
        for row in data["records"]
    ]
    head = [
        "logits",
        "provider",
        "forward, ms",
        "forward and backward, ms",
        "of plain torch's",
        "peak, logits tensors",
        "error of the KL",
    ]
    return markdown(head, lines)


def page(data):
    """The section of the page of results."""
    return [
        "## CPU",
        f"The sum of KL over the tokens and its gradient, one thread; processor: "
        f"{data['processor']}. {origin(data)}",
        table(data),
    ]


def main(argv=None):
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.cpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write the records to FILE"
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="write them to the committed results and make the page of results anew",
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    command = " ".join(["python3 -m benchmarks.cpu", *(sys.argv[1:] if argv is None else argv)])
    data = {**provenance(command), "processor": processor(), "records": []}
    for record in measure():
        data["records"].append(record)
        print(table({"records": [record]}).splitlines()[-1], flush=True)
    for path in [arguments.json, *([RESULT] if arguments.write else [])]:
        if path:
            write_json(path, data)
    if arguments.write:
        from benchmarks import report

        return report.main([])
    return 0


if __name__ == "__main__":
    sys.exit(main())
