# Check the reading of machine code: loops, paths, loads and resources.

import pytest

pytest.importorskip("triton")

from benchmarks import disassembly

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


# LDG, LDG, MUFU, BRA, FFMA, BRA; the rare branch CALL, MUFU, BRA; the subroutine FMUL, RET. Not the
# NOP, not the loop over rows, not the edge.
HOT = disassembly.LoopCosts(instructions=11, ex2=2, loads={16: 2}, fp32=2)
# Seen in ptxas's code for sm_80: the loop is left by a call, and what follows it, here another
# load, belongs to no loop.
CALLED = """
.L_x_2:
        /*0000*/                   LDG.E.128 R4, [R4.64] ;
        /*0010*/               @P0 CALL.REL.NOINC `(.L_x_1) ;
        /*0020*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0030*/                   LDG.E.128 R4, [R4.64] ;
        /*0040*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("text", "costs"),
    [
        (SASS, HOT),
        (SASS.replace("LDG.E.U16", "LDG.E.128"), HOT),
        (SASS.replace("LDG.E.128", "LDG.E"), HOT._replace(loads={4: 2})),
        (CALLED, disassembly.LoopCosts(instructions=3, ex2=0, loads={16: 1})),
        (SASS.replace("LDG", "LDS"), None),
    ],
)
def test_sass_hot_loop(text, costs):
    assert disassembly.hot_loop(disassembly.parse_sass(text, "row"))[-1] == costs


# The edge, the hot one with its rare branch, that over rows; the padding is never reached.
def test_sass_loops_are_natural_ones():
    loops = disassembly.natural_loops(disassembly.parse_sass(SASS, "row"))
    assert sorted(len(body) for body in loops.values()) == [8, 10, 12]


WIDTHS = {
    **{"LDG.E": 4, "LDG.E.64": 8, "LDG.E.128": 16, "LDG.E.ENL2.256": 32, "LDG.E.S8": 1},
    **{"LDG.E.U16.CONSTANT": 2, "LDG.E.LTC128B.128": 16, "LDG.E.LTC128B": 4, "STG.E.128": 0},
    **{"LDGSTS.E.BYPASS.128": 16, "LDS.128": 0, "global_load_short_d16_hi": 2},
    **{"buffer_load_dwordx4": 16, "global_load_dwordx2": 8, "global_load_dword": 4},
    **{"global_load_ushort": 2, "buffer_load_sbyte": 1, "global_store_dwordx4": 0},
    **{"s_load_dwordx4": 0, "ds_read_b128": 0},
}


RESULTS = {
    **{"FFMA": 1, "FADD.FTZ": 1, "FMUL": 1, "FFMA2": 2, "FADD2": 2, "FMNMX": 0, "IMAD": 0},
    **{"MUFU.EX2": 0, "HFMA2": 0, "v_fma_f32": 1, "v_pk_mul_f32": 2, "v_fmac_f32_e32": 1},
    **{"v_max_f32_e32": 0, "v_mul_lo_u32": 0, "v_exp_f32_e32": 0},
}


@pytest.mark.parametrize(
    ("count", "opcode", "expected"),
    [(disassembly.load_width, *case) for case in WIDTHS.items()]
    + [(disassembly.fp32_results, *case) for case in RESULTS.items()],
)
def test_loads_and_float32_operations_are_told_from_the_rest(count, opcode, expected):
    assert count(opcode) == expected


def test_cuobjdump_resources():
    text = " Function row:\n  REG:39 STACK:8 SHARED:16 LOCAL:4 CONSTANT[0]:572 TEXTURE:0\n"
    assert disassembly.parse_resources(text) == (39, 12)


# Forward in small: a mask's early end, a hot loop of three paths, an edge loop, and the merge
# behind an atomic operation.
SEGMENT = """
    .section .text.row,"ax",@progbits
