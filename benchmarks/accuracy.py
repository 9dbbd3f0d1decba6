"""Measure the digits of a KL and of its gradient: every provider against float64.

    python -m benchmarks.accuracy [--json FILE] [--plot FILE.png] [--rows N] [--vocabulary V]

All providers get the same logits, float32 and bfloat16, of four kinds. The second tensor is the
first plus noise, of the size that gives the KL in question. The error of a row is relative: that of
its KL, and that of the gradient of its KL to one tensor of logits in L2 norm (a bfloat16 gradient
alone rounds by up to 2^-9). Providers whose kernels need a GPU run in Triton's interpreter on a
CPU, ours on fewer rows (interpreted.py). Exit code 0: fastkl's KL is nowhere negative nor worse
than plain torch's; 1: it is; 2: wrong use.
"""

import io
import itertools
import math
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from matplotlib.figure import Figure

from benchmarks import record
from benchmarks.cases import DTYPES, Inputs
from benchmarks.interpreted import NAMES as INTERPRETED
from benchmarks.interpreted import interpreted_providers
from benchmarks.providers import LOADERS, load_providers
from benchmarks.work import NotOfferedError
from fastkl import testing

DISTRIBUTIONS = ("normal 3", "normal 8", "peaked", "shift 50")
TARGETS = tuple(10.0**exponent for exponent in range(-8, 2))
MEASURES = {"kl": "worst_relative", "gradient": "gradient_worst"}


# Pairs of logits, and errors


def make_pair(distribution, dtype, target, rows, vocabulary, device):
    """Make (p, q, their truth): q is p plus noise, the median KL is near `target`."""
    random = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    p = torch.randn(rows, vocabulary, **random) * (8 if distribution == "normal 8" else 3)
    if distribution == "peaked":
        # As most tokens of a trained model: one entry holds nearly all of the probability.
        peaks = torch.randint(vocabulary, (rows, 1), **random)
        p.scatter_add_(1, peaks, torch.full((rows, 1), 24.0, device=device))
    p = p.to(DTYPES[dtype])
    noise = torch.randn(p.shape, **random)
    shift = 50.0 if distribution == "shift 50" else 0.0
    low, high = -8.0, 3.0  # of log10 of the noise
    exponent = math.log10(target) / 2  # a small KL grows with the square of the noise
    for _ in range(30):
        q = (p.float() + 10**exponent * noise + shift).to(p.dtype)
        exact = testing.truth(p, q)
        reached = exact.kl.median().item()
        low, high = (exponent, high) if reached < target else (low, exponent)
        if abs(reached - target) < 0.02 * target or high - low < 1e-3:
            break
        exponent += math.log10(target / reached) / 2 if reached > 0 else math.inf
        exponent = exponent if low < exponent < high else (low + high) / 2
    return p, q, exact


def error_of(provider, p, q, exact, true_gradients, wrt="p"):
    """Return the errors of one provider on one pair, of its KL and of its gradient, or reasons.

    A provider without a gradient to `wrt` is asked for the other one.
    """
    if missing := provider.why_not("kl_divergence"):
        return {"reason": missing}
    rows = slice(provider.rows)
    try:
        kl, leaf, wrt = _run(provider, p[rows], q[rows], wrt)
    except Exception as error:  # one provider's failure must not lose the others' figures
        return {"reason": _reason(error)}
    # A row far smaller than the size in question (its KL may even be 0) belongs to another record.
    true = exact.kl[rows]
    relative = (kl.detach().double() - true).abs() / true.clamp_min(exact.kl.median() / 10)
    found = {"rows": len(kl), "worst_relative": relative.max().item()}
    found |= {"median_relative": relative.median().item(), "negative": int((kl < 0).sum())}
    try:
        (gradient,) = torch.autograd.grad(kl.sum(), leaf)
    except Exception as error:
        return {**found, "gradient_reason": _reason(error)}
    true = getattr(true_gradients, wrt)[rows]
    norm = true.norm(dim=-1)
    relative = (gradient.double() - true).norm(dim=-1) / norm.clamp_min(norm.median() / 10)
    worst, median = relative.max().item(), relative.median().item()
    return {**found, "wrt": wrt, "gradient_worst": worst, "gradient_median": median}


def _run(provider, p, q, wrt):
    for name in (wrt, "q" if wrt == "p" else "p"):
        leaves = (x.detach().requires_grad_(name == key) for key, x in (("p", p), ("q", q)))
        inputs = Inputs(*leaves, None, (), name)
        try:
            return *provider.operations["kl_divergence"](inputs), inputs.leaf, name
        except NotOfferedError as error:
            refused = error
    raise refused


def _reason(error):
    return f"{type(error).__name__}: {error}".strip()[:2000]


