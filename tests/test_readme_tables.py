"""The README's tables are those of the newest committed results; those of a GPU say what was measured, and what was not."""

import math
import shutil

import pytest

from benchmarks import gpu_suite, gpu_tables, harness, readme_tables, scaling
from benchmarks.linear_workloads import LinearWorkload
from benchmarks.record import ROOT, write_json
from benchmarks.workloads import Workload

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_is_up_to_date():
    assert readme_tables.render(README) == README, "run python3 -m benchmarks.readme_tables"


def test_the_page_of_results_is_up_to_date():
    page = (ROOT / "benchmarks" / "results" / "README.md").read_text(encoding="utf-8")
    assert readme_tables.results_page() == page, "run python3 -m benchmarks.readme_tables"
    assert "cut-cross-entropy" in page and page.count("| 1e-8 |") >= 4


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


def test_the_readme_names_where_fastkl_is_not_ahead():
    """Of the newest committed results: every workload at which another provider is faster stands in "## Limits", named as in the tables."""
    results = gpu_tables.gpu_results(readme_tables.RESULTS)
    assert gpu_tables.unnamed(results[0][1] if results else {}, README) == []


# Tables of GPU results, from rows as a GPU gives them -----------------------------------------------------------


def row(provider, both, workload=None, forward=None, backward=None, peak=2.1e9, copy=92.0, **changes):
    """A row of an operation on logits; memory and the share of a copy may be missing."""
    workload = workload or Workload()
    medians = {"forward": forward or both / 3, "backward": backward or both / 2, "both": both}
    times = {phase: {"median_ms": ms, "wall_ms": ms + 1, **({} if copy is None else {"percent_of_copy": copy})} for phase, ms in medians.items()}
    return {"workload": workload.as_dict(), "provider": provider, "status": "ok", "reason": None, "error": {"values": 1e-6, "gradient": 2e-3},
            "times": times, "memory": {} if peak is None else {"peak_bytes": peak, "held_bytes": 294912}} | changes


def without(provider, status, reason, workload=None):
    """A row without figures, as short as gpu_suite writes it."""
    return gpu_suite.no_figures(workload or Workload(), provider, status, reason)


def linear(mode, provider, ms, ratio=1.06, peak=3.1e9, **shape):
    """A row from hidden states."""
    workload = LinearWorkload(mode, **shape)
    figures = {"median_ms": ms, "wall_ms": ms + 1, "ratio_to_floor": ratio, "tflop_per_s": 640.0}
    return {"workload": workload.as_dict(), "provider": provider, "status": "ok", "reason": None, "memory": {"peak_bytes": peak},
            "error": {"kl": 4e-4, "kl, worst token": 0.2, "dhidden": 5e-3}, "times": {workload.phase: figures}}


def results(main=(), name="NVIDIA H200", date="2026-02-01T10:00:00Z", **sections):
    """A file of gpu_suite with these rows."""
    sections = {"main": [{"copy": {"gb_per_s": 4284.0}}, *main], **sections}
    found = {section: {"status": "ok", "seconds": 45.31, "rows": list(rows)} for section, rows in sections.items()}
    return {"date": date, "gpu": {"name": name, "driver": "570.1"}, "versions": {"torch": "2.11", "trl": None}, "command": "suite ",
            "commit": "0123456789abc", "sections": found, "bars": []}


def written(folder, *files, monkeypatch=None):
    """The folder, with files in <gpu>/<date>.json as gpu_suite writes them, NaN among them as a string."""
    for data in files:
        write_json(folder / data["gpu"]["name"] / f"{data['date'].replace(':', '')}.json", data)
    if monkeypatch:
        monkeypatch.setattr(readme_tables, "RESULTS", folder)
    return folder


def section_of(data, tmp_path):
    """The README's section of one file of results."""
    return gpu_tables.readme_section(gpu_tables.gpu_results(written(tmp_path, data)))


def page_of(data, tmp_path):
    """The page's part of one file of results."""
    return "\n\n".join(gpu_tables.page(gpu_tables.gpu_results(written(tmp_path, data))))


LOGPROB, BACKWARDS = Workload("logprob"), Workload(wrt="q")
PEERS = [row("fastkl", 1.5, LOGPROB, copy=None), row("TRL", 1.4, LOGPROB, forward=0.6, backward=0.7, peak=None),
         row("fastkl", 2.7, BACKWARDS), without("Liger JSD", "failed", "NotOfferedError: 8192 calls\nmore", BACKWARDS)]
