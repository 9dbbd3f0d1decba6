"""Limits of the compiled kernels' costs, held for every architecture without a GPU."""

import os
import re
import shutil
import sys
import tempfile
import textwrap
from pathlib import Path
from types import SimpleNamespace

import background
import pytest

pytest.importorskip("triton")

import json

from benchmarks import roofline, static_costs, static_gate

ROOT = Path(__file__).resolve().parent.parent

# Limits of a pair: instructions on the near and on the general path of forward, alone and with all
# around them (None: no limit). At full bandwidth an H200 issues 31 while it reads a pair of bf16
# logits, a B200 half as many.
FORWARD = {
    ("kl_divergence.forward", "sm_90", "bf16", True): (19, 23, 22.5, 26.5),
    ("kl_divergence.forward", "sm_90", "bf16", False): (21, 25, None, None),
    ("kl_divergence.forward", "sm_90", "fp32", True): (33, 37, None, None),
    ("kl_divergence.forward", "sm_100", "bf16", True): (13, 18, None, None),
    ("kl_divergence.forward_softcap", "sm_90", "bf16", True): (31, 36, None, None),
    ("token_stats.forward", "sm_90", "bf16", True): (22, 27, 26, 31),
    ("token_stats.forward", "sm_100", "bf16", True): (14, 20, None, None),
    ("token_stats_policy_only.forward", "sm_90", "bf16", True): (8, 8, None, None),
}
# The loop of backward on sm_90: (instructions, base-2 exponentials). An H200 issues 47 and 5.8
# while it reads a pair and writes a gradient.
LIMITS = {
    "kl_divergence.backward_p": (13.7, 1),
    "kl_divergence.backward_q": (12.7, 2),
    "kl_divergence.backward_both": (20.4, 2),
    # A tanh per logit takes two of each and a reciprocal square root, beside matrix products that
    # take twenty times as long.
    "kl_divergence.backward_p_softcap": (31, 4),
}
# Another Triton than the pinned one may take this much more: compilers differ by 3 %.
OTHER_TRITON = 1.03
# KB of loads that hide memory's latency on an SM.
IN_FLIGHT = 32


def triton_versions():
    """{name: (folder to put before others on the path, architectures)}: the installed Triton and,
    where it lies beside it, the oldest one supported."""
    older = Path(os.environ.get("FASTKL_TRITON_36") or ROOT / ".venv" / "triton-3.6.0")
    found = {"installed": (None, static_costs.ARCHITECTURES)}
    return {**found, "3.6": (older, ("sm_90",))} if older.is_dir() else found


