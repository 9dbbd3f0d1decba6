"""Costs of the functions on hidden states, counted: matrix products and their sizes, and bytes
allocated and held.
"""

import functools
import itertools
from collections.abc import Callable

import linear_cases
import linear_inputs
import memory
import pytest
import torch
from linear_inputs import heads_on_meta, planned, tuned, workspace
from test_linear import BF16, FP32, with_heads
from torch.utils.flop_counter import FlopCounterMode

import fastkl
from fastkl.ops import gemm

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")
N, H, V, CHUNK = 24, 16, 40, 8


def count(call: Callable, largest: int = N, types: str | None = "c10::BFloat16") -> float:
    """Return how many products of N·H·V a call makes, those inside the ops included: none for more
    than `largest` tokens, all operands of one type.
    """
    activities, found = [torch.profiler.ProfilerActivity.CPU], []
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        call()
    for event in profile.profiler.kineto_results.events():
        if event.name() in PRODUCTS:
            # aten::mm(a, b, ...) and aten::addmm(added, a, b, ...), with out= and scalars behind.
            first = 0 if event.name() in ("aten::mm", "aten::bmm") else 1
            (rows, inner), (_, columns) = event.shapes()[first : first + 2]
            assert types is None or {*event.dtypes()[first : first + 2]} == {types}
            found.append(rows * inner * columns)
    assert max(found, default=0) <= largest * H * V
    return sum(found) / (N * H * V)


def tensors(
    device: str,
    n: int = N,
    h: int = H,
    v: int = V,
    *,
    shared: bool = False,
    learned: str = "hidden,weight",
    near: float = 1.0,
) -> dict[str, torch.Tensor]:
    """Make the bfloat16 arguments that both functions share; those in `learned` require gradient.
    Logits that are `near` 0 take one pass, others may be computed a second time, in float64.
    """
    made, names = linear_inputs.small((n,), v, h, h), learned.split(",")
    made = {
        name: (made[name] * near).to(device, BF16).requires_grad_(name in names)
        for name in ("hidden", "weight", "ref_hidden", "ref_weight")
    }
    return {**made, "ref_weight": made["weight"]} if shared else made


def gradients_of(value: torch.Tensor, made: dict, retain_graph: bool = False) -> tuple:
    learned = {id(tensor): tensor for tensor in made.values() if tensor.requires_grad}
    return torch.autograd.grad(value.sum(), [*learned.values()], retain_graph=retain_graph)


def step(made: dict, **settings) -> tuple:
    return gradients_of(fastkl.linear_kl_divergence(**made, **settings), made)


def stats(made: dict, fields: tuple[str, ...], **settings) -> torch.Tensor:
    tokens = torch.zeros(len(made["hidden"]), dtype=torch.long, device=made["hidden"].device)
    found = fastkl.linear_token_stats(**{"chunk_size": CHUNK, "tokens": tokens, **made, **settings})
    return sum(getattr(found, name) for name in fields)


def assert_products(call: Callable, made: dict, *counts: int) -> None:
    """Count forward's products, backward's and those of a second backward, and what torch's
    FlopCounterMode is told: 2·N·H·V for each. The second one's gradients have the first one's bits.
    """
    (forward, backward, again), kept, grads = counts, [], []
    assert count(lambda: kept.append(call()), CHUNK) == forward
    with torch.no_grad():
        assert count(call, CHUNK) <= 2
    run = lambda: grads.append(gradients_of(kept[0], made, retain_graph=True))  # noqa: E731
    for function, expected in ((call, forward), (run, backward))[: 1 + kept[0].requires_grad]:
        with FlopCounterMode(display=False) as counter:
            function()
        assert counter.get_total_flops() == expected * 2 * N * H * V
    if kept[0].requires_grad:
        assert [count(run, CHUNK) for _ in range(2)] == [backward, again]
        assert all(map(torch.equal, *grads[1:]))


