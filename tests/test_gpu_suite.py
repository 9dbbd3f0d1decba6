"""The suite of everything that needs a GPU: its plan, bars, time limits, and that a crash or a broken CUDA context costs one row."""
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from gpu_cases import CPU, OTHER, TINY, WORK, nothing_to_release  # noqa: F401  (a fixture)

from benchmarks import gpu_sections, gpu_suite, harness
from benchmarks.gpu_sections import LEFT_OUT, NO_TIME, AccuracyCase, Step, accuracy_rows, linear_rows, logits_rows, steps
from benchmarks.linear_providers import LINEAR_LOADERS
from benchmarks.providers import ALL_LOADERS, load_providers
from benchmarks.record import ROOT, output_file, output_folder
from benchmarks.workloads import Workload

# The plan -------------------------------------------------------------------------------------------------------


def test_every_step_names_a_provider_that_does_it():
    """Whether it can here or not: the loaders that only look for a package run without a GPU."""
    offered = {}
    for loaders in (ALL_LOADERS, LINEAR_LOADERS):
        for provider in load_providers(torch.device("cuda"), None, loaders):
            offered[loaders is LINEAR_LOADERS, provider.name] = provider
    for name, (runner, plan) in gpu_suite.PLANS.items():
        assert len(set(plan)) == len(plan), name
        if runner is not accuracy_rows:
            for step in plan:
                provider = offered[runner is linear_rows, step.provider]
                assert provider.missing or step.workload.operation in provider.operations, (name, step)


def test_every_provider_has_a_step():
    def names(*sections):
        return {step.provider for section in sections for step in gpu_suite.PLANS[section][1]}

    assert names("main", "peers") == set(ALL_LOADERS) and names("linear") == set(LINEAR_LOADERS)
    assert {step.workload.target for step in gpu_suite.PLANS["accuracy"][1]} == set(gpu_suite.accuracy.TARGETS)


@pytest.mark.parametrize("name", [name for name in gpu_suite.PLANS if name != "accuracy"])
def test_what_matters_most_comes_first(name):
    """At each workload fastkl is measured first, and what compiles for seconds after everything else."""
    plan = gpu_suite.PLANS[name][1]
    first = {}
    for step in plan:
        first.setdefault(step.workload, step.provider)
    assert set(first.values()) == {"fastkl"}
    compiled = [step.provider == "torch.compile" for step in plan]
    assert compiled == sorted(compiled)


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


# A process whose CUDA context breaks ----------------------------------------------------------------------------

BROKEN_TEXT = "RuntimeError: CUDA error: an illegal memory access was encountered"


@pytest.fixture
def section(monkeypatch, tmp_path):
    """Runs run_section with its processes as calls in this one: {"section"} is a plan of six rows, of which those of "breaks" break the context and
    those of "dies" end the process. Gives a function that returns the section, and the commands that it ran."""
    state = types.SimpleNamespace(fault=None, commands=[], plan=[], limit=None)

    def breaks(inputs):
        state.fault = BROKEN_TEXT
        raise RuntimeError(BROKEN_TEXT.partition(": ")[2])

    def dies(inputs):
        raise KeyboardInterrupt  # passes what catches failures, as the end of a process does

    load(monkeypatch, ALL_LOADERS, ours={"kl_divergence": WORK}, breaks={"kl_divergence": breaks}, dies={"kl_divergence": dies})
    monkeypatch.setattr(gpu_suite, "context_fault", lambda: state.fault)
    monkeypatch.setattr(gpu_suite, "gpu_facts", lambda: {"name": "some GPU"})

    def run_limited(command, seconds, *rest, **environment):
        state.commands.append(command)
        if state.limit is not None and len(state.commands) > state.limit:
            return -6, 1.0
        state.fault = None
        given = dict(zip(command[3::2], command[4::2], strict=False))
        without = [part.partition("=")[2] for part in command if part.startswith("--without=")]
        try:
            code = gpu_suite.run_here(given["--section"], Path(given["--section-file"]), float(given["--until"]), int(given["--start"]), without)
        except KeyboardInterrupt:
            return -11, 1.0
        return code, 1.0

    monkeypatch.setattr(gpu_suite, "run_limited", run_limited)

    def run(*providers, workloads=(TINY,), limit=None, seconds=60):
        state.limit = limit
        runner = lambda plan, device, *rest: logits_rows(plan, CPU, *rest)  # noqa: E731
        monkeypatch.setitem(gpu_suite.PLANS, "section", (runner, [Step(workload, name) for workload in workloads for name in providers]))
        state.commands.clear()
        found = gpu_suite.run_section("section", seconds)
        return found, state.commands

    return run


