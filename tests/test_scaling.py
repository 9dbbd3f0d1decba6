"""The scaling harness: fits, crossovers and pictures of given rows; on a CPU the sweep checks tiny shapes and reports no time."""

import gc
import io
import json
import math

import pytest
import torch
from gpu_cases import Event

from benchmarks import harness, scaling
from benchmarks.peers import NotOfferedError
from benchmarks.providers import Provider, load_providers, plain_kl_divergence
from benchmarks.workloads import Workload

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_to_release(monkeypatch):
    """The tensors are tiny: collecting garbage after each would take most of the time."""
    monkeypatch.setattr(harness.gc, "collect", lambda: 0)


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
    assert scaling.crossover([(1, 2.0), (2, 2.0), (4, 3.0), (8, 7.0)], theirs) == {"from": 4, "first": 1, "last": 8, "not_at": 2}
    assert scaling.crossover([(1, 0.5), (2, 3.0), (4, 3.0), (8, 7.0)], theirs)["from"] == 4
    assert scaling.crossover([(1, 0.5), (2, 1.0), (4, 3.0), (8, 9.0)], theirs)["from"] is None
    assert scaling.crossover([(1, 0.5), (2, 1.995), (4, 3.0), (8, 7.0)], theirs)["from"] == 4, "a difference within the noise is none"
    assert scaling.crossover([(1, 0.5), (2, 1.0)], theirs) == {"from": 1, "first": 1, "last": 2, "not_at": None}
    assert scaling.crossover([(1, 0.5)], []) is None


def test_findings():
    found = scaling.findings(ROWS, "tokens")
    assert found["faster"] == {"torch": {"time": {"from": 128, "first": 64, "last": 4096, "not_at": 64},
                                         "wall": {"from": 512, "first": 64, "last": 4096, "not_at": 256}}}
    assert found["exponents"]["fastkl"]["memory"] == pytest.approx(1.0)
    assert 0.8 < found["exponents"]["fastkl"]["time"] < 1.0
    text = scaling.sentences(found, "tokens")
    assert "fastkl beside torch on the device: faster from 128 to 4096 tokens" in text
    assert "on the clock, launches included: faster from 512 to 4096 tokens, the largest measured; not at 256" in text


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


def test_gaps_say_who_has_no_figures_where():
    """One line per provider and reason, also where only the bytes in the reason differ; rows with figures have none."""
    lost = [{**row("torch", n, 0, 0, status="failed"), "reason": f"OutOfMemoryError: Tried to allocate {n}.5 GiB\nmore"} for n in (8192, 16384)]
    late = {**row("torch", 2, 0, 0, status="missing"), "reason": scaling.NO_TIME}
    assert scaling.gaps([*ROWS, *lost, late], "tokens") == [
        "torch at 8192, 16384 tokens: failed: OutOfMemoryError: Tried to allocate 8192.5 GiB", "torch at 2 tokens: missing: no time left in this run"]


def test_picture_shows_providers_and_roofline():
    pytest.importorskip("matplotlib")
    from matplotlib import image

    picture = image.imread(io.BytesIO(scaling.picture(ROWS, "tokens", "title")), format="png")
    assert min(picture.shape[:2]) > 400 and picture.shape[1] > 1400 and picture.std() > 0.05
    colours = {tuple(int(scaling.COLOURS[name][i: i + 2], 16) for i in (1, 3, 5)) for name in ("fastkl", "torch")}
    third = picture.shape[1] // 3
    for panel in range(3):
        found = {tuple(pixel) for pixel in (255 * picture[:, panel * third: (panel + 1) * third, :3]).round().astype(int).reshape(-1, 3).tolist()}
        assert colours <= found, f"panel {panel} lacks a provider's line"
    assert scaling.picture([row("torch", 64, 1.0, 1, status="failed")], "tokens", "nothing was measured").startswith(b"\x89PNG")


# What is measured -----------------------------------------------------------------------------------------------


def test_sizes_begin_at_one_token_and_no_tensor_is_larger_than_the_limit():
    for operation in scaling.WORKLOADS:
        assert [workload.rows for workload in scaling.workloads_of(operation, "tokens")] == [2**k for k in range(16)]
        assert [workload.vocabulary for workload in scaling.workloads_of(operation, "vocabulary")][::9] == [1000, 262144]
    assert scaling.fits(Workload(rows=32768)) and not scaling.fits(Workload(rows=65536))
    assert scaling.spread(list(range(16))) == [0, 4, 8, 11, 15] and scaling.spread([1, 2]) == [1, 2]


