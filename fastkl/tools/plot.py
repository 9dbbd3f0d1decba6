"""`fastkl plot`: the picture of a run from the file that KLMonitor wrote: reward, KL with its quantiles, beta, spikes."""

from __future__ import annotations

import errno
import io
import itertools
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fastkl.rl import read_jsonl

from .files import check_readable, write_whole

REWARD, KL, BETA, SPIKE = "#3d5a80", "#00798c", "#7d5ba6", "#d1495b"
# The logarithmic axis of the KL reaches at most this far down from its largest figure.
DECADES = 5.0
# A reward of as many steps gets a moving mean over a fortieth of them. The KL does not: it would blur what a monitor is for.
SMOOTHED_FROM = 120
# Curves of fewer show each step as a dot.
DOTTED_BELOW = 40
# Beyond it a float no longer tells a step from the next; figures beyond theirs have no room on an axis and count as not finite.
LARGEST_STEP, LARGEST_FIGURE = 2.0**53, 1e100
# Figures that are drawn, by their names in the file, and what they are called.
DRAWN = {"reward": "reward", "kl/mean": "KL", "kl/p50": "p50", "kl/p95": "p95", "kl/p99": "p99",
         "beta": "beta"}


class NothingToPlotError(ValueError):
    """A file that has no run in it; the message completes "expected a file that KLMonitor(jsonl=...) wrote, "."""


def plot_run(source: Path, out: Path) -> str:
    """Draw the run of a file and write the PNG, whole or not at all; returns a sentence on the run.

    Raises NothingToPlotError for a file that cannot be read or has no run in it, OSError for an `out` that is this file or cannot be written.
    """
    run, replaced = read_run(source)
    if out.exists() and out.samefile(source):
        raise FileExistsError(errno.EEXIST, "it holds the run", str(out))
    missing = left_out(run) + replaced
    content = picture(run, source.name, missing)
    write_whole(out, content)
    return describe(run) + (f"; left out: {', '.join(missing)}" if missing else "")


def read_run(source: Path) -> tuple[dict[str, list[float]], list[str]]:
    """Read figures by name, a list over the steps each, NaN where a step has none; and name the
    lines of the file that are not among them.

    Where the file goes back to an earlier step, as where a run went on from a checkpoint, the steps
    from there on are those that follow.
    """
    try:
        check_readable(source)
        # Before they are read, so that lines which a run adds meanwhile do not count; a pipe is
        # read only once.
        content = source.read_bytes() if source.is_file() else b""
        written = sum(map(bool, map(bytes.strip, content.replace(b"\0", b"").splitlines())))
        lines = read_jsonl(source)
    except OSError as error:
        raise NothingToPlotError(f"got {str(source)!r} ({error.strerror}); name one that exists") from None
    except ValueError as error:
        raise NothingToPlotError(f"got another: {error}") from None
    if not lines:
        raise NothingToPlotError(f"got {str(source)!r}, which is empty; the first line comes with the first update")
    steps: dict[float, dict[str, float]] = {}
    for line in lines:
        step = line.get("step", next(reversed(steps), -1.0) + 1)
        if not isinstance(step, float) or not abs(step) < LARGEST_STEP:
            raise NothingToPlotError(f"got {str(source)!r} with the step {step} in it; number the steps from 0")
        while steps and next(reversed(steps)) >= step:
            steps.popitem()
        steps[step] = line
    names = dict.fromkeys(name for line in steps.values() for name in line)
    run = {name: [_figure(line, name) for line in steps.values()] for name in names} | {"step": list(steps)}
    if not _has(run, "kl/mean"):
        raise NothingToPlotError(f"got {str(source)!r} without a finite 'kl/mean' in it, only {', '.join(map(repr, names))}")
    counts = ((len(lines) - len(steps), "replaced by a later start"),
              (written - len(lines), "cut off"))
    return run, [f"{_plural(count, 'line')} ({why})" for count, why in counts if count > 0]


