"""`fastkl plot`: the picture of runs from the files that KLMonitor wrote."""

import io
import math
import textwrap
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastkl.rl import read_jsonl

from .errors import told
from .files import write_whole

# Figures by their names in the file: the title of their axis, and its relative height.
PANELS = {"reward": ("reward", 2.4), "kl/mean": ("KL (nats per token)", 3.8), "beta": ("beta", 1.6)}
COLOURS, SPIKE = ("#d1495b", "#00798c"), "#e09f3e"
# The logarithmic axis of the KL reaches at most so far down from its largest figure.
SPAN = 1e5
QUANTILES = ("kl/p50", "kl/p95", "kl/p99")
DRAWN = (*PANELS, *QUANTILES, "kl/spike")
# A float does not tell larger steps from the next; an axis has no room for larger figures.
LARGEST_STEP, LARGEST_FIGURE = 2.0**53, 1e100
WROTE = "a file that KLMonitor(jsonl=...) wrote"
Run = dict[str, np.ndarray]


def plot_run(source: Path, out: Path) -> str:
    """Draw the run of a file, write the PNG whole or not at all, and return a sentence on the run.

    Raises UseError for a file with no run in it, OSError for an `out` that cannot be written.
    """
    run = read_run(source)
    sentence = describe(run)
    # A file's name may have bytes that are no text.
    write_whole(out, picture({"": run}, source.name.encode(errors="replace").decode(), sentence))
    return sentence


def read_run(source: Path) -> Run:
    """Read figures by name, one per step, NaN where a step has none, and under "spikes" the steps
    at which the alarm rang.

    Where the file goes back to an earlier step, as where a run went on from a checkpoint, the steps
    from there on are those that follow.
    """
    with told("RUN.jsonl", WROTE, repr(str(source)), "number its steps from 0, or pass another"):
        steps: dict[float, dict[str, float]] = {}
        for line in read_jsonl(source):
            step = float(line.get("step", next(reversed(steps), -1.0) + 1))
            if not abs(step) < LARGEST_STEP:
                raise ValueError(f"the step {step}")
            while steps and next(reversed(steps)) >= step:
                steps.popitem()
            steps[step] = line
        names = dict.fromkeys(name for line in steps.values() for name in line)
        known = [name for name in DRAWN if name in names]
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
    """Say in one sentence what the run did."""
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
) -> bytes:
    """Draw the figures of one or two runs, each with its name, one above the other, as PNG.

    levels: for a figure, horizontal lines by their names.
    """
    names = [name for name in PANELS if any(_has(run, name) for run in runs.values())]
    heights = [PANELS[name][1] for name in names]
    figure = Figure(figsize=(9.0, 1.5 + sum(heights)), dpi=130, layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.012, ha="left", parse_math=False)
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, name in zip(panels, names, strict=True):
        if name == "kl/mean":
            _scale_kl(axes, runs)
        for (label, run), colour in zip(runs.items(), COLOURS, strict=False):
            if _has(run, name):
                _draw(axes, run, name, colour, label)
        for label, height in (levels or {}).get(name, {}).items():
            axes.axhline(height, color="#555555", linestyle="--", linewidth=1.2, label=label)
        axes.set_ylabel(PANELS[name][0])
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            # Above the axes: inside, it would cover one run or the other.
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=9)
    panels[0].set_title(
        textwrap.fill(sentence, 120), loc="left", fontsize=9, color="#555555", pad=24
    )
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _scale_kl(axes: Axes, runs: Mapping[str, Run]) -> None:
    """Make the axis logarithmic, where there is a KL above 0."""
    names = ("kl/mean", *QUANTILES)
    values = np.concatenate([run[name] for run in runs.values() for name in names if name in run])
    drawn = np.sort(values[values > 0])
    if len(drawn):
        axes.set_yscale("log", nonpositive="mask")
        # The first steps, on their way up from 0, may leave the axis.
        axes.set_ylim(max(drawn[len(drawn) // 50], drawn[-1] / SPAN) / 1.5, 1.5 * drawn[-1])


def _draw(axes: Axes, run: Run, name: str, colour: str, label: str) -> None:
    """Draw one figure of one run, with its last value, and a line at each spike."""
    steps, values = run["step"], run[name]
    for step in run["spikes"]:
        axes.axvline(step, color=SPIKE, linewidth=1.0, zorder=0.5)
    if name == "kl/mean" and "kl/p50" in run and "kl/p95" in run:
        # From the axis's lower edge where most tokens have a KL of 0, which has no logarithm.
        edge = axes.get_ylim()[0] if axes.get_yscale() == "log" else -math.inf
        low, high = (np.maximum(run[quantile], edge) for quantile in QUANTILES[:2])
        axes.fill_between(
            steps,
            low,
            high,
            label="p50 to p95 of the tokens",
            color=colour,
            alpha=0.18,
            linewidth=0,
        )
    if name == "kl/mean" and "kl/p99" in run:
        axes.plot(steps, run["kl/p99"], color=colour, linewidth=0.6, label="p99")
    axes.plot(steps, values, ".-", color=colour, label=label)
    last = np.isfinite(values).nonzero()[0][-1]
    axes.annotate(
        f"{values[last]:.3g}",
        (steps[last], values[last]),
        (6, 0),
        textcoords="offset points",
        va="center",
        color=colour,
        fontsize=9,
    )
