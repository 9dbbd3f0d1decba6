"""The run from corpus to report: its figures, its picture, and what it says of them."""

from __future__ import annotations

import dataclasses
import math
import platform
import shlex
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastkl
from fastkl.rl import FixedBeta

from ..console import percent, progress, say, table
from ..files import json_text, write_whole
from ..plot import picture, read_run
from . import Settings
from .corpus import END_OF_FILE, Corpus, build_corpus, windows
from .model import LanguageModel, held_out_loss, sample, save_checkpoint, train_reference
from .training import FineTuned, choose_beta, fine_tune

Figures = dict[str, Any]
# Names of the files of a run.
STEMS = {"no penalty": "no-penalty", "with KL penalty": "with-penalty"}
# Rows whose KL the usual code computes too: few, for training may have made no logits.
ROWS_COMPARED = 128
# Steps at the end of a run over which its KL is averaged.
LAST_STEPS = 8
TEXT_WIDTH = 110
# Tokens of the text beside the saved models.
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

    These are curves.png, report.txt, report.json, the monitors' no-penalty.jsonl and
    with-penalty.jsonl, and with settings.save_models the models; each whole or not at all, when
    every stage is done. Returns the exit code.
    """
    torch.set_num_threads(settings.threads)
    start = time.perf_counter()
    corpus = build_corpus(settings)
    reference, losses = train_reference(corpus, settings)
    runs, files, drawn = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, beta in zip(STEMS, (FixedBeta(0.0), choose_beta(settings)), strict=True):
            jsonl = Path(folder, f"{STEMS[name]}.jsonl")
            runs[name] = fine_tune(reference, corpus, beta, settings, f"policy {name}", jsonl)
            files[jsonl.name], drawn[name] = jsonl.read_bytes(), read_run(jsonl)
    policies = {"reference": reference, **{name: run.policy for name, run in runs.items()}}
    stages = progress(policies.items(), "samples of each policy")
    policy, tokens = runs["with KL penalty"].early
    numbers: Figures = {
        **describe(corpus, settings),
        "reference": {
            "loss": losses,
            "held_out_loss": held_out_loss(reference, corpus, settings),
            "parameters": sum(parameter.numel() for parameter in reference.parameters()),
        },
        "series": {name: run.series for name, run in runs.items()},
        "monitor": {name: watched(run) for name, run in runs.items()},
        "final": {name: evaluate(policy, reference, corpus, settings) for name, policy in stages},
        "fused_vs_naive": compare_with_naive(policy, reference, tokens, settings),
    }
    if settings.linear:
        numbers["memory"] = logits_saved(numbers, settings)
    numbers["seconds"] = {"total": time.perf_counter() - start}
    text = report(numbers, settings)
    levels = {"reward": {"reference": numbers["final"]["reference"]["reward"]}}
    if settings.beta is None:
        levels["kl/mean"] = {"target": settings.target_kl}
    title = f"{settings.algorithm.upper()} on a reward that can be hacked"
    files["curves.png"] = picture(drawn, title, watch(numbers, settings), levels)
    files["report.txt"] = (text + "\n").encode()
    files["report.json"] = json_text(numbers).encode()
    for name, content in files.items():
        write_whole(out / name, content)
    text += f"\n\n{numbers['seconds']['total']:.0f} s; wrote {', '.join(files)} into {out}"
    if settings.save_models:
        text += "\n" + save_models(policies, corpus, settings, out / "models")
    say(text)
    return 0


def describe(corpus: Corpus, settings: Settings) -> Figures:
    """Say what runs on what."""
    cuda = settings.device != "cpu"
    logits = torch.empty(1, corpus.vocabulary, device=settings.device)
    return {
        "configuration": dataclasses.asdict(settings),
        "versions": {
            "fastkl": fastkl.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name(settings.device) if cuda else "cpu",
        "backend": str(fastkl.explain(logits)),
        "corpus": {
            "files": corpus.files,
            "characters": corpus.characters,
            "vocabulary": corpus.vocabulary,
            "tokens": corpus.train.numel() + corpus.held_out.numel(),
        },
    }


def watched(run: FineTuned) -> Figures:
    """Sum up what the monitor saw: its summary, and steps, from 1, at which something happened."""
    kl, alarm = run.series["kl"], run.series["alarm"]
    return run.summary | {
        "alarms": [step for step, rang in enumerate(alarm, 1) if rang],
        "jump": max(range(1, len(kl)), key=lambda step: kl[step] - kl[step - 1]) + 1,
        "last": sum(kl[-LAST_STEPS:]) / len(kl[-LAST_STEPS:]),
    }


@torch.no_grad()
def evaluate(
    policy: LanguageModel, reference: LanguageModel, corpus: Corpus, settings: Settings
) -> Figures:
    """Measure a policy's samples for prompts from held-out files, the same for every policy.

    reward: share of tokens that are rewarded; kl: exact KL(policy‖reference), nats per token;
    perplexity: of the samples under the reference; entropy: of the policy, nats; distinct: distinct
    tokens / tokens of a sample; slow_path: share of rows that the kernels read again.
    """
    length, temperature = settings.response_length, settings.temperature
    choose = torch.Generator().manual_seed(settings.seed + 1)
    size = settings.prompt_length, settings.evaluation_samples
    prompts = windows(corpus.held_out, *size, choose, corpus.new_line).to(settings.device)
    draw = torch.Generator(settings.device).manual_seed(settings.seed + 1)
    tokens = sample(policy, prompts, settings, draw)
    response = tokens[:, -length:]
    p, q = (model.lm_head(model.response_hidden(tokens, length)) for model in (policy, reference))
    stats = fastkl.token_stats(p, response, q, temperature=temperature)
    slow = fastkl.slow_path_rows(p, q, temperature=temperature)
    return {
        "reward": corpus.rewarded.to(settings.device)[response].float().mean().item(),
        "kl": stats.kl.mean().item(),
        "perplexity": math.exp(-stats.ref_logprob.mean().item()),
        "entropy": stats.entropy.mean().item(),
        "distinct": sum(row.unique().numel() for row in response) / response.numel(),
        "slow_path": slow.float().mean().item(),
        "samples": [(corpus.text(row[:-length]), corpus.text(row[-length:])) for row in tokens[:4]],
    }


def logits_saved(numbers: Figures, settings: Settings) -> Figures:
    """Count the bytes of a step's logits, both models' and the gradient, that --linear avoids."""
    tokens, vocabulary = (
        settings.samples * settings.response_length,
        numbers["corpus"]["vocabulary"],
    )
    return {
        "tokens": tokens,
        "logits_bytes": 12 * tokens * vocabulary,
        "held_tokens": min(tokens, settings.chunk_size),
    }


def naive_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Compute KL(P‖Q) per row the usual way: two log_softmax and a sum."""
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def compare_with_naive(
    policy: LanguageModel, reference: LanguageModel, tokens: Tensor, settings: Settings
) -> Figures:
    """Compare fastkl with the code that it replaces, on logits of the run, against float64.

    Per method, for the mean KL of rows and its gradient: value_error, the largest |error| / KL of a
    row; gradient_error, |error| / |gradient| of all rows; bytes_per_row, held for backward beyond
    the inputs. "kl" is the mean in float64, nats per token.
    """
    with torch.no_grad():
        hidden = (m.response_hidden(tokens, settings.response_length) for m in (policy, reference))
        rows = [h.flatten(0, 1)[:ROWS_COMPARED] for h in hidden]
        p, q = policy.lm_head(rows[0]).requires_grad_(), reference.lm_head(rows[1])
    exact = p.detach().double().requires_grad_()
    truth = naive_kl(exact, q.double())
    truth.mean().backward()
    result: Figures = {"rows": len(p), "kl": truth.mean().item()}
    for name, function in (("naive", naive_kl), ("fused", fastkl.kl_divergence)):
        held: dict[int, int] = {}

        def pack(saved: Tensor, held: dict[int, int] = held) -> Tensor:
            held[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            value = function(p, q)
        for given in (p, q):
            held.pop(given.untyped_storage().data_ptr(), None)
        (gradient,) = torch.autograd.grad(value.mean(), p)
        # A row whose KL is 0 in float64 too has no relative error.
        errors = ((value.double() - truth).abs() / truth)[truth > 0]
        gap = torch.linalg.norm(gradient.double() - exact.grad)
        result[name] = {
            "value_error": max(errors.tolist(), default=0.0),
            "gradient_error": (gap / torch.linalg.norm(exact.grad).clamp(min=1e-300)).item(),
            "bytes_per_row": sum(held.values()) / len(p),
        }
    return result


def save_models(
    policies: dict[str, LanguageModel], corpus: Corpus, settings: Settings, folder: Path
) -> str:
    """Write checkpoints and a text that none was trained on; return how to compare two of them."""
    for name, policy in policies.items():
        save_checkpoint(policy, corpus, settings, folder / STEMS.get(name, name))
    text = corpus.text(corpus.held_out[:HELD_OUT_TOKENS]).replace(END_OF_FILE, "\n")
    write_whole(folder / "held-out.txt", text.encode())
    names = ("reference", "with-penalty", "held-out.txt")
    first, second, text = (shlex.quote(str(folder / name)) for name in names)
    how = f"fastkl compare {first} {second} --text {text}"
    return f"wrote the models into {folder}; how two of them differ: {how}"


def report(numbers: Figures, settings: Settings) -> str:
    """Say in words and tables what the numbers are."""
    corpus, final, compared = numbers["corpus"], numbers["final"], numbers["fused_vs_naive"]
    epochs = f", {settings.epochs} updates each" if settings.epochs > 1 else ""
    region = f", each within {settings.max_kl:g} nats per token" if settings.max_kl else ""
    way = f"; from hidden states, {settings.chunk_size} tokens at a time" if settings.linear else ""
    parts = [
        f"corpus:    {corpus['files']} files of Python {numbers['versions']['python']}'s standard "
        f"library, {corpus['characters'] / 1e6:.1f} M characters, {corpus['tokens'] / 1e6:.2f} M "
        f"tokens of a vocabulary of {corpus['vocabulary']}\n"
        f"reference: {settings.layers} layers, {settings.width} wide, "
        f"{numbers['reference']['parameters'] / 1e6:.1f} M parameters, perplexity "
        f"{math.exp(numbers['reference']['held_out_loss']):.0f} on held-out files\n"
        f"policy:    {settings.algorithm.upper()}, {settings.steps} steps of {settings.samples} "
        f"samples{epochs}{region}\n"
        f"fastkl:    {numbers['backend']}{way}"
    ]
    rows = [["", *heading] for heading in list(zip(*COLUMNS.values(), strict=True))[:2]]
    for name, figures in final.items():
        rows.append([name, *(format(figures[key], COLUMNS[key][2]) for key in COLUMNS)])
    parts.append("\n".join(table(rows, "<" + ">" * len(COLUMNS))))
    for sentence in (conclusion(*final.values()), watch(numbers, settings)):
        parts.append(textwrap.fill(sentence, TEXT_WIDTH))
    for name, figures in final.items():
        lines = "{}«{}»".format(*figures["samples"][0]).strip("\n").split("\n")
        parts.append("\n  | ".join([f"{name}:", *lines]))
    naive, fused = compared["naive"], compared["fused"]
    slow = ", ".join(f"{name} {percent(row['slow_path'], 2)}" for name, row in final.items())
    parts.append(
        f"fused vs naive, on {compared['rows']} rows of this run with KL {compared['kl']:.1e}: "
        f"value error {fused['value_error']:.0e} vs {naive['value_error']:.0e}, gradient error "
        f"{fused['gradient_error']:.0e} vs {naive['gradient_error']:.0e}, held for backward "
        f"{fused['bytes_per_row']:,.0f} vs {naive['bytes_per_row']:,.0f} bytes per row\n"
        f"rows that the Triton kernels read again, because one pass cannot hold them: {slow}"
    )
    if settings.linear:
        memory = numbers["memory"]
        parts[-1] += (
            f"\nmemory: logits of {memory['tokens']} tokens for both models and their gradient, "
            f"{memory['logits_bytes'] / 1e6:.1f} MB, were never made in training, "
            f"those of {memory['held_tokens']} tokens at most"
        )
    return "\n\n".join(parts)


def conclusion(before: Figures, without: Figures, penalised: Figures) -> str:
    """Say what the penalty did; give the verdict only where the figures bear it out."""
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
    if collapsed and kept and penalised["reward"] > before["reward"]:
        return (
            f"{text} That is what the penalty is for: the reward rises in both runs, but only the "
            "penalised policy still writes code."
        )
    return (
        f"{text} These settings do not show what the penalty is for; the defaults of --steps and "
        "--beta do."
    )


def watch(numbers: Figures, settings: Settings) -> str:
    """Say what the monitor saw and what held the policy."""
    text = ""
    for name, run in numbers["monitor"].items():
        series = numbers["series"][name]
        kl, jump = series["kl"], run["jump"]
        rings = f"first rings at step {run['alarms'][0]}" if run["alarms"] else "never rings"
        text += (
            f"The run {name!r}: its KL rises most at step {jump}, from {kl[jump - 2]:.2g} to "
            f"{kl[jump - 1]:.2g} nats per token; the monitor's alarm {rings}. "
        )
        if settings.max_kl is not None:
            taken = series["step_fraction"]
            text += (
                f"The trust region shortened {sum(0.0 < part < 1.0 for part in taken)} of its "
                f"{len(taken)} updates and undid {taken.count(0.0)}. "
            )
    if settings.beta is not None:
        return f"{text}Its beta is fixed at {settings.beta:g}."
    return (
        f"{text}A PID controller moves its beta, between {min(series['beta']):.2f} and "
        f"{max(series['beta']):.2f}, to hold a KL of {settings.target_kl:g}: the last {LAST_STEPS} "
        f"steps have {run['last']:.3f}, {run['last'] / settings.target_kl - 1:+.0%}."
    )