FULL = results([row("fastkl", 2.67), row("torch", 39.9, peak=14.7e9), row("torch.compile", 7.1, peak=5.04e9)], peers=PEERS,
               linear=[linear("loss", harness.FLOOR, 51.1), linear("loss", "fastkl", 54.4), linear("loss", "torch", 79.0, 1.55, 14e9),
                       linear("forward", "fastkl", 27.7, 1.08, 1.1e9), linear("forward", "torch", 27.0, 1.05, 9e9),
                       linear("loss", "fastkl", 1.0, rows=64), linear("loss", "torch.compile", 99.0)])


def test_readme_table_from_logits(tmp_path):
    lines = section_of(FULL, tmp_path).splitlines()
    assert "Measured on one NVIDIA H200: 8192 tokens, a vocabulary of 128256, bfloat16" in lines[0]
    assert "| `kl_divergence dp` | 2.67 ms, 92 % | torch.compile 7.10 ms, 2.7 × | 39.9 ms, 15 × | 2.10 GB / 5.04 GB / 14.7 GB |" in lines
    # Measured without the bandwidth of a copy, memory or plain torch; and beside nobody who has a time.
    assert "| `logprob` | 1.50 ms | TRL 1.40 ms, 0.93 × | – | 2.10 GB / – / – |" in lines
    assert "| `kl_divergence dq` | 2.70 ms, 92 % | – | – | 2.10 GB / – / – |" in lines
    assert lines[-1] == "`suite`, 2026-02-01, torch 2.11, commit 0123456789."


def test_readme_table_from_hidden_states(tmp_path):
    lines = section_of(FULL, tmp_path).splitlines()
    assert "| `linear loss` | 54.4 ms, 1.06 × | torch 79.0 ms, 1.45 × | 79.0 ms, 1.45 × | 3.10 GB / 14.0 GB / 14.0 GB |" in lines
    assert "| `linear forward` | 27.7 ms, 1.08 × | torch 27.0 ms, 0.97 × | 27.0 ms, 0.97 × | 1.10 GB / 9.00 GB / 9.00 GB |" in lines
    assert not any("64 ×" in line for line in lines), "other shapes stand on the page only"


def test_a_wrong_provider_has_an_error_and_never_a_time(tmp_path):
    """Also where a file holds times beside the status; on the page the error is there in red, with what the gate measured."""
    wrong = row("torch", 0.1, status="wrong", reason="values off by nan, limit 1e-03 | more", error={"values": math.nan, "gradient": 0.5})
    fast = row("TRL", 0.2, status="failed", reason="RuntimeError: <no> kernel\nmore")
    data = results([row("fastkl", 2.67), wrong, fast, linear("loss", "fastkl", 54.4) | {"status": "wrong", "reason": "kl off by 1"}])
    readme, page = section_of(data, tmp_path), page_of(data, tmp_path)
    assert "| `kl_divergence dp` | 2.67 ms, 92 % | – | 🔴 **wrong: values off by nan, limit 1e-03 \\| more** | 2.10 GB" in readme
    assert "failed the gate against float64: 2." in readme and "Without a time of fastkl: `linear loss` (🔴 **wrong" in readme
    assert "| torch | 🔴 **wrong: values off by nan, limit 1e-03 \\| more** | – | – | – | – |" in page and "values nan, gradient 5e-01" in page
    assert "| TRL | failed: RuntimeError: &lt;no> kernel | – |" in page
    for text in (readme, page):
        assert "0.100" not in text and "0.200" not in text and "54.4" not in text
    assert gpu_tables.ahead(data) == []


def test_what_two_sections_measured_is_one_line(tmp_path):
    """The main section's figure where both have one, else that which was measured."""
    late = without("fastkl", "missing", "no time left in this run", BACKWARDS)
    data = results([row("fastkl", 2.67), row("torch", 39.9), late], peers=[row("fastkl", 2.99), *PEERS])
    text = section_of(data, tmp_path)
    assert "| `kl_divergence dp` | 2.67 ms, 92 %" in text and "2.99" not in text and "| `kl_divergence dq` | 2.70 ms, 92 %" in text
    assert "no time left" not in text and "no time left in this run" in page_of(data, tmp_path)


def test_a_workload_that_nobody_did_is_a_line(tmp_path):
    """Its inputs did not fit, or the time ran out: the one row speaks for all providers, unless a later pass measured it."""
    lost = [without("all", "failed", "OutOfMemoryError: 9 GiB", LinearWorkload(mode)) for mode in ("loss", "forward")]
    data = results([row("fastkl", 2.67)], linear=[linear("forward", harness.FLOOR, 25.6), *lost, linear("forward", "fastkl", 27.7)])
    text = section_of(data, tmp_path)
    assert "| `linear loss` | failed: OutOfMemoryError: 9 GiB | – | – | – / – / – |" in text and "| `linear forward` | 27.7 ms, 1.06 × | – |" in text
    assert "Without a time of fastkl: `linear loss` (failed: OutOfMemoryError: 9 GiB)." in text and "25.6" not in text


