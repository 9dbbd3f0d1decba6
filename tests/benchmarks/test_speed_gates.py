# Checks the gates of the benchmarks: right providers pass, wrong ones get an error and no time.

import json
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cases, linear_cases, processes, providers, suites, timing, work
from fastkl import topk_kl_divergence

CPU = torch.device("cpu")
TINY = cases.Workload(rows=6, vocabulary=97, dtype="fp32")
OFFERS = ["fastkl", "torch", "F.kl_div", "Categorical", "TRL"]
FROM_HIDDEN = ["fastkl, logits kept", "torch chunked", "TRL fused", "torch linear_cross_entropy"]


def measured(operation, function, workload):
    return timing.measure(providers.Provider("theirs", {operation: function}), workload, CPU)


def exact(i):
    return work.plain_kl_divergence(i.p, i.q)[0]


# The gate on logits


# At every operation and mode that they offer; without a GPU no time is given.
@pytest.mark.parametrize("name", [*OFFERS, *FROM_HIDDEN])
def test_right_providers_pass_the_gates(name):
    (provider,) = providers.load_providers(CPU, [name], providers.ALL_LOADERS)
    if provider.missing:
        pytest.skip(provider.missing)
    for workload in suites.SUITES["smoke"].workloads:
        row = timing.measure(provider, workload, CPU)
        offered = workload.operation in provider.operations
        assert row["status"] == ("ok" if offered else "not offered"), row
        assert row["times"] == {} and bool(row["note"]) == offered
        json.dumps(row)


# In the interpreter, in a process of its own: its mean, either way. Triton 3.7's interpreter cannot
# run the kernel of LigerKLDIVLoss.
def liger_statuses():
    (jsd,) = providers.load_providers(CPU, ["Liger JSD"], providers.ALL_LOADERS)
    return [timing.measure(jsd, w, CPU)["status"] for w in suites.SUITES["smoke"].workloads]


def test_liger_computes_what_it_is_measured_at():
    pytest.importorskip("liger_kernel")
    found = processes.INTERPRETER.submit(liger_statuses).result()
    assert set(found) == {"ok", "not offered"} and found.count("ok") >= 5


def spoiled(change):
    return lambda i: (change(exact(i)),)


def tiny(mode):
    return linear_cases.LinearWorkload(mode, rows=12, hidden=16, vocabulary=131)


def kl_of(hidden, weight, ref_hidden, ref_weight):
    return work.plain_kl_divergence(F.linear(hidden, weight), F.linear(ref_hidden, ref_weight))[0]


# Providers of a mean over tokens, of a KL from hidden states.
def mean(function):
    return lambda i: (function(i.hidden, i.weight, i.ref_hidden, i.ref_weight).mean(),)


# Providers of plain statistics with one field changed.
def changed(index, change):
    stats = providers.load_providers(CPU, ["torch"])[0].operations["linear_stats"]
    return lambda i: [change(x) if n == index else x for n, x in enumerate(stats(i))]


