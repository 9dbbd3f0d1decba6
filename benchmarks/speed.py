"""Times the operations of this package beside plain torch, torch.compile and every peer, on a GPU.

    python -m benchmarks.speed --out DIR [--suite NAME,...] [--provider package.module:function]

runs the sections of suites.py in their order, with a GPU in one command everything that is to be
known. Each provider of a section has a process with a time-out: a crash or a broken CUDA context
costs one row, a hang the rest of its provider's. Rows are appended to DIR/<date>.jsonl as they come;
DIR/<date>.json, with GPU, versions, commit and command, is rewritten whole after each process. A
provider of your own is a function of the device that returns {operation: function of the inputs}
(providers.py). --check measures no time: it compares every provider with float64, on a CPU too. Exit
code 0: all is measured and right; 1: it is not; 2: no CUDA GPU here, or wrong use.
"""

import argparse
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
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import timing
from benchmarks.linear_cases import FLOOR
from benchmarks.providers import ALL_LOADERS, load_providers, user_loader
from benchmarks.record import ROOT, duration, finite, has_gpu, output_folder, provenance, write_json
from benchmarks.suites import ALL, SUITES, Command

CHILD = [sys.executable, "-m", "benchmarks.speed"]
DEVICE = "cuda"
SECONDS = 1740.0  # for the whole run
PROVIDER_SECONDS = 120.0  # for a provider in a section; an H200 takes 5 to 60
LEAST_SECONDS = 15.0  # less is not worth the start of a process
TEST_WORKERS = 10
BROKEN = 3  # exit code of a process whose CUDA context broke
CRASHES = 2  # after so many of its processes a provider has no more in the section
NO_TIME = "no time left in this run"
STOPPED = "stopped at its time limit"


# A provider of a section inside its own process


def run_here(arguments):
    """Measures one provider at the cases of a section, from number `start` on; returns the exit code.

    Appends a row to the file of rows after each, so that it outlives a crash.
    """
    device = torch.device(DEVICE if torch.cuda.is_available() else "cpu")
    section, name = SUITES[arguments.suite[0]], arguments.child
    loaders = {**ALL_LOADERS, **{text: user_loader(text) for text in arguments.provider}}
    (provider,) = load_providers(device, [name], loaders) if name != FLOOR else [None]
    copy = None if arguments.check else timing.copy_bandwidth(device)
    for workload in section.workloads[arguments.start :]:
        if provider is None:
            row = timing.measure_floor(workload, device)
        else:
            row = timing.measure(provider, workload, device, copy)
        fault = timing.context_fault()
        if fault:
            row["context"] = f"broken, the section went on in a new process: {fault}"
        append(arguments.rows, {"section": arguments.suite[0], **row})
        print(summary(row), flush=True)
        if fault:
            return BROKEN
    return 0


def append(file, row):
    """Appends a row to the file of rows."""
    with open(file, "a", encoding="utf-8") as lines:
        lines.write(json.dumps(finite(row)) + "\n")


def summary(row):
    """Says a row in one line of text."""
    head = f"{row['workload']['name']:<46} {row['provider']:<16}"
    if row["status"] != "ok":
        return f"{head} {row['status']}: {row['reason'].splitlines()[0][:120]}"
    if not row["times"]:
        return f"{head} correct, not timed"
    cells = []
    for phase, figures in row["times"].items():
        rates = {"percent_of_copy": "% of a copy", "tflop_per_s": " TFLOP/s"}
        rate = [f" {figures[key]:.1f}{unit}" for key, unit in rates.items() if key in figures]
        cells.append(f"{phase} {figures['median_ms']:.4f} ms" + "".join(rate))
    return f"{head} " + "  ".join(cells)


# The suite


