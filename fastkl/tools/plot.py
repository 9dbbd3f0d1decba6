"""`fastkl plot`: a plot of runs from KLMonitor's files."""

import io
import itertools
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fastkl.rl import read_jsonl

from .errors import expect, told
from .files import write_whole

# Figures by name in the file: axis title, relative height.
PANELS = {
    "reward": ("reward", 2.4),
    "kl/mean": ("KL (nats per token)", 3.8),
    "entropy": ("entropy (nats)", 1.6),
    "beta": ("beta", 1.6),
}
PROFILE_HEIGHT = 2.8
# From Petroff, Accessible Color Sequences for Data Visualization (2021), lightest last:
# distinguishable with red-green and blue-yellow colour deficiency too.
COLOURS = (
    *("#1845fb", "#ff5e02", "#656364", "#c849a9"),
    *("#c91f16", "#578dff", "#adad7d", "#86c8dd"),
)
GREY = "#555555"
TITLE: dict[str, Any] = {"size": 13, "weight": "bold"}
SMALL: dict[str, Any] = {"frameon": False, "fontsize": 9}
# Up to this many steps, each is marked by a dot.
FEW_STEPS = 100
# Largest ratio of maximum to lower edge on the KL's logarithmic axis.
SPAN = 1e5
QUANTILES = ("kl/p50", "kl/p95", "kl/p99")
TARGET, POSITION = "kl/target", "kl/position_"
DRAWN = (*PANELS, *QUANTILES, TARGET, "kl/spike")
# Larger steps are not distinct in float64; larger figures do not fit an axis.
LARGEST_STEP, LARGEST_FIGURE = 2.0**53, 1e100
# No date, so that the same runs give the same bytes.
UNDATED = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
Run = dict[str, np.ndarray]


def plot_runs(sources: Sequence[Path], out: Path) -> str:
    """Draw the runs of some files, write the picture atomically in the format of its suffix, and
    return its name and a sentence on each run.

    Raises UseError for a file without a run and for too many files, OSError if `out` cannot be
    written.
    """
    expect(
        len(sources) <= len(COLOURS),
        "RUN.jsonl",
        f"at most {len(COLOURS)} runs in one picture",
        str(len(sources)),
        "leave some out",
    )
    runs = {name: read_run(path) for name, path in zip(run_names(sources), sources, strict=True)}
    said = [describe(run) for run in runs.values()]
    title, sentence = (*runs, *said) if len(runs) == 1 else ("", "")
    write_whole(out, picture(runs, title, sentence, form=out.suffix[1:].lower()))
    return (
        f"{out}: {sentence}"
        if sentence
        else "\n".join([f"{out}:", *map("  {}: {}".format, runs, said)])
    )


def run_names(sources: Sequence[Path]) -> list[str]:
    """Name runs by their paths relative to the common folder."""
    # File names need not be valid text.
    paths = [Path(os.fsencode(path.absolute()).decode(errors="replace")) for path in sources]
    base = os.path.commonpath([path.parent for path in paths])
    names = [str(path.relative_to(base)).removesuffix(".jsonl") for path in paths]
    expect(
        len({*names}) == len(names),
        "RUN.jsonl",
        "files that differ",
        ", ".join(map(str, paths)),
        "name each once",
    )
    return names


