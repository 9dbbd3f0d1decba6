"""Head and ref_temperature: two models that scale, cap and divide their logits each in its own way."""

from __future__ import annotations

from types import SimpleNamespace

import linear_cases
import pytest
import torch
import torch.nn.functional as F

import fastkl
from fastkl import Head, testing

CALLS = ("stats", "none", "sum", "mean")
LEADING = (2, 4)
REF_TEMPERATURE = 2.0**-14
LEAVES = ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias", "weights")
MASK = torch.tensor([[True, True, False, True], [True, False, True, True]])
PER_TOKEN = torch.tensor(
    [[0.5, 1.0, 0.0, 2.0], [1.3, -1.0, 0.8, 1.1]]
)  # masked tokens' are not looked at
# (first, second, options) of the leaves m; plain tensors get bias= and ref_bias= in the options.
MODELS = {
    "scales": lambda m: (Head(m.weight, logit_scale=0.5), Head(m.ref_weight, logit_scale=2.0), {}),
    "one cap": lambda m: (
        Head(m.weight, m.bias),
        Head(m.ref_weight, softcap=1.5),
        {"temperature": 0.7},
    ),
    "everything": lambda m: (
        Head(m.weight, m.bias, 4.0, 1.7),
        Head(m.ref_weight, m.ref_bias, 2.0, 0.6),
        {"temperature": 1.3, "ref_temperature": 0.7},
    ),
    "per token": lambda m: (
        Head(m.weight, m.bias, 3.0, 0.5),
        Head(m.ref_weight, m.ref_bias),
        {"temperature": m.per_token, "ref_temperature": m.per_token.flip(0)},
    ),
    "reference per token": lambda m: (m.weight, m.ref_weight, {"ref_temperature": m.per_token}),
    "policy per token": lambda m: (
        m.weight,
        m.ref_weight,
        {"temperature": m.per_token, "ref_temperature": 0.7, "softcap": 3.0},
    ),
    "plain policy": lambda m: (
        m.weight,
        Head(m.ref_weight, m.ref_bias, 2.0, 1.5),
        {"bias": m.bias},
    ),
    "plain reference": lambda m: (
        Head(m.weight, m.bias, 2.0, 1.5),
        m.ref_weight,
        {"ref_bias": m.ref_bias},
    ),
    "one weight": lambda m: (
        Head(m.weight, m.bias, 3.0),
        Head(m.weight, m.ref_bias, None, 2.0),
        {},
    ),
    "one weight, one bias": lambda m: (m.weight, Head(m.weight, m.ref_bias), {}),
    "inherited": lambda m: (Head(m.weight, m.bias, 3.0, 1.3), None, {"ref_temperature": 2.0}),
}


def leaves(
    device: str, dtype: torch.dtype = torch.float32, per_token: torch.Tensor = PER_TOKEN
) -> SimpleNamespace:
    """All inputs, the same numbers in every type; both models have one width."""
    made = linear_cases.small(LEADING, 17, 6, 6)
    found = {name: made[name].to(device, dtype).requires_grad_() for name in LEAVES}
    flipped = torch.where(
        MASK & MASK.flip(0), per_token, 1.0
    )  # what counts is positive in either order
    return SimpleNamespace(
        **found,
        per_token=flipped.to(device, dtype),
        mask=MASK.to(device),
        tokens=torch.arange(8, device=device).view(LEADING),
    )


def logits(hidden: torch.Tensor, head: Head, temperature: float | torch.Tensor) -> torch.Tensor:
    """The definition."""
    x = F.linear(hidden, head.weight, head.bias) * head.logit_scale
    x = x if head.softcap is None else head.softcap * torch.tanh(x / head.softcap)
    return x / (temperature[..., None] if isinstance(temperature, torch.Tensor) else temperature)


