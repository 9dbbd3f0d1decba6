"""Chunks of tokens: their logits by a matrix product into a reused buffer, or one that is kept
until backward, the row functions on them in place,
and the products back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch

from .. import _checks
from . import engine, gemm
from .fields import SAVED, Scaling, result_dtype
from .row_blocks import rows_of, rows_of_each

# Tokens of one product: enough for a GPU's tiles to come out even, few enough that two buffers are
# small beside a weight.
LARGEST_CHUNK = 1024
# What the buffers of logits may take without a word from the user, in bytes: never from free
# memory, which would make results depend on it.
WORKSPACE = {"cpu": 1 << 27}
WORKSPACE_ON_A_GPU = 1 << 30
# Row strides are whole 128-byte lines, whatever V is: matrix units and row kernels read aligned
# rows.
ROW_ELEMENTS = 64
# A sum of fewer bytes stays in float32: cuBLAS may cut a product with so small a result along the
# tokens, and add the parts up in 16 bits.
SMALL_SUM = 1 << 26
# Chunks are cut in whole tiles of a matrix product.
TILE = 128
POLICY_FIELDS = ("logprob", "entropy", "kl", "ref_kl")
REFERENCE_FIELDS = ("ref_logprob", "kl", "ref_kl")
Six = tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
]
T = TypeVar("T")


class PerToken(NamedTuple):
    """Per-token vectors, [N] contiguous or None, and the scaling of the raw logits."""

    tokens: torch.Tensor | None
    mask: torch.Tensor | None
    temperature: float | torch.Tensor
    scaling: Scaling

    def part(
        self, rows: slice
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, float | torch.Tensor]:
        """(tokens, mask, temperature) of some tokens."""
        return rows_of(self.tokens, rows), rows_of(self.mask, rows), rows_of(self.temperature, rows)

    def scaling_of(self, rows: slice | torch.Tensor) -> Scaling:
        """The scaling of some tokens."""
        return self.scaling._replace(ratio=rows_of(self.scaling.ratio, rows))

    def counted(self, index: torch.Tensor) -> PerToken:
        """The same for the tokens that count, all of which do."""
        return PerToken(
            rows_of(self.tokens, index),
            None,
            rows_of(self.temperature, index),
            self.scaling_of(index),
        )


class Sum:
    """A gradient that is summed over tokens, in float32 (float64 for float64), and needs no zeros
    to start from.
    """

    def __init__(self, like: torch.Tensor) -> None:
        self._like, self.dtype = like, result_dtype(like)
        self._total: torch.Tensor | None = None

    @property
    def extra_bytes(self) -> int:
        """Bytes that are not returned: a sum in a wider type than the gradient."""
        return 0 if self.dtype == self._like.dtype else self._like.numel() * self.dtype.itemsize

    @property
    def returned_bytes(self) -> int:
        """Bytes of the gradient in its own type."""
        return self._like.numel() * self._like.dtype.itemsize

    @property
    def spared_bytes(self) -> int:
        """Those that one product for all tokens would do without, because it can round its result
        to the gradient's type itself.

        float16 gradients leave in float32, to be scaled first; a small sum is not worth it.
        """
        return (
            self.extra_bytes
            if self._like.dtype == torch.bfloat16 and self.extra_bytes >= SMALL_SUM
            else 0
        )

    def take_one_product(self) -> None:
        """There will be only one product: it rounds to the gradient's type, if that spares
        anything.
        """
        if self.spared_bytes:
            self.dtype = self._like.dtype

    def add(self, product: Callable[..., None], *operands: torch.Tensor) -> None:
        """Add what product(total, *operands, first=whether total holds nothing yet) adds."""
        first = self._total is None
        if self._total is None:
            self._total = torch.empty(self._like.shape, dtype=self.dtype, device=self._like.device)
        product(self._total, *operands, first=first)

    def result(self) -> torch.Tensor:
        """The sum; zeros if there was nothing to add."""
        return (
            torch.zeros(self._like.shape, dtype=self.dtype, device=self._like.device)
            if self._total is None
            else self._total
        )


class Head:
    """One model's lm_head over the tokens that take part, and the gradients that it gathers: None
    where nobody asked.

    hidden [N, H], weight [V, H], bias [V] or None; grad_hidden is [N, H] in hidden's type; the sum
    for weight may be that of another Head too.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        logits_dtype: torch.dtype,
    ) -> None:
        self.hidden, self.weight, self.bias, self.logits_dtype = hidden, weight, bias, logits_dtype
        # The row kernels read a far row again for the gradient of KL(Q‖P) to Q, when some of it may
        # be written already.
        self.reads_again = False
        # Logits [N, V] from forward, and whether gradients may be written over them.
        self.kept: torch.Tensor | None = None
        self.kept_is_free = False
        self.grad_hidden: torch.Tensor | None = None
        self.grad_weight: Sum | None = None
        self.grad_bias: Sum | None = None

    @property
    def learns(self) -> bool:
        """Whether any gradient is asked for."""
        return not (
            self.grad_hidden is None and self.grad_weight is None and self.grad_bias is None
        )

    @property
    def in_place(self) -> bool:
        """Whether gradients of logits can take the place of the logits."""
        return self.logits_dtype == self.hidden.dtype and not self.reads_again

    @property
    def gives_way(self) -> bool:
        """Whether gradients of logits end up in place of kept ones."""
        return (
            self.kept is not None and self.kept_is_free and self.logits_dtype == self.hidden.dtype
        )

    @property
    def buffered(self) -> bool:
        """Whether a chunk of logits lies in a buffer that only holds logits."""
        if self.kept is None:
            return not (self.learns and self.in_place)
        return self.learns and self.gives_way and self.reads_again

    def inputs(self, rows: slice, mask: torch.Tensor | None) -> torch.Tensor:
        """The hidden states [n, H] of some tokens; zeros where masked, since 0·NaN in a product
        would spread.
        """
        hidden = self.hidden[rows]
        return hidden if mask is None else torch.where(mask[rows, None], hidden, 0)

    def buffer(self, tokens: int, dtype: torch.dtype) -> torch.Tensor:
        """Room for [tokens, V] in rows of whole lines."""
        vocabulary = self.weight.shape[0]
        return torch.empty(tokens, row_width(vocabulary), dtype=dtype, device=self.hidden.device)[
            :, :vocabulary
        ]

    def make_logits(self, inputs: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Fill [n, V] with the logits of some tokens."""
        gemm.logits_into(logits, inputs, self.weight, self.bias)
        return logits

    def logits_again(
        self,
        inputs: torch.Tensor,
        rows: slice,
        buffer: torch.Tensor | None,
        grad: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the logits of some tokens: in the buffer's first rows; without one the kept ones,
        or made in their gradients' place.
        """
        place = grad if buffer is None else buffer[: inputs.shape[0]]
        if self.kept is None:
            assert place is not None
            return self.make_logits(inputs, place)
        return self.kept[rows] if buffer is None or place is None else place.copy_(self.kept[rows])

    def gather(self, grad_logits: torch.Tensor, inputs: torch.Tensor, rows: slice) -> None:
        """The products back, from the gradients of some tokens' logits."""
        if self.grad_hidden is not None:
            torch.mm(grad_logits, self.weight, out=self.grad_hidden[rows])
        if self.grad_weight is not None:
            self.grad_weight.add(gemm.add_weight_gradient, grad_logits, inputs)
        if self.grad_bias is not None:
            self.grad_bias.add(gemm.add_bias_gradient, grad_logits)


def row_width(vocabulary: int) -> int:
    """Return the entries of a row of whole lines."""
    return -(-vocabulary // ROW_ELEMENTS) * ROW_ELEMENTS


class Plan(NamedTuple):
    """chunk: tokens of one product that gives logits; window: tokens whose gradients of logits wait
    for one product back.
    """

    chunk: int
    window: int


def plan(
    tokens: int, heads: list[Head], chunk_size: int | None, taking_part: list[Head] | None = None
) -> Plan:
    """How many tokens at a time: from the shapes, the types and a fixed bound on memory.

    The chunk depends on all heads, also where some of them take no part in backward: it computes
    the logits of forward again, with the same products. All tokens are one window where that takes
    no more at its peak than a part of them and the sums that one product does without, and where
    their gradients take the place of kept logits.
    """
    vocabulary = heads[0].weight.shape[0]
    per_token = sum(head.logits_dtype.itemsize for head in heads)
    workspace = WORKSPACE.get(heads[0].hidden.device.type, WORKSPACE_ON_A_GPU)
    taking_part = heads if taking_part is None else taking_part
    # Every product into a weight's sum reads and writes the whole sum: few and large ones.
    sums = _weight_sums(taking_part)
    if chunk_size is not None:
        chunk = max(1, min(chunk_size, LARGEST_CHUNK, tokens))
        return Plan(chunk, max(chunk, min(chunk_size, tokens) // chunk * chunk) if sums else chunk)
    # Half of the room for chunks of logits; with a weight's sum, all that they leave for the
    # window.
    chunk = min(workspace // 2 // (vocabulary * per_token), LARGEST_CHUNK)
    chunk = _cut(tokens, chunk // TILE * TILE or max(1, chunk), TILE)
    waiting = [head for head in taking_part if head.learns and not head.gives_way]
    if not waiting:
        return Plan(chunk, max(chunk, tokens))
    if not sums:
        return Plan(chunk, chunk)
    extra, returned = (
        sum(getattr(weight, name) for weight in sums) for name in ("extra_bytes", "returned_bytes")
    )
    chunks = (
        chunk
        * vocabulary
        * sum(head.logits_dtype.itemsize for head in taking_part if head.buffered)
    )
    gradients = vocabulary * sum(head.hidden.dtype.itemsize for head in waiting)
    window = (max(workspace, extra // 2) - chunks) // gradients
    window = _cut(tokens, max(chunk, window // chunk * chunk), chunk)
    # Sums are rounded after the last window, one after the other; the results of one product come
    # beside its window.
    several = extra + max(
        window * gradients + chunks, max(weight.returned_bytes for weight in sums)
    )
    one = tokens * gradients + max(chunks, returned)
    spared = all(heads_of == 1 and weight.spared_bytes for weight, heads_of in sums.items())
    return Plan(chunk, max(tokens, window) if spared and one <= several else window)


def _weight_sums(heads: list[Head]) -> Counter[Sum]:
    """The sums for weights, and how many of the heads add to each."""
    return Counter(head.grad_weight for head in heads if head.grad_weight is not None)


def _cut(tokens: int, largest: int, unit: int) -> int:
    """The length of the fewest pieces of at most `largest` tokens, nearly equal in whole units: no
    small piece is left at the end.
    """
    if tokens <= largest:
        return max(1, tokens)
    even = -(-tokens // -(-tokens // largest))
    return min(largest, -(-even // unit) * unit)


def parts(start: int, stop: int, step: int) -> Iterator[slice]:
    """start … stop in steps."""
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


class Heads:
    """One or two lm_heads over the same tokens, from the six tensors hidden, weight, bias,
    ref_hidden, ref_weight, ref_bias.

    The reference backend leaves masked tokens out; elsewhere they take part as zeros, because
    counting them would wait for the device.
    """

    def __init__(
        self,
        six: Six,
        logits_dtype: torch.dtype,
        backend: str,
        chunk_size: int | None,
        per_token: PerToken,
    ) -> None:
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias = six
        self.tokens = hidden.shape[:-1].numel()
        self.backend, self.chunk_size, self.per_token, self.shared = (
            backend,
            chunk_size,
            per_token,
            ref_weight is None,
        )
        # The tokens that take part; None: all.
        self.index = (
            per_token.mask.nonzero()[:, 0]
            if backend == "reference" and per_token.mask is not None
            else None
        )
        if self.index is not None:
            self.per_token = per_token.counted(self.index)
        if backend == "reference":
            self._check_temperatures()
        self.policy, self.reference = Head(self._counted(hidden), weight, bias, logits_dtype), None
        if ref_hidden is not None:
            self.reference = Head(
                self._counted(ref_hidden),
                weight if ref_weight is None else ref_weight,
                ref_bias,
                logits_dtype,
            )
        self.all = [self.policy] if self.reference is None else [self.policy, self.reference]
        # The caller's autocast is for the caller's products: the types of these are settled.
        self.own_types = torch.autocast(hidden.device.type, enabled=False)

    def forward(
        self,
        outputs: dict[str, torch.Tensor],
        saved: torch.Tensor,
        keep: Sequence[torch.Tensor | None] = (),
    ) -> None:
        """Fill outputs ([N] per field) and saved [N, 10]: one product for each head.

        keep: room for all logits of each head, [..., at least V] in rows of whole lines; none: a
        chunk of them at a time.
        """
        self._keep(keep)
        here, saved_here = self._room(outputs), self._room({"": saved})[""]
        chunk = plan(len(saved_here), self.all, self.chunk_size).chunk
        with self.own_types:
            places = [
                head.buffer(chunk, head.logits_dtype) if head.kept is None else head.kept
                for head in self.all
            ]
            for rows in parts(0, len(saved_here), chunk):
                logits = [
                    head.make_logits(
                        head.inputs(rows, self.per_token.mask),
                        place[: rows.stop - rows.start] if head.kept is None else place[rows],
                    )
                    for head, place in zip(self.all, places, strict=True)
                ]
                p, q = _both(logits)
                engine.forward(
                    self.backend,
                    p,
                    q,
                    *self.per_token.part(rows),
                    rows_of_each(here, rows),
                    saved_here[rows],
                    self.per_token.scaling_of(rows),
                )
        self._put_back({**outputs, "": saved}, {**here, "": saved_here})

    def backward(
        self,
        saved: torch.Tensor,
        upstream: dict[str, torch.Tensor],
        wrt: tuple[str, ...],
        kept: Sequence[torch.Tensor | None] = (),
        overwrite: bool = False,
    ) -> dict[str, torch.Tensor]:
        """{name: gradient} of the six named in `wrt`, for upstream gradients [N] per field and
        forward's saved values.

        One product for each logits that forward did not keep and each gradient; the reference's
        logits only if an upstream gradient needs them. overwrite: gradients of logits may take the
        place of kept ones.
        """
        self._keep(kept, overwrite)
        taking_part = [
            head
            for head in self.all
            if head is self.policy or set(upstream) & set(REFERENCE_FIELDS)
        ]
        return self._backward(taking_part, self._take(saved), upstream, wrt, {})

    def forward_and_backward(
        self,
        outputs: dict[str, torch.Tensor],
        upstream: dict[str, torch.Tensor],
        wrt: tuple[str, ...],
    ) -> dict[str, torch.Tensor]:
        """Both at once, while a chunk's logits are there: fill outputs and return the gradients."""
        here = self._room(outputs)
        saved = torch.empty(
            self.policy.hidden.shape[0],
            SAVED,
            dtype=result_dtype(self.policy.hidden),
            device=self.policy.hidden.device,
        )
        gradients = self._backward(self.all, saved, upstream, wrt, here)
        self._put_back(outputs, here)
        return gradients

    def _keep(self, kept: Sequence[torch.Tensor | None], free: bool = False) -> None:
        """Give each head the logits of the tokens that take part, which come first, out of [..., at
        least V].
        """
        for head, value in zip(self.all, kept, strict=False):
            if value is not None:
                # A saved-tensor hook may return another layout. Written behind autograd's back:
                # whoever overwrites remembers it.
                rows = value.data.contiguous().view(-1, value.shape[-1])
                head.kept, head.kept_is_free = (
                    rows[: len(head.hidden), : head.weight.shape[0]],
                    free,
                )

    def _check_temperatures(self) -> None:
        """Refuse temperatures out of range where looking costs no synchronisation; the rows look at
        one model's alone.
        """
        temperature, ratio = self.per_token.temperature, self.per_token.scaling.ratio
        if isinstance(ratio, torch.Tensor):
            if isinstance(temperature, torch.Tensor):
                _checks.temperatures_positive(temperature)
            _checks.ratios_finite(ratio)

    def _counted(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._take(hidden.reshape(-1, hidden.shape[-1]))

    def _take(self, value: torch.Tensor) -> torch.Tensor:
        """What belongs to the tokens that take part."""
        return value if self.index is None else value[self.index]

    def _room(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Room for results of the tokens that take part: the results' own, if those are all."""
        return (
            values
            if self.index is None
            else {
                name: value.new_empty(len(self.index), *value.shape[1:])
                for name, value in values.items()
            }
        )

    def _put_back(self, values: dict[str, torch.Tensor], here: dict[str, torch.Tensor]) -> None:
        """The results of the tokens that take part in their places, and zeros elsewhere."""
        if self.index is not None:
            for name, value in values.items():
                value.zero_()[self.index] = here[name]

    def _backward(
        self,
        taking_part: list[Head],
        saved: torch.Tensor,
        upstream: dict[str, torch.Tensor],
        wrt: tuple[str, ...],
        outputs: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        gathered = self._want(wrt, upstream)
        for head in self.all:
            head.reads_again = (
                "ref_kl" in upstream and self.reference is not None and self.reference.learns
            )
        with self.own_types:
            self._backward_chunks(
                taking_part,
                saved,
                {name: self._take(value) for name, value in upstream.items()},
                outputs,
            )
        for head in self.all:
            head.grad_hidden = head.grad_weight = head.grad_bias = None
        return {
            name: value.result() if isinstance(value, Sum) else self._all_tokens(value)
            for name, value in gathered.items()
        }

    def _all_tokens(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of all tokens' hidden states: zeros for those that took no part."""
        if self.index is None:
            return gradient
        full = gradient.new_zeros(self.tokens, gradient.shape[1])
        full[self.index] = gradient
        return full

    def _want(
        self, wrt: tuple[str, ...], upstream: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor | Sum]:
        """Prepare the heads to gather the gradients named in `wrt`: {name: where it is gathered}."""
        gathered: dict[str, torch.Tensor | Sum] = {}
        for prefix, head, fields in (
            ("", self.policy, POLICY_FIELDS),
            ("ref_", self.reference, REFERENCE_FIELDS),
        ):
            if head is None or not set(upstream) & set(fields):
                continue
            if f"{prefix}hidden" in wrt:
                gathered[f"{prefix}hidden"] = head.grad_hidden = torch.empty_like(
                    head.hidden, memory_format=torch.contiguous_format
                )
            weight = "weight" if self.shared else f"{prefix}weight"
            if weight in wrt:
                found = gathered.get(weight)
                gathered[weight] = head.grad_weight = (
                    found if isinstance(found, Sum) else Sum(head.weight)
                )
            if head.bias is not None and f"{prefix}bias" in wrt:
                gathered[f"{prefix}bias"] = head.grad_bias = Sum(head.bias)
        return gathered

    def _backward_chunks(
        self,
        heads: list[Head],
        saved: torch.Tensor,
        upstream: dict[str, torch.Tensor],
        outputs: dict[str, torch.Tensor],
    ) -> None:
        chosen = plan(len(saved), self.all, self.chunk_size, heads)
        for weight, heads_of in _weight_sums(heads).items():
            if heads_of == 1 and chosen.window >= len(saved):
                weight.take_one_product()
        # Gradients of the logits of a window wait in the first, or in place of kept logits.
        waiting = [
            head.buffer(chosen.window, head.hidden.dtype)
            if head.learns and not head.gives_way
            else None
            for head in heads
        ]
        buffers = [
            head.buffer(chosen.chunk, head.logits_dtype) if head.buffered else None
            for head in heads
        ]
        for window in parts(0, len(saved), chosen.window):
            inputs = [head.inputs(window, self.per_token.mask) for head in heads]
            sides = [
                head.kept[window]
                if head.kept is not None and head.learns and head.gives_way
                else side
                for head, side in zip(heads, waiting, strict=True)
            ]
            for rows in parts(window.start, window.stop, chosen.chunk):
                here = slice(rows.start - window.start, rows.stop - window.start)
                grads = [None if side is None else side[here] for side in sides]
                logits = [
                    head.logits_again(states[here], rows, buffer, grad)
                    for head, states, buffer, grad in zip(
                        heads, inputs, buffers, grads, strict=True
                    )
                ]
                (p, q), (grad_p, grad_q) = _both(logits), _both(grads)
                per_token, scaling = self.per_token.part(rows), self.per_token.scaling_of(rows)
                if outputs:
                    engine.kl_and_gradients(
                        self.backend,
                        p,
                        q,
                        *per_token,
                        outputs["kl"][rows],
                        saved[rows],
                        upstream["kl"][rows],
                        grad_p,
                        grad_q,
                        scaling,
                    )
                else:
                    engine.backward(
                        self.backend,
                        p,
                        q,
                        *per_token,
                        saved[rows],
                        rows_of_each(upstream, rows),
                        grad_p,
                        grad_q,
                        scaling,
                    )
            if window.stop == len(saved):
                # Nothing more is put into them, and a product's result may take their place.
                del buffers[:], logits[:], p, q
            for head, states, side in zip(heads, inputs, sides, strict=True):
                if side is not None:
                    head.gather(side[: window.stop - window.start], states, window)
            del inputs, states  # copies under a mask: not beside those of the next window


def _both(values: list[T]) -> tuple[T, T | None]:
    """The policy's and the reference's, which may be missing."""
    return values[0], values[1] if len(values) > 1 else None
