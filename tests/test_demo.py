"""`fastkl demo`: every stage in the quick size, once, and what it reports; in a tiny size from hidden states."""

import copy
import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tokenizers")
pytest.importorskip("tqdm")
image = pytest.importorskip("matplotlib.image")

# After the skips: the demo needs its extra.
from demo_cases import TINY  # noqa: E402

from fastkl.rl import AdaptiveBeta, FixedBeta, PIDBeta, read_jsonl  # noqa: E402
from fastkl.tools.demo.objective import choose_beta  # noqa: E402
from fastkl.tools.demo.run import run_demo  # noqa: E402
from fastkl.tools.demo.settings import QUICK_RATE, TUNED, Settings, choose_settings  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
POLICIES = ["reference", "no penalty", "with KL penalty"]
SERIES = ["reward", "kl", "entropy", "kl_p50", "kl_p95", "kl_p99", "kl_max", "beta", "alarm"]
FIGURES = ["reward", "kl", "perplexity", "entropy", "distinct", "slow_path"]
# The budget is 40 s. Of processor time, for what others do on the machine does not count; a slower one takes longer.
LIMIT_S = 90.0


def run_cli(*arguments, before=""):
    """The command line in a process of its own, optionally after some code."""
    code = f"{before}\nimport sys\nfrom fastkl.tools.cli import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code] if before else [sys.executable, "-m", "fastkl.tools.cli"]
    return subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", errors="replace")


def processor_seconds():
    """Of all processes that this one started and that have ended."""
    times = os.times()
    return times.children_user + times.children_system


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(stdout, stderr, folder, seconds) of one quick run."""
    out = tmp_path_factory.mktemp("demo") / "nested" / "run"
    start = processor_seconds()
    result = run_cli("demo", "--quick", "--save-models", "--device", "cpu", "--out", str(out))
    seconds = processor_seconds() - start
    assert result.returncode == 0, result.stderr[-3000:]
    print(f"fastkl demo --quick: {seconds:.0f} s of a budget of 40 s")
    return result.stdout, result.stderr, out, seconds


@pytest.fixture(scope="module")
def numbers(demo):
    """report.json."""
    return json.loads((demo[2] / "report.json").read_text(encoding="utf-8"))


def test_quick_is_quick(demo):
    assert demo[3] < LIMIT_S


def test_leaves_whole_files_and_nothing_else(demo):
    stdout, _, out, _ = demo
    assert sorted(path.name for path in out.iterdir()) == ["curves.png", "models", "no-penalty.jsonl", "report.json", "report.txt",
                                                           "with-penalty.jsonl"]
    assert sorted(path.name for path in (out / "models").iterdir()) == ["held-out.txt", "no-penalty", "reference", "with-penalty"]
    assert (out / "report.txt").read_text(encoding="utf-8").splitlines()[0] in stdout


def test_picture_is_readable_and_not_blank(demo):
    path = demo[2] / "curves.png"
    picture = image.imread(path)
    assert path.stat().st_size > 20_000
    assert min(picture.shape[:2]) >= 500
    assert picture.std() > 0.05


def test_json_has_every_number_and_all_are_finite(numbers):
    numbers = copy.deepcopy(numbers)
    assert {"configuration", "versions", "device", "corpus", "reference", "series", "final", "fused_vs_naive", "seconds"} <= set(numbers)
    assert list(numbers["final"]) == POLICIES
    for figures in numbers["final"].values():
        assert set(FIGURES) <= set(figures)
    steps = numbers["configuration"]["steps"]
    for series in numbers["series"].values():
        assert {name: len(values) for name, values in series.items()} == dict.fromkeys(SERIES, steps)
    assert numbers["configuration"].pop("beta") is None and numbers["configuration"].pop("max_kl") is None
    found = list(all_numbers(numbers))
    assert len(found) > 100
    assert all(math.isfinite(value) for value in found)


def all_numbers(value):
    """Every number in nested JSON; null, which stands for one that is not finite, counts as NaN."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            yield from all_numbers(entry)
    elif value is None:
        yield math.nan
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def test_shows_what_the_penalty_is_for(demo, numbers):
    assert "only the penalised policy still writes code" in " ".join(demo[0].split())
    reference, without, penalised = (numbers["final"][name] for name in POLICIES)
    assert reference["kl"] == 0.0
    assert without["reward"] > 0.5 > penalised["reward"] > 1.3 * reference["reward"]
    assert without["kl"] > 10 * penalised["kl"] > 0.0
    assert without["perplexity"] > 10 * penalised["perplexity"]
    assert without["distinct"] < 0.5 * penalised["distinct"]


