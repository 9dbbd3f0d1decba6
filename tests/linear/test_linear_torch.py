"""The linear functions inside PyTorch: torch.compile, checkpoints, hooks and frozen inputs;
recompute=, which changes no bit; the bytes held for backward; and a GPU alone.
"""

import functools
import itertools
from collections.abc import Callable

import linear_cases
import memory
import pytest
import torch
from cases import replayed, waits
from linear_inputs import (
    FIELDS,
    INPUTS,
    LARGEST_KEPT,
    MORE_CALLS,
    Case,
    heads_on_meta,
    leaves,
    planned,
    small_case,
    tuned,
    workspace,
)
from test_linear_costs import CHUNK, H, N, V, count, step, tensors
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import fastkl

NAMES = ("mean", "none", "stats", "penalty")
named = pytest.mark.parametrize("name", NAMES)


def made(name: str, leading: tuple[int, ...] = (2, 2), **changes) -> Case:
    """Make a small case whose second token does not count, with a Head for one model and a
    temperature for each, where the call takes one.
    """
    mask = torch.arange(torch.Size(leading).numel()).reshape(leading) != 1
    more = {"mask": mask, "chunk_size": None, "heads": ((4.0, 1.7), None)}
    divided = {"temperature": 0.5 + torch.rand(leading), "ref_temperature": 0.7}
    more |= divided if name != "penalty" else {}
    return small_case(name, leading=leading, **{**more, **changes})


def body(case: Case, inputs: dict[str, torch.Tensor], **more) -> dict[str, torch.Tensor]:
    return linear_cases.call(case, {**inputs, "hidden": torch.tanh(inputs["hidden"])}, **more)


def transposed(value: torch.Tensor) -> torch.Tensor:
    return value if value.dim() < 2 or value.requires_grad else value.mT.contiguous().mT


def hooked(case: Case, inputs: dict, manager: Callable) -> dict[str, torch.Tensor]:
    with manager():
        return body(case, inputs)


compiling = functools.partial(torch.compile, fullgraph=True)
recomputing = functools.partial(checkpoint, body, use_reentrant=False)


# The ops of torch change tensors in place, which cannot be cached.
def policy(_: object, op: torch._ops.OpOverload, *__: object, **___: object) -> CheckpointPolicy:
    saved = op.namespace == "fastkl"
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


caching = functools.partial(create_selective_checkpoint_contexts, policy)
WAYS = {
    "eager": body,
    "transposed": functools.partial(
        hooked, manager=lambda: torch.autograd.graph.saved_tensors_hooks(transposed, transposed)
    ),
    "offloaded": functools.partial(hooked, manager=torch.autograd.graph.save_on_cpu),
    "checkpoint": recomputing,
    "selective checkpoint": functools.partial(recomputing, context_fn=caching),
    "dynamo": compiling(body, backend="eager"),
    "compiled": compiling(body, backend="aot_eager"),
    "compiled checkpoint": compiling(recomputing, backend="aot_eager"),
}


@pytest.mark.parametrize(
    "name, way",
    [
        *itertools.product(NAMES, WAYS),
        *itertools.product(MORE_CALLS, [way for way in WAYS if way not in ("dynamo", "compiled")]),
    ],
)
def test_a_retained_graph(implementation, name, way) -> None:
    """The bits of logits computed again, twice: kept, offloaded and back in any layout, recomputed
    by a checkpoint, or inside a graph, whose op overwrites nothing.
    """
    case = made(name)
    inputs = leaves(case, device=implementation.device)
    expected = linear_cases.outcome(case, implementation.device, body, recompute=True)
    values = WAYS[way](case, inputs)
    # A cached policy serves one backward.
    for retain in (False,) if "selective" in way else (True, False):
        linear_cases.assert_same(linear_cases.differentiate(case, inputs, values, retain), expected)


@pytest.mark.parametrize(
    "name, compiler",
    [*((name, "aot_eager") for name in (*NAMES, "topk", "given")), ("none", "inductor")],
)
def test_one_graph_for_every_length(implementation, name, compiler) -> None:
    if compiler == "inductor" and implementation.device == "cpu":
        pytest.skip("on a CPU tests/ops/test_torch.py runs inductor")
    counter, graphs = CompileCounterWithBackend(compiler), []
    compiled = compiling(linear_cases.call, backend=counter, dynamic=True)
    for tokens in (2, 3, 1100):
        case = made(name, (tokens,))
        found = linear_cases.outcome(case, implementation.device, compiled)
        linear_cases.assert_same(found, linear_cases.outcome(case, implementation.device))
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
    inputs, expected = leaves(case, device=device), linear_cases.outcome(case, device)
    linear_cases.assert_same(linear_cases.outcome(case, device, compiled), expected)
    with torch.no_grad():
        found = [compiled(case, inputs)]
    with torch.inference_mode():
        found += [linear_cases.call(case, inputs), linear_cases.run(case, device)[1]]
    for values in found:
        assert not any(value.requires_grad for value in values.values())
        linear_cases.assert_same(values, {key: expected[key] for key in values})


