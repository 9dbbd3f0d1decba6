"""The KL inside the losses: which KL's gradient each form of grpo_loss has, by enumeration; DPO's
formula and the identity behind it.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn.functional import logsigmoid

import fastkl
from fastkl import testing
from fastkl.rl import DPOLoss, dpo_loss, grpo_loss

V = 5


def exact_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL of one row of logits to another."""
    return (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum()


# Level, correct_kl, tokens of a sequence, off-policy; the value is KL(policy‖reference); the
# gradient is that of KL(policy‖reference) or of the other direction. TRL's ratio of level
# "sequence" is no importance weight of more than one token.
ENUMERATED = [
    *((level, False, 1, False, True, "reverse") for level in ("token", "sequence")),
    *((level, False, 1, True, False, None) for level in ("token", "sequence")),
    *(
        (level, True, 1, off_policy, True, "forward")
        for level in ("token", "sequence")
        for off_policy in (False, True)
    ),
    ("token", True, 2, True, True, "forward"),
    ("sequence", True, 2, True, False, None),
]


@pytest.mark.parametrize("level, correct_kl, length, off_policy, right, direction", ENUMERATED)
def test_which_kl_the_loss_has(level, correct_kl, length, off_policy, right, direction) -> None:
    """Every sequence of a vocabulary of 5, weighted with its probability under the policy that
    samples.
    """
    generator = torch.Generator().manual_seed(3)
    logits, step, reference = torch.randn(3, V, generator=generator).double()
    logits.requires_grad_()
    old = logits.detach() + 0.4 * step if off_policy else logits.detach()
    loss = 0.0
    for tokens in itertools.product(range(V), repeat=length):
        logprob, before, ref = (
            each.log_softmax(-1)[list(tokens)].view(1, -1) for each in (logits, old, reference)
        )
        more = {"ref_logprob": ref, "beta": 1.0, "level": level, "correct_kl": correct_kl}
        loss = loss + before.sum().exp() * grpo_loss(
            logprob, before if off_policy else None, torch.zeros(1).double(), **more
        )
    kls = {"forward": exact_kl(logits, reference), "reverse": exact_kl(reference, logits)}
    gradient = torch.autograd.grad(loss, logits)[0]
    for name, kl in kls.items():
        wanted = torch.autograd.grad(kl, logits)[0]
        error = float((gradient - wanted).norm() / wanted.norm())
        assert error < 1e-12 if name == direction else error > 0.05
    off = abs(float(loss / kls["forward"]) - 1)
    assert off < 1e-13 if right else off > 0.01


@pytest.mark.parametrize("reduction, same", [("bnpo", "token_mean"), ("sum", "sum")])
def test_exact_kl_is_the_penalty(implementation, reduction, same) -> None:
    """Without advantages and with an exact kl the loss is KLPenalty, gradient to the logits
    included, also off-policy.
    """
    device = implementation.device
    policy, reference = (
        value.view(2, 3, 33).requires_grad_()
        for value in testing.pair("normal3", 6, 33, 0.3, device=device)
    )
    mask = torch.tensor([[True, True, False], [False, True, True]], device=device)
    stats = fastkl.token_stats(
        policy, torch.arange(6, device=device).view(2, 3), reference, mask=mask
    )
    old, more = stats.logprob.detach() - 0.1, {"kl": stats.kl, "beta": 0.3, "reduction": reduction}
    loss = grpo_loss(stats.logprob, old, torch.zeros(2, device=device), mask, **more)
    exact = fastkl.KLPenalty(0.3, reduction=same)(policy, reference, mask)
    torch.testing.assert_close(loss, exact, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(
        torch.autograd.grad(loss, policy), torch.autograd.grad(exact, policy), rtol=1e-6, atol=1e-9
    )


# ---- DPO


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.49])
@pytest.mark.parametrize("beta", [0.01, 0.1, 1])
def test_dpo_is_the_published_one(beta, smoothing, dtype) -> None:
    """TRL 1.16's "sigmoid", with smoothing Mitchell's mixture of both labels; the gradient in
    closed form, none to the reference.
    """
    generator = torch.Generator().manual_seed(2)
    given = [
        value.to(dtype).requires_grad_()
        for value in -40 + 10 * torch.randn(4, 8, generator=generator)
    ]
    result = dpo_loss(*given, beta=beta, label_smoothing=smoothing)
    c, r, ref_c, ref_r = (value.detach().double() for value in given)
    margin = beta * ((c - ref_c) - (r - ref_r))
    exact = (-(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)).mean()
    slope = -beta * (torch.sigmoid(-margin) - smoothing) / 8
    # A margin is a difference of four log-probabilities of up to 70 nats, known to 3 roundings of
    # 2^-24 (2^-53) of them: 1.3e-5 times beta. The loss and its gradient have slopes of at most 1
    # and beta in it, and roundings of their own of 1e-7.
    tolerance = (2e-13 if dtype == torch.float64 else 2e-5) * beta
    testing.assert_near(result.loss, exact, 3e-7, tolerance, "loss")
    gradients = torch.autograd.grad(result.loss, given, allow_unused=True)
    for grad, sign in zip(gradients[:2], (1, -1), strict=True):
        testing.assert_near(
            grad, sign * slope, max(3e-7, torch.finfo(dtype).eps), beta * tolerance / 8, "gradient"
        )
    assert gradients[2:] == (None, None)
    for value, reward in zip(
        result[1:], (beta * (c - ref_c), beta * (r - ref_r), margin), strict=True
    ):
        assert value.shape == (8,) and not value.requires_grad
        testing.assert_near(value, reward, 0.0, tolerance, "reward")
    assert isinstance(result, DPOLoss)
    assert {value.dtype for value in result} == {
        torch.float64 if dtype == torch.float64 else torch.float32
    }


