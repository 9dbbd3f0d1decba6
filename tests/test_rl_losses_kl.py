"""The KL inside the losses: which KL's gradient each form of grpo_loss has, by enumeration; DPO's formula and the identity behind it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn.functional import logsigmoid

import fastkl
from fastkl import testing
from fastkl.rl.losses import dpo_loss, grpo_loss

# ---- which KL the loss has: every token of a vocabulary of 5, weighted with its probability under the policy that samples

V = 5


def distributions() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of the policy, with gradient, of the policy that samples, and of the reference; fp64."""
    generator = torch.Generator().manual_seed(3)
    logits, step, reference = torch.randn(3, V, generator=generator).double()
    return logits.requires_grad_(), logits.detach() + 0.4 * step, reference


def expected(sampling: torch.Tensor, logits: torch.Tensor, old: torch.Tensor | None, reference: torch.Tensor, **more):
    """Expectation under `sampling` of grpo_loss of one token without advantage, beta 1, and of its gradient to the logits."""
    probability, losses = sampling.detach().softmax(-1), []
    for token in range(V):
        logprob, old_logprob, ref_logprob = (None if value is None else value.log_softmax(-1)[token].view(1, 1) for value in (logits, old, reference))
        losses.append(grpo_loss(logprob, old_logprob, torch.zeros(1).double(), ref_logprob=ref_logprob, beta=1.0, **more))
    value = sum(weight * loss for weight, loss in zip(probability, losses, strict=True))
    return value, torch.autograd.grad(value, logits)[0]


def exact_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL of one row of logits to another."""
    return (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_published_kl_has_the_gradient_of_the_other_direction(level) -> None:
    """k3 without a ratio: on-policy the value is KL(policy‖reference), the gradient that of KL(reference‖policy); off-policy neither."""
    logits, old, reference = distributions()
    forward, backward = exact_kl(logits, reference), exact_kl(reference, logits)
    wanted, other = (torch.autograd.grad(value, logits)[0] for value in (forward, backward))
    value, gradient = expected(logits, logits, None, reference, level=level)
    assert value.item() == pytest.approx(forward.item(), rel=1e-13)
    torch.testing.assert_close(gradient, other, rtol=1e-12, atol=1e-14)
    assert float((gradient - wanted).norm() / wanted.norm()) > 0.1
    value, gradient = expected(old, logits, old, reference, level=level)
    assert abs(float(value / forward) - 1) > 0.05 and min(float((gradient - it).norm() / it.norm()) for it in (wanted, other)) > 0.05


@pytest.mark.parametrize("off_policy", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_corrected_kl_has_the_right_gradient(level, off_policy) -> None:
    """With correct_kl value and gradient are those of KL(policy‖reference), on- and off-policy."""
    logits, old, reference = distributions()
    exact = exact_kl(logits, reference)
    value, gradient = expected(old if off_policy else logits, logits, old if off_policy else None, reference, level=level, correct_kl=True)
    assert value.item() == pytest.approx(exact.item(), rel=1e-13)
    torch.testing.assert_close(gradient, torch.autograd.grad(exact, logits)[0], rtol=1e-12, atol=1e-14)


def test_corrected_kl_of_longer_sequences() -> None:
    """Two tokens: the token's own ratio is right; the geometric mean of both, of level "sequence" as in TRL, is not."""
    logits, old, reference = distributions()
    probability, zero = old.softmax(-1), torch.zeros(1).double()
    losses, exact = {"token": 0.0, "sequence": 0.0}, exact_kl(logits, reference)
    for pair in itertools.product(range(V), repeat=2):
        logprob, old_logprob, ref_logprob = (value.log_softmax(-1)[list(pair)].view(1, 2) for value in (logits, old, reference))
        weight = probability[pair[0]] * probability[pair[1]]
        for level in losses:
            losses[level] += weight * grpo_loss(logprob, old_logprob, zero, ref_logprob=ref_logprob, beta=1.0, level=level, correct_kl=True)
    wanted = torch.autograd.grad(exact, logits)[0]
    off = {level: float((torch.autograd.grad(loss, logits, retain_graph=True)[0] - wanted).norm() / wanted.norm())
           for level, loss in losses.items()}
    assert losses["token"].item() == pytest.approx(exact.item(), rel=1e-13) and off["token"] < 1e-12
    assert abs(float(losses["sequence"] / exact) - 1) > 0.01 and off["sequence"] > 0.05