def test_the_newest_of_each_gpu(tmp_path, monkeypatch):
    """The README has the newest of all, of one day an H200's; the page the newest of every GPU; what lies beside them does not count."""
    old, new, later = (results([row("fastkl", ms)], date=f"2026-02-0{day}T10:00:00Z") for day, ms in ((1, 1.11), (3, 3.33), (4, 4.44)))
    later["sections"]["main"]["rows"] = [without("fastkl", "missing", "no time left")]
    other = results([row("fastkl", 5.55)], name="NVIDIA H100", date="2026-02-03T23:00:00Z")
    folder = written(tmp_path, old, new, later, other, monkeypatch=monkeypatch)
    (folder / "NVIDIA H200" / "tune.json").write_text("[]", encoding="utf-8")
    write_json(folder / "NVIDIA H200" / "named-otherwise.json", old)
    assert "3.33 ms" in readme_tables.gpu_section() and "NVIDIA H200" in readme_tables.gpu_section()
    page = "\n\n".join(gpu_tables.page(gpu_tables.gpu_results(folder)))
    assert page.index("### NVIDIA H200") < page.index("### NVIDIA H100")
    assert [ms for ms in ("1.11", "3.33", "4.44", "5.55") if f"| {ms}0 | 92.0 /" in page] == ["3.33", "5.55"]
    written(folder, results([row("fastkl", 6.66)], name="NVIDIA B200", date="2026-02-04T00:00:00Z"))
    assert "6.66 ms" in readme_tables.gpu_section()


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    assert readme_tables.gpu_section().startswith("No time has been measured on a GPU yet")
    assert gpu_tables.page(gpu_tables.gpu_results(tmp_path)) == [readme_tables.gpu_section()]


@pytest.mark.parametrize("content", ['{"gpu": {"name": "NVID', "", "\xff", None])
@pytest.mark.parametrize("name", ["cpu/accuracy.json", "NVIDIA H200/broken.json"])
def test_a_broken_file_of_results_is_named(name, content, tmp_path, monkeypatch, capsys):
    """Truncated, empty, no text or not there; nothing is written."""
    folder = shutil.copytree(readme_tables.RESULTS, tmp_path / "results")
    before = (folder / "README.md").read_bytes()
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content, encoding="latin-1")
    else:
        (folder / name).symlink_to("nowhere")
    monkeypatch.setattr(readme_tables, "RESULTS", folder)
    monkeypatch.setattr(readme_tables, "write_bytes", lambda *_: pytest.fail("nothing may be written"))
    assert readme_tables.main([]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"readme_tables: error: {folder / name}: expected results in JSON, got ") and "; measure them again" in error
    assert (folder / "README.md").read_bytes() == before


# Who is ahead ---------------------------------------------------------------------------------------------------


def test_ahead_finds_who_is_faster_by_more_than_noise():
    few = Workload(rows=8)
    data = results([row("fastkl", 2.0), row("torch", 1.99, forward=0.5, backward=2.0), row("TRL", 1.0, status="wrong")],
                   peers=PEERS, sweep=[row("fastkl", 0.2, few), row("torch", 0.1, few)], linear_sweep=FULL["sections"]["linear"]["rows"])
    found = gpu_tables.ahead(data)
    assert [entry[:3] for entry in found] == [
        ("kl_divergence dp", "forward", "torch"), ("logprob", "backward", "TRL"), ("logprob", "both", "TRL"),
        *(("kl_divergence dp, 8 × 128256", phase, "torch") for phase in harness.PHASES), ("linear forward", "forward", "torch")]
    assert found[0][3] == pytest.approx(2 / 3 / 0.5) and found[-1][3] == pytest.approx(27.7 / 27.0)
    assert gpu_tables.ahead({}) == []


def test_a_limit_is_named_as_in_the_tables():
    """In backticks, whole: the name of another shape or operation that contains it does not count, nor does another section."""
    data = results(peers=PEERS)
    for text in ("`logprob` is slower than TRL's", "- `linear loss`, `logprob`"):
        assert gpu_tables.unnamed(data, f"# x\n\n## Limits\n\n{text}\n\n## Where\n") == []
    ahead = gpu_tables.ahead(data)
    assert [entry[:3] for entry in ahead] == [("logprob", "backward", "TRL"), ("logprob", "both", "TRL")]
    for text in ("logprob", "`logprob_entropy`", "`logprob, 8 × 128256`", "\n## Where things are\n`logprob`"):
        assert gpu_tables.unnamed(data, f"## Limits\n{text}\n") == ahead
    assert gpu_tables.unnamed(data, "`logprob`, without the section") == ahead


