"""Compute every operation of the benchmarks in plain torch, as one writes it.

Softmaxes are in float32 or, for float64 input, in float64. token_stats returns the fields of
TokenStats; logprob_kl the two terms of a GRPO loss, and nothing more.
"""

import torch
import torch.nn.functional as F


def log_softmax(logits):
    """Compute log_softmax in float32 or, for float64 input, in float64."""
    return F.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _chosen(log_p, tokens):
    return log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def plain_kl_divergence(p_logits, q_logits):
    log_p, log_q = log_softmax(p_logits), log_softmax(q_logits)
    return ((log_p.exp() * (log_p - log_q)).sum(-1),)


def plain_mean_kl(p_logits, q_logits):
    return (plain_kl_divergence(p_logits, q_logits)[0].mean(),)


def plain_logprob(logits, tokens):
    return (_chosen(log_softmax(logits), tokens),)


def plain_logprob_entropy(logits, tokens):
    log_p = log_softmax(logits)
    return _chosen(log_p, tokens), -(log_p.exp() * log_p).sum(-1)


def plain_entropy(logits):
    log_p = log_softmax(logits)
    return (-(log_p.exp() * log_p).sum(-1),)


def plain_token_stats(logits, tokens, ref_logits):
    log_p, log_q = log_softmax(logits), log_softmax(ref_logits)
    p = log_p.exp()
    return (
        _chosen(log_p, tokens),
        -(p * log_p).sum(-1),
        _chosen(log_q, tokens),
        (p * (log_p - log_q)).sum(-1),
        (log_q.exp() * (log_q - log_p)).sum(-1),
    )


def plain_logprob_kl(logits, tokens, ref_logits):
    log_p, log_q = log_softmax(logits), log_softmax(ref_logits)
    return _chosen(log_p, tokens), (log_p.exp() * (log_p - log_q)).sum(-1)


PLAIN = {
    "kl_divergence": plain_kl_divergence,
    "mean_kl": plain_mean_kl,
    "token_stats": plain_token_stats,
    "logprob": plain_logprob,
    "logprob_entropy": plain_logprob_entropy,
    "entropy": plain_entropy,
    "logprob_kl": plain_logprob_kl,
}
