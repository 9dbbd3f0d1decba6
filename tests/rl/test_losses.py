"""PPO, GRPO, CISPO and SAPO losses against the published formulas in float64, padded and packed,
and at their limits.
"""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from fastkl import testing
from fastkl.rl import grpo_loss, ppo_loss

B, T = 4, 6
MASKS = {
    "all": [[1] * T] * B,
    "padding": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]],
    "holes, one empty": [
        [1, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 1, 1],
        [1, 1, 1, 1, 0, 1],
    ],
}
KLS = ("none", "sampled", "corrected", "exact")
FORMS = [
    *((ppo_loss, {"reduction": name}) for name in ("token_mean", "mean", "sequence_mean", "sum")),
    *(
        (grpo_loss, {"level": level, **more})
        for level in ("token", "sequence")
        for more in (
            {"reduction": "grpo"},
            {"reduction": "bnpo"},
            {"reduction": "dr_grpo", "max_length": 8},
            {"reduction": "sum"},
        )
    ),
    (grpo_loss, {"surrogate": "cispo", "reduction": "bnpo"}),
    (grpo_loss, {"surrogate": "cispo", "level": "sequence", "reduction": "sum"}),
    (grpo_loss, {"surrogate": "sapo", "reduction": "grpo"}),
    (grpo_loss, {"surrogate": "sapo", "level": "sequence", "reduction": "sum"}),
]
WITH_KL = [(*form, kl) for form in FORMS for kl in KLS if kl == "none" or form[0] is grpo_loss]


def spelled(value: object) -> str:
    return getattr(value, "__name__", str(value))


forms = pytest.mark.parametrize("call, more", FORMS, ids=spelled)


def mask_of(name: str) -> torch.Tensor:
    return torch.tensor(MASKS[name], dtype=torch.bool)


def batch(dtype: torch.dtype = torch.float64, device: str = "cpu") -> SimpleNamespace:
    """Log-probabilities of now, before and the reference, and advantages: ratios on both sides of
    every clip, both signs of A.
    """
    generator = torch.Generator().manual_seed(0)
    old, step, away, advantages = torch.randn(4, B, T, generator=generator).double()
    made = {
        "logprob": old - 3 + 0.3 * step,
        "old": old - 3,
        "ref": old - 3 + 0.5 * away,
        "kl": away.abs(),
        "per_token": advantages,
        "per_sequence": advantages[:, 0].clone(),
    }
    return SimpleNamespace(
        **{
            name: value.to(device, dtype).requires_grad_(name in ("logprob", "kl"))
            for name, value in made.items()
        }
    )


def penalty(made: SimpleNamespace, kind: str) -> dict:
    if kind == "exact":
        return {"beta": 0.3, "kl": made.kl}
    if kind == "none":
        return {}
    return {"beta": 0.3, "ref_logprob": made.ref, "correct_kl": kind == "corrected"}


def packed(made: SimpleNamespace, real: torch.Tensor) -> tuple[SimpleNamespace, torch.Tensor]:
    flat = {
        name: value if name == "per_sequence" else value[real] for name, value in vars(made).items()
    }
    return SimpleNamespace(**flat), torch.nn.functional.pad(real.sum(-1).cumsum(0), (1, 0)).int()


def published(
    made,
    advantages,
    mask,
    *,
    reduction,
    clip=(0.2, 0.2),
    dual_clip=None,
    surrogate="clip",
    tau=(1.0, 1.05),
    level="token",
    max_length=1,
    kl="none",
):
    """Schulman et al. eq. 7, Ye et al., and TRL 1.16's GRPOTrainer._compute_loss on float64
    tensors; GSPO-token as in verl 0.9. CISPO's lower bound is verl's and MiniMax-M1's.
    """
    made = SimpleNamespace(**{name: value.double() for name, value in vars(made).items()})
    advantages = advantages.double() if advantages.dim() == 2 else advantages.double()[:, None]
    counts, log_ratio = mask.double(), made.logprob - made.old
    tokens = counts.sum(-1, keepdim=True).clamp(min=1)
    mean = (log_ratio * counts).sum(-1, keepdim=True) / tokens
    if level == "sequence":
        log_ratio = mean.detach() + made.logprob - made.logprob.detach()
    ratio = log_ratio.exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip[0], 1 + clip[1]) * advantages)
    if dual_clip is not None:
        gain = torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)
    if surrogate == "cispo":
        gain = ratio.clamp(1 - clip[0], 1 + clip[1]).detach() * advantages * made.logprob
    elif surrogate == "sapo":
        heat = torch.where(advantages > 0, *torch.tensor(tau, dtype=torch.float64))
        gain = advantages * (4 / heat) / (1 + (-heat * (ratio - 1)).exp())
    d = made.logprob - made.ref
    k3 = (-d).exp() + d - 1
    weight = ratio if level == "token" else mean.exp()
    kls = {"none": torch.zeros_like(d), "sampled": k3, "corrected": weight * k3, "exact": made.kl}
    loss = (0.3 * kls[kl] - gain) * counts
    return {
        "none": loss,
        "sequence_mean": loss.sum() / (counts.sum(-1) > 0).sum(),
        "grpo": (loss.sum(-1, keepdim=True) / tokens).mean(),
        "dr_grpo": loss.sum() / (B * max_length),
        "sum": loss.sum(),
    }.get(reduction, loss.sum() / counts.sum())


