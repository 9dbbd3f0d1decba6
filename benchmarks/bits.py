"""Print hashes of results and gradients of fixed inputs, for each function, type and shape.

    python -m benchmarks.bits                       the reference on a CPU
    TRITON_INTERPRET=1 python -m benchmarks.bits    the kernels, interpreted

Two checkouts that print the same lines on one machine compute the same bits.
"""

import hashlib
import itertools
import os
import warnings
from functools import partial

import torch

import fastkl
from benchmarks.cases import DTYPES
from fastkl import testing

ROWS, HIDDEN = 6, 16
VOCABULARIES = (7, 1003, 4096)


def inputs(vocabulary, dtype):
    """Make logits, hidden states and weights of both models, and tokens: near rows, far rows,
    shared and one-sided holes."""
    generator = torch.Generator().manual_seed(vocabulary)
    normal = partial(torch.randn, generator=generator)
    p = 3 * normal(ROWS, vocabulary)
    q = p + torch.tensor([0.0, 1e-3, 0.1, 1.0, 10.0, 0.3])[:, None] * normal(ROWS, vocabulary)
    p[3, 0] = q[3, 0] = -torch.inf
    q[5, 1] = torch.finfo(torch.float16).min
    leaves = (p, q, normal(ROWS, HIDDEN), normal(vocabulary, HIDDEN), normal(ROWS, HIDDEN))
    leaves = [value.to(dtype).requires_grad_() for value in leaves]
    return leaves, torch.randint(vocabulary, (ROWS,), generator=generator)


def functions(leaves, tokens):
    p, q, hidden, weight, ref = leaves
    f, mask, temperature = fastkl, torch.arange(ROWS) != 2, torch.linspace(0.7, 1.5, ROWS)
    to_mean = {"temperature": 1.3, "reduction": "mean"}
    pair = (hidden, weight, ref, weight.detach())
    penalty = f.KLPenalty(0.1, direction="reference||policy")
    return {
        "kl_divergence": lambda: f.kl_divergence(p, q, mask),
        "kl_divergence, both learn": lambda: f.kl_divergence(p, q, temperature=temperature),
        "kl_divergence, mean": lambda: f.kl_divergence(p, q.detach(), mask, **to_mean),
        "token_stats": lambda: f.token_stats(p, tokens, q, mask=mask),
        "token_stats, policy alone": lambda: f.token_stats(p, tokens, temperature=temperature)[:2],
        "selective_log_softmax": lambda: f.selective_log_softmax(p, tokens),
        "KLPenalty": lambda: penalty(p, q.detach(), mask),
        "linear_kl_divergence": lambda: f.linear_kl_divergence(*pair, mask=mask),
        "linear_kl_divergence, sum": lambda: f.linear_kl_divergence(
            *pair, mask=mask, softcap=5.0, reduction="sum"
        ),
        "linear_token_stats": lambda: f.linear_token_stats(hidden, weight, tokens, ref, mask=mask),
    }


def digest(function, leaves):
    """Return a hash of the bits of a function's results, and of its gradients for upstream
    gradients that differ."""
    found = function()
    found = [x for x in (found if isinstance(found, tuple) else (found,)) if x is not None]
    upstream = [torch.linspace(-1.0, 2.0, x.numel()).view(x.shape) + 0.25 for x in found]
    gradients = torch.autograd.grad(found, leaves, upstream, allow_unused=True)
    values = [testing.bits(x).numpy() for x in (*found, *gradients) if x is not None]
    return hashlib.sha256(b"".join(value.tobytes() for value in values)).hexdigest()[:16]


def main():
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the interpreter, about infinities
    with fastkl.use_backend("triton" if os.environ.get("TRITON_INTERPRET") == "1" else "reference"):
        for (name, dtype), vocabulary in itertools.product(DTYPES.items(), VOCABULARIES):
            leaves, tokens = inputs(vocabulary, dtype)
            for function, call in functions(leaves, tokens).items():
                print(digest(call, leaves), f"{function}, {name}, V = {vocabulary}", flush=True)


if __name__ == "__main__":
    main()
