"""Functions for two call sites in Megatron-LM, whose tensor-parallel ranks split the vocabulary:
the output layer's logits, and the hidden states before that layer.

Megatron-LM is not imported. `group` is its tensor-parallel group; all its ranks make the same call:
parallel_state.get_tensor_model_parallel_group(), or pg_collection.tp of a model.
"""

from typing import Any

import torch

from fastkl import Head, TokenStats, VocabShard, linear_kl_divergence, token_stats


def vocab_parallel_token_stats(
    logits: torch.Tensor,
    tokens: torch.Tensor | None,
    ref_logits: torch.Tensor | None = None,
    *,
    group: torch.distributed.ProcessGroup,
    vocab_size: int,
    temperature: float | torch.Tensor = 1.0,
    mask: torch.Tensor | None = None,
) -> TokenStats:
    """Compute log-probs, entropies and both KLs of every token from the logits of Megatron-LM's
    output layer, in the place of vocab_parallel_cross_entropy.

    Equivalent to

        whole = torch.cat(logits_of_all_ranks, -1)[..., :vocab_size]
        ref_whole = torch.cat(ref_logits_of_all_ranks, -1)[..., :vocab_size]
        token_stats(whole, tokens, ref_whole, temperature=temperature, mask=mask)

    but without whole logits on a GPU, unless the two models are padded differently. -logprob is
    vocab_parallel_cross_entropy(logits, tokens) with padding excluded from the softmax.

    Args:
        logits, ref_logits: [s, b, width], as output_layer returns them. Their widths may differ.
            GPTModel's forward returns [b, s, width]: tokens, mask and results are then [b, s].
            ref_logits None: no reference fields.
        tokens: integer ids of the whole vocabulary [s, b], or None. Megatron-LM's labels are
            [b, s]: pass labels.t().
        group: the tensor-parallel group.
        vocab_size: the tokenizer's vocabulary size, before padding.
        temperature, mask: as token_stats, [s, b].

    Returns:
        TokenStats of [s, b] tensors, the same on every rank.

    Gradient: to this rank's logits, 0 in padded columns. No further reduction is needed.

    Raises: TypeError, ValueError, RuntimeError as token_stats.

    Source: Shoeybi et al., Megatron-LM (2019), for the cross-entropy of a vocabulary split over
    ranks; shapes as in Megatron Core 0.20, tensor_parallel/cross_entropy.py.
    """
    widths = [each.shape[-1] for each in (logits, ref_logits) if each is not None]
    shards = [VocabShard.megatron(group, width, vocab_size) for width in widths]
    shard = shards[0] if len(set(widths)) == 1 else (shards[0], shards[1])
    return token_stats(logits, tokens, ref_logits, temperature=temperature, mask=mask, shard=shard)


def vocab_parallel_linear_kl(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor | None = None,
    *,
    group: torch.distributed.ProcessGroup,
    vocab_size: int,
    sequence_parallel: bool = False,
    **options: Any,
) -> torch.Tensor:
    """Compute KL(policy‖reference) from the hidden states before Megatron-LM's output layer, in
    place of that layer.

    Equivalent to

        parts = torch.cat(hidden_of_all_ranks) if sequence_parallel else hidden
        whole = torch.cat(weight_of_all_ranks)[:vocab_size]         # the reference's likewise
        linear_kl_divergence(parts, whole, ref_parts, ref_whole, **options)

    but without whole weights, and with logits of one chunk of tokens at a time.

    Args:
        hidden, ref_hidden: [s, b, H], or with sequence_parallel this rank's [s / tp, b, H]: the
            decoder's output, before gather_from_sequence_parallel_region and
            copy_to_tensor_model_parallel_region, which the output layer applies itself.
        weight, ref_weight: [width, H], output_layer.weight, or shared_embedding_or_output_weight()
            for tied embeddings. Both must have the same width. ref_weight None: weight.
        group: the tensor-parallel group.
        vocab_size: the tokenizer's vocabulary size, before padding.
        sequence_parallel: as config.sequence_parallel.
        options: mask, weights [s, b], reduction, normalizer, temperature and other arguments of
            linear_kl_divergence, except bias and softcap.

    Returns:
        [s, b] float32, or a scalar with a reduction; over all tokens, the same on every rank.

    Gradient: to hidden, the gradient that the output layer would return, summed over the ranks
    (with sequence_parallel, for this rank's part); to weight, that of its rows, 0 in padded rows.

    Raises: TypeError, ValueError, RuntimeError as linear_kl_divergence.

    Source: Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models
    (2022), for sequence parallelism; shapes as in Megatron Core 0.20, tensor_parallel/layers.py.
    """
    shard = VocabShard(
        group,
        group.rank() * len(weight),
        vocab_size,
        hidden_layout="sequence" if sequence_parallel else "replicated",
    )
    return linear_kl_divergence(
        hidden,
        Head(weight, shard=shard),
        ref_hidden,
        None if ref_weight is None else Head(ref_weight, shard=shard),
        **options,
    )
