"""The README's tables are those of the newest committed results."""

import json

import pytest

from benchmarks import harness, readme_tables
from benchmarks.record import ROOT
from benchmarks.workloads import Workload

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_is_up_to_date():
    assert readme_tables.render(README) == README, "run python3 -m benchmarks.readme_tables"


def test_the_page_of_results_is_up_to_date():
    page = (ROOT / "benchmarks" / "results" / "README.md").read_text(encoding="utf-8")
    assert readme_tables.results_page() == page, "run python3 -m benchmarks.readme_tables"
    assert "cut-cross-entropy" in page and page.count("| 1e-8 |") == 4


@pytest.mark.parametrize("name", readme_tables.SECTIONS)
def test_a_section_that_is_not_there_is_an_error(name):
    with pytest.raises(ValueError, match=f"expected one section <!-- {name} -->"):
        readme_tables.render(README.replace(f"<!-- {name} -->", ""))


def test_figures_come_from_the_results(monkeypatch):
    data = readme_tables.read("static/peers.json")
    ours = data["kernels"][0]
    assert f"| {ours['instructions_per_pair']} | {ours['ex2_per_pair']} | {ours['kernel_bytes']} |" in README
    ours["instructions_per_pair"] = 12345
    monkeypatch.setattr(readme_tables, "read", lambda path: data)
    assert "| 12345 |" in readme_tables.static_section()


def test_static_table_has_two_peers_and_every_way():
    text = readme_tables.static_section()
    assert "liger" in text and "trl" in text and all(name.replace("_", r"\_") in text for name in readme_tables.PIPELINES)


def test_gpu_table(tmp_path, monkeypatch):
    """Of the run that measured last, whichever GPU it was on and whatever lies beside it; a provider that failed says why."""
    workload = Workload()
    times = {phase: {"median_ms": 1.25, "percent_of_copy": 91.6} for phase in harness.PHASES}
    rows = [{"copy": {}}, *({"workload": workload.as_dict(), "provider": provider, "status": "ok", "reason": None, "times": times,
                             "memory": {"peak_bytes": 2.1e9}, "error": {"values": 1e-6}} for provider in ("fastkl", "torch"))]
    rows.append({"workload": workload.as_dict(), "provider": "peer", "status": "failed", "reason": "RuntimeError: no\nmore", "times": {}})
    runs = {"NVIDIA H200/a": ("2026-02-01", rows), "NVIDIA A100/b": ("2026-01-01", rows), "ZZ/c": ("2026-03-01", [])}
    for file, (date, measured) in runs.items():
        path = tmp_path / f"{file}.json"
        path.parent.mkdir()
        data = {"date": f"{date}T00:00:00Z", "gpu": {"name": path.parent.name}, "versions": {"torch": "2.11", "trl": None}, "command": "suite",
                "commit": "0123456789abc", "sections": {"main": {"rows": measured}}}
        path.write_text(json.dumps(data), encoding="utf-8")
    (tmp_path / "NVIDIA H200" / "scaling.json").write_text('{"gpu": "NVIDIA H200", "axes": {}}', encoding="utf-8")
    (tmp_path / "NVIDIA H200" / "tune.json").write_text("[]", encoding="utf-8")
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    text = readme_tables.gpu_section()
    assert "Measured on one NVIDIA H200. `suite`, 2026-02-01, torch 2.11, commit 0123456789." in text
    assert "| fastkl | 1.25 ms, 92 % | 1.25 ms, 92 % | 2.10 GB | 1e-06 |" in text
    assert "| peer | failed: RuntimeError: no |" in text


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    assert readme_tables.gpu_section().startswith("No time has been measured on a GPU yet")
