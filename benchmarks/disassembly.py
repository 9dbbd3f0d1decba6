"""Reads compiled kernels: which instructions the hot loop holds, what it loads, which registers it
takes.

Two languages of machine code come in, NVIDIA's SASS (`nvdisasm -c`) and AMD's amdgcn assembly, and
one `Program` comes out: a list of instructions with the labels that they jump to. Everything after
that (loops, counts) is shared.

What counts as the hot loop. A kernel holds several loops: the one over the vocabulary, loops over
edge tiles, a slow exact path, the padding behind the last instruction. `hot_loop` takes, of all
natural loops of the control-flow graph that load from global memory,
  1. those with the widest load (edge tiles and slow paths load single elements),
  2. of these the ones with a base-2 exponential, if any has one,
  3. of these the innermost ones (a loop over rows holds the loop over the vocabulary),
  4. of these the longest.
Natural loops instead of "from the branch back to its target": code that is placed behind the kernel
and jumps back into the middle of a loop, as compilers do with rare branches, is a part of that loop
and does not make another one. Every instruction of the loop counts once, also one in a branch that
few iterations take: the counts are upper bounds of what an iteration issues. `segment_costs` counts
the paths through the loop one by one, and the code around it, for a kernel of which a program sums
a segment of a row.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from graphlib import TopologicalSorter


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: its name, the labels it may jump to, whether the next one can
    follow, the subroutine it calls, and its operands.
    """

    opcode: str
    targets: tuple[str, ...] = ()
    falls_through: bool = True
    calls: str | None = None
    operands: str = ""


@dataclass
class Program:
    """The instructions of one kernel and, per label, the index of the instruction that it names."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    entry: int = 0


@dataclass(frozen=True)
class LoopCosts:
    """What one iteration of a loop holds: instructions, base-2 exponentials, global loads by their
    width in bytes, and float32 additions and
    multiplications (a fused one is one, a packed instruction does two)."""

    instructions: int
    ex2: int
    loads: dict[int, int]
    fp32: int = 0

    @property
    def widest_load(self):
        """Bytes of the widest load, None in a loop without loads."""
        return max(self.loads, default=None)


# SASS
# ----

SASS_LABEL = re.compile(r"\s*([.$\w]+):\s*$")
SASS_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
SASS_TARGET = re.compile(r"`\(([^)]+)\)")


def parse_sass(text, kernel):
    """The Program of the function `kernel` in the output of `nvdisasm -c`."""
    program = Program()
    for line in text.splitlines():
        if label := SASS_LABEL.match(line):
            program.labels[label[1]] = len(program.instructions)
        elif match := SASS_INSTRUCTION.match(line):
            program.instructions.append(_sass_instruction(*match.groups()))
    program.entry = program.labels.get(f".text.{kernel}", 0)
    return program


def _sass_instruction(guard, opcode, operands):
    name = opcode.split(".")[0]
    named = SASS_TARGET.search(operands)
    if name == "BRA":
        # A condition stands before the instruction (@P0), before the target (BRA !P5, `(.L)), or in
        # a uniform register (BRA.U UP0, `(.L)).
        conditional = bool(guard) or bool(operands.split("`")[0].strip())
        return Instruction(opcode, (named[1],) if named else (), falls_through=conditional)
    if name == "CALL" and named and named[1].startswith(".L"):
        # Subroutines have names of their own; a call to a place inside the kernel is how ptxas
        # writes some jumps out of a loop. It never returns.
        return Instruction(opcode, (named[1],), falls_through=bool(guard))
    if name == "CALL":
        return Instruction(opcode, calls=named[1] if named else None)
    if name in ("EXIT", "RET", "BRX", "JMP", "JMX"):
        return Instruction(opcode, falls_through=bool(guard))
    return Instruction(opcode, operands=operands)


SASS_WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def sass_load_width(opcode):
    """Bytes that a SASS instruction loads from global memory, straight (LDG) or on to shared memory
    (LDGSTS); 0 for any other instruction.
    """
    name, *modifiers = opcode.split(".")
    if name not in ("LDG", "LDGSTS"):
        return 0
    return next((SASS_WIDTHS[m] for m in modifiers if m in SASS_WIDTHS), 4)


def parse_resources(text):
    """(registers, spill bytes) from `cuobjdump -res-usage`. Triton's kernels have no arrays, so all
    of their stack and local memory is spills.
    """
    match = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", text)
    if not match:
        raise ValueError(f"no resource usage in the output of cuobjdump: {text[:200]!r}")
    registers, stack, local = map(int, match.groups())
    return registers, stack + local


# amdgcn
# ----

GCN_LABEL = re.compile(r"([.$\w]+):")
GCN_INSTRUCTION = re.compile(r"\s+((?:s|v|ds|buffer|global|flat|scratch)_\w+)\s*([^;]*)")


def parse_amdgcn(text, kernel):
    """The Program of the function `kernel` in Triton's amdgcn assembly."""
    program = Program()
    inside = False
    for line in text.splitlines():
        if label := GCN_LABEL.match(line):
            inside = inside or label[1] == kernel
            if inside and label[1].startswith(".Lfunc_end"):
                break
            program.labels[label[1]] = len(program.instructions)
        elif inside and (match := GCN_INSTRUCTION.match(line)):
            program.instructions.append(_gcn_instruction(match[1], match[2].strip()))
    return program


