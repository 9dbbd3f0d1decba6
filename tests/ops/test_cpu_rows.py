"""Rows on a CPU: the ways a row is computed, their borders and bits; tests/ops/test_engine.py and
test_divergence.py hold the values in general.
"""

import cases
import pytest
import torch
from cases import FLOATS, Rows, Run, assert_same, together

import fastkl
from benchmarks import cpu
from fastkl import testing, token_stats
from fastkl.ops import cpu_passes, cpu_rows, row_blocks
from fastkl.ops.fields import FIELDS

V = 1003


def outcome(rows: Rows, wanted: tuple[str, ...] = FIELDS) -> Run:
    upstream = {name: torch.full((rows.count,), 0.5 + i) for i, name in enumerate(wanted)}
    return cases.run("reference", rows, upstream)


def apart(rows: Rows, weights: torch.Tensor) -> Run:
    return cases.run("reference", rows, {"kl": weights}, (torch.empty_like(rows.p), None))


def mixed(dtype: torch.dtype, temperature: float | str = 1.0) -> Rows:
    """Rows that take every way: equal, near, far in one entry and in many, shifted both ways,
    masked, infinite, NaN.
    """
    sizes = (0.0, 1e-4, 0.02, 0.2, 0.3, 0.5, 1.0, 3.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1)
    rows = [
        testing.pair(testing.KINDS[i % len(testing.KINDS)], 1, V, size, dtype=dtype, seed=i)
        for i, size in enumerate(sizes)
    ]
    p, q = (torch.cat(side) for side in zip(*rows, strict=True))
    q[8] += 50
    p[9] += 50
    q[10, 5] += 40
    p[11, :3] = q[11, :3] = -torch.inf
    q[12, 7], p[13, 2] = torch.nan, -3e4
    temperature = torch.linspace(0.5, 2.0, len(p)) if temperature == "per row" else temperature
    return Rows(p, q, torch.arange(len(p)) * 31 % V, None, temperature)


types = pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
temperatures = pytest.mark.parametrize("temperature", [1.0, 0.7, "per row"])


@types
@temperatures
@pytest.mark.parametrize("elements", [600, 5 * V + 1, 1 << 20])
def test_bits_do_not_depend_on_the_batch(dtype, temperature, elements, monkeypatch) -> None:
    """A row alone, in any order, in blocks of any size, at any alignment, in strided rows."""
    rows = mixed(dtype, temperature)
    expected = outcome(rows).named()
    for i in range(rows.count):
        alone = outcome(rows.part([i])).named()
        assert_same(alone.values(), [value[[i]] for value in expected.values()], f"row {i}")
    order = torch.randperm(rows.count, generator=torch.Generator().manual_seed(0))
    turned = rows.part(order)
    turned = turned._replace(p=cases.padded(turned.p, 5, 3), q=cases.padded(turned.q, 5, 3))
    monkeypatch.setattr(row_blocks, "BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(row_blocks, "ROWS_AT_ONCE", 4)
    assert_same(outcome(turned).named().values(), [value[order] for value in expected.values()])


def sums(rows: Rows) -> list[torch.Tensor]:
    """Sums of P's entries, every field, and the KL's gradient apart and together."""
    ones, fields = torch.ones(rows.count), cases.forward("reference", rows).fields.values()
    rows = rows._replace(tokens=None)
    grads = (compute(rows, ones).grads[0] for compute in (apart, together))
    return [cpu_passes.row_sum(rows.p), *fields, *grads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count, vocabulary", [(9, 17), (9, 300), (9, 1003), (9, 5003), (5, 33001)])
def test_bits_with_two_threads(count, vocabulary, dtype, request) -> None:
    """With several threads torch divides the sum of a row that is alone."""
    request.addfinalizer(lambda: torch.set_num_threads(1))
    torch.set_num_threads(2)
    rows = Rows(*testing.pair("normal3", count, vocabulary, 0.1, dtype=dtype), torch.arange(count))
    whole, alone = sums(rows), [sums(rows.part([i])) for i in range(count)]
    assert_same(whole, [torch.cat(each) for each in zip(*alone, strict=True)])
    testing.assert_same_bits(*whole[-2:], "together")


@pytest.mark.parametrize(
    "wanted, fallback",
    [(("kl",), [11, 12, 13]), (FIELDS, [7, 10, 11, 12, 13])],
    ids=["kl", "all"],
)
def test_which_rows_are_left_to_the_definition(wanted, fallback) -> None:
    kinds = outcome(mixed(torch.float32), wanted).saved[:, cpu_rows.KIND]
    assert (kinds < cpu_rows.FAR).nonzero()[:, 0].tolist() == fallback


@pytest.mark.parametrize("size", [0.747, 0.75, 0.9999, 1.0, 15.9, 47.9])
@pytest.mark.parametrize("wanted", [("kl",), FIELDS], ids=["kl", "all"])
def test_both_sides_of_a_border(size, wanted) -> None:
    p, q = testing.pair("normal1", 4, V, 0.05, seed=1)
    lowest = p.argmin(-1, keepdim=True)
    q.scatter_(1, lowest, p.gather(1, lowest) + size * torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]))
    tokens, exact = torch.arange(4), testing.truth(p, q)
    made = outcome(Rows(p, q, tokens), wanted)
    testing.assert_stats(made.fields, exact.stats(tokens, wanted))
    upstream = {name: torch.full((4,), 0.5 + i) for i, name in enumerate(wanted)}
    for grad, value in zip(made.grads, testing.gradients(exact, upstream, tokens), strict=True):
        testing.assert_gradient(grad, value, tolerance=2e-5)