def test_peers_are_chosen_by_operation():
    def does(*operations):
        return dict.fromkeys(operations)

    loaded = [Provider("fastkl", does("kl_divergence", "logprob")), Provider("torch.compile", does("kl_divergence")),
              Provider("TRL", does("logprob")), Provider("Liger JSD", does("kl_divergence")), Provider("gone", missing="ImportError: no gone")]
    everywhere, few, left_out = scaling.choose(loaded, "kl_divergence")
    assert ([p.name for p in everywhere], [p.name for p in few]) == (["fastkl"], ["torch.compile"])
    assert set(left_out) == {"TRL", "Liger JSD", "gone"} and left_out["TRL"] == "TRL has no kl_divergence" and "one scalar" in left_out["Liger JSD"]
    everywhere, few, left_out = scaling.choose(loaded, "logprob")
    assert ([p.name for p in everywhere], few) == (["fastkl", "TRL"], [])


def test_what_compiles_comes_last_at_a_few_sizes_and_every_step_has_its_time():
    loaded = [Provider(name, {"kl_divergence": None}) for name in ("fastkl", "torch.compile")]
    found = scaling.steps("kl_divergence", ["tokens", "vocabulary"], loaded, 100.0)
    assert [(axis, len(sizes), [p.name for p in providers], until) for axis, sizes, providers, until in found] == [
        ("tokens", 16, ["fastkl"], 30.0), ("vocabulary", 10, ["fastkl"], 60.0),
        ("tokens", 5, ["torch.compile"], 80.0), ("vocabulary", 5, ["torch.compile"], 100.0)]
    assert [step[3] for step in scaling.steps("kl_divergence", ["tokens"], loaded[:1], 100.0)] == [100.0]


def kl(inputs):
    """What a provider of kl_divergence does."""
    return plain_kl_divergence(inputs.p, inputs.q)


def tiny(*rows):
    """Workloads that the gate checks in milliseconds."""
    return [Workload(rows=n, vocabulary=50) for n in rows]


def statuses(rows):
    """[(size, provider, status)] of rows."""
    return [(row["workload"]["rows"], row["provider"], row["status"]) for row in rows]


def test_out_of_memory_and_refusals_are_rows():
    """After an out of memory only smaller sizes are tried; a refusal says nothing about other sizes."""
    asked = []

    def large(inputs):
        asked.append(len(inputs.p))
        if len(inputs.p) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.83 GiB")
        return kl(inputs)

    def even(inputs):
        if len(inputs.p) % 2:
            raise NotOfferedError("even sizes only")
        return kl(inputs)

    providers = [Provider("large", {"kl_divergence": large}), Provider("even", {"kl_divergence": even}), Provider("torch", {"kl_divergence": kl})]
    rows = list(scaling.sweep(tiny(2, 3, 4, 1), providers, CPU))
    assert [status for _, name, status in statuses(rows) if name == "large"] == ["ok", "failed", "missing", "ok"] and asked.count(4) == 0
    assert "out of memory" in rows[6]["reason"] and rows[3]["reason"].startswith("OutOfMemoryError: CUDA out of memory")
    assert [status for _, name, status in statuses(rows) if name == "even"][:3:2] == ["ok", "ok"]
    assert "even sizes only" in rows[4]["reason"] and rows[4]["status"] != "ok"
    assert {status for _, name, status in statuses(rows) if name == "torch"} == {"ok"}


def test_inputs_that_do_not_fit_are_rows(monkeypatch):
    made = harness.make_case

    def make_case(workload, *rest):
        if workload.rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return made(workload, *rest)

    monkeypatch.setattr(harness, "make_case", make_case)
    rows = list(scaling.sweep(tiny(2, 3, 4), [Provider("torch", {"kl_divergence": kl})], CPU))
    assert [status for *_, status in statuses(rows)] == ["ok", "failed", "missing"]
    assert all(row["times"] == {} and row["reason"] for row in rows[1:])


def test_quick_shortens_and_restores():
    before = harness.SECONDS_PER_PHASE, harness.REPETITIONS
    with pytest.raises(RuntimeError), scaling.quick():
        assert harness.SECONDS_PER_PHASE < before[0] and harness.REPETITIONS < before[1] and gc.get_freeze_count() > 0
        raise RuntimeError
    assert (harness.SECONDS_PER_PHASE, harness.REPETITIONS) == before and gc.get_freeze_count() == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_on_a_cpu_it_checks_and_reports_no_time(tmp_path, capsys):
    rows = list(scaling.sweep(tiny(3, 5), load_providers(CPU, ["fastkl", "torch"]), CPU))
    assert [row["status"] for row in rows] == ["ok"] * 4 and not any(row["times"] for row in rows)
    late = list(scaling.sweep(tiny(3), load_providers(CPU, ["fastkl"]), CPU, deadline=0.0))
    assert [row["reason"] for row in late] == ["no time left in this run"]
    json.dumps(rows)
    assert scaling.main(["--json", str(tmp_path / "scaling.json")]) == 2
    assert "scaling: expected a CUDA GPU, got none" in capsys.readouterr().err and not (tmp_path / "scaling.json").exists()


# As if on a GPU -------------------------------------------------------------------------------------------------


