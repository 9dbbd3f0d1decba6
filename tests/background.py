"""Processes that take minutes, started with the test session, so that every core has work while the
other tests run.

A test file that has such processes defines start_in_background(), which conftest.py calls if any of
its tests is to run, and asks for the results when its tests come: at the end.
"""

import concurrent.futures
import os
import subprocess
import threading
from collections.abc import Callable

_pool: concurrent.futures.ThreadPoolExecutor | None = None
_futures: dict[str, concurrent.futures.Future] = {}
_running: set[subprocess.Popen] = set()
_stopped = threading.Event()


def submit(name: str, function: Callable, *arguments: object) -> concurrent.futures.Future:
    global _pool
    if name not in _futures:
        _pool = _pool or concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count())
        _futures[name] = _pool.submit(function, *arguments)
    return _futures[name]


# (exit code, output) of a command, at a lower priority than the tests in front.
def run(command: list[str], cwd: os.PathLike, environment: dict[str, str]) -> tuple[int, str]:
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: os.nice(5),
    )
    _running.add(process)
    # stop() sets this and then ends what is in the set: one of the two finds a process that starts
    # meanwhile.
    if _stopped.is_set():
        process.kill()
    try:
        output, _ = process.communicate()
    finally:
        process.kill()
        _running.discard(process)
    return process.returncode, output


def stop() -> None:
    _stopped.set()
    if _pool is not None:
        _pool.shutdown(wait=False, cancel_futures=True)
    for process in list(_running):
        process.kill()
