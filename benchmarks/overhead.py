"""The Python of one call with few rows, launches left out.

    python -m benchmarks.overhead [--json FILE]

With few rows this is the whole time of a call. Each function is called on plain tensors, and by way
of its custom op, which torch.compile, dispatch modes and tensor subclasses take. No GPU is needed:
tensors are on the CPU, kernels are not run.
"""

import itertools
import json
import sys
import timeit
from functools import partial
from pathlib import Path
from unittest import mock

import torch

import fastkl
from benchmarks.record import command_line, provenance, write_json
from fastkl.ops import dual_op

ROWS, VOCABULARY = 8, 128
CALLS, REPEATS = 300, 7
WAYS = ("plain tensors", "custom op")
STEPS = ("no gradient", "forward", "forward and backward")
FUNCTIONS = {
    "kl_divergence": lambda p, q, tokens: fastkl.kl_divergence(p, q),
    "kl_divergence, mean": lambda p, q, tokens: fastkl.kl_divergence(p, q, reduction="mean"),
    "token_stats": lambda p, q, tokens: fastkl.token_stats(p, tokens, q).kl,
    "selective_log_softmax": lambda p, q, tokens: fastkl.selective_log_softmax(p, tokens),
}


def measure(calls=CALLS, repeats=REPEATS):
    """Yield {"function", "way", step: microseconds, "calls": functions of fastkl that the last
    step enters}."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(ROWS, VOCABULARY, generator=generator) for _ in "pq")
    p.requires_grad_()
    arguments = (p, q, torch.zeros(ROWS, dtype=torch.int64))
    with (
        mock.patch("fastkl.kernels.launch.Variant.start", lambda *_: None),
        mock.patch("fastkl.backend._interpreting", lambda: True),
        fastkl.use_backend("triton"),
    ):
        for (name, function), way in itertools.product(FUNCTIONS.items(), WAYS):
            plain = dual_op._plain if way == "plain tensors" else lambda _: False
            with mock.patch.object(dual_op, "_plain", plain):
                figures = _figures(partial(function, *arguments), p, calls, repeats)
            yield {"function": name, "way": way, **figures}


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


def main(argv=None):
    arguments = command_line("overhead", __doc__.splitlines()[0]).parse_args(argv)
    torch.set_num_threads(1)
    print("microseconds of Python in a call, launches left out, and functions of fastkl entered")
    data = {**provenance("overhead", argv), "rows": ROWS, "vocabulary": VOCABULARY, "records": []}
    for found in measure():
        data["records"].append(found)
        print(json.dumps(found), flush=True)
    write_json(arguments.json, data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
