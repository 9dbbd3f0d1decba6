"""KL divergence and its relatives between two logits tensors, per token."""

from typing import Any, NamedTuple, get_args

import torch

from . import _checks, _reduce, backend
from ._collectives import sharded_logits
from ._dtensors import takes_dtensors
from ._types import DivergenceName, Reduction
from .ops.row_op import RowInputs, per_token, row_statistics
from .ops.summed_op import SummedInputs, empty_gradient, summed_kl
from .parallel import WHOLE, Shards


@takes_dtensors
def kl_divergence(
    p_logits: torch.Tensor,
    q_logits: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    temperature: float | torch.Tensor = 1.0,
    weights: torch.Tensor | None = None,
    reduction: Reduction = "none",
    normalizer: float | torch.Tensor | None = None,
    shard: Shards = None,
) -> torch.Tensor:
    """Compute KL(P‖Q) of every row, exact over the vocabulary; the expectation is under P, the
    FIRST argument.

    Equivalent to

        log_p = (p_logits.float() / temperature).log_softmax(-1)
        log_q = (q_logits.float() / temperature).log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        kl = torch.where(mask, kl, 0)
        "none": kl    "sum": (weights * kl).sum()    "mean": (weights * kl).sum() / normalizer

    but reads each tensor once and allocates no tensor of probabilities. It keeps its relative
    accuracy where P and Q are close; for a KL below about 1e-5 the lines above return noise or a
    negative number. Backward needs the inputs and 40 bytes per row; on a CPU "sum" and "mean" also
    keep the gradient if only p_logits requires one and it is not float16.

    The order of the arguments is the direction: `kl_divergence(policy, reference)` is the RLHF
    penalty (reverse KL), `kl_divergence(teacher, student)` the distillation loss (forward KL).

    Args:
        p_logits, q_logits: [..., V], float32, bfloat16 or float16 (float64 on the reference
            backend), any strides with a unit stride along V.
        temperature: divides both logits: a positive number, or a float tensor [...] (no gradient).
            Under torch.compile a changed number recompiles; a tensor does not. A non-positive entry
            of the tensor is an error on the reference backend and gives NaN on a GPU.
        mask: bool [...], True where the token counts. Other rows are not read, return exactly 0 and
            have gradient exactly 0.
        weights: [...] float, a factor for each token's KL; only with "sum" and "mean". It may
            require gradient; a masked token's entry may have any value.
        reduction: "none", "sum" or "mean" (also spelt "token_mean").
        normalizer: the divisor of the mean: a number above 0, or a tensor with one number; a tensor
            0 makes the mean 0, a negative one is an error on a CPU and gives NaN on a GPU. Default:
            the number of unmasked tokens in this call, whatever their weights (1 if there are
            none). With several micro-batches pass their total; under DDP and FSDP, which average
            gradients, the total over all processes / world_size.
        shard: for a vocabulary split over processes, the columns that both tensors hold: a
            VocabShard, or a pair, one for each tensor; DTensors need none. Every rank gets the same
            result. On a GPU two collectives forward, and none backward, gather 104 bytes per row
            and segment (JSD, skew KL and total variation 136) and 8 per row and rank, and 40 bytes
            per row are kept. For a pair with different widths, one more moves one tensor's columns
            to the other's ranks, and one backward if both require a gradient. The reference backend
            gathers and keeps all logits. No second derivative.

    Returns:
        [...] float32 (float64 for float64 logits), nats, never negative; exactly 0 for identical
        rows. A scalar for "sum" and "mean".

    Gradient:
        With respect to each argument that requires it, in that argument's type. A row whose
        upstream gradient is 0 costs no reads. No second derivative.

    Special values:
        An entry that is -inf in both tensors adds 0; -inf in q_logits alone makes the row +inf
        where p > 0; -inf in p_logits alone adds a finite term. A p below e^-745, which float64
        cannot hold, counts as 0: it adds 0 whatever q is. A NaN, a +inf, or -inf in every entry of
        either tensor makes that row NaN.

    Raises:
        TypeError, ValueError: wrong type, shape, device or temperature. RuntimeError: the chosen
        backend cannot take the input.

    Source: Kullback & Leibler, On Information and Sufficiency, Ann. Math. Statist. 22 (1951), eq.
    2.4. The docstring of reference.py has the formula used.
    """
    return Call(p_logits, q_logits, mask, temperature, weights, reduction, normalizer, shard).of(
        "kl", 0.0, None
    )


