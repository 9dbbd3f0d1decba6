"""linear_token_stats and linear_kl_divergence: their digits against fp64 and plain torch, and what
must hold whatever the numbers are.
"""

from __future__ import annotations

import math
import os

import cases
import linear_cases
import pytest
import torch
import torch.nn.functional as F
from linear_cases import Case

import fastkl
from fastkl import testing

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETING:
    cases.compute_as_a_gpu()

REDUCTIONS = ("none", "sum", "mean")
CALLS = ("stats", *REDUCTIONS)
# Sizes of the noise between the models' logits. A KL of 1e-3, from there to 10 over the tokens of a
# batch, and 10.
SIZES = {
    "random": {"near": (0.045, 0.045), "all": (0.045, 5.0), "far": (5.0, 5.0)},
    "peaked": {"near": (0.33, 0.33), "all": (0.33, 7.0), "far": (7.0, 7.0)},
}
KL = {"near": 1e-3, "far": 8.0}


def few(implementation, wanted: bool) -> None:
    """Skip a case that the interpreter has no time for, or whose numbers are not a GPU's: it
    truncates to bfloat16.
    """
    if implementation.interpreted and not wanted:
        pytest.skip("a part of the cases in the interpreter")


def data(kind: str, distance: str, call: str, **changes) -> Case:
    """Two models that far apart, in chunks that do not divide the tokens; a sampled token is the
    peak or any.
    """
    size = {"tokens": 12, "vocabulary": 130, "width": 24} if INTERPRETING else {}
    tensors = linear_cases.models(kind, SIZES[kind][distance], **size)
    count, vocabulary = len(tensors["hidden"]), len(tensors["weight"])
    tokens = torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(1))
    tokens[::2] = F.linear(tensors["hidden"], tensors["weight"], tensors["bias"]).argmax(-1)[::2]
    if call in ("stats", "none"):
        del tensors["weights"]
    return Case(tensors, call, tokens=tokens, chunk_size=count * 2 // 5, **changes)


# ---- accuracy


@pytest.mark.parametrize("distance", ["near", "all", "far"])
@pytest.mark.parametrize("kind", SIZES)
def test_data_is_what_it_says(kind, distance) -> None:
    """The KLs of the accuracy tests are where they should be, and peaked rows are peaked."""
    tensors = linear_cases.models(kind, SIZES[kind][distance])
    exact = testing.truth(
        *(
            F.linear(*(tensors[side + name].double() for name in ("hidden", "weight", "bias")))
            for side in ("", "ref_")
        )
    )
    if distance == "all":
        assert float(exact.kl.max()) > 5 and float(exact.kl[:10].mean()) < 5e-3
    else:
        assert KL[distance] / 2 < float(exact.kl.mean()) < KL[distance] * 2
    rest = -torch.expm1(exact.log_p.amax(-1)).median()
    assert rest > 0.5 if kind == "random" else 2e-4 < rest < 5e-3


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("distance", ["near", "all", "far"])
@pytest.mark.parametrize("kind", SIZES)
def test_float32_against_fp64(implementation, kind, distance, call) -> None:
    """Values and every gradient to 1e-5. At a KL of 1e-3 the float32 products alone may cost more:
    then 1.5 times what they cost.
    """
    few(implementation, distance == "all")
    case = data(kind, distance, call)
    exact = linear_cases.truth(case)
    result = linear_cases.fastkl_outcome(case, implementation.device)
    linear_cases.assert_types(result, case)
    allowed = linear_cases.share(exact, 1e-5)
    if distance == "near":
        products = linear_cases.errors(linear_cases.plain(case, implementation.device), exact)
        allowed = {name: max(value, 1.5 * products[name]) for name, value in allowed.items()}
    linear_cases.assert_within(result, exact, allowed)


@pytest.mark.parametrize("logits_dtype", [None, torch.float32], ids=["default", "fp32_logits"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("distance", ["near", "all", "far"])
@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_16_bit_against_plain_torch(
    implementation, dtype, kind, distance, call, logits_dtype
) -> None:
    """No worse than 1.5 times plain torch of the same type.

    In float16 a token's upstream gradient is of size 8, as a loss scale makes it: p·d/96 of a mean
    lies at 1e-6, where float16's numbers are 6e-8 apart, and what plain torch loses there must not
    widen the bar. The mean without a scale is compared too: test_float16_without_a_loss_scale.
    """
    few(
        implementation,
        dtype == torch.float16
        and distance == "all"
        and (kind == "random") == (call in ("stats", "sum")),
    )
    case = data(
        kind, distance, call, logits_dtype=logits_dtype, scale=1024.0 if call == "mean" else 8.0
    ).typed(dtype)
    linear_cases.check_16_bit(implementation.device, case)


@pytest.mark.parametrize("call", REDUCTIONS)
@pytest.mark.parametrize("kind", SIZES)
def test_float16_without_a_loss_scale(implementation, kind, call) -> None:
    """Gradients of logits near float16's smallest numbers: still no worse than 1.5 times plain
    torch, which loses digits there.
    """
    few(implementation, kind == "peaked" and call != "sum")
    linear_cases.check_16_bit(
        implementation.device,
        data(kind, "all", call, scale=1.0 if call == "mean" else 2.0**-7).typed(torch.float16),
    )


@pytest.mark.parametrize("call", REDUCTIONS)
def test_float16_over_a_large_vocabulary(implementation, call) -> None:
    """Flat rows of 32768 entries under a loss scale: p·d is 1e-5, where float16's numbers are 6e-8
    apart, unless the scale reaches it.
    """
    few(implementation, False)
    tensors = linear_cases.models("random", (1.0, 1.0), tokens=32, vocabulary=32768, width=32)
    if call == "none":
        del tensors["weights"]
    scale = 4096.0 if call == "mean" else 128.0
    linear_cases.check_16_bit(
        implementation.device,
        Case(tensors, call, temperature=3.0, scale=scale).typed(torch.float16),
    )


@pytest.mark.parametrize("call", ["stats", "none", "mean"])
@pytest.mark.parametrize(
    "policy, reference",
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
    ],
)
def test_mixed_types(implementation, policy, reference, call) -> None:
    """Policy and reference of different types: logits in float32, each gradient in the type of its
    own input.
    """
    few(implementation, False)
    case = data("random", "all", call, scale=1024.0 if call == "mean" else 8.0)
    mixed = {
        name: value.to(reference if name.startswith("ref_") else policy)
        for name, value in case.tensors.items()
        if name != "weights"
    }
    linear_cases.check_16_bit(implementation.device, case.but(tensors={**case.tensors, **mixed}))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
@pytest.mark.parametrize("change", ["left out", "same object", "softcap", "temperature per token"])
@pytest.mark.parametrize("call", CALLS)
def test_shared_head_softcap_and_temperature(implementation, call, change, dtype) -> None:
    """One lm_head, with its bias, learns from both models; capped logits, some of them at the cap;
    a temperature for each token.
    """
    few(
        implementation,
        dtype == torch.float32 and change != "left out" and call in ("stats", "mean"),
    )
    case = data("random", "far", call, scale=1024.0 if call == "mean" else 8.0)
    if change in ("left out", "same object"):
        noise = torch.randn(
            case.tensors["hidden"].shape, generator=torch.Generator().manual_seed(3)
        )
        case.tensors["ref_hidden"] = case.tensors["hidden"] + 0.5 * noise
        case.tensors.update(ref_weight=case.tensors["weight"], ref_bias=case.tensors["bias"])
        if change == "left out":
            del case.tensors["ref_weight"]
    elif change == "softcap":
        case = case.but(softcap=4.0)
    else:
        case = case.but(temperature=torch.linspace(0.4, 3.0, len(case.tensors["hidden"])))
    case = case.typed(dtype)
    if dtype != torch.float32:
        linear_cases.check_16_bit(implementation.device, case)
        return
    exact = linear_cases.truth(case)
    linear_cases.assert_within(
        linear_cases.fastkl_outcome(case, implementation.device),
        exact,
        linear_cases.share(exact, 1e-5),
    )


# ---- properties


def small(call: str, device: str = "cpu", dtype: torch.dtype = torch.float32, **changes) -> Case:
    """Five tokens of two small models, with the weights where the call takes them."""
    tensors = linear_cases.small(changes.pop("leading", (5,)))
    if call in ("stats", "none"):
        del tensors["weights"]
    tokens = (
        torch.arange(tensors["hidden"].shape[:-1].numel()).reshape(tensors["hidden"].shape[:-1])
        % 17
    )
    return Case(tensors, call, tokens=tokens, **{"chunk_size": 2, **changes}).typed(dtype)


@pytest.mark.parametrize("copy", ["same object", "left out", "copy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("call", CALLS)
def test_identical_models(implementation, call, dtype, copy) -> None:
    """Exactly 0, with gradient exactly 0 to every input."""
    few(implementation, dtype == torch.float32 and copy != "left out")
    case = small(call, dtype=dtype, softcap=3.0, temperature=0.7, fields=("kl", "ref_kl"))
    for name in ("hidden", "weight", "bias"):
        case.tensors[f"ref_{name}"] = (
            case.tensors[name].clone() if copy == "copy" else case.tensors[name]
        )
    if copy == "left out":
        del case.tensors["ref_weight"]
    result = linear_cases.fastkl_outcome(case, implementation.device)
    assert len(result) >= 6
    for name, value in result.items():
        assert name in ("logprob", "ref_logprob", "entropy") or not bool(value.any()), (
            f"{name}: {value}"
        )


@pytest.mark.parametrize("garbage", [math.nan, math.inf, "both"])
@pytest.mark.parametrize("call", CALLS)
def test_masked_tokens(implementation, call, garbage) -> None:
    """Any hidden states, ids and weights where the mask is False: exactly 0 there and gradient
    exactly 0; all else is as without these tokens.
    """
    few(implementation, garbage == "both")
    mask = torch.tensor([True, False, True, True, False])
    case = small(call, mask=mask)
    exact = linear_cases.truth(case)
    case.tokens[~mask] = torch.tensor([-100, 1 << 40])
    for name in ("hidden", "ref_hidden"):
        case.tensors[name][1] = math.nan if garbage == "both" else garbage
        case.tensors[name][4, ::2] = -math.inf if garbage == "both" else garbage
    if "weights" in case.tensors:
        case.tensors["weights"][~mask] = math.nan
    result = linear_cases.fastkl_outcome(case, implementation.device)
    linear_cases.assert_within(result, exact, linear_cases.share(exact, 1e-5))
    for name, value in result.items():
        if value.shape[:1] == mask.shape:
            assert not bool(value.cpu()[~mask].any()), name


@pytest.mark.parametrize("call", CALLS)
def test_no_token_counts(implementation, call) -> None:
    """All tokens masked: zeros, also the mean, and gradients of zeros over NaN."""
    case = small(call, mask=torch.zeros(5, dtype=torch.bool))
    case.tensors["hidden"][:] = math.nan
    result = linear_cases.fastkl_outcome(case, implementation.device)
    assert len(result) >= 7 and all(not bool(value.any()) for value in result.values()), result


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)])
@pytest.mark.parametrize("call", CALLS)
def test_no_tokens(implementation, call, leading, masked) -> None:
    """N = 0: results without elements, sums and means of 0, gradients of zeros."""
    case = small(
        call,
        leading=leading,
        mask=torch.ones(leading, dtype=torch.bool) if masked else None,
        chunk_size=None,
    )
    result = linear_cases.fastkl_outcome(case, implementation.device)
    exact = linear_cases.truth(case)
    linear_cases.assert_types(result, case)
    linear_cases.assert_within(result, exact, dict.fromkeys(exact, 0.0))
    assert not bool(result["gradient to weight"].any())


@pytest.mark.parametrize("call", CALLS)
def test_chunk_size(implementation, call) -> None:
    """Chunks of any size give the same, but for the rounding of the products: each within 1e-5 of
    the truth, and the last chunk is no special one.
    """
    few(implementation, call in ("stats", "mean"))
    case = data("random", "all", call)
    exact = linear_cases.truth(case)
    count = len(case.tensors["hidden"])
    for chunk_size in (1, 7, count - 1, count, count + 1, None)[
        :: 5 if implementation.interpreted else 1
    ]:
        result = linear_cases.fastkl_outcome(case.but(chunk_size=chunk_size), implementation.device)
        linear_cases.assert_within(
            result, exact, linear_cases.share(exact, 1e-5), f"chunk_size {chunk_size}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("chunk_size", [None, 1500, 2100])
@pytest.mark.parametrize("call", CALLS)
def test_more_tokens_than_a_product_takes(implementation, call, chunk_size, dtype) -> None:
    """Thousands of tokens, of which one product gives the logits of 1024 at the most while the
    products back take more, and the last ones fewer.
    """
    few(implementation, False)
    tensors = linear_cases.models(
        "random", (0.3, 3.0), tokens=2501, vocabulary=19, width=8, extra=4
    )
    if call in ("stats", "none"):
        del tensors["weights"]
    mask = torch.rand(2501, generator=torch.Generator().manual_seed(2)) < 0.8
    case = Case(
        tensors,
        call,
        tokens=torch.arange(2501) % 19,
        mask=mask,
        chunk_size=chunk_size,
        scale=1024.0 if call == "mean" else 1.0,
    ).typed(dtype)
    if dtype != torch.float32:
        linear_cases.check_16_bit(implementation.device, case)
        return
    exact = linear_cases.truth(case)
    linear_cases.assert_within(
        linear_cases.fastkl_outcome(case, implementation.device),
        exact,
        linear_cases.share(exact, 1e-5),
    )


@pytest.mark.parametrize("call", CALLS)
def test_expanded_hidden_states(implementation, call) -> None:
    """Tokens that share one row of memory: each has its own gradient."""
    few(implementation, call in ("none", "sum"))
    case = small(call, leading=(2, 3))
    for name in ("hidden", "ref_hidden"):
        case.tensors[name][:] = case.tensors[name][:, :1]
    exact = linear_cases.truth(case)
    inputs = linear_cases.leaves(case, device=implementation.device)
    for name in ("hidden", "ref_hidden"):
        inputs[name] = testing.leaf(inputs[name].detach()[:, :1].expand(2, 3, -1))
    result = linear_cases.differentiate(case, inputs, linear_cases.call(case, inputs))
    linear_cases.assert_within(result, exact, linear_cases.share(exact, 1e-5))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
@pytest.mark.parametrize("call", CALLS)
def test_second_backward(implementation, call, dtype) -> None:
    """Over a retained graph: the same bits, also after the first gradients were written to, as an
    optimiser or clipping does.
    """
    few(implementation, dtype == torch.float16)
    case = small(call, dtype=dtype)
    inputs = linear_cases.leaves(case, device=implementation.device)
    values = linear_cases.call(case, inputs)
    first = linear_cases.differentiate(case, inputs, values, retain_graph=True)
    kept = {name: value.clone() for name, value in first.items()}
    for name, value in first.items():
        if name.startswith("gradient"):
            assert bool(value.any()), name
            value.fill_(7.0)
    for name, value in linear_cases.differentiate(case, inputs, values).items():
        testing.assert_same_bits(value, kept[name], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("call", CALLS)
def test_inputs_are_never_written_to(implementation, call, dtype) -> None:
    """Forward and two backwards leave every bit of every input, and of the memory around it, as it
    was.
    """
    few(implementation, dtype == torch.float32)
    mask, temperature = torch.tensor([True, False, True, True, True]), torch.linspace(0.5, 2.0, 5)
    case = small(
        call,
        dtype=dtype,
        mask=mask,
        temperature=temperature,
        layouts={"hidden": "gap", "ref_hidden": "without the last", "weight": "gap"},
    )
    case.tensors["hidden"][1] = math.nan
    inputs = linear_cases.leaves(case, device=implementation.device)
    bases = [
        value.detach().as_strided(
            (value.untyped_storage().nbytes() // value.element_size(),), (1,), 0
        )
        for value in inputs.values()
    ]
    extras = [value.to(implementation.device) for value in (mask, temperature, case.tokens)]
    before = [
        testing.bits(value.float() if value.dtype == torch.bool else value).clone()
        for value in (*bases, *extras)
    ]
    moved = case.but(mask=extras[0], temperature=extras[1], tokens=extras[2])
    values = linear_cases.call(moved, inputs)
    for retain in (True, False):
        linear_cases.differentiate(moved, inputs, values, retain_graph=retain)
    for number, (value, kept) in enumerate(zip((*bases, *extras), before, strict=True)):
        assert torch.equal(
            testing.bits(value.float() if value.dtype == torch.bool else value), kept
        ), f"input {number} was written to"


@pytest.mark.parametrize("call", CALLS)
def test_no_probability_in_the_reference(implementation, call) -> None:
    """A ref_bias of -inf for one entry: KL = +inf, never NaN, also summed; of the policy's and of
    both: finite, and right.
    """
    case = small(call)
    case.tensors["ref_bias"][3] = -math.inf
    if "weights" in case.tensors:
        case.tensors["weights"].abs_()
    for trainable in ((), linear_cases.INPUTS):
        result = linear_cases.call(
            case, linear_cases.leaves(case.but(trainable=trainable), device=implementation.device)
        )
        assert bool((result["kl"] == math.inf).all()) and not any(
            bool(value.isnan().any()) for value in result.values()
        )
    nothing = case.but(mask=torch.zeros(5, dtype=torch.bool))
    assert not any(
        bool(value.any())
        for value in linear_cases.fastkl_outcome(nothing, implementation.device).values()
    )
    case.tensors["bias"][3] = -math.inf
    tokens, kept = case.tokens.clamp(max=2), [i for i in range(17) if i != 3]
    without = {
        name: value[kept] if len(value) == 17 else value for name, value in case.tensors.items()
    }
    exact = linear_cases.truth(case.but(tensors=without, tokens=tokens))
    result = linear_cases.fastkl_outcome(case.but(tokens=tokens), implementation.device)
    for name, value in result.items():
        if value.dim() and len(value) == 17:
            assert not bool(value[3].any()), name
            result[name] = value[kept]
    linear_cases.assert_within(result, exact, linear_cases.share(exact, 1e-5))


def test_as_the_functions_of_logits(implementation) -> None:
    """Every token's statistics are those of token_stats and kl_divergence on F.linear's logits."""
    case = data("random", "all", "stats", trainable=(), temperature=0.8)
    device = implementation.device
    inputs = linear_cases.leaves(case, device=device)
    p, q = (
        F.linear(*(inputs[side + name] for name in ("hidden", "weight", "bias")))
        for side in ("", "ref_")
    )
    stats = fastkl.token_stats(p, case.tokens.to(device), q, temperature=0.8)._asdict()
    expected = {name: value.double().cpu() for name, value in stats.items()}
    linear_cases.assert_within(
        linear_cases.call(case, inputs), expected, linear_cases.share(expected, 1e-5)
    )
    expected = {"kl": fastkl.kl_divergence(p, q, temperature=0.8).double().cpu()}
    linear_cases.assert_within(
        linear_cases.call(case.but(reduction="none"), inputs),
        expected,
        linear_cases.share(expected, 1e-5),
    )


def test_without_reference(implementation) -> None:
    """Log-probability and entropy alone, with their gradients."""
    case = data("random", "all", "stats")
    case = case.but(
        tensors={name: value for name, value in case.tensors.items() if not name.startswith("ref_")}
    )
    exact = linear_cases.truth(case)
    assert list(exact) == [
        "logprob",
        "entropy",
        "gradient to hidden",
        "gradient to weight",
        "gradient to bias",
    ]
    linear_cases.assert_within(
        linear_cases.fastkl_outcome(case, implementation.device),
        exact,
        linear_cases.share(exact, 1e-5),
    )


@pytest.mark.parametrize("call", CALLS)
def test_double_backward_is_refused(implementation, call) -> None:
    """create_graph=True and a derivative of the gradient: an error, not a wrong number, even where
    the rest of the loss has a derivative.
    """
    case = small(call)
    inputs = linear_cases.leaves(case, device=implementation.device)
    value = linear_cases.call(case, inputs)["kl"].sum()
    with pytest.raises(RuntimeError) as error:
        grad = torch.autograd.grad(value, inputs["hidden"], create_graph=True)[0]
        (inputs["hidden"].sum() + value + grad.square().sum()).backward()
    assert "does not require grad" not in str(error.value)


@pytest.mark.parametrize(
    "learning", ["", "hidden", "bias", "ref_weight", "ref_bias", "hidden ref_hidden"]
)
def test_requires_grad_of_each_field(implementation, learning) -> None:
    """A field requires grad exactly if it depends on an input that does."""
    few(implementation, learning in ("bias", "ref_weight"))
    case = small("stats", trainable=tuple(learning.split()))
    on_p = any(not name.startswith("ref_") for name in case.trainable)
    on_q = any(name.startswith("ref_") for name in case.trainable)
    values = linear_cases.call(case, linear_cases.leaves(case, device=implementation.device))
    assert [values[name].requires_grad for name in linear_cases.FIELDS] == [
        on_p,
        on_p,
        on_q,
        on_p or on_q,
        on_p or on_q,
    ]
    for reduction in REDUCTIONS:
        kl = case.but(reduction=reduction)
        assert linear_cases.call(kl, linear_cases.leaves(kl, device=implementation.device))[
            "kl"
        ].requires_grad == (on_p or on_q)


def test_weights_need_a_sum(implementation) -> None:
    """weights with reduction="none" is an error: there is nothing that they would weigh."""
    inputs = linear_cases.leaves(small("sum"), device=implementation.device)
    with pytest.raises(ValueError, match="^weights"):
        fastkl.linear_kl_divergence(
            inputs["hidden"],
            inputs["weight"],
            inputs["ref_hidden"],
            inputs["ref_weight"],
            weights=inputs["weights"],
        )
