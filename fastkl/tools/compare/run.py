"""The comparison from arguments to report: models and text, shares of processes, files."""

import contextlib
import itertools
import os
import shutil
import string
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

import fastkl

from ..errors import expect
from ..files import STDIN, STDOUT, json_text, write_whole
from . import candidates, figures, inputs, page, report
from .inputs import Document, TextTokenizer, Vocabulary, readable
from .llama_cpp import LogitsFile, is_base_file, llama_table
from .loading import Checkpoint, InMemory
from .measure import measure
from .processes import gathered
from .reference import ReferenceFile, Text, save_reference
from .windows import Window, choose_scheme, longest, windows_of

LETTERS = string.ascii_uppercase


class Comparison(NamedTuple):
    """A base beside one candidate.

    report: every figure, as `fastkl compare --json` writes it. tokens: a table of all tokens, NaN
    where one has no values. tokenizer: whose tokens they are. Its str is the report as text.
    """

    report: dict[str, Any]
    tokens: pd.DataFrame
    tokenizer: TextTokenizer

    def __str__(self) -> str:
        return report.text_report(self.report, 110)

    def llama_table(self) -> str:
        """Return the table that llama.cpp's --kl-divergence prints, field by field."""
        return llama_table(figures.scored_of(self.tokens))


# ---- models and text


class Floor(Checkpoint):
    """The base again, computed in bfloat16, or in float32 where bfloat16 is the base's type."""

    def __init__(self, base: Checkpoint) -> None:
        super().__init__("MODEL_floor", base.name)
        self.base = base

    def load(self, dtype: str, device: str) -> Any:
        """Load it in the other type."""
        return super().load("float32" if self.base.dtype == "bfloat16" else "bfloat16", device)


def open_models(settings: Namespace) -> tuple[Any, list[Any]]:
    """Open base and candidates by their names, before anything large is loaded."""
    name = settings.model_a
    kind = (
        LogitsFile
        if is_base_file(name)
        else ReferenceFile
        if os.path.isfile(name) and name.endswith(".safetensors")
        else Checkpoint
    )
    base: Any = kind("MODEL_A", name)
    others: list[Any] = [
        Checkpoint(f"MODEL_{letter}", other)
        for letter, other in zip(LETTERS[1:], settings.candidates, strict=False)
    ]
    for option, given in (
        ("--floor", settings.floor),
        ("--save-reference", settings.save_reference),
    ):
        expect(
            not given or kind is Checkpoint,
            option,
            "a base by its folder or hub name",
            f"{name!r}, a file without the base's layers",
            "pass the model itself as MODEL_A",
        )
    return base, others + ([Floor(base)] if settings.floor else [])


class Read(NamedTuple):
    """A text in tokens: its tables, the windows, and what the report says of it."""

    tables: list[pd.DataFrame]
    windows: list[Window]
    vocabulary: Vocabulary
    tokenizer: TextTokenizer
    text: Text
    skipped: list[str]


