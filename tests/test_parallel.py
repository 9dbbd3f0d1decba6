"""Vocabularies split over processes: four gloo processes, as one group and as two, against the same
call on the whole vocabulary.
"""

import contextlib
import dataclasses
import datetime
import functools
import os
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

import fastkl
from fastkl import parallel, testing

WORLD = 4
Shard = fastkl.VocabShard


class Case(NamedTuple):
    """Logits of P and Q, [N, vocabulary] of which each rank holds `width` columns, and what
    applies to each row.
    """

    p: torch.Tensor
    q: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor
    temperature: torch.Tensor

    def on(self, shard: Shard, width: int) -> "Case":
        """Return the columns of a rank; NaN stands in for padding."""
        end = min(shard.start + width, shard.vocab_size)
        p, q = (
            torch.nn.functional.pad(
                value[:, shard.start : end], (0, width - max(0, end - shard.start)), value=torch.nan
            )
            for value in (self.p, self.q)
        )
        return self._replace(p=p, q=q)


def case(vocabulary: int, rows: int, dtype: torch.dtype, noise: float, width: int) -> Case:
    """Draw rows of any kind: near, shifted, masked in one shard or in one model, and far; tokens
    lie at the borders of shards.
    """
    generator = torch.Generator().manual_seed(vocabulary + rows)
    p, other = torch.randn(2, rows, vocabulary, generator=generator) * 2
    q = p + noise * other
    kinds = [
        lambda row: q[row].add_(50.0),
        lambda row: q[row, -3].fill_(-torch.inf),
        lambda row: (p[row, :width].fill_(-torch.inf), q[row, :width].fill_(-torch.inf)),
        lambda row: q[row, 5].fill_(-1e30),
        lambda row: p[row, width:].sub_(200.0),
        lambda row: p[row, 3].fill_(torch.nan),
    ]
    for row, kind in zip(range(1, rows), kinds, strict=False):
        kind(row)
    borders = torch.tensor([0, width - 1, width, vocabulary - 1, vocabulary // 2])
    tokens = borders.clamp(max=vocabulary - 1).repeat(rows)[:rows]
    temperature = torch.rand(rows, generator=generator) + 0.5
    mask = torch.arange(rows) != rows - 1
    return Case(p.to(dtype), q.to(dtype), tokens, mask, temperature)


FUNCTIONS: dict[str, Callable] = {
    "kl": lambda c, **more: fastkl.kl_divergence(
        c.p, c.q, c.mask, temperature=c.temperature, **more
    ),
    "mean": lambda c, **more: fastkl.kl_divergence(
        c.p[:2], c.q[:2], c.mask[:2], weights=c.temperature[:2], reduction="mean", **more
    ),
    "jeffreys": lambda c, **more: fastkl.jeffreys_divergence(c.p, c.q, c.mask, **more),
    "stats": lambda c, **more: fastkl.token_stats(
        c.p, c.tokens, c.q, temperature=c.temperature, mask=c.mask, **more
    ),
    "policy": lambda c, **more: fastkl.token_stats(c.p, c.tokens, **more),
    "entropy": lambda c, **more: fastkl.entropy_from_logits(c.p, c.mask, **more),
    "selective": lambda c, **more: fastkl.selective_log_softmax(c.p, c.tokens, **more),
    "several": lambda c, **more: fastkl.selective_log_softmax(
        c.p, c.tokens[:, None].repeat(1, 2), **more
    ),
    "js": lambda c, **more: fastkl.js_divergence(c.p, c.q, c.mask, **more),
    "topk": lambda c, **more: fastkl.topk_kl_divergence(
        c.p, c.temperature[:, None].neg(), c.tokens[:, None], c.mask, **more
    ),
}
# Functions whose logits the kernels do not gather.
NATIVE = ("kl", "jeffreys", "stats", "policy", "entropy", "selective")


def results(function: Callable, given: Case, **more) -> tuple[list[torch.Tensor], list]:
    """Return the results of a function and its gradients to P and Q, of upstream gradients that
    differ by row and field; None for a tensor that is not in it.
    """
    p, q = (value.detach().clone().requires_grad_() for value in given[:2])
    found = function(given._replace(p=p, q=q), **more)
    found = [each for each in found if each is not None] if isinstance(found, tuple) else [found]
    upstream = [
        torch.arange(1.0, each.numel() + 1).view(each.shape) * (i + 1)
        for i, each in enumerate(found)
    ]
    return found, list(torch.autograd.grad(found, (p, q), upstream, allow_unused=True))


class Count:
    """Counts the gathers of a call."""

    def __init__(self) -> None:
        self.calls, self.gather = 0, parallel.all_gather

    def __call__(self, value: torch.Tensor, group: str) -> torch.Tensor:
        self.calls += 1
        return self.gather(value, group)


# V, width, rows, dtype, noise, and whether bits are equal on the kernels in groups of 2 and 4.
Size = tuple[int, int, int, torch.dtype, float, bool]
SIZES: dict[str, Size] = {
    "even": (2048, 512, 7, torch.float32, 0.1, True),
    "far": (2048, 512, 7, torch.bfloat16, 3.0, True),
    "large": (128256, 32064, 2, torch.bfloat16, 0.01, True),
    "padded": (151936, 38016, 2, torch.bfloat16, 0.01, False),
    "uneven": (50257, 12565, 2, torch.float32, 0.1, False),
    "small": (1000, 250, 7, torch.float32, 1.0, False),
    "empty rank": (1000, 500, 3, torch.bfloat16, 0.1, False),
    "no rows": (1000, 250, 0, torch.float32, 1.0, False),
    "more rows": (1000, 250, 13, torch.float32, 0.01, False),
}


@functools.cache
def whole_case(name: str) -> Case:
    vocabulary, quarter, rows, dtype, noise, _ = SIZES[name]
    return case(vocabulary, rows, dtype, noise, quarter)


@functools.cache
def expected(name: str, backend: str, label: str) -> tuple[list[torch.Tensor], list]:
    return results(FUNCTIONS[label], whole_case(name))


def compare(name: str, backend: str, group: dist.ProcessGroup) -> None:
    """Compare every function on this rank's columns with the whole vocabulary."""
    vocabulary, quarter, _, dtype, _, equal = SIZES[name]
    width = quarter * WORLD // group.size()
    shard = Shard.megatron(group, width, vocabulary)
    c, own = whole_case(name), parallel.Cut.of(shard).columns(width)
    mine = c.on(shard, width)
    for label, function in FUNCTIONS.items():
        if label not in ("kl", "stats") and (name != "even" or group.size() == 2):
            continue
        what = f"{name}, {backend}, {group.size()} ranks, {label}"
        count = Count()
        with fastkl.use_backend(backend), mock.patch.object(parallel, "all_gather", count):
            found, parts = results(function, mine, shard=shard)
            exact_results, gradients = expected(name, backend, label)
        assert count.calls <= 2, what
        bits = backend == "reference" or equal or label not in NATIVE
        for result, exact in zip(found, exact_results, strict=True):
            if bits:
                testing.assert_same_bits(result, exact, what)
            else:
                torch.testing.assert_close(result, exact, rtol=1e-5, atol=1e-6, equal_nan=True)
        if label == "kl":
            p, q = (value.double() / c.temperature[:, None] for value in c[:2])
            rows = c.mask & p.isfinite().all(-1) & q.isfinite().all(-1)
            testing.assert_kl(found[0][rows], testing.truth(p[rows], q[rows]).kl, what)
        for part, gradient in zip(parts, gradients, strict=True):
            if part is None or gradient is None:
                assert part is gradient, what
                continue
            assert not part[:, own:].any(), what
            held = gradient[:, shard.start : shard.start + own]
            if bits:
                testing.assert_same_bits(part[:, :own], held, what)
            else:
                finite = held.isfinite().all(-1)
                assert bool((finite == part[:, :own].isfinite().all(-1)).all()), what
                size = gradient[finite].double().norm(dim=-1)
                error = (part[finite, :own].double() - held[finite].double()).norm(dim=-1)
                limit = 1e-5 if dtype == torch.float32 else 4e-3
                assert bool((error <= limit * size + 1e-9).all()), (what, error / size)


# ---- from hidden states


LINEAR: dict[str, Callable] = {
    "mean": lambda h, w, r, c, **more: fastkl.linear_kl_divergence(
        h, w, r, weights=c.temperature, reduction="mean", mask=c.mask, chunk_size=4, **more
    ),
    "none": lambda h, w, r, c, **more: fastkl.linear_kl_divergence(
        h, w, r, temperature=c.temperature, mask=c.mask, chunk_size=4, recompute=True, **more
    ),
    "stats": lambda h, w, r, c, **more: fastkl.linear_token_stats(
        h, w, c.tokens, r, mask=c.mask, **more
    ),
    "jeffreys": lambda h, w, r, c, **more: fastkl.linear_divergence(
        h, w, r, divergence="jeffreys", reduction="sum", **more
    ),
    "penalty": lambda h, w, r, c, **more: fastkl.LinearKLPenalty(0.3)(h, w, r, mask=c.mask),
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
    own = parallel.Cut.of(shard).columns(width)
    columns = slice(shard.start, shard.start + own)
    mine = slice(before, before + lengths[rank]) if layout == "sequence" else slice(0, rows)

    def run(function: Callable, part: slice, held: slice, extra: int, shard: Shard | None) -> list:
        leaves = [hidden[part].clone(), weight[held].clone(), bias[held].clone()]
        # Rows of padding hold anything.
        leaves[1:] = [torch.cat([x, x.new_full((extra, *x.shape[1:]), 9.0)]) for x in leaves[1:]]
        leaves = [x.requires_grad_() for x in leaves]
        head = fastkl.Head(*leaves[1:], softcap=3.0, shard=shard)
        found = function(leaves[0], head, other[part], c)
        found = [x for x in found if x is not None] if isinstance(found, tuple) else [found]
        return [x.detach() for x in found] + list(
            torch.autograd.grad(found, leaves, [torch.ones_like(x) for x in found])
        )

    for name, function in LINEAR.items():
        with fastkl.use_backend(backend):
            exact = run(function, slice(0, rows), slice(0, vocabulary), 0, None)
            found = run(function, mine, columns, width - own, shard)
        what = f"{name}, {backend}, {ranks} ranks, {layout}, {vocabulary}"
        *values, grad_hidden, grad_weight, grad_bias = exact
        expected = *values, grad_hidden[mine], grad_weight[columns], grad_bias[columns]
        assert not found[-1][own:].any() and not found[-2][own:].any(), what
        found[-2:] = [value[:own] for value in found[-2:]]
        for result, value in zip(found, expected, strict=True):
            limit = dict(rtol=2e-5, atol=2e-6 * float(value.abs().max()) if value.numel() else 0)
            torch.testing.assert_close(
                result, value, **limit, msg=f"{what}: {result} is not {value}"
            )


def costs(group: dist.ProcessGroup) -> None:
    """Two gathers forward and none backward; 40 bytes per row are saved beside the inputs."""
    whole = case(1024, 6, torch.bfloat16, 0.1, 256)
    shard = Shard.megatron(group, 256, 1024)
    mine, count, saved = whole.on(shard, 256), Count(), []

    def keep(value: torch.Tensor) -> torch.Tensor:
        if value.shape[-1] not in (256, 6):
            saved.append(value.nbytes)
        return value

    p = mine.p.requires_grad_()
    with (
        fastkl.use_backend("triton"),
        mock.patch.object(parallel, "all_gather", count),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value),
    ):
        stats = fastkl.token_stats(p, mine.tokens, mine.q, shard=shard)
        assert count.calls == 2 and sum(saved) == 40 * len(p)
        torch.autograd.grad(stats.kl.nansum(), p)
        assert count.calls == 2


def mistakes(rank: int, group: dist.ProcessGroup) -> None:
    """Shards and rows that do not fit together are errors on every rank."""
    shard, logits = Shard.megatron(group, 5, 20), torch.zeros(3, 5)
    both = fastkl.kl_divergence, fastkl.total_variation
    wrong = [
        ("shard", Shard(group, rank * 5, 21), logits, "0 … 20 once"),
        ("shard", Shard(group, rank * 4, 20), logits, "0 … 19 once"),
        ("p_logits", shard, torch.zeros(3 + rank % 2, 5), r"\(20, 3, 4\), \(20, 4, 4\)"),
        ("p_logits", shard, logits.to((torch.float32, torch.bfloat16)[rank % 2]), "bytes"),
    ]
    for name, given, value, part in wrong:
        for function in both:
            with pytest.raises(ValueError, match=f"^{name}: expected .*{part}"):
                function(value, value, shard=given)
    for given in (group, (shard,), (shard, group)):
        with pytest.raises(TypeError, match=r"^shard: expected a fastkl\.VocabShard, or a pair"):
            fastkl.kl_divergence(logits, logits, shard=given)
    other = Shard.megatron(group, 5, 19)
    with pytest.raises(ValueError, match="^shard: expected one group and one vocab_size"):
        fastkl.kl_divergence(logits, logits, shard=(shard, other))
    with pytest.raises(ValueError, match="^q_logits: expected the leading shape of p_logits"):
        fastkl.kl_divergence(logits, logits[:2], shard=shard)


def padded_differently(group: dist.ProcessGroup, backend: str) -> None:
    """A pair of shards: 1000 columns over four ranks as 252 each and as 256 each."""
    whole = case(1000, 7, torch.float32, 0.1, 250)
    shards = Shard.megatron(group, 252, 1000), Shard.megatron(group, 256, 1000)
    mine = whole._replace(p=whole.on(shards[0], 252).p, q=whole.on(shards[1], 256).q)
    with fastkl.use_backend(backend):
        exact_results, gradients = results(FUNCTIONS["stats"], whole)
        found, parts = results(FUNCTIONS["stats"], mine, shard=shards)
    for result, exact in zip(found, exact_results, strict=True):
        testing.assert_same_bits(result, exact, "padded differently")
    for part, gradient, shard in zip(parts, gradients, shards, strict=True):
        own = parallel.Cut.of(shard).columns(part.shape[-1])
        held = gradient[:, shard.start : shard.start + own]
        testing.assert_same_bits(part[:, :own], held, "padded differently")
        assert not part[:, own:].any()


def short_segments(name: str) -> contextlib.AbstractContextManager:
    """Let the kernels cut 2048 columns into four segments, not one."""
    from fastkl.kernels import config

    cut = config.RowConfig(64, 1, 512, "short segments") if SIZES[name][0] == 2048 else None
    return config.override(forward=cut)


def main(rank: int, folder: str) -> None:
    # A file instead of a port: nothing to collide with.
    store, limit = dist.FileStore(f"{folder}/store", WORLD), datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=limit)
    torch.set_num_threads(1)
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups, backends = [dist.group.WORLD, halves[rank // 2]], ["reference", "triton"]
    import quick_interpreter

    quick_interpreter.hurry()
    for name in SIZES:
        for backend in backends:
            with short_segments(name):
                for group in groups:
                    compare(name, backend, group)
    for backend in backends:
        padded_differently(dist.group.WORLD, backend)
        linear(groups[0], backend, "sequence", 62)
        linear(groups[0], backend, "replicated", 64)
        linear(groups[1], backend, "replicated", 61)
    costs(dist.group.WORLD)
    mistakes(rank, dist.group.WORLD)
    dist.monitored_barrier()
    if rank == 3:
        os._exit(0)
    with pytest.raises(RuntimeError, match="(?i)connection|closed|reset"):
        fastkl.kl_divergence(*torch.zeros(2, 3, 5), shard=Shard.megatron(dist.group.WORLD, 5, 20))
    # Threads of gloo that still run abort an interpreter that exits.
    os._exit(0)


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_ranks_compute_as_one_process(tmp_path, monkeypatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch.multiprocessing.spawn(main, (str(tmp_path),), nprocs=WORLD)
