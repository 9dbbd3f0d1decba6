"""Providers whose Triton kernels run without a GPU, in Triton's interpreter: for errors only.

The interpreter executes a kernel's operations with numpy, float32 as float32: its errors are those
of the formulas and of the order of the sums, not of a GPU's faster exp and fused multiply-adds.
Triton decides at import, so the kernels live in a child process that has TRITON_INTERPRET=1.
"""

import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context, parent_process
from threading import Thread
from unittest import mock

import torch

from benchmarks.cases import Inputs
from benchmarks.providers import Provider, load_providers

NAMES = {
    "fastkl (Triton, interpreted)": "fastkl",
    "Liger KLDIVLoss (interpreted)": "Liger KLDIVLoss",
    "Liger JSD (interpreted)": "Liger JSD",
}
# Of each pair, where not all: at V = 128256 a row of ours takes a second, one of theirs a tenth.
ROWS = {"fastkl": 2}
SECONDS = 120  # after which a call counts as failed


def _begin():
    torch.set_num_threads(1)
    # The child ends where its parent ends, killed or not.
    Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


@cache
def _child():
    # A spawned process starts with the environment of this moment.
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        executor = ProcessPoolExecutor(1, get_context("spawn"), _begin)
        executor.submit(os.getpid).result(SECONDS)
    return executor


def _in_child(name, pickled):
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
    """The child's values and gradient as one differentiable operation on the leaf."""

    @staticmethod
    def forward(ctx, leaf, name, *inputs):
        # As bytes: torch would pass tensors in shared memory, of which a container may have little.
        reply = _child().submit(_in_child, name, pickle.dumps(inputs)).result(SECONDS)
        kl, gradient = pickle.loads(reply)
        ctx.save_for_backward(gradient)
        return kl

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        scaled = (upstream.unsqueeze(-1) * gradient).to(gradient.dtype)
        return scaled, None, None, None, None


def _kl_divergence(name, inputs):
    pair = (inputs.p.detach(), inputs.q.detach())
    return (_Interpreted.apply(inputs.leaf, name, *pair, inputs.wrt),)


def interpreted_providers(names=None):
    """Make a provider for each of NAMES, or for those in `names`; the first call starts the
    child."""
    return [
        Provider(
            name, {"kl_divergence": partial(_kl_divergence, peer)}, rows=ROWS.get(peer), apart=True
        )
        for name, peer in NAMES.items()
        if names is None or name in names
    ]
