"""The command line: `fastkl <sub-command>`, or `python -m fastkl.tools.cli <sub-command>`.

Exit codes: 0 success, 1 a failure while running, 2 wrong use (a bad option, something
missing that an extra installs), 130 interrupted, 143 and 129 ended by SIGTERM and SIGHUP, 141 a
closed pipe.

Imports the standard library alone until a command is known to be right, so that it starts fast.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import importlib
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from .. import __version__
from . import options
from .demo import Settings, choose_settings
from .files import check_readable, check_writable, default_picture

# Errors of a write that has no room.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return the exit code."""
    try:
        with _signals_exit():
            try:
                given = build_parser().parse_args(argv)
                return int(given.run(given, given.parser))
            finally:
                sys.stdout.flush()  # here, where a failure is told, and not at exit
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in (errno.EPIPE, *FULL):
            raise
        with contextlib.suppress(OSError):  # Python must not try again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            return 141
        name = f" ({error.filename})" if error.filename else ""
        remedy = "make room for the output, or send it elsewhere"
        print(f"fastkl: error: {error.strerror}{name}; remedy: {remedy}", file=sys.stderr)
        return 1


@contextlib.contextmanager
def _signals_exit() -> Iterator[None]:
    """Exit by an exception on SIGTERM and SIGHUP, so that files and processes are removed.

    A signal that is ignored, as under nohup, or has a handler already, keeps it.
    """

    def end(number: int, frame: object) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # a second one must not disturb the tidying
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    main_thread = threading.current_thread() is threading.main_thread()
    ours = [each for each in numbers if main_thread and signal.getsignal(each) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def build_parser() -> argparse.ArgumentParser:
    """Make the parser; a sub-command sets `run`, a function of its options and its own parser."""
    parser = argparse.ArgumentParser(
        prog="fastkl", description="Exact KL divergence for LLM training."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="sub-commands", metavar="<sub-command>", required=True)
    runs = dict(demo=_run_demo, compare=_run_compare, plot=_run_plot, doctor=_run_doctor)
    for name, run in runs.items():
        command = commands.add_parser(name, formatter_class=options.RAW, **options.TEXTS[name])
        for argument, (text, how) in options.ARGUMENTS[name].items():
            command.add_argument(argument, help=text, **how)
        command.set_defaults(run=run, parser=command)
    return parser


def _run_demo(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    with _refused(parser, "--out", "a folder that can be written to", given.out):
        given.out.mkdir(parents=True, exist_ok=True)
        check_writable(given.out / "report.json")
    given.device = _choose_device(given.device, parser)
    demo = _load("demo", ".demo.report", parser)
    names = {field.name for field in dataclasses.fields(Settings)}
    chosen = {name: value for name, value in vars(given).items() if name in names}
    return int(demo.run_demo(choose_settings(**chosen), given.out))


def _run_compare(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from . import compare
    from .compare import inputs

    try:
        inputs.files(given.text)
        inputs.check_outputs(given.html, given.json)
        given.device = _choose_device(given.device, parser)
        run = _load("compare", ".compare.run", parser)
        names = [field.name for field in dataclasses.fields(compare.Settings)]
        chosen = {name: getattr(given, name) for name in names}
        return int(run.run_compare(compare.Settings(**chosen), given.color))
    except compare.CompareError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def _run_plot(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    source, out = given.source, given.out or default_picture(given.source)
    wrote = "a file that KLMonitor(jsonl=...) wrote"
    with _refused(parser, "RUN.jsonl", wrote, source, "name one that exists"):
        check_readable(source)
    if out.suffix.lower() != ".png" or os.path.isdir(out):
        expected = f"expected the name of a PNG file, got {str(out)!r}; end it in .png"
        parser.error(f"argument --out: {expected}")
    with _refused(parser, "--out", "a file that can be written", out):
        check_writable(out)
        plot = _load("plots", ".plot", parser)
        try:
            sentence = plot.plot_run(source, out)
        except plot.NothingToPlotError as error:
            parser.error(f"argument RUN.jsonl: expected {wrote}, {error}")
    print(f"{out}: {sentence}")
    return 0


def _run_doctor(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if given.json not in (None, "-"):
        with _refused(parser, "--json", "a file that can be written, or -,", given.json):
            check_writable(Path(given.json))  # before a minute of checks
    device = _choose_device(given.device, parser)
    from .doctor import run_doctor

    return run_doctor(device, given.json)


@contextlib.contextmanager
def _refused(
    parser: argparse.ArgumentParser,
    argument: str,
    expected: str,
    got: object,
    remedy: str = "choose another",
) -> Iterator[None]:
    """Make an error of use of an OSError."""
    try:
        yield
    except OSError as error:
        text = f"expected {expected}, got {str(got)!r} ({error.strerror}); {remedy}"
        parser.error(f"argument {argument}: {text}")


def _load(extra: str, name: str, parser: argparse.ArgumentParser) -> ModuleType:
    """Import a module of the tools, which needs the packages of an extra."""
    try:
        return importlib.import_module(name, __package__)
    except ImportError as error:
        text = f"cannot be imported: {error.name or name} ({' '.join(str(error).split())})"
        remedy = f"pip install --upgrade 'fastkl[{extra}]'"
        parser.exit(2, f"{parser.prog}: error: {text}; remedy: {remedy}\n")


def _choose_device(text: str, parser: argparse.ArgumentParser) -> str:
    """Return a device that this machine has, by its name in torch."""
    if text == "cpu":
        return text
    if not re.fullmatch(r"auto|cuda(:\d+)?", text):  # known without torch
        expected = "expected cpu, cuda, cuda:N or auto"
        parser.error(f"argument --device: {expected}, got {text!r}")
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = [*(["cuda"] if gpus else []), "cpu", *(f"cuda:{index}" for index in range(gpus))]
    if text != "auto" and text not in known:
        expected = f"one that this machine has ({', '.join(known)}) or auto"
        parser.error(f"argument --device: expected {expected}, got {text!r}")
    return known[0] if text == "auto" else text


if __name__ == "__main__":
    sys.exit(main())
