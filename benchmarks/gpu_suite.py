"""Everything that needs a GPU, in one command of less than 8 minutes:

    python3 -m benchmarks.gpu_suite --out DIR

runs sections one after the other, each in a process of its own with a time limit, so that a crash or a hang costs one section: timings with memory
and bandwidth ("main", the peers in "peers", more shapes in "sweep"), accuracy against float64, the same work from hidden states beside the bare
matrix products ("linear", "linear_sweep"), and the GPU tests. DIR/<date>.json is rewritten after each; a table of the bars, met or not, ends the
output. Exit code 0: all sections ran and their bars are met; 1: not so; 2: no CUDA here.
"""
import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import accuracy, harness
from benchmarks.linear_providers import LINEAR_LOADERS
from benchmarks.linear_workloads import LinearWorkload
from benchmarks.providers import LOADERS, load_providers
from benchmarks.record import ROOT, provenance, write_json
from benchmarks.workloads import Workload

SECONDS = 460  # for the whole run
# Seconds that a section may take; the tests get what is left. Fresh processes need about 10 to start and to compile.
SECTIONS = {"main": 90, "accuracy": 50, "linear": 100, "peers": 40, "sweep": 50, "linear_sweep": 40, "tests": 300}
TESTS_AT_LEAST = 90  # seconds that the sections before them leave to the tests
SLACK = 30  # a section stops starting new measurements so long, or a quarter of its time, before it would be killed

MAIN = (Workload("kl_divergence", wrt="p"), Workload("kl_divergence", wrt="q"), Workload("token_stats"))
MAIN_PROVIDERS = ("fastkl", "torch", "torch.compile")
# Beside every other provider; the log-probability alone and with the entropy is what most of the peers have.
PEERS = (Workload("kl_divergence"), Workload("kl_divergence", wrt="q"), Workload("logprob"), Workload("logprob_entropy"))
SWEEP = (
    *(Workload(vocabulary=v) for v in (32000, 50257, 151936, 262144)),
    Workload(dtype="fp32"),
    *(Workload(rows=n) for n in (8, 64, 512)),
    Workload(layout="sliced"),
)
LINEAR = tuple(LinearWorkload(mode) for mode in ("loss", "forward", "frozen", "stats", "grpo", "distillation", "logprob"))
LINEAR_SWEEP = tuple(
    LinearWorkload(mode, **shape)
    for shape in (
        *({"rows": n} for n in (64, 512, 2048)), *({"vocabulary": v} for v in (32000, 50257, 151936)), *({"hidden": h} for h in (1024, 2048)),
        {"rows": 16384}, {"hidden": 8192}, {"vocabulary": 262144},  # the longest last: time may run out
    )
    for mode in ("loss", "forward")
)
NO_TIME = "no time left in this run"
# Of fastkl at the main shape: (mode, times the floor, GB allocated at once beside the inputs, returned gradients among them).
LINEAR_BARS = (("loss", 1.12, 3.4), ("forward", 1.12, 1.2))


# Sections, inside their own process -----------------------------------------------------------------------------


def timings(workloads, providers, device, deadline, **options):
    """Yields a row of the results per workload and provider; past the deadline rows that only say so."""
    copy = harness.copy_bandwidth(device) if device.type == "cuda" else None
    if copy:
        yield {"copy": copy}
    for workload in workloads:
        case = None
        for provider in providers:
            if time.monotonic() > deadline:
                yield no_figures(workload, provider.name, "missing", NO_TIME)
                continue
            case = case or harness.make_case(workload, device, copy and copy["gb_per_s"])
            yield harness.measure(provider, case, **options)
            harness.release()
        del case
        harness.release()