@pytest.fixture
def pretended_gpu(monkeypatch):
    """CPU tensors taken for a GPU's, tiny workloads, and three providers of which one compiles and one has no kl_divergence."""
    cuda = {"Event": Event, "synchronize": lambda: None, "_sleep": lambda cycles: None, "reset_peak_memory_stats": lambda: None,
            "memory_allocated": lambda: 5_000_000, "max_memory_allocated": lambda: 8_000_000, "empty_cache": lambda: None,
            "is_available": lambda: True, "get_device_name": lambda device: "some GPU"}
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value, raising=False)
    monkeypatch.setattr(harness, "copy_bandwidth", lambda device: {"gb_per_s": 4000.0})
    made = harness.make_case

    def make_case(workload, device, copy):
        case = made(workload, CPU, copy)
        case.device = device
        return case

    def load(device, names):
        does = {"kl_divergence": kl}
        return [Provider("fastkl", {**does, "logprob": lambda i: (i.p.float().log_softmax(-1).gather(-1, i.tokens[:, None])[:, 0],)}),
                Provider("torch.compile", does), Provider("TRL", missing="ImportError: no trl")]

    monkeypatch.setattr(harness, "make_case", make_case)
    monkeypatch.setattr(scaling, "load_providers", load)
    monkeypatch.setattr(scaling, "SIZES", {"tokens": [{"rows": n, "vocabulary": 50} for n in range(1, 8)],
                                           "vocabulary": [{"rows": 2, "vocabulary": v} for v in (10, 20)]})
    monkeypatch.setattr(scaling, "SECONDS_PER_PHASE", 0)


def test_a_whole_run_as_if_on_a_gpu(pretended_gpu, tmp_path, capsys):
    """From the command to the file and the pictures, for two workloads; and the same pictures from the file."""
    pytest.importorskip("matplotlib")
    file, plots = tmp_path / "scaling.json", tmp_path / "plots"
    assert scaling.main(["--json", str(file), "--plots", str(plots), "--workload", "kl_divergence", "--workload", "logprob"]) == 0
    data = json.loads(file.read_text())
    assert data["gpu"] == "some GPU" and list(data["workloads"]) == ["kl_divergence", "logprob"]
    assert data["workloads"]["kl_divergence"]["left_out"] == {"TRL": "ImportError: no trl"}
    found = data["workloads"]["kl_divergence"]["axes"]["tokens"]
    sizes = {name: [row["workload"]["rows"] for row in found["rows"] if row["provider"] == name] for name in ("fastkl", "torch.compile")}
    assert sizes == {"fastkl": [1, 2, 3, 4, 5, 6, 7], "torch.compile": [1, 3, 4, 5, 7]}
    assert all(row["status"] == "ok" and row["copy_gb_per_s"] == 4000.0 and math.isfinite(row["times"]["both"]["wall_ms"]) for row in found["rows"])
    assert found["exponents"]["fastkl"]["time"] is not None and found["faster"]["torch.compile"]["wall"]["last"] == 7
    names = {f"scaling-{operation}-{axis}.png" for operation in ("kl_divergence", "logprob") for axis in ("tokens", "vocabulary")}
    assert {path.name for path in plots.iterdir()} == names
    shown = capsys.readouterr().out
    assert "fastkl beside torch.compile on the clock, launches included:" in shown
    assert "logprob: without torch.compile: torch.compile has no logprob" in shown
    assert scaling.main(["--from", str(file), "--plots", str(tmp_path / "again")]) == 0
    assert {path.name for path in (tmp_path / "again").iterdir()} == names
    assert all(line in shown.splitlines() for line in capsys.readouterr().out.splitlines())


def test_a_run_without_time_says_so(pretended_gpu, tmp_path):
    assert scaling.main(["--json", str(tmp_path / "late.json"), "--seconds", "1e-9", "--axis", "tokens"]) == 0
    rows = json.loads((tmp_path / "late.json").read_text())["workloads"]["kl_divergence"]["axes"]["tokens"]["rows"]
    assert len(rows) == 7 + 5 and {row["reason"] for row in rows} == {scaling.NO_TIME}


@pytest.mark.parametrize(("arguments", "words"), [
    ([], "expected --json FILE"), (["--from", "b"], "expected --json FILE"), (["--workload", "kl"], "--workload: invalid choice: 'kl'"),
    (["--axis", "hidden"], "--axis: invalid choice: 'hidden'"), (["--json", "/proc/x"], "--json: expected a file that can be written, got '/proc/x'"),
    (["--plots", "/proc/x"], "--plots: expected a folder that can be written to, got '/proc/x'"),
    *((["--seconds", text], f"--seconds: expected a finite number of seconds above 0, got '{text}'") for text in ("-5", "0", "nan", "inf", "x")),
])
def test_wrong_use_is_found_before_the_gpu_is_looked_for(arguments, words, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("the arguments come first"))
    with pytest.raises(SystemExit) as ended:
        scaling.main([*(["--json", str(tmp_path / "a")] if arguments else []), *arguments])
    assert ended.value.code == 2 and words in capsys.readouterr().err
