"""Computes a summed KL and its gradient to P together, where every row's weight is known in
forward.

A CPU computes both block by block; a GPU in one launch (kernels/row_fused.py) where kernels.config
has it so. The gradient, N·V in the logits' type, is kept until backward in addition to 40 bytes per
row. An upstream gradient is compared with 1 on the device, and costs a read and a write of N·V
where it differs: pass beta and the normalizer in the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import _reduce
from . import dual_op, engine
from .fields import SAVED, Scaling
from .problems import fused_launchers, problems
from .row_op import refuse_forward_mode, row_gradients


def empty_gradient(
    p: torch.Tensor,
    q: torch.Tensor,
    mask: torch.Tensor | None,
    temperature: float | torch.Tensor,
    normalizer: float | torch.Tensor | None,
    backend: str,
) -> torch.Tensor | None:
    """Allocate the gradient if it is computed with the KL: to P alone, in eager mode; else return
    None.

    The normalizer, a number or a tensor, must require no gradient.
    """
    if not (p.requires_grad and torch.is_grad_enabled()) or q.requires_grad or not p.numel():
        return None
    if isinstance(normalizer, torch.Tensor) and normalizer.requires_grad:
        return None
    if p.dtype == torch.float16:
        return None  # a stored gradient may be out of its range where the one that an upstream gradient makes of it is not
    together = _on_a_cpu if backend == "reference" else _in_one_launch
    return together(p, q, mask, temperature)


def _on_a_cpu(
    p: torch.Tensor, q: torch.Tensor, mask: torch.Tensor | None, temperature: float | torch.Tensor
) -> torch.Tensor | None:
    together = engine.computes_together(p, Scaling()) and dual_op.eager(p, q, mask, temperature)
    return _empty(p) if together else None


def _in_one_launch(
    p: torch.Tensor, q: torch.Tensor, mask: torch.Tensor | None, temperature: float | torch.Tensor
) -> torch.Tensor | None:
    launch = fused_launchers()
    if not launch.config.fuses(launch.architecture(p.device)[0]):
        return None
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return None  # a captured backward may be replayed more often than its forward, and would scale its gradient each time
    if not dual_op.eager(p, q, mask, temperature):
        return None
    gradient = _empty(p)
    found = problems(p, q, None, engine.flat(mask), _flat(temperature))
    fits = len(found) == 1 and launch.fuses(found[0][1], gradient.view(-1, p.shape[-1]))
    return gradient if fits else None


def _empty(p: torch.Tensor) -> torch.Tensor:
    return torch.empty(p.shape, dtype=p.dtype, device=p.device)


class SummedKL(torch.autograd.Function):
    """(beta·Σ kl / divisor, kl [...]); beta: a scalar tensor, where 0 leaves out an infinite KL, or
    None for 1.
    """

    @staticmethod
    def forward(
        ctx: Any,
        p: torch.Tensor,
        q: torch.Tensor,
        mask: torch.Tensor | None,
        temperature: float | torch.Tensor,
        beta: torch.Tensor | None,
        divisor: float | torch.Tensor,
        gradient: torch.Tensor,
        backend: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`gradient` as empty_gradient returned it; temperature: a number or [...]; divisor: a
        number or a scalar tensor.
        """
        kl = torch.empty(p.shape[:-1], dtype=torch.float32, device=p.device)
        saved = kl.new_empty(kl.numel(), SAVED)
        factor = (kl.new_ones(()) if beta is None else beta) / divisor
        weights = factor.expand(kl.numel()).contiguous()
        rows = gradient.view(-1, p.shape[-1])
        engine.kl_and_gradients(backend, p, q, None, engine.flat(mask), _flat(temperature), kl.view(-1), saved, weights,
                               rows, None, Scaling())  # fmt: skip
        per_token, number = (
            (temperature, 1.0)
            if isinstance(temperature, torch.Tensor)
            else (None, float(temperature))
        )
        dual_op.save_tensors(
            ctx, p, q, mask, per_token, saved.view(*kl.shape, SAVED), gradient, factor
        )
        ctx.temperature, ctx.backend, ctx.used = number, backend, False
        ctx.mark_non_differentiable(kl)
        ctx.set_materialize_grads(False)
        total = kl.sum()
        weighted = total if beta is None else torch.where(beta == 0, 0.0, beta * total)
        return _reduce.quotient(weighted, divisor, divisor), kl

    @staticmethod
    def backward(
        ctx: Any, upstream: torch.Tensor | None, _: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient, scaled in place, at the first call; recompute it with row_gradients
        at later calls, for create_graph
        and for batched upstream gradients."""
        if upstream is None:
            return (None,) * 8
        refuse_forward_mode((upstream,))
        p, q, mask, temperatures, saved, gradient, factor = ctx.saved_tensors
        if ctx.used or torch.is_grad_enabled() or not dual_op.eager(upstream):
            per_token = (upstream * factor).expand(p.shape[:-1])
            result, _ = row_gradients(p, q, None, mask, temperatures, saved, None, None, None, per_token, None, ctx.temperature, True, False,
                                      ctx.backend)  # fmt: skip
            return result, *(None,) * 7
        ctx.used = True
        # Scale in place: ctx.used keeps later calls from reading it. `.data` has a version counter
        # of its own, so that changes of x.grad do not invalidate the saved tensor. A saved-tensor
        # hook may return another layout.
        gradient = gradient.data.contiguous()
        if ctx.backend == "triton":
            fused_launchers().scale(gradient.view(-1), upstream.reshape(1))
        else:
            _scale(gradient, upstream)
        return gradient, *(None,) * 7


summed_kl: Callable[..., tuple[torch.Tensor, torch.Tensor]] = SummedKL.apply


def _scale(gradient: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiply in place, as kernels.row_fused.scale_gradient does: 0 times anything is 0."""
    if factor == 0:
        gradient.zero_()
    elif not factor.isfinite():
        gradient.copy_(torch.where(gradient == 0, 0.0, gradient * factor))
    elif factor != 1:
        gradient.mul_(factor)


def _flat(temperature: float | torch.Tensor) -> float | torch.Tensor:
    return engine.flat(temperature) if isinstance(temperature, torch.Tensor) else float(temperature)
