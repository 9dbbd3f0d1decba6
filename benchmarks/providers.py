"""Who computes: every provider offers the same operations on the same tensors, or says why it does not.

An operation takes an `Inputs` (benchmarks/workloads.py) and returns a tuple of tensors: ("kl",) for kl_divergence, the fields of TokenStats for
token_stats. A new provider is one loader function in LOADERS: it returns {operation: function} and raises what it likes when it cannot be used here;
the reason becomes a row of the results.
"""
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Provider:
    """An implementation under its name; `missing` tells why it offers nothing here."""

    name: str
    operations: dict[str, Callable] = field(default_factory=dict)
    missing: str | None = None

    def why_not(self, operation):
        """Why the provider does not offer the operation; None if it does."""
        if self.missing or operation in self.operations:
            return self.missing
        return f"{self.name} has no {operation}"


# Plain torch ----------------------------------------------------------------------------------------------------


def plain_kl_divergence(p_logits, q_logits):
    """KL(P‖Q) as one writes it: two log_softmax and a sum, in float32 or, for float64 input, in float64."""
    dtype = torch.promote_types(p_logits.dtype, torch.float32)
    log_p = F.log_softmax(p_logits, -1, dtype=dtype)
    log_q = F.log_softmax(q_logits, -1, dtype=dtype)
    return ((log_p.exp() * (log_p - log_q)).sum(-1),)


def plain_token_stats(logits, tokens, ref_logits):
    """The fields of TokenStats as one writes them, in float32 or, for float64 input, in float64."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_p = F.log_softmax(logits, -1, dtype=dtype)
    log_q = F.log_softmax(ref_logits, -1, dtype=dtype)
    p = log_p.exp()
    index = tokens.unsqueeze(-1)
    return (
        log_p.gather(-1, index).squeeze(-1),
        -(p * log_p).sum(-1),
        log_q.gather(-1, index).squeeze(-1),
        (p * (log_p - log_q)).sum(-1),
        (log_q.exp() * (log_q - log_p)).sum(-1),
    )


def _on_inputs(kl_divergence, token_stats):
    return {
        "kl_divergence": lambda inputs: kl_divergence(inputs.p, inputs.q),
        "token_stats": lambda inputs: token_stats(inputs.p, inputs.tokens, inputs.q),
    }


# Loaders --------------------------------------------------------------------------------------------------------


def load_torch(device):
    """Eager PyTorch."""
    return _on_inputs(plain_kl_divergence, plain_token_stats)


def load_torch_compile(device):
    """The same functions compiled for each shape: what a user gets with one more line."""
    if device.type != "cuda":
        raise RuntimeError("compiled on a GPU only: compiling for a CPU takes long and its speed says nothing here")
    return _on_inputs(*(torch.compile(function, dynamic=False, fullgraph=True) for function in (plain_kl_divergence, plain_token_stats)))


def load_fastkl(device):
    """This package."""
    import fastkl

    return _on_inputs(lambda p, q: (fastkl.kl_divergence(p, q),), lambda p, tokens, q: tuple(fastkl.token_stats(p, tokens, q)))


# In the order in which they are measured: what compiles longest comes last, since time may run out.
LOADERS = {"fastkl": load_fastkl, "torch": load_torch, "torch.compile": load_torch_compile}


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
