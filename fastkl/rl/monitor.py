"""Monitors the KL of a run: figures per step and for the run, an alarm, and a log file."""

import math
import os
import warnings
from functools import partial
from typing import Any

import torch

from .._types import BetaController
from . import _checks
from .figures import BINS, GROWTH, LOWEST, QUANTILES, measure, sorted_figures
from .logs import append_line, appendable
from .logs import read_jsonl as read_jsonl
from .sequences import sequences_of
from .spikes import SpikeDetector


class KLMonitor:
    """Figures of the KL per step and per run, with an alarm for jumps.

    Equivalent, for `update(kl, mask)`, to

        x = kl[mask]
        {
            "kl/mean": x.mean(),
            "kl/per_sequence": kl.where(mask, 0).sum(-1)[mask.any(-1)].mean(),
            "kl/max": x.max(),
            "kl/p50": x.quantile(0.5),                                  # and "kl/p95", "kl/p99"
            "kl/tokens": x.numel(),
            "kl/not_finite": (~x.isfinite()).sum(),
            "kl/above_threshold": (x > threshold).float().mean(),
            "kl/position_1": x[part == 0].mean(),                       # to "kl/position_N"
            "kl/spike": detector.update(x.mean()),
        }

    as Python floats, with exactly one copy from the device, the only synchronisation. `part` is
    N · i // L for the i-th (from 0) of the L counted tokens of a sequence.

    Args:
        threshold: KL of a token, nats; if given, "kl/above_threshold" is the share of tokens above
            it.
        spike: True: a SpikeDetector() watches "kl/mean", and "kl/spike" is 1.0 if it rings,
            otherwise 0.0; pass your own SpikeDetector for other settings; False: no alarm.
        positions: number N of equal parts of each sequence's counted tokens; each part's mean KL is
            "kl/position_1" … "kl/position_N", NaN for an empty part. 0: none.
        jsonl: a file for one line of JSON per update, in an existing directory; created
            immediately. It is never truncated: a resumed run appends to it.

    For a logger: wandb.log(monitor.update(kl, mask)).

    The state of the run is on the CPU: state_dict() costs no copy. If the file can no longer be
    written (OSError), the run continues: the first time, a RuntimeWarning names the failure and the
    step. From then on steps may be missing in the file; the figures are still returned. In
    distributed training each process sees its own tokens: gather them, or monitor one process.

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
        positions: int = 0,
        jsonl: str | os.PathLike[str] | None = None,
    ) -> None:
        if threshold is not None:
            _checks.number(
                "threshold",
                threshold,
                "a KL in nats of at least 0, or None",
                lambda x: 0 <= x < math.inf,
                "None counts none",
            )
        _checks.expect(
            isinstance(spike, (bool, SpikeDetector)),
            "spike",
            "True, False or a SpikeDetector",
            spike,
            "pass True for SpikeDetector(), its defaults",
            TypeError,
        )
        _checks.whole_number(
            "positions",
            positions,
            "a number of parts of each sequence",
            "0 is for no means by position",
            lowest=0,
            largest=1024,
        )
        self.threshold, self.positions = threshold, positions
        self.detector = SpikeDetector() if spike is True else spike or None
        self.jsonl = None if jsonl is None else appendable(jsonl)
        self._failed, self._step = False, 0
        self._run = dict.fromkeys(
            ("steps", "tokens", "sequences", "finite", "sum", "max", "above", "spikes"), 0.0
        )
        self._histogram = torch.zeros(BINS, dtype=torch.float64, device="cpu")

    def __repr__(self) -> str:
        return (
            f"KLMonitor(threshold={self.threshold}, spike={self.detector or False}, "
            f"positions={self.positions}, jsonl={self.jsonl!r})"
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
        """Record a step and return its figures.

        Args:
            kl: KL of each token, nats, [..., T] of any float type, T the position in the sequence;
                or [total], concatenated packed sequences, with cu_seqlens; [T] alone is one
                sequence. No gradient is kept.
            mask: bool, shaped as kl, True where the token counts. Other tokens affect no figure,
                whatever they hold, NaN included.
            cu_seqlens: integers [S+1] from 0 to total, where the packed sequences begin and end;
                "kl/per_sequence" needs them.
            entropy, reward, beta, more: further figures to report, or None. A tensor shaped as kl
                is averaged over the tokens that count, any other tensor over all its entries; a
                number, or the `beta` of a controller, is reported unchanged. A controller's
                `target` is reported too: "kl/target", or "kl/target_per_sequence" if its unit is
                "sequence". With as many packed sequences as tokens a reward [S] counts as one per
                sequence, as in shape_rewards, any other [S] as per token. Tensors on kl's device
                share the same copy; CPU tensors are moved to kl's device first.
            step: the step's number, from 0 to 2^53. Default: one more than the last, from 0.

        Returns:
            {"step", "kl/mean", "kl/per_sequence", "kl/max", "kl/p50", "kl/p95", "kl/p99",
            "kl/tokens", "kl/not_finite", with a threshold "kl/above_threshold", with positions
            "kl/position_1" and so on, with a detector "kl/spike", and the further figures}, Python
            floats. "kl/per_sequence" is the mean, over the sequences with a token that counts, of
            the sum over each one's tokens. A KL of +inf or NaN propagates to "kl/mean",
            "kl/per_sequence", "kl/max" and the mean of its position, and rings the alarm; the
            quantiles leave out NaN and the figures of the run both, so that one bad token does not
            spoil them. With no token that counts the KL figures are NaN, and no alarm rings.

        Raises:
            TypeError or ValueError for a kl that is not [..., T] of a float type, a mask or
            cu_seqlens that does not fit, or a figure that is not a number or tensor, is on another
            device or has a name listed above.
        """
        _checks.float_tensor("kl", kl, "KL per token, [..., T] or [total]", 1)
        _checks.mask(mask, kl.shape, kl.device)
        sequences = sequences_of("kl", kl, cu_seqlens)
        if (
            cu_seqlens is not None
            and isinstance(reward, torch.Tensor)
            and reward.shape == kl.shape == (sequences.number,)
        ):
            reward = reward[None]  # per sequence, not per token
        per = "_per_sequence" if getattr(beta, "unit", None) == "sequence" else ""
        given = {
            "entropy": entropy,
            "reward": reward,
            "beta": getattr(beta, "beta", beta),
            f"kl/target{per}": getattr(beta, "target", None),
            **more,
        }
        numbers, tensors = sorted_figures(given, kl)
        step = self._step if step is None else step
        _checks.whole_number("step", step, "a whole number", "count the steps from 0", 0, 2**53)
        figures, averages, run, histogram = measure(
            kl.detach(),
            torch.ones_like(kl, dtype=torch.bool) if mask is None else mask,
            sequences,
            tensors,
            self.threshold,
            self.positions,
        )
        named = {**numbers, **averages}
        metrics = {"step": float(step), **figures}
        if self.detector is not None:
            metrics["kl/spike"] = float(
                metrics["kl/tokens"] > 0 and self.detector.update(metrics["kl/mean"])
            )
        metrics.update((name, named[name]) for name in given if name in named)
        self._remember({**run, "steps": 1.0, "spikes": metrics.get("kl/spike", 0.0)}, histogram)
        self._step = step + 1
        if self.jsonl is not None:
            try:
                append_line(self.jsonl, metrics)
            except OSError as error:
                if not self._failed:
                    warnings.warn(
                        f"KLMonitor: {self.jsonl!r} failed at step {step} ({error}); the run goes "
                        f"on, this step and later ones may be missing there, without another "
                        f"warning",
                        RuntimeWarning,
                        stacklevel=2,
                    )
                self._failed = True
        return metrics

    def _remember(self, step: dict[str, float], histogram: torch.Tensor) -> None:
        """Add a step to the run's totals."""
        run, largest = self._run, step.pop("max")
        if step["finite"]:
            run["max"] = max(run["max"], largest) if run["finite"] else largest
        for name, value in step.items():
            run[name] += value
        # Not in place, which fails outside inference mode for a tensor created inside it.
        self._histogram = self._histogram + histogram

    def summary(self) -> dict[str, float]:
        """Return figures over all tokens of the run so far: "steps", "kl/tokens", "kl/mean",
        "kl/per_sequence" (over all sequences), "kl/max", "kl/p50", "kl/p95", "kl/p99" (accurate to
        1 % between 1e-8 and 1e3 nats; 0 below), "kl/not_finite", and with a threshold or a detector
        "kl/above_threshold" and "kl/spikes" (the number of steps that rang). Tokens whose KL is not
        finite are counted, +inf also as above the threshold, and otherwise left out. A figure
        without data is NaN.
        """
        run, some = self._run, bool(self._run["finite"])
        above = run["above"] / run["tokens"] if run["tokens"] else math.nan
        return {
            "steps": run["steps"],
            "kl/tokens": run["tokens"],
            "kl/mean": run["sum"] / run["finite"] if some else math.nan,
            "kl/per_sequence": run["sum"] / run["sequences"] if some else math.nan,
            "kl/max": run["max"] if some else math.nan,
            **{name: self._quantile(q) for name, q in QUANTILES.items()},
            "kl/not_finite": run["tokens"] - run["finite"],
            **({} if self.threshold is None else {"kl/above_threshold": above}),
            **({} if self.detector is None else {"kl/spikes": run["spikes"]}),
        }

    def _quantile(self, q: float) -> float:
        """Return the centre of the bin with the token of that rank, at most the maximum."""
        if not self._run["finite"]:
            return math.nan
        entry = int((self._histogram.cumsum(0) <= q * (self._run["finite"] - 1)).sum())
        centre = LOWEST * GROWTH ** (entry - 1) * 2 * GROWTH / (1 + GROWTH)
        return min(centre, self._run["max"]) if entry else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the run as a plain dict for JSON or torch.save."""
        return {
            "class": "KLMonitor",
            "threshold": self.threshold,
            "step": self._step,
            "run": dict(self._run),
            "histogram": self._histogram.tolist(),
            "spike": None if self.detector is None else self.detector.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict().

        A state of another class, incomplete or damaged, or from a monitor with another threshold or
        differing in having a detector, raises ValueError and leaves this one unchanged.
        """
        mine = self.state_dict()
        _checks.state(
            state,
            mine,
            ("threshold",),
            {
                **{name: partial(_fits, mine[name]) for name in ("step", "run", "histogram")},
                "spike": lambda spike: (spike is None) == (self.detector is None),
            },
        )
        if self.detector is not None:
            self.detector.load_state_dict(state["spike"])
        self._step, self._run = state["step"], dict(state["run"])
        self._histogram = torch.tensor(state["histogram"], dtype=torch.float64, device="cpu")


def _fits(own: Any, value: Any) -> bool:
    """Return whether a part of a state has the same structure as this object's own, and finite
    numbers.
    """
    if isinstance(own, dict):
        return own.keys() == value.keys() and all(_fits(own[name], value[name]) for name in own)
    if isinstance(own, list):
        return len(own) == len(value) and all(map(_fits, own, value))
    return type(value) is type(own) and math.isfinite(value)
