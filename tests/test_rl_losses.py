"""PPO, GRPO and DPO losses against the published formulas in fp64, TRL 1.16's and verl 0.9's among them, and against facts in closed form."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from fastkl import testing
from fastkl.rl.losses import DPOLoss, dpo_loss, grpo_loss, ppo_loss

B, T = 4, 6
MASKS = {
    "all": None,
    "padding": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]],
    "holes, one sequence empty": [[1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 1, 1], [1, 1, 1, 1, 0, 1]],
}
CLIPS = {"0.2": 0.2, "DAPO": (0.2, 0.28), "narrow": (3e-2, 4e-2), "none": (1, math.inf)}


def mask_of(name: str) -> torch.Tensor | None:
    """A mask [B, T], or None."""
    return None if MASKS[name] is None else torch.tensor(MASKS[name], dtype=torch.bool)


def batch(dtype: torch.dtype = torch.float64, spread: float = 0.3) -> SimpleNamespace:
    """Log-probabilities of now, before and the reference, and advantages: ratios on both sides of every clip, both signs of A beside each."""
    generator = torch.Generator().manual_seed(0)
    old, step, away, advantages = (torch.randn(B, T, generator=generator).double() for _ in range(4))
    old = -3 + old
    made = {"logprob": old + spread * step, "old": old, "ref": old + 0.5 * away, "per_token": advantages, "per_sequence": advantages[:, 0]}
    made = SimpleNamespace(**{name: value.to(dtype) for name, value in made.items()})
    made.logprob.requires_grad_()
    return made


def wide(*values: torch.Tensor) -> list[torch.Tensor]:
    """The same numbers in fp64, with gradient of their own where they had one."""
    return [value.detach().double().requires_grad_(value.requires_grad) for value in values]


def assert_loss(loss: torch.Tensor, leaves: tuple, exact: torch.Tensor, exact_leaves: tuple, tolerance: float, what: str) -> None:
    """A scalar and its gradients, of the order of 1 here, within an absolute tolerance of fp64 ones."""
    assert loss.shape == () and loss.dtype == leaves[0].dtype
    testing.assert_near(loss, exact, 0.0, tolerance, what)
    grads, exact_grads = torch.autograd.grad(loss, leaves), torch.autograd.grad(exact, exact_leaves)
    assert any(bool(grad.any()) for grad in exact_grads)
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        testing.assert_near(grad, exact_grad, 0.0, tolerance, f"gradient of {what}")


# Sums of 24 products of numbers of the order of 1, each of some roundings of 2^-53 or 2^-24.
TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6}


# ---- PPO


def published_ppo(logprob, old, advantages, mask, low, high, dual_clip, reduction):
    """Schulman et al. eq. 7 and Ye et al., on products, as trainers write them (verl: clip_ratio_c), with the three reductions."""
    ratio = (logprob - old).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    if dual_clip is not None:
        gain = torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)
    mask = torch.ones_like(gain) if mask is None else mask.double()
    total = -(gain * mask).sum()
    return {"token_mean": total / mask.sum(), "sequence_mean": total / (mask.sum(-1) > 0).sum(), "sum": total}[reduction]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("dual_clip", [None, 1.1, 3.0])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sum"])
def test_ppo_is_the_published_one(reduction, name, clip, dual_clip, dtype) -> None:
    """Value and gradient, advantages per token and per sequence."""
    made = batch(dtype)
    low, high = CLIPS[clip] if isinstance(CLIPS[clip], tuple) else (CLIPS[clip],) * 2
    for advantages in (made.per_token, made.per_sequence):
        loss = ppo_loss(made.logprob, made.old, advantages, mask_of(name), clip=CLIPS[clip], dual_clip=dual_clip, reduction=reduction)
        logprob, old, weight = wide(made.logprob, made.old, advantages if advantages.dim() == 2 else advantages[:, None].expand(B, T))
        exact = published_ppo(logprob, old, weight, mask_of(name), low, high, dual_clip, reduction)
        assert_loss(loss, (made.logprob,), exact, (logprob,), TOLERANCES[dtype] * (B * T if reduction == "sum" else 1), f"{clip}, {dual_clip}")


@pytest.mark.parametrize("advantage, ratio, value, slope", [
    (1.0, 0.5, -0.5, -0.5), (1.0, 1.0, -1.0, -1.0), (1.0, 1.25, -1.25, -1.25), (1.0, 1.5, -1.28, 0.0), (1.0, 40.0, -1.28, 0.0),
    (-1.0, 0.5, 0.8, 0.0), (-1.0, 0.85, 0.85, 0.85), (-1.0, 1.5, 1.5, 1.5), (-1.0, 2.9, 2.9, 2.9), (-1.0, 3.1, 3.0, 0.0), (-1.0, 40.0, 3.0, 0.0),
    (0.0, 40.0, 0.0, 0.0), (0.0, 0.01, 0.0, 0.0)])
def test_where_the_gradient_stops(advantage, ratio, value, slope) -> None:
    """Clip (0.2, 0.28), dual clip 3: a gain stops above 1.28, a loss below 0.8 and above 3."""
    logprob = torch.tensor([math.log(ratio) - 2.0], dtype=torch.float64, requires_grad=True)
    loss = ppo_loss(logprob, torch.full((1,), -2.0).double(), torch.tensor(advantage).double(), clip=(0.2, 0.28), dual_clip=3.0)
    assert loss.item() == pytest.approx(value, abs=1e-14)
    assert float(torch.autograd.grad(loss, logprob)[0]) == pytest.approx(slope, abs=1e-14)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_on_policy_it_is_the_policy_gradient(level) -> None:
    """With ratio 1 the loss is -mean A and the gradient -A/N; without old_logprob as with the log-probabilities of now; also within no clip."""
    made = batch()
    for clip in (0.2, 0.0):
        for call in (ppo_loss, lambda *arguments, **more: grpo_loss(*arguments, level=level, reduction="bnpo", **more)):
            for old in (None, made.logprob.detach()):
                loss = call(made.logprob, old, made.per_token, clip=clip)
                exact = -((made.logprob - made.logprob.detach() + 1) * made.per_token).mean()
                assert_loss(loss, (made.logprob,), exact, (made.logprob,), 1e-15, "loss")


# value: of the loss for A = 1 and A = -1; a gradient must be 0 there.
EXTREMES = [(100.0, -1.2, math.exp(20)), (1e4, -1.2, math.exp(20)), (math.inf, -1.2, math.exp(20)), (-200.0, 0.0, 0.8), (-1e4, 0.0, 0.8),
            (-math.inf, 0.0, 0.8)]


@pytest.mark.parametrize("step, gaining, losing", EXTREMES)
def test_extreme_ratios(step, gaining, losing) -> None:
    """A ratio that is infinite or 0 in float32 is clipped like any other, where a minimum of products has the gradient 0·inf = NaN."""
    logprob = torch.tensor([[-2.0, -1.0 if step > 0 else step]], requires_grad=True)
    old = torch.tensor([[-2.0, -step if step > 0 else -1.0]])
    for advantage, value in ((1.0, gaining), (-1.0, losing)):
        for call in (ppo_loss, grpo_loss):
            loss = call(logprob, old, torch.tensor([[0.0, advantage]]))
            assert loss.item() == pytest.approx(value / 2, rel=1e-6, abs=1e-30)
            assert torch.equal(torch.autograd.grad(loss, logprob)[0], torch.zeros(1, 2))
    assert ppo_loss(logprob, old, -torch.ones(1, 2), dual_clip=3.0).item() == pytest.approx((1 + (3 if step > 0 else 0.8)) / 2)
    if step > 0:  # verl's way with it, the log-ratio within ±20
        ratio = (logprob - old).clamp(-20, 20).exp()
        assert ppo_loss(logprob, old, -torch.ones(1, 2)).item() == pytest.approx(float(torch.maximum(ratio, ratio.clamp(0.8, 1.2)).mean()), rel=1e-6)
    loss = grpo_loss(logprob, old, torch.ones(1), level="sequence", ref_logprob=old, beta=0.1)
    assert loss.isfinite() and bool(torch.autograd.grad(loss, logprob)[0].isfinite().all())


# ---- GRPO


def trl_grpo(logprob, old, advantages, mask, *, ref=None, kl=None, beta=0.0, low=0.2, high=0.2, level="token", loss_type="grpo", max_length=None,
             correct=False):
    """The loss of TRL 1.16's GRPOTrainer (trl/trainer/grpo_trainer.py, _compute_loss), one step of accumulation."""
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    mask = torch.ones_like(logprob) if mask is None else mask.to(logprob)
    tokens = mask.sum(-1).clamp(min=1)
    log_weight = logprob - old if level == "token" else (((logprob - old) * mask).sum(-1) / tokens)[:, None]
    weight = log_weight.exp()
    loss = -torch.min(weight * advantages, weight.clamp(1 - low, 1 + high) * advantages)
    if ref is not None:
        kl = (ref - logprob).exp() - (ref - logprob) - 1
        kl = kl * weight if correct else kl
    loss = loss if kl is None else loss + beta * kl
    return {"grpo": ((loss * mask).sum(-1) / tokens).mean(), "bnpo": (loss * mask).sum() / mask.sum().clamp(min=1),
            "dr_grpo": (loss * mask).sum() / (B * (max_length or 1)), "sum": (loss * mask).sum()}[loss_type]


