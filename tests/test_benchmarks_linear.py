"""The benchmark of the linear level: wrong providers get no time, the floor is what it says, and the sections survive what fails in them."""
import json
import math
import time
import types

import pytest
import torch
import torch.nn.functional as F
from gpu_cases import Event
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu_suite, harness
from benchmarks.gpu_bars import bars
from benchmarks.gpu_sections import linear_rows, steps
from benchmarks.linear_providers import LINEAR_LOADERS, bare_products, floor_chunks, mean_kl, per_token_kl
from benchmarks.linear_workloads import (
    CLIP,
    CLIP_MARGIN,
    FIELDS,
    OPERATIONS,
    PRODUCTS,
    LinearWorkload,
    answer,
    checked_rows,
    grpo_terms,
    linear_fault,
    make_linear_inputs,
    off_the_clip,
)
from benchmarks.providers import Provider, load_providers, plain_kl_divergence
from benchmarks.workloads import Workload

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_to_release(monkeypatch):
    """The tensors are tiny: collecting garbage after each would take most of the time."""
    monkeypatch.setattr(harness.gc, "collect", lambda: 0)


def tiny(mode, **shape):
    """A workload that the gate checks in milliseconds."""
    return LinearWorkload(mode, **{"rows": 12, "hidden": 16, "vocabulary": 131, **shape})


def row_of(operation, function, mode, **shape):
    """The row of a provider with one operation."""
    return harness.measure_linear(Provider("theirs", {operation: function}), harness.make_linear_case(tiny(mode, **shape), CPU))


def kl_of(hidden, weight, ref_hidden, ref_weight):
    """KL per token, right."""
    return per_token_kl(hidden, weight, ref_hidden, ref_weight, None)[0]


# The gate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", OPERATIONS)
@pytest.mark.parametrize("name", ["fastkl", "torch", "fastkl, through logits", "torch chunked"])
def test_right_providers_pass_the_gate(mode, name):
    for shape in ({"dtype": "bf16"}, {"dtype": "fp32"}, {"dtype": "bf16", "rows": 7, "vocabulary": 300, "hidden": 24}):
        row = harness.measure_linear(*load_providers(CPU, [name], LINEAR_LOADERS), harness.make_linear_case(tiny(mode, **shape), CPU))
        assert row["status"] == "ok", row
        assert row["times"] == {} and row["memory"] == {}, "no speed is reported without a GPU"


@pytest.mark.parametrize(("function", "reason"), [
    (lambda h, w, r, v: kl_of(r, v, h, w), "kl off by"),  # the other direction
    (lambda h, w, r, v: kl_of(h, w, r, w), "kl off by"),  # the policy's weight for both
    (lambda h, w, r, v: kl_of(h, w, r, v) * 1.05, "kl off by"),
    (lambda h, w, r, v: kl_of(h, w, r, v) * math.nan, "kl off by nan"),
    (lambda h, w, r, v: kl_of(h, w[:-1], r, v[:-1]), "off by"),  # forgets the last entry
    (lambda h, w, r, v: kl_of(h, w.detach(), r, v) + 0 * w.sum(), "dweight off by"),  # values and dhidden right
    (lambda h, w, r, v: kl_of(h.detach(), w, r, v) + 0 * h.sum(), "dhidden off by"),
    (lambda h, w, r, v: kl_of(h, w, r, v) + 0.05 * h.sum(-1) - 0.05 * h.sum(-1).detach(), "dhidden off by"),
    (lambda h, w, r, v: torch.cat([kl_of(h[:6], w, r[:6], v), kl_of(h[6:], w.detach(), r[6:], v)]), "dweight off by"),  # one chunk's is lost
], ids=["direction", "one weight", "scaled", "nan", "last entry", "no dweight", "no dhidden", "dhidden shifted", "chunk lost"])
def test_gate_catches_a_wrong_loss(function, reason):
    row = row_of("mean_kl", lambda i: (function(i.hidden, i.weight, i.ref_hidden, i.ref_weight).mean(),), "loss")
    assert row["status"] == "wrong" and reason in row["reason"], row
    assert row["times"] == {} and row["memory"] == {}


@pytest.mark.parametrize("index", range(len(FIELDS)), ids=FIELDS)
def test_gate_catches_each_field(index):
    """One field off by 5 % of itself, or without its gradient, among four that are right."""
    def changed(change):
        def function(i):
            fields = list(stats(i))
            fields[index] = change(fields[index])
            return tuple(fields)
        return function

    stats = load_providers(CPU, ["torch"], LINEAR_LOADERS)[0].operations["token_stats"]
    row = row_of("token_stats", changed(lambda field: 1.05 * field), "stats")
    assert row["status"] == "wrong" and f"{FIELDS[index]} off by" in row["reason"], row
    if FIELDS[index] != "ref_logprob":  # which has none: nothing of the reference learns
        row = row_of("token_stats", changed(torch.Tensor.detach), "stats")
        assert row["status"] == "wrong" and "dhidden off by" in row["reason"] and "dweight off by" in row["reason"], row


