# Checks the report: tables come from the committed results, and name what was not measured.

import json
import math
import shutil

import pytest

from benchmarks import cases, linear_cases, record, report, suites, tables


def test_the_committed_tables_are_those_of_the_committed_results():
    for path in (record.ROOT / "README.md", *record.ROOT.glob("docs/**/*.md")):
        words = path.read_text(encoding="utf-8")
        assert report.render(path.name, words) == words, "run python -m benchmarks.report"
    assert report.results_page() == (report.RESULTS / "README.md").read_text(encoding="utf-8")


def test_sections_are_made_anew_and_a_broken_mark_is_an_error(monkeypatch):
    monkeypatch.setitem(report.SECTIONS, "gpu", lambda: "new")
    page = "a\n<!-- gpu -->\nold\n<!-- /gpu -->\nb"
    assert report.render("x", page) == page.replace("old", "new")
    for broken in ("<!-- gpu -->\nold", "old\n<!-- /gpu -->"):
        with pytest.raises(ValueError, match="x: expected <!-- gpu --> to <!-- /gpu -->"):
            report.render("x", broken)


# A row as a GPU gives it; backward takes half, forward a third.
def row(provider, both, workload=None, **changes):
    workload = workload or cases.Workload()
    times = {
        phase: {"median_ms": ms, "wall_ms": ms + 1, "percent_of_copy": 92.0, "ratio_to_floor": 1.06}
        | {"tflop_per_s": 640.0}
        for phase, ms in zip(cases.PHASES, (both / 3, both / 2, both), strict=True)
        if phase in workload.phases
    }
    found = {"workload": workload.as_dict(), "provider": provider, "status": "ok", "reason": None}
    found |= {"error": {"values": 1e-6, "x, worst row": 9.0}, "times": times, "note": None}
    return {**found, "memory": {"peak_bytes": 2.1e9, "held_bytes": 294912}, **changes}


def data(name="NVIDIA H200", date="2026-02-01T10:00:00Z", **sections):
    origin = {
        "versions": {"torch": "2.11", "trl": None},
        "command": "python -m benchmarks.gone ",
        "commit": "01234567",
    }
    made = {key: {"status": "ok", "seconds": 45.3, "rows": rows} for key, rows in sections.items()}
    return {**origin, "date": date, "gpu": {"name": name, "driver": "570.1"}, "sections": made}


@pytest.fixture
def folder(monkeypatch, tmp_path):
    shutil.copytree(report.RESULTS, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "nvidia-h200")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return tmp_path


def put(folder, results):
    record.write_json(folder / results["gpu"]["name"] / f"{results['date'][:10]}.json", results)


MEMORY = "2.10 GB / 2.10 GB / 2.10 GB"
LOSS = linear_cases.LinearWorkload("loss")
WRONG = {
    "status": "wrong",
    "reason": "values off by nan | more\nlines",
    "error": {"values": math.nan},
}
FULL = data(
    main=[row("fastkl", 2.67), row("torch", 39.9), row("TRL", 0.1, **WRONG)],
    peers=[
        row("fastkl", 1.5, cases.Workload("logprob")),
        row("TRL", 1.4, cases.Workload("logprob")),
    ],
    linear=[
        row(linear_cases.FLOOR, 51.1, LOSS),
        row("fastkl", 54.4, LOSS),
        row("torch", 79.0, LOSS),
    ],
)


