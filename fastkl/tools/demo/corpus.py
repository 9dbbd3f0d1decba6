"""The corpus: the source code of Python's standard library, and a byte-pair encoding trained on it."""

from __future__ import annotations

import dataclasses
import random
import re
import sysconfig
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ..progress import progress
from .settings import Settings

# Tests, other people's packages and generated tables are not the prose of the library.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "ensurepip", "turtledemo", "pydoc_data", "encodings",
                   "idlelib", "__pycache__"}
LARGEST_FILE = 200_000
LEAST_FILES = 40
HELD_OUT = 0.05
END_OF_FILE = "<|endoftext|>"
# Pieces that no token crosses: a line break with the indentation after it, a word, other signs, other white space.
PIECES = r"\n[ ]*| ?\w+| ?[^\s\w]+|\s+"
FILES_PER_BATCH = 16


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token streams [n] int64 on the CPU, of files in a fixed order with END_OF_FILE after each; held_out comes from files not in train."""

    tokenizer: Tokenizer
    files: int
    characters: int
    train: torch.Tensor
    held_out: torch.Tensor

    @property
    def vocabulary(self) -> int:
        """Size of the vocabulary V."""
        return self.tokenizer.get_vocab_size()

    def text(self, tokens: torch.Tensor) -> str:
        """The text of one token sequence [n]."""
        return self.tokenizer.decode(tokens.tolist(), skip_special_tokens=False)

    def tokens_that(self, holds) -> torch.Tensor:
        """bool [V]: True for the tokens whose text satisfies holds(text)."""
        return torch.tensor([holds(self.tokenizer.decode([token], skip_special_tokens=False)) for token in range(self.vocabulary)])


def build_corpus(settings: Settings) -> Corpus:
    """Read the standard library, train the tokenizer on it and encode it."""
    texts = load_texts(settings.corpus_characters)
    tokenizer = train_tokenizer(texts, settings.vocabulary)
    streams = []
    batches = [texts[start:start + FILES_PER_BATCH] for start in range(0, len(texts), FILES_PER_BATCH)]
    for batch in progress(batches, "tokens of the corpus"):
        streams += [encoding.ids for encoding in tokenizer.encode_batch([text + END_OF_FILE for text in batch])]
    split = len(streams) - max(1, round(HELD_OUT * len(streams)))
    train, held_out = (torch.tensor([token for stream in part for token in stream]) for part in (streams[:split], streams[split:]))
    return Corpus(tokenizer, len(texts), sum(map(len, texts)), train, held_out)


def load_texts(characters: int) -> list[str]:
    """Source files of the standard library without comments and docstrings, at most so many characters, in an order that is always the same."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(root.rglob("*.py"))
             if not SKIPPED_FOLDERS & set(path.relative_to(root).parts) and path.stat().st_size <= LARGEST_FILE]
    if len(paths) < LEAST_FILES:
        raise RuntimeError(f"standard library: expected at least {LEAST_FILES} source files, got {len(paths)} in {root}; "
                           f"remedy: run the demo with a Python that was installed with its sources")
    # Shuffled, so that a cap keeps a mixture and the held-out files are like the others; its own generator: the seed must not change the corpus.
    random.Random(0).shuffle(paths)
    texts = []
    for path in paths:
        text = without_comments(path.read_text(encoding="utf-8", errors="replace"))
        if len(text) > characters:
            break
        characters -= len(text)
        texts.append(text)
    return texts


def without_comments(source: str) -> str:
    """Source code without docstrings and comments, nearly always: a small model learns one language sooner than two."""
    source = re.sub(r"^[ \t]*[rRuU]?(\"\"\"|''')[\s\S]*?\1[ \t]*\n", "", source, flags=re.MULTILINE)
    source = re.sub(r"^[ \t]*#.*\n", "", source, flags=re.MULTILINE)
    source = re.sub(r"[ ]+# .*", "", source)
    return re.sub(r"\n{3,}", "\n\n", source)


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of so many tokens (fewer if the texts are too short for that)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PIECES), "isolated"),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END_OF_FILE], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(progress(texts, "BPE tokenizer"), trainer)
    return tokenizer


def windows(stream: torch.Tensor, length: int, count: int, generator: torch.Generator, starts: torch.Tensor | None = None) -> torch.Tensor:
    """Random excerpts of a token stream, [count, length]; starts: the positions to choose from (default: all)."""
    last = stream.numel() - length
    starts = torch.arange(last) if starts is None else starts[starts < last]
    chosen = starts[torch.randint(starts.numel(), (count,), generator=generator)]
    return stream[chosen[:, None] + torch.arange(length)]


def line_starts(corpus: Corpus, stream: torch.Tensor) -> torch.Tensor:
    """Positions in the stream at which a line of code begins: prompts start there."""
    return corpus.tokens_that(lambda text: text.startswith("\n"))[stream].nonzero()[:, 0]
