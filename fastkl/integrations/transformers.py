"""A callback for transformers' Trainer, and every trainer made from it: the controller of beta and the monitor, once per optimizer step; a model's Head."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from fastkl.linear import Head

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState
except ModuleNotFoundError as missing:
    raise ImportError(f"not installed: {missing.name}; remedy: pip install 'fastkl[compare]'") from missing

if TYPE_CHECKING:
    from transformers import Trainer

# Of the steps between two logs: the largest of these, the last of these, the mean of all others.
LARGEST = ("kl/max", "kl/spike")
LAST = ("kl/beta",)


class KLCallback(TrainerCallback, ExportableState):
    """Runs a controller and a monitor once per optimizer step, on the KL of all its micro-batches, and adds their figures to the Trainer's logs.

    Equivalent, at the end of every optimizer step, to

        kl, mask = ...                                              # of the step's micro-batches, one behind the other
        figures = monitor.update(kl, mask, beta=controller.beta)    # on the first process
        controller.update(kl[mask].mean(), unit=controller.unit)    # over all processes; per sequence if the controller's target is
        trainer.log(figures)                                        # with the trainer's own, whenever it logs

    Where the KL comes from:

        KLCallback(controller, monitor)                      # compute_loss calls callback.record(kl, mask) for each micro-batch
        KLCallback(controller, monitor)                      # beside the trainers of fastkl.integrations.trl and gkd, which record theirs
        callback.record(penalty.last["kl"].expand(mask.shape), mask)      # after a KLPenalty, which keeps the mean: for a controller

    and how it gets to the trainer: `callbacks=[callback]`, or after the trainer is made `callback.attach(trainer)`, which puts it before the
    reporters (report_to="wandb", "tensorboard", …) so that the figures reach those too, not only log_history, the progress bar and JSON.

    Args:
        controller: an object with `beta` and `update(kl, unit=)`, as fastkl.rl's. It is updated with n = 1, so a horizon counts optimizer steps.
            A step whose KL is not finite leaves it as it was, with a warning.
        monitor: an object with `update(kl, mask, cu_seqlens=, entropy=, beta=, step=)`, as fastkl.rl.KLMonitor. Only the first process's runs,
            on that process's tokens.

    Logged: the monitor's figures, without a monitor "kl/mean" (nats per token over all processes), and with a controller "kl/beta", the weight
    that the steps had. Between two logs "kl/max" and "kl/spike" are the largest, "kl/beta" is the last, the others are means.

    Calls under torch.no_grad() are not counted, so evaluation changes nothing. The states of controller and monitor are part of the Trainer's
    checkpoints and are loaded on resume_from_checkpoint. Per optimizer step it waits for the device once, and once more with a monitor.

    Raises TypeError or ValueError for wrong arguments; RuntimeError at the end of the first optimizer step if no KL came.
    Source: Ziegler et al., Fine-Tuning Language Models from Human Preferences (2019), section 2.2, for a controller in the loop.
    """

    def __init__(self, controller: object | None = None, monitor: object | None = None) -> None:
        for name, value, needed, example in (("controller", controller, ("beta", "update"), "FixedBeta(0.05)"),
                                             ("monitor", monitor, ("update",), "KLMonitor()")):
            lacking = [attribute for attribute in needed if value is not None and not hasattr(value, attribute)]
            if lacking:
                raise TypeError(f"{name}: expected an object with {' and '.join(needed)}, got {type(value).__name__} without {lacking[0]}; "
                                f"pass one of fastkl.rl's, such as {example}")
        self.controller, self.monitor = controller, monitor
        self.unit = getattr(controller, "unit", "token")
        self._micro_batches: list[tuple] = []
        self._figures: dict[str, tuple[float, int]] = {}
        self._heard = False

    def record(self, kl: torch.Tensor, mask: torch.Tensor | None = None, *, entropy: torch.Tensor | None = None) -> None:
        """Take in a micro-batch: KL per token [..., T] in nats, a bool mask [...] (True where the token counts) and the entropy [...], both optional.

        Detached, nothing copied, nothing waited for: the tensors are kept until the optimizer steps. Raises TypeError or ValueError for others.
        """
        if not isinstance(kl, torch.Tensor) or not kl.is_floating_point() or kl.dim() == 0:
            raise TypeError(f"kl: expected a float tensor of KL per token, [..., T], got {_describe(kl)}; pass it before its mean is taken")
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool):
            raise TypeError(f"mask: expected a bool tensor, True where the token counts, got {_describe(mask)}; convert it with .bool()")
        for name, value in (("mask", mask), ("entropy", entropy)):
            if value is not None and value.shape != kl.shape:
                raise ValueError(f"{name}: expected the shape of kl, {tuple(kl.shape)}, got {_describe(value)}; align the two")
        if torch.is_grad_enabled():
            mask = torch.ones_like(kl, dtype=torch.bool) if mask is None else mask
            self._micro_batches.append((kl.detach(), mask, None if entropy is None else entropy.detach()))

    def attach(self, trainer: Trainer) -> KLCallback:
        """Make this the trainer's first callback, wherever it was, and return it; the trainers of this package must know it when they are made."""
        if getattr(trainer, "kl_callback", self) is not self:
            raise ValueError(f"trainer: expected one that takes its KLCallback later, got a {type(trainer).__name__}; "
                             f"pass callbacks=[callback] when it is made")
        others = trainer.callback_handler.callbacks
        trainer.callback_handler.callbacks = [self, *(callback for callback in others if callback is not self)]
        return self

    # ---- what Trainer calls

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Load the states that a checkpoint brought."""
        if args.restore_callback_states_from_checkpoint:
            raise ValueError("restore_callback_states_from_checkpoint: expected False with a KLCallback, got True, which would replace it by one "
                             "without controller and monitor; it restores their states by itself")
        self._micro_batches, self._figures, self._heard = [], {}, False
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if isinstance(saved, list):
            raise ValueError(f"callbacks: expected one KLCallback, got {len(saved)}; one takes both a controller and a monitor")
        if state.global_step > 0:
            for part, values in saved["attributes"].items():
                self._restore(part, values)

    def _restore(self, part: str, values: dict | None) -> None:
        """Load the state of the controller or the monitor from a checkpoint."""
        if values is None:
            return
        if getattr(self, part) is None:
            warnings.warn(f"KLCallback: the checkpoint holds the state of a {part}, this callback has none: the state is dropped", stacklevel=2)
            return
        try:
            getattr(self, part).load_state_dict(values)
        except ValueError as error:
            raise ValueError(f"KLCallback({part}=...): the checkpoint's {part} was another: {error}; resume with that one, or start anew without "
                             f"resume_from_checkpoint") from error

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Update monitor and controller with what the optimizer step's micro-batches left."""
        if not self._micro_batches:
            if not self._heard:
                raise RuntimeError("KLCallback: expected a KL in the first optimizer step, got none; call callback.record(kl, mask) from "
                                   "compute_loss, or use a trainer of fastkl.integrations.trl or gkd")
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
            figures = self._monitored(beta, state.global_step) if state.is_world_process_zero else {}
        if beta is not None:
            figures["kl/beta"] = beta
            count = tokens if self.unit == "token" else sequences
            if count and math.isfinite(kl):
                self.controller.update(kl / count, unit=self.unit)
            elif count:
                warnings.warn(f"KLCallback: expected a finite KL in optimizer step {state.global_step}, got {kl}; beta stays {beta:g}", stacklevel=2)
        self._remember(figures)
        self._micro_batches = []

    def on_log(self, args, state, control, logs=None, model=None, **kwargs) -> None:
        """Add the figures since the last log to the entry that Trainer has just made, and to what the callbacks after this one get."""
        # The summary at the end is training's, even after an evaluation.
        of_evaluation = model is not None and not model.training and "train_runtime" not in (logs or {})
        if logs is None or of_evaluation:
            return
        figures = {name: value if name in LARGEST + LAST else value / steps for name, (value, steps) in self._figures.items()}
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(figures)
        self._figures = {}

    def state(self) -> dict[str, dict]:
        """What Trainer writes to a checkpoint's trainer_state.json."""
        parts = {"controller": self.controller, "monitor": self.monitor}
        return {"args": {}, "attributes": {name: part.state_dict() if hasattr(part, "state_dict") else None for name, part in parts.items()}}

    # ---- the figures of a step

    def _remember(self, figures: dict[str, float]) -> None:
        """Take the figures of a step into those since the last log, unless they are NaN."""
        for name, value in figures.items():
            if not math.isnan(value):
                before, steps = self._figures.get(name, (value if name in LARGEST else 0.0, 0))
                self._figures[name] = max(before, value) if name in LARGEST else value if name in LAST else before + value, steps + 1

    def _totals(self) -> torch.Tensor:
        """[sum of KL, tokens, sequences] of the step in this process."""
        return torch.stack([torch.stack([torch.where(mask, kl, 0.0).sum(dtype=torch.float32), mask.sum(dtype=torch.float32),
                                         mask.any(-1).sum(dtype=torch.float32)]) for kl, mask, _ in self._micro_batches]).sum(0)

    def _monitored(self, beta: float | None, step: int) -> dict[str, float]:
        """The monitor's figures of the micro-batches as one varlen batch, named for the Trainer's logs."""
        kls, masks, entropies = zip(*self._micro_batches, strict=True)
        ends = itertools.accumulate(kl.numel() for kl in kls)
        # Made where the KL is: a copy from here would wait for all that the device still has to do.
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64, device=kls[0].device),
                                *(torch.arange(end - kl.numel() + kl.shape[-1], end + 1, kl.shape[-1], device=kl.device)
                                  for kl, end in zip(kls, ends, strict=True) if kl.numel())])
        entropy = None if None in entropies else torch.cat([value.reshape(-1) for value in entropies])
        figures = self.monitor.update(torch.cat([kl.reshape(-1) for kl in kls]), torch.cat([mask.reshape(-1) for mask in masks]),
                                      cu_seqlens=cu_seqlens, entropy=entropy, beta=beta, step=step)
        return {name if name.startswith("kl/") else f"kl/{name}": value for name, value in figures.items() if name != "step"}


