"""Single cases of far rows and of rows of huge logits: extremes of values, masks and temperatures,
each with its right answer.
"""

from __future__ import annotations

import math

import cases
import pytest
import torch

from fastkl import (
    KLPenalty,
    LinearKLPenalty,
    kl_divergence,
    linear_token_stats,
    testing,
    token_stats,
)

ROWS = 16


@pytest.fixture(autouse=True)
def multiply_adds(implementation) -> None:
    """Round multiply-adds as a GPU does."""
    if implementation.interpreted:
        cases.compute_as_a_gpu()


@pytest.mark.parametrize(
    "value", [-1e9, 1e10, 1e30, torch.finfo(torch.float32).min, torch.finfo(torch.float32).max]
)
def test_equal_logits_are_uniform(implementation, value) -> None:
    """Equal logits of any size are uniform, in P and in Q."""
    x, y = (
        torch.full((1, 64), value),
        torch.randn(1, 64, generator=torch.Generator().manual_seed(0)),
    )
    tokens = torch.tensor([5], device=implementation.device)
    for pair in ((x, y), (y, x)):
        p, q = (side.to(implementation.device).requires_grad_() for side in pair)
        stats = token_stats(p, tokens, q)
        exact = testing.truth(p.detach().cpu(), q.detach().cpu())
        testing.assert_near(stats.logprob, exact.log_p[:, 5], 2e-6, 2e-6, "logprob")
        testing.assert_near(stats.ref_logprob, exact.log_q[:, 5], 2e-6, 2e-6, "ref_logprob")
        testing.assert_kl(stats.kl, exact.kl)
        grads = torch.autograd.grad(stats.kl.sum(), (p, q))
        for grad, expected in zip(grads, testing.kl_gradients(exact, torch.ones(1)), strict=True):
            testing.assert_gradient(grad, expected, "gradient")


@pytest.mark.parametrize("temperature", [2.0**-126, 1e-30, 0.01, 1e30, 2.0**126])
def test_extreme_temperatures(implementation, temperature) -> None:
    """A mask of finfo.min in Q that P has 1e-15 of, and the ends of the range of temperatures, as
    float64 has them.
    """
    x = torch.tensor([[0.0, -35.0, -1.0], [1e-30, 0.0, 2e-30]])
    y = torch.tensor([[0.0, torch.finfo(torch.float32).min, -1.0], [0.0, 1e-30, 0.0]])
    exact = testing.truth(x, y, temperature).kl.float()
    got = kl_divergence(
        x.to(implementation.device), y.to(implementation.device), temperature=temperature
    ).cpu()
    testing.assert_near(got[exact.isfinite()], exact[exact.isfinite()], 2e-5, 1e-8, "kl")
    assert torch.equal(got.isinf(), exact.isinf())


@pytest.mark.parametrize("temperature", [1.0, 1.3, 2.0])
def test_a_masked_token(implementation, temperature) -> None:
    """The log-probability of an entry masked by finfo.min in both models is finite wherever float32
    can hold it.
    """
    x, y = torch.tensor([[0.0, 1.0, 2.0], [0.5, 0.0, -1.0]])
    x[1] = y[1] = torch.finfo(torch.float32).min
    pairs, tokens = (x[None], y[None]), torch.tensor([1])
    exact = testing.truth(*pairs, temperature)
    stats = token_stats(
        pairs[0].to(implementation.device),
        tokens.to(implementation.device),
        pairs[1].to(implementation.device),
        temperature=temperature,
    )
    for got, log_probs in ((stats.logprob, exact.log_p), (stats.ref_logprob, exact.log_q)):
        expected = log_probs.gather(-1, tokens[:, None])[:, 0].float()
        assert bool(expected.isfinite().all())
        testing.assert_near(got, expected, 2e-6, 2e-6, "log-probability")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("below", [80.0, 120.0, 700.0, 800.0])