def assert_loss(
    loss: torch.Tensor,
    exact: torch.Tensor,
    leaves: list[torch.Tensor],
    tolerance: float,
    exact_leaves: list[torch.Tensor] | None = None,
) -> None:
    """A scalar and its gradients, of the order of 1 here, within an absolute tolerance of the exact
    ones.
    """
    assert loss.shape == () and loss.dtype == leaves[0].dtype
    values, exact_values = (
        (each, *torch.autograd.grad(each, by, retain_graph=True, materialize_grads=True))
        for each, by in ((loss, leaves), (exact, exact_leaves or leaves))
    )
    for value, exact_value in zip(values, exact_values, strict=True):
        testing.assert_near(value, exact_value, 0.0, tolerance, "loss or gradient")


# Masks, what they hide, and the clips.
# Sums of 24 products of numbers of the order of 1, each of some roundings of 2^-53 or 2^-24.
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6)], ids=str
)
@pytest.mark.parametrize(
    "name, garbage, clip, dual_clip",
    [
        ("all", 0.0, (0.2, 0.2), None),
        ("padding", math.nan, (0.2, 0.28), 1.1),
        ("holes, one empty", math.inf, (0.03, 0.04), None),
        ("holes, one empty", -math.inf, (1, math.inf), 3.0),
    ],
    ids=str,
)
@forms
def test_published_losses(call, more, name, garbage, clip, dual_clip, dtype, tolerance) -> None:
    # Value and gradient: advantages per token and per sequence, every KL, padded, and packed with
    # holes and without, whatever the tokens hold that do not count.
    clean, mask, made = batch(dtype), mask_of(name), batch(dtype)
    for values in (made.logprob, made.old, made.ref, made.kl, made.per_token):
        values.data.masked_fill_(~mask, garbage)
    real, bounds = packed(made, mask)
    everything, ends = packed(made, torch.ones_like(mask))
    of_ppo, tolerance = call is ppo_loss, tolerance * (B * T if more["reduction"] == "sum" else 1)
    leaves = [[each.logprob] if of_ppo else [each.logprob, each.kl] for each in (made, clean)]
    surrogate, tau = more.get("surrogate", "clip"), {} if dual_clip is None else {"tau": (0.7, 2.0)}
    settings = {**more, **(tau if surrogate == "sapo" else {"clip": clip})}
    settings |= {"dual_clip": dual_clip} if surrogate == "clip" else {}
    for kl, per in itertools.product(KLS[:1] if of_ppo else KLS, ("per_token", "per_sequence")):
        exact = published(clean, getattr(clean, per), mask, kl=kl, **settings)
        for values, counts, where in (
            (made, None if name == "all" else mask, {}),
            (real, None, {"cu_seqlens": bounds}),
            (everything, mask.flatten(), {"cu_seqlens": ends}),
        ):
            given = values.logprob, values.old, getattr(values, per), counts
            loss = call(*given, **settings, **where, **penalty(values, kl))
            assert_loss(loss, exact, leaves[0], tolerance, leaves[1])


@forms
def test_on_policy_it_is_the_policy_gradient(call, more) -> None:
    # Without old_logprob as with the log-probabilities of now, also within no clip.
    made = batch()
    made.old = made.logprob.detach()
    kls = KLS if call is grpo_loss else KLS[:1]
    for clip, old, kl in itertools.product((0.2, 0.0), (None, made.old), kls):
        given = made.logprob, old, made.per_token
        settings = more if more.get("surrogate") == "sapo" else {"clip": clip, **more}
        loss = call(*given, **settings, **penalty(made, kl))
        exact = published(made, made.per_token, mask_of("all"), kl=kl, **more)
        assert_loss(loss, exact, [made.logprob], 1e-13)