@dataclass
class Run:
    """One run of the command: where its rows and results are, and when it has to end."""

    arguments: argparse.Namespace
    rows: Path
    results: dict
    deadline: float

    def left(self, most):
        """Returns the seconds that may be spent, `most` at the most."""
        return min(most, self.deadline - time.monotonic())

    def rows_of(self, section, provider=None):
        """Reads the rows of a section that are there; a line that was cut short is left out."""
        found = []
        for line in (
            self.rows.read_text(encoding="utf-8").splitlines() if self.rows.exists() else []
        ):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if row.pop("section") == section and provider in (None, row["provider"]):
                found.append(row)
        return found

    def add(self, section, workload, provider, status, reason):
        """Appends a row without figures."""
        row = timing.no_figures(workload, provider, status, reason)
        append(self.rows, {"section": section, **row})

    def write(self, section, **facts):
        """Writes the results whole, with the rows of a section as they are now."""
        found = self.rows_of(section)
        rows = with_ratios([row for row in found if row["status"] != "not offered"])
        self.results["sections"].setdefault(section, {}).update(rows=rows, **facts)
        if self.arguments.out:
            write_json(self.rows.with_suffix(".json"), self.results)


def with_ratios(rows):
    """Adds to the rows from hidden states how many times the floor's time theirs is."""
    floors = {row["workload"]["name"]: row["times"] for row in rows if row["provider"] == FLOOR}
    for row in rows:
        for phase, figures in row["times"].items():
            floor = floors.get(row["workload"]["name"], {}).get(phase)
            if floor and row["provider"] != FLOOR:
                figures["ratio_to_floor"] = figures["median_ms"] / floor["median_ms"]
    return rows


def run_limited(command, seconds, log=None, **environment):
    """Runs a command; returns its exit code, or None past the limit, where it and all that it started are ended."""
    variables = {**os.environ, **environment}
    output = {"stdout": log, "stderr": subprocess.STDOUT if log else None}
    process = subprocess.Popen(command, cwd=ROOT, env=variables, start_new_session=True, **output)
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_provider(run, name, provider):
    """Measures a provider of a section, in as many processes one after the other as it takes."""
    workloads, crashes, reason = SUITES[name].workloads, 0, NO_TIME
    until = time.monotonic() + run.arguments.provider_seconds
    while (done := len(run.rows_of(name, provider))) < len(workloads):
        left = run.left(until - time.monotonic())
        if crashes == CRASHES or left < LEAST_SECONDS:
            break
        options = [f"--provider={text}" for text in run.arguments.provider]
        options += ["--check"] if run.arguments.check else []
        command = [*CHILD, "--suite", name, "--child", provider, "--start", str(done)]
        code = run_limited([*command, "--rows", str(run.rows), *options], left)
        if (at := len(run.rows_of(name, provider))) == len(workloads):
            return
        if code == BROKEN:
            reason = "left out after it had broken the CUDA context in this section"
        else:
            reason = STOPPED if code is None else f"the process ended with exit code {code}"
            run.add(name, workloads[at], provider, "failed", reason)
        crashes += code is not None
    for workload in workloads[len(run.rows_of(name, provider)) :]:
        run.add(name, workload, provider, "missing", reason)


def run_section(run, name):
    """Measures a section, provider by provider."""
    section, started = SUITES[name], time.monotonic()
    chosen = run.arguments.providers
    for provider in (*section.providers, *run.arguments.provider):
        if (chosen and provider not in (*chosen, FLOOR, *run.arguments.provider)) or (
            run.arguments.check and provider == FLOOR
        ):
            continue
        run_provider(run, name, provider)
        run.write(name, status="not finished")
    rows = run.results["sections"].get(name, {}).get("rows", [])
    late = sum(row["reason"] in (NO_TIME, STOPPED) for row in rows)
    status = f"{late} of {len(rows)} rows not measured: {NO_TIME}" if late else "ok"
    run.write(name, status=status, seconds=round(time.monotonic() - started, 1))


def run_command(run, name):
    """Runs a command of the suite; its output goes to a log beside the results."""
    started, what = time.monotonic(), SUITES[name]
    names = {"folder": str(run.rows.parent), "stamp": run.rows.stem}
    command = [word.format(**names) for word in what.command]
    if name == "tests" and importlib.util.find_spec("xdist"):
        command += ["-n", str(TEST_WORKERS)]
    log, seconds = run.rows.with_suffix(f".{name}.log"), run.left(what.seconds)
    if not shutil.which(command[0]):
        return run.write(name, status=f"missing: {command[0]} is not installed", seconds=0)
    if seconds < LEAST_SECONDS:
        return run.write(name, status=NO_TIME, seconds=0)
    with open(log, "w") as output:
        code = run_limited(command, seconds, output, FASTKL_REQUIRE_GPU="1", PYTHONUNBUFFERED="1")
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    print("\n".join(lines[-25:]), flush=True)
    status = "ok" if code == 0 else STOPPED if code is None else f"exit code {code}"
    facts = {"summary": lines[-1] if lines else "", "log": log.name}
    records = Path((what.records or "").format(**names))
    if records.is_file():
        for record in json.loads(records.read_text(encoding="utf-8"))["records"]:
            append(
                run.rows, {"section": name, "status": "ok", "provider": "", "times": {}, **record}
            )
    run.write(name, status=status, seconds=round(time.monotonic() - started, 1), **facts)


