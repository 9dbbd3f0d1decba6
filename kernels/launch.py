"""Launchers: allocate, choose a configuration, launch. Arguments were checked and shapes settled above."""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import NamedTuple

import torch
import triton

from . import config
from .row_backward import row_backward
from .row_fallback import row_fallback
from .row_forward import row_forward
from .row_fused import row_fused
from .row_math import STATE

# Multiply-adds are explicit in the kernels, so that the bits do not depend on what a compiler fuses; Triton's own default varies by version.
OPTIONS = {"enable_fp_fusion": False}
FIELDS = ("logprob", "entropy", "ref_logprob", "kl", "ref_kl")
# Rows that one program of row_fallback looks at, its threads, and the entries that they read at a time: few enough rows that
# a batch of fallback rows is spread over a GPU, enough that the programs of 8192 rows are all there at once.
FALLBACK_ROWS = 4
FALLBACK_THREADS = 128
FALLBACK_BLOCK = 512
FALLBACK_REGISTERS = 168
# Ask for whole segments at once while the rows of a call take at most this much, which has room in L2.
ASK_AHEAD_BYTES = 33_554_432
# False leaves out row_fallback, for tests: fallback rows then keep a NaN as their first saved value.
READ_AGAIN = True


class Rows:
    """A logits tensor as rows: [outer, inner, V] by two strides (in elements), whatever its leading shape was.

    lanes: elements of a 16-byte block; misaligned: elements between a 16-byte boundary and the first element.
    """

    def __init__(self, tensor: torch.Tensor, stride_outer: int, stride_inner: int) -> None:
        itemsize = tensor.element_size()
        self.tensor, self.stride_outer, self.stride_inner = tensor, stride_outer, stride_inner
        self.lanes = 16 // itemsize
        self.misaligned = tensor.data_ptr() // itemsize % self.lanes

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
    """N = outer · inner rows of length V; what is None does not take part. Vectors are [N] and contiguous.

    softcap, ref_softcap: of P and of Q, 0 for none. ratios: inverse temperatures of Q over those of P, None for 1.
    """

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
    ref_softcap: float = 0.0
    ratios: torch.Tensor | None = None

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