def _describe(value: object) -> str:
    return f"a {value.dtype} tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


# ---- the lm_head of a model

# How configurations name a factor of the logits, and the powers with which model code applies it.
FACTORS = {
    "logit_scale": (1,),  # Cohere
    "lm_head_multiplier": (1,),  # Falcon-H1
    "output_multiplier": (1,),  # Muse
    "logits_scaling": (-1, 1),  # divides in Granite and MiniCPM3, multiplies in HyperCLOVA X
    "logits_mup_width_multiplier": (-1,),  # Inkling
}
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM


def head_of(model: torch.nn.Module) -> tuple[torch.nn.Module, Head]:
    """Take a causal language model apart: the backbone that gives hidden states, and the Head that makes logits of them.

    Equivalent to

        backbone, weight, bias = model.base_model, model.lm_head.weight, model.lm_head.bias
        head = Head(weight, bias, softcap, logit_scale)       # the last two as the model's config and code have them

    so that linear_token_stats(backbone(ids).last_hidden_state, head, tokens) is token_stats(model(ids).logits, tokens). Which soft cap and
    which factor those are is read off the model's own logits: two to four tokens go through it once, in eval mode and without gradient, and
    every candidate that its config names (final_logit_softcapping, logit_scale, logits_scaling, lm_head_multiplier, ...) is held against them.

        backbone, head = head_of(model)
        hidden = backbone(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
        kl = linear_kl_divergence(hidden, head, ref_hidden, head_of(reference)[1])

    Args:
        model: a decoder of transformers with an lm_head, a multimodal one with text alone included, or a PEFT model of one: then its weights
            are those of the adapter that is active, and modules_to_save may name the lm_head.

    Returns:
        (backbone, head). The head's tensors are the model's parameters, not copies, in their type. They are cut to the model's logits where
        those leave out rows of a padded weight. Call it again after the weights were replaced, by a resize or another adapter.

    Raises:
        TypeError: not a model with an lm_head. ValueError: logits that are not of Head's form, an adapter on the lm_head, prompt learning,
        an encoder-decoder, a weight that is packed or sharded.
    """
    inner = causal_lm(model)
    if not callable(getattr(inner, "get_output_embeddings", None)) or inner.get_output_embeddings() is None:
        raise TypeError(f"model: expected a language model of transformers with an lm_head, got {type(inner).__name__}; "
                        f"load it with AutoModelForCausalLM")
    layer, text, name = inner.get_output_embeddings(), inner.config.get_text_config(), type(inner).__name__
    configs = getattr(model, "peft_config", None) or {}
    if isinstance(configs, dict) and any(config.is_prompt_learning for config in configs.values()):
        raise ValueError("model: expected hidden states of the tokens alone, got a PEFT model with prompt learning; use LoRA")
    if hasattr(layer, "base_layer"):
        raise ValueError(f"model: expected an lm_head that is one weight, got {name} with a PEFT adapter on it, which the weight leaves out; "
                         f"take lm_head out of target_modules, name it in modules_to_save, or merge the adapter with merge_and_unload()")
    if getattr(inner.config, "is_encoder_decoder", False):
        raise ValueError(f"model: expected a decoder, got the encoder-decoder {name}; pass its decoder's hidden states and lm_head yourself")
    weight, bias = layer.weight, getattr(layer, "bias", None)
    hidden, logits, dtypes = _own_logits(inner, layer)
    if hidden is None:
        raise ValueError(f"model: expected one whose forward runs its base_model for the last hidden states, got {name}, which does not; "
                         f"pass hidden states and a Head yourself")
    if not weight.is_floating_point() or weight.shape[1:] != hidden.shape[-1:] or len(weight) < logits.shape[-1]:
        raise ValueError(f"model: expected an lm_head.weight [V, {hidden.shape[-1]}] of floats, got {weight.dtype} {tuple(weight.shape)} in {name}; "
                         f"load it unquantized and unsharded, or pass hidden states and a Head yourself")
    weight, bias = cut(weight, logits.shape[-1]), cut(bias, logits.shape[-1])
    named = {attribute: value for attribute in (*CAPS, *FACTORS, "dim_model_base")
             if isinstance(value := getattr(text, attribute, None), (int, float)) and not isinstance(value, bool) and 0 < value < math.inf}
    # The same product twice differs by a few roundings; 16-bit logits are right to 4e-3, and autocast may be at work in one of the two alone.
    tolerance = 1e-4 if dtypes <= {torch.float32, torch.float64} else 2e-2
    with torch.no_grad():
        raw = F.linear(hidden.to(weight), weight, None if bias is None else bias.to(weight))
        form = _form(raw, logits, named, text, tolerance)
    if form is None:
        seen = ", ".join(f"{attribute}={value}" for attribute, value in named.items()) or "no soft cap or factor"
        raise ValueError(f"model: expected logits that are softcap(logit_scale * F.linear(last hidden state, lm_head.weight, lm_head.bias)), got "
                         f"others from {name}, whose config names {seen}; use the model's own logits")
    return inner.base_model, Head(weight, bias, *form)


