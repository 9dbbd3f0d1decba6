"""Defines every statistic of a row and every gradient once, in plain torch, in a form accurate near
KL = 0.

With x, y the logits of P and Q divided by the temperature and any centre c,
    d = (y - x) - c,    t = E_p[expm1(d)],    lse(y) - lse(x) = c + log1p(t),
    KL(P‖Q) = E_p[expm1(d) - d] - (t - log1p(t)).
The textbook form Σ p·(log p - log q) is the difference of two large sums where P and Q are close;
here every term is as small as the result. Conventions for infinities: an entry with p = 0 adds 0 to
an expectation under P, an entry with p > 0 = q makes KL(P‖Q) infinite; a NaN makes only its own row
NaN.

On CPU tensors ops/cpu_rows.py computes nearly every row; this file computes the fallback rows, for
which those sums are not accurate enough, in float64.
"""

import math
from typing import NamedTuple

import torch

SAVED = 10
_SMALL_D = 0.25


class RowStatistics(NamedTuple):
    """Statistics of rows, [N] each (None if not requested), and values [N, 10] for row_gradients.

    saved: largest logit of P and log Σ exp((x - largest)/T), the same of Q, log1p(t), entropy, and
    zeros. log1p(t) corrects the rounded difference of the two log-sum-exps.
    """

    logprob: torch.Tensor | None
    entropy: torch.Tensor | None
    ref_logprob: torch.Tensor | None
    kl: torch.Tensor | None
    ref_kl: torch.Tensor | None
    lse: torch.Tensor | None
    ref_lse: torch.Tensor | None
    saved: torch.Tensor


def expm1_minus(d: torch.Tensor) -> torch.Tensor:
    """Compute expm1(d) - d and its derivatives with a small relative error, also for tiny d."""
    terms = 14 if d.dtype == torch.float64 else 8
    series = torch.full_like(d, 1.0 / math.factorial(terms))
    for k in range(terms - 1, 1, -1):
        series.mul_(d).add_(1.0 / math.factorial(k))
    series.mul_(d).mul_(d)
    return torch.where(d.abs() < _SMALL_D, series, torch.expm1(d) - d)


def minus_log1p(t: torch.Tensor) -> torch.Tensor:
    """Compute t - log1p(t) with a small relative error."""
    terms = 24 if t.dtype == torch.float64 else 10
    series = torch.full_like(t, 1.0 / terms)
    for k in range(terms - 1, 1, -1):
        series = 1.0 / k - t * series
    return torch.where(t.abs() < 0.125, t * t * series, t - torch.log1p(t))


