"""TRL's experimental distillation trainer (GKD) with exact divergences from hidden states."""

from typing import Any

import torch

from . import _trl

# isort: split
# After _trl, which checks the version.
from trl.experimental.gkd import GKDTrainer
from trl.models.utils import _ForwardRedirection


class ExactGKDTrainer(_trl.ExactDivergence, GKDTrainer):
    """trl.experimental.gkd.GKDTrainer with fastkl's divergence from hidden states, exact down to
    the smallest values and never with all logits at once.

    Equivalent to GKDTrainer, whose loss is

        student_logits = student(input_ids, attention_mask).logits[:, :-1]
        teacher_logits = teacher(input_ids, attention_mask).logits[:, :-1]
        mask = labels[:, 1:] != -100
        if args.beta == 0:                                              # forward KL
            values = kl_divergence(teacher_logits, student_logits, mask)
        elif args.beta == 1:                                            # reverse KL
            values = kl_divergence(student_logits, teacher_logits, mask)
        else:                                       # the teacher's share; 0.5 is GKD's default
            values = js_divergence(teacher_logits, student_logits, mask, beta=args.beta)
        if num_items_in_batch is None:                                  # as in evaluation
            num_items_in_batch = mask.sum().clamp(min=1)
        loss = values.sum() / num_items_in_batch

    with four matrix products for a trainable lm_head, and the memory of one chunk of logits:
    linear_divergence, reduction "sum". With a KLCallback among the callbacks, which needs per-token
    values, it takes six: reduction "none". It never synchronises with the device.

        trainer = ExactGKDTrainer(student, teacher, args=GKDConfig(…), …)

    As in GKDTrainer, args.temperature applies to generation, not to the divergence.
    num_items_in_batch is counted by transformers.Trainer: it counts tokens of the data set,
    although completions generated in their place may have more or fewer, and over all processes,
    although DDP averages over them once more: with n processes, loss and gradient are 1/n of those
    in one. ExactDistillationTrainer has neither problem, and applies the temperature to both.

    Args:
        all of GKDTrainer's.
        logits_dtype: as fastkl.linear_divergence.

    A KLCallback records the divergence selected by args.beta.

    compute_loss(…, return_outputs=True), as called in evaluation with compute_metrics, computes the
    logits in another forward without gradient.

    Raises:
        ImportError on import: a TRL version other than the tested one. ValueError on construction:
        args.beta outside [0, 1], FSDP, DeepSpeed, torch.compile, multimodal models, prompt
        learning, a KLCallback with a controller, a model that head_of rejects.

    Source: as ExactDistillationTrainer.
    """

    def __init__(self, *args: Any, logits_dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._set_up(logits_dtype, "trl.experimental.gkd.GKDTrainer", {})
        self._redirect = _ForwardRedirection()

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Compute the mean over the tokens that count; with return_outputs, the outputs too."""
        student, mask = self.accelerator.unwrap_model(model), inputs["labels"][:, 1:] != -100
        sequence = inputs["input_ids"], inputs["attention_mask"]
        # Inside the forward of DDP, so that it gathers the gradients.
        values = self._redirect(model, student, self._divergence, student, *sequence, mask)
        if self.kl_callback is not None:
            self.kl_callback.record(values, mask)
        loss = _trl.per_item(values, mask.sum(), num_items_in_batch)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(input_ids=sequence[0], attention_mask=sequence[1])
