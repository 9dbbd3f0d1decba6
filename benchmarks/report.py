"""Write the page benchmarks/results/README.md, and the figures in README.md and docs.

    python -m benchmarks.report

reads the newest committed results, rewrites the page, and in README.md and docs/*.md the text
between <!-- NAME --> and <!-- /NAME --> for each NAME in SECTIONS. Exit code 0: done; 1: a
malformed file, and nothing was written; 2: wrong use.
"""

import argparse
import sys
import textwrap
from functools import partial

from benchmarks import accuracy, cpu, roofline, tables
from benchmarks.record import ROOT, markdown, origin, write_bytes
from benchmarks.tables import LINEAR_MAIN, MAIN, NONE, RED, digits, gpu_name, read, text

RESULTS = ROOT / "benchmarks" / "results"
BASELINE = ROOT / "benchmarks" / "static_baseline.json"
ACCURACY_COLUMNS = [
    "fastkl",
    "fastkl (Triton, interpreted)",
    "torch",
    "torch.compile",
    "Categorical",
    "TRL",
    "Liger JSD (interpreted)",
]
# Kernels and figures in the table of static costs, by their names in the compile plan.
KERNELS = (
    *(f"kl_divergence.{step}" for step in ("forward", "backward_p", "backward_q", "backward_both")),
    *(f"token_stats.{step}" for step in ("forward", "backward_p", "backward_both")),
)
COSTS = {
    "instructions_per_pair": "instructions per pair: near",
    "instructions_per_pair_general": "general",
    "overhead_per_pair": "around",
    "ex2_per_pair": "ex2",
    "registers": "registers",
    "spill_bytes": "spills, bytes",
}
NO_RESULTS = (
    "No time has been measured on a GPU yet, so none is given: "
    "`python -m benchmarks.speed --out DIR` measures it."
)


# Sections of the README


def accuracy_section():
    options = {"providers": ACCURACY_COLUMNS, "targets": accuracy.TARGETS[::2]}
    table = accuracy.markdown(read(RESULTS / "cpu/accuracy.json"), **options)
    # On a CPU our plain name means the reference; the kernels have the next column.
    return table.replace("| fastkl |", "| fastkl, reference on a CPU |", 1)


def linear_section():
    records = read(RESULTS / "cpu/linear_accuracy.json")["records"]
    records = [record for record in records if record["dtype"] == "bf16"]
    exact = "fastkl, logits_dtype=float32"
    lines = [
        [words, *(accuracy.power(record["ways"][way][figure]) for record in records)]
        for words, way, figure in (
            ("KL, bfloat16 logits (as every model returns them)", "fastkl", "kl"),
            ("the same in plain torch", "torch", "kl"),
            ("its gradient to the weight", "fastkl", "weight"),
            ("the same in plain torch", "torch", "weight"),
            ("KL, `logits_dtype=torch.float32`", exact, "kl"),
            ("its gradient to the weight, itself bfloat16", exact, "weight"),
        )
    ]
    sizes = (accuracy.power(record["kl"]) for record in records)
    return markdown(["bfloat16 inputs, mean KL of", *sizes], lines)


def static_section():
    baseline = read(BASELINE)
    costs = {
        row["kernel"]: row
        for row in baseline["records"]
        if (row["arch"], row["dtype"], row["aligned"]) == ("sm_90", "bf16", True)
    }
    lines = []
    for kernel in KERNELS:
        figures = [NONE if costs[kernel][key] is None else costs[kernel][key] for key in COSTS]
        bound = roofline.upper_bound(costs[kernel])
        lines.append([f"`{kernel}`", *figures, "{percent:g} % ({limited_by})".format(**bound)])
    table = markdown(["kernel", *COSTS.values(), "H200, at most"], lines)
    return f"{table}\n\n{origin(baseline)}"


# The README's rows of speed: the most common workloads, and one where fastkl is slower.
SPEED = ("kl_divergence dp", "token_stats", "linear loss", "linear logprob")
RATIOS = "the factor after another's time is that time over fastkl's: above 1, fastkl is faster"


def speed_section(data):
    of_copy = ("percent_of_copy", ", {:.0f} % of a copy")
    of_products = ("ratio_to_floor", ", {:.2f} × the bare GEMMs")
    lines = tables.summary_lines(data, ("main", "peers"), of_copy)
    lines |= tables.summary_lines(data, ("linear",), of_products)
    words = (
        f"Forward and backward on one {gpu_name(data)}: {MAIN['rows']} tokens, a vocabulary of"
        f" {MAIN['vocabulary']}, bfloat16; hidden states of {LINEAR_MAIN['hidden']}; {RATIOS}."
    )
    head = ["", "fastkl", "best other", "plain torch", tables.PEAKS]
    table = markdown(head, [lines[name] for name in SPEED if name in lines])
    return textwrap.fill(words, 110) + "\n\n" + table