@pytest.mark.parametrize("compute", [apart, together])
@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2, 0.1])
@pytest.mark.parametrize("kind", ["normal8", "peaked", "very_peaked"])
def test_gradient_of_long_rows(kind, size, compute) -> None:
    rows, ones = Rows(*testing.pair(kind, 4, 128256, size)), torch.ones(4)
    expected = testing.kl_gradients(testing.truth(rows.p, rows.q), ones).p
    testing.assert_gradient(compute(rows, ones).grads[0], expected, tolerance=4e-6)


BLOCKS = [(600, 1), (5 * V + 1, 1), (5 * V + 1, 1 << 20), (1 << 20, 1)]


@types
@temperatures
@pytest.mark.parametrize("kind", ["near", "mixed"])
@pytest.mark.parametrize("count", ["all", "some", "none"])
@pytest.mark.parametrize("elements, own", BLOCKS)
def test_together_and_apart(kind, dtype, temperature, count, elements, own, monkeypatch) -> None:
    """The same bits in blocks of any size, memory of any kind, in place and beside NaN; an odd
    number of entries, of which the last rows' gradients are borrowed from, in every type.
    """
    rows = mixed(dtype, temperature)._replace(tokens=None)
    at = torch.arange(31) % rows.count
    rows = rows._replace(p=rows.p[at], q=rows.q[at])
    if temperature == "per row":
        rows = rows._replace(temperature=rows.temperature[at])
    if kind == "near":
        p, q = testing.pair("normal3", rows.count, V, 0.01, dtype=dtype, seed=5)
        rows = rows._replace(p=p, q=q)
    if count != "all":
        mask = (torch.arange(rows.count) % 5 != 3) & (count == "some")
        p, q = (side.masked_fill(~mask[:, None], torch.nan) for side in rows[:2])
        rows = rows._replace(p=p, q=q, mask=mask)
    weights = torch.linspace(-1.0, 1.5, rows.count)
    weights[2] = 0.0
    wanted, over = apart(rows, weights).named(), rows.p.clone()
    monkeypatch.setattr(row_blocks, "BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(cpu_passes, "OWN_BYTES", own)
    fresh, strided = torch.full_like(over, torch.nan), cases.padded(over, 5, 3)
    memory = cpu_passes.LentMemory(rows.p, rows.q, fresh, max(1, elements // V))
    assert own > 1 or elements < V or max(memory.blocks(0, 31)[0]) > 1
    for x, grad in ((rows.p, fresh), (over, over), (rows.p, strided)):
        for name, value in together(rows._replace(p=x), weights, grad).named().items():
            # Treat all NaNs as equal, and -0 as 0.
            assert bool((value.isnan() & wanted[name].isnan() | (value == wanted[name])).all()), (
                name
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rows, vocabulary, size, most",
    [(512, 1000, 0.1, 1.1), (64, 32000, 0.1, 1.1), (80, 40001, 0.1, 1.1), (512, 1000, 1.0, 1.35)],
)
def test_memory_of_a_loss(dtype, rows, vocabulary, size, most) -> None:
    p, q = testing.pair("normal3", rows, vocabulary, size, dtype=dtype)
    peak = cpu.peak_bytes(
        lambda p, q: fastkl.kl_divergence(p, q, reduction="sum"), p.requires_grad_(), q
    )
    assert peak <= most * p.nbytes, peak / p.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_under_a_mask_are_computed_in_large_blocks(dtype) -> None:
    """They borrow nothing; beside many short rows, own memory may take more than a tenth."""
    short = torch.empty(20000, 64, dtype=dtype)
    assert min(cpu_passes.LentMemory(short, short, short.clone(), 1024).blocks(None, 128)[0]) > 99


def test_series() -> None:
    d = torch.linspace(-30, 30, 60000, dtype=torch.float64)
    h, ref_h = (
        cpu_rows._series(d, s, d.clone()) for s in (cpu_rows.H_SERIES, cpu_rows.REF_H_SERIES)
    )
    near, exact = d.abs() <= 1, d.expm1() - d
    testing.assert_near(h[near], exact[near], 1.1e-7, 0.0, "h")
    testing.assert_near(ref_h[near], (d * d.expm1() - exact)[near], 8e-7, 0.0, "ref_h")
    assert bool((h[~near] > cpu_rows.NEAR_H).all())


def test_no_upstream_gradient_is_one_of_zeros() -> None:
    rows = Rows(*testing.pair("normal3", 4, V, 0.1), torch.arange(4))
    assert not cases.run("reference", rows, {}, fields=FIELDS).grads[0].any()


@pytest.mark.parametrize("upstream", [0.0, torch.inf, torch.nan])
def test_upstream_gradients_of_an_infinite_sum(upstream) -> None:
    """0 gives 0; an infinity leaves masked rows at 0."""
    p, q = testing.pair("normal3", 4, V, 0.1)
    q[2, 0] = -torch.inf
    x, mask = testing.leaf(p), torch.tensor([True, False, True, False])
    loss = fastkl.kl_divergence(x, q, mask, reduction="sum")
    (grad,) = torch.autograd.grad(loss, x, torch.tensor(upstream))
    assert loss.isinf() and not grad[~mask].any()
    assert not (grad[mask].any() if upstream == 0 else grad[mask].isfinite().any())


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_any_default_type(default, request) -> None:
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    p, q = testing.pair("normal3", 3, V, 0.1)

    def found(dtype: torch.dtype):
        torch.set_default_dtype(dtype)
        x = testing.leaf(p)
        loss = fastkl.kl_divergence(x, q, reduction="sum")
        stats = token_stats(p, torch.zeros(3, dtype=torch.long), q)
        return loss, *torch.autograd.grad(loss, x), fastkl.kl_divergence(p, q), *stats

    cpu_rows._numbers.cache_clear()
    expected = found(torch.float32)
    cpu_rows._numbers.cache_clear()
    for dtype in (default, torch.float32):
        assert_same(found(dtype), expected, f"{default}, {dtype}")


def test_gradients_of_another_type_under_a_mask() -> None:
    rows, ones = Rows(*testing.pair("normal3", 12, V, 0.1)), torch.ones(12)
    rows = rows._replace(mask=torch.arange(12) % 3 != 1)
    grad = torch.empty(12, V, dtype=torch.bfloat16)
    together(rows, ones, grad)
    testing.assert_same_bits(grad, apart(rows, ones).grads[0].bfloat16(), "gradient")


def test_float16_is_right_whatever_comes_after_the_sum() -> None:
    p = torch.zeros(1, 2, dtype=torch.float16, requires_grad=True)
    q = torch.tensor([[0.0, -65504.0]], dtype=torch.float16)
    fastkl.kl_divergence(p, q, reduction="mean", normalizer=8192).backward()
    torch.testing.assert_close(p.grad, torch.tensor([[-1.9990, 1.9990]], dtype=torch.float16))
    p, q = testing.pair("normal3", 2, 16001, 3e-3, dtype=torch.float16)
    expected = testing.kl_gradients(testing.truth(p, q), torch.full((2,), 65536.0)).p
    x = testing.leaf(p)
    fastkl.kl_divergence(x, q, reduction="sum").backward(torch.tensor(65536.0))
    testing.assert_gradient(x.grad, expected, tolerance=6e-4)
