"""Finds launch configurations on the GPU at hand: an entry of the table in kernels/config.py, with the measurement it rests on.

    python3 -m benchmarks.tune --dtype bf16 [--vocabulary 128256] [--seconds 400] [--json FILE] [--write]

Tries 16-byte blocks per thread, how many entries of a row a program reads (and so into how many programs a row is split), a limit on registers and,
for backward, threads (a program of forward is one warp); forward and backward are each shared by kl_divergence and token_stats. The search (details
in benchmarks/tune_trials.py):

1. Every candidate is compiled and checked as it is timed, in as many processes as there are cores: values or gradients against float64, the same bits
   for a row alone and in a batch, and nothing spilled.
2. What passed is timed in short; the best FINALISTS and the present configuration again, in turns, so that a drift of the GPU meets all alike.
3. What leads there passes the check of every variant that the entry is for (element types of the size, aligned or not, soft cap, gradients to P, to Q
   and to both) or is refused, and the next one leads. A whole check takes ten times as long as the first: only the leading ones need it.

The winner has the smallest mean of its times by WEIGHTS (the table does not know the number of rows), and beats the present configuration by more
than NOISE; else that one stays. Whatever ends the search, time included, what was found by then is printed and written.

An entry for this architecture is found before the defaults for any ("*"), so one without --max-v would hide their entries for small vocabularies,
which are made for rows that fit one tile. Each of those that would no longer be found is therefore written too, for this architecture, with its own
`measured`: what small vocabularies get does not change until they are tuned (--vocabulary 1000 --max-v 2048).

Prints the entries; --write puts them into kernels/config.py. Exit code 0: done; 1: no candidate passed; 2: no CUDA GPU here, or wrong use.
"""
import argparse
import functools
import itertools
import math
import os
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace

import torch

from benchmarks.cases import DTYPES
from benchmarks.record import duration, has_gpu, output_file, provenance, write_json
from benchmarks.tune_entry import DIRECTIONS, entry_line, hidden_by, sentence, write_entries
from benchmarks.tune_trials import WORKER_BYTES, Job, Timer, all_variants, begin, check, failed, timed_variants
from benchmarks.workers import Workers

# Of the logarithms of the times in a configuration's score, by operation times by number of rows. The KL is what the package is for; training and
# scoring come with thousands of rows, and with few the launches take most of the time, whatever the configuration.
WEIGHTS = {
    "forward": {"kl_divergence": 3, "token_stats": 1},
    "backward": {"kl_divergence dp": 3, "kl_divergence dq": 1, "token_stats dp": 1},
    "rows": {64: 1, 8192: 3},
}
# Of forward: groups, segments, registers; it has the threads that it has now, one warp.
FORWARD = (1, 2), (8192, 16384, 32768), (None, 128)
# Of backward.
THREADS, GROUPS, SEGMENTS = (128, 256, 512), (1, 2, 4), tuple(2**k for k in range(9, 18))
REGISTERS = (None, 96, 128, 168)
MOST_SEGMENTS = 64  # of a row: more are all merging and no reading
FINALISTS, FINAL_ROUNDS = 6, 15
# A difference that two measurements of the same configuration may have; a change for less is none.
NOISE = 0.01
# When the parts of the search end at the latest, as shares of its time; the first and the last leave GRACE to what still runs.
ENDS = {"screening": 0.42, "short times": 0.68, "final": 0.84, "whole check": 0.95}
GRACE = 0.03


@dataclass(eq=False)
class Trial:
    """A candidate and what became of it: why it was refused, or its milliseconds, {operation: {rows: ms}}, first in short, then in the final."""

    config: object
    refused: str | None = None
    registers: int | None = None
    spilled: int = 0
    answers: int = 0
    short: dict[str, dict[int, float]] = field(default_factory=dict)
    times: dict[str, dict[int, float]] = field(default_factory=dict)
    rounds: int = 0
    whole_check: bool = False

    @property
    def score(self):
        """Mean of the times of the final; infinite for what was refused or not in it."""
        return math.inf if self.refused else mean(self.times)


def mean(times):
    """Geometric mean by WEIGHTS of {operation: {rows: ms}}; infinite without times."""
    weights = {**WEIGHTS["forward"], **WEIGHTS["backward"]}
    parts = [(weights[operation] * WEIGHTS["rows"][rows], math.log(ms)) for operation, by_rows in times.items() for rows, ms in by_rows.items()]
    return math.exp(sum(weight * log for weight, log in parts) / sum(weight for weight, _ in parts)) if parts else math.inf


# Candidates -----------------------------------------------------------------------------------------------------


