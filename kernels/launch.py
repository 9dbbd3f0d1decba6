"""Launchers: allocate, choose a configuration, launch. Arguments were checked and shapes settled
above.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from typing import Any, NamedTuple

import torch
import triton

from . import config
from .row_backward import row_backward
from .row_fallback import row_fallback
from .row_forward import row_forward
from .row_math import STATE

# Multiply-adds are explicit in the kernels, so that the bits do not depend on what a compiler
# fuses; Triton's own default varies by version.
OPTIONS = {"enable_fp_fusion": False}
FIELDS = ("logprob", "entropy", "ref_logprob", "kl", "ref_kl")
# Rows per program of row_fallback, its threads, and entries per step: few enough rows to spread a
# batch of fallback rows over a GPU, enough to keep all programs of 8192 rows resident.
FALLBACK_ROWS = 4
FALLBACK_THREADS = 128
FALLBACK_BLOCK = 512
FALLBACK_REGISTERS = 168
# Prefetch whole segments into L2 if the logits of a call take at most this many bytes.
PREFETCH_BYTES = 33_554_432
# Two tensors' blocks have at most eight elements of four bytes: where one starts matters up to this
# number of bytes.
ADDRESSES = 32
# Layouts, and launches for them, that are kept: shapes, mostly, of which a training run with
# padding to the longest has many.
KEPT = 1024
# False leaves out row_fallback, for tests: fallback rows then keep a NaN as their first saved
# value.
READ_AGAIN = True
_HERE = contextlib.nullcontext()


class Rows(NamedTuple):
    """The address and strides of a tensor's rows: [outer, inner, V] by two strides (in elements),
    whatever its leading shape was.

    address: of the first element, in bytes, modulo ADDRESSES.
    """

    itemsize: int
    address: int
    stride_outer: int
    stride_inner: int

    @property
    def lanes(self) -> int:
        """The elements of a 16-byte block."""
        return 16 // self.itemsize

    def same_blocks(self, other: Rows, inner: int, outer: int) -> bool:
        """Whether every row of both starts at the same distance, in elements, from a boundary of
        this tensor's 16-byte blocks.

        The other's blocks have as many elements, and are 8 bytes for a 16-bit tensor beside a
        32-bit one.
        """
        lanes = self.lanes
        return (
            (self.address // self.itemsize - other.address // other.itemsize) % lanes == 0
            and (inner == 1 or (self.stride_inner - other.stride_inner) % lanes == 0)
            and (outer == 1 or (self.stride_outer - other.stride_outer) % lanes == 0)
        )

    def aligned(self, inner: int, outer: int) -> bool:
        """Whether every row starts on a 16-byte boundary."""
        return (
            self.address % 16 == 0
            and (inner == 1 or self.stride_inner % self.lanes == 0)
            and (outer == 1 or self.stride_outer % self.lanes == 0)
        )


class Problem(NamedTuple):
    """N rows of length V; a field that is None is unused. Vectors are [N] and contiguous.

    ratios: inverse temperatures of Q over those of P, None for 1.
    """

    p: torch.Tensor
    q: torch.Tensor | None
    layout: Layout
    tokens: torch.Tensor | None
    mask: torch.Tensor | None
    temperature: float
    temperatures: torch.Tensor | None
    ratios: torch.Tensor | None


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


def _options(
    chosen: config.RowConfig, device: torch.device, roomy: bool, limited: bool = True
) -> dict[str, object]:
    """The compiler options that come with a configuration."""
    arch, warp = architecture(device)
    return {
        "num_warps": max(1, chosen.threads // warp),
        **chosen.options(arch, roomy, limited),
        **OPTIONS,
    }


def fallback_options(arch: str, warp: int) -> dict[str, object]:
    """The compiler options of row_fallback, which takes no part in the configuration table."""
    registers = {} if arch.startswith("gfx") else {"maxnreg": FALLBACK_REGISTERS}
    return {"num_warps": FALLBACK_THREADS // warp, **registers, **OPTIONS}


def _on(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """The tensor's device as the current one: kernels start on the current one's stream."""
    return (
        torch.cuda.device(tensor.device)
        if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device()
        else _HERE
    )


class Variant:
    """A kernel with compile-time values and compiler options, for one device and types of tensors:
    compiled at its
    first start: call it once before capturing a CUDA graph.

    From the second start on the compiled kernel is started directly. Triton's own way to it takes
    tens of microseconds, most of a call with few rows; its check for changed globals and its
    pre-run hooks are part of it, and are left out.
    """

    def __init__(
        self, kernel: Any, constants: dict[str, object], options: dict[str, object]
    ) -> None:
        self.kernel, self.constants, self.options = kernel, constants, options
        self.compiled: Any = None

    def start(self, programs: int, arguments: dict[str, object]) -> None:
        """Launch `programs` programs. Arguments in the order of the kernel's signature,
        compile-time values last; numbers have fixed types there, so
        that only tensors' types and compile-time values tell one compilation from another."""
        if self.compiled is None:  # in the interpreter always: it compiles nothing
            self.compiled = self.kernel[programs, 1, 1](
                **arguments, **self.constants, **self.options
            )
        else:
            self.compiled[programs, 1, 1](*arguments.values(), *self.constants.values())


