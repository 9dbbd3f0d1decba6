"""token_stats: all fields, every mix of upstream gradients, tokens that are out of range;
test_divergence_rows.py has what masks, layouts, infinities and NaN do.
"""

import itertools
import math

import cases
import pytest
import torch
from cases import INTERPRETING, Rows, assert_gradients, random_tokens

from fastkl import TokenStats, testing, token_stats
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
    assert stats[2:] == (None, None, None)
    upstream = dict(zip(FIELDS, cases.upstream_of(p)[:2], strict=False))
    testing.assert_stats({name: getattr(stats, name) for name in upstream}, exact.stats(tokens))
    grads = torch.autograd.grad(stats[:2], leaf, [v.to(leaf.device) for v in upstream.values()])
    assert_gradients(grads, [testing.gradients(exact, upstream, tokens).p])


DEPENDS = {"logprob": "p", "entropy": "p", "ref_logprob": "q", "kl": "pq", "ref_kl": "pq"}


# All 31 sets of fields that a loss may use, with respect to the policy, the reference or both, on
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
    for count in (1, 2, 5) if few else range(1, 6):
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


# An error on the reference; on the kernels NaN in its two log-probabilities, and everything else as
# ever.
@pytest.mark.parametrize("token", [-1, -100, 203, 1 << 40])
def test_token_out_of_range(implementation, token) -> None:
    p, q = testing.pair("normal3", 3, 203, 0.3)
    good, bad = torch.tensor([5, 7, 202]), torch.tensor([5, token, 202])
    if not implementation.kernels:
        words = rf"^tokens \(index\): expected ids in 0 … 202, got {token};"
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
