"""What every kernel costs before it meets a GPU: instructions, exponentials, registers, spills and
load width of its hot loop.

    python -m benchmarks.static_costs --json FILE     every kernel of fastkl.kernels.compile_plan: each architecture, element type and alignment
    python -m benchmarks.static_costs --baseline      the same, compared with benchmarks/static_baseline.json
    python -m benchmarks.static_costs --peers         public Triton kernels of other packages beside ours (benchmarks/peer_kernels.py)
    python -m benchmarks.static_costs --hash          a digest of each kernel's machine code: equal where two checkouts compile to the same

compiles, reads the machine code back (benchmarks/disassembly.py) and prints one line each. It needs
Triton and no GPU. "pair" is one vocabulary entry of both logits tensors; facts that the tools of an
architecture do not tell are null. The column "bound %" is the model of benchmarks/roofline.py: an
upper bound, in percent of the peak bandwidth of one GPU of that architecture, not a measurement.

A program of forward sums a segment of a row, and each tile takes one of three paths, by its values.
Of these kernels the table says, per pair,
    instructions_per_pair          the near path once through the hot loop: all |d| < 1; of a kernel with one path, that one
    instructions_per_pair_general  the general path: some |d| is larger
    overhead_per_pair              everything else that a thread executes for a segment at V = 128256, over the pairs that it has in one: prologue,
                                   the tiles that are read again to re-anchor, the edge tiles, a
                                   row's share of the merge by its last program (the rule:
                                   disassembly.segment_costs); the edge's pairs count in it alone.
                                   Of equal tiles the first, the ninth, … anchor, since the weight
                                   about one centre grows eightfold
    loads_in_flight_kb_per_sm      bytes that a thread asks for before it waits, times the threads of an SM at this many registers (no shared memory
                                   stands in the way); of misaligned rows every block is asked for
                                   twice, and counts twice
and ex2 beside the first two. A GPU issues the sum of the first or the second and the third. On
other kernels, and on AMD, whose paths are not read, every instruction of the loop counts, also one
in a branch, and the other three are null.

The baseline is the gate against regressions: 5 % more instructions or exponentials per pair, more
spills, more or only narrow loads, or a kernel that the baseline lacks end with exit code 1;
registers are reported. It holds for the Triton that wrote it; under another one nothing is
compared. --write-baseline renews it. Exits with 1 too, naming the kernel, where one does not
compile.
"""

import argparse
import hashlib
import itertools
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
from benchmarks.disassembly import (
    hot_loop,
    parse_amdgcn,
    parse_amdgcn_resources,
    parse_resources,
    parse_sass,
    segment_costs,
    whole_costs,
)
from benchmarks.record import output_file, provenance, write_json
from benchmarks.static_gate import BASELINE, judge, read_baseline, write_baseline

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = ("bf16", "fp32")
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
    # Of a kernel that sums segments, see the top of this file.
    instructions_per_pair_general: float | None = None
    ex2_per_pair_general: float | None = None
    overhead_per_pair: float | None = None
    loads_in_flight_kb_per_sm: float | None = None