@pytest.mark.parametrize(("data", "words"), [
    (results([row("fastkl", 2.0), row("torch", 3.0)]), "Nowhere in 1 workload measured beside others is another provider faster than fastkl"),
    (results([row("fastkl", 2.0)]), "No other provider was timed beside fastkl."),
    (FULL, "fastkl is not ahead at 2 of 4 workloads measured beside others: `logprob` (backward: TRL is 1.07 × as fast, both: TRL is 1.07 × as "
           "fast); `linear forward` (forward: torch is 1.03 × as fast)."),
    (results([without("fastkl", "failed", "Error: x"), row("torch", 3.0)]), "Without a time of fastkl: `kl_divergence dp` (failed: Error: x)."),
])
def test_standing_in_words(data, words):
    assert words in gpu_tables.standing(data)


def test_going_through_logits_is_ours_too(tmp_path):
    """It is nobody's rival; where it is ahead of who is ahead of fastkl, that is said, and the limit still has to be named."""
    data = results([row("fastkl", 2.0)], linear=[linear("loss", "fastkl", 54.4), linear("loss", gpu_tables.THROUGH_LOGITS, 50.0),
                                                 linear("loss", "torch", 52.0)])
    assert gpu_tables.standing(data).endswith("`linear loss` (both: torch is 1.05 × as fast, going through logits 1.04 × as fast as that).")
    assert [entry[:3] for entry in gpu_tables.unnamed(data, "")] == [("linear loss", "both", "torch")]
    assert "| `linear loss` | 54.4 ms, 1.06 × | torch 52.0 ms, 0.96 × |" in section_of(data, tmp_path)
    assert f"| {gpu_tables.THROUGH_LOGITS} | 50.00 |" in page_of(data, tmp_path)
    slower = results(linear=[linear("loss", "fastkl", 54.4), linear("loss", gpu_tables.THROUGH_LOGITS, 53.0), linear("loss", "torch", 52.0)])
    assert "logits" not in gpu_tables.standing(slower)
    alone = results(linear=[linear("loss", "fastkl", 54.4), linear("loss", gpu_tables.THROUGH_LOGITS, 50.0)])
    assert gpu_tables.standing(alone) == "No other provider was timed beside fastkl."


def test_every_workload_of_the_suite_has_a_name_of_its_own():
    workloads = {workload.name: workload for name in ("MAIN", "PEERS", "SWEEP", "LINEAR", "LINEAR_SWEEP") for workload in getattr(gpu_suite, name)}
    names = {gpu_tables.label(workload.as_dict()) for workload in workloads.values()}
    assert len(names) == len(workloads) and {"kl_divergence dp", "kl_divergence dq", "token_stats", "logprob", "linear loss"} <= names
    assert {"kl_divergence dp, 8192 × 32000", "kl_divergence dp, fp32", "kl_divergence dp, sliced", "linear loss, 64 × 4096 × 128256"} <= names


# The page -------------------------------------------------------------------------------------------------------


