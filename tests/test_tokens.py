"""token_stats and selective_log_softmax: all fields, every mix of upstream gradients, tokens that
are ignored or out of range.
"""

from __future__ import annotations

import itertools
import math
import os

import cases
import pytest
import torch

import fastkl
from fastkl import TokenStats, selective_log_softmax, testing, token_stats

if os.environ.get("TRITON_INTERPRET") == "1":
    cases.compute_as_a_gpu()

FIELDS = TokenStats._fields
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(params=FLOATS.values(), ids=FLOATS)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """A type of logits."""
    return request.param


def exact_stats(
    p: torch.Tensor, q: torch.Tensor, tokens: torch.Tensor, temperature: float | torch.Tensor = 1.0
) -> tuple[torch.Tensor, ...]:
    """All fields in float64, with autograd."""
    return tuple(testing.truth(p, q, temperature).stats(tokens).values())


def random_tokens(leading: torch.Size, vocabulary: int, seed: int = 0) -> torch.Tensor:
    """Token ids, the first and the last of the vocabulary among them."""
    tokens = torch.randint(vocabulary, leading, generator=torch.Generator().manual_seed(seed))
    if tokens.numel() > 1:
        tokens.view(-1)[0], tokens.view(-1)[-1] = 0, vocabulary - 1
    return tokens


def check_fields(
    stats: TokenStats,
    p: torch.Tensor,
    q: torch.Tensor,
    tokens: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
) -> None:
    """All fields against fp64 of the same CPU inputs."""
    testing.assert_stats(stats._asdict(), testing.truth(p, q, temperature).stats(tokens))


# ---- values


@pytest.mark.parametrize("kind", testing.KINDS)
@pytest.mark.parametrize("vocabulary", [1000, 50257, 128256])
def test_fields_against_fp64(implementation, kind, vocabulary, dtype) -> None:
    """Both KLs, both log-probabilities and the entropy, on rows from nearly the same to far apart."""
    if (
        implementation.interpreted
        and vocabulary > 1000
        and (dtype == torch.float16 or testing.KINDS.index(kind) % 3 != vocabulary % 3)
    ):
        pytest.skip("the interpreter's time goes to a third of the large rows")
    sizes = (
        (1e-3, 0.03, 1.0, 8.0)
        if vocabulary == 1000 or not implementation.interpreted
        else (0.01, 1.0)
    )
    p, q = testing.sizes_pair(kind, sizes, (0.0, 50.0, -50.0), vocabulary, dtype)
    tokens = random_tokens(p.shape[:-1], vocabulary)
    tokens[1] = p[1].argmax()
    stats = token_stats(
        p.to(implementation.device), tokens.to(implementation.device), q.to(implementation.device)
    )
    for value in stats:
        assert (
            value.dtype == torch.float32
            and value.shape == p.shape[:-1]
            and value.device.type == implementation.device
        )
    check_fields(stats, p, q, tokens)


@pytest.mark.parametrize("temperature", [0.5, 3.0, "per row"])
def test_temperature(implementation, temperature) -> None:
    """All five fields and their gradients follow the temperature."""
    if temperature == "per row":
        temperature = torch.tensor([[0.25, 0.5, 1.0], [1.5, 2.0, 0.75]])
    p, q = (
        value.view(2, 3, -1)
        for value in testing.sizes_pair(
            "normal3", (0.01, 0.1, 0.3, 1.0, 3.0, 5.0), (0.0,), 515, torch.float32
        )
    )
    tokens = random_tokens(p.shape[:-1], 515)
    on = implementation.device
    p32, q32 = testing.leaf(p.to(on)), testing.leaf(q.to(on))
    stats = token_stats(
        p32,
        tokens.to(on),
        q32,
        temperature=temperature.to(on) if isinstance(temperature, torch.Tensor) else temperature,
    )
    check_fields(stats, p, q, tokens, temperature)
    p64, q64 = testing.leaf(p.double()), testing.leaf(q.double())
    upstream = [testing.upstream_for(value, seed) for seed, value in enumerate(stats)]
    grads = torch.autograd.grad(stats, (p32, q32), upstream)
    exact = torch.autograd.grad(
        exact_stats(p64, q64, tokens, temperature),
        (p64, q64),
        [value.double().cpu() for value in upstream],
    )
    for name, grad, value in zip("pq", grads, exact, strict=True):
        testing.assert_gradient(grad, value, f"gradient to {name}")


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(implementation, layout) -> None:
    """Leading shapes and strides of every sort, for the tokens too."""
    base_p, base_q = (
        value.view(4, 5, 6, -1).to(implementation.device)
        for value in testing.pair("normal3", 120, 43, 0.3)
    )
    p, q = (testing.LAYOUTS[layout](base[..., :40]) for base in (base_p, base_q))
    base_tokens = random_tokens((4, 5, 6), 40).to(implementation.device)
    tokens = testing.LAYOUTS[layout](base_tokens[..., None])[..., 0]
    stats = token_stats(p, tokens, q)
    assert stats.kl.shape == p.shape[:-1]
    check_fields(stats, p.cpu(), q.cpu(), tokens.cpu())


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_integer_types_of_tokens(implementation, kind) -> None:
    """Every integer type gives the same bits."""
    p, q = (value.to(implementation.device) for value in testing.pair("normal3", 3, 300, 0.3))
    tokens = torch.tensor(
        [0, 255 if kind == torch.uint8 else 299, 17], device=implementation.device
    )
    for name, result, value in zip(
        FIELDS, token_stats(p, tokens.to(kind), q), token_stats(p, tokens, q), strict=True
    ):
        testing.assert_same_bits(result, value, name)