def accuracy(providers, device, sizes, wrt="p", targets=TARGETS):
    """Yield a record per element type, kind of row and size of the KL; sizes: rows, vocabulary."""
    for dtype, kind, target in itertools.product(("fp32", "bf16"), DISTRIBUTIONS, targets):
        p, q, exact = make_pair(kind, dtype, target, *sizes, device)
        kl = exact.kl.median().item()
        found = {"dtype": dtype, "distribution": kind, "target": target, "kl": kl}
        if not target / 3 <= kl <= target * 3:
            # Rounding the logits to bf16 is itself a KL: below it, no pair exists.
            why = f"rounding to {dtype} gives a KL of {kl:.1e}"
            yield {**found, "errors": {}, "skipped": why}
            continue
        rest = (p, q, exact, testing.kl_gradients(exact, torch.ones_like(exact.kl)), wrt)
        # A provider in another process runs beside the others.
        with ThreadPoolExecutor(1) as other:
            apart = {p.name: other.submit(error_of, p, *rest) for p in providers if p.apart}
            errors = {p.name: error_of(p, *rest) for p in providers if not p.apart}
            errors |= {name: future.result() for name, future in apart.items()}
        yield {**found, "errors": errors, "skipped": None}


def not_worse(records, ours="fastkl", other="torch", slack=1e-4):
    """List the records in which our error exceeds the other's by more than `slack`, is not a
    number, or a KL came out negative."""
    worse = []
    for errors in (found["errors"] for found in records if not found["skipped"]):
        mine, theirs = (
            float(errors.get(name, {}).get("worst_relative", math.nan)) for name in (ours, other)
        )
        if not mine <= slack + (0.0 if math.isnan(theirs) else theirs) or errors[ours]["negative"]:
            worse.append(errors)
    return worse


# Tables


def summary(found):
    cells = [f"{found['dtype']:<5} {found['distribution']:<9} KL {found['target']:.0e}"]
    cells += [found["skipped"]] if found["skipped"] else []
    for name, error in found["errors"].items():
        worst = error.get("worst_relative")
        words = error.get("reason", "").split("\n")[0][:60] if worst is None else f"{worst:.0e}"
        cells.append(
            f"{name} {words}" + f" ({error.get('negative')} negative)" * bool(error.get("negative"))
        )
    return "  ".join(cells)


def names_of(data):
    return list(dict.fromkeys(name for found in data["records"] for name in found["errors"]))


def cells(data, dtype, measure):
    """Return {provider: {size: {"worst", "negative", "rows"}}} of one element type, over the kinds
    of rows of one size.

    None where a provider failed in one of the kinds: the others alone would flatter it. A provider
    that has no figure is left out.
    """
    key, by_size = MEASURES[measure], {}
    for found in sorted(data["records"], key=lambda found: found["target"]):
        if found["dtype"] == dtype:
            by_size.setdefault(found["target"], []).append(found["errors"])
    table = {}
    for name, (size, kinds) in itertools.product(names_of(data), by_size.items()):
        errors = [errors[name] for errors in kinds if name in errors]
        figures = table.setdefault(name, {})
        figures[size] = None
        if errors and all(key in error for error in errors):
            worst = [float(error[key]) for error in errors]
            figures[size] = {
                "worst": math.nan if any(map(math.isnan, worst)) else max(worst),
                "negative": sum(error["negative"] for error in errors),
                "rows": sum(error["rows"] for error in errors),
            }
    return {name: sizes for name, sizes in table.items() if any(sizes.values())}


def markdown(data, dtype="fp32", measure="kl", providers=None, targets=None):
    """Write a table of the worst relative error by size of the KL and provider.

    providers, targets: which columns and rows (default: all with a figure). A provider without a
    figure gets a dash; one that took fewer rows of each pair than the others says how many.
    """
    found = cells(data, dtype, measure)
    names = list(found) if providers is None else providers
    sizes = sorted({r["target"] for r in data["records"] if r["dtype"] == dtype})
    lines = [["KL", *(column_title(data, name) for name in names)]]
    for size in (size for size in sizes if targets is None or size in targets):
        figures = (found.get(name, {}).get(size) for name in names)
        lines.append([power(size), *(_text(one, measure) for one in figures)])
    head, *rest = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|---" * len(lines[0]) + "|", *rest])


def column_title(data, name):
    errors = [found["errors"].get(name, {}) for found in data["records"]]
    rows = next((error["rows"] for error in errors if "rows" in error), data["rows"])
    return f"{name}, {rows} of {data['rows']} rows" if rows < data["rows"] else name


def _text(figure, measure):
    if figure is None:
        return "–"
    negative = f" ({figure['negative']} of {figure['rows']} negative)"
    return power(figure["worst"]) + negative * bool(figure["negative"] and measure == "kl")


