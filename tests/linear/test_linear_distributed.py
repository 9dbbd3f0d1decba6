"""The linear functions inside DDP and FSDP2: two gloo processes on CPU tensors against one process
on the whole batch.
"""

import copy
import datetime
import functools
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.nn.parallel import DistributedDataParallel

import fastkl

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORLD, STEPS, RATE = 2, 2, 0.5
X, H, H_REF, V = 6, 8, 5, 19


class Batch(NamedTuple):
    """Arguments of forward. The reference's hidden states and lm_head are data here: nothing learns
    through them.
    """

    x: torch.Tensor
    ref_hidden: torch.Tensor
    ref_weight: torch.Tensor
    mask: torch.Tensor
    weights: torch.Tensor


def batch() -> Batch:
    """Draw four sequences of three tokens, of which the first half counts fewer than the second.
    All values are exact in bfloat16.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 3, X), (4, 3, H_REF), (V, H_REF), (4, 3)
    made = [torch.randint(-16, 17, shape, generator=generator) / 8 for shape in shapes]
    mask = (torch.arange(12) > 2).view(4, 3) & (made[3] != made[3][3, 2])
    return Batch(*made[:3], mask, made[3].abs() + 0.25)


def halved(whole: Batch, rank: int) -> Batch:
    mine = {name: value[2 * rank : 2 * rank + 2] for name, value in whole._asdict().items()}
    return Batch(**{**mine, "ref_weight": whole.ref_weight})


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
    parts = [model.trunk[0], model.trunk[2]] if layers else []
    for part in (*parts, *([model.lm_head] if head else [])):
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


def train(rank: int, options: dict, sharded: dict | None) -> None:
    """Compare two steps of SGD on this rank's half with two of a plain copy on the whole batch: the
    loss, and the gradient of every parameter, to 1e-6 in norm. DDP and FSDP average, hence a
    normalizer of the tokens of all ranks / world_size.
    """
    whole, model = batch(), Policy(**options)
    plain, half = copy.deepcopy(model), halved(whole, rank)
    counted = whole.mask.any(-1) if options["loss"] == "sequences" else whole.mask
    total, limit = float(counted.sum()), 0.05 if (sharded or {}).get("dtype") else 1e-6
    wrapped = DistributedDataParallel(model) if sharded is None else with_fsdp(model, **sharded)
    optimizers = [torch.optim.SGD(some.parameters(), lr=RATE) for some in (wrapped, plain)]
    for _ in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss, expected = wrapped(total / WORLD, *half), plain(total, *whole)
        # A DTensor again, between forward and backward; unshard() keeps it whole until then.
        again = sharded is not None and "unshard" not in options
        assert hasattr(model.lm_head.weight, "full_tensor") == again
        loss.backward()
        expected.backward()
        average = loss.detach() / WORLD
        dist.all_reduce(average)
        assert abs(average - expected) <= limit * expected
        for (name, value), exact in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert (value.grad is None) == (exact.grad is None) == (not exact.requires_grad), name
            if exact.grad is not None:
                grad = value.grad.full_tensor() if sharded is not None else value.grad
                error = float((grad - exact.grad).norm() / exact.grad.norm())
                assert error <= limit, f"{name}: the gradient is {error:.3g} off in norm"
        for optimizer in optimizers:
            optimizer.step()


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    options = {"rank": rank, "world_size": WORLD, "timeout": datetime.timedelta(seconds=60)}
    # A file instead of a port: nothing to collide with.
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", WORLD), **options)
    for name, scenario in SCENARIOS.items():
        print(name, flush=True)
        train(rank, *scenario)
    # Its gradient would be each rank's own: full_tensor() reduces nothing.
    form = (
        r"^weight: expected a plain tensor, .*, got a DTensor\b.*; (?!.*full_tensor).*\bforward\b"
    )
    with pytest.raises(TypeError, match=form):
        with_fsdp(Policy("mean"), head="own")(1.0, *halved(batch(), rank))
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