def run(folder, architectures):
    """(exit code, output, JSON file) of the command, in a process, since it needs the compiler."""
    file = Path(tempfile.mkdtemp()) / "costs.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if folder:
        paths = [str(folder), environment.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-m", "benchmarks.static_costs", "--baseline", "--json", str(file)]
    command += [word for arch in architectures for word in ("--arch", arch)]
    return *background.run(command, ROOT, environment), file


def start_in_background():
    return {
        name: background.submit(f"static costs {name}", run, *how)
        for name, how in triton_versions().items()
    }


@pytest.fixture(scope="module", params=triton_versions())
def report(request):
    """The JSON of one Triton's run, with its exit code and output."""
    code, output, file = start_in_background()[request.param].result()
    assert file.exists(), output[-4000:]
    data = {**json.loads(file.read_text()), "code": code, "output": output}
    shutil.rmtree(file.parent)
    assert not data["errors"], output[-4000:]
    installed = request.param == "installed"
    assert installed or data["versions"]["triton"].startswith(request.param)
    data["slack"] = 1.0 if installed else OTHER_TRITON
    return {**data, "architectures": triton_versions()[request.param][1]}


def by_case(report):
    return {(r["kernel"], r["arch"], r["dtype"], r["aligned"]): r for r in report["records"]}


def test_nothing_is_worse_than_the_baseline(report):
    baseline = report["baseline"]
    assert not baseline["regressions"], "\n".join(baseline["regressions"])
    assert report["code"] == 0, report["output"][-4000:]
    assert baseline["compared"] == (report["versions"]["triton"] == baseline["triton"])


def test_the_baseline_is_that_of_the_pinned_triton_and_of_every_kernel():
    from fastkl.kernels.compile_plan import plan

    baseline = static_gate.read_baseline(static_gate.BASELINE)
    constraints = (ROOT / "constraints.txt").read_text()
    pinned = re.search(r"^triton==(\S+)$", constraints, re.MULTILINE)
    assert baseline["versions"]["triton"] == pinned[1]
    cases = static_costs.cases(plan, static_costs.ARCHITECTURES, static_costs.DTYPES)
    names = ("arch", "dtype", "aligned")
    assert {static_gate.case_of(record) for record in baseline["records"]} == {
        static_gate.case_of({"kernel": item.name, **dict(zip(names, case, strict=True))})
        for item, *case in cases
    }


def test_every_kernel_is_measured_everywhere(report):
    found = by_case(report)
    plain = {name for name in [*LIMITS, *(name for name, *_ in FORWARD)] if "softcap" not in name}
    for arch in report["architectures"]:
        for dtype in static_costs.DTYPES:
            for aligned in (True, False):
                assert {(name, arch, dtype, aligned) for name in plain} <= set(found)
    names = ("kernel", "arch", "dtype", "aligned", *static_costs.FIGURES)
    assert set(report["records"][0]) == {*names, "upper_bound_of_peak_bandwidth"}


@pytest.mark.parametrize("kernel", LIMITS)
def test_instructions_and_exponentials_per_pair_of_backward(report, kernel):
    record = by_case(report)[kernel, "sm_90", "bf16", True]
    instructions, ex2 = LIMITS[kernel]
    assert record["instructions_per_pair"] <= instructions * report["slack"], record
    assert record["ex2_per_pair"] <= ex2 and record["overhead_per_pair"] is None, record


@pytest.mark.parametrize("case", FORWARD, ids=str)
def test_instructions_of_each_path_of_forward(report, case):
    if case[1] not in report["architectures"]:
        pytest.skip("not compiled by this Triton")
    record = by_case(report)[case]
    near, general = record["instructions_per_pair"], record["instructions_per_pair_general"]
    around = record["overhead_per_pair"]
    values = (near, general, near + around, general + around)
    for value, limit in zip(values, FORWARD[case], strict=True):
        assert limit is None or value <= limit * report["slack"], (values, FORWARD[case])
    assert general >= near and 1 < around < 8


def test_one_exponential_on_the_near_path_and_two_on_the_general_one(report):
    both = [
        r
        for r in report["records"]
        if r["kernel"] in ("kl_divergence.forward", "token_stats.forward")
        and r["overhead_per_pair"] is not None
    ]
    assert both and {(r["ex2_per_pair"], r["ex2_per_pair_general"]) for r in both} == {(1.0, 2.0)}
    few = [r for r in both if r["loads_in_flight_kb_per_sm"] < IN_FLIGHT]
    assert not few


def test_nothing_spills(report):
    assert not [r for r in report["records"] if r["spill_bytes"] != 0]


def test_hot_loops_load_16_bytes_at_a_time(report):
    """Forward and backward read the vocabulary; other kernels have loops, if at all, for the rare
    row that is read again the slow way. Q that lies elsewhere in its 16 bytes than P is read
    element by element, P still in blocks."""
    reading = [
        r
        for r in report["records"]
        if r["arch"].startswith("sm_")
        and r["kernel"].split(".")[1].startswith(("forward", "backward"))
    ]
    assert {r["kernel"] for r in reading} >= {*LIMITS, *(name for name, *_ in FORWARD)}
    for record in reading:
        assert (record["widest_load_bytes"] or 0) >= 16, record
        assert record["narrow_loads"] == 0 or record["kernel"].endswith("q_elsewhere"), record


# The gate

CASE = {"kernel": "kl_divergence.forward", "arch": "sm_90", "dtype": "bf16", "aligned": True}
VALUES = (25.0, 2.0, 128, 0, 16, 0, 1, 17.0, 30.0, 2.0, 2.5, 32.0)
COST = {**CASE, **dict(zip(static_costs.FIGURES, VALUES, strict=True))}
BASELINE = {"versions": {"triton": static_costs.triton.__version__}, "records": [COST]}


@pytest.mark.parametrize(
    ("field", "value", "worse"),
    [
        ("instructions_per_pair", 26.2, False),
        ("instructions_per_pair", 26.3, True),
        ("instructions_per_pair", None, True),
        ("instructions_per_pair", 20.0, False),
        ("ex2_per_pair", 2.1, False),
        ("ex2_per_pair", 2.11, True),
        ("spill_bytes", 4, True),
        ("narrow_loads", 1, True),
        ("widest_load_bytes", 8, True),
        ("registers", 255, False),
        ("instructions_per_pair_general", 31.6, True),
        ("overhead_per_pair", 2.6, False),
        ("overhead_per_pair", 2.7, True),
        ("overhead_per_pair", None, True),
    ],
)
def test_each_figure_has_its_slack(field, value, worse):
    regressions, changes = static_gate.compare([{**COST, field: value}], BASELINE)
    assert (len(regressions), len(changes)) == ((1, 0) if worse else (0, 1))
    assert f"kl_divergence.forward sm_90 bf16 aligned: {field}" in (regressions + changes)[0]
    assert static_gate.compare([COST], BASELINE) == ([], [])


def test_kernels_that_come_and_go():
    other = {**COST, "kernel": "novelty.forward"}
    new = "novelty.forward sm_90 bf16 aligned: not in the baseline"
    assert static_gate.compare([COST, other], BASELINE) == ([new], [])
    regressions, changes = static_gate.compare([{**COST, "aligned": False}], BASELINE)
    gone = ["kl_divergence.forward sm_90 bf16 aligned: in the baseline only"]
    assert len(regressions) == 1 and changes == gone
    # What was not asked for is not missed: another element type, another kernel.
    assert static_gate.compare([{**COST, "dtype": "fp32"}], BASELINE)[1] == []
    assert static_gate.compare([other], BASELINE, kernels=["novelty.forward"])[1] == []


@pytest.mark.parametrize("worse", [False, True])
def test_the_command_gates(worse, tmp_path, monkeypatch):
    file, written = tmp_path / "baseline.json", tmp_path / "costs.json"
    cost = {**COST, "upper_bound_of_peak_bandwidth": roofline.upper_bound(COST)}
    monkeypatch.setattr(static_costs, "collect", lambda *_: ([cost], []))
    assert static_costs.main(["--write-baseline", str(file)]) == 0
    now = {**cost, "spill_bytes": 8 * worse}
    monkeypatch.setattr(static_costs, "collect", lambda *_: ([now], []))
    assert static_costs.main(["--baseline", str(file), "--json", str(written)]) == worse
    found = json.loads(written.read_text())["baseline"]["regressions"]
    assert found == ["kl_divergence.forward sm_90 bf16 aligned: spill_bytes 0 -> 8"] * worse
    monkeypatch.setattr(static_costs.triton, "__version__", "0.1")
    assert static_costs.main(["--baseline", str(file)]) == 0


def test_a_baseline_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "baseline.json"
    monkeypatch.setattr(static_costs, "collect", lambda *_: ([COST], ["x: does not compile"]))
    assert static_costs.main(["--write-baseline", str(file)]) == 1 and not file.exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--write-baseline", "x.json", "--arch", "sm_90"], "--write-baseline: expected"),
        (["--peers", "--dtype", "bf16"], "--peers: expected"),
        (["--baseline", "nowhere.json"], "--baseline: expected"),
        (["--kernel", "bogus"], "--kernel: expected"),
        (["--dtype", "bf16", "--kernel", "kl_divergence.backward_p_to_16_bit"], "--kernel: exp"),
    ],
)
def test_wrong_use_is_found_before_anything_is_compiled(words, named, monkeypatch, capsys):
    monkeypatch.setattr(static_costs, "collect", lambda *_: pytest.fail("compiles"))
    with pytest.raises(SystemExit) as stop:
        static_costs.main(words)
    assert stop.value.code == 2 and named in capsys.readouterr().err


