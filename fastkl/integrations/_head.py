"""The Head of a transformers model: its lm_head with the soft cap and scale of its logits."""

import itertools
import math
from typing import Any

import torch

from fastkl import Head
from fastkl._checks import expect

# Names of a soft cap in configs: Gemma's and most others', RecurrentGemma's, xLSTM's.
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Names of a logit scale in configs, and the powers with which model code applies it.
FACTORS = {
    "logit_scale": (1,),  # Cohere
    "lm_head_multiplier": (1,),  # Falcon-H1
    "output_multiplier": (1,),  # Muse
    "logits_scaling": (-1, 1),  # divides in Granite and MiniCPM3, multiplies in HyperCLOVA X
    "logits_mup_width_multiplier": (-1,),  # Inkling
}
BASE_WIDTH = "dim_model_base"  # MiniCPM: hidden_size / dim_model_base divides


def head_of(model: torch.nn.Module) -> tuple[torch.nn.Module, Head]:
    """Split a causal language model into its backbone, which returns hidden states, and its Head.

    Equivalent to

        backbone = model.base_model
        head = Head(model.lm_head.weight, model.lm_head.bias, softcap, logit_scale)

    with softcap and logit_scale such that the Head reproduces the model's logits. The model's
    config names the candidates (final_logit_softcapping, logit_scale, logits_scaling,
    lm_head_multiplier, ...); the model runs on up to four tokens, in eval mode and without
    gradient, and the candidate that reproduces its logits is chosen.

        backbone, head = head_of(model)
        hidden = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        stats = linear_token_stats(hidden[:, :-1], head, ids[:, 1:])

    Args:
        model: a transformers decoder with an lm_head; a multimodal one is run on text only. For a
            PEFT model the weights are those of the active adapter, which may replace the lm_head
            (modules_to_save) but not add to it.

    Returns:
        (backbone, head). The tensors are the model's parameters, in their type, without a copy;
        rows that the model leaves out of its logits are cut. Call head_of again after a resize or a
        change of adapter.

    Raises:
        TypeError: not a model with an lm_head. ValueError: logits that no candidate reproduces, an
            adapter on the lm_head, prompt learning, an encoder-decoder, a packed or sharded weight.
    """
    inner = causal_lm(model)
    name = type(inner).__name__
    layer: Any = getattr(inner, "get_output_embeddings", lambda: None)()
    expect(
        layer is not None,
        "model",
        "a language model of transformers with an lm_head",
        inner,
        "load it with AutoModelForCausalLM",
        TypeError,
    )
    configs = getattr(model, "peft_config", None)
    expect(
        not (
            isinstance(configs, dict)
            and any(config.is_prompt_learning for config in configs.values())
        ),
        "model",
        "hidden states of the tokens alone",
        f"{name} with prompt learning",
        "use LoRA",
    )
    expect(
        not hasattr(layer, "base_layer"),
        "model",
        "an lm_head that is one weight",
        f"{name} with a PEFT adapter on it",
        "take lm_head out of target_modules, name it in modules_to_save, or merge_and_unload()",
    )
    own = "pass hidden states and a Head of your own"
    expect(
        not getattr(inner.config, "is_encoder_decoder", False),
        "model",
        "a decoder",
        f"the encoder-decoder {name}",
        own,
    )
    hidden, logits, types = _own_logits(inner, layer)
    weight, bias = layer.weight, getattr(layer, "bias", None)
    expect(
        hidden is not None,
        "model",
        "a forward that gives the last_hidden_state of base_model to the lm_head",
        f"{name}, whose base_model is the whole model"
        if inner.base_model is inner
        else f"{name}, whose forward does not call base_model",
        f"call the part before the lm_head yourself: {own}",
    )
    width, rows = hidden.shape[-1], logits.shape[-1]
    expect(
        weight.is_floating_point() and weight.shape[1:] == (width,) and len(weight) >= rows,
        "model",
        f"an lm_head.weight [V, {width}] of floats",
        f"{weight.dtype} {tuple(weight.shape)} in {name}",
        f"load it unquantized and unsharded, or {own}",
    )
    weight, bias = cut(weight, rows), cut(bias, rows)
    with torch.no_grad():
        product = torch.nn.functional.linear(
            hidden.to(weight), weight, None if bias is None else bias.to(weight)
        )
    # Two evaluations of the same product differ by a few roundings. 16-bit logits are accurate to
    # 4e-3, and autocast may apply to only one of the two.
    tolerance = 1e-4 if types <= {torch.float32, torch.float64} else 2e-2
    named = _named(inner.config.get_text_config())
    return inner.base_model, Head(weight, bias, *_form(name, product, logits, named, tolerance))


