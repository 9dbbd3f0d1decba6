"""Finds launch configurations on the GPU at hand: an entry of the table in kernels/config.py, with the measurement it rests on.

    python3 -m benchmarks.tune --dtype bf16 [--vocabulary 128256] [--json FILE] [--write]

Tries threads, 16-byte blocks per thread, how many entries of a row a program reads (and so into how many programs a row is split) and a limit on
registers, for the forward and the backward kernel of kl_divergence. Every candidate first passes two checks: values and gradients against float64,
and the same bits for a row alone, in a batch and at another position. What passes is timed at few and at many rows (the table does not know the
number of rows); the one with the smallest geometric mean of its times wins, if it beats the present configuration by more than NOISE. Prints the
entry; --write puts it into kernels/config.py, before the defaults. Exit code 0: done; 1: no candidate passed; 2: no CUDA here, or wrong use.
"""
import argparse
import itertools
import json
import math
import random
import re
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.providers import load_providers
from benchmarks.record import ROOT, provenance, write_bytes, write_json
from benchmarks.workloads import DTYPES, Workload, fault

TABLE_FILE = ROOT / "kernels" / "config.py"
ROWS = (64, 8192)
CHECKED_ROWS = 24
THREADS, GROUPS, SEGMENTS = (128, 256, 512), (1, 2, 4), tuple(2**k for k in range(9, 18))
REGISTERS = (None, 96, 128, 168)
# A difference that two measurements of the same configuration may have; a change for less is none.
NOISE = 0.01
DIRECTIONS = ("forward", "backward")


@dataclass
class Trial:
    """A candidate and what became of it: why it was refused, or its milliseconds by number of rows."""

    config: object
    refused: str | None = None
    times: dict[int, float] = field(default_factory=dict)

    @property
    def score(self):
        """Geometric mean of the times; infinite for what was refused."""
        return math.inf if self.refused else math.exp(sum(map(math.log, self.times.values())) / len(self.times))


def candidates(present, itemsize, vocabulary):
    """The present configuration first, then all others whose threads divide a segment that is not longer than a row needs.

    In an order without a pattern, the same every time: where the time ends the search, every part of the space has been looked at.
    """
    yield present
    others = list(_others(present, itemsize, vocabulary))
    random.Random(0).shuffle(others)
    yield from others


def _others(present, itemsize, vocabulary):
    lanes, longest = 16 // itemsize, 2 ** math.ceil(math.log2(max(vocabulary, SEGMENTS[0])))
    for threads, groups, segment in itertools.product(THREADS, GROUPS, SEGMENTS):
        if segment % (threads * groups * lanes) or segment > longest:
            continue
        for registers in REGISTERS:
            # More than this a thread cannot have: the limit would say nothing.
            if registers is not None and registers * threads > 65536:
                continue
            found = replace(present, threads=threads, groups=groups, segment=segment, max_registers=registers, measured="")
            if replace(found, measured=present.measured) != present:
                yield found


def search(found, refuse, time_of, deadline=math.inf):
    """Every candidate's Trial, in order, until the deadline: refuse(config) says why one is not right, time_of(config) its times."""
    trials = []
    for config in found:
        if trials and time.monotonic() > deadline:
            break
        try:
            refused = refuse(config)
            trials.append(Trial(config, refused) if refused else Trial(config, None, time_of(config)))
        except Exception as error:  # a candidate may not compile, or ask for more than the GPU has: that is its result
            trials.append(Trial(config, f"{type(error).__name__}: {error}"[:300]))
    return trials


def winner(trials):
    """The Trial to use: the fastest, unless the present one, which comes first, is within NOISE of it; None where all were refused."""
    best = min(trials, key=lambda trial: trial.score)
    if best.refused:
        return None
    return trials[0] if trials[0].score <= best.score * (1 + NOISE) else best


# On a GPU -------------------------------------------------------------------------------------------------------


