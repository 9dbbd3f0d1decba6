"""The comparison from checkpoints and files to the report."""

from __future__ import annotations

import contextlib
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

import torch

import fastkl

from ..files import check_writable, json_text, write_whole
from . import html, loading, report, summary, text
from .measure import Pass, measure
from .settings import DEFAULT_CONTEXT, STDOUT, CompareError, Settings
from .store import Store


def run_compare(settings: Settings, color: bool | None = None) -> int:
    """Compare, print the report on stdout and write the files asked for; the exit code. color None: where stdout is a terminal that has colours.

    With a file on stdout, the report goes to stderr. Raises CompareError for what cannot be compared.
    """
    start = time.perf_counter()
    check_files(settings)
    try:
        with _sigterm_is_an_exit(), contextlib.closing(Store()) as store:
            tokenizer, result = compare(settings, store)
            result["seconds"] = time.perf_counter() - start
            _write(settings.json, [json_text(result)])
            _write(settings.html, html.page(result, store, functools.lru_cache(1 << 16)(tokenizer.label)))
    except OSError as error:
        what = f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}"
        return _fail(f"{what}; remedy: room for the output files, and for temporary ones in {tempfile.gettempdir()} (see TMPDIR)")
    except torch.OutOfMemoryError as error:
        return _fail(f"out of memory ({str(error).splitlines()[0]}); remedy: --sequential, a smaller --context, or --dtype bfloat16")
    outputs = [path for path in (settings.html, settings.json) if path]
    out = sys.stderr if STDOUT in outputs else sys.stdout
    color = out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" if color is None else color
    shown = report.text_report(result, color, max(20, min(160, shutil.get_terminal_size((120, 24)).columns)))
    encoding = out.encoding or "ascii"
    print(shown.encode(encoding, errors="replace").decode(encoding), file=out)
    if outputs:
        print(f"\nwrote {' and '.join('stdout' if path == STDOUT else str(path) for path in outputs)}", file=out)
    return 0


def compare(settings: Settings, store: Store) -> tuple[text.TextTokenizer, dict]:
    """Fill the store; the report as one dictionary, and the tokenizer for the labels of tokens."""
    loading.quiet()
    named = (("MODEL_A", settings.model_a), ("MODEL_B", settings.model_b))
    configs = [loading.load_config(*model) for model in named]
    tokenizers = [text.TextTokenizer(loading.load_tokenizer(*model)) for model in named]
    needed = text.check_same_ids(*tokenizers)
    context, overlap = choose_windows(settings, configs)
    base = os.path.commonpath([path.absolute().parent for path in settings.text])
    skipped = [str(path) for path in settings.text if not text.add_document(store, path, os.path.relpath(path, base), *tokenizers)]
    if not store.documents:
        raise CompareError("--text", "files with text", f"fewer than 2 tokens in {' and in '.join(map(repr, skipped))}", "check the names")
    loads = [functools.partial(loading.load_model, *model, settings.dtype, settings.device) for model in named]
    models = measure(Pass(store, context, overlap), *loads, needed, sequential=settings.sequential)
    label = tokenizers[0].label
    figures, top = summary.summarise(store), [summary.token_entry(store, at, label) for at in summary.worst_tokens(store, settings.top)]
    units = [unit.entry(store) for unit in summary.worst_units(store, settings.by, settings.top)]
    return tokenizers[0], {
        "sentence": report.sentence(figures, units, top, settings.by), "models": models, "by": settings.by, "shown": settings.top,
        "text": {"files": [str(path) for path in settings.text if str(path) not in skipped], "skipped": skipped,
                 "not_scored": 0 if tokenizers[0].prefix else len(store.documents), "vocabulary": needed, "context": context, "overlap": overlap},
        "summary": figures, "units": units, "top": top, "versions": {"fastkl": fastkl.__version__, "torch": torch.__version__},
    }


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
        if os.path.isdir(path) or not os.path.exists(path):
            got = f"{str(path)!r}, {'a folder' if os.path.isdir(path) else 'which does not exist'}"
            raise CompareError("--text", "files with text", got, "check the name, or leave it out")
        claim("--text", path)
    for folder in filter(os.path.isdir, (settings.model_a, settings.model_b)):
        uses |= {_identity(path): "a model's" for path in Path(folder).iterdir()}
    for option, path in (("--html", settings.html), ("--json", settings.json)):
        if path is not None:
            claim(option, path)
            try:
                if path != STDOUT:
                    check_writable(path)
            except OSError as error:
                got = f"{str(path)!r} ({error.strerror})"
                raise CompareError(option, "a file in a folder that can be written to", got, "choose another name") from None


def _identity(path: Path) -> object:
    """The same for all names of a file."""
    return (os.stat(path).st_dev, os.stat(path).st_ino) if os.path.exists(path) else os.path.realpath(path)


def _write(path: Path | None, parts: Iterable[str]) -> None:
    if path == STDOUT:
        for part in parts:
            sys.stdout.buffer.write(part.encode())
        sys.stdout.flush()
    elif path:
        write_whole(path, parts)


@contextlib.contextmanager
def _sigterm_is_an_exit() -> Iterator[None]:
    """SIGTERM as an exception, so that half a file is removed; Python allows that to the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _fail(message: str) -> int:
    """Say what went wrong while running."""
    print(f"fastkl compare: error: {' '.join(message.split())}", file=sys.stderr)
    return 1
