"""KLMonitor: figures of a step against plain torch on the tokens that count, figures of the run."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from fastkl.rl.monitor import KLMonitor
from fastkl.rl.spikes import SpikeDetector

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_devices = pytest.mark.parametrize("device", DEVICES)
# Float64 sums of the same float32 values, which both compute, may differ in the order of adding up
# to 2^17 of them.
CLOSE = {"rel": 1e-10, "abs": 0.0}
QUANTILES = {"kl/p50": 0.5, "kl/p95": 0.95, "kl/p99": 0.99}


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """KLs as of a trained policy: most tokens near 0, some of several nats."""
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        .mul(3)
        .sub(5)
        .exp()
        .to(dtype)
    )


def mask_of(layout: str, rows: int = 6, length: int = 50) -> torch.Tensor:
    """All tokens, padding on the right and on the left, holes, or one token."""
    lengths, place = torch.arange(rows)[:, None] * length // rows, torch.arange(length)
    holes = torch.rand(rows, length, generator=torch.Generator().manual_seed(1)) < 0.6
    masks = {
        "all": holes | True,
        "right": place < lengths,
        "left": place >= lengths,
        "holes": holes,
    }
    return {**masks, "one": (place == 2) & (lengths == 0)}[layout]


def by_definition(x: torch.Tensor, threshold: float, sequences: int = 1) -> dict[str, float]:
    """The docstring's lines, for so many sequences with a token that counts."""
    figures = {"kl/mean": x.mean(), "kl/per_sequence": x.sum() / sequences, "kl/max": x.max()}
    figures |= {name: x.quantile(q) for name, q in QUANTILES.items()}
    figures |= {
        "kl/tokens": x.numel(),
        "kl/not_finite": (~x.isfinite()).sum(),
        "kl/above_threshold": (x > threshold).double().mean(),
    }
    return {name: float(value) for name, value in figures.items()}


# ---- a step


STEPS = [
    ((6, 50), layout, dtype)
    for layout in ("all", "right", "left", "holes", "one")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
]
STEPS += [(shape, None, torch.float32) for shape in ((1,), (7,), (2, 3, 4), (257, 512))]


@on_devices
@pytest.mark.parametrize("shape, layout, dtype", STEPS, ids=str)
def test_figures_of_a_step(shape, layout, dtype, device) -> None:
    """Figures of torch on kl[mask], as Python floats; inputs stay as they were and no graph is
    kept.
    """
    kl = tokens(*shape, dtype=dtype).requires_grad_()
    mask = None if layout is None else mask_of(layout)
    counts = torch.ones(shape, dtype=torch.bool) if mask is None else mask
    before = kl.detach().clone()
    got = KLMonitor(threshold=0.1).update(kl.to(device), None if mask is None else mask.to(device))
    expected = by_definition(before[counts].double(), 0.1, int(counts.any(-1).sum()))
    assert got == pytest.approx({"step": 0.0, **expected, "kl/spike": 0.0}, **CLOSE)
    assert {type(value) for value in got.values()} == {float} and got["kl/max"] == expected[
        "kl/max"
    ]
    assert torch.equal(kl, before) and kl.grad is None


