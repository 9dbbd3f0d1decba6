"""The comparison: the values of every token, their figures, and all of it from files to report."""

import gc
import itertools
import math
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch

import fastkl
from fastkl.rl import KLMonitor

from ..console import progress
from ..errors import expect
from ..files import STDIN, STDOUT, json_text, write_whole
from . import inputs, report
from .inputs import Vocabulary, readable
from .loading import Checkpoint, Model, head_logits
from .processes import gathered

# At most this many tokens of context where --context is left out.
DEFAULT_CONTEXT = 1024
DIVERGENCES = ("kl_ab", "kl_ba", "jsd")
MEANS = (*DIVERGENCES, "entropy_a", "entropy_b", "logprob_a", "logprob_b")
# Logits of one model in a block: about five tensors of this many float32 are alive at a time.
BLOCK_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 27}


# ---- from windows to values


def choose_windows(settings: Namespace, configs: Iterable[Any]) -> tuple[int, int]:
    """Choose (context, overlap), within what both models can take."""
    limits = [
        getattr(config.get_text_config(), "max_position_embeddings", None) for config in configs
    ]
    limit = min([each for each in limits if isinstance(each, int) and each > 0], default=1 << 60)
    context = settings.context or min(DEFAULT_CONTEXT, limit)
    expect(
        context <= limit,
        "--context",
        f"at most {limit} (max_position_embeddings)",
        str(context),
        f"--context {limit} or less",
    )
    overlap = context // 4 if settings.overlap is None else settings.overlap
    expect(
        overlap < context,
        "--overlap",
        f"fewer tokens than --context ({context})",
        str(overlap),
        "a smaller --overlap, or a larger --context",
    )
    return context, overlap


