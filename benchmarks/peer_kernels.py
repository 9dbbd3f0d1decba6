"""Public Triton kernels of other packages, counted like ours, and the traffic from logits to a KL.

    python -m benchmarks.static_costs --peers --json FILE

Each adapter calls the peer's own public function on tensors without storage (device "meta", 8192 ×
128256, bfloat16 logits), catches the launch of the kernel in question and compiles it for sm_90 as
Triton's launcher would. Nothing runs and no driver is needed. A peer that is not installed, that no
longer fits its adapter or that does not compile is a row with the reason.
"""

import contextlib
import importlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks import record, roofline, static_costs
from benchmarks.compile_plan import Specialization, plan

N, V = 8192, 128256
ARCH = "sm_90"
BACKEND = make_backend(GPUTarget("cuda", 90, 32))
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def catch_launch(call, kernel, skip):
    """Return (arguments by name, options such as warps, what triton.compile takes) of the launch
    of `kernel` that call() arrives at; launches of `skip` before it do nothing."""
    caught = []

    def catch(*args, grid, warmup=False, **kwargs):
        bind = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
        arguments, types, options = bind(*args, **kwargs)
        _, *packed = kernel._pack_args(BACKEND, options, arguments, types, options)
        caught.append((arguments, options, (kernel, *packed)))
        raise StopIteration  # end the peer's function at the launch

    with (
        mock.patch.object(skip, "run"),
        mock.patch.object(kernel, "run", catch),
        contextlib.suppress(StopIteration),
    ):
        call()
    if not caught:
        raise ValueError(f"expected a launch of {kernel.fn.__name__}, got none")
    return caught[0]


def meta(*shape, dtype=torch.bfloat16, grad=False):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


# How the peers are called, where it takes more than a line


def liger_kl_div(ops):
    return ops.LigerKLDivLossFunction.apply(meta(N, V, grad=True), meta(N, V), "sum", True)


def trl_divergence(ops):
    student, teacher, head = meta(N, 4096, grad=True), meta(N, 4096), meta(V, 4096)
    inputs = (student, head, None, teacher, head, None, 1.0)
    # They ask for a GPU and for its autocast; the tensors here are on none.
    ours = {"_use_triton": lambda device: True, "_compute_dtype": lambda hidden: hidden.dtype}
    with mock.patch.multiple(ops, **ours):
        ops.ChunkedDivergenceFunction.apply(*inputs)


# The kernels


class Kernel(NamedTuple):
    """A kernel of a peer.

    symbol: its name in `module`. call: the peer's function, given the module. unit: "pair" of
    logits or "logit". tensors: its arguments of the size of the logits, each read or written once.
    work: what it computes, and what has to run beside it. skip: a kernel launched before it. block:
    its constant for vocabulary entries per iteration.
    """

    name: str
    package: str
    module: str
    symbol: str
    call: Callable
    unit: str
    tensors: tuple[str, ...]
    work: str
    skip: str | None = None
    block: str = "BLOCK_SIZE"


