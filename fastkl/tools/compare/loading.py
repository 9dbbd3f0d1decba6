"""Checkpoints to last hidden states, and to a head that reproduces the model's logits from them.

A PEFT adapter is not merged into 16-bit weights, which would round a small change away: the layers
run with the adapter unmerged, and an lm_head with an adapter is merged in float32.
"""

import contextlib
import copy
import functools
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils.hub import cached_file, has_file
from transformers.utils.peft_utils import find_adapter_config_file

from fastkl import Head
from fastkl.integrations.transformers import head_of

from ..console import progress
from ..errors import expect, told
from .inputs import TextTokenizer, readable
from .windows import Window

# Elements of a 16-bit weight widened to float32 at a time.
WIDENED = 1 << 24
# Tokens used to detect a model that looks ahead, and the limit on the difference between hidden
# states, relative to the largest, which rounding stays below.
CHECKED_TOKENS, ROUNDING = 64, 1 / 8
# Weight files of a whole model.
WEIGHTS = [
    f"{name}{end}"
    for name in ("model.safetensors", "pytorch_model.bin")
    for end in ("", ".index.json")
]
# Tensors in an adapter's file with one row per token.
ROWS = (
    *("embed_tokens.weight", "lm_head.weight", "wte.weight", "embed_in.weight", "embed_out.weight"),
    *("lm_head.lora_B.weight", "embed_tokens.base_layer.weight", "lm_head.base_layer.weight"),
)


# ---- heads


