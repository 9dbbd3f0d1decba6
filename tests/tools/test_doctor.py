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


class Here(contextlib.ExitStack):
    """Runs the checks in this process, where they can be sabotaged."""

    def __init__(self, device):
        super().__init__()
        self.run = functools.partial(doctor.run_check, device)


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
    assert data["gpus_seen"] == torch.cuda.device_count() and data["backend"] in (
        "reference",
        "triton",
    )
    figures = {
        check["name"]: check["figures"]
        for check in data["checks"]
        if check["group"].startswith("float32")
    }
    assert (
        1e-7 < figures["KL near 1e-6"]["mean_kl"] < 1e-5 < 0.1 < figures["kl_divergence"]["mean_kl"]
    )
    compared = ("kl_divergence", "token_stats", "linear", "strided view", "vocabulary 128256")
    assert all(0 < figures[name]["value_error"] < 2e-5 for name in compared)
    assert data["checks"][0]["figures"]["torch_version"] == torch.__version__
    assert ("NO GPU" in capsys.readouterr().out) == (not data["gpus_seen"])


def test_json_on_stdout_is_all_of_it(report, capsys):
    assert cli.main(["doctor", "--device", "cpu", "--json"]) == 0
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)["checks"]) == len(KEYS) and printed.err


def test_json_that_cannot_be_written(report, capsys, tmp_path):
    assert doctor.run_doctor("cpu", str(tmp_path / "missing" / "report.json")) == 1
    assert "missing/report.json" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


WRONG = (
    "--device tpu",
    "--json .",
    "--json missing/report.json",
    "--json /proc/x",
    "--json /proc/x/y",
    "--json file/x",
    f"--json {'x' * 300}",
    "--seconds 5",
    "now",
)


@pytest.mark.parametrize("options", WRONG)
def test_wrong_options(options, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(doctor, "Isolated", lambda device: pytest.fail("nothing may run"))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "--device", "cpu", *options.split()])
    assert stopped.value.code == 2 and [path.name for path in tmp_path.iterdir()] == ["file"]
    assert options.split()[0] in capsys.readouterr().err


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
    code, data = report()
    failed = [check for check in data["checks"] if check["status"] == "FAIL"]
    assert code == 1 and not data["ok"] and len(data["checks"]) == len(KEYS)
    for dtype in doctor.LIMITS:
        assert {
            check["name"] for check in failed if check["group"].startswith(f"{dtype} ")
        } >= wrong
    if target != "kl_divergence":
        assert {check["name"] for check in failed} == wrong
    assert any(words in check["text"] for check in failed) and all(
        check["traceback"] for check in failed
    )
    assert data["issue"] in capsys.readouterr().out and data["issue"].count("\nFAIL ") == len(
        failed
    )
    assert fastkl.__version__ in data["issue"]


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


def test_percent_of_a_copy(monkeypatch):
    monkeypatch.setattr(doctor, "LARGE_VOCABULARY", 64)
    milliseconds = iter((2.0, 2.5, 5.0))
    figures = doctor.measure(CPU, 10, lambda run: (run(), next(milliseconds))[1])
    assert figures["copy_gb_per_s"] == pytest.approx(2 * 10 * 64 * 2 / 2e-3 / 1e9)
    assert figures["forward_percent_of_copy"] == pytest.approx(80)
    assert (
        figures["backward_percent_of_copy"] == pytest.approx(60) and figures["backward_ms"] == 5.0
    )
    assert doctor.check_speed(CPU).status == "skipped"


# ---- processes


def replaced(device, key):
    """Stand in for run_check in another process, which finds it by its name."""
    if key == "crash":
        os.write(2, b"\nLLVM ERROR: operation destroyed\n\n")
        os.abort()
    if key == "hang":
        time.sleep(1000)
    if key == "compile":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        Path(os.environ["TMPDIR"], "started").touch()
        time.sleep(1000)
    return (
        Outcome("FAIL", "CUDA error") if key == "broken" else Outcome("ok", f"{key} {os.getpid()}")
    )


def test_a_crash_a_hang_or_a_broken_gpu_costs_one_check(monkeypatch):
    monkeypatch.setattr(doctor, "run_check", replaced)
    monkeypatch.setattr(doctor, "HANG", 5.0)
    with Isolated("cpu") as isolated:
        first, crash, second, broken, third, hang, fourth, same = map(
            isolated.run, ("1", "crash", "2", "broken", "3", "hang", "4", "5")
        )
    assert (
        "LLVM ERROR: operation destroyed" in crash.text and hang.status == broken.status == "FAIL"
    )
    processes = [each.text.split()[1] for each in (first, second, third, fourth, same)]
    assert len(set(processes)) == 4 and processes[3] == processes[4] and third.status == "ok"
    assert not os.path.exists(isolated.folder)


def test_nothing_starts_when_the_time_is_over_or_after_four_crashes():
    with Isolated("cpu") as isolated:
        for isolated.deadline, isolated.starts in ((0.0, 0), (float("inf"), doctor.STARTS)):
            assert isolated.run(KEYS[0]).status == "skipped"


def test_in_a_process_of_its_own(capfd):
    assert doctor.run_doctor("cpu") == 0
    printed = capfd.readouterr()
    assert not printed.err and printed.out.count("\nok ") > 20


def in_session(session):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its = path.read_text().rpartition(")")[2].split()[:4]
            found += [path.parent.name] if int(its) == session and state not in "ZX" else []
    return found


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at /proc")
@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_signal_leaves_nothing_behind(tmp_path, name, code):
    """Ended while a check runs, it takes its child, a compiler and its folder with it."""
    start = (
        "import sys, test_doctor\nfrom fastkl.tools import cli, doctor\n"
        "doctor.run_check = test_doctor.replaced\n"
        "doctor.checks_for = lambda device: {'compile': None}\n"
        "sys.exit(cli.main(['doctor', '--device', 'cpu']))"
    )
    path = os.pathsep.join(map(str, (Path(__file__).parent, Path(fastkl.__file__).parents[1])))
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": path}
    command = subprocess.Popen(
        [sys.executable, "-c", start], env=environment, start_new_session=True
    )
    try:
        while not list(tmp_path.glob("fastkl-doctor-*/started")):
            assert command.poll() is None
            time.sleep(0.05)
        assert len(in_session(command.pid)) >= 3
        (os.killpg if name == "SIGINT" else os.kill)(command.pid, getattr(signal, name))
        assert command.wait() == code and list(tmp_path.iterdir()) == []
        while in_session(command.pid):
            time.sleep(0.05)
    finally:
        for process in in_session(command.pid):
            os.kill(int(process), signal.SIGKILL)
