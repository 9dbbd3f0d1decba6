"""The custom ops under the functions on hidden states: opcheck, and what only they know."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import fastkl
from fastkl.ops import linear_op

FIELDS = "logprob,entropy,ref_logprob,kl,ref_kl"
V, H, H_REF = 11, 4, 3
# Participants: with bias, reference ("none", "own", "shared"), mask, temperatures (and ratios),
# softcap, chunk_size, leading shape.
MIXES = [
    (False, "own", False, False, 0.0, None, (3,)),
    (True, "own", True, True, 2.0, 2, (2, 2)),
    (True, "shared", True, False, 0.0, 1, (3,)),
    (False, "shared", False, True, 5.0, None, (2, 1)),
    (False, "own", True, False, 0.0, None, (0, 2)),
    (False, "own", False, False, 0.0, None, ()),
]
POLICY_ALONE = [
    (False, "none", False, False, 0.0, None, (3,)),
    (True, "none", True, True, 3.0, 2, (2, 2)),
]


def skip_if_interpreted(implementation, mix: tuple) -> None:
    """What opcheck looks at does not depend on the kernels: every mix on the reference, and in the
    interpreter the one in which most takes part.
    """
    if implementation.interpreted and mix != MIXES[1]:
        pytest.skip("the ops' rules for this mix are checked on the reference")


def arguments(
    device: str, mix: tuple, dtype: torch.dtype = torch.float32, grad: bool = False
) -> SimpleNamespace:
    """The six tensors in the ops' order, and the rest by name."""
    bias, reference, mask, temperatures, softcap, chunk_size, leading = mix
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(grad)

    width = H if reference == "shared" else H_REF
    six = (
        random(*leading, H),
        random(V, H),
        random(V) if bias else None,
        random(*leading, width) if reference != "none" else None,
        random(V, H_REF) if reference == "own" else None,
        random(V) if bias and reference != "none" else None,
    )
    per_row = {
        "tokens": torch.randint(V, leading, generator=generator),
        "mask": torch.rand(leading, generator=generator) < 0.7 if mask else None,
        "temperatures": 0.5 + torch.rand(leading, generator=generator) if temperatures else None,
        "ratios": 0.5 + torch.rand(leading, generator=generator)
        if temperatures and reference != "none"
        else None,
        "weights": torch.randn(leading, generator=generator),
        "upstream": torch.randn(5, *leading, generator=generator),
    }
    per_row = {
        name: value if value is None else value.to(device) for name, value in per_row.items()
    }
    return SimpleNamespace(
        six=six,
        temperature=1.0 if temperatures else 0.7,
        scaling=(softcap, softcap / 2, 1.0 if temperatures or reference == "none" else 1.5),
        chunk_size=chunk_size,
        **per_row,
    )


def wrt_of(six: tuple) -> str:
    """Every tensor that is there."""
    return ",".join(
        name for name, value in zip(linear_op.SIX, six, strict=True) if value is not None
    )


@pytest.mark.parametrize(
    "grad, keep", [(False, False), (True, False), (True, True)], ids=["no_grad", "grad", "kept"]
)
@pytest.mark.parametrize("mix", MIXES + POLICY_ALONE, ids=str)
def test_opcheck_statistics(implementation, mix, grad, keep) -> None:
    """Schema, fake tensors, autograd registration and AOT dispatch with dynamic shapes are right
    for every mix of arguments.
    """
    skip_if_interpreted(implementation, mix)
    a = arguments(implementation.device, mix, grad=grad)
    fields = "logprob,entropy" if mix[1] == "none" else FIELDS
    torch.library.opcheck(
        torch.ops.fastkl.linear_statistics.default,
        (
            *a.six,
            a.tokens,
            a.mask,
            a.temperatures,
            a.ratios,
            a.temperature,
            fields,
            *a.scaling,
            implementation.backend,
            torch.float32,
            a.chunk_size,
            keep,
        ),
    )


