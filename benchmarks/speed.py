"""Time the operations of this package, plain torch, torch.compile and every peer, on a GPU.

    python -m benchmarks.speed --out DIR [--suite NAME ...] [--provider package.module:function]

measures the sections of suites.py in order. Each provider of a section has a process with a
timeout: a crash or a broken CUDA context costs one row, a hang the provider's remaining rows. Rows
are added to DIR/<date>.json as they come; the file is rewritten each time, with GPU, versions,
commit and command. Your own provider is a function of the device that returns {operation: function
of the inputs} (providers.py). --check measures no time: it compares every provider with float64,
also on a CPU. Exit code 0: everything is measured, correct and as fast as --at-least; 1: not so; 2:
no CUDA GPU here, or wrong use.
"""

import argparse
import re
import sys
import time
from functools import cache, partial
from typing import NamedTuple

import torch
from torch.utils import collect_env

from benchmarks import linear_cases, processes, providers, record, timing
from benchmarks.peers import LINEAR_PEERS, PEERS
from benchmarks.suites import ALL, SUITES

CHILD = processes.Child
DEVICE = "cuda"
SECONDS = 1740.0  # for the whole run
PROVIDER_SECONDS = 120.0  # for a provider in a section; an H200 takes 5 to 60
LEAST_SECONDS = 15.0  # less is not worth starting a process
CRASHES = 2  # crashes after which a provider is skipped in the section
NO_TIME = "no time left in this run"
BROKE = "left out after it had broken the CUDA context in this section"


# In the process of a provider


@cache
def _measuring(provider, check):
    device = torch.device(DEVICE if torch.cuda.is_available() else "cpu")
    measure = timing.measure_floor
    if provider != linear_cases.FLOOR:
        loader = providers.ALL_LOADERS.get(provider) or providers.own(provider)[1]
        measure = partial(timing.measure, providers.load(provider, loader, device))
    return partial(measure, device=device, copy=None if check else timing.copy_bandwidth(device))


def measure_here(provider, check, workload):
    row = _measuring(provider, check)(workload)
    if fault := timing.context_fault():
        row["context"] = f"broken, the section went on in a new process: {fault}"
    return row


# In the process of the command


class Run(NamedTuple):
    arguments: argparse.Namespace
    results: dict
    deadline: float

    def add(self, section, row):
        print(said(row), flush=True)
        rows = self.results["sections"][section]["rows"]
        floors = {
            r["workload"]["name"]: r["times"] for r in rows if r["provider"] == linear_cases.FLOOR
        }
        for phase, floor in floors.get(row["workload"]["name"], {}).items():
            if figures := row["times"].get(phase):
                figures["ratio_to_floor"] = figures["median_ms"] / floor["median_ms"]
        rows += [row] * (row["status"] != "not offered")
        self.write(section)

    def write(self, section, **facts):
        self.results["sections"][section] |= facts
        name = re.sub("[-:]", "", self.results["date"]) + ".json"
        record.write_json(self.arguments.out and self.arguments.out / name, self.results)


def said(row):
    medians = {phase: figures["median_ms"] for phase, figures in row["times"].items()}
    found = (row["workload"]["name"], row["provider"], row["status"], row["reason"] or medians)
    return " | ".join(map(str, found))


def run_provider(run, name, provider):
    """Measure a provider of a section, in as many successive processes as needed."""
    crashes, missing = 0, None
    until = min(time.monotonic() + PROVIDER_SECONDS, run.deadline)
    with CHILD() as child:
        for workload in SUITES[name].workloads:
            left, failed = until - time.monotonic(), partial(timing.row_of, workload, provider)
            if left < LEAST_SECONDS or crashes >= CRASHES:
                run.add(name, failed("missing", NO_TIME if left < LEAST_SECONDS else missing))
                continue
            row, fault = child.attempt(left, measure_here, provider, run.arguments.check, workload)
            if fault:
                crashes, missing, row = crashes + 1, fault, failed("failed", fault)
            elif "context" in row:
                child.end()
                crashes, missing = crashes + 1, BROKE
            run.add(name, row)


def run_section(run, name):
    arguments, users = run.arguments, [text for text, _ in run.arguments.provider]
    started, section = time.monotonic(), {"status": "not finished", "rows": []}
    run.results["sections"][name] = section
    print(f"\n== {name}", flush=True)
    wanted = (
        *(arguments.providers or providers.ALL_LOADERS),
        *users,
        *[linear_cases.FLOOR] * (not arguments.check),
    )
    for provider in (*SUITES[name].providers, *users):
        if provider in wanted:
            run_provider(run, name, provider)
    rows = section["rows"]
    late = sum(row["reason"] == NO_TIME for row in rows)
    status = f"{late} of {len(rows)} rows not measured: {NO_TIME}" if late else "ok"
    run.write(name, status=status, seconds=round(time.monotonic() - started, 1))


def gpu_facts():
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "driver": collect_env.get_nvidia_driver_version(collect_env.run),
    }


def parse(argv):
    parser = argparse.ArgumentParser(
        "python -m benchmarks.speed", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--suite", nargs="+", choices=SUITES, default=ALL, metavar="NAME", help="(default: all)")
    add(
        "--out",
        type=record.output_folder,
        metavar="DIR",
        help="where the results go, such as benchmarks/results/nvidia-h200",
    )
    add(
        "--providers",
        nargs="+",
        choices=[*providers.ALL_LOADERS, linear_cases.FLOOR],
        metavar="NAME",
        help="only these",
    )
    add(
        "--provider",
        action="append",
        type=providers.own,
        default=[],
        metavar="package.module:function",
        help="measure your own too; may be given again",
    )
    add(
        "--seconds",
        type=partial(record.at_least, 1, kind=float),
        default=SECONDS,
        metavar="S",
        help="time for all (default: %(default)s)",
    )
    add(
        "--at-least",
        type=partial(record.at_least, 0, kind=float),
        default=0.0,
        metavar="PERCENT",
        help="fail if fastkl reaches less of a copy's bandwidth in any row",
    )
    add("--check", action="store_true", help="compare with float64 and time nothing, on a CPU too")
    arguments = parser.parse_args(argv)
    if not (arguments.check or arguments.out):
        parser.error("--out: expected a folder for the results, got none; give one, or --check")
    return arguments


def main(argv=None):
    arguments = parse(argv)
    if not arguments.check and not record.has_gpu("speed"):
        return 2
    results = {**record.provenance("speed", argv), "sections": {}}
    results["gpu"] = gpu_facts() if torch.cuda.is_available() else None
    run = Run(arguments, results, time.monotonic() + arguments.seconds)
    for name in arguments.suite:
        run_section(run, name)
    sections = results["sections"]
    bad = [r for s in sections.values() for r in s["rows"] if r["status"] in ("wrong", "failed")]
    bad += [
        row
        for section in sections.values()
        for row in section["rows"]
        for figures in row["times"].values()
        if row["provider"] == "fastkl" and figures.get("percent_of_copy", 100) < arguments.at_least
    ]
    states = (f"{name}: {section['status']}" for name, section in sections.items())
    print("", *states, *map(said, bad), sep="\n")
    # A wrong peer has no time, and is not this package's fault.
    ours = [row for row in bad if row["provider"] not in {**PEERS, **LINEAR_PEERS}]
    return 1 if ours or any(section["status"] != "ok" for section in sections.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