def measure(specialization, arch, dtype, aligned, *, loop_free=False):
    """The StaticCost of one `Specialization` of the compile plan; loop_free: of its whole code, for
    a kernel whose grid covers the vocabulary.
    """
    case = f"{specialization.name} for {arch}, {dtype}, {'aligned' if aligned else 'misaligned'}"
    try:
        compiled = compile_kernel(specialization, arch)
    except (
        Exception
    ) as error:  # the compiler raises what it likes; the kernel's name must not get lost
        raise StaticCostError(
            f"{case}: does not compile: {type(error).__name__}: {error}"
        ) from error
    program, registers, spill_bytes = read_back(compiled)
    loop = hot_loop(program)
    if loop_free and loop is not None:
        raise StaticCostError(
            f"{case}: expected a kernel without a loop over the vocabulary, got one with"
        )
    if loop is None and not loop_free:
        return StaticCost(
            specialization.name,
            arch,
            dtype,
            aligned,
            None,
            None,
            registers,
            spill_bytes,
            None,
            None,
            None,
            None,
        )
    loop = loop or whole_costs(program)
    segment = None
    if specialization.segment and arch.startswith("sm_"):
        try:
            segment = segment_costs(program, *cut(specialization))
        except ValueError as error:
            raise StaticCostError(f"{case}: {error}") from error
        loop = segment.near
    unrolled = 1 if loop_free else unroll_factor(loop, compiled)
    if unrolled is None:
        raise StaticCostError(
            f"{case}: the loads of the hot loop, {loop.loads} (bytes: count), are not those of "
            f"the kernel's source"
        )
    pairs = specialization.pairs_per_thread * unrolled
    return StaticCost(
        specialization.name,
        arch,
        dtype,
        aligned,
        instructions_per_pair=round(loop.instructions / pairs, 2),
        ex2_per_pair=round(loop.ex2 / pairs, 2),
        registers=registers,
        spill_bytes=spill_bytes,
        widest_load_bytes=loop.widest_load,
        narrow_loads=sum(loop.loads.values()) - loop.loads[loop.widest_load],
        unrolled=unrolled,
        fp32_per_pair=round(loop.fp32 / pairs, 2),
        **(
            {}
            if segment is None
            else {
                "instructions_per_pair_general": round(segment.general.instructions / pairs, 2),
                "ex2_per_pair_general": round(segment.general.ex2 / pairs, 2),
                "overhead_per_pair": round(
                    segment.outside * 32 * specialization.num_warps / specialization.segment, 2
                ),
                "loads_in_flight_kb_per_sm": segment.loaded
                * resident_threads(registers, specialization.num_warps)
                / 1024,
            }
        ),
    )


def cut(specialization):
    """(tiles of a segment that re-anchor, passes of the loop over its edge, segments of a row) of a
    kernel of forward.
    """
    from fastkl.kernels.compile_plan import VOCABULARY
    from fastkl.kernels.row_math import OUTWEIGHS

    threads, segment = 32 * specialization.num_warps, specialization.segment
    tiles, edge = divmod(segment, threads * specialization.pairs_per_thread)
    anchors, next_one = 0, 1
    while next_one <= tiles:
        anchors, next_one = anchors + 1, int(OUTWEIGHS.value) * next_one + 1
    return (
        anchors,
        math.ceil(edge / (threads * specialization.constexprs["LANES"])),
        math.ceil(VOCABULARY / segment),
    )


