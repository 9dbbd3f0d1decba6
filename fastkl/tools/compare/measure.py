"""The values of every token, on disk, and their figures: of the whole text and of its worst parts.

Files without a name hold tokens and values; they are mapped and not read, so that memory holds one
block, however long the text.
"""

from __future__ import annotations

import errno
import gc
import heapq
import itertools
import math
import shutil
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import IO, Any, NamedTuple

import numpy as np
import torch

import fastkl

from ..progress import progress
from .inputs import Vocabulary
from .loading import Model, head_logits
from .settings import CompareError

DIVERGENCES = ("kl_ab", "kl_ba", "jsd")
MEANS = (*DIVERGENCES, "entropy_a", "entropy_b", "logprob_a", "logprob_b")
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
TOKEN = np.dtype([("id", "<i4"), ("line", "<i4"), ("text_end", "<i8")])
# Values of a token, in nats, of the two distributions before it; one without a context has
# scored = 0.
FLOATS = (*MEANS, "top_logprob_a", "top_logprob_b")
VALUES = np.dtype(
    [("scored", "<i4"), *((name, "<f4") for name in FLOATS), ("top_a", "<i4"), ("top_b", "<i4")]
)
# Tokens whose values are in memory at a time.
BLOCK = 1 << 14
# Logits of one model in a block: about five tensors of this many float32 are alive at a time.
BLOCK_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 27}


# ---- on disk


class Document(NamedTuple):
    """A document's tokens start … end - 1, special ones in front included; `first` has a value."""

    name: str
    start: int
    first: int
    end: int


class Store:
    """Tokens of documents, their text and, once sealed, their values."""

    def __init__(self) -> None:
        self.documents: list[Document] = []
        self.count = self._text_bytes = 0
        self._files: list[IO[bytes]] = [tempfile.TemporaryFile() for _ in range(3)]

    @property
    def scored(self) -> int:
        """Count the tokens that have values once all windows are through."""
        return sum(document.end - document.first for document in self.documents)

    def append(self, ids: Sequence[int], lines: Sequence[int], texts: Sequence[str]) -> None:
        """Add tokens; their texts put together are the document."""
        content, rows = [text.encode() for text in texts], np.zeros(len(ids), TOKEN)
        rows["id"], rows["line"] = ids, lines
        rows["text_end"] = self._text_bytes + np.cumsum(list(map(len, content)), dtype=np.int64)
        self.count, self._text_bytes = self.count + len(ids), self._text_bytes + sum(map(len, content))
        for file, written in zip(self._files, (rows, b"".join(content), np.zeros(len(ids), VALUES))):
            file.write(written)

    def end_document(self, name: str, start: int, first: int) -> None:
        """Make the tokens since `start` a document, if one of them has a value."""
        if self.count > first:
            self.documents.append(Document(name, start, first, self.count))

    def seal(self) -> None:
        """Map the files: `tokens` and `values` are arrays from here on."""
        self.tokens, self._text, self.values = map(_mapped, self._files, (TOKEN, np.uint8, VALUES))

    def text(self, start: int, end: int) -> str:
        """Return the text of the tokens together."""
        ends = self.tokens["text_end"]
        return bytes(self._text[ends[start - 1] if start else 0 : ends[end - 1]]).decode()

    def blocks(
        self, start: int = 0, end: int | None = None
    ) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
        """Yield (index of the first token, rows of VALUES), block after block."""
        end = self.count if end is None else end
        for low in range(start, end, BLOCK):
            yield low, self.values[low : min(low + BLOCK, end)]

    def document_of(self, index: int) -> Document:
        """Find the document of a token."""
        return self.documents[bisect_right(self.documents, index, key=lambda each: each.start) - 1]


def _mapped(file: IO[bytes], dtype: Any) -> np.ndarray[Any, Any]:
    """Map a file as an array."""
    file.flush()
    return np.memmap(file, dtype, "r+").view(np.ndarray)  # type: ignore[call-overload]


# ---- from windows to values