def test_without_reference(implementation, dtype) -> None:
    """Log-probability and entropy, with their gradients; the other fields are None."""
    p = testing.pair("normal3", 4, 1003, 0.0, dtype=dtype)[0]
    tokens = random_tokens(p.shape[:-1], 1003)
    leaf = testing.leaf(p.to(implementation.device))
    stats = token_stats(leaf, tokens.to(implementation.device))
    assert (
        stats[2:] == (None, None, None)
        and stats.logprob.requires_grad
        and stats.entropy.requires_grad
    )
    p64 = testing.leaf(p.double())
    exact = exact_stats(p64, p64, tokens)[:2]
    for result, value in zip(stats, exact, strict=False):
        testing.assert_near(result, value, 2e-6, 2e-6, "field")
    upstream = [testing.upstream_for(value, seed) for seed, value in enumerate(exact)]
    grad = torch.autograd.grad(
        stats[:2], leaf, [value.float().to(implementation.device) for value in upstream]
    )[0]
    upstream = [value.float().double() for value in upstream]
    testing.assert_rounded_gradient(
        grad,
        torch.autograd.grad(exact, p64, upstream)[0],
        "gradient",
        truncated=implementation.interpreted,
    )


@pytest.mark.parametrize("vocabulary", [1, 9, 1003, 40001])
def test_selective_log_softmax(implementation, vocabulary, dtype) -> None:
    """The log-softmax at an index, with its gradient, for a leading shape of two dimensions."""
    p = testing.pair("normal3", 4, vocabulary, 0.0, dtype=dtype)[0].view(2, 2, -1)
    index = random_tokens(p.shape[:-1], vocabulary)
    leaf, p64 = testing.leaf(p.to(implementation.device)), testing.leaf(p.double())
    result = selective_log_softmax(leaf, index.to(implementation.device))
    exact = p64.log_softmax(-1).gather(-1, index[..., None])[..., 0]
    assert result.dtype == torch.float32 and result.shape == (2, 2)
    testing.assert_near(result, exact, 2e-6, 2e-6, "log-softmax")
    upstream = testing.upstream_for(result)
    grad = torch.autograd.grad(result, leaf, upstream)[0]
    (expected,) = torch.autograd.grad(exact, p64, upstream.double().cpu())
    testing.assert_rounded_gradient(grad, expected, truncated=implementation.interpreted)


# ---- gradients


@pytest.mark.parametrize("wrt", ["p", "q", "pq"])
def test_every_mix_of_upstream_gradients(implementation, wrt) -> None:
    """All 31 sets of fields that a loss may use, with respect to the policy, the reference or both;
    a GPU compiles a kernel for each.

    A field on which the argument does not depend adds nothing, by a gradient of 0 or by none at
    all.
    """
    p, q = testing.pair("normal3", 3, 37, 0.7)
    tokens = random_tokens(p.shape[:-1], 37)
    sides = {"p": p, "q": q}
    ours = {
        name: testing.leaf(value.to(implementation.device))
        if name in wrt
        else value.to(implementation.device)
        for name, value in sides.items()
    }
    exact = {
        name: testing.leaf(value.double()) if name in wrt else value.double()
        for name, value in sides.items()
    }
    stats = token_stats(ours["p"], tokens.to(implementation.device), ours["q"])
    truth = exact_stats(exact["p"], exact["q"], tokens)
    upstream = [testing.upstream_for(value, seed) for seed, value in enumerate(stats)]
    for count in range(1, 6):
        for fields in itertools.combinations(range(5), count):
            if not any(stats[i].requires_grad for i in fields) or (
                wrt != "pq" and implementation.device == "cuda" and 1 < count < 5
            ):
                continue
            some = [i for i in fields if stats[i].requires_grad]
            grads = torch.autograd.grad(
                [stats[i] for i in some],
                [ours[name] for name in wrt],
                [upstream[i] for i in some],
                retain_graph=True,
                allow_unused=True,
            )
            values = torch.autograd.grad(
                [truth[i] for i in some],
                [exact[name] for name in wrt],
                [upstream[i].double().cpu() for i in some],
                retain_graph=True,
                allow_unused=True,
            )
            for name, grad, value in zip(wrt, grads, values, strict=True):
                what = f"gradient to {name} of {', '.join(FIELDS[i] for i in fields)}"
                if value is None:
                    assert grad is None or bool((grad == 0).all()), what
                else:
                    testing.assert_gradient(grad, value, what)


