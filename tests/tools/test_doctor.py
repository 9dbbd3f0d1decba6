"""`fastkl doctor`: each fault makes it fail and name the check; a crash costs one check."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from functools import cache, partial
from pathlib import Path

import pytest
import torch

import fastkl
from fastkl.tools import cli, doctor

CPU = torch.device("cpu")
KL, STATS, LINEAR = fastkl.kl_divergence, fastkl.token_stats, fastkl.linear_kl_divergence
SUM, ENVIRONMENT = doctor.check_sum, cache(doctor.collect_env.get_env_info)


@pytest.fixture
def report(tmp_path, monkeypatch):
    # Run the checks in this process, where they can be sabotaged; return exit code and JSON.
    here = lambda device, keys: (doctor.run_check(device, key) for key in keys)  # noqa: E731
    monkeypatch.setattr(doctor, "outcomes", here)
    monkeypatch.setattr(doctor.collect_env, "get_env_info", ENVIRONMENT)

    def run(device="cpu"):
        if device == "cpu":  # its sizes are for kernels
            monkeypatch.setattr(doctor, "LARGE_VOCABULARY", 3001)
            few = lambda shape, *rest, **how: SUM((8, shape[1]), *rest, **how)  # noqa: E731
            monkeypatch.setattr(doctor, "check_sum", few)
        code = cli.main(["doctor", "--device", device, "--json", str(tmp_path / "report.json")])
        return code, json.loads((tmp_path / "report.json").read_text())

    return run


# ---- the report


def test_everything_is_right_here(report, capsys, monkeypatch):
    code, data = report()
    assert code == 0 and data["ok"]
    assert [check["check"] for check in data["checks"]] == list(doctor.all_checks())
    assert {check["status"] for check in data["checks"]} <= {"ok", "warning"}
    single = [check for check in data["checks"] if check["check"].startswith("float32")]
    figures = {check["check"].rpartition(": ")[2]: check["figures"] for check in single}
    small, ordinary = (figures[name]["mean_kl"] for name in ("KL near 1e-6", "kl_divergence"))
    assert 1e-7 < small < 1e-5 < 0.1 < ordinary
    errors = [each["value_error"] for each in figures.values() if "value_error" in each]
    assert len(errors) == 10 and 0 < min(errors) and max(errors) < 2e-5
    capsys.readouterr()
    monkeypatch.setattr(doctor, "all_checks", lambda: {"machine": doctor.check_machine})
    assert cli.main(["doctor", "--device", "cpu", "--json"]) == 0
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)["checks"]) == 1 and "machine: " in printed.err


@pytest.mark.gpu
def test_on_a_gpu(report):
    code, data = report("cuda")
    assert code == 0, data


# ---- faults


def times(function, factor, *args, **options):
    return function(*args, **options) * factor


def spoiled(which, spoil, *logits, **options):
    # Of the same values; a hook needs a side that takes part in autograd.
    logits = [value * torch.ones((), requires_grad=True) for value in logits]
    logits[which].register_hook(spoil)
    return KL(*logits, **options)


def stats_off(field, *args, **options):
    stats = STATS(*args, **options)
    return stats._replace(**{field: stats.kl * 1.001})


def no_mask(p, q, mask=None, **how):
    kl = KL(p.nan_to_num(), q.nan_to_num(), **how)
    return kl if mask is None else torch.where(mask, kl, 1e-30)


def raises(*args, **options):
    raise RuntimeError("PassManager::run failed\nsome source\n  ^\nname 'x' is not defined")


PAIRS = ("kl_divergence", "KL near 1e-6", "strided view", "vocabulary 128256")
SUMS = ("sum of 8 rows", "sum of 3000 rows")
VALUES = dict.fromkeys([*PAIRS, *SUMS], "kl: ")
FIRST = dict.fromkeys([*PAIRS, *SUMS, "bits of rows"], "gradient to the first")
SECOND = dict.fromkeys(PAIRS, "gradient to the second: ")
CRASH = "RuntimeError: PassManager::run failed … name 'x' is not defined"
# Functions that are replaced together, and the checks that fail, with words of their lines.
SABOTAGE = {
    "values off": (
        {
            "kl_divergence": partial(times, KL, 1.01),
            "token_stats": partial(stats_off, "entropy"),
            "linear_kl_divergence": partial(times, LINEAR, 1.001),
        },
        VALUES | {"token_stats": "entropy: ", "linear": "kl: "},
    ),
    "NaN in the gradient to p, log-prob off": (
        {
            "kl_divergence": partial(spoiled, 0, lambda g: g.fill_(torch.nan)),
            "token_stats": partial(stats_off, "ref_logprob"),
        },
        FIRST | {"token_stats": "ref_logprob: "},
    ),
    "gradient to q off by 2 %, an exception": (
        {"kl_divergence": partial(spoiled, 1, lambda g: 1.02 * g), "token_stats": raises},
        SECOND | {"token_stats": CRASH},
    ),
    "a masked row that is not 0": (
        {"kl_divergence": no_mask},
        {"bits of rows": "beside masked"},
    ),
    "bits by batch": (
        {"kl_divergence": lambda p, q, **how: KL(p, q, **how) * (1 + 2e-7 * len(p))},
        {"bits of rows": "alone: "},
    ),
}


@pytest.mark.parametrize("case", SABOTAGE)
def test_sabotage_is_found_and_named(report, monkeypatch, capsys, case):
    functions, wrong = SABOTAGE[case]
    for target, function in functions.items():
        monkeypatch.setattr(fastkl, target, function)
    # One type of number: the checks of the others are the same functions.
    monkeypatch.setattr(doctor, "LIMITS", {"float32": doctor.LIMITS["float32"]})
    code, data = report()
    failed = [check for check in data["checks"] if check["status"] == "FAIL"]
    assert code == 1 and not data["ok"]
    said = {check["check"].rpartition(": ")[2]: check["text"] for check in failed}
    assert said.keys() == wrong.keys(), said
    assert all(words in said[name] for name, words in wrong.items()), said
    assert all(check["figures"]["traceback"] for check in failed)
    assert capsys.readouterr().out.count(": FAIL, ") == len(failed)


# ---- processes


SURVIVE = "import pathlib, time; time.sleep(1000); pathlib.Path('survived').touch()"


def hang(device):
    # The lock is held until this process and the one that it starts have ended.
    lock = os.open("lock", os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    subprocess.Popen([sys.executable, "-c", SURVIVE], stdout=lock)
    Path("started").touch()
    exec(SURVIVE)


RUN_CHECKS = doctor.run_checks
FAULTS = {"crash": lambda device: os.abort(), "hang": hang}
FAULTS |= {"broken": raises, "fine": lambda device: doctor.Outcome("ok", str(os.getpid()))}


def replaced(device, keys, send):
    # Stands in for run_checks in another process, which finds it by its name.
    doctor.all_checks, doctor.HANG = lambda: FAULTS, 0.5 if keys[0] == "hang" else 1000.0
    RUN_CHECKS(device, keys, send)


def slow(device, keys, send):
    os.setpgrp()
    hang(device)


def test_a_crash_a_hang_or_a_failure_costs_one_check(monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "run_checks", replaced)
    monkeypatch.setattr(doctor, "CRASHES", 2)
    keys = ("fine", "fine", "broken", "fine", "crash", "hang", "fine")
    found = [*doctor.outcomes("cpu", keys)]
    assert [each.status for each in found] == ["ok", "ok", "FAIL", "ok", "FAIL", "FAIL", "skipped"]
    assert len({each.text for each in found if each.status == "ok"}) == 2
    assert capfd.readouterr().err.count("run_check") >= 2  # stacks
    fcntl.flock(os.open(tmp_path / "lock", os.O_RDONLY), fcntl.LOCK_EX)
    assert not (tmp_path / "survived").exists()


def test_a_signal_leaves_no_process_behind(tmp_path):
    # Ended while a check runs, it takes its child and what that started with it.
    start = (
        "import sys, test_doctor\nfrom fastkl.tools import cli, doctor\n"
        "doctor.run_checks = test_doctor.slow\ndoctor.all_checks = lambda: {'hang': None}\n"
        "sys.exit(cli.main(['doctor', '--device', 'cpu']))"
    )
    path = os.pathsep.join(map(str, (Path(__file__).parent, Path(fastkl.__file__).parents[1])))
    command, environment = [sys.executable, "-c", start], os.environ | {"PYTHONPATH": path}
    process = subprocess.Popen(command, env=environment, cwd=tmp_path)
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait() == 143
    fcntl.flock(os.open(tmp_path / "lock", os.O_RDONLY), fcntl.LOCK_EX)
    assert not (tmp_path / "survived").exists()


# ---- the machine


def test_a_machine_with_faults(monkeypatch):
    monkeypatch.setattr(doctor.collect_env, "get_env_info", ENVIRONMENT)
    monkeypatch.setattr(os, "environ", {"FASTKL_X": "1", "TRITON_INTERPRET": "0"})
    sound = doctor.check_machine(CPU)
    assert sound.status == "ok" and "FASTKL_X=1" in sound.text
    for target, name, value in (
        (os, "environ", {"TRITON_INTERPRET": "1"}),
        (doctor.collect_env, "get_gpu_info", lambda run: "GPU 0: NVIDIA H200"),
        (doctor.importlib.metadata, "requires", lambda name: ["filelock", "triton==3.0.1; linux"]),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(target, name, value)
            changed.setattr(torch.cuda, "device_count", lambda: 0)
            assert doctor.check_machine(CPU).status == "warning"
