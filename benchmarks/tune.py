"""Find a launch configuration for this GPU and print it as an entry for kernels/config.py.

    python -m benchmarks.tune --direction forward|backward|fused --dtype bf16|fp32
                              [--vocabulary V] [--json FILE]

Each candidate of a small grid is checked and timed in a separate process, so that a crash or a hang
costs only that candidate. The check compares results with the reference in float64, and the bits of
a row alone with those of the row in a batch, for aligned and misaligned rows. A candidate that is
wrong, or raises, is reported and left out. The fastest are timed again, after the current
configuration, which stays unless another is faster by more than NOISE.

Exit code 0: an entry was printed; 1: no candidate passed; 2: no CUDA GPU here, or wrong use.
"""

import dataclasses
import functools
import itertools
import pprint
import statistics
import sys

import torch

import fastkl
from benchmarks.cases import DTYPES
from benchmarks.processes import Child
from benchmarks.record import command_line, has_gpu, provenance, write_json
from fastkl import testing
from fastkl.kernels import config

CHILD = Child
DEVICE = "cuda"
# Launches dominate the time of few rows, memory bandwidth that of many.
ROWS = (64, 8192)
CHECKED_ROWS = 8
# Largest relative L2 error of a result, by dtype.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 8e-3}
# The longest segment by direction; half and a quarter of it are tried too.
SEGMENTS = {"forward": 32768, "backward": 32768, "fused": 8192}
FIELDS = ("threads", "groups", "segment", "max_registers")
SECONDS = 120  # per candidate, including process start
FINALISTS = 5
NOISE = 0.01


