"""Checkpoints to what the comparison needs of a model: last hidden states, and a head that turns them into the model's own logits."""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from .settings import CompareError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
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
        out *= self.scale
        return out if self.cap is None else out.div_(self.cap).tanh_().mul_(self.cap)


class Model:
    """A loaded causal LM."""

    def __init__(self, argument: str, name: str, model, device: str) -> None:
        self.argument, self.name, self.device, self._model = argument, name, device, model
        self.config = model.config.get_text_config()
        output = model.get_output_embeddings()
        if not isinstance(getattr(output, "weight", None), torch.Tensor) or model.base_model is model:
            raise self.unsupported("one without an lm_head behind its last hidden states")
        self.head = Head(output.weight.detach(), None if getattr(output, "bias", None) is None else output.bias.detach())

    @property
    def vocabulary(self) -> int:
        """Rows of the head."""
        return self.head.weight.shape[0]

    def about(self) -> dict:
        """What a report says of it."""
        return {"name": self.name, "class": type(self._model).__name__, "dtype": str(self.head.weight.dtype).removeprefix("torch."),
                "vocabulary": self.vocabulary, "logit_scale": self.head.scale, "logit_softcap": self.head.cap}

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """[n, H], the last hidden states of tokens [n]."""
        return self._model.base_model(input_ids=ids[None].to(self.device), use_cache=False).last_hidden_state[0]

    def check(self, ids: torch.Tensor) -> None:
        """Settle the head's scale and cap by the model's own logits of the first tokens; an error where none fit, or the model looks ahead."""
        ids, head = ids[:CHECKED_TOKENS], self.head
        own = self._model(input_ids=ids[None].to(self.device), use_cache=False).logits[0].float()
        if own.isnan().any():
            raise CompareError(self.argument, "finite logits", f"NaN from {self.name!r}", "another --dtype")
        if own.shape[1] != self.vocabulary:
            raise self.unsupported(f"{own.shape[1]} logits beside an lm_head of {self.vocabulary} rows")
        allowed = TOLERANCE.get(head.weight.dtype, 1 / 32) * float(own[own.isfinite()].abs().max())

        def error(hidden: torch.Tensor) -> float:
            made, true = head.logits(hidden, self.vocabulary), own[:len(hidden)]
            return float(torch.where(made == true, 0.0, made - true).abs().max())

        hidden, errors = self.hidden(ids), []
        scales = [power for value in self._declared(SCALES) for power in (value, 1 / value)]
        for head.scale, head.cap in itertools.product([*scales, 1.0], [*self._declared(CAPS), None]):
            errors.append(error(hidden))
            if errors[-1] <= allowed:
                break
        else:
            raise self.unsupported(f"logits off by {min(errors):.1e} where rounding allows {allowed:.1e}")
        if error(self.hidden(ids[:(len(ids) + 1) // 2])) > 4 * allowed:
            raise CompareError(self.argument, "a causal LM", f"{self.name!r}, whose logits depend on tokens that follow", "choose another model")

    def _declared(self, names: tuple[str, ...]) -> list[float]:
        """The positive numbers of these names that model and configuration have."""
        found = [getattr(place, name, None) for name in names for place in (self._model, self.config, self._model.base_model)]
        return [float(value) for value in found if isinstance(value, (int, float)) and value > 0]

    def unsupported(self, got: str) -> CompareError:
        """The error of a model whose logits are not a head's, as `Head` says, of its last hidden states."""
        return CompareError(self.argument, "a model whose logits are lm_head (weight, bias, scale, soft cap) of its last hidden states",
                            f"{got} from {self.name!r} ({type(self._model).__name__})", "choose another model; this architecture is not supported")


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def quiet() -> None:
    """No warnings and bars of transformers: this tool says itself what matters."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def load_config(argument: str, name: str):
    """The model's configuration, before anything large is read."""
    from transformers import AutoConfig

    if Path(name).is_dir():
        if not any((Path(name) / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise CompareError(argument, "a model folder", f"{name!r}, a folder without config.json", "pass one that save_pretrained wrote")
    elif Path(name).exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        got = f"{name!r}, {'a file' if Path(name).exists() else 'which does not exist'}"
        raise CompareError(argument, "a model folder or a hub name", got, "pass a folder that save_pretrained wrote")
    with _loading(argument, "a model folder or a hub name", name, "pass a folder that save_pretrained wrote, or a name that can be downloaded"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    made_for = (config.architectures or ["CausalLM"])[0]
    if not made_for.endswith(("CausalLM", "LMHeadModel", "ForConditionalGeneration")):
        raise CompareError(argument, "a causal LM", f"{name!r}, a {made_for}", "choose a checkpoint of a ...ForCausalLM")
    return config


def load_tokenizer(argument: str, name: str):
    """The model's tokenizer, as transformers loads it."""
    from transformers import AutoTokenizer

    remedy = "save it there with tokenizer.save_pretrained"
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in TOKENIZER_FILES):
        raise CompareError(argument, "a folder with a tokenizer", f"{name!r} without {TOKENIZER_FILES[0]}", remedy)
    with _loading(argument, "a tokenizer that can be loaded", name, remedy):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def check_tokenizers(a, b) -> int:
    """One more than the largest token id; an error where the two map tokens to other ids."""
    first, second = a.get_vocab(), b.get_vocab()
    if first == second:
        return max(first.values()) + 1
    found = []
    moved = sorted((first[token], token) for token in first.keys() & second.keys() if first[token] != second[token])
    if moved:
        found.append(f"{len(moved):,} with another id ({moved[0][1]!r}: {moved[0][0]} in A, {second[moved[0][1]]} in B)")
    for here, there, name in ((first, second, "A"), (second, first, "B")):
        only = sorted((here[token], token) for token in here.keys() - there.keys())
        if only:
            found.append(f"{len(only):,} only in {name} ({', '.join(f'{token!r}: {at}' for at, token in only[:2])})")
    raise CompareError("MODEL_B", "the tokenizer of MODEL_A", f"another; tokens: {', '.join(found)}", "compare models of one vocabulary")


def load_model(argument: str, name: str, dtype: str, device: str) -> Model:
    """The model on the device, in `dtype` or that of its checkpoint."""
    from transformers import AutoModelForCausalLM

    with _loading(argument, "a causal LM that can be loaded", name, "check its files"):
        model, info = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True, trust_remote_code=False)
    lacking = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise CompareError(argument, "a causal LM with all its weights", f"{name!r} without {lacking[0]}{more}", "save it as a ...ForCausalLM")
    return Model(argument, name, model.eval().to(device), device)


@contextlib.contextmanager
def _loading(argument: str, expected: str, name: str, remedy: str) -> Iterator[None]:
    """Whatever a broken file, a missing network or an unknown architecture raises, in one line."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".:")
        raise CompareError(argument, expected, f"{name!r}: {said}", remedy) from None
