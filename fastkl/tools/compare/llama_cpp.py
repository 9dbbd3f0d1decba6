"""Read llama.cpp's logits base files, and print the table of its --kl-divergence.

Definitions: tools/perplexity/perplexity.cpp of llama.cpp, functions perplexity (which writes the
file with --kl-divergence-base) and kl_divergence.
"""

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

import fastkl

from ..errors import expect
from .inputs import TextTokenizer, readable
from .measure import block_values
from .reference import Text
from .windows import Scheme, Window

MAGIC = b"_logits_"
# Log-probs at or below this are not in the tool's KLD.
LOWEST = -16.0
# uint16 entries before a row's codes: two float32.
HEADER = 4


def is_base_file(name: str) -> bool:
    """Recognise a logits base file by its first bytes."""
    return os.path.isfile(name) and np.fromfile(name, np.uint8, len(MAGIC)).tobytes() == MAGIC


class LogitsFile:
    """A base model given by llama.cpp's log-probs of a text; the counterpart of Checkpoint.

    Layout: MAGIC; int32 n_ctx, n_vocab, n_chunk; int32 tokens [n_chunk, n_ctx]; for each chunk the
    n_ctx - 1 - n_ctx // 2 rows that score its second half, of uint16: scale and minimum, each a
    float32, then n_vocab codes, padded to an even number. A log-prob is scale · code + minimum, in
    steps of up to 16 / 65535 = 2.4e-4 nats; values more than 16 below the largest have code 0.
    """

    def __init__(self, letter: str, name: str) -> None:
        self.letter, self.argument, self.name = letter, f"MODEL_{letter}", name
        size = os.path.getsize(name)
        context, self.rows, chunks = (
            *np.fromfile(name, "<i4", 3, offset=len(MAGIC)).tolist(),
            *(0, 0, 0),
        )[:3]
        start, width = len(MAGIC) + 12, 2 * ((self.rows + 1) // 2) + HEADER
        shape = chunks, context - 1 - context // 2, width
        expected = start + 4 * chunks * context + 2 * math.prod(shape)
        expect(
            min(context, self.rows, *shape) > 0 and size == expected,
            self.argument,
            f"a whole logits base file of llama.cpp, for {chunks} chunks of {context} tokens and "
            f"{self.rows} logits {expected} bytes",
            f"{size} bytes in {name!r}",
            "write it anew",
        )
        self.tokens = (
            np.fromfile(name, "<i4", context * chunks, offset=start)
            .reshape(chunks, context)
            .astype(np.int64)
        )
        expect(
            0 <= self.tokens.min() and self.tokens.max() < self.rows,
            self.argument,
            f"tokens from 0 to {self.rows - 1}",
            f"{self.tokens.min()} to {self.tokens.max()} in {name!r}",
            "write it anew",
        )
        # Copy on write: torch requires writable memory.
        self.codes = np.memmap(name, "<i2", "c", start + 4 * context * chunks, shape)
        self.about: dict[str, Any] = {
            "name": readable(name),
            "class": "logits base file of llama.cpp",
            "dtype": "uint16 codes",
            "adapter": None,
            "bytes": size,
            "vocabulary": self.rows,
            "logit_scale": 1.0,
            "logit_softcap": None,
        }
        self.text = Text([self.about["name"]], [], Scheme(context, context, "second-half"))

    def tables(self, tokenizer: TextTokenizer) -> list[pd.DataFrame]:
        """Make one document per chunk, with the tokenizer's text for each token."""
        name = os.path.basename(self.about["name"])
        return [
            pd.DataFrame(
                {
                    "document": f"{name}#{number}",
                    "id": ids,
                    "line": 1,
                    "text": [tokenizer.own.decode([token]) for token in ids],
                    "scored": np.arange(len(ids)) > 0,
                }
            )
            for number, ids in enumerate(self.tokens, 1)
        ]

    def load(self, dtype: str, device: str) -> "LogitsFile":
        """Set the device on which rows are decoded."""
        self.device = device
        return self

    def states(self, windows: Sequence[Window], title: str) -> Iterator[torch.Tensor]:
        """Look up the coded rows of each window."""
        for each in windows:
            yield torch.from_numpy(self.codes[each.first // self.tokens.shape[1]])

    def logits(self, rows: torch.Tensor, vocabulary: int) -> torch.Tensor:
        """Decode rows to log-probs [n, vocabulary], float32, computed as llama.cpp does."""
        scale, low = rows[:, :HEADER].contiguous().view(torch.float32).to(self.device).split(1, -1)
        codes = rows[:, HEADER : HEADER + vocabulary].to(self.device).int() & 0xFFFF
        return torch.addcmul(low, scale, codes.float())

    def values(
        self, log_p: torch.Tensor, logits_b: torch.Tensor, tokens: torch.Tensor
    ) -> pd.DataFrame:
        """Compute columns of values from the decoded log-probs of A and the logits of B, [n, V].

        Divergences and entropies cover the tokens whose log-prob in the file is above LOWEST, with
        both models normalised over them: rounded probabilities add up to 1 only within about 1e-4,
        an error that the KL would inherit. Log-probs of the text and expected tokens cover the
        whole vocabulary. Two more columns: kld, llama.cpp's sum over the same tokens without
        normalising; outside, B's probability of the other tokens.
        """
        kept = log_p > LOWEST
        values = block_values(
            log_p.masked_fill(~kept, -math.inf), logits_b.masked_fill(~kept, -math.inf), tokens
        )
        top = logits_b.argmax(-1)
        log_q = logits_b.double().log_softmax(-1)
        kld = (log_p.double().exp() * (log_p - log_q)).masked_fill(~kept, 0).sum(-1)
        whole = {
            "logprob_a": log_p.gather(-1, tokens[:, None])[:, 0],
            "logprob_b": fastkl.selective_log_softmax(logits_b, tokens),
            "top_logprob_a": log_p.amax(-1),
            "top_logprob_b": fastkl.selective_log_softmax(logits_b, top),
            "top_b": top,
            "same_top1": top == log_p.argmax(-1),
            "kld": kld,
            "outside": log_q.exp().masked_fill(kept, 0).sum(-1),
        }
        return values.assign(**{name: each.double().cpu().numpy() for name, each in whole.items()})

    def note(self, scored: pd.DataFrame) -> str:
        """Describe the effect of the file's rounding on the figures."""
        return (
            "A's log-probs are rounded to steps of up to 2.4e-4 nats. llama.cpp's KLD adds them up "
            f"as they are, without those of {LOWEST:g} and below, where B has "
            f"{scored['outside'].mean():.2g} of its probability: its mean is "
            f"{scored['kld'].mean():.4g}, and {(scored['kld'] < 0).sum():,} of {len(scored):,} "
            "tokens have a KLD below 0. The figures above are those of both models normalised over "
            f"the same tokens: no KL is negative, and the mean is {scored['kl_ab'].mean():.4g}."
        )


# ---- the table

QUANTILES = {
    "KLD": (99.9, 99.0, 95.0, 90.0, 50.0, 10.0, 5.0, 1.0, 0.1),
    "Δp": (99.9, 99.0, 95.0, 90.0, 75.0, 50.0, 25.0, 10.0, 5.0, 1.0, 0.1),
}
NAMED = {100.0: "Maximum", 50.0: "Median ", 0.0: "Minimum"}


@np.errstate(all="ignore")  # a single token has no error; the perplexity may be infinite
def llama_table(scored: pd.DataFrame) -> str:
    """Format the table of llama.cpp's --kl-divergence over the tokens with values.

    Errors are standard errors of a mean of independent tokens, sqrt(var / (n - 1)); Q is B. The KLD
    of two models is the exact KL(A‖B); with a base file it is the sum that llama.cpp computes.
    """
    nll_q, nll_base = -scored["logprob_b"].to_numpy(), -scored["logprob_a"].to_numpy()
    kld = scored["kld" if "kld" in scored else "kl_ab"].to_numpy()
    change = np.exp(-nll_q) - np.exp(-nll_base)
    (q, q_error), (base, base_error) = _mean(nll_q), _mean(nll_base)
    log_ratio, ratio_error = _mean(nll_q - nll_base)
    ppl_q, ppl_base, ratio = np.exp([q, base, log_ratio])
    _, off = _mean(ppl_q * nll_q - ppl_base * nll_base)
    correlation = np.corrcoef(nll_q, nll_base)[0, 1]
    mse, mse_error = _mean(change**2)
    rms, (same, same_error) = math.sqrt(mse), _mean(scored["same_top1"].to_numpy())
    return "\n".join(
        [
            "====== Perplexity statistics ======",
            f"Mean PPL(Q)                   : {ppl_q:10.6f} ± {ppl_q * q_error:10.6f}",
            f"Mean PPL(base)                : {ppl_base:10.6f} ± {ppl_base * base_error:10.6f}",
            f"Cor(ln(PPL(Q)), ln(PPL(base))): {100 * correlation:6.2f}%",
            f"Mean ln(PPL(Q)/PPL(base))     : {log_ratio:10.6f} ± {ratio_error:10.6f}",
            f"Mean PPL(Q)/PPL(base)         : {ratio:10.6f} ± {ratio * ratio_error:10.6f}",
            f"Mean PPL(Q)-PPL(base)         : {ppl_q - ppl_base:10.6f} ± {off:10.6f}",
            "",
            "====== KL divergence statistics ======",
            "Mean    KLD: {:10.6f} ± {:10.6f}".format(*_mean(kld)),
            *_quantiles("KLD", kld, "{:10.6f}"),
            "",
            "====== Token probability statistics ======",
            "Mean    Δp: {:6.3f} ± {:5.3f} %".format(*(100 * each for each in _mean(change))),
            *_quantiles("Δp", 100 * change, "{:6.3f}%"),
            f"RMS Δp    : {100 * rms:6.3f} ± {50 * mse_error / rms if rms else 0:5.3f} %",
            f"Same top p: {100 * same:6.3f} ± {100 * same_error:5.3f} %",
        ]
    )


def _mean(values: np.ndarray) -> tuple[float, float]:
    """Return the mean and its standard error."""
    return float(values.mean()), math.sqrt(values.var() / max(1, len(values) - 1))


def _quantiles(name: str, values: np.ndarray, form: str) -> list[str]:
    levels = (100.0, *QUANTILES[name], 0.0)
    return [
        f"{NAMED.get(level, f'{level:4.1f}%  ')} {name}: {form.format(value)}"
        for level, value in zip(levels, np.percentile(values, levels), strict=True)
    ]