def _gcn_instruction(opcode, operands):
    if opcode == "s_branch":
        return Instruction(opcode, (operands,), falls_through=False)
    if opcode.startswith("s_cbranch"):
        return Instruction(opcode, (operands,))
    return Instruction(opcode, falls_through=opcode not in ("s_endpgm", "s_setpc_b64"))


GCN_LOAD = re.compile(
    r"(?:global|buffer|flat)_load_(?:lds_)?(dwordx4|dwordx3|dwordx2|dword|[us]?short|[us]?byte)"
)
GCN_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}


def gcn_load_width(opcode):
    """Bytes that an amdgcn instruction loads from global memory; 0 for any other instruction."""
    match = GCN_LOAD.match(opcode)
    if not match:
        return 0
    return GCN_WIDTHS.get(match[1], 2 if match[1].endswith("short") else 1)


def parse_amdgcn_resources(text):
    """(vector registers, spill bytes) from the metadata of Triton's amdgcn assembly; None for what
    it does not tell.
    """

    def value(key):
        match = re.search(rf"^\s*\.{key}:\s*(\d+)", text, re.MULTILINE)
        return int(match[1]) if match else None

    spills, private = value("vgpr_spill_count"), value("private_segment_fixed_size")
    spill_bytes = None if spills is None or private is None else max(private, 4 * spills)
    return value("vgpr_count"), spill_bytes


# Both
# ----

# NVIDIA encodes waiting inside its instructions; AMD's waits are separate ones, left out so that
# the counts of both mean the same. NOPs are padding.
NOT_COUNTED = ("NOP", "s_nop", "s_waitcnt", "s_delay_alu")


def natural_loops(program):
    """The natural loops of the program's control-flow graph, {header: instruction indices}; back
    edges to one header make one loop.
    """
    count = len(program.instructions)
    successors = [_successors(program, i) for i in range(count)]
    reachable = _reach([program.entry], lambda i: successors[i])
    predecessors = {i: [] for i in reachable}
    for i in sorted(reachable):
        for j in successors[i]:
            predecessors[j].append(i)
    # Bit j of dominators[i] is set where every path from the entry to i passes j.
    dominators = dict.fromkeys(reachable, (1 << count) - 1)
    dominators[program.entry] = 1 << program.entry
    changed = True
    while changed:
        changed = False
        for i in sorted(reachable - {program.entry}):
            bits = -1
            for j in predecessors[i]:
                bits &= dominators[j]
            bits |= 1 << i
            changed = changed or bits != dominators[i]
            dominators[i] = bits
    loops = {}
    for i in reachable:
        for header in successors[i]:
            if dominators[i] >> header & 1:
                body = _reach([i], lambda k, header=header: [] if k == header else predecessors[k])
                loops[header] = loops.get(header, set()) | body | {header}
    return loops


