"""Figures to text: the report of a terminal, and the page with every token coloured by its KL.

Both show the same lines; a painter says what becomes of their text, its links and its colours.
"""

from __future__ import annotations

import functools
import math
import textwrap
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Any, NamedTuple

from ..words import percent
from .measure import Document, Store

# Mean KL(A‖B) in nats per token below which the word holds; beyond the last: "strongly".
WORDS = ((0.001, "hardly"), (0.03, "slightly"), (0.3, "clearly"))
NAMES = {"kl_ab": "KL(A‖B)", "kl_ba": "KL(B‖A)", "jsd": "JSD"}
# Backgrounds of levels 1, 2, …: from pale yellow to dark red, for a terminal (xterm-256) and for
# HTML; level 0 has none.
TERMINAL = (230, 229, 222, 215, 209, 203, 196, 160)
COLOURS = ("#fff9d6", "#fff0a8", "#ffdf86", "#ffc066", "#ff9852", "#fb6a4a", "#e0342b", "#a50f15")
DARK_FROM = 7
# Columns of an excerpt with the least room, and of the longest name.
LEAST, MOST = 16, 40
# Left-out tokens that are named, each model's.
NAMED = 8
# Painter of a text, an index to link to or None, and a level of colour.
Paint = Callable[[str, int | None, int], str]


# ---- words


def visible(text: str) -> str:
    """Put a text on one line, safe to print: characters that a terminal obeys are shown instead."""
    named = {"\n": "↵", "\t": "⇥"}
    return "".join(each if each.isprintable() else named.get(each, "·") for each in text)


def quoted(token: str) -> str:
    """Put a token between quotes, so that its spaces can be seen."""
    return f"'{visible(token)[:24]}'"


def expected(entry: dict[str, Any], letter: str) -> str:
    """Format the most likely token at an entry's place, and its probability."""
    likely = entry[f"expected_{letter}"]
    return f"{quoted(likely['token'])} {percent(likely['probability'])}"


def place(entry: dict[str, Any]) -> str:
    """Format file and line."""
    line = "" if entry["line"] is None else f":{entry['line']}"
    return f"{visible(entry['document'])}{line}"


def sentence(
    summary: dict[str, Any],
    units: list[dict[str, Any]],
    top: list[dict[str, Any]],
    by: str,
    models: Sequence[dict[str, Any]] = (),
) -> str:
    """Say how different the two are, and where; and where rounding may hide an adapter."""
    kl, count = summary["kl_ab"], summary["tokens"]
    if kl["max"] == 0 and summary["kl_ba"]["max"] == 0:
        adapted = [model["dtype"] for model in models if model["adapter"]]
        more = [
            f" A change that {narrow} rounds away shows with --dtype float32."
            for narrow in adapted
            if narrow in ("bfloat16", "float16")
        ][:1]
        of = f"all {count:,} tokens" if count > 1 else "its only token"
        text = f"A and B are the same on this text: the divergence of {of} is exactly 0."
        return "".join([text, *more])
    word = next((word for bound, word in WORDS if kl["mean"] < bound), "strongly")
    worst = top[0]
    where = (
        f"before {quoted(worst['token'])} in {place(worst)}, where A expects "
        f"{expected(worst, 'a')} and B {expected(worst, 'b')}"
    )
    start = f"B differs {word} from A: KL(A‖B) is {kl['mean']:.3g} nats"
    if count == 1:
        return f"{start} at the only token, {where}."
    other = percent(1 - summary["same_top1"], 1)
    parts = [f"{start} per token and B expects another next token at {other} of the {count:,} tokens"]
    if summary["share_above_p99"] > 0:
        share = percent(summary["share_above_p99"])
        parts.append(f"the 1% of tokens that differ most hold {share} of it")
    if len(units) > 1:
        first, last = ((place(unit), f"{unit['kl_ab']:.3g}") for unit in (units[0], units[-1]))
        range_ = f"documents go from {last[1]} ({last[0]}) to {first[1]} ({first[0]})"
        parts.append(range_ if by != "line" else f"the worst line is {first[0]} ({first[1]})")
    return "; ".join([*parts, f"most of all, with {worst['kl_ab']:.3g}, {where}"]) + "."


