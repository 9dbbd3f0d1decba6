"""Compare the communication of split vocabularies with each rank's own work: a model of links and
memory at published peak rates, not a measurement.

    python -m benchmarks.shards

A step has TOKENS tokens on GPUS GPUs, in groups of tp: GPUS / tp replicas (data and context
parallel) divide the tokens, and each group computes its share in batches of BATCH. Links: a ring,
for all-reduces also a tree, by the formula and constants that NCCL uses to choose between them.
"""

import math

from benchmarks.record import markdown
from fastkl.kernels import config

TOKENS, GPUS, BATCH, NODE = 2**20, 64, 8192, 8
# Gemma 3 27B's vocabulary and hidden size, bfloat16; tokens of a chunk of logits.
V, H, ITEM, CHUNK = 262144, 5376, 2, 1024
# Bytes per row: a segment's state, a rank's logits of the token, a segment's part of a fallback.
STATE, AT_TOKEN, PART = 32, 8, 72
# NVIDIA H200 data sheet: bytes per second of memory, dense bfloat16 FLOP/s (half of the figure with
# sparsity), bytes per second of NVLink 4 in one direction (half of 900 GB/s).
MEMORY, FLOPS, NVLINK = 4.8e12, 989e12, 450e9
# Eight adapters of 400 Gb/s per node: NVIDIA DGX BasePOD reference architecture, DGX H200.
NETWORK = 8 * 50e9
# For LL, LL128 and Simple: µs per launch, per step over NVLink and over the network; share of the
# bandwidth, and its limit in bytes per second for one node, two, and more. NCCL 2.30.7,
# src/graph/tuning.cc (Hopper, Intel CPUs).
LL, FREE = (141e9, 39e9, 20.4e9), (math.inf,) * 3
RING = ((6.6, 0.6, 2.7, 0.5, LL), (14.0, 1.9, 4.0, 0.92, FREE), (8.4, 3.4, 14.0, 1.0, FREE))
TREE = ((6.8, 0.6, 5.0, 0.24, LL), (14.0, 1.25, 8.5, 0.72, FREE), (8.4, 4.0, 14.0, 0.92, FREE))


def collective(size, tp, reduces=False):
    """Return the seconds of an all-gather of `size` bytes in total, or of an all-reduce of `size`,
    which goes twice around the ring, or up and down the tree.
    """
    nodes, found = -(-tp // NODE), []
    link, kind = NVLINK if nodes == 1 else NETWORK, min(nodes, 3) - 1
    # In a ring across nodes, each step takes at least 1 µs, the network's CPU overhead.
    ring = RING, tp - nodes, nodes - 1, float(nodes > 1), size * (tp - 1) / tp
    tree = TREE, tp // nodes - 1, math.log2(nodes), 0.0, size
    for protocols, steps, hops, least, moved in [ring, tree] if reduces else [ring]:
        for launch, step, hop, share, limits in protocols:
            waits = (steps * max(step, least) + hops * hop) * 1e-6
            once = waits + moved / min(link * share, limits[kind])
            found.append(launch * 1e-6 + (1 + reduces) * once)
    return min(found)


def gathered(rows, tp):
    """Return the bytes, over all ranks, of each of the two gathers for rows of logits."""
    segment = config.segment_length(V, config.select("forward", "sm_90", ITEM, V).segment, V // tp)
    per_segment = rows * tp * -(-V // tp // segment)
    return [per_segment * STATE + rows * tp * AT_TOKEN, per_segment * PART]


def cell(size, seconds, tp, rounds=1):
    """Format the bytes of `size` that a rank receives, and milliseconds."""
    received, ms = rounds * size * (tp - 1) / tp / 1e6, 1e3 * rounds * seconds
    return f"{received:,.{int(received < 10)}f} MB, {ms:.{1 + (ms < 1)}f} ms"


def logits(tp):
    """Return a row of the table of logits: P and Q, forward, all batches of a step."""
    batches, parts, whole = TOKENS * tp // GPUS // BATCH, gathered(BATCH, tp), 2 * BATCH * V * ITEM
    read, ours = whole / tp / MEMORY, sum(collective(size, tp) for size in parts)
    sums = 3 * collective(4 * BATCH, tp, reduces=True)
    return [
        f"{tp} | {batches} | {1e3 * batches * read:.1f} ms",
        cell(sum(parts), ours, tp, batches),
        f"{ours / read:.0%}",
        cell(3 * 2 * 4 * BATCH, sums, tp, batches),
        cell(whole, collective(whole, tp), tp, batches),
    ]


def hidden(tp):
    """Return a row of the table of hidden states: two models, one trained, one batch."""
    chunks, parts, states = BATCH // CHUNK, gathered(CHUNK, tp), BATCH * H * ITEM
    products = 4 * 2 * BATCH * H * V / tp / FLOPS
    ours = chunks * sum(collective(size, tp) for size in parts)
    return [
        f"{tp} | {1e3 * products:.1f} ms",
        cell(chunks * sum(parts), ours, tp),
        f"{ours / products:.0%}",
        cell(2 * states, collective(states, tp, reduces=True), tp),
        cell(2 * states, 2 * collective(states, tp), tp),
    ]


if __name__ == "__main__":
    groups, ours = [2**i for i in range(1, 7)], ["states and parts", "of that"]
    head = ["tp", "batches", "read of own columns", *ours, "three all-reduces", "all logits"]
    print(markdown(head, map(logits, groups)), end="\n\n")
    head = ["tp", "four products", *ours, "sum of dH", "parts of a sequence"]
    print(markdown(head, map(hidden, groups)))
