"""What the terminal shows, and the numbers of the JSON file."""

from __future__ import annotations

import functools
import math
import textwrap
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..words import percent

# Mean KL(A‖B) in nats per token below which the word holds; beyond the last: "strongly".
WORDS = ((0.001, "hardly"), (0.03, "slightly"), (0.3, "clearly"))
NAMES = {"kl_ab": "KL(A‖B)", "kl_ba": "KL(B‖A)", "jsd": "JSD"}
# Backgrounds of levels 1, 2, …: from pale yellow to dark red, for a terminal (xterm-256) and for HTML; level 0 has none.
TERMINAL = (230, 229, 222, 215, 209, 203, 196, 160)
DARK_FROM = 7
# Columns that an excerpt needs beside other cells; with fewer it has a line of its own.
LEAST_EXCERPT = 30
# Left-out tokens that the text line names, each model's.
NAMED = 8


class Scale:
    """KL to a level of colour: 0 up to the median, then steps of equal ratio up to the largest."""

    def __init__(self, summary: dict) -> None:
        high = min(summary["kl_ab"]["max"], 1e3)
        low = max(summary["kl_ab"]["p50"], high / 1e3)
        self.bounds = [low * (high / low) ** (step / len(TERMINAL)) for step in range(len(TERMINAL))] if high > low > 0 else []

    def level(self, kl: float) -> int:
        """0 … len(TERMINAL)."""
        return bisect_left(self.bounds, kl)


def visible(text: str) -> str:
    """On one line, and safe to print: what a terminal would obey is shown instead."""
    return "".join(character if character.isprintable() else {"\n": "↵", "\t": "⇥"}.get(character, "·") for character in text)


def about(model: dict) -> str:
    """Format a model's class and type, and for an adapter its kind and base."""
    adapter = model["adapter"]
    changed = f"{adapter['kind']} adapter on {visible(adapter['base'])}, " if adapter else ""
    return f"{changed}{model['class']}, {model['dtype']}"


def sentence(summary: dict, units: list[dict], top: list[dict], by: str, models: Sequence[dict] = ()) -> str:
    """How different the two are, and where, in a sentence; in a second, that rounding may hide an adapter."""
    kl, count = summary["kl_ab"], summary["tokens"]
    if kl["max"] == 0 and summary["kl_ba"]["max"] == 0:
        narrow = next((model["dtype"] for model in models
                       if model["adapter"] and model["dtype"] in ("bfloat16", "float16")), None)
        more = f" A change that {narrow} rounds away shows with --dtype float32." if narrow else ""
        of = f"all {count:,} tokens" if count > 1 else "its only token"
        return f"A and B are the same on this text: the divergence of {of} is exactly 0.{more}"
    word = next((word for bound, word in WORDS if kl["mean"] < bound), "strongly")
    worst = top[0]
    where = f"before {quoted(worst['token'])} in {place(worst)}, where A expects {expected(worst, 'a')} and B {expected(worst, 'b')}"
    if count == 1:
        return f"B differs {word} from A: KL(A‖B) is {kl['mean']:.3g} nats at the only token, {where}."
    parts = [f"B differs {word} from A: KL(A‖B) is {kl['mean']:.3g} nats per token and B expects another next token at "
             f"{percent(1 - summary['same_top1'], 1)} of the {count:,} tokens"]
    if summary["share_above_p99"] > 0:
        parts.append(f"the 1% of tokens that differ most hold {percent(summary['share_above_p99'])} of it")
    if len(units) > 1:
        first, last = units[0], units[-1]
        parts.append(f"the worst line is {place(first)} ({first['kl_ab']:.3g})" if by == "line" else
                     f"documents go from {last['kl_ab']:.3g} ({place(last)}) to {first['kl_ab']:.3g} ({place(first)})")
    return "; ".join([*parts, f"most of all, with {worst['kl_ab']:.3g}, {where}"]) + "."


class Place(NamedTuple):
    """A cell that leads to a token."""

    text: str
    index: int


class Excerpt(NamedTuple):
    """A cell with a token ("" for none), the text around it, and its level of colour: as much of it as there is room for."""

    before: str
    token: str
    after: str
    level: int


class Table(NamedTuple):
    """Cells are text, of which `title` says what it is; columns align as `align` says, < or > each; the first row is the head."""

    title: str
    align: str
    rows: list[list[str | Place | Excerpt]]


def tables(report: dict, scale: Scale, most: int | None = None) -> list[Table]:
    """The report's tables, for the terminal and the page; most: units to list, if not all that the report has."""
    summary, by, units = report["summary"], report["by"], report["units"][:most]
    keys = ("mean", "p50", "p95", "p99", "max") if summary["tokens"] > 1 else ("mean",)

    def pair(title: str, name: str, form: Callable[[float], float] = float) -> list[str]:
        return [title, *(f"{form(summary[f'{name}_{letter}']):.4g}" for letter in "ab")]

    per_unit = [[f"{unit['kl_ab']:.4g}", f"{unit['max_kl_ab']:.4g}", percent(unit['same_top1'], 1), f"{unit['tokens']:,}",
                 Place(place(unit), unit["index"]), Excerpt("", "", visible(unit["text"]), 0)] for unit in units]
    per_token = [[f"{entry['kl_ab']:.3g}", Place(place(entry), entry["index"]),
                  Excerpt(*(visible(entry[part]) for part in ("before", "token", "after")), scale.level(entry["kl_ab"])),
                  expected(entry, "a"), expected(entry, "b")] for entry in report["top"]]
    listed = [Table("", "<" + ">" * len(keys), [["nats per token", *keys], *(
                  [title, *(f"{summary[name][key]:.4g}" for key in keys)] for name, title in NAMES.items())]),
              Table("", "<>>", [["the whole text", "A", "B"], pair("entropy, nats per token", "entropy"),
                                pair("log-prob of the text, nats per token", "logprob"),
                                pair("perplexity of the text", "logprob", lambda value: math.exp(min(700.0, -value))),
                                ["same top-1 token", percent(summary['same_top1'], 2), ""]])]
    if by == "line" or len(units) > 1:
        of = f" (the {len(units)} worst)" if by == "line" or len(units) < len(report["units"]) else ""
        head = ["mean KL", "max KL", "same top-1", "tokens", by, "text"]
        listed.append(Table(f"{by}s by mean KL(A‖B){of}", ">>>><<", [head, *per_unit]))
    if summary["kl_ab"]["max"] > 0:
        head = ["KL", "place", "text", "A expects", "B expects"]
        listed.append(Table("tokens by KL(A‖B), what each expects at the marked place, given all before it", "><<<<", [head, *per_token]))
    return listed


