"""Speed of linear_kl_divergence and linear_token_stats beside the bare matrix products, plain torch and peers.

    python -m pytest benchmarks/bench_linear.py

One group per workload, one row per provider. The statistics of pytest-benchmark are wall time with a synchronisation; extra_info holds the device
time, its ratio to the bare cuBLAS products, TFLOP/s and the peak of memory. Every provider passes the gate against float64 first. Without CUDA the
same file checks tiny shapes and reports no speed.
"""
import pytest
import torch

from benchmarks import harness
from benchmarks.linear_providers import LINEAR_LOADERS
from benchmarks.linear_workloads import OPERATIONS, LinearWorkload, linear_fault
from benchmarks.providers import load_providers

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")

if CUDA:
    WORKLOADS = [*(LinearWorkload(mode) for mode in OPERATIONS), LinearWorkload(rows=512), LinearWorkload(vocabulary=50257)]
else:
    WORKLOADS = [LinearWorkload(mode, rows=24, hidden=32, vocabulary=257, dtype=dtype) for mode in OPERATIONS for dtype in ("bf16", "fp32")]


@pytest.fixture(scope="module", params=WORKLOADS, ids=lambda workload: workload.name)
def case(request):
    """One workload's inputs, shared by its providers."""
    harness.release()
    return harness.make_linear_case(request.param, DEVICE)


@pytest.fixture(scope="module")
def floor(case):
    """The row of the case's bare matrix products."""
    return harness.measure_floor(case) if CUDA else None


@pytest.mark.parametrize("name", LINEAR_LOADERS)
def test_linear(request, case, floor, name):
    """Passes the gate, then is timed."""
    (provider,) = load_providers(DEVICE, [name], LINEAR_LOADERS)
    missing = provider.why_not(case.workload.operation)
    if missing:
        pytest.skip(missing)
    inputs = case.sets[0]
    _, wrong = linear_fault(case.workload, inputs, case.expected, *harness.linear_step(provider, case, inputs))
    assert not wrong, wrong
    if not CUDA:
        return
    pytest.importorskip("pytest_benchmark")
    benchmark = request.getfixturevalue("benchmark")  # asked for late: on a CPU there is nothing to time
    benchmark.group = case.workload.name
    row = harness.measure_linear(provider, case, floor)
    assert row["status"] == "ok", row["reason"]
    benchmark.extra_info.update(case.workload.as_dict(), provider=name, **row["times"][case.workload.phase], **row["memory"])

    def run():
        harness.linear_step(provider, case, inputs)
        torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=10, warmup_rounds=2)
    harness.release()
