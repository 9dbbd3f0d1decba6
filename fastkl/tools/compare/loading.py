"""Checkpoints to last hidden states, and to a head that makes the model's own logits of them.

A PEFT adapter is not merged into 16-bit weights, which would round a small change away: the layers
compute with the adapter beside them, and the lm_head is widened to float32 with it.
"""

import copy
import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from transformers.utils.hub import cached_file, has_file
from transformers.utils.peft_utils import find_adapter_config_file

from fastkl import Head
from fastkl.integrations.transformers import head_of

from ..console import progress
from ..errors import expect, told
from .inputs import TextTokenizer, readable
from .windows import Window

# Elements of a 16-bit weight that are widened to float32 at a time.
WIDENED = 1 << 24
# Tokens that show whether a model looks ahead, and the difference between hidden states, relative
# to the largest, which rounding does not reach.
CHECKED_TOKENS, ROUNDING = 64, 1 / 8
# Files of a whole model.
WEIGHTS = [
    f"{name}{end}"
    for name in ("model.safetensors", "pytorch_model.bin")
    for end in ("", ".index.json")
]
# Tensors of an adapter's file with a row for each token.
ROWS = (
    *("embed_tokens.weight", "lm_head.weight", "wte.weight", "embed_in.weight", "embed_out.weight"),
    *("lm_head.lora_B.weight", "embed_tokens.base_layer.weight", "lm_head.base_layer.weight"),
)


# ---- heads


def head_logits(head: Head, hidden: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Compute [n, vocabulary] float32 logits of hidden [n, H] for the first rows of the head, on
    its device.

    16-bit operands are widened, so each product is exact.
    """
    hidden = hidden.to(head.weight.device).float()
    step = max(1, WIDENED // hidden.shape[1])
    out = torch.cat(
        [F.linear(hidden, rows.float()) for rows in head.weight[:vocabulary].split(step)], -1
    )
    if head.bias is not None:
        out += head.bias[:vocabulary]
    out *= head.logit_scale
    return out if head.softcap is None else out.div_(head.softcap).tanh_().mul_(head.softcap)


def widened(layer: torch.nn.Module, saved: dict[str, torch.Tensor]) -> Head:
    """Return the float32 head of a layer with an adapter.

    A linear layer is determined by its outputs for unit vectors, whichever adapter it has. saved:
    the layer's tensors in the adapter's file, which may be wider than the base's type.
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
    """A loaded causal language model, and its head, which gives the model's own logits.

    about: for the report, its class, type, the form of its head and the bytes of its files. logits:
    of hidden states, without the layers.
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
        if model.base_model is model and hasattr(model, "get_decoder"):
            # Llama 4's classes name a part that they do not have.
            model = getattr(model, "language_model", model)
            model.base_model_prefix = "model"
        own = getattr(output, "base_layer", None) or getattr(output, "original_module", output)
        if own is not output:
            # The base's layer shows what follows the product, which an adapter does not change.
            model.set_output_embeddings(own)
        with told(
            checkpoint.argument,
            "a model whose lm_head makes its logits",
            repr(checkpoint.name),
            "choose another model",
        ):
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
            # It reads a prompt from both sides and, marked by 1, its own text from left to right.
            more["token_type_ids"] = torch.ones_like(ids)
        output = self.backbone(input_ids=ids, use_cache=False, **more)
        return output.last_hidden_state[0]  # type: ignore[no-any-return]

    def states(self, windows: Sequence[Window], title: str) -> list[torch.Tensor]:
        """Compute the last hidden states that score tokens, of each window, on the CPU."""
        if windows:
            self.check(windows[0].ids)
        return [self.hidden(each.ids)[each.skip :].cpu() for each in progress(windows, title)]

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
    """A checkpoint by its folder or hub name, before anything large is loaded.

    source: where the model's weights are, for an adapter its base's. config: the model's. rows: of
    its lm_head, where the files say so. adapter: its kind and base, or None. saved: the tensors of
    the adapter's file. dtype: once it is loaded.
    """

    def __init__(self, argument: str, name: str) -> None:
        # This tool says itself what matters.
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.argument, self.name, self.source = argument, name, name
        self.adapter: dict[str, str] | None = None
        self.saved: dict[str, torch.Tensor] = {}
        self.dtype = ""
        with told(
            argument,
            "a folder that save_pretrained wrote, or a hub name",
            repr(name),
            "check the name; an adapter needs its base, and pip install peft",
        ):
            # A whole model may have an adapter beside it.
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
        rows = [len(tensor) for key, tensor in self.saved.items() if key.endswith(ROWS)]
        self.rows: int | None = max(
            rows, default=getattr(self.config.get_text_config(), "vocab_size", None)
        )

    def tokenizer(self) -> TextTokenizer:
        """Load the model's tokenizer; an adapter without one has that of its base."""
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
        """Sum the sizes of the files with weights, an adapter's beside its base's."""
        folders = {
            Path(cached_file(name, file)).parent
            for name, file in ((self.source, "config.json"), (self.name, "adapter_config.json"))
            if has_file(name, file)
        }
        files = [file for folder in folders for file in folder.iterdir()]
        found = [file for file in files if file.suffix == ".safetensors"]
        found = found or [file for file in files if file.suffix == ".bin"]
        return sum(file.stat().st_size for file in found)

    def load(self, dtype: str, device: str) -> Model:
        """Load the model, in `dtype` or that of its weights, with an adapter in its layers."""
        # A model of text and images is one; an encoder-decoder's class ends so, too, and is none.
        images = (self.config.architectures or [""])[0].endswith("ForConditionalGeneration")
        kind = "AutoModelForImageTextToText" if images else "AutoModelForCausalLM"
        with told(self.argument, "a causal LM", repr(self.source), "choose a ...ForCausalLM"):
            model, info = getattr(transformers, kind).from_pretrained(
                self.source, dtype=dtype, output_loading_info=True, trust_remote_code=False
            )
            lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
            if lacking:
                raise ValueError(f"it lacks {len(lacking)} weights, such as {lacking[0]}")
        if self.adapter:  # beside the layers, unmerged
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
        loaded = Model(self, model.eval().requires_grad_(False).to(device))
        self.dtype = str(loaded.about["dtype"])
        return loaded


class InMemory:
    """A model that the caller has loaded, with its tokenizer, as Checkpoint is one on disk."""

    adapter, saved = None, dict[str, torch.Tensor]()

    def __init__(self, argument: str, model: Any, tokenizer: Any) -> None:
        base = getattr(model, "get_base_model", lambda: model)()
        self.argument, self.model, self.config = argument, base, base.config
        self.name = getattr(base.config, "_name_or_path", "") or type(base).__name__
        self.rows: int | None = len(base.get_output_embeddings().weight)
        self._tokenizer = tokenizer

    def tokenizer(self) -> TextTokenizer:
        """Wrap the tokenizer."""
        with told(self.argument, "a fast tokenizer", type(self._tokenizer).__name__, "pass one"):
            return TextTokenizer(self._tokenizer)

    def bytes(self) -> int:
        """Sum the bytes of the parameters."""
        return sum(each.nbytes for each in self.model.parameters())

    def load(self, dtype: str, device: str) -> Model:
        """Wrap the model as it is, where it is."""
        return Model(self, self.model)
