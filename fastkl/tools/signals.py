"""Signals that end a command, as exceptions, so that part files, temporary folders and child
processes are removed."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

# Seconds after which a signal whose exception was swallowed, as by an extension module that imports
# another, raises it again.
PATIENCE = 0.2


class EndedError(KeyboardInterrupt):
    """A signal's exception. A plain KeyboardInterrupt that passes an exec() would make Python end
    itself by SIGINT at exit, although it was caught."""


@contextlib.contextmanager
def as_exceptions(received: list[int]) -> Iterator[None]:
    """Raise EndedError for SIGINT, SIGTERM and SIGHUP, and add their numbers to `received`, which
    tells them apart whatever a library makes of the exception.

    Python allows handlers to the main thread alone. A signal that is ignored, as under nohup, or
    has a handler already, keeps it.
    """

    def end(number: int, frame: object) -> None:
        if (
            number == signal.SIGINT or number not in received
        ):  # a second one must not disturb the tidying, but Ctrl-C may
            received.append(number)
            if hasattr(signal, "setitimer"):
                signal.setitimer(signal.ITIMER_REAL, PATIENCE, PATIENCE)
            raise EndedError

    def end_again(number: int, frame: object) -> None:
        error = sys.exc_info()[1]
        while error is not None and not isinstance(error, EndedError):
            error = error.__context__
        if error is None:  # else the tidying goes on
            raise EndedError

    handlers = {"SIGINT": end, "SIGTERM": end, "SIGHUP": end, "SIGALRM": end_again}
    before, said = {}, sys.unraisablehook
    if threading.current_thread() is threading.main_thread():
        for number, handler in (
            (getattr(signal, name, None), handler) for name, handler in handlers.items()
        ):
            if number and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, handler)
        sys.unraisablehook = lambda what: (
            None if isinstance(what.exc_value, EndedError) else said(what)
        )
    try:
        yield
    finally:
        if before:
            if received and hasattr(signal, "setitimer"):
                signal.setitimer(signal.ITIMER_REAL, 0)
            sys.unraisablehook = said
        for number, handler in before.items():
            signal.signal(number, handler)
