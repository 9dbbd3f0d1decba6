"""Files with a base model's last hidden states, to compare candidates without loading the base."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
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

# Metadata entry: the file's format and version.
FORMAT = {"fastkl.reference": "1"}


class Text(NamedTuple):
    """Documents, the names of their files, and how they are cut into windows."""

    files: list[str]
    documents: list[Document]
    scheme: Scheme


def save_reference(
    path: Path,
    text: Text,
    tokenizer: TextTokenizer,
    windows: Sequence[Window],
    model: Model,
    states: Sequence[torch.Tensor],
) -> None:
    """Write a base's hidden states of all windows, its head, tokenizer and text, atomically."""
    tensors = {
        "hidden": torch.cat([*states]),
        "rows": torch.cat([each.first + torch.arange(len(each.tokens)) for each in windows]),
        "tokens": torch.cat([each.tokens for each in windows]),
        "weight": model.head.weight,
    }
    if model.head.bias is not None:
        tensors["bias"] = model.head.bias
    described = json.dumps({"about": model.about, **text._asdict()})
    write_whole(
        path,
        partial(
            safetensors.torch.save_file,
            {name: each.detach().cpu().contiguous() for name, each in tensors.items()},
            metadata=FORMAT
            | {"described": described, "tokenizer": tokenizer.own.backend_tokenizer.to_str()},
        ),
    )


class ReferenceFile:
    """A base model given by a file of save_reference; the counterpart of Checkpoint."""

    def __init__(self, letter: str, name: str) -> None:
        self.letter, self.argument, self.name = letter, f"MODEL_{letter}", name
        with told(
            self.argument,
            "a file that --save-reference wrote",
            repr(name),
            "pass such a file, a model's folder or a hub name",
        ):
            with safetensors.safe_open(name, "pt") as file:
                self.metadata = file.metadata() or {}
            if not FORMAT.items() <= self.metadata.items():
                raise ValueError(f"its metadata have no {FORMAT}")
            self.tensors = safetensors.torch.load_file(name)
            described = json.loads(self.metadata["described"])
            self.about: dict[str, Any] = described["about"]
            self.text = Text(
                described["files"],
                [Document(*each) for each in described["documents"]],
                Scheme(*described["scheme"]),
            )
        self.rows = len(self.tensors["weight"])

    def tokenizer(self) -> TextTokenizer:
        """Restore the base's tokenizer."""
        return TextTokenizer(
            transformers.PreTrainedTokenizerFast(
                tokenizer_object=tokenizers.Tokenizer.from_str(self.metadata["tokenizer"])
            )
        )

    def load(self, dtype: str, device: str) -> "ReferenceFile":
        """Move the head to the device."""
        self.logits = partial(
            head_logits,
            Head(
                self.tensors["weight"].to(device),
                self.tensors["bias"].to(device) if "bias" in self.tensors else None,
                self.about["logit_softcap"],
                self.about["logit_scale"],
            ),
        )
        return self

    def states(self, windows: Sequence[Window], title: str) -> Iterator[torch.Tensor]:
        """Look up the hidden states of each window."""
        rows = self.tensors["rows"].numpy()
        for window in windows:
            at = int(np.searchsorted(rows, window.first))
            mine = slice(at, at + len(window.tokens))
            expect(
                torch.equal(self.tensors["tokens"][mine], window.tokens),
                self.argument,
                "the tokens that the installed tokenizers makes of the file's text",
                f"others in {self.name!r}",
                "write it anew with --save-reference",
            )
            yield self.tensors["hidden"][mine]