def _options(chosen: config.RowConfig, device: torch.device, roomy: bool) -> dict[str, object]:
    """The compiler options that come with a configuration."""
    arch, warp = architecture(device)
    return {"num_warps": max(1, chosen.threads // warp), **chosen.options(arch, roomy), **OPTIONS}


def fallback_options(arch: str, warp: int) -> dict[str, object]:
    """The compiler options of row_fallback, which takes no part in the configuration table."""
    registers = {} if arch.startswith("gfx") else {"maxnreg": FALLBACK_REGISTERS}
    return {"num_warps": FALLBACK_THREADS // warp, **registers, **OPTIONS}


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """The device as the current one: kernels start on the current one's stream."""
    return torch.cuda.device(device) if device.type == "cuda" and device.index != torch.cuda.current_device() else contextlib.nullcontext()


class Variant:
    """A kernel with compile-time values and compiler options, for one device and types of tensors: compiled at its first start, also inside a
    capture (call once before).

    From the second start on the compiled kernel is started directly. Triton's own way to it takes tens of microseconds, most of a call with few
    rows; its check for changed globals and its pre-run hooks are part of it, and are left out.
    """

    def __init__(self, kernel: object, constants: dict[str, object], options: dict[str, object]) -> None:
        self.kernel, self.constants, self.options, self.compiled = kernel, constants, options, None

    def start(self, programs: int, arguments: dict[str, object]) -> None:
        """Launch `programs` programs. Arguments in the order of the kernel's signature, compile-time values last; numbers have fixed types there, so
        that only tensors' types and compile-time values tell one compilation from another."""
        if self.compiled is None:  # in the interpreter always: it compiles nothing
            self.compiled = self.kernel[programs, 1, 1](**arguments, **self.constants, **self.options)
        else:
            self.compiled[programs, 1, 1](*arguments.values(), *self.constants.values())


class Case(NamedTuple):
    """The properties of a problem that select a compilation, beside its configuration and fields."""

    device: torch.device
    types: tuple[torch.dtype | None, ...]  # of p, q, tokens and temperatures; None for what does not take part
    has_mask: bool
    realign: bool
    q_in_blocks: bool
    softcap: float
    ref_softcap: float
    has_ratio: bool

    @property
    def constants(self) -> dict[str, object]:
        """The compile-time values that every kernel takes."""
        return dict(LANES=16 // self.types[0].itemsize, HAS_MASK=self.has_mask, TEMPERATURE_PER_ROW=self.types[3] is not None,
                    Q_IN_BLOCKS=self.q_in_blocks, SOFTCAP=self.softcap, REF_SOFTCAP=self.ref_softcap, HAS_RATIO=self.has_ratio)

    @property
    def roomy(self) -> bool:
        """Whether the temporaries of soft caps, ratios or misaligned rows need registers."""
        return self.softcap > 0.0 or self.ref_softcap > 0.0 or self.has_ratio or self.realign


def _case(problem: Problem) -> Case:
    tensors = (problem.p.tensor, None if problem.q is None else problem.q.tensor, problem.tokens, problem.temperatures)
    return Case(tensors[0].device, tuple([None if value is None else value.dtype for value in tensors]),
                problem.mask is not None, not problem.p.aligned(problem.inner, problem.outer), problem.q_in_blocks,
                float(problem.softcap), float(problem.ref_softcap), problem.ratios is not None)


@functools.cache
def forward_variants(case: Case, chosen: config.RowConfig, most_splits: int, with_entropy: bool, with_reverse: bool) -> tuple[Variant, Variant]:
    """row_forward and row_fallback."""
    arch, warp = architecture(case.device)
    constants = dict(**case.constants, HAS_TOKENS=case.types[2] is not None, WITH_ENTROPY=with_entropy, WITH_KL=case.types[1] is not None,
                     WITH_REVERSE=with_reverse)
    reading = dict(SPLITS=most_splits, THREADS=chosen.threads, GROUPS=chosen.groups, REALIGN=case.realign, PREFETCH=config.prefetches(arch))
    rows = dict(ROWS=FALLBACK_ROWS, BLOCK=FALLBACK_BLOCK, WITH_GRADIENT=False)
    return (Variant(row_forward, _in_order(row_forward, **constants, **reading), _options(chosen, case.device, case.roomy)),
            Variant(row_fallback, _in_order(row_fallback, **constants, **rows), fallback_options(arch, warp)))


@functools.cache
def fused_variants(case: Case, chosen: config.RowConfig, most_splits: int) -> tuple[tuple[Variant, ...], Variant]:
    """row_fused, in the interpreter as its two phases, and row_fallback with a gradient."""
    arch, warp = architecture(case.device)
    constants = dict(**case.constants, SPLITS=most_splits, THREADS=chosen.threads, GROUPS=chosen.groups, PREFETCH=config.prefetches(arch),
                     HAS_TOKENS=False, WITH_ENTROPY=False, WITH_KL=True, WITH_REVERSE=False,
                     ROWS=FALLBACK_ROWS, BLOCK=FALLBACK_BLOCK, WITH_GRADIENT=True)
    options = _options(chosen, case.device, case.roomy)
    phases = (1, 2) if arch == "interpreter" else (0,)
    return (tuple([Variant(row_fused, _in_order(row_fused, **constants, PHASE=phase), options) for phase in phases]),
            Variant(row_fallback, _in_order(row_fallback, **constants), fallback_options(arch, warp)))


@functools.cache
def backward_variant(case: Case, chosen: config.RowConfig, fields: tuple[str, ...], grad_types: tuple[torch.dtype | None, torch.dtype | None],
                     grad_in_blocks: bool) -> Variant:
    """row_backward, for upstream gradients of these fields."""
    constants = dict(**case.constants, CHUNK=chosen.segment, THREADS=chosen.threads, GROUPS=chosen.groups, WRT_P=grad_types[0] is not None,
                     WRT_Q=grad_types[1] is not None, GRAD_IN_BLOCKS=grad_in_blocks,
                     **{name.upper(): fields.index(name) if name in fields else -1 for name in FIELDS})
    return Variant(row_backward, _in_order(row_backward, **constants), _options(chosen, case.device, case.roomy))


def _in_order(kernel: object, **constants: object) -> dict[str, object]:
    """Compile-time values in the order of the kernel's signature."""
    return {name: constants[name] for name in inspect.signature(kernel.fn).parameters if name in constants}


def _places(problem: Problem) -> dict[str, object]:
    """Where the rows lie: arguments that the kernels share, in the order of their signatures."""
    p, q = problem.p, problem.q or problem.p
    return dict(n_inner=problem.inner, stride_p_outer=p.stride_outer, stride_p_inner=p.stride_inner, stride_q_outer=q.stride_outer,
                stride_q_inner=q.stride_inner)


def _tensors(problem: Problem) -> tuple[torch.Tensor, ...]:
    """p, q, tokens, mask, temperatures and ratios; p itself, as an unused pointer, for what does not take part."""
    p = problem.p.tensor
    return (p, p if problem.q is None else problem.q.tensor, *(p if value is None else value
                                                             for value in (problem.tokens, problem.mask, problem.temperatures, problem.ratios)))


_counters: dict[tuple[torch.device, int], torch.Tensor] = {}


def row_counters(device: torch.device, rows: int) -> torch.Tensor:
    """Zeros [at least rows] int32 that row_forward leaves as zeros: kept for each stream, whose launches take turns.

    A CUDA graph gets its own: its replays may run beside other streams.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(rows, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in _counters or _counters[key].numel() < rows:
        _counters[key] = torch.zeros(triton.next_power_of_2(rows), dtype=torch.int32, device=device)
    return _counters[key]


def forward(problem: Problem, outputs: dict[str, torch.Tensor], saved: torch.Tensor) -> None:
    """Fill `saved` [N, 10] and the fields of `outputs` (logprob, entropy, ref_logprob, kl, ref_kl: [N] float32 each).

    With q there is always kl; with tokens logprob, and ref_logprob beside q.
    """
    p, q, tokens, mask, temperatures, ratios = _tensors(problem)
    rows, vocabulary = problem.rows, problem.vocabulary
    case = _case(problem)
    chosen = config.select("forward", architecture(p.device)[0], p.element_size(), vocabulary)
    segment = config.segment_length(vocabulary, chosen.segment)
    splits = max(1, -(-vocabulary // segment))
    forward_variant, fallback_variant = forward_variants(case, chosen, triton.next_power_of_2(splits), "entropy" in outputs, "ref_kl" in outputs)
    state = counters = saved
    if splits > 1:
        state = torch.empty(rows * splits * STATE.value, dtype=torch.float32, device=p.device)
        counters = row_counters(p.device, rows)
    row_bytes = vocabulary * (p.element_size() + (0 if problem.q is None else q.element_size()))
    fields = dict(saved_ptr=saved, **{f"{name}_ptr": outputs.get(name, saved) for name in FIELDS})
    places, temperature = _places(problem), float(problem.temperature)
    with _on(p.device):
        forward_variant.start(
            rows * splits,
            dict(p_ptr=p, q_ptr=q, mask_ptr=mask, temperature_ptr=temperatures, ratio_ptr=ratios, tokens_ptr=tokens, state_ptr=state,
                 counter_ptr=counters, **fields, temperature=temperature, **places, V=vocabulary, segment=segment, splits=splits,
                 ask_ahead=int(rows * row_bytes <= ASK_AHEAD_BYTES)))
        if READ_AGAIN:
            fallback_variant.start(
                -(-rows // FALLBACK_ROWS),
                dict(p_ptr=p, q_ptr=q, temperature_ptr=temperatures, ratio_ptr=ratios, tokens_ptr=tokens, **fields, grad_ptr=saved,
                     weight_ptr=saved, temperature=temperature, **places, stride_grad=0, V=vocabulary, n_rows=rows))


def fusible(problem: Problem, grad_p: torch.Tensor) -> bool:
    """Whether `fused` takes the problem: a KL whose logits and gradient start on 16-byte boundaries in every row."""
    grad = Rows(grad_p, problem.inner * grad_p.stride(0), grad_p.stride(0))
    return (problem.q is not None and problem.p.aligned(problem.inner, problem.outer) and problem.q_in_blocks
            and problem.p.same_blocks(grad, problem.inner, problem.outer))


def fused(problem: Problem, weights: torch.Tensor, kl: torch.Tensor, saved: torch.Tensor, grad_p: torch.Tensor) -> None:
    """Fill kl [N], saved [N, 10], and grad_p [N, V] with the gradient of Σ weights·kl to P, which may be P itself; see `fusible`."""
    p, q, tokens, mask, temperatures, ratios = _tensors(problem)
    rows, vocabulary = problem.rows, problem.vocabulary
    chosen = config.select("fused", architecture(p.device)[0], p.element_size(), vocabulary)
    segment = config.segment_length(vocabulary, chosen.segment)
    pieces = -(-segment // chosen.segment)
    piece = -(-segment // (8 * pieces)) * 8
    splits = -(-vocabulary // segment) * pieces
    phases, fallback_variant = fused_variants(_case(problem), chosen, triton.next_power_of_2(splits))
    state = torch.empty(rows * splits * STATE.value, dtype=torch.float32, device=p.device)
    sync = torch.zeros(1 + rows, dtype=torch.int32, device=p.device)
    places = dict(temperature=float(problem.temperature), **_places(problem), stride_grad=grad_p.stride(0))
    with _on(p.device):
        for variant in phases:
            variant.start(
                rows * splits,
                dict(p_ptr=p, q_ptr=q, grad_ptr=grad_p, weight_ptr=weights, mask_ptr=mask, temperature_ptr=temperatures, ratio_ptr=ratios,
                     state_ptr=state, sync_ptr=sync, saved_ptr=saved, kl_ptr=kl, **places, V=vocabulary, segment=segment, piece=piece,
                     pieces=pieces, splits=splits))
        fallback_variant.start(
            -(-rows // FALLBACK_ROWS),
            dict(p_ptr=p, q_ptr=q, temperature_ptr=temperatures, ratio_ptr=ratios, tokens_ptr=tokens, saved_ptr=saved, logprob_ptr=kl,
                 entropy_ptr=kl, ref_logprob_ptr=kl, kl_ptr=kl, ref_kl_ptr=kl, grad_ptr=grad_p, weight_ptr=weights, **places, V=vocabulary,
                 n_rows=rows))


def backward(problem: Problem, saved: torch.Tensor, upstream: dict[str, torch.Tensor], grad_p: torch.Tensor | None,
             grad_q: torch.Tensor | None) -> None:
    """Fill the gradients ([N, V], both with the same row stride) from upstream gradients [N] per field.

    They may be the logits themselves unless the gradient of ref_kl to Q is asked for: a far row is then read again.
    """
    p, q, tokens, mask, temperatures, ratios = _tensors(problem)
    fields = tuple([name for name in FIELDS if name in upstream])
    stacked = (torch.stack([upstream[name].to(torch.float32) for name in fields]) if len(fields) > 1
               else upstream[fields[0]].to(torch.float32).contiguous())
    chosen = config.select("backward", architecture(p.device)[0], p.element_size(), problem.vocabulary)
    stride_grad = (grad_q if grad_p is None else grad_p).stride(0)
    grads = [None if grad is None else Rows(grad, problem.inner * stride_grad, stride_grad) for grad in (grad_p, grad_q)]
    in_blocks = all(grad is None or problem.p.same_blocks(grad, problem.inner, problem.outer) for grad in grads)
    variant = backward_variant(_case(problem), chosen, fields, tuple([None if grad is None else grad.tensor.dtype for grad in grads]), in_blocks)
    # A row that starts in the middle of a block covers one more.
    chunks = -(-(problem.vocabulary + problem.p.lanes - 1) // chosen.segment)
    with _on(p.device):
        variant.start(
            problem.rows * chunks,
            dict(p_ptr=p, q_ptr=q, grad_p_ptr=p if grad_p is None else grad_p, grad_q_ptr=p if grad_q is None else grad_q, tokens_ptr=tokens,
                 saved_ptr=saved, upstream_ptr=stacked, mask_ptr=mask, temperature_ptr=temperatures, ratio_ptr=ratios,
                 temperature=float(problem.temperature),
                 n_rows=problem.rows, **_places(problem), stride_grad=stride_grad, V=problem.vocabulary, chunks=chunks))
