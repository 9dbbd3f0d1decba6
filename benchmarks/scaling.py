"""Time and peak memory against the number of tokens and against the vocabulary, with the roofline: how a workload grows, and from where on it pays.

    python3 -m benchmarks.scaling --json FILE --plots DIR [--workload kl_divergence|token_stats|logprob] [--axis tokens|vocabulary]

Forward and backward in bf16 of fastkl beside plain torch, the peers that have the operation, and torch.compile, on the same inputs. torch.compile
takes seconds per shape, so it gets a few sizes and comes last. Per provider the exponent of growth is fitted over the upper half of the sizes (1: in
proportion), and per peer the crossover is named: the size from which on fastkl is faster, by more than 1 %, at every size measured. --plots writes a
log-log picture per workload and axis: device time with the roofline (the bytes that have to move at this machine's measured copy bandwidth), the time
of one call alone on the clock, and peak memory. --from FILE measures nothing and draws what --json wrote. Exit code 2: no CUDA GPU here (nothing
is estimated), or wrong use.
"""
import argparse
import contextlib
import gc
import importlib.util
import io
import json
import math
import re
import sys
import time
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.peers import PEERS
from benchmarks.providers import load_providers
from benchmarks.record import duration, has_gpu, output_file, output_folder, provenance, write_bytes, write_json
from benchmarks.workloads import Workload

LARGEST_TENSOR = 8 * 2**30
WORKLOADS = ("kl_divergence", "token_stats", "logprob")
SIZE = {"tokens": "rows", "vocabulary": "vocabulary"}
SIZES = {
    "tokens": tuple({"rows": 2**k} for k in range(17)),
    "vocabulary": tuple({"rows": 4096, "vocabulary": v} for v in (1000, 4096, 8192, 16384, 32000, 50257, 65536, 128256, 151936, 262144)),
}
PHASE = "both"
OURS, COMPILED = "fastkl", "torch.compile"
# A provider whose time here would not be its own.
LEFT_OUT = {("Liger JSD", "kl_divergence"): "it gives one scalar for all tokens; a KL per token takes a call for each, and the time would be theirs"}
COMPILED_SIZES = 5
# Of the seconds of a workload: what all but torch.compile may take. They need half of it; torch.compile gets what is left.
SHARE_OF_THE_OTHERS = 0.6
SECONDS = 130  # with the start of the process and the last row, less than 150
# Shorter than the harness measures elsewhere: a curve has many points.
SECONDS_PER_PHASE, REPETITIONS = 0.1, (5, 30)
NO_TIME = "no time left in this run"
# Two measurements of the same may differ by so much.
NOISE = 0.01
COLOURS = {OURS: "#006d77", "torch": "#c1121f", COMPILED: "#e07a1f", "TRL": "#3d5a80", "Liger KLDIVLoss": "#8d5a97"}
FIGURES = {"time": "device time, forward + backward, ms", "wall": "one call alone on the clock, ms", "memory": "peak beside the inputs, GB"}


# What is measured -----------------------------------------------------------------------------------------------


def fits(workload):
    """Whether one logits tensor stays within 8 GiB."""
    return workload.tensor_bytes <= LARGEST_TENSOR


def workloads_of(operation, axis):
    """The workloads of an axis, from the smallest size to the largest that fits."""
    return list(filter(fits, (Workload(operation, **shape) for shape in SIZES[axis])))


