"""The figure: reward and KL per step, with and without the penalty."""

from __future__ import annotations

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = {"no penalty": "#d1495b", "with KLPenalty": "#00798c"}


def curves(series: dict[str, dict[str, list[float]]], baseline: float, title: str) -> bytes:
    """PNG of reward and KL against the step. series: per run, "reward" and "kl" per step; baseline: the reference's reward."""
    figure = Figure(figsize=(8.0, 7.0), layout="constrained")
    figure.suptitle(title, fontsize=13)
    reward, kl = figure.subplots(2, 1, sharex=True)
    for name, run in series.items():
        steps = range(1, len(run["reward"]) + 1)
        reward.plot(steps, run["reward"], color=COLOURS[name], linewidth=2, label=name)
        kl.plot(steps, run["kl"], color=COLOURS[name], linewidth=2, label=name)
    reward.axhline(baseline, color="#555555", linestyle=":", linewidth=1.5, label="reference")
    reward.set_ylabel("reward\n(share of tokens that are `self`)")
    reward.set_ylim(0.0, 1.0)
    kl.set_ylabel("KL(policy || reference)\n(nats per token)")
    kl.set_xlabel("policy-gradient step")
    kl.set_ylim(bottom=0.0)
    for axes in (reward, kl):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper left", frameon=False)
    reward.margins(x=0.01)
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    return content.getvalue()
