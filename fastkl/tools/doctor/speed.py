"""How fast the kernels of kl_divergence are on a GPU: percent of the bandwidth of a copy, measured in the same process with CUDA events.

Forward reads both logits tensors, backward reads both and writes one gradient: these bytes over the median time, beside the bytes that a device copy
reads and writes over its median time. Without a GPU there is no figure.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable

import torch

import fastkl

from .checks import Context, Outcome
from .machine import GIB

VOCABULARY = 128256
# Rows: as many as the free memory allows, from what no cache holds to a training step's.
FEWEST, MOST = 1024, 8192
# Tensors of the size of the logits that have to fit: both logits, the gradient and the one before it.
TENSORS = 4
SHARE_OF_FREE = 0.8
WARM_UP, REPETITIONS = 3, 20
# Below it something is wrong, or something else is running.
LOW_PERCENT = 50.0


def rows_for(free_bytes: int) -> int:
    """Rows of the logits for so much free memory; 0 if too few for a figure that means something."""
    rows = int(SHARE_OF_FREE * free_bytes / (TENSORS * VOCABULARY * 2)) // 64 * 64
    return min(rows, MOST) if rows >= FEWEST else 0


def median_ms(run: Callable[[], object]) -> float:
    """Median device time of run() in milliseconds; the GPU waits while its queue is filled, so that launching is not measured."""
    for _ in range(WARM_UP):
        run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPETITIONS)]
    torch.cuda.synchronize()
    if hasattr(torch.cuda, "_sleep"):
        torch.cuda._sleep(50_000_000)  # cycles: some 30 ms
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def check_speed(context: Context) -> Outcome:
    """Copy, forward and backward at one size, bfloat16."""
    if not context.on_gpu:
        return Outcome("skipped", "no GPU: nothing was timed")
    if _interpreting():
        return Outcome("skipped", "TRITON_INTERPRET: the kernels are interpreted")
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(context.device)[0]
    rows = rows_for(free)
    if not rows:
        needed = FEWEST * VOCABULARY * 2 * TENSORS / SHARE_OF_FREE
        return Outcome("skipped", f"{free / GIB:.1f} GiB are free, {needed / GIB:.1f} are needed for a figure")
    with torch.cuda.device(context.device):
        figures = measure(rows, context.device)
    percent = {phase: figures[f"{phase}_percent_of_copy"] for phase in ("forward", "backward")}
    text = f"forward {percent['forward']:.0f} %, backward {percent['backward']:.0f} % of a copy's {figures['copy_gb_per_s']:.0f} GB/s " \
           f"({rows} x {VOCABULARY} bfloat16)"
    if min(percent.values()) < LOW_PERCENT:
        return Outcome("warning", text + "; low: is something else running on this GPU?", figures)
    return Outcome("ok", text, figures)


def measure(rows: int, device: torch.device) -> dict[str, float | int]:
    """The figures, for logits N(0, 3²) and others that differ from them by N(0, 1)."""
    p, q = (torch.randn(rows, VOCABULARY, dtype=torch.bfloat16, device=device) for _ in range(2))
    q += p.mul_(3)
    figures = {"rows": rows, "vocabulary": VOCABULARY, "copy_ms": median_ms(functools.partial(torch.empty_like(p).copy_, p))}
    figures["copy_gb_per_s"] = 2 * p.nbytes / figures["copy_ms"] / 1e6
    with torch.no_grad():
        figures["forward_ms"] = median_ms(lambda: fastkl.kl_divergence(p, q))
    kl = fastkl.kl_divergence(p.requires_grad_(), q)
    weights = torch.rand_like(kl)
    figures["backward_ms"] = median_ms(lambda: torch.autograd.grad(kl, p, weights, retain_graph=True))
    for phase, tensors in (("forward", 2), ("backward", 3)):
        figures[f"{phase}_percent_of_copy"] = 100 * tensors * p.nbytes / figures[f"{phase}_ms"] / 1e6 / figures["copy_gb_per_s"]
    return figures


def _interpreting() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


CHECKS = (("kl_divergence", check_speed),)