def candidates(present, itemsize, vocabulary, direction):
    """The present configuration first, then all others; of backward, those whose threads divide a segment that is not longer than a row needs.

    In an order without a pattern, the same every time: where the time ends the search, every part of the space has been looked at. Those with another
    limit on registers come last: they differ from the others by a few percent, if the limit binds at all.
    """
    yield present
    others = list(_others(present, itemsize, vocabulary, direction))
    random.Random(0).shuffle(others)
    yield from sorted(others, key=lambda other: other.max_registers != present.max_registers)


def _others(present, itemsize, vocabulary, direction):
    if direction == "forward":
        yield from _others_of_forward(present, vocabulary)
        return
    lanes, longest = 16 // itemsize, 2 ** math.ceil(math.log2(max(vocabulary, SEGMENTS[0])))
    for threads, groups, segment, registers in itertools.product(THREADS, GROUPS, SEGMENTS, REGISTERS):
        if segment % (threads * groups * lanes) or segment > longest or segment * MOST_SEGMENTS < vocabulary:
            continue
        # More than this a thread cannot have: the limit would say nothing.
        if registers is not None and registers * threads > 65536:
            continue
        found = replace(present, threads=threads, groups=groups, segment=segment, max_registers=registers, measured="")
        if replace(found, measured=present.measured) != present:
            yield found


def _others_of_forward(present, vocabulary):
    """One for every length that segments of this vocabulary get."""
    from fastkl.kernels.config import segment_length

    known = {(present.groups, segment_length(vocabulary, present.segment), present.max_registers)}
    for groups, segment, registers in itertools.product(*FORWARD):
        key = groups, segment_length(vocabulary, segment), registers
        if key not in known:
            known.add(key)
            yield replace(present, groups=groups, segment=segment, max_registers=registers, measured="")


# The search -----------------------------------------------------------------------------------------------------


def _judge(trial, variant, verdict, present):
    """Adds a verdict; a candidate that spills is refused, the present configuration, which is in use, only where it is wrong."""
    trial.answers += 1
    trial.spilled = max(trial.spilled, verdict.spilled)
    trial.registers = max(filter(None, (trial.registers, verdict.registers)), default=None)
    trial.refused = trial.refused or verdict.refused
    if verdict.spilled and not present:
        trial.refused = trial.refused or f"{variant.name}: spills {verdict.spilled} bytes per thread"


def _alternating(trials):
    """(direction, trial): forward, backward, forward, …"""
    lists = [[(direction, trial) for trial in trials[direction]] for direction in DIRECTIONS]
    return [pair for both in itertools.zip_longest(*lists) for pair in both if pair is not None]


def _asked(pool, some, variants, job, owner, deadline, grace):
    """Runs the jobs of some (direction, trial) and judges; of a trial that is refused no more jobs are begun."""
    def jobs():
        for direction, trial in some:
            for variant in variants[direction]:
                if not trial.refused:
                    yield job(direction, trial.config, variant)

    for done, verdict in pool.run(jobs(), deadline, grace):
        trial, present = owner[done.direction, done.config]
        _judge(trial, done.variant, verdict, present)


def screen(trials, found, variants, pool, job, deadline, grace=0.0):
    """Fills trials, {direction: [Trial]}: the candidates whose check ended in time, in their order, after the present one, which is always there."""
    everything = {direction: [Trial(config) for config in found[direction]] for direction in DIRECTIONS}
    owner = {(direction, trial.config): (trial, trial is every[0]) for direction, every in everything.items() for trial in every}
    alternating = _alternating(everything)
    try:
        # What all others need too is compiled, and kept on disk, once the present ones are through.
        _asked(pool, alternating[:len(DIRECTIONS)], variants, job, owner, math.inf, 0.0)
        _asked(pool, alternating[len(DIRECTIONS):], variants, job, owner, deadline, grace)
    finally:
        for direction, (present, *others) in everything.items():
            trials[direction][:] = [present, *(trial for trial in others if trial.refused or trial.answers == len(variants[direction]))]


def _measure(trial, measure):
    """The result of a measurement; where it fails, the trial is refused."""
    try:
        return measure()
    except Exception as error:  # what a tiny problem does not show
        trial.refused = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        return {}


def time_shortly(trials, timer, deadline):
    """Short times of all that passed, the present ones in any case."""
    for number, (direction, trial) in enumerate(_alternating(trials)):
        if not trial.refused and (number < len(DIRECTIONS) or time.monotonic() < deadline):
            trial.short = _measure(trial, functools.partial(timer.times, direction, trial.config))


