"""Divergences from hidden states and lm_head weights: a chunk of logits at a time; all logits exist
only if they are few or requested.
"""

import torch

from . import _checks, _reduce
from ._heads import Given, Head, keeps_logits, learning, prepare
from ._types import DivergenceName, Reduction
from .divergence import DIVERGENCES, of_name
from .ops.fields import result_dtype
from .ops.linear_op import LinearInputs, StatisticsInputs, linear_statistics
from .ops.linear_sum_op import SumInputs, linear_weighted_kl


def linear_kl_divergence(  # noqa: PLR0913
    hidden: torch.Tensor,
    weight: torch.Tensor | Head,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor | Head | None = None,
    *,
    weights: torch.Tensor | None = None,
    reduction: Reduction = "none",
    bias: torch.Tensor | None = None,
    ref_bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    ref_temperature: float | torch.Tensor | None = None,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    normalizer: float | torch.Tensor | None = None,
    recompute: bool | None = None,
) -> torch.Tensor:
    """Compute KL(P‖Q) per token, its sum or its mean, with P's logits from (hidden, weight, bias)
    and Q's from (ref_hidden, ref_weight, ref_bias).

    Equivalent to

        p_logits, q_logits = ...        # as in linear_token_stats
        p_logits, q_logits = p_logits / temperature, q_logits / ref_temperature
        kl = kl_divergence(p_logits, q_logits, mask=mask)
        "none": kl    "sum": (weights * kl).sum()    "mean": (weights * kl).sum() / normalizer

    The order of the arguments is the direction: policy first is the RLHF penalty, teacher first the
    distillation loss. Either or both may require gradient.

    "sum" and "mean" compute the gradients with the value, from the same logits of a chunk: four
    matrix products with a trained lm_head, three with a frozen one, two if nothing requires
    gradient (or under torch.no_grad); one more each for the other model's hidden states and weight
    if they require gradient. The finished gradients are kept until backward, one tensor per input
    that requires gradient (float32 for a float16 weight or bias): call under torch.no_grad() if no
    backward will follow. "sum" and "mean" keep no logits, whatever recompute is. "none" allows any
    upstream gradient per token: with kept logits (see recompute) it takes the same numbers of
    products; otherwise backward recomputes the logits, with two more products.

    Args:
        weights: [...] float, a factor for each token's KL (a sequence's advantage, beta over a
            length, …); only with "sum" and "mean". It may require gradient; a masked token's entry
            may have any value.
        reduction: "none", "sum" or "mean" (also spelt "token_mean").
        normalizer: the divisor of the mean, as in kl_divergence. Default: the number of unmasked
            tokens in this call, whatever their weights.
        The others: as linear_token_stats, with hidden, weight, bias, temperature for the first
            argument of KL(·‖·).

    Returns:
        [...] float32 (float64 for float64 inputs) for "none", otherwise a scalar. Nats.

    Gradient:
        With respect to hidden, weight, bias, ref_hidden, ref_weight, ref_bias and weights if they
        require it. A second backward through a retained graph returns the same. No second
        derivative. "sum" and "mean" must know at the call which inputs require gradient: under
        torch.vmap, or in a graph traced without gradients, they raise instead of omitting one. They
        scale a finished gradient by the upstream one, which must be finite.

    Memory, Accuracy, autocast: as linear_token_stats; forward of "sum" and "mean" needs as much as
    its backward without kept logits.

    Special values: as kl_divergence. Raises: TypeError, ValueError, RuntimeError as kl_divergence.

    Source: as kl_divergence.
    """
    inputs = prepare(
        Given(
            hidden,
            weight,
            bias,
            ref_hidden,
            ref_weight,
            ref_bias,
            temperature,
            ref_temperature,
            softcap,
            mask,
            logits_dtype,
            chunk_size,
            recompute,
        ),
        reference_required=True,
    )
    return reduced(inputs, weights, reduction, normalizer, recompute)


