"""List the providers: each offers operations on the same tensors, or a reason why not.

An operation is a function of the case's inputs that returns a tuple of tensors. On logits
(cases.make_inputs): the keys of cases.OUTPUTS. From hidden states
(linear_cases.make_linear_inputs): "linear_" and a mode of work.PRODUCTS. A provider is a loader, a
function of the device that returns {operation: Work} and raises any exception if it cannot be used;
the reason becomes a row of the results. Other packages are in peers.py. Name your own loader on the
command line: --provider package.module:function.
"""

import argparse
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import distributions
from torch.utils.checkpoint import checkpoint

import fastkl
from benchmarks.peers import LINEAR_PEERS, PEERS
from benchmarks.work import (
    FAMILY,
    JS_BETA,
    PLAIN,
    PRODUCTS,
    TOPK,
    linear_works,
    log_softmax,
    logits_works,
    on_hidden,
)

LOSSES = ("forward", "loss", "frozen", "distillation", "js")
READ_TWICE = ("js_divergence", "skew_kl_divergence", "total_variation", "mean_js")
CHUNK = 2048  # tokens: each chunk adds to the whole weight gradient, so larger is faster


@dataclass(frozen=True)
class Provider:
    """A named implementation; missing: the reason if it offers nothing here."""

    name: str
    operations: dict[str, Callable] = field(default_factory=dict)
    missing: str | None = None

    def why_not(self, operation):
        absent = None if operation in self.operations else f"{self.name} has no {operation}"
        return self.missing or absent

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
    def compiled(functions):
        options = {"dynamic": False, "fullgraph": True}
        return {name: torch.compile(function, **options) for name, function in functions.items()}

    works = logits_works(compiled(PLAIN), "the same work: plain torch, compiled for this shape")
    if device.type == "cuda":  # CPU compilation is slow and its speed irrelevant here
        works |= linear_works(
            compiled(on_hidden(PLAIN)),
            PRODUCTS,
            "the same work, the fewest products; all logits in memory, what follows them compiled "
            "for this shape",
        )
    return works


def load_fastkl(device):
    """Load this package.

    The entropy is computed with a log-probability per row, which costs one element. From hidden
    states the logits of all models are kept if they take at most 2 GiB; otherwise "stats", "grpo"
    and "logprob" recompute them in backward.
    """
    functions = {
        "kl_divergence": lambda p, q, tokens: (fastkl.kl_divergence(p, q),),
        "mean_kl": lambda p, q, tokens: (fastkl.kl_divergence(p, q).mean(),),
        "token_stats": lambda p, q, tokens: fastkl.token_stats(p, tokens, q)[:5],
        "logprob": lambda p, q, tokens: (fastkl.selective_log_softmax(p, tokens),),
        "logprob_entropy": lambda p, q, tokens: fastkl.token_stats(p, tokens)[:2],
        "entropy": lambda p, q, tokens: (fastkl.entropy_from_logits(p),),
        **{name: _divergence(name) for name in FAMILY if name != TOPK},
        "mean_js": _divergence("js_divergence", reduction="mean"),
        TOPK: lambda p, q, tokens: (fastkl.topk_kl_divergence(q, p, tokens),),
    }
    notes = dict.fromkeys(READ_TWICE, "the same work; forward reads the logits twice")

    def mean_js(h, w, rh, rw, tokens):
        options = {"divergence": "js", "beta": JS_BETA, "reduction": "mean"}
        return (fastkl.linear_divergence(h, w, rh, rw, **options),)

    def kl(reduction):
        options = {"reduction": reduction}
        return lambda h, w, rh, rw, tokens: (fastkl.linear_kl_divergence(h, w, rh, rw, **options),)

    summed = "the same work; {}; the weight's gradient summed in float32"
    once = summed.format("logits of a chunk at a time, gradient with the value")
    again = summed.format("logits above 2 GiB are computed again, for 2 products more, or 1")
    linear = {"kl_divergence": kl("none"), "mean_kl": kl("mean"), "mean_js": mean_js}
    return {
        **logits_works(functions, "the same work", **notes),
        **linear_works(linear, {mode: PRODUCTS[mode] for mode in LOSSES}, once),
        **_from_stats(again),
    }


def _divergence(name, **options):
    kind, share = FAMILY[name]
    options |= {"js": {"beta": share}, "skew_kl": {"alpha": share}, "renyi": {"alpha": share}}.get(
        kind, {}
    )
    return lambda p, q, tokens: (getattr(fastkl, name)(p, q, **options),)