def linear_timings(workloads, providers, device, deadline):
    """Yields the floor's row and a row per provider for each LinearWorkload; past the deadline, and where the inputs do not fit, rows that say so."""
    for workload in workloads:
        if time.monotonic() > deadline:
            yield no_figures(workload, "all", "missing", NO_TIME)
            continue
        try:
            case = harness.make_linear_case(workload, device)
            floor = harness.measure_floor(case) if device.type == "cuda" else None
        except torch.OutOfMemoryError as error:
            yield no_figures(workload, "all", "failed", f"{type(error).__name__}: {error}"[:2000])
        else:
            yield from ([floor] if floor else [])
            for provider in providers:
                if time.monotonic() > deadline:
                    yield no_figures(workload, provider.name, "missing", NO_TIME)
                else:
                    yield harness.measure_linear(provider, case, floor)
                harness.release()
        case = floor = None
        harness.release()


def no_figures(workload, provider, status, reason):
    """A row that only says why there are no figures."""
    return {"workload": workload.as_dict(), "provider": provider, "status": status, "reason": reason}


def main_section(device, deadline):
    """The shape that the bars are about, all providers and phases."""
    yield from timings(MAIN, load_providers(device, MAIN_PROVIDERS), device, deadline)


def peers_section(device, deadline):
    """The same shape beside all other providers, without memory."""
    names = [name for name in LOADERS if name not in MAIN_PROVIDERS[1:]]
    yield from timings(PEERS, load_providers(device, names), device, deadline, with_memory=False)


def sweep_section(device, deadline):
    """Other shapes. torch.compile comes last: it compiles for seconds at each shape, and the time may run out."""
    yield from timings(SWEEP, load_providers(device, ["fastkl", "torch"]), device, deadline)
    yield from timings(SWEEP, load_providers(device, ["torch.compile"]), device, deadline, phases=("forward", "both"))


def linear_section(device, deadline):
    """From hidden states, at the shape that the bars are about. torch.compile comes last, as in the sweep."""
    names = [name for name in LINEAR_LOADERS if name != "torch.compile"]
    yield from linear_timings(LINEAR, load_providers(device, names, LINEAR_LOADERS), device, deadline)
    yield from linear_timings(LINEAR, load_providers(device, ["torch.compile"], LINEAR_LOADERS), device, deadline)


def linear_sweep_section(device, deadline):
    """From hidden states, other shapes: this package beside the floor."""
    yield from linear_timings(LINEAR_SWEEP, load_providers(device, ["fastkl"], LINEAR_LOADERS), device, deadline)


def accuracy_section(device, deadline):
    """Error against float64 by size of the KL."""
    for record in accuracy.accuracy(load_providers(device), device):
        yield record
        if time.monotonic() > deadline:
            raise TimeoutError("no time left for the other sizes")


def gpu_facts():
    """Name, memory and cache of the GPU, and its driver where nvidia-smi tells."""
    properties = torch.cuda.get_device_properties(0)
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.SubprocessError):
        driver = None
    return {
        "name": properties.name, "capability": f"{properties.major}.{properties.minor}", "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count, "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda, "driver": driver,
    }


RUNNERS = {
    "main": main_section, "accuracy": accuracy_section, "linear": linear_section, "peers": peers_section, "sweep": sweep_section,
    "linear_sweep": linear_sweep_section,
}


def run_here(name, file, seconds):
    """Runs a section in this process; `file` is rewritten after each row, so that what was measured outlives a crash."""
    data = {"gpu": gpu_facts(), "rows": []}
    for row in RUNNERS[name](torch.device("cuda"), time.monotonic() + seconds):
        data["rows"].append(row)
        write_json(file, data)
        print(line_of(row), flush=True)


def line_of(row):
    """One line of text for any row."""
    if "copy" in row:
        return f"copy {row['copy']['gb_per_s']:.0f} GB/s"
    if is_linear(row):
        return harness.linear_summary(row)
    return accuracy.summary(row) if "distribution" in row else harness.summary(row)


def is_linear(row):
    """Whether the row is one of a LinearWorkload."""
    return "mode" in row.get("workload", {})


# The suite, outside ---------------------------------------------------------------------------------------------


