"""Rows on a CPU: the ways a row is computed, their borders and bits; tests/ops/test_engine.py and
test_divergence.py hold the values in general.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import fastkl
from benchmarks import cpu
from fastkl import reference, testing, token_stats
from fastkl.ops import cpu_gradients, cpu_passes, cpu_rows, engine, row_blocks
from fastkl.ops.fields import FIELDS, SAVED, Scaling

V = 1003


def outcome(p, q, tokens, temperature=1.0, mask=None, wanted=FIELDS, scaling=Scaling()):  # noqa: B008
    """(fields [5, N], saved, gradient to P, to Q) of the reference backend, for upstream gradients
    that differ by field.
    """
    rows = p.shape[:-1].numel()
    outputs = {name: torch.empty(rows) for name in wanted}
    saved = torch.empty(rows, SAVED)
    engine.forward("reference", p, q, tokens, mask, temperature, outputs, saved, scaling)
    upstream = {name: torch.full((rows,), 0.5 + i) for i, name in enumerate(wanted)}
    grads = (
        torch.empty(rows, p.shape[-1], dtype=p.dtype),
        torch.empty(rows, p.shape[-1], dtype=q.dtype),
    )
    engine.backward("reference", p, q, tokens, mask, temperature, saved, upstream, *grads, scaling)
    return torch.stack(list(outputs.values())), saved, *grads


def mixed(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows that take every way: equal, nearest, near, wide, shifted both ways, far, masked,
    infinite, NaN.
    """
    sizes = (0.0, 1e-4, 0.02, 0.2, 0.3, 0.5, 1.0, 3.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1)
    rows = [
        testing.pair(testing.KINDS[i % len(testing.KINDS)], 1, V, size, dtype=dtype, seed=i)
        for i, size in enumerate(sizes)
    ]
    p, q = torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows])
    q[8] += 50
    p[9] += 50
    q[10, 5] += 40
    p[11, :3] = q[11, :3] = -torch.inf
    q[12, 7] = torch.nan
    p[13, 2] = -3e4
    return p, q, torch.arange(len(sizes)) * 31 % V


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.7, "per row"])
def test_bits_do_not_depend_on_the_batch(dtype, temperature, monkeypatch) -> None:
    """A row alone, in any order, in blocks of any size, at any alignment, and in strided rows has
    the same bits.
    """
    p, q, tokens = mixed(dtype)
    rows = len(p)
    temperatures = torch.linspace(0.5, 2.0, rows) if temperature == "per row" else None

    def of(index):
        return temperature if temperatures is None else temperatures[index]

    expected = outcome(p, q, tokens, of(slice(None)))
    for i in range(rows):
        alone = outcome(p[i : i + 1], q[i : i + 1], tokens[i : i + 1], of(slice(i, i + 1)))
        for name, value, single in zip(
            ("fields", "saved", "gradient to p", "gradient to q"), expected, alone, strict=True
        ):
            testing.assert_same_bits(
                single,
                value[:, i : i + 1] if name == "fields" else value[i : i + 1],
                f"{name} of row {i}",
            )
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    base = [
        torch.zeros(rows, V + 5, dtype=dtype)[:, 3 : 3 + V].copy_(side[order]) for side in (p, q)
    ]
    for elements in (600, 5 * V + 1, 1 << 20):
        monkeypatch.setattr(row_blocks, "BLOCK_ELEMENTS", elements)
        monkeypatch.setattr(row_blocks, "ROWS_AT_ONCE", 4)
        for name, value, other in zip(
            ("fields", "saved", "p", "q"),
            expected,
            outcome(*base, tokens[order], of(order)),
            strict=True,
        ):
            testing.assert_same_bits(
                other,
                value[:, order] if name == "fields" else value[order],
                f"{name}, {elements} elements",
            )


