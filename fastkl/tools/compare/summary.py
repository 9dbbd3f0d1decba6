"""The figures of a comparison, from blocks of values: of the whole text, of its units, and which tokens differ most."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from .store import VALUES, Document, Store

DIVERGENCES = ("kl_ab", "kl_ba", "jsd")
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
MEANS = (*DIVERGENCES, "entropy_a", "entropy_b", "logprob_a", "logprob_b")


def summarise(store: Store) -> dict:
    """Means, exact quantiles and shares over all tokens that have values; sums are float64."""
    total, largest, same = dict.fromkeys(MEANS, 0.0), dict.fromkeys(DIVERGENCES, 0.0), 0
    for _, values in store.blocks():
        values = values[values["scored"] > 0]
        for name in MEANS:
            total[name] += float(values[name].sum(dtype=np.float64))
        for name in DIVERGENCES:
            largest[name] = max(largest[name], float(values[name].max(initial=0.0)))
        same += int((values["top_a"] == values["top_b"]).sum())
    summary: dict = {"tokens": store.scored, "same_top1": same / store.scored}
    for name in DIVERGENCES:
        quantiles = dict(zip(QUANTILES, store.quantiles(name, list(QUANTILES.values())), strict=True))
        summary[name] = {"mean": total[name] / store.scored, **quantiles, "max": largest[name]}
    for name in MEANS[len(DIVERGENCES):]:
        summary[name] = total[name] / store.scored
    above = sum(float(values["kl_ab"][values["kl_ab"] > summary["kl_ab"]["p99"]].sum(dtype=np.float64)) for _, values in store.blocks())
    summary["share_above_p99"] = above / total["kl_ab"] if 0 < total["kl_ab"] < math.inf else 0.0
    return summary


@dataclass
class Unit:
    """A document or a line: its tokens with values are first … first + tokens - 1. sums: of each of DIVERGENCES, and of same top-1 tokens."""

    document: str
    line: int | None
    first: int
    tokens: int
    sums: np.ndarray
    largest: float

    @property
    def mean(self) -> float:
        """Mean KL(A‖B)."""
        return float(self.sums[0]) / self.tokens

    def entry(self, store: Store) -> dict:
        """Its figures, and how its text begins; the document's first token has no figures, but is the beginning of the text."""
        document = store.documents[bisect_right(store.documents, self.first, key=lambda document: document.start) - 1]
        start = document.start if document.first == self.first else self.first
        text = store.text(start, self.first + min(self.tokens, 30))
        means = dict(zip((*DIVERGENCES, "same_top1"), (self.sums / self.tokens).tolist(), strict=True))
        return {"document": self.document, "line": self.line, "index": self.first, "tokens": self.tokens, **means, "max_kl_ab": self.largest,
                "text": (text.strip() or text)[:80]}


def worst_units(store: Store, by: str, limit: int) -> list[Unit]:
    """Units by falling mean KL(A‖B): every document, or the `limit` worst lines."""
    units = (unit for document in store.documents for unit in _units(store, document, by))
    return heapq.nlargest(limit if by == "line" else len(store.documents), units, key=lambda unit: unit.mean)


def _units(store: Store, document: Document, by: str) -> Iterator[Unit]:
    """The units of one document in their order; one may go on in the next block."""
    unit = None
    for low, values in store.blocks(document.first, document.end):
        lines = store.tokens(low, low + len(values))["line"] if by == "line" else np.zeros(len(values), np.int32)
        starts = np.flatnonzero(np.diff(lines, prepend=lines[0] - 1))
        columns = np.stack([*(values[name] for name in DIVERGENCES), values["top_a"] == values["top_b"]], dtype=np.float64)
        sums, largest = np.add.reduceat(columns, starts, axis=1).T, np.maximum.reduceat(values["kl_ab"], starts).tolist()
        for at, (start, end) in enumerate(zip(starts.tolist(), [*starts[1:].tolist(), len(values)], strict=True)):
            line = int(lines[start]) if by == "line" else None
            if unit is None or unit.line != line:
                if unit is not None:
                    yield unit
                unit = Unit(document.name, line, low + start, 0, np.zeros(len(columns)), 0.0)
            unit.tokens, unit.sums, unit.largest = unit.tokens + end - start, unit.sums + sums[at], max(unit.largest, largest[at])
    yield unit


def worst_tokens(store: Store, limit: int) -> list[int]:
    """The tokens of the largest KL(A‖B), falling; the earlier one of equals."""
    at, kl = np.zeros(0, np.int64), np.zeros(0, np.float32)
    for low, values in store.blocks():
        scored = np.flatnonzero(values["scored"])
        at, kl = np.concatenate([at, low + scored]), np.concatenate([kl, values["kl_ab"][scored]])
        order = np.lexsort((at, -kl))[:limit]
        at, kl = at[order], kl[order]
    return at.tolist()


def token_entry(store: Store, at: int, label: Callable[[int], str], around: int = 24) -> dict:
    """Everything about one token: its text with that around it, its values, and what each model expected in its place."""
    document = store.documents[bisect_right(store.documents, at, key=lambda document: document.start) - 1]
    row, value = store.tokens(at, at + 1)[0], store.values(at, at + 1)[0]
    low, high = max(document.start, at - around), min(document.end, at + 1 + around)
    expected = {f"expected_{letter}": {"token": label(int(value[f"top_{letter}"])), "probability": math.exp(value[f"top_logprob_{letter}"])}
                for letter in "ab"}
    figures = {name: float(value[name]) for name in VALUES.names if name not in ("scored", "top_a", "top_b", "top_logprob_a", "top_logprob_b")}
    return {"index": at, "document": document.name, "line": int(row["line"]), "token": store.text(at, at + 1) or label(int(row["id"])),
            "before": store.text(low, at), "after": store.text(at + 1, high), **figures, **expected}
