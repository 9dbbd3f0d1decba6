"""The command line: it starts without torch, and ends in one line whatever ends it."""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from fastkl.tools import cli
from fastkl.tools.console import percent

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "triton", "transformers", "matplotlib", "numpy", "pandas", "tokenizers", "tqdm")
COMMANDS = ("demo", "compare", "plot", "doctor")
WRONG = """

nonsense
demo --nonsense
demo --steps 1
demo --steps many
demo --beta -1
demo --beta nan
demo --seed -1
demo --linear
demo --device abacus
demo --out /dev/null/x
demo --out README.md
compare a
compare a b
compare a b --text missing.txt
compare a b --text README.md --json missing/x
compare a b --text README.md README.md
compare a b --text x --top 0
compare a b --text x --device gpu
plot
plot missing.jsonl
plot .
plot /dev/zero
plot README.md --out x.jpg
plot README.md setup.py
plot README.md --out missing/x.png
doctor --device tpu
doctor --json missing/x
doctor --json .
doctor now""".splitlines()[1:]


def run(code, *arguments, **options):
    # Run Python code in a process of its own.
    command = [sys.executable, "-c", code, *arguments]
    # Unbuffered, argparse itself would meet what cannot be written, and pass over it.
    environment = {name: os.environ[name] for name in os.environ if name != "PYTHONUNBUFFERED"}
    options |= dict(cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE)
    return subprocess.run(command, **options)


# ---- the start


def test_help_version_and_wrong_use_import_nothing_heavy():
    right = ["--help", "--version", *(f"{command} --help" for command in COMMANDS)]
    code = f"""
import sys, fastkl
fastkl.__version__, dir(fastkl), hasattr(fastkl, "no_such_name")
from fastkl.tools.cli import main
for code, commands in ((0, {right!r}), (2, {WRONG!r})):
    for command in commands:
        try:
            ended = main(command.split())
        except SystemExit as error:
            ended = error.code
        assert ended == code, (command, ended)
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
    broken = ImportError("libx.so: cannot open\nshared object", name="tokenizers")
    monkeypatch.chdir(tmp_path)
    for name in ("run.jsonl", "x"):
        (tmp_path / name).touch()
    monkeypatch.setattr("importlib.import_module", Mock(side_effect=broken))
    assert cli.main([*command.split(), *(() if extra == "plots" else ("--device", "cpu"))]) == 2
    error = capsys.readouterr().err
    assert "libx.so: cannot open shared object" in error and f"'fastkl[{extra}]'" in error


# ---- the end


SIGNALLED = """
import signal, sys, time
from fastkl.tools import cli
number, first = (getattr(signal, name) for name in sys.argv[1:])
def waiting(given):
    try:
        signal.raise_signal(number)
        time.sleep(0 if first == signal.SIG_IGN else 60)
        return 0
    finally:
        if number != signal.SIGINT:
            signal.raise_signal(number)  # a second one does not disturb
        print("tidied")
signal.signal(number, first)
cli._run_doctor = waiting
try:
    sys.exit(cli.main(["doctor"]))
finally:
    print(signal.getsignal(number) == first)
"""


@pytest.mark.parametrize(
    "name, first, code, said",
    [
        ("SIGINT", "default_int_handler", 130, "interrupted\n"),
        ("SIGTERM", "SIG_DFL", 143, ""),
        ("SIGHUP", "SIG_DFL", 129, ""),
        ("SIGHUP", "SIG_IGN", 0, ""),  # as under nohup
    ],
)
def test_a_signal_tidies_up_and_handlers_are_restored(name, first, code, said):
    # In a process of its own, which a signal may end.
    done = run(SIGNALLED, name, first, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr) == (code, "tidied\nTrue\n", said)


MAIN = "import sys; from fastkl.tools.cli import main; sys.exit(main())"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("full, code", [(True, 1), (False, 141)])
def test_an_output_that_takes_no_more(full, code):
    # A full one is one line; where its reader has seen enough, the command ends in silence.
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full" if full else write, "w") as output:
        done = run(MAIN, "--help", stdout=output)
    assert done.returncode == code and ("No space left on device" in done.stderr) == full
    assert len(done.stderr.splitlines()) == full


@pytest.mark.parametrize(
    "share, digits, shown",
    [
        *((0.0, 0, "0%"), (1e-7, 0, "1e-05%"), (0.0001, 0, "0.01%"), (0.0049, 0, "0.49%")),
        *((0.006, 0, "1%"), (1.0, 0, "100%"), (0.00001, 2, "0.001%"), (0.0123, 2, "1.23%")),
    ],
)
def test_a_small_share_is_not_0(share, digits, shown):
    assert percent(share, digits) == shown
