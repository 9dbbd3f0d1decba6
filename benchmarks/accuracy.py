"""How many digits of a KL survive, and of its gradient: every provider against float64, on four
kinds of rows, by size of the KL.

    python3 -m benchmarks.accuracy [--json FILE] [--plot FILE.png] [--rows N] [--vocabulary V]

All providers get the same logits, float32 and bfloat16. The second tensor is the first plus noise,
of the size that gives the KL in question. The error of a row is relative: that of its KL, and that
of the gradient of its KL to one tensor of logits in L2 norm (a bfloat16 gradient alone rounds by up
to 2^-9). Providers whose kernels need a GPU run in Triton's interpreter here, ours on fewer rows
(benchmarks/interpreted.py). Exit code 0: fastkl's KL is nowhere negative nor worse than plain
torch's; 1: it is; 2: wrong use.
"""

import argparse
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import torch

from benchmarks.cases import DTYPES, Inputs
from benchmarks.interpreted import NAMES as INTERPRETED
from benchmarks.interpreted import interpreted_providers
from benchmarks.providers import LOADERS, load_providers
from benchmarks.record import output_file, provenance, version, write_json
from benchmarks.work import NotOfferedError

TARGETS = tuple(10.0**exponent for exponent in range(-8, 3))
SHOWN = TARGETS[:-1]  # of the command: up to 1e1
DISTRIBUTIONS = ("normal 3", "normal 8", "peaked", "shift 50")
PEER_PACKAGES = ("trl", "liger-kernel", "transformers")


# Pairs of logits, and the truth
# ---------------------------------------------------------------------------------


def _from_peak(logits):
    """(the largest logit of a row, log-sum-exp less it) in float64. The second is tiny on peaked
    rows and yet exact: the peak is not in the sum.
    """
    largest, index = logits.max(-1, keepdim=True)
    others = (logits - largest).exp_().scatter_(-1, index, 0.0)
    return largest, others.sum(-1, keepdim=True).log1p()


def _log_probs(p_logits, q_logits):
    """log P, log Q and their difference in float64. Differences of logits are exact; what is tiny
    is added to them last.
    """
    p, q = p_logits.double(), q_logits.double()
    (peak_p, more_p), (peak_q, more_q) = _from_peak(p), _from_peak(q)
    return (
        (p - peak_p) - more_p,
        (q - peak_q) - more_q,
        ((q - p) - (peak_q - peak_p)) - (more_q - more_p),
    )


def exact_kl(p_logits, q_logits):
    """KL(P‖Q) in float64. A sum of terms that are zero or positive, so nothing cancels, however
    small the KL.
    """
    log_p, log_q, d = _log_probs(p_logits, q_logits)
    p = log_p.exp()
    # KL = E_p[e^d - 1 - d], since E_p[e^d] = 1. Where d is large, p·e^d is q: e^d alone may
    # overflow.
    near = torch.expm1(d.clamp(-1, 1)) - d.clamp(-1, 1)
    return torch.where(d.abs() < 1, p * near, log_q.exp() - p - p * d).sum(-1)


def exact_gradient(p_logits, q_logits, wrt):
    """The gradient of KL(P‖Q) to the logits of P, p·(-d - KL) with d = log Q - log P, or to those
    of Q, p·(e^d - 1), in float64.
    """
    log_p, log_q, d = _log_probs(p_logits, q_logits)
    p = log_p.exp()
    if wrt == "p":
        return p * (-d - exact_kl(p_logits, q_logits).unsqueeze(-1))
    return torch.where(d.abs() < 1, p * torch.expm1(d.clamp(-1, 1)), log_q.exp() - p)


def _policy_logits(distribution, rows, vocabulary, device, generator):
    logits = torch.randn(rows, vocabulary, generator=generator, device=device)
    logits *= 8 if distribution == "normal 8" else 3
    if distribution == "peaked":
        # As most tokens of a trained model: one entry holds nearly all of the probability.
        peaks = torch.randint(vocabulary, (rows, 1), generator=generator, device=device)
        logits.scatter_add_(1, peaks, torch.full((rows, 1), 24.0, device=device))
    return logits


