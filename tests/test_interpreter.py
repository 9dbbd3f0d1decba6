"""The Triton kernels in Triton's interpreter, through the very tests of the public functions, in processes of their own.

TRITON_INTERPRET must be set before the kernels are imported, hence the processes; they run side by side, one thread each.
"""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import re
import sys

import background
import pytest
import torch

pytest.importorskip("triton")
ROOT = pathlib.Path(__file__).resolve().parent.parent
# The longest first, so that the processes end together.
STEMS = ("test_divergence", "test_kernels", "test_linear", "test_tokens", "test_rows", "test_torch", "test_linear_ops", "test_linear_heads",
         "test_linear_penalty", "test_linear_options", "test_linear_checks", "test_tokens_several", "test_checks", "test_dispatch",
         "test_divergence_suppressed", "test_penalty", "test_backend", "test_far_rows", "test_extreme_rows", "test_row_fused",
         "test_row_segment")

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreting process"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run on the GPU"),
]


def run(stem: str) -> tuple[int, str]:
    """(exit code, output) of one file's tests with the kernels interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / f"{stem}.py")]
    return background.run(command, ROOT, environment)


def start_in_background() -> dict[str, concurrent.futures.Future]:
    """All processes, as many at a time as there are cores."""
    if any(mark.args[0] for mark in pytestmark):
        return {}
    return {stem: background.submit(f"interpreter {stem}", run, stem) for stem in STEMS}


@pytest.mark.parametrize("stem", STEMS)
def test_kernels_in_the_interpreter(stem: str) -> None:
    """The tests of one file pass with the kernels interpreted, and some of them did run."""
    code, output = start_in_background()[stem].result()
    assert code == 0, output[-8000:]
    passed = re.search(r"(\d+) passed", output)
    assert passed and int(passed.group(1)) > 0
