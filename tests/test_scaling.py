"""The scaling harness: fits, crossovers and pictures of given rows; on a CPU the sweep checks tiny shapes and reports no time."""

import io
import json

import pytest
import torch

from benchmarks import scaling
from benchmarks.providers import load_providers
from benchmarks.workloads import Workload


def row(provider, rows, ms, peak, wall=None, status="ok"):
    """A row of the results, as a GPU would give it."""
    workload = Workload(rows=rows)
    times = {"both": {"median_ms": ms, "wall_ms": ms if wall is None else wall, "bytes": workload.moved_bytes("both")}}
    return {"workload": workload.as_dict(), "provider": provider, "status": status, "reason": None, "times": times if status == "ok" else {},
            "memory": {"peak_bytes": peak} if status == "ok" else {}, "copy_gb_per_s": 4000.0}


SIZES = [64, 128, 256, 512, 1024, 2048, 4096]
# Ours costs a launch of 0.1 ms and 1 µs per row; theirs 0.02 ms and 2 µs: faster from 80 rows on, so at 128. On the clock ours waits 0.3 ms longer.
ROWS = [*(row("fastkl", n, 0.1 + 0.001 * n, 1000 * n, 0.4 + 0.001 * n) for n in SIZES), *(row("torch", n, 0.02 + 0.002 * n, 3000 * n) for n in SIZES)]


def test_exponents_are_those_of_the_upper_half():
    assert scaling.exponent([(n, 5.0 * n**1.5) for n in SIZES]) == pytest.approx(1.5)
    # Small sizes, which a launch dominates, have no part in it.
    assert scaling.exponent([(n, 1.0 if n < 512 else n / 512) for n in SIZES]) == pytest.approx(1.0)
    assert scaling.exponent([(64, 1.0), (128, 2.0)]) is None


def test_crossover_is_where_it_stays_faster():
    theirs = [(1, 1.0), (2, 2.0), (4, 4.0), (8, 8.0)]
    assert scaling.crossover([(1, 2.0), (2, 2.0), (4, 3.0), (8, 7.0)], theirs) == {"from": 4, "first": 1, "last": 8}
    assert scaling.crossover([(1, 0.5), (2, 3.0), (4, 3.0), (8, 7.0)], theirs)["from"] == 4
    assert scaling.crossover([(1, 0.5), (2, 1.0), (4, 3.0), (8, 9.0)], theirs)["from"] is None
    assert scaling.crossover([(1, 0.5), (2, 1.995), (4, 3.0), (8, 7.0)], theirs)["from"] == 4, "a difference within the noise is none"
    assert scaling.crossover([(1, 0.5), (2, 1.0)], theirs) == {"from": 1, "first": 1, "last": 2}
    assert scaling.crossover([(1, 0.5)], []) is None


def test_findings():
    found = scaling.findings(ROWS, "tokens")
    assert found["faster"] == {"torch": {"time": {"from": 128, "first": 64, "last": 4096}, "wall": {"from": 512, "first": 64, "last": 4096}}}
    assert found["exponents"]["fastkl"]["memory"] == pytest.approx(1.0)
    assert 0.8 < found["exponents"]["fastkl"]["time"] < 1.0
    text = scaling.sentences(found, "tokens")
    assert "fastkl beside torch on the device: faster from 128 to 4096 tokens" in text
    assert "on the clock, launches included: faster from 512 to 4096 tokens" in text


@pytest.mark.parametrize("more, words", [
    ([row("fastkl", 8192, 99.0, 1), row("torch", 8192, 1.0, 1)], "not faster at the largest size measured, 8192 tokens"),
    ([row("peer", 64, 1.0, 1, status="failed")], "fastkl beside peer on the device: no size was measured with both"),
    ([row("peer", 64, 9.0, 1), row("peer", 128, 9.0, 1)], "fastkl beside peer on the device: faster at every size measured, 64 to 128 tokens"),
])
def test_words_claim_what_was_measured(more, words):
    assert words in scaling.sentences(scaling.findings([*ROWS, *more], "tokens"), "tokens")


def test_rows_without_times_have_no_part():
    rows = [*ROWS, row("torch", 8192, 1.0, 1, status="failed")]
    assert scaling.curve(rows, "torch", "tokens", "time") == scaling.curve(ROWS, "torch", "tokens", "time")
    assert scaling.curve(rows, "peer", "tokens", "time") == []


def test_picture_shows_providers_and_roofline(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib import image

    content = scaling.picture(ROWS, "tokens", "title")
    picture = image.imread(io.BytesIO(content), format="png")
    assert min(picture.shape[:2]) > 400 and picture.std() > 0.05


def test_no_tensor_is_larger_than_the_limit():
    for workloads in scaling.AXES.values():
        assert sum(map(scaling.fits, workloads)) >= 9
    assert scaling.fits(Workload(rows=32768)) and not scaling.fits(Workload(rows=65536))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_on_a_cpu_it_checks_and_reports_no_time(tmp_path, capsys):
    cpu = torch.device("cpu")
    rows = list(scaling.sweep([Workload(rows=3, vocabulary=50), Workload(rows=5, vocabulary=50)], load_providers(cpu, ["fastkl", "torch"]), cpu))
    assert [row["status"] for row in rows] == ["ok"] * 4 and not any(row["times"] for row in rows)
    late = list(scaling.sweep([Workload(rows=3, vocabulary=50)], load_providers(cpu, ["fastkl"]), cpu, deadline=0.0))
    assert [row["reason"] for row in late] == ["no time left in this run"]
    json.dumps(rows)
    assert scaling.main(["--json", str(tmp_path / "scaling.json")]) == 2
    assert "no CUDA here" in capsys.readouterr().err and not (tmp_path / "scaling.json").exists()