def make_pair(distribution, dtype, target, rows, vocabulary, device):
    """(p, q, true KL per row): q is p plus noise whose size is chosen so that the median KL comes
    close to `target`.
    """
    generator = torch.Generator(device).manual_seed(0)
    p = _policy_logits(distribution, rows, vocabulary, device, generator).to(DTYPES[dtype])
    noise = torch.randn(p.shape, generator=generator, device=device)
    shift = 50.0 if distribution == "shift 50" else 0.0
    low, high = -8.0, 3.0  # of log10 of the noise
    exponent = math.log10(target) / 2  # a small KL grows with the square of the noise
    for _ in range(30):
        q = (p.float() + 10**exponent * noise + shift).to(p.dtype)
        truth = exact_kl(p, q)
        reached = truth.median().item()
        low, high = (exponent, high) if reached < target else (low, exponent)
        if abs(reached - target) < 0.02 * target or high - low < 1e-3:
            break
        exponent += math.log10(target / reached) / 2 if reached > 0 else math.inf
        if not low < exponent < high:
            exponent = (low + high) / 2
    return p, q, truth


# Errors
# ----


def error_of(provider, p, q, truth, wrt="p", true_gradient=None):
    """{"rows", "worst_relative", "median_relative", "negative"} of one provider on one pair, or
    {"reason"} why there is none.

    With the errors of its gradient, {"wrt", "gradient_worst", "gradient_median"}, or
    "gradient_reason". A provider that has no gradient to the tensor named by `wrt` is asked for the
    other one. true_gradient: a function of "p" or "q", where it is already known.
    """
    missing = provider.why_not("kl_divergence")
    if missing:
        return {"reason": missing}
    typical = truth.median()
    p, q, truth = p[: provider.rows], q[: provider.rows], truth[: provider.rows]
    try:
        kl, leaf, wrt = _run(provider, p, q, wrt)
    except Exception as error:  # one provider's failure must not lose the others' figures
        return {"reason": _reason(error)}
    # A row far smaller than the size in question (rounded logits may even agree everywhere: KL 0)
    # belongs to another record.
    relative = (kl.detach().double() - truth).abs() / truth.clamp_min(typical / 10)
    found = {
        "rows": len(p),
        "worst_relative": relative.max().item(),
        "median_relative": relative.median().item(),
        "negative": int((kl < 0).sum()),
    }
    try:
        (gradient,) = torch.autograd.grad(kl.sum(), leaf)
    except Exception as error:
        return {**found, "gradient_reason": _reason(error)}
    true = (
        exact_gradient(p, q, wrt) if true_gradient is None else true_gradient(wrt)[: provider.rows]
    )
    norm = true.norm(dim=-1)
    relative = (gradient.double() - true).norm(dim=-1) / norm.clamp_min(norm.median() / 10)
    return {
        **found,
        "wrt": wrt,
        "gradient_worst": relative.max().item(),
        "gradient_median": relative.median().item(),
    }


def _run(provider, p, q, wrt):
    """(KL with its graph, the leaf, its name) for a gradient to `wrt`, or to the other tensor where
    the provider says it has none to that one.
    """
    for name in (wrt, "q" if wrt == "p" else "p"):
        inputs = Inputs(
            p.detach().requires_grad_(name == "p"),
            q.detach().requires_grad_(name == "q"),
            None,
            (),
            name,
        )
        try:
            (kl,) = provider.operations["kl_divergence"](inputs)
            return kl, inputs.leaf, name
        except NotOfferedError as error:
            refused = error
    raise refused


def _reason(error):
    return f"{type(error).__name__}: {error}".strip()[:2000]


def errors_of(providers, p, q, truth, wrt):
    """{name: error_of} of all providers; what runs in another process runs meanwhile."""
    rest = (p, q, truth, wrt, cache(partial(exact_gradient, p, q)))
    with ThreadPoolExecutor(1) as background:
        waiting = {
            provider.name: background.submit(error_of, provider, *rest)
            for provider in providers
            if provider.apart
        }
        here = {
            provider.name: error_of(provider, *rest) for provider in providers if not provider.apart
        }
        return {**here, **{name: future.result() for name, future in waiting.items()}}


def accuracy(
    providers, device, rows=16, vocabulary=128256, targets=TARGETS, dtypes=("fp32", "bf16"), wrt="p"
):
    """Yields one record per element type, kind of row and size of the KL."""
    for dtype in dtypes:
        for distribution in DISTRIBUTIONS:
            for target in targets:
                p, q, truth = make_pair(distribution, dtype, target, rows, vocabulary, device)
                reached = truth.median().item()
                record = {
                    "dtype": dtype,
                    "distribution": distribution,
                    "target": target,
                    "kl": reached,
                    "errors": {},
                    "skipped": None,
                }
                if not target / 3 <= reached <= target * 3:
                    # Rounding the logits to bf16 is itself a KL: below it, no pair exists.
                    yield {**record, "skipped": f"rounding to {dtype} gives a KL of {reached:.1e}"}
                    continue
                yield {**record, "errors": errors_of(providers, p, q, truth, wrt)}