def windows(first: int, count: int, context: int, overlap: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, first, last): reading start … last - 2 gives distributions of first … last - 1.

    A window reads at most `context` tokens, beginning with the last `overlap` of the one before;
    every token from `first` to `count` - 1 is scored in exactly one.
    """
    start = 0
    while first < count:
        last = min(start + context + 1, count)
        yield start, first, last
        start, first = last - 1 - overlap, last


@torch.inference_mode()
def measure(
    documents: Sequence[pd.DataFrame],
    loads: Sequence[Callable[[], Model]],
    vocabulary: Vocabulary,
    context: int,
    overlap: int,
    share: slice,
) -> tuple[list[pd.DataFrame], list[dict[str, Any]]]:
    """Compute the values of the tokens of each window in this share of them; describe A and B.

    One model is loaded after the other. A's hidden states wait on the CPU, and only its head stays
    in memory.
    """
    spans = []
    for document in documents:
        ids, first = torch.tensor(document["id"].to_numpy()), int((~document["scored"]).sum())
        spans += [(ids, *span) for span in windows(first, len(ids), context, overlap)]
    heads, about, states = [], [], []
    for letter, load in zip("AB", loads, strict=True):
        model = load()
        model.check(spans[0][0][:context])
        states.append(
            [
                model.hidden(ids[start : last - 1])[first - 1 - start :].cpu()
                for ids, start, first, last in progress(spans[share], f"model {letter}")
            ]
        )
        heads.append(model.head)
        about.append(model.about)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    return [
        token_values(heads, hidden, ids[first:last], vocabulary)
        for (ids, _, first, last), *hidden in zip(spans[share], *states, strict=True)
    ], about


def token_values(
    heads: Sequence[fastkl.Head],
    hidden: Sequence[torch.Tensor],
    tokens: torch.Tensor,
    vocabulary: Vocabulary,
) -> pd.DataFrame:
    """Compute columns of values from hidden states [n, H] of A and B and the tokens [n] after them,
    wherever these are.

    The logits are float32 for 16-bit models, too (linear_token_stats' logits_dtype=torch.float32),
    and are made once: statistics and mixture read the same block. Tokens that are not compared have
    probability 0.
    """
    device = heads[0].weight.device
    step = max(1, BLOCK_LOGITS.get(device.type, 1 << 27) // vocabulary.size)
    none = torch.tensor(sorted(vocabulary.unshared), dtype=torch.long, device=device)
    blocks = []
    for *states, following in zip(*(each.split(step) for each in (*hidden, tokens)), strict=True):
        logits_a, logits_b = (
            head_logits(head, each.to(device), vocabulary.size).index_fill_(1, none, -math.inf)
            for head, each in zip(heads, states, strict=True)
        )
        blocks.append(block_values(logits_a, logits_b, following.to(device)))
    values = pd.concat(blocks)
    for letter in "ab":
        expect(
            not values[f"logprob_{letter}"].isna().any(),
            f"MODEL_{letter.upper()}",
            "finite logits",
            "NaN on this text",
            "--dtype float32 or bfloat16",
        )
    return values


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
    # One copy from the device; float64 holds a token's id as well.
    stacked = torch.stack([column.double() for column in columns.values()]).cpu().numpy()
    return pd.DataFrame(dict(zip(columns, stacked, strict=True)))


# ---- figures


def summarise(tokens: pd.DataFrame) -> dict[str, Any]:
    """Compute means and exact quantiles over all tokens with values."""
    scored = tokens[tokens["kl_ab"].notna()]
    summary: dict[str, Any] = {
        "tokens": len(scored),
        **scored[["same_top1", *MEANS[len(DIVERGENCES) :]]].mean().to_dict(),
    }
    for name in DIVERGENCES:
        figures = KLMonitor(spike=False).update(torch.from_numpy(np.array(scored[name].abs())))
        summary[name] = {key: figures[f"kl/{key}"] for key in ("mean", "p50", "p95", "p99", "max")}
    return summary


def worst_units(tokens: pd.DataFrame, by: str, limit: int) -> list[dict[str, Any]]:
    """List units by falling mean KL(A‖B): every document, or the `limit` worst lines."""
    keys = ["document", "line"] if by == "line" else ["document"]
    texts = tokens.groupby(keys, sort=False)["text"].agg("".join).str.strip().str[:80]
    groups = tokens[tokens["kl_ab"].notna()].reset_index().groupby(keys, sort=False)
    units = groups[[*DIVERGENCES, "same_top1"]].mean()
    units = units.assign(
        max_kl_ab=groups["kl_ab"].max(),
        tokens=groups.size(),
        index=groups["index"].first(),
        text=texts,
    ).sort_values("kl_ab", ascending=False, kind="stable")
    return cast(
        list[dict[str, Any]],
        units[: limit if by == "line" else None].reset_index().to_dict("records"),
    )


def worst_tokens(
    tokens: pd.DataFrame, limit: int, label: Callable[[int], str], around: int = 24
) -> list[dict[str, Any]]:
    """Describe the tokens with the largest KL(A‖B), in falling order, the earlier of equals first.

    An entry has the text around the token, its values, and the token that each model expects there.
    """
    scored = tokens[tokens["kl_ab"].notna()]
    entries = []
    for at, row in scored.sort_values("kl_ab", ascending=False, kind="stable")[:limit].iterrows():
        near = tokens[max(0, at - around) : at + 1 + around]
        near = near[near["document"] == row["document"]]["text"]
        entries.append(
            {
                "index": at,
                "document": row["document"],
                "line": row["line"],
                "token": row["text"] or label(row["id"]),
                "before": "".join(near[near.index < at]),
                "after": "".join(near[near.index > at]),
                **{name: row[name] for name in MEANS},
                **{
                    f"expected_{letter}": {
                        "token": label(int(row[f"top_{letter}"])),
                        "probability": math.exp(row[f"top_logprob_{letter}"]),
                    }
                    for letter in "ab"
                },
            }
        )
    return entries


# ---- the whole of it


def run_compare(settings: Namespace) -> int:
    """Compare, print the report and write the files asked for; return the exit code.

    With a file on stdout, the report goes to stderr. Of the processes of torchrun the first alone
    does it. Raises UseError for what cannot be compared.
    """
    start = time.perf_counter()
    tokenizer, tokens, result = compare(settings)
    result["seconds"] = time.perf_counter() - start
    files: dict[Path | None, Iterable[str]] = {
        settings.json: [json_text(result)],
        settings.html: report.page(result, tokens, lru_cache(1 << 16)(tokenizer.label)),
    }
    outputs = [path for path in files if path]
    for path in outputs:
        write_whole(path, files[path])
    out = sys.stderr if STDOUT in outputs else sys.stdout
    width = max(20, min(160, shutil.get_terminal_size((120, 24)).columns))
    print(report.text_report(result, width), file=out)
    if outputs:
        print(f"\nwrote {' and '.join(map(readable, outputs))}", file=out)
    return 0


Compared = tuple[inputs.TextTokenizer, pd.DataFrame, dict[str, Any]]


def compare(settings: Namespace) -> Compared:
    """Return the tokenizer for labels, the table of tokens, NaN where one has no values, and the
    report as one dictionary.
    """
    shared, (tokenizer, table, result) = gathered(partial(compare_share, settings))
    # Windows were dealt out in turn.
    turns = itertools.zip_longest(*(values for _, values in shared))
    parts = [part for turn in turns for part in turn if part is not None]
    tokens = table.join(pd.concat(parts).set_index(table.index[table["scored"]]))
    result |= {
        "summary": summarise(tokens),
        "units": worst_units(tokens, settings.by, settings.top),
        "top": worst_tokens(tokens, settings.top, tokenizer.label),
        "versions": {"fastkl": fastkl.__version__, "torch": torch.__version__},
    }
    return tokenizer, tokens, {**result, "sentence": report.sentence(result)}


def compare_share(settings: Namespace, rank: int, count: int) -> tuple[Any, Compared]:
    """Compute the values of every count-th window; return (a digest of the whole text, they), and
    the results of compare without values.
    """
    expect(
        count == 1 or STDIN not in settings.text,
        "--text",
        "files, which every process reads",
        "'-'",
        "write the text to a file",
    )
    if settings.device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    models = {
        "A": Checkpoint("MODEL_A", settings.model_a),
        "B": Checkpoint("MODEL_B", settings.model_b),
    }
    context, overlap = choose_windows(settings, [model.config for model in models.values()])
    tokenizers = {letter: models[letter].tokenizer() for letter in settings.tokenizer or models}
    vocabulary = inputs.shared_vocabulary(
        tokenizers, {letter: model.rows for letter, model in models.items()}
    )
    for model in models.values():
        expect(
            model.rows is None or model.rows >= vocabulary.size,
            model.argument,
            f"an lm_head of at least {vocabulary.size} rows, for the tokenizer's ids",
            f"{model.rows} in {model.name!r}",
            "pass the checkpoint that belongs to this tokenizer, or choose --tokenizer",
        )
    documents, skipped = inputs.read(settings.text, tokenizers, vocabulary)
    values, about = measure(
        documents,
        [partial(model.load, settings.dtype, settings.device) for model in models.values()],
        vocabulary,
        context,
        overlap,
        share=slice(rank, None, count),
    )
    table = pd.concat(documents, ignore_index=True)
    result = {
        "sentence": "",
        "models": about,
        "by": settings.by,
        "shown": settings.top,
        "text": {
            "files": [readable(path) for path in settings.text if path not in skipped],
            "skipped": [readable(path) for path in skipped],
            "documents": len(documents),
            "tokenizer": settings.tokenizer,
            "vocabulary": vocabulary.size,
            "left_out": {
                letter: [{"id": number, "token": token} for number, token in alone]
                for letter, alone in vocabulary.alone.items()
            },
            "context": context,
            "overlap": overlap,
        },
    }
    digest = int(pd.util.hash_pandas_object(table).sum())
    return (digest, values), (next(iter(tokenizers.values())), table, result)