def test_bits_of_long_rows_with_two_threads() -> None:
    """With several threads torch divides the sum of a row that is alone."""
    p, q = testing.pair("normal3", 3, 33001, 0.1)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        values = torch.randn(3, 33001)
        for i in range(3):
            testing.assert_same_bits(
                cpu_passes.row_sum(values[i : i + 1]), cpu_passes.row_sum(values)[i : i + 1], "sum"
            )
        tokens = torch.zeros(3, dtype=torch.long)
        whole = outcome(p, q, tokens)
        for i in range(3):
            testing.assert_same_bits(
                outcome(p[i : i + 1], q[i : i + 1], tokens[:1])[0], whole[0][:, i : i + 1], "fields"
            )
        for vocabulary in (17, 300, 1003, 5003):
            p, q = testing.pair("normal3", 40, vocabulary, 0.1)
            ones, whole = torch.ones(40), apart(p, q, None, 1.0, torch.ones(40))[2]
            testing.assert_same_bits(
                together(p, q, None, 1.0, ones, torch.empty_like(p))[2],
                whole,
                f"V = {vocabulary}, together",
            )
            for compute in (apart, lambda *row: together(*row, torch.empty_like(row[0]))):
                alone = [
                    compute(p[i : i + 1], q[i : i + 1], None, 1.0, ones[:1])[2] for i in range(40)
                ]
                testing.assert_same_bits(torch.cat(alone), whole, f"V = {vocabulary}, alone")
    finally:
        torch.set_num_threads(threads)


