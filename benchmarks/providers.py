"""List who computes: every provider offers operations on the same tensors, or says why not.

An operation is a function of the case's inputs that returns a tuple of tensors. On logits
(cases.Inputs): "kl_divergence", "mean_kl", "token_stats", "logprob", "logprob_entropy", "entropy".
From hidden states (linear_cases.LinearInputs): "linear_" and a mode of work.PRODUCTS.
A provider is a loader, a function of the device that returns {operation: Work} and raises what it
likes where it cannot be used; the reason becomes a row of the results. Other packages are in
peers.py. A user's own loader is named on the command line: --provider package.module:function.
"""

import argparse
import importlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.peers import LINEAR_PEERS, PEERS
from benchmarks.work import (
    PLAIN,
    PRODUCTS,
    Work,
    linear_works,
    log_softmax,
    logits_works,
    on_hidden,
)

LOSSES = ("forward", "loss", "frozen", "distillation")
CHUNK = 2048  # tokens: each chunk adds to the whole gradient of the weight, so larger is faster


@dataclass(frozen=True)
class Provider:
    """Hold an implementation under its name.

    missing: why it offers nothing here. rows: the number of rows at once that is not too slow.
    apart: it computes in a process of its own, beside the others.
    """

    name: str
    operations: dict[str, Callable] = field(default_factory=dict)
    missing: str | None = None
    rows: int | None = None
    apart: bool = False

    def why_not(self, operation):
        if self.missing or operation in self.operations:
            return self.missing
        return f"{self.name} has no {operation}"

    def note(self, operation):
        return getattr(self.operations.get(operation), "note", None)


# Loaders


def load_torch(device):
    return {
        **logits_works(
            PLAIN,
            "the same work: a float32 log_softmax of each tensor, then elementwise in [N, V] and "
            "a sum",
            logprob="the same work: a float32 log_softmax and a gather",
        ),
        **linear_works(
            on_hidden(PLAIN),
            PRODUCTS,
            "the same work, the fewest products; all logits and float32 log_softmax in memory",
        ),
    }


def load_torch_compile(device):
    compilers = (os.environ.get("CXX", "g++"), "clang++")
    if device.type != "cuda" and not any(map(shutil.which, compilers)):
        raise RuntimeError("needs a C++ compiler on a CPU, found none")

    def compiled(functions):
        return {
            name: torch.compile(function, dynamic=False, fullgraph=True)
            for name, function in functions.items()
        }

    works = logits_works(compiled(PLAIN), "the same work: plain torch, compiled for this shape")
    if device.type == "cuda":  # compiling for a CPU takes long, and its speed says nothing here
        works |= linear_works(
            compiled(on_hidden(PLAIN)),
            PRODUCTS,
            "the same work, the fewest products; all logits in memory, what follows them compiled "
            "for this shape",
        )
    return works


def load_fastkl(device):
    """Load this package.

    The entropy comes with a log-probability of each row, which costs one element. From hidden
    states the logits of all models are kept where they take 2 GiB at the most; else "stats", "grpo"
    and "logprob" compute them again in backward.
    """
    import fastkl

    functions = {
        "kl_divergence": lambda p, q: (fastkl.kl_divergence(p, q),),
        "mean_kl": lambda p, q: (fastkl.kl_divergence(p, q).mean(),),
        "token_stats": lambda p, tokens, q: tuple(fastkl.token_stats(p, tokens, q)),
        "logprob": lambda p, tokens: (fastkl.selective_log_softmax(p, tokens),),
        "logprob_entropy": lambda p, tokens: fastkl.token_stats(p, tokens)[:2],
    }
    works = logits_works(functions, "the same work")
    works["entropy"] = Work(
        lambda i: (fastkl.token_stats(i.p, i.tokens).entropy,),
        "token_stats without a reference: a log-probability comes with it",
    )

    def kl(reduction):
        options = {"reduction": reduction}
        return lambda h, w, rh, rw, tokens: (fastkl.linear_kl_divergence(h, w, rh, rw, **options),)

    summed = "the same work; {}; the weight's gradient summed in float32"
    once = summed.format("logits of a chunk at a time, gradient with the value")
    linear = {"kl_divergence": kl("none"), "mean_kl": kl("mean")}
    works |= linear_works(linear, {mode: PRODUCTS[mode] for mode in LOSSES}, once)
    return works | _from_stats(
        summed.format("logits above 2 GiB are computed again, for 2 products more, or 1")
    )


def load_kept(device):
    return _from_stats("the same work, the fewest products; all logits in memory", recompute=False)


def _from_stats(note, **options):
    """Make the modes that need more than a KL; options: of fastkl.linear_token_stats."""
    import fastkl

    def stats(h, w, rh, rw, tokens):
        return tuple(fastkl.linear_token_stats(h, w, tokens, rh, rw, **options))

    def logprob(h, w, rh, rw, tokens):
        return (fastkl.linear_token_stats(h, w, tokens, **options).logprob,)

    functions = {
        "token_stats": stats,
        "logprob": logprob,
        "logprob_kl": lambda *inputs: stats(*inputs)[:4:3],
    }
    products = {mode: PRODUCTS[mode] for mode in ("stats", "grpo", "logprob")}
    return linear_works(functions, products, note)


