"""The forward's loop over a segment and its merge, by one warp as GPUs run them: paths, borders,
masks, arrival order, launches.
"""

import contextlib
import dataclasses
import math
import random
from collections.abc import Callable
from unittest import mock

import cases
import pytest
import torch
from cases import Rows, assert_gradients

from fastkl import testing
from fastkl.ops import engine
from fastkl.ops.fields import FIELDS, SAVED, RowArgs

pytest.importorskip("triton")
from fastkl.kernels import config, launch, variant

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOWEST = torch.finfo(torch.bfloat16).min


class Warp:
    """A GPU's forward configuration for long rows of one type: of 32 or of 64 threads; tile: the
    entries that a program adds at a time.
    """

    def __init__(self, dtype: torch.dtype, arch: str = "sm_90") -> None:
        self.dtype, self.chosen = dtype, config.select("forward", arch, dtype.itemsize, 128256)
        self.tile = self.chosen.threads * self.chosen.groups * 16 // dtype.itemsize

    def use(self, segment: int | None = None) -> contextlib.AbstractContextManager:
        segment = segment or self.chosen.segment
        return config.override(dataclasses.replace(self.chosen, segment=segment))


@pytest.fixture(params=[f"{arch}-{kind}" for arch in ("sm_90", "gfx942") for kind in DTYPES])
def warp(request: pytest.FixtureRequest, kernels) -> Warp:
    arch, kind = request.param.split("-")
    return Warp(DTYPES[kind], arch)


def statistics(p, q, tokens, mask=None) -> dict[str, torch.Tensor]:
    fields = ("kl",) if tokens is None else FIELDS
    return cases.forward("triton", Rows(p, q, tokens, mask), fields).named()


def assert_right(kernels, p, q, hidden=None, alone=False, temperature=1.0) -> list[bool]:
    """Compare every field (or the KL alone) and both gradients of the KL with float64; return which
    rows are fallback rows.

    hidden: entries [N, V] that neither tensor gives any probability.
    """
    hidden = torch.zeros(p.shape, dtype=torch.bool) if hidden is None else hidden
    sides = (side.double().masked_fill(hidden, -1e4) for side in (p, q))
    exact = testing.truth(*sides, temperature)
    tokens = p.masked_fill(hidden, -math.inf).argmax(-1)
    p, q, given = (value.to(kernels.device) for value in (p, q, tokens))
    rows = Rows(p, q, None if alone else given, None, temperature)
    upstream = testing.upstream_for(given.float())
    made = cases.run("triton", rows, {"kl": upstream}, None, ("kl",) if alone else FIELDS)
    testing.assert_stats(made.fields, exact.stats(tokens, made.fields))
    assert_gradients(made.grads, testing.kl_gradients(exact, upstream, temperature))
    return made.saved[:, 1].signbit().tolist()


# ---- accuracy: rows (x, d), d = y - x, made against a centre that was set early

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def adversarial_rows(tile: int, generator: torch.Generator, eps: float) -> Pairs:
    """Rows of 10 tiles and a part whose differences or weights move along the row."""
    vocabulary = 10 * tile + 37
    place = torch.arange(vocabulary)
    at, head, far = place / vocabulary, place < tile, 6 * tile + 5
    x = 2 * torch.randn(vocabulary, generator=generator)
    d = eps * torch.randn(vocabulary, generator=generator)
    one, last = (place == far).float(), (place == vocabulary - 1).float()
    two = 25 * one + 24 * (place == far + 3 * tile)
    return [
        (x - 2 * head, d + 5 * head),  # the first tile light
        (x - 12 * head, d - 5 * head),  # the first tile weightless
        (x + 20 * at, d + 100 * eps * at),  # rising, d drifts
        (x - 20 * at, d + 100 * eps * at),  # falling, d drifts
        (x * (two == 0) + two, d + (two > 0) * 3 + (two == 24) * eps),  # two peaks
        (x * (1 - one) + 9.5 * one, d + one),  # a peak that does not outweigh 8 times
        (x + 30 * last, d - 8 * last),  # a peak in the edge tile
        (x / 200 + 1.9 * (at > 0.25), d + 0.3 * head),  # flat, the first tiles lighter
        (x, 0 * d),  # equal
    ]


def moving(warp: Warp) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    rows = [row for eps in (1e-3, 1e-2) for row in adversarial_rows(warp.tile, generator, eps)]
    first = [*DTYPES.values()].index(warp.dtype)
    return rows if torch.cuda.is_available() else rows[first :: len(DTYPES)]


def growing(warp: Warp) -> Pairs:
    """A centre that settles early: tiles of a few times the first, or of all before, each with d +
    delta; nearly all weight lies far from the mean of the first tiles.
    """
    rows, generator = [], torch.Generator().manual_seed(0)
    for delta, all_before in ((0.3, False), (3.0, False), (0.3, True), (10.0, True)):
        weights = [1.0] + [1e-5] * 6
        for _ in range(9):
            weights.append(7.0 * (sum(weights) if all_before else 1.0))
        x = torch.tensor(weights).log().repeat_interleave(warp.tile)
        d = 1e-3 * torch.randn(len(x), generator=generator)
        rows.append((x - x.max(), d + delta * (torch.arange(len(x)) >= 7 * warp.tile)))
    return rows