def refusal(direction, vocabulary, dtype, device):
    """The check of a candidate, as search() takes it: right values and gradients, and bits that do not depend on the other rows."""
    import fastkl
    from fastkl.kernels.config import override

    workload = Workload("kl_divergence", rows=CHECKED_ROWS, vocabulary=vocabulary, dtype=dtype)
    case = harness.make_case(workload, device)
    inputs = case.sets[0]
    (provider,) = load_providers(device, ["fastkl"])

    def bits(rows):
        p = inputs.p.detach()[rows].requires_grad_()
        kl = fastkl.kl_divergence(p, inputs.q.detach()[rows])
        return kl.detach(), torch.autograd.grad(kl.sum(), p)[0]

    def refuse(config):
        with override(**{direction: config}):
            outputs = harness.forward(provider, case, inputs)
            _, wrong = fault(workload, inputs, outputs, harness.backward(case, inputs, outputs))
            if wrong:
                return wrong
            whole = bits(slice(None))
            for rows in (slice(3, 4), slice(CHECKED_ROWS - 1, None), slice(5, 19)):
                if not all(torch.equal(part, full[rows]) for part, full in zip(bits(rows), whole, strict=True)):
                    return "a row's bits depend on the rows beside it"
        return None

    return refuse


def timing(direction, vocabulary, dtype, device):
    """The times of a candidate, as search() takes them."""
    from fastkl.kernels.config import override

    (provider,) = load_providers(device, ["fastkl"])
    cases = {rows: harness.make_case(Workload("kl_divergence", rows=rows, vocabulary=vocabulary, dtype=dtype), device) for rows in ROWS}

    def time_of(config):
        with override(**{direction: config}):
            return {rows: harness.time_phase(provider, case, direction)["median_ms"] for rows, case in cases.items()}

    return time_of


# The entry ------------------------------------------------------------------------------------------------------


def sentence(chosen, present, vocabulary, machine, tried):
    """What a configuration's `measured` says; tried: how many candidates of how many."""
    times = ", ".join(f"{ms:.4f} ms at {rows} × {vocabulary}" for rows, ms in chosen.times.items())
    if chosen is present:
        return f"{machine}: {times}; none of {tried} was faster"
    gain = "" if present.refused else f", {present.score / chosen.score - 1:.0%} faster than the one before"
    return f"{machine}: {times}{gain}; best of {tried}"


def entry_line(arch, itemsize, max_v, configs):
    """The entry as lines of the table; configs: {"forward": RowConfig, "backward": RowConfig}."""
    parts = []
    for config in (configs["forward"], configs["backward"]):
        registers = "" if config.max_registers is None else f", {config.max_registers}"
        parts.append(f"RowConfig({config.threads}, {config.groups}, {config.segment},\n{' ' * 20}{_quoted(config.measured)}{registers})")
    return f'    Entry("{arch}", {itemsize}, {max_v},\n{" " * 10}{parts[0]},\n{" " * 10}{parts[1]}),\n'


def _quoted(text):
    """A string literal, over several lines where one would be too long."""
    return f"\n{' ' * 20}".join(json.dumps(part, ensure_ascii=False) for part in re.findall(r".{1,110}(?: |$)", text))


def with_entry(source, arch, itemsize, max_v, line):
    """The source of kernels/config.py with the entry, in place of an older one of the same key, else where `select` finds it: before the entries of
    this architecture for larger vocabularies, and before the defaults."""
    key = re.escape(f'    Entry("{arch}", {itemsize}, {max_v},')
    source = re.sub(rf"^{key}.*\n(?:^ {{10}}.*\n)*", "", source, flags=re.MULTILINE)
    limit = math.inf if max_v is None else max_v
    for found in re.finditer(r'^    Entry\("([^"]+)", (\d+), (\w+),', source, flags=re.MULTILINE):
        theirs = math.inf if found[3] == "None" else int(found[3])
        if found[1] == "*" or (found[1], int(found[2])) == (arch, itemsize) and theirs > limit:
            return source[:found.start()] + line + source[found.start():]
    raise ValueError(f'{TABLE_FILE}: expected a TABLE with defaults, Entry("*", ...), got none; add the entry by hand:\n{line}')


