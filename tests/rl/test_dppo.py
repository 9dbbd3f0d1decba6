"""divergence_mask against verl's masks in float64, padded and packed, and at its limits."""

import math

import pytest
import torch
from test_losses import B, T, batch, mask_of, packed

from fastkl import testing
from fastkl.rl import divergence_mask, grpo_loss


def verl_mask(logprob, old, advantages, kind, low, high):
    """verl 0.10.0.dev's valid_mask of dppo_tv and dppo_kl, without the 1e-8 in the latter."""
    p, q = old.exp(), logprob.exp()
    if kind == "tv":
        return torch.where(advantages > 0, q - p <= high, q - p >= -low)
    kl = p * (old - logprob) + (1 - p) * ((1 - p) / (1 - q)).log()
    return torch.where(advantages > 0, (kl <= high) | (q <= p), (kl <= low) | (q >= p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "kind, low, high", [("tv", 0.01, 0.005), ("tv", 0.005, 0.005), ("kl", 1e-3, 3e-3)]
)
def test_published_masks(kind, low, high, dtype) -> None:
    # Both signs of A on both sides of both limits; A per token and per sequence, padded and packed.
    made, wide = batch(dtype), batch()
    everything, ends = packed(made, torch.ones(B, T, dtype=torch.bool))
    more = {"kind": kind, "limit": low if low == high else (low, high)}
    for per, spread in (
        ("per_token", wide.per_token),
        ("per_sequence", wide.per_sequence[:, None]),
    ):
        exact = verl_mask(wide.logprob, wide.old, spread, kind, low, high)
        rising = wide.logprob > wide.old
        assert all({*exact[where].tolist()} == {True, False} for where in (rising, ~rising))
        for values, where in ((made, {}), (everything, {"cu_seqlens": ends})):
            keep = divergence_mask(
                values.logprob, values.old, getattr(values, per), **more, **where
            )
            assert keep.dtype == torch.bool and torch.equal(keep.view(B, T), exact)


def test_the_loss_of_verl() -> None:
    # dppo_tv as the documentation writes it: a dropped token keeps its place in the mean.
    made, mask = batch(), mask_of("padding")
    made.old[0, :2] -= 5  # ratios above 20, of improbable tokens
    keep = divergence_mask(made.logprob, made.old, made.per_token, limit=0.01)
    given = made.logprob, made.old, made.per_token * keep, mask
    loss = grpo_loss(*given, surrogate="cispo", clip=(1, 19), reduction="bnpo")
    valid = verl_mask(made.logprob, made.old, made.per_token, "tv", 0.01, 0.01)
    ratio = (made.logprob - made.old).exp().clamp(max=20).detach()
    losses = -made.per_token * ratio * made.logprob * valid * mask
    testing.assert_near(loss, losses.sum() / mask.sum(), 0.0, 1e-13, "loss")
    assert not bool(valid.all()) and float(ratio.max()) == 20


# old, now, kept for A = 1, 0 and -1, at 0.15 of either kind.
@pytest.mark.parametrize(
    "old, now, kept",
    [
        (-1.0, -1.0, (True, True, True)),
        (math.log(0.5), math.log(0.6499), (True, True, True)),
        (math.log(0.3), math.log(0.7), (False, True, True)),
        (math.log(0.7), math.log(0.3), (True, False, False)),
        (-math.inf, -math.inf, (True, True, True)),
        (-math.inf, -0.1, (False, True, True)),
        (-0.3, -math.inf, (True, False, False)),
        (-0.3, 0.0, (False, True, True)),
        (0.0, 0.0, (True, True, True)),
        (0.0, -0.3, (True, False, False)),
        (math.nan, -0.3, (True, True, True)),
        (-0.3, math.nan, (True, True, True)),
    ],
)
@pytest.mark.parametrize("kind", ["tv", "kl"])
def test_at_the_edges(kind, old, now, kept) -> None:
    # An update that leads back counts; so does a token with a NaN. The mask has no gradient.
    logprob = torch.full((3,), now, requires_grad=True)
    given = logprob, torch.full((3,), old), torch.tensor([1.0, 0.0, -1.0])
    keep = divergence_mask(*given, kind=kind)
    assert tuple(keep.tolist()) == kept and not keep.requires_grad
    assert bool(divergence_mask(*given, kind=kind, limit=math.inf).all())
    assert bool(divergence_mask(given[0], None, given[2], kind=kind, limit=0).all())
    assert bool(divergence_mask(*given[:2], torch.full((3,), math.nan), kind=kind, limit=0).all())
