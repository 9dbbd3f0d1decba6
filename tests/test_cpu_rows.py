"""Rows on a CPU: the ways a row is computed, their borders and bits; tests/test_rows.py and test_divergence.py hold the values in general."""

from __future__ import annotations

import itertools

import cases
import pytest
import torch

from fastkl import _cpu_rows, _rows, reference, token_stats

V = 1003


def outcome(p, q, tokens, temperature=1.0, mask=None, wanted=_rows.FIELDS, scaling=_rows.Scaling()):  # noqa: B008
    """(fields [5, N], saved, gradient to P, to Q) of the reference backend, for upstream gradients that differ by field."""
    rows = p.shape[:-1].numel()
    outputs = {name: torch.empty(rows) for name in wanted}
    saved = torch.empty(rows, _rows.SAVED)
    _rows.forward("reference", p, q, tokens, mask, temperature, outputs, saved, scaling)
    upstream = {name: torch.full((rows,), 0.5 + i) for i, name in enumerate(wanted)}
    grads = torch.empty(rows, p.shape[-1], dtype=p.dtype), torch.empty(rows, p.shape[-1], dtype=q.dtype)
    _rows.backward("reference", p, q, tokens, mask, temperature, saved, upstream, *grads, scaling)
    return torch.stack(list(outputs.values())), saved, *grads


