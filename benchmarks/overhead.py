"""The Python of one call with few rows, launches left out.

    python -m benchmarks.overhead [--against PATH] [--json FILE]

With few rows this is the whole time of a call. Each function is called on plain tensors, and by way
of its custom op, which torch.compile, dispatch modes and tensor subclasses take. No GPU is needed:
tensors are on the CPU, kernels are not run. --against compares plain tensors with another checkout
of the repository: two processes take turns, so that other work of the machine meets both.
"""

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from unittest import mock

import torch

from benchmarks import overhead_calls
from benchmarks.overhead_calls import FUNCTIONS, ROWS, STEPS, VOCABULARY, microseconds
from benchmarks.record import ROOT, command_line, provenance, write_json
from fastkl.ops import dual_op

CALLS, REPEATS, PAIRS = 300, 7, 25
WAYS = ("plain tensors", "custom op")


def measure(calls=CALLS, repeats=REPEATS):
    """Yield {"function", "way", step: microseconds, "calls": functions of fastkl that the last
    step enters}."""
    with overhead_calls.without_launches():
        for name, way in itertools.product(FUNCTIONS, WAYS):
            plain = dual_op._plain if way == "plain tensors" else lambda _: False
            with mock.patch.object(dual_op, "_plain", plain):
                found = {"function": name, "way": way}
                for step, call in overhead_calls.steps_of(name).items():
                    # The shortest of several: other work of the machine only adds to it.
                    shortest = min(microseconds(call, calls) for _ in range(repeats))
                    found[step] = round(shortest, 1)
                yield {**found, "calls": overhead_calls.python_calls(call)}


def compare(path, calls=CALLS, pairs=PAIRS):
    """Yield {"function", "step", "microseconds": [here, there], "ratio", "calls": [here, there]},
    only the names and None as the ratio of what is not there."""
    with _checkout(ROOT) as here, _checkout(path) as there:
        for case in itertools.product(FUNCTIONS, STEPS):
            answers = [(here(*case, calls), there(*case, calls)) for _ in range(pairs)]
            found = {**dict(zip(("function", "step"), case, strict=True)), "ratio": None}
            if None not in answers[0]:
                times = [[time for time, _ in pair] for pair in answers]
                found["microseconds"] = [
                    round(median(side), 1) for side in zip(*times, strict=True)
                ]
                found["ratio"] = round(median(ours / theirs for ours, theirs in times), 3)
                found["calls"] = [entered for _, entered in answers[0]]
            yield found


@contextlib.contextmanager
def _checkout(path):
    """Run overhead_calls with the fastkl of a checkout; gives a function that asks it."""
    # By -c, since a script would put its own folder on the path in place of the checkout.
    code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
    command = [sys.executable, "-c", code, str(Path(overhead_calls.__file__).resolve())]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=path, **pipes) as process:

        def ask(*question):
            print(json.dumps(question), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield ask


def checkout(text):
    if not (Path(text) / "fastkl" / "__init__.py").is_file():
        raise argparse.ArgumentTypeError(
            f"expected a checkout of the repository, got {text!r}, which has no "
            "fastkl/__init__.py; make one with git worktree add PATH COMMIT"
        )
    return Path(text).resolve()


def main(argv=None):
    parser = command_line("overhead", __doc__.splitlines()[0])
    help_text = "compare with the checkout of the repository at PATH"
    parser.add_argument("--against", type=checkout, metavar="PATH", help=help_text)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    print("microseconds of Python in a call, launches left out, and functions of fastkl entered")
    data = {**provenance("overhead", argv), "rows": ROWS, "vocabulary": VOCABULARY, "records": []}
    for found in compare(arguments.against) if arguments.against else measure():
        data["records"].append(found)
        print(json.dumps(found), flush=True)
    write_json(arguments.json, data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
