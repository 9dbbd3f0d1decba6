"""Checks KL divergences and their gradients against float64: truth, tolerances, and hard logits.

    from fastkl import testing

    p, q = testing.pair("very_peaked", rows=4, vocabulary=50257, size=1e-3, dtype=torch.bfloat16)
    exact = testing.truth(p, q)
    testing.assert_kl(my_kl(p, q), exact.kl)

A comparison raises AssertionError for different shapes, or with the worst entry if one exceeds its
tolerance or is NaN; otherwise it returns the largest relative error. The tests, `fastkl doctor` and
the benchmarks use this module; it needs only torch, and `import fastkl` does not load it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from . import _checks

# Fields of fastkl.TokenStats that `Truth.stats` has.
FIELDS = ("logprob", "entropy", "ref_logprob", "kl", "ref_kl", "lse", "ref_lse")
# Divergences below SMALL_KL: relative and absolute error; above: relative error.
SMALL_KL, SMALL_KL_LIMITS, KL_LIMIT = 1e-2, (1e-4, 1e-8), 2e-5
# Log-probabilities, entropies and log-sum-exps: relative and absolute error.
VALUE_LIMITS = (2e-6, 2e-6)
# Gradients: a row's L2 error over its norm.
GRADIENT_LIMIT = 1e-5
# Gradients with a smaller norm are compared absolutely, like a KL below 1e-8; rows with p_max of
# 1 - 1e-14 have such gradients. With rows 50 apart a float32 centre is up to 2e-6 from the mean,
# and the mean of the remainder is known to 2^-24 of that, 1e-13 per rounding: three roundings are
# 1e-5 of this floor.
GRADIENT_FLOOR = 3e-8


# ---- the truth


class Truth(NamedTuple):
    """Statistics in float64: log-probabilities [..., V]; entropy of P, KL(P‖Q), KL(Q‖P) and both
    log-sum-exps [...].
    """

    log_p: torch.Tensor
    log_q: torch.Tensor
    entropy: torch.Tensor
    kl: torch.Tensor
    ref_kl: torch.Tensor
    lse: torch.Tensor
    ref_lse: torch.Tensor

    def stats(self, tokens: torch.Tensor, names: Sequence[str] = FIELDS) -> dict[str, torch.Tensor]:
        """Return the named fields of fastkl.TokenStats for token ids [...]."""
        index = tokens.long()[..., None]
        logprob, ref_logprob = (x.gather(-1, index)[..., 0] for x in (self.log_p, self.log_q))
        values = (logprob, self.entropy, ref_logprob, *self[3:])
        return {name: value for name, value in zip(FIELDS, values, strict=True) if name in names}


class Gradients(NamedTuple):
    """Gradients in float64 with respect to the logits of P and of Q, [..., V]."""

    p: torch.Tensor
    q: torch.Tensor


def truth(
    p_logits: torch.Tensor, q_logits: torch.Tensor, temperature: float | torch.Tensor = 1.0
) -> Truth:
    """Compute the statistics of logits [..., V] of any type; temperature is a number or [...].

    Equivalent to two log-softmaxes in float64, with KL(P‖Q) = Σ p·(expm1(d) - d) for d = log
    q - log p, accurate near 0. Autograd differentiates it; `gradients` is more accurate for peaked
    rows.
    """
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.double()[..., None]
    x, y = p_logits.double() / temperature, q_logits.double() / temperature
    log_p, log_q = x.log_softmax(-1), y.log_softmax(-1)
    p, q, d = log_p.exp(), log_q.exp(), log_q - log_p
    # Take p·(e^d - 1 - d) as q - p - p·d where e^d may overflow.
    near, short = d.abs() < 1, d.clamp(-1, 1)
    kl = torch.where(near, p * (torch.expm1(short) - short), q - p - _weighted(p, d)).sum(-1)
    ref_kl = torch.where(near, q * (torch.expm1(-short) + short), p - q + _weighted(q, d)).sum(-1)
    entropy = -_weighted(p, log_p).sum(-1)
    return Truth(log_p, log_q, entropy, kl, ref_kl, x.logsumexp(-1), y.logsumexp(-1))


def gradients(
    exact: Truth,
    upstream: Mapping[str, torch.Tensor],
    tokens: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
) -> Gradients:
    """Compute the float64 gradients of Σ upstream[field]·field to both logits, in closed form.

    With d = log q - log p, T times the gradient of each field to the logits of P and of Q:
        logprob: onehot - p, 0                  ref_logprob: 0, onehot - q
        entropy: -p·(log p - E_p[log p]), 0
        kl: -p·(d - E_p[d]), q - p              ref_kl: p - q, q·(d - E_q[d])
        lse: p, 0                               ref_lse: 0, q
    An entry of probability 0 adds 0 to an expectation. `upstream` maps some of FIELDS to tensors
    [...]; log-probabilities need `tokens` [...].
    """
    log_p, log_q = exact.log_p, exact.log_q
    p, q, zero = log_p.exp(), log_q.exp(), torch.zeros_like(log_p)
    d = torch.where(log_p == log_q, 0.0, log_q - log_p)
    q_minus_p = torch.where(d.abs() < 1, p * torch.expm1(d), q - p)

    def onehot() -> torch.Tensor:
        if tokens is None:
            raise ValueError("tokens: expected ids for a log-probability, got None; pass them")
        return torch.zeros_like(p).scatter_(-1, tokens.long().to(p.device)[..., None], 1.0)

    def about_mean(weight: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        # Subtract the value at the most probable entry first: on a peaked row that value is far
        # larger than its distance from the mean.
        peak = weight.argmax(-1, keepdim=True)
        value = (first - first.gather(-1, peak)) - (second - second.gather(-1, peak))
        return _weighted(weight, value - _weighted(weight, value).sum(-1, keepdim=True))

    formulas: dict[str, Callable[[], tuple[torch.Tensor, torch.Tensor]]] = {
        "logprob": lambda: (onehot() - p, zero),
        "entropy": lambda: (-about_mean(p, log_p, zero), zero),
        "ref_logprob": lambda: (zero, onehot() - q),
        "kl": lambda: (-about_mean(p, log_q, log_p), q_minus_p),
        "ref_kl": lambda: (-q_minus_p, about_mean(q, log_q, log_p)),
        "lse": lambda: (p, zero),
        "ref_lse": lambda: (zero, q),
    }
    scale = temperature.double() if isinstance(temperature, torch.Tensor) else temperature
    grad_p, grad_q = zero, zero
    for name, value in upstream.items():
        weight = (value.detach().double().to(p.device) / scale)[..., None]
        _checks.choice("upstream", name, FIELDS)
        to_p, to_q = formulas[name]()
        grad_p = grad_p + _weighted(weight, to_p)
        grad_q = grad_q + _weighted(weight, to_q)
    return Gradients(grad_p, grad_q)


def kl_gradients(
    exact: Truth, upstream: torch.Tensor, temperature: float | torch.Tensor = 1.0
) -> Gradients:
    """Compute the float64 gradients of Σ upstream·KL(P‖Q)."""
    return gradients(exact, {"kl": upstream}, temperature=temperature)


def _weighted(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Multiply, with 0·inf = 0·NaN = 0, also in the backward pass."""
    return weight * value.masked_fill(weight == 0, 0.0)


