"""`fastkl plot`: the picture of runs from the files that KLMonitor wrote."""

from __future__ import annotations

import errno
import io
import math
import textwrap
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fastkl.rl import read_jsonl

from .files import write_whole

# Figures by their names in the file: the title of their axis, and its relative height.
PANELS = {"reward": ("reward", 2.4), "kl/mean": ("KL (nats per token)", 3.8), "beta": ("beta", 1.6)}
QUANTILES = ("kl/p50", "kl/p95", "kl/p99")
COLOURS, SPIKE = ("#00798c", "#d1495b"), "#e09f3e"
# The logarithmic axis of the KL reaches at most so far down from its largest figure.
SPAN = 1e5
# A reward of as many steps is also drawn as a mean over a fortieth of them. The KL is not: it would
# blur what a monitor is for.
SMOOTHED_FROM = 120
# A float does not tell larger steps from the next; an axis has no room for larger figures.
LARGEST_STEP, LARGEST_FIGURE = 2.0**53, 1e100
Run = dict[str, np.ndarray]


class NothingToPlotError(ValueError):
    """A file without a run; completes "expected a file that KLMonitor(jsonl=...) wrote, "."""


def plot_run(source: Path, out: Path) -> str:
    """Draw the run of a file, write the PNG whole or not at all, and return a sentence on the run.

    Raises NothingToPlotError for a file with no run in it, OSError for an `out` that is this file
    or cannot be written.
    """
    run, replaced = read_run(source)
    if out.exists() and out.samefile(source):
        raise FileExistsError(errno.EEXIST, "it holds the run", str(out))
    sentence = describe(run, replaced)
    # A file's name may have bytes that are no text.
    title = source.name.encode(errors="replace").decode()
    write_whole(out, picture({"": run}, title, sentence))
    return sentence


def read_run(source: Path) -> tuple[Run, int]:
    """Read figures by name, one per step, NaN where a step has none; and count replaced lines.

    Where the file goes back to an earlier step, as where a run went on from a checkpoint, the steps
    from there on are those that follow.
    """
    got = f"got {str(source)!r}"
    try:
        lines = read_jsonl(source)
    except ValueError as error:
        raise NothingToPlotError(f"got another: {error}") from None
    steps: dict[float, dict[str, float]] = {}
    for line in lines:
        step = line.get("step", next(reversed(steps), -1.0) + 1)
        if not isinstance(step, float) or not abs(step) < LARGEST_STEP:
            raise NothingToPlotError(f"{got} with the step {step} in it; number the steps from 0")
        while steps and next(reversed(steps)) >= step:
            steps.popitem()
        steps[step] = line
    names = dict.fromkeys(name for line in steps.values() for name in line)
    run = {name: np.array([_figure(line.get(name)) for line in steps.values()]) for name in names}
    if not np.isfinite(run.get("kl/mean", math.nan)).any():
        raise NothingToPlotError(f"{got} without a finite 'kl/mean' in it; it has {[*names]}")
    return run | {"step": np.array([*steps])}, len(lines) - len(steps)


def _figure(value: object) -> float:
    return value if isinstance(value, float) and abs(value) < LARGEST_FIGURE else math.nan


def describe(run: Run, replaced: int = 0) -> str:
    """Say in one sentence what the run did, and what of the file has no place in the picture."""
    kl = run["kl/mean"][np.isfinite(run["kl/mean"])]
    parts = [
        _plural(len(run["step"]), "step") + f"; KL {kl[-1]:.3g} at the end, {kl.max():.3g} at most"
    ]
    if "kl/spike" in run:
        spikes = [f"{step:.0f}" for step in run["step"][run["kl/spike"] == 1.0]]
        where = f" at {', '.join(spikes[:5])}{', …' * (len(spikes) > 5)}" if spikes else ""
        parts.append(_plural(len(spikes), "spike") + where)
    low, _ = _kl_limits(run)
    for name in filter(run.__contains__, (*PANELS, *QUANTILES)):
        floor = low if name in ("kl/mean", "kl/p99") else -math.inf
        if gaps := int((~(run[name] >= floor)).sum()):
            parts.append(f"left out: {name} of {_plural(gaps, 'step')}")
    if replaced:
        parts.append(f"left out: {_plural(replaced, 'line')} (replaced by a later start)")
    return "; ".join(parts)


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'s' * (count != 1)}"