def resident_threads(registers, warps):
    """Threads on an SM of compute capability 8.0, 9.0 or 10.0, of programs with this many registers
    a thread.

    Each of its four quarters has 16384 registers, given to a warp 256 at a time; an SM holds 64
    warps and 32 programs.
    """
    resident = 4 * (16384 // (math.ceil(32 * registers / 256) * 256))
    return 32 * warps * min(min(resident, 64) // warps, 32)


IR_LOAD = re.compile(
    r"(?:tt\.load|ttg\.async_copy_global_to_local|amdg(?:pu)?\.buffer_load\w*) (.*)"
    r": (?:tensor<((?:\d+x)+)(?:!tt\.ptr<)?|!tt\.ptr<)[a-z]+(\d+)"
)


def source_loop_bytes(ttgir, threads):
    """Bytes that one thread loads in one iteration of the loop over the vocabulary as it was
    written, read from Triton's own representation.

    Of several loops it is the one that loads most outside the loops inside it; None where no loop
    loads. What a loop reads again counts once, as it lies in registers.
    """
    open_loops, depth = (
        [],
        0,
    )  # each loop that is open: [depth, bytes of its own loads, bytes with the loops inside it]
    finished, known = [], set()
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
    finished = [loop for loop in finished if loop[1]]
    return max(finished, key=lambda loop: loop[1])[2] if finished else None


def unroll_factor(loop, compiled):
    """How many iterations of the loop as written the compiler put into one; None where the loads do
    not fit together.

    Compilers unroll short loops unasked, so costs per pair need it. The bytes loaded tell: a fifth
    of slack allows for what a compiler may load in another way than by a plain load (one number for
    all threads, say).
    """
    threads = compiled.metadata.num_warps * (64 if "amdgcn" in compiled.asm else 32)
    written = source_loop_bytes(compiled.asm["ttgir"], threads)
    if not written:
        return None
    ratio = sum(width * count for width, count in loop.loads.items()) / written
    factor = max(round(ratio), 1)
    return factor if abs(ratio / factor - 1) <= 0.2 else None


def compile_kernel(specialization, arch):
    """Compiles for an architecture that this machine need not have. Nothing is cached: the same
    call does the same work.
    """
    if arch.startswith("sm_"):
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", arch, 64)
    source = ASTSource(
        fn=specialization.kernel,
        signature=specialization.signature,
        constexprs=specialization.constexprs,
        attrs=specialization.attrs,
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        triton.knobs.cache.scope(),
        triton.knobs.compilation.scope(),
    ):
        triton.knobs.cache.dir = folder
        triton.knobs.compilation.always_compile = True
        return triton.compile(
            source,
            target=target,
            options={"num_warps": specialization.num_warps, **specialization.options},
        )


def read_back(compiled):
    """(Program, registers, spill bytes) of a compiled kernel."""
    kernel = compiled.metadata.name
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        return parse_amdgcn(text, kernel), *parse_amdgcn_resources(text)
    return parse_sass(machine_code(compiled), kernel), *parse_resources(
        _of_cubin(compiled, "cuobjdump", "-res-usage")
    )


def machine_code(compiled):
    """The text of a compiled kernel's machine code; without an analysis of data flow, which takes
    half of nvdisasm's time.
    """
    return (
        compiled.asm["amdgcn"]
        if "amdgcn" in compiled.asm
        else _of_cubin(compiled, "nvdisasm", "-c", "-ndf")
    )


def digest(specialization, arch):
    """A hash of the instructions and labels that a specialization compiles to, whatever its kernel
    is called.
    """
    compiled = compile_kernel(specialization, arch)
    lines = machine_code(compiled).replace(compiled.metadata.name, "kernel").splitlines()
    # Directives of the assembler name source lines and files.
    code = [line.split(";")[0].strip() for line in lines] if "amdgcn" in compiled.asm else lines
    return hashlib.sha256(
        "\n".join(line for line in code if not line.startswith(".")).encode()
    ).hexdigest()[:16]


def _of_cubin(compiled, name, *arguments):
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        return _tool(name, *arguments, cubin)


def _tool(name, *arguments):
    done = subprocess.run(
        [NVIDIA_TOOLS / name, *arguments], capture_output=True, text=True, timeout=60
    )
    if done.returncode:
        raise StaticCostError(f"{name} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout + done.stderr


def collect(
    plan, *, architectures=ARCHITECTURES, dtypes=DTYPES, alignments=(True, False), kernels=None
):
    """(list of StaticCost, list of error messages) over everything that `plan(dtype, aligned,
    arch)` lists; `kernels` keeps only these names.

    What is the same compilation aligned and misaligned (a kernel that does not care) is measured
    once.
    """
    costs, errors, known = [], [], {}
    for specialization, arch, dtype, aligned in cases(
        plan, architectures, dtypes, alignments, kernels
    ):
        key = (arch, dtype, repr(specialization))
        try:
            known[key] = known.get(key) or measure(specialization, arch, dtype, aligned)
            costs.append(replace(known[key], aligned=aligned))
        except StaticCostError as error:
            errors.append(str(error))
    return costs, errors


def cases(plan, architectures, dtypes, alignments=(True, False), kernels=None):
    """Yields (specialization, architecture, type, aligned) of everything that `plan` lists, or of
    `kernels` alone.
    """
    for arch, dtype, aligned in itertools.product(architectures, dtypes, alignments):
        for specialization in plan(dtype, aligned, arch):
            if not kernels or specialization.name in kernels:
                yield specialization, arch, dtype, aligned


COLUMNS = (
    ("kernel", "kernel", "<36"),
    ("arch", "arch", "<8"),
    ("dtype", "dtype", "<6"),
    ("aligned", "aligned", "<8"),
    ("instructions_per_pair", "instr/pair", ">11"),
    ("instructions_per_pair_general", "general", ">8"),
    ("overhead_per_pair", "around", ">7"),
    ("fp32_per_pair", "fp32/pair", ">10"),
    ("ex2_per_pair", "ex2/pair", ">9"),
    ("registers", "registers", ">10"),
    ("spill_bytes", "spill B", ">8"),
    ("loads_in_flight_kb_per_sm", "flight KB", ">10"),
    ("widest_load_bytes", "load B", ">7"),
    ("narrow_loads", "narrow", ">7"),
    ("unrolled", "unrolled", ">9"),
    ("percent", "bound %", ">8"),
    ("limited_by", "  limited by", "<12"),
)


def record_of(cost):
    """The cost and its upper bound as one record: percent of peak bandwidth and the resource that
    sets it, null where there is no bound.
    """
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
        lines.append(
            "".join(
                format("-" if values[key] is None else str(values[key]), width)
                for key, _, width in COLUMNS
            ).rstrip()
        )
    return "\n".join(
        [
            *lines,
            f"bound %: {roofline.MODEL}; of "
            + ", ".join(f"{gpu.name} ({arch})" for arch, gpu in roofline.GPUS.items()),
        ]
    )


# The command line
# ---------------------------------------------------------------------------------------


def kernels_of(architectures, dtypes):
    """The names of the compile plan's kernels for these, in its order."""
    from fastkl.kernels.compile_plan import plan

    plans = (
        plan(dtype, aligned, arch)
        for arch in architectures
        for dtype in dtypes
        for aligned in (True, False)
    )
    return list(
        dict.fromkeys(
            specialization.name for specializations in plans for specialization in specializations
        )
    )


def parse(argv):
    """The arguments, checked: exits with 2 where they do not go together."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static_costs", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write the records to FILE"
    )
    parser.add_argument("--kernel", action="append", help="only this kernel (may be given again)")
    parser.add_argument(
        "--arch",
        action="append",
        choices=ARCHITECTURES,
        help="only this architecture (may be given again)",
    )
    parser.add_argument(
        "--dtype",
        action="append",
        choices=DTYPES,
        help="only this element type (may be given again)",
    )
    mode = parser.add_mutually_exclusive_group()
    here = "benchmarks/static_baseline.json"
    mode.add_argument(
        "--baseline",
        type=Path,
        nargs="?",
        const=BASELINE,
        metavar="FILE",
        help=f"compare with FILE ({here})",
    )
    mode.add_argument(
        "--write-baseline",
        type=output_file,
        nargs="?",
        const=BASELINE,
        metavar="FILE",
        help=f"write FILE ({here})",
    )
    mode.add_argument(
        "--peers", action="store_true", help="kernels of other packages beside ours, sm_90, aligned"
    )
    mode.add_argument("--hash", action="store_true", help="a digest of each kernel's machine code")
    arguments = parser.parse_args(argv)
    chosen = [name for name in ("kernel", "arch", "dtype") if getattr(arguments, name)]
    if chosen and (arguments.write_baseline or arguments.peers):
        mode = "--write-baseline" if arguments.write_baseline else "--peers"
        parser.error(
            f"{mode}: expected no choice, since it is whole or not at all, got --{chosen[0]}; "
            f"remedy: leave --{chosen[0]} out"
        )
    if arguments.kernel:
        known = kernels_of(arguments.arch or ARCHITECTURES, arguments.dtype or DTYPES)
        if unknown := [name for name in arguments.kernel if name not in known]:
            where = f" of --dtype {' and '.join(arguments.dtype)}" if arguments.dtype else ""
            parser.error(
                f"--kernel: expected one of the kernels{where}, got "
                f"{', '.join(map(repr, unknown))}; choose out of {', '.join(known)}"
            )
    if arguments.baseline:
        try:
            read_baseline(arguments.baseline)  # before minutes of compiling
        except ValueError as error:
            parser.error(str(error))
    return arguments


def main(argv=None):
    """The command line; returns the exit code."""
    arguments = parse(argv)
    command = "python -m benchmarks.static_costs " + " ".join(
        sys.argv[1:] if argv is None else argv
    )
    if arguments.peers:
        from benchmarks.peer_kernels import report

        return report(arguments.json, command)
    from fastkl.kernels.compile_plan import plan

    if arguments.hash:
        for case in cases(
            plan,
            arguments.arch or ARCHITECTURES,
            arguments.dtype or DTYPES,
            kernels=arguments.kernel,
        ):
            print(digest(*case[:2]), case[0].name, *case[1:], flush=True)
        return 0
    costs, errors = collect(
        plan,
        architectures=arguments.arch or ARCHITECTURES,
        dtypes=arguments.dtype or DTYPES,
        kernels=arguments.kernel,
    )
    print(table(costs))
    data = {
        **provenance(command),
        "model": roofline.MODEL,
        "records": [record_of(cost) for cost in costs],
        "errors": errors,
    }
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
