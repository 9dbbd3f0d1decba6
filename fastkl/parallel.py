"""Vocabularies split over the processes of a torch.distributed group."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist

from . import _checks

HiddenLayout = Literal["replicated", "sequence"]
HiddenGrad = Literal["reduced", "partial"]


@dataclasses.dataclass(frozen=True)
class VocabShard:
    """The columns of a vocabulary that a tensor of this process holds, accepted wherever `shard`
    is.

    The tensor [..., width] on rank r of `group` holds columns start … start + width - 1. Those at
    and beyond vocab_size are padding: they are not read, and their gradient is exactly 0. Ranks
    hold the columns in order; all but the last have the same width. Every rank of the group makes
    the same call, with the same rows, and gets the same result.

    Args:
        group: a torch.distributed process group: the tensor-parallel one.
        start: the first column of this process's tensor.
        vocab_size: the size of the vocabulary without padding. Of models whose vocabularies differ
            the shared one, the smaller.
        hidden_layout: of the functions on hidden states, as Head(shard=...). "replicated": every
            rank has all tokens. "sequence": each has its part of the first dimension, in rank order
            and of any length; the other arguments and the result are of all tokens. The parts'
            lengths are read, which synchronises a GPU.
        hidden_grad: "reduced": the gradient of hidden states is summed over the ranks in backward.
            "partial": it is that of this rank's columns, for a caller whose own autograd sums it,
            as Megatron-LM's does.

    Raises: TypeError, ValueError.
    """

    group: dist.ProcessGroup
    start: int
    vocab_size: int
    _: dataclasses.KW_ONLY
    hidden_layout: HiddenLayout = "replicated"
    hidden_grad: HiddenGrad = "reduced"

    def __post_init__(self) -> None:
        _checks.expect(
            isinstance(self.group, dist.ProcessGroup),
            "group",
            "a process group that this process belongs to",
            self.group,
            "pass the tensor-parallel group, such as mesh['tp'].get_group()",
            TypeError,
        )
        for name, lowest in (("start", 0), ("vocab_size", 1)):
            value = getattr(self, name)
            remedy = "pass a number of columns"
            whole = isinstance(value, int) and not isinstance(value, bool)
            _checks.expect(whole, name, "a whole number", value, remedy, TypeError)
            fits = lowest <= value <= _checks.LARGEST_COUNT
            _checks.expect(fits, name, f"at least {lowest}, below 2^31", value, remedy)
        _checks.choice("hidden_layout", self.hidden_layout, get_args(HiddenLayout))
        _checks.choice("hidden_grad", self.hidden_grad, get_args(HiddenGrad))
        _checks.expect(
            self.hidden_layout == "replicated" or self.hidden_grad == "reduced",
            "hidden_grad",
            "'reduced' beside hidden_layout='sequence', whose gradient is summed and split",
            self.hidden_grad,
            "leave it out",
        )

    @classmethod
    def megatron(cls, group: dist.ProcessGroup, width: int, vocab_size: int) -> VocabShard:
        """Return the shard of Megatron-LM's layout: rank r starts at column r·width, and padding up
        to a multiple of 128 · ranks follows the vocabulary.
        """
        return cls(group, group.rank() * width, vocab_size)


# The argument `shard`: of all tensors, or of each of two.
Shards = VocabShard | tuple[VocabShard, VocabShard] | None


class Cut(NamedTuple):
    """A VocabShard as an op takes it: the group's name, or "" without one, this tensor's first
    column, and the vocabulary's size.
    """

    group: str = ""
    start: int = 0
    vocabulary: int = 0

    @classmethod
    def of(cls, shard: VocabShard) -> Cut:
        """Return the Cut of a shard."""
        return cls(shard.group.group_name, shard.start, shard.vocab_size)

    def columns(self, width: int) -> int:
        """Return how many of a tensor's `width` columns are no padding."""
        return min(max(self.vocabulary - self.start, 0), width)


NONE = Cut()


