"""Measure the KL summed over tokens and its gradient on a CPU, in one thread, against plain torch.

    python -m benchmarks.cpu [--json FILE]

Measures time, also of torch.compile, and peak memory. The page of results shows
benchmarks/results/cpu/times.json. All providers run in this process, in turns; a ratio is the
median over rounds of a provider's thread CPU time over plain torch's in the same round, so that
other programs have little effect. Memory is torch's peak allocation in addition to the inputs,
including the gradient.
"""

import itertools
import re
import statistics
import time

import torch
from torch.utils import collect_env

import fastkl
from benchmarks import cases, record, work
from fastkl import testing

SHAPES = ((64, 32000), (256, 50257), (32, 128256), (512, 1000))
ROUNDS = 11
PHASES = ("forward", "both")


def plain(p, q):
    return work.plain_kl_divergence(p, q)[0].sum()


def providers():
    return {
        "torch": plain,
        "fastkl": lambda p, q: fastkl.kl_divergence(p, q, reduction="sum"),
        "fastkl, per token": lambda p, q: fastkl.kl_divergence(p, q).sum(),
        "torch.compile": torch.compile(plain, dynamic=False),
    }


def seconds(function, p, q):
    begin = time.thread_time()
    loss = function(p, q)
    middle = time.thread_time()
    torch.autograd.grad(loss, p)
    return middle - begin, time.thread_time() - begin


def peak_bytes(function, p, q):
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        seconds(function, p, q)
    events = profile.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return int(torch.tensor(changes).cumsum(0).max())


def error(function, p, q):
    """Return the worst relative error of the KL against float64 over the first rows, each computed
    alone.
    """
    rows = list(zip(p.detach()[:8].split(1), q[:8].split(1), strict=True))
    exact = torch.cat([testing.truth(*row).kl for row in rows])
    off = torch.stack([function(*row).double() for row in rows]) - exact
    return (off.abs() / exact).max().item()


def measure(shapes=SHAPES, rounds=ROUNDS):
    named = providers()
    for (rows, vocabulary), dtype in itertools.product(shapes, ("fp32", "bf16")):
        torch._dynamo.reset()
        p, q = testing.pair("normal3", rows, vocabulary, 0.1, dtype=cases.DTYPES[dtype])
        p.requires_grad_()
        times = {name: [] for name in named}
        for number in range(rounds + 1):  # the first round compiles and does not count
            for name in list(named)[:: 1 if number % 2 else -1]:
                times[name].append(seconds(named[name], p, q))
        for name, function in named.items():
            figures = {
                phase: _figures(*([one[i] for one in times[who][1:]] for who in (name, "torch")))
                for i, phase in enumerate(PHASES)
            }
            figures["peak_tensors"] = round(peak_bytes(function, p, q) / p.nbytes, 2)
            case = {"rows": rows, "vocabulary": vocabulary, "dtype": dtype, "provider": name}
            yield {**case, **figures, "error": error(function, p, q)}


def _figures(ours, plains):
    ratio = statistics.median(one / other for one, other in zip(ours, plains, strict=True))
    return {"median_ms": round(1e3 * statistics.median(ours), 2), "ratio": round(ratio, 3)}


def processor():
    name = re.search(r"Model name:\s*(.*)", collect_env.get_cpu_info(collect_env.run) or "")
    return name[1].strip() if name else "unknown processor"


def table(records):
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
        for row in records
    ]
    times = ("forward, ms", "forward and backward, ms", "of plain torch's")
    return record.markdown(
        ["logits", "provider", *times, "peak, logits tensors", "error of the KL"], lines
    )


def page(data):
    words = "The sum of KL over the tokens and its gradient, one thread; processor"
    return [
        "## CPU",
        f"{words}: {data['processor']}. {record.origin(data)}",
        table(data["records"]),
    ]


def main(argv=None):
    arguments = record.command_line("cpu", __doc__.splitlines()[0]).parse_args(argv)
    torch.set_num_threads(1)
    data = {**record.provenance("cpu", argv), "processor": processor()}
    record.gather(arguments.json, data, measure(), lambda record: table([record]).splitlines()[-1])


if __name__ == "__main__":
    main()
