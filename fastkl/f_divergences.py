"""Defines the divergences of two rows once, in plain torch, in a form accurate near P = Q.

With d = log q - log p and e = expm1(d), all but Rényi's are f-divergences, Σ p·f(d), where f and f'
are 0 at d = 0:
    kl               f = e - d
    js               f = (1 - β)·(1 + e)·d - (1 + a)·log1p(a),  a = (1 - β)·e
    skew_kl          f = a - log1p(a),  a = (1 - α)·e
    total_variation  f = |e|/2
    jeffreys         f = d·e
Since Σ p·e = 0, any multiple of e may be added to f; the multiples above make every term as small
as the result. With u = f - f' and v = f'/e^d the gradients to the logits of P and Q, times T, are
    p·(u - E_p[u])  and  q·(v - E_q[v])
Rényi's divergence, with γ = 1 - α, h(d) = e - d and Z = Σ p^α·q^γ = 1 + Σ p·(h(γd) - γ·h(d)), is
log Z/(α - 1); with r = p^α·q^γ/Z its gradients are α/(α - 1)·(r - p) and q - r.

An entry with p = 0 adds 0 to an expectation under P; an entry with q = 0 adds 0 to one under Q.
"""

import math
from typing import NamedTuple

import torch

from .reference import minus_log1p


class Terms(NamedTuple):
    """The terms of an f-divergence, [..., V] each: p·f, p·u and q·v of the docstring above."""

    value: torch.Tensor
    to_p: torch.Tensor
    to_q: torch.Tensor


def divergence(
    log_p: torch.Tensor, log_q: torch.Tensor, kind: str, share: float = 0.0
) -> torch.Tensor:
    """Compute a divergence of each row from log-probabilities [..., V]; share: alpha or beta."""
    if kind == "renyi":
        return _log_z(log_p, log_q, share)[..., 0] / (share - 1.0) + 0.0  # not -0
    # Rounding must not lift the result above its maximum.
    largest = {
        "js": -sum([x * math.log(x) for x in (share, 1.0 - share) if x]),
        "skew_kl": -math.log(share) if share else math.inf,
        "total_variation": 1.0,
    }.get(kind, math.inf)
    return terms(log_p, log_q, kind, share).value.sum(-1).clamp(0.0, largest)


