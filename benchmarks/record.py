"""Helpers shared by the commands: command lines, result files, their origin, tables."""

import argparse
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

from fastkl.tools.files import check_writable, write_whole

ROOT = Path(__file__).resolve().parent.parent
MODULE = re.compile(r"(?:-m benchmarks\.|python3? benchmarks/)(\w+)")
PACKAGES = (
    *("torch", "triton", "liger-kernel", "trl", "cut-cross-entropy", "speculators"),
    "transformers",
)


def command_line(module, description, json_help="write the records to FILE"):
    parser = argparse.ArgumentParser(f"python -m benchmarks.{module}", description=description)
    parser.add_argument("--json", type=output_file, metavar="FILE", help=json_help)
    return parser


def write_json(path, data):
    """Write JSON atomically, if there is a path, and make its folder."""
    if path:
        write_bytes(path, (json.dumps(finite(data), indent=1, allow_nan=False) + "\n").encode())


def gather(path, data, records, said=json.dumps):
    """Print records as they come, add them to `data`, and write it."""
    data["records"] = []
    for found in records:
        data["records"].append(found)
        print(said(found), flush=True)
    write_json(path, data)


def write_bytes(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)


def finite(data):
    """Replace NaN and infinities, which JSON lacks, by strings that float() parses."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data


def output_file(text):
    """Check for argparse, before minutes of measuring, that a file can be written."""
    try:
        Path(text).parent.mkdir(parents=True, exist_ok=True)
        check_writable(Path(text))
    except OSError as error:
        why = f"expected a place to write to, got {text!r} ({error.strerror}); choose another one"
        raise argparse.ArgumentTypeError(why) from None
    return Path(text)


def output_folder(text):
    return output_file(os.path.join(text, "results.json")).parent


def at_least(least, text, kind=int):
    if least <= kind(text) < math.inf:
        return kind(text)
    raise argparse.ArgumentTypeError(f"expected {least} or more, got {text}; choose another")


def has_gpu(tool):
    if not torch.cuda.is_available():
        print(
            f"{tool}: expected a CUDA GPU, got none; run it on a machine that has one",
            file=sys.stderr,
        )
    return torch.cuda.is_available()


def commit():
    """Return the commit of the working tree, with "+changes" if it differs, or "unknown". Set
    FASTKL_COMMIT for a copy of the tree without git.
    """
    command = "describe --always --abbrev=40 --exclude='*' --dirty=+changes"
    status, found = subprocess.getstatusoutput(f"git -C {shlex.quote(str(ROOT))} {command}")
    return os.environ.get("FASTKL_COMMIT", "unknown" if status else found)


def version(package):
    return next((found.version for found in metadata.distributions(name=package)), None)


def provenance(module, argv):
    words = sys.argv[1:] if argv is None else argv
    return {
        "command": " ".join(["python -m", f"benchmarks.{module}", *words]),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def origin(data):
    packages = {**data["versions"], **data.get("peers", {})}.items()
    versions = ", ".join(f"{name} {of}" for name, of in packages if isinstance(of, str))
    command, date, commit = data["command"].strip(), data["date"][:10], data["commit"][:10]
    there = all((ROOT / "benchmarks" / f"{name}.py").exists() for name in MODULE.findall(command))
    then = "" if there else " (at that commit)"
    return f"`{command}`{then}, {date}, {versions}, commit {commit}."


def markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
