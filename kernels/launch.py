"""Launchers: allocate, choose a configuration, launch. Arguments were checked and shapes settled above."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import NamedTuple

import torch
import triton

from . import config
from .row_backward import row_backward
from .row_finish import row_finish
from .row_forward import row_forward
from .row_math import STATE

# Multiply-adds are explicit in the kernels, so that the bits do not depend on what a compiler fuses; Triton's own default varies by version.
OPTIONS = {"enable_fp_fusion": False}
FIELDS = ("logprob", "entropy", "ref_logprob", "kl", "ref_kl")
# Rows that one program of row_finish finishes, and its threads, which read a row again where one pass does not hold it: few enough rows that a batch
# of such rows is spread over a GPU, enough that the programs of 8192 rows are all there at once.
FINISH_ROWS = 16
FINISH_THREADS = 128
FINISH_REGISTERS = 168
# False leaves the rows that one pass does not hold unfinished, with a NaN as their first saved value: how a test sees which these are.
READ_AGAIN = True


class Rows(NamedTuple):
    """A logits tensor as rows: [outer, inner, V] by two strides (in elements), whatever its leading shape was."""

    tensor: torch.Tensor
    stride_outer: int
    stride_inner: int

    @property
    def misaligned(self) -> int:
        """Elements between a 16-byte boundary and the first element."""
        return self.tensor.data_ptr() // self.tensor.element_size() % self.lanes

    @property
    def lanes(self) -> int:
        """Elements of a 16-byte block."""
        return 16 // self.tensor.element_size()

    def same_blocks(self, other: Rows, inner: int, outer: int) -> bool:
        """Whether every row of both starts at the same distance, in elements, from a boundary of this tensor's 16-byte blocks.

        The other's blocks have as many elements, and are 8 bytes for a 16-bit tensor beside a 32-bit one.
        """
        return (self.misaligned == other.tensor.data_ptr() // other.tensor.element_size() % self.lanes
                and (inner == 1 or (self.stride_inner - other.stride_inner) % self.lanes == 0)
                and (outer == 1 or (self.stride_outer - other.stride_outer) % self.lanes == 0))

    def aligned(self, inner: int, outer: int) -> bool:
        """Whether every row starts on a 16-byte boundary."""
        return (self.misaligned == 0 and (inner == 1 or self.stride_inner % self.lanes == 0)
                and (outer == 1 or self.stride_outer % self.lanes == 0))


class Problem(NamedTuple):
    """N = outer · inner rows of length V; what is None does not take part. Vectors are [N] and contiguous. softcap: 0 for none."""

    p: Rows
    q: Rows | None
    outer: int
    inner: int
    vocabulary: int
    tokens: torch.Tensor | None
    mask: torch.Tensor | None
    temperature: float
    temperatures: torch.Tensor | None
    softcap: float = 0.0

    @property
    def rows(self) -> int:
        return self.outer * self.inner

    @property
    def q_in_blocks(self) -> bool:
        """Whether Q can be read in the blocks that P is read in."""
        return self.q is None or (self.p.lanes == self.q.lanes and self.p.same_blocks(self.q, self.inner, self.outer))


@functools.cache
def architecture(device: torch.device) -> tuple[str, int]:
    """The configuration table's name of a device and its threads per warp."""
    if device.type != "cuda":
        return "interpreter", 32
    if torch.version.hip:
        properties = torch.cuda.get_device_properties(device)
        return properties.gcnArchName.split(":")[0], properties.warp_size
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}", 32


