# benchmarks.overhead: every function by either way.

import itertools
import json

import pytest

pytest.importorskip("triton")

from benchmarks import overhead


def test_every_function_by_either_way(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(overhead.measure, "__defaults__", (1, 1))
    assert overhead.main(["--json", str(tmp_path / "o.json")]) == 0
    records = json.loads((tmp_path / "o.json").read_text())["records"]
    cases = itertools.product(overhead.FUNCTIONS, overhead.WAYS)
    assert [(record["function"], record["way"]) for record in records] == list(cases)
    assert all(record[step] > 0 for record in records for step in (*overhead.STEPS, "calls"))
    calls = [record["calls"] for record in records]
    assert all(op > plain for plain, op in zip(calls[::2], calls[1::2], strict=True))