def test_which_rows_are_left_to_the_definition() -> None:
    """Rows with an infinity in Q's difference, a NaN or far apart; every other row is computed
    here.
    """
    p, q, tokens = mixed(torch.float32)
    saved = outcome(p, q, tokens)[1]
    lean = saved[:, cpu_rows.KIND] == cpu_rows.LEAN
    assert lean.tolist() == [True] * 7 + [False] + [True] * 2 + [False] * 4
    assert set(saved[~lean, reference.FAR].tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("size", [0.4999, 0.5, 0.9999, 1.0, 15.9])
@pytest.mark.parametrize("wanted", [("kl",), FIELDS], ids=["kl", "all"])
def test_both_sides_of_a_border(size, wanted) -> None:
    """The largest |d| just below and at each border: values and gradients within the bounds."""
    p, _ = testing.pair("normal1", 4, V, 0.0, seed=1)
    q = p + 0.05 * torch.randn(4, V, generator=torch.Generator().manual_seed(2))
    for row, sign in zip(range(4), (1, -1, 1, -1), strict=True):
        where = p[row].argmin()
        q[row, where] = p[row, where] + sign * size
    tokens = torch.arange(4)
    fields, _, grad_p, grad_q = outcome(p, q, tokens, wanted=wanted)
    exact = testing.truth(p, q)
    named = dict(zip(wanted, fields, strict=True))
    testing.assert_kl(named["kl"], exact.kl)
    if "ref_kl" in named:
        testing.assert_kl(named["ref_kl"], exact.ref_kl, "ref_kl")
        testing.assert_near(
            named["ref_logprob"],
            exact.log_q.gather(-1, tokens[:, None])[:, 0],
            2e-6,
            2e-6,
            "ref_logprob",
        )
        return
    expected = testing.kl_gradients(exact, torch.full((4,), 0.5))
    testing.assert_gradient(grad_p, expected.p, "gradient to p")
    testing.assert_gradient(grad_q, expected.q, "gradient to q")


COMBINATIONS = [names for count in (1, 2, 5) for names in itertools.combinations(FIELDS, count)]


@pytest.mark.parametrize("sides", ["p", "q", "pq"])
def test_any_mix_of_upstream_gradients(sides, monkeypatch) -> None:
    """Each mix of fields and sides agrees with the definition in float64, also in columns and in
    place.
    """
    monkeypatch.setattr(row_blocks, "BLOCK_ELEMENTS", 600)
    p, q = testing.pair("normal3", 5, V, 0.3, seed=3)
    tokens, temperature = torch.tensor([0, 199, 200, 1002, 500]), torch.linspace(0.7, 1.4, 5)
    outputs, saved = {name: torch.empty(5) for name in FIELDS}, torch.empty(5, SAVED)
    engine.forward("reference", p, q, tokens, None, temperature, outputs, saved)
    wide = p.double(), q.double()
    wide_saved = reference.row_statistics(*wide, tokens, temperature).saved
    for names in COMBINATIONS:
        upstream = {name: torch.linspace(-1.0, 1.0, 5) + 0.1 * i for i, name in enumerate(names)}
        exact = reference.row_gradients(
            *wide, tokens, temperature, wide_saved, upstream, wrt_p=True, wrt_q=True
        )
        places = [side.clone() for side in (p, q)]
        grads = [place if name in sides else None for name, place in zip("pq", places, strict=True)]
        engine.backward("reference", *places, tokens, None, temperature, saved, upstream, *grads)
        for name, grad, value in zip("pq", grads, exact, strict=True):
            if grad is not None:
                testing.assert_gradient(grad, value, f"gradient of {names} to {name}", 2e-5)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts_and_masks(layout) -> None:
    """Rows of any strides under a mask with holes equal the rows alone; masked rows stay 0 over
    NaN.
    """
    base = torch.randn(4, 5, 6, V + 3, generator=torch.Generator().manual_seed(0))[..., :V]
    p = testing.LAYOUTS[layout](base)
    q = p + 0.1
    q = q + 0.1 * torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    tokens = torch.full(p.shape[:-1], 7)
    mask = (torch.arange(tokens.numel()) % 3 != 1).view(tokens.shape)
    whole = token_stats(p.contiguous(), tokens, q)
    got = token_stats(p, tokens, q.masked_fill(~mask[..., None], torch.nan), mask=mask)
    for value, expected in zip(got, whole, strict=True):
        testing.assert_same_bits(value, torch.where(mask, expected, 0.0), layout)


@pytest.mark.parametrize("kind", ["normal8", "peaked", "very_peaked"])
def test_gradient_of_long_rows(kind) -> None:
    """The sums over 128256 entries keep their digits where one token holds nearly all probability,
    in both ways to compute a gradient.
    """
    for seed, size in enumerate((1e-4, 1e-3, 1e-2, 0.1)):
        p, q = testing.pair(kind, 4, 128256, size, seed=seed)
        expected = testing.kl_gradients(testing.truth(p, q), torch.ones(4)).p
        for result in (
            together(p, q, None, 1.0, torch.ones(4), torch.empty_like(p))[2],
            apart(p, q, None, 1.0, torch.ones(4))[2],
        ):
            error = (result.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
            assert error.max() < 4e-6, f"{kind}, {size}: {error.tolist()}"


def together(p, q, mask, temperature, weights, grad):
    """(KL, saved, gradient to P) computed together, the gradient into `grad`."""
    rows = p.shape[:-1].numel()
    kl, saved = torch.full((rows,), torch.nan), torch.full((rows, SAVED), torch.nan)
    engine.kl_and_gradients(
        "reference", p, q, None, mask, temperature, kl, saved, weights, grad, None, Scaling()
    )
    return kl, saved, grad


def apart(p, q, mask, temperature, weights):
    """The same by forward and backward."""
    rows = p.shape[:-1].numel()
    kl, saved, grad = (
        torch.empty(rows),
        torch.empty(rows, SAVED),
        torch.empty(rows, p.shape[-1], dtype=p.dtype),
    )
    engine.forward("reference", p, q, None, mask, temperature, {"kl": kl}, saved)
    engine.backward("reference", p, q, None, mask, temperature, saved, {"kl": weights}, grad, None)
    return kl, saved, grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.7, "per row"])
