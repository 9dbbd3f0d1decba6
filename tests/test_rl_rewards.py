"""shape_rewards: padded and packed, whatever masked tokens hold, against a loop over sequences in fp64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from fastkl import testing
from fastkl.estimators import estimate_kl
from fastkl.rl.rewards import shape_rewards

MASKS = {
    "padding after": [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]],
    "padding before": [[0, 1, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]],
    "holes": [[1, 0, 0, 1, 0], [0, 1, 0, 1, 1], [1, 1, 1, 0, 0]],
    "one token": [[1, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 1, 0, 0]],
    "sequences without a token": [[0, 0, 0, 0, 0], [1, 1, 0, 1, 0], [0, 0, 0, 0, 0]],
    "none": None,
}
# Boundaries of 15 tokens: empty sequences first, in the middle, last.
BOUNDARIES = {"even": [0, 5, 10, 15], "uneven": [0, 1, 9, 15], "one": [0, 15], "empty ones": [0, 0, 4, 4, 4, 15, 15]}


def numbers(sequences: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [sequences] and a KL [3, 5] of both signs, as a sampled one has."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(sequences, generator=generator), torch.randn(3, 5, generator=generator)


def mask_of(name: str) -> torch.Tensor | None:
    """A mask [3, 5], or None."""
    return None if MASKS[name] is None else torch.tensor(MASKS[name], dtype=torch.bool)


def plain(scores: torch.Tensor, kl: torch.Tensor, beta: float, mask: torch.Tensor | None, bounds: list[int]) -> torch.Tensor:
    """The definition over packed tokens, one sequence and one token after the other, in fp64."""
    rewards = torch.zeros(len(kl), dtype=torch.float64)
    for s, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        counted = [t for t in range(start, end) if mask is None or bool(mask[t])]
        for t in counted:
            rewards[t] = -beta * float(kl[t]) + (float(scores[t]) if len(scores) == len(kl) != len(bounds) - 1 else 0.0)
        if counted and len(scores) == len(bounds) - 1:
            rewards[counted[-1]] += float(scores[s])
    return rewards


def assert_rewards(rewards: torch.Tensor, exact: torch.Tensor, kl: torch.Tensor, beta: float) -> None:
    """Three roundings of 2^-24: of beta to float32, of the product, of the difference."""
    allowed = 2.0**-24 * 1.001 * (2 * beta * kl.double().abs() + exact.abs())
    assert rewards.dtype == torch.float32 and not rewards.requires_grad and rewards.shape == exact.shape
    assert bool(((rewards.double() - exact).abs() <= allowed).all()), (rewards, exact)


@pytest.mark.parametrize("per", ["sequence", "token"])
@pytest.mark.parametrize("name", MASKS)
def test_padded(name, per) -> None:
    """[B, T] with padding on either side, holes and empty sequences."""
    scores, kl = numbers(3 if per == "sequence" else 15)
    mask = mask_of(name)
    rewards = shape_rewards(scores if per == "sequence" else scores.view(3, 5), kl, 0.3, mask)
    exact = plain(scores, kl.flatten(), 0.3, None if mask is None else mask.flatten(), [0, 5, 10, 15])
    assert_rewards(rewards, exact.view(3, 5), kl, 0.3)


@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
@pytest.mark.parametrize("per", ["sequence", "token"])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("bounds", BOUNDARIES.values(), ids=BOUNDARIES)
def test_packed(bounds, name, per, integers) -> None:
    """[total] with boundaries, empty sequences among them."""
    scores, kl = numbers(len(bounds) - 1 if per == "sequence" else 15)
    kl, mask = kl.flatten(), mask_of(name)
    mask = None if mask is None else mask.flatten()
    rewards = shape_rewards(scores, kl, 0.3, mask, cu_seqlens=torch.tensor(bounds, dtype=integers))
    assert_rewards(rewards, plain(scores, kl, 0.3, mask, bounds), kl, 0.3)


@pytest.mark.parametrize("name", MASKS)
def test_packed_is_padded(name) -> None:
    """The same sequences either way give the same bits."""
    scores, kl = numbers()
    mask = mask_of(name)
    packed = shape_rewards(scores, kl.flatten(), 0.7, None if mask is None else mask.flatten(), cu_seqlens=torch.tensor([0, 5, 10, 15]))
    testing.assert_same_bits(packed.view(3, 5), shape_rewards(scores, kl, 0.7, mask), name)


def test_as_many_sequences_as_tokens() -> None:
    """Scores [S] with S = total are one per sequence: an empty sequence keeps its own."""
    rewards = shape_rewards(torch.tensor([1.0, 2.0, 4.0]), torch.zeros(3), 0.1, cu_seqlens=torch.tensor([0, 2, 2, 3]))
    assert rewards.tolist() == [0.0, 1.0, 4.0]
    rewards = shape_rewards(torch.tensor([1.0, 2.0, 4.0]), torch.zeros(3), 0.1, cu_seqlens=torch.tensor([0, 1, 2, 3]))
    assert rewards.tolist() == [1.0, 2.0, 4.0]


def test_leading_shapes() -> None:
    """[T] with a scalar score, [2, 3, T] with [2, 3], and sequences of no token or no sequence at all."""
    scores, kl = numbers(6)
    whole = shape_rewards(scores.view(2, 3), kl.expand(2, 3, 5), 0.3)
    for i, score in enumerate(scores):
        testing.assert_same_bits(whole.view(6, 5)[i], shape_rewards(score, kl[i % 3], 0.3), f"sequence {i}")
    assert shape_rewards(scores, torch.zeros(6, 0), 0.3).shape == (6, 0)
    assert shape_rewards(scores[:0], torch.zeros(0, 4), 0.3).shape == (0, 4)
    assert shape_rewards(scores[:0], torch.zeros(0), 0.3, cu_seqlens=torch.tensor([0])).shape == (0,)
    assert shape_rewards(scores[:2], torch.zeros(0), 0.3, cu_seqlens=torch.tensor([0, 0, 0])).shape == (0,)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["padding after", "padding before", "holes", "sequences without a token"])
def test_nothing_leaks_from_masked_tokens(name, garbage, packed) -> None:
    """Whatever KL and scores hold where nothing counts, the bits are those for zeros there."""
    mask = mask_of(name)
    empty = ~mask.any(-1)
    arrange = (lambda value: value.flatten()) if packed else (lambda value: value)
    more = {"cu_seqlens": torch.tensor([0, 5, 10, 15])} if packed else {}
    for per_token in (False, True):
        scores, kl = numbers(15 if per_token else 3)
        scores = scores.view(3, 5) if per_token else scores
        clean, dirty = ((kl.masked_fill(~mask, fill), scores.masked_fill(~mask if per_token else empty, fill)) for fill in (0.0, garbage))
        results = [shape_rewards(arrange(score), arrange(value), 0.3, arrange(mask), **more) for value, score in (clean, dirty)]
        testing.assert_same_bits(results[1], results[0], name)
        assert torch.equal(results[1][~arrange(mask)], torch.zeros(int((~mask).sum())))


def test_a_bad_value_stays_in_its_token() -> None:
    """A KL or score that is not finite and counts is reported where it is, and in no other token."""
    scores, kl = numbers()
    kl[0, 1], scores[2] = math.nan, math.inf
    rewards = shape_rewards(scores, kl, 0.3, mask_of("holes") | (kl.isnan()))
    assert rewards.isnan().nonzero().tolist() == [[0, 1]] and rewards.isinf().nonzero().tolist() == [[2, 2]]


def test_rewards_are_data() -> None:
    """Detached from a KL and scores that require grad; the arguments are left as they were."""
    scores, kl = (value.requires_grad_() for value in numbers())
    before = kl.detach().clone()
    assert not shape_rewards(scores, kl, torch.tensor(0.3, requires_grad=True)).requires_grad
    assert torch.equal(kl, before) and kl.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_types(dtype) -> None:
    """The arithmetic is that of float32 on the values given, of float64 for a float64 KL."""
    scores, kl = (value.to(dtype) for value in numbers())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    testing.assert_same_bits(shape_rewards(scores, kl, 0.3), shape_rewards(scores.to(wide), kl.to(wide), 0.3), str(dtype))
    assert shape_rewards(scores.double(), kl, 0.3).dtype == wide


def test_beta() -> None:
    """A number, a tensor and a controller give the same bits; a controller is read at every call; 0 leaves even an infinite KL out."""
    scores, kl = numbers()
    controller = SimpleNamespace(beta=0.3)
    expected = shape_rewards(scores, kl, 0.3)
    for beta in (torch.tensor(0.3), controller, SimpleNamespace(beta=torch.tensor(0.3))):
        testing.assert_same_bits(shape_rewards(scores, kl, beta), expected, "beta")
    controller.beta = 2
    testing.assert_same_bits(shape_rewards(scores, kl, controller), shape_rewards(scores, kl, 2.0), "beta of the next call")
    assert torch.equal(shape_rewards(scores, kl.fill_(math.inf), 0), torch.nn.functional.pad(scores[:, None], (4, 0)))
    assert shape_rewards(scores, kl, torch.tensor(0.0)).isnan().all(), "a tensor is not looked at"


def test_the_policy_gradient_on_the_rewards() -> None:
    """Over all sequences of two tokens: the expected return is E[score] - beta·KL of the sequences for k1 and for the exact KL. The policy gradient
    on it is the objective's for k1; for the exact KL once that is in the loss too; not for the exact KL alone, nor for k2 and k3."""
    generator = torch.Generator().manual_seed(1)
    logits = [torch.randn(*shape, generator=generator).double().requires_grad_() for shape in ((4,), (4, 4))]
    first, second = (value.log_softmax(-1) for value in logits)
    ref_first, ref_second = (torch.randn(*shape, generator=generator).double().log_softmax(-1) for shape in ((4,), (4, 4)))
    a, b = torch.arange(4).repeat_interleave(4), torch.arange(4).repeat(4)
    logprob, ref_logprob = (torch.stack([one[a], two[a, b]], -1) for one, two in ((first, second), (ref_first, ref_second)))
    probability, scores = logprob.sum(-1).exp(), torch.randn(16, generator=generator).double()
    objective = (probability * (scores - 0.3 * (logprob - ref_logprob).sum(-1))).sum()
    wanted = torch.cat([grad.flatten() for grad in torch.autograd.grad(objective, logits, retain_graph=True)])
    exact = torch.stack([(first.exp() * (first - ref_first)).sum().expand(16), (second.exp() * (second - ref_second)).sum(-1)[a]], -1)

    def check(kl: torch.Tensor, in_loss: torch.Tensor, value: bool, gradient: bool) -> None:
        rewards = shape_rewards(scores, kl, 0.3)
        returns = rewards.flip(-1).cumsum(-1).flip(-1)  # of the token and what follows it
        assert ((probability * rewards.sum(-1)).sum().item() == pytest.approx(objective.item(), rel=1e-13)) == value
        surrogate = (probability.detach() * (returns * logprob - 0.3 * in_loss).sum(-1)).sum()
        grad = torch.cat([grad.flatten() for grad in torch.autograd.grad(surrogate, logits, retain_graph=True)])
        error = ((grad - wanted).norm() / wanted.norm()).item()
        assert error < 1e-13 if gradient else error > 0.05, error

    none = torch.zeros(16, 2)
    check(estimate_kl(logprob, ref_logprob, estimator="k1"), none, True, True)
    check(exact, exact, True, True)
    check(exact, none, True, False)
    check(estimate_kl(logprob, ref_logprob, estimator="k2"), none, False, False)
    check(estimate_kl(logprob, ref_logprob, estimator="k3"), none, True, False)


