"""Finds a launch configuration for the GPU at hand and prints it as an entry of the table in kernels/config.py.

    python -m benchmarks.tune --direction forward|backward|fused --dtype bf16|fp32 [--vocabulary V] [--json FILE]

Every candidate of a small grid is checked and timed in a process of its own, so that a crash or a hang costs that
candidate only. The check compares results with the reference in float64, and the bits of a row alone with those of the
row in a batch, for aligned and for misaligned rows. A candidate that is wrong, or raises, is reported and left out. The
fastest are timed a second time, after the present configuration, which stays unless another is faster by NOISE.

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

    A program of forward and of fused is one warp, as in the present one; a segment of backward is a multiple of what
    its threads hold at once.
    """
    longest = min(SEGMENTS[direction], 1 << (vocabulary - 1).bit_length())
    lengths = (longest, longest // 2, longest // 4)
    backward = direction == "backward"
    threads = (128, 256, 512) if backward else (present.threads,)
    grid = itertools.product(threads, (1, 2), lengths, (None, 128))
    found = [config.RowConfig(*values[:3], present.measured, values[3]) for values in grid]
    step = 16 // itemsize if backward else 0
    fitting = [
        one for one in found if step == 0 or one.segment % (one.threads * one.groups * step) == 0
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
    """Return {name: call}; a call returns the tensors [N] or [N, V] that the direction's kernel computes."""
    x, y = p.detach().requires_grad_(), q.detach().requires_grad_()
    if direction == "forward":
        return {
            "kl_divergence": lambda: [fastkl.kl_divergence(p, q)],
            "token_stats": lambda: list(fastkl.token_stats(p, tokens, q)),
        }
    if direction == "fused":
        total = functools.partial(fastkl.kl_divergence, x, q, reduction="sum")
        return {"sum of kl_divergence": lambda: torch.autograd.grad(total(), x)}
    stats = fastkl.token_stats(x, tokens, q)
    found = {
        "kl_divergence to P": ([fastkl.kl_divergence(x, q)], x),
        "kl_divergence to Q": ([fastkl.kl_divergence(p, y)], y),
        "token_stats to P": ([stats.logprob, stats.entropy, stats.kl], x),
    }
    gradient = functools.partial(torch.autograd.grad, retain_graph=True)
    ones = torch.ones(len(p), device=p.device)
    return {
        name: functools.partial(gradient, outputs, leaf, [ones.to(one.dtype) for one in outputs])
        for name, (outputs, leaf) in found.items()
    }


def check(direction, dtype, vocabulary):
    """Raise ArithmeticError where the kernels are off, or a row's bits depend on the other rows."""
    whole = logits(8, vocabulary, dtype)
    for start in (0, 1):  # aligned and misaligned rows
        p, q, tokens = whole[0][:, start:], whole[1][:, start:], whole[2]
        with fastkl.use_backend("reference"):
            calls = operations(direction, p.double(), q.double(), tokens)
            exact = {name: call() for name, call in calls.items()}
        results = {name: call() for name, call in operations(direction, p, q, tokens).items()}
        for name, got in results.items():
            for one, true in zip(got, exact[name], strict=True):
                error = ((one.double() - true).norm(dim=-1) / true.norm(dim=-1)).max().item()
                limit = LIMITS[one.dtype]
                if not error <= limit:  # a NaN fails
                    raise ArithmeticError(
                        f"{name}: expected an error below {limit:.0e}, got {error:.1e}"
                    )
        for rows in (slice(3, 4), slice(2, 7)):
            for name, call in operations(direction, p[rows], q[rows], tokens[rows]).items():
                pairs = zip(call(), results[name], strict=True)
                if not all(torch.equal(some, every[rows]) for some, every in pairs):
                    raise ArithmeticError(f"{name}: the bits of a row depend on the rows beside it")


def measure(direction, chosen, dtype, vocabulary):
    """Return {operation and rows: milliseconds} of a configuration that passes the check."""
    from triton.testing import do_bench

    # row_fused is off on a GPU until it is measured.
    config.fuses = lambda arch: direction == "fused"
    times = {}
    with fastkl.use_backend("triton"), config.override(**{direction: chosen}):
        check(direction, dtype, vocabulary)
        for rows in ROWS:
            for name, call in operations(direction, *logits(rows, vocabulary, dtype)).items():
                times[f"{name} of {rows} rows"] = do_bench(call, return_mode="median")
    return times


def attempt(arguments, chosen):
    """Return {"times": ...} of a candidate, or {"refused": why}, from a process of its own."""
    shared = [
        f"--{name}={getattr(arguments, name)}" for name in ("direction", "dtype", "vocabulary")
    ]
    numbers = [str(getattr(chosen, name) or 0) for name in FIELDS]
    command = [sys.executable, "-m", "benchmarks.tune", *shared, "--candidate", *numbers]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return {"refused": f"no answer in {SECONDS} s"}
    if done.returncode:
        return {"refused": [f"exit code {done.returncode}", *done.stderr.strip().splitlines()][-1]}
    return {"times": json.loads(done.stdout.splitlines()[-1])}


def score(trial):
    """Return the geometric mean of a trial's times; infinite for a refused one."""
    return statistics.geometric_mean(trial["times"].values()) if "times" in trial else float("inf")


def line(trial):
    """Return a trial as a line of text."""
    named = "  ".join(f"{name} {trial[name]}" for name in FIELDS)
    times = ", ".join(f"{name} {ms:.4g} ms" for name, ms in trial.get("times", {}).items())
    return f"  {named}  {times or 'refused: ' + trial['refused']}"


def search(arguments, found, record):
    """Try the present configuration and all others, then the present one and the fastest again.

    Return the trials of the second time, the present one's first. All trials are added to `record`, which is written
    after each.
    """
    trials = record["trials"]

    def fastest():
        timed = [number for number in range(1, len(found)) if "times" in trials[number]]
        yield from [0, *sorted(timed, key=lambda number: score(trials[number]))[:FINALISTS]]

    for number in itertools.chain(range(len(found)), fastest()):
        trials.append({**dataclasses.asdict(found[number]), **attempt(arguments, found[number])})
        print(line(trials[-1]), flush=True)
        if arguments.json:
            write_json(arguments.json, record)
    return trials[len(found) :]


def parsed(argv):
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune", description=__doc__.splitlines()[0]
    )
    option = parser.add_argument
    option("--direction", choices=SEGMENTS, required=True, help="the kernel to tune")
    option("--dtype", choices=DTYPES, required=True, help="element type; an entry is for its size")
    option(
        "--vocabulary",
        type=int,
        default=128256,
        metavar="V",
        help="length of a row (default: %(default)s)",
    )
    option("--json", type=output_file, metavar="FILE", help="write every trial to FILE")
    text = "check and time this one only (0 registers: no limit); print its times as JSON"
    option(
        "--candidate",
        type=int,
        nargs=4,
        metavar=("THREADS", "GROUPS", "SEGMENT", "REGISTERS"),
        help=text,
    )
    arguments = parser.parse_args(argv)
    if arguments.vocabulary < 256 or (arguments.direction == "fused" and arguments.vocabulary % 8):
        expected = "at least 256, for fused a multiple of 8"
        parser.error(
            f"--vocabulary: expected {expected}, got {arguments.vocabulary}; give such a length"
        )
    return arguments


def main(argv=None):
    """Run the command line; return the exit code."""
    arguments = parsed(argv)
    direction, vocabulary = arguments.direction, arguments.vocabulary
    if not has_gpu("tune"):
        return 2
    if arguments.candidate:
        *numbers, registers = arguments.candidate
        chosen = config.RowConfig(*numbers, "", registers or None)
        print(json.dumps(measure(direction, chosen, arguments.dtype, vocabulary)))
        return 0
    from fastkl.kernels.launch import architecture

    arch, gpu = architecture(torch.device(DEVICE))[0], torch.cuda.get_device_name()
    entry = config.entry_for(arch, DTYPES[arguments.dtype].itemsize, vocabulary)
    found = candidates(direction, entry.choose(direction), entry.itemsize, vocabulary)
    command = "python -m benchmarks.tune " + " ".join(sys.argv[1:] if argv is None else argv)
    record = {**provenance(command), "gpu": gpu, "architecture": arch, "trials": []}
    present, *others = search(arguments, found, record)
    best = min(others, key=score, default=present)
    best = best if score(best) * (1 + NOISE) < score(present) else present
    print("the fastest:", *map(line, sorted([present, *others], key=score)), sep="\n")
    if "refused" in best:
        print(f"tune: no candidate passed; the present one: {best['refused']}", file=sys.stderr)
        return 1
    times = ", ".join(f"{name} {ms:.4g} ms" for name, ms in best["times"].items())
    measured = (
        f"{gpu}, Triton {record['versions']['triton']}, {record['date'][:10]}, V = {vocabulary}: {times}; "
        f"mean {score(best):.4g} ms, before {score(present):.4g} ms, best of {len(found)}"
    )
    *numbers, registers = (best[name] for name in FIELDS)
    chosen = config.RowConfig(*numbers, measured, registers)
    place = f"{'in place of' if entry.arch == arch else 'before'} Entry({entry.arch!r}, {entry.itemsize}, {entry.max_v}"
    print(f"for TABLE in kernels/config.py, {place}, ...); run the GPU tests with it:")
    print(
        pprint.pformat(dataclasses.replace(entry, arch=arch, **{direction: chosen}), width=96) + ","
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
