"""The demo from corpus to report."""

from __future__ import annotations

import dataclasses
import math
import platform
import shlex
import sys
import time
from pathlib import Path

import torch

import fastkl
from fastkl.rl import FixedBeta

from ..files import json_text, write_whole
from ..progress import progress
from . import plot, report
from .checkpoints import save_checkpoint
from .corpus import END_OF_FILE, Corpus, build_corpus
from .evaluation import Evaluation, evaluate
from .finetuning import FineTuned, fine_tune
from .memory import compare_memory
from .model import LanguageModel
from .naive import compare_with_naive
from .objective import choose_beta
from .pretraining import held_out_loss, train_reference
from .settings import Settings

NO_PENALTY, WITH_PENALTY = "no penalty", "with KL penalty"
# What a policy's files are called.
STEMS = {"reference": "reference", NO_PENALTY: "no-penalty", WITH_PENALTY: "with-penalty"}
# Rows of the early batch whose logits the comparison with the naive code makes again: few, for training may have done without.
ROWS_COMPARED = 128
# Tokens of the text beside the saved models.
HELD_OUT_TOKENS = 20_000


def run_demo(settings: Settings, out: Path) -> int:
    """Run every stage, print the report, and write into the folder `out`: report.json, report.txt and curves.png, during the runs the monitor's
    no-penalty.jsonl and with-penalty.jsonl, and where the settings ask for them the models; the exit code."""
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
        monitored = out / f"{STEMS[name]}.jsonl"
        monitored.unlink(missing_ok=True)
        runs[name] = fine_tune(reference, corpus, beta, settings, f"policy {name}", monitored)
        clock.stage(name)
    policies = {"reference": reference, **{name: run.policy for name, run in runs.items()}}
    evaluations = {name: evaluate(policy, reference, corpus, settings) for name, policy in progress(policies.items(), "samples of each policy")}
    early = runs[WITH_PENALTY].early
    early_logits = early.policy.logits(ROWS_COMPARED), early.reference.logits(ROWS_COMPARED)
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
    picture = plot.curves({name: run.series for name, run in runs.items()}, evaluations["reference"].reward, settings)
    numbers["seconds"] = clock.seconds()
    for name, content in (("curves.png", picture), ("report.txt", (text + "\n").encode()), ("report.json", json_text(numbers).encode())):
        write_whole(out / name, content)
    jsonl = " and ".join(f"{STEMS[name]}.jsonl" for name in runs)
    text += f"\n\n{clock.total():.0f} s; wrote curves.png, report.txt, report.json, {jsonl} into {out}"
    if settings.save_models:
        text += "\n" + save_models(policies, corpus, settings, out / "models")
    show(text)
    return 0


def save_models(policies: dict[str, LanguageModel], corpus: Corpus, settings: Settings, folder: Path) -> str:
    """Write reference and policies as checkpoints, and a text that none of them was trained on; what to do with them."""
    for name, policy in policies.items():
        save_checkpoint(policy, corpus, settings, folder / STEMS[name])
    write_whole(folder / "held-out.txt", corpus.text(corpus.held_out[:HELD_OUT_TOKENS]).replace(END_OF_FILE, "\n").encode())
    paths = [shlex.quote(str(folder / name)) for name in (STEMS["reference"], STEMS[WITH_PENALTY], "held-out.txt")]
    return f"wrote the models into {folder}; how two of them differ: fastkl compare {paths[0]} {paths[1]} --text {paths[2]}"


def describe(corpus: Corpus, reference: torch.nn.Module, loss: float, logits: torch.Tensor, settings: Settings) -> str:
    """The first lines of the report: what ran on what."""
    parameters = sum(parameter.numel() for parameter in reference.parameters())
    way = f"; computed from hidden states, {settings.chunk_size} tokens at a time" if settings.linear else ""
    updates = f"{settings.steps} steps of {settings.samples} samples" + (f", {settings.epochs} updates each" if settings.epochs > 1 else "")
    region = "" if settings.max_kl is None else f", none further than {settings.max_kl:g} nats per token from the policy before it"
    return "\n".join([
        f"corpus:    {corpus.files} files of Python {platform.python_version()}'s standard library, {corpus.characters / 1e6:.1f} M characters, "
        f"{(corpus.train.numel() + corpus.held_out.numel()) / 1e6:.2f} M tokens of a vocabulary of {corpus.vocabulary}",
        f"reference: {settings.layers} layers, {settings.width} wide, {parameters / 1e6:.1f} M parameters, "
        f"perplexity {math.exp(loss):.0f} on held-out files",
        f"policy:    {settings.algorithm.upper()}, {updates}{region}",
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
