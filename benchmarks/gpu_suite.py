"""Everything that needs a GPU, in one command of less than 8 minutes:

    python3 -m benchmarks.gpu_suite --out DIR

runs sections one after the other, each in a process of its own with a time limit: timings with memory and bandwidth at the main shape ("main"), from
hidden states beside the bare matrix products ("linear"), every peer ("peers"), accuracy against float64, more shapes ("sweep", "linear_sweep"), and
the GPU tests. A crash costs one row: a section whose process dies, or whose CUDA context a provider broke, goes on in a new process with the rows
that are left. A hang costs the rest of its section, each row of which says so. Rows come in the order of their importance. DIR/<date>.json is
rewritten after each section; a table of the bars, met or not, ends the output. Exit code 0: all sections ran and their bars are met; 1: not so; 2: no
CUDA GPU here, or wrong use.
"""
import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from benchmarks import accuracy, harness
from benchmarks.gpu_bars import bars
from benchmarks.gpu_sections import (
    EVERYBODY,
    NO_TIME,
    AccuracyCase,
    accuracy_rows,
    culprit,
    linear_rows,
    logits_rows,
    no_figures,
    steps,
)
from benchmarks.graphs import context_fault
from benchmarks.linear_workloads import LinearWorkload
from benchmarks.record import ROOT, duration, has_gpu, output_folder, provenance, write_json
from benchmarks.workloads import Workload

SECONDS = 460  # for the whole run
# Seconds that a section may take, and what the ones before it have left over; on an H200 "main" took 35, "peers" 73 for 33 of its 37 rows and
# "linear" 60 for 28 of 48. A process needs 10 until it measures.
SECTIONS = {"main": 40, "linear": 125, "peers": 85, "accuracy": 30, "sweep": 45, "linear_sweep": 25, "tests": 110}
TEST_WORKERS = 10
SLACK = 8  # seconds before the end of a section's process in which it starts no new row
LEAST_SECONDS = 15  # less is not worth the start of a process
BROKEN = 3  # exit code of a section's process whose CUDA context broke
STOPPED = "stopped at the section's time limit"
BREAKS = 2  # a provider that ended so many processes of a section is left out of the rest of it; in "accuracy" the first time
IDLE = 3  # so many processes one after the other that end without a row: it is not the providers

# The workloads of each section, the most important first.
MAIN = (Workload("kl_divergence", wrt="p"), Workload("kl_divergence", wrt="q"), Workload("token_stats"))
MEANS = (Workload("mean_kl", wrt="p"), Workload("mean_kl", wrt="q"))
LOGPROBS = (Workload("logprob"), Workload("logprob", layout="sliced"), Workload("logprob_entropy"), Workload("entropy"))
PEERS = (*MEANS, *LOGPROBS)
SWEEP = (
    *(Workload(rows=n) for n in (8, 64, 512, 2048)),
    *(Workload(vocabulary=v) for v in (32000, 50257, 151936)),
    Workload(dtype="fp32"), Workload(layout="sliced"), Workload(vocabulary=262144),
)
LINEAR = tuple(LinearWorkload(mode) for mode in ("loss", "forward", "grpo", "distillation", "logprob", "stats", "frozen"))
LINEAR_SWEEP = tuple(
    LinearWorkload(mode, **shape)
    for shape in (
        *({"rows": n} for n in (64, 512, 2048)), *({"vocabulary": v} for v in (32000, 50257, 151936)), *({"hidden": h} for h in (1024, 2048)),
        {"rows": 16384}, {"hidden": 8192}, {"vocabulary": 262144},  # the longest last: time may run out
    )
    for mode in ("loss", "forward")
)
SMOKE = (Workload("kl_divergence", rows=16, vocabulary=1000), Workload("mean_kl", rows=16, vocabulary=1000, wrt="q"))  # of the tests only

# The peers by what they offer. One that has no gradient to the argument in question stands there with that reason.
OF_KL = ("Liger JSD", "Liger KLDIVLoss", "F.kl_div", "TRL", "Categorical", "F.kl_div on probabilities")
OF_LINEAR = ("torch chunked", "TRL fused", "liger", "liger chunked")
OF_LINEAR_LOGPROB = ("torch chunked", "TRL fused", "cut-cross-entropy", "cut-cross-entropy, unfiltered", "torch linear_cross_entropy")