def linear_divergence(  # noqa: PLR0913
    hidden: torch.Tensor,
    weight: torch.Tensor | Head,
    ref_hidden: torch.Tensor | None = None,
    ref_weight: torch.Tensor | Head | None = None,
    mask: torch.Tensor | None = None,
    *,
    divergence: DivergenceName = "kl",
    alpha: float | None = None,
    beta: float | None = None,
    ref_logits: torch.Tensor | None = None,
    reverse: bool = False,
    weights: torch.Tensor | None = None,
    reduction: Reduction = "none",
    bias: torch.Tensor | None = None,
    ref_bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    ref_temperature: float | torch.Tensor | None = None,
    softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    normalizer: float | torch.Tensor | None = None,
    recompute: bool | None = None,
) -> torch.Tensor:
    """Compute a divergence per token, its sum or its mean, with P's logits from (hidden, weight,
    bias) and Q's from (ref_hidden, ref_weight, ref_bias) or ref_logits.

    Equivalent to

        p_logits, q_logits = ...        # as in linear_token_stats
        p_logits, q_logits = p_logits / temperature, q_logits / ref_temperature
        if reverse:
            p_logits, q_logits = q_logits, p_logits
        fastkl.js_divergence(p_logits, q_logits, mask, beta=beta, reduction=reduction, ...)

    or the function that `divergence` names, a chunk of tokens at a time. P is the first model: for
    a teacher P and a student Q pass the teacher first, or reverse=True.

    Args:
        divergence: "kl", "js", "skew_kl", "renyi", "total_variation" or "jeffreys".
        alpha: for "skew_kl" and "renyi", as in skew_kl_divergence and renyi_divergence.
        beta: for "js", the share of P, as in js_divergence. Default: 0.5.
        ref_logits: [..., V], the second model's logits or log-probs, in place of ref_hidden and
            ref_weight: only divided by ref_temperature (default: temperature), not scaled or
            capped. No gradient.
        reverse: exchange P and Q: with "kl", KL(Q‖P).
        The others: as linear_kl_divergence.

    Returns, Gradient, Memory, Accuracy, autocast, Special values: as linear_kl_divergence and the
    function of logits, with the same numbers of matrix products, one fewer with ref_logits.

    Raises: TypeError, ValueError, RuntimeError as linear_kl_divergence; ValueError for an alpha or
    beta that the divergence does not take, and for ref_logits together with ref_hidden, ref_weight
    or ref_bias, or requiring gradient.

    Source: as the function of logits.
    """
    _checks.choice("divergence", divergence, DIVERGENCES)
    _checks.expect(
        isinstance(reverse, bool), "reverse", "a bool", reverse, "True exchanges P and Q", TypeError
    )
    _checks.expect(
        ref_hidden is not None or ref_logits is not None,
        "ref_hidden",
        "the second model's hidden states [..., H], or its logits as ref_logits",
        None,
        "pass one of the two",
        TypeError,
    )
    kind, share, factor = of_name(divergence, alpha, beta)
    inputs = prepare(
        Given(
            hidden,
            weight,
            bias,
            ref_hidden,
            ref_weight,
            ref_bias,
            temperature,
            ref_temperature,
            softcap,
            mask,
            logits_dtype,
            chunk_size,
            recompute,
            ref_logits,
        ),
        reference_required=True,
        swapped=reverse != (factor is not None),
    )._replace(divergence=kind, share=share)
    value = reduced(inputs, weights, reduction, normalizer, recompute)
    return value if factor is None else factor * value


def reduced(
    inputs: LinearInputs,
    weights: torch.Tensor | None,
    reduction: str,
    normalizer: float | torch.Tensor | None,
    recompute: bool | None,
) -> torch.Tensor:
    """Compute the inputs' divergence, per token or reduced."""
    hidden, mask = inputs.hidden, inputs.mask
    leading, device, dtype = hidden.shape[:-1], hidden.device, result_dtype(hidden)
    _reduce.check(reduction, weights, normalizer, leading, device)
    if reduction == "none":
        request = StatisticsInputs(None, "kl", keeps_logits(inputs, recompute))
        return linear_statistics(inputs, request)[3]  # type: ignore[no-any-return]
    # A masked token's weight may have any value, NaN included.
    ones = torch.ones((), dtype=dtype, device=device).expand(leading)
    divisor = _reduce.divisor(reduction, normalizer, mask, leading, dtype)
    return weighted_kl(inputs, (ones if weights is None else weights.to(dtype)) / divisor)[0]


def weighted_kl(inputs: LinearInputs, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (Σ weights·kl with gradient, kl [...] without) for weights [...] in the results' type;
    a masked token's weight has no effect.
    """
    if inputs.mask is not None:
        weights = torch.where(inputs.mask, weights, 0.0)
    results = linear_weighted_kl(inputs, SumInputs(weights, learning(inputs)))
    return results[0], results[1]
