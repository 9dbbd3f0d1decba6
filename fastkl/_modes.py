"""Tells whether a compiler, tracer, dispatch mode, transform or subclass sees a call."""

from collections.abc import Sequence
from typing import Any

import torch

try:
    from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack
    from torch._C._autograd import _profiler_enabled
    from torch._C._functorch import (
        TransformType,
        is_functorch_wrapped_tensor,
        is_legacy_batchedtensor,
        peek_interpreter_stack,
    )
    from torch._ops import _len_torch_dispatch_stack_pre_dispatch
    from torch.jit._trace import is_tracing
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
except ImportError:  # private names of torch: if one is missing, every call takes the op
    SHORT_WAYS = False
else:
    SHORT_WAYS = True

# Also for ops/dual_op.py, so that all private names are in one place.
__all__ = [
    "TransformType",
    "_are_functorch_transforms_active",
    "_get_current_dispatch_mode_stack",
    "_profiler_enabled",
    "peek_interpreter_stack",
]

# Types that no subclass or mode can override; a call with any other type is not eager.
_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})
_VALUES = frozenset({torch.dtype, type(None), float, int, bool, str})


def eager(*inputs: object) -> bool:
    """Return whether a call with these arguments takes eager mode's fast path."""
    return (
        SHORT_WAYS
        and not torch.compiler.is_compiling()
        and not _are_functorch_transforms_active()
        and plain(inputs)
    )


def readable(value: torch.Tensor) -> bool:
    """Return whether values can be read without synchronising: on a CPU in eager mode."""
    return value.device.type == "cpu" and eager(value)


def transforming() -> bool:
    """Return whether a transform of torch.func is active."""
    return SHORT_WAYS and not torch.compiler.is_compiling() and _are_functorch_transforms_active()


def plain(inputs: Sequence[Any]) -> bool:
    """Return whether no dispatch mode or tracer sees a call with these arguments, and each is a
    plain value or a dense tensor.

    Not dense: subclasses, meta tensors, batched tensors (is_grads_batched=True), a pending negation
    (x.conj().imag), wrappers left behind by a transform.
    """
    if _len_torch_dispatch_stack() or _len_torch_dispatch_stack_pre_dispatch() or is_tracing():
        return False
    for value in inputs:
        kind = type(value)
        if kind not in _VALUES and (
            kind not in _TENSORS
            or value.is_neg()
            or is_legacy_batchedtensor(value)
            or is_functorch_wrapped_tensor(value)
        ):
            return False
    return not inputs[0].is_meta
