# Limits of the compiled kernels' costs, held for every architecture without a GPU.

import json
import os
import sys
import textwrap
from pathlib import Path
from unittest import mock

import background
import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl

from benchmarks import roofline, static_costs
from benchmarks.compile_plan import Specialization, plan

ROOT = Path(__file__).resolve().parents[2]

# Limits of a pair: instructions on the near and on the general path of forward, alone and with all
# around them, and exponentials (None: no limit). At full bandwidth an H200 issues 31 while it reads
# a pair of bf16 logits, a B200 half as many, and 47 while it reads one and writes a gradient.
BF16 = ("bf16", True)
LIMITS = {
    ("kl_divergence.forward", "sm_80", *BF16): (19, 23, 22.5, 26.5, 1),
    ("kl_divergence.forward", "sm_90", *BF16): (19, 23, 22.5, 26.5, 1),
    ("kl_divergence.forward", "sm_100", *BF16): (13, 18, None, None, 1),
    ("kl_divergence.forward", "gfx942", *BF16): (37, None, None, None, 3.2),
    ("kl_divergence.forward", "sm_90", "bf16", False): (21, 25, None, None, 1),
    ("kl_divergence.forward", "sm_90", "fp32", True): (33, 37, None, None, 1),
    ("kl_divergence.forward_softcap", "sm_90", *BF16): (31, 36, None, None, 3),
    ("token_stats.forward", "sm_90", *BF16): (22, 27, 26, 31, 1),
    ("token_stats.forward", "sm_100", *BF16): (14, 20, None, None, 1),
    ("token_stats_policy_only.forward", "sm_90", *BF16): (8, 8, None, None, 1),
    # The second read of JSD: with the first, at most 45. The general path also sums p and q - p.
    ("js.forward", "sm_90", *BF16): (25.2, 57.5, None, None, 1),
    ("js.backward_p", "sm_90", *BF16): (22, 31, None, None, 1),
    ("kl_divergence.backward_p", "sm_80", *BF16): (13.7, None, None, None, 1),
    ("kl_divergence.backward_p", "sm_90", *BF16): (13.7, None, None, None, 1),
    ("kl_divergence.backward_p", "sm_100", *BF16): (12.7, None, None, None, 1),
    ("kl_divergence.backward_p", "gfx942", *BF16): (14.8, None, None, None, 1),
    ("kl_divergence.backward_q", "sm_90", *BF16): (12.7, None, None, None, 2),
    ("kl_divergence.backward_both", "sm_90", *BF16): (20.4, None, None, None, 2),
    # A tanh per logit takes two of each and a reciprocal square root, beside matrix products that
    # take twenty times as long.
    ("kl_divergence.backward_p_softcap", "sm_90", *BF16): (31, None, None, None, 4),
}
# Another Triton than the pinned one may take this much more: compilers differ by up to 4 %.
OTHER_TRITON = 1.04
IN_FLIGHT = 32  # KB of loads that hide memory's latency on an SM


# {name: folder to put before others on the path}: the installed Triton and, where it lies beside
# it, the oldest one supported.
OLDER = Path(os.environ.get("FASTKL_TRITON_36") or ROOT / ".venv" / "triton-3.6.0")
TRITONS = {"installed": None, **({"3.6": OLDER} if OLDER.is_dir() else {})}


# Kernels for sm_90 but those of a temperature ratio, some of the divergences beside the KL, and two
# of a soft cap; forward also misaligned and in float32, where its loops are others; for the other
# architectures one of each kind; of an older Triton those with limits. The command measures the
# whole plan.
COLLECT = """
import json, sys
from benchmarks import static_costs
from benchmarks.compile_plan import plan

STEPS = ("forward", "backward_p", "backward_both", "fused")
KINDS = [f"kl_divergence.{step}" for step in STEPS]
KINDS += ["token_stats.forward", "token_stats.fallback"]
FAMILY = ("js.forward", "js.backward_p", "renyi.forward", "total_variation.forward", "topk.outside")


def chosen_for_sm_90(name):
    if name.endswith("softcap"):
        return name in ("kl_divergence.forward_softcap", "kl_divergence.backward_p_softcap")
    return name in FAMILY or (name.startswith(("kl", "token")) and not name.endswith("ratio"))


limited, *architectures = sys.argv[1:]
limited = {tuple(case) for case in json.loads(limited)}
chosen = [
    case
    for case in static_costs.cases(plan, architectures)
    if (not limited or (case[0].name, *case[1:]) in limited)
    and (
        case[0].name == "kl_divergence.forward" and case[1] == "sm_90"
        or case[2:] == ("bf16", True)
        and (case[0].name in KINDS or (case[1] == "sm_90" and chosen_for_sm_90(case[0].name)))
    )
]
print(json.dumps({**static_costs.collect(chosen), "triton": static_costs.triton.__version__}))
"""


