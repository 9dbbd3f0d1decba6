"""The benchmarks' own promises: a wrong provider gets no time, figures are written whole or not at all, no GPU means one clear line."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import accuracy, gpu_suite, harness, record
from benchmarks.providers import LOADERS, Provider, load_providers, plain_kl_divergence, plain_logprob, plain_logprob_entropy
from benchmarks.workloads import Workload, errors, make_inputs, row_blocks

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
TINY = Workload("kl_divergence", rows=6, vocabulary=97, dtype="fp32")


def provider(function, name="theirs"):
    """A provider of kl_divergence only."""
    return Provider(name, {"kl_divergence": lambda inputs: (function(inputs.p, inputs.q),)})


def exact(p, q):
    return plain_kl_divergence(p, q)[0]


# The gate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["kl_divergence", "token_stats", "logprob", "logprob_entropy"])
@pytest.mark.parametrize("name", ["torch", "fastkl"])
@pytest.mark.parametrize("layout", ["rows", "sliced"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_right_providers_pass_the_gate(operation, name, layout, dtype):
    for wrt in "pq":
        if operation != "kl_divergence" and wrt == "q":
            continue
        workload = Workload(operation, rows=16, vocabulary=131, dtype=dtype, wrt=wrt, layout=layout)
        row = harness.measure(*load_providers(CPU, [name]), harness.make_case(workload, CPU))
        assert row["status"] == "ok", row
        assert row["times"] == {}, "no speed is reported without a GPU"


@pytest.mark.parametrize("name", ["F.kl_div", "F.kl_div on probabilities", "Categorical", "TRL"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_peers_pass_the_gate_or_say_why_not(name, dtype):
    (peer,) = load_providers(CPU, [name])
    if peer.missing:
        pytest.skip(peer.missing)
    for operation in ("kl_divergence", "logprob", "logprob_entropy"):
        for layout in ("rows", "sliced"):
            for wrt in "pq" if operation == "kl_divergence" else "p":
                workload = Workload(operation, rows=16, vocabulary=131, dtype=dtype, wrt=wrt, layout=layout)
                row = harness.measure(peer, harness.make_case(workload, CPU))
                assert row["status"] == ("ok" if operation in peer.operations else "missing"), row
    assert peer.why_not("token_stats") == f"{name} has no token_stats"


@pytest.mark.parametrize(("function", "reason"), [
    (lambda p, q: exact(q, p), "values off by"),  # the other direction
    (lambda p, q: exact(p, q) * 1.01, "values off by"),
    (lambda p, q: exact(p, q) * math.nan, "values off by"),
    (lambda p, q: exact(p, q).detach() + 0 * p.sum(-1), "gradient off by"),  # right values, no gradient
    (lambda p, q: exact(p[:, :-1], q[:, :-1]), "off by"),  # forgets the last entry
    (lambda p, q: exact(p, q).sum(), "shape"),
], ids=["direction", "scaled", "nan", "no gradient", "last entry", "summed"])
def test_gate_catches_a_wrong_provider(function, reason):
    row = harness.measure(provider(function), harness.make_case(TINY, CPU))
    # A provider that sums has no per-row upstream gradient to take; that it raises is as good as being wrong.
    assert row["status"] in ("wrong", "failed"), row
    assert reason in row["reason"]
    assert row["times"] == {} and row["memory"] == {}


def test_gate_catches_one_wrong_row():
    def one_row_off(p, q):
        kl = exact(p, q)
        return kl + torch.zeros_like(kl).index_fill_(0, torch.tensor(4), 0.1)

    row = harness.measure(provider(one_row_off), harness.make_case(TINY, CPU))
    assert row["status"] == "wrong" and row["error"]["values"] > 1e-2 and row["error"]["gradient"] < 1e-5


def test_a_provider_that_raises_is_a_row():
    def broken(p, q):
        raise RuntimeError("no such kernel")

    row = harness.measure(provider(broken), harness.make_case(TINY, CPU))
    assert (row["status"], row["reason"]) == ("failed", "RuntimeError: no such kernel")
    assert "failed: RuntimeError: no such kernel" in harness.summary(row)


def test_missing_providers_say_why(monkeypatch):
    def load(device):
        raise ImportError("No module named 'peer'")

    monkeypatch.setitem(LOADERS, "peer", load)
    (peer,) = load_providers(CPU, ["peer"])
    row = harness.measure(peer, harness.make_case(TINY, CPU))
    assert (row["status"], row["reason"]) == ("missing", "ImportError: No module named 'peer'")
    row = harness.measure(provider(exact), harness.make_case(Workload("token_stats", rows=2, vocabulary=5), CPU))
    assert (row["status"], row["reason"]) == ("missing", "theirs has no token_stats")


def test_blocks_cover_every_row_once():
    for leading in ((7,), (3, 5)):
        counts = torch.zeros(leading)
        for block in row_blocks(leading, vocabulary=10, limit=20):
            counts[block] += 1
            assert counts[block].numel() <= 2
        assert (counts == 1).all()


def test_errors_are_those_of_the_worst_row():
    inputs = make_inputs(TINY, CPU)
    true = exact(inputs.p.detach().double().requires_grad_(), inputs.q.double())
    outputs = (true.detach() * torch.tensor([1, 1, 1, 1.25, 1, 1]),)
    found = errors(TINY, inputs, outputs, torch.zeros_like(inputs.p))
    assert found["values"] == pytest.approx(0.25, rel=1e-6)
    assert found["gradient"] == pytest.approx(1)


def test_bytes_that_have_to_move():
    workload = Workload(rows=3, vocabulary=5, dtype="bf16")
    assert [workload.moved_bytes(phase) for phase in harness.PHASES] == [60, 90, 150]


def test_one_tensor_operations():
    workload = Workload("logprob_entropy", rows=3, vocabulary=5, dtype="bf16")
    assert [workload.moved_bytes(phase) for phase in harness.PHASES] == [30, 60, 90]
    assert make_inputs(workload, CPU).q.numel() == 0 and len(make_inputs(workload, CPU).upstream) == 2
    with pytest.raises(ValueError, match="wrt: expected 'p'"):
        Workload("logprob", wrt="q")


@pytest.mark.parametrize(("operation", "function"), [
    ("logprob", lambda i: (i.p.log_softmax(-1).gather(-1, (i.tokens + 1)[:, None] % 97)[:, 0],)),  # another token
    ("logprob_entropy", lambda i: plain_logprob_entropy(i.p, i.tokens)[::-1]),
    ("logprob_entropy", lambda i: (*plain_logprob(i.p, i.tokens), plain_logprob_entropy(i.p, i.tokens)[1].detach() + 0 * i.p.sum(-1))),
], ids=["token", "order", "no gradient"])
def test_gate_of_one_tensor_operations(operation, function):
    workload = Workload(operation, rows=6, vocabulary=97, dtype="fp32")
    row = harness.measure(Provider("theirs", {operation: function}), harness.make_case(workload, CPU))
    assert row["status"] == "wrong" and "off by" in row["reason"]


def test_inputs_are_random_and_repeatable():
    workload = Workload(rows=16, vocabulary=50, layout="sliced")
    first, again, other = (make_inputs(workload, CPU, seed) for seed in (0, 0, 1))
    assert first.p.shape == (8, 2, 50) and not first.p.is_contiguous()
    assert first.p.requires_grad and not first.q.requires_grad
    assert torch.equal(first.p, again.p) and torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.p, other.p)


# Accuracy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", accuracy.DISTRIBUTIONS)
@pytest.mark.parametrize("target", [1e-7, 1e-3, 1e1])
def test_pairs_have_the_kl_they_are_asked_for(distribution, target):
    p, q, truth = accuracy.make_pair(distribution, "fp32", target, 3, 1009, CPU)
    assert truth.median().item() == pytest.approx(target, rel=0.1)
    plain = exact(p.double(), q.double())
    assert torch.allclose(truth, plain, rtol=1e-7, atol=1e-13)


def test_accuracy_records():
    records = list(accuracy.accuracy(load_providers(CPU, ["torch", "fastkl"]), CPU, rows=2, vocabulary=1009, targets=(1e-6, 1.0)))
    assert len(records) == 2 * 4 * 2
    measured = [r for r in records if not r["skipped"]]
    assert measured and all(set(r["errors"]) == {"torch", "fastkl"} for r in measured)
    assert all(r["errors"]["fastkl"]["worst_relative"] < 1e-3 and not r["errors"]["fastkl"]["negative"] for r in measured)
    assert [r for r in records if r["skipped"]], "bf16 cannot hold a KL of 1e-6 between logits 50 apart"
    assert all(accuracy.summary(r) for r in records)


def test_accuracy_bar():
    def case(ours, torch_error, negative=0):
        return {"skipped": None, "errors": {"fastkl": {"worst_relative": ours, "negative": negative}, "torch": {"worst_relative": torch_error}}}

    fine = [case(1e-5, 1e-6), case(1e-3, 1e-2), {"skipped": "rounding", "errors": {}}]
    bad = [case(3e-4, 1e-4), case("nan", 1.0), case(1e-6, 1e-6, negative=1), {"skipped": None, "errors": {"fastkl": {"reason": "OutOfMemoryError"}}}]
    assert accuracy.not_worse(fine + bad) == bad


# Results --------------------------------------------------------------------------------------------------------


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "new" / "results.json"
    record.write_json(file, {"a": 1, "inf": [math.inf, math.nan, (1.5,)]})
    assert json.loads(file.read_text()) == {"a": 1, "inf": ["inf", "nan", [1.5]]}
    with pytest.raises(TypeError):
        record.write_json(file, {"a": object()})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        record.write_json(file, {"a": 2})
    assert json.loads(file.read_text())["a"] == 1
    assert [path.name for path in file.parent.iterdir()] == ["results.json"], "nothing half-written stays behind"


def test_provenance():
    origin = record.provenance("python -m benchmarks.x")
    assert set(origin) == {"command", "commit", "date", "python", "versions"}
    assert origin["versions"]["torch"] and origin["commit"]


def test_commit_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert record.commit() == "unknown"


def test_row_schema():
    row = harness.measure(provider(exact), harness.make_case(TINY, CPU))
    assert set(row) == {"workload", "provider", "status", "reason", "error", "times", "memory"}
    assert row["workload"]["name"] == TINY.name and set(row["error"]) == {"values", "gradient"}
    json.dumps(row)


# The suite ------------------------------------------------------------------------------------------------------


def timed_row(wrt, name, milliseconds, percent=95.0, ratio=1.0):
    """A row as the main section gives it on a GPU."""
    times = {phase: {"median_ms": milliseconds, "percent_of_copy": percent} for phase in harness.PHASES}
    memory = {"limit_ratio": ratio}
    return {"workload": Workload(wrt=wrt).as_dict(), "provider": name, "status": "ok", "reason": None, "times": times, "memory": memory}


def main_rows(**changes):
    """The rows of a main section that meets all its bars, but for the changes to fastkl's."""
    others = [timed_row(wrt, name, milliseconds) for wrt in "pq" for name, milliseconds in (("torch", 12.0), ("torch.compile", 4.0))]
    return others + [timed_row(wrt, "fastkl", **{"milliseconds": 2.0, **changes}) for wrt in "pq"]


