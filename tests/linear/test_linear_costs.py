"""What the functions on hidden states cost, counted: matrix products and their sizes, and bytes
allocated and held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastkl
from fastkl.ops import engine, gemm, linear_op, lm_head, row_blocks

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")
N, H, V, CHUNK = 24, 16, 40, 8


class Product(NamedTuple):
    """One matrix product: multiply-adds, and the types of its operands."""

    size: int
    types: frozenset


def profiled(call: Callable) -> list:
    """The profiler's events of a call, those inside the ops included."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True, profile_memory=True
    ) as profile:
        kept = call()
    del kept
    return profile.profiler.kineto_results.events()


def products(call: Callable) -> list[Product]:
    """Every matrix product that a call makes, in order."""
    found = []
    for event in profiled(call):
        if event.name() in PRODUCTS:
            # aten::mm(a, b, ...) and aten::addmm(added, a, b, ...), with out= and scalars behind.
            first = 0 if event.name() in ("aten::mm", "aten::bmm") else 1
            (rows, inner), (again, columns) = event.shapes()[first : first + 2]
            assert inner == again, event.shapes()
            found.append(
                Product(rows * inner * columns, frozenset(event.dtypes()[first : first + 2]))
            )
    return found


def tensors(
    device: str,
    *,
    shared: bool = False,
    learned: str = "hidden,weight",
    dtype: torch.dtype = torch.bfloat16,
    n: int = N,
    h: int = H,
    v: int = V,
) -> dict[str, torch.Tensor]:
    """The arguments that both functions share; those in `learned` require gradient."""
    generator = torch.Generator().manual_seed(0)
    made = {
        name: torch.randn(shape, generator=generator).to(device, dtype)
        for name, shape in (
            ("hidden", (n, h)),
            ("weight", (v, h)),
            ("ref_hidden", (n, h)),
            ("ref_weight", (v, h)),
        )
    }
    if shared:
        made["ref_weight"] = made["weight"]
    for name in learned.split(",") if learned else ():
        made[name].requires_grad_()
    return made


def gradients_of(value: torch.Tensor, made: dict[str, torch.Tensor]) -> tuple:
    """Gradients of the sum of a result."""
    learned = list(
        {id(tensor): tensor for tensor in made.values() if tensor.requires_grad}.values()
    )
    return torch.autograd.grad(value.sum(), learned)


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


def assert_products(call: Callable, expected: int) -> None:
    """The products of a call add up to `expected` of N·H·V each; all have 16-bit operands, and none
    is for more than a chunk of tokens.
    """
    found = products(call)
    assert sum(product.size for product in found) == expected * N * H * V, [
        product.size / (H * V) for product in found
    ]
    assert max((product.size for product in found), default=0) <= CHUNK * H * V
    assert all(product.types == {"c10::BFloat16"} for product in found), found


@pytest.mark.parametrize("learned, shared", MODES, ids=lambda value: str(value))
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_products_of_a_loss(implementation, learned, shared, reduction) -> None:
    """Two products for the logits and one for each gradient; backward adds none."""
    made = tensors(implementation.device, learned=learned, shared=shared)
    results = []
    assert_products(
        lambda: results.append(
            fastkl.linear_kl_divergence(**made, reduction=reduction, chunk_size=CHUNK)
        ),
        MODES[learned, shared],
    )
    if learned:
        assert not products(lambda: gradients_of(results[0], made))


@pytest.mark.parametrize("learned, shared", MODES, ids=lambda value: str(value))
def test_products_per_token(implementation, learned, shared) -> None:
    """Computed again: two in forward, in backward two again and one for each gradient: six for a
    trainable lm_head, five for a frozen one.
    """
    made = tensors(implementation.device, learned=learned, shared=shared)
    results = []
    assert_products(
        lambda: results.append(
            fastkl.linear_kl_divergence(**made, chunk_size=CHUNK, recompute=True)
        ),
        2,
    )
    if learned:
        assert_products(lambda: gradients_of(results[0], made), MODES[learned, shared])


@pytest.mark.parametrize("learned, shared", MODES, ids=lambda value: str(value))
@pytest.mark.parametrize("reduction, recompute", [("none", True), ("none", False), ("mean", None)])
def test_a_flop_counter_counts_them(learned, shared, reduction, recompute) -> None:
    """torch's FlopCounterMode says what is done: 2·N·H·V for each product, in forward and in
    backward.
    """
    made = tensors("cpu", learned=learned, shared=shared)
    with FlopCounterMode(display=False) as forward:
        value = fastkl.linear_kl_divergence(**made, reduction=reduction, recompute=recompute)
    expected = 2 if reduction == "none" else MODES[learned, shared]
    assert forward.get_total_flops() == expected * 2 * N * H * V
    if learned:
        with FlopCounterMode(display=False) as backward:
            gradients_of(value, made)
        products = 0 if reduction == "mean" else MODES[learned, shared] - (0 if recompute else 2)
        assert backward.get_total_flops() == products * 2 * N * H * V


