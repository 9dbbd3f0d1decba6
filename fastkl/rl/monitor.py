"""What KL does in a run: figures of every step in one copy from the device, figures of the whole run, an alarm, and a file of them."""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .._rows import result_dtype
from . import _checks
from .spikes import SpikeDetector

QUANTILES = {"kl/p50": 0.50, "kl/p95": 0.95, "kl/p99": 0.99}
# The run's quantiles come from a histogram of the logarithm (DDSketch): each bin reaches from x to GROWTH·x, so its centre is right to ACCURACY.
ACCURACY = 0.01
GROWTH = (1 + ACCURACY) / (1 - ACCURACY)
LOWEST, HIGHEST = 1e-8, 1e3
# Bin 0 holds what is below LOWEST, the last one what is above HIGHEST.
BINS = 2 + math.ceil(math.log(HIGHEST / LOWEST) / math.log(GROWTH))


class KLMonitor:
    """Figures of the KL per step and per run, with an alarm for jumps.

    Equivalent, for `update(kl, mask)`, to

        x = kl[mask]
        {"kl/mean": x.mean(), "kl/max": x.max(), "kl/p50": x.quantile(0.5), "kl/p95": x.quantile(0.95), "kl/p99": x.quantile(0.99),
         "kl/tokens": x.numel(), "kl/not_finite": (~x.isfinite()).sum(), "kl/above_threshold": (x > threshold).float().mean(),
         "kl/spike": detector.update(x.mean())}

    as Python floats, through exactly one copy from the device, which is its one wait for it.

    Args:
        threshold: KL of a token, nats; with it "kl/above_threshold" is the share of tokens above.
        spike: True: a SpikeDetector() watches "kl/mean" and "kl/spike" is 1.0 where it rings, else 0.0; a SpikeDetector of your own; or False.
        positions: how many entries profile() has at most.
        jsonl: a file that gets a line of JSON per update, in a folder that exists; made at once. It is never shortened: a resumed run goes on in it.
        loggers: what each step's dict goes to: objects with a method log(dict), as a wandb run; with add_scalar(name, value, step), as
            TensorBoard's SummaryWriter; or callables of the dict. They are called after the line of JSON is written.

    The state of the run is on the CPU: state_dict() costs no copy.
    A file that cannot be written any more (OSError) and a logger that raises do not end the run: the first time, for each of them, a RuntimeWarning
    says what failed and at which step, from where on steps may be missing there; the figures are returned as ever.
    In distributed training each process sees its own tokens; gather them, or monitor one process.

    Raises ValueError or TypeError for wrong arguments, ValueError for a jsonl that cannot be appended to.
    Source: Masson, Rim and Lee, DDSketch (2019), for the quantiles of the run; SpikeDetector for the alarm.
    """

    def __init__(self, *, threshold: float | None = None, spike: SpikeDetector | bool = True, positions: int = 64,
                 jsonl: str | os.PathLike | None = None, loggers: Sequence[object] = ()) -> None:
        if threshold is not None:
            _checks.number("threshold", threshold, "a KL in nats of at least 0, or None", lambda x: 0 <= x < math.inf, "None counts none")
        if not isinstance(spike, (bool, SpikeDetector)):
            raise TypeError(f"spike: expected True, False or a SpikeDetector, got {type(spike).__name__}")
        _checks.whole_number("positions", positions, "a number of entries of the profile", "64 is the default")
        if not isinstance(loggers, (list, tuple)):
            raise TypeError(f"loggers: expected a list, got {type(loggers).__name__}; pass [logger]")
        self.threshold = threshold
        self.detector = SpikeDetector() if spike is True else spike or None
        self.positions = positions
        for logger in loggers:
            _check_logger(logger)
        self.loggers = list(loggers)
        self.jsonl = None if jsonl is None else _appendable(jsonl)
        self._failed: set[str] = set()
        self._step = 0
        self._run = {"steps": 0.0, "tokens": 0.0, "finite": 0.0, "sum": 0.0, "max": 0.0, "above": 0.0, "spikes": 0.0}
        self._histogram = torch.zeros(BINS, dtype=torch.float64, device="cpu")
        self._profile = torch.zeros(2, positions, dtype=torch.float64, device="cpu")  # sums, tokens
        self._width = 1  # positions per entry of the profile

    def __repr__(self) -> str:
        return (f"KLMonitor(threshold={self.threshold}, spike={self.detector or False}, positions={self.positions}, jsonl={self.jsonl!r}, "
                f"loggers={self.loggers})")

    def update(self, kl: torch.Tensor, mask: torch.Tensor | None = None, *, cu_seqlens: torch.Tensor | None = None,
               entropy: float | torch.Tensor | None = None, reward: float | torch.Tensor | None = None,
               beta: float | torch.Tensor | object | None = None, step: int | None = None, **more: float | torch.Tensor) -> dict[str, float]:
        """Take in a step and return its figures.

        Args:
            kl: KL of each token, nats, [..., T] of any float type, T the position in the sequence; or [total], sequences packed one behind the
                other, with cu_seqlens. No gradient is kept.
            mask: bool, shaped as kl, True where the token counts. Whatever the others hold, NaN included, changes no figure.
            cu_seqlens: integers [S+1] from 0 to total, where the packed sequences begin and end; the profile alone needs them.
            entropy, reward, beta, more: figures to report beside, None: not reported. A tensor shaped as kl is averaged over the tokens that
                count, any other tensor over all its entries; a number, or the `beta` of a controller, is taken as it is. With as many packed
                sequences as tokens a reward [S] counts as one per sequence, as in shape_rewards, any other [S] as per token. Tensors on kl's
                device go through the same copy, those shaped as kl are moved there from the CPU; other ones on the CPU need none.
            step: number of the step; default one more than the last, from 0.

        Returns:
            {"step", "kl/mean", "kl/max", "kl/p50", "kl/p95", "kl/p99", "kl/tokens", "kl/not_finite", with a threshold "kl/above_threshold",
            with a detector "kl/spike", and what was passed}, Python floats. A KL of +inf or NaN makes "kl/mean" and "kl/max" so and rings the
            alarm; the quantiles leave out NaN, the figures of the run both, so that one bad token does not spoil them. With no token that
            counts they are NaN, and no alarm rings.

        Raises:
            TypeError or ValueError for a kl that is not [..., T] of a float type, a mask or cu_seqlens that does not fit, a figure that is not a
            number or tensor, or is on another device, or has the name of one of the above.
        """
        _checks.float_tensor("kl", kl, "KL per token, [..., T] or [total]")
        if kl.dim() == 0:
            raise ValueError("kl: expected KL per token with at least one dimension, got a scalar; pass it before its mean is taken")
        _checks.mask(mask, kl.shape, kl.device)
        if cu_seqlens is not None:
            _checks.cu_seqlens(cu_seqlens, "kl", kl)
            if isinstance(reward, torch.Tensor) and reward.shape == kl.shape == (len(cu_seqlens) - 1,):
                reward = reward[None]  # one per sequence, not per token
        numbers, tensors = _sorted_figures({"entropy": entropy, "reward": reward, "beta": getattr(beta, "beta", beta), **more}, kl)
        if step is not None and (isinstance(step, bool) or not isinstance(step, int)):
            raise TypeError(f"step: expected a whole number or None, got {type(step).__name__}; for a tensor pass int(step)")
        step = self._step if step is None else step
        counts = torch.ones_like(kl, dtype=torch.bool) if mask is None else mask
        got = _measure(kl.detach(), counts, cu_seqlens, tensors, self.threshold, self.positions, self._width)
        named = {**numbers, **dict(zip(tensors, got.tensors, strict=True))}
        metrics = {"step": float(step), **got.figures}
        if self.threshold is None:
            del metrics["kl/above_threshold"]
        if self.detector is not None:
            metrics["kl/spike"] = float(metrics["kl/tokens"] > 0 and self.detector.update(metrics["kl/mean"]))
        metrics.update((name, named[name]) for name in ("entropy", "reward", "beta", *more) if name in named)
        self._remember(metrics, got)
        self._step = step + 1
        if self.jsonl is not None:
            self._tell(_append_line, self.jsonl, metrics, "jsonl", OSError)
        for index, logger in enumerate(self.loggers):
            self._tell(_send, logger, dict(metrics), f"loggers[{index}]", Exception)
        return metrics

    def _tell(self, write: Callable, target: object, metrics: dict[str, float], name: str, failure: type[Exception]) -> None:
        """write(target, metrics), whose failure costs a warning, once, and not the run."""
        try:
            write(target, metrics)
        except failure as error:
            if name not in self._failed:
                self._failed.add(name)
                warnings.warn(f"KLMonitor: {name}, {target!r}, failed at step {metrics['step']:.0f} ({type(error).__name__}: {error}); the run goes "
                              f"on, this step and later ones may be missing there, and no more is said of it", RuntimeWarning, stacklevel=3)

    def _remember(self, metrics: dict[str, float], got: _Measured) -> None:
        run, tokens = self._run, metrics["kl/tokens"]
        run["steps"] += 1
        run["tokens"] += tokens
        run["sum"] += got.finite_sum
        if got.finite:
            run["max"] = max(run["max"], got.finite_max) if run["finite"] else got.finite_max
        run["finite"] += got.finite
        if tokens:
            run["above"] += got.figures["kl/above_threshold"] * tokens
        run["spikes"] += metrics.get("kl/spike", 0.0)
        self._histogram = self._histogram + got.histogram  # not in place, which one made in inference mode would not allow outside
        entries = torch.arange(self.positions, device="cpu") * self._width // got.width
        self._profile = torch.zeros_like(self._profile).index_add_(1, entries, self._profile) + got.profile
        self._width = got.width

    def summary(self) -> dict[str, float]:
        """Figures over all tokens of the run so far: "steps", "kl/tokens", "kl/mean", "kl/max", "kl/p50", "kl/p95", "kl/p99" (right to 1 %
        between 1e-8 and 1e3 nats; 0 below), "kl/not_finite", and with a threshold or a detector "kl/above_threshold" and "kl/spikes" (how many
        steps rang). Tokens whose KL is not finite are counted, +inf as above the threshold too, and otherwise left out. NaN where there is nothing
        to take a figure of."""
        run = self._run
        mean, largest = (run["sum"] / run["finite"], run["max"]) if run["finite"] else (math.nan, math.nan)
        figures = {"steps": run["steps"], "kl/tokens": run["tokens"], "kl/mean": mean, "kl/max": largest}
        figures.update((name, self._quantile(q)) for name, q in QUANTILES.items())
        figures["kl/not_finite"] = run["tokens"] - run["finite"]
        if self.threshold is not None:
            figures["kl/above_threshold"] = run["above"] / run["tokens"] if run["tokens"] else math.nan
        if self.detector is not None:
            figures["kl/spikes"] = run["spikes"]
        return figures

    def _quantile(self, q: float) -> float:
        """The centre of the bin that holds the token of that rank, at most the run's maximum."""
        if not self._run["finite"]:
            return math.nan
        below = self._histogram.cumsum(0)
        entry = int((below <= q * (self._run["finite"] - 1)).sum())
        return 0.0 if entry == 0 else min(LOWEST * GROWTH ** (entry - 1) * 2 * GROWTH / (1 + GROWTH), self._run["max"])

    def profile(self) -> dict[str, list[float]]:
        """Mean KL by position in the response, over the run: {"position", "kl", "tokens"}, lists of the same length, at most `positions`.

        Position 0 is a sequence's first token that counts, and only those that count are counted. Entry i is of the positions from
        position[i] up to the next entry's: one each while the longest response has at most `positions` tokens, then two, four, ...
        """
        used = 1 + max((index for index, tokens in enumerate(self._profile[1].tolist()) if tokens), default=-1)
        sums, tokens = self._profile[:, :used]
        return {"position": [index * self._width for index in range(used)], "kl": (sums / tokens).tolist(), "tokens": tokens.tolist()}

    def state_dict(self) -> dict[str, object]:
        """All that it knows of the run, as a plain dict for JSON or torch.save."""
        return {"class": "KLMonitor", "threshold": self.threshold, "positions": self.positions, "step": self._step, "run": dict(self._run),
                "histogram": self._histogram.tolist(), "width": self._width, "profile": self._profile.tolist(),
                "spike": None if self.detector is None else self.detector.state_dict()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on from a state_dict(); raises ValueError, and changes nothing, for that of another class, an incomplete or damaged one, or one of a
        monitor with another threshold, other positions, or with a detector where this one has none, or the other way round."""
        mine = self.state_dict()
        _checks.state(state, mine)
        for name in ("threshold", "positions"):
            if state[name] != mine[name]:
                raise ValueError(f"state: expected {name} {mine[name]}, got {state[name]}; make the monitor with {name}={state[name]}")
        if (state["spike"] is None) != (mine["spike"] is None):
            raise ValueError(f"state: expected one {'with' if self.detector else 'without'} a spike detector, got one "
                             f"{'without' if self.detector else 'with'}; make the monitor with spike={state['spike'] is not None}")
        for name in ("step", "width", "run", "histogram", "profile"):
            if _form(state[name]) != _form(mine[name]) or (name == "width" and not 0 < state[name] < 2**31):
                raise ValueError(f"state: expected {name} as this version of KLMonitor saves it, got {str(state[name])[:40]}; begin anew")
        if self.detector is not None:
            self.detector.load_state_dict(state["spike"])
        self._step, self._width, self._run = state["step"], state["width"], dict(state["run"])
        self._histogram, self._profile = (torch.tensor(state[name], dtype=torch.float64, device="cpu") for name in ("histogram", "profile"))


def _form(value: object) -> object:
    """What a state is made of: types in place of its values."""
    if isinstance(value, dict):
        return {name: _form(entry) for name, entry in value.items()}
    return [_form(entry) for entry in value] if isinstance(value, list) else type(value)


def _sorted_figures(named: dict[str, object], kl: torch.Tensor) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """(figures that are known on the CPU, tensors to be averaged on kl's device), those that are None left out."""
    known, tensors = {}, {}
    for name, value in named.items():
        if name in ("step", "kl/mean", "kl/max", "kl/tokens", "kl/not_finite", "kl/above_threshold", "kl/spike", *QUANTILES):
            raise ValueError(f"{name}: expected a name that the monitor does not use itself, got it for a further figure; choose another")
        if isinstance(value, torch.Tensor):
            if value.is_complex():
                raise TypeError(f"{name}: expected a real number or tensor, got a {value.dtype} tensor")
            if value.device == kl.device or (value.device.type == "cpu" and value.shape == kl.shape):
                tensors[name] = value.detach().to(kl.device, non_blocking=True)  # the copy of the figures waits for it too
            elif value.device.type == "cpu":
                known[name] = value.detach().double().mean().item()
            else:
                raise ValueError(f"{name}: expected a tensor on the device of kl, {kl.device}, or on the CPU, got {value.device}; move it with .to()")
        elif isinstance(value, (int, float)):
            known[name] = float(value)
        elif value is not None:
            raise TypeError(f"{name}: expected a number or a tensor, got {type(value).__name__}; for a numpy value pass float({name})")
    return known, tensors


# ---- on the device


class _Measured(NamedTuple):
    """What one step's copy brought."""

    figures: dict[str, float]
    tensors: list[float]
    finite: float
    finite_sum: float
    finite_max: float
    width: int
    histogram: torch.Tensor
    profile: torch.Tensor


@torch.no_grad()
def _measure(kl: torch.Tensor, counts: torch.Tensor, cu_seqlens: torch.Tensor | None, tensors: dict[str, torch.Tensor], threshold: float | None,
             positions: int, width: int) -> _Measured:
    """All figures of a step, stacked into one float64 tensor on the device, and that copied once."""
    place = _positions(counts, cu_seqlens)
    tokens = counts.sum(dtype=torch.float64)
    averages = [(value.masked_fill(~counts, 0).sum(dtype=torch.float64) / tokens if value.shape == kl.shape else value.double().mean())
                for value in tensors.values()]
    # One more token, which does not count: then there is always one to look at.
    kl = torch.cat([kl.reshape(-1).to(result_dtype(kl)), kl.new_zeros(1, dtype=result_dtype(kl))])
    counts, place = (torch.cat([value.reshape(-1), value.new_zeros(1)]) for value in (counts, place))
    finite = counts & kl.isfinite()
    numbers = counts & ~kl.isnan()
    known = numbers.sum()
    ordered = kl.masked_fill(~numbers, math.nan).sort().values  # NaN comes last, after +inf
    kept = kl.masked_fill(~finite, 0)
    figures = {
        "kl/mean": kl.masked_fill(~counts, 0).sum(dtype=torch.float64) / tokens,
        "kl/max": ordered.gather(0, (known - 1).clamp(min=0)[None])[0].masked_fill(known != tokens, math.nan),
        **{name: _quantile_of(ordered, known, q) for name, q in QUANTILES.items()},
        "kl/tokens": tokens,
        "kl/not_finite": tokens - finite.sum(),
        "kl/above_threshold": (counts & (kl > (math.inf if threshold is None else threshold))).sum() / tokens,
    }
    # Twice as many positions per entry until the longest response fits; no value is looked at, so this too is arithmetic on the device.
    longest = place.masked_fill(~counts, -1).amax() + 1
    doublings = (torch.full((32,), width * positions, device=kl.device) << torch.arange(32, device=kl.device) < longest).sum()
    wide = torch.full_like(doublings, width) << doublings
    ones = finite.double()
    entries = (place // wide).clamp(0, positions - 1)
    profile = [ones.new_zeros(positions).scatter_add_(0, entries, value) for value in (kept.double(), ones)]
    bins = (kept.clamp(min=LOWEST / 2).div(LOWEST).log() / math.log(GROWTH)).floor().long() + 1
    histogram = ones.new_zeros(BINS).scatter_add_(0, bins.clamp(0, BINS - 1), ones)
    scalars = [*figures.values(), *averages, finite.sum(), kept.sum(dtype=torch.float64), kl.masked_fill(~finite, -math.inf).amax(), wide]
    copied = torch.cat([torch.stack([value.double() for value in scalars]), histogram, *profile]).cpu()
    values = copied[:len(scalars)].tolist()
    return _Measured(dict(zip(figures, values, strict=False)), values[len(figures):-4], *values[-4:-1], int(values[-1]),
                     copied[len(scalars):-2 * positions], copied[-2 * positions:].reshape(2, positions))


def _positions(counts: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """How many tokens of its sequence that count come before each one that does."""
    before = counts.cumsum(-1) - counts.long()
    if cu_seqlens is None or len(cu_seqlens) < 2 or not len(counts):
        return before
    bounds = cu_seqlens.long().clamp(0, len(counts))
    owner = torch.searchsorted(bounds[1:].contiguous(), torch.arange(len(counts), device=counts.device), right=True)
    starts = bounds[:-1].gather(0, owner.clamp(max=len(bounds) - 2)).clamp(max=len(counts) - 1)
    return (before - before.gather(0, starts)).clamp(min=0)


def _quantile_of(ordered: torch.Tensor, count: torch.Tensor, q: float) -> torch.Tensor:
    """torch.quantile of the first `count` of ordered values, [] float64; between +inf and a number +inf."""
    rank = q * (count - 1).clamp(min=0).double()
    low, high = (ordered.gather(0, index.long()[None])[0].double() for index in (rank.floor(), rank.ceil()))
    share = rank - rank.floor()
    return torch.where(share > 0, (1 - share) * low + share * high, low)


# ---- the file and the loggers


def read_jsonl(path: str | os.PathLike) -> list[dict[str, float]]:
    """The steps that KLMonitor(jsonl=path) wrote, each as update returned it; a figure that was not finite reads as NaN.

    A line that was cut off in writing, as the last one of a run that was killed, is left out, and so are NUL bytes, which a loss of power leaves.

    Raises OSError for a file that cannot be read, ValueError for one that has another line than JSON objects.
    """
    steps = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, raw in enumerate(file, 1):
            line = raw.replace("\0", "").strip()
            if not line:
                continue
            try:
                entry = json.loads(line, parse_int=float)  # of any length
            except (ValueError, RecursionError) as error:
                # One cut off within a string may end as an object does.
                within = getattr(error, "pos", 0) == len(line) or "Unterminated" in str(error)
                if (line.startswith("{") and (within or not line.endswith("}"))) or (steps and not raw.endswith("\n")):
                    continue
                entry = None
            if not isinstance(entry, dict):
                raise ValueError(f"path: expected one JSON object per line, got {line[:40]!r} in line {number} of {os.fspath(path)}; "
                                 f"pass a file that KLMonitor(jsonl=...) wrote")
            steps.append({name: math.nan if value is None else float(value) if isinstance(value, bool) else value for name, value in entry.items()})
    return steps


def _append_line(path: str, metrics: dict[str, float]) -> None:
    """One write of one whole line; after a line that a killed process cut off, on a line of its own."""
    # JSON has no NaN: null, which every reader takes.
    plain = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    line = json.dumps({**plain, "step": int(metrics["step"])}).encode() + b"\n"
    with open(path, "ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
            line = b"\n" + line
        if file.write(line) != len(line):
            raise OSError(f"{path}: a line of {len(line)} bytes was not written whole; is the disk full?")


def _appendable(path: str | os.PathLike) -> str:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"jsonl: expected a path, got {type(path).__name__}")
    path = os.path.abspath(os.fspath(path))  # a later change of folder must not split the file
    try:
        open(path, "ab+", buffering=0).close()
    except (OSError, ValueError) as error:
        raise ValueError(f"jsonl: expected a file that can be appended to, got {path!r} ({error}); create its folder, or name another") from None
    return path


def _check_logger(logger: object) -> None:
    if isinstance(logger, logging.Logger):
        raise TypeError("loggers: expected an object with log(dict), got a logging.Logger, which logs text; pass lambda step: logger.info(step)")
    if not any(callable(way) for way in (logger, getattr(logger, "log", None), getattr(logger, "add_scalar", None))):
        raise TypeError(f"loggers: expected objects with log(dict) or add_scalar(name, value, step), or callables, got {type(logger).__name__}")


def _send(logger: object, metrics: dict[str, float]) -> None:
    if callable(getattr(logger, "add_scalar", None)):
        for name, value in metrics.items():
            if name != "step":
                logger.add_scalar(name, value, int(metrics["step"]))
    elif callable(getattr(logger, "log", None)):
        logger.log(metrics)
    else:
        logger(metrics)
