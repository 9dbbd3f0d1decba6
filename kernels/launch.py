"""Launchers: allocate, choose a configuration, launch. Callers have checked the arguments."""

import contextlib
import functools
import inspect
from typing import Any, NamedTuple

import torch
import triton

from . import config
from .layout import ADDRESSES, CACHE_SIZE, Case, Layout, Problem, Rows
from .layout import architecture as architecture  # these two for fastkl.ops
from .layout import layout as layout
from .row_backward import row_backward, row_divergence_backward
from .row_divergence import row_divergence
from .row_fallback import row_fallback
from .row_forward import row_forward
from .row_gradient import Upstream
from .row_math import RENYI, SKEW_KL, STATE
from .series import KL, Series

# Multiply-adds are explicit in the kernels, so that the bits do not depend on what a compiler
# fuses; Triton's own default varies by version.
OPTIONS = {"enable_fp_fusion": False}
FIELDS = Upstream._fields
# Arguments of row_forward, in its order, by the names of `outputs`.
POINTERS = tuple([(name, f"{name}_ptr") for name in ("saved", *FIELDS)])
# Rows per program of row_fallback, its threads, and entries per step: few rows, so that fallback
# rows spread over a GPU, but enough that all programs of 8192 rows are resident.
FALLBACK_ROWS = 4
FALLBACK_THREADS = 128
FALLBACK_BLOCK = 512
FALLBACK_REGISTERS = 168
# Prefetch whole segments into L2 if the logits of a call take at most this many bytes.
PREFETCH_BYTES = 33_554_432
# Tests set it to False: fallback rows then keep a NaN as their first saved value.
RUN_FALLBACK = True
_HERE = contextlib.nullcontext()
Grads = tuple[torch.dtype | None, ...]


def _on(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's device current: kernels start on its current stream."""
    return (
        torch.cuda.device(tensor.device)
        if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device()
        else _HERE
    )


class Variant:
    """A kernel with its compile-time values and compiler options, for one device and one set of
    tensor types. It compiles at its first start: call it once before capturing a CUDA graph.

    From the second start on the compiled kernel is started directly. Triton's launch path takes
    tens of microseconds, most of a call with few rows; it also checks globals and runs pre-run
    hooks, which are skipped.
    """

    def __init__(
        self, kernel: Any, constants: dict[str, object], options: dict[str, object]
    ) -> None:
        self.kernel, self.constants, self.options = kernel, constants, options
        self.compiled: Any = None

    def start(self, programs: int, arguments: dict[str, object]) -> None:
        """Launch `programs` programs with arguments in the order of the kernel's signature,
        compile-time values last.

        Numbers have fixed types there, so that tensors' types and compile-time values alone select
        a compilation.
        """
        if self.compiled is None:  # in the interpreter always: it compiles nothing
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
    constants: frozenset[Any],
    num_warps: int,
    registers: int | None,
) -> Variant:
    """Return the one Variant of a kernel for tensors of `case`, gradients of the types `grads`, and
    compile-time values beside the case's own.
    """
    known = {**case.constants, **dict(constants)}
    in_order = {
        name: known[name] for name in inspect.signature(kernel.fn).parameters if name in known
    }
    limit = {} if registers is None or case.arch.startswith("gfx") else {"maxnreg": registers}
    return Variant(kernel, in_order, {"num_warps": num_warps, **limit, **OPTIONS})


