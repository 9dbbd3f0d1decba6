"""What a candidate goes through: processes that check it, the check itself on the kernels in Triton's interpreter, and its times."""

import dataclasses
import json
import os
import subprocess
import sys
import time
import types

import pytest

pytest.importorskip("triton")

from benchmarks import tune, tune_trials, workers  # noqa: E402
from benchmarks.record import ROOT  # noqa: E402
from benchmarks.tune_trials import Job, Verdict  # noqa: E402
from fastkl.kernels import config, launch  # noqa: E402

PRESENT = config.RowConfig(128, 4, 32768, "measured before")
FORWARD, BACKWARD = (tune_trials.timed_variants(direction, "bf16", 128256)[0] for direction in tune.DIRECTIONS)


def test_the_variants():
    """What is timed is what is weighted; an entry is for every type of its size, every placement, a soft cap and all gradients."""
    assert {direction: set(weights) for direction, weights in tune.WEIGHTS.items() if direction != "rows"} == \
        {direction: set(operations) for direction, operations in tune_trials.TIMED.items()}
    for direction in tune.DIRECTIONS:
        variants = tune_trials.all_variants(direction, "bf16")
        seen = {(one.fields, side, one.dtype, placement, one.softcap > 0) for one in variants for side in one.wrt for placement in one.placements}
        assert {(fields, side, dtype, placement, capped) for fields in (("kl",), launch.FIELDS) for side in "pq" for dtype in ("bf16", "fp16")
                for placement in ("aligned", "misaligned") for capped in (False, True)} <= seen
        assert {(fields, "q", "bf16", "apart", False) for fields in (("kl",), launch.FIELDS)} <= seen
        assert {one.wrt for one in variants} == ({"pq"} if direction == "forward" else {"p", "q", "pq"})
        assert {one.dtype for one in tune_trials.all_variants(direction, "fp16")} == {"bf16", "fp16"}
        assert len({one.name for one in variants}) == len(variants)
        assert {one.dtype for one in tune_trials.all_variants(direction, "fp32")} == {"fp32"}
    assert tune_trials.timed_variants("backward", "bf16", 128256)[1].name == "kl_divergence dq bf16 aligned"
    assert {one.placements for one in tune_trials.timed_variants("forward", "bf16", 50257)} == {("misaligned",)}


# The processes --------------------------------------------------------------------------------------------------


def answer_job(job):
    """What a worker of the next tests does with a job."""
    if job.direction == "crash":
        os._exit(7)
    if job.direction == "hang":
        time.sleep(600)
    return Verdict(f"{job.direction} by {os.getpid()}", fatal=job.direction == "fatal")


def a_job(name):
    """A job for it."""
    return Job(name, PRESENT, FORWARD, 300, "cpu")


def begin_badly():
    """An initialisation that fails."""
    raise RuntimeError("no context")


def test_a_process_that_ends_or_hangs_costs_its_job(monkeypatch):
    pool = workers.Workers(answer_job, tune_trials.failed, 2, begin_badly)
    try:
        jobs = [a_job(name) for name in ("one", "crash", "two", "fatal", "three", "four")]
        answers = {job.direction: verdict.refused for job, verdict in pool.run(iter(jobs))}
        assert answers["crash"] == "kl_divergence bf16 aligned: its process ended with exit code 7"
        assert all(answers[name].startswith(f"{name} by ") for name in ("one", "two", "fatal", "three", "four"))
        process = answers["fatal"].split()[-1]
        assert process not in (answers["four"].split()[-1], str(os.getpid())), "what a fatal answer leaves is not used again"
        # From the deadline on none is begun; what still runs is given up when the grace is over, or waited for.
        assert list(pool.run(jobs, deadline=time.monotonic())) == []
        assert len(list(pool.run(jobs[:1] * 2))) == 2  # both have begun
        begun, some = time.monotonic(), [a_job("hang"), a_job("five")]
        assert [job.direction for job, _ in pool.run(some, begun + 1, grace=0.5)] == ["five"] and 1.5 < time.monotonic() - begun < 20
        with monkeypatch.context() as patched:
            patched.setattr(workers, "JOB_SECONDS", 0.2)
            assert [verdict.refused for _, verdict in pool.run(some[:1])] == ["kl_divergence bf16 aligned: no answer in 0 s"]
        pool._workers[0].process.kill()  # while it has nothing to do
        pool._workers[0].process.join()
        assert len([verdict for _, verdict in pool.run(jobs[:1] * 3) if verdict.refused.startswith("one by")]) == 3
    finally:
        pool.close()
    assert not any(worker.process.is_alive() for worker in pool._workers)


