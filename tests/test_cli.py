"""The command line: it starts without torch, and ends in one line whatever ends it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fastkl.tools import cli, signals
from fastkl.tools.words import percent

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "triton", "transformers", "matplotlib", "numpy", "tokenizers", "tqdm")
COMMANDS = ("demo", "compare", "plot", "doctor")
WRONG = [
    [],
    ["nonsense"],
    ["demo", "--steps", "1"],
    ["demo", "--device", "abacus"],
    ["demo", "--out", "/dev/null/x"],
    ["demo", "--out", "/dev/null"],
    ["compare", "a"],
    ["compare", "a", "b", "--text", "missing.txt"],
    ["compare", "a", "b", "--text", "README.md", "--json", "missing/x"],
    ["compare", "a", "b"],
    ["compare", "a", "b", "--text", "x", "--top", "0"],
    ["compare", "a", "b", "--text", "x", "--device", "gpu"],
    ["plot"],
    ["plot", "missing.jsonl"],
    ["plot", "."],
    ["plot", "/dev/zero"],
    ["plot", "README.md", "--out", "x.pdf"],
    ["plot", "README.md", "--out", "missing/x.png"],
    ["doctor", "--device", "tpu"],
    ["doctor", "--json", "missing/x"],
    ["doctor", "--json", "."],
]


# ---- the start


def test_help_version_and_wrong_use_import_nothing_heavy():
    """One process runs all of them: their start is Python's own and some files of the standard
    library."""
    right = [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)]
    code = f"""
import sys
from fastkl.tools.cli import main
for code, commands in ((0, {right!r}), (2, {WRONG!r})):
    for command in commands:
        try:
            main(command)
        except SystemExit as ended:
            assert ended.code == code, (command, ended.code)
        else:
            raise AssertionError(command)
        heavy = [name for name in {HEAVY!r} if name in sys.modules]
        assert not heavy, (command, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        done.stderr.count("error:") == len(WRONG) and done.stdout.count("usage:") == len(right) - 1
    )


