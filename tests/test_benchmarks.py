"""The benchmarks' own promises: a wrong provider gets no time, figures are written whole or not at all."""
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import accuracy, harness, record, workloads
from benchmarks.peers import NotOfferedError
from benchmarks.providers import LOADERS, Provider, load_providers, plain_kl_divergence, plain_logprob, plain_logprob_entropy
from benchmarks.workloads import DIFFERENTIATED, ONE_TENSOR, Workload, errors, finite, make_inputs, row_blocks, truth

CPU = torch.device("cpu")
TINY = Workload("kl_divergence", rows=6, vocabulary=97, dtype="fp32")


def provider(function, name="theirs"):
    """A provider of kl_divergence only."""
    return Provider(name, {"kl_divergence": lambda inputs: (function(inputs.p, inputs.q),)})


def exact(p, q):
    return plain_kl_divergence(p, q)[0]


# The gate -------------------------------------------------------------------------------------------------------


def sides(operation):
    """The arguments that the gradient of an operation is measured to."""
    return "p" if operation in ONE_TENSOR or operation == "token_stats" else "pq"


@pytest.mark.parametrize("operation", DIFFERENTIATED)
@pytest.mark.parametrize("name", ["torch", "fastkl"])
@pytest.mark.parametrize("layout", ["rows", "sliced"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_right_providers_pass_the_gate(operation, name, layout, dtype):
    for wrt in sides(operation):
        workload = Workload(operation, rows=16, vocabulary=131, dtype=dtype, wrt=wrt, layout=layout)
        row = harness.measure(*load_providers(CPU, [name]), harness.make_case(workload, CPU))
        assert row["status"] == "ok", row
        assert row["times"] == {}, "no speed is reported without a GPU"
        assert row["note"] and "\n" not in row["note"]


@pytest.mark.parametrize("name", ["F.kl_div", "F.kl_div on probabilities", "Categorical", "TRL"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_peers_pass_the_gate_or_say_why_not(name, dtype):
    (peer,) = load_providers(CPU, [name])
    if peer.missing:
        pytest.skip(peer.missing)
    for operation in ("kl_divergence", "mean_kl", "logprob", "logprob_entropy", "entropy"):
        for layout in ("rows", "sliced"):
            for wrt in sides(operation):
                workload = Workload(operation, rows=16, vocabulary=131, dtype=dtype, wrt=wrt, layout=layout)
                row = harness.measure(peer, harness.make_case(workload, CPU))
                assert row["status"] == ("ok" if operation in peer.operations else "missing"), row
                assert row["note"] == peer.note(operation) and bool(row["note"]) == (row["status"] == "ok")
    assert peer.why_not("token_stats") == f"{name} has no token_stats"


@pytest.mark.parametrize(("function", "reason"), [
    (lambda p, q: exact(q, p), "values off by"),  # the other direction
    (lambda p, q: exact(p, q) * 1.01, "values off by"),
    (lambda p, q: exact(p, q) * math.nan, "values off by"),
    (lambda p, q: exact(p, q).detach() + 0 * p.sum(-1), "gradient off by"),  # right values, no gradient
    (lambda p, q: exact(p[:, :-1], q[:, :-1]), "off by"),  # forgets the last entry
    (lambda p, q: exact(p, q).sum(), "shape"),
], ids=["direction", "scaled", "nan", "no gradient", "last entry", "summed"])
def test_gate_catches_a_wrong_provider(function, reason):
    row = harness.measure(provider(function), harness.make_case(TINY, CPU))
    # A provider that sums has no per-row upstream gradient to take; that it raises is as good as being wrong.
    assert row["status"] in ("wrong", "failed"), row
    assert reason in row["reason"]
    assert row["times"] == {} and row["memory"] == {}


def interpreted(code):
    """The output of code with the kernels in Triton's interpreter, in a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(record.ROOT)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=record.ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_liger_computes_what_it_is_measured_at():
    """Its mean over the tokens in both directions, and the log-probability out of its GRPO loss with the gradient of a slice."""
    pytest.importorskip("liger_kernel")
    out = interpreted("""
import json, torch
from benchmarks import harness
from benchmarks.providers import ALL_LOADERS, load_providers
from benchmarks.workloads import Workload
cpu = torch.device("cpu")
jsd, grpo = load_providers(cpu, ["Liger JSD", "Liger GRPO"], ALL_LOADERS)
workloads = [(jsd, Workload("mean_kl", 16, 131, dtype, wrt, layout)) for wrt in "pq" for dtype in ("bf16", "fp32") for layout in ("rows", "sliced")]
workloads += [(grpo, Workload("logprob", 16, 131, dtype, layout=layout)) for dtype in ("bf16", "fp32") for layout in ("sliced", "rows")]
rows = [harness.measure(provider, harness.make_case(workload, cpu)) for provider, workload in workloads]
print(json.dumps([[row["workload"]["layout"], row["provider"], row["status"], row["reason"]] for row in rows]))
""")
    for layout, name, status, reason in json.loads(out.splitlines()[-1]):
        if (name, layout) == ("Liger GRPO", "rows"):
            assert status == "missing" and "[B, L + 1, V]" in reason
        else:
            assert status == "ok", (layout, name, reason)


@pytest.mark.parametrize("change", [lambda kl: kl * 1.01, lambda kl: kl.detach() + 0 * kl, lambda kl: kl * kl.numel(), lambda kl: kl * math.nan],
                         ids=["scaled", "no gradient", "sum", "nan"])
def test_gate_of_a_mean(change):
    workload = Workload("mean_kl", rows=6, vocabulary=97, dtype="fp32")
    right = Provider("theirs", {"mean_kl": lambda i: (exact(i.p, i.q).mean(),)})
    wrong = Provider("theirs", {"mean_kl": lambda i: (change(exact(i.p, i.q)).mean(),)})
    case = harness.make_case(workload, CPU)
    assert harness.measure(right, case)["status"] == "ok"
    row = harness.measure(wrong, case)
    assert row["status"] == "wrong" and "off by" in row["reason"], row
    each = Provider("theirs", {"mean_kl": lambda i: (exact(i.p, i.q),)})
    assert "shape" in harness.measure(each, case)["reason"], "a KL of each token is no mean"


def test_gate_catches_one_wrong_row():
    def one_row_off(p, q):
        kl = exact(p, q)
        return kl + torch.zeros_like(kl).index_fill_(0, torch.tensor(4), 0.1)

    row = harness.measure(provider(one_row_off), harness.make_case(TINY, CPU))
    assert row["status"] == "wrong" and row["error"]["values"] > 1e-2 and row["error"]["gradient"] < 1e-5


@pytest.mark.parametrize("layout", ["rows", "sliced"])
def test_gate_of_many_rows(layout, monkeypatch):
    """Some rows are compared, the first and the last among them; all the others have to be finite; the answer is computed once."""
    monkeypatch.setattr(workloads, "CHECKED_ROWS", 5)
    workload = Workload(rows=64, vocabulary=31, dtype="fp32", layout=layout)
    case = harness.make_case(workload, CPU)
    inputs, computed = case.sets[0], []
    monkeypatch.setattr(harness, "truth", lambda *given: computed.append(1) or truth(*given))
    known = truth(workload, inputs)
    flat = [int(row) for row in torch.arange(64).view(inputs.p.shape[:-1])[known.rows]]
    assert flat == [0, 16, 32, 47, 63] and known.gradient.shape == (5, 31) and known.gradient.dtype == torch.float32

    def spoiled(row, value):
        def function(p, q):
            kl = exact(p, q)
            return kl * torch.ones(64).index_fill(0, torch.tensor(row), value).view(kl.shape)
        return harness.measure(provider(function), case)

    for row in flat:
        assert "values off by" in spoiled(row, 1.1)["reason"]
    unchecked = next(row for row in range(64) if row not in flat)
    assert spoiled(unchecked, 1.1)["status"] == "ok", "what is not compared is not seen, unless"
    assert spoiled(unchecked, math.nan)["reason"] == "values not finite everywhere; gradient not finite everywhere"
    assert spoiled(unchecked, math.inf)["status"] == "wrong" and len(computed) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_finite(dtype):
    values = torch.zeros(3, 50, dtype=dtype)
    values[0, 0] = torch.finfo(dtype).max
    assert finite(values) and finite(values[:, ::2]) and finite(values[0, 0])
    for bad in (math.nan, math.inf, -math.inf):
        values[2, 40] = bad
        assert not finite(values) and finite(values[:2])


def test_the_truth_of_a_mean_is_that_of_all_rows(monkeypatch):
    monkeypatch.setattr(workloads, "CHECKED_ROWS", 3)
    workload = Workload("mean_kl", rows=16, vocabulary=53, dtype="fp32", wrt="q", layout="sliced")
    inputs = make_inputs(workload, CPU)
    q = inputs.q.detach().double().requires_grad_()
    mean = exact(inputs.p.double(), q).mean()
    (gradient,) = torch.autograd.grad(mean, q)
    known = truth(workload, inputs)
    torch.testing.assert_close(known.outputs[0], mean.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(known.gradient.double(), gradient[known.rows], rtol=1e-6, atol=1e-12)


def test_a_provider_that_raises_is_a_row():
    def broken(p, q):
        raise RuntimeError("no such kernel")

    row = harness.measure(provider(broken), harness.make_case(TINY, CPU))
    assert (row["status"], row["reason"]) == ("failed", "RuntimeError: no such kernel")
    assert "failed: RuntimeError: no such kernel" in harness.summary(row)

    def refuses(p, q):
        raise NotOfferedError("no gradient to p")

    row = harness.measure(provider(refuses), harness.make_case(TINY, CPU))
    assert (row["status"], row["reason"]) == ("missing", "no gradient to p")


def test_missing_providers_say_why(monkeypatch):
    def load(device):
        raise ImportError("No module named 'peer'")

    monkeypatch.setitem(LOADERS, "peer", load)
    (peer,) = load_providers(CPU, ["peer"])
    row = harness.measure(peer, harness.make_case(TINY, CPU))
    assert (row["status"], row["reason"]) == ("missing", "ImportError: No module named 'peer'")
    row = harness.measure(provider(exact), harness.make_case(Workload("token_stats", rows=2, vocabulary=5), CPU))
    assert (row["status"], row["reason"]) == ("missing", "theirs has no token_stats")


def test_blocks_cover_every_row_once():
    for leading in ((7,), (3, 5)):
        counts = torch.zeros(leading)
        for block in row_blocks(leading, vocabulary=10, limit=20):
            counts[block] += 1
            assert counts[block].numel() <= 2
        assert (counts == 1).all()


def test_errors_are_those_of_the_worst_row():
    inputs = make_inputs(TINY, CPU)
    true = exact(inputs.p.detach().double().requires_grad_(), inputs.q.double())
    outputs = (true.detach() * torch.tensor([1, 1, 1, 1.25, 1, 1]),)
    found = errors(TINY, outputs, torch.zeros_like(inputs.p), truth(TINY, inputs))
    assert found["values"] == pytest.approx(0.25, rel=1e-6)
    assert found["gradient"] == pytest.approx(1)


def test_bytes_that_have_to_move():
    for operation in ("kl_divergence", "mean_kl", "token_stats"):
        workload = Workload(operation, rows=3, vocabulary=5, dtype="bf16")
        assert [workload.moved_bytes(phase) for phase in harness.PHASES] == [60, 90, 150]


def test_one_tensor_operations():
    workload = Workload("logprob_entropy", rows=3, vocabulary=5, dtype="bf16")
    assert [workload.moved_bytes(phase) for phase in harness.PHASES] == [30, 60, 90]
    assert make_inputs(workload, CPU).q.numel() == 0 and len(make_inputs(workload, CPU).upstream) == 2
    workload = Workload("entropy", rows=3, vocabulary=5, dtype="bf16")
    assert workload.moved_bytes("both") == 90 and len(make_inputs(workload, CPU).upstream) == 1
    with pytest.raises(ValueError, match="wrt: expected 'p'"):
        Workload("logprob", wrt="q")


@pytest.mark.parametrize(("operation", "function"), [
    ("logprob", lambda i: (i.p.log_softmax(-1).gather(-1, (i.tokens + 1)[:, None] % 97)[:, 0],)),  # another token
    ("logprob_entropy", lambda i: plain_logprob_entropy(i.p, i.tokens)[::-1]),
    ("logprob_entropy", lambda i: (*plain_logprob(i.p, i.tokens), plain_logprob_entropy(i.p, i.tokens)[1].detach() + 0 * i.p.sum(-1))),
], ids=["token", "order", "no gradient"])
def test_gate_of_one_tensor_operations(operation, function):
    workload = Workload(operation, rows=6, vocabulary=97, dtype="fp32")
    row = harness.measure(Provider("theirs", {operation: function}), harness.make_case(workload, CPU))
    assert row["status"] == "wrong" and "off by" in row["reason"]


def test_inputs_are_random_and_repeatable():
    workload = Workload(rows=16, vocabulary=50, layout="sliced")
    first, again, other = (make_inputs(workload, CPU, seed) for seed in (0, 0, 1))
    assert first.p.shape == (8, 2, 50) and not first.p.is_contiguous()
    assert first.p.requires_grad and not first.q.requires_grad
    assert torch.equal(first.p, again.p) and torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.p, other.p)


# Accuracy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", accuracy.DISTRIBUTIONS)
@pytest.mark.parametrize("target", [1e-7, 1e-3, 1e1])
def test_pairs_have_the_kl_they_are_asked_for(distribution, target):
    p, q, truth = accuracy.make_pair(distribution, "fp32", target, 3, 1009, CPU)
    assert truth.median().item() == pytest.approx(target, rel=0.1)
    plain = exact(p.double(), q.double())
    assert torch.allclose(truth, plain, rtol=1e-7, atol=1e-13)


def test_accuracy_records():
    records = list(accuracy.accuracy(load_providers(CPU, ["torch", "fastkl"]), CPU, rows=2, vocabulary=1009, targets=(1e-6, 1.0)))
    assert len(records) == 2 * 4 * 2
    measured = [r for r in records if not r["skipped"]]
    assert measured and all(set(r["errors"]) == {"torch", "fastkl"} for r in measured)
    assert all(r["errors"]["fastkl"]["worst_relative"] < 1e-3 and not r["errors"]["fastkl"]["negative"] for r in measured)
    assert [r for r in records if r["skipped"]], "bf16 cannot hold a KL of 1e-6 between logits 50 apart"
    assert all(accuracy.summary(r) for r in records)


def test_accuracy_bar():
    def case(ours, torch_error, negative=0):
        return {"skipped": None, "errors": {"fastkl": {"worst_relative": ours, "negative": negative}, "torch": {"worst_relative": torch_error}}}

    fine = [case(1e-5, 1e-6), case(1e-3, 1e-2), {"skipped": "rounding", "errors": {}}]
    bad = [case(3e-4, 1e-4), case("nan", 1.0), case(1e-6, 1e-6, negative=1), {"skipped": None, "errors": {"fastkl": {"reason": "OutOfMemoryError"}}}]
    assert accuracy.not_worse(fine + bad) == bad


# Results --------------------------------------------------------------------------------------------------------


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "new" / "results.json"
    record.write_json(file, {"a": 1, "inf": [math.inf, math.nan, (1.5,)]})
    assert json.loads(file.read_text()) == {"a": 1, "inf": ["inf", "nan", [1.5]]}
    with pytest.raises(TypeError):
        record.write_json(file, {"a": object()})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        record.write_json(file, {"a": 2})
    assert json.loads(file.read_text())["a"] == 1
    assert [path.name for path in file.parent.iterdir()] == ["results.json"], "nothing half-written stays behind"


def test_provenance():
    origin = record.provenance("python -m benchmarks.x")
    assert set(origin) == {"command", "commit", "date", "python", "versions"}
    assert origin["versions"]["torch"] and origin["commit"]


def test_commit_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("FASTKL_COMMIT", raising=False)
    assert record.commit() == "unknown"
    monkeypatch.setenv("FASTKL_COMMIT", "0123abc")
    assert record.commit() == "0123abc"


def test_row_schema():
    row = harness.measure(provider(exact), harness.make_case(TINY, CPU))
    assert set(row) == {"workload", "provider", "status", "reason", "note", "error", "times", "memory"}
    assert row["workload"]["name"] == TINY.name and set(row["error"]) == {"values", "gradient"}
    json.dumps(row)


# On a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("operation", DIFFERENTIATED)
def test_measure_on_a_gpu(operation, monkeypatch):
    monkeypatch.setattr(harness, "GRAPH_BELOW_MS", 0)  # tests/test_graphs.py captures graphs in a process of its own
    device = torch.device("cuda")
    copy = harness.copy_bandwidth(device, size=2**26, repetitions=3)
    assert copy["gb_per_s"] > 0
    for wrt in sides(operation):
        case = harness.make_case(Workload(operation, rows=32, vocabulary=1024, wrt=wrt, layout="sliced"), device, copy["gb_per_s"])
        assert len(case.sets) > 1, "inputs rotate until they exceed the L2 cache"
        for measured in load_providers(device, ["fastkl", "torch"]):
            row = harness.measure(measured, case)
            assert row["status"] == "ok", row
            assert set(row["times"]) == set(harness.PHASES)
            assert all(figures["timed_by"] == "events" and figures["median_ms"] > 0 for figures in row["times"].values())
            assert row["memory"]["peak_bytes"] >= row["memory"]["gradient_bytes"]
            json.dumps(row)
