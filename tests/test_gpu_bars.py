"""The bars of the suite: met, missed, and not met where nothing was measured."""
import pytest

from benchmarks import gpu_suite, harness
from benchmarks.gpu_bars import bars
from benchmarks.linear_workloads import OPERATIONS, LinearWorkload
from benchmarks.workloads import Workload


def timed_row(wrt, name, milliseconds, percent=95.0, ratio=1.0):
    """A row as the main section gives it on a GPU."""
    times = {phase: {"median_ms": milliseconds, "percent_of_copy": percent} for phase in harness.PHASES}
    memory = {"limit_ratio": ratio}
    return {"workload": Workload(wrt=wrt).as_dict(), "provider": name, "status": "ok", "reason": None, "times": times, "memory": memory}


def main_rows(**changes):
    """The rows of a main section that meets all its bars, but for the changes to fastkl's."""
    others = [timed_row(wrt, name, milliseconds) for wrt in "pq" for name, milliseconds in (("torch", 12.0), ("torch.compile", 4.0))]
    return others + [timed_row(wrt, "fastkl", **{"milliseconds": 2.0, **changes}) for wrt in "pq"]


def test_bars_met():
    found = bars({"main": {"rows": [{"copy": {"gb_per_s": 4000}}, *main_rows()]}})
    assert len(found) == 10 and all(bar["met"] for bar in found), found


@pytest.mark.parametrize(("changes", "bar"), [
    ({"milliseconds": 2.1}, "faster than torch"), ({"percent": 89.9}, "% of copy"), ({"ratio": 1.02}, "peak"),
])
def test_bars_not_met(changes, bar):
    missed = [b["bar"] for b in bars({"main": {"rows": main_rows(**changes)}}) if not b["met"]]
    assert missed and all(bar in name for name in missed)


def test_bars_without_figures_are_not_met():
    found = bars({"main": {"rows": []}, "accuracy": {"rows": []}})
    assert len(found) == 11 and not any(bar["met"] for bar in found)
    assert bars({"tests": {}}) == []
    results = {"sections": {"main": {"status": "exit code 1", "seconds": 3, "rows": main_rows()}}, "bars": found}
    assert "NOT MET" in gpu_suite.report(results)


def linear_row(mode, provider="fastkl", milliseconds=11.0, floor=10.0, peak=1e9):
    """A row as the linear section gives it on a GPU."""
    workload = LinearWorkload(mode)
    times = harness.with_rates({"median_ms": milliseconds}, workload, {"times": {workload.phase: {"median_ms": floor}}})
    return {"workload": workload.as_dict(), "provider": provider, "status": "ok", "reason": None, "error": {"kl": 4e-4, "dhidden": 5e-3},
            "times": {workload.phase: times}, "memory": {"peak_bytes": peak}}


def test_linear_bars_met():
    slow = [linear_row(mode, "torch", 99.0, peak=9e10) for mode in OPERATIONS]
    found = bars({"linear": {"rows": slow + [linear_row(mode, milliseconds=11.2, peak=1.2e9) for mode in OPERATIONS]}})
    assert len(found) == 4 and all(bar["met"] for bar in found), found


@pytest.mark.parametrize(("changes", "missed"), [
    ({"milliseconds": 11.21}, ["linear loss, times the bare matrix products", "linear forward, times the bare matrix products"]),
    ({"peak": 1.21e9}, ["linear forward, peak memory in GB"]),
    ({"peak": 3.41e9}, ["linear loss, peak memory in GB", "linear forward, peak memory in GB"]),
])
def test_linear_bars_not_met(changes, missed):
    found = bars({"linear": {"rows": [linear_row(mode, **changes) for mode in OPERATIONS]}})
    assert [bar["bar"] for bar in found if not bar["met"]] == missed


def test_linear_bars_without_figures_are_not_met():
    rows = [{**linear_row("loss"), "status": "wrong", "reason": "kl off by 1", "times": {}, "memory": {}}]
    for sections in ({"linear": {"rows": rows}}, {"linear": {"status": "exit code 1"}}):
        found = bars(sections)
        assert len(found) == 4 and not any(bar["met"] for bar in found)


def test_the_report_has_the_table_and_the_bars():
    rows = [linear_row("loss"), linear_row("forward"), linear_row("loss", "torch.compile", 19.0)]
    section = {"status": "ok", "seconds": 3, "rows": rows}
    text = gpu_suite.report({"sections": {"linear": section}, "bars": bars({"linear": section})})
    head, *lines = [line.split() for line in text.splitlines() if "linear-" in line or "TFLOP/s" in line]
    assert head[-2:] == ["peak", "error"]
    assert [(line[0].split("-")[1], line[1]) for line in lines] == [("loss", "fastkl"), ("loss", "torch.compile"), ("forward", "fastkl")]
    assert lines[0][2:4] == ["11.000", "1.100"] and lines[0][5:] == ["1.000", "GB", "kl", "4e-04", "dhidden", "5e-03"]
    assert "linear loss, times the bare matrix products" in text and "met" in text
