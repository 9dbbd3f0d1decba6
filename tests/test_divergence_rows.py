"""kl_divergence: what masks, upstream gradients, memory layouts, infinities and NaN do to it."""

import math

import pytest
import torch
from cases import INTERPRETING, assert_same, check_results, outcome

from fastkl import kl_divergence, slow_path_rows, testing, token_stats

SHIFTS = (0.0, 50.0, -50.0)
SHORT = 203 if INTERPRETING else 1003
# ---- rows that do not count


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_mask(implementation, dtype, garbage) -> None:
    p, q = testing.sizes_pair("normal3", (0.01, 0.1, 1.0, 10.0, 0.1, 0.3), SHIFTS, SHORT, dtype)
    mask = torch.tensor([True, False, True, True, False, True])
    device, upstream = implementation.device, testing.upstream_for(torch.empty(6))
    expected = outcome(p[mask], q[mask], device, upstream[mask])
    p[~mask], q[1], q[4, ::2] = garbage, garbage, math.nan
    results = [value.cpu() for value in outcome(p, q, device, mask=mask.to(device))]
    assert_same([result[mask] for result in results], [value.cpu() for value in expected])
    assert not any(bool(result[~mask].any()) for result in results)
    nothing = torch.zeros(6, dtype=torch.bool, device=device)
    assert not any(bool(value.any()) for value in outcome(p, q, device, mask=nothing))


def test_upstream_gradients(implementation, dtype) -> None:
    p, q = testing.sizes_pair("normal3", (0.01, 0.1, 1.0, 10.0), SHIFTS, SHORT, dtype)
    device, upstream = implementation.device, torch.tensor([1.5, 0.0, -2.0, 0.0])
    written = outcome(p, q, device, torch.full((4,), 1.75))
    for strided in (torch.full((), 1.75).expand(4), torch.full((4, 2), 1.75)[:, 1]):
        assert_same(outcome(p, q, device, strided), written)
    leaf = testing.leaf(p.to(device))
    (kl_divergence(leaf, q.to(device)).sum() * 1.75).backward()
    testing.assert_same_bits(leaf.grad, written[1], "gradient of sum()")
    expected = outcome(p, q, device, upstream)[1:]
    p[1], q[3, 5] = math.nan, math.nan
    for result, value in zip(outcome(p, q, device, upstream)[1:], expected, strict=True):
        assert bool((result[1::2] == 0).all())
        testing.assert_same_bits(result[::2], value[::2], "gradient of the other rows")


# ---- shapes and memory


@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)])
def test_no_rows(implementation, leading, dtype) -> None:
    p = torch.empty(*leading, 17, dtype=dtype)
    check_results(implementation, outcome(p, p.clone(), implementation.device), p, p)
    p, tokens = p.to(implementation.device), torch.zeros(leading).long().to(implementation.device)
    for value in token_stats(p, tokens, p):
        assert value.shape == leading and value.dtype == torch.float32


@pytest.mark.parametrize("layout_q", ["batch and time", "same"])
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(implementation, layout, layout_q, dtype) -> None:
    if INTERPRETING and layout_q == "same" and dtype != torch.float32:
        pytest.skip("one type shows it")
    pair = testing.pair("normal3", 120, 43, 0.3, dtype=dtype)
    bases = [value.view(4, 5, 6, -1).to(implementation.device) for value in pair]
    p, q = (testing.LAYOUTS[layout](base[..., :40]) for base in bases)
    q = q if layout_q == "same" else q.clone(memory_format=torch.contiguous_format)
    before = [value.clone() for value in (*bases, q)]
    check_results(implementation, outcome(p, q, implementation.device), p, q)
    assert_same((*bases, q), before, "an input was written to")


@pytest.mark.parametrize("vocabulary", [1, 9, 5003])
def test_every_output_is_written(implementation, vocabulary, dtype) -> None:
    p, q = testing.pair("normal3", 3, vocabulary, 0.3, dtype=dtype)
    mask = torch.tensor([True, False, True], device=implementation.device)
    expected = outcome(p, q, implementation.device, mask=mask)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns
    try:
        assert bool(p.new_empty(9).isnan().all())
        results = outcome(p, q, implementation.device, mask=mask)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(results, expected)


