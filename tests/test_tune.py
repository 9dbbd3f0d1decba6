"""The tuner of launch configurations: what it tries, refuses and chooses. The search runs without a GPU, on times and checks that are given."""

import collections
import dataclasses
import functools
import json
import math
import os
import sys
import time
import types

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import tune, tune_entry, tune_trials  # noqa: E402
from benchmarks.tune_trials import Job, Verdict  # noqa: E402
from fastkl.kernels import config, launch  # noqa: E402

PRESENT = config.RowConfig(128, 4, 32768, "measured before")
TIMED = {direction: tune_trials.timed_variants(direction, "bf16", 128256) for direction in tune.DIRECTIONS}
WHOLE = {direction: tune_trials.all_variants(direction, "bf16") for direction in tune.DIRECTIONS}
make_job = functools.partial(Job, vocabulary=128256, device="cuda")


class Serial:
    """A pool that answers in this process, one job after the other, and knows which it was asked."""

    def __init__(self, function=lambda job: Verdict()):
        self.function, self.jobs, self.closed = function, [], False

    def run(self, jobs, deadline=math.inf, grace=0.0):
        for job in jobs:
            if time.monotonic() >= deadline:
                return
            self.jobs.append(job)
            yield job, self.function(job)

    def close(self):
        self.closed = True


class FakeTimer:
    """Times by a function of (direction, config, operation, rows), and the calls that asked for them."""

    def __init__(self, function):
        self.function, self.calls = function, []

    def times(self, direction, one, thorough=False):
        self.calls.append((direction, one, thorough))
        rows = tune.WEIGHTS["rows"]
        return {operation: {n: self.function(direction, one, operation, n) for n in rows} for operation in tune.WEIGHTS[direction]}


def distance_from(threads, segment):
    """Times that grow with the distance from one configuration."""
    def ms(direction, one, operation, rows):
        distance = abs(math.log2(one.threads / threads)) + abs(math.log2(one.segment / segment)) + 0.1 * (one.max_registers is not None)
        return rows * (1e-3 if "kl" in operation else 2e-3) * (1 + 0.2 * distance + 0.01 * one.groups)

    return ms


def times(forward, few=None):
    """The same milliseconds for both operations of forward, at 8192 rows and at 64."""
    return {operation: {64: few or forward / 100, 8192: forward} for operation in tune.WEIGHTS["forward"]}


def found_for(*presents):
    """Candidates of both directions."""
    return {direction: list(tune.candidates(present, 2, 128256, direction)) for direction, present in zip(tune.DIRECTIONS, presents, strict=True)}


def screened(pool, deadline=math.inf):
    """The trials of all candidates, present ones as above, after the screening by a pool."""
    trials = {direction: [] for direction in tune.DIRECTIONS}
    tune.screen(trials, found_for(PRESENT, PRESENT), TIMED, pool, make_job, deadline)
    return trials


# Candidates -----------------------------------------------------------------------------------------------------


def keys_of(found):
    """All of each configuration but where it was measured."""
    return [dataclasses.astuple(dataclasses.replace(one, measured="")) for one in found]


