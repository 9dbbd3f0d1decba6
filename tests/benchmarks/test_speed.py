"""Runs benchmarks.speed on a stand-in device, from its arguments to the files of results."""

import argparse
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import speed, timing
from benchmarks.cases import PHASES, Workload
from benchmarks.linear_cases import FLOOR
from benchmarks.providers import ALL_LOADERS, load_providers
from benchmarks.record import ROOT
from benchmarks.suites import SUITES, Section

stand_in = pytest.importorskip("stand_in")  # without Triton there is no triton.testing
OWN = "stand_in:provider"


# The command, end to end


def test_a_run_on_a_stand_in_device(monkeypatch, tmp_path, capfd):
    """Order, subprocesses, a user's own provider that crashes, the floor, logs, whole JSON."""
    stand_in.install(monkeypatch.setattr)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    suite = ["tests", "main", "linear", "doctor", "memcheck"]
    code = speed.main(["--out", str(tmp_path), "--suite", *suite, "--provider", OWN])
    assert code == 1, "a row failed"
    file, log = sorted(tmp_path.iterdir())
    assert (file.suffix, log.suffix) == (".json", ".log") and log.read_text() == "3 passed\n"
    data = json.loads(file.read_text())
    assert data["gpu"]["name"] == "stand-in" and data["versions"]["torch"] and data["commit"]
    assert f"--provider {OWN}" in data["command"] and list(data["sections"]) == suite
    tests, main, linear, doctor, memcheck = data["sections"].values()
    assert (tests["status"], tests["summary"], tests["log"]) == ("ok", "3 passed", log.name)
    assert doctor["status"] == "missing: no-such-command is not installed"
    assert memcheck["status"] == "KeyError: 'unknown'", "what fails in one loses no other"
    right, crashed = main["rows"]
    assert [row["workload"]["rows"] for row in main["rows"]] == [6, 4]
    assert [right["provider"], right["status"], crashed["status"]] == [OWN, "ok", "failed"]
    assert crashed["reason"] == "the process ended with exit code 7"
    assert list(right["times"]) == list(PHASES) and right["memory"]["peak_bytes"] == 3_000_000
    for figures in right["times"].values():
        rate = 100 * figures["gb_per_s"] / right["copy_gb_per_s"]
        assert figures["percent_of_copy"] == pytest.approx(rate)
        assert figures["median_ms"] > 0 and figures["wall_ms"] > 0
    assert [row["provider"] for row in linear["rows"]] == [FLOOR, FLOOR, "fastkl", "fastkl"]
    for floor, row in zip(linear["rows"][:2], linear["rows"][2:], strict=True):
        ((_, bare),), ((phase, figures),) = floor["times"].items(), row["times"].items()
        assert figures["ratio_to_floor"] == pytest.approx(figures["median_ms"] / bare["median_ms"])
        assert figures["tflop_per_s"] == pytest.approx(figures["flop"] / figures["median_ms"] / 1e9)
        assert phase in ("forward", "both") and "ratio_to_floor" not in bare