def test_a_check_that_raises_is_an_answer(monkeypatch):
    """The compiler's and the GPU's errors are the candidate's; whether the process can go on is looked at."""
    def raises(job):
        raise ValueError("out of\nresource")

    monkeypatch.setattr(tune_trials, "_fault", raises)
    job = Job("forward", PRESENT, FORWARD, 300, "cpu")
    assert tune_trials.check(job) == Verdict("kl_divergence bf16 aligned: ValueError: out of resource")
    assert tune_trials.check(dataclasses.replace(job, device="cuda:77")).fatal
    assert config.select("forward", "sm_90", 2, 128256) != PRESENT, "the table is as before"


def test_registers_and_spills_are_those_of_what_was_compiled(monkeypatch):
    """Of the direction's kernels, in this job, the most of any; Triton counts spills in words."""
    cache = {"earlier": types.SimpleNamespace(n_spills=9, n_regs=255)}
    monkeypatch.setattr(launch, "row_backward", types.SimpleNamespace(device_caches={0: (cache, {}, None)}))

    def compiles(job):
        cache["first"], cache["second"] = types.SimpleNamespace(n_spills=0, n_regs=90), types.SimpleNamespace(n_spills=2, n_regs=64)

    monkeypatch.setattr(tune_trials, "_fault", compiles)
    job = Job("backward", PRESENT, BACKWARD, 300, "cpu")
    assert tune_trials.check(job) == Verdict(None, spilled=8, registers=90)
    monkeypatch.setattr(tune_trials, "_fault", lambda job: None)
    assert tune_trials.check(job) == Verdict(None)


# The check and the times, on the kernels ------------------------------------------------------------------------


def interpreted(code):
    """Run code with the kernels in Triton's interpreter, in a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_the_check_runs_the_candidate():
    """In the interpreter: a configuration passes; one that computes something else, or other bits for a row alone or elsewhere, does not."""
    right, used, capped, apart, bits, place, wrong, saved, gradient, gradient_bits, unwritten = interpreted("""
import torch
from benchmarks.tune_trials import ALL, CHECKED_ROWS, KL, SOFTCAP, Job, Variant, check
from fastkl import _rows
from fastkl.kernels import config, launch
def run(direction, variant=Variant(KL, KL, "p", "fp32", ("aligned",))):
    return check(Job(direction, config.RowConfig(64, 2, 512, ""), variant, 300, "cpu")).refused
forward, backward, used = _rows.forward, _rows.backward, []
launch_forward = launch.forward
launch.forward = lambda *arguments: (used.append(config.select("forward", "interpreter", 4, 300).threads), launch_forward(*arguments))
print(run("forward"))
print(set(used), run("backward"), set(used))
print(run("backward", Variant(ALL, ALL, "pq", "bf16", ("aligned", "misaligned"), SOFTCAP)))
print(run("forward", Variant(ALL, ALL, "pq", "fp16", ("aligned", "apart"))))
def off(change, when):
    def changed(backend, p, q, tokens, mask, temperature, outputs, saved, *rest):
        forward(backend, p, q, tokens, mask, temperature, outputs, saved, *rest)
        if when(p):
            change(outputs["kl"], saved)
    return changed
def by(factor):
    return lambda kl, saved: kl.mul_(factor)
