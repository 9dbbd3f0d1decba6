"""The forward's loop over a segment and its merge, as GPUs run them: paths, borders, masks, equal
bits, arrival order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import random

import cases
import pytest
import torch

from fastkl import testing
from fastkl.ops import engine
from fastkl.ops.fields import FIELDS, SAVED

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    cases.compute_as_a_gpu()

import test_kernels  # noqa: E402  (needs triton)

from fastkl.kernels import config, launch  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = [(arch, dtype) for arch in ("sm_90", "gfx942") for dtype in DTYPES.values()]
LOWEST = torch.finfo(torch.bfloat16).min


class Gpu:
    """An architecture's forward configuration for long rows of one type; tile: the entries that a
    program adds at a time.
    """

    def __init__(self, arch: str, dtype: torch.dtype) -> None:
        self.arch, self.dtype = arch, dtype
        self.chosen = config.select("forward", arch, dtype.itemsize, 128256)
        self.tile = self.chosen.threads * self.chosen.groups * 16 // dtype.itemsize

    def use(self, segment: int | None = None) -> contextlib.AbstractContextManager:
        """Run forward in this configuration, or with the same threads on shorter segments."""
        return config.override(
            dataclasses.replace(self.chosen, segment=segment or self.chosen.segment)
        )


@pytest.fixture(autouse=True)
def only_kernels(implementation) -> None:
    """The reference has its own tests."""
    if not implementation.kernels:
        pytest.skip("about the kernels")


@pytest.fixture(params=CASES, ids=["sm_90 fp32", "sm_90 bf16", "gfx942 fp32", "gfx942 bf16"])
def gpu(request: pytest.FixtureRequest, implementation) -> Gpu:
    """A configuration of 32 or of 64 threads a warp and a type of logits."""
    if request.param[0] == "gfx942" and not implementation.interpreted:
        pytest.skip("a warp of this GPU has 32 threads")
    return Gpu(*request.param)


@pytest.fixture(params=DTYPES.values(), ids=DTYPES)
def warp(request: pytest.FixtureRequest, implementation) -> Gpu:
    """A configuration of 32 threads and a type of logits."""
    return Gpu("sm_90", request.param)


def problem_of(p, q, tokens, mask=None):
    """The launchers' problem of rows in one tensor each."""
    ((_, problem),) = engine.problems(p, q, tokens, mask, 1.0)
    return problem


def statistics(p, q, tokens, mask=None) -> dict[str, torch.Tensor]:
    """Fields and saved values of one forward, from poisoned memory; KL(P‖Q) alone where tokens is
    None.
    """
    problem = problem_of(p, q, tokens, mask)
    names = ("kl",) if tokens is None else FIELDS
    saved = torch.full((p.shape[0], SAVED), math.nan, device=p.device)
    outputs = {name: torch.full((p.shape[0],), math.nan, device=p.device) for name in names}
    launch.forward(problem, outputs, saved)
    return {**outputs, "saved": saved}