def test_a_broken_context_costs_one_row(section):
    found, commands = section("ours", "breaks", "torch", workloads=(TINY, OTHER))
    assert flat([found["rows"]]) == [("ours", "ok"), ("breaks", "failed"), ("torch", "ok")] * 2
    assert [command[command.index("--start") + 1] for command in commands] == ["0", "2", "5"] and found["processes"] == 3
    broken = found["rows"][1]
    assert "illegal memory access" in broken["reason"] and BROKEN_TEXT in broken["context"]
    assert found["status"] == "ok" and found["gpu"] == {"name": "some GPU"}
    assert [row.get("context") is not None for row in found["rows"]] == [False, True, False] * 2


def test_a_provider_that_breaks_it_again_is_left_out(section):
    found, commands = section("breaks", "ours", workloads=(TINY, OTHER, Workload(rows=3, vocabulary=7), Workload(rows=2, vocabulary=7)))
    assert flat([found["rows"]]) == [("breaks", "failed"), ("ours", "ok")] * 2 + [("breaks", "missing"), ("ours", "ok")] * 2
    assert found["rows"][4]["reason"] == LEFT_OUT and len(commands) == 3 and "--without=breaks" in commands[2]


def test_a_process_that_dies_costs_one_row(section):
    found, commands = section("ours", "dies", "torch")
    assert flat([found["rows"]]) == [("ours", "ok"), ("dies", "failed"), ("torch", "ok")] and len(commands) == 2
    assert found["rows"][1]["reason"] == "the process ended with exit code -11" and found["status"] == "ok"


def test_processes_that_cannot_begin_are_not_started_forever(section):
    found, commands = section("ours", "torch", "ours", "torch", "ours", limit=0)
    assert len(commands) == gpu_suite.IDLE and len(found["rows"]) == 5
    assert found["status"] == "5 of 5 rows not measured: the process ended with exit code -6"


