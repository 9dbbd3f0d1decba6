"""What a check is, the list of all for a device, and how one is run: whatever happens in it, it ends in an Outcome."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import time
import traceback
from collections.abc import Callable

import torch

STATUSES = ("ok", "warning", "skipped", "FAIL")
# Compared on every device, the one that training uses first: where time runs out, it is the others that are left out.
DTYPES = ("bfloat16", "float32", "float16")
# What a machine without a GPU compiles for.
ARCHITECTURE = "sm_90"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a check ended: one of STATUSES, what to print, its figures by name, and the traceback of an exception."""

    status: str
    text: str
    figures: dict[str, float | int | str | None] = dataclasses.field(default_factory=dict)
    traceback: str | None = None


@dataclasses.dataclass
class Context:
    """What checks know: the device, when the time is over (time.monotonic), and what earlier checks found out."""

    device: torch.device
    deadline: float
    found: dict[str, float] = dataclasses.field(default_factory=dict)
    why_no_kernels: str | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether kernels are launched and figures of speed are possible."""
        return self.device.type == "cuda"

    def time_left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the report: `run` returns an Outcome, or raises. `group` is its heading; both together name it."""

    group: str
    name: str
    run: Callable[[Context], Outcome]
    needs_kernels: bool = False

    @property
    def key(self) -> str:
        """Its name in JSON and in what is sent between processes."""
        return f"{self.group}: {self.name}"


class DisagreementError(Exception):
    """A result that is not what it has to be; the text says all."""


def checks_for(device: str) -> list[Check]:
    """All checks for a device, in the order in which they run."""
    # Here and not above: they import this module.
    from . import agreement, compiling, fusing, machine, speed

    on_gpu = torch.device(device).type == "cuda"
    listed = [Check("this machine", name, run) for name, run in machine.CHECKS]
    if on_gpu:
        listed.append(Check("kernels", "compile and launch", compiling.launch))
    for dtype in DTYPES:
        group = f"{dtype} beside float64"
        listed += [Check(group, name, functools.partial(run, dtype=dtype), needs_kernels=on_gpu) for name, run in agreement.CHECKS]
        if on_gpu and dtype == "bfloat16":  # now that its kernels are compiled, and before the time is over
            listed += [Check("speed", name, run, needs_kernels=True) for name, run in speed.CHECKS]
    if on_gpu:
        listed.append(Check("kernels", "loss and gradient in one launch", fusing.check_fused, needs_kernels=True))
        return listed
    listed += [Check("speed", name, run) for name, run in speed.CHECKS]
    if importlib.util.find_spec("triton"):
        group = f"kernels, compiled for {ARCHITECTURE} and not run"
        listed += [Check(group, dtype, functools.partial(compiling.compile_only, dtype=dtype, arch=ARCHITECTURE)) for dtype in DTYPES]
    else:
        listed.append(Check("kernels", "compile", lambda context: Outcome("skipped", "Triton is not installed")))
    return listed


def run_check(check: Check, context: Context) -> Outcome:
    """The outcome of a check: whatever it raises is a FAIL with the first line of it."""
    if context.time_left() <= 0:
        return Outcome("skipped", "no time left" + (": run it again, what was compiled is kept" if context.on_gpu else ""))
    if check.needs_kernels and context.why_no_kernels:
        return Outcome("skipped", context.why_no_kernels)
    try:
        outcome = check.run(context)
        if check.needs_kernels:
            # A kernel's error shows at the next synchronisation: it belongs to the check that launched it.
            torch.cuda.synchronize(context.device)
    except DisagreementError as error:
        outcome = Outcome("FAIL", str(error))
    except Exception as error:
        outcome = Outcome("FAIL", first_line(error), traceback="".join(traceback.format_exception(error)))
    return outcome


def first_line(error: BaseException) -> str:
    """The exception's type and first line; of several lines the last one too, where compilers say what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " … ".join(dict.fromkeys([*lines[:1], *lines[-1:]]))
    return f"{type(error).__name__}: {_shortened(text)}" if text else type(error).__name__


def _shortened(text: str, most: int = 400) -> str:
    return text if len(text) <= most else text[: most - 2] + " …"
