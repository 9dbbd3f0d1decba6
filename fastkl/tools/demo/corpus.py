"""The corpus: the source code of Python's standard library, and a byte-pair encoding of it."""

import random
import re
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ..console import progress
from . import Settings

# Skip tests, third-party packages and generated tables.
SKIPPED_FOLDERS = set(
    "test tests idle_test site-packages dist-packages lib2to3 ensurepip turtledemo pydoc_data"
    " encodings idlelib __pycache__".split()
)
LARGEST_FILE = 200_000
LEAST_FILES = 40
HELD_OUT = 0.05
END_OF_FILE = "<|endoftext|>"
REWARDED_WORD = "self"
# Matches nearly all docstrings and comments: a small model learns code faster without English.
REMOVED = (
    (r"^[ \t]*[rRuU]?(\"\"\"|''')[\s\S]*?\1[ \t]*\n", ""),
    (r"^[ \t]*#.*\n", ""),
    (r"[ ]+# .*", ""),
    (r"\n{3,}", "\n\n"),
)
# Tokens do not cross these pieces: a line break with its indentation, a word, punctuation, other
# white space.
PIECES = r"\n[ ]*| ?\w+| ?[^\s\w]+|\s+"


class Corpus(NamedTuple):
    """Token streams [n] int64 on the CPU: texts of files in a fixed order, END_OF_FILE after each.

    held_out and train come from different files. rewarded, new_line: bool [V], True for tokens
    counted by the reward, and for tokens that begin a line.
    """

    tokenizer: Tokenizer
    vocabulary: int
    texts: list[str]
    train: torch.Tensor
    held_out: torch.Tensor
    rewarded: torch.Tensor
    new_line: torch.Tensor

    def text(self, tokens: torch.Tensor) -> str:
        """Decode one token sequence [n]."""
        return str(self.tokenizer.decode(tokens.tolist(), skip_special_tokens=False))


def build_corpus(settings: Settings) -> Corpus:
    """Read the standard library, train a tokenizer on it and encode it."""
    texts = load_texts(settings.corpus_characters)
    tokenizer = train_tokenizer(texts, settings.vocabulary)
    vocabulary = tokenizer.get_vocab_size()
    streams = [code.ids for code in tokenizer.encode_batch([text + END_OF_FILE for text in texts])]
    split = len(streams) - max(1, round(HELD_OUT * len(streams)))
    train, held_out = (
        torch.tensor([token for ids in part for token in ids])
        for part in (streams[:split], streams[split:])
    )
    words = [tokenizer.decode([token], skip_special_tokens=False) for token in range(vocabulary)]
    # A naive proxy for object-oriented code: the frequency of `self` in a sample.
    rewarded = torch.tensor([word.strip() == REWARDED_WORD for word in words])
    new_line = torch.tensor([word.startswith("\n") for word in words])
    return Corpus(tokenizer, vocabulary, texts, train, held_out, rewarded, new_line)


def load_texts(characters: int) -> list[str]:
    """Read source files without comments, at most `characters` in all, always in the same order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [
        path
        for path in sorted(root.rglob("*.py"))
        if not SKIPPED_FOLDERS & set(path.relative_to(root).parts)
        and path.stat().st_size <= LARGEST_FILE
    ]
    if len(paths) < LEAST_FILES:
        raise RuntimeError(
            f"standard library: expected at least {LEAST_FILES} source files, got {len(paths)} in "
            f"{root}; remedy: run the demo with a Python that was installed with its sources"
        )
    # Shuffle, so that the cap keeps a mixture and held-out files resemble the rest. The seed is
    # fixed, so that --seed does not change the corpus.
    random.Random(0).shuffle(paths)
    texts: list[str] = []
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="replace")
        for pattern, replacement in REMOVED:
            text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
        if len(text) > characters:
            break
        characters -= len(text)
        texts.append(text)
    return texts


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer of at most `vocabulary` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        progress(texts, "BPE tokenizer"),
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END_OF_FILE],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return tokenizer


def windows(
    stream: torch.Tensor,
    length: int,
    count: int,
    generator: torch.Generator,
    starting: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw excerpts [count, length] of a token stream.

    starting: bool [V], the tokens at which they may start (default: all).
    """
    last = stream.numel() - length
    starts = torch.arange(last) if starting is None else starting[stream[:last]].nonzero()[:, 0]
    chosen = starts[torch.randint(starts.numel(), (count,), generator=generator)]
    return stream[chosen[:, None] + torch.arange(length)]