@pytest.mark.parametrize("itemsize, vocabulary", [(2, 128256), (4, 128256), (2, 1000), (4, 50257)])
def test_candidates_of_backward_are_configurations_the_kernels_take(itemsize, vocabulary):
    found = list(tune.candidates(PRESENT, itemsize, vocabulary, "backward"))
    assert found[0] is PRESENT and len(found) > (100 if vocabulary > 32768 else 4)
    assert len(set(keys_of(found))) == len(found)
    for one in found[1:]:
        assert one.segment % (one.threads * one.groups * (16 // itemsize)) == 0
        assert one.segment < 2 * max(vocabulary, 512) and vocabulary <= 64 * one.segment
        assert one.max_registers is None or one.max_registers * one.threads <= 65536


@pytest.mark.parametrize("vocabulary, lengths", [(128256, {8016, 16032, 32064}), (1000, {1024}), (50257, {6288, 12576, 25152})])
def test_candidates_of_forward_cut_a_row_differently(vocabulary, lengths):
    """Programs of as many threads as now; of configurations that cut a row alike one is tried."""
    present = config.select("forward", "sm_90", 2, vocabulary)
    found = list(tune.candidates(present, 2, vocabulary, "forward"))
    cuts = [(one.groups, config.segment_length(vocabulary, one.segment), one.max_registers) for one in found]
    assert found[0] is present and len(set(cuts)) == len(cuts) and {one.threads for one in found} == {32}
    assert set(cuts) == {(groups, length, registers) for groups in (1, 2) for length in lengths for registers in (None, 128)}


def test_other_limits_on_registers_come_last():
    present = dataclasses.replace(PRESENT, max_registers=168)
    same = [one.max_registers == 168 for one in tune.candidates(present, 4, 128256, "backward")]
    assert same == sorted(same, reverse=True) and 10 < sum(same) < len(same) / 2
    threads = [one.threads for one in tune.candidates(present, 4, 128256, "backward")]
    assert threads != sorted(threads), "no pattern"


def test_fields_that_the_tuner_does_not_know():
    """They keep their value, and stand in the entry."""
    @dataclasses.dataclass(frozen=True)
    class Longer(config.RowConfig):
        stages: int = 2

    present = Longer(128, 4, 32768, "measured before", stages=3)
    assert {one.stages for direction in tune.DIRECTIONS for one in tune.candidates(present, 2, 128256, direction)} == {3}
    line = tune.entry_line("sm_90", 2, None, dict.fromkeys(tune.DIRECTIONS, present))
    assert line.count(", stages=3)") == 2
    assert "stages" not in tune.entry_line("sm_90", 2, None, dict.fromkeys(tune.DIRECTIONS, Longer(128, 4, 32768, "default")))


# The search -----------------------------------------------------------------------------------------------------


def test_the_fastest_wins_after_every_check():
    """All passes: what is screened, timed twice, and wholly checked, is the nearest to the best."""
    pool, timer = Serial(), FakeTimer(distance_from(256, 8192))
    trials = screened(pool)
    assert {direction: [trial.config for trial in found] for direction, found in trials.items()} == found_for(PRESENT, PRESENT)
    assert len(pool.jobs) == sum(len(TIMED[direction]) * len(found) for direction, found in trials.items())
    assert {job.config for job in pool.jobs[:5]} == {PRESENT}, "the present ones first"
    assert [job.direction for job in pool.jobs[5:15]] == ["forward"] * 2 + ["backward"] * 3 + ["forward"] * 2 + ["backward"] * 3
    tune.time_shortly(trials, timer, math.inf)
    assert all(trial.short and not trial.times for found in trials.values() for trial in found)
    timer.calls.clear()
    tune.final(trials, timer, math.inf)
    in_turn = [call[:2] for call in timer.calls]
    assert all(thorough for *_, thorough in timer.calls) and len(in_turn) == tune.FINAL_ROUNDS * 2 * (tune.FINALISTS + 1)
    assert in_turn[:14] == in_turn[14:28] and len(set(in_turn)) == 14 and ("forward", PRESENT) in in_turn
    pool.jobs.clear()
    tune.confirm(trials, WHOLE, pool, make_job, math.inf)
    for direction, found in trials.items():
        best = tune.decided(found)
        threads = {"forward": PRESENT.threads, "backward": 256}[direction]
        assert (best.config.threads, best.config.segment, best.config.max_registers, best.config.groups) == (threads, 8192, None, 1)
        assert best.whole_check and best.rounds == tune.FINAL_ROUNDS
    assert [job.variant for job in pool.jobs] == WHOLE["forward"] + WHOLE["backward"], "of the winners alone"


def test_the_score_weighs():
    assert tune.mean({"kl_divergence": {8192: 2.0}}) == pytest.approx(2.0)
    one = {"kl_divergence": {64: 1.0, 8192: 1.0}, "token_stats": {64: 1.0, 8192: 1.0}}
    for operation, rows, share in (("kl_divergence", 8192, 9), ("kl_divergence", 64, 3), ("token_stats", 8192, 3), ("token_stats", 64, 1)):
        changed = {name: dict(by_rows) for name, by_rows in one.items()}
        changed[operation][rows] = 2.0
        assert tune.mean(changed) == pytest.approx(2 ** (share / 16))
    assert tune.mean({}) == math.inf


def test_the_present_one_stays_within_the_noise():
    present = tune.Trial(PRESENT, times=times(1.0))
    slightly = tune.Trial(dataclasses.replace(PRESENT, groups=2), times=times(0.995))
    assert tune.winner([present, slightly]) is present
    slightly.times = times(0.97)
    assert tune.winner([present, slightly]) is slightly
    assert tune.decided([present, slightly]) is present, "without its whole check"
    present.refused = "wrong"
    slightly.times = times(1.2)
    assert tune.winner([present, slightly]) is slightly and tune.decided([present, slightly]) is None
    assert tune.winner([]) is None and tune.decided([]) is None


def test_what_is_refused_or_raises_does_not_win():
    def answer(job):
        if job.config.segment == 16384 and job.variant == TIMED["forward"][0]:
            return Verdict("kl_divergence: values off by 1", registers=80)
        return Verdict(spilled=8 * (job.config.max_registers == 128 and job.variant == TIMED["forward"][1]), registers=64)

    def ms(direction, one, operation, rows):
        if one.groups == 2:
            raise RuntimeError("an illegal\nmemory access")
        return distance_from(256, 8192)(direction, one, operation, rows)

    pool, timer = Serial(answer), FakeTimer(ms)
    trials = screened(pool)
    asked = collections.Counter((job.direction, job.config) for job in pool.jobs)
    assert {asked["forward", one.config] for one in trials["forward"] if one.config.segment == 16384} == {1}, "no more is asked of what is refused"
    tune.time_shortly(trials, timer, math.inf)
    tune.final(trials, timer, math.inf)
    tune.confirm(trials, WHOLE, pool, make_job, math.inf)
    best = tune.decided(trials["forward"])
    assert (best.config.threads, best.config.groups, best.config.segment, best.registers) == (128, 1, 8192, 64)
    assert {trial.refused for trial in trials["forward"]} == {
        None, "kl_divergence: values off by 1", "token_stats bf16 aligned: spills 8 bytes per thread", "RuntimeError: an illegal memory access"}
    assert tune.decided(trials["backward"]).config.threads == 256


def test_the_present_one_may_spill_but_not_be_wrong():
    """It is in use; what it costs shows in its times."""
    trials = screened(Serial(lambda job: Verdict(spilled=16)))
    assert [trial.refused is None for trial in trials["forward"]] == [True] + [False] * (len(trials["forward"]) - 1)
    assert trials["forward"][0].spilled == 16
    pool = Serial(lambda job: Verdict("wrong" if job.config == PRESENT else None))
    trials = screened(pool)
    timer = FakeTimer(distance_from(512, 2048))
    tune.time_shortly(trials, timer, math.inf)
    tune.final(trials, timer, math.inf)
    assert tune.winner(trials["forward"]).config.segment == 8192 and trials["forward"][0].refused == "wrong"


def test_the_search_ends_in_time():
    """Present ones are checked and timed whatever the time; of the others what came in time stays, and what was not wholly checked does not win."""
    pool, timer = Serial(), FakeTimer(lambda direction, one, operation, rows: 2.0 if one == PRESENT else 1.0)
    trials = screened(pool, 0.0)
    assert [[trial.config for trial in found] for found in trials.values()] == [[PRESENT], [PRESENT]]

    class Cut(Serial):
        def run(self, jobs, deadline=math.inf, grace=0.0):
            yield from list(super().run(jobs))[:None if deadline == math.inf else 9]  # in the middle of the third pair

    trials = screened(Cut(), 1e9)
    assert [len(found) for found in trials.values()] == [3, 2]
    tune.time_shortly(trials, timer, 0.0)
    assert [[bool(trial.short) for trial in found] for found in trials.values()] == [[True, False, False], [True, False]]
    tune.time_shortly(trials, timer, math.inf)
    timer.calls.clear()
    tune.final(trials, timer, 0.0)
    assert len(timer.calls) == 5, "one round"
    assert [tune.winner(found) is not found[0] for found in trials.values()] == [True, True]
    tune.confirm(trials, WHOLE, pool, make_job, 0.0)
    assert [tune.decided(found) for found in trials.values()] == [found[0] for found in trials.values()]
    assert "no time was left for its whole check" in {trial.refused for trial in trials["forward"]}


def test_the_next_one_leads_where_the_whole_check_fails():
    """Until one passes or the present one leads; the other direction's winner is not checked again."""
    def answer(job):
        capped = job.variant.softcap > 0 and job.direction == "forward"
        unlimited = capped and job.config.max_registers is None
        return Verdict("off by 1" if unlimited and job.config.groups == 2 else None, spilled=4 * (unlimited and job.config.groups == 1))

    pool, timer = Serial(answer), FakeTimer(distance_from(256, 8192))
    trials = screened(pool)
    tune.time_shortly(trials, timer, math.inf)
    tune.final(trials, timer, math.inf)
    ranked = sorted((trial for trial in trials["forward"] if trial.times), key=lambda trial: trial.score)
    pool.jobs.clear()
    tune.confirm(trials, WHOLE, pool, make_job, math.inf)
    assert tune.decided(trials["forward"]) is ranked[2] and ranked[2].config.max_registers is not None
    spills = "token_stats dp dq bf16 aligned+misaligned softcap: spills 4 bytes per thread"
    assert [trial.refused for trial in ranked[:3]] == [spills, "off by 1", None]
    assert collections.Counter(job.direction for job in pool.jobs)["backward"] == len(WHOLE["backward"])


def test_the_report():
    trials = [tune.Trial(PRESENT, times=times(2.0)), tune.Trial(PRESENT, times=times(1.0)), tune.Trial(PRESENT, short=times(0.5)),
              tune.Trial(PRESENT, "does not compile"), tune.Trial(PRESENT, "does not compile"), tune.Trial(PRESENT)]
    lines = tune.report(trials, limit=1).splitlines()
    assert "kl_divergence 0.0100 / 1.0000" in lines[0] and "kl_divergence 0.0200 / 2.0000" in lines[1] and lines[1].endswith("(present)")
    assert lines[2:] == ["  refused 2 times: does not compile"], "the present one is shown wherever it comes"
    assert tune.report(trials, limit=3).splitlines()[2].endswith("in short")
    assert "not timed" in tune.report(trials) and tune.report([]) == ""


# The command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """main() as if on a GPU: a pool and times that are given, and a table of its own. What a test sets in it comes in their place."""
    given = types.SimpleNamespace(pool=Serial(), timer=FakeTimer(distance_from(256, 8192)), table=tmp_path / "config.py", json=tmp_path / "tune.json")
    given.table.write_text(tune_entry.TABLE_FILE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(tune_entry, "TABLE_FILE", given.table)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Pretended")
    monkeypatch.setattr(launch, "architecture", lambda device: ("sm_77", 32))
    monkeypatch.setattr(tune, "open_pool", lambda device: given.pool)
    monkeypatch.setattr(tune, "Timer", lambda vocabulary, dtype, device, rows: given.timer)
    given.main = lambda *more: tune.main(["--json", str(given.json), "--seconds", "1000", *more])
    given.record = lambda: json.loads(given.json.read_text())
    return given


def test_the_command(pretended, monkeypatch, capsys):
    assert pretended.main("--write") == 0 and pretended.pool.closed
    output, record, table = capsys.readouterr().out, pretended.record(), types.ModuleType("written_config")
    monkeypatch.setitem(sys.modules, table.__name__, table)  # for its dataclasses
    exec(pretended.table.read_text(encoding="utf-8"), table.__dict__)
    for direction in tune.DIRECTIONS:
        one = table.select(direction, "sm_77", 2, 50000)
        threads, least = {"forward": (32, 11), "backward": (256, 100)}[direction]
        assert (one.threads, one.groups, one.segment) == (threads, 1, 8192) and one.measured.startswith("Pretended, Triton ")
        assert dataclasses.asdict(table.select(direction, "sm_77", 2, 1000)) == dataclasses.asdict(config.select(direction, "sm_77", 2, 1000))
        trials = record["trials"][direction]
        assert len(trials) == record["candidates"][direction] > least and trials[0]["rounds"] == tune.FINAL_ROUNDS
        assert {"config", "refused", "short", "times", "score", "registers", "spilled"} <= set(trials[0])
    assert record["stopped"] is None and all(entry in output for entry in record["entries"])
    assert len(record["entries"]) == 1 + len(tune.hidden_by("sm_77", 2, None))
    assert record["command"].startswith("python3 -m benchmarks.tune --json") and record["weights"]["rows"] == {"64": 1, "8192": 3}
    for part in tune.ENDS:
        assert f" s  {part}: forward " in output
    total = record["candidates"]["forward"]
    assert f"forward: {total} of {total} candidates\n  threads  32  groups 1  segment   8192  registers   -  kl_divergence" in output


@pytest.mark.parametrize("error", [RuntimeError("unspecified launch failure"), KeyboardInterrupt()])
@pytest.mark.parametrize("part", ["screen", "time_shortly", "final", "confirm"])
def test_what_was_found_is_kept_whatever_ends_the_search(part, error, pretended, monkeypatch, capsys):
    def raises(*arguments):
        raise error

    monkeypatch.setattr(tune, part, raises)
    code, record = pretended.main(), pretended.record()
    output = capsys.readouterr()
    assert record["stopped"].startswith(type(error).__name__) and "the search stopped early" in output.err and pretended.pool.closed
    assert code == (0 if part == "confirm" else 1)
    assert bool(record["trials"]["forward"]) == (part != "screen")
    if part == "confirm":  # nothing passed the whole check: the present ones stay
        present = config.select("forward", "sm_77", 2, 128256)
        assert output.out.count("none of") == 2 and f"RowConfig({present.threads}, {present.groups}, {present.segment}," in record["entries"][-1]
    else:
        assert "forward: no candidate passed and was timed" in output.err


def test_exit_codes(pretended, capsys):
    pretended.pool.function = lambda job: Verdict("kl off by nan")
    assert pretended.main() == 1
    assert "backward: no candidate passed and was timed: kl off by nan" in capsys.readouterr().err
    assert {trial["refused"] for trial in pretended.record()["trials"]["forward"]} == {"kl off by nan"}
    pretended.pool.function = lambda job: Verdict()
    pretended.table.write_text("TABLE = ()\n")
    assert pretended.main("--write") == 1 and "add the entry by hand" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        tune.main(["--json", str(pretended.table / "under a file" / "x.json")])
    assert exit_.value.code == 2
    assert "--json" in capsys.readouterr().err
    del pretended.pool  # cannot be had
    assert pretended.main() == 1 and pretended.record()["stopped"].startswith("AttributeError")


def test_the_number_of_processes(monkeypatch):
    """One per core less two, one at least, and no more than the GPU has memory for."""
    counts = []
    monkeypatch.setattr(tune, "Workers", lambda function, failed, count, initialise: counts.append(count))
    for cores, gigabytes in ((16, 139), (16, 11), (2, 139), (1, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=gigabytes: (free * 2**30, 2**38))
        tune.open_pool(torch.device("cuda"))
    assert counts == [14, 5, 1, 1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert tune.main([]) == 2
    assert "tune: expected a CUDA GPU, got none" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--vocabulary", "1"], ["--max-v", "100"], ["--dtype", "int8"], ["--json", "/proc/x"],
                                       *(["--seconds", text] for text in ("0", "-5", "nan", "inf"))])
def test_wrong_use(arguments, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("the arguments come first"))
    with pytest.raises(SystemExit) as exit_:
        tune.main(arguments)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and (": expected" in error or "invalid choice: 'int8'" in error)


@pytest.mark.gpu
def test_three_candidates_on_a_gpu(monkeypatch, tmp_path, capsys):
    """The whole command on a small vocabulary: processes, checks, times, the whole check of a winner, and the file."""
    def fastest_other(trials):
        return min((trial for trial in trials[1:] if trial.score < math.inf), key=lambda trial: trial.score, default=trials[0])

    monkeypatch.setattr(tune, "candidates", lambda present, itemsize, vocabulary, direction: [
        present, dataclasses.replace(present, groups=1, segment=4096), dataclasses.replace(present, threads=64, groups=1, segment=2048)])
    monkeypatch.setattr(tune, "winner", fastest_other)  # so that one is checked wholly
    monkeypatch.setattr(tune, "all_variants", lambda direction, dtype: tune_trials.all_variants(direction, dtype)[::5])
    monkeypatch.setattr(tune, "FINAL_ROUNDS", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    monkeypatch.setitem(tune.WEIGHTS, "rows", {2: 1, 64: 3})
    code = tune.main(["--vocabulary", "4096", "--seconds", "300", "--json", str(tmp_path / "tune.json")])
    output, record = capsys.readouterr(), json.loads((tmp_path / "tune.json").read_text())
    assert code == 0 and record["stopped"] is None, output
    for direction, found in record["trials"].items():
        assert [trial["refused"] for trial in found] == [None] * 3 and all(trial["rounds"] == 2 for trial in found), found
        assert all(trial["registers"] > 16 and trial["spilled"] == 0 for trial in found)
        assert all(0 < ms < 100 for trial in found for by_rows in trial["times"].values() for ms in by_rows.values())
        assert [trial["whole_check"] for trial in found].count(True) == 1, direction
    assert 'Entry("sm_' in output.out
