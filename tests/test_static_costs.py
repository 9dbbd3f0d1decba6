"""What the compiled kernels may cost, held for every architecture without a GPU; and the reading of machine code that these limits rest on."""
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

from benchmarks import disassembly, static_costs, static_gate

ROOT = Path(__file__).resolve().parent.parent

# What a pair may cost on sm_90 with aligned bf16 input: (instructions, base-2 exponentials). At full bandwidth an H200 issues 31 instructions and
# 3.9 exponentials while it reads a pair, 47 and 5.8 while it also writes a gradient; compilers differ by 3 %.
LIMITS = {
    "kl_divergence.forward": (28, 2.5),
    "kl_divergence.backward_p": (14, 2),
    "kl_divergence.backward_q": (13.7, 2),
    "kl_divergence.backward_both": (21.4, 2),
    "token_stats.forward": (33, 2.5),
}
# With a soft cap: a tanh per logit takes two of each and a reciprocal square root, beside matrix products that take twenty times as long.
LIMITS_WITH_SOFTCAP = {"kl_divergence.forward_softcap": (40, 4.5), "kl_divergence.backward_p_softcap": (31, 4)}


# The limits -----------------------------------------------------------------------------------------------------


def triton_versions():
    """The Triton that is installed and, where it lies beside it, the oldest one supported: (name, folder to put before others on the path)."""
    older = Path(os.environ.get("FASTKL_TRITON_36") or ROOT / ".venv" / "triton-3.6.0")
    return [("installed", None)] + ([("3.6", older)] if older.is_dir() else [])


def architectures_of(name):
    """All for the Triton that is installed; for the older one a GPU of each vendor, since compiling takes minutes."""
    return static_costs.ARCHITECTURES if name == "installed" else ("sm_90", "gfx942")


def run(name, folder):
    """(exit code, output, JSON file) of `python -m benchmarks.static_costs` under one Triton: a process, since it needs the compiler."""
    file = Path(tempfile.mkdtemp()) / "costs.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if folder:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), environment.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "benchmarks.static_costs", "--baseline", "--json", str(file)]
    command += [word for arch in architectures_of(name) for word in ("--arch", arch)]
    return *background.run(command, ROOT, environment), file


def start_in_background():
    """Every Triton's run."""
    return {name: background.submit(f"static costs {name}", run, name, folder) for name, folder in triton_versions()}


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
    return {**data, "architectures": architectures_of(request.param)}


def case_of(record, *keys):
    """One line that names a record and some of its figures."""
    alignment = "aligned" if record["aligned"] else "misaligned"
    return f"{record['kernel']} {record['arch']} {record['dtype']} {alignment}: " + ", ".join(f"{key} {record[key]}" for key in keys)


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
        for arch in static_costs.ARCHITECTURES for dtype in static_costs.DTYPES for aligned in (True, False) for item in plan(dtype, aligned, arch)
    }


def test_every_kernel_is_measured_everywhere(report):
    records = report["records"]
    cases = {(r["arch"], r["dtype"], r["aligned"]) for r in records}
    assert cases == {(a, d, al) for a in report["architectures"] for d in static_costs.DTYPES for al in (True, False)}
    for case in cases:
        names = {r["kernel"] for r in records if (r["arch"], r["dtype"], r["aligned"]) == case}
        assert set(LIMITS) <= names, (case, set(LIMITS) - names)
    assert set(records[0]) == {field.name for field in dataclasses.fields(static_costs.StaticCost)} | {"upper_bound_of_peak_bandwidth"}


@pytest.mark.parametrize("kernel", [*LIMITS, *LIMITS_WITH_SOFTCAP])
def test_instructions_and_exponentials_per_pair(report, kernel):
    records = [r for r in report["records"] if (r["kernel"], r["arch"], r["dtype"], r["aligned"]) == (kernel, "sm_90", "bf16", True)]
    assert records
    for record in records:
        instructions, ex2 = {**LIMITS, **LIMITS_WITH_SOFTCAP}[kernel]
        assert record["instructions_per_pair"] <= instructions, record
        assert record["ex2_per_pair"] <= ex2, record


def test_nothing_spills(report):
    spilling = [case_of(r, "spill_bytes") for r in report["records"] if r["spill_bytes"] != 0]
    assert not spilling, "\n".join(spilling)


