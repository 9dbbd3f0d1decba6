"""The Triton kernels in Triton's interpreter, through the very tests of the public functions, in a process of their own.

TRITON_INTERPRET must be set before the kernels are imported, hence the process.
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreting process")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run on the GPU")
@pytest.mark.parametrize("stem", ["test_divergence", "test_tokens", "test_kernels", "test_torch"])
def test_kernels_in_the_interpreter(stem: str) -> None:
    """The tests of one file pass with the kernels interpreted, and some of them did run."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-s", str(ROOT / "tests" / f"{stem}.py")]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    print(run.stdout[-6000:])
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed.group(1)) > 0