# ---- comparing


def kl_tolerance(kl: torch.Tensor) -> torch.Tensor:
    """Return the error allowed for a KL: 1e-4·KL + 1e-8 below 1e-2, 2e-5·KL above."""
    relative, absolute = SMALL_KL_LIMITS
    return torch.where(kl < SMALL_KL, relative * kl + absolute, KL_LIMIT * kl)


def assert_kl(result: torch.Tensor, exact: torch.Tensor, what: str = "kl") -> float:
    """Compare divergences within kl_tolerance; a negative one fails."""
    for negative in _wide(result[result < 0]).tolist():
        raise AssertionError(f"{what}: got {negative:.9g}, a negative number")
    return _compare(result, exact, kl_tolerance, what)


def assert_near(
    result: torch.Tensor, exact: torch.Tensor, relative: float, absolute: float, what: str
) -> float:
    """Compare numbers: |result - exact| ≤ relative·|exact| + absolute."""
    return _compare(result, exact, lambda value: relative * value.abs() + absolute, what)


def assert_stats(
    results: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor], what: str = ""
) -> float:
    """Compare the same fields of TokenStats on both sides, each within its own tolerance."""
    for name in (*results, *exact):
        if results.get(name) is None or exact.get(name) is None:
            raise AssertionError(f"{what} {name}: no tensor on one of the two sides".strip())
    return max(
        (
            assert_kl(result, exact[name], f"{what} {name}".strip())
            if name in ("kl", "ref_kl")
            else assert_near(result, exact[name], *VALUE_LIMITS, f"{what} {name}".strip())
            for name, result in results.items()
        ),
        default=0.0,
    )


