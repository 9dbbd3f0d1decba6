"""Selects the implementation: Triton kernels on a GPU, the plain torch reference on CPU tensors.

The backend never changes silently.
"""

import dataclasses
import importlib.util
import os
from typing import Literal, get_args

import torch

from . import _checks

Backend = Literal["triton", "reference"]
# Evaluated once: not every torch release can trace find_spec.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_forced: str | None = None


class use_backend:  # noqa: N801  (used like a function)
    """Choose the implementation: `use_backend("triton")` from this call on, or `with
    use_backend("triton"):` for a block.

    name: "triton", "reference", or None for the default (Triton on a GPU, the reference on CPU
    tensors). The choice applies to the whole process; a backward pass runs on the backend of its
    forward pass. With TRITON_INTERPRET=1 set before the first use, "triton" runs the kernels on CPU
    tensors in Triton's interpreter, for debugging: it rounds a multiply-add twice where a GPU
    rounds once, so results for logits with a common offset L are off by about 1e-7·L.
    Raises ValueError for another name.
    """

    def __init__(self, name: Backend | None) -> None:
        global _forced
        if name is not None:
            _checks.choice("name", name, get_args(Backend))
        self._before = _forced
        _forced = name

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(self, *exc: object) -> None:
        global _forced
        _forced = self._before


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The backend that would run, and why. str() is one readable line.

    backend: "triton" or "reference"; why: the reason for the choice; problems: every reason why
    that backend cannot take the input (empty if it can).
    """

    backend: str
    why: str
    problems: tuple[str, ...]

    def __str__(self) -> str:
        verdict = "cannot run: " + "; ".join(self.problems) if self.problems else "runs"
        return f"{self.backend} ({self.why}): {verdict}"


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def triton_problems(*logits: torch.Tensor, read_rows: bool = True) -> tuple[str, ...]:
    """Return every reason why the Triton kernels cannot take these logits.

    read_rows: whether the kernels read these tensors as they lie in memory.
    """
    problems = []
    if not _HAS_TRITON:
        problems.append("triton is not installed: pip install triton")
    if not (logits[0].is_cuda or (logits[0].is_cpu and _interpreting())):
        problems.append(
            f"the tensors are on {logits[0].device}: move them to a GPU, or set TRITON_INTERPRET=1 "
            f"before importing fastkl to interpret the kernels on CPU"
        )
    for value in logits:
        if value.dtype not in _TRITON_TYPES:
            problems.append(
                f"{value.dtype} tensors: the kernels take float32, bfloat16 and float16; "
                f"use_backend('reference') takes float64"
            )
        if read_rows and value.dim() and value.shape[-1] > 1 and value.stride(-1) != 1:
            problems.append(
                f"logits with stride {value.stride(-1)} along the vocabulary: the kernels need 1; "
                f"call .contiguous()"
            )
    return tuple(dict.fromkeys(problems)) if problems else ()


def explain(logits: torch.Tensor, ref_logits: torch.Tensor | None = None) -> Explanation:
    """Explain which backend these logits select, why, and every reason why it cannot run.

    Raises TypeError or ValueError for inputs that token_stats(logits, …, ref_logits) does not
    accept. Example: print(fastkl.explain(logits))
    """
    other = logits if ref_logits is None else ref_logits
    _checks.two_logits("logits", logits, "ref_logits", other)
    backend = _forced or ("triton" if logits.is_cuda else "reference")
    place = "a GPU" if logits.is_cuda else logits.device.type
    why = f"use_backend({_forced!r})" if _forced else f"the logits are on {place}"
    return Explanation(backend, why, triton_problems(logits, other) if backend == "triton" else ())


def select(*logits: torch.Tensor, read_rows: bool = True) -> str:
    """Return the backend for these logits; RuntimeError with every reason if it cannot take them.

    read_rows: whether the kernels read these tensors; False for hidden states, which only determine
    the logits' device.
    """
    backend = _forced or ("triton" if logits[0].is_cuda else "reference")
    problems = triton_problems(*logits, read_rows=read_rows) if backend == "triton" else ()
    if problems:
        raise RuntimeError(
            "fastkl: the triton backend cannot take this input: " + "; ".join(problems)
        )
    return backend
