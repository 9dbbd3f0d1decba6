"""fastkl beside the code that it replaces, on the same logits: value, gradient, and bytes held for backward."""

from __future__ import annotations

from collections.abc import Callable

import torch

import fastkl


def naive_kl(p_logits: torch.Tensor, q_logits: torch.Tensor) -> torch.Tensor:
    """KL(P‖Q) per row the usual way: two log_softmax and a sum."""
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def compare_with_naive(p_logits: torch.Tensor, q_logits: torch.Tensor) -> dict:
    """Errors against float64 and bytes per row of both, for the mean KL of rows [N, V] and its gradient with respect to p_logits.

    Per method, "naive" and "fused": value_error, the largest |error| / KL of a row; gradient_error, |error| / |gradient| of all rows together;
    bytes_per_row, held for backward beyond the two inputs. "kl" is the mean over the rows in nats per token, in float64.
    """
    truth, truth_gradient, _ = _measure(naive_kl, p_logits.double(), q_logits.double())
    result = {"rows": len(p_logits), "kl": truth.mean().item()}
    for name, function in (("naive", naive_kl), ("fused", fastkl.kl_divergence)):
        value, gradient, held = _measure(function, p_logits, q_logits)
        # A row whose KL is 0 in float64 too has no relative error.
        errors = ((value.double() - truth).abs() / truth.abs())[truth > 0]
        result[name] = {
            "value_error": errors.max().item() if errors.numel() else 0.0,
            "gradient_error": ((gradient.double() - truth_gradient).norm() / truth_gradient.norm().clamp(min=1e-300)).item(),
            "bytes_per_row": held / len(p_logits),
        }
    return result


def _measure(function: Callable, p_logits: torch.Tensor, q_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(KL per row, gradient of the mean, bytes held for backward beyond the inputs)."""
    p_logits = p_logits.detach().requires_grad_()
    inputs = {side.untyped_storage().data_ptr() for side in (p_logits, q_logits)}
    held: dict[int, int] = {}

    def pack(saved: torch.Tensor) -> torch.Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in inputs:
            held[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        value = function(p_logits, q_logits)
        mean = value.mean()
    gradient, = torch.autograd.grad(mean, p_logits)
    return value.detach(), gradient, sum(held.values())