@pytest.mark.parametrize("recompute", [True, False])
def test_a_flop_counter_and_policy_fields(recompute) -> None:
    """Where only log-prob and entropy have a gradient, the reference's logits are not counted
    again.
    """
    made = tensors("cpu")
    stats = fastkl.linear_token_stats(
        tokens=torch.zeros(N, dtype=torch.long), **made, recompute=recompute
    )
    with FlopCounterMode(display=False) as counter:
        gradients_of(stats.logprob + stats.entropy, made)
    assert counter.get_total_flops() == (2 + recompute) * 2 * N * H * V


def test_products_without_gradient(implementation) -> None:
    """Under no_grad a loss makes two products, whatever requires gradient."""
    made = tensors(implementation.device)
    with torch.no_grad():
        assert_products(
            lambda: fastkl.linear_kl_divergence(**made, reduction="mean", chunk_size=CHUNK), 2
        )


@pytest.mark.parametrize("learned, expected", [("hidden,weight", 3), ("hidden", 2)])
@pytest.mark.parametrize("with_reference", [True, False])
def test_products_of_policy_fields(implementation, learned, expected, with_reference) -> None:
    """Where only log-prob and entropy have a gradient, the reference's logits are not computed
    again.
    """
    made = tensors(implementation.device, learned=learned)
    tokens = torch.zeros(N, dtype=torch.long, device=implementation.device)
    if not with_reference:
        made = {name: made[name] for name in ("hidden", "weight")}
    results = []
    assert_products(
        lambda: results.append(
            fastkl.linear_token_stats(tokens=tokens, **made, chunk_size=CHUNK, recompute=True)
        ),
        1 + with_reference,
    )
    assert_products(lambda: gradients_of(results[0].logprob + results[0].entropy, made), expected)


def test_no_gradient_of_the_policy_from_reference_fields(implementation) -> None:
    """The reference's log-probs move nothing of the policy, even where both share the weight's sum."""
    made = tensors(implementation.device, learned="hidden,weight,ref_hidden", shared=True)
    tokens = torch.zeros(N, dtype=torch.long, device=implementation.device)
    stats = fastkl.linear_token_stats(tokens=tokens, **made, chunk_size=CHUNK, recompute=True)
    gradients = {}
    assert_products(
        lambda: gradients.update(
            zip(
                ("weight", "ref_hidden"),
                torch.autograd.grad(
                    stats.ref_logprob.sum(), (made["weight"], made["ref_hidden"]), retain_graph=True
                ),
                strict=True,
            )
        ),
        4,
    )
    alone = fastkl.linear_token_stats(made["ref_hidden"], made["weight"], tokens, chunk_size=CHUNK)
    for name, expected in zip(
        gradients,
        torch.autograd.grad(alone.logprob.sum(), (made["weight"], made["ref_hidden"])),
        strict=True,
    ):
        torch.testing.assert_close(gradients[name].float(), expected.float(), rtol=1e-2, atol=1e-2)
    assert (
        torch.autograd.grad(stats.ref_logprob.sum(), made["hidden"], allow_unused=True)[0] is None
    )


def test_masked_tokens_take_no_part_on_the_reference() -> None:
    """Their products are not made where looking at the mask costs nothing."""
    made = tensors("cpu")
    mask = torch.arange(N) % 3 == 0
    found = products(
        lambda: fastkl.linear_kl_divergence(**made, mask=mask, reduction="mean", chunk_size=CHUNK)
    )
    assert sum(product.size for product in found) == 4 * int(mask.sum()) * H * V


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_calls_of_a_gpu(dtype) -> None:
    """What a GPU would be asked for has the right shapes and types: on the meta device, where torch
    checks both and computes nothing.
    """
    with torch.device("meta"):
        hidden, weight, bias = (
            torch.empty(6, H, dtype=dtype),
            torch.empty(V, H, dtype=dtype),
            torch.empty(V, dtype=dtype),
        )
        for out in (torch.empty(6, 64, dtype=dtype)[:, :V], torch.empty(6, 64)[:, :V]):
            for with_bias in (bias, None):
                gemm.logits_into(out, hidden, weight, with_bias)
        grads, total, total_bias = (
            torch.empty(6, 64, dtype=dtype)[:, :V],
            torch.empty(V, H),
            torch.empty(V),
        )
        for first in (True, False):
            gemm.add_weight_gradient(total, grads, hidden, first=first)
            gemm.add_bias_gradient(total_bias, grads, first=first)