def test_gate_catches_one_wrong_token():
    def one_off(i):
        kl = kl_of(i.hidden, i.weight, i.ref_hidden, i.ref_weight)
        return (kl.index_fill(0, torch.tensor(4), 0.0),)

    row = row_of("per_token_kl", one_off, "forward", rows=2048)
    assert row["status"] == "wrong" and row["error"]["kl"] < 0.05 and row["error"]["kl, worst token"] > 0.5, row


ROWWISE = ("loss", "frozen", "stats", "grpo", "distillation", "logprob")


@pytest.fixture(scope="module")
def rounded():
    """(workload, inputs, what the gate compares with, outputs and gradients of plain torch) of each mode in bfloat16, where roundings matter."""
    found = {}
    for mode in ROWWISE:
        case = harness.make_linear_case(LinearWorkload(mode, rows=256, hidden=128, vocabulary=4096), CPU)
        found[mode] = (case.workload, case.sets[0], case.expected, harness.linear_step(load_providers(CPU, ["torch"], LINEAR_LOADERS)[0], case,
                                                                                       case.sets[0]))
    return found


@pytest.mark.parametrize("mode", ROWWISE)
@pytest.mark.parametrize("name", ["fastkl", "torch", "torch chunked"])
def test_rounding_passes_the_gate(rounded, mode, name):
    workload, inputs, known, _ = rounded[mode]
    case = harness.Case(workload, CPU, [inputs])
    errors, wrong = linear_fault(workload, inputs, known, *harness.linear_step(*load_providers(CPU, [name], LINEAR_LOADERS), case, inputs))
    assert not wrong, wrong
    assert set(errors) >= {"dhidden", "dhidden, worst row", "dhidden, nine of ten rows"}


@pytest.mark.parametrize("mode", ROWWISE)
@pytest.mark.parametrize("change", [
    lambda dhidden, row: dhidden.index_fill(0, torch.tensor([row]), 0.0),
    lambda dhidden, row: torch.cat([dhidden[:row], 1.5 * dhidden[row : row + 1], dhidden[row + 1 :]]),
    lambda dhidden, row: torch.cat([dhidden[:row], dhidden[row : row + 2].flip(0), dhidden[row + 2 :]]),
], ids=["zeroed", "half too large", "swapped"])
def test_gate_catches_one_wrong_row_of_the_gradient(rounded, mode, change):
    """Every row that matters: whose norm is a tenth of the root mean square or more. But for a few that are hard to tell from a rounding."""
    workload, inputs, known, (outputs, (dhidden, *others)) = rounded[mode]
    size = known.answer["dhidden"].norm(dim=-1)
    matter = [row for row in range(0, 254, 5) if size[row] > 0.1 * size.square().mean().sqrt()]
    caught = [bool(linear_fault(workload, inputs, known, outputs, (change(dhidden, row), *others))[1]) for row in matter]
    assert len(matter) > 30 and sum(caught) >= len(caught) - 1, (sum(caught), len(caught))


def test_gate_catches_a_part_that_only_small_rows_have(rounded):
    """A GRPO loss whose KL has no gradient: it is all of the gradient where the ratio is clipped, and nothing beside the others."""
    workload, inputs, known, _ = rounded["grpo"]

    def loss(i):
        chosen = load_providers(CPU, ["torch"], LINEAR_LOADERS)[0].operations["logprob"](i)[0]
        return (grpo_terms(chosen, kl_of(i.hidden, i.weight, i.ref_hidden, i.ref_weight).detach(), i.old_logprob, i.advantages).mean(),)

    case = harness.Case(workload, CPU, [inputs], expected=known)
    row = harness.measure_linear(Provider("theirs", {"grpo_loss": loss}), case)
    assert row["status"] == "wrong" and row["error"]["dhidden"] < 0.02 and "dhidden, nine of ten rows off by 1.0e+00" in row["reason"], row