MODES = {
    # learned, shared weight: products of "sum"
    ("", False): 2,
    ("hidden", False): 3,
    ("hidden,weight", False): 4,
    ("weight", False): 3,
    ("hidden", True): 3,
    ("hidden,weight,ref_hidden", False): 5,
    ("hidden,weight,ref_hidden,ref_weight", False): 6,
    ("ref_hidden,ref_weight", False): 4,
    # A shared weight that learns does so through both models.
    ("hidden,weight", True): 5,
    ("hidden,weight,ref_hidden", True): 6,
}


@pytest.mark.parametrize("learned, shared", MODES, ids=str)
@pytest.mark.parametrize(
    "reduction, recompute", [("none", True), ("none", False), ("sum", None), ("mean", None)]
)
def test_products(implementation, learned, shared, reduction, recompute) -> None:
    """Two products for the logits and one for each gradient; "sum" and "mean" make them in forward.
    Computed again, logits take two more in backward: six for a trainable lm_head, five for a frozen
    one. No product is for more tokens than chunk_size.
    """
    made = tensors(implementation.device, learned=learned, shared=shared)
    settings = {"reduction": reduction, "recompute": recompute, "chunk_size": CHUNK}
    both = MODES[learned, shared]
    counts = (2, both if recompute else both - 2, both) if reduction == "none" else (both, 0, 0)
    assert_products(lambda: fastkl.linear_kl_divergence(**made, **settings), made, *counts)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("learned, expected", [("hidden,weight", 2), ("hidden", 1)])
@pytest.mark.parametrize("reference", [True, False])
def test_products_of_policy_fields(implementation, learned, expected, reference, recompute) -> None:
    made = tensors(implementation.device, learned=learned)
    made = made if reference else {name: made[name] for name in ("hidden", "weight")}
    call = functools.partial(stats, made, ("logprob", "entropy"), recompute=recompute)
    assert_products(call, made, 1 + reference, expected + recompute, expected + 1)


def test_products_of_reference_fields(implementation) -> None:
    made = tensors(implementation.device, learned="hidden,weight,ref_hidden", shared=True)
    call = functools.partial(stats, made, ("ref_logprob",), recompute=True)
    assert_products(call, {name: made[name] for name in ("weight", "ref_hidden")}, 2, 4, 4)
    assert torch.autograd.grad(call().sum(), made["hidden"], allow_unused=True) == (None,)


def test_masked_tokens_take_no_part_on_the_reference() -> None:
    settings = {"mask": torch.arange(N) % 3 == 0, "reduction": "mean", "chunk_size": CHUNK}
    assert count(lambda: step(tensors("cpu"), **settings)) == 4 * int(settings["mask"].sum()) / N


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_the_calls_of_a_gpu(dtype) -> None:
    """The products that a GPU would be asked for have the right shapes and types: on the meta
    device, where torch checks both and computes nothing.
    """
    if torch.__version__.startswith("2.10."):
        pytest.skip("its addmm on that device has no out_dtype")
    with torch.device("meta"):
        hidden, weight, bias = (torch.empty(*s, dtype=dtype) for s in ((6, H), (V, H), (V,)))
        for kind, given in itertools.product((dtype, FP32), (bias, None)):
            gemm.logits_into(torch.empty(6, 64, dtype=kind)[:, :V], hidden, weight, given)
        grads = torch.empty(6, 64, dtype=dtype)[:, :V]
        for first in (True, False):
            gemm.add_weight_gradient(torch.empty(V, H), grads, hidden, first=first)
            gemm.add_bias_gradient(torch.empty(V), grads, first=first)


# ---- memory: the plan


@pytest.mark.parametrize(
    "n, trainable, expected",
    [(8192, False, 0.53), (4096, True, 1.31), (8192, True, 2.36), (16384, True, 3.15)],
)
def test_workspace_at_the_main_shape(n, trainable, expected) -> None:
    """H=4096, V=128256 in bfloat16: the docstring's figures, beyond inputs and returned gradients;
    above 8192 tokens the weight's gradient is a sum.
    """
    found = workspace(heads_on_meta(n, 4096, 128256, (trainable, False)))
    assert found == pytest.approx(expected * 1e9, rel=0.01)