class Case(NamedTuple):
    """The properties of a problem that select a compilation, beside its configuration and fields."""

    device: torch.device
    types: tuple[
        torch.dtype | None, ...
    ]  # of p, q, tokens and temperatures; None for what does not take part
    has_mask: bool
    realign: bool
    q_in_blocks: bool
    softcap: float
    ref_softcap: float
    has_ratio: bool

    @property
    def constants(self) -> dict[str, object]:
        """The compile-time values that every kernel takes."""
        kind = self.types[0]
        assert kind is not None
        return dict(
            LANES=16 // kind.itemsize,
            HAS_MASK=self.has_mask,
            TEMPERATURE_PER_ROW=self.types[3] is not None,
            Q_IN_BLOCKS=self.q_in_blocks,
            SOFTCAP=self.softcap,
            REF_SOFTCAP=self.ref_softcap,
            HAS_RATIO=self.has_ratio,
        )

    @property
    def roomy(self) -> bool:
        """Whether the temporaries of soft caps, ratios or misaligned rows need registers."""
        return self.softcap > 0.0 or self.ref_softcap > 0.0 or self.has_ratio or self.realign


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """N = outer · inner rows of length V, of policy logits or of both, as they lie: one for all
    calls that agree in it, hashed by identity.

    places: the kernels' arguments for it, in the order of their signatures.
    """

    p: Rows
    outer: int
    inner: int
    vocabulary: int
    places: dict[str, int]
    case: Case
    rows: int


@functools.lru_cache(KEPT)
def layout(
    vocabulary: int,
    dims: tuple[tuple[int, int, int], tuple[int, int, int]],
    addresses: tuple[int, int],
    device: torch.device,
    types: tuple[torch.dtype | None, ...],
    has_mask: bool,
    softcaps: tuple[float, float],
    has_ratio: bool,
) -> Layout:
    """The Layout for (size, stride of P, stride of Q) of the outer and the inner dimension, and the
    types of p, q, tokens and temperatures.
    """
    (outer, *outer_strides), (inner, *inner_strides) = dims
    of_p = types[0]
    assert of_p is not None
    p, q = (
        Rows((dtype or of_p).itemsize, address, *strides)
        for dtype, address, *strides in zip(
            types, addresses, outer_strides, inner_strides, strict=False
        )
    )
    in_blocks = types[1] is None or (p.lanes == q.lanes and p.same_blocks(q, inner, outer))
    places = dict(
        n_inner=inner,
        stride_p_outer=p.stride_outer,
        stride_p_inner=p.stride_inner,
        stride_q_outer=q.stride_outer,
        stride_q_inner=q.stride_inner,
    )
    case = Case(
        device,
        types,
        has_mask,
        not p.aligned(inner, outer),
        in_blocks,
        float(softcaps[0]),
        float(softcaps[1]),
        has_ratio,
    )
    return Layout(p, outer, inner, vocabulary, places, case, outer * inner)