def _figure(line: dict[str, object], name: str) -> float:
    """NaN for what an axis has no place for: text and lists, which read_jsonl leaves as they are, and what is not there or too large."""
    value = line.get(name)
    return value if isinstance(value, float) and abs(value) < LARGEST_FIGURE else math.nan


def _has(run: dict[str, list[float]], name: str) -> bool:
    return any(map(math.isfinite, run.get(name, ())))


def _spikes(run: dict[str, list[float]]) -> list[float]:
    """The steps that rang."""
    return [step for step, spike in zip(run["step"], run.get("kl/spike", ()), strict=False) if spike == 1.0]


def describe(run: dict[str, list[float]]) -> str:
    """The run in one sentence."""
    finite = [value for value in run["kl/mean"] if math.isfinite(value)]
    parts = [_plural(len(run["step"]), "step"), f"KL {finite[-1]:.3g} at the end, {max(finite):.3g} at most"]
    if "kl/spike" in run:
        spikes = [f"{step:.0f}" for step in _spikes(run)]
        where = f" at {', '.join(spikes[:5])}{', …' if len(spikes) > 5 else ''}" if spikes else ""
        parts.append(f"{_plural(len(spikes), 'spike')}{where}")
    return "; ".join(parts)


def left_out(run: dict[str, list[float]]) -> list[str]:
    """Name the figures that have no place in the picture at some steps: none or not finite there,
    or below a logarithmic axis."""
    low, _ = _kl_limits(run)
    found: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, label in DRAWN.items():
        values = run.get(name, ())
        gaps = tuple(index for index, value in enumerate(values) if not math.isfinite(value))
        below = tuple(index for index, value in enumerate(values)
                      if value < low and name in ("kl/mean", "kl/p99"))
        for why, steps in (("none or not finite", gaps), ("below the axis", below)):
            if steps:
                found.setdefault((why, steps), []).append(label)
    return [f"{'/'.join(labels)} of {_plural(len(steps), 'step')} ({why})"
            for (why, steps), labels in found.items()]


def _kl_limits(run: dict[str, list[float]]) -> tuple[float, float]:
    """Return (lowest, highest) figure of the logarithmic axis of the KL; infinite where no KL is above 0
    and the axis is linear."""
    drawn = sorted(value for name in DRAWN if name.startswith("kl/")
                   for value in run.get(name, ()) if 0 < value < math.inf)
    if not drawn:
        return -math.inf, math.inf
    # The first steps, on their way up from 0, may leave the axis.
    return max(drawn[len(drawn) // 50], drawn[-1] * 10**-DECADES) / 1.5, 1.5 * drawn[-1]


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


# ---- the picture


def picture(run: dict[str, list[float]], title: str, missing: Sequence[str] = ()) -> bytes:
    """Draw the figures that the run has, one above the other, and say what is missing, as PNG."""
    panels = [("reward", 2.2, _draw_reward), ("kl/mean", 3.8, _draw_kl), ("beta", 1.6, _draw_beta)]
    panels = [panel for panel in panels if _has(run, panel[0])]
    heights = [height for _, height, _ in panels]
    figure = Figure(figsize=(9.0, 1.5 + sum(heights)), dpi=130, layout="constrained")
    # A file's name is not mathtext, and may have bytes that are no text.
    figure.suptitle(title.encode(errors="replace").decode(), fontsize=13, fontweight="bold", x=0.012, ha="left", parse_math=False)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (_, _, draw) in zip(axes, panels, strict=True):
        draw(panel, run)
        for step in _spikes(run):
            panel.axvline(step, color=SPIKE, linewidth=0.8, alpha=0.4, zorder=0.5)
        panel.grid(alpha=0.2)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.01)
        if panel.get_legend_handles_labels()[0]:
            # Above the axes: inside, it would cover one run or the other.
            panel.legend(loc="lower left", bbox_to_anchor=(0.0, 1.01), borderaxespad=0.0, frameon=False, fontsize=9, ncols=4)
    notes = textwrap.wrap(f"left out: {', '.join(missing)}", 120) if missing else []
    axes[0].set_title("\n".join([describe(run), *notes]), loc="left", fontsize=9, color="#555555", pad=24)
    axes[-1].set_xlabel("step")
    if len(run["step"]) == 1:
        axes[-1].set_xlim(run["step"][0] - 1, run["step"][0] + 1)
    axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=9, steps=[1, 2, 5, 10], integer=True))
    figure.align_ylabels(axes)
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    return content.getvalue()


