"""The functions on hidden states on a GPU alone: no synchronisation, CUDA graphs, the peak of
memory, another device.
"""

from __future__ import annotations

import cases
import linear_cases
import linear_inputs
import linear_plan
import memory
import pytest
import torch
from linear_inputs import Case, small_case
from linear_plan import planned, workspace
from test_linear_costs import gradients_of, tensors

import fastkl

pytestmark = pytest.mark.gpu
N, LEARNED = 300, ("hidden", "weight", "bias")
kinds = pytest.mark.parametrize("kind", ["none", "mean", "stats"])


def made(
    kind: str, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Case:
    """Make a case whose tensors are on a device, upstream gradients of 1 included."""
    sizes = {"vocabulary": 1003, "width": 64, "ref_width": 48, "seed": seed}
    case = small_case(kind, dtype, leading=(N,), sizes=sizes, chunk_size=128, random=False)
    generator = torch.Generator().manual_seed(seed)
    vectors = {
        "mask": torch.rand(N, generator=generator) < 0.8,
        "temperature": 0.5 + torch.rand(N, generator=generator),
        "tokens": torch.randint(1003, (N,), generator=generator),
    }
    moved = {name: value.to(device) for name, value in vectors.items()}
    return case.but(trainable=LEARNED, softcap=20.0 if kind == "none" else None, **moved)


def step(case: Case, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run one training step."""
    return linear_cases.differentiate(case, inputs, linear_cases.call(case, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@kinds
def test_no_synchronisation(kind, dtype) -> None:
    """Forward and backward never wait for the GPU, mask and weights included."""
    case = made(kind, dtype=dtype)
    inputs = linear_inputs.leaves(case, device="cuda")
    penalty = fastkl.LinearKLPenalty(0.1, reduction="sequence_mean")
    step(case, inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(case, inputs)
        penalty(**linear_cases.arguments(case, inputs)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@kinds
def test_cuda_graph(kind) -> None:
    """Captured once and replayed on other data, with eager's bits."""
    case, other = (made(kind, seed=seed) for seed in (0, 1))
    inputs, others = (linear_inputs.leaves(each, device="cuda") for each in (case, other))
    graph, results = cases.captured(lambda: step(case, inputs))
    expected = {name: value.clone() for name, value in step(other, others).items()}
    with torch.no_grad():
        for name, value in inputs.items():
            value.copy_(others[name])
    for name in ("mask", "temperature", "tokens"):
        getattr(case, name).copy_(getattr(other, name))
    graph.replay()
    torch.cuda.synchronize()
    for name, value in expected.items():
        assert torch.equal(results[name], value) and bool((value != 0).any())


@pytest.mark.parametrize("n, one_product", [(4096, True), (12288, False)])
@pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float32])
def test_peak_memory(logits_dtype, n, one_product) -> None:
    """The docstring's formula, the returned gradients and little else: forward alone, and with a
    trainable weight.
    """
    h, v = 2048, 128256
    given = tensors("cuda", n=n, h=h, v=v)
    policy, frozen, ref = (
        linear_plan.head_on_meta(n, h, v, trainable=learns, logits_dtype=logits_dtype)
        for learns in (True, False, False)
    )
    # Saved values, the row kernels' partial states, and cuBLAS's own workspace.
    slack = 64 * n + n * 4 * 28 + (1 << 24)

    def loss() -> torch.Tensor:
        return fastkl.linear_kl_divergence(**given, reduction="sum", logits_dtype=logits_dtype)

    with torch.no_grad():
        assert memory.allocated("cuda", loss)[0] <= workspace(frozen, ref) + slack
    peak = memory.allocated("cuda", lambda: gradients_of(loss(), given))[0]
    assert peak <= workspace(policy, ref) + 2 * (n * h + v * h) + slack
    assert (planned([policy, ref]).window == n) == one_product


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@kinds
def test_another_device_than_the_current_one(kind) -> None:
    """Results are those of the first device, to the bit."""
    found = []
    for device in ("cuda:0", "cuda:1"):
        case = made(kind, device)
        found.append(step(case, linear_inputs.leaves(case, device=device)))
    assert all(torch.equal(found[1][name].cpu(), value.cpu()) for name, value in found[0].items())
