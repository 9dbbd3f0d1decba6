"""`fastkl doctor`: each fault makes it fail and name the check; a crash costs one check."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fastkl
from fastkl.tools import cli, doctor

CPU = torch.device("cpu")
KL, STATS, LINEAR = fastkl.kl_divergence, fastkl.token_stats, fastkl.linear_kl_divergence


@pytest.fixture
def report(tmp_path, monkeypatch):
    # Run the checks in this process, where they can be sabotaged; return exit code and JSON.
    here = lambda device, keys: (doctor.run_check(device, key) for key in keys)  # noqa: E731
    monkeypatch.setattr(doctor, "outcomes", here)

    def run(device="cpu"):
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
    compared = {name: each for name, each in figures.items() if "value_error" in each}
    assert len(compared) == 8 and all(0 < x["value_error"] < 2e-5 for x in compared.values())
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


def times(factor):
    return lambda *args, **options: KL(*args, **options) * factor


def spoiled(which, spoil):
    def kl(*logits, **options):
        logits = [value * 1 for value in logits]
        logits[which].register_hook(spoil)
        return KL(*logits, **options)

    return kl


def stats_off(field):
    def stats(*args, **options):
        return STATS(*args, **options)._replace(**{field: STATS(*args, **options).kl * 1.001})

    return stats


def no_mask(p, q, mask=None, **how):
    kl = KL(p.nan_to_num(), q.nan_to_num(), **how)
    return kl if mask is None else torch.where(mask, kl, 1e-30)


def raises(*args, **options):
    raise RuntimeError("PassManager::run failed\nsome source\n  ^\nname 'x' is not defined")


AGREE = {"kl_divergence", "KL near 1e-6", "strided view", "vocabulary 128256"}
SABOTAGE = {
    "KL off by 1 %": ("kl_divergence", times(1.01), AGREE, "kl: "),
    "NaN in the gradient to p": (
        "kl_divergence",
        spoiled(0, lambda g: g.fill_(torch.nan)),
        AGREE | {"sum of 8 rows"},
        "the first",
    ),
    "gradient to q off by 2 %": (
        "kl_divergence",
        spoiled(1, lambda g: 1.02 * g),
        AGREE,
        "the second: ",
    ),
    "entropy off": ("token_stats", stats_off("entropy"), {"token_stats"}, "entropy: "),
    "log-prob off": ("token_stats", stats_off("ref_logprob"), {"token_stats"}, "ref_logprob: "),
    "linear off": (
        "linear_kl_divergence",
        lambda *a, **o: LINEAR(*a, **o) * 1.001,
        {"linear"},
        "kl: ",
    ),
    "a masked row that is not 0": ("kl_divergence", no_mask, {"bits of rows"}, "beside masked"),
    "bits by batch": (
        "kl_divergence",
        lambda p, q, **how: KL(p, q, **how) * (1 + 2e-7 * len(p)),
        {"bits of rows"},
        "alone: ",
    ),
    "an exception": (
        "token_stats",
        raises,
        {"token_stats"},
        "RuntimeError: PassManager::run failed … name 'x' is not defined",
    ),
}


@pytest.mark.parametrize("case", SABOTAGE)
def test_sabotage_is_found_and_named(report, monkeypatch, capsys, case):
    target, function, wrong, words = SABOTAGE[case]
    monkeypatch.setattr(fastkl, target, function)
    # One type of number: the checks of the others are the same functions.
    monkeypatch.setattr(doctor, "LIMITS", {"float32": doctor.LIMITS["float32"]})
    monkeypatch.setattr(doctor, "LARGE_VOCABULARY", 3001)
    code, data = report()
    failed = [check for check in data["checks"] if check["status"] == "FAIL"]
    assert code == 1 and not data["ok"]
    names = {check["check"].rpartition(": ")[2] for check in failed}
    assert names >= wrong if target == "kl_divergence" else names == wrong
    assert any(words in check["text"] for check in failed)
    assert all(check["figures"]["traceback"] for check in failed)
    assert capsys.readouterr().out.count(": FAIL, ") == len(failed)


# ---- processes


def hang(device):
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    Path("started").write_text(str(started.pid))
    time.sleep(1000)


RUN_CHECK, RUN_CHECKS = doctor.run_check, doctor.run_checks
FAULTS = {"crash": lambda device: os.abort(), "hang": hang}
FAULTS |= {"broken": raises, "fine": lambda device: doctor.Outcome("ok", str(os.getpid()))}


def replaced(device, keys, send):
    # Stands in for run_checks in another process, which finds it by its name.
    doctor.all_checks, doctor.run_check = lambda: FAULTS, timed
    RUN_CHECKS(device, keys, send)


def timed(device, key):
    doctor.HANG = 0.5 if key == "hang" else 1000.0
    return RUN_CHECK(device, key)


def slow(device, keys, send):
    os.setpgrp()
    hang(device)


def test_a_crash_a_hang_or_a_failure_costs_one_check(monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "run_checks", replaced)
    monkeypatch.setattr(doctor, "CRASHES", 2)
    keys = ("fine", "fine", "broken", "fine", "crash", "fine", "hang", "fine")
    found = [*doctor.outcomes("cpu", keys)]
    status = [each.status for each in found]
    assert status == ["ok", "ok", "FAIL", "ok", "FAIL", "ok", "FAIL", "skipped"]
    assert len({each.text for each in found if each.status == "ok"}) == 3
    assert capfd.readouterr().err.count("run_check") >= 2  # stacks
    while (tmp_path / "started").read_text() in in_session(os.getsid(0)):
        time.sleep(0.05)


def in_session(session):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its = path.read_text().rpartition(")")[2].split()[:4]
            found += [path.parent.name] if int(its) == session and state not in "ZX" else []
    return found


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at /proc")
def test_a_signal_leaves_no_process_behind(tmp_path):
    # Ended while a check runs, it takes its child and what that started with it.
    start = (
        "import sys, test_doctor\nfrom fastkl.tools import cli, doctor\n"
        "doctor.run_checks = test_doctor.slow\ndoctor.all_checks = lambda: {'hang': None}\n"
        "sys.exit(cli.main(['doctor', '--device', 'cpu']))"
    )
    path = os.pathsep.join(map(str, (Path(__file__).parent, Path(fastkl.__file__).parents[1])))
    command, environment = [sys.executable, "-c", start], os.environ | {"PYTHONPATH": path}
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, start_new_session=True)
    try:
        while not (tmp_path / "started").exists():
            assert process.poll() is None
            time.sleep(0.05)
        assert len(in_session(process.pid)) >= 3
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143
        while in_session(process.pid):
            time.sleep(0.05)
    finally:
        for each in in_session(process.pid):
            os.kill(int(each), signal.SIGKILL)


# ---- the machine


def test_a_machine_with_faults(monkeypatch):
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