LOG2, LONG = math.log(2), -0.1 / (1 + math.exp(2))
# chosen, rejected, ref_chosen, ref_rejected, the loss at beta 0.1, its gradient to chosen and to
# rejected.
CLOSED = [
    ((-7.0, -3.0, -7.0, -3.0), LOG2, (-0.05, 0.05)),
    ((1e4, 0.0, 0.0, 0.0), 0.0, (0.0, 0.0)),
    ((-1e4, 0.0, 0.0, 0.0), 1e3, (-0.1, 0.1)),
    ((math.inf, 0.0, 0.0, 0.0), 0.0, (0.0, 0.0)),
    # A sum over 40,000 tokens is far below a token's -1e4, and counts in full: a margin of 2.
    ((-40000.0, -30010.0, -40010.0, -30000.0), math.log1p(math.exp(-2)), (LONG, -LONG)),
    *(
        (values, LOG2, slopes)
        for low in (-math.inf, -1e30)
        for values, slopes in (
            ((-5.0, low, -5.0, low), (-0.05, 0.0)),
            ((low, -5.0, low, -5.0), (0.0, 0.05)),
        )
    ),
    *(((low, -5.0, -5.0, -5.0), 1e7, (0.0, 0.1)) for low in (-math.inf, -1e30)),
]


@pytest.mark.parametrize("values, loss, slopes", CLOSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dpo_in_closed_form(values, loss, slopes, dtype) -> None:
    """-inf counts as a number without gradient; a pair ranked wrong by far is linear."""
    given = [torch.tensor([value], dtype=dtype, requires_grad=True) for value in values]
    result = dpo_loss(*given)
    assert result.loss.item() == pytest.approx(loss, rel=1e-6)
    gradient = torch.autograd.grad(result.loss, given[:2])
    assert [grad.item() for grad in gradient] == pytest.approx(slopes, rel=1e-5, abs=1e-12)


def test_dpo_at_its_marks() -> None:
    """NaN is not hidden; without a pair the loss is 0."""
    assert dpo_loss(torch.tensor([math.nan]), *[torch.zeros(1)] * 3).loss.isnan()
    none = torch.zeros(0, requires_grad=True)
    result = dpo_loss(none, *[torch.zeros(0)] * 3)
    assert result.loss.item() == 0.0 and torch.autograd.grad(result.loss, none)[0].shape == (0,)