def test_bars_met():
    found = gpu_suite.bars({"main": {"rows": [{"copy": {"gb_per_s": 4000}}, *main_rows()]}})
    assert len(found) == 10 and all(bar["met"] for bar in found), found


@pytest.mark.parametrize(("changes", "bar"), [
    ({"milliseconds": 2.1}, "faster than torch"), ({"percent": 89.9}, "% of copy"), ({"ratio": 1.02}, "peak"),
])
def test_bars_not_met(changes, bar):
    missed = [b["bar"] for b in gpu_suite.bars({"main": {"rows": main_rows(**changes)}}) if not b["met"]]
    assert missed and all(bar in name for name in missed)


def test_bars_without_figures_are_not_met():
    found = gpu_suite.bars({"main": {"rows": []}, "accuracy": {"rows": []}})
    assert len(found) == 11 and not any(bar["met"] for bar in found)
    assert gpu_suite.bars({"tests": {}}) == []
    results = {"sections": {"main": {"status": "exit code 1", "seconds": 3, "rows": main_rows()}}, "bars": found}
    assert "NOT MET" in gpu_suite.report(results)


def test_a_failing_section_does_not_lose_the_others(tmp_path, monkeypatch):
    def run_section(name, seconds):
        if name == "main":
            raise RuntimeError("crashed")
        return {"gpu": {"name": "some GPU"}, "status": "ok", "seconds": 1, "rows": []}

    monkeypatch.setattr(gpu_suite, "run_section", run_section)
    gpu_suite.run_suite(tmp_path, ["main", "sweep"], 300, "the command")
    (file,) = tmp_path.glob("*.json")
    data = json.loads(file.read_text())
    assert data["sections"]["main"]["status"] == "RuntimeError: crashed"
    assert data["sections"]["sweep"]["status"] == "ok"
    assert data["gpu"] == {"name": "some GPU"} and data["command"] == "the command"


