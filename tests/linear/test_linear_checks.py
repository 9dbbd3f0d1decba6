"""Every wrong argument of the functions on hidden states is an error that names the argument, the
field of a Head included, says what came and what to do.
"""

import contextlib
import functools
import math

import linear_inputs
import pytest
import torch

import fastkl
from fastkl import Head

V, H, H_REF, LEADING = 7, 4, 3, (2, 3)
ones = torch.ones


def right(device: str = "cpu") -> dict[str, torch.Tensor]:
    made = linear_inputs.small(LEADING, V, H, H_REF).items()
    return {name: value.to(device) for name, value in made if name != "weights"}


def packed(value: torch.Tensor, **states: object) -> torch.Tensor:
    vars(value).update(states)
    return value


stats = functools.partial(fastkl.linear_token_stats, tokens=torch.zeros(LEADING, dtype=torch.long))
mean = functools.partial(fastkl.linear_kl_divergence, reduction="mean")
none = {"bias": None, "ref_bias": None}
WEIGHT = ones(V, H)
first = functools.partial(Head, WEIGHT)
second = functools.partial(Head, ones(V, H_REF))
# The start of the message: [(the argument's value, or a dict of several changes; the error; words
# of the message)]. Beside a Head, whose fields have a dot, no bias is passed.
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
        (ones(V, H).bfloat16(), TypeError, ("torch.float32", "torch.bfloat16", "autocast")),
        (None, TypeError, ("NoneType",)),
        (ones(0, H), ValueError, ("(0, 4)",)),
    ],
    "bias": [
        (ones(V + 1), ValueError, ("(7,)", "(8,)")),
        (ones(V).half(), TypeError, ("torch.float16",)),
        (3.0, TypeError, ("float",)),
        ({"weight": first()}, ValueError, ("beside a Head",)),
    ],
    "ref_hidden": [
        (ones(2, 4, H_REF), ValueError, ("(2, 3)", "(2, 4)", "align")),
        (ones(2, 3, H_REF).bool(), TypeError, ("bool",)),
        (ones(3, H_REF), ValueError, ("(3,)",)),
        (
            {"ref_hidden": ones(2, 3, H_REF).double(), "ref_weight": ones(V, H_REF).double()}
            | none,
            TypeError,
            ("float64",),
        ),
    ],
    "ref_weight": [
        (ones(V, H), ValueError, ("[V, 3]", "(7, 4)")),
        ({"ref_weight": ones(V + 2, H_REF)} | none, ValueError, ("7", "9", ": ref_weight[:7]")),
        ({"weight": ones(V + 2, H)} | none, ValueError, (": weight[:7]",)),
        ({"ref_weight": None, "ref_bias": None}, ValueError, ("[V, 3]",)),
        ({"ref_hidden": None}, ValueError, ("without ref_hidden", "ref_hidden too")),
        ({"ref_hidden": None, "ref_weight": second()} | none, ValueError, ("ref_hidden too",)),
    ],
    "ref_bias": [
        (ones(V, 1), ValueError, ("(7, 1)",)),
        ({"ref_weight": ones(V + 2, H_REF)}, ValueError, ()),
        (
            {"ref_weight": None, "ref_bias": None, "ref_hidden": ones(2, 3, H)},
            ValueError,
            ("ref_bias=bias",),
        ),
        (
            {"weight": first(ones(V)), "ref_hidden": ones(2, 3, H), "ref_weight": WEIGHT} | none,
            ValueError,
            ("ref_bias=weight.bias",),
        ),
        ({"ref_hidden": None, "ref_weight": None}, ValueError, ("ref_hidden too",)),
        ({"ref_weight": second()}, ValueError, ("beside a Head",)),
        ({"weight": first(), "bias": None, "ref_weight": None}, ValueError, ("beside a Head",)),
    ],
    "temperature": [
        (0.0, ValueError, ("0.0",)),
        ("1", TypeError, ("str",)),
        (ones(2), ValueError, ("(2, 3)", "(2,)")),
    ],
    "ref_temperature": [
        (0.0, ValueError, ("0",)),
        ("1", TypeError, ("str",)),
        (ones(4), ValueError, ("(4,)",)),
        (ones(LEADING, requires_grad=True), ValueError, ("detach",)),
        (
            {"ref_hidden": None, "ref_weight": None, "ref_bias": None, "ref_temperature": 2.0},
            ValueError,
            ("without ref_hidden",),
        ),
        ({"temperature": 2.0**100, "ref_temperature": 2.0**-100}, ValueError, ("quotient",)),
    ],
    "softcap": [
        (-1.0, ValueError, ("-1.0",)),
        (1e-46, ValueError, ("2^-126",)),
        (math.inf, ValueError, ("inf",)),
        (True, TypeError, ("bool",)),
        (ones(1), TypeError, ("tensor",)),
        ({"weight": first(), "softcap": 3.0} | none, ValueError, ("beside a Head",)),
        ({"ref_weight": second(), "softcap": 3.0} | none, ValueError, ("Head as ref_weight",)),
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
    "tokens": [(ones(2, 3), TypeError, ("float32",)), (ones(3).long(), ValueError, ("(3,)",))],
    "weight.softcap": [(first(softcap=-1), ValueError, ("-1",))],
    "ref_weight.softcap": [
        (second(softcap=1e-46), ValueError, ("2^-126",)),
        (second(softcap="3"), TypeError, ("str",)),
    ],
    "weight.logit_scale": [
        (first(logit_scale=1e-46), ValueError, ("2^-126",)),
        (first(logit_scale=0), ValueError, ("positive",)),
        (first(logit_scale=ones(())), TypeError, ("tensor",)),
        (first(logit_scale=None), TypeError, ("NoneType",)),
        (
            {"weight": first(logit_scale=2.0**100), "temperature": 2.0**-100},
            ValueError,
            ("temperature / logit_scale",),
        ),
    ],
    "ref_weight.logit_scale": [(second(logit_scale=math.inf), ValueError, ("inf",))],
    "weight.weight": [
        (Head(ones(H, V)), ValueError, ("not transposed",)),
        (Head(None), TypeError, ("NoneType",)),
    ],
    "ref_weight.weight": [
        (Head(None), TypeError, ("NoneType",)),
        (Head(ones(V - 1, H_REF)), ValueError, (": weight[:6]",)),
        (
            {"weight": Head(ones(V - 1, H)), "ref_weight": second(ones(V))},
            ValueError,
            (": ref_weight.weight[:6] and ref_weight.bias[:6]",),
        ),
    ],
    "weight.bias": [(first(ones(V).double()), TypeError, ("float64",))],
    "ref_weight.bias": [(second(ones(V - 1)), ValueError, ("ref_weight.weight",))],
}
for name in ("weight", "ref_weight", "bias", "ref_bias"):
    four_bits = f"bitsandbytes.functional.dequantize_4bit({name}.data, {name}.quant_state)"
    eight_bits = f"bitsandbytes.functional.int8_vectorwise_dequant({name}.data, {name}.SCB)"
    gathered = f"deepspeed.zero.GatheredParameters([{name}])"
    bytes_, rows = torch.zeros(14, 1, dtype=torch.uint8), torch.zeros(V, H, dtype=torch.int8)
    WRONG[name] += [
        (torch.nn.Parameter(ones(0)), ValueError, (gathered,)),
        (packed(bytes_, quant_state=object()), TypeError, (four_bits,)),
        (packed(rows, SCB=ones(V)), TypeError, (eight_bits,)),
    ]
    if name.endswith("weight"):  # bnb_4bit_quant_storage=torch.float32
        WRONG[name] += [(packed(ones(7, 1), quant_state=object()), ValueError, (four_bits,))]