def by_definition(
    made: SimpleNamespace, call: str, first, second, options: dict
) -> list[torch.Tensor]:
    """The values in the leaves' type."""
    inherits = second is None
    cap, temperature = options.get("softcap"), options.get("temperature", 1.0)
    first = first if isinstance(first, Head) else Head(first, options.get("bias"), cap)
    second = (
        first
        if inherits
        else second
        if isinstance(second, Head)
        else Head(second, options.get("ref_bias"), cap)
    )
    exact = linear_cases.textbook(
        logits(made.hidden, first, temperature),
        logits(made.ref_hidden, second, options.get("ref_temperature", temperature)),
        1.0,
    )
    if call == "stats":
        picked = [
            value.gather(-1, made.tokens[..., None])[..., 0] for value in (exact.log_p, exact.log_q)
        ]
        return [
            value.where(made.mask, 0.0)
            for value in (picked[0], exact.entropy, picked[1], exact.kl, exact.ref_kl)
        ]
    kl = exact.kl.where(made.mask, 0.0)
    return [
        kl if call == "none" else (kl * made.weights).sum() / (MASK.sum() if call == "mean" else 1)
    ]


def by_fastkl(
    made: SimpleNamespace, call: str, first, second, options: dict, chunk_size: int | None = 3
) -> list[torch.Tensor]:
    """fastkl's."""
    options = {**options, "mask": made.mask, "chunk_size": chunk_size}
    if call == "stats":
        return list(
            fastkl.linear_token_stats(
                made.hidden, first, made.tokens, made.ref_hidden, second, **options
            )
        )
    weights = None if call == "none" else made.weights
    return [
        fastkl.linear_kl_divergence(
            made.hidden, first, made.ref_hidden, second, weights=weights, reduction=call, **options
        )
    ]


def gradients(made: SimpleNamespace, values: list[torch.Tensor]) -> dict[str, torch.Tensor | None]:
    """Gradients of every leaf, for fixed upstream gradients."""
    upstream = [testing.upstream_for(value, number) for number, value in enumerate(values)]
    return dict(
        zip(
            LEAVES,
            torch.autograd.grad(
                values, [getattr(made, name) for name in LEAVES], upstream, allow_unused=True
            ),
            strict=True,
        )
    )


def assert_same_as(
    made: SimpleNamespace,
    values: list[torch.Tensor],
    exact: SimpleNamespace,
    truth: list[torch.Tensor],
) -> None:
    """Values and gradients are the truth's."""
    for number, (value, expected) in enumerate(zip(values, truth, strict=True)):
        testing.assert_near(value, expected, 2e-5, 2e-6, f"value {number}")
    expected_gradients = gradients(exact, truth)
    for name, grad in gradients(made, values).items():
        expected = expected_gradients[name]
        if expected is None:
            assert grad is None or not grad.any(), name
        else:
            assert float((grad.cpu().double() - expected).norm()) <= 1e-5 * float(
                expected.norm()
            ), name


@pytest.mark.parametrize("models", MODELS)
@pytest.mark.parametrize("call", CALLS)
def test_by_definition(implementation, call, models) -> None:
    """Values and gradients of both models are float64's by plain torch, in several chunks, under a
    mask.
    """
    if implementation.interpreted and (models, call) not in {
        ("everything", "stats"),
        ("per token", "mean"),
        ("inherited", "none"),
    }:
        pytest.skip("a few of the cases in the interpreter")
    made, exact = leaves(implementation.device), leaves("cpu", torch.float64)
    assert_same_as(
        made,
        by_fastkl(made, call, *MODELS[models](made)),
        exact,
        by_definition(exact, call, *MODELS[models](exact)),
    )


@pytest.mark.parametrize("direction", ["policy||reference", "reference||policy"])
@pytest.mark.parametrize("models", ["everything", "inherited", "plain reference", "one weight"])
def test_penalty(implementation, models, direction) -> None:
    """LinearKLPenalty in both directions, whichever model comes first in the divergence."""
    if implementation.interpreted and models != "everything":
        pytest.skip("one case in the interpreter")
    made, exact = leaves(implementation.device), leaves("cpu", torch.float64)
    first, second, options = MODELS[models](made)
    settings = {
        name: options.pop(name) for name in ("temperature", "ref_temperature") if name in options
    }
    penalty = fastkl.LinearKLPenalty(
        0.5, direction=direction, reduction="sum", chunk_size=3, **settings
    )
    loss = penalty(made.hidden, first, made.ref_hidden, second, made.mask, **options)
    field = 3 if direction == "policy||reference" else 4
    assert_same_as(
        made,
        [loss],
        exact,
        [0.5 * by_definition(exact, "stats", *MODELS[models](exact))[field].sum()],
    )