def soft_cap(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """Compute cap·tanh(logits/cap) in float32, or float64 for float64 logits; cap 0 returns the
    logits.
    """
    if cap == 0:
        return logits
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return cap * torch.tanh(wide / cap)


def soft_cap_slope(capped: torch.Tensor, cap: float) -> torch.Tensor:
    """Compute the derivative of soft_cap, 1 - tanh², from its value."""
    t = capped / cap
    return (1.0 - t) * (1.0 + t)


def _log_partition(
    logits: torch.Tensor, scale: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute (largest logit, log Σ exp((logits - largest)·scale)), [N, 1] each."""
    largest = logits.amax(-1, keepdim=True)
    return largest, ((logits - largest) * scale).exp_().sum(-1, keepdim=True).log_()


def _subtract(y: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute y - x as hi + lo (two_sum, Knuth); lo is 0 where hi is not finite."""
    hi = y - x
    x_part = hi - y
    lo = (y - (hi - x_part)) - (x + x_part)
    return hi, torch.where(hi.isfinite(), lo, 0.0)


def _log_ratio(
    x: torch.Tensor,
    y: torch.Tensor,
    x_max: torch.Tensor,
    y_max: torch.Tensor,
    rest: torch.Tensor,
    scale: torch.Tensor | float,
) -> torch.Tensor:
    """Compute log q - log p = (y - x)·scale - (lse(y) - lse(x)), where lse(y) - lse(x) is
    (y_max - x_max)·scale + rest.

    The large terms cancel before they are rounded. An entry that is -inf in both gives 0.
    """
    (hi, lo), (max_hi, max_lo) = _subtract(y, x), _subtract(y_max, x_max)
    d = ((hi - max_hi) + (lo - max_lo)) * scale - rest
    return torch.where((x == -math.inf) & (y == -math.inf), 0.0, d)


def _about_mean(weight: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """Compute d - E[d] under the probabilities `weight`."""
    return d - torch.where(weight == 0, 0.0, weight * d).sum(-1, keepdim=True)


def row_statistics(
    p_logits: torch.Tensor,
    q_logits: torch.Tensor | None = None,
    tokens: torch.Tensor | None = None,
    temperature: torch.Tensor | float = 1.0,
    *,
    entropy: bool = True,
    reverse: bool = True,
) -> RowStatistics:
    """Compute statistics of each row of p_logits [N, V], and of each pair of rows with q_logits.

    Equivalent, in exact arithmetic, to
        log_p = (p_logits / T).log_softmax(-1);  log_q = (q_logits / T).log_softmax(-1)
        logprob, ref_logprob = log_p[n, tokens], log_q[n, tokens]
        entropy = -(log_p.exp() * log_p).sum(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        ref_kl = (log_q.exp() * (log_q - log_p)).sum(-1)
        lse, ref_lse = (p_logits / T).logsumexp(-1), (q_logits / T).logsumexp(-1)
    with 0·(±inf) = 0. temperature: float or [N]. reverse: whether to compute ref_kl. Computed and
    returned in float64 for float64 logits, else in float32; nats.
    """
    dtype = torch.float64 if p_logits.dtype == torch.float64 else torch.float32
    x = p_logits.to(dtype)
    scale = (
        1.0 / temperature
        if isinstance(temperature, float)
        else (1.0 / temperature.to(dtype))[:, None]
    )
    x_max, x_log_sum = _log_partition(x, scale)
    zero, lse = torch.zeros_like(x_max), (x_max * scale + x_log_sum)[:, 0]
    log_p = ((x - x_max) * scale).sub_(x_log_sum)
    p = log_p.exp()
    # 0 - … makes the entropy of a one-hot row 0, not -0.
    row_entropy = (
        0.0 - torch.where(p == 0, 0.0, p * log_p).sum(-1, keepdim=True) if entropy else zero
    )
    logprob = None if tokens is None else log_p.gather(-1, tokens[:, None])[:, 0]
    if q_logits is None:
        saved = torch.cat([x_max, x_log_sum, *[zero] * 3, row_entropy, *[zero] * 4], -1)
        wanted = row_entropy[:, 0] if entropy else None
        return RowStatistics(logprob, wanted, None, None, None, lse, None, saved)

    y = q_logits.to(dtype)
    y_max, y_log_sum = _log_partition(y, scale)
    d = _log_ratio(x, y, x_max, y_max, y_log_sum - x_log_sum, scale)
    q = ((y - y_max) * scale).sub_(y_log_sum).exp_()
    # Beyond |d| = 1/4 the sums use q itself: p·e^d would overflow, or underflow with p.
    small = d.abs() < _SMALL_D
    pd = torch.where(p == 0, 0.0, p * d)
    h = torch.where(small, p * expm1_minus(d), (q - p) - pd)
    q_minus_p = torch.where(small, pd + h, q - p)
    t = q_minus_p.sum(-1, keepdim=True)
    kl = (h.sum(-1, keepdim=True) - minus_log1p(t)).clamp(min=0.0)
    ref_kl = zero
    if reverse:
        backward_terms = torch.where(
            small, d * q_minus_p - h, torch.where(q == 0, 0.0, q * d) - (q - p)
        )
        ref_kl = (
            backward_terms.sum(-1, keepdim=True) / (1.0 + t) - minus_log1p(-t / (1.0 + t))
        ).clamp(min=0.0)
    saved = torch.cat(
        [x_max, x_log_sum, y_max, y_log_sum, torch.log1p(t), row_entropy, *[zero] * 4], -1
    )
    ref_logprob = (
        y.gather(-1, tokens[:, None]).sub(y_max).mul(scale).sub(y_log_sum)[:, 0]
        if tokens is not None
        else None
    )
    return RowStatistics(
        logprob,
        row_entropy[:, 0] if entropy else None,
        ref_logprob,
        kl[:, 0],
        ref_kl[:, 0] if reverse else None,
        lse,
        (y_max * scale + y_log_sum)[:, 0],
        saved,
    )


def row_gradients(
    p_logits: torch.Tensor,
    q_logits: torch.Tensor | None,
    tokens: torch.Tensor | None,
    temperature: torch.Tensor | float,
    saved: torch.Tensor,
    upstream: dict[str, torch.Tensor],
    *,
    wrt_p: bool,
    wrt_q: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Compute the gradients of Σ_n Σ_field upstream[field][n]·field[n] with respect to p_logits and
    q_logits, [N, V] each in float32 or float64.

    With s = 1/T, d = log q - log p, and g the upstream gradients (a field without one counts as 0):
        dP = s·(g_logprob·onehot - g_ref_kl·(q - p)
                - p·(g_logprob - g_lse + g_entropy·(log p + entropy) + g_kl·(d - E_p[d])))
        dQ = s·(g_ref_logprob·onehot + g_kl·(q - p)
                + q·(g_ref_lse - g_ref_logprob + g_ref_kl·(d - E_q[d])))
    An entry with probability 0 has gradient exactly 0.
    """
    dtype = saved.dtype
    x = p_logits.to(dtype)
    scale = (
        1.0 / temperature
        if isinstance(temperature, float)
        else (1.0 / temperature.to(dtype))[:, None]
    )
    x_max, x_log_sum, y_max, y_log_sum, log1p_t = saved[:, :5, None].unbind(1)
    g = {name: value.to(dtype)[:, None] for name, value in upstream.items()}
    log_p = ((x - x_max) * scale).sub_(x_log_sum)
    p = log_p.exp()
    if q_logits is not None and {"kl", "ref_kl", "ref_logprob", "ref_lse"} & set(g):
        y = q_logits.to(dtype)
        d = _log_ratio(x, y, x_max, y_max, y_log_sum - x_log_sum, scale) - log1p_t
        q = ((y - y_max) * scale).sub_(y_log_sum).exp_()
        q_minus_p = torch.where(d.abs() < _SMALL_D, p * torch.expm1(d), q - p)
    grad_p = grad_q = None
    if wrt_p:
        bracket = torch.zeros_like(p) + (g.get("lse", 0.0) - g.get("logprob", 0.0))
        if "entropy" in g:
            bracket -= g["entropy"] * _about_mean(p, log_p)
        if "kl" in g:
            # Skip an infinite KL with upstream gradient 0: 0·inf is NaN.
            bracket -= torch.where(g["kl"] == 0, 0.0, g["kl"] * _about_mean(p, d))
        grad_p = torch.where(p == 0, 0.0, p * bracket)
        if "ref_kl" in g:
            grad_p -= g["ref_kl"] * q_minus_p
        if "logprob" in g:
            assert tokens is not None
            grad_p.scatter_add_(-1, tokens[:, None], g["logprob"])
        grad_p *= scale
    if wrt_q:
        grad_q = g["kl"] * q_minus_p if "kl" in g else torch.zeros_like(p)
        if "ref_logprob" in g:
            assert tokens is not None
            grad_q -= g["ref_logprob"] * q
            grad_q.scatter_add_(-1, tokens[:, None], g["ref_logprob"])
        if "ref_lse" in g:
            grad_q += g["ref_lse"] * q
        if "ref_kl" in g:
            grad_q += torch.where(
                (q == 0) | (g["ref_kl"] == 0), 0.0, g["ref_kl"] * q * _about_mean(q, d)
            )
        grad_q *= scale
    return grad_p, grad_q
