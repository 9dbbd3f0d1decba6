"""The command line: it starts without torch, and ends in one line whatever ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastkl.tools import cli
from fastkl.tools.console import percent

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
doctor --json .
doctor --seconds 5
doctor now""".splitlines()[1:]


def run(code, *arguments, **options):
    """Run Python code in a process of its own."""
    command = [sys.executable, "-c", code, *arguments]
    # Unbuffered, argparse itself would meet what cannot be written, and pass over it.
    environment = {name: os.environ[name] for name in os.environ if name != "PYTHONUNBUFFERED"}
    options |= dict(cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE)
    return subprocess.run(command, **options)


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
    done = run(code, stdout=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("error:") == len(WRONG)


@pytest.mark.parametrize(
    "command, extra",
    [("demo", "demo"), ("plot run.jsonl", "plots"), ("compare a b --text x", "compare")],
)
def test_what_cannot_be_imported_is_said(command, extra, monkeypatch, capsys, tmp_path):
    def broken(name, package=None):
        raise ImportError("libx.so: cannot open\nshared object", name="tokenizers")

    monkeypatch.chdir(tmp_path)
    for name in ("run.jsonl", "x"):
        (tmp_path / name).touch()
    monkeypatch.setattr("importlib.import_module", broken)
    error = exits_2(capsys, *command.split(), *(() if extra == "plots" else ("--device", "cpu")))
    assert "cannot be imported: tokenizers (libx.so: cannot open shared object); " in error
    assert error.endswith(f"remedy: pip install --upgrade 'fastkl[{extra}]'")


def test_a_device_that_this_machine_lacks(capsys):
    error = exits_2(capsys, "doctor", "--device", "cuda:99")
    assert "argument --device: expected one that this machine has (" in error


# ---- the end


def doing(monkeypatch, action):
    """Make `fastkl doctor` do something else."""
    monkeypatch.setattr(cli, "_run_doctor", lambda given, parser: action() or 0)


def code_of(*command):
    """The exit code of a command, returned or raised."""
    try:
        return cli.main(command)
    except SystemExit as ended:
        return ended.code


@pytest.mark.parametrize(
    "name, code, said",
    [("SIGINT", 130, "interrupted\n"), ("SIGTERM", 143, ""), ("SIGHUP", 129, "")],
)
def test_a_signal_tidies_up(name, code, said, monkeypatch, capsys):
    number, tidied = getattr(signal, name), []

    def waiting():
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            if number != signal.SIGINT:
                os.kill(os.getpid(), number)  # a second one does not disturb
            tidied.append(True)

    before = signal.getsignal(number)
    doing(monkeypatch, waiting)
    assert code_of("doctor") == code and capsys.readouterr() == ("", said)
    assert tidied and signal.getsignal(number) == before


def test_an_ignored_signal_stays_ignored(monkeypatch):
    """As under nohup."""
    doing(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert cli.main(["doctor"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


MAIN = "import sys; from fastkl.tools.cli import main; sys.exit(main())"
FULL = "fastkl: error: No space left on device{}; remedy: "


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_output_is_one_line():
    with open("/dev/full", "w") as full:
        done = run(MAIN, "--help", stdout=full)
    assert done.returncode == 1 and done.stderr.startswith(FULL.format(""))


def test_a_full_disk_is_one_line(monkeypatch, capsys):
    def fails():
        raise OSError(28, "No space left on device", "run/report.json")

    doing(monkeypatch, fails)
    # In this process standard output is another file than descriptor 1.
    monkeypatch.setattr(os, "dup2", lambda *descriptors: None)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err.startswith(FULL.format(" (run/report.json)"))


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