# Going through logits makes a product or two less where the functions on hidden states compute logits again.
THROUGH_LOGITS = steps([workload for workload in LINEAR if workload.mode in ("grpo", "logprob", "stats")], ("fastkl, through logits",))


def _linear_peers():
    """The steps of those that have each mode: losses for some, the log-probability for others, plain torch in chunks for all."""
    names = {"logprob": OF_LINEAR_LOGPROB, "forward": OF_LINEAR[:2], "grpo": OF_LINEAR[:1], "stats": OF_LINEAR[:1], "distillation": OF_LINEAR[:3]}
    return [step for workload in LINEAR for step in steps([workload], names.get(workload.mode, OF_LINEAR))]


# {section: (its runner, its steps)}. torch.compile comes last everywhere: it compiles for seconds at each shape, and the time may run out.
PLANS = {
    "main": (logits_rows, steps(MAIN, ("fastkl", "torch")) + steps(MAIN, ("torch.compile",))),
    "linear": (linear_rows, steps(LINEAR, ("fastkl", "torch")) + THROUGH_LOGITS + _linear_peers() + steps(LINEAR, ("torch.compile",))),
    "peers": (logits_rows, steps(MEANS, ("fastkl", *OF_KL)) + steps(LOGPROBS[:2], ("fastkl", "TRL", "Liger GRPO"))
              + steps(LOGPROBS[2:], ("fastkl", "TRL")) + steps(PEERS, ("torch",)) + steps(PEERS, ("torch.compile",))),
    "accuracy": (accuracy_rows, [step for dtype in ("fp32", "bf16") for target in accuracy.TARGETS
                                 for step in steps([AccuracyCase(dtype, target)], (EVERYBODY,))]),
    "sweep": (logits_rows, steps(SWEEP, ("fastkl", "torch")) + steps(SWEEP, ("torch.compile",), phases=("forward", "both"))),
    "linear_sweep": (linear_rows, steps(LINEAR_SWEEP, ("fastkl",))),
    "smoke": (logits_rows, steps(SMOKE, ("fastkl", "torch"))),
}


# A section inside its own process -------------------------------------------------------------------------------


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


def run_here(name, file, deadline, start=0, without=()):
    """Runs the steps of a section from number `start` on in this process; returns the exit code, BROKEN where the CUDA context did not survive one.

    deadline: of time.monotonic(), which all processes share. `file` is rewritten after each step, so that what was measured outlives a crash: {"gpu",
    "rows", "done": number of steps, "broken": who broke the context}.
    """
    data = {"gpu": gpu_facts(), "rows": [], "done": start, "broken": None}
    runner, plan = PLANS[name]
    for rows in runner(plan[start:], torch.device("cuda"), deadline, without):
        fault = context_fault()
        data["broken"] = fault and (culprit(rows) if name == "accuracy" else rows[-1]["provider"])
        # A step of all providers is measured again without the one that broke the context: those behind it have no figures there.
        if not (name == "accuracy" and data["broken"]):
            if fault:
                rows[-1]["context"] = f"broken, the section went on in a new process: {fault}"
            data["rows"] += rows
            data["done"] += 1
            for row in rows:
                print(line_of(row), flush=True)
        write_json(file, data)
        if fault:
            print(f"{data['broken']} broke the CUDA context: {fault}", flush=True)
            return BROKEN
    return 0


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