@functools.cache
def forward_variants(
    case: Case, chosen: config.RowConfig, most_splits: int, with_entropy: bool, with_reverse: bool
) -> tuple[Variant, Variant]:
    """row_forward and row_fallback."""
    arch, warp = architecture(case.device)
    constants = dict(
        **case.constants,
        HAS_TOKENS=case.types[2] is not None,
        WITH_ENTROPY=with_entropy,
        WITH_KL=case.types[1] is not None,
        WITH_REVERSE=with_reverse,
    )
    reading = dict(
        SPLITS=most_splits,
        THREADS=chosen.threads,
        GROUPS=chosen.groups,
        REALIGN=case.realign,
        PREFETCH=config.prefetches(arch),
    )
    rows = dict(ROWS=FALLBACK_ROWS, BLOCK=FALLBACK_BLOCK, WITH_GRADIENT=False)
    # With Q read element by element ptxas needs more registers than the limit on some
    # architectures, and finds them.
    options = _options(chosen, case.device, case.roomy, case.q_in_blocks)
    return (
        Variant(row_forward, _in_order(row_forward, **constants, **reading), options),
        Variant(
            row_fallback, _in_order(row_fallback, **constants, **rows), fallback_options(arch, warp)
        ),
    )


@functools.cache
def backward_variant(
    case: Case,
    chosen: config.RowConfig,
    fields: tuple[str, ...],
    grad_types: tuple[torch.dtype | None, torch.dtype | None],
    grad_in_blocks: bool,
) -> Variant:
    """row_backward, for upstream gradients of these fields."""
    constants = dict(
        **case.constants,
        CHUNK=chosen.segment,
        THREADS=chosen.threads,
        GROUPS=chosen.groups,
        WRT_P=grad_types[0] is not None,
        WRT_Q=grad_types[1] is not None,
        GRAD_IN_BLOCKS=grad_in_blocks,
        **{name.upper(): fields.index(name) if name in fields else -1 for name in FIELDS},
    )
    return Variant(
        row_backward,
        _in_order(row_backward, **constants),
        _options(chosen, case.device, case.roomy),
    )


def _in_order(kernel: Any, **constants: object) -> dict[str, object]:
    """Compile-time values in the order of the kernel's signature."""
    return {
        name: constants[name]
        for name in inspect.signature(kernel.fn).parameters
        if name in constants
    }


def _tensors(problem: Problem) -> tuple[torch.Tensor, ...]:
    """p, q, tokens, mask, temperatures and ratios; p itself, as an unused pointer, for what does
    not take part.
    """
    p, q, _, tokens, mask, _, temperatures, ratios = problem
    return (
        p,
        p if q is None else q,
        p if tokens is None else tokens,
        p if mask is None else mask,
        p if temperatures is None else temperatures,
        p if ratios is None else ratios,
    )


class ForwardPlan(NamedTuple):
    """The launches of a forward: `splits` segments of `segment` entries a row."""

    segment: int
    splits: int
    prefetching: int
    forward: Variant
    fallback: Variant


