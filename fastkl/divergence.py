"""KL divergence between two logits tensors, per token."""

import torch

from . import _checks, _reduce, backend
from ._types import Reduction
from .ops.row_op import RowInputs, per_token, row_statistics
from .ops.summed_op import SummedInputs, empty_gradient, summed_kl


def kl_divergence(
    p_logits: torch.Tensor,
    q_logits: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    temperature: float | torch.Tensor = 1.0,
    weights: torch.Tensor | None = None,
    reduction: Reduction = "none",
    normalizer: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute KL(P‖Q) of every row, exact over the vocabulary, the expectation under the FIRST
    argument.

    Equivalent to

        log_p = (p_logits.float() / temperature).log_softmax(-1)
        log_q = (q_logits.float() / temperature).log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        kl = torch.where(mask, kl, 0)
        "none": kl    "sum": (weights * kl).sum()    "mean": (weights * kl).sum() / normalizer

    but in one read of each tensor and without a tensor of probabilities. Its digits are kept where
    P and Q are close: the lines above return noise, or a negative number, for a KL below about
    1e-5. Backward needs the inputs and 40 bytes per row; on a CPU "sum" and "mean" also hold the
    gradient, if it is to p_logits alone and not float16.

    The order of the arguments is the direction: `kl_divergence(policy, reference)` is the RLHF
    penalty (reverse KL), `kl_divergence(teacher, student)` the distillation loss (forward KL).

    Args:
        p_logits, q_logits: [..., V], float32, bfloat16 or float16 (float64 on the reference
            backend), any strides with a unit stride along V.
        temperature: divides both logits: a positive number, or a float tensor [...] (no gradient).
            Under torch.compile a changed number recompiles; a tensor does not. An entry of the
            tensor that is not positive is an error on the reference backend and NaN on a GPU.
        mask: bool [...], True where the token counts. Other rows are not read, return exactly 0 and
            have gradient exactly 0.
        weights: [...] float, the factor of each token's KL: "sum" and "mean" only. It may require
            gradient; a masked token's entry may be anything.
        reduction: "none", "sum" or "mean" (also spelt "token_mean").
        normalizer: the divisor of the mean: a number above 0, or a tensor of one number, where 0
            makes the mean 0. Default: the number of unmasked tokens in this call, whatever their
            weights (1 if none). For several micro-batches pass the number in all of them; under DDP
            and FSDP, which average gradients, the number in all processes / world_size.

    Returns:
        [...] float32 (float64 for float64 logits), nats, never negative; exactly 0 for identical
        rows. A scalar for "sum" and "mean".

    Gradient:
        With respect to each argument that requires it, in that argument's type. A row whose
        upstream gradient is 0 costs no reads. No second derivative.

    Special values:
        An entry that is -inf in both adds 0; -inf in q_logits alone, where p > 0, makes the row
        +inf; in p_logits alone, finite. A NaN or +inf makes its own row NaN (of token_stats: every
        field that depends on it, on the kernels all of them).

    Raises:
        TypeError, ValueError: wrong type, shape, device or temperature. RuntimeError: the chosen
        backend cannot take the input.

    Source: Kullback & Leibler, On Information and Sufficiency, Ann. Math. Statist. 22 (1951), eq.
    2.4. The formula used: reference.py's docstring.
    """
    _checks.logits("p_logits", p_logits)
    _checks.logits("q_logits", q_logits)
    _checks.same_shape("q_logits", q_logits, "p_logits", p_logits)
    leading, device = p_logits.shape[:-1], p_logits.device
    _checks.temperature(temperature, leading, device)
    _checks.mask(mask, leading, device)
    _reduce.check(reduction, weights, normalizer, leading, device)
    chosen = backend.select(p_logits, q_logits)
    if reduction != "none" and weights is None:
        inputs = SummedInputs(p_logits, q_logits, mask, temperature, None, 1, chosen)
        gradient = empty_gradient(inputs, normalizer)
        if gradient is not None:
            divisor = _reduce.divisor(reduction, normalizer, mask, leading, torch.float32)
            return summed_kl(gradient, inputs._replace(divisor=divisor))[0]
    kl = row_statistics(
        RowInputs(p_logits, q_logits, None, mask, *per_token(temperature), "kl", chosen)
    )[3]
    return kl if reduction == "none" else _reduce.reduced(kl, mask, weights, reduction, normalizer)
