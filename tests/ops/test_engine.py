"""The row functions as the functions on hidden states and the losses use them: soft-capped logits,
rows of any stride, gradients in place and of another type, losses for any upstream gradient.
"""

import math

import cases
import pytest
import torch
from cases import FLOATS, Rows, padded

import fastkl
from fastkl import testing
from fastkl.ops.fields import FIELDS, Scaling

ROWS = 6


def rows_on(device: str, p, q, scaling: Scaling) -> tuple[Rows, dict]:
    mask, temperature = torch.arange(len(p)) != 2, torch.linspace(0.5, 1.5, len(p))
    if isinstance(scaling.ratio, torch.Tensor):
        scaling = scaling._replace(ratio=scaling.ratio.to(device))
    given = [value.to(device) for value in (p, q, cases.random_tokens(p), mask, temperature)]
    return Rows(*given, scaling), dict(zip(FIELDS, cases.upstream_of(p).to(device), strict=True))


def truth(rows: Rows, upstream) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor, ...]]:
    p, q = (side.detach().double().cpu().requires_grad_() for side in rows[:2])
    softcap, ref_softcap, ratio = rows.scaling
    x, y = (
        cap * torch.tanh(side / cap) if cap else side
        for side, cap in ((p, softcap), (q, ref_softcap))
    )
    y = y * (ratio.double().cpu()[:, None] if isinstance(ratio, torch.Tensor) else ratio)
    tokens, mask, temperature = (value.cpu() for value in rows[2:5])
    stats = testing.truth(x, y, temperature).stats(tokens)
    fields = {name: torch.where(mask, value, 0.0) for name, value in stats.items()}
    total = sum((fields[name] * value.double().cpu()).sum() for name, value in upstream.items())
    grads = torch.autograd.grad(total, (p, q))
    return {name: value.detach() for name, value in fields.items()}, grads


def assert_right(implementation, rows: Rows, upstream, grads) -> None:
    """Fields and gradients agree with float64; a logit's own rounding is in the truth, a gradient's
    is allowed for.
    """
    fields, exact = truth(rows, upstream)
    made = cases.run(implementation.backend, rows, upstream, grads, FIELDS)
    cap = max(rows.scaling[:2])
    for name, value in made.fields.items():
        # tanh is right to 2e-7 of the cap for 16-bit logits.
        testing.assert_near(value, fields[name], 2e-5, 5e-6 + 1e-6 * cap, name)
    short = 2.0**-7 if implementation.interpreted else 2.0**-8
    rounding = {torch.float32: 0.0, torch.bfloat16: short, torch.float16: 2.0**-11}
    # Of 16-bit rows q - p is the difference of two powers of 2, which a GPU computes to 2^-22.5.
    weights = sum(upstream[name].abs() for name in ("kl", "ref_kl") if name in upstream).cpu()
    absolute = 2.0**-21.5 * float((weights / torch.as_tensor(rows.temperature).cpu()).norm())
    for grad, value in zip(made.grads, exact, strict=True):
        error = (grad.double().cpu() - value).norm()
        least = 1e-6 if grad.dtype == torch.float32 else max(1e-6, absolute)
        assert error <= (2e-5 + rounding[grad.dtype]) * value.norm() + least, float(error)
        assert not bool(grad[2].any()), "a masked row has a gradient"


@pytest.mark.parametrize("softcap", [0.0, 2.0, 30.0])
@pytest.mark.parametrize("in_place", [FIELDS, ("kl",), ()], ids=["all", "kl", "elsewhere"])
@pytest.mark.parametrize("vocabulary", [1, 37, 2050])
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_against_float64(implementation, dtype, vocabulary, in_place, softcap) -> None:
    if implementation.interpreted and vocabulary != 37 and not (in_place and softcap == 2.0):
        pytest.skip("one row of another length in the interpreter is enough")
    pair = testing.pair("normal3", ROWS, vocabulary, 0.7, dtype=dtype)
    rows, upstream = rows_on(implementation.device, *pair, Scaling(softcap, softcap))
    p, q, *elsewhere = (padded(side, -vocabulary % 64) for side in (*rows[:2], *rows[:2]))
    upstream = {name: upstream[name] for name in in_place or FIELDS}
    rows = rows._replace(p=p, q=q)
    assert_right(implementation, rows, upstream, (p, q) if in_place else elsewhere)