def test_what_is_installed_and_broken_is_said(monkeypatch, capsys):
    """An extra's package that cannot be imported is wrong use in one line, as one that is
    missing."""

    def broken(name, package=None):
        raise ImportError("libx.so: cannot open\nshared object", name="tokenizers")

    monkeypatch.setattr(cli, "missing_modules", lambda names: [])
    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(SystemExit) as ended:
        cli.main(["compare", "a", "b", "--text", str(ROOT / "README.md"), "--device", "cpu"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "fastkl compare: error: cannot be imported: tokenizers (libx.so: cannot open shared object); "
        "remedy: pip install --upgrade 'fastkl[compare]'\n"
    )


def test_a_device_that_this_machine_lacks(tmp_path, capsys):
    """A name that only torch can judge is refused before anything is made."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", "--device", "cuda:99", "--out", str(tmp_path / "run")])
    assert ended.value.code == 2 and list(tmp_path.iterdir()) == []
    assert "argument --device: expected one that this machine has (cpu" in capsys.readouterr().err


# ---- the end

needs_dev_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


def doing(monkeypatch, action, command="doctor"):
    """Make a command do something else."""
    monkeypatch.setattr(cli, f"_run_{command}", lambda options, parser: action() or 0)


@pytest.mark.parametrize(
    "command",
    [["demo"], ["compare", "a", "b", "--text", "x"], ["plot", "x"], ["doctor"]],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize(
    "name, code, said",
    [("SIGINT", 130, "interrupted\n"), ("SIGTERM", 143, ""), ("SIGHUP", 129, "")],
)
def test_a_signal_tidies_up_and_ends_in_one_line(name, code, said, command, monkeypatch, capsys):
    """The code is right also where a library makes another error of the exception, as extension modules do of an
    interrupted import; the handlers are put back."""
    number, tidied = getattr(signal, name), []

    def waiting():
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            if number != signal.SIGINT:
                os.kill(os.getpid(), number)  # a second one does not disturb
            tidied.append(True)

    def importing():
        try:
            waiting()
        except BaseException:
            raise ImportError("initialization failed") from None

    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    for action in (waiting, importing):
        doing(monkeypatch, action, command[0])
        assert cli.main(command) == code and capsys.readouterr() == ("", said)
    assert tidied == [True, True]
    assert [
        signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    ] == before


def test_a_signal_that_a_library_swallows_ends_the_command(monkeypatch, capfd):
    """The exception is raised again, but
    not into the tidying, however long that takes."""

    class Swallows:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    tidied = []

    def steps():
        try:
            yield
        finally:
            time.sleep(2.5 * signals.PATIENCE)
            tidied.append("inner")

    def swallowing():
        with contextlib.closing(steps()) as inner:
            next(inner)
            Swallows()
            try:
                time.sleep(10)
            finally:
                time.sleep(2.5 * signals.PATIENCE)
                tidied.append("outer")

    doing(monkeypatch, swallowing)
    started = time.monotonic()
    assert (
        cli.main(["doctor"]) == 143
        and tidied == ["outer", "inner"]
        and time.monotonic() - started < 8
    )
    assert capfd.readouterr() == ("", "")


def test_an_interrupt_of_exec_does_not_end_python_by_a_signal():
    """The exit code is 130 and not a death by SIGINT."""
    code = (
        "import os, signal, sys, time\nfrom fastkl.tools import cli\n"
        "cli._run_doctor = lambda *_: exec('os.kill(os.getpid(), signal.SIGINT); time.sleep(10)')\nsys.exit(cli.main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_an_ignored_signal_stays_ignored(monkeypatch):
    """SIGHUP under nohup stays so; and another thread, which may not have handlers, runs a command
    without them."""
    doing(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert cli.main(["doctor"]) == 0
        doing(monkeypatch, lambda: None)
        codes = []
        thread = threading.Thread(target=lambda: codes.append(cli.main(["doctor"])))
        thread.start()
        thread.join()
        assert codes == [0]
    finally:
        signal.signal(signal.SIGHUP, before)


def ends(*command, out, err=subprocess.PIPE, buffered=""):
    """Return (exit code, stderr) of a command whose output goes there."""
    environment = os.environ | {"PYTHONUNBUFFERED": buffered}
    done = subprocess.run(
        [sys.executable, "-m", "fastkl.tools.cli", *command],
        cwd=ROOT,
        stdout=out,
        stderr=err,
        text=True,
        env=environment,
    )
    return done.returncode, done.stderr


@needs_dev_full
def test_a_full_output_is_one_line():
    """A real one shows it: of --help, of --version, and of nothing at all where the errors have no room
    either."""
    with open("/dev/full", "w") as full:
        for command in (["--help"], ["--version"], ["plot", "--help"]):
            code, error = ends(*command, out=full, buffered="1" if command[0] == "plot" else "")
            assert code == 1 and error.splitlines() == [
                "fastkl: error: No space left on device; remedy: make room for the output, or send it elsewhere"
            ]
        assert ends("--help", out=full, err=full)[0] not in (0, 2)
        assert ends("nonsense", out=full)[0] == 2


@needs_dev_full
@pytest.mark.parametrize("size", [10, 1_000_000])
@pytest.mark.parametrize(
    "command",
    [["demo", "--out"], ["compare", "a", "b", "--text"], ["plot"], ["doctor", "--json"]],
    ids=lambda words: words[0],
)
def test_every_command_tells_a_full_output(command, size, monkeypatch, capsys, tmp_path):
    """It is told whether it fails while the command runs or at its end."""
    monkeypatch.setattr(cli, f"_run_{command[0]}", lambda options, parser: print("x" * size) or 0)
    with contextlib.closing(open("/dev/full", "w")) as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main([*command, str(tmp_path / "x")]) == 1
        monkeypatch.undo()
    (error,) = capsys.readouterr().err.splitlines()
    assert (
        error.startswith("fastkl: error: ")
        and "No space left on device" in error
        and "; remedy: " in error
    )


def test_another_failure_of_the_system_is_one_line(monkeypatch, capsys):
    """A full disk is one under a result."""

    def fails():
        raise OSError(28, "No space left on device", "run/report.json")

    doing(monkeypatch, fails)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == (
        "fastkl: error: No space left on device (run/report.json); "
        "remedy: make room for the output, or send it elsewhere\n"
    )


def test_a_closed_pipe_is_quiet():
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as closed:
        assert ends("--help", out=closed) == (141, "")


def test_a_small_share_is_not_0():
    assert [percent(share) for share in (0.0, 1e-7, 0.0001, 0.0049, 0.006, 0.5, 1.0)] == [
        "0%",
        "1e-05%",
        "0.01%",
        "0.49%",
        "1%",
        "50%",
        "100%",
    ]
    assert percent(0.00001, 2) == "0.001%" and percent(0.0123, 2) == "1.23%"