def gpu_section(data):
    of_copy, of_floor = ("percent_of_copy", ", {:.0f} %"), ("ratio_to_floor", ", {:.2f} ×")
    titles = "fastkl, of a copy's bandwidth", "fastkl, × the bare matrix products"
    hidden = f"from hidden states, H = {LINEAR_MAIN['hidden']}"
    parts = [
        f"Measured on one {gpu_name(data)}: {MAIN['rows']} tokens, a vocabulary of"
        f" {MAIN['vocabulary']}, bfloat16; median device time of forward and backward together;"
        f" {RATIOS}. Every figure is on the [page of results](../benchmarks/results/README.md).",
        tables.summary(data, ("main", "peers"), "from logits", titles[0], of_copy),
        tables.summary(data, ("linear",), hidden, titles[1], of_floor),
        tables.standing(data),
        origin(data),
    ]
    return "\n\n".join(filter(None, parts))


def of_gpu(make):
    results = tables.gpu_results(RESULTS)
    return make(results[0][1]) if results else NO_RESULTS


SECTIONS = {
    "accuracy": accuracy_section,
    "static": static_section,
    "gpu": partial(of_gpu, gpu_section),
    "speed": partial(of_gpu, speed_section),
    "linear": linear_section,
}


def render(name, words):
    """Regenerate the sections of a file; raises ValueError for an unmatched mark."""
    for section, make in SECTIONS.items():
        start, end = f"<!-- {section} -->\n", f"\n<!-- /{section} -->"
        before, opened, rest = words.partition(start)
        _, closed, after = rest.partition(end)
        if bool(opened) != bool(closed) or (not opened and end.strip() in words):
            raise ValueError(f"{name}: expected {start.strip()} to {end.strip()}; put both in")
        if opened:
            words = before + start + make() + end + after
    return words


# The page of results


def results_page():
    errors = read(RESULTS / "cpu/accuracy.json")
    found = tables.gpu_results(RESULTS)
    parts = [
        "# Results",
        "Generated by `python -m benchmarks.report` from the JSON files beside this page; "
        "[how each was made](../README.md).",
        "## Accuracy",
        "Worst relative error against float64 of the same logits, by size of the KL; "
        f"V = {errors['vocabulary']}, {errors['rows']} rows of each kind. {origin(errors)}",
        "![Relative error against the size of the KL](cpu/accuracy.png)",
        *_accuracy_parts(errors),
        "## Static costs",
        f"Hot loops, compiled for sm_90: bf16, aligned rows. At most: an {roofline.MODEL}.",
        static_section(),
        *cpu.page(read(RESULTS / "cpu/times.json")),
        "## GPU",
        *(part for path, data in found for part in _gpu_parts(path, data)),
        *[NO_RESULTS] * (not found),
    ]
    return "\n\n".join(parts) + "\n"


def _accuracy_parts(data):
    parts = [f"### {title}\n\n{table}" for title, table in accuracy.tables(data)]
    errors = [item for record in data["records"] for item in record["errors"].items()]
    reasons = {name: error["reason"].splitlines()[0] for name, error in errors if "reason" in error}
    without = "; ".join(f"{name}: `{reason}`" for name, reason in reasons.items())
    return [*parts, *[f"Without figures: {without}."] * bool(reasons)]


def _gpu_parts(path, data):
    driver = " Driver {driver}.".format(**data["gpu"]) if data["gpu"].get("driver") else ""
    parts = [f"### {gpu_name(data)}", origin(data) + driver, tables.standing(data)]
    for name, section in data["sections"].items():
        state = "ok" if section["status"] == "ok" else f"{RED} {text(section['status'])}"
        parts.append(f"#### {name}: {state}, {digits(section.get('seconds'))} s")
        rows = section.get("rows", [])
        copies = [row.get("copy", row).get("gb_per_s", row.get("copy_gb_per_s")) for row in rows]
        if copies := [float(copy) for copy in copies if copy]:
            parts.append(f"A copy moves {max(copies):.0f} GB/s, read and written.")
        summary = section.get("summary", "").strip("= ")
        parts += [f"`{summary}`" * bool(summary), tables.timings(tables.rows_of(data, name))]
    for file in sorted(path.parent.glob("*-accuracy.json"))[-1:]:
        parts += [f"#### accuracy: {origin(read(file))}", *_accuracy_parts(read(file))]
    return filter(None, parts)


def main(argv=None):
    argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__.splitlines()[0]
    ).parse_args(argv)
    try:
        made = {RESULTS / "README.md": results_page().encode()}
        for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))):
            made[path] = render(path.name, path.read_text(encoding="utf-8")).encode()
    except ValueError as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 1
    for path, content in made.items():
        if not path.exists() or path.read_bytes() != content:
            write_bytes(path, content)
            print(f"{path}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
