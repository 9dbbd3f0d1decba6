# benchmarks.overhead: every function by either way, and against another checkout.

import itertools
import json

import pytest

pytest.importorskip("triton")

from benchmarks import overhead


def test_every_function_by_either_way(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(overhead.measure, "__defaults__", (1, 1))
    assert overhead.main(["--json", str(tmp_path / "o.json")]) == 0
    records = json.loads((tmp_path / "o.json").read_text())["records"]
    cases = itertools.product(overhead.FUNCTIONS, ("plain tensors", "custom op"))
    assert [(record["function"], record["way"]) for record in records] == list(cases)
    assert all(record[step] > 0 for record in records for step in (*overhead.STEPS, "calls"))
    calls = [record["calls"] for record in records]
    assert all(op > plain for plain, op in zip(calls[::2], calls[1::2], strict=True))


OTHER = {
    "__init__.py": """import contextlib, types
def kl_divergence(p, q): return inner(p)
def token_stats(p, tokens, q): return types.SimpleNamespace(kl=p.sum(-1))
def selective_log_softmax(p, tokens): return p.sum(-1)
def inner(p): return p.sum(-1)
def use_backend(name): return contextlib.nullcontext()""",
    "backend.py": "_interpreting = None",
    "kernels/__init__.py": "",
    "kernels/launch.py": "class Variant: start = None",
}


def test_against_another_checkout(monkeypatch, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        overhead.main(["--against", str(tmp_path)])
    assert "expected a checkout of the repository" in capsys.readouterr().err
    for name, source in OTHER.items():
        (tmp_path / "fastkl" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "fastkl" / name).write_text(source)
    monkeypatch.setattr(overhead.compare, "__defaults__", (1, 1, 1))
    assert overhead.main(["--against", str(tmp_path), "--json", str(tmp_path / "o.json")]) == 0
    records = json.loads((tmp_path / "o.json").read_text())["records"]
    assert [record["function"] for record in records] == [
        name for name in overhead.FUNCTIONS if name != "kl_divergence, mean"
    ]
    assert [record["calls"][1] for record in records] == [2, 1, 1]
    for record in records:
        assert record["calls"][0] > 20 and min(record["ratio"].values()) > 0
