"""Format a comparison's figures as a text report for the terminal."""

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..console import percent, table
from .figures import CONFIDENCE

# Upper bound of the mean KL(A‖B), nats per token, for each word; above the last: "strongly".
WORDS = ((0.001, "hardly"), (0.03, "slightly"), (0.3, "clearly"))
NAMES = {"kl_ab": "KL(A‖B)", "kl_ba": "KL(B‖A)", "jsd": "JSD"}
# Left-out tokens named per model, at most.
NAMED = 8


# ---- words


def visible(text: str) -> str:
    """Make a text printable on one line, with control characters escaped."""
    shown = text.translate({ord("\n"): "↵", ord("\t"): "⇥"})
    return "".join(each if each.isprintable() else "·" for each in shown)


def quoted(token: str) -> str:
    """Quote a token, so that its spaces are visible."""
    return f"'{visible(token)[:24]}'"


def expected(token: str, probability: float) -> str:
    """Format a most likely token and its probability."""
    return f"{quoted(token)} {percent(probability)}"


def location(entry: dict[str, Any]) -> str:
    """Format file and line."""
    return visible(entry["document"]) + (f":{entry['line']}" if "line" in entry else "")


def sentence(report: dict[str, Any]) -> str:
    """State how much the models differ, and where; say if rounding may hide an adapter."""
    summary, b = report["summary"], report["letter"]
    kl, count = summary["kl_ab"], summary["tokens"]
    if kl["max"] == 0 and summary["kl_ba"]["max"] == 0:
        text = (
            f"A and {b} are the same on this text: the KL of its tokens, {count:,}, is exactly 0."
        )
        narrow = [each["dtype"] for each in report["models"] if each["adapter"]]
        if narrow and narrow[-1] != "float32":
            text += f" A change that {narrow[-1]} rounds away shows with --dtype float32."
        return text
    word = next((word for bound, word in WORDS if kl["mean"] < bound), "strongly")
    worst = report["top"][0]
    return (
        f"{b} differs {word} from A: KL(A‖{b}) is {kl['mean']:.3g} nats per token and {b} expects "
        f"another next token at {percent(1 - summary['same_top1'], 1)} of {count:,} "
        f"token{'s' * (count > 1)}; the largest KL is {worst['kl_ab']:.3g}, at "
        f"{quoted(worst['token'])} in {location(worst)}, where A expects "
        f"{expected(**worst['expected_a'])} and {b} {expected(**worst['expected_b'])}."
    )


def listed(names: Sequence[str]) -> str:
    """Format the number of names and the first ones."""
    shown = ", ".join([*map(visible, names[:NAMED]), *["…"] * (len(names) > NAMED)])
    return f"{len(names):,} ({shown})" if names else ""


def text_line(report: dict[str, Any]) -> str:
    """Describe the text that was read, and how."""
    text = report["text"]
    named = {
        f"tokens left out of {letter}": listed([quoted(entry["token"]) for entry in tokens])
        for letter, tokens in text["left_out"].items()
    }
    rows = {model["vocabulary"] for model in report["models"]} - {text["vocabulary"]}
    facts = {
        "files": visible(", ".join(text["files"]))
        if len(text["files"]) < 3
        else len(text["files"]),
        "documents": text["documents"],
        "too short to score": listed(text["too_short"]),
        "tokens": f"{report['summary']['tokens']:,}",
        "skipped, with fewer than 2 tokens": listed(text["skipped"]),
        "tokenizer": text["tokenizer"],
        "vocabulary": text["vocabulary"],
        "cut from lm_heads of rows": " and ".join(map(str, sorted(rows))),
        **named,
        "windows of": text["window"],
        "stride": text["stride"],
        "scored": "the second half of each" if text["score"] == "second-half" else "",
    }
    return "; ".join(f"{name} {value}" for name, value in facts.items() if value)


def size(number: int) -> str:
    """Format a number of bytes."""
    return f"{number / 1e9:.3g} GB" if number >= 1e8 else f"{number / 1e6:.3g} MB"


def model_line(letter: str, model: dict[str, Any]) -> str:
    """Describe a model."""
    on = "{kind} adapter on {base}, ".format(**model["adapter"]) if model["adapter"] else ""
    kind = f"{on}{model['class']}, {model['dtype']}, {size(model['bytes'])}"
    return visible(f"{letter:5} {model['name']} ({kind})")


def fill(text: str, width: int, indent: int = 6) -> list[str]:
    """Wrap a text, with lines after the first indented."""
    return textwrap.wrap(
        text,
        width=min(width, 110),
        break_long_words=False,
        break_on_hyphens=False,
        subsequent_indent=" " * indent,
    )