def test_alarm_rings_at_the_jump_of_the_unpenalised_run_alone(demo, numbers):
    """The jump is where the policy finds out that it can say nothing but `self`: the KL, some 2 nats until then, rises by 1 in a step."""
    kl, alarm = (numbers["series"]["no penalty"][name] for name in ("kl", "alarm"))
    jump = next(step for step in range(1, len(kl)) if kl[step] > kl[step - 1] + 1.0)
    rang = alarm.index(1.0)
    assert jump <= rang <= jump + 5
    assert min(kl[rang:]) > 1.5 * max(kl[:jump])
    assert sum(numbers["series"]["with KL penalty"]["alarm"]) == 0
    assert f"alarm first rings at step {rang + 1}." in " ".join(demo[0].split())
    assert numbers["monitor"]["no penalty"]["alarms"][0] == rang + 1
    assert numbers["monitor"]["no penalty"]["kl/spikes"] == sum(alarm)
    assert numbers["monitor"]["with KL penalty"]["alarms"] == []
    assert abs(numbers["monitor"]["no penalty"]["jump"] - 1 - jump) <= 5


def test_penalised_run_ends_at_its_target(demo, numbers):
    target, series = numbers["configuration"]["target_kl"], numbers["series"]["with KL penalty"]
    last = sum(series["kl"][-8:]) / 8
    assert 0.8 * target < last < 1.2 * target
    assert 0.5 * target < numbers["final"]["with KL penalty"]["kl"] < 2.0 * target
    assert series["beta"][0] == numbers["configuration"]["initial_beta"] and len(set(series["beta"])) > 20
    assert set(numbers["series"]["no penalty"]["beta"]) == {0.0}
    assert f"hold a KL of {target:g}: the last 8 steps have {last:.3f}, " in " ".join(demo[0].split())


def test_monitor_leaves_a_line_per_step(demo, numbers):
    for file, name in (("no-penalty.jsonl", "no penalty"), ("with-penalty.jsonl", "with KL penalty")):
        lines, series = read_jsonl(demo[2] / file), numbers["series"][name]
        assert [line["step"] for line in lines] == list(range(1, numbers["configuration"]["steps"] + 1))
        for key, figure in (("kl", "kl/mean"), ("kl_p50", "kl/p50"), ("kl_p99", "kl/p99"), ("beta", "beta"), ("reward", "reward")):
            assert [line[figure] for line in lines] == series[key]
        assert all(a <= b for a, b in zip(series["kl_p50"], series["kl_p99"], strict=True))
        # What a logger is for: the figures of the run, also in the report.
        assert f"{numbers['monitor'][name]['kl/p99']:.3f}" in demo[0]


def test_rows_that_are_read_again_are_counted(demo, numbers):
    assert "one pass cannot hold" in demo[0]
    assert all(0.0 <= figures["slow_path"] <= 1.0 for figures in numbers["final"].values())


def test_compares_with_the_naive_code(demo, numbers):
    line, = [line for line in demo[0].splitlines() if line.startswith("fused vs naive")]
    assert "bytes per row" in line and "value error" in line and "gradient error" in line
    fused, naive = numbers["fused_vs_naive"]["fused"], numbers["fused_vs_naive"]["naive"]
    assert fused["value_error"] <= naive["value_error"] + 1e-5
    assert fused["gradient_error"] <= naive["gradient_error"] + 1e-5
    assert fused["bytes_per_row"] <= 64
    assert naive["bytes_per_row"] >= 4 * numbers["corpus"]["vocabulary"]


