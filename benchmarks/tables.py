"""Turn rows of speed.py into tables: fastkl and the best other provider, and every figure.

A file of results is {"gpu", "versions", "commit", "command", "date", "sections": {name: {"status",
"rows"}}}. Files written before 2026-12 have the bandwidth of a copy as a separate row.
"""

import json
import math
import re

from benchmarks import cases, linear_cases, record

OURS, PLAIN = "fastkl", "torch"
# Variants of this package: all logits in memory; value and gradient in one launch.
ALSO_OURS = ("fastkl, through logits", "fastkl, one launch")
MAIN, LINEAR_MAIN = cases.Workload().as_dict(), linear_cases.LinearWorkload().as_dict()
TIMED = ("main", "peers", "divergences", "fused", "sweep", "scaling", "linear", "linear_sweep")
# Operations with a gradient to the first logits only: omitted from their labels.
ONE_GRADIENT = ("token_stats", "logprob", "logprob_entropy", "entropy")
NOISE = 0.01  # relative difference expected between two measurements of one case
RED, NONE = "🔴", "–"


def read(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: expected results in JSON, got {type(error).__name__}: {error}; measure them"
            " again (benchmarks/README.md says how), or take the file from git"
        ) from None


def gpu_results(folder):
    """Find [(path, data)]: for every GPU the newest file with times of the main shape, newest
    first, on equal dates an H200 first.
    """
    files = [(path, read(path)) for path in folder.glob("*/*.json")]
    # The folder also has files of tune and accuracy.
    found = [file for file in files if any(map(timed, rows_of(file[1], "main")))]
    found.sort(key=lambda file: file[1]["date"])
    newest = {gpu_name(data): (path, data) for path, data in found}.values()
    return sorted(newest, key=lambda f: (f[1]["date"][:10], "H200" in gpu_name(f[1])))[::-1]


def gpu_name(data):
    return (data.get("gpu") or {}).get("name", "unnamed GPU")


def rows_of(data, section):
    rows = data.get("sections", {}).get(section, {}).get("rows", [])
    return [row for row in rows if "workload" in row]


def label(workload):
    """Label a workload, the same in every table: the operation, and the shape if not the main
    one.
    """
    if "mode" in workload:
        main, parts = LINEAR_MAIN, [f"linear {workload['mode']}"]
    else:
        main, parts = MAIN, [f"{workload['operation']} d{workload['wrt']}"]
        if workload["operation"] in ONE_GRADIENT:
            parts[0] = parts[0].removesuffix(" dp")
    sizes = [size for size in ("rows", "hidden", "vocabulary") if size in workload]
    if any(workload[size] != main[size] for size in sizes):
        parts.append(" × ".join(str(workload[size]) for size in sizes))
    kinds = ("dtype", "layout")
    return ", ".join(parts + [workload[k] for k in kinds if workload.get(k) != main.get(k)])


def by_workload(data, sections=TIMED):
    """Return {label: {provider: row}}, with the first row that has times among the sections."""
    found = {}
    for row in (row for section in sections for row in rows_of(data, section)):
        rows, provider = found.setdefault(label(row["workload"]), {}), row["provider"]
        if (
            provider != linear_cases.FLOOR
            and not timed(rows.get(provider))
            and (timed(row) or provider not in rows)
        ):
            rows[provider] = row
    return found


def timed(row):
    if not row or row.get("status") != "ok":
        return {}
    found = {p: number(figures.get("median_ms")) for p, figures in (row.get("times") or {}).items()}
    return {phase: milliseconds for phase, milliseconds in found.items() if milliseconds}


def standing(data):
    faster, counted = [], 0
    for name, rows in by_workload(data).items():
        ours, found = timed(rows.get(OURS)), [(who, timed(row)) for who, row in others_of(rows)]
        counted += bool(ours) and any(medians for _, medians in found)
        faster += [
            f"{who} at `{name}` ({phase}, {times(ours[phase] / theirs)})"
            for who, medians in found
            for phase, theirs in medians.items()
            if ours.get(phase, 0.0) > theirs * (1 + NOISE)
        ]
    words = f"Faster than fastkl by more than 1 % of device time, at {counted} workloads measured "
    return f"{words}beside others: {'; '.join(faster) or 'none'}."


def others_of(rows):
    return [(who, row) for who, row in rows.items() if who not in (OURS, *ALSO_OURS)]


# Cells


def number(value):
    return float(value) if value is not None and math.isfinite(float(value)) else None


