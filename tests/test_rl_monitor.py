"""KLMonitor: figures of a step against plain torch on the tokens that count, figures of the run."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import pytest
import torch

from fastkl.rl.monitor import KLMonitor
from fastkl.rl.rewards import shape_rewards

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# What both compute, float64 sums of the same float32 values, may differ in the order of adding up to 2^17 of them.
CLOSE = {"rel": 1e-10, "abs": 0.0}


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """KLs as of a trained policy: most tokens near 0, some of several nats."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(3).sub(5).exp().to(dtype)


def masks(rows: int, length: int) -> dict[str, torch.Tensor | None]:
    """Every layout: all tokens, padding on the right and on the left, holes, rows and batches of nothing."""
    lengths = torch.arange(rows)[:, None] * length // rows
    place = torch.arange(length)
    holes = torch.rand(rows, length, generator=torch.Generator().manual_seed(1)) < 0.6
    one = (place == 2).expand(rows, length) & (lengths == 0)
    return {"none": None, "right": place < lengths, "left": place >= lengths, "holes": holes, "one": one}


def counted(kl: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The tokens that count, [n] float64."""
    return (kl if mask is None else kl[mask]).double().reshape(-1)


def by_definition(x: torch.Tensor, threshold: float, sequences: int = 1) -> dict[str, float]:
    """The docstring's lines, for so many sequences with a token that counts."""
    figures = {"kl/mean": x.mean(), "kl/per_sequence": x.sum() / sequences, "kl/max": x.max(), "kl/p50": x.quantile(0.5),
               "kl/p95": x.quantile(0.95), "kl/p99": x.quantile(0.99), "kl/tokens": x.numel(), "kl/not_finite": (~x.isfinite()).sum(),
               "kl/above_threshold": (x > threshold).double().mean()}
    return {name: float(value) for name, value in figures.items()}


# ---- a step


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["none", "right", "left", "holes", "one"])
def test_figures_of_a_step(layout, dtype, device) -> None:
    """Every figure is that of plain torch on kl[mask], for every layout and type; all are Python floats."""
    kl, mask = tokens(6, 50, dtype=dtype), masks(6, 50)[layout]
    got = KLMonitor(threshold=0.1).update(kl.to(device), None if mask is None else mask.to(device))
    expected = by_definition(counted(kl, mask), 0.1, 6 if mask is None else int(mask.any(-1).sum()))
    assert got == pytest.approx({"step": 0.0, **expected, "kl/spike": 0.0}, **CLOSE)
    assert all(type(value) is float for value in got.values())
    assert expected["kl/tokens"] >= 1 and got["kl/max"] == expected["kl/max"]


@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3, 4), (257, 512)], ids=str)
def test_shapes(shape) -> None:
    """One token, one sequence, more dimensions, a large batch; inputs stay as they were and no graph is kept."""
    kl = tokens(*shape).requires_grad_()
    before = kl.detach().clone()
    got = KLMonitor(threshold=0.1, spike=False).update(kl)
    assert got == pytest.approx({"step": 0.0, **by_definition(before.double().reshape(-1), 0.1, math.prod(shape[:-1]))}, **CLOSE)
    assert torch.equal(kl, before) and kl.grad is None


