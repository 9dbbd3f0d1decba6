"""The gate against regressions: static costs compared with benchmarks/static_baseline.json."""

import itertools
import json
import math
import sys
from pathlib import Path

import triton

BASELINE = Path(__file__).with_name("static_baseline.json")
SLACK = 0.05  # compilers differ by 3 % from one version to the next
CASE = ("kernel", "arch", "dtype", "aligned")
# The figures compared: from which share of the baseline's on, or whether at all, more is worse.
SLACKS = {
    **dict.fromkeys(("instructions_per_pair", "instructions_per_pair_general"), SLACK),
    **dict.fromkeys(("overhead_per_pair", "ex2_per_pair"), SLACK),
    **{"spill_bytes": 0.0, "narrow_loads": 0.0, "widest_load_bytes": 0.0, "registers": math.inf},
}


def case_of(record):
    alignment = "aligned" if record["aligned"] else "misaligned"
    return f"{record['kernel']} {record['arch']} {record['dtype']} {alignment}"


def read_baseline(path):
    try:
        data = json.loads(Path(path).read_text())
        {case_of(record): [record[key] for key in SLACKS] for record in data["records"]}
        data["versions"]["triton"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--baseline: expected a file that --write-baseline wrote, got {path} "
            f"({type(error).__name__}: {error}); remedy: --write-baseline {path}"
        ) from None
    return data


def _worse(key, now, before):
    if now is None or before is None:
        return now is None
    limit = before * (1 + SLACKS[key])
    return now < before if key == "widest_load_bytes" else now > limit


def compare(records, baseline):
    """Return (regressions, other changes), a sentence each, against the baseline's records.

    Only the architectures and element types in `records` are expected to be there.
    """
    measured = {(record["arch"], record["dtype"]) for record in records}
    now = {case_of(record): record for record in records}
    before = {
        case_of(record): record
        for record in baseline["records"]
        if (record["arch"], record["dtype"]) in measured
    }
    regressions = [f"{case}: not in the baseline" for case in now if case not in before]
    changes = [f"{case}: in the baseline only" for case in before if case not in now]
    for case, key in itertools.product(now.keys() & before.keys(), SLACKS):
        new, old = now[case][key], before[case][key]
        share = "" if new is None or not old else f" ({100 * (new / old - 1):+.1f} %)"
        if new != old:
            sentence = f"{case}: {key} {old} -> {new}{share}"
            (regressions if _worse(key, new, old) else changes).append(sentence)
    return sorted(regressions), sorted(changes)


def judge(records, path):
    """Compare with the baseline at `path` and prints every change; returns it for the JSON."""
    baseline = read_baseline(path)
    here, there = triton.__version__, baseline["versions"]["triton"]
    regressions, changes = compare(records, baseline) if here == there else ([], [])
    print(*(f"changed: {line}" for line in changes), sep="\n")
    print(*(f"regression: {line}" for line in regressions), sep="\n", file=sys.stderr)
    verdict = f"{len(regressions)} regressions, {len(changes)} other changes"
    if here != there:
        verdict = f"holds for Triton {there}, this is {here}: nothing compared"
    print(f"baseline: {verdict}; --write-baseline renews it where a change is meant")
    found = {"triton": there, "compared": here == there}
    return {**found, "regressions": regressions, "changes": changes}
