"""Windows: the tokens that a model reads at a time, and the tokens that each window scores."""

import math
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch

from ..errors import expect

# Default of --window, in tokens, by --score.
WINDOWS = {"all": 1024, "second-half": 512}


class Scheme(NamedTuple):
    """How a text is cut: tokens per window, stride between window starts, tokens scored."""

    window: int
    stride: int
    score: str


class Window(NamedTuple):
    """Tokens that a model reads at once, and the tokens scored.

    ids: [n], the tokens read. skip: leading states that score nothing. tokens: [n - skip], the
    tokens that follow the other states. first: row of tokens[0] in the table of all tokens, where
    the scored tokens are consecutive.
    """

    ids: torch.Tensor
    skip: int
    tokens: torch.Tensor
    first: int


def longest(configs: Iterable[Any]) -> int:
    """Return the number of tokens that every model can read at once."""
    limits = [
        getattr(config.get_text_config(), "max_position_embeddings", None) for config in configs
    ]
    return min([each for each in limits if isinstance(each, int) and each > 0], default=1 << 60)


def choose_scheme(settings: Namespace, limit: int) -> Scheme:
    """Choose window, stride and tokens scored; limit: tokens that every model can read at once."""
    score = settings.score or ("second-half" if settings.format == "llama.cpp" else "all")
    window = settings.window or min(WINDOWS[score], limit)
    if score == "all":
        least, most, stride = 1, window, settings.stride or window - window // 4
    else:
        # A shorter stride would score tokens twice.
        least, most, stride = window - 1 - window // 2, math.inf, settings.stride or window
    expect(
        least <= stride <= most,
        "--stride",
        f"{least} tokens or more, at most --window ({window})"
        if score == "all"
        else f"at least the {least} tokens that a window of {window} scores",
        str(stride),
        "another --stride, or another --window",
    )
    return Scheme(window, stride, score)


def cut(first: int, count: int, scheme: Scheme) -> Iterator[tuple[int, int, int]]:
    """Yield (start, first, last): reading start … last - 2 gives distributions of first … last - 1.

    "all": every token from `first` to `count` - 1 is scored in exactly one window, with at least
    window - stride tokens before it, if there are that many. "second-half": windows of full length,
    with the tokens after the middle scored.
    """
    window, stride, score = scheme
    if score == "second-half":
        for start in range(0, count - window + 1, stride):
            yield start, start + window // 2 + 1, start + window
        return
    start = 0
    while first < count:
        last = min(start + window + 1, count)
        yield start, first, last
        start, first = last - 1 - (window - stride), last


def windows_of(
    documents: Sequence[pd.DataFrame], scheme: Scheme, prefix: Sequence[int]
) -> list[Window]:
    """Cut documents into windows.

    In a "second-half" window the first token is replaced by the first token of `prefix`, if any.
    """
    found, place = [], 0
    for document in documents:
        ids, unscored = torch.tensor(document["id"].to_numpy()), int((~document["scored"]).sum())
        for start, first, last in cut(unscored, len(ids), scheme):
            read = ids[start : last - 1]
            if scheme.score == "second-half" and prefix:
                read = torch.cat([read.new_tensor(prefix[:1]), read[1:]])
            found.append(Window(read, first - 1 - start, ids[first:last], place + first))
        place += len(ids)
    expect(
        found,
        "--text",
        f"a document of at least {scheme.window} tokens (--score second-half)",
        f"at most {max(map(len, documents))}",
        "join documents, or choose --score all or a smaller --window",
    )
    return found
