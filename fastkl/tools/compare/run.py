"""Run a comparison from arguments to report: models, text, processes, files."""

import contextlib
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

from ..errors import UseError, expect
from ..files import STDIN, STDOUT, json_text, write_whole
from . import candidates, figures, inputs, page, report
from .inputs import Document, TextTokenizer, Vocabulary, readable
from .llama_cpp import LogitsFile, is_base_file, llama_table
from .loading import Checkpoint, InMemory
from .measure import measure
from .processes import gathered
from .reference import ReferenceFile, Text, save_reference
from .windows import Window, choose_scheme, longest, windows_of


class Comparison(NamedTuple):
    """Comparison of a base with one candidate.

    report: every figure, as written by `fastkl compare --json`. tokens: a table of all tokens, NaN
    for a token without values. tokenizer: the tokenizer of these tokens. str() gives the report as
    text.
    """

    report: dict[str, Any]
    tokens: pd.DataFrame
    tokenizer: TextTokenizer

    def __str__(self) -> str:
        return report.text_report(self.report, 110)

    def llama_table(self) -> str:
        """Return the table of llama.cpp's --kl-divergence, with the same fields."""
        return llama_table(figures.scored_of(self.tokens))


# ---- models and text


def open_models(settings: Namespace) -> tuple[Any, list[Any]]:
    """Open the base and the candidates by name, before anything large is loaded.

    A base has letter, name, rows, tokenizer() and load(dtype, device), which returns an object with
    about, states and logits. With settings.floor the base itself is the last candidate.
    """
    name = settings.model_a
    kind: Any = (
        LogitsFile
        if is_base_file(name)
        else ReferenceFile
        if os.path.isfile(name) and name.endswith(".safetensors")
        else Checkpoint
    )
    layers = ("floor", "save_reference")
    text = ("text", "window", "stride", "score", "tokenizer")
    for option in layers + text if kind is not Checkpoint else ():
        expect(
            not getattr(settings, option),
            f"--{option.replace('_', '-')}",
            "a model as MODEL_A"
            if option in layers
            else "nothing, for MODEL_A has text and tokens",
            f"the file {name!r}",
            "pass the base by its folder or hub name" if option in layers else "leave it out",
        )
    base = kind("A", name)
    others = [*map(Checkpoint, string.ascii_uppercase[1:], settings.candidates)]
    return base, others + [base] * settings.floor


class Read(NamedTuple):
    """A tokenized text: its tables, its windows, and its description for the report."""

    tables: list[pd.DataFrame]
    windows: list[Window]
    vocabulary: Vocabulary
    tokenizer: TextTokenizer
    text: Text
    skipped: list[str]


def read_text(settings: Namespace, base: Any, others: Sequence[Any]) -> Read:
    """Tokenize the text with the models' tokenizers, and cut it into windows."""
    models = {each.letter: each for each in (base, *others)}
    coded = isinstance(base, LogitsFile)
    letters = [settings.tokenizer] if settings.tokenizer else [*models][coded:]
    expect(
        letters[0] in models,
        "--tokenizer",
        "a model's letter",
        f"{letters[0]}, of which there is none",
        "leave it out",
    )
    tokenizers = {letter: models[letter].tokenizer() for letter in letters}
    tokenizer = tokenizers[letters[0]]
    vocabulary = inputs.shared_vocabulary(
        tokenizers, {letter: model.rows for letter, model in models.items()}
    )
    if coded:
        vocabulary = Vocabulary(base.rows, frozenset(), {letter: [] for letter in models})
    for model in models.values():
        expect(
            model.rows is None or model.rows >= vocabulary.size,
            model.argument,
            f"an lm_head of at least {vocabulary.size} rows, for the tokenizer's ids",
            f"{model.rows} in {model.name!r}",
            "pass the checkpoint that belongs to this tokenizer, or choose --tokenizer",
        )
    limit = longest(model.config for model in models.values() if hasattr(model, "config"))
    if hasattr(base, "text"):
        text = base.text
    else:
        files = [readable(path) for path in settings.text]
        documents = settings.documents or inputs.documents_of(settings.text, tokenizer.own)
        text = Text(files, documents, choose_scheme(settings, limit))
    expect(
        text.scheme.window <= limit,
        "--window",
        f"at most {limit} (max_position_embeddings)",
        str(text.scheme.window),
        f"--window {limit} or less; a file as MODEL_A keeps its window",
    )
    tables, skipped = (
        (base.tables(tokenizer), list[str]())
        if coded
        else inputs.read(text.files, text.documents, tokenizers, vocabulary)
    )
    windows = windows_of(tables, text.scheme, tokenizer.prefix)
    return Read(tables, windows, vocabulary, tokenizer, text, skipped)


# ---- shares of processes


