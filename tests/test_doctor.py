"""`fastkl doctor`: that every fault it looks for makes it fail and name the check, and that no crash or hang loses the report."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

import fastkl
from fastkl.tools import cli
from fastkl.tools.doctor import checks, compiling, process, run
from fastkl.tools.doctor.checks import Check, Context, Outcome

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
TRITON = importlib.util.find_spec("triton") is not None
KEYS = [check.key for check in checks.checks_for("cpu")]
CPU = torch.device("cpu")


@pytest.fixture
def doctor():
    """The command, with its exit code as the result."""
    return lambda *options: cli.main(["doctor", "--device", "cpu", *options])


@pytest.fixture
def in_this_process(monkeypatch):
    """The checks run where they can be sabotaged, and no kernel is compiled."""
    monkeypatch.setattr(run, "isolated", process.here)
    monkeypatch.setattr(compiling, "compile_kernel", lambda specialization, arch: None)


def context(device=CPU, seconds=100.0):
    return Context(torch.device(device), time.monotonic() + seconds)


def lines_of(text, status):
    return [line for line in text.splitlines() if line.startswith(f"  {status} ")]


# ---- the whole report


def test_everything_is_right_here(doctor, in_this_process, capsys, tmp_path):
    file = tmp_path / "report.json"
    assert doctor("--json", str(file)) == 0
    text = capsys.readouterr().out
    assert not lines_of(text, "FAIL") and len(lines_of(text, "ok")) >= 8 * 3 + 4
    assert max(map(len, text.splitlines())) <= 80
    for dtype in ("float32", "bfloat16", "float16"):
        assert f"\n{dtype} beside float64" in text
    assert "no GPU: nothing was timed" in text and "No kernel was run" in text and "issue" not in text
    seen = torch.cuda.device_count()
    assert ("NO GPU WAS SEEN. Where there must be one, as in CI, use --device cuda" in " ".join(text.split())) == (not seen)
    data = json.loads(file.read_text())
    assert [f"{check['group']}: {check['name']}" for check in data["checks"]] == KEYS and len(set(KEYS)) == len(KEYS)
    assert data["gpus_seen"] == seen and data["backend"] in ("reference", "triton")
    assert data["ok"] is True and data["issue"] is None and {check["status"] for check in data["checks"]} <= {"ok", "skipped", "warning"}
    figures = {check["name"]: check["figures"] for check in data["checks"] if check["group"].startswith("float32")}
    assert 1e-7 < figures["KL near 1e-6"]["mean_kl"] < 1e-5 < 0.1 < figures["kl_divergence"]["mean_kl"]
    assert all(0 < figures[name]["value_error"] < 2e-5 for name in ("kl_divergence", "token_stats", "linear", "strided view", "vocabulary 128256"))


def test_json_on_stdout_is_all_of_it(doctor, in_this_process, capsys):
    assert doctor("--json", "-") == 0
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)["checks"]) == len(KEYS) and "fastkl doctor" in printed.err


def test_json_that_cannot_be_written(in_this_process, capsys, tmp_path):
    assert run.run_doctor("cpu", str(tmp_path / "missing" / "report.json")) == 1
    assert "cannot be written" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [["--device", "tpu"], ["--json", "."], ["--json", "missing/report.json"], ["--json", "/proc/x"],
                                     ["--json", "/proc/x/y"], ["--json", "file/x"], ["--json", "x" * 300], ["--seconds", "5"], ["now"]])
def test_wrong_options(doctor, options, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(run, "isolated", lambda *_: pytest.fail("nothing may run"))
    with pytest.raises(SystemExit) as stopped:
        doctor(*options)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "error:" in error and [path.name for path in tmp_path.iterdir()] == ["file"]
    if options[0] == "--json":
        assert f"--json: expected a file that can be written, or -, got {options[1]!r} (" in error and "; choose another" in error


@pytest.mark.gpu
def test_on_a_gpu(capsys, tmp_path):
    file = tmp_path / "report.json"
    assert cli.main(["doctor", "--device", "cuda", "--json", str(file)]) == 0, capsys.readouterr().out
    data = json.loads(file.read_text())
    assert data["seconds"] < 90 and data["ok"] and len(data["checks"]) == len(checks.checks_for("cuda"))


# ---- what is wrong is found, and named


def off(factor):
    """kl_divergence times a factor, its gradient too."""
    return lambda *args, **options: KL(*args, **options) * factor


KL, STATS, LINEAR = fastkl.kl_divergence, fastkl.token_stats, fastkl.linear_kl_divergence


class Spoiled(torch.autograd.Function):
    """What it is given, with a gradient that is not its own."""

    @staticmethod
    def forward(ctx, value, spoil):
        ctx.spoil = spoil
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.spoil(gradient), None


def spoiled(which, spoil):
    """kl_divergence with a spoiled gradient to its first (0) or second (1) argument."""
    def kl(*logits, **options):
        logits = [Spoiled.apply(value, spoil) if index == which else value for index, value in enumerate(logits)]
        return KL(*logits, **options)
    return kl


def with_a_nan(gradient):
    return torch.where(torch.arange(gradient.shape[-1]) == 7, float("nan"), gradient)


def token_stats_off(field):
    def stats(*args, **options):
        result = STATS(*args, **options)
        return result._replace(**{field: getattr(result, field) * 1.001})
    return stats


def no_mask(p, q, mask=None):
    return KL(p, q) if mask is None else torch.where(mask, KL(p.nan_to_num(), q.nan_to_num(posinf=0.0)), 1e-30)


def by_batch(p, q, mask=None):
    return KL(p, q, mask=mask) * (1 + 2e-7 * p.shape[0])


def raises(*args, **options):
    raise RuntimeError("PassManager::run failed\nsome source\n  ^\nname 'x' is not defined")


SABOTAGE = {
    "KL off by 1 %": ("kl_divergence", off(1.01), ["kl_divergence", "KL near 1e-6", "strided view", "vocabulary 128256"], "allowed"),
    "KL is a NaN": ("kl_divergence", off(float("nan")), ["kl_divergence"], "kl of row"),
    "NaN in the gradient to p": ("kl_divergence", spoiled(0, with_a_nan), ["kl_divergence", "KL near 1e-6"], "gradient to p is not finite"),
    "NaN in the gradient to q": ("kl_divergence", spoiled(1, with_a_nan), ["kl_divergence", "strided view"], "gradient to q is not finite"),
    "gradient to q off by 2 %": ("kl_divergence", spoiled(1, lambda g: 1.02 * g), ["kl_divergence", "KL near 1e-6"], "gradient to q of row"),
    "gradient to p to nothing": ("kl_divergence", spoiled(0, torch.zeros_like), ["kl_divergence"], "gradient to p of row"),
    "entropy off": ("token_stats", token_stats_off("entropy"), ["token_stats"], "entropy of row"),
    "log-probability off": ("token_stats", token_stats_off("ref_logprob"), ["token_stats"], "ref_logprob of row"),
    "linear off": ("linear_kl_divergence", lambda *a, **o: LINEAR(*a, **o) * 1.001, ["linear"], "the sum is"),
    "a masked row that is not 0": ("kl_divergence", no_mask, ["masked rows"], "masked row is not 0"),
    "bits that depend on the batch": ("kl_divergence", by_batch, ["alone and in batch"], "other bits alone"),
    "an exception": ("token_stats", raises, ["token_stats"], "RuntimeError: PassManager::run failed … name 'x' is not defined"),
}


@pytest.mark.parametrize("case", SABOTAGE)
def test_sabotage_is_found_and_named(doctor, in_this_process, monkeypatch, capsys, tmp_path, case):
    target, function, names, words = SABOTAGE[case]
    monkeypatch.setattr(fastkl, target, function)
    assert doctor("--json", str(tmp_path / "report.json")) == 1
    text = capsys.readouterr().out
    data = json.loads((tmp_path / "report.json").read_text())
    failed = {(check["group"].split()[0], check["name"]) for check in data["checks"] if check["status"] == "FAIL"}
    assert failed >= {(dtype, name) for dtype in checks.DTYPES for name in names}
    if target != "kl_divergence":
        assert {name for _, name in failed} == set(names)
    assert any(words in check["text"] for check in data["checks"] if check["status"] == "FAIL"), data["issue"]
    assert data["ok"] is False and len(data["checks"]) == len(KEYS)
    # What is to be pasted has the versions and every failing line, and is on the screen as it is.
    assert data["issue"] in text and torch.__version__ in data["issue"] and fastkl.__version__ in data["issue"]
    assert all(f"FAIL float32 beside float64: {name}:" in data["issue"].replace("\n  ", " ") for name in names)
    assert max(map(len, text.splitlines())) <= 80 and len(lines_of(text, "FAIL")) == len(failed)


@pytest.mark.skipif(not TRITON or INTERPRETING, reason="needs Triton's compiler")
def test_a_kernel_that_does_not_compile_is_named(doctor, in_this_process, monkeypatch, capsys):
    def breaks(specialization, arch):
        if specialization.name.startswith("token_stats.backward_p"):
            raises()
    monkeypatch.setattr(compiling, "compile_kernel", breaks)
    assert doctor() == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "FAIL kernels, compiled for sm_90 and not run: float32: token_stats.backward_p: RuntimeError: PassManager::run failed" in text


@pytest.mark.skipif(not TRITON or INTERPRETING, reason="needs Triton's compiler")
def test_kernels_compile_without_a_gpu(monkeypatch):
    from fastkl.kernels import compile_plan

    whole = compile_plan.plan
    monkeypatch.setattr(compile_plan, "plan", lambda *args: [entry for entry in whole(*args) if entry.name.endswith("only.fallback")])
    outcome = compiling.compile_only(context(), "bfloat16", "sm_90")
    assert outcome.status == "ok" and outcome.figures["kernels"] == 1
    monkeypatch.setattr(compile_plan, "plan", lambda *args: [entry for entry in whole(*args) if entry.name.endswith("only.fallback")] * 2)
    late = compiling.compile_only(context(seconds=0.0), "bfloat16", "sm_90")
    assert (late.status, late.figures["tried"]) == ("skipped", 0) and "0 of 2 kernels" in late.text
    monkeypatch.setattr("fastkl.kernels.compile_plan.config.RowConfig.options", lambda self, arch, capped=False: {"maxnreg": "many"})
    monkeypatch.setattr(compile_plan, "plan", lambda *args: [entry for entry in whole(*args) if entry.name == "kl_divergence.backward_p"])
    assert checks.run_check(Check("", "", functools.partial(compiling.compile_only, dtype="bfloat16", arch="sm_90")), context()).status == "FAIL"


# ---- processes


def quick(connection, log, device, keys):
    """All checks, without compiling."""
    compiling.compile_kernel = lambda specialization, arch: None
    process.work(connection, log, device, keys)


def crash_at(number, end, connection, log, device, keys):
    """Outcomes with each check's name until the check of that number (of all), which ends the process."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 2)
        connection.send("ready")
        connection.recv()
        for key in keys:
            if key == str(number):
                os.write(2, b"\nLLVM ERROR: operation destroyed\n\n")
                end()
            connection.send(Outcome("ok", key))


