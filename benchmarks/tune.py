"""Finds a launch configuration for this GPU and prints it as an entry for kernels/config.py.

    python -m benchmarks.tune --direction forward|backward|fused --dtype bf16|fp32
                              [--vocabulary V] [--json FILE]

Each candidate of a small grid is checked and timed in a process of its own, so that a crash or a
hang costs that candidate only. The check compares results with the reference in float64, and the
bits of a row alone with those of the row in a batch, for aligned and for misaligned rows. A
candidate that is wrong, or raises, is reported and left out. The fastest are timed a second time,
after the present configuration, which stays unless another one is faster by NOISE.

Exit code 0: an entry was printed; 1: no candidate passed; 2: no CUDA GPU here, or wrong use.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import pprint
import statistics
import subprocess
import sys

import torch

import fastkl
from benchmarks.record import ROOT, has_gpu, output_file, provenance, write_json
from fastkl.kernels import config

DEVICE = "cuda"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Launches decide the time of few rows, memory bandwidth that of many.
ROWS = (64, 8192)
CHECKED_ROWS = 8
# Largest relative L2 error of a result, by its type.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 8e-3}
# The longest segment by direction; a half and a quarter of it are tried too.
SEGMENTS = {"forward": 32768, "backward": 32768, "fused": 8192}
FIELDS = ("threads", "groups", "segment", "max_registers")
# For a candidate, with the start of its process.
SECONDS = 120
FINALISTS = 5
NOISE = 0.01


def candidates(direction, present, itemsize, vocabulary):
    """Return the present configuration, then the others of the grid.

    A program of forward and of fused keeps its threads, one warp. A segment is a multiple of the
    elements that its threads hold at once.
    """
    longest = min(SEGMENTS[direction], 1 << (vocabulary - 1).bit_length())
    threads = (128, 256, 512) if direction == "backward" else (present.threads,)
    grid = itertools.product(threads, (1, 2), (longest, longest // 2, longest // 4), (None, 128))
    found = [config.RowConfig(*values[:3], present.measured, values[3]) for values in grid]
    fitting = [
        one for one in found if one.segment * itemsize % (one.threads * one.groups * 16) == 0
    ]
    return [present, *(one for one in fitting if one != present)]


def logits(rows, vocabulary, dtype):
    """Return P ~ N(0, 3²), Q = P + N(0, 1), and tokens below V − 1."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    options = dict(generator=generator, device=DEVICE)
    p, q = (torch.randn(rows, vocabulary, dtype=DTYPES[dtype], **options) for _ in range(2))
    p *= 3
    return p, q.add_(p), torch.randint(vocabulary - 1, (rows,), **options)


def operations(direction, p, q, tokens):
    """Return {name: call}; a call returns the tensors [N] or [N, V] that the kernel computes."""
    x, y = p.detach().requires_grad_(), q.detach().requires_grad_()
    gradient = functools.partial(torch.autograd.grad, retain_graph=direction == "backward")
    if direction == "forward":
        return {
            "kl_divergence": lambda: [fastkl.kl_divergence(p, q)],
            "token_stats": lambda: list(fastkl.token_stats(p, tokens, q)),
        }
    if direction == "fused":
        return {
            "sum of kl_divergence": lambda: gradient(fastkl.kl_divergence(x, q, reduction="sum"), x)
        }
    stats = fastkl.token_stats(x, tokens, q)
    found = {
        "kl_divergence to P": ([fastkl.kl_divergence(x, q)], x),
        "kl_divergence to Q": ([fastkl.kl_divergence(p, y)], y),
        "token_stats to P": ([stats.logprob, stats.entropy, stats.kl], x),
    }
    return {
        name: functools.partial(gradient, outputs, leaf, list(map(torch.ones_like, outputs)))
        for name, (outputs, leaf) in found.items()
    }


def results(*problem):
    """Return {name: tensor} of all tensors that the operations compute."""
    return {
        f"{name} [{i}]": one
        for name, call in operations(*problem).items()
        for i, one in enumerate(call())
    }


def check(direction, dtype, vocabulary):
    """Raise AssertionError if a result is off, or a row's bits depend on the rows beside it."""
    whole = logits(CHECKED_ROWS, vocabulary, dtype)
    for start in (0, 1):  # aligned and misaligned rows
        p, q, tokens = whole[0][:, start:], whole[1][:, start:], whole[2]
        found = results(direction, p, q, tokens)
        with fastkl.use_backend("reference"):
            exact = results(direction, p.double(), q.double(), tokens)
        for name, one in found.items():
            error = ((one.double() - exact[name]).norm(dim=-1) / exact[name].norm(dim=-1)).max()
            assert error <= LIMITS[one.dtype], (
                f"{name}: error {error:.1e}, above {LIMITS[one.dtype]}"
            )
        for rows in (slice(2, 3), slice(1, None)):
            for name, one in results(direction, p[rows], q[rows], tokens[rows]).items():
                assert torch.equal(one, found[name][rows]), (
                    f"{name}: the bits of a row depend on the rows beside it"
                )


