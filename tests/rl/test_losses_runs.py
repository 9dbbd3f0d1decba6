"""Losses and rewards on meta tensors, in one graph and without synchronisation; the clamp of the KL
and the divisor of the means.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_losses import FORMS, KLS, B, assert_loss, batch, mask_of, penalty, spelled

from fastkl import testing
from fastkl.estimators import estimate_kl, sampled_kl_loss
from fastkl.rl import dpo_loss, grpo_loss, ppo_loss, shape_rewards

# ---- where it runs


def every_loss(made, flat, mask: torch.Tensor, bounds: torch.Tensor) -> list[torch.Tensor]:
    """Every loss in every form, padded and packed, one scalar each."""
    count, losses = mask.sum(), []
    for values, counts, where in ((made, mask, {}), (flat, mask.flatten(), {"cu_seqlens": bounds})):
        for call, more in FORMS:
            more = more if more["reduction"] == "sum" else {**more, "normalizer": count}
            kls = ("corrected",) if where else KLS
            for kl in kls if call is grpo_loss else KLS[:1]:
                settings = {**more, **where, **penalty(values, kl)}
                # Alternately, so that both have every form.
                per = values.per_token if len(losses) % 3 else values.per_sequence
                losses.append(call(values.logprob, values.old, per, counts, **settings))
        for scores in (values.per_token, values.per_sequence):
            rewards = shape_rewards(scores, values.old, torch.tensor(0.3), counts, **where)
            losses.append((rewards * values.logprob).sum())
    losses.append(ppo_loss(made.logprob, None, made.per_sequence, dual_clip=3.0))
    sums = [value.sum(-1) for value in (made.logprob, made.old, made.ref, made.per_token)]
    return [*losses, dpo_loss(*sums, normalizer=count).loss]


def moved(device: str) -> tuple[SimpleNamespace, SimpleNamespace, torch.Tensor, torch.Tensor]:
    """The arguments of `every_loss` in float32 on a device."""
    made, bounds = batch(torch.float32, device), torch.tensor([0, 6, 12, 18, 24])
    flat = {
        name: value if name == "per_sequence" else value.flatten()
        for name, value in vars(made).items()
    }
    return made, SimpleNamespace(**flat), mask_of("padding").to(device), bounds.to(device)


def test_values_are_not_looked_at() -> None:
    """Meta tensors have none, backward too; all losses in one graph have the same bits."""
    arguments = moved("meta")
    for loss in every_loss(*arguments):
        assert loss.shape == () and loss.device.type == "meta"
        torch.autograd.grad(loss, arguments[0].logprob)
    arguments = moved("cpu")
    compiled = torch.compile(every_loss, backend="eager", fullgraph=True)(*arguments)
    for i, (one, other) in enumerate(zip(compiled, every_loss(*arguments), strict=True)):
        testing.assert_same_bits(one, other, f"loss {i}")


@pytest.mark.gpu
def test_no_synchronisation() -> None:
    """On a GPU nothing waits for the device, and values and gradients are those of the CPU."""
    on_gpu, on_cpu = moved("cuda"), moved("cpu")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = every_loss(*on_gpu)
        grads = [
            torch.autograd.grad(loss, on_gpu[0].logprob, retain_graph=True)[0] for loss in losses
        ]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = every_loss(*on_cpu)
    exact_grads = [
        torch.autograd.grad(loss, on_cpu[0].logprob, retain_graph=True)[0] for loss in exact
    ]
    got = [value.cpu() for value in (*losses, *grads)]
    torch.testing.assert_close(got, [*exact, *exact_grads], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "bounds",
    [[0, 5, 16], [1, 5, 15], [0, 10, 5, 15], [0, 20, 15], [-3, 5, 10], [15]],
    ids=str,
)
def test_wrong_boundaries(bounds) -> None:
    """An error on the CPU; under torch.compile and on a GPU a NaN, without a gradient and without a
    wrong address.
    """
    torch._dynamo.reset()
    logprob, cu_seqlens = torch.zeros(15, requires_grad=True), torch.tensor(bounds)
    mask = torch.arange(15) % 4 != 1
    rewards = torch.compile(shape_rewards, backend="eager", fullgraph=True)
    for scores in (torch.zeros(len(bounds) - 1), torch.zeros(15)):
        arguments = scores, torch.zeros(15), 0.3, mask
        with pytest.raises(ValueError, match="^cu_seqlens: expected .*, got .*; "):
            shape_rewards(*arguments, cu_seqlens=cu_seqlens)
        got = rewards(*arguments, cu_seqlens=cu_seqlens)
        assert torch.equal(got.isnan(), mask) and not bool(got.nan_to_num(0.0).any())
    for call in (ppo_loss, grpo_loss):
        for advantages in (torch.ones(len(bounds) - 1), torch.ones(15)):
            with pytest.raises(ValueError, match="^cu_seqlens: expected .*, got .*; "):
                call(logprob, None, advantages, cu_seqlens=cu_seqlens)
        compiled = torch.compile(call, backend="eager", fullgraph=True)
        loss = compiled(logprob, None, advantages, cu_seqlens=cu_seqlens)
        assert loss.isnan() and not bool(torch.autograd.grad(loss, logprob)[0].any())


LOGPROB = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -0.1, -1.0]])
OTHER, ADVANTAGES = LOGPROB.flip(-1) - 0.3, torch.tensor([[1.0, -1.0, 0.5], [-2.0, 1.0, -0.5]])
CHANGING = {
    "beta of shape_rewards": lambda x: shape_rewards(ADVANTAGES[:, 0], LOGPROB - OTHER, x).sum(),
    "beta of grpo_loss": lambda x: grpo_loss(LOGPROB, OTHER, ADVANTAGES, ref_logprob=OTHER, beta=x),
    "clip": lambda x: ppo_loss(LOGPROB, OTHER, ADVANTAGES, clip=x),
    "clip of grpo_loss": lambda x: grpo_loss(LOGPROB, OTHER, ADVANTAGES, clip=(x / 2, x)),
    "dual_clip": lambda x: ppo_loss(LOGPROB, OTHER, ADVANTAGES, dual_clip=1 + x),
    "beta of dpo_loss": lambda x: (
        dpo_loss(LOGPROB.sum(-1), OTHER.sum(-1), OTHER[:, 0], LOGPROB[:, 0], beta=x).loss
    ),
}


@pytest.mark.parametrize("loss", CHANGING.values(), ids=CHANGING)
def test_a_schedule_does_not_recompile(loss) -> None:
    """With a graph per value the last ones would be errors; "aot_eager" takes more numbers as
    constants than "eager", as inductor does.
    """
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for i in range(1, 3 + torch._dynamo.config.recompile_limit):
        assert compiled(0.07 * i).item() == pytest.approx(loss(0.07 * i).item(), rel=1e-6), i


# ---- the clamp of the KL, and the divisor of the means


@pytest.mark.parametrize("correct_kl", [False, True])
@pytest.mark.parametrize("clamp", [None, 0.5, 5.0])
def test_kl_clamp(clamp, correct_kl) -> None:
    """That of estimate_kl, or of sampled_kl_loss, token by token."""
    logprob = torch.tensor([[-30.0, -1.0, -2.0, -0.1]], dtype=torch.float64, requires_grad=True)
    old, ref = logprob.detach() - 0.1, torch.tensor([[-1.0, -1.2, -9.0, -0.2]], dtype=torch.float64)
    more = {
        "ref_logprob": ref,
        "beta": 0.3,
        "correct_kl": correct_kl,
        "kl_clamp": clamp,
        "reduction": "sum",
    }
    loss = grpo_loss(logprob, old, torch.zeros(1).double(), **more)
    corrected = sampled_kl_loss(logprob, ref, old_logprob=old, clamp=clamp)
    kl = corrected if correct_kl else estimate_kl(logprob, ref, estimator="k3", clamp=clamp)
    torch.testing.assert_close(loss, 0.3 * kl.sum(), rtol=1e-14, atol=0.0)
    got, exact = (torch.autograd.grad(value, logprob)[0] for value in (loss, 0.3 * kl.sum()))
    torch.testing.assert_close(got, exact, rtol=1e-14, atol=0.0)


def test_max_length_counts_what_counts() -> None:
    logprob, mask = torch.zeros(6), torch.tensor([True, False, True, True, True, False])
    more = {"reduction": "dr_grpo", "cu_seqlens": torch.tensor([0, 3, 6]), "max_length": 2}
    assert grpo_loss(logprob, None, torch.ones(2), mask, **more).item() == -1.0
    with pytest.raises(ValueError, match="^max_length: expected .* 3, got 2; "):
        grpo_loss(logprob, None, torch.ones(2), **more)


def dpo_of(logprob, old, advantages, mask, **more) -> torch.Tensor:
    return dpo_loss(logprob.sum(-1), old.sum(-1), advantages.sum(-1), old[:, 0], **more).loss


MEANS = [
    *((call, more) for call, more in FORMS if more["reduction"] != "sum"),
    (dpo_of, {"label_smoothing": 0.1}),
]


@pytest.mark.parametrize("call, more", MEANS, ids=spelled)
def test_normalizer(call, more) -> None:
    """Uneven micro-batches with the whole batch's count add up to it, their own means do not; a
    tensor of 0 gives 0.
    """
    made, mask, parts = batch(), mask_of("padding"), (slice(0, 1), slice(1, 4))
    count = int(mask.sum()) if more.get("reduction") in ("token_mean", "mean", "bnpo") else B

    def loss(rows: slice, **others) -> torch.Tensor:
        kl = (
            {"ref_logprob": made.ref[rows], "beta": 0.3, "correct_kl": True}
            if call is grpo_loss
            else {}
        )
        return call(
            made.logprob[rows],
            made.old[rows],
            made.per_token[rows],
            mask[rows],
            **more,
            **kl,
            **others,
        )

    whole = loss(slice(0, B))
    for normalizer in (count, torch.tensor(count)):
        assert_loss(
            sum(loss(rows, normalizer=normalizer) for rows in parts), whole, [made.logprob], 1e-14
        )
    alone = sum(loss(rows) for rows in parts) / 2
    got, exact = (
        torch.autograd.grad(each, made.logprob, retain_graph=True)[0] for each in (alone, whole)
    )
    assert float((got - exact).norm() / exact.norm()) > 0.05
    for zero in (torch.tensor(0), torch.zeros(1), torch.zeros((), dtype=torch.float64)):
        none = loss(slice(0, B), normalizer=zero)
        assert (
            none.shape == ()
            and none.item() == 0.0
            and not bool(torch.autograd.grad(none, made.logprob)[0].any())
        )
