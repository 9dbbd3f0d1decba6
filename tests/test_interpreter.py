"""The Triton kernels in Triton's interpreter, through the very tests of the public functions, in processes of their own.

TRITON_INTERPRET must be set before the kernels are imported, hence the processes; they run side by side, one thread each.
"""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
ROOT = pathlib.Path(__file__).resolve().parent.parent
# The longest first, so that the processes end together.
STEMS = ("test_divergence", "test_kernels", "test_tokens", "test_torch", "test_linear_ops", "test_linear", "test_rows", "test_linear_options",
         "test_linear_penalty", "test_checks", "test_linear_checks", "test_penalty", "test_backend")

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreting process"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run on the GPU"),
]


def run(stem: str) -> subprocess.CompletedProcess:
    """One file's tests with the kernels interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / f"{stem}.py")]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)


@pytest.fixture(scope="module")
def runs() -> dict[str, concurrent.futures.Future]:
    """All processes, as many at a time as there are cores."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        yield {stem: pool.submit(run, stem) for stem in STEMS}


@pytest.mark.parametrize("stem", STEMS)
def test_kernels_in_the_interpreter(stem: str, runs: dict[str, concurrent.futures.Future]) -> None:
    """The tests of one file pass with the kernels interpreted, and some of them did run."""
    result = runs[stem].result()
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed.group(1)) > 0