def text_line(report: dict[str, Any]) -> str:
    """Say what was read, and how."""
    text, count = report["text"], report["summary"]["tokens"]
    rows = [model["vocabulary"] for model in report["models"]]
    files = f"{len(text['files'])} files" if len(text["files"]) > 1 else visible(text["files"][0])
    if text["documents"] > len(text["files"]):
        files += f", {text['documents']:,} documents"
    parts = [f"{files}, {count:,} token{'s' if count > 1 else ''}"]
    if text["not_scored"]:
        parts.append(f"not scored, without a context: {text['not_scored']}")
    if text["skipped"]:
        parts.append(f"skipped, with fewer than 2 tokens: {visible(', '.join(text['skipped']))}")
    vocabulary = f"vocabulary {text['vocabulary']}"
    if set(rows) != {text["vocabulary"]}:
        vocabulary += f" (that of the tokenizer; lm_heads of {rows[0]} and {rows[1]} rows are cut to it)"
    if text["tokenizer"]:
        vocabulary += f", read with {text['tokenizer']}'s tokenizer"
    alone = []
    for letter, tokens in text["left_out"].items():
        named = [quoted(entry["token"]) for entry in tokens[:NAMED]] + ["…"] * (len(tokens) > NAMED)
        alone += [f"{letter} alone has {len(tokens):,} ({', '.join(named)})"] * bool(tokens)
    parts += [vocabulary, *[f"tokens left out: {' and '.join(alone)}"] * bool(alone)]
    return "; ".join([*parts, f"windows of {text['context']} tokens, overlap {text['overlap']}"])


# ---- tables


class Cell(NamedTuple):
    """A cell; it may lead to a token, and be a token between the text around it, in a colour."""

    text: str
    index: int | None = None
    around: tuple[str, str] | None = None
    level: int = 0


class Table(NamedTuple):
    """Rows of cells, the first of them the head; align: < or > of each column.

    wide: the column that takes the room that the others leave.
    """

    title: str
    align: str
    wide: int | None
    rows: list[list[Cell]]


def bounds_of(summary: dict[str, Any]) -> list[float]:
    """List the KL above which each level begins: from the median in equal ratios to the largest."""
    high = min(summary["kl_ab"]["max"], 1e3)
    low, count = max(summary["kl_ab"]["p50"], high / 1e3), len(TERMINAL)
    return [low * (high / low) ** (step / count) for step in range(count)] if high > low > 0 else []


def tables(report: dict[str, Any]) -> list[Table]:
    """Make the report's tables."""
    summary, by, units = report["summary"], report["by"], report["units"][: report["shown"]]
    bounds = bounds_of(summary)
    keys = ("mean", "p50", "p95", "p99", "max") if summary["tokens"] > 1 else ("mean",)
    figures = [
        [title, *(f"{summary[name][key]:.4g}" for key in keys)] for name, title in NAMES.items()
    ]
    likely = [summary[f"logprob_{letter}"] for letter in "ab"]
    pairs = {
        "entropy, nats per token": [summary[f"entropy_{letter}"] for letter in "ab"],
        "log-prob of the text, nats per token": likely,
        "perplexity of the text": [math.exp(min(700.0, -value)) for value in likely],
    }
    whole = [[title, *(f"{value:.4g}" for value in pair)] for title, pair in pairs.items()]
    whole.append(["same top-1 token", percent(summary["same_top1"], 2), ""])
    listed = [
        Table("", "<" + ">" * len(keys), None, _plain(["nats per token", *keys], *figures)),
        Table("", "<>>", None, _plain(["the whole text", "A", "B"], *whole)),
    ]
    if by == "line" or len(units) > 1:
        some = by == "line" or len(units) < len(report["units"])
        title = f"{by}s by mean KL(A‖B)" + f" (the {len(units)} worst)" * some
        rows = _plain(["mean KL", "max KL", "same top-1", "tokens", by, "text"])
        for unit in units:
            means = (f"{unit['kl_ab']:.4g}", f"{unit['max_kl_ab']:.4g}")
            cells = (*means, percent(unit["same_top1"], 1), f"{unit['tokens']:,}")
            link = Cell(place(unit), unit["index"])
            rows.append([*map(Cell, cells), link, Cell(visible(unit["text"]))])
        listed.append(Table(title, ">>>><<", 5, rows))
    if summary["kl_ab"]["max"] > 0:
        title = "tokens by KL(A‖B), what each expects at the marked place, given all before it"
        rows = _plain(["KL", "place", "text", "A expects", "B expects"])
        for entry in report["top"]:
            before, token, after = (visible(entry[part]) for part in ("before", "token", "after"))
            level = bisect_left(bounds, entry["kl_ab"])
            excerpt = Cell(token, None, (before, after), level)
            likely_cells = (Cell(expected(entry, letter)) for letter in "ab")
            link = Cell(place(entry), entry["index"])
            rows.append([Cell(f"{entry['kl_ab']:.3g}"), link, excerpt, *likely_cells])
        listed.append(Table(title, "><<<<", 2, rows))
    return listed


