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
import math
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TextIO

from .. import __version__
from . import signals
from .demo.settings import QUICK, TUNED, Settings, choose_settings
from .files import check_readable, check_writable, default_picture

# Errors of a write that has no room.
FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG, errno.EIO)
# What `pip install 'fastkl[<extra>]'` brings.
EXTRAS = {
    "demo": ("tokenizers", "safetensors", "matplotlib", "tqdm"),
    "compare": ("transformers", "tokenizers", "numpy", "tqdm"),
    "plots": ("matplotlib",),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return the exit code."""
    received: list[int] = []
    try:
        with signals.as_exceptions(received):
            try:
                options = build_parser().parse_args(argv)
                if sys.stdout is None:
                    options.parser.error("standard output: expected it to be open, got a closed one; "
                                         "send it to /dev/null instead")
                return options.run(options, options.parser)
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


def _end(code: int, message: str | None = None) -> int:
    """Say in one line why a command ends, where its user does not know, and return its exit
    code."""
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


class _Parser(argparse.ArgumentParser):
    def _print_message(self, message: str, file: TextIO | None = None) -> None:
        if file is not None and file is sys.stdout:
            file.write(message)  # argparse passes in silence over an output that is full
        else:
            super()._print_message(message, file)


def build_parser() -> argparse.ArgumentParser:
    """The parser with every sub-command; each one sets `run`, a function of the options and its own parser."""
    parser = _Parser(prog="fastkl", description="Exact KL divergence for LLM training.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="sub-commands", metavar="<sub-command>", required=True)
    _add_demo(commands)
    _add_compare(commands)
    _add_plot(commands)
    _add_doctor(commands)
    return parser


def _add_demo(commands) -> None:
    text = "RLHF in small, on real text: what a policy does to a reward that can be hacked, without and with the KL penalty."
    parser = commands.add_parser("demo", help="fine-tune a small language model without and with the KL penalty", description=text)
    parser.add_argument("--quick", action="store_true", help="all stages in smaller sizes: seconds instead of minutes")
    parser.add_argument("--out", type=Path, default=Path("demo-run"), metavar="DIR", help="folder for the results (default: %(default)s)")
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="seed of everything that is random (default: %(default)s)")
    parser.add_argument("--steps", type=_steps, metavar="N",
                        help=f"training steps of each run (default: {Settings().steps}, quick {QUICK['steps']})")
    parser.add_argument("--algorithm", choices=tuple(TUNED), default="ppo",
                        help="ppo: advantages per token; grpo: per response, relative to its group; dpo: preferences between two responses, sampled "
                             "anew at every step (default: %(default)s)")
    parser.add_argument("--epochs", type=_at_least(1), metavar="N",
                        help=f"updates on each batch of samples; ppo and grpo clip their ratios from the second on (default: {Settings().epochs})")
    parser.add_argument("--beta", type=_positive_float, metavar="X",
                        help=f"fixed weight of the KL penalty, in reward per nat (default: a controller moves it so that the KL is "
                             f"{Settings().target_kl:g} nats per token, {TUNED['dpo']['target_kl']:g} for dpo)")
    parser.add_argument("--max-kl", type=_positive_float, metavar="X",
                        help="trust region: shorten every update until the policy after it is within X nats per token of the one before it")
    parser.add_argument("--linear", action="store_true",
                        help="fine-tune from hidden states and lm_head weights: no logits in the training step; the same curves, up to rounding")
    parser.add_argument("--save-models", action="store_true",
                        help="write reference and policies into DIR/models as Hugging Face checkpoints, to compare them with fastkl compare")
    parser.add_argument("--device", type=_device, default="auto", metavar="DEVICE",
                        help="cpu, cuda, cuda:N or auto: a GPU where there is one (default: %(default)s)")
    parser.set_defaults(run=_run_demo, parser=parser)


def _run_demo(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    _check_extra("demo", parser)
    parents = options.out.absolute().parents
    there = next(path for path in (options.out, *parents) if os.path.exists(path))
    if not os.path.isdir(there) or not os.access(there, os.W_OK):
        parser.error("argument --out: expected a folder that can be written to, "
                     f"got {str(options.out)!r}; choose another")
    options.device = _choose_device(options.device, parser)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: expected a folder that can be created, got {str(options.out)!r} ({error.strerror}); choose another")
    run = _load("demo", ".demo.run", parser)
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(Settings) if hasattr(options, field.name)}
    return run.run_demo(choose_settings(**given), options.out)


COMPARE_HELP = """\
Compares two causal language models token by token on your text: at each place, the next-token distributions of A and of B, given all before it.

  fastkl compare ./my-model-v1 ./my-model-v2 --text notes.txt
  fastkl compare meta-llama/Llama-3.2-1B ./my-finetune --text a.txt b.txt --html diff.html --json diff.json
  fastkl compare ./base ./quantized --text prompts.txt --by line --device cuda --dtype bfloat16 --sequential
"""
COMPARE_NOTES = """\
what is reported, in nats: KL(A||B) and KL(B||A), exact over the vocabulary; JSD, the Jensen-Shannon divergence (0 to 0.693); entropies; the
log-probability of the text; how often both expect the same next token; exact quantiles; the documents or lines, and the tokens, that differ most.
A mean KL below 0.001 reads "hardly", below 0.03 "slightly", below 0.3 "clearly", else "strongly".

needs: pip install 'fastkl[compare]' (and peft, for a LoRA or other adapter folder as a model), and models that share a (fast) tokenizer, up to tokens
that one of them added: those are left out, and the probabilities are of the rest. Rows of an lm_head beyond its tokens are padding, and cut off.
Exit codes: 0 done, 1 failed while running (no memory, no disk space), 2 wrong use, with one line on stderr that says what to change, 130 interrupted.
"""


def _add_compare(commands) -> None:
    parser = commands.add_parser("compare", help="how two model versions differ on a text, and where",
                                 usage="fastkl compare MODEL_A MODEL_B --text FILE [FILE ...] [options]", description=COMPARE_HELP,
                                 epilog=COMPARE_NOTES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_a", metavar="MODEL_A",
                        help="a folder that save_pretrained wrote, with its tokenizer, or a name on the Hugging Face hub")
    parser.add_argument("model_b", metavar="MODEL_B", help="the other version of it")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE",
                        help="what to compare on, in UTF-8: files, folders, patterns, or - for standard input, a document each; a .jsonl file has a "
                             "document a line: messages (in A's chat template), prompt and completion, or text")
    parser.add_argument("--tokenizer", choices=("A", "B"),
                        help="read the text with this model's tokenizer, for both (default: both must read it alike)")
    parser.add_argument("--by", choices=("document", "line"), default="document",
                        help="what the table lists, worst first; a line is still read in its document's context (default: %(default)s)")
    parser.add_argument("--top", type=_at_least(1), default=10, metavar="N", help="tokens, and units of the table, to show (default: %(default)s)")
    parser.add_argument("--html", type=_output, metavar="FILE",
                        help="write a page with the whole text, each token coloured by its KL, numbers on hover (about 150 bytes per token); "
                             "- for stdout, the report then goes to stderr")
    parser.add_argument("--json", type=_output, metavar="FILE",
                        help="write the numbers of the report, those of single tokens for the --top ones only; - for stdout, as for --html")
    parser.add_argument("--context", type=_at_least(8), metavar="N",
                        help="tokens the models read at a time, the last of them to score the token after it (default: 1024, or what the models "
                             "can take)")
    parser.add_argument("--overlap", type=_at_least(0), metavar="N",
                        help="tokens that each of these windows shares with the one before; every token is scored once, with at least this much "
                             "context where there is as much (default: a quarter of --context)")
    parser.add_argument("--sequential", action="store_true",
                        help="load one model after the other, where both do not fit; hidden states wait in a temporary file (in TMPDIR)")
    parser.add_argument("--device", type=_device, default="auto", metavar="DEVICE",
                        help="cpu, cuda, cuda:N or auto: a GPU where there is one (default: %(default)s)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                        help="type the models compute in; the logits are float32 in any case (default: auto, that of each checkpoint)")
    parser.add_argument("--color", action=argparse.BooleanOptionalAction, default=None, help="colour the tokens (default: on a terminal)")
    parser.set_defaults(run=_run_compare, parser=parser)


def _run_compare(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    _check_extra("compare", parser)
    from .compare import inputs, settings

    try:
        inputs.files(options.text)
        inputs.check_outputs(options.html, options.json)
        options.device = _choose_device(options.device, parser)
        run = _load("compare", ".compare.run", parser)
        given = {field.name: getattr(options, field.name) for field in dataclasses.fields(settings.Settings)}
        return run.run_compare(settings.Settings(**given), options.color)
    except settings.CompareError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def _add_plot(commands) -> None:
    text = "Draws reward, KL (mean and quantiles), beta and spikes of a run, as far as the file has them, over its steps."
    parser = commands.add_parser("plot", help="draw a run that fastkl.rl.KLMonitor(jsonl=...) wrote", description=text)
    parser.add_argument("source", type=Path, metavar="RUN.jsonl", help="the file that the monitor wrote, also of a run that still goes on")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="the picture (default: beside the file, with its name)")
    parser.set_defaults(run=_run_plot, parser=parser)


def _run_plot(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    _check_extra("plots", parser)
    source, out = options.source, options.out or default_picture(options.source)
    try:
        check_readable(source)
    except OSError as error:
        parser.error(f"argument RUN.jsonl: expected a file that KLMonitor(jsonl=...) wrote, "
                     f"got {str(source)!r} ({error.strerror}); name one that exists")
    if out.suffix.lower() != ".png" or os.path.isdir(out):
        parser.error(f"argument --out: expected the name of a PNG file, got {str(out)!r}; end it in .png")

    def not_written(error: OSError) -> None:
        parser.error(f"argument --out: expected a file that can be written, got {str(out)!r} "
                     f"({error.strerror}); choose another")

    try:
        check_writable(out)
    except OSError as error:
        not_written(error)
    plot = _load("plots", ".plot", parser)
    try:
        sentence = plot.plot_run(source, out)
    except plot.NothingToPlotError as error:
        parser.error(f"argument RUN.jsonl: expected a file that KLMonitor(jsonl=...) wrote, {error}")
    except OSError as error:
        not_written(error)
    print(f"{out}: {sentence}")
    return 0


DOCTOR_NOTES = """\
exit codes: 0 nothing is wrong (a warning or a skipped check is not wrong), 1 a
check failed: the report ends with what to paste into an issue, 2 wrong use.
In CI on a machine with a GPU pass --device cuda: a GPU that is not seen is an
error then (2); with auto the CPU is checked in its place.
"""


def _add_doctor(commands) -> None:
    text = "Checks in about a minute what this machine has, whether the kernels compile,\nrun and agree with float64 on it, and how fast they are."
    parser = commands.add_parser("doctor", help="check that fastkl is right and fast on this machine", description=text, epilog=DOCTOR_NOTES,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE",
                        help="write all checks to FILE; without FILE or with -, to standard output, and the report to standard error")
    parser.add_argument("--device", type=_device, default="auto", metavar="DEVICE",
                        help="cpu, cuda, cuda:N or auto: a GPU where there is one (default: %(default)s)")
    parser.set_defaults(run=_run_doctor, parser=parser)


def _run_doctor(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if options.json not in (None, "-"):
        try:
            check_writable(Path(options.json))  # before a minute of checks
        except OSError as error:
            parser.error(f"argument --json: expected a file that can be written, or -, got {options.json!r} ({error.strerror}); choose another")
    device = _choose_device(options.device, parser)
    from .doctor import run_doctor

    return run_doctor(device, options.json)


def missing_modules(names: Sequence[str]) -> list[str]:
    """List the named modules that are not installed; none is imported, which would take
    seconds."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def _check_extra(extra: str, parser: argparse.ArgumentParser) -> None:
    """Exit with an error of use where modules are not installed that an extra brings."""
    missing = missing_modules(EXTRAS[extra])
    if missing:
        parser.exit(2, f"{parser.prog}: error: not installed: {', '.join(missing)}; "
                       f"remedy: pip install 'fastkl[{extra}]'\n")


def _load(extra: str, name: str, parser: argparse.ArgumentParser) -> ModuleType:
    """Import a module of these tools, at last; an error of use where something is installed that
    cannot be imported."""
    try:
        return importlib.import_module(name, __package__)
    except ImportError as error:
        text = " ".join(str(error).split())
        parser.exit(2, f"{parser.prog}: error: cannot be imported: {error.name or name} ({text}); "
                       f"remedy: pip install --upgrade 'fastkl[{extra}]'\n")


def _at_least(least: int):
    return lambda text: _number(text, int, f"a whole number of at least {least}", lambda value: value >= least)


def _output(text: str) -> Path:
    return Path("-" if text == "/dev/stdout" else text)


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
    """Check a device's name as far as it can be checked without torch."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda, cuda:N or auto, got {text!r}")
    return text


def _choose_device(text: str, parser: argparse.ArgumentParser) -> str:
    """Return the device by its name in torch, which is imported for a GPU; "auto" is a GPU where there is
    one."""
    if text == "cpu":
        return text
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "auto":
        return "cuda" if gpus else "cpu"
    known = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{index}" for index in range(gpus))]
    if text not in known:
        parser.error(f"argument --device: expected one that this machine has ({', '.join(known)}) "
                     f"or auto, got {text!r}")
    return text


if __name__ == "__main__":
    sys.exit(main())
