"""shape_rewards: padded and packed, whatever masked tokens hold, against a loop over sequences in
float64.
"""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from fastkl import testing
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
BOUNDARIES = {
    "even": [0, 5, 10, 15],
    "uneven": [0, 1, 9, 15],
    "one": [0, 15],
    "empty ones": [0, 0, 4, 4, 4, 15, 15],
}


def numbers(sequences: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    # A sampled KL [3, 5] has both signs.
    generator = torch.Generator().manual_seed(0)
    return torch.randn(sequences, generator=generator), torch.randn(3, 5, generator=generator)


def mask_of(name: str) -> torch.Tensor:
    return torch.tensor(MASKS[name] or [[1] * 5] * 3, dtype=torch.bool)


def by_definition(
    scores: torch.Tensor, kl: torch.Tensor, beta: float, mask: torch.Tensor, bounds: list[int]
) -> torch.Tensor:
    rewards = torch.where(mask, -beta * kl.double(), 0.0)
    if len(scores) != len(bounds) - 1:
        return rewards + torch.where(mask, scores.double(), 0.0)
    for score, start, end in zip(scores, bounds[:-1], bounds[1:], strict=True):
        counted = [t for t in range(start, end) if mask[t]]
        if counted:
            rewards[counted[-1]] += float(score)
    return rewards


@pytest.mark.parametrize(
    "garbage, dtype",
    [(math.nan, dtype) for dtype in [torch.float32, torch.bfloat16, torch.float16, torch.float64]]
    + [(math.inf, torch.float32), (-math.inf, torch.float32)],
)
@pytest.mark.parametrize("per", ["sequence", "token"])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("bounds", BOUNDARIES.values(), ids=BOUNDARIES)
def test_rewards(bounds, name, per, garbage, dtype) -> None:
    # Packed, within three roundings of the result's type: of beta, of the product, of the
    # difference; padded, the same bits. Whatever KL and scores hold where nothing counts, it is 0
    # there. Rewards are data.
    scores, kl = (
        each.flatten().to(dtype) for each in numbers(len(bounds) - 1 if per == "sequence" else 15)
    )
    mask, ends = mask_of(name).flatten(), torch.tensor(bounds)
    exact = by_definition(scores, kl, 0.3, mask, bounds)
    wide = torch.promote_types(dtype, torch.float32)
    allowed = torch.finfo(wide).eps / 2 * 1.001 * (0.6 * kl.double().abs() + exact.abs())
    kl = kl.masked_fill(~mask, garbage).requires_grad_()
    used = [bool(mask[start:end].any()) for start, end in itertools.pairwise(bounds)]
    counted, given = mask if per == "token" else torch.tensor(used), mask if MASKS[name] else None
    scores = scores.masked_fill(~counted, garbage)
    rewards = shape_rewards(scores.requires_grad_(), kl, 0.3, given, cu_seqlens=ends)
    assert (rewards.dtype, rewards.shape, rewards.requires_grad) == (wide, (15,), False)
    assert bool(((rewards.double() - exact).abs() <= allowed).all()), (rewards, exact)
    assert not bool(rewards[~mask].any())
    testing.assert_same_bits(
        shape_rewards(scores, kl, 0.3, given, cu_seqlens=ends.int()), rewards, "int32"
    )
    if bounds == BOUNDARIES["even"]:
        shape, counts = (3, 5) if per == "token" else (3,), mask.view(3, 5)
        testing.assert_same_bits(
            shape_rewards(scores.view(shape), kl.view(3, 5), 0.3, counts).flatten(),
            rewards,
            "padded",
        )


def test_leading_shapes() -> None:
    # [T] with a scalar score, [2, 3, T] with [2, 3], and sequences of no token or no sequence
    # at all.
    scores, kl = numbers(6)
    whole = shape_rewards(scores.view(2, 3), kl.expand(2, 3, 5), 0.3)
    for i, score in enumerate(scores):
        testing.assert_same_bits(
            whole.view(6, 5)[i], shape_rewards(score, kl[i % 3], 0.3), f"sequence {i}"
        )
    # Scores [S] with S = total are one per sequence: an empty sequence keeps its own.
    for ends, rewards in (([0, 2, 2, 3], [0.0, 1.0, 4.0]), ([0, 1, 2, 3], [1.0, 2.0, 4.0])):
        given = torch.tensor([1.0, 2.0, 4.0]), torch.zeros(3), 0.1
        assert shape_rewards(*given, cu_seqlens=torch.tensor(ends)).tolist() == rewards
    for shape, bounds in (((6, 0), None), ((0, 4), None), ((0,), [0]), ((0,), [0, 0, 0])):
        count = shape[0] if bounds is None else len(bounds) - 1
        more = {} if bounds is None else {"cu_seqlens": torch.tensor(bounds)}
        assert shape_rewards(scores[:count], torch.zeros(shape), 0.3, **more).shape == shape


def test_beta() -> None:
    # A number 0 leaves even an infinite KL out, a tensor or a controller is read at the call; a bad
    # value stays in its token.
    scores, kl = numbers()
    controller, rewards = SimpleNamespace(beta=0.3), shape_rewards(scores, kl, 0.3)
    for beta in (torch.tensor(0.3, requires_grad=True), controller):
        testing.assert_same_bits(shape_rewards(scores, kl, beta), rewards, "beta")
    controller.beta, infinite = 0, torch.full_like(kl, math.inf)
    assert torch.equal(
        shape_rewards(scores, infinite, controller),
        torch.nn.functional.pad(scores[:, None], (4, 0)),
    )
    assert shape_rewards(scores, infinite, torch.tensor(0.0)).isnan().all()
    kl[0, 1], scores[2] = math.nan, math.inf
    rewards = shape_rewards(scores, kl, 0.3)
    assert rewards.isnan().nonzero().tolist() == [[0, 1]]
    assert rewards.isinf().nonzero().tolist() == [[2, 4]]
