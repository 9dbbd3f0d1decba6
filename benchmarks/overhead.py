"""What a call takes beside its kernels: the Python of one call with few rows, on the clock, with
every launch left out.

    python3 -m benchmarks.overhead [--against PATH] [--json FILE]

With few rows this is the whole time of a call. Each function is called as users call it, on plain
tensors, and by way of its custom op, which torch.compile, dispatch modes and tensor subclasses take
(fastkl/dual_op.py). No GPU is needed: tensors are on the CPU, kernels are not run. --against
compares with another checkout of the repository: two processes take turns, so that what else the
machine does meets both.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import overhead_calls
from benchmarks.overhead_calls import FUNCTIONS, ROWS, STEPS, VOCABULARY, WAYS
from benchmarks.record import ROOT, output_file, provenance, write_json

CALLS, ROUNDS = 300, 7
# A ratio is the median of so many.
PAIRS = 25


def shortest(call):
    """Microseconds of one call: the shortest mean of several rounds, since whatever else the
    machine does only adds to it.
    """
    return min(overhead_calls.microseconds(call, CALLS) for _ in range(ROUNDS))


def measure():
    """Yields {"function", "way", step: microseconds, "calls": functions of fastkl entered by the
    last step}.
    """
    with overhead_calls.without_launches():
        leaf, named = overhead_calls.functions()
        for name, function in named.items():
            for way in WAYS:
                with overhead_calls.by_way_of(way):
                    steps = overhead_calls.calls(function, leaf)
                    times = {step: round(shortest(call), 1) for step, call in steps.items()}
                    yield {
                        "function": name,
                        "way": way,
                        **times,
                        "calls": overhead_calls.python_calls(steps[STEPS[-1]]),
                    }


@contextlib.contextmanager
def checkout(path):
    """A function (function, step) -> (microseconds, functions entered), or None, of a process with
    the fastkl of a checkout.
    """
    command = [sys.executable, str(Path(overhead_calls.__file__).resolve()), str(path)]
    with subprocess.Popen(
        command, cwd=path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def ask(function, step):
            process.stdin.write(
                json.dumps({"function": function, "step": step, "count": CALLS}) + "\n"
            )
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


def compare(path):
    """Yields {"function", "step", "microseconds": [here, there], "ratio", "calls": [here, there]}
    on plain tensors; None for what is not there.
    """
    with checkout(ROOT) as here, checkout(path) as there:
        for name, step in itertools.product(FUNCTIONS, STEPS):
            pairs = [(here(name, step), there(name, step)) for _ in range(PAIRS)]
            sides = [None if each[0] is None else each for each in zip(*pairs, strict=True)]
            times = [None if each is None else [time for time, _ in each] for each in sides]
            ratios = (
                None
                if None in times
                else [ours / theirs for ours, theirs in zip(*times, strict=True)]
            )
            yield {
                "function": name,
                "step": step,
                "microseconds": [_median(each, 1) for each in times],
                "ratio": _median(ratios, 3),
                "calls": [None if each is None else each[-1][1] for each in sides],
            }


def _median(values, digits):
    return None if values is None else round(statistics.median(values), digits)


def directory(text):
    """A checkout for argparse."""
    if not (Path(text) / "fastkl" / "__init__.py").is_file():
        raise argparse.ArgumentTypeError(
            f"expected a checkout of the repository, got {text!r}, which has no "
            f"fastkl/__init__.py; "
            f"make one with git worktree add PATH COMMIT"
        )
    return Path(text).resolve()


def print_against(record):
    """A line of the comparison."""
    shown = [
        "-" if value is None else value
        for value in (*record["microseconds"], record["ratio"], *record["calls"])
    ]
    print(
        f"{record['function']:<24}{record['step']:<22}"
        + "".join(f"{value:>10}" for value in shown),
        flush=True,
    )


def main(argv=None):
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.overhead", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--against",
        type=directory,
        metavar="PATH",
        help="compare with the checkout of the repository at PATH",
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write the records to FILE"
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    records = []
    if arguments.against:
        print(
            f"Microseconds of Python in a call here and at {arguments.against}, launches left "
            f"out, their ratio, and fastkl's functions entered:"
        )
        print(
            f"{'function':<24}{'step':<22}"
            + "".join(f"{title:>10}" for title in ("here", "there", "ratio", "calls", "there"))
        )
        for record in compare(arguments.against):
            records.append(record)
            print_against(record)
    else:
        print(
            "Microseconds of Python in a call, launches left out, and fastkl's functions entered "
            "forward and backward:"
        )
        print(
            f"{'function':<24}{'way':<16}"
            + "".join(f"{step:>22}" for step in STEPS)
            + f"{'calls':>8}"
        )
        for record in measure():
            records.append(record)
            print(
                f"{record['function']:<24}{record['way']:<16}"
                + "".join(f"{record[step]:>22.1f}" for step in STEPS)
                + f"{record['calls']:>8}",
                flush=True,
            )
    if arguments.json:
        command = " ".join(
            ["python3 -m benchmarks.overhead", *(sys.argv[1:] if argv is None else argv)]
        )
        write_json(
            arguments.json,
            {**provenance(command), "rows": ROWS, "vocabulary": VOCABULARY, "records": records},
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
