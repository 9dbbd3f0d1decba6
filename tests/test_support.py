"""Statistics of models restricted to a sampler's support, against logits of -inf elsewhere; and
entropy_from_logits.
"""

import math

import cases
import pytest
import torch
from cases import assert_same

from fastkl import TokenStats, entropy_from_logits, testing, token_stats, use_backend

FIELDS, V = TokenStats._fields, 37
PER_ROW = torch.tensor([0.5, 1.0, 1.3, 0.8, 2.0, 0.0])


# Logits, of which those outside the support are NaN or infinite, tokens within it, and its ids: one
# repeated, some absent, the fifth row's all. The last row is masked.
def example(dtype: torch.dtype = torch.float32):
    p, q = testing.pair("normal3", 6, V, 0.7, dtype=dtype)
    ids = torch.rand(6, V, generator=torch.Generator().manual_seed(1)).argsort(-1)[:, :7]
    tokens, ids[:, 4] = ids[:, 2].clone(), ids[:, 0]
    ids[:, 1], ids[:, 5], ids[4] = -1, V, torch.arange(V, V + 7)
    outside = (ids[..., None] != torch.arange(V)).all(-2)
    p[outside], q[outside] = math.nan, -math.inf
    return p, q, tokens, ids, outside, torch.arange(6) < 5


# All fields and the gradients to both, where they are asked for.
def outcome(device: str, p, q, tokens, upstream=None, **more) -> list[torch.Tensor]:
    p, q = (testing.leaf(x.to(device)) for x in (p, q))
    more = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in more.items()}
    fields = token_stats(p, tokens.to(device), q, **more)
    upstream = (cases.upstream_of(p) if upstream is None else upstream).to(fields[0])
    return [*fields, *torch.autograd.grad(fields, (p, q), [*upstream])]


@pytest.mark.parametrize("temperature", [1.0, 0.7, PER_ROW], ids=["1", "0.7", "per row"])
@pytest.mark.parametrize("dtype", [*cases.FLOATS.values(), torch.float64], ids=str)
def test_against_fp64(implementation, dtype, temperature) -> None:
    if implementation.kernels and dtype == torch.float64:
        pytest.skip("float64 is the reference's")
    p, q, tokens, ids, outside, mask = example(dtype)
    more = {"support": ids, "mask": mask, "temperature": temperature}
    *fields, grad_p, grad_q = outcome(implementation.device, p, q, tokens, **more)
    counted = mask & ~outside.all(-1)
    divisor = torch.where(counted, torch.as_tensor(temperature), 1.0)
    # exp(-1e5) is 0, and no infinity.
    exact = testing.truth(*(x.double().masked_fill(outside, -1e5) for x in (p, q)), divisor)
    values = {n: torch.where(counted, v, 0.0) for n, v in exact.stats(tokens).items()}
    testing.assert_stats(dict(zip(FIELDS, fields, strict=True)), values)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {value.dtype for value in fields} == {wide} and grad_p.dtype == grad_q.dtype == dtype
    upstream = dict(zip(FIELDS, cases.upstream_of(p) * counted, strict=True))
    right = testing.gradients(exact, upstream, tokens, divisor)
    for grad, value in zip((grad_p, grad_q), right, strict=True):
        testing.assert_rounded_gradient(grad, value)
        assert not bool(grad.cpu()[outside | ~counted[:, None]].any())


# Infinite entries, in one model or both, and tokens without probability, all as by -inf outside.
@pytest.mark.parametrize("place", ["p", "q", "both", "none"])
def test_infinite_entries(place) -> None:
    p, q, tokens, ids, outside, _ = (x[:4] for x in example(torch.float64))
    tokens[1] = int(outside[1].nonzero()[0])
    for side in {"p": (p,), "q": (q,), "both": (p, q), "none": ()}[place]:
        side[2].scatter_(-1, ids[2, :1], -math.inf)
        side[3].scatter_(-1, tokens[3:], -math.inf)
    minus = [x.masked_fill(outside, -math.inf) for x in (p, q)]
    with use_backend("reference"):
        right = token_stats(minus[0], tokens, minus[1])
        result = token_stats(p, tokens, q, support=ids)
    for name, value, exact in zip(FIELDS, result, right, strict=True):
        testing.assert_near(value, exact, 1e-12, 1e-12, name)
    for name in ("logprob", "entropy", "lse", "ref_lse", "kl" if place == "p" else "ref_kl"):
        leaf = testing.leaf(p if name != "ref_lse" else q)
        both = (leaf, tokens, q) if name != "ref_lse" else (p, tokens, leaf)
        with use_backend("reference"):
            value = getattr(token_stats(*both, support=ids), name)
        (grad,) = torch.autograd.grad(value[value.isfinite()].sum(), leaf)
        assert bool(grad.isfinite().all()) and not bool(grad[outside].any()), name