def _draw_reward(axes: Axes, run: dict[str, list[float]]) -> None:
    width = len(run["step"]) // 40
    if len(run["step"]) < SMOOTHED_FROM:
        _curve(axes, run["step"], run["reward"], REWARD)
    else:
        axes.plot(run["step"], run["reward"], color=REWARD, linewidth=0.7, alpha=0.4, label="each step")
        _curve(axes, run["step"], moving_mean(run["reward"], width), REWARD, f"mean of {2 * (width // 2) + 1} steps")
    axes.set_ylabel("reward")


def _draw_beta(axes: Axes, run: dict[str, list[float]]) -> None:
    _curve(axes, run["step"], run["beta"], BETA)
    axes.set_ylabel("beta")


def _draw_kl(axes: Axes, run: dict[str, list[float]]) -> None:
    """Mean, median to 95 % as a band, 99 % as a thin line, spikes at the upper edge; logarithmic where there is a KL above 0."""
    steps, spikes = run["step"], _spikes(run)
    _curve(axes, steps, run["kl/mean"], KL, "mean")
    low, high = _kl_limits(run)
    if _has(run, "kl/p50") and _has(run, "kl/p95"):
        # From the axis's lower edge where most tokens have a KL of 0, which has no logarithm.
        lower, upper = ([max(value, low) if math.isfinite(value) else math.nan for value in run[name]] for name in ("kl/p50", "kl/p95"))
        axes.fill_between(steps, lower, upper, color=KL, alpha=0.18, linewidth=0, label="p50 to p95 of the tokens")
    if _has(run, "kl/p99"):
        axes.plot(steps, run["kl/p99"], color=KL, linewidth=0.6, alpha=0.7, label="p99")
    if spikes:
        axes.plot(spikes, [1.0] * len(spikes), linestyle="", marker="v", markersize=5, color=SPIKE, transform=axes.get_xaxis_transform(),
                  clip_on=False, label=_plural(len(spikes), "spike"))
    axes.set_ylabel("KL (nats per token)")
    if high < math.inf:
        axes.set_yscale("log", nonpositive="mask")
        axes.set_ylim(low, high)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=10))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _curve(axes: Axes, steps: list[float], values: list[float], colour: str, label: str | None = None) -> None:
    """A figure over the steps, its last value beside its end."""
    axes.plot(steps, values, color=colour, linewidth=1.8 if len(steps) < 2 * SMOOTHED_FROM else 1.2, label=label,
              marker="o" if len(steps) < DOTTED_BELOW else None, markersize=3)
    last = max(index for index, value in enumerate(values) if math.isfinite(value))
    axes.annotate(f"{values[last]:.3g}", (steps[last], values[last]), xytext=(6, 0), textcoords="offset points", va="center", color=colour,
                  fontsize=9)


def moving_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean over `width` (made odd) steps around each one, as many as there are at the ends; values that are not finite are left out."""
    finite = [(value, 1) if math.isfinite(value) else (0.0, 0) for value in values]
    sums, counts = ([0, *itertools.accumulate(column)] for column in zip(*finite, strict=True))
    windows = [(max(0, index - width // 2), min(len(values), index + width // 2 + 1)) for index in range(len(values))]
    return [(sums[end] - sums[start]) / (counts[end] - counts[start]) if counts[end] > counts[start] else math.nan for start, end in windows]