def test_no_token_is_where_the_clip_begins():
    edges = [math.log(1 - CLIP), math.log(1 + CLIP)]
    ratios = torch.cat([torch.linspace(-0.6, 0.6, 4001, dtype=torch.float64), torch.tensor(edges, dtype=torch.float64)])
    moved = off_the_clip(ratios)
    for edge in edges:
        assert ((moved - edge).abs() >= CLIP_MARGIN - 1e-6).all() and ((moved < edge) == (ratios < edge)).all()
    far = torch.stack([(ratios - edge).abs() for edge in edges]).amin(0) >= CLIP_MARGIN
    assert torch.equal(moved[far], ratios[far]) and (moved - ratios).abs().max() <= CLIP_MARGIN + 1e-6
    workload = tiny("grpo", rows=512)
    inputs = make_linear_inputs(workload, CPU)
    difference = answer(workload, inputs, torch.float64)["logprob"] - inputs.old_logprob
    assert min((difference - edge).abs().min() for edge in edges) > CLIP_MARGIN / 3, "nor after the rounding of the logits"


def test_gate_wants_the_shapes():
    row = row_of("mean_kl", lambda i: (kl_of(i.hidden, i.weight, i.ref_hidden, i.ref_weight).mean()[None],), "loss")
    assert row["status"] in ("wrong", "failed") and "shape" in row["reason"], row
    row = row_of("per_token_kl", lambda i: mean_kl(i.hidden, i.weight, i.ref_hidden, i.ref_weight, i.tokens), "forward")
    assert row["status"] == "wrong" and "shapes [()], expected [(12,)]" in row["reason"], row


def test_the_answer_is_autograd_through_all_logits():
    """The block-wise float64 answer against the shortest way to write it, for the mean and for all fields."""
    workload = tiny("loss", vocabulary=200)
    inputs = make_linear_inputs(workload, CPU)
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (inputs.hidden, inputs.weight))
    log_p = F.linear(hidden, weight).log_softmax(-1)
    log_q = F.linear(inputs.ref_hidden.double(), inputs.ref_weight.double()).log_softmax(-1)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    kl.mean().backward()
    found = answer(workload, inputs, torch.float64)
    rows = checked_rows(workload, CPU)
    assert rows[0] == 0 and rows[-1] == 199 and len(rows) == 64
    for name, true in {"kl": kl.detach(), "dhidden": hidden.grad, "dweight": weight.grad[rows]}.items():
        torch.testing.assert_close(found[name], true, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("mode", ["grpo", "distillation"])
def test_the_answer_of_a_whole_loss_is_autograd_through_all_logits(mode):
    workload = tiny(mode, vocabulary=200)
    inputs = make_linear_inputs(workload, CPU)
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (inputs.hidden, inputs.weight))
    log_p = F.linear(hidden, weight).log_softmax(-1)
    log_q = F.linear(inputs.ref_hidden.double(), inputs.ref_weight.double()).log_softmax(-1)
    if mode == "grpo":
        ratio = (log_p.gather(-1, inputs.tokens[:, None])[:, 0] - inputs.old_logprob).exp()
        gain = torch.minimum(ratio * inputs.advantages, ratio.clamp(0.8, 1.2) * inputs.advantages)
        loss = -gain + 0.04 * (log_p.exp() * (log_p - log_q)).sum(-1)
        assert 0 < int((ratio.clamp(0.8, 1.2) != ratio).sum()) < len(ratio), "some are clipped, some not"
    else:
        loss = (log_q.exp() * (log_q - log_p)).sum(-1)
    loss.mean().backward()
    found = answer(workload, inputs, torch.float64)
    for name, true in {"loss": loss.detach(), "dhidden": hidden.grad, "dweight": weight.grad[checked_rows(workload, CPU)]}.items():
        torch.testing.assert_close(found[name], true, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("mode", ["stats", "grpo"])
def test_the_answer_does_not_depend_on_its_blocks(monkeypatch, mode):
    workload = tiny(mode)
    inputs = make_linear_inputs(workload, CPU)
    whole = answer(workload, inputs, torch.float64)
    cut = lambda leading, vocabulary: ((slice(first, first + 5),) for first in range(0, *leading, 5))  # noqa: E731
    monkeypatch.setattr("benchmarks.linear_workloads.row_blocks", cut)
    for name, value in answer(workload, inputs, torch.float64).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-10, atol=1e-14)


def test_inputs_are_those_of_the_mode():
    learning = {mode: len(make_linear_inputs(tiny(mode), CPU).leaves) for mode in OPERATIONS}
    assert learning == {"forward": 0, "loss": 2, "frozen": 1, "stats": 2, "grpo": 2, "distillation": 2, "logprob": 2}
    inputs = make_linear_inputs(LinearWorkload("loss", 256, 64, 1000), CPU)
    logits = F.linear(inputs.hidden.float(), inputs.weight.float())
    assert logits.std().item() == pytest.approx(3, rel=0.1)
    kl = kl_of(inputs.hidden, inputs.weight, inputs.ref_hidden, inputs.ref_weight)
    assert 0.1 < kl.mean().item() < 1


