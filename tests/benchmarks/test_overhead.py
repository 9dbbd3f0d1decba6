"""benchmarks.overhead: what it times, that two checkouts are compared, and that the machine's own
backend is left alone.
"""

from __future__ import annotations

import itertools
import json

import pytest

pytest.importorskip("triton")
import fastkl
from benchmarks import overhead, overhead_calls
from fastkl.ops import row_op


@pytest.fixture
def once(monkeypatch):
    """One call in a round, one round."""
    monkeypatch.setattr(overhead, "CALLS", 1)
    monkeypatch.setattr(overhead, "ROUNDS", 1)
    monkeypatch.setattr(overhead, "PAIRS", 1)


def test_every_function_by_either_way(once, monkeypatch, tmp_path, capsys) -> None:
    """A row per function and way, each with three times; the way of plain tensors calls no op, the
    other does.
    """
    ops, op = [], row_op.row_statistics.op
    monkeypatch.setattr(
        row_op.row_statistics, "op", lambda *inputs: ops.append(inputs[6]) or op(*inputs)
    )
    assert overhead.main(["--json", str(tmp_path / "o.json")]) == 0
    data = json.loads((tmp_path / "o.json").read_text())
    assert [(record["function"], record["way"]) for record in data["records"]] == [
        (name, way) for name in overhead_calls.FUNCTIONS for way in overhead.WAYS
    ]
    assert all(
        record[step] > 0 for record in data["records"] for step in (*overhead.STEPS, "calls")
    )
    assert set(ops) == {"kl", "logprob,entropy,ref_logprob,kl,ref_kl", "logprob"} and len(
        ops
    ) >= 3 * len(overhead_calls.FUNCTIONS)
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(data["records"])
    assert fastkl.explain(overhead_calls.functions()[0]).backend == "reference"


OTHER = {
    "__init__.py": """import contextlib, types
def kl_divergence(p, q): return inner(p)
def token_stats(p, tokens, q): return types.SimpleNamespace(kl=p.sum(-1))
def selective_log_softmax(p, tokens): return p.sum(-1)
def inner(p): return p.sum(-1)
def use_backend(name): return contextlib.nullcontext()""",
    "backend.py": "_interpreting = None",
    "dual_op.py": "_plain = None",
    "kernels/__init__.py": "",
    "kernels/launch.py": "class Variant: start = None",
}


def test_against_another_checkout(once, tmp_path, capsys) -> None:
    """A process for each, with the fastkl of its own; a function that one of them lacks has no
    ratio.
    """
    for name, source in OTHER.items():
        (tmp_path / "fastkl" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "fastkl" / name).write_text(source)
    assert overhead.main(["--against", str(tmp_path), "--json", str(tmp_path / "o.json")]) == 0
    records = json.loads((tmp_path / "o.json").read_text())["records"]
    assert [(record["function"], record["step"]) for record in records] == list(
        itertools.product(overhead_calls.FUNCTIONS, overhead.STEPS)
    )
    for record in records:
        lacking = record["function"] == "kl_divergence, mean"
        calls = {"kl_divergence": 2, "kl_divergence, mean": None}.get(record["function"], 1)
        assert record["calls"][0] > 20 and record["calls"][1] == calls
        assert (
            record["microseconds"][0] > 0
            and (record["ratio"] is None) == (record["microseconds"][1] is None) == lacking
        )
        assert lacking or record["ratio"] == pytest.approx(
            record["microseconds"][0] / record["microseconds"][1], rel=0.1
        )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(records) and lines[5].split()[-4:] == [
        "-",
        "-",
        str(records[3]["calls"][0]),
        "-",
    ]


def test_what_is_no_checkout(capsys, tmp_path) -> None:
    """Found out before anything is measured."""
    with pytest.raises(SystemExit):
        overhead.main(["--against", str(tmp_path)])
    assert "expected a checkout of the repository" in capsys.readouterr().err


def test_the_shortest_round_counts(monkeypatch) -> None:
    """A mean over the calls of a round, of the rounds the shortest."""
    monkeypatch.setattr(overhead, "CALLS", 2)
    monkeypatch.setattr(overhead, "ROUNDS", 2)
    clock = iter([0.0, 10e-6, 20e-6, 24e-6])
    monkeypatch.setattr(overhead_calls.time, "perf_counter", lambda: next(clock))
    assert overhead.shortest(lambda: None) == pytest.approx(2.0)
