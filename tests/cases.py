"""Shared by the tests: rows through either backend below the public functions, tensors in memory
of their own, Triton's interpreter made as exact as a GPU is, and CUDA graphs.
"""

import functools
import math
import os
import shutil
import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fastkl import kl_divergence, testing, token_stats
from fastkl.ops import engine
from fastkl.ops.fields import FIELDS, SAVED, RowArgs, Scaling

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Whether inductor can compile for a CPU.
HAS_CPP = any(
    shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++", "c++")
)


# ---- rows below the public functions: the one place that knows how engine is called


# Arguments of a row function: logits of any leading shape, the rest [N].
class Rows(NamedTuple):
    p: torch.Tensor
    q: torch.Tensor | None
    tokens: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    temperature: float | torch.Tensor = 1.0
    scaling: Scaling = Scaling()

    @property
    def count(self) -> int:
        return self.p.shape[:-1].numel()

    def part(self, index: slice | torch.Tensor | list) -> "Rows":
        return self._make(
            value[index] if isinstance(value, torch.Tensor) else value for value in self
        )


# Fields, saved values and the gradients asked for.
class Run(NamedTuple):
    fields: dict[str, torch.Tensor]
    saved: torch.Tensor
    grads: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)

    def named(self) -> dict[str, torch.Tensor]:
        grads = {f"gradient to {n}": g for n, g in zip("pq", self.grads, strict=True)}
        made = {**self.fields, "saved": self.saved, **grads}
        return {name: value for name, value in made.items() if value is not None}


def problem(rows: Rows) -> object:
    ((_, found),) = engine.problems(RowArgs(*rows))
    return found


def unwritten(rows: Rows, wanted: tuple[str, ...]) -> Run:
    new = rows.p.new_full
    fields = {n: new((rows.count,), math.nan, dtype=torch.float32) for n in wanted}
    return Run(fields, new((rows.count, SAVED), math.nan, dtype=torch.float32))


def forward(backend: str, rows: Rows, wanted: tuple[str, ...] = FIELDS) -> Run:
    made = unwritten(rows, wanted)
    engine.ENGINES[backend].forward(RowArgs(*rows), made.fields, made.saved)
    return made


def backward(backend: str, rows: Rows, saved, upstream, grads) -> None:
    engine.ENGINES[backend].backward(RowArgs(*rows), saved, upstream, *grads)


# Forward of `fields`, by default those with an upstream gradient, and backward into `grads`, by
# default to both tensors in memory full of NaN before.
def run(
    backend: str, rows: Rows, upstream: dict[str, torch.Tensor], grads=None, fields=None
) -> Run:
    made = forward(backend, rows, tuple(upstream) if fields is None else fields)
    if grads is None:
        grads = tuple(side.new_full((rows.count, rows.p.shape[-1]), math.nan) for side in rows[:2])
    backward(backend, rows, made.saved, upstream, grads)
    return made._replace(grads=tuple(grads))


# KL, saved values and the gradient to P for upstream gradients `weights` of the reference backend,
# in one go.
def together(rows: Rows, weights: torch.Tensor, grad: torch.Tensor | None = None) -> Run:
    grad = torch.empty_like(rows.p) if grad is None else grad
    made = unwritten(rows, ("kl",))
    of_kl = (made.fields["kl"], made.saved, weights, grad, None)
    engine.ENGINES["reference"].kl_and_gradients(RowArgs(*rows), *of_kl)
    return made._replace(grads=(grad, None))


# ---- kl_divergence and token_stats, with their gradients


def random_tokens(logits: torch.Tensor) -> torch.Tensor:
    leading, vocabulary = logits.shape[:-1], logits.shape[-1]
    tokens = torch.randint(vocabulary, leading, generator=torch.Generator().manual_seed(0))
    if tokens.numel() > 1:
        tokens.view(-1)[0], tokens.view(-1)[-1] = 0, vocabulary - 1
    return tokens


def upstream_of(logits: torch.Tensor) -> torch.Tensor:
    return testing.upstream_for(torch.empty(len(FIELDS), *logits.shape[:-1]))


# KL, dP and dQ, or beside tokens all fields, dP and dQ, on `device` for these very strides.
#
# upstream [5, ...] has a gradient for each field, by default random ones.
def outcome(rows: Rows, device: str, upstream: torch.Tensor | None = None) -> list[torch.Tensor]:
    p, q, tokens, mask, temperature, _ = (
        value.to(device) if isinstance(value, torch.Tensor) else value for value in rows
    )
    p, q, more = testing.leaf(p), testing.leaf(q), {"mask": mask, "temperature": temperature}
    upstream = (upstream_of(p) if upstream is None else upstream).to(device)
    if tokens is None:
        results, upstream = (kl_divergence(p, q, **more),), upstream[3:4]
    else:
        results = token_stats(p, tokens, q, **more)
    return [*results, *torch.autograd.grad(results, (p, q), [*upstream])]


