"""Launchers: allocate, choose a configuration, launch. Callers have checked the arguments."""

import dataclasses
import functools
from typing import Any, NamedTuple

import torch
import triton

from . import config
from .fallback_parts import segment_log_sums
from .layout import ADDRESSES, CACHE_SIZE, Layout, Problem, grads_in_blocks
from .layout import architecture as architecture  # these two for fastkl.ops
from .layout import layout as layout
from .row_backward import row_backward, row_divergence_backward
from .row_divergence import row_divergence
from .row_forward import row_forward
from .row_gradient import Upstream
from .row_math import RENYI, SKEW_KL, STATE
from .series import KL, Series
from .variant import FALLBACK_ROWS, Variant, current, fallback_variant, row_variant, tensors

FIELDS = Upstream._fields
# Pointer arguments of row_forward, in order, by the names in `outputs`.
POINTERS = tuple([(name, f"{name}_ptr") for name in ("saved", *FIELDS)])
# Prefetch whole segments into L2 if a call's logits take at most this many bytes.
PREFETCH_BYTES = 33_554_432
# Float64 values per segment of a fallback row, for the KL and for another divergence.
PART_VALUES, PART_SUMS = 9, 7
# Initial value of a shard's counters, so that no program counts as the last and writes results.
NEVER_LAST = -(2**30)
# Set to False in tests: fallback rows then keep a NaN as their first saved value.
RUN_FALLBACK = True


class Shard(NamedTuple):
    """A vocabulary split over processes: its size, the width of all shards but the last, and the
    number of ranks; 0 if the vocabulary is not split.

    merges: whether the launch merges values of all ranks.
    """

    vocabulary: int = 0
    width: int = 0
    ranks: int = 0
    merges: bool = False


WHOLE = Shard()


class ForwardPlan(NamedTuple):
    """The launches of a forward: `splits` segments of `segment` entries per row; `second` is an
    f-divergence's second read, `log_sums` segment_log_sums.
    """

    segment: int
    splits: int
    prefetching: int
    forward: Variant
    fallback: Variant
    second: Variant
    log_sums: Variant


