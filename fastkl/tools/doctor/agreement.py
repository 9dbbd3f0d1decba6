"""Whether fastkl's functions agree with float64 of the same inputs, each check for one element type.

The inputs are the same on every machine. The truth is plain torch in float64 with autograd, on the checks' device. A KL has to be within 2e-5 of
itself, at 1e-6 nats within 1e-4; log-probabilities and entropies within 1e-5; a row's gradient within 1e-5 in relative L2 norm, beyond what rounding
the truth to the element type costs.
"""

from __future__ import annotations

import torch

import fastkl

from .checks import Context, DisagreementError, Outcome

# Above the vocabularies that get a configuration of their own, and not a multiple of a tile.
VOCABULARY = 5000
LARGE_VOCABULARY = 128256
FIELDS = fastkl.TokenStats._fields
# Standard deviations of the difference between the logits, one row each: KL from 5e-4 to about 4 nats.
SIZES = (0.03, 0.1, 0.3, 1.0, 2.0, 3.0)
KL_LIMIT, SMALL_KL_LIMIT, VALUE_LIMIT, GRADIENT_LIMIT = 2e-5, 1e-4, 1e-5, 1e-5
# Of hidden states: sums over the vocabulary of rounded gradients of logits, in products that may be TF32 by the user's settings.
LINEAR_GRADIENT_LIMIT = {"float32": 2e-3, "bfloat16": 2e-2, "float16": 5e-3}


# ---- inputs


def ordinary_pair(vocabulary: int, dtype: torch.dtype, sizes=SIZES) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits N(0, 3²) and others that differ from them by N(0, size²) in each row."""
    generator = torch.Generator().manual_seed(0)
    p = 3.0 * torch.randn(len(sizes), vocabulary, generator=generator)
    q = p + torch.tensor(sizes)[:, None] * torch.randn(p.shape, generator=generator)
    return p.to(dtype), q.to(dtype)


def close_pair(vocabulary: int, dtype: torch.dtype, rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits whose KL is about 1e-6: flat rows, and steps that every element type can hold, of fewer entries where they are larger."""
    generator = torch.Generator().manual_seed(1)
    p = torch.randn(rows, vocabulary, generator=generator).to(dtype).float()
    step = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
    moved = torch.rand(p.shape, generator=generator) < (2.0**-10 / step) ** 2
    sign = torch.rand(p.shape, generator=generator).sub(0.5).sign()
    return p.to(dtype), torch.where(moved, p + p * step * sign, p).to(dtype)


def upstream(rows: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Upstream gradients of both signs; of float16 as large as a GradScaler makes them, since its smallest numbers are near 1e-7."""
    values = torch.linspace(-1.5, 2.0, rows, device=device)
    return values * 4096.0 if dtype == torch.float16 else values


# ---- the truth


def truth(p_logits: torch.Tensor, q_logits: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The fields of TokenStats in plain torch, for float64 logits."""
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    p, q, at = log_p.exp(), log_q.exp(), tokens[..., None]
    return {
        "logprob": log_p.gather(-1, at)[..., 0], "entropy": -(p * log_p).sum(-1), "ref_logprob": log_q.gather(-1, at)[..., 0],
        "kl": (p * (log_p - log_q)).sum(-1), "ref_kl": (q * (log_q - log_p)).sum(-1),
    }


def leaf(value: torch.Tensor) -> torch.Tensor:
    """The same memory, with a gradient of its own."""
    return value.detach().requires_grad_()


def with_gradients(function, weights: dict[str, torch.Tensor], *inputs: torch.Tensor) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor, ...]]:
    """(fields, gradients of Σ weights·fields to each input) of a function that returns a dictionary of fields."""
    leaves = [leaf(value) for value in inputs]
    fields = function(*leaves)
    total = sum((weight.to(fields[name]) * fields[name]).sum() for name, weight in weights.items())
    return {name: value.detach() for name, value in fields.items()}, torch.autograd.grad(total, leaves)


# ---- comparing


def value_error(results: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], kl_limit: float) -> float:
    """The worst relative error of the fields of a KL, once all fields are within their limits; values of other fields count as 1 at least."""
    worst = 0.0
    for name, value in results.items():
        is_kl = name in ("kl", "ref_kl")
        scale = exact[name].abs() if is_kl else exact[name].abs().clamp(min=1.0)
        error = ((value.double() - exact[name]).abs() / scale).flatten()
        row = int(error.nan_to_num(float("inf")).argmax())
        limit = kl_limit if is_kl else VALUE_LIMIT
        if not float(error[row]) <= limit:
            got, expected = float(value.flatten()[row]), float(exact[name].flatten()[row])
            raise DisagreementError(f"{name} of row {row} is {got:.7g}, float64 says {expected:.7g}: off by {float(error[row]):.1e}, "
                                    f"allowed {limit:.0e}")
        worst = max(worst, float(error[row]))
    return worst


