"""benchmarks.overhead: what it times, and that the machine's own backend is left alone."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")
import fastkl
from benchmarks import overhead
from fastkl import _ops


def test_every_function_by_either_way(monkeypatch, tmp_path, capsys) -> None:
    """A row per function and way, each with three times; the way of plain tensors calls no op, the other does."""
    monkeypatch.setattr(overhead, "CALLS", 1)
    monkeypatch.setattr(overhead, "ROUNDS", 1)
    ops, op = [], _ops.row_statistics.op
    monkeypatch.setattr(_ops.row_statistics, "op", lambda *inputs: ops.append(inputs[6]) or op(*inputs))
    assert overhead.main(["--json", str(tmp_path / "o.json")]) == 0
    data = json.loads((tmp_path / "o.json").read_text())
    assert [(record["function"], record["way"]) for record in data["records"]] == [
        (name, way) for name in ("kl_divergence", "token_stats", "selective_log_softmax") for way in overhead.WAYS]
    assert all(record[step] > 0 for record in data["records"] for step in overhead.STEPS)
    assert ops == [fields for fields in ("kl", "logprob,entropy,ref_logprob,kl,ref_kl", "logprob") for _ in overhead.STEPS]
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(data["records"])
    assert fastkl.explain(overhead.functions()[0]).backend == "reference"


def test_the_shortest_round_counts(monkeypatch) -> None:
    """A mean over the calls of a round, of the rounds the shortest."""
    monkeypatch.setattr(overhead, "CALLS", 2)
    monkeypatch.setattr(overhead, "ROUNDS", 2)
    clock = iter([0.0, 10e-6, 20e-6, 24e-6])
    monkeypatch.setattr(overhead.time, "perf_counter", lambda: next(clock))
    assert overhead.microseconds(lambda: None) == pytest.approx(2.0)
