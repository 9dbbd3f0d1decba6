"""Call fastkl's functions on CPU tensors, launches left out, and count what they enter.

As a script, with a checkout first on the path, it answers each line of JSON, [function, step,
calls], by one: [microseconds of a call, functions of fastkl entered], null where that checkout does
not know an argument. It imports nothing else of the benchmarks: the checkout may be older.
"""

import contextlib
import json
import sys
import timeit
from pathlib import Path
from unittest import mock

import torch

import fastkl

ROWS, VOCABULARY = 8, 128
STEPS = ("no gradient", "forward", "forward and backward")
FUNCTIONS = {
    "kl_divergence": lambda p, q, tokens: fastkl.kl_divergence(p, q),
    "kl_divergence, mean": lambda p, q, tokens: fastkl.kl_divergence(p, q, reduction="mean"),
    "token_stats": lambda p, q, tokens: fastkl.token_stats(p, tokens, q).kl,
    "selective_log_softmax": lambda p, q, tokens: fastkl.selective_log_softmax(p, tokens),
}


@contextlib.contextmanager
def without_launches():
    with (
        mock.patch("fastkl.kernels.launch.Variant.start", lambda *_: None),
        mock.patch("fastkl.backend._interpreting", lambda: True),
        fastkl.use_backend("triton"),
    ):
        yield


def steps_of(name):
    """Return {step: its call, of no argument} of a function."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(ROWS, VOCABULARY, generator=generator) for _ in "pq")
    p.requires_grad_()
    tokens = torch.zeros(ROWS, dtype=torch.int64)

    def forward():
        return FUNCTIONS[name](p, q, tokens)

    upstream = torch.ones_like(forward().detach())

    def whole():
        return torch.autograd.grad(forward(), p, upstream)

    return dict(zip(STEPS, (torch.no_grad()(forward), forward, whole), strict=True))


def microseconds(call, calls):
    return timeit.timeit(call, number=calls) / calls * 1e6


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


def answer(line):
    name, step, calls = json.loads(line)
    try:
        call = steps_of(name)[step]
    except TypeError:
        return None
    entered = python_calls(call)
    return microseconds(call, calls), entered


if __name__ == "__main__":
    torch.set_num_threads(1)
    with without_launches():
        for line in sys.stdin:
            print(json.dumps(answer(line)), flush=True)
