"""Figures to text: the report of a terminal, and the page with every token coloured by its KL."""

import functools
import math
import textwrap
from bisect import bisect_left
from collections.abc import Callable, Iterator
from html import escape
from typing import Any

import pandas as pd

from ..console import percent, table

# Mean KL(A‖B) in nats per token below which the word holds; beyond the last: "strongly".
WORDS = ((0.001, "hardly"), (0.03, "slightly"), (0.3, "clearly"))
NAMES = {"kl_ab": "KL(A‖B)", "kl_ba": "KL(B‖A)", "jsd": "JSD"}
# Backgrounds of levels 1, 2, …: from pale yellow to dark red; level 0 has none.
COLOURS = ("#fff9d6", "#fff0a8", "#ffdf86", "#ffc066", "#ff9852", "#fb6a4a", "#e0342b", "#a50f15")
# Left-out tokens that are named, each model's.
NAMED = 8


# ---- words


def visible(text: str) -> str:
    """Put a text on one line, safe to print: characters that a terminal obeys are shown instead."""
    shown = text.translate({ord("\n"): "↵", ord("\t"): "⇥"})
    return "".join(each if each.isprintable() else "·" for each in shown)


def quoted(token: str) -> str:
    """Put a token between quotes, so that its spaces can be seen."""
    return f"'{visible(token)[:24]}'"


def expected(token: str, probability: float) -> str:
    """Format the most likely token at a place, and its probability."""
    return f"{quoted(token)} {percent(probability)}"


def place(entry: dict[str, Any]) -> str:
    """Format file and line."""
    return visible(entry["document"]) + (f":{entry['line']}" if "line" in entry else "")


def sentence(report: dict[str, Any]) -> str:
    """Say how different the two are, and where; and where rounding may hide an adapter."""
    summary = report["summary"]
    kl, count = summary["kl_ab"], summary["tokens"]
    if kl["max"] == 0 and summary["kl_ba"]["max"] == 0:
        text = f"A and B are the same on this text: the KL of its tokens, {count:,}, is exactly 0."
        narrow = [each["dtype"] for each in report["models"] if each["adapter"]]
        if narrow and narrow[-1] != "float32":
            text += f" A change that {narrow[-1]} rounds away shows with --dtype float32."
        return text
    word = next((word for bound, word in WORDS if kl["mean"] < bound), "strongly")
    worst = report["top"][0]
    return (
        f"B differs {word} from A: KL(A‖B) is {kl['mean']:.3g} nats per token and B expects "
        f"another next token at {percent(1 - summary['same_top1'], 1)} of {count:,} "
        f"token{'s' * (count > 1)}; the largest KL is {worst['kl_ab']:.3g}, at "
        f"{quoted(worst['token'])} in {place(worst)}, where A expects "
        f"{expected(**worst['expected_a'])} and B {expected(**worst['expected_b'])}."
    )


def text_line(report: dict[str, Any]) -> str:
    """Say what was read, and how."""
    text = report["text"]
    named = {}
    for letter, tokens in text["left_out"].items():
        quotes = [quoted(entry["token"]) for entry in tokens[:NAMED]] + ["…"] * (
            len(tokens) > NAMED
        )
        named[letter] = f"{len(tokens):,} ({', '.join(quotes)})" if tokens else ""
    rows = {model["vocabulary"] for model in report["models"]} - {text["vocabulary"]}
    facts = {
        "files": visible(", ".join(text["files"]))
        if len(text["files"]) < 3
        else len(text["files"]),
        "documents": text["documents"],
        "tokens": f"{report['summary']['tokens']:,}",
        "skipped, with fewer than 2 tokens": visible(", ".join(text["skipped"])),
        "tokenizer": text["tokenizer"],
        "vocabulary": text["vocabulary"],
        "cut from lm_heads of rows": " and ".join(map(str, sorted(rows))),
        "tokens left out of A": named["A"],
        "tokens left out of B": named["B"],
        "windows of": text["context"],
        "overlap": text["overlap"],
    }
    return "; ".join(f"{name} {value}" for name, value in facts.items() if value)


# ---- tables


def bounds_of(summary: dict[str, Any]) -> list[float]:
    """List the KL above which each level begins: from the median in equal ratios to the largest."""
    high = min(summary["kl_ab"]["max"], 1e3)
    low, count = max(summary["kl_ab"]["p50"], high / 1e3), len(COLOURS)
    return [low * (high / low) ** (step / count) for step in range(count)] if high > low > 0 else []


