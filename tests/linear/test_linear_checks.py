"""Every wrong argument of the functions on hidden states is an error that names the argument, says
what came and what to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import linear_cases
import linear_inputs
import pytest
import torch

import fastkl

V, H, H_REF, LEADING = 7, 4, 3, (2, 3)
ones = torch.ones


def right(device: str) -> dict[str, torch.Tensor]:
    """Make arguments that every function takes."""
    made = linear_inputs.small(LEADING, V, H, H_REF)
    return {name: value.to(device) for name, value in made.items() if name != "weights"}


def run(name: str, arguments: dict) -> object:
    """Call one of CALLS."""
    if name == "stats":
        device = next(v.device for v in arguments.values() if isinstance(v, torch.Tensor))
        tokens = torch.zeros(LEADING, dtype=torch.long, device=device)
        return fastkl.linear_token_stats(**{"tokens": tokens, **arguments})
    more = {"reduction": "mean"} if name == "loss" else {}
    return fastkl.linear_kl_divergence(**{**more, **arguments})


CALLS = ("kl", "loss", "stats")
RIGHT = [
    {},
    {"mask": ones(LEADING, dtype=torch.bool)},
    {"temperature": ones(LEADING)},
    {"softcap": 30},
    {"chunk_size": 1},
    {"logits_dtype": torch.float32},
    {"recompute": False},
    {"bias": None},
    {"ref_bias": None},
    {"bias": None, "ref_bias": None, "ref_weight": None, "ref_hidden": ones(*LEADING, H)},
    {"ref_weight": ones(V + 2, H_REF)[:V]},
]


@pytest.mark.parametrize("more", RIGHT, ids=lambda value: ",".join(value))
@pytest.mark.parametrize("call", CALLS)
def test_the_right_arguments_pass(implementation, call, more) -> None:
    """The arguments that the table below changes one of are accepted."""
    arguments = right(implementation.device) | more
    run(call, {k: linear_cases.on(implementation.device, v) for k, v in arguments.items()})


def packed(value: torch.Tensor, **states: object) -> torch.Tensor:
    """Mark a tensor as bitsandbytes does."""
    vars(value).update(states)
    return value


none = {"bias": None, "ref_bias": None}
# what is changed: [(its value, error, words of the message beside "<name>: expected")]; or dicts of
# several changes under the name that the message starts with.
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
        ({"ref_weight": ones(V + 2, H_REF)} | none, ValueError, ("7", "9", "weight[:V]")),
        ({"weight": ones(V + 2, H)} | none, ValueError, (": weight[:V]",)),
        ({"ref_weight": None, "ref_bias": None}, ValueError, ("[V, 3]",)),
    ],
    "ref_bias": [
        (ones(V, 1), ValueError, ("(7, 1)",)),
        ({"ref_weight": ones(V + 2, H_REF)}, ValueError, ()),
        (
            {"ref_weight": None, "ref_bias": None, "ref_hidden": ones(2, 3, H)},
            ValueError,
            ("ref_bias=bias",),
        ),
    ],
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
# The same of one function: (function, start of the message, changes, error, words)
ALONE = [
    ("kl", "ref_hidden", {"ref_hidden": None}, TypeError, ("NoneType",)),
    ("stats", "ref_weight", {"ref_hidden": None}, ValueError, ("ref_hidden too",)),
    (
        "stats",
        "ref_bias",
        {"ref_hidden": None, "ref_weight": None},
        ValueError,
        ("ref_hidden too",),
    ),
    ("kl", "weights", {"weights": ones(2, 3)}, ValueError, ("reduction='none'",)),
    ("loss", "weights", {"weights": ones(2)}, ValueError, ("(2, 3)", "(2,)")),
    ("loss", "weights", {"weights": ones(2, 3).long()}, TypeError, ("int64",)),
    ("kl", "reduction", {"reduction": "batchmean"}, ValueError, ("'sum'", "batchmean")),
    ("stats", "tokens", {"tokens": ones(2, 3)}, TypeError, ("float32",)),
    ("stats", "tokens", {"tokens": ones(3).long()}, ValueError, ("(3,)",)),
]
CASES = ALONE + [
    (call, name, value if isinstance(value, dict) else {name: value}, error, words)
    for call in CALLS
    for name, table in WRONG.items()
    for value, error, words in table
]


@pytest.mark.parametrize("call, name, changes, error, words", CASES)
def test_wrong_arguments(implementation, call, name, changes, error, words) -> None:
    """The message starts with the argument's name; a vocabulary that differs is told apart from a
    bias that does.
    """
    device = implementation.device
    moved = {k: v if hasattr(v, "SCB") else linear_cases.on(device, v) for k, v in changes.items()}
    with pytest.raises(error) as raised:
        run(call, right(device) | moved)
    message = str(raised.value)
    assert raised.type is error and message.startswith(f"{name}: expected"), message
    assert all(word in message for word in words), message


def test_a_penalty_needs_a_reference() -> None:
    """As linear_kl_divergence does."""
    with pytest.raises(TypeError, match="^ref_hidden: expected .*NoneType"):
        fastkl.LinearKLPenalty(0.1)(ones(2, H), ones(V, H), None)


def test_ids_and_types_that_depend_on_the_backend(implementation) -> None:
    """Ids out of range are an error on the reference, NaN on a GPU; float64 is the reference's; a
    16-bit policy beside a float32 reference goes everywhere.
    """
    arguments = right(implementation.device)
    wide = {name: value.double() for name, value in arguments.items()}
    outside = arguments | {"tokens": torch.full(LEADING, V, device=implementation.device)}
    if implementation.kernels:
        assert bool(run("stats", outside).logprob.isnan().all())
        with pytest.raises(RuntimeError, match="float64"):
            run("kl", wide)
    else:
        with pytest.raises(ValueError, match=r"^tokens"):
            run("stats", outside)
        assert run("kl", wide).dtype == torch.float64
    mixed = {k: v if k.startswith("ref_") else v.bfloat16() for k, v in arguments.items()}
    assert bool(run("kl", mixed).isfinite().all())


@pytest.mark.parametrize("call", CALLS)
def test_forward_mode_is_refused(implementation, call) -> None:
    """Rather than a derivative of zero; the message says what computes second derivatives."""
    arguments = right(implementation.device)
    hidden = arguments["hidden"]

    def total(hidden: torch.Tensor) -> torch.Tensor:
        result = run(call, arguments | {"hidden": hidden})
        return (result if isinstance(result, torch.Tensor) else result.entropy).sum()

    form = r"^\w+: expected .*, got .* forward-mode .*; .*fastkl\.reference\.row_statistics"
    transforms: dict[str, Callable] = {"hessian": torch.func.hessian, "jac": torch.func.jacfwd}
    for transform in transforms.values() if not implementation.interpreted else ():
        with pytest.raises(TypeError, match=form):
            transform(total)(hidden)
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(total, (hidden,), (torch.ones_like(hidden),))