def run(folder, limited, architectures):
    paths = filter(None, [folder, ROOT, os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "ignore", "-c", COLLECT, json.dumps(limited), *architectures]
    return background.run(command, ROOT, environment)


def start_in_background():
    architectures = {"installed": static_costs.ARCHITECTURES, "3.6": ("sm_90",)}
    return {
        name: background.submit(
            run, folder, () if name == "installed" else (*LIMITS,), architectures[name]
        )
        for name, folder in TRITONS.items()
    }


# {(kernel, arch, dtype, aligned): record} of one Triton, the slack of its figures, and its
# version.
@pytest.fixture(scope="module", params=TRITONS)
def report(request):
    code, output = start_in_background()[request.param].result()
    assert code == 0, output[-4000:]
    data = json.loads(output.splitlines()[-1])
    assert not data["errors"], data["errors"]
    assert request.param == "installed" or data["triton"].startswith(request.param)
    records = {tuple(r[key] for key in static_costs.CASE): r for r in data["records"]}
    pinned = static_costs.read_baseline(static_costs.BASELINE)["triton"] == data["triton"]
    return records, 1.0 if pinned else OTHER_TRITON, data["triton"]


def test_nothing_is_worse_than_the_baseline(report):
    records, _, version = report
    baseline = static_costs.read_baseline(static_costs.BASELINE)
    if version != baseline["triton"]:
        pytest.skip("the baseline holds for another Triton")
    assert static_costs.compare(records.values(), baseline)[0] == []


def test_the_baseline_is_that_of_the_pinned_triton_and_of_every_kernel():
    baseline = static_costs.read_baseline(static_costs.BASELINE)
    assert f"triton=={baseline['triton']}" in (ROOT / "constraints.txt").read_text().splitlines()
    named = {tuple(record[key] for key in static_costs.CASE) for record in baseline["records"]}
    assert named == {(item.name, *case) for item, *case in static_costs.cases(plan)}


# Forward: near, general, and either with all around them. Backward: the one path.
@pytest.mark.parametrize("case", LIMITS, ids=str)
def test_instructions_and_exponentials_per_pair(report, case):
    records, slack, _ = report
    if case not in records:
        pytest.skip("not compiled by this Triton")
    record = records[case]
    near, general = record["instructions_per_pair"], record["instructions_per_pair_general"]
    around = record["overhead_per_pair"] or 0
    found = [near, general, near + around, (general or near) + around, record["ex2_per_pair"]]
    for value, limit in zip(found, LIMITS[case], strict=True):
        assert limit is None or value <= limit * slack, (found, LIMITS[case])
    assert not around or (general >= near and 1 < around < 8)


# No kernel spills. Forward and backward read the vocabulary, 16 bytes at a time; Q that lies
# elsewhere in its 16 bytes than P is read element by element, P still in blocks. Other kernels
# have loops, if at all, for the rare row that is read again the slow way. Forward on NVIDIA: one
# exponential on the near path, two on the general one, and loads that hide the latency.
def test_every_record(report):
    assert {case for case in LIMITS if case[1] == "sm_90"} <= report[0].keys()
    assert report[1] > 1 or LIMITS.keys() <= report[0].keys()
    for (kernel, arch, *_), record in report[0].items():
        assert record["spill_bytes"] == 0, record
        if kernel.split(".")[1].startswith(("forward", "backward")):
            assert (record["widest_load_bytes"] or 0) >= 16, record
            assert record["narrow_loads"] == 0 or kernel.endswith("q_elsewhere"), record
        if kernel in ("kl_divergence.forward", "token_stats.forward") and arch != "gfx942":
            assert (record["ex2_per_pair"], record["ex2_per_pair_general"]) == (1.0, 2.0), record
            assert record["loads_in_flight_kb_per_sm"] >= IN_FLIGHT, record


# The gate

CASE = dict(zip(static_costs.CASE, ("kl_divergence.forward", "sm_90", "bf16", True), strict=True))
VALUES = (25.0, 30.0, 2.5, 17.0, 2.0, 2.0, 128, 0, 16, 0, 1, 32.0)
COST = {**CASE, **dict(zip(static_costs.FIGURES, VALUES, strict=True))}
BASELINE = {"records": [COST]}


@pytest.mark.parametrize(
    ("field", "fine", "worse"),
    [
        ("instructions_per_pair", (20.0, 26.2), (26.3, None)),
        ("instructions_per_pair_general", (31.5,), (31.6,)),
        ("overhead_per_pair", (2.4, 2.6), (2.7, None)),
        ("ex2_per_pair", (2.1,), (2.11,)),
        ("spill_bytes", (), (4,)),
        ("narrow_loads", (), (1,)),
        ("widest_load_bytes", (32,), (8,)),
        ("registers", (255,), (None,)),
    ],
)
def test_each_figure_has_its_slack(field, fine, worse):
    for value in (*fine, *worse):
        regressions, changes = static_costs.compare([{**COST, field: value}], BASELINE)
        (said,) = regressions + changes
        assert said.startswith(f"{static_costs.case_of(COST)}: {field} {COST[field]} -> {value}")
        assert bool(regressions) == (value in worse)


def test_kernels_that_come_and_go():
    regressions, _ = static_costs.compare([COST, {**COST, "kernel": "novelty.x"}], BASELINE)
    assert regressions == ["novelty.x sm_90 bf16 aligned: not in the baseline"]
    gone = "kl_divergence.forward sm_90 bf16 aligned: in the baseline only"
    # Another element type was not asked for, and is not missed.
    for change, changes in (({"aligned": False}, [gone]), ({"dtype": "fp32"}, [])):
        assert static_costs.compare([{**COST, **change}], BASELINE)[1] == changes


def test_the_command_gates(tmp_path, monkeypatch):
    file, written = tmp_path / "baseline.json", tmp_path / "costs.json"
    found = {"records": [{**COST, "upper_bound_of_peak_bandwidth": {}}], "errors": ["x: no"]}
    collect = mock.Mock(return_value=found)
    monkeypatch.setattr(static_costs, "collect", collect)
    assert static_costs.main(["--write-baseline", str(file)]) == 1 and not file.exists()
    found["errors"] = []
    assert static_costs.main(["--write-baseline", str(file)]) == 0
    words = ["--kernel", "kl_divergence.f", "--baseline", str(file), "--json", str(written)]
    assert static_costs.main(words) == 0
    assert {case[0].name.partition("_")[0] for case in collect.call_args[0][0]} == {"kl"}
    found["records"] = [{**found["records"][0], "spill_bytes": 8}]
    assert static_costs.main(words) == 1
    (regression,) = json.loads(written.read_text())["baseline"]["regressions"]
    assert regression == "kl_divergence.forward sm_90 bf16 aligned: spill_bytes 0 -> 8"
    monkeypatch.setattr(static_costs.triton, "__version__", "0.1")
    assert static_costs.main(words) == 0


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


def test_a_segment_is_whole_tiles_and_an_edge():
    forward = next(item for item in plan("bf16", True, "sm_90") if item.name.endswith("forward"))
    # 31 tiles of 512, of which 1 and 9 anchor, and 160 entries, less than a group of 256.
    assert forward.segment == 16032 and static_costs.cut(forward) == (2, 1, 8)


# A one-warp program takes one of 32 places; warps of 72 registers fit 28 times.
@pytest.mark.parametrize(
    ("registers", "warps", "resident"),
    [(128, 1, 16), (129, 1, 12), (168, 1, 12), (72, 1, 28), (64, 1, 32), (24, 1, 32), (24, 4, 64)],
)
def test_threads_of_a_multiprocessor(registers, warps, resident):
    assert static_costs.resident_threads(registers, warps) == 32 * resident


@triton.jit
def store(x_ptr, value: tl.constexpr):
    tl.store(x_ptr, value)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler")
def test_a_kernel_that_does_not_compile_is_named_and_hashes_are_of_the_machine_code():
    def storing(value):
        signature = {"x_ptr": "*bf16", "value": "constexpr"}
        return Specialization("x.forward", store, signature, {"value": value}, {}, 4, 1, {})

    found = static_costs.collect([(storing("no number"), "sm_90", "bf16", True)])
    assert found["records"] == [] and found["errors"][0].startswith(
        "x.forward sm_90 bf16 aligned: Compil"
    )
    cases = [(1.0, "sm_90"), (1.0, "sm_90"), (2.0, "sm_90"), (1.0, "gfx942")]
    first, again, *others = (static_costs.digest(storing(x), arch) for x, arch in cases)
    assert first == again and len({first, *others}) == 3


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
    for item in plan(dtype, True, "sm_90"):
        flags, known = item.constexprs, item.name.split(".")[1].startswith(("forward", "backward"))
        asked = [flags.get(name, -1) >= 0 for name in ("REF_LOGPROB", "KL", "REF_KL")]
        written = {"grad_p_ptr": flags.get("WRT_P"), "grad_q_ptr": flags.get("WRT_Q")}
        touched = {
            "p_ptr": True,
            "q_ptr": any([flags.get("WITH_KL"), "SMALL_REST" in flags, *asked]),
        }
        touched |= written
        moved = sum(
            2 if item.signature.get(n) == "*bf16" else 4 for n, used in touched.items() if used
        )
        assert roofline.bytes_per_pair(item.name, dtype) == (moved if known else None), item.name