def measure(direction, dtype, vocabulary, chosen):
    """Return {operation and rows: milliseconds} of a configuration that passes the check."""
    from triton.testing import do_bench

    # row_fused is off on a GPU until it is measured.
    config.fuses = lambda arch: direction == "fused"
    with fastkl.use_backend("triton"), config.override(**{direction: chosen}):
        check(direction, dtype, vocabulary)
        return {
            f"{name} of {rows} rows": do_bench(call, return_mode="median")
            for rows in ROWS
            for name, call in operations(direction, *logits(rows, vocabulary, dtype)).items()
        }


def attempt(arguments, chosen, record):
    """Return a trial: the configuration with its times, or with the reason why it is refused.

    It runs in a process of its own, is printed, added to the record, and written with it.
    """
    options = dict(vars(arguments), json=None, candidate=None)
    command = [
        *(sys.executable, "-m", "benchmarks.tune"),
        *(f"--{name}={value}" for name, value in options.items() if value is not None),
        *("--candidate", *(str(getattr(chosen, name) or 0) for name in FIELDS)),
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=SECONDS, cwd=ROOT
        )
        outcome = {"times": json.loads(done.stdout.splitlines()[-1])}
    except subprocess.TimeoutExpired:
        outcome = {"refused": f"no answer in {SECONDS} s"}
    except subprocess.CalledProcessError as error:
        outcome = {"refused": [f"exit code {error.returncode}", *error.stderr.splitlines()][-1]}
    record["trials"].append({**dataclasses.asdict(chosen), **outcome})
    print(line(record["trials"][-1]), flush=True)
    if arguments.json:
        write_json(arguments.json, record)
    return record["trials"][-1]


def score(trial):
    """Return the geometric mean of a trial's times; infinite for a refused one."""
    return statistics.geometric_mean(trial["times"].values()) if "times" in trial else float("inf")


def line(trial):
    """Return a trial as a line of text."""
    times = ", ".join(f"{name} {ms:.4g} ms" for name, ms in trial.get("times", {}).items())
    return f"  {[trial[name] for name in FIELDS]}  {times or 'refused: ' + trial['refused']}"


def parsed(argv):
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.tune", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--direction", choices=SEGMENTS, required=True, help="the kernel to tune")
    parser.add_argument(
        "--dtype", choices=DTYPES, required=True, help="element type; an entry is for its size"
    )
    parser.add_argument(
        "--vocabulary", type=int, default=128256, metavar="V", help="length of a row"
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write every trial to FILE"
    )
    parser.add_argument(
        "--candidate",
        type=int,
        nargs=4,
        metavar=("THREADS", "GROUPS", "SEGMENT", "REGISTERS"),
        help="check and time this one only (0 registers: no limit); print its times as JSON",
    )
    found = parser.parse_args(argv)
    if found.vocabulary < 256 or (found.direction == "fused" and found.vocabulary % 8):
        parser.error(
            f"--vocabulary: expected at least 256, and of fused a multiple of 8, "
            f"got {found.vocabulary}; choose another length"
        )
    return found


def main(argv=None):
    """Run the command line; return the exit code."""
    arguments = parsed(argv)
    direction, dtype, vocabulary = arguments.direction, arguments.dtype, arguments.vocabulary
    if not has_gpu("tune"):
        return 2
    if arguments.candidate:
        chosen = config.RowConfig(*arguments.candidate[:3], "", arguments.candidate[3] or None)
        print(json.dumps(measure(direction, dtype, vocabulary, chosen)))
        return 0
    from fastkl.kernels.launch import architecture

    arch, gpu = architecture(torch.device(DEVICE))[0], torch.cuda.get_device_name()
    entry = config.entry_for(arch, DTYPES[dtype].itemsize, vocabulary)
    found = candidates(direction, entry.choose(direction), entry.itemsize, vocabulary)
    command = " ".join(["python -m benchmarks.tune", *(sys.argv[1:] if argv is None else argv)])
    record = {**provenance(command), "gpu": gpu, "architecture": arch, "trials": []}
    first = [attempt(arguments, one, record) for one in found]
    order = sorted(range(1, len(found)), key=lambda number: score(first[number]))[:FINALISTS]
    print("a second time, the present one and the fastest:")
    second = [attempt(arguments, found[number], record) for number in (0, *order)]
    handicap = [1, *[1 + NOISE] * len(order)]
    best = min(zip(second, handicap, strict=True), key=lambda pair: score(pair[0]) * pair[1])[0]
    if "refused" in best:
        print(f"tune: no candidate passed; the present one: {best['refused']}", file=sys.stderr)
        return 1
    times = ", ".join(f"{name} {ms:.4g} ms" for name, ms in best["times"].items())
    measured = (
        f"{gpu}, Triton {record['versions']['triton']}, {record['date'][:10]}, V = {vocabulary}: "
        f"{times}; mean {score(best):.4g}, before {score(second[0]):.4g} ms, best of {len(found)}"
    )
    chosen = dataclasses.replace(
        found[0], measured=measured, **{name: best[name] for name in FIELDS}
    )
    print(
        f"for TABLE in kernels/config.py, before or in place of "
        f"Entry({entry.arch!r}, {entry.itemsize}, {entry.max_v}, ...); run the GPU tests with it:"
    )
    print(
        pprint.pformat(dataclasses.replace(entry, arch=arch, **{direction: chosen}), width=96) + ","
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
