"""Functions on hidden states with a sharded Head, beside the whole vocabulary."""

import dataclasses
from collections.abc import Callable

import torch
import torch.distributed as dist
from parallel_cases import Shard, case, columns

import fastkl

LINEAR: dict[str, Callable] = {
    "mean": lambda h, w, r, c, **more: fastkl.linear_kl_divergence(
        h, w, r, weights=c.temperature, reduction="mean", mask=c.mask, chunk_size=12, **more
    ),
    "none": lambda h, w, r, c, **more: fastkl.linear_kl_divergence(
        h, w, r, temperature=c.temperature, mask=c.mask, chunk_size=12, recompute=True, **more
    ),
    "stats": lambda h, w, r, c, **more: fastkl.linear_token_stats(
        h, w, c.tokens, r, mask=c.mask, **more
    ),
    "jeffreys": lambda h, w, r, c, **more: fastkl.linear_divergence(
        h, w, r, divergence="jeffreys", reduction="sum", **more
    ),
    "js": lambda h, w, r, c, **more: fastkl.linear_divergence(
        h, w, r, mask=c.mask, divergence="js", reduction="mean", chunk_size=12, **more
    ),
    "penalty": lambda h, w, r, c, **more: fastkl.LinearKLPenalty(0.3)(h, w, r, mask=c.mask),
    "distillation": lambda h, w, r, c: fastkl.LinearDistillationLoss()(
        h, w, r, None, c.tokens.where(c.mask, -100)
    ),
    "distillation by the JSD": lambda h, w, r, c: fastkl.LinearDistillationLoss("js", beta=0.3)(
        h, w, r, None, c.tokens.where(c.mask, -100)
    ),
}


def linear(group: dist.ProcessGroup, backend: str, layout: str, vocabulary: int) -> None:
    """Compare the functions on hidden states with one process: tokens in parts of any length."""
    rank, ranks = group.rank(), group.size()
    width = -(-vocabulary // ranks) + (ranks if vocabulary % 2 else 0)
    lengths = [7, 0, 13, 3] if ranks == 4 else [5, 2]
    rows, before = sum(lengths), sum(lengths[:rank])
    generator = torch.Generator().manual_seed(1)
    hidden, other = torch.randn(2, rows, 6, generator=generator)
    weight = torch.randn(vocabulary, 6, generator=generator)
    bias = torch.randn(vocabulary, generator=generator)
    c = case(vocabulary, rows, torch.float32, 0.1, width)
    shard = Shard.megatron(group, width, vocabulary)
    shard = dataclasses.replace(shard, hidden_layout=layout)
    own = columns(shard, width)
    held = slice(shard.start, shard.start + own)
    mine = slice(before, before + lengths[rank]) if layout == "sequence" else slice(0, rows)

    def run(function: Callable, part: slice, held: slice, extra: int, shard: Shard | None) -> list:
        leaves = [hidden[part].clone(), weight[held].clone(), bias[held].clone()]
        # Rows of padding hold anything.
        leaves[1:] = [
            torch.cat([x, x.new_full((extra, *x.shape[1:]), torch.nan)]) for x in leaves[1:]
        ]
        leaves = [x.requires_grad_() for x in leaves]
        head = fastkl.Head(*leaves[1:], softcap=3.0, shard=shard)
        found = function(leaves[0], head, other[part], c)
        found = [x for x in found if x is not None] if isinstance(found, tuple) else [found]
        return [x.detach() for x in found] + list(
            torch.autograd.grad(found, leaves, [torch.ones_like(x) for x in found])
        )

    wanted = ("mean", "stats", "js", "distillation by the JSD")
    if layout == "sequence":
        wanted = (*LINEAR,)
    if layout == "sequence" and backend == "triton":  # the kernels see the same as of "replicated"
        wanted = ("mean",)
    for name in wanted:
        function = LINEAR[name]
        with fastkl.use_backend(backend):
            exact = run(function, slice(0, rows), slice(0, vocabulary), 0, None)
            found = run(function, mine, held, width - own, shard)
        what = f"{name}, {backend}, {ranks} ranks, {layout}, {vocabulary}"
        *values, grad_hidden, grad_weight, grad_bias = exact
        expected = *values, grad_hidden[mine], grad_weight[held], grad_bias[held]
        assert not found[-1][own:].any() and not found[-2][own:].any(), what
        found[-2:] = [value[:own] for value in found[-2:]]
        for result, value in zip(found, expected, strict=True):
            limit = dict(rtol=2e-5, atol=2e-6 * float(value.abs().max()) if value.numel() else 0)
            torch.testing.assert_close(
                result, value, **limit, msg=f"{what}: {result} is not {value}"
            )
