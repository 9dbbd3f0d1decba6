"""Vocabularies split over processes: four gloo processes, as one group and as two, against the same
call on the whole vocabulary.
"""

import concurrent.futures
import datetime
import functools
import os
import pathlib
import sys
import tempfile
from unittest import mock

import background
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from parallel_cases import (
    FUNCTIONS,
    LOSSES,
    SIZES,
    SIZES_OF_HALVES,
    WORLD,
    Case,
    Count,
    Shard,
    case,
    columns,
    compare,
    derivatives,
    different_rows,
    launched_in_order,
    mistakes,
    overlapped,
    parallel_logits,
    replicated,
    results,
)
from parallel_linear import linear
from torch.distributed.tensor.debug import CommDebugMode
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

import fastkl
from fastkl import _collectives, parallel, testing

ROOT = pathlib.Path(__file__).resolve().parents[1]


def dtensors(backend: str) -> None:
    """DTensors of logits, split along columns, unevenly, and along rows, give DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
    from torch.distributed.tensor import Shard as Split

    whole = case(1001, 6, torch.float32, 0.1, 251)
    for dims, logits, rows in (
        ((4,), [Split(1)], [Replicate()]),
        ((2, 2), [Split(0), Split(1)], [Split(0), Replicate()]),
    ):
        mesh = init_device_mesh("cpu", dims)
        mine = Case._make(
            distribute_tensor(value, mesh, logits if value.dim() == 2 else rows) for value in whole
        )
        labels = ["kl", "stats"]
        if backend == "reference":
            labels += ["entropy", "selective", "several", "js"]
        for label in labels:
            with fastkl.use_backend(backend):
                found, grads = results(FUNCTIONS[label], mine)
                exact, gradients = results(FUNCTIONS[label], whole)
            for result, value in zip(found, exact, strict=True):
                assert list(result.placements) == rows, (label, result.placements)
                torch.testing.assert_close(
                    result.full_tensor(), value, rtol=1e-5, atol=1e-6, equal_nan=True
                )
            for grad, value in zip(grads, gradients, strict=True):
                assert (grad is None) == (value is None)
                if grad is not None:
                    assert list(grad.placements) == logits
                    full, finite = grad.full_tensor(), value.isfinite().all(-1)
                    torch.testing.assert_close(full[finite], value[finite], rtol=1e-4, atol=1e-5)
        for name, wrong in (
            ("mask", whole.mask),
            ("q_logits", whole.q),
            ("q_logits", mine.p.redistribute(mesh, [Replicate()] * len(dims))),
            ("p_logits", DTensor.from_local(whole.p, mesh, [Partial()] * len(dims))),
        ):
            given = {"p_logits": mine.p, "q_logits": mine.q, name: wrong}
            with pytest.raises(
                (TypeError, ValueError), match=f"^{name}: expected a DTensor on the mesh"
            ):
                fastkl.kl_divergence(**given)
    nine = case(9, 4, torch.float32, 0.1, 3)  # the last rank has no column
    mesh = init_device_mesh("cpu", (4,))
    split = [distribute_tensor(value, mesh, [Split(1)]) for value in nine[:2]]
    rows = [distribute_tensor(value, mesh, [Replicate()]) for value in nine[2:]]
    for label in ("kl", "js", "several"):
        with fastkl.use_backend(backend):
            found, grads = results(FUNCTIONS[label], Case(*split, *rows))
            exact, gradients = results(FUNCTIONS[label], nine)
        pairs = zip([*found, *grads[:1]], [*exact, *gradients[:1]], strict=True)
        for result, value in pairs:
            torch.testing.assert_close(
                result.full_tensor(), value, rtol=1e-5, atol=1e-6, equal_nan=True
            )
    with pytest.raises(ValueError, match="^q_logits: expected a DTensor on the mesh .*shape"):
        fastkl.kl_divergence(split[0], distribute_tensor(nine.q[:, :8], mesh, [Split(1)]))
    with pytest.raises(ValueError, match="^p_logits: expected logits whose rows are not split"):
        fastkl.kl_divergence(mine.p, mine.q, reduction="mean")
    with pytest.raises(ValueError, match="^shard: expected None beside DTensors"):
        fastkl.kl_divergence(mine.p, mine.q, shard=Shard(dist.group.WORLD, 0, 5))
    with pytest.raises(ValueError, match="^tensor: expected a DTensor whose last dimension one"):
        Shard.dtensor(whole.p)


class Model(torch.nn.Module):
    """A block of two layers and an lm_head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
        self.lm_head = torch.nn.Linear(8, 64, bias=False)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.hidden(x))


