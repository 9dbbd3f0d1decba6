"""Values of every token, for each candidate against the base, window by window."""

import gc
import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch

import fastkl

from ..errors import expect
from .inputs import Vocabulary
from .windows import Window

# Logits of one model in a block; about five float32 tensors of this size are alive at a time.
BLOCK_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 27}


@torch.no_grad()
def measure(
    base: Any,
    candidates: Sequence[Any],
    windows: Sequence[Window],
    vocabulary: Vocabulary,
    settings: Namespace,
    save: Callable[[Any, Sequence[torch.Tensor]], None],
) -> tuple[list[list[pd.DataFrame]], list[dict[str, Any]]]:
    """Compute the values of each window's tokens for every candidate; describe the models.

    Models are loaded one at a time. The base's hidden states are kept on the CPU, and only its head
    stays loaded. If the base is also a candidate, it is loaded again in another dtype: bfloat16, or
    float32 if the base is bfloat16. save: called with the base and its states if
    settings.save_reference is set.
    """
    model = base.load(settings.dtype, settings.device)
    states, logits, about = [*model.states(windows, "model A")], model.logits, [model.about]
    values_of = getattr(model, "values", block_values)
    if settings.save_reference:
        save(model, states)
    found: list[list[pd.DataFrame]] = []
    block = BLOCK_LOGITS.get(torch.device(settings.device).type, BLOCK_LOGITS["cuda"])
    for candidate in candidates:
        model = None  # free its memory for the next one
        gc.collect()
        torch.cuda.empty_cache()
        other = "float32" if about[0]["dtype"] == "bfloat16" else "bfloat16"
        model = candidate.load(other if candidate is base else settings.dtype, settings.device)
        theirs = model.states(windows, f"model {candidate.letter}")
        about.append(model.about)
        found.append([])
        for window, own, other in zip(windows, states, theirs, strict=True):
            values = token_values(
                (logits, model.logits), (own, other), window.tokens, vocabulary, block, values_of
            )
            for column, model_of in (
                ("logprob_a", base),
                ("logprob_b", candidate),
                ("kl_ab", base),
            ):
                expect(
                    not values[column].isna().any(),
                    model_of.argument,
                    "finite logits",
                    "NaN on this text",
                    "--dtype float32 or bfloat16, or write a file anew",
                )
            index = range(window.first, window.first + len(values))
            found[-1].append(values.set_axis(index).assign(window=window.first))
    return found, about


def token_values(
    logits: Sequence[Callable[[torch.Tensor, int], torch.Tensor]],
    states: Sequence[torch.Tensor],
    tokens: torch.Tensor,
    vocabulary: Vocabulary,
    block: int,
    values_of: Callable[..., pd.DataFrame],
) -> pd.DataFrame:
    """Compute columns of values from the states [n, …] of A and B and the tokens [n] that follow.

    Any device. The logits are float32 for 16-bit models too, as with linear_token_stats'
    logits_dtype=torch.float32. They are computed once, at most `block` of each model at a time, and
    shared by all values. Tokens that are not compared have probability 0.
    """
    step = max(1, block // vocabulary.size)
    none, blocks = torch.tensor(sorted(vocabulary.unshared), dtype=torch.long), []
    for *both, following in zip(*(each.split(step) for each in (*states, tokens)), strict=True):
        made = [make(each, vocabulary.size) for make, each in zip(logits, both, strict=True)]
        device = made[0].device
        made = [each.to(device).index_fill_(1, none.to(device), -math.inf) for each in made]
        blocks.append(values_of(*made, following.to(device)))
    return pd.concat(blocks, ignore_index=True)


def block_values(
    logits_a: torch.Tensor, logits_b: torch.Tensor, tokens: torch.Tensor
) -> pd.DataFrame:
    """Compute columns of values from logits [n, V]."""
    top_a, top_b = logits_a.argmax(-1), logits_b.argmax(-1)
    stats = fastkl.token_stats(logits_a, tokens, logits_b)
    of_b = fastkl.token_stats(logits_b, top_b)
    columns = {
        "kl_ab": stats.kl,
        "kl_ba": stats.ref_kl,
        "jsd": fastkl.js_divergence(logits_a, logits_b),
        "tv": fastkl.total_variation(logits_a, logits_b),
        "entropy_a": stats.entropy,
        "entropy_b": of_b.entropy,
        "logprob_a": stats.logprob,
        "logprob_b": stats.ref_logprob,
        "top_logprob_a": fastkl.selective_log_softmax(logits_a, top_a),
        "top_logprob_b": of_b.logprob,
        "top_a": top_a,
        "top_b": top_b,
        "same_top1": top_a == top_b,
    }
    # A single copy from the device; float64 represents token ids exactly.
    stacked = torch.stack([column.double() for column in columns.values()]).cpu().numpy()
    return pd.DataFrame(dict(zip(columns, stacked, strict=True)))
