"""How many digits of a KL survive: every provider against float64, from 1e-8 nats to 1e2, on four kinds of rows."""
import math

import torch

from benchmarks.workloads import DTYPES, Inputs

TARGETS = tuple(10.0**exponent for exponent in range(-8, 3))
DISTRIBUTIONS = ("normal 3", "normal 8", "peaked", "shift 50")


def exact_kl(p_logits, q_logits):
    """KL(P‖Q) in float64. A sum of terms that are zero or positive, so nothing cancels, however small the KL."""
    log_p, log_q = p_logits.double().log_softmax(-1), q_logits.double().log_softmax(-1)
    p, d = log_p.exp(), log_q - log_p
    # KL = E_p[e^d - 1 - d], since E_p[e^d] = 1. Where d is large, p·e^d is q: e^d alone may overflow.
    small = d.abs() < 1
    near = torch.expm1(d.clamp(-1, 1)) - d.clamp(-1, 1)
    return torch.where(small, p * near, log_q.exp() - p - p * d).sum(-1)


def _policy_logits(distribution, rows, vocabulary, device, generator):
    logits = torch.randn(rows, vocabulary, generator=generator, device=device)
    logits *= 8 if distribution == "normal 8" else 3
    if distribution == "peaked":
        # As most tokens of a trained model: one entry holds nearly all of the probability.
        peaks = torch.randint(vocabulary, (rows, 1), generator=generator, device=device)
        logits.scatter_add_(1, peaks, torch.full((rows, 1), 24.0, device=device))
    return logits


def make_pair(distribution, dtype, target, rows, vocabulary, device):
    """(p, q, true KL per row): q is p plus noise whose size is chosen so that the median KL comes close to `target`."""
    generator = torch.Generator(device).manual_seed(0)
    p = _policy_logits(distribution, rows, vocabulary, device, generator).to(DTYPES[dtype])
    noise = torch.randn(p.shape, generator=generator, device=device)
    shift = 50.0 if distribution == "shift 50" else 0.0
    low, high = -8.0, 3.0  # of log10 of the noise
    for _ in range(30):
        middle = (low + high) / 2
        q = (p.float() + 10**middle * noise + shift).to(p.dtype)
        truth = exact_kl(p, q)
        if truth.median().item() < target:
            low = middle
        else:
            high = middle
    return p, q, truth


def error_of(provider, p, q, truth):
    """{"worst_relative", "median_relative", "negative"} of one provider on one pair, or {"reason"} why there is none."""
    missing = provider.why_not("kl_divergence")
    if missing:
        return {"reason": missing}
    try:
        with torch.no_grad():
            (kl,) = provider.operations["kl_divergence"](Inputs(p, q, None, (), "p"))
    except Exception as error:  # one provider's failure must not lose the others' figures
        return {"reason": f"{type(error).__name__}: {error}"[:2000]}
    # A row far smaller than the size in question (rounded logits may even agree everywhere: KL 0) belongs to another record.
    relative = (kl.double() - truth).abs() / truth.clamp_min(truth.median() / 10)
    return {"worst_relative": relative.max().item(), "median_relative": relative.median().item(), "negative": int((kl < 0).sum())}


def accuracy(providers, device, rows=16, vocabulary=128256, targets=TARGETS, dtypes=("fp32", "bf16")):
    """Yields one record per element type, kind of row and size of the KL."""
    for dtype in dtypes:
        for distribution in DISTRIBUTIONS:
            for target in targets:
                p, q, truth = make_pair(distribution, dtype, target, rows, vocabulary, device)
                reached = truth.median().item()
                record = {"dtype": dtype, "distribution": distribution, "target": target, "kl": reached, "errors": {}, "skipped": None}
                if not target / 3 <= reached <= target * 3:
                    # Rounding the logits to bf16 is itself a KL: below it, no pair exists.
                    yield {**record, "skipped": f"rounding to {dtype} gives a KL of {reached:.1e}"}
                    continue
                record["errors"] = {provider.name: error_of(provider, p, q, truth) for provider in providers}
                yield record


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
    """The records in which our error exceeds the other's by more than `slack`, is not a number, or a KL came out negative."""
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