def summary(record):
    """One line of text for a record."""
    head = f"{record['dtype']:<5} {record['distribution']:<9} KL {record['target']:.0e}"
    if record["skipped"]:
        return f"{head}  left out: {record['skipped']}"
    cells = []
    for name, error in record["errors"].items():
        if "reason" in error:
            cells.append(f"{name}: {error['reason'].splitlines()[0][:60]}")
        else:
            negative = f" ({error['negative']} negative)" if error["negative"] else ""
            cells.append(f"{name} {float(error['worst_relative']):.0e}{negative}")
    return f"{head}  " + "  ".join(cells)


def not_worse(records, ours="fastkl", other="torch", slack=1e-4):
    """The records in which our error exceeds the other's by more than `slack`, is not a number, or
    a KL came out negative.
    """
    worse = []
    for record in records:
        if record["skipped"]:
            continue
        error, reference = record["errors"].get(ours, {}), record["errors"].get(other, {})
        mine, limit = (float(e.get("worst_relative", math.nan)) for e in (error, reference))
        limit = slack if math.isnan(limit) else limit + slack
        if not mine <= limit or error["negative"]:
            worse.append(record)
    return worse


# The table
# ----

MEASURES = {
    "kl": ("worst_relative", "median_relative"),
    "gradient": ("gradient_worst", "gradient_median"),
}


def names_of(data):
    """The providers of a file of results, in the order in which they were measured."""
    return list(dict.fromkeys(name for record in data["records"] for name in record["errors"]))


def cell(records, name, measure="kl"):
    """{"worst", "median", "negative", "rows"} of one provider over the kinds of rows of one size
    and element type; None where it has no figure.

    "median" is the largest of the kinds' medians. A kind in which a provider failed leaves it
    without a figure: the others alone would flatter it.
    """
    worst, median = MEASURES[measure]
    errors = [
        record["errors"][name]
        for record in records
        if not record["skipped"] and name in record["errors"]
    ]
    if not errors or any(worst not in error for error in errors):
        return None
    return {
        "worst": _largest(error[worst] for error in errors),
        "median": _largest(error[median] for error in errors),
        "negative": sum(error["negative"] for error in errors),
        "rows": sum(error["rows"] for error in errors),
    }


def _largest(values):
    """The largest, NaN if one is: what is not a number must not be outdone."""
    values = [float(value) for value in values]
    return math.nan if any(map(math.isnan, values)) else max(values)


def sizes(data, dtype):
    """{size: records} of one element type, over all kinds of rows."""
    return {
        target: [r for r in data["records"] if r["dtype"] == dtype and r["target"] == target]
        for target in sorted({r["target"] for r in data["records"] if r["dtype"] == dtype})
    }