def penalties(ref: torch.Tensor, kl: torch.Tensor) -> dict[str, dict]:
    """The ways to have a KL in the loss, as arguments of grpo_loss."""
    return {"sampled": {"ref_logprob": ref, "beta": 0.3}, "corrected": {"ref_logprob": ref, "beta": 0.3, "correct_kl": True},
            "exact": {"kl": kl, "beta": 0.3}}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("penalty", ["none", "sampled", "corrected", "exact"])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("reduction", ["grpo", "bnpo", "dr_grpo", "sum"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_grpo_is_that_of_trl(level, reduction, name, penalty, dtype) -> None:
    """Value and gradient, the KL corrected by the ratio of `level` too."""
    made, mask = batch(dtype), mask_of(name)
    kl = (0.1 * made.ref.abs()).requires_grad_()
    max_length = 8 if reduction == "dr_grpo" else None
    more = {**penalties(made.ref, kl), "none": {}}[penalty]
    leaves = (made.logprob, kl) if penalty == "exact" else (made.logprob,)
    logprob, old, ref, wide_kl, per_token, per_sequence = wide(made.logprob, made.old, made.ref, kl, made.per_token, made.per_sequence)
    own = {"none": {}, "sampled": {"ref": ref}, "corrected": {"ref": ref, "correct": True}, "exact": {"kl": wide_kl}}[penalty]
    # At level "sequence" TRL lets a token's gradient have the mean of its sequence's advantages (next test).
    choices = ((made.per_token, per_token), (made.per_sequence, per_sequence))[level == "sequence":]
    for advantages, wide_advantages in choices:
        loss = grpo_loss(made.logprob, made.old, advantages, mask, clip=(0.1, 0.15), level=level, reduction=reduction,
                         max_length=max_length, **more)
        exact = trl_grpo(logprob, old, wide_advantages, mask, beta=0.3, low=0.1, high=0.15, level=level, loss_type=reduction,
                         max_length=max_length, **own)
        exact_leaves = (logprob, wide_kl) if penalty == "exact" else (logprob,)
        assert_loss(loss, leaves, exact, exact_leaves, TOLERANCES[dtype] * (B * T if reduction == "sum" else 1), penalty)


@pytest.mark.parametrize("name", MASKS)
def test_sequence_level_with_advantages_per_token(name) -> None:
    """GSPO-token: the value of the sequence's ratio, each token's gradient with its own advantage: s·A_t/|y|, 0 where clipped (verl 0.9)."""
    made, mask = batch(), mask_of(name)
    loss = grpo_loss(made.logprob, made.old, made.per_token, mask, clip=0.02, level="sequence")
    gradient = torch.autograd.grad(loss, made.logprob, retain_graph=True)[0]
    counts = torch.ones(B, T).double() if mask is None else mask.double()
    tokens = counts.sum(-1, keepdim=True).clamp(min=1)
    s = (((made.logprob - made.old).detach() * counts).sum(-1, keepdim=True) / tokens).exp()
    carried = s * (made.logprob - made.logprob.detach()).exp()  # s_t = sg[s]·π/sg[π]
    per_token = torch.maximum(-made.per_token * carried, -made.per_token * carried.clamp(0.98, 1.02))
    assert_loss(loss, (made.logprob,), (per_token * counts / tokens).sum() / B, (made.logprob,), 1e-15, "GSPO-token")
    free = torch.where(made.per_token > 0, s <= 1.02, s >= 0.98)
    assert bool((free & (counts > 0)).any()) and not bool((free | (counts == 0)).all())
    torch.testing.assert_close(gradient, torch.where(free, -s * made.per_token * counts / tokens / B, 0.0), rtol=1e-13, atol=1e-16)


def test_grpo_and_ppo_agree() -> None:
    """The same surrogate: bnpo is the mean over tokens."""
    made = batch(torch.float32)
    for name in MASKS:
        testing.assert_same_bits(grpo_loss(made.logprob, made.old, made.per_token, mask_of(name), reduction="bnpo"),
                               ppo_loss(made.logprob, made.old, made.per_token, mask_of(name)), name)


def test_beta() -> None:
    """A number, a tensor and a controller, read at every call; a number 0 leaves the KL out, and no KL is needed then."""
    made = batch(torch.float32)
    controller = SimpleNamespace(beta=0.3)
    expected = grpo_loss(made.logprob, made.old, made.per_token, ref_logprob=made.ref, beta=0.3)
    for beta in (torch.tensor(0.3), controller):
        testing.assert_same_bits(grpo_loss(made.logprob, made.old, made.per_token, ref_logprob=made.ref, beta=beta), expected, "beta")
    controller.beta = 0.0
    for more in ({}, {"ref_logprob": made.ref}, {"kl": torch.full((B, T), math.inf, requires_grad=True)}):
        testing.assert_same_bits(grpo_loss(made.logprob, made.old, made.per_token, beta=controller, **more),
                               grpo_loss(made.logprob, made.old, made.per_token), "beta 0")
    learned = torch.tensor(0.3, requires_grad=True)
    loss = grpo_loss(made.logprob, made.old, made.per_token, ref_logprob=made.ref, beta=learned)
    assert torch.autograd.grad(loss, learned, allow_unused=True) == (None,)


# ---- masks, empty batches, types


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("level", ["ppo", "token", "sequence"])
@pytest.mark.parametrize("penalty", ["sampled", "corrected", "exact"])
def test_nothing_leaks_from_masked_tokens(penalty, level, garbage) -> None:
    """Whatever stands where the mask is False, value and gradient have the bits they have for other numbers there, and the gradient is 0 there."""
    mask = mask_of("holes, one sequence empty")
    results = []
    for fill in (-1.0, garbage):
        made = batch(torch.float32)
        values = [value.detach().masked_fill(~mask, fill) for value in (made.logprob, made.old, made.per_token, made.ref, made.ref.abs())]
        logprob, old, advantages, ref, kl = values
        leaves = [logprob.requires_grad_(), kl.requires_grad_()]
        loss = ppo_loss(logprob, old, advantages, mask) if level == "ppo" else \
            grpo_loss(logprob, old, advantages, mask, level=level, **penalties(ref, kl)[penalty])
        results.append((loss, *[grad for grad in torch.autograd.grad(loss, leaves, allow_unused=True) if grad is not None]))
    for one, other in zip(*results, strict=True):
        testing.assert_same_bits(other, one, "result")
        assert one.dim() == 0 or bool(one.any()) and not bool(one[~mask].any())


def test_a_nan_that_counts_is_seen() -> None:
    """In any of the tensors: a loss that is a number would hide it."""
    for name in ("logprob", "old", "per_token", "ref"):
        for level in ("token", "sequence"):
            made = batch(torch.float32)
            getattr(made, name).data[2, 3] = math.nan
            assert grpo_loss(made.logprob, made.old, made.per_token, ref_logprob=made.ref, beta=0.1, level=level).isnan(), (name, level)


GRPO_REDUCTIONS = [{"reduction": "grpo"}, {"reduction": "bnpo"}, {"reduction": "dr_grpo", "max_length": 9}, {"reduction": "sum"}]


@pytest.mark.parametrize("shape", [(B, T), (0, T), (B, 0), (0, 0)], ids=str)
def test_nothing_counts(shape) -> None:
    """The loss is 0 and so is its gradient: not NaN."""
    logprob = torch.zeros(shape, requires_grad=True)
    calls = [lambda *a, r=r: ppo_loss(*a, reduction=r) for r in ("token_mean", "sequence_mean", "sum")]
    calls += [lambda *a, more=more, level=level: grpo_loss(*a, **more, level=level, ref_logprob=logprob.detach(), beta=0.1)
              for more in GRPO_REDUCTIONS for level in ("token", "sequence")]
    for call in calls:
        loss = call(logprob, torch.ones(shape), torch.ones(shape[:-1]), torch.zeros(shape, dtype=torch.bool))
        assert loss.item() == 0.0 and loss.requires_grad
        assert torch.equal(torch.autograd.grad(loss, logprob)[0], torch.zeros(shape))


def test_leading_shapes_and_splitting() -> None:
    """[2, 2, T] is [4, T]; a packed [N] has the same mean over its tokens; sums over parts of a batch add up to the whole."""
    made, mask = batch(), mask_of("padding")
    whole = grpo_loss(made.logprob, made.old, made.per_sequence, mask)
    folded = [value.view(2, 2, T) for value in (made.logprob, made.old)]
    torch.testing.assert_close(grpo_loss(*folded, made.per_sequence.view(2, 2), mask.view(2, 2, T)), whole, rtol=1e-14, atol=0.0)
    packed = [value[mask] for value in (made.logprob, made.old, made.per_token)]
    torch.testing.assert_close(ppo_loss(*packed), ppo_loss(made.logprob, made.old, made.per_token, mask), rtol=1e-14, atol=0.0)
    parts = sum(grpo_loss(made.logprob[i : i + 2], made.old[i : i + 2], made.per_token[i : i + 2], mask[i : i + 2], reduction="sum") for i in (0, 2))
    torch.testing.assert_close(parts / mask.sum(), grpo_loss(made.logprob, made.old, made.per_token, mask, reduction="bnpo"), rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types(dtype) -> None:
    """float32 whatever the input, its bits those for the same numbers in float32; log-probabilities may be of several types but for float64,
    advantages of any."""
    made = batch(dtype)
    loss = grpo_loss(made.logprob, made.old, made.per_token, ref_logprob=made.ref, beta=0.1)
    single = [value.detach().float() for value in (made.logprob, made.old, made.per_token)]
    assert loss.dtype == torch.float32 and torch.autograd.grad(loss, made.logprob)[0].dtype == dtype
    testing.assert_same_bits(loss, grpo_loss(*single, ref_logprob=made.ref.float(), beta=0.1), str(dtype))
    testing.assert_same_bits(loss, grpo_loss(single[0], made.old, single[2].double(), ref_logprob=made.ref, beta=0.1), str(dtype))
    sums = [value.sum(-1) for value in (made.logprob, made.old, made.ref, made.per_token)]
    loss, single = dpo_loss(*sums), dpo_loss(*(value.float() for value in sums))
    for name, one, other in zip(DPOLoss._fields, loss, single, strict=True):
        testing.assert_same_bits(one, other, name)


def test_what_has_no_gradient() -> None:
    """Advantages and reference log-probabilities that require grad get none."""
    made = batch()
    others = [value.clone().requires_grad_() for value in (made.per_token, made.ref)]
    loss = grpo_loss(made.logprob, made.old, others[0], ref_logprob=others[1], beta=0.1)
    assert torch.autograd.grad(loss, others, allow_unused=True) == (None, None)
    others = [value.sum(-1).requires_grad_() for value in (made.old, made.ref)]
    result = dpo_loss(made.logprob.sum(-1), made.per_sequence, *others)
    assert torch.autograd.grad(result.loss, others, allow_unused=True) == (None, None)
    assert [value.requires_grad for value in result] == [True, False, False, False]


# ---- where it runs


def everything(made: SimpleNamespace, kl: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Every loss in every form, one scalar each."""
    losses = [ppo_loss(made.logprob, made.old, made.per_sequence, mask, dual_clip=3.0, reduction=r) for r in ("token_mean", "sequence_mean", "sum")]
    for level, more in itertools.product(("token", "sequence"), GRPO_REDUCTIONS):
        losses += [grpo_loss(made.logprob, made.old, made.per_token, mask, level=level, **more, **it) for it in penalties(made.ref, kl).values()]
    sums = [value.sum(-1) for value in (made.logprob, made.old, made.ref, made.per_token)]
    count = mask.sum()
    normalized = [ppo_loss(made.logprob, made.old, made.per_sequence, mask, normalizer=count), dpo_loss(*sums, normalizer=count).loss,
                  grpo_loss(made.logprob, made.old, made.per_sequence, mask, normalizer=count)]
    return [*losses, *normalized, grpo_loss(made.logprob, None, made.per_sequence), dpo_loss(*sums).loss]


def moved(device: str) -> tuple[SimpleNamespace, torch.Tensor, torch.Tensor]:
    """The arguments of `everything` in float32 on a device."""
    made = SimpleNamespace(**{name: value.detach().to(device) for name, value in vars(batch(torch.float32)).items()})
    made.logprob.requires_grad_()
    return made, made.ref.abs().requires_grad_(), mask_of("padding").to(device)


def test_no_value_is_looked_at() -> None:
    """On meta tensors, which have no values, an .item(), a nonzero or a boolean index would raise; backward too."""
    arguments = moved("meta")
    for loss in everything(*arguments):
        assert loss.shape == () and loss.device.type == "meta"
        torch.autograd.grad(loss, arguments[0].logprob)


def test_compile() -> None:
    """All of them in one graph, with the same bits."""
    arguments = moved("cpu")
    compiled = torch.compile(everything, backend="eager", fullgraph=True)(*arguments)
    for i, (one, other) in enumerate(zip(compiled, everything(*arguments), strict=True)):
        testing.assert_same_bits(one, other, f"loss {i}")


@pytest.mark.gpu
def test_no_synchronisation() -> None:
    """On a GPU nothing waits for the device, and the values are those of the CPU."""
    arguments = moved("cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = everything(*arguments)
        grads = [torch.autograd.grad(loss, arguments[0].logprob)[0] for loss in losses]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_cpu = moved("cpu")
    exact = everything(*on_cpu)
    exact_grads = [torch.autograd.grad(loss, on_cpu[0].logprob)[0] for loss in exact]
    torch.testing.assert_close([loss.cpu() for loss in losses], exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close([grad.cpu() for grad in grads], exact_grads, rtol=1e-5, atol=1e-6)


def test_a_constant_kl_where_nothing_is_trained() -> None:
    """For evaluation, a kl without gradient is fine: under no_grad, or beside log-probabilities without one."""
    logprob = torch.zeros(2, 3, requires_grad=True)
    with torch.no_grad():
        assert float(grpo_loss(logprob, None, torch.zeros(2), kl=torch.ones(2, 3), beta=0.1)) == pytest.approx(0.1)
    assert float(grpo_loss(logprob.detach(), None, torch.zeros(2), kl=torch.ones(2, 3), beta=0.1)) == pytest.approx(0.1)
