"""Checkpoints to what the comparison needs of a model: last hidden states, and a head that turns them into the model's own logits."""

from __future__ import annotations

import itertools
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from . import adapters
from .errors import told
from .settings import CompareError
from .store import readable

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
MODEL, MODEL_REMEDY = "a model folder or a hub name", "pass a folder that save_pretrained wrote, or a name that can be downloaded"
# What models call the constants between head and logits. Whether one multiplies or divides is seen from the model's own logits.
CAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
# Tokens of the first window on which the head is held against the model's own logits, and the largest difference relative to the largest logit:
# far above the rounding of each type, far below a constant that was left out.
CHECKED_TOKENS = 64
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1 / 256, torch.bfloat16: 1 / 32}
# Elements of a 16-bit weight that are widened to float32 at a time.
WIDENED = 1 << 24


@dataclass
class Head:
    """logits = cap·tanh(scale·(hidden @ weightᵀ + bias) / cap), without the tanh where cap is None."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden: torch.Tensor, vocabulary: int) -> torch.Tensor:
        """[n, vocabulary] float32 from hidden [n, H], for the first rows of the weight; 16-bit operands are widened, so each product is exact."""
        hidden, step = hidden.float(), max(1, WIDENED // self.weight.shape[1])
        out = torch.empty(hidden.shape[0], vocabulary, device=hidden.device)
        for low in range(0, vocabulary, step):
            rows = slice(low, min(low + step, vocabulary))
            out[:, rows] = F.linear(hidden, self.weight[rows].float(), None if self.bias is None else self.bias[rows].float())
        return _scaled(out, self.scale, self.cap)


def _scaled(products: torch.Tensor, scale: float, cap: float | None) -> torch.Tensor:
    """In place: what a head makes of its products."""
    products *= scale
    return products if cap is None else products.div_(cap).tanh_().mul_(cap)


def _distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """|a - b|, 0 where both are the same infinity."""
    return torch.where(a == b, 0.0, a - b).abs()


class Model:
    """A loaded causal LM."""

    def __init__(self, argument: str, name: str, model, device: str, adapter: adapters.Adapter | None = None) -> None:
        self.argument, self.name, self.kind, self.device, self._model = argument, name, type(model).__name__, device, model
        self.adapter, self.config, self._body = adapter, model.config.get_text_config(), model.base_model
        if self._body is model and hasattr(model, "get_decoder"):
            # Llama 4 has its layers in a causal LM, with a vision part beside it or without.
            self._body = getattr(model.get_decoder(), "model", model)
        # PaliGemma reads a prompt from both sides and, marked by 1, its own text from left to right.
        self._written = getattr(model.config, "model_type", None) == "paligemma"
        output = model.get_output_embeddings()
        if not isinstance(getattr(output, "weight", None), torch.Tensor) or self._body is model:
            raise self.unsupported("one without an lm_head behind its last hidden states")
        self.dtype = output.weight.dtype
        if any(type(module).__module__.startswith("peft.") for module in output.modules()):
            self.head = Head(*adapters.widened(output, self._saved(output)))
        else:
            self.head = Head(output.weight.detach(), None if getattr(output, "bias", None) is None else output.bias.detach())

    def _saved(self, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The adapter file's tensors of a layer, by their names in it."""
        place = next(name for name, module in self._model.named_modules() if module is layer)
        start = f"base_model.model.{place}."
        weights = {} if self.adapter is None else self.adapter.weights()
        return {key.removeprefix(start): tensor for key, tensor in weights.items() if key.startswith(start)}

    @property
    def vocabulary(self) -> int:
        """Rows of the head."""
        return self.head.weight.shape[0]

    def about(self) -> dict:
        """What a report says of it."""
        adapter = None if self.adapter is None else {"kind": self.adapter.kind, "base": readable(self.adapter.base)}
        return {"name": readable(self.name), "class": self.kind, "dtype": str(self.dtype).removeprefix("torch."), "adapter": adapter,
                "vocabulary": self.vocabulary, "logit_scale": self.head.scale, "logit_softcap": self.head.cap}

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """[n, H], the last hidden states of tokens [n]."""
        return self._body(**self._inputs(ids)).last_hidden_state[0]

    def _inputs(self, ids: torch.Tensor) -> dict:
        ids = ids[None].to(self.device)
        return {"input_ids": ids, "use_cache": False, **({"token_type_ids": torch.ones_like(ids)} if self._written else {})}

    def check(self, ids: torch.Tensor) -> None:
        """Settle the head's scale and cap by the model's own logits of the first tokens; an error where none fit, or the model looks ahead."""
        ids = ids[:CHECKED_TOKENS]
        own = self._logits(ids)
        if own.isnan().any():
            raise CompareError(self.argument, "finite logits", f"NaN from {self.name!r}", "another --dtype")
        if own.shape[1] != self.vocabulary:
            raise self.unsupported(f"{own.shape[1]} logits beside an lm_head of {self.vocabulary} rows")
        allowed = TOLERANCE.get(self.dtype, 1 / 32) * float(own[own.isfinite()].abs().max())
        half = self._logits(ids[:(len(ids) + 1) // 2])
        if _distance(half, own[:len(half)]).max() > 4 * allowed:
            raise CompareError(self.argument, "a causal LM", f"{self.name!r} ({self.kind}), whose logits depend on tokens that follow",
                               "choose a model that reads from left to right")
        products = self.head.logits(self.hidden(ids), self.vocabulary)  # as they are, before scale and cap
        scales = [1.0, *(power for value in self._declared(SCALES) for power in (value, 1 / value))]
        errors = {}
        for scale, cap in itertools.product(scales, [None, *self._declared(CAPS)]):
            distance = _distance(_scaled(products.clone(), scale, cap), own)
            # The best is that of the smallest mean: the largest is rounding, which a scale near 1 does not exceed.
            errors[scale, cap] = float(distance.mean()), float(distance.max())
        self.head.scale, self.head.cap = min(errors, key=errors.__getitem__)
        largest = errors[self.head.scale, self.head.cap][1]
        if not largest <= allowed:
            raise self.unsupported(f"logits off by {largest:.1e} where rounding allows {allowed:.1e}")

    def _logits(self, ids: torch.Tensor) -> torch.Tensor:
        """The model's own."""
        return self._model(**self._inputs(ids)).logits[0].float()

    def _declared(self, names: tuple[str, ...]) -> list[float]:
        """The positive numbers of these names that model and configuration have."""
        values = [getattr(owner, name, None) for name in names for owner in (self._model, self.config, self._body)]
        return [float(value) for value in values if isinstance(value, (int, float)) and value > 0]

    def unsupported(self, got: str) -> CompareError:
        """The error of a model whose logits are not a head's, as `Head` says, of its last hidden states."""
        return CompareError(self.argument, "a model whose logits are lm_head (weight, bias, scale, soft cap) of its last hidden states",
                            f"{got} from {self.name!r} ({self.kind})", "choose another model; this architecture is not supported")


def quiet() -> None:
    """No warnings and bars of transformers: this tool says itself what matters."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def load_config(argument: str, name: str):
    """Load the model's configuration, before anything large; an adapter's is its base's, with its own rows."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    _check_name(argument, name)
    adapter = adapters.find_adapter(argument, name) if Path(name).is_dir() else None
    with told(argument, MODEL, name, MODEL_REMEDY):
        try:
            config = _config(argument, adapter, name)
        except OSError as error:
            # An adapter on the hub has no config.json; without a connection, only the cache can tell.
            offline = isinstance(error.__cause__, LocalEntryNotFoundError)
            if Path(name).is_dir() or offline and not adapters.cached(name):
                raise
            adapter = adapters.find_adapter(argument, name)
            if adapter is None:
                raise
            config = _config(argument, adapter, name)
    _auto_class(argument, name, config)
    _check_folder(argument, adapter.base if adapter else name, "a model folder with weights",
                  ("model.safetensors", "*.safetensors", "*.bin"), "copy them there, too")
    if adapter and (rows := adapters.rows(adapter)):
        config.get_text_config().vocab_size = rows
    return config


def _config(argument: str, adapter: adapters.Adapter | None, name: str):
    """The configuration of this name, or of the adapter's base."""
    from transformers import AutoConfig

    if adapter:
        try:
            _check_name(argument, adapter.base)
        except CompareError as error:
            raise CompareError(argument, f"an adapter whose base model is there, in {name!r}",
                               f"the base {adapter.base!r}: {error.got}",
                               "correct base_model_name_or_path in its adapter_config.json") from None
    return AutoConfig.from_pretrained(adapter.base if adapter else name, trust_remote_code=False)


def _check_name(argument: str, name: str) -> None:
    """Refuse a folder without a model, and a name that is neither a folder nor one of the hub."""
    _check_folder(argument, name, "a model folder", ("config.json", "adapter_config.json"), "pass one that save_pretrained wrote")
    if not Path(name).is_dir() and (Path(name).exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name)):
        raise CompareError(argument, MODEL, f"{name!r}, {'a file' if Path(name).exists() else 'which does not exist'}", MODEL_REMEDY)


def _auto_class(argument: str, name: str, config):
    """Choose the Auto class that loads the checkpoint's own class; models that read images have another."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto

    architecture = (config.architectures or ["CausalLM"])[0]
    known = ((AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
             (AutoModelForImageTextToText, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES))
    for auto, names in known:
        own = names.get(config.model_type, ())
        named = architecture in ((own,) if isinstance(own, str) else own)
        if named or own and architecture.endswith(("CausalLM", "LMHeadModel")):
            return auto
    raise CompareError(argument, "a causal LM", f"{name!r}, a {architecture}", "choose a checkpoint of a ...ForCausalLM")


def load_tokenizer(argument: str, name: str):
    """The model's tokenizer, as transformers loads it; an adapter without one has that of its base."""
    from transformers import AutoTokenizer
    from transformers.utils import has_file

    remedy = "save it there with tokenizer.save_pretrained"
    with told(argument, "a tokenizer that can be loaded", name, remedy):
        adapter = adapters.find_adapter(argument, name)
        if adapter and not any(has_file(name, file) for file in TOKENIZER_FILES):
            name = adapter.base
    _check_folder(argument, name, "a folder with a tokenizer", TOKENIZER_FILES, remedy)
    with told(argument, "a tokenizer that can be loaded", name, remedy):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise CompareError(argument, "a fast tokenizer, which says where in the text its tokens are", f"{type(tokenizer).__name__} of {name!r}",
                           "convert it to a tokenizer.json")
    return tokenizer


def _check_folder(argument: str, name: str, expected: str, files: tuple[str, ...], remedy: str) -> None:
    """An error for a folder that has none of these files, or of a pattern's."""
    if Path(name).is_dir() and not any(any(Path(name).glob(file)) for file in files):
        raise CompareError(argument, expected, f"{name!r}, a folder without {files[0]}", remedy)


def load_model(argument: str, name: str, dtype: str, device: str) -> Model:
    """The model on the device, in `dtype` or that of its checkpoint; an adapter in its base's layers."""
    from transformers import AutoConfig

    with told(argument, "a causal LM that can be loaded", name, "check its files"):
        adapter = adapters.find_adapter(argument, name)
        source = adapter.base if adapter else name
        auto = _auto_class(argument, name, AutoConfig.from_pretrained(source, trust_remote_code=False))
        model, info = auto.from_pretrained(source, dtype=dtype, output_loading_info=True, trust_remote_code=False)
    lacking = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise CompareError(argument, "a causal LM with all its weights", f"{source!r} without {lacking[0]}{more}", "save it as a ...ForCausalLM")
    if adapter:
        model = adapters.applied(model, adapter)
    return Model(argument, name, model.eval().to(device), device, adapter)


def too_few_rows(argument: str, name: str, needed: int, rows: int) -> CompareError:
    """Make the error of an lm_head that lacks tokens."""
    return CompareError(argument, f"an lm_head of at least {needed} rows, for the tokenizer's ids", f"{rows} in {name!r}",
                        "pass the checkpoint that belongs to this tokenizer, or choose --tokenizer")
