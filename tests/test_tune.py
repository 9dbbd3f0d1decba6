"""The tuner of launch configurations: what it tries, what it refuses, what it writes. The search runs without a GPU, on times that are given."""

import ast
import dataclasses
import math
import os
import subprocess
import sys
import types

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import tune  # noqa: E402
from fastkl.kernels import config  # noqa: E402

PRESENT = config.RowConfig(128, 4, 32768, "measured before")


@pytest.mark.parametrize("itemsize, vocabulary", [(2, 128256), (4, 128256), (2, 1000), (4, 50257)])
def test_candidates_are_configurations_the_kernels_take(itemsize, vocabulary):
    found = list(tune.candidates(PRESENT, itemsize, vocabulary))
    assert found[0] is PRESENT and len(found) > (100 if vocabulary > 32768 else 4)
    keys = [(one.threads, one.groups, one.segment, one.max_registers) for one in found]
    assert len(set(keys)) == len(keys)
    for one in found[1:]:
        assert one.segment % (one.threads * one.groups * (16 // itemsize)) == 0
        assert one.segment < 2 * max(vocabulary, 512)
        assert one.max_registers is None or one.max_registers * one.threads <= 65536


def fake_times(best):
    """Times that grow with the distance from one configuration, and the calls that asked for them."""
    calls = []

    def time_of(one):
        calls.append(one)
        distance = abs(math.log2(one.threads / best[0])) + abs(math.log2(one.segment / best[1])) + 0.1 * (one.max_registers is not None)
        return {64: 0.01 * (1 + 0.2 * distance), 8192: 1 + 0.2 * distance}

    return time_of, calls


def test_the_fastest_wins():
    time_of, calls = fake_times((256, 8192))
    trials = tune.search(tune.candidates(PRESENT, 2, 128256), lambda one: None, time_of)
    best = tune.winner(trials)
    assert (best.config.threads, best.config.segment, best.config.max_registers) == (256, 8192, None)
    assert len(calls) == len(trials)


def test_the_present_one_stays_within_the_noise():
    slightly = tune.Trial(dataclasses.replace(PRESENT, groups=2), None, {64: 0.00995, 8192: 0.995})
    present = tune.Trial(PRESENT, None, {64: 0.01, 8192: 1.0})
    assert tune.winner([present, slightly]) is present
    slightly.times = {64: 0.0097, 8192: 0.97}
    assert tune.winner([present, slightly]) is slightly


def test_what_is_refused_or_raises_does_not_win():
    def refuse(one):
        if one.threads == 256:
            raise RuntimeError("out of resources")
        return "values off by 1" if one.threads == 512 else None

    time_of, calls = fake_times((256, 8192))
    trials = tune.search(tune.candidates(PRESENT, 2, 128256), refuse, time_of)
    assert {one.threads for one in calls} == {128} and tune.winner(trials).config.threads == 128
    assert {trial.refused for trial in trials} == {None, "values off by 1", "RuntimeError: out of resources"}
    assert tune.winner([trial for trial in trials if trial.refused]) is None


def test_the_search_ends_in_time():
    time_of, calls = fake_times((256, 8192))
    assert len(tune.search(tune.candidates(PRESENT, 2, 128256), lambda one: None, time_of, deadline=0.0)) == 1


def interpreted(code):
    """Run code with the kernels in Triton's interpreter, in a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(tune.ROOT)}
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tune.ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_the_check_runs_the_candidate():
    """In the interpreter: a configuration passes; one that computes something else, or other bits for a row alone, does not."""
    done = interpreted("""
import torch, fastkl
from benchmarks import tune
from fastkl.kernels import config, launch
tune.CHECKED_ROWS = 20
with fastkl.use_backend("triton"):
    refuse = tune.refusal("forward", 300, "fp32", torch.device("cpu"))
    print(refuse(config.RowConfig(128, 1, 512, "")))
    forward, used = launch.forward, []
    launch.forward = lambda *arguments: (used.append(config.select("forward", "interpreter", 4, 300)), forward(*arguments))
    refuse(config.RowConfig(64, 2, 512, ""))
    print({one.threads for one in used})
    kl = fastkl.kl_divergence
    fastkl.kl_divergence = lambda p, q: kl(p, q) * (1 + 1e-6 * (len(p) == 1))
    print(refuse(config.RowConfig(128, 1, 512, "")))
    fastkl.kl_divergence = lambda p, q: kl(p, q) * 1.01
    print(refuse(config.RowConfig(128, 1, 512, "")))
""")
    assert done.returncode == 0, done.stderr[-2000:]
    right, used, bits, wrong = done.stdout.splitlines()
    assert (right, used) == ("None", "{64}")
    assert "bits depend on the rows beside it" in bits and "off by" in wrong


@pytest.mark.parametrize("max_v", [None, 2048])
def test_the_entry_goes_into_the_table(max_v):
    source = tune.TABLE_FILE.read_text(encoding="utf-8")
    for number in range(2):  # the second replaces the first
        chosen = {"forward": config.RowConfig(256, 2, 8192, f"H200: run {number}", 168), "backward": config.RowConfig(128, 1, 4096, "H200: 1 ms")}
        line = tune.entry_line("sm_90", 2, max_v, chosen)
        source = tune.with_entry(source, "sm_90", 2, max_v, line)
    assert source.count('Entry("sm_90", 2') == 1 and "run 0" not in source
    module = sys.modules["config_with_entry"] = types.ModuleType("config_with_entry")
    scope = module.__dict__
    exec(compile(ast.parse(source), "config.py", "exec"), scope)
    entry = scope["TABLE"][[one.arch for one in scope["TABLE"]].index("sm_90")]
    assert (entry.itemsize, entry.max_v) == (2, max_v)
    assert dataclasses.asdict(entry.forward) == dataclasses.asdict(chosen["forward"])
    assert dataclasses.asdict(entry.backward) == dataclasses.asdict(chosen["backward"])
    assert scope["select"]("forward", "sm_90", 2, 1000) == entry.forward
    assert scope["select"]("forward", "sm_80", 2, 1000) != entry.forward
    assert all(line in source.splitlines() for line in tune.TABLE_FILE.read_text(encoding="utf-8").splitlines())


def test_the_table_finds_the_entry_for_the_smaller_vocabulary_first():
    """Whichever was tuned first."""
    for order in ((None, 2048), (2048, None)):
        source = tune.TABLE_FILE.read_text(encoding="utf-8")
        for max_v in order:
            chosen = dict.fromkeys(("forward", "backward"), config.RowConfig(128, 1, 1024 if max_v else 8192, f"up to {max_v}, " * 20))
            source = tune.with_entry(source, "sm_90", 2, max_v, tune.entry_line("sm_90", 2, max_v, chosen))
        module = sys.modules["config_with_entries"] = types.ModuleType("config_with_entries")
        exec(compile(ast.parse(source), "config.py", "exec"), module.__dict__)
        assert module.select("forward", "sm_90", 2, 1000).segment == 1024
        assert module.select("forward", "sm_90", 2, 128256).segment == 8192
        assert max(map(len, source.splitlines())) <= 150


def test_what_an_entry_says_of_its_measurement():
    present, fast = tune.Trial(PRESENT, None, {64: 0.02, 8192: 2.0}), tune.Trial(PRESENT, None, {64: 0.01, 8192: 1.0})
    assert tune.sentence(fast, present, 128256, "H200, Triton 3.6.0, 2026-01-01", "9 of 20 candidates") == \
        "H200, Triton 3.6.0, 2026-01-01: 0.0100 ms at 64 × 128256, 1.0000 ms at 8192 × 128256, 100% faster than the one before; " \
        "best of 9 of 20 candidates"
    assert tune.sentence(present, present, 128256, "H200", "9 of 20 candidates").endswith("; none of 9 of 20 candidates was faster")
    lines = tune.report([present, fast, tune.Trial(PRESENT, "does not compile")])
    assert "3 tried, 1 refused" in lines and lines.index("0.0100") < lines.index("0.0200") and "(present)" in lines


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert tune.main([]) == 2
    assert "no CUDA here" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--vocabulary", "1"], ["--max-v", "100"], ["--dtype", "int8"]])
def test_wrong_use(arguments):
    with pytest.raises(SystemExit) as exit_:
        tune.main(arguments)
    assert exit_.value.code == 2
