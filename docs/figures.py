"""Draw the figures of docs/mathematics.md: `python docs/figures.py [NAME ...]`.

Each figure has a function that computes data and a function that draws them into
docs/figures/NAME.svg. Seeds are fixed; a file's bytes depend on the pinned matplotlib and this
machine's exp.
"""

import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import fastkl
from fastkl import testing

FOLDER = Path(__file__).resolve().parent / "figures"
# Okabe and Ito's colours, distinguishable with colour blindness, on white.
BLUE, ORANGE, GREEN, PINK, BLACK = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#222222"
Curves = dict[str, torch.Tensor]


# ---- errors by the size of the KL


def one_pass_kl(p_logits: torch.Tensor, q_logits: torch.Tensor) -> torch.Tensor:
    """Compute E_p[x - y] - lse(x) + lse(y), as in a kernel without a centre."""
    difference = (p_logits.softmax(-1) * (p_logits - q_logits)).sum(-1)
    return difference - p_logits.logsumexp(-1) + q_logits.logsumexp(-1)


def textbook_kl(p_logits: torch.Tensor, q_logits: torch.Tensor) -> torch.Tensor:
    """Compute Σ p·(log p - log q) from two log-softmaxes."""
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def errors(rows: int = 4, vocabulary: int = 32000) -> Curves:
    """Compute the largest relative error over rows of float32 formulas, at KLs from 5e-10 to 1."""
    found: dict[str, list[torch.Tensor]] = {}
    for i, exponent in enumerate(torch.arange(-9.0, 0.25, 0.25)):
        size = float((2 * 10**exponent) ** 0.5)
        p, q = testing.pair("normal3", rows, vocabulary, size, seed=i)
        exact = testing.truth(p, q).kl
        found.setdefault("KL", []).append(exact.mean())
        for name, function in {
            "two log-softmaxes": textbook_kl,
            "one pass without a centre": one_pass_kl,
            "fastkl": fastkl.kl_divergence,
        }.items():
            off = (function(p, q).double() - exact).abs() / exact
            found.setdefault(name, []).append(off.max())
    return {name: torch.stack(values) for name, values in found.items()}


def draw_errors(axes: Axes, data: Curves) -> None:
    """Draw errors against the KL."""
    styles = {"two log-softmaxes": (ORANGE, "o"), "one pass without a centre": (PINK, "^")}
    for name, (colour, marker) in {**styles, "fastkl": (BLUE, "s")}.items():
        axes.loglog(data["KL"], data[name], marker, color=colour, ms=4, label=name)
    axes.axhline(1, color=BLACK, lw=0.8, ls="--")
    axes.text(1.2, 1.3, "as large as the KL itself", ha="right", size=9, color=BLACK)
    axes.set(xlabel="KL (nats)", ylabel="relative error, float32, V = 32000")
    axes.legend(frameon=False)


# ---- a narrow student of a teacher with two modes


def bump(place: torch.Tensor, mean: float | torch.Tensor, width: float | torch.Tensor):
    """Compute logits of a discretised normal distribution."""
    return -((place - mean) ** 2) / (2 * width**2)


def fits() -> Curves:
    """Fit a student with one mode to a teacher with two; each divergence starts from both modes and
    keeps the better fit.
    """
    place = torch.arange(61, dtype=torch.float64)
    modes = bump(place, 18.0, 4.0).softmax(-1), bump(place, 43.0, 4.0).softmax(-1)
    teacher = (0.6 * modes[0] + 0.4 * modes[1]).log()
    losses = {
        "forward, KL(teacher‖student)": lambda student: fastkl.kl_divergence(teacher, student),
        "reverse, KL(student‖teacher)": lambda student: fastkl.kl_divergence(student, teacher),
    }
    found = {"token": place, "teacher": teacher.exp()}
    for name, loss in losses.items():
        ends = []
        for start in (18.0, 43.0):
            at = torch.tensor([start, 5.0], dtype=torch.float64, requires_grad=True)
            optimizer = torch.optim.LBFGS([at], max_iter=200, line_search_fn="strong_wolfe")

            def closure(at=at, optimizer=optimizer, loss=loss):
                optimizer.zero_grad()
                value = loss(bump(place, at[0], at[1]))
                value.backward()
                return value

            optimizer.step(closure)
            student = bump(place, *at.detach())
            ends.append((float(loss(student)), student.softmax(-1)))
        found[name] = min(ends, key=lambda end: end[0])[1]
    return found