@pytest.mark.parametrize(
    "fields, keep",
    [
        (FIELDS, False),
        (FIELDS, True),
        ("kl", False),
        ("logprob,entropy", False),
        ("ref_logprob", True),
    ],
)
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_opcheck_gradients(implementation, mix, fields, keep) -> None:
    """The same for its backward, for upstream gradients of some fields."""
    skip_if_interpreted(implementation, mix)
    a = arguments(implementation.device, mix)
    settings = (*a.scaling, implementation.backend, torch.float32, a.chunk_size)
    *_, saved, logits, ref_logits = linear_op.linear_statistics(
        *a.six, a.tokens, a.mask, a.temperatures, a.ratios, a.temperature, FIELDS, *settings, keep
    )
    upstream = [
        value if name in fields.split(",") else None
        for name, value in zip(FIELDS.split(","), a.upstream, strict=True)
    ]
    torch.library.opcheck(
        torch.ops.fastkl.linear_gradients.default,
        (
            *a.six,
            a.tokens,
            a.mask,
            a.temperatures,
            a.ratios,
            saved,
            logits,
            ref_logits,
            *upstream,
            a.temperature,
            wrt_of(a.six),
            *settings,
        ),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_opcheck_weighted_kl(implementation, mix, dtype) -> None:
    """The same for value and gradients at once, and under autograd."""
    skip_if_interpreted(implementation, mix)
    for grad in (False, True):
        a = arguments(implementation.device, mix, dtype, grad)
        wrt = wrt_of(a.six) if grad else ""
        torch.library.opcheck(
            torch.ops.fastkl.linear_weighted_kl.default,
            (
                *a.six,
                a.weights,
                a.mask,
                a.temperatures,
                a.ratios,
                a.temperature,
                wrt,
                *a.scaling,
                implementation.backend,
                dtype,
                a.chunk_size,
            ),
        )


@pytest.mark.parametrize(
    "dtype, result",
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float32, torch.float32),
    ],
)
def test_scaled(implementation, dtype, result) -> None:
    """The product is rounded once: the factor keeps its digits beside a 16-bit gradient. opcheck
    holds.
    """
    gradient = torch.randn(7, 5).to(implementation.device, dtype)
    factor = torch.tensor(0.1234567, device=implementation.device)
    torch.library.opcheck(torch.ops.fastkl.scaled.default, (gradient, factor, result))
    assert torch.equal(
        linear_op.scaled(gradient, factor, result),
        (gradient.double() * factor.double()).float().to(result),
    )


def test_float16_gradients_do_not_vanish(implementation) -> None:
    """A mean over many tokens has gradients per token below float16's smallest number: they come
    back with their digits after loss scaling.
    """
    if implementation.interpreted:
        pytest.skip("4096 rows in the interpreter")
    n = 4096
    generator = torch.Generator().manual_seed(0)
    hidden, ref_hidden = (
        torch.randn(n, 8, generator=generator).to(implementation.device, torch.float16)
        for _ in range(2)
    )
    weight = (
        torch.randn(300, 8, generator=generator)
        .to(implementation.device, torch.float16)
        .requires_grad_()
    )
    hidden.requires_grad_()
    loss = 65536 * fastkl.linear_kl_divergence(hidden, weight, ref_hidden, reduction="mean")
    wide = [value.detach().double().requires_grad_() for value in (hidden, weight)]
    with fastkl.use_backend("reference"):
        exact = 65536 * fastkl.linear_kl_divergence(
            wide[0], wide[1], ref_hidden.double(), reduction="mean"
        )
    for got, expected in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(exact, wide), strict=True
    ):
        # float16 rounds logits of size 10 by up to 2^-9 each, which moves probabilities, and with
        # them gradients, by as much.
        assert float((got.double() - expected).norm() / expected.norm()) < 4e-3


@pytest.mark.parametrize("temperature", [0.05, 0.1])
def test_float16_gradients_do_not_overflow(implementation, temperature) -> None:
    """A KL of many nats at a low temperature: gradients stay finite and have the size of the
    truth's.
    """
    n = 8 if implementation.interpreted else 64
    generator = torch.Generator().manual_seed(0)
    hidden, ref_hidden = (
        torch.randn(n, 16, generator=generator).to(implementation.device, torch.float16)
        for _ in range(2)
    )
    weight = (6 / 4 * torch.randn(500, 16, generator=generator)).to(
        implementation.device, torch.float16
    )
    for reduction in ("sum", "mean"):
        leaves = [value.clone().requires_grad_() for value in (hidden, weight)]
        loss = fastkl.linear_kl_divergence(
            *leaves, ref_hidden, reduction=reduction, temperature=temperature
        )
        wide = [value.double().requires_grad_() for value in (hidden, weight)]
        with fastkl.use_backend("reference"):
            exact = fastkl.linear_kl_divergence(
                *wide, ref_hidden.double(), reduction=reduction, temperature=temperature
            )
        plain = [value.clone().requires_grad_() for value in (hidden, weight)]
        log_p, log_q = (
            (states @ plain[1].t()).float().div(temperature).log_softmax(-1)
            for states in (plain[0], ref_hidden)
        )
        usual = (log_p.exp() * (log_p - log_q)).sum() / (len(hidden) if reduction == "mean" else 1)
        for got, same, expected in zip(
            *(
                torch.autograd.grad(*pair)
                for pair in ((loss, leaves), (usual, plain), (exact, wide))
            ),
            strict=True,
        ):
            # Beside plain torch in float16, whose logits are rounded as these are.
            assert float((got.double() - expected).norm()) <= 1.5 * float(
                (same.double() - expected).norm()
            )