def read_text(settings: Namespace, base: Any, others: Sequence[Any]) -> Read:
    """Read the text with the models' tokenizers, and cut it into windows."""
    models = {each.argument.removeprefix("MODEL_"): each for each in (base, *others)}
    models.pop("floor", None)
    in_file = isinstance(base, LogitsFile | ReferenceFile)
    given = settings.text or settings.window or settings.stride or settings.score
    expect(
        not in_file or not given,
        "--text, --window, --stride, --score",
        "none of them, for MODEL_A's file holds its text and windows",
        "one",
        "leave it out",
    )
    limit = longest(model.config for model in models.values())
    letters = settings.tokenizer or ("B" if isinstance(base, LogitsFile) else [*models])
    tokenizers = {letter: models[letter].tokenizer() for letter in letters}
    tokenizer, rows = next(iter(tokenizers.values())), {k: each.rows for k, each in models.items()}
    if isinstance(base, LogitsFile):
        vocabulary = Vocabulary(base.rows, frozenset(), {letter: [] for letter in models})
        text, tables = Text([base.name], [], base.scheme), base.tables(tokenizer)
        skipped: list[str] = []
    else:
        vocabulary = inputs.shared_vocabulary(tokenizers, rows)
    for model in models.values():
        expect(
            model.rows is None or model.rows >= vocabulary.size,
            model.argument,
            f"an lm_head of at least {vocabulary.size} rows, for the tokenizer's ids",
            f"{model.rows} in {model.name!r}",
            "pass the checkpoint that belongs to this tokenizer, or choose --tokenizer",
        )
    if isinstance(base, ReferenceFile):
        text = base.text
    elif not in_file:
        scheme = choose_scheme(settings, limit)
        files = [readable(path) for path in settings.text]
        documents = settings.documents or inputs.documents_of(settings.text, tokenizer.own)
        text = Text(files, documents, scheme)
    if not isinstance(base, LogitsFile):
        tables, skipped = inputs.read(text.files, text.documents, tokenizers, vocabulary)
    expect(
        text.scheme.window <= limit,
        "--window",
        f"at most {limit} (max_position_embeddings)",
        str(text.scheme.window),
        f"--window {limit} or less, for a file in A's place a new one",
    )
    windows = windows_of(tables, text.scheme, tokenizer.prefix)
    return Read(tables, windows, vocabulary, tokenizer, text, skipped)


# ---- shares of processes


def compare(
    settings: Namespace, base: Any, others: Sequence[Any]
) -> tuple[list[Comparison], dict[str, Any]]:
    """Compare each candidate with the base; return that, and what the report says of the text."""
    shared, (read, about) = gathered(partial(compare_share, settings, base, others))
    table = pd.concat(read.tables, ignore_index=True)
    described = {
        "by": settings.by,
        "shown": settings.top,
        "text": {
            "files": [file for file in read.text.files if file not in read.skipped],
            "skipped": read.skipped,
            "documents": len(read.tables),
            "tokenizer": settings.tokenizer,
            "vocabulary": read.vocabulary.size,
            "left_out": {
                letter: [{"id": number, "token": token} for number, token in alone]
                for letter, alone in read.vocabulary.alone.items()
            },
            **read.text.scheme._asdict(),
        },
        "versions": {"fastkl": fastkl.__version__, "torch": torch.__version__},
    }
    comparisons = []
    for at, model in enumerate(about[1:]):
        parts = itertools.chain(*(values[at] for _, values in shared))
        tokens = table.join(pd.concat(parts))
        result = {
            "sentence": "",
            "letter": others[at].argument.removeprefix("MODEL_"),
            "models": [about[0], model],
            **described,
            "summary": figures.summarise(tokens),
            "buckets": figures.buckets(tokens),
            "histogram": figures.histogram(tokens),
            "positions": figures.positions(tokens),
            "units": figures.worst_units(tokens, settings.by, settings.top),
            "top": figures.worst_tokens(tokens, settings.top, read.tokenizer.label),
            "note": base.note(figures.scored_of(tokens)) if "kld" in tokens else "",
        }
        result["sentence"] = report.sentence(result)
        comparisons.append(Comparison(result, tokens, read.tokenizer))
    return comparisons, about[0] | described


def compare_share(
    settings: Namespace, base: Any, others: Sequence[Any], rank: int, count: int
) -> tuple[Any, tuple[Read, list[dict[str, Any]]]]:
    """Compute the values of every count-th window; return (a digest of the whole text, they), and
    the text and what the models say of themselves.
    """
    expect(
        count == 1 or STDIN not in settings.text,
        "--text",
        "files, which every process reads",
        "'-'",
        "write the text to a file",
    )
    expect(
        count == 1 or not settings.save_reference,
        "--save-reference",
        "one process",
        str(count),
        "write the file without torchrun",
    )
    if settings.device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    read = read_text(settings, base, others)

    def save(model: Any, states: Sequence[torch.Tensor]) -> None:
        if settings.save_reference:
            save_reference(
                settings.save_reference, read.text, read.tokenizer, model, read.windows, states
            )

    values, about = measure(
        base, others, read.windows[rank::count], read.vocabulary, settings, save
    )
    digest = int(pd.util.hash_pandas_object(pd.concat(read.tables, ignore_index=True)).sum())
    return (digest, values), (read, about)


