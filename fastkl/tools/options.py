"""Options of the command line: texts, types and defaults."""

import argparse
import contextlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .demo import DISTILL, QUICK, Settings
from .files import STDOUT

# Suffixes of pictures; the suffix chooses the format.
PICTURES = (".png", ".svg", ".pdf")
TEXTS: dict[str, dict[str, Any]] = {
    "demo": dict(
        help="fine-tune a small language model without and with the KL penalty",
        description="""\
RLHF in small, on real text: what a policy does to a reward that can be hacked, without
and with the KL penalty. Or distillation: what a small student gives up by the forward KL,
the reverse KL and the JSD.""",
    ),
    "compare": dict(
        help="how two model versions differ on a text, and where",
        usage="fastkl compare MODEL_A MODEL_B [MODEL_C ...] --text FILE [FILE ...] [options]",
        description="""\
Compares causal language models token by token on your text: at each place, the
next-token distributions of A and of B, given all before it.

  fastkl compare ./my-model-v1 ./my-model-v2 --text notes.txt
  fastkl compare meta-llama/Llama-3.2-1B ./my-finetune --text a.txt b.txt --html diff.html
  fastkl compare ./base ./q8 ./q6 ./q4 --text wiki.txt --floor --plot kl-by-size.png
  fastkl compare ./base ./q4 --text wiki.txt --format llama.cpp
  fastkl compare ./base --text wiki.txt --save-reference base.safetensors
  fastkl compare base.safetensors ./q4

One model is loaded after the other; A's last hidden states wait in memory. With several
candidates the report is a table of them, by rising mean KL, with a paired test of each
against the next.""",
        epilog="""\
what is reported, in nats: KL(A||B) and KL(B||A), exact over the vocabulary; JSD, the
Jensen-Shannon divergence (0 to 0.693); entropies; the log-probability of the text; how
often both expect the same next token; the share of B's drafts that A accepts in
speculative decoding (1 - total variation); exact quantiles; 95 % intervals of means, by
a bootstrap over documents, or over windows where there are fewer than 10; the documents
or lines, and the tokens, that differ most. A mean KL below 0.001 reads "hardly", below
0.03 "slightly", below 0.3 "clearly", else "strongly".

needs: pip install 'fastkl[compare]' (and peft, for a LoRA or other adapter folder as a
model), and models that share a (fast) tokenizer, up to tokens that one of them added:
those are left out, and the probabilities are of the rest. Rows of an lm_head beyond its
tokens are padding, and cut off.
Exit codes: 0 done, 1 failed while running (no memory, no disk space), 2 wrong use, with
one line on stderr that says what to change, 130 interrupted.""",
    ),
    "plot": dict(
        help="draw runs that fastkl.rl.KLMonitor(jsonl=...) wrote",
        description="""\
Draws reward, KL (mean, quantiles, the controller's target), entropy, beta and spikes of a
run, as far as the file has them, over its steps, and the KL against the position in the
sequence. Several runs, at most 8, are overlaid, without quantiles.

  fastkl plot run.jsonl
  fastkl plot old.jsonl new.jsonl --out both.svg""",
    ),
    "doctor": dict(
        help="check that fastkl is right on this machine",
        description="""\
Checks in about a minute what this machine has, and that the kernels compile,
run and agree with float64 on it.""",
        epilog="""\
exit codes: 0 nothing is wrong (a warning is not wrong), 1 a
check failed: the report is what to paste into an issue, 2 wrong use.
In CI on a machine with a GPU pass --device cuda: a GPU that is not seen is an
error then (2); with auto the CPU is checked in its place.""",
    ),
}


