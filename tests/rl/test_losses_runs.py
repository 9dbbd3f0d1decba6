"""DPO's and IPO's formulas; losses, estimators and rewards on meta tensors, in one graph and
without synchronisation; the clamp of the KL and the divisor of the means.
"""

import functools
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from cases import waits
from test_losses import FORMS, WITH_KL, B, assert_loss, batch, mask_of, penalty, spelled
from torch.nn.functional import logsigmoid

from fastkl import testing
from fastkl.estimators import binary_divergence, estimate_kl, sampled_kl_loss
from fastkl.rl import divergence_mask, dpo_loss, grpo_loss, ppo_loss, shape_rewards

# ---- DPO


# A margin is a difference of four log-probabilities of up to 70 nats, known to 3 roundings of 2^-24
# (2^-53) of them: 1.3e-5 times beta. The loss and its gradient have slopes of at most 1 and beta in
# it, and roundings of their own.
@pytest.mark.parametrize(
    "dtype, rounding, tolerance", [(torch.float64, 1e-14, 2e-13), (torch.float32, 3e-6, 2e-5)]
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.49])
@pytest.mark.parametrize("beta", [0.01, 0.1, 1])
def test_dpo_is_the_published_one(beta, smoothing, dtype, rounding, tolerance) -> None:
    # TRL 1.16's "sigmoid", with smoothing Mitchell's mixture of both labels; no gradient to the
    # reference.
    made = -40 + 10 * torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    given, wide = (
        [value.to(kind).requires_grad_() for value in made] for kind in (dtype, torch.float64)
    )
    result = dpo_loss(*given, beta=beta, label_smoothing=smoothing)
    c, r, ref_c, ref_r = wide
    margin = beta * ((c - ref_c) - (r - ref_r))
    exact = (-(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)).mean()
    allowed = rounding + beta * tolerance
    assert_loss(result.loss, exact, given[:2], allowed, wide[:2])
    assert torch.autograd.grad(result.loss, given[2:], allow_unused=True) == (None, None)
    rewards = torch.stack([beta * (c - ref_c), beta * (r - ref_r), margin])
    testing.assert_near(torch.stack(result[1:]), rewards, 0.0, allowed, "rewards")
    assert not any(value.requires_grad for value in result[1:])