def assert_gradient(
    result: torch.Tensor,
    exact: torch.Tensor,
    what: str = "gradient",
    tolerance: float = GRADIENT_LIMIT,
) -> float:
    """Compare rows of gradients: L2 error ≤ `tolerance` times the norm, at least GRADIENT_FLOOR."""
    exact = _wide(exact)
    return _compare_rows(result, exact, tolerance * _norm(exact), what)


def assert_rounded_gradient(
    result: torch.Tensor,
    exact: torch.Tensor,
    what: str = "gradient",
    *,
    absolute: float = 0.0,
    truncated: bool = False,
) -> float:
    """Compare rows of gradients with the truth rounded to their type: 1e-5 in float32, in L2 norm.

    In a 16-bit type the rounding of the result dominates; the arithmetic rarely moves a value
    across a rounding boundary. The allowed error is 1.01 times the rounding error of the truth,
    plus 1e-5 of the norm, plus `absolute`. The gradient to Q is the difference q - p of two
    probabilities rounded in float32, an error of at most 2^-23 of them, times upstream gradients
    over temperatures of up to 4: absolute=1e-6. truncated: for Triton's interpreter, which
    truncates to bfloat16 where a GPU rounds.
    """
    if result.dtype == torch.float32:
        return assert_gradient(result, exact, what)
    exact = _wide(exact)
    rounded = exact.float().to(result.dtype)
    if truncated and result.dtype == torch.bfloat16:
        rounded = (exact.float().view(torch.int32) & -65536).view(torch.float32)
    rounding = (rounded.double() - exact).norm(dim=-1)
    allowed = 1.01 * rounding + GRADIENT_LIMIT * _norm(exact) + absolute
    return _compare_rows(result, exact, allowed, what)