@pytest.mark.parametrize(
    "temperatures", [(0.7, None), (0.7, 0.7), ("per token", None), ("per token", "again")], ids=str
)
def test_equal_models_are_exactly_equal(implementation, temperatures) -> None:
    """Equal Heads at equal temperatures give exactly 0 and no gradient, whatever they scale by."""
    made = leaves(implementation.device)
    first, second = (
        {"per token": made.per_token, "again": made.per_token.clone()}.get(value, value)
        for value in temperatures
    )
    loss = fastkl.linear_kl_divergence(
        made.hidden,
        Head(made.weight, made.bias, 3.0, 0.3),
        made.hidden.detach(),
        Head(made.weight.detach(), made.bias.detach(), 3.0, 0.3),
        temperature=first,
        ref_temperature=second,
        mask=made.mask,
        reduction="sum",
    )
    assert loss.item() == 0.0
    assert not any(
        grad.any() for grad in torch.autograd.grad(loss, (made.hidden, made.weight, made.bias))
    )


def test_a_head_of_nothing_else_is_its_weight(implementation) -> None:
    """Head(weight, bias) gives the bits of weight and bias=."""
    made = leaves(implementation.device)
    plain = by_fastkl(
        made, "stats", made.weight, made.ref_weight, {"bias": made.bias, "ref_bias": made.ref_bias}
    )
    heads = by_fastkl(
        made, "stats", Head(made.weight, made.bias), Head(made.ref_weight, made.ref_bias), {}
    )
    for value, expected in zip(heads, plain, strict=True):
        testing.assert_same_bits(value, expected, "field")


@pytest.mark.parametrize("call", ["stats", "sum"])
@pytest.mark.parametrize(
    "models",
    [
        "inherited",
        "again",
        "another Head",
        "weight beside a Head",
        "Head beside a weight",
        "detached",
    ],
)
def test_one_weight_is_kept_once(call, models) -> None:
    """Two models that hold one weight tensor share it, in Heads too: backward keeps it, or its
    gradient, once.
    """
    made = leaves("cpu")
    head, weight = Head(made.weight, logit_scale=0.5), made.weight
    first, second = {
        "inherited": (head, None),
        "again": (head, head),
        "another Head": (head, Head(weight, made.ref_bias, 3.0)),
        "weight beside a Head": (head, weight),
        "Head beside a weight": (weight, head),
        "detached": (head, Head(weight.detach())),
    }[models]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda value: kept.append(value.shape) or value, lambda value: value
    ):
        by_fastkl(made, call, first, second, {})
    assert kept.count(weight.shape) == (2 if (call, models) == ("stats", "detached") else 1)


def test_one_model(implementation) -> None:
    """Without a reference the Head is that of the policy alone."""
    made, exact = leaves(implementation.device), leaves("cpu", torch.float64)
    found = fastkl.linear_token_stats(
        made.hidden,
        Head(made.weight, made.bias, 2.0, 1.5),
        made.tokens,
        temperature=0.7,
        mask=made.mask,
    )
    truth = by_definition(
        exact, "stats", Head(exact.weight, exact.bias, 2.0, 1.5), None, {"temperature": 0.7}
    )
    assert found[2:] == (None, None, None)
    assert_same_as(made, list(found[:2]), exact, truth[:2])


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("models", ["everything", "per token"])
def test_compiled(implementation, call, models) -> None:
    """One graph with a Head and a temperature of the reference's, forward and backward, and eager's
    bits.
    """
    if implementation.interpreted and (models, call) != ("everything", "mean"):
        pytest.skip("one case in the interpreter")
    made = leaves(implementation.device)

    def function():
        return by_fastkl(made, call, *MODELS[models](made))

    outcomes = []
    for variant in (torch.compile(function, fullgraph=True, backend="aot_eager"), function):
        values = variant()
        outcomes.append(
            [*values, *(grad for grad in gradients(made, values).values() if grad is not None)]
        )
    for value, expected in zip(*outcomes, strict=True):
        testing.assert_same_bits(value, expected, "result")


