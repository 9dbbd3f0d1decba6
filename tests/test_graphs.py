"""Short runs timed by CUDA graphs: what is captured and divided by what, that a failure loses no figure, and that a broken context is seen."""
import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import graphs, harness
from benchmarks.providers import Provider, plain_kl_divergence
from benchmarks.record import ROOT
from benchmarks.workloads import Workload

CPU = torch.device("cpu")


class FakeCuda:
    """Stands in for torch.cuda: a clock that runs only where something is replayed, and a log of all that is done."""

    def __init__(self):
        self.now, self.log, self.stream, self.mode = 0.0, [], "outside", "default"

    def install(self, monkeypatch):
        """Replaces what graphs.py and harness.py use of torch.cuda."""
        cuda = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = cuda.now

            def elapsed_time(self, end):
                return end.at - self.at

        class Stream:
            def wait_stream(self, other):
                cuda.log.append(f"side waits for {other}")

        class CUDAGraph:
            def pool(self):
                return f"pool of {self.name}"

            def replay(self):
                cuda.now += self.milliseconds
                cuda.log.append(f"replay {self.name}")

        class Graph:
            def __init__(self, graph, pool=None, stream=None):
                self.graph, self.pool = graph, pool
                assert isinstance(stream, Stream)

            def __enter__(self):
                self.graph.name = f"graph {sum('capture' in entry for entry in cuda.log)}"
                cuda.log.append(f"capture {self.graph.name}, {self.pool}")
                cuda.stream, self.before = "side", cuda.now

            def __exit__(self, kind, *rest):
                self.graph.milliseconds, cuda.now = cuda.now - self.before, self.before
                if kind:
                    raise RuntimeError("operation failed due to a previous error during capture")
                cuda.stream = "outside"

        @contextlib.contextmanager
        def on(stream):
            before, cuda.stream = cuda.stream, "side"
            yield
            cuda.stream = before

        for name, value in {
            "Event": Event, "Stream": Stream, "CUDAGraph": CUDAGraph, "graph": Graph, "stream": on, "current_stream": lambda: cuda.stream,
            "set_stream": lambda stream: setattr(cuda, "stream", stream), "synchronize": lambda: None, "_sleep": lambda cycles: None,
            "set_sync_debug_mode": lambda mode: setattr(cuda, "mode", mode),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value, raising=False)
        return self


@pytest.fixture
def cuda(monkeypatch):
    """A FakeCuda in place of torch.cuda."""
    return FakeCuda().install(monkeypatch)


def working(cuda, milliseconds, name):
    """A run, or what prepares it, of so many milliseconds."""
    def call(inputs, before=None):
        assert cuda.stream == "side"
        cuda.log.append(f"{name} {inputs} {before}" if before else f"{name} {inputs}")
        cuda.now += milliseconds
        return f"prepared {inputs}"
    return call


@pytest.mark.parametrize(("sets", "runs"), [(1, 10), (3, 12), (10, 10), (64, 64)])
def test_a_replay_is_divided_by_its_runs(cuda, sets, runs):
    found = graphs.replayed_time(list(range(sets)), working(cuda, 0.02, "run"), graphs.nothing, 0.2, (7, 40))
    assert found["timed_by"] == "graph" and found["repetitions"] % runs == 0
    assert found["median_ms"] == pytest.approx(0.02) and found["fastest_ms"] == pytest.approx(0.02) == pytest.approx(found["slowest_ms"])
    assert 7 <= found["repetitions"] / runs <= 40
    captured = cuda.log[cuda.log.index("capture graph 0, None"):]
    assert [entry for entry in captured if entry.startswith("run")] == [f"run {i % sets}" for i in range(runs)]
    assert cuda.stream == "outside" and cuda.mode == "default" and cuda.log[0] == "side waits for outside"


