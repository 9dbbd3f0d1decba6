"""`fastkl demo`: the quick run once, and every algorithm and option in a tiny size."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch

for name in ("tokenizers", "safetensors", "matplotlib", "tqdm"):
    pytest.importorskip(name)

# After the skips: the demo needs its extra.
from memory import allocations  # noqa: E402

from fastkl.rl import FixedBeta, read_jsonl  # noqa: E402
from fastkl.tools import cli  # noqa: E402
from fastkl.tools.demo import (  # noqa: E402
    TUNED,
    Settings,
    report,
)
from fastkl.tools.demo.corpus import build_corpus  # noqa: E402
from fastkl.tools.demo.model import (  # noqa: E402
    LanguageModel,
    start_from_bigrams,
)
from fastkl.tools.demo.training import ALGORITHMS, choose_beta, fine_tune  # noqa: E402

POLICIES = ["reference", "no penalty", "with KL penalty"]
FILES = ["curves.png", "no-penalty.jsonl", "report.json", "report.txt", "with-penalty.jsonl"]
# 128 tokens a step, so that the logits of one are larger than any other tensor of the run; the
# chunks do not divide them.
TINY = Settings(
    corpus_characters=200_000,
    vocabulary=800,
    width=16,
    layers=1,
    heads=2,
    reference_steps=2,
    reference_batch=2,
    steps=4,
    samples=8,
    prompt_length=8,
    response_length=16,
    evaluation_samples=8,
    chunk_size=24,
)
GROUPS = {"ppo": 1, "grpo": 4, "dpo": 2}
each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


def tiny(algorithm="ppo", **changes):
    """Return the tiny settings of an algorithm."""
    return dataclasses.replace(TINY, algorithm=algorithm, group=GROUPS[algorithm], **changes)


# ---- the quick run


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(stdout, report.json, folder) of one quick run."""
    out, printed = tmp_path_factory.mktemp("demo") / "nested" / "run", io.StringIO()
    with contextlib.redirect_stdout(printed):
        command = ["demo", "--quick", "--save-models", "--device", "cpu", "--out", str(out)]
        assert cli.main(command) == 0
    numbers = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return printed.getvalue(), numbers, out


def test_files_and_finite_numbers(demo):
    stdout, numbers, out = demo
    assert sorted(path.name for path in out.iterdir()) == sorted([*FILES, "models"])
    assert (out / "report.txt").read_text(encoding="utf-8").rstrip() in stdout
    picture = pytest.importorskip("matplotlib.image").imread(out / "curves.png")
    assert min(picture.shape[:2]) >= 500 and picture.std() > 0.05
    assert list(numbers["final"]) == POLICIES
    steps = numbers["configuration"]["steps"]
    for stem, name in (("no-penalty", POLICIES[1]), ("with-penalty", POLICIES[2])):
        lines, series = read_jsonl(out / f"{stem}.jsonl"), numbers["series"][name]
        assert [line["step"] for line in lines] == list(range(1, steps + 1))
        for key, figure in (("kl", "kl/mean"), ("kl_p99", "kl/p99"), ("beta", "beta")):
            assert [line[figure] for line in lines] == series[key]
    # What is not finite is null in the file.
    assert "null" not in json.dumps([numbers[key] for key in numbers if key != "configuration"])


def test_shows_what_the_penalty_is_for(demo):
    reference, without, penalised = (demo[1]["final"][name] for name in POLICIES)
    assert reference["kl"] == 0.0
    assert without["reward"] > 0.5 > penalised["reward"] > 1.3 * reference["reward"]
    assert without["kl"] > 10 * penalised["kl"] > 0.0
    assert without["perplexity"] > 10 * penalised["perplexity"]
    assert without["distinct"] < 0.5 * penalised["distinct"]
    assert all(0.0 <= figures["slow_path"] <= 1.0 for figures in demo[1]["final"].values())


def test_the_alarm_rings_in_the_unpenalised_run_alone(demo):
    monitor, series = demo[1]["monitor"], demo[1]["series"]
    rang = series["no penalty"]["alarm"].index(1.0) + 1
    assert monitor["no penalty"]["alarms"][0] == rang
    assert monitor["with KL penalty"]["alarms"] == []