def checked(
    convert: Callable[[str], Any], expected: str, holds: Callable[[Any], object]
) -> Callable[[str], Any]:
    """Return an argument type: convert(text), refused unless holds(value)."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if holds(value := convert(text)):
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    return parse


def at_least(least: int) -> Callable[[str], Any]:
    """Return the argument type of an integer with a lower limit."""
    return checked(int, f"a whole number of at least {least}", lambda value: value >= least)


def named(*suffixes: str) -> Callable[[str], Any]:
    """Return the argument type of a file with one of the suffixes."""
    return checked(
        Path,
        f"a name that ends in {' or '.join(suffixes)}",
        lambda path: path.suffix.lower() in suffixes,
    )


DEVICE: tuple[str, dict[str, Any]] = (
    "cpu, cuda, cuda:N or auto: a GPU where there is one (default: %(default)s)",
    dict(
        type=checked(
            str, "cpu, cuda, cuda:N or auto", re.compile(r"cpu|auto|cuda(:\d+)?").fullmatch
        ),
        default="auto",
        metavar="DEVICE",
    ),
)
# By sub-command and option: help text, and the other arguments of add_argument.
ARGUMENTS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "demo": {
        "--algorithm": (
            "ppo: fine-tune without and with the KL penalty; distill: teach a smaller model "
            "by three divergences (default: %(default)s)",
            dict(choices=("ppo", "distill"), default="ppo"),
        ),
        "--quick": (
            "all stages in smaller sizes: seconds instead of minutes",
            dict(action="store_true"),
        ),
        "--out": (
            "folder for the results (default: %(default)s)",
            dict(type=Path, default=Path("demo-run"), metavar="DIR"),
        ),
        "--seed": (
            "seed of everything that is random (default: %(default)s)",
            dict(
                type=checked(int, "a whole number from 0 to 2**31 - 1", lambda x: 0 <= x < 2**31),
                default=0,
                metavar="N",
            ),
        ),
        "--steps": (
            f"training steps of each run (default: {Settings.steps}, quick {QUICK['steps']}, "
            f"distill {DISTILL['steps']})",
            dict(type=at_least(2), metavar="N"),
        ),
        "--beta": (
            "fixed weight of the KL penalty, in reward per nat (default: a controller moves "
            f"it so that the KL is {Settings.target_kl:g} nats per token)",
            dict(
                type=checked(float, "a finite number above 0", lambda x: 0 < x < math.inf),
                metavar="X",
            ),
        ),
        "--save-models": (
            "write reference and policies into DIR/models as Hugging Face checkpoints, to "
            "compare them with fastkl compare",
            dict(action="store_true"),
        ),
        "--device": DEVICE,
    },
    "compare": {
        "model_a": (
            "the base: a folder that save_pretrained wrote, with its tokenizer, or a name on the "
            "Hugging Face hub; or a file with a base's values of a text: of --save-reference, or a "
            "logits base file of llama.cpp (--kl-divergence-base)",
            dict(metavar="MODEL_A"),
        ),
        "candidates": (
            "the other version of it, or up to 25 of them; optional with --save-reference",
            dict(nargs="*", metavar="MODEL_B"),
        ),
        "--text": (
            "what to compare on, in UTF-8: files, folders, patterns, or - for standard input, "
            "a document each; a .jsonl file has a document a line: messages (in A's chat "
            "template), prompt and completion, or text",
            dict(type=Path, nargs="+", default=[], metavar="FILE"),
        ),
        "--tokenizer": (
            "read the text with this model's tokenizer, for all models (default: all must read it "
            "alike)",
            dict(choices=("A", "B")),
        ),
        "--by": (
            "what the table lists, worst first; a line is still read in its document's "
            "context (default: %(default)s)",
            dict(choices=("document", "line"), default="document"),
        ),
        "--top": (
            "tokens, and units of the table, to show (default: %(default)s)",
            dict(type=at_least(1), default=10, metavar="N"),
        ),
        "--html": (
            "write a page with the whole text, each token coloured by its KL, numbers on "
            "hover (about 150 bytes per token); - for stdout, the report then goes to stderr",
            dict(type=Path, metavar="FILE"),
        ),
        "--json": (
            "write the numbers of the report, those of single tokens for the --top ones only;"
            " - for stdout, as for --html",
            dict(type=Path, metavar="FILE"),
        ),
        "--format": (
            "report, or llama.cpp: the table of its --kl-divergence; also changes the defaults of "
            "--window, --stride and --score (default: %(default)s)",
            dict(choices=("report", "llama.cpp"), default="report"),
        ),
        "--floor": (
            "compare A with itself, computed in bfloat16 (where it is bfloat16, in float32): what "
            "a change of type alone makes",
            dict(action="store_true"),
        ),
        "--plot": (
            "draw the mean KL of each candidate against its size on disk",
            dict(type=named(*PICTURES), metavar="FILE.png|svg|pdf"),
        ),
        "--tokens": (
            "write the values of every token",
            dict(type=named(".jsonl", ".parquet"), metavar="FILE.jsonl|parquet"),
        ),
        "--save-reference": (
            "write A's hidden states of the text, lm_head, tokenizer and text to a file that "
            "stands for A from then on",
            dict(type=named(".safetensors"), metavar="FILE.safetensors"),
        ),
        "--score": (
            "all: every token once, with as much before it as the windows give; second-half: the "
            "second half of windows of full length, as llama.cpp (default: all, with --format "
            "llama.cpp second-half)",
            dict(choices=("all", "second-half")),
        ),
        "--window": (
            "tokens of a window, which the models read at a time (default: 1024 or what the models "
            "can take, for second-half 512)",
            dict(type=at_least(8), metavar="N"),
        ),
        "--stride": (
            "tokens between the starts of two windows (default: three quarters of --window, for "
            "second-half all of it)",
            dict(type=at_least(1), metavar="N"),
        ),
        "--device": DEVICE,
        "--dtype": (
            "type the models compute in; the logits are float32 in any case (default: auto, "
            "that of each checkpoint)",
            dict(choices=("auto", "float32", "bfloat16", "float16"), default="auto"),
        ),
    },
    "plot": {
        "source": (
            "a file that the monitor wrote, also of a run that still goes on",
            dict(type=Path, nargs="+", metavar="RUN.jsonl"),
        ),
        "--out": (
            "the picture, a PNG, SVG or PDF by its suffix; required for several runs (default: a "
            "PNG beside the file, with its name)",
            dict(type=Path, metavar="FILE"),
        ),
    },
    "doctor": {
        "--json": (
            "write all checks to FILE; without FILE or with -, to standard output, and the "
            "report to standard error",
            dict(nargs="?", const=STDOUT, type=Path, metavar="FILE"),
        ),
        "--device": DEVICE,
    },
}
