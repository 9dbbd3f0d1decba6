"""The divergences beside the KL: values and gradients against fp64, properties that all of them
have, special values, and how they are related to each other and to the KL.
"""

import math

import pytest
import torch
from cases import INTERPRETING, assert_same, padded
from family import KINDS, MEMBERS, Member, plain_gradients

import fastkl
from fastkl import testing

SIZES = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 30.0)
SHIFTS = (0.0, 50.0)
SHORT = 203 if INTERPRETING else 1003
each_member = pytest.mark.parametrize("name", MEMBERS)
each_kind = pytest.mark.parametrize("name", KINDS)
# Where the interpreter's time allows one of each kind.
each_affordable = each_kind if INTERPRETING else each_member


# The first of these values, which shows most, or all of them.
def affordable(*values):
    return values[:1] if INTERPRETING else values


# To a kernel a type of 16 bits is another load and store.
@pytest.fixture
def any_dtype(dtype) -> torch.dtype:
    if INTERPRETING and dtype != torch.float32:
        pytest.skip("one type in the interpreter is enough")
    return dtype


# Value and both gradients, on `device` for these very strides.
def outcome(
    member: Member, p, q, device: str, mask=None, upstream=None, **more
) -> list[torch.Tensor]:
    p, q, mask = (None if value is None else value.to(device) for value in (p, q, mask))
    leaves = testing.leaf(p), testing.leaf(q)
    value = member(*leaves, mask, **more)
    upstream = testing.upstream_for(value) if upstream is None else upstream.to(value)
    return [value, *torch.autograd.grad(value, leaves, upstream)]


# Compare an outcome with float64 of the logits.
#
# Kernels subtract probabilities in float32, each off by 2^-23, in gradients of 16 bits as in cases:
# an upstream gradient of up to 4 makes that 1e-6. A float32 gradient may be as far off as torch's.
def check_results(implementation, member: Member, results, p, q, temperature=1.0) -> None:
    value, *grads = (result.cpu() for result in results)
    assert value.dtype == torch.float32 and value.shape == p.shape[:-1]
    assert (grads[0].dtype, grads[1].dtype) == (p.dtype, q.dtype)
    testing.assert_kl(value, member.exact(p, q, temperature), "value")
    upstream = testing.upstream_for(value)
    exact = member.exact_gradients(p, q, upstream, temperature)
    plain = plain_gradients(member, p.float(), q.float(), upstream, temperature)
    absolute = 1e-6 * implementation.kernels
    for side, grad, right, other in zip("pq", grads, exact, plain, strict=True):
        what, more = f"gradient to {side}", {"truncated": INTERPRETING, "absolute": absolute}
        if grad.dtype != torch.float32:
            testing.assert_rounded_gradient(grad, right, what, **more)
            continue
        floor = testing.GRADIENT_FLOOR * (upstream / temperature).abs().clamp(min=1.0)
        allowed = testing.GRADIENT_LIMIT * torch.maximum(right.norm(dim=-1), floor)
        other_error = (other.double() - right).norm(dim=-1).nan_to_num(0.0, 0.0)
        allowed = torch.maximum(allowed, other_error)
        error = (grad.double() - right).norm(dim=-1)
        testing.assert_near(error, torch.zeros_like(error), 0.0, allowed, what)


def check(implementation, member: Member, p, q, temperature=1.0) -> None:
    results = outcome(member, p, q, implementation.device, temperature=temperature)
    check_results(implementation, member, results, p, q, temperature)


# ---- accuracy


@pytest.mark.parametrize("kind", testing.KINDS)
@each_member
def test_against_fp64(implementation, name, kind, dtype) -> None:
    turn = testing.KINDS.index(kind) - list(MEMBERS).index(name)
    if INTERPRETING and turn % 6:
        pytest.skip("the interpreter's time goes to a sixth of them")
    sizes = SIZES[:: 2 if INTERPRETING else 1] if dtype != torch.float16 else SIZES[2:]
    p, q = testing.sizes_pair(kind, sizes, SHIFTS, SHORT, dtype)
    check(implementation, MEMBERS[name], p, q)


VOCABULARIES = (1, 8, 9, 40001) if INTERPRETING else (1, 2, 3, 7, 8, 9, 127, 4097, 40001)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@each_kind
def test_vocabularies(implementation, name, vocabulary, dtype) -> None:
    if INTERPRETING and (dtype != torch.float32) != (vocabulary == 8):
        pytest.skip("one type shows it")
    sizes = (1e-3, 0.1, 3.0) if vocabulary < 40001 else (0.1,)
    check(
        implementation,
        KINDS[name],
        *testing.sizes_pair("normal3", sizes, SHIFTS, vocabulary, dtype),
    )