def _successors(program, i):
    instruction = program.instructions[i]
    after = [program.labels[t] for t in instruction.targets if t in program.labels]
    if instruction.falls_through:
        after.append(i + 1)
    return [j for j in after if j < len(program.instructions)]


def _reach(start, neighbours):
    """All nodes reached from `start`."""
    seen, todo = set(start), list(start)
    while todo:
        for j in neighbours(todo.pop()):
            if j not in seen:
                seen.add(j)
                todo.append(j)
    return seen


def loop_costs(program, body):
    """The LoopCosts of a set of instruction indices; each call adds the whole subroutine."""
    indices = list(body)
    for i in body:
        callee = program.labels.get(program.instructions[i].calls)
        if callee is not None:
            indices += _reach([callee], lambda k: _successors(program, k))
    opcodes = [program.instructions[i].opcode for i in indices]
    loads = Counter(sass_load_width(o) or gcn_load_width(o) for o in opcodes)
    loads.pop(0, None)
    return LoopCosts(
        instructions=sum(not o.startswith(NOT_COUNTED) for o in opcodes),
        ex2=sum(o.startswith(("MUFU.EX2", "v_exp_")) for o in opcodes),
        loads=dict(loads),
        fp32=sum(fp32_results(o) for o in opcodes),
    )


def whole_costs(program):
    """The LoopCosts of everything that a program without a loop may run."""
    return loop_costs(program, _reach([program.entry], lambda i: _successors(program, i)))


FP32 = re.compile(
    r"F(?:ADD|MUL|FMA)(2?)(?:\.|$)|v_(pk_)?(?:add|sub|subrev|mul|fma|fmac|fmaak|fmamk|mac|madak|madmk)_f32"
)


def fp32_results(opcode):
    """Float32 additions, multiplications or fused ones that an instruction does per thread: 2 if it
    is packed, 0 if it does something else.
    """
    match = FP32.match(opcode)
    if not match:
        return 0
    return 2 if match[1] or match[2] else 1


def hot_loop(program):
    """The LoopCosts of the loop over the vocabulary (see the top of this file for the choice), None
    where no loop loads from global memory.
    """
    loops = natural_loops(program)
    header = hot_header(program, loops)
    return None if header is None else loop_costs(program, loops[header])


def hot_header(program, loops):
    """The header of the loop over the vocabulary out of all natural loops."""
    found = {header: (body, loop_costs(program, body)) for header, body in loops.items()}
    found = {header: (body, costs) for header, (body, costs) in found.items() if costs.loads}
    if not found:
        return None
    widest = max(costs.widest_load for _, costs in found.values())
    found = {
        header: (body, costs)
        for header, (body, costs) in found.items()
        if costs.widest_load == widest
    }
    found = {header: (body, costs) for header, (body, costs) in found.items() if costs.ex2} or found
    innermost = [
        header
        for header, (body, _) in found.items()
        if not any(other < body for other, _ in found.values())
    ]
    return max(
        innermost, key=lambda header: (_loaded(found[header][1]), found[header][1].instructions)
    )


def _loaded(costs):
    """The bytes that one iteration loads."""
    return sum(width * count for width, count in costs.loads.items())


# Paths
# ----

# A loop in the length of a path that passes it.
LOOP = 10_000


@dataclass(frozen=True)
class SegmentCosts:
    """A segment's costs. near, general: one iteration of the hot loop by its cheapest and its
    dearest path without re-anchoring.

    outside: instructions of a thread outside these paths. loaded: bytes that it has asked for at
    once, at most, on the near path.
    """

    near: LoopCosts
    general: LoopCosts
    outside: float
    loaded: int


