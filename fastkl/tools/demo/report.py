"""What the demo prints and the files it leaves: a table, samples, one line of comparison, JSON."""

from __future__ import annotations

import itertools
import textwrap

from ..words import percent
from .evaluation import Evaluation
from .finetuning import FineTuned
from .settings import Settings

TEXT_WIDTH = 110
# Steps at the end of a run over which the KL that the controller holds is averaged.
LAST_STEPS = 8
MONITORED = (("kl/mean", "mean"), ("kl/p50", "median"), ("kl/p95", "95 %"), ("kl/p99", "99 %"), ("kl/max", "max"))
COLUMNS = (
    ("reward", "reward", 'share of "self"', "{:.3f}"),
    ("kl", "KL to reference", "nats per token", "{:.3f}"),
    ("perplexity", "perplexity", "under reference", "{:,.0f}"),
    ("entropy", "entropy", "nats", "{:.2f}"),
    ("distinct", "distinct tokens", "share per sample", "{:.2f}"),
)


def table(evaluations: dict[str, Evaluation]) -> str:
    """One line per policy."""
    rows = [["", *(column[1] for column in COLUMNS)], ["", *(column[2] for column in COLUMNS)]]
    for name, evaluation in evaluations.items():
        rows.append([name, *(form.format(evaluation.figures()[key]) for key, _, _, form in COLUMNS)])
    return _aligned(rows, headings=2)


def _aligned(rows: list[list[str]], headings: int) -> str:
    """Columns of text, the first one's left edges and the others' right edges aligned, with a line below the headings."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [row[0].ljust(widths[0]) + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)) for row in rows]
    lines.insert(headings, "-" * max(map(len, lines)))
    return "\n".join(line.rstrip() for line in lines)


def monitored(runs: dict[str, FineTuned], settings: Settings) -> str:
    """What KLMonitor saw of each run: KL over all its tokens, KL and beta at its end, and when the alarm rang."""
    rows = [["KL in training, nats", *(heading for _, heading in MONITORED), f"last {LAST_STEPS} steps", "beta", "alarm"]]
    for name, run in runs.items():
        rang = alarms(run.series)
        rows.append([name, *(f"{run.summary[key]:.3f}" for key, _ in MONITORED), f"{held(run.series):.3f}", f"{run.series['beta'][-1]:.3f}",
                     f"step {rang[0]}" if rang else "silent"])
    without, penalised = (run.series for run in runs.values())
    rang, jump = alarms(without), steepest(without)
    text = f"Without a penalty the KL rises most at step {jump}, from {without['kl'][jump - 2]:.2g} to {without['kl'][jump - 1]:.2g} nats per token. "
    if rang:
        text += f"The monitor's alarm first rings at step {rang[0]}. "
    else:
        text += f"The monitor's alarm does not ring; it is always silent in a run's first {settings.alarm_recent + 16} steps. "
    text += f"In the penalised run it rings at step {alarms(penalised)[0]}. " if alarms(penalised) else "In the penalised run it never rings. "
    text += weight_sentence(penalised, settings) + region_sentence(runs, settings)
    return _aligned(rows, headings=1) + "\n\n" + textwrap.fill(text, TEXT_WIDTH)


def weight_sentence(series: dict[str, list[float]], settings: Settings) -> str:
    """How the penalised run's beta was chosen, and which KL came of it."""
    kl = held(series)
    if settings.beta is not None:
        return f"Its beta is fixed at {settings.beta:g}; the last {LAST_STEPS} steps have a KL of {kl:.3f}."
    return (f"A PID controller moves its beta, between {min(series['beta']):.2f} and {max(series['beta']):.2f}, to hold a KL of "
            f"{settings.target_kl:g}: the last {LAST_STEPS} steps have {kl:.3f}, {kl / settings.target_kl - 1:+.0%}.")


def region_sentence(runs: dict[str, FineTuned], settings: Settings) -> str:
    """What the trust region did, if there is one."""
    if settings.max_kl is None:
        return ""
    parts = []
    for name, run in runs.items():
        taken = run.series["step_fraction"]
        undone = taken.count(0.0)
        parts.append(f"{name} it shortened {sum(0.0 < part < 1.0 for part in taken)} of {len(taken)} and undid {undone}")
    largest = max(kl for run in runs.values() for kl, part in zip(run.series["step_kl"], run.series["step_fraction"], strict=True) if part > 0)
    return (f" The trust region ends an update where it is {settings.max_kl:g} nats per token from the policy before it: {', '.join(parts)}; "
            f"the longest that was taken has {largest:.2g}.")