# Products -------------------------------------------------------------------------------------------------------


def products_of(workload, run):
    """How many products of N x H x V a call does."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / (2 * workload.rows * workload.hidden * workload.vocabulary)


@pytest.mark.parametrize("mode", OPERATIONS)
def test_providers_do_the_work_that_they_declare(mode):
    recomputed = {"forward": 2, "loss": 6, "frozen": 5, "stats": 6, "grpo": 6, "distillation": 6, "logprob": 4}
    workload = tiny(mode)
    case = harness.Case(workload, CPU, [make_linear_inputs(workload, CPU)])
    for provider in load_providers(CPU, ["fastkl", "torch", "torch chunked"], LINEAR_LOADERS):
        declared = recomputed[mode] if provider.name == "torch chunked" else PRODUCTS[mode]
        said = provider.note(workload.operation)
        assert (f", {declared} with a frozen weight" if mode == "frozen" else f"{declared} products") in said
        assert products_of(workload, lambda p=provider: harness.linear_step(p, case, case.sets[0])) == declared


@pytest.mark.parametrize("mode", OPERATIONS)
@pytest.mark.parametrize("chunk", [12, 8, 5])
def test_the_floor_is_the_products(mode, chunk):
    workload = tiny(mode)
    inputs = make_linear_inputs(workload, CPU)
    assert products_of(workload, lambda: bare_products(workload, inputs, chunk)(inputs)) == PRODUCTS[mode]
    assert workload.flop == PRODUCTS[mode] * 2 * 12 * 16 * 131


def test_chunks_of_the_floor():
    assert floor_chunks(8192) == (8192, 4096, 2048) and floor_chunks(4096) == (4096, 2048) and floor_chunks(64) == (64,)


def test_the_floor_goes_on_without_the_chunks_that_do_not_fit(monkeypatch):
    def times(sets, run):
        if run == 8192:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"median_ms": {4096: 3.0, 2048: 2.0}[run]}

    monkeypatch.setattr(harness, "bare_products", lambda workload, inputs, chunk: chunk)
    monkeypatch.setattr(harness, "device_time", times)
    case = types.SimpleNamespace(workload=LinearWorkload("forward"), sets=[None])
    row = harness.measure_floor(case)
    figures = row["times"]["forward"]
    assert row["status"] == "ok" and (figures["chunk"], figures["median_ms"]) == (2048, 2.0)
    assert figures["tried"]["8192"].startswith("out of memory") and figures["tried"]["4096"] == 3.0
    assert figures["tflop_per_s"] == pytest.approx(2 * 2 * 8192 * 4096 * 128256 / 2e-3 / 1e12)
    rated = harness.with_rates({"median_ms": 2.1}, case.workload, row)
    assert rated["ratio_to_floor"] == pytest.approx(1.05)


# Rows and sections ----------------------------------------------------------------------------------------------


def test_peers_that_cannot_run_say_why():
    for provider in load_providers(CPU, ["liger", "torch.compile"], LINEAR_LOADERS):
        row = harness.measure_linear(provider, harness.make_linear_case(tiny("loss"), CPU))
        assert row["status"] == "missing" and "GPU" in row["reason"]
    row = row_of("mean_kl", None, "forward")
    assert (row["status"], row["reason"]) == ("missing", "theirs has no per_token_kl")


# On a GPU, and as if on one -------------------------------------------------------------------------------------


@pytest.fixture
def pretended_gpu(monkeypatch):
    """CPU tensors taken for a GPU's: events read the clock, and every call allocates 3 MB."""
    for name, value in {"Event": Event, "synchronize": lambda: None, "_sleep": lambda cycles: None, "reset_peak_memory_stats": lambda: None,
                        "memory_allocated": lambda: 5_000_000, "max_memory_allocated": lambda: 8_000_000}.items():
        monkeypatch.setattr(torch.cuda, name, value, raising=False)

    def no_graph(*_):
        raise RuntimeError("no graph without a GPU")

    monkeypatch.setattr(harness.gc, "freeze", lambda: None)
    monkeypatch.setattr(harness, "SECONDS_PER_PHASE", 0)
    monkeypatch.setattr(harness, "replayed_time", no_graph)
    made, pretended = harness.make_linear_case, types.SimpleNamespace(type="cuda")

    def make_linear_case(workload, device, known=None):
        case = made(workload, CPU, known)
        case.device = device
        return case

    monkeypatch.setattr(harness, "make_linear_case", make_linear_case)
    return pretended