@pytest.mark.parametrize("call, more", [form for form in FORMS if form[1]["reduction"] == "sum"])
def test_losses_per_token(call, more) -> None:
    # Weighted by their user, padded and packed; exactly 0 where a token does not count, whatever it
    # holds.
    clean, mask, made, more = (
        batch(),
        mask_of("holes, one empty"),
        batch(),
        {**more, "reduction": "none"},
    )
    for values in (made.logprob, made.old, made.ref, made.kl, made.per_token):
        values.data.masked_fill_(~mask, math.nan)
    everything, ends = packed(made, torch.ones_like(mask))
    weights = torch.arange(B * T).view(B, T) - 7.0
    for kl in KLS if call is grpo_loss else KLS[:1]:
        exact = published(clean, clean.per_sequence, mask, kl=kl, **more)
        for values, counts, where in (
            (made, mask, {}),
            (everything, mask.flatten(), {"cu_seqlens": ends}),
        ):
            given = values.logprob, values.old, values.per_sequence, counts
            losses = call(*given, **more, **where, **penalty(values, kl))
            assert losses.shape == counts.shape and losses[~counts].tolist() == [0.0] * 13
            sums = (losses.view(B, T) * weights).sum(), (exact * weights).sum()
            assert_loss(*sums, [made.logprob], 1e-12, [clean.logprob])
            testing.assert_near(losses.view(B, T), exact, 0.0, 1e-13, "losses")


# The step of the log-probability, and the loss for A = 1 and A = -1; a gradient must be 0 there.
@pytest.mark.parametrize(
    "step, gaining, losing",
    [
        *((step, -1.2, math.exp(20)) for step in (100.0, 1e4, math.inf)),
        *((step, 0.0, 0.8) for step in (-200.0, -1e4, -math.inf)),
    ],
)
def test_extreme_ratios(step, gaining, losing) -> None:
    # A ratio that is infinite or 0 in float32 is clipped like any other; a minimum of
    # products has the gradient 0·inf = NaN.
    logprob = torch.tensor([[-2.0, -1.0 if step > 0 else step]], requires_grad=True)
    old = torch.tensor([[-2.0, -step if step > 0 else -1.0]])
    for call, (advantage, value) in itertools.product(
        (ppo_loss, grpo_loss), ((1.0, gaining), (-1.0, losing))
    ):
        loss = call(logprob, old, torch.tensor([[0.0, advantage]]))
        assert loss.item() == pytest.approx(value / 2, rel=1e-6, abs=1e-30)
        assert not bool(torch.autograd.grad(loss, logprob)[0].any())
    assert ppo_loss(logprob, old, -torch.ones(1, 2), dual_clip=3.0).item() == pytest.approx(
        (1 + (3 if step > 0 else 0.8)) / 2
    )


SIZES = [0.0, -1e-6, -3.0, -40.0, -200.0, -1e4, -65504.0, torch.finfo(torch.float32).min, -math.inf]


@pytest.mark.parametrize(
    "call, more, kl", [each for each in WITH_KL if each[2] != "exact"], ids=spelled
)
def test_impossible_tokens(call, more, kl) -> None:
    # Every mix of -inf, huge and ordinary log-probabilities is finite; impossible under both
    # policies is a ratio of 1 without gradient.
    logprob, old, ref = (
        value.reshape(-1, 9) for value in torch.meshgrid(*[torch.tensor(SIZES)] * 3, indexing="ij")
    )
    logprob = logprob.clone().requires_grad_()
    more = {**more, "max_length": 9} if "max_length" in more else more
    for advantage, mask in itertools.product((1.0, -1.0), (None, ref > -50)):
        given = logprob, old, torch.full((81,), advantage), mask
        loss = call(*given, **more, **penalty(SimpleNamespace(ref=ref), kl))
        assert loss.isfinite() and bool(torch.autograd.grad(loss, logprob)[0].isfinite().all())
    for advantage, impossible in itertools.product((1.0, -1.0), SIZES[-3:]):
        pair = torch.tensor([[impossible, -2.0]], requires_grad=True)
        for before in (None, pair.detach()):
            given = pair, before, torch.tensor([advantage])
            loss = call(*given, **more, **penalty(SimpleNamespace(ref=pair.detach()), kl))
            assert loss.item() == call(*given, **more).item()
            impossibles, others = torch.autograd.grad(loss, pair)[0][0]
            assert impossibles == 0 != others