def head_logits(head: Head, hidden: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Compute float32 logits [n, vocabulary] of hidden [n, H] for the head's first rows, on its
    device.

    16-bit operands are widened to float32, so each elementwise product is exact.
    """
    hidden = hidden.to(head.weight.device).float()
    step = max(1, WIDENED // hidden.shape[1])
    out = torch.cat(
        [
            torch.nn.functional.linear(hidden, rows.float())
            for rows in head.weight[:vocabulary].split(step)
        ],
        -1,
    )
    if head.bias is not None:
        out += head.bias[:vocabulary]
    out *= head.logit_scale
    return out if head.softcap is None else out.div_(head.softcap).tanh_().mul_(head.softcap)


def widened(layer: torch.nn.Module, saved: dict[str, torch.Tensor]) -> Head:
    """Return the float32 head of a layer with an adapter.

    The layer is evaluated on unit vectors, which determines a linear map for any kind of adapter.
    saved: the layer's tensors in the adapter's file, which may be wider than the base's dtype.
    """
    layer = copy.deepcopy(layer).float().eval()
    for own in (layer, *getattr(layer, "modules_to_save", {}).values()):
        own.load_state_dict(saved, strict=False)
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    unit = torch.eye(weight.shape[1], device=weight.device)
    with torch.no_grad():
        bias = layer(torch.zeros_like(unit[:1]))[0]
        for name, parameter in layer.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()  # a difference of sums would round the weight
        return Head(layer(unit).t().contiguous(), bias if bias.any() else None)


# ---- models


class Model:
    """A loaded causal language model and a head that reproduces its logits.

    about: class, dtype, form of the head and bytes of the files, for the report. logits: computes
    logits from hidden states.
    """

    def __init__(self, checkpoint: "Checkpoint | InMemory", model: Any) -> None:
        self.checkpoint, self.device = checkpoint, model.device
        about = {
            "name": readable(checkpoint.name),
            "class": type(model).__name__,
            "dtype": str(model.dtype).removeprefix("torch."),
            "adapter": checkpoint.adapter,
            "bytes": checkpoint.bytes(),
        }
        output = model.get_output_embeddings()
        modules = {module: name for name, module in model.named_modules()}
        own = getattr(output, "base_layer", None) or getattr(output, "original_module", output)
        with contextlib.ExitStack() as restored:
            if model.base_model is model and hasattr(model, "get_decoder"):
                # Llama 4's classes name a submodule that they lack.
                model = getattr(model, "language_model", model)
                restored.callback(setattr, model, "base_model_prefix", model.base_model_prefix)
                model.base_model_prefix = "model"
            if own is not output:
                # Probe with the base layer: an adapter does not change the steps after the GEMM.
                restored.callback(model.set_output_embeddings, output)
                model.set_output_embeddings(own)
            restored.enter_context(
                told(
                    checkpoint.argument,
                    "a model whose lm_head makes its logits",
                    repr(checkpoint.name),
                    "choose another model",
                )
            )
            self.backbone, self.head = head_of(model)
        if own is not output:
            start = f"base_model.model.{modules[output]}."
            saved = {key.removeprefix(start): each for key, each in checkpoint.saved.items()}
            changed = widened(output, saved)
            self.head = self.head._replace(weight=changed.weight, bias=changed.bias)
        self.logits = functools.partial(head_logits, self.head)
        self.about = about | {
            "vocabulary": len(self.head.weight),
            "logit_scale": self.head.logit_scale,
            "logit_softcap": self.head.softcap,
        }

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Compute the last hidden states [n, H] of tokens [n]."""
        ids, more = ids[None].to(self.device), {}
        if self.checkpoint.config.model_type == "paligemma":
            # Attention is bidirectional over the prompt and causal over tokens marked 1.
            more["token_type_ids"] = torch.ones_like(ids)
        return self.backbone(input_ids=ids, use_cache=False, **more).last_hidden_state[0]  # type: ignore[no-any-return]

    def states(self, windows: Sequence[Window], title: str) -> Iterator[torch.Tensor]:
        """Compute each window's last hidden states that score tokens, on the CPU."""
        if windows:
            self.check(windows[0].ids)
        for each in progress(windows, title):
            # Copy: a slice would keep the whole window alive.
            yield self.hidden(each.ids)[each.skip :].to("cpu", copy=True)

    def check(self, ids: torch.Tensor) -> None:
        """Refuse a model that looks ahead."""
        ids = ids[:CHECKED_TOKENS]
        whole, half = (self.hidden(part).float() for part in (ids, ids[: (len(ids) + 1) // 2]))
        expect(
            not ((half - whole[: len(half)]).abs().max() > ROUNDING * whole.abs().max()),
            self.checkpoint.argument,
            "a causal LM",
            f"{self.checkpoint.name!r}, whose logits depend on tokens that follow",
            "choose a model that reads from left to right",
        )


# ---- checkpoints


class Checkpoint:
    """A checkpoint given by folder or hub name, before anything large is loaded.

    letter: the model's in reports; A is the base. source: the folder or name with the model's
    weights, for an adapter those of its base. config: the model's. rows: of its lm_head, or None if
    unknown. adapter: its kind and base, or None. saved: the tensors in the adapter's file.
    """

    def __init__(self, letter: str, name: str) -> None:
        # The tool prints its own messages.
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.letter, self.argument, self.name, self.source = letter, f"MODEL_{letter}", name, name
        self.adapter: dict[str, str] | None = None
        self.saved: dict[str, torch.Tensor] = {}
        with told(
            self.argument,
            "a folder that save_pretrained wrote, or a hub name",
            repr(name),
            "check the name; an adapter needs its base, and pip install peft",
        ):
            if os.path.isfile(name):
                raise ValueError("it is a file; a file with a base's values is MODEL_A alone")
            # A whole model's folder may also hold an adapter.
            whole = any(has_file(name, each) for each in WEIGHTS)
            if not whole and find_adapter_config_file(name) is not None:
                import peft

                config = peft.PeftConfig.from_pretrained(name)
                kind, self.source = config.peft_type.value, str(config.base_model_name_or_path)
                if config.is_prompt_learning:
                    raise ValueError(f"a {kind} changes the input, not a model's weights")
                self.adapter = {"kind": str(kind), "base": readable(self.source)}
                self.saved = peft.load_peft_weights(name, device="cpu")
            self.config = transformers.AutoConfig.from_pretrained(
                self.source, trust_remote_code=False
            )
        self.rows: int | None = max(
            (len(tensor) for key, tensor in self.saved.items() if key.endswith(ROWS)),
            default=getattr(self.config.get_text_config(), "vocab_size", None),
        )

    def tokenizer(self) -> TextTokenizer:
        """Load the model's tokenizer; an adapter without one uses its base's."""
        with told(
            self.argument,
            "a fast tokenizer that can be loaded",
            repr(self.name),
            "save a tokenizer.json there",
        ):
            own = not self.adapter or has_file(self.name, "tokenizer_config.json")
            name, auto = self.name if own else self.source, transformers.AutoTokenizer
            return TextTokenizer(auto.from_pretrained(name, trust_remote_code=False))

    def bytes(self) -> int:
        """Sum the sizes of the weight files; an adapter's count includes its base."""
        whole = Path(cached_file(self.source, "config.json")).parent
        found = [*whole.glob("model*.safetensors")] or [*whole.glob("pytorch_model*.bin")]
        if self.adapter:
            folder = Path(cached_file(self.name, "adapter_config.json")).parent
            found += [*folder.glob("adapter_model.safetensors")] or [
                *folder.glob("adapter_model.*")
            ]
        return sum(file.stat().st_size for file in found)

    def load(self, dtype: str, device: str) -> Model:
        """Load the model, in `dtype` or the dtype of its weights, with any adapter unmerged."""
        # Multimodal models are causal LMs; encoder-decoders have the same suffix and are not.
        images = (self.config.architectures or [""])[0].endswith("ForConditionalGeneration")
        kind = "AutoModelForImageTextToText" if images else "AutoModelForCausalLM"
        with told(self.argument, "a causal LM", repr(self.source), "choose a ...ForCausalLM"):
            model, info = getattr(transformers, kind).from_pretrained(
                self.source, dtype=dtype, output_loading_info=True, trust_remote_code=False
            )
            lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
            if lacking:
                raise ValueError(f"it lacks {len(lacking)} weights, such as {lacking[0]}")
        if self.adapter:  # unmerged
            with (
                told(
                    self.argument,
                    f"an adapter that fits its base model {self.source!r}",
                    repr(self.name),
                    "pass the base that it was trained on",
                ),
                warnings.catch_warnings(),
            ):
                import peft

                warnings.simplefilter("ignore")
                warnings.filterwarnings("error", message="Found missing adapter keys")
                if self.rows not in (None, len(model.get_input_embeddings().weight)):
                    model.resize_token_embeddings(self.rows, mean_resizing=False)
                adapted = peft.PeftModel.from_pretrained(model, self.name, torch_device="cpu")
                model = adapted.get_base_model()
        return Model(self, model.eval().requires_grad_(False).to(device))


class InMemory:
    """A model already loaded by the caller, with its tokenizer; the counterpart of Checkpoint."""

    def __init__(self, letter: str, model: Any, tokenizer: Any) -> None:
        self.letter, self.argument, self._tokenizer = letter, f"MODEL_{letter}", tokenizer
        self.adapter, self.saved = None, dict[str, torch.Tensor]()
        adapters = getattr(model, "peft_config", None) or {}
        for config in adapters.values():
            expect(
                not config.is_prompt_learning,
                self.argument,
                "an adapter of the weights",
                f"a {config.peft_type.value}, which changes the input",
                "compare other models",
            )
            self.adapter = {
                "kind": str(config.peft_type.value),
                "base": readable(str(config.base_model_name_or_path)),
            }
        with told(self.argument, "a causal LM of transformers", type(model).__name__, "pass one"):
            self.model = model.get_base_model() if adapters else model
            self.config, self.device = self.model.config, self.model.device
            self.rows: int | None = len(self.model.get_output_embeddings().weight)
            self.name = str(self.config.name_or_path) or type(self.model).__name__

    def tokenizer(self) -> TextTokenizer:
        """Wrap the tokenizer."""
        with told("tokenizer", "a fast tokenizer", type(self._tokenizer).__name__, "pass one"):
            return TextTokenizer(self._tokenizer)

    def bytes(self) -> int:
        """Sum the bytes of the parameters."""
        return sum(each.nbytes for each in self.model.parameters())

    def load(self, dtype: str, device: str) -> Model:
        """Wrap the model unchanged, on its device."""
        return Model(self, self.model)
