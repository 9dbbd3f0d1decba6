"""kl_divergence: its digits against fp64, its properties, and what infinities, NaN, masks and
memory layouts do to it.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from cases import FLOATS, assert_same, padded

from fastkl import kl_divergence, slow_path_rows, testing

# Sizes of log q - log p: a KL from about 1e-8 to 1e2 on rows of KINDS, and up to 1e4.
SIZES = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
SHIFTS = (0.0, 50.0, -50.0)
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
# In the interpreter float16 is left to MIXED and test_tokens: to a kernel it is a load and a store,
# as bfloat16 is.
TYPES = {name: FLOATS[name] for name in ("fp32", "bf16")} if INTERPRETING else FLOATS
LONG = 9003 if INTERPRETING else 50257


@pytest.fixture(params=TYPES.values(), ids=TYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """A type of logits."""
    return request.param


def outcome(
    p: torch.Tensor, q: torch.Tensor, device: str, upstream: torch.Tensor | None = None, **keywords
) -> tuple[torch.Tensor, ...]:
    """(kl, dP, dQ) on `device` for these very strides, and random upstream gradients where none are
    given.
    """
    p, q = testing.leaf(p.to(device)), testing.leaf(q.to(device))
    result = kl_divergence(p, q, **keywords)
    upstream = testing.upstream_for(result) if upstream is None else upstream
    return result, *torch.autograd.grad(result, (p, q), upstream.to(result))


def check_results(
    implementation,
    results: tuple[torch.Tensor, ...],
    p: torch.Tensor,
    q: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
) -> None:
    """What outcome() returned for logits p, q agrees with fp64 of them; the result is float32 and
    where the logits are.
    """
    result, *grads = results
    assert result.dtype == torch.float32 and result.shape == p.shape[:-1]
    assert result.device.type == implementation.device
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.cpu()
    exact = testing.truth(p.cpu(), q.cpu(), temperature)
    testing.assert_kl(result, exact.kl)
    expected = testing.kl_gradients(exact, testing.upstream_for(result), temperature)
    for name, grad, value, logits in zip("pq", grads, expected, (p, q), strict=True):
        assert grad.dtype == logits.dtype and grad.shape == logits.shape
        testing.assert_rounded_gradient(
            grad,
            value,
            f"gradient to {name}",
            absolute=1e-6 * (name == "q"),
            truncated=implementation.interpreted,
        )


def check(implementation, p: torch.Tensor, q: torch.Tensor, temperature=1.0) -> None:
    """kl_divergence and both gradients agree with fp64 of the same CPU inputs."""
    results = outcome(p, q, implementation.device, temperature=temperature)
    check_results(implementation, results, p, q, temperature)


# ---- accuracy


@pytest.mark.parametrize("kind", testing.KINDS)
@pytest.mark.parametrize("vocabulary", [1000, LONG] if INTERPRETING else [1000, 50257, 128256])
def test_against_fp64(implementation, kind, vocabulary, dtype) -> None:
    """KL in either direction and its gradients, from 1e-8 to 1e2 nats, with and without a constant
    between the logits.
    """
    sizes = SIZES if dtype != torch.float16 else SIZES[2:]
    if INTERPRETING and vocabulary > 1000:
        sizes = sizes[testing.KINDS.index(kind) % 3 :: 3]
    separate = vocabulary == 1000 and not INTERPRETING
    for shifts in [(shift,) for shift in SHIFTS] if separate else [SHIFTS]:
        p, q = testing.sizes_pair(kind, sizes, shifts, vocabulary, dtype)
        check(implementation, p, q)
        if not (INTERPRETING and vocabulary > 1000):
            check(implementation, q, p)


@pytest.mark.parametrize("kind", testing.KINDS)
def test_rows_far_apart_against_fp64(implementation, kind, dtype) -> None:
    """The same where KL is hundreds to 1e4 nats; the rows that the kernels read again."""
    if dtype == torch.float16:
        pytest.skip("logits as far apart overflow fp16")
    vocabulary = 300 if INTERPRETING else 50257
    p, q = testing.sizes_pair(kind, (200.0, 2000.0), (0.0, 50.0), vocabulary, dtype)
    check(implementation, p, q)
    check(implementation, q, p)


def suppressed(places: tuple[int, ...], shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries without probability whose logits differ by hundreds and thousands, beside small
    differences everywhere else.
    """
    p, q = testing.pair("normal3", 4, 1003, 1e-3)
    for row, apart in enumerate((-100.0, -300.0, -3000.0, 40.0)):
        p[row, places], q[row, places] = -1000.0, -1000.0 + apart
    return p, q + shift