def gpu_facts():
    """Describes the GPU: its name, memory and cache, and its driver where nvidia-smi tells."""
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        driver = asked.stdout.split("\n")[0].strip()
    except (OSError, subprocess.SubprocessError):
        driver = None
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "driver": driver,
    }


def run_suite(arguments, command, folder):
    """Runs the sections and writes their results; returns the results."""
    results = {**provenance(command), "gpu": None, "sections": {}}
    if torch.cuda.is_available():
        results["gpu"] = gpu_facts()
    rows = Path(folder) / (re.sub(r"[-:]", "", results["date"]) + ".jsonl")
    run = Run(arguments, rows, results, time.monotonic() + arguments.seconds)
    for name in arguments.suite:
        print(f"\n== {name}", flush=True)
        try:
            (run_command if isinstance(SUITES[name], Command) else run_section)(run, name)
        except Exception as error:  # one section's failure must not lose the others
            run.write(name, status=f"{type(error).__name__}: {error}", seconds=0)
    rows.unlink(missing_ok=True)  # the results have them all
    return results


def _names(known):
    def names(text):
        found = text.split(",") if text != "all" else ALL
        if unknown := sorted(set(found) - set(known)):
            raise argparse.ArgumentTypeError(
                f"expected names out of {', '.join(known)}, got {', '.join(map(repr, unknown))}"
            )
        return list(found)

    return names


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__.split("\n")[0]
    )
    add, hidden = parser.add_argument, {"help": argparse.SUPPRESS}
    add(
        "--suite",
        type=_names(SUITES),
        default=list(ALL),
        metavar="NAME,...",
        help="sections (default: all)",
    )
    add("--out", type=output_folder, metavar="DIR", help="(default: benchmarks/results/<gpu>)")
    add("--providers", type=_names((*ALL_LOADERS, FLOOR)), metavar="NAME,...", help="only these")
    add("--provider", action="append", default=[], metavar="package.module:function",
        help="measure your own too; may be given again")  # fmt: skip
    add("--seconds", type=duration, default=SECONDS, help="time for all (default: %(default)s)")
    add("--provider-seconds", type=duration, default=PROVIDER_SECONDS,
        help="time for a provider in a section (default: %(default)s)")  # fmt: skip
    add("--check", action="store_true", help="compare with float64 and time nothing, on a CPU too")
    add("--child", **hidden)  # inside the process of this provider
    add("--start", type=int, default=0, **hidden)
    add("--rows", type=Path, **hidden)
    return parser


def main(argv=None):
    """Runs the command line; returns the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    for text in arguments.provider:
        try:
            user_loader(text)
        except ValueError as error:
            parser.error(str(error))
    if not arguments.check and not has_gpu("speed"):
        return 2
    if arguments.child:
        code = run_here(arguments)
        if code == BROKEN:
            sys.stdout.flush()
            os._exit(code)  # what would be cleaned up is on a GPU that no longer answers
        return code
    if not arguments.out and not arguments.check:
        gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower())
        arguments.out = ROOT / "benchmarks" / "results" / gpu
    command = " ".join(["python -m benchmarks.speed", *(sys.argv[1:] if argv is None else argv)])
    with tempfile.TemporaryDirectory() as nowhere:
        folder = arguments.out or Path(nowhere)
        folder.mkdir(parents=True, exist_ok=True)
        results = run_suite(arguments, command, folder)
    bad = [row for section in results["sections"].values() for row in section["rows"]]
    bad = [row for row in bad if row["status"] in ("wrong", "failed")]
    print(
        "\n" + "\n".join(f"{n}: {section['status']}" for n, section in results["sections"].items())
    )
    print("\n".join(map(summary, bad)))
    return 1 if bad or any(s["status"] != "ok" for s in results["sections"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
