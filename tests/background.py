"""Processes that take minutes, started with the test session, so that every core has work while the
other tests run.

A test file that has such processes defines start_in_background(), which conftest.py calls if any of
its tests is to run, and asks for the results when its tests come: at the end.
"""

import concurrent.futures
import functools
import os
import subprocess
from collections.abc import Callable

_pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
_started: list[subprocess.Popen] = []


# The future of a function's result; of equal calls the first one's.
@functools.cache
def submit(function: Callable, *arguments: object) -> concurrent.futures.Future:
    return _pool.submit(function, *arguments)


# (exit code, output) of a command, at a lower priority than the tests in front.
def run(command: list[str], cwd: os.PathLike, environment: dict[str, str]) -> tuple[int, str]:
    process = subprocess.Popen(
        ["nice", "-n", "5", *command],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    _started.append(process)
    output, _ = process.communicate()
    return process.returncode, output


def stop() -> None:
    _pool.shutdown(wait=False, cancel_futures=True)
    for process in _started:
        process.kill()