def test_the_controller_holds_its_target(demo):
    target, series = demo[1]["configuration"]["target_kl"], demo[1]["series"]["with KL penalty"]
    assert 0.8 * target < sum(series["kl"][-8:]) / 8 < 1.2 * target
    assert series["beta"][0] == demo[1]["configuration"]["initial_beta"]
    assert len(set(series["beta"])) > 20
    assert set(demo[1]["series"]["no penalty"]["beta"]) == {0.0}


def test_the_naive_code_is_worse(demo):
    fused, naive = demo[1]["fused_vs_naive"]["fused"], demo[1]["fused_vs_naive"]["naive"]
    assert fused["value_error"] < 1e-4 < naive["value_error"]
    assert fused["gradient_error"] <= naive["gradient_error"] + 1e-5
    assert fused["bytes_per_row"] <= 64 < 4 * demo[1]["corpus"]["vocabulary"]
    assert naive["bytes_per_row"] >= 4 * demo[1]["corpus"]["vocabulary"]


@torch.no_grad()
def test_fastkl_compare_reads_the_models(demo, tmp_path):
    """The command that the report names gives the KL that transformers and torch give."""
    transformers = pytest.importorskip("transformers")
    words = demo[0].splitlines()[-1].partition("fastkl compare ")[2].split()
    text, out = tmp_path / "text.txt", tmp_path / "report.json"
    text.write_text(Path(words[3]).read_text(encoding="utf-8")[:4000], encoding="utf-8")
    command = ["compare", *words[:3], str(text), "--overlap", "0", "--json", str(out)]
    assert cli.main([*command, "--device", "cpu"]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))["summary"]
    ids = transformers.AutoTokenizer.from_pretrained(words[0])(text.read_text("utf-8")).input_ids
    windows = torch.tensor(ids[:-1]).split(demo[1]["configuration"]["context"])
    sides = []
    for folder in words[:2]:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        logits = torch.cat([model.eval()(window[None]).logits[0] for window in windows])
        sides.append(logits.log_softmax(-1))
    p, q = sides
    expected = [(a.exp() * (a - b)).sum(-1).mean().item() for a, b in ((p, q), (q, p))]
    assert found["tokens"] == len(ids) - 1 > 500 and min(expected) > 1e-3
    assert [found[key]["mean"] for key in ("kl_ab", "kl_ba")] == pytest.approx(expected, abs=1e-5)


# ---- the algorithms


@pytest.fixture(scope="module")
def start():
    """(reference, corpus) in float64, so that the two ways differ by their formulas alone."""
    corpus = build_corpus(TINY)
    torch.manual_seed(0)
    reference = LanguageModel(corpus.vocabulary, TINY)
    start_from_bigrams(reference, corpus.train)
    return reference.double().requires_grad_(False), corpus


def tuned(start, settings, beta=None):
    """Return the series of one run."""
    return fine_tune(*start, beta or choose_beta(settings), settings, "policy").series


@each_algorithm
def test_both_ways_give_the_same_curves(start, algorithm):
    """Rounding is 1e-16 here; a gradient that lacks a term changes the KL by more than 1e-4."""
    changes = dict(epochs=2, max_kl=1e-3, steps=3)
    direct, linear = (tuned(start, tiny(algorithm, linear=x, **changes)) for x in (False, True))
    assert direct["kl"][0] == linear["kl"][0] == 0.0 < min(direct["kl"][1:])
    assert max(direct["reward"]) > 0.0
    for name, curve in direct.items():
        assert linear[name] == pytest.approx(curve, rel=1e-9), name


@pytest.mark.parametrize("linear", [False, True])
@each_algorithm
def test_from_hidden_states_no_step_makes_logits(start, algorithm, linear):
    logits = TINY.samples * TINY.response_length * start[1].vocabulary * 8
    settings = tiny(algorithm, linear=linear, max_kl=1e-3, steps=2)
    assert (allocations(lambda: tuned(start, settings))["largest"] < logits) == linear


