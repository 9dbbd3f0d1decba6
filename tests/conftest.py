"""Every test of the public functions runs on every implementation that this machine has: the
`implementation` fixture.

Plain run: the reference on CPU tensors, and the Triton kernels on a GPU (marker `gpu`). With
TRITON_INTERPRET=1 (test_interpreter.py starts such a process): the Triton kernels on CPU tensors.
Without a GPU the gpu tests are left out; FASTKL_REQUIRE_GPU=1 makes failures of them.
"""

import contextlib
import gc
import itertools
import os
import signal
import sys
from collections.abc import Callable
from typing import NamedTuple

import background
import pytest
from _pytest import python

# Inductor's cache does not see a change of an op's fake implementation, and precompiled headers
# take longer than the few kernels of the tests without them.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
os.environ.setdefault("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")
# Inductor's build step wants the distutils of setuptools, which must come before anything imports
# the standard library's.
with contextlib.suppress(ImportError):
    import setuptools  # noqa: F401
import cases
import torch

import fastkl
from fastkl.ops.engine import ENGINES

# A shell that starts the tests in the background ignores these for them, and every command under
# test would inherit it.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _handler)
# The tests' tensors are small: a second thread costs more than it gives, most of all on a busy
# machine.
torch.set_num_threads(1)

if cases.INTERPRETING:
    import quick_interpreter

    quick_interpreter.hurry()
    # Every row has a GPU's rounding errors.
    cases.compute_as_a_gpu()

# In the interpreter float16 is left to tests that name it: to a kernel it is a load and a store,
# as bfloat16 is.
DTYPES = {n: cases.FLOATS[n] for n in ("fp32", "bf16", *["fp16"] * (not cases.INTERPRETING))}


@pytest.fixture(params=DTYPES.values(), ids=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


class Implementation(NamedTuple):
    backend: str
    device: str

    @property
    def kernels(self) -> bool:
        return self.backend == "triton"

    @property
    def interpreted(self) -> bool:
        return self.kernels and self.device == "cpu"


INTERPRETER = [pytest.param(Implementation("triton", "cpu"), id="interpreter")]
COMPILED = [
    pytest.param(Implementation("reference", "cpu"), id="reference"),
    pytest.param(Implementation("triton", "cuda"), id="gpu", marks=pytest.mark.gpu),
]


@pytest.fixture(params=INTERPRETER if cases.INTERPRETING else COMPILED)
def implementation(request: pytest.FixtureRequest) -> Implementation:
    with fastkl.use_backend(request.param.backend):
        yield request.param


@pytest.fixture
def kernels(implementation) -> Implementation:
    if not implementation.kernels:
        pytest.skip("about the kernels")
    return implementation


# Record the calls of engines in order: "triton forward", "reference backward", …
@pytest.fixture
def ran(monkeypatch) -> list[str]:
    calls = []
    methods = {"forward": "forward", "outside": "forward"}
    methods |= {"backward": "backward", "outside_gradient": "backward"}
    for (name, engine), (method, step) in itertools.product(ENGINES.items(), methods.items()):
        original = getattr(engine, method)

        def spy(*args, label=f"{name} {step}", original=original):
            # The kernels' outside_gradient is their backward.
            calls.extend([label] * (calls[-1:] != [label]))
            return original(*args)

        monkeypatch.setattr(engine, method, spy)
    return calls


# Tokens for logits, where all fields are under test, or None, where the KL alone is.
@pytest.fixture(params=[False, True], ids=["kl", "stats"])
def tokens_of(request: pytest.FixtureRequest, implementation, dtype) -> Callable:
    if request.param and implementation.interpreted and dtype != torch.float32:
        pytest.skip("one type in the interpreter is enough")
    return cases.random_tokens if request.param else lambda logits: None


# CPython maps 16 KB for frames at a time and unmaps them when the first of them returns: a test
# whose calls come and go across that border spends half its time there. The frame of this function
# needs 4 MB, so that what is mapped for it, 8 MB, holds the frames of a test too.
def _with_room_for_frames(function: Callable[[pytest.Item], object], item: pytest.Item) -> object:
    return function(item)


_with_room_for_frames.__code__ = _with_room_for_frames.__code__.replace(
    co_stacksize=(4 << 20) // 8 + 1
)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> object:
    return _with_room_for_frames(python.pytest_pyfunc_call, pyfuncitem)


# Leave out the GPU's tests without one; put tests last that wait for processes in the background.
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available() and os.environ.get("FASTKL_REQUIRE_GPU") != "1":
        config.hook.pytest_deselected(items=[i for i in items if i.get_closest_marker("gpu")])
        items[:] = [i for i in items if not i.get_closest_marker("gpu")]
    items.sort(key=lambda item: hasattr(getattr(item, "module", None), "start_in_background"))


# Start those processes first, the longest before the others.
def pytest_runtestloop(session: pytest.Session) -> None:
    modules = {getattr(item, "module", None) for item in session.items}
    starts = [m for m in modules if hasattr(m, "start_in_background")]
    if not session.config.option.collectonly:
        for module in sorted(starts, key=lambda each: each.__name__, reverse=True):
            module.start_in_background()


def pytest_sessionfinish() -> None:
    background.stop()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.fail("FASTKL_REQUIRE_GPU=1, but torch sees no CUDA device")


# `fastkl compare` and tests of memory call gc.collect(): leave out what is older than the module.
@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> None:
    gc.collect()
    gc.freeze()


# Drop compiled code of other tests, which counts towards the limit of recompilations.
@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
