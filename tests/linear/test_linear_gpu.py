"""The functions on hidden states on a GPU alone: no synchronisation, CUDA graphs, the peak of
memory.
"""

import cases
import linear_cases
import memory
import pytest
import torch
from linear_inputs import Case, heads_on_meta, leaves, planned, small_case, workspace
from test_linear_costs import step, tensors

import fastkl

pytestmark = pytest.mark.gpu
VECTORS = ("mask", "temperature", "tokens")
kinds = pytest.mark.parametrize("kind", ["none", "mean", "stats"])


def made(kind: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Case:
    sizes = {"vocabulary": 1003, "width": 64, "ref_width": 48, "seed": seed}
    generator = torch.Generator("cuda").manual_seed(seed)
    mask, temperature = torch.rand(2, 300, generator=generator, device="cuda")
    return small_case(kind, dtype, leading=(300,), sizes=sizes, chunk_size=128, random=False).but(
        trainable=("hidden", "weight", "bias"),
        softcap=20.0 if kind == "none" else None,
        mask=mask < 0.8,
        temperature=temperature + 0.5,
        tokens=torch.randint(1003, (300,), generator=generator, device="cuda"),
    )


def train(case: Case, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return linear_cases.differentiate(case, inputs, linear_cases.call(case, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@kinds
def test_no_synchronisation(kind, dtype) -> None:
    case = made(kind, dtype=dtype)
    inputs = leaves(case, device="cuda")
    penalty = fastkl.LinearKLPenalty(0.1, reduction="sequence_mean")
    train(case, inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(case, inputs)
        penalty(**linear_cases.arguments(case, inputs)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@kinds
def test_cuda_graph(kind) -> None:
    case, other = (made(kind, seed=seed) for seed in (0, 1))
    inputs, others = (leaves(each, device="cuda") for each in (case, other))
    graph, results = cases.captured(lambda: train(case, inputs))
    expected = {name: value.clone() for name, value in train(other, others).items()}
    with torch.no_grad():
        for name, value in inputs.items():
            value.copy_(others[name])
        for name in VECTORS:
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
    given = tensors("cuda", n, h, v)
    settings = {"reduction": "sum", "logits_dtype": logits_dtype}
    learning, frozen = (heads_on_meta(n, h, v, (k, False), logits_dtype) for k in (True, False))
    # Saved values, the row kernels' partial states, and cuBLAS's own workspace.
    slack = 64 * n + n * 4 * 28 + (1 << 24)
    with torch.no_grad():
        loss = memory.allocated("cuda", lambda: fastkl.linear_kl_divergence(**given, **settings))
    assert loss[0] <= workspace(frozen) + slack
    peak = memory.allocated("cuda", lambda: step(given, **settings))[0]
    assert peak <= workspace(learning) + 2 * (n * h + v * h) + slack
    assert (planned(learning)[1] == n) == one_product
