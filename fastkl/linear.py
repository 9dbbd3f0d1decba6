"""Token statistics from hidden states and lm_head weights: a chunk of logits at a time; all logits
exist only if they are few or requested.
"""

from typing import overload

import torch

from . import _checks
from ._heads import Given, keeps_logits, prepare, whole_vocabulary
from ._heads import Head as Head
from .ops.fields import FIELDS, FIELDS_OF, result_dtype
from .ops.linear_cells_op import ListInputs, linear_cells
from .ops.linear_op import StatisticsInputs, linear_statistics
from .ops.topk_rows import ListDivergence
from .tokens import PairedTokenStats, PolicyTokenStats, Support, TokenStats


@overload
def linear_token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor | Head,
    tokens: torch.Tensor,
    ref_hidden: None = None,
    ref_weight: None = None,
    *,
    bias: torch.Tensor | None = None,
    ref_bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    ref_temperature: float | torch.Tensor | None = None,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
    support: torch.Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    recompute: bool | None = None,
) -> PolicyTokenStats: ...
@overload
def linear_token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor | Head,
    tokens: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor | Head | None = None,
    *,
    bias: torch.Tensor | None = None,
    ref_bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    ref_temperature: float | torch.Tensor | None = None,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
    support: torch.Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    recompute: bool | None = None,
) -> PairedTokenStats: ...
@overload
def linear_token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor | Head,
    tokens: torch.Tensor | None,
    ref_hidden: torch.Tensor | None = None,
    ref_weight: torch.Tensor | Head | None = None,
    *,
    bias: torch.Tensor | None = None,
    ref_bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    ref_temperature: float | torch.Tensor | None = None,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
    support: torch.Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    recompute: bool | None = None,
) -> TokenStats: ...
def linear_token_stats(  # noqa: PLR0913
    hidden: torch.Tensor,
    weight: torch.Tensor | Head,
    tokens: torch.Tensor | None,
    ref_hidden: torch.Tensor | None = None,
    ref_weight: torch.Tensor | Head | None = None,
    *,
    bias: torch.Tensor | None = None,
    ref_bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    ref_temperature: float | torch.Tensor | None = None,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
    support: torch.Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    recompute: bool | None = None,
) -> TokenStats:
    """Compute token_stats of an lm_head's logits, a chunk of tokens at a time.

    Equivalent to

        logits = F.linear(hidden, weight, bias).to(logits_dtype)
        ref_logits = F.linear(ref_hidden, ref_weight, ref_bias).to(logits_dtype)
        if softcap is not None:
            logits = softcap * torch.tanh(logits.float() / softcap)
            ref_logits = softcap * torch.tanh(ref_logits.float() / softcap)
        options = dict(temperature=temperature, mask=mask, support=support)
        stats = token_stats(logits, tokens, ref_logits, **options)

    for plain weights; a Head has its own bias, softcap and scale, and ref_temperature may divide
    ref_logits instead. Forward takes two matrix products (one without a reference). Every field and
    token may have its own upstream gradient. If all logits take at most 2 GiB, or with
    recompute=False, they are kept for backward, which overwrites them with their gradients;
    otherwise buffers for one chunk of logits are the only large memory, and backward recomputes the
    logits. Backward needs 40 bytes per token in addition to the inputs.

    Args:
        hidden: [..., H], the last hidden states after the final norm; float32, bfloat16 or float16
            (float64 on the reference backend).
        weight: [V, H], the lm_head's weight, in the type of hidden, or a Head. If one model's
            vocabulary is padded, pass its weight[:V] and bias[:V].
        tokens: integer ids [...] or None, as for token_stats.
        ref_hidden: [..., H_ref], the reference's hidden states. They may be cached from an earlier
            pass, also in inference mode; their H and type may differ.
        ref_weight: [V, H_ref], or a Head. If it is the same tensor as weight, also inside Heads,
            both are one weight with one gradient sum. Default: the policy's weight, or its entire
            Head.
        bias, ref_bias: [V] or None, in the type of their weight. For a shared lm_head with a bias
            pass it as both. An error for a model given as a Head.
        temperature: divides the logits: a positive number, or a float tensor [...] (no gradient).
        ref_temperature: the same for the reference's logits. Default: temperature.
        softcap: the logits become softcap·tanh(logits/softcap), before the temperature; a positive
            number. It applies to both models, so it is an error if either is a Head: make Heads of
            both.
        mask: bool [...], True where the token counts. Other tokens return exactly 0 and have
            gradient exactly 0, whatever their hidden states. The reference backend drops them from
            the products; on a GPU, where that would synchronise, they are computed as zeros.
        support: integer ids [..., K], as for token_stats. Up to K = V / 256 each product uses K
            rows of the weight per token; above, chunks of all logits are computed as without it.
            Backward needs about 45·K + 70 bytes per token, with a reference 120·K + 90.
        logits_dtype: the type of the logits in a chunk. Default: that of hidden, or float32 if
            policy and reference differ. torch.float32 keeps the products' float32 sums for 16-bit
            inputs; see Accuracy.
        chunk_size: an upper bound on C and G in tokens (C is at most 1024). Default: computed from
            N, H, V and a fixed bound on memory, never from free memory. See Memory.
        recompute: False keeps the logits of all models from forward to backward, which saves a
            product for each; True recomputes them; None keeps them if N·V·l of all models together
            is at most 2 GiB. They are not kept if no input requires gradient, under torch.no_grad
            or inside transforms of torch.func; with None, nor in graphs of torch.export. See
            Memory.

    Returns:
        TokenStats of [...] float32 (float64 for float64 inputs) tensors, nats. The reference's
        fields and the KLs are None without ref_hidden.

    Gradient:
        Of every field with respect to hidden, weight, bias, ref_hidden, ref_weight and ref_bias if
        they require it, in their types; weight gradients are summed in float32 (on a CPU the
        summands are rounded to the type of 16-bit inputs). To keep the reference's gradient out of
        a shared lm_head, pass ref_weight=weight.detach(). Backward costs one product for each
        hidden and each weight that requires gradient and, without kept logits, two more (one if
        only logprob and entropy have a gradient): forward and backward with a trained lm_head and a
        frozen reference take four with kept logits, six without; logprob and entropy without a
        reference take three and four. A second backward through a retained graph recomputes the
        logits, which the first one has overwritten. No second derivative.

    Memory:
        Beyond inputs, results and returned gradients, with b bytes per input element, l per logit,
        C ≤ 1024 tokens of a chunk and G ≥ C tokens whose gradients of logits are kept until one
        product:

            kept:     N·V·l for each model, rows padded to 64 entries, from forward to the end of
                      backward; forward then has no other logits, and backward C·V·l for each
                      trained model if ref_kl has a gradient to the reference
            forward:  2·C·V·l for both models
            backward: C·V·l for a frozen model; G·V·b for a trained one, and C·V·l if l differs
                      from b; 4·V·H for each 16-bit weight that requires gradient (its sum in
                      float32)

        Kept logits with l = b need no G·V·b: their gradients overwrite them, except under
        torch.compile, selective checkpointing and other modes that see ops. G is then N, as it is
        whenever that does not raise the peak, the returned gradient included: one GEMM then
        computes a bfloat16 weight's gradient, without a float32 sum. Hidden states are copied too:
        those of G tokens with a mask, all of them if their leading dimensions do not merge into one
        in memory. On a CPU rows in float32 take 15 MB more.

        At H = 4096, V = 128256 in bfloat16: kept, 2.10 GB for N = 8192 of one model or 4096 of two,
        and no other memory; not kept, 0.53 GB forward, with a trainable weight 1.31 GB at N = 4096,
        2.36 GB at 8192, and 1.05 + 2.10 GB above. Without chunk_size all terms except kept logits
        and the sums (or the window that replaces the sums) stay under 1 GiB on a GPU (128 MiB on a
        CPU) or half of the sums, whichever is larger. Results depend on the chunk only as a GEMM's
        rounding depends on its shape.

    Accuracy:
        float32: the accuracy of the products. bfloat16, float16: each logit is rounded once, which
        dominates every other error, as for logits that a model returns; logits_dtype=torch.float32
        avoids that rounding. float16 gradients of logits underflow if upstream gradients are small,
        as in torch: use a GradScaler, or "sum" and "mean" of linear_kl_divergence, which have their
        own loss scale. Figures: docs/linear.md, "Accuracy".

    autocast: inputs are cast to the autocast type, as by F.linear.

    Special values: as token_stats. Raises: TypeError, ValueError, RuntimeError as token_stats.

    Source: the chunking is that of fused linear cross-entropy losses; each chunk computes
    token_stats.
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
        )
    )
    hidden = inputs.hidden
    if tokens is not None:
        _checks.tokens(tokens, hidden.shape[:-1], hidden.device)
        tokens = tokens.long()
    keep = keeps_logits(inputs, recompute)
    if support is not None:
        whole_vocabulary(inputs, "support")
        shape = *hidden.shape[:-1], len(inputs.weight)
        kept = Support.of(support, mask, shape, hidden.device, inputs.backend)
        restricted = []
        for one in inputs._replace(mask=kept.counted).models():
            relative, _, peak, *_ = linear_cells(
                one, ListInputs(kept.ids, keep, False), ListDivergence()
            )
            divisor = one.temperature if one.temperatures is None else one.temperatures
            restricted.append((relative, peak / divisor))
        return kept.statistics(restricted, tokens, result_dtype(hidden))
    fields = FIELDS_OF[ref_hidden is not None, tokens is not None]
    found = linear_statistics(inputs, StatisticsInputs(tokens, fields, keep))
    return TokenStats._make(
        value if name in fields.split(",") else None
        for name, value in zip(FIELDS, found, strict=False)
    )
