"""Triton kernels without a GPU, for errors only: providers whose kernels run in Triton's
interpreter, in a child process.

The interpreter executes a kernel's operations with numpy, float32 as float32: its errors are those
of the formulas and of the order of the sums, not of a GPU's faster exp and fused multiply-adds.
Triton decides at import, so the kernels live in a process of their own that has TRITON_INTERPRET=1.
"""

import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context, parent_process
from threading import Thread

import torch

from benchmarks.cases import Inputs
from benchmarks.providers import Provider, load_providers

NAMES = {
    "fastkl (Triton, interpreted)": "fastkl",
    "Liger KLDIVLoss (interpreted)": "Liger KLDIVLoss",
    "Liger JSD (interpreted)": "Liger JSD",
}
ROWS = {
    "fastkl": 2
}  # of each pair, where not all: at a vocabulary of 128256 a row of ours takes a second, one of theirs a tenth
SECONDS = 120  # after which a call counts as failed


def _begin():
    """In the child: one thread, and the end where its parent ends, killed or not."""
    torch.set_num_threads(1)
    Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


@cache
def _child():
    """The process with the interpreter, started once."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = (
        "1"  # a spawned process starts with the environment of this moment
    )
    try:
        executor = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_begin)
        executor.submit(os.getpid).result(SECONDS)
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
    return executor


def _in_child(name, pickled):
    """The pickled (KL, gradient of its sum) of a provider for pickled (p, q, wrt), computed in the
    process with the interpreter.
    """
    import fastkl

    p, q, wrt = pickle.loads(pickled)
    (provider,) = load_providers(p.device, [name])
    if provider.missing:
        raise RuntimeError(provider.missing)
    inputs = Inputs(p.requires_grad_(wrt == "p"), q.requires_grad_(wrt == "q"), None, (), wrt)
    with fastkl.use_backend("triton"):
        (kl,) = provider.operations["kl_divergence"](inputs)
        (gradient,) = torch.autograd.grad(kl.sum(), inputs.leaf)
    return pickle.dumps((kl.detach(), gradient))


class _Interpreted(torch.autograd.Function):
    """The child's values and gradient as one differentiable operation."""

    @staticmethod
    def forward(ctx, p, q, name, wrt):
        # As bytes: torch would pass tensors in shared memory, of which a container may have little.
        reply = (
            _child()
            .submit(_in_child, name, pickle.dumps((p.detach(), q.detach(), wrt)))
            .result(SECONDS)
        )
        kl, gradient = pickle.loads(reply)
        ctx.save_for_backward(gradient)
        ctx.wrt = wrt
        return kl

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        gradient = (upstream.unsqueeze(-1) * gradient).to(gradient.dtype)
        return (gradient, None, None, None) if ctx.wrt == "p" else (None, gradient, None, None)


def _kl_divergence(name, inputs):
    return (_Interpreted.apply(inputs.p, inputs.q, name, inputs.wrt),)


def interpreted_providers(names=None):
    """A provider for each of NAMES, or for those in `names`; the child process starts with the
    first call.
    """
    chosen = {name: peer for name, peer in NAMES.items() if names is None or name in names}
    return [
        Provider(
            name, {"kl_divergence": partial(_kl_divergence, peer)}, rows=ROWS.get(peer), apart=True
        )
        for name, peer in chosen.items()
    ]