# Compare an outcome of rows on a CPU with float64 of them; fields are float32 and where the logits
# are, gradients of the logits' types.
def check_results(implementation, results: list[torch.Tensor], rows: Rows) -> None:
    *fields, grad_p, grad_q = results
    for value in fields:
        assert value.dtype == torch.float32 and value.shape == rows.p.shape[:-1]
        assert value.device.type == implementation.device
    assert (grad_p.dtype, grad_q.dtype) == (rows.p.dtype, rows.q.dtype)
    exact = testing.truth(rows.p, rows.q, rows.temperature)
    tokens = random_tokens(rows.p) if rows.tokens is None else rows.tokens
    names = ("kl",) if rows.tokens is None else FIELDS
    testing.assert_stats(dict(zip(names, fields, strict=True)), exact.stats(tokens, names))
    upstream = dict(zip(FIELDS, upstream_of(rows.p), strict=True))
    upstream = {name: upstream[name] for name in names}
    assert_gradients((grad_p, grad_q), testing.gradients(exact, upstream, tokens, rows.temperature))


def check(implementation, p, q, temperature=1.0, tokens=None) -> None:
    rows = Rows(p, q, tokens, None, temperature)
    check_results(implementation, outcome(rows, implementation.device), rows)


# ---- tensors


def assert_gradients(grads, exact, what: str = "kl") -> None:
    for name, grad, value in zip("pq"[: len(grads)], grads, exact, strict=True):
        testing.assert_rounded_gradient(
            grad,
            value,
            f"{what}, gradient to {name}",
            absolute=1e-6 * (name == "q"),
            truncated=INTERPRETING,
        )


# The same rows [N, V] with `padding` NaN after each and `offset` before all.
def padded(
    rows: torch.Tensor, padding: int = 0, offset: int = 0, fill: float = math.nan
) -> torch.Tensor:
    count, vocabulary = rows.shape
    storage = rows.new_full((offset + count * (vocabulary + padding) + 16,), fill)
    return storage.as_strided((count, vocabulary), (vocabulary + padding, 1), offset).copy_(rows)


def assert_same(results, expected, what: str = "result") -> None:
    for i, (result, value) in enumerate(zip(results, expected, strict=True)):
        testing.assert_same_bits(result, value, f"{what} {i}")


# Record the calls of fastkl's ops, (op, arguments) in order: `with Calls() as calls`.
class Calls(TorchDispatchMode):
    def __enter__(self) -> list:
        self.seen = []
        super().__enter__()
        return self.seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += [(func, args)] if func.namespace == "fastkl" else []
        return func(*args, **(kwargs or {}))


# Check schema, fake results and autograd of each op of one call and its backward, and AOT dispatch
# of forward, which includes that of its backward.
def check_ops(call) -> list:
    with Calls() as calls:
        call()
    torch.library.opcheck(*calls[0])
    # Second derivatives are refused.
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    for func, args in calls[1:]:
        args = tree_map_only(torch.Tensor, torch.Tensor.detach, args)
        torch.library.opcheck(func, args, test_utils=checks)
    return calls


# Count how often call() waits for the GPU, once everything is compiled.
def waits(call) -> int:
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


# Results of call() as a CUDA graph that is replayed once `given` hold the values of `others`. Run
# once before, so that everything is compiled and allocated.
def replayed(call, given, others):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    with torch.no_grad():
        for value, other in zip(given, others, strict=True):
            value.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    return results


# ---- the interpreter


# Make Triton's interpreter as exact as a GPU is, and no more.
#
# A multiply-add rounds once: unfused, x·log2(e) - origin alone costs 1e-5 of an e^x for |x| = 200.
# Division, 2^x, logarithms and reciprocal square roots are off by up to about two units in the last
# place, as the approximate instructions are that Triton compiles them to (PTX ISA: ex2.approx and
# rsqrt.approx 2^-22, div.full 2 ulp, lg2.approx 2^-22 absolute near 1): by a part that looks random
# and depends on the result alone. Powers of two, as 2^0, are exact, and whole logarithms.
@functools.cache
def compute_as_a_gpu() -> None:
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def create_fma(self, x, y, z):
        wide = x.data.astype("float64") * y.data.astype("float64") + z.data.astype("float64")
        return handle(wide.astype(z.data.dtype), z.dtype.scalar)

    # In [-1, 1], from the bits of float32 values; 0 for powers of two, and for whole numbers too if
    # asked.
    def noise(values, whole):
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
