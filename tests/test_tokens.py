"""token_stats: all fields, every mix of upstream gradients, tokens that are ignored or out of
range.
"""

import itertools
import math

import pytest
import torch
from cases import INTERPRETING, assert_gradients, assert_same

from fastkl import TokenStats, testing, token_stats

FIELDS = TokenStats._fields


def random_tokens(leading: torch.Size, vocabulary: int) -> torch.Tensor:
    tokens = torch.randint(vocabulary, leading, generator=torch.Generator().manual_seed(0))
    if tokens.numel() > 1:
        tokens.view(-1)[0], tokens.view(-1)[-1] = 0, vocabulary - 1
    return tokens


def on(device: str, *values):
    return [value.to(device) if isinstance(value, torch.Tensor) else value for value in values]


def upstream_of(stats: TokenStats) -> dict[str, torch.Tensor]:
    fields = {name: value for name, value in stats._asdict().items() if value is not None}
    return {name: testing.upstream_for(fields[name], i) for i, name in enumerate(fields)}


def check(implementation, p, q, tokens, temperature=1.0, gradients=True) -> None:
    leaves = [testing.leaf(side.to(implementation.device)) for side in (p, q)]
    given, other = on(implementation.device, tokens, temperature)
    stats = token_stats(leaves[0], given, leaves[1], temperature=other)
    for value in stats:
        assert value.dtype == torch.float32 and value.shape == p.shape[:-1]
        assert value.device.type == implementation.device
    exact = testing.truth(p, q, temperature)
    testing.assert_stats(stats._asdict(), exact.stats(tokens))
    if gradients:
        upstream = upstream_of(stats)
        grads = torch.autograd.grad(stats, leaves, list(upstream.values()))
        assert [grad.dtype for grad in grads] == [p.dtype, q.dtype]
        values = testing.gradients(exact, upstream, tokens, temperature)
        assert_gradients(grads, values)


# ---- values and gradients


@pytest.mark.parametrize("kind", testing.KINDS)
@pytest.mark.parametrize("vocabulary", [1000, 9003] if INTERPRETING else [1000, 50257, 128256])
def test_fields_against_fp64(implementation, kind, vocabulary, dtype) -> None:
    if INTERPRETING and vocabulary > 1000 and testing.KINDS.index(kind) % 3:
        pytest.skip("the interpreter's time goes to a third of the large rows")
    p, q = testing.sizes_pair(kind, (1e-3, 0.03, 1.0, 8.0), (0.0, 50.0, -50.0), vocabulary, dtype)
    tokens = random_tokens(p.shape[:-1], vocabulary)
    tokens[1] = p[1].argmax()
    check(implementation, p, q, tokens.int(), gradients=False)


PER_ROW = torch.tensor([[0.25, 0.5, 1.0], [1.5, 2.0, 0.75]])


@pytest.mark.parametrize("temperature", [0.5, 3.0, PER_ROW], ids=["0.5", "3.0", "per row"])
def test_temperature(implementation, temperature) -> None:
    sizes = (0.01, 0.1, 0.3, 1.0, 3.0, 5.0)
    p, q = (side.view(2, 3, -1) for side in testing.sizes_pair("normal3", sizes, (0.0,), 515))
    check(implementation, p, q, random_tokens(p.shape[:-1], 515).short(), temperature)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(implementation, layout) -> None:
    bases = [side.view(4, 5, 6, -1) for side in testing.pair("normal3", 120, 43, 0.3)]
    p, q = (testing.LAYOUTS[layout](base[..., :40]) for base in bases)
    base_tokens = random_tokens((4, 5, 6), 40)
    tokens = testing.LAYOUTS[layout](base_tokens[..., None])[..., 0]
    kind = torch.uint8 if layout.startswith("expanded") else torch.int64
    check(implementation, p, q, tokens.to(kind), gradients=False)


@pytest.mark.parametrize("vocabulary", [1003, 9003 if INTERPRETING else 40001])
def test_all_gradients_of_large_rows(implementation, vocabulary, dtype) -> None:
    if INTERPRETING and vocabulary > 1003 and dtype != torch.bfloat16:
        pytest.skip("too slow in the interpreter")
    p, q = testing.sizes_pair("normal3", (0.1, 1.0), (0.0, 50.0), vocabulary, dtype)
    check(implementation, p, q, random_tokens(p.shape[:-1], vocabulary))


def test_without_reference(implementation, dtype) -> None:
    p = testing.pair("normal3", 4, 1003, 0.0, dtype=dtype)[0]
    p[1, 5:9] = -math.inf
    tokens, leaf = random_tokens(p.shape[:-1], 1003), testing.leaf(p.to(implementation.device))
    stats = token_stats(leaf, tokens.to(implementation.device))
    assert stats[2:] == (None, None, None)
    assert stats.logprob.requires_grad and stats.entropy.requires_grad
    exact, upstream = testing.truth(p, p), upstream_of(stats)
    testing.assert_stats({name: getattr(stats, name) for name in upstream}, exact.stats(tokens))
    grads = torch.autograd.grad(stats[:2], leaf, list(upstream.values()))
    assert_gradients(grads, [testing.gradients(exact, upstream, tokens).p])


