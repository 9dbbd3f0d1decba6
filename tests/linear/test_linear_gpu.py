"""What only a GPU can show of the functions on hidden states: no synchronisation, CUDA graphs, the
peak of memory, another device.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import cases
import pytest
import test_linear_costs as costs
import torch

import fastkl
from fastkl.ops import chunks

pytestmark = pytest.mark.gpu
N, H, V = 300, 64, 1003


def step(made: dict[str, torch.Tensor], kind: str) -> list[torch.Tensor]:
    """Results and gradients to hidden, weight and bias of one training step."""
    common = {
        name: made[name]
        for name in (
            "hidden",
            "weight",
            "ref_hidden",
            "ref_weight",
            "bias",
            "ref_bias",
            "mask",
            "temperature",
        )
    }
    if kind == "stats":
        results = fastkl.linear_token_stats(tokens=made["tokens"], **common, chunk_size=128)
        loss = sum((value * made["weights"]).sum() for value in results)
    elif kind == "none":
        results = [fastkl.linear_kl_divergence(**common, softcap=20.0, chunk_size=128)]
        loss = (results[0] * made["weights"]).sum()
    else:
        loss = fastkl.linear_kl_divergence(
            **common, weights=made["weights"], reduction="mean", chunk_size=128
        )
        results = [loss]
    return [
        *results,
        *torch.autograd.grad(loss, [made[name] for name in ("hidden", "weight", "bias")]),
    ]


def inputs(
    device: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Everything that `step` takes; hidden, weight and bias learn."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "hidden": (N, H),
        "weight": (V, H),
        "ref_hidden": (N, 48),
        "ref_weight": (V, 48),
        "bias": (V,),
        "ref_bias": (V,),
    }
    made = {
        name: torch.randn(shape, generator=generator).to(device, dtype)
        for name, shape in shapes.items()
    }
    made |= {
        "mask": (torch.rand(N, generator=generator) < 0.8).to(device),
        "tokens": torch.randint(V, (N,), generator=generator).to(device),
        "temperature": (0.5 + torch.rand(N, generator=generator)).to(device),
        "weights": torch.randn(N, generator=generator).to(device),
    }
    for name in ("hidden", "weight", "bias"):
        made[name].requires_grad_()
    return made


KINDS = ("none", "mean", "stats")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_no_synchronisation(kind, dtype) -> None:
    """Forward and backward never wait for the GPU, mask and weights included."""
    made = inputs("cuda", dtype)
    penalty = fastkl.LinearKLPenalty(0.1, reduction="sequence_mean")
    step(made, kind)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(made, kind)
        penalty(
            made["hidden"], made["weight"], made["ref_hidden"], made["ref_weight"], made["mask"]
        ).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", KINDS)
def test_cuda_graph(kind) -> None:
    """Captured once and replayed on other data, with eager's bits."""
    made, other = inputs("cuda", seed=0), inputs("cuda", seed=1)
    graph, results = cases.captured(lambda: step(made, kind))
    expected = [value.detach().clone() for value in step(other, kind)]
    with torch.no_grad():
        for name, value in made.items():
            value.copy_(other[name])
    graph.replay()
    torch.cuda.synchronize()
    for result, value in zip(results, expected, strict=True):
        assert torch.equal(result, value) and bool((value != 0).any())


def peak(call: Callable) -> int:
    """Bytes allocated at once beside what was there before, in a second call."""
    call()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("n, one_product", [(4096, True), (12288, False)])
@pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float32])
def test_peak_memory(logits_dtype, n, one_product) -> None:
    """The docstring's formula, the returned gradients and little else: forward alone, and with a
    trainable weight.
    """
    h, v = 2048, 128256
    made = costs.tensors("cuda", n=n, h=h, v=v)
    policy, frozen, ref = (
        costs.head_on_meta(n, h, v, trainable=learns, logits_dtype=logits_dtype)
        for learns in (True, False, False)
    )
    slack = (
        64 * n + n * 4 * 28 + (1 << 24)
    )  # saved values, the row kernels' partial states, and cuBLAS's own workspace

    def loss() -> torch.Tensor:
        return fastkl.linear_kl_divergence(**made, reduction="sum", logits_dtype=logits_dtype)

    with torch.no_grad():
        assert peak(loss) <= costs.workspace(frozen, ref) + slack
    assert (
        peak(lambda: costs.gradients_of(loss(), made))
        <= costs.workspace(policy, ref) + 2 * (n * h + v * h) + slack
    )
    assert (chunks.plan(n, [policy, ref], None).window == n) == one_product


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", KINDS)
def test_another_device_than_the_current_one(kind) -> None:
    """Results are those of the first device, to the bit."""
    results = [step(inputs(device), kind) for device in ("cuda:0", "cuda:1")]
    assert all(
        torch.equal(first.cpu(), second.cpu()) for first, second in zip(*results, strict=True)
    )
