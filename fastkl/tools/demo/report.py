"""The run from corpus to report: figures, plot, conclusions."""

import dataclasses
import math
import shlex
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import torch

import fastkl
from fastkl.rl import FixedBeta, PIDBeta

from ..console import percent, progress, table
from ..files import json_text, write_whole
from ..plot import picture, read_run
from . import Settings
from .corpus import END_OF_FILE, Corpus, build_corpus, windows
from .distill import distill
from .model import LanguageModel, checkpoint_files, sample, train_reference
from .training import fine_tune

Figures = dict[str, Any]
# File name stems of a run.
STEMS = {"no penalty": "no-penalty", "with KL penalty": "with-penalty"}
# Steps at the end of a run over which the KL is averaged.
LAST_STEPS = 8
TEXT_WIDTH = 110
# Tokens of the text saved with the models.
HELD_OUT_TOKENS = 20_000
COLUMNS = {
    "reward": ("reward", 'share of "self"', ".3f"),
    "kl": ("KL to reference", "nats per token", ".3f"),
    "perplexity": ("perplexity", "under reference", ",.0f"),
    "entropy": ("entropy", "nats", ".2f"),
    "distinct": ("distinct tokens", "share per sample", ".2f"),
}


def run_demo(settings: Settings, out: Path) -> int:
    """Run every stage, print the report, and write the files into the folder `out`.

    The files are curves.png, report.txt, report.json and those of the algorithm, each written
    atomically after the last stage. Returns the exit code.
    """
    # One CPU thread gives the same numbers on any number of cores; several are slower on a busy
    # machine, because they synchronise after every small operation.
    torch.set_num_threads(1)
    start = time.perf_counter()
    corpus = build_corpus(settings)
    reference, losses = train_reference(corpus, settings)
    numbers: Figures = {
        "configuration": dataclasses.asdict(settings),
        "versions": {"fastkl": fastkl.__version__, "torch": torch.__version__},
        "backend": str(fastkl.explain(torch.empty(1, corpus.vocabulary, device=settings.device))),
        "corpus": {
            "files": len(corpus.texts),
            "characters": sum(map(len, corpus.texts)),
            "vocabulary": corpus.vocabulary,
            "tokens": corpus.train.numel() + corpus.held_out.numel(),
        },
        "reference": {
            "loss": losses,
            "parameters": sum(parameter.numel() for parameter in reference.parameters()),
        },
    }
    text, files = (distill if settings.algorithm == "distill" else ppo)(
        reference, corpus, settings, numbers
    )
    numbers["seconds"] = time.perf_counter() - start
    files |= {"report.txt": (text + "\n").encode(), "report.json": json_text(numbers).encode()}
    for name, content in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(out / name, content)
    names = ", ".join(name for name in files if "/" not in name)
    print(f"{text}\n\n{numbers['seconds']:.0f} s; wrote {names} into {out}")
    if settings.save_models:
        folder = out / "models"
        pair = f"{folder}/reference", f"{folder}/with-penalty"
        how = shlex.join(["fastkl", "compare", *pair, "--text", f"{folder}/held-out.txt"])
        print(f"wrote the models into {folder}; how two of them differ: {how}")
    return 0