# ---- the command, and models in memory


def run_compare(settings: Namespace) -> int:
    """Compare, print the report and write the files asked for; return the exit code.

    With a file on stdout, the report goes to stderr. Of the processes of torchrun the first alone
    does it. Raises UseError for what cannot be compared.
    """
    start = time.perf_counter()
    found, base = compare(settings, *open_models(settings))
    floor = found.pop() if settings.floor else None
    for each in found:
        each.report["floor"] = floor and floor.report["summary"]
        each.report["seconds"] = time.perf_counter() - start
    width = max(20, min(160, shutil.get_terminal_size((120, 24)).columns))
    if len(found) == 1:
        whole, text = found[0].report, partial(report.text_report, width=width)
    else:
        whole, text = candidates.overview(base, found, floor), partial(candidates.text, width=width)
    outputs: dict[Path | None, Callable[[], Any]] = {
        settings.json: lambda: [json_text(whole)],
        settings.html: lambda: page.page(
            *found[0][:2], lru_cache(1 << 16)(found[0].tokenizer.label)
        ),
        settings.tokens: lambda: candidates.table_of_tokens(found, settings.tokens),
        settings.plot: lambda: candidates.picture(found, floor, settings.plot.suffix[1:]),
    }
    paths = [path for path in outputs if path]
    for path in paths:
        write_whole(path, outputs[path]())
    out = sys.stderr if STDOUT in paths else sys.stdout
    if settings.format == "llama.cpp":
        for each in found:
            model = report.model_line(each.report["letter"], each.report["models"][1])
            print(f"{model}\n\n{each.llama_table()}\n", file=out)
    elif found:
        print(text(whole), file=out)
    paths += [settings.save_reference] if settings.save_reference else []
    if paths:
        print(f"\nwrote {' and '.join(map(readable, paths))}", file=out)
    return 0


def compare_models(  # noqa: PLR0913
    model_a: Any,
    model_b: Any,
    texts: Sequence[str],
    tokenizer: Any,
    *,
    window: int | None = None,
    stride: int | None = None,
    score: str = "all",
    by: str = "document",
    top: int = 10,
) -> Comparison:
    """Compare two causal language models in memory on texts, as `fastkl compare` does files.

    Args:
        model_a, model_b: of transformers, PEFT models too, on any device and in any mode: they run
            in eval() and are left as they were.
        texts: the documents.
        tokenizer: a fast tokenizer, whose ids both models read.
        window, stride, score, by, top: the options of the command of these names.

    Returns:
        A Comparison: print it, or take `report`, a dictionary of all figures, and `tokens`, a
        pandas.DataFrame of the values of every token.

    Raises fastkl.tools.errors.UseError for what cannot be compared.
    """
    expect(
        not isinstance(texts, str) and all(isinstance(each, str) for each in texts),
        "texts",
        "a list of str",
        type(texts).__name__,
        "put a single text in a list",
    )
    base, other = (
        InMemory(f"MODEL_{letter}", model, tokenizer)
        for letter, model in (("A", model_a), ("B", model_b))
    )
    settings = Namespace(
        text=(Path("texts"),),
        documents=[
            Document("texts", f"#{number}", text, False) for number, text in enumerate(texts, 1)
        ],
        tokenizer="A",
        device=str(base.model.device),
        dtype="auto",
        format="report",
        save_reference=None,
        window=window,
        stride=stride,
        score=score,
        by=by,
        top=top,
    )
    with contextlib.ExitStack() as restored:
        for module in (*base.model.modules(), *other.model.modules()):
            restored.callback(setattr, module, "training", module.training)
        base.model.eval()
        other.model.eval()
        (found,), _ = compare(settings, base, [other])
    return found