def gradients(
    log_p: torch.Tensor, log_q: torch.Tensor, kind: str, share: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute a divergence's gradients with respect to both models' logits, [..., V], times the
    temperature.

    An entry with probability 0 has gradient 0.
    """
    p, q = log_p.exp(), log_q.exp()
    if kind == "renyi":
        d, log_z = _log_ratio(log_p, log_q), _log_z(log_p, log_q, share)
        r = (_log_r(log_p, log_q, share) - log_z).exp()
        to_p, to_q = (1.0 - share) * d - log_z, -share * d - log_z
        # Beside a d of 1e17, as of an entry masked in one model, to_p and to_q have no digits.
        near = d.abs() < 1e6
        r_minus_p = torch.where(near & (to_p.abs() < 1.0), p * torch.expm1(to_p), r - p)
        q_minus_r = torch.where(near & (to_q.abs() < 1.0), -q * torch.expm1(to_q), q - r)
        return share / (share - 1.0) * r_minus_p, q_minus_r
    _, to_p, to_q = terms(log_p, log_q, kind, share)
    to_p = to_p - p * to_p.sum(-1, keepdim=True)
    return to_p, to_q - q * to_q.sum(-1, keepdim=True)


def terms(log_p: torch.Tensor, log_q: torch.Tensor, kind: str, share: float) -> Terms:
    """Compute the Terms of an f-divergence: values of the KL, JSD and skew KL by expm1 and log1p
    where |d| < 1, otherwise by differences of p and q, whose cancellation float64 can afford.
    """
    p, q, d = log_p.exp(), log_q.exp(), _log_ratio(log_p, log_q)
    short, rest, near = d.clamp(-1.0, 1.0), 1.0 - share, d.abs() < 1.0
    if rest == 0.0 or (kind == "js" and share == 0.0):
        nothing = 0.0 * (p + q)  # NaN stays NaN
        return Terms(nothing, nothing, nothing)
    e, q_minus_p = torch.expm1(short), q - p
    if kind == "kl":
        pd = _times(p, d)
        return Terms(torch.where(near, p * (e - short), q_minus_p - pd), -pd, q_minus_p)
    if kind == "total_variation":
        sign = 0.5 * d.sign()
        return Terms(sign * q_minus_p, -sign * p, sign * q)
    if kind == "jeffreys":
        pd, qd = _times(p, d), _times(q, d)
        return Terms(qd - pd, -q_minus_p - pd, qd + q_minus_p)
    # mixture = m / max(p, q) with m = share·p + rest·q; m/p = 1 + a.
    a, smaller = rest * e, (-d.abs()).exp()
    mixture = torch.where(d > 0, rest + share * smaller, share + rest * smaller)
    log_near = a.log1p()
    log_m_over_p = torch.where(near, log_near, d.clamp(min=0.0) + mixture.log())
    if kind == "js":
        log_q_over_m = torch.where(near, d - log_near, d.clamp(max=0.0) - mixture.log())
        of_p, of_q = _times(p, share * log_m_over_p), _times(q, rest * log_q_over_m)
        # The first-order terms, rest·e - a, are omitted: they cancel.
        small = rest * (short * (1.0 + e)) - (1.0 + a) * log_near
        return Terms(torch.where(near, p * small, of_q - of_p), -of_p, of_q)
    if kind != "skew_kl":
        raise ValueError(
            f"kind: expected kl, js, skew_kl, total_variation or jeffreys, got {kind!r}; call "
            f"divergence() for 'renyi'"
        )
    over_m = torch.where(d > 0, rest * (1.0 - smaller), rest * (smaller - 1.0)) / mixture
    over_m = torch.where(near, a / (1.0 + a), over_m)  # rest·(q - p)/m, which is a/(1 + a)
    pl = _times(p, log_m_over_p)
    value = torch.where(near, p * minus_log1p(a), rest * q_minus_p - pl)
    return Terms(value, _times(p, share * over_m) - pl, q * (rest * over_m))


def _log_ratio(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Compute log q - log p, 0 where both are -inf."""
    return torch.where(log_p == log_q, 0.0, log_q - log_p)


def _log_r(log_p: torch.Tensor, log_q: torch.Tensor, alpha: float) -> torch.Tensor:
    """Compute α·log p + (1 - α)·log q; for α > 1, -inf where p is 0, whatever q is."""
    log_r = alpha * log_p + (1.0 - alpha) * log_q
    return log_r.masked_fill(log_p.exp() == 0, -math.inf) if alpha > 1.0 else log_r


def _log_z(log_p: torch.Tensor, log_q: torch.Tensor, alpha: float) -> torch.Tensor:
    """Compute log Z of Rényi's divergence, [..., 1], with the sign of α - 1."""
    gamma, log_r = 1.0 - alpha, _log_r(log_p, log_q, alpha)
    p, q, d = log_p.exp(), log_q.exp(), _log_ratio(log_p, log_q)
    near = d.abs() * max(1.0, abs(gamma)) < 1.0
    short = torch.where(near, d, 0.0)
    small = p * (torch.expm1(gamma * short) - gamma * torch.expm1(short))
    total = torch.where(near, small, log_r.exp() - p - gamma * (q - p)).sum(-1, keepdim=True)
    log_z = torch.where(
        total.abs() < 0.5, total.clamp(-0.5, 0.5).log1p(), log_r.logsumexp(-1, keepdim=True)
    )
    return log_z.clamp(min=0.0) if alpha > 1.0 else log_z.clamp(max=0.0)


def _times(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Multiply; a weight of 0 times an infinity or a NaN is 0, also in the backward pass."""
    return weight * value.masked_fill(weight == 0, 0.0)
