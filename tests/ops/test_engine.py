"""The row functions as the functions on hidden states use them: soft-capped logits, rows of any
stride, gradients in place and of another type.
"""

from __future__ import annotations

import math

import cases
import pytest
import torch

from fastkl import testing
from fastkl.ops import engine
from fastkl.ops.fields import FIELDS, SAVED, Scaling

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROWS = 6


@pytest.fixture(autouse=True)
def multiply_adds(implementation) -> None:
    """As a GPU rounds them."""
    if implementation.interpreted:
        cases.compute_as_a_gpu()


def padded(values: torch.Tensor, width: int) -> torch.Tensor:
    """The same rows, `width` elements apart, with NaN between them."""
    room = torch.full((values.shape[0], width), math.nan, dtype=values.dtype, device=values.device)
    return room[:, : values.shape[1]].copy_(values)


def scaling_of(softcap: float | Scaling) -> Scaling:
    """A soft cap of both tensors, or any scaling."""
    return softcap if isinstance(softcap, Scaling) else Scaling(softcap, softcap)


def run(
    implementation, p, q, tokens, mask, temperature, upstream, grads, softcap
) -> dict[str, torch.Tensor]:
    """All fields of rows, and their gradients written into `grads`."""
    rows = p.shape[0]
    outputs = {name: torch.full((rows,), math.nan, device=p.device) for name in FIELDS}
    saved = torch.full((rows, SAVED), math.nan, device=p.device)
    scaling, weights = scaling_of(softcap), dict(zip(FIELDS, upstream, strict=True))
    engine.forward(implementation.backend, p, q, tokens, mask, temperature, outputs, saved, scaling)
    engine.backward(
        implementation.backend, p, q, tokens, mask, temperature, saved, weights, *grads, scaling
    )
    return outputs


