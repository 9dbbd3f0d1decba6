"""The bars of gpu_suite.py: what fastkl has to reach on a GPU, and whether it did."""
from benchmarks import accuracy
from benchmarks.linear_workloads import LinearWorkload

# Of fastkl at the main shape: (mode, times the floor, GB allocated at once beside the inputs, returned gradients among them).
LINEAR_BARS = (("loss", 1.12, 3.4), ("forward", 1.12, 1.2))


def bars(sections):
    """The bars of the sections that ran: [{"bar", "limit", "value", "met"}]; what was not measured is None and not met."""
    result = []
    if "main" in sections:
        rows = [row for row in sections["main"].get("rows", []) if "workload" in row]
        for wrt in "pq":
            result += _bars_of_gradient(wrt, {r["provider"]: r for r in rows if _is_kl(r["workload"], wrt)})
    if "accuracy" in sections:
        records = [record for record in sections["accuracy"].get("rows", []) if "distribution" in record]
        worse = len(accuracy.not_worse(records)) if records else None
        result.append({"bar": "accuracy: cases worse than plain torch + 1e-4, or negative", "limit": "== 0", "value": worse, "met": worse == 0})
    if "linear" in sections:
        result += _bars_of_linear(sections["linear"].get("rows", []))
    return result


def _is_kl(workload, wrt):
    return workload["operation"] == "kl_divergence" and workload["wrt"] == wrt


def _figure(row, *path):
    """What stands at the path in a row of the results; None where it was not measured."""
    for part in path:
        row = row.get(part) or {}
    return row or None


def _bars_of_gradient(wrt, rows):
    """The bars of kl_divergence with the gradient to one of its arguments, from one row per provider."""
    def figure(provider, *path):
        return _figure(rows.get(provider, {}), *path)

    result = []
    for phase in ("forward", "backward"):
        value = figure("fastkl", "times", phase, "percent_of_copy")
        result.append({"bar": f"kl_divergence d{wrt} {phase}, % of copy", "limit": ">= 90", "value": value, "met": (value or 0) >= 90})
    ours = figure("fastkl", "times", "both", "median_ms")
    for other, limit in (("torch", 6), ("torch.compile", 2)):
        theirs = figure(other, "times", "both", "median_ms")
        value = theirs / ours if theirs and ours else None
        bar = f"kl_divergence d{wrt} forward + backward, times faster than {other}"
        result.append({"bar": bar, "limit": f">= {limit}", "value": value, "met": (value or 0) >= limit})
    result.append(_at_most(f"kl_divergence d{wrt} peak / (inputs + one gradient)", 1.01, figure("fastkl", "memory", "limit_ratio")))
    return result


def _at_most(bar, limit, value):
    """A bar from above."""
    return {"bar": bar, "limit": f"<= {limit}", "value": value, "met": value is not None and value <= limit}


def _bars_of_linear(rows):
    """The bars of fastkl from hidden states, from the rows of the linear section."""
    result = []
    ours = {row["workload"]["mode"]: row for row in rows if row["provider"] == "fastkl"}
    for mode, times_floor, gigabytes in LINEAR_BARS:
        row = ours.get(mode, {})
        ratio = _figure(row, "times", LinearWorkload(mode).phase, "ratio_to_floor")
        peak = _figure(row, "memory", "peak_bytes")
        result.append(_at_most(f"linear {mode}, times the bare matrix products", times_floor, ratio))
        result.append(_at_most(f"linear {mode}, peak memory in GB", gigabytes, None if peak is None else peak / 1e9))
    return result