def compare_share(
    settings: Namespace, base: Any, others: Sequence[Any], rank: int, count: int
) -> tuple[tuple[int, list[list[pd.DataFrame]]], tuple[Read, list[dict[str, Any]]]]:
    """Compute the values of every count-th window; return (digest of the text, values by candidate
    and window) and (text, descriptions of the models).
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
    save = partial(save_reference, settings.save_reference, read.text, read.tokenizer, read.windows)
    values, about = measure(
        base, others, read.windows[rank::count], read.vocabulary, settings, save
    )
    digest = sum(int(pd.util.hash_pandas_object(table).sum()) for table in read.tables)
    return (digest, values), (read, about)


def join(
    settings: Namespace, base: Any, others: Sequence[Any], shared: Sequence[Any], own: Any
) -> tuple[list[Comparison], dict[str, Any]]:
    """Join the shares; return each candidate's comparison, and a description of base and text."""
    read, about = own
    table = pd.concat(read.tables, ignore_index=True)
    scored = {table["document"].iat[window.first] for window in read.windows}
    described = {
        "by": settings.by,
        "shown": settings.top,
        "text": {
            "files": [file for file in read.text.files if file not in read.skipped],
            "skipped": read.skipped,
            "documents": len(scored),
            "too_short": [
                each.name
                for each in read.text.documents
                if each.name not in scored and each.file not in read.skipped
            ],
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
    for at, (other, model) in enumerate(zip(others, about[1:], strict=True)):
        parts = [part for _, values in shared for part in values[at]]
        tokens = table.join(pd.concat(parts))
        result = {
            "letter": other.letter,
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
        comparisons.append(
            Comparison({"sentence": report.sentence(result), **result}, tokens, read.tokenizer)
        )
    return comparisons, about[0] | described


def compare(
    settings: Namespace, base: Any, others: Sequence[Any]
) -> tuple[list[Comparison], dict[str, Any]]:
    """Compare on all processes of torchrun; only the first returns."""
    return join(settings, base, others, *gathered(partial(compare_share, settings, base, others)))


# ---- the command, and models in memory


def run_compare(settings: Namespace) -> int:
    """Compare, print the report and write the files asked for; return the exit code.

    If a file is written to stdout, the report goes to stderr. Under torchrun only the first process
    prints and writes. Raises UseError if the models or the text cannot be compared.
    """
    start = time.perf_counter()
    found, base = compare(settings, *open_models(settings))
    floor = found.pop() if settings.floor else None
    for each in found:
        each.report.update(
            floor=floor and floor.report["summary"], seconds=time.perf_counter() - start
        )
    width = max(20, min(160, shutil.get_terminal_size((120, 24)).columns))
    whole, text = (
        (found[0].report, report.text_report)
        if len(found) == 1
        else (candidates.overview(base, found, floor), candidates.text)
    )
    outputs: dict[Path | None, Callable[[], Any]] = {
        settings.json: lambda: [json_text(whole)],
        settings.html: lambda: page.page(
            *found[0][:2], lru_cache(1 << 16)(found[0].tokenizer.label)
        ),
        settings.tokens: lambda: candidates.table_of_tokens(found, settings.tokens),
        settings.plot: lambda: candidates.picture(found, floor, settings.plot.suffix[1:].lower()),
    }
    paths = [path for path in outputs if path]
    for path in paths:
        write_whole(path, outputs[path]())
    out = sys.stderr if STDOUT in paths else sys.stdout
    if settings.format == "llama.cpp":
        for each in [*found, *([floor] if floor else [])]:
            print(
                report.model_line(each.report["letter"], each.report["models"][1]),
                f"text  {report.text_line(each.report)}",
                f"\n{each.llama_table()}\n",
                sep="\n",
                file=out,
            )
    elif found:
        print(text(whole, width), file=out)
    named = [path for path in (*paths, settings.save_reference) if path and path != STDOUT]
    if named:
        print(f"\nwrote {' and '.join(map(readable, named))}", file=out)
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
    """Compare two causal language models in memory, as `fastkl compare` does for files.

    Args:
        model_a, model_b: models of transformers or PEFT, on any device and in any mode: they run in
            eval() and are left as they were.
        texts: the documents.
        tokenizer: a fast tokenizer; both models take its ids.
        window, stride, score, by, top: the command's options of the same names.

    Returns:
        A Comparison: print it, or take `report`, a dictionary of all figures, and `tokens`, a
        pandas.DataFrame of the values of every token.

    In a distributed job, only the calling process takes part.

    Raises fastkl.tools.errors.UseError if the models or texts cannot be compared.
    """
    expect(
        isinstance(texts, list | tuple) and texts and all(isinstance(x, str) for x in texts),
        "texts",
        "a list of str",
        repr(texts)[:80],
        "put a single text in a list",
    )
    for name, choice, allowed in (
        ("score", score, ("all", "second-half")),
        ("by", by, ("document", "line")),
    ):
        expect(choice in allowed, name, f"one of {allowed}", repr(choice), "choose one")
    for name, number, least in (("window", window, 8), ("stride", stride, 1), ("top", top, 1)):
        holds = (number is None and name != "top") or (isinstance(number, int) and number >= least)
        expect(holds, name, f"an int of at least {least}", repr(number), "pass one")
    settings = Namespace(
        text=(Path("texts"),),
        documents=[
            Document("texts", f"#{number}", text, False) for number, text in enumerate(texts, 1)
        ],
        tokenizer="A",
        dtype="auto",
        format="report",
        save_reference=None,
        window=window,
        stride=stride,
        score=score,
        by=by,
        top=top,
    )
    try:
        base, other = InMemory("A", model_a, tokenizer), InMemory("B", model_b, tokenizer)
        settings.device = str(base.device)
        with contextlib.ExitStack() as restored:
            for module in (*base.model.modules(), *other.model.modules()):
                restored.callback(setattr, module, "training", module.training)
            base.model.eval()
            other.model.eval()
            alone, own = compare_share(settings, base, [other], 0, 1)
    except UseError as error:
        # Name this function's argument instead of the command line's option.
        name, *rest = error.args
        raise UseError(name.removeprefix("--").lower(), *rest) from None
    return join(settings, base, [other], [alone], own)[0][0]
