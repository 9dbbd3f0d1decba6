"""The Triton kernels in Triton's interpreter, through the very tests of the public functions, in
processes of their own.

TRITON_INTERPRET must be set before the kernels are imported, hence the processes; they run side by
side, one thread each.
"""

import concurrent.futures
import os
import pathlib
import re
import sys

import background
import pytest
import torch

pytest.importorskip("triton")
ROOT = pathlib.Path(__file__).resolve().parents[2]
# The files that share a process, whose start takes seconds; the longest first.
GROUPS = (
    (
        *("test_divergence", "test_divergence_rows", "test_divergence_family", "test_engine"),
        *("test_far_rows", "test_torch", "test_dispatch", "test_transforms", "test_checks"),
        *("test_penalty", "test_backend"),
    ),
    (
        *("test_kernels", "test_row_segment", "test_row_fused", "test_topk", "test_tokens"),
        *("test_support", "test_linear", "test_linear_divergences", "test_linear_topk"),
        *("test_linear_options", "test_linear_checks"),
    ),
)

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreting process"
    ),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run on the GPU"),
]


def path_of(stem: str) -> str:
    (path,) = (ROOT / "tests").rglob(f"{stem}.py")
    return path.relative_to(ROOT).as_posix()


def run(stems: tuple[str, ...]) -> tuple[int, str]:
    switches = {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(path_of, stems)]
    return background.run(command, ROOT, {**os.environ, **switches})


def start_in_background() -> dict[str, concurrent.futures.Future]:
    if any(mark.args[0] for mark in pytestmark):
        return {}
    return {stems[0]: background.submit(run, stems) for stems in GROUPS}


@pytest.mark.parametrize("stems", GROUPS, ids=lambda stems: stems[0])
def test_kernels_in_the_interpreter(stems: tuple[str, ...]) -> None:
    code, output = start_in_background()[stems[0]].result()
    assert code == 0, output[-8000:]
    for stem in stems:
        assert re.search(rf"^{path_of(stem)} [s.]*\.", output, re.MULTILINE), stem
