"""kl_divergence and token_stats: what masks, upstream gradients, memory layouts, infinities and NaN
do to them.
"""

import math

import pytest
import torch
from cases import INTERPRETING, Rows, assert_same, check_results, outcome, upstream_of

from fastkl import testing, token_stats

SHIFTS = (0.0, 50.0, -50.0)
SHORT = 203 if INTERPRETING else 1003
# ---- rows that do not count


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_mask(implementation, dtype, tokens_of, garbage) -> None:
    p, q = testing.sizes_pair("normal3", (0.01, 0.1, 1.0, 3.0, 0.1, 0.3), SHIFTS, SHORT, dtype)
    mask = torch.tensor([True, False, True, True, False, True])
    rows, upstream, device = Rows(p, q, tokens_of(p)), upstream_of(p), implementation.device
    expected = outcome(rows.part(mask), device, upstream[:, mask])
    p[~mask], q[1], q[4, ::2] = garbage, garbage, math.nan
    if rows.tokens is not None:
        rows.tokens[~mask] = torch.tensor([-100, 1 << 40])
    results = outcome(rows._replace(mask=mask), device, upstream)
    assert_same([result[mask] for result in results], expected)
    assert not any(bool(result[~mask].any()) for result in results)
    nothing = outcome(rows._replace(mask=torch.zeros_like(mask)), device)
    assert not any(bool(value.any()) for value in nothing)


def test_upstream_gradients(implementation, dtype, tokens_of) -> None:
    p, q = testing.sizes_pair("normal3", (0.01, 0.1, 1.0, 3.0), SHIFTS, SHORT, dtype)
    rows, device = Rows(p, q, tokens_of(p)), implementation.device
    written = outcome(rows, device, torch.full((7, 4), 1.75))
    for strided in (torch.full((), 1.75).expand(7, 4), torch.full((7, 4, 2), 1.75)[..., 1]):
        assert_same(outcome(rows, device, strided), written)
    upstream = torch.tensor([1.5, 0.0, -2.0, 0.0]).expand(7, 4)
    expected = outcome(rows, device, upstream)[-2:]
    p[1], q[3, 5] = math.nan, math.nan
    grads = outcome(rows, device, upstream)[-2:]
    assert not any(bool(grad[1::2].any()) for grad in grads)
    assert_same([grad[::2] for grad in grads], [grad[::2] for grad in expected])


# ---- shapes and memory


LAYOUTS = {
    **testing.LAYOUTS,
    "no rows": lambda base: base[1, 2, :0],
    "no rows of time": lambda base: base[1, :2, :0],
    "no rows of the batch": lambda base: base[1, :0, :3],
}