def test_page_has_every_row_the_bars_and_the_tests(tmp_path):
    records = [{"dtype": "fp32", "distribution": "peaked", "target": 1e-4, "kl": 1e-4, "skipped": None, "errors": {
        "fastkl": {"rows": 16, "worst_relative": 2e-6, "median_relative": 1e-6, "negative": 0, "gradient_worst": 1e-6, "gradient_median": 1e-7},
        "torch": {"rows": 16, "worst_relative": math.nan, "median_relative": 1e-6, "negative": 1}, "peer": {"reason": "no `peer`"}}}]
    data = results([row("fastkl", 2.67, note="the same work"), row("torch", 39.9)], linear=FULL["sections"]["linear"]["rows"], accuracy=records)
    data["bars"] = [{"bar": "kl_divergence dp forward, % of copy", "limit": ">= 90", "value": 91.97, "met": True},
                    {"bar": "linear loss, peak memory in GB", "limit": "<= 3.4", "value": None, "met": False},
                    {"bar": "accuracy: cases worse", "limit": "== 0", "value": 0, "met": True}]
    data["sections"]["sweep"] = {"status": "stopped at its time limit", "seconds": 50}
    data["sections"]["tests"] = {"status": "exit code 1", "seconds": 61.0, "summary": "== 2 failed, 510 passed in 60.2s ==", "log": "x.log"}
    page = page_of(data, tmp_path)
    assert "`suite`, 2026-02-01, torch 2.11, commit 0123456789. Driver 570.1." in page and "A copy moves 4284 GB/s" in page
    assert ("| `kl_divergence dp` | fastkl | 0.8900 | 1.335 | 2.670 | 92.0 / 92.0 / 92.0 | 1.89 / 2.33 / 3.67 | 2.10 GB | 295 kB "
            "| values 1e-06, gradient 2e-03 | the same work |") in page
    assert "| `linear loss` | cuBLAS products | 51.10 | 1.06 | 640 | 52.1 | 3.10 GB | kl 4e-04, dhidden 5e-03 |  |" in page
    order = [page.index(f"| `linear {name} |") for name in ("loss` | torch.compile", "forward` | fastkl", "loss, 64 × 4096 × 128256` | fastkl")]
    assert order == sorted(order), "the rows of a workload stand together"
    assert "#### Bars: 2 of 3 met" in page and "| kl\\_divergence dp forward, % of copy | >= 90 | 91.97 | met |" in page
    assert "| linear loss, peak memory in GB | &lt;= 3.4 | – | 🔴 not met |" in page and "| accuracy: cases worse | == 0 | 0 | met |" in page
    assert "#### sweep: 🔴 stopped at its time limit, 50.0 s" in page
    assert "#### tests: 🔴 exit code 1, 61.0 s\n\n`2 failed, 510 passed in 60.2s`" in page
    assert "| 1e-4 | 2e-6 | nan (1 of 16 negative) |" in page and "Without figures: peer: no \\`peer\\`." in page


def test_page_shows_how_it_scales(tmp_path, monkeypatch):
    """Findings in words, reasons and the pictures that are there; the README has the crossover with plain torch."""
    rows = [row(name, ms * n, Workload(rows=n)) for name, ms in (("fastkl", 1.0), ("torch", 2.0)) for n in (1, 2, 4)]
    rows[0]["times"]["both"]["wall_ms"] = 9.0
    rows.append(without("torch", "failed", "OutOfMemoryError: 7.8 GiB", Workload(rows=8)))
    axes = {"tokens": {"rows": rows, **scaling.findings(rows, "tokens")}}
    data = {**{key: FULL[key] for key in ("command", "date", "commit", "versions")}, "gpu": "NVIDIA H200", "copy_gb_per_s": 4284.0,
            "workloads": {"kl_divergence": {"left_out": {"Liger JSD": "one scalar"}, "axes": axes}}}
    folder = written(tmp_path, FULL, monkeypatch=monkeypatch)
    before = readme_tables.gpu_section()
    write_json(folder / "NVIDIA H200" / "scaling.json", data)
    (folder / "NVIDIA H200" / "scaling-kl_divergence-tokens.png").write_bytes(b"")
    page = "\n\n".join(gpu_tables.page(gpu_tables.gpu_results(folder)))
    assert "#### Scaling of kl_divergence" in page and "- without Liger JSD: one scalar" in page
    assert "- fastkl beside torch on the device: faster at every size measured, 1 to 4 tokens" in page
    assert "- no figures: torch at 8 tokens: failed: OutOfMemoryError: 7.8 GiB" in page
    assert "![kl_divergence against tokens](NVIDIA H200/scaling-kl_divergence-tokens.png)" in page and "against vocabulary" not in page
    said = ("`kl_divergence` beside plain torch by number of tokens (`python3 -m benchmarks.scaling`, 2026-02-01): on the device faster at every "
            "size measured, 1 to 4 tokens; one call alone, on the clock, faster from 2 to 4 tokens, the largest measured; not at 1.")
    assert said in readme_tables.gpu_section() and said not in before


@pytest.mark.parametrize(("value", "shown"), [
    (0.02134, "0.0213"), (1.2145, "1.21"), (2.0, "2.00"), (39.96, "40.0"), (127.4, "127"), (999.6, "1000"), (12345.6, "12346"), ("nan", "–"),
    (None, "–"),
])
def test_digits(value, shown):
    assert gpu_tables.digits(value) == shown


@pytest.mark.parametrize(("value", "shown"), [(14.7e9, "14.7 GB"), (999.9e6, "1.00 GB"), (294912, "295 kB"), (12, "12 B"), (None, "–"), ("nan", "–")])
def test_amounts(value, shown):
    assert gpu_tables.amount(value) == shown
