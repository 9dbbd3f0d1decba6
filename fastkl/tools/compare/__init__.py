"""Request of `fastkl compare`: how two versions of a causal language model differ on a text, and
where.

Modules in reading order: this file, inputs (text to tokens), loading (checkpoints to hidden states
and heads), measure (the values of each token, and their figures), report (figures to terminal and
page), run (all of it: load, measure, summarise, report).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# A file of this name is none: standard output as an output, standard input as a text.
STDOUT = STDIN = Path("-")


@dataclass(frozen=True)
class Settings:
    """Options of the command line.

    text: files, or "-" for standard input. context, overlap: None takes them from the models.
    tokenizer: "A" or "B" reads the text for both models; None: both must agree. html, json: a file,
    or "-" for standard output.
    """

    model_a: str
    model_b: str
    text: tuple[Path, ...]
    by: str = "document"
    top: int = 10
    context: int | None = None
    overlap: int | None = None
    device: str = "cpu"
    dtype: str = "auto"
    tokenizer: str | None = None
    html: Path | None = None
    json: Path | None = None
