"""The values of every token, and their figures: of the whole text and of its worst parts."""

from __future__ import annotations

import errno
import gc
import itertools
import math
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

import fastkl

from ..console import progress
from . import CompareError
from .inputs import Vocabulary
from .loading import Model, head_logits

DIVERGENCES = ("kl_ab", "kl_ba", "jsd")
MEANS = (*DIVERGENCES, "entropy_a", "entropy_b", "logprob_a", "logprob_b")
VALUES = (*MEANS, "top_logprob_a", "top_logprob_b", "top_a", "top_b")
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
# Values of one token, of the two distributions before it, in nats; 0 where `scored` is.
TOKEN = np.dtype(
    [(name, np.int32) for name in ("id", "document", "line", "scored", "top_a", "top_b")]
    + [("text_end", np.int64)]
    + [(name, np.float32) for name in VALUES[:-2]]
)
# Logits of one model in a block: about five tensors of this many float32 are alive at a time.
BLOCK_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 27}
Array = np.ndarray[Any, Any]


# ---- the text


class Document(NamedTuple):
    """A document's tokens start … end - 1, special ones in front included; `first` has a value."""

    name: str
    start: int
    first: int
    end: int


class Store:
    """Documents, their text and their tokens, an array of TOKEN once sealed."""

    def __init__(self) -> None:
        self.documents: list[Document] = []
        self.tokens = np.zeros(0, TOKEN)
        self.content = ""
        self._parts: list[Array] = []
        self._texts: list[str] = []
        self._ends = [0]

    def add(
        self, name: str, first: int, ids: Sequence[int], lines: Sequence[int], texts: Sequence[str]
    ) -> None:
        """Add a document, if one of its tokens, those from `first` on, has a value.

        Its texts put together are the document.
        """
        if len(ids) <= first:
            return
        tokens = np.zeros(len(ids), TOKEN)
        tokens["document"], tokens["id"], tokens["line"] = len(self.documents), ids, lines
        tokens["text_end"] = self._ends[-1] + np.cumsum([len(text) for text in texts])
        start = self.documents[-1].end if self.documents else 0
        self.documents.append(Document(name, start, start + first, start + len(ids)))
        self._ends.append(int(tokens["text_end"][-1]))
        self._parts.append(tokens)
        self._texts += texts

    def seal(self) -> None:
        """Put the documents together, when all are there."""
        self.tokens, self.content = np.concatenate(self._parts), "".join(self._texts)
        self._parts, self._texts = [], []

    def text(self, start: int, end: int) -> str:
        """Return the text of the tokens together."""
        ends = self.tokens["text_end"]
        low, high = (int(ends[at - 1]) if at else 0 for at in (start, end))
        return self.content[low:high]


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
    options: dict[str, Any] = {"unit": " tokens", "unit_scale": True, "disable": title is None}
    scored = sum(document.end - document.first for document in store.documents)
    with progress(None, str(title), total=scored, **options) as bar:
        for document in store.documents:
            for start, first, last in windows(document, context, overlap):
                yield model.hidden(ids(start, last - 1))[first - 1 - start :]
                bar.update(last - first)


def spooled(states: Iterable[torch.Tensor], size: int) -> Iterator[torch.Tensor]:
    """Write tensors of `size` bytes to a temporary file, all now; return an iterator over them."""
    if size > shutil.disk_usage(tempfile.gettempdir()).free:
        wanted = f"No space left for {size / 1e9:.1f} GB of hidden states"
        raise OSError(errno.ENOSPC, wanted, tempfile.gettempdir())
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
        if sequential and letter == "A":
            size = len(store.tokens) * model.head.weight.shape[1] * model.dtype.itemsize
            read = spooled(read, size)
        states.append(itertools.chain([next(read)], read))  # checks the model
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
    """Compute means, quantiles and shares over all tokens with values; sums are float64."""
    tokens = store.tokens[store.tokens["scored"] > 0]
    same = tokens["top_a"] == tokens["top_b"]
    summary: dict[str, Any] = {"tokens": len(tokens), "same_top1": float(same.mean())}
    for name in MEANS:
        summary[name] = float(tokens[name].mean(dtype=np.float64))
    for name in DIVERGENCES:
        summary[name] = {"mean": summary[name], **quantiles(tokens[name])}
    kl = tokens["kl_ab"].astype(np.float64)
    above, whole = kl[kl > summary["kl_ab"]["p99"]].sum(), kl.sum()
    summary["share_above_p99"] = float(above / whole) if 0 < whole < math.inf else 0.0
    return summary


def quantiles(column: Array) -> dict[str, float]:
    """Compute torch.quantile of a non-negative column; +inf between +inf and a number."""
    column, found = np.sort(np.abs(column)), {}  # abs: no zero with a sign
    for title, fraction in QUANTILES.items():
        rank = fraction * (len(column) - 1)
        low, high, share = float(column[int(rank)]), float(column[math.ceil(rank)]), rank % 1
        found[title] = (1 - share) * low + share * high if share else low
    return found


def worst_units(store: Store, by: str, limit: int) -> list[dict[str, Any]]:
    """List units by falling mean KL(A‖B): every document, or the `limit` worst lines."""
    scored = np.flatnonzero(store.tokens["scored"])
    tokens = store.tokens[scored]
    lines = tokens["line"] * (by == "line")
    keys = np.stack([tokens["document"], lines])
    starts = np.flatnonzero(np.diff(keys, prepend=-1).any(0))
    counts = np.diff(starts, append=len(tokens))
    same = tokens["top_a"] == tokens["top_b"]
    columns = {name: tokens[name] for name in DIVERGENCES} | {"same_top1": same}
    means = {
        name: np.add.reduceat(column, starts, dtype=np.float64) / counts
        for name, column in columns.items()
    }
    largest = np.maximum.reduceat(tokens["kl_ab"], starts)
    units: list[dict[str, Any]] = []
    order = np.argsort(-means["kl_ab"], kind="stable")
    for unit in order[: limit if by == "line" else None].tolist():
        first, count = int(scored[starts[unit]]), int(counts[unit])
        document = store.documents[tokens["document"][starts[unit]]]
        # A document's first token has no figures, but is the beginning of the text.
        start = document.start if document.first == first else first
        text = store.text(start, first + min(count, 30))
        units.append(
            {
                "document": document.name,
                "line": int(lines[starts[unit]]) or None,
                "index": first,
                "tokens": count,
                **{name: float(values[unit]) for name, values in means.items()},
                "max_kl_ab": float(largest[unit]),
                "text": (text.strip() or text)[:80],
            }
        )
    return units


def worst_tokens(
    store: Store, limit: int, label: Callable[[int], str], around: int = 24
) -> list[dict[str, Any]]:
    """Describe the tokens of the largest KL(A‖B), falling; the earlier one of equals.

    Each with the text around it, its values, and the models' expectations in its place.
    """
    scored = np.flatnonzero(store.tokens["scored"])
    order = np.argsort(-store.tokens["kl_ab"][scored], kind="stable")[:limit]
    entries = []
    for at in scored[order].tolist():
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
