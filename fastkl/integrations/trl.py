"""TRL's trainers with the exact KL from hidden states and lm_head weights: GRPO's penalty, and
distillation.

At most 2 GiB of logits exist at once, and no KL is sampled.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastkl import Head, linear_token_stats
from fastkl._checks import expect

from . import _trl
from .transformers import KLCallback

# isort: split
# After _trl, which checks the version.
import trl
from trl.models.utils import _ForwardRedirection
from trl.trainer.utils import use_adapter


class ExactGRPOTrainer(trl.GRPOTrainer):
    """trl.GRPOTrainer whose KL penalty is the exact KL(policy‖reference) of each token, from hidden
    states, together with log-probs and entropy.

    Equivalent to GRPOTrainer with, in place of the estimate exp(ref - logp) - (ref - logp) - 1
    times a ratio,

        log_p = (policy_logits / temperature).log_softmax(-1)
        log_q = (ref_logits / temperature).log_softmax(-1)
        per_token_kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        per_token_loss = per_token_loss + beta * per_token_kl           # reduced by `loss_type`

    which has no sampling noise and needs no importance ratio: `use_bias_correction_kl` has no
    effect. The remaining noise is from dropout, by which a policy in training mode differs from its
    reference: set args.disable_dropout=True for a model with dropout.

        trainer = ExactGRPOTrainer(model, reward_funcs, args=GRPOConfig(beta=0.04, …), …)
        callback = KLCallback(AdaptiveBeta(0.04, 0.05, horizon=50), KLMonitor())
        trainer = ExactGRPOTrainer(model, …, callbacks=[callback])

    Args:
        all of GRPOTrainer's. With args.beta = 0 there is no reference and no KL: the loss is
            GRPOTrainer's own. A KLCallback among the callbacks gets the KL of every micro-batch;
            the `beta` of its controller replaces args.beta, which must be above 0 so that a
            reference is loaded. Without a KLCallback the trainer creates one, which logs "kl/mean".
        logits_dtype: as fastkl.linear_token_stats: torch.float32 keeps the accuracy that 16-bit
            logits lose for a KL below about 1e-2 nats.

    `trainer.kl_weight` is the weight of the next step, `trainer.kl_callback` the callback or None.
    `trainer.beta` is 0, which turns TRL's own estimate off. TRL's metrics "kl" and "eval_kl" are
    the exact KL. The reference runs in each loss rather than with the generation, and its hidden
    states are kept only if num_iterations > 1 reuses them. With PEFT the reference is the same as
    TRL's: the model without its adapter, or the copy "ref" of an adapter that came with the model;
    here always in eval mode. If the vocabulary of policy or reference is padded, log-probs,
    entropies and KL cover only the tokens that both have. Other tokens are not sampled
    (suppress_tokens is set), so the sampling policy is the one renormalised without them, whereas
    TRL's own log-softmax includes the padding. The metric of each micro-batch is reduced over the
    processes and synchronises with the device, as do those of TRL's own loss.

    Raises:
        ImportError on import: a TRL version other than the tested one. ValueError on construction:
        an option that is not supported (FSDP, DeepSpeed, torch.compile, a router's auxiliary loss,
        multimodal models, prompt learning), a controller with args.beta = 0, a model that head_of
        rejects. In training: a token that the reference lacks, from a prompt or vLLM. RuntimeError:
        TRL did not ask for log-probs as it does in 1.16.

    Source: Shao et al., DeepSeekMath (2024), eq. 3, with the exact KL instead of eq. 4.
    """

    def __init__(self, *args: Any, logits_dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kl_callback: Any = _trl.set_up(
            self,
            logits_dtype,
            "trl.GRPOTrainer",
            {
                "router_aux_loss_coef above 0": self.aux_loss_enabled,
                "beta below 0": self.args.beta < 0,
            },
        )
        self._redirect = _ForwardRedirection()
        self.beta = 0.0
        self._reference: tuple[torch.Tensor, Head] | None = None
        self._kl: Any = None
        expect(
            self.args.beta > 0 or self.kl_callback is None,
            "args.beta",
            "above 0 with a KLCallback",
            "0, with which TRL loads no reference",
            "pass the controller's initial beta",
        )
        if self.args.beta > 0:
            self.kl_callback = self.kl_callback or KLCallback()
            self.kl_callback.attach(self)
        self._policy_head, self._ref_head = _trl.checked_heads(self, self.ref_model)
        # Suppress the policy's tokens that the reference lacks.
        policy = _trl.causal_lm(self.accelerator.unwrap_model(self.model))
        shared, own = len(self._policy_head.weight), len(policy.get_output_embeddings().weight)
        self._shared = None if shared == own else shared
        if shared != own and not self.use_vllm:
            self.generation_kwargs["suppress_tokens"] = self.generation_config.suppress_tokens = (
                sorted({*range(shared, own), *(self.generation_config.suppress_tokens or ())})
            )

    @property
    def kl_weight(self) -> float:
        """The KL's weight in the next step: the controller's beta, or args.beta."""
        controller = None if self.kl_callback is None else self.kl_callback.controller
        return float(self.args.beta if controller is None else controller.beta)

    # ---- the two methods of GRPOTrainer that are overridden

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **inputs: Any,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        """Compute log-probs and entropies of the last tokens and, within the loss, self._kl."""
        original = self.accelerator.unwrap_model(model)
        # Inside the forward of DDP, so that it gathers the gradients; a batch of the loss is never
        # split, so it matches the reference's.
        run = (
            self._statistics
            if model is original
            else functools.partial(self._redirect, model, original, self._statistics)
        )
        parts = [
            run(original, ids, attended, logits_to_keep, self._reference)
            for ids, attended in zip(
                *(value.split(batch_size or len(value)) for value in (input_ids, attention_mask)),
                strict=True,
            )
        ]
        logprob, entropy, _, self._kl, *_ = (
            None if values[0] is None else torch.cat(values) for values in zip(*parts, strict=True)
        )
        return logprob, entropy if compute_entropy else None, None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        """Compute TRL's loss without its KL, plus beta times the exact one."""
        if self.args.beta == 0:
            return super()._compute_loss(model, inputs)
        mask = _trl.loss_mask(inputs)
        self._reference, self._kl = self._reference_head(model, inputs), None
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self._reference = None
        expect(
            self._kl is not None,
            "trl",
            "GRPOTrainer._compute_loss to call _get_per_token_logps_and_entropies as in 1.16",
            f"a {trl.__version__} that does not",
            "install the TRL that fastkl.integrations.trl was tested with",
            RuntimeError,
        )
        kl, self._kl = torch.where(mask, self._kl, 0.0), None
        self.kl_callback.record(kl, mask)
        sums = self.accelerator.reduce(
            torch.stack([kl.detach().sum(), mask.sum().float()]), reduction="sum"
        )
        self._metrics["train" if self.model.training else "eval"]["kl"].append(
            (sums[0] / sums[1].clamp(min=1)).item()
        )
        return loss + self.kl_weight * self._reduced(kl, mask, inputs)

    def _reduced(self, kl: torch.Tensor, mask: torch.Tensor, inputs: dict[str, Any]) -> Any:
        """Reduce per-token values, 0 where the token does not count, as GRPOTrainer its loss."""
        training, kind = self.model.training, self.loss_type
        accumulated = self.current_gradient_accumulation_steps if training else 1.0
        if kind in ("cispo", "dapo", "vespo"):
            items = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            return kl.sum() / (
                items * accumulated / self.args.steps_per_generation if training else items
            )
        reduced: dict[str, Callable[[], torch.Tensor]] = {
            **dict.fromkeys(
                ("grpo", "sapo"), lambda: (kl.sum(-1) / mask.sum(-1).clamp(min=1)).mean()
            ),
            "bnpo": lambda: kl.sum() / mask.sum().clamp(min=1),
            "dr_grpo": lambda: kl.sum() / (len(kl) * self.max_completion_length),
            "luspo": lambda: kl.sum(-1).mean(),
        }
        return reduced[kind]() / accumulated

    # ---- what is computed

    def _hidden(
        self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, keep: int
    ) -> Any:
        """Compute the hidden states [B, keep, H] that predict the last `keep` tokens."""
        # This check synchronises; an out-of-range embedding row would make the device unusable.
        if self._shared is not None:
            expect(
                int(input_ids.max()) < self._shared,
                "input_ids",
                f"ids below {self._shared}, the tokens that policy and reference share",
                int(input_ids.max()),
                "resize the reference as the policy was, or keep the token out of prompts, padding "
                "and sampling",
            )
        with self.accelerator.autocast():
            return _trl.hidden_states(model, input_ids, attention_mask)[:, -keep:]

    def _statistics(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        keep: int,
        reference: Any,
    ) -> Any:
        """Compute TokenStats of the last `keep` tokens inside the forward of a model's wrapper."""
        ref_hidden, ref_head = reference or (None, None)
        hidden = self._hidden(model, input_ids, attention_mask, keep)
        context = self.accelerator.autocast()
        if self.args.cast_lm_head_to_fp32:
            hidden, context = hidden.float(), torch.autocast(hidden.device.type, enabled=False)
            ref_hidden = None if ref_hidden is None else ref_hidden.float()
        with context:
            return linear_token_stats(
                hidden,
                _trl.head(model, self._policy_head),
                input_ids[:, -keep:],
                ref_hidden,
                ref_head,
                temperature=self.temperature,
                logits_dtype=self._logits_dtype,
                mask=attention_mask[:, -keep:].bool(),
            )

    @torch.no_grad()
    def _reference_head(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, Head]:
        """Return (hidden states, Head) of the reference for a micro-batch, without gradient."""
        kept = inputs.get("fastkl_ref_hidden")
        with self._as_reference(model) as reference:
            hidden = self._hidden(reference, *_trl.sequence(inputs)) if kept is None else kept
            head = _trl.detached(_trl.head(reference, self._ref_head))
        if self.num_iterations > 1 and self.model.training:
            inputs["fastkl_ref_hidden"] = hidden
        return hidden, head

    @contextlib.contextmanager
    def _as_reference(self, model: Any) -> Iterator[Any]:
        """Yield the unwrapped reference in eval mode; with PEFT, the policy without its adapter."""
        own = self.ref_model is None
        reference = self.accelerator.unwrap_model(model if own else self.ref_model)
        training = reference.training
        adapter = (
            use_adapter(reference, "ref" if "ref" in reference.peft_config else None)
            if own
            else contextlib.nullcontext()
        )
        try:
            with adapter:
                yield reference.eval()
        finally:
            reference.train(training)


