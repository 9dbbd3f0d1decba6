"""Vocabularies split over the processes of a torch.distributed group."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import torch

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
        start: the first column of this process's tensor: on rank r, r times the width of the first
            rank's, even beyond the vocabulary.
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

    group: torch.distributed.ProcessGroup
    start: int
    vocab_size: int
    _: dataclasses.KW_ONLY
    hidden_layout: HiddenLayout = "replicated"
    hidden_grad: HiddenGrad = "reduced"

    def __post_init__(self) -> None:
        _checks.expect(
            isinstance(self.group, torch.distributed.ProcessGroup),
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
    def megatron(
        cls, group: torch.distributed.ProcessGroup, width: int, vocab_size: int
    ) -> VocabShard:
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
