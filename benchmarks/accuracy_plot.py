"""The picture of benchmarks/accuracy.py: worst relative error against the size of the KL, a line
per provider, a panel per element type.
"""

import io
import math
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from benchmarks.accuracy import cell, column_title, names_of, reasons, sizes
from fastkl.tools.files import write_whole

TITLES = {"fp32": "float32 logits", "bf16": "bfloat16 logits"}
OURS = {"fastkl": "#006d77", "fastkl (Triton, interpreted)": "#2a9d8f"}
COLOURS = ("#c1121f", "#e07a1f", "#b8860b", "#8d5a97", "#3d5a80", "#6c757d", "#a0522d", "#d0509e")
LABEL = 0.42  # decades of the error from one label to the next
LABELS_WIDTH = 5.4  # decades of the KL that the labels take beside the first panel


def draw(data, path):
    """Writes the PNG, 1600 pixels wide and whole or not at all: errors of the KL above, of its
    gradient below, the element types side by side.
    """
    dtypes = list(dict.fromkeys(record["dtype"] for record in data["records"]))
    figure = Figure(figsize=(8, 7), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(
        2,
        len(dtypes),
        squeeze=False,
        sharex="col",
        sharey="row",
        width_ratios=[1.55] + [1] * (len(dtypes) - 1),
    )
    for row, (measure, title) in zip(
        panels, (("kl", "KL"), ("gradient", f"gradient of the KL to {data['wrt']}")), strict=True
    ):
        for panel, dtype in zip(row, dtypes, strict=True):
            hollow = measure == "kl"
            _axes(
                panel,
                f"{title}, {TITLES.get(dtype, dtype)}",
                [record["target"] for record in data["records"]],
                panel is row[0],
            )
            drawn = curves(data, dtype, measure)
            for name, points in drawn.items():
                _line(panel, name, points, _colour(name, data), hollow)
            if panel is row[0]:
                _labels(panel, drawn, data)
    for panel in panels[-1]:
        panel.set_xlabel("true KL of a row in nats", fontsize=8)
    kinds = len({record["distribution"] for record in data["records"]})
    figure.supylabel(
        f"relative error against float64, worst of {data['rows']} rows of each of {kinds} kinds, "
        f"V = {data['vocabulary']}",
        fontsize=8,
    )
    figure.supxlabel(_caption(data), fontsize=7, color="#555555")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_whole(Path(path), buffer.getvalue())


def _caption(data):
    fewer = [
        column_title(data, name) for name in names_of(data) if column_title(data, name) != name
    ]
    interpreted = (
        "; interpreted: GPU kernels in Triton's interpreter"
        if any("interpreted" in name for name in names_of(data))
        else ""
    )
    return "; ".join(
        ["hollow: some of these KL came out negative; arrow: infinite" + interpreted, *fewer]
    )


def curves(data, dtype, measure):
    """{provider: {size: figure of `cell`}}, ours last, to be drawn on top."""
    names = sorted(names_of(data), key=lambda name: name in OURS)
    found = {
        name: {
            target: cell(records, name, measure) for target, records in sizes(data, dtype).items()
        }
        for name in names
    }
    found = {
        name: {target: figure for target, figure in points.items() if figure}
        for name, points in found.items()
    }
    return {name: points for name, points in found.items() if points}


def _colour(name, data):
    others = [other for other in names_of(data) if other not in OURS and other not in reasons(data)]
    return OURS.get(name) or COLOURS[others.index(name) % len(COLOURS)]


def _axes(panel, title, targets, labelled):
    low, high = math.log10(min(targets)), math.log10(max(targets))
    panel.set_title(title, fontsize=9, loc="left")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlim(10 ** (low - (LABELS_WIDTH if labelled else 0.4)), 10 ** (high + 0.4))
    panel.set_ylim(3e-8, 3e3)
    panel.xaxis.set_major_locator(
        FixedLocator(
            [
                target
                for target in sorted(set(targets))
                if (round(math.log10(target)) - round(low)) % 2 == 0
            ]
        )
    )
    panel.yaxis.set_major_locator(FixedLocator([10.0**exponent for exponent in range(-7, 4, 2)]))
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_minor_locator(NullLocator())
    panel.tick_params(labelsize=7, length=2)
    panel.grid(color="#e5e5e5", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _line(panel, name, points, colour, hollow):
    ours = name in OURS
    finite = {target: figure for target, figure in points.items() if 0 < figure["worst"] < math.inf}
    width, order = (2.2, 5) if ours else (1.0, 3)
    panel.plot(
        list(finite),
        [figure["worst"] for figure in finite.values()],
        color=colour,
        linewidth=width,
        zorder=order,
    )
    for target, figure in points.items():
        infinite = not figure["worst"] < math.inf
        height, marker, size = (
            (panel.get_ylim()[1], "^", 5)
            if infinite
            else (max(figure["worst"], panel.get_ylim()[0]), "o", 3.2)
        )
        face = "white" if hollow and figure["negative"] else colour
        panel.plot(
            target,
            height,
            marker=marker,
            markersize=size,
            color=colour,
            markerfacecolor=face,
            markeredgewidth=0.8,
            zorder=order + 1,
            clip_on=False,
        )


def _labels(panel, drawn, data):
    """Each provider's name in its line's colour, beside its first point: apart from each other, in
    the order of the points.
    """
    start = {
        name: math.log10(min(max(points[min(points)]["worst"], 1e-7), 1e3))
        for name, points in drawn.items()
    }
    order = sorted(start, key=start.get, reverse=True)
    for name, height in zip(order, _apart([start[name] for name in order]), strict=True):
        first, colour = min(drawn[name]), _colour(name, data)
        panel.annotate(
            name,
            (first, 10 ** start[name]),
            (first / 10**0.55, 10**height),
            fontsize=7,
            color=colour,
            ha="right",
            va="center",
            zorder=7,
            fontweight="bold" if name in OURS else "normal",
            arrowprops={
                "arrowstyle": "-",
                "relpos": (1, 0.5),
                "color": colour,
                "linewidth": 0.4,
                "shrinkA": 0,
                "shrinkB": 2,
            },
        )


def _apart(heights):
    """The descending heights moved as little as it takes to be LABEL apart: groups that touch are
    spread about their middle.
    """
    groups = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _bottom(groups[-2]) - _top(groups[-1]) < LABEL:
            last = groups.pop()
            groups[-1] += last
    return [_top(group) - LABEL * i for group in groups for i in range(len(group))]


def _top(group):
    return sum(group) / len(group) + LABEL * (len(group) - 1) / 2


def _bottom(group):
    return sum(group) / len(group) - LABEL * (len(group) - 1) / 2
