"""Checks in a process of their own: a crash, a hang or a GPU in an error state costs one check and not the report."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from .checks import Context, Outcome, checks_for, run_check

# From when everything is imported: no check starts after the first, and none runs on after the second.
SECONDS = 48.0
LAST_SECONDS = 56.0
# For starting a process and importing torch and Triton, which takes long from a network's disk.
START_SECONDS = 120.0
# Processes that are started one after the other before the rest of the checks is given up.
STARTS = 4
# Windows has neither groups of processes nor masks of signals.
POSIX = hasattr(os, "killpg")
# After these nothing more works in the same process.
GPU_ERRORS = ("CUDA error", "Triton Error [CUDA]", "HIP error", "illegal memory access", "misaligned address", "unspecified launch failure",
              "device-side assert")


def here(device: str, keys: Sequence[str], seconds: float = SECONDS) -> Iterator[Outcome]:
    """The outcomes of the named checks, run in this process, in their order; ends early after an error that breaks the GPU for this process."""
    context = Context(torch.device(device), time.monotonic() + seconds)
    for check in checks_for(device):
        if check.key in keys:
            outcome = run_check(check, context)
            yield outcome
            if outcome.status == "FAIL" and any(error in outcome.text for error in GPU_ERRORS):
                return


def work(connection: Connection, log: str, device: str, keys: Sequence[str]) -> None:
    """Say that the other process is ready, be told the seconds, send each outcome.

    The output of compilers goes to the file `log`, and their temporary files beside it, where they are
    removed with it; the process leads a group of its own, so that they end with it.
    """
    if POSIX:
        os.setpgid(0, 0)
    tempfile.tempdir = os.environ["TMPDIR"] = os.path.dirname(log)
    with open(log, "wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    connection.send("ready")
    for outcome in here(device, keys, connection.recv()):
        connection.send(outcome)


class Worker:
    """The other process, and what it says."""

    def __init__(self, target: Callable[..., None], log: Path, device: str, keys: Sequence[str]) -> None:
        # Not fork: neither CUDA nor torch's threads survive it.
        spawning = multiprocessing.get_context("spawn")
        self.log = log
        self.connection, other = spawning.Pipe()
        self.process = spawning.Process(target=target, args=(other, str(log), device, list(keys)), daemon=True)
        # It inherits what is blocked: an interrupt from the terminal, which all processes get, is
        # answered here alone.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if POSIX else ()
        try:
            self.process.start()
        finally:
            if POSIX:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        other.close()

    def receive(self, seconds: float) -> object:
        """The next message. Raises TimeoutError if there is none in time, EOFError if the process has ended."""
        if not self.connection.poll(max(seconds, 0.0)):
            raise TimeoutError
        try:
            return self.connection.recv()
        except OSError as error:  # what a process leaves that was killed
            raise EOFError from error

    def ended_well(self) -> bool:
        """Whether it came to its own end."""
        self.process.join(10)
        return self.process.exitcode == 0

    def last_words(self) -> str:
        """How a process ended that crashed, and the last line it printed."""
        code = self.process.exitcode
        names = {-number.value: f"signal {number.name}" for number in signal.Signals}
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()] if self.log.exists() else []
        return f"the process crashed: {names.get(code, f'exit code {code}')}" + (f": {lines[-1][:300]}" if lines else "")

    def stop(self) -> None:
        """End it if it still runs, and the compilers that it started."""
        if self.process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):  # as long as it does not lead its group
                if POSIX:
                    os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
        self.process.join(10)
        self.connection.close()


def isolated(device: str, keys: Sequence[str], target: Callable[..., None] = work) -> Iterator[Outcome]:
    """One outcome for each of the named checks, in their order, whatever happens to the processes that run them."""
    remaining, deadline, reason = list(keys), None, f"not run: {STARTS} processes did not last"
    with tempfile.TemporaryDirectory(prefix="fastkl-doctor-", ignore_cleanup_errors=True) as folder:
        for start in range(STARTS):
            worker = Worker(target, Path(folder) / f"output-{start}", device, remaining)
            waited = "its process did not start"
            try:
                worker.receive(START_SECONDS)
                deadline = deadline or time.monotonic() + LAST_SECONDS
                waited = "still running when the time was over"
                worker.connection.send(deadline - time.monotonic() - (LAST_SECONDS - SECONDS))
                while remaining:
                    outcome = worker.receive(deadline - time.monotonic())
                    remaining.pop(0)
                    yield outcome
                return
            except TimeoutError:
                remaining.pop(0)
                yield Outcome("FAIL", f"{waited}, and it was stopped")
                reason = "no time left"
                break
            except (EOFError, BrokenPipeError, ConnectionResetError):
                if not worker.ended_well():
                    remaining.pop(0)
                    yield Outcome("FAIL", worker.last_words())
            finally:
                worker.stop()
            if not remaining:
                return
    yield from (Outcome("skipped", reason) for _ in remaining)
