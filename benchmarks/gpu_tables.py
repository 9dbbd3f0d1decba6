"""What gpu_suite.py and scaling.py measured on GPUs, as Markdown: the README's tables, a page of every row, and who is faster than fastkl where."""
import json
import math

from benchmarks import accuracy, scaling
from benchmarks.harness import FLOOR, PHASES
from benchmarks.linear_workloads import LinearWorkload
from benchmarks.workloads import Workload

OURS, PLAIN = "fastkl", "torch"
THROUGH_LOGITS = "fastkl, through logits"  # from hidden states, where there is memory for all logits
TIMED = ("main", "peers", "sweep", "linear", "linear_sweep")
EVERYBODY = "all"  # the provider of a row that says why a workload was not measured at all
MAIN, LINEAR_MAIN = Workload().as_dict(), LinearWorkload().as_dict()
# Operations with a gradient to the first logits only: their names go without it.
ONE_GRADIENT = ("token_stats", "logprob", "logprob_entropy", "entropy")
NOISE = 0.01  # two measurements of the same may differ by so much
RED = "🔴"
NONE = "–"
NO_RESULTS = "No time has been measured on a GPU yet, so none is given: `python3 -m benchmarks.gpu_suite --out DIR` measures it in 8 minutes."


# Results --------------------------------------------------------------------------------------------------------