def read_run(source: Path) -> Run:
    """Read figures by name, one per step, NaN for a step without one; "spikes" has the steps with
    an alarm.

    If the file goes back to an earlier step, as after resuming from a checkpoint, the later lines
    replace the steps from there on.
    """
    with told(
        "RUN.jsonl",
        "a file that KLMonitor(jsonl=...) wrote",
        repr(str(source)),
        "number its steps from 0, or pass another",
    ):
        steps: dict[float, dict[str, float]] = {}
        for line in read_jsonl(source):
            step = float(line.get("step", next(reversed(steps), -1.0) + 1))
            if not abs(step) < LARGEST_STEP:
                raise ValueError(f"the step {step}")
            while steps and next(reversed(steps)) >= step:
                steps.popitem()
            steps[step] = line
        names = dict.fromkeys(name for line in steps.values() for name in line)
        parts = (f"{POSITION}{part}" for part in itertools.count(1))
        known = [
            *filter(names.__contains__, DRAWN),
            *itertools.takewhile(names.__contains__, parts),
        ]
        figures = [[float(line.get(name, math.nan)) for line in steps.values()] for name in known]
        table = np.where(np.abs(figures) < LARGEST_FIGURE, figures, math.nan)
        run = dict(zip(known, table, strict=True))
        if not _has(run, "kl/mean"):
            raise ValueError(f"it has no finite 'kl/mean' but {[*names]}")
    numbers = np.array([*steps])
    return run | {
        "step": numbers,
        "spikes": numbers[run.get("kl/spike", np.zeros_like(numbers)) == 1.0],
    }


def _has(run: Run, name: str) -> bool:
    return bool(np.isfinite(run.get(name, math.nan)).any())


def describe(run: Run) -> str:
    """Summarise a run in one sentence."""
    finite, spikes = np.isfinite(run["kl/mean"]), [f"{step:.0f}" for step in run["spikes"]]
    kl = run["kl/mean"][finite]
    text = f"{len(finite):,} steps; KL {kl[-1]:.3g} at the end, {kl.max():.3g} at most"
    if len(kl) < len(finite):
        text += f"; without a finite KL: {len(finite) - len(kl):,} steps"
    return text + (f"; spikes at {', '.join(spikes[:5])}{', …' * (len(spikes) > 5)}" * bool(spikes))


def picture(
    runs: Mapping[str, Run],
    title: str,
    sentence: str,
    levels: Mapping[str, Mapping[str, float]] | None = None,
    form: str = "png",
) -> bytes:
    """Draw the figures of up to eight named runs, one panel above the other.

    levels: named horizontal lines for a figure. form: "png", "svg" or "pdf".
    """
    names = [name for name in PANELS if any(_has(run, name) for run in runs.values())]
    profiled = any(_has(run, f"{POSITION}1") for run in runs.values())
    heights = [PANELS[name][1] for name in names] + [PROFILE_HEIGHT] * profiled
    figure = Figure(figsize=(9.0, 1.5 + sum(heights)), dpi=130, layout="constrained")
    panels: list[Axes] = [
        *figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
    ]
    for name, axes in zip(names, panels, strict=False):
        if axes is not panels[0]:
            axes.sharex(panels[0])
        if name == "kl/mean":
            _scale_kl(axes, runs)
        for run, colour in zip(runs.values(), COLOURS, strict=False):
            if _has(run, name):
                _draw(axes, run, name, colour, alone=len(runs) == 1)
        for label, height in (levels or {}).get(name, {}).items():
            axes.axhline(height, color=GREY, linestyle="--", linewidth=1.2, label=label)
        axes.set_ylabel(PANELS[name][0])
        axes.tick_params(labelbottom=name == names[-1])
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if profiled:
        _draw_profiles(panels[-1], runs)
    for axes in panels:
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        labels = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        if labels:
            # Place the legend above the axes: inside, it would cover a run.
            legend = axes.legend(
                [*labels.values()],
                [*labels],
                loc="lower left",
                bbox_to_anchor=(0.0, 1.0),
                ncols=5,
                **SMALL,
            )
            for line in legend.get_lines() if len(runs) > 1 else ():
                line.set_color(GREY)
    if len(runs) == 1:
        figure.suptitle(title, **TITLE, x=0.012, ha="left", parse_math=False)
    else:
        lines = [Line2D([], [], color=colour, linewidth=2) for colour in COLOURS[: len(runs)]]
        shown = [name if len(name) <= 100 else f"…{name[-99:]}" for name in runs]
        legend = figure.legend(
            lines,
            shown,
            loc="outside upper left",
            ncols=max(1, min(4, 110 // (6 + max(map(len, shown))))),
            title=title,
            title_fontproperties=TITLE,
            alignment="left",
            **SMALL,
        )
        for text in (*legend.get_texts(), legend.get_title()):
            text.set_parse_math(False)
    panels[0].set_title(
        textwrap.fill(sentence, 120),
        loc="left",
        fontsize=9,
        color=GREY,
        pad=24 if panels[0].get_legend() else 8,
    )
    return rendered(figure, form)


def rendered(figure: Figure, form: str) -> bytes:
    """Return a figure as PNG, SVG or PDF; the same figure gives the same bytes."""
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "fastkl"}):
        figure.savefig(content, format=form, metadata=UNDATED.get(form))
    return content.getvalue()