def assert_same_bits(result: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Raise AssertionError if two tensors differ in type, shape or any bit.

    NaN equals NaN: its sign differs between the vectorised part of a CPU loop and the remainder.
    """
    _same([f"{value.dtype} {tuple(value.shape)}" for value in (result, expected)], what)
    different = (bits(result) != bits(expected)) & ~(result.isnan() & expected.isnan())
    if bool(different.any()):
        first = int(different.flatten().int().argmax())
        got, wanted = (float(value.detach().flatten()[first]) for value in (result, expected))
        raise AssertionError(
            f"{what}: {int(different.sum())} of {different.numel()} differ, the first at {first}: "
            f"{got:.9g} is not {wanted:.9g}"
        )


def bits(value: torch.Tensor) -> torch.Tensor:
    """View a tensor's memory as integers, to compare bits."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return value.detach().contiguous().view(integers[value.element_size()])


def _same(kinds: Sequence[object], what: str) -> None:
    if kinds[0] != kinds[1]:
        raise AssertionError(f"{what}: got {kinds[0]}, expected {kinds[1]}")


def _wide(value: torch.Tensor) -> torch.Tensor:
    return value.detach().double().cpu()


def _norm(exact: torch.Tensor) -> torch.Tensor:
    """Return row norms, at least GRADIENT_FLOOR; 1 for a row of zeros: absolute tolerance."""
    norm = exact.norm(dim=-1)
    return torch.where(norm == 0, 1.0, norm.clamp(min=GRADIENT_FLOOR))


def _compare(
    result: torch.Tensor,
    exact: torch.Tensor,
    tolerance: Callable[[torch.Tensor], torch.Tensor],
    what: str,
) -> float:
    result, exact = _wide(result), _wide(exact)
    _same([tuple(result.shape), tuple(exact.shape)], what)
    error, allowed = torch.where(result == exact, 0.0, (result - exact).abs()), tolerance(exact)
    told = {"got": result, "expected": exact, "off by": error, "allowed": allowed}
    return _judge(error, allowed, exact.abs(), what, "entry", told)


def _compare_rows(
    result: torch.Tensor, exact: torch.Tensor, allowed: torch.Tensor, what: str
) -> float:
    _same([tuple(result.shape), tuple(exact.shape)], what)
    error, norm = (_wide(result) - exact).norm(dim=-1), _norm(exact)
    told = {"error over norm": error / norm, "allowed": allowed / norm, "norm": norm}
    return _judge(error, allowed, norm, what, "row", told)


def _judge(
    error: torch.Tensor,
    allowed: torch.Tensor,
    scale: torch.Tensor,
    what: str,
    place: str,
    told: dict[str, torch.Tensor],
) -> float:
    """Return the largest error in units of `scale`; if an entry exceeds its allowance or is NaN,
    raise with the numbers `told` of the worst one.
    """
    excess = torch.where(error == 0, 0.0, error / allowed).flatten()
    if not bool((excess <= 1).all()):
        at = int(excess.nan_to_num(float("inf")).argmax())
        numbers = {name: value.expand_as(error).flatten()[at] for name, value in told.items()}
        text = ", ".join(f"{name} {float(value):.9g}" for name, value in numbers.items())
        raise AssertionError(f"{what}: {text}, at {place} {at}")
    relative = torch.where(error == 0, 0.0, error / scale)
    return float(relative.max()) if relative.numel() else 0.0


# ---- hard logits

KINDS = ("normal1", "normal3", "normal8", "zipf", "peaked", "very_peaked")


def logits(
    kind: str, rows: int, vocabulary: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Draw float32 logits [rows, vocabulary] of one of KINDS, with peaks at random positions."""
    _checks.choice("kind", kind, KINDS)
    noise = torch.randn(rows, vocabulary, generator=generator, device="cpu")
    if kind.startswith("normal"):
        return noise * float(kind.removeprefix("normal"))
    if kind == "zipf":
        order = torch.rand(rows, vocabulary, generator=generator, device="cpu").argsort(-1) + 1.0
        return -1.1 * order.log() + 0.3 * noise
    height = 30.0 if kind == "very_peaked" else 18.0
    peak = torch.randint(vocabulary, (rows,), generator=generator, device="cpu")
    return noise * 3.0 + height * torch.nn.functional.one_hot(peak, vocabulary)


def pair(
    kind: str,
    rows: int,
    vocabulary: int,
    size: float,
    *,
    shift: float = 0.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw logits of P and of Q = P + size·noise + shift, the same numbers on every device.

    KL(P‖Q) is near size²/2 on flat rows and far smaller on peaked ones.
    """
    generator = torch.Generator().manual_seed(seed)
    p = logits(kind, rows, vocabulary, generator)
    q = p + size * torch.randn(rows, vocabulary, generator=generator, device="cpu") + shift
    return p.to(dtype).to(device), q.to(dtype).to(device)


def sizes_pair(
    kind: str,
    sizes: Sequence[float],
    shifts: Sequence[float],
    vocabulary: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one row per size of the difference, cycling through the shifts of Q."""
    rows = [
        pair(kind, 1, vocabulary, size, shift=shifts[i % len(shifts)], dtype=dtype, seed=seed + i)
        for i, size in enumerate(sizes)
    ]
    return torch.cat([p for p, _ in rows]), torch.cat([q for _, q in rows])


def leaf(value: torch.Tensor) -> torch.Tensor:
    """Return the same memory as a new leaf tensor that requires grad, with unchanged strides."""
    return value.detach().requires_grad_()


def upstream_for(value: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Draw upstream gradients for a result, of both signs and away from 0."""
    noise = torch.randn(
        value.shape, generator=torch.Generator().manual_seed(seed + 1000), device="cpu"
    )
    return (noise + noise.sign()).to(value)


# Views of a base tensor [4, 5, 6, V + 3] with different strides and offsets.
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "no leading dimension": lambda base: base[1, 2, 3],
    "rows": lambda base: base[1, 2, :5],
    "batch and time": lambda base: base[1, :2, :3],
    "a dimension of size 1": lambda base: base[:2, 1:2, :3],
    "time without the last": lambda base: base[1, :2, :4][:, :-1],
    "time without the first": lambda base: base[1, :2, :4][:, 1:],
    "transposed batch and time": lambda base: base[1, :3, :2].transpose(0, 1),
    "three leading dimensions that do not merge": lambda base: base[::3, ::4, ::5],
    "expanded rows": lambda base: base[1, 2, :1].expand(3, -1),
    "expanded batch": lambda base: base[1, 2, :3].expand(2, -1, -1),
}