def test_a_section_as_if_on_a_gpu(pretended_gpu, monkeypatch):
    """The path that a GPU takes, from the inputs to the bars: the floor, times, memory, ratios and the table."""
    monkeypatch.setitem(LINEAR_LOADERS, "fastkl", LINEAR_LOADERS["torch"])
    workloads = tuple(tiny(mode) for mode in OPERATIONS)
    plan = steps(workloads, ("fastkl", "torch chunked")) + steps(workloads, ("liger",))
    rows = [row for rows in linear_rows(plan, pretended_gpu, time.monotonic() + 60) for row in rows]
    per_mode = [harness.FLOOR, "fastkl", "torch chunked"]
    assert [row["provider"] for row in rows] == 7 * per_mode + 7 * ["liger"], "the floor of each is measured once"
    assert {row["status"] for row in rows if row["provider"] in per_mode} == {"ok"} and rows[-1]["status"] == "missing"
    for floor, ours in (rows[i : i + 2] for i in range(0, 21, 3)):
        phase = "forward" if ours["workload"]["mode"] == "forward" else "both"
        times, bare = ours["times"][phase], floor["times"][phase]
        assert times["repetitions"] >= 7 and times["wall_ms"] > 0 and times["timed_by"] == "events"
        assert times["ratio_to_floor"] == pytest.approx(times["median_ms"] / bare["median_ms"])
        assert bare["chunk"] == 12 and bare["tried"] == {"12": bare["median_ms"]} and " products" in floor["note"] and " products" in ours["note"]
        returned = {"forward": 4 * 12, "loss": 4 + 2 * 16 * (12 + 131), "frozen": 4 + 2 * 16 * 12, "stats": 5 * 4 * 12 + 2 * 16 * (12 + 131)}
        returned |= {"grpo": returned["loss"], "distillation": returned["loss"], "logprob": 4 * 12 + 2 * 16 * (12 + 131)}
        assert ours["memory"] == {"peak_bytes": 3_000_000, "returned_bytes": returned[ours["workload"]["mode"]]}
    section = {"status": "ok", "seconds": 1, "rows": json.loads(json.dumps(rows))}
    found = bars({"linear": section})
    assert [bar["value"] is not None for bar in found] == [True] * 4
    assert len(gpu_suite.report({"sections": {"linear": section}, "bars": found}).splitlines()) >= len(rows) + 6


def test_logits_as_if_on_a_gpu(pretended_gpu, monkeypatch):
    """The same timing code for two logits tensors: every phase has its figures, and backward is timed without its forward."""
    case = harness.make_case(Workload(rows=4, vocabulary=50), CPU, 1000.0)
    case.device = pretended_gpu
    monkeypatch.setattr(harness, "GRAPH_BELOW_MS", math.inf)
    calls = []
    count = lambda inputs: calls.append("forward") or plain_kl_divergence(inputs.p, inputs.q)  # noqa: E731
    row = harness.measure(Provider("torch", {"kl_divergence": count}), case)
    assert row["status"] == "ok" and set(row["times"]) == set(harness.PHASES) and row["memory"]["peak_bytes"] == 3_000_000, row
    for phase, figures in row["times"].items():
        assert figures["repetitions"] >= 7 and figures["bytes"] == case.workload.moved_bytes(phase)
        assert figures["percent_of_copy"] == pytest.approx(figures["bytes"] / figures["median_ms"] / 1e6 / 10)
        assert (figures["timed_by"], figures["no_graph"]) == ("events", "RuntimeError: no graph without a GPU")
    # the gate, two for the memory, and per phase one call before, a first round, 7 repetitions and 7 calls by the clock
    assert len(calls) == 1 + 2 + 3 * (1 + 1 + 7 + 7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("mode", OPERATIONS)
def test_measure_on_a_gpu(mode):
    case = harness.make_linear_case(LinearWorkload(mode, 64, 128, 1024), torch.device("cuda"))
    floor = harness.measure_floor(case)
    for provider in load_providers(torch.device("cuda"), ["fastkl", "torch", "fastkl, through logits", "torch chunked"], LINEAR_LOADERS):
        row = harness.measure_linear(provider, case, floor)
        assert row["status"] == "ok", row
        figures = row["times"][case.workload.phase]
        assert figures["ratio_to_floor"] == pytest.approx(figures["median_ms"] / floor["times"][case.workload.phase]["median_ms"])
        if provider.name == "torch":
            logits = 64 * 1024 * 2
            assert row["memory"]["peak_bytes"] >= 2 * logits, "plain torch keeps the logits of both models"
        json.dumps([floor, row])
