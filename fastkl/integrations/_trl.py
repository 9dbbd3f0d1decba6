"""What the trainers for TRL share: the one version of TRL they are for, what they refuse, the lm_head and its check, and the distillation loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastkl import linear_kl_divergence

try:
    import trl
except ModuleNotFoundError as missing:
    raise ImportError(f"not installed: {missing.name}; remedy: pip install 'trl==1.16.*'") from missing
# What the trainers override is underscored in TRL and may change with any version, in ways that a signature does not show.
if trl.__version__.split(".")[:2] != ["1", "16"]:
    raise ImportError(f"trl: expected version 1.16, whose internals fastkl.integrations.trl was tested with, got {trl.__version__}; "
                      f"remedy: pip install 'trl==1.16.*', or a fastkl for that version")

from .transformers import KLCallback


class ExactDivergence:
    """Beside a distillation trainer of TRL's among the bases: checks when it is made, and the KL in the direction that its `beta` says."""

    def _set_up(self, logits_dtype: torch.dtype | None, instead: str, refused: dict[str, bool]) -> None:
        refuse(self, instead, refused)
        if self.beta not in (0, 1):
            raise ValueError(f"args.beta: expected 0 (forward KL) or 1 (reverse KL), got {self.beta}; "
                             f"use {instead} for the Jensen-Shannon divergences between")
        self._logits_dtype = logits_dtype
        self.kl_callback = callback_of(self)
        if self.kl_callback is not None:
            if self.kl_callback.controller is not None:
                raise ValueError("callbacks: expected a KLCallback without controller, got one with; distillation has no weight to control: "
                                 "pass KLCallback(None, monitor)")
            self.kl_callback.attach(self)
        student, teacher = (causal_lm(self.accelerator.unwrap_model(model)) for model in (self.model, self.teacher_model))
        for model in (student, teacher):
            check_head(model, self.accelerator.mixed_precision)
        if softcap(student) != softcap(teacher):
            raise ValueError(f"teacher_model: expected the student's soft cap, {softcap(student)}, got {softcap(teacher)}; "
                             f"use {instead} for this pair")

    def _kl(self, student, teacher, student_hidden: torch.Tensor, teacher_hidden: torch.Tensor, mask: torch.Tensor,
            temperature: float = 1.0) -> torch.Tensor:
        """Of unwrapped models, the sum of the tokens that count, or with a callback the KL of each; only the student learns."""
        student, teacher = causal_lm(student), causal_lm(teacher)
        teacher_head = (None if value is None else value.detach() for value in head(teacher))
        sides = [(student_hidden, *head(student)), (teacher_hidden, *teacher_head)]
        (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias) = sides if self.beta == 1 else sides[::-1]
        return linear_kl_divergence(hidden, weight, ref_hidden, ref_weight, bias=bias, ref_bias=ref_bias, temperature=temperature, mask=mask,
                                    softcap=softcap(teacher), logits_dtype=self._logits_dtype,
                                    reduction="sum" if self.kl_callback is None else "none")


def per_item(kl: torch.Tensor, tokens: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
    """The loss of a micro-batch: over the tokens of the whole batch, or over its own where nobody counted those."""
    return kl.sum() / (tokens.clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


def callback_of(trainer) -> KLCallback | None:
    """The KLCallback among the trainer's callbacks."""
    found = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, KLCallback)]
    if len(found) > 1:
        raise ValueError(f"callbacks: expected one KLCallback, got {len(found)}; one takes both a controller and a monitor")
    return found[0] if found else None


def refuse(trainer, instead: str, more: dict[str, bool]) -> None:
    """Raise for options that none of the trainers supports, and for those in `more` that are on."""
    configs = getattr(trainer.model, "peft_config", {})
    refused = {"fsdp": trainer.is_fsdp_enabled, "deepspeed": trainer.is_deepspeed_enabled, "torch_compile": trainer.args.torch_compile,
               "a processor, for a multimodal model": trainer._is_vlm,
               "prompt learning": isinstance(configs, dict) and any(config.is_prompt_learning for config in configs.values()), **more}
    named = [name for name, used in refused.items() if used]
    if named:
        raise ValueError(f"args: expected options that {type(trainer).__name__} supports, got {', '.join(named)}; change that, or use {instead}")


# ---- a micro-batch of GRPOTrainer or DistillationTrainer


def sequence(inputs: dict) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(ids, attention mask, how many of the last tokens are the completion) of prompts with their completions."""
    ids, mask = (torch.cat([inputs[f"prompt_{part}"], inputs[f"completion_{part}"]], dim=1) for part in ("ids", "mask"))
    return ids, mask, inputs["completion_ids"].shape[1]


def loss_mask(inputs: dict) -> torch.Tensor:
    """Completion tokens that count: a tool's do not."""
    return (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()


# ---- models


def causal_lm(model: torch.nn.Module) -> torch.nn.Module:
    """The model with the lm_head, inside a PEFT model."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def hidden_states(model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The hidden states [B, T-1, H] that every token but the first is predicted from."""
    return causal_lm(model).base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state[:, :-1]


def head(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight, bias) of the lm_head."""
    layer = model.get_output_embeddings()
    return layer.weight, getattr(layer, "bias", None)


def softcap(model: torch.nn.Module) -> float | None:
    """The soft cap of its logits, or None."""
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


@torch.no_grad()
def check_head(model: torch.nn.Module, mixed_precision: str, in_float32: bool = False) -> None:
    """Raise unless a model's logits are what fastkl makes of its last hidden states: families scale, pad or adapt theirs in ways of their own."""
    kept = []
    hook = model.base_model.register_forward_hook(lambda module, args, output: kept.append(getattr(output, "last_hidden_state", None)))
    try:
        weight, bias = head(model)
        logits = model(input_ids=torch.arange(min(4, len(weight)), device=weight.device)[None], use_cache=False).logits
    finally:
        hook.remove()
    faithful = bool(kept) and kept[-1] is not None and weight.is_floating_point() and weight.shape[-1] == kept[-1].shape[-1]
    if faithful:
        hidden = kept[-1].float() if in_float32 else kept[-1]
        expected = F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
        if softcap(model) is not None:
            expected = softcap(model) * torch.tanh(expected / softcap(model))
        # The same product twice differs by a few roundings, 16-bit logits are right to 4e-3, and autocast may be at work in one of the two alone.
        exact = mixed_precision == "no" and weight.dtype in (torch.float32, torch.float64)
        tolerance = 1e-4 if exact else 2e-2
        faithful = expected.shape == logits.shape and bool((expected - logits).abs().max() <= tolerance * logits.abs().max())
    if not faithful:
        raise ValueError(f"model: expected one whose logits are F.linear(last hidden state, lm_head.weight, lm_head.bias), with a soft cap where "
                         f"its config has final_logit_softcapping, got {type(model).__name__}, whose logits are not; use TRL's own trainer")