def test_limited_commands_end_in_time(tmp_path):
    code, seconds = gpu_suite.run_limited([sys.executable, "-c", "import time; time.sleep(60)"], 0.5)
    assert code is None and seconds < 30
    with open(tmp_path / "log", "w") as log:
        assert gpu_suite.run_limited([sys.executable, "-c", "import os, sys; print('said', os.environ['X']); sys.exit(3)"], 60, log, X="y")[0] == 3
    assert (tmp_path / "log").read_text() == "said y\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_suite_refuses_without_cuda(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--out", str(tmp_path / "results")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip() == "gpu_suite: needs a CUDA GPU, found none; nothing was measured"
    assert not (tmp_path / "results").exists()


# On a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_measure_on_a_gpu():
    device = torch.device("cuda")
    copy = harness.copy_bandwidth(device, size=2**26, repetitions=3)
    assert copy["gb_per_s"] > 0
    case = harness.make_case(Workload(rows=32, vocabulary=1024), device, copy["gb_per_s"])
    assert len(case.sets) > 1, "inputs rotate until they exceed the L2 cache"
    row = harness.measure(provider(exact), case)
    assert row["status"] == "ok", row
    assert set(row["times"]) == set(harness.PHASES) and row["times"]["forward"]["median_ms"] > 0
    assert row["memory"]["peak_bytes"] >= row["memory"]["gradient_bytes"]
    json.dumps(row)


def test_a_section_that_ran_out_of_time_is_not_ok(monkeypatch):
    """Its exit code is 0, and its rows say what is missing."""
    rows = [{"copy": {}}, gpu_suite.no_figures(TINY, "peer", "missing", gpu_suite.NO_TIME)]

    def run_limited(command, seconds, *arguments, **environment):
        Path(command[command.index("--section-file") + 1]).write_text(json.dumps({"rows": rows}))
        return 0, 1.0

    monkeypatch.setattr(gpu_suite, "run_limited", run_limited)
    assert gpu_suite.run_section("main", 60)["status"] == "1 of 2 rows not measured: no time left in this run"
    rows.pop()
    assert gpu_suite.run_section("main", 60)["status"] == "ok"
