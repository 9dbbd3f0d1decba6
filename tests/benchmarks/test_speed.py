# Runs benchmarks.speed on a stand-in device, from its arguments to the files of results.

import argparse
import json
import time
from unittest import mock

import pytest
import torch

from benchmarks import cases, linear_cases, processes, providers, speed, suites, timing

stand_in = pytest.importorskip("stand_in")  # without Triton there is no triton.testing
OWN = "stand_in:provider"


# The command, end to end


# Order, processes, a user's own provider that crashes, the floor, whole JSON.
def test_a_run_on_a_stand_in_device(monkeypatch, tmp_path):
    stand_in.install(monkeypatch.setattr)
    words = ["--out", str(tmp_path), "--suite", *stand_in.SECTIONS, "--provider", OWN]
    assert speed.main(words) == 1
    (file,) = tmp_path.iterdir()
    data = json.loads(file.read_text())
    assert data["gpu"]["name"] == "stand-in" and data["versions"]["torch"] and data["commit"]
    assert f"--provider {OWN}" in data["command"]
    main, others, linear = (section["rows"] for section in data["sections"].values())
    for row in others:
        assert row["status"] == "ok" and set(row["times"]) == set(cases.PHASES), row
    assert len(others) == len(stand_in.DIVERGENCES)
    right, crashed = main
    assert [row["workload"]["rows"] for row in main] == [6, 4]
    assert [right["provider"], right["status"], crashed["status"]] == [OWN, "ok", "failed"]
    assert crashed["reason"].startswith("BrokenProcessPool")
    assert list(right["times"]) == list(cases.PHASES) and right["memory"]["peak_bytes"] == 3_000_000
    for figures in right["times"].values():
        assert figures["percent_of_copy"] == pytest.approx(
            100 * figures["gb_per_s"] / right["copy_gb_per_s"]
        )
        assert figures["median_ms"] > 0 and figures["wall_ms"] > 0
    floor = linear_cases.FLOOR
    assert [row["provider"] for row in linear] == [floor] * 3 + ["fastkl"] * 3
    for floor, row in zip(linear[:3], linear[3:], strict=True):
        ((_, bare),), ((phase, figures),) = floor["times"].items(), row["times"].items()
        assert figures["ratio_to_floor"] == pytest.approx(figures["median_ms"] / bare["median_ms"])
        assert figures["tflop_per_s"] == pytest.approx(figures["flop"] / figures["median_ms"] / 1e9)
        assert phase in ("forward", "both") and "ratio_to_floor" not in bare


# A peer that is wrong gets no time; the command fails for this package's rows alone.
@pytest.mark.parametrize("status, percent", [("wrong", 90), ("ok", 59)])
@pytest.mark.parametrize("provider, code", [("Liger JSD", 0), ("liger chunked", 0), ("fastkl", 1)])
def test_whose_fault_it_is(provider, code, status, percent, monkeypatch) -> None:
    row = {"provider": provider, "status": status, "reason": "far off", "workload": {"name": "js"}}
    row["times"] = {"forward": {"percent_of_copy": 90}, "both": {"percent_of_copy": percent}}
    section = {"status": "ok", "rows": [row]}
    monkeypatch.setattr(
        speed, "run_section", lambda run, name: run.results["sections"].update({name: section})
    )
    monkeypatch.setattr(speed, "said", str)
    assert speed.main(["--check", "--suite", "smoke", "--at-least", "60"]) == code
    assert speed.main(["--check", "--suite", "smoke"]) == code * (status == "wrong")


# Processes that crash or break the context

DIED, BROKEN = "RuntimeError: died", {"context": "broken"}
LATE = f"of 3 rows not measured: {speed.NO_TIME}"


# A section of three workloads, whose process gives answers: the reasons of its rows and how often
# the process was ended. Past the deadline none starts.
@pytest.mark.parametrize(
    ("answers", "status", "reasons", "ends"),
    [
        ([{}, {}, {}], "ok", [None, None, None], 0),
        ([{}, DIED, {}], "ok", [None, DIED, None], 0),
        ([{}, BROKEN, {}], "ok", [None, None, None], 1),
        ([DIED, DIED], "ok", [DIED, DIED, DIED], 0),
        ([BROKEN, BROKEN], "ok", [None, None, speed.BROKE], 2),
        ([], f"3 {LATE}", [speed.NO_TIME] * 3, 0),
    ],
    ids="fine,dies once,breaks once,dies twice,breaks twice,late".split(","),
)
def test_costs_of_a_process(monkeypatch, answers, status, reasons, ends):
    workloads, child = [cases.Workload(rows=n, vocabulary=7) for n in (1, 2, 3)], mock.MagicMock()
    monkeypatch.setattr(speed, "SUITES", {"s": suites.Section(workloads, ("torch",))})
    monkeypatch.setattr(speed, "CHILD", child)
    started = child.return_value.__enter__.return_value
    started.attempt.side_effect = [
        (None, one) if one == DIED else (timing.row_of(workload, "torch", "ok", None, **one), None)
        for one, workload in zip(answers, workloads, strict=False)
    ]
    arguments = argparse.Namespace(provider=[], providers=None, check=False, out=None)
    deadline = time.monotonic() + (1000 if answers else speed.LEAST_SECONDS / 2)
    made = speed.Run(arguments, {"date": "", "sections": {}}, deadline)
    speed.run_section(made, "s")
    section = made.results["sections"]["s"]
    assert section["status"] == status and started.end.call_count == ends
    assert [row["reason"] for row in section["rows"]] == reasons


# What the suites measure


def test_every_provider_is_measured_and_fastkl_before_the_compiled():
    named = {name for section in suites.SUITES.values() for name in section.providers}
    assert named == {*providers.ALL_LOADERS, linear_cases.FLOOR}
    for name, section in suites.SUITES.items():
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


# By an index out of range: the row says so.
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_context_broken_on_a_gpu(tmp_path, monkeypatch):
    (tmp_path / "breaks.py").write_text(BREAKS)
    monkeypatch.syspath_prepend(tmp_path)
    with processes.Child() as child:
        row, _ = child.attempt(
            300, speed.measure_here, "breaks:provider", True, cases.Workload(rows=16)
        )
    assert row["status"] == "failed" and "CUDA" in row["reason"]
    assert row["context"].startswith("broken")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    "workload", suites.SUITES["smoke"].workloads, ids=lambda workload: workload.name
)
def test_measure_on_a_gpu(workload):
    device = torch.device("cuda")
    for provider in providers.load_providers(device, ["fastkl", "torch"]):
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
    waits = mock.Mock(side_effect=RuntimeError("called a synchronizing CUDA operation"))
    found = timing.by_graph(events, waits, [1])
    assert found["median_ms"] == 0.1 and "synchronizing" in found["no_graph"]


def test_small_inputs_rotate_until_they_exceed_the_cache(monkeypatch):
    stand_in.install(monkeypatch.setattr)
    torch.cuda.get_device_properties(0).L2_cache_size = 2**20
    small, counts = cases.Workload(rows=8, vocabulary=2**14), []  # 512 KB of logits
    for workload, copy in ((small, 1.0), (cases.Workload(), 1.0), (small, None)):
        counts.append(len(timing._inputs(workload, None, lambda *given: given, copy)))
    assert counts == [6, 1, 1]