def ppo(
    reference: LanguageModel, corpus: Corpus, settings: Settings, numbers: Figures
) -> tuple[str, dict[str, bytes]]:
    """Fine-tune without and with the penalty; return the report and further files, and add to
    `numbers`.

    The files are curves.png, the monitors' no-penalty.jsonl and with-penalty.jsonl, and with
    settings.save_models the models and a held-out text.
    """
    # The KL responds to beta after many steps; the derivative term prevents overshoot.
    penalised = (
        PIDBeta(settings.initial_beta, settings.target_kl, kp=0.4, ki=0.03, kd=1.5)
        if settings.beta is None
        else FixedBeta(settings.beta)
    )
    policies, files, drawn = {"reference": reference}, {}, {}
    numbers |= {"series": {}, "monitor": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, beta in zip(STEMS, (FixedBeta(0.0), penalised), strict=True):
            jsonl = Path(folder, f"{STEMS[name]}.jsonl")
            policies[name], series, summary = fine_tune(
                reference, corpus, beta, settings, f"policy {name}", jsonl
            )
            files[jsonl.name], drawn[name] = jsonl.read_bytes(), read_run(jsonl)
            numbers["series"][name], numbers["monitor"][name] = series, watched(series, summary)
    numbers["final"] = {
        name: evaluate(policy, reference, corpus, settings)
        for name, policy in progress(policies.items(), "samples of each policy")
    }
    files["curves.png"] = picture(
        drawn,
        "PPO on a reward that can be hacked",
        watch(numbers, settings),
        levels={"reward": {"reference": numbers["final"]["reference"]["reward"]}},
    )
    if settings.save_models:
        text = corpus.text(corpus.held_out[:HELD_OUT_TOKENS]).replace(END_OF_FILE, "\n")
        files["models/held-out.txt"] = text.encode()
        files |= {
            f"models/{STEMS.get(name, name)}/{part}": content
            for name, policy in policies.items()
            for part, content in checkpoint_files(policy, corpus, settings).items()
        }
    return report(numbers, settings), files


def watched(series: dict[str, list[float]], summary: dict[str, float]) -> Figures:
    """Return the monitor's summary with the steps, from 1, of alarms and of the largest jump, and
    the KL at the end.
    """
    kl, alarm = series["kl/mean"], series["kl/spike"]
    return summary | {
        "alarms": [step for step, rang in enumerate(alarm, 1) if rang],
        "jump": max(range(1, len(kl)), key=lambda step: kl[step] - kl[step - 1]) + 1,
        "last": sum(kl[-LAST_STEPS:]) / len(kl[-LAST_STEPS:]),
    }


@torch.no_grad()
def evaluate(
    policy: LanguageModel, reference: LanguageModel, corpus: Corpus, settings: Settings
) -> Figures:
    """Evaluate a policy's samples on held-out prompts, the same for every policy.

    reward: share of rewarded tokens; kl: exact KL(policy‖reference), nats per token; perplexity: of
    the samples under the reference; entropy: of the policy, nats; distinct: distinct tokens /
    tokens of a sample.
    """
    count, length = settings.evaluation_samples, settings.response_length
    choose = torch.Generator().manual_seed(settings.seed + 1)
    draw = torch.Generator(settings.device).manual_seed(settings.seed + 1)
    prompts = windows(corpus.held_out, settings.prompt_length, count, choose, corpus.new_line)
    tokens = sample(policy, prompts.to(settings.device), settings, draw)
    response = tokens[:, -length:]
    p, q = (model.lm_head(model.response_hidden(tokens, length)) for model in (policy, reference))
    stats = fastkl.token_stats(p, response, q, temperature=settings.temperature)
    return {
        "reward": corpus.rewarded.to(settings.device)[response].float().mean().item(),
        "kl": stats.kl.mean().item(),
        "perplexity": math.exp(-stats.ref_logprob.mean().item()),
        "entropy": stats.entropy.mean().item(),
        "distinct": sum(row.unique().numel() for row in response) / response.numel(),
        "samples": [(corpus.text(row[:-length]), corpus.text(row[-length:])) for row in tokens[:4]],
    }


def report(numbers: Figures, settings: Settings) -> str:
    """Format the numbers as text and tables."""
    corpus, final, reference = numbers["corpus"], numbers["final"], numbers["reference"]
    heads = [["", *heading] for heading in list(zip(*COLUMNS.values(), strict=True))[:2]]
    rows = [
        [name, *(format(figures[key], COLUMNS[key][2]) for key in COLUMNS)]
        for name, figures in final.items()
    ]
    parts = [
        f"corpus:    {corpus['files']} files of Python's standard library, "
        f"{corpus['characters'] / 1e6:.1f} M characters, {corpus['tokens'] / 1e6:.2f} M "
        f"tokens of a vocabulary of {corpus['vocabulary']}\n"
        f"reference: {settings.layers} layers, {settings.width} wide, "
        f"{reference['parameters'] / 1e6:.1f} M parameters, loss {reference['loss'][-1]:.2f} nats "
        f"per token after {settings.reference_steps} steps\n"
        f"policy:    PPO, {settings.steps} steps of {settings.samples} samples\n"
        f"fastkl:    {numbers['backend']}",
        "\n".join(table([*heads, *rows], "<" + ">" * len(COLUMNS))),
        textwrap.fill(conclusion(*final.values()), TEXT_WIDTH),
        textwrap.fill(watch(numbers, settings), TEXT_WIDTH),
    ]
    for name, figures in final.items():
        lines = "{}«{}»".format(*figures["samples"][0]).strip("\n").split("\n")
        parts.append("\n  | ".join([f"{name}:", *lines]))
    return "\n\n".join(parts)


def conclusion(before: Figures, without: Figures, penalised: Figures) -> str:
    """State the effect of the penalty; give a verdict only if the figures support it."""
    text = (
        f'The reward counts the word "self" and can be hacked. It starts at {before["reward"]:.3f}.'
    )
    for name, run in (("Without a penalty", without), ("With the KL penalty", penalised)):
        text += (
            f" {name} it goes to {run['reward']:.3f}: {run['kl']:.2f} nats per token from the "
            f"reference, perplexity {run['perplexity']:,.0f}, {percent(run['distinct'])} distinct "
            "tokens."
        )
    perplexity, distinct = before["perplexity"], before["distinct"]
    collapsed = without["perplexity"] > 10 * perplexity and without["distinct"] < 0.5 * distinct
    kept = penalised["perplexity"] < 2 * perplexity and penalised["distinct"] > 0.5 * distinct
    shown = collapsed and kept and penalised["reward"] > before["reward"]
    return f"{text} " + (
        "That is what the penalty is for: the reward rises in both runs, but only the penalised "
        "policy still writes code."
        if shown
        else "These settings do not show what the penalty is for; the defaults of --steps and "
        "--beta do."
    )


def watch(numbers: Figures, settings: Settings) -> str:
    """Describe the monitor's events and how the policy was constrained."""
    text = ""
    for name, run in numbers["monitor"].items():
        series = numbers["series"][name]
        kl, jump = series["kl/mean"], run["jump"]
        rings = f"first rings at step {run['alarms'][0]}" if run["alarms"] else "never rings"
        text += (
            f"The run {name!r}: its KL rises most at step {jump}, from {kl[jump - 2]:.2g} to "
            f"{kl[jump - 1]:.2g} nats per token; the monitor's alarm {rings}. "
        )
    return text + (
        f"A PID controller moves its beta, between {min(series['beta']):.2f} and "
        f"{max(series['beta']):.2f}, to hold a KL of {settings.target_kl:g}: the last {LAST_STEPS} "
        f"steps have {run['last']:.3f}, {run['last'] / settings.target_kl - 1:+.0%}."
        if settings.beta is None
        else f"Its beta is fixed at {settings.beta:g}."
    )