def logits(pairs, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """P's and Q's logits of rows (x, d)."""
    x, d = (torch.stack(side) for side in zip(*pairs, strict=True))
    return x.to(dtype), (x + d).to(dtype)


def assert_right(implementation, p, q, hidden=None, alone: bool = False) -> list[bool]:
    """Compare every field (or the KL alone) and both gradients of the KL with float64; return which
    rows are fallback rows.

    hidden: entries [N, V] that neither tensor gives any probability.
    """
    hidden = torch.zeros(p.shape, dtype=torch.bool) if hidden is None else hidden
    exact = testing.truth(*(side.double().cpu().masked_fill(hidden, -1e4) for side in (p, q)))
    tokens = None if alone else p.masked_fill(hidden, -math.inf).argmax(-1)
    p, q = (side.to(implementation.device) for side in (p, q))
    results = statistics(p, q, None if alone else tokens.to(p.device))
    saved = results.pop("saved")
    for name, value in results.items():
        if name in ("kl", "ref_kl"):
            testing.assert_kl(value, getattr(exact, name), name)
        elif name == "entropy":
            testing.assert_near(value, exact.entropy, 2e-6, 2e-6, name)
        else:
            log = exact.log_p if name == "logprob" else exact.log_q
            testing.assert_near(value, log.gather(1, tokens[:, None])[:, 0], 2e-6, 2e-6, name)
    upstream = testing.upstream_for(saved[:, 0])
    grads = [torch.full_like(side, math.nan) for side in (p, q)]
    launch.backward(problem_of(p, q, None), saved, {"kl": upstream}, *grads)
    for grad, value, side in zip(grads, testing.kl_gradients(exact, upstream), "pq", strict=True):
        what = f"gradient to {side}"
        testing.assert_rounded_gradient(
            grad, value, what, absolute=1e-6 * (side == "q"), truncated=implementation.interpreted
        )
    return saved[:, 1].signbit().tolist()


# ---- accuracy: rows made against a centre that was set early


def adversarial_rows(tile: int, generator: torch.Generator, eps: float):
    """(name, x, d) of rows of 10 tiles and a part whose differences or weights move along the row."""
    vocabulary = 10 * tile + 37
    at = torch.arange(vocabulary) / vocabulary
    head, far = torch.arange(vocabulary) < tile, 6 * tile + 5
    x = 2 * torch.randn(vocabulary, generator=generator)
    d = eps * torch.randn(vocabulary, generator=generator)
    yield "the first tile light, d + 5", x - 2 * head, d + 5 * head
    yield "the first tile weightless, d - 5", x - 12 * head, d - 5 * head
    yield "rising, d drifts", x + 20 * at, d + 100 * eps * at
    yield "falling, d drifts", x - 20 * at, d + 100 * eps * at
    two = torch.zeros(vocabulary)
    two[far], two[far + 3 * tile] = 25, 24
    yield "two peaks", x + two, d + (two > 0) * 3 + (two == 24) * eps
    one = (torch.arange(vocabulary) == far).float()
    yield "a peak that does not outweigh 8 times", x * (1 - one) + 9.5 * one, d + one
    last = (torch.arange(vocabulary) == vocabulary - 1).float()
    yield "a peak in the edge tile", x + 30 * last, d - 8 * last
    yield "flat, the first tiles lighter", x / 200 + 1.9 * (at > 0.25), d + 0.3 * head
    yield "equal", x, 0 * d


def test_adversarial_rows(implementation, gpu) -> None:
    """All within the bounds, in one segment as a GPU cuts it."""
    generator = torch.Generator().manual_seed(0)
    rows = [row[1:] for eps in (1e-3, 1e-2) for row in adversarial_rows(gpu.tile, generator, eps)]
    if implementation.interpreted:
        # Each case has a part of them.
        rows = rows[CASES.index((gpu.arch, gpu.dtype)) :: len(CASES)]
    with gpu.use():
        assert_right(implementation, *logits(rows, gpu.dtype))


def growing_rows(tile: int, generator: torch.Generator):
    """(x, d) of rows whose centre settles early: tiles of a few times the first, or of all before,
    each with d + delta.
    """
    for delta, all_before in ((0.3, False), (3.0, False), (0.3, True), (10.0, True)):
        weights = [1.0] + [1e-5] * 6
        for _ in range(9):
            weights.append(7.0 * (sum(weights) if all_before else 1.0))
        x = torch.tensor(weights).log().repeat_interleave(tile)
        d = 1e-3 * torch.randn(len(x), generator=generator)
        d[7 * tile :] += delta
        yield x - x.max(), d


def test_a_centre_that_settles_early(implementation, warp) -> None:
    """Nearly all weight lies far from the mean of the first tiles, though no tile outweighs all
    before it by much.
    """
    rows = growing_rows(warp.tile, torch.Generator().manual_seed(0))
    with warp.use():
        assert_right(implementation, *logits(rows, warp.dtype))


def test_equal_differences_just_below_a_new_centre(implementation) -> None:
    """Two values of d alone, so that no rounding averages out, and an eighth of the weight about
    the centre.
    """
    if not implementation.interpreted:
        pytest.skip("the roundings are those of the interpreter's model")
    gpu = Gpu("sm_90", torch.float32)
    later = torch.arange(9 * gpu.tile) >= gpu.tile
    growth, delta = torch.tensor([[6.95, 6.95, 2.95], [0.512, 0.514, 0.45]])[..., None]
    x = later * (growth / 8).log()
    with gpu.use():
        assert_right(implementation, x, x + later * delta)


# ---- borders of the paths


def border_rows(tile: int, edge: float):
    """(x, d) of rows of mean difference 0, where some entries, or all of a tile, have |d| = edge."""
    at = torch.arange(2 * tile + 90)
    generator = torch.Generator().manual_seed(1)
    sign = 1.0 - 2 * (at % 2)
    few, whole = at % 97 < 2, at // tile == 1
    noise = 0.05 * torch.randn(len(at), generator=generator)
    x = torch.randn(len(at) // 2, generator=generator).repeat_interleave(2)
    yield x, torch.where(few, edge * sign, noise)
    yield x, edge * sign
    yield 3 * x, torch.where(whole, edge * sign, noise)


def test_border_of_near_and_general(implementation, warp) -> None:
    """Right where |d| is just below, at and above 1, in some entries and in whole tiles."""
    # The rounding of y = x + 1 lies on both sides of 1.
    off = 0.001 if warp.dtype == torch.float32 else 0.01
    rows = [row for edge in (1 - off, 1.0, 1 + off) for row in border_rows(warp.tile, edge)]
    with warp.use():
        assert_right(implementation, *logits(rows, warp.dtype))


def test_border_of_the_fallback(implementation, warp) -> None:
    """One entry 50, 59 and 61 nats from the mean on either side: right; the fallback takes those
    beyond 60.
    """
    first, last = 5, warp.tile + 80
    sizes = torch.tensor([50.0, 59.0, 61.0])
    x = torch.randn(6, warp.tile + 90, generator=torch.Generator().manual_seed(2))
    y = x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    y[:3, last], x[3:, first] = x[:3, last] - sizes, y[3:, first] - sizes
    p, q = (side.to(warp.dtype) for side in (x, y))
    with warp.use():
        assert_right(implementation, p, q)
        fallback = assert_right(implementation, p, q, alone=True)
    assert fallback[::3] == [False] * 2 and fallback[2::3] == [True] * 2


# ---- masks, peaks and short rows


def test_shared_masks(implementation, warp) -> None:
    """Both tensors masked in the same columns: right, with entropy and without; no fallback row
    where the mask is finite.
    """
    tile = warp.tile
    at = torch.arange(2 * tile + 90)
    columns = [at < tile + 9, at % 7 == 0, at // tile == 1, at >= 2 * tile, at > 0]
    masks = [(LOWEST, mask) for mask in columns] + [(-1e9, columns[1]), (-math.inf, columns[0])]
    hidden = torch.stack([mask for _, mask in masks])
    p, q = testing.pair("normal3", len(masks), len(at), 0.1, dtype=warp.dtype)
    for row, (fill, mask) in enumerate(masks):
        p[row, mask] = q[row, mask] = fill
    with warp.use():
        fallback = assert_right(implementation, p, q, hidden)
        fallback[:2] = assert_right(implementation, p[:2], q[:2], hidden[:2], alone=True)
    assert all(fill == -math.inf for (fill, _), slow in zip(masks, fallback, strict=True) if slow)


def test_late_peaks_and_empty_beginnings(implementation, gpu) -> None:
    """A peak that arrives late or in the edge tile; first tiles of nothing."""
    tile = gpu.tile
    x, y = testing.pair("normal1", 5, 2 * tile + 50, 0.3)
    x[0, tile + 3] += 20
    x[1, -2] += 12
    x[2, -1], y[2, -1] = 60.0, 58.0
    p, q = x.to(gpu.dtype), y.to(gpu.dtype)
    hidden = torch.zeros(p.shape, dtype=torch.bool)
    hidden[3:, : tile + 1] = True
    for row, fill in ((3, -math.inf), (4, LOWEST)):
        p[row, : tile + 1] = q[row, : tile + 1] = fill
    with gpu.use():
        assert_right(implementation, p, q, hidden)


@pytest.mark.parametrize("vocabulary", ["1", "2", "9", "tile", "tile + 1"])
def test_short_rows(implementation, warp, vocabulary) -> None:
    """Rows shorter than a tile, and about as long; of one entry; and no rows."""
    p, q = testing.pair("normal3", 2, eval(vocabulary, {"tile": warp.tile}), 0.3, dtype=warp.dtype)
    with warp.use():
        assert_right(implementation, p, q)
        assert_right(implementation, p[:0], q[:0])


def test_poison_stays_in_its_row(implementation, warp) -> None:
    """Rows with a NaN or an infinity leave the bits of their neighbours alone."""
    late, device = warp.tile + 1, implementation.device
    p, q = testing.pair("normal3", 5, late + 20, 0.1, dtype=warp.dtype, device=device)
    tokens = torch.arange(5, device=p.device)
    with warp.use():
        clean = statistics(p, q, tokens)
        p[1, 0], q[3, late] = math.nan, math.inf
        results = statistics(p, q, tokens)
    for name, result in results.items():
        testing.assert_same_bits(result[::2], clean[name][::2], name)
    assert bool(results["kl"][1::2].isnan().all())


# ---- equal bits


def test_equal_bits_wherever_a_row_is(implementation, gpu) -> None:
    """Alone, in a batch, at any distance from a 16-byte boundary, with Q elsewhere: near, peaked,
    equal and far rows.
    """
    p, q, tokens, _ = test_kernels.data(2 * gpu.tile + 9, gpu.dtype, implementation.device, 4)
    p[1, -200] += 30
    q[2] = p[2]
    q[3, 7] -= 75
    # These many rows, one after the other, see every distance.
    every = [row % 4 for row in range(5 if gpu.dtype == torch.float32 else 9)]
    segment, layouts = None, [(every[:4], False, (5, 2, 0, 1))]
    if gpu.arch == "sm_90":
        segment, layouts = gpu.tile, [(every, False, (0, 0, 0, 0)), ([3, 0], True, (5, 2, 0, 1))]
    with gpu.use(segment):
        for rows, alone, (padding_p, offset_p, padding_q, offset_q) in layouts:
            single = {
                row: statistics(p[[row]], q[[row]], None if alone else tokens[[row]])
                for row in set(rows)
            }
            x = test_kernels.padded(p[rows], padding_p, offset_p)
            y = test_kernels.padded(q[rows], padding_q, offset_q)
            for name, value in statistics(x, y, None if alone else tokens[rows]).items():
                testing.assert_same_bits(
                    value, torch.cat([single[row][name] for row in rows]), name
                )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_arrival_order_changes_no_bit(implementation, dtype, monkeypatch) -> None:
    """The program that arrives last merges a row, whichever it is."""
    if not implementation.interpreted:
        pytest.skip("a GPU has an order of its own")
    from triton.runtime.interpreter import interpreter_builder as builder

    p, q, tokens, _ = test_kernels.data(601, dtype, "cpu", 4)
    p[1, 590], q[2, 7] = p[1, 590] + 30, q[2, 7] - 75
    tokens = tokens if dtype == torch.float32 else None
    mask = torch.tensor([True, True, True, False])
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
    sizes, places, numbers = [], [], random.Random(0)

    def shuffled(programs: int, *rest: int) -> None:
        sizes.append(programs)
        places[:] = numbers.sample(range(programs), programs)
        set_dim(programs, *rest)

    with Gpu("sm_90", dtype).use(160):
        expected = statistics(p, q, tokens, mask)
        monkeypatch.setattr(builder, "set_grid_dim", shuffled)
        monkeypatch.setattr(builder, "set_grid_idx", lambda x, *rest: set_index(places[x], *rest))
        for _ in range(2):
            results = statistics(p, q, tokens, mask)
            for field, value in results.items():
                testing.assert_same_bits(value, expected[field], field)
                assert not bool(value[3].any()), "a masked row has zeros"
    splits = -(-601 // config.segment_length(601, 160))
    assert splits > 2 and sizes == [4 * splits, 1] * 2


# ---- launches


def test_launches_of_a_forward(implementation, warp, monkeypatch) -> None:
    """row_forward and row_fallback once each; the second writes the marked rows alone."""
    p, q = testing.pair("normal3", 7, 300, 0.1, dtype=warp.dtype, device=implementation.device)
    p[1, 3], q[6, 5] = -math.inf, math.nan
    tokens = torch.arange(7, device=p.device)
    start, started, skipped = launch.Variant.start, [], []

    def counted(variant, programs, arguments) -> None:
        started.append((variant.kernel, programs))
        if variant.kernel not in skipped:
            start(variant, programs, arguments)

    monkeypatch.setattr(launch.Variant, "start", counted)
    with warp.use(160):
        expected = statistics(p, q, tokens)
        splits = -(-300 // config.segment_length(300, 160))
        assert splits > 1
        assert started == [(launch.row_forward, 7 * splits), (launch.row_fallback, 2)]
        skipped.append(launch.row_forward)
        results = {name: torch.full((7,), 5.0, device=p.device) for name in FIELDS}
        saved = torch.full((7, SAVED), 5.0, device=p.device)
        saved[[1, 6], 0] = math.nan
        launch.forward(problem_of(p, q, tokens), results, saved)
    for name, value in {**results, "saved": saved}.items():
        testing.assert_same_bits(value[[1, 6]], expected[name][[1, 6]], name)
        assert bool((value[[0, 2, 3, 4, 5]] == 5).all()), f"{name} without a mark was written"


@pytest.mark.parametrize(("p_type", "q_type"), [(*DTYPES.values(),), (*DTYPES.values(),)[::-1]])
def test_prefetches_stay_in_the_row(implementation, p_type, q_type, monkeypatch) -> None:
    """No bytes beyond a row are asked for ahead, whichever types the tensors have."""
    if not implementation.interpreted:
        pytest.skip("a GPU does not tell")

    def record(code, constraints, values, **_) -> None:
        assert "prefetch" in code
        asked.append([int(value.handle.data[0]) for value in values])

    asked = []
    monkeypatch.setattr(config, "prefetches", lambda arch: True)
    monkeypatch.setattr("triton.language.inline_asm_elementwise", record)
    p, q = testing.pair("normal1", 1, 601, 0.1)
    p, q = p.to(p_type), q.to(q_type)
    with Gpu("sm_90", p_type).use(320):
        assert_right(implementation, p, q)
    for side in (p, q):
        start, end = side.data_ptr(), side.data_ptr() + side.nbytes
        ends = [place // 16 * 16 + size for place, size in asked if start <= place < end]
        assert len(ends) == 2 and max(ends) <= end