def paths(program, body, start, inner):
    """Paths through `body` from `start` until it comes again or the program ends, {(length,
    shuffles): instruction indices}: one of each.

    A loop of `inner` counts as its header, of length LOOP. Paths that leave the body or call a
    subroutine are left out: subroutines are the rare cases of divisions. Raises ValueError
    (CycleError) where another loop is inside.
    """
    header_of = {i: header for header, loop in inner.items() for i in loop}

    def after(i):
        following = {
            header_of.get(j, j) for k in inner.get(i, {i}) for j in _successors(program, k)
        } - (inner.keys() & {i})
        return {j for j in following if j in body}

    nodes = _reach([start], lambda i: after(i) - {start})
    found = {}
    for i in TopologicalSorter({i: after(i) - {start} for i in nodes}).static_order():
        opcode = program.instructions[i].opcode
        rest = {length: path for j in after(i) - {start} for length, path in found[j].items()}
        if start in after(i) or not _successors(program, i):
            rest[0, 0] = None
        if program.instructions[i].calls:
            rest = {}
        length, shuffles = (
            LOOP if i in inner else not opcode.startswith(NOT_COUNTED),
            opcode.startswith("SHFL"),
        )
        found[i] = {
            (length + more, shuffles + others): (i, path) for (more, others), path in rest.items()
        }
    return {key: list(_unlinked(path)) for key, path in found[start].items()}


def _unlinked(path):
    while path:
        i, path = path
        yield i


def straight(ways):
    """Of paths, those with the fewest shuffles, shortest first: a tile that re-anchors sums over
    all threads of the warp.
    """
    fewest = min(shuffles for _, shuffles in ways)
    return [ways[key] for key in sorted(ways) if key[1] == fewest]


def segment_costs(program, anchors, edges, segments):
    """The SegmentCosts of a program whose rows are cut into `segments`, each with `edges` passes of
    the loop over what is less than a tile.

    A thread executes and `outside` adds up, beside the near and the general path:
        once: everything that lies in no loop, along the longest path;
        of the hot loop: the dearest path, on which a tile is read twice, `anchors` times;
        of the loop over the edge: the dearest path without re-anchoring, `edges` times;
        one time in `segments`: everything behind the atomic operation, since only the last program
        of a row merges.
    An instruction with a false predicate counts, a subroutine does not. Raises ValueError where the
    program does not read so.
    """
    loops = natural_loops(program)
    hot = hot_header(program, loops)
    ways = {} if hot is None else paths(program, loops[hot], hot, {})
    if not ways or any(body > loops[hot] for body in loops.values()):
        raise ValueError(
            f"expected a path through a loop over the vocabulary that is in no other loop, got "
            f"{len(ways)}"
        )
    near, *others = straight(ways)
    fewest = min(shuffles for _, shuffles in ways)
    inner = {hot: loops[hot]}
    added = {
        hot: anchors * max((length for length, shuffles in ways if shuffles > fewest), default=0)
    }
    for header, body in loops.items():
        if header not in inner and not any(body < other for other in loops.values()):
            inner[header] = body
            added[header] = (edges if loop_costs(program, body).loads else 1) * _counted(
                program, straight(paths(program, body, header, {}))[-1]
            )
    everything = _reach([program.entry], lambda i: _successors(program, i))
    whole = paths(program, everything, program.entry, inner)
    outside, share = 0.0, 1.0
    for i in whole[max(whole)]:
        outside += share * added.get(i, _counted(program, [i]))
        if program.instructions[i].opcode.startswith("ATOM"):
            share = 1.0 / segments
    return SegmentCosts(
        loop_costs(program, near),
        loop_costs(program, (others or [near])[-1]),
        outside,
        bytes_in_flight(program, near),
    )


def _counted(program, indices):
    return sum(not program.instructions[i].opcode.startswith(NOT_COUNTED) for i in indices)


SASS_REGISTER = re.compile(r"\bR(\d+)\b")


def bytes_in_flight(program, path):
    """The most bytes that a thread has loaded and not yet waited for, on a path through a loop that
    is taken again and again.
    """
    flying, most = {}, 0  # {load: its registers}
    for time, i in enumerate([*path, *path]):
        instruction = program.instructions[i]
        touched = {int(number) for number in SASS_REGISTER.findall(instruction.operands)}
        flying = {load: registers for load, registers in flying.items() if not registers & touched}
        if width := sass_load_width(instruction.opcode):
            first = int(SASS_REGISTER.search(instruction.operands)[1])
            flying[time, width] = set(range(first, first + max(width // 4, 1)))
        most = max(most, sum(width for _, width in flying))
    return most