_rows.forward = off(by(1 + 1e-6), lambda p: len(p) == 1)
print(run("forward"))
_rows.forward = off(by(1 + 1e-6), lambda p: p.stride(0) % 4)
print(run("forward", Variant(KL, KL, "p", "fp32", ("aligned", "misaligned"))))
_rows.forward = off(by(1.01), lambda p: True)
print(run("forward"))
_rows.forward = off(lambda kl, saved: saved.mul_(1.01), lambda p: True)
print(run("forward"))
_rows.forward = forward
def gradient_off(factor, when):
    def changed(*arguments):
        backward(*arguments)
        if when(arguments[1]):
            arguments[8].mul_(factor)
    return changed
_rows.backward = gradient_off(1.01, lambda p: True)
print(run("backward"))
_rows.backward = gradient_off(1 + 1e-6, lambda p: len(p) < CHECKED_ROWS)
print(run("backward"))
_rows.backward = lambda *arguments: None
print(run("backward"))
""")
    assert right == "None" and used == "{64} None {64, 256}" and (capped, apart) == ("None", "None")
    assert bits == "kl_divergence dp fp32 aligned: aligned: a row's bits depend on the rows beside it"
    assert place == "kl_divergence dp fp32 aligned+misaligned: misaligned: a row's bits depend on where it starts"
    assert "kl off by 1.0e-02, limit 1e-03" in wrong and "gradient to p off by" in saved
    assert "gradient to p off by 1.0e-02" in gradient and "gradient to p off by nan" in unwritten and "rows beside it" in gradient_bits


def test_times_as_if_on_a_gpu():
    """The path that a GPU takes, in the interpreter with events that read the clock: every operation and number of rows, with the candidate."""
    figures, sets, used = map(json.loads, interpreted("""
import json, types, torch
from benchmarks import tune_trials
from fastkl.kernels import config, launch
import time
class Event:
    def __init__(self, enable_timing): pass
    def record(self): self.at = time.perf_counter()
    def elapsed_time(self, end): return max(1e3 * (end.at - self.at), 1e-4)
held = []
torch.cuda.Event, torch.cuda.synchronize, torch.cuda._sleep = Event, lambda: None, held.append
tune_trials.Timer.MOST_SETS = 3
timer = tune_trials.Timer(40, "fp32", torch.device("cpu"), (1, 4))
used = []
for name in ("forward", "backward"):
    def changed(*arguments, name=name, function=getattr(launch, name)):
        used.append([name, config.select(name, "interpreter", 4, 40).threads, arguments[0].layout.rows, arguments[0].p.data_ptr()])
        function(*arguments)
    setattr(launch, name, changed)
one = config.RowConfig(32, 1, 512, "")
print(json.dumps([timer.times("forward", one), timer.times("backward", one, thorough=True)]))
print(json.dumps([{"/".join(key): {rows: len(calls) for rows, calls in by_rows.items()} for key, by_rows in timer._calls.items()}, min(held)]))
print(json.dumps(used))
"""))
    assert [set(one) for one in figures] == [set(tune.WEIGHTS["forward"]), set(tune.WEIGHTS["backward"])]
    assert all(set(by_rows) == {"1", "4"} and min(by_rows.values()) > 0 for one in figures for by_rows in one.values())
    assert all(by_rows == {"1": 3, "4": 3} for by_rows in sets[0].values()) and len(sets[0]) == 5 and sets[1] > 0
    assert {tuple(call[:3]) for call in used} == {(name, 32, rows) for name in tune.DIRECTIONS for rows in (1, 4)}
    # One call to load, one to estimate, and 3 rounds of 2 or one of 5, as a call takes more than half a millisecond here.
    assert [sum(call[0] == name for call in used) for name in tune.DIRECTIONS] == [2 * 2 * (2 + 3 * 2), 3 * 2 * (2 + 5)]
    assert len({call[3] for call in used if call[2] == 4}) == 3, "they take turns among the rows"