def spread(items, count=COMPILED_SIZES):
    """So many of the items, the first and the last among them and the others evenly between."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def choose(providers, operation):
    """(providers for every size, for a few sizes, {name: why left out}) of those loaded, for an operation."""
    reasons = {provider.name: LEFT_OUT.get((provider.name, operation)) or provider.why_not(operation) for provider in providers}
    usable = [provider for provider in providers if not reasons[provider.name]]
    return ([provider for provider in usable if provider.name != COMPILED], [provider for provider in usable if provider.name == COMPILED],
            {name: reason for name, reason in reasons.items() if reason})


def steps(operation, axes, providers, seconds):
    """[(axis, workloads, providers, until)] in the order of measuring, `until` in seconds from the start: torch.compile comes after all others."""
    everywhere, few, _ = choose(providers, operation)
    others = seconds * SHARE_OF_THE_OTHERS if few else seconds
    found = [(axis, workloads_of(operation, axis), everywhere, others * number / len(axes)) for number, axis in enumerate(axes, 1)]
    if few:
        found += [(axis, spread(workloads_of(operation, axis)), few, others + (seconds - others) * number / len(axes))
                  for number, axis in enumerate(axes, 1)]
    return found


def sweep(workloads, providers, device, copy=None, deadline=math.inf):
    """Yields a row of the results (harness.measure) per workload and provider.

    Past the deadline rows only say so, and so do those of a provider that ran out of memory with tensors as large or smaller. copy: the copy
    bandwidth of this process in GB/s.
    """
    too_large = {}
    for workload in workloads:
        case = None
        for provider in providers:
            if time.monotonic() > deadline:
                row = _no_figures(workload, provider, "missing", NO_TIME)
            elif workload.tensor_bytes >= too_large.get(provider.name, math.inf):
                row = _no_figures(workload, provider, "missing", "out of memory with tensors no larger than these")
            else:
                try:
                    case = case or harness.make_case(workload, device, copy)
                    row = harness.measure(provider, case, phases=(PHASE,))
                except torch.OutOfMemoryError as error:
                    row = _no_figures(workload, provider, "failed", f"{type(error).__name__}: {error}"[:300])
                if _out_of_memory(row):
                    too_large[provider.name] = workload.tensor_bytes
                harness.release()
            yield row | {"copy_gb_per_s": copy}
        if case:
            case = None
            harness.release()


def _no_figures(workload, provider, status, reason):
    return {"workload": workload.as_dict(), "provider": provider.name, "status": status, "reason": reason, "times": {}, "memory": {}}


def _out_of_memory(row):
    return row["status"] == "failed" and re.search(r"out ?of ?memory", row["reason"], re.IGNORECASE) is not None


@contextlib.contextmanager
def quick():
    """Within it the harness repeats less, and the collection of garbage after each row leaves out what lives already.

    Where TRL is loaded that is half a million objects: to walk them takes longer than most rows.
    """
    before = harness.SECONDS_PER_PHASE, harness.REPETITIONS
    harness.SECONDS_PER_PHASE, harness.REPETITIONS = SECONDS_PER_PHASE, REPETITIONS
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        harness.SECONDS_PER_PHASE, harness.REPETITIONS = before


# What it means --------------------------------------------------------------------------------------------------


def curve(rows, provider, axis, figure):
    """[(size, figure)] of a provider, by size; figure: "time" in milliseconds of device time, "wall" on the clock, or "memory" in bytes."""
    points = []
    for row in rows:
        times = (row.get("times") or {}).get(PHASE)
        if row["provider"] != provider or row["status"] != "ok" or not times:
            continue
        value = {"time": times["median_ms"], "wall": times.get("wall_ms"), "memory": (row.get("memory") or {}).get("peak_bytes")}[figure]
        if value is not None:
            points.append((row["workload"][SIZE[axis]], value))
    return sorted(points)


def exponent(points):
    """The slope of log(figure) against log(size) by least squares over the upper half of the sizes; None for fewer than three."""
    upper = [(math.log(x), math.log(y)) for x, y in points[len(points) // 2:] if y > 0]
    if len(upper) < 3:
        return None
    mean_x, mean_y = (sum(values) / len(upper) for values in zip(*upper, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in upper) / sum((x - mean_x) ** 2 for x, _ in upper)


def crossover(ours, theirs):
    """{"from", "first", "last", "not_at"}, None where the two have no size in common.

    from: the smallest common size from which on `ours` takes less at every larger one too (None: not at the largest). first, last: of the sizes that
    both have. not_at: the largest at which `ours` does not take less.
    """
    known = dict(theirs)
    common, found, not_at = [point for point in ours if point[0] in known], None, None
    if not common:
        return None
    for size, figure in reversed(common):
        if not figure < known[size] * (1 - NOISE):
            not_at = size
            break
        found = size
    return {"from": found, "first": common[0][0], "last": common[-1][0], "not_at": not_at}


def findings(rows, axis):
    """{"exponents": {provider: {figure: slope}}, "faster": {peer: {"time", "wall": crossover}}} of one axis."""
    names = list(dict.fromkeys(row["provider"] for row in rows))
    exponents = {name: {figure: exponent(curve(rows, name, axis, figure)) for figure in ("time", "memory")} for name in names}
    peers = [name for name in names if name != OURS]
    return {"exponents": exponents, "faster": {peer: {figure: crossover(curve(rows, OURS, axis, figure), curve(rows, peer, axis, figure))
                                                      for figure in ("time", "wall")} for peer in peers}}


def sentences(found, axis):
    """The findings in words, a line each."""
    lines = []
    for name, slopes in found["exponents"].items():
        shown = ", ".join(f"{figure} ~ {axis}^{slope:.2f}" for figure, slope in slopes.items() if slope is not None)
        if shown:
            lines.append(f"{name}: {shown}")
    for peer, figures in found["faster"].items():
        for figure, what in (("time", "on the device"), ("wall", "on the clock, launches included")):
            lines.append(f"{OURS} beside {peer} {what}: {faster(figures[figure], axis)}")
    return "\n".join(lines)


def faster(found, axis):
    """A crossover in words: from which size on fastkl is faster, and how far that was measured."""
    if found is None:
        return "no size was measured with both"
    if found["from"] is None:
        return f"not faster at the largest size measured, {found['last']} {axis}"
    if found["from"] == found["first"]:
        return f"faster at every size measured, {found['first']} to {found['last']} {axis}"
    return f"faster from {found['from']} to {found['last']} {axis}, the largest measured; not at {found['not_at']}"


def gaps(rows, axis):
    """["provider at sizes: reason"] of the rows that have no figures; reasons that differ in numbers only count as one."""
    found = {}
    for row in rows:
        if row["status"] != "ok":
            reason = f"{row['status']}: {row['reason']}".splitlines()[0][:160]
            sizes, _ = found.setdefault((row["provider"], re.sub(r"[\d.]+", "#", reason)), ([], reason))
            sizes.append(row["workload"][SIZE[axis]])
    return [f"{name} at {', '.join(map(str, sorted(sizes)))} {axis}: {reason}" for (name, _), (sizes, reason) in found.items()]


def picture(rows, axis, title):
    """PNG: device time with the roofline, time on the clock and peak memory against the size, log-log, every provider."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.2), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=12)
    panels = figure.subplots(1, len(FIGURES))
    for axes, (what, label) in zip(panels, FIGURES.items(), strict=True):
        for name in dict.fromkeys(row["provider"] for row in rows):
            points = curve(rows, name, axis, what)
            if points:
                axes.plot([x for x, _ in points], [y / (1e9 if what == "memory" else 1) for _, y in points], marker="o", markersize=3, label=name,
                          linewidth=2 if name == OURS else 1.2, zorder=3 if name == OURS else 2, color=COLOURS.get(name))
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(axis)
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    floor = sorted({(row["workload"][SIZE[axis]], row["times"][PHASE]["bytes"] / row["copy_gb_per_s"] / 1e6)
                    for row in rows if row["status"] == "ok" and row.get("times") and row.get("copy_gb_per_s")})
    if floor:
        panels[0].plot([x for x, _ in floor], [y for _, y in floor], color="#555555", linestyle="--", linewidth=1, label="bytes at copy bandwidth")
    if panels[0].lines:
        panels[0].legend(frameon=False, fontsize=9)
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    return content.getvalue()


