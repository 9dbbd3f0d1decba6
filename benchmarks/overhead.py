"""The Python of one call with few rows, launches left out.

    python -m benchmarks.overhead [--against PATH] [--json FILE]

With few rows this is the whole time of a call. Each function is called on plain tensors, and by way
of its custom op, which torch.compile, dispatch modes and tensor subclasses take. No GPU is needed:
tensors are on the CPU, kernels are not run. --against compares with another checkout of the
repository: processes of both take turns, so that other work of the machine meets both.
"""

import argparse
import contextlib
import json
import math
import subprocess
import sys
import timeit
from functools import partial
from pathlib import Path
from unittest import mock

import torch

ROWS, VOCABULARY = 8, 128
CALLS, REPEATS, TURNS = 300, 7, 25
STEPS = ("no gradient", "forward", "forward and backward")
FUNCTIONS = {
    "kl_divergence": lambda f, p, q, tokens: f.kl_divergence(p, q),
    "kl_divergence, mean": lambda f, p, q, tokens: f.kl_divergence(p, q, reduction="mean"),
    "token_stats": lambda f, p, q, tokens: f.token_stats(p, tokens, q).kl,
    "selective_log_softmax": lambda f, p, q, tokens: f.selective_log_softmax(p, tokens),
}


def measure(ways=("plain tensors", "custom op"), calls=CALLS, repeats=REPEATS):
    """Yields {"function", "way", step: microseconds, "calls": functions of fastkl that the last
    step enters}, without figures where this fastkl does not know an argument."""
    import fastkl
    from fastkl import backend
    from fastkl.kernels import launch

    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(ROWS, VOCABULARY, generator=generator) for _ in "pq")
    p.requires_grad_()
    arguments = (fastkl, p, q, torch.zeros(ROWS, dtype=torch.int64))
    with (
        mock.patch.object(launch.Variant, "start", lambda *_: None),
        mock.patch.object(backend, "_interpreting", lambda: True),
        fastkl.use_backend("triton"),
    ):
        for name, function in FUNCTIONS.items():
            for way in ways:
                found = {"function": name, "way": way}
                with contextlib.ExitStack() as stack, contextlib.suppress(TypeError):
                    if way == "custom op":
                        plain = mock.patch("fastkl.ops.dual_op._plain", lambda _: False)
                        stack.enter_context(plain)
                    found |= _figures(partial(function, *arguments), p, calls, repeats)
                yield found


def _figures(function, leaf, calls, repeats):
    upstream = torch.ones_like(function().detach())

    def whole():
        return torch.autograd.grad(function(), leaf, upstream)

    found = {"calls": python_calls(whole)}
    for name, step in zip(STEPS, (torch.no_grad()(function), function, whole), strict=True):
        # The shortest of several: other work of the machine only adds to it.
        shortest = min(timeit.repeat(step, number=calls, repeat=repeats))
        found[name] = round(shortest / calls * 1e6, 1)
    return found


def python_calls(call):
    """Counts the functions of fastkl and of its kernels that a call enters, comprehensions and
    generators included."""
    import fastkl

    root, entered = Path(fastkl.__file__).resolve().parents[1], []

    def note(frame, event, argument):
        if event == "call":
            entered.append(Path(frame.f_code.co_filename).resolve())

    call()  # a first call looks up things that stay known
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return sum(bool({root / "fastkl", root / "kernels"} & {*path.parents}) for path in entered)


# Answers each line with the next record.
CHILD = """import itertools, json, runpy, sys, torch
torch.set_num_threads(1)
measure = runpy.run_path(sys.argv[1])["measure"]
records = (r for _ in itertools.count() for r in measure(["plain tensors"], int(sys.argv[2]), 1))
for _ in sys.stdin:
    print(json.dumps(next(records)), flush=True)"""


def compare(path):
    """Yields {"function", "step", "microseconds": [here, there], "ratio", "calls": [here, there]}
    on plain tensors, medians of all turns; None for a function that is not there."""
    import pandas as pd

    here = Path(__file__).resolve()
    command = [sys.executable, "-c", CHILD, str(here), str(CALLS)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(subprocess.Popen(command, cwd=checkout, **pipes))
            for checkout in (here.parents[1], path)
        ]
        turns = [[_ask(child) for child in children] for _ in range(TURNS * len(FUNCTIONS))]
    sides = [pd.DataFrame(side, columns=["function", "calls", *STEPS]) for side in zip(*turns)]
    for name in FUNCTIONS:
        ours, theirs = (side[side["function"] == name].drop(columns="function") for side in sides)
        ratios = (ours / theirs).median()
        for step in STEPS:
            times, calls = ([_known(s[key].median()) for s in (ours, theirs)] for key in (step, "calls"))
            found = {"microseconds": times, "ratio": _known(ratios[step]), "calls": calls}
            yield {"function": name, "step": step, **found}


def _known(value):
    return None if math.isnan(value) else round(float(value), 3)


def _ask(child):
    child.stdin.write("\n")
    child.stdin.flush()
    return json.loads(child.stdout.readline())


def checkout(text):
    if not (Path(text) / "fastkl" / "__init__.py").is_file():
        why = f"expected a checkout of the repository, got {text!r}; git worktree add makes one"
        raise argparse.ArgumentTypeError(why)
    return Path(text).resolve()


def main(argv=None):
    # Only here: as a child in another checkout, whose benchmarks may be others, this file runs too.
    from benchmarks.record import command_line, provenance, write_json

    parser = command_line("overhead", __doc__.splitlines()[0])
    parser.add_argument("--against", type=checkout, metavar="PATH", help="another checkout")
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