def candidates(direction, present, itemsize, vocabulary):
    """Return the current configuration, then the rest of the grid. Programs of forward and fused
    keep one warp. A segment is a multiple of the elements that its threads hold at once.
    """
    longest = min(SEGMENTS[direction], 1 << (vocabulary - 1).bit_length())
    threads = (128, 256, 512) if direction == "backward" else (present.threads,)
    grid = itertools.product(threads, (1, 2), (longest, longest // 2, longest // 4), (None, 128))
    found = [config.RowConfig(*values[:3], present.measured, values[3]) for values in grid]
    fits = [one.segment * itemsize % (one.threads * one.groups * 16) == 0 for one in found]
    return [present, *(one for one, fit in zip(found, fits, strict=True) if fit and one != present)]


def logits(rows, vocabulary, dtype):
    options = dict(generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)
    p, q = (torch.randn(rows, vocabulary, dtype=DTYPES[dtype], **options) for _ in range(2))
    return p.mul_(3), q.add_(p), torch.randint(vocabulary - 1, (rows,), **options)


def operations(direction, p, q, tokens):
    x, y = p.detach().requires_grad_(), q.detach().requires_grad_()
    gradient = functools.partial(torch.autograd.grad, retain_graph=direction == "backward")
    if direction == "forward":
        return {
            "kl_divergence": lambda: [fastkl.kl_divergence(p, q)],
            "token_stats": lambda: list(fastkl.token_stats(p, tokens, q)),
        }
    if direction == "fused":
        summed = functools.partial(fastkl.kl_divergence, x, q, reduction="sum")
        return {"sum of kl_divergence": lambda: gradient(summed(), x)}
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
    calls = operations(*problem)
    return {f"{name} [{i}]": x for name, call in calls.items() for i, x in enumerate(call())}


def check(direction, dtype, vocabulary):
    """Raise AssertionError if a result is off, or a row's bits depend on other rows."""
    *whole, tokens = logits(CHECKED_ROWS, vocabulary, dtype)
    for start in (0, 1):  # aligned and misaligned rows
        p, q = (x[:, start:] for x in whole)
        found = results(direction, p, q, tokens)
        with fastkl.use_backend("reference"):
            exact = results(direction, p.double(), q.double(), tokens)
        for name, one in found.items():
            testing.assert_gradient(one, exact[name], name, LIMITS[one.dtype])
        for rows in (slice(2, 3), slice(1, None)):
            for name, one in results(direction, p[rows], q[rows], tokens[rows]).items():
                # Batch invariance: the same bits alone and in the batch.
                testing.assert_same_bits(one, found[name][rows], f"{name} of {rows}")


def measure(direction, dtype, vocabulary, chosen):
    from triton.testing import do_bench

    # row_fused is disabled on a GPU until measured.
    config.fuses = lambda arch: direction == "fused"
    with fastkl.use_backend("triton"), config.override(**{direction: chosen}):
        check(direction, dtype, vocabulary)
        return {
            f"{name} of {rows} rows": do_bench(call, return_mode="median")
            for rows in ROWS
            for name, call in operations(direction, *logits(rows, vocabulary, dtype)).items()
        }


def attempt(arguments, chosen, record):
    """Return a trial: the configuration with its times, or with the reason for its refusal. It runs
    in a separate process, is printed, added to the record and written with it.
    """
    problem = (arguments.direction, arguments.dtype, arguments.vocabulary)
    with CHILD() as child:
        times, fault = child.attempt(SECONDS, measure, *problem, chosen)
    outcome = {"refused": fault} if fault else {"times": times}
    trial = {**dataclasses.asdict(chosen), **outcome}
    record["trials"].append(trial)
    print(" ", [trial[name] for name in FIELDS], outcome, flush=True)
    write_json(arguments.json, record)
    return trial


def score(trial):
    return statistics.geometric_mean(trial["times"].values()) if "times" in trial else float("inf")


def parsed(argv):
    parser = command_line("tune", __doc__.splitlines()[0], "write every trial to FILE")
    add = parser.add_argument
    add("--direction", choices=SEGMENTS, required=True, help="the kernel to tune")
    add("--dtype", choices=("bf16", "fp32"), required=True, help="an entry is for its size")
    add("--vocabulary", type=int, default=128256, metavar="V", help="length of a row")
    found = parser.parse_args(argv)
    if found.vocabulary < 256 or (found.direction == "fused" and found.vocabulary % 8):
        least = "at least 256, and of fused a multiple of 8"
        parser.error(f"--vocabulary: expected {least}, got {found.vocabulary}; choose another one")
    return found


def main(argv=None):
    arguments = parsed(argv)
    direction, dtype, vocabulary = arguments.direction, arguments.dtype, arguments.vocabulary
    if not has_gpu("tune"):
        return 2
    from fastkl.kernels.launch import architecture

    arch, gpu = architecture(torch.device(DEVICE))[0], torch.cuda.get_device_name()
    entry = config.entry_for(arch, DTYPES[dtype].itemsize, vocabulary)
    found = candidates(direction, entry.choose(direction), entry.itemsize, vocabulary)
    record = {**provenance("tune", argv), "gpu": gpu, "architecture": arch, "trials": []}
    first = [attempt(arguments, one, record) for one in found]
    order = sorted(range(1, len(found)), key=lambda number: score(first[number]))[:FINALISTS]
    print("a second time, the present one and the fastest:")
    second = [attempt(arguments, found[number], record) for number in (0, *order)]
    # The current one stays unless another is faster by more than NOISE.
    best = min(second, key=lambda trial: score(trial) * (1 + NOISE * (trial is not second[0])))
    if "refused" in best:
        print(f"tune: no candidate passed; the present one: {best['refused']}", file=sys.stderr)
        return 1
    times = ", ".join(f"{name} {ms:.4g} ms" for name, ms in best["times"].items())
    measured = (
        f"{gpu}, Triton {record['versions']['triton']}, {record['date'][:10]}, V = {vocabulary}: "
        f"{times}; mean {score(best):.4g}, before {score(second[0]):.4g} ms, best of {len(found)}"
    )
    chosen = config.RowConfig(**{name: best[name] for name in FIELDS}, measured=measured)
    made = dataclasses.replace(entry, arch=arch, **{direction: chosen})
    print(
        "for TABLE in kernels/config.py, before or in place of "
        f"Entry({entry.arch!r}, {entry.itemsize}, {entry.max_v}, ...); run the GPU tests with it:\n"
        f"{pprint.pformat(made, width=96)},"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