@pytest.mark.parametrize("learns", ["hidden", "ref_hidden"])
def test_float16_at_a_low_temperature_of_one_model(implementation, learns) -> None:
    """A gradient that is 1/ref_temperature as large, or as small, keeps its digits in float16."""
    made = leaves(implementation.device, torch.float16)
    found = []
    for dtype, logits_dtype in ((torch.float16, torch.float32), (torch.float64, None)):
        given = {name: getattr(made, name).detach().to(dtype) for name in LEAVES[:-1]}
        leaf = given[learns].requires_grad_()
        with fastkl.use_backend(implementation.backend if dtype == torch.float16 else "reference"):
            loss = fastkl.linear_kl_divergence(
                **given, reduction="sum", ref_temperature=REF_TEMPERATURE, logits_dtype=logits_dtype
            )
        found.append(torch.autograd.grad(loss * REF_TEMPERATURE, leaf)[0].cpu().double())
    assert float((found[0] - found[1]).norm()) <= 2e-3 * float(found[1].norm())


def test_a_temperature_out_of_range(implementation) -> None:
    """An error on the reference and NaN on the kernels, of that token alone; a masked token's may
    be anything.
    """
    made = leaves(implementation.device)
    for bad in (
        (0.0, float("nan"))
        if implementation.interpreted
        else (0.0, -1.0, float("nan"), float("inf"), 2.0**127)
    ):
        for name in ("temperature", "ref_temperature"):
            wrong = torch.full(LEADING, 1.0, device=implementation.device)
            wrong[0, 0] = bad
            options = {
                "temperature": 4 * torch.ones_like(wrong),
                "ref_temperature": 2 * torch.ones_like(wrong),
                name: wrong,
            }

            def call(mask, options=options):
                return fastkl.linear_kl_divergence(
                    made.hidden, made.weight, made.ref_hidden, made.ref_weight, mask=mask, **options
                )

            assert bool(call(~wrong.ne(1.0)).isfinite().all())
            if implementation.kernels:
                assert call(None).isnan().sum() == 1
            else:
                with pytest.raises(ValueError, match=f"^{name}: expected positive finite"):
                    call(None)


