"""One of two gloo processes on CPU tensors, started by test_linear_distributed.py: python
distributed_worker.py FOLDER, with RANK and WORLD_SIZE set.

Each scenario trains a model for two steps on this rank's half of a batch, under DDP or FSDP2, and
beside it a plain copy on the whole batch; FOLDER/rank<RANK>.json has their differences.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import json
import os
import pathlib
import sys
import traceback
from collections.abc import Callable
from typing import NamedTuple

import torch

import fastkl

X, H, H_REF, V = 6, 8, 5, 19
SEQUENCES, TIME = 4, 3
WORLD = 2
STEPS, RATE = 2, 0.5


class Batch(NamedTuple):
    """Arguments of forward. The reference's hidden states and lm_head are data here: nothing learns
    through them.
    """

    x: torch.Tensor
    ref_hidden: torch.Tensor
    ref_weight: torch.Tensor
    mask: torch.Tensor
    weights: torch.Tensor

    def half(self, rank: int) -> Batch:
        """The sequences of one rank."""
        mine = slice(rank * SEQUENCES // WORLD, (rank + 1) * SEQUENCES // WORLD)
        return self._replace(
            **{name: getattr(self, name)[mine] for name in ("x", "ref_hidden", "mask", "weights")}
        )

    def to(self, dtype: torch.dtype) -> Batch:
        """Float tensors in another type, as FSDP's mixed precision casts what forward takes."""
        return Batch(*(value.to(dtype) if value.is_floating_point() else value for value in self))


def batch(masked: tuple[int, ...] = (1, 8)) -> Batch:
    """A batch in which the tokens at `masked` do not count: by default one of each rank. All values
    are exact in bfloat16.
    """
    generator = torch.Generator().manual_seed(0)

    def eighths(*shape: int) -> torch.Tensor:
        return torch.randint(-16, 17, shape, generator=generator) / 8

    mask = torch.ones(SEQUENCES * TIME, dtype=torch.bool)
    mask[list(masked)] = False
    return Batch(
        eighths(SEQUENCES, TIME, X),
        eighths(SEQUENCES, TIME, H_REF),
        eighths(V, H_REF),
        mask.view(SEQUENCES, TIME),
        eighths(SEQUENCES, TIME).abs() + 0.25,
    )


class Head(torch.nn.Linear):
    """An lm_head that can return the loss instead of logits."""

    def loss(self, hidden: torch.Tensor, data: Batch, reduction: str | Callable) -> torch.Tensor:
        """The weighted mean, or sum, of KL(policy‖reference) over this batch; or what a function
        makes of (hidden, weight, data).
        """
        if callable(reduction):
            return reduction(hidden, self.weight, data)
        if reduction == "none":
            kl = fastkl.linear_kl_divergence(*heads(hidden, self.weight, data), mask=data.mask)
            return (data.weights * kl).sum() / data.mask.sum()
        given = {"weights": data.weights, "mask": data.mask, "reduction": reduction}
        return fastkl.linear_kl_divergence(*heads(hidden, self.weight, data), **given)


class Policy(torch.nn.Module):
    """A trunk, an lm_head, and a forward that returns the loss: DDP and FSDP gather and reduce
    around forward, not around .weight.
    """

    def __init__(
        self, reduction: str = "mean", frozen: bool = False, unshard: bool = False
    ) -> None:
        super().__init__()
        self.trunk = torch.nn.Sequential(
            torch.nn.Linear(X, H), torch.nn.Tanh(), torch.nn.Linear(H, H)
        )
        self.lm_head = Head(H, V, bias=False).requires_grad_(not frozen)
        self.reduction, self.unshard = reduction, unshard

    def forward(self, *data: torch.Tensor) -> torch.Tensor:
        """The loss of a batch, whose fields come one by one so that FSDP can cast them."""
        hidden = self.trunk(data[0])
        if self.unshard and hasattr(self.lm_head, "unshard"):
            self.lm_head.unshard()
        return self.lm_head.loss(hidden, Batch(*data), self.reduction)


def seeded(**options: bool | str) -> Policy:
    """The same Policy in every process."""
    torch.manual_seed(0)
    model = Policy(**options)
    torch.nn.init.normal_(model.lm_head.weight, std=0.7)
    return model


def plain_step(model: Policy, whole: Batch, dtype: torch.dtype | None) -> float:
    """Leaves the gradients of the whole batch in a plain model, and returns its loss.

    In a shorter type, gradients are rounded on each rank before they are averaged: there the halves
    are run one by one, as the ranks do.
    """
    if dtype is None:
        loss = model(*whole)
        loss.backward()
        return loss.item()
    losses, copies = [], [copy.deepcopy(model).to(dtype) for _ in range(WORLD)]
    for rank, short in enumerate(copies):
        losses.append(short(*whole.half(rank).to(dtype)))
        losses[-1].backward()
    for value, *shorts in zip(
        model.parameters(), *(short.parameters() for short in copies), strict=True
    ):
        value.grad = (
            None if shorts[0].grad is None else sum(short.grad.float() for short in shorts) / WORLD
        )
    return sum(loss.item() for loss in losses) / WORLD