def power(value):
    """Write 1e-8 instead of 1e-08."""
    digits, _, exponent = f"{value:.0e}".partition("e")
    return f"{digits}e{int(exponent)}" if exponent else digits


def tables(data):
    for dtype in dict.fromkeys(found["dtype"] for found in data["records"]):
        for measure in MEASURES:
            yield measure, dtype, markdown(data, dtype, measure)


# The plot


def draw(data, path):
    """Write a PNG 1600 pixels wide: errors of the KL above, of its gradient below, the element
    types side by side. Hollow: some KL came out negative; at the top: infinite or not a number."""
    dtypes = list(dict.fromkeys(found["dtype"] for found in data["records"]))
    figure, content = Figure(figsize=(8, 7), dpi=200, layout="constrained"), io.BytesIO()
    panels = figure.subplots(2, len(dtypes), squeeze=False, sharex=True, sharey=True)
    colours = {name: f"C{i}" for i, name in enumerate(names_of(data))}
    lines, chosen = {}, itertools.product(MEASURES, dtypes)
    for panel, (measure, dtype) in zip(panels.flat, chosen, strict=True):
        panel.set(xscale="log", yscale="log", ylim=(3e-8, 3e3))
        panel.set_title(f"{measure}, {dtype} logits", fontsize=9, loc="left")
        panel.grid(color="#e5e5e5", linewidth=0.6)
        for name, sizes in cells(data, dtype, measure).items():
            found = {size: figures for size, figures in sizes.items() if figures}
            heights = [
                3e3 if math.isnan(f["worst"]) else min(max(f["worst"], 3e-8), 3e3)
                for f in found.values()
            ]
            hollow = [measure == "kl" and f["negative"] > 0 for f in found.values()]
            colour, width = colours[name], 2.2 if name.startswith("fastkl") else 1.0
            (lines[column_title(data, name)],) = panel.plot([*found], heights, colour, lw=width)
            faces = ["white" if empty else colour for empty in hollow]
            panel.scatter([*found], heights, 14, faces, edgecolors=colour, zorder=3)
    for panel in panels[-1]:
        panel.set_xlabel("KL in nats; hollow: negative; top: infinite", fontsize=8)
    worst = f"worst of {data['rows']} rows of each kind, V = {data['vocabulary']}"
    figure.supylabel(f"relative error against float64, {worst}", fontsize=8)
    figure.legend(lines.values(), lines, ncols=3, fontsize=7, loc="outside lower center")
    figure.savefig(content, format="png", metadata={"Software": None})
    record.write_bytes(path, content.getvalue())


# The command


def parse(argv):
    parser = record.command_line("accuracy", __doc__.splitlines()[0])
    add = parser.add_argument
    add("--plot", type=record.output_file, metavar="FILE.png", help="draw them into FILE.png")
    add("--rows", type=int, default=8, metavar="N", help="of each pair (default: %(default)s)")
    add("--vocabulary", type=int, default=128256, metavar="V", help="(default: %(default)s)")
    add("--wrt", choices="pq", default="p", help="which logits of KL(P‖Q) the gradient is to")
    add("--providers", nargs="+", metavar="NAME", choices=[*LOADERS, *INTERPRETED])
    add("--device", default="cpu", choices=("cpu", "cuda"), help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected cpu where there is no CUDA GPU, got cuda")
    for name, least in (("rows", 1), ("vocabulary", 2)):
        if (value := getattr(arguments, name)) < least:
            parser.error(f"--{name}: expected {least} or more, got {value}")
    return arguments


def run(arguments, data):
    device = torch.device(arguments.device)
    providers = load_providers(device, arguments.providers)
    if device.type == "cpu":
        providers += interpreted_providers(arguments.providers)
    data |= {key: getattr(arguments, key) for key in ("rows", "vocabulary", "wrt", "device")}
    data |= {"threads": torch.get_num_threads(), "records": []}
    for found in accuracy(providers, device, (data["rows"], data["vocabulary"]), data["wrt"]):
        data["records"].append(found)
        print(summary(found), flush=True)
    return data


def main(argv=None):
    arguments = parse(argv)
    data = run(arguments, record.provenance("accuracy", argv))
    record.write_json(arguments.json, data)
    for measure, dtype, table in tables(data):
        print(f"\nWorst relative error, {measure}, {dtype} logits:\n\n{table}")
    if arguments.plot:
        draw(data, arguments.plot)
    worse = not_worse(data["records"]) if {"fastkl", "torch"} <= set(names_of(data)) else []
    for errors in worse:
        print(f"worse than plain torch, or negative: {errors}", file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