def border(warp: Warp) -> Pairs:
    """Mean difference 0, where |d| of some entries, or of all of a tile, is just below, at or above
    1, the border of near and general. The rounding of y = x + 1 lies on both sides of 1.
    """
    rows, off = [], 0.001 if warp.dtype == torch.float32 else 0.01
    at, generator = torch.arange(2 * warp.tile + 90), torch.Generator().manual_seed(1)
    noise = 0.05 * torch.randn(len(at), generator=generator)
    x = torch.randn(len(at) // 2, generator=generator).repeat_interleave(2)
    for edge in (1 - off, 1.0, 1 + off):
        d = edge * (1.0 - 2 * (at % 2))
        few, whole = torch.where(at % 97 < 2, d, noise), torch.where(at // warp.tile == 1, d, noise)
        rows += [(x, few), (x, d), (3 * x, whole)]
    return rows


def below_a_new_centre(warp: Warp) -> Pairs:
    """Two values of d alone, so that no rounding averages out, and an eighth of the weight about
    the centre.
    """
    later = torch.arange(9 * warp.tile) >= warp.tile
    growth, delta = torch.tensor([[6.95, 6.95, 2.95], [0.512, 0.514, 0.45]])[..., None]
    return list(zip(later * (growth / 8).log(), later * delta, strict=True))


MADE: dict[str, Callable[[Warp], Pairs]] = {
    "moving": moving,
    "growing": growing,
    "border": border,
    "below a new centre": below_a_new_centre,
    "short": lambda warp: [(x, 0.3 * x.flip(0)) for x in testing.logits("normal3", 2, 9)],
    "a tile and an entry": lambda warp: [
        (x, 0.3 * x.flip(0)) for x in testing.logits("normal3", 2, warp.tile + 1)
    ],
}


@pytest.mark.parametrize("name", MADE)
def test_made_rows(kernels, warp, name) -> None:
    x, d = (torch.stack(side) for side in zip(*MADE[name](warp), strict=True))
    with warp.use():
        assert_right(kernels, x.to(warp.dtype), (x + d).to(warp.dtype))


def test_border_of_the_fallback(kernels, warp) -> None:
    """One improbable entry 50, 59 and 61 nats from the mean on either side: right; the fallback
    takes those beyond 60, or for float32 rows beyond 16.
    """
    first, last, sizes = 5, warp.tile + 80, torch.tensor([50.0, 59.0, 61.0])
    x, y = testing.pair("normal1", 6, warp.tile + 90, 0.01, seed=2)
    x[:3, last] -= 5.0
    y[:3, last], x[3:, first] = x[:3, last] - sizes, y[3:, first] - sizes
    p, q = (side.to(warp.dtype) for side in (x, y))
    with warp.use():
        assert_right(kernels, p, q)
        fallback = assert_right(kernels, p, q, alone=True)
    far = warp.dtype == torch.float32
    assert fallback[::3] == [far] * 2 and fallback[2::3] == [True] * 2
    # A constant between 16-bit rows counts twice; first tiles lie far from the later centre.
    x, y = testing.pair("normal1", 5, 2 * warp.tile + 90, 0.01, seed=2)
    y[:4] += torch.tensor([25.0, 0.0, 0.0, -30.0])[:, None]
    x[1:4, : warp.tile] -= torch.tensor([90.0, 50.0, 75.0])[:, None]
    y[1:4, : warp.tile] -= 5.0
    x[2, 5] -= 45.0
    x[4, 5], y[4, 5] = 3.6, -16.4
    p, q = x.to(warp.dtype), y.to(warp.dtype)
    with warp.use():
        assert assert_right(kernels, p[:4], q[:4]) == [False, True, True, True]
        # One entry 20 nats away makes a KL of 0.4.
        assert assert_right(kernels, p[4:], q[4:], alone=True) == [far]


# ---- masks, peaks and short rows


def test_shared_masks(kernels, warp) -> None:
    tile = warp.tile
    at = torch.arange(2 * tile + 90)
    columns = [at < tile + 9, at % 7 == 0, at // tile == 1, at >= 2 * tile, at > 0]
    masks = [(LOWEST, mask) for mask in columns] + [(-1e9, columns[1]), (-math.inf, columns[0])]
    hidden = torch.stack([mask for _, mask in masks])
    p, q = testing.pair("normal3", len(masks), len(at), 0.1, dtype=warp.dtype)
    for row, (fill, mask) in enumerate(masks):
        p[row, mask] = q[row, mask] = fill
    with warp.use(tile):
        # The padding of an edge tile has no weight, in a segment of nothing too.
        fallback = assert_right(kernels, p, q, hidden, temperature=1.7)
    with warp.use():
        fallback += assert_right(kernels, p, q, hidden)
        fallback += assert_right(kernels, p[:2], q[:2], hidden[:2], alone=True)
        alone = cases.forward("triton", Rows(p.to(kernels.device), None), ("entropy",))
    assert not alone.saved[:, 1].signbit().any()
    fills = [fill for fill, _ in masks]
    fills += [*fills, *fills[:2]]
    assert all(fill == -math.inf for fill, slow in zip(fills, fallback, strict=True) if slow)


def test_late_peaks_and_empty_beginnings(kernels, warp) -> None:
    tile = warp.tile
    x, y = testing.pair("normal1", 6, 2 * tile + 50, 0.3)
    x[5, -tile // 2 - 50], y[5, -tile // 2 - 50] = 130.0, 129.0
    x[0, tile + 3] += 20
    x[1, -2] += 12
    x[2, -1], y[2, -1] = 60.0, 58.0
    hidden = torch.zeros(x.shape, dtype=torch.bool)
    hidden[3:5, : tile + 1] = True
    for side in (x, y):
        side[3, : tile + 1], side[4, : tile + 1] = -math.inf, LOWEST
    with warp.use():
        fallback = assert_right(kernels, x.to(warp.dtype), y.to(warp.dtype), hidden)
    assert not fallback[5]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_arrival_order_changes_no_bit(kernels, dtype, monkeypatch) -> None:
    """The program that arrives last merges a row, whichever it is."""
    if not kernels.interpreted:
        pytest.skip("a GPU has an order of its own")
    from triton.runtime.interpreter import interpreter_builder as builder

    p, q = testing.sizes_pair("normal3", (0.03, 1.0, 0.3, 0.1), (0.0, 50.0), 601, dtype)
    p[1, -11] += 30
    q[2, 7] -= 75
    tokens = torch.tensor([3, 300, 11, 7]) if dtype == torch.float32 else None
    given = p, q, tokens, torch.tensor([True, True, True, False])
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
    sizes, places, numbers = [], [], random.Random(0)

    def shuffled(programs: int, *rest: int) -> None:
        sizes.append(programs)
        places[:] = numbers.sample(range(programs), programs)
        set_dim(programs, *rest)

    with Warp(dtype).use(160):
        expected = statistics(*given)
        monkeypatch.setattr(builder, "set_grid_dim", shuffled)
        monkeypatch.setattr(builder, "set_grid_idx", lambda x, *rest: set_index(places[x], *rest))
        for _ in range(2):
            results = statistics(*given)
            cases.assert_same(results.values(), expected.values())
            assert not any(bool(value[3].any()) for value in results.values())
    splits = -(-601 // config.segment_length(601, 160))
    assert splits > 2 and sizes == [4 * splits, 1] * 2


# ---- launches


def test_launches_of_a_forward(kernels, warp) -> None:
    """row_forward and row_fallback once each; the second has a program for four rows."""
    p, q = testing.pair("normal3", 7, 300, 0.1, dtype=warp.dtype, device=kernels.device)
    with warp.use(160), mock.patch.object(launch.Variant, "start", autospec=True) as start:
        statistics(p, q, torch.arange(7, device=p.device))
    splits = -(-300 // config.segment_length(300, 160))
    assert splits > 1
    launches = [(call.args[0].kernel, call.args[1]) for call in start.call_args_list]
    assert launches == [(launch.row_forward, 7 * splits), (variant.row_fallback, 2)]


def test_no_row_beyond_the_last(kernels) -> None:
    """Programs of row_fallback look at four rows, the last one at those that there are."""
    p, q = testing.pair("normal3", 8, 300, 0.1, device=kernels.device)
    kl, saved = (p.new_full((8, *width), math.nan) for width in ((), (SAVED,)))
    engine.ENGINES["triton"].forward(RowArgs(*Rows(p[:7], q[:7])), {"kl": kl[:7]}, saved[:7])
    assert saved[7].isnan().all() and kl[7].isnan() and not saved[:7].isnan().any()


@pytest.mark.parametrize(("p_type", "q_type"), [(*DTYPES.values(),), (*DTYPES.values(),)[::-1]])
def test_prefetches_stay_in_the_row(kernels, p_type, q_type, monkeypatch) -> None:
    if not kernels.interpreted:
        pytest.skip("a GPU does not tell")
    asked = []

    def record(code, constraints, values, **_) -> None:
        assert "prefetch" in code
        asked.append([int(value.handle.data[0]) for value in values])

    monkeypatch.setattr(config, "prefetches", lambda arch: True)
    monkeypatch.setattr("triton.language.inline_asm_elementwise", record)
    p, q = testing.pair("normal1", 1, 601, 0.1)
    p, q = p.to(p_type), q.to(q_type)
    with Warp(p_type).use(320):
        assert_right(kernels, p, q)
    for side in (p, q):
        start, end = side.data_ptr(), side.data_ptr() + side.nbytes
        ends = [place // 16 * 16 + size for place, size in asked if start <= place < end]
        assert len(ends) == 2 and max(ends) <= end