def test_hashes_are_of_the_machine_code(capsys):
    kernel = "token_stats_policy_only.backward"
    found = []
    for arch in ("sm_90", "sm_90", "gfx942"):
        words = ["--hash", "--kernel", kernel, "--dtype", "fp32", "--arch", arch]
        assert static_costs.main(words) == 0
        found.append([line.split() for line in capsys.readouterr().out.splitlines()])
    assert found[0] == found[1] and found[0][0][1:] == [kernel, "sm_90", "fp32", "True"]
    assert not {line[0] for line in found[0]} & {line[0] for line in found[2]}


# A kernel end to end

TTGIR = """
module attributes {"ttg.num-warps" = 4 : i32} {
    %a = scf.for %i = %c0 to %V step %c1024 iter_args(%acc = %z) -> (tensor<128xf32>)  : i32 {
      %x = tt.load %p : tensor<128x8x!tt.ptr<bf16>, #blocked> loc(#loc1)
      %y = amdg.buffer_load %q[%o] {contiguity = 8 : i32} : tensor<128x8xbf16, #blocked> loc(#loc1)
      %s = scf.if %c -> (tensor<128xf32>) {
        %again = tt.load %p : tensor<128x8x!tt.ptr<bf16>, #blocked> loc(#loc4)
        %r = scf.for %j = %c0 to %m step %c1 iter_args(%b = %acc) -> (tensor<128xf32>)  : i64 {
          %t = tt.load %u : !tt.ptr<f32> loc(#loc2)
        } loc(#loc2)
      } else {
      } loc(#loc2)
    } loc(#loc1)
    %e = tt.load %p, %mask, %other : tensor<128x64x!tt.ptr<bf16>, #blocked> loc(#loc3)
} loc(#loc)
"""


