"""The linear functions inside PyTorch: torch.compile, checkpointing, accumulation, frozen heads,
LoRA, autocast, and the bytes held for backward.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import linear_cases
import linear_inputs
import memory
import pytest
import torch
from cases import HAS_CPP
from linear_inputs import INPUTS, Case, small_case
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import fastkl
from fastkl import testing

PENALTY = fastkl.LinearKLPenalty(0.3)
NAMES = ("mean", "none", "stats", "penalty")
named = pytest.mark.parametrize("name", NAMES)


def made(name: str, leading: tuple[int, ...] = (2, 2), **changes) -> Case:
    """Make a small case whose second token does not count, with a Head for one model and a
    temperature for each; "penalty" is a module of a user's.
    """
    mask = torch.arange(torch.Size(leading).numel()).reshape(leading) != 1
    more = {"mask": mask, "chunk_size": None, "heads": ((4.0, 1.7), None)}
    if name != "penalty":
        more |= {"temperature": 0.5 + torch.rand(leading), "ref_temperature": 0.7}
    case = small_case(name, leading=leading, **{**more, **changes})
    return case.without("weights") if name == "penalty" else case


def run(case: Case, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Compute the function's outputs."""
    if case.reduction == "penalty":
        return {"kl": PENALTY(**linear_cases.arguments(case, inputs))}
    return linear_cases.call(case, inputs)


def outcome(case: Case, device: str, function: Callable = run) -> dict[str, torch.Tensor]:
    """Compute outputs and the gradients of every leaf."""
    inputs = linear_inputs.leaves(case, device=device)
    return linear_cases.differentiate(case, inputs, function(case, inputs))


def assert_same(result: dict, expected: dict) -> None:
    """Compare to the bit."""
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        testing.assert_same_bits(result[name], value, name)


# ---- torch.compile


@pytest.mark.parametrize(
    "name, compiler, dynamic",
    [(name, "aot_eager", dynamic) for name in NAMES for dynamic in (False, True)]
    + [("none", "inductor", False), ("stats", "inductor", True)],
)
def test_compile_equals_eager(implementation, name, compiler, dynamic) -> None:
    """fullgraph=True works, forward and backward, and gives eager's bits, at two sizes where they
    are dynamic.

    Scalars under inductor are compared in test_torch.py.
    """
    if compiler == "inductor" and implementation.device == "cpu" and not HAS_CPP:
        pytest.skip("inductor needs a C++ compiler on CPU")
    compiled = torch.compile(run, fullgraph=True, backend=compiler, dynamic=dynamic)
    for leading in ((1, 2), (1, 3)) if dynamic else ((1, 2),):
        case = made(name, leading)
        expected = outcome(case, implementation.device)
        assert_same(outcome(case, implementation.device, compiled), expected)