def markdown(data, dtype="fp32", measure="kl", providers=None, targets=None):
    """A Markdown table out of a file of results: worst relative error by size of the KL and
    provider, over all kinds of rows.

    providers, targets: which columns and rows (default: every provider that has a figure, every
    size). A provider without a figure gets a dash; one that took fewer rows of each pair than the
    others says how many.
    """
    by_size = {
        target: records
        for target, records in sizes(data, dtype).items()
        if targets is None or target in targets
    }
    found = {
        (target, name): cell(records, name, measure)
        for target, records in by_size.items()
        for name in names_of(data)
    }
    names = providers or [
        name for name in names_of(data) if any(found[target, name] for target in by_size)
    ]
    lines = [
        "| KL | " + " | ".join(column_title(data, name) for name in names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for target in by_size:
        lines.append(
            f"| {_power(target)} | "
            + " | ".join(_text(found.get((target, name)), measure) for name in names)
            + " |"
        )
    return "\n".join(lines)


def column_title(data, name):
    """The provider, and how many rows of each pair it took where these were fewer than the others
    took.
    """
    rows = [
        error["rows"]
        for record in data["records"]
        if "rows" in (error := record["errors"].get(name, {}))
    ]
    return f"{name}, {rows[0]} of {data['rows']} rows" if rows and rows[0] < data["rows"] else name


def _text(figure, measure):
    if figure is None:
        return "–"
    negative = (
        f" ({figure['negative']} of {figure['rows']} negative)"
        if figure["negative"] and measure == "kl"
        else ""
    )
    return _power(figure["worst"]) + negative


def _power(value):
    """1e-8 instead of 1e-08."""
    if not math.isfinite(value):
        return str(value)
    digits, exponent = f"{value:.0e}".split("e")
    return f"{digits}e{int(exponent)}"


def reasons(data):
    """{provider: why} of those that have no figure at all."""
    found = {}
    for record in data["records"]:
        for name, error in record["errors"].items():
            found.setdefault(name, []).append(error.get("reason"))
    return {name: why[0].splitlines()[0] for name, why in found.items() if all(why)}


def report(data):
    """All tables, and who has no figures."""
    lines = []
    for measure, title in (("kl", "KL"), ("gradient", f"gradient to {data['wrt']}")):
        for dtype in dict.fromkeys(record["dtype"] for record in data["records"]):
            lines += [
                f"\nWorst relative error of the {title}, {dtype} logits:\n",
                markdown(data, dtype, measure),
            ]
    return "\n".join(
        [*lines, "", *(f"{name}: no figures: {why}" for name, why in reasons(data).items())]
    )


# The command
# ----


def run(arguments, command):
    """The data of a whole run; prints a line for each record."""
    device = torch.device(arguments.device)
    providers = load_providers(device, arguments.providers)
    if device.type == "cpu":
        providers += interpreted_providers(arguments.providers)
    data = {
        **provenance(command),
        "peers": {name: version(name) for name in PEER_PACKAGES},
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "rows": arguments.rows,
        "vocabulary": arguments.vocabulary,
        "wrt": arguments.wrt,
        "records": [],
    }
    for record in accuracy(
        providers, device, arguments.rows, arguments.vocabulary, SHOWN, wrt=arguments.wrt
    ):
        data["records"].append(record)
        print(summary(record), flush=True)
    return data


def _parser():
    def names(text):
        found = text.split(",")
        if unknown := set(found) - {*LOADERS, *INTERPRETED}:
            raise argparse.ArgumentTypeError(
                f"expected names out of {', '.join((*LOADERS, *INTERPRETED))}, got "
                f"{', '.join(sorted(unknown))}"
            )
        return found

    def count(text, least=1):
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of {least} or more, got {text!r}"
            )
        return int(text)

    def picture(text):
        if Path(text).suffix.lower() != ".png":
            raise argparse.ArgumentTypeError(
                f"expected the name of a PNG file, got {text!r}; end it in .png"
            )
        return output_file(text)

    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.accuracy", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write the records to FILE"
    )
    parser.add_argument("--plot", type=picture, metavar="FILE.png", help="draw them into FILE.png")
    parser.add_argument(
        "--from",
        type=Path,
        metavar="FILE",
        dest="source",
        help="measure nothing: table and plot of a FILE that --json wrote",
    )
    parser.add_argument(
        "--rows", type=count, default=8, metavar="N", help="of each pair (default: %(default)s)"
    )
    parser.add_argument(
        "--vocabulary",
        type=partial(count, least=2),
        default=128256,
        metavar="V",
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--wrt",
        choices="pq",
        default="p",
        help="which logits of KL(P‖Q) the gradient is with respect to (default: %(default)s)",
    )
    parser.add_argument("--providers", type=names, metavar="NAME,...", help="(default: all)")
    parser.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help="(default: %(default)s)"
    )
    return parser


def main(argv=None):
    """The command line; returns the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected cpu where there is no CUDA GPU, got cuda")
    if arguments.plot:  # what is missing shows before the minutes that measuring takes
        try:
            from benchmarks.accuracy_plot import draw
        except ImportError as error:
            parser.error(
                f"--plot: expected matplotlib to be installed, got {error}; remedy: pip install "
                f"matplotlib"
            )
    if arguments.source:
        try:
            data = json.loads(arguments.source.read_text())
            data["records"], data["rows"], data["vocabulary"], data["wrt"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            parser.error(
                f"--from: expected a file that --json wrote, got {arguments.source} "
                f"({type(error).__name__}: {error})"
            )
    else:
        data = run(
            arguments,
            "python3 -m benchmarks.accuracy " + " ".join(sys.argv[1:] if argv is None else argv),
        )
        if arguments.json:
            write_json(arguments.json, data)
    print(report(data))
    if arguments.plot:
        draw(data, arguments.plot)
    worse = not_worse(data["records"]) if {"fastkl", "torch"} <= set(names_of(data)) else []
    for record in worse:
        print(f"worse than plain torch, or negative: {summary(record)}", file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
