# Child processes end with their parent, past their limit, and with all that they started.

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.processes import Child
from benchmarks.record import ROOT


def test_a_process_is_ended_and_a_new_one_started():
    with Child(FASTKL_X="y") as child:
        first, _ = child.attempt(60, os.getpid)
        assert child.attempt(60, os.getenv, "FASTKL_X") == ("y", None)
        assert child.attempt(60, os.getpid) == (first, None) and first != os.getpid()
        for reason, seconds, *work in (
            ("ZeroDivisionError: ", 60, divmod, 1, 0),
            ("BrokenProcessPool: ", 60, os._exit, 3),
            ("SystemExit: 3", 60, sys.exit, 3),
            ("TimeoutError: no answer in 1 s", 1, time.sleep, 3600),
        ):
            result, fault = child.attempt(seconds, *work)
            assert result is None and fault.startswith(reason)
        last, _ = child.attempt(60, os.getpid)
    assert first != last and "FASTKL_X" not in os.environ
    with pytest.raises(ProcessLookupError):
        os.kill(last, 0)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up there")
def test_what_a_killed_benchmark_and_a_child_started_ends_with_them():
    code = (
        "import os; from benchmarks.processes import INTERPRETER;"
        "print(INTERPRETER.submit(os.getpid).result(), flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with Child() as child:
        sleeping, _ = child.attempt(
            60, os.posix_spawnp, "sleep", ["sleep", "3600"], dict(os.environ)
        )
    for process in (int(done.stdout), sleeping):
        stat = Path(f"/proc/{process}/stat")
        while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.1)
