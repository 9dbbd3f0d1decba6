"""Statistics of sampled tokens: log-probabilities, entropy and KL of a policy and its reference
from one read of their logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, overload

import torch

from . import _checks, backend
from .ops.engine import ENGINES
from .ops.fields import FIELDS
from .ops.row_op import RowInputs, per_token, row_statistics
from .ops.selected_op import SelectedInputs, selected_logprobs


class TokenStats(NamedTuple):
    """Per-token statistics, [...] float32 in nats.

    logprob: log π(token). entropy: H(π). ref_logprob: log π_ref(token). kl: KL(π‖π_ref). ref_kl:
    KL(π_ref‖π). The last three are None without ref_logits. A field that depends on no argument
    requiring gradient has requires_grad False.
    """

    logprob: torch.Tensor
    entropy: torch.Tensor
    ref_logprob: torch.Tensor | None
    kl: torch.Tensor | None
    ref_kl: torch.Tensor | None


if TYPE_CHECKING:

    class PairedTokenStats(TokenStats):
        """TokenStats with a reference, as a type checker sees it: no field is None."""

        ref_logprob: torch.Tensor
        kl: torch.Tensor
        ref_kl: torch.Tensor


@overload
def token_stats(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    ref_logits: None = None,
    *,
    temperature: float | torch.Tensor = 1.0,
    mask: torch.Tensor | None = None,
) -> TokenStats: ...
@overload
def token_stats(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    ref_logits: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    mask: torch.Tensor | None = None,
) -> PairedTokenStats: ...
def token_stats(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    ref_logits: torch.Tensor | None = None,
    *,
    temperature: float | torch.Tensor = 1.0,
    mask: torch.Tensor | None = None,
) -> TokenStats:
    """Compute each token's statistics for a policy-gradient step, from one read of the logits.

    Equivalent to

        log_p = (logits.float() / temperature).log_softmax(-1)
        log_q = (ref_logits.float() / temperature).log_softmax(-1)
        logprob = log_p.gather(-1, tokens[..., None])[..., 0]
        entropy = -(log_p.exp() * log_p).sum(-1)
        ref_logprob = log_q.gather(-1, tokens[..., None])[..., 0]
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        ref_kl = (log_q.exp() * (log_q - log_p)).sum(-1)

    each 0 where the mask is False, with the digits of a small KL kept. Backward needs the inputs
    and 40 bytes per row.

    Args:
        logits, ref_logits: [..., V], float32, bfloat16 or float16 (float64 on the reference
            backend), any strides with a unit stride along V.
        tokens: integer ids [...]. Where the mask is False any value is allowed: with Hugging Face's
            labels pass mask=labels != -100. Elsewhere an id outside 0 … V-1 is an error on the
            reference backend; on a GPU, where a check would synchronise, it reads nothing and makes
            logprob and ref_logprob NaN.
        temperature: divides the logits: a positive number, or a float tensor [...] (no gradient).
        mask: bool [...], True where the token counts.

    Returns:
        TokenStats of [...] float32 (float64 for float64 logits) tensors, nats.

    Gradient:
        Of every field with respect to logits and ref_logits where they require it, in one backward
        kernel. No second derivative.

    Special values, Raises: as kl_divergence.

    Source: Ouyang et al., Training language models to follow instructions with human feedback
    (2022), eq. 2, for the statistics that a step needs.
    """
    _checks.logits("logits", logits)
    leading = logits.shape[:-1]
    _checks.tokens(tokens, leading, logits.device)
    if ref_logits is not None:
        _checks.logits("ref_logits", ref_logits)
        _checks.same_shape("ref_logits", ref_logits, "logits", logits)
    _checks.temperature(temperature, leading, logits.device)
    _checks.mask(mask, leading, logits.device)
    both = (logits,) if ref_logits is None else (logits, ref_logits)
    logprob, entropy, *others = row_statistics(
        RowInputs(
            logits,
            ref_logits,
            tokens.long(),
            mask,
            *per_token(temperature),
            ",".join(FIELDS if len(both) == 2 else FIELDS[:2]),
            backend.select(*both),
        )
    )
    return TokenStats(logprob, entropy, *(others[:3] if len(both) == 2 else [None] * 3))


def selective_log_softmax(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Compute log_softmax(logits) at an index without the log-softmax tensor: a drop-in for the
    function of that name in trainers.

    Equivalent to logits.float().log_softmax(-1).gather(-1, index), or, for one id per row,
    .gather(-1, index[..., None])[..., 0].

    Trainers' own functions return the logits' type. This one returns float32 for 16-bit logits too:
    a bfloat16 log-probability near -5 is a multiple of 1/32, too coarse for a ratio, a KL estimate
    or an advantage. Convert with .to(logits.dtype) if that is wanted.

    Args:
        logits: [..., V], as in token_stats.
        index: integer ids [...], or [..., K] for K per row, from one read of the logits for any K.
            An id outside 0 … V-1 (-100 included) is an error on the reference backend and gives NaN
            on a GPU.
    Returns:
        float32 (float64 for float64 logits) in the shape of index, nats. Gradient with respect to
        logits; ids that occur twice in a row add up.
    Raises:
        As token_stats.
    """
    _checks.logits("logits", logits)
    leading = logits.shape[:-1]
    several = isinstance(index, torch.Tensor) and index.dim() == logits.dim()
    _checks.tokens(
        index,
        torch.Size((*leading, index.shape[-1])) if several else leading,
        logits.device,
        "index",
    )
    chosen, ids = backend.select(logits), index.long()
    if not several:
        logprob: torch.Tensor = row_statistics(
            RowInputs(logits, None, ids, None, None, 1.0, "logprob", chosen)
        )[0]
        return logprob
    within = ids if ENGINES[chosen].checks_values else ids.clamp(0, logits.shape[-1] - 1)
    logprobs = selected_logprobs(SelectedInputs(logits, within, chosen))[0]
    return logprobs if within is ids else torch.where(ids == within, logprobs, float("nan"))
