"""For transformers: a callback that runs the controller of beta and the monitor once per optimizer
step, and a model's Head.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import torch

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState
except ModuleNotFoundError as missing:
    raise ImportError(
        f"not installed: {missing.name}; remedy: pip install 'fastkl[compare]'"
    ) from missing

from ._errors import expect
from ._head import head_of as head_of

if TYPE_CHECKING:
    from transformers import Trainer

# How the figures of the steps between two logs are merged; those of all other names are averaged.
MERGES: dict[str, Callable[[float, float], float]] = {
    "kl/max": max,
    "kl/spike": max,
    "kl/beta": lambda before, last: last,
}
FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


Unit = Literal["token", "sequence"]


class Controller(Protocol):
    """Requirements of the callback on a controller."""

    @property
    def beta(self) -> float:
        """The weight as it is now."""

    def update(self, kl: float, *, unit: Unit) -> float:
        """Take in the mean KL of an optimizer step."""


class Monitor(Protocol):
    """Requirements of the callback on a monitor."""

    def update(
        self,
        kl: torch.Tensor,
        mask: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor,
        entropy: torch.Tensor | None,
        beta: float | None,
        step: int,
    ) -> dict[str, float]:
        """Take in the tokens of an optimizer step."""


class KLCallback(TrainerCallback, ExportableState):
    """Runs a controller and a monitor once per optimizer step, on the KL of all its micro-batches,
    and adds their figures to the Trainer's logs.

    Equivalent, at the end of every optimizer step, to

        kl, mask = ...                                              # of all micro-batches
        figures = monitor.update(kl, mask, beta=controller.beta)    # on the first process
        controller.update(kl[mask].mean(), unit=controller.unit)    # over all processes
        trainer.log(figures)                                        # whenever the trainer logs

    with the mean per sequence for a controller whose unit is "sequence". The KL comes from

        callback.record(kl, mask)           # in compute_loss, for each micro-batch

    which the trainers of fastkl.integrations.trl and gkd call themselves. A KLPenalty keeps the
    mean alone, which is enough for a controller:

        callback.record(penalty.last["kl"].expand(mask.shape), mask)

    Pass the callback to the trainer as `callbacks=[callback]`, or call `callback.attach(trainer)`
    on a trainer: that puts it before the reporters (report_to="wandb", "tensorboard", …), so that
    the figures reach those too, not only log_history, the progress bar and JSON.

    Args:
        controller: an object with `beta` and `update(kl, unit=)`, as fastkl.rl's. It is updated
            with n = 1, so a horizon counts optimizer steps. It gets a mean below 0, which k1 has in
            many steps, as it is. A step whose KL is not finite leaves it unchanged; the first one
            warns.
        monitor: an object with `update(kl, mask, cu_seqlens=, entropy=, beta=, step=)`, as
            fastkl.rl.KLMonitor. Only the first process's runs, on that process's tokens.

    Logged: the monitor's figures, without a monitor "kl/mean" (nats per token over all processes),
    and with a controller "kl/beta", the weight that the steps had. Between two logs "kl/max" and
    "kl/spike" are the largest, "kl/beta" is the last, the others are means.

    Calls under torch.no_grad() are not counted, so evaluation changes nothing. The states of
    controller and monitor are part of the Trainer's checkpoints and are loaded on
    resume_from_checkpoint. Per optimizer step it waits for the device once, and once more with a
    monitor.

    Raises TypeError or ValueError for wrong arguments; RuntimeError at the end of the first
    optimizer step if no KL came.
    Source: Ziegler et al., Fine-Tuning Language Models from Human Preferences (2019), section 2.2,
    for a controller in the loop.
    """

    def __init__(
        self, controller: Controller | None = None, monitor: Monitor | None = None
    ) -> None:
        for name, value, needed, example in (
            ("controller", controller, ("beta", "update"), "FixedBeta(0.05)"),
            ("monitor", monitor, ("update",), "KLMonitor()"),
        ):
            expect(
                value is None or all(hasattr(value, each) for each in needed),
                name,
                f"an object with {' and '.join(needed)}",
                value,
                f"pass one of fastkl.rl's, such as {example}",
                TypeError,
            )
        self.controller, self.monitor = controller, monitor
        self.unit: Unit = getattr(controller, "unit", "token")
        expect(
            isinstance(self.unit, str) and self.unit in get_args(Unit),
            "controller",
            "one whose unit is 'token' or 'sequence'",
            repr(self.unit),
            "set its unit to what its target is a mean over",
        )
        self._micro_batches: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        self._figures: dict[str, tuple[float, int]] = {}
        self._heard = self._warned = False

    def record(
        self,
        kl: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        entropy: torch.Tensor | None = None,
    ) -> None:
        """Take in a micro-batch: KL per token [..., T] in nats, a bool mask [...] (True where the
        token counts) and the entropy [...], both optional.

        Detached, nothing copied, nothing waited for: the tensors are kept until the optimizer
        steps. Raises TypeError or ValueError for others.
        """
        expect(
            isinstance(kl, torch.Tensor) and kl.dtype in FLOAT_TYPES and kl.dim() > 0,
            "kl",
            "a float tensor of KL per token, [..., T]",
            kl,
            "pass it before its mean is taken",
            TypeError,
        )
        expect(
            mask is None or (isinstance(mask, torch.Tensor) and mask.dtype == torch.bool),
            "mask",
            "a bool tensor, True where the token counts",
            mask,
            "convert it with .bool()",
            TypeError,
        )
        expect(
            entropy is None or isinstance(entropy, torch.Tensor),
            "entropy",
            "a float tensor shaped as kl",
            entropy,
            "pass token_stats(...).entropy, or None",
            TypeError,
        )
        for name, value in (("kl", kl), ("mask", mask), ("entropy", entropy)):
            if value is not None:
                plain = not value.is_nested and value.layout is torch.strided
                expect(
                    plain and not hasattr(value, "full_tensor"),
                    name,
                    "a plain tensor",
                    value,
                    "pass a strided one that this process holds whole",
                    TypeError,
                )
                expect(
                    value.shape == kl.shape,
                    name,
                    f"the shape of kl, {tuple(kl.shape)}",
                    tuple(value.shape),
                    "align the two",
                )
        if torch.is_grad_enabled():
            mask = torch.ones_like(kl, dtype=torch.bool) if mask is None else mask
            self._micro_batches.append(
                (kl.detach(), mask, None if entropy is None else entropy.detach())
            )

    def attach(self, trainer: Trainer) -> KLCallback:
        """Make this the trainer's first callback, wherever it was, and return it; the trainers of
        this package must know it when they are made.
        """
        expect(
            hasattr(getattr(trainer, "callback_handler", None), "callbacks"),
            "trainer",
            "a transformers.Trainer",
            trainer,
            "pass the trainer after it is made",
            TypeError,
        )
        expect(
            getattr(trainer, "kl_callback", self) is self,
            "trainer",
            "one that takes its KLCallback later",
            f"a {type(trainer).__name__}",
            "pass callbacks=[callback] when it is made",
        )
        others = trainer.callback_handler.callbacks
        trainer.callback_handler.callbacks = [
            self,
            *(callback for callback in others if callback is not self),
        ]
        return self

    # ---- the events of Trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load the states of a checkpoint."""
        expect(
            not args.restore_callback_states_from_checkpoint,
            "restore_callback_states_from_checkpoint",
            "False with a KLCallback",
            "True, which would replace it by one without controller and monitor",
            "it restores their states by itself",
        )
        self._micro_batches, self._figures, self._heard = [], {}, False
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        expect(
            not isinstance(saved, list),
            "callbacks",
            "one KLCallback",
            len(saved),
            "one takes both a controller and a monitor",
        )
        if state.global_step > 0:
            for part, values in saved["attributes"].items():
                self._restore(part, values)

    def _restore(self, part: str, values: dict[str, Any] | None) -> None:
        if values is None:
            return
        if getattr(self, part) is None:
            warnings.warn(
                f"KLCallback: the checkpoint holds the state of a {part}, this callback has none: "
                f"the state is dropped",
                stacklevel=2,
            )
            return
        try:
            getattr(self, part).load_state_dict(values)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{part}: expected the one that the checkpoint was saved with, got "
                f"another ({error}); resume with that one, or start anew without "
                f"resume_from_checkpoint"
            ) from error

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Update monitor and controller with the KL of the optimizer step's micro-batches."""
        expect(
            self._micro_batches or self._heard,
            "KLCallback",
            "a KL in the first optimizer step",
            "none",
            "call callback.record(kl, mask) from compute_loss, or use a trainer of "
            "fastkl.integrations.trl or gkd",
            RuntimeError,
        )
        if not self._micro_batches:
            return
        self._heard = True
        totals = self._totals()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(totals)
        kl, tokens, sequences = totals.tolist()
        beta = None if self.controller is None else self.controller.beta
        if self.monitor is None:
            figures = {"kl/mean": kl / tokens if tokens else math.nan}
        else:
            figures = (
                self._monitored(beta, state.global_step) if state.is_world_process_zero else {}
            )
        if self.controller is not None and beta is not None:
            figures["kl/beta"] = beta
            count = tokens if self.unit == "token" else sequences
            if count and math.isfinite(kl):
                self.controller.update(kl / count, unit=self.unit)
            elif count and not self._warned:
                self._warned = True
                warnings.warn(
                    f"KLCallback: expected a finite KL in optimizer step {state.global_step}, got "
                    f"{kl}; beta stays {beta:g}, in this and every later step without one",
                    stacklevel=2,
                )
        self._remember(figures)
        self._micro_batches = []

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        model: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the figures since the last log to Trainer's new entry and to the later callbacks'."""
        # The summary at the end is training's, even after an evaluation.
        of_evaluation = (
            model is not None and not model.training and "train_runtime" not in (logs or {})
        )
        if logs is None or of_evaluation:
            return
        figures = {
            name: value if name in MERGES else value / steps
            for name, (value, steps) in self._figures.items()
        }
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(figures)
        self._figures = {}

    def state(self) -> dict[str, dict[str, Any]]:
        """Return the part of a checkpoint's trainer_state.json."""
        parts: dict[str, Any] = {"controller": self.controller, "monitor": self.monitor}
        return {
            "args": {},
            "attributes": {
                name: part.state_dict() if hasattr(part, "state_dict") else None
                for name, part in parts.items()
            },
        }

    # ---- the figures of a step

    def _remember(self, figures: dict[str, float]) -> None:
        """Add the figures of a step to those since the last log, unless they are NaN."""
        for name, value in figures.items():
            if not math.isnan(value):
                before, steps = self._figures.get(name, (value if name in MERGES else 0.0, 0))
                merged = MERGES[name](before, value) if name in MERGES else before + value
                self._figures[name] = merged, steps + 1

    def _totals(self) -> torch.Tensor:
        """Return [sum of KL, tokens, sequences] of the step in this process."""
        parts = [
            (torch.where(mask, kl, 0.0), mask, mask.any(-1)) for kl, mask, _ in self._micro_batches
        ]
        sums = [torch.stack([each.sum(dtype=torch.float32) for each in part]) for part in parts]
        return torch.stack(sums).sum(0)

    def _monitored(self, beta: float | None, step: int) -> dict[str, float]:
        """Give the monitor the micro-batches as one packed batch, and name its figures for logs."""
        assert self.monitor is not None
        kls, masks, entropies = zip(*self._micro_batches, strict=True)
        ends = itertools.accumulate(kl.numel() for kl in kls)
        # Made on the KL's device: a copy from here would wait for all queued work.
        cu_seqlens = torch.cat(
            [
                torch.zeros(1, dtype=torch.int64, device=kls[0].device),
                *(
                    torch.arange(
                        end - kl.numel() + kl.shape[-1], end + 1, kl.shape[-1], device=kl.device
                    )
                    for kl, end in zip(kls, ends, strict=True)
                    if kl.numel()
                ),
            ]
        )
        entropy = (
            None if None in entropies else torch.cat([value.reshape(-1) for value in entropies])
        )
        figures = self.monitor.update(
            torch.cat([kl.reshape(-1) for kl in kls]),
            torch.cat([mask.reshape(-1) for mask in masks]),
            cu_seqlens=cu_seqlens,
            entropy=entropy,
            beta=beta,
            step=step,
        )
        return {
            name if name.startswith("kl/") else f"kl/{name}": value
            for name, value in figures.items()
            if name != "step"
        }
