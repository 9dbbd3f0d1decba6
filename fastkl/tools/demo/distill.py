"""`fastkl demo --algorithm distill`: distil the reference into students of too little capacity.

Three students start equal and read the same text, each with a different divergence. The report
shows the probability that each student misses and invents.
"""

import dataclasses
from typing import Any

import torch
from matplotlib.figure import Figure

from fastkl import linear_divergence

from ..console import table
from ..plot import rendered
from . import Settings
from .corpus import Corpus, windows
from .model import LanguageModel, train_reference

# Divergence by label: its name in fastkl.linear_divergence, and whether the teacher is P.
LOSSES: dict[str, tuple[Any, bool]] = {
    "forward KL": ("kl", True),
    "reverse KL": ("kl", False),
    "JSD": ("js", True),
}
STUDENT: dict[str, Any] = dict(width=8, layers=1, heads=2, reference_batch=6, reference_rate=1e-2)
COLUMNS = ["student of", "KL(teacher‖student)", "KL(student‖teacher)", "JSD", "missed", "invented"]
LESSON = """
Nats per token of held-out text. Missed: the teacher's probability of tokens to which the student
gives less than a tenth of it; invented: the student's, of tokens to which the teacher gives less
than a tenth of it.

Forward KL, KL(teacher‖student), has no bound where the student misses something: its student covers
all that the teacher does, and invents what lies between. Reverse KL, KL(student‖teacher), has none
where the student invents something: its student seeks the teacher's modes, and misses the rest. The
JSD is at most log 2 either way: its student is between."""


def divergence(
    teacher: LanguageModel, student: LanguageModel, tokens: torch.Tensor, name: str
) -> torch.Tensor:
    """Compute the mean of a divergence in LOSSES over tokens [B, T], from hidden states."""
    p, q = (teacher, student) if LOSSES[name][1] else (student, teacher)
    return linear_divergence(
        p.hidden(tokens),
        p.lm_head.weight,
        q.hidden(tokens),
        q.lm_head.weight,
        bias=p.lm_head.bias,
        ref_bias=q.lm_head.bias,
        divergence=LOSSES[name][0],
        reduction="mean",
    )


@torch.no_grad()
def masses(teacher: LanguageModel, student: LanguageModel, tokens: torch.Tensor) -> list[float]:
    """Return the probability that the student misses, and that it invents, as defined in LESSON."""
    p, q = (model.lm_head(model.hidden(tokens)).softmax(-1) for model in (teacher, student))
    return [(a * (a > 10.0 * b)).sum(-1).mean().item() for a, b in ((p, q), (q, p))]


def distill(
    teacher: LanguageModel, corpus: Corpus, settings: Settings, numbers: dict[str, Any]
) -> tuple[str, dict[str, bytes]]:
    """Train the students; return the report and curves.png, and add to `numbers`."""
    small = dataclasses.replace(settings, reference_steps=settings.steps, **STUDENT)
    text = windows(
        corpus.held_out,
        settings.context,
        settings.evaluation_samples,
        torch.Generator().manual_seed(settings.seed + 1),
    ).to(settings.device)
    curves, final = {name: list[list[float]]() for name in LOSSES}, dict[str, list[float]]()
    for name in LOSSES:

        def loss(student: LanguageModel, batch: torch.Tensor, name: str = name) -> torch.Tensor:
            curves[name].append(masses(teacher, student, text))
            return divergence(teacher, student, batch[:, :-1], name)

        student, _ = train_reference(corpus, small, loss, f"student, {name}")
        final[name] = [
            *(divergence(teacher, student, text, of).item() for of in LOSSES),
            *masses(teacher, student, text),
        ]
    numbers |= {"curves": curves, "final": final}
    rows = (
        [name, *(f"{x:.3f}" for x in found[:3]), *(f"{x:.1%}" for x in found[3:])]
        for name, found in final.items()
    )
    return "\n".join([*table([COLUMNS, *rows], "<>>>>>"), LESSON]), {"curves.png": picture(curves)}


def picture(curves: dict[str, list[list[float]]]) -> bytes:
    """Draw the probability that the students miss and invent, against the step, as PNG."""
    figure = Figure(figsize=(9.0, 4.2), dpi=130, layout="constrained")
    for at, axes in enumerate(figure.subplots(1, 2)):
        for name, curve in curves.items():
            axes.plot([each[at] for each in curve], label=name)
        axes.set(
            title=f"{COLUMNS[at + 4]}: only the {('teacher', 'student')[at]} expects it",
            xlabel="step",
            ylabel="share of probability",
            ylim=(0, None),
        )
        axes.legend(frameon=False)
    return rendered(figure, "png")