def train(sharded: bool) -> None:
    """Ten steps of a tensor-parallel model, also inside FSDP2, give the losses of one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard as Split
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    tp, generator = mesh["tp"], torch.Generator().manual_seed(2)
    data, other = torch.randn(2, 4, 3, 8, generator=generator)
    tokens = torch.randint(64, (4, 3), generator=generator)
    models = [Model(), Model()]
    with torch.no_grad():
        reference = models[0](other)
    split_columns = ColwiseParallel(output_layouts=Split(-1), use_local_output=False)
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel(), "lm_head": split_columns}
    parallelize_module(models[1], tp, plan)
    mine = slice(None)
    if sharded:
        fully_shard(models[1], mesh=mesh["dp"])
        mine = slice(2 * mesh["dp"].get_local_rank(), 2 * mesh["dp"].get_local_rank() + 2)
    penalty = fastkl.KLPenalty(0.5)
    start = tp.get_local_rank() * 32
    split_reference = parallel_logits(reference[mine][..., start : start + 32], tp)
    split_tokens = replicated(tokens[mine], tp)
    losses = []
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in models]
    for _ in range(10):
        logits, parts = models[0](data), models[1](data[mine])
        whole = penalty(logits, reference) - 0.1 * fastkl.token_stats(logits, tokens).logprob.mean()
        own = penalty(parts, split_reference)
        own = own - 0.1 * fastkl.token_stats(parts, split_tokens).logprob.mean()
        for loss, optimizer in zip((whole, own), optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        average = own.full_tensor().detach() / dist.get_world_size()
        dist.all_reduce(average)
        losses.append((float(average), float(whole)))
    assert all(abs(own - whole) <= 1e-5 for own, whole in losses), losses
    assert losses[-1][1] < 0.9 * losses[0][1]


def costs(group: dist.ProcessGroup) -> None:
    """At most two gathers forward and none backward; 40 bytes per row are saved beside the inputs,
    and a divergence keeps none of the logits it gathered.
    """
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
        mock.patch.object(_collectives, "start_gather", count),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value),
    ):
        stats = fastkl.token_stats(p, mine.tokens, mine.q, shard=shard)
        assert count.calls == 2 and sum(saved) == 40 * len(p)
        torch.autograd.grad(stats.kl.nansum(), p)
        assert count.calls == 2
        saved.clear()
        total = fastkl.total_variation(p, mine.q, shard=shard).nansum()
        assert count.calls == 4 and sum(saved) == 40 * len(p)
        listed = fastkl.topk_kl_divergence(
            p, mine.temperature[:, None].neg(), mine.tokens[:, None], shard=shard
        )
        assert count.calls == 5 and sum(saved) < 1000 * len(p)
        torch.autograd.grad(total + listed.nansum(), p)
        assert count.calls == 5
        outside = fastkl.selective_log_softmax(mine.p, mine.tokens * 0 + 1024, shard=shard)
        assert bool(outside.isnan().all())
    with fastkl.use_backend("triton"):
        assert overlapped(group) == "ppg" + "ppwggw" * 2 + "wgw"
        launched_in_order(mine, shard)


def padded_differently(group: dist.ProcessGroup, backend: str) -> None:
    """A pair of shards, 1000 columns over four ranks as 252 each and as 256 each, or padded on one
    side, gives the bits of one layout, or its rounding where the student's columns move.
    """
    whole, vocabulary = case(1000, 7, torch.float32, 0.1, 250), 1000
    shards = Shard.megatron(group, 252, vocabulary), Shard.megatron(group, 256, vocabulary)
    one, places = whole.on(shards[0], 252), [parallel.cut_of(shards[0], 252)[0]] * 2
    mine = one._replace(q=whole.on(shards[1], 256).q)
    unpadded = one._replace(p=one.p[:, : columns(shards[0], 252)])
    given = [
        *((label, mine, shards) for label in ("stats", "js", *LOSSES)),
        ("stats", unpadded, shards[:1] * 2),
        ("stats", unpadded._replace(q=mine.q), shards),
    ]
    for label, held, pair in given:
        with fastkl.use_backend(backend):
            expected, gradients = results(FUNCTIONS[label], one, shard=shards[0])
            found, parts = results(FUNCTIONS[label], held, shard=pair)
        # DistillationLoss calls with (teacher, student): the student's columns move if both train.
        rounds = backend == "triton" and label in LOSSES
        for result, value in zip(found, expected, strict=True):
            if rounds:
                torch.testing.assert_close(result, value, rtol=1e-5, atol=1e-7)
            else:
                testing.assert_same_bits(result, value, f"padded differently, {label}")
        gradients = _collectives.gather_columns(places, gradients)
        for part, gradient, shard in zip(parts, gradients, pair, strict=True):
            own = columns(shard, part.shape[-1])
            value = gradient[:, shard.start : shard.start + own]
            if rounds:
                atol = 1e-6 * float(gradient.norm())
                torch.testing.assert_close(part[:, :own], value, rtol=0.0, atol=atol)
            else:
                testing.assert_same_bits(part[:, :own], value, f"padded differently, {label}")
            assert not part[:, own:].any()
    p, q = (value.detach().requires_grad_() for value in mine[:2])
    for given, leaves, counted in (
        ((p, mine.q, shards), [p], 1),
        ((mine.q, p, shards[::-1]), [p], 1),
        ((p, q, shards), [p, q], 2),  # the gradient to Q moves back
    ):
        count = Count()
        with (
            fastkl.use_backend("triton"),
            mock.patch.object(_collectives, "start_gather", count),
            CommDebugMode() as moves,  # does not see into ops
        ):
            torch.autograd.grad(fastkl.kl_divergence(*given[:2], shard=given[2]).nansum(), leaves)
        assert count.calls == 2 and moves.get_total_counts() == counted
    with fastkl.use_backend("triton"):
        testing.assert_same_bits(
            torch.vmap(functools.partial(fastkl.kl_divergence, shard=shards))(p[None], q[None])[0],
            fastkl.kl_divergence(p, q, shard=shards),
            "under vmap",
        )


def main(rank: int, folder: str) -> None:
    # A file instead of a port: nothing to collide with.
    store, limit = dist.FileStore(f"{folder}/store", WORLD), datetime.timedelta(hours=1)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=limit)
    torch.set_num_threads(1)
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups, backends = [dist.group.WORLD, halves[rank // 2]], ["reference", "triton"]
    alone = [dist.new_group([each]) for each in range(WORLD)][rank]
    for name in SIZES:
        for backend in backends:
            for group in groups[: 2 if name in SIZES_OF_HALVES else 1]:
                compare(name, backend, group, alone)
    for backend in backends:
        padded_differently(dist.group.WORLD, backend)
        dtensors(backend)
        derivatives(dist.group.WORLD, backend)
        linear(groups[0], backend, "sequence", 62)
        linear(groups[1], backend, "replicated", 61)
    train(sharded=False)
    train(sharded=True)
    costs(dist.group.WORLD)
    mistakes(rank, dist.group.WORLD)
    dist.monitored_barrier()
    if rank == 3:
        os._exit(0)
    with pytest.raises(RuntimeError, match="(?i)connection|closed|reset"):
        fastkl.kl_divergence(*torch.zeros(2, 3, 5), shard=Shard.megatron(dist.group.WORLD, 5, 20))
    # Threads of gloo that still run abort an interpreter that exits.
    os._exit(0)


def run() -> tuple[int, str]:
    switches = {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    return background.run([sys.executable, __file__], ROOT, {**os.environ, **switches})


def start_in_background() -> concurrent.futures.Future:
    return background.submit(run)


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_ranks_compute_as_one_process() -> None:
    pytest.importorskip("triton")
    code, output = start_in_background().result()
    assert code == 0, output[-8000:]


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_one_graph(one_process) -> None:
    """torch.compile traces shards and DTensors in one graph."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard as Split
    from torch.distributed.tensor import distribute_tensor

    whole, shard = case(64, 2, torch.float32, 0.1, 64), Shard(one_process, 0, 64)
    mesh = init_device_mesh("cpu", (1,))
    p, q = (distribute_tensor(value, mesh, [Split(1)]) for value in whole[:2])
    exact = fastkl.kl_divergence(whole.p, whole.q)
    places = [parallel.cut_of(shard, width)[0] for width in (64, 66)]

    def moved(p: torch.Tensor) -> torch.Tensor:
        return _collectives.Moved.apply(p, one_process, *places, 66, (True, False))[:, :64]

    for call, given in (
        (lambda p, q: fastkl.kl_divergence(p, q, shard=shard), (whole.p, whole.q)),
        (lambda p, q: fastkl.kl_divergence(p, q).to_local(), (p, q)),
        (lambda p, q: fastkl.kl_divergence(moved(p), q), (whole.p, whole.q)),
    ):
        torch._dynamo.reset()
        leaf = given[0].detach().clone().requires_grad_()
        result = torch.compile(call, fullgraph=True, backend="aot_eager")(leaf, given[1])
        testing.assert_same_bits(result, exact, "compiled")
        assert torch.autograd.grad(result.sum(), leaf)[0].shape == leaf.shape


if __name__ == "__main__":
    import quick_interpreter

    quick_interpreter.hurry()
    # Not spawn: each process would import torch and Triton again.
    start = functools.partial(torch.multiprocessing.start_processes, start_method="fork")
    with tempfile.TemporaryDirectory() as folder:
        start(different_rows, (folder, 3), 2)
        (pathlib.Path(folder) / "passed").unlink()
        for rows in (0, 2, 4):
            # gloo ends the process whose buffer is too small, the other loses its connection.
            with pytest.raises((ProcessExitedException, ProcessRaisedException)):
                start(different_rows, (folder, rows), 2)
        assert not (pathlib.Path(folder) / "passed").exists()
        start(main, (folder,), WORLD)
