"""Speed of the operations on logits beside plain torch, torch.compile and peers.

    python -m pytest benchmarks/bench_divergence.py

One group per workload and phase, one row per provider. The statistics of pytest-benchmark are wall time with a synchronisation; extra_info holds the
device time, the bytes that have to move and the percent of a copy's bandwidth. Every provider passes the gate against float64 first. Without CUDA the
same file checks tiny shapes and reports no speed.
"""
import pytest
import torch

from benchmarks import harness
from benchmarks.peers import NotOfferedError
from benchmarks.providers import ALL_LOADERS, load_providers
from benchmarks.workloads import Workload

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")

if CUDA:
    WORKLOADS = [
        Workload("kl_divergence", wrt="p"),
        Workload("kl_divergence", wrt="q"),
        Workload("kl_divergence", dtype="fp32"),
        Workload("kl_divergence", vocabulary=50257),  # odd: every row starts at another alignment
        Workload("kl_divergence", rows=64),
        Workload("mean_kl", wrt="p"),
        Workload("mean_kl", wrt="q"),
        Workload("token_stats"),
        Workload("logprob"),
        Workload("logprob", layout="sliced"),
        Workload("logprob_entropy"),
        Workload("entropy"),
    ]
else:
    WORKLOADS = [
        Workload("kl_divergence", rows=3, vocabulary=1000, wrt="p"),
        Workload("kl_divergence", rows=16, vocabulary=257, wrt="q", dtype="fp32", layout="sliced"),
        Workload("mean_kl", rows=3, vocabulary=1000, wrt="p"),
        Workload("mean_kl", rows=16, vocabulary=257, wrt="q", layout="sliced"),
        Workload("token_stats", rows=3, vocabulary=1000),
        Workload("logprob", rows=3, vocabulary=1000),
        Workload("logprob_entropy", rows=3, vocabulary=1000),
        Workload("entropy", rows=3, vocabulary=1000),
    ]


@pytest.fixture(scope="module")
def copy_gb_per_s():
    """What a copy reaches on this machine, now."""
    return harness.copy_bandwidth(DEVICE)["gb_per_s"] if CUDA else None


@pytest.fixture(scope="module", params=WORKLOADS, ids=lambda workload: workload.name)
def case(request, copy_gb_per_s):
    """One workload's inputs, shared by its providers and phases."""
    harness.release()
    return harness.make_case(request.param, DEVICE, copy_gb_per_s)


@pytest.fixture(scope="module", params=ALL_LOADERS)
def provider(request, case):
    """A provider that has passed the gate on the case."""
    (loaded,) = load_providers(DEVICE, [request.param], ALL_LOADERS)
    missing = loaded.why_not(case.workload.operation)
    if missing:
        pytest.skip(missing)
    try:
        _, wrong = harness.gate(loaded, case)
    except NotOfferedError as error:
        pytest.skip(str(error))
    assert not wrong, wrong
    return loaded


@pytest.mark.parametrize("phase", harness.PHASES)
def test_divergence(request, case, provider, phase):
    """Times one phase; the provider's fixture is the check of correctness."""
    if not CUDA:
        return
    pytest.importorskip("pytest_benchmark")
    benchmark = request.getfixturevalue("benchmark")  # asked for late: on a CPU there is nothing to time
    benchmark.group = f"{case.workload.name} {phase}"
    result = harness.time_phase(provider, case, phase)
    benchmark.extra_info.update(case.workload.as_dict(), provider=provider.name, **result)
    inputs = case.sets[0]

    def setup():
        outputs = harness.forward(provider, case, inputs) if phase == "backward" else None
        torch.cuda.synchronize()
        return (outputs,), {}

    def run(outputs):
        if phase != "backward":
            outputs = harness.forward(provider, case, inputs)
        if phase != "forward":
            harness.backward(case, inputs, outputs)
        torch.cuda.synchronize()

    benchmark.pedantic(run, setup=setup, rounds=10, warmup_rounds=2)