def draw_fits(axes: Axes, data: Curves) -> None:
    """Draw the teacher as bars and students as lines."""
    place, teacher, forward, reverse = data.values()
    axes.bar(place, teacher, width=1.0, color="#cccccc", label="teacher")
    for values, colour, name in zip(
        (forward, reverse), (BLUE, ORANGE), list(data)[2:], strict=True
    ):
        axes.plot(place, values, color=colour, lw=2, label=name)
    axes.set(xlabel="token", ylabel="probability", ylim=(0, 0.145))
    axes.legend(frameon=False, loc="upper right")


# ---- estimators from one sampled token


def estimators(vocabulary: int = 4096) -> Curves:
    """Compute, by enumeration of all tokens, the standard deviation of k1, k2 and k3 from one
    sampled token and the bias of k2, all divided by the KL, at KLs from 1e-6 to 1.
    """
    found: dict[str, list[torch.Tensor]] = {}
    for exponent in torch.arange(-6.0, 0.25, 0.25):
        size = float((2 * 10**exponent) ** 0.5)
        p, q = (x.double() for x in testing.pair("normal3", 1, vocabulary, size, seed=3))
        log_p, log_q, kl = p.log_softmax(-1), q.log_softmax(-1), fastkl.kl_divergence(p, q)
        found.setdefault("KL", []).append(kl[0])
        for name in ("k1", "k2", "k3"):
            value = fastkl.estimate_kl(log_p, log_q, estimator=name)
            mean = (log_p.exp() * value).sum(-1)
            variance = (log_p.exp() * (value - mean) ** 2).sum(-1)
            found.setdefault(name, []).append((variance.sqrt() / kl)[0])
            found.setdefault(f"bias of {name}", []).append(((mean - kl) / kl)[0].abs())
    return {name: torch.stack(values) for name, values in found.items()}


def draw_estimators(axes: Axes, data: Curves) -> None:
    """Draw deviations against the KL, and the bias of k2."""
    for name, colour, style in (("k1", ORANGE, "-"), ("k2", GREEN, "-"), ("k3", BLUE, "--")):
        axes.loglog(data["KL"], data[name], style, color=colour, lw=2, label=f"deviation of {name}")
    axes.loglog(data["KL"], data["bias of k2"], ":", color=GREEN, lw=2, label="bias of k2")
    axes.set(xlabel="KL (nats)", ylabel="of one token, over the KL")
    axes.legend(frameon=False)


# ---- divergences of two tokens


def two_tokens() -> Curves:
    """Compute divergences of P = softmax(2, 0) and Q = softmax(gap, 0)."""
    gap = torch.linspace(-8, 8, 321, dtype=torch.float64)
    q = torch.stack([gap, torch.zeros_like(gap)], -1)
    p = torch.tensor([2.0, 0.0], dtype=torch.float64).expand_as(q)
    return {
        "gap": gap,
        "KL(P‖Q)": fastkl.kl_divergence(p, q),
        "KL(Q‖P)": fastkl.kl_divergence(q, p),
        "Rényi, α = 0.5": fastkl.renyi_divergence(p, q, alpha=0.5),
        "skew KL, α = 0.1": fastkl.skew_kl_divergence(p, q, alpha=0.1),
        "JSD, β = 0.5": fastkl.js_divergence(p, q, beta=0.5),
        "total variation": fastkl.total_variation(p, q),
    }


def draw_two_tokens(axes: Axes, data: Curves) -> None:
    """Draw divergences against Q's gap."""
    colours = (BLUE, ORANGE, PINK, "#56b4e9", GREEN, BLACK)
    styles = ("-", "-", "--", "-.", "-", ":")
    for name, colour, style in zip(list(data)[1:], colours, styles, strict=True):
        axes.plot(data["gap"], data[name], style, color=colour, lw=2, label=name)
    axes.set(xlabel="logit gap of Q; P has 2", ylabel="divergence (nats; TV: a probability)")
    axes.set(ylim=(0, 4))
    axes.legend(frameon=False)


FIGURES = {
    "errors": (errors, draw_errors),
    "directions": (fits, draw_fits),
    "estimators": (estimators, draw_estimators),
    "two-tokens": (two_tokens, draw_two_tokens),
}


def write(name: str) -> Path:
    """Write a figure and return its path."""
    data, draw = FIGURES[name]
    path = FOLDER / f"{name}.svg"
    with matplotlib.rc_context({"svg.hashsalt": name, "font.size": 10}):
        figure = Figure(figsize=(7, 4.2), facecolor="white", layout="constrained")
        draw(figure.subplots(), data())
        figure.axes[0].spines[["top", "right"]].set_visible(False)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
    return path


if __name__ == "__main__":
    torch.set_num_threads(1)
    for chosen in sys.argv[1:] or FIGURES:
        print(write(chosen))