def test_tables_of_a_gpu(folder):
    put(folder, FULL)
    section, page = report.SECTIONS["gpu"](), report.results_page()
    for line in (
        f"| `kl_divergence dp` | 2.67 ms, 92 % | torch 39.9 ms, 15 × | 39.9 ms, 15 × | {MEMORY} |",
        "| `logprob` | 1.50 ms, 92 % | TRL 1.40 ms, 0.93 × | – | 2.10 GB / 2.10 GB / – |",
        f"| `linear loss` | 54.4 ms, 1.06 × | torch 79.0 ms, 1.45 × | 79.0 ms, 1.45 × | {MEMORY} |",
        "`python -m benchmarks.gone` (at that commit), 2026-02-01, torch 2.11, commit 01234567.",
    ):  # fmt: skip
        assert line in section.splitlines()
    for line in (
        "| `kl_divergence dp` | fastkl | 0.8900 / 1.335 / 2.670 | 92.0 / 92.0 / 92.0 | "
        "1.06 / 1.06 / 1.06 | 640 / 640 / 640 | 1.89 / 2.33 / 3.67 | 2.10 GB | 295 kB | "
        "values 1e-06 | – |",
        "| `kl_divergence dp` | TRL | 🔴 **wrong: values off by nan \\| more** | – | – | – | – | "
        "2.10 GB | 295 kB | values nan | – |",
    ):  # fmt: skip
        assert line.replace("| – |\n", "") in page.replace(" |  |", " | – |")
    words = tables.standing(FULL)
    assert all(f"TRL at `logprob` ({phase}, 1.07 ×)" in words for phase in cases.PHASES)
    assert words.count("×") == 3 and "none" not in words


# The README has the newest of all; a file without a time of the main shape does not count.
def test_the_newest_of_each_gpu(folder):
    assert (
        report.SECTIONS["gpu"]() == report.NO_RESULTS and report.NO_RESULTS in report.results_page()
    )
    for ms, day, name in ((1.23, 1, "H200"), (3.33, 3, "H200"), (5.55, 3, "H100")):
        put(folder, data(f"NVIDIA {name}", f"2026-02-0{day}T10:00:00Z", main=[row("fastkl", ms)]))
    late = {"status": "missing", "reason": "no time left", "times": {}}
    put(folder, data(date="2026-02-04T00:00:00Z", main=[row("fastkl", 9.99, **late)]))
    page = report.results_page()
    assert "3.33 ms" in report.SECTIONS["gpu"]() and page.index("### NVIDIA H200") < page.index(
        "H100"
    )
    assert [ms for ms in ("1.230", "3.330", "5.550", "9.990") if ms in page] == ["3.330", "5.550"]


def test_the_page_has_every_section(folder, monkeypatch):
    put(folder, data(main=[row("fastkl", 2.67)], scaling=[row("fastkl", 3.33)]))
    record.write_bytes(folder / "root" / "README.md", b"# without sections")
    monkeypatch.setattr(report, "ROOT", folder / "root")
    assert report.main([]) == 0
    assert {"2.670", "3.330"} <= {*(folder / "README.md").read_text().split()}


@pytest.mark.parametrize("content", ['{"gpu": {"name": "NVID', "", "\xff"])
def test_a_broken_file_is_named_and_nothing_is_written(content, folder, monkeypatch, capsys):
    file = folder / "cpu" / "accuracy.json"
    file.write_text(content, encoding="latin-1")
    monkeypatch.setattr(report, "write_bytes", lambda *_: pytest.fail("nothing may be written"))
    assert report.main([]) == 1
    assert f"report: error: {file}: expected results in JSON, got " in capsys.readouterr().err


def test_every_workload_of_the_suite_has_a_name_of_its_own():
    workloads = {workload for s in suites.SUITES.values() for workload in s.workloads}
    assert len({tables.label(workload.as_dict()) for workload in workloads}) == len(workloads)


@pytest.mark.parametrize(
    ("write", "values", "shown"),
    [
        (tables.digits, (0.02134, 2.0, 39.96, 999.6, "nan"), "0.0213 2.00 40.0 1000 –"),
        (tables.amount, (14.7e9, 999.9e6, 294912, 12, None), "14.7 GB 1.00 GB 295 kB 12 B –"),
    ],
)
def test_numbers_are_written_short(write, values, shown):
    assert " ".join(map(write, values)) == shown


def test_json_has_no_nan(tmp_path):
    record.write_json(tmp_path / "new" / "x.json", {"inf": [math.inf, math.nan, (1.5,)]})
    assert json.loads((tmp_path / "new" / "x.json").read_text()) == {"inf": ["inf", "nan", [1.5]]}


def test_the_commit_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("FASTKL_COMMIT", raising=False)
    assert record.commit() == "unknown"
    monkeypatch.setenv("FASTKL_COMMIT", "0123abc")
    assert record.commit() == "0123abc"
