"""The demo's models as Hugging Face checkpoints, for `fastkl compare` and every other tool that reads those."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save

from ..files import write_whole
from .corpus import END_OF_FILE, Corpus
from .model import LanguageModel
from .settings import Settings

# What the parts of a model and of its blocks are called in a GPT-J checkpoint.
MODEL_NAMES = {"embedding": "transformer.wte", "norm": "transformer.ln_f", "head": "lm_head"}
BLOCK_NAMES = {"norm": "ln_1", "mixed": "attn.out_proj", "up": "mlp.fc_in", "down": "mlp.fc_out"}


def save_checkpoint(model: LanguageModel, corpus: Corpus, settings: Settings, folder: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer into a folder, which is made; each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    end = corpus.tokenizer.token_to_id(END_OF_FILE)
    config = {
        "architectures": ["GPTJForCausalLM"], "model_type": "gptj", "vocab_size": corpus.vocabulary, "n_positions": settings.context,
        "n_embd": settings.width, "n_layer": settings.layers, "n_head": settings.heads, "rotary_dim": settings.width // settings.heads,
        "bos_token_id": end, "eos_token_id": end, "tie_word_embeddings": False, "dtype": "float32",
    }
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_FILE, "model_max_length": settings.context}
    write_whole(folder / "tokenizer.json", corpus.tokenizer.to_str().encode())
    write_whole(folder / "tokenizer_config.json", json.dumps(tokenizer, indent=1).encode())
    write_whole(folder / "model.safetensors", save(weights(model), metadata={"format": "pt"}))
    write_whole(folder / "config.json", json.dumps(config, indent=1).encode())


def weights(model: LanguageModel) -> dict[str, torch.Tensor]:
    """The parameters by the names of a GPT-J checkpoint."""
    parts = {}
    for name, value in model.state_dict().items():
        module, _, parameter = name.rpartition(".")
        if not module.startswith("blocks."):
            parts[f"{MODEL_NAMES[module]}.{parameter}"] = value
            continue
        _, layer, part = module.split(".")
        block = f"transformer.h.{layer}"
        if part == "queries_keys_values":
            parts.update({f"{block}.attn.{letter}_proj.weight": third for letter, third in zip("qkv", value.chunk(3), strict=True)})
        else:
            parts[f"{block}.{BLOCK_NAMES[part]}.{parameter}"] = value
    return {name: value.detach().cpu().contiguous() for name, value in parts.items()}
