"""Time the operations of this package beside plain torch, torch.compile and every peer, on a GPU.

    python -m benchmarks.speed --out DIR [--suite NAME ...] [--provider package.module:function]

runs the sections of suites.py in their order, with a GPU in one command everything that is to be
known. Each provider of a section has a process with a time-out: a crash or a broken CUDA context
costs one row, a hang the rest of its provider's. Rows are appended to DIR/<date>.jsonl as they
come; DIR/<date>.json, with GPU, versions, commit and command, is rewritten whole after each
process. A provider of your own is a function of the device that returns {operation: function of the
inputs} (providers.py). --check measures no time: it compares every provider with float64, on a CPU
too. Exit code 0: all is measured and right; 1: it is not; 2: no CUDA GPU here, or wrong use.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils import collect_env

from benchmarks import timing
from benchmarks.linear_cases import FLOOR
from benchmarks.providers import ALL_LOADERS, load_providers, own
from benchmarks.record import (
    ROOT,
    at_least,
    finite,
    has_gpu,
    output_folder,
    provenance,
    write_json,
)
from benchmarks.suites import ALL, SUITES, Command

CHILD = [sys.executable, "-m", "benchmarks.speed"]
DEVICE = "cuda"
SECONDS = 1740.0  # for the whole run
PROVIDER_SECONDS = 120.0  # for a provider in a section; an H200 takes 5 to 60
LEAST_SECONDS = 15.0  # less is not worth the start of a process
BROKEN = 3  # exit code of a process whose CUDA context broke
CRASHES = 2  # after so many of its processes a provider has no more in the section
NO_TIME, STOPPED = "no time left in this run", "stopped at its time limit"


def run_here(arguments):
    """Measure one provider at the cases of a section, from number `start` on, in this process.

    Appends each row to the file of rows, so that it outlives a crash; returns the exit code.
    """
    device = torch.device(DEVICE if torch.cuda.is_available() else "cpu")
    (name,), child = arguments.suite, arguments.child
    measure = timing.measure_floor
    if child != FLOOR:
        loaders = ALL_LOADERS | dict(arguments.provider)
        measure = partial(timing.measure, *load_providers(device, [child], loaders))
    copy = None if arguments.check else timing.copy_bandwidth(device)
    for workload in SUITES[name].workloads[arguments.start :]:
        row = measure(workload, device, copy)
        if fault := timing.context_fault():
            row["context"] = f"broken, the section went on in a new process: {fault}"
        append(arguments.rows, name, row)
        if fault:
            os._exit(BROKEN)  # a GPU that no longer answers cannot be cleaned up
    return 0


def append(file, section, row):
    # A line that a killed process cut short lacks its tab, and cannot spoil the next one.
    with open(file, "a", encoding="utf-8") as lines:
        lines.write("\n" + json.dumps(finite({"section": section, **row})) + "\t")
    print(said(row), flush=True)


def said(row):
    medians = {phase: figures["median_ms"] for phase, figures in row["times"].items()}
    found = (row["workload"]["name"], row["provider"], row["status"], row["reason"] or medians)
    return " | ".join(map(str, found))


class Run(NamedTuple):
    arguments: argparse.Namespace
    rows: Path
    results: dict
    deadline: float

    def rows_of(self, section, provider=None):
        lines = self.rows.read_text(encoding="utf-8").split("\n") if self.rows.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\t")]
        rows = [row for row in rows if row.pop("section") == section]
        return [row for row in rows if provider in (None, row["provider"])]

    def write(self, section, **facts):
        rows = [row for row in self.rows_of(section) if row["status"] != "not offered"]
        floors = {r["workload"]["name"]: r["times"] for r in rows if r["provider"] == FLOOR}
        for row in (row for row in rows if row["provider"] != FLOOR):
            for phase, floor in floors.get(row["workload"]["name"], {}).items():
                if figures := row["times"].get(phase):
                    figures["ratio_to_floor"] = figures["median_ms"] / floor["median_ms"]
        self.results["sections"][section] = {**facts, "rows": rows}
        write_json(self.rows.with_suffix(".json"), self.results)


def run_limited(command, seconds, log=None, **environment):
    """Run a command; returns its exit code, or None past the limit.

    There the command and all that it started are ended.
    """
    options = {"env": {**os.environ, **environment}, "cwd": ROOT, "start_new_session": True}
    process = subprocess.Popen(command, stdout=log, stderr=log and subprocess.STDOUT, **options)
    with process, contextlib.ExitStack() as at_end:
        at_end.callback(lambda: process.poll() is None and os.killpg(process.pid, signal.SIGKILL))
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=seconds)


def run_provider(run, name, provider, options):
    """Measure a provider of a section, in as many processes one after the other as it takes."""
    workloads, crashes, reason = SUITES[name].workloads, 0, NO_TIME
    until = min(time.monotonic() + PROVIDER_SECONDS, run.deadline)
    while (done := len(run.rows_of(name, provider))) < len(workloads) and crashes < CRASHES:
        if (left := until - time.monotonic()) < LEAST_SECONDS:
            break
        command = [*CHILD, "--suite", name, "--child", provider, "--start", str(done), *options]
        code = run_limited([*command, "--rows", str(run.rows)], left)
        if (done := len(run.rows_of(name, provider))) == len(workloads):
            return
        reason = "left out after it had broken the CUDA context in this section"
        if code != BROKEN:
            reason = STOPPED if code is None else f"the process ended with exit code {code}"
            append(run.rows, name, timing.row_of(workloads[done], provider, "failed", reason))
        # Past the limit no time is left either.
        crashes += CRASHES if code is None else 1
    for workload in workloads[len(run.rows_of(name, provider)) :]:
        append(run.rows, name, timing.row_of(workload, provider, "missing", reason))


def run_section(run, name):
    arguments, users = run.arguments, [text for text, _ in run.arguments.provider]
    options = [f"--provider={text}" for text in users] + ["--check"] * arguments.check
    wanted = (*(arguments.providers or ALL_LOADERS), *users, *[FLOOR] * (not arguments.check))
    for provider in (*SUITES[name].providers, *users):
        if provider in wanted:
            run_provider(run, name, provider, options)
            run.write(name, status="not finished")
    rows = run.rows_of(name)
    late = sum(row["reason"] in (NO_TIME, STOPPED) for row in rows)
    return {"status": f"{late} of {len(rows)} rows not measured: {NO_TIME}" if late else "ok"}


def run_command(run, name):
    names = {"folder": str(run.rows.parent), "stamp": run.rows.stem}
    command = [word.format(**names) for word in SUITES[name].command]
    if name == "tests" and importlib.util.find_spec("xdist"):
        command += ["-n", "10"]
    log = run.rows.with_suffix(f".{name}.log")
    seconds = min(SUITES[name].seconds, run.deadline - time.monotonic())
    if not shutil.which(command[0]):
        return {"status": f"missing: {command[0]} is not installed"}
    if seconds < LEAST_SECONDS:
        return {"status": NO_TIME}
    with open(log, "w") as output:
        code = run_limited(command, seconds, output, FASTKL_REQUIRE_GPU="1")
    text = log.read_text(errors="replace").strip()
    print("\n".join(text.splitlines()[-25:]), flush=True)
    status = {0: "ok", None: STOPPED}.get(code, f"exit code {code}")
    return {"status": status, "summary": text.rpartition("\n")[2], "log": log.name}


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


def run_suite(arguments, results, folder):
    results |= {"gpu": gpu_facts() if torch.cuda.is_available() else None, "sections": {}}
    rows = folder / (re.sub(r"[-:]", "", results["date"]) + ".jsonl")
    run = Run(arguments, rows, results, time.monotonic() + arguments.seconds)
    for name in arguments.suite:
        print(f"\n== {name}", flush=True)
        started = time.monotonic()
        try:
            kind = run_command if isinstance(SUITES[name], Command) else run_section
            facts = kind(run, name)
        except Exception as error:  # one section's failure must not lose the others
            facts = {"status": f"{type(error).__name__}: {error}"}
        run.write(name, **facts, seconds=round(time.monotonic() - started, 1))
    rows.unlink(missing_ok=True)  # the results have them all
    return results["sections"]


def parse(argv):
    parser = argparse.ArgumentParser(
        "python -m benchmarks.speed", description=__doc__.split("\n")[0]
    )
    add, hidden = parser.add_argument, {"help": argparse.SUPPRESS}
    add("--suite", nargs="+", choices=SUITES, default=ALL, metavar="NAME", help="(default: all)")
    add(
        "--out",
        type=output_folder,
        metavar="DIR",
        help="where the results go, such as benchmarks/results/nvidia-h200",
    )
    add("--providers", nargs="+", choices=[*ALL_LOADERS, FLOOR], metavar="NAME", help="only these")
    yours = {"action": "append", "default": [], "help": "measure your own too; may be given again"}
    add("--provider", type=own, metavar="package.module:function", **yours)
    seconds = {"type": at_least(1, float), "default": SECONDS, "metavar": "S"}
    add("--seconds", **seconds, help="time for all (default: %(default)s)")
    add("--check", action="store_true", help="compare with float64 and time nothing, on a CPU too")
    add("--child", **hidden)  # inside the process of this provider
    add("--start", type=int, default=0, **hidden)
    add("--rows", type=Path, **hidden)
    arguments = parser.parse_args(argv)
    if not (arguments.check or arguments.out or arguments.child):
        parser.error("--out: expected a folder for the results, got none; give one, or --check")
    return arguments


def main(argv=None):
    arguments = parse(argv)
    if not arguments.check and not has_gpu("speed"):
        return 2
    if arguments.child:
        return run_here(arguments)
    with tempfile.TemporaryDirectory() as nowhere:
        sections = run_suite(arguments, provenance("speed", argv), arguments.out or Path(nowhere))
    bad = [r for s in sections.values() for r in s["rows"] if r["status"] in ("wrong", "failed")]
    states = [f"{name}: {section['status']}" for name, section in sections.items()]
    print("\n".join(["", *states, *map(said, bad)]))
    return 1 if bad or any(section["status"] != "ok" for section in sections.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
