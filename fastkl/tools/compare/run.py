"""The comparison from checkpoints and files to the report."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import torch

import fastkl

from ..files import json_text, write_whole
from . import adapters, html, inputs, loading, report, summary, text
from .measure import Pass, measure
from .settings import DEFAULT_CONTEXT, STDIN, STDOUT, CompareError, Settings
from .store import Store, readable


def run_compare(settings: Settings, color: bool | None = None) -> int:
    """Compare, print the report on stdout and write the files asked for; the exit code. color None: where stdout is a terminal that has colours.

    With a file on stdout, the report goes to stderr. Raises CompareError for what cannot be compared.
    """
    start = time.perf_counter()
    try:
        with _signals_are_exits():
            settings = dataclasses.replace(settings, text=inputs.files(settings.text))
            check_files(settings)
            with contextlib.closing(Store()) as store:
                tokenizer, result = compare(settings, store)
                result["seconds"] = time.perf_counter() - start
                _write(settings.json, [json_text(result)])
                _write(settings.html, html.page(result, store, functools.lru_cache(1 << 16)(tokenizer.label)))
            _show(settings, result, color)
    except BrokenPipeError:
        raise
    except OSError as error:
        what = f"{error.strerror or error}{f' ({readable(error.filename)})' if error.filename else ''}"
        return _fail(f"{what}; remedy: room for the output, and for temporary files in {tempfile.gettempdir()} (see TMPDIR)")
    except torch.OutOfMemoryError as error:
        return _fail(f"out of memory ({str(error).splitlines()[0]}); remedy: --sequential, a smaller --context, or --dtype bfloat16")
    return 0


def _show(settings: Settings, result: dict, color: bool | None) -> None:
    """Print the report; OSError where standard output takes no more of it."""
    outputs = [path for path in (settings.html, settings.json) if path]
    out = sys.stderr if STDOUT in outputs else sys.stdout
    color = out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" if color is None else color
    shown = report.text_report(result, color, max(20, min(160, shutil.get_terminal_size((120, 24)).columns)))
    if outputs:
        shown += f"\n\nwrote {' and '.join('stdout' if path == STDOUT else readable(path) for path in outputs)}"
    encoding = out.encoding or "ascii"
    _flushed(out, [f"{shown}\n".encode(encoding, errors="replace").decode(encoding)])


def _flushed(out: IO, parts: Iterable) -> None:
    """Write all parts and flush; where that fails, Python is kept from a second try at exit."""
    try:
        for part in parts:
            out.write(part)
        out.flush()
    except OSError:
        with contextlib.suppress(OSError):  # one that has no number, as in tests
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        raise


def compare(settings: Settings, store: Store) -> tuple[text.TextTokenizer, dict]:
    """Fill the store; the report as one dictionary, and the tokenizer for the labels of tokens."""
    loading.quiet()
    named = {"A": ("MODEL_A", settings.model_a), "B": ("MODEL_B", settings.model_b)}
    configs = [loading.load_config(*model) for model in named.values()]
    context, overlap = choose_windows(settings, configs)
    tokenizers = {letter: text.TextTokenizer(loading.load_tokenizer(*named[letter]))
                  for letter in settings.tokenizer or named}
    vocabulary = _vocabulary(named, configs, tokenizers)
    skipped = _read(settings.text, store, tokenizers, vocabulary)
    loads = [functools.partial(loading.load_model, *model, settings.dtype, settings.device) for model in named.values()]
    models = measure(Pass(store, context, overlap), *loads, vocabulary, sequential=settings.sequential)
    tokenizer = next(iter(tokenizers.values()))
    label = tokenizer.label
    figures, top = summary.summarise(store), [summary.token_entry(store, at, label) for at in summary.worst_tokens(store, settings.top)]
    units = [unit.entry(store) for unit in summary.worst_units(store, settings.by, settings.top)]
    without = sum(store.tokens(document.start, document.first)["id"].tolist() != tokenizer.prefix
                  for document in store.documents)
    left_out = {letter: [{"id": number, "token": token} for number, token in tokens]
                for letter, tokens in vocabulary.alone.items()}
    return tokenizer, {
        "sentence": report.sentence(figures, units, top, settings.by, models), "models": models, "by": settings.by, "shown": settings.top,
        "text": {"files": [_name(path) for path in settings.text if path not in skipped], "skipped": [_name(path) for path in skipped],
                 "documents": len(store.documents), "not_scored": without, "tokenizer": settings.tokenizer, "vocabulary": vocabulary.size,
                 "left_out": left_out, "context": context, "overlap": overlap},
        "summary": figures, "units": units, "top": top, "versions": {"fastkl": fastkl.__version__, "torch": torch.__version__},
    }


def _vocabulary(named: dict[str, tuple[str, str]], configs: list,
                tokenizers: dict[str, text.TextTokenizer]) -> text.Vocabulary:
    """Choose the tokens to compare; an error, before the models load, where an lm_head lacks some."""
    rows = {letter: getattr(config.get_text_config(), "vocab_size", None)
            for letter, config in zip(named, configs, strict=True)}
    letter, tokenizer = next(iter(tokenizers.items()))
    if len(tokenizers) > 1:
        vocabulary = text.shared_vocabulary(*tokenizers.values())
    else:
        vocabulary = text.whole_vocabulary(letter, tokenizer, rows["AB"[letter == "A"]])
    for letter, count in rows.items():
        if count is not None and count < vocabulary.size:
            raise loading.too_few_rows(*named[letter], vocabulary.size, count)
    return vocabulary


def _read(paths: tuple[Path, ...], store: Store, tokenizers: dict[str, text.TextTokenizer],
          vocabulary: text.Vocabulary) -> list[Path]:
    """Fill the store with tokens; return the files that hold no document."""
    letter, tokenizer = next(iter(tokenizers.items()))
    base = os.path.commonpath([path.absolute().parent for path in paths if path != STDIN] or ["."])
    skipped = []
    for path in paths:
        name, held = _name(path) if path == STDIN else readable(os.path.relpath(path, base)), False
        for source in inputs.sources(path, tokenizer.own, f"MODEL_{letter}"):
            numbered = name if source.line is None else f"{name}#{source.line}"
            held |= text.add_document(store, source, numbered, tokenizers, vocabulary)
        skipped += [] if held else [path]
    if not store.documents:
        got = f"fewer than 2 tokens in {' and in '.join(repr(str(path)) for path in skipped)}"
        raise CompareError("--text", "files with text", got, "check the names")
    return skipped


def _name(path: Path) -> str:
    return "standard input" if path == STDIN else readable(path)


def choose_windows(settings: Settings, configs: Iterable) -> tuple[int, int]:
    """(context, overlap): within what both models can take."""
    limits = [getattr(config.get_text_config(), "max_position_embeddings", None) for config in configs]
    limit = min([limit for limit in limits if isinstance(limit, int) and limit > 0], default=None)
    context = settings.context or min(DEFAULT_CONTEXT, limit or DEFAULT_CONTEXT)
    if limit and context > limit:
        raise CompareError("--context", f"at most {limit} (max_position_embeddings)", str(context), f"--context {limit} or less")
    overlap = context // 4 if settings.overlap is None else settings.overlap
    if overlap >= context:
        raise CompareError("--overlap", f"fewer tokens than --context ({context})", str(overlap), "a smaller --overlap, or a larger --context")
    return context, overlap


def check_files(settings: Settings) -> None:
    """What can be read and written, each file for one purpose, found out before the work and not after it."""
    uses: dict[object, str] = {}

    def claim(option: str, path: Path) -> None:
        # What is no regular file, such as a pipe, may have many uses. os.path says no where pathlib raises, as for a name that is too long.
        if os.path.isfile(path) or not os.path.exists(path):
            if _identity(path) in uses:
                raise CompareError(option, "a file that has no other use", f"{str(path)!r}, {uses[_identity(path)]} too", "choose another name")
            uses[_identity(path)] = option

    for path in settings.text:
        if path != STDIN:
            claim("--text", path)
    if settings.text.count(STDIN) > 1 or STDIN in settings.text and sys.stdin is None:
        got = "- twice" if sys.stdin else "a closed one"
        raise CompareError("--text", "standard input to be open, and read once", got, "pass - once, or name files")
    named = (("MODEL_A", settings.model_a), ("MODEL_B", settings.model_b))
    found = [adapters.find_adapter(*model) for model in named if os.path.isdir(model[1])]
    for folder in filter(os.path.isdir, (settings.model_a, settings.model_b, *(adapter.base for adapter in found if adapter))):
        uses |= {_identity(path): "a model's" for path in Path(folder).iterdir()}
    for option, path in (("--html", settings.html), ("--json", settings.json)):
        if path is not None:
            claim(option, path)
    inputs.check_outputs(settings.html, settings.json)


def _identity(path: Path) -> object:
    """The same for all names of a file."""
    return (os.stat(path).st_dev, os.stat(path).st_ino) if os.path.exists(path) else os.path.realpath(path)


def _write(path: Path | None, parts: Iterable[str]) -> None:
    if path == STDOUT:
        _flushed(sys.stdout.buffer, (part.encode() for part in parts))
    elif path:
        write_whole(path, parts)


@contextlib.contextmanager
def _signals_are_exits() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into SystemExit, so that half a file is removed.

    Python allows handlers to the main thread alone. A signal that is ignored, as under nohup, stays so.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            if number not in before and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _fail(message: str) -> int:
    """Say what went wrong while running."""
    print(f"fastkl compare: error: {' '.join(message.split())}", file=sys.stderr)
    return 1