# Processes that crash, break the context or hang


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A Run of a section of three workloads, whose processes are answers: (rows, exit code)."""
    workloads = tuple(Workload(rows=n, vocabulary=7) for n in (1, 2, 3))
    monkeypatch.setattr(speed, "SUITES", {"section": Section(workloads, ("torch",))})
    arguments = argparse.Namespace(provider=[], providers=None, check=False)
    made = speed.Run(arguments, tmp_path / "x", {"sections": {}}, time.monotonic() + 1000)

    def answers(*given):
        given, starts = list(given), []

        def run_limited(command, seconds):
            rows, code = given.pop(0)
            starts.append(int(command[command.index("--start") + 1]))
            for workload in workloads[starts[-1] :][:rows]:
                row = timing.row_of(workload, "torch", "ok", None)
                speed.append(made.rows, "section", row)
            return code

        monkeypatch.setattr(speed, "run_limited", run_limited)
        speed.run_provider(made, "section", "torch", [])
        return starts, [row["reason"] for row in made.rows_of("section")]

    return made, answers


DIED = "the process ended with exit code -11"
BROKE = "left out after it had broken the CUDA context in this section"


@pytest.mark.parametrize(
    ("given", "starts", "reasons"),
    [
        ([(3, 0)], [0], [None, None, None]),
        ([(1, -11), (1, 0)], [0, 2], [None, DIED, None]),
        ([(2, speed.BROKEN), (1, 0)], [0, 2], [None, None, None]),
        ([(0, -11), (0, -11)], [0, 1], [DIED, DIED, DIED]),
        ([(1, speed.BROKEN), (1, speed.BROKEN)], [0, 1], [None, None, BROKE]),
        ([(3, speed.BROKEN)], [0], [None, None, None]),
        ([(0, 0), (2, 0)], [0, 1], ["the process ended with exit code 0", None, None]),
        ([(1, None)], [0], [None, speed.STOPPED, speed.STOPPED]),
    ],
    ids="fine,dies once,breaks once,dies twice,breaks twice,at the end,no rows,hangs".split(","),
)
def test_what_a_process_costs(run, given, starts, reasons):
    assert run[1](*given) == (starts, reasons)


def test_past_the_deadline_no_process_starts(run):
    late = run[0]._replace(deadline=time.monotonic() + speed.LEAST_SECONDS / 2)
    facts = speed.run_section(late, "section")
    assert facts == {"status": f"3 of 3 rows not measured: {speed.NO_TIME}"}
    assert {r["reason"] for r in late.results["sections"]["section"]["rows"]} == {speed.NO_TIME}


def test_limited_commands_end_in_time(tmp_path):
    hangs = "import subprocess; subprocess.run(['sleep', '3600'])"
    assert speed.run_limited([sys.executable, "-c", hangs], 0.5) is None
    says = "import os, sys; print('said', os.environ['X']); sys.exit(3)"
    with open(tmp_path / "log", "w") as log:
        assert speed.run_limited([sys.executable, "-c", says], 60, log, X="y") == 3
    assert (tmp_path / "log").read_text() == "said y\n"


@pytest.mark.parametrize(
    ("option", "value", "got"),
    [
        ("--provider", "json:nothing", "'json:nothing'"),
        ("--provider", "no.such.module:x", "'no.such.module:x'"),
        *(("--seconds", seconds, seconds) for seconds in ("-5", "0", "nan", "inf")),
        *(("--out", folder, repr(folder)) for folder in ("/proc/x", __file__, "x" * 300)),
    ],
)
def test_wrong_use_is_found_before_the_gpu_is_looked_for(option, value, got, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("the arguments come first"))
    with pytest.raises(SystemExit) as ended:
        speed.main([option, value])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and f"{option}: expected" in error and f"got {got}" in error
    for words in ([], ["--suite", "nothing"], ["--providers", "torch", "nobody"]):
        with pytest.raises(SystemExit, match="2"):
            speed.main(words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path, capsys):
    assert speed.main(["--out", str(tmp_path)]) == 2
    assert "expected a CUDA GPU" in capsys.readouterr().err and not [*tmp_path.iterdir()]


# What the suites measure


def test_every_provider_is_measured_and_fastkl_before_the_compiled():
    sections = {name: what for name, what in SUITES.items() if isinstance(what, Section)}
    named = {name for section in sections.values() for name in section.providers}
    assert named == {*ALL_LOADERS, FLOOR}
    for name, section in sections.items():
        assert len(set(section.workloads)) == len(section.workloads), name
        assert "torch.compile" not in section.providers[:-1] and "fastkl" in section.providers


# On a GPU

BREAKS = """
import torch
def provider(device):
    def kl_divergence(inputs):
        index = torch.full((4,), 10**6, device=device)
        return (inputs.p.float().sum(-1) + torch.zeros(2, device=device)[index].sum(),)
    return {"kl_divergence": kl_divergence}
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_context_broken_on_a_gpu(tmp_path):
    """By an index out of range: the row says so, and the exit code lets the section go on."""
    (tmp_path / "breaks.py").write_text(BREAKS)
    command = [*speed.CHILD, "--suite", "smoke", "--child", "breaks:provider"]
    command += ["--provider", "breaks:provider", "--rows", str(tmp_path / "rows.jsonl")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=300)
    assert done.returncode == speed.BROKEN, done.stderr[-3000:]
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines()[1:])
    assert row["status"] == "failed" and "CUDA" in row["reason"]
    assert row["context"].startswith("broken")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("workload", SUITES["smoke"].workloads, ids=lambda workload: workload.name)
def test_measure_on_a_gpu(workload):
    device = torch.device("cuda")
    for provider in load_providers(device, ["fastkl", "torch"]):
        row = timing.measure(provider, workload, device, 4000.0)
        assert row["status"] == "ok" and set(row["times"]) == set(workload.phases), row
        assert all(f["median_ms"] > 0 and f["wall_ms"] > 0 for f in row["times"].values())
        assert row["memory"]["peak_bytes"] >= row["memory"]["gradient_bytes"]


def test_short_runs_are_replayed_as_a_graph_or_say_why_not(monkeypatch):
    stand_in.install(monkeypatch.setattr)
    events = {"median_ms": 0.1, "wall_ms": 1.0, "timed_by": "events"}
    found = timing.by_graph(events, lambda inputs: inputs, [1, 2])
    assert found["timed_by"] == "graph" and found["by_events_ms"] == 0.1
    assert timing.by_graph({"median_ms": 5.0}, None, [1]) == {"median_ms": 5.0}

    def waits(inputs):
        raise RuntimeError("called a synchronizing CUDA operation")

    found = timing.by_graph(events, waits, [1])
    assert found["median_ms"] == 0.1 and "synchronizing" in found["no_graph"]


def test_small_inputs_rotate_until_they_exceed_the_cache(monkeypatch):
    stand_in.install(monkeypatch.setattr)
    torch.cuda.get_device_properties(0).L2_cache_size = 2**20
    small, counts = Workload(rows=8, vocabulary=2**14), []  # 512 KB of logits
    for workload, copy in ((small, 1.0), (Workload(), 1.0), (small, None)):
        counts.append(len(timing._inputs(workload, None, lambda *given: given, copy)))
    assert counts == [6, 1, 1]