def test_hot_loops_load_16_bytes_at_a_time(report):
    # Forward and backward read the vocabulary; other kernels have loops, if at all, for the rare row that is read again the slow way.
    reading = [r for r in report["records"] if r["arch"].startswith("sm_") and r["kernel"].split(".")[1].startswith(("forward", "backward"))]
    assert {r["kernel"] for r in reading} >= set(LIMITS)
    narrow = [
        case_of(r, "widest_load_bytes", "narrow_loads") for r in reading
        # Q that lies elsewhere in its 16 bytes than P is read element by element, P still in blocks.
        if (r["widest_load_bytes"] or 0) < 16 or (r["narrow_loads"] != 0 and not r["kernel"].endswith("forward_q_elsewhere"))
    ]
    assert not narrow, "\n".join(narrow)


# The gate -------------------------------------------------------------------------------------------------------

COST = static_costs.StaticCost("kl_divergence.forward", "sm_90", "bf16", True, 25.0, 2.0, 128, 0, 16, 0, 1, 17.0)
BASELINE = {"versions": {"triton": static_costs.triton.__version__}, "records": [dataclasses.asdict(COST)]}


@pytest.mark.parametrize(("field", "value", "worse"), [
    ("instructions_per_pair", 26.2, False), ("instructions_per_pair", 26.3, True), ("instructions_per_pair", None, True),
    ("instructions_per_pair", 20.0, False), ("ex2_per_pair", 2.1, False), ("ex2_per_pair", 2.11, True), ("spill_bytes", 4, True),
    ("narrow_loads", 1, True), ("widest_load_bytes", 8, True), ("registers", 255, False),
])
def test_each_figure_has_its_slack(field, value, worse):
    regressions, changes = static_gate.compare([dataclasses.replace(COST, **{field: value})], BASELINE)
    assert (len(regressions), len(changes)) == ((1, 0) if worse else (0, 1))
    assert f"kl_divergence.forward sm_90 bf16 aligned: {field}" in (regressions + changes)[0]
    assert static_gate.compare([COST], BASELINE) == ([], [])


def test_kernels_that_come_and_go():
    other = dataclasses.replace(COST, kernel="novelty.forward")
    assert static_gate.compare([COST, other], BASELINE) == (["novelty.forward sm_90 bf16 aligned: not in the baseline"], [])
    regressions, changes = static_gate.compare([dataclasses.replace(COST, aligned=False)], BASELINE)
    assert len(regressions) == 1 and changes == ["kl_divergence.forward sm_90 bf16 aligned: in the baseline only"]
    # What was not asked for is not missed: another element type, another kernel.
    assert static_gate.compare([dataclasses.replace(COST, dtype="fp32")], BASELINE)[1] == []
    assert static_gate.compare([other], BASELINE, kernels=["novelty.forward"])[1] == []


@pytest.mark.parametrize("worse", [False, True])
def test_the_command_gates(worse, tmp_path, monkeypatch, capsys):
    file, written = tmp_path / "baseline.json", tmp_path / "costs.json"
    monkeypatch.setattr(static_costs, "collect", lambda plan, **choice: ([COST], []))
    assert static_costs.main(["--write-baseline", str(file)]) == 0
    monkeypatch.setattr(static_costs, "collect", lambda plan, **choice: ([dataclasses.replace(COST, spill_bytes=8 * worse)], []))
    assert static_costs.main(["--baseline", str(file), "--json", str(written)]) == worse
    assert json.loads(written.read_text())["baseline"]["regressions"] == ["kl_divergence.forward sm_90 bf16 aligned: spill_bytes 0 -> 8"] * worse
    assert ("update the baseline" if worse else "1 compared, nothing changed") in capsys.readouterr().out
    monkeypatch.setattr(static_costs.triton, "__version__", "0.1")
    assert static_costs.main(["--baseline", str(file)]) == 0
    assert "this is 0.1: nothing compared" in capsys.readouterr().out


def test_a_baseline_is_written_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    file = tmp_path / "baseline.json"
    monkeypatch.setattr(static_costs, "collect", lambda plan, **choice: ([COST], ["x: does not compile"]))
    assert static_costs.main(["--write-baseline", str(file)]) == 1
    assert not file.exists()
    for words in (["--write-baseline", str(file), "--arch", "sm_90"], ["--baseline", str(file)], ["--peers", "--dtype", "bf16"]):
        with pytest.raises(SystemExit) as stop:
            static_costs.main(words)
        assert stop.value.code == 2 and "remedy" in capsys.readouterr().err


