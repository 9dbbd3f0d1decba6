"""Wrong arguments of the public functions on logits by the values that they hold, and right ones
at the ends of their ranges; test_wrong_arguments.py has every argument by every kind.
"""

import math
import re
from types import SimpleNamespace

import pytest
import torch

import fastkl
from fastkl import testing

V = 7


def right(device: str) -> SimpleNamespace:
    p, q = testing.pair("normal1", 6, V, 1.0)
    made = {
        "p": p.view(2, 3, V),
        "q": q.view(2, 3, V),
        "tokens": torch.arange(6).view(2, 3),
        "mask": torch.ones(2, 3, dtype=torch.bool),
        "t": torch.ones(2, 3),
    }
    return SimpleNamespace(**{name: value.to(device) for name, value in made.items()})


CALLS = {
    "kl": lambda a, **more: (fastkl.kl_divergence(a.p, a.q, **more),),
    "stats": lambda a, **more: fastkl.token_stats(a.p, a.tokens, a.q, **more),
    "policy_stats": lambda a, **more: fastkl.token_stats(a.p, a.tokens, **more),
    "select": lambda a, **more: (fastkl.selective_log_softmax(a.p, a.tokens, **more),),
    "penalty": lambda a, **more: (fastkl.KLPenalty(0.1)(a.p, a.q, **more),),
}
WITH_TEMPERATURE = ["kl", "stats", "policy_stats"]


def kl(**keywords):
    return lambda p: fastkl.kl_divergence(p, p, **keywords)


def sampled(**keywords):
    return lambda p: fastkl.sampled_kl_loss(-torch.ones(2), -torch.ones(2), **keywords)


BEYOND = (0, 0.0, 2.0**-127, 2.0**126 * (1 + 2.0**-52))
WRONG = {
    "weights without a sum": ("weights", kl(weights=torch.ones(2, V))),
    "weights of another shape": ("weights", kl(weights=torch.ones(V, 2), reduction="sum")),
    "a penalty's reduction": ("reduction", kl(reduction="sequence_mean")),
    "torch's reduction": ("reduction", kl(reduction="batchmean")),
    "a normalizer of none": ("normalizer", kl(normalizer=3)),
    "a normalizer of 0": ("normalizer", kl(reduction="mean", normalizer=0.0)),
    "a normalizer below float32": ("normalizer", kl(reduction="mean", normalizer=1e-300)),
    "a normalizer of a sum": ("normalizer", kl(reduction="sum", normalizer=3)),
    "a normalizer of a penalty's sum": (
        "normalizer",
        lambda p: fastkl.KLPenalty(0.1, reduction="sum")(p, p, normalizer=3),
    ),
    "a normalizer of a linear penalty's sum": (
        "normalizer",
        lambda p: fastkl.LinearKLPenalty(0.1, reduction="sum")(p, p[0, :, :], p, normalizer=3),
    ),
    **{f"temperature {t}": ("temperature", kl(temperature=t)) for t in BEYOND},
    **{
        f"{function.__name__} {name} {value}": (
            name,
            lambda p, function=function, name=name, value=value: function(p, p, **{name: value}),
        )
        for function, name, values in (
            (fastkl.js_divergence, "beta", (-0.1, 1.1, math.nan, math.inf)),
            (fastkl.skew_kl_divergence, "alpha", (-0.1, 1.1, math.nan, math.inf)),
            (fastkl.renyi_divergence, "alpha", (0, 0.0, -0.1, math.nan, math.inf)),
        )
        for value in values
    },
    "clamp 0": ("clamp", sampled(clamp=0.0)),
    "clamp beyond e^x": ("clamp", sampled(clamp=50.1)),
    "a learning sampler": (
        "old_logprob",
        sampled(old_logprob=torch.zeros(2, requires_grad=True)),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values(name) -> None:
    with pytest.raises(ValueError, match=f"^{WRONG[name][0]}: expected .*, got .*; "):
        WRONG[name][1](torch.zeros(2, V, V))


@pytest.mark.parametrize("value", [0.0, -2.0, math.nan, math.inf, 2.0**-127, 2.0**127])
@pytest.mark.parametrize("name", WITH_TEMPERATURE)
def test_temperature_of_a_row_that_is_not_positive(implementation, name, value) -> None:
    # An error where looking costs nothing; with the kernels NaN in that row and in no other.
    arguments, given = right(implementation.device), {}
    expected = CALLS[name](arguments, temperature=arguments.t)
    given["temperature"], arguments.t[1, 2] = arguments.t, value
    if not implementation.kernels:
        with pytest.raises(ValueError, match=f"temperature: .* got {re.escape(str(value))};"):
            CALLS[name](arguments, **given)
    else:
        for field, exact in zip(CALLS[name](arguments, **given), expected, strict=True):
            if field is not None:
                assert field.flatten()[-1].isnan()
                assert torch.equal(field.flatten()[:-1], exact.flatten()[:-1])
    arguments.mask[1, 2] = False
    assert CALLS[name](arguments, **given, mask=arguments.mask) is not None


ENDS = [*(end for at in (-126, 126) for end in (2.0**at, torch.full((2,), 2.0**at)))]


@pytest.mark.parametrize("temperature", [*ENDS, torch.full((2,), 6e-8, dtype=torch.float16)])
def test_the_ends_of_the_range(temperature) -> None:
    p = torch.zeros(2, V)
    assert torch.equal(fastkl.kl_divergence(p, p, temperature=temperature), torch.zeros(2))


FORWARD_MODE = (
    r"^\w+: expected .*, got .* forward-mode .*; .*"
    r"fastkl\.reference\.row_statistics with float64 logits$"
)


@pytest.mark.parametrize("transform", [torch.func.hessian, torch.func.jacfwd])
@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_says_what_to_do(implementation, name, transform) -> None:
    arguments = right(implementation.device)

    def total(p):
        return CALLS[name](SimpleNamespace(**{**vars(arguments), "p": p}))[0].sum()

    with pytest.raises(TypeError, match=FORWARD_MODE) as raised:
        transform(total)(arguments.p)
    assert isinstance(raised.value, RuntimeError)