def test_a_section_that_is_stopped_says_what_is_missing(section, monkeypatch):
    run_limited = gpu_suite.run_limited

    def stopped(command, *rest):
        run_limited(command, *rest)
        file = Path(command[command.index("--section-file") + 1])
        data = json.loads(file.read_text())
        file.write_text(json.dumps({**data, "rows": data["rows"][:1], "done": 1}))
        clock[0] += 1000
        return None, 60.0

    clock = [0.0]
    monkeypatch.setattr(gpu_suite, "run_limited", stopped)
    monkeypatch.setattr(gpu_suite, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(gpu_sections, "time", types.SimpleNamespace(monotonic=lambda: 0.0))
    found, _ = section("ours", "torch", "fastkl")
    assert [row["reason"] for row in found["rows"]] == [None, gpu_suite.STOPPED, NO_TIME]
    assert found["status"] == f"2 of 3 rows not measured: {NO_TIME}"


def test_a_section_that_ran_out_of_time_is_not_ok(section):
    """Its exit code is 0, and its rows say what is missing."""
    found, commands = section("ours", "torch", seconds=gpu_suite.LEAST_SECONDS - 1)
    assert commands == [] and found["status"] == f"2 of 2 rows not measured: {NO_TIME}"
    found, commands = section("ours", "torch", seconds=gpu_suite.LEAST_SECONDS + 1)
    assert len(commands) == 1 and found["status"] == "ok"


def test_accuracy_is_measured_again_without_the_one_that_broke_it(section, monkeypatch):
    """The records of a step have all providers: those behind the one that broke the context would have no figures."""
    runs = []

    def runner(plan, device, deadline, without):
        for step in plan:
            runs.append((step.workload.target, tuple(without)))
            bad = step.workload.target == 2.0 and "TRL" not in without
            monkeypatch.setattr(gpu_suite, "context_fault", lambda bad=bad: BROKEN_TEXT if bad else None)
            yield [{"errors": {"fastkl": {}, "TRL": {"reason": BROKEN_TEXT if bad else LEFT_OUT}}, "target": step.workload.target}]

    monkeypatch.setattr(gpu_suite, "line_of", lambda row: "")
    monkeypatch.setitem(gpu_suite.PLANS, "accuracy", (runner, steps([AccuracyCase("fp32", target) for target in (1.0, 2.0, 3.0)], ["all"])))
    found = gpu_suite.run_section("accuracy", 60)
    assert runs == [(1.0, ()), (2.0, ()), (2.0, ("TRL",)), (3.0, ("TRL",))] and found["status"] == "ok"
    assert [row["target"] for row in found["rows"]] == [1.0, 2.0, 3.0] and not any("context" in row for row in found["rows"])


# The whole run --------------------------------------------------------------------------------------------------


def test_a_failing_section_does_not_lose_the_others(tmp_path, monkeypatch):
    def run_section(name, seconds):
        if name == "main":
            raise RuntimeError("crashed")
        return {"gpu": {"name": "some GPU"}, "status": "ok", "seconds": 1, "rows": []}

    monkeypatch.setattr(gpu_suite, "run_section", run_section)
    gpu_suite.run_suite(tmp_path, ["main", "sweep"], 300, "the command")
    (file,) = tmp_path.glob("*.json")
    data = json.loads(file.read_text())
    assert data["sections"]["main"]["status"] == "RuntimeError: crashed"
    assert data["sections"]["sweep"]["status"] == "ok"
    assert data["gpu"] == {"name": "some GPU"} and data["command"] == "the command"


@pytest.fixture
def limits(monkeypatch):
    """Sections that all take their limit, or the seconds in `takes`, by a clock that only they move: their limits, and the clock."""
    clock, found, takes = [0.0], {}, {}

    def run(name, seconds):
        found[name] = seconds
        clock[0] += min(takes.get(name, seconds), seconds)
        return {"status": "ok", "seconds": seconds, "rows": []}

    monkeypatch.setattr(gpu_suite, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(gpu_suite, "run_section", run)
    monkeypatch.setattr(gpu_suite, "run_tests", lambda seconds, log: run("tests", seconds))
    return types.SimpleNamespace(clock=clock, found=found, takes=takes)


def test_the_whole_run_ends_in_time_and_leaves_some_to_the_tests(tmp_path, limits):
    gpu_suite.run_suite(tmp_path, list(gpu_suite.SECTIONS), gpu_suite.SECONDS, "the command")
    assert limits.clock[0] <= gpu_suite.SECONDS < 8 * 60 and sum(gpu_suite.SECTIONS.values()) == gpu_suite.SECONDS
    assert limits.found == gpu_suite.SECTIONS
    assert list(gpu_suite.SECTIONS)[:2] == ["main", "linear"], "the bars' sections come first"
    assert set(gpu_suite.PLANS) | {"tests"} == {*gpu_suite.SECTIONS, "smoke"}


def test_what_a_section_leaves_over_goes_to_the_next(tmp_path, limits):
    limits.takes.update(main=20, peers=10)
    gpu_suite.run_suite(tmp_path, list(gpu_suite.SECTIONS), gpu_suite.SECONDS, "the command")
    assert limits.found["linear"] == gpu_suite.SECTIONS["linear"] + gpu_suite.SECTIONS["main"] - 20
    assert limits.found["accuracy"] == gpu_suite.SECTIONS["accuracy"] + gpu_suite.SECTIONS["peers"] - 10
    assert limits.clock[0] <= gpu_suite.SECONDS


def test_one_section_alone_may_take_the_whole_time(tmp_path, limits):
    gpu_suite.run_suite(tmp_path, ["sweep"], 300, "the command")
    assert limits.found == {"sweep": 300}
    limits.clock[0] = 0.0
    gpu_suite.run_suite(tmp_path, ["main", "tests"], 100, "the command")
    assert limits.found["tests"] == 100 and "main" not in limits.found, "the tests keep their share of what little there is"


def test_a_section_may_have_its_own_seconds(tmp_path, limits, monkeypatch):
    monkeypatch.setattr(gpu_suite.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_suite.torch.cuda, "get_device_name", lambda index: "some GPU")
    gpu_suite.main(["--out", str(tmp_path), "--sections", "main:30,peers:70,linear", "--seconds", "190"])
    assert limits.found == {"main": 30, "peers": 70, "linear": 90}


@pytest.mark.parametrize(("option", "value", "got"), [
    ("--sections", "main:", "''"), ("--sections", "main:x", "'x'"), ("--sections", "main:-1", "'-1'"), ("--sections", "nothing", "'nothing'"),
    ("--sections", "nothing:5", "'nothing'"), ("--sections", "", "''"),
    *(("--seconds", seconds, repr(seconds)) for seconds in ("-5", "0", "nan", "inf", "soon")),
    *(("--out", folder, repr(folder)) for folder in ("/proc/x", "/proc/x/y", "/dev/null", __file__, f"{__file__}/x", "x" * 300)),
])
def test_wrong_use_is_found_before_the_gpu_is_looked_for(option, value, got, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("the arguments come first"))
    with pytest.raises(SystemExit) as ended:
        gpu_suite.main([option, value])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and f"{option}: expected" in error and f"got {got}" in error


def test_the_check_of_a_folder_leaves_no_trace(tmp_path):
    """Neither of folders that would be made, nor in one that is there."""
    (tmp_path / "old").mkdir()
    for name in ("old", "new", "new/newer", "missing/../new"):
        assert output_folder(str(tmp_path / name)) == tmp_path / name
    output_file(str(tmp_path / "new" / "x.json"))
    assert list(tmp_path.rglob("*")) == [tmp_path / "old"]


def test_the_tests_run_side_by_side_where_they_can(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(gpu_suite, "run_limited", lambda command, *rest, **environment: commands.append((command, environment)) or (0, 1.0))
    for spec in (None, object()):
        monkeypatch.setattr(gpu_suite.importlib.util, "find_spec", lambda name, spec=spec: spec)
        assert gpu_suite.run_tests(60, tmp_path / "log")["status"] == "ok"
    (alone, environment), (many, _) = commands
    assert many == [*alone, "-n", "10"] and environment["FASTKL_REQUIRE_GPU"] == "1"


def test_limited_commands_end_in_time(tmp_path):
    code, seconds = gpu_suite.run_limited([sys.executable, "-c", "import time; time.sleep(60)"], 0.5)
    assert code is None and seconds < 30
    with open(tmp_path / "log", "w") as log:
        assert gpu_suite.run_limited([sys.executable, "-c", "import os, sys; print('said', os.environ['X']); sys.exit(3)"], 60, log, X="y")[0] == 3
    assert (tmp_path / "log").read_text() == "said y\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_suite_refuses_without_cuda(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--out", str(tmp_path / "results")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip() == "gpu_suite: expected a CUDA GPU, got none; nothing was measured, run it on a machine that has one"
    assert not (tmp_path / "results").exists()


# On a GPU -------------------------------------------------------------------------------------------------------

BREAKING = """
import sys, time, torch
from pathlib import Path
from benchmarks import gpu_sections, gpu_suite, providers
from benchmarks.peers import Work

def breaks(inputs):
    index = torch.full((4,), 10**6, device="cuda")
    return (inputs.p.float().sum(-1) + torch.zeros(2, device="cuda")[index].sum(),)

providers.ALL_LOADERS["breaks"] = lambda device: {"kl_divergence": Work(breaks, "an index out of range")}
gpu_suite.PLANS["smoke"] = gpu_suite.PLANS["smoke"][0], gpu_sections.steps(gpu_suite.SMOKE[:1], ("torch", "breaks", "fastkl"))
sys.exit(gpu_suite.main(["--section", "smoke", "--section-file", sys.argv[1], "--until", str(time.monotonic() + 120)]))
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_section_on_a_gpu():
    found = gpu_suite.run_section("smoke", 200)
    assert found["status"] == "ok" and found["processes"] == 1 and found["gpu"]["name"], found
    copy, *rows = found["rows"]
    assert copy["copy"]["gb_per_s"] > 0 and flat([rows]) == [("fastkl", "ok"), ("torch", "ok")] * 2, rows
    for row in rows:
        assert set(row["times"]) == set(harness.PHASES) and row["memory"]["peak_bytes"] > 0 and row["note"]
        assert all(figures["timed_by"] in ("graph", "events") and figures["percent_of_copy"] > 0 for figures in row["times"].values())
    assert gpu_suite.report({"sections": {"smoke": found}, "bars": []})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_context_broken_on_a_gpu(tmp_path):
    """By an index out of range: the row says so, what was measured before it is kept, and the process ends with the code that has it go on."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    file = tmp_path / "section.json"
    done = subprocess.run([sys.executable, "-c", BREAKING, str(file)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == gpu_suite.BROKEN, done.stderr[-3000:]
    data = json.loads(file.read_text())
    assert flat([data["rows"][1:]]) == [("torch", "ok"), ("breaks", "failed")] and data["done"] == 2 and data["broken"] == "breaks"
    assert "CUDA" in data["rows"][-1]["reason"] and data["rows"][-1]["context"].startswith("broken")