KERNELS = (
    Kernel(
        *("liger _kldiv_kernel_forward", "liger-kernel"),
        *("liger_kernel.ops.kl_div", "_kldiv_kernel_forward", liger_kl_div),
        *("pair", ("y_ptr", "gt_ptr")),
        "KL(target||input) of log-probabilities, log_target, summed; log_softmax of both tensors "
        "before it",
    ),
    Kernel(
        *("liger _kldiv_kernel_backward", "liger-kernel"),
        *("liger_kernel.ops.kl_div", "_kldiv_kernel_backward"),
        lambda ops: liger_kl_div(ops).backward(),
        *("pair", ("target_ptr", "new_grads_ptr")),
        "its gradient to input only, as log-probability; log_softmax's backward after it",
        "_kldiv_kernel_forward",
    ),
    Kernel(
        *("liger _jsd_kernel beta=1", "liger-kernel", "liger_kernel.ops.jsd", "_jsd_kernel"),
        lambda ops: ops.LigerJSDFunction.apply(
            meta(N, V, grad=True), meta(N, V), None, 1.0, -100, "nvidia-triton"
        ),
        *("pair", ("X_ptr", "Y_ptr", "loss_ptr", "dX_ptr")),
        "KL(input||target), the RLHF direction, per entry and its gradient to input; a clone, a "
        "sum, both log_softmax and one backward of it beside. Where the CuTe DSL is installed on "
        "Hopper and later, Liger takes that implementation instead",
    ),
    Kernel(
        *("trl logprob_entropy._forward_kernel", "trl"),
        *("trl.kernels.logprob_entropy", "_forward_kernel"),
        lambda ops: ops.selective_log_softmax_and_entropy(
            meta(N, V, grad=True), meta(N, dtype=torch.int64)
        ),
        *("logit", ("logits_ptr",)),
        "log-probability of the sampled token and entropy of one tensor: no KL, only sampled "
        "estimates of it",
    ),
    Kernel(
        *("trl chunked_divergence._stats_kernel", "trl"),
        *("trl.kernels.chunked_divergence", "_stats_kernel", trl_divergence),
        *("pair", ("s_ptr", "t_ptr")),
        "KL of both directions and entropy, from float32 logits tiles that its matrix products "
        "wrote just before",
    ),
)
# Ours that do comparable work: {(name in the compile plan, element type): unit}.
OURS = {
    **{(f"kl_divergence.{step}", "bf16"): "pair" for step in ("forward", "backward_p")},
    **{(f"token_stats.{step}", "bf16"): "pair" for step in ("forward", "backward_p")},
    **{(f"kl_divergence.{step}", "fp32"): "pair" for step in ("forward", "backward_p")},
    **{(f"token_stats_policy_only.{step}", "bf16"): "logit" for step in ("forward", "backward")},
}
# {from bf16 logits to a KL and back: (what it gives, forward, backward)}, a direction as the bytes
# read and written per pair (fixed, times L, the bytes of a log-probability): every kernel on the
# way reads its inputs once and writes its outputs once. A formula, not a measurement.
PIPELINES = {
    "fastkl kl_divergence, token_stats": (
        *("exact KL per token, gradient to the first logits", (4, 0), (6, 0)),
    ),
    # log_softmax of both 2 (2 + L); the kernel 2L. Backward: the kernel 2L, log_softmax's 2 + 2L.
    "liger kl_div": (
        "exact KL(target||input), summed; gradient to input, so not to the policy of "
        "KL(policy||reference)",
        *((4, 4), (2, 4)),
    ),
    # log_softmax of both; clone 2L; zeros 4; kernel 2L in, 4 + L out; sum 4.
    "liger jsd, beta 0 and 1": (
        "exact KL(target||input) and KL(input||target), summed; gradient to input",
        *((16, 7), (2, 2)),
    ),
    "trl selective_log_softmax of both": (
        "log-probabilities of the sampled token, for an estimate such as k3, not the KL",
        *((4, 0), (4, 0)),
    ),
}


def measure(kernel):
    row = {"kernel": kernel.name, "package": kernel.package, "unit": kernel.unit}
    row |= {"version": record.version(kernel.package), "work": kernel.work}
    if row["version"] is None:
        return {**row, "reason": f"not installed: pip install {kernel.package}"}
    try:
        ops = importlib.import_module(kernel.module)
        symbols = getattr(ops, kernel.symbol), getattr(ops, kernel.skip or kernel.symbol)
        arguments, options, description = catch_launch(partial(kernel.call, ops), *symbols)
        large = {n: x for n, x in arguments.items() if getattr(x, "numel", int)() > 64 * N}
        if set(large) != set(kernel.tensors):
            expected = f"expected arguments as large as the logits {kernel.tensors}"
            raise ValueError(f"{expected}, got {list(large)}")
        warps = options.pop("num_warps", 4)  # Triton's default
        pairs = arguments[kernel.block] // (32 * warps)
        found = Specialization(kernel.name, *description, warps, pairs, options)
        cost = static_costs.measure(found, ARCH, TYPES[large[kernel.tensors[0]].dtype], True)
        return _row(cost, sum(x.element_size() for x in large.values()), row)
    except Exception as error:  # of any type: the other rows must not get lost
        first = next(iter(str(error).splitlines()), "")
        return {**row, "reason": f"{type(error).__name__}: {first}"}


def _row(cost, moved, names):
    bound = roofline.upper_bound(cost, moved)
    return {**cost, **names, "kernel_bytes": moved, "upper_bound_of_peak_bandwidth": bound}


def pipelines():
    for name, (gives, *sides) in PIPELINES.items():
        row = {"pipeline": name, "gives": gives}
        for side, (fixed, per) in zip(("forward", "backward"), sides, strict=True):
            sums = {f"bytes_{t}_log_probs": fixed + per * n for t, n in (("bf16", 2), ("fp32", 4))}
            row[side] = {"formula": f"{fixed} + {per}L" if per else str(fixed), **sums}
        yield row


def measure_all():
    """Return {"kernels", "pipelines", "errors"}; errors are of our kernels, never of a peer's."""
    planned = {(found.name, d): found for d in TYPES.values() for found in plan(d, True, ARCH)}
    found = static_costs.collect((planned[case], ARCH, case[1], True) for case in OURS)
    rows, names = [], {"package": "fastkl", "version": record.version("fastkl")}
    for cost in found["records"]:
        name, dtype = cost["kernel"], cost["dtype"]
        names |= {"kernel": f"fastkl {name}", "unit": OURS[name, dtype]}
        rows.append(_row(cost, roofline.bytes_per_pair(name, dtype), names))
    rows += [measure(kernel) for kernel in KERNELS]
    return {"kernels": rows, "pipelines": list(pipelines()), "errors": found["errors"]}
