"""Usage errors, one line each: `argument: expected X, got Y; remedy`."""

import contextlib
import textwrap
from collections.abc import Iterator


class UseError(Exception):
    """A wrong argument, file or machine; the command line prints the message and exits with 2."""

    def __init__(self, argument: str, expected: str, got: str, remedy: str) -> None:
        super().__init__(argument, expected, got, remedy)  # unpickling needs these

    def __str__(self) -> str:
        return " ".join("{}: expected {}, got {}; remedy: {}".format(*self.args).split())


def expect(holds: object, argument: str, expected: str, got: str, remedy: str) -> None:
    """Raise a UseError unless the condition holds."""
    if not holds:
        raise UseError(argument, expected, got, remedy)


@contextlib.contextmanager
def told(argument: str, expected: str, got: str, remedy: str) -> Iterator[None]:
    """Turn an exception of another library into a UseError that quotes its message."""
    try:
        yield
    except UseError:
        raise
    except Exception as error:
        why = textwrap.shorten(str(error) or type(error).__name__, 400, placeholder=" …")
        raise UseError(argument, expected, f"{got}: {why.rstrip('.')}", remedy) from None
