"""The figure: reward, KL and beta per step, with and without the penalty, and where the alarm rang."""

from __future__ import annotations

import io

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .settings import Settings

# In the order of the runs: without the penalty, with it.
COLOURS = ("#d1495b", "#00798c")
ALARM = "#e09f3e"
LEAST_KL = 1e-3


def curves(series: dict[str, dict[str, list[float]]], baseline: float, settings: Settings) -> bytes:
    """PNG of reward, KL and beta against the step. series: per run, the figures of finetuning.SERIES; baseline: the reference's reward."""
    figure = Figure(figsize=(8.0, 9.0), dpi=120, layout="constrained")
    figure.suptitle(f"{settings.algorithm.upper()} on a reward that can be hacked", fontsize=14, fontweight="bold")
    reward, kl, beta = figure.subplots(3, 1, sharex=True, height_ratios=(4, 5, 2))
    for (name, run), colour in zip(series.items(), COLOURS, strict=True):
        _curve(reward, name, run["reward"], colour, "{:.2f}")
        _curve(kl, name, run["kl"], colour, "{:.2g}", LEAST_KL)
        steps = range(1, len(run["kl"]) + 1)
        lower, upper = ([max(value, LEAST_KL) for value in run[key]] for key in ("kl_p50", "kl_p99"))
        kl.fill_between(steps, lower, upper, color=colour, alpha=0.15, linewidth=0, label="median to 99 % of the tokens")
        _curve(beta, name, run["beta"], colour, "{:.2f}")
        _mark_alarms((reward, kl), name, run["alarm"])
    if settings.beta is None:
        kl.axhline(settings.target_kl, color="#555555", linestyle="--", linewidth=1.2, label=f"target {settings.target_kl:g}")
    reward.axhline(baseline, color="#555555", linestyle=":", linewidth=1.5, label="reference")
    reward.set_ylabel("reward\n(share of sampled tokens that are \"self\")")
    reward.set_ylim(0.0, 1.05)
    kl.set_ylabel("KL(policy || reference)\n(nats per token, logarithmic)")
    # The first step samples from the reference itself: its KL is 0 and has no place on this axis.
    kl.set_yscale("log", nonpositive="mask")
    kl.set_ylim(LEAST_KL, 3.0 * max(LEAST_KL, *(value for run in series.values() for value in run["kl_p99"])))
    kl.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    beta.set_ylabel("beta")
    beta.set_ylim(bottom=0.0)
    beta.margins(y=0.15)
    beta.set_xlabel("step")
    for axes in (reward, kl, beta):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    reward.legend(loc="upper left", frameon=False)
    kl.legend(loc="lower right", frameon=False, fontsize=9)
    figure.align_ylabels()
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    return content.getvalue()


def _mark_alarms(panels: tuple[Axes, Axes], name: str, alarm: list[float]) -> None:
    """A line in both panels where the alarm of a run first rang."""
    if 1.0 not in alarm:
        return
    step = alarm.index(1.0) + 1
    for axes in panels:
        axes.axvline(step, color=ALARM, linewidth=1.8, zorder=0.5)
    panels[0].annotate(f"spike alarm\n({name}, step {step})", (step, 0.32), xytext=(5, 0), textcoords="offset points", color=ALARM, fontsize=9)


def _curve(axes: Axes, name: str, values: list[float], colour: str, form: str, least: float = 0.0) -> None:
    """One run, with its last value at the end of the curve, on axes that begin at `least`."""
    axes.plot(range(1, len(values) + 1), values, color=colour, linewidth=2, label=name)
    axes.annotate(form.format(values[-1]), (len(values), max(values[-1], least)), xytext=(5, 0), textcoords="offset points", va="center",
                  color=colour, annotation_clip=False)