class ExactDistillationTrainer(_trl.ExactDivergence, trl.DistillationTrainer):
    """trl.DistillationTrainer with fastkl's divergence: exact down to the smallest values, with
    gradients computed together with the loss.

    Equivalent, with both models' logits over the completion tokens that count, to

        more = {"temperature": args.temperature}
        if args.beta == 0:                                              # forward KL
            values = kl_divergence(teacher_logits, student_logits, **more)
        elif args.beta == 1:                                            # reverse KL, TRL's default
            values = kl_divergence(student_logits, teacher_logits, **more)
        else:                                                           # the teacher's share
            values = js_divergence(teacher_logits, student_logits, beta=args.beta, **more)
        loss = values.sum() / tokens    # of all processes and accumulation steps

    with four matrix products for a trainable lm_head, and the memory of one chunk of logits:
    linear_divergence, reduction "sum". With a KLCallback among the callbacks, which needs per-token
    values, it takes six: reduction "none".

    Args:
        all of DistillationTrainer's.
        logits_dtype: as fastkl.linear_divergence.

    A KLCallback records the divergence selected by args.beta.

    The metric "entropy" is left out: it would cost another matrix product. TRL's compute_loss still
    synchronises with the device in each micro-batch.

    Raises:
        ImportError on import: a TRL version other than the tested one. ValueError on construction:
        args.beta outside [0, 1], FSDP, DeepSpeed, torch.compile, multimodal models, prompt
        learning, no teacher_model, a KLCallback with a controller, a model that head_of rejects.

    Source: Agarwal et al., On-Policy Distillation of Language Models (2023), section 2 and eq. 1.
    The KLs at beta = 0 and 1 are TRL's convention: the generalised Jensen-Shannon divergence tends
    to 0 at both ends.
    """

    def __init__(self, *args: Any, logits_dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._set_up(
            logits_dtype,
            "trl.DistillationTrainer",
            {"no teacher_model": self.teacher_model is None},
        )

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Call TRL's compute_loss, which calls _compute_loss inside the forward of the student's
        wrapper.
        """
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._metrics["train" if self.model.training else "eval"].pop("entropy", None)
        if self.kl_callback is not None:
            self.kl_callback.record(*self._recorded)
        return loss

    def _compute_loss(
        self,
        unwrapped_student: Any,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (loss, a placeholder for the entropy, tokens that count), as TRL expects them."""
        ids, attended, _ = _trl.sequence(inputs)
        mask = _trl.loss_mask(inputs)
        values = self._divergence(unwrapped_student, ids, attended, mask, self.temperature)
        self._recorded, tokens = (values.detach(), mask), mask.sum()
        return _trl.per_item(values, tokens, num_items_in_batch), torch.zeros_like(tokens), tokens