def test_a_kernel_that_is_not_there_is_found_before_anything_is_compiled(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(static_costs, "collect", lambda plan, **choice: pytest.fail("nothing may be compiled"))
    for words in (["bogus"], ["kl_divergence.fallback", "--kernel", "bogus"], ["kl_divergence.backward_p_to_16_bit", "--dtype", "bf16"]):
        with pytest.raises(SystemExit) as stop:
            static_costs.main(["--json", str(tmp_path / "costs.json"), "--kernel", *words])
        assert stop.value.code == 2 and re.search(r"--kernel: expected .* choose out of kl_divergence\.forward, ", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


# Reading machine code -------------------------------------------------------------------------------------------

SASS = """
    .section .text.row,"ax",@progbits
.text.row:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_9) ;
.L_x_edge:
        /*0020*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0030*/                   MUFU.EX2 R4, R4 ;
        /*0040*/                   FADD R6, R6, R4 ;
        /*0050*/                   FADD R6, R6, R4 ;
        /*0060*/                   FADD R6, R6, R4 ;
        /*0070*/                   FADD R6, R6, R4 ;
        /*0080*/                   FADD R6, R6, R4 ;
        /*0090*/               @P1 BRA `(.L_x_edge) ;
.L_x_rows:
        /*00a0*/                   MOV R7, RZ ;
.L_x_hot:
        /*00b0*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*00c0*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64] ;
        /*00d0*/                   MUFU.EX2 R4, R4 ;
        /*00e0*/               @P2 BRA `(.L_x_rare) ;
.L_x_back:
        /*00f0*/                   FFMA R6, R6, R4, R7 ;
        /*0100*/                   NOP ;
        /*0110*/                   BRA.U UP0, `(.L_x_hot) ;
        /*0120*/               @P3 BRA `(.L_x_rows) ;
.L_x_9:
        /*0130*/                   EXIT ;
.L_x_rare:
        /*0140*/                   CALL.REL.NOINC `($row$slow) ;
        /*0150*/                   MUFU.EX2.F16 R9, R9 ;
        /*0160*/                   BRA `(.L_x_back) ;
$row$slow:
        /*0170*/                   FMUL R1, R1, R1 ;
        /*0180*/                   RET.REL.NODEC R4 `(row) ;
.L_x_10:
        /*0190*/                   BRA `(.L_x_10);
        /*01a0*/                   NOP;
"""


def test_sass_hot_loop():
    costs = disassembly.hot_loop(disassembly.parse_sass(SASS, "row"))
    # LDG, LDG, MUFU, BRA, FFMA, BRA; the rare branch CALL, MUFU, BRA; the subroutine FMUL, RET. Not the NOP, not the loop over rows, not the edge.
    assert costs == disassembly.LoopCosts(instructions=11, ex2=2, loads={16: 2}, fp32=2)


def test_sass_loops_are_natural_ones():
    loops = disassembly.natural_loops(disassembly.parse_sass(SASS, "row"))
    assert sorted(len(body) for body in loops.values()) == [8, 10, 12]  # edge, hot with its rare branch, rows; the padding is never reached


def test_sass_longest_of_equally_wide_loops():
    program = disassembly.parse_sass(SASS.replace("LDG.E.U16", "LDG.E.128"), "row")
    assert disassembly.hot_loop(program).instructions == 11
    program = disassembly.parse_sass(SASS.replace("LDG.E.128", "LDG.E"), "row")
    assert disassembly.hot_loop(program).widest_load == 4


def test_sass_call_out_of_the_loop_is_a_jump():
    # Seen in ptxas's code for sm_80: the loop is left by a call, and what follows it (here another load) belongs to no loop.
    text = """
.L_x_2:
        /*0000*/                   LDG.E.128 R4, [R4.64] ;
        /*0010*/               @P0 CALL.REL.NOINC `(.L_x_1) ;
        /*0020*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0030*/                   LDG.E.128 R4, [R4.64] ;
        /*0040*/                   EXIT ;
"""
    assert disassembly.hot_loop(disassembly.parse_sass(text, "row")) == disassembly.LoopCosts(instructions=3, ex2=0, loads={16: 1})


def test_no_loads_no_hot_loop():
    assert disassembly.hot_loop(disassembly.parse_sass(SASS.replace("LDG", "LDS"), "row")) is None


@pytest.mark.parametrize(("opcode", "width"), [
    ("LDG.E", 4), ("LDG.E.64", 8), ("LDG.E.128", 16), ("LDG.E.ENL2.256", 32), ("LDG.E.U16.CONSTANT", 2), ("LDG.E.S8", 1),
    ("LDG.E.LTC128B.128", 16), ("LDG.E.LTC128B", 4), ("LDGSTS.E.BYPASS.128", 16), ("LDS.128", 0), ("STG.E.128", 0),
])
def test_sass_load_widths(opcode, width):
    assert disassembly.sass_load_width(opcode) == width


def test_cuobjdump_resources():
    text = " Function row:\n  REG:39 STACK:8 SHARED:16 LOCAL:4 CONSTANT[0]:572 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
    assert disassembly.parse_resources(text) == (39, 12)
    with pytest.raises(ValueError, match="no resource usage"):
        disassembly.parse_resources("cuobjdump fatal: no such file")


GCN = """
	.globl	row                             ; -- Begin function row
row:                                    ; @row
.Lfunc_begin0:
	s_cbranch_scc1 .LBB0_3
; %bb.1:
	v_mov_b32_e32 v1, 0
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
	buffer_load_dwordx4 v[8:11], v51, s[20:23], 0 offen
	global_load_dwordx4 v[12:15], v51, s[2:3]
	.loc	1 44 45
	s_waitcnt vmcnt(1)
	s_nop 0
	v_exp_f32_e32 v3, v3
	v_pk_fma_f32 v[2:3], v[4:5], v[6:7], v[8:9]
	s_cmp_lt_i32 s24, s27
	s_cbranch_scc1 .LBB0_2
.LBB0_3:
	global_load_ushort v1, v[2:3], off
	s_endpgm
.Lfunc_end0:
	.section	.debug_str,"MS",@progbits,1
	.amdgpu_metadata
    .private_segment_fixed_size: 0
    .sgpr_spill_count: 0
    .vgpr_count:     64
    .vgpr_spill_count: 3
"""


def test_amdgcn_hot_loop():
    costs = disassembly.hot_loop(disassembly.parse_amdgcn(GCN, "row"))
    # Two loads, v_exp, v_pk_fma, s_cmp, s_cbranch; waits and NOPs do not count.
    assert costs == disassembly.LoopCosts(instructions=6, ex2=1, loads={16: 2}, fp32=2)


def test_amdgcn_resources():
    assert disassembly.parse_amdgcn_resources(GCN) == (64, 12)
    assert disassembly.parse_amdgcn_resources("") == (None, None)


@pytest.mark.parametrize(("opcode", "width"), [
    ("buffer_load_dwordx4", 16), ("global_load_dwordx2", 8), ("global_load_dword", 4), ("global_load_ushort", 2), ("global_load_short_d16_hi", 2),
    ("buffer_load_sbyte", 1), ("global_store_dwordx4", 0), ("s_load_dwordx4", 0), ("ds_read_b128", 0),
])
def test_amdgcn_load_widths(opcode, width):
    assert disassembly.gcn_load_width(opcode) == width


TTGIR = """
module attributes {"ttg.num-warps" = 4 : i32} {
    %a = scf.for %i = %c0 to %V step %c1024 iter_args(%acc = %z) -> (tensor<128xf32>)  : i32 {
      %x = tt.load %p : tensor<128x8x!tt.ptr<bf16>, #blocked> loc(#loc1)
      %y = amdg.buffer_load %q[%o] {contiguity = 8 : i32} : tensor<128x8xbf16, #blocked> loc(#loc1)
      %s = scf.if %c -> (tensor<128xf32>) {
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


# A kernel end to end --------------------------------------------------------------------------------------------


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


def broken_specialization():
    """A kernel that cannot compile: the constexpr that it needs is not given."""
    import triton

    @triton.jit
    def nothing(x_ptr):
        missing(x_ptr)  # noqa: F821

    return Specialization("broken.forward", nothing, {"x_ptr": "*bf16"}, {}, {})


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler")
def test_a_kernel_that_does_not_compile_is_named():
    costs, errors = static_costs.collect(
        lambda dtype, aligned, arch: [broken_specialization()], architectures=["sm_90"], dtypes=["bf16"], alignments=[True]
    )
    assert costs == [] and len(errors) == 1 and errors[0].startswith("broken.forward for sm_90, bf16, aligned: does not compile")
