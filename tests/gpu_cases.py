"""What the tests of the GPU's benchmarks share: tiny workloads on a CPU, and CUDA events that read the clock."""
import time

import pytest
import torch

from benchmarks import harness
from benchmarks.peers import Work
from benchmarks.providers import plain_kl_divergence
from benchmarks.workloads import Workload

CPU = torch.device("cpu")
TINY = Workload(rows=6, vocabulary=97, dtype="fp32")
OTHER = Workload(rows=4, vocabulary=97, dtype="fp32")
WORK = Work(lambda i: plain_kl_divergence(i.p, i.q), "the same work")


@pytest.fixture(autouse=True)
def nothing_to_release(monkeypatch):
    """The tensors are tiny: collecting garbage after each would take most of the time. Of the files that import it."""
    monkeypatch.setattr(harness.gc, "collect", lambda: 0)


class Event:
    """In place of torch.cuda.Event."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        """The time now."""
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        """Milliseconds to another one; a clock may stand still, a GPU does not."""
        return max(1e3 * (end.at - self.at), 1e-4)