@pytest.mark.parametrize("count", range(1, 12))
def test_quantiles_of_few_tokens(count) -> None:
    """The quantiles interpolate as torch.quantile does, down to one token, and through an infinite one where torch gives NaN."""
    kl = tokens(count, seed=count)
    got = KLMonitor().update(kl)
    for name, q in (("kl/p50", 0.5), ("kl/p95", 0.95), ("kl/p99", 0.99)):
        assert got[name] == pytest.approx(float(kl.double().quantile(q)), **CLOSE)
    kl[0] = math.inf
    got = KLMonitor().update(kl)
    ordered = kl.sort().values
    for name, q in (("kl/p50", 0.5), ("kl/p95", 0.95), ("kl/p99", 0.99)):
        finite = math.ceil(q * (count - 1)) < count - 1
        assert got[name] == (pytest.approx(float(ordered[:-1].double().quantile(q * (count - 1) / (count - 2))), **CLOSE) if finite else math.inf)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_masked_tokens_change_nothing(garbage) -> None:
    """Figures of the step and of the run are the same to the bit, whatever the tokens hold that do not count; also those of the entropy."""
    kl, mask = tokens(6, 50), masks(6, 50)["holes"]
    clean, dirty = KLMonitor(threshold=0.1), KLMonitor(threshold=0.1)
    for step in range(3):
        first = clean.update(kl.masked_fill(~mask, 0.0), mask, entropy=kl.masked_fill(~mask, 0.0))
        assert dirty.update(kl.masked_fill(~mask, garbage), mask, entropy=kl.masked_fill(~mask, garbage)) == first and first["step"] == step
    assert dirty.summary() == clean.summary() and dirty.profile() == clean.profile() and dirty.state_dict() == clean.state_dict()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite_tokens_are_reported_and_forgotten(bad) -> None:
    """A token that counts and is not finite shows in mean and maximum, rings, and is left out of the run's figures; NaN out of the quantiles."""
    kl, monitor = tokens(4, 25), KLMonitor(threshold=0.1)
    kl[1, 3] = bad
    got = monitor.update(kl)
    rest = kl[kl.isfinite()].double()
    assert got["kl/spike"] == got["kl/not_finite"] == 1.0 and got["kl/tokens"] == 100.0
    assert str(got["kl/mean"]) == str(got["kl/max"]) == str(bad)
    assert got["kl/above_threshold"] == pytest.approx(float((kl > 0.1).double().mean()), **CLOSE)
    median = rest.quantile(0.5) if math.isnan(bad) else kl.double().reshape(-1).sort().values[49:51].mean()
    assert got["kl/p50"] == pytest.approx(float(median), **CLOSE)
    run = monitor.summary()
    assert run["kl/mean"] == pytest.approx(float(rest.mean()), **CLOSE) and run["kl/max"] == float(rest.max())
    assert run["kl/not_finite"] == 1.0 and run["kl/tokens"] == 100.0 and run["kl/spikes"] == 1.0
    assert sum(monitor.profile()["tokens"]) == 99.0 and all(map(math.isfinite, monitor.profile()["kl"]))


@pytest.mark.parametrize("shape, masked", [((2, 3), True), ((0,), False), ((2, 0), False), ((0, 3), False)], ids=str)
def test_no_token_that_counts(shape, masked) -> None:
    """Without a token that counts the figures are NaN, nothing rings, and the run does not change but in its steps."""
    monitor = KLMonitor(threshold=0.1)
    empty = monitor.summary()
    got = monitor.update(torch.full(shape, math.nan), torch.zeros(shape, dtype=torch.bool) if masked else None, entropy=torch.zeros(shape))
    assert got["kl/tokens"] == got["kl/not_finite"] == got["kl/spike"] == 0.0
    assert all(math.isnan(got[name]) for name in ("kl/mean", "kl/per_sequence", "kl/max", "kl/p50", "kl/p95", "kl/p99", "kl/above_threshold",
                                                    "entropy"))
    after = monitor.summary()
    assert after.pop("steps") == 1.0 and empty.pop("steps") == 0.0 and str(after) == str(empty)
    assert math.isnan(after["kl/mean"]) and monitor.profile() == {"position": [], "kl": [], "tokens": []}
    monitor.update(tokens(2, 3))
    assert math.isfinite(monitor.summary()["kl/mean"]) and sum(monitor.profile()["tokens"]) == 6.0


@pytest.mark.parametrize("device", DEVICES)
def test_further_figures(device) -> None:
    """Per-token tensors are averaged over the tokens that count, other tensors over all; numbers and controllers are taken as they are."""
    kl, mask, entropy, reward = tokens(6, 50), masks(6, 50)["right"], tokens(6, 50, seed=1), tokens(6, seed=2)
    got = KLMonitor(spike=False).update(kl.to(device), mask.to(device), entropy=entropy.to(device), reward=reward, beta=SimpleNamespace(beta=0.25),
                                        learning_rate=1e-5, **{"policy/loss": torch.tensor(-1.5, device=device, requires_grad=True),
                                                               "length": mask.sum(-1).to(device), "absent": None, "clipped": mask.to(device)})
    expected = {"entropy": entropy[mask].double().mean(), "reward": reward.double().mean(), "beta": 0.25, "learning_rate": 1e-5, "policy/loss": -1.5,
                "length": mask.sum() / 6, "clipped": 1.0}
    further = dict(list(got.items())[9:])
    assert further == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-6) and list(further) == list(expected)
    assert all(type(value) is float for value in got.values())
    assert further["entropy"] == pytest.approx(float(expected["entropy"]), **CLOSE)


