"""KL divergence between two logits tensors, per token."""

from __future__ import annotations

import math

import torch

from . import _checks, _reduce, backend, reference
from ._types import Reduction
from .ops import row_blocks
from .ops.fields import flat
from .ops.row_op import RowInputs, per_token, row_statistics
from .ops.summed_op import SummedInputs, empty_gradient, summed_kl

# Limits of one pass of the kernels: kernels.row_finish.LARGE_KL and LARGEST_DIFFERENCE,
# kernels.row_math.LARGEST_D, LARGEST_FAR_D, FAR_SHARE and LARGEST_LOG2_SUM.
ONE_PASS_KL = 8.0
ONE_PASS_DIFFERENCE = 64.0
ONE_PASS_D = 60.0
ONE_PASS_FAR_D = 16.0
FAR_SHARE = 0.1
ONE_PASS_LSE = 4194304.0
# kernels.row_load.LARGEST_SHIFT.
LARGEST_SHIFT = 4096.0


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
    _check(p_logits, q_logits, temperature, mask)
    _reduce.check(reduction, weights, normalizer, p_logits.shape[:-1], p_logits.device)
    chosen = backend.select(p_logits, q_logits)
    if reduction != "none" and weights is None:
        inputs = SummedInputs(p_logits, q_logits, mask, temperature, None, 1, chosen)
        gradient = empty_gradient(inputs, normalizer)
        if gradient is not None:
            leading = p_logits.shape[:-1]
            divisor = _reduce.divisor(reduction, normalizer, mask, leading, torch.float32)
            return summed_kl(gradient, inputs._replace(divisor=divisor))[0]
    kl = row_statistics(
        RowInputs(p_logits, q_logits, None, mask, *per_token(temperature), "kl", chosen)
    )[3]
    return kl if reduction == "none" else _reduce.reduced(kl, mask, weights, reduction, normalizer)


def slow_path_rows(
    p_logits: torch.Tensor,
    q_logits: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mark the fallback rows of the Triton kernels, which their float32 sums cannot represent: a
    diagnostic, not for the training loop.

    A row is recomputed in float64 if it has an infinity or a NaN, if its KL in either direction is
    8 nats or more or KL(Q‖P) far below KL(P‖Q), if the log-ratio of some entry is 60 nats or more
    from the row's mean (16 for float32 logits with a KL above 0.1), or if the mean difference of
    the logits over the temperature is 64 or more (for 16-bit logits also without the temperature).
    Such a row costs four reads instead of one. kl_divergence alone ignores KL(Q‖P): there these
    rows are an upper bound.

    Args: as kl_divergence. Returns: bool [...]. Works on either backend, a block of rows at a time.
    No gradient. Raises: as kl_divergence.
    """
    _check(p_logits, q_logits, temperature, mask)
    slow = torch.zeros(p_logits.shape[:-1].numel(), dtype=torch.bool, device=p_logits.device)
    temperatures = (
        flat(temperature) if isinstance(temperature, torch.Tensor) else float(temperature)
    )
    with torch.no_grad():
        for rows in row_blocks.row_blocks(p_logits, flat(mask)):
            chosen = (
                temperatures[rows].float()
                if isinstance(temperatures, torch.Tensor)
                else temperatures
            )
            x, y = row_blocks.take(p_logits, rows).float(), row_blocks.take(q_logits, rows).float()
            result = reference.row_statistics(x, y, None, chosen, entropy=False)
            kl, ref_kl = result.kl, result.ref_kl
            assert kl is not None and ref_kl is not None
            x_top, x_log_sum, y_top, y_log_sum = result.saved[:, :4].unbind(1)
            mean = (y_top - x_top) / chosen + (y_log_sum - x_log_sum) - kl  # E_p[y - x]/T
            # For float32 logits the sums are of differences minus a whole number near their median
            # (kernels.row_load.row_shift).
            wide = torch.float32 in (p_logits.dtype, q_logits.dtype)
            shift = _shift(y - x) if wide else torch.zeros_like(kl)
            largest_d = (y - x - shift[:, None]).abs().amax(-1) / chosen + (
                mean - shift / chosen
            ).abs()
            lse = torch.maximum(
                (x_top / chosen + x_log_sum).abs(), (y_top / chosen + y_log_sum).abs()
            )
            valid = (
                (kl < ONE_PASS_KL)
                & (ref_kl < ONE_PASS_KL)
                & (largest_d < torch.where(wide & (kl > FAR_SHARE), ONE_PASS_FAR_D, ONE_PASS_D))
                & (lse * math.log2(math.e) < ONE_PASS_LSE)
            )
            valid &= (
                (ref_kl + kl - torch.expm1(-kl) < 8 * ref_kl + 0.001)
                & x.isfinite().all(-1)
                & y.isfinite().all(-1)
            )
            valid &= (mean.abs() < ONE_PASS_DIFFERENCE) & (
                wide | (mean.abs() * chosen < ONE_PASS_DIFFERENCE)
            )
            slow[rows] = ~valid
    return slow.view(p_logits.shape[:-1])


def _shift(difference: torch.Tensor) -> torch.Tensor:
    """Return the whole number that the kernels subtract from each row's differences."""
    vocabulary = difference.shape[-1]
    chosen = difference[:, [vocabulary // 4, vocabulary // 2, vocabulary - 1 - vocabulary // 4]]
    shift = torch.floor(chosen.median(-1).values + 0.5)
    return torch.where(shift.abs() < LARGEST_SHIFT, shift, 0.0)


def _check(
    p_logits: torch.Tensor,
    q_logits: torch.Tensor,
    temperature: float | torch.Tensor,
    mask: torch.Tensor | None,
) -> None:
    """Check the arguments of every function of two logits tensors."""
    _checks.logits("p_logits", p_logits)
    _checks.logits("q_logits", q_logits)
    _checks.same_shape("q_logits", q_logits, "p_logits", p_logits)
    _checks.temperature(temperature, p_logits.shape[:-1], p_logits.device)
    _checks.mask(mask, p_logits.shape[:-1], p_logits.device)