def alarms(series: dict[str, list[float]]) -> list[int]:
    """The steps, from 1, at which the alarm rang."""
    return [step for step, rang in enumerate(series["alarm"], 1) if rang]


def steepest(series: dict[str, list[float]]) -> int:
    """The step, from 1, whose KL is higher than that of the step before by most nats."""
    rises = [after - before for before, after in itertools.pairwise(series["kl"])]
    return 2 + max(range(len(rises)), key=rises.__getitem__)


def held(series: dict[str, list[float]]) -> float:
    """Mean KL of the last steps."""
    last = series["kl"][-LAST_STEPS:]
    return sum(last) / len(last)


def sample_text(name: str, evaluation: Evaluation) -> str:
    """One sample of a policy, indented: the prompt, and the response in « »."""
    prompt, response = evaluation.texts[0]
    lines = f"{prompt}«{response}»".strip("\n").split("\n")
    folded = [line[start:start + TEXT_WIDTH] for line in lines for start in range(0, max(len(line), 1), TEXT_WIDTH)]
    return "\n".join([f"{name}:", *(f"  | {line}".rstrip() for line in folded)])


def comparison_line(comparison: dict) -> str:
    """fastkl against the naive code, in one line."""
    naive, fused = comparison["naive"], comparison["fused"]
    return (f"fused vs naive, on {comparison['rows']} rows of this run with KL {comparison['kl']:.1e}: "
            f"value error {fused['value_error']:.0e} vs {naive['value_error']:.0e}, "
            f"gradient error {fused['gradient_error']:.0e} vs {naive['gradient_error']:.0e}, "
            f"held for backward {fused['bytes_per_row']:,.0f} vs {naive['bytes_per_row']:,.0f} bytes per row")


def memory_line(memory: dict) -> str:
    """What the training step needs without logits, and what it would need with them, in one line."""
    linear, direct = memory["from_hidden_states"], memory["through_logits"]
    return (f"memory for loss and gradient of {memory['tokens']} tokens, every allocation counted by torch.profiler: "
            f"{_megabytes(linear['peak'])} at the peak, largest tensor {_megabytes(linear['largest'])}; the logits of policy and reference and "
            f"their gradient, {_megabytes(memory['logits'])}, were never made in training (through them: {_megabytes(direct['peak'])} at the peak)")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def conclusion(evaluations: dict[str, Evaluation]) -> str:
    """What the table says, in words; the verdict only where the figures bear it out."""
    before, without, penalised = evaluations.values()
    text = (f"The reward counts the word \"self\" and can be hacked. Without a penalty it goes from {before.reward:.3f} to {without.reward:.3f}: "
            f"{without.kl:.2f} nats per token from the reference, perplexity {without.perplexity:,.0f}, {percent(without.distinct)} distinct tokens. "
            f"With the KL penalty it goes to {penalised.reward:.3f}: {penalised.kl:.2f} nats per token, perplexity {penalised.perplexity:,.0f}, "
            f"{percent(penalised.distinct)} distinct tokens. ")
    collapsed = without.perplexity > 10 * before.perplexity and without.distinct < 0.5 * before.distinct
    kept = penalised.perplexity < 2 * before.perplexity and penalised.distinct > 0.5 * before.distinct and penalised.reward > before.reward
    if collapsed and kept:
        text += "That is what the penalty is for: the reward rises in both runs, but only the penalised policy still writes code."
    else:
        text += "These settings do not show what the penalty is for; the defaults of --steps and --beta do."
    return textwrap.fill(text, TEXT_WIDTH)


def slow_path_line(evaluations: dict[str, Evaluation]) -> str:
    """How much of the run's logits the kernels would read again."""
    shares = ", ".join(f"{name} {percent(evaluation.slow_path, 2)}" for name, evaluation in evaluations.items())
    return f"rows that the Triton kernels read again, because one pass cannot hold them: {shares}"
