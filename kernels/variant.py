"""Compiled kernels: one per device, tensor dtypes and compile-time values."""

import contextlib
import functools
import inspect
from typing import Any

import torch

from . import config
from .layout import Case, Problem
from .row_fallback import row_fallback
from .row_math import RENYI

# Multiply-adds are explicit in the kernels, so that the bits do not depend on a compiler's fusion;
# Triton's default varies by version.
OPTIONS = {"enable_fp_fusion": False}
# Rows per program of row_fallback, its threads, and entries per step: few rows, so that fallback
# rows spread over a GPU, but enough that all programs of 8192 rows are resident.
FALLBACK_ROWS = 4
FALLBACK_THREADS = 128
FALLBACK_BLOCK = 512
# The loop over segments and Rényi's sums need more.
FALLBACK_REGISTERS, MOST_REGISTERS = 168, 240
_HERE = contextlib.nullcontext()
Grads = tuple[torch.dtype | None, ...]


def current(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's device current: kernels start on its current stream."""
    return (
        torch.cuda.device(tensor.device)
        if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device()
        else _HERE
    )


class Variant:
    """A kernel with its compile-time values and compiler options, for one device and one set of
    tensor dtypes. It compiles at the first start: call it once before capturing a CUDA graph.

    From the second start on, the compiled kernel is launched directly. Triton's launch path takes
    tens of microseconds, most of a call with few rows; its checks of globals and pre-run hooks are
    skipped.
    """

    def __init__(
        self, kernel: Any, constants: dict[str, object], options: dict[str, object]
    ) -> None:
        self.kernel, self.constants, self.options = kernel, constants, options
        self.compiled: Any = None

    def start(self, programs: int, arguments: dict[str, object]) -> None:
        """Launch `programs` programs with arguments in the order of the kernel's signature,
        compile-time values last.

        Numbers have fixed types there, so only tensor dtypes and compile-time values select a
        compilation.
        """
        if self.compiled is None:  # always in the interpreter, which does not compile
            self.compiled = self.kernel[programs, 1, 1](
                **arguments, **self.constants, **self.options
            )
        else:
            self.compiled[programs, 1, 1](*arguments.values(), *self.constants.values())


@functools.cache
def _variant(
    kernel: Any,
    case: Case,
    grads: Grads,
    num_warps: int,
    registers: int | None,
    **constants: Any,
) -> Variant:
    """Return the unique Variant of a kernel for tensors of `case`, gradients of dtypes `grads`, and
    compile-time values in addition to the case's.
    """
    known = {**case.constants, **constants}
    in_order = {
        name: known[name] for name in inspect.signature(kernel.fn).parameters if name in known
    }
    limit = {} if registers is None or case.arch.startswith("gfx") else {"maxnreg": registers}
    return Variant(kernel, in_order, {"num_warps": num_warps, **limit, **OPTIONS})


def row_variant(
    kernel: Any, case: Case, chosen: config.RowConfig, grads: Grads, limited: bool, **constants: Any
) -> Variant:
    """Return a kernel's Variant for a configuration; without `limited`, ptxas chooses the
    registers.
    """
    # Soft caps, ratios and misaligned rows need registers for temporaries.
    needs_room = case.softcap > 0.0 or case.ref_softcap > 0.0 or case.has_ratio or case.realign
    registers = max(chosen.max_registers or 0, config.ROOM) if needs_room else chosen.max_registers
    return _variant(
        kernel,
        case,
        grads,
        max(1, chosen.threads // case.warp),
        registers if limited else None,
        THREADS=chosen.threads,
        GROUPS=chosen.groups,
        **constants,
    )


def fallback_variant(
    case: Case, grads: Grads, kernel: Any = row_fallback, **constants: Any
) -> Variant:
    """Return the Variant of row_fallback or of segment_log_sums, which do not use the configuration
    table.
    """
    return _variant(
        kernel,
        case,
        grads,
        FALLBACK_THREADS // case.warp,
        MOST_REGISTERS
        if constants.get("PART") or constants.get("KIND") == RENYI.value
        else FALLBACK_REGISTERS,
        ROWS=FALLBACK_ROWS,
        BLOCK=FALLBACK_BLOCK,
        WITH_GRADIENT=bool(grads),
        **constants,
    )


def tensors(problem: Problem) -> tuple[torch.Tensor, ...]:
    """Return p, q, tokens, mask, temperatures and ratios; p stands in for an unused pointer."""
    p, q, _, tokens, mask, _, temperatures, ratios = problem
    return (
        p,
        p if q is None else q,
        p if tokens is None else tokens,
        p if mask is None else mask,
        p if temperatures is None else temperatures,
        p if ratios is None else ratios,
    )