WRONG_KL = [
    (lambda i: work.plain_kl_divergence(i.q, i.p), "kl off by"),
    (spoiled(lambda kl: 1.01 * kl), "kl off by"),
    (spoiled(lambda kl: math.nan * kl), "kl off by"),
    (lambda i: (exact(i).detach() + 0 * i.p.sum(-1),), "gradient off by"),
    (lambda i: work.plain_kl_divergence(i.p[:, 1:], i.q[:, 1:]), "off by"),
    (spoiled(torch.sum), "shape"),
    (spoiled(lambda kl: kl + 0.1 * (torch.arange(6) == 4)), "kl off by"),
]
WRONG_MEAN = [
    (spoiled(lambda kl: 1.01 * kl.mean()), "kl off by"),
    # One that sums has no upstream gradient per row: that it raises is as good as being wrong.
    (spoiled(torch.sum), "kl off by"),
    (spoiled(lambda kl: kl.mean().detach() + 0 * kl.sum()), "gradient off by"),
    (spoiled(lambda kl: kl), "shape"),
]
WRONG_LOSS = [
    (lambda h, w, r, v: kl_of(r, v, h, w), "kl off by"),
    (lambda h, w, r, v: kl_of(h, w, r, w), "kl off by"),
    (lambda h, w, r, v: kl_of(h, w, r, v) * 1.01, "kl off by"),
    (lambda h, w, r, v: kl_of(h, w, r, v) * math.nan, "kl off by"),
    (lambda h, w, r, v: kl_of(h, w[1:], r, v[1:]), "off by"),
    (lambda h, w, r, v: kl_of(h, w.detach(), r, v) + 0 * w.sum(), "dweight off by"),
    (lambda h, w, r, v: kl_of(h.detach(), w, r, v) + 0 * h.sum(), "dhidden off by"),
    # A chunk is lost.
    (
        lambda h, w, r, v: torch.cat(
            [kl_of(h[:6], w, r[:6], v), kl_of(h[6:], w.detach(), r[6:], v)]
        ),
        "dweight off by",
    ),
]
# Off by 5 % of itself, or without its gradient; ref_logprob has none: nothing of the reference
# learns.
WRONG_STATS = [
    (changed(n, change), f"{what} off by")
    for n, name in enumerate(linear_cases.FIELDS)
    for change, what in ((lambda field: 1.05 * field, name), (torch.Tensor.detach, "dhidden"))
    if (name, what) != ("ref_logprob", "dhidden")
]
WRONG = {
    TINY: WRONG_KL,
    cases.Workload("mean_kl", 6, 97, "fp32"): WRONG_MEAN,
    cases.Workload("logprob", 6, 97, "fp32"): [
        (lambda i: work.PLAIN["logprob"](i.p, None, (i.tokens + 1) % 97), "off by")
    ],
    cases.Workload("logprob_entropy", 6, 97, "fp32"): [
        (lambda i: work.plain_logprob_entropy(i.p, i.q, i.tokens)[::-1], "off by")
    ],
    cases.Workload("skew_kl_divergence", 6, 97, "fp32"): [
        (lambda i: work.PLAIN["skew_kl_divergence"](i.q, i.p), "skew_kl_divergence off by")
    ],
    cases.Workload(work.TOPK, 6, 97, "fp32", "q"): [
        (lambda i: (topk_kl_divergence(i.q, i.p, i.tokens, tail="ignore"),), f"{work.TOPK} off by")
    ],
    tiny("js"): [(mean(lambda h, w, r, v: kl_of(r, v, h, w) / 4), "loss off by")],
    tiny("loss"): [(mean(function), reason) for function, reason in WRONG_LOSS],
    tiny("stats"): WRONG_STATS,
}


@pytest.mark.parametrize(
    ("workload", "function", "reason"),
    [(workload, *one) for workload, wrong in WRONG.items() for one in wrong],
    ids=lambda value: getattr(value, "operation", None),
)
def test_the_gate_catches_a_wrong_provider(workload, function, reason):
    row = measured(workload.operation, function, workload)
    assert row["status"] in ("wrong", "failed") and reason in row["reason"], row
    assert row["times"] == {} and row["memory"] == {}


@pytest.mark.parametrize("layout", ["rows", "sliced"])
def test_the_gate_of_many_rows(layout, monkeypatch):
    monkeypatch.setattr(cases, "CHECKED_ROWS", 5)
    workload = cases.Workload(rows=64, vocabulary=31, dtype="fp32", layout=layout)
    inputs = cases.make_inputs(workload, CPU)
    known, leading = cases.truth(workload, inputs), inputs.p.shape[:-1]
    flat = torch.arange(64).view(leading)[known["kl"].at].tolist()
    assert flat == [0, 16, 32, 47, 63] and known["gradient"].true.shape == (5, 31)

    def at(row, factor):
        factors = torch.ones(64).index_fill(0, torch.tensor(row), factor).view(leading)
        return measured("kl_divergence", spoiled(lambda kl: kl * factors), workload)

    assert all("kl, worst row off by" in at(row, 1.1)["reason"] for row in flat)
    assert at(1, 1.1)["status"] == "ok", "what is not compared is not seen, unless"
    reason = "kl not finite everywhere; gradient not finite everywhere"
    assert at(1, math.nan)["reason"] == reason and at(1, math.inf)["status"] == "wrong"


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (RuntimeError("no kernel"), "failed", "RuntimeError: no kernel"),
        (timing.NotOfferedError("no gradient"), "missing", "no gradient"),
    ],
)
def test_a_provider_that_raises_or_is_not_there_is_a_row(error, status, reason):
    raises = mock.Mock(side_effect=error)
    row = measured("kl_divergence", raises, TINY)
    assert (row["status"], row["reason"]) == (status, reason)
    row = timing.measure(*providers.load_providers(CPU, ["peer"], {"peer": raises}), TINY, CPU)
    assert (row["status"], row["reason"]) == ("missing", f"{type(error).__name__}: {error}")


