"""The demo from corpus to report."""

from __future__ import annotations

import dataclasses
import math
import platform
import sys
import time
from pathlib import Path

import torch

import fastkl
from fastkl.rl import FixedBeta

from ..files import json_text, write_whole
from . import plot, report
from .corpus import Corpus, build_corpus
from .evaluation import Evaluation, evaluate
from .finetuning import FineTuned, fine_tune
from .memory import compare_memory
from .naive import compare_with_naive
from .objective import choose_beta
from .pretraining import held_out_loss, train_reference
from .progress import progress
from .settings import Settings

NO_PENALTY, WITH_PENALTY = "no penalty", "with KLPenalty"
MONITORED = {NO_PENALTY: "no-penalty.jsonl", WITH_PENALTY: "with-penalty.jsonl"}
# Rows of the early batch whose logits the comparison with the naive code makes again: few, for training may have done without.
ROWS_COMPARED = 128


def run_demo(settings: Settings, out: Path) -> int:
    """Run every stage, print the report, and write into the folder `out`: report.json, report.txt and curves.png, and during the runs the monitor's
    no-penalty.jsonl and with-penalty.jsonl; the exit code."""
    torch.set_num_threads(settings.threads)
    clock = Clock()
    corpus = build_corpus(settings)
    clock.stage("corpus")
    reference, losses = train_reference(corpus, settings)
    reference_loss = held_out_loss(reference, corpus, settings)
    clock.stage("reference")
    runs = {}
    for name, beta in ((NO_PENALTY, FixedBeta(0.0)), (WITH_PENALTY, choose_beta(settings))):
        # A monitor goes on in the file that it finds: that of an earlier demo is not this run's.
        (out / MONITORED[name]).unlink(missing_ok=True)
        runs[name] = fine_tune(reference, corpus, beta, settings, f"policy {name}", out / MONITORED[name])
        clock.stage(name)
    policies = {"reference": reference, **{name: run.policy for name, run in runs.items()}}
    evaluations = {name: evaluate(policy, reference, corpus, settings) for name, policy in progress(policies.items(), "samples of each policy")}
    early = runs[WITH_PENALTY].early
    early_logits = early.logits(ROWS_COMPARED)
    comparison = compare_with_naive(*early_logits)
    numbers = collect(settings, corpus, losses, reference_loss, runs, evaluations, comparison)
    remarks = [report.comparison_line(comparison), report.slow_path_line(evaluations)]
    if settings.linear:
        numbers["memory"] = compare_memory(early, settings)
        remarks.append(report.memory_line(numbers["memory"]))
    clock.stage("evaluation")

    text = "\n\n".join([
        describe(corpus, reference, reference_loss, early_logits[0], settings), report.table(evaluations), report.conclusion(evaluations),
        report.monitored(runs, settings),
        *(report.sample_text(name, evaluation) for name, evaluation in evaluations.items()), "\n".join(remarks),
    ])
    picture = plot.curves({name: run.series for name, run in runs.items()}, evaluations["reference"].reward,
                          None if settings.beta is not None else settings.target_kl)
    numbers["seconds"] = clock.seconds()
    for name, content in (("curves.png", picture), ("report.txt", (text + "\n").encode()), ("report.json", json_text(numbers).encode())):
        write_whole(out / name, content)
    show(text + f"\n\n{clock.total():.0f} s; wrote curves.png, report.txt, report.json, {' and '.join(MONITORED.values())} into {out}")
    return 0


def describe(corpus: Corpus, reference: torch.nn.Module, loss: float, logits: torch.Tensor, settings: Settings) -> str:
    """The first lines of the report: what ran on what."""
    parameters = sum(parameter.numel() for parameter in reference.parameters())
    way = f"; computed from hidden states, {settings.chunk_size} tokens at a time" if settings.linear else ""
    return "\n".join([
        f"corpus:    {corpus.files} files of Python {platform.python_version()}'s standard library, {corpus.characters / 1e6:.1f} M characters, "
        f"{(corpus.train.numel() + corpus.held_out.numel()) / 1e6:.2f} M tokens of a vocabulary of {corpus.vocabulary}",
        f"reference: {settings.layers} layers, {settings.width} wide, {parameters / 1e6:.1f} M parameters, "
        f"perplexity {math.exp(loss):.0f} on held-out files",
        f"fastkl:    {fastkl.explain(logits)}{way}",
    ])


def collect(settings: Settings, corpus: Corpus, losses: list[float], reference_loss: float, runs: dict[str, FineTuned],
            evaluations: dict[str, Evaluation], comparison: dict) -> dict:
    """Every number of the run, for the JSON file."""
    final = {name: {**evaluation.figures(), "samples": evaluation.texts} for name, evaluation in evaluations.items()}
    return {
        "configuration": dataclasses.asdict(settings),
        "versions": {"fastkl": fastkl.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": torch.cuda.get_device_name(settings.device) if settings.device != "cpu" else "cpu",
        "corpus": {"files": corpus.files, "characters": corpus.characters, "vocabulary": corpus.vocabulary,
                   "tokens": corpus.train.numel() + corpus.held_out.numel()},
        "reference": {"loss": losses, "held_out_loss": reference_loss},
        "series": {name: run.series for name, run in runs.items()},
        "monitor": {name: {**run.summary, "alarms": report.alarms(run.series), "jump": report.steepest(run.series)} for name, run in runs.items()},
        "final": final,
        "fused_vs_naive": comparison,
    }


def show(text: str) -> None:
    """Print, on terminals of any encoding."""
    encoding = sys.stdout.encoding or "ascii"
    print(text.encode(encoding, errors="replace").decode(encoding))


class Clock:
    """Seconds per stage."""

    def __init__(self) -> None:
        self._stages: dict[str, float] = {}
        self._start = self._last = time.perf_counter()

    def stage(self, name: str) -> None:
        """The stage of this name ends here."""
        now = time.perf_counter()
        self._stages[name], self._last = now - self._last, now

    def seconds(self) -> dict[str, float]:
        """Seconds per stage and in total."""
        return {**self._stages, "total": self.total()}

    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start