def run_limited(command, seconds, log=None, **environment):
    """(exit code or None, seconds taken); past the limit the command and all that it started are ended, and the code is None."""
    started = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, start_new_session=True, stdout=log, stderr=subprocess.STDOUT if log else None
    )
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return code, round(time.monotonic() - started, 1)


def run_section(name, seconds):
    """{"status", "seconds", "rows", "gpu"} of a section run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "section.json"
        command = [sys.executable, "-m", "benchmarks.gpu_suite", "--section", name, "--section-file", str(file),
                   "--seconds", str(seconds - min(SLACK, seconds / 4))]
        code, taken = run_limited(command, seconds)
        data = json.loads(file.read_text()) if file.exists() else {"rows": []}
    status = "ok" if code == 0 else "stopped at its time limit" if code is None else f"exit code {code}"
    late = sum(row.get("reason") == NO_TIME for row in data["rows"])
    if code == 0 and late:
        status = f"{late} of {len(data['rows'])} rows not measured: {NO_TIME}"
    return {**data, "status": status, "seconds": taken}


def run_tests(seconds, log_file):
    """{"status", "seconds", "summary"} of the GPU tests; a skip for want of a GPU counts as a failure. The output goes to `log_file`."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    with open(log_file, "w") as log:
        code, taken = run_limited(command, seconds, log, FASTKL_REQUIRE_GPU="1", PYTHONUNBUFFERED="1")
    lines = [line for line in log_file.read_text(errors="replace").splitlines() if line.strip()]
    print("\n".join(lines[-25:]))
    status = "ok" if code == 0 else "stopped at its time limit" if code is None else f"exit code {code}"
    return {"status": status, "seconds": taken, "summary": lines[-1] if lines else "", "log": log_file.name}


# Bars -----------------------------------------------------------------------------------------------------------


def bars(sections):
    """The bars of the sections that ran: [{"bar", "limit", "value", "met"}]; what was not measured is None and not met."""
    result = []
    if "main" in sections:
        rows = [row for row in sections["main"].get("rows", []) if "workload" in row]
        for wrt in "pq":
            result += _bars_of_gradient(wrt, {r["provider"]: r for r in rows if _is_kl(r["workload"], wrt)})
    if "accuracy" in sections:
        records = [record for record in sections["accuracy"].get("rows", []) if "distribution" in record]
        worse = len(accuracy.not_worse(records)) if records else None
        result.append({"bar": "accuracy: cases worse than plain torch + 1e-4, or negative", "limit": "== 0", "value": worse, "met": worse == 0})
    if "linear" in sections:
        result += _bars_of_linear(sections["linear"].get("rows", []))
    return result


def _is_kl(workload, wrt):
    return workload["operation"] == "kl_divergence" and workload["wrt"] == wrt


def _figure(row, *path):
    """What stands at the path in a row of the results; None where it was not measured."""
    for part in path:
        row = row.get(part) or {}
    return row or None


def _bars_of_gradient(wrt, rows):
    """The bars of kl_divergence with the gradient to one of its arguments, from one row per provider."""
    def figure(provider, *path):
        return _figure(rows.get(provider, {}), *path)

    result = []
    for phase in ("forward", "backward"):
        value = figure("fastkl", "times", phase, "percent_of_copy")
        result.append({"bar": f"kl_divergence d{wrt} {phase}, % of copy", "limit": ">= 90", "value": value, "met": (value or 0) >= 90})
    ours = figure("fastkl", "times", "both", "median_ms")
    for other, limit in (("torch", 6), ("torch.compile", 2)):
        theirs = figure(other, "times", "both", "median_ms")
        value = theirs / ours if theirs and ours else None
        bar = f"kl_divergence d{wrt} forward + backward, times faster than {other}"
        result.append({"bar": bar, "limit": f">= {limit}", "value": value, "met": (value or 0) >= limit})
    result.append(_at_most(f"kl_divergence d{wrt} peak / (inputs + one gradient)", 1.01, figure("fastkl", "memory", "limit_ratio")))
    return result