# ---- recompute=

LEARNED = (
    ("hidden", "weight"),
    ("hidden",),
    ("hidden", "weight", "ref_hidden", "ref_weight"),
    ("ref_hidden", "ref_weight"),
)
MASK, DIVISORS = torch.arange(N) % 3 != 1, torch.linspace(0.5, 2.0, N)


def stats_case(dtype=torch.bfloat16, learned: tuple = LEARNED[0], **changes) -> Case:
    sizes = {"vocabulary": V, "width": H, "ref_width": H}
    options = {"leading": (N,), "sizes": sizes, "trainable": learned, "chunk_size": None}
    return small_case("stats", dtype, **{**options, **changes})


OPTIONS = {
    "plain": {},
    "masked chunks": {"chunk_size": CHUNK, "mask": MASK},
    "float32 logits": {"logits_dtype": torch.float32},
    "masked softcap": {"softcap": 2.0, "temperature": 0.7, "mask": MASK},
    "masked ratio": {"temperature": 0.7, "ref_temperature": 1.3, "mask": MASK},
    "heads": {
        "heads": ((3.0, 0.5), (None, 2.0)),
        "temperature": DIVISORS,
        "ref_temperature": DIVISORS.flip(0),
    },
    "one weight": {},
    # Rows that are read again, for the gradient of ref_kl to the reference.
    "far rows": {},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("learned", LEARNED, ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits(implementation, learned, options, dtype) -> None:
    """Kept or computed again, with products of the same shapes: for each set of fields."""
    case = stats_case(dtype, learned, **OPTIONS[options])
    case = case.without("ref_weight") if options == "one weight" else case
    if options == "far rows":
        case.tensors["hidden"][::5] *= 40
        case.tensors["ref_hidden"][::7] *= 60
    for fields in (FIELDS, FIELDS[:2], ("ref_logprob",), ("kl",), ("ref_kl",)):
        asked = case.but(fields=fields)
        again, kept = (
            linear_cases.outcome(asked, implementation.device, recompute=recompute)
            for recompute in (True, False)
        )
        linear_cases.assert_same(kept, again)


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("short", [0, 1], ids=["within", "above"])
def test_the_bound_on_kept_logits(monkeypatch, reference, logits_dtype, short) -> None:
    assert LARGEST_KEPT == 1 << 31
    tuned(monkeypatch, largest_kept=(1 + reference) * N * V * logits_dtype.itemsize - short)
    case = stats_case(logits_dtype=logits_dtype)
    case = case if reference else case.without("ref_hidden", "ref_weight", "ref_bias")
    for recompute, again in ((None, short), (True, 1), (False, 0)):
        given = linear_cases.run(case, "cpu", recompute=recompute)
        run = functools.partial(linear_cases.differentiate, case, *given)
        assert count(run, types=None) == 2 + again * (1 + reference)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_upstream_gradients(implementation) -> None:
    inputs = leaves(stats_case(torch.float32), device=implementation.device)
    hidden, weight, ref_hidden = (inputs[name] for name in ("hidden", "weight", "ref_hidden"))
    kl = fastkl.linear_kl_divergence(hidden, weight, ref_hidden, recompute=False)
    upstream = torch.tensor([1.0, 2.0], device=hidden.device)[:, None].expand(2, N)
    gradient = functools.partial(torch.autograd.grad, kl, hidden, retain_graph=True)
    (expected,) = gradient(upstream[0])
    for (found,) in (
        gradient(upstream, is_grads_batched=True),
        torch.func.vmap(gradient)(upstream),
    ):
        torch.testing.assert_close(found, torch.stack([expected, 2 * expected]))
    assert torch.equal(gradient(upstream[0])[0], expected)


def test_a_failed_backward_leaves_no_wrong_logits(monkeypatch) -> None:
    case = stats_case()
    inputs, values = linear_cases.run(case, "cpu")

    def fails(first: torch.Tensor, *_: object, **__: object) -> None:
        first.fill_(float("nan"))
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(torch, "mm", fails)
        linear_cases.differentiate(case, inputs, values, retain_graph=True)
    found = linear_cases.differentiate(case, inputs, values)
    linear_cases.assert_same(found, linear_cases.outcome(case, "cpu", recompute=True))


# ---- what is held between forward and backward

FP32, HELD = torch.float32, (("hidden",), ("hidden", "weight"), ("ref_hidden",), INPUTS)
HALVES = torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    "name, learns, dtype",
    [
        *itertools.product(NAMES, (INPUTS,), (FP32,)),
        ("stats", HELD[0], FP32),
        *itertools.product(("mean", "penalty"), HELD[:3], (FP32,)),
        *itertools.product(("mean", "sum", "penalty"), HELD, HALVES),
    ],
)
def test_bytes_left(implementation, name, learns, dtype) -> None:
    """While the results live, nothing is left allocated but they and what is saved: 40 bytes per
    token for any upstream gradient, and of the vocabulary's size only kept logits, else a gradient
    like each input, in float32 for a float16 head, and none of the inputs.
    """
    tokens, vocabulary = (4, 64) if implementation.interpreted else (32, 512)
    options = {"sizes": {"vocabulary": vocabulary, "width": 8, "ref_width": 6}, "dtype": dtype}
    options |= {"temperature": 1.0, "ref_temperature": None, "heads": (None, None)}
    case, device = made(name, (tokens,), trainable=learns, **options), implementation.device
    vectors = {key: getattr(case, key).to(device) for key in ("mask", "tokens")}
    inputs = leaves(case, device=device)
    call = functools.partial(linear_cases.call, case.but(**vectors))
    saved = memory.saved(lambda: call(inputs))
    heads, others = (
        sum(saved.pop(value.untyped_storage().data_ptr(), 0) for value in some.values())
        for some in (inputs, vectors)
    )
    expected = sum(
        value.numel() * (4 if dtype == torch.float16 and "hidden" not in key else value.itemsize)
        for key, value in inputs.items()
        if key in learns
    )
    if name in ("none", "stats"):
        expected = tokens * (40 + (2 * 4 * vocabulary if name == "stats" else 0))
        assert sum(saved.values()) == expected
    else:  # besides: a count, weights
        assert not heads and expected <= sum(saved.values()) + others <= expected + 16 + 4 * tokens
    results = {"none": 4 * tokens, "stats": 28 * tokens}.get(name, 64)
    results += 512 * 16 if device == "cuda" else 0  # the GPU allocator's rounding
    assert memory.allocated(device, lambda: call(inputs))[1] <= results + expected


# ---- a GPU alone: no synchronisation, CUDA graphs, the peak of memory

VECTORS = ("mask", "temperature", "tokens")
kinds = pytest.mark.parametrize("kind", ["none", "mean", "stats"])


def on_gpu(kind: str, dtype=torch.bfloat16, seed: int = 0, device: str = "cuda") -> Case:
    sizes = {"vocabulary": 1003, "width": 64, "ref_width": 48, "seed": seed}
    generator = torch.Generator(device).manual_seed(seed)
    mask, temperature = torch.rand(2, 300, generator=generator, device=device)
    return small_case(kind, dtype, leading=(300,), sizes=sizes, chunk_size=128, random=False).but(
        trainable=("hidden", "weight", "bias"),
        softcap=20.0 if kind == "none" else None,
        mask=mask < 0.8,
        temperature=temperature + 0.5,
        tokens=torch.randint(1003, (300,), generator=generator, device=device),
    )


def train(case: Case, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return linear_cases.differentiate(case, inputs, linear_cases.call(case, inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@kinds
def test_no_synchronisation(kind, dtype) -> None:
    case = on_gpu(kind, dtype=dtype)
    inputs = leaves(case, device="cuda")
    penalty = fastkl.LinearKLPenalty(0.1, reduction="sequence_mean")

    def step() -> None:
        train(case, inputs)
        penalty(**linear_cases.arguments(case, inputs)).backward()

    assert waits(step) == 0


@pytest.mark.gpu
@kinds
def test_cuda_graph(kind) -> None:
    case, other = (on_gpu(kind, seed=seed) for seed in (0, 1))
    inputs, others = (leaves(each, device="cuda") for each in (case, other))
    expected = train(other, others)
    given = [
        [*leaves_of.values(), *(getattr(each, name) for name in VECTORS)]
        for each, leaves_of in ((case, inputs), (other, others))
    ]
    results = replayed(lambda: train(case, inputs), *given)
    for name, value in expected.items():
        assert torch.equal(results[name], value) and bool((value != 0).any())


@pytest.mark.gpu
@pytest.mark.parametrize("n, one_product", [(4096, True), (12288, False)])
@pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float32])
def test_peak_memory(logits_dtype, n, one_product) -> None:
    """The docstring's formula, the returned gradients and little else: forward alone, and with a
    trainable weight.
    """
    h, v = 2048, 128256
    given = tensors("cuda", n, h, v)
    settings = {"reduction": "sum", "logits_dtype": logits_dtype}
    learning, frozen = (heads_on_meta(n, h, v, (k, False), logits_dtype) for k in (True, False))
    # Saved values, the row kernels' partial states, and cuBLAS's own workspace.
    slack = 64 * n + n * 4 * 28 + (1 << 24)
    with torch.no_grad():
        loss = memory.allocated("cuda", lambda: fastkl.linear_kl_divergence(**given, **settings))
    assert loss[0] <= workspace(frozen) + slack
    peak = memory.allocated("cuda", lambda: step(given, **settings))[0]
    assert peak <= workspace(learning) + 2 * (n * h + v * h) + slack
    assert (planned(learning)[1] == n) == one_product


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@kinds
def test_another_device_than_the_current_one(kind) -> None:
    first, second = (
        train(on_gpu(kind, device=device), leaves(on_gpu(kind), device=device))
        for device in ("cuda:0", "cuda:1")
    )
    assert all(torch.equal(second[name].cpu(), value.cpu()) for name, value in first.items())