def text_report(report: dict, color: bool, width: int) -> str:
    """The whole report for a terminal of this width."""
    fill = functools.partial(textwrap.fill, width=min(width, 110), break_long_words=False, break_on_hyphens=False)
    models = [f"{letter}     {model['name']} ({about(model)})" for letter, model in zip("AB", report["models"], strict=True)]
    lines = [fill(report["sentence"]), "", *(fill(line, subsequent_indent=" " * 6) for line in (*models, f"text  {text_line(report)}"))]
    for table in tables(report, Scale(report["summary"]), report["shown"]):
        lines += ["", *([fill(table.title + ":")] if table.title else []), *table_lines(table, color, width)]
    return "\n".join(lines)


def table_lines(table: Table, color: bool, width: int) -> list[str]:
    """Aligned columns, an excerpt in the room that the others leave; where they do not fit, each row goes on in further lines."""
    lengths = [[0 if isinstance(cell, Excerpt) else len(cell if isinstance(cell, str) else cell.text) for cell in row] for row in table.rows]
    sizes = [min(max(column), width - 6) for column in zip(*lengths, strict=True)]
    for column, cell in enumerate(table.rows[-1]):
        if isinstance(cell, Excerpt):
            room = width - sum(sizes) + sizes[column] - 2 * len(sizes)
            sizes[column] = room if room >= LEAST_EXCERPT else width - 6
    parts, used = [[]], 0
    for column, size in enumerate(sizes):
        if parts[-1] and used + 2 + size > width:
            parts, used = [*parts, []], 4
        parts[-1].append(column)
        used += 2 + size
    return ["  ".join(["" if part is parts[0] else " " * 4, *(_cell(row[at], sizes[at], table.align[at], color) for at in part)]).rstrip()
            for row in table.rows for part in parts]


def _cell(cell: str | Place | Excerpt, size: int, align: str, color: bool) -> str:
    if not isinstance(cell, Excerpt):
        text = cell if isinstance(cell, str) else cell.text
        return f"{text if len(text) <= size else text[:size - 1] + '…':{align}{size}}"
    token = cell.token[:min(24, size - 2)]
    room = size - len(token) - 2 * bool(token)
    before = cell.before[max(0, len(cell.before) - 2 * room // 3):]
    after = cell.after[:room - len(before)]
    pad = " " * (room - len(before) - len(after))
    if color and cell.level:
        token = f"\x1b[48;5;{TERMINAL[cell.level - 1]}m\x1b[38;5;{231 if cell.level >= DARK_FROM else 16}m{token}\x1b[0m"
    return f"{before}«{token}»{after}{pad}" if token else f"{before}{after}{pad}"


def text_line(report: dict) -> str:
    """What was read, and how."""
    text, models, count = report["text"], report["models"], report["summary"]["tokens"]
    rows = [about["vocabulary"] for about in models]
    cut = "" if set(rows) == {text["vocabulary"]} else f" (that of the tokenizer; lm_heads of {rows[0]} and {rows[1]} rows are cut to it)"
    left_out = f"; not scored, without a context: {text['not_scored']}" if text["not_scored"] else ""
    skipped = f"; skipped, with fewer than 2 tokens: {visible(', '.join(text['skipped']))}" if text["skipped"] else ""
    files = f"{len(text['files'])} files" if len(text["files"]) > 1 else visible(text["files"][0])
    documents = f", {text['documents']:,} documents" if text["documents"] > len(text["files"]) else ""
    return (f"{files}{documents}, {count:,} token{'s' if count > 1 else ''}{left_out}{skipped}; "
            f"vocabulary {text['vocabulary']}{cut}{_alone(text)}; windows of {text['context']} tokens, overlap {text['overlap']}")


def _alone(text: dict) -> str:
    """Name the tokens that are not compared, because one model alone has them."""
    parts = []
    for letter, tokens in text["left_out"].items():
        if tokens:
            named = [*(quoted(entry["token"]) for entry in tokens[:NAMED]), *["…"][:len(tokens) - NAMED > 0]]
            parts.append(f"{letter} alone has {len(tokens):,} ({', '.join(named)})")
    whose = f", read with {text['tokenizer']}'s tokenizer" if text["tokenizer"] else ""
    return whose + (f"; tokens left out: {' and '.join(parts)}" if parts else "")


def quoted(token: str) -> str:
    """A token between quotes, so that its spaces can be seen."""
    return f"'{visible(token)[:24]}'"


def expected(entry: dict, letter: str) -> str:
    """The most likely token at an entry's place, and its probability."""
    most_likely = entry[f"expected_{letter}"]
    return f"{quoted(most_likely['token'])} {percent(most_likely['probability'])}"


def place(entry: dict) -> str:
    """File and line."""
    name = visible(entry["document"])
    return name if entry["line"] is None else f"{name}:{entry['line']}"
