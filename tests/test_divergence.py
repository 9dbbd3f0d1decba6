"""kl_divergence: its digits against fp64, and its properties."""

import math

import pytest
import torch
from cases import FLOATS, INTERPRETING, Rows, check, outcome, padded

from fastkl import kl_divergence, testing, token_stats

# Sizes of log q - log p: a KL from about 1e-8 to 1e2 on rows of KINDS, and up to 1e4.
SIZES = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
SHIFTS = (0.0, 50.0, -50.0)
LONG = 9003 if INTERPRETING else 50257


# ---- accuracy


@pytest.mark.parametrize("kind", testing.KINDS)
@pytest.mark.parametrize("vocabulary", [1000, LONG] if INTERPRETING else [1000, 50257, 128256])
def test_against_fp64(implementation, kind, vocabulary, dtype) -> None:
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
    if dtype == torch.float16:
        pytest.skip("logits as far apart overflow fp16")
    vocabulary = 300 if INTERPRETING else 50257
    p, q = testing.sizes_pair(kind, (200.0, 2000.0), (0.0, 50.0), vocabulary, dtype)
    check(implementation, p, q)
    check(implementation, q, p)


# Entries without probability whose logits differ by hundreds and thousands, beside small
# differences everywhere else.
def suppressed(places: tuple[int, ...], shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    p, q = testing.pair("normal3", 4, 1003, 1e-3)
    for row, apart in enumerate((-100.0, -300.0, -3000.0, 40.0)):
        p[row, places], q[row, places] = -1000.0, -1000.0 + apart
    return p, q + shift


def shifted(shift_p: float, shift_q: float) -> tuple[torch.Tensor, torch.Tensor]:
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
    check(implementation, *FLOAT32_ROWS[name]())


ROWS = {
    **{
        f"V = {vocabulary}": lambda vocabulary=vocabulary: testing.sizes_pair(
            "normal3",
            (1e-3, 0.1, 1.0, 5.0) if vocabulary <= 4097 else (0.1, 1.0),
            SHIFTS,
            vocabulary,
        )
        for vocabulary in (1, 2, 3, 7, 8, 9, 127, 4096, 4097, 32768, 32769, 50257, 262144)
        if vocabulary <= (32769 if INTERPRETING else 262144)
    },
    # All logits far below 0, where e^x is 0 in float32, or far above.
    **{
        f"about {level:g}": lambda level=level: [
            side + level for side in testing.pair("normal3", 4, 1003, 0.5)
        ]
        for level in (-90.0, -1e4, 1e4)
    },
    # Rows that have nothing to do with each other, whose logits lie 1e4 apart.
    **{
        f"times {scale:g}": lambda scale=scale: [
            testing.pair("normal1", 3, 1003, 0.0, seed=seed)[0] * scale for seed in (0, 1)
        ]
        for scale in (1e3, 1e4)
    },
}


@pytest.mark.parametrize("name", ROWS)
def test_sizes_of_rows_and_logits(implementation, name, dtype) -> None:
    check(implementation, *(side.to(dtype) for side in ROWS[name]()))


MIXED = [("fp32", "bf16"), ("bf16", "fp32"), ("fp16", "bf16"), ("bf16", "fp16")]


@pytest.mark.parametrize("policy, ref", MIXED)
@pytest.mark.parametrize("vocabulary", [1003, 4096])
def test_mixed_types(implementation, policy, ref, vocabulary) -> None:
    p, q = testing.sizes_pair("normal3", (1e-3, 0.1, 1.0, 10.0), SHIFTS, vocabulary)
    check(implementation, p.to(FLOATS[policy]), q.to(FLOATS[ref]))


# ---- properties


@pytest.mark.parametrize("kind", testing.KINDS[:: 2 if INTERPRETING else 1])
@pytest.mark.parametrize("vocabulary", [2, 1003] if INTERPRETING else [2, 4099])
def test_never_negative(implementation, dtype, vocabulary, kind) -> None:
    p, q = testing.sizes_pair(kind, (1e-7, 1e-6, 1e-5, 1e-4), SHIFTS, vocabulary, dtype)
    p, q = p.to(implementation.device), q.to(implementation.device)
    # Rows that the kernels read again, too.
    p[::2, 0], q[::2, 0] = -math.inf, -math.inf
    stats = token_stats(p, torch.ones(len(p), dtype=torch.long, device=p.device), q)
    assert all(bool((kl >= 0).all()) for kl in (kl_divergence(p, q), stats.kl, stats.ref_kl))


@pytest.mark.parametrize("vocabulary", [1, 129, 4099] if INTERPRETING else [1, 129, 4096, 50257])
def test_identical_rows(implementation, dtype, vocabulary) -> None:
    rows = [testing.pair(kind, 1, vocabulary, 0.0, dtype=dtype)[0] for kind in testing.KINDS[::2]]
    p = torch.cat(rows).to(implementation.device)
    if vocabulary > 1:
        p[1, 1::3] = -math.inf
    for name, q in (("the same", p), ("a copy", p.clone()), ("elsewhere", padded(p, 0, 1))):
        for value in outcome(Rows(p, q), implementation.device):
            assert bool((value == 0).all()), f"{name}: up to {value.abs().max():.3g}"


@pytest.mark.parametrize("kind", testing.KINDS)
def test_gradients_sum_to_zero(implementation, kind) -> None:
    p, q = testing.sizes_pair(kind, (0.01, 0.1, 1.0), SHIFTS, 1003 if INTERPRETING else 5003)
    for grad in outcome(Rows(p, q), implementation.device)[1:]:
        grad = grad.double()
        assert bool((grad.sum(-1).abs() <= 1e-5 * grad.abs().sum(-1)).all())


PER_ROW = torch.tensor([[0.25, 0.5, 1.0], [1.5, 2.0, 0.75]])


@pytest.mark.parametrize(
    "temperature",
    [0.25, 0.7, 1, 3.0, PER_ROW, PER_ROW.bfloat16()],
    ids=["0.25", "0.7", "1", "3.0", "per row", "per row in bfloat16"],
)
def test_temperature(implementation, temperature, dtype, tokens_of) -> None:
    pair = testing.sizes_pair("normal3", (1e-3, 1e-2, 0.1, 1.0, 3.0, 5.0), (0.0, 7.0), 515, dtype)
    p, q = (value.view(2, 3, -1) for value in pair)
    tokens = tokens_of(p)
    check(implementation, p, q, temperature, tokens if tokens is None else tokens.short())