def gpu_results(folder):
    """[(path, data)]: of every GPU the newest file of gpu_suite in which the main shape was timed, the newest first; of one day an H200 first.

    Other files lie there too: of scaling, of tune.
    """
    newest = {}
    for path in sorted(folder.glob("*/*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or not any(row.get("times") for row in rows_of(data, "main")):
            continue
        name = gpu_name(data)
        if name not in newest or data["date"] > newest[name][1]["date"]:
            newest[name] = path, data
    return sorted(newest.values(), key=lambda found: (found[1]["date"][:10], "H200" in gpu_name(found[1]), found[1]["date"]), reverse=True)


def gpu_name(data):
    """The GPU of a file of results."""
    return (data.get("gpu") or {}).get("name", "unnamed GPU")


def rows_of(data, section):
    """The rows of a section that are about a workload; none where it did not run."""
    return [row for row in (data.get("sections", {}).get(section) or {}).get("rows", []) if "workload" in row]


def label(workload):
    """The workload's name, the same in every table: what is computed, and what differs from the main shape."""
    if "mode" in workload:
        name, sizes, main = f"linear {workload['mode']}", ("rows", "hidden", "vocabulary"), LINEAR_MAIN
    else:
        side = "" if workload["operation"] in ONE_GRADIENT and workload["wrt"] == "p" else f" d{workload['wrt']}"
        name, sizes, main = workload["operation"] + side, ("rows", "vocabulary"), MAIN
    shape = " × ".join(str(workload[size]) for size in sizes) if any(workload[size] != main[size] for size in sizes) else None
    known = {"name", "mode", "operation", "wrt", *sizes}
    others = [str(value) for key, value in workload.items() if key not in known and value != main.get(key, value)]
    return ", ".join([name, *([shape] if shape else []), *others])


def by_workload(data, sections=TIMED):
    """{workload's name: {provider: row}}; of a provider measured in two sections, the first row that has times."""
    found = {}
    for row in (row for section in sections for row in rows_of(data, section)):
        provider = OURS if row["provider"] == EVERYBODY else row["provider"]
        rows = found.setdefault(label(row["workload"]), {})
        if provider != FLOOR and (provider not in rows or (timed(row) and not timed(rows[provider]))):
            rows[provider] = row
    return found


def number(value):
    """A finite number of a file of results; None for what was not measured, or stands there as "nan" or "inf"."""
    return float(value) if value is not None and math.isfinite(float(value)) else None


def timed(row):
    """{phase: device time in milliseconds} of a row that passed the gate; empty for every other, and for none."""
    if not row or row.get("status") != "ok":
        return {}
    found = {phase: number(figures.get("median_ms")) for phase, figures in (row.get("times") or {}).items()}
    return {phase: milliseconds for phase, milliseconds in found.items() if milliseconds}


def others_of(rows):
    """The rows of a workload that are other packages'."""
    return {provider: row for provider, row in rows.items() if provider not in (OURS, THROUGH_LOGITS)}


# Who is ahead ---------------------------------------------------------------------------------------------------


def ahead(data):
    """[(workload's name, phase, provider, ratio)] of every provider faster than fastkl on the device by more than 1 %; ratio: our time over its."""
    found = []
    for name, rows in by_workload(data).items():
        ours = timed(rows.get(OURS))
        for phase in (phase for phase in PHASES if phase in ours):
            others = {other: timed(row).get(phase) for other, row in others_of(rows).items()}
            found += [(name, phase, other, ours[phase] / theirs) for other, theirs in others.items() if theirs and ours[phase] / theirs > 1 + NOISE]
    return found


def unnamed(data, readme):
    """The entries of `ahead` whose workload a README does not name in its section "## Limits": in backticks, exactly as the tables name it."""
    limits = ("\n" + readme).partition("\n## Limits\n")[2].partition("\n## ")[0]
    return [entry for entry in ahead(data) if f"`{entry[0]}`" not in limits]


def standing(data):
    """In words: at which workloads another provider is ahead of fastkl, or that none is; and where fastkl has no time."""
    found, words = by_workload(data), []
    compared = [name for name, rows in found.items() if timed(rows.get(OURS)) and any(map(timed, others_of(rows).values()))]
    count = f"{len(compared)} workload{'' if len(compared) == 1 else 's'}"
    best = {}
    for name, phase, other, ratio in ahead(data):
        if ratio > best.setdefault(name, {}).get(phase, ("", 0.0))[1]:
            best[name][phase] = other, ratio
    if best:
        where = [f"`{name}` ({', '.join(_behind(found[name], phase, *by) for phase, by in phases.items())})" for name, phases in best.items()]
        words.append(f"By device time fastkl is not ahead at {len(best)} of {count} measured beside others: {'; '.join(where)}.")
    elif compared:
        words.append(f"Nowhere in {count} measured beside others is another provider faster than fastkl by more than 1 % of device time, neither "
                     "forward nor backward nor both.")
    else:
        words.append("No other provider was timed beside fastkl.")
    without = [f"`{name}` ({why(rows.get(OURS))})" for name, rows in found.items() if not timed(rows.get(OURS))]
    return " ".join([*words, *([f"Without a time of fastkl: {', '.join(without)}."] if without else [])])


def _behind(rows, phase, other, ratio):
    """By how much another provider is ahead at a workload, and whether going through logits is ahead of it."""
    through = timed(rows.get(THROUGH_LOGITS)).get(phase)
    gained = timed(rows[OURS])[phase] / ratio / through if through else 0.0
    return f"{phase}: {other} is {times(ratio)} as fast" + (f", going through logits {times(gained)} as fast as that" if gained > 1 + NOISE else "")


# Cells ----------------------------------------------------------------------------------------------------------


def markdown(head, rows):
    """A table: the cells of its head, and of its rows."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def origin(data):
    """Where figures come from: command, date, versions and commit."""
    versions = ", ".join(f"{name} {number}" for name, number in {**data["versions"], **data.get("peers", {})}.items() if isinstance(number, str))
    return f"`{data['command'].strip()}`, {data['date'][:10]}, {versions}, commit {data['commit'][:10]}."


def digits(value, count=3):
    """A number with so many digits, and never in powers of ten: 0.0213, 1.21, 22.5, 12345; a dash for none."""
    value = number(value)
    if value is None:
        return NONE
    return f"{value:.0f}" if abs(value) >= 10**count - 0.5 else f"{value:#.{count}g}".rstrip(".")


def times(ratio):
    """How many times faster: two digits after the point where it is close."""
    return f"{ratio:.2f} ×" if ratio < 2 else f"{digits(ratio, 2)} ×"


def amount(value):
    """Bytes in the unit that suits them; a dash for none."""
    value = number(value)
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value is not None and abs(value) >= 0.9995 * size:
            return f"{digits(value / size)} {unit}"
    return NONE if value is None else f"{value:.0f} B"


def text(words, length=200):
    """The first line of what somebody else wrote, as it stands in a table."""
    line = (str(words).strip().splitlines() or [""])[0]
    line = line if len(line) <= length else line[: length - 1] + "…"
    for special in "\\|*_`":
        line = line.replace(special, "\\" + special)
    return line.replace("<", "&lt;")


def why(row):
    """What stands in the place of a time: the error of a provider that failed the gate, or the reason for having none."""
    if not row:
        return NONE
    if row.get("status") == "ok":
        return "correct, not timed"
    return f"{RED} **wrong: {text(row.get('reason'))}**" if row["status"] == "wrong" else f"{row['status']}: {text(row.get('reason'))}"


def error(row):
    """The errors against float64: a word and a number for each, the worst rows left out."""
    found = {name: value for name, value in (row.get("error") or {}).items() if "," not in name and isinstance(value, float | str)}
    return ", ".join(f"{name} {_scientific(value)}" for name, value in found.items()) or NONE


def _scientific(value):
    try:
        return f"{float(value):.0e}"
    except ValueError:
        return text(value)


def peak(row):
    """Peak memory beside the inputs."""
    return amount(((row or {}).get("memory") or {}).get("peak_bytes"))


# The README -----------------------------------------------------------------------------------------------------


def readme_section(results):
    """The section of the README, from what gpu_results found: the newest results."""
    if not results:
        return NO_RESULTS
    path, data = results[0]
    wrong = sum(row.get("status") == "wrong" for section in TIMED for row in rows_of(data, section))
    gate = [f"Rows without a time, since they failed the gate against float64: {wrong}."] if wrong else []
    parts = [
        f"Measured on one {gpu_name(data)}: {MAIN['rows']} tokens, a vocabulary of {MAIN['vocabulary']}, bfloat16; median device time of forward and "
        "backward together; n ×: fastkl is so many times faster. Every figure is on the [page of results](benchmarks/results/README.md).",
        summary(data, ("main", "peers"), "from logits", "fastkl, of a copy's bandwidth", _of_copy),
        summary(data, ("linear",), f"from hidden states, H = {LINEAR_MAIN['hidden']}", "fastkl, × the bare matrix products", _of_floor),
        " ".join([standing(data), *_crossovers(path), *gate]),
        origin(data),
    ]
    return "\n\n".join(part for part in parts if part)


def summary(data, sections, what, ours_title, share):
    """A table of one line per workload at the main shape: fastkl, the best other provider, plain torch and their memory; empty without rows."""
    lines = []
    for name, rows in by_workload(data, sections).items():
        if "," in name:
            continue
        phase = "forward" if name == "linear forward" else "both"
        ours, others = rows.get(OURS), {other: row for other, row in others_of(rows).items() if timed(row).get(phase)}
        best = min(others, key=lambda other: timed(others[other])[phase], default=None)
        mine = timed(ours).get(phase)
        cell = f"{digits(mine)} ms{share(ours['times'][phase])}" if mine else why(ours)
        rivals = [f"{best} {_beside(others[best], phase, mine)}" if best else NONE, _beside(rows.get(PLAIN), phase, mine)]
        lines.append([f"`{name}`", cell, *rivals, " / ".join(peak(row) for row in (ours, others.get(best), rows.get(PLAIN)))])
    head = [what, ours_title, "best other", "plain torch", "peak beside the inputs: fastkl / best other / torch"]
    return markdown(head, lines) if lines else ""


def _beside(row, phase, ours):
    theirs = timed(row).get(phase)
    if not theirs:
        return why(row)
    return f"{digits(theirs)} ms" + (f", {times(theirs / ours)}" if ours else "")


def _of_copy(figures):
    percent = number(figures.get("percent_of_copy"))
    return "" if percent is None else f", {percent:.0f} %"


def _of_floor(figures):
    ratio = number(figures.get("ratio_to_floor"))
    return "" if ratio is None else f", {ratio:.2f} ×"


def _crossovers(path):
    """From how many tokens on fastkl is faster than plain torch, a sentence per workload of the scaling.json beside the results."""
    data = _scaling(path)
    for operation, workload in data.get("workloads", {}).items():
        found = workload["axes"].get("tokens", {}).get("faster", {}).get(PLAIN)
        if found:
            yield (f"`{operation}` beside plain torch by number of tokens (`python3 -m benchmarks.scaling`, {data['date'][:10]}): on the device "
                   f"{scaling.faster(found['time'], 'tokens')}; one call alone, on the clock, {scaling.faster(found['wall'], 'tokens')}.")


def _scaling(path):
    file = path.parent / "scaling.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


# The page of results --------------------------------------------------------------------------------------------


def page(results):
    """The parts of the page: for each GPU every section with every row, the bars, the tests and how it scales."""
    return [part for path, data in results for part in _gpu_parts(path, data)] or [NO_RESULTS]


def _gpu_parts(path, data):
    driver = (data.get("gpu") or {}).get("driver")
    parts = [f"### {gpu_name(data)}", origin(data) + (f" Driver {driver}." if driver else ""), standing(data), *_bars(data.get("bars", []))]
    for name, section in data.get("sections", {}).items():
        status = section.get("status", "")
        copies = [number(row["copy"].get("gb_per_s")) for row in section.get("rows", []) if "copy" in row]
        parts.append(f"#### {name}: {'ok' if status == 'ok' else f'{RED} {text(status)}'}, {digits(section.get('seconds'))} s")
        if any(copies):
            parts.append(f"A copy moves {max(filter(None, copies)):.0f} GB/s, read and written.")
        if section.get("summary"):
            parts.append(f"`{section['summary'].strip('= ')}`")
        parts += _accuracy(section.get("rows", [])) if name == "accuracy" else _timings(rows_of(data, name))
    return parts + _scaling_parts(path)


def _bars(bars):
    if not bars:
        return []
    lines = [[text(bar["bar"]), text(bar["limit"]), _measured(bar["value"]), "met" if bar["met"] else f"{RED} not met"] for bar in bars]
    return [f"#### Bars: {sum(bool(bar['met']) for bar in bars)} of {len(bars)} met", markdown(["bar", "limit", "measured", ""], lines)]


def _measured(value):
    """The value of a bar: a count as it is, and what is not finite by its name."""
    return digits(value, 4) if isinstance(value, float) or value is None else str(value)


def _timings(rows):
    """The tables of timed rows, those of a workload side by side: from logits, and from hidden states."""
    names = list(dict.fromkeys(label(row["workload"]) for row in rows))
    rows = sorted(rows, key=lambda row: names.index(label(row["workload"])))
    kinds = {False: (LOGITS_HEAD, _logits_line), True: (LINEAR_HEAD, _linear_line)}
    found = {linear: [line(row) for row in rows if ("mode" in row["workload"]) == linear] for linear, (_, line) in kinds.items()}
    return [markdown(kinds[linear][0], lines) for linear, lines in found.items() if lines]


LOGITS_HEAD = ["workload", "provider", *(f"{phase}, ms" for phase in PHASES), "of a copy, %", "one call on the clock, ms", "peak beside the inputs",
               "held for backward", "error", "note"]
LINEAR_HEAD = ["workload", "provider", "ms", "× the bare products", "TFLOP/s", "one call on the clock, ms", "peak beside the inputs", "error", "note"]


def _logits_line(row):
    """A row; what is put together with strokes is forward, backward and both."""
    found, figures = timed(row), row.get("times") or {}
    shown = [phase for phase in PHASES if phase in found]
    cells = [digits(found.get(phase), 4) for phase in PHASES] if found else [why(row), NONE, NONE]
    shares = [" / ".join(digits(figures[phase].get(name)) for phase in shown) or NONE for name in ("percent_of_copy", "wall_ms")]
    held = amount((row.get("memory") or {}).get("held_bytes"))
    return [f"`{label(row['workload'])}`", text(row["provider"]), *cells, *shares, peak(row), held, error(row), text(row.get("note") or "")]


def _linear_line(row):
    found, figures = timed(row), row.get("times") or {}
    phase = next(iter(found), None)
    of_phase = figures.get(phase, {})
    note = row.get("note") or (f"{of_phase['chunk']} tokens at a time" if "chunk" in of_phase else "")
    cells = [digits(found[phase], 4) if found else why(row), *(digits(of_phase.get(name)) for name in ("ratio_to_floor", "tflop_per_s", "wall_ms"))]
    return [f"`{label(row['workload'])}`", text(row["provider"]), *cells, peak(row), error(row), text(note)]


def _accuracy(rows):
    """Worst relative error by size of the KL, a table per element type and quantity; who has no figures stands below."""
    records = [row for row in rows if "distribution" in row]
    sizes = [errors.get("rows", 0) for record in records for errors in record["errors"].values()]
    data = {"records": records, "rows": max(sizes, default=0)}
    parts = []
    for dtype in dict.fromkeys(record["dtype"] for record in records):
        for measure, words in (("kl", "the KL"), ("gradient", "its gradient to the first logits")):
            parts += [f"Worst relative error of {words}, {dtype}:", accuracy.markdown(data, dtype, measure)]
    reasons = accuracy.reasons(data)
    return parts + (["Without figures: " + "; ".join(f"{name}: {text(reason)}" for name, reason in reasons.items()) + "."] if reasons else [])


def _scaling_parts(path):
    """What scaling.py found and drew on this GPU, where its files lie beside the results."""
    data, parts = _scaling(path), []
    for operation, workload in data.get("workloads", {}).items():
        left_out = [f"- without {name}: {text(reason)}" for name, reason in workload["left_out"].items()]
        parts += [f"#### Scaling of {operation}", "\n".join([f"- {origin(data)}", *left_out])]
        for axis, found in workload["axes"].items():
            lines = [*scaling.sentences(found, axis).splitlines(), *(f"no figures: {gap}" for gap in scaling.gaps(found["rows"], axis))]
            parts += ["\n".join("- " + text(line, 400) for line in lines)] if lines else []
            image = scaling.picture_name(operation, axis)
            parts += [f"![{operation} against {axis}]({path.parent.name}/{image})"] if (path.parent / image).exists() else []
    return parts
