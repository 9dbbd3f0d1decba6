"""The comparison from checkpoints and files to the report."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch

import fastkl

from ..files import json_text, write_whole
from . import html, loading, report, summary
from .measure import Pass, measure
from .settings import DEFAULT_CONTEXT, CompareError, Settings
from .store import Store
from .text import TextTokenizer, add_document, pieces


def run_compare(settings: Settings, color: bool | None = None) -> int:
    """Compare, print the report on stdout and write the files asked for; the exit code. color None: where stdout is a terminal.

    Raises CompareError for what cannot be compared.
    """
    start = time.perf_counter()
    check_files(settings)
    try:
        with tempfile.TemporaryDirectory(prefix="fastkl-compare-") as folder, contextlib.closing(Store(Path(folder))) as store:
            tokenizer, result = compare(settings, store)
            result["seconds"] = time.perf_counter() - start
            if settings.json:
                write_whole(settings.json, [json_text(result)])
            if settings.html:
                write_whole(settings.html, html.page(result, store, functools.lru_cache(1 << 16)(tokenizer.label)))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return fail(f"no space left ({error.strerror}; temporary files are in {tempfile.gettempdir()}); remedy: set TMPDIR to a larger disk")
    except torch.OutOfMemoryError as error:
        return fail(f"out of memory ({str(error).splitlines()[0]}); remedy: --sequential, a smaller --context, or --dtype bfloat16")
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ if color is None else color
    text = report.text_report(result, color, max(80, min(160, shutil.get_terminal_size((120, 24)).columns)))
    encoding = sys.stdout.encoding or "ascii"
    print(text.encode(encoding, errors="replace").decode(encoding))
    written = [str(path) for path in (settings.html, settings.json) if path]
    if written:
        print(f"\nwrote {' and '.join(written)}")
    return 0


def compare(settings: Settings, store: Store) -> tuple[TextTokenizer, dict]:
    """Fill the store; the report as one dictionary, and the tokenizer for the labels of tokens."""
    loading.quiet()
    named = (("MODEL_A", settings.model_a), ("MODEL_B", settings.model_b))
    configs = [loading.load_config(*model) for model in named]
    tokenizers = [loading.load_tokenizer(*model) for model in named]
    needed = loading.check_tokenizers(*tokenizers)
    context, stride = choose_windows(settings, configs)
    tokenizer, other = (TextTokenizer(each) for each in tokenizers)
    check_same_tokens(tokenizer, other, settings.text[0])
    base = os.path.commonpath([path.absolute().parent for path in settings.text])
    for path in settings.text:
        add_document(store, path, os.path.relpath(path, base), tokenizer)
    loads = [functools.partial(loading.load_model, *model, settings.dtype, settings.device) for model in named]
    models = measure(Pass(store, context, stride, progress), *loads, needed, sequential=settings.sequential)
    figures, top = summary.summarise(store), [summary.token_entry(store, at, tokenizer.label) for at in summary.worst_tokens(store, settings.top)]
    units = [unit.entry(store) for unit in summary.worst_units(store, settings.by, settings.top)]
    return tokenizer, {
        "sentence": report.sentence(figures, units, top, settings.by), "models": models, "by": settings.by, "shown": settings.top,
        "text": {"files": [str(path) for path in settings.text], "not_scored": 0 if tokenizer.prefix else len(store.documents),
                 "vocabulary": min(model["vocabulary"] for model in models), "context": context, "stride": stride},
        "summary": figures, "units": units, "top": top, "versions": {"fastkl": fastkl.__version__, "torch": torch.__version__},
    }


def choose_windows(settings: Settings, configs: Iterable) -> tuple[int, int]:
    """(context, stride): within what both models can take."""
    limits = [getattr(config.get_text_config(), "max_position_embeddings", None) for config in configs]
    limit = min([limit for limit in limits if isinstance(limit, int) and limit > 0], default=None)
    context = settings.context or min(DEFAULT_CONTEXT, limit or DEFAULT_CONTEXT)
    if limit and context > limit:
        raise CompareError("--context", f"at most {limit} (max_position_embeddings)", str(context), f"--context {limit} or less")
    stride = context // 4 if settings.stride is None else settings.stride
    if stride >= context:
        raise CompareError("--stride", f"fewer tokens than --context ({context})", str(stride), "a smaller --stride, or a larger --context")
    return context, stride


def check_same_tokens(a: TextTokenizer, b: TextTokenizer, path: Path) -> None:
    """Tokenizers of one vocabulary may still cut a text differently: the beginning of the first file tells."""
    text = next(pieces(path), "")
    first, second = (tokenizer.prefix + tokenizer.encode(text)[0] for tokenizer in (a, b))
    if first != second:
        at = next((at for at, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), min(len(first), len(second)))
        said = [repr(each.label(ids[at])) if at < len(ids) else "nothing" for each, ids in ((a, first), (b, second))]
        raise CompareError("MODEL_B", "the tokenizer of MODEL_A", f"other tokens for the same text: number {at + 1} of {path} is {said[0]} in A and "
                           f"{said[1]} in B", "compare models whose tokenizer.json and tokenizer_config.json agree")


def check_files(settings: Settings) -> None:
    """Files that can be read and written, found out before the work and not after it."""
    for path in settings.text:
        if not path.is_file() or not path.stat().st_size:
            got = f"the empty file {str(path)!r}" if path.is_file() else f"{str(path)!r}, {'a folder' if path.is_dir() else 'which does not exist'}"
            raise CompareError("--text", "files with text", got, "check the name, or leave it out")
    for option, path in (("--html", settings.html), ("--json", settings.json)):
        if path is not None and (path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK)):
            raise CompareError(option, "a file in a folder that can be written to", repr(str(path)), "choose another name")


def progress(title: str, total: int):
    """A bar on stderr: a terminal gets a moving one, a log file a line now and then."""
    from tqdm import tqdm

    interval = 0.1 if sys.stderr.isatty() else 15.0
    return tqdm(desc=f"{title:<14}", total=total, unit=" tokens", unit_scale=True, dynamic_ncols=True, mininterval=interval, maxinterval=interval)


def fail(message: str) -> int:
    """Say what went wrong while running."""
    print(f"fastkl compare: error: {' '.join(message.split())}", file=sys.stderr)
    return 1
