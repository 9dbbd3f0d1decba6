"""benchmarks.overhead: what it times, that two checkouts are compared, and that the machine's own backend is left alone."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")
import fastkl
from benchmarks import overhead, overhead_calls
from benchmarks.record import ROOT
from fastkl import _ops


@pytest.fixture
def once(monkeypatch):
    """One call in a round, one round."""
    monkeypatch.setattr(overhead_calls, "CALLS", 1)
    monkeypatch.setattr(overhead, "ROUNDS", 1)
    monkeypatch.setattr(overhead, "PAIRS", 1)


def test_every_function_by_either_way(once, monkeypatch, tmp_path, capsys) -> None:
    """A row per function and way, each with three times; the way of plain tensors calls no op, the other does."""
    ops, op = [], _ops.row_statistics.op
    monkeypatch.setattr(_ops.row_statistics, "op", lambda *inputs: ops.append(inputs[6]) or op(*inputs))
    assert overhead.main(["--json", str(tmp_path / "o.json")]) == 0
    data = json.loads((tmp_path / "o.json").read_text())
    assert [(record["function"], record["way"]) for record in data["records"]] == [
        (name, way) for name in overhead_calls.FUNCTIONS for way in overhead.WAYS]
    assert all(record[step] > 0 for record in data["records"] for step in (*overhead.STEPS, "calls"))
    assert set(ops) == {"kl", "logprob,entropy,ref_logprob,kl,ref_kl", "logprob"} and len(ops) >= 3 * len(overhead_calls.FUNCTIONS)
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(data["records"])
    assert fastkl.explain(overhead_calls.functions()[0]).backend == "reference"


def test_against_another_checkout(once, tmp_path, capsys) -> None:
    """A process for each, with the fastkl of its own; a function that one of them lacks has no ratio."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "fastkl").symlink_to(ROOT / "fastkl")
    assert overhead.main(["--against", str(other), "--json", str(tmp_path / "o.json")]) == 0
    records = json.loads((tmp_path / "o.json").read_text())["records"]
    assert [(record["function"], record["step"]) for record in records] == [(name, step) for name in overhead_calls.FUNCTIONS for step in overhead.STEPS]
    assert all(record["ratio"] > 0 and min(record["microseconds"]) > 0 and record["calls"][0] == record["calls"][1] for record in records)
    lines = capsys.readouterr().out.splitlines()
    overhead.print_against({**records[0], "microseconds": [1.5, None], "ratio": None})
    assert len(lines) == 2 + len(records) and capsys.readouterr().out.split()[-5:-2] == ["1.5", "-", "-"]


def test_what_is_no_checkout(capsys, tmp_path) -> None:
    """Found out before anything is measured."""
    with pytest.raises(SystemExit):
        overhead.main(["--against", str(tmp_path)])
    assert "expected a checkout of the repository" in capsys.readouterr().err


def test_the_shortest_round_counts(monkeypatch) -> None:
    """A mean over the calls of a round, of the rounds the shortest."""
    monkeypatch.setattr(overhead_calls, "CALLS", 2)
    monkeypatch.setattr(overhead, "ROUNDS", 2)
    clock = iter([0.0, 10e-6, 20e-6, 24e-6])
    monkeypatch.setattr(overhead_calls.time, "perf_counter", lambda: next(clock))
    assert overhead.shortest(lambda: None) == pytest.approx(2.0)