def mixed(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows that take every way: equal, nearest, near, wide, shifted both ways, far, masked, infinite, NaN."""
    sizes = (0.0, 1e-4, 0.02, 0.2, 0.3, 0.5, 1.0, 3.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1)
    rows = [cases.pair(cases.KINDS[i % len(cases.KINDS)], 1, V, size, dtype=dtype, seed=i) for i, size in enumerate(sizes)]
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
    """A row alone, in any order, in blocks of any size, at any alignment, and in strided rows has the same bits."""
    p, q, tokens = mixed(dtype)
    rows = len(p)
    temperatures = torch.linspace(0.5, 2.0, rows) if temperature == "per row" else None

    def of(index):
        return temperature if temperatures is None else temperatures[index]

    expected = outcome(p, q, tokens, of(slice(None)))
    for i in range(rows):
        alone = outcome(p[i : i + 1], q[i : i + 1], tokens[i : i + 1], of(slice(i, i + 1)))
        for name, value, single in zip(("fields", "saved", "gradient to p", "gradient to q"), expected, alone, strict=True):
            cases.assert_same_bits(single, value[:, i : i + 1] if name == "fields" else value[i : i + 1], f"{name} of row {i}")
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    base = [torch.zeros(rows, V + 5, dtype=dtype)[:, 3 : 3 + V].copy_(side[order]) for side in (p, q)]
    for elements in (600, 5 * V + 1, 1 << 20):
        monkeypatch.setattr(_rows, "BLOCK_ELEMENTS", elements)
        monkeypatch.setattr(_rows, "ROWS_AT_ONCE", 4)
        for name, value, other in zip(("fields", "saved", "p", "q"), expected, outcome(*base, tokens[order], of(order)), strict=True):
            cases.assert_same_bits(other, value[:, order] if name == "fields" else value[order], f"{name}, {elements} elements")


def test_bits_of_long_rows_with_two_threads() -> None:
    """With several threads torch divides the sum of a row that is alone."""
    p, q = cases.pair("normal3", 3, 33001, 0.1)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        values = torch.randn(3, 33001)
        for i in range(3):
            cases.assert_same_bits(_cpu_rows.row_sum(values[i : i + 1]), _cpu_rows.row_sum(values)[i : i + 1], "sum")
        tokens = torch.zeros(3, dtype=torch.long)
        whole = outcome(p, q, tokens)
        for i in range(3):
            cases.assert_same_bits(outcome(p[i : i + 1], q[i : i + 1], tokens[:1])[0], whole[0][:, i : i + 1], "fields")
    finally:
        torch.set_num_threads(threads)


def test_which_rows_are_left_to_the_definition() -> None:
    """Rows with an infinity in Q's difference, a NaN or far apart; every other row is computed here."""
    p, q, tokens = mixed(torch.float32)
    saved = outcome(p, q, tokens)[1]
    lean = saved[:, _cpu_rows.KIND] == _cpu_rows.LEAN
    assert lean.tolist() == [True] * 7 + [False] + [True] * 2 + [False] * 4
    assert set(saved[~lean, reference.FAR].tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("size", [0.4999, 0.5, 0.9999, 1.0, 15.9])
@pytest.mark.parametrize("wanted", [("kl",), _rows.FIELDS], ids=["kl", "all"])
def test_both_sides_of_a_border(size, wanted) -> None:
    """The largest |d| just below and at each border: values and gradients within the bounds."""
    p, _ = cases.pair("normal1", 4, V, 0.0, seed=1)
    q = p + 0.05 * torch.randn(4, V, generator=torch.Generator().manual_seed(2))
    for row, sign in zip(range(4), (1, -1, 1, -1), strict=True):
        where = p[row].argmin()
        q[row, where] = p[row, where] + sign * size
    tokens = torch.arange(4)
    fields, _, grad_p, grad_q = outcome(p, q, tokens, wanted=wanted)
    exact = cases.truth(p, q)
    named = dict(zip(wanted, fields, strict=True))
    cases.assert_kl(named["kl"], exact.kl)
    if "ref_kl" in named:
        cases.assert_kl(named["ref_kl"], exact.ref_kl, "ref_kl")
        cases.assert_near(named["ref_logprob"], exact.log_q.gather(-1, tokens[:, None])[:, 0], 2e-6, 2e-6, "ref_logprob")
        return
    expected = cases.kl_gradients(exact, torch.full((4,), 0.5))
    cases.assert_gradient(grad_p, expected.p, "gradient to p")
    cases.assert_gradient(grad_q, expected.q, "gradient to q")


COMBINATIONS = [names for count in (1, 2, 5) for names in itertools.combinations(_rows.FIELDS, count)]


@pytest.mark.parametrize("sides", ["p", "q", "pq"])
def test_any_mix_of_upstream_gradients(sides, monkeypatch) -> None:
    """Each mix of fields and sides agrees with the definition in float64, also in columns and in place."""
    monkeypatch.setattr(_rows, "BLOCK_ELEMENTS", 600)
    p, q = cases.pair("normal3", 5, V, 0.3, seed=3)
    tokens, temperature = torch.tensor([0, 199, 200, 1002, 500]), torch.linspace(0.7, 1.4, 5)
    outputs, saved = {name: torch.empty(5) for name in _rows.FIELDS}, torch.empty(5, _rows.SAVED)
    _rows.forward("reference", p, q, tokens, None, temperature, outputs, saved)
    wide = p.double(), q.double()
    wide_saved = reference.row_statistics(*wide, tokens, temperature).saved
    for names in COMBINATIONS:
        upstream = {name: torch.linspace(-1.0, 1.0, 5) + 0.1 * i for i, name in enumerate(names)}
        exact = reference.row_gradients(*wide, tokens, temperature, wide_saved, upstream, wrt_p=True, wrt_q=True)
        places = [side.clone() for side in (p, q)]
        grads = [place if name in sides else None for name, place in zip("pq", places, strict=True)]
        _rows.backward("reference", *places, tokens, None, temperature, saved, upstream, *grads)
        for name, grad, value in zip("pq", grads, exact, strict=True):
            if grad is not None:
                cases.assert_gradient(grad, value, f"gradient of {names} to {name}", 2e-5)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_layouts_and_masks(layout) -> None:
    """Rows of any strides under a mask with holes equal the rows alone; masked rows stay 0 over NaN."""
    base = torch.randn(4, 5, 6, V + 3, generator=torch.Generator().manual_seed(0))[..., :V]
    p = cases.LAYOUTS[layout](base)
    q = p + 0.1
    q = q + 0.1 * torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    tokens = torch.full(p.shape[:-1], 7)
    mask = (torch.arange(tokens.numel()) % 3 != 1).view(tokens.shape)
    whole = token_stats(p.contiguous(), tokens, q)
    got = token_stats(p, tokens, q.masked_fill(~mask[..., None], torch.nan), mask=mask)
    for value, expected in zip(got, whole, strict=True):
        cases.assert_same_bits(value, torch.where(mask, expected, 0.0), layout)
