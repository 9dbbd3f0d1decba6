"""What the commands here share: arguments found wrong before anything is measured, files of figures, and what each says about its origin."""
import argparse
import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import torch

from fastkl.tools.files import check_writable, write_whole

ROOT = Path(__file__).resolve().parent.parent


def write_json(path, data):
    """Writes `data` to `path` whole or not at all."""
    write_bytes(path, (json.dumps(_finite(data), indent=1, allow_nan=False) + "\n").encode())


def output_file(text):
    """A path for argparse: one that write_bytes can write, found out before there is something to write."""
    path = Path(text)
    with _attempt("a file that can be written", text, path.parent):
        check_writable(path)
    return path


def output_folder(text):
    """The same for a folder in which write_bytes can write files."""
    path = Path(text)
    with _attempt("a folder that can be written to", text, path), tempfile.TemporaryFile(dir=path):
        return path


@contextlib.contextmanager
def _attempt(expected, text, folder):
    """Within it the folder is there, and is gone afterwards where it was not; what fails there is an error of argparse."""
    made = []
    try:
        # Made in earnest: to root every folder looks writable, those of /proc too.
        for one in (*reversed(folder.parents), folder):
            if not one.exists():
                one.mkdir()
                made.append(one)
        yield
    except OSError as error:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r} ({error.strerror}); choose another one") from None
    finally:
        with contextlib.suppress(OSError):  # somebody else has put something there meanwhile
            for one in reversed(made):
                one.rmdir()


def duration(text):
    """A number of seconds for argparse."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number of seconds above 0, got {text!r}; give one, such as 60")
    return seconds


def has_gpu(tool):
    """Whether there is a CUDA GPU; says so where there is none, after which a tool ends with exit code 2."""
    if not torch.cuda.is_available():
        print(f"{tool}: expected a CUDA GPU, got none; nothing was measured, run it on a machine that has one", file=sys.stderr)
    return torch.cuda.is_available()


def write_bytes(path, content):
    """Writes bytes to `path` whole or not at all; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)


def _finite(data):
    """The data with NaN and the infinities, which JSON does not have, as the strings "nan", "inf" and "-inf"; float() reads them back."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data


def commit():
    """The commit of the working tree, with "+changes" where it differs from it; "unknown" outside a repository.

    FASTKL_COMMIT says it where git cannot: in a copy of the tree on another machine.
    """
    if said := os.environ.get("FASTKL_COMMIT"):
        return said
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*arguments):
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def version(package):
    """The installed version of a package, None where it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def now():
    """Date and time in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def provenance(command):
    """What a reader needs to repeat a measurement: command, commit, date and versions."""
    versions = {name: version(name) for name in ("torch", "triton", "liger-kernel", "trl", "cut-cross-entropy")}
    return {"command": command, "commit": commit(), "date": now(), "python": platform.python_version(), "versions": versions}