def test_infinite_where_p_is_above_0(implementation, below, dtype) -> None:
    """q = -inf makes KL infinite where float64's p is above 0: up to 745 nats below the
    log-sum-exp, whatever the logits' type.
    """
    x, y = (
        torch.tensor([[0.0, -below, 0.5]], dtype=dtype),
        torch.tensor([[0.0, -math.inf, 0.5]], dtype=dtype),
    )
    p, q = x.to(implementation.device), y.to(implementation.device)
    stats = token_stats(p, torch.zeros(1, dtype=torch.long, device=p.device), q)
    assert bool(stats.kl.isinf()) == bool(kl_divergence(p, q).isinf()) == (below < 745)
    assert bool(stats.ref_kl.isfinite())
    # With the tensors in each other's place.
    swapped = token_stats(q, torch.zeros(1, dtype=torch.long, device=p.device), p)
    assert bool(swapped.kl.isfinite()) and bool(swapped.ref_kl.isinf()) == (below < 745)


def test_certain_tokens(implementation) -> None:
    """log(1 - p) of a log-probability is never NaN: none is above 0, of either model; the entropy
    of a one-hot row is 0, not -0.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 100, generator=generator)
    x[:, 0] += 50 * (1 + torch.rand(256, generator=generator))
    x[0, 1:] = -math.inf
    x = x.to(implementation.device)
    stats = token_stats(x, torch.zeros(256, dtype=torch.long, device=x.device), x + 1e-3)
    assert bool((stats.logprob <= 0).all()) and bool((stats.ref_logprob <= 0).all())
    assert not bool(stats.entropy.signbit().any()) and not bool(stats.kl.signbit().any())


@pytest.mark.parametrize("fill", [-1e9, -1e30, -math.inf])
@pytest.mark.parametrize("masked", ["policy", "reference"])
@pytest.mark.parametrize("direction", ["policy||reference", "reference||policy"])
def test_penalties_beside_a_mask(implementation, direction, masked, fill) -> None:
    """Masked actions of one model, by its logits or by a bias of its lm_head: both penalties in
    both directions.
    """
    if implementation.interpreted and fill != -1e9:
        pytest.skip("one size of mask in the interpreter is enough: the far rows have all")
    generator = torch.Generator().manual_seed(0)
    hidden, ref_hidden = (torch.randn(ROWS, 8, generator=generator) for _ in range(2))
    weight = torch.randn(40, 8, generator=generator)
    bias, ref_bias = torch.zeros(40), torch.zeros(40)
    (bias if masked == "policy" else ref_bias)[30:] = fill
    leaf = hidden.double().requires_grad_()
    log_p, log_q = (
        (side @ weight.double().t() + mask.double()).log_softmax(-1)
        for side, mask in ((leaf, bias), (ref_hidden.double(), ref_bias))
    )
    first, second = (log_p, log_q) if direction.startswith("policy") else (log_q, log_p)
    kept = torch.arange(40) < 30
    # An entry that the first model masks has probability 0; one that the second masks by -inf makes
    # the KL infinite.
    first_masked = (first is log_p) == (masked == "policy")
    if first_masked:
        first, second = first[:, kept], second[:, kept]
    expected = (first.exp() * (first - second)).sum(-1).mean()
    arguments = [value.to(implementation.device) for value in (hidden, weight, ref_hidden, weight)]
    biases = {
        "bias": bias.to(implementation.device),
        "ref_bias": ref_bias.to(implementation.device),
    }
    for linear in (False, True):
        states = arguments[0].clone().requires_grad_()
        if linear:
            loss = LinearKLPenalty(1.0, direction=direction)(
                states, *arguments[1:3], arguments[3].clone(), **biases
            )
        else:
            logits = states @ arguments[1].t() + biases["bias"]
            loss = KLPenalty(1.0, direction=direction)(
                logits, arguments[2] @ arguments[1].t() + biases["ref_bias"]
            )
        if not bool(expected.isfinite()):
            assert bool(loss.isinf())
            continue
        testing.assert_near(loss, expected, 2e-5, 1e-8, "loss")
        (grad,), (exact,) = (
            torch.autograd.grad(loss, states),
            torch.autograd.grad(expected, leaf, retain_graph=True),
        )
        error = (grad.double().cpu() - exact).norm() / exact.norm()
        assert error <= 1e-5, (
            f"{direction}, {masked} masked by {fill:g}, linear {linear}: {error:.2g}"
        )


def test_no_gradient_takes_the_place_of_logits_to_be_read_again(implementation) -> None:
    """ref_kl of rows with two peaks, from hidden states and over several programs of a row:
    gradients to both models.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = 70001
    weight = torch.randn(vocabulary, 4, generator=generator)
    ref_weight = weight + 0.01 * torch.randn(vocabulary, 4, generator=generator)
    hidden = 0.1 * torch.randn(2, 4, generator=generator)
    hidden[:, 0] = 1.0
    weight[5, 0], weight[69000, 0], ref_weight[5, 0], ref_weight[69000, 0] = 13.0, 9.0, 9.0, 14.0
    values = [
        value.to(implementation.device).requires_grad_()
        for value in (hidden, weight, hidden.clone(), ref_weight)
    ]
    stats = linear_token_stats(
        values[0], values[1], torch.tensor([5, 69000], device=implementation.device), *values[2:]
    )
    assert bool((stats.kl + stats.ref_kl > 1).all()) and bool(
        (torch.maximum(stats.kl, stats.ref_kl) < 8).all()
    ), stats
    wide = [value.detach().double().cpu().requires_grad_() for value in values]
    log_p, log_q = ((states @ head.t()).log_softmax(-1) for states, head in (wide[:2], wide[2:]))
    exact = torch.autograd.grad((log_q.exp() * (log_q - log_p)).sum(), wide)
    # Gradients to the weights alone: a product over 70001 entries has roundings of its own.
    for grad, expected in zip(
        torch.autograd.grad(stats.ref_kl.sum(), values)[1::2], exact[1::2], strict=True
    ):
        assert (grad.double().cpu() - expected).norm() <= 1e-5 * expected.norm()