# The command ----------------------------------------------------------------------------------------------------


def picture_name(operation, axis):
    """The file name of a picture."""
    return f"scaling-{operation}-{axis}.png"


def draw(data, folder, operation):
    """Writes the pictures of a workload, one per axis."""
    for axis, found in data["workloads"][operation]["axes"].items():
        write_bytes(folder / picture_name(operation, axis), picture(found["rows"], axis, f"{operation}, bf16, {data['gpu']}"))


def told(data, operation):
    """What was found for a workload, as text."""
    workload = data["workloads"][operation]
    lines = [f"{operation}: without {name}: {reason}" for name, reason in workload["left_out"].items()]
    for axis, found in workload["axes"].items():
        lines += [f"{operation} by {axis}:", sentences(found, axis), *(f"no figures: {gap}" for gap in gaps(found["rows"], axis))]
    return "\n".join(lines)


def run(arguments, command, started):
    """Measures everything and returns the data, written after each row: what was measured outlives a crash."""
    device = torch.device("cuda")
    providers = load_providers(device, (OURS, "torch", COMPILED, *PEERS))
    copy = harness.copy_bandwidth(device)["gb_per_s"]
    data = {**provenance(command), "gpu": torch.cuda.get_device_name(device), "copy_gb_per_s": copy, "workloads": {}}
    for operation in arguments.workload or WORKLOADS[:1]:
        workload = data["workloads"][operation] = {"left_out": choose(providers, operation)[2], "axes": {}}
        for axis, workloads, chosen, until in steps(operation, arguments.axis or list(SIZES), providers, arguments.seconds):
            rows = workload["axes"].setdefault(axis, {"rows": []})["rows"]
            with quick():
                for row in sweep(workloads, chosen, device, copy, started + until):
                    rows.append(row)
                    print(harness.summary(row), flush=True)
                    workload["axes"][axis] = {"rows": rows, **findings(rows, axis)}
                    write_json(arguments.json, data)
        print(told(data, operation), flush=True)
        if arguments.plots:
            draw(data, arguments.plots, operation)
        started = time.monotonic()
    return data


