"""Measure the accuracy of a KL and of its gradient: every provider against float64.

    python -m benchmarks.accuracy [--json FILE] [--plot FILE.png] [--rows N] [--vocabulary V]

All providers get the same logits, float32 and bfloat16, of four kinds. The second tensor is the
first plus noise, scaled to give the target KL. Errors of a row are relative: that of its KL, and
the L2 error of its gradient to one tensor of logits (rounding a gradient to bfloat16 alone costs up
to 2^-9). The other divergences get the float32 pairs of some sizes, with the gradient to the second
tensor. Without a GPU, Triton kernels run in the interpreter, ours on fewer rows (processes.py).
Exit code 0: no divergence of fastkl is negative or worse than plain torch's; 1: one is; 2: wrong
use.
"""

import io
import itertools
import math
import pickle
import sys
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

import fastkl
from benchmarks import cases, processes, providers, record, work
from fastkl import testing

DISTRIBUTIONS = ("normal 3", "normal 8", "peaked", "shift 50")
TARGETS = tuple(10.0**exponent for exponent in range(-8, 2))
# Providers whose Triton kernels run in the interpreter: name of the provider, and number of rows of
# a pair (None: all). At V = 128256 a row of ours takes three seconds, one of theirs a tenth. The
# other divergences take longer, so ours gets one row.
INTERPRETED = {
    "fastkl (Triton, interpreted)": ("fastkl", 2),
    "Liger KLDIVLoss (interpreted)": ("Liger KLDIVLoss", None),
    "Liger JSD (interpreted)": ("Liger JSD", None),
}
MEASURES = {"kl": "worst_relative", "gradient": "gradient_worst"}
KL = "kl_divergence"
FAMILY_TARGETS, COMPILED = TARGETS[::2], "torch.compile"


# Pairs of logits, and errors


def make_pair(distribution, dtype, target, rows, vocabulary, device):
    """Make (p, q, truth): q is p plus noise, the median KL is near `target`."""
    random = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    p = torch.randn(rows, vocabulary, **random) * (8 if distribution == "normal 8" else 3)
    if distribution == "peaked":
        # Like most tokens of a trained model: one entry has nearly all the probability.
        peaks = torch.randint(vocabulary, (rows, 1), **random)
        p.scatter_add_(1, peaks, torch.full((rows, 1), 24.0, device=device))
    p = p.to(cases.DTYPES[dtype])
    noise, shift = torch.randn(p.shape, **random), 50.0 * (distribution == "shift 50")
    # log10 of the noise, between bounds; a small KL grows with the square of the noise.
    low, exponent, high = -8.0, math.log10(target) / 2, 3.0
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


class Problem(NamedTuple):
    """The inputs of an operation, its values and gradients in float64, and the tensor of the
    requested gradient.
    """

    operation: str
    p: torch.Tensor
    q: torch.Tensor
    tokens: torch.Tensor | None
    values: torch.Tensor
    gradients: testing.Gradients
    wrt: str


def problem(operation, p, q, exact, wrt):
    """Make a Problem from two logits tensors and the truth of their KL."""
    if operation == KL:
        true = testing.kl_gradients(exact, torch.ones_like(exact.kl))
        return Problem(KL, p, q, None, exact.kl, true, wrt)
    p, tokens = cases.top_k(p) if operation == work.TOPK else (p, None)
    leaf = q.double().requires_grad_()
    (values,) = cases.exact(operation, p, leaf, tokens).values()
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return Problem(operation, p, q, tokens, values.detach(), testing.Gradients(None, gradient), "q")


def error_of(provider, asked, rows=None):
    """Return one provider's errors of values and gradient on a Problem, or reasons for missing
    ones; {} if it does not offer the operation. rows: of the pair, None for all. A provider without
    a gradient to asked.wrt computes the other.
    """
    if provider.why_not(asked.operation):
        return {"reason": provider.missing} if provider.missing else {}
    found, key = {}, "reason"
    try:
        kl, leaf, wrt = _run(provider, asked, rows)
        found = {"rows": len(kl), "negative": int((kl < 0).sum())}
        found |= _relative(kl.detach(), asked.values, rows, "worst_relative", "median_relative")
        key = "gradient_reason"
        (gradient,) = torch.autograd.grad(kl.sum(), leaf)
        true = getattr(asked.gradients, wrt)
        ends = _relative(gradient, true, rows, "gradient_worst", "gradient_median")
        return {**found, "wrt": wrt, **ends}
    except Exception as error:  # keep the other providers' figures
        return {**found, key: _reason(error)}


