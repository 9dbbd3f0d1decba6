"""PPO and GRPO losses over sequences packed one behind the other: those of the padded batch, and what wrong boundaries do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastkl import testing
from fastkl.rl.losses import grpo_loss, ppo_loss

# How many tokens each sequence has, empty ones first, in the middle and last; and the row that it is in a padded batch [S, 5].
LENGTHS = {"uneven": [3, 5, 1, 4], "empty ones": [0, 4, 0, 0, 5, 2, 0], "one": [5], "as many as tokens": [2, 0, 1]}
KLS = ("none", "sampled", "corrected", "exact")
FORMS = [(ppo_loss, {"reduction": reduction, "dual_clip": 2.0}) for reduction in ("token_mean", "sequence_mean", "sum")]
FORMS += [(grpo_loss, {"reduction": reduction, "level": level, **({"max_length": 6} if reduction == "dr_grpo" else {})})
          for reduction in ("grpo", "bnpo", "dr_grpo", "sum") for level in ("token", "sequence")]


def batch(name: str, dtype: torch.dtype = torch.float64, device: str = "cpu") -> SimpleNamespace:
    """A padded batch [S, 5], `real` where its tokens are, which of them count, and the boundaries once it is packed: value[real]."""
    lengths, generator = torch.tensor(LENGTHS[name]), torch.Generator().manual_seed(0)
    shape = (len(lengths), 5)
    old, step, away, advantages = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))
    real = torch.arange(5) < lengths[:, None]
    made = SimpleNamespace(logprob=old - 3 + 0.3 * step, old=old - 3, ref=old - 3 + 0.5 * away, kl=away.abs(), per_token=advantages,
                           per_sequence=advantages[:, 0].clone(), real=real.to(device))
    made.mask = (torch.rand(shape, generator=generator) < 0.7).to(device) & made.real
    made.bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(device)
    made.logprob.requires_grad_(), made.kl.requires_grad_()
    return made


def loss_of(call, more: dict, made: SimpleNamespace, mask: torch.Tensor | None, per: str, kl: str, packed: bool) -> torch.Tensor:
    """One form of one loss, of the padded batch or of the same one packed."""
    pick = (lambda value: value[made.real]) if packed else (lambda value: value)
    if call is grpo_loss and kl != "none":
        more = {**more, "beta": 0.3, **({"kl": pick(made.kl)} if kl == "exact" else {"ref_logprob": pick(made.ref), "correct_kl": kl == "corrected"})}
    advantages = made.per_sequence if per == "sequence" else pick(made.per_token)
    return call(pick(made.logprob), pick(made.old), advantages, None if mask is None else pick(mask), **more,
                **({"cu_seqlens": made.bounds} if packed else {}))


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("call, more", FORMS, ids=str)
def test_packed_is_padded(call, more, kl, name) -> None:
    """Value and gradient in fp64 of the padded batch whose padding does not count, with a mask of holes and without."""
    made = batch(name)
    for holes in (False, True):
        for per in ("sequence", "token"):
            if per == "token" and name == "as many as tokens":
                continue  # read as one per sequence: next test
            padded = loss_of(call, more, made, made.mask if holes else made.real, per, kl, False)
            packed = loss_of(call, more, made, made.mask if holes else None, per, kl, True)
            torch.testing.assert_close(packed, padded, rtol=1e-13, atol=1e-15)
            leaves = [made.logprob, made.kl] if kl == "exact" and call is grpo_loss else [made.logprob]
            for one, other in zip(torch.autograd.grad(packed, leaves), torch.autograd.grad(padded, leaves), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-15)


def test_as_many_sequences_as_tokens() -> None:
    """Advantages [S] with S = total are one per sequence, as the scores of shape_rewards are."""
    logprob = torch.zeros(3, requires_grad=True)
    loss = ppo_loss(logprob, None, torch.tensor([1.0, 2.0, 4.0]), cu_seqlens=torch.tensor([0, 2, 2, 3]), reduction="sum")
    assert torch.autograd.grad(loss, logprob)[0].tolist() == [-1.0, -1.0, -4.0]


def test_without_boundaries() -> None:
    """What asks for no token's sequence needs none: the same bits as with them."""
    made = batch("uneven", torch.float32)
    for call, more in FORMS:
        if more["reduction"] in ("token_mean", "bnpo", "sum") and more.get("level") != "sequence":
            tokens = [value[made.real] for value in (made.logprob, made.old, made.per_token)]
            testing.assert_same_bits(call(*tokens, **more), call(*tokens, **more, cu_seqlens=made.bounds), str(more))


