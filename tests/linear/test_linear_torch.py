"""The linear functions inside PyTorch: torch.compile, checkpointing, accumulation, frozen heads,
LoRA, autocast, and the bytes held for backward.

Hidden states and weights are multiples of 1/8 unless a model makes them, so that logits are exact
in whatever order a product adds them up.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from cases import HAS_CPP
from memory import allocated
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import fastkl
from fastkl import testing

H, H_REF, V = 8, 6, 19
PENALTY = fastkl.LinearKLPenalty(0.3)
LEAVES = ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias")
pytestmark = pytest.mark.usefixtures("fresh_compiler")


def inputs(
    device: str,
    leading: tuple[int, ...] = (2, 2),
    learns: tuple[str, ...] = LEAVES,
    dtype: torch.dtype = torch.float32,
    vocabulary: int = V,
) -> SimpleNamespace:
    """Two models' hidden states and heads, of which `learns` require grad, tokens, a mask that
    leaves out the second token, and weights per token.
    """
    generator = torch.Generator().manual_seed(0)

    def eighths(*shape: int) -> torch.Tensor:
        return torch.randint(-8, 9, shape, generator=generator) / 8

    made = {
        "hidden": eighths(*leading, H),
        "weight": 2 * eighths(vocabulary, H),
        "bias": eighths(vocabulary),
        "ref_hidden": eighths(*leading, H_REF),
        "ref_weight": 2 * eighths(vocabulary, H_REF),
        "ref_bias": eighths(vocabulary),
        "weights": 0.25 + eighths(*leading).abs(),
        "upstream": 0.5 + torch.rand(5, *leading, generator=generator),
    }
    count = torch.Size(leading).numel()
    other = {
        "mask": torch.arange(count).reshape(leading) != 1,
        "tokens": torch.randint(vocabulary, leading, generator=generator),
    }
    made = {
        name: value.to(
            device, torch.float32 if name in ("weights", "upstream") else dtype
        ).requires_grad_(name in learns)
        for name, value in made.items()
    }
    return SimpleNamespace(
        **made,
        **{name: value.to(device) for name, value in other.items()},
        leaves=tuple(made[name] for name in learns),
    )


def mean(hidden, weight, data):
    """The loss with everything that it takes."""
    return (
        fastkl.linear_kl_divergence(
            hidden,
            weight,
            data.ref_hidden,
            data.ref_weight,
            weights=data.weights,
            reduction="mean",
            bias=data.bias,
            ref_bias=data.ref_bias,
            mask=data.mask,
        ),
    )


def total(hidden, weight, data):
    """The sum over all tokens, without weights."""
    return (
        fastkl.linear_kl_divergence(
            hidden,
            weight,
            data.ref_hidden,
            data.ref_weight,
            reduction="sum",
            bias=data.bias,
            ref_bias=data.ref_bias,
        ),
    )


def none(hidden, weight, data):
    """KL per token, its logits computed again in backward."""
    options = {"bias": data.bias, "ref_bias": data.ref_bias, "mask": data.mask, "recompute": True}
    return (
        fastkl.linear_kl_divergence(hidden, weight, data.ref_hidden, data.ref_weight, **options),
    )


def stats(hidden, weight, data):
    """All five fields, their logits kept."""
    return tuple(
        fastkl.linear_token_stats(
            hidden,
            weight,
            data.tokens,
            data.ref_hidden,
            data.ref_weight,
            bias=data.bias,
            ref_bias=data.ref_bias,
            mask=data.mask,
        )
    )


def penalty(hidden, weight, data):
    """A module of a user's, made once."""
    return (
        PENALTY(
            hidden,
            weight,
            data.ref_hidden,
            data.ref_weight,
            data.mask,
            bias=data.bias,
            ref_bias=data.ref_bias,
        ),
    )


FUNCTIONS = {"mean": mean, "none": none, "stats": stats, "penalty": penalty}
LEARN = {"mean": (*LEAVES, "weights")}  # what a function has a gradient to, by default LEAVES
named = pytest.mark.parametrize("name", FUNCTIONS)


