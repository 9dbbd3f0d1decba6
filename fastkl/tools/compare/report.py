"""What the terminal shows, and the numbers of the JSON file."""

from __future__ import annotations

import math
import textwrap
from bisect import bisect_left

# Mean KL(A‖B) in nats per token below which the word holds; beyond the last: "strongly".
WORDS = ((0.001, "hardly"), (0.03, "slightly"), (0.3, "clearly"))
UNIT_HEAD = ["mean KL", "max KL", "same top-1", "tokens"]
NAMES = {"kl_ab": "KL(A‖B)", "kl_ba": "KL(B‖A)", "jsd": "JSD"}
# Backgrounds of levels 1, 2, …: from pale yellow to dark red, for a terminal (xterm-256) and for HTML; level 0 has none.
TERMINAL = (230, 229, 222, 215, 209, 203, 196, 160)
DARK_FROM = 7


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


def sentence(summary: dict, units: list[dict], top: list[dict], by: str) -> str:
    """How different the two are, and where, in one sentence."""
    kl = summary["kl_ab"]
    if kl["max"] == 0 and summary["kl_ba"]["max"] == 0:
        return f"A and B are the same on this text: the divergence of all {summary['tokens']:,} tokens is exactly 0."
    word = next((word for bound, word in WORDS if kl["mean"] < bound), "strongly")
    parts = [f"B differs {word} from A: KL(A‖B) is {kl['mean']:.3g} nats per token and B expects another next token at "
             f"{1 - summary['same_top1']:.1%} of the {summary['tokens']:,} tokens"]
    if summary["share_above_p99"] > 0:
        parts.append(f"the 1% of tokens that differ most hold {summary['share_above_p99']:.0%} of it")
    if len(units) > 1:
        first, last = units[0], units[-1]
        parts.append(f"the worst line is {place(first)} ({first['kl_ab']:.3g})" if by == "line" else
                     f"documents go from {last['kl_ab']:.3g} ({place(last)}) to {first['kl_ab']:.3g} ({place(first)})")
    worst = top[0]
    parts.append(f"most of all, with {worst['kl_ab']:.3g}, before {quoted(worst['token'])} in {place(worst)}, where A expects "
                 f"{expected(worst, 'a')} and B {expected(worst, 'b')}")
    return "; ".join(parts) + "."


def text_report(report: dict, color: bool, width: int) -> str:
    """The whole report for a terminal of this width."""
    summary, by = report["summary"], report["by"]
    lines = [textwrap.fill(report["sentence"], min(width, 110)), ""]
    for letter, about in zip("AB", report["models"], strict=True):
        lines.append(f"{letter}     {about['name']} ({about['class']}, {about['dtype']})")
    lines += [f"text  {text_line(report)}", ""]
    for rows in figures(summary):
        lines += [*table(rows), ""]
    units = report["units"][:report["shown"]]
    if by == "line" or len(units) > 1:
        of = f" (the {len(units)} worst)" if by == "line" or len(units) < len(report["units"]) else ""
        names = [place(unit) + ("  " + visible(unit["text"]) if by == "line" else "") for unit in units]
        rows = [[*cells, name] for cells, name in zip(unit_cells(units), names, strict=True)]
        lines += [f"{by}s by mean KL(A‖B){of}:", *table([[*UNIT_HEAD, by], *rows], left=4, width=width), ""]
    if summary["kl_ab"]["max"] > 0:
        lines += ["tokens by KL(A‖B), how the expectations at the marked place differ, given all before it:", *top_lines(report, color, width)]
    return "\n".join(line.rstrip() for line in lines)


def figures(summary: dict) -> list[list[list[str]]]:
    """The tables of the whole text, as rows of cells."""
    keys = ("mean", "p50", "p95", "p99", "max")

    def pair(title: str, name: str, form=float) -> list[str]:
        return [title, *(f"{form(summary[f'{name}_{letter}']):.4g}" for letter in "ab")]

    return [[["nats per token", *keys], *([title, *(f"{summary[name][key]:.4g}" for key in keys)] for name, title in NAMES.items())],
            [["", "A", "B"], pair("entropy, nats per token", "entropy"), pair("log-prob of the text, nats per token", "logprob"),
             pair("perplexity of the text", "logprob", lambda value: math.exp(min(700.0, -value))),
             ["same top-1 token", f"{summary['same_top1']:.2%}", ""]]]


