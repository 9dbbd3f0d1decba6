"""The comparison from checkpoints and files to the report: load, measure, summarise, report."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import fastkl

from ..console import say
from ..files import json_text, write_whole
from . import STDIN, STDOUT, CompareError, Settings, inputs, loading, measure, report
from .inputs import readable

# At most this many tokens of context where --context is left out.
DEFAULT_CONTEXT = 1024


def run_compare(settings: Settings, color: bool | None = None) -> int:
    """Compare, print the report and write the files asked for; return the exit code.

    color None: where stdout is a terminal that has colours. With a file on stdout, the report goes
    to stderr. Raises CompareError for what cannot be compared.
    """
    start, store = time.perf_counter(), measure.Store()
    try:
        tokenizer, result = compare(settings, store)
        result["seconds"] = time.perf_counter() - start
        label = functools.lru_cache(1 << 16)(tokenizer.label)
        files: dict[Path | None, Iterable[str]] = {settings.json: [json_text(result)]}
        files[settings.html] = report.page(result, store, label)
        for path, parts in files.items():
            if path not in (None, STDOUT):
                write_whole(path, parts)
    except OSError as error:
        file = f" ({readable(error.filename)})" if error.filename else ""
        room = f"room for the output, and for temporary files in {tempfile.gettempdir()}"
        message = f"{error.strerror or error}{file}; remedy: {room} (see TMPDIR)"
    except torch.OutOfMemoryError as error:
        remedy = "--sequential, a smaller --context, or --dtype bfloat16"
        message = f"out of memory ({str(error).splitlines()[0]}); remedy: {remedy}"
    else:
        # An output that takes no more is the command line's to tell.
        for part in files.get(STDOUT, ()):
            sys.stdout.buffer.write(part.encode())
        _show(settings, result, color)
        return 0
    print(f"fastkl compare: error: {' '.join(message.split())}", file=sys.stderr)
    return 1


def compare(
    settings: Settings, store: measure.Store
) -> tuple[inputs.TextTokenizer, dict[str, Any]]:
    """Fill the store; return the tokenizer for labels, and the report as one dictionary."""
    loading.quiet()
    paths = inputs.files(settings.text)
    named = {"A": ("MODEL_A", settings.model_a), "B": ("MODEL_B", settings.model_b)}
    models = {letter: loading.Checkpoint(*model) for letter, model in named.items()}
    check_files(
        settings, paths, [each for model in models.values() for each in (model.name, model.source)]
    )
    context, overlap = choose_windows(settings, [model.config for model in models.values()])
    tokenizers = {letter: models[letter].tokenizer() for letter in settings.tokenizer or models}
    rows = {letter: model.rows for letter, model in models.items()}
    vocabulary = inputs.shared_vocabulary(tokenizers, rows)
    for letter, model in models.items():
        if (lm_head := rows[letter]) is not None and lm_head < vocabulary.size:
            expected = f"an lm_head of at least {vocabulary.size} rows, for the tokenizer's ids"
            remedy = "pass the checkpoint that belongs to this tokenizer, or choose --tokenizer"
            raise CompareError(model.argument, expected, f"{lm_head} in {model.name!r}", remedy)
    skipped = _read(paths, store, tokenizers, vocabulary)
    about = measure.measure(
        store,
        [
            functools.partial(model.load, settings.dtype, settings.device)
            for model in models.values()
        ],
        vocabulary,
        context,
        overlap,
        sequential=settings.sequential,
    )
    tokenizer = next(iter(tokenizers.values()))
    fronts = [store.tokens["id"][each.start : each.first].tolist() for each in store.documents]
    left_out = {
        letter: [{"id": number, "token": token} for number, token in tokens]
        for letter, tokens in vocabulary.alone.items()
    }
    result = {
        "sentence": "",
        "models": about,
        "by": settings.by,
        "shown": settings.top,
        "text": {
            "files": [readable(path) for path in paths if path not in skipped],
            "skipped": [readable(path) for path in skipped],
            "documents": len(store.documents),
            "not_scored": sum(front != tokenizer.prefix for front in fronts),
            "tokenizer": settings.tokenizer,
            "vocabulary": vocabulary.size,
            "left_out": left_out,
            "context": context,
            "overlap": overlap,
        },
        "summary": measure.summarise(store),
        "units": measure.worst_units(store, settings.by, settings.top),
        "top": measure.worst_tokens(store, settings.top, tokenizer.label),
        "versions": {"fastkl": fastkl.__version__, "torch": torch.__version__},
    }
    return tokenizer, {**result, "sentence": report.sentence(result)}


def _read(
    paths: tuple[Path, ...],
    store: measure.Store,
    tokenizers: dict[str, inputs.TextTokenizer],
    vocabulary: inputs.Vocabulary,
) -> list[Path]:
    """Fill the store with tokens; return the files that hold no document."""
    letter, tokenizer = next(iter(tokenizers.items()))
    base = os.path.commonpath(
        [path.absolute().parent for path in paths if path != STDIN] or [Path()]
    )
    skipped = []
    for path in paths:
        name = readable(path if path == STDIN else os.path.relpath(path, base))
        before = len(store.documents)
        for suffix, text, chat in inputs.documents(path, tokenizer.own, f"MODEL_{letter}"):
            inputs.add_document(store, name + suffix, text, chat, tokenizers, vocabulary)
        skipped += [path] * (len(store.documents) == before)
    if not store.documents:
        got = f"fewer than 2 tokens in {' and in '.join(repr(str(path)) for path in skipped)}"
        raise CompareError("--text", "files with text", got, "check the names")
    store.seal()
    return skipped


def choose_windows(settings: Settings, configs: Iterable[Any]) -> tuple[int, int]:
    """Choose (context, overlap), within what both models can take."""
    limits = [
        getattr(config.get_text_config(), "max_position_embeddings", None) for config in configs
    ]
    limit = min([each for each in limits if isinstance(each, int) and each > 0], default=1 << 60)
    context = settings.context or min(DEFAULT_CONTEXT, limit)
    if context > limit:
        expected = f"at most {limit} (max_position_embeddings)"
        raise CompareError("--context", expected, str(context), f"--context {limit} or less")
    overlap = context // 4 if settings.overlap is None else settings.overlap
    if overlap >= context:
        expected = f"fewer tokens than --context ({context})"
        remedy = "a smaller --overlap, or a larger --context"
        raise CompareError("--overlap", expected, str(overlap), remedy)
    return context, overlap


def check_files(settings: Settings, texts: Iterable[Path], folders: Iterable[str]) -> None:
    """Refuse, before the work and not after it, a file with two uses; folders: the models'."""
    uses: dict[str, str] = {}
    for folder in filter(os.path.isdir, folders):
        uses |= {os.path.realpath(path): "a model's" for path in Path(folder).iterdir()}
    named: list[tuple[str, Path | None]] = [("--text", path) for path in texts]
    for option, path in (*named, ("--html", settings.html), ("--json", settings.json)):
        # A pipe may have many uses. os.path returns False where pathlib raises.
        if path is None or os.path.exists(path) and not os.path.isfile(path):
            continue
        place = os.path.realpath(path) if path != STDIN else f"{option == '--text'}"
        if place in uses:
            got = f"{str(path)!r}, {uses[place]} too"
            raise CompareError(option, "a file that has no other use", got, "choose another name")
        uses[place] = option
    inputs.check_outputs(settings.html, settings.json)


def _show(settings: Settings, result: dict[str, Any], color: bool | None) -> None:
    """Print the report."""
    outputs = [path for path in (settings.html, settings.json) if path]
    out = sys.stderr if STDOUT in outputs else sys.stdout
    if color is None:
        dumb = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        color = out.isatty() and not dumb
    width = shutil.get_terminal_size((120, 24)).columns
    shown = report.text_report(result, max(20, min(160, width)), color)
    if outputs:
        names = ("stdout" if path == STDOUT else readable(path) for path in outputs)
        shown += f"\n\nwrote {' and '.join(names)}"
    say(shown, out)
