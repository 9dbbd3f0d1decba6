"""Every wrong argument of the functions on hidden states is an error that names the argument, says
what came and what to do.
"""

from __future__ import annotations

import math

import pytest
import torch

import fastkl

V, H, H_REF = 7, 4, 3


def right(device: str) -> dict[str, torch.Tensor]:
    """Arguments that every function takes: leading shape [2, 3]."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "hidden": (2, 3, H),
        "weight": (V, H),
        "ref_hidden": (2, 3, H_REF),
        "ref_weight": (V, H_REF),
        "bias": (V,),
        "ref_bias": (V,),
    }
    return {
        name: torch.randn(shape, generator=generator).to(device) for name, shape in shapes.items()
    }


def stats(arguments: dict, **more):
    """linear_token_stats, with tokens."""
    tokens = more.pop(
        "tokens", torch.zeros(2, 3, dtype=torch.long, device=arguments["weight"].device)
    )
    return fastkl.linear_token_stats(tokens=tokens, **{**arguments, **more})


CALLS = {
    "kl": lambda arguments, **more: fastkl.linear_kl_divergence(**{**arguments, **more}),
    "loss": lambda arguments, **more: fastkl.linear_kl_divergence(
        **{"reduction": "mean", **arguments, **more}
    ),
    "stats": stats,
}


@pytest.mark.parametrize("name", CALLS)
def test_the_right_arguments_pass(implementation, name) -> None:
    """What the table below changes one thing of is accepted."""
    arguments, device = right(implementation.device), implementation.device
    for more in (
        {},
        {"mask": torch.ones(2, 3, dtype=torch.bool, device=device)},
        {"temperature": torch.ones(2, 3, device=device)},
        {"softcap": 30},
        {"chunk_size": 1},
        {"logits_dtype": torch.float32},
        {"recompute": False},
        {"bias": None},
        {"ref_bias": None},
    ):
        CALLS[name](arguments, **more)
    CALLS[name](
        {key: arguments[key] for key in ("hidden", "weight")},
        ref_hidden=torch.ones_like(arguments["hidden"]),
    )


ones = torch.ones
# what is changed: (its value, error, words of the message beside "<name>: expected")
WRONG = {
    "hidden": [
        ("states", TypeError, ("str",)),
        (ones(2, 3, H, dtype=torch.long), TypeError, ("int64", ".to()")),
        (ones(()), ValueError, ("()",)),
        (ones(2, 3, 0), ValueError, ("at least 1",)),
    ],
    "weight": [
        (ones(H, V), ValueError, ("[V, 4]", "(4, 7)", "not transposed")),
        (ones(V, H, 1), ValueError, ("(7, 4, 1)",)),
        (
            ones(V, H, dtype=torch.bfloat16),
            TypeError,
            ("torch.float32", "torch.bfloat16", "autocast"),
        ),
        (None, TypeError, ("NoneType",)),
        (ones(0, H), ValueError, ("(0, 4)",)),
    ],
    "bias": [
        (ones(V + 1), ValueError, ("(7,)", "(8,)")),
        (ones(V).half(), TypeError, ("torch.float16",)),
        (3.0, TypeError, ("float",)),
    ],
    "ref_hidden": [
        (ones(2, 4, H_REF), ValueError, ("(2, 3)", "(2, 4)", "align")),
        (ones(2, 3, H_REF).bool(), TypeError, ("bool",)),
        (ones(3, H_REF), ValueError, ("(3,)",)),
    ],
    "ref_weight": [
        (ones(V + 2, H_REF), ValueError, ("ref_bias",)),
        (ones(V, H), ValueError, ("[V, 3]", "(7, 4)")),
    ],
    "ref_bias": [(ones(V, 1), ValueError, ("(7, 1)",))],
    "temperature": [
        (0.0, ValueError, ("0.0",)),
        ("1", TypeError, ("str",)),
        (ones(2), ValueError, ("(2, 3)", "(2,)")),
    ],
    "softcap": [
        (-1.0, ValueError, ("-1.0",)),
        (1e-46, ValueError, ("2^-126",)),
        (math.inf, ValueError, ("inf",)),
        (True, TypeError, ("bool",)),
        (ones(1), TypeError, ("tensor",)),
    ],
    "mask": [(ones(2, 3), TypeError, ("bool",)), (ones(3, 2).bool(), ValueError, ("(3, 2)",))],
    "logits_dtype": [
        (torch.bfloat16, ValueError, ("torch.float32", "torch.bfloat16")),
        (torch.float64, ValueError, ("torch.float64",)),
    ],
    "chunk_size": [
        (0, ValueError, ("0",)),
        (1.5, TypeError, ("float",)),
        (True, TypeError, ("bool",)),
    ],
    "recompute": [(1, TypeError, ("int",)), ("False", TypeError, ("str", "pass None"))],
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "name, value, error, words",
    [(name, *case) for name, table in WRONG.items() for case in table],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments(implementation, call, name, value, error, words) -> None:
    """The message starts with the argument's name; a vocabulary that differs is told apart from a
    bias that does.
    """
    if isinstance(value, torch.Tensor):
        value = value.to(implementation.device)
    with pytest.raises(error) as raised:
        CALLS[call](right(implementation.device), **{name: value})
    message = str(raised.value)
    start = "ref_bias" if words == ("ref_bias",) else name
    assert raised.type is error and message.startswith(f"{start}: expected"), message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


def fails(error: type, start: str, call, *words: str) -> None:
    """call() raises `error` with a message that starts with `start: expected` and holds the words."""
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    assert message.startswith(f"{start}: expected"), message
    assert all(word in message for word in words), message


def test_vocabularies_that_differ(implementation) -> None:
    """By padding: the caller slices the weight."""
    arguments = {**right(implementation.device), "bias": None, "ref_bias": None}
    padded = torch.ones(V + 2, H_REF, device=implementation.device)
    fails(
        ValueError,
        "ref_weight",
        lambda: CALLS["kl"](arguments, ref_weight=padded),
        "7",
        "9",
        "weight[:V]",
    )
    CALLS["kl"](arguments, ref_weight=padded[:V])
    padded = torch.ones(V + 2, H, device=implementation.device)
    fails(ValueError, "ref_weight", lambda: CALLS["kl"](arguments, weight=padded), ": weight[:V]")


def test_shared_heads(implementation) -> None:
    """A shared head has the same H, and its bias goes to both models: nothing is guessed."""
    arguments = right(implementation.device)
    hidden, weight, bias = (arguments[name] for name in ("hidden", "weight", "bias"))
    for ref_weight in (None, weight):

        def call(other, ref_weight=ref_weight, **more):
            return fastkl.linear_kl_divergence(hidden, weight, other, ref_weight, **more)

        fails(ValueError, "ref_weight", lambda call=call: call(arguments["ref_hidden"]), "[V, 3]")
        fails(ValueError, "ref_bias", lambda call=call: call(hidden, bias=bias), "ref_bias=bias")
        call(hidden, bias=bias, ref_bias=bias)


def test_a_reference_is_whole_or_absent(implementation) -> None:
    """A KL needs hidden states of the reference; statistics without them take nothing else of it."""
    arguments = right(implementation.device)
    fails(TypeError, "ref_hidden", lambda: CALLS["kl"](arguments, ref_hidden=None), "NoneType")
    fails(
        TypeError,
        "ref_hidden",
        lambda: fastkl.LinearKLPenalty(0.1)(arguments["hidden"], arguments["weight"], None),
        "NoneType",
    )
    fails(
        ValueError,
        "ref_weight",
        lambda: stats(arguments, ref_hidden=None, ref_bias=None),
        "ref_hidden too",
    )
    fails(
        ValueError,
        "ref_bias",
        lambda: stats(arguments, ref_hidden=None, ref_weight=None),
        "ref_hidden too",
    )


def test_weights_and_reductions(implementation) -> None:
    """Weights are for sums, floats of the leading shape."""
    arguments, device = right(implementation.device), implementation.device
    fails(
        ValueError,
        "weights",
        lambda: CALLS["kl"](arguments, weights=ones(2, 3).to(device)),
        "reduction='none'",
    )
    fails(
        ValueError,
        "weights",
        lambda: CALLS["loss"](arguments, weights=ones(2).to(device)),
        "(2, 3)",
        "(2,)",
    )
    fails(
        TypeError,
        "weights",
        lambda: CALLS["loss"](arguments, weights=ones(2, 3).long().to(device)),
        "int64",
    )
    fails(
        ValueError,
        "reduction",
        lambda: CALLS["kl"](arguments, reduction="batchmean"),
        "'sum'",
        "batchmean",
    )


def test_tokens(implementation) -> None:
    """As token_stats; out of range an error on the reference, NaN on a GPU."""
    arguments, device = right(implementation.device), implementation.device
    fails(TypeError, "tokens", lambda: stats(arguments, tokens=ones(2, 3).to(device)), "float32")
    fails(
        ValueError,
        "tokens",
        lambda: stats(arguments, tokens=torch.zeros(3, dtype=torch.long, device=device)),
        "(3,)",
    )
    outside = torch.full((2, 3), V, device=device)
    if implementation.kernels:
        assert bool(stats(arguments, tokens=outside).logprob.isnan().all())
    else:
        with pytest.raises(ValueError, match=r"^tokens"):
            stats(arguments, tokens=outside)


def test_types_that_do_not_go_together(implementation) -> None:
    """float64 beside another type, and float64 on the kernels; a 16-bit policy beside a float32
    reference does go.
    """
    arguments = right(implementation.device)
    for name in ("ref_hidden", "ref_weight", "ref_bias"):
        arguments[name] = arguments[name].double()
    fails(TypeError, "ref_hidden", lambda: CALLS["kl"](arguments), "float64")
    wide = {name: value.double() for name, value in arguments.items()}
    if implementation.kernels:
        with pytest.raises(RuntimeError, match="float64"):
            CALLS["kl"](wide)
    else:
        assert CALLS["kl"](wide).dtype == torch.float64
    mixed = {
        name: value.bfloat16() if name in ("hidden", "weight", "bias") else value.float()
        for name, value in arguments.items()
    }
    assert bool(CALLS["kl"](mixed).isfinite().all())


@pytest.mark.parametrize("name", ["weight", "ref_weight", "bias", "ref_bias"])
@pytest.mark.parametrize("call", CALLS)
def test_parameters_that_are_not_whole(call, name) -> None:
    """Parts of ZeRO-3 are gathered, weights of bitsandbytes unpacked: the message says how."""
    arguments = right("cpu")
    part = torch.nn.Parameter(ones(0))
    fails(
        ValueError,
        name,
        lambda: CALLS[call](arguments, **{name: part}),
        f"deepspeed.zero.GatheredParameters([{name}])",
    )
    packed = torch.zeros(14, 1, dtype=torch.uint8)
    packed.quant_state = object()
    fails(
        TypeError,
        name,
        lambda: CALLS[call](arguments, **{name: packed}),
        f"bitsandbytes.functional.dequantize_4bit({name}.data, {name}.quant_state)",
    )
    rows = torch.zeros(V, H, dtype=torch.int8)
    rows.SCB = ones(V)
    fails(
        TypeError,
        name,
        lambda: CALLS[call](arguments, **{name: rows}),
        f"bitsandbytes.functional.int8_vectorwise_dequant({name}.data, {name}.SCB)",
    )
    if name.endswith("weight"):
        stored = torch.zeros(7, 1)  # bnb_4bit_quant_storage=torch.float32
        stored.quant_state = object()
        fails(
            ValueError,
            name,
            lambda: CALLS[call](arguments, **{name: stored}),
            f"dequantize_4bit({name}.data",
        )


@pytest.mark.parametrize("transform", [torch.func.hessian, torch.func.jacfwd])
@pytest.mark.parametrize("call", CALLS)
def test_second_derivatives_by_forward_mode(call, transform) -> None:
    """The message says what computes them."""
    arguments = right("cpu")

    def total(hidden):
        result = CALLS[call](arguments, hidden=hidden)
        return (result if isinstance(result, torch.Tensor) else result.entropy).sum()

    form = r"^\w+: expected .*, got .* forward-mode .*; .*fastkl\.reference\.row_statistics"
    with pytest.raises(TypeError, match=form):
        transform(total)(arguments["hidden"])


def test_forward_mode_is_refused(implementation) -> None:
    """Rather than a derivative of zero."""
    arguments = right(implementation.device)
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(
            lambda hidden: CALLS["kl"](arguments, hidden=hidden),
            (arguments["hidden"],),
            (torch.ones_like(arguments["hidden"]),),
        )