@pytest.mark.parametrize("device", [*DEVICES, "meta"])
def test_a_figure_of_each_token_may_be_on_the_cpu(device, monkeypatch) -> None:
    """A CPU tensor shaped as kl is averaged over the tokens that count, as one on kl's device is."""
    kl, mask, entropy = tokens(6, 50), masks(6, 50)["right"], tokens(6, 50, seed=1).masked_fill(~masks(6, 50)["right"], math.nan)
    monitor, seen = KLMonitor(spike=False), []
    if device == "meta":
        monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: torch.ones(tensor.shape, dtype=tensor.dtype))
        monkeypatch.setattr(torch.Tensor, "item", lambda tensor: seen.append(tensor))
        assert monitor.update(kl.to(device), mask.to(device), entropy=entropy)["entropy"] == 1.0 and not seen
    else:
        got = monitor.update(kl.to(device), mask.to(device), entropy=entropy)["entropy"]
        assert got == pytest.approx(float(entropy[mask].double().mean()), **CLOSE)


@pytest.mark.parametrize("device", DEVICES)
def test_a_reward_of_each_packed_sequence(device) -> None:
    """With as many packed sequences as tokens a reward is one per sequence, as shape_rewards takes it; other figures are per token all the same."""
    kl, mask = torch.ones(3, device=device), torch.tensor([True, False, True], device=device)
    reward = torch.tensor([1.0, 10.0, 1.0], device=device)
    for bounds, expected in (([0, 1, 2, 3], 4.0), ([0, 2, 2, 3], 4.0), ([0, 2, 3], 1.0), (None, 1.0)):
        bounds = None if bounds is None else torch.tensor(bounds, device=device)
        for given in (reward, reward.cpu()):
            got = KLMonitor(spike=False).update(kl, mask, cu_seqlens=bounds, reward=given, entropy=given, score=given)
            assert (got["reward"], got["entropy"], got["score"]) == (expected, 1.0, 1.0)
    # Per sequence there too: the empty one's 10 goes to no token.
    assert shape_rewards(reward, kl, 0.0, cu_seqlens=torch.tensor([0, 2, 2, 3], device=device)).tolist() == [0.0, 1.0, 1.0]


def test_what_is_not_asked_for_is_not_there() -> None:
    """Without a threshold, a detector and further figures the dict holds the others alone."""
    names = ["step", "kl/mean", "kl/per_sequence", "kl/max", "kl/p50", "kl/p95", "kl/p99", "kl/tokens", "kl/not_finite"]
    monitor = KLMonitor(spike=False)
    assert list(monitor.update(tokens(3))) == names
    assert list(monitor.summary()) == ["steps", "kl/tokens", "kl/mean", "kl/per_sequence", "kl/max", "kl/p50", "kl/p95", "kl/p99", "kl/not_finite"]
    assert list(KLMonitor(threshold=1.0).update(tokens(3))) == [*names, "kl/above_threshold", "kl/spike"]


def test_steps_are_counted_on() -> None:
    """The step is one more than the last, from 0, unless it is given."""
    monitor = KLMonitor()
    assert [monitor.update(tokens(3), step=step)["step"] for step in (None, None, 10, None, 5, None)] == [0.0, 1.0, 10.0, 11.0, 5.0, 6.0]


def step_of(device: str, packed: bool) -> tuple[tuple, dict]:
    """Arguments of update on a device, with figures of every kind."""
    kl, mask, bounds = tokens(6, 50).to(device), masks(6, 50)["holes"].to(device), torch.arange(0, 301, 50).to(device)
    further = {"entropy": kl, "reward": kl[:, 0], "beta": 0.1}
    return ((kl.reshape(-1), mask.reshape(-1)), {**further, "cu_seqlens": bounds}) if packed else ((kl, mask), further)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_one_copy_and_nothing_else_is_read(packed, monkeypatch) -> None:
    """On the meta device, where looking at a value is an error, a step gets as far as its one copy, and from there on needs the device no more."""
    copies = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(tensor.device.type) or torch.ones(tensor.shape, dtype=tensor.dtype))
    arguments, further = step_of("meta", packed)
    monitor = KLMonitor(threshold=0.1)
    for step in range(3):
        monitor.update(*arguments, **further)
        assert copies == ["meta"] * (step + 1)
    monitor.summary(), monitor.profile(), monitor.state_dict()
    assert len(copies) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_one_wait_for_the_gpu(packed) -> None:
    """A step synchronises once, and its figures are those of the CPU."""
    arguments, further = step_of("cuda", packed)
    monitor, alone = KLMonitor(threshold=0.1), KLMonitor(threshold=0.1)
    monitor.update(*arguments, **further)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = monitor.update(*arguments, **further)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(warning.message) for warning in caught) == 1
    arguments, further = step_of("cpu", packed)
    assert alone.update(*arguments, step=1, **further) == pytest.approx(got, **CLOSE)