@pytest.mark.parametrize("layout_q", ["batch and time", "same"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(implementation, layout, layout_q, dtype, tokens_of) -> None:
    if INTERPRETING and dtype != torch.float32:
        pytest.skip("one type shows it")
    pair = testing.pair("normal3", 120, 43, 0.3, dtype=dtype)
    bases = [value.view(4, 5, 6, -1).to(implementation.device) for value in pair]
    p, q = (LAYOUTS[layout](base[..., :40]) for base in bases)
    q = q if layout_q == "same" else q.clone(memory_format=torch.contiguous_format)
    tokens = tokens_of(bases[0][..., :40])
    if tokens is not None:
        tokens = LAYOUTS[layout](tokens[..., None])[..., 0]
        tokens = tokens.to(torch.uint8 if layout.startswith("expanded") else torch.int64)
    before = [value.clone() for value in (*bases, q)]
    results = outcome(Rows(p, q, tokens), implementation.device)
    check_results(implementation, results, Rows(p.cpu(), q.cpu(), tokens))
    assert_same((*bases, q), before, "an input was written to")


@pytest.mark.parametrize("vocabulary", [1, 9, 5003])
def test_every_output_is_written(implementation, vocabulary, dtype, tokens_of, request) -> None:
    p, q = testing.pair("normal3", 3, vocabulary, 0.3, dtype=dtype)
    rows = Rows(p, q, tokens_of(p), torch.tensor([True, False, True]))
    expected = outcome(rows, implementation.device)
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns
    assert bool(p.new_empty(9).isnan().all())
    assert_same(outcome(rows, implementation.device), expected)


# ---- special values


# Logits, and the entries where holes go: scattered ones, the first, the last and a whole stretch.
def with_holes(vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    p, q = testing.sizes_pair("normal3", (1e-3, 0.1, 1.0), (0.0, 50.0), vocabulary, dtype)
    holes = torch.zeros(vocabulary, dtype=torch.bool)
    holes[::7] = holes[-1] = holes[vocabulary // 2 : vocabulary * 3 // 4] = True
    return p, q, holes


def filled(rows: torch.Tensor, holes: torch.Tensor, hole: float) -> torch.Tensor:
    lowest = torch.finfo(rows.dtype).min
    return rows.masked_fill(holes, hole if hole == -math.inf else max(hole, lowest))


@pytest.mark.parametrize("hole", [-math.inf, -1e39])
@pytest.mark.parametrize("vocabulary", [50, 5003])
def test_holes_in_both(implementation, dtype, vocabulary, hole, tokens_of) -> None:
    p, q, holes = with_holes(vocabulary, dtype)
    kept = Rows(p[:, ~holes], q[:, ~holes], tokens_of(p[:, ~holes]))
    tokens = None if kept.tokens is None else (~holes).nonzero()[:, 0][kept.tokens]
    rows = Rows(filled(p, holes, hole), filled(q, holes, hole), tokens)
    *fields, grad_p, grad_q = outcome(rows, implementation.device)
    grads = [grad.cpu() for grad in (grad_p, grad_q)]
    assert not any(bool(grad[:, holes].any()) for grad in grads)
    check_results(implementation, [*fields, *(grad[:, ~holes] for grad in grads)], kept)


def test_a_token_without_probability(implementation, dtype) -> None:
    p, q, holes = with_holes(50, dtype)
    rows = Rows(filled(p, holes, -math.inf), filled(q, holes, -math.inf), torch.zeros(3).long())
    logprob, _, ref_logprob, *_ = outcome(rows, implementation.device)
    assert bool((torch.stack([logprob, ref_logprob]) == -math.inf).all())


def test_holes_in_q_only(implementation, dtype) -> None:
    p, q, holes = with_holes(5003, dtype)
    expected = outcome(Rows(p, q), implementation.device)
    q[0, holes], q[2, 4999] = -math.inf, -math.inf
    p[2, 4999] = p[2].max()
    results = outcome(Rows(p, q), implementation.device)
    assert results[0][0] == math.inf and results[0][2] == math.inf
    assert_same([value[1] for value in results], [value[1] for value in expected])


# Q has mass where P has none: a finite KL(P‖Q) and gradients, right, with exactly 0 for P at the
# holes; the other way round a finite logit far below the others gives a finite, huge KL.
@pytest.mark.parametrize("hole", [-math.inf, -1e9, -1e4, -1e39])
def test_holes_in_p_only(implementation, dtype, hole) -> None:
    p, q, holes = with_holes(1003 if INTERPRETING else 5003, dtype)
    p = filled(p, holes, hole)
    results = outcome(Rows(p, q), implementation.device)
    check_results(implementation, results, Rows(p, q))
    assert not bool(results[1].cpu()[:, holes].any()) and bool(results[2].isfinite().all())
    q, p, tokens = (x.to(implementation.device) for x in (q, p, torch.zeros(3).long()))
    stats, exact = token_stats(q, tokens, p), testing.truth(q, p)
    testing.assert_kl(stats.kl, exact.kl)
    testing.assert_kl(stats.ref_kl, exact.ref_kl)


@pytest.mark.parametrize("vocabulary", [9, SHORT])
def test_nan_poisons_its_own_row(implementation, dtype, vocabulary, tokens_of) -> None:
    p, q = testing.pair("normal3", 9, vocabulary, 0.3, dtype=dtype)
    rows = Rows(p, q, tokens_of(p))
    expected = outcome(rows, implementation.device)
    p[1, 4], q[2, vocabulary - 1], p[3], q[4], p[6, 2], q[7, 0] = (math.nan,) * 4 + (math.inf,) * 2
    p[8], q[8] = -math.inf, -math.inf
    results = outcome(rows, implementation.device)
    assert_same([value[::5] for value in results], [value[::5] for value in expected])
    poisoned = [False, True, True, True, True, False, True, True, True]
    if rows.tokens is None:
        assert results[0].isnan().tolist() == poisoned
    else:
        logprob, entropy, ref_logprob, kl, ref_kl, *_ = (value.isnan() for value in results)
        assert kl.tolist() == ref_kl.tolist() == poisoned
        # At least: kernels read both tensors for a field of either.
        assert bool((logprob & entropy)[[1, 3, 6, 8]].all() & ref_logprob[[2, 4, 7, 8]].all())