@named
def test_no_recompilation_for_each_length(implementation, name) -> None:
    """One graph for every number of tokens under dynamic=True, whether they fit into one chunk or
    not.
    """
    counter = CompileCounter()
    compiled = torch.compile(run, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (2, 3, 1100):
        case = made(name, (tokens,))
        found = outcome(case, implementation.device, compiled)
        assert_same(found, outcome(case, implementation.device))
    assert counter.frame_count == 1


@pytest.mark.parametrize("learns", [("hidden",), ("weight", "ref_hidden")], ids="-".join)
@named
def test_with_frozen_inputs_and_without_gradient(implementation, name, learns) -> None:
    """A graph whose gradients are those of what requires grad; no_grad, inference_mode and tensors
    made in it give the same values, which need no gradient.
    """
    case, device = made(name, (3,), trainable=learns), implementation.device
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    inputs, expected = linear_inputs.leaves(case, device=device), outcome(case, device)
    assert_same(outcome(case, device, compiled), expected)
    for mode, function in ((torch.no_grad, compiled), (torch.inference_mode, run)):
        with mode():
            made_here = {key: value.clone() for key, value in inputs.items()}
            for given in (inputs, made_here):
                values = function(case, given)
                assert not any(value.requires_grad for value in values.values())
                assert_same(values, {key: expected[key] for key in values})


@pytest.mark.parametrize("dtype, inside", [(torch.bfloat16, True), (torch.float16, False)])
@named
def test_autocast_and_compile(implementation, name, dtype, inside) -> None:
    """Autocast in the compiled function or around it is autocast in eager: products of 16-bit
    values, float32 results, gradients as the inputs.
    """
    case, device = made(name), implementation.device
    autocast = functools.partial(torch.autocast, device, dtype=dtype)

    def function(case: Case, inputs: dict) -> dict[str, torch.Tensor]:
        with autocast() if inside else contextlib.nullcontext():
            return run(case, inputs)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with contextlib.nullcontext() if inside else autocast():
        results, expected = (outcome(case, device, call) for call in (compiled, function))
    assert_same(results, expected)
    assert all(value.dtype == torch.float32 for value in results.values())
    short = outcome(case.typed(dtype), device)
    testing.assert_same_bits(results["kl"], short["kl"], "beside inputs that are cast")
    assert not torch.equal(results["kl"], outcome(case, device)["kl"]), "autocast changed nothing"


# ---- autograd

non_reentrant = functools.partial(checkpoint, use_reentrant=False)
aot_eager = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
WAYS = {
    "checkpoint": lambda body: functools.partial(non_reentrant, body),
    "reentrant checkpoint": lambda body: functools.partial(checkpoint, body, use_reentrant=True),
    "compiled": aot_eager,
    "compiled checkpoint": lambda body: aot_eager(functools.partial(non_reentrant, body)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@named
def test_module_with_an_lm_head(implementation, name, frozen, way) -> None:
    """Checkpointed or compiled from its input to its loss, a module gives the same bits; a frozen
    lm_head gets no gradient.
    """
    if (name, way) == ("penalty", "compiled checkpoint"):
        pytest.skip("torch.compile takes no side effect, which .last is, under a checkpoint")
    case, found = made(name, trainable=() if frozen else ("weight",)), []
    inputs = linear_inputs.leaves(case, device=implementation.device)
    layer = torch.nn.Linear(6, 6, device=implementation.device)

    def body(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(run(case, {**inputs, "hidden": torch.tanh(layer(x))}).values())

    for call in (body, WAYS[way](body)):
        x = inputs["hidden"].clone().requires_grad_()
        outputs = call(x)
        total = sum((value * (1 + i)).sum() for i, value in enumerate(outputs))
        leaves = (x, *layer.parameters(), *(() if frozen else (inputs["weight"],)))
        total.backward()
        grads = [leaf.grad for leaf in leaves]
        assert all(bool(grad.any()) for grad in grads)
        found.append(dict(enumerate((*outputs, *grads))))
        layer.zero_grad()
        inputs["weight"].grad = None
    assert_same(found[1], found[0])


def test_lora(implementation) -> None:
    """A Llama under peft's LoRA: a fresh adapter has a loss and gradients of exactly 0; a trained
    one the definition's; the frozen, shared head has none.
    """
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=17,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)
    base = model.to(implementation.device).get_base_model()
    torch.nn.init.normal_(base.lm_head.weight, std=1.0)
    tokens = torch.arange(6, device=implementation.device).reshape(2, 3)
    case = Case({}, "mean", trainable=("hidden",), mask=tokens.cpu() != 4, random=False)

    def hidden() -> torch.Tensor:
        return base.model(input_ids=tokens).last_hidden_state

    with torch.no_grad(), model.disable_adapter():
        inputs = {"ref_hidden": hidden(), "weight": base.lm_head.weight}
    adapters = [value for value in model.parameters() if value.requires_grad]
    assert len(adapters) == 4 and not base.lm_head.weight.requires_grad
    fresh = run(case, inputs | {"hidden": hidden()})["kl"]
    assert fresh.item() == 0
    assert not any(bool(grad.any()) for grad in torch.autograd.grad(fresh, adapters))
    for value in adapters:
        torch.nn.init.normal_(value, std=0.5)
    inputs["hidden"] = hidden()
    values = run(case, inputs)
    assert all(
        bool(g.any()) for g in torch.autograd.grad(values["kl"], adapters, retain_graph=True)
    )
    result = linear_cases.differentiate(case, {"hidden": inputs["hidden"]}, values)
    given = case.but(tensors={k: v.detach().cpu() for k, v in inputs.items()})
    linear_cases.assert_within(result, linear_cases.truth(given), 1e-5)


# ---- what is held between forward and backward


def sized(implementation, name: str, learns: tuple[str, ...], dtype=torch.float32) -> tuple:
    """Make inputs of which a token's share and a head's can be told apart."""
    tokens, vocabulary = (4, 64) if implementation.interpreted else (32, 512)
    sizes = {"sizes": {"vocabulary": vocabulary, "width": 8, "ref_width": 6}}
    plain = {"temperature": 1.0, "ref_temperature": None, "heads": (None, None)}
    case = made(name, (tokens,), dtype=dtype, trainable=learns, **plain, **sizes)
    case = case.but(
        **{k: linear_cases.on(implementation.device, getattr(case, k)) for k in ("mask", "tokens")}
    )
    inputs = linear_inputs.leaves(case, device=implementation.device)
    known = {
        value.untyped_storage().data_ptr() for value in (*inputs.values(), case.mask, case.tokens)
    }
    return case, inputs, known


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("learns", [("hidden",), ("hidden", "weight"), ("ref_hidden",), INPUTS])
@pytest.mark.parametrize("name", ["mean", "sum", "penalty"])
def test_bytes_saved_for_a_scalar(implementation, name, learns, dtype) -> None:
    """One tensor like each input that requires grad, in float32 for a float16 head, and none of the
    hidden states and weights themselves.
    """
    case, inputs, known = sized(implementation, name, learns, dtype)
    held = memory.saved(lambda: run(case, inputs))
    gradients = sum(
        value.numel() * (4 if dtype == torch.float16 and "hidden" not in key else value.itemsize)
        for key, value in inputs.items()
        if key in learns
    )
    assert not {inputs[k].untyped_storage().data_ptr() for k in INPUTS[:6]} & set(held)
    more = sum(size for address, size in held.items() if address not in known)
    assert gradients <= more <= gradients + 16 + 4 * len(inputs["hidden"])  # a count, weights


@pytest.mark.parametrize("learns", [INPUTS, ("hidden",)], ids=["all", "frozen"])
@named
def test_bytes_left(implementation, name, learns) -> None:
    """While the results live, nothing is left allocated but they and what is saved: 40 bytes per
    token for any upstream gradient, and of the vocabulary's size only kept logits, else a gradient
    like each input; under activation checkpointing, nothing but the results.
    """
    case, inputs, known = sized(implementation, name, learns)
    device, tokens = implementation.device, len(inputs["hidden"])
    results = {"none": 4 * tokens, "stats": 20 * tokens}.get(name, 64)  # a loss, and .last
    results += 512 * 16 if device == "cuda" else 0  # the GPU allocator's rounding
    saved = sum(value.nbytes for key, value in inputs.items() if key in learns)
    if name in ("none", "stats"):
        saved = tokens * (40 + (2 * 4 * len(inputs["weight"]) if name == "stats" else 0))
        held = memory.saved(lambda: run(case, inputs))
        assert sum(size for address, size in held.items() if address not in known) == saved
    assert memory.allocated(device, lambda: run(case, inputs))[1] <= results + saved
    for again in (False, True):
        call = functools.partial(checkpoint, use_reentrant=again, preserve_rng_state=False)
        body = lambda *_: tuple(run(case, inputs).values())  # noqa: E731
        assert memory.allocated(device, lambda: call(body, *inputs.values()))[1] <= results  # noqa: B023