def within(summary: dict[str, Any], name: str) -> str:
    """Format the 95 % interval of a mean: divergences in nats, shares in percent."""
    bounds = summary["intervals"].get(name)
    if not bounds:
        return ""
    share = name in ("same_top1", "acceptance")
    low, high = (percent(each, 2) if share else f"{each:.3g}" for each in bounds)
    return f"{low} … {high}"


# ---- tables


def tables(report: dict[str, Any]) -> Iterator[tuple[str, str, list[list[str]]]]:
    """Yield the report's tables: title, alignment of each column (< or >), and rows, head first."""
    summary, by, units = report["summary"], report["by"], report["units"][: report["shown"]]
    keys = ("mean", "p50", "p95", "p99", "p999", "max")
    nats = [
        [NAMES[name], *(f"{summary[name][key]:.4g}" for key in keys), within(summary, name)]
        for name in NAMES
    ]
    yield (
        "",
        "<>>>>>>>",
        [["nats", "mean", "p50", "p95", "p99", "p99.9", "max", "95 % of the mean"], *nats],
    )
    likely = [summary[f"logprob_{letter}"] for letter in "ab"]
    pairs: dict[str, Sequence[float]] = {
        "entropy, nats per token": [summary[f"entropy_{letter}"] for letter in "ab"],
        "log-prob of the text, nats per token": likely,
        "perplexity of the text": np.exp(np.negative(likely)).tolist(),
    }
    rows = [[title, *(f"{value:.4g}" for value in pair)] for title, pair in pairs.items()]
    yield "", "<>>", [["over the scored tokens", "A", "B"], *rows]
    shares = {"same top-1 token": "same_top1", "acceptance rate, 1 - total variation": "acceptance"}
    rows = [[name, percent(summary[key], 2), within(summary, key)] for name, key in shares.items()]
    yield "", "<>>", [["agreement", "mean", "95 %"], *rows]
    rows = [
        [
            f"{percent(each['from'])} to {percent(([*CONFIDENCE, 1.0])[number])}",
            *(f"{each['tokens']:,}", f"{each['kl_ab']:.4g}"),
            *(percent(each[key], 1) for key in ("same_top1", "acceptance")),
        ]
        for each in report["buckets"]
        for number in [CONFIDENCE.index(each["from"]) + 1]
    ]
    yield (
        "tokens by the probability of A's most likely one",
        "<>>>>",
        [["A's probability", "tokens", "mean KL", "same top-1", "acceptance rate"], *rows],
    )
    rows = [
        [
            *(f"{unit[name]:.4g}" for name in ("kl_ab", "max_kl_ab")),
            *(percent(unit["same_top1"], 1), f"{unit['tokens']:,}"),
            *(location(unit), visible(unit["text"])),
        ]
        for unit in units
    ]
    yield (
        f"{by}s by mean KL(A‖B), the {len(units)} worst",
        ">>>><<",
        [["mean KL", "max KL", "same top-1", "tokens", by, "text"], *rows],
    )
    rows = [["KL", "place", "A expects", "B expects", "text"]]
    for entry in report["top"]:
        before, token, after = (visible(entry[part]) for part in ("before", "token", "after"))
        excerpt = f"{before[-24:]:>24}«{token[:24]}»{after}"
        both = (expected(**entry[f"expected_{letter}"]) for letter in "ab")
        rows.append([f"{entry['kl_ab']:.3g}", location(entry), *both, excerpt])
    yield (
        "tokens by KL(A‖B), what each expects at the marked place, given all before it",
        "><<<<",
        rows,
    )


def notes(report: dict[str, Any]) -> Iterator[str]:
    """Yield the notes below the tables."""
    summary = report["summary"]
    yield intervals_line(summary)
    if report["note"]:
        yield report["note"]
    if report.get("floor"):
        means = (each["kl_ab"]["mean"] for each in (report["floor"], summary))
        yield "Floor, KL(A‖A in another type): mean {:.3g}; B's is {:.3g}.".format(*means)


def intervals_line(summary: dict[str, Any]) -> str:
    """State how the intervals were computed."""
    over = "{units:,} {unit}s".format(**summary["bootstrap"])
    return (
        f"95 % intervals of means: a bootstrap over {over}."
        if summary["intervals"]
        else f"No intervals of means: they need 10 documents or windows, and these are {over}."
    )


def text_report(report: dict[str, Any], width: int) -> str:
    """Write the whole report in lines of about this width."""
    lines = [*fill(report["sentence"], width, 0), ""]
    for letter, model in zip("AB", report["models"], strict=True):
        lines += fill(model_line(letter, model), width)
    lines += fill(f"text  {text_line(report)}", width)
    for title, align, rows in tables(report):
        lines += ["", *([f"{title}:"] if title else []), *table(rows, align, width)]
    lines += ["", *(line for note in notes(report) for line in fill(note, width, 0))]
    return "\n".join(lines)
