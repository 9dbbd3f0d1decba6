"""Time and peak memory against the number of tokens and against the vocabulary, with the roofline: how a workload grows, and from where on it pays.

    python3 -m benchmarks.scaling --json FILE --plots DIR [--axis tokens|vocabulary] [--seconds 300]

Forward and backward of kl_divergence in bf16, fastkl beside plain torch and torch.compile on the same inputs. Per provider the exponent of growth is
fitted over the upper half of the sizes (1: in proportion), and per peer the crossover is named: the size from which on fastkl is faster, by more than
1 %, at every size measured. --plots writes a log-log picture per axis: time with the roofline (the bytes that have to move at this machine's measured
copy bandwidth) and peak memory. Exit code 2 without CUDA: nothing is estimated.
"""
import argparse
import importlib.util
import io
import math
import sys
import time
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.providers import load_providers
from benchmarks.record import provenance, write_bytes, write_json
from benchmarks.workloads import Workload

LARGEST_TENSOR = 8 * 2**30
PROVIDERS = ("fastkl", "torch", "torch.compile")
AXES = {
    "tokens": [Workload(rows=2**k) for k in range(6, 17)],
    "vocabulary": [Workload(rows=4096, vocabulary=v) for v in (1000, 4096, 8192, 16384, 32000, 50257, 65536, 128256, 151936, 262144)],
}
SIZE = {"tokens": "rows", "vocabulary": "vocabulary"}
PHASE = "both"
OURS = "fastkl"
# Two measurements of the same may differ by so much.
NOISE = 0.01


def fits(workload):
    """Whether one logits tensor stays within 8 GiB."""
    return workload.tensor_bytes <= LARGEST_TENSOR


def sweep(workloads, providers, device, deadline=math.inf):
    """Yields a row of the results (harness.measure) per workload and provider; past the deadline rows that only say so."""
    copy = harness.copy_bandwidth(device)["gb_per_s"] if device.type == "cuda" else None
    for workload in filter(fits, workloads):
        case = None
        for provider in providers:
            if time.monotonic() > deadline:
                yield {"workload": workload.as_dict(), "provider": provider.name, "status": "missing", "reason": "no time left in this run"}
                continue
            try:
                case = case or harness.make_case(workload, device, copy)
            except torch.OutOfMemoryError as error:
                reason = f"{type(error).__name__}: {error}"[:300]
                yield {"workload": workload.as_dict(), "provider": provider.name, "status": "failed", "reason": reason}
                continue
            yield harness.measure(provider, case, phases=(PHASE,)) | {"copy_gb_per_s": copy}
            harness.release()
        case = None
        harness.release()


def curve(rows, provider, axis, figure):
    """[(size, figure)] of a provider, by size; figure: "time" in milliseconds of device time, "wall" on the clock, or "memory" in bytes."""
    points = []
    for row in rows:
        if row["provider"] != provider or row["status"] != "ok" or not row["times"]:
            continue
        values = {"time": row["times"][PHASE]["median_ms"], "wall": row["times"][PHASE]["wall_ms"], "memory": row["memory"]["peak_bytes"]}
        points.append((row["workload"][SIZE[axis]], values[figure]))
    return sorted(points)


def exponent(points):
    """The slope of log(figure) against log(size) by least squares over the upper half of the sizes; None for fewer than three."""
    upper = [(math.log(x), math.log(y)) for x, y in points[len(points) // 2:] if y > 0]
    if len(upper) < 3:
        return None
    mean_x, mean_y = (sum(values) / len(upper) for values in zip(*upper, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in upper) / sum((x - mean_x) ** 2 for x, _ in upper)


def crossover(ours, theirs):
    """{"from", "first", "last"}: the smallest common size from which on `ours` takes less at every larger one too (None: not at the largest), and the
    first and last size that both have; None where they have none in common."""
    known = dict(theirs)
    common, found = [point for point in ours if point[0] in known], None
    if not common:
        return None
    for size, figure in reversed(common):
        if not figure < known[size] * (1 - NOISE):
            break
        found = size
    return {"from": found, "first": common[0][0], "last": common[-1][0]}


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
            lines.append(f"{OURS} beside {peer} {what}: {_faster(figures[figure], axis)}")
    return "\n".join(lines)


def _faster(found, axis):
    if found is None:
        return "no size was measured with both"
    if found["from"] is None:
        return f"not faster at the largest size measured, {found['last']} {axis}"
    if found["from"] == found["first"]:
        return f"faster at every size measured, {found['first']} to {found['last']} {axis}"
    return f"faster from {found['from']} to {found['last']} {axis}, the largest measured"


def picture(rows, axis, title):
    """PNG: time and peak memory against the size, log-log, every provider, with the roofline."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=12)
    panels = figure.subplots(1, 2)
    for axes, what, scale, label in ((panels[0], "time", 1.0, "forward + backward, ms"), (panels[1], "memory", 1e9, "peak beside the inputs, GB")):
        for name in dict.fromkeys(row["provider"] for row in rows):
            points = curve(rows, name, axis, what)
            if points:
                axes.plot([x for x, _ in points], [y / scale for _, y in points], marker="o", markersize=3, linewidth=2 if name == OURS else 1.2,
                          label=name, zorder=3 if name == OURS else 2)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(axis)
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    floor = sorted({(row["workload"][SIZE[axis]], row["times"][PHASE]["bytes"] / row["copy_gb_per_s"] / 1e6)
                    for row in rows if row["status"] == "ok" and row["times"] and row["copy_gb_per_s"]})
    if floor:
        panels[0].plot([x for x, _ in floor], [y for _, y in floor], color="#555555", linestyle="--", linewidth=1, label="bytes at copy bandwidth")
    panels[0].legend(frameon=False, fontsize=9)
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    return content.getvalue()


def main(argv=None):
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="write every row and the findings to FILE")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write scaling-tokens.png and scaling-vocabulary.png into DIR")
    parser.add_argument("--axis", action="append", choices=tuple(AXES), help="only this axis (may be given again)")
    parser.add_argument("--seconds", type=float, default=300.0, help="time for all (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA here: nothing can be timed, and nothing is estimated", file=sys.stderr)
        return 2
    if arguments.plots and not can_draw():
        parser.error("--plots: needs matplotlib, which is not installed; pip install matplotlib, or leave --plots out")
    device, axes = torch.device("cuda"), arguments.axis or list(AXES)
    started, name, results = time.monotonic(), torch.cuda.get_device_name(device), {}
    command = "python3 -m benchmarks.scaling " + " ".join(sys.argv[1:] if argv is None else argv)
    for number, axis in enumerate(axes, 1):
        rows = []
        for row in sweep(AXES[axis], load_providers(device, PROVIDERS), device, started + arguments.seconds * number / len(axes)):
            rows.append(row)
            print(harness.summary({"times": {}, "memory": {}, **row}), flush=True)
            # After each row: what was measured outlives a crash.
            results[axis] = {"rows": rows, **findings(rows, axis)}
            write_json(arguments.json, {**provenance(command), "gpu": name, "axes": results})
        print(sentences(results[axis], axis), flush=True)
        if arguments.plots:
            write_bytes(arguments.plots / f"scaling-{axis}.png", picture(rows, axis, f"kl_divergence, bf16, {name}"))
    return 0


def can_draw():
    """Whether matplotlib is here."""
    return importlib.util.find_spec("matplotlib") is not None


if __name__ == "__main__":
    sys.exit(main())