def test_beta() -> None:
    # A number, a tensor and a controller, read at every call; a number 0 leaves the KL out,
    # and no KL is needed then.
    made, controller = batch(torch.float32), SimpleNamespace(beta=0.3)
    given, learned = (made.logprob, made.old, made.per_token), torch.tensor(0.3, requires_grad=True)
    first, *same = (
        grpo_loss(*given, ref_logprob=made.ref, beta=beta) for beta in (0.3, learned, controller)
    )
    testing.assert_same_bits(torch.stack(same), first.expand(2), "beta")
    assert torch.autograd.grad(same[0], learned, allow_unused=True) == (None,)
    controller.beta, plain = 0.0, grpo_loss(*given)
    for more in ({}, {"ref_logprob": made.ref}, {"kl": made.kl * math.inf}):
        testing.assert_same_bits(grpo_loss(*given, beta=controller, **more), plain, str(more))
    # A KL may be constant where nothing is trained.
    with torch.no_grad():
        assert grpo_loss(*given, kl=torch.ones(B, T), beta=0.1).item() == pytest.approx(
            plain.item() + 0.1
        )


# ---- masks, empty batches, types


@pytest.mark.parametrize("call, more, kl", WITH_KL, ids=spelled)
def test_a_nan_that_counts(call, more, kl) -> None:
    made = batch(torch.float32)
    made.old[0, 0] = math.nan
    given = made.logprob, made.old, made.per_token, mask_of("holes, one empty")
    assert call(*given, **more, **penalty(made, kl)).isnan()


@forms
def test_no_token_counts(call, more) -> None:
    # The loss is 0 and so is its gradient: not NaN; of packed sequences too.
    given = [
        *((shape, shape[:-1], {}) for shape in ((B, T), (0, T), (B, 0), (0, 0))),
        *(((0,), (len(ends) - 1,), {"cu_seqlens": torch.tensor(ends)}) for ends in ([0], [0] * 3)),
    ]
    for shape, sequences, where in given:
        logprob, none = torch.zeros(shape, requires_grad=True), torch.zeros(shape, dtype=torch.bool)
        arguments = logprob, torch.ones(shape), torch.ones(sequences), none
        kl = {"ref_logprob": logprob.detach(), "beta": 0.1} if call is grpo_loss else {}
        loss = call(*arguments, **more, **kl, **where)
        assert loss.item() == 0.0 and not bool(torch.autograd.grad(loss, logprob)[0].any())


def test_shapes() -> None:
    # [2, 2, T] is [4, T]; [S] with S = total is one per sequence; boundaries are not needed
    # where no sequence is asked for.
    made, mask = batch(), mask_of("padding")
    real, bounds = packed(made, mask)
    given = made.logprob, made.old, made.per_token, mask
    torch.testing.assert_close(
        grpo_loss(*(value.view(2, 2, -1) for value in given)),
        grpo_loss(*given),
        rtol=1e-14,
        atol=0.0,
    )
    arguments = real.logprob, real.old, real.per_token
    for call, more in FORMS:
        if (
            more["reduction"] in ("token_mean", "mean", "bnpo", "sum")
            and more.get("level") != "sequence"
        ):
            loss = call(*arguments, **more, cu_seqlens=bounds)
            testing.assert_same_bits(call(*arguments, **more), loss, str(more))
    logprob, ends = torch.zeros(3, requires_grad=True), torch.tensor([0, 2, 2, 3])
    loss = ppo_loss(logprob, None, torch.tensor([1.0, 2.0, 4.0]), cu_seqlens=ends, reduction="sum")
    assert torch.autograd.grad(loss, logprob)[0].tolist() == [-1.0, -1.0, -4.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types(dtype) -> None:
    # float32 whatever the input, with the bits of the same numbers in float32; advantages of
    # any type; data gets no gradient.
    made = batch(dtype)
    others = [value.requires_grad_() for value in (made.per_token, made.ref)]
    loss = grpo_loss(made.logprob, made.old, made.per_token, ref_logprob=made.ref, beta=0.1)
    logprob, old, advantages, ref = (
        value.detach().float() for value in (made.logprob, made.old, *others)
    )
    testing.assert_same_bits(
        loss, grpo_loss(logprob, old, advantages.double(), ref_logprob=ref, beta=0.1), str(dtype)
    )
    assert torch.autograd.grad(loss, others, allow_unused=True, retain_graph=True) == (None, None)
    assert loss.dtype == torch.float32 and torch.autograd.grad(loss, made.logprob)[0].dtype == dtype
