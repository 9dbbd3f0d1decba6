"""Adapters of PEFT: which model they change, and the head that a model has with one.

An adapter is not merged into 16-bit weights, where a small change would be rounded away: the layers
compute with the adapter beside them, as PEFT trains them, and the head is widened to float32 before
the adapter is added to it.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from .errors import told
from .settings import CompareError


class Adapter(NamedTuple):
    """An adapter by its folder or hub name, the model that it changes, and PEFT's word for it."""

    argument: str
    name: str
    base: str
    kind: str

    def weights(self) -> dict[str, torch.Tensor]:
        """Load every tensor of its file, by the name that it has there."""
        import peft

        with told(
            self.argument,
            "an adapter that can be loaded",
            self.name,
            "save it again with save_pretrained",
        ):
            return peft.load_peft_weights(self.name, device="cpu")


def cached(name: str, file: str = "adapter_config.json") -> bool:
    """Tell whether the cache of the hub has this file of a repository."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, file), str)


def find_adapter(argument: str, name: str) -> Adapter | None:
    """Find the adapter of this name; None for a whole model, even with an adapter beside it."""
    from transformers.utils.peft_utils import find_adapter_config_file

    folder = Path(name)
    if folder.is_dir():
        whole = [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]
    else:  # a hub name whose config.json was loaded; the hub need not be asked again
        whole = cached(name, "config.json")
    if whole:
        return None
    if find_adapter_config_file(name) is None:
        return None
    if importlib.util.find_spec("peft") is None:
        raise CompareError(
            argument,
            "peft to be installed, for an adapter",
            f"{name!r} without it",
            "pip install peft",
        )
    import peft

    with told(
        argument,
        "an adapter with an adapter_config.json that peft reads",
        name,
        "save it again with save_pretrained",
    ):
        config = peft.PeftConfig.from_pretrained(name)
        kind, base = str(config.peft_type.value), config.base_model_name_or_path
    if config.is_prompt_learning:
        raise CompareError(
            argument,
            "an adapter of a model's weights, such as LORA",
            f"{name!r}, a {kind}",
            "choose one that adds nothing to the input",
        )
    if not isinstance(base, str) or not base:
        raise CompareError(
            argument,
            "an adapter that names its base model",
            f"{base!r} in {name!r}",
            "set base_model_name_or_path in its adapter_config.json",
        )
    return Adapter(argument, name, base, kind)


def rows(adapter: Adapter) -> int | None:
    """Count the rows of the embedding or head in the adapter's file; None where it has neither."""
    ends = (
        "embed_tokens.weight",
        "lm_head.weight",
        "wte.weight",
        "embed_in.weight",
        "embed_out.weight",
        "lm_head.lora_B.weight",
        "embed_tokens.base_layer.weight",
        "lm_head.base_layer.weight",
    )
    return max(
        (len(tensor) for key, tensor in adapter.weights().items() if key.endswith(ends)),
        default=None,
    )


def applied(model, adapter: Adapter):
    """Put the adapter into the base's layers, unmerged; an error where its file does not fit."""
    import peft

    with told(
        adapter.argument,
        f"an adapter that fits its base model {adapter.base!r}",
        adapter.name,
        "pass the base that it was trained on",
    ):
        wanted = rows(adapter)
        if wanted and wanted != model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(wanted, mean_resizing=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return peft.PeftModel.from_pretrained(
                model, adapter.name, torch_device="cpu"
            ).get_base_model()


def widened(
    layer: torch.nn.Module, saved: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (weight [V, H], bias [V] or None) in float32 of a head with an adapter.

    A linear layer is determined by its outputs for unit vectors, whichever adapter it has.
    saved: the layer's tensors in the adapter's file, which may be wider than the base's type.
    """
    layer = copy.deepcopy(layer).float().eval()
    for own in (layer, *getattr(layer, "modules_to_save", {}).values()):
        own.load_state_dict(saved, strict=False)
    weight = layer.weight
    unit = torch.eye(weight.shape[1], device=weight.device)
    with torch.no_grad():
        bias = layer(unit.new_zeros(1, len(unit)))[0]
        for name, parameter in layer.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
        return layer(unit).t().contiguous(), bias if bias.any() else None
