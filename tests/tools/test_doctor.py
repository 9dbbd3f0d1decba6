"""`fastkl doctor`: each fault makes it fail and name the check; a crash costs one check."""

from __future__ import annotations

import contextlib
import functools
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
from fastkl.tools.doctor import Isolated, Outcome

KEYS = list(doctor.checks_for("cpu"))
CPU = torch.device("cpu")
KL, STATS, LINEAR = fastkl.kl_divergence, fastkl.token_stats, fastkl.linear_kl_divergence


class Here:
    """Runs the checks in this process, where they can be sabotaged."""

    def __init__(self, device):
        self.run, self.close = functools.partial(doctor.run_check, device), lambda: None


@pytest.fixture
def report(monkeypatch, tmp_path):
    """Run the command here; return its exit code and the JSON."""
    monkeypatch.setattr(doctor, "Isolated", Here)

    def run():
        code = cli.main(["doctor", "--device", "cpu", "--json", str(tmp_path / "report.json")])
        return code, json.loads((tmp_path / "report.json").read_text())

    return run


# ---- the report


def test_everything_is_right_here(report, capsys):
    code, data = report()
    assert code == 0 and data["ok"] and data["issue"] is None
    assert [f"{check['group']}: {check['name']}" for check in data["checks"]] == KEYS
    assert {check["status"] for check in data["checks"]} <= {"ok", "skipped", "warning"}
    assert data["gpus_seen"] == torch.cuda.device_count()
    single = [check for check in data["checks"] if check["group"].startswith("float32")]
    figures = {check["name"]: check["figures"] for check in single}
    small, ordinary = (figures[name]["mean_kl"] for name in ("KL near 1e-6", "kl_divergence"))
    assert 1e-7 < small < 1e-5 < 0.1 < ordinary
    compared = ("kl_divergence", "token_stats", "linear", "strided view", "vocabulary 128256")
    assert all(0 < figures[name]["value_error"] < 2e-5 for name in compared)
    capsys.readouterr()
    assert cli.main(["doctor", "--device", "cpu", "--json"]) == 0
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)["checks"]) == len(KEYS) and printed.err