def _kl_limits(*runs: Run) -> tuple[float, float]:
    # Lowest and highest figure of the logarithmic axis; infinite without a KL above 0.
    names = ("kl/mean", *QUANTILES)
    values = np.concatenate([run[name] for run in runs for name in names if name in run])
    drawn = np.sort(values[(values > 0) & np.isfinite(values)])
    if not len(drawn):
        return -math.inf, math.inf
    # The first steps, on their way up from 0, may leave the axis.
    return max(drawn[len(drawn) // 50], drawn[-1] / SPAN) / 1.5, 1.5 * drawn[-1]


def picture(
    runs: Mapping[str, Run],
    title: str,
    sentence: str,
    levels: Mapping[str, Mapping[str, float]] | None = None,
) -> bytes:
    """Draw the figures of one or two runs, each with its name, one above the other, as PNG.

    levels: for a figure, horizontal lines by their names.
    """
    low, high = _kl_limits(*runs.values())
    names = [name for name in PANELS if any(_has(run, name) for run in runs.values())]
    heights = [PANELS[name][1] for name in names]
    colours = COLOURS[len(runs) - 1 :: -1]
    figure = Figure(figsize=(9.0, 1.5 + sum(heights)), dpi=130, layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.012, ha="left", parse_math=False)
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, name in zip(panels, names, strict=True):
        for (run_name, run), colour in zip(runs.items(), colours, strict=True):
            if _has(run, name):
                _draw(axes, run, name, colour, run_name, low)
        for label, height in (levels or {}).get(name, {}).items():
            axes.axhline(height, color="#555555", linestyle="--", linewidth=1.2, label=label)
        axes.set_ylabel(PANELS[name][0])
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            # Above the axes: inside, it would cover one run or the other.
            axes.legend(
                loc="lower left", bbox_to_anchor=(0.0, 1.0), frameon=False, fontsize=9, ncols=4
            )
    if high < math.inf:
        axes = panels[names.index("kl/mean")]
        axes.set_yscale("log", nonpositive="mask")
        axes.set_ylim(low, high)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panels[0].set_title(
        textwrap.fill(sentence, 120), loc="left", fontsize=9, color="#555555", pad=24
    )
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels()
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _has(run: Run, name: str) -> bool:
    return bool(np.isfinite(run.get(name, math.nan)).any())


def _draw(axes: Axes, run: Run, name: str, colour: str, label: str, low: float) -> None:
    # One figure of one run, its last value beside its end, and a line where the alarm rang.
    steps, values = run["step"], run[name]
    for step in steps[run["kl/spike"] == 1.0] if "kl/spike" in run else ():
        axes.axvline(step, color=SPIKE, linewidth=1.0, zorder=0.5)
    if name == "kl/mean" and "kl/p50" in run and "kl/p95" in run:
        # From the axis's lower edge where most tokens have a KL of 0, which has no logarithm.
        lower, upper = (np.maximum(run[quantile], low) for quantile in ("kl/p50", "kl/p95"))
        axes.fill_between(
            steps,
            lower,
            upper,
            color=colour,
            alpha=0.18,
            linewidth=0,
            label="p50 to p95 of the tokens",
        )
    if name == "kl/mean" and "kl/p99" in run:
        axes.plot(steps, run["kl/p99"], color=colour, linewidth=0.6, label="p99")
    if name == "reward" and len(steps) >= SMOOTHED_FROM:
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.4, label="each step")
        window, finite = np.ones(len(steps) // 80 * 2 + 1), np.isfinite(values)
        sums = np.convolve(np.where(finite, values, 0.0), window, "same")
        counts = np.convolve(finite, window, "same")
        values = sums / np.where(counts > 0, counts, math.nan)
        label = f"{label} mean of {len(window)} steps"
    axes.plot(steps, values, ".-" if len(steps) < SMOOTHED_FROM else "-", color=colour, label=label)
    last = np.isfinite(values).nonzero()[0][-1]
    axes.annotate(
        f"{values[last]:.3g}",
        (steps[last], values[last]),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        color=colour,
        fontsize=9,
    )