def test_all_ids_and_one(implementation) -> None:
    p, q = testing.pair("normal3", 4, V, 0.5)
    tokens, every = cases.random_tokens(p), torch.arange(V).flip(0).expand(4, V)
    whole, kept = (outcome(implementation.device, p, q, tokens, support=s) for s in (None, every))
    for result, expected in zip(kept, whole, strict=True):
        torch.testing.assert_close(result, expected, rtol=2e-5, atol=5e-6)
    one = outcome(implementation.device, p, q, tokens, support=tokens[:, None])
    assert not any(bool(value.any()) for value in one[:5])
    assert torch.equal(one[5].cpu(), p.gather(-1, tokens[:, None])[:, 0])


def test_a_rows_bits_are_its_own_and_lists_are_sets(implementation) -> None:
    p, q, tokens, ids, *_ = example()
    ones = torch.ones(len(FIELDS), 6)
    whole = outcome(implementation.device, p, q, tokens, ones, support=ids)
    for index in (torch.arange(6).flip(0), *torch.arange(6)[:, None]):
        part = outcome(
            implementation.device,
            *(x[index] for x in (p, q, tokens)),
            ones[:, index],
            support=ids[index].flip(-1).short(),
        )
        assert_same(part, [value[index.to(value.device)] for value in whole])


def test_which_fields_there_are(implementation) -> None:
    p, q, tokens, ids, *_ = (x.to(implementation.device) for x in example())
    for given, names in (
        ((None, None), {"entropy", "lse"}),
        ((tokens, None), {"logprob", "entropy", "lse"}),
        ((None, q), {"entropy", "kl", "ref_kl", "lse", "ref_lse"}),
    ):
        for support in (ids, None):
            found = token_stats(testing.leaf(p), *given, support=support)._asdict()
            made = {name: x.requires_grad for name, x in found.items() if x is not None}
            assert made == {name: name != "ref_lse" for name in names}


# An error on the reference, NaN on the kernels and in a compiler's graph.
@pytest.mark.parametrize("bad", [{"tokens": V}, {"tokens": -1}, {"temperature": 0.0}])
def test_values_out_of_range(implementation, bad) -> None:
    p, _, tokens, ids, *_ = (x[:4].to(implementation.device) for x in example())
    given = {"tokens": tokens, "temperature": torch.ones(4, device=p.device)}
    (name, value), *_ = bad.items()
    given[name][1] = value
    if not implementation.kernels:
        with pytest.raises(ValueError, match=f"^{name}.*: expected .+, got .+; .+"):
            token_stats(p, **given, support=ids)
    compiled = torch.compile(token_stats, fullgraph=True, backend="eager")
    assert compiled(p, **given, support=ids).logprob.isnan().nonzero().tolist() == [[1]]


# ---- entropy_from_logits


@pytest.mark.parametrize("temperature", [1.0, PER_ROW], ids=["1", "per row"])
@pytest.mark.parametrize("kind", testing.KINDS)
def test_entropy(implementation, kind, temperature, dtype) -> None:
    if implementation.kernels and "peaked" in kind:
        pytest.skip("there a float32 gradient has the error of its row's sums, as torch's has")
    p = testing.pair(kind, 6, 1003, 0.0, dtype=dtype)[0]
    p[5], p[1, 3:9], mask = math.nan, -math.inf, torch.arange(6) < 5
    leaf = testing.leaf(p.to(implementation.device))
    given = temperature.to(leaf.device) if isinstance(temperature, torch.Tensor) else temperature
    value = entropy_from_logits(leaf, mask.to(leaf.device), temperature=given)
    divisor = torch.where(mask, torch.as_tensor(temperature), 1.0)
    exact = testing.truth(p.masked_fill(~mask[:, None], 0.0), p, divisor)
    testing.assert_stats({"entropy": value}, {"entropy": torch.where(mask, exact.entropy, 0.0)})
    assert bool((value >= 0).all())
    upstream = testing.upstream_for(value.cpu()) * mask
    (grad,) = torch.autograd.grad(value, leaf, upstream.to(leaf.device))
    right = testing.gradients(exact, {"entropy": upstream}, None, divisor)
    testing.assert_rounded_gradient(grad, right.p, truncated=implementation.interpreted)