def test_json_that_cannot_be_written(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(doctor, "checks_for", lambda device: {})
    assert doctor.run_doctor("cpu", str(tmp_path / "missing" / "report.json")) == 1
    assert "missing/report.json" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    file = tmp_path / "report.json"
    assert cli.main(["doctor", "--device", "cuda", "--json", str(file)]) == 0, file.read_text()
    assert len(json.loads(file.read_text())["checks"]) == len(doctor.checks_for("cuda"))


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


def no_mask(p, q, mask=None):
    return (
        KL(p, q) if mask is None else torch.where(mask, KL(p.nan_to_num(), q.nan_to_num()), 1e-30)
    )


def raises(*args, **options):
    raise RuntimeError("PassManager::run failed\nsome source\n  ^\nname 'x' is not defined")


AGREE = {"kl_divergence", "KL near 1e-6", "strided view", "vocabulary 128256"}
SABOTAGE = {
    "KL off by 1 %": ("kl_divergence", times(1.01), AGREE, "kl: "),
    "KL is a NaN": ("kl_divergence", times(float("nan")), AGREE, "kl: got nan"),
    "NaN in the gradient to p": (
        "kl_divergence",
        spoiled(0, lambda g: g.fill_(torch.nan)),
        AGREE,
        "the first",
    ),
    "gradient to q off by 2 %": (
        "kl_divergence",
        spoiled(1, lambda g: 1.02 * g),
        AGREE,
        "the second: row",
    ),
    "gradient to p is 0": ("kl_divergence", spoiled(0, torch.zeros_like), AGREE, "the first: row"),
    "entropy off": ("token_stats", stats_off("entropy"), {"token_stats"}, "entropy: "),
    "log-probability off": (
        "token_stats",
        stats_off("ref_logprob"),
        {"token_stats"},
        "ref_logprob: ",
    ),
    "linear off": (
        "linear_kl_divergence",
        lambda *a, **o: LINEAR(*a, **o) * 1.001,
        {"linear"},
        "kl: ",
    ),
    "a masked row that is not 0": ("kl_divergence", no_mask, {"masked rows"}, "beside masked rows"),
    "bits by batch": (
        "kl_divergence",
        lambda p, q, mask=None: KL(p, q, mask=mask) * (1 + 2e-7 * len(p)),
        {"alone and in batch"},
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
    names = {check["name"] for check in failed}
    assert names >= wrong if target == "kl_divergence" else names == wrong
    assert any(words in check["text"] for check in failed)
    assert all(check["traceback"] for check in failed)
    assert data["issue"] in capsys.readouterr().out
    assert data["issue"].count("\nFAIL ") == len(failed)


# ---- the machine and its speed


def test_a_machine_with_faults(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**11))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    found = doctor.check_gpu(torch.device("cuda:1"))
    assert (
        found.status == "warning"
        and "NVIDIA H200" in found.text
        and found.figures["free_bytes"] == 10**9
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.collect_env, "get_gpu_info", lambda run: "GPU 0: NVIDIA H200")
    assert doctor.check_gpu(CPU).status == "warning"
    pins = ["filelock", "triton==3.0.1; linux"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: pins)
    assert doctor.check_versions(CPU).status == "warning"


@pytest.mark.parametrize(
    "name, value, status",
    [
        ("FASTKL_X", "1", "ok"),
        ("TRITON_INTERPRET", "1", "warning"),
        ("TRITON_INTERPRET", "0", "ok"),
    ],
)
def test_variables(monkeypatch, name, value, status):
    monkeypatch.setattr(os, "environ", {name: value, "HOME": "/"})
    assert doctor.check_environment(CPU) == Outcome(
        status, doctor.check_environment(CPU).text, {name: value}
    )


# ---- processes


def replaced(device, key):
    """Stand in for run_check in another process, which finds it by its name."""
    if key == "crash":
        os.abort()
    if key == "hang":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        Path("started").touch()
        time.sleep(1000)
    return Outcome("FAIL" if key == "broken" else "ok", f"CUDA error {os.getpid()}")


def test_a_crash_or_a_broken_gpu_costs_one_check(monkeypatch):
    monkeypatch.setattr(doctor, "run_check", replaced)
    with contextlib.closing(Isolated("cpu")) as isolated:
        keys = ("1", "crash", "2", "broken", "3")
        first, crash, second, broken, third = map(isolated.run, keys)
        assert crash.status == broken.status == "FAIL"
        processes = {each.text for each in (first, second, third) if each.status == "ok"}
        assert len(processes) == 3
        isolated.close()
        isolated.starts = doctor.STARTS
        assert isolated.run("4").status == "skipped"


def test_a_hang_costs_one_check(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "run_check", replaced)
    monkeypatch.setattr(doctor, "HANG", 0.5)
    with contextlib.closing(Isolated("cpu")) as isolated:
        assert [isolated.run(key).status for key in ("1", "hang")] == ["ok", "FAIL"]
        assert isolated.pool is None


def test_in_a_process_of_its_own(monkeypatch, capfd):
    chosen = dict(list(doctor.checks_for("cpu").items())[:5])
    monkeypatch.setattr(doctor, "checks_for", lambda device: chosen)
    assert doctor.run_doctor("cpu") == 0
    printed = capfd.readouterr()
    assert not printed.err and printed.out.count("\nok ") >= 3


def in_session(session):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its = path.read_text().rpartition(")")[2].split()[:4]
            found += [path.parent.name] if int(its) == session and state not in "ZX" else []
    return found


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at /proc")
def test_a_signal_leaves_nothing_behind(tmp_path):
    """Ended while a check runs, it takes its child and what that started with it."""
    start = (
        "import sys, test_doctor\nfrom fastkl.tools import cli, doctor\n"
        "doctor.run_check = test_doctor.replaced\n"
        "doctor.checks_for = lambda device: {'hang': None}\n"
        "sys.exit(cli.main(['doctor', '--device', 'cpu']))"
    )
    path = os.pathsep.join(map(str, (Path(__file__).parent, Path(fastkl.__file__).parents[1])))
    command = [sys.executable, "-c", start]
    environment = os.environ | {"PYTHONPATH": path}
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
