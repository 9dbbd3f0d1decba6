"""Times single calls of fastkl's functions with every launch left out; as a script, for the
checkout named in its argument.

The script answers each line of JSON {"function", "step", "count"} with one: [microseconds of one of
so many calls, functions of fastkl entered], or null where that checkout does not know an argument.
It imports nothing else of the benchmarks: the checkout may be older than they are.
"""

import contextlib
import json
import sys
import time
from pathlib import Path
from unittest import mock

import torch

ROWS, VOCABULARY = 8, 128
STEPS = ("no gradient", "forward", "forward and backward")
WAYS = ("plain tensors", "custom op")
FUNCTIONS = ("kl_divergence", "kl_divergence, mean", "token_stats", "selective_log_softmax")


def functions():
    """{name: function of nothing that returns one tensor} on logits P, which require gradient, and
    P.
    """
    import fastkl

    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(ROWS, VOCABULARY, generator=generator) for _ in "pq")
    p.requires_grad_()
    tokens = torch.zeros(ROWS, dtype=torch.int64)
    return p, dict(
        zip(
            FUNCTIONS,
            (
                lambda: fastkl.kl_divergence(p, q),
                lambda: fastkl.kl_divergence(p, q, reduction="mean"),
                lambda: fastkl.token_stats(p, tokens, q).kl,
                lambda: fastkl.selective_log_softmax(p, tokens),
            ),
            strict=True,
        )
    )


def calls(function, leaf):
    """{step: what is timed} for one function."""
    upstream = torch.ones_like(function().detach())
    return dict(
        zip(
            STEPS,
            (
                torch.no_grad()(function),
                function,
                lambda: torch.autograd.grad(function(), leaf, upstream),
            ),
            strict=True,
        )
    )


@contextlib.contextmanager
def without_launches():
    """The Triton backend on CPU tensors, whose kernels are not run."""
    import fastkl
    from fastkl import backend
    from fastkl.kernels import launch

    with (
        mock.patch.object(launch.Variant, "start", lambda *arguments: None),
        mock.patch.object(backend, "_interpreting", lambda: True),
    ):
        with fastkl.use_backend("triton"):
            yield


def by_way_of(way):
    """Within it a call of plain tensors goes this way."""
    from fastkl.ops import dual_op

    return (
        contextlib.nullcontext()
        if way == WAYS[0]
        else mock.patch.object(dual_op, "_plain", lambda inputs: False)
    )


def microseconds(call, count):
    """The mean time of `count` calls."""
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begin) / count * 1e6


def python_calls(call):
    """How many functions of fastkl and of its kernels, comprehensions and generators included, a
    call of `call` enters.
    """
    import fastkl

    root, entered = Path(fastkl.__file__).resolve().parents[1], []

    def note(frame, event, argument):
        if event == "call":
            path = Path(frame.f_code.co_filename).resolve()
            entered.extend([path] if {root / "fastkl", root / "kernels"} & {*path.parents} else [])

    call()
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return len(entered)


def answer(questions, answers):
    """Answer each line of `questions` with a line."""
    with without_launches():
        leaf, named = functions()
        for line in questions:
            asked, figures = json.loads(line), None
            with contextlib.suppress(TypeError):
                call = calls(named[asked["function"]], leaf)[asked["step"]]
                figures = [microseconds(call, asked["count"]), python_calls(call)]
            print(json.dumps(figures), file=answers, flush=True)


if __name__ == "__main__":
    sys.path[0] = sys.argv[1]  # in place of this file's folder
    torch.set_num_threads(1)
    answer(sys.stdin, sys.stdout)