def row_variant(
    kernel: Any, case: Case, chosen: config.RowConfig, grads: Grads, limited: bool, **constants: Any
) -> Variant:
    """Return a kernel's Variant for a configuration; not limited: ptxas chooses the registers."""
    constants |= dict(THREADS=chosen.threads, GROUPS=chosen.groups)
    registers = chosen.registers(case.needs_registers) if limited else None
    warps = max(1, chosen.threads // case.warp)
    return _variant(kernel, case, grads, frozenset(constants.items()), warps, registers)


def fallback_variant(case: Case, grads: Grads, **constants: Any) -> Variant:
    """Return row_fallback's Variant; it takes no part in the configuration table."""
    constants |= dict(ROWS=FALLBACK_ROWS, BLOCK=FALLBACK_BLOCK, WITH_GRADIENT=bool(grads))
    warps = FALLBACK_THREADS // case.warp
    items = frozenset(constants.items())
    return _variant(row_fallback, case, grads, items, warps, FALLBACK_REGISTERS)


def _tensors(problem: Problem) -> tuple[torch.Tensor, ...]:
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


class ForwardPlan(NamedTuple):
    """The launches of a forward: `splits` segments of `segment` entries a row; `second` is that of
    an f-divergence.
    """

    segment: int
    splits: int
    prefetching: int
    forward: Variant
    fallback: Variant
    second: Variant


@functools.lru_cache(CACHE_SIZE)
def forward_plan(
    layout: Layout,
    with_entropy: bool,
    with_ref_kl: bool,
    with_lse: bool,
    divergence: tuple[tuple[str, Any], ...],
    overridden: tuple[Any, ...],
) -> ForwardPlan:
    """Return the plan; divergence: its Series.constants. `overridden` is part of the cache's key:
    tests and the tuner override configurations.
    """
    chosen = config.select("forward", layout.case.arch, layout.p.itemsize, layout.vocabulary)
    segment = config.segment_length(layout.vocabulary, chosen.segment)
    splits = max(1, -(-layout.vocabulary // segment))
    row_bytes = layout.vocabulary * sum(
        dtype.itemsize for dtype in layout.case.types[:2] if dtype is not None
    )
    case, kind = layout.case, dict(divergence)["KIND"]
    wanted = dict(
        HAS_TOKENS=case.types[2] is not None,
        WITH_ENTROPY=with_entropy,
        WITH_KL=case.types[1] is not None,
        WITH_REF_KL=with_ref_kl,
        WITH_LSE=with_lse,
    )
    # With Q read element by element ptxas needs more registers than the limit on some
    # architectures: set none.
    forward = row_variant(
        row_forward,
        case,
        chosen,
        (),
        case.q_in_blocks,
        SPLITS=triton.next_power_of_2(splits),
        REALIGN=case.realign,
        PREFETCH=config.prefetches(case.arch),
        KIND=kind if kind == RENYI.value else 0,
        **wanted,
    )
    fallback = fallback_variant(case, (), KIND=kind, **wanted)
    second = row_variant(
        row_divergence,
        case,
        chosen,
        (),
        # Skew's terms take more registers than the limit, and so do all on sm_100.
        case.q_in_blocks and kind != SKEW_KL.value and case.arch != "sm_100",
        SPLITS=triton.next_power_of_2(splits),
        REALIGN=case.realign,
        LG2=case.arch.startswith("sm_"),
        **dict(divergence),
    )
    prefetching = int(layout.rows * row_bytes <= PREFETCH_BYTES)
    return ForwardPlan(segment, splits, prefetching, forward, fallback, second)


def forward(
    problem: Problem,
    outputs: dict[str, torch.Tensor],
    saved: torch.Tensor,
    divergence: Series = KL,
) -> None:
    """Fill `saved` [N, 10] and the fields of `outputs` ([N] float32 each).

    `outputs` contains kl if q is given, logprob if tokens are, ref_logprob if both are, and ref_lse
    beside lse if q is given. Another divergence is written in place of the KL, without other
    fields.
    """
    p, q, tokens, mask, temperatures, ratios = _tensors(problem)
    layout = problem.layout
    plan = forward_plan(
        layout,
        "entropy" in outputs,
        "ref_kl" in outputs,
        "lse" in outputs,
        divergence.constants(),
        tuple(config._override.items()),
    )
    fields = {ptr: outputs[name] if name in outputs else saved for name, ptr in POINTERS}
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
        arguments = dict(
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
            gamma=1.0 - divergence.share,
        )
        plan.forward.start(layout.rows * plan.splits, arguments)
        if RUN_FALLBACK:
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
                    share=divergence.share,
                    rest=1.0 - divergence.share,
                ),
            )
        if divergence.forward:
            numbers = divergence.numbers(divergence.forward)
            plan.second.start(layout.rows * plan.splits, {**arguments, **numbers})


def grads_in_blocks(layout: Layout, stride: int, *grads: tuple[torch.dtype, int] | None) -> bool:
    """Return whether gradients' rows, `stride` apart, start in blocks where the logits' rows do."""
    return all(
        [
            grad is None
            or layout.p.same_blocks(
                Rows(grad[0].itemsize, grad[1], layout.inner * stride, stride),
                layout.inner,
                layout.outer,
            )
            for grad in grads
        ]
    )


@functools.lru_cache(CACHE_SIZE)
def backward_plan(
    layout: Layout,
    fields: tuple[str, ...],
    divergence: tuple[tuple[str, Any], ...],
    stride: int,
    grad_p: tuple[torch.dtype, int] | None,
    grad_q: tuple[torch.dtype, int] | None,
    overridden: tuple[Any, ...],
) -> tuple[int, Variant]:
    """(chunks of a row, row_backward) for upstream gradients of `fields` or of a divergence beside
    the KL, to gradients of these types and addresses with rows `stride` apart.
    """
    case, kind = layout.case, dict(divergence)["KIND"]
    # Of a divergence beside the KL forward's: with one warp, a tile is checked without a barrier.
    chosen = config.select(
        "forward" if kind else "backward", case.arch, layout.p.itemsize, layout.vocabulary
    )
    tile = chosen.threads * chosen.groups * layout.p.lanes
    chunk = tile * max(1, chosen.segment // tile)
    # A row that starts inside a block covers one more.
    chunks = -(-(layout.vocabulary + layout.p.lanes - 1) // chunk)
    constants = {name.upper(): fields.index(name) if name in fields else -1 for name in FIELDS}
    if kind:
        constants = dict(divergence, LG2=case.arch.startswith("sm_"))
    return chunks, row_variant(
        row_divergence_backward if kind else row_backward,
        case,
        chosen,
        (grad_p and grad_p[0], grad_q and grad_q[0]),
        not kind or case.arch != "sm_100",
        CHUNK=chunk,
        WRT_P=grad_p is not None,
        WRT_Q=grad_q is not None,
        GRAD_IN_BLOCKS=grads_in_blocks(layout, stride, grad_p, grad_q),
        **constants,
    )


def backward(
    problem: Problem,
    saved: torch.Tensor,
    upstream: dict[str, torch.Tensor],
    grad_p: torch.Tensor | None,
    grad_q: torch.Tensor | None,
    divergence: Series = KL,
) -> None:
    """Fill the gradients ([N, V], both with the same row stride) from upstream gradients [N] per
    field; of another divergence that of the field kl.

    They may be the logits themselves unless the gradient of ref_kl to Q is requested, for which a
    row may be read again while it is written.
    """
    p, q, tokens, mask, temperatures, ratios = _tensors(problem)
    layout, fields = problem.layout, tuple(upstream)
    if len(fields) == 1:
        stacked = upstream[fields[0]].to(torch.float32).contiguous()
    else:
        values = upstream.values()
        stacked = torch.stack([v if v.dtype is torch.float32 else v.float() for v in values])
    grad = grad_q if grad_p is None else grad_p
    assert grad is not None
    stride_grad = grad.stride(0)
    chunks, variant = backward_plan(
        layout,
        fields,
        divergence.constants(),
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
                **(divergence.numbers(divergence.backward) if divergence.backward else {}),
            ),
        )