@pytest.mark.parametrize("dtype, rounding", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("beta", [0.01, 0.1, 1])
def test_ipo_is_the_published_one(beta, dtype, rounding) -> None:
    # Azar et al., eq. 17, of sums; of means per token TRL 1.16's "ipo". Pair by pair, their mean
    # and their sum. Log-ratios of some 10 nats are known to 1e-5 (1e-14), their mean square to
    # twice that of itself.
    made = -40 + 10 * torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([[5.0], [9.0], [5.0], [9.0]])
    for values in (made, made / lengths):
        c, r, ref_c, ref_r = wide = [value.double().requires_grad_() for value in values]
        given = [value.to(dtype).requires_grad_() for value in wide]
        exact = ((c - r) - (ref_c - ref_r) - 1 / (2 * beta)).square()
        for reduction, wanted in (("none", exact), ("mean", exact.mean()), ("sum", exact.sum())):
            loss = dpo_loss(*given, beta=beta, loss="ipo", reduction=reduction).loss
            slopes, exact_slopes = (
                torch.autograd.grad(value.sum(), by, retain_graph=True)[0]
                for value, by in ((loss, given[:1]), (wanted, wide[:1]))
            )
            for result, truth in ((loss, wanted), (slopes, exact_slopes)):
                limits = {"rtol": 2 * rounding, "atol": rounding}
                torch.testing.assert_close(result.double(), truth, **limits)


LOG2, LONG = math.log(2), -0.1 / (1 + math.exp(2))


# chosen, rejected, ref_chosen, ref_rejected, the loss at beta 0.1, its gradient to chosen and to
# rejected.
@pytest.mark.parametrize(
    "values, loss, slopes",
    [
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
        ((math.nan, -5.0, -5.0, -5.0), math.nan, (0.0, math.nan)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dpo_in_closed_form(values, loss, slopes, dtype) -> None:
    # -inf counts as a number without gradient; a pair ranked wrong by far is linear.
    given = [torch.tensor([value], dtype=dtype, requires_grad=True) for value in values]
    result = dpo_loss(*given)
    assert result.loss.item() == pytest.approx(loss, rel=1e-6, nan_ok=True)
    gradient = torch.autograd.grad(result.loss, given[:2])
    assert [grad.item() for grad in gradient] == pytest.approx(
        slopes, rel=1e-5, abs=1e-12, nan_ok=True
    )


def test_dpo_normalizer_and_types() -> None:
    none, pairs = torch.zeros(0, requires_grad=True), torch.zeros(4, 8, dtype=torch.bfloat16)
    loss = dpo_loss(none, *[torch.zeros(0)] * 3).loss
    assert loss.item() == 0.0 and torch.autograd.grad(loss, none)[0].shape == (0,)
    losses = dpo_loss(*pairs, reduction="none", label_smoothing=0.1).loss
    assert losses.shape == (8,) and losses.sum() == dpo_loss(*pairs, reduction="sum").loss
    assert dpo_loss(*pairs, normalizer=4).loss == 2 * dpo_loss(*pairs).loss > 0
    assert {value.dtype for value in dpo_loss(*pairs)} == {torch.float32}


# ---- where it runs


def every_loss(made, mask: torch.Tensor, where: dict, step: int = 1) -> torch.Tensor:
    losses = []
    for i, (call, more, kl) in enumerate(WITH_KL[::step]):
        more = more if more["reduction"] == "sum" else {**more, "normalizer": mask.sum()}
        # Alternately, so that both have every form.
        given = made.logprob, made.old, made.per_token if i % 3 else made.per_sequence, mask
        losses.append(call(*given, **more, **where, **penalty(made, kl)))
    for scores in (made.per_token, made.per_sequence):
        losses.append(
            (shape_rewards(scores, made.old, torch.tensor(0.3), mask, **where) * made.logprob).sum()
        )
    losses.append(ppo_loss(made.logprob, None, made.per_sequence, mask, dual_clip=3.0, **where))
    losses.append(binary_divergence(made.logprob, made.ref).sum())
    keep = divergence_mask(
        made.logprob, made.old, made.per_sequence, kind="kl", limit=0.02, **where
    )
    losses.append(ppo_loss(made.logprob, made.old, made.per_token * keep, reduction="none").sum())
    losses.append(estimate_kl(made.logprob, made.ref, estimator="k2", clamp=2.0).sum())
    more = {"old_logprob": made.old, "direction": "reference||policy"}
    losses.append(sampled_kl_loss(made.logprob, made.ref, **more).sum())
    pair = made.logprob.flatten(), made.old.flatten()
    return torch.stack([*losses, dpo_loss(*pair, *pair[::-1], normalizer=mask.sum()).loss])


def layouts(device: str) -> list[tuple[SimpleNamespace, torch.Tensor, dict]]:
    made, mask = batch(torch.float32, device), mask_of("padding").to(device)
    flat = SimpleNamespace(**{name: value.flatten() for name, value in vars(made).items()})
    return [
        (made, mask, {}),
        (flat, mask.flatten(), {"cu_seqlens": torch.tensor([0, 6, 12, 18, 24], device=device)}),
    ]


def test_values_are_not_looked_at() -> None:
    # Meta tensors have none, backward too; losses of packed sequences have the same bits in one
    # graph, of which a quarter of the mixes is enough.
    for given in layouts("meta"):
        losses = every_loss(*given)
        assert losses.dim() == 1 and losses.device.type == "meta"
        torch.autograd.grad(losses.sum(), given[0].logprob)
    compiled = torch.compile(every_loss, backend="eager", fullgraph=True)
    for given in layouts("cpu")[1:]:
        results = compiled(*given, step=4), every_loss(*given, step=4)
        testing.assert_same_bits(*results, "losses")
        torch.testing.assert_close(
            *(torch.autograd.grad(losses.sum(), given[0].logprob) for losses in results)
        )


@pytest.mark.gpu
def test_no_synchronisation() -> None:
    def step(made, *rest) -> None:
        torch.autograd.grad(every_loss(made, *rest).sum(), made.logprob)

    for given, same in zip(layouts("cuda"), layouts("cpu"), strict=True):
        assert waits(functools.partial(step, *given)) == 0
        losses = every_loss(*given).cpu(), every_loss(*same)
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


def test_wrong_boundaries() -> None:
    # An error on the CPU; under torch.compile and on a GPU a NaN, without a gradient and
    # without a wrong address.
    logprob, mask = torch.zeros(15, requires_grad=True), torch.arange(15) % 4 != 1
    calls = {
        shape_rewards: lambda each: (each, torch.zeros(15), 0.3),
        ppo_loss: lambda each: (logprob, None, each),
        grpo_loss: lambda each: (logprob, None, each),
    }
    wrong = [[0, 5, 16], [1, 5, 15], [0, 10, 5, 15], [0, 20, 15], [-3, 5, 10], [15]]
    for (call, given), per_token in itertools.product(calls.items(), (False, True)):
        compiled = torch.compile(call, backend="eager", fullgraph=True)
        for bounds in wrong:
            each = torch.ones(15 if per_token else len(bounds) - 1)
            more = {"mask": mask, "cu_seqlens": torch.tensor(bounds)}
            with pytest.raises(ValueError, match="^cu_seqlens: expected .*, got .*; "):
                call(*given(each), **more)
            result = compiled(*given(each), **more)
            if call is shape_rewards:
                assert torch.equal(result.isnan(), mask) and not result.nan_to_num(0.0).any()
            else:
                assert result.isnan() and not torch.autograd.grad(result, logprob)[0].any()


LOGPROB = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -0.1, -1.0]])
OTHER, ADVANTAGES = LOGPROB.flip(-1) - 0.3, torch.tensor([[1.0, -1.0, 0.5], [-2.0, 1.0, -0.5]])
CHANGING = {
    "beta of shape_rewards": lambda x: shape_rewards(ADVANTAGES[:, 0], LOGPROB - OTHER, x).sum(),
    "beta of grpo_loss": lambda x: grpo_loss(LOGPROB, OTHER, ADVANTAGES, ref_logprob=OTHER, beta=x),
    "clip": lambda x: ppo_loss(LOGPROB, OTHER, ADVANTAGES, clip=x),
    "clip of grpo_loss": lambda x: grpo_loss(LOGPROB, OTHER, ADVANTAGES, clip=(x / 2, x)),
    "dual_clip": lambda x: ppo_loss(LOGPROB, OTHER, ADVANTAGES, dual_clip=1 + x),
    "tau": lambda x: grpo_loss(LOGPROB, OTHER, ADVANTAGES, surrogate="sapo", tau=(x, 2 * x)),
    "clip of cispo": lambda x: grpo_loss(LOGPROB, OTHER, ADVANTAGES, surrogate="cispo", clip=x),
    "limit": lambda x: divergence_mask(LOGPROB, OTHER, ADVANTAGES, limit=x / 2).sum(),
    "beta of dpo_loss": lambda x: (
        dpo_loss(LOGPROB.sum(-1), OTHER.sum(-1), OTHER[:, 0], LOGPROB[:, 0], beta=x).loss
    ),
}


@pytest.mark.parametrize("loss", CHANGING.values(), ids=CHANGING)
def test_a_schedule_does_not_recompile(loss) -> None:
    # With a graph per value the last ones would be errors; "aot_eager" takes more numbers as
    # constants than "eager", as inductor does.
    if torch.__version__.startswith("2.10.") and loss in (CHANGING["dual_clip"], CHANGING["limit"]):
        pytest.skip("torch 2.10 compiles these for each value")
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for i in range(1, 3 + torch._dynamo.config.recompile_limit):
        assert compiled(0.07 * i).item() == pytest.approx(loss(0.07 * i).item(), rel=1e-6), i


# ---- the clamp of the KL, and the divisor of the means


@pytest.mark.parametrize("correct_kl", [False, True])
@pytest.mark.parametrize("clamp", [None, 0.5, 5.0])
def test_kl_clamp(clamp, correct_kl) -> None:
    # That of estimate_kl, or of sampled_kl_loss, token by token.
    logprob = torch.tensor([[-30.0, -1.0, -2.0, -0.1]], dtype=torch.float64, requires_grad=True)
    old, ref = logprob.detach() - 0.1, torch.tensor([[-1.0, -1.2, -9.0, -0.2]], dtype=torch.float64)
    more = {"ref_logprob": ref, "beta": 0.3, "correct_kl": correct_kl, "kl_clamp": clamp}
    loss = grpo_loss(logprob, old, torch.zeros(1).double(), reduction="sum", **more)
    kl = (
        sampled_kl_loss(logprob, ref, old_logprob=old, clamp=clamp)
        if correct_kl
        else estimate_kl(logprob, ref, estimator="k3", clamp=clamp)
    )
    results = [(value, torch.autograd.grad(value, logprob)[0]) for value in (loss, 0.3 * kl.sum())]
    torch.testing.assert_close(*results, rtol=1e-14, atol=0.0)


def test_max_length_counts_what_counts() -> None:
    logprob, mask = torch.zeros(6), torch.tensor([True, False, True, True, True, False])
    more = {"reduction": "dr_grpo", "cu_seqlens": torch.tensor([0, 3, 6]), "max_length": 2}
    assert grpo_loss(logprob, None, torch.ones(2), mask, **more).item() == -1.0


@pytest.mark.parametrize(
    "call, more", [each for each in FORMS if each[1]["reduction"] != "sum"], ids=spelled
)
def test_normalizer(call, more) -> None:
    # Uneven micro-batches with the whole batch's count add up to it; a tensor of 0 gives 0.
    made, mask, parts = batch(), mask_of("padding"), (slice(0, 1), slice(1, 4))
    count = int(mask.sum()) if more["reduction"] in ("token_mean", "mean", "bnpo") else B

    def loss(rows: slice, **others) -> torch.Tensor:
        given = (each[rows] for each in (made.logprob, made.old, made.per_token, mask))
        kl = penalty(
            SimpleNamespace(ref=made.ref[rows]), "corrected" if call is grpo_loss else "none"
        )
        return call(*given, **more, **kl, **others)

    whole = loss(slice(0, B))
    for normalizer in (count, torch.tensor(count)):
        assert_loss(
            sum(loss(rows, normalizer=normalizer) for rows in parts), whole, [made.logprob], 1e-14
        )
    for zero in (torch.tensor(0), torch.zeros(1), torch.zeros((), dtype=torch.float64)):
        none = loss(slice(0, B), normalizer=zero)
        assert none.shape == () and none.item() == 0.0
        assert not bool(torch.autograd.grad(none, made.logprob)[0].any())