def shifted(shift_p: float, shift_q: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits on a grid, so that shifting is exact."""
    pair = testing.sizes_pair("normal3", (2e-3, 0.02, 0.3, 3.0), (0.0,), 1009)
    p, q = (torch.round(value * 1024) / 1024 for value in pair)
    assert torch.equal((p + shift_p) - shift_p, p) and torch.equal((q + shift_q) - shift_q, q)
    return p + shift_p, q + shift_q


# Where the kernels look for a constant between rows of 1003.
LOOKED_AT = (250, 501, 752)
MOVED = ((64.0, -64.0), (-200.0, 0.0), (8.0, 1000.0), (-1000.0, 1000.0), (0.25, 3.5))
FLOAT32_ROWS = {
    "suppressed": lambda: suppressed((0,), 0.0),
    "suppressed, shifted": lambda: suppressed((0,), 50.0),
    "suppressed where looked at": lambda: suppressed(LOOKED_AT, 0.0),
    "suppressed where looked at, shifted": lambda: suppressed(LOOKED_AT, 50.0),
    **{f"shifts {shifts}": lambda shifts=shifts: shifted(*shifts) for shifts in MOVED},
}


@pytest.mark.parametrize("name", FLOAT32_ROWS)
def test_constants_and_entries_that_do_not_count(implementation, name) -> None:
    """Constants between the logits, and entries that no probability stands for, cost no digits."""
    check(implementation, *FLOAT32_ROWS[name]())


def of_type(make):
    """Rows made in float32, rounded."""
    return lambda dtype: tuple(value.to(dtype) for value in make())


ROWS = {
    **{
        f"V = {vocabulary}": lambda dtype, vocabulary=vocabulary: testing.sizes_pair(
            "normal3",
            (1e-3, 0.1, 1.0, 5.0) if vocabulary <= 4097 else (0.1, 1.0),
            SHIFTS,
            vocabulary,
            dtype,
        )
        for vocabulary in (1, 2, 3, 7, 8, 9, 127, 4096, 4097, 32768, 32769, 50257, 262144)
        if vocabulary <= (32769 if INTERPRETING else 262144)
    },
    # All logits far below 0, where e^x is 0 in float32, or far above.
    **{
        f"about {level:g}": of_type(
            lambda level=level: [side + level for side in testing.pair("normal3", 4, 1003, 0.5)]
        )
        for level in (-90.0, -1e4, 1e4)
    },
    # Rows that have nothing to do with each other, whose logits lie 1e4 apart.
    **{
        f"times {scale:g}": of_type(
            lambda scale=scale: [
                testing.pair("normal1", 3, 1003, 0.0, seed=seed)[0] * scale for seed in (0, 1)
            ]
        )
        for scale in (1e3, 1e4)
    },
}


@pytest.mark.parametrize("name", ROWS)
def test_sizes_of_rows_and_logits(implementation, name, dtype) -> None:
    """One entry, powers of two and their neighbours, more than any model has; logits far from 0."""
    check(implementation, *ROWS[name](dtype))


def test_accuracy_table(implementation, capsys) -> None:
    """Worst relative error per decade of the KL, beside F.kl_div of two float32 log-softmaxes:
    within tolerance, and better where KL is small.
    """
    vocabulary = 300 if INTERPRETING else 32768
    sizes = SIZES if INTERPRETING else [10 ** (-5 + 6 * i / 31) for i in range(32)]
    lines, worse = [f"{'KL':>6} {'kind':>12} {'fastkl':>9} {'F.kl_div':>9}"], []
    for kind in testing.KINDS:
        pair = testing.sizes_pair(kind, sizes, (0.0,), vocabulary)
        p, q = (value.to(implementation.device) for value in pair)
        exact, ours = testing.truth(p, q).kl, kl_divergence(p, q)
        testing.assert_kl(ours, exact)
        plain = torch.nn.functional.kl_div(
            q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
        decade = exact.log10().floor()
        for value in sorted(set(decade[decade >= -9].tolist())):
            of_decade = [
                ((result - exact).abs() / exact)[decade == value] for result in (ours, plain)
            ]
            errors = [float(some.max()) for some in of_decade]
            lines.append(f"{f'1e{value:.0f}':>6} {kind:>12} {errors[0]:9.1e} {errors[1]:9.1e}")
            if -8 <= value < -2 and errors[0] >= errors[1]:
                worse.append(lines[-1])
    with capsys.disabled():
        print(f"\n{implementation.backend}, V={vocabulary}, float32\n" + "\n".join(lines))
    assert not worse, "\n".join(worse)


MIXED = [("fp32", "bf16"), ("bf16", "fp32"), ("fp16", "bf16"), ("bf16", "fp16")]


@pytest.mark.parametrize("policy, ref", MIXED)
@pytest.mark.parametrize("vocabulary", [1003, 4096])
def test_mixed_types(implementation, policy, ref, vocabulary) -> None:
    """Policy and reference of different types: each gradient comes in the type of its own logits."""
    p, q = testing.sizes_pair("normal3", (1e-3, 0.1, 1.0, 10.0), SHIFTS, vocabulary)
    check(implementation, p.to(FLOATS[policy]), q.to(FLOATS[ref]))


def test_direction_by_hand(implementation) -> None:
    """The expectation is under the first argument: closed forms of two and of three classes."""
    for p, q in (((0.8, 0.2), (0.5, 0.5)), ((0.7, 0.2, 0.1), (0.25, 0.25, 0.5))):
        for one, two in ((p, q), (q, p)):
            exact = sum(a * math.log(a / b) for a, b in zip(one, two, strict=True))
            logits = [torch.tensor(side, device=implementation.device).log() for side in (one, two)]
            testing.assert_near(kl_divergence(*logits), torch.tensor(exact), 2e-6, 0, "KL")


# ---- properties


@pytest.mark.parametrize("vocabulary", [2, 4099])
def test_never_negative(implementation, dtype, vocabulary) -> None:
    """However close the rows are."""
    for kind in testing.KINDS[:: 2 if INTERPRETING else 1]:
        pair = testing.sizes_pair(kind, (1e-7, 1e-6, 1e-5, 1e-4), SHIFTS, vocabulary, dtype)
        assert bool((kl_divergence(*(side.to(implementation.device) for side in pair)) >= 0).all())


@pytest.mark.parametrize("vocabulary", [1, 129, 4096, LONG])
def test_identical_rows(implementation, dtype, vocabulary) -> None:
    """KL exactly 0 with gradients exactly 0: the same tensor twice, a copy, a copy that lies
    elsewhere in its 16 bytes, with -inf entries.
    """
    rows = [testing.pair(kind, 1, vocabulary, 0.0, dtype=dtype)[0] for kind in testing.KINDS[::2]]
    p = torch.cat(rows).to(implementation.device)
    if vocabulary > 1:
        p[1, 1::3] = -math.inf
    for name, q in (("the same", p), ("a copy", p.clone()), ("elsewhere", padded(p, 0, 1))):
        for value in outcome(p, q, implementation.device):
            assert bool((value == 0).all()), f"{name}: up to {value.abs().max():.3g}"


@pytest.mark.parametrize("kind", testing.KINDS)
def test_gradients_sum_to_zero(implementation, kind) -> None:
    """Over the vocabulary, as those of every function of a softmax: within 1e-5 of their absolute
    sum.
    """
    p, q = testing.sizes_pair(kind, (0.01, 0.1, 1.0), SHIFTS, 1003 if INTERPRETING else 5003)
    for grad in outcome(p, q, implementation.device)[1:]:
        grad = grad.double()
        assert bool((grad.sum(-1).abs() <= 1e-5 * grad.abs().sum(-1)).all())


PER_ROW = torch.tensor([[0.25, 0.5, 1.0], [1.5, 2.0, 0.75]])


@pytest.mark.parametrize(
    "temperature",
    [0.25, 0.7, 1, 3.0, PER_ROW, PER_ROW.bfloat16()],
    ids=["0.25", "0.7", "1", "3.0", "per row", "per row in bfloat16"],
)
def test_temperature(implementation, temperature, dtype) -> None:
    """Both logits are divided by it and the gradient follows: one number, or one per row."""
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.to(implementation.device)
    pair = testing.sizes_pair("normal3", (1e-3, 1e-2, 0.1, 1.0, 3.0, 5.0), (0.0, 7.0), 515, dtype)
    check(implementation, *(value.view(2, 3, -1) for value in pair), temperature)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_mask(implementation, dtype, garbage) -> None:
    """Rows that do not count hold anything: exactly 0, gradient exactly 0; the others have the bits
    of a call without them.
    """
    p, q = testing.sizes_pair("normal3", (0.01, 0.1, 1.0, 10.0, 0.1, 0.3), SHIFTS, 1003, dtype)
    mask = torch.tensor([True, False, True, True, False, True])
    device, upstream = implementation.device, testing.upstream_for(torch.empty(6))
    expected = outcome(p[mask], q[mask], device, upstream[mask])
    p[~mask], q[1], q[4, ::2] = garbage, garbage, math.nan
    results = [value.cpu() for value in outcome(p, q, device, mask=mask.to(device))]
    assert_same([result[mask] for result in results], [value.cpu() for value in expected])
    assert not any(bool(result[~mask].any()) for result in results)
    nothing = torch.zeros(6, dtype=torch.bool, device=device)
    assert not any(bool(value.any()) for value in outcome(p, q, device, mask=nothing))


def test_upstream_gradients(implementation, dtype) -> None:
    """0 gives a gradient of exactly 0, also of a row of NaN, the other rows as ever; one of stride
    0, as sum() and mean() give it, is the same one written out.
    """
    p, q = testing.sizes_pair("normal3", (0.01, 0.1, 1.0, 10.0), SHIFTS, 515, dtype)
    device, upstream = implementation.device, torch.tensor([1.5, 0.0, -2.0, 0.0])
    written = outcome(p, q, device, torch.full((4,), 1.75))
    for strided in (torch.full((), 1.75).expand(4), torch.full((4, 2), 1.75)[:, 1]):
        assert_same(outcome(p, q, device, strided), written)
    leaf = testing.leaf(p.to(device))
    (kl_divergence(leaf, q.to(device)).sum() * 1.75).backward()
    testing.assert_same_bits(leaf.grad, written[1], "gradient of sum()")
    expected = outcome(p, q, device, upstream)[1:]
    p[1], q[3, 5] = math.nan, math.nan
    for result, value in zip(outcome(p, q, device, upstream)[1:], expected, strict=True):
        assert bool((result[1::2] == 0).all())
        testing.assert_same_bits(result[::2], value[::2], "gradient of the other rows")


# ---- shapes and memory


@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)])
def test_no_rows(implementation, leading, dtype) -> None:
    """No rows, no results, gradients of the right shape."""
    p = torch.empty(*leading, 17, dtype=dtype)
    check_results(implementation, outcome(p, p.clone(), implementation.device), p, p)


@pytest.mark.parametrize("layout_q", ["batch and time", "same"])
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(implementation, layout, layout_q, dtype) -> None:
    """Leading shapes and strides of every sort, of one argument or of both; the memory around and
    under them stays as it was.
    """
    pair = testing.pair("normal3", 120, 43, 0.3, dtype=dtype)
    bases = [value.view(4, 5, 6, -1).to(implementation.device) for value in pair]
    p, q = (testing.LAYOUTS[layout](base[..., :40]) for base in bases)
    q = q if layout_q == "same" else q.clone(memory_format=torch.contiguous_format)
    before = [value.clone() for value in (*bases, q)]
    check_results(implementation, outcome(p, q, implementation.device), p, q)
    assert_same((*bases, q), before, "an input was written to")


@pytest.mark.parametrize("offset_p, offset_q", [(1, 1), (3, 0), (5, 2)])
@pytest.mark.parametrize("vocabulary, padding", [(513, 0), (512, 8), (77, 3)])
def test_storage_offsets_and_padded_rows(
    implementation, offset_p, offset_q, vocabulary, padding, dtype
) -> None:
    """Rows that start anywhere, with NaN before, between and behind them: nothing outside is read
    into a result.
    """
    pair = testing.pair("normal3", 3, vocabulary, 0.3, dtype=dtype, device=implementation.device)
    p, q = (padded(x, padding, start) for x, start in zip(pair, (offset_p, offset_q), strict=True))
    check_results(implementation, outcome(p, q, implementation.device), p, q)


@pytest.mark.parametrize("vocabulary", [1, 9, 5003])
def test_every_output_is_written(implementation, monkeypatch, vocabulary, dtype) -> None:
    """New memory is full of NaN: none of it is left in results or gradients, nor changes a bit of
    them.
    """
    p, q = testing.pair("normal3", 3, vocabulary, 0.3, dtype=dtype)
    mask = torch.tensor([True, False, True], device=implementation.device)
    expected = outcome(p, q, implementation.device, mask=mask)
    poisoned = set()

    def poison(make):
        def call(*args, **kwargs):
            made = make(*args, **kwargs)
            poisoned.add(tuple(made.shape))
            return made.fill_(math.nan) if made.is_floating_point() else made.fill_(7)

        return call

    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poison(getattr(torch.Tensor, name)))
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    results = outcome(p, q, implementation.device, mask=mask)
    monkeypatch.undo()
    assert {(3,), (3, vocabulary)} <= poisoned
    assert_same(results, expected)


def test_slow_path_rows(implementation) -> None:
    """Names the rows that hold an infinity or a NaN, or are far apart, and no other."""
    p, q = testing.pair("normal3", 6, 300, 0.1, device=implementation.device)
    p[1, 3], q[2, 7], q[4] = -math.inf, math.nan, q[4] * 50
    slow = slow_path_rows(p.view(2, 3, -1), q.view(2, 3, -1))
    assert slow.tolist() == [[False, True, True], [False, True, False]]


# ---- special values


def with_holes(
    vocabulary: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, and the entries where holes go: scattered ones, the first, the last and a whole
    stretch.
    """
    p, q = testing.sizes_pair("normal3", (1e-3, 0.1, 1.0), (0.0, 50.0), vocabulary, dtype)
    holes = torch.zeros(vocabulary, dtype=torch.bool)
    holes[::7] = holes[-1] = holes[vocabulary // 2 : vocabulary * 3 // 4] = True
    return p, q, holes


HOLES = [-math.inf, -1e9, -1e4, "lowest"]


def filled(rows: torch.Tensor, holes: torch.Tensor, hole: float | str) -> None:
    """Put a hole's value, or the type's lowest finite number, into rows."""
    lowest = torch.finfo(rows.dtype).min
    rows[:, holes] = (
        lowest if hole == "lowest" else hole if hole == -math.inf else max(hole, lowest)
    )


@pytest.mark.parametrize("hole", [-math.inf, "lowest"])
@pytest.mark.parametrize("vocabulary", [50, 5003])
def test_holes_in_both(implementation, dtype, vocabulary, hole) -> None:
    """-inf, or the lowest finite number, in both: as if the entries were not there; their gradient
    is exactly 0, small KLs keep their digits.
    """
    p, q, holes = with_holes(vocabulary, dtype)
    filled(p, holes, hole)
    filled(q, holes, hole)
    result, *grads = outcome(p, q, implementation.device)
    grads = [grad.cpu() for grad in grads]
    assert not any(bool(grad[:, holes].any()) for grad in grads)
    results = result, *(grad[:, ~holes] for grad in grads)
    check_results(implementation, results, p[:, ~holes], q[:, ~holes])


def test_holes_in_q_only(implementation, dtype) -> None:
    """P has mass where Q has none: +inf, never NaN, in these rows and in no other; one hole in a
    large row is enough.
    """
    p, q, holes = with_holes(5003, dtype)
    expected = kl_divergence(p.to(implementation.device), q.to(implementation.device))
    q[0, holes], q[2, 4999] = -math.inf, -math.inf
    p[2, 4999] = p[2].max()
    result, *grads = outcome(p, q, implementation.device)
    assert result[0] == math.inf and result[2] == math.inf
    testing.assert_same_bits(result[1], expected[1], "the other row")
    assert all(bool(grad[1].isfinite().all()) for grad in grads)


@pytest.mark.parametrize("hole", HOLES)
def test_holes_in_p_only(implementation, dtype, hole) -> None:
    """Q has mass where P has none: a finite KL(P‖Q) and gradients, right, with exactly 0 for P at
    the holes; the other way round a finite logit far below the others gives a finite, huge KL.
    """
    p, q, holes = with_holes(1003 if INTERPRETING else 5003, dtype)
    filled(p, holes, hole)
    results = outcome(p, q, implementation.device)
    check_results(implementation, results, p, q)
    assert not bool(results[1].cpu()[:, holes].any()) and bool(results[2].isfinite().all())
    if hole != -math.inf:
        there = kl_divergence(q.to(implementation.device), p.to(implementation.device))
        testing.assert_kl(there, testing.truth(q, p).kl)


@pytest.mark.parametrize("vocabulary", [9, 1003])
def test_nan_poisons_its_own_row(implementation, dtype, vocabulary) -> None:
    """A NaN, a +inf or nothing but -inf makes its row NaN; the others keep their bits, in the
    results and in the gradients.
    """
    p, q = testing.pair("normal3", 9, vocabulary, 0.3, dtype=dtype)
    expected = outcome(p, q, implementation.device)
    p[1, 4], q[2, vocabulary - 1], p[3], q[4], p[6, 2], q[7, 0] = (math.nan,) * 4 + (math.inf,) * 2
    p[8], q[8] = -math.inf, -math.inf
    results = outcome(p, q, implementation.device)
    assert results[0].isnan().tolist() == [False, True, True, True, True, False, True, True, True]
    assert_same([value[::5] for value in results], [value[::5] for value in expected])