def tune(vocabulary, dtype, device, seconds):
    """{"forward": [Trial], "backward": [Trial]} on this GPU, each direction in half of the time."""
    from fastkl.kernels import config
    from fastkl.kernels.launch import architecture

    arch, itemsize = architecture(device)[0], DTYPES[dtype].itemsize
    trials = {}
    for direction in DIRECTIONS:
        present = config.select(direction, arch, itemsize, vocabulary)
        deadline = time.monotonic() + seconds / len(DIRECTIONS)
        found = candidates(present, itemsize, vocabulary)
        trials[direction] = search(found, refusal(direction, vocabulary, dtype, device), timing(direction, vocabulary, dtype, device), deadline)
        harness.release()
    return trials


def report(trials, limit=8):
    """The best trials of one direction, and the present one, as lines of text."""
    shown = sorted(trials, key=lambda trial: trial.score)[:limit]
    lines = [f"{len(trials)} tried, {sum(trial.refused is not None for trial in trials)} refused"]
    for trial in dict.fromkeys([*map(trials.index, shown), 0]):
        one = trials[trial]
        figures = one.refused or "  ".join(f"{rows} rows {ms:.4f} ms" for rows, ms in one.times.items())
        mark = "  (present)" if trial == 0 else ""
        lines.append(f"  threads {one.config.threads:>3}  groups {one.config.groups}  segment {one.config.segment:>6}  "
                     f"registers {one.config.max_registers or '-':>3}  {figures}{mark}")
    return "\n".join(lines)


def main(argv=None):
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="element type; an entry is for its size (default: bf16)")
    parser.add_argument("--vocabulary", type=int, default=128256, metavar="V", help="length of a row to tune for (default: %(default)s)")
    parser.add_argument("--max-v", type=int, metavar="V", help="the entry is for vocabularies up to this one (default: any)")
    parser.add_argument("--seconds", type=float, default=400.0, help="time for the search (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every trial to FILE")
    parser.add_argument("--write", action="store_true", help="put the entry into kernels/config.py")
    arguments = parser.parse_args(argv)
    if arguments.vocabulary < 2 or (arguments.max_v is not None and arguments.max_v < arguments.vocabulary):
        parser.error(f"--vocabulary: expected at least 2, and at most --max-v, got {arguments.vocabulary}; an entry is tuned inside its range")
    if not torch.cuda.is_available():
        print("no CUDA here: launch configurations are measured, not guessed; the defaults in kernels/config.py stay", file=sys.stderr)
        return 2
    from fastkl.kernels.launch import architecture

    device = torch.device("cuda")
    trials = tune(arguments.vocabulary, arguments.dtype, device, arguments.seconds)
    command = "python3 -m benchmarks.tune " + " ".join(sys.argv[1:] if argv is None else argv)
    origin = {**provenance(command), "gpu": torch.cuda.get_device_name(device)}
    if arguments.json:
        write_json(arguments.json, {**origin, "trials": {name: [asdict(trial) for trial in found] for name, found in trials.items()}})
    chosen = {}
    for direction, found in trials.items():
        print(f"{direction}: {report(found)}")
        best = winner(found)
        if best is None:
            print(f"{direction}: no candidate passed; the first was refused for: {found[0].refused}", file=sys.stderr)
            return 1
        everything = sum(1 for _ in candidates(found[0].config, DTYPES[arguments.dtype].itemsize, arguments.vocabulary))
        tried = f"{len(found)} of {everything} candidates"
        machine = f"{origin['gpu']}, Triton {origin['versions']['triton']}, {origin['date'][:10]}"
        chosen[direction] = replace(best.config, measured=sentence(best, found[0], arguments.vocabulary, machine, tried))
    arch, itemsize = architecture(device)[0], DTYPES[arguments.dtype].itemsize
    line = entry_line(arch, itemsize, arguments.max_v, chosen)
    print(line, end="")
    if arguments.write:
        write_bytes(TABLE_FILE, with_entry(TABLE_FILE.read_text(encoding="utf-8"), arch, itemsize, arguments.max_v, line).encode())
        print(f"written to {TABLE_FILE}; run the tests before it is committed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
