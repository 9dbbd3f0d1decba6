"""One page that needs nothing beside itself: the report, and the whole text with every token coloured by its KL."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from html import escape

from .report import Excerpt, Place, Scale, Table, about, percent, quoted, tables, text_line
from .store import Document, Store

# Levels 1 … 8, as report.TERMINAL.
COLOURS = ("#fff9d6", "#fff0a8", "#ffdf86", "#ffc066", "#ff9852", "#fb6a4a", "#e0342b", "#a50f15")
# Control characters have no place in HTML; each has a picture in Unicode.
CONTROLS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421, 13: None}
STYLE = """
:root{color-scheme:light}body{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.15rem}h2{font-size:1rem;margin:2rem 0 .5rem}.lead{font-size:1.25rem;line-height:1.4}
table{border-collapse:collapse;margin:.5rem 0}.wide{overflow-x:auto}
td,th{padding:.15rem .7rem;text-align:right;border-bottom:1px solid #ddd;font-weight:normal;white-space:nowrap}
th{color:#666}.l{text-align:left}.text,#tip{font-family:ui-monospace,monospace;font-size:.85rem;white-space:pre-wrap;overflow-wrap:anywhere}
div.text{line-height:1.7;border:1px solid #ddd;padding:.7rem}b{font-weight:normal;border-radius:2px}b:target,b:hover{outline:2px solid #225}
b.n::before{content:"\\21B5"}b.e::before{content:"\\00B7"}.k7,.k8{color:#fff}.u{color:#999}
#tip{position:fixed;background:#222;color:#fff;padding:.5rem .7rem;border-radius:4px;pointer-events:none;max-width:28rem;z-index:9}
""" + "".join(f".k{level}{{background:{colour}}}" for level, colour in enumerate(COLOURS, 1))
SCRIPT = """
const tip=document.getElementById("tip"),names=["KL(A\\u2016B)","KL(B\\u2016A)","JSD","log-prob A","log-prob B","entropy A","entropy B"];
document.addEventListener("mousemove",e=>{const d=e.target.dataset;tip.hidden=!(d&&d.v);if(tip.hidden)return;const v=d.v.split(" ");
tip.textContent=names.map((n,i)=>n.padEnd(12)+v[i]).join("\\n")+"\\nA expects   "+d.a+"\\nB expects   "+d.b;
tip.style.left=Math.min(e.clientX+14,innerWidth-tip.offsetWidth-8)+"px";
tip.style.top=(e.clientY+tip.offsetHeight+24>innerHeight?e.clientY-tip.offsetHeight-10:e.clientY+18)+"px"});
"""
SHOWN = ("kl_ab", "kl_ba", "jsd", "logprob_a", "logprob_b", "entropy_a", "entropy_b")


def page(report: dict, store: Store, label: Callable[[int], str]) -> Iterator[str]:
    """The page, part after part; label: a token's id as text."""
    scale = Scale(report["summary"])
    yield ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
           'style-src \'unsafe-inline\'; script-src \'unsafe-inline\'"><meta name="viewport" content="width=device-width">'
           f"<title>fastkl compare</title><style>{STYLE}</style></head>\n<body>\n")
    yield f'<h1>fastkl compare</h1>\n<p class="lead">{clean(report["sentence"])}</p>\n<p>'
    for letter, model in zip("AB", report["models"], strict=True):
        yield f"{letter}: {clean(model['name'])} ({clean(about(model))})<br>"
    yield f"text: {clean(text_line(report))}</p>\n"
    yield from map(_table, tables(report, scale))
    yield f"<h2>The text, coloured by KL(A‖B)</h2>\n<p>{_legend(scale)} Point at a token for its numbers.</p>\n"
    anchors = {entry["index"] for entry in [*report["top"], *report["units"]]}
    for document in store.documents:
        yield f'<h2>{clean(document.name)}</h2>\n<div class="text">'
        yield from _tokens(store, document, scale, anchors, label)
        yield "</div>\n"
    yield f'<div id="tip" hidden></div>\n<script>{SCRIPT}</script>\n</body></html>\n'


def clean(text: str) -> str:
    """Text for HTML, attributes included."""
    return escape(text.translate(CONTROLS))


def _table(table: Table) -> str:
    lines = []
    for kind, row in zip(("th", *["td"] * len(table.rows)), table.rows, strict=False):
        sides = (" class=l" if side == "<" else "" for side in table.align)
        lines.append("".join(f"<{kind}{side}>{_cell(cell)}</{kind}>" for cell, side in zip(row, sides, strict=True)))
    title = f"<h2>{clean(table.title[:1].upper() + table.title[1:])}</h2>\n" if table.title else ""
    return title + '<div class="wide"><table>' + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>\n"


def _cell(cell: str | Place | Excerpt) -> str:
    if isinstance(cell, Place):
        return f'<a href="#t{cell.index}">{clean(cell.text)}</a>'
    if isinstance(cell, Excerpt):
        token = f'<b class="k{cell.level}">{clean(cell.token)}</b>' if cell.token else ""
        return f'<span class="text">{clean(cell.before[-50:])}{token}{clean(cell.after[:80 if not token else 30])}</span>'
    return clean(cell)


def _legend(scale: Scale) -> str:
    steps = "".join(f'<b class="k{level}">&nbsp;&gt; {bound:.2g}&nbsp;</b>' for level, bound in enumerate(scale.bounds, 1))
    return f"Nats: {steps}." if steps else "All tokens are alike."


def _tokens(store: Store, document: Document, scale: Scale, anchors: set[int], label: Callable[[int], str]) -> Iterator[str]:
    """Every token of a document."""
    for low, values in store.blocks(document.start, document.end):
        for at, (text, value) in enumerate(zip(store.texts(low, low + len(values)), values, strict=True), low):
            anchor = f' id="t{at}"' if at in anchors else ""
            if not value["scored"]:
                yield f'<b class="u">{clean(text)}</b>' if text else ""
                continue
            mark = " n" if "\n" in text else "" if text else " e"
            numbers = " ".join(f"{float(value[name]):.3g}" for name in SHOWN)
            a, b = (clean(f"{quoted(label(int(value[f'top_{letter}'])))} {percent(math.exp(value[f'top_logprob_{letter}']))}") for letter in "ab")
            yield (f'<b class="k{scale.level(float(value["kl_ab"]))}{mark}"{anchor} data-v="{numbers}" data-a="{a}" data-b="{b}">'
                   f"{clean(text)}</b>")
