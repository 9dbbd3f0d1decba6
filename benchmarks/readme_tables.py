"""The figures in README.md and the page benchmarks/results/README.md, generated from the newest results that are committed.

    python3 -m benchmarks.readme_tables

rewrites the page, and in the README what stands between <!-- NAME --> and <!-- /NAME --> for each NAME in SECTIONS; tests/test_readme_tables.py
holds both to the results. Exit code 0: done; 1: a file is not as it should be, nothing was written; 2: wrong use.
"""
import argparse
import json
import re
import sys

from benchmarks import accuracy, cpu, gpu_tables
from benchmarks.gpu_tables import markdown, origin
from benchmarks.record import ROOT, write_bytes

RESULTS = ROOT / "benchmarks" / "results"
ACCURACY_COLUMNS = ["fastkl", "fastkl (Triton, interpreted)", "torch", "torch.compile", "Categorical", "TRL", "Liger JSD (interpreted)"]
# The README's kernels, by their names in the results, and what each computes.
KERNELS = {
    "fastkl kl_divergence.forward": "KL from logits",
    "fastkl token_stats.forward": "both KLs, entropy and log-probs from logits",
    "fastkl kl_divergence.backward_p": "its gradient to the logits",
    "liger _kldiv_kernel_forward": "KL from log-probabilities",
    "liger _jsd_kernel beta=1": "KL and its gradient, from log-probabilities",
    "trl logprob_entropy._forward_kernel": "log-prob and entropy from logits",
    "trl chunked_divergence._stats_kernel": "both KLs from float32 logits",
}
PIPELINES = ("fastkl kl_divergence, token_stats", "liger kl_div", "liger jsd, beta 0 and 1")
SIDES = ("forward", "backward")


class BrokenFileError(ValueError):
    """A file that is not as the tables need it; the message has its name and the remedy."""


def read(path):
    """The results in a file under benchmarks/results; BrokenFileError where they cannot be read."""
    file = RESULTS / path
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BrokenFileError(f"{file}: expected results in JSON, got {type(error).__name__}: {error}; measure them again (benchmarks/README.md says "
                              "how), or take the file from git") from None


def accuracy_section():
    """Worst relative error of the KL by size, a column per provider."""
    table = accuracy.markdown(read("cpu/accuracy.json"), providers=ACCURACY_COLUMNS, targets=accuracy.SHOWN[::2])
    # On a CPU our name alone stands for the reference; the kernels have the column beside it.
    return table.replace("| fastkl |", "| fastkl, reference on a CPU |", 1)


def linear_section():
    """Errors from hidden states by size of the KL, for bfloat16 inputs."""
    data = read("cpu/linear_accuracy.json")
    records = [record for record in data["records"] if record["dtype"] == "bf16"]
    ways = [("KL, bfloat16 logits (as every model returns them)", "fastkl", "kl"), ("the same in plain torch", "torch", "kl"),
            ("its gradient to the weight", "fastkl", "weight"), ("the same in plain torch", "torch", "weight"),
            ("KL, `logits_dtype=torch.float32`", "fastkl, logits_dtype=float32", "kl"),
            ("its gradient to the weight, itself bfloat16", "fastkl, logits_dtype=float32", "weight")]
    head = ["bfloat16 inputs, mean KL of", *(_short(record["kl"]) for record in records)]
    return markdown(head, [[words, *(_short(record["ways"][way][figure]) for record in records)] for words, way, figure in ways])


def _short(value):
    digits, exponent = f"{value:.0e}".split("e")
    return f"{digits}e{int(exponent)}"


def static_section():
    """What the hot loops of ours and of peers' kernels issue, and the bytes of each way from logits to a KL."""
    data = read("static/peers.json")
    return kernels_table(data, KERNELS) + "\n\n" + ways_table(data, PIPELINES)


