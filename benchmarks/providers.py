"""Who computes: every provider offers the same operations on the same tensors, or says why it does not.

An operation takes an `Inputs` (benchmarks/workloads.py) and returns a tuple of tensors: ("kl",) for kl_divergence and, as one number, mean_kl, the
fields of TokenStats for token_stats, ("logprob",) for logprob, ("logprob", "entropy") for logprob_entropy, ("entropy",) for entropy. A new provider
is one loader function in LOADERS, or in ALL_LOADERS if it has no KL (those of other packages are in benchmarks/peers.py): it returns
{operation: Work} and raises what it likes when it cannot be used here; the reason becomes a row of the results.
"""
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from benchmarks.peers import PEERS, PEERS_WITHOUT_KL, Work


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

    def note(self, operation):
        """Which work it does for the operation, in one line; None where it says nothing."""
        return getattr(self.operations.get(operation), "note", None)


# Plain torch ----------------------------------------------------------------------------------------------------


def _log_softmax(logits):
    """In float32 or, for float64 input, in float64."""
    return F.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


def plain_kl_divergence(p_logits, q_logits):
    """KL(P‖Q) as one writes it: two log_softmax and a sum."""
    log_p, log_q = _log_softmax(p_logits), _log_softmax(q_logits)
    return ((log_p.exp() * (log_p - log_q)).sum(-1),)


def plain_mean_kl(p_logits, q_logits):
    """The mean of the same over all tokens."""
    return (plain_kl_divergence(p_logits, q_logits)[0].mean(),)


def plain_logprob(logits, tokens):
    """The log-probability of each token: log_softmax and gather."""
    return (_log_softmax(logits).gather(-1, tokens.unsqueeze(-1)).squeeze(-1),)


def plain_logprob_entropy(logits, tokens):
    """The same, and the entropy of each row."""
    log_p = _log_softmax(logits)
    return log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def plain_entropy(logits):
    """The entropy of each row."""
    log_p = _log_softmax(logits)
    return (-(log_p.exp() * log_p).sum(-1),)


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


PLAIN = {
    "kl_divergence": plain_kl_divergence, "mean_kl": plain_mean_kl, "token_stats": plain_token_stats, "logprob": plain_logprob,
    "logprob_entropy": plain_logprob_entropy, "entropy": plain_entropy,
}


def arguments(operation, inputs):
    """What a function of PLAIN takes."""
    if operation in ("kl_divergence", "mean_kl"):
        return inputs.p, inputs.q
    if operation == "token_stats":
        return inputs.p, inputs.tokens, inputs.q
    return (inputs.p,) if operation == "entropy" else (inputs.p, inputs.tokens)


def _works(functions, note, **notes):
    """{operation: Work} of functions with the arguments of PLAIN's; notes: of operations that do something else than `note` says."""
    return {
        operation: Work(lambda i, operation=operation, function=function: function(*arguments(operation, i)), notes.get(operation, note))
        for operation, function in functions.items()
    }


# Loaders --------------------------------------------------------------------------------------------------------


def load_torch(device):
    """Eager PyTorch: log_softmax in float32, and a sum or a gather. All operations: the same work."""
    return _works(PLAIN, "the same work: a float32 log_softmax of each tensor, then elementwise in [N, V] and a sum",
                  logprob="the same work: a float32 log_softmax and a gather")


def load_torch_compile(device):
    """The same functions compiled for each shape: what a user gets with one more line."""
    if device.type != "cuda" and not any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++")):
        raise RuntimeError("needs a C++ compiler on a CPU, found none")
    compiled = {operation: torch.compile(function, dynamic=False, fullgraph=True) for operation, function in PLAIN.items()}
    return _works(compiled, "the same work: plain torch, compiled for this shape")


def load_fastkl(device):
    """This package. All operations: the same work; the entropy comes with a log-probability of each row, which costs one element."""
    import fastkl

    functions = {
        "kl_divergence": lambda p, q: (fastkl.kl_divergence(p, q),),
        "mean_kl": lambda p, q: (fastkl.kl_divergence(p, q).mean(),),
        "token_stats": lambda p, tokens, q: tuple(fastkl.token_stats(p, tokens, q)),
        "logprob": lambda p, tokens: (fastkl.selective_log_softmax(p, tokens),),
        "logprob_entropy": lambda p, tokens: fastkl.token_stats(p, tokens)[:2],
    }
    return {
        **_works(functions, "the same work", mean_kl="the same work: KL of each token, then its mean"),
        "entropy": Work(lambda i: (fastkl.token_stats(i.p, i.tokens).entropy,), "token_stats without a reference: a log-probability comes with it"),
    }


def load_kl_div(device):
    """torch's F.kl_div(log_q, log_p, log_target=True) on two float32 log_softmax: summed over the vocabulary, or batchmean. KL only."""
    def kl_divergence(i):
        return (F.kl_div(_log_softmax(i.q), _log_softmax(i.p), reduction="none", log_target=True).sum(-1),)

    def mean_kl(i):
        log_p, log_q = (_log_softmax(x).flatten(0, -2) for x in (i.p, i.q))
        return (F.kl_div(log_q, log_p, reduction="batchmean", log_target=True),)

    note = "the same work: two float32 log_softmax by torch first, writes [N, V] of losses"
    return {"kl_divergence": Work(kl_divergence, note), "mean_kl": Work(mean_kl, note)}


def load_kl_div_probabilities(device):
    """F.kl_div(log_q, p) as it is often written: a float32 log_softmax, and a float32 softmax whose logarithm F.kl_div takes again. KL only."""
    def losses(i, reduction):
        log_q = _log_softmax(i.q).flatten(0, -2)
        return F.kl_div(log_q, F.softmax(i.p, -1, dtype=log_q.dtype).flatten(0, -2), reduction=reduction)

    note = "more work: the logarithm of a float32 softmax is taken again; writes [N, V] of losses"
    return {
        "kl_divergence": Work(lambda i: (losses(i, "none").sum(-1).view(i.p.shape[:-1]),), note),
        "mean_kl": Work(lambda i: (losses(i, "batchmean"),), note),
    }


def load_categorical(device):
    """torch.distributions.kl_divergence of two Categorical(logits=...) in float32, without the checks of their arguments. KL only: the same work."""
    from torch.distributions import Categorical, kl_divergence

    def distribution(logits):
        return Categorical(logits=logits.to(torch.promote_types(logits.dtype, torch.float32)), validate_args=False)

    def kl(i):
        return kl_divergence(distribution(i.p), distribution(i.q))

    note = "more work: float32 copies of the logits, normalised, their softmax, and tests for infinities in [N, V]"
    return {"kl_divergence": Work(lambda i: (kl(i),), note), "mean_kl": Work(lambda i: (kl(i).mean(),), note)}


# Those that have a KL, in the order in which they are measured.
LOADERS = {
    "fastkl": load_fastkl, "torch": load_torch, "torch.compile": load_torch_compile, "F.kl_div": load_kl_div,
    "F.kl_div on probabilities": load_kl_div_probabilities, "Categorical": load_categorical, **PEERS,
}
ALL_LOADERS = {**LOADERS, **PEERS_WITHOUT_KL}


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