def test_prints_a_table_a_sample_of_each_policy_and_progress(demo):
    stdout, stderr, _, _ = demo
    for name in POLICIES:
        assert sum(line.startswith(name) for line in stdout.splitlines()) >= 2
    for heading in ("nats per token", "perplexity", "entropy", "distinct tokens"):
        assert heading in stdout
    for stage in ("BPE tokenizer", "reference", "policy no penalty", "policy with KL penalty"):
        assert stage in stderr


@pytest.mark.parametrize("arguments", [
    ["demo", "--nonsense"], ["demo", "--steps", "1"], ["demo", "--steps", "many"], ["demo", "--beta", "-1"], ["demo", "--beta", "nan"],
    ["demo", "--seed", "-1"], ["demo", "--device", "abacus"], ["demo", "--algorithm", "reinforce"], ["demo", "--max-kl", "0"],
    ["demo", "--epochs", "0"], [], ["nonsense"],
])
def test_bad_option_exits_2(arguments, capsys):
    from fastkl.tools.cli import main

    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "error" in capsys.readouterr().err


def test_out_that_is_a_file_exits_2(tmp_path, capsys):
    from fastkl.tools.cli import main

    (tmp_path / "taken").write_text("", encoding="utf-8")
    with pytest.raises(SystemExit) as exit_:
        main(["demo", "--quick", "--out", str(tmp_path / "taken")])
    assert exit_.value.code == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize("missing", [["tokenizers"], ["safetensors"], ["matplotlib"], ["tqdm"], ["tokenizers", "tqdm"]])
def test_missing_extra_says_what_to_install(missing, tmp_path):
    result = run_cli("demo", "--quick", "--out", str(tmp_path / "run"), before=f"import sys; sys.modules.update(dict.fromkeys({missing}))")
    assert result.returncode == 2
    line, = result.stderr.splitlines()
    assert f"{', '.join(missing)};" in line and "pip install 'fastkl[demo]'" in line
    assert not (tmp_path / "run").exists()


def test_help_needs_no_extra():
    result = run_cli("demo", "--help", before="import sys; sys.modules.update(dict.fromkeys(['tokenizers', 'safetensors', 'matplotlib', 'tqdm']))")
    assert result.returncode == 0
    assert "--quick" in result.stdout and "--linear" in result.stdout


def test_settings_take_what_the_command_line_says():
    assert choose_settings(quick=False, seed=0, device="cpu") == Settings()
    assert Settings().vocabulary >= 16_384
    chosen = choose_settings(quick=True, seed=3, device="cpu", steps=7, beta=0.5, linear=True, algorithm="grpo", epochs=None)
    assert (chosen.quick, chosen.seed, chosen.steps, chosen.beta, chosen.linear, chosen.algorithm) == (True, 3, 7, 0.5, True, "grpo")
    assert chosen.policy_rate == QUICK_RATE * TUNED["grpo"]["policy_rate"] and chosen.epochs == 1


@pytest.mark.parametrize("arguments, settings", [
    ([], {}), (["--linear"], dict(linear=True)), (["--algorithm", "grpo"], TUNED["grpo"] | dict(algorithm="grpo")),
    (["--max-kl", "0.05", "--epochs", "2", "--save-models"], dict(max_kl=0.05, epochs=2, save_models=True)),
])
def test_command_line_chooses_the_settings(arguments, settings, tmp_path, monkeypatch):
    from fastkl.tools.cli import main

    chosen = []
    monkeypatch.setattr("fastkl.tools.demo.run.run_demo", lambda settings, out: chosen.append(settings) or 0)
    assert main(["demo", "--device", "cpu", "--out", str(tmp_path / "run"), *arguments]) == 0
    assert chosen == [Settings(**settings)]


def test_beta_is_fixed_where_the_command_line_says_so():
    chosen = choose_beta(choose_settings(quick=False, seed=0, device="cpu", beta=0.25))
    assert isinstance(chosen, FixedBeta) and chosen.beta == 0.25
    steered = choose_beta(Settings())
    assert isinstance(steered, (AdaptiveBeta, PIDBeta)) and steered.unit == "token"
    assert (steered.beta, steered.target) == (Settings().initial_beta, Settings().target_kl)


