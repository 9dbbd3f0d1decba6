"""Files of a base model's last hidden states, against which candidates are compared without it.

A float type's hidden states take H values a token, logits V: for H = 4096 and V = 128256, 31 times
as many. The lm_head, the tokenizer and the text are in the file, too.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import tokenizers
import torch
import transformers

from fastkl import Head

from ..errors import expect, told
from ..files import write_whole
from .inputs import Document, TextTokenizer
from .loading import Model, head_logits
from .windows import Scheme, Window

# The key of the file's metadata, and its version.
FORMAT = {"fastkl.reference": "1"}


class Text(NamedTuple):
    """What is compared on: files and documents, and how windows are cut from them."""

    files: list[str]
    documents: list[Document]
    scheme: Scheme


def save_reference(
    path: Path,
    text: Text,
    tokenizer: TextTokenizer,
    model: Model,
    windows: Sequence[Window],
    states: Sequence[torch.Tensor],
) -> None:
    """Write a base's hidden states of all windows, whole or not at all."""
    described = {
        "about": model.about,
        "files": text.files,
        "documents": text.documents,
        "scheme": text.scheme,
    }
    tensors = {
        "hidden": torch.cat([*states]),
        "places": torch.cat([each.first + torch.arange(len(each.tokens)) for each in windows]),
        "tokens": torch.cat([each.tokens for each in windows]),
        "weight": model.head.weight,
        "about": _bytes(json.dumps(described)),
        "tokenizer": _bytes(tokenizer.own.backend_tokenizer.to_str()),
    }
    if model.head.bias is not None:
        tensors["bias"] = model.head.bias
    saved = {name: each.detach().cpu().contiguous().clone() for name, each in tensors.items()}
    write_whole(path, safetensors.torch.save(saved, FORMAT))


def _bytes(text: str) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(text.encode(), np.uint8).copy())


class ReferenceFile:
    """A base model by the file that save_reference wrote, as Checkpoint is one by its folder."""

    adapter = None

    def __init__(self, argument: str, name: str) -> None:
        self.argument, self.name = argument, name
        with told(
            argument,
            "a file that --save-reference wrote",
            repr(name),
            "pass such a file, a model's folder or a hub name",
        ):
            with safetensors.safe_open(name, "pt") as file:
                if file.metadata() != FORMAT:
                    raise ValueError(f"its metadata are {file.metadata()}")
            self.tensors = safetensors.torch.load_file(name)
            self.about: dict[str, Any] = json.loads(self._text("about"))
            self.text = Text(
                self.about["files"],
                [Document(*each) for each in self.about["documents"]],
                Scheme(*self.about["scheme"]),
            )
        self.rows = len(self.tensors["weight"])
        self.config = SimpleNamespace(get_text_config=dict)

    def _text(self, name: str) -> str:
        return self.tensors[name].numpy().tobytes().decode()

    def tokenizer(self) -> TextTokenizer:
        """Restore the base's tokenizer."""
        made = tokenizers.Tokenizer.from_str(self._text("tokenizer"))
        return TextTokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=made))

    def load(self, dtype: str, device: str) -> "ReferenceFile":
        """Put the head on the device."""
        about = self.about["about"]
        head = Head(
            self.tensors["weight"].to(device),
            self.tensors["bias"].to(device) if "bias" in self.tensors else None,
            about["logit_softcap"],
            about["logit_scale"],
        )
        self.about, self.logits = about, partial(head_logits, head)
        return self

    def states(self, windows: Sequence[Window], title: str) -> list[torch.Tensor]:
        """Look up the hidden states of each window."""
        places, found = self.tensors["places"].numpy(), []
        for window in windows:
            at = int(np.searchsorted(places, window.first))
            rows = slice(at, at + len(window.tokens))
            expect(
                torch.equal(self.tensors["tokens"][rows], window.tokens),
                self.argument,
                "the tokens that this version of tokenizers makes of its text",
                f"others in {self.name!r}",
                "write it anew with --save-reference",
            )
            found.append(self.tensors["hidden"][rows])
        return found