SCALINGS = {
    "cap of q": Scaling(0.0, 5.0),
    "cap of p, ratio": Scaling(3.0, 0.0, 0.625),
    "ratio per row": Scaling(ratio=torch.linspace(0.3, 2.0, ROWS)),
    "two caps": Scaling(20.0, 30.0, 1.0),
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_each_tensor_has_a_scaling(implementation, dtype, far, scaling) -> None:
    p, q = testing.pair("normal3", ROWS, 37, 0.7, dtype=dtype)
    if far:
        q[:, 5], q[:, 7] = q[:, 5] + 60.0, -3e4
    rows, upstream = rows_on(implementation.device, p, q, scaling)
    assert_right(implementation, rows, upstream, None)


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary, padding", [(40, 0), (40, 152), (131, 0), (131, 61)])
def test_16_bit_gradients_of_float32(implementation, vocabulary, padding, grad_dtype) -> None:
    pair = testing.pair("normal3", ROWS, vocabulary, 0.7)
    rows, upstream = rows_on(implementation.device, *pair, Scaling())
    wide = cases.run(implementation.backend, rows, upstream).grads
    if implementation.interpreted and grad_dtype == torch.bfloat16:  # it truncates
        wide = [(grad.view(torch.int32) & -65536).view(torch.float32) for grad in wide]
    narrow = [padded(side.to(grad_dtype), padding) for side in rows[:2]]
    cases.run(implementation.backend, rows, upstream, narrow)
    cases.assert_same(narrow, [grad.to(grad_dtype) for grad in wide])


LOGITS = [0.0, 1e-20, 1e-4, -0.3, 0.999, 1.001, 4.0, -7.0]
LOGITS += [40.0, -300.0, 1e30, -1e30, math.inf, -math.inf, 14.9, -15.1]


def test_soft_cap_of_any_logit(implementation) -> None:
    """From tiny to infinite: cap·tanh(x/cap), a slope of 0 where it saturates, NaN stays NaN in its
    row alone.
    """
    values = torch.tensor(LOGITS)
    p, q = values.repeat(4, 1), values.repeat(4, 1)
    p[3], q[0], p[3, 3] = values.flip(0), values.flip(0), math.nan
    rows, upstream = rows_on(implementation.device, p, q, Scaling(30.0, 30.0))
    rows = rows._replace(temperature=torch.ones_like(rows.temperature))
    fields, exact = truth(rows, upstream)
    made = cases.run(implementation.backend, rows, upstream)
    for name, value in made.fields.items():
        testing.assert_near(value[:3], fields[name][:3], 2e-6, 1e-6, name)
    assert bool(made.fields["kl"][1] == 0) and bool(made.fields["kl"][3].isnan())
    for grad, value in zip(made.grads, exact, strict=True):
        # The truth's slope at an infinite logit is 1 - 1 = 0, as here.
        assert (grad.double().cpu() - value)[:3].norm() < 1e-5 * value[:3].norm()


LOSSES = {
    "mean": lambda p, q, mask: fastkl.kl_divergence(
        p, q, mask, temperature=1.5, reduction="mean", normalizer=5.0
    ),
    "penalty": fastkl.KLPenalty(0.05, temperature=1.5, reduction="sequence_mean"),
}


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_for_any_upstream_gradient(implementation, loss, dtype, monkeypatch) -> None:
    """1, others, once more through a retained graph, in a graph, and in a batch: the gradient of
    the KL per token, weighed; with the kernels in one launch, where the configuration has it so.
    """
    vocabulary = 520 if implementation.interpreted else 1003
    pair = testing.pair("normal3", 6, vocabulary, 0.1, dtype=dtype, seed=2)
    p, q = (side.view(2, 3, -1).to(implementation.device) for side in pair)
    mask = torch.tensor([[True, True, False], [True, False, True]], device=p.device)
    if implementation.kernels:
        monkeypatch.setattr("fastkl.kernels.config.fuses", lambda arch: True)
    x, factor = testing.leaf(p.clone()), 0.2 if loss == "mean" else 0.025
    per_token = fastkl.kl_divergence(x, q, mask, temperature=1.5)
    (once,) = torch.autograd.grad(per_token, x, factor * mask)
    value = LOSSES[loss](x, q, mask)
    torch.testing.assert_close(value, factor * per_token.sum())
    assert loss == "penalty" or ("SummedKL" in value.grad_fn.name()) == (dtype != torch.float16)
    single = {"rtol": 1e-4 if implementation.kernels else 1e-6, "atol": 1e-9}
    close = single if dtype == torch.float32 else {"rtol": 2.0**-7, "atol": 2e-7}

    def check(value, upstream, **keywords) -> torch.Tensor:
        upstream = value.new_tensor(upstream)
        (grad,) = torch.autograd.grad(value, x, upstream, **keywords)
        expected = upstream.view(-1, 1, 1, 1) * once if upstream.dim() else upstream * once
        torch.testing.assert_close(grad.detach().clone(), expected.to(grad), **close)
        return grad

    for upstream in (1.0, 0.3, -2.0):
        check(value, upstream, retain_graph=True)
    assert not check(value, [2.0, 0.0], is_grads_batched=True, retain_graph=True)[1].any()
    check(LOSSES[loss](x, q, mask), 0.3)
    graph = check(LOSSES[loss](x, q, mask), 1.0, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        graph.float().sum().backward()