@pytest.mark.parametrize("vocabulary", [1003, 40001])
def test_all_gradients_of_large_rows(implementation, vocabulary, dtype) -> None:
    """All five upstream gradients together, in the types that training uses."""
    if implementation.interpreted and vocabulary > 1003 and dtype != torch.bfloat16:
        pytest.skip("too slow in the interpreter")
    p, q = testing.sizes_pair("normal3", (0.1, 1.0), (0.0, 50.0), vocabulary, dtype)
    tokens = random_tokens(p.shape[:-1], vocabulary)
    leaves = [testing.leaf(value.to(implementation.device)) for value in (p, q)]
    exact = [testing.leaf(value.double()) for value in (p, q)]
    stats = token_stats(leaves[0], tokens.to(implementation.device), leaves[1])
    upstream = [testing.upstream_for(value, seed) for seed, value in enumerate(stats)]
    grads = torch.autograd.grad(stats, leaves, upstream)
    values = torch.autograd.grad(
        exact_stats(*exact, tokens), exact, [value.double().cpu() for value in upstream]
    )
    for name, grad, value in zip("pq", grads, values, strict=True):
        assert grad.dtype == dtype
        testing.assert_rounded_gradient(
            grad,
            value,
            f"gradient to {name}",
            absolute=1e-6 * (name == "q"),
            truncated=implementation.interpreted,
        )


@pytest.mark.parametrize("wrt", ["", "p", "q", "pq"])
def test_requires_grad_of_each_field(implementation, wrt) -> None:
    """A field requires grad exactly if it depends on an argument that does."""
    p, q = (
        value.to(implementation.device).requires_grad_(name in wrt)
        for name, value in zip("pq", testing.pair("normal3", 2, 9, 0.3), strict=True)
    )
    stats = token_stats(p, torch.tensor([1, 2], device=p.device), q)
    on_either = wrt != ""
    assert [value.requires_grad for value in stats] == [
        "p" in wrt,
        "p" in wrt,
        "q" in wrt,
        on_either,
        on_either,
    ]


def test_gradcheck_in_fp64(implementation) -> None:
    """The reference in float64, by finite differences."""
    if implementation.kernels:
        pytest.skip("float64 is the reference's")
    p, q = (value.double().requires_grad_() for value in testing.pair("normal3", 3, 5, 0.7))
    tokens = torch.tensor([0, 4, 2])
    assert all(value.dtype == torch.float64 for value in token_stats(p, tokens, q))
    assert torch.autograd.gradcheck(
        lambda p, q: tuple(token_stats(p, tokens, q, temperature=1.3)), (p, q)
    )


def test_holes(implementation, dtype) -> None:
    """-inf entries: entropy and both KLs over the others, log-probability -inf of a token without
    probability, gradients 0 there.
    """
    p, q = testing.sizes_pair("normal3", (0.01, 0.1, 1.0), (0.0,), 203, dtype)
    holes = torch.zeros(203, dtype=torch.bool)
    holes[5::3] = True
    tokens = torch.tensor([0, 1, 3])
    full = [value.clone() for value in (p, q)]
    for value in full:
        value[:, holes] = -math.inf
    leaves = [testing.leaf(value.to(implementation.device)) for value in full]
    stats = token_stats(leaves[0], tokens.to(implementation.device), leaves[1])
    check_fields(stats, p[:, ~holes], q[:, ~holes], tokens)
    exact = [testing.leaf(value[:, ~holes].double()) for value in (p, q)]
    upstream = [testing.upstream_for(value, seed) for seed, value in enumerate(stats)]
    values = torch.autograd.grad(
        exact_stats(*exact, tokens), exact, [value.double().cpu() for value in upstream]
    )
    for name, grad, value in zip(
        "pq", torch.autograd.grad(stats, leaves, upstream), values, strict=True
    ):
        assert bool((grad.cpu()[:, holes] == 0).all())
        testing.assert_rounded_gradient(
            grad.cpu()[:, ~holes],
            value,
            f"gradient to {name}",
            absolute=1e-6 * (name == "q"),
            truncated=implementation.interpreted,
        )
    at_hole = token_stats(leaves[0], torch.full((3,), 8, device=implementation.device), leaves[1])
    assert bool((at_hole.logprob == -math.inf).all()) and bool(
        (at_hole.ref_logprob == -math.inf).all()
    )


