"""`fastkl demo`: the quick run once, and its options in a tiny size."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from unittest.mock import Mock

import pytest

for name in ("tokenizers", "safetensors", "matplotlib", "tqdm"):
    pytest.importorskip(name)

# After the skips: the demo needs its extra.
from fastkl.rl import read_jsonl  # noqa: E402
from fastkl.tools import cli  # noqa: E402
from fastkl.tools.demo import DISTILL, Settings, distill, report  # noqa: E402

POLICIES = ["reference", "no penalty", "with KL penalty"]
FILES = ["curves.png", "no-penalty.jsonl", "report.json", "report.txt", "with-penalty.jsonl"]
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
    beta=0.25,
)


# ---- the quick run


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    # (stdout, report.json, folder) of one quick run.
    out, printed = tmp_path_factory.mktemp("demo") / "nested" / "run", io.StringIO()
    with contextlib.redirect_stdout(printed):
        command = ["demo", "--quick", "--save-models", "--device", "cpu", "--out", str(out)]
        assert cli.main(command) == 0
    return printed.getvalue(), json.loads((out / "report.json").read_text(encoding="utf-8")), out


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
        for key in ("kl/mean", "kl/p99", "beta"):
            assert [line[key] for line in lines] == series[key]
    # What is not finite is null in the file.
    assert "null" not in json.dumps([numbers[key] for key in numbers if key != "configuration"])


def test_shows_what_the_penalty_is_for(demo):
    reference, without, penalised = (demo[1]["final"][name] for name in POLICIES)
    assert reference["kl"] == 0.0
    assert without["reward"] > 0.5 > penalised["reward"] > 1.3 * reference["reward"]
    assert without["kl"] > 10 * penalised["kl"] > 0.0
    assert without["perplexity"] > 10 * penalised["perplexity"]
    assert without["distinct"] < 0.5 * penalised["distinct"]


def test_the_alarm_rings_in_the_unpenalised_run_alone(demo):
    monitor, series = demo[1]["monitor"], demo[1]["series"]
    assert monitor["no penalty"]["alarms"][0] == series["no penalty"]["kl/spike"].index(1.0) + 1
    assert monitor["with KL penalty"]["alarms"] == []


def test_the_controller_holds_its_target(demo):
    target, series = demo[1]["configuration"]["target_kl"], demo[1]["series"]["with KL penalty"]
    assert 0.8 * target < sum(series["kl/mean"][-8:]) / 8 < 1.2 * target
    assert series["beta"][0] == demo[1]["configuration"]["initial_beta"]
    assert len(set(series["beta"])) > 20
    assert set(demo[1]["series"]["no penalty"]["beta"]) == {0.0}


def test_fastkl_compare_reads_the_models(demo, tmp_path):
    # By the command that the report names; on held-out text, the policy stays near the reference.
    pytest.importorskip("transformers")
    words = demo[0].splitlines()[-1].partition("fastkl compare ")[2].split()
    text, out = tmp_path / "text.txt", tmp_path / "report.json"
    text.write_text(Path(words[3]).read_text(encoding="utf-8")[:4000], encoding="utf-8")
    assert cli.main(["compare", *words[:3], str(text), "--json", str(out), "--device", "cpu"]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))["summary"]
    assert found["tokens"] > 500 and 1e-3 < found["kl_ab"]["mean"] < 1.0, found


# ---- the command line and its files


@pytest.mark.parametrize(
    "arguments, settings",
    [
        ([], Settings()),
        (
            ["--beta", "0.5", "--save-models", "--seed", "3", "--steps", "7"],
            Settings(beta=0.5, save_models=True, seed=3, steps=7),
        ),
        (["--algorithm", "distill"], Settings(algorithm="distill", **DISTILL)),
    ],
)
def test_command_line_chooses_the_settings(arguments, settings, tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(report, "run_demo", lambda settings, out: chosen.append(settings) or 0)
    assert cli.main(["demo", "--device", "cpu", "--out", str(tmp_path), *arguments]) == 0
    assert chosen == [settings]


def test_a_fixed_beta_into_the_folder_of_an_earlier_run(tmp_path):
    (tmp_path / "no-penalty.jsonl").write_text("of an earlier run\n", encoding="utf-8")
    assert report.run_demo(TINY, tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    numbers = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert len(read_jsonl(tmp_path / "no-penalty.jsonl")) == TINY.steps
    assert set(numbers["series"]["with KL penalty"]["beta"]) == {0.25}


# One student covers, one seeks, one is between.
def test_distillation(tmp_path, capsys):
    settings = dataclasses.replace(
        TINY, width=32, reference_steps=80, reference_batch=8, steps=60, algorithm="distill"
    )
    assert report.run_demo(settings, tmp_path) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["curves.png", "report.json", "report.txt"]
    final = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["final"]
    forward, reverse, jsd = (final[name] for name in distill.LOSSES)
    assert forward[0] < reverse[0] and reverse[1] < forward[1], final
    assert forward[3] < jsd[3] < reverse[3] and reverse[4] < jsd[4] < forward[4], final
    assert "JSD" in capsys.readouterr().out


def test_options_of_ppo_are_refused_for_distillation(tmp_path, capsys):
    for words in (["--beta", "0.5"], ["--save-models"]):
        assert cli.main(["demo", "--algorithm", "distill", *words, "--out", str(tmp_path)]) == 2
        assert "expected neither --beta nor --save-models" in capsys.readouterr().err


def test_an_interrupt_leaves_no_file_behind(tmp_path, monkeypatch):
    # Neither in its folder nor among the temporary ones.
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(report, "read_run", Mock(side_effect=KeyboardInterrupt))
    monkeypatch.setattr(cli.demo, "choose_settings", lambda **given: TINY)
    assert cli.main(["demo", "--device", "cpu", "--out", str(tmp_path)]) == 130
    assert list(tmp_path.iterdir()) == []
