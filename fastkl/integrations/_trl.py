"""Shared parts of the TRL trainers: version check, refused options, lm_heads, the divergence."""

from typing import Any

import torch

from fastkl import Head, linear_divergence
from fastkl._checks import expect
from fastkl._head_checks import options

try:
    import trl
except ModuleNotFoundError as missing:
    raise ImportError(
        f"not installed: {missing.name}; remedy: pip install 'trl==1.16.*'"
    ) from missing
# The trainers override private methods of TRL, which may change with any version in ways that a
# signature does not show.
if trl.__version__.split(".")[:2] != ["1", "16"]:
    raise ImportError(
        f"trl: expected version 1.16, whose internals fastkl.integrations.trl was tested with, "
        f"got {trl.__version__}; remedy: pip install 'trl==1.16.*', or a fastkl for that version"
    )

from ._head import causal_lm as causal_lm
from ._head import cut, head_of
from .transformers import KLCallback


class ExactDivergence:
    """Mixin for the distillation trainers, next to TRL's class: checks, and the divergence for
    beta.
    """

    def _set_up(
        self: Any, logits_dtype: torch.dtype | None, instead: str, refused: dict[str, bool]
    ) -> None:
        self.kl_callback = set_up(self, logits_dtype, instead, refused)
        expect(
            0 <= self.beta <= 1,
            "args.beta",
            "a number in [0, 1]",
            self.beta,
            "pass 0 for the forward KL, 1 for the reverse KL",
        )
        if self.kl_callback is not None:
            expect(
                self.kl_callback.controller is None,
                "callbacks",
                "a KLCallback without controller",
                "one with",
                "distillation has no weight to control: pass KLCallback(None, monitor)",
            )
            self.kl_callback.attach(self)
        self._student_head, self._teacher_head = checked_heads(self, self.teacher_model)

    def _divergence(
        self: Any,
        student: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        mask: torch.Tensor,
        temperature: float = 1.0,
    ) -> torch.Tensor:
        """Compute the sum over the tokens that count or, with a callback, the divergence per token.

        The student is unwrapped; only it gets a gradient. `mask` covers the last tokens.
        """
        teacher = self.accelerator.unwrap_model(self.teacher_model.eval())
        keep = mask.shape[1]
        with self.accelerator.autocast():
            with torch.no_grad():
                teacher_hidden = hidden_states(teacher, input_ids, attention_mask)[:, -keep:]
            sides = [
                (
                    hidden_states(student, input_ids, attention_mask)[:, -keep:],
                    head(student, self._student_head),
                ),
                (teacher_hidden, detached(head(teacher, self._teacher_head))),
            ]
            # At beta 0 and 1, where the generalised JSD is 0, TRL uses the KLs.
            between = 0 < self.beta < 1
            return linear_divergence(
                *(sides[0] + sides[1] if self.beta == 1 else sides[1] + sides[0]),
                divergence="js" if between else "kl",
                beta=self.beta if between else None,
                temperature=temperature,
                mask=mask,
                logits_dtype=self._logits_dtype,
                reduction="sum" if self.kl_callback is None else "none",
            )


def per_item(
    values: torch.Tensor, tokens: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """Divide by the tokens of the whole batch, or by the micro-batch's own if those are unknown."""
    return values.sum() / (
        tokens.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    )


def set_up(
    trainer: Any, logits_dtype: torch.dtype | None, instead: str, more: dict[str, bool]
) -> KLCallback | None:
    """Return the trainer's KLCallback and keep logits_dtype; raise for options that no trainer here
    supports, for options in `more` that are on, and for a wrong logits_dtype, all before the first
    generation.
    """
    refused = {
        "fsdp": trainer.is_fsdp_enabled,
        "deepspeed": trainer.is_deepspeed_enabled,
        "torch_compile": trainer.args.torch_compile,
        "a processor, for a multimodal model": trainer._is_vlm,
        **more,
    }
    named = ", ".join(name for name, used in refused.items() if used)
    expect(
        not named,
        "args",
        f"options that {type(trainer).__name__} supports",
        named,
        f"change that, or use {instead}",
    )
    options(logits_dtype)
    trainer._logits_dtype = logits_dtype
    found = [each for each in trainer.callback_handler.callbacks if isinstance(each, KLCallback)]
    expect(
        len(found) < 2,
        "callbacks",
        "one KLCallback",
        len(found),
        "one takes both a controller and a monitor",
    )
    return found[0] if found else None


# ---- a micro-batch of GRPOTrainer or DistillationTrainer


def sequence(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return (ids, attention mask, length of the completions) of prompts and completions."""
    ids, mask = (
        torch.cat([inputs[f"prompt_{part}"], inputs[f"completion_{part}"]], dim=1)
        for part in ("ids", "mask")
    )
    return ids, mask, inputs["completion_ids"].shape[1]


def loss_mask(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return a mask of the completion tokens that count; tokens from tools do not."""
    return (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()


# ---- models


def hidden_states(
    model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> Any:
    """Compute the hidden states [B, T-1, H] that predict every token but the first."""
    return (
        causal_lm(model)
        .base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        .last_hidden_state[:, :-1]
    )


def checked_heads(trainer: Any, second: torch.nn.Module | None) -> list[Head]:
    """Return the heads of the trainer's model and of its reference or teacher (None: the model).

    Both are cut to the shared rows.
    """
    heads = [
        head_of(trainer.accelerator.unwrap_model(model))[1]
        for model in (trainer.model, trainer.model if second is None else second)
    ]
    rows = min(len(each.weight) for each in heads)
    return [detached(each._replace(weight=each.weight[:rows])) for each in heads]


def head(model: torch.nn.Module, made: Head) -> Head:
    """Update a checked head's tensors: with PEFT, to those of the active adapter."""
    layer, rows = causal_lm(model).get_output_embeddings(), len(made.weight)
    return made._replace(
        weight=cut(layer.weight, rows), bias=cut(getattr(layer, "bias", None), rows)
    )


def detached(made: Head) -> Head:
    """Return the same head without gradient."""
    return made._replace(
        weight=made.weight.detach(), bias=None if made.bias is None else made.bias.detach()
    )
