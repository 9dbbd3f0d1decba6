"""For transformers: a callback that runs beta's controller and the monitor once per optimizer step,
a teacher for Trainer, and a model's Head.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState
except ModuleNotFoundError as missing:
    raise ImportError(
        f"not installed: {missing.name}; remedy: pip install 'fastkl[compare]'"
    ) from missing

from fastkl import DistillationLoss, _checks
from fastkl._checks import expect

from ._head import head_of as head_of

# How figures are merged over the steps between two logs; all other names are averaged.
MERGES: dict[str, Callable[[float, float], float]] = {
    "kl/max": max,
    "kl/spike": max,
    **dict.fromkeys(("kl/beta", "kl/target", "kl/target_per_sequence"), lambda before, last: last),
}


class KLCallback(TrainerCallback, ExportableState):
    """Runs a controller and a monitor once per optimizer step, on the KL of all its micro-batches,
    and adds their figures to the Trainer's logs.

    Equivalent, at the end of every optimizer step, to

        kl, mask = ...                                              # of all micro-batches
        figures = monitor.update(kl, mask, beta=controller)         # on the first process
        controller.update(kl[mask].mean(), unit=controller.unit)    # over all processes
        trainer.log(figures)                                        # whenever the trainer logs

    with the mean per sequence if the controller's unit is "sequence". The KL comes from

        callback.record(kl, mask)           # in compute_loss, for each micro-batch

    which the trainers of fastkl.integrations.trl and gkd call themselves. A KLPenalty keeps only
    the mean, which is enough for a controller:

        callback.record(penalty.last["kl"].expand(mask.shape), mask)

    Pass the callback to the trainer as `callbacks=[callback]`, or call `callback.attach(trainer)`
    on a trainer. attach puts the callback before the reporters (report_to="wandb", "tensorboard",
    …), so the figures reach them too, not only log_history, the progress bar and JSON.

    Args:
        controller: an object with `beta` and `update(kl, unit=)`, such as those of fastkl.rl. It is
            updated with n = 1, so a horizon counts optimizer steps. A mean below 0, common with k1,
            is passed unchanged. A step whose KL is not finite leaves the controller unchanged; the
            first such step warns.
        monitor: an object with `update(kl, mask, cu_seqlens=, entropy=, beta=, step=)`, such as
            fastkl.rl.KLMonitor. It runs only in the first process, on that process's tokens.

    Logged: the monitor's figures or, without a monitor, "kl/mean" (nats per token over all
    processes), and with a controller "kl/beta", the weight used in the steps. Over the steps
    between two logs "kl/max" and "kl/spike" are maxima, "kl/beta" and the target are the last
    values, others are means.

    Calls under torch.no_grad() are not counted, so evaluation changes nothing. The states of
    controller and monitor are part of the Trainer's checkpoints and are loaded on
    resume_from_checkpoint. It synchronises with the device once per optimizer step, and once more
    with a monitor.

    Raises TypeError or ValueError for wrong arguments; RuntimeError at the end of the first
    optimizer step if no KL was recorded.
    Source: Ziegler et al., Fine-Tuning Language Models from Human Preferences (2019), section 2.2,
    for a controller in the loop.
    """

    def __init__(self, controller: Any = None, monitor: Any = None) -> None:
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
        self.unit = getattr(controller, "unit", None) or "token"
        expect(
            self.unit in ("token", "sequence"),
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
        """Record a micro-batch: KL per token [..., T] in nats and, both optional, a bool mask [...]
        (True where the token counts) and the entropy [...].

        The tensors are detached and kept, without a copy or synchronisation, until the optimizer
        steps. Raises TypeError or ValueError for wrong arguments.
        """
        for name, value in (("kl", kl), ("entropy", kl if entropy is None else entropy)):
            _checks.per_row(
                name,
                value,
                getattr(kl, "shape", torch.Size()),
                getattr(kl, "device", torch.device("cpu")),
                _checks.FLOAT_TYPES,
                "a float tensor of one number per token, [..., T]",
                "pass it before its mean is taken",
            )
        expect(kl.dim() > 0, "kl", "[..., T]", "a scalar", "pass it before its mean is taken")
        _checks.mask(mask, kl.shape, kl.device)
        if torch.is_grad_enabled():
            mask = torch.ones_like(kl, dtype=torch.bool) if mask is None else mask
            self._micro_batches.append(
                (kl.detach(), mask, None if entropy is None else entropy.detach())
            )

    def attach(self, trainer: Any) -> "KLCallback":
        """Make this the trainer's first callback, wherever it was, and return it; for the trainers
        of this package, pass it at construction instead.
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
        handler = trainer.callback_handler
        handler.callbacks = [self, *(each for each in handler.callbacks if each is not self)]
        return self

    # ---- the events of Trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load the states from a checkpoint."""
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
                if values is not None and getattr(self, part) is None:
                    warnings.warn(
                        f"KLCallback: the checkpoint holds the state of a {part}, this callback "
                        f"has none: the state is dropped",
                        stacklevel=2,
                    )
                elif values is not None:
                    getattr(self, part).load_state_dict(values)

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
        parts = [
            (torch.where(mask, kl, 0.0), mask, mask.any(-1)) for kl, mask, _ in self._micro_batches
        ]
        totals = torch.stack(
            [torch.stack([each.sum(dtype=torch.float32) for each in part]) for part in parts]
        ).sum(0)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(totals)
        kl, tokens, sequences = totals.tolist()
        beta = None if self.controller is None else self.controller.beta
        if self.monitor is None:
            figures = {"kl/mean": kl / tokens if tokens else math.nan}
        else:
            figures = self._monitored(state.global_step) if state.is_world_process_zero else {}
        if beta is not None:
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
        self._micro_batches = []
        for name, value in figures.items():
            if not math.isnan(value):
                before, steps = self._figures.get(name, (value if name in MERGES else 0.0, 0))
                merged = MERGES[name](before, value) if name in MERGES else before + value
                self._figures[name] = merged, steps + 1

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        model: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the figures since the last log to Trainer's new entry and to the logs of later
        callbacks.
        """
        # The summary at the end belongs to training, even after an evaluation.
        if logs is None or (
            model is not None and not model.training and "train_runtime" not in logs
        ):
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
        return {
            "args": {},
            "attributes": {
                name: part.state_dict() if hasattr(part, "state_dict") else None
                for name, part in (("controller", self.controller), ("monitor", self.monitor))
            },
        }

    def _monitored(self, step: int) -> dict[str, float]:
        """Pass the micro-batches to the monitor as one packed batch, and name its figures."""
        kls, masks, entropies = zip(*self._micro_batches, strict=True)
        # Created on the KL's device: a copy from the CPU would wait for all queued work.
        lengths = torch.cat(
            [torch.full((kl.shape[:-1].numel(),), kl.shape[-1], device=kl.device) for kl in kls]
        )
        entropy = (
            None if None in entropies else torch.cat([value.reshape(-1) for value in entropies])
        )
        figures = self.monitor.update(
            torch.cat([kl.reshape(-1) for kl in kls]),
            torch.cat([mask.reshape(-1) for mask in masks]),
            cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
            entropy=entropy,
            beta=self.controller,
            step=step,
        )
        return {
            name if name.startswith("kl/") else f"kl/{name}": value
            for name, value in figures.items()
            if name != "step"
        }


class TeacherMixin:
    """Adds a teacher to transformers.Trainer, or to a subclass that calls its compute_loss, for a
    causal language model: the loss is DistillationLoss, normalised as the Trainer's own.

        class Distiller(TeacherMixin, transformers.Trainer): ...

        trainer = Distiller(student, args, teacher=teacher, train_dataset=…,
                            distillation_loss=DistillationLoss("js", 0.5, temperature=2.0))

    Equivalent, with both models' logits of the batch, to the Trainer's argument

        compute_loss_func=lambda outputs, labels, num_items_in_batch: distillation_loss(
            outputs.logits[..., :-1, :V], teacher_logits[..., :-1, :V], labels[..., 1:],
            normalizer=num_items_in_batch,
        )

    which by itself does not have the teacher's inputs. V is the smaller of both vocabularies; their
    first V entries must be the same tokens, as if the wider one were padded.

    Args:
        all of the Trainer's, except compute_loss_func.
        teacher: a transformers model; it is put into eval mode on the Trainer's device, whole in
            each process, and gets no gradient.
        distillation_loss: its `last` has the terms of the last micro-batch. Default:
            DistillationLoss().

    Raises TypeError for a teacher that is not a model, ValueError for a batch without labels.
    Source: as DistillationLoss.
    """

    accelerator: Any

    def __init__(
        self,
        *args: Any,
        teacher: torch.nn.Module,
        distillation_loss: DistillationLoss | None = None,
        **kwargs: Any,
    ) -> None:
        expect(
            isinstance(teacher, torch.nn.Module),
            "teacher",
            "a model",
            teacher,
            "load it with AutoModelForCausalLM",
            TypeError,
        )
        super().__init__(*args, compute_loss_func=self._distillation, **kwargs)  # type: ignore[call-arg]
        self.distillation_loss = distillation_loss or DistillationLoss()
        self.teacher = self.accelerator.prepare_model(teacher, evaluation_mode=True).eval()

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Run the teacher, then the Trainer's compute_loss, which calls student and loss."""
        expect(
            "labels" in inputs,
            "inputs",
            "labels",
            ", ".join(inputs),
            "use a data collator that makes them, such as DataCollatorForLanguageModeling",
        )
        given = {name: value for name, value in inputs.items() if name != "labels"}
        with torch.no_grad():
            self._teacher_logits: torch.Tensor = self.teacher(**given).logits
        return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def _distillation(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Compute the loss of a micro-batch, as compute_loss_func."""
        pair = outputs.logits, self._teacher_logits
        width = min(logits.shape[-1] for logits in pair)
        student, teacher = (logits[..., :-1, :width] for logits in pair)
        return self.distillation_loss(
            student, teacher, labels[..., 1:], normalizer=num_items_in_batch
        )
