"""The same statistics from hidden states and lm_head weights: never the logits of all tokens at once, in forward or in backward."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import _checks, _linear_ops, _rows, backend
from .tokens import TokenStats

REDUCTIONS = ("none", "sum", "mean")
# Asked for once: torch.compile cannot trace the question in every release.
_AUTOCAST_DEVICES = frozenset(name for name in ("cpu", "cuda") if torch.amp.is_autocast_available(name))


def linear_token_stats(hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, ref_hidden: torch.Tensor | None = None,
                       ref_weight: torch.Tensor | None = None, *, bias: torch.Tensor | None = None, ref_bias: torch.Tensor | None = None,
                       temperature: float | torch.Tensor = 1.0, softcap: float | None = None, mask: torch.Tensor | None = None,
                       logits_dtype: torch.dtype | None = None, chunk_size: int | None = None) -> TokenStats:
    """token_stats of the logits that an lm_head would give, a chunk of tokens at a time.

    Equivalent to

        logits = F.linear(hidden, weight, bias).to(logits_dtype)
        ref_logits = F.linear(ref_hidden, ref_weight, ref_bias).to(logits_dtype)
        if softcap is not None:
            logits, ref_logits = (softcap * torch.tanh(x.float() / softcap) for x in (logits, ref_logits))
        stats = token_stats(logits, tokens, ref_logits, temperature=temperature, mask=mask)

    in two matrix products (one without a reference), with buffers for one chunk of logits as the only large memory. Backward computes the
    logits again, so that every field and token may have its own upstream gradient, and holds 40 bytes per token for it beside the inputs.
    Where there is memory for all logits, token_stats of F.linear's results does without computing them again.

    Args:
        hidden: [..., H], the last hidden states after the final norm; float32, bfloat16 or float16 (float64 on the reference backend).
        weight: [V, H], the lm_head's weight, in the type of hidden. A vocabulary that is padded in one model: pass weight[:V].
        tokens: integer ids [...], as for token_stats.
        ref_hidden: [..., H_ref], the reference's hidden states: they may be cached from an earlier pass, also one in inference mode, and their H and
            type may differ.
        ref_weight: [V, H_ref]. Left out, or the same tensor as weight: both share one lm_head.
        bias, ref_bias: [V] or None, in the type of their weight. A shared lm_head with a bias needs it as both.
        temperature: divides the logits: a positive number, or a float tensor [...] (no gradient).
        softcap: the logits become softcap·tanh(logits/softcap), before the temperature; a positive number. Of both models.
        mask: bool [...], True where the token counts. Other tokens return exactly 0 and have gradient exactly 0, whatever their hidden states
            hold. The reference backend leaves them out of the products; on a GPU, where that would cost a synchronisation, they take part as zeros.
        logits_dtype: the type of the logits in a chunk. Default: that of hidden, float32 where policy and reference differ. torch.float32 keeps the
            products' float32 sums for 16-bit inputs; see Accuracy.
        chunk_size: C and G are at most this many tokens (C at most 1024). Default: from N, H, V and a fixed bound on memory, never from what happens
            to be free. See Memory.

    Returns:
        TokenStats of [...] float32 (float64 for float64 inputs) tensors, nats. The last three fields are None without ref_hidden.

    Gradient:
        Of every field to hidden, weight, bias, ref_hidden, ref_weight and ref_bias where they require it, in their types; weight gradients are summed
        in float32 (on a CPU what is added to the sum was rounded to 16-bit inputs' type). To keep a shared lm_head from learning through the
        reference, pass ref_weight=weight.detach(). Backward costs two products (one where only logprob and entropy have a gradient) and one for each
        hidden and each weight that requires it. No second derivative.

    Memory:
        Beyond inputs, results and returned gradients, with b bytes per input element, l per logit, C ≤ 1024 tokens of a chunk and G ≥ C tokens
        whose gradients of logits wait for one product:

            forward:  2·C·V·l                                          for both models
            backward: C·V·l for a model that learns nothing;  G·V·b for one that learns, and C·V·l where l differs from b;
                      4·V·H for each 16-bit weight that requires gradient (its sum in float32)

        G = N where that takes no more at its peak, the returned gradient included: then one product gives a bfloat16 weight's gradient, without a
        sum. On top come copies of the hidden states, of G tokens' where there is a mask, of all where their leading dimensions are not one in
        memory; on a CPU 15 MB more for rows in float32. At H = 4096, V = 128256 in bfloat16: 0.53 GB forward; with a trainable weight 1.31 GB at
        N = 4096, 2.36 GB at 8192, and 1.05 + 2.10 GB from there on. Without chunk_size all terms but the sums, or what takes their place, stay under
        1 GiB on a GPU (128 MiB on a CPU) or half of the sums, whichever is more. Results depend on the chunk only as a product's rounding depends
        on its shape.

    Accuracy:
        float32: that of the products. bfloat16, float16: each logit is rounded once, which dominates everything else, exactly as for logits that
        a model returns; logits_dtype=torch.float32 leaves that rounding out. float16 gradients of logits vanish where upstream gradients are small,
        as in torch: use a GradScaler, or "sum" and "mean" of linear_kl_divergence, which scale by themselves. Figures: fastkl's README, "From hidden
        states".

    autocast: as F.linear, inputs are cast to the autocast type.

    Special values: as token_stats. Raises: TypeError, ValueError, RuntimeError as token_stats.

    Source: the chunking is that of every fused linear cross-entropy; what is computed per chunk is token_stats.
    """
    made = prepare(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, temperature, softcap, mask, logits_dtype, chunk_size)
    _checks.tokens(tokens, hidden.shape[:-1], hidden.device)
    fields = "logprob,entropy" if ref_hidden is None else ",".join(_rows.FIELDS)
    values = _linear_ops.linear_statistics(*made.six, tokens.long(), *made.per_token, fields, *made.settings)
    return TokenStats(*values[:2], None, None, None) if ref_hidden is None else TokenStats(*values[:5])


def linear_kl_divergence(hidden: torch.Tensor, weight: torch.Tensor, ref_hidden: torch.Tensor, ref_weight: torch.Tensor | None = None, *,
                         weights: torch.Tensor | None = None, reduction: str = "none", bias: torch.Tensor | None = None,
                         ref_bias: torch.Tensor | None = None, temperature: float | torch.Tensor = 1.0, softcap: float | None = None,
                         mask: torch.Tensor | None = None, logits_dtype: torch.dtype | None = None,
                         chunk_size: int | None = None) -> torch.Tensor:
    """KL(P‖Q) per token, its sum or its mean, with P's logits from (hidden, weight, bias) and Q's from (ref_hidden, ref_weight, ref_bias).

    Equivalent to

        p_logits, q_logits = ...                                           # as in linear_token_stats
        kl = kl_divergence(p_logits, q_logits, temperature=temperature, mask=mask)
        "none": kl        "sum": (weights * kl).sum()        "mean": (weights * kl).sum() / mask.sum()     # 0 if no token counts

    The order of the arguments is the direction: policy first is the RLHF penalty, teacher first the distillation loss. Whichever of the two
    requires gradient learns.

    "sum" and "mean" compute the gradients together with the value, while the logits of a chunk are at hand: four matrix products with a
    trainable lm_head, three with a frozen one, two where nothing requires gradient (or under torch.no_grad); one more for the other
    model's hidden states and one for its weight where those learn. What backward needs is then the finished gradients themselves, one
    tensor like each input that requires it (float32 for a float16 weight or bias): call it under torch.no_grad() where no backward will follow.
    "none" allows any upstream gradient per token and computes the logits again in backward: six products, and five.

    Args:
        weights: [...] float, what each token's KL counts (a sequence's advantage, beta over a length, …): "sum" and "mean" only. It may require
            gradient; of a masked token it may hold anything.
        reduction: "none", "sum" or "mean": over the tokens that count, however they are weighted.
        The others: as linear_token_stats, with hidden, weight, bias for the first argument of KL(·‖·).

    Returns:
        [...] float32 (float64 for float64 inputs) for "none", else a scalar. Nats.

    Gradient:
        To hidden, weight, bias, ref_hidden, ref_weight, ref_bias and weights where they require it. A second backward over a retained graph gives the
        same. No second derivative. "sum" and "mean" have to know when they are called what requires gradient: under torch.vmap, or in a graph
        traced without, they raise instead of leaving a gradient out. They scale a finished gradient by the upstream one, which must be finite.

    Memory, Accuracy, autocast: as linear_token_stats; "sum" and "mean" need what its backward needs, in forward.

    Special values: as kl_divergence. Raises: TypeError, ValueError, RuntimeError as kl_divergence.

    Source: as kl_divergence.
    """
    _checks.choice("reduction", reduction, REDUCTIONS)
    made = prepare(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, temperature, softcap, mask, logits_dtype, chunk_size,
                   reference_required=True)
    if reduction == "none":
        if weights is not None:
            raise ValueError("weights: expected None with reduction='none', got a tensor; multiply the result instead, or use reduction='sum'")
        return _linear_ops.linear_statistics(*made.six, None, *made.per_token, "kl", *made.settings)[3]
    leading, device = hidden.shape[:-1], hidden.device
    _checks.token_weights(weights, leading, device)
    dtype = _rows.result_dtype(hidden)
    weights = torch.ones(leading, dtype=dtype, device=device) if weights is None else weights.to(dtype)
    if reduction == "mean":
        weights = weights / (max(1, weights.numel()) if mask is None else mask.sum(dtype=dtype).clamp(min=1))
    return weighted_kl(made, weights)[0]


class Prepared(NamedTuple):
    """Checked arguments in the order of the ops: the six tensors; mask, temperatures, temperature; softcap, backend, logits_dtype, chunk_size."""

    six: tuple
    per_token: tuple
    settings: tuple

    def swapped(self) -> Prepared:
        """The same with policy and reference in each other's place."""
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias = self.six
        first, second = (weight, None) if ref_weight is None else (ref_weight, weight)
        return self._replace(six=(ref_hidden, first, ref_bias, hidden, second, bias))