# A constant that float32 adds exactly, to either side, changes the result by its rounding.
@pytest.mark.parametrize("shifts", affordable((64.0, -64.0), (-200.0, 0.0), (8.0, 1000.0)), ids=str)
@each_kind
def test_constant_shifts(implementation, name, shifts) -> None:
    pair = testing.sizes_pair("normal3", (2e-3, 0.3, 3.0), (0.0,), SHORT)
    pair = [torch.round(value * 1024) / 1024 for value in pair]
    moved = [value + shift for value, shift in zip(pair, shifts, strict=True)]
    results = outcome(KINDS[name], *moved, implementation.device)
    check_results(implementation, KINDS[name], results, *pair)


PER_ROW = torch.tensor([0.25, 0.7, 3.0])


@pytest.mark.parametrize("temperature", affordable(PER_ROW, 0.7, 3), ids=str)
@each_kind
def test_temperature(implementation, name, temperature) -> None:
    pair = testing.sizes_pair("normal3", (1e-3, 0.3, 3.0), (0.0, 7.0), SHORT)
    check(implementation, KINDS[name], *pair, temperature)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@each_kind
def test_layouts(implementation, name, layout) -> None:
    if INTERPRETING and (list(testing.LAYOUTS).index(layout) - list(KINDS).index(name)) % 5:
        pytest.skip("the interpreter's time goes to a fifth of them")
    bases = [side.view(4, 5, 6, -1) for side in testing.pair("normal3", 120, 43, 0.3)]
    p, q = (testing.LAYOUTS[layout](base[..., :40]) for base in bases)
    check(implementation, KINDS[name], p, q)
    check(implementation, KINDS[name], p, q.clone(memory_format=torch.contiguous_format))


# ---- properties


@each_affordable
def test_never_negative(implementation, name, any_dtype) -> None:
    for kind in affordable(*testing.KINDS[::2]):
        p, q = testing.sizes_pair(kind, (1e-7, 1e-6, 1e-5, 1e-4), SHIFTS, SHORT, any_dtype)
        p[::2, 0], q[::2, 0] = -math.inf, -math.inf  # rows that the kernels read again, too
        assert bool((outcome(MEMBERS[name], p, q, implementation.device)[0] >= 0).all())


@pytest.mark.parametrize("vocabulary", affordable(129, 1, SHORT))
@each_affordable
def test_equal_rows(implementation, name, vocabulary, any_dtype) -> None:
    rows = [testing.logits(kind, 1, vocabulary) for kind in testing.KINDS[::2]]
    p = torch.cat(rows).to(any_dtype)
    if vocabulary > 1:
        p[1, 1::3] = -math.inf
    for q in (p, p.clone()):
        for value in outcome(MEMBERS[name], p, q, implementation.device):
            assert bool((value == 0).all()), f"up to {value.abs().max():.3g}"


@each_affordable
def test_gradients_sum_to_zero(implementation, name) -> None:
    p, q = testing.sizes_pair("normal3", (0.01, 0.1, 1.0), SHIFTS, SHORT)
    for grad in outcome(MEMBERS[name], p, q, implementation.device)[1:]:
        total, size = grad.double().sum(-1).abs(), grad.double().abs().sum(-1)
        assert bool((total <= 1e-5 * size + 1e-9).all()), total / size


@each_kind
def test_mask_and_nan(implementation, name, any_dtype) -> None:
    sizes, member, device = (0.01, 0.1, 1.0, 3.0, 0.3), KINDS[name], implementation.device
    p, q = testing.sizes_pair("normal3", sizes, SHIFTS, SHORT, any_dtype)
    mask, upstream = torch.tensor([True, False, True, False, True]), torch.arange(1.0, 6.0)
    expected = outcome(member, *[side[mask] for side in (p, q)], device, upstream=upstream[mask])
    p[1], q[3, ::2] = math.nan, math.nan
    results = outcome(member, p, q, device, mask, upstream)
    assert_same([result[mask] for result in results], expected)
    assert not any(bool(result[~mask].any()) for result in results)
    poisoned = outcome(member, p, q, device, upstream=upstream)
    assert poisoned[0].isnan().tolist() == (~mask).tolist()
    assert_same([result[mask] for result in poisoned], expected)
    upstream[2] = 0.0
    grads = outcome(member, p, q, device, upstream=upstream * mask)[1:]
    assert not any(bool(grad[1:4].any()) for grad in grads)


@each_kind
def test_a_rows_bits_are_its_own(implementation, name, any_dtype) -> None:
    sizes, member, device = (0.01, 0.1, 1.0, 3.0, 30.0), KINDS[name], implementation.device
    p, q = testing.sizes_pair("zipf", sizes, SHIFTS, SHORT, any_dtype)
    whole = outcome(member, p, q, device, upstream=torch.ones(5))
    order = torch.tensor([3, 0, 4, 2, 1])
    for index in (order, *torch.arange(5)[:, None][:: 4 if INTERPRETING else 1]):
        part = outcome(member, p[index], q[index], device, upstream=torch.ones(len(index)))
        assert_same(part, [value[index] for value in whole])
    for padding, offset in ((5, 1), (0, 3)):
        moved = [padded(side.to(device), padding, offset) for side in (p, q)]
        assert_same(outcome(member, *moved, device, upstream=torch.ones(5)), whole)


