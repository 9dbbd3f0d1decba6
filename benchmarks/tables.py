"""Turns rows of speed.py into tables: the best beside fastkl, every figure, and growth with size.

A file of results is {"gpu", "versions", "commit", "command", "date", "sections": {name: {"status",
"rows"}}}. Files written before 2026-12 have the bandwidth of a copy as a row of its own.
"""

import io
import json
import math

from benchmarks import accuracy
from benchmarks.cases import PHASES, Workload
from benchmarks.linear_cases import FLOOR, LinearWorkload
from benchmarks.record import markdown

OURS, PLAIN = "fastkl", "torch"
# This package too: where there is memory for all logits, and where the GPU was found fit for it.
ALSO_OURS = ("fastkl, through logits", "fastkl, one launch")
MAIN, LINEAR_MAIN = Workload().as_dict(), LinearWorkload().as_dict()
TIMED = ("main", "peers", "fused", "sweep", "scaling", "linear", "linear_sweep")
# Operations with a gradient to the first logits only: their names go without it.
ONE_GRADIENT = ("token_stats", "logprob", "logprob_entropy", "entropy")
NOISE = 0.01  # two measurements of the same may differ by so much
RED, NONE = "🔴", "–"


def gpu_results(folder):
    """Finds [(path, data)]: of every GPU the newest file in which the main shape was timed.

    The newest of them comes first, of one day an H200's.
    """
    newest = {}
    for path in sorted(folder.glob("*/*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or not any(map(timed, rows_of(data, "main"))):
            continue  # other files lie there too: of tune, of accuracy
        name = gpu_name(data)
        if name not in newest or data["date"] > newest[name][1]["date"]:
            newest[name] = path, data

    def rank(found):
        date = found[1]["date"]
        return date[:10], "H200" in gpu_name(found[1]), date

    return sorted(newest.values(), key=rank, reverse=True)


def gpu_name(data):
    """Names the GPU of a file of results."""
    return (data.get("gpu") or {}).get("name", "unnamed GPU")


def rows_of(data, section):
    """Returns the rows of a section that are about a workload."""
    rows = (data.get("sections", {}).get(section) or {}).get("rows", [])
    return [row for row in rows if "workload" in row]


def label(workload):
    """Names a workload the same in every table: the operation, and what differs from the main shape."""
    if "mode" in workload:
        name, main = f"linear {workload['mode']}", LINEAR_MAIN
        sizes = ("rows", "hidden", "vocabulary")
    else:
        one = workload["operation"] in ONE_GRADIENT and workload["wrt"] == "p"
        name, main = workload["operation"] + ("" if one else f" d{workload['wrt']}"), MAIN
        sizes = ("rows", "vocabulary")
    parts = [name]
    if any(workload[size] != main[size] for size in sizes):
        parts.append(" × ".join(str(workload[size]) for size in sizes))
    known = {"name", "mode", "operation", "wrt", *sizes}
    return ", ".join(
        parts + [str(v) for k, v in workload.items() if k not in known and v != main.get(k, v)]
    )


def by_workload(data, sections=TIMED):
    """Returns {label: {provider: row}}; of two sections the first row that has times."""
    found = {}
    for row in (row for section in sections for row in rows_of(data, section)):
        rows, provider = found.setdefault(label(row["workload"]), {}), row["provider"]
        if provider != FLOOR and (
            provider not in rows or (timed(row) and not timed(rows[provider]))
        ):
            rows[provider] = row
    return found


def timed(row):
    """Returns {phase: milliseconds} of a row that passed the gate; empty for every other, and for none."""
    if not row or row.get("status") != "ok":
        return {}
    found = {p: number(figures.get("median_ms")) for p, figures in (row.get("times") or {}).items()}
    return {phase: milliseconds for phase, milliseconds in found.items() if milliseconds}


def others_of(rows):
    """Returns the rows of other packages."""
    return {name: row for name, row in rows.items() if name not in (OURS, *ALSO_OURS)}


def ahead(data):
    """Lists (label, phase, provider, ratio) of all that are faster than fastkl by more than 1 %.

    ratio: our device time over theirs.
    """
    found = []
    for name, rows in by_workload(data).items():
        ours = timed(rows.get(OURS))
        for phase in (phase for phase in PHASES if phase in ours):
            for other, row in others_of(rows).items():
                theirs = timed(row).get(phase)
                if theirs and ours[phase] / theirs > 1 + NOISE:
                    found.append((name, phase, other, ours[phase] / theirs))
    return found


def standing(data):
    """Says who is faster than fastkl, and where fastkl has no time."""
    found = by_workload(data)
    compared = [
        n for n, r in found.items() if timed(r.get(OURS)) and any(map(timed, others_of(r).values()))
    ]
    faster = [f"{other} at `{n}` ({p}, {times(ratio)})" for n, p, other, ratio in ahead(data)]
    words = f"Faster than fastkl by more than 1 % of device time, at {len(compared)} workloads measured "
    words += f"beside others: {'; '.join(faster) or 'none'}."
    without = [f"`{n}` ({why(r.get(OURS))})" for n, r in found.items() if not timed(r.get(OURS))]
    return words + (f" Without a time of fastkl: {', '.join(without)}." if without else "")


# Cells


def number(value):
    """Reads a finite number; None for one that was not measured, or stands there as "nan" or "inf"."""
    return float(value) if value is not None and math.isfinite(float(value)) else None


def digits(value, count=3):
    """Writes a number with so many digits, and never in powers of ten; a dash for none."""
    value = number(value)
    if value is None:
        return NONE
    whole = abs(value) >= 10**count - 0.5
    return f"{value:.0f}" if whole else f"{value:#.{count}g}".rstrip(".")


def times(ratio):
    """Writes how many times faster: two digits after the point where it is close."""
    return f"{ratio:.2f} ×" if ratio < 2 else f"{digits(ratio, 2)} ×"


def amount(value):
    """Writes bytes in the unit that suits them; a dash for none."""
    value = number(value)
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value is not None and abs(value) >= 0.9995 * size:
            return f"{digits(value / size)} {unit}"
    return NONE if value is None else f"{value:.0f} B"


def text(words, length=200):
    """Writes the first line of somebody else's words as it may stand in a table."""
    line = (str(words).strip().splitlines() or [""])[0]
    line = line if len(line) <= length else line[: length - 1] + "…"
    for special in "\\|*_`":
        line = line.replace(special, "\\" + special)
    return line.replace("<", "&lt;")


def why(row):
    """Writes what stands in the place of a time: an error of the gate, or the reason for having none."""
    if not row:
        return NONE
    if row.get("status") == "ok":
        return "correct, not timed"
    if row["status"] == "wrong":
        return f"{RED} **wrong: {text(row.get('reason'))}**"
    return f"{row['status']}: {text(row.get('reason'))}"


def error(row):
    """Writes the errors against float64: a word and a number for each, the worst rows left out."""
    found = {name: value for name, value in (row.get("error") or {}).items() if "," not in name}
    return ", ".join(f"{name} {float(value):.0e}" for name, value in found.items()) or NONE


def peak(row):
    """Writes the peak memory beside the inputs."""
    return amount(((row or {}).get("memory") or {}).get("peak_bytes"))


# Tables


def summary(data, sections, what, title, share):
    """Makes a table of a line per workload at the main shape: fastkl, the best other, plain torch, memory.

    share: the key and the format of a figure beside our time.
    """
    lines = []
    for name, rows in by_workload(data, sections).items():
        if "," in name:
            continue
        phase = "forward" if name == "linear forward" else "both"
        ours, others = rows.get(OURS), others_of(rows)
        speeds = {other: timed(row)[phase] for other, row in others.items() if phase in timed(row)}
        best, mine = min(speeds, key=speeds.get, default=None), timed(ours).get(phase)
        cell = why(ours)
        if mine:
            rate = number(ours["times"][phase].get(share[0]))
            cell = f"{digits(mine)} ms" + ("" if rate is None else share[1].format(rate))
        rival = f"{best} {_beside(others[best], phase, mine)}" if best else NONE
        memory = " / ".join(peak(row) for row in (ours, others.get(best), rows.get(PLAIN)))
        lines.append([f"`{name}`", cell, rival, _beside(rows.get(PLAIN), phase, mine), memory])
    peaks = "peak beside the inputs: fastkl / best other / torch"
    return markdown([what, title, "best other", "plain torch", peaks], lines) if lines else ""


def _beside(row, phase, ours):
    theirs = timed(row).get(phase)
    if not theirs:
        return why(row)
    return f"{digits(theirs)} ms" + (f", {times(theirs / ours)}" if ours else "")


LOGITS_HEAD = [
    "workload",
    "provider",
    *(f"{phase}, ms" for phase in PHASES),
    "of a copy, %",
    "one call on the clock, ms",
    "peak beside the inputs",
    "held for backward",
    "error",
    "note",
]
LINEAR_HEAD = [
    "workload",
    "provider",
    "ms",
    "× the bare products",
    "TFLOP/s",
    "one call on the clock, ms",
    "peak beside the inputs",
    "error",
    "note",
]


def timings(rows):
    """Makes the tables of all timed rows, a workload's side by side: from logits, from hidden states."""
    names = list(dict.fromkeys(label(row["workload"]) for row in rows))
    rows = sorted(rows, key=lambda row: names.index(label(row["workload"])))
    logits = [_logits_line(row) for row in rows if "mode" not in row["workload"]]
    linear = [_linear_line(row) for row in rows if "mode" in row["workload"]]
    tables = ((LOGITS_HEAD, logits), (LINEAR_HEAD, linear))
    return [markdown(head, lines) for head, lines in tables if lines]


def _logits_line(row):
    """Writes a row; what is put together with strokes is forward, backward and both."""
    found, figures = timed(row), row.get("times") or {}
    shown = [phase for phase in PHASES if phase in found]
    cells = [why(row), NONE, NONE]
    if found:
        cells = [digits(found.get(phase), 4) for phase in PHASES]
    for key in ("percent_of_copy", "wall_ms"):
        cells.append(" / ".join(digits(figures[phase].get(key)) for phase in shown) or NONE)
    held = amount((row.get("memory") or {}).get("held_bytes"))
    name, note = f"`{label(row['workload'])}`", text(row.get("note") or "")
    return [name, text(row["provider"]), *cells, peak(row), held, error(row), note]


def _linear_line(row):
    found = timed(row)
    phase = next(iter(found), None)
    figures = (row.get("times") or {}).get(phase, {})
    keys = ("ratio_to_floor", "tflop_per_s", "wall_ms")
    cells = [
        digits(found[phase], 4) if found else why(row),
        *(digits(figures.get(k)) for k in keys),
    ]
    name, note = f"`{label(row['workload'])}`", text(row.get("note") or "")
    return [name, text(row["provider"]), *cells, peak(row), error(row), note]


def errors(rows):
    """Makes the tables of accuracy's records, and names who has no figures."""
    records = [row for row in rows if "distribution" in row]
    counts = [e.get("rows", 0) for record in records for e in record["errors"].values()]
    data, parts = {"records": records, "rows": max(counts, default=0)}, []
    for dtype in dict.fromkeys(record["dtype"] for record in records):
        for measure, words in (("kl", "the KL"), ("gradient", "its gradient to the first logits")):
            parts.append(f"Worst relative error of {words}, {dtype}:")
            parts.append(accuracy.markdown(data, dtype, measure))
    reasons = [f"{name}: {text(reason)}" for name, reason in accuracy.reasons(data).items()]
    return parts + (["Without figures: " + "; ".join(reasons) + "."] if reasons else [])


# Growth with size

AXES = {"rows": {"vocabulary": 128256}, "vocabulary": {"rows": 4096}}


def curves(data, axis, figure):
    """Returns {provider: [(size, figure)]} of kl_divergence, bf16, at the other size of AXES.

    figure: "time" in milliseconds of device time, "wall" on the clock, "memory" in GB.
    """
    fixed = {**MAIN, **AXES[axis]}
    found = {}
    for rows in by_workload(data, ("main", "sweep", "scaling")).values():
        for provider, row in rows.items():
            workload = row["workload"]
            same = all(
                workload.get(key) == fixed[key] for key in fixed if key not in ("name", axis)
            )
            if same and "both" in timed(row):
                of_phase, memory = row["times"]["both"], row.get("memory") or {}
                values = {"time": of_phase["median_ms"], "wall": of_phase.get("wall_ms")}
                values["memory"] = memory.get("peak_bytes", math.nan) / 1e9
                found.setdefault(provider, {})[workload[axis]] = values[figure]
    return {provider: sorted(points.items()) for provider, points in found.items()}


def crossovers(data, axis):
    """Lists [provider, figure, size]: from which size on fastkl is faster at every size measured.

    size is None where it is not even at the largest.
    """
    lines = []
    for figure in ("time", "wall"):
        found = {name: dict(points) for name, points in curves(data, axis, figure).items()}
        ours = found.pop(OURS, {})
        for name, theirs in found.items():
            since = None
            for size in sorted(ours.keys() & theirs.keys(), reverse=True):
                if not ours[size] < theirs[size] * (1 - NOISE):
                    break
                since = size
            lines.append([name, figure, since])
    return lines


def picture(data, axis):
    """Draws device time, time on the clock and peak memory against a size, log-log; returns a PNG."""
    from matplotlib.figure import Figure

    labels = {
        "time": "device time, forward + backward, ms",
        "wall": "one call alone on the clock, ms",
        "memory": "peak beside the inputs, GB",
    }
    figure = Figure(figsize=(14, 4.2), dpi=120, layout="constrained")
    figure.suptitle(f"kl_divergence, bf16, {gpu_name(data)}")
    for axes, (kind, words) in zip(figure.subplots(1, len(labels)), labels.items(), strict=True):
        for name, points in curves(data, axis, kind).items():
            axes.loglog(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axes.set_xlabel("tokens" if axis == "rows" else axis)
        axes.set_ylabel(words)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()
