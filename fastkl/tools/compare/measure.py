"""The values of every token, on disk, and their figures: of the whole text and of its worst parts.

Files without a name hold tokens and values; they are mapped and not read, so that memory holds one
block, however long the text.
"""

from __future__ import annotations

import gc
import heapq
import itertools
import math
import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
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
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
# A token, and the values of the two distributions before it, in nats; one without a context has
# scored = 0.
TOKEN = np.dtype(
    [
        *[
            ("id", "<i4"),
            ("document", "<i4"),
            ("line", "<i4"),
            ("text_end", "<i8"),
            ("scored", "<i4"),
        ],
        *((name, "<f4") for name in (*MEANS, "top_logprob_a", "top_logprob_b")),
        *[("top_a", "<i4"), ("top_b", "<i4")],
    ]
)
# Tokens in memory at a time.
BLOCK = 1 << 14
# Logits of one model in a block: about five tensors of this many float32 are alive at a time.
BLOCK_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 27}
Array = np.ndarray[Any, Any]


# ---- on disk


class Document(NamedTuple):
    """A document's tokens start … end - 1, special ones in front included; `first` has a value."""

    name: str
    start: int
    first: int
    end: int


class Store:
    """Documents, their text and their tokens; once sealed, `tokens` is an array of TOKEN."""

    def __init__(self) -> None:
        self.documents: list[Document] = []
        self.count = self.scored = self._text_bytes = 0
        self._rows, self._content = tempfile.TemporaryFile(), tempfile.TemporaryFile()

    def append(self, ids: Sequence[int], lines: Sequence[int], texts: Sequence[str]) -> None:
        """Add tokens; their texts put together are the document."""
        rows, content = np.zeros(len(ids), TOKEN), [text.encode() for text in texts]
        ends = np.cumsum([self._text_bytes, *map(len, content)], dtype=np.int64)
        rows["document"] = len(self.documents)
        rows["id"], rows["line"], rows["text_end"] = ids, lines, ends[1:]
        self.count, self._text_bytes = self.count + len(ids), int(ends[-1])
        self._rows.write(rows.tobytes())
        self._content.write(b"".join(content))

    def end_document(self, name: str, start: int, first: int) -> None:
        """Make the tokens since `start` a document, if one of them has a value."""
        if self.count > first:
            self.documents.append(Document(name, start, first, self.count))
            self.scored += self.count - first

    def seal(self) -> None:
        """Map the files, when all tokens are there."""
        self.tokens = _mapped(self._rows, TOKEN)
        self._text = _mapped(self._content, np.uint8)

    def text(self, start: int, end: int) -> str:
        """Return the text of the tokens together."""
        ends = self.tokens["text_end"]
        low, high = (int(ends[at - 1]) if at else 0 for at in (start, end))
        return bytes(self._text[low:high]).decode()

    def blocks(self, start: int = 0, end: int | None = None) -> Iterator[tuple[int, Array]]:
        """Yield (index of the first, tokens), block after block."""
        end = self.count if end is None else end
        for low in range(start, end, BLOCK):
            yield low, self.tokens[low : min(low + BLOCK, end)]


def _mapped(file: IO[bytes], dtype: Any) -> Array:
    file.flush()
    return np.memmap(file, dtype, "r+").view(np.ndarray)


# ---- from windows to values