def whole_tensor(value: torch.Tensor | None) -> torch.Tensor | None:
    """A gradient, gathered from the ranks where it is sharded."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def relative(value: torch.Tensor, exact: torch.Tensor) -> float:
    """The L2 norm of the difference over that of the second."""
    return float((value.double() - exact.double()).norm() / exact.double().norm())


def train(
    rank: int,
    model: Policy,
    wrap: Callable,
    whole: Batch,
    *,
    scale: float = 1.0,
    plain_scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> dict:
    """Two steps of wrap(model) on this rank's half against two of a plain copy on the whole batch:
    what either saw.

    `scale` and `plain_scale` multiply the losses; "alone" is how far off a rank's gradient is
    before any reduction.
    """
    import torch.distributed as dist

    plain, alone = copy.deepcopy(model), copy.deepcopy(model)
    (scale * alone(*whole.half(rank))).backward()
    wrapped = wrap(model)
    optimizers = [torch.optim.SGD(some.parameters(), lr=RATE) for some in (wrapped, plain)]
    found: dict = {"losses": [], "gradients": [], "sharded": [], "frozen": []}
    for _ in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = scale * wrapped(*whole.half(rank))
        found["sharded"].append(
            hasattr(model.lm_head.weight, "full_tensor")
        )  # a DTensor again, between forward and backward
        loss.backward()
        expected = plain_step(plain, whole, dtype) * plain_scale
        total = loss.detach().clone()
        dist.all_reduce(total)
        found["losses"].append([total.item() / WORLD, expected])
        for (name, value), exact in zip(model.named_parameters(), plain.parameters(), strict=True):
            if exact.grad is None or value.grad is None:
                assert value.grad is None and exact.grad is None, (
                    f"{name}.grad: {value.grad}, in one process {exact.grad}"
                )
                found["frozen"].append(name)
                continue
            exact.grad.mul_(plain_scale)
            found["gradients"].append(
                [name, relative(whole_tensor(value.grad), exact.grad), float(exact.grad.norm())]
            )
        if len(found["losses"]) == 1:
            found["alone"] = min(
                relative(one.grad, exact.grad)
                for one, exact in zip(alone.parameters(), plain.parameters(), strict=True)
                if exact.grad is not None
            )
        for optimizer in optimizers:
            optimizer.step()
    return found


# ---- ways to wrap a model


def with_ddp(model: Policy) -> torch.nn.Module:
    """DistributedDataParallel."""
    return torch.nn.parallel.DistributedDataParallel(model)


def with_fsdp(
    model: Policy, *, layers: bool = False, head: str = "", dtype: torch.dtype | None = None
) -> torch.nn.Module:
    """FSDP2 around the root, and around each layer of the trunk or the lm_head ("method": its
    `loss` gathers as forward does). Everything is sharded again after forward, the root too.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    policy = (
        MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        if dtype
        else MixedPrecisionPolicy()
    )
    shard = functools.partial(
        fully_shard,
        mesh=init_device_mesh("cpu", (WORLD,)),
        mp_policy=policy,
        reshard_after_forward=True,
    )
    for layer in (model.trunk[0], model.trunk[2]) if layers else ():
        shard(layer)
    if head:
        shard(model.lm_head)
    if head == "method":
        register_fsdp_forward_method(model.lm_head, "loss")
    return shard(model)


def with_fsdp_no_gathered_head(rank: int) -> dict:
    """The error of an lm_head that is a sharded module of its own, read without its forward."""
    try:
        with_fsdp(seeded(), head="own")(*batch().half(rank))
    except TypeError as error:
        return {"error": str(error)}
    return {"error": ""}


# ---- means over micro-batches and ranks of different lengths


