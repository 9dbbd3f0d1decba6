"""Every wrong argument of the public functions on logits is an error that names the argument, says
what came and what to do.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fastkl

V = 7


def right(device: str) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    made = {
        "p": torch.randn(2, 3, V, generator=generator),
        "q": torch.randn(2, 3, V, generator=generator),
        "tokens": torch.randint(V, (2, 3), generator=generator),
        "mask": torch.ones(2, 3, dtype=torch.bool),
        "t": torch.ones(2, 3),
    }
    return SimpleNamespace(**{name: value.to(device) for name, value in made.items()})


CALLS = {
    "kl": lambda a, **more: fastkl.kl_divergence(a.p, a.q, **more),
    "stats": lambda a, **more: fastkl.token_stats(a.p, a.tokens, a.q, **more),
    "policy_stats": lambda a, **more: fastkl.token_stats(a.p, a.tokens, **more),
    "select": lambda a, **more: fastkl.selective_log_softmax(a.p, a.tokens, **more),
    "penalty": lambda a, **more: fastkl.KLPenalty(0.1)(a.p, a.q, **more),
}
# The names that each function gives to its arguments.
NAMES = {
    "kl": {"p": "p_logits", "q": "q_logits", "mask": "mask", "t": "temperature"},
    "stats": {
        **{"p": "logits", "q": "ref_logits", "tokens": "tokens"},
        **{"mask": "mask", "t": "temperature"},
    },
    "policy_stats": {"p": "logits", "tokens": "tokens", "mask": "mask", "t": "temperature"},
    "select": {"p": "logits", "tokens": "index"},
    "penalty": {"p": "policy_logits", "q": "ref_logits", "mask": "mask"},
}
WITH_TEMPERATURE = ["kl", "stats", "policy_stats"]


def test_the_right_arguments_pass(implementation) -> None:
    arguments = right(implementation.device)
    for name, call in CALLS.items():
        call(arguments)
        if name != "select":
            call(arguments, mask=arguments.mask)
        if name not in ("select", "penalty"):
            for temperature in (2, 0.5, arguments.t, arguments.t.double(), arguments.t.bfloat16()):
                call(arguments, temperature=temperature)
    for dtype in (torch.int32, torch.int16, torch.uint8, torch.int8):
        arguments.tokens = arguments.tokens.to(dtype)
        CALLS["stats"](arguments)
        CALLS["select"](arguments)


def check(call, arguments, name: str, error: type, words: tuple[str, ...], **more) -> None:
    with pytest.raises(error) as raised:
        call(arguments, **more)
    message = str(raised.value)
    assert raised.type is error and message.startswith(f"{name}: expected"), message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


# ---- wrong by themselves, or beside the others: how, what is made of the right one, error, words

WRONG_LOGITS = [
    ("not a tensor", lambda x: x.tolist(), TypeError, ("tensor of logits [..., V]", "got list")),
    ("None", lambda x: None, TypeError, ("tensor of logits [..., V]", "got NoneType")),
    ("integers", lambda x: x.long(), TypeError, ("got torch.int64", ".float()")),
    ("bool", lambda x: x > 0, TypeError, ("got torch.bool", ".float()")),
    ("complex", lambda x: x.to(torch.complex64), TypeError, ("got torch.complex64",)),
    ("scalar", lambda x: x[0, 0, 0], ValueError, ("[..., V]", "scalar")),
    ("V = 0", lambda x: x[..., :0], ValueError, ("at least one entry", "(2, 3, 0)")),
]


WRONG_PAIRS = [
    ("vocabulary", lambda x: x[..., :5], ValueError, ("(2, 3, 7)", "(2, 3, 5)", "vocabulary")),
    ("rows", lambda x: x[:, :2], ValueError, ("(2, 3, 7)", "(2, 2, 7)", "align")),
    ("dimensions", lambda x: x[0], ValueError, ("(2, 3, 7)", "(3, 7)")),
    ("broadcast", lambda x: x[:1], ValueError, ("(2, 3, 7)", "(1, 3, 7)")),
    ("device", lambda x: x.to("meta"), ValueError, ("got meta", ".to()")),
    ("float64", lambda x: x.double(), TypeError, ("float64", "torch.float32", ".to()")),
]


WRONG_MASKS = [
    ("not a tensor", lambda m: m.tolist(), TypeError, ("bool tensor", "got list")),
    ("floats", lambda m: m.float(), TypeError, ("bool tensor", "torch.float32 tensor", ".bool()")),
    ("integers", lambda m: m.long(), TypeError, ("bool tensor", "torch.int64 tensor", ".bool()")),
    (
        "with a vocabulary",
        lambda m: m[..., None].expand(2, 3, V),
        ValueError,
        ("(2, 3)", "(2, 3, 7)", "without the vocabulary"),
    ),
    ("short", lambda m: m[:, :2], ValueError, ("(2, 3)", "(2, 2)")),
    ("one row", lambda m: m[0], ValueError, ("(2, 3)", "(3,)")),
    ("device", lambda m: m.to("meta"), ValueError, ("got meta", ".to()")),
]


WRONG_TOKENS = [
    ("not a tensor", lambda t: t.tolist(), TypeError, ("integer tensor", "got list")),
    ("None", lambda t: None, TypeError, ("integer tensor", "got NoneType")),
    (
        "floats",
        lambda t: t.float(),
        TypeError,
        ("integer tensor", "torch.float32 tensor", ".long()"),
    ),
    ("bool", lambda t: t > 0, TypeError, ("integer tensor", "torch.bool tensor")),
    (
        "with last dimensions",
        lambda t: t[..., None, None],
        ValueError,
        ("(2, 3)", "(2, 3, 1, 1)", "without the vocabulary"),
    ),
    ("shifted", lambda t: t[:, 1:], ValueError, ("(2, 3)", "(2, 2)")),
    ("device", lambda t: t.to("meta"), ValueError, ("got meta", ".to()")),
]


WRONG_TEMPERATURES = [
    ("zero", lambda t: 0, ValueError, ("positive", "got 0")),
    ("zero as a float", lambda t: 0.0, ValueError, ("positive", "got 0.0")),
    ("negative", lambda t: -1.5, ValueError, ("positive", "got -1.5")),
    ("inf", lambda t: math.inf, ValueError, ("finite", "got inf")),
    ("too small", lambda t: 2.0**-127, ValueError, ("2^-126", "got 5.8774")),
    ("too large", lambda t: 2.0**126 * (1 + 2.0**-52), ValueError, ("2^126", "got 8.507")),
    ("huge", lambda t: 10**400, ValueError, ("2^126", "got an integer of 1329 bits")),
    ("beyond str", lambda t: 10**5000, ValueError, ("got an integer of 16610 bits",)),
    ("numpy", lambda t: np.float32(1), TypeError, ("number", "got float32", "float(temperature)")),
    ("float8", lambda t: t.to(torch.float8_e4m3fn), TypeError, ("torch.float8_e4m3fn", ".float()")),
    ("nan", lambda t: math.nan, ValueError, ("finite", "got nan")),
    ("bool", lambda t: True, TypeError, ("number", "got bool")),
    ("text", lambda t: "1.0", TypeError, ("number", "got str")),
    ("None", lambda t: None, TypeError, ("number", "got NoneType")),
    ("list", lambda t: [1.0], TypeError, ("number", "got list")),
    (
        "integer tensor",
        lambda t: t.long(),
        TypeError,
        ("float tensor", "torch.int64 tensor", ".float()"),
    ),
    ("bool tensor", lambda t: t > 0, TypeError, ("float tensor", "torch.bool tensor")),
    ("tensor for a row", lambda t: t[0], ValueError, ("(2, 3)", "(3,)")),
    ("scalar tensor", lambda t: t[0, 0], ValueError, ("(2, 3)", "()")),
    ("tensor with a vocabulary", lambda t: t[..., None], ValueError, ("(2, 3)", "(2, 3, 1)")),
    ("device", lambda t: t.to("meta"), ValueError, ("got meta", ".to()")),
    ("requires_grad", lambda t: t.requires_grad_(), ValueError, ("without gradient", ".detach()")),
]


WRONG = {
    "p": WRONG_LOGITS,
    "q": WRONG_LOGITS + WRONG_PAIRS,
    "mask": WRONG_MASKS,
    "tokens": WRONG_TOKENS,
    "t": WRONG_TEMPERATURES,
}
# A reference of token_stats may be None.
TABLE = {
    f"{function}-{name}-{wrong[0]}": (function, argument, *wrong[1:])
    for function, names in NAMES.items()
    for argument, name in names.items()
    for wrong in WRONG[argument]
    if (function, argument, wrong[0]) != ("stats", "q", "None")
}


@pytest.mark.parametrize("key", TABLE)
def test_wrong_arguments(implementation, key) -> None:
    function, argument, change, error, words = TABLE[key]
    arguments, name = right(implementation.device), NAMES[function][argument]
    changed, more = change(getattr(arguments, argument)), {}
    if argument in ("mask", "t"):
        more[name] = changed
    else:
        setattr(arguments, argument, changed)
    check(CALLS[function], arguments, name, error, words, **more)


# ---- values out of range


@pytest.mark.parametrize("value", [0.0, -2.0, math.nan, math.inf, 2.0**-127, 2.0**127])
@pytest.mark.parametrize("name", WITH_TEMPERATURE)
def test_temperature_of_a_row_that_is_not_positive(implementation, name, value) -> None:
    """An error where looking costs nothing; with the kernels NaN in that row and in no other. Under
    the mask it does not matter.
    """
    arguments = right(implementation.device)
    expected = CALLS[name](arguments, temperature=arguments.t)
    arguments.t[1, 2] = value
    if implementation.kernels:
        result = CALLS[name](arguments, temperature=arguments.t)
        one = name == "kl"
        for field, exact in zip(
            [result] if one else result, [expected] if one else expected, strict=True
        ):
            if field is not None:
                assert math.isnan(field[1, 2])
                assert torch.equal(field.flatten()[:-1], exact.flatten()[:-1])
    else:
        words = ("positive finite values", f"got {value}")
        more = {"temperature": arguments.t}
        check(CALLS[name], arguments, "temperature", ValueError, words, **more)
    arguments.mask[1, 2] = False
    assert CALLS[name](arguments, temperature=arguments.t, mask=arguments.mask) is not None


ENDS = [*(end for at in (-126, 126) for end in (2.0**at, torch.full((2,), 2.0**at)))]


@pytest.mark.parametrize("temperature", [*ENDS, torch.full((2,), 6e-8, dtype=torch.float16)])
def test_the_ends_of_the_range(temperature) -> None:
    p = torch.zeros(2, V)
    assert torch.equal(fastkl.kl_divergence(p, p, temperature=temperature), torch.zeros(2))


REMEDIES = [
    (lambda x: x.to_sparse(), "to_dense()"),
    (lambda x: torch.nested.nested_tensor([x[0], x[1]], layout=torch.jagged), ".values()"),
    (lambda x: torch.nested.nested_tensor([x[0], x[1]]), ".to_padded_tensor(0)"),
    (lambda x: x.to(torch.float8_e5m2), ".to(torch.bfloat16)"),
    (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8), "dequantize()"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change, remedy", REMEDIES, ids=[remedy for _, remedy in REMEDIES])
@pytest.mark.parametrize("name", CALLS)
def test_remedies_for_kinds_of_tensors(name, change, remedy) -> None:
    arguments = right("cpu")
    arguments.p = change(arguments.p)
    check(CALLS[name], arguments, NAMES[name]["p"], TypeError, (remedy,))


FORWARD_MODE = (
    r"^\w+: expected .*, got .* forward-mode .*; .*"
    r"fastkl\.reference\.row_statistics with float64 logits$"
)


@pytest.mark.parametrize("transform", [torch.func.hessian, torch.func.jacfwd])
@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_says_what_to_do(implementation, name, transform) -> None:
    arguments = right(implementation.device)

    def total(p):
        result = CALLS[name](SimpleNamespace(**{**vars(arguments), "p": p}))
        return (result if isinstance(result, torch.Tensor) else result.logprob).sum()

    for error in (TypeError, RuntimeError):
        with pytest.raises(error, match=FORWARD_MODE):
            transform(total)(arguments.p)
