"""The command line: `fastkl <sub-command>`, or `python -m fastkl.tools.cli <sub-command>`.

Exit codes: 0 success, 1 failure while running, 2 wrong use (a bad option, a missing package of an
extra), 130 interrupted, 143 SIGTERM, 129 SIGHUP, 141 closed pipe.

Imports only the standard library until the command line has been checked, for a fast start.
"""

import argparse
import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from .. import __version__
from . import demo, options
from .errors import UseError, expect, told
from .files import check_uses, check_writable, find_texts


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        # Characters missing from the terminal's encoding become "?".
        getattr(stream, "reconfigure", dict)(errors="replace")
    try:
        try:
            with _exits_on_signals():
                given = build_parser().parse_args(argv)
                return int(given.run(given))
        finally:
            sys.stdout.flush()  # report a failure here, not at exit
    except UseError as error:
        print(f"fastkl {given.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        with contextlib.suppress(OSError):  # keep Python from flushing again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 141
        print(f"fastkl: error: {error}; remedy: make room, or choose another", file=sys.stderr)
        return 1


@contextlib.contextmanager
def _exits_on_signals() -> Iterator[None]:
    """Raise SystemExit on SIGTERM and SIGHUP, so that files and processes are cleaned up.

    A signal that is ignored (nohup) or already has a handler is left alone.
    """

    def end(number: int, frame: object) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the cleanup
        raise SystemExit(128 + number)

    with contextlib.ExitStack() as restored:
        for number in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
            if signal.getsignal(number) == signal.SIG_DFL:
                with contextlib.suppress(ValueError):  # not in the main thread
                    signal.signal(number, end)
                    restored.callback(signal.signal, number, signal.SIG_DFL)
        yield


def build_parser() -> argparse.ArgumentParser:
    """Build the parser; a sub-command sets `command` and `run`, a function of its options."""
    parser = argparse.ArgumentParser(
        prog="fastkl", description="Exact KL divergence for LLM training."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="sub-commands", metavar="<sub-command>", required=True)
    for name, run in dict(
        demo=_run_demo, compare=_run_compare, plot=_run_plot, doctor=_run_doctor
    ).items():
        command = commands.add_parser(
            name, formatter_class=argparse.RawDescriptionHelpFormatter, **options.TEXTS[name]
        )
        for argument, (text, how) in options.ARGUMENTS[name].items():
            command.add_argument(argument, help=text, **how)
        command.set_defaults(run=run, command=name)
    return parser


def _run_demo(given: argparse.Namespace) -> int:
    with told("--out", "a folder that can be written to", repr(str(given.out)), "choose another"):
        given.out.mkdir(parents=True, exist_ok=True)
        check_writable(given.out / "report.json")
    expect(
        given.algorithm != "distill" or (given.beta is None and not given.save_models),
        "--algorithm distill",
        "neither --beta nor --save-models, which are of ppo",
        "one of them",
        "leave it out",
    )
    given.device = _choose_device(given.device)
    settings = demo.choose_settings(
        **{name: x for name, x in vars(given).items() if name not in ("command", "run", "out")}
    )
    return int(_load("demo", ".demo.report").run_demo(settings, given.out))


def _run_compare(given: argparse.Namespace) -> int:
    given.text, given.documents = find_texts(given.text), None
    many = len(given.candidates)
    expect(
        many or given.save_reference, "MODEL_B", "a model", "none", "name one, or --save-reference"
    )
    expect(
        given.text or os.path.isfile(given.model_a),
        "--text",
        "what to compare on",
        "nothing",
        "name files",
    )
    expect(many < 26, "MODEL_B", "at most 25 candidates", str(many), "compare fewer at a time")
    for option in ("html", "json", "plot", "tokens", "floor"):
        most = 1 if option == "html" else 25
        expect(
            1 <= many <= most or not getattr(given, option),
            f"--{option}",
            "one candidate" if most == 1 else "a candidate",
            str(many),
            "compare one at a time" if many else "name one as MODEL_B",
        )
    outputs = ("html", "json", "plot", "tokens", "save_reference")
    models = [Path(name) for name in {given.model_a, *given.candidates}]
    models += [file for path in models if path.is_dir() for file in path.iterdir()]
    check_uses(given.text, {name: getattr(given, name) for name in outputs}, models)
    if given.plot:
        _load("plots", ".plot")
    if given.tokens and given.tokens.suffix.lower() == ".parquet":
        with told(
            "--tokens", "the package pyarrow", "none", "pip install pyarrow, or name a .jsonl"
        ):
            importlib.import_module("pyarrow")
    given.device = _choose_device(given.device)
    return int(_load("compare", ".compare.run").run_compare(given))


def _run_plot(given: argparse.Namespace) -> int:
    sources: list[Path] = given.source
    for source in sources:
        expect(
            source.is_file() or source.is_fifo(),
            "RUN.jsonl",
            "a file that KLMonitor(jsonl=...) wrote",
            repr(str(source)),
            "name one that exists",
        )
    expect(
        given.out or len(sources) == 1,
        "--out",
        "a name for the picture of several runs",
        "none",
        "pass --out runs.png",
    )
    named = sources[0].suffix.lower() in (".jsonl", ".json")
    out = given.out or Path(f"{sources[0].with_suffix('') if named else sources[0]}.png")
    expect(
        out.suffix.lower() in options.PICTURES
        and not (out.exists() and any(map(out.samefile, sources))),
        "--out",
        "the name of a PNG, SVG or PDF file, another than a run's",
        repr(str(out)),
        "end it in .png, .svg or .pdf",
    )
    with told("--out", "a file that can be written", repr(str(out)), "choose another"):
        check_writable(out)
    print(_load("plots", ".plot").plot_runs(sources, out))
    return 0


def _run_doctor(given: argparse.Namespace) -> int:
    check_uses((), {"json": given.json})  # before a minute of checks
    from .doctor import run_doctor

    return run_doctor(_choose_device(given.device), given.json)


def _load(extra: str, name: str) -> ModuleType:
    """Import a module of the tools that needs the packages of an extra."""
    with told(
        "packages",
        f"those of the extra {extra!r}",
        "an import that fails",
        f"pip install --upgrade 'fastkl[{extra}]'",
    ):
        return importlib.import_module(name, __package__)


def _choose_device(text: str) -> str:
    """Return the torch name of an available device."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = [*(["cuda"] if gpus else []), "cpu", *(f"cuda:{index}" for index in range(gpus))]
    expect(
        text in ("auto", *known),
        "--device",
        f"one that this machine has ({', '.join(known)}) or auto",
        repr(text),
        "choose one of these",
    )
    return known[0] if text == "auto" else text


if __name__ == "__main__":
    sys.exit(main())
