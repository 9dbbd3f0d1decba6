"""Measure the accuracy of a KL from hidden states and of its gradients.

    python -m benchmarks.linear_accuracy [--json FILE] [--device cuda]

Compares chunks of 16-bit logits, of float32 logits, and plain torch. Errors are relative, in L2
norm over all tokens, against float64 on the same 16-bit inputs. A 16-bit logit is rounded by up to
2^-9 (bfloat16) or 2^-12 (float16) relative, independently in policy and reference: this noise has a
KL that hides a smaller one.
"""

import itertools
import sys
from functools import partial

import torch
import torch.nn.functional as F

import fastkl
from benchmarks import cases, work
from benchmarks.record import command_line, gather, provenance
from fastkl import testing

NOISES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # between the hidden states of policy and reference
SHAPE = {"tokens": 64, "hidden": 512, "vocabulary": 32000}
WAYS = {
    "fastkl": fastkl.linear_kl_divergence,
    "fastkl, logits_dtype=float32": partial(
        fastkl.linear_kl_divergence, logits_dtype=torch.float32
    ),
    "torch": lambda h, w, r, v: work.plain_kl_divergence(F.linear(h, w), F.linear(r, v))[0],
}


def accuracy(device, dtypes=("bf16", "fp16", "fp32"), shape=SHAPE, noises=NOISES):
    """Yield {"dtype", "kl", "ways": {name: {"kl", "hidden", "weight", "bias"}}}: relative errors,
    and the mean error in nats.
    """
    tokens, hidden, vocabulary = shape.values()
    for dtype, size in itertools.product(dtypes, noises):
        random = {"generator": torch.Generator(device).manual_seed(0), "device": device}
        states, noise = (torch.randn(tokens, hidden, **random) for _ in range(2))
        # Logits are N(0, 3²), as in the other figures.
        weight = 3 / hidden**0.5 * torch.randn(vocabulary, hidden, **random)
        inputs = [x.to(cases.DTYPES[dtype]) for x in (states, weight, states + size * noise)]
        exact = _outcome(
            lambda h, w, r, v: testing.truth(F.linear(h, w), F.linear(r, v)).kl,
            *(value.double() for value in inputs),
        )
        ways = {}
        for name, function in WAYS.items():
            pairs = zip(("kl", "hidden", "weight"), _outcome(function, *inputs), exact, strict=True)
            off = {what: (result.double() - true, true) for what, result, true in pairs}
            ways[name] = {what: (e.norm() / true.norm()).item() for what, (e, true) in off.items()}
            ways[name]["bias"] = off["kl"][0].mean().item()
        yield {"dtype": dtype, "kl": exact[0].mean().item(), "ways": ways}


def _outcome(function, hidden, weight, ref_hidden):
    leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
    kl = function(*leaves, ref_hidden, weight.detach())
    return kl.detach(), *torch.autograd.grad(kl.sum(), leaves)


def main(argv=None):
    parser = command_line("linear_accuracy", __doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", *["cuda"] * torch.cuda.is_available()])
    arguments = parser.parse_args(argv)
    data = {**provenance("linear_accuracy", argv), "shape": SHAPE}
    gather(arguments.json, data, accuracy(arguments.device or "cpu"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