def forever():
    time.sleep(1000)


def test_in_a_process_of_its_own_in_time(monkeypatch, capfd):
    monkeypatch.setattr(run, "isolated", functools.partial(process.isolated, target=quick))
    started = time.monotonic()
    assert run.run_doctor("cpu") == 0
    assert time.monotonic() - started < 60
    printed = capfd.readouterr()
    assert not printed.err and len([line for line in printed.out.splitlines() if line[:10].strip() in checks.STATUSES]) == len(KEYS)


def test_a_crash_costs_one_check():
    outcomes = list(process.isolated("cpu", list("01234"), target=functools.partial(crash_at, 2, os.abort)))
    assert [outcome.status for outcome in outcomes] == ["ok", "ok", "FAIL", "ok", "ok"]
    assert [outcome.text for outcome in outcomes][3:] == ["3", "4"]
    assert outcomes[2].text == "the process crashed: signal SIGABRT: LLVM ERROR: operation destroyed"


def test_a_hang_ends_with_the_time(monkeypatch):
    monkeypatch.setattr(process, "LAST_SECONDS", 1.0)
    started = time.monotonic()
    outcomes = list(process.isolated("cpu", list("0123"), target=functools.partial(crash_at, 1, forever)))
    assert [outcome.status for outcome in outcomes] == ["ok", "FAIL", "skipped", "skipped"] and "stopped" in outcomes[1].text
    assert time.monotonic() - started < 30