@each_algorithm
def test_no_update_leaves_the_trust_region(start, algorithm):
    free = tuned(start, tiny(algorithm, max_kl=1.0), FixedBeta(0.0))
    assert free["step_fraction"] == [1.0] * TINY.steps
    limit = 0.5 * max(free["step_kl"])
    held = tuned(start, tiny(algorithm, max_kl=limit), FixedBeta(0.0))
    assert max(held["step_kl"]) <= limit and 0.0 < min(held["step_fraction"]) < 1.0


def test_grpo_compares_within_a_group():
    rewards = torch.rand(8, 16, generator=torch.Generator().manual_seed(0))
    credit = ALGORITHMS["grpo"](FixedBeta(0.0), tiny("grpo")).credit(rewards, None)
    expected = torch.cat([half - half.mean() for half in rewards.sum(-1).split(4)])
    torch.testing.assert_close(credit, expected)


def test_dpo_draws_preferences_by_the_rewards():
    """4000 pairs that differ by 1, of either sign: to four standard deviations of sigmoid(1)."""
    rewards = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 1.0], [1.0, 1.0]]).repeat(4000, 1)
    draw = torch.Generator().manual_seed(0)
    credit = ALGORITHMS["dpo"](FixedBeta(0.0), tiny("dpo")).credit(rewards, draw)
    expected = torch.tensor([1.0, -1.0]).sigmoid()
    error = (credit.view(4000, 2).float().mean(0) - expected).abs()
    assert (error < 4 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_dpo_without_a_penalty_is_the_limit_of_small_beta(start):
    torch.manual_seed(1)
    ref, step = (torch.randn(8, 16, TINY.width, dtype=torch.float64) for _ in range(2))
    hidden = (ref + 0.1 * step).requires_grad_()
    tokens, credit = torch.randint(start[1].vocabulary, (8, 16)), torch.rand(4) < 0.5
    gradients = []
    for beta in (0.0, 1e-7):
        made = ALGORITHMS["dpo"](FixedBeta(beta), tiny("dpo"))
        sides = (made.inputs(side, start[0].lm_head) for side in (hidden, ref))
        _, loss = made.loss(tokens, *sides, credit, None)
        gradients += torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-9)


# ---- the command line, reports and checkpoints


@pytest.mark.parametrize(
    "arguments, settings",
    [
        ([], Settings()),
        (["--linear", "--beta", "0.5"], Settings(linear=True, beta=0.5)),
        (["--algorithm", "grpo"], Settings(algorithm="grpo", **TUNED["grpo"])),
        (
            ["--max-kl", "0.05", "--epochs", "2", "--save-models", "--seed", "3", "--steps", "7"],
            Settings(max_kl=0.05, epochs=2, save_models=True, seed=3, steps=7),
        ),
    ],
)
def test_command_line_chooses_the_settings(arguments, settings, tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(report, "run_demo", lambda settings, out: chosen.append(settings) or 0)
    assert cli.main(["demo", "--device", "cpu", "--out", str(tmp_path), *arguments]) == 0
    assert chosen == [settings]


def test_report_from_hidden_states(tmp_path):
    """With a fixed beta and a trust region, into the folder of an earlier run."""
    (tmp_path / "no-penalty.jsonl").write_text("of an earlier run\n", encoding="utf-8")
    assert report.run_demo(tiny(linear=True, beta=0.25, max_kl=1e-4, epochs=2), tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    numbers = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert len(read_jsonl(tmp_path / "no-penalty.jsonl")) == TINY.steps
    series = numbers["series"]["with KL penalty"]
    assert max(series["step_kl"]) <= 1e-4 and set(series["beta"]) == {0.25}
    logits = TINY.samples * TINY.response_length * numbers["corpus"]["vocabulary"]
    assert numbers["memory"]["logits_bytes"] == 12 * logits


def test_an_interrupt_leaves_no_file_behind(tmp_path, monkeypatch):
    seen = []

    def interrupted(reference, corpus, beta, settings, title, jsonl):
        jsonl.write_text("{}\n")
        seen.append(jsonl)
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "fine_tune", interrupted)
    monkeypatch.setattr(cli, "choose_settings", lambda **given: TINY)
    assert cli.main(["demo", "--device", "cpu", "--out", str(tmp_path)]) == 130
    assert list(tmp_path.iterdir()) == [] and not seen[0].exists()