@pytest.mark.parametrize("count", range(1, 12))
def test_quantiles_of_few_tokens(count) -> None:
    """They interpolate as torch.quantile does, down to one token, and through an infinite one where
    torch gives NaN.
    """
    kl = tokens(count, seed=count)
    got = KLMonitor().update(kl)
    kl[0] = math.inf
    through, ordered = KLMonitor().update(kl), kl.sort().values[:-1].double()
    for name, q in QUANTILES.items():
        assert got[name] == pytest.approx(
            float(tokens(count, seed=count).double().quantile(q)), **CLOSE
        )
        finite = math.ceil(q * (count - 1)) < count - 1
        exact = float(ordered.quantile(q * (count - 1) / (count - 2))) if finite else math.inf
        assert through[name] == pytest.approx(exact, **CLOSE)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_masked_tokens_change_nothing(garbage) -> None:
    """Figures of the step and of the run are the same to the bit, whatever the tokens hold that do
    not count.
    """
    kl, mask = tokens(6, 50), mask_of("holes")
    clean, dirty = KLMonitor(threshold=0.1), KLMonitor(threshold=0.1)
    for _ in range(3):
        filled = [kl.masked_fill(~mask, fill) for fill in (0.0, garbage)]
        assert clean.update(filled[0], mask, entropy=filled[0]) == dirty.update(
            filled[1], mask, entropy=filled[1]
        )
    assert (
        dirty.summary() == clean.summary()
        and dirty.profile() == clean.profile()
        and dirty.state_dict() == clean.state_dict()
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite_tokens_are_reported_and_forgotten(bad) -> None:
    """One shows in mean and maximum, rings, and is left out of the run's figures; NaN out of the
    quantiles and the share.
    """
    kl, monitor = tokens(4, 25), KLMonitor(threshold=0.1)
    kl[1, 3] = bad
    got, x = monitor.update(kl), kl.double().flatten().sort().values
    rest = kl[kl.isfinite()].double()
    assert str(got["kl/mean"]) == str(got["kl/max"]) == str(bad)
    assert got["kl/p50"] == pytest.approx(
        float(rest.quantile(0.5) if math.isnan(bad) else x[49:51].mean()), **CLOSE
    )
    run = monitor.summary()
    for figures, spikes in ((got, "kl/spike"), (run, "kl/spikes")):
        above = pytest.approx(float((x > 0.1).double().mean()), **CLOSE)
        names = ("kl/above_threshold", "kl/not_finite", "kl/tokens", spikes)
        assert [figures[name] for name in names] == [above, 1.0, 100.0, 1.0]
    assert run["kl/mean"] == pytest.approx(float(rest.mean()), **CLOSE) and run["kl/max"] == float(
        rest.max()
    )
    assert sum(monitor.profile()["tokens"]) == 99.0 and all(
        map(math.isfinite, monitor.profile()["kl"])
    )


@pytest.mark.parametrize(
    "shape, masked", [((2, 3), True), ((0,), False), ((2, 0), False), ((0, 3), False)], ids=str
)
def test_no_token_that_counts(shape, masked) -> None:
    """The figures are NaN, no alarm rings, and the run does not change but in its steps."""
    monitor, none = (
        KLMonitor(threshold=0.1),
        torch.zeros(shape, dtype=torch.bool) if masked else None,
    )
    empty = monitor.summary()
    got = monitor.update(torch.full(shape, math.nan), none, entropy=torch.zeros(shape))
    zero = {name for name, value in got.items() if value == 0}
    assert zero == {"step", "kl/tokens", "kl/not_finite", "kl/spike"}
    assert all(math.isnan(value) for name, value in got.items() if name not in zero)
    assert str(monitor.summary()) == str({**empty, "steps": 1.0}) and math.isnan(empty["kl/mean"])
    assert monitor.profile() == {"position": [], "kl": [], "tokens": []}
    monitor.update(tokens(2, 3))
    assert math.isfinite(monitor.summary()["kl/mean"]) and sum(monitor.profile()["tokens"]) == 6.0


@on_devices
def test_further_figures(device) -> None:
    """Tensors shaped as kl, of its device or the CPU, are averaged over the tokens that count,
    others over all their entries.
    """
    kl, mask, entropy, reward = (
        tokens(6, 50),
        mask_of("right"),
        tokens(6, 50, seed=1),
        tokens(6, seed=2),
    )
    more = {
        "entropy": entropy,
        "reward": reward,
        "beta": SimpleNamespace(beta=0.25),
        "rate": 1e-5,
        "absent": None,
    }
    more |= {
        "loss": torch.tensor(-1.5, device=device, requires_grad=True),
        "length": mask.sum(-1).to(device),
        "clipped": mask.to(device),
    }
    expected = {
        "entropy": float(entropy[mask].double().mean()),
        "reward": float(reward.double().mean()),
        "beta": 0.25,
    }
    expected |= {"rate": 1e-5, "loss": -1.5, "length": float(mask.sum() / 6), "clipped": 1.0}
    for given in (entropy.masked_fill(~mask, math.nan), entropy.to(device)):
        more["entropy"] = given
        figures = KLMonitor(spike=False).update(kl.to(device), mask.to(device), **more)
        got = dict(list(figures.items())[9:])
        assert list(got) == list(expected) and {type(value) for value in got.values()} == {float}
        assert got == pytest.approx(expected, **{**CLOSE, "rel": 1e-7})


@on_devices
def test_a_reward_of_each_packed_sequence(device) -> None:
    """With as many packed sequences as tokens a reward is one per sequence; other figures are per
    token all the same.
    """
    kl, mask = torch.ones(3, device=device), torch.tensor([True, False, True], device=device)
    reward = torch.tensor([1.0, 10.0, 1.0], device=device)
    for bounds, expected in (
        ([0, 1, 2, 3], 4.0),
        ([0, 2, 2, 3], 4.0),
        ([0, 2, 3], 1.0),
        (None, 1.0),
    ):
        bounds = None if bounds is None else torch.tensor(bounds, device=device)
        for given in (reward, reward.cpu()):
            got = KLMonitor(spike=False).update(
                kl, mask, cu_seqlens=bounds, reward=given, entropy=given, score=given
            )
            assert (got["reward"], got["entropy"], got["score"]) == (expected, 1.0, 1.0)


def test_which_figures_and_steps() -> None:
    """Threshold and detector add their own; the step is one more than the last, from 0, unless it
    is given.
    """
    names = ["kl/mean", "kl/per_sequence", "kl/max", *QUANTILES]
    monitor = KLMonitor(spike=False)
    assert list(monitor.update(tokens(3))) == ["step", *names, "kl/tokens", "kl/not_finite"]
    assert list(monitor.summary()) == ["steps", "kl/tokens", *names, "kl/not_finite"]
    assert list(KLMonitor(threshold=1.0).update(tokens(3)))[-2:] == [
        "kl/above_threshold",
        "kl/spike",
    ]
    steps = [monitor.update(tokens(3), step=step)["step"] for step in (None, 10, None, 5, None)]
    assert steps == [1.0, 10.0, 11.0, 5.0, 6.0]


def test_spikes_are_the_detectors() -> None:
    """The alarm is that of a SpikeDetector fed with the means; the summary counts how many steps
    rang.
    """
    values = [0.02 + 0.001 * (step % 3) for step in range(80)] + [0.2, 0.2, 0.02]
    for spike, alone in (
        (True, SpikeDetector()),
        (SpikeDetector(1.5, recent=5, limit=3.0), SpikeDetector(1.5, recent=5, limit=3.0)),
    ):
        monitor = KLMonitor(spike=spike)
        got = [monitor.update(torch.full((3,), value))["kl/spike"] for value in values]
        assert got == [float(alone.update(float(torch.tensor(value)))) for value in values]
        assert got[80] == 1.0 and monitor.summary()["kl/spikes"] == sum(got)


# ---- the run


def test_summary() -> None:
    """Figures of all tokens so far; the quantiles are right to 1 % of the token of their rank."""
    monitor, seen, sequences = KLMonitor(threshold=0.1), [], 0
    for step in range(7):
        kl, mask = tokens(step + 1, 40, seed=step), mask_of("left", step + 1, 40)
        monitor.update(kl, mask)
        seen.append(kl[mask].double())
        sequences += int(mask.any(-1).sum())
    x = torch.cat(seen)
    exact = {name: float(x.quantile(q, interpolation="lower")) for name, q in QUANTILES.items()}
    got, expected = (
        monitor.summary(),
        {**by_definition(x, 0.1, sequences), "steps": 7.0, "kl/spikes": 0.0},
    )
    for name, value in expected.items():  # the bin's 1 %, and the rounding of the logarithm
        assert got.pop(name) == pytest.approx(
            exact.get(name, value), rel=0.0101 if name in exact else 1e-10
        )
    assert not got


@pytest.mark.parametrize(
    "values, low, high",
    [
        *(
            ([value] * 99 + [999.0], value / 1.0101, value * 1.0101)
            for value in (1.01e-8, 3e-6, 1e-3, 0.1, 1.0, 31.0, 9.9e2)
        ),
        ([0.0, -0.5, 9e-9, 1e-30], 0.0, 0.0),
        ([1e10], 1e3, 1.05e3),
        ([0.3], 0.297, float(torch.tensor(0.3))),  # never more than the maximum
    ],
)
def test_run_quantiles(values, low, high) -> None:
    """Between 1e-8 and 1e3 nats right to 1 %, 0 below, about 1e3 above."""
    monitor = KLMonitor()
    monitor.update(torch.tensor(values))
    assert low <= monitor.summary()["kl/p50"] <= monitor.summary()["kl/p95"] <= high


def test_run_of_negative_estimates() -> None:
    """A maximum may be below 0, of the first step's tokens and of all."""
    monitor = KLMonitor(spike=False)
    for value, largest in ((-0.5, -0.5), (math.nan, -0.5), (-0.25, -0.25), (-1.0, -0.25)):
        monitor.update(torch.tensor([value]))
        assert monitor.summary()["kl/max"] == largest


def profile_of(values: list[torch.Tensor], positions: int) -> dict[str, list[float]]:
    """profile() by its definition, sequence by sequence."""
    longest, width = max(map(len, values)), 1
    while width * positions < longest:
        width *= 2
    starts = list(range(0, longest, width))
    parts = [
        torch.cat([value[start : start + width] for value in values]).double() for start in starts
    ]
    return {
        "position": starts,
        "kl": [float(part.mean()) for part in parts],
        "tokens": [float(len(part)) for part in parts],
    }


@pytest.mark.parametrize(
    "lengths", [(5, 8), (8, 9), (3, 40, 7), (100, 3), (16, 17, 33, 64, 65), (1, 1)], ids=str
)
def test_sequences(lengths) -> None:
    """Sums per sequence and means by position, padded on either side, with holes and packed;
    entries widen and never narrow.
    """
    monitors, seen = [KLMonitor(positions=8) for _ in range(4)], []
    for seed, longest in enumerate(lengths):
        sizes = [longest, 0, 1, longest // 3, longest // 2]
        values = [tokens(size, seed=10 * seed + index) for index, size in enumerate(sizes)]
        seen += values
        steps = []
        width = 2 * longest + 2
        columns = torch.arange(width)
        for order in (columns, columns.flip(0), columns[::2]):  # padding after, before, holes
            kl, mask = torch.full((5, width), math.nan), torch.zeros(5, width, dtype=torch.bool)
            for row, value in enumerate(values):
                where = order[: len(value)].sort().values
                kl[row, where], mask[row, where] = value, True
            steps.append(((kl[None], mask[None]), {}))
        steps.append(
            ((torch.cat(values),), {"cu_seqlens": torch.tensor([0, *sizes]).cumsum(0).int()})
        )
        for monitor, (arguments, more) in zip(monitors, steps, strict=True):
            of_step = monitor.update(*arguments, **more)["kl/per_sequence"]
            assert of_step == pytest.approx(
                float(torch.cat(values).double().sum()) / sum(size > 0 for size in sizes), rel=1e-6
            )
            got, expected = monitor.profile(), profile_of(seen, 8)
            assert (got["position"], got["tokens"]) == (expected["position"], expected["tokens"])
            assert got["kl"] == pytest.approx(expected["kl"], **CLOSE)
    of_run = float(torch.cat(seen).double().sum()) / sum(len(value) > 0 for value in seen)
    assert [monitor.summary()["kl/per_sequence"] for monitor in monitors] == pytest.approx(
        [of_run] * 4, rel=1e-6
    )


def test_profile_keeps_its_place_where_nothing_is_finite() -> None:
    monitor = KLMonitor()
    monitor.update(torch.tensor([[0.5, math.inf, 0.25, math.nan]]))
    expected = {"position": [0, 1, 2], "kl": [0.5, math.nan, 0.25], "tokens": [1.0, 0.0, 1.0]}
    assert str(monitor.profile()) == str(expected)
