"""The gate against regressions: static costs compared with those of
benchmarks/static_baseline.json, for `benchmarks.static_costs --baseline`.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import triton

from benchmarks.record import provenance, write_json

BASELINE = Path(__file__).with_name("static_baseline.json")
# Compilers differ by 3 % from one version to the next; what a change of ours costs should be seen.
SLACK = 0.05
# The figures compared, and whether a number is worse than the baseline's.
WORSE = {
    "instructions_per_pair": lambda now, before: now > before * (1 + SLACK),
    "instructions_per_pair_general": lambda now, before: now > before * (1 + SLACK),
    "overhead_per_pair": lambda now, before: now > before * (1 + SLACK),
    "ex2_per_pair": lambda now, before: now > before * (1 + SLACK),
    "spill_bytes": lambda now, before: now > before,
    "narrow_loads": lambda now, before: now > before,
    "widest_load_bytes": lambda now, before: now < before,
    "registers": lambda now, before: False,
}


def case_of(record):
    """Return the names of a record: kernel, architecture, element type, alignment."""
    return f"{record['kernel']} {record['arch']} {record['dtype']} {'aligned' if record['aligned'] else 'misaligned'}"


def read_baseline(path):
    """The baseline as write_baseline wrote it; ValueError where it is none."""
    try:
        data = json.loads(Path(path).read_text())
        {case_of(record): [record[key] for key in WORSE] for record in data["records"]}
        data["versions"]["triton"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--baseline: expected a file that --write-baseline wrote, got {path} "
            f"({type(error).__name__}: {error}); remedy: --write-baseline {path}"
        ) from None
    return data


def write_baseline(path, costs, command):
    """Writes the baseline: a record per kernel, architecture, element type and alignment, whole or
    not at all.
    """
    records = sorted(
        (
            {key: asdict(cost)[key] for key in ("kernel", "arch", "dtype", "aligned", *WORSE)}
            for cost in costs
        ),
        key=case_of,
    )
    write_json(path, {**provenance(command), "records": records})


def compare(costs, baseline, *, kernels=None):
    """(regressions, other changes), one sentence each, of what was compiled against the baseline's
    records.

    Only the architectures and element types in `costs`, and of these only `kernels` if given, are
    expected to be there.
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
        if (
            case not in now
            and (record["arch"], record["dtype"]) in measured
            and (not kernels or record["kernel"] in kernels)
        ):
            changes.append(f"{case}: in the baseline only")
    return regressions, changes


def judge(costs, path, kernels):
    """Compares with the baseline at `path` and prints every change; the record of it for the JSON."""
    baseline = read_baseline(path)
    written_by = baseline["versions"]["triton"]
    if triton.__version__ != written_by:
        print(
            f"baseline: holds for Triton {written_by}, this is {triton.__version__}: nothing "
            f"compared"
        )
        return {"triton": written_by, "compared": False, "regressions": [], "changes": []}
    regressions, changes = compare(costs, baseline, kernels=kernels)
    for line in changes:
        print(f"changed: {line}")
    for line in regressions:
        print(f"regression: {line}", file=sys.stderr)
    verdict = (
        f"{len(regressions)} regressions and {len(changes)} other changes"
        if regressions or changes
        else "nothing changed"
    )
    remedy = (
        "; if that is as it should be, update the baseline: python -m benchmarks.static_costs "
        "--write-baseline"
        if regressions or changes
        else ""
    )
    print(f"baseline: {len(costs)} compared, {verdict}{remedy}")
    return {"triton": written_by, "compared": True, "regressions": regressions, "changes": changes}
