"""The comparison from checkpoints and files to the report: load, measure, summarise, report."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import fastkl

from ..errors import UseError
from ..files import json_text, write_whole
from . import STDIN, STDOUT, Settings, inputs, loading, measure, report
from .inputs import readable

# At most this many tokens of context where --context is left out.
DEFAULT_CONTEXT = 1024


def run_compare(settings: Settings) -> int:
    """Compare, print the report and write the files asked for; return the exit code.

    With a file on stdout, the report goes to stderr. Raises UseError for what cannot be compared.
    """
    start = time.perf_counter()
    tokenizer, tokens, result = compare(settings)
    result["seconds"] = time.perf_counter() - start
    label = functools.lru_cache(1 << 16)(tokenizer.label)
    files: dict[Path | None, Iterable[str]] = {settings.json: [json_text(result)]}
    files[settings.html] = report.page(result, tokens, label)
    outputs = [path for path in files if path]
    for path in outputs:
        if path == STDOUT:
            sys.stdout.buffer.writelines(part.encode() for part in files[path])
        else:
            write_whole(path, files[path])
    out = sys.stderr if STDOUT in outputs else sys.stdout
    width = shutil.get_terminal_size((120, 24)).columns
    print(report.text_report(result, max(20, min(160, width))), file=out)
    if outputs:
        print(f"\nwrote {' and '.join(map(readable, outputs))}", file=out)
    return 0


def compare(
    settings: Settings,
) -> tuple[inputs.TextTokenizer, pd.DataFrame, dict[str, Any]]:
    """Return the tokenizer for labels, the table of tokens, and the report as one dictionary."""
    loading.quiet()
    models = {
        "A": loading.Checkpoint("MODEL_A", settings.model_a),
        "B": loading.Checkpoint("MODEL_B", settings.model_b),
    }
    context, overlap = choose_windows(settings, [model.config for model in models.values()])
    tokenizers = {letter: models[letter].tokenizer() for letter in settings.tokenizer or models}
    rows = {letter: model.rows for letter, model in models.items()}
    vocabulary = inputs.shared_vocabulary(tokenizers, rows)
    for letter, model in models.items():
        if (lm_head := rows[letter]) is not None and lm_head < vocabulary.size:
            expected = f"an lm_head of at least {vocabulary.size} rows, for the tokenizer's ids"
            remedy = "pass the checkpoint that belongs to this tokenizer, or choose --tokenizer"
            raise UseError(model.argument, expected, f"{lm_head} in {model.name!r}", remedy)
    documents, skipped = read(settings.text, tokenizers, vocabulary)
    loads = [
        functools.partial(model.load, settings.dtype, settings.device) for model in models.values()
    ]
    tokens, about = measure.measure(documents, loads, vocabulary, context, overlap)
    tokenizer = next(iter(tokenizers.values()))
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
        "summary": measure.summarise(tokens),
        "units": measure.worst_units(tokens, settings.by, settings.top),
        "top": measure.worst_tokens(tokens, settings.top, tokenizer.label),
        "versions": {"fastkl": fastkl.__version__, "torch": torch.__version__},
    }
    return tokenizer, tokens, {**result, "sentence": report.sentence(result)}


def read(
    paths: Iterable[Path],
    tokenizers: dict[str, inputs.TextTokenizer],
    vocabulary: inputs.Vocabulary,
) -> tuple[list[inputs.Document], list[Path]]:
    """Return the documents of at least 2 tokens, and the files that hold none."""
    tokenizer, found, skipped = next(iter(tokenizers.values())), [], []
    folders = [path.absolute().parent for path in paths if path != STDIN]
    base = os.path.commonpath(folders or [Path()])
    for path in paths:
        name = "-" if path == STDIN else readable(os.path.relpath(path, base))
        made = [
            inputs.read_document(name + suffix, text, chat, tokenizers, vocabulary)
            for suffix, text, chat in inputs.documents(path, tokenizer.own)
        ]
        long = [document for document in made if len(document.ids) > document.first]
        found += long
        skipped += [] if long else [path]
    if not found:
        got = f"fewer than 2 tokens in {' and in '.join(repr(str(path)) for path in skipped)}"
        raise UseError("--text", "files with text", got, "check the names")
    return found, skipped


def choose_windows(settings: Settings, configs: Iterable[Any]) -> tuple[int, int]:
    """Choose (context, overlap), within what both models can take."""
    limits = [
        getattr(config.get_text_config(), "max_position_embeddings", None) for config in configs
    ]
    limit = min([each for each in limits if isinstance(each, int) and each > 0], default=1 << 60)
    context = settings.context or min(DEFAULT_CONTEXT, limit)
    if context > limit:
        expected = f"at most {limit} (max_position_embeddings)"
        raise UseError("--context", expected, str(context), f"--context {limit} or less")
    overlap = context // 4 if settings.overlap is None else settings.overlap
    if overlap >= context:
        expected = f"fewer tokens than --context ({context})"
        remedy = "a smaller --overlap, or a larger --context"
        raise UseError("--overlap", expected, str(overlap), remedy)
    return context, overlap
