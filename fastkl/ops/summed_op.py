"""Compute a summed KL and its gradient to P together: every row's weight is known in forward.

A CPU computes both block by block; a GPU in one launch (kernels/row_fused.py) if kernels.config
enables it. The gradient, N·V in the logits' dtype, is kept until backward, with 40 bytes per row.
An upstream gradient other than 1 costs a read and a write of N·V: pass beta and the normalizer in
the call. The comparison with 1 is made on the device.
"""

from typing import Any, NamedTuple

import torch

from .. import _modes, _reduce
from . import dual_op
from .engine import ENGINES
from .fields import SAVED, RowArgs, row_args
from .row_op import RowInputs, RowUpstream, per_token, refuse_forward_mode, row_gradients


class SummedInputs(NamedTuple):
    """Logits [..., V], mask and temperature [...] (or a number), and the divisor of the sum, a
    number or a scalar tensor.

    beta: None for 1, or a scalar tensor; 0 gives 0 even if the KL is infinite.
    """

    p: torch.Tensor
    q: torch.Tensor
    mask: torch.Tensor | None
    temperature: float | torch.Tensor
    beta: torch.Tensor | None
    divisor: float | torch.Tensor
    backend: str

    @property
    def args(self) -> RowArgs:
        """The arguments in the engines' form."""
        return row_args(self.p, self.q, None, self.mask, *per_token(self.temperature))


def empty_gradient(
    inputs: SummedInputs, normalizer: float | torch.Tensor | None
) -> torch.Tensor | None:
    """Allocate the gradient if it is computed with the KL (to P only, in eager mode); otherwise
    return None.

    The divisor of `inputs` is not read; the normalizer, a number or a tensor, must require no
    gradient.
    """
    p, q = inputs.p, inputs.q
    if (
        not (p.requires_grad and torch.is_grad_enabled())
        or q.requires_grad
        or not p.numel()
        or (isinstance(normalizer, torch.Tensor) and normalizer.requires_grad)
        # The stored gradient may overflow although the gradient times the upstream one does not.
        or p.dtype == torch.float16
        # A captured backward may be replayed more often than its forward, and would scale its
        # gradient each time.
        or (p.is_cuda and torch.cuda.is_current_stream_capturing())
        or not _modes.eager(p, q, inputs.mask, inputs.temperature)
    ):
        return None
    like = p if p.is_contiguous() else torch.empty(p.shape, dtype=p.dtype, device="meta")
    together = ENGINES[inputs.backend].computes_together(inputs.args, like)
    return torch.empty(p.shape, dtype=p.dtype, device=p.device) if together else None


# The gradients of SummedInputs' fields after p.
_NO_GRADIENTS = (None,) * (len(SummedInputs._fields) - 1)


class SummedKL(torch.autograd.Function):
    """Compute (beta·Σ kl / divisor, kl [...])."""

    @staticmethod
    def forward(
        ctx: Any, gradient: torch.Tensor, *inputs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fill `gradient`, which empty_gradient returned; inputs: the fields of SummedInputs."""
        packed = SummedInputs(*inputs)
        p, beta, divisor = packed.p, packed.beta, packed.divisor
        kl = torch.empty(p.shape[:-1], dtype=torch.float32, device=p.device)
        saved = kl.new_empty(kl.numel(), SAVED)
        factor = (kl.new_ones(()) if beta is None else beta) / divisor
        weights, rows = factor.expand(kl.numel()), gradient.view(-1, p.shape[-1])
        ENGINES[packed.backend].together(packed.args, kl.view(-1), saved, weights, rows)
        temperatures, ctx.temperature = per_token(packed.temperature)
        dual_op.save_tensors(
            ctx,
            p,
            packed.q,
            packed.mask,
            temperatures,
            saved.view(*kl.shape, SAVED),
            gradient,
            factor,
        )
        ctx.backend, ctx.used = packed.backend, False
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
        at later calls, for create_graph and for batched upstream gradients.
        """
        if upstream is None:
            return None, None, *_NO_GRADIENTS
        refuse_forward_mode((upstream,))
        *tensors, gradient, factor = ctx.saved_tensors
        if ctx.used or torch.is_grad_enabled() or not _modes.eager(upstream):
            p, q, mask, temperatures, saved = tensors
            inputs = RowInputs(p, q, None, mask, temperatures, ctx.temperature, "kl", ctx.backend)
            g_kl = (upstream * factor).expand(p.shape[:-1])
            result, _ = row_gradients(inputs, RowUpstream(saved, g_kl=g_kl, wrt_p=True))
            return None, result, *_NO_GRADIENTS
        ctx.used = True
        # Scale in place: because of ctx.used no later call reads it. `.data` has a version counter
        # of its own, so that changes of x.grad do not invalidate the saved tensor. A saved-tensor
        # hook may return a non-contiguous tensor.
        gradient = gradient.data.contiguous()
        ENGINES[ctx.backend].scale(gradient, upstream)
        return None, gradient, *_NO_GRADIENTS


def summed_kl(gradient: torch.Tensor, inputs: SummedInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (beta·Σ kl / divisor, kl [...]), the first with a gradient to P."""
    return SummedKL.apply(gradient, *inputs)  # type: ignore[no-any-return, no-untyped-call]
