"""The row statistics of either backend and their gradients on logits tensors: what the custom ops
of row_op.py run.
"""

from __future__ import annotations

from typing import overload

import torch

from . import reference_rows
from .fields import Scaling
from .problems import fused_launchers, launchers, problems
from .reference_rows import computes_together as computes_together
from .row_blocks import rows_of, rows_of_each


@overload
def flat(value: torch.Tensor) -> torch.Tensor: ...
@overload
def flat(value: None) -> None: ...
def flat(value: torch.Tensor | None) -> torch.Tensor | None:
    """A per-row tensor as a contiguous vector."""
    return (
        value
        if value is None or (value.dim() == 1 and value.is_contiguous())
        else value.reshape(-1).contiguous()
    )


def flat_temperature(temperatures: torch.Tensor | None, temperature: float) -> float | torch.Tensor:
    """The one temperature, or one per row as a contiguous vector."""
    return temperature if temperatures is None else flat(temperatures)


def forward(
    backend: str,
    p: torch.Tensor,
    q: torch.Tensor | None,
    tokens: torch.Tensor | None,
    mask: torch.Tensor | None,
    temperature: float | torch.Tensor,
    outputs: dict[str, torch.Tensor],
    saved: torch.Tensor,
    scaling: Scaling = Scaling(),  # noqa: B008  (a tuple of numbers)
) -> None:
    """Fill outputs ([N] per field) and saved [N, 10] from logits of any leading shape; tokens,
    mask, temperature: [N] or None / float.
    """
    if backend == "reference":
        reference_rows.forward(p, q, tokens, mask, temperature, outputs, saved, scaling)
        return
    for rows, problem in problems(p, q, tokens, mask, temperature, scaling):
        part = (outputs, saved) if rows is None else (rows_of_each(outputs, rows), saved[rows])
        launchers().forward(problem, *part)


def backward(
    backend: str,
    p: torch.Tensor,
    q: torch.Tensor | None,
    tokens: torch.Tensor | None,
    mask: torch.Tensor | None,
    temperature: float | torch.Tensor,
    saved: torch.Tensor,
    upstream: dict[str, torch.Tensor],
    grad_p: torch.Tensor | None,
    grad_q: torch.Tensor | None,
    scaling: Scaling = Scaling(),  # noqa: B008
) -> None:
    """Fill the gradients ([N, V], both with the same row stride) from upstream gradients [N] per
    field.

    They are gradients with respect to the raw logits, before `scaling`, and may be the logits
    themselves unless the gradient of ref_kl to Q is asked for: a far row is then read again.
    """
    if backend == "reference":
        reference_rows.backward(
            p, q, tokens, mask, temperature, saved, upstream, grad_p, grad_q, scaling
        )
        return
    # A saved-tensor hook may return logits with another stride along the vocabulary.
    p = p if p.stride(-1) == 1 else p.contiguous()
    q = q if q is None or q.stride(-1) == 1 else q.contiguous()
    for rows, problem in problems(p, q, tokens, mask, temperature, scaling):
        part = (saved, upstream, grad_p, grad_q)
        if rows is not None:
            part = (
                saved[rows],
                rows_of_each(upstream, rows),
                rows_of(grad_p, rows),
                rows_of(grad_q, rows),
            )
        launchers().backward(problem, *part)


def kl_and_gradients(
    backend: str,
    p: torch.Tensor,
    q: torch.Tensor | None,
    tokens: torch.Tensor | None,
    mask: torch.Tensor | None,
    temperature: float | torch.Tensor,
    kl: torch.Tensor,
    saved: torch.Tensor,
    weights: torch.Tensor,
    grad_p: torch.Tensor | None,
    grad_q: torch.Tensor | None,
    scaling: Scaling,
) -> None:
    """`forward` of kl and `backward` for upstream gradients `weights` [N].

    A gradient to P alone is computed with the KL: by the reference from float32 and 16-bit rows
    without `scaling`, by the kernels in one launch where kernels.config has it so.
    """
    alone = grad_p is not None and grad_q is None
    if grad_p is not None and alone and backend == "reference" and computes_together(p, scaling):
        assert q is not None
        reference_rows.kl_and_gradient(p, q, mask, temperature, kl, saved, weights, grad_p)
        return
    if backend == "reference" or grad_p is None or not alone:
        forward(backend, p, q, tokens, mask, temperature, {"kl": kl}, saved, scaling)
        backward(
            backend,
            p,
            q,
            tokens,
            mask,
            temperature,
            saved,
            {"kl": weights},
            grad_p,
            grad_q,
            scaling,
        )
        return
    for rows, problem in problems(p, q, tokens, mask, temperature, scaling):
        part = (
            (kl, saved, weights, grad_p)
            if rows is None
            else (kl[rows], saved[rows], weights[rows], grad_p[rows])
        )
        _kl_and_gradient(problem, *part)


def _kl_and_gradient(
    problem: object,
    kl: torch.Tensor,
    saved: torch.Tensor,
    weights: torch.Tensor,
    grad_p: torch.Tensor,
) -> None:
    if fused_launchers().fuses(problem, grad_p):
        fused_launchers().fused(problem, weights.to(torch.float32).contiguous(), kl, saved, grad_p)
    else:
        launchers().forward(problem, {"kl": kl}, saved)
        launchers().backward(problem, saved, {"kl": weights}, grad_p, None)
