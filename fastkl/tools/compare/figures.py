"""Statistics of a comparison: means with intervals, quantiles, bins, worst tokens, differences."""

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pandas as pd

DIVERGENCES = ("kl_ab", "kl_ba", "jsd")
MEANS = (*DIVERGENCES, "entropy_a", "entropy_b", "logprob_a", "logprob_b")
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "p999": 0.999}
# Lower ends of the buckets of the base's largest probability.
CONFIDENCE = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99)
# Fewest units to resample: with fewer documents windows are resampled, with fewer windows none.
LEAST_UNITS = 10
MOST_UNITS = 1000
DRAWS = 2000
# The histogram's lowest bin begins here and includes everything below.
LOWEST_BIN = 1e-8


def scored_of(tokens: pd.DataFrame) -> pd.DataFrame:
    """Drop the tokens without values."""
    return tokens[tokens["kl_ab"].notna()]


# ---- means, quantiles, buckets


def summarise(tokens: pd.DataFrame) -> dict[str, Any]:
    """Compute means, their 95 % intervals and exact quantiles over all tokens with values."""
    scored = scored_of(tokens).assign(acceptance=lambda each: 1 - each["tv"])
    means = ("same_top1", "acceptance", *MEANS[len(DIVERGENCES) :])
    unit = unit_of(scored)
    summary: dict[str, Any] = {
        "tokens": len(scored),
        **scored[[*means]].mean().to_dict(),
        "bootstrap": {"unit": unit, "units": scored[unit].nunique()},
        "intervals": intervals(scored, [*DIVERGENCES, *means]),
    }
    for name in DIVERGENCES:
        values = np.sort(scored[name].to_numpy())
        places = np.array([*QUANTILES.values()]) * (len(values) - 1)
        found = np.interp(places, np.arange(len(values)), values)
        summary[name] = {
            "mean": values.mean(),
            **dict(zip(QUANTILES, found, strict=True)),
            "max": values[-1],
        }
    return summary


def unit_of(scored: pd.DataFrame) -> str:
    """Choose the bootstrap's unit: documents, or windows if there are few documents."""
    return "document" if scored["document"].nunique() >= LEAST_UNITS else "window"