def _plain(*rows: list[str]) -> list[list[Cell]]:
    return [[Cell(text) for text in row] for row in rows]


def text_report(report: dict[str, Any], paint: Paint, width: int) -> str:
    """Write the whole report in lines of about this width."""
    fill = functools.partial(
        textwrap.wrap, width=min(width, 110), break_long_words=False, break_on_hyphens=False
    )
    lines = [*fill(report["sentence"]), ""]
    for letter, model in zip("AB", report["models"], strict=True):
        adapter = model["adapter"]
        on = f"{adapter['kind']} adapter on {visible(adapter['base'])}, " if adapter else ""
        about = f"{letter}     {visible(model['name'])} ({on}{model['class']}, {model['dtype']})"
        lines += fill(about, subsequent_indent=" " * 6)
    lines += fill(f"text  {text_line(report)}", subsequent_indent=" " * 6)
    lines = [paint(line, None, 0) for line in lines]
    for table in tables(report):
        lines += ["", *(paint(line, None, 0) for line in fill(table.title and table.title + ":"))]
        lines += table_lines(table, paint, width)
    return "\n".join(lines)


def table_lines(table: Table, paint: Paint, width: int) -> list[str]:
    """Align columns; an excerpt has the room that the others leave."""
    columns = zip(*table.rows, strict=True)
    sizes = [min(MOST, max(len(cell.text) for cell in column)) for column in columns]
    if table.wide is not None:
        room = width - sum(sizes) + sizes[table.wide] - 2 * len(sizes)
        sizes[table.wide] = max(LEAST, room)
    lines = []
    for row in table.rows:
        cells = zip(row, sizes, table.align, strict=True)
        lines.append("  ".join(_cell(*cell, paint) for cell in cells).rstrip())
    return lines