def test_two_heads_of_one_weight_add_to_a_sum() -> None:
    shared = heads_on_meta(8192, 4096, 128256, (True, True))
    shared[1].grad_weight = shared[0].grad_weight
    shared[0].grad_weight.heads = 2
    assert planned(shared)[1] < 8192


@pytest.mark.parametrize("n, h, v", [(1, 64, 7), (300, 256, 32000), (65536, 8192, 262144)])
@pytest.mark.parametrize("trainable", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("logits_dtype", [BF16, FP32])
def test_workspace_stays_within_its_bound(n, h, v, trainable, logits_dtype) -> None:
    """The buffers of logits stay under 1 GiB or half of the sums, chunk_size bounds the tokens, and
    forward has the chunk of backward.
    """
    heads = heads_on_meta(n, h, v, trainable, logits_dtype)
    sums = 4 * v * h * sum(trainable)
    assert workspace(heads) - sums <= 1.01 * max(1 << 30, sums // 2)
    for chunk_size in (1, 100, 3000):
        chunk, window = planned(heads, chunk_size)
        assert chunk <= window <= min(chunk_size, n)
    assert not sums or n < 3000 or planned(heads, 3000) == (1024, 2048)
    chunk, window = planned(heads)
    assert 1 <= chunk <= min(n, 1024) and chunk <= window <= n
    frozen = heads_on_meta(n, h, v, (False, False), logits_dtype)
    assert chunk == planned(heads, None, heads[:1])[0] == planned(frozen)[0]


# ---- memory: measured


@pytest.mark.parametrize("n", [64, 128, 129, 160])
def test_one_product_takes_no_more_at_its_peak(monkeypatch, n) -> None:
    """All that is allocated at once, returned gradients included, beside what the sum takes; the
    main shape's sizes, scaled down. 2 % for what a CPU's product packs.
    """
    h, v, found = 64, 4000, []
    tuned(monkeypatch, block=1 << 12, row_block=1, largest_chunk=16, tile=16, workspace=2 * v * h)
    made = tensors("cpu", n=n, h=h, v=v, near=0.1)
    for small_sum in (0, 1 << 40):
        tuned(monkeypatch, small_sum=small_sum)
        found.append(memory.allocations(lambda: step(made, recompute=True))["peak"])
        _, window = planned(heads_on_meta(n, h, v, (True, False)))
        assert (window == n) == (small_sum == 0 and n <= 2 * h)
    assert found[0] <= 1.02 * found[1]
    assert (found[0] < 0.8 * found[1]) == (n == h)


@pytest.mark.parametrize("first", [False, True])
def test_a_bias_takes_no_copy_of_its_gradients(monkeypatch, first) -> None:
    tuned(monkeypatch, block=1 << 14)
    grads, total = torch.randn(256, 4096).bfloat16(), torch.ones(4096)
    run = functools.partial(gemm.add_bias_gradient, total, grads, first=first)
    assert memory.allocations(run)["peak"] < 2 * 4 * (1 << 14)
    torch.testing.assert_close(total, (not first) + grads.float().sum(0))


# Scaled down from the main shape: the formula is measured.
SHAPE = 256, 160, 1000
BLOCK = 1 << 12
# A CPU takes besides: some thirty float32 temporaries of a row, blocks of a weight and of its
# gradient in another type, and 256 bytes per token.
SLACK = 30 * 4 * SHAPE[2] + 3 * 4 * BLOCK + 256 * SHAPE[0]


@pytest.mark.parametrize(
    "reduction, logits_dtype, small_sum, far",
    [
        *itertools.product(("sum", "none"), (BF16,), (1 << 26, 0), (False,)),
        *itertools.product(("sum",), (FP32,), (1 << 26, 0), (False,)),
        ("sum", BF16, 1 << 26, True),
    ],
)
def test_peak_workspace(monkeypatch, reduction, logits_dtype, small_sum, far) -> None:
    """Forward and backward allocate what the formula says; no tensor has a row for every token and
    an entry for every word, but where the sum of the weight's gradient would be larger.
    """
    tuned(monkeypatch, row_block=1, block=BLOCK, scaled_at_once=BLOCK, workspace=1 << 18)
    tuned(monkeypatch, small_sum=small_sum)
    (n, h, v), made = SHAPE, tensors("cpu", *SHAPE, near=0.1)
    if far:  # computed a second time, in float64
        made["hidden"].data[::16] *= 100
    settings = {"reduction": reduction, "logits_dtype": logits_dtype, "recompute": True}
    with torch.no_grad():
        found = memory.allocations(lambda: fastkl.linear_kl_divergence(**made, **settings))
    least = workspace(heads_on_meta(*SHAPE, (False, False), logits_dtype))
    assert least <= found["peak"] <= least + SLACK
    assert found["largest"] < n * v * 2 / 4
    found = memory.allocations(lambda: step(made, **settings))
    least = workspace(heads_on_meta(*SHAPE, (True, False), logits_dtype))
    assert least + 2 * n * h <= found["peak"] <= least + 2 * (n * h + v * h) + SLACK
    assert found["largest"] <= (max(4 * v * h, n * v / 2) if small_sum else 1.03 * n * v * 2)


@pytest.mark.parametrize("learned", ["hidden,weight", "hidden,weight,ref_hidden,ref_weight"])
@pytest.mark.parametrize("fields", [("logprob", "kl"), ("logprob", "ref_kl")])
@pytest.mark.parametrize("logits_dtype", [BF16, FP32])
def test_peak_of_kept_logits(monkeypatch, logits_dtype, fields, learned) -> None:
    """Kept logits are there from forward on, and backward has no second tensor of them: G·V·b, with
    G = N at the most, beside wider ones, and C·V·l where a far row may be read again.
    """
    tuned(monkeypatch, row_block=1, block=BLOCK, workspace=1 << 18, small_sum=0)
    (n, h, v), made = SHAPE, tensors("cpu", *SHAPE, learned=learned, near=0.1)
    settings, found = {"logits_dtype": logits_dtype, "recompute": False, "chunk_size": None}, []
    models, rows, more = learned.count("hidden"), 1024, 0
    kept = 2 * n * rows * logits_dtype.itemsize
    peak = memory.allocations(lambda: found.append(stats(made, fields, **settings)))["peak"]
    assert kept <= peak <= kept + SLACK
    if logits_dtype == FP32:
        more = models * n * rows * 2
    elif "ref_kl" in fields and models == 2:
        more = models * planned(heads_on_meta(*SHAPE, (False, False)))[0] * rows * 2
    backward = memory.allocations(lambda: gradients_of(found[0], made))
    assert backward["peak"] <= models * 2 * (n * h + v * h) + more + SLACK
    # The weight's gradient; the workspace of oneDNN's GEMM is 1.245 times that on a Xeon with AMX.
    assert logits_dtype == FP32 or 2 * v * h <= backward["largest"] <= 1.25 * 2 * v * h


@pytest.mark.parametrize("recompute", [True, False, None])
@pytest.mark.parametrize("learned", ["", "hidden,weight"], ids=["frozen", "no_grad"])
def test_nothing_is_kept_without_need(learned, recompute) -> None:
    made, settings = tensors("cpu", 256, 4, 1024, learned=learned), {"chunk_size": CHUNK}
    run = functools.partial(fastkl.linear_kl_divergence, recompute=recompute, **settings)
    with torch.set_grad_enabled(not learned):
        assert memory.allocations(lambda: run(**made))["largest"] < 256 * 1024 * 2 / 4


@pytest.mark.parametrize("call", ["stats", "sum"])
@pytest.mark.parametrize("heads", [(True, False), (True, True), (False, True), (True, "detached")])
def test_one_weight_is_kept_once(call, heads) -> None:
    case = with_heads("one weight", call).but(heads=tuple((3.0, 0.5) if h else None for h in heads))
    inputs, kept = linear_inputs.leaves(case), []
    inputs["ref_bias"] = inputs["bias"]
    if "detached" in heads:
        inputs["ref_weight"] = inputs["weight"].detach()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda value: kept.append(value.shape) or value, lambda value: value
    ):
        linear_cases.call(case, inputs)
    assert kept.count(inputs["weight"].shape) == 1 + ("detached" in heads and call == "stats")