def all_gather(value: torch.Tensor, group: str) -> torch.Tensor:
    """Return the values of all ranks of a group, [ranks, ...], without a gradient."""
    ops: Any = torch.ops._c10d_functional
    ranks = size(group)
    gathered = ops.all_gather_into_tensor(value.contiguous().view(1, *value.shape), ranks, group)
    result: torch.Tensor = ops.wait_tensor(gathered)
    return result


def size(group: str) -> int:
    """Return the number of ranks of a group."""
    return _group(group).size()


def width(cut: Cut, own: int) -> int:
    """Return the width of all shards but the last, from this process's start and width."""
    rank = _group(cut.group).rank()
    return cut.start // rank if rank else own


def _group(name: str) -> dist.ProcessGroup:
    c10d: Any = dist.distributed_c10d
    group: dist.ProcessGroup = c10d._resolve_process_group(name)
    return group


def shards_of(
    shard: VocabShard | tuple[VocabShard, VocabShard], logits: dict[str, torch.Tensor]
) -> list[VocabShard]:
    """Check `shard` and return the shard of each tensor; a pair is for two tensors."""
    (own, first), *others = logits.items()
    for name, value in others:
        _checks.expect(
            value.shape[:-1] == first.shape[:-1],
            name,
            f"the leading shape of {own}, {tuple(first.shape[:-1])}",
            tuple(value.shape[:-1]),
            "align the batch and time dimensions",
        )
        _checks.same_device_and_precision(name, value, own, first)
    pair = list(shard) if isinstance(shard, (tuple, list)) else [shard] * len(logits)
    one = "a fastkl.VocabShard"
    _checks.expect(
        len(pair) == len(logits) and all(isinstance(each, VocabShard) for each in pair),
        "shard",
        one if len(logits) == 1 else f"{one}, or a pair of them for {' and '.join(logits)}",
        shard,
        "pass VocabShard.megatron(group, width, vocab_size), for instance",
        TypeError,
    )
    _checks.expect(
        len({(each.group.group_name, each.vocab_size) for each in pair}) == 1,
        "shard",
        "one group and one vocab_size for both tensors",
        [each.vocab_size for each in pair],
        "pass the smaller vocabulary's size to both",
    )
    return pair


def cut_of(shard: VocabShard, widths: dict[str, int]) -> Cut:
    """Return the Cut of tensors that are cut alike: rank r's start is r times a width."""
    cut = Cut.of(shard)
    for name, own in widths.items():
        _checks.expect(
            shard.start == shard.group.rank() * width(cut, own) and own <= width(cut, own),
            "shard",
            f"a start that is rank times the width of {name}, {own} or more on the last ranks",
            shard.start,
            "use VocabShard.megatron",
        )
    return cut