@pytest.mark.parametrize("wrt", ["p", "q", "pq"])
def test_every_mix_of_upstream_gradients(implementation, wrt) -> None:
    """All 31 sets of fields that a loss may use, with respect to the policy, the reference or both;
    fewer where each takes a compilation or the interpreter's time.

    A field on which the argument does not depend adds nothing, by a gradient of 0 or by none at
    all; a field requires grad exactly if it depends on an argument that does.
    """
    device, sides = (
        implementation.device,
        dict(zip("pq", testing.pair("normal3", 3, 37, 0.7), strict=True)),
    )
    tokens = random_tokens((3,), 37)
    ours = {n: side.to(device).clone().requires_grad_(n in wrt) for n, side in sides.items()}
    stats = token_stats(ours["p"], tokens.to(device), ours["q"])
    depends = {"logprob": "p", "entropy": "p", "ref_logprob": "q", "kl": "pq", "ref_kl": "pq"}
    learning = [name for name in FIELDS if set(depends[name]) & set(wrt)]
    assert [name for name in FIELDS if getattr(stats, name).requires_grad] == learning
    upstream, truth = upstream_of(stats), testing.truth(*sides.values())
    each = {n: testing.gradients(truth, {n: upstream[n]}, tokens) for n in FIELDS}
    few = implementation.kernels and (wrt != "pq" or implementation.interpreted)
    for count in (1, 2, 5) if few else range(1, 6):
        for fields in itertools.combinations(learning, min(count, len(learning))):
            grads = torch.autograd.grad(
                [getattr(stats, name) for name in fields],
                [ours[side] for side in wrt],
                [upstream[name] for name in fields],
                retain_graph=True,
                allow_unused=True,
            )
            for side, grad in zip(wrt, grads, strict=True):
                value = sum(getattr(each[name], side) for name in fields)
                grad = torch.zeros_like(ours[side]) if grad is None else grad
                testing.assert_gradient(grad, value, f"{', '.join(fields)} to {side}")


def test_holes(implementation, dtype) -> None:
    p, q = testing.sizes_pair("normal3", (0.01, 0.1, 1.0), (0.0,), 203, dtype)
    holes = torch.zeros(203, dtype=torch.bool)
    holes[5::3] = True
    device, tokens = implementation.device, torch.tensor([0, 1, 3])
    leaves = [testing.leaf(side.masked_fill(holes, -math.inf).to(device)) for side in (p, q)]
    stats = token_stats(leaves[0], tokens.to(device), leaves[1])
    exact, upstream = testing.truth(p[:, ~holes], q[:, ~holes]), upstream_of(stats)
    testing.assert_stats(stats._asdict(), exact.stats(tokens))
    grads = torch.autograd.grad(stats, leaves, list(upstream.values()))
    assert not any(bool(grad.cpu()[:, holes].any()) for grad in grads)
    values = testing.gradients(exact, upstream, tokens)
    assert_gradients([grad.cpu()[:, ~holes] for grad in grads], values)
    at_hole = token_stats(leaves[0], torch.full((3,), 8, device=device), leaves[1])
    assert bool((torch.stack([at_hole.logprob, at_hole.ref_logprob]) == -math.inf).all())


# ---- tokens and rows that do not count


def outcome(implementation, p, q, tokens, mask=None, upstream=None) -> list[torch.Tensor]:
    p, q, tokens, mask = on(implementation.device, p, q, tokens, mask)
    leaves = testing.leaf(p), testing.leaf(q)
    stats = token_stats(leaves[0], tokens, leaves[1], mask=mask)
    upstream = testing.upstream_for(torch.empty(5, len(p))) if upstream is None else upstream
    grads = torch.autograd.grad(stats, leaves, list(upstream.to(p.device)))
    return [value.cpu() for value in (*stats, *grads)]


def test_ignored_positions(implementation, dtype) -> None:
    p, q = testing.pair("normal3", 5, 203, 0.3, dtype=dtype)
    mask = torch.tensor([True, False, True, False, True])
    tokens, upstream = (
        torch.tensor([5, -100, 202, 1 << 40, 0]),
        testing.upstream_for(torch.empty(5, 5)),
    )
    expected = outcome(implementation, p[mask], q[mask], tokens[mask], None, upstream[:, mask])
    p[1], q[3] = math.nan, math.inf
    results = outcome(implementation, p, q, tokens, mask, upstream)
    assert not any(bool(result[~mask].any()) for result in results)
    assert_same([result[mask] for result in results], expected)


@pytest.mark.parametrize("token", [-1, -100, 203, 1 << 40])
def test_token_out_of_range(implementation, token) -> None:
    """An error on the reference; on the kernels NaN in its two log-probabilities, and everything
    else as ever.
    """
    p, q = testing.pair("normal3", 3, 203, 0.3)
    good, bad = torch.tensor([5, 7, 202]), torch.tensor([5, token, 202])
    if not implementation.kernels:
        words = rf"^tokens \(index\): expected ids in 0 … 202, got {token};"
        for call in (lambda: token_stats(p, bad, q), lambda: token_stats(p, bad)):
            with pytest.raises(ValueError, match=words):
                call()
        return
    expected, results = (outcome(implementation, p, q, tokens) for tokens in (good, bad))
    for name, result, value in zip((*FIELDS, "p", "q"), results, expected, strict=True):
        assert "logprob" not in name or bool(result[1].isnan())
        rows = [0, 1, 2] if name in ("entropy", "kl", "ref_kl") else [0, 2]
        testing.assert_same_bits(result[rows], value[rows], name)


def test_poison_of_one_row(implementation) -> None:
    p, q = testing.pair("normal3", 5, 1003, 0.3)
    tokens = random_tokens(p.shape[:-1], 1003)
    expected = outcome(implementation, p, q, tokens)
    p[1, 500], q[3, 7] = math.nan, math.nan
    results = outcome(implementation, p, q, tokens)
    assert_same([value[::2] for value in results], [value[::2] for value in expected])
    logprob, entropy, ref_logprob, *kls = results[:5]
    assert bool(entropy[1].isnan()) and bool(logprob[1].isnan()) and bool(ref_logprob[3].isnan())
    assert all(bool(value[1::2].isnan().all()) for value in kls)
