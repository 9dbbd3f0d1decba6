"""What every kernel costs before it meets a GPU: instructions, exponentials, registers, spills and load width of its hot loop.

    python -m benchmarks.static_costs --json FILE     every kernel of fastkl.kernels.compile_plan: each architecture, element type and alignment
    python -m benchmarks.static_costs --baseline      the same, compared with benchmarks/static_baseline.json
    python -m benchmarks.static_costs --peers         public Triton kernels of other packages beside ours (benchmarks/peer_kernels.py)

compiles, reads the machine code back (benchmarks/disassembly.py) and prints one line each. It needs Triton and no GPU. "pair" is one vocabulary entry
of both logits tensors; facts that the tools of an architecture do not tell are null. The column "bound %" is the model of benchmarks/roofline.py: an
upper bound, in percent of the peak bandwidth of one GPU of that architecture, not a measurement.

The baseline is the gate against regressions: 5 % more instructions or exponentials per pair, more spills, more or only narrow loads, or a kernel that
the baseline lacks end with exit code 1; registers are reported. It holds for the Triton that wrote it; under another one nothing is compared.
--write-baseline renews it. Exits with 1 too, naming the kernel, where one does not compile.
"""
import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import roofline
from benchmarks.disassembly import hot_loop, parse_amdgcn, parse_amdgcn_resources, parse_resources, parse_sass, whole_costs
from benchmarks.record import output_file, provenance, write_json

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = ("bf16", "fp32")
BASELINE = Path(__file__).with_name("static_baseline.json")
# Compilers differ by 3 % from one version to the next; what a change of ours costs should be seen.
SLACK = 0.05
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class StaticCostError(RuntimeError):
    """A kernel that does not compile, or whose machine code does not read as expected."""


@dataclass(frozen=True)
class StaticCost:
    """The costs of one kernel for one architecture, element type and alignment."""

    kernel: str
    arch: str
    dtype: str
    aligned: bool
    instructions_per_pair: float | None
    ex2_per_pair: float | None
    registers: int | None
    spill_bytes: int | None
    widest_load_bytes: int | None
    narrow_loads: int | None  # loads of the hot loop that are narrower than its widest
    unrolled: int | None  # iterations of the source's loop in one of the compiled loop's
    fp32_per_pair: float | None  # additions, multiplications and fused ones in float32


def measure(specialization, arch, dtype, aligned, *, loop_free=False):
    """The StaticCost of one `Specialization` of the compile plan; loop_free: of its whole code, for a kernel whose grid covers the vocabulary."""
    case = f"{specialization.name} for {arch}, {dtype}, {'aligned' if aligned else 'misaligned'}"
    try:
        compiled = compile_kernel(specialization, arch)
    except Exception as error:  # the compiler raises what it likes; the kernel's name must not get lost
        raise StaticCostError(f"{case}: does not compile: {type(error).__name__}: {error}") from error
    program, registers, spill_bytes = read_back(compiled)
    loop = hot_loop(program)
    if loop_free and loop is not None:
        raise StaticCostError(f"{case}: expected a kernel without a loop over the vocabulary, got one with")
    if loop is None and not loop_free:
        return StaticCost(specialization.name, arch, dtype, aligned, None, None, registers, spill_bytes, None, None, None, None)
    loop = loop or whole_costs(program)
    unrolled = 1 if loop_free else unroll_factor(loop, compiled)
    if unrolled is None:
        raise StaticCostError(f"{case}: the loads of the hot loop, {loop.loads} (bytes: count), are not those of the kernel's source")
    pairs = specialization.pairs_per_thread * unrolled
    return StaticCost(
        specialization.name, arch, dtype, aligned,
        instructions_per_pair=round(loop.instructions / pairs, 2), ex2_per_pair=round(loop.ex2 / pairs, 2),
        registers=registers, spill_bytes=spill_bytes, widest_load_bytes=loop.widest_load,
        narrow_loads=sum(loop.loads.values()) - loop.loads[loop.widest_load], unrolled=unrolled,
        fp32_per_pair=round(loop.fp32 / pairs, 2),
    )


