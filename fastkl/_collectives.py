"""The collectives of split vocabularies: states and logits of all ranks, columns in another layout,
hidden states.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import torch

from . import _checks
from .parallel import WHOLE, Cut, Shards, VocabShard, checked_cut, cut_of, shards_of


def packed(values: Sequence[torch.Tensor], signature: object) -> torch.Tensor:
    """Return the bytes of `values` after a checksum [16] that is the same on all ranks whose
    signatures have the same repr.
    """
    # Not hash(), which differs between processes. 0: not checked, since shapes may be symbolic.
    code = 0 if torch.compiler.is_compiling() else zlib.crc32(repr(signature).encode())
    first = torch.full((2,), code, dtype=torch.int64, device=values[0].device)
    return torch.cat([x.contiguous().view(-1).view(torch.uint8) for x in (first, *values)])


def expect_same(checksums: torch.Tensor) -> None:
    """Check that the checksums of all ranks, [ranks, 16], are the same."""
    torch._assert_async(
        (checksums == checksums[0]).all() | (checksums == 0).all(-1).any(),
        # torch takes at most 254 characters.
        "shard: expected the same call on all ranks of shard.group, got calls that differ in "
        "function, rows, dtypes or options; pass the same arguments but each rank's own columns",
    )


def start_gather(
    values: Sequence[torch.Tensor], group: str, ranks: int, signature: object = None
) -> torch.Tensor:
    """Start one all_gather of the bytes of `values` after a checksum, and return the pending uint8
    [ranks, bytes], for `wait`.

    signature: what the ranks' calls must agree in besides shapes and dtypes, with the same repr in
    each process.
    """
    described = signature, [(*value.shape, value.dtype) for value in values]
    return torch.ops._c10d_functional.all_gather_into_tensor(  # type: ignore[no-any-return]
        packed(values, described).unsqueeze(0), ranks, group
    )


def wait(started: torch.Tensor, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the values of all ranks, each [ranks, ...], without a gradient. On a GPU the stream
    waits, not the host.

    Raises: RuntimeError if the ranks' checksums differ; on a GPU a device-side assertion.
    """
    gathered = torch.ops._c10d_functional.wait_tensor(started)
    sizes = [value.numel() * value.itemsize for value in values]
    checksums, *parts = gathered.split([16, *sizes], -1)
    expect_same(checksums)
    return [
        part.clone(memory_format=torch.contiguous_format)
        .view(-1)
        .view(value.dtype)
        .view(len(gathered), *value.shape)
        for part, value in zip(parts, values, strict=True)
    ]


def all_gather(
    values: Sequence[torch.Tensor], group: str, ranks: int, signature: object = None
) -> list[torch.Tensor]:
    """Return the values of all ranks of a group, each [ranks, ...], without a gradient.

    signature: as in start_gather.
    """
    return wait(start_gather(values, group, ranks, signature), values)


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
    (found,) = all_gather([mine.detach()], cut.group, cut.ranks, (cut.vocabulary, cut.width))
    return torch.where(elsewhere, found.sum(0), mine)


def sharded_logits(
    shard: Shards, native: bool, logits: dict[str, torch.Tensor]
) -> tuple[list[torch.Tensor], Cut]:
    """Check `shard` and return the logits and their Cut; without `native` the logits of the whole
    vocabulary and WHOLE. All ranks take the same path if the same tensors need a gradient on each.

    Of a pair with different layouts, one tensor's columns are moved to the other's ranks.
    """
    if shard is None:
        return list(logits.values()), WHOLE
    shards = shards_of(shard, logits)
    if native:
        pairs = zip(shards, logits.items(), strict=True)
        cuts = [checked_cut(each, name, value.shape[-1]) for each, (name, value) in pairs]
        values, group = list(logits.values()), shards[0].group
        if cuts[0] == cuts[-1]:
            if values[0].shape != values[-1].shape:  # the last ranks' padding differs
                values = [value[..., : cuts[0].columns(value.shape[-1])] for value in values]
            return values, cuts[0]
        p, q = values
        # Move a tensor without gradient, else Q: backward needs a collective only if both have one.
        learn = p.requires_grad, q.requires_grad
        if learn == (False, True):
            return [Moved.apply(p, group, *cuts, q.shape[-1], learn), q], cuts[1]  # type: ignore[no-untyped-call]
        return [p, Moved.apply(q, group, *cuts[::-1], p.shape[-1], learn)], cuts[0]  # type: ignore[no-untyped-call]
    return list(_Whole.apply(shards, next(iter(logits)), *logits.values())), WHOLE  # type: ignore[no-untyped-call]