def causal_lm(model: Any) -> Any:
    """Return the model with the lm_head, unwrapped from a PEFT model."""
    return getattr(model, "get_base_model", lambda: model)()


def cut(value: Any, rows: int) -> Any:
    """Cut a weight or bias to `rows`; return the same object, which identifies a shared one, if no
    row is cut.
    """
    return value if value is None or len(value) == rows else value[:rows]


@torch.no_grad()
def _own_logits(model: Any, layer: Any) -> tuple[Any, torch.Tensor, set[torch.dtype]]:
    """Run a few tokens; return (last hidden states or None, logits, types used) of one forward."""
    states, types = [None], {layer.weight.dtype}
    training = {module: module.training for module in model.modules()}
    ids = torch.arange(min(4, len(model.get_input_embeddings().weight)), device=layer.weight.device)
    with (
        model.base_model.register_forward_hook(
            lambda module, args, output: states.append(getattr(output, "last_hidden_state", None))
        ),
        layer.register_forward_hook(lambda module, args, output: types.add(output.dtype)),
    ):
        try:
            logits = model.eval()(input_ids=ids[None], use_cache=False).logits
        finally:
            for module, was in training.items():
                module.training = was
    return states[-1], logits.to(layer.weight.device), types | {logits.dtype}


def _named(config: Any) -> dict[str, float]:
    """Collect the soft caps and logit scales in a config that are positive numbers."""
    found = {name: getattr(config, name, None) for name in (*CAPS, *FACTORS)}
    if isinstance(base := getattr(config, BASE_WIDTH, None), int):
        found[BASE_WIDTH] = base / config.hidden_size
    return {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
    }


def _form(
    name: str,
    product: torch.Tensor,
    logits: torch.Tensor,
    named: dict[str, float],
    tolerance: float,
) -> tuple[float | None, float]:
    """Find (softcap, logit_scale), preferring values named by the config."""
    powers = {**FACTORS, BASE_WIDTH: (1,)}
    scales = {named[name] ** power for name in powers if name in named for power in powers[name]}
    caps = [*(named[name] for name in CAPS if name in named), None]
    product = product.to(torch.promote_types(product.dtype, torch.float32))
    for softcap, group in itertools.product(caps, (sorted(scales), [1.0])):
        made = {scale: product * scale for scale in group}
        if softcap is not None:
            made = {scale: softcap * (own / softcap).tanh() for scale, own in made.items()}
        fitting = [
            (float((own - logits).norm()), scale)
            for scale, own in made.items()
            if (own - logits).abs().max() <= tolerance * logits.abs().max()
        ]
        expect(
            len(fitting) < 2 or logits.any(),
            "model",
            f"logits that tell the factors {group} apart",
            "zeros",
            "pass a Head of your own",
        )
        if fitting:
            return softcap, min(fitting)[1]
    seen = ", ".join(f"{attribute}={value}" for attribute, value in named.items())
    raise ValueError(
        f"model: expected logits that are softcap(logit_scale * F.linear(hidden, lm_head.weight, "
        f"lm_head.bias)), got others from {name}, whose config names "
        f"{seen or 'no soft cap or factor'}; compute with the model's own logits"
    )