def _scale_kl(axes: Axes, runs: Mapping[str, Run]) -> None:
    """Make the axis logarithmic if there is a KL above 0."""
    names = ("kl/mean", TARGET, *(QUANTILES if len(runs) == 1 else ()))
    values = np.concatenate([run[name] for run in runs.values() for name in names if name in run])
    drawn = np.sort(values[values > 0])
    if len(drawn):
        axes.set_yscale("log", nonpositive="mask")
        axes.set_ylim(max(drawn[0], drawn[-1] / SPAN) / 1.5, 1.5 * drawn[-1])


def _draw(axes: Axes, run: Run, name: str, colour: str, alone: bool) -> None:
    """Draw one figure of one run, and a line at each spike; for a single run also the last value
    and the quantiles of the KL.
    """
    steps, values = run["step"], run[name]
    label = "spike" if name == "kl/mean" else None
    for step in run["spikes"]:
        axes.axvline(step, color=colour, alpha=0.35, linewidth=1.0, zorder=0.5, label=label)
    if name == "kl/mean" and "kl/p50" in run and "kl/p95" in run and alone:
        # Clamp to the axis's lower edge: a quantile of 0 has no logarithm.
        edge = axes.get_ylim()[0] if axes.get_yscale() == "log" else -math.inf
        low, high = (np.maximum(run[quantile], edge) for quantile in QUANTILES[:2])
        axes.fill_between(
            steps,
            low,
            high,
            label="p50 to p95 of the tokens",
            color=colour,
            alpha=0.15,
            linewidth=0,
        )
    if name == "kl/mean" and "kl/p99" in run and alone:
        axes.plot(steps, run["kl/p99"], color=colour, linewidth=0.6, label="p99")
    if name == "kl/mean" and _has(run, TARGET):
        axes.plot(steps, run[TARGET], color=colour, linestyle="--", linewidth=1.2, label="target")
    # A point between two gaps has no line, so draw markers.
    size = 4 if len(steps) <= FEW_STEPS else 1.5
    label = "mean" if name == "kl/mean" and alone else None
    axes.plot(steps, values, ".-", color=colour, markersize=size, linewidth=1.2, label=label)
    last = np.isfinite(values).nonzero()[0][-1]
    if alone:
        axes.annotate(
            f"{values[last]:.3g}",
            (steps[last], values[last]),
            (6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=9,
        )


def _draw_profiles(axes: Axes, runs: Mapping[str, Run]) -> None:
    """Draw the KL against the position in the sequence, averaged over the last tenth of each run's
    steps and, for a single run, over the first tenth.
    """
    for run, colour in zip(runs.values(), COLOURS, strict=False):
        parts = [values for name, values in run.items() if name.startswith(POSITION)]
        if not parts:
            continue
        table = np.ma.masked_invalid(parts)
        middles = (np.arange(len(parts)) + 0.5) * 100 / len(parts)
        some = math.ceil(table.shape[1] / 10)
        if len(runs) == 1:
            axes.plot(
                middles,
                table[:, :some].mean(1),
                ".--",
                color=colour,
                alpha=0.6,
                label="first tenth of the steps",
            )
        axes.plot(
            middles, table[:, -some:].mean(1), ".-", color=colour, label="last tenth of the steps"
        )
    axes.set_xlim(0, 100)
    axes.set_xlabel("position in the sequence (% of its tokens)")
    axes.set_ylabel(PANELS["kl/mean"][0])
