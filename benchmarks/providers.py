"""Who computes: every provider offers the same operations on the same tensors, or says why it does not.

An operation takes an `Inputs` (benchmarks/workloads.py) and returns a tuple of tensors: ("kl",) for kl_divergence, the fields of TokenStats for
token_stats, ("logprob",) for logprob, ("logprob", "entropy") for logprob_entropy. A new provider is one loader function in LOADERS (those of other
packages are in benchmarks/peers.py): it returns {operation: function} and raises what it likes when it cannot be used here; the reason becomes a row
of the results.
"""
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from benchmarks.peers import PEERS


@dataclass(frozen=True)
class Provider:
    """An implementation under its name.

    missing: why it offers nothing here. rows: how many rows at once are not too slow. apart: it computes in a process of its own, beside the others.
    """

    name: str
    operations: dict[str, Callable] = field(default_factory=dict)
    missing: str | None = None
    rows: int | None = None
    apart: bool = False

    def why_not(self, operation):
        """Why the provider does not offer the operation; None if it does."""
        if self.missing or operation in self.operations:
            return self.missing
        return f"{self.name} has no {operation}"


# Plain torch ----------------------------------------------------------------------------------------------------


def _log_softmax(logits):
    """In float32 or, for float64 input, in float64."""
    return F.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


def plain_kl_divergence(p_logits, q_logits):
    """KL(P‖Q) as one writes it: two log_softmax and a sum."""
    log_p, log_q = _log_softmax(p_logits), _log_softmax(q_logits)
    return ((log_p.exp() * (log_p - log_q)).sum(-1),)


def plain_logprob(logits, tokens):
    """The log-probability of each token: log_softmax and gather."""
    return (_log_softmax(logits).gather(-1, tokens.unsqueeze(-1)).squeeze(-1),)


def plain_logprob_entropy(logits, tokens):
    """The same, and the entropy of each row."""
    log_p = _log_softmax(logits)
    return log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def plain_token_stats(logits, tokens, ref_logits):
    """The fields of TokenStats as one writes them."""
    log_p, log_q = _log_softmax(logits), _log_softmax(ref_logits)
    p = log_p.exp()
    index = tokens.unsqueeze(-1)
    return (
        log_p.gather(-1, index).squeeze(-1),
        -(p * log_p).sum(-1),
        log_q.gather(-1, index).squeeze(-1),
        (p * (log_p - log_q)).sum(-1),
        (log_q.exp() * (log_q - log_p)).sum(-1),
    )


def _on_inputs(kl_divergence, token_stats, logprob, logprob_entropy):
    return {
        "kl_divergence": lambda i: kl_divergence(i.p, i.q),
        "token_stats": lambda i: token_stats(i.p, i.tokens, i.q),
        "logprob": lambda i: logprob(i.p, i.tokens),
        "logprob_entropy": lambda i: logprob_entropy(i.p, i.tokens),
    }


PLAIN = (plain_kl_divergence, plain_token_stats, plain_logprob, plain_logprob_entropy)


# Loaders --------------------------------------------------------------------------------------------------------


def load_torch(device):
    """Eager PyTorch: log_softmax in float32, and a sum or a gather. All operations: the same work."""
    return _on_inputs(*PLAIN)


def load_torch_compile(device):
    """The same functions compiled for each shape: what a user gets with one more line."""
    if device.type != "cuda" and not any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++")):
        raise RuntimeError("needs a C++ compiler on a CPU, found none")
    return _on_inputs(*(torch.compile(function, dynamic=False, fullgraph=True) for function in PLAIN))


def load_fastkl(device):
    """This package. All operations: the same work."""
    import fastkl

    return _on_inputs(
        lambda p, q: (fastkl.kl_divergence(p, q),),
        lambda p, tokens, q: tuple(fastkl.token_stats(p, tokens, q)),
        lambda p, tokens: (fastkl.selective_log_softmax(p, tokens),),
        lambda p, tokens: fastkl.token_stats(p, tokens)[:2],
    )


def load_kl_div(device):
    """torch's F.kl_div(log_q, log_p, log_target=True) on two float32 log_softmax, summed over the vocabulary. KL only: the same work."""
    return {"kl_divergence": lambda i: (F.kl_div(_log_softmax(i.q), _log_softmax(i.p), reduction="none", log_target=True).sum(-1),)}


def load_kl_div_probabilities(device):
    """F.kl_div(log_q, p) as it is often written: a float32 log_softmax, and a float32 softmax whose logarithm F.kl_div takes again. KL only."""
    def kl_divergence(i):
        log_q = _log_softmax(i.q)
        return (F.kl_div(log_q, F.softmax(i.p, -1, dtype=log_q.dtype), reduction="none").sum(-1),)

    return {"kl_divergence": kl_divergence}


def load_categorical(device):
    """torch.distributions.kl_divergence of two Categorical(logits=...) in float32, without the checks of their arguments. KL only: the same work."""
    from torch.distributions import Categorical, kl_divergence

    def distribution(logits):
        return Categorical(logits=logits.to(torch.promote_types(logits.dtype, torch.float32)), validate_args=False)

    return {"kl_divergence": lambda i: (kl_divergence(distribution(i.p), distribution(i.q)),)}


# In the order in which they are measured: what the bars of gpu_suite.py need comes first, since time may run out.
LOADERS = {
    "fastkl": load_fastkl, "torch": load_torch, "torch.compile": load_torch_compile, "F.kl_div": load_kl_div,
    "F.kl_div on probabilities": load_kl_div_probabilities, "Categorical": load_categorical, **PEERS,
}


def load_providers(device, names=None, loaders=LOADERS):
    """The providers by name, in the order of the loaders; one that cannot be used carries the reason."""
    providers = []
    for name, load in loaders.items():
        if names is not None and name not in names:
            continue
        try:
            providers.append(Provider(name, load(device)))
        except Exception as error:  # a peer may fail in any way when imported; that is a row of the results, not the end of them
            providers.append(Provider(name, missing=f"{type(error).__name__}: {error}"))
    return providers