def run_part(name, seconds, start, without):
    """(exit code or None, what run_here wrote) of a section's process that begins with step number `start`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "section.json"
        command = [sys.executable, "-m", "benchmarks.gpu_suite", "--section", name, "--section-file", str(file), "--until",
                   str(time.monotonic() + seconds - SLACK), "--start", str(start), *(f"--without={provider}" for provider in without)]
        code, _ = run_limited(command, seconds)
        data = json.loads(file.read_text()) if file.exists() else {}
    return code, {"rows": [], "done": start, "broken": None, **data}


def run_section(name, seconds):
    """{"status", "seconds", "rows", "gpu", "processes"} of a section, in as many processes one after the other as it takes."""
    started, plan, found = time.monotonic(), PLANS[name][1], {"rows": [], "processes": 0}
    done, idle, breaks, reason = 0, 0, Counter(), NO_TIME
    while done < len(plan) and (left := seconds - (time.monotonic() - started)) >= LEAST_SECONDS:
        without = [provider for provider, count in breaks.items() if provider and count >= (1 if name == "accuracy" else BREAKS)]
        code, part = run_part(name, left, done, without)
        found["processes"] += 1
        found["rows"] += part["rows"]
        found["gpu"] = part.get("gpu") or found.get("gpu")
        idle, done = idle + 1 if part["done"] == done else 0, part["done"]
        if code == 0 or done == len(plan):
            break
        if code == BROKEN:
            breaks[part["broken"]] += 1
            continue
        step, why = plan[done], STOPPED if code is None else f"the process ended with exit code {code}"
        if code is not None and idle == IDLE:
            reason = why
            break
        breaks[step.provider] += code is not None
        found["rows"].append(no_figures(step.workload, step.provider, "failed", why))
        done += 1
    found["rows"] += [no_figures(step.workload, step.provider, "missing", reason) for step in plan[done:]]
    late = sum(row.get("reason") in (NO_TIME, STOPPED, reason) for row in found["rows"])
    status = f"{late} of {len(found['rows'])} rows not measured: {reason}" if late else "ok"
    return {**found, "status": status, "seconds": round(time.monotonic() - started, 1)}


def run_tests(seconds, log_file):
    """{"status", "seconds", "summary"} of the GPU tests; a skip for want of a GPU counts as a failure. The output goes to `log_file`."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    command += ["-n", str(TEST_WORKERS)] if importlib.util.find_spec("xdist") else []
    with open(log_file, "w") as log:
        code, taken = run_limited(command, seconds, log, FASTKL_REQUIRE_GPU="1", PYTHONUNBUFFERED="1")
    lines = [line for line in log_file.read_text(errors="replace").splitlines() if line.strip()]
    print("\n".join(lines[-25:]))
    status = "ok" if code == 0 else "stopped at its time limit" if code is None else f"exit code {code}"
    return {"status": status, "seconds": taken, "summary": lines[-1] if lines else "", "log": log_file.name}


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


def run_suite(folder, names, seconds, command, budgets=SECTIONS):
    """Runs the named sections and writes their results; returns the results. budgets: seconds by section."""
    started = time.monotonic()
    results = {**provenance(command), "gpu": None, "sections": {}, "bars": []}
    stamp = re.sub(r"[-:]", "", results["date"])
    spare = max(seconds - sum(budgets[name] for name in names), 0)
    for i, name in enumerate(names):
        kept = budgets["tests"] if "tests" in names[i + 1 :] else 0
        limit = min(sum(budgets[earlier] for earlier in names[: i + 1]) + spare, seconds - kept) - (time.monotonic() - started)
        print(f"\n== {name} (at most {limit:.0f} s)", flush=True)
        try:
            if limit <= LEAST_SECONDS:
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
    parser.add_argument("--out", type=output_folder, metavar="DIR", help="where the results go (default: benchmarks/results/<gpu>)")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="which sections, in which order; name:seconds for another limit than its own "
                        "(default: %(default)s)")
    parser.add_argument("--seconds", type=duration, default=SECONDS, help="time for the whole run (default: %(default)s)")
    parser.add_argument("--section", choices=PLANS, help=argparse.SUPPRESS)  # inside a section's own process
    parser.add_argument("--section-file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--without", action="append", default=[], help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    chosen = [part.partition(":") for part in arguments.sections.split(",")]
    names = [name for name, _, _ in chosen]
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"--sections: expected names out of {', '.join(SECTIONS)}, got {', '.join(map(repr, sorted(unknown)))}")
    if wrong := [own for _, colon, own in chosen if colon and not own.isdecimal()]:
        parser.error(f"--sections: expected a number of seconds after a colon, as in main:60, got {', '.join(map(repr, wrong))}")
    budgets = {**SECTIONS, **{name: int(own) for name, colon, own in chosen if colon}}
    if not has_gpu("gpu_suite"):
        return 2
    if arguments.section:
        code = run_here(arguments.section, arguments.section_file, arguments.until, arguments.start, arguments.without)
        if code == BROKEN:
            sys.stdout.flush()
            os._exit(code)  # what would be cleaned up is on a GPU that no longer answers
        return code
    gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower())
    folder = arguments.out or ROOT / "benchmarks" / "results" / gpu
    folder.mkdir(parents=True, exist_ok=True)
    command = "python3 -m benchmarks.gpu_suite " + " ".join(sys.argv[1:] if argv is None else argv)
    results = run_suite(folder, names, arguments.seconds, command.strip(), budgets)
    done = all(section["status"] == "ok" for section in results["sections"].values())
    return 0 if done and all(bar["met"] for bar in results["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
