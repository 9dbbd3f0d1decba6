"""Several candidates against one base: table, paired differences, plot, values per token."""

import io
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from ..console import percent, table
from .figures import difference
from .report import fill, intervals_line, model_line, size, text_line, visible, within


def overview(base: dict[str, Any], found: Sequence[Any], floor: Any) -> dict[str, Any]:
    """Combine the reports, sorted by mean KL, with the difference of each from the next."""
    ranked = sorted(found, key=lambda each: float(each.report["summary"]["kl_ab"]["mean"]))
    return {
        "base": base,
        "candidates": [each.report for each in ranked],
        "floor": floor and floor.report["summary"],
        "differences": [
            {
                "less": less.report["letter"],
                "more": more.report["letter"],
                **difference(more.tokens, less.tokens),
            }
            for less, more in pairwise(ranked)
        ],
    }


def text(whole: dict[str, Any], width: int) -> str:
    """Write the overview in lines of about this width."""
    reports = whole["candidates"]
    models = {"A": whole["base"], **{each["letter"]: each["models"][1] for each in reports}}
    lines = [part for model in models.items() for part in fill(model_line(*model), width)]
    lines += fill(f"text  {text_line(reports[0] | {'models': [*models.values()]})}", width)
    head = ["", "mean KL", "95 %", "99.9 %", "max", "same top-1", "acceptance", "size"]
    rows = [
        [each["letter"], *_figures(each["summary"]), size(each["models"][1]["bytes"])]
        for each in reports
    ]
    if whole["floor"]:
        rows.append(["floor", *_figures(whole["floor"]), ""])
    lines += [
        *("", "KL(A‖·), nats per token:", *table([head, *rows], "<>>>>>>>", width)),
        *("", intervals_line(reports[0]["summary"])),
        *("", "differences of mean KL over the same tokens; p: of a sign-flip test"),
    ]
    for each in whole["differences"]:
        sure = "{:.3g} … {:.3g}  p = {p:.2g}".format(*each["interval"], **each) if each["p"] else ""
        lines.append(f"{each['more']} - {each['less']}  {each['mean']:.3g}  {sure}".rstrip())
    return "\n".join(lines)


def _figures(summary: dict[str, Any]) -> list[str]:
    kl = summary["kl_ab"]
    return [
        f"{kl['mean']:.4g}",
        within(summary, "kl_ab"),
        *(f"{kl[key]:.4g}" for key in ("p999", "max")),
        percent(summary["same_top1"], 2),
        percent(summary["acceptance"], 2),
    ]


def picture(found: Sequence[Any], floor: Any, form: str) -> bytes:
    """Draw the mean KL(A‖·) of each candidate, with its interval, against its size on disk."""
    from matplotlib.figure import Figure

    from ..plot import GREY, rendered

    unit = 1e9 if max(each.report["models"][1]["bytes"] for each in found) >= 1e8 else 1e6
    figure = Figure(figsize=(7.0, 4.5), dpi=130, layout="constrained")
    axes = figure.subplots()
    for each in found:
        about, summary = each.report["models"][1], each.report["summary"]
        kl, place = summary["kl_ab"]["mean"], about["bytes"] / unit
        low, high = summary["intervals"].get("kl_ab", (kl, kl))
        axes.errorbar(place, kl, [[kl - low], [high - kl]], fmt="o", capsize=3, color="#00798c")
        label = f"{each.report['letter']} {visible(Path(about['name']).name)}"
        axes.annotate(label, (place, kl), (7, 5), textcoords="offset points", parse_math=False)
    if floor:
        height = floor.report["summary"]["kl_ab"]["mean"]
        axes.axhline(height, color=GREY, linestyle="--", linewidth=1)
        axes.text(0.01, height, "floor", transform=axes.get_yaxis_transform(), va="bottom")
    axes.set(
        xlabel=f"size on disk ({'GB' if unit == 1e9 else 'MB'})",
        ylabel="mean KL(A‖·) (nats per token)",
    )
    if all(each.report["summary"]["kl_ab"]["mean"] > 0 for each in found):
        axes.set_yscale("log")
    axes.margins(x=0.2, y=0.15)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    return rendered(figure, form)


def table_of_tokens(found: Sequence[Any], path: Path) -> Iterator[bytes | str]:
    """Yield the values of every token of every candidate, as JSON lines or Parquet."""
    parts = (
        each.tokens.assign(candidate=each.report["models"][1]["name"])
        .reset_index()
        .astype(dict.fromkeys(("window", "top_a", "top_b"), "Int64"))  # floats because of NaN
        for each in found
    )
    if path.suffix.lower() == ".jsonl":
        for part in parts:
            # 15 decimals keep the digits of a KL of 1e-9.
            yield part.to_json(orient="records", lines=True, force_ascii=False, double_precision=15)
    else:
        content = io.BytesIO()
        pd.concat(parts, ignore_index=True).to_parquet(content, index=False)
        yield content.getvalue()
