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

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "triton", "transformers", "matplotlib", "numpy", "tokenizers", "tqdm")
COMMANDS = ("demo", "compare", "plot", "doctor")
WRONG = """

nonsense
demo --nonsense
demo --steps 1
demo --steps many
demo --beta -1
demo --beta nan
demo --seed -1
demo --max-kl 0
demo --epochs 0
demo --algorithm reinforce
demo --device abacus
demo --out /dev/null/x
demo --out README.md
compare a
compare a b
compare a b --text missing.txt
compare a b --text README.md --json missing/x
compare a b --text x --top 0
compare a b --text x --device gpu
plot
plot missing.jsonl
plot .
plot /dev/zero
plot README.md --out x.pdf
plot README.md --out missing/x.png
doctor --device tpu
doctor --json missing/x
doctor --json .""".splitlines()[1:]


def run(code, *arguments, **options):
    """Run Python code in a process of its own."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, text=True, stderr=subprocess.PIPE, **options)


def exits_2(capsys, *arguments):
    """Return the error line of a command that is wrong use."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# ---- the start


def test_help_version_and_wrong_use_import_nothing_heavy():
    right = ["--help", "--version", *(f"{command} --help" for command in COMMANDS)]
    code = f"""
import sys
from fastkl.tools.cli import main
for code, commands in ((0, {right!r}), (2, {WRONG!r})):
    for command in commands:
        try:
            main(command.split())
        except SystemExit as ended:
            assert ended.code == code, (command, ended.code)
        else:
            raise AssertionError(command)
        heavy = [name for name in {HEAVY!r} if name in sys.modules]
        assert not heavy, (command, heavy)
"""
    done = run(code, stdout=subprocess.PIPE)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("error:") == len(WRONG)
    assert done.stdout.count("usage:") == len(right) - 1


@pytest.mark.parametrize("command, extra", [("demo", "demo"), ("plot x", "plots")])
def test_what_is_not_installed_is_said(command, extra, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "missing_modules", lambda names: names[-1:])
    words = f"not installed: {cli.EXTRAS[extra][-1]}; remedy: pip install 'fastkl[{extra}]'"
    assert exits_2(capsys, *command.split()).endswith(words)
    assert list(tmp_path.iterdir()) == []


def test_what_is_installed_and_broken_is_said(monkeypatch, capsys, tmp_path):
    def broken(name, package=None):
        raise ImportError("libx.so: cannot open\nshared object", name="tokenizers")

    monkeypatch.setattr(cli, "missing_modules", lambda names: [])
    monkeypatch.setattr("importlib.import_module", broken)
    error = exits_2(capsys, "demo", "--device", "cpu", "--out", str(tmp_path / "run"))
    assert "cannot be imported: tokenizers (libx.so: cannot open shared object); " in error
    assert error.endswith("remedy: pip install --upgrade 'fastkl[demo]'")
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_this_machine_lacks(tmp_path, capsys):
    error = exits_2(capsys, "demo", "--device", "cuda:99", "--out", str(tmp_path / "run" / "x"))
    assert "argument --device: expected one that this machine has (" in error
    assert list(tmp_path.iterdir()) == []


# ---- the end

needs_dev_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


def doing(monkeypatch, action, command="doctor"):
    """Make a command do something else."""
    monkeypatch.setattr(cli, f"_run_{command}", lambda given, parser: action() or 0)


@pytest.mark.parametrize("makes_another", [False, True])
@pytest.mark.parametrize(
    "name, code, said",
    [("SIGINT", 130, "interrupted\n"), ("SIGTERM", 143, ""), ("SIGHUP", 129, "")],
)
def test_a_signal_tidies_up(name, code, said, makes_another, monkeypatch, capsys):
    """The code is right also where a library makes another error of the exception."""
    number, tidied = getattr(signal, name), []

    def waiting():
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        except BaseException:
            if number != signal.SIGINT:
                os.kill(os.getpid(), number)  # a second one does not disturb
            tidied.append(True)
            if makes_another:
                raise ImportError("initialization failed") from None
            raise

    before = signal.getsignal(number)
    for command in (["demo"], ["compare", "a", "b", "--text", "x"], ["plot", "x"], ["doctor"]):
        doing(monkeypatch, waiting, command[0])
        assert cli.main(command) == code and capsys.readouterr() == ("", said)
    assert len(tidied) == 4 and signal.getsignal(number) == before


def test_a_signal_that_a_library_swallows_ends_the_command(monkeypatch, capfd):
    """The exception is raised again, but not into the tidying, however long that takes."""

    class Swallows:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    tidied = []

    def swallowing():
        Swallows()
        try:
            time.sleep(10)
        finally:
            time.sleep(2.5 * signals.PATIENCE)
            tidied.append(True)

    doing(monkeypatch, swallowing)
    assert cli.main(["doctor"]) == 143 and tidied == [True]
    assert capfd.readouterr() == ("", "")


def test_an_interrupt_of_exec_does_not_end_python_by_a_signal():
    code = """
import os, signal, sys, time
from fastkl.tools import cli
cli._run_doctor = lambda *_: exec('os.kill(os.getpid(), signal.SIGINT); time.sleep(10)')
sys.exit(cli.main(['doctor']))"""
    done = run(code)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_an_ignored_signal_stays_ignored(monkeypatch):
    """As under nohup; another thread, which may not have handlers, runs without them."""
    doing(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert cli.main(["doctor"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    doing(monkeypatch, lambda: None)
    codes = []
    thread = threading.Thread(target=lambda: codes.append(cli.main(["doctor"])))
    thread.start()
    thread.join()
    assert codes == [0]


MAIN = "import sys; from fastkl.tools.cli import main; sys.exit(main())"


@needs_dev_full
@pytest.mark.parametrize("command", [["--help"], ["--version"], ["plot", "--help"]])
def test_a_full_output_is_one_line(command):
    with open("/dev/full", "w") as full:
        done = run(MAIN, *command, stdout=full)
    assert done.returncode == 1
    assert done.stderr == (
        "fastkl: error: No space left on device; "
        "remedy: make room for the output, or send it elsewhere\n"
    )


@needs_dev_full
@pytest.mark.parametrize("size", [10, 1_000_000])
def test_a_command_tells_a_full_output(size, monkeypatch, capsys):
    """It is told whether it fails while the command runs or at its end."""
    doing(monkeypatch, lambda: print("x" * size))
    with contextlib.closing(open("/dev/full", "w")) as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["doctor"]) == 1
        monkeypatch.undo()
    assert "No space left on device" in capsys.readouterr().err


def test_a_full_disk_is_one_line(monkeypatch, capsys):
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
        done = run(MAIN, "--help", stdout=closed)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_small_share_is_not_0():
    shares = {0.0: "0%", 1e-7: "1e-05%", 0.0001: "0.01%", 0.0049: "0.49%", 0.006: "1%", 1.0: "100%"}
    assert {share: percent(share) for share in shares} == shares
    assert percent(0.00001, 2) == "0.001%" and percent(0.0123, 2) == "1.23%"
