"""llama.cpp's logits base files, read, and the table of its --kl-divergence, printed.

Definitions: tools/perplexity/perplexity.cpp of llama.cpp, functions perplexity (which writes the
file with --kl-divergence-base) and kl_divergence.
"""

import math
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch

import fastkl

from ..errors import told
from .inputs import TextTokenizer, readable
from .measure import block_values
from .windows import Scheme, Window

MAGIC = b"_logits_"
# Log-probs that the tool's KLD leaves out; its files hold none below.
LOWEST = -16.0
# Entries of a row before its codes: two float32.
HEADER = 4


def is_base_file(name: str) -> bool:
    """Tell a logits base file by its first bytes."""
    if not os.path.isfile(name):
        return False
    with open(name, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


class LogitsFile:
    """A base model by the log-probs that llama.cpp wrote of a text, as Checkpoint by its folder.

    Layout: MAGIC; int32 n_ctx, n_vocab, n_chunk; int32 tokens [n_chunk, n_ctx]; for each chunk the
    n_ctx - 1 - n_ctx // 2 rows that score its second half, of uint16: scale and minimum, each a
    float32, then n_vocab codes, then one more where n_vocab is odd. A log-prob is scale · code +
    minimum, in steps of up to 16 / 65535 = 2.4e-4 nats; lower ones than the largest - 16 have
    code 0.
    """

    adapter = None

    def __init__(self, argument: str, name: str) -> None:
        self.argument, self.name = argument, name
        with told(argument, "a logits base file of llama.cpp", repr(name), "write it anew"):
            context, self.rows, chunks = (
                int(each) for each in np.fromfile(name, "<i4", 3, offset=len(MAGIC))
            )
            start = len(MAGIC) + 12
            self.tokens = np.fromfile(name, "<i4", context * chunks, offset=start)
            self.tokens = self.tokens.reshape(chunks, context).astype(np.int64)
            scored, width = context - 1 - context // 2, 2 * ((self.rows + 1) // 2) + HEADER
            # Copy on write: torch takes no memory that cannot be written to.
            self.codes = np.memmap(name, "<i2", "c", start + 4 * context * chunks).reshape(
                chunks, scored, width
            )
        self.scheme = Scheme(context, context, "second-half")
        self.config = SimpleNamespace(get_text_config=dict)
        self.about: dict[str, Any] = {
            "name": readable(name),
            "class": "logits base file of llama.cpp",
            "dtype": "uint16 codes",
            "adapter": None,
            "bytes": os.path.getsize(name),
            "vocabulary": self.rows,
            "logit_scale": 1.0,
            "logit_softcap": None,
        }

    def tables(self, tokenizer: TextTokenizer) -> list[pd.DataFrame]:
        """Make a document of each chunk, with the texts that a tokenizer has for its tokens."""
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
        """Note the device on which rows are decoded."""
        self.device = device
        return self

    def states(self, windows: Sequence[Window], title: str) -> list[torch.Tensor]:
        """Look up the coded rows of each window."""
        return [torch.from_numpy(self.codes[each.first // self.scheme.window]) for each in windows]

    def logits(self, rows: torch.Tensor, vocabulary: int) -> torch.Tensor:
        """Decode rows to log-probs [n, vocabulary], float32, computed as llama.cpp does."""
        scale, low = rows[:, :HEADER].contiguous().view(torch.float32).to(self.device).split(1, -1)
        codes = rows[:, HEADER : HEADER + vocabulary].to(self.device).int() & 0xFFFF
        return torch.addcmul(low, scale, codes.float())

    def values(
        self, log_p: torch.Tensor, logits_b: torch.Tensor, tokens: torch.Tensor
    ) -> pd.DataFrame:
        """Compute columns of values from decoded log-probs and logits [n, V].

        Divergences and A's entropy are those of the tokens above LOWEST, over which both models are
        normalised: rounded log-probs add up to 1 within about 1e-4 only, and that error would be
        one of the KL; what the file leaves out is in neither. B's entropy is over the same tokens,
        log-probs of the text and expected tokens are over the whole vocabulary. Two columns more:
        kld, as llama.cpp adds it up without normalising; outside, B's probability of tokens that
        the file leaves out.
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
        return values.assign(**{name: each.cpu().numpy() for name, each in whole.items()})

    def note(self, scored: pd.DataFrame) -> str:
        """Say what the file's rounding does to the figures."""
        return (
            f"A's log-probabilities are rounded to steps of up to 2.4e-4 nats and end {LOWEST:g} "
            f"nats down, beyond which B has {scored['outside'].mean():.2g} of its probability. "
            f"llama.cpp's KLD adds them up as they are: its mean is {scored['kld'].mean():.4g}, "
            f"and {(scored['kld'] < 0).sum():,} of {len(scored):,} tokens have one below 0. Here "
            f"both models are normalised over the tokens above, and no KL is negative: the mean is "
            f"{scored['kl_ab'].mean():.4g}."
        )


# ---- the table

QUANTILES = {
    "KLD": (99.9, 99.0, 95.0, 90.0, 50.0, 10.0, 5.0, 1.0, 0.1),
    "Δp": (99.9, 99.0, 95.0, 90.0, 75.0, 50.0, 25.0, 10.0, 5.0, 1.0, 0.1),
}
NAMED = {100.0: "Maximum", 50.0: "Median ", 0.0: "Minimum"}


def llama_table(scored: pd.DataFrame) -> str:
    """Print the table of llama.cpp's --kl-divergence of the tokens with values.

    Errors are those of a mean of independent tokens, sqrt(var / (n - 1)); Q is B. The KLD of two
    models is the exact KL(A‖B), that of a base file as the tool adds it up.
    """
    count = len(scored)
    nll_q, nll_base = -scored["logprob_b"].to_numpy(), -scored["logprob_a"].to_numpy()
    kld = scored["kld" if "kld" in scored else "kl_ab"].to_numpy()
    change = np.exp(-nll_q) - np.exp(-nll_base)
    (q, error_q), (base, error_base) = _mean(nll_q), _mean(nll_base)
    covariance = ((nll_q * nll_base).mean() - q * base) / (count - 1)
    ratio_error = math.sqrt(max(0.0, error_q**2 + error_base**2 - 2 * covariance))
    ppl_q, ppl_base, ratio = math.exp(q), math.exp(base), math.exp(q - base)
    off_q, off_base = ppl_q * error_q, ppl_base * error_base
    off = math.sqrt(max(0.0, off_q**2 + off_base**2 - 2 * ppl_q * ppl_base * covariance))
    correlation = covariance / (error_q * error_base) if error_q * error_base else math.nan
    mse, mse_error = _mean(change**2)
    rms, same = math.sqrt(mse), scored["same_top1"].mean()
    same_error = math.sqrt(same * (1 - same) / (count - 1))
    lines = [
        "====== Perplexity statistics ======",
        f"Mean PPL(Q)                   : {ppl_q:10.6f} ± {off_q:10.6f}",
        f"Mean PPL(base)                : {ppl_base:10.6f} ± {off_base:10.6f}",
        f"Cor(ln(PPL(Q)), ln(PPL(base))): {100 * correlation:6.2f}%",
        f"Mean ln(PPL(Q)/PPL(base))     : {q - base:10.6f} ± {ratio_error:10.6f}",
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
    return "\n".join(lines)


def _mean(values: np.ndarray) -> tuple[float, float]:
    """Return the mean and its standard error."""
    return float(values.mean()), math.sqrt(values.var() / (len(values) - 1))


def _quantiles(name: str, values: np.ndarray, form: str) -> list[str]:
    levels = (100.0, *QUANTILES[name], 0.0)
    return [
        f"{NAMED.get(level, f'{level:4.1f}%  ')} {name}: {form.format(value)}"
        for level, value in zip(levels, np.percentile(values, levels), strict=True)
    ]
