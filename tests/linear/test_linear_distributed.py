"""The linear functions inside DDP and FSDP2: two gloo processes on CPU tensors against one process
on the whole batch.
"""

import collections
import contextlib
import copy
import datetime
import functools
import math
import os
import pathlib
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.nn.parallel import DistributedDataParallel

import fastkl
from fastkl.rl import PIDBeta

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORLD, STEPS, RATE = 2, 2, 0.5
X, H, H_REF, V = 6, 8, 5, 19
# The sequences of each rank, together and one by one.
HALVES = slice(0, 2), slice(2, 4)
SEQUENCES = (slice(0, 1), slice(1, 2)), (slice(2, 3), slice(3, 4))


# Arguments of forward. The reference's hidden states and lm_head are data here: nothing learns
# through them.
Batch = collections.namedtuple("Batch", "x, ref_hidden, ref_weight, mask, weights")


def batch() -> Batch:
    """Draw four sequences of three tokens, of which the first half counts fewer than the second.
    All values are exact in bfloat16.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 3, X), (4, 3, H_REF), (V, H_REF), (4, 3)
    made = [torch.randint(-16, 17, shape, generator=generator) / 8 for shape in shapes]
    mask = (torch.arange(12) > 2).view(4, 3) & (made[3] != made[3][3, 2])
    return Batch(*made[:3], mask, made[3].abs() + 0.25)


def part(whole: Batch, rows: slice) -> Batch:
    return whole._make(value if len(value) == V else value[rows] for value in whole)


def by_logits(hidden: torch.Tensor, weight: torch.Tensor, data: Batch) -> tuple:
    return hidden @ weight.T, data.ref_hidden @ data.ref_weight.T, data.mask


# Means over tokens (or sequences) of (hidden, weight, data), divided by a normalizer.
LOSSES = {
    "none": lambda hidden, weight, data, n: (
        data.weights * fastkl.linear_kl_divergence(hidden, weight, *data[1:3], mask=data.mask) / n
    ).sum(),
    "mean": lambda hidden, weight, data, n: fastkl.linear_kl_divergence(
        *(hidden, weight, *data[1:3]),
        mask=data.mask,
        weights=data.weights,
        reduction="mean",
        normalizer=n,
    ),
    "penalty": lambda hidden, weight, data, n: fastkl.LinearKLPenalty(0.5)(
        hidden, weight, *data[1:4], normalizer=n
    ),
    "sequences": lambda hidden, weight, data, n: fastkl.LinearKLPenalty(
        0.5, reduction="sequence_mean"
    )(hidden, weight, *data[1:4], normalizer=n),
    "logits": lambda hidden, weight, data, n: fastkl.kl_divergence(
        *by_logits(hidden, weight, data), weights=data.weights, reduction="mean", normalizer=n
    ),
    "logits, penalty": lambda *made: fastkl.KLPenalty(0.5)(
        *by_logits(*made[:3]), normalizer=made[3]
    ),
    "logits, sequences": lambda *made: fastkl.KLPenalty(0.5, reduction="sequence_mean")(
        *by_logits(*made[:3]), normalizer=made[3]
    ),
}


class Head(torch.nn.Linear):
    def loss(self, name: str, hidden: torch.Tensor, data: Batch, normalizer: float) -> torch.Tensor:
        return LOSSES[name](hidden, self.weight, data, normalizer)


class Policy(torch.nn.Module):
    """A trunk, an lm_head, and a forward that returns the loss: DDP and FSDP gather and reduce
    around forward, not around .weight.
    """

    def __init__(self, loss: str, frozen: bool = False, unshard: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = torch.nn.Linear(X, H), torch.nn.Tanh(), torch.nn.Linear(H, H)
        self.trunk, self.lm_head = torch.nn.Sequential(*layers), Head(H, V, bias=False)
        torch.nn.init.normal_(self.lm_head.weight, std=0.7).requires_grad_(not frozen)
        self.loss, self.unshard = loss, unshard

    def forward(self, normalizer: float, *data: torch.Tensor) -> torch.Tensor:
        hidden = self.trunk(data[0])
        if self.unshard and hasattr(self.lm_head, "unshard"):
            self.lm_head.unshard()
        return self.lm_head.loss(self.loss, hidden, Batch(*data), normalizer)


def with_fsdp(
    model: Policy, *, layers: bool = False, head: str = "", dtype: torch.dtype | None = None
) -> torch.nn.Module:
    """FSDP2 around the root, and around each layer of the trunk or the lm_head ("method": its
    `loss` gathers as forward does). Everything is sharded again after forward, the root too.
    """
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh

    shard = functools.partial(
        fsdp.fully_shard,
        mesh=init_device_mesh("cpu", (WORLD,)),
        mp_policy=fsdp.MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        reshard_after_forward=True,
    )
    for part in (*(model.trunk[::2] if layers else ()), *([model.lm_head] if head else ())):
        shard(part)
    if head == "method":
        fsdp.register_fsdp_forward_method(model.lm_head, "loss")
    return shard(model)


# name: (a Policy's options, with_fsdp's; None for DDP).
SCENARIOS = {
    **{f"ddp: {loss}": ({"loss": loss}, None) for loss in LOSSES},
    "ddp: frozen lm_head": ({"loss": "mean", "frozen": True}, None),
    "fsdp: mean": ({"loss": "mean"}, {}),
    "fsdp: none, layers": ({"loss": "none"}, {"layers": True}),
    "fsdp: frozen lm_head": ({"loss": "mean", "frozen": True}, {"layers": True}),
    "fsdp: bfloat16, mean": ({"loss": "mean"}, {"dtype": torch.bfloat16}),
    "fsdp: bfloat16, none": ({"loss": "none"}, {"dtype": torch.bfloat16}),
    "fsdp: sharded lm_head, its own method": ({"loss": "mean"}, {"head": "method"}),
    "fsdp: sharded lm_head, none": ({"loss": "none"}, {"head": "method"}),
    "fsdp: sharded lm_head, unshard": ({"loss": "mean", "unshard": True}, {"head": "own"}),
}


def alone(model: Policy, whole: Batch, total: float, dtype: torch.dtype | None) -> torch.Tensor:
    """Leave the gradients of the whole batch in a plain model and return its loss; in a shorter
    type, in which each rank rounds, of the ranks' parts one by one.
    """
    if dtype is None:
        loss = model(total, *whole)
        loss.backward()
        return loss
    losses = []
    for rank in range(WORLD):
        short = copy.deepcopy(model).to(dtype)
        mine = [v.to(dtype) if v.is_floating_point() else v for v in part(whole, HALVES[rank])]
        losses.append(short(total / WORLD, *mine) / WORLD)
        losses[-1].backward()
        for value, rounded in zip(model.parameters(), short.parameters(), strict=True):
            value.grad = rounded.grad.float() + (0.0 if value.grad is None else value.grad)
    return sum(losses)


def train(rank: int, options: dict, sharded: dict | None) -> None:
    """Compare two steps of SGD on this rank's half with two of a plain copy on the whole batch: the
    loss, and the gradient of every parameter, to 1e-6 in norm. DDP and FSDP average, hence a
    normalizer of the tokens of all ranks / world_size. DDP accumulates a sequence at a time.
    """
    whole, model = batch(), Policy(**options)
    plain = copy.deepcopy(model)
    counted = whole.mask.any(-1) if "sequences" in options["loss"] else whole.mask
    wrapped = DistributedDataParallel(model) if sharded is None else with_fsdp(model, **sharded)
    total, parts = float(counted.sum()), SEQUENCES[rank] if sharded is None else [HALVES[rank]]
    optimizers = [torch.optim.SGD(some.parameters(), lr=RATE) for some in (wrapped, plain)]
    for _ in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        average = torch.zeros(())
        for mine in parts:
            with contextlib.nullcontext() if mine is parts[-1] else wrapped.no_sync():
                loss = wrapped(total / WORLD, *part(whole, mine))
                # A DTensor between forward and backward; unshard() keeps it whole until then.
                again = sharded is not None and "unshard" not in options
                assert hasattr(model.lm_head.weight, "full_tensor") == again
                loss.backward()
                average += loss.detach() / WORLD
        expected = alone(plain, whole, total, (sharded or {}).get("dtype"))
        dist.all_reduce(average)
        assert abs(average - expected) <= 1e-6 * expected
        for (name, value), exact in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert (value.grad is None) == (exact.grad is None) == (not exact.requires_grad), name
            if exact.grad is not None:
                grad = value.grad.full_tensor() if sharded is not None else value.grad
                assert (grad - exact.grad).norm() <= 1e-6 * exact.grad.norm(), name
        for optimizer in optimizers:
            optimizer.step()


def control(rank: int) -> None:
    """Equal betas on all ranks, those of one process on all samples; a wrong KL of one is an error
    on every one.
    """
    controller, pooled, world = PIDBeta(0.1, 0.05), PIDBeta(0.1, 0.05), dist.group.WORLD
    betas = [controller.update((0.02, 0.2)[rank], (1, 30)[rank], process_group=world)] * WORLD
    assert betas[rank] == pytest.approx(pooled.update((0.02 + 0.2 * 30) / 31, 31), rel=1e-6)
    dist.all_gather_object(betas, controller.beta)
    assert betas == [controller.beta] * WORLD
    with pytest.raises(ValueError, match="^kl: expected"):
        controller.update((0.1, math.nan)[rank], 1, process_group=world)


def main(rank: int, folder: str) -> None:
    # A file instead of a port: nothing to collide with.
    store, limit = dist.FileStore(f"{folder}/store", WORLD), datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=limit)
    for name, scenario in SCENARIOS.items():
        print(name, flush=True)
        train(rank, *scenario)
    control(rank)
    # Its gradient would be each rank's own: full_tensor() reduces nothing.
    message = r"^weight: expected a plain .*, got a DTensor\b.*; (?!.*full_tensor).*\bforward\b"
    with pytest.raises(TypeError, match=message):
        with_fsdp(Policy("mean"), head="own")(1.0, *part(batch(), HALVES[rank]))
    dist.monitored_barrier()
    dist.destroy_process_group()
    # Threads of gloo that still run abort an interpreter that exits.
    os._exit(0)


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_ranks_train_as_one_process(tmp_path) -> None:
    torch.multiprocessing.spawn(main, (str(tmp_path),), nprocs=WORLD)


WITHOUT = """
import sys, torch
torch.distributed.is_available = lambda: False
loaded = [name for name in sys.modules if name.startswith("torch.distributed.")]
for name in [*loaded, "torch.distributed.tensor"]:
    sys.modules[name] = None
import fastkl
hidden = torch.ones(2, 3, requires_grad=True)
fastkl.linear_kl_divergence(hidden, torch.eye(3), torch.zeros(2, 3), reduction="mean").backward()
"""


def test_without_torch_distributed() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, check=True)
