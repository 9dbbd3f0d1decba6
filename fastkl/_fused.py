"""A summed KL whose gradient to P is made with its value: one launch (kernels/row_fused.py), where every row's weight is known in forward.

The gradient, N·V, is held until backward, instead of 40 bytes per row. It is right for an upstream gradient of 1; another
one costs a read and a write of it, decided on the device. So weights belong into the call: beta, the normalizer.
"""

from __future__ import annotations

import torch

from . import _dispatch, _rows
from ._linear_ops import float16_unit
from ._ops import SAVED, refuse_forward_mode, row_gradients
from ._problems import fused_launchers, problems


def gradient_for(
    p: torch.Tensor,
    q: torch.Tensor,
    mask: torch.Tensor | None,
    temperature: float | torch.Tensor,
    backend: str,
) -> torch.Tensor | None:
    """Return room for the gradient where one launch makes it: for P alone, eagerly, where kernels.config has it so; else None."""
    if backend != "triton" or not (p.requires_grad and torch.is_grad_enabled()) or q.requires_grad:
        return None
    launch = fused_launchers()
    if not launch.config.fuses(launch.architecture(p.device)[0]) or not p.numel():
        return None
    if not _dispatch.eager(p, q, mask, temperature):
        return None
    gradient = torch.empty(p.shape, dtype=p.dtype, device=p.device)
    found = problems(p, q, None, _rows.flat(mask), _flat(temperature))
    fits = len(found) == 1 and launch.fuses(found[0][1], gradient.view(-1, p.shape[-1]))
    return gradient if fits else None


class SummedKL(torch.autograd.Function):
    """(beta·Σ kl / divisor, kl [...]); beta: a scalar tensor, where 0 leaves out an infinite KL, or None for 1."""

    @staticmethod
    def forward(ctx, p, q, mask, temperature, beta, divisor, gradient):
        """`gradient` as gradient_for returned it; temperature: a number or [...]; divisor: a number or a scalar tensor."""
        kl = torch.empty(p.shape[:-1], dtype=torch.float32, device=p.device)
        saved = kl.new_empty(kl.numel(), SAVED)
        factor = (kl.new_ones(()) if beta is None else beta) / divisor
        unit = kl.new_ones(())
        if p.dtype == torch.float16:
            unit = float16_unit((factor / temperature).reshape(-1))
        weights = (factor / unit).expand(kl.numel()).contiguous()
        rows = gradient.view(-1, p.shape[-1])
        _rows.kl_and_gradients("triton", p, q, None, _rows.flat(mask), _flat(temperature), kl.view(-1), saved, weights,
                               rows, None, _rows.Scaling())  # fmt: skip
        per_token = isinstance(temperature, torch.Tensor)
        ctx.save_for_backward(p, q, mask, temperature if per_token else None, saved.view(*kl.shape, SAVED), gradient, factor, unit)
        ctx.temperature, ctx.used = 1.0 if per_token else float(temperature), False
        ctx.mark_non_differentiable(kl)
        ctx.set_materialize_grads(False)
        total = kl.sum()
        return (total if beta is None else torch.where(beta == 0, 0.0, beta * total)) / divisor, kl

    @staticmethod
    def backward(ctx, upstream, _):
        """The gradient in place, once; again by two launches, as for a graph of the gradient and for a batch of upstream gradients."""
        if upstream is None:
            return (None,) * 7
        refuse_forward_mode((upstream,))
        p, q, mask, temperatures, saved, gradient, factor, unit = ctx.saved_tensors
        if ctx.used or torch.is_grad_enabled() or not _dispatch.eager(upstream):
            per_token = (upstream * factor).expand(p.shape[:-1])
            result, _ = row_gradients(p, q, None, mask, temperatures, saved, None, None, None, per_token, None, ctx.temperature, True, False,
                                      "triton")  # fmt: skip
            return result, *(None,) * 6
        ctx.used = True
        # Behind autograd's back, which has no other holder of it that reads it again.
        gradient = gradient.detach()
        fused_launchers().scale(gradient.view(-1), (upstream * unit).reshape(1))
        return gradient, *(None,) * 6


def _flat(temperature: float | torch.Tensor) -> float | torch.Tensor:
    return _rows.flat(temperature) if isinstance(temperature, torch.Tensor) else float(temperature)