@pytest.mark.parametrize("kind", ["near", "mixed"])
def test_together_equals_forward_and_backward(kind, dtype, temperature, monkeypatch) -> None:
    """The same bits of KL, saved values and gradient, in blocks of any size and memory, in place,
    and under a mask with holes and NaN.
    """
    if kind == "near":
        p, q = testing.pair("normal3", 40, V, 0.01, dtype=dtype, seed=5)
    else:
        p, q, _ = mixed(dtype)
    rows = len(p)
    temperature = torch.linspace(0.5, 2.0, rows) if temperature == "per row" else temperature
    weights = torch.linspace(-1.0, 1.5, rows)
    weights[2] = 0.0
    holes = torch.arange(rows) % 5 != 3
    for mask in (None, holes, torch.zeros(rows, dtype=torch.bool)):
        if mask is not None:
            p, q = (
                p.masked_fill(~mask[:, None], torch.nan),
                q.masked_fill(~mask[:, None], torch.inf),
            )
        wanted = apart(p, q, mask, temperature, weights)
        for elements, few in ((600, 1), (5 * V + 1, 1), (5 * V + 1, 1 << 20), (1 << 20, 1)):
            monkeypatch.setattr(row_blocks, "BLOCK_ELEMENTS", elements)
            monkeypatch.setattr(cpu_gradients, "OWN_BYTES", few)
            over = p.clone()
            strided = torch.full((rows, V + 5), torch.nan, dtype=dtype)[:, 3 : 3 + V]
            for x, grad in ((p, torch.full_like(p, torch.nan)), (over, over), (p, strided)):
                for name, value, other in zip(
                    ("kl", "saved", "gradient"),
                    together(x, q, mask, temperature, weights, grad),
                    wanted,
                    strict=True,
                ):
                    # Treat all NaNs as equal, and -0 as 0.
                    value, other = (
                        torch.where(each.isnan(), 7.0, each + 0.0) for each in (value, other)
                    )
                    testing.assert_same_bits(
                        value, other, f"{name}, {elements} elements, {few} bytes"
                    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_a_loss(dtype) -> None:
    """A loss and its gradient need little more memory than the gradient takes."""
    for rows, vocabulary in ((2048, 1000), (64, 32000), (80, 40001)):
        p, q = testing.pair("normal3", rows, vocabulary, 0.01, dtype=dtype)
        peak = cpu.peak_bytes(
            lambda p, q: fastkl.kl_divergence(p, q, reduction="sum"), p.requires_grad_(), q
        )
        assert peak <= 1.13 * p.nbytes, (rows, vocabulary, peak / p.nbytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", ["mean", "penalty"])
def test_losses_for_any_upstream_gradient(loss, dtype) -> None:
    """1, others, once more through a retained graph, in a graph, and in a batch: the gradient of
    the KL per token, weighed.
    """
    p, q = (side.view(2, 3, V) for side in testing.pair("normal3", 6, V, 0.1, dtype=dtype, seed=2))
    mask = torch.tensor([[True, True, False], [True, False, True]])
    x = p.clone().requires_grad_()

    def made():
        if loss == "mean":
            return fastkl.kl_divergence(
                x, q, mask, temperature=1.5, reduction="mean", normalizer=5.0
            )
        return fastkl.KLPenalty(0.05, temperature=1.5, reduction="sequence_mean")(x, q, mask)

    def expected(upstream):
        per_token = mask * upstream * (0.2 if loss == "mean" else 0.05 / 2)
        (gradient,) = torch.autograd.grad(
            fastkl.kl_divergence(x, q, mask, temperature=1.5), x, per_token
        )
        return gradient

    value = made()
    torch.testing.assert_close(
        value.detach(),
        (fastkl.kl_divergence(p, q, mask, temperature=1.5) * mask).sum()
        * (0.2 if loss == "mean" else 0.025),
    )
    close = (
        {"rtol": 1e-6, "atol": 1e-12} if dtype == torch.float32 else {"rtol": 2.0**-7, "atol": 2e-7}
    )
    for upstream in (1.0, 0.3, -2.0):
        (gradient,) = torch.autograd.grad(value, x, value.new_full((), upstream), retain_graph=True)
        torch.testing.assert_close(gradient, expected(upstream), **close)
    (batch,) = torch.autograd.grad(
        value, x, value.new_tensor([2.0, 0.0]), is_grads_batched=True, retain_graph=True
    )
    torch.testing.assert_close(batch[0], expected(2.0), **close)
    assert not batch[1].any()
    (scaled,) = torch.autograd.grad(made(), x, value.new_full((), 0.3))
    torch.testing.assert_close(scaled, expected(0.3), **close)
    (graph,) = torch.autograd.grad(made(), x, create_graph=True)
    torch.testing.assert_close(graph.detach(), expected(1.0), **close)
    with pytest.raises(RuntimeError, match="second derivatives"):
        graph.float().sum().backward()


def test_no_upstream_gradient_is_a_gradient_of_zeros() -> None:
    p, q = testing.pair("normal3", 2, V, 0.1)
    saved = outcome(p, q, torch.zeros(2, dtype=torch.long))[1]
    grad = torch.full_like(p, torch.nan)
    engine.backward("reference", p, q, None, None, 1.0, saved, {}, grad, None)
    assert not grad.any()


def test_upstream_gradients_that_hide_infinities() -> None:
    """0 over an infinite KL gives 0; an infinity leaves masked rows at 0."""
    p, q = testing.pair("normal3", 4, V, 0.1)
    q[3, 0] = -torch.inf
    x = p.requires_grad_()
    loss = fastkl.kl_divergence(x, q, reduction="sum")
    (gradient,) = torch.autograd.grad(torch.where(loss.isfinite(), loss, 0.0), x)
    assert loss.isinf() and not gradient.any()
    mask = torch.tensor([True, False, True, False])
    for upstream in (torch.inf, torch.nan):
        loss = fastkl.kl_divergence(x, q, mask, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x, torch.tensor(upstream))
        assert not gradient[~mask].any() and not gradient[mask].isfinite().any()


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_any_default_type(default) -> None:
    """torch.set_default_dtype changes neither results nor what later calls compute."""
    p, q = testing.pair("normal3", 3, V, 0.1)

    def found():
        x = p.clone().requires_grad_()
        loss = fastkl.kl_divergence(x, q, reduction="sum")
        return (
            loss,
            *torch.autograd.grad(loss, x),
            fastkl.kl_divergence(p, q),
            *token_stats(p, torch.zeros(3, dtype=torch.long), q),
        )

    cpu_rows._number.cache_clear()
    expected = found()
    cpu_rows._number.cache_clear()
    torch.set_default_dtype(default)
    try:
        others = found()
    finally:
        torch.set_default_dtype(torch.float32)
    for value, other, again in zip(expected, others, found(), strict=True):
        testing.assert_same_bits(other, value, str(default))
        testing.assert_same_bits(again, value, "afterwards")


def test_gradients_of_another_type_under_a_mask() -> None:
    """Rows picked one by one give 16-bit gradients of float32 logits as the others do."""
    p, q = testing.pair("normal3", 12, V, 0.1)
    mask = torch.arange(12) % 3 != 1
    grad = torch.empty(12, V, dtype=torch.bfloat16)
    together(p, q, mask, 1.0, torch.ones(12), grad)
    testing.assert_same_bits(grad, apart(p, q, mask, 1.0, torch.ones(12))[2].bfloat16(), "gradient")


def test_float16_is_right_whatever_comes_after_the_sum() -> None:
    """Gradients beyond float16's range before a mean shrinks them, and small ones before a loss
    scale.
    """
    p = torch.zeros(1, 2, dtype=torch.float16, requires_grad=True)
    q = torch.tensor([[0.0, -65504.0]], dtype=torch.float16)
    fastkl.kl_divergence(p, q, reduction="mean", normalizer=8192).backward()
    torch.testing.assert_close(p.grad, torch.tensor([[-1.9990, 1.9990]], dtype=torch.float16))
    p, q = testing.pair("normal3", 2, 16001, 3e-3, dtype=torch.float16)
    x = p.clone().requires_grad_()
    expected = 65536 * testing.kl_gradients(testing.truth(p, q), torch.ones(2)).p
    fastkl.kl_divergence(x, q, reduction="sum").backward(torch.tensor(65536.0))
    assert ((x.grad.double() - expected).norm(dim=-1) <= 6e-4 * expected.norm(dim=-1)).all()


def test_a_normalizer_of_0_over_an_infinite_sum() -> None:
    """Value and gradient 0, with and without gradient; what is kept of a loss is not the loss."""
    p, q = testing.pair("normal3", 2, 9, 0.1)
    q[0, 0] = -torch.inf
    penalty = fastkl.KLPenalty(0.1)
    for x in (p, p.clone().requires_grad_()):
        for call in (fastkl.kl_divergence, penalty):
            reduction = {"reduction": "mean"} if call is fastkl.kl_divergence else {}
            loss = call(x, q, normalizer=torch.tensor(0), **reduction)
            assert loss == 0 and not (x.requires_grad and torch.autograd.grad(loss, x)[0].any())
    loss = penalty(p, p + 0.1 * torch.arange(9))
    kept = float(loss)
    loss += 10
    assert float(penalty.last["loss"]) == kept