@pytest.mark.parametrize("reduction, same", [("bnpo", "token_mean"), ("sum", "sum")])
def test_exact_kl_is_the_penalty(implementation, reduction, same) -> None:
    """Without advantages and with an exact kl the loss is KLPenalty, gradient to the logits included, also off-policy."""
    policy, reference = (value.view(2, 3, 33).requires_grad_() for value in testing.pair("normal3", 6, 33, 0.3, device=implementation.device))
    mask = torch.tensor([[True, True, False], [False, True, True]], device=implementation.device)
    tokens = torch.arange(6, device=implementation.device).view(2, 3)
    stats = fastkl.token_stats(policy, tokens, reference, mask=mask)
    loss = grpo_loss(stats.logprob, stats.logprob.detach() - 0.1, torch.zeros(2, device=implementation.device), mask, kl=stats.kl, beta=0.3,
                     reduction=reduction)
    exact = fastkl.KLPenalty(0.3, reduction=same)(policy, reference, mask)
    torch.testing.assert_close(loss, exact, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(torch.autograd.grad(loss, policy), torch.autograd.grad(exact, policy), rtol=1e-6, atol=1e-9)


# ---- DPO


def responses(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """chosen, rejected, ref_chosen, ref_rejected [8], tens of nats below 0; the first two with gradient."""
    generator = torch.Generator().manual_seed(2)
    policy, reference = (-40 + 10 * torch.randn(2, 8, generator=generator) for _ in range(2))
    return [*policy.to(dtype).unbind(), *reference.to(dtype).unbind()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.49])
@pytest.mark.parametrize("beta", [0.01, 0.1, 1])
def test_dpo_is_the_published_one(beta, label_smoothing, dtype) -> None:
    """Without smoothing TRL 1.16's "sigmoid": -logsigmoid(beta·(chosen and rejected log-ratios' difference)); with it, Mitchell's mixture of both
    labels; the gradient in closed form."""
    chosen, rejected, ref_chosen, ref_rejected = responses(dtype)
    chosen.requires_grad_(), rejected.requires_grad_()
    result = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta, label_smoothing=label_smoothing)
    c, r, ref_c, ref_r = (value.detach().double() for value in (chosen, rejected, ref_chosen, ref_rejected))
    c.requires_grad_(), r.requires_grad_()
    logits = beta * ((c - ref_c) - (r - ref_r))
    exact = (-(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)).mean()
    # A margin is a difference of four log-probabilities of up to 70 nats, known to 3 roundings of 2^-24 (2^-53) of them: 1.3e-5 times beta.
    # The loss and its gradient have slopes of at most 1 and beta in it, and roundings of their own of 1e-7.
    tolerance = (2e-13 if dtype == torch.float64 else 2e-5) * beta
    assert result.loss.shape == () and result.loss.dtype == dtype
    testing.assert_near(result.loss, exact, 3e-7, tolerance, "loss")
    gradient, exact_gradient = torch.autograd.grad(result.loss, (chosen, rejected)), torch.autograd.grad(exact, (c, r))
    closed = -beta * (torch.sigmoid(-logits) - label_smoothing).detach() / 8
    for grad, exact_grad, sign in zip(gradient, exact_gradient, (1, -1), strict=True):
        testing.assert_near(exact_grad, sign * closed, 1e-13, 1e-16, "closed form")
        testing.assert_near(grad, exact_grad, 3e-7, beta * tolerance / 8, "gradient")
    for value, exact in ((result.chosen_reward, beta * (c - ref_c)), (result.rejected_reward, beta * (r - ref_r)), (result.margin, logits)):
        assert value.shape == (8,) and value.dtype == dtype and not value.requires_grad
        testing.assert_near(value, exact, 0.0, tolerance, "reward")


def test_dpo_at_its_marks() -> None:
    """log 2 for a policy that is the reference; with smoothing ε the best margin is log((1-ε)/ε), where the gradient is 0."""
    chosen, rejected, _, _ = responses()
    assert float(dpo_loss(chosen, rejected, chosen, rejected).loss) == pytest.approx(math.log(2), rel=1e-15)
    best = torch.full((1,), math.log(0.9 / 0.1) / 0.5, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1).double()
    result = dpo_loss(best, zero, zero, zero, beta=0.5, label_smoothing=0.1)
    assert abs(float(torch.autograd.grad(result.loss, best)[0])) < 1e-16
    assert result.loss.item() == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1), rel=1e-14)