# ---- the run


def test_summary() -> None:
    """Mean, maximum, counts and share are those of all tokens so far; the quantiles are right to 1 % of the token of their rank."""
    monitor, seen = KLMonitor(threshold=0.1), []
    for step in range(7):
        kl, mask = tokens(step + 1, 40, seed=step), masks(step + 1, 40)["left"]
        monitor.update(kl, mask)
        seen.append(counted(kl, mask))
    x = torch.cat(seen)
    got, expected = monitor.summary(), by_definition(x, 0.1)
    assert {name: got[name] for name in ("kl/mean", "kl/max", "kl/tokens", "kl/above_threshold")} == pytest.approx(
        {name: expected[name] for name in ("kl/mean", "kl/max", "kl/tokens", "kl/above_threshold")}, **CLOSE)
    assert got["steps"] == 7.0 and got["kl/not_finite"] == 0.0
    for name, q in (("kl/p50", 0.5), ("kl/p95", 0.95), ("kl/p99", 0.99)):
        assert got[name] == pytest.approx(float(x.quantile(q, interpolation="lower")), rel=0.0101)  # 1 %, and the rounding of the logarithm


@pytest.mark.parametrize("value", [1.01e-8, 3e-6, 1e-3, 0.1, 1.0, 31.0, 9.9e2])
def test_run_quantiles_over_eleven_decades(value) -> None:
    """Between 1e-8 and 1e3 nats a quantile is right to 1 % everywhere: the maximum of the run does not set it."""
    monitor = KLMonitor()
    monitor.update(torch.tensor([value] * 99 + [999.0]))
    assert monitor.summary()["kl/p50"] == pytest.approx(value, rel=0.0101)
    assert monitor.summary()["kl/p95"] == pytest.approx(value, rel=0.0101)


def test_run_quantiles_outside() -> None:
    """Below 1e-8, also below 0 as a sampled estimate, a quantile reads 0; above 1e3 it reads about 1e3; never more than the maximum."""
    monitor = KLMonitor()
    monitor.update(torch.tensor([0.0, -0.5, 9e-9, 1e-30]))
    assert [monitor.summary()[name] for name in ("kl/p50", "kl/p95", "kl/p99")] == [0.0] * 3
    monitor = KLMonitor()
    monitor.update(torch.tensor([1e10]))
    assert 1e3 <= monitor.summary()["kl/p50"] <= 1.05e3
    monitor = KLMonitor()
    monitor.update(torch.tensor([0.3]))
    assert monitor.summary()["kl/p99"] <= monitor.summary()["kl/max"]


@pytest.mark.parametrize("longest", [1, 7])
def test_mean_per_sequence(longest) -> None:
    """Sums of the sequences that have a token that counts, padded on either side or packed, of a step and of the run; also of [B, G, T]."""
    monitors = [KLMonitor() for _ in range(3)]
    every = []
    for seed in range(3):
        values = sequences(seed, longest)
        sums = [float(value.double().sum()) for value in values if len(value)]
        every += sums
        expected = sum(sums) / len(sums)
        bounds = torch.tensor([0, *(len(value) for value in values)]).cumsum(0)
        got = [monitors[0].update(*padded(values, left=True)), monitors[1].update(*(value[None] for value in padded(values, left=False))),
               monitors[2].update(torch.cat(values), cu_seqlens=bounds)]
        assert [figures["kl/per_sequence"] for figures in got] == pytest.approx([expected] * 3, rel=1e-6)
    assert [monitor.summary()["kl/per_sequence"] for monitor in monitors] == pytest.approx([sum(every) / len(every)] * 3, rel=1e-6)