def digits(value, count=3):
    """Format a number with this many digits, never in powers of ten; a dash for None."""
    value = number(value)
    if value is None:
        return NONE
    return f"{value:.0f}" if abs(value) >= 10**count - 0.5 else f"{value:#.{count}g}".rstrip(".")


def times(ratio):
    return f"{ratio:.2f} ×" if ratio < 2 else f"{digits(ratio, 2)} ×"


def amount(value):
    value = number(value)
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value is not None and abs(value) >= 0.9995 * size:
            return f"{digits(value / size)} {unit}"
    return NONE if value is None else f"{value:.0f} B"


def text(words, length=200):
    """Format the first line of an external message for a table cell."""
    line = (str(words).strip().splitlines() or [""])[0]
    line = line if len(line) <= length else line[: length - 1] + "…"
    return re.sub(r"([\\|*_`])", r"\\\1", line).replace("<", "&lt;")


def why(row):
    """Format the reason for a missing time, or an error of the gate."""
    if not row:
        return NONE
    reason = text(row.get("reason"))
    known = {"ok": "correct, not timed", "wrong": f"{RED} **wrong: {reason}**"}
    return known.get(row["status"], f"{row['status']}: {reason}")


def peak(row):
    return amount(((row or {}).get("memory") or {}).get("peak_bytes"))


# Tables


PEAKS = "peak beside the inputs: fastkl / best other / torch"


def summary(data, sections, what, title, share):
    lines = list(summary_lines(data, sections, share).values())
    return (
        record.markdown([what, title, "best other", "plain torch", PEAKS], lines) if lines else ""
    )


def summary_lines(data, sections, share):
    """Return a line per workload at the main shape, by name: fastkl, the best other, plain torch.
    share: key and format of a figure next to our time.
    """
    lines = {}
    for name, rows in by_workload(data, sections).items():
        if "," in name:
            continue
        phase = "forward" if name == "linear forward" else "both"
        ours, mine, cell = rows.get(OURS), timed(rows.get(OURS)).get(phase), why(rows.get(OURS))
        if mine:
            rate = number(ours["times"][phase].get(share[0]))
            cell = f"{digits(mine)} ms" + ("" if rate is None else share[1].format(rate))
        others = [(timed(row)[phase], who) for who, row in others_of(rows) if phase in timed(row)]
        best = min(others, default=(0, None))[1]
        rival = f"{best} {_beside(rows[best], phase, mine)}" if best else NONE
        memory = " / ".join(map(peak, (ours, rows.get(best), rows.get(PLAIN))))
        lines[name] = [f"`{name}`", cell, rival, _beside(rows.get(PLAIN), phase, mine), memory]
    return lines


def _beside(row, phase, ours):
    if theirs := timed(row).get(phase):
        return f"{digits(theirs)} ms" + (f", {times(theirs / ours)}" if ours else "")
    return why(row)


# Figures of a row by key: forward / backward / both.
FIGURES = {
    "median_ms": "forward / backward / both, ms",
    "percent_of_copy": "of a copy, %",
    "ratio_to_floor": "× the bare products",
    "tflop_per_s": "TFLOP/s",
    "wall_ms": "one call on the clock, ms",
}
MEMORY = {"peak_bytes": "peak beside the inputs", "held_bytes": "held for backward"}


def timings(rows):
    names = list(dict.fromkeys(label(row["workload"]) for row in rows))
    rows = sorted(rows, key=lambda row: names.index(label(row["workload"])))
    head = ["workload", "provider", *FIGURES.values(), *MEMORY.values(), "error", "note"]
    return record.markdown(head, map(line, rows)) if rows else ""


def line(row):
    found, memory, cells = row["times"] if timed(row) else {}, row.get("memory") or {}, []
    for key in FIGURES:
        figures = [digits(phase.get(key), 4 - (key != "median_ms")) for phase in found.values()]
        cells.append(" / ".join(figures) if {*figures} - {NONE} else NONE)
    cells[0] = cells[0] if found else why(row)
    cells += [amount(memory.get(key)) for key in MEMORY]
    errors = {name: off for name, off in (row.get("error") or {}).items() if "," not in name}
    cells.append(", ".join(f"{name} {float(off):.0e}" for name, off in errors.items()) or NONE)
    name, provider = f"`{label(row['workload'])}`", text(row["provider"])
    return [name, provider, *cells, text(row.get("note") or "")]
