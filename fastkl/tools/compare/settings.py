"""What a comparison is asked to do, and the error that says what it cannot take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# At most this many tokens of context where --context is left out.
DEFAULT_CONTEXT = 1024
# A file of this name is none: as an output it is standard output, as a text standard input.
STDOUT = STDIN = Path("-")


@dataclass(frozen=True)
class Settings:
    """The options of the command line; context and overlap None: chosen from the models. html, json: a file, or "-" for stdout.

    text: files, folders, patterns, or "-" for stdin; tokenizer: whose is used for both, "A" or "B"; None: both must agree.
    """

    model_a: str
    model_b: str
    text: tuple[Path, ...]
    by: str = "document"
    top: int = 10
    context: int | None = None
    overlap: int | None = None
    sequential: bool = False
    device: str = "cpu"
    dtype: str = "auto"
    tokenizer: str | None = None
    html: Path | None = None
    json: Path | None = None


class CompareError(Exception):
    """One line: which argument, what was expected, what came, what to do."""

    def __init__(self, argument: str, expected: str, got: str, remedy: str) -> None:
        self.got = got
        super().__init__(" ".join(f"{argument}: expected {expected}, got {got}; remedy: {remedy}".split()))
