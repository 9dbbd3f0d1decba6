"""The figure: reward and KL per step, with and without the penalty."""

from __future__ import annotations

import io

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

# In the order of the runs: without the penalty, with it.
COLOURS = ("#d1495b", "#00798c")
LEAST_KL = 1e-3


def curves(series: dict[str, dict[str, list[float]]], baseline: float) -> bytes:
    """PNG of reward and KL against the step. series: per run, "reward" and "kl" per step; baseline: the reference's reward."""
    figure = Figure(figsize=(8.0, 7.2), dpi=120, layout="constrained")
    figure.suptitle("Fine-tuning on a reward that can be hacked", fontsize=14, fontweight="bold")
    reward, kl = figure.subplots(2, 1, sharex=True)
    for (name, run), colour in zip(series.items(), COLOURS, strict=True):
        _curve(reward, name, run["reward"], colour, "{:.2f}")
        _curve(kl, name, run["kl"], colour, "{:.2g}")
    reward.axhline(baseline, color="#555555", linestyle=":", linewidth=1.5, label="reference")
    reward.set_ylabel("reward\n(share of sampled tokens that are \"self\")")
    reward.set_ylim(0.0, 1.05)
    kl.set_ylabel("KL(policy || reference)\n(nats per token, logarithmic)")
    # The first step samples from the reference itself: its KL is 0 and has no place on this axis.
    kl.set_yscale("log", nonpositive="mask")
    kl.set_ylim(LEAST_KL, 3.0 * max(LEAST_KL, *(value for run in series.values() for value in run["kl"])))
    kl.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    kl.set_xlabel("policy-gradient step")
    for axes in (reward, kl):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper left", frameon=False)
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    return content.getvalue()


def _curve(axes: Axes, name: str, values: list[float], colour: str, form: str) -> None:
    """One run, with its last value at the end of the curve."""
    axes.plot(range(1, len(values) + 1), values, color=colour, linewidth=2, label=name)
    axes.annotate(form.format(values[-1]), (len(values), values[-1]), xytext=(5, 0), textcoords="offset points", va="center", color=colour,
                  annotation_clip=False)