# ---- memory


def head_on_meta(
    n: int, h: int, v: int, *, trainable: bool, logits_dtype: torch.dtype = torch.bfloat16
) -> lm_head.Head:
    """A bfloat16 head of any size, which takes no memory."""
    head = lm_head.Head(
        torch.empty(n, h, dtype=torch.bfloat16, device="meta"),
        torch.empty(v, h, dtype=torch.bfloat16, device="meta"),
        None,
        logits_dtype,
    )
    if trainable:
        head.grad_hidden = torch.empty_like(head.hidden)
        head.grad_weight = lm_head.Sum(head.weight)
    return head


def workspace(policy: lm_head.Head, ref: lm_head.Head, chunk_size: int | None = None) -> int:
    """The docstring's formula. Rows are padded to whole lines."""
    chosen = lm_head.plan(policy.hidden.shape[0], [policy, ref], chunk_size)
    vocabulary, total = -(-policy.weight.shape[0] // 64) * 64, 0
    for head in (policy, ref):
        if head.learns:
            total += chosen.window * vocabulary * head.hidden.dtype.itemsize
        if not head.learns or head.logits_dtype != head.hidden.dtype:
            total += chosen.chunk * vocabulary * head.logits_dtype.itemsize
        if head.grad_weight is not None:
            weight = head.grad_weight
            total += weight.extra_bytes - (
                weight.spared_bytes if chosen.window >= head.hidden.shape[0] else 0
            )
    return total


def test_workspace_at_the_main_shape() -> None:
    """N=8192, H=4096, V=128256 in bfloat16: 0.53 GB forward and 2.36 GB with a trainable weight,
    beyond inputs and returned gradients, as the
    docstring says; 3.15 GB for twice the tokens, where the weight's gradient is a sum."""
    shape = (8192, 4096, 128256)
    assert workspace(
        head_on_meta(*shape, trainable=False), head_on_meta(*shape, trainable=False)
    ) == pytest.approx(0.53e9, rel=0.01)
    assert workspace(
        head_on_meta(*shape, trainable=True), head_on_meta(*shape, trainable=False)
    ) == pytest.approx(2.36e9, rel=0.01)
    longer = (16384, *shape[1:])
    assert workspace(
        head_on_meta(*longer, trainable=True), head_on_meta(*longer, trainable=False)
    ) == pytest.approx(3.15e9, rel=0.01)


def test_one_product_where_it_takes_no_more_than_a_sum() -> None:
    """All tokens wait for one product up to where their gradients of logits, and the weight's
    beside them, would take more than a part of them, the
    float32 sum and at last the weight's gradient beside that."""

    def planned(n: int) -> tuple[int, int]:
        policy, ref = (
            head_on_meta(n, 4096, 128256, trainable=True),
            head_on_meta(n, 4096, 128256, trainable=False),
        )
        return lm_head.plan(n, [policy, ref], None).window, workspace(policy, ref)

    window, several = planned(65536)
    assert window == 3072
    for n, one in ((1, True), (3072, True), (8192, True), (8193, False)):
        found, bytes_ = planned(n)
        assert (found == n) == one and bytes_ <= several
    shared = (
        head_on_meta(8192, 4096, 128256, trainable=True),
        head_on_meta(8192, 4096, 128256, trainable=True),
    )
    shared[1].grad_weight = shared[0].grad_weight
    assert lm_head.plan(8192, list(shared), None).window < 8192, (
        "two heads add to it: it stays a sum"
    )
    for dtype, elements in (
        (torch.float16, 1 << 25),
        (torch.bfloat16, 1 << 20),
        (torch.float32, 1 << 25),
    ):
        kept = lm_head.Sum(torch.empty(elements, dtype=dtype, device="meta"))
        kept.take_one_product()
        assert kept.spared_bytes == 0 and kept.dtype == torch.float32


@pytest.mark.parametrize("mode", ["mean", "none", "stats"])
def test_one_product_is_as_exact_as_a_sum(implementation, monkeypatch, mode) -> None:
    """The weight's gradient from one product, rounded once, beside the sum over windows: no further
    from float64, and nothing else changes.
    """
    made = tensors(implementation.device, n=96)
    tokens = torch.zeros(96, dtype=torch.long, device=implementation.device)

    def outcome(made: dict[str, torch.Tensor], chunk_size: int | None = None) -> list[torch.Tensor]:
        if mode == "stats":
            value = fastkl.linear_token_stats(tokens=tokens, **made, chunk_size=chunk_size).kl
        else:
            value = fastkl.linear_kl_divergence(
                **made, reduction=mode, chunk_size=chunk_size, recompute=True
            )
        return [value.detach(), *gradients_of(value, made)]

    added = []
    add = lm_head.Sum.add
    monkeypatch.setattr(
        lm_head.Sum, "add", lambda self, *rest: added.append(self.dtype) or add(self, *rest)
    )
    sums = outcome(made, CHUNK)
    assert added == [torch.float32] * (96 // CHUNK)
    added.clear()
    monkeypatch.setattr(lm_head, "SMALL_SUM", 0)
    once = outcome(made)
    assert added == [torch.bfloat16]
    with fastkl.use_backend("reference"):
        exact = outcome(
            {
                name: value.detach().double().requires_grad_(value.requires_grad)
                for name, value in made.items()
            }
        )
    assert [value.dtype for value in once] == [value.dtype for value in sums]
    errors = [
        [
            float((value.double() - true).norm() / true.norm())
            for value, true in zip(found, exact, strict=True)
        ]
        for found in (once, sums)
    ]
    assert all(one <= 1.05 * many for one, many in zip(*errors, strict=True)), errors


@pytest.mark.parametrize(
    "n, h, v",
    [
        (1, 64, 7),
        (300, 256, 32000),
        (5000, 2048, 50257),
        (8192, 4096, 262144),
        (65536, 8192, 151936),
    ],
)
@pytest.mark.parametrize(
    "trainable",
    [(False, False), (True, False), (False, True), (True, True)],
    ids=["none", "policy", "reference", "both"],
)
@pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float32])
def test_workspace_stays_within_its_bound(n, h, v, trainable, logits_dtype) -> None:
    """The buffers of logits stay under 1 GiB or half of the sums, chunk_size bounds the tokens, and
    forward has the chunk of backward.
    """
    policy, ref = (
        head_on_meta(n, h, v, trainable=learns, logits_dtype=logits_dtype) for learns in trainable
    )
    sums = 4 * v * h * sum(trainable)
    assert workspace(policy, ref) - sums <= 1.01 * max(1 << 30, sums // 2)
    for chunk_size in (1, 100, 3000):
        chosen = lm_head.plan(n, [policy, ref], chunk_size)
        assert chosen.chunk <= chosen.window <= min(chunk_size, n)
    chosen = lm_head.plan(n, [policy, ref], None)
    assert 1 <= chosen.chunk <= min(
        n, lm_head.LARGEST_CHUNK
    ) and chosen.chunk <= chosen.window <= max(n, chosen.chunk)
    frozen = [head_on_meta(n, h, v, trainable=False, logits_dtype=logits_dtype) for _ in range(2)]
    assert (
        lm_head.plan(n, frozen, None).chunk
        == chosen.chunk
        == lm_head.plan(n, [policy, ref], None, [policy]).chunk
    )
    pieces = list(lm_head.parts(0, n, chosen.window))
    assert (
        pieces[0].start == 0
        and pieces[-1].stop == n
        and all(a.stop == b.start for a, b in zip(pieces, pieces[1:], strict=False))
    )


@pytest.mark.parametrize("n", [256, 512, 513, 640])
def test_one_product_takes_no_more_at_its_peak(monkeypatch, n) -> None:
    """All that is allocated at once, returned gradients included, beside what the sum takes; the
    main shape's sizes, scaled down. 2 % for what
    a CPU's product packs."""
    h, v = 256, 16000
    for name in ("forward", "backward"):
        monkeypatch.setattr(engine, name, lambda *arguments: None)  # in place, whatever it is
    monkeypatch.setattr(gemm, "BLOCK_ELEMENTS", 1 << 14)
    monkeypatch.setattr(lm_head, "LARGEST_CHUNK", 64)
    monkeypatch.setattr(lm_head, "TILE", 64)
    monkeypatch.setitem(lm_head.WORKSPACE, "cpu", 2 * v * h)
    found = {}
    for small_sum in (0, 1 << 40):
        monkeypatch.setattr(lm_head, "SMALL_SUM", small_sum)
        made = tensors("cpu", n=n, h=h, v=v)
        found[small_sum] = peak(
            lambda made=made: gradients_of(
                fastkl.linear_kl_divergence(**made, recompute=True), made
            )
        )[0]
        policy, ref = head_on_meta(n, h, v, trainable=True), head_on_meta(n, h, v, trainable=False)
        policy.grad_weight = lm_head.Sum(policy.weight)
        monkeypatch.setattr(lm_head, "WORKSPACE_ON_A_GPU", 2 * v * h)
        assert (lm_head.plan(n, [policy, ref], None).window == n) == (small_sum == 0 and n <= 2 * h)
    one, several = found.values()
    assert one <= 1.02 * several
    assert (one < 0.8 * several) == (n == 256)


def test_a_bias_takes_no_copy_of_its_gradients(monkeypatch) -> None:
    """A CPU sums 16-bit gradients a block of columns at a time, as exactly as at once."""
    monkeypatch.setattr(gemm, "BLOCK_ELEMENTS", 96)
    grads, total = torch.randn(12, 50).bfloat16(), torch.ones(50)
    gemm.add_bias_gradient(total, grads, first=False)
    torch.testing.assert_close(total, 1 + grads.float().sum(0))
    gemm.add_bias_gradient(total, grads, first=True)
    torch.testing.assert_close(total, grads.float().sum(0))
    grads, total = torch.randn(256, 4096).bfloat16(), torch.empty(4096)
    monkeypatch.setattr(gemm, "BLOCK_ELEMENTS", 1 << 14)
    assert peak(lambda: gemm.add_bias_gradient(total, grads, first=True))[0] < 2 * 4 * (1 << 14)


# Scaled down by 16 and 32 from the main shape: what is measured is the formula.
SMALL = {"n": 256, "h": 256, "v": 4000}


def peak(call: Callable) -> tuple[int, int]:
    """Bytes that a call allocates: the most at any time, and the largest at once."""
    events = sorted(
        (event for event in profiled(call) if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    )
    changes = torch.tensor([event.nbytes() for event in events])
    return int(changes.cumsum(0).max()), int(changes.max())


@pytest.mark.parametrize("one_product", [False, True], ids=["sums", "one product"])
@pytest.mark.parametrize(
    "reduction, logits_dtype",
    [("sum", torch.bfloat16), ("none", torch.bfloat16), ("sum", torch.float32)],
    ids=str,
)
def test_peak_workspace(monkeypatch, reduction, logits_dtype, one_product) -> None:
    """What forward and backward really allocate is the formula; no tensor has a row for every token
    and an entry for every word, but where the sum
    of the weight's gradient would be larger.

    On top come what the CPU holds in another type at a time and 64 bytes per token.
    """
    monkeypatch.setattr(row_blocks, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(gemm, "BLOCK_ELEMENTS", 1 << 14)
    monkeypatch.setattr(linear_op, "SCALED_AT_ONCE", 1 << 14)
    monkeypatch.setitem(lm_head.WORKSPACE, "cpu", 1 << 20)
    monkeypatch.setattr(lm_head, "WORKSPACE_ON_A_GPU", 1 << 20)
    if one_product:
        monkeypatch.setattr(lm_head, "SMALL_SUM", 0)
    made = tensors("cpu", **SMALL)
    if (reduction, logits_dtype, one_product) != ("sum", torch.bfloat16, False):
        # Small logits: rows far apart are computed a second time, in float64, which one case in six
        # shows to fit too.
        with torch.no_grad():
            made["hidden"].mul_(0.1)
            made["ref_hidden"].mul_(0.1)
    n, h, v = SMALL.values()
    policy, frozen, ref = (
        head_on_meta(n, h, v, trainable=learns, logits_dtype=logits_dtype)
        for learns in (True, False, False)
    )
    # Of a row on the reference: some thirty float32 temporaries. A block of a weight, and of its
    # gradient. 64 bytes per token.
    slack = 30 * 4 * v + 3 * 4 * (1 << 14) + 64 * n

    def loss() -> torch.Tensor:
        return fastkl.linear_kl_divergence(
            **made, reduction=reduction, logits_dtype=logits_dtype, recompute=True
        )

    with torch.no_grad():
        most, largest = peak(loss)
    assert workspace(frozen, ref) <= most <= workspace(frozen, ref) + slack
    assert largest < n * v * 2 / 4

    returned = 2 * (n * h + v * h)
    most, largest = peak(lambda: gradients_of(loss(), made))
    assert workspace(policy, ref) + 2 * n * h <= most <= workspace(policy, ref) + returned + slack
    assert largest <= (1.01 * n * v * 2 if one_product else max(4 * v * h, n * v * 2 / 4))
