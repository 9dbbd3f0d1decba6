"""The figures in README.md, generated from the newest results that are committed.

    python3 -m benchmarks.readme_tables

rewrites what stands between <!-- NAME --> and <!-- /NAME --> for each NAME in SECTIONS; tests/test_readme_tables.py holds the README to it.
"""
import json
import re
import sys

from benchmarks import accuracy
from benchmarks.record import ROOT, write_bytes

RESULTS = ROOT / "benchmarks" / "results"
ACCURACY_COLUMNS = ["fastkl", "fastkl (Triton, interpreted)", "torch", "torch.compile", "Categorical", "TRL", "Liger JSD (interpreted)"]
# Kernels that take a KL, or what estimates of it are made of, from logits or log-probabilities: (name in the results, what it computes).
KERNELS = (
    ("fastkl kl_divergence.forward", "KL from logits"), ("fastkl token_stats.forward", "both KLs, entropy and log-probs from logits"),
    ("fastkl kl_divergence.backward_p", "its gradient to the logits"),
    ("liger _kldiv_kernel_forward", "KL from log-probabilities"), ("liger _jsd_kernel beta=1", "KL and its gradient, from log-probabilities"),
    ("trl logprob_entropy._forward_kernel", "log-prob and entropy from logits"),
    ("trl chunked_divergence._stats_kernel", "both KLs from float32 logits"),
)
PIPELINES = ("fastkl kl_divergence, token_stats", "liger kl_div", "liger jsd, beta 0 and 1")
GPU_PHASES = ("forward", "backward")


def read(path):
    """The results in a file under benchmarks/results."""
    return json.loads((RESULTS / path).read_text(encoding="utf-8"))


def markdown(head, rows):
    """A table: the cells of its head, and of its rows."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def accuracy_section():
    """Worst relative error of the KL by size, a column per provider."""
    return accuracy.markdown(read("cpu/accuracy.json"), providers=ACCURACY_COLUMNS, targets=accuracy.SHOWN[::2])


def static_section():
    """What the hot loops of ours and of peers' kernels issue, and the bytes of each way from logits to a KL."""
    data = read("static/peers.json")
    # Ours are there in both types, bf16 first.
    kernels, pipelines = ({row[key]: row for row in reversed(data[part])} for part, key in (("kernels", "kernel"), ("pipelines", "pipeline")))
    rows = []
    for name, work in KERNELS:
        row = kernels[name]
        if "reason" in row:
            continue
        bound = row["upper_bound_of_peak_bandwidth"]
        share = f"{bound['percent']:g} %" + ("" if bound["limited_by"] == "bandwidth" else f" ({bound['limited_by']})")
        unit = {"pair": f"{row['dtype']} pair", "logit": f"{row['dtype']} logit"}[row["unit"]]
        rows.append([name.replace("_", r"\_"), work, unit, row["instructions_per_pair"], row["ex2_per_pair"], row["kernel_bytes"], share])
    head = ["kernel", "computes", "per", "instructions", "exponentials", "bytes", "H200, at most"]
    ways = []
    for name in PIPELINES:
        row = pipelines[name]
        sides = [_range(row[side]["bytes_bf16_log_probs"], row[side]["bytes_fp32_log_probs"]) for side in GPU_PHASES]
        ways.append([name.replace("_", r"\_"), *sides, row["gives"].replace("||", "‖")])
    return markdown(head, rows) + "\n\n" + markdown(["from bf16 logits, bytes per pair", "forward", "backward", "gives"], ways)


def _range(low, high):
    return str(low) if low == high else f"{low} to {high}"


def gpu_files():
    """The results of gpu_suite, oldest first."""
    return sorted(path for path in RESULTS.glob("*/*.json") if path.parent.name not in ("cpu", "static"))


def gpu_section():
    """The main shape on the GPU that was measured last; without one a sentence that says so."""
    files = gpu_files()
    if not files:
        return "No time has been measured on a GPU yet, so none is given: `python3 -m benchmarks.gpu_suite --out DIR` measures it in 8 minutes."
    data = json.loads(files[-1].read_text(encoding="utf-8"))
    rows = []
    for row in data["sections"].get("main", {}).get("rows", []):
        if "workload" not in row:
            continue
        if row["status"] != "ok" or not row.get("times"):
            cells = [f"{row['status']}: {row['reason']}".splitlines()[0][:80], "", "", ""]
        else:
            cells = [f"{row['times'][phase]['median_ms']:.2f} ms, {row['times'][phase]['percent_of_copy']:.0f} %" for phase in GPU_PHASES]
            cells += [f"{row['memory']['peak_bytes'] / 1e9:.2f} GB", f"{row['error']['values']:.0e}"]
        rows.append([row["workload"]["name"], row["provider"], *cells])
    head = ["workload", "provider", "forward, of a copy's bandwidth", "backward", "peak beside the inputs", "worst error"]
    origin = f"{data['gpu']['name']}, {data['date'][:10]}, torch {data['versions']['torch']}, Triton {data['versions']['triton']}"
    return f"Measured on one {origin}:\n\n{markdown(head, rows)}"


SECTIONS = {"accuracy": accuracy_section, "static": static_section, "gpu": gpu_section}


def render(text):
    """The README with every section made anew."""
    for name, make in SECTIONS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"README.md: expected one section <!-- {name} --> to <!-- /{name} -->, got {len(pattern.findall(text))}; put it in")
        content = make()
        text = pattern.sub(lambda found, content=content: found[1] + content + found[2], text)
    return text


def main():
    """Rewrites README.md; returns the exit code."""
    path = ROOT / "README.md"
    write_bytes(path, render(path.read_text(encoding="utf-8")).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
