"""The Python of one call with few rows, launches left out.

    python -m benchmarks.overhead [--against PATH] [--json FILE]

With few rows this is the whole time of a call. Each function is called on plain tensors, and by way
of its custom op, which torch.compile, dispatch modes and tensor subclasses take. No GPU is needed:
tensors are on the CPU, kernels are not run. --against compares plain tensors with another checkout
of the repository: processes of the two take turns, so that other work of the machine meets both.
"""

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import timeit
from pathlib import Path
from statistics import median
from unittest import mock

import torch

import fastkl  # of either checkout, which may be older: the rest is imported where it is used

ROWS, VOCABULARY = 8, 128
CALLS, REPEATS, TURNS = 300, 7, 5
WAYS = ("plain tensors", "custom op")
STEPS = ("no gradient", "forward", "forward and backward")
FUNCTIONS = {
    "kl_divergence": lambda p, q, tokens: fastkl.kl_divergence(p, q),
    "kl_divergence, mean": lambda p, q, tokens: fastkl.kl_divergence(p, q, reduction="mean"),
    "token_stats": lambda p, q, tokens: fastkl.token_stats(p, tokens, q).kl,
    "selective_log_softmax": lambda p, q, tokens: fastkl.selective_log_softmax(p, tokens),
}


def costs(name, calls, repeats):
    """Return {step: (microseconds, functions of fastkl entered)} of a function, launches left out;
    None where this fastkl does not know an argument."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(ROWS, VOCABULARY, generator=generator) for _ in "pq")
    p.requires_grad_()
    tokens = torch.zeros(ROWS, dtype=torch.int64)
    upstream = torch.ones(() if name.endswith("mean") else ROWS)

    def forward():
        return FUNCTIONS[name](p, q, tokens)

    def whole():
        return torch.autograd.grad(forward(), p, upstream)

    with (
        mock.patch("fastkl.kernels.launch.Variant.start", lambda *_: None),
        mock.patch("fastkl.backend._interpreting", lambda: True),
        fastkl.use_backend("triton"),
        contextlib.suppress(TypeError),
    ):
        found = {}
        for step, call in zip(STEPS, (torch.no_grad()(forward), forward, whole), strict=True):
            # The shortest of several: other work of the machine only adds to it.
            shortest = min(timeit.repeat(call, number=calls, repeat=repeats))
            found[step] = round(shortest / calls * 1e6, 1), python_calls(call)
        return found


def python_calls(call):
    """Count the functions of fastkl and of its kernels that a call enters, comprehensions and
    generators included."""
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


def measure(calls=CALLS, repeats=REPEATS):
    """Yield {"function", "way", step: microseconds, "calls": functions of fastkl that the last
    step enters}."""
    from fastkl.ops import dual_op

    for name, way in itertools.product(FUNCTIONS, WAYS):
        plain = dual_op._plain if way == "plain tensors" else lambda _: False
        with mock.patch.object(dual_op, "_plain", plain):
            found = costs(name, calls, repeats)
        times = {step: microseconds for step, (microseconds, _) in found.items()}
        yield {"function": name, "way": way, **times, "calls": found[STEPS[-1]][1]}


def compare(path, calls=CALLS, repeats=REPEATS, turns=TURNS):
    """Yield {"function", "step", "microseconds": [here, there], "ratio", "calls": [here, there]},
    only the names and None as the ratio of what is not there."""
    # By -c, since a script would put its own folder on the path in place of the checkout.
    code = "import json, runpy, sys; costs = runpy.run_path(sys.argv[1])['costs'];"
    code += f"print(json.dumps([costs(n, {calls}, {repeats}) for n in {[*FUNCTIONS]}]))"
    command = [sys.executable, "-c", code, str(Path(__file__).resolve())]

    def turn(checkout):
        done = subprocess.run(command, cwd=checkout, stdout=subprocess.PIPE, check=True)
        return dict(zip(FUNCTIONS, json.loads(done.stdout), strict=True))

    here, there = Path(__file__).resolve().parents[1], path
    turns = [(turn(here), turn(there)) for _ in range(turns)]
    for name, step in itertools.product(FUNCTIONS, STEPS):
        found = {"function": name, "step": step, "ratio": None}
        if all(side[name] for side in turns[0]):
            pairs = [[side[name][step][0] for side in pair] for pair in turns]
            found["microseconds"] = [median(side) for side in zip(*pairs, strict=True)]
            found["ratio"] = round(median(ours / theirs for ours, theirs in pairs), 3)
            found["calls"] = [side[name][step][1] for side in turns[0]]
        yield found


def checkout(text):
    if not (Path(text) / "fastkl" / "__init__.py").is_file():
        raise argparse.ArgumentTypeError(
            f"expected a checkout of the repository, got {text!r}, which has no "
            "fastkl/__init__.py; make one with git worktree add PATH COMMIT"
        )
    return Path(text).resolve()


def main(argv=None):
    from benchmarks.record import command_line, provenance, write_json

    parser = command_line("overhead", __doc__.splitlines()[0])
    parser.add_argument(
        "--against",
        type=checkout,
        metavar="PATH",
        help="compare with the checkout of the repository at PATH",
    )
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