def weighted_kl(made: Prepared, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(Σ weights·kl with gradient, kl [...] without) for weights [...] in the results' type; a masked token's weight does not matter."""
    if made.per_token[0] is not None:
        weights = torch.where(made.per_token[0], weights, 0.0)
    wrt = ",".join(name for name, value in zip(_linear_ops.SIX, made.six, strict=True)
                   if value is not None and value.requires_grad and torch.is_grad_enabled())
    results = _linear_ops.linear_weighted_kl(*made.six, weights, *made.per_token, wrt, *made.settings)
    return results[0], results[1]


def prepare(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, temperature, softcap, mask, logits_dtype, chunk_size, *,
            reference_required: bool = False) -> Prepared:
    """Check the arguments that all functions on hidden states share, and cast what autocast casts."""
    if reference_required:
        _checks.reference_given(ref_hidden)
    shared = ref_weight is weight
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = (
        _autocast(value) for value in (hidden, weight, bias, ref_hidden, None if shared else ref_weight, ref_bias))
    _checks.head("", hidden, weight, bias)
    _checks.second_head(hidden, weight, bias, ref_hidden, weight if shared else ref_weight, ref_bias)
    _checks.temperature(temperature, hidden.shape[:-1], hidden.device)
    _checks.mask(mask, hidden.shape[:-1], hidden.device)
    _checks.softcap(softcap)
    _checks.chunk_size(chunk_size)
    default = hidden.dtype if ref_hidden is None or ref_hidden.dtype == hidden.dtype else torch.float32
    _checks.logits_dtype(logits_dtype, default)
    chosen = backend.select(*(value for value in (hidden, ref_hidden) if value is not None), read_rows=False)
    one = not isinstance(temperature, torch.Tensor)
    return Prepared((hidden, weight, bias, ref_hidden, ref_weight, ref_bias),
                    (mask, None if one else temperature, float(temperature) if one else 1.0),
                    (float(softcap or 0.0), chosen, logits_dtype or default, chunk_size))


def _autocast(value: torch.Tensor | None) -> torch.Tensor | None:
    """As F.linear under autocast: float32 and 16-bit tensors in the autocast type."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype == torch.float64:
        return value
    device = value.device.type
    if device not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return value
    return value.to(torch.get_autocast_dtype(device))
