"""The sections of the suite in their process: steps share what they can, and what fails in one costs its own rows."""
import json
import time

import torch
from gpu_cases import CPU, OTHER, TINY, WORK, nothing_to_release  # noqa: F401  (a fixture)

from benchmarks import gpu_sections, gpu_suite, harness
from benchmarks.gpu_sections import LEFT_OUT, NO_TIME, AccuracyCase, accuracy_rows, culprit, linear_rows, logits_rows, steps
from benchmarks.linear_providers import LINEAR_LOADERS
from benchmarks.linear_workloads import LinearWorkload
from benchmarks.providers import ALL_LOADERS, LOADERS


def soon():
    """A deadline that the tests do not meet."""
    return time.monotonic() + 60


def load(monkeypatch, loaders, **providers):
    """Puts providers into LOADERS, or what it is called; a provider is {operation: function}, or an exception."""
    for name, operations in providers.items():
        def loader(device, operations=operations):
            if isinstance(operations, Exception):
                raise operations
            return operations
        monkeypatch.setitem(loaders, name, loader)


def flat(batches):
    """(provider, status) of all rows."""
    return [(row["provider"], row["status"]) for rows in batches for row in rows]


def test_rows_of_steps(monkeypatch):
    made, expected = [], harness.make_case
    monkeypatch.setattr(harness, "make_case", lambda workload, *rest: made.append(workload) or expected(workload, *rest))
    load(monkeypatch, ALL_LOADERS, ours={"kl_divergence": WORK}, absent=ImportError("no such peer"), other={"logprob": WORK})
    plan = steps([TINY, OTHER], ["ours", "absent", "other", "ours"])
    batches = list(logits_rows(plan, CPU, soon()))
    assert [len(rows) for rows in batches] == [1] * 8 and made == [TINY, OTHER], "a case serves the steps behind each other"
    assert flat(batches) == [("ours", "ok"), ("absent", "missing"), ("other", "missing"), ("ours", "ok")] * 2
    reasons = [rows[0]["reason"] for rows in batches[:3]]
    assert reasons == [None, "ImportError: no such peer", "other has no kl_divergence"] and batches[0][0]["note"] == "the same work"
    assert all(gpu_suite.line_of(row) and json.dumps(row) for rows in batches for row in rows)
    (left_out,) = next(logits_rows(plan, CPU, soon(), without=["ours"]))
    assert (left_out["status"], left_out["reason"]) == ("missing", LEFT_OUT)


def test_inputs_that_do_not_fit_cost_their_rows(monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.83 GiB")

    made = harness.make_case
    monkeypatch.setattr(harness, "make_case", lambda workload, *rest: no_memory() if workload == OTHER else made(workload, *rest))
    load(monkeypatch, ALL_LOADERS, ours={"kl_divergence": WORK})
    batches = list(logits_rows(steps([OTHER, TINY], ["ours"]), CPU, soon()))
    assert flat(batches) == [("ours", "failed"), ("ours", "ok")] and "7.83 GiB" in batches[0][0]["reason"]


def tiny(mode, **shape):
    """A workload that the gate checks in milliseconds."""
    return LinearWorkload(mode, **{"rows": 12, "hidden": 16, "vocabulary": 131, **shape})


def test_a_linear_section_goes_on_after_an_out_of_memory(monkeypatch):
    """A provider that does not fit costs its own row, a workload that does not fit its own rows."""
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.83 GiB")

    made = harness.make_linear_case
    monkeypatch.setattr(harness, "make_linear_case", lambda workload, *rest: no_memory() if workload.rows > 20 else made(workload, *rest))
    load(monkeypatch, LINEAR_LOADERS, large={"mean_kl": no_memory})
    plan = steps((tiny("loss"), tiny("loss", rows=21), tiny("frozen")), ("large", "torch"))
    batches = list(linear_rows(plan, CPU, soon()))
    assert flat(batches) == [("large", "failed"), ("torch", "ok"), ("large", "failed"), ("torch", "failed"), ("large", "failed"), ("torch", "ok")]
    rows = [row for rows in batches for row in rows]
    assert all("OutOfMemoryError: CUDA out of memory" in row["reason"] for row in rows if row["status"] == "failed")
    assert len(harness.linear_table(rows)) == 7 and json.dumps(rows)


def test_what_the_gate_compares_with_is_made_once(monkeypatch):
    made, given = harness.make_linear_case, []
    monkeypatch.setattr(harness, "make_linear_case", lambda workload, device, known: given.append(known) or made(workload, device, known))
    plan = steps((tiny("loss"), tiny("grpo")), ("torch",)) + steps((tiny("loss"), tiny("grpo")), ("torch chunked",))
    assert flat(linear_rows(plan, CPU, soon())) == [("torch", "ok")] * 2 + [("torch chunked", "ok")] * 2
    assert given[:2] == [None, None] and [list(known.answer)[0] for known in given[2:]] == ["kl", "loss"]


def test_past_the_deadline_rows_say_so():
    kinds = {logits_rows: steps([TINY, OTHER], ["torch"]), linear_rows: steps([tiny("loss"), tiny("forward")], ["torch"]),
             accuracy_rows: steps([AccuracyCase("fp32", 1e-8)], ["all"])}
    for runner, plan in kinds.items():
        rows = [row for rows in runner(plan, CPU, 0) for row in rows]
        assert [row["reason"] for row in rows] == [NO_TIME] * len(plan) and len(rows) == len(plan)
        assert all(row["reason"] in gpu_suite.line_of(row) for row in rows)


def test_accuracy_rows(monkeypatch):
    pair = gpu_sections.accuracy.make_pair
    monkeypatch.setattr(gpu_sections.accuracy, "make_pair", lambda *arguments: pair(*arguments[:3], 2, 503, CPU))
    for name in set(LOADERS) - {"torch", "fastkl"}:
        monkeypatch.delitem(LOADERS, name)
    (records,) = accuracy_rows(steps([AccuracyCase("fp32", 1e-2)], ["all"]), CPU, soon(), without=["torch"])
    assert [record["target"] for record in records] == [1e-2] * 4 and len({record["distribution"] for record in records}) == 4
    assert all(record["errors"]["torch"] == {"reason": LEFT_OUT} and record["errors"]["fastkl"]["worst_relative"] < 1e-3 for record in records)


def test_culprit_is_the_first_whose_error_stays():
    fine, broken = {"worst_relative": 1e-6}, {"reason": "AcceleratorError: CUDA error: an illegal memory access was encountered"}
    late = {**fine, "gradient_reason": "RuntimeError: CUDA error: unspecified launch failure"}
    records = [{"errors": {"fastkl": fine, "torch": {"reason": "OutOfMemoryError: CUDA out of memory"}}},
               {"errors": {"fastkl": fine, "torch": late, "TRL": broken}}, {"errors": {"fastkl": broken}}]
    assert culprit(records) == "torch" and culprit(records[:1]) is None and culprit([{"skipped": "rounding", "errors": {}}]) is None