def _run(provider, asked, rows):
    def attempt(wrt):
        p, q = (x[:rows].detach() for x in (asked.p, asked.q))
        tokens = None if asked.tokens is None else asked.tokens[:rows]
        inputs = cases.inputs_of(p, q, wrt, tokens=tokens)
        return *provider.operations[asked.operation](inputs), *inputs.leaves, wrt

    try:
        return attempt(asked.wrt)
    except work.NotOfferedError:
        return attempt("q" if asked.wrt == "p" else "p")


def _relative(result, true, rows, worst, median):
    """Return the worst and the median error of a result against the first `rows` rows of the truth.
    A row far smaller than the others (its KL may even be 0) belongs to another record.
    """
    size = cases.sizes(true)
    off = cases.sizes(result.double() - true[:rows]) / size.clamp_min(size.median() / 10)[:rows]
    return {worst: off.max().item(), median: off.median().item()}


def _reason(error):
    return f"{type(error).__name__}: {error}".strip()[:2000]


def interpreted_error(name, pickled):
    (peer, rows), asked = INTERPRETED[name], pickle.loads(pickled)
    rows = 1 if rows and asked.operation != KL else rows
    with fastkl.use_backend("triton"):
        return error_of(*providers.load_providers(torch.device("cpu"), [peer]), asked, rows)


def errors_of(names, providers, asked):
    """Return {name: error_of} for the providers and, concurrently in the child, for INTERPRETED."""
    pickled = pickle.dumps(asked)
    some = [name for name in INTERPRETED if name in names]
    apart = {name: processes.INTERPRETER.submit(interpreted_error, name, pickled) for name in some}
    found = {provider.name: error_of(provider, asked) for provider in providers}
    for name, future in apart.items():
        failed = future.exception()
        found[name] = {"reason": _reason(failed)} if failed else future.result()
    return {name: errors for name, errors in found.items() if errors}


def accuracy(names, device, sizes, wrt="p", targets=TARGETS):
    """Yield a record per dtype, kind of row, size of the KL and operation; sizes: rows, vocabulary.
    torch.compile skips the family: compiling it would take longer than everything else.
    """
    loaded = providers.load_providers(device, names)
    eager = [provider for provider in loaded if provider.name != COMPILED]
    for dtype, kind, target in itertools.product(("fp32", "bf16"), DISTRIBUTIONS, targets):
        p, q, exact = make_pair(kind, dtype, target, *sizes, device)
        kl = exact.kl.median().item()
        found = {"dtype": dtype, "distribution": kind, "target": target, "kl": kl}
        # Rounding logits to bf16 gives a KL of its own: smaller targets are out of reach.
        if not target / 3 <= kl <= target * 3:
            skipped = f"rounding to {dtype} gives a KL of {kl:.1e}"
            yield {**found, "operation": KL, "errors": {}, "skipped": skipped}
            continue
        more = work.FAMILY if dtype == "fp32" and target in FAMILY_TARGETS else ()
        for operation in (KL, *more):
            asked = problem(operation, p, q, exact, wrt)
            errors = errors_of(names, eager if operation in more else loaded, asked)
            yield {**found, "operation": operation, "errors": errors, "skipped": None}


def not_worse(records, ours="fastkl", other="torch", slack=1e-4):
    """List the records where our error exceeds the other's by more than `slack` or is NaN, or a KL
    is negative.
    """

    def error(errors, name):
        return float(errors.get(name, {}).get("worst_relative", math.nan))

    found = [found["errors"] for found in records if not found["skipped"]]
    # max keeps the first argument if the second is NaN.
    return [
        errors
        for errors in found
        if not error(errors, ours) <= slack + max(0.0, error(errors, other))
        or errors[ours]["negative"]
    ]