def _at_most(bar, limit, value):
    """A bar from above."""
    return {"bar": bar, "limit": f"<= {limit}", "value": value, "met": value is not None and value <= limit}


def _bars_of_linear(rows):
    """The bars of fastkl from hidden states, from the rows of the linear section."""
    result = []
    ours = {row["workload"]["mode"]: row for row in rows if row["provider"] == "fastkl"}
    for mode, times_floor, gigabytes in LINEAR_BARS:
        row = ours.get(mode, {})
        ratio = _figure(row, "times", LinearWorkload(mode).phase, "ratio_to_floor")
        peak = _figure(row, "memory", "peak_bytes")
        result.append(_at_most(f"linear {mode}, times the bare matrix products", times_floor, ratio))
        result.append(_at_most(f"linear {mode}, peak memory in GB", gigabytes, None if peak is None else peak / 1e9))
    return result


def report(results):
    """The results as text: what every section measured, and the bars."""
    lines = []
    for name, section in results["sections"].items():
        lines.append(f"\n{name}: {section['status']}, {section['seconds']} s {section.get('summary', '')}")
        rows = section.get("rows", [])
        table = harness.linear_table(rows) if rows and all(map(is_linear, rows)) else map(line_of, rows)
        lines += ["  " + line for line in table]
    lines.append(f"\n{'bar':<72} {'limit':>8} {'measured':>10}")
    for bar in results["bars"]:
        value = "-" if bar["value"] is None else f"{bar['value']:.4g}"
        lines.append(f"{bar['bar']:<72} {bar['limit']:>8} {value:>10}  {'met' if bar['met'] else 'NOT MET'}")
    return "\n".join(lines)


def run_suite(folder, names, seconds, command):
    """Runs the named sections and writes their results; returns the results."""
    started = time.monotonic()
    results = {**provenance(command), "gpu": None, "sections": {}, "bars": []}
    stamp = re.sub(r"[-:]", "", results["date"])
    for i, name in enumerate(names):
        kept = TESTS_AT_LEAST if "tests" in names[i + 1 :] else 0
        limit = min(SECTIONS[name], seconds - (time.monotonic() - started) - kept)
        print(f"\n== {name} (at most {limit:.0f} s)", flush=True)
        try:
            if limit <= SLACK:
                raise TimeoutError(NO_TIME)
            section = run_tests(limit, folder / f"{stamp}-tests.log") if name == "tests" else run_section(name, limit)
        except Exception as error:  # one section's failure must not lose the others
            section = {"status": f"{type(error).__name__}: {error}", "seconds": 0}
        results["gpu"] = section.pop("gpu", None) or results["gpu"]
        results["sections"][name] = section
        results["bars"] = bars(results["sections"])
        write_json(folder / f"{stamp}.json", results)
    print(report(results))
    print(f"\nwritten: {folder / stamp}.json, {time.monotonic() - started:.0f} s")
    return results


def main(argv=None):
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu_suite", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the results go (default: benchmarks/results/<gpu>)")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="which sections, in which order (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for the whole run (default: %(default)s)")
    parser.add_argument("--section", choices=RUNNERS, help=argparse.SUPPRESS)  # inside a section's own process
    parser.add_argument("--section-file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    names = arguments.sections.split(",")
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"--sections: expected names out of {', '.join(SECTIONS)}, got {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        print("gpu_suite: needs a CUDA GPU, found none; nothing was measured", file=sys.stderr)
        return 2
    if arguments.section:
        run_here(arguments.section, arguments.section_file, arguments.seconds)
        return 0
    gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower())
    folder = arguments.out or ROOT / "benchmarks" / "results" / gpu
    folder.mkdir(parents=True, exist_ok=True)
    command = "python3 -m benchmarks.gpu_suite " + " ".join(sys.argv[1:] if argv is None else argv)
    results = run_suite(folder, names, arguments.seconds, command.strip())
    done = all(section["status"] == "ok" for section in results["sections"].values())
    return 0 if done and all(bar["met"] for bar in results["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
