"""What every kernel costs before it meets a GPU: instructions, exponentials, registers, spills and load width of its hot loop.

    python -m benchmarks.static_costs --json FILE

compiles every kernel of `fastkl.kernels.compile_plan` for every architecture, element type and alignment, reads the machine code back (see
benchmarks/disassembly.py) and prints one line each. It needs Triton and no GPU. "pair" is one vocabulary entry of both logits tensors; facts that the
tools of an architecture do not tell are null. Exits with 1, naming the kernel, where one does not compile.
"""
import argparse
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

from benchmarks.disassembly import hot_loop, parse_amdgcn, parse_amdgcn_resources, parse_resources, parse_sass
from benchmarks.record import provenance, write_json

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


def measure(specialization, arch, dtype, aligned):
    """The StaticCost of one `Specialization` of the compile plan."""
    case = f"{specialization.name} for {arch}, {dtype}, {'aligned' if aligned else 'misaligned'}"
    try:
        compiled = compile_kernel(specialization, arch)
    except Exception as error:  # the compiler raises what it likes; the kernel's name must not get lost
        raise StaticCostError(f"{case}: does not compile: {type(error).__name__}: {error}") from error
    program, registers, spill_bytes = read_back(compiled)
    loop = hot_loop(program)
    if loop is None:
        return StaticCost(specialization.name, arch, dtype, aligned, None, None, registers, spill_bytes, None, None, None)
    unrolled = unroll_factor(loop, compiled)
    if unrolled is None:
        raise StaticCostError(f"{case}: the loads of the hot loop, {loop.loads} (bytes: count), are not those of the kernel's source")
    pairs = specialization.pairs_per_thread * unrolled
    return StaticCost(
        specialization.name, arch, dtype, aligned,
        instructions_per_pair=round(loop.instructions / pairs, 2), ex2_per_pair=round(loop.ex2 / pairs, 2),
        registers=registers, spill_bytes=spill_bytes, widest_load_bytes=loop.widest_load,
        narrow_loads=sum(loop.loads.values()) - loop.loads[loop.widest_load], unrolled=unrolled,
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
    ("kernel", "kernel", "<34"), ("arch", "arch", "<8"), ("dtype", "dtype", "<6"), ("aligned", "aligned", "<8"),
    ("instructions_per_pair", "instr/pair", ">11"), ("ex2_per_pair", "ex2/pair", ">9"), ("registers", "registers", ">10"),
    ("spill_bytes", "spill B", ">8"), ("widest_load_bytes", "load B", ">7"), ("narrow_loads", "narrow", ">7"), ("unrolled", "unrolled", ">9"),
)


def table(costs):
    """The costs as lines of text."""
    lines = ["".join(format(title, width) for _, title, width in COLUMNS)]
    for cost in costs:
        values = asdict(cost)
        lines.append("".join(format("-" if values[key] is None else str(values[key]), width) for key, _, width in COLUMNS))
    return "\n".join(lines)


def main(argv=None):
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static_costs", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records to FILE")
    parser.add_argument("--kernel", action="append", help="only this kernel (may be given again)")
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="only this architecture (may be given again)")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only this element type (may be given again)")
    arguments = parser.parse_args(argv)
    from fastkl.kernels.compile_plan import plan

    costs, errors = collect(
        plan, architectures=arguments.arch or ARCHITECTURES, dtypes=arguments.dtype or DTYPES, kernels=arguments.kernel
    )
    if not costs and not errors:
        errors = [f"no kernel of the compile plan is called {arguments.kernel}"]
    print(table(costs))
    if arguments.json:
        command = "python -m benchmarks.static_costs " + " ".join(sys.argv[1:] if argv is None else argv)
        write_json(arguments.json, {**provenance(command), "records": [asdict(cost) for cost in costs], "errors": errors})
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    # The interpreter replaces the compiler: with it set there would be nothing to read back.
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
