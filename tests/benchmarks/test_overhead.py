"""benchmarks.overhead: what it times, and that two checkouts are compared."""

import itertools
import json

import pytest

pytest.importorskip("triton")
from benchmarks import overhead
from fastkl import _ops


@pytest.fixture(autouse=True)
def once(monkeypatch):
    for name in ("CALLS", "REPEATS", "TURNS"):
        monkeypatch.setattr(overhead, name, 1)
    monkeypatch.setattr(
        overhead.measure, "__defaults__", (*overhead.measure.__defaults__[:1], 1, 1)
    )


def test_every_function_by_either_way(monkeypatch, tmp_path) -> None:
    ops, op = [], _ops.row_statistics.op
    monkeypatch.setattr(
        _ops.row_statistics, "op", lambda *inputs: ops.append(inputs) or op(*inputs)
    )
    assert overhead.main(["--json", str(tmp_path / "o.json")]) == 0
    records = json.loads((tmp_path / "o.json").read_text())["records"]
    cases = itertools.product(overhead.FUNCTIONS, ("plain tensors", "custom op"))
    assert [(record["function"], record["way"]) for record in records] == list(cases)
    assert all(record[step] > 0 for record in records for step in (*overhead.STEPS, "calls"))
    calls = [record["calls"] for record in records]
    assert ops and all(op > plain for plain, op in zip(calls[::2], calls[1::2], strict=True))


OTHER = {
    "__init__.py": """import contextlib, types
def kl_divergence(p, q): return inner(p)
def token_stats(p, tokens, q): return types.SimpleNamespace(kl=p.sum(-1))
def selective_log_softmax(p, tokens): return p.sum(-1)
def inner(p): return p.sum(-1)
def use_backend(name): return contextlib.nullcontext()""",
    "backend.py": "_interpreting = None",
    "_dispatch.py": "_plain = None",
    "kernels/__init__.py": "",
    "kernels/launch.py": "class Variant: start = None",
}


def test_against_another_checkout(tmp_path) -> None:
    """A function that one of them lacks has no ratio."""
    for name, source in OTHER.items():
        (tmp_path / "fastkl" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "fastkl" / name).write_text(source)
    assert overhead.main(["--against", str(tmp_path), "--json", str(tmp_path / "o.json")]) == 0
    records = json.loads((tmp_path / "o.json").read_text())["records"]
    cases = itertools.product(overhead.FUNCTIONS, overhead.STEPS)
    assert [(record["function"], record["step"]) for record in records] == list(cases)
    for record in records:
        lacking = record["function"] == "kl_divergence, mean"
        calls = {"kl_divergence": 2, "kl_divergence, mean": None}.get(record["function"], 1)
        assert record["calls"][0] > 20 and record["calls"][1] == calls
        (here, there), ratio = record["microseconds"], record["ratio"]
        assert here > 0 and (ratio is None) == (there is None) == lacking


def test_what_is_no_checkout(capsys, tmp_path) -> None:
    with pytest.raises(SystemExit) as stop:
        overhead.main(["--against", str(tmp_path)])
    assert stop.value.code == 2 and "--against: expected a checkout" in capsys.readouterr().err
