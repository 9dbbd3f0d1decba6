"""The call sites of Megatron-LM beside the same calls on whole logits and weights: gloo groups of
one and of two processes, without Megatron-LM.
"""

import os
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.nn.functional import pad

import fastkl
from fastkl.integrations import megatron

VOCABULARY, WIDTH, S, B, H = 97, 128, 6, 2, 8


def results(function: Callable, *leaves: torch.Tensor) -> list[torch.Tensor]:
    """Return all results, and the gradients of a sum in which each token has its own factor."""
    leaves = [value.detach().clone().requires_grad_() for value in leaves]
    found = function(*leaves)
    found = [x for x in (found if isinstance(found, tuple) else [found]) if x is not None]
    upstream = [torch.arange(1.0, x.numel() + 1).view(x.shape) for x in found]
    return [*found, *torch.autograd.grad(found, leaves, upstream)]


def compare(group: dist.ProcessGroup) -> None:
    """Compare this rank's results with those of whole logits, hidden states and weights."""
    rank, ranks, generator = group.rank(), group.size(), torch.Generator().manual_seed(0)
    width, part = WIDTH // ranks, slice(rank * S // ranks, (rank + 1) * S // ranks)
    tokens = torch.randint(VOCABULARY, (B, S), generator=generator).t()
    options = {"mask": torch.arange(S * B).view(S, B) % 5 != 3, "temperature": 0.7}
    same = {**options, "group": group, "vocab_size": VOCABULARY}

    def mine(value: torch.Tensor, fill: float, dim: int = 0, width: int = width) -> torch.Tensor:
        padded = pad(value.movedim(dim, -1), (0, ranks * width - VOCABULARY), value=fill)
        return padded.movedim(-1, dim).narrow(dim, rank * width, width)

    def close(found: list[torch.Tensor], exact: list[torch.Tensor]) -> None:
        for value, expected in zip(found, exact, strict=True):
            limit = 2e-6 * float(expected.detach().abs().max())
            torch.testing.assert_close(value, expected, rtol=2e-5, atol=limit)

    models = torch.randn(2, S, B, VOCABULARY, generator=generator) * 2
    # The policy alone; a reference; one that is padded more.
    for widths in ([width], [width, width], [width, width + 16]):
        whole, split = (
            lambda p, *q, f=f, options=given: f(p, tokens, *q, **options)
            for f, given in (
                (fastkl.token_stats, options),
                (megatron.vocab_parallel_token_stats, same),
            )
        )
        exact = results(whole, *models[: len(widths)])
        gradients = [mine(x, 0.0, 2, w) for x, w in zip(exact[-len(widths) :], widths, strict=True)]
        logits = [mine(x, torch.nan, 2, w) for x, w in zip(models, widths, strict=False)]
        close(results(split, *logits), exact[: -len(widths)] + gradients)
    (h, r), weights = (
        torch.randn(2, n, B if n == S else 1, H, generator=generator) for n in (S, VOCABULARY)
    )
    # One weight for both models, then one for each.
    for count, sequence_parallel in ((1, False), (1, True), (2, False), (2, True)):
        held = part if sequence_parallel else slice(0, S)
        w, *v = weights[:count, :, 0]
        for reduction in ("none", "mean"):
            how = {"reduction": reduction}
            whole = partial(fastkl.linear_kl_divergence, **options, **how)
            value, *exact = results(whole, h, w, r, *v)
            exact[::2] = [x[held] for x in exact[::2]]
            exact[1::2] = [mine(x, 0.0) for x in exact[1::2]]
            how["sequence_parallel"] = sequence_parallel
            split = partial(megatron.vocab_parallel_linear_kl, **same, **how)
            found = results(split, h[held], mine(w, 9.0), r[held], *(mine(x, 9.0) for x in v))
            close(found, [value, *exact])


def main(rank: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.set_num_threads(1)
    compare(dist.group.WORLD)
    dist.barrier()
    # Threads of gloo that still run abort an interpreter that exits.
    os._exit(0)


def test_one_process(request) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    request.addfinalizer(dist.destroy_process_group)
    compare(dist.group.WORLD)


def test_two_processes(tmp_path) -> None:
    torch.multiprocessing.spawn(main, (str(tmp_path),), nprocs=2)
