"""Figures of the KL in one step, computed on the device and copied to the CPU in one transfer."""

import math

import torch

from ..ops.fields import result_dtype
from . import _checks
from .sequences import Sequences

POSITION = "kl/position_"
QUANTILES = {"kl/p50": 0.50, "kl/p95": 0.95, "kl/p99": 0.99}
# The run's quantiles come from a histogram of the logarithm (DDSketch): each bin spans x to
# GROWTH·x, so its centre is accurate to 1 %.
GROWTH = (1 + 0.01) / (1 - 0.01)
LOWEST, HIGHEST = 1e-8, 1e3
# Bin 0 counts values below LOWEST, the last bin values above HIGHEST.
BINS = 2 + math.ceil(math.log(HIGHEST / LOWEST) / math.log(GROWTH))


@torch.no_grad()
def measure(
    kl: torch.Tensor,
    counts: torch.Tensor,
    sequences: Sequences,
    tensors: dict[str, torch.Tensor],
    threshold: float | None,
    positions: int = 0,
) -> tuple[dict[str, float], dict[str, float], dict[str, float], torch.Tensor]:
    """Compute all figures of a step in one float64 tensor on the device, and copy it once.

    Returns the monitor's own figures; averages of further tensors; the step's contribution to the
    run's figures ("finite" and "sum" of the tokens whose KL is finite, "max" the largest of these);
    and the tokens per bin of the histogram.
    """
    nonempty = (sequences.sums(counts.long()) > 0).sum()
    tokens = counts.sum(dtype=torch.float64)
    averages = {
        name: value.masked_fill(~counts, 0).sum(dtype=torch.float64) / tokens
        if value.shape == kl.shape
        else value.double().mean()
        for name, value in tensors.items()
    }
    part = sequences.parts(counts, positions).reshape(-1) if positions else None
    # Append a token that does not count: maximum and gather need at least one.
    kl = torch.cat([kl.reshape(-1).to(result_dtype(kl)), kl.new_zeros(1, dtype=result_dtype(kl))])
    counts = torch.cat([counts.reshape(-1), counts.new_zeros(1)])
    total = kl.masked_fill(~counts, 0).sum(dtype=torch.float64)
    finite = counts & kl.isfinite()
    numbers = counts & ~kl.isnan()
    known = numbers.sum()
    ordered = kl.masked_fill(~numbers, math.nan).sort().values  # NaN comes last, after +inf
    kept = kl.masked_fill(~finite, 0)
    above = (counts & (kl > (math.inf if threshold is None else threshold))).sum() / tokens
    figures = {
        "kl/mean": total / tokens,
        "kl/per_sequence": total / nonempty,
        "kl/max": ordered.gather(0, (known - 1).clamp(min=0)[None])[0].masked_fill(
            known != tokens, math.nan
        ),
        **{name: _quantile_of(ordered, known, q) for name, q in QUANTILES.items()},
        "kl/tokens": tokens,
        "kl/not_finite": tokens - finite.sum(),
        **({} if threshold is None else {"kl/above_threshold": above}),
    }
    if part is not None:
        zeros = kl.new_zeros(positions + 1, dtype=torch.float64)
        sums, number = (
            zeros.index_add(0, part, each[:-1].double()) for each in (kl, torch.ones_like(kl))
        )
        figures |= {f"{POSITION}{i}": x for i, x in enumerate((sums / number)[:-1], 1)}
    ones = finite.double()
    bins = (kept.clamp(min=LOWEST / 2).div(LOWEST).log() / math.log(GROWTH)).floor().long() + 1
    histogram = ones.new_zeros(BINS).scatter_add_(0, bins.clamp(0, BINS - 1), ones)
    run = {
        "tokens": tokens,
        "sequences": nonempty,
        "finite": finite.sum(),
        "sum": kept.sum(dtype=torch.float64),
        "above": torch.where(tokens > 0, above * tokens, 0.0),
        "max": kl.masked_fill(~finite, -math.inf).amax(),
    }
    groups = (figures, averages, run)
    scalars = torch.stack([value.double() for group in groups for value in group.values()])
    try:
        copied = torch.cat([scalars, histogram]).cpu()
    except NotImplementedError:
        raise ValueError(
            "kl: expected values, got a tensor on the meta device, which has none; "
            "pass the KL of a step"
        ) from None
    values = iter(copied[: len(scalars)].tolist())
    own, others, of_run = (dict(zip(group, values, strict=False)) for group in groups)
    return own, others, of_run, copied[len(scalars) :]


def _quantile_of(ordered: torch.Tensor, count: torch.Tensor, q: float) -> torch.Tensor:
    """Compute torch.quantile of the first `count` ordered values, [] float64.

    A quantile between a number and +inf is +inf.
    """
    rank = q * (count - 1).clamp(min=0).double()
    low, high = (
        ordered.gather(0, index.long()[None])[0].double() for index in (rank.floor(), rank.ceil())
    )
    share = rank - rank.floor()
    return torch.where(share > 0, (1 - share) * low + share * high, low)


# ---- further figures

# Names reserved for the monitor's own figures.
_OWN = (
    *("step", "kl/mean", "kl/per_sequence", "kl/max", "kl/tokens", "kl/not_finite"),
    *("kl/above_threshold", "kl/spike", *QUANTILES),
)


def sorted_figures(
    named: dict[str, object], kl: torch.Tensor
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Sort further figures into numbers known on the CPU and tensors to average on kl's device.

    Figures that are None are left out.
    """
    known, tensors = {}, {}
    for name, value in named.items():
        _checks.expect(
            name not in _OWN and not name.startswith(POSITION),
            name,
            "a name that the monitor does not use itself",
            value,
            "choose another",
        )
        if isinstance(value, torch.Tensor):
            _checks.expect(
                value.dtype in (*_checks.FLOAT_TYPES, *_checks.INTEGER_TYPES, torch.bool),
                name,
                "a real number or tensor",
                value,
                "convert it with .float()",
                TypeError,
            )
            _checks.not_sharded(name, value, "a figure", f"pass {name}.full_tensor()")
            _checks.expect(
                value.device.type == "cpu" or value.device == kl.device,
                name,
                f"a tensor on the device of kl, {kl.device}, or on the CPU",
                value.device,
                "move it with .to()",
            )
            # No wait is needed: the copy of the figures is queued after this one.
            tensors[name] = value.detach().to(kl.device, non_blocking=True)
        elif value is not None:
            known[name] = _checks.number(
                name, value, "a number or a tensor", lambda x: True, f"pass float({name})"
            )
    return known, tensors
