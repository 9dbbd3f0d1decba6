"""The linear functions inside PyTorch: torch.compile, checkpoints, hooks, frozen inputs, and the
bytes held for backward.
"""

import functools
from collections.abc import Callable

import linear_cases
import linear_inputs
import memory
import pytest
import torch
from cases import HAS_CPP
from linear_cases import assert_same, outcome
from linear_inputs import INPUTS, Case, small_case
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

NAMES = ("mean", "none", "stats", "penalty")
named = pytest.mark.parametrize("name", NAMES)


def made(name: str, leading: tuple[int, ...] = (2, 2), **changes) -> Case:
    """Make a small case whose second token does not count, with a Head for one model and a
    temperature for each, where the call takes one.
    """
    mask = torch.arange(torch.Size(leading).numel()).reshape(leading) != 1
    more = {"mask": mask, "chunk_size": None, "heads": ((4.0, 1.7), None)}
    if name != "penalty":
        more |= {"temperature": 0.5 + torch.rand(leading), "ref_temperature": 0.7}
    return small_case(name, leading=leading, **{**more, **changes})


def body(case: Case, inputs: dict[str, torch.Tensor], **more) -> dict[str, torch.Tensor]:
    """Compute from hidden states that another layer made."""
    return linear_cases.call(case, {**inputs, "hidden": torch.tanh(inputs["hidden"])}, **more)


def transposed(value: torch.Tensor) -> torch.Tensor:
    """Return another layout of the same numbers, as a hook may."""
    return value if value.dim() < 2 or value.requires_grad else value.mT.contiguous().mT


def hooked(case: Case, inputs: dict, manager: Callable) -> dict[str, torch.Tensor]:
    with manager():
        return body(case, inputs)


hooks = torch.autograd.graph
compiling = functools.partial(torch.compile, fullgraph=True)
recomputing = functools.partial(checkpoint, body, use_reentrant=False)
caching = functools.partial(
    create_selective_checkpoint_contexts, lambda *_, **__: CheckpointPolicy.MUST_SAVE
)
WAYS = {
    "eager": body,
    "transposed": functools.partial(
        hooked, manager=lambda: hooks.saved_tensors_hooks(transposed, transposed)
    ),
    "offloaded": functools.partial(hooked, manager=hooks.save_on_cpu),
    "checkpoint": recomputing,
    "selective checkpoint": functools.partial(recomputing, context_fn=caching),
    "dynamo": compiling(body, backend="eager"),
    "compiled": compiling(body, backend="aot_eager"),
    "compiled checkpoint": compiling(recomputing, backend="aot_eager"),
}


@pytest.mark.parametrize("way", WAYS)
@named
def test_a_retained_graph(implementation, name, way) -> None:
    """The bits of logits computed again, twice: kept, offloaded and back in any layout, recomputed
    by a checkpoint, or inside a graph, whose op overwrites nothing.
    """
    case = made(name)
    inputs = linear_inputs.leaves(case, device=implementation.device)
    expected = outcome(case, implementation.device, body, recompute=True)
    values = WAYS[way](case, inputs)
    # What a policy cached is there for one backward.
    for retain in (False,) if "selective" in way else (True, False):
        assert_same(linear_cases.differentiate(case, inputs, values, retain), expected)


@pytest.mark.parametrize(
    "name, compiler", [*((name, "aot_eager") for name in NAMES), ("none", "inductor")]
)
def test_one_graph_for_every_length(implementation, name, compiler) -> None:
    """fullgraph=True with dynamic=True works, forward and backward, and gives eager's bits for
    every number of tokens, whether they fit into one chunk or not.
    """
    if compiler == "inductor" and implementation.device == "cpu" and not HAS_CPP:
        pytest.skip("inductor needs a C++ compiler on CPU")
    counter, graphs = CompileCounterWithBackend(compiler), []
    compiled = compiling(linear_cases.call, backend=counter, dynamic=True)
    for tokens in (2, 3, 1100):
        case = made(name, (tokens,))
        found = outcome(case, implementation.device, compiled)
        assert_same(found, outcome(case, implementation.device))
        graphs.append(counter.frame_count)
    assert len({*graphs}) == 1