# ---- where it runs


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_no_value_is_looked_at(packed) -> None:
    """On meta tensors, which have no values, an .item(), a nonzero or a boolean index would raise."""
    kl, mask = torch.empty(3, 5, device="meta"), torch.empty(3, 5, device="meta", dtype=torch.bool)
    more = {"cu_seqlens": torch.empty(4, device="meta", dtype=torch.int32)} if packed else {}
    arrange = (lambda value: value.flatten()) if packed else (lambda value: value)
    for scores in (torch.empty(3, device="meta"), arrange(kl)):
        for beta in (0.1, torch.empty((), device="meta")):
            assert shape_rewards(scores, arrange(kl), beta, arrange(mask), **more).shape == arrange(kl).shape


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_compile(packed) -> None:
    """No graph break, the same bits."""
    scores, kl = numbers()
    mask = mask_of("holes")
    arguments = (scores, kl.flatten(), 0.3, mask.flatten()) if packed else (scores, kl, 0.3, mask)
    more = {"cu_seqlens": torch.tensor([0, 5, 10, 15])} if packed else {}
    compiled = torch.compile(shape_rewards, backend="eager", fullgraph=True)
    testing.assert_same_bits(compiled(*arguments, **more), shape_rewards(*arguments, **more), "compiled")


@pytest.mark.parametrize("bounds", [[0, 5, 10], [0, 5, 10, 16], [1, 5, 10, 15], [0, 10, 5, 15], [0, 20, 15], [15]], ids=str)
def test_wrong_boundaries(bounds) -> None:
    """An error on the CPU; where nobody looks, as under torch.compile and on a GPU, NaN for each token that counts and still 0 for the others."""
    for scores in (torch.zeros(len(bounds) - 1), torch.zeros(15)):
        arguments = (scores, torch.zeros(15), 0.3, mask_of("holes").flatten())
        with pytest.raises(ValueError, match="^cu_seqlens: expected boundaries that rise from 0 to 15, .*got .*; count"):
            shape_rewards(*arguments, cu_seqlens=torch.tensor(bounds))
        torch._dynamo.reset()
        rewards = torch.compile(shape_rewards, backend="eager", fullgraph=True)(*arguments, cu_seqlens=torch.tensor(bounds))
        assert torch.equal(rewards.isnan(), arguments[3]) and torch.equal(rewards.nan_to_num(0.0), torch.zeros(15))


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_no_synchronisation(packed) -> None:
    """On a GPU nothing waits for the device, and the values are those of the CPU."""
    scores, kl = numbers()
    mask, bounds = mask_of("holes"), torch.tensor([0, 5, 10, 15])
    arguments = (scores, kl.flatten(), mask.flatten(), bounds) if packed else (scores, kl, mask)
    run = (lambda s, k, m, b: shape_rewards(s, k, 0.3, m, cu_seqlens=b)) if packed else (lambda s, k, m: shape_rewards(s, k, 0.3, m))
    on_gpu = [value.cuda() for value in arguments]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rewards = run(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(rewards.cpu(), run(*arguments), rtol=1e-6, atol=1e-7)
