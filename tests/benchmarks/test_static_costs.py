"""What the compiled kernels may cost, held for every architecture without a GPU; and the reading of
machine code that these limits rest on.
"""

import dataclasses
import json
import os
import re
import shutil
import sys
import tempfile
import textwrap
from pathlib import Path

import background
import pytest

pytest.importorskip("triton")

from benchmarks import static_costs, static_gate

ROOT = Path(__file__).resolve().parents[2]

# What a pair may cost with aligned bf16 input: instructions on the near and on the general path of
# forward, alone and with everything around them (None: no limit). At full bandwidth an H200 issues
# 31 instructions while it reads a pair, a B200 half as many.
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
# In the backward's loop on sm_90: (instructions, base-2 exponentials). An H200 issues 47 and 5.8
# while it reads a pair and writes a gradient.
LIMITS = {
    "kl_divergence.backward_p": (13.7, 1),
    "kl_divergence.backward_q": (12.7, 2),
    "kl_divergence.backward_both": (20.4, 2),
    # A tanh per logit takes two of each and a reciprocal square root, beside matrix products that
    # take twenty times as long.
    "kl_divergence.backward_p_softcap": (31, 4),
}
# What another Triton than the pinned one may take more: compilers differ by 3 %.
OTHER_TRITON = 1.03
# KB of loads that hide memory's latency on an SM.
IN_FLIGHT = 32


# The limits
# ----


def triton_versions():
    """The Triton that is installed and, where it lies beside it, the oldest one supported: (name,
    folder to put before others on the path).
    """
    older = Path(os.environ.get("FASTKL_TRITON_36") or ROOT / ".venv" / "triton-3.6.0")
    return [("installed", None)] + ([("3.6", older)] if older.is_dir() else [])


def architectures_of(name):
    """All for the Triton that is installed, one for the older one: compiling takes minutes."""
    return static_costs.ARCHITECTURES if name == "installed" else ("sm_90",)


def run(name, folder):
    """(exit code, output, JSON file) of `python -m benchmarks.static_costs` under one Triton: a
    process, since it needs the compiler.
    """
    file = Path(tempfile.mkdtemp()) / "costs.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if folder:
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(folder), environment.get("PYTHONPATH")])
        )
    command = [sys.executable, "-m", "benchmarks.static_costs", "--baseline", "--json", str(file)]
    command += [word for arch in architectures_of(name) for word in ("--arch", arch)]
    return *background.run(command, ROOT, environment), file


def start_in_background():
    """Every Triton's run."""
    return {
        name: background.submit(f"static costs {name}", run, name, folder)
        for name, folder in triton_versions()
    }


@pytest.fixture(scope="module", params=[name for name, _ in triton_versions()])
def report(request):
    """The JSON of one Triton's run, with its exit code and output."""
    code, output, file = start_in_background()[request.param].result()
    assert file.exists(), output[-4000:]
    data = {**json.loads(file.read_text()), "code": code, "output": output}
    shutil.rmtree(file.parent)
    assert not data["errors"], output[-4000:]
    if request.param != "installed":
        assert data["versions"]["triton"].startswith(request.param)
    return {
        **data,
        "architectures": architectures_of(request.param),
        "slack": 1.0 if request.param == "installed" else OTHER_TRITON,
    }


def case_of(record, *keys):
    """One line that names a record and some of its figures."""
    alignment = "aligned" if record["aligned"] else "misaligned"
    return f"{record['kernel']} {record['arch']} {record['dtype']} {alignment}: " + ", ".join(
        f"{key} {record[key]}" for key in keys
    )


def test_nothing_is_worse_than_the_baseline(report):
    baseline = report["baseline"]
    assert not baseline["regressions"], "\n".join(baseline["regressions"])
    assert report["code"] == 0, report["output"][-4000:]
    assert baseline["compared"] == (report["versions"]["triton"] == baseline["triton"])


