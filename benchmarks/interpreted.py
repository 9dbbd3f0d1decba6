"""A child process in which Triton's interpreter runs kernels without a GPU.

The interpreter executes a kernel's operations with numpy, float32 as float32: its errors are those
of the formulas and of the order of the sums, not of a GPU's faster exp and fused multiply-adds.
Triton decides at import, so the kernels live in a process that has TRITON_INTERPRET=1.
"""

import os
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context, parent_process
from threading import Thread
from unittest import mock

import torch


def _begin():
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the interpreter, about infinities
    # The child ends where its parent ends, killed or not.
    Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


@cache
def child():
    """Start the process; tensors go to it as bytes of pickle, since torch would pass them in shared
    memory, of which a container may have little."""
    executor = ProcessPoolExecutor(1, get_context("spawn"), _begin)
    # A spawned process starts with the environment of this moment.
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        executor.submit(os.getpid).result()
    return executor