IR_LOAD = re.compile(
    r"(?:tt\.load|ttg\.async_copy_global_to_local|amdg(?:pu)?\.buffer_load\w*) .*"
    r": (?:tensor<((?:\d+x)+)(?:!tt\.ptr<)?|!tt\.ptr<)[a-z]+(\d+)"
)


def source_loop_bytes(ttgir, threads):
    """Bytes that one thread loads in one iteration of the loop over the vocabulary as it was written, read from Triton's own representation.

    Of several loops it is the one that loads most outside the loops inside it; None where no loop loads.
    """
    open_loops, depth = [], 0  # each loop that is open: [depth, bytes of its own loads, bytes with the loops inside it]
    finished = []
    for line in ttgir.splitlines():
        if "scf.for" in line or "scf.while" in line:
            open_loops.append([depth, 0, 0])
        if open_loops and (load := IR_LOAD.search(line)):
            elements = math.prod(int(n) for n in (load[1] or "").split("x") if n)
            size = math.ceil(elements / threads) * max(int(load[2]) // 8, 1)
            open_loops[-1][1] += size
            for loop in open_loops:
                loop[2] += size
        depth += line.count("{") - line.count("}")
        while open_loops and depth <= open_loops[-1][0]:
            finished.append(open_loops.pop())
    finished = [loop for loop in finished if loop[1]]
    return max(finished, key=lambda loop: loop[1])[2] if finished else None


def unroll_factor(loop, compiled):
    """How many iterations of the loop as written the compiler put into one; None where the loads do not fit together.

    Compilers unroll short loops unasked, so costs per pair need it. The bytes loaded tell: a fifth of slack allows for what a compiler may
    load in another way than by a plain load (one number for all threads, say).
    """
    threads = compiled.metadata.num_warps * (64 if "amdgcn" in compiled.asm else 32)
    written = source_loop_bytes(compiled.asm["ttgir"], threads)
    if not written:
        return None
    ratio = sum(width * count for width, count in loop.loads.items()) / written
    factor = max(round(ratio), 1)
    return factor if abs(ratio / factor - 1) <= 0.2 else None


def compile_kernel(specialization, arch):
    """Compiles for an architecture that this machine need not have. Nothing is cached: the same call does the same work."""
    if arch.startswith("sm_"):
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", arch, 64)
    source = ASTSource(
        fn=specialization.kernel, signature=specialization.signature, constexprs=specialization.constexprs, attrs=specialization.attrs
    )
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope(), triton.knobs.compilation.scope():
        triton.knobs.cache.dir = folder
        triton.knobs.compilation.always_compile = True
        return triton.compile(source, target=target, options={"num_warps": specialization.num_warps, **specialization.options})


def read_back(compiled):
    """(Program, registers, spill bytes) of a compiled kernel."""
    kernel = compiled.metadata.name
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        return parse_amdgcn(text, kernel), *parse_amdgcn_resources(text)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        sass = _tool("nvdisasm", "-c", cubin)
        resources = _tool("cuobjdump", "-res-usage", cubin)
    return parse_sass(sass, kernel), *parse_resources(resources)


def _tool(name, *arguments):
    done = subprocess.run([NVIDIA_TOOLS / name, *arguments], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise StaticCostError(f"{name} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout + done.stderr


def collect(plan, *, architectures=ARCHITECTURES, dtypes=DTYPES, alignments=(True, False), kernels=None):
    """(list of StaticCost, list of error messages) over everything that `plan(dtype, aligned, arch)` lists; `kernels` keeps only these names.

    What is the same compilation aligned and misaligned (a kernel that does not care) is measured once.
    """
    costs, errors, known = [], [], {}
    for arch in architectures:
        for dtype in dtypes:
            for aligned in alignments:
                for specialization in plan(dtype, aligned, arch):
                    if kernels and specialization.name not in kernels:
                        continue
                    key = (arch, dtype, repr(specialization))
                    try:
                        known[key] = known.get(key) or measure(specialization, arch, dtype, aligned)
                        costs.append(replace(known[key], aligned=aligned))
                    except StaticCostError as error:
                        errors.append(str(error))
    return costs, errors


COLUMNS = (
    ("kernel", "kernel", "<36"), ("arch", "arch", "<8"), ("dtype", "dtype", "<6"), ("aligned", "aligned", "<8"),
    ("instructions_per_pair", "instr/pair", ">11"), ("fp32_per_pair", "fp32/pair", ">10"), ("ex2_per_pair", "ex2/pair", ">9"),
    ("registers", "registers", ">10"), ("spill_bytes", "spill B", ">8"), ("widest_load_bytes", "load B", ">7"), ("narrow_loads", "narrow", ">7"),
    ("unrolled", "unrolled", ">9"), ("percent", "bound %", ">8"), ("limited_by", "  limited by", "<12"),
)


def record_of(cost):
    """The cost and its upper bound as one record: percent of peak bandwidth and the resource that sets it, null where there is no bound."""
    bound = roofline.upper_bound(cost)
    values = asdict(bound) if bound else {"percent": None, "limited_by": None}
    return {**asdict(cost), "upper_bound_of_peak_bandwidth": values}


def table(costs):
    """The costs as lines of text."""
    lines = ["".join(format(title, width) for _, title, width in COLUMNS)]
    for cost in costs:
        record = record_of(cost)
        values = {**record, **record["upper_bound_of_peak_bandwidth"]}
        values["limited_by"] = f"  {values['limited_by'] or '-'}"
        lines.append("".join(format("-" if values[key] is None else str(values[key]), width) for key, _, width in COLUMNS).rstrip())
    return "\n".join([*lines, f"bound %: {roofline.MODEL}; of " + ", ".join(f"{gpu.name} ({arch})" for arch, gpu in roofline.GPUS.items())])


# The baseline -------------------------------------------------------------------------------------------


# What is compared, and whether a number is worse than the baseline's.
WORSE = {
    "instructions_per_pair": lambda now, before: now > before * (1 + SLACK),
    "ex2_per_pair": lambda now, before: now > before * (1 + SLACK),
    "spill_bytes": lambda now, before: now > before,
    "narrow_loads": lambda now, before: now > before,
    "widest_load_bytes": lambda now, before: now < before,
    "registers": lambda now, before: False,
}


def case_of(record):
    """What names a record: kernel, architecture, element type, alignment."""
    return f"{record['kernel']} {record['arch']} {record['dtype']} {'aligned' if record['aligned'] else 'misaligned'}"


def read_baseline(path):
    """The baseline as write_baseline wrote it; ValueError where it is none."""
    try:
        data = json.loads(Path(path).read_text())
        {case_of(record): [record[key] for key in WORSE] for record in data["records"]}
        data["versions"]["triton"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--baseline: expected a file that --write-baseline wrote, got {path} ({type(error).__name__}: {error}); remedy: --write-baseline {path}"
        ) from None
    return data


def write_baseline(path, costs, command):
    """Writes the baseline: a record per kernel, architecture, element type and alignment, whole or not at all."""
    records = sorted(({key: asdict(cost)[key] for key in ("kernel", "arch", "dtype", "aligned", *WORSE)} for cost in costs), key=case_of)
    write_json(path, {**provenance(command), "records": records})


def compare(costs, baseline, *, kernels=None):
    """(regressions, other changes), one sentence each, of what was compiled against the baseline's records.

    Only the architectures and element types in `costs`, and of these only `kernels` if given, are expected to be there.
    """
    now = {case_of(asdict(cost)): asdict(cost) for cost in costs}
    before = {case_of(record): record for record in baseline["records"]}
    regressions = [f"{case}: not in the baseline" for case in now if case not in before]
    changes = []
    for case in (case for case in now if case in before):
        for key, worse in WORSE.items():
            new, old = now[case][key], before[case][key]
            if new == old:
                continue
            is_worse = new is None if new is None or old is None else worse(new, old)
            share = f" ({100 * (new / old - 1):+.1f} %)" if new is not None and old else ""
            (regressions if is_worse else changes).append(f"{case}: {key} {old} -> {new}{share}")
    measured = {(cost.arch, cost.dtype) for cost in costs}
    for case, record in before.items():
        if case not in now and (record["arch"], record["dtype"]) in measured and (not kernels or record["kernel"] in kernels):
            changes.append(f"{case}: in the baseline only")
    return regressions, changes


def judge(costs, path, kernels):
    """Compares with the baseline at `path` and prints every change; the record of it for the JSON."""
    baseline = read_baseline(path)
    written_by = baseline["versions"]["triton"]
    if triton.__version__ != written_by:
        print(f"baseline: holds for Triton {written_by}, this is {triton.__version__}: nothing compared")
        return {"triton": written_by, "compared": False, "regressions": [], "changes": []}
    regressions, changes = compare(costs, baseline, kernels=kernels)
    for line in changes:
        print(f"changed: {line}")
    for line in regressions:
        print(f"regression: {line}", file=sys.stderr)
    verdict = f"{len(regressions)} regressions and {len(changes)} other changes" if regressions or changes else "nothing changed"
    remedy = "; if that is as it should be, update the baseline: python -m benchmarks.static_costs --write-baseline" if regressions or changes else ""
    print(f"baseline: {len(costs)} compared, {verdict}{remedy}")
    return {"triton": written_by, "compared": True, "regressions": regressions, "changes": changes}


# The command line ---------------------------------------------------------------------------------------


def kernels_of(architectures, dtypes):
    """The names of the compile plan's kernels for these, in its order."""
    from fastkl.kernels.compile_plan import plan

    plans = (plan(dtype, aligned, arch) for arch in architectures for dtype in dtypes for aligned in (True, False))
    return list(dict.fromkeys(specialization.name for specializations in plans for specialization in specializations))


def parse(argv):
    """The arguments, checked: exits with 2 where they do not go together."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static_costs", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the records to FILE")
    parser.add_argument("--kernel", action="append", help="only this kernel (may be given again)")
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="only this architecture (may be given again)")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only this element type (may be given again)")
    mode = parser.add_mutually_exclusive_group()
    here = "benchmarks/static_baseline.json"
    mode.add_argument("--baseline", type=Path, nargs="?", const=BASELINE, metavar="FILE", help=f"compare with FILE ({here})")
    mode.add_argument("--write-baseline", type=output_file, nargs="?", const=BASELINE, metavar="FILE", help=f"write FILE ({here})")
    mode.add_argument("--peers", action="store_true", help="kernels of other packages beside ours, sm_90, aligned")
    arguments = parser.parse_args(argv)
    chosen = [name for name in ("kernel", "arch", "dtype") if getattr(arguments, name)]
    if chosen and (arguments.write_baseline or arguments.peers):
        mode = "--write-baseline" if arguments.write_baseline else "--peers"
        parser.error(f"{mode}: expected no choice, since it is whole or not at all, got --{chosen[0]}; remedy: leave --{chosen[0]} out")
    if arguments.kernel:
        known = kernels_of(arguments.arch or ARCHITECTURES, arguments.dtype or DTYPES)
        if unknown := [name for name in arguments.kernel if name not in known]:
            where = f" of --dtype {' and '.join(arguments.dtype)}" if arguments.dtype else ""
            parser.error(f"--kernel: expected one of the kernels{where}, got {', '.join(map(repr, unknown))}; choose out of {', '.join(known)}")
    if arguments.baseline:
        try:
            read_baseline(arguments.baseline)  # before minutes of compiling
        except ValueError as error:
            parser.error(str(error))
    return arguments


def main(argv=None):
    """The command line; returns the exit code."""
    arguments = parse(argv)
    command = "python -m benchmarks.static_costs " + " ".join(sys.argv[1:] if argv is None else argv)
    if arguments.peers:
        from benchmarks.peer_kernels import report

        return report(arguments.json, command)
    from fastkl.kernels.compile_plan import plan

    costs, errors = collect(
        plan, architectures=arguments.arch or ARCHITECTURES, dtypes=arguments.dtype or DTYPES, kernels=arguments.kernel
    )
    print(table(costs))
    data = {**provenance(command), "model": roofline.MODEL, "records": [record_of(cost) for cost in costs], "errors": errors}
    if arguments.baseline:
        data["baseline"] = judge(costs, arguments.baseline, arguments.kernel)
    if arguments.write_baseline and not errors:
        write_baseline(arguments.write_baseline, costs, command)
    if arguments.json:
        write_json(arguments.json, data)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return 1 if errors or (arguments.baseline and data["baseline"]["regressions"]) else 0


if __name__ == "__main__":
    # The interpreter replaces the compiler: with it set there would be nothing to read back.
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