def _parser():
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write every row and the findings to FILE")
    parser.add_argument("--from", type=Path, metavar="FILE", dest="source", help="measure nothing: findings and pictures of a FILE that --json wrote")
    parser.add_argument("--plots", type=output_folder, metavar="DIR", help="write scaling-<workload>-<axis>.png into DIR")
    parser.add_argument("--workload", action="append", choices=WORKLOADS, help="may be given again (default: kl_divergence)")
    parser.add_argument("--axis", action="append", choices=tuple(SIZES), help="only this axis (may be given again)")
    parser.add_argument("--seconds", type=duration, default=SECONDS, help="time per workload (default: %(default)s)")
    return parser


def main(argv=None):
    """The command line; returns the exit code."""
    started, parser = time.monotonic(), _parser()
    arguments = parser.parse_args(argv)
    if (arguments.json is None) == (arguments.source is None):
        parser.error("expected --json FILE to measure, or --from FILE to draw what was measured, and not both")
    if arguments.plots and not can_draw():
        parser.error("--plots: needs matplotlib, which is not installed; pip install matplotlib, or leave --plots out and draw with --from elsewhere")
    if arguments.source:
        try:
            data = json.loads(arguments.source.read_text(encoding="utf-8"))
            lines = [told(data, operation) for operation in data["workloads"]]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            parser.error(f"--from: expected a file that --json wrote, got {str(arguments.source)!r} ({type(error).__name__}: {error}); measure one")
        for operation, text in zip(data["workloads"], lines, strict=True):
            print(text)
            if arguments.plots:
                draw(data, arguments.plots, operation)
        return 0
    if not has_gpu("scaling"):
        return 2
    run(arguments, "python3 -m benchmarks.scaling " + " ".join(sys.argv[1:] if argv is None else argv), started)
    return 0


def can_draw():
    """Whether matplotlib is here."""
    return importlib.util.find_spec("matplotlib") is not None


if __name__ == "__main__":
    sys.exit(main())
