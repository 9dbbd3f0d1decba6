"""The HTML page of a comparison: its tables, two charts, and every token coloured by its KL."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Any

import pandas as pd

from .report import expected, location, model_line, notes, tables, text_line

# Number of colour levels; level 0 has no colour.
LEVELS = 8
# HTML does not allow control characters; Unicode has a picture for each. Bidirectional controls
# would also reorder the text after them.
CONTROLS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {
    **dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD),
    127: 0x2421,
    13: None,
}
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width,initial-scale=1"><title>fastkl compare</title>
<style>
:root{color-scheme:light dark;--ink:#222;--paper:#fff;--line:#ddd;--dim:#767676;--bar:#00798c}
body{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:1.5rem auto;padding:0 1rem;
color:var(--ink);background:var(--paper)}
h1,h2{font-size:1.1rem}caption{font-size:1rem;font-weight:600;text-align:left;white-space:nowrap}
section{overflow-x:auto;margin:1rem 0}a{color:inherit}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{padding:.15rem .7rem .15rem 0;text-align:left;white-space:nowrap;vertical-align:top}
th{font-weight:600;border-bottom:1px solid var(--line)}.r{text-align:right}
td:last-child{white-space:pre;font-family:ui-monospace,monospace}td.r:last-child{font-family:inherit}
@media (prefers-color-scheme:dark){
:root{--ink:#ddd;--paper:#16181c;--line:#444;--dim:#8a8a8a;--bar:#3fb6c9}}
figure{display:inline-block;width:26rem;max-width:100%;margin:0 1rem 1rem 0}
svg{width:100%;fill:var(--bar)}svg text{fill:var(--ink);font-size:11px}
.text,#tip{font-family:ui-monospace,monospace;font-size:.85rem;white-space:pre-wrap;
overflow-wrap:anywhere}
.text{line-height:1.7;border:1px solid var(--line);padding:.7rem}
b{font-weight:normal;border-radius:2px}b:target,.text b:hover{outline:2px solid #47c}
b.n::before{content:"\\21B5"}b.e::before{content:"\\00B7"}.k7,.k8{color:#fff}.u{color:var(--dim)}
#tip{position:fixed;background:#222;color:#fff;padding:.5rem .7rem;border-radius:4px;
pointer-events:none;max-width:min(28rem,90vw);z-index:9}
"""


# Pale yellow to red, on a white or black background.
STYLE = "".join(
    f".k{level}{{background:hsl({56 - 7 * level} 95% 45%/{level / LEVELS:.2f})}}"
    for level in range(1, LEVELS + 1)
)
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


def bounds_of(summary: dict[str, Any]) -> list[float]:
    """List the KL at which each level begins: geometric steps from the median to the maximum."""
    high = min(summary["kl_ab"]["max"], 1e3)
    low, count = max(summary["kl_ab"]["p50"], high / 1e3), LEVELS
    return [low * (high / low) ** (step / count) for step in range(count)] if high > low > 0 else []


def page(
    report: dict[str, Any], tokens: pd.DataFrame, label: Callable[[int], str]
) -> Iterator[str]:
    """Yield the page in parts; label: turns a token's id into text."""
    bounds = bounds_of(report["summary"])
    steps = "".join(f'<b class="k{level}"> > {at:.2g} </b>' for level, at in enumerate(bounds, 1))
    yield f"{HEAD}{STYLE}</style></head>\n<body>\n<h1>fastkl compare</h1>\n"
    models = (model_line(*each) for each in zip("AB", report["models"], strict=True))
    for line in (report["sentence"], *models, f"Text: {text_line(report)}.", *notes(report)):
        yield f"<p>{clean(line)}</p>\n"
    yield bars(
        "Tokens by KL(A‖B), nats", [(each["from"], each["tokens"]) for each in report["histogram"]]
    )
    yield bars(
        "Mean KL(A‖B) by position in the document",
        [(each["from"], each["kl_ab"]) for each in report["positions"]],
    )
    yield from (html_table(*each) for each in tables(report))
    for name, kind in ((f"{report['by']}s", "units"), ("tokens", "top")):
        links = (
            f'<a href="#t{each["index"]}">{clean(location(each))}</a>'
            for each in report[kind][: report["shown"]]
        )
        yield f"<p>The worst {name}: {', '.join(links)}</p>\n"
    yield (
        "<h2>The text, coloured by KL(A‖B)</h2>\n"
        f"<p>Nats: {steps or 'all tokens are alike'}. Point at a token, or tap it, for its numbers."
        "</p>\n"
    )
    anchors = {entry["index"] for entry in [*report["top"], *report["units"]]}
    for name, document in tokens.groupby("document", sort=False):
        yield f'<h2>{clean(str(name))}</h2>\n<div class="text">'
        yield from (
            token_html(row, bounds, row.Index in anchors, label) for row in document.itertuples()
        )
        yield "</div>\n"
    yield TAIL


def html_table(title: str, align: str, rows: Sequence[Sequence[str]]) -> str:
    """Write a table; the first row is the head."""
    sides = ['class="r"' if way == ">" else "" for way in align]
    lines = [
        "".join(
            f"<{kind} {side}>{clean(cell)}</{kind}>" for side, cell in zip(sides, row, strict=True)
        )
        for kind, row in zip(["th", *["td"] * (len(rows) - 1)], rows, strict=True)
    ]
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f"<section><table><caption>{clean(title)}</caption>\n{body}</table></section>\n"


def bars(title: str, values: Sequence[tuple[float, float]], height: int = 150) -> str:
    """Draw bars from 0, labelled with the lower ends of their bins and the largest finite value."""
    most = max((value for _, value in values if value < math.inf), default=0.0)
    step = 380 / len(values)
    parts = []
    for number, (start, value) in enumerate(values):
        tall = height * min(value / (most or 1.0), 1.0)
        parts.append(
            f'<rect x="{10 + number * step:.1f}" y="{20 + height - tall:.1f}" '
            f'width="{step * 0.85:.1f}" height="{tall:.1f}"><title>from {start:.2g}: {value:.4g}'
            "</title></rect>"
        )
        if number % math.ceil(len(values) / 8) == 0:
            name = f"{start:,.0f}" if start >= 1 else f"{start:.0e}"
            parts.append(f'<text x="{10 + number * step:.1f}" y="{height + 36}">{name}</text>')
    parts.append(f'<text x="10" y="12">tallest: {most:,.4g}</text>')
    drawn = f'<svg viewBox="0 0 420 {height + 45}" role="img">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{clean(title)}</figcaption>{drawn}</figure>\n"


def clean(text: str) -> str:
    """Escape text for HTML, attributes included."""
    return escape(text.translate(CONTROLS))


def token_html(row: Any, bounds: list[float], anchored: bool, label: Callable[[int], str]) -> str:
    """Format a coloured token with its values as a tooltip."""
    if math.isnan(row.kl_ab):
        return f'<b class="u">{clean(row.text)}</b>' if row.text else ""
    mark = " n" if "\n" in row.text else "" if clean(row.text) else " e"
    anchor = f' id="t{row.Index}"' if anchored else ""
    numbers = " ".join(f"{getattr(row, name):.3g}" for name in SHOWN)
    expects_a = expected(label(int(row.top_a)), math.exp(row.top_logprob_a))
    expects_b = expected(label(int(row.top_b)), math.exp(row.top_logprob_b))
    data = f'data-v="{numbers}" data-a="{clean(expects_a)}" data-b="{clean(expects_b)}"'
    level = bisect_left(bounds, row.kl_ab)
    return f'<b class="k{level}{mark}"{anchor} {data}>{clean(row.text)}</b>'
