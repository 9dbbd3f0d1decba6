"""Numbers at their limits: impossible tokens, the clamp of the KL in GRPO, and settings that change from step to step under torch.compile."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastkl.estimators import estimate_kl, sampled_kl_loss
from fastkl.rl.losses import dpo_loss, grpo_loss, ppo_loss
from fastkl.rl.rewards import shape_rewards

FORMS = {"ppo": ppo_loss, "token": grpo_loss, "sequence": lambda *a, **more: grpo_loss(*a, level="sequence", **more)}
# What a mask leaves of an impossible token: each type's smallest number, or -inf.
IMPOSSIBLE = (-math.inf, torch.finfo(torch.float32).min, -65504.0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("impossible", IMPOSSIBLE)
def test_impossible_under_both_policies(impossible, advantage, form) -> None:
    """A ratio of 1 without gradient, as the d = 0 of estimate_kl; also where old_logprob is None, and for the KL. The other token keeps its own."""
    logprob = torch.tensor([[impossible, -2.0]], requires_grad=True)
    for old in (None, logprob.detach()):
        loss = FORMS[form](logprob, old, torch.tensor([advantage]))
        assert loss.item() == -advantage
        assert torch.autograd.grad(loss, logprob)[0].tolist() == [[0.0, -advantage / 2]]
        if form != "ppo":
            for correct_kl in (False, True):
                loss = FORMS[form](logprob, old, torch.tensor([advantage]), ref_logprob=logprob.detach(), beta=0.3, correct_kl=correct_kl)
                assert loss.item() == -advantage and torch.autograd.grad(loss, logprob)[0].tolist() == [[0.0, -advantage / 2]]


@pytest.mark.parametrize("form", FORMS)
def test_impossible_under_one_policy(form) -> None:
    """Every mix of -inf, huge and ordinary log-probabilities: values and gradients finite, for both signs of the advantage."""
    sizes = torch.tensor([0.0, -1e-6, -3.0, -40.0, -200.0, -1e4, -65504.0, -3e38, -math.inf])
    logprob, old, ref = (value.reshape(-1, 9) for value in torch.meshgrid(sizes, sizes, sizes, indexing="ij"))
    logprob.requires_grad_()
    penalties = [{}] if form == "ppo" else [{"ref_logprob": ref, "beta": 0.1, "correct_kl": correct} for correct in (False, True)]
    for advantage, more in itertools.product((1.0, -1.0), penalties):
        for mask in (None, ref > -50):
            loss = FORMS[form](logprob, old, torch.full((81,), advantage), mask, **more)
            assert loss.isfinite() and bool(torch.autograd.grad(loss, logprob)[0].isfinite().all())


# ---- the clamp of the KL


@pytest.mark.parametrize("correct_kl", [False, True])
@pytest.mark.parametrize("kl_clamp", [None, 0.5, 5.0])
def test_kl_clamp(kl_clamp, correct_kl) -> None:
    """That of estimate_kl, or of sampled_kl_loss, token by token."""
    logprob = torch.tensor([[-30.0, -1.0, -2.0, -0.1]], dtype=torch.float64, requires_grad=True)
    old, ref = logprob.detach() - 0.1, torch.tensor([[-1.0, -1.2, -9.0, -0.2]], dtype=torch.float64)
    loss = grpo_loss(logprob, old, torch.zeros(1).double(), ref_logprob=ref, beta=0.3, correct_kl=correct_kl, kl_clamp=kl_clamp, reduction="sum")
    kl = sampled_kl_loss(logprob, ref, old_logprob=old, clamp=kl_clamp) if correct_kl else \
        estimate_kl(logprob, ref, estimator="k3", clamp=kl_clamp)
    torch.testing.assert_close(loss, 0.3 * kl.sum(), rtol=1e-14, atol=0.0)
    gradient = torch.autograd.grad(loss, logprob)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(0.3 * kl.sum(), logprob)[0], rtol=1e-14, atol=0.0)
    if not correct_kl:  # d = -29: e^29 or e^clamp
        assert gradient[0, 0].item() == pytest.approx(-0.3 * math.expm1(min(29.0, kl_clamp or 29.0)), rel=1e-12)


def test_max_length_of_packed_and_masked_tokens() -> None:
    """Only tokens that count are counted, per sequence."""
    logprob, mask = torch.zeros(6), torch.tensor([True, False, True, True, True, False])
    more = {"reduction": "dr_grpo", "cu_seqlens": torch.tensor([0, 3, 6])}
    assert grpo_loss(logprob, None, torch.ones(2), mask, **more, max_length=2).item() == -1.0
    with pytest.raises(ValueError, match="^max_length: expected at least the tokens of each sequence, 3, got 2; pass"):
        grpo_loss(logprob, None, torch.ones(2), **more, max_length=2)


# ---- settings that change: more values than torch.compile allows graphs

LOGPROB = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -0.1, -1.0]])
OTHER, ADVANTAGES = LOGPROB.flip(-1) - 0.3, torch.tensor([[1.0, -1.0, 0.5], [-2.0, 1.0, -0.5]])
CHANGING = {
    "beta of shape_rewards": lambda x: shape_rewards(ADVANTAGES[:, 0], LOGPROB - OTHER, x).sum(),
    "beta of grpo_loss": lambda x: grpo_loss(LOGPROB, OTHER, ADVANTAGES, ref_logprob=OTHER, beta=x),
    "clip": lambda x: ppo_loss(LOGPROB, OTHER, ADVANTAGES, clip=x),
    "clip of grpo_loss": lambda x: grpo_loss(LOGPROB, OTHER, ADVANTAGES, clip=(x / 2, x)),
    "dual_clip": lambda x: ppo_loss(LOGPROB, OTHER, ADVANTAGES, dual_clip=1 + x),
    "beta of dpo_loss": lambda x: dpo_loss(LOGPROB.sum(-1), OTHER.sum(-1), OTHER[:, 0], LOGPROB[:, 0], beta=x).loss,
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", CHANGING)
def test_a_schedule_does_not_recompile(name, backend) -> None:
    """With a graph per value the last ones would be errors; "aot_eager" has inductor's way with numbers, which takes more of them as constants."""
    torch._dynamo.reset()
    compiled = torch.compile(CHANGING[name], backend=backend, fullgraph=True)
    for i in range(1, 3 + torch._dynamo.config.recompile_limit):
        assert compiled(0.07 * i).item() == pytest.approx(CHANGING[name](0.07 * i).item(), rel=1e-6), i