@functools.lru_cache(CACHE_SIZE)
def forward_plan(
    layout: Layout,
    with_entropy: bool,
    with_ref_kl: bool,
    with_lse: bool,
    divergence: tuple[tuple[str, Any], ...],
    overridden: tuple[Any, ...],
    shard: Shard = WHOLE,
) -> ForwardPlan:
    """Return the plan; divergence: its Series.constants. `overridden` is part of the cache key:
    tests and the tuner override configurations.
    """
    vocabulary = shard.vocabulary or layout.vocabulary
    chosen = config.select("forward", layout.case.arch, layout.p.itemsize, vocabulary)
    segment = config.segment_length(vocabulary, chosen.segment, shard.width)
    splits = max(1, -(-(shard.width or vocabulary) // segment))
    # Above 1, programs store their states, as those of a split vocabulary always do.
    states = triton.next_power_of_2(splits * shard.ranks if shard.merges else splits)
    states = max(2 if shard.ranks else 1, states)
    case, kind = layout.case, dict(divergence)["KIND"]
    wanted = dict(
        HAS_TOKENS=case.types[2] is not None,
        WITH_ENTROPY=with_entropy,
        WITH_KL=case.types[1] is not None,
        WITH_REF_KL=with_ref_kl,
        WITH_LSE=with_lse,
    )
    # No limit if Q is read element by element, which takes more registers on some architectures.
    forward = row_variant(
        row_forward,
        case,
        chosen,
        (),
        case.q_in_blocks,
        SPLITS=states,
        MERGE=shard.merges,
        REALIGN=case.realign,
        PREFETCH=config.prefetches(case.arch) and not shard.merges,
        KIND=kind if kind == RENYI.value else 0,
        **wanted,
    )
    fallback = fallback_variant(
        case,
        (),
        KIND=kind,
        PART=shard.ranks > 0 and not shard.merges,
        MERGE=shard.merges,
        SPLITS=triton.next_power_of_2(splits * shard.ranks) if shard.ranks else 0,
        **wanted,
    )
    second = row_variant(
        row_divergence,
        case,
        # The limit is too low for skew KL, whose own is Triton 3.8's need, and on sm_100.
        dataclasses.replace(chosen, max_registers=184) if kind == SKEW_KL.value else chosen,
        (),
        case.q_in_blocks and case.arch != "sm_100",
        SPLITS=states,
        MERGE=shard.merges,
        REALIGN=case.realign,
        LG2=case.arch.startswith("sm_"),
        **dict(divergence),
    )
    prefetching = int(
        layout.rows * layout.vocabulary * sum(t.itemsize for t in case.types[:2] if t is not None)
        <= PREFETCH_BYTES
    )
    log_sums = fallback_variant(case, (), segment_log_sums)
    return ForwardPlan(segment, splits, prefetching, forward, fallback, second, log_sums)


def forward(
    problem: Problem,
    outputs: dict[str, torch.Tensor],
    saved: torch.Tensor,
    divergence: Series = KL,
    shard: Shard = WHOLE,
    state: torch.Tensor | None = None,
    second: bool = False,
) -> None:
    """Fill `saved` [N, 10] and the fields of `outputs` ([N] float32 each).

    `outputs` contains kl if q is given, logprob if tokens are, ref_logprob if both are, and with
    lse also ref_lse if q is given. Another divergence is written in place of the KL, without other
    fields.

    shard: of a vocabulary split over processes. merges=False: write this rank's states, [N, splits,
    8], to `state` and nothing else. merges=True: compute all rows except fallback rows from the
    states of all ranks; problem.p and problem.q hold each row's token logit, [N, 1], and
    problem.tokens is 0, or -1 for an id outside the vocabulary.
    second: launch only an f-divergence's second read, after forward on the same `saved`.
    """
    p, q, tokens, mask, temperatures, ratios = given = tensors(problem)
    layout, plan = problem.layout, plan_for(problem, outputs, divergence, shard)
    fields = {ptr: outputs[name] if name in outputs else saved for name, ptr in POINTERS}
    with current(p):
        counters = saved
        # Not cached between calls: another pool or stream may own the memory, as under CUDA graphs.
        if not shard.merges and (shard.ranks or plan.splits > 1):
            first = NEVER_LAST if shard.ranks else 0
            counters = torch.full((layout.rows,), first, dtype=torch.int32, device=p.device)
        if state is None and plan.splits > 1:
            state = torch.empty(
                layout.rows * plan.splits * STATE.value, dtype=torch.float32, device=p.device
            )
        arguments = dict(
            p_ptr=p,
            q_ptr=q,
            mask_ptr=mask,
            temperature_ptr=temperatures,
            ratio_ptr=ratios,
            tokens_ptr=tokens,
            state_ptr=saved if state is None else state,
            counter_ptr=counters,
            **fields,
            temperature=float(problem.temperature),
            **layout.places,
            V=layout.vocabulary,
            segment=plan.segment,
            splits=plan.splits,
            prefetching=plan.prefetching,
            gamma=1.0 - divergence.share,
            ranks=shard.ranks,
            stride_rank=0 if state is None else state.stride(0),
        )
        programs = layout.rows * (1 if shard.merges else plan.splits)
        if not second:
            plan.forward.start(programs, arguments)
        if RUN_FALLBACK and not shard.ranks:
            _start_fallback(plan, problem, given, fields, divergence.share)
        if second or (divergence.forward and not shard.ranks):
            plan.second.start(programs, {**arguments, **divergence.numbers(divergence.forward)})


def plan_for(
    problem: Problem,
    outputs: dict[str, torch.Tensor],
    divergence: Series = KL,
    shard: Shard = WHOLE,
) -> ForwardPlan:
    """Return the cached plan of a forward."""
    return forward_plan(
        problem.layout,
        "entropy" in outputs,
        "ref_kl" in outputs,
        "lse" in outputs,
        divergence.constants(),
        tuple(config._override.items()),
        shard,
    )


def fallback(
    problem: Problem,
    outputs: dict[str, torch.Tensor],
    saved: torch.Tensor,
    divergence: Series,
    shard: Shard,
    parts: torch.Tensor,
    log_sums: torch.Tensor,
) -> None:
    """Fill the parts [N, splits, 9] float64 of a shard's fallback rows, which forward has marked;
    with `merges`, fill the rows from the parts of all ranks, [ranks, N, splits, 9]. For a
    divergence other than the KL, 7 in place of 9, given segment_log_sums of all ranks.
    """
    fields = {ptr: outputs[name] if name in outputs else saved for name, ptr in POINTERS}
    with current(saved):
        _start_fallback(
            plan_for(problem, outputs, divergence, shard), problem, tensors(problem), fields,
            divergence.share, part_ptr=parts, log_sums_ptr=log_sums, ranks=shard.ranks,
        )  # fmt: skip


def log_sums(problem: Problem, plan: ForwardPlan, states: torch.Tensor) -> torch.Tensor:
    """Return segment_log_sums, [N, splits, 4] float64, from a shard's states."""
    p, q, _, mask, temperatures, ratios = tensors(problem)
    found = states.new_zeros(problem.layout.rows, plan.splits, 4, dtype=torch.float64)
    with current(p):
        plan.log_sums.start(
            problem.layout.rows * plan.splits,
            dict(
                p_ptr=p,
                q_ptr=q,
                mask_ptr=mask,
                temperature_ptr=temperatures,
                ratio_ptr=ratios,
                state_ptr=states,
                log_sums_ptr=found,
                temperature=float(problem.temperature),
                **problem.layout.places,
                V=problem.layout.vocabulary,
                segment=plan.segment,
                splits=plan.splits,
            ),
        )
    return found


def _start_fallback(
    plan: ForwardPlan,
    problem: Problem,
    given: tuple[torch.Tensor, ...],
    fields: dict[str, torch.Tensor],
    share: float,
    **split: Any,
) -> None:
    """Start row_fallback without gradients; given: tensors(problem); split: arguments of shards."""
    p, q, tokens, _, temperatures, ratios = given
    saved = fields["saved_ptr"]
    plan.fallback.start(
        -(-problem.layout.rows // FALLBACK_ROWS),
        dict(
            p_ptr=p,
            q_ptr=q,
            temperature_ptr=temperatures,
            ratio_ptr=ratios,
            tokens_ptr=tokens,
            **fields,
            grad_ptr=saved,
            weight_ptr=saved,
            part_ptr=saved,
            log_sums_ptr=saved,
            temperature=float(problem.temperature),
            **problem.layout.places,
            stride_grad=0,
            V=problem.layout.vocabulary,
            n_rows=problem.layout.rows,
            share=share,
            rest=1.0 - share,
            ranks=0,
            splits=plan.splits,
            segment=plan.segment,
        )
        | split,
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
    """Return (chunks per row, row_backward) for upstream gradients of `fields` or of a divergence
    other than the KL, to gradients of these dtypes and addresses with rows `stride` apart.
    """
    case, kind = layout.case, dict(divergence)["KIND"]
    # Other divergences use forward's configuration: one warp checks a tile without a barrier.
    chosen = config.select(
        "forward" if kind else "backward", case.arch, layout.p.itemsize, layout.vocabulary
    )
    tile = chosen.threads * chosen.groups * layout.p.lanes
    chunk = tile * max(1, chosen.segment // tile)
    # A misaligned row covers one more block.
    chunks = -(-(layout.vocabulary + layout.p.lanes - 1) // chunk)
    constants = (
        dict(divergence, LG2=case.arch.startswith("sm_"))
        if kind
        else {name.upper(): fields.index(name) if name in fields else -1 for name in FIELDS}
    )
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
    field; another divergence uses the field kl.

    They may overwrite the logits unless the gradient of ref_kl to Q is requested: a row may then be
    read again while it is written.
    """
    p, q, tokens, mask, temperatures, ratios = tensors(problem)
    layout, fields = problem.layout, tuple(upstream)
    values = list(upstream.values())
    stacked = (
        values[0].float().contiguous()
        if len(values) == 1
        else torch.stack([v if v.dtype is torch.float32 else v.float() for v in values])
    )
    stride_grad = (grad_q if grad_p is None else grad_p).stride(0)  # type: ignore[union-attr]
    chunks, variant = backward_plan(
        layout,
        fields,
        divergence.constants(),
        stride_grad,
        None if grad_p is None else (grad_p.dtype, grad_p.data_ptr() % ADDRESSES),
        None if grad_q is None else (grad_q.dtype, grad_q.data_ptr() % ADDRESSES),
        tuple(config._override.items()),
    )
    with current(p):
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
