"""From windows of tokens to the values of each token, in blocks of logits: nothing of size [tokens, vocabulary] for more than a block."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

import fastkl

from ..progress import progress
from .loading import Head, Model, too_few_rows
from .settings import CompareError
from .store import VALUES, HiddenFile, Store
from .text import Vocabulary, Window, windows

# Logits of one model in a block: about five tensors of this many float32 are alive at a time.
BLOCK_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 27}


def token_values(head_a: Head, hidden_a: torch.Tensor, head_b: Head, hidden_b: torch.Tensor, tokens: torch.Tensor, vocabulary: int,
                 unshared: Sequence[int] = ()) -> np.ndarray:
    """Rows of VALUES for hidden states [n, H] of both models and the tokens [n] that follow them.

    vocabulary, unshared: the first ids are compared, without these, which get probability 0.

    The logits are float32 for 16-bit models, too (what linear_token_stats calls logits_dtype=torch.float32), and are made once: the statistics
    and the divergence to the mixture read the same block.
    """
    device = hidden_a.device.type
    step = max(1, BLOCK_LOGITS.get(device, BLOCK_LOGITS["cuda"]) // vocabulary)
    none = torch.tensor([*unshared], dtype=torch.long, device=hidden_a.device)
    blocks = []
    for low in range(0, len(tokens), step):
        logits = [head.logits(hidden[low:low + step], vocabulary).index_fill_(1, none, -math.inf)
                  for head, hidden in ((head_a, hidden_a), (head_b, hidden_b))]
        blocks.append(block_values(*logits, tokens[low:low + step]))
    values = np.concatenate(blocks)
    for letter in "ab":
        if np.isnan(values[f"logprob_{letter}"]).any():
            raise CompareError(f"MODEL_{letter.upper()}", "finite logits", "NaN on this text", "--dtype float32 or bfloat16")
    return values


def block_values(logits_a: torch.Tensor, logits_b: torch.Tensor, tokens: torch.Tensor) -> np.ndarray:
    """The same from logits [n, V]."""
    top_a, top_b = logits_a.argmax(-1), logits_b.argmax(-1)
    stats, of_b = fastkl.token_stats(logits_a, tokens, logits_b), fastkl.token_stats(logits_b, top_b)
    columns = {"kl_ab": stats.kl, "kl_ba": stats.ref_kl, "jsd": _jsd(logits_a, logits_b), "entropy_a": stats.entropy, "entropy_b": of_b.entropy,
               "logprob_a": stats.logprob, "logprob_b": stats.ref_logprob, "top_a": top_a, "top_b": top_b,
               "top_logprob_a": fastkl.selective_log_softmax(logits_a, top_a), "top_logprob_b": of_b.logprob}
    # One copy from the device; float64 holds a token's id as well.
    stacked, values = torch.stack([column.double() for column in columns.values()]).cpu().numpy(), np.ones(len(tokens), VALUES)
    for name, column in zip(columns, stacked, strict=True):
        values[name] = column
    return values


def _jsd(logits_a: torch.Tensor, logits_b: torch.Tensor) -> torch.Tensor:
    """The Jensen-Shannon divergence [n]."""
    log_a, log_b = logits_a.log_softmax(-1), logits_b.log_softmax(-1)
    # log of the mean of p and q, in the form that is exact where they are equal; what neither model allows stays at -inf.
    gap = (log_a - log_b).abs_().nan_to_num_(0.0, posinf=math.inf)
    mixture = gap.neg_().expm1_().div_(2).log1p_().add_(torch.maximum(log_a, log_b))
    return (fastkl.kl_divergence(log_a, mixture) + fastkl.kl_divergence(log_b, mixture)) / 2


@dataclass(frozen=True)
class Pass:
    """All windows of the store, in their order, under a progress bar."""

    store: Store
    context: int
    overlap: int

    def windows(self, title: str) -> Iterator[Window]:
        """Every window; the bar counts its tokens when the next is asked for."""
        with progress(None, title, total=self.store.scored, unit=" tokens", unit_scale=True) as bar:
            for document in self.store.documents:
                for window in windows(document, self.context, self.overlap):
                    yield window
                    bar.update(window.last - window.first)

    def ids(self, start: int, end: int) -> torch.Tensor:
        """Token ids start … end - 1."""
        return torch.from_numpy(self.store.tokens(start, end)["id"].astype(np.int64))

    def hidden(self, model: Model, window: Window) -> torch.Tensor:
        """The hidden states that predict the window's tokens."""
        return model.hidden(self.ids(window.start, window.last - 1))[window.first - 1 - window.start:]

    def loaded(self, load: Callable[[], Model], needed: int) -> Model:
        """A loaded model, checked on the first window; needed: the token ids that its head must know."""
        model, document = load(), self.store.documents[0]
        if model.vocabulary < needed:
            raise too_few_rows(model.argument, model.name, needed, model.vocabulary)
        model.check(self.ids(document.start, min(document.start + self.context, document.end)))
        return model


@torch.inference_mode()
def measure(work: Pass, load_a: Callable[[], Model], load_b: Callable[[], Model], vocabulary: Vocabulary, *, sequential: bool) -> list[dict]:
    """Write the values of every token into the store. Returns what was loaded, A and B.

    The vocabulary is that which the tokenizers share: padding has no token, whatever its logits.

    sequential: one model at a time. A's hidden states wait in a temporary file, and only its head stays in memory.
    """
    needed = vocabulary.size
    a = work.loaded(load_a, needed)
    head, about, device, waiting = a.head, a.about(), a.device, None
    if sequential:
        waiting = HiddenFile(work.store.scored)
        for window in work.windows("model A"):
            waiting.append(work.hidden(a, window))
        waiting.rewind()
        del a
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()
    b = work.loaded(load_b, needed)
    for window in work.windows("model B" if sequential else "models A and B"):
        hidden = waiting.next(window.last - window.first).to(device) if waiting else work.hidden(a, window)
        tokens = work.ids(window.first, window.last).to(device)
        values = token_values(head, hidden, b.head, work.hidden(b, window), tokens, needed, vocabulary.unshared)
        work.store.write(window.first, values)
    return [about, b.about()]
