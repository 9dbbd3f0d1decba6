"""Time kl_divergence and token_stats against plain torch on this machine, with pytest-benchmark.

python -m pytest benchmarks/bench_rows.py
"""

import pytest
import torch

import fastkl
from benchmarks.work import plain_kl_divergence, plain_token_stats
from fastkl import testing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FUNCTIONS = {
    "kl_divergence, fastkl": lambda p, q, tokens: fastkl.kl_divergence(p, q),
    "kl_divergence, torch": lambda p, q, tokens: plain_kl_divergence(p, q)[0],
    "token_stats, fastkl": lambda p, q, tokens: fastkl.token_stats(p, tokens, q).kl,
    "token_stats, torch": lambda p, q, tokens: plain_token_stats(p, q, tokens)[3],
}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows(benchmark, name, backward):
    p, q = testing.pair("normal3", 64, 32000, 0.1, dtype=torch.bfloat16, device=DEVICE)
    p.requires_grad_(backward)
    tokens = torch.zeros(64, dtype=torch.int64, device=DEVICE)
    benchmark.group = f"{name.partition(',')[0]}, {'both' if backward else 'forward'}"

    def run():
        kl = FUNCTIONS[name](p, q, tokens)
        if backward:
            torch.autograd.grad(kl.sum(), p)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    run()
    benchmark(run)