def load_one_launch(device):
    """Load this package with the mean KL and its gradient in one launch (kernels/row_fused.py).

    Its backward alone is a scaling at the first call and computes the gradient at later ones, so
    only forward and both are comparable.
    """
    if device.type != "cuda":
        raise RuntimeError("row_fused is for a GPU")
    import fastkl
    from fastkl.kernels import config

    config.fuses = lambda arch: True
    return logits_works(
        {"mean_kl": lambda p, q: (fastkl.kl_divergence(p, q, reduction="mean"),)},
        "value and gradient in one launch; backward alone repeats the gradient",
    )


def load_torch_chunked(device):
    """Load plain torch under torch.utils.checkpoint, 2048 tokens at a time, as trainers do.

    The logits are computed again in backward, and the gradient of the weight is summed over the
    chunks in the weight's own type.
    """

    def chunked(function):
        def run(hidden, weight, ref_hidden, ref_weight, tokens):
            options = {"use_reentrant": False, "preserve_rng_state": False}
            chunks = zip(*(x.split(CHUNK) for x in (hidden, ref_hidden, tokens)), strict=True)
            found = [
                checkpoint(function, some, weight, ref_some, ref_weight, chosen, **options)
                for some, ref_some, chosen in chunks
            ]
            return tuple(torch.cat(fields) for fields in zip(*found, strict=True))

        return run

    per_token = ("kl_divergence", "token_stats", "logprob", "logprob_kl")
    functions = {
        name: chunked(function) for name, function in on_hidden(PLAIN).items() if name in per_token
    }
    functions["mean_kl"] = lambda *inputs: (functions["kl_divergence"](*inputs)[0].mean(),)
    products = {
        "forward": 2,
        "loss": 6,
        "frozen": 5,
        "stats": 6,
        "grpo": 6,
        "distillation": 6,
        "logprob": 4,
    }
    again = f"the same work; logits of {CHUNK} tokens at a time, again in backward"
    return linear_works(functions, products, f"{again}; the weight's gradient summed in its type")


def load_kl_div(device):
    note = "the same work: two float32 log_softmax by torch first, writes [N, V] of losses"
    return _kl_div(log_softmax, note, log_target=True)


def load_kl_div_probabilities(device):
    return _kl_div(
        lambda p: F.softmax(p, -1, dtype=torch.promote_types(p.dtype, torch.float32)),
        "more work: the logarithm of a float32 softmax is taken again; writes [N, V] of losses",
    )


def _kl_div(target, note, **options):
    """Make the two KLs of F.kl_div; target: of the logits of P, as F.kl_div takes it."""

    def losses(p, q, reduction):
        pair = (log_softmax(q).flatten(0, -2), target(p).flatten(0, -2))
        return F.kl_div(*pair, reduction=reduction, **options)

    functions = {
        "kl_divergence": lambda p, q: (losses(p, q, "none").sum(-1).view(p.shape[:-1]),),
        "mean_kl": lambda p, q: (losses(p, q, "batchmean"),),
    }
    return logits_works(functions, note)


def load_categorical(device):
    from torch.distributions import Categorical, kl_divergence

    def distribution(logits):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return Categorical(logits=logits, validate_args=False)

    def kl(p, q):
        return kl_divergence(distribution(p), distribution(q))

    functions = {
        "kl_divergence": lambda p, q: (kl(p, q),),
        "mean_kl": lambda p, q: (kl(p, q).mean(),),
    }
    note = "float32 copies of the logits, normalised, their softmax, tests for infinities in [N, V]"
    return logits_works(functions, f"more work: {note}")


# The providers that have a KL from logits, in the order in which they are measured.
LOADERS = {
    "fastkl": load_fastkl,
    "torch": load_torch,
    "torch.compile": load_torch_compile,
    "F.kl_div": load_kl_div,
    "F.kl_div on probabilities": load_kl_div_probabilities,
    "Categorical": load_categorical,
    **PEERS,
}
ALL_LOADERS = {
    **LOADERS,
    "fastkl, one launch": load_one_launch,
    "fastkl, logits kept": load_kept,
    "torch chunked": load_torch_chunked,
    **LINEAR_PEERS,
}


def own(text):
    module, _, name = text.partition(":")
    try:
        return text, getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"expected package.module:function, got {text!r} ({error}); name a function of the "
            "device that returns {operation: function of the inputs}"
        ) from None


def load_providers(device, names=None, loaders=LOADERS):
    providers = []
    for name, load in loaders.items():
        if names is not None and name not in names:
            continue
        try:
            providers.append(Provider(name, load(device)))
        except Exception as error:  # a peer may fail in any way when imported: that is a row
            providers.append(Provider(name, missing=f"{type(error).__name__}: {error}"))
    return providers
