"""Bound the share of peak bandwidth that a hot loop can reach: a model, not a measurement.

Each resource gives a lower bound on the clocks per pair of logits on one multiprocessor; the result
is bandwidth's bound over the largest. Latency, barriers, occupancy and cache misses only cost more:
at 100 % issue, float32 and exponentials are not the limit; below, only fewer instructions help. If
the costs distinguish paths, the bound is for the near path, with the instructions around the loop.
"""

MODEL = (
    "upper bound, % of peak bandwidth: a model of issue, fp32 and ex2 throughput at boost clock "
    "(benchmarks/roofline.py), not a measurement"
)
# Bandwidth in bytes per second, clock (boost) in Hz; issue, fp32 and ex2 in results of a thread per
# clock and multiprocessor. NVIDIA's issue: four schedulers of 32 lanes; fp32 and ex2: CUDA C++
# Programming Guide, "Throughput of Native Arithmetic Instructions".
GPUS = {
    # NVIDIA A100 data sheet (80GB SXM); A100 Tensor Core GPU Architecture whitepaper, table 4.
    "sm_80": dict(bandwidth=2.039e12, processors=108, clock=1.41e9, issue=128, fp32=64, ex2=16),
    # NVIDIA H200 data sheet (SXM); clock derived: 67 TFLOP/s = 132 × 128 × 2 × 1.98 GHz.
    "sm_90": dict(bandwidth=4.8e12, processors=132, clock=1.98e9, issue=128, fp32=128, ex2=16),
    # NVIDIA DGX and HGX B200 data sheets; 148 SMs as reported by the driver, clock derived.
    "sm_100": dict(bandwidth=8.0e12, processors=148, clock=1.98e9, issue=128, fp32=128, ex2=16),
    # AMD Instinct MI300X data sheet. Issue: five wavefront instructions per clock and CU (ROCm
    # Compute Profiler, "Pipeline descriptions"). ex2: quarter rate (LLVM, SISchedule.td).
    "gfx942": dict(bandwidth=5.3e12, processors=304, clock=2.1e9, issue=320, fp32=128, ex2=16),
}


def bytes_per_pair(kernel, dtype):
    """Return the bytes that a kernel moves per pair, or per logit of one tensor.
    kernel: its name in the compile plan. None for a kernel without a loop over the vocabulary.
    """
    case, _, step = kernel.partition(".")
    item = 4 if dtype == "fp32" else 2
    read = item if case.endswith("policy_only") else 2 * item
    written = 2 if step.endswith("_to_16_bit") else item
    if step.startswith("backward"):
        return read + written * (2 if step.startswith("backward_both") else 1)
    return read if step.startswith("forward") else None


def upper_bound(record):
    """Return {"percent" of peak bandwidth, "limited_by"}; both None if no loop was counted."""
    moved = bytes_per_pair(record["kernel"], record["dtype"])
    if not moved or record["instructions_per_pair"] is None:
        return {"percent": None, "limited_by": None}
    gpu = GPUS[record["arch"]]
    issued = record["instructions_per_pair"] + (record["overhead_per_pair"] or 0.0)
    clocks = {
        "bandwidth": moved * gpu["processors"] * gpu["clock"] / gpu["bandwidth"],
        "issue": issued / gpu["issue"],
        "fp32": record["fp32_per_pair"] / gpu["fp32"],
        "ex2": record["ex2_per_pair"] / gpu["ex2"],
    }
    slowest = max(clocks, key=clocks.get)
    return {"percent": round(100 * clocks["bandwidth"] / clocks[slowest], 1), "limited_by": slowest}