def run(function: Callable, data: SimpleNamespace) -> tuple[torch.Tensor, ...]:
    """The function's outputs."""
    return function(data.hidden, data.weight, data)


def outcome(function: Callable, data: SimpleNamespace) -> list[torch.Tensor]:
    """Outputs and the gradients of every leaf, for fixed upstream gradients."""
    outputs = run(function, data)
    upstream = [
        data.upstream[i] if value.dim() else torch.full_like(value, 0.7)
        for i, value in enumerate(outputs)
    ]
    return [*outputs, *torch.autograd.grad(outputs, data.leaves, upstream)]


def assert_same(results: list[torch.Tensor], expected: list[torch.Tensor], units: int = 0) -> None:
    """Compare to the bit, or to some units of float32 in norm; no tensor is trivial."""
    assert len(results) == len(expected)
    for number, (result, value) in enumerate(zip(results, expected, strict=True)):
        assert bool((value != 0).any()), f"result {number} is zero everywhere: nothing was compared"
        assert result.dtype == value.dtype and result.shape == value.shape
        if units:
            testing.assert_gradient(
                result.reshape(1, -1), value.reshape(1, -1), f"result {number}", units * 2**-23
            )
        else:
            testing.assert_same_bits(result, value, f"result {number}")


# ---- torch.compile


@pytest.mark.parametrize(
    "name, compiler, dynamic",
    [(name, "aot_eager", dynamic) for name in FUNCTIONS for dynamic in (False, True)]
    + [("penalty", "inductor", True), ("stats", "inductor", False)],
)
def test_compile_equals_eager(implementation, name, compiler, dynamic) -> None:
    """fullgraph=True works, forward and backward, and gives eager's bits, at two sizes where they
    are dynamic.

    Except a scalar under inductor, which may add the tokens up in another order, and divide by an
    approximation on a GPU: 8 units of float32.
    """
    if compiler == "inductor" and implementation.device == "cpu" and not HAS_CPP:
        pytest.skip("inductor needs a C++ compiler on CPU")
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend=compiler, dynamic=dynamic)
    for leading in ((1, 2), (1, 3)) if dynamic else ((1, 2),):
        data = inputs(implementation.device, leading, LEARN.get(name, LEAVES))
        units = 8 if compiler == "inductor" and name in ("mean", "penalty") else 0
        assert_same(outcome(compiled, data), outcome(FUNCTIONS[name], data), units)


@named
def test_no_recompilation_for_each_length(implementation, name) -> None:
    """One graph for every number of tokens under dynamic=True, whether they fit into one chunk or
    not.
    """
    counter = CompileCounter()
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend=counter, dynamic=True)
    for tokens in (2, 3, 5) if implementation.interpreted else (2, 3, 1100):
        data = inputs(implementation.device, (tokens,), LEARN.get(name, LEAVES))
        assert_same(outcome(compiled, data), outcome(FUNCTIONS[name], data))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "learns", [("hidden",), ("ref_weight", "bias"), ("weight", "ref_hidden")], ids="-".join
)
@named
def test_compile_with_frozen_inputs(implementation, name, learns) -> None:
    """A graph whose gradients are those of what requires grad, and none under no_grad."""
    data = inputs(implementation.device, (2,), learns)
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend="aot_eager")
    expected = run(FUNCTIONS[name], data)
    with torch.no_grad():
        without = run(compiled, data)
    assert not any(value.requires_grad for value in without)
    assert_same(without, expected)
    for result, value in zip(run(compiled, data), expected, strict=True):
        assert result.requires_grad == value.requires_grad
        if value.requires_grad:  # a compiled graph gives zeros where eager gives None
            assert_same(
                *(
                    [
                        grad
                        for grad in torch.autograd.grad(
                            some.sum(), data.leaves, retain_graph=True, materialize_grads=True
                        )
                        if grad.any()
                    ]
                    for some in (result, value)
                )
            )