# Tables


def summary(found):
    size = "{dtype:<5} {distribution:<9} KL {target:.0e}  {operation}  ".format(**found)
    return size + (found["skipped"] or "")


def names_of(data):
    return list(dict.fromkeys(name for found in data["records"] for name in found["errors"]))


def figures(data, dtype, measure, operation=KL):
    """Return "worst", "negative" and "rows" by size of the KL and provider, for one dtype.

    Figures are over all kinds of rows of one size. A NaN error counts as infinite; worst is NaN if
    a provider failed on one of the kinds, because the other kinds alone would flatter it.
    """
    key = MEASURES[measure]
    lines = [
        {
            "size": found["target"],
            "provider": name,
            "worst": np.nan_to_num(float(error[key]), nan=np.inf, posinf=np.inf)
            if key in error
            else np.nan,
            "negative": error.get("negative", 0) * (measure == "kl"),
            "rows": error.get("rows", 0),
        }
        for found in data["records"]
        for name, error in found["errors"].items()
        if (found["dtype"], found["operation"]) == (dtype, operation)
    ]
    found = pd.DataFrame(lines).groupby(["size", "provider"])
    return found.agg({"worst": lambda x: x.max(skipna=False), "negative": "sum", "rows": "sum"})


def markdown(data, dtype="fp32", measure="kl", providers=None, targets=None):
    """Write a table of the worst relative error by size of the KL and provider. providers, targets:
    the columns and rows (default: all with a figure). A provider without a figure gets a dash; one
    with fewer rows of each pair than the others shows their number.
    """
    texts = texts_of(data, dtype, measure).unstack()
    names = [name for name in names_of(data) if name in texts.dropna(axis=1, how="all")]
    texts = texts.reindex(columns=names if providers is None else providers).fillna("–")
    chosen = texts if targets is None else texts[texts.index.isin(targets)]
    lines = [[power(size), *cells] for size, *cells in chosen.itertuples()]
    return record.markdown(["KL", *(column_title(data, name) for name in texts)], lines)


def texts_of(*which):
    return figures(*which).apply(_text, axis=1)


def family_markdown(data, measure):
    """Write a table of the other divergences for float32 logits: one line per divergence and
    provider with a figure, one column per size of the KL.
    """
    texts = {name: texts_of(data, "fp32", measure, name).unstack(0) for name in operations_of(data)}
    lines = [
        [f"`{operation}`", column_title(data, name, operation), *cells]
        for operation, table in texts.items()
        for name, *cells in table.dropna(how="all").fillna("–").itertuples()
    ]
    return record.markdown(["KL", "", *map(power, FAMILY_TARGETS)], lines)


def operations_of(data):
    return [name for name in work.FAMILY if any(r["operation"] == name for r in data["records"])]


def column_title(data, name, operation=KL):
    records = (found for found in data["records"] if found["operation"] == operation)
    errors = (found["errors"].get(name, {}) for found in records)
    rows = min(error.get("rows", data["rows"]) for error in errors)
    return f"{name}, {rows} of {data['rows']} rows" if rows < data["rows"] else name


def _text(figure):
    negative = f" ({figure.negative:.0f} of {figure.rows:.0f} negative)"
    text = power(figure.worst) + negative * bool(figure.negative)
    return None if np.isnan(figure.worst) else text


def power(value):
    digits, _, exponent = f"{value:.0e}".partition("e")
    return f"{digits}e{int(exponent)}" if exponent else digits


def tables(data):
    """Yield (title, table)."""
    for dtype in dict.fromkeys(found["dtype"] for found in data["records"]):
        yield f"the KL, {dtype}", markdown(data, dtype)
        to = f"gradient to {data['wrt'].upper()}"
        yield f"the KL, its {to}, {dtype}", markdown(data, dtype, "gradient")
    if operations_of(data):
        yield "the other divergences, fp32", family_markdown(data, "kl")
        yield "the other divergences, their gradient to Q, fp32", family_markdown(data, "gradient")