def causal_lm(model: torch.nn.Module) -> torch.nn.Module:
    """The model with the lm_head, inside a PEFT model."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def cut(value: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    """The first rows of a weight or bias; the same tensor where that is all of them, since a shared one is known by identity."""
    return value if value is None or len(value) == rows else value[:rows]


@torch.no_grad()
def _own_logits(model: torch.nn.Module, layer: torch.nn.Module) -> tuple:
    """(last hidden states or None, logits, types at work) of a few tokens in eval mode, from one forward."""
    states, made = [], []
    hooks = [model.base_model.register_forward_hook(lambda module, args, output: states.append(getattr(output, "last_hidden_state", None))),
             layer.register_forward_hook(lambda module, args, output: made.append(output.dtype))]
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        ids = torch.arange(min(4, model.get_input_embeddings().weight.shape[0]), device=layer.weight.device)[None]
        logits = model(input_ids=ids, use_cache=False).logits.to(layer.weight.device)
    finally:
        for hook in hooks:
            hook.remove()
        for module, was in training.items():
            module.training = was
    return states[-1] if states else None, logits, {layer.weight.dtype, logits.dtype, *made}


def _form(raw: torch.Tensor, logits: torch.Tensor, named: dict, text, tolerance: float) -> tuple[float | None, float] | None:
    """(softcap, logit_scale) with which a product gives the logits, those that the config names before others; None if there are none."""
    caps = [*(named[attribute] for attribute in CAPS if attribute in named), None]
    scales = {float(named[attribute]) ** power for attribute, powers in FACTORS.items() if attribute in named for power in powers}
    if "dim_model_base" in named:
        scales.add(named["dim_model_base"] / text.hidden_size)  # MiniCPM
    wide = raw.to(torch.promote_types(raw.dtype, torch.float32))
    for softcap, group in itertools.product(caps, (sorted(scales), [1.0])):
        found = []
        for scale in group:
            difference = (wide * scale if softcap is None else softcap * torch.tanh(wide * scale / softcap)) - logits
            if difference.abs().max() <= tolerance * logits.abs().max():
                found.append((float(difference.norm()), scale))
        if len(found) > 1 and not logits.any():
            raise ValueError(f"model: expected logits that show how its config's factor acts on them ({group}), got zeros alone; pass a Head yourself")
        if found:
            return softcap, min(found)[1]
    return None
