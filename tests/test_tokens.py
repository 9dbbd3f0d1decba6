"""token_stats: all fields, every mix of upstream gradients, tokens that are out of range;
test_divergence_rows.py has what masks, layouts, infinities and NaN do. selective_log_softmax, of
one id and of K ids per row: values and gradients against float64.
"""

import itertools
import math

import cases
import pytest
import torch
from cases import FLOATS, INTERPRETING, Rows, assert_gradients, random_tokens

from fastkl import TokenStats, selective_log_softmax, testing, token_stats
from fastkl.ops import row_blocks

FIELDS = TokenStats._fields


@pytest.mark.parametrize("kind", testing.KINDS)
@pytest.mark.parametrize("vocabulary", [1000, 9003] if INTERPRETING else [1000, 50257, 128256])
def test_fields_against_fp64(implementation, kind, vocabulary, dtype) -> None:
    if INTERPRETING and vocabulary > 1000 and testing.KINDS.index(kind) % 3:
        pytest.skip("the interpreter's time goes to a third of the large rows")
    p, q = testing.sizes_pair(kind, (1e-3, 0.03, 1.0, 8.0), (0.0, 50.0, -50.0), vocabulary, dtype)
    tokens = random_tokens(p)
    tokens[1] = p[1].argmax()
    p, q, tokens = (value.to(implementation.device) for value in (p, q, tokens.int()))
    stats, exact = token_stats(p, tokens, q), testing.truth(p.cpu(), q.cpu())
    testing.assert_stats(stats._asdict(), exact.stats(tokens.cpu()))


@pytest.mark.parametrize("vocabulary", [1003, 9003 if INTERPRETING else 40001])
def test_all_gradients_of_large_rows(implementation, vocabulary, dtype) -> None:
    if INTERPRETING and vocabulary > 1003 and dtype != torch.bfloat16:
        pytest.skip("too slow in the interpreter")
    p, q = testing.sizes_pair("normal3", (0.1, 1.0), (0.0, 50.0), vocabulary, dtype)
    cases.check(implementation, p, q, tokens=random_tokens(p))


def test_without_reference(implementation, dtype) -> None:
    p = testing.pair("normal3", 4, 1003, 0.0, dtype=dtype)[0]
    p[1, 5:9] = -math.inf
    tokens, leaf = random_tokens(p), testing.leaf(p.to(implementation.device))
    stats, exact = token_stats(leaf, tokens.to(implementation.device)), testing.truth(p, p)
    names = [name for name in FIELDS if getattr(stats, name) is not None]
    assert names == ["logprob", "entropy", "lse"]
    upstream = dict(zip(names, cases.upstream_of(p), strict=False))
    made = {name: getattr(stats, name) for name in names}
    testing.assert_stats(made, exact.stats(tokens, names))
    values = [getattr(stats, name) for name in names]
    grads = torch.autograd.grad(values, leaf, [v.to(leaf.device) for v in upstream.values()])
    assert_gradients(grads, [testing.gradients(exact, upstream, tokens).p])


DEPENDS = dict(zip(FIELDS, ("p", "p", "q", "pq", "pq", "p", "q"), strict=True))


# All 127 sets of fields that a loss may use, with respect to the policy, the reference or both, on
# the reference in blocks of columns; fewer where each takes a compilation or the interpreter's
# time.
#
# A field on which the argument does not depend adds nothing, by a gradient of 0 or by none at all;
# a field requires grad exactly if it depends on an argument that does.
@pytest.mark.parametrize("wrt", ["p", "q", "pq"])
def test_every_mix_of_upstream_gradients(implementation, wrt, monkeypatch) -> None:
    monkeypatch.setattr(row_blocks, "BLOCK_ELEMENTS", 20)
    p, q = testing.pair("normal3", 3, 37, 0.7)
    tokens, temperature = random_tokens(p), torch.tensor([0.7, 1.0, 1.4])
    ours = {
        name: side.to(implementation.device).clone().requires_grad_(name in wrt)
        for name, side in (("p", p), ("q", q))
    }
    given = (tokens.to(implementation.device), ours["q"])
    stats = token_stats(ours["p"], *given, temperature=temperature.to(implementation.device))
    learning = [name for name in FIELDS if set(DEPENDS[name]) & set(wrt)]
    assert [name for name in FIELDS if getattr(stats, name).requires_grad] == learning
    upstream = dict(zip(FIELDS, cases.upstream_of(p), strict=True))
    exact = testing.truth(p, q, temperature)
    few = implementation.kernels and (wrt != "pq" or implementation.interpreted)
    for count in (1, 2, 7) if few else range(1, 8):
        for fields in itertools.combinations(learning, min(count, len(learning))):
            chosen = {name: upstream[name] for name in fields}
            grads = torch.autograd.grad(
                [getattr(stats, name) for name in fields],
                [ours[side] for side in wrt],
                [value.to(implementation.device) for value in chosen.values()],
                retain_graph=True,
                materialize_grads=True,
            )
            values = testing.gradients(exact, chosen, tokens, temperature)
            for side, grad in zip(wrt, grads, strict=True):
                what = f"{', '.join(fields)} to {side}"
                testing.assert_gradient(grad, getattr(values, side), what, 2e-5)


