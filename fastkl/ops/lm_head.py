"""Compute logits from hidden states a chunk of tokens at a time: one GEMM for the logits of each
model, then the engine, then the GEMMs of backward.

A chunk's logits are in a reused buffer, or a slice of all logits if forward kept them.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence

import torch

from .. import _collectives, _value_checks
from .chunks import ChunkedHead, GivenLogits, Sum, plan
from .engine import Engine
from .fields import (
    POLICY_FIELDS,
    REFERENCE_FIELDS,
    SAVED,
    PerRow,
    RowArgs,
    result_dtype,
    rows_of_each,
)

# Hidden states, weight and bias of the policy and of the reference; with ref_hidden, a ref_weight
# of None means the policy's.
Six = tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
]
# Computes a chunk of tokens; returns an iterator if it is to pause while a collective runs.
OfChunk = Callable[..., Iterator[None] | None]


class ChunkedHeads:
    """One or two lm_heads over the same tokens.

    With checks_values, masked tokens are dropped; otherwise they are computed as zeros, because
    counting them would synchronise. args: p holds the policy's hidden states. given: logits in
    place of the second model. given_first: they are P's, and the lm_head's are Q's.
    """

    def __init__(
        self,
        six: Six,
        args: RowArgs,
        engine: Engine,
        logits_dtype: torch.dtype,
        chunk_size: int | None,
        given: torch.Tensor | None = None,
        given_first: bool = False,
    ) -> None:
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias = six
        self.tokens, self.shared = hidden.shape[:-1].numel(), ref_weight is None
        self.engine, self.chunk_size, self.given_first = engine, chunk_size, given_first
        # The tokens computed; None: all.
        self.index: torch.Tensor | None = None
        if engine.checks_values:
            if args.mask is not None:
                self.index = args.mask.nonzero()[:, 0]
                args = args.at(self.index, args.p, None)._replace(mask=None)
            if isinstance(args.scaling.ratio, torch.Tensor):
                # The engine does not check ratios, and temperatures make them NaN.
                if isinstance(args.temperature, torch.Tensor):
                    _value_checks.temperatures_positive(args.temperature)
                _value_checks.ratios_finite(args.scaling.ratio)
        self.args = args._replace(call_rows=self.tokens)
        self.all: list[ChunkedHead] = []
        second = ref_hidden, weight if ref_weight is None else ref_weight, ref_bias
        for states, own_weight, own_bias in ((hidden, weight, bias), second):
            if states is not None:
                rows = self.taken(states.reshape(-1, states.shape[-1]))
                self.all.append(ChunkedHead(rows, own_weight, own_bias, logits_dtype))
        if given is not None:
            self.all.append(GivenLogits(given, weight, self.index))

    def forward(
        self, fields: Sequence[str], keep: Sequence[torch.Tensor | None] = ()
    ) -> dict[str, torch.Tensor]:
        """Return {field: [N]} and "saved" [N, SAVED]: one GEMM for each head.

        keep: memory for all logits of each head, [..., at least V] in padded rows; without it only
        a chunk of logits exists at a time.
        """
        states = self.all[0].hidden
        saved = states.new_empty(len(states), SAVED, dtype=result_dtype(states))
        outputs = {name: saved.new_empty(len(states)) for name in fields}
        engine = self.engine.steps if self.args.cut.group else self.engine.forward
        self.each_chunk(
            lambda rows, args, *_: engine(args, rows_of_each(outputs, rows), saved[rows]), keep
        )
        return self.of_all({**outputs, "saved": saved})

    def each_chunk(self, engine: OfChunk, keep: Sequence[torch.Tensor | None] = ()) -> None:
        """Call engine(rows, their arguments, …) for each chunk of tokens; keep: as in forward."""
        for head, memory in zip(self.all, keep, strict=False):
            if memory is not None:
                head.keep(memory, filled=False)
        chunk, _ = plan(self.all, self.chunk_size, self.all, self.args.cut.width)
        self._compute(self.all, (chunk, chunk), engine)

    def backward(
        self,
        saved: torch.Tensor,
        upstream: dict[str, torch.Tensor],
        wrt: Collection[str],
        kept: Sequence[torch.Tensor | None],
        overwrite: bool,
    ) -> dict[str, torch.Tensor]:
        """Return {name: gradient} of the six named in `wrt`, for upstream gradients [N] per field
        and forward's saved values; empty without an upstream gradient or a token.

        One GEMM for each model's logits that forward did not keep, and for each gradient; the
        reference's logits only if an upstream gradient needs them. overwrite: gradients may
        overwrite kept logits.
        """
        self.reuse(kept, overwrite)
        saved = self.taken(saved)
        upstream = {name: self.taken(value) for name, value in upstream.items()}
        return self.gradients(
            upstream.keys(),
            wrt,
            lambda rows, args, *grads: self.engine.backward(
                args, saved[rows], rows_of_each(upstream, rows), *grads
            ),
        )

    def forward_and_backward(
        self, weights: torch.Tensor, wrt: Collection[str]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return kl and the gradients of Σ weights·kl, both from one GEMM for a chunk's logits."""
        weights = self.taken(weights)
        kl, saved = torch.empty_like(weights), weights.new_empty(len(weights), SAVED)

        def steps(rows: slice, args: RowArgs, *grads: torch.Tensor | None) -> Iterator[None]:
            yield from self.engine.steps(args, {"kl": kl[rows]}, saved[rows])
            self.engine.backward(args, saved[rows], {"kl": weights[rows]}, *grads)

        def at_once(rows: slice, args: RowArgs, *grads: torch.Tensor | None) -> None:
            self.engine.kl_and_gradients(args, kl[rows], saved[rows], weights[rows], *grads)

        gradients = self.gradients(("kl",), wrt, steps if self.args.cut.group else at_once)
        return self.of_all({"kl": kl})["kl"], gradients

    def reuse(self, kept: Sequence[torch.Tensor | None], overwrite: bool) -> None:
        """Use the logits that forward kept, None for a head without them; overwrite: as in
        backward.
        """
        for head, logits in zip(self.all, kept, strict=False):
            if logits is not None:
                head.keep(logits, filled=True, free=overwrite)

    def taken(self, values: PerRow) -> PerRow:
        """Return the rows [N, …] of the tokens computed; None as it is."""
        return values if self.index is None or values is None else values[self.index]

    def of_all(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return results of the tokens computed as results of all tokens, 0 for the others."""
        if self.index is None:
            return values
        return {
            name: value.new_zeros(self.tokens, *value.shape[1:]).index_put_((self.index,), value)
            for name, value in values.items()
        }

    def gradients(
        self, fields: Collection[str], wrt: Collection[str], engine: OfChunk
    ) -> dict[str, torch.Tensor]:
        """Return the gradients named in `wrt`, for upstream gradients of `fields`."""
        hidden: dict[str, torch.Tensor] = {}
        sums: dict[str, Sum] = {}
        models = zip(("", "ref_"), self.all, (POLICY_FIELDS, REFERENCE_FIELDS), strict=False)
        for prefix, head, own_fields in models:
            if not head.trains or set(own_fields).isdisjoint(fields):
                continue
            weight = "weight" if self.shared else f"{prefix}weight"
            if f"{prefix}hidden" in wrt:
                head.grad_hidden = torch.empty_like(
                    head.hidden, memory_format=torch.contiguous_format
                )
                hidden[f"{prefix}hidden"] = head.grad_hidden
            if weight in wrt:
                head.grad_weight = sums.setdefault(weight, Sum(head.weight))
                head.grad_weight.heads += 1
            if head.bias is not None and f"{prefix}bias" in wrt:
                head.grad_bias = sums[f"{prefix}bias"] = Sum(head.bias)
            head.learns = not (
                head.grad_hidden is None and head.grad_weight is None and head.grad_bias is None
            )
        heads = self.all[: 1 if set(REFERENCE_FIELDS).isdisjoint(fields) else 2]
        for head in heads:
            reads_again = "ref_kl" in fields or self.args.divergence.kind == "jeffreys"
            head.settle(reads_again and self.all[0 if self.given_first else -1].learns)
        chunk, window = plan(self.all, self.chunk_size, heads, self.args.cut.width)
        for total in sums.values():
            if total.spared_bytes and window >= len(self.all[0].hidden):
                # Let the only GEMM round to the gradient's dtype.
                total.dtype = total.like.dtype
        self._compute(heads, (chunk, window), engine)
        return self.of_all(hidden) | {
            name: each.total for name, each in sums.items() if each.total is not None
        }

    def _compute(
        self, heads: Sequence[ChunkedHead], lengths: tuple[int, int], engine: OfChunk
    ) -> None:
        """Call engine(rows, their arguments, memory for gradients to p and to q) for each chunk.

        lengths: tokens per chunk and per window. If the engine returns an iterator, it pauses while
        a collective runs: its first one while the next chunk's GEMMs run.
        """
        (chunk, window), hidden = lengths, self.all[0].hidden
        if self.args.cut.group and not len(hidden):  # ranks with tokens would wait
            _collectives.all_gather([hidden], self.args.cut.group, self.args.cut.ranks)
        waiting: Iterator[None] = iter(())
        learns = self.args.cut.group and any([head.learns for head in heads])
        overlaps = self.args.cut.group and chunk < (window if learns else len(hidden))
        # Disable the caller's autocast: the dtypes here are already chosen.
        with torch.autocast(hidden.device.type, enabled=False):
            for head in heads:
                head.allocate(chunk, window, 2 if overlaps else 1)
            for start in range(0, len(hidden), window):
                tokens = slice(start, min(start + window, len(hidden)))
                for head in heads:
                    head.open(tokens, self.args.mask)
                for first in range(start, tokens.stop, chunk):
                    rows, q, grad_q = slice(first, min(first + chunk, tokens.stop)), None, None
                    p, grad_p = heads[0].logits_and_gradient(rows)
                    if len(heads) > 1:
                        q, grad_q = heads[1].logits_and_gradient(rows)
                    if self.given_first and q is not None:
                        p, q, grad_p, grad_q = q, p, grad_q, grad_p
                    started = engine(rows, self.args.at(rows, p, q), grad_p, grad_q)
                    del p, q, grad_p, grad_q
                    if started is not None:
                        next(waiting, None)  # merge the previous chunk's states
                        next(started, None)
                        deque(waiting, maxlen=0)  # run to its end
                        waiting = started
                if learns or tokens.stop == len(hidden):
                    deque(waiting, maxlen=0)  # run to its end
                if tokens.stop == len(hidden):
                    # Free the buffers: a GEMM's result may use their memory.
                    for head in heads:
                        head.logits = None
                for head in heads:
                    head.close(tokens)