def test_bytes_of_the_loop_as_written():
    assert static_costs.source_loop_bytes(textwrap.dedent(TTGIR), threads=128) == 16 + 16 + 4
    assert static_costs.source_loop_bytes("module {\n}\n", threads=128) is None


@pytest.mark.parametrize(
    ("registers", "warps", "threads"),
    [(128, 1, 512), (129, 1, 384), (168, 1, 384), (72, 1, 896), (64, 1, 1024), (24, 4, 2048)],
)
def test_threads_of_a_multiprocessor(registers, warps, threads):
    """A one-warp program takes one of 32 places; warps of 72 registers fit 28 times."""
    assert static_costs.resident_threads(registers, warps) == threads


def test_a_segment_is_whole_tiles_and_an_edge():
    from fastkl.kernels.compile_plan import plan

    items = {item.name: item for item in plan("bf16", True, "sm_90")}
    forward = items["kl_divergence.forward"]
    # 31 tiles of 512, of which 1 and 9 anchor, and 160 entries, less than a group of 256.
    assert forward.segment == 16032 and static_costs.cut(forward) == (2, 1, 8)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler")
def test_a_kernel_that_does_not_compile_is_named():
    import triton

    @triton.jit
    def nothing(x_ptr):
        missing(x_ptr)  # noqa: F821

    fields = {"kernel": nothing, "signature": {"x_ptr": "*bf16"}, "constexprs": {}, "attrs": {}}
    broken = SimpleNamespace(name="broken.forward", num_warps=4, options={}, **fields)
    records, errors = static_costs.collect(lambda *_: [broken], ["sm_90"], ["bf16"])
    named = "broken.forward sm_90 bf16 aligned: does not compile"
    assert records == [] and errors[0].startswith(named)


# The bound: a bf16 pair of the H200's forward takes 4 bytes × 132 × 1.98 GHz / 4.8 TB/s = 0.2178
# clocks of an SM: 27.88 instructions, 3.485 exponentials. The A100's 0.2988 clocks are 19.12
# float32 operations on its 64 lanes.
@pytest.mark.parametrize(
    ("changes", "percent", "resource"),
    [
        ({"instructions_per_pair": 27.8}, 100, "bandwidth"),
        ({"instructions_per_pair": 2 * 27.878}, 50, "issue"),
        ({"instructions_per_pair": 27.878, "overhead_per_pair": 27.878}, 50, "issue"),
        ({"ex2_per_pair": 4 * 3.4848}, 25, "ex2"),
        ({"fp32_per_pair": 30}, 92.9, "fp32"),
        ({"arch": "sm_80", "fp32_per_pair": 2 * 19.12}, 50, "fp32"),
        ({"dtype": "fp32", "instructions_per_pair": 2 * 27.878}, 100, "bandwidth"),
        ({"kernel": "x.backward_p", "instructions_per_pair": 2 * 27.878}, 75, "issue"),
        ({"kernel": "x.fallback"}, None, None),
        ({"instructions_per_pair": None}, None, None),
    ],
)
def test_the_slowest_resource_bounds(changes, percent, resource):
    cost = {**COST, "overhead_per_pair": None, "fp32_per_pair": 0.0, "ex2_per_pair": 0.0}
    bound = roofline.upper_bound({**cost, **changes})
    assert bound["limited_by"] == resource
    assert bound["percent"] == (percent and pytest.approx(percent, abs=0.06))


@pytest.mark.parametrize(
    ("arch", "peak"),
    [("sm_80", 19.5e12), ("sm_90", 67e12), ("sm_100", 75e12), ("gfx942", 163.4e12)],
)
def test_rates_are_those_of_the_data_sheets(arch, peak):
    gpu = roofline.GPUS[arch]
    assert gpu["processors"] * gpu["clock"] * gpu["fp32"] * 2 == pytest.approx(peak, rel=0.005)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_bytes_are_those_that_the_kernels_move(dtype):
    from fastkl.kernels.compile_plan import plan

    sizes = {"*bf16": 2, "*fp32": 4}
    for item in plan(dtype, True, "sm_90"):
        flags, step = item.constexprs, item.name.split(".")[1]
        touched = ["p_ptr", *["grad_p_ptr"] * flags.get("WRT_P", False)]
        touched += ["grad_q_ptr"] * flags.get("WRT_Q", False)
        reads = [flags.get("WITH_KL", False)]
        reads += [flags.get(name, -1) >= 0 for name in ("REF_LOGPROB", "KL", "REF_KL")]
        moved = sum(sizes[item.signature[name]] for name in touched + ["q_ptr"] * any(reads))
        known = step.startswith(("forward", "backward"))
        assert roofline.bytes_per_pair(item.name, dtype) == (moved if known else None), item.name
