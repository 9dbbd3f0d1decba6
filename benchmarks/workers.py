"""Processes that answer jobs side by side; one that ends or hangs costs the job it had and no other."""
import contextlib
import math
import multiprocessing
import time
from dataclasses import dataclass
from multiprocessing.connection import wait

JOB_SECONDS = 60.0  # with the start of its process; after them a job counts as hanging


def _serve(connection, function, initialise):
    """A worker: answers jobs until its pipe closes, or an answer is fatal."""
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        with contextlib.suppress(Exception):  # what is wrong here is wrong with each job too, and that is heard
            initialise()
        while True:
            answer = function(connection.recv())
            connection.send(answer)
            if answer.fatal:
                return


@dataclass(eq=False)
class _Worker:
    process: object
    connection: object
    job: object = None
    since: float = 0.0


class Workers:
    """`count` processes that call initialise() and then answer jobs by function(job).

    An answer has an attribute `fatal`: its process is of no more use. A job without answer gets failed(job, reason). The functions are picklable; the
    processes are spawned, since CUDA does not survive a fork.
    """

    def __init__(self, function, failed, count, initialise):
        self._context = multiprocessing.get_context("spawn")
        self._arguments, self._failed = (function, initialise), failed
        self._workers = [self._start() for _ in range(count)]

    def run(self, jobs, deadline=math.inf, grace=0.0):
        """(job, answer) of each as it comes; a job is taken from `jobs` when a process is free for it.

        From the deadline on none is begun, and `grace` seconds later those that still run are given up.
        """
        jobs = iter(jobs)
        while True:
            for worker in [worker for worker in self._workers if worker.job is None]:
                job = next(jobs, None) if time.monotonic() < deadline else None
                if job is not None:
                    self._give(worker, job)
            busy = [worker for worker in self._workers if worker.job is not None]
            if not busy:
                return
            until = min(min(worker.since for worker in busy) + JOB_SECONDS, deadline + grace)
            ready = wait([worker.connection for worker in busy], max(0.0, until - time.monotonic()))
            for worker in busy:
                now, job = time.monotonic(), worker.job
                if worker.connection in ready:
                    yield job, self._answer(worker)
                elif now >= deadline + grace:
                    self._replace(worker)
                elif now >= worker.since + JOB_SECONDS:
                    self._replace(worker)
                    yield job, self._failed(job, f"no answer in {JOB_SECONDS:.0f} s")

    def close(self):
        """End all processes."""
        for worker in self._workers:
            worker.connection.close()
            if worker.job is not None:
                worker.process.kill()
        for worker in self._workers:
            worker.process.join(5.0)
            worker.process.kill()

    def _start(self):
        here, there = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(there, *self._arguments), daemon=True)
        process.start()
        there.close()  # the process has the only other end: when it ends, that is heard
        return _Worker(process, here)

    def _replace(self, worker):
        """A new process in the place of a worker, whatever that does."""
        worker.process.kill()
        worker.connection.close()
        new = self._workers[self._workers.index(worker)] = self._start()
        return new

    def _give(self, worker, job):
        if not worker.process.is_alive():
            worker = self._replace(worker)
        worker.job, worker.since = job, time.monotonic()
        with contextlib.suppress(OSError):  # it ends at this moment: so does its pipe, and that is the answer
            worker.connection.send(job)

    def _answer(self, worker):
        job, worker.job = worker.job, None
        try:
            answer = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join(5.0)
            code = worker.process.exitcode
            self._replace(worker)
            return self._failed(job, f"its process ended with exit code {code}")
        if answer.fatal:
            self._replace(worker)
        return answer