@pytest.mark.parametrize(
    "dtype, inside",
    [(torch.bfloat16, True), (torch.float16, False)],
    ids=["bf16 inside", "fp16 around"],
)
@named
def test_autocast_and_compile(implementation, name, dtype, inside) -> None:
    """Autocast in the compiled function or around it is autocast in eager: products of 16-bit
    values, float32 results, gradients as the inputs.
    """
    data = inputs(implementation.device, (1, 2), LEARN.get(name, LEAVES))
    for value in (data.hidden, data.ref_hidden):
        value.data.mul_(1 + 2**-11)  # no longer exact in 16 bits, so that a cast left out shows

    def function(*arguments):
        with (
            torch.autocast(implementation.device, dtype=dtype)
            if inside
            else contextlib.nullcontext()
        ):
            return FUNCTIONS[name](*arguments)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with contextlib.nullcontext() if inside else torch.autocast(implementation.device, dtype=dtype):
        results, expected = outcome(compiled, data), outcome(function, data)
    assert all(value.dtype == torch.float32 for value in results)
    assert_same(results, expected)
    short = SimpleNamespace(
        **vars(data) | {key: getattr(data, key).detach().to(dtype) for key in LEAVES}
    )
    for result, cast, wide in zip(
        results, run(FUNCTIONS[name], short), run(FUNCTIONS[name], data), strict=False
    ):
        testing.assert_same_bits(result, cast, "beside inputs that are cast")
        assert not torch.equal(result, wide), "autocast changed nothing"


# ---- autograd


@named
def test_without_gradient(implementation, name) -> None:
    """no_grad, inference_mode and tensors made in it give the same values, without gradient."""
    data = inputs(implementation.device, learns=LEARN.get(name, LEAVES))
    expected = run(FUNCTIONS[name], data)
    assert all(value.requires_grad for value in expected)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            results = run(FUNCTIONS[name], data)
            made_here = run(
                FUNCTIONS[name],
                SimpleNamespace(
                    **{key: value.clone() for key, value in vars(data).items() if key != "leaves"}
                ),
            )
        assert not any(value.requires_grad for value in (*results, *made_here))
        assert_same(results, expected)
        assert_same(made_here, expected)


