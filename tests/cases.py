"""Help of the tests alone: Triton's interpreter made as exact as a GPU is, and CUDA graphs."""

from __future__ import annotations

import os
import shutil

import numpy as np
import torch

HAS_CPP = any(
    shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++", "c++")
)


def compute_as_a_gpu() -> None:
    """Make Triton's interpreter as exact as a GPU is, and no more.

    A multiply-add rounds once: unfused, x·log2(e) - origin alone costs 1e-5 of an e^x for |x| =
    200. Division, 2^x, logarithms and reciprocal square roots are off by up to about two units in
    the last place, as the approximate instructions are that Triton compiles them to (PTX ISA:
    ex2.approx and rsqrt.approx 2^-22, div.full 2 ulp, lg2.approx 2^-22 absolute near 1): by a part
    that looks random and depends on the result alone. Powers of two, as 2^0, are exact, and whole
    logarithms.
    """
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def create_fma(self, x, y, z):
        wide = x.data.astype("float64") * y.data.astype("float64") + z.data.astype("float64")
        return handle(wide.astype(z.data.dtype), z.dtype.scalar)

    def noise(values, whole):
        """In [-1, 1], from the bits of float32 values; 0 for powers of two, and for whole numbers
        too if asked.
        """
        bits = values.view("uint32").astype("uint64")
        exact = (bits & 0x7FFFFF == 0) | (whole & (values == np.rint(values)))
        return np.where(exact, 0.0, (bits * 2654435761 >> 7) % 2001 / 1000.0 - 1)

    def approximate(create, relative, absolute=0.0, whole=False):
        def created(self, *arguments):
            result = create(self, *arguments)
            values = np.asarray(result.data)
            if values.dtype != np.float32:
                return result
            wide = values.astype("float64")
            with np.errstate(invalid="ignore"):
                wide = wide + noise(values, whole) * (relative * np.abs(wide) + absolute)
            return handle(
                np.where(np.isfinite(values), wide, values).astype("float32"), result.dtype
            )

        return created

    if builder.create_fma.__name__ == "create_fma" and builder.create_fma.__module__ == __name__:
        return
    builder.create_fma = create_fma
    about_logarithms = (2.0**-23, 2.0**-22, True)
    for name, errors in {
        "create_fdiv": (2.0**-23,),
        "create_exp2": (2.0**-22.5,),
        "create_rsqrt": (2.0**-22.5,),
        "create_log2": about_logarithms,
        "create_log": about_logarithms,
    }.items():
        setattr(builder, name, approximate(getattr(builder, name), *errors))


def captured(call) -> tuple:
    """(CUDA graph of call(), its results): once outside, so that everything is compiled and
    allocated, then captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results