# ---- the models, as checkpoints


@torch.no_grad()
def mean_kls(models: Path, ids: list[int], context: int) -> tuple[float, float]:
    """KL(reference‖policy) and KL(policy‖reference), the mean over the tokens, in float64 by transformers and torch alone."""
    from transformers import AutoModelForCausalLM

    inputs = torch.tensor(ids[:-1]).split(context)
    p, q = (torch.cat([model(window[None]).logits[0].log_softmax(-1) for window in inputs])
            for model in (AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float64).eval() for name in ("reference", "with-penalty")))
    return (p.exp() * (p - q)).sum(-1).mean().item(), (q.exp() * (q - p)).sum(-1).mean().item()


def test_fastkl_compare_reads_the_models(demo, numbers, tmp_path, capsys):
    """As the last line of the report says, on a shorter text."""
    transformers = pytest.importorskip("transformers")
    from fastkl.tools.cli import main

    stdout, models = demo[0], demo[2] / "models"
    command = stdout.splitlines()[-1].partition("fastkl compare ")[2].split()
    assert command == [str(models / "reference"), str(models / "with-penalty"), "--text", str(models / "held-out.txt")]
    text, report, context = tmp_path / "text.txt", tmp_path / "report.json", numbers["configuration"]["context"]
    text.write_text((models / "held-out.txt").read_text(encoding="utf-8")[:6000], encoding="utf-8")
    assert main(["compare", *command[:3], str(text), "--overlap", "0", "--json", str(report), "--device", "cpu"]) == 0
    found = json.loads(report.read_text(encoding="utf-8"))["summary"]
    ids = transformers.AutoTokenizer.from_pretrained(models / "reference")(text.read_text(encoding="utf-8")).input_ids
    expected = mean_kls(models, ids, context)
    assert found["tokens"] == len(ids) - 1 > 1000
    assert (found["kl_ab"]["mean"], found["kl_ba"]["mean"]) == pytest.approx(expected, abs=1e-5)
    assert min(expected) > 1e-3


# ---- small runs


def test_report_from_hidden_states(tmp_path, capsys):
    """With a fixed beta, into the folder of an earlier run."""
    (tmp_path / "no-penalty.jsonl").write_text("of an earlier run\n", encoding="utf-8")
    assert run_demo(dataclasses.replace(TINY, linear=True, beta=0.25), tmp_path) == 0
    printed = capsys.readouterr().out
    header, = [line for line in printed.splitlines() if line.startswith("fastkl:")]
    assert header.endswith("; computed from hidden states, 24 tokens at a time")
    line, = [line for line in printed.splitlines() if line.startswith("memory")]
    assert "counted by torch.profiler" in line and "never made" in line
    numbers = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert numbers["configuration"]["linear"] is True
    assert len(read_jsonl(tmp_path / "no-penalty.jsonl")) == TINY.steps
    assert set(numbers["series"]["with KL penalty"]["beta"]) == {0.25}
    words = " ".join(printed.split())
    assert "beta is fixed at 0.25" in words and "PID controller" not in words
    assert numbers["configuration"].pop("max_kl") is None
    assert all(math.isfinite(value) for value in all_numbers(numbers))
    memory = numbers["memory"]
    logits = TINY.samples * TINY.response_length * numbers["corpus"]["vocabulary"] * 4
    assert memory["logits"] == 3 * logits
    assert memory["from_hidden_states"]["largest"] < logits <= memory["through_logits"]["largest"]
    assert memory["from_hidden_states"]["peak"] < memory["logits"] <= memory["through_logits"]["peak"]
    assert numbers["fused_vs_naive"]["rows"] == 128


def test_through_logits_the_report_says_nothing_of_hidden_states(demo, numbers):
    assert numbers["configuration"]["linear"] is False
    assert "memory" not in numbers and "hidden states" not in demo[0]