def logits(
    hidden: torch.Tensor, weight: torch.Tensor, data: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """The policy's and the reference's."""
    return hidden @ weight.T, data.ref_hidden @ data.ref_weight.T


def heads(hidden: torch.Tensor, weight: torch.Tensor, data: Batch) -> tuple[torch.Tensor, ...]:
    """Return what the linear functions take first."""
    return hidden, weight, data.ref_hidden, data.ref_weight


LOSSES: dict[str, Callable] = {
    "kl_divergence": lambda *made, **more: fastkl.kl_divergence(
        *logits(*made), made[2].mask, weights=made[2].weights, reduction="mean", **more
    ),
    "KLPenalty": lambda *made, **more: fastkl.KLPenalty(0.5)(*logits(*made), made[2].mask, **more),
    "KLPenalty, sequences": lambda *made, **more: fastkl.KLPenalty(0.5, reduction="sequence_mean")(
        *logits(*made), made[2].mask, **more
    ),
    "linear_kl_divergence": lambda *made, **more: fastkl.linear_kl_divergence(
        *heads(*made), mask=made[2].mask, weights=made[2].weights, reduction="mean", **more
    ),
    "LinearKLPenalty": lambda *made, **more: fastkl.LinearKLPenalty(0.5)(
        *heads(*made), made[2].mask, **more
    ),
}
# (sequences, tokens) of each rank's micro-batches: one rank has a third of the other's tokens. The
# rest does not count.
MICRO_BATCHES = (((slice(0, 1), slice(2)),), ((slice(1, 2), slice(2)), (slice(2, 4), slice(3))))


def accumulate(rank: int, name: str) -> dict:
    """Relative L2 errors of each parameter's gradient, accumulated over micro-batches and averaged
    by DDP, with a normalizer and without.
    """
    import torch.distributed as dist

    whole, found = batch((2, 5, 7)), {}
    plain = seeded(reduction=LOSSES[name])
    plain(*whole).backward()
    parts = [
        whole._replace(
            **{
                field: getattr(whole, field)[rows, times]
                for field in ("x", "ref_hidden", "mask", "weights")
            }
        )
        for rows, times in MICRO_BATCHES[rank]
    ]
    total = torch.tensor(
        float(
            sum((part.mask.any(-1) if "sequences" in name else part.mask).sum() for part in parts)
        )
    )
    dist.all_reduce(total)
    for normalizer in (total / WORLD, None):
        model = seeded(reduction=functools.partial(LOSSES[name], normalizer=normalizer))
        wrapped = with_ddp(model)
        for part in parts:
            with contextlib.nullcontext() if part is parts[-1] else wrapped.no_sync():
                (wrapped(*part) / (1 if normalizer is not None else len(parts))).backward()
        found["default" if normalizer is None else "normalizer"] = [
            relative(value.grad, exact.grad)
            for value, exact in zip(model.parameters(), plain.parameters(), strict=True)
        ]
    return found


UNEVEN = (0, 1, 2, 7)  # masked tokens: three of the first rank, one of the second
BF16 = torch.bfloat16
NONE, FROZEN = {"reduction": "none"}, {"frozen": True}
# name: (a Policy's options, with_fsdp's; None for DDP). A mean over all ranks' tokens where they
# count differently many: the sum, times ranks (DDP averages), over the number of all.
TRAINED: dict[str, tuple[dict, dict | None]] = {
    "ddp: mean": ({}, None),
    "ddp: sum, uneven ranks": ({"reduction": "sum"}, None),
    "ddp: none": (NONE, None),
    "ddp: frozen lm_head": (FROZEN, None),
    "fsdp: mean": ({}, {}),
    "fsdp: mean, layers": ({}, {"layers": True}),
    "fsdp: none": (NONE, {}),
    "fsdp: frozen lm_head": (FROZEN, {"layers": True}),
    "fsdp: bfloat16, mean": ({}, {"dtype": BF16}),
    "fsdp: bfloat16, none": (NONE, {"dtype": BF16}),
    "fsdp: sharded lm_head, its own method": ({}, {"head": "method"}),
    "fsdp: sharded lm_head, none": (NONE, {"head": "method"}),
    "fsdp: sharded lm_head, unshard": ({"unshard": True}, {"head": "own"}),
}


def scenario_of(rank: int, name: str) -> dict:
    """Train one of TRAINED."""
    options, sharded = TRAINED[name]
    more = {"scale": WORLD / 8, "plain_scale": 1 / 8} if "uneven" in name else {}
    wrap = with_ddp if sharded is None else functools.partial(with_fsdp, **sharded)
    dtype = None if sharded is None else sharded.get("dtype")
    whole = batch(UNEVEN) if more else batch()
    return train(rank, seeded(**options), wrap, whole, dtype=dtype, **more)


SCENARIOS: dict[str, Callable[[int], dict]] = {
    **{name: functools.partial(scenario_of, name=name) for name in TRAINED},
    "fsdp: sharded lm_head, not gathered": with_fsdp_no_gathered_head,
    **{f"normalizer: {name}": functools.partial(accumulate, name=name) for name in LOSSES},
}


def main(folder: pathlib.Path) -> None:
    """Run every scenario; one that raises is recorded, and the next is run if the other rank also
    comes to it.
    """
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    store = dist.FileStore(
        str(folder / "store"), WORLD
    )  # a file instead of a port: nothing to collide with
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=20)
    )
    results = {}
    for name, scenario in SCENARIOS.items():
        try:
            results[name] = scenario(rank)
        except Exception:
            results[name] = {"raised": traceback.format_exc()}
        (folder / f"rank{rank}.json").write_text(json.dumps(results), encoding="utf-8")
        dist.monitored_barrier(timeout=datetime.timedelta(seconds=30))
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