def test_a_row_of_minus_infinity(implementation) -> None:
    p = testing.pair("normal3", 2, 23, 0.3)[0].to(implementation.device)
    p[1] = -math.inf
    tokens, support = (x.to(p.device) for x in (torch.arange(2), torch.arange(6).view(2, 3)))
    for lse, stats in (
        (math.nan, token_stats(p, tokens, p)),
        (-math.inf, token_stats(p, tokens, p, support=support)),
    ):
        assert str(float(stats.lse[1])) == str(float(stats.ref_lse[1])) == str(lse)
        assert [float(stats[i][0]) for i in (3, 4)] == [0, 0] and stats.kl[1].isnan()


# An error on the reference; on the kernels NaN in its two log-probabilities, and everything else as
# ever.
@pytest.mark.parametrize("token", [-1, -100, 203, 1 << 40])
def test_token_out_of_range(implementation, token) -> None:
    p, q = testing.pair("normal3", 3, 203, 0.3)
    good, bad = torch.tensor([5, 7, 202]), torch.tensor([5, token, 202])
    if not implementation.kernels:
        words = rf"^tokens: expected ids in 0 … 202, got {token};"
        for ref in (q, None):
            with pytest.raises(ValueError, match=words):
                token_stats(p, bad, ref)
        return
    expected, results = (
        cases.outcome(Rows(p, q, tokens), implementation.device) for tokens in (good, bad)
    )
    for name, result, value in zip((*FIELDS, "p", "q"), results, expected, strict=True):
        assert "logprob" not in name or bool(result[1].isnan())
        rows = [0, 1, 2] if name in ("entropy", "kl", "ref_kl") else [0, 2]
        testing.assert_same_bits(result[rows], value[rows], name)


# ---- selective_log_softmax


def check_selected(implementation, logits: torch.Tensor, index: torch.Tensor) -> None:
    leaf, exact = testing.leaf(logits.to(implementation.device)), testing.leaf(logits.double())
    result = selective_log_softmax(leaf, index.to(implementation.device))
    several = index.long() if index.dim() == logits.dim() else index.long()[..., None]
    expected = exact.log_softmax(-1).gather(-1, several).view(index.shape)
    assert result.dtype == torch.float32 and result.shape == index.shape
    testing.assert_near(result, expected, 2e-6, 2e-6, "log-softmax")
    assert bool((result <= 0).all())
    upstream = testing.upstream_for(result)
    (grad,) = torch.autograd.grad(result, leaf, upstream)
    assert grad.dtype == logits.dtype
    (truth,) = torch.autograd.grad(expected, exact, upstream.double().cpu())
    testing.assert_rounded_gradient(grad, truth, truncated=implementation.interpreted)


SIZES = [
    (1, 3),
    (9, 1),
    (9, 9),
    (1003, 5),
    (1003, 100),
    (1, None),
    (9, None),
    (1003, None),
    (40001, None),
]


@pytest.mark.parametrize("vocabulary, count", SIZES)
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_selected_against_fp64(implementation, dtype, vocabulary, count) -> None:
    if implementation.interpreted:
        vocabulary = min(vocabulary, 9003 if dtype == torch.bfloat16 else 1003)
    logits = testing.pair("normal3", 6, vocabulary, 0.0, dtype=dtype)[0].view(2, 3, vocabulary)
    shape = (2, 3) if count is None else (2, 3, count)
    index = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(2))
    check_selected(implementation, logits, index)


@pytest.mark.parametrize("kind", [torch.int32, torch.int16, torch.uint8, torch.int8], ids=str)
def test_index_types_and_layouts(implementation, kind) -> None:
    logits = testing.pair("normal3", 6, 203, 0.0)[0].view(2, 3, 203)
    index = torch.randint(100, (4, 3, 2), generator=torch.Generator().manual_seed(2))
    index = index.to(kind).transpose(0, 2)
    check_selected(implementation, logits, index)
    check_selected(implementation, logits[0, 0], index[0, 0])