@pytest.mark.parametrize("bounds", [[0], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("call, more", FORMS, ids=str)
def test_no_token(call, more, bounds) -> None:
    """The loss is 0 and so is its gradient: not NaN."""
    logprob = torch.zeros(0, requires_grad=True)
    loss = call(logprob, logprob.detach(), torch.zeros(len(bounds) - 1), **more, cu_seqlens=torch.tensor(bounds))
    assert loss.item() == 0.0 and torch.autograd.grad(loss, logprob)[0].shape == (0,)


# ---- where it runs


@pytest.mark.parametrize("bounds", [[0, 5, 10], [0, 5, 16], [1, 5, 15], [0, 10, 5, 15], [0, 20, 15], [-3, 5, 15], [15]], ids=str)
def test_wrong_boundaries(bounds) -> None:
    """An error on the CPU; where nobody looks, as under torch.compile and on a GPU, a NaN, without a gradient and without a wrong address."""
    torch._dynamo.reset()
    logprob, cu_seqlens = torch.zeros(15, requires_grad=True), torch.tensor(bounds)
    for call, more in (FORMS[1], FORMS[4]):
        def run(logprob, advantages, cu_seqlens, call=call, more=more):
            return call(logprob, None, advantages, **more, cu_seqlens=cu_seqlens)

        for advantages in (torch.ones(len(bounds) - 1), torch.ones(15)):
            with pytest.raises(ValueError, match="^cu_seqlens: expected boundaries that rise from 0 to 15"):
                run(logprob, advantages, cu_seqlens)
            loss = torch.compile(run, backend="eager", fullgraph=True)(logprob, advantages, cu_seqlens)
            assert loss.isnan() and not bool(torch.autograd.grad(loss, logprob)[0].any())


def test_no_value_is_looked_at() -> None:
    """On meta tensors, which have no values, an .item(), a nonzero or a boolean index would raise; backward too."""
    logprob, bounds = torch.zeros(15, device="meta", requires_grad=True), torch.empty(4, device="meta", dtype=torch.int32)
    for call, more in FORMS:
        for advantages in (torch.empty(3, device="meta"), torch.empty(15, device="meta")):
            loss = call(logprob, None, advantages, torch.empty(15, device="meta", dtype=torch.bool), **more, cu_seqlens=bounds)
            assert loss.shape == () and torch.autograd.grad(loss, logprob)[0].shape == (15,)


@pytest.mark.parametrize("call, more", [FORMS[1], FORMS[6]], ids=str)
def test_compile(call, more) -> None:
    """No graph break, the same bits, for packs of several sizes."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: call(*a[:4], **more, cu_seqlens=a[4]), backend="eager", fullgraph=True)
    for name in ("uneven", "empty ones"):
        made = batch(name, torch.float32)
        arguments = *(value.detach()[made.real] for value in (made.logprob, made.old)), made.per_sequence, made.mask[made.real], made.bounds
        testing.assert_same_bits(compiled(*arguments), call(*arguments[:4], **more, cu_seqlens=made.bounds), name)


@pytest.mark.gpu
def test_no_synchronisation() -> None:
    """On a GPU nothing waits for the device, and values and gradients are those of the CPU."""
    results = {}
    for device in ("cpu", "cuda"):
        made = batch("empty ones", torch.float32, device)
        arguments = [made.logprob.detach()[made.real].requires_grad_(), made.old[made.real], made.per_sequence, made.mask[made.real]]
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            losses = [call(*arguments, **more, cu_seqlens=made.bounds) for call, more in FORMS]
            grads = [torch.autograd.grad(loss, arguments[0])[0] for loss in losses]
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        results[device] = [value.cpu() for value in (*losses, *grads)]
    torch.testing.assert_close(results["cuda"], results["cpu"], rtol=1e-5, atol=1e-6)
