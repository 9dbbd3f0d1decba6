"""linear_token_stats and linear_kl_divergence: their digits against float64, and what must hold
whatever the numbers are.
"""

import functools
import math

import cases
import linear_cases
import pytest
import torch
import torch.nn.functional as F
from linear_inputs import (
    CALLS,
    FIELDS,
    INPUTS,
    MORE_CALLS,
    Case,
    few,
    leaves,
    models,
    small,
    small_case,
    tuned,
)

from fastkl.ops import chunks

# Sizes of the noise between the models' logits: a KL of 1e-3, from there to 10 over the tokens of a
# batch, and 10.
SIZES = {
    "random near": (0.045, 0.045),
    "random all": (0.045, 5.0),
    "peaked all": (0.33, 7.0),
    "peaked far": (7.0, 7.0),
}
TOKENS = 12 if cases.INTERPRETING else 96


def data(kind: str, call: str, **changes) -> Case:
    """Draw two models that far apart, in chunks that do not divide the tokens; a sampled token is
    the peak or any.

    In float16 a token's upstream gradient is of size 8, as a loss scale makes it: p·d/96 of a mean
    lies at 1e-6, where float16's numbers are 6e-8 apart.
    """
    size = {"vocabulary": 130, "width": 24} if cases.INTERPRETING else {}
    tensors = models(kind.split()[0], SIZES[kind], tokens=TOKENS, **size)
    tokens = torch.arange(TOKENS) * 7 % len(tensors["weight"])
    tokens[::2] = F.linear(tensors["hidden"], tensors["weight"], tensors["bias"]).argmax(-1)[::2]
    options = {"chunk_size": TOKENS * 2 // 5, "scale": 1024.0 if call == "mean" else 8.0}
    return Case(tensors, call, tokens=tokens, **{**options, **changes}).weighted()


def one_head(call: str, *left_out: str) -> Case:
    case = data("random all", call)
    states, weight, bias = (case.tensors[name] for name in INPUTS[:3])
    case.tensors.update(ref_hidden=states + states.flip(0) / 2, ref_weight=weight, ref_bias=bias)
    return case.without(*left_out)


def thousands(call: str, chunk_size: int | None) -> Case:
    """Make thousands of tokens, of which one product gives the logits of 1024 at the most while the
    products back take more, and the last ones fewer.
    """
    tensors = models("random", (0.3, 3.0), tokens=2501, vocabulary=19, width=8, extra=4)
    tokens = torch.arange(2501)
    options = {"tokens": tokens % 19, "mask": tokens % 5 != 3, "chunk_size": chunk_size}
    return Case(tensors, call, scale=1024.0 if call == "mean" else 1.0, **options).weighted()


# Masked tokens' temperatures are not looked at.
MASK = torch.tensor([[True, True, False, True], [True, False, True, True]])
PER_TOKEN = torch.tensor([[0.5, 1.0, 0.0, 2.0], [1.3, -1.0, 0.8, 1.1]])
TURNED = torch.where(MASK, torch.tensor([[1.3, 0.9, 0.8, 1.1], [0.5, 1.0, 0.7, 2.0]]), math.nan)
# name: (inputs left out, a Case's changes). Two models that scale, cap and divide their logits
# each in its own way.
HEADS = {
    "scales": (("bias", "ref_bias"), {"heads": ((None, 0.5), (None, 2.0))}),
    "one cap": (("ref_bias",), {"heads": ((None, 1.0), (1.5, 1.0)), "temperature": 0.7}),
    "everything": (
        (),
        {"heads": ((4.0, 1.7), (2.0, 0.6)), "temperature": 1.3, "ref_temperature": 0.7},
    ),
    "per token": (
        (),
        {"heads": ((3.0, 0.5), (None, 1.0)), "temperature": PER_TOKEN, "ref_temperature": TURNED},
    ),
    "reference per token": (("bias", "ref_bias"), {"ref_temperature": PER_TOKEN}),
    "policy per token": (
        ("bias", "ref_bias"),
        {"temperature": PER_TOKEN, "ref_temperature": 0.7, "softcap": 3.0},
    ),
    "plain policy": ((), {"heads": (None, (2.0, 1.5))}),
    "plain reference": ((), {"heads": ((2.0, 1.5), None)}),
    "one weight": ((), {"heads": ((3.0, 1.0), (None, 2.0))}),
    "one weight, one bias": (("bias",), {"heads": (None, (None, 1.0))}),
    "inherited": (
        ("ref_weight", "ref_bias"),
        {"heads": ((3.0, 1.3), None), "ref_temperature": 2.0},
    ),
    "plain": ((), {"softcap": 2.0, "temperature": PER_TOKEN}),
}


def with_heads(name: str, call: str) -> Case:
    left_out, changes = HEADS[name]
    options = {"leading": (2, 4), "mask": MASK, "chunk_size": 3, "sizes": {"ref_width": 6}}
    case = small_case(call, **options, **changes)
    if "one weight" in name:
        case.tensors["ref_weight"] = case.tensors["weight"]
    return case.without(*left_out)


BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# name: types of the policy and of the reference, and logits_dtype.
TYPES = {
    "fp32": (FP32, FP32, None),
    "bf16": (BF16, BF16, None),
    "bf16, fp32 logits": (BF16, BF16, FP32),
    "fp16": (FP16, FP16, None),
    "fp16, fp32 logits": (FP16, FP16, FP32),
    "fp64": (FP64, FP64, None),
    "bf16 beside fp32": (BF16, FP32, None),
    "fp32 beside bf16": (FP32, BF16, None),
    "fp16 beside bf16": (FP16, BF16, None),
}
# name: (a function of the call, which of TYPES).
MODELS = {
    **{kind: (functools.partial(data, kind), list(TYPES)[:5]) for kind in SIZES},
    "mixed": (functools.partial(data, "random all"), list(TYPES)[6:]),
    "left out": (lambda call: one_head(call, "ref_weight"), ["fp32", "bf16"]),
    "same object": (one_head, ["fp32", "fp16"]),
    "softcap": (functools.partial(data, "random all", softcap=4.0), ["fp32", "bf16"]),
    "temperature per token": (
        functools.partial(data, "random all", temperature=torch.linspace(0.4, 3.0, TOKENS)),
        ["fp32", "bf16, fp32 logits"],
    ),
    **{
        f"chunks of {size}": (
            functools.partial(data, "random all", chunk_size=size, temperature=0.7),
            ["fp32"],
        )
        for size in (1, 7, TOKENS - 1, TOKENS, TOKENS + 1, None)
    },
    **{
        f"thousands, chunks of {size}": (
            functools.partial(thousands, chunk_size=size),
            ["fp32", "bf16"],
        )
        for size in (None, 1500, 2100)
    },
    **{name: (functools.partial(with_heads, name), ["fp32", "fp64"]) for name in HEADS},
    # One GEMM rounds a weight's gradient.
    "one product": (functools.partial(data, "random all", chunk_size=None), ["bf16"]),
}
# Cases for the interpreter, in float32.
INTERPRETED = {
    **dict.fromkeys(("random all", "peaked all"), CALLS),
    **dict.fromkeys(("same object", "softcap", "temperature per token"), ("stats", "mean")),
    **{"chunks of 1": ("mean",), "everything": ("stats",), "per token": ("mean",)},
    "inherited": ("none",),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name, types", [(k, t) for k, (_, kinds) in MODELS.items() for t in kinds])
def test_accuracy(implementation, monkeypatch, name, types, call) -> None:
    some_half = types == "fp16" and name == "peaked all" and call in ("none", "mean")
    few(implementation, some_half or types == "fp32" and call in INTERPRETED.get(name, ()))
    if implementation.kernels and types == "fp64":
        pytest.skip("float64 is the reference's")
    tuned(monkeypatch, **({"small_sum": 0} if name == "one product" else {}))
    policy, reference, logits_dtype = TYPES[types]
    case = MODELS[name][0](call).but(logits_dtype=logits_dtype).typed(policy, reference)
    exact = linear_cases.check(implementation.device, case)
    assert all(bool(value.any()) for value in exact.values()), "zero: nothing was compared"


def flat(call: str) -> Case:
    """Make flat rows under a loss scale: p·d is 1e-5, where float16's numbers are 6e-8 apart,
    unless the scale reaches it.
    """
    tensors = models("random", (1.0, 1.0), tokens=32, vocabulary=32768, width=32)
    return Case(tensors, call, temperature=8.0, scale=4096.0 if call == "mean" else 128.0)


def unshared(leading: int, vocabulary: int, width: int, **changes) -> Case:
    case = Case(small((leading,), vocabulary, width, width), random=False, **changes)
    return case.without("bias", "ref_bias", "weights")


LOW = 2.0**-14
FLOAT16 = {
    # A mean over many tokens has gradients per token below float16's smallest number.
    "vanishing": unshared(4096, 300, 8, reduction="mean", temperature=8.0, scale=65536.0),
    # A KL of many nats at a low temperature.
    "sum, overflowing": unshared(64, 500, 16, reduction="sum", temperature=0.05),
    "mean, overflowing": unshared(64, 500, 16, reduction="mean", temperature=0.1),
    # A gradient that is 1/ref_temperature as large, or as small.
    **{
        f"low temperature, {name}": unshared(
            8,
            17,
            6,
            reduction="sum",
            ref_temperature=LOW,
            scale=LOW,
            logits_dtype=FP32,
            trainable=(name,),
        )
        for name in ("hidden", "ref_hidden")
    },
    **{f"{call}, flat": flat(call) for call in CALLS[2:]},
}


@pytest.mark.parametrize("name", FLOAT16)
def test_float16_gradients_keep_their_digits(implementation, name) -> None:
    few(implementation, name.startswith("low"))
    linear_cases.check(implementation.device, FLOAT16[name].typed(FP16))


# ---- properties


@pytest.mark.parametrize("copy", ["same object", "left out", "copy", "Heads"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("call", CALLS)
def test_identical_models(implementation, call, dtype, copy) -> None:
    few(implementation, dtype == FP32 and copy != "left out")
    case = small_case(call, dtype, softcap=3.0, temperature=0.7, fields=("kl", "ref_kl"))
    for name in INPUTS[:3]:
        value = case.tensors[name]
        case.tensors[f"ref_{name}"] = value.clone() if copy in ("copy", "Heads") else value
    case = case.without("ref_weight") if copy == "left out" else case
    if copy == "Heads":
        first, second = (torch.linspace(0.5, 2.0, 5) for _ in range(2))
        divisors = {"temperature": first, "ref_temperature": second}
        case = case.but(heads=((3.0, 0.3),) * 2, softcap=None, **divisors)
    result = linear_cases.outcome(case, implementation.device)
    different = {name for name, value in result.items() if bool(value.any())}
    assert different <= {"logprob", "ref_logprob", "entropy", "lse", "ref_lse"}


@pytest.mark.parametrize("garbage", [math.nan, math.inf, "both", "all masked"])
@pytest.mark.parametrize("call", [*CALLS, *MORE_CALLS])
def test_masked_tokens(implementation, call, garbage) -> None:
    """Any hidden states, ids and weights where the mask is False: exactly 0 there and gradient
    exactly 0; all else is as without these tokens, and zeros where no token counts.
    """
    few(implementation, garbage in ("both", "all masked"))
    mask = torch.tensor([True, False, True, True, False]) & (garbage != "all masked")
    case = small_case(call, mask=mask)
    case.tokens[[1, 4]] = torch.tensor([-100, 1 << 40])
    number = garbage if isinstance(garbage, float) else math.nan
    for name in {"hidden", "ref_hidden", "ref_logits", "weights"} & case.tensors.keys():
        case.tensors[name][1] = number
        case.tensors[name][4:, ...] = -math.inf if garbage == "both" else number
    linear_cases.check(implementation.device, case)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)])
@pytest.mark.parametrize("call", [*CALLS, *MORE_CALLS])
def test_no_tokens(implementation, call, leading, masked) -> None:
    mask = torch.ones(leading, dtype=torch.bool) if masked else None
    case = small_case(call, leading=leading, mask=mask, chunk_size=None)
    linear_cases.check(implementation.device, case)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("call", [*CALLS, *MORE_CALLS])
def test_second_backward(implementation, call, dtype) -> None:
    """Over a retained graph: the same bits, also after the first gradients were written to, as an
    optimiser or clipping does; inputs, and the memory around them, keep every bit.
    """
    few(implementation, dtype == FP16)
    layouts = {"hidden": "gap", "ref_hidden": "without the last", "weight": "gap"}
    mask, divisors = torch.tensor([True, False, True, True, True]), torch.linspace(0.5, 2.0, 5)
    case = small_case(call, dtype, mask=mask, temperature=divisors, layouts=layouts)
    case.tensors["hidden"][1] = math.nan
    inputs = leaves(case, device=implementation.device)
    given = [*inputs.values(), mask, divisors, case.tokens]

    def memory() -> list[bytes]:
        return [bytes(value.detach().untyped_storage().cpu().tolist()) for value in given]

    before, values = memory(), linear_cases.call(case, inputs)
    first = linear_cases.differentiate(case, inputs, values, retain_graph=True)
    kept = {name: value.clone() for name, value in first.items()}
    for name in first.keys() - values.keys():
        assert bool(first[name].any()), name
        first[name].fill_(7.0)
    linear_cases.assert_same(linear_cases.differentiate(case, inputs, values), kept)
    assert memory() == before


@pytest.mark.parametrize("call", CALLS)
def test_no_probability_in_the_reference(implementation, call) -> None:
    """A ref_bias of -inf for one entry: KL = +inf, never NaN, also summed; of the policy's and of
    both: finite, and right.
    """
    case = small_case(call)
    case.tensors["ref_bias"][3] = -math.inf
    case.tensors.get("weights", torch.ones(())).abs_()
    for trainable in ((), INPUTS):
        _, result = linear_cases.run(case.but(trainable=trainable), implementation.device)
        assert bool((result["kl"] == math.inf).all())
        assert not any(bool(value.isnan().any()) for value in result.values())
    case.tensors["bias"][3] = -math.inf
    case, kept = case.but(tokens=case.tokens.clamp(max=2)), torch.arange(17) != 3
    without = {k: v[kept] if len(v) == 17 else v for k, v in case.tensors.items()}
    result = linear_cases.outcome(case, implementation.device)
    heads = {k: v.cpu() for k, v in result.items() if v.shape[:1] == kept.shape}
    assert not any(bool(value[3].any()) for value in heads.values())
    result |= {name: value[kept] for name, value in heads.items()}
    linear_cases.assert_within(result, linear_cases.truth(case.but(tensors=without)), 1e-5)


@pytest.mark.parametrize("call", CALLS)
def test_uninitialised_memory_is_not_read(implementation, request, call) -> None:
    """Nor rows' padding, which oneDNN's GEMMs of 16-bit rows read on CPUs with AMX."""
    few(implementation, call == "mean")
    case = MODELS["random all"][0](call).typed(*TYPES["bf16"][:2])
    expected = linear_cases.outcome(case, implementation.device)
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns
    assert not chunks.padded_rows((2,), 130, torch.empty(0), BF16)[:, 130:].any()
    linear_cases.assert_same(linear_cases.outcome(case, implementation.device), expected)


@pytest.mark.parametrize("call", [*CALLS, *MORE_CALLS])
def test_double_backward_is_refused(implementation, call) -> None:
    """create_graph=True and a derivative of the gradient: an error, not a wrong number, even where
    the rest of the loss has a derivative. Afterwards the graph gives the gradients as ever.
    """
    case = small_case(call)
    inputs, values = linear_cases.run(case, implementation.device)
    hidden = inputs["hidden"]
    with pytest.raises(RuntimeError, match="second derivatives|create_graph=True"):
        (grad,) = torch.autograd.grad(values["kl"].sum(), hidden, create_graph=True)
        torch.autograd.grad(hidden.sum() + grad.square().sum(), hidden, retain_graph=True)
    found = linear_cases.differentiate(case, inputs, values)
    linear_cases.assert_same(found, linear_cases.outcome(case, implementation.device))


@pytest.mark.parametrize(
    "names",
    [(), ("hidden",), ("bias",), ("ref_weight",), ("ref_bias",), ("hidden", "ref_hidden")],
    ids="-".join,
)
def test_requires_grad_of_each_field(implementation, names) -> None:
    few(implementation, names in (("bias",), ("ref_weight",)))
    on_q = any(name.startswith("ref_") for name in names)
    on_p = bool(names) and names[0][:4] != "ref_"
    expected = dict(
        zip(FIELDS, (on_p, on_p, on_q, on_p or on_q, on_p or on_q, on_p, on_q), strict=True)
    )
    for call in CALLS:
        _, values = linear_cases.run(small_case(call, trainable=names), implementation.device)
        assert {name: value.requires_grad for name, value in values.items()} == {
            name: expected[name] for name in values
        }


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, 2.0**127])
@pytest.mark.parametrize("name", ["temperature", "ref_temperature"])
def test_a_temperature_out_of_range(implementation, name, bad) -> None:
    """An error on the reference and NaN on the kernels, of that token alone; a masked token's may
    be anything.
    """
    few(implementation, bad == 0.0)
    divisors = {"temperature": 4 * torch.ones(5), "ref_temperature": 2 * torch.ones(5)}
    divisors[name][0] = bad
    case, run = small_case("none", **divisors), linear_cases.run
    _, masked = run(case.but(mask=torch.arange(5) > 0), implementation.device)
    assert bool(masked["kl"].isfinite().all())
    if implementation.kernels:
        assert run(case, implementation.device)[1]["kl"].isnan().sum() == 1
    else:
        with pytest.raises(ValueError, match=f"^{name}: expected positive finite"):
            run(case, implementation.device)