@pytest.mark.parametrize("name", ["weights", "mask"])
def test_vectors_of_any_strides(implementation, name) -> None:
    """Weights and masks may be transposed: the result is that of contiguous ones."""
    generator = torch.Generator().manual_seed(0)
    hidden, ref_hidden = (
        torch.randn(3, 4, H, generator=generator).to(implementation.device).requires_grad_()
        for _ in range(2)
    )
    weight = torch.randn(V, H, generator=generator).to(implementation.device)
    transposed = torch.rand(4, 3, generator=generator).to(implementation.device).t()
    transposed = transposed > 0.3 if name == "mask" else transposed
    results = []
    for value in (transposed, transposed.contiguous()):
        loss = fastkl.linear_kl_divergence(
            hidden, weight, ref_hidden, reduction="sum", **{name: value}
        )
        results.append([loss, *torch.autograd.grad(loss, (hidden, ref_hidden))])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_autocast_of_the_caller_does_not_reach_the_products(implementation, reduction) -> None:
    """float32 logits stay float32 inside autocast, and a backward inside autocast of a forward
    outside it has the forward's types.
    """
    device = implementation.device
    generator = torch.Generator().manual_seed(0)
    hidden, ref_hidden = (torch.randn(5, 32, generator=generator).to(device) for _ in range(2))
    weight, mask = (
        torch.randn(V, 32, generator=generator).to(device),
        (torch.arange(5) != 2).to(device),
    )
    narrow = [value.bfloat16() for value in (hidden, weight, ref_hidden)]
    expected = fastkl.linear_kl_divergence(*narrow, logits_dtype=torch.float32, reduction=reduction)
    leaf = hidden.clone().requires_grad_()
    outside = fastkl.linear_kl_divergence(
        leaf, weight, ref_hidden, mask=mask, reduction=reduction
    ).sum()
    (gradient,) = torch.autograd.grad(outside, leaf, retain_graph=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(
            fastkl.linear_kl_divergence(*narrow, logits_dtype=torch.float32, reduction=reduction),
            expected,
        )
        assert torch.equal(torch.autograd.grad(outside, leaf)[0], gradient)


def small(device: str) -> tuple[torch.Tensor, ...]:
    """Hidden states, weight and the reference's hidden states."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(shape, generator=generator).to(device)
        for shape in ((3, 2, H), (V, H), (3, 2, H))
    )


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(implementation) -> None:
    """Per token as a loop gives it; a sum refuses to leave out a gradient that vmap hides from it,
    and a gradient to the temperature.
    """
    hidden, weight, ref_hidden = small(implementation.device)
    hidden.requires_grad_(), weight.requires_grad_()
    kl = torch.vmap(lambda h, r: fastkl.linear_kl_divergence(h, weight, r))(hidden, ref_hidden)
    expected = fastkl.linear_kl_divergence(hidden, weight, ref_hidden)
    torch.testing.assert_close(kl, expected)
    for got, exact in zip(
        torch.autograd.grad(kl.sum(), (hidden, weight)),
        torch.autograd.grad(expected.sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(got, exact)
    with pytest.raises(RuntimeError, match="^hidden: expected to be known.*reduction='none'"):
        torch.vmap(lambda h, r: fastkl.linear_kl_divergence(h, weight, r, reduction="sum"))(
            hidden, ref_hidden
        )
    temperature = torch.ones(3, 2, device=implementation.device, requires_grad=True)
    with pytest.raises(RuntimeError, match="^temperature: expected a tensor without gradient"):
        torch.vmap(lambda h, r, t: fastkl.linear_kl_divergence(h, weight, r, temperature=t))(
            hidden.detach(), ref_hidden, temperature
        )
    logits = torch.randn(3, 2, V, device=implementation.device)
    with pytest.raises(RuntimeError, match="^temperature: expected a tensor without gradient"):
        torch.vmap(lambda p, t: fastkl.kl_divergence(p, p, temperature=t))(logits, temperature)


def test_export_without_gradients_refuses_them(implementation) -> None:
    """An exported sum keeps what its example inputs required: asked for more it raises; exported
    per token it gives all gradients.
    """

    class Loss(torch.nn.Module):
        def __init__(self, reduction: str) -> None:
            super().__init__()
            self.reduction = reduction

        def forward(self, h, w, r):
            return fastkl.linear_kl_divergence(h, w, r, reduction=self.reduction).sum()

    arguments = small(implementation.device)
    learned = [value.clone().requires_grad_() for value in arguments]
    exported = {
        reduction: torch.export.export(Loss(reduction), arguments).module()
        for reduction in ("sum", "none")
    }
    torch.testing.assert_close(exported["sum"](*arguments), exported["none"](*arguments))
    expected = torch.autograd.grad(Loss("sum")(*learned), learned)
    for got, exact in zip(
        torch.autograd.grad(exported["none"](*learned), learned), expected, strict=True
    ):
        torch.testing.assert_close(got, exact)
    with pytest.raises(RuntimeError, match="hidden, weight, ref_hidden: expected to be known"):
        exported["sum"](*learned)


def test_meta_tensors() -> None:
    """A dry run without data gives shapes and types."""
    with torch.device("meta"):
        hidden, weight = (
            torch.empty(2, 3, H, dtype=torch.bfloat16, requires_grad=True),
            torch.empty(V, H, dtype=torch.bfloat16),
        )
    loss = fastkl.linear_kl_divergence(hidden, weight, hidden.detach(), reduction="mean")
    loss.backward()
    assert (
        loss.shape == ()
        and hidden.grad.shape == hidden.shape
        and hidden.grad.dtype == torch.bfloat16
    )
    assert fastkl.linear_kl_divergence(hidden, weight, hidden).shape == (2, 3)