@takes_dtensors
def js_divergence(  # noqa: PLR0913
    p_logits: torch.Tensor,
    q_logits: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    temperature: float | torch.Tensor = 1.0,
    weights: torch.Tensor | None = None,
    reduction: Reduction = "none",
    normalizer: float | torch.Tensor | None = None,
    beta: float = 0.5,
    shard: Shards = None,
) -> torch.Tensor:
    """Compute the generalised Jensen-Shannon divergence β·KL(P‖M) + (1 - β)·KL(Q‖M) of every row,
    with M = β·P + (1 - β)·Q.

    Equivalent to

        p = (p_logits.float() / temperature).softmax(-1)
        q = (q_logits.float() / temperature).softmax(-1)
        m = beta * p + (1 - beta) * q
        js = (beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()).sum(-1)

    but keeps its relative accuracy where P and Q are close. Reads the logits twice forward, once
    backward.

    Args:
        beta: the share of P, which is the teacher in on-policy distillation, a number in [0, 1]. 0
            and 1 give 0, as in the definition. TRL's GKDTrainer and Liger-Kernel's LigerJSD take
            the student first and give KL(P‖Q) at 0 and KL(Q‖P) at 1; in between they are the same.

    Other arguments, result, gradient, Raises: as kl_divergence. The result is at most the entropy
    of (β, 1 - β): log 2 for the default. An entry of probability 0 in one or both models adds a
    finite term.

    Source: Lin, Divergence measures based on the Shannon entropy, IEEE Trans. Inf. Theory 37
    (1991); Agarwal et al., On-policy distillation of language models (2024).
    """
    _checks.share("beta", beta)
    return Call(p_logits, q_logits, mask, temperature, weights, reduction, normalizer, shard).of(
        *of_name("js", None, beta)
    )


@takes_dtensors
def skew_kl_divergence(  # noqa: PLR0913
    p_logits: torch.Tensor,
    q_logits: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    alpha: float,
    temperature: float | torch.Tensor = 1.0,
    weights: torch.Tensor | None = None,
    reduction: Reduction = "none",
    normalizer: float | torch.Tensor | None = None,
    shard: Shards = None,
) -> torch.Tensor:
    """Compute the skew divergence KL(P ‖ α·P + (1 - α)·Q) of every row.

    Equivalent to

        p = (p_logits.float() / temperature).softmax(-1)
        q = (q_logits.float() / temperature).softmax(-1)
        skew = (p * (p / (alpha * p + (1 - alpha) * q)).log()).sum(-1)

    but keeps its relative accuracy where P and Q are close. Reads the logits twice forward, once
    backward.

    Args:
        alpha: the share of P in the mixture, a number in [0, 1]; 0 gives kl_divergence, 1 gives 0.
            DistiLLM's skew KL is skew_kl_divergence(teacher, student, alpha=0.1), its skew reverse
            KL skew_kl_divergence(student, teacher, alpha=0.1).

    Other arguments, result, gradient, Raises: as kl_divergence. The result is at most -log(α).

    Source: Lee, Measures of distributional similarity (1999); Ko et al., DistiLLM (2024).
    """
    return Call(p_logits, q_logits, mask, temperature, weights, reduction, normalizer, shard).of(
        *of_name("skew_kl", alpha, None)
    )


@takes_dtensors
def renyi_divergence(  # noqa: PLR0913
    p_logits: torch.Tensor,
    q_logits: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    alpha: float,
    temperature: float | torch.Tensor = 1.0,
    weights: torch.Tensor | None = None,
    reduction: Reduction = "none",
    normalizer: float | torch.Tensor | None = None,
    shard: Shards = None,
) -> torch.Tensor:
    """Compute Rényi's divergence of order α of every row, log(Σ p^α·q^(1 - α)) / (α - 1).

    Equivalent to

        log_p = (p_logits.float() / temperature).log_softmax(-1)
        log_q = (q_logits.float() / temperature).log_softmax(-1)
        renyi = (alpha * log_p + (1 - alpha) * log_q).logsumexp(-1) / (alpha - 1)

    but reads the logits once and keeps its relative accuracy where P and Q are close.

    Args:
        alpha: the order, a finite number above 0. 1, and numbers within 1e-7 of it, give
            kl_divergence, the limit.

    Other arguments, result, gradient, Raises: as kl_divergence.

    Special values:
        +inf if p > 0 = q anywhere for α ≥ 1, and if P and Q have no entry in common for α < 1. For
        α > 1 a p below e^-745 would matter where q is far smaller; it still counts as 0, as in
        kl_divergence.

    Source: Rényi, On measures of entropy and information (1961); van Erven & Harremoës, Rényi
    divergence and Kullback-Leibler divergence, IEEE Trans. Inf. Theory 60 (2014).
    """
    return Call(p_logits, q_logits, mask, temperature, weights, reduction, normalizer, shard).of(
        *of_name("renyi", alpha, None)
    )


@takes_dtensors
def total_variation(
    p_logits: torch.Tensor,
    q_logits: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    temperature: float | torch.Tensor = 1.0,
    weights: torch.Tensor | None = None,
    reduction: Reduction = "none",
    normalizer: float | torch.Tensor | None = None,
    shard: Shards = None,
) -> torch.Tensor:
    """Compute the total variation distance ½·Σ|p - q| of every row.

    Equivalent to

        p = (p_logits.float() / temperature).softmax(-1)
        q = (q_logits.float() / temperature).softmax(-1)
        tv = 0.5 * (p - q).abs().sum(-1)

    but keeps its relative accuracy where P and Q are close. Reads the logits twice forward, once
    backward. 1 minus the result is the acceptance rate of speculative decoding with draft P and
    target Q.

    Arguments, result, Raises: as kl_divergence. The result is at most 1.

    Gradient:
        The gradient of the lines above. At the kink p = q every slope between the one-sided ones is
        valid; rounding decides which is returned, as in the lines above. For equal rows it is 0.

    Source: Leviathan et al., Fast inference from transformers via speculative decoding (2023).
    """
    return Call(p_logits, q_logits, mask, temperature, weights, reduction, normalizer, shard).of(
        *of_name("total_variation", None, None)
    )


