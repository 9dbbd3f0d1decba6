"""How many digits of a KL from hidden states survive, and of its gradients: logits of a chunk in 16
bits, in float32, and plain torch.

    python3 -m benchmarks.linear_accuracy [--json FILE] [--device cuda]

Errors are relative, in L2 norm over all tokens, against float64 of the very same 16-bit inputs. A
16-bit logit is rounded by up to 2^-9 (bfloat16) or 2^-12 (float16) of itself, in policy and
reference independently: a noise of its own KL, below which the true one is not seen.
"""

import argparse
import sys

import torch
import torch.nn.functional as F

import fastkl
from benchmarks.cases import DTYPES
from benchmarks.record import output_file, provenance, write_json

SIZES = (
    1e-4,
    1e-3,
    1e-2,
    1e-1,
    1.0,
)  # of the noise between the hidden states of policy and reference
SHAPE = {"tokens": 64, "hidden": 512, "vocabulary": 32000}


def plain_kl(hidden, weight, ref_hidden):
    """KL per token the usual way: 16-bit products, float32 softmax."""
    log_p, log_q = (
        F.linear(states, head).float().log_softmax(-1)
        for states, head in ((hidden, weight), (ref_hidden, weight.detach()))
    )
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def exact_kl(hidden, weight, ref_hidden):
    """KL per token in float64, in a form that does not cancel."""
    return fastkl.kl_divergence(F.linear(hidden, weight), F.linear(ref_hidden, weight.detach()))


WAYS = {
    "fastkl": lambda h, w, r: fastkl.linear_kl_divergence(h, w, r, w.detach()),
    "fastkl, logits_dtype=float32": lambda h, w, r: fastkl.linear_kl_divergence(
        h, w, r, w.detach(), logits_dtype=torch.float32
    ),
    "torch": plain_kl,
}


def outcome(function, hidden, weight, ref_hidden):
    """(KL per token, gradient of its sum to hidden, to weight)."""
    leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
    kl = function(*leaves, ref_hidden)
    return kl.detach(), *torch.autograd.grad(kl.sum(), leaves)


def accuracy(dtype, device, *, tokens, hidden, vocabulary, sizes=SIZES):
    """Yields {"dtype", "kl", "ways": {name: {"kl", "hidden", "weight", "bias"}}}: relative errors,
    and the mean error in nats.
    """
    generator = torch.Generator(device).manual_seed(0)
    states, noise = (
        torch.randn(tokens, hidden, generator=generator, device=device) for _ in range(2)
    )
    # Logits of N(0, 3²), as in the other accuracy figures.
    weight = (
        3 / hidden**0.5 * torch.randn(vocabulary, hidden, generator=generator, device=device)
    ).to(DTYPES[dtype])
    for size in sizes:
        inputs = (states.to(DTYPES[dtype]), weight, (states + size * noise).to(DTYPES[dtype]))
        exact = outcome(exact_kl, *(value.double() for value in inputs))
        ways = {}
        for name, function in WAYS.items():
            results = outcome(function, *inputs)
            relative = [
                ((got.double() - truth).norm() / truth.norm()).item()
                for got, truth in zip(results, exact, strict=True)
            ]
            ways[name] = {
                **dict(zip(("kl", "hidden", "weight"), relative, strict=True)),
                "bias": (results[0].double() - exact[0]).mean().item(),
            }
        yield {"dtype": dtype, "kl": exact[0].mean().item(), "ways": ways}


def summary(record):
    """A few lines of text for one size of the KL."""
    lines = [f"{record['dtype']}, mean KL {record['kl']:.1e} nats"]
    for name, error in record["ways"].items():
        lines.append(
            f"  {name:<30} KL {error['kl']:.0e} (mean off by {error['bias']:+.0e} nats)   "
            f"gradient to hidden {error['hidden']:.0e}, to weight {error['weight']:.0e}"
        )
    return "\n".join(lines)


def main(argv=None):
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.linear_accuracy", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write the records to FILE"
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cpu or cuda (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected cpu where there is no CUDA GPU, got cuda")
    records = []
    # float64 is the truth here, and runs on the reference everywhere.
    with fastkl.use_backend(None):
        for dtype in ("bf16", "fp16", "fp32"):
            for record in accuracy(dtype, torch.device(arguments.device), **SHAPE):
                records.append(record)
                print(summary(record), flush=True)
    if arguments.json:
        command = "python3 -m benchmarks.linear_accuracy " + " ".join(
            sys.argv[1:] if argv is None else argv
        )
        write_json(arguments.json, {**provenance(command), "shape": SHAPE, "records": records})
    return 0


if __name__ == "__main__":
    sys.exit(main())
