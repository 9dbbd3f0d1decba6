"""The upper bounds of benchmarks/roofline.py: its rates against published peaks, its arithmetic by
hand, its bytes against what the kernels do.
"""

import dataclasses

import pytest

pytest.importorskip("triton")

from benchmarks import disassembly, roofline, static_costs

# Float32 vector peaks of the vendors' data sheets, in FLOP/s: clocks, processors and lanes multiply
# to them.
PUBLISHED_FP32 = {"sm_80": 19.5e12, "sm_90": 67e12, "sm_100": 75e12, "gfx942": 163.4e12}


def cost(
    arch="sm_90", dtype="bf16", kernel="kl_divergence.forward", instructions=1.0, fp32=0.0, ex2=0.0
):
    return static_costs.StaticCost(
        kernel, arch, dtype, True, instructions, ex2, 64, 0, 16, 0, 1, fp32
    )


@pytest.mark.parametrize("arch", static_costs.ARCHITECTURES)
def test_rates_are_those_of_the_data_sheets(arch):
    gpu = roofline.GPUS[arch]
    assert gpu.processors * gpu.clock * gpu.fp32 * 2 == pytest.approx(
        PUBLISHED_FP32[arch], rel=0.005
    )
    assert gpu.issue >= gpu.fp32 > gpu.ex2
    assert set(roofline.GPUS) == set(static_costs.ARCHITECTURES)


# A bf16 pair of the H200's forward takes 4 bytes × 132 × 1.98 GHz / 4.8 TB/s = 0.2178 clocks of an
# SM: 27.88 instructions, 3.485 exponentials. The A100's 0.2988 clocks are 19.12 float32 operations
# on its 64 lanes.
@pytest.mark.parametrize(
    ("case", "percent", "resource"),
    [
        ({"instructions": 27.8}, 100, "bandwidth"),
        ({"instructions": 2 * 27.878}, 50, "issue"),
        ({"instructions": 27, "ex2": 4 * 3.4848}, 25, "ex2"),
        ({"instructions": 27, "fp32": 30}, 92.9, "fp32"),
        ({"arch": "sm_80", "instructions": 25, "fp32": 2 * 19.12}, 50, "fp32"),
        ({"arch": "sm_80", "instructions": 25, "fp32": 19.0}, 100, "bandwidth"),
        ({"dtype": "fp32", "instructions": 2 * 27.878}, 100, "bandwidth"),
        ({"kernel": "kl_divergence.backward_p", "instructions": 2 * 27.878}, 75, "issue"),
    ],
)
def test_the_slowest_resource_bounds(case, percent, resource):
    bound = roofline.upper_bound(cost(**case))
    assert (bound.percent, bound.limited_by) == (pytest.approx(percent, abs=0.06), resource)


def test_what_is_around_the_loop_is_issued_too():
    whole = dataclasses.replace(cost(instructions=27.878), overhead_per_pair=27.878)
    assert roofline.upper_bound(whole).percent == pytest.approx(50, abs=0.06)


def test_bytes_can_be_given_and_nothing_is_bounded_without_a_loop():
    assert roofline.upper_bound(cost(instructions=2 * 27.878), 6).percent == pytest.approx(
        75, abs=0.06
    )
    assert roofline.upper_bound(
        cost(kernel="peer", dtype="bf16", instructions=27.878), 2
    ).percent == pytest.approx(50, abs=0.06)
    assert roofline.upper_bound(cost(kernel="kl_divergence.fallback")) is None
    assert roofline.upper_bound(cost(instructions=None)) is None


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("aligned", [True, False])
def test_bytes_are_those_that_the_kernels_move(dtype, aligned):
    from fastkl.kernels.compile_plan import plan

    sizes = {"*bf16": 2, "*fp32": 4}
    for item in plan(dtype, aligned, "sm_90"):
        flags, step = item.constexprs, item.name.split(".")[1]
        if not step.startswith(("forward", "backward")):
            assert roofline.bytes_per_pair(item.name, dtype) is None
            continue
        reads_q = (
            flags["WITH_KL"]
            if step.startswith("forward")
            else any(flags[field] >= 0 for field in ("REF_LOGPROB", "KL", "REF_KL"))
        )
        touched = [
            "p_ptr",
            *["q_ptr"] * bool(reads_q),
            *["grad_p_ptr"] * flags.get("WRT_P", False),
            *["grad_q_ptr"] * flags.get("WRT_Q", False),
        ]
        assert roofline.bytes_per_pair(item.name, dtype) == sum(
            sizes[item.signature[name]] for name in touched
        ), item.name


def test_it_is_called_a_model_wherever_it_is_shown():
    assert (
        "upper bound, % of peak bandwidth" in roofline.MODEL
        and "not a measurement" in roofline.MODEL
    )
    text = static_costs.table([cost(instructions=2 * 27.878)])
    assert roofline.MODEL in text and text.splitlines()[1].endswith("50.0  issue")
    assert static_costs.record_of(cost(instructions=2 * 27.878))[
        "upper_bound_of_peak_bandwidth"
    ] == {"percent": 50.0, "limited_by": "issue"}
    assert static_costs.record_of(cost(kernel="x.fallback"))["upper_bound_of_peak_bandwidth"] == {
        "percent": None,
        "limited_by": None,
    }


@pytest.mark.parametrize(
    ("opcode", "count"),
    [
        ("FFMA", 1),
        ("FADD.FTZ", 1),
        ("FMUL", 1),
        ("FFMA2", 2),
        ("FADD2", 2),
        ("FMNMX", 0),
        ("IMAD", 0),
        ("MUFU.EX2", 0),
        ("HFMA2", 0),
        ("FADD.RZ", 1),
        ("v_fma_f32", 1),
        ("v_pk_mul_f32", 2),
        ("v_fmac_f32_e32", 1),
        ("v_max_f32_e32", 0),
        ("v_mul_lo_u32", 0),
        ("v_exp_f32_e32", 0),
    ],
)
def test_float32_operations_are_told_from_the_rest(opcode, count):
    assert disassembly.fp32_results(opcode) == count


def test_a_program_without_a_loop_counts_in_whole():
    text = """
        /*0000*/                   LDG.E.128 R4, [R4.64] ;
        /*0010*/                   MUFU.EX2 R4, R4 ;
        /*0020*/                   FMUL R4, R4, R4 ;
        /*0030*/                   EXIT ;
.L_x_1:
        /*0040*/                   BRA `(.L_x_1) ;
"""
    program = disassembly.parse_sass(text, "row")
    assert disassembly.hot_loop(program) is None
    assert disassembly.whole_costs(program) == disassembly.LoopCosts(
        instructions=4, ex2=1, loads={16: 1}, fp32=1
    )