def _cell(cell: Cell, size: int, align: str, paint: Paint) -> str:
    text = cell.text if len(cell.text) <= size else cell.text[: size - 1] + "…"
    if cell.around is None:
        pad = " " * (size - len(text))
        return pad * (align == ">") + paint(text, cell.index, 0) + pad * (align == "<")
    token = cell.text[: min(24, size - 2)]
    room = size - len(token) - 2
    before = cell.around[0][max(0, len(cell.around[0]) - 2 * room // 3) :]
    after = cell.around[1][: room - len(before)]
    pad = " " * (room - len(before) - len(after))
    return paint(f"{before}«", None, 0) + paint(token, None, cell.level) + paint(f"»{after}{pad}", None, 0)


def plain(text: str, index: int | None, level: int) -> str:
    """Paint nothing."""
    return text


def ansi(text: str, index: int | None, level: int) -> str:
    """Colour for a terminal."""
    front = 231 if level >= DARK_FROM else 16
    start = f"\x1b[48;5;{TERMINAL[level - 1]}m\x1b[38;5;{front}m"
    return f"{start}{text}\x1b[0m" if level else text


# ---- the page

# Control characters have no place in HTML; each has a picture in Unicode.
CONTROLS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421, 13: None}
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width"><title>fastkl compare</title><style>
:root{color-scheme:light}body{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;
padding:0 1rem;color:#222}h1,h2{font-size:1.1rem}pre{overflow-x:auto}
pre,.text,#tip{font-family:ui-monospace,monospace;font-size:.85rem}
.text,#tip{white-space:pre-wrap;overflow-wrap:anywhere}
.text{line-height:1.7;border:1px solid #ddd;padding:.7rem}
b{font-weight:normal;border-radius:2px}b:target,.text b:hover{outline:2px solid #225}
b.n::before{content:"\\21B5"}b.e::before{content:"\\00B7"}.k7,.k8{color:#fff}.u{color:#999}
#tip{position:fixed;background:#222;color:#fff;padding:.5rem .7rem;border-radius:4px;
pointer-events:none;max-width:28rem;z-index:9}
"""
STYLE = "".join(f".k{level}{{background:{colour}}}" for level, colour in enumerate(COLOURS, 1))
TAIL = """<div id="tip" hidden></div>
<script>
const tip=document.getElementById("tip"),names=["KL(A\\u2016B)","KL(B\\u2016A)","JSD",
"log-prob A","log-prob B","entropy A","entropy B"];
document.addEventListener("mousemove",e=>{const d=e.target.dataset;
tip.hidden=!(d&&d.v);if(tip.hidden)return;const v=d.v.split(" ");
tip.textContent=names.map((n,i)=>n.padEnd(12)+v[i]).join("\\n")+
"\\nA expects   "+d.a+"\\nB expects   "+d.b;
tip.style.left=Math.min(e.clientX+14,innerWidth-tip.offsetWidth-8)+"px";
tip.style.top=(e.clientY+tip.offsetHeight+24>innerHeight?
e.clientY-tip.offsetHeight-10:e.clientY+18)+"px"});
</script>
</body></html>
"""
SHOWN = ("kl_ab", "kl_ba", "jsd", "logprob_a", "logprob_b", "entropy_a", "entropy_b")


def page(report: dict[str, Any], store: Store, label: Callable[[int], str]) -> Iterator[str]:
    """Yield the page, part after part; label: a token's id as text."""
    bounds = bounds_of(report["summary"])
    steps = "".join(html(f" > {bound:.2g} ", None, level) for level, bound in enumerate(bounds, 1))
    yield f"{HEAD}{STYLE}</style></head>\n<body>\n<h1>fastkl compare</h1>\n"
    yield f"<pre>{text_report(report, html, 150)}</pre>\n<h2>The text, coloured by KL(A‖B)</h2>\n"
    yield f"<p>Nats: {steps or 'all tokens are alike'}. Point at a token for its numbers.</p>\n"
    anchors = {entry["index"] for entry in [*report["top"], *report["units"]]}
    for document in store.documents:
        yield f'<h2>{clean(document.name)}</h2>\n<div class="text">'
        yield from _tokens(store, document, bounds, anchors, label)
        yield "</div>\n"
    yield TAIL


def clean(text: str) -> str:
    """Escape text for HTML, attributes included."""
    return escape(text.translate(CONTROLS))


def html(text: str, index: int | None, level: int) -> str:
    """Paint for the page: escaped, linked, coloured."""
    text = clean(text)
    if index is not None:
        return f'<a href="#t{index}">{text}</a>'
    return f'<b class="k{level}">{text}</b>' if level else text


def _tokens(
    store: Store,
    document: Document,
    bounds: list[float],
    anchors: set[int],
    label: Callable[[int], str],
) -> Iterator[str]:
    """Yield every token of a document."""
    for low, values in store.blocks(document.start, document.end):
        for at, value in enumerate(values, low):
            text = store.text(at, at + 1)
            if not value["scored"]:
                yield f'<b class="u">{clean(text)}</b>' if text else ""
                continue
            mark = " n" if "\n" in text else "" if text else " e"
            level = bisect_left(bounds, float(value["kl_ab"]))
            anchor = f' id="t{at}"' if at in anchors else ""
            numbers = " ".join(f"{float(value[name]):.3g}" for name in SHOWN)
            tokens = (quoted(label(int(value[f"top_{letter}"]))) for letter in "ab")
            chances = (percent(math.exp(value[f"top_logprob_{letter}"])) for letter in "ab")
            a, b = (clean(f"{token} {chance}") for token, chance in zip(tokens, chances, strict=True))
            yield f'<b class="k{level}{mark}"{anchor} data-v="{numbers}" data-a="{a}" data-b="{b}">'
            yield f"{clean(text)}</b>"
