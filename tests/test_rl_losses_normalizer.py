"""The divisor of the losses' means: uneven micro-batches add up to the whole batch."""

from __future__ import annotations

import pytest
import torch

from fastkl import testing
from fastkl.rl import dpo_loss, grpo_loss, ppo_loss

B, T = 5, 6
PARTS = (slice(0, 2), slice(2, 5))  # of 9 and 11 tokens
LENGTHS = torch.tensor([6, 3, 6, 1, 4])
MASK = torch.arange(T) < LENGTHS[:, None]
TOKENS, SEQUENCES = int(MASK.sum()), B


def leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    """Log-probabilities, fp64, with gradient."""
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()
    return (made - 3).requires_grad_()


OLD, REF, ADVANTAGES = (leaf(B, T, seed=seed).detach() for seed in (1, 2, 3))


def ppo(logprob: torch.Tensor, rows: slice, **more) -> torch.Tensor:
    """Of some sequences of the batch."""
    return ppo_loss(logprob[rows], OLD[rows], ADVANTAGES[rows], MASK[rows], **more)


def grpo(logprob: torch.Tensor, rows: slice, **more) -> torch.Tensor:
    """Of some sequences of the batch, with a KL."""
    return grpo_loss(
        logprob[rows],
        OLD[rows],
        ADVANTAGES[rows, 0],
        MASK[rows],
        beta=0.3,
        ref_logprob=REF[rows],
        correct_kl=True,
        **more,
    )


def packed(logprob: torch.Tensor, rows: slice, **more) -> torch.Tensor:
    """grpo of sequences packed one behind the other."""
    mask, lengths = MASK[rows], LENGTHS[rows]
    flat = (value[rows][mask] for value in (logprob, OLD, REF))
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    logprob, old, ref = flat
    return grpo_loss(
        logprob,
        old,
        ADVANTAGES[rows, 0],
        beta=0.3,
        ref_logprob=ref,
        correct_kl=True,
        cu_seqlens=bounds,
        **more,
    )


def dpo(logprob: torch.Tensor, rows: slice, **more) -> torch.Tensor:
    """Of some pairs."""
    sums = (value[rows].sum(-1) for value in (logprob, OLD, REF, ADVANTAGES))
    return dpo_loss(*sums, **more).loss


# The loss, its settings, and how many of its unit there are in the batch.
MEANS = [
    (ppo, {"reduction": "token_mean"}, TOKENS),
    (ppo, {"reduction": "mean"}, TOKENS),
    (ppo, {"reduction": "sequence_mean"}, SEQUENCES),
    *(
        (loss, {"reduction": reduction, "level": level, **more}, count)
        for loss in (grpo, packed)
        for level in ("token", "sequence")
        for reduction, more, count in (
            ("bnpo", {}, TOKENS),
            ("grpo", {}, SEQUENCES),
            ("dr_grpo", {"max_length": 8}, SEQUENCES),
        )
    ),
    (dpo, {"label_smoothing": 0.1}, SEQUENCES),
]


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize(
    "loss, settings, count", MEANS, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_micro_batches_add_up_to_the_whole(loss, settings, count, as_tensor) -> None:
    """Two uneven parts with the whole batch's count have its value and gradient.

    Their own means do not.
    """
    logprob = leaf(B, T)
    whole = loss(logprob, slice(0, B), **settings)
    expected = torch.autograd.grad(whole, logprob, retain_graph=True)[0]
    normalizer = torch.tensor(count) if as_tensor else count
    parts = [loss(logprob, rows, **settings, normalizer=normalizer) for rows in PARTS]
    testing.assert_near(sum(parts), whole, 0.0, 1e-14, "loss")
    testing.assert_near(torch.autograd.grad(sum(parts), logprob)[0], expected, 0.0, 1e-15, "gradient")
    alone = sum(loss(logprob, rows, **settings) for rows in PARTS) / len(PARTS)
    assert (
        float((torch.autograd.grad(alone, logprob)[0] - expected).norm() / expected.norm()) > 0.05
    )


@pytest.mark.parametrize(
    "loss, settings, count", MEANS, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_a_tensor_of_zero_gives_zero(loss, settings, count) -> None:
    """Of whatever type: no token in any micro-batch is no loss and no gradient, not a division by 0."""
    for zero in (torch.tensor(0), torch.zeros(1), torch.zeros((), dtype=torch.float64)):
        logprob = leaf(B, T)
        made = loss(logprob, slice(0, B), **settings, normalizer=zero)
        assert made.shape == () and made.item() == 0.0
        assert not bool(torch.autograd.grad(made, logprob)[0].any())


def test_the_names_of_the_mean() -> None:
    """ "mean" is "token_mean"."""
    logprob = leaf(B, T)
    testing.assert_same_bits(
        ppo(logprob, slice(0, B), reduction="mean"), ppo(logprob, slice(0, B)), "mean"
    )