def whole(shards: Sequence[VocabShard], logits: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the logits of the whole vocabulary [..., vocab_size], with a gradient to this
    process's columns: from two all_gathers, and no communication in backward.
    """
    return list(_Whole.apply(list(shards), tuple(logits), *logits.values()))  # type: ignore[no-untyped-call]


def prepared(
    shard: Shards, native: bool, logits: dict[str, torch.Tensor]
) -> tuple[list[torch.Tensor], Cut]:
    """Check `shard` and return the logits and their Cut; if `native` is False, or for a pair, the
    logits of the whole vocabulary and no Cut. All ranks decide alike.
    """
    if shard is None:
        return list(logits.values()), NONE
    shards = shards_of(shard, logits)
    if native and isinstance(shard, VocabShard):
        return list(logits.values()), cut_of(
            shard, {name: value.shape[-1] for name, value in logits.items()}
        )
    return whole(shards, logits), NONE


class _Held(NamedTuple):
    """The columns of a tensor that one rank holds."""

    vocabulary: int
    rows: int
    itemsize: int
    start: int
    columns: int


class _Whole(torch.autograd.Function):
    """Gathers the columns of all ranks; the gradient is the part of this one."""

    @staticmethod
    def forward(
        ctx: Any, shards: list[VocabShard], names: tuple[str, ...], *logits: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Gather the sizes, then the columns of all tensors as bytes."""
        group, device = shards[0].group.group_name, logits[0].device
        ctx.held = [
            _Held(
                shard.vocab_size,
                value.shape[:-1].numel(),
                value.itemsize,
                shard.start,
                Cut.of(shard).columns(value.shape[-1]),
            )
            for shard, value in zip(shards, logits, strict=True)
        ]
        ctx.shapes = [value.shape for value in logits]
        ctx.set_materialize_grads(False)
        sizes = all_gather(torch.tensor(ctx.held, device=device), group)
        ranks = [[_Held(*each) for each in sizes[:, i].tolist()] for i in range(len(logits))]
        packed: list[torch.Tensor] = []
        for name, value, held in zip(names, logits, ranks, strict=True):
            _check_ranks(name, held)
            own = ctx.held[len(packed)]
            padded = value.new_zeros(own.rows, max(each.columns for each in held))
            padded[:, : own.columns] = value.reshape(own.rows, value.shape[-1])[:, : own.columns]
            packed.append(padded.view(torch.uint8))
        gathered = all_gather(torch.cat(packed, -1), group).split(
            [each.shape[-1] for each in packed], -1
        )
        return tuple(
            torch.cat(
                [
                    part[:, : each.columns]
                    for part, each in zip(parts.contiguous().view(value.dtype), held, strict=True)
                ],
                -1,
            ).view(*value.shape[:-1], held[0].vocabulary)
            for value, parts, held in zip(logits, gathered, ranks, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Return the part of each gradient that belongs to this rank's columns."""
        grads: list[torch.Tensor | None] = []
        for value, own, shape in zip(upstream, ctx.held, ctx.shapes, strict=True):
            grad = None if value is None else value.new_zeros(shape)
            if grad is not None and value is not None:
                grad[..., : own.columns] = value[..., own.start : own.start + own.columns]
            grads.append(grad)
        return None, None, *grads


def _check_ranks(name: str, held: list[_Held]) -> None:
    """Check that all ranks pass the same rows of one vocabulary, and together all of its columns
    in order.
    """
    _checks.expect(
        len({each[:3] for each in held}) == 1,
        name,
        "the same vocab_size, number of rows and type on all ranks of shard.group",
        f"(vocab_size, rows, bytes per entry) = {', '.join(str(each[:3]) for each in held)}",
        "a tensor-parallel group computes the same rows on every rank",
    )
    ends = list(itertools.accumulate(each.columns for each in held))
    starts = [each.start for each in held if each.columns]
    _checks.expect(
        starts == [0, *ends][: len(starts)] and ends[-1] == held[0].vocabulary,
        "shard",
        f"shards that hold the columns 0 … {held[0].vocabulary - 1} once and in rank order",
        ", ".join(f"{each.start} … {each.start + each.columns - 1}" for each in held),
        "use VocabShard.megatron, or pass each rank's first column as start",
    )


def hidden_states(hidden: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """Return the hidden states of all tokens, whose gradient is that of this rank's columns."""
    if shard.hidden_layout == "replicated" and shard.hidden_grad == "partial":
        return hidden
    lengths = [len(hidden)]
    if shard.hidden_layout == "sequence":
        sizes = all_gather(torch.tensor(lengths, device=hidden.device), shard.group.group_name)
        lengths = sizes[:, 0].tolist()
    whole: torch.Tensor = _Hidden.apply(hidden, shard, lengths)  # type: ignore[no-untyped-call]
    return whole


class _Hidden(torch.autograd.Function):
    """Gathers parts of hidden states, and sums the gradients over the ranks."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, shard: VocabShard, lengths: list[int]
    ) -> torch.Tensor:
        """Return the parts of all ranks one after the other; a replicated one as it is."""
        ctx.group, ctx.own = shard.group.group_name, slice(0, lengths[0])
        if shard.hidden_layout == "replicated":
            return hidden.view_as(hidden)
        rank = shard.group.rank()
        ctx.own = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
        padded = hidden.new_zeros(max(lengths), *hidden.shape[1:])
        padded[: len(hidden)] = hidden
        parts = all_gather(padded, ctx.group)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Sum the gradient over all ranks and return this rank's part."""
        ops: Any = torch.ops._c10d_functional
        total = ops.wait_tensor(ops.all_reduce(upstream.contiguous(), "sum", ctx.group))
        return total[ctx.own], None, None