@functools.lru_cache(KEPT)
def _forward_plan(
    layout: Layout, with_entropy: bool, with_reverse: bool, overridden: tuple[Any, ...]
) -> ForwardPlan:
    """The plan; `overridden` tells one configuration of the tests and the tuner from another."""
    chosen = config.select(
        "forward", architecture(layout.case.device)[0], layout.p.itemsize, layout.vocabulary
    )
    segment = config.segment_length(layout.vocabulary, chosen.segment)
    splits = max(1, -(-layout.vocabulary // segment))
    row_bytes = layout.vocabulary * sum(
        dtype.itemsize for dtype in layout.case.types[:2] if dtype is not None
    )
    variants = forward_variants(
        layout.case, chosen, triton.next_power_of_2(splits), with_entropy, with_reverse
    )
    return ForwardPlan(segment, splits, int(layout.rows * row_bytes <= PREFETCH_BYTES), *variants)


def forward(problem: Problem, outputs: dict[str, torch.Tensor], saved: torch.Tensor) -> None:
    """Fill `saved` [N, 10] and the fields of `outputs` (logprob, entropy, ref_logprob, kl, ref_kl:
    [N] float32 each).

    `outputs` contains kl if q is given, logprob if tokens are, ref_logprob if both are.
    """
    p, q, tokens, mask, temperatures, ratios = _tensors(problem)
    layout = problem.layout
    plan = _forward_plan(
        layout, "entropy" in outputs, "ref_kl" in outputs, tuple(config._override.items())
    )
    get = outputs.get
    fields = dict(
        saved_ptr=saved,
        logprob_ptr=get("logprob", saved),
        entropy_ptr=get("entropy", saved),
        ref_logprob_ptr=get("ref_logprob", saved),
        kl_ptr=get("kl", saved),
        ref_kl_ptr=get("ref_kl", saved),
    )
    places, temperature = layout.places, float(problem.temperature)
    with _on(p):
        state = counters = saved
        if plan.splits > 1:
            state = torch.empty(
                layout.rows * plan.splits * STATE.value, dtype=torch.float32, device=p.device
            )
            # Not kept from call to call: another pool or stream may own what a call allocates, as
            # under CUDA graphs.
            counters = torch.zeros(layout.rows, dtype=torch.int32, device=p.device)
        plan.forward.start(
            layout.rows * plan.splits,
            dict(
                p_ptr=p,
                q_ptr=q,
                mask_ptr=mask,
                temperature_ptr=temperatures,
                ratio_ptr=ratios,
                tokens_ptr=tokens,
                state_ptr=state,
                counter_ptr=counters,
                **fields,
                temperature=temperature,
                **places,
                V=layout.vocabulary,
                segment=plan.segment,
                splits=plan.splits,
                prefetching=plan.prefetching,
            ),
        )
        if READ_AGAIN:
            plan.fallback.start(
                -(-layout.rows // FALLBACK_ROWS),
                dict(
                    p_ptr=p,
                    q_ptr=q,
                    temperature_ptr=temperatures,
                    ratio_ptr=ratios,
                    tokens_ptr=tokens,
                    **fields,
                    grad_ptr=saved,
                    weight_ptr=saved,
                    temperature=temperature,
                    **places,
                    stride_grad=0,
                    V=layout.vocabulary,
                    n_rows=layout.rows,
                ),
            )


@functools.lru_cache(KEPT)
def _backward_plan(
    layout: Layout,
    fields: tuple[str, ...],
    stride: int,
    grad_p: tuple[torch.dtype, int] | None,
    grad_q: tuple[torch.dtype, int] | None,
    overridden: tuple[Any, ...],
) -> tuple[int, Variant]:
    """(chunks of a row, row_backward) for upstream gradients of `fields`, to gradients of these
    types and addresses with rows `stride` apart.
    """
    chosen = config.select(
        "backward", architecture(layout.case.device)[0], layout.p.itemsize, layout.vocabulary
    )
    in_blocks = all(
        grad is None
        or layout.p.same_blocks(
            Rows(grad[0].itemsize, grad[1], layout.inner * stride, stride),
            layout.inner,
            layout.outer,
        )
        for grad in (grad_p, grad_q)
    )
    # A row that starts in the middle of a block covers one more.
    chunks = -(-(layout.vocabulary + layout.p.lanes - 1) // chosen.segment)
    return chunks, backward_variant(
        layout.case, chosen, fields, (grad_p and grad_p[0], grad_q and grad_q[0]), in_blocks
    )


def backward(
    problem: Problem,
    saved: torch.Tensor,
    upstream: dict[str, torch.Tensor],
    grad_p: torch.Tensor | None,
    grad_q: torch.Tensor | None,
) -> None:
    """Fill the gradients ([N, V], both with the same row stride) from upstream gradients [N] per
    field.

    They may be the logits themselves unless the gradient of ref_kl to Q is asked for: a far row is
    then read again.
    """
    p, q, tokens, mask, temperatures, ratios = _tensors(problem)
    layout, fields = problem.layout, tuple(upstream)
    stacked = (
        torch.stack([value.to(torch.float32) for value in upstream.values()])
        if len(fields) > 1
        else upstream[fields[0]].to(torch.float32).contiguous()
    )
    grad = grad_q if grad_p is None else grad_p
    assert grad is not None
    stride_grad = grad.stride(0)
    chunks, variant = _backward_plan(
        layout,
        fields,
        stride_grad,
        None if grad_p is None else (grad_p.dtype, grad_p.data_ptr() % ADDRESSES),
        None if grad_q is None else (grad_q.dtype, grad_q.data_ptr() % ADDRESSES),
        tuple(config._override.items()),
    )
    with _on(p):
        variant.start(
            layout.rows * chunks,
            dict(
                p_ptr=p,
                q_ptr=q,
                grad_p_ptr=p if grad_p is None else grad_p,
                grad_q_ptr=p if grad_q is None else grad_q,
                tokens_ptr=tokens,
                saved_ptr=saved,
                upstream_ptr=stacked,
                mask_ptr=mask,
                temperature_ptr=temperatures,
                ratio_ptr=ratios,
                temperature=float(problem.temperature),
                n_rows=layout.rows,
                **layout.places,
                stride_grad=stride_grad,
                V=layout.vocabulary,
                chunks=chunks,
            ),
        )