def test_what_is_prepared_is_replayed_before_each_and_not_counted(cuda):
    found = graphs.replayed_time([0, 1], working(cuda, 0.02, "run"), working(cuda, 0.5, "prepare"), 0.2, (7, 40))
    assert found["median_ms"] == pytest.approx(0.02)
    assert "capture graph 1, pool of graph 0" in cuda.log, "both out of one pool"
    between = cuda.log[cuda.log.index("capture graph 0, None") + 1 : cuda.log.index("capture graph 1, pool of graph 0")]
    assert between == ["prepare 0", "prepare 1"] * 5
    after = [entry for entry in cuda.log if entry.startswith("run") and "prepared" in entry]
    assert after[-10:] == ["run 0 prepared 0", "run 1 prepared 1"] * 5
    replays = [entry for entry in cuda.log if entry.startswith("replay")]
    assert replays == ["replay graph 0", "replay graph 1"] * (len(replays) // 2)


def test_what_waits_for_the_gpu_is_found_before_a_capture(cuda):
    def waits(inputs, before):
        if cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    events = {"median_ms": 0.01, "timed_by": "events", "repetitions": 40}
    found = harness.short_time(events, [0], waits)
    assert found == {**events, "no_graph": "RuntimeError: called a synchronizing CUDA operation"}
    assert cuda.mode == "default" and not any("capture" in entry for entry in cuda.log)


def test_a_capture_that_fails_leaves_the_figures_and_the_stream(cuda):
    def fails(inputs, before):
        if any("capture" in entry for entry in cuda.log):
            raise ValueError("not while capturing")

    events = {"median_ms": 0.01, "timed_by": "events", "repetitions": 40}
    found = harness.short_time(events, [0], fails)
    assert found == {**events, "no_graph": "RuntimeError: operation failed due to a previous error during capture"}
    assert cuda.stream == "outside"


@pytest.mark.parametrize(("sets", "milliseconds", "repetitions"), [
    (1, 1e-3, 40), (30, 1e-3, 30), (3, 1e-3, 39), (64, 1e-3, 64), (1, 20.0, 10), (3, 90.0, 9)])
def test_events_do_not_overfill_the_queue(cuda, sets, milliseconds, repetitions):
    def run(inputs, before):
        cuda.now += milliseconds

    found = harness.device_time(list(range(sets)), run)
    assert (found["repetitions"], found["timed_by"]) == (repetitions, "events") and found["median_ms"] == pytest.approx(milliseconds)


def test_long_runs_need_no_graph(cuda):
    events = {"median_ms": harness.GRAPH_BELOW_MS, "timed_by": "events"}
    assert harness.short_time(events, [0], None) is events and cuda.log == []
    short = harness.short_time({"median_ms": 0.03, "timed_by": "events", "wall_ms": 1.0}, [0], working(cuda, 0.02, "run"))
    assert short["by_events_ms"] == 0.03 and short["timed_by"] == "graph" and short["median_ms"] == pytest.approx(0.02)


def test_all_phases_have_figures_before_the_first_graph(cuda, monkeypatch):
    """A failing capture may be the last thing that a process does."""
    order = []
    monkeypatch.setattr(harness, "device_time", lambda *_: order.append("events") or {"median_ms": 0.01, "timed_by": "events"})
    monkeypatch.setattr(harness, "wall_time", lambda *_: 1.0)
    monkeypatch.setattr(harness, "memory", lambda *_: {})
    monkeypatch.setattr(harness, "replayed_time", lambda *_: order.append("graph") or {"median_ms": 0.005, "timed_by": "graph"})
    case = harness.make_case(Workload(rows=4, vocabulary=50), CPU, 1000.0)
    case.device = torch.device("cuda")
    row = harness.measure(Provider("torch", {"kl_divergence": lambda i: plain_kl_divergence(i.p, i.q)}), case)
    assert row["status"] == "ok" and order == ["events"] * 3 + ["graph"] * 3
    for phase, figures in row["times"].items():
        assert figures["timed_by"] == "graph" and figures["by_events_ms"] == 0.01 and figures["wall_ms"] == 1.0
        assert figures["gb_per_s"] == pytest.approx(case.workload.moved_bytes(phase) / 0.005 / 1e6)
        assert figures["percent_of_copy"] == pytest.approx(figures["gb_per_s"] / 10)
    assert "(graph)" in harness.summary(row)


def test_context_fault(monkeypatch):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert graphs.context_fault() is None
    monkeypatch.setattr(torch.cuda, "empty_cache", broken)
    assert graphs.context_fault() == "RuntimeError: CUDA error: an illegal memory access was encountered"


# On a GPU -------------------------------------------------------------------------------------------------------

# In a process of its own: a capture that fails would leave this one unfit for the tests after it.
ON_A_GPU = """
import json, torch
from benchmarks import graphs, harness
from benchmarks.providers import load_providers
from benchmarks.workloads import Workload
device, rows = torch.device("cuda"), []
for name in ("fastkl", "torch", "torch.compile"):
    kinds = (("kl_divergence", "p"), ("kl_divergence", "q"), ("mean_kl", "q"), ("token_stats", "p"))
    for operation, wrt in kinds[:1] if name == "torch.compile" else kinds:
        case = harness.make_case(Workload(operation, 8, 4096, wrt=wrt), device, 1000.0)
        rows.append(harness.measure(*load_providers(device, [name]), case))
        harness.release()
waits = harness.short_time({"median_ms": 0.01}, [torch.ones(8, device=device)], lambda inputs, _: inputs.sum().item())
before = graphs.context_fault()
index = torch.full((4,), 10**6, device=device)
try:
    torch.zeros(2, device=device)[index].sum().item()
except Exception:
    pass
print(json.dumps({"rows": rows, "waits": waits, "before": before, "after": graphs.context_fault()}), flush=True)
__import__("os")._exit(0)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_graphs_on_a_gpu():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", ON_A_GPU], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["rows"]) == 9
    for row in found["rows"]:
        assert row["status"] == "ok", row
        for phase, figures in row["times"].items():
            assert figures["timed_by"] == "graph" or figures["median_ms"] >= harness.GRAPH_BELOW_MS, (row["provider"], phase, figures)
            assert 0 < figures["median_ms"] < 1
    assert "synchroniz" in found["waits"]["no_graph"] and found["before"] is None
    assert found["after"], "an index out of range breaks the context, and that is seen"