def _from_stats(note, **options):
    """Make the modes that need more than a KL; options: of fastkl.linear_token_stats."""

    def stats(h, w, rh, rw, tokens):
        return fastkl.linear_token_stats(h, w, tokens, rh, rw, **options)[:5]

    functions = {
        "token_stats": stats,
        "logprob": lambda h, w, rh, rw, tokens: stats(h, w, None, None, tokens)[:1],
        "logprob_kl": lambda *inputs: stats(*inputs)[:4:3],
    }
    products = {mode: PRODUCTS[mode] for mode in ("stats", "grpo", "logprob")}
    return linear_works(functions, products, note)


def load_one_launch(device):
    """Load this package with the mean KL and its gradient in one launch (kernels/row_fused.py).
    Backward alone only scales at the first call and computes the gradient at later calls, so only
    forward and both are comparable.
    """
    if device.type != "cuda":
        raise RuntimeError("row_fused is for a GPU")
    from fastkl.kernels import config

    config.fuses = lambda arch: True
    return logits_works(
        {"mean_kl": lambda p, q, tokens: (fastkl.kl_divergence(p, q, reduction="mean"),)},
        "value and gradient in one launch; backward alone repeats the gradient",
    )


def load_torch_chunked(device):
    """Load plain torch under torch.utils.checkpoint, 2048 tokens at a time, as trainers do. The
    logits are recomputed in backward, and the gradient of the weight is summed over the chunks in
    the weight's dtype.
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

    functions = {name: chunked(function) for name, function in on_hidden(PLAIN).items()}
    functions["mean_kl"] = lambda *inputs: (functions["kl_divergence"](*inputs)[0].mean(),)
    functions["mean_js"] = lambda *inputs: (functions["js_divergence"](*inputs)[0].mean(),)
    products = {**dict.fromkeys(("loss", "stats", "grpo", "distillation", "js"), 6), "frozen": 5}
    again = f"the same work; logits of {CHUNK} tokens at a time, again in backward"
    summed = f"{again}; the weight's gradient summed in its type"
    return linear_works(functions, {"forward": 2, "logprob": 4, **products}, summed)


def load_kl_div(device):
    def losses(p, q, reduction):
        pair = (log_softmax(x).flatten(0, -2) for x in (q, p))
        return F.kl_div(*pair, reduction=reduction, log_target=True)

    functions = {
        "kl_divergence": lambda p, q, tokens: (losses(p, q, "none").sum(-1).view(p.shape[:-1]),),
        "mean_kl": lambda p, q, tokens: (losses(p, q, "batchmean"),),
    }
    note = "the same work: two float32 log_softmax by torch first, writes [N, V] of losses"
    return logits_works(functions, note)


def load_categorical(device):
    def distribution(logits):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return distributions.Categorical(logits=logits, validate_args=False)

    def kl(p, q, tokens):
        return distributions.kl_divergence(distribution(p), distribution(q))

    functions = {
        "kl_divergence": lambda *inputs: (kl(*inputs),),
        "mean_kl": lambda *inputs: (kl(*inputs).mean(),),
    }
    note = "float32 copies of the logits, normalised, their softmax, tests for infinities in [N, V]"
    return logits_works(functions, f"more work: {note}")


# Providers of a KL from logits, in the order of measurement.
LOADERS = {
    "fastkl": load_fastkl,
    "torch": load_torch,
    "torch.compile": load_torch_compile,
    "F.kl_div": load_kl_div,
    "Categorical": load_categorical,
    **PEERS,
}
ALL_LOADERS = {
    **LOADERS,
    "fastkl, one launch": load_one_launch,
    "fastkl, logits kept": lambda device: _from_stats(
        "the same work, the fewest products; all logits in memory", recompute=False
    ),
    "torch chunked": load_torch_chunked,
    **LINEAR_PEERS,
}


def own(text):
    try:
        return text, pkgutil.resolve_name(text)
    except (ImportError, AttributeError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"expected package.module:function, got {text!r} ({error}); name a function of the "
            "device that returns {operation: function of the inputs}"
        ) from None


def load_providers(device, names=None, loaders=LOADERS):
    return [load(n, one, device) for n, one in loaders.items() if names is None or n in names]


def load(name, loader, device):
    try:
        return Provider(name, loader(device))
    except Exception as error:  # a peer may fail in any way at import: that is a row
        return Provider(name, missing=f"{type(error).__name__}: {error}")