# The plot


def draw(data, path):
    """Write a PNG 1600 pixels wide: errors of the KL on the left, of its gradient on the right, one
    row per dtype, and below them errors of the other divergences. Hollow markers: some value is
    negative; markers at the top: infinite or NaN.
    """
    dtypes = list(dict.fromkeys(found["dtype"] for found in data["records"]))
    figure, content = Figure(figsize=(8, 11), dpi=200, layout="constrained"), io.BytesIO()
    upper, lower = figure.subfigures(2, 1, height_ratios=(len(dtypes), 2))
    panels = list(upper.subplots(len(dtypes), 2, squeeze=False, sharex=True, sharey=True).flat)
    panels += lower.subplots(2, 3, sharex=True, sharey=True).flat
    errors = (item for found in data["records"] for item in found["errors"].items())
    names = dict.fromkeys(name for name, error in errors if "rows" in error)
    drawn = [(f"{dtype}, {measure}", dtype, measure) for dtype in dtypes for measure in MEASURES]
    drawn += [(f"fp32, {name}", "fp32", "kl", name) for name in operations_of(data)]
    for panel, (title, *chosen) in zip(panels, drawn, strict=True):
        found = figures(data, *chosen)
        found["worst"] = found["worst"].clip(1e-8, 3e3)
        table = found["worst"].unstack().reindex(columns=names)
        style = {"loglog": True, "ylim": (1e-8, 3e3), "grid": True, "xlabel": "", "legend": False}
        table.plot(ax=panel, marker="o", ms=4, **style)
        panel.set_title(title, fontsize=10)
        hollow = found["worst"][found["negative"] > 0]
        panel.scatter(hollow.index.get_level_values("size"), hollow, 5, "white", zorder=3)
    worst = f"worst of {data['rows']} rows of each kind (ours interpreted: fewer)"
    worst += f", V = {data['vocabulary']}"
    what = f"relative error against float64 by KL in nats, {worst}; hollow: negative; top: infinite"
    figure.suptitle(what, fontsize=8)
    lines, names = panels[0].get_legend_handles_labels()
    figure.legend(lines, names, ncols=3, fontsize=7, loc="outside lower center")
    figure.savefig(content, format="png", metadata={"Software": None})
    record.write_bytes(path, content.getvalue())


# The command


def parse(argv):
    parser = record.command_line("accuracy", __doc__.splitlines()[0])
    add = parser.add_argument
    add("--plot", type=record.output_file, metavar="FILE.png", help="draw them into FILE.png")
    add("--rows", type=partial(record.at_least, 1), default=8, metavar="N", help="of each pair (8)")
    add("--vocabulary", type=partial(record.at_least, 2), default=128256, metavar="V")
    add("--wrt", choices="pq", default="p", help="which logits of KL(P‖Q) the gradient is to")
    add("--providers", nargs="+", metavar="NAME", choices=[*providers.LOADERS, *INTERPRETED])
    add("--device", choices=["cpu", *["cuda"] * torch.cuda.is_available()], default="cpu")
    return parser.parse_args(argv)


def main(argv=None):
    arguments = parse(argv)
    names = arguments.providers or [
        *providers.LOADERS,
        *list(INTERPRETED) * (arguments.device == "cpu"),
    ]
    sizes = {"rows": arguments.rows, "vocabulary": arguments.vocabulary}
    data = {**record.provenance("accuracy", argv), **sizes, "wrt": arguments.wrt}
    data |= {"device": arguments.device, "threads": torch.get_num_threads()}
    records = accuracy(names, torch.device(arguments.device), sizes.values(), arguments.wrt)
    record.gather(arguments.json, data, records, summary)
    for title, table in tables(data):
        print(f"\nWorst relative error, {title}:\n\n{table}")
    if arguments.plot:
        draw(data, arguments.plot)
    worse = not_worse(data["records"]) if {"fastkl", "torch"} <= set(names_of(data)) else []
    for errors in worse:
        print(f"worse than plain torch, or negative: {errors}", file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
