"""Computes logits from hidden states a chunk of tokens at a time: one GEMM for the logits of each
model, then the engine, then the GEMMs of backward.

A chunk's logits lie in a reused buffer, or are a part of all logits if forward kept them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .. import _checks
from . import gemm
from .chunks import Sum, plan, row_width, weight_sums
from .engine import Engine
from .fields import (
    POLICY_FIELDS,
    REFERENCE_FIELDS,
    SAVED,
    RowArgs,
    rows_of_each,
)


class Six(NamedTuple):
    """The tensors of both heads; beside ref_hidden, ref_weight None stands for weight."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    ref_hidden: torch.Tensor | None
    ref_weight: torch.Tensor | None
    ref_bias: torch.Tensor | None


class ChunkedHead:
    """One model's lm_head over the tokens computed, with its buffers and the sums of its gradients:
    None if not requested.

    hidden [N, H], weight [V, H], bias [V] or None; grad_hidden is [N, H] in hidden's type; two
    heads that share a weight share the sum of its gradient.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        logits_dtype: torch.dtype,
    ) -> None:
        self.hidden, self.weight, self.bias, self.logits_dtype = hidden, weight, bias, logits_dtype
        # Logits [N, V] that forward kept.
        self.kept: torch.Tensor | None = None
        # Whether gradients may overwrite them.
        self.kept_is_free = False
        # Whether a gradient is requested.
        self.learns = False
        self.grad_hidden: torch.Tensor | None = None
        self.grad_weight: Sum | None = None
        self.grad_bias: Sum | None = None
        # Whether gradients overwrite kept logits.
        self.overwrites = False
        # Whether a chunk's logits have a buffer of their own; else their gradients overwrite them.
        self.buffered = False
        # Buffer of a chunk's logits in backward.
        self.logits: torch.Tensor | None = None
        # Buffer of a window's gradients of logits, those gradients, and its hidden states.
        self._window: torch.Tensor | None = None
        self._grads: torch.Tensor | None = None
        self._states = hidden
        self._start = 0

    def keep(self, logits: torch.Tensor, free: bool) -> None:
        """Use logits [..., at least V]; those of the tokens computed come first."""
        # A saved-tensor hook may return a non-contiguous tensor. `.data`: backward overwrites them
        # unseen by autograd (linear_op records it).
        rows = logits.data.contiguous().view(-1, logits.shape[-1])
        self.kept, self.kept_is_free = rows[: len(self.hidden), : self.weight.shape[0]], free

    def settle(self, reads_again: bool) -> None:
        """Decide which buffers logits and gradients use.

        reads_again: backward re-reads a fallback row after it may have written part of its
        gradient.
        """
        same_type = self.logits_dtype == self.hidden.dtype
        self.overwrites = self.learns and self.kept_is_free and same_type
        if self.kept is None:
            self.buffered = not (self.learns and same_type and not reads_again)
        else:
            self.buffered = self.overwrites and reads_again

    def allocate(self, chunk: int, window: int) -> None:
        """Allocate the buffers of backward."""
        if self.learns and not self.overwrites:
            self._window = self.buffer(window, self.hidden.dtype)
        if self.buffered:
            self.logits = self.buffer(chunk, self.logits_dtype)

    def buffer(self, tokens: int, dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialised [tokens, V] whose rows are padded to 128-byte lines."""
        vocabulary = self.weight.shape[0]
        padded = torch.empty(tokens, row_width(vocabulary), dtype=dtype, device=self.hidden.device)
        return padded[:, :vocabulary]

    def open(self, window: slice, mask: torch.Tensor | None) -> None:
        """Begin a window of backward: tokens whose gradients of logits are kept until one GEMM."""
        self._states, self._start = self.hidden[window], window.start
        if mask is not None:
            self._states = _without(self._states, mask[window])
        if self.overwrites:
            assert self.kept is not None
            self._grads = self.kept[window]
        elif self._window is not None:
            self._grads = self._window[: window.stop - window.start]

    def logits_and_gradient(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the logits of a chunk of the window, and the memory for their gradients."""
        in_window = slice(rows.start - self._start, rows.stop - self._start)
        grads = None if self._grads is None else self._grads[in_window]
        if self.kept is not None:
            kept = self.kept[rows]
            if self.logits is not None:
                kept = self.logits[: len(kept)].copy_(kept)
            return kept, grads
        logits = grads if self.logits is None else self.logits[: rows.stop - rows.start]
        assert logits is not None
        gemm.logits_into(logits, self._states[in_window], self.weight, self.bias)
        return logits, grads

    def close(self, window: slice) -> None:
        """Add the window's part of the gradients: a GEMM each for hidden states and weight."""
        grads, states, self._states = self._grads, self._states, self.hidden
        if grads is None:
            return
        if self.grad_hidden is not None:
            torch.mm(grads, self.weight, out=self.grad_hidden[window])
        if self.grad_weight is not None:
            self.grad_weight.add(gemm.add_weight_gradient, grads, states)
        if self.grad_bias is not None:
            self.grad_bias.add(gemm.add_bias_gradient, grads)


def _without(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return hidden states [n, H] with zeros where masked: 0·NaN in a GEMM would spread."""
    return torch.where(mask[:, None], states, 0)


class ChunkedHeads:
    """One or two lm_heads over the same tokens.

    With checks_values, masked tokens are dropped; otherwise they are computed as zeros, because
    counting them would synchronise. args: p holds the policy's hidden states.
    """

    def __init__(
        self,
        six: Six,
        args: RowArgs,
        engine: Engine,
        logits_dtype: torch.dtype,
        chunk_size: int | None,
    ) -> None:
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias = six
        self.tokens = hidden.shape[:-1].numel()
        self.engine, self.chunk_size, self.shared = engine, chunk_size, ref_weight is None
        self.args = args
        # The tokens computed; None: all.
        self.index: torch.Tensor | None = None
        if engine.checks_values:
            if args.mask is not None:
                self.index = args.mask.nonzero()[:, 0]
                self.args = args.at(self.index, args.p, None)._replace(mask=None)
            self._check_temperatures()
        self.policy = ChunkedHead(self._computed(hidden), weight, bias, logits_dtype)
        self.all, self.reference = [self.policy], None
        if ref_hidden is not None:
            ref_weight = weight if ref_weight is None else ref_weight
            self.reference = ChunkedHead(
                self._computed(ref_hidden), ref_weight, ref_bias, logits_dtype
            )
            self.all.append(self.reference)
        # Disable the caller's autocast: the dtypes here are already chosen.
        self.no_autocast = torch.autocast(hidden.device.type, enabled=False)

    def forward(
        self,
        outputs: dict[str, torch.Tensor],
        saved: torch.Tensor,
        keep: Sequence[torch.Tensor | None] = (),
    ) -> None:
        """Fill outputs ([N] per field) and saved [N, SAVED]: one GEMM for each head.

        keep: memory for all logits of each head, [..., at least V] in padded rows; none: only a
        chunk of logits exists at a time.
        """
        self._keep(keep)
        computed, computed_saved = outputs, saved
        if self.index is not None:
            computed = self._results({**outputs, "saved": saved})
            computed_saved = computed.pop("saved")
        tokens, mask = len(computed_saved), self.args.mask
        chunk = plan(tokens, self.all, self.chunk_size).chunk
        with self.no_autocast:
            buffers = [
                head.buffer(chunk, head.logits_dtype) if head.kept is None else head.kept
                for head in self.all
            ]
            for start in range(0, tokens, chunk):
                rows, logits = slice(start, min(start + chunk, tokens)), []
                for head, buffer in zip(self.all, buffers, strict=True):
                    part = buffer[: rows.stop - start] if head.kept is None else buffer[rows]
                    states = head.hidden[rows]
                    if mask is not None:
                        states = _without(states, mask[rows])
                    gemm.logits_into(part, states, head.weight, head.bias)
                    logits.append(part)
                args = self.args.at(rows, logits[0], logits[1] if self.reference else None)
                self.engine.forward(args, rows_of_each(computed, rows), computed_saved[rows])
        if self.index is not None:
            self._scatter(outputs, computed)
            saved.zero_()[self.index] = computed_saved

    def backward(
        self,
        saved: torch.Tensor,
        upstream: dict[str, torch.Tensor],
        wrt: tuple[str, ...],
        kept: Sequence[torch.Tensor | None] = (),
        overwrite: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Return {name: gradient} of the six named in `wrt`, for upstream gradients [N] per field
        and forward's saved values.

        One GEMM for each logits that forward did not keep and each gradient; the reference's logits
        only if an upstream gradient needs them. overwrite: gradients may overwrite kept logits.
        """
        self._keep(kept, overwrite)
        saved = saved if self.index is None else saved[self.index]
        return self._backward(saved, upstream, wrt, {})

    def forward_and_backward(
        self,
        outputs: dict[str, torch.Tensor],
        upstream: dict[str, torch.Tensor],
        wrt: tuple[str, ...],
    ) -> dict[str, torch.Tensor]:
        """Fill kl and return the gradients, both from one GEMM for a chunk's logits."""
        computed = outputs if self.index is None else self._results(outputs)
        saved = computed["kl"].new_empty(self.policy.hidden.shape[0], SAVED)
        gradients = self._backward(saved, upstream, wrt, computed)
        if self.index is not None:
            self._scatter(outputs, computed)
        return gradients

    def _keep(self, kept: Sequence[torch.Tensor | None], free: bool = False) -> None:
        for head, value in zip(self.all, kept, strict=False):
            if value is not None:
                head.keep(value, free)

    def _check_temperatures(self) -> None:
        """Refuse ratios out of range, which the engine does not check; before them temperatures,
        which make ratios NaN.
        """
        temperature, ratio = self.args.temperature, self.args.scaling.ratio
        if isinstance(ratio, torch.Tensor):
            if isinstance(temperature, torch.Tensor):
                _checks.temperatures_positive(temperature)
            _checks.ratios_finite(ratio)

    def _computed(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        return rows if self.index is None else rows[self.index]

    def _results(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return memory for results of the tokens that count, where some do not."""
        assert self.index is not None
        count = len(self.index)
        return {name: value.new_empty(count, *value.shape[1:]) for name, value in values.items()}

    def _scatter(self, values: dict[str, torch.Tensor], computed: dict[str, torch.Tensor]) -> None:
        """Copy the results of the tokens computed into `values`, with zeros for the others."""
        for name, value in values.items():
            value.zero_()[self.index] = computed[name]

    def _backward(
        self,
        saved: torch.Tensor,
        upstream: dict[str, torch.Tensor],
        wrt: tuple[str, ...],
        outputs: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        sums = self._allocate_gradients(wrt, upstream)
        reads_again = "ref_kl" in upstream and self.reference is not None and self.reference.learns
        for head in self.all:
            head.settle(reads_again)
        if self.index is not None:
            upstream = rows_of_each(upstream, self.index)
        heads = self.all if not upstream.keys().isdisjoint(REFERENCE_FIELDS) else [self.policy]
        with self.no_autocast:
            self._backward_chunks(heads, saved, upstream, outputs)
        results = {}
        for name in list(sums):
            value = sums.pop(name)
            if isinstance(value, Sum):
                value = value.result()
            elif self.index is not None:
                # Masked tokens have gradient 0.
                all_tokens = value.new_zeros(self.tokens, value.shape[1])
                all_tokens[self.index] = value
                value = all_tokens
            results[name] = value
        for head in self.all:
            head.grad_hidden = head.grad_weight = head.grad_bias = None
        return results

    def _allocate_gradients(
        self, wrt: tuple[str, ...], upstream: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor | Sum]:
        """Allocate the gradients named in `wrt`, and return them by name."""
        sums: dict[str, torch.Tensor | Sum] = {}
        for prefix, head, fields in (
            ("", self.policy, POLICY_FIELDS),
            ("ref_", self.reference, REFERENCE_FIELDS),
        ):
            if head is None or upstream.keys().isdisjoint(fields):
                continue
            if f"{prefix}hidden" in wrt:
                sums[f"{prefix}hidden"] = head.grad_hidden = torch.empty_like(
                    head.hidden, memory_format=torch.contiguous_format
                )
            weight = "weight" if self.shared else f"{prefix}weight"
            if weight in wrt:
                shared = sums.get(weight)
                head.grad_weight = shared if isinstance(shared, Sum) else Sum(head.weight)
                sums[weight] = head.grad_weight
            if head.bias is not None and f"{prefix}bias" in wrt:
                sums[f"{prefix}bias"] = head.grad_bias = Sum(head.bias)
            head.learns = not (
                head.grad_hidden is None and head.grad_weight is None and head.grad_bias is None
            )
        return sums

    def _backward_chunks(
        self,
        heads: list[ChunkedHead],
        saved: torch.Tensor,
        upstream: dict[str, torch.Tensor],
        outputs: dict[str, torch.Tensor],
    ) -> None:
        tokens, mask = len(saved), self.args.mask
        chunk, window_length = plan(tokens, self.all, self.chunk_size, heads)
        if window_length >= tokens:
            for weight, heads_of in weight_sums(heads).items():
                if heads_of == 1:
                    weight.take_one_product()
        for head in heads:
            head.allocate(chunk, window_length)
        for start in range(0, tokens, window_length):
            window = slice(start, min(start + window_length, tokens))
            for head in heads:
                head.open(window, mask)
            for first in range(start, window.stop, chunk):
                rows = slice(first, min(first + chunk, window.stop))
                p, grad_p = heads[0].logits_and_gradient(rows)
                q = grad_q = None
                if len(heads) > 1:
                    q, grad_q = heads[1].logits_and_gradient(rows)
                args = self.args.at(rows, p, q)
                if outputs:
                    self.engine.kl_and_gradients(
                        args, outputs["kl"][rows], saved[rows], upstream["kl"][rows], grad_p, grad_q
                    )
                else:
                    g = rows_of_each(upstream, rows)
                    self.engine.backward(args, saved[rows], g, grad_p, grad_q)
                del p, q, args, grad_p, grad_q
            if window.stop == tokens:
                # Free the buffers: a GEMM's result may use their memory.
                for head in heads:
                    head.logits = None
            for head in heads:
                head.close(window)
