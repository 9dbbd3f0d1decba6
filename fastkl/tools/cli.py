"""The command line: `fastkl <sub-command>`, or `python -m fastkl.tools.cli <sub-command>`.

Exit codes: 0 success, 1 a failure while running, 2 wrong use (a bad option, something missing that an extra installs), 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .demo.settings import QUICK, Settings, choose_settings

DEMO_EXTRA = ("tokenizers", "matplotlib", "tqdm")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return the exit code."""
    parser = build_parser()
    options = parser.parse_args(argv)
    try:
        return options.run(options, options.parser)
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The parser with every sub-command; each one sets `run`, a function of the options and its own parser."""
    parser = argparse.ArgumentParser(prog="fastkl", description="Exact KL divergence for LLM training.")
    commands = parser.add_subparsers(title="sub-commands", metavar="<sub-command>", required=True)
    _add_demo(commands)
    _add_plot(commands)
    return parser


def _add_demo(commands) -> None:
    text = "RLHF in small, on real text: what a policy does to a reward that can be hacked, without and with fastkl.KLPenalty."
    parser = commands.add_parser("demo", help="fine-tune a small language model without and with the KL penalty", description=text)
    parser.add_argument("--quick", action="store_true", help="all stages in smaller sizes: seconds instead of minutes")
    parser.add_argument("--out", type=Path, default=Path("demo-run"), metavar="DIR", help="folder for the results (default: %(default)s)")
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="seed of everything that is random (default: %(default)s)")
    parser.add_argument("--steps", type=_steps, metavar="N",
                        help=f"policy-gradient steps of each run (default: {Settings().steps}, quick {QUICK['steps']})")
    parser.add_argument("--beta", type=_positive_float, metavar="X",
                        help=f"weight of the KL penalty, in reward per nat (default: {Settings().beta})")
    parser.add_argument("--linear", action="store_true",
                        help="fine-tune from hidden states and lm_head weights: no logits in the training step; the same curves, up to rounding")
    parser.add_argument("--device", type=_device, default="auto", metavar="DEVICE",
                        help="cpu, cuda, cuda:N or auto: a GPU where there is one (default: %(default)s)")
    parser.set_defaults(run=_run_demo, parser=parser)


def _run_demo(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    missing = missing_modules(DEMO_EXTRA)
    if missing:
        parser.exit(2, f"{parser.prog}: error: not installed: {', '.join(missing)}; remedy: pip install 'fastkl[demo]'\n")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: expected a folder that can be created, got {str(options.out)!r} ({error.strerror}); choose another")
    if not os.access(options.out, os.W_OK):
        parser.error(f"argument --out: expected a folder that can be written to, got {str(options.out)!r}; choose another")
    # Here and not above: --help and errors of use do not need the extra.
    from .demo.run import run_demo

    settings = choose_settings(quick=options.quick, seed=options.seed, steps=options.steps, beta=options.beta, linear=options.linear,
                               device=options.device)
    return run_demo(settings, options.out)


def _add_plot(commands) -> None:
    text = "Draws reward, KL (mean and quantiles), beta and spikes of a run, as far as the file has them, over its steps."
    parser = commands.add_parser("plot", help="draw a run that fastkl.rl.KLMonitor(jsonl=...) wrote", description=text)
    parser.add_argument("source", type=Path, metavar="RUN.jsonl", help="the file that the monitor wrote, also of a run that still goes on")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="the picture (default: beside the file, with its name)")
    parser.set_defaults(run=_run_plot, parser=parser)


def _run_plot(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if missing_modules(["matplotlib"]):
        parser.exit(2, f"{parser.prog}: error: not installed: matplotlib; remedy: pip install 'fastkl[plots]'\n")
    out = options.source.with_suffix(".png") if options.out is None else options.out
    if out.suffix.lower() != ".png" or out.is_dir():
        parser.error(f"argument --out: expected the name of a PNG file, got {str(out)!r}; end it in .png")
    # Here and not above: --help and errors of use do not need the extra.
    from .plot import NothingToPlotError, plot_run

    try:
        print(f"{out}: {plot_run(options.source, out)}")
    except NothingToPlotError as error:
        parser.error(f"argument RUN.jsonl: expected a file that KLMonitor(jsonl=...) wrote, {error}")
    except OSError as error:
        parser.error(f"argument --out: expected a file that can be written, got {str(out)!r} ({error.strerror}); choose another")
    return 0


def missing_modules(names: Sequence[str]) -> list[str]:
    """Those of the named modules that cannot be imported."""
    missing = []
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    return missing


def _at_least(least: int):
    return lambda text: _number(text, int, f"a whole number of at least {least}", lambda value: value >= least)


def _steps(text: str) -> int:
    # The first step still measures the reference itself.
    return _number(text, int, "a whole number of at least 2", lambda value: value >= 2)


def _seed(text: str) -> int:
    return _number(text, int, "a whole number from 0 to 2**31 - 1", lambda value: 0 <= value < 2**31)


def _positive_float(text: str) -> float:
    return _number(text, float, "a finite number above 0", lambda value: 0 < value and math.isfinite(value))


def _number(text, convert, expected, holds):
    try:
        value = convert(text)
    except ValueError:
        value = None
    if value is None or not holds(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value


def _device(text: str) -> str:
    """The device by its name in torch; "auto" is a GPU where there is one."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "auto":
        return "cuda" if gpus else "cpu"
    known = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{index}" for index in range(gpus))]
    if text not in known:
        raise argparse.ArgumentTypeError(f"expected one that this machine has ({', '.join(known)}) or auto, got {text!r}")
    return text


if __name__ == "__main__":
    sys.exit(main())