def tables(report: dict[str, Any]) -> Iterator[tuple[str, str, list[list[str]]]]:
    """Yield the report's tables: a title, < or > for each column, and rows, the head first."""
    summary, by, units = report["summary"], report["by"], report["units"][: report["shown"]]
    keys = ("mean", "p50", "p95", "p99", "max")
    nats = [[NAMES[name], *(f"{summary[name][key]:.4g}" for key in keys)] for name in NAMES]
    yield "", "<>>>>>", [["nats per token", *keys], *nats]
    likely = [summary[f"logprob_{letter}"] for letter in "ab"]
    pairs = {
        "entropy, nats per token": [summary[f"entropy_{letter}"] for letter in "ab"],
        "log-prob of the text, nats per token": likely,
        "perplexity of the text": [math.exp(min(700.0, -value)) for value in likely],
    }
    rows = [[title, *(f"{value:.4g}" for value in pair)] for title, pair in pairs.items()]
    same = ["same top-1 token", percent(summary["same_top1"], 2), ""]
    yield "", "<>>", [["the whole text", "A", "B"], *rows, same]
    rows = [
        [
            *(f"{unit[name]:.4g}" for name in ("kl_ab", "max_kl_ab")),
            *(percent(unit["same_top1"], 1), f"{unit['tokens']:,}"),
            *(place(unit), visible(unit["text"])),
        ]
        for unit in units
    ]
    title = f"{by}s by mean KL(A‖B), the {len(units)} worst"
    yield title, ">>>><<", [["mean KL", "max KL", "same top-1", "tokens", by, "text"], *rows]
    rows = [["KL", "place", "A expects", "B expects", "text"]]
    for entry in report["top"]:
        before, token, after = (visible(entry[part]) for part in ("before", "token", "after"))
        excerpt = f"{before[-24:]:>24}«{token[:24]}»{after}"
        both = (expected(**entry[f"expected_{letter}"]) for letter in "ab")
        rows.append([f"{entry['kl_ab']:.3g}", place(entry), *both, excerpt])
    title = "tokens by KL(A‖B), what each expects at the marked place, given all before it"
    yield title, "><<<<", rows


def text_report(report: dict[str, Any], width: int) -> str:
    """Write the whole report in lines of about this width."""
    fill = functools.partial(
        textwrap.wrap, width=min(width, 110), break_long_words=False, break_on_hyphens=False
    )
    lines = [*fill(report["sentence"]), ""]
    for letter, model in zip("AB", report["models"], strict=True):
        on = "{kind} adapter on {base}, ".format(**model["adapter"]) if model["adapter"] else ""
        about = f"{letter}     {model['name']} ({on}{model['class']}, {model['dtype']})"
        lines += fill(visible(about), subsequent_indent=" " * 6)
    lines += fill(f"text  {text_line(report)}", subsequent_indent=" " * 6)
    for title, align, rows in tables(report):
        lines += ["", *([f"{title}:"] if title else []), *table(rows, align, width)]
    return "\n".join(lines)


# ---- the page

# Control characters have no place in HTML; each has a picture in Unicode.
CONTROLS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {
    127: 0x2421,
    13: None,
}
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


def page(
    report: dict[str, Any], tokens: pd.DataFrame, label: Callable[[int], str]
) -> Iterator[str]:
    """Yield the page, part after part; label: a token's id as text."""
    bounds = bounds_of(report["summary"])
    steps = "".join(f'<b class="k{level}"> > {at:.2g} </b>' for level, at in enumerate(bounds, 1))
    yield f"{HEAD}{STYLE}</style></head>\n<body>\n<h1>fastkl compare</h1>\n"
    yield f"<pre>{clean(text_report(report, 150))}</pre>\n"
    for name, kind in ((f"{report['by']}s", "units"), ("tokens", "top")):
        links = (
            f'<a href="#t{each["index"]}">{clean(place(each))}</a>'
            for each in report[kind][: report["shown"]]
        )
        yield f"<p>The worst {name}: {', '.join(links)}</p>\n"
    yield (
        "<h2>The text, coloured by KL(A‖B)</h2>\n"
        f"<p>Nats: {steps or 'all tokens are alike'}. Point at a token for its numbers.</p>\n"
    )
    anchors = {entry["index"] for entry in [*report["top"], *report["units"]]}
    for name, document in tokens.groupby("document", sort=False):
        yield f'<h2>{clean(str(name))}</h2>\n<div class="text">'
        for row in document.itertuples():
            yield token_html(row, bounds, row.Index in anchors, label)
        yield "</div>\n"
    yield TAIL


def clean(text: str) -> str:
    """Escape text for HTML, attributes included."""
    return escape(text.translate(CONTROLS))


def token_html(row: Any, bounds: list[float], anchored: bool, label: Callable[[int], str]) -> str:
    """Format a token, coloured, with its numbers as a tooltip."""
    if math.isnan(row.kl_ab):
        return f'<b class="u">{clean(row.text)}</b>' if row.text else ""
    mark = " n" if "\n" in row.text else "" if row.text else " e"
    anchor = f' id="t{row.Index}"' if anchored else ""
    numbers = " ".join(f"{getattr(row, name):.3g}" for name in SHOWN)
    expects_a = expected(label(int(row.top_a)), math.exp(row.top_logprob_a))
    expects_b = expected(label(int(row.top_b)), math.exp(row.top_logprob_b))
    data = f'data-v="{numbers}" data-a="{clean(expects_a)}" data-b="{clean(expects_b)}"'
    level = bisect_left(bounds, row.kl_ab)
    return f'<b class="k{level}{mark}"{anchor} {data}>{clean(row.text)}</b>'