def unit_cells(units: list[dict]) -> list[list[str]]:
    """The figures of each unit, below UNIT_HEAD."""
    return [[f"{unit['kl_ab']:.4g}", f"{unit['max_kl_ab']:.4g}", f"{unit['same_top1']:.1%}", f"{unit['tokens']:,}"] for unit in units]


def text_line(report: dict) -> str:
    """What was read, and how."""
    text, models = report["text"], report["models"]
    rows = [about["vocabulary"] for about in models]
    cut = "" if rows[0] == rows[1] else f" (lm_heads of {rows[0]} and {rows[1]} rows are cut to it)"
    left_out = f"; {text['not_scored']} without a context are not scored" if text["not_scored"] else ""
    files = f"{len(text['files'])} files" if len(text["files"]) > 1 else visible(text["files"][0])
    return (f"{files}, {report['summary']['tokens']:,} tokens{left_out}; vocabulary {text['vocabulary']}{cut}; windows of {text['context']} tokens, "
            f"overlap {text['stride']}")


def top_lines(report: dict, color: bool, width: int) -> list[str]:
    """The worst tokens, one line each: KL, place, the text with the token marked, what A and B expect."""
    scale, entries = Scale(report["summary"]), report["top"]
    cells = [[f"{entry['kl_ab']:.3g}", place(entry), expected(entry, "a"), expected(entry, "b")] for entry in entries]
    sizes = [max(len(row[column]) for row in [*cells, ["KL", "place", "A expects", "B expects"]]) for column in range(4)]
    room = max(30, width - sum(sizes) - 10)
    lines = [f"  {'KL':>{sizes[0]}}  {'place':<{sizes[1]}}  {'text':<{room}}  {'A expects':<{sizes[2]}}  B expects"]
    for (kl, where, a, b), entry in zip(cells, entries, strict=True):
        token = visible(entry["token"])[:24]
        before = visible(entry["before"])[-(2 * (room - len(token)) // 3 - 2):]
        after = visible(entry["after"])[:room - len(before) - len(token) - 2]
        pad = " " * (room - len(before) - len(token) - len(after) - 2)
        marked = paint(token, scale.level(entry["kl_ab"])) if color else token
        lines.append(f"  {kl:>{sizes[0]}}  {where:<{sizes[1]}}  {before}«{marked}»{after}{pad}  {a:<{sizes[2]}}  {b}")
    return lines


def paint(text: str, level: int) -> str:
    """On the background of a level, by an escape sequence."""
    if level == 0:
        return text
    return f"\x1b[48;5;{TERMINAL[level - 1]}m\x1b[38;5;{231 if level >= DARK_FROM else 16}m{text}\x1b[0m"


def table(rows: list[list[str]], left: int = 0, width: int = 0) -> list[str]:
    """Aligned columns: column `left` to the left, the others to the right; cut at the width, if given."""
    sizes = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  " + "  ".join(f"{cell:<{size}}" if column == left else f"{cell:>{size}}"
                              for column, (cell, size) in enumerate(zip(row, sizes, strict=True))) for row in rows]
    return [line if not width or len(line) <= width else line[:width - 1] + "…" for line in lines]


def quoted(token: str) -> str:
    """A token between quotes, so that its spaces can be seen."""
    return f"'{visible(token)[:24]}'"


def expected(entry: dict, letter: str) -> str:
    """The most likely token at an entry's place, and its probability."""
    said = entry[f"expected_{letter}"]
    return f"{quoted(said['token'])} {said['probability']:.0%}"


def place(entry: dict) -> str:
    """File and line."""
    name = visible(entry["document"])
    return name if entry["line"] is None else f"{name}:{entry['line']}"
