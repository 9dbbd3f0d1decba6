"""Shards of a vocabulary beside the whole: cases, functions, and the comparison on one rank."""

import contextlib
import datetime
import functools
import inspect
import itertools
import pathlib
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

import fastkl
from fastkl import _collectives, testing
from fastkl.ops import chunks, gemm

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


def columns(shard: Shard, width: int) -> int:
    """Count the columns of a rank that are no padding."""
    return min(max(shard.vocab_size - shard.start, 0), width)


def case(vocabulary: int, rows: int, dtype: torch.dtype, noise: float, width: int) -> Case:
    """Draw rows of any kind: near, shifted, masked in one shard or in one model, and far; tokens
    lie at the borders of shards.
    """
    generator = torch.Generator().manual_seed(vocabulary + rows)
    p, other = torch.randn(2, rows, vocabulary, generator=generator) * 2
    q, lowest = p + noise * other, torch.finfo(dtype).min
    kinds = [
        lambda row: q[row].add_(50.0),
        lambda row: q[row, -3].fill_(-torch.inf),
        lambda row: (p[row, :width].fill_(-torch.inf), q[row, :width].fill_(-torch.inf)),
        lambda row: q[row, 5].fill_(-1e30),
        lambda row: p[row, width:].sub_(200.0),
        lambda row: p[row, 3].fill_(torch.nan),
        lambda row: q[row, :width].fill_(-torch.inf),
        lambda row: p[row, width:].fill_(-torch.inf),
        lambda row: q[row, p[row, :width].argmax()].fill_(-torch.inf),
        lambda row: (p[row, :width].fill_(-torch.inf), p[row, 1].fill_(torch.nan)),
        lambda row: (q[row, :width].fill_(-torch.inf), q[row, 1].fill_(torch.nan)),
        lambda row: q[row].fill_(-1e30),
        lambda row: (p[row].fill_(lowest), q[row].fill_(lowest)),
        lambda row: p[row].fill_(lowest),
    ]
    for row, kind in zip(range(1, rows), kinds, strict=False):
        kind(row)
    borders = torch.tensor([0, width - 1, width, vocabulary - 1, vocabulary // 2])
    tokens = borders.clamp(max=vocabulary - 1).repeat(rows)[:rows]
    temperature = torch.rand(rows, generator=generator) + 0.5
    return Case(p.to(dtype), q.to(dtype), tokens, torch.arange(rows) != rows - 1, temperature)


def distilled(loss: fastkl.DistillationLoss, c: Case, **more) -> torch.Tensor:
    """Compute the loss of four rows, without the one whose divergence is infinite."""
    labels = c.tokens[:4].where(torch.tensor([True, True, False, True]), -100)
    return loss(c.p[:4], c.q[:4], labels, **more)


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
    "renyi": lambda c, **more: fastkl.renyi_divergence(c.p, c.q, c.mask, alpha=2.0, **more),
    "tv": lambda c, **more: fastkl.total_variation(
        c.p, c.q, c.mask, temperature=c.temperature, **more
    ),
    "support": lambda c, **more: fastkl.token_stats(
        c.p,
        c.tokens,
        c.q,
        mask=c.mask,
        support=c.tokens[:, None] + torch.tensor([0, 300, 1, 0]),
        **more,
    ),
    "topk": lambda c, **more: fastkl.topk_kl_divergence(
        c.p,
        c.temperature[:, None].repeat(1, 3).neg() - 1.0,
        c.tokens[:, None] + torch.tensor([300, 0, 0]),
        c.mask,
        **more,
    ),
}
LOSSES = {
    "distillation": fastkl.DistillationLoss(),
    "distillation by the reverse KL": fastkl.DistillationLoss(
        temperature=2.0, direction="student||teacher"
    ),
    "distillation by the JSD": fastkl.DistillationLoss("js", beta=0.3),
    "distillation by the JSD alone": fastkl.DistillationLoss("js", alpha=1.0),
}
FUNCTIONS |= {name: functools.partial(distilled, loss) for name, loss in LOSSES.items()}
DIVERGENCES = ("kl", "mean", "jeffreys", "js", "renyi", "tv", "topk")
# Functions whose logits the kernels gather.
GATHERING = ("several", "topk", "support")


def results(function: Callable, given: Case, **more) -> tuple[list[torch.Tensor], list]:
    """Return the results of a function and its gradients to P and Q, of upstream gradients that
    differ by row and field; None for a tensor that the function does not use.
    """
    p, q = (value.detach().clone().requires_grad_() for value in given[:2])
    found = function(given._replace(p=p, q=q), **more)
    found = [each for each in found if each is not None] if isinstance(found, tuple) else [found]
    upstream = [
        (each.detach().nan_to_num(0.0, 0.0, 0.0) * 0 + 1).cumsum(0) * (i + 1)
        if each.dim()
        else None
        for i, each in enumerate(found)
    ]
    return found, list(torch.autograd.grad(found, (p, q), upstream, allow_unused=True))


class Count:
    """Counts the gathers of a call."""

    def __init__(self) -> None:
        self.calls, self.gather = 0, _collectives.start_gather

    def __call__(self, *args) -> torch.Tensor:
        self.calls += 1
        return self.gather(*args)


# V, width, rows, dtype, noise, and whether the kernels give the same bits in groups of 2 and 4 as
# in a group of 1 or, from V = 32000 on, without a group.
Size = tuple[int, int, int, torch.dtype, float, bool]
SIZES: dict[str, Size] = {
    "even": (1024, 256, 16, torch.float32, 0.1, True),
    "far": (1024, 256, 16, torch.bfloat16, 3.0, True),
    "smallest": (32000, 8000, 16, torch.bfloat16, 0.1, True),
    "two rows": (32000, 8000, 2, torch.float32, 0.1, True),
    "large": (128256, 32064, 2, torch.bfloat16, 0.01, True),
    "padded": (151936, 38016, 2, torch.bfloat16, 0.01, False),
    "uneven": (50257, 12565, 2, torch.float32, 0.1, False),
    "small": (1000, 250, 7, torch.float32, 1.0, False),
    "empty rank": (1000, 500, 3, torch.bfloat16, 0.1, False),
    "no rows": (1000, 250, 0, torch.float32, 1.0, False),
    "more rows": (64, 16, 13, torch.float32, 0.01, False),
}

# Sizes that groups of two processes compute too.
SIZES_OF_HALVES = ("even", "far", "smallest", "two rows", "large", "small")


@functools.cache
def whole_case(name: str) -> Case:
    vocabulary, quarter, rows, dtype, noise, _ = SIZES[name]
    return case(vocabulary, rows, dtype, noise, quarter)


@functools.cache
def expected(
    name: str, backend: str, label: str, **shard: Shard
) -> tuple[list[torch.Tensor], list]:
    return results(FUNCTIONS[label], whole_case(name), **shard)


def compare(name: str, backend: str, group: dist.ProcessGroup, alone: dist.ProcessGroup) -> None:
    """Compare every function on this rank's columns with the whole vocabulary, and with a group of
    this process alone.
    """
    vocabulary, quarter, _, dtype, _, equal = SIZES[name]
    width = quarter * WORLD // group.size()
    shard = Shard.megatron(group, width, vocabulary)
    c, own = whole_case(name), columns(shard, width)
    mine = c.on(shard, width)
    for label, function in FUNCTIONS.items():
        short = vocabulary <= 1024 or name == "two rows"
        wanted = ("kl", "stats", "js") if short else ("kl",)
        if label not in wanted and (name != "even" or group.size() == 2):
            continue
        what = f"{name}, {backend}, {group.size()} ranks, {label}"
        count = Count()
        with fastkl.use_backend(backend):
            with mock.patch.object(_collectives, "start_gather", count):
                found, parts = results(function, mine, shard=shard)
            wholes = [expected(name, backend, label)]
            # A long row has these segments without a shard too.
            if backend == "triton" and equal and vocabulary < 32000:
                wholes.append(expected(name, backend, label, shard=Shard(alone, 0, vocabulary)))
        most = 1 if label in GATHERING[:2] else 4 if label in LOSSES else 2
        assert count.calls <= most or backend == "reference" and count.calls <= 2, what
        small = 1e-8 if label in DIVERGENCES else 2e-6
        for result, value in zip(found, wholes[0][0], strict=True):
            torch.testing.assert_close(result, value, rtol=2e-5, atol=small, equal_nan=True)
        bits = backend == "reference" or label in GATHERING or equal
        for result, exact in zip(found, wholes[-1][0] if bits else (), strict=bits):
            testing.assert_same_bits(result, exact, what)
        if label == "kl":
            p, q = (value.double() / c.temperature[:, None] for value in c[:2])
            rows = c.mask & p.isfinite().all(-1) & q.isfinite().all(-1)
            testing.assert_kl(found[0][rows], testing.truth(p[rows], q[rows]).kl, what)
        for part, gradient, exact in zip(parts, wholes[0][1], wholes[-1][1], strict=True):
            if part is None or gradient is None:
                assert part is gradient, what
                continue
            assert not part[:, own:].any(), what
            held = slice(shard.start, shard.start + own)
            finite = gradient[:, held].isfinite().all(-1)
            assert bool((finite == part[:, :own].isfinite().all(-1)).all()), what
            # Elsewhere the row may be NaN.
            size = gradient[finite].double().nan_to_num(0.0, 0.0, 0.0).norm(dim=-1)
            error = (part[finite, :own].double() - gradient[finite, held]).norm(dim=-1)
            limit = 1e-5 if dtype == torch.float32 else 4e-3
            assert bool((error <= limit * size + 1e-9).all()), (what, error / size)
            if bits:
                # Of an infinite KL some entries are -inf or NaN.
                both = (part[:, :own], exact[:, held])
                both = [torch.where(x.isfinite(), x, torch.nan) for x in both]
                testing.assert_same_bits(*both, what)


def parallel_logits(local: torch.Tensor, mesh: object) -> torch.Tensor:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor import Shard as Split

    return DTensor.from_local(local, mesh, [Split(local.dim() - 1)])


def replicated(local: torch.Tensor, mesh: object) -> torch.Tensor:
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(local, mesh, [Replicate()])


def launched_in_order(mine: Case, shard: Shard) -> None:
    """Compiled kernels take their arguments by position."""
    from fastkl.kernels import launch

    start = launch.Variant.start
    with mock.patch.object(launch.Variant, "start", autospec=True, side_effect=start) as spy:
        fastkl.js_divergence(mine.p, mine.q, shard=shard)
        fastkl.kl_divergence(mine.p, mine.q, shard=shard)
    for variant, _, arguments in (call.args for call in spy.call_args_list):
        names = inspect.signature(variant.kernel.fn).parameters
        assert [*arguments, *variant.constants] == [*names]
    assert len({call.args[0].kernel for call in spy.call_args_list}) == 4


def recorded(order: list[str], letter: str, function: Callable, *args):
    order.append(letter)
    return function(*args)


def overlapped(group: dist.ProcessGroup) -> str:
    """Return the order of products, gathers and waits of three chunks of two models."""
    head = fastkl.Head(torch.ones(16, 4).requires_grad_(), shard=Shard.megatron(group, 16, 64))
    hidden, order = torch.ones(2, 30, 4), []

    with mock.patch.object(chunks, "LARGEST_CHUNK", 12), contextlib.ExitStack() as patches:
        for letter, where, name in (
            ("p", gemm, "logits_into"),
            ("g", _collectives, "start_gather"),
            ("w", _collectives, "wait"),
        ):
            call = functools.partial(recorded, order, letter, getattr(where, name))
            patches.enter_context(mock.patch.object(where, name, call))
        fastkl.linear_kl_divergence(hidden[0], head, hidden[1], reduction="sum")
    return "".join(order)


def mistakes(rank: int, group: dist.ProcessGroup) -> None:
    """Shards and rows that do not fit together are errors on every rank."""
    shard, logits = Shard.megatron(group, 5, 20), torch.zeros(3, 5)
    both = fastkl.kl_divergence, fastkl.total_variation
    wrong = [
        (shard, torch.zeros(3 + rank % 2, 5)),
        (shard, logits.to((torch.float32, torch.bfloat16)[rank % 2])),
        (shard, logits.to((torch.float16, torch.bfloat16)[rank % 2])),
        (Shard(group, rank * 5, 21), logits),
        (Shard(group, rank * 5, 20 - rank % 2), logits),
        (Shard(group, rank * 6, 20), logits),
        (shard, torch.zeros(3, 5 + 2 * (rank == 3))),
        (shard, torch.zeros(3, 5 - 2 * (rank == 1))),
    ]
    for function, (given, value) in itertools.product(both, wrong):
        with pytest.raises(ValueError, match=r"^p_logits: expected the same rows, type, vocab"):
            function(value, value, shard=given)
    with fastkl.use_backend("triton"):
        for start in (5, 6)[: 2 if rank in (1, 2) else 1]:  # the others do not see the gap
            with pytest.raises(ValueError, match="^shard: expected rank r's first column of p_log"):
                fastkl.kl_divergence(logits, logits, shard=Shard(group, rank * start, 26 - start))
    kl, other = fastkl.kl_divergence, rank == 2
    half = logits.to((torch.float16, torch.bfloat16)[other])
    several = torch.zeros(3, 2, dtype=torch.long)
    calls = [
        lambda: kl(logits, logits, shard=Shard.megatron(group, 5, 20 - other)),
        lambda: kl(logits, logits, temperature=1.0 + other, shard=shard),
        lambda: kl(half, half, shard=shard),
        lambda: fastkl.renyi_divergence(logits, logits, alpha=2.0 + other, shard=shard),
        lambda: (kl, fastkl.jeffreys_divergence)[other](logits, logits, shard=shard),
        lambda: fastkl.selective_log_softmax(half, several, shard=shard),
        lambda: fastkl.linear_kl_divergence(  # the first chunks are alike
            *[torch.zeros(12 + 4 * other, 2), fastkl.Head(torch.zeros(5, 2), shard=shard)] * 2,
            chunk_size=4,
        ),
    ]
    for call in calls:
        with (
            fastkl.use_backend("triton"),
            pytest.raises(RuntimeError, match="^shard: expected the"),
        ):
            call()
    with pytest.raises(RuntimeError, match="^shard: expected the same call on all ranks"):
        fastkl.token_stats(logits, several[:, 0], logits if other else None, shard=shard)
    distillation, labels = fastkl.DistillationLoss(), torch.zeros(3, dtype=torch.long)
    for given in (group, (shard,), (shard, group), [shard, shard]):
        for call in (fastkl.kl_divergence, functools.partial(distillation, labels=labels)):
            with pytest.raises(TypeError, match=r"^shard: expected a fastkl\.VocabShard, or a pai"):
                call(logits, logits, shard=given)
    with pytest.raises(ValueError, match=r"^labels: expected ids in 0 … 19, got 20;"):
        distillation(logits, logits, labels + 20, shard=shard)
    other = Shard.megatron(group, 5, 19)
    with pytest.raises(ValueError, match="^shard: expected one group and one vocab_size"):
        fastkl.kl_divergence(logits, logits, shard=(shard, other))
    wide = Shard.megatron(group, 6, 21), Shard.megatron(group, 5, 21)  # Q has 20 columns in all
    with pytest.raises(ValueError, match="^p_logits: expected the same rows, type, vocab"):
        fastkl.kl_divergence(torch.zeros(3, 6), logits, shard=wide)
    for value in (logits[:2], logits[:, :4]):
        with pytest.raises(ValueError, match="^q_logits: expected the shape of p_logits"):
            fastkl.kl_divergence(logits, value, shard=shard)
    head = fastkl.Head(torch.zeros(16, 2), shard=Shard.megatron(group, 16, 33))
    with pytest.raises(ValueError, match="^weight.shard: expected rows of the vocabulary of 33 on"):
        fastkl.linear_token_stats(torch.zeros(3, 2), head, torch.zeros(3, dtype=torch.long))


def derivatives(group: dist.ProcessGroup, backend: str) -> None:
    """A frozen tensor gets no gradient; second derivatives are refused."""
    shard, tokens = Shard.megatron(group, 5, 20), torch.tensor([3, 4, 7])
    p, q = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    p.requires_grad_()
    with fastkl.use_backend(backend):
        for support in (None, torch.arange(3)[:, None] + torch.arange(0, 20, 5)):
            stats = fastkl.token_stats(p, tokens, q, support=support, shard=shard)
            assert stats.kl.requires_grad and not stats.ref_logprob.requires_grad
            # once_differentiable leaves a graph without P.
            with pytest.raises((RuntimeError, ValueError), match="second|been used in the graph"):
                (first,) = torch.autograd.grad(stats.entropy.sum(), p, create_graph=True)
                torch.autograd.grad(first.square().sum(), p)


def different_rows(rank: int, folder: str, rows: int) -> None:
    """Call with 3 rows on rank 0 and `rows` on rank 1; leave a file if the call returns."""
    store, limit = dist.FileStore(f"{folder}/store{rows}", 2), datetime.timedelta(hours=1)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
    logits = torch.zeros(rows if rank else 3, 5)
    with fastkl.use_backend("triton"):
        fastkl.kl_divergence(logits, logits, shard=Shard.megatron(dist.group.WORLD, 5, 10))
    pathlib.Path(f"{folder}/passed").touch()
