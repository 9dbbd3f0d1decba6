"""Count instructions, registers and loads of every kernel's hot loop, without a GPU.

    python -m benchmarks.static_costs --json FILE   every kernel of benchmarks.compile_plan
    python -m benchmarks.static_costs --baseline    compared with benchmarks/static_baseline.json
    python -m benchmarks.static_costs --hash        digests: equal where two checkouts compile alike
    ... --kernel NAME --arch sm_90 --dtype bf16     only part of the plan

compiles for each architecture, dtype and alignment, and analyses the machine code
(benchmarks/disassembly.py). It needs Triton and no GPU. "pair" is one vocabulary entry of both
logits tensors; a figure not available for an architecture is null.

A program of forward sums a segment of a row; a tile's values select one of three paths:
    instructions_per_pair          one iteration of the hot loop on the near path: all |d| < 1; the
                                   only path of a kernel with one
    instructions_per_pair_general  the general path: some |d| is larger
    overhead_per_pair              everything else that a thread executes per segment at V =
                                   128256, over its pairs in the segment: prologue, tiles reread to
                                   re-anchor, edge tiles, a row's share of the merge (rule:
                                   disassembly.segment_costs). Of equal tiles the first, the
                                   ninth, … anchor, since the weight about a centre grows eightfold
    loads_in_flight_kb_per_sm      bytes that a thread requests before it waits, times the threads
                                   of an SM at this many registers; for misaligned rows every block
                                   is requested twice, and counts twice
and ex2 for the first two. A GPU issues the first or the second figure plus the third. The backward
of the f-divergences has the first two: its cheapest and its costliest path. On other kernels, and
on AMD, whose paths are not analysed, every instruction of the loop counts, also in a branch, and
the other figures are null.

The bound is a model (benchmarks/roofline.py), not a measurement: % of the peak bandwidth of a GPU
of that architecture.

The baseline is a gate: 5 % more instructions or exponentials per pair, more spills, more or only
narrow loads, or a kernel missing from the baseline give exit code 1. It is valid for the Triton
version that wrote it; --write-baseline renews it. A kernel that does not compile is named and gives
exit code 1 too.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import disassembly, roofline
from benchmarks.record import command_line, output_file, provenance, write_json

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = ("bf16", "fp32")
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# The figures of a record; narrow loads are loads in the hot loop narrower than its widest;
# unrolled: iterations of the source loop per iteration of the compiled loop.
FIGURES = (
    *("instructions_per_pair", "instructions_per_pair_general", "overhead_per_pair"),
    *("fp32_per_pair", "ex2_per_pair", "ex2_per_pair_general", "registers", "spill_bytes"),
    *("widest_load_bytes", "narrow_loads", "unrolled", "loads_in_flight_kb_per_sm"),
)


BASELINE = Path(__file__).with_name("static_baseline.json")
SLACK = 0.05  # compilers differ by 3 % from one version to the next
CASE = ("kernel", "arch", "dtype", "aligned")
# The figures compared: relative increase over the baseline from which more is worse, inf: never.
SLACKS = {
    **dict.fromkeys(("instructions_per_pair", "instructions_per_pair_general"), SLACK),
    **dict.fromkeys(("overhead_per_pair", "ex2_per_pair"), SLACK),
    **dict.fromkeys(("spill_bytes", "narrow_loads", "widest_load_bytes"), 0.0),
    **dict.fromkeys(("registers", "fp32_per_pair"), math.inf),
}


# One kernel


def measure(specialization, arch, dtype, aligned):
    """Return the record of one `Specialization` of the compile plan: its case and its FIGURES.

    Raises an error of any type if it does not compile, and ValueError if its machine code does not
    have the expected structure.
    """
    compiled = compile_kernel(specialization, arch)
    name, text, segment, paths = compiled.metadata.name, machine_code(compiled), None, None
    if "amdgcn" in compiled.asm:
        program = disassembly.parse_amdgcn(text, name)
        registers, spill_bytes = disassembly.parse_amdgcn_resources(text)
    else:
        program = disassembly.parse_sass(text, name)
        usage = _of_cubin(compiled, "cuobjdump", "-res-usage")
        registers, spill_bytes = disassembly.parse_resources(usage)
        if specialization.segment:
            segment = disassembly.segment_costs(program, *cut(specialization))
            paths = segment.near, segment.general
        elif "SMALL_REST" in specialization.constexprs and not specialization.constexprs.get(
            "MERGE"
        ):
            paths = disassembly.loop_paths(program)
    found = dict(zip(CASE, (specialization.name, arch, dtype, aligned), strict=True))
    found |= {**dict.fromkeys(FIGURES), "registers": registers, "spill_bytes": spill_bytes}
    if loop := paths[0] if paths else disassembly.hot_loop(program)[-1]:
        found["unrolled"] = _unroll_factor(loop, compiled)
        pairs = specialization.pairs_per_thread * found["unrolled"]
        found |= {
            "instructions_per_pair": round(loop.instructions / pairs, 2),
            "ex2_per_pair": round(loop.ex2 / pairs, 2),
            "widest_load_bytes": loop.widest_load,
            "narrow_loads": sum(loop.loads.values()) - loop.loads[loop.widest_load],
            "fp32_per_pair": round(loop.fp32 / pairs, 2),
        }
    if paths:
        found |= {
            "instructions_per_pair_general": round(paths[1].instructions / pairs, 2),
            "ex2_per_pair_general": round(paths[1].ex2 / pairs, 2),
        }
    if segment:
        executed = segment.outside * 32 * specialization.num_warps
        threads = resident_threads(registers, specialization.num_warps)
        found |= {
            "overhead_per_pair": round(executed / specialization.segment, 2),
            "loads_in_flight_kb_per_sm": segment.in_flight * threads / 1024,
        }
    return found


def cut(specialization):
    """Return (re-anchored tiles per segment, passes of the loop over its edge, segments per row) of
    a kernel of forward.
    """
    from benchmarks.compile_plan import VOCABULARY
    from fastkl.kernels.row_math import REANCHOR_GROWTH

    threads, segment = 32 * specialization.num_warps, specialization.segment
    tiles, edge = divmod(segment, threads * specialization.pairs_per_thread)
    # Tiles 1, 9, 73, …: the n-th is a sum of n powers of 8.
    growth = REANCHOR_GROWTH.value
    anchors = sum(growth**n <= tiles * (growth - 1) + 1 for n in range(1, 64))
    passes = math.ceil(edge / (threads * specialization.constexprs["LANES"]))
    return anchors, passes, math.ceil(VOCABULARY / segment)


def resident_threads(registers, warps):
    """Return the threads on an SM of compute capability 8.0, 9.0 or 10.0. Each of its four quarters
    has 16384 registers, allocated to a warp 256 at a time; an SM holds 64 warps and 32 programs.
    """
    resident = 4 * (16384 // (math.ceil(32 * registers / 256) * 256))
    return 32 * warps * min(min(resident, 64) // warps, 32)


IR_LOAD = re.compile(
    r"(?:tt\.load|ttg\.async_copy_global_to_local|amdg(?:pu)?\.buffer_load\w*) (.*)"
    r": (?:tensor<((?:\d+x)+)(?:!tt\.ptr<)?|!tt\.ptr<)[a-z]+(\d+)"
)


def source_loop_bytes(ttgir, threads):
    """Return the bytes that a thread loads per iteration of the source loop over the vocabulary,
    from Triton's IR; None if no loop loads. Among several loops it is the one that loads most
    outside its inner loops. A load repeated by a loop counts once, because it stays in registers.
    """
    # Each open loop: [depth, bytes of its own loads, bytes including inner loops].
    depth, open_loops, finished, known = 0, [], [(0, 0, 0)], set()
    for line in ttgir.splitlines():
        if "scf.for" in line or "scf.while" in line:
            open_loops.append([depth, 0, 0])
        if open_loops and (load := IR_LOAD.search(line)) and load[1] not in known:
            known.add(load[1])
            elements = math.prod(int(n) for n in (load[2] or "").split("x") if n)
            size = math.ceil(elements / threads) * max(int(load[3]) // 8, 1)
            open_loops[-1][1] += size
            for loop in open_loops:
                loop[2] += size
        depth += line.count("{") - line.count("}")
        while open_loops and depth <= open_loops[-1][0]:
            finished.append(open_loops.pop())
    return max(finished, key=lambda loop: loop[1])[2] or None


def _unroll_factor(loop, compiled):
    """Return the number of source iterations per iteration of the compiled loop: compilers unroll
    short loops on their own. Inferred from the bytes loaded; a fifth of slack allows for loads
    other than plain ones (such as one number for all threads).
    """
    threads = compiled.metadata.num_warps * (64 if "amdgcn" in compiled.asm else 32)
    written = source_loop_bytes(compiled.asm["ttgir"], threads)
    ratio = loop.loaded / written if written else 0.0
    factor = max(round(ratio), 1)
    if abs(ratio / factor - 1) > 0.2:
        raise ValueError(f"loads of the hot loop, {loop.loads} (bytes: count), not the source's")
    return factor


def compile_kernel(specialization, arch):
    """Compile for any architecture, without caching; no such GPU is needed."""
    cuda, s = arch.startswith("sm_"), specialization
    target = GPUTarget("cuda", int(arch[3:]), 32) if cuda else GPUTarget("hip", arch, 64)
    source = ASTSource(s.kernel, s.signature, s.constexprs, s.attrs)
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        return triton.compile(source, target, {"num_warps": s.num_warps, **s.options})


def machine_code(compiled):
    # No data-flow analysis: half of nvdisasm's time.
    return compiled.asm.get("amdgcn") or _of_cubin(compiled, "nvdisasm", "-c", "-ndf")


def _of_cubin(compiled, tool, *arguments):
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [NVIDIA_TOOLS / tool, *arguments, cubin]
        return subprocess.check_output(command, stderr=subprocess.STDOUT, text=True, timeout=60)


def digest(specialization, arch):
    compiled = compile_kernel(specialization, arch)
    lines = machine_code(compiled).replace(compiled.metadata.name, "kernel").splitlines()
    # Strip directives and comments: AMD's name source lines and files.
    code = [line.split(";")[0].strip() for line in lines] if "amdgcn" in compiled.asm else lines
    counted = "\n".join(line for line in code if not line.startswith("."))
    return hashlib.sha256(counted.encode()).hexdigest()[:16]


# All kernels


def cases(plan, architectures=ARCHITECTURES, dtypes=DTYPES, kernel=""):
    for arch, dtype, aligned in itertools.product(architectures, dtypes, (True, False)):
        for specialization in plan(dtype, aligned, arch):
            if kernel in specialization.name:
                yield specialization, arch, dtype, aligned


def collect(chosen):
    """Return {"records", "errors": messages} of some `cases`. The same compilation aligned and
    misaligned is measured once."""
    records, errors, known = [], [], {}
    for specialization, *case in chosen:
        key = (*case[:2], repr(specialization))
        found = dict(zip(CASE, (specialization.name, *case), strict=True))
        try:
            known[key] = known.get(key) or measure(specialization, *case)
            bound = roofline.upper_bound(known[key])
            records.append({**known[key], **found, "upper_bound_of_peak_bandwidth": bound})
        except Exception as error:  # keep the other kernels
            errors.append(f"{case_of(found)}: {type(error).__name__}: {error}")
    return {"records": records, "errors": errors}


def table(records):
    rows = [{**found, **found["upper_bound_of_peak_bandwidth"]} for found in records]
    frame = pd.DataFrame(rows).filter((*CASE, *FIGURES, "percent", "limited_by"))
    frame.columns = frame.columns.str.replace("instructions_per_pair", "instr")
    return f"{frame.to_string(na_rep='-', index=False)}\npercent: {roofline.MODEL}"


# The gate against regressions: compared with benchmarks/static_baseline.json


def case_of(record):
    alignment = "aligned" if record["aligned"] else "misaligned"
    return f"{record['kernel']} {record['arch']} {record['dtype']} {alignment}"


def read_baseline(path):
    try:
        data = json.loads(Path(path).read_text())
        compare(data["records"], data)
        return {"triton": data["versions"]["triton"], "records": data["records"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise argparse.ArgumentTypeError(
            f"expected a file that --write-baseline wrote, got {path} "
            f"({type(error).__name__}: {error}); remedy: --write-baseline {path}"
        ) from None


def compare(records, baseline):
    """Return (regressions, other changes), a sentence each, against the baseline's records.
    Only the architectures and dtypes in `records` are expected.
    """
    now, before = ({case_of(r): r for r in rows} for rows in (records, baseline["records"]))
    regressions = [f"{case}: not in the baseline" for case in now if case not in before]
    measured = {(record["arch"], record["dtype"]) for record in records}
    changes = [
        f"{case}: in the baseline only"
        for case, record in before.items()
        if case not in now and (record["arch"], record["dtype"]) in measured
    ]
    for case, key in itertools.product(now.keys() & before.keys(), SLACKS):
        new, old = now[case][key], before[case][key]
        if new != old:
            worse = new is None or (old is not None and _is_worse(key, new, old))
            share = f" ({100 * (new / old - 1):+.1f} %)" if new is not None and old else ""
            (regressions if worse else changes).append(f"{case}: {key} {old} -> {new}{share}")
    return sorted(regressions), sorted(changes)


def _is_worse(key, new, old):
    return new < old if key == "widest_load_bytes" else new > old * (1 + SLACKS[key])


def judge(records, baseline):
    """Compare with a baseline, print every change, and return the comparison for the JSON."""
    here, there = triton.__version__, baseline["triton"]
    regressions, changes = compare(records, baseline) if here == there else ([], [])
    sys.stdout.writelines(f"changed: {line}\n" for line in changes)
    sys.stderr.writelines(f"regression: {line}\n" for line in regressions)
    counts = f"{len(regressions)} regressions, {len(changes)} other changes"
    verdict = counts if here == there else f"nothing compared, this is {here}"
    print(f"baseline of Triton {there}: {verdict}; --write-baseline renews it")
    return {"triton": there, "regressions": regressions, "changes": changes}


# The command


def parse(argv):
    parser = command_line("static_costs", __doc__.splitlines()[0])
    part = {"action": "append", "help": "only this one (may be given again)"}
    parser.add_argument("--arch", choices=ARCHITECTURES, **part)
    parser.add_argument("--dtype", choices=DTYPES, **part)
    parser.add_argument("--kernel", default="", metavar="NAME", help="only where NAME is in it")
    file = {"nargs": "?", "const": str(BASELINE), "metavar": "FILE"}
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--baseline", type=read_baseline, **file, help="compare with a FILE")
    mode.add_argument("--write-baseline", type=output_file, **file, help="write such a FILE")
    mode.add_argument("--hash", action="store_true", help="a digest of each kernel's machine code")
    arguments = parser.parse_args(argv)
    if arguments.write_baseline and (arguments.arch or arguments.dtype or arguments.kernel):
        parser.error("--write-baseline: expected the whole plan, got only a part; leave out which")
    return arguments


def main(argv=None):
    from benchmarks.compile_plan import plan

    arguments = parse(argv)
    data = {**provenance("static_costs", argv), "model": roofline.MODEL}
    parts = (arguments.arch or ARCHITECTURES, arguments.dtype or DTYPES, arguments.kernel)
    if not (chosen := list(cases(plan, *parts))):
        raise SystemExit(f"--kernel: expected a part of a kernel's name, got {arguments.kernel!r}")
    if arguments.hash:
        for case in chosen:
            print(digest(*case[:2]), case[0].name, *case[1:], flush=True)
        return 0
    data |= collect(chosen)
    print(table(data["records"]))
    if baseline := arguments.baseline:
        asked = [found for found in baseline["records"] if arguments.kernel in found["kernel"]]
        data["baseline"] = judge(data["records"], {**baseline, "records": asked})
    if arguments.write_baseline and not data["errors"]:
        records = sorted(data["records"], key=case_of)
        kept = [{key: found[key] for key in (*CASE, *SLACKS)} for found in records]
        write_json(arguments.write_baseline, {**provenance("static_costs", argv), "records": kept})
    write_json(arguments.json, data)
    for error in data["errors"]:
        print(f"error: {error}", file=sys.stderr)
    return 1 if data["errors"] or data.get("baseline", {}).get("regressions") else 0


if __name__ == "__main__":
    # With the interpreter there is no machine code to analyse.
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
