"""Logits to test with, and the truth about them: fp64 of the same inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch

KINDS = ("normal1", "normal3", "normal8", "zipf", "peaked", "very_peaked")


class Truth(NamedTuple):
    """fp64 statistics of a pair of logits, computed from two log-softmaxes; the KLs in the form Σ p·(expm1(d) - d), d = log q - log p."""

    log_p: torch.Tensor
    log_q: torch.Tensor
    entropy: torch.Tensor
    kl: torch.Tensor
    ref_kl: torch.Tensor


def truth(p_logits: torch.Tensor, q_logits: torch.Tensor, temperature: float | torch.Tensor = 1.0) -> Truth:
    """The fp64 truth of logits [..., V] of any type; temperature a float or [...]."""
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.double()[..., None]
    log_p = (p_logits.double() / temperature).log_softmax(-1)
    log_q = (q_logits.double() / temperature).log_softmax(-1)
    p, q, d = log_p.exp(), log_q.exp(), log_q - log_p

    def expectation(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.where(weight == 0, 0.0, weight * value).sum(-1)

    # Where e^d overflows, p·(e^d - 1 - d) is taken as q - p - p·d.
    kl = torch.where(d.abs() < 1, p * (torch.expm1(d) - d), q - p - torch.where(p == 0, 0.0, p * d)).sum(-1)
    ref_kl = torch.where(d.abs() < 1, q * (torch.expm1(-d) + d), p - q + torch.where(q == 0, 0.0, q * d)).sum(-1)
    return Truth(log_p, log_q, -expectation(p, log_p), kl, ref_kl)


def logits(kind: str, rows: int, vocabulary: int, generator: torch.Generator) -> torch.Tensor:
    """fp32 logits [rows, vocabulary] of one of KINDS; a peaked row has its peak anywhere."""
    noise = torch.randn(rows, vocabulary, generator=generator)
    if kind.startswith("normal"):
        return noise * float(kind.removeprefix("normal"))
    if kind == "zipf":
        order = torch.rand(rows, vocabulary, generator=generator).argsort(-1) + 1.0
        return -1.1 * order.log() + 0.3 * noise
    height = 30.0 if kind == "very_peaked" else 18.0
    peak = torch.randint(vocabulary, (rows,), generator=generator)
    return noise * 3.0 + height * torch.nn.functional.one_hot(peak, vocabulary)


def pair(kind: str, rows: int, vocabulary: int, size: float, *, shift: float = 0.0, dtype: torch.dtype = torch.float32, seed: int = 0,
         device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of P and of Q = P + size·noise + shift. The KL is near size²/2 on flat rows, far smaller on peaked ones."""
    generator = torch.Generator().manual_seed(seed)
    p = logits(kind, rows, vocabulary, generator)
    q = p + size * torch.randn(rows, vocabulary, generator=generator) + shift
    return p.to(dtype).to(device), q.to(dtype).to(device)


def kl_tolerance(kl: torch.Tensor) -> torch.Tensor:
    """The error allowed for a KL: 1e-4·KL + 1e-8 below 1e-2, 2e-5·KL from there."""
    return torch.where(kl < 1e-2, 1e-4 * kl + 1e-8, 2e-5 * kl)


def assert_kl(result: torch.Tensor, exact: torch.Tensor, what: str = "kl") -> None:
    """Raise with the worst entry where a KL misses kl_tolerance; NaN and negative values fail."""
    result, exact = result.detach().double().cpu(), exact.detach().double().cpu()
    excess = (result - exact).abs() / kl_tolerance(exact)
    bad = ~(excess <= 1) | (result < 0)
    if bool(bad.any()):
        worst = int(torch.where(bad, excess.nan_to_num(float("inf")), 0.0).argmax())
        raise AssertionError(f"{what}: got {result.flatten()[worst]:.9g}, expected {exact.flatten()[worst]:.9g} at {worst}: "
                             f"{excess.flatten()[worst]:.3g} times the tolerance; {int(bad.sum())} of {bad.numel()} wrong")


def assert_near(result: torch.Tensor, exact: torch.Tensor, relative: float, absolute: float, what: str) -> None:
    """Raise with the worst entry where |result - exact| > relative·|exact| + absolute; NaN fails."""
    result, exact = result.detach().double().cpu(), exact.detach().double().cpu()
    excess = (result - exact).abs() / (relative * exact.abs() + absolute)
    if not bool((excess <= 1).all()):
        worst = int(excess.nan_to_num(float("inf")).argmax())
        raise AssertionError(f"{what}: got {result.flatten()[worst]:.9g}, expected {exact.flatten()[worst]:.9g} at {worst}: "
                             f"{excess.flatten()[worst]:.3g} times the tolerance")


def assert_gradient(result: torch.Tensor, exact: torch.Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Raise where a row's gradient is off by more than `tolerance` in relative L2 norm."""
    result, exact = result.detach().double().cpu(), exact.detach().double().cpu()
    norm = exact.norm(dim=-1)
    error = (result - exact).norm(dim=-1) / torch.where(norm == 0, 1.0, norm)
    if not bool((error <= tolerance).all()):
        worst = int(error.nan_to_num(float("inf")).argmax())
        raise AssertionError(f"{what}: relative L2 error {error.flatten()[worst]:.3g} in row {worst}, allowed {tolerance:.3g}")
