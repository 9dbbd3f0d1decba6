"""Analyse compiled kernels: the hot loop's instructions, loads and paths; registers.

NVIDIA's SASS (`nvdisasm -c`) and AMD's amdgcn assembly are both parsed into a `Program`, a
control-flow graph of instructions; loops and counts are computed from it.

A kernel has several loops: the loop over the vocabulary, loops over edge tiles, a slow fallback,
the padding after the last instruction. The hot loop is, among all natural loops of the control-flow
graph that load from global memory,
  1. one of those with the widest load (edge tiles and fallbacks load single elements),
  2. among these one with a base-2 exponential, if any,
  3. among these an innermost one (a loop over rows contains the loop over the vocabulary),
  4. among these the one that loads most, then the longest.
Natural loops, not "from the back edge to its target": code placed after the kernel that jumps back
into a loop, as compilers do with rare branches, is part of that loop. Each instruction of a loop
counts once, even in a rarely taken branch. `segment_costs` counts each path through the loop, and
the code around it.
"""

import re
from collections import Counter
from graphlib import TopologicalSorter
from typing import NamedTuple

import networkx as nx


class Program(NamedTuple):
    """The instructions of a kernel.

    graph: an edge from each reachable instruction to its possible successors. calls: {instruction:
    the subroutine's first one}. registers: named by each SASS instruction.
    """

    opcodes: list[str]
    graph: nx.DiGraph
    calls: dict[int, int]
    entry: int
    registers: list[list[int]]


class LoopCosts(NamedTuple):
    """The contents of an iteration. loads: {bytes: count} of global loads; fp32: results of float32
    additions and multiplications (one per fused, two per packed instruction).
    """

    instructions: int
    ex2: int
    loads: dict[int, int]
    fp32: int = 0

    @property
    def widest_load(self):
        return max(self.loads, default=None)

    @property
    def loaded(self):
        return sum(width * count for width, count in self.loads.items())


def _program(text, label, instruction, read, entry=None):
    """Link the instructions of a text; label, instruction: patterns of such lines; read: maps the
    instruction's groups to (opcode, jump target label, whether the next may follow, label of the
    called subroutine, registers).
    """
    found, labels = [], {}
    for line in text.splitlines():
        if match := label.match(line):
            labels[match[1]] = len(found)
        elif match := instruction.match(line):
            found.append(read(*match.groups()))
    opcodes, targets, continuing, called, registers = zip(*found, strict=True)
    jumps = [(i, labels[target]) for i, target in enumerate(targets) if target in labels]
    graph = nx.DiGraph(edge for edge in jumps if edge[1] < len(found))
    graph.add_nodes_from(range(len(found)))
    graph.add_edges_from((i, i + 1) for i, goes_on in enumerate(continuing[:-1]) if goes_on)
    calls = {i: labels[name] for i, name in enumerate(called) if name in labels}
    return Program(opcodes, graph, calls, labels.get(entry, 0), registers)


# SASS

SASS_LABEL = re.compile(r"\s*([.$\w]+):\s*$")
SASS_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
SASS_TARGET = re.compile(r"`\(([^)]+)\)")
SASS_REGISTER = re.compile(r"\bR(\d+)\b")


def parse_sass(text, kernel):
    return _program(text, SASS_LABEL, SASS_INSTRUCTION, _sass_instruction, f".text.{kernel}")


def _sass_instruction(guard, opcode, operands):
    name, found = opcode.split(".")[0], SASS_TARGET.search(operands)
    target = found[1] if found else ""
    # ptxas writes some jumps out of a loop as a call to a label inside the kernel, which never
    # returns. Subroutines have their own names.
    jumps = name == "BRA" or (name == "CALL" and target.startswith(".L"))
    # A condition is before the instruction (@P0), before the target (BRA !P5, `(.L)), or in a
    # uniform register (BRA.U UP0, `(.L)).
    conditional = guard or (name == "BRA" and operands.split("`")[0].strip())
    continues = not (jumps or name in ("EXIT", "RET", "BRX", "JMP", "JMX")) or bool(conditional)
    called = target if name == "CALL" and not jumps else None
    registers = list(map(int, SASS_REGISTER.findall(operands)))
    return opcode, target if jumps else None, continues, called, registers


def parse_resources(text):
    """Return (registers, spill bytes) from `cuobjdump -res-usage`. Triton's kernels have no arrays,
    so all stack and local memory is spills.
    """
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", text)
    return int(found[1]), int(found[2]) + int(found[3])


# amdgcn

