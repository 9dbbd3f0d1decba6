# The benchmark of the CPU: figures of each provider, and the section of the page.

import itertools
import json

from benchmarks import cpu


def test_records_and_page(monkeypatch, tmp_path) -> None:
    named = {name: run for name, run in cpu.providers().items() if name != "torch.compile"}
    monkeypatch.setattr(cpu, "providers", lambda: named)
    monkeypatch.setattr(cpu.measure, "__defaults__", (((4, 500),), 3))
    cpu.main(["--json", str(tmp_path / "cpu.json")])
    data = json.loads((tmp_path / "cpu.json").read_text())
    cases = list(itertools.product(("fp32", "bf16"), named))
    assert [(row["dtype"], row["provider"]) for row in data["records"]] == cases
    for row in data["records"]:
        assert row["both"]["median_ms"] >= row["forward"]["median_ms"] > 0
        assert row["peak_tensors"] >= 1 and (
            row["provider"] != "torch" or row["both"]["ratio"] == 1
        )
        assert not row["provider"].startswith("fastkl") or row["error"] < 1e-5
    _, origin, table = cpu.page(data)
    assert data["processor"] in origin and data["commit"][:10] in origin
    assert table.count("| 4 × 500 bf16 |") == len(named)
