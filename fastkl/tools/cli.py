"""The command line: `fastkl <sub-command>`, or `python -m fastkl.tools.cli <sub-command>`.

Exit codes: 0 success, 1 a failure while running, 2 wrong use (a bad option, something
missing that an extra installs), 130 interrupted, 143 and 129 ended by SIGTERM and SIGHUP, 141 a
closed pipe.

Starts fast: imports the standard library alone before a command is known to be right; torch,
transformers and matplotlib come after.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import importlib
import importlib.util
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import __version__
from . import options, signals
from .demo import Settings, choose_settings
from .files import check_readable, check_writable, default_picture

# Errors of a write that has no room.
FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG, errno.EIO)
# What `pip install 'fastkl[<extra>]'` brings.
EXTRAS = {
    "demo": ("tokenizers", "safetensors", "matplotlib", "tqdm"),
    "compare": ("transformers", "tokenizers", "numpy", "tqdm"),
    "plots": ("matplotlib",),
}


class Parser(argparse.ArgumentParser):
    """A parser that does not pass in silence over an output that is full."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if file is not None and file is sys.stdout:
            file.write(message)
        else:
            super()._print_message(message, file)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return the exit code."""
    received: list[int] = []
    try:
        with signals.as_exceptions(received):
            try:
                given = build_parser().parse_args(argv)
                if sys.stdout is None:
                    given.parser.error(
                        "standard output: expected it to be open, got a closed one; "
                        "send it to /dev/null instead"
                    )
                return int(given.run(given, given.parser))
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()  # here, where a failure is told, and not at exit
    except BaseException as error:
        # Whatever an import or a library made of the exception that a signal raised.
        if received or isinstance(error, KeyboardInterrupt):
            return _end(128 + (received or [signal.SIGINT])[0])
        if isinstance(error, BrokenPipeError):
            return _end(141)
        if isinstance(error, OSError) and error.errno in FULL:
            name = f" ({error.filename})" if error.filename else ""
            remedy = "make room for the output, or send it elsewhere"
            return _end(1, f"fastkl: error: {error.strerror}{name}; remedy: {remedy}")
        raise


def _end(code: int, message: str = "") -> int:
    # Says in one line why a command ends, where its user does not know, and returns its exit code.
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        # Python must not try again at exit.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if code == 128 + signal.SIGINT:
        message = "interrupted"
    if message and sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(message, file=sys.stderr)
    return code


def build_parser() -> argparse.ArgumentParser:
    """Make the parser; a sub-command sets `run`, a function of its options and its own parser."""
    parser = Parser(prog="fastkl", description="Exact KL divergence for LLM training.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="sub-commands", metavar="<sub-command>", required=True)
    runs = dict(demo=_run_demo, compare=_run_compare, plot=_run_plot, doctor=_run_doctor)
    for name, run in runs.items():
        command = commands.add_parser(name, formatter_class=options.RAW, **options.TEXTS[name])
        for argument, (text, how) in options.ARGUMENTS[name].items():
            how = how | (dict(type=_device) if argument == "--device" else {})
            command.add_argument(argument, help=text, **how)
        command.set_defaults(run=run, parser=command)
    return parser


def _run_demo(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    _check_extra("demo", parser)
    new = [path for path in (given.out, *given.out.parents) if not os.path.lexists(path)]
    try:
        with _refused(parser, "--out", "a folder that can be written to", given.out):
            given.out.mkdir(parents=True, exist_ok=True)
            check_writable(given.out / "report.json")
        given.device = _choose_device(given.device, parser)
        demo = _load("demo", ".demo.report", parser)
        names = {field.name for field in dataclasses.fields(Settings)}
        chosen = {name: value for name, value in vars(given).items() if name in names}
        return int(demo.run_demo(choose_settings(**chosen), given.out))
    except BaseException:
        for path in new:
            with contextlib.suppress(OSError):
                path.rmdir()  # where nothing was written
        raise


def _run_compare(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    _check_extra("compare", parser)
    from .compare import inputs, settings

    try:
        inputs.files(given.text)
        inputs.check_outputs(given.html, given.json)
        given.device = _choose_device(given.device, parser)
        run = _load("compare", ".compare.run", parser)
        names = [field.name for field in dataclasses.fields(settings.Settings)]
        chosen = {name: getattr(given, name) for name in names}
        return int(run.run_compare(settings.Settings(**chosen), given.color))
    except settings.CompareError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def _run_plot(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    _check_extra("plots", parser)
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
    # Makes an error of use of an OSError.
    try:
        yield
    except OSError as error:
        text = f"expected {expected}, got {str(got)!r} ({error.strerror}); {remedy}"
        parser.error(f"argument {argument}: {text}")


def missing_modules(names: Sequence[str]) -> list[str]:
    """List the named modules that are not installed; importing them would take seconds."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def _check_extra(extra: str, parser: argparse.ArgumentParser) -> None:
    if missing := ", ".join(missing_modules(EXTRAS[extra])):
        remedy = f"pip install 'fastkl[{extra}]'"
        parser.exit(2, f"{parser.prog}: error: not installed: {missing}; remedy: {remedy}\n")


def _load(extra: str, name: str, parser: argparse.ArgumentParser) -> ModuleType:
    # Imports a module of the tools, at last: what is installed may fail to be imported.
    try:
        return importlib.import_module(name, __package__)
    except ImportError as error:
        text = f"cannot be imported: {error.name or name} ({' '.join(str(error).split())})"
        remedy = f"pip install --upgrade 'fastkl[{extra}]'"
        parser.exit(2, f"{parser.prog}: error: {text}; remedy: {remedy}\n")


def _device(text: str) -> str:
    # The rest of the check needs torch.
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda, cuda:N or auto, got {text!r}")
    return text


def _choose_device(text: str, parser: argparse.ArgumentParser) -> str:
    # Returns a device that there is, by its name in torch, which is imported for a GPU.
    if text == "cpu":
        return text
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = [*(["cuda"] if gpus else []), "cpu", *(f"cuda:{index}" for index in range(gpus))]
    if text != "auto" and text not in known:
        names = ", ".join(known)
        expected = f"one that this machine has ({names}) or auto"
        parser.error(f"argument --device: expected {expected}, got {text!r}")
    return known[0] if text == "auto" else text


if __name__ == "__main__":
    sys.exit(main())