def token_values(
    heads: Sequence[fastkl.Head],
    hidden: Sequence[torch.Tensor],
    tokens: torch.Tensor,
    vocabulary: Vocabulary,
) -> np.ndarray[Any, Any]:
    """Compute rows of VALUES from hidden states [n, H] of A and B and the tokens [n] after them.

    The logits are float32 for 16-bit models, too (linear_token_stats' logits_dtype=torch.float32),
    and are made once: statistics and mixture read the same block. Tokens that are not compared have
    probability 0.
    """
    device = tokens.device
    step = max(1, BLOCK_LOGITS.get(device.type, BLOCK_LOGITS["cuda"]) // vocabulary.size)
    none = torch.tensor(sorted(vocabulary.unshared), dtype=torch.long, device=device)
    blocks = []
    for low in range(0, len(tokens), step):
        logits_a, logits_b = (
            head_logits(head, states[low : low + step], vocabulary.size).index_fill_(
                1, none, -math.inf
            )
            for head, states in zip(heads, hidden, strict=True)
        )
        blocks.append(block_values(logits_a, logits_b, tokens[low : low + step]))
    values = np.concatenate(blocks)
    for letter in "ab":
        if np.isnan(values[f"logprob_{letter}"]).any():
            argument, remedy = f"MODEL_{letter.upper()}", "--dtype float32 or bfloat16"
            raise CompareError(argument, "finite logits", "NaN on this text", remedy)
    return values


def block_values(
    logits_a: torch.Tensor, logits_b: torch.Tensor, tokens: torch.Tensor
) -> np.ndarray[Any, Any]:
    """Compute rows of VALUES from logits [n, V]."""
    top_a, top_b = logits_a.argmax(-1), logits_b.argmax(-1)
    stats = fastkl.token_stats(logits_a, tokens, logits_b)
    of_b = fastkl.token_stats(logits_b, top_b)
    columns = {
        "kl_ab": stats.kl,
        "kl_ba": stats.ref_kl,
        "jsd": _jsd(logits_a, logits_b),
        "entropy_a": stats.entropy,
        "entropy_b": of_b.entropy,
        "logprob_a": stats.logprob,
        "logprob_b": stats.ref_logprob,
        "top_logprob_a": fastkl.selective_log_softmax(logits_a, top_a),
        "top_logprob_b": of_b.logprob,
        "top_a": top_a,
        "top_b": top_b,
    }
    # One copy from the device; float64 holds a token's id as well.
    stacked = torch.stack([column.double() for column in columns.values()]).cpu().numpy()
    values = np.ones(len(tokens), VALUES)
    for name, column in zip(columns, stacked, strict=True):
        values[name] = column
    return values


def _jsd(logits_a: torch.Tensor, logits_b: torch.Tensor) -> torch.Tensor:
    """Compute the Jensen-Shannon divergence [n]."""
    log_a, log_b = logits_a.log_softmax(-1), logits_b.log_softmax(-1)
    # The log of the mean of p and q, in the form that is exact where they are equal; an entry that
    # neither model allows stays at -inf.
    gap = (log_a - log_b).abs_().nan_to_num_(0.0, posinf=math.inf)
    mixture = gap.neg_().expm1_().div_(2).log1p_().add_(torch.maximum(log_a, log_b))
    return (fastkl.kl_divergence(log_a, mixture) + fastkl.kl_divergence(log_b, mixture)) / 2


def windows(document: Document, context: int, overlap: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, first, last): reading start … last - 2 gives distributions of first … last - 1.

    A window reads at most `context` tokens, beginning with the last `overlap` of the one before;
    every token is scored in exactly one.
    """
    start, first = document.start, document.first
    while first < document.end:
        last = min(start + context + 1, document.end)
        yield start, first, last
        start, first = last - 1 - overlap, last


@torch.inference_mode()
def measure(
    store: Store,
    loads: Sequence[Callable[[], Model]],
    vocabulary: Vocabulary,
    context: int,
    overlap: int,
    *,
    sequential: bool,
) -> list[dict[str, Any]]:
    """Write the values of every token into the store; return what was loaded, A and B.

    sequential: one model at a time. A's hidden states wait in a temporary file, in its own type,
    and only its head stays in memory.
    """

    def ids(start: int, end: int) -> torch.Tensor:
        return torch.from_numpy(store.tokens["id"][start:end].astype(np.int64))

    def loaded(load: Callable[[], Model]) -> Model:
        model, document = load(), store.documents[0]
        model.check(ids(document.start, min(document.start + context, document.end)))
        return model

    def hidden(model: Model, start: int, first: int, last: int) -> torch.Tensor:
        return model.hidden(ids(start, last - 1))[first - 1 - start :]

    def through(title: str) -> Iterator[tuple[int, int, int]]:
        with progress(None, title, total=store.scored, unit=" tokens", unit_scale=True) as bar:
            for document in store.documents:
                for start, first, last in windows(document, context, overlap):
                    yield start, first, last
                    bar.update(last - first)

    a: Model | None = loaded(loads[0])
    assert a is not None
    head, about, waiting = a.head, a.about(), tempfile.TemporaryFile()
    if sequential:
        for window in through("model A"):
            states = hidden(a, *window).contiguous()
            size, dtype = states[0].nbytes, states.dtype
            needed = store.scored * size
            if not waiting.tell() and needed > shutil.disk_usage(tempfile.gettempdir()).free:
                raise OSError(errno.ENOSPC, f"no room for {needed / 1e9:.1f} GB of hidden states")
            waiting.write(states.cpu().view(torch.uint8).numpy())
        waiting.seek(0)
        a = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    b = loaded(loads[1])
    for start, first, last in through("model B" if sequential else "models A and B"):
        if a:
            of_a = hidden(a, start, first, last)
        else:
            content = bytearray(waiting.read((last - first) * size))
            of_a = torch.frombuffer(content, dtype=dtype).view(last - first, -1).to(b.device)
        tokens = ids(first, last).to(b.device)
        both = of_a, hidden(b, start, first, last)
        store.values[first:last] = token_values((head, b.head), both, tokens, vocabulary)
    return [about, b.about()]


# ---- figures


def summarise(store: Store) -> dict[str, Any]:
    """Compute means, exact quantiles and shares over all tokens with values; sums are float64."""
    total, largest, same = dict.fromkeys(MEANS, 0.0), dict.fromkeys(DIVERGENCES, 0.0), 0
    for _, values in store.blocks():
        values = values[values["scored"] > 0]
        for name in MEANS:
            total[name] += float(values[name].sum(dtype=np.float64))
        for name in DIVERGENCES:
            largest[name] = max(largest[name], float(values[name].max(initial=0.0)))
        same += int((values["top_a"] == values["top_b"]).sum())
    summary: dict[str, Any] = {"tokens": store.scored, "same_top1": same / store.scored}
    for name in DIVERGENCES:
        found = zip(QUANTILES, quantiles(store, name, list(QUANTILES.values())), strict=True)
        summary[name] = {"mean": total[name] / store.scored, **dict(found), "max": largest[name]}
    for name in MEANS[len(DIVERGENCES) :]:
        summary[name] = total[name] / store.scored
    columns = (values["kl_ab"] for _, values in store.blocks())
    bound, whole = summary["kl_ab"]["p99"], total["kl_ab"]
    above = sum(float(kl[kl > bound].sum(dtype=np.float64)) for kl in columns)
    summary["share_above_p99"] = above / whole if 0 < whole < math.inf else 0.0
    return summary


def quantiles(store: Store, name: str, fractions: Sequence[float]) -> list[float]:
    """Compute torch.quantile of a non-negative column; +inf between +inf and a number.

    The column is sorted in a mapped file: its memory is the system's cache.
    """
    with tempfile.TemporaryFile() as file:
        for _, values in store.blocks():
            file.write(np.abs(values[name][values["scored"] > 0]))  # abs: no zero with a sign
        column = _mapped(file, np.float32)
    column.sort()
    found = []
    for rank in (fraction * (len(column) - 1) for fraction in fractions):
        low, share = float(column[int(rank)]), rank % 1
        high = float(column[int(rank) + 1]) if share else 0.0
        found.append((1 - share) * low + share * high if share else low)
    return found


def worst_units(store: Store, by: str, limit: int) -> list[dict[str, Any]]:
    """List units by falling mean KL(A‖B): every document, or the `limit` worst lines."""
    units, names = [], (*DIVERGENCES, "same_top1")

    def entries() -> Iterator[dict[str, Any]]:
        for (document, line), group in itertools.groupby(_parts(store, by), itemgetter(0, 1)):
            _, _, indices, counts, sums, largest = zip(*group, strict=True)
            unit = {"document": document.name, "line": line, "index": indices[0]}
            means = (sum(sums) / sum(counts)).tolist()
            unit |= {"tokens": sum(counts), **dict(zip(names, means, strict=True))}
            yield unit | {"max_kl_ab": max(largest)}

    limit = limit if by == "line" else len(store.documents)
    for unit in heapq.nlargest(limit, entries(), key=itemgetter("kl_ab")):
        document, first = store.document_of(unit["index"]), unit["index"]
        # A document's first token has no figures, but is the beginning of the text.
        start = document.start if document.first == first else first
        text = store.text(start, first + min(unit["tokens"], 30))
        units.append({**unit, "text": (text.strip() or text)[:80]})
    return units


def _parts(store: Store, by: str) -> Iterator[tuple[Any, ...]]:
    """Yield (document, line, index, tokens, sums, largest KL) of units, cut where blocks end."""
    for document in store.documents:
        for low, values in store.blocks(document.first, document.end):
            lines = store.tokens["line"][low : low + len(values)] * (by == "line")
            starts = np.flatnonzero(np.diff(lines, prepend=lines[0] - 1))
            same = values["top_a"] == values["top_b"]
            columns = np.stack([*(values[name] for name in DIVERGENCES), same], dtype=np.float64)
            sums = np.add.reduceat(columns, starts, axis=1).T
            largest = np.maximum.reduceat(values["kl_ab"], starts).tolist()
            counts = np.diff(starts, append=len(values)).tolist()
            for start, *figures in zip(starts.tolist(), counts, sums, largest, strict=True):
                line = int(lines[start]) if by == "line" else None
                yield document, line, low + start, *figures


def worst_tokens(store: Store, limit: int) -> list[int]:
    """List the tokens of the largest KL(A‖B), falling; the earlier one of equals."""
    at, kl = np.zeros(0, np.int64), np.zeros(0, np.float32)
    for low, values in store.blocks():
        scored = np.flatnonzero(values["scored"])
        at, kl = np.append(at, low + scored), np.append(kl, values["kl_ab"][scored])
        order = np.lexsort((at, -kl))[:limit]
        at, kl = at[order], kl[order]
    found: list[int] = at.tolist()
    return found


def token_entry(
    store: Store, at: int, label: Callable[[int], str], around: int = 24
) -> dict[str, Any]:
    """Describe a token: its text with that around it, its values, and the models' expectations."""
    document, row, value = store.document_of(at), store.tokens[at], store.values[at]
    low, high = max(document.start, at - around), min(document.end, at + 1 + around)
    expected = {
        f"expected_{letter}": {
            "token": label(int(value[f"top_{letter}"])),
            "probability": math.exp(value[f"top_logprob_{letter}"]),
        }
        for letter in "ab"
    }
    return {
        "index": at,
        "document": document.name,
        "line": int(row["line"]),
        "token": store.text(at, at + 1) or label(int(row["id"])),
        "before": store.text(low, at) if low < at else "",
        "after": store.text(at + 1, high) if at + 1 < high else "",
        **{name: float(value[name]) for name in MEANS},
        **expected,
    }