@pytest.mark.parametrize("rows, count", [(0, 4), (3, 0)])
def test_nothing_to_select(implementation, rows, count) -> None:
    leaf = torch.randn(rows, 203, device=implementation.device, requires_grad=True)
    result = selective_log_softmax(leaf, torch.empty(rows, count, device=leaf.device).long())
    result.sum().backward()
    assert result.numel() == 0 and bool((leaf.grad == 0).all())


# Log-probabilities from 0 to -2000 of one row, a shift of all logits, and -inf: each has its own
# digits, none those of the least likely. Differences of logits beyond float32's largest number are
# -inf, as in torch; equal ones are as likely.
def test_digits(implementation) -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0)) - 40
    logits[:, :7] = -torch.tensor([0.0, 1e-3, 1.0, 30.0, 400.0, 2000.0, math.inf])
    logits[1] += 30
    logits[2, :7] = -math.inf  # of no id is there anything
    logits[3:] = 0.0
    logits[3, :3] = torch.tensor([3e38, -3e38, 3e38])
    leaf, index = (
        testing.leaf(logits.to(implementation.device)),
        torch.arange(7).flip(0).expand(5, 7),
    )
    result = selective_log_softmax(leaf, index.to(implementation.device))
    exact = logits.double().log_softmax(-1).gather(-1, index)
    exact = torch.where(exact < -3.4e38, -math.inf, exact)
    testing.assert_near(result, exact, 2e-6, 2e-6, "log-softmax")
    result[:2, 1:].sum().backward()
    assert bool(leaf.grad.isfinite().all())


# An error on the reference; on the kernels NaN in its own entry, gradient 0 from it, the others as
# ever.
@pytest.mark.parametrize("identity", [-1, -100, 203, 1 << 40])
def test_ids_out_of_range(implementation, identity) -> None:
    logits = testing.pair("normal3", 3, 203, 0.0, device=implementation.device)[0]
    index = torch.tensor([[5, 0], [202, 0], [7, 7]], device=implementation.device)
    bad, others = index.clone(), torch.arange(6, device=index.device).view(3, 2) != 3
    bad[~others] = identity
    if not implementation.kernels:
        with pytest.raises(ValueError, match="index"):
            selective_log_softmax(logits, bad)
        return
    leaves = [testing.leaf(logits) for _ in range(2)]
    results = [selective_log_softmax(*pair) for pair in zip(leaves, (index, bad), strict=True)]
    assert torch.equal(results[1].isnan(), ~others)
    testing.assert_near(results[1][others], results[0][others], 1e-6, 1e-6, "the others")
    for value in results:
        value[others].sum().backward()
    testing.assert_near(leaves[1].grad, leaves[0].grad, 1e-5, 1e-6, "gradient")


# Ids that occur twice included.
def test_gradcheck_in_fp64() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, dtype=torch.float64, generator=generator).requires_grad_()
    index = torch.tensor([[0, 1, 0, 0], [4, 4, 4, 4], [3, 2, 1, 0]])
    assert torch.autograd.gradcheck(lambda value: selective_log_softmax(value, index), (logits,))
    alone = selective_log_softmax(logits, index[:, :1])[:, 0]
    assert torch.equal(alone, selective_log_softmax(logits, index[:, 0]))


# Three equal peaks of which one is listed: the two others' share has digits at any size.
@pytest.mark.parametrize("size", [1e3, 1e9, 1e12, 1e17, 1e30, -1e30])
def test_peaks_that_are_not_listed(implementation, size) -> None:
    logits = torch.full((1, 9), min(0.0, 2 * size))
    logits[0, 3:6] = size
    index = torch.tensor([[3, 1]], device=implementation.device)
    result = selective_log_softmax(logits.to(implementation.device), index)
    testing.assert_near(result[:, :1], torch.full((1, 1), -math.log(3)), 2e-6, 0.0, "log-softmax")


@pytest.mark.skipif(INTERPRETING, reason="the ops' rules do not depend on the kernels")
def test_opcheck(implementation) -> None:
    logits = testing.pair("normal3", 6, 29, 0.0)[0].view(2, 3, 29)
    index = torch.randint(29, (2, 3, 4), generator=torch.Generator().manual_seed(2))
    assert len(cases.check_ops(lambda: check_selected(implementation, logits, index))) == 2