def wrong_calls(made: SimpleNamespace) -> dict[str, tuple]:
    """Arguments that do not go together: (error, start of the message, words, arguments)."""
    weight, other, bias = made.weight, made.ref_weight, made.bias
    head = Head(weight)
    return {
        "bias": (ValueError, "bias", "beside a Head", dict(weight=head, bias=bias)),
        "ref_bias": (
            ValueError,
            "ref_bias",
            "beside a Head",
            dict(ref_weight=Head(other), ref_bias=bias),
        ),
        "ref_bias, inherited": (
            ValueError,
            "ref_bias",
            "beside a Head",
            dict(weight=head, ref_weight=None, ref_bias=bias),
        ),
        "softcap": (ValueError, "softcap", "beside a Head", dict(weight=head, softcap=3.0)),
        "softcap, one Head": (
            ValueError,
            "softcap",
            "beside a Head as ref_weight",
            dict(ref_weight=Head(other), softcap=3.0),
        ),
        "softcap of a Head": (
            ValueError,
            "weight.softcap",
            "-1",
            dict(weight=Head(weight, softcap=-1)),
        ),
        "softcap that float32 rounds to 0": (
            ValueError,
            "ref_weight.softcap",
            "2^-126",
            dict(ref_weight=Head(other, softcap=1e-46)),
        ),
        "scale below float32": (
            ValueError,
            "weight.logit_scale",
            "2^-126",
            dict(weight=Head(weight, logit_scale=1e-46)),
        ),
        "softcap of the second": (
            TypeError,
            "ref_weight.softcap",
            "str",
            dict(ref_weight=Head(other, softcap="3")),
        ),
        "scale 0": (
            ValueError,
            "weight.logit_scale",
            "positive",
            dict(weight=Head(weight, logit_scale=0)),
        ),
        "scale inf": (
            ValueError,
            "ref_weight.logit_scale",
            "inf",
            dict(ref_weight=Head(other, logit_scale=float("inf"))),
        ),
        "scale tensor": (
            TypeError,
            "weight.logit_scale",
            "tensor",
            dict(weight=Head(weight, logit_scale=bias[0])),
        ),
        "scale None": (
            TypeError,
            "weight.logit_scale",
            "NoneType",
            dict(weight=Head(weight, logit_scale=None)),
        ),
        "scale and temperature": (
            ValueError,
            "weight.logit_scale",
            "temperature / logit_scale",
            dict(weight=Head(weight, logit_scale=2.0**100), temperature=2.0**-100),
        ),
        "two temperatures": (
            ValueError,
            "ref_temperature",
            "quotient",
            dict(temperature=2.0**100, ref_temperature=2.0**-100),
        ),
        "weight of a Head": (
            ValueError,
            "weight.weight",
            "not transposed",
            dict(weight=Head(weight.T)),
        ),
        "no weight": (TypeError, "weight.weight", "NoneType", dict(weight=Head(None))),
        "no second weight": (
            TypeError,
            "ref_weight.weight",
            "NoneType",
            dict(ref_weight=Head(None)),
        ),
        "bias of a Head": (
            ValueError,
            "ref_weight.bias",
            "ref_weight.weight",
            dict(ref_weight=Head(other, bias[:-1])),
        ),
        "type of a bias": (
            TypeError,
            "weight.bias",
            "float64",
            dict(weight=Head(weight, bias.double())),
        ),
        "rows": (
            ValueError,
            "ref_weight.weight",
            ": weight[:V]",
            dict(ref_weight=Head(other[:-1])),
        ),
        "rows of Heads": (
            ValueError,
            "ref_weight.weight",
            ": ref_weight.weight[:V] and ref_weight.bias[:V]",
            dict(weight=Head(weight[:-1]), ref_weight=Head(other, made.ref_bias)),
        ),
        "shared, no bias": (
            ValueError,
            "ref_bias",
            "ref_bias=weight.bias",
            dict(weight=Head(weight, bias), ref_weight=weight),
        ),
        "ref_temperature 0": (ValueError, "ref_temperature", "0", dict(ref_temperature=0.0)),
        "ref_temperature str": (TypeError, "ref_temperature", "str", dict(ref_temperature="1")),
        "ref_temperature shape": (
            ValueError,
            "ref_temperature",
            "(4,)",
            dict(ref_temperature=torch.ones(4)),
        ),
        "ref_temperature learns": (
            ValueError,
            "ref_temperature",
            "detach",
            dict(ref_temperature=torch.ones(LEADING, requires_grad=True)),
        ),
        "ref_temperature alone": (
            ValueError,
            "ref_temperature",
            "without ref_hidden",
            dict(ref_hidden=None, ref_weight=None, ref_temperature=2.0),
        ),
        "Head alone": (
            ValueError,
            "ref_weight",
            "without ref_hidden",
            dict(ref_hidden=None, ref_weight=Head(other)),
        ),
    }


@pytest.mark.parametrize("name", wrong_calls(leaves("cpu")))
def test_wrong_arguments(name) -> None:
    """The message names the argument, the field of the Head included, and says what to do."""
    made = leaves("cpu")
    error, start, words, arguments = wrong_calls(made)[name]
    given = dict(
        hidden=made.hidden,
        weight=made.weight,
        ref_hidden=made.ref_hidden,
        ref_weight=made.ref_weight,
    )
    with pytest.raises(error) as raised:
        fastkl.linear_token_stats(tokens=made.tokens, **{**given, **arguments})
    message = str(raised.value)
    assert (
        message.startswith(f"{start}: expected ")
        and ", got " in message
        and "; " in message
        and words in message
    ), message


def test_settings_of_the_penalty() -> None:
    """ref_temperature is checked when the penalty is made, and shown."""
    assert "ref_temperature=0.7" in repr(fastkl.LinearKLPenalty(0.1, ref_temperature=0.7))
    assert "ref_temperature" not in repr(fastkl.LinearKLPenalty(0.1))
    for wrong, error in ((0.0, ValueError), ("1", TypeError), (torch.ones(3), TypeError)):
        with pytest.raises(error, match="^ref_temperature: expected"):
            fastkl.LinearKLPenalty(0.1, ref_temperature=wrong)