class Body(torch.nn.Module):
    """A layer that makes hidden states, a head and the function under test: what is checkpointed or
    wrapped as a whole.
    """

    def __init__(self, name: str, data: SimpleNamespace, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.name, self.data = name, data
        self.layer = torch.nn.Linear(H, H, device=data.hidden.device)
        self.lm_head = torch.nn.Linear(H, V, bias=False, device=data.hidden.device).requires_grad_(
            not frozen
        )

    def forward(self, x: torch.Tensor):
        """The outputs of the function, from hidden states made of x."""
        return FUNCTIONS[self.name](torch.tanh(self.layer(x)), self.lm_head.weight, self.data)


WAYS = {
    "checkpoint": lambda body: functools.partial(checkpoint, body, use_reentrant=False),
    "reentrant checkpoint": lambda body: functools.partial(checkpoint, body, use_reentrant=True),
    "compiled": lambda body: torch.compile(body, fullgraph=True, backend="aot_eager"),
    "compiled checkpoint": lambda body: torch.compile(
        functools.partial(checkpoint, body, use_reentrant=False),
        fullgraph=True,
        backend="aot_eager",
    ),
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
    body = Body(name, inputs(implementation.device, (1, 2), learns=()), frozen)
    found = []
    for call in (body, WAYS[way](body)):
        x = body.data.hidden.detach().clone().requires_grad_()
        body.zero_grad()
        outputs = call(x)
        sum((value * (1 + i)).sum() for i, value in enumerate(outputs)).backward()
        assert (body.lm_head.weight.grad is None) == frozen
        found.append(
            [*outputs, x.grad, *(value.grad for value in body.parameters() if value.requires_grad)]
        )
    assert_same(found[1], found[0])


@pytest.mark.parametrize("function", [total, none], ids=["sum", "none"])
def test_gradient_accumulation(implementation, function) -> None:
    """Two half batches add up to the whole one in .grad, and gradients to a half's own tokens are
    the whole batch's.

    Logits are the same whatever the batch. A weight's gradient adds up 8 terms of both signs in
    another order, a hidden state's adds 19, each rounding being 2^-24 of terms that are up to 8
    times the sum: 19·8·2^-24 = 1e-5.
    """
    whole = inputs(implementation.device, (4, 2))
    run(function, whole)[0].sum().backward()
    expected = [value.grad for value in whole.leaves]
    for value in whole.leaves:
        value.grad = None
    for half in (slice(0, 2), slice(2, 4)):
        part = SimpleNamespace(
            **vars(whole)
            | {name: getattr(whole, name)[half] for name in ("hidden", "ref_hidden", "mask")}
        )
        run(function, part)[0].sum().backward()
    for name, leaf, exact in zip(LEAVES, whole.leaves, expected, strict=True):
        testing.assert_gradient(
            leaf.grad.reshape(1, -1), exact.reshape(1, -1), f"gradient to {name}", 1e-5
        )


@named
def test_second_backward_over_a_retained_graph(implementation, name) -> None:
    """The second gradient is the first, .grad adds up, and what a caller does in place to a
    gradient changes no later one.
    """
    data = inputs(implementation.device, learns=LEARN.get(name, LEAVES))
    loss = sum(value.sum() for value in run(FUNCTIONS[name], data))
    first = torch.autograd.grad(loss, data.leaves, retain_graph=True)
    kept = [value.clone() for value in first]
    for value in first:
        value.zero_()
    loss.backward(retain_graph=True)
    for leaf in data.leaves:
        leaf.grad.mul_(2)
    loss.backward()
    assert_same([leaf.grad for leaf in data.leaves], [3 * value for value in kept])


# ---- LoRA: the reference is the same model without its adapter, the lm_head is frozen and shared


class LoRALinear(torch.nn.Linear):
    """A frozen linear layer and a trained product of two thin matrices that can be switched off."""

    enabled = True

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__(inner, outer)
        self.requires_grad_(False)
        self.lora_A, self.lora_B = (
            torch.nn.Parameter(torch.randn(2, inner)),
            torch.nn.Parameter(torch.zeros(outer, 2)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output, with the adapter's where it is enabled."""
        return super().forward(x) + (x @ self.lora_A.T @ self.lora_B.T if self.enabled else 0)


def hand_made_lora() -> SimpleNamespace:
    """Two LoRA layers and a head in plain torch."""
    layers = torch.nn.Sequential(
        torch.nn.Embedding(V, H).requires_grad_(False),
        LoRALinear(H, H),
        torch.nn.Tanh(),
        LoRALinear(H, H),
    )

    disabled = functools.partial(mock.patch.object, LoRALinear, "enabled", False)
    return SimpleNamespace(
        model=layers,
        hidden=layers,
        disabled=disabled,
        lm_head=torch.nn.Linear(H, V, bias=False).requires_grad_(False),
    )


def peft_lora() -> SimpleNamespace:
    """A Llama of one layer under peft's LoRA."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    sizes = {
        "vocab_size": V,
        "hidden_size": H,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=16)
    )
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    base = model.get_base_model()
    return SimpleNamespace(
        model=model,
        hidden=lambda tokens: base.model(input_ids=tokens).last_hidden_state,
        disabled=model.disable_adapter,
        lm_head=base.lm_head,
    )


@pytest.mark.parametrize("make", [hand_made_lora, peft_lora], ids=["hand_made", "peft"])
def test_lora(implementation, make) -> None:
    """A fresh adapter has a loss and gradients of exactly 0; a trained one the definition's, to
    1e-5; the frozen head has none.
    """
    torch.manual_seed(0)
    with torch.device(implementation.device):
        lora = make()
    torch.nn.init.normal_(lora.lm_head.weight, std=1.0)
    tokens = torch.arange(6, device=implementation.device).reshape(2, 3)
    mask = tokens != 4
    with torch.no_grad(), lora.disabled():
        reference = lora.hidden(tokens)
    adapters = {name: value for name, value in lora.model.named_parameters() if value.requires_grad}
    assert len(adapters) == 4 and all("lora_" in name for name in adapters)

    loss = functools.partial(
        fastkl.linear_kl_divergence,
        weight=lora.lm_head.weight,
        ref_hidden=reference,
        reduction="mean",
        mask=mask,
    )
    fresh = loss(lora.hidden(tokens))
    assert fresh.item() == 0 and all(
        not bool(grad.any()) for grad in torch.autograd.grad(fresh, list(adapters.values()))
    )

    for value in adapters.values():
        torch.nn.init.normal_(value, std=0.5)
    (hidden := lora.hidden(tokens)).retain_grad()
    (result := loss(hidden)).backward()
    assert lora.lm_head.weight.grad is None and not reference.requires_grad
    exact_hidden = testing.leaf(hidden.double())
    heads = [
        F.linear(value, lora.lm_head.weight.double())
        for value in (exact_hidden, reference.double())
    ]
    exact = testing.truth(*heads).kl[mask].mean()
    exact.backward()
    testing.assert_near(result, exact, 1e-5, 0.0, "loss")
    testing.assert_gradient(
        hidden.grad.flatten()[None],
        exact_hidden.grad.flatten()[None],
        "gradient to the hidden states",
    )
    assert all(bool(value.grad.any()) for value in adapters.values())


# ---- what is held between forward and backward


def per_token(name: str, data: SimpleNamespace) -> int:
    """Bytes: `stats` keeps both models' logits, float32."""
    return 40 + (2 * 4 * len(data.weight) if name == "stats" else 0)


def saved_bytes(function: Callable, data: SimpleNamespace) -> dict[int, int]:
    """Bytes of every storage that autograd saves, by address."""
    held = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        held[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        run(function, data)
    return held


def sized(
    implementation, learns: tuple[str, ...], dtype: torch.dtype = torch.float32
) -> tuple[SimpleNamespace, list[int]]:
    """Inputs of which a token's share and a head's can be told apart, and their addresses."""
    leading, vocabulary = ((4,), 64) if implementation.interpreted else ((32,), 512)
    data = inputs(implementation.device, leading, learns, dtype, vocabulary)
    return data, [
        value.untyped_storage().data_ptr()
        for value in vars(data).values()
        if isinstance(value, torch.Tensor)
    ]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
@pytest.mark.parametrize(
    "learns",
    [("hidden",), ("hidden", "weight"), ("ref_hidden",), (*LEAVES, "weights")],
    ids=["frozen", "head", "other", "all"],
)
@pytest.mark.parametrize("name", ["mean", "sum", "penalty"])
def test_bytes_saved_for_a_scalar(implementation, name, learns, dtype) -> None:
    """One tensor like each input that requires grad, in float32 for a float16 head, and none of the
    hidden states and weights themselves.
    """
    learns, function = (
        tuple(key for key in learns if key != "weights" or name == "mean"),
        FUNCTIONS.get(name, total),
    )
    data, addresses = sized(implementation, learns, dtype)
    gradients = sum(
        getattr(data, key).numel()
        * (
            4
            if dtype == torch.float16 and not key.endswith("hidden")
            else getattr(data, key).element_size()
        )
        for key in learns
    )
    saved = saved_bytes(function, data)
    assert not set(saved) & {getattr(data, key).untyped_storage().data_ptr() for key in LEAVES}
    assert (
        gradients
        <= sum(size for address, size in saved.items() if address not in addresses)
        <= gradients + 16
    )  # and a count of tokens


@named
def test_bytes_left(implementation, name) -> None:
    """While the results live, nothing is left allocated but they and what is saved; under
    activation checkpointing, nothing but they.
    """
    data, _ = sized(implementation, LEAVES)
    tokens, slack = (
        data.mask.numel(),
        512 * 16 if implementation.device == "cuda" else 0,
    )  # the GPU allocator's rounding
    results = {"none": 4 * tokens, "stats": 20 * tokens}.get(
        name, 64
    ) + slack  # 64: a loss, and a penalty's statistics
    held = (
        per_token(name, data) * tokens
        if name in ("none", "stats")
        else sum(value.nbytes for value in data.leaves)
    )
    assert allocated(implementation.device, lambda: run(FUNCTIONS[name], data))[1] <= results + held
    for again in (False, True):
        checkpointed = functools.partial(
            checkpoint,
            lambda *leaves: run(FUNCTIONS[name], data),
            *data.leaves,
            use_reentrant=again,
            preserve_rng_state=False,
        )
        assert allocated(implementation.device, checkpointed)[1] <= results