def gradient_error(result: torch.Tensor, exact: torch.Tensor, what: str, scale: torch.Tensor | None = None, limit: float = GRADIENT_LIMIT) -> float:
    """The worst row's relative L2 error. Allowed are `limit`, the error of the truth rounded to the result's type, and of what is a difference of
    float32 probabilities weighted by `scale` their own rounding."""
    if not bool(result.isfinite().all()):
        raise DisagreementError(f"the gradient to {what} is not finite in {int((~result.isfinite()).sum())} of {result.numel()} entries")
    norm = exact.norm(dim=-1).clamp(min=1e-30)
    error, rounding = ((value.double() - exact).norm(dim=-1) / norm for value in (result, exact.to(result.dtype)))
    allowed = 1.01 * rounding + limit
    if scale is not None and result.dtype != torch.float32:
        allowed = allowed + 5e-7 * scale.abs().double() / norm
    excess = (error / allowed).flatten()
    row = int(excess.argmax())
    if not float(excess[row]) <= 1:
        raise DisagreementError(f"the gradient to {what} of row {row} is off by {float(error.flatten()[row]):.1e} of its norm, "
                                f"allowed {float(allowed.flatten()[row]):.1e}")
    return float(error.max())


def compare(function, names: tuple[str, ...], p: torch.Tensor, q: torch.Tensor, tokens: torch.Tensor, kl_limit: float = KL_LIMIT) -> Outcome:
    """function(p, q) -> {name: value}, its values and the gradients of a mix of them to both arguments, beside float64."""
    mix = dict(zip(FIELDS, (0.7, -0.3, 0.5, 1.1, -0.9), strict=True))
    base = upstream(p.shape[:-1].numel(), p.dtype, p.device).view(p.shape[:-1])
    weights = {name: mix[name] * base for name in names}
    fields, gradients = with_gradients(function, weights, p, q)
    exact, exact_gradients = with_gradients(lambda x, y: truth(x, y, tokens), weights, p.double(), q.double())
    figures = {"value_error": value_error(fields, exact, kl_limit)}
    weight = sum(abs(mix[name]) for name in names) * base.abs()
    for what, result, expected in zip("pq", gradients, exact_gradients, strict=True):
        figures[f"gradient_{what}_error"] = gradient_error(result, expected, what, weight)
    figures["mean_kl"] = float(exact["kl"].mean())
    return Outcome("ok", wording(figures, p.dtype), figures)


def wording(figures: dict[str, float], dtype: torch.dtype) -> str:
    """The relative errors in one line."""
    gradients = max(value for name, value in figures.items() if name.startswith("gradient"))
    type_alone = "" if dtype == torch.float32 else f" as {str(dtype).removeprefix('torch.')} rounds"
    return f"within {figures['value_error']:.0e}, gradients {gradients:.0e}{type_alone}"


# ---- the checks


def _kl(p, q):
    return {"kl": fastkl.kl_divergence(p, q)}


def _tokens_for(logits: torch.Tensor) -> torch.Tensor:
    return torch.randint(logits.shape[-1], logits.shape[:-1], generator=torch.Generator().manual_seed(2)).to(logits.device)


def _on(context: Context, pair) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    p, q = (value.to(context.device) for value in pair)
    return p, q, _tokens_for(p)


def check_kl(context: Context, dtype: str) -> Outcome:
    """kl_divergence, KL of 5e-4 to 4 nats."""
    return compare(_kl, ("kl",), *_on(context, ordinary_pair(VOCABULARY, getattr(torch, dtype))))


def check_small_kl(context: Context, dtype: str) -> Outcome:
    """kl_divergence where policy and reference nearly agree."""
    return compare(_kl, ("kl",), *_on(context, close_pair(VOCABULARY, getattr(torch, dtype))), SMALL_KL_LIMIT)


def check_token_stats(context: Context, dtype: str) -> Outcome:
    """All fields of token_stats, and a mix of their gradients."""
    p, q, tokens = _on(context, ordinary_pair(VOCABULARY, getattr(torch, dtype)))
    return compare(lambda x, y: fastkl.token_stats(x, tokens, y)._asdict(), FIELDS, p, q, tokens)


