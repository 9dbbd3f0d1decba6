"""Vocabularies split over the processes of a torch.distributed group."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from . import _checks

HiddenLayout = Literal["replicated", "sequence"]
HiddenGrad = Literal["reduced", "partial"]


@dataclasses.dataclass(frozen=True)
class VocabShard:
    """The vocabulary columns that this process's tensor holds, accepted wherever `shard` is.

    The tensor [..., width] on rank r of `group` holds columns start … start + width - 1. Columns
    from vocab_size on are padding: they are not read, and their gradient is exactly 0. Ranks hold
    the columns in order, equally many each, except the last ranks, which may hold fewer or none.
    Every rank of the group makes the same call, with the same rows, and gets the same result.

    Args:
        group: a torch.distributed process group: the tensor-parallel one.
        start: the first column of this process's tensor.
        vocab_size: the size of the vocabulary without padding; if the models' vocabularies differ,
            the smaller, shared one.
        hidden_layout: for the functions on hidden states, with Head(shard=...). "replicated": every
            rank has all tokens. "sequence": each has its part of the first dimension, in rank order
            and of any length; the other arguments and the result cover all tokens. The parts'
            lengths are read, which synchronises a GPU.
        hidden_grad: "reduced": the gradient of hidden states is summed over the ranks in backward.
            "partial": it covers only this rank's columns, for callers whose own autograd sums it,
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
            whole = isinstance(value, int) and not isinstance(value, bool)
            _checks.expect(
                whole and lowest <= value <= _checks.LARGEST_COUNT,
                name,
                f"a whole number of at least {lowest} and below 2^31",
                value,
                "pass a number of columns",
                ValueError if whole else TypeError,
            )
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
        return dataclasses.replace(cls(group, 0, vocab_size), start=group.rank() * width)

    @classmethod
    def dtensor(cls, tensor: Any, vocab_size: int | None = None) -> VocabShard:
        """Return the shard of a DTensor of logits [..., V], along the mesh dimension that splits
        its last dimension; for a weight [V, H] pass its transpose, weight.t().

        vocab_size: as in VocabShard. Default: V.
        """
        found = [
            i
            for i, p in enumerate(getattr(tensor, "placements", ()))
            if p.is_shard(tensor.ndim - 1)
        ]
        _checks.expect(
            len(found) == 1,
            "tensor",
            "a DTensor whose last dimension one mesh dimension splits",
            getattr(tensor, "placements", _checks.type_name(tensor)),
            "pass a weight's transpose, or VocabShard(group, start, vocab_size)",
        )
        mesh, columns = tensor.device_mesh, tensor.shape[-1]
        group = mesh.get_group(found[0])
        start = group.rank() * -(-columns // group.size())
        return cls(group, start, columns if vocab_size is None else vocab_size)


# The argument `shard`: one for all tensors, or one for each of two.
Shards = VocabShard | tuple[VocabShard, VocabShard] | None


class Cut(NamedTuple):
    """A VocabShard in the form for ops: the group's name, or "" without one; this tensor's first
    column, the vocabulary's size, the width of all shards but the last, and the number of ranks.
    """

    group: str = ""
    start: int = 0
    vocabulary: int = 0
    width: int = 0
    ranks: int = 0

    # Not a property: torch 2.10 cannot compile a NamedTuple's properties.
    def as_arguments(self) -> dict[str, Any]:
        """Return the fields by name, as op arguments; none without a group."""
        return self._asdict() if self.group else {}

    def columns(self, own: int) -> int:
        """Return how many of a tensor's `own` columns are not padding."""
        return min(max(self.vocabulary - self.start, 0), own)

    def part(self, whole: torch.Tensor, own: int) -> torch.Tensor:
        """Return a tensor's `own` columns of [..., V], 0 for padding."""
        part = whole[..., self.start : self.start + self.columns(own)]
        return torch.nn.functional.pad(part, (0, own - part.shape[-1]))


WHOLE = Cut()


def start_gather(
    values: Sequence[torch.Tensor], group: str, ranks: int, call: object = None
) -> torch.Tensor:
    """Start one all_gather of the bytes of all values, for `wait`.

    call: further properties of the call, in which the ranks must agree as in shapes and dtypes.
    """
    alike = call, [(*value.shape, value.dtype) for value in values]
    # Not hash(), which differs between processes.
    code = 0 if torch.compiler.is_compiling() else zlib.crc32(repr(alike).encode())
    first = torch.full((1,), code, dtype=torch.int64, device=values[0].device)
    own = [value.contiguous().view(-1).view(torch.uint8) for value in (first, *values)]
    packed = torch.cat(own).unsqueeze(0)
    started: torch.Tensor = torch.ops._c10d_functional.all_gather_into_tensor(packed, ranks, group)
    return started


def wait(started: torch.Tensor, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the values of all ranks, each [ranks, ...], without a gradient; on a GPU its stream
    waits, not the host. Ranks that do not agree in their calls raise an error; a GPU, later.
    """
    packed = torch.ops._c10d_functional.wait_tensor(started)
    sizes = [value.numel() * value.itemsize for value in values]
    codes, *parts = packed.split([8, *sizes], -1)
    torch._assert_async(
        (codes == codes[0]).all(),
        "shard: expected the same call on all ranks of shard.group, got calls that differ in "
        "function, rows, dtypes or options; pass the same arguments except for the logits",
    )
    return [
        part.clone(memory_format=torch.contiguous_format)
        .view(-1)
        .view(value.dtype)
        .view(len(packed), *value.shape)
        for part, value in zip(parts, values, strict=True)
    ]


def all_gather(
    values: Sequence[torch.Tensor], group: str, ranks: int, call: object = None
) -> list[torch.Tensor]:
    """Return the values of all ranks of a group, each [ranks, ...], without a gradient."""
    return wait(start_gather(values, group, ranks, call), values)


def logits_at(logits: torch.Tensor, ids: torch.Tensor, cut: Cut) -> torch.Tensor:
    """Return the logits [..., V] at ids [..., K] of the whole vocabulary, with gradient to this
    rank's columns. Second derivatives, which depend on other ranks' columns, raise an error.
    """
    if not cut.group:
        return logits.gather(-1, ids)
    columns, own = cut.columns(logits.shape[-1]), ids - cut.start
    elsewhere = (own < 0) | (own >= columns)
    if not columns:
        logits = torch.nn.functional.pad(logits, (0, 1))
    mine = logits.gather(-1, own.masked_fill(elsewhere, 0)).masked_fill(elsewhere, 0.0)
    if mine.requires_grad:
        mine.register_hook(
            lambda gradient: _checks.expect(
                not gradient.requires_grad,
                "shard",
                "None for second derivatives, which depend on columns of other ranks",
                "one",
                "gather the logits first",
            )
        )
    # Each logit is on one rank; the others have 0.
    (all_ranks,) = all_gather([mine.detach()], cut.group, cut.ranks, "logits_at")
    return torch.where(elsewhere, all_ranks.sum(0), mine)


def shards_of(
    shard: VocabShard | tuple[VocabShard, VocabShard], logits: dict[str, torch.Tensor]
) -> list[VocabShard]:
    """Check `shard` and return the shard of each tensor; a pair is for two tensors."""
    (own, first), *others = logits.items()
    same = -1 if isinstance(shard, tuple) else None
    for name, value in others:
        _checks.expect(
            value.shape[:same] == first.shape[:same],
            name,
            f"the shape of {own}, {tuple(first.shape)}, or for a pair of shards but its columns",
            tuple(value.shape),
            "align the other dimensions, and pass a pair where the models' columns differ",
        )
        _checks.same_device_and_precision(name, value, own, first)
    pair = list(shard) if isinstance(shard, tuple) else [shard] * len(logits)
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
        [(each.group.group_name, each.vocab_size) for each in pair],
        "pass the smaller vocabulary's size to both",
    )
    return pair


def cut_of(shard: VocabShard, own: int) -> tuple[Cut, bool]:
    """Return the Cut of a tensor with `own` columns, and whether they start at rank · width and
    fill their place in the vocabulary. No communication.
    """
    rank, ranks = shard.group.rank(), shard.group.size()
    width = shard.start // rank if rank else own
    place = min(width, max(shard.vocab_size - shard.start, 0))
    fits = (
        shard.start == rank * width and place <= own <= width and width * ranks >= shard.vocab_size
    )
    return Cut(shard.group.group_name, shard.start, shard.vocab_size, width, ranks), fits


def checked_cut(shard: VocabShard, name: str, own: int) -> Cut:
    """Check the shard of tensor `name`, which has `own` columns, and return its Cut."""
    cut, fits = cut_of(shard, own)
    _checks.expect(
        fits,
        "shard",
        f"rank r's first column of {name} to be r · width, and the columns of all ranks to make "
        f"the vocabulary of {shard.vocab_size}",
        f"start {shard.start} beside {own} columns on rank {shard.group.rank()}",
        "pass this rank's columns alone, and VocabShard.megatron(group, width, vocab_size)",
    )
    return cut


def sharded_logits(
    shard: Shards, native: bool, logits: dict[str, torch.Tensor]
) -> tuple[list[torch.Tensor], Cut]:
    """Check `shard` and return the logits and their Cut; without `native` the logits of the whole
    vocabulary and no Cut. All ranks take the same path.
    """
    if shard is None:
        return list(logits.values()), WHOLE
    shards = shards_of(shard, logits)
    if native:
        pairs = zip(shards, logits.items(), strict=True)
        cuts = [checked_cut(each, name, value.shape[-1]) for each, (name, value) in pairs]
        if cuts[0] == cuts[-1]:
            return list(logits.values()), cuts[0]
        (p, q), group = logits.values(), shards[0].group
        # Move P if only Q needs a gradient: then backward has no collective.
        if q.requires_grad and not p.requires_grad:
            return [move_columns(p, group, cuts[0], cuts[1], q.shape[-1]), q], cuts[1]
        return [p, move_columns(q, group, cuts[1], cuts[0], p.shape[-1])], cuts[0]
    whole = _Whole.apply(shards, next(iter(logits)), *logits.values())  # type: ignore[no-untyped-call]
    return list(whole), WHOLE


def move_columns(
    logits: torch.Tensor, group: dist.ProcessGroup, held: Cut, wanted: Cut, own: int
) -> torch.Tensor:
    """Return this rank's `own` columns of the layout `wanted`, 0 for padding, from each rank's
    logits [..., columns of `held`]: one all_to_all, and one in backward.
    """
    from torch.distributed._functional_collectives import all_to_all_single_autograd

    def count(source: int, target: int) -> int:
        """Count the columns that rank `source` of `held` and rank `target` of `wanted` share."""
        start = max(source * held.width, target * wanted.width)
        end = min((source + 1) * held.width, (target + 1) * wanted.width, held.vocabulary)
        return max(end - start, 0)

    rank, ranks, leading = group.rank(), range(held.ranks), logits.shape[:-1]
    sent, got = [count(rank, r) for r in ranks], [count(r, rank) for r in ranks]
    packed = torch.cat([part.reshape(-1) for part in logits[..., : sum(sent)].split(sent, -1)])
    sizes, sent_sizes = ([leading.numel() * n for n in columns] for columns in (got, sent))
    moved = all_to_all_single_autograd(packed, sizes, sent_sizes, group).split(sizes)
    parts = [part.view(*leading, n) for part, n in zip(moved, got, strict=True)]
    return torch.nn.functional.pad(torch.cat(parts, -1), (0, own - sum(got)))


def gather_columns(
    cuts: Sequence[Cut], logits: Sequence[torch.Tensor], call: object = None
) -> list[torch.Tensor]:
    """Return the logits of the whole vocabulary [..., V] for tensors with the same rows, in one
    all-gather.
    """
    padded = [
        torch.nn.functional.pad(value, (0, cut.width - value.shape[-1]))
        for cut, value in zip(cuts, logits, strict=True)
    ]
    parts = all_gather(padded, cuts[0].group, cuts[0].ranks, call)
    return [
        part.movedim(0, -2).flatten(-2)[..., : cut.vocabulary]
        for cut, part in zip(cuts, parts, strict=True)
    ]


class _Whole(torch.autograd.Function):
    """Gathers the columns of all ranks; the gradient is this rank's part."""

    @staticmethod
    def forward(
        ctx: Any, shards: list[VocabShard], name: str, *logits: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Check that the ranks' tensors match, as all-gather may not, and gather the columns."""
        found = [cut_of(s, value.shape[-1]) for s, value in zip(shards, logits, strict=True)]
        cuts = [cut for cut, _ in found]
        if not torch.compiler.is_compiling():
            mine = [
                [
                    value.shape[:-1].numel(),
                    _checks.FLOAT_TYPES.index(value.dtype),
                    cut.vocabulary,
                    cut.width,
                    fits,
                ]
                for value, (cut, fits) in zip(logits, found, strict=True)
            ]
            # As many numbers for one tensor as for two.
            numbers = torch.tensor((mine * 2)[:2], device=logits[0].device)
            held = all_gather([numbers], cuts[0].group, cuts[0].ranks)[0].tolist()
            wrong = [
                i for i, each in enumerate(held) if each != held[0] or not all(x[4] for x in each)
            ]
            _checks.expect(
                not wrong,
                name,
                "the same rows, type, vocab_size and width on all ranks of shard.group, and rank "
                "r's columns from r·width on",
                f"{held[wrong[0]]} on rank {wrong[0]} for {held[0]}" if wrong else "",
                "pass each rank's own columns, and VocabShard.megatron(group, width, vocab_size)",
            )
        ctx.places = [(cut, value.shape[-1]) for cut, value in zip(cuts, logits, strict=True)]
        ctx.set_materialize_grads(False)
        whole = gather_columns(cuts, logits)
        needs = zip(whole, ctx.needs_input_grad[2:], strict=True)
        ctx.mark_non_differentiable(*[value for value, wanted in needs if not wanted])
        return tuple(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Return the part of each gradient that belongs to this rank's columns."""
        named = zip(upstream, ctx.places, strict=True)
        return None, None, *[None if g is None else cut.part(g, own) for g, (cut, own) in named]


def hidden_states(hidden: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """Return the hidden states of all tokens; their gradient is summed according to hidden_grad."""
    if shard.hidden_layout == "replicated" and shard.hidden_grad == "partial":
        return hidden
    lengths = [len(hidden)]
    if shard.hidden_layout == "sequence":
        sizes, group = torch.tensor(lengths, device=hidden.device), shard.group
        alike = hidden.dtype, hidden.shape[1:]
        (all_sizes,) = all_gather([sizes], group.group_name, group.size(), alike)
        lengths = all_sizes[:, 0].tolist()
    whole: torch.Tensor = _Hidden.apply(hidden, shard, lengths)  # type: ignore[no-untyped-call]
    return whole


class _Hidden(torch.autograd.Function):
    """Gathers parts of hidden states, and sums the gradients over the ranks."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, shard: VocabShard, lengths: list[int]
    ) -> torch.Tensor:
        """Concatenate the parts of all ranks; return replicated hidden states as they are."""
        ctx.group, ctx.own = shard.group.group_name, slice(0, lengths[0])
        if shard.hidden_layout == "replicated":
            return hidden.view_as(hidden)
        rank = shard.group.rank()
        ctx.own = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
        padded = hidden.new_zeros(max(lengths), *hidden.shape[1:])
        padded[: len(hidden)] = hidden
        ops: Any = torch.ops._c10d_functional
        parts = ops.wait_tensor(ops.all_gather_into_tensor(padded[None], len(lengths), ctx.group))
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Sum the gradient over all ranks and return this rank's part."""
        ops: Any = torch.ops._c10d_functional
        total = ops.wait_tensor(ops.all_reduce(upstream.contiguous(), "sum", ctx.group))
        return total[ctx.own], None, None
