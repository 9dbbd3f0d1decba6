"""Launchers: allocate, choose a configuration, launch. Arguments were checked and shapes settled above."""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
import triton

from . import config
from .row_backward import row_backward
from .row_exact import row_exact
from .row_finish import row_finish
from .row_forward import row_forward
from .row_math import STATE

# Multiply-adds are explicit in the kernels, so that the bits do not depend on what a compiler fuses; Triton's own default varies by version.
OPTIONS = {"enable_fp_fusion": False}
FIELDS = ("logprob", "entropy", "ref_logprob", "kl", "ref_kl")
# Rows that one program of row_exact looks at, and its threads: nearly every program finds nothing to do.
EXACT_ROWS = 4
EXACT_THREADS = 256
EXACT_REGISTERS = 128


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


def exact_options(arch: str, warp: int) -> dict[str, object]:
    """The compiler options of row_exact, which takes no part in the configuration table: it is rare."""
    registers = {} if arch.startswith("gfx") else {"maxnreg": EXACT_REGISTERS}
    return {"num_warps": EXACT_THREADS // warp, **registers, **OPTIONS}


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _common(problem: Problem) -> dict:
    """The arguments that the kernels share, all but row_exact the mask too."""
    p, q = problem.p, problem.q or problem.p
    return dict(
        p_ptr=p.tensor, q_ptr=q.tensor,
        mask_ptr=p.tensor if problem.mask is None else problem.mask,
        temperature_ptr=p.tensor if problem.temperatures is None else problem.temperatures,
        temperature=float(problem.temperature), n_inner=problem.inner,
        stride_p_outer=p.stride_outer, stride_p_inner=p.stride_inner, stride_q_outer=q.stride_outer, stride_q_inner=q.stride_inner,
        V=problem.vocabulary, HAS_MASK=problem.mask is not None, TEMPERATURE_PER_ROW=problem.temperatures is not None,
        SOFTCAP=float(problem.softcap),
    )


def forward(problem: Problem, outputs: dict[str, torch.Tensor], saved: torch.Tensor) -> None:
    """Fill `saved` [N, 9] and the fields of `outputs` (logprob, entropy, ref_logprob, kl, ref_kl: [N] float32 each)."""
    p, q = problem.p, problem.q
    chosen, options = _choose(problem, "forward")
    splits = max(1, math.ceil(problem.vocabulary / chosen.segment))
    state = torch.empty(problem.rows * splits * STATE.value, dtype=torch.float32, device=p.tensor.device)
    shared = _common(problem)
    fields = dict(WITH_ENTROPY="entropy" in outputs, WITH_KL=q is not None, WITH_REVERSE="ref_kl" in outputs)
    placing = dict(misaligned=p.misaligned, LANES=p.lanes, REALIGN=not p.aligned(problem.inner, problem.outer),
                   Q_IN_BLOCKS=problem.q_in_blocks)
    with _on(p.tensor.device):
        row_forward[(problem.rows * splits,)](
            **shared, **fields, **placing, state_ptr=state, splits=splits, SEGMENT=chosen.segment, THREADS=chosen.threads, GROUPS=chosen.groups,
            **options)
        results = dict(saved_ptr=saved, tokens_ptr=saved if problem.tokens is None else problem.tokens, HAS_TOKENS=problem.tokens is not None,
                       **{f"{name}_ptr": outputs.get(name, saved) for name in FIELDS})
        row_finish[(problem.rows,)](**shared, **fields, **results, state_ptr=state, splits=splits, SPLITS=triton.next_power_of_2(splits),
                                    num_warps=1, **OPTIONS)
        unmasked = {name: value for name, value in shared.items() if name not in ("mask_ptr", "HAS_MASK")}
        row_exact[(math.ceil(problem.rows / EXACT_ROWS),)](
            **unmasked, **fields, **placing, **results, n_rows=problem.rows, ROWS=EXACT_ROWS, THREADS=EXACT_THREADS,
            **exact_options(*architecture(p.tensor.device)))


def backward(problem: Problem, saved: torch.Tensor, upstream: dict[str, torch.Tensor], grad_p: torch.Tensor | None,
             grad_q: torch.Tensor | None) -> None:
    """Fill the gradients ([N, V], both with the same row stride) from upstream gradients [N] per field. They may be the logits themselves."""
    p = problem.p
    names = [name for name in FIELDS if name in upstream]
    stacked = torch.stack([upstream[name].to(torch.float32) for name in names]) if len(names) > 1 else upstream[names[0]].float().contiguous()
    chosen, options = _choose(problem, "backward")
    stride_grad = (grad_q if grad_p is None else grad_p).stride(0)
    grads = [Rows(grad, problem.inner * stride_grad, stride_grad) for grad in (grad_p, grad_q) if grad is not None]
    # A row that starts in the middle of a block covers one more.
    chunks = math.ceil((problem.vocabulary + p.lanes - 1) / chosen.segment)
    with _on(p.tensor.device):
        row_backward[(problem.rows * chunks,)](
            **_common(problem), saved_ptr=saved, upstream_ptr=stacked, n_rows=problem.rows, chunks=chunks, misaligned=p.misaligned,
            stride_grad=stride_grad, grad_p_ptr=p.tensor if grad_p is None else grad_p, grad_q_ptr=p.tensor if grad_q is None else grad_q,
            tokens_ptr=saved if problem.tokens is None else problem.tokens,
            CHUNK=chosen.segment, THREADS=chosen.threads, LANES=p.lanes, GROUPS=chosen.groups,
            **{name.upper(): names.index(name) if name in names else -1 for name in FIELDS},
            WRT_P=grad_p is not None, WRT_Q=grad_q is not None,
            Q_IN_BLOCKS=problem.q_in_blocks,
            GRAD_IN_BLOCKS=all(p.same_blocks(grad, problem.inner, problem.outer) for grad in grads),
            **options)