def test_the_baseline_is_that_of_the_pinned_triton_and_of_every_kernel():
    from fastkl.kernels.compile_plan import plan

    baseline = static_gate.read_baseline(static_gate.BASELINE)
    pinned = re.search(r"^triton==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert baseline["versions"]["triton"] == pinned[1]
    assert baseline["command"] == "python -m benchmarks.static_costs --write-baseline"
    assert {static_gate.case_of(record) for record in baseline["records"]} == {
        static_gate.case_of({"kernel": item.name, "arch": arch, "dtype": dtype, "aligned": aligned})
        for arch in static_costs.ARCHITECTURES
        for dtype in static_costs.DTYPES
        for aligned in (True, False)
        for item in plan(dtype, aligned, arch)
    }


def test_every_kernel_is_measured_everywhere(report):
    records = report["records"]
    cases = {(r["arch"], r["dtype"], r["aligned"]) for r in records}
    assert cases == {
        (a, d, al)
        for a in report["architectures"]
        for d in static_costs.DTYPES
        for al in (True, False)
    }
    for case in cases:
        names = {r["kernel"] for r in records if (r["arch"], r["dtype"], r["aligned"]) == case}
        expected = {
            name
            for name in [*LIMITS, *(name for name, *_ in FORWARD)]
            if "softcap" not in name or case[1:] == ("bf16", True)
        }
        assert expected <= names, (case, expected - names)
    assert set(records[0]) == {
        field.name for field in dataclasses.fields(static_costs.StaticCost)
    } | {"upper_bound_of_peak_bandwidth"}


@pytest.mark.parametrize("kernel", LIMITS)
def test_instructions_and_exponentials_per_pair_of_backward(report, kernel):
    (record,) = [
        r
        for r in report["records"]
        if (r["kernel"], r["arch"], r["dtype"], r["aligned"]) == (kernel, "sm_90", "bf16", True)
    ]
    assert (
        record["instructions_per_pair"] <= LIMITS[kernel][0] * report["slack"]
        and record["ex2_per_pair"] <= LIMITS[kernel][1]
    ), record
    assert record["overhead_per_pair"] is None


def test_instructions_of_each_path_of_forward(report):
    found = {(r["kernel"], r["arch"], r["dtype"], r["aligned"]): r for r in report["records"]}
    expected = [case for case in FORWARD if case[1] in report["architectures"]]
    assert expected
    for case in expected:
        near, general, around = (
            found[case][key]
            for key in (
                "instructions_per_pair",
                "instructions_per_pair_general",
                "overhead_per_pair",
            )
        )
        over = [
            (value, limit)
            for value, limit in zip(
                (near, general, near + around, general + around), FORWARD[case], strict=True
            )
            if limit is not None and value > limit * report["slack"]
        ]
        assert not over, (case, over)
        assert general >= near and 1 < around < 8, (case, near, general, around)


def test_one_exponential_on_the_near_path_and_two_on_the_general_one(report):
    plain = [
        r
        for r in report["records"]
        if r["kernel"] in ("kl_divergence.forward", "token_stats.forward")
        and r["overhead_per_pair"] is not None
    ]
    assert plain and {(r["ex2_per_pair"], r["ex2_per_pair_general"]) for r in plain} == {(1.0, 2.0)}


def test_enough_loads_are_in_flight(report):
    both = [
        r
        for r in report["records"]
        if r["kernel"] in ("kl_divergence.forward", "token_stats.forward")
        and r["arch"].startswith("sm_")
    ]
    assert both
    few = [
        case_of(r, "registers", "loads_in_flight_kb_per_sm")
        for r in both
        if r["loads_in_flight_kb_per_sm"] < IN_FLIGHT
    ]
    assert not few, "\n".join(few)


def test_nothing_spills(report):
    spilling = [case_of(r, "spill_bytes") for r in report["records"] if r["spill_bytes"] != 0]
    assert not spilling, "\n".join(spilling)


def test_hot_loops_load_16_bytes_at_a_time(report):
    # Forward and backward read the vocabulary; other kernels have loops, if at all, for the rare
    # row that is read again the slow way.
    reading = [
        r
        for r in report["records"]
        if r["arch"].startswith("sm_")
        and r["kernel"].split(".")[1].startswith(("forward", "backward"))
    ]
    assert {r["kernel"] for r in reading} >= {*LIMITS, *(name for name, *_ in FORWARD)}
    narrow = [
        case_of(r, "widest_load_bytes", "narrow_loads")
        for r in reading
        # Q that lies elsewhere in its 16 bytes than P is read element by element, P still in
        # blocks.
        if (r["widest_load_bytes"] or 0) < 16
        or (r["narrow_loads"] != 0 and not r["kernel"].endswith("forward_q_elsewhere"))
    ]
    assert not narrow, "\n".join(narrow)


# The gate
# ----

COST = static_costs.StaticCost(
    "kl_divergence.forward",
    "sm_90",
    "bf16",
    True,
    25.0,
    2.0,
    128,
    0,
    16,
    0,
    1,
    17.0,
    30.0,
    2.0,
    2.5,
    32.0,
)
BASELINE = {
    "versions": {"triton": static_costs.triton.__version__},
    "records": [dataclasses.asdict(COST)],
}


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
    regressions, changes = static_gate.compare(
        [dataclasses.replace(COST, **{field: value})], BASELINE
    )
    assert (len(regressions), len(changes)) == ((1, 0) if worse else (0, 1))
    assert f"kl_divergence.forward sm_90 bf16 aligned: {field}" in (regressions + changes)[0]
    assert static_gate.compare([COST], BASELINE) == ([], [])


def test_kernels_that_come_and_go():
    other = dataclasses.replace(COST, kernel="novelty.forward")
    assert static_gate.compare([COST, other], BASELINE) == (
        ["novelty.forward sm_90 bf16 aligned: not in the baseline"],
        [],
    )
    regressions, changes = static_gate.compare([dataclasses.replace(COST, aligned=False)], BASELINE)
    assert len(regressions) == 1 and changes == [
        "kl_divergence.forward sm_90 bf16 aligned: in the baseline only"
    ]
    # What was not asked for is not missed: another element type, another kernel.
    assert static_gate.compare([dataclasses.replace(COST, dtype="fp32")], BASELINE)[1] == []
    assert static_gate.compare([other], BASELINE, kernels=["novelty.forward"])[1] == []


@pytest.mark.parametrize("worse", [False, True])
def test_the_command_gates(worse, tmp_path, monkeypatch, capsys):
    file, written = tmp_path / "baseline.json", tmp_path / "costs.json"
    monkeypatch.setattr(static_costs, "collect", lambda plan, **choice: ([COST], []))
    assert static_costs.main(["--write-baseline", str(file)]) == 0
    monkeypatch.setattr(
        static_costs,
        "collect",
        lambda plan, **choice: ([dataclasses.replace(COST, spill_bytes=8 * worse)], []),
    )
    assert static_costs.main(["--baseline", str(file), "--json", str(written)]) == worse
    assert (
        json.loads(written.read_text())["baseline"]["regressions"]
        == ["kl_divergence.forward sm_90 bf16 aligned: spill_bytes 0 -> 8"] * worse
    )
    assert (
        "update the baseline" if worse else "1 compared, nothing changed"
    ) in capsys.readouterr().out
    monkeypatch.setattr(static_costs.triton, "__version__", "0.1")
    assert static_costs.main(["--baseline", str(file)]) == 0
    assert "this is 0.1: nothing compared" in capsys.readouterr().out


def test_a_baseline_is_written_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    file = tmp_path / "baseline.json"
    monkeypatch.setattr(
        static_costs, "collect", lambda plan, **choice: ([COST], ["x: does not compile"])
    )
    assert static_costs.main(["--write-baseline", str(file)]) == 1
    assert not file.exists()
    for words in (
        ["--write-baseline", str(file), "--arch", "sm_90"],
        ["--baseline", str(file)],
        ["--peers", "--dtype", "bf16"],
    ):
        with pytest.raises(SystemExit) as stop:
            static_costs.main(words)
        assert stop.value.code == 2 and "remedy" in capsys.readouterr().err


def test_hashes_are_of_the_machine_code(capsys):
    """One line a case, the same again, another one for another architecture."""
    wanted = ["--hash", "--kernel", "token_stats_policy_only.backward", "--dtype", "fp32"]
    found = []
    for arch in ("sm_90", "sm_90", "gfx942"):
        assert static_costs.main([*wanted, "--arch", arch]) == 0
        found.append(capsys.readouterr().out.splitlines())
    assert found[0] == found[1] and found[0][0].split()[1:] == [
        "token_stats_policy_only.backward",
        "sm_90",
        "fp32",
        "True",
    ]
    assert found[2] and not {line.split()[0] for line in found[0]} & {
        line.split()[0] for line in found[2]
    }


def test_a_kernel_that_is_not_there_is_found_before_anything_is_compiled(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(
        static_costs, "collect", lambda plan, **choice: pytest.fail("nothing may be compiled")
    )
    for words in (
        ["bogus"],
        ["kl_divergence.fallback", "--kernel", "bogus"],
        ["kl_divergence.backward_p_to_16_bit", "--dtype", "bf16"],
    ):
        with pytest.raises(SystemExit) as stop:
            static_costs.main(["--json", str(tmp_path / "costs.json"), "--kernel", *words])
        assert stop.value.code == 2 and re.search(
            r"--kernel: expected .* choose out of kl_divergence\.forward, ", capsys.readouterr().err
        )
    assert not list(tmp_path.iterdir())


# A kernel end to end
# ----


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


@dataclasses.dataclass(frozen=True)
class Specialization:
    """The fields of fastkl.kernels.compile_plan.Specialization that a measurement reads."""

    name: str
    kernel: object
    signature: dict
    constexprs: dict
    attrs: dict
    num_warps: int = 4
    pairs_per_thread: int = 1
    segment: int = 0
    options: dict = dataclasses.field(default_factory=dict)


@pytest.mark.parametrize(
    ("registers", "warps", "threads"),
    [
        (128, 1, 16 * 32),
        (129, 1, 12 * 32),
        (168, 1, 12 * 32),
        (72, 1, 28 * 32),
        (64, 1, 32 * 32),
        (24, 1, 32 * 32),
        (24, 4, 64 * 32),
    ],
)
def test_threads_of_a_multiprocessor(registers, warps, threads):
    """A one-warp program takes one of 32 places; warps of 72 registers fit 28 times."""
    assert static_costs.resident_threads(registers, warps) == threads


def test_a_segment_is_whole_tiles_and_an_edge():
    from fastkl.kernels.compile_plan import plan

    items = {item.name: item for item in plan("bf16", True, "sm_90")}
    forward = items["kl_divergence.forward"]
    assert (forward.segment, items["kl_divergence.backward_p"].segment) == (16032, 0)
    assert static_costs.cut(forward) == (
        2,
        1,
        8,
    )  # 31 tiles of 512, of which 1 and 9 anchor, and 160 entries, less than a group of 256


def broken_specialization():
    """A kernel that cannot compile: the constexpr that it needs is not given."""
    import triton

    @triton.jit
    def nothing(x_ptr):
        missing(x_ptr)  # noqa: F821

    return Specialization("broken.forward", nothing, {"x_ptr": "*bf16"}, {}, {})


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
)
def test_a_kernel_that_does_not_compile_is_named():
    costs, errors = static_costs.collect(
        lambda dtype, aligned, arch: [broken_specialization()],
        architectures=["sm_90"],
        dtypes=["bf16"],
        alignments=[True],
    )
    assert (
        costs == []
        and len(errors) == 1
        and errors[0].startswith("broken.forward for sm_90, bf16, aligned: does not compile")
    )