def final(trials, timer, deadline):
    """Times of the present ones and of the FINALISTS best others: the medians of up to FINAL_ROUNDS rounds, one at least."""
    contenders = []
    for direction in DIRECTIONS:
        present, *others = trials[direction]
        ready = sorted((trial for trial in others if not trial.refused and trial.short), key=lambda trial: mean(trial.short))
        contenders += [(direction, trial, []) for trial in [present, *ready[:FINALISTS]]]
    for number in range(FINAL_ROUNDS):
        if number and time.monotonic() > deadline:
            break
        for direction, trial, measured in contenders:
            if not trial.refused:
                measured.append(_measure(trial, functools.partial(timer.times, direction, trial.config, thorough=True)))
    for _, trial, measured in contenders:
        if measured and not trial.refused:
            trial.rounds = len(measured)
            trial.times = {operation: {rows: statistics.median(one[operation][rows] for one in measured) for rows in by_rows}
                           for operation, by_rows in measured[0].items()}


def winner(trials):
    """The Trial to use: the fastest, unless the present one, which comes first, is within NOISE of it; None where none has times."""
    best = min(trials, key=lambda trial: trial.score, default=None)
    if best is None or best.score == math.inf:
        return None
    return trials[0] if trials[0].score <= best.score * (1 + NOISE) else best


def decided(trials):
    """The winner among what passed the whole check and the present configuration."""
    return winner([trial for trial in trials if trial is trials[0] or trial.whole_check])


def confirm(trials, variants, pool, job, deadline, grace=0.0):
    """The whole check of what leads in each direction, until it is passed or the present configuration leads: afterwards `winner` has passed it."""
    while True:
        leading = [(direction, winner(trials[direction])) for direction in DIRECTIONS if trials[direction]]
        leading = [(direction, trial) for direction, trial in leading
                   if trial is not None and trial is not trials[direction][0] and not trial.whole_check]
        if not leading:
            return
        for _, trial in leading:
            trial.answers = 0
        _asked(pool, leading, variants, job, {(direction, trial.config): (trial, False) for direction, trial in leading}, deadline, grace)
        for direction, trial in leading:
            trial.whole_check = not trial.refused and trial.answers == len(variants[direction])
            if not trial.refused and not trial.whole_check:
                trial.refused = "no time was left for its whole check"


def open_pool(device):
    """The processes that check: one per core less two, as far as the GPU's memory goes. Tests put another one in its place."""
    count = min(len(os.sched_getaffinity(0)) - 2, torch.cuda.mem_get_info(device)[0] // WORKER_BYTES)
    return Workers(check, failed, max(1, count), functools.partial(begin, str(device)))


class Search:
    """The search on this GPU for both directions, and how far it came: trials and the reason why it stopped early, if it did."""

    def __init__(self, arch, vocabulary, dtype, seconds, device):
        from fastkl.kernels import config

        self.vocabulary, self.dtype, self.seconds, self.device = vocabulary, dtype, seconds, device
        itemsize = DTYPES[dtype].itemsize
        self.found = {direction: list(candidates(config.select(direction, arch, itemsize, vocabulary), itemsize, vocabulary, direction))
                      for direction in DIRECTIONS}
        self.trials = {direction: [] for direction in DIRECTIONS}
        self.stopped = None

    def run(self, save):
        """Every part in turn, save() after each; what is raised becomes the reason why it stopped, and nothing is lost."""
        pool = None
        try:
            begun = time.monotonic()
            ends = {part: begun + share * self.seconds for part, share in ENDS.items()}
            grace = GRACE * self.seconds
            pool = open_pool(self.device)
            timer = Timer(self.vocabulary, self.dtype, self.device, tuple(WEIGHTS["rows"]))
            timed, whole = ({direction: variants(direction, *rest) for direction in DIRECTIONS}
                            for variants, rest in ((timed_variants, (self.dtype, self.vocabulary)), (all_variants, (self.dtype,))))
            job = functools.partial(Job, vocabulary=self.vocabulary, device=str(self.device))
            for part, step in (
                ("screening", lambda: screen(self.trials, self.found, timed, pool, job, ends["screening"], grace)),
                ("short times", lambda: time_shortly(self.trials, timer, ends["short times"])),
                ("final", lambda: final(self.trials, timer, ends["final"])),
                ("whole check", lambda: confirm(self.trials, whole, pool, job, ends["whole check"], grace)),
            ):
                step()
                print(f"{time.monotonic() - begun:6.1f} s  {part}: {self._progress()}", flush=True)
                save()
        except (Exception, KeyboardInterrupt) as error:
            self.stopped = f"{type(error).__name__}: {' '.join(str(error).split())}"[:2000]
            print(f"the search stopped early: {self.stopped}", file=sys.stderr)
        finally:
            if pool is not None:
                pool.close()

    def _progress(self):
        return "; ".join(f"{direction} {len(found)} of {len(self.found[direction])} tried, {sum(trial.refused is not None for trial in found)} "
                         f"refused, {sum(bool(trial.short) for trial in found)} timed" for direction, found in self.trials.items())


# The command ----------------------------------------------------------------------------------------------------


def report(trials, limit=8):
    """The best trials of one direction and the present one, and why others were refused, as lines of text; times in ms by rows."""
    lines = []
    shown = sorted(trials, key=lambda trial: (trial.score, math.inf if trial.refused else mean(trial.short)))[:limit]
    for trial in [*shown, *(trial for trial in trials[:1] if trial not in shown)]:
        one, times = trial.config, trial.times or trial.short
        figures = "  ".join(f"{operation} {' / '.join(f'{ms:.4f}' for ms in by_rows.values())}" for operation, by_rows in times.items())
        state = f"refused: {trial.refused}" if trial.refused else "" if trial.times else "in short" if times else "not timed"
        lines.append(f"  threads {one.threads:>3}  groups {one.groups}  segment {one.segment:>6}  registers {one.max_registers or '-':>3}  "
                     f"{figures}  {state}{'  (present)' if trial is trials[0] else ''}".rstrip())
    reasons = Counter(trial.refused for trial in trials if trial.refused)
    return "\n".join(lines + [f"  refused {count} times: {reason}" for reason, count in reasons.most_common(limit)])


def _parsed(argv):
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="element type; an entry is for its size (default: bf16)")
    parser.add_argument("--vocabulary", type=int, default=128256, metavar="V", help="length of a row to tune for (default: %(default)s)")
    parser.add_argument("--max-v", type=int, metavar="V", help="the entry is for vocabularies up to this one (default: any)")
    parser.add_argument("--seconds", type=duration, default=400.0, help="time for the search, from here on (default: %(default)s)")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write every trial to FILE, after each part of the search")
    parser.add_argument("--write", action="store_true", help="put the entries into kernels/config.py")
    arguments = parser.parse_args(argv)
    if arguments.vocabulary < 2 or (arguments.max_v is not None and arguments.max_v < arguments.vocabulary):
        parser.error(f"--vocabulary: expected at least 2, and at most --max-v, got {arguments.vocabulary}; an entry is tuned inside its range")
    return arguments