def kernels_table(data, names):
    """The kernels of these names, or all; one that has no figures says why. Of ours, which are there in both types, a name means the first, bf16."""
    first = {row["kernel"]: row for row in reversed(data["kernels"])}
    lines = []
    for row in data["kernels"] if names is None else [first[name] for name in names]:
        name, work = row["kernel"].replace("_", r"\_"), KERNELS.get(row["kernel"], "")
        if "reason" in row:
            lines.append([name, row["reason"].replace("|", "/"), *[""] * 5])
            continue
        bound = row["upper_bound_of_peak_bandwidth"]
        share = f"{bound['percent']:g} %" + ("" if bound["limited_by"] == "bandwidth" else f" ({bound['limited_by']})")
        lines.append([name, work, f"{row['dtype']} {row['unit']}", row["instructions_per_pair"], row["ex2_per_pair"], row["kernel_bytes"], share])
    return markdown(["kernel", "computes", "per", "instructions", "exponentials", "bytes", "H200, at most"], lines)


def ways_table(data, names):
    """Bytes of memory traffic of the ways of these names, from logits to a KL."""
    ways = {row["pipeline"]: row for row in data["pipelines"]}
    lines = []
    for name in names:
        row = ways[name]
        sides = [_range(row[side]["bytes_bf16_log_probs"], row[side]["bytes_fp32_log_probs"]) for side in SIDES]
        lines.append([name.replace("_", r"\_"), *sides, row["gives"].replace("||", "‖")])
    return markdown(["from bf16 logits, bytes per pair", "forward", "backward", "gives"], lines)


def _range(low, high):
    return str(low) if low == high else f"{low} to {high}"


def gpu_section():
    """The newest results of a GPU; without any a sentence that says so."""
    return gpu_tables.readme_section(gpu_tables.gpu_results(RESULTS))


SECTIONS = {"accuracy": accuracy_section, "static": static_section, "gpu": gpu_section, "linear": linear_section}


def render(text):
    """The README with every section made anew."""
    for name, make in SECTIONS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise BrokenFileError(f"README.md: expected one section <!-- {name} --> to <!-- /{name} -->, got {len(pattern.findall(text))}; put it in")
        content = make()
        text = pattern.sub(lambda found, content=content: found[1] + content + found[2], text)
    return text


def results_page():
    """All tables of all committed results, as a page; of each GPU those of its newest results."""
    errors, costs = read("cpu/accuracy.json"), read("static/peers.json")
    parts = [
        "# Results", "Generated by `python3 -m benchmarks.readme_tables` from the JSON files beside this page; [how each was made](../README.md).",
        "## Accuracy",
        f"Worst relative error against float64 by size of the KL; V = {errors['vocabulary']}, {errors['rows']} rows of each kind. {origin(errors)}",
        "![Relative error against the size of the KL](cpu/accuracy.png)",
    ]
    for dtype in ("fp32", "bf16"):
        for measure, words in (("kl", "the KL"), ("gradient", "its gradient to the first logits")):
            parts += [f"### {words}, {dtype}", accuracy.markdown(errors, dtype, measure)]
    reasons = {name: error["reason"].splitlines()[0] for record in errors["records"] for name, error in record["errors"].items() if "reason" in error}
    parts += ["Without figures: " + "; ".join(f"{name}: `{reason}`" for name, reason in reasons.items()) + "."] if reasons else []
    parts += [
        "## Static costs", f"{costs['model'].capitalize()}. {origin(costs)}", kernels_table(costs, None),
        ways_table(costs, [row["pipeline"] for row in costs["pipelines"]]),
        *cpu.page(read("cpu/times.json")), "## GPU", *gpu_tables.page(gpu_tables.gpu_results(RESULTS)),
    ]
    return "\n\n".join(parts) + "\n"


def main(argv=None):
    """Rewrites both where they differ, and says so, or neither; returns the exit code."""
    argparse.ArgumentParser(prog="python3 -m benchmarks.readme_tables", description=__doc__.splitlines()[0]).parse_args(argv)
    readme, page = ROOT / "README.md", RESULTS / "README.md"
    try:
        for path in sorted(RESULTS.glob("*/*.json")):
            read(path)  # gpu_tables, which reads those of GPUs, does not say which one is broken
        made = {readme: render(readme.read_text(encoding="utf-8")), page: results_page()}
    except BrokenFileError as error:
        print(f"readme_tables: error: {error}", file=sys.stderr)
        return 1
    for path, text in made.items():
        same = path.exists() and path.read_text(encoding="utf-8") == text
        if not same:
            write_bytes(path, text.encode())
        print(f"{path.relative_to(ROOT)}: {'as it was' if same else 'written'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
