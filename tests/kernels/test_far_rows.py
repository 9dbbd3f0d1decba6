"""Rows whose two distributions lie far apart, and rows of huge logits: every field and gradient
against float64.

FASTKL_FAR_ROWS=20000 checks that many rows instead of a few hundred, newly drawn.
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import cases
import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from fastkl import kl_divergence, testing, token_stats

ROWS = 16
FIELDS = ("logprob", "entropy", "ref_logprob", "kl", "ref_kl")
FILLS = (-100.0, -1e3, -1e4, -1e6, -1e9, -1e15, -1e30, torch.finfo(torch.float32).min, -math.inf)
WANTED = int(os.environ.get("FASTKL_FAR_ROWS", "0"))


@pytest.fixture(autouse=True)
def multiply_adds(implementation) -> None:
    """Round multiply-adds as a GPU does."""
    if implementation.interpreted:
        cases.compute_as_a_gpu()


class Family(NamedTuple):
    """Parameters of ROWS rows, drawn with the random numbers of `seed`."""

    seed: int
    vocabulary: int
    spread: float  # of P's logits
    difference: float  # between the logits of P and Q
    peaks: tuple[float, float]  # height of one entry of P and of one of Q
    same_peak: bool
    masked: (
        str  # which side holds `fill`: "p", "q", "both", "apart" (other entries on each side) or ""
    )
    fill: float
    shift: float
    scale: float
    temperature: float
    dtype: torch.dtype
    field: str


FAMILIES = st.builds(
    Family,
    seed=st.integers(0, 2**31),
    vocabulary=st.sampled_from((2, 7, 64, 300)),
    spread=st.sampled_from((0.0, 1.0, 3.0)),
    difference=st.sampled_from((0.0, 1e-3, 0.1, 1.0)),
    peaks=st.tuples(*[st.sampled_from((0.0, 6.0, 9.0, 12.0, 16.0, 20.0, 40.0, 90.0))] * 2),
    same_peak=st.booleans(),
    masked=st.sampled_from(("", "p", "q", "both", "apart")),
    fill=st.sampled_from(FILLS),
    shift=st.sampled_from((0.0, 0.0, 50.0, 1e3, -1e4, 1e6)),
    scale=st.sampled_from((1.0,) * 6 + (1e2, 1e4, 1e10, 1e20, 1e30)),
    temperature=st.sampled_from((1.0, 1.0, 0.7, 1.3, 1e-2, 30.0)),
    dtype=st.sampled_from((torch.float32,) * 3 + (torch.bfloat16, torch.float16)),
    field=st.sampled_from((*FIELDS, "kl alone")),
)


def make(family: Family) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(P's logits, Q's, tokens) of a family."""
    generator = torch.Generator().manual_seed(family.seed)
    shape = ROWS, family.vocabulary

    def positions() -> torch.Tensor:
        return torch.randint(family.vocabulary, (ROWS, 1), generator=generator)

    x = family.spread * torch.randn(shape, generator=generator)
    y = x + family.difference * torch.randn(shape, generator=generator)
    first, second = positions(), positions()
    x.scatter_add_(1, first, torch.full((ROWS, 1), family.peaks[0]))
    y.scatter_add_(1, first if family.same_peak else second, torch.full((ROWS, 1), family.peaks[1]))
    x, y = x * family.scale, y * family.scale + family.shift
    smallest = (
        max(family.fill, torch.finfo(family.dtype).min) if family.fill > -math.inf else family.fill
    )
    mask, other = (torch.rand(shape, generator=generator) < 0.3 for _ in range(2))
    keep = positions()
    mask.scatter_(1, keep, False)
    other.scatter_(1, keep, False)
    if family.masked in ("p", "both", "apart"):
        x[mask] = smallest
    if family.masked in ("q", "both"):
        y[mask] = smallest
    if family.masked == "apart":
        y[other] = smallest
    largest = torch.finfo(family.dtype).max
    finite = [
        torch.where(side > -math.inf, side.clamp(-largest, largest), side).to(family.dtype)
        for side in (x, y)
    ]
    return *finite, positions()[:, 0]


class Answer(NamedTuple):
    """Fields [ROWS] and the gradients of one field to both logits [ROWS, V]."""

    fields: dict[str, torch.Tensor]
    p: torch.Tensor
    q: torch.Tensor


def truth(
    x: torch.Tensor, y: torch.Tensor, tokens: torch.Tensor, temperature: float, field: str
) -> Answer:
    """Closed forms in float64: p = 0 adds nothing to an expectation under P, whatever log q is."""
    exact = testing.truth(x, y, temperature)
    sides = testing.gradients(exact, {field: torch.ones(ROWS)}, tokens, temperature)
    return Answer(exact.stats(tokens), *sides)


def same_precision(
    x: torch.Tensor, y: torch.Tensor, tokens: torch.Tensor, temperature: float, field: str
) -> list[torch.Tensor]:
    """Both gradients as plain torch computes them in float32."""
    x, y = (side.float().requires_grad_() for side in (x, y))
    log_p, log_q = (x / temperature).log_softmax(-1), (y / temperature).log_softmax(-1)
    index = tokens[:, None]
    value = {
        "logprob": lambda: log_p.gather(-1, index),
        "entropy": lambda: -(log_p.exp() * log_p),
        "ref_logprob": lambda: log_q.gather(-1, index),
        "kl": lambda: log_p.exp() * (log_p - log_q),
        "ref_kl": lambda: log_q.exp() * (log_q - log_p),
    }[field]()
    return [
        torch.zeros_like(side) if grad is None else grad
        for side, grad in zip(
            (x, y), torch.autograd.grad(value.sum(), (x, y), allow_unused=True), strict=True
        )
    ]