.text.row:
        /*0000*/               @P0 BRA `(.L_rows) ;
        /*0010*/                   EXIT ;
.L_rows:
        /*0020*/                   IADD3 R1, R1, R2, RZ ;
        /*0030*/               @P1 BRA `(.L_begin) ;
        /*0040*/                   CALL.REL.NOINC `($row$slow) ;
.L_begin:
        /*0050*/                   MOV R7, RZ ;
.L_hot:
        /*0060*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0070*/                   LDG.E.128 R12, desc[UR4][R4.64] ;
        /*0080*/                   LDG.E.64 R16, desc[UR4][R4.64+0x200] ;
        /*0090*/                   MUFU.EX2 R20, R9 ;
        /*00a0*/               @P2 BRA `(.L_general) ;
        /*00b0*/                   FFMA R6, R12, R20, R17 ;
        /*00c0*/                   BRA `(.L_next) ;
.L_general:
        /*00d0*/               @P3 BRA `(.L_anchor) ;
        /*00e0*/                   MUFU.EX2 R21, R12 ;
        /*00f0*/                   MUFU.EX2 R22, R16 ;
        /*0100*/                   BRA `(.L_next) ;
.L_anchor:
        /*0110*/                   SHFL.BFLY PT, R6, R6, 0x10, 0x1f ;
.L_next:
        /*0120*/               @P4 BRA `(.L_hot) ;
.L_edge:
        /*0170*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0180*/               @P7 BRA `(.L_more) ;
        /*0190*/                   SHFL.BFLY PT, R6, R6, 0x10, 0x1f ;
        /*01a0*/                   SHFL.BFLY PT, R6, R6, 0x10, 0x1f ;
.L_more:
        /*01b0*/               @P0 BRA `(.L_edge) ;
        /*01c0*/                   ATOMG.E.ADD R5, desc[UR4][R2.64], R5 ;
        /*01d0*/               @P1 EXIT ;
        /*01e0*/                   FADD R6, R6, R6 ;
        /*01f0*/                   FADD R6, R6, R6 ;
        /*0200*/                   EXIT ;
$row$slow:
        /*0210*/                   RET.REL.NODEC R4 `(row) ;
"""


def test_each_path_and_all_around_them():
    costs = disassembly.segment_costs(disassembly.parse_sass(SEGMENT, "row"), 3, 2, 4)
    assert costs.near == disassembly.LoopCosts(8, 1, {16: 2, 8: 1}, 1)
    assert (costs.general.instructions, costs.general.ex2) == (10, 3)
    # BRA, IADD3, BRA, MOV; three tiles that re-anchor; an edge of LDG, BRA, BRA twice; ATOMG; one
    # time in four EXIT, FADD, FADD, EXIT.
    assert costs.outside == 4 + 3 * 8 + 2 * 3 + 1 + 4 / 4 and costs.in_flight == 16 + 16 + 8
    # A load that is waited for is no longer in flight.
    text = SEGMENT.replace("R12, desc[UR4][R4.64]", "R12, desc[UR4][R8.64]")
    assert disassembly.segment_costs(disassembly.parse_sass(text, "row"), 1, 1, 1).in_flight == 24


# A loop over rows around the hot one; no loop that loads; a subroutine on every path.
@pytest.mark.parametrize(
    "text",
    [
        SASS,
        SEGMENT.replace("LDG", "LDS"),
        SEGMENT.replace("MUFU.EX2 R20, R9", "CALL.REL.NOINC `($row$slow)"),
    ],
)
def test_code_that_reads_otherwise_is_refused(text):
    with pytest.raises(ValueError, match="expected a path through a loop"):
        disassembly.segment_costs(disassembly.parse_sass(text, "row"), 1, 1, 1)


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


def test_amdgcn():
    *_, costs = disassembly.hot_loop(disassembly.parse_amdgcn(GCN, "row"))
    # Two loads, v_exp, v_pk_fma, s_cmp, s_cbranch; waits and NOPs do not count.
    assert costs == disassembly.LoopCosts(instructions=6, ex2=1, loads={16: 2}, fp32=2)
    assert disassembly.parse_amdgcn_resources(GCN) == (64, 12)
