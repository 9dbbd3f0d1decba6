"""Errors of other libraries, told in one line of this tool."""

from __future__ import annotations

import contextlib
import pickle
import re
import textwrap
from collections.abc import Iterator

from .settings import CompareError

# Characters shown of another library's message; its first sentence may have twice as many.
ROOM = 240


@contextlib.contextmanager
def told(argument: str, expected: str, name: str, remedy: str) -> Iterator[None]:
    """Turn an exception of a broken file or missing network into a CompareError."""
    try:
        yield
    except (MemoryError, CompareError):
        raise
    except pickle.UnpicklingError as error:
        why = sentences(str(error.__context__ or error))
        got = (
            f"{name!r} with a pickle that torch refuses to load, because it may hold code and not "
            f"tensors alone ({why})"
        )
        safe = (
            "load it where its source is trusted, and save it as safetensors with save_pretrained"
        )
        raise CompareError(argument, expected, got, safe) from None
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
            raise
        raise CompareError(
            argument, expected, f"{name!r}: {sentences(str(error)) or type(error).__name__}", remedy
        ) from None


def sentences(message: str) -> str:
    """Whole sentences from the beginning of a message, as many as there is room for."""
    first, *more = re.split(r"(?<=[.!?])\s+(?=\S)", " ".join(message.split()))
    shown = textwrap.shorten(first, 2 * ROOM, placeholder=" …")
    for sentence in more:
        if len(shown) + len(sentence) > ROOM:
            break
        shown = f"{shown} {sentence}"
    return shown.rstrip(".: ")