def test_slow_path_rows(implementation) -> None:
    p, q = testing.pair("normal3", 6, 300, 0.1, device=implementation.device)
    p[1, 3], q[2, 7], q[4] = -math.inf, math.nan, q[4] * 50
    slow = slow_path_rows(p.view(2, 3, -1), q.view(2, 3, -1))
    assert slow.tolist() == [[False, True, True], [False, True, False]]


# ---- special values


def with_holes(
    vocabulary: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, and the entries where holes go: scattered ones, the first, the last and a whole
    stretch.
    """
    p, q = testing.sizes_pair("normal3", (1e-3, 0.1, 1.0), (0.0, 50.0), vocabulary, dtype)
    holes = torch.zeros(vocabulary, dtype=torch.bool)
    holes[::7] = holes[-1] = holes[vocabulary // 2 : vocabulary * 3 // 4] = True
    return p, q, holes


HOLES = [-math.inf, -1e9, -1e4, "lowest"]


def filled(rows: torch.Tensor, holes: torch.Tensor, hole: float | str) -> None:
    lowest = torch.finfo(rows.dtype).min
    rows[:, holes] = (
        lowest if hole == "lowest" else hole if hole == -math.inf else max(hole, lowest)
    )


@pytest.mark.parametrize("hole", [-math.inf, "lowest"])
@pytest.mark.parametrize("vocabulary", [50, 5003])
def test_holes_in_both(implementation, dtype, vocabulary, hole) -> None:
    p, q, holes = with_holes(vocabulary, dtype)
    filled(p, holes, hole)
    filled(q, holes, hole)
    result, *grads = outcome(p, q, implementation.device)
    grads = [grad.cpu() for grad in grads]
    assert not any(bool(grad[:, holes].any()) for grad in grads)
    results = result, *(grad[:, ~holes] for grad in grads)
    check_results(implementation, results, p[:, ~holes], q[:, ~holes])


def test_holes_in_q_only(implementation, dtype) -> None:
    p, q, holes = with_holes(5003, dtype)
    expected = kl_divergence(p.to(implementation.device), q.to(implementation.device))
    q[0, holes], q[2, 4999] = -math.inf, -math.inf
    p[2, 4999] = p[2].max()
    result, *grads = outcome(p, q, implementation.device)
    assert result[0] == math.inf and result[2] == math.inf
    testing.assert_same_bits(result[1], expected[1], "the other row")
    assert all(bool(grad[1].isfinite().all()) for grad in grads)


@pytest.mark.parametrize("hole", HOLES)
def test_holes_in_p_only(implementation, dtype, hole) -> None:
    """Q has mass where P has none: a finite KL(P‖Q) and gradients, right, with exactly 0 for P at
    the holes; the other way round a finite logit far below the others gives a finite, huge KL.
    """
    p, q, holes = with_holes(1003 if INTERPRETING else 5003, dtype)
    filled(p, holes, hole)
    results = outcome(p, q, implementation.device)
    check_results(implementation, results, p, q)
    assert not bool(results[1].cpu()[:, holes].any()) and bool(results[2].isfinite().all())
    if hole != -math.inf:
        there = kl_divergence(q.to(implementation.device), p.to(implementation.device))
        testing.assert_kl(there, testing.truth(q, p).kl)


@pytest.mark.parametrize("vocabulary", [9, SHORT])
def test_nan_poisons_its_own_row(implementation, dtype, vocabulary) -> None:
    p, q = testing.pair("normal3", 9, vocabulary, 0.3, dtype=dtype)
    expected = outcome(p, q, implementation.device)
    p[1, 4], q[2, vocabulary - 1], p[3], q[4], p[6, 2], q[7, 0] = (math.nan,) * 4 + (math.inf,) * 2
    p[8], q[8] = -math.inf, -math.inf
    results = outcome(p, q, implementation.device)
    assert results[0].isnan().tolist() == [False, True, True, True, True, False, True, True, True]
    assert_same([value[::5] for value in results], [value[::5] for value in expected])