def check_linear(context: Context, dtype: str) -> Outcome:
    """linear_kl_divergence with the gradient computed with the value, to hidden states and weight.

    Hidden states are -1, 0 or 1 and weights eighths, so that the logits are exact in every element type: the value has to be as exact as ever.
    """
    generator = torch.Generator().manual_seed(3)
    rows, width, element = len(SIZES), 64, getattr(torch, dtype)
    hidden, ref_hidden = (torch.randint(-1, 2, (rows, width), generator=generator).to(context.device, element) for _ in range(2))
    ref_hidden = torch.where(torch.arange(width, device=context.device) < 56, hidden, ref_hidden)
    weight = (torch.randint(-4, 5, (VOCABULARY, width), generator=generator) / 8).to(context.device, element)
    weights = upstream(rows, torch.float32, context.device)

    def exactly(hidden, weight):
        return {"sum": (weights * truth(hidden @ weight.T, ref_hidden.double() @ weight.detach().T, _tokens_for(hidden))["kl"]).sum()}

    def ours(hidden, weight):
        return {"sum": fastkl.linear_kl_divergence(hidden, weight, ref_hidden, weight.detach(), weights=weights, reduction="sum")}

    one = {"sum": torch.ones((), device=context.device)}
    exact, exact_gradients = with_gradients(exactly, one, hidden.double(), weight.double())
    result, gradients = with_gradients(ours, one, hidden, weight)
    error = float((result["sum"].double() - exact["sum"]).abs() / exact["sum"].abs())
    if not error <= KL_LIMIT:
        raise DisagreementError(f"the sum is {float(result['sum']):.7g}, float64 says {float(exact['sum']):.7g}: off by {error:.1e}, "
                                f"allowed {KL_LIMIT:.0e}")
    figures = {"value_error": error}
    for what, value, expected in zip(("hidden", "weight"), gradients, exact_gradients, strict=True):
        # A sum over tokens or over the vocabulary: its norm counts as a whole.
        figures[f"gradient_{what}_error"] = gradient_error(value.flatten(), expected.flatten(), what, limit=LINEAR_GRADIENT_LIMIT[dtype])
    return Outcome("ok", wording(figures, element), figures)


def check_masked(context: Context, dtype: str) -> Outcome:
    """Masked rows of NaN and infinities are exactly 0, value and gradients, and the others are as without a mask."""
    p, q, _ = _on(context, ordinary_pair(VOCABULARY, getattr(torch, dtype)))
    mask = torch.tensor([True, False] * (len(SIZES) // 2), device=context.device)
    plain = with_gradients(_kl, {"kl": upstream(len(SIZES), p.dtype, p.device)}, p, q)
    for value, garbage in ((p, float("nan")), (q, float("inf"))):
        value[~mask] = garbage
    masked = with_gradients(lambda x, y: {"kl": fastkl.kl_divergence(x, y, mask=mask)}, {"kl": upstream(len(SIZES), p.dtype, p.device)}, p, q)
    for what, result, expected in (("value", masked[0]["kl"], plain[0]["kl"]), *zip(("gradient to p", "gradient to q"), masked[1], plain[1],
                                                                                   strict=True)):
        if bool((result[~mask] != 0).any()):
            raise DisagreementError(f"the {what} of a masked row is not 0")
        if not torch.equal(result[mask], expected[mask]):
            raise DisagreementError(f"the {what} of a row that counts changes with the mask")
    return Outcome("ok", "exactly 0, the other rows unchanged")


def check_strided(context: Context, dtype: str) -> Outcome:
    """Views that start in the middle of a block, rows that do not merge: logits[:, :-1] beside logits[:, 1:]."""
    p, q, _ = _on(context, ordinary_pair(VOCABULARY, getattr(torch, dtype)))
    views = []
    for value, time, first in ((p, slice(0, -1), 1), (q, slice(1, None), 3)):
        base = torch.full((2, len(SIZES) // 2 + 1, VOCABULARY + 5), float("nan"), dtype=value.dtype, device=value.device)
        views.append(base[:, time, first:first + VOCABULARY])
        views[-1].copy_(value.view(2, -1, VOCABULARY))
    return compare(_kl, ("kl",), *views, _tokens_for(views[0]))


def check_large_vocabulary(context: Context, dtype: str) -> Outcome:
    """Rows that several programs share."""
    return compare(_kl, ("kl",), *_on(context, ordinary_pair(LARGE_VOCABULARY, getattr(torch, dtype), sizes=(0.1, 1.0, 3.0))))


def check_alone(context: Context, dtype: str) -> Outcome:
    """Each row gives the same bits alone as in a batch, value and gradients."""
    p, q, _ = _on(context, ordinary_pair(VOCABULARY, getattr(torch, dtype)))
    weights = upstream(len(SIZES), p.dtype, p.device)
    (fields, gradients) = with_gradients(_kl, {"kl": weights}, p, q)
    for row in range(len(SIZES)):
        at = slice(row, row + 1)
        (alone, alone_gradients) = with_gradients(_kl, {"kl": weights[at]}, p[at], q[at])
        for what, one, all_rows in (("value", alone["kl"], fields["kl"]), *zip(("gradient to p", "gradient to q"), alone_gradients, gradients,
                                                                               strict=True)):
            if not torch.equal(one, all_rows[at]):
                raise DisagreementError(f"the {what} of row {row} has other bits alone than in a batch of {len(SIZES)}")
    return Outcome("ok", "the same bits")


CHECKS = (
    ("kl_divergence", check_kl), ("KL near 1e-6", check_small_kl), ("token_stats", check_token_stats), ("linear", check_linear),
    ("masked rows", check_masked), ("strided view", check_strided), ("vocabulary 128256", check_large_vocabulary),
    ("alone and in batch", check_alone),
)