# ---- special values

HOLES = (-math.inf, torch.finfo(torch.float32).min, -1e9)


# Logits of which one row has a hole in P alone, one in Q alone, one in both, one in each of halves
# that have no entry in common; in every row's last column both have one.
def with_holes(hole: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    p, q = testing.sizes_pair("normal3", (1e-3, 0.1, 1.0, 1.0), (0.0, 50.0), 50, dtype)
    hole = max(hole, torch.finfo(dtype).min) if hole > -math.inf else hole
    p[:, -1], q[:, -1], p[2, ::7], q[2, ::7], p[3, :25], q[3, 25:] = (hole,) * 6
    p[0, 3:5], q[1, 7:9] = hole, hole
    return p, q


@pytest.mark.parametrize("hole", HOLES)
@each_member
def test_holes(implementation, name, hole, any_dtype) -> None:
    if INTERPRETING and name not in KINDS and hole > -math.inf:
        pytest.skip("one of each kind in the interpreter is enough")
    p, q = with_holes(hole, any_dtype)
    exact = MEMBERS[name].exact(p, q)
    value, *grads = (result.cpu() for result in outcome(MEMBERS[name], p, q, implementation.device))
    testing.assert_kl(value, exact.float())
    # Beyond it not even float64 tells the entries of a row apart.
    finite, told_apart, more = value < math.inf, exact < 1e15, {"truncated": INTERPRETING}
    expected = MEMBERS[name].exact_gradients(p, q, testing.upstream_for(value))
    for grad, right in zip(grads, expected, strict=True):
        assert bool(grad[finite].isfinite().all()) and not bool(grad[finite, -1].any())
        testing.assert_rounded_gradient(grad[told_apart], right[told_apart], absolute=1e-6, **more)


# ---- how they are related


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return testing.sizes_pair("normal3", (1e-3, 1e-2, 0.1, 1.0, 10.0), SHIFTS, SHORT)


# Two functions whose values and gradients are the same to the bit.
SAME = {
    "skew 0 is the KL": (
        Member(fastkl.skew_kl_divergence, "", {"alpha": 0}),
        Member(fastkl.kl_divergence, ""),
    ),
    "order 1 is the KL": (
        Member(fastkl.renyi_divergence, "", {"alpha": 1}),
        Member(fastkl.kl_divergence, ""),
    ),
    "js exchanged": (
        Member(fastkl.js_divergence, "", {"beta": 0.25}),
        Member(lambda p, q, mask: fastkl.js_divergence(q, p, beta=0.75), ""),
    ),
    "a whole number": (
        Member(fastkl.renyi_divergence, "", {"alpha": 2}),
        Member(fastkl.renyi_divergence, "", {"alpha": 2.0}),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_identities(implementation, name) -> None:
    assert_same(*(outcome(one, *batch(), implementation.device) for one in SAME[name]))


@pytest.mark.parametrize(
    "function, options",
    [
        (fastkl.js_divergence, {"beta": 0}),
        (fastkl.js_divergence, {"beta": 1.0}),
        (fastkl.js_divergence, {"beta": 1e-20}),
        (fastkl.skew_kl_divergence, {"alpha": 1}),
    ],
)
def test_mixtures_of_one_model_are_zero(implementation, function, options) -> None:
    p, q = with_holes(-math.inf, torch.float32)
    for value in outcome(Member(function, "", options), p, q, implementation.device):
        assert bool((value == 0).all())


LARGEST = {
    "js 0.1": -0.1 * math.log(0.1) - 0.9 * math.log(0.9),
    "js 0.5": math.log(2),
    "skew_kl 0.1": -math.log(0.1),
    "total_variation": 1.0,
}


# A divergence's largest value, that of disjoint rows, and Pinsker's inequality.
def test_bounds(implementation) -> None:
    for dtype in (torch.float32, torch.float64)[: 1 if implementation.kernels else 2]:
        noise = torch.randn(2, 1000, 50, dtype=dtype, generator=torch.Generator().manual_seed(1))
        sizes = torch.logspace(-1, 2, 1000, dtype=dtype)[:, None]
        p, q = (noise * sizes)[:, :: 50 if INTERPRETING else 1].to(implementation.device)
        for name, largest in LARGEST.items():
            assert bool((MEMBERS[name](p, q) <= torch.tensor(largest, dtype=dtype)).all()), name
        variation = fastkl.total_variation(p, q)
        assert bool((fastkl.kl_divergence(p, q) >= 2 * (1 - 1e-6) * variation.square()).all())


@pytest.mark.parametrize("alpha", affordable(1 - 1e-6, 1 + 1e-6))
def test_renyi_near_order_one(implementation, alpha) -> None:
    check(implementation, MEMBERS["renyi 2.0"]._replace(options={"alpha": alpha}), *batch())