def truth(
    p, q, tokens, mask, temperature, upstream, softcap
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Fields and gradients in float64, by autograd through plain torch."""
    p, q = (side.detach().double().cpu().requires_grad_() for side in (p, q))
    scaling = scaling_of(softcap)
    x, y = (
        cap * torch.tanh(side / cap) if cap else side
        for side, cap in ((p, scaling.softcap), (q, scaling.ref_softcap))
    )
    y = y * (
        scaling.ratio.double().cpu()[:, None]
        if isinstance(scaling.ratio, torch.Tensor)
        else scaling.ratio
    )
    stats = testing.truth(x, y, temperature.double().cpu()).stats(tokens.cpu())
    fields = {name: torch.where(mask.cpu(), value, 0.0) for name, value in stats.items()}
    total = sum(
        (value * weight.double().cpu()).sum()
        for value, weight in zip(fields.values(), upstream, strict=True)
    )
    return {name: value.detach() for name, value in fields.items()}, *torch.autograd.grad(
        total, (p, q)
    )


def relative(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Error in L2 norm, relative to the truth's."""
    return float((result.double().cpu() - exact).norm() / exact.norm())


@pytest.mark.parametrize("softcap", [0.0, 2.0, 30.0])
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "elsewhere"])
@pytest.mark.parametrize("vocabulary", [1, 37, 2050])
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_against_float64(implementation, dtype, vocabulary, in_place, softcap) -> None:
    """Fields and gradients in padded rows, one row masked; a logit's own rounding is in the truth,
    a gradient's is allowed for.
    """
    if implementation.interpreted and vocabulary == 2050 and not (in_place and softcap == 2.0):
        pytest.skip("one long row in the interpreter is enough")
    device = implementation.device
    p, q = testing.pair("normal3", ROWS, vocabulary, 0.7, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(vocabulary, (ROWS,), generator=generator).to(device)
    mask = (torch.arange(ROWS) != 2).to(device)
    temperature = (0.5 + torch.rand(ROWS, generator=generator)).to(device)
    upstream = torch.randn(5, ROWS, generator=generator).to(device)
    expected, *gradients = truth(p, q, tokens, mask, temperature, upstream, softcap)

    width = -(-vocabulary // 64) * 64
    p, q = padded(p.to(device), width), padded(q.to(device), width)
    grads = (
        (p, q)
        if in_place
        else tuple(padded(torch.full_like(side, math.nan), width) for side in (p, q))
    )
    results = run(implementation, p, q, tokens, mask, temperature, upstream, grads, softcap)
    for name, value in results.items():
        # tanh is right to 2e-7 of the cap for 16-bit logits.
        testing.assert_near(value, expected[name], 2e-5, 5e-6 + 1e-6 * softcap, name)
    rounding = {
        torch.float32: 0.0,
        torch.bfloat16: 2.0**-7 if implementation.interpreted else 2.0**-8,
        torch.float16: 2.0**-11,
    }[dtype]
    for name, grad, exact in zip(("p", "q"), grads, gradients, strict=True):
        if vocabulary > 1:
            assert relative(grad, exact) <= 2e-5 + rounding, (
                f"gradient to {name}: {relative(grad, exact)}"
            )
        assert bool((grad[2] == 0).all()), "a masked row has a gradient"


@pytest.mark.parametrize(
    "scaling",
    [
        Scaling(0.0, 5.0),
        Scaling(3.0, 0.0, 0.625),
        Scaling(ratio=torch.linspace(0.3, 2.0, ROWS)),
        Scaling(20.0, 30.0, 1.0),
    ],
    ids=["cap of q", "cap of p, ratio", "ratio per row", "two caps"],
)
@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_each_tensor_has_a_scaling(implementation, dtype, far, scaling) -> None:
    """Two soft caps, and a ratio of inverse temperatures: fields and gradients to the raw logits."""
    device, vocabulary = implementation.device, 37
    p, q = testing.pair("normal3", ROWS, vocabulary, 0.7, dtype=dtype)
    if far:
        q[:, 5] = q[:, 5] + 60.0
        q[:, 7] = -3e4
    tokens, mask = torch.arange(ROWS, device=device), (torch.arange(ROWS) != 2).to(device)
    temperature = torch.linspace(0.5, 1.5, ROWS).to(device)
    upstream = torch.randn(5, ROWS, generator=torch.Generator().manual_seed(3)).to(device)
    expected, *gradients = truth(p, q, tokens, mask, temperature, upstream, scaling)
    if isinstance(scaling.ratio, torch.Tensor):
        scaling = scaling._replace(ratio=scaling.ratio.to(device))
    p, q = p.to(device), q.to(device)
    grads = torch.empty_like(p), torch.empty_like(q)
    for name, value in run(
        implementation, p, q, tokens, mask, temperature, upstream, grads, scaling
    ).items():
        testing.assert_near(
            value,
            expected[name],
            2e-5,
            5e-6 + 1e-6 * max(scaling.softcap, scaling.ref_softcap),
            name,
        )
    rounding = {
        torch.float32: 0.0,
        torch.bfloat16: 2.0**-7 if implementation.interpreted else 2.0**-8,
        torch.float16: 2.0**-11,
    }[dtype]
    for name, grad, exact in zip(("p", "q"), grads, gradients, strict=True):
        assert relative(grad, exact) <= 2e-5 + rounding, (
            f"gradient to {name}: {relative(grad, exact)}"
        )


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [40, 131])
def test_16_bit_gradients_of_float32_logits(implementation, vocabulary, grad_dtype) -> None:
    """The float32 gradients, rounded."""
    device = implementation.device
    p, q = (side.to(device) for side in testing.pair("normal3", ROWS, vocabulary, 0.7))
    tokens, mask = (
        torch.arange(ROWS, device=device),
        torch.ones(ROWS, dtype=torch.bool, device=device),
    )
    upstream = torch.randn(5, ROWS, generator=torch.Generator().manual_seed(0)).to(device)
    wide = (torch.empty_like(p), torch.empty_like(q))
    run(implementation, p, q, tokens, mask, 1.0, upstream, wide, 0.0)
    for width in (vocabulary, 192):
        narrow = tuple(padded(torch.zeros_like(side, dtype=grad_dtype), width) for side in (p, q))
        run(implementation, p, q, tokens, mask, 1.0, upstream, narrow, 0.0)
        for grad, exact in zip(narrow, wide, strict=True):
            if (
                implementation.interpreted and grad_dtype == torch.bfloat16
            ):  # the interpreter truncates
                exact = (exact.view(torch.int32) & -65536).view(torch.float32)
            assert torch.equal(grad, exact.to(grad_dtype))


def test_soft_cap_of_any_logit(implementation) -> None:
    """From tiny to infinite: cap·tanh(x/cap), a slope of 0 where it saturates, NaN stays NaN in its
    row alone.
    """
    device = implementation.device
    values = torch.tensor(
        [
            0.0,
            1e-20,
            1e-4,
            -0.3,
            0.999,
            1.001,
            4.0,
            -7.0,
            40.0,
            -300.0,
            1e30,
            -1e30,
            math.inf,
            -math.inf,
            14.9,
            -15.1,
        ]
    )
    p, q = (
        torch.stack([values, values, values.flip(0)]).to(device),
        torch.stack([values.flip(0), values, values]).to(device),
    )
    p[2, 3] = math.nan
    tokens, mask, temperature = (
        torch.tensor([5, 12, 0], device=device),
        torch.ones(3, dtype=torch.bool, device=device),
        torch.ones(3, device=device),
    )
    upstream = torch.ones(5, 3, device=device)
    grads = (torch.empty_like(p), torch.empty_like(q))
    expected, grad_p, grad_q = truth(p, q, tokens, mask, temperature, upstream, 30.0)
    results = run(implementation, p, q, tokens, mask, 1.0, upstream, grads, 30.0)
    for name, value in results.items():
        testing.assert_near(value[:2], expected[name][:2], 2e-6, 1e-6, name)
    assert bool(results["kl"][1] == 0) and bool(results["kl"][2].isnan())
    for grad, exact in zip(grads, (grad_p, grad_q), strict=True):
        # The truth's slope at an infinite logit is 1 - 1 = 0, as here.
        assert relative(grad[:2], exact[:2]) < 1e-5