def token_values(
    heads: Sequence[fastkl.Head],
    hidden: Sequence[torch.Tensor],
    tokens: torch.Tensor,
    vocabulary: Vocabulary,
) -> dict[str, Array]:
    """Compute columns of TOKEN from hidden states [n, H] of A and B and the tokens [n] after them.

    The logits are float32 for 16-bit models, too (linear_token_stats' logits_dtype=torch.float32),
    and are made once: statistics and mixture read the same block. Tokens that are not compared have
    probability 0.
    """
    device = tokens.device
    step = max(1, BLOCK_LOGITS.get(device.type, BLOCK_LOGITS["cuda"]) // vocabulary.size)
    none = torch.tensor(sorted(vocabulary.unshared), dtype=torch.long, device=device)
    blocks = []
    for low in range(0, len(tokens), step):
        logits = [
            head_logits(head, states[low : low + step], vocabulary.size)
            for head, states in zip(heads, hidden, strict=True)
        ]
        logits_a, logits_b = (each.index_fill_(1, none, -math.inf) for each in logits)
        blocks.append(block_values(logits_a, logits_b, tokens[low : low + step]))
    values = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    for letter in "ab":
        if np.isnan(values[f"logprob_{letter}"]).any():
            argument, remedy = f"MODEL_{letter.upper()}", "--dtype float32 or bfloat16"
            raise CompareError(argument, "finite logits", "NaN on this text", remedy)
    return values


def block_values(
    logits_a: torch.Tensor, logits_b: torch.Tensor, tokens: torch.Tensor
) -> dict[str, Array]:
    """Compute columns of TOKEN from logits [n, V]."""
    top_a, top_b = logits_a.argmax(-1), logits_b.argmax(-1)
    stats = fastkl.token_stats(logits_a, tokens, logits_b)
    of_b = fastkl.token_stats(logits_b, top_b)
    columns = {
        "scored": torch.ones_like(top_a),
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
    return dict(zip(columns, stacked, strict=True))


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


def states_of(
    model: Model, store: Store, context: int, overlap: int, title: str | None
) -> Iterator[torch.Tensor]:
    """Yield a model's hidden states [n, H] of each window, those that predict the next tokens.

    title: of a progress bar, or None. An error at first where the model cannot be compared.
    """

    def ids(start: int, end: int) -> torch.Tensor:
        return torch.from_numpy(store.tokens["id"][start:end].astype(np.int64))

    document = store.documents[0]
    model.check(ids(document.start, min(document.start + context, document.end)))
    options = {"unit": " tokens", "unit_scale": True, "disable": title is None}
    with progress(None, str(title), total=store.scored, **options) as bar:
        for document in store.documents:
            for start, first, last in windows(document, context, overlap):
                yield model.hidden(ids(start, last - 1))[first - 1 - start :]
                bar.update(last - first)


def spooled(states: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Write tensors to a temporary file, all of them now; return an iterator that reads them."""
    file = tempfile.TemporaryFile()
    for each in states:
        pickle.dump(each.cpu().clone(), file)
    file.seek(0)
    return (pickle.load(file) for _ in itertools.count())


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

    sequential: one model at a time. A's hidden states wait in a temporary file, and only its head
    stays in memory.
    """
    heads, about, states = [], [], []
    for letter, load in zip("AB", loads, strict=True):
        model = load()
        title = f"model {letter}" if sequential else "models A and B"
        shown = title if sequential or letter == "B" else None
        read = states_of(model, store, context, overlap, shown)
        states.append(spooled(read) if sequential and letter == "A" else read)
        first = next(states[-1])  # checks the model
        states[-1] = itertools.chain([first], states[-1])
        heads.append(model.head)
        about.append(model.about())
        del model, read
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    spans = (
        span[1:] for document in store.documents for span in windows(document, context, overlap)
    )
    for (first, last), *hidden in zip(spans, *states, strict=False):
        device = heads[0].weight.device
        tokens = torch.from_numpy(store.tokens["id"][first:last].astype(np.int64)).to(device)
        hidden = [each.to(device) for each in hidden]
        for name, column in token_values(heads, hidden, tokens, vocabulary).items():
            store.tokens[name][first:last] = column
    return about


# ---- figures


def summarise(store: Store) -> dict[str, Any]:
    """Compute means, exact quantiles and shares over all tokens with values; sums are float64."""
    total, same = dict.fromkeys(MEANS, 0.0), 0
    for _, tokens in store.blocks():
        tokens = tokens[tokens["scored"] > 0]
        same += int((tokens["top_a"] == tokens["top_b"]).sum())
        for name in MEANS:
            total[name] += float(tokens[name].sum(dtype=np.float64))
    summary: dict[str, Any] = {"tokens": store.scored, "same_top1": same / store.scored}
    for name in MEANS:
        summary[name] = total[name] / store.scored
    for name in DIVERGENCES:
        summary[name] = {"mean": summary[name], **quantiles(store, name)}
    columns = (tokens["kl_ab"] for _, tokens in store.blocks())
    bound, whole = summary["kl_ab"]["p99"], total["kl_ab"]
    above = sum(float(kl[kl > bound].sum(dtype=np.float64)) for kl in columns)
    summary["share_above_p99"] = above / whole if 0 < whole < math.inf else 0.0
    return summary


def quantiles(store: Store, name: str) -> dict[str, float]:
    """Compute torch.quantile of a non-negative column; +inf between +inf and a number.

    The column is sorted in a mapped file: its memory is the system's cache.
    """
    with tempfile.TemporaryFile() as file:
        for _, tokens in store.blocks():
            file.write(np.abs(tokens[name][tokens["scored"] > 0]))  # abs: no zero with a sign
        column = _mapped(file, np.float32)
    column.sort()
    found = {}
    for title, fraction in QUANTILES.items():
        rank = fraction * (len(column) - 1)
        low, high, share = float(column[int(rank)]), float(column[math.ceil(rank)]), rank % 1
        found[title] = (1 - share) * low + share * high if share else low
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
        first = unit["index"]
        document = store.documents[store.tokens["document"][first]]
        # A document's first token has no figures, but is the beginning of the text.
        start = document.start if document.first == first else first
        text = store.text(start, first + min(unit["tokens"], 30))
        units.append({**unit, "text": (text.strip() or text)[:80]})
    return units


def _parts(store: Store, by: str) -> Iterator[tuple[Any, ...]]:
    """Yield (document, line, index, tokens, sums, largest KL) of units, cut where blocks end."""
    for document in store.documents:
        for low, tokens in store.blocks(document.first, document.end):
            lines = tokens["line"] * (by == "line")
            starts = np.flatnonzero(np.diff(lines, prepend=lines[0] - 1))
            same = tokens["top_a"] == tokens["top_b"]
            columns = np.stack([*(tokens[name] for name in DIVERGENCES), same], dtype=np.float64)
            sums = np.add.reduceat(columns, starts, axis=1).T
            largest = np.maximum.reduceat(tokens["kl_ab"], starts).tolist()
            counts = np.diff(starts, append=len(tokens)).tolist()
            for start, *figures in zip(starts.tolist(), counts, sums, largest, strict=True):
                line = int(lines[start]) if by == "line" else None
                yield document, line, low + start, *figures


def worst_tokens(
    store: Store, limit: int, label: Callable[[int], str], around: int = 24
) -> list[dict[str, Any]]:
    """Describe the tokens of the largest KL(A‖B), falling; the earlier one of equals.

    Each with the text around it, its values, and the models' expectations in its place.
    """
    indices, kl = np.zeros(0, np.int64), np.zeros(0, np.float32)
    for low, tokens in store.blocks():
        scored = np.flatnonzero(tokens["scored"])
        indices, kl = np.append(indices, low + scored), np.append(kl, tokens["kl_ab"][scored])
        order = np.lexsort((indices, -kl))[:limit]
        indices, kl = indices[order], kl[order]
    entries = []
    for at in indices.tolist():
        row = store.tokens[at]
        document = store.documents[row["document"]]
        entry = {
            "index": at,
            "document": document.name,
            "line": int(row["line"]),
            "token": store.text(at, at + 1) or label(int(row["id"])),
            "before": store.text(max(document.start, at - around), at),
            "after": store.text(at + 1, min(document.end, at + 1 + around)),
            **{name: float(row[name]) for name in MEANS},
        }
        for letter in "ab":
            chance = math.exp(row[f"top_logprob_{letter}"])
            likely = {"token": label(int(row[f"top_{letter}"])), "probability": chance}
            entry[f"expected_{letter}"] = likely
        entries.append(entry)
    return entries