def _saved(path, record):
    """Whether the record is in the file, or none was asked for; says so where it is not."""
    try:
        if path:
            write_json(path, record)
        return True
    except OSError as error:
        print(f"--json {path}: {error}", file=sys.stderr)
        return False


def main(argv=None):
    """The command line; returns the exit code."""
    arguments = _parsed(argv)
    if not has_gpu("tune"):
        return 2
    from fastkl.kernels.launch import architecture

    device = torch.device("cuda")
    arch, itemsize = architecture(device)[0], DTYPES[arguments.dtype].itemsize
    command = "python3 -m benchmarks.tune " + " ".join(sys.argv[1:] if argv is None else argv)
    origin = {**provenance(command), "gpu": torch.cuda.get_device_name(device), "architecture": arch, "weights": WEIGHTS}
    search = Search(arch, arguments.vocabulary, arguments.dtype, arguments.seconds, device)

    def save(entries=()):
        totals = {direction: len(found) for direction, found in search.found.items()}
        trials = {direction: [{**asdict(trial), "score": trial.score} for trial in found] for direction, found in search.trials.items()}
        return _saved(arguments.json, {**origin, "stopped": search.stopped, "candidates": totals, "entries": list(entries), "trials": trials})

    if not save():  # now, not when the time is over
        return 2
    search.run(save)
    save()
    chosen, machine = {}, f"{origin['gpu']}, Triton {origin['versions']['triton']}, {origin['date'][:10]}"
    for direction, found in search.trials.items():
        tried = f"{len(found)} of {len(search.found[direction])} candidates"
        print(f"{direction}: {tried}\n{report(found)}")
        best = decided(found)
        if best is not None:
            measured = sentence(best, found[0], arguments.vocabulary, machine, tried)
            chosen[direction] = replace(best.config, measured=measured)
    missing = [direction for direction in DIRECTIONS if direction not in chosen]
    for direction in missing:
        why = search.stopped or next((trial.refused for trial in search.trials[direction]), "none was tried")
        print(f"{direction}: no candidate passed and was timed: {why}", file=sys.stderr)
    if missing:
        return 1
    everything = {**hidden_by(arch, itemsize, arguments.max_v), arguments.max_v: chosen}
    lines = {limit: entry_line(arch, itemsize, limit, configs) for limit, configs in everything.items()}
    print("".join(lines.values()), end="")
    save(lines.values())
    return write_entries(lines, arch, itemsize) if arguments.write else 0


if __name__ == "__main__":
    sys.exit(main())