@pytest.mark.parametrize("margin, value, slope", [(1e4, 0.0, 0.0), (-1e4, 1e3, -0.1), (math.inf, 0.0, 0.0)])
def test_dpo_of_extreme_margins(margin, value, slope) -> None:
    """Linear for a pair ranked wrong by far, 0 for one ranked right; finite in float32."""
    chosen = torch.tensor([margin], requires_grad=True)
    loss = dpo_loss(chosen, torch.zeros(1), torch.zeros(1), torch.zeros(1)).loss
    assert loss.item() == pytest.approx(value, rel=1e-6)
    assert float(torch.autograd.grad(loss, chosen)[0]) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dpo_of_impossible_responses(dtype) -> None:
    """-inf counts as a number, as in every loss: log 2 where both policies have it; it has no gradient, the others keep theirs."""
    fine, impossible, masked = (torch.tensor([value], dtype=dtype) for value in (-5.0, -math.inf, -1e30))
    for low in (impossible, masked):
        assert dpo_loss(fine, low, fine, low).loss.item() == pytest.approx(math.log(2), rel=1e-6)
        assert dpo_loss(low, fine, low, fine).loss.item() == pytest.approx(math.log(2), rel=1e-6)
        chosen, rejected = low.clone().requires_grad_(), fine.clone().requires_grad_()
        result = dpo_loss(chosen, rejected, fine, fine)
        assert all(bool(value.isfinite().all()) for value in result) and result.loss > 1e3
        gradient = torch.autograd.grad(result.loss, (chosen, rejected))
        assert [grad.item() for grad in gradient] == pytest.approx([0.0, 0.1], rel=1e-6)
        learns = dpo_loss(rejected, low, fine, low)
        assert torch.autograd.grad(learns.loss, rejected)[0].item() == pytest.approx(-0.05, rel=1e-6)
    assert dpo_loss(torch.tensor([math.nan]), *[torch.zeros(1)] * 3).loss.isnan()


def test_dpo_of_long_responses() -> None:
    """A sum over 40,000 tokens is far below a token's -1e4, and counts in full."""
    chosen = torch.tensor([-40000.0], requires_grad=True)
    result = dpo_loss(chosen, torch.tensor([-30010.0]), torch.tensor([-40010.0]), torch.tensor([-30000.0]))
    assert result.margin.item() == pytest.approx(2.0)
    slope = -0.1 * torch.sigmoid(torch.tensor(-2.0)).item()
    assert torch.autograd.grad(result.loss, chosen)[0].item() == pytest.approx(slope, rel=1e-6)


def test_dpo_without_pairs() -> None:
    """0, with a gradient of no entry."""
    chosen = torch.zeros(0, requires_grad=True)
    result = dpo_loss(chosen, *[torch.zeros(0)] * 3)
    assert result.loss.item() == 0.0 and torch.autograd.grad(result.loss, chosen)[0].shape == (0,)


@pytest.mark.parametrize("beta", [0.05, 1.0])
def test_the_identity_of_dpo(beta) -> None:
    """For π* ∝ π_ref·exp(r/beta), the maximum of E[r] - beta·KL(π‖π_ref), implicit rewards are r up to a constant per prompt: margins are equal.
    And a policy that DPO trains on all pairs, labelled as often as exp(r) says, ends at π*."""
    generator = torch.Generator().manual_seed(4)
    log_ref, reward = torch.randn(3, V, generator=generator).double().log_softmax(-1), torch.randn(3, V, generator=generator).double()
    log_best = (log_ref + reward / beta).log_softmax(-1)
    first, second = torch.tensor(list(itertools.permutations(range(V), 2))).unbind(-1)
    result = dpo_loss(*(log[:, of].flatten() for log in (log_best, log_ref) for of in (first, second)), beta=beta)
    torch.testing.assert_close(result.margin.view(3, -1), reward[:, first] - reward[:, second], rtol=1e-12, atol=1e-12)
    constant = result.chosen_reward.view(3, -1) - reward[:, first]
    torch.testing.assert_close(constant, constant[:, :1].expand_as(constant), rtol=1e-12, atol=1e-12)

    def objective(log_policy: torch.Tensor) -> torch.Tensor:
        return (log_policy.exp() * (reward - beta * (log_policy - log_ref))).sum(-1)

    assert bool((objective(log_best) > objective((log_best + 0.01 * reward).log_softmax(-1))).all())
    logits = log_best.clone().requires_grad_()
    log_policy = logits.log_softmax(-1)
    preferred = torch.sigmoid(reward[:, first] - reward[:, second])  # Bradley and Terry
    loss = sum(preferred[i, j] * dpo_loss(*(log[i, of[j : j + 1]] for log in (log_policy, log_ref) for of in (first, second)), beta=beta).loss
               for i in range(3) for j in range(len(first)))
    assert float(torch.autograd.grad(loss, logits)[0].abs().max()) < 1e-13
