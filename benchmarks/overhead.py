"""Measure the Python overhead of one call with few rows, without launches.

    python -m benchmarks.overhead [--against PATH] [--json FILE]

With few rows this is the whole time of a call. Each function is called on plain tensors, and
through its custom op, as under torch.compile, dispatch modes and tensor subclasses. No GPU is
needed: tensors are on the CPU, kernels are not run. --against compares calls on plain tensors with
another checkout of the repository: processes of the two alternate, so that other load on the
machine affects both.
"""

import contextlib
import cProfile
import itertools
import json
import subprocess
import sys
import timeit
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import torch

import fastkl  # either checkout, which may be older: other imports are local

ROWS, VOCABULARY = 8, 128
CALLS, REPEATS, TURNS = 300, 7, 5
STEPS = ("no gradient", "forward", "forward and backward")
FUNCTIONS = {
    "kl_divergence": lambda p, q, tokens: fastkl.kl_divergence(p, q),
    "kl_divergence, mean": lambda p, q, tokens: fastkl.kl_divergence(p, q, reduction="mean"),
    "token_stats": lambda p, q, tokens: fastkl.token_stats(p, tokens, q).kl,
    "selective_log_softmax": lambda p, q, tokens: fastkl.selective_log_softmax(p, tokens),
}


def costs(name, calls, repeats):
    """Return {step: microseconds} and "calls", the number of fastkl functions that the last step
    enters; None if this fastkl does not know an argument.
    """
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(ROWS, VOCABULARY, generator=generator) for _ in "pq")
    p.requires_grad_()
    tokens, found = torch.zeros(ROWS, dtype=torch.int64), {}
    upstream = torch.ones(() if name.endswith("mean") else ROWS)
    forward = partial(FUNCTIONS[name], p, q, tokens)

    def whole():
        return torch.autograd.grad(forward(), p, upstream)

    with (
        mock.patch("fastkl.kernels.launch.Variant.start", lambda *_: None),
        mock.patch("fastkl.backend._interpreting", lambda: True),
        fastkl.use_backend("triton"),
        contextlib.suppress(TypeError),
    ):
        for step, call in zip(STEPS, (torch.no_grad()(forward), forward, whole), strict=True):
            # The minimum of several: other load on the machine only adds time.
            shortest = min(timeit.repeat(call, number=calls, repeat=repeats))
            found[step] = round(shortest / calls * 1e6, 1)
        return {**found, "calls": python_calls(whole)}


def python_calls(call):
    """Count the functions of fastkl and of its kernels that a call enters, including comprehensions
    and generators.
    """
    root = Path(fastkl.__file__).resolve().parents[1]
    with cProfile.Profile(builtins=False) as profile:
        call()
    files = [(Path(one.code.co_filename).resolve(), one.callcount) for one in profile.getstats()]
    ours = {root / "fastkl", root / "kernels"}
    return sum(count for path, count in files if ours.intersection(path.parents))


def measure(calls=CALLS, repeats=REPEATS):
    """Yield {"function", "way", step: microseconds, "calls"}."""
    from fastkl import _modes

    for name, way in itertools.product(FUNCTIONS, ("plain tensors", "custom op")):
        plain = _modes.plain if way == "plain tensors" else lambda _: False
        with mock.patch.object(_modes, "plain", plain):
            yield {"function": name, "way": way, **costs(name, calls, repeats)}


def compare(path, calls=CALLS, repeats=REPEATS, turns=TURNS):
    """Yield {"function", "ratio": {step: here over there}, "calls": [here, there]}, medians over
    turns, for the functions that both have.
    """
    file = Path(__file__).resolve()
    code = "import json, runpy, sys; costs = runpy.run_path(sys.argv[1])['costs']; "
    code += "print(json.dumps([costs(n, *map(int, sys.argv[2:4])) for n in sys.argv[4:]]))"
    # Use -c: a script would put its own folder on the path instead of the checkout.
    command = [sys.executable, "-c", code, *map(str, (file, calls, repeats)), *FUNCTIONS]

    def turn(checkout):
        return json.loads(subprocess.run(command, cwd=checkout, stdout=-1, check=True).stdout)

    rounds = [(turn(file.parents[1]), turn(path)) for _ in range(turns)]
    for index, name in enumerate(FUNCTIONS):
        pairs = [(here[index], there[index]) for here, there in rounds]
        if None in pairs[0]:
            continue
        ratio = {s: round(median(ours[s] / theirs[s] for ours, theirs in pairs), 3) for s in STEPS}
        yield {"function": name, "ratio": ratio, "calls": [side["calls"] for side in pairs[0]]}


def main(argv=None):
    from benchmarks.record import command_line, gather, provenance

    parser = command_line("overhead", __doc__.splitlines()[0])
    parser.add_argument("--against", metavar="PATH", help="another checkout of the repository")
    arguments = parser.parse_args(argv)
    if arguments.against and not Path(arguments.against, "fastkl", "__init__.py").is_file():
        parser.error(
            f"--against: expected a checkout of the repository, got {arguments.against!r}, without "
            "fastkl/__init__.py; make one with git worktree add PATH COMMIT"
        )
    torch.set_num_threads(1)
    print("microseconds of Python in a call, launches left out, and functions of fastkl entered")
    data = {**provenance("overhead", argv), "rows": ROWS, "vocabulary": VOCABULARY}
    gather(arguments.json, data, compare(arguments.against) if arguments.against else measure())
    return 0


if __name__ == "__main__":
    sys.exit(main())
