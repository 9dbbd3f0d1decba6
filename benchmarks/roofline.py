"""The largest share of a GPU's peak memory bandwidth that a kernel's hot loop can reach: an upper
bound from a model, not a measurement.

Each resource alone gives a floor for the time of a pair of logits on one multiprocessor, in clocks:

    bandwidth  bytes of the pair / (peak bytes per second / multiprocessors / clock)
    issue      instructions / issue slots per clock
    fp32       float32 additions, multiplications and fused ones / lanes per clock
    ex2        base-2 exponentials / exponentials per clock

and the bound is bandwidth / max(all four), at most 1. What the model leaves out only costs more:
latency, barriers, occupancy, cache misses, clocks below boost, every other pipe, and a memory
system that reaches about nine tenths of its peak. A bound of 100 % therefore says "issue, float32
and exponentials do not stand in the way", and one below says that no tuning of launches can help,
only fewer instructions. Where the costs tell paths apart, the bound is that of a row on the near
path, with the instructions around the loop; else a loop's count takes in every branch. Peak
bandwidth is the data sheet's. Figures relative to a copy measured on the same GPU are a different
thing: benchmarks/timing.py measures those.
"""

from dataclasses import dataclass

MODEL = "upper bound, % of peak bandwidth: a model of issue, fp32 and ex2 throughput at boost clock (benchmarks/roofline.py), not a measurement"


@dataclass(frozen=True)
class Gpu:
    """Peak rates of one GPU; issue slots, fp32 and ex2 are results of one thread, per clock and
    multiprocessor (SM or CU).
    """

    name: str
    bandwidth: float  # bytes per second
    processors: int
    clock: float  # Hz, boost
    issue: int
    fp32: int
    ex2: int


# NVIDIA: four schedulers per SM issue one warp instruction per clock each (tuning guide of each
# architecture): 4 × 32 = 128. fp32 and ex2: CUDA C++ Programming Guide, "Throughput of Native
# Arithmetic Instructions", rows "32-bit floating-point add, multiply, multiply-add" and "32-bit
# floating-point reciprocal, ..., base 2 exponential (exp2f)", columns 8.0, 9.0 and 10.0.
GPUS = {
    # Bandwidth 2039 GB/s: NVIDIA A100 data sheet (80GB SXM). 108 SMs, boost 1410 MHz: NVIDIA A100
    # Tensor Core GPU Architecture whitepaper, table 4.
    "sm_80": Gpu("A100-80GB", 2.039e12, 108, 1.41e9, issue=128, fp32=64, ex2=16),
    # Bandwidth 4.8 TB/s, 67 TFLOP/s in float32: NVIDIA H200 data sheet (SXM). 132 SMs: NVIDIA H100
    # Tensor Core GPU Architecture whitepaper (the same chip). The clock follows: 67e12 = 132 × 128
    # × 2 × 1.98 GHz.
    "sm_90": Gpu("H200", 4.8e12, 132, 1.98e9, issue=128, fp32=128, ex2=16),
    # Bandwidth 8 TB/s: NVIDIA DGX B200 data sheet (64 TB/s for eight). 75 TFLOP/s in float32:
    # NVIDIA HGX B200 specifications (600 for eight). 148 SMs as the driver reports; the clock
    # follows: 75e12 = 148 × 128 × 2 × 1.98 GHz.
    "sm_100": Gpu("B200", 8.0e12, 148, 1.98e9, issue=128, fp32=128, ex2=16),
    # Bandwidth 5.3 TB/s, 304 CUs, 2100 MHz, 163.4 TFLOP/s in float32 vectors: AMD Instinct MI300X
    # data sheet; fp32 = 163.4e12 / (304 × 2.1 GHz × 2).
    # Issue: up to five wavefront instructions per clock and CU, each of another kind (ROCm Compute
    # Profiler, "Pipeline descriptions", Scheduler): 5 × 64. ex2: transcendental instructions are
    # quarter rate (LLVM, lib/Target/AMDGPU/SISchedule.td) on four 16-wide SIMDs (CDNA3 ISA guide).
    "gfx942": Gpu("MI300X", 5.3e12, 304, 2.1e9, issue=320, fp32=128, ex2=16),
}

ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Bound:
    """The largest share of peak bandwidth, in percent, and the resource that sets it."""

    percent: float
    limited_by: str


def bytes_per_pair(kernel, dtype):
    """Bytes that one of our kernels has to move per pair of logits (per logit where it reads one
    tensor), by its name in the compile plan.

    None for what does not go over the vocabulary in the normal case: the merging of splits, and the
    rows that are read again the exact way.
    """
    case, _, step = kernel.partition(".")
    item = ITEM_BYTES[dtype]
    reads = 1 if case.endswith("policy_only") else 2
    if step.startswith("forward"):
        return reads * item
    if step.startswith("backward"):
        writes = 2 if step.startswith("backward_both") else 1
        return reads * item + writes * (2 if step.endswith("_to_16_bit") else item)
    return None


def upper_bound(cost, bytes_moved=None):
    """The Bound of a StaticCost on the GPU of its architecture; None where its loop was not counted
    or does not go over the vocabulary.

    bytes_moved: bytes per pair, for a kernel that is not one of ours.
    """
    bytes_moved = bytes_moved or bytes_per_pair(cost.kernel, cost.dtype)
    if not bytes_moved or cost.instructions_per_pair is None:
        return None
    gpu = GPUS[cost.arch]
    clocks = {
        "issue": (cost.instructions_per_pair + (cost.overhead_per_pair or 0.0)) / gpu.issue,
        "fp32": cost.fp32_per_pair / gpu.fp32,
        "ex2": cost.ex2_per_pair / gpu.ex2,
        "bandwidth": bytes_moved * gpu.processors * gpu.clock / gpu.bandwidth,
    }
    slowest = max(clocks, key=lambda name: (clocks[name], name == "bandwidth"))
    return Bound(round(100 * clocks["bandwidth"] / clocks[slowest], 1), slowest)