def gather_columns(
    cuts: Sequence[Cut], logits: Sequence[torch.Tensor], signature: object = None
) -> list[torch.Tensor]:
    """Return the logits of the whole vocabulary [..., V] for tensors with the same rows, in one
    all_gather.

    signature: as in start_gather.
    """
    padded = [
        torch.nn.functional.pad(value, (0, cut.width - value.shape[-1]))
        for cut, value in zip(cuts, logits, strict=True)
    ]
    parts = all_gather(padded, cuts[0].group, cuts[0].ranks, signature)
    return [
        part.movedim(0, -2).flatten(-2)[..., : cut.vocabulary]
        for cut, part in zip(cuts, parts, strict=True)
    ]


class Moved(torch.autograd.Function):
    """Moves columns to another layout of the vocabulary, and their gradient back."""

    @staticmethod
    def forward(
        logits: torch.Tensor,
        group: torch.distributed.ProcessGroup,
        held: Cut,
        wanted: Cut,
        own: int,
        learn: tuple[bool, bool],
    ) -> torch.Tensor:
        """Return this rank's `own` columns of the layout `wanted`, [..., own] with 0 for padding,
        from all ranks' logits [..., columns of `held`], in one all_to_all.

        learn: which tensors of the call need a gradient, for the checksum.
        """

        def shared(source: int, target: int) -> int:
            """Count the columns that rank `source` passes to rank `target`."""
            ends = (source + 1) * held.width, (target + 1) * wanted.width, held.vocabulary
            return len(range(max(source * held.width, target * wanted.width), min(ends)))

        rank, ranks, leading = group.rank(), range(held.ranks), logits.shape[:-1]
        sent, received = [shared(rank, r) for r in ranks], [shared(r, rank) for r in ranks]
        signature = held[2:], wanted[2:], (*leading, logits.dtype, learn)
        pieces = [packed([x], signature) for x in logits[..., : sum(sent)].split(sent, -1)]
        sizes = [16 + leading.numel() * columns * logits.itemsize for columns in received]
        ops: Any = torch.ops._c10d_functional
        moved = ops.all_to_all_single(
            torch.cat(pieces), sizes, [*map(len, pieces)], group.group_name
        )
        parts = ops.wait_tensor(moved).split(sizes)
        expect_same(torch.stack([part[:16] for part in parts]))
        found = [
            part[16:].clone().view(logits.dtype).view(*leading, columns)
            for part, columns in zip(parts, received, strict=True)
        ]
        return torch.cat([*found, logits.new_zeros(*leading, own - sum(received))], -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        """Keep the two layouts, exchanged."""
        logits, group, held, wanted, _, learn = inputs
        ctx.back = group, wanted, held, logits.shape[-1], learn

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Move the gradient back."""
        return Moved.apply(upstream, *ctx.back), *[None] * 5  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, ...], logits: torch.Tensor, *layouts: Any) -> Any:
        """Treat the mapped dimension as a leading one."""
        return Moved.apply(logits.movedim(in_dims[0], 0), *layouts), 0  # type: ignore[no-untyped-call]


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
            # Equal sizes, so that one tensor beside another rank's two is found here.
            numbers = torch.tensor((mine * 2)[:2], device=logits[0].device)
            held = all_gather([numbers], cuts[0].group, cuts[0].ranks, len(logits))[0].tolist()
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
    @torch.autograd.function.once_differentiable
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
        described = hidden.dtype, hidden.shape[1:]
        lengths = (
            all_gather([sizes], group.group_name, group.size(), described)[0].flatten().tolist()
        )
    return _Hidden.apply(hidden, shard, lengths)  # type: ignore[no-any-return, no-untyped-call]


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
        # Without the copies of all_gather; the gather of lengths has compared the calls.
        parts = ops.wait_tensor(ops.all_gather_into_tensor(padded[None], len(lengths), ctx.group))
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Sum the gradient over all ranks and return this rank's part."""
        ops: Any = torch.ops._c10d_functional
        total = ops.wait_tensor(ops.all_reduce(upstream.contiguous(), "sum", ctx.group))
        return total[ctx.own], None, None
