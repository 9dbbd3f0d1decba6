# The tuner: its grid, its check of a candidate in the interpreter, its choice from given times.

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import tune
from benchmarks.record import ROOT
from fastkl.kernels import config, launch

# Runs in a process that interprets kernels: three good candidates, and three with wrong results.
CHECKS = """
import json
import quick_interpreter
import torch
import triton.testing
import fastkl
from benchmarks import tune
from fastkl.kernels import config, launch_fused

quick_interpreter.hurry()
torch.set_num_threads(1)
triton.testing.do_bench = lambda call, return_mode: call() and len(call()) and float(
    config.select(direction, "interpreter", 4, 264) == config.RowConfig(256, 1, 512, "", None)
)
tune.DEVICE, tune.ROWS, tune.CHECKED_ROWS = "cpu", (2,), 3
fused, kl_divergence, launched = launch_fused.fused, fastkl.kl_divergence, []
launch_fused.fused = lambda *arguments: launched.append(fused(*arguments))
chosen = config.RowConfig(256, 1, 512, "")
for direction, dtype in (("forward", "bf16"), ("backward", "fp32"), ("fused", "fp32")):
    print(json.dumps(tune.measure(direction, dtype, 264, chosen)))
    print(json.dumps(len(launched)))
for factor in (lambda rows: 1.001, lambda rows: 1 + 1e-6 * rows, lambda rows: float("nan")):
    fastkl.kl_divergence = lambda p, q: kl_divergence(p, q) * (
        1.0 if p.dtype == torch.float64 else factor(len(p))
    )
    try:
        tune.measure("forward", "fp32", 264, chosen)
    except AssertionError as error:
        print(json.dumps(str(error)))
"""


def test_the_check_in_the_interpreter() -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    output = subprocess.check_output([sys.executable, "-c", CHECKS], text=True, env=environment)
    *measured, off, beside, nan = map(json.loads, output.splitlines())
    times, (*none, launches) = measured[::2], measured[1::2]
    assert none == [0, 0] and launches > 2 and [len(one) for one in times] == [2, 3, 1]
    assert {ms for one in times for ms in one.values()} == {1.0}
    assert "kl_divergence [0]: " in off and "at row 0" in off and "nan" in nan
    assert "kl_divergence [0] of slice(2, 3" in beside


@pytest.mark.parametrize("direction", tune.SEGMENTS)
@pytest.mark.parametrize("itemsize, vocabulary", [(2, 128256), (4, 128256), (2, 1000), (4, 50257)])
def test_candidates_are_configurations_the_kernels_take(direction, itemsize, vocabulary) -> None:
    present = config.select(direction, "sm_90", itemsize, vocabulary)
    found = tune.candidates(direction, present, itemsize, vocabulary)
    assert found[0] is present and len(set(found)) == len(found) > 1
    for one in found[1:]:
        assert one.segment % (one.threads * one.groups * (16 // itemsize)) == 0
        assert one.segment < 2 * vocabulary and (one.max_registers or 0) * one.threads <= 65536
        assert direction == "backward" or one.threads == present.threads


@pytest.fixture
def tuned(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FASTKL_COMMIT", "0" * 40)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(launch, "architecture", lambda device: ("sm_90", 32))

    def run(direction, dtype, milliseconds, vocabulary=128256):
        asked = []

        def answer(seconds, measure, *problem):
            assert problem[:3] == (direction, dtype, vocabulary)
            asked.append(tuple(getattr(problem[3], name) or 0 for name in tune.FIELDS))
            ms = milliseconds(asked)
            if isinstance(ms, str):
                return None, ms
            return {"kl of 64 rows": ms / 100, "kl of 8192 rows": ms}, None

        child = mock.MagicMock()
        child.return_value.__enter__.return_value.attempt = answer
        monkeypatch.setattr(tune, "CHILD", child)
        path = tmp_path / "tune.json"
        options = [f"--direction={direction}", f"--dtype={dtype}", f"--vocabulary={vocabulary}"]
        code = tune.main([*options, f"--json={path}"])
        return code, capsys.readouterr(), json.loads(path.read_text()), asked

    return run


# One candidate is wrong, another is fast the first time only.
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("direction", tune.SEGMENTS)
def test_the_fastest_correct_candidate_becomes_an_entry(
    monkeypatch, tuned, direction, dtype
) -> None:
    itemsize = tune.DTYPES[dtype].itemsize
    present = config.select(direction, "sm_90", itemsize, 128256)
    cuts = ((2, 2), (1, 1), (1, 4))
    best, wrong, lucky = (
        (present.threads, groups, tune.SEGMENTS[direction] // part, 0) for groups, part in cuts
    )
    times = {best: [1.0, 1.0], wrong: ["AssertionError: wrong"], lucky: [0.5, 2.0]}
    given = lambda asked: times.get(asked[-1], [1.5, 1.5])[asked.count(asked[-1]) - 1]  # noqa: E731
    code, shown, record, asked = tuned(direction, dtype, given)
    again = asked[-1 - tune.FINALISTS :]
    assert code == 0 and again[0] == asked[0] != best and len({*again}) == len(again)
    (entry,) = eval(shown.out.partition("with it:\n")[2], vars(config))
    before = config.entry_for("sm_90", itemsize, 128256)
    monkeypatch.setattr(config, "TABLE", (entry, *config.TABLE))
    chosen = config.select(direction, "sm_90", itemsize, 128256)
    assert tuple(getattr(chosen, name) or 0 for name in tune.FIELDS) == best
    assert "H200" in chosen.measured and "0.01 ms, kl of 8192 rows 1 ms" in chosen.measured
    assert dataclasses.replace(entry, **{direction: getattr(before, direction)}) == before
    (refused,) = (one["refused"] for one in record["trials"] if "refused" in one)
    assert refused == "AssertionError: wrong" and record["gpu"] == "NVIDIA H200"


@pytest.mark.parametrize("vocabulary, max_v", [(128256, None), (1000, 2048)])
def test_the_present_one_stays_within_the_noise(tuned, vocabulary, max_v) -> None:
    present = config.select("backward", "sm_90", 2, vocabulary)
    code, shown, *_ = tuned(
        "backward", "bf16", lambda asked: 0.995 if asked[-1] != asked[0] else 1.0, vocabulary
    )
    (entry,) = eval(shown.out.partition("with it:\n")[2], vars(config))
    assert code == 0 and "H200" in entry.backward.measured
    assert (entry.arch, entry.itemsize, entry.max_v) == ("sm_90", 2, max_v)
    assert dataclasses.replace(entry.backward, measured=present.measured) == present


def test_without_a_candidate(tuned) -> None:
    code, shown, *_ = tuned("forward", "fp32", lambda asked: "no answer in 120 s")
    assert code == 1 and "no answer in 120 s" in shown.err and "Entry(" not in shown.out