@pytest.mark.parametrize("learns", [("hidden",), ("weight", "ref_hidden")], ids="-".join)
@named
def test_with_frozen_inputs_and_without_gradient(implementation, name, learns) -> None:
    """A graph whose gradients are those of what requires grad; no_grad, inference_mode and tensors
    made in it give the same values, which need no gradient.
    """
    case, device = made(name, (3,), trainable=learns), implementation.device
    compiled = compiling(linear_cases.call, backend="aot_eager")
    inputs, expected = linear_inputs.leaves(case, device=device), outcome(case, device)
    assert_same(outcome(case, device, compiled), expected)
    with torch.no_grad():
        found = [compiled(case, inputs)]
    with torch.inference_mode():
        made_here = {key: value.clone() for key, value in inputs.items()}
        found += [linear_cases.call(case, given) for given in (inputs, made_here)]
    for values in found:
        assert not any(value.requires_grad for value in values.values())
        assert_same(values, {key: expected[key] for key in values})


# ---- what is held between forward and backward


def sized(implementation, name: str, learns: tuple[str, ...], dtype=torch.float32) -> tuple:
    """Make a call of which a token's share and a head's can be told apart, and its inputs."""
    tokens, vocabulary = (4, 64) if implementation.interpreted else (32, 512)
    sizes = {"sizes": {"vocabulary": vocabulary, "width": 8, "ref_width": 6}}
    plain = {"temperature": 1.0, "ref_temperature": None, "heads": (None, None)}
    case = made(name, (tokens,), dtype=dtype, trainable=learns, **plain, **sizes)
    vectors = {name: getattr(case, name).to(implementation.device) for name in ("mask", "tokens")}
    inputs = linear_inputs.leaves(case, device=implementation.device)
    return functools.partial(linear_cases.call, case.but(**vectors)), inputs, vectors


def held(call: Callable, inputs: dict, vectors: dict) -> int:
    saved = memory.saved(lambda: call(inputs))
    for value in (*inputs.values(), *vectors.values()):
        saved.pop(value.untyped_storage().data_ptr(), None)
    return sum(saved.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("learns", [("hidden",), ("hidden", "weight"), ("ref_hidden",), INPUTS])
@pytest.mark.parametrize("name", ["mean", "sum", "penalty"])
def test_bytes_saved_for_a_scalar(implementation, name, learns, dtype) -> None:
    """One tensor like each input that requires grad, in float32 for a float16 head, and none of the
    hidden states and weights themselves.
    """
    call, inputs, vectors = sized(implementation, name, learns, dtype)
    heads = {inputs[key].untyped_storage().data_ptr() for key in INPUTS[:6]}
    assert not heads & set(memory.saved(lambda: call(inputs)))
    gradients = sum(
        value.numel() * (4 if dtype == torch.float16 and "hidden" not in key else value.itemsize)
        for key, value in inputs.items()
        if key in learns
    )
    more = held(call, inputs, vectors) - gradients
    assert 0 <= more <= 16 + 4 * len(inputs["hidden"])  # a count, weights


@pytest.mark.parametrize("learns", [INPUTS, ("hidden",)], ids=["all", "frozen"])
@named
def test_bytes_left(implementation, name, learns) -> None:
    """While the results live, nothing is left allocated but they and what is saved: 40 bytes per
    token for any upstream gradient, and of the vocabulary's size only kept logits, else a gradient
    like each input; under activation checkpointing, nothing but the results.
    """
    call, inputs, vectors = sized(implementation, name, learns)
    device, tokens = implementation.device, len(inputs["hidden"])
    results = {"none": 4 * tokens, "stats": 20 * tokens}.get(name, 64)
    results += 512 * 16 if device == "cuda" else 0  # the GPU allocator's rounding
    saved = sum(value.nbytes for key, value in inputs.items() if key in learns)
    if name in ("none", "stats"):
        saved = tokens * (40 + (2 * 4 * len(inputs["weight"]) if name == "stats" else 0))
        assert held(call, inputs, vectors) == saved
    assert memory.allocated(device, lambda: call(inputs))[1] <= results + saved

    def unpacked(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(call(dict(zip(inputs, values, strict=True))).values())

    options = {"preserve_rng_state": False}
    for again in (False, True):
        run = functools.partial(checkpoint, unpacked, *inputs.values(), use_reentrant=again)
        assert memory.allocated(device, lambda: run(**options))[1] <= results  # noqa: B023