def test_a_peak_that_rounds_up_to_a_whole_number(implementation) -> None:
    """float32 logits whose x·log2(e) rounds to the next whole number, beside nearly no other
    probability.
    """
    x = torch.full((3, 64), -40.0)
    x[:, 9] = torch.tensor([14.556090, 15.249238, 13.862943])
    y = x.clone()
    y[:, 3] = x[:, 9] - 2.0
    exact = testing.truth(x, y)
    p, q = (side.to(implementation.device).requires_grad_() for side in (x, y))
    grads = torch.autograd.grad(kl_divergence(p, q).sum(), (p, q))
    for grad, expected in zip(grads, testing.kl_gradients(exact, torch.ones(3)), strict=True):
        testing.assert_gradient(grad, expected, "gradient")


def test_an_infinite_kl_that_is_left_out(implementation) -> None:
    """A row whose KL is infinite and has an upstream gradient of 0 keeps the gradient of its other
    fields.
    """
    x, y = torch.zeros(1, 8), torch.zeros(1, 8)
    y[0, 3] = -math.inf
    p, q = (side.to(implementation.device).requires_grad_() for side in (x, y))
    stats = token_stats(p, torch.tensor([1], device=p.device), q)
    one, zero = torch.ones(1).to(p), torch.zeros(1).to(p)
    grads = torch.autograd.grad(
        (stats.logprob, stats.ref_logprob, stats.kl), (p, q), [one, one, zero]
    )
    for grad, side in zip(grads, (x, y), strict=True):
        expected = torch.nn.functional.one_hot(torch.tensor([1]), 8) - side.softmax(-1)
        testing.assert_near(grad, expected, 1e-6, 1e-6, "gradient")


@pytest.mark.parametrize("fill", [-50.0, -100.0, -1e4, -1e6])
def test_ref_kl_beside_a_mask_of_little_probability(implementation, fill) -> None:
    """KL(P‖Q) is that of the masked entry nearly alone, KL(Q‖P) hundreds of times smaller."""
    x = torch.tensor(
        [[-0.5375, 5.7692, 0.8638, 2.8104, math.log(1.2 / -fill) + 6.4, 5.5563, 2.6901]]
    )
    y = x + torch.tensor([[0.3, -0.2, 0.1, -0.3, 0.0, 0.2, -0.1]])
    y[:, 4] = fill
    exact = testing.truth(x, y)
    p, q = x.to(implementation.device), y.to(implementation.device)
    stats = token_stats(p, torch.zeros(1, dtype=torch.long, device=p.device), q)
    testing.assert_kl(stats.kl, exact.kl, "kl")
    testing.assert_kl(stats.ref_kl, exact.ref_kl, "ref_kl")