# ---- tokens that do not count


def test_ignored_positions(implementation, dtype) -> None:
    """Any token id where the mask is False, over garbage: all fields and gradients exactly 0; the
    others have the bits of a call without them.
    """
    p, q = testing.pair("normal3", 5, 203, 0.3, dtype=dtype)
    mask = torch.tensor([True, False, True, False, True])
    tokens = torch.tensor([5, -100, 202, 1 << 40, 0])

    def run(p, q, tokens, mask, upstream):
        leaves = [testing.leaf(value.to(implementation.device)) for value in (p, q)]
        stats = token_stats(leaves[0], tokens.to(implementation.device), leaves[1], mask=mask)
        return *stats, *torch.autograd.grad(stats, leaves, list(upstream.to(implementation.device)))

    upstream = testing.upstream_for(torch.empty(5, 5))
    expected = run(p[mask], q[mask], tokens[mask], None, upstream[:, mask])
    p[1], q[3] = math.nan, math.inf
    for result, value in zip(
        run(p, q, tokens, mask.to(implementation.device), upstream), expected, strict=True
    ):
        assert bool((result.cpu()[~mask] == 0).all())
        testing.assert_same_bits(result.cpu()[mask], value.cpu(), "the others")


@pytest.mark.parametrize("token", [-1, -100, 203, 1 << 40])
def test_token_out_of_range(implementation, token) -> None:
    """An error on the reference; on the kernels NaN in its two log-probabilities, and everything
    else as ever.
    """
    p, q = (value.to(implementation.device) for value in testing.pair("normal3", 3, 203, 0.3))
    good, bad = (
        torch.tensor([5, value, 202], device=implementation.device) for value in (7, token)
    )
    if not implementation.kernels:
        with pytest.raises(ValueError, match="tokens"):
            token_stats(p, bad, q)
        return
    results = []
    for tokens in (good, bad):
        leaves = testing.leaf(p.clone()), testing.leaf(q.clone())
        stats = token_stats(leaves[0], tokens, leaves[1])
        grads = torch.autograd.grad(
            stats, leaves, [testing.upstream_for(value, seed) for seed, value in enumerate(stats)]
        )
        results.append((stats, grads))
    (expected, expected_grads), (stats, grads) = results
    for name in FIELDS:
        result, value = getattr(stats, name), getattr(expected, name)
        if "logprob" in name:
            assert bool(result[1].isnan())
            result, value = result[::2], value[::2]
        testing.assert_same_bits(result, value, name)
    for grad, value in zip(grads, expected_grads, strict=True):
        testing.assert_same_bits(grad[::2], value[::2], "gradients of the other rows")


def test_poison_of_one_row(implementation) -> None:
    """A NaN in a row of either tensor makes what depends on it NaN, in its own row only."""
    p, q = testing.pair("normal3", 5, 1003, 0.3)
    tokens = random_tokens(p.shape[:-1], 1003).to(implementation.device)
    expected = token_stats(p.to(implementation.device), tokens, q.to(implementation.device))
    p[1, 500], q[3, 7] = math.nan, math.nan
    stats = token_stats(p.to(implementation.device), tokens, q.to(implementation.device))
    for name in FIELDS:
        testing.assert_same_bits(getattr(stats, name)[::2], getattr(expected, name)[::2], name)
    assert bool(stats.kl[1::2].isnan().all()) and bool(stats.ref_kl[1::2].isnan().all())
    assert (
        bool(stats.entropy[1].isnan())
        and bool(stats.logprob[1].isnan())
        and bool(stats.ref_logprob[3].isnan())
    )


def test_vmap_keeps_every_gradient(implementation) -> None:
    """Under vmap the fields carry the gradients that they carry without it."""
    p, q = (
        value.view(2, 3, 11).requires_grad_()
        for value in testing.pair("normal1", 6, 11, 0.5, device=implementation.device)
    )
    tokens = torch.arange(6, device=implementation.device).view(2, 3)
    plain = torch.autograd.grad(
        sum(field.sum() for field in fastkl.token_stats(p, tokens, q)), (p, q)
    )
    mapped = torch.vmap(fastkl.token_stats)(p, tokens, q)
    assert all(field.requires_grad for field in mapped)
    for expected, result in zip(
        plain, torch.autograd.grad(sum(field.sum() for field in mapped), (p, q)), strict=True
    ):
        assert torch.equal(expected, result)


def test_forward_mode_is_refused(implementation) -> None:
    """A forward-mode derivative is an error that says so, not zeros."""
    p, q = testing.pair("normal1", 2, 11, 0.5, device=implementation.device)
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(lambda value: fastkl.kl_divergence(value, q), (p,), (p,))