def _choose(problem: Problem, direction: str) -> tuple[config.RowConfig, dict[str, object]]:
    """The configuration, and the compiler options that come with it."""
    arch, warp = architecture(problem.p.tensor.device)
    chosen = config.select(direction, arch, problem.p.tensor.element_size(), problem.vocabulary)
    return chosen, {"num_warps": max(1, chosen.threads // warp), **chosen.options(arch, problem.softcap > 0.0), **OPTIONS}


def finish_options(arch: str, warp: int) -> dict[str, object]:
    """The compiler options of row_finish, which takes no part in the configuration table."""
    registers = {} if arch.startswith("gfx") else {"maxnreg": FINISH_REGISTERS}
    return {"num_warps": FINISH_THREADS // warp, **registers, **OPTIONS}


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """The device as the current one: kernels start on the current one's stream."""
    return torch.cuda.device(device) if device.type == "cuda" and device.index != torch.cuda.current_device() else contextlib.nullcontext()


# Compiled kernels by all that they were compiled for. Triton's own way to one takes tens of microseconds a launch, most of a call with few rows; its
# hooks before a launch and its check for changed globals are part of it, and are left out from the second launch on. The first one compiles, also
# inside a capture: call once before.
_compiled: dict[tuple, object] = {}


def _start(kernel: object, programs: int, arguments: dict[str, object], constants: dict[str, object], options: dict[str, object]) -> None:
    """Launch `programs` programs. Both dicts are in the order of the kernel's signature, compile-time values last; numbers have fixed types there, so
    that only tensors' types and compile-time values tell one compilation from another."""
    types = tuple(value.dtype for value in arguments.values() if isinstance(value, torch.Tensor))
    key = (id(kernel), arguments["p_ptr"].device, types, tuple(constants.values()), tuple(options.items()))
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[programs, 1, 1](*arguments.values(), *constants.values())
        return
    compiled = kernel[programs, 1, 1](**arguments, **constants, **options)
    if compiled is not None:  # the interpreter compiles nothing
        _compiled[key] = compiled


def _places(problem: Problem) -> dict[str, object]:
    """Where the rows lie: arguments that the kernels share, in the order of their signatures."""
    p, q = problem.p, problem.q or problem.p
    return dict(n_inner=problem.inner, stride_p_outer=p.stride_outer, stride_p_inner=p.stride_inner, stride_q_outer=q.stride_outer,
                stride_q_inner=q.stride_inner)


def _tensors(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """p, q, tokens, mask and temperatures; p itself, as a pointer that nothing reads, for what does not take part."""
    p = problem.p.tensor
    return (p, p if problem.q is None else problem.q.tensor, *(p if value is None else value
                                                             for value in (problem.tokens, problem.mask, problem.temperatures)))


def forward(problem: Problem, outputs: dict[str, torch.Tensor], saved: torch.Tensor) -> None:
    """Fill `saved` [N, 10] and the fields of `outputs` (logprob, entropy, ref_logprob, kl, ref_kl: [N] float32 each).

    With q there is always kl; with tokens logprob, and ref_logprob beside q.
    """
    device = problem.p.tensor.device
    p, q, tokens, mask, temperatures = _tensors(problem)
    chosen, options = _choose(problem, "forward")
    splits = max(1, math.ceil(problem.vocabulary / chosen.segment))
    state = torch.empty(problem.rows * splits * STATE.value, dtype=torch.float32, device=device)
    per_row = dict(HAS_MASK=problem.mask is not None, TEMPERATURE_PER_ROW=problem.temperatures is not None)
    fields = dict(WITH_ENTROPY="entropy" in outputs, WITH_KL=problem.q is not None, WITH_REVERSE="ref_kl" in outputs)
    placing = dict(REALIGN=not problem.p.aligned(problem.inner, problem.outer), Q_IN_BLOCKS=problem.q_in_blocks)
    lanes, temperature, softcap = problem.p.lanes, float(problem.temperature), float(problem.softcap)
    with _on(device):
        _start(
            row_forward, problem.rows * splits,
            dict(p_ptr=p, q_ptr=q, state_ptr=state, mask_ptr=mask, temperature_ptr=temperatures, temperature=temperature, **_places(problem),
                 V=problem.vocabulary, splits=splits),
            dict(SEGMENT=chosen.segment, THREADS=chosen.threads, LANES=lanes, GROUPS=chosen.groups, **per_row, **fields, **placing,
                 SOFTCAP=softcap),
            options)
        _start(
            row_finish, -(-problem.rows // FINISH_ROWS),
            dict(state_ptr=state, p_ptr=p, q_ptr=q, tokens_ptr=tokens, mask_ptr=mask, temperature_ptr=temperatures, saved_ptr=saved,
                 **{f"{name}_ptr": outputs.get(name, saved) for name in FIELDS}, temperature=temperature, n_rows=problem.rows, **_places(problem),
                 V=problem.vocabulary),
            dict(SEGMENT=chosen.segment, ROWS=FINISH_ROWS, THREADS=FINISH_THREADS, LANES=lanes, SPLITS=triton.next_power_of_2(splits),
                 HAS_TOKENS=problem.tokens is not None, **per_row, **fields, **placing, SOFTCAP=softcap, READ_AGAIN=READ_AGAIN),
            finish_options(*architecture(device)))


def backward(problem: Problem, saved: torch.Tensor, upstream: dict[str, torch.Tensor], grad_p: torch.Tensor | None,
             grad_q: torch.Tensor | None) -> None:
    """Fill the gradients ([N, V], both with the same row stride) from upstream gradients [N] per field. They may be the logits themselves."""
    p, q, tokens, mask, temperatures = _tensors(problem)
    names = [name for name in FIELDS if name in upstream]
    stacked = torch.stack([upstream[name].to(torch.float32) for name in names]) if len(names) > 1 else upstream[names[0]].float().contiguous()
    chosen, options = _choose(problem, "backward")
    stride_grad = (grad_q if grad_p is None else grad_p).stride(0)
    grads = [Rows(grad, problem.inner * stride_grad, stride_grad) for grad in (grad_p, grad_q) if grad is not None]
    # A row that starts in the middle of a block covers one more.
    chunks = -(-(problem.vocabulary + problem.p.lanes - 1) // chosen.segment)
    with _on(p.device):
        _start(
            row_backward, problem.rows * chunks,
            dict(p_ptr=p, q_ptr=q, grad_p_ptr=p if grad_p is None else grad_p, grad_q_ptr=p if grad_q is None else grad_q, tokens_ptr=tokens,
                 saved_ptr=saved, upstream_ptr=stacked, mask_ptr=mask, temperature_ptr=temperatures, temperature=float(problem.temperature),
                 n_rows=problem.rows, **_places(problem), stride_grad=stride_grad, V=problem.vocabulary, chunks=chunks),
            dict(CHUNK=chosen.segment, THREADS=chosen.threads, LANES=problem.p.lanes, GROUPS=chosen.groups,
                 **{name.upper(): names.index(name) if name in names else -1 for name in FIELDS},
                 WRT_P=grad_p is not None, WRT_Q=grad_q is not None, HAS_MASK=problem.mask is not None,
                 TEMPERATURE_PER_ROW=problem.temperatures is not None, Q_IN_BLOCKS=problem.q_in_blocks,
                 GRAD_IN_BLOCKS=all(problem.p.same_blocks(grad, problem.inner, problem.outer) for grad in grads), SOFTCAP=float(problem.softcap)),
            options)