def test_run_of_negative_estimates() -> None:
    """A maximum may be below 0, of the first step's tokens and of all."""
    monitor = KLMonitor(spike=False)
    for value, largest in ((-0.5, -0.5), (math.nan, -0.5), (-0.25, -0.25), (-1.0, -0.25)):
        monitor.update(torch.tensor([value]))
        assert monitor.summary()["kl/max"] == largest


def test_what_is_infinite_is_above_the_threshold() -> None:
    """In the step's share and in the run's, as (kl > threshold) has it: +inf counts there, NaN does not."""
    monitor = KLMonitor(threshold=0.1)
    got = monitor.update(torch.tensor([0.0, 0.2, math.inf, math.nan]))
    assert got["kl/above_threshold"] == monitor.summary()["kl/above_threshold"] == 0.5


def sequences(seed: int, longest: int, count: int = 5) -> list[torch.Tensor]:
    """KLs of responses of several lengths, 0 and `longest` among them."""
    lengths = [longest, 0, 1, *(longest * (index + 1) // (count + 1) for index in range(count - 3))]
    return [tokens(length, seed=seed + index) for index, length in enumerate(lengths)]


def padded(values: list[torch.Tensor], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(kl, mask), [S, T + 2] with NaN where nothing counts."""
    length = max(map(len, values)) + 2
    kl, mask = torch.full((len(values), length), math.nan), torch.zeros(len(values), length, dtype=torch.bool)
    for row, value in enumerate(values):
        where = slice(length - len(value), length) if left else slice(0, len(value))
        kl[row, where], mask[row, where] = value, True
    return kl, mask


def packed(values: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(kl, cu_seqlens)."""
    return torch.cat(values), torch.tensor([0, *map(len, values)]).cumsum(0).int()


def profile_of(values: list[torch.Tensor], positions: int) -> dict[str, list[float]]:
    """profile() by its definition, sequence by sequence."""
    longest, width = max(map(len, values)), 1
    while width * positions < longest:
        width *= 2
    starts = range(0, longest, width)
    parts = [torch.cat([value[start:start + width] for value in values]).double() for start in starts]
    return {"position": list(starts), "kl": [float(part.mean()) for part in parts], "tokens": [float(len(part)) for part in parts]}


@pytest.mark.parametrize("layout", ["left", "right", "packed"])
@pytest.mark.parametrize("lengths", [(5, 8), (8, 9), (3, 40, 7), (100, 3), (16, 17, 33, 64, 65)], ids=str)
def test_profile(lengths, layout) -> None:
    """Mean KL by position, whatever the layout; entries are doubled in width as longer responses come, and never narrow again."""
    monitor, seen = KLMonitor(positions=8), []
    for seed, longest in enumerate(lengths):
        values = sequences(10 * seed, longest)
        seen += values
        if layout == "packed":
            kl, bounds = packed(values)
            monitor.update(kl, cu_seqlens=bounds)
        else:
            monitor.update(*padded(values, layout == "left"))
        got, expected = monitor.profile(), profile_of(seen, 8)
        assert got["position"] == expected["position"] and got["tokens"] == expected["tokens"]
        assert got["kl"] == pytest.approx(expected["kl"], **CLOSE)
    assert len(got["kl"]) <= 8


def test_profile_counts_only_tokens_that_count() -> None:
    """Holes do not take up positions: the profile is that of the sequences without them, padded or packed."""
    kl, mask = tokens(6, 50), masks(6, 50)["holes"]
    first, second = KLMonitor(positions=50), KLMonitor(positions=50)
    first.update(kl, mask)
    second.update(kl.reshape(-1), mask.reshape(-1), cu_seqlens=torch.arange(0, 301, 50))
    expected = profile_of([row[keep] for row, keep in zip(kl, mask, strict=True)], 50)
    for monitor in (first, second):
        assert monitor.profile()["tokens"] == expected["tokens"] and monitor.profile()["kl"] == pytest.approx(expected["kl"], **CLOSE)


def test_profile_keeps_its_place_where_nothing_is_finite() -> None:
    """A position of which no token was finite reads NaN, and those behind it stay where they are."""
    monitor = KLMonitor()
    monitor.update(torch.tensor([[0.5, math.inf, 0.25, math.nan]]))
    assert str(monitor.profile()) == "{'position': [0, 1, 2], 'kl': [0.5, nan, 0.25], 'tokens': [1.0, 0.0, 1.0]}"