def sums_of(scored: pd.DataFrame, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Compute sums [n, names] and token counts [n] per unit.

    Neighbouring units are merged if there are more than MOST_UNITS.
    """
    groups = scored.groupby(unit_of(scored), sort=False)
    sums, counts = groups[names].sum().to_numpy(), groups.size().to_numpy()
    edges = np.unique(np.linspace(0, len(counts), MOST_UNITS, endpoint=False, dtype=int))
    return np.add.reduceat(sums, edges), np.add.reduceat(counts, edges)


def intervals(scored: pd.DataFrame, names: list[str]) -> dict[str, list[float]]:
    """Compute a 95 % interval of each finite mean over tokens, by a bootstrap over units.

    Tokens within a unit are dependent, so units are drawn with replacement, DRAWS times. Deviations
    are widened by a small-sample correction. Empty below LEAST_UNITS.
    """
    names = [name for name in names if np.isfinite(scored[name]).all()]
    sums, counts = sums_of(scored, names)
    if len(counts) < LEAST_UNITS:
        return {}
    generator, even = np.random.default_rng(0), np.full(len(counts), 1 / len(counts))
    drawn = (generator.multinomial(len(counts), even) for _ in range(DRAWS))
    means, mean = [(times @ sums) / (times @ counts) for times in drawn], sums.sum(0) / counts.sum()
    off = np.quantile(means, [0.025, 0.975], axis=0) - mean
    free = len(counts) - 1
    # Ratio of Student's t to the normal quantile (Fisher's expansion), and the unbiased variance.
    ends = mean + off * (1 + 1.21 / free + 1.44 / free**2) * math.sqrt((free + 1) / free)
    return dict(zip(names, ends.T.tolist(), strict=True))


def buckets(tokens: pd.DataFrame) -> list[dict[str, float]]:
    """Compute means over tokens, bucketed by the base's largest probability."""
    scored = scored_of(tokens)
    edges = [*CONFIDENCE, math.inf]
    bucket = pd.cut(np.exp(scored["top_logprob_a"]), edges, right=False, labels=False)
    return [
        {
            "from": CONFIDENCE[int(number)],
            "tokens": len(group),
            "kl_ab": group["kl_ab"].mean(),
            "same_top1": group["same_top1"].mean(),
            "acceptance": 1 - group["tv"].mean(),
        }
        for number, group in scored.groupby(bucket)
    ]


def histogram(tokens: pd.DataFrame) -> list[dict[str, float]]:
    """Count tokens by KL(A‖B), two bins a decade; the lowest one begins at 0."""
    kl = scored_of(tokens)["kl_ab"]
    level = np.floor(2 * np.log10(kl.clip(LOWEST_BIN, 1e3)))
    counts = level.astype(int).value_counts()
    return [
        {
            "from": 10 ** (at / 2) if 10 ** (at / 2) > LOWEST_BIN else 0.0,
            "tokens": int(counts.get(at, 0)),
        }
        for at in range(int(level.min()), int(level.max()) + 1)
    ]


def positions(tokens: pd.DataFrame) -> list[dict[str, float]]:
    """Compute the mean KL(A‖B) by position in the document, from 0; each bin is twice as wide as
    the one before.
    """
    scored = scored_of(tokens.assign(position=tokens.groupby("document", sort=False).cumcount()))
    groups = scored.groupby(np.floor(np.log2(scored["position"])).astype(int))
    return [
        {"from": 2 ** int(at), "tokens": len(group), "kl_ab": group["kl_ab"].mean()}
        for at, group in groups
    ]


# ---- several candidates


def difference(one: pd.DataFrame, other: pd.DataFrame) -> dict[str, Any]:
    """Compare two candidates' KL(A‖·) on the same tokens: the mean of one minus that of the other.

    interval: by the paired bootstrap of `intervals`. p: two-sided, from a sign-flip test over the
    same units: how often random signs of the units' sums give a difference at least as large. Both
    are None below LEAST_UNITS units, or if a KL is infinite.
    """
    paired = scored_of(one).assign(change=one["kl_ab"] - other["kl_ab"])
    interval = intervals(paired, ["change"]).get("change")
    found = {"mean": paired["change"].mean(skipna=False), "interval": interval, "p": None}
    if interval:
        sums = sums_of(paired, ["change"])[0][:, 0]
        generator = np.random.default_rng(0)
        drawn = [generator.choice((-1.0, 1.0), len(sums)) @ sums for _ in range(DRAWS)]
        as_large = np.abs(drawn) >= abs(sums.sum()) * (1 - 1e-12)  # slack for the sum's rounding
        found["p"] = (1 + int(as_large.sum())) / (1 + DRAWS)
    return found


# ---- worst units and tokens


def worst_units(tokens: pd.DataFrame, by: str, limit: int) -> list[dict[str, Any]]:
    """List units by descending mean KL(A‖B): every document, or the `limit` worst lines."""
    keys = ["document", "line"] if by == "line" else ["document"]
    texts = tokens.groupby(keys, sort=False)["text"].agg("".join).str.strip().str[:80]
    groups = scored_of(tokens).reset_index().groupby(keys, sort=False)
    units = (
        groups[[*DIVERGENCES, "same_top1"]]
        .mean()
        .assign(
            max_kl_ab=groups["kl_ab"].max(),
            tokens=groups.size(),
            index=groups["index"].first(),
            text=texts,
        )
        .sort_values("kl_ab", ascending=False, kind="stable")
    )
    return cast(
        list[dict[str, Any]],
        units[: limit if by == "line" else None].reset_index().to_dict("records"),
    )


def worst_tokens(
    tokens: pd.DataFrame, limit: int, label: Callable[[int], str], around: int = 24
) -> list[dict[str, Any]]:
    """Describe the tokens with the largest KL(A‖B), in descending order; ties keep text order.

    Each entry has the text around the token, its values, and each model's most likely token there.
    """
    scored = scored_of(tokens)
    entries = []
    for at, row in scored.sort_values("kl_ab", ascending=False, kind="stable")[:limit].iterrows():
        near = tokens[max(0, at - around) : at + 1 + around]
        near = near[near["document"] == row["document"]]["text"]
        entries.append(
            {
                "index": at,
                "document": row["document"],
                "line": row["line"],
                "token": row["text"] or label(row["id"]),
                "before": "".join(near[near.index < at]),
                "after": "".join(near[near.index > at]),
                **{name: row[name] for name in MEANS},
                **{
                    f"expected_{letter}": {
                        "token": label(int(row[f"top_{letter}"])),
                        "probability": math.exp(row[f"top_logprob_{letter}"]),
                    }
                    for letter in "ab"
                },
            }
        )
    return entries