def ignoring(connection, log, device, keys):
    """A check that hangs, with a compiler beside it and a temporary file; neither ends by
    itself."""
    process.here = lambda *_: iter(compilers())
    process.work(connection, log, device, keys)


def compilers():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    tempfile.mkstemp()
    yield Outcome("ok", "started")
    forever()


def in_session(session):
    """Processes of a session that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its = path.read_text().rpartition(")")[2].split()[:4]
            found += [path.parent.name] if int(its) == session and state not in "ZX" else []
    return found


def check_ended(doctor, name, code, said, folder):
    """End one that runs by a signal: its exit code and last words, no process and no file left."""
    while "started" not in doctor.stdout.readline():
        assert doctor.poll() is None, doctor.stderr.read()
    assert len(in_session(doctor.pid)) >= 3 and list(folder.glob("fastkl-doctor-*/tmp*"))
    (os.killpg if name == "SIGINT" else os.kill)(doctor.pid, getattr(signal, name))
    _, error = doctor.communicate(timeout=60)
    assert (doctor.returncode, error) == (code, said) and list(folder.iterdir()) == []
    deadline = time.monotonic() + 30  # for the system to end what was killed
    while in_session(doctor.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not in_session(doctor.pid)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at /proc")
def test_a_signal_leaves_nothing_behind(tmp_path):
    """Ended while a check runs, it takes its child, what that started, and its folders with it.
    Ctrl-C is sent to all, as a terminal does."""
    start = ("import functools, sys, test_doctor\nfrom fastkl.tools import cli\nfrom fastkl.tools.doctor import process, run\n"
             "run.isolated = functools.partial(process.isolated, target=test_doctor.ignoring)\nsys.exit(cli.main(['doctor', '--device', 'cpu']))")
    path = os.pathsep.join(map(str, (Path(__file__).parent, Path(fastkl.__file__).parents[1])))
    cases, doctors = {"SIGTERM": (143, ""), "SIGHUP": (129, ""), "SIGINT": (130, "interrupted\n")}, {}
    for name in cases:
        (tmp_path / name).mkdir()
        environment = os.environ | {"TMPDIR": str(tmp_path / name), "PYTHONPATH": path}
        doctors[name] = subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
                                         start_new_session=True)
    try:
        for name, doctor in doctors.items():
            check_ended(doctor, name, *cases[name], tmp_path / name)
    finally:  # where that failed
        for doctor in doctors.values():
            for process_id in in_session(doctor.pid):
                os.kill(int(process_id), signal.SIGKILL)


def test_a_broken_gpu_ends_the_process_and_the_others_go_on(monkeypatch):
    def listed(device):
        def broken(context):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return [Check("", "0", lambda context: Outcome("ok", "0")), Check("", "1", broken), Check("", "2", lambda context: Outcome("ok", "2"))]
    monkeypatch.setattr(process, "checks_for", listed)
    assert [outcome.status for outcome in process.here("cpu", [": 0", ": 1", ": 2"])] == ["ok", "FAIL"]
    assert [outcome.text for outcome in process.here("cpu", [": 2"])] == ["2"]


def test_nothing_starts_when_the_time_is_over(in_this_process, monkeypatch, capsys):
    monkeypatch.setattr(run, "isolated", functools.partial(process.here, seconds=0.0))
    assert run.run_doctor("cpu") == 0
    text = capsys.readouterr().out
    assert len(lines_of(text, "skipped")) == len(KEYS) and "not everything was checked" in text and "Nothing is wrong" not in text


def test_kernels_that_do_not_launch_are_not_tried_again():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    keys = [check.key for check in checks.checks_for("cuda")]
    assert keys.index("speed: kl_divergence") < keys.index("float32 beside float64: kl_divergence")
    outcomes = dict(zip(keys, process.here("cuda", keys), strict=True))
    assert outcomes["kernels: compile and launch"].status == "FAIL"
    assert {outcome.text for key, outcome in outcomes.items() if "float64" in key or "speed" in key} == {"the kernels do not run here"}
    assert len(outcomes) == len(KEYS) - 1 and outcomes["this machine: torch"].status == "ok"
