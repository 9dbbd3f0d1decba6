"""Prints a hash of the results and gradients of fixed inputs, a line for each function, type and
shape.

    python -m benchmarks.bits                       the reference on a CPU
    TRITON_INTERPRET=1 python -m benchmarks.bits    the kernels, interpreted

Two checkouts that print the same lines on one machine compute the same bits.
"""

import functools
import hashlib
import itertools
import os
import warnings

import torch

import fastkl

ROWS, HIDDEN = 6, 16
VOCABULARIES = (7, 1003, 4096)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def inputs(vocabulary, dtype):
    """Logits, hidden states and weights of both models, tokens and a mask: near rows, far rows,
    shared and one-sided holes.
    """
    generator = torch.Generator().manual_seed(vocabulary)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    p = 3 * normal(ROWS, vocabulary)
    q = p + torch.tensor([0.0, 1e-3, 0.1, 1.0, 10.0, 0.3])[:, None] * normal(ROWS, vocabulary)
    p[3, 0] = q[3, 0] = -torch.inf
    q[5, 1] = torch.finfo(torch.float16).min
    leaves = (p, q, normal(ROWS, HIDDEN), normal(vocabulary, HIDDEN), normal(ROWS, HIDDEN))
    leaves = [value.to(dtype).requires_grad_() for value in leaves]
    tokens = torch.randint(vocabulary, (ROWS,), generator=generator)
    return leaves, tokens, torch.arange(ROWS) != 2


def functions(leaves, tokens, mask):
    """{name: function that returns tensors}."""
    p, q, hidden, weight, ref_hidden = leaves
    temperature = torch.linspace(0.7, 1.5, ROWS)
    linear = functools.partial(
        fastkl.linear_kl_divergence, hidden, weight, ref_hidden, weight.detach(), mask=mask
    )
    return {
        "kl_divergence": lambda: [fastkl.kl_divergence(p, q, mask)],
        "kl_divergence, both learn": lambda: [fastkl.kl_divergence(p, q, temperature=temperature)],
        "kl_divergence, mean": lambda: [
            fastkl.kl_divergence(p, q.detach(), mask, temperature=1.3, reduction="mean")
        ],
        "token_stats": lambda: fastkl.token_stats(p, tokens, q, mask=mask),
        "token_stats, policy alone": lambda: fastkl.token_stats(p, tokens, temperature=temperature)[
            :2
        ],
        "selective_log_softmax": lambda: [fastkl.selective_log_softmax(p, tokens)],
        "KLPenalty": lambda: [
            fastkl.KLPenalty(0.1, direction="reference||policy")(p, q.detach(), mask)
        ],
        "linear_kl_divergence": lambda: [linear()],
        "linear_kl_divergence, sum": lambda: [linear(softcap=5.0, reduction="sum")],
        "linear_token_stats": lambda: fastkl.linear_token_stats(
            hidden, weight, tokens, ref_hidden, mask=mask
        ),
    }


def digest(function, leaves):
    """A hash of the bits of a function's results and of its gradients for upstream gradients that
    differ.
    """
    results = [result for result in function() if result is not None]
    upstream = [
        torch.linspace(-1.0, 2.0, result.numel()).view(result.shape) + 0.25 for result in results
    ]
    gradients = torch.autograd.grad(results, leaves, upstream, allow_unused=True)
    bits = hashlib.sha256()
    for value in (*results, *gradients):
        if value is not None:
            bits.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return bits.hexdigest()[:16]


def main():
    """Print the hashes."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the interpreter, about infinities
    backend = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "reference"
    with fastkl.use_backend(backend):
        for (name, dtype), vocabulary in itertools.product(DTYPES.items(), VOCABULARIES):
            leaves, tokens, mask = inputs(vocabulary, dtype)
            for function, call in functions(leaves, tokens, mask).items():
                print(digest(call, leaves), f"{function}, {name}, V = {vocabulary}", flush=True)


if __name__ == "__main__":
    main()