def run(
    x: torch.Tensor,
    y: torch.Tensor,
    tokens: torch.Tensor,
    temperature: float,
    field: str,
    device: str,
) -> Answer:
    """Run fastkl on a family's rows."""
    x, y = (side.to(device).requires_grad_() for side in (x, y))
    if field == "kl alone":
        fields = {"kl": kl_divergence(x, y, temperature=temperature)}
    else:
        fields = token_stats(x, tokens.to(device), y, temperature=temperature)._asdict()
        fields = {name: fields[name] for name in FIELDS}
    grads = torch.autograd.grad(fields[field.split()[0]].sum(), (x, y), allow_unused=True)
    grads = [
        torch.zeros_like(side) if grad is None else grad
        for side, grad in zip((x, y), grads, strict=True)
    ]
    return Answer(
        {name: value.detach().double().cpu() for name, value in fields.items()},
        *(grad.double().cpu() for grad in grads),
    )


def rounding(exact: torch.Tensor, dtype: torch.dtype, implementation) -> torch.Tensor:
    """The largest error of each entry in a gradient's type, where float32 has it right to 4e-6 of
    itself.

    Triton's interpreter truncates where a GPU rounds to bfloat16: a unit in the last place on one
    side of a boundary.
    """
    errors = []
    for value in (exact, exact * (1 - 4e-6)):
        if implementation.interpreted and dtype == torch.bfloat16:
            near = (value.float().view(torch.int32) & -65536).view(torch.float32)
        else:
            near = value.to(dtype)
        errors.append((exact - near.double()).abs())
    return torch.maximum(*errors)


def assert_right(family: Family, implementation) -> None:
    """Every field and both gradients of a family's rows within the bounds; raises with the worst."""
    x, y, tokens = make(family)
    name = family.field.split()[0]
    exact = truth(x, y, tokens, family.temperature, name)
    got = run(x, y, tokens, family.temperature, family.field, implementation.device)
    for field, value in got.fields.items():
        expected = exact.fields[field].float().double()
        kl = field in ("kl", "ref_kl")
        allowed = testing.kl_tolerance(expected.abs()) if kl else 2e-6 * expected.abs() + 2e-6
        right = torch.where(
            expected.isfinite(), (value - expected).abs() <= allowed, value == expected
        ) | (value.isnan() & expected.isnan())
        # A result that float32 rounds to its largest number or to infinity.
        right |= (expected.abs() > 3e38) & (value.abs() > 3e38)
        assert bool(right.all()), (
            f"{field}: got {value[~right][0]:.9g}, expected {expected[~right][0]:.9g} of {family}"
        )
        assert (
            bool((value >= 0).logical_or(value.isnan()).all())
            if kl or field == "entropy"
            else bool((value <= 0).all())
        ), (field, family)
        assert not bool(((value == 0) & value.signbit()).any()) or not (kl or field == "entropy"), (
            field,
            family,
        )
    for side, plain in zip(
        "pq", same_precision(x, y, tokens, family.temperature, name), strict=True
    ):
        expected, gradient = getattr(exact, side), getattr(got, side)
        norm = expected.norm(dim=-1)
        error, plains_error = (
            (value.double() - expected).norm(dim=-1) for value in (gradient, plain)
        )
        counted = expected.isfinite().all(-1) & (expected.abs() < 3e38).all(-1)
        if family.dtype == torch.float16:
            counted &= (expected.abs() < 6e4).all(-1)
        plains_error = torch.where(plains_error.isfinite() & counted, plains_error, 0.0)
        # A family's rows are alike: plain torch is right by luck in one or the other.
        own = torch.maximum(
            plains_error.max(),
            torch.where(counted, plains_error / norm.clamp(min=1e-30), 0.0).max() * norm,
        )
        absolute = 3e-13 / family.temperature
        if "kl" not in name and implementation.kernels:
            # Beside a near-certain token, 1 - p and log p + entropy are no better known than
            # log-probabilities are.
            absolute += 2e-6 / family.temperature
        if family.dtype != torch.float32:
            # A gradient's own rounding, and that of the difference of two probabilities rounded in
            # float32.
            absolute += (
                rounding(expected, family.dtype, implementation).norm(dim=-1) * 1.01
                + 1e-6 / family.temperature
            )
        wrong = counted & ~(error <= torch.maximum(1e-5 * norm, own) + absolute)
        if bool(wrong.any()):
            row = int(wrong.int().argmax())
            raise AssertionError(
                f"gradient of {name} to {side}: relative error {error[row] / norm[row]:.3g} of "
                f"{norm[row]:.3g}, plain torch "
                f"{own[row] / norm[row]:.3g}: {family}"
            )


def test_far_rows(implementation) -> None:
    """Masks, peaks, shifts, scales and temperatures of every size, in each type, all fields and
    both sides.
    """
    rows = WANTED or (160 if implementation.interpreted else 640)

    @hypothesis.settings(
        max_examples=rows // ROWS,
        deadline=None,
        database=None,
        derandomize=not WANTED,
        phases=[hypothesis.Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(FAMILIES)
    def check(family: Family) -> None:
        assert_right(family, implementation)

    check()