@takes_dtensors
def jeffreys_divergence(
    p_logits: torch.Tensor,
    q_logits: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    temperature: float | torch.Tensor = 1.0,
    weights: torch.Tensor | None = None,
    reduction: Reduction = "none",
    normalizer: float | torch.Tensor | None = None,
    shard: Shards = None,
) -> torch.Tensor:
    """Compute the Jeffreys divergence KL(P‖Q) + KL(Q‖P) of every row, from one read of the logits.

    Equivalent to kl_divergence(p_logits, q_logits, ...) + kl_divergence(q_logits, p_logits, ...),
    not half of that, to which some papers give this name.

    Arguments, result, gradient, Raises: as kl_divergence. The result is +inf if either KL is.

    Source: Jeffreys, An invariant form for the prior probability in estimation problems, Proc. R.
    Soc. A 186 (1946).
    """
    return Call(p_logits, q_logits, mask, temperature, weights, reduction, normalizer, shard).of(
        *of_name("jeffreys", None, None)
    )


class Call(NamedTuple):
    """The arguments that all divergences of two logits tensors have in common."""

    p: torch.Tensor
    q: torch.Tensor
    mask: torch.Tensor | None
    temperature: float | torch.Tensor
    weights: torch.Tensor | None
    reduction: str
    normalizer: float | torch.Tensor | None
    shard: Shards

    def of(self, kind: str, share: float, factor: float | None) -> torch.Tensor:
        """Check the arguments and compute the divergence that of_name returned, per token or
        reduced.
        """
        p, q, mask, temperature, weights, reduction, normalizer, shard = self
        _checks.two_logits("p_logits", p, "q_logits", q, shard is not None)
        leading, device = p.shape[:-1], p.device
        _checks.temperature(temperature, leading, device)
        _checks.mask(mask, leading, device)
        _reduce.check(reduction, weights, normalizer, leading, device)
        chosen, cut = backend.select(p, q), WHOLE
        if shard is not None:
            (p, q), cut = sharded_logits(shard, chosen == "triton", {"p_logits": p, "q_logits": q})
        if kind == "kl" and reduction != "none" and weights is None and not cut.group:
            summed = SummedInputs(p, q, mask, temperature, None, 1, chosen)
            gradient = empty_gradient(summed, normalizer)
            if gradient is not None:
                divisor = _reduce.divisor(reduction, normalizer, mask, leading, torch.float32)
                return summed_kl(gradient, summed._replace(divisor=divisor))[0]
        if factor is not None:
            p, q = q, p
        inputs = RowInputs(
            p,
            q,
            None,
            mask,
            *per_token(temperature),
            "kl",
            chosen,
            kind,
            share,
            **cut.as_arguments(),
        )
        values = row_statistics(inputs)[3]
        return _reduce.reduced(
            values if factor is None else factor * values, mask, weights, reduction, normalizer
        )


DIVERGENCES = get_args(DivergenceName)


def of_name(
    name: str, alpha: float | None, beta: float | None, alpha_name: str = "alpha"
) -> tuple[str, float, float | None]:
    """Check alpha and beta, and return (kind, share, factor): kind and share as in
    fields.Divergence; factor is None, or multiplies the result of P and Q exchanged.
    """
    takes_alpha, takes_beta = name in ("skew_kl", "renyi"), name == "js"
    for argument, value, takes in ((alpha_name, alpha, takes_alpha), ("beta", beta, takes_beta)):
        _checks.expect(
            value is None or takes, argument, f"None for {name!r}", value, "leave it out"
        )
    given: Any = (0.5 if beta is None else beta) if takes_beta else alpha
    if takes_alpha or takes_beta:
        _checks.expect(
            given is not None,
            alpha_name,
            f"a number {'above 0' if name == 'renyi' else 'in [0, 1]'}, which {name!r} needs",
            given,
            f"pass {alpha_name}=0.5, for instance",
            TypeError,
        )
        if name == "renyi":
            _checks.positive(alpha_name, given, "pass 1 for the KL divergence")
        else:
            _checks.share("beta" if takes_beta else alpha_name, given)
    share = float(given or 0.0)
    factor = None
    if name == "js" and share < 0.5:
        share, factor = 1.0 - share, 1.0
    elif name == "renyi" and share < 0.5:
        # D_α(P‖Q) = α/(1 - α)·D_(1-α)(Q‖P): the formulas lose digits at small orders.
        share, factor = 1.0 - share, share / (1.0 - share)
    if (name, share) == ("skew_kl", 0.0) or (name == "renyi" and abs(share - 1.0) < 1e-7):
        return "kl", 0.0, factor
    if name in ("js", "skew_kl") and share == 1.0:
        return "total_variation", 0.0, 0.0  # 0 times a finite value
    return name, share, factor