def test_bytes_that_have_to_move():
    for operation in cases.OUTPUTS:
        workload = cases.Workload(operation, rows=3, vocabulary=5, dtype="bf16")
        counts = [30, 60, 90] if operation in (*work.ONE_TENSOR, work.TOPK) else [60, 90, 150]
        assert [workload.moved_bytes(phase) for phase in cases.PHASES] == counts


# From hidden states


# A workload in bfloat16, where roundings matter, with plain torch's results and the truth.
@pytest.fixture(scope="module", params=[mode for mode in work.PRODUCTS if mode != "forward"])
def rounded(request):
    workload = linear_cases.LinearWorkload(request.param, rows=256, hidden=128, vocabulary=4096)
    inputs = linear_cases.make_linear_inputs(workload, CPU)
    outputs = providers.load_providers(CPU, ["torch"])[0].operations[workload.operation](inputs)
    return linear_cases.linear_truth(workload, inputs), outputs, work.gradients(inputs, outputs)


# Every row that matters, but for a few that are hard to tell from a rounding.
@pytest.mark.parametrize(
    "change",
    [lambda row, after: 0 * row, lambda row, after: 1.5 * row, lambda row, after: after],
    ids=["zeroed", "half too large", "swapped"],
)
def test_the_gate_catches_one_wrong_row_of_the_gradient(rounded, change):
    known, outputs, (dhidden, *others) = rounded
    assert not cases.fault(known, [*outputs, dhidden, *others])[1]
    size, caught = known["dhidden"].true.norm(dim=-1), []
    for row in range(0, 254, 5):
        if size[row] > 0.1 * size.square().mean().sqrt():
            wrong = dhidden.index_copy(
                0, torch.tensor([row]), change(*dhidden[row : row + 2])[None]
            )
            caught.append(bool(cases.fault(known, [*outputs, wrong, *others])[1]))
    assert len(caught) > 30 and sum(caught) >= len(caught) - 1, (sum(caught), len(caught))


# A GRPO loss whose KL has no gradient: all of the gradient where the ratio is clipped.
def test_the_gate_catches_a_part_that_only_small_rows_have():
    (plain,) = providers.load_providers(CPU, ["torch"])

    def loss(i):
        kl = kl_of(i.hidden, i.weight, i.ref_hidden, i.ref_weight).detach()
        logprob = plain.operations["linear_logprob"](i)[0]
        return (work.grpo_terms(logprob, kl, i.old_logprob, i.advantages).mean(),)

    row = measured("linear_grpo", loss, linear_cases.LinearWorkload("grpo", 256, 128, 4096))
    assert row["reason"].startswith("dhidden, nine of ten rows off by"), row


def products_of(workload, run, *given):
    with FlopCounterMode(display=False) as counter:
        run(*given)
    return counter.get_total_flops() / (2 * workload.rows * workload.hidden * workload.vocabulary)


@pytest.mark.parametrize("mode", work.PRODUCTS)
def test_providers_do_the_work_that_they_declare(mode):
    workload = tiny(mode)
    inputs = linear_cases.make_linear_inputs(workload, CPU)
    names = ["fastkl", "fastkl, logits kept", "torch", "torch chunked"]

    def step(run):
        with torch.set_grad_enabled(bool(inputs.leaves)):
            work.gradients(inputs, run(inputs))

    for provider in providers.load_providers(CPU, names, providers.ALL_LOADERS):
        run = provider.operations.get(workload.operation)
        assert run is None or products_of(workload, step, run) == run.products, provider.name
    for chunk in (12, 8, 5):
        run = linear_cases.bare_products(workload, inputs, chunk)
        assert products_of(workload, run, inputs) == work.PRODUCTS[mode]


def test_the_floor_goes_on_without_the_chunks_that_do_not_fit(monkeypatch):
    times = {8192: torch.OutOfMemoryError(), 4096: [{"median_ms": 3.0}], 2048: [{"median_ms": 2.0}]}
    runs = lambda workload, inputs, chunk: mock.Mock(side_effect=times[chunk])  # noqa: E731
    monkeypatch.setattr(linear_cases, "bare_products", runs)
    monkeypatch.setattr(timing, "timed", lambda run, sets: run())
    monkeypatch.setattr(timing, "_inputs", lambda *_: [None])
    row = timing.measure_floor(linear_cases.LinearWorkload("forward"), CPU, None)
    figures = row["times"]["forward"]
    assert (figures["chunk"], figures["median_ms"]) == (2048, 2.0)
    assert figures["tried"] == {"4096": 3.0, "2048": 2.0}
    assert figures["tflop_per_s"] == pytest.approx(2 * 2 * 8192 * 4096 * 128256 / 2e-3 / 1e12)
