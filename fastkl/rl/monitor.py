"""What KL does in a run: figures of every step in one copy from the device, figures of the whole
run, an alarm, and a file of them.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .._types import BetaController
from ..ops.fields import result_dtype
from . import _checks
from .logs import Logger, append_line, appendable, check_logger, send
from .logs import read_jsonl as read_jsonl
from .spikes import SpikeDetector

QUANTILES = {"kl/p50": 0.50, "kl/p95": 0.95, "kl/p99": 0.99}
# The run's quantiles come from a histogram of the logarithm (DDSketch): each bin reaches from x to
# GROWTH·x, so its centre is right to ACCURACY.
ACCURACY = 0.01
GROWTH = (1 + ACCURACY) / (1 - ACCURACY)
LOWEST, HIGHEST = 1e-8, 1e3
# Bin 0 holds what is below LOWEST, the last one what is above HIGHEST.
BINS = 2 + math.ceil(math.log(HIGHEST / LOWEST) / math.log(GROWTH))


class KLMonitor:
    """Figures of the KL per step and per run, with an alarm for jumps.

    Equivalent, for `update(kl, mask)`, to

        x = kl[mask]
        {"kl/mean": x.mean(), "kl/per_sequence": kl.where(mask, 0).sum(-1)[mask.any(-1)].mean(),
         "kl/max": x.max(), "kl/p50": x.quantile(0.5), "kl/p95": x.quantile(0.95), "kl/p99": x.quantile(0.99),
         "kl/tokens": x.numel(), "kl/not_finite": (~x.isfinite()).sum(), "kl/above_threshold": (x > threshold).float().mean(),
         "kl/spike": detector.update(x.mean())}

    as Python floats, through exactly one copy from the device, which is its one wait for it.

    Args:
        threshold: KL of a token, nats; with it "kl/above_threshold" is the share of tokens above.
        spike: True: a SpikeDetector() watches "kl/mean" and "kl/spike" is 1.0 where it rings, else
            0.0; a SpikeDetector of your own; or False.
        positions: how many entries profile() has at most.
        jsonl: a file that gets a line of JSON per update, in a folder that exists; made at once. It
            is never shortened: a resumed run goes on in it.
        loggers: what each step's dict goes to: objects with a method log(dict), as a wandb run;
            with add_scalar(name, value, step), as TensorBoard's SummaryWriter; or callables of the
            dict. They are called after the line of JSON is written.

    The state of the run is on the CPU: state_dict() costs no copy. A file that cannot be written
    any more (OSError) and a logger that raises do not end the run: the first time, for each of
    them, a RuntimeWarning says what failed and at which step, from where on steps may be missing
    there; the figures are returned as ever. In distributed training each process sees its own
    tokens; gather them, or monitor one process.

    Raises ValueError or TypeError for wrong arguments, ValueError for a jsonl that cannot be
    appended to.
    Source: Masson, Rim and Lee, DDSketch (2019), for the quantiles of the run; SpikeDetector for
    the alarm.
    """

    def __init__(
        self,
        *,
        threshold: float | None = None,
        spike: SpikeDetector | bool = True,
        positions: int = 64,
        jsonl: str | os.PathLike[str] | None = None,
        loggers: Sequence[Logger] = (),
    ) -> None:
        if threshold is not None:
            _checks.number(
                "threshold",
                threshold,
                "a KL in nats of at least 0, or None",
                lambda x: 0 <= x < math.inf,
                "None counts none",
            )
        if not isinstance(spike, (bool, SpikeDetector)):
            raise TypeError(
                f"spike: expected True, False or a SpikeDetector, got {type(spike).__name__}; pass "
                f"True for SpikeDetector(), its defaults"
            )
        _checks.whole_number(
            "positions", positions, "a number of entries of the profile", "64 is the default"
        )
        if not isinstance(loggers, (list, tuple)):
            raise TypeError(
                f"loggers: expected a list, got {type(loggers).__name__}; pass [logger]"
            )
        self.threshold = threshold
        self.detector = SpikeDetector() if spike is True else spike or None
        self.positions = positions
        for logger in loggers:
            check_logger(logger)
        self.loggers = list(loggers)
        self.jsonl = None if jsonl is None else appendable(jsonl)
        self._failed: set[str] = set()
        self._step = 0
        self._run = {
            "steps": 0.0,
            "tokens": 0.0,
            "sequences": 0.0,
            "finite": 0.0,
            "sum": 0.0,
            "max": 0.0,
            "above": 0.0,
            "spikes": 0.0,
        }
        self._histogram = torch.zeros(BINS, dtype=torch.float64, device="cpu")
        self._profile = torch.zeros(2, positions, dtype=torch.float64, device="cpu")  # sums, tokens
        self._width = 1  # positions per entry of the profile

    def __repr__(self) -> str:
        return (
            f"KLMonitor(threshold={self.threshold}, spike={self.detector or False}, "
            f"positions={self.positions}, jsonl={self.jsonl!r}, "
            f"loggers={self.loggers})"
        )

    def update(
        self,
        kl: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        cu_seqlens: torch.Tensor | None = None,
        entropy: float | torch.Tensor | None = None,
        reward: float | torch.Tensor | None = None,
        beta: float | torch.Tensor | BetaController | None = None,
        step: int | None = None,
        **more: float | torch.Tensor,
    ) -> dict[str, float]:
        """Take in a step and return its figures.

        Args:
            kl: KL of each token, nats, [..., T] of any float type, T the position in the sequence;
                or [total], sequences packed one behind the other, with cu_seqlens; [T] alone is one
                sequence. No gradient is kept.
            mask: bool, shaped as kl, True where the token counts. Whatever the others hold, NaN
                included, changes no figure.
            cu_seqlens: integers [S+1] from 0 to total, where the packed sequences begin and end;
                the profile and "kl/per_sequence" need them.
            entropy, reward, beta, more: figures to report beside, None: not reported. A tensor
                shaped as kl is averaged over the tokens that count, any other tensor over all its
                entries; a number, or the `beta` of a controller, is taken as it is. With as many
                packed sequences as tokens a reward [S] counts as one per sequence, as in
                shape_rewards, any other [S] as per token. Tensors on kl's device go through the
                same copy, those shaped as kl are moved there from the CPU; other ones on the CPU
                need none.
            step: number of the step, from 0 to 2^53; default one more than the last, from 0.

        Returns:
            {"step", "kl/mean", "kl/per_sequence", "kl/max", "kl/p50", "kl/p95", "kl/p99",
            "kl/tokens", "kl/not_finite", with a threshold "kl/above_threshold", with a detector
            "kl/spike", and what was passed}, Python floats. "kl/per_sequence" is the mean, over the
            sequences with a token that counts, of the sum over each one's tokens. A KL of +inf or
            NaN makes it, "kl/mean" and "kl/max" so and rings the alarm; the quantiles leave out
            NaN, the figures of the run both, so that one bad token does not spoil them. With no
            token that counts they are NaN, and no alarm rings.

        Raises:
            TypeError or ValueError for a kl that is not [..., T] of a float type, a mask or
            cu_seqlens that does not fit, a figure that is not a number or tensor, or is on another
            device, or has the name of one of the above.
        """
        _checks.float_tensor("kl", kl, "KL per token, [..., T] or [total]")
        if kl.dim() == 0:
            raise ValueError(
                "kl: expected KL per token with at least one dimension, got a scalar; pass it "
                "before its mean is taken"
            )
        _checks.mask(mask, kl.shape, kl.device)
        if cu_seqlens is not None:
            _checks.cu_seqlens(cu_seqlens, "kl", kl)
            if isinstance(reward, torch.Tensor) and reward.shape == kl.shape == (
                len(cu_seqlens) - 1,
            ):
                reward = reward[None]  # one per sequence, not per token
        numbers, tensors = _sorted_figures(
            {"entropy": entropy, "reward": reward, "beta": getattr(beta, "beta", beta), **more}, kl
        )
        if step is not None and (isinstance(step, bool) or not isinstance(step, int)):
            raise TypeError(
                f"step: expected a whole number or None, got {type(step).__name__}; for a tensor "
                f"pass int(step)"
            )
        if step is not None and not 0 <= step <= 2**53:
            raise ValueError(
                f"step: expected a whole number from 0 to 2^53, got "
                f"{_checks.shown(step)}; count the steps from 0"
            )
        step = self._step if step is None else step
        counts = torch.ones_like(kl, dtype=torch.bool) if mask is None else mask
        got = _measure(
            kl.detach(), counts, cu_seqlens, tensors, self.threshold, self.positions, self._width
        )
        named = {**numbers, **dict(zip(tensors, got.tensors, strict=True))}
        metrics = {"step": float(step), **got.figures}
        if self.threshold is None:
            del metrics["kl/above_threshold"]
        if self.detector is not None:
            metrics["kl/spike"] = float(
                metrics["kl/tokens"] > 0 and self.detector.update(metrics["kl/mean"])
            )
        metrics.update(
            (name, named[name]) for name in ("entropy", "reward", "beta", *more) if name in named
        )
        self._remember(metrics, got)
        self._step = step + 1
        if self.jsonl is not None:
            self._tell(append_line, self.jsonl, metrics, "jsonl", OSError)
        for index, logger in enumerate(self.loggers):
            self._tell(send, logger, dict(metrics), f"loggers[{index}]", Exception)
        return metrics

    def _tell(
        self,
        write: Callable[[Any, dict[str, float]], None],
        target: object,
        metrics: dict[str, float],
        name: str,
        failure: type[Exception],
    ) -> None:
        """write(target, metrics), whose failure costs a warning, once, and not the run."""
        try:
            write(target, metrics)
        except failure as error:
            if name not in self._failed:
                self._failed.add(name)
                warnings.warn(
                    f"KLMonitor: {name}, {target!r}, failed at step {metrics['step']:.0f} "
                    f"({type(error).__name__}: {error}); the run goes "
                    f"on, this step and later ones may be missing there, and no more is said of it",
                    RuntimeWarning,
                    stacklevel=3,
                )

    def _remember(self, metrics: dict[str, float], got: _Measured) -> None:
        run, tokens = self._run, metrics["kl/tokens"]
        run["steps"] += 1
        run["tokens"] += tokens
        run["sequences"] += got.sequences
        run["sum"] += got.finite_sum
        if got.finite:
            run["max"] = max(run["max"], got.finite_max) if run["finite"] else got.finite_max
        run["finite"] += got.finite
        if tokens:
            run["above"] += got.figures["kl/above_threshold"] * tokens
        run["spikes"] += metrics.get("kl/spike", 0.0)
        self._histogram = (
            self._histogram + got.histogram
        )  # not in place, which one made in inference mode would not allow outside
        entries = torch.arange(self.positions, device="cpu") * self._width // got.width
        self._profile = (
            torch.zeros_like(self._profile).index_add_(1, entries, self._profile) + got.profile
        )
        self._width = got.width

    def summary(self) -> dict[str, float]:
        """Figures over all tokens of the run so far: "steps", "kl/tokens", "kl/mean",
        "kl/per_sequence" (over all sequences), "kl/max", "kl/p50", "kl/p95", "kl/p99" (right to 1 %
        between 1e-8 and 1e3 nats; 0 below), "kl/not_finite", and with a threshold or a detector
        "kl/above_threshold" and "kl/spikes" (how many steps rang). Tokens whose KL is not finite
        are counted, +inf as above the threshold too, and otherwise left out. NaN where there is
        nothing to take a figure of.
        """
        run = self._run
        figures = {"steps": run["steps"], "kl/tokens": run["tokens"]}
        figures |= dict.fromkeys(("kl/mean", "kl/per_sequence", "kl/max"), math.nan)
        if run["finite"]:
            figures |= {
                "kl/mean": run["sum"] / run["finite"],
                "kl/max": run["max"],
                "kl/per_sequence": run["sum"] / run["sequences"],
            }
        figures.update((name, self._quantile(q)) for name, q in QUANTILES.items())
        figures["kl/not_finite"] = run["tokens"] - run["finite"]
        if self.threshold is not None:
            figures["kl/above_threshold"] = (
                run["above"] / run["tokens"] if run["tokens"] else math.nan
            )
        if self.detector is not None:
            figures["kl/spikes"] = run["spikes"]
        return figures

    def _quantile(self, q: float) -> float:
        """The centre of the bin that holds the token of that rank, at most the run's maximum."""
        if not self._run["finite"]:
            return math.nan
        below = self._histogram.cumsum(0)
        entry = int((below <= q * (self._run["finite"] - 1)).sum())
        return (
            0.0
            if entry == 0
            else min(LOWEST * GROWTH ** (entry - 1) * 2 * GROWTH / (1 + GROWTH), self._run["max"])
        )

    def profile(self) -> dict[str, list[float]]:
        """Mean KL by position in the response, over the run: {"position", "kl", "tokens"}, lists of
        the same length, at most `positions`.

        Position 0 is a sequence's first token that counts, and only those that count are counted.
        Entry i is of the positions from position[i] up to the next entry's: one each while the
        longest response has at most `positions` tokens, then two, four, ...
        """
        used = 1 + max(
            (index for index, tokens in enumerate(self._profile[1].tolist()) if tokens), default=-1
        )
        sums, tokens = self._profile[:, :used]
        return {
            "position": [index * self._width for index in range(used)],
            "kl": (sums / tokens).tolist(),
            "tokens": tokens.tolist(),
        }

    def state_dict(self) -> dict[str, Any]:
        """All that it knows of the run, as a plain dict for JSON or torch.save."""
        return {
            "class": "KLMonitor",
            "threshold": self.threshold,
            "positions": self.positions,
            "step": self._step,
            "run": dict(self._run),
            "histogram": self._histogram.tolist(),
            "width": self._width,
            "profile": self._profile.tolist(),
            "spike": None if self.detector is None else self.detector.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict(); raises ValueError, and changes nothing, for that of another
        class, an incomplete or damaged one, or one of a monitor with another threshold, other
        positions, or with a detector where this one has none, or the other way round.
        """
        mine = self.state_dict()
        _checks.state(state, mine)
        for name in ("threshold", "positions"):
            if not isinstance(state[name], (int, float, type(None))) or state[name] != mine[name]:
                raise ValueError(
                    f"state: expected {name} {mine[name]}, got {_checks.shown(state[name])}; make "
                    f"the monitor with "
                    f"{name}={_checks.shown(state[name])}"
                )
        if (state["spike"] is None) != (mine["spike"] is None):
            raise ValueError(
                f"state: expected one {'with' if self.detector else 'without'} a spike detector, "
                f"got one "
                f"{'without' if self.detector else 'with'}; make the monitor with "
                f"spike={state['spike'] is not None}"
            )
        for name in ("step", "width", "run", "histogram", "profile"):
            if _form(state[name]) != _form(mine[name]) or not _possible(name, state[name]):
                raise ValueError(
                    f"state: expected {name} as this version of KLMonitor saves it, finite "
                    f"and without negative counts, got {_checks.shown(state[name])}; "
                    f"load another checkpoint, or begin anew"
                )
        if self.detector is not None:
            self.detector.load_state_dict(state["spike"])
        self._step, self._width, self._run = state["step"], state["width"], dict(state["run"])
        self._histogram, self._profile = (
            torch.tensor(state[name], dtype=torch.float64, device="cpu")
            for name in ("histogram", "profile")
        )


def _form(value: object) -> object:
    """What a state is made of: types in place of its values."""
    if isinstance(value, dict):
        return {name: _form(entry) for name, entry in value.items()}
    return [_form(entry) for entry in value] if isinstance(value, list) else type(value)


def _possible(name: str, value: Any) -> bool:
    """Whether an entry of a state, of the right form, is finite and has no negative counts."""
    if name == "run":  # a mean of k1, and so the sum and the maximum, may be negative
        counts = [count for key, count in value.items() if key not in ("sum", "max")]
        return bool(
            all(map(math.isfinite, value.values()))
            and min(counts) >= 0
            and value["finite"] <= value["tokens"]
            and min(value["finite"], 1) <= value["sequences"] <= value["tokens"]
        )
    if name == "profile":
        sums, tokens = value
        return all(map(math.isfinite, sums)) and all(0 <= entry < math.inf for entry in tokens)
    if name == "histogram":
        return all(0 <= entry < math.inf for entry in value)
    return bool(0 <= value <= 2**53 if name == "step" else 0 < value < 2**31)


def _sorted_figures(
    named: dict[str, object], kl: torch.Tensor
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """(figures that are known on the CPU, tensors to be averaged on kl's device), those that are
    None left out.
    """
    known, tensors = {}, {}
    for name, value in named.items():
        if name in (
            "step",
            "kl/mean",
            "kl/per_sequence",
            "kl/max",
            "kl/tokens",
            "kl/not_finite",
            "kl/above_threshold",
            "kl/spike",
            *QUANTILES,
        ):
            raise ValueError(
                f"{name}: expected a name that the monitor does not use itself, got it for a "
                f"further figure; choose another"
            )
        if isinstance(value, torch.Tensor):
            if value.dtype not in (*_checks.FLOAT_TYPES, *_checks.INTEGER_TYPES, torch.bool):
                raise TypeError(
                    f"{name}: expected a real number or tensor, got "
                    f"{_checks.type_name(value)}; convert it with .float()"
                )
            _checks.not_sharded(name, value, "a figure", f"pass {name}.full_tensor()")
            if value.device == kl.device or (
                value.device.type == "cpu" and value.shape == kl.shape
            ):
                tensors[name] = value.detach().to(
                    kl.device, non_blocking=True
                )  # the copy of the figures waits for it too
            elif value.device.type == "cpu":
                known[name] = value.detach().double().mean().item()
            else:
                raise ValueError(
                    f"{name}: expected a tensor on the device of kl, {kl.device}, or on the CPU, "
                    f"got {value.device}; move it with .to()"
                )
        elif value is not None:
            known[name] = _checks.number(
                name, value, "a number or a tensor", lambda x: True, f"pass float({name})"
            )
    return known, tensors


# ---- on the device


class _Measured(NamedTuple):
    """What one step's copy brought."""

    figures: dict[str, float]
    tensors: list[float]
    sequences: float
    finite: float
    finite_sum: float
    finite_max: float
    width: int
    histogram: torch.Tensor
    profile: torch.Tensor


@torch.no_grad()
def _measure(
    kl: torch.Tensor,
    counts: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    tensors: dict[str, torch.Tensor],
    threshold: float | None,
    positions: int,
    width: int,
) -> _Measured:
    """All figures of a step, stacked into one float64 tensor on the device, and that copied once."""
    place = _positions(counts, cu_seqlens)
    tokens = counts.sum(dtype=torch.float64)
    averages = [
        (
            value.masked_fill(~counts, 0).sum(dtype=torch.float64) / tokens
            if value.shape == kl.shape
            else value.double().mean()
        )
        for value in tensors.values()
    ]
    # One more token, which does not count: then there is always one to look at.
    kl = torch.cat([kl.reshape(-1).to(result_dtype(kl)), kl.new_zeros(1, dtype=result_dtype(kl))])
    counts, place = (
        torch.cat([value.reshape(-1), value.new_zeros(1)]) for value in (counts, place)
    )
    sequences = (counts & (place == 0)).sum()  # by the first token of each that counts
    total = kl.masked_fill(~counts, 0).sum(dtype=torch.float64)
    finite = counts & kl.isfinite()
    numbers = counts & ~kl.isnan()
    known = numbers.sum()
    ordered = kl.masked_fill(~numbers, math.nan).sort().values  # NaN comes last, after +inf
    kept = kl.masked_fill(~finite, 0)
    figures = {
        "kl/mean": total / tokens,
        "kl/per_sequence": total / sequences,
        "kl/max": ordered.gather(0, (known - 1).clamp(min=0)[None])[0].masked_fill(
            known != tokens, math.nan
        ),
        **{name: _quantile_of(ordered, known, q) for name, q in QUANTILES.items()},
        "kl/tokens": tokens,
        "kl/not_finite": tokens - finite.sum(),
        "kl/above_threshold": (counts & (kl > (math.inf if threshold is None else threshold))).sum()
        / tokens,
    }
    # Twice as many positions per entry until the longest response fits; no value is looked at, so
    # this too is arithmetic on the device.
    longest = place.masked_fill(~counts, -1).amax() + 1
    doublings = (
        torch.full((32,), width * positions, device=kl.device) << torch.arange(32, device=kl.device)
        < longest
    ).sum()
    wide = torch.full_like(doublings, width) << doublings
    ones = finite.double()
    entries = (place // wide).clamp(0, positions - 1)
    profile = [
        ones.new_zeros(positions).scatter_add_(0, entries, value) for value in (kept.double(), ones)
    ]
    bins = (kept.clamp(min=LOWEST / 2).div(LOWEST).log() / math.log(GROWTH)).floor().long() + 1
    histogram = ones.new_zeros(BINS).scatter_add_(0, bins.clamp(0, BINS - 1), ones)
    scalars = [
        *figures.values(),
        *averages,
        sequences,
        finite.sum(),
        kept.sum(dtype=torch.float64),
        kl.masked_fill(~finite, -math.inf).amax(),
        wide,
    ]
    try:
        copied = torch.cat(
            [torch.stack([value.double() for value in scalars]), histogram, *profile]
        ).cpu()
    except NotImplementedError:
        raise ValueError(
            "kl: expected values, got a tensor on the meta device, which has none; "
            "pass the KL of a step"
        ) from None
    values = copied[: len(scalars)].tolist()
    held, finites, finite_sum, finite_max, width_now = values[-5:]
    return _Measured(
        dict(zip(figures, values, strict=False)),
        values[len(figures) : -5],
        held,
        finites,
        finite_sum,
        finite_max,
        int(width_now),
        copied[len(scalars) : -2 * positions],
        copied[-2 * positions :].reshape(2, positions),
    )


def _positions(counts: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """How many tokens of its sequence that count come before each one that does."""
    before = counts.cumsum(-1) - counts.long()
    if cu_seqlens is None or len(cu_seqlens) < 2 or not len(counts):
        return before
    bounds = cu_seqlens.long().clamp(0, len(counts))
    owner = torch.searchsorted(
        bounds[1:].contiguous(), torch.arange(len(counts), device=counts.device), right=True
    )
    starts = bounds[:-1].gather(0, owner.clamp(max=len(bounds) - 2)).clamp(max=len(counts) - 1)
    return (before - before.gather(0, starts)).clamp(min=0)


def _quantile_of(ordered: torch.Tensor, count: torch.Tensor, q: float) -> torch.Tensor:
    """torch.quantile of the first `count` of ordered values, [] float64; between +inf and a number
    +inf.
    """
    rank = q * (count - 1).clamp(min=0).double()
    low, high = (
        ordered.gather(0, index.long()[None])[0].double() for index in (rank.floor(), rank.ceil())
    )
    share = rank - rank.floor()
    return torch.where(share > 0, (1 - share) * low + share * high, low)
