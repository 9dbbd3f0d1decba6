"""Child processes for work that may crash or hang, and for Triton's interpreter.

The interpreter executes a kernel's operations with numpy, float32 as float32: errors come from the
formulas and the order of the sums, not from a GPU's faster exp and fused multiply-adds. Triton
decides at import, so the kernels run in a process with TRITON_INTERPRET=1.
"""

import contextlib
import os
import signal
import warnings
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from multiprocessing import get_context, parent_process
from threading import Thread
from unittest import mock

import torch


def _begin(first):
    os.setsid()  # so that its own children can be killed with it
    # Exit when the parent ends, even if it is killed.
    Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
    first()


class Child(contextlib.AbstractContextManager):
    """Run functions sequentially in a process, started when needed, ended with the block.

    first: called in each new process, by default a no-op. Tensors are sent as pickled bytes: torch
    would use shared memory, and containers may have little.
    """

    def __init__(self, first=os.getpid, **environment):
        self.first, self.environment, self.executor = first, environment, None

    def submit(self, function, *arguments):
        if self.executor is None:
            self.executor = ProcessPoolExecutor(1, get_context("spawn"), _begin, (self.first,))
            # A spawned process inherits the current environment.
            with mock.patch.dict(os.environ, self.environment):
                self.process = self.executor.submit(os.getpid).result()
        return self.executor.submit(function, *arguments)

    def attempt(self, seconds, function, *arguments):
        """Return (result, None), or (None, reason) after an exception, a crash or a timeout; the
        process has then ended.
        """
        try:
            return self.submit(function, *arguments).result(seconds), None
        except (Exception, SystemExit) as error:
            self.end()
            late = f": no answer in {seconds:.0f} s" * isinstance(error, TimeoutError)
            return None, f"{type(error).__name__}: {error}".strip(": ") + late

    def end(self):
        if self.executor:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process, signal.SIGKILL)
            self.executor.shutdown()
        self.executor = None

    def __exit__(self, *_):
        self.end()


def _quiet():
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the interpreter warns about infinities


INTERPRETER = Child(_quiet, TRITON_INTERPRET="1")