CASES = [
    (fastkl.linear_kl_divergence, "ref_hidden", None, TypeError, ("NoneType",)),
    (fastkl.LinearKLPenalty(0.1), "ref_hidden", None, TypeError, ("NoneType",)),
    (fastkl.linear_kl_divergence, "weights", ones(2, 3), ValueError, ("reduction='none'",)),
    (mean, "weights", ones(2), ValueError, ("(2, 3)", "(2,)")),
    (mean, "weights", ones(2, 3).long(), TypeError, ("int64",)),
    (fastkl.linear_kl_divergence, "reduction", "batchmean", ValueError, ("'sum'", "batchmean")),
    *((stats, name, *row) for name, table in WRONG.items() for row in table),
]


@pytest.mark.parametrize("call, name, changes, error, words", CASES)
def test_wrong_arguments(call, name, changes, error, words) -> None:
    argument, _, field = name.partition(".")
    changes = changes if isinstance(changes, dict) else {argument: changes}
    with pytest.raises(error) as raised:
        call(**{**right(), **(none if field else {}), **changes})
    message = str(raised.value)
    assert raised.type is error and message.startswith(f"{name}: expected "), message
    assert all(word in message for word in (", got ", "; ", *words)), message


def test_float64_is_the_references(kernels) -> None:
    wide = {name: value.double() for name, value in right(kernels.device).items()}
    with pytest.raises(RuntimeError, match="float64"):
        fastkl.linear_kl_divergence(**wide)


def test_ids_out_of_range(implementation) -> None:
    tokens = torch.full(LEADING, V, device=implementation.device)
    refused = (
        contextlib.nullcontext()
        if implementation.kernels
        else pytest.raises(ValueError, match="^tokens")
    )
    with refused:
        assert bool(stats(**right(implementation.device), tokens=tokens).logprob.isnan().all())