GCN_LABEL = re.compile(r"([.$\w]+):")
GCN_INSTRUCTION = re.compile(r"\s+((?:s|v|ds|buffer|global|flat|scratch)_\w+)\s*([^;]*)")


def parse_amdgcn(text, kernel):
    body = text.partition(f"\n{kernel}:")[2].partition("\n.Lfunc_end")[0]
    return _program(body, GCN_LABEL, GCN_INSTRUCTION, _gcn_instruction)


def _gcn_instruction(opcode, operands):
    target = operands.strip() if opcode.startswith(("s_branch", "s_cbranch")) else None
    return opcode, target, opcode not in ("s_branch", "s_endpgm", "s_setpc_b64"), None, []


def parse_amdgcn_resources(text):
    """Return (vector registers, spill bytes) from the metadata of Triton's amdgcn assembly."""
    found = {n: int(x) for n, x in re.findall(r"^\s*\.(\w+):\s*(\d+)\s*$", text, re.MULTILINE)}
    spills = max(found["private_segment_fixed_size"], 4 * found["vgpr_spill_count"])
    return found["vgpr_count"], spills


# Both

LOAD = re.compile(
    r"^LDG(?:STS)?\b(?:.*\.(256|128|64|[US]16|[US]8)\b)?"
    r"|^(?:global|buffer|flat)_load_(?:lds_)?(dwordx[234]|dword|[us]?short|[us]?byte)"
)
WIDTHS = {
    **{"256": 32, "128": 16, "64": 8, None: 4, "U16": 2, "S16": 2, "U8": 1, "S8": 1},
    **{"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2},
    **{"sshort": 2, "byte": 1, "ubyte": 1, "sbyte": 1},
}
FP32 = re.compile(
    r"^F(?:ADD|MUL|FMA)(2?)(?:\.|$)"
    r"|^v_(pk_)?(?:add|sub|subrev|mul|fma|fmac|fmaak|fmamk|mac|madak|madmk)_f32"
)
# Padding and waits: NVIDIA encodes waits in its instructions, AMD has separate instructions.
NOT_COUNTED = ("NOP", "s_nop", "s_waitcnt", "s_delay_alu")


def load_width(opcode):
    return sum(WIDTHS[match[1] or match[2]] for match in LOAD.finditer(opcode))


def fp32_results(opcode):
    return sum(2 if match[1] or match[2] else 1 for match in FP32.finditer(opcode))


def loop_costs(program, body):
    """Return the LoopCosts of some instructions; a call adds the whole subroutine."""
    firsts = [program.calls[i] for i in body if i in program.calls]
    called = [i for first in firsts for i in (first, *nx.descendants(program.graph, first))]
    opcodes = [program.opcodes[i] for i in (*body, *called)]
    return LoopCosts(
        _count(program, (*body, *called)),
        sum(opcode.startswith(("MUFU.EX2", "v_exp_")) for opcode in opcodes),
        dict(Counter(filter(None, map(load_width, opcodes)))),
        sum(map(fp32_results, opcodes)),
    )


def _count(program, indices):
    return sum(not program.opcodes[i].startswith(NOT_COUNTED) for i in indices)


def natural_loops(program):
    """Return the natural loops, {header: instructions}; all back edges to a header form one
    loop.
    """
    reached = {program.entry} | nx.descendants(program.graph, program.entry)
    graph, loops = program.graph.subgraph(reached), {}
    tree = nx.DiGraph(nx.immediate_dominators(graph, program.entry).items())
    # A header has a back edge, and an edge from before unless the program begins there.
    for header in [i for i in tree if graph.in_degree(i) > (i != program.entry)]:
        dominated = graph.subgraph({header} | nx.ancestors(tree, header))
        if dominated.in_degree(header):
            loops[header] = {header} | nx.ancestors(dominated, header)
    return loops


def hot_loop(program):
    """Return (natural loops, header of the hot one, its costs), the last two None without one."""
    loops = natural_loops(program)
    found = {header: loop_costs(program, body) for header, body in loops.items()}
    widest = max((costs.widest_load for costs in found.values() if costs.loads), default=0)
    found = {header: costs for header, costs in found.items() if costs.widest_load == widest}
    found = {header: costs for header, costs in found.items() if costs.ex2} or found
    inner = [h for h in found if not any(loops[other] < loops[h] for other in found)]
    header = max(inner, key=lambda h: (found[h].loaded, found[h].instructions), default=None)
    return loops, header, found.get(header)


# Paths


class SegmentCosts(NamedTuple):
    """The costs of a segment of a row.

    near, general: an iteration of the hot loop on its cheapest and costliest path without
    re-anchoring. outside: instructions of a thread outside these paths. in_flight: largest number
    of bytes requested before a wait, on the near path.
    """

    near: LoopCosts
    general: LoopCosts
    outside: float
    in_flight: int


MANY = 10_000  # more instructions than a path has


def segment_costs(program, anchors, edges, segments):
    """Return the SegmentCosts of a program whose rows are cut into `segments`, each with `edges`
    passes of the loop over partial tiles.

    In addition to the near and the general path, `outside` adds up:
        once: everything outside loops, along the longest path;
        of the hot loop: the path with most shuffles, which reads a tile twice, `anchors` times;
        of the loop over the edge: the costliest path without re-anchoring, `edges` times;
        one time in `segments`: everything after the atomic operation, since only the last
        program of a row merges.
    A tile that re-anchors sums over all threads of the warp, so its path has more shuffles. An
    instruction with a false predicate counts; a subroutine, the rare case of a division, does not.
    Raises ValueError if the program does not have this structure.
    """

    loops, hot, costs = hot_loop(program)

    def through(header, sign, shuffle):
        return _through(program, header, loops[header], sign, shuffle)

    def shuffles(indices):
        return _shuffles(program, indices)

    near = costs and through(hot, -1, -MANY)
    outer = {h: body for h, body in loops.items() if not any(body < b for b in loops.values())}
    if not near or hot not in outer:
        raise ValueError("expected a path through a loop over the vocabulary in no other loop")
    added = {
        header: _count(program, through(header, 1, -MANY))
        * (edges if loop_costs(program, body).loads else 1)
        for header, body in outer.items()
    }
    twice = through(hot, 1, MANY)
    added[hot] = anchors * _count(program, twice) * (shuffles(twice) > shuffles(near))
    header_of = {i: header for header, body in outer.items() for i in body}
    graph = nx.relabel_nodes(program.graph, header_of)
    graph.remove_edges_from(list(nx.selfloop_edges(graph)))
    ends = [i for i in graph if not program.graph[i]]
    weight = {i: MANY if i in outer else _count(program, [i]) for i in graph}
    outside, share = 0.0, 1.0
    for i in _heaviest(program, graph, program.entry, ends, weight):
        outside += share * (added[i] if i in added else _count(program, [i]))
        share = 1.0 / segments if program.opcodes[i].startswith("ATOM") else share
    paths = (loop_costs(program, path) for path in (near, through(hot, 1, -MANY)))
    return SegmentCosts(*paths, outside, _bytes_in_flight(program, near))


def loop_paths(program):
    """Return the LoopCosts of an iteration of the hot loop on its cheapest and costliest path."""
    loops, hot, _ = hot_loop(program)
    ways = (_through(program, hot, loops[hot], sign, 0) for sign in (-1, 1))
    return [loop_costs(program, way) for way in ways]


def _shuffles(program, indices):
    return sum(program.opcodes[i].startswith("SHFL") for i in indices)


def _through(program, header, body, sign, shuffle):
    """Return the path through a loop with the largest sum of `sign` per instruction and `shuffle`
    per shuffle.
    """
    graph = program.graph.subgraph(body).copy()
    tails = list(graph.predecessors(header))
    graph.remove_edges_from([(tail, header) for tail in tails])
    weight = {i: sign * _count(program, [i]) + shuffle * _shuffles(program, [i]) for i in graph}
    return _heaviest(program, graph, header, tails, weight)


def _bytes_in_flight(program, path):
    """Return the largest number of bytes loaded into registers not yet read, on a path taken
    repeatedly.
    """
    flying, most = [], 0
    for i in (*path, *path):
        named, width = program.registers[i], load_width(program.opcodes[i])
        flying = [(size, held) for size, held in flying if not {*held}.intersection(named)]
        if width:
            flying.append((width, range(named[0], named[0] + max(width // 4, 1))))
        most = max(most, sum(size for size, _ in flying))
    return most


def _heaviest(program, graph, start, ends, weight):
    """Return the path from `start` to one of `ends` with the largest sum of weights, () for
    none. Paths through a call are left out. Raises ValueError (CycleError) if the graph has a
    cycle.
    """
    best = {}
    for i in TopologicalSorter(graph.adj).static_order():
        ways = [best[j] for j in graph[i] if j in best] + [(0, ())] * (i in ends)
        if ways and i not in program.calls:
            total, path = max(ways, key=lambda way: way[0])
            best[i] = total + weight[i], (i, *path)
    return best.get(start, (0, ()))[1]
