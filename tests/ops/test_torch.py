"""The ops inside PyTorch: opcheck, torch.compile, export, vmap, checkpointing, autocast, CUDA
graphs, and the bytes that they allocate and hold.
"""

from collections.abc import Callable
from types import SimpleNamespace

import cases
import family
import memory
import pytest
import test_topk
import torch
from cases import HAS_CPP
from test_dispatch import assert_same
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import fastkl
from fastkl import backend, testing
from fastkl.ops import row_blocks
from fastkl.ops.engine import ENGINES
from fastkl.ops.fields import FIELDS

ALL = "logprob,entropy,ref_logprob,kl,ref_kl"
V = 19


def inputs(
    device: str,
    leading: tuple[int, ...] = (2, 2),
    vocabulary: int = V,
    grad: bool = True,
    seed: int = 0,
) -> SimpleNamespace:
    count = torch.Size(leading).numel()
    p, q = testing.pair("normal3", count, vocabulary, 0.5, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    made = {
        "p": p.reshape(*leading, vocabulary),
        "q": q.reshape(*leading, vocabulary),
        "tokens": torch.randint(vocabulary, leading, generator=generator),
        "mask": torch.arange(count).reshape(leading) != 1,
        "temperatures": 0.5 + torch.rand(leading, generator=generator),
        "upstream": torch.randn(len(FIELDS), *leading, generator=generator),
    }
    made = {name: value.to(device) for name, value in made.items()}
    return SimpleNamespace(**made | {name: made[name].requires_grad_(grad) for name in "pq"})


def kl(p, q, data):
    return (fastkl.kl_divergence(p, q, mask=data.mask),)


def stats(p, q, data):
    return tuple(
        fastkl.token_stats(p, data.tokens, q, temperature=data.temperatures, mask=data.mask)
    )


def divergences(p, q, data):
    given = {"mask": data.mask, "temperature": data.temperatures}
    values = [call(p, q, **given, **options) for call, _, options in family.KINDS.values()]
    return *values[:2], values[2] + values[3], *values[4:]


def listed(p, q, data):
    given = p + q, *(p - q).detach().log_softmax(-1).topk(5), data.mask
    return tuple(
        sum(
            fastkl.topk_kl_divergence(*given, direction=direction, tail=tail)
            for direction in test_topk.DIRECTIONS
        )
        for tail in test_topk.TAILS
    )


def outcome(function: Callable, data: SimpleNamespace) -> list[torch.Tensor]:
    outputs = function(data.p, data.q, data)
    upstream = [data.upstream[i] if v.dim() else torch.ones_like(v) for i, v in enumerate(outputs)]
    return [*outputs, *torch.autograd.grad(outputs, (data.p, data.q), upstream)]


# ---- opcheck

# fields, with q, with tokens, with mask, with a temperature per row, leading shape; a divergence
# beside the KL, and its share
MIXES = [
    ("kl", True, False, False, False, (2,)),
    ("kl", True, False, True, True, (2, 1)),
    ("kl", True, False, False, False, ()),
    ("kl", True, False, False, False, (0,)),
    ("logprob", False, True, False, False, (2,)),
    ("logprob", True, True, False, True, (2,)),
    ("logprob,entropy", False, True, True, False, (2, 1)),
    ("logprob,entropy", False, True, False, True, (0, 2)),
    ("kl", True, False, True, True, (2, 1), "js", 0.7),
    ("kl", True, False, False, False, (2,), "renyi", 2.0),
    ("kl", True, False, False, False, (0,), "total_variation", 0.0),
    (ALL, True, True, False, False, (2,)),
    (ALL, True, True, True, True, (1, 2)),
]


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_opcheck(implementation, mix, grad) -> None:
    """Schema, fake tensors, autograd registration and AOT dispatch with dynamic shapes: every mix
    on the reference, and in the interpreter the one in which most takes part, since the rules do
    not depend on the kernels.
    """
    if implementation.interpreted and mix != MIXES[-1]:
        pytest.skip("the ops' rules for this mix are checked on the reference")
    fields, with_q, tokens, mask, temperatures, leading, *other = mix
    data, ops = inputs(implementation.device, leading, grad=grad), torch.ops.fastkl
    tensors = (
        data.p,
        data.q if with_q else None,
        data.tokens if tokens else None,
        data.mask if mask else None,
        data.temperatures if temperatures else None,
    )
    temperature = 1.0 if temperatures else 0.7
    chosen = (implementation.backend, *(other or ("kl", 0.0)), "", 0, 0, 0, 0)
    given = (*tensors, temperature, fields, *chosen)
    torch.library.opcheck(ops.row_statistics.default, given)
    if not grad:
        saved, asked = ops.row_statistics(*given)[-1], fields.split(",")
        upstream = [data.upstream[i] if name in asked else None for i, name in enumerate(FIELDS)]
        for wrt in [(True, with_q)] if mix != MIXES[-1] else [(1, 1), (1, 0), (0, 1)]:
            rest = (saved, *upstream, *map(bool, wrt))
            torch.library.opcheck(ops.row_gradients.default, (*given, *rest))


# ---- torch.compile and export


PENALTY = fastkl.KLPenalty(0.3)
COMPILED = {
    "kl": kl,
    "stats": stats,
    "divergences": divergences,
    "listed": listed,
    "penalty": lambda p, q, data: (PENALTY(p, q, data.mask),),
}


@pytest.mark.parametrize(
    "name, compiler, dynamic",
    [(name, "aot_eager", False) for name in COMPILED]
    + [(name, "aot_eager", True) for name in COMPILED if name != "listed"]
    + [("kl", "inductor", False), ("stats", "inductor", True), ("penalty", "inductor", False)],
)
def test_compile_equals_eager(implementation, name, compiler, dynamic) -> None:
    """fullgraph=True works, forward and backward, and gives eager's bits, at two sizes where they
    are dynamic.

    Except KLPenalty under inductor, which adds the tokens up in another order and on a GPU divides
    by an approximation: 8 units of float32 there.
    """
    inductor, function = compiler == "inductor", COMPILED[name]
    if inductor and (
        implementation.interpreted
        or (implementation.device == "cpu" and (not HAS_CPP or name == "penalty"))
    ):
        pytest.skip("inductor needs a C++ compiler, takes 20 s of it, or runs on the reference")
    compiled = torch.compile(function, fullgraph=True, backend=compiler, dynamic=dynamic)
    for leading in ((1, 2), (1, 3)) if dynamic else ((1, 2),):
        data = inputs(implementation.device, leading)
        results, expected = outcome(compiled, data), outcome(function, data)
        if name != "penalty" or not inductor:
            assert_same(results, expected)
        for result, value in zip(results, expected, strict=True):
            testing.assert_gradient(result.view(1, -1), value.view(1, -1), "result", 8 * 2**-23)


@pytest.mark.parametrize("dynamic, graphs", [(True, 1), (None, 2)], ids=["dynamic", "automatic"])
def test_no_recompilation_for_each_length(implementation, dynamic, graphs) -> None:
    counter, kl = CompileCounter(), fastkl.kl_divergence
    compiled = torch.compile(kl, fullgraph=True, backend=counter, dynamic=dynamic)
    for rows in (2, 3, 4):
        data = inputs(implementation.device, (rows,), grad=False)
        given = {"temperature": data.temperatures * rows}
        assert torch.equal(compiled(data.p, data.q, **given), kl(data.p, data.q, **given))
    assert counter.frame_count == graphs


def test_use_backend_and_compile(implementation, monkeypatch) -> None:
    ran = []
    for name, engine in ENGINES.items():
        monkeypatch.setattr(engine, "forward", lambda *given, name=name: ran.append(name))
    monkeypatch.setattr(backend, "triton_problems", lambda *logits, **reading: ())
    data = inputs(implementation.device, (3,), grad=False)
    outside = torch.compile(fastkl.kl_divergence, fullgraph=True, backend="eager")
    for name in ("reference", "triton", "reference"):
        with fastkl.use_backend(name):
            outside(data.p, data.q)
    assert ran == ["reference", "triton", "reference"]

    def function(p, q):
        with fastkl.use_backend("reference"):
            first = fastkl.kl_divergence(p, q)
        with fastkl.use_backend("triton"):
            return first + fastkl.kl_divergence(p, q)

    torch.compile(function, fullgraph=True, backend="eager")(data.p, data.q)
    assert ran[3:] == ["reference", "triton"]
    assert fastkl.explain(data.p).backend == implementation.backend


class Model(torch.nn.Module):
    def forward(self, p, q, tokens, mask):
        stats = fastkl.token_stats(p, tokens, q, mask=mask)
        return fastkl.kl_divergence(p, q, mask=mask), stats.logprob


@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
def test_export(implementation, strict) -> None:
    first, other = (
        (data.p, data.q, data.tokens, data.mask)
        for data in (inputs(implementation.device, (n,), grad=False, seed=n) for n in (4, 5))
    )
    shapes = ({0: torch.export.Dim("rows", min=2, max=4096)},) * 4
    exported = torch.export.export(Model(), first, dynamic_shapes=shapes, strict=strict)
    assert_same([*exported.module()(*other)], [*Model()(*other)])


# ---- autograd


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [1000, 70001])
def test_cuda_graph(vocabulary) -> None:
    data, other = (inputs("cuda", (2, 5), vocabulary, seed=seed) for seed in (0, 1))
    expected = outcome(stats, other)
    given = (vars(each).values() for each in (data, other))
    assert_same(cases.replayed(lambda: outcome(stats, data), *given), expected)


# ---- memory

# Rows and vocabulary to measure at: as large as each implementation lets a test be.
SIZES = {"reference": (32, 512), "interpreter": (2, 512), "gpu": (2048, 128256)}
PER_ROW = 64  # bytes


def sized(implementation, times: int = 1) -> SimpleNamespace:
    kind = "gpu" if implementation.device == "cuda" else "reference"
    rows, vocabulary = SIZES["interpreter" if implementation.interpreted else kind]
    data = inputs(implementation.device, (times * rows,), vocabulary)
    dtype = torch.bfloat16 if kind == "gpu" else torch.float32
    p, q = (value.detach().to(dtype).requires_grad_() for value in (data.p, data.q))
    more = {"p": p, "q": q, "rows": times * rows, "mask": None, "temperatures": 1.0}
    return SimpleNamespace(**{**vars(data), **more, "vocabulary": vocabulary})


# and how many float32 results per row
FUNCTIONS = {
    "kl": (kl, 1),
    "stats": (stats, len(FIELDS)),
    **{
        name: (lambda p, q, data, member=member: (member(p, q, data.mask),), 1)
        for name, member in [*family.KINDS.items()][: 1 if cases.INTERPRETING else None]
    },
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bytes_allocated(implementation, name, monkeypatch) -> None:
    """Forward allocates its results, at most 64 bytes per row and 32 per segment of 32768 entries;
    backward the gradients and at most 64 per row.

    The reference works on a few rows at a time, whose temporaries do not count: there the bound is
    on what twice the rows add to the peak.
    """
    function, fields = FUNCTIONS[name]
    monkeypatch.setattr(row_blocks, "BLOCK_ELEMENTS", 4096)
    monkeypatch.setattr(row_blocks, "ROWS_AT_ONCE", 8)

    def peaks(data: SimpleNamespace) -> torch.Tensor:
        outputs = function(data.p, data.q, data)
        upstream = [torch.randn_like(value) for value in outputs]
        calls = (
            lambda: function(data.p, data.q, data),
            lambda: torch.autograd.grad(outputs, (data.p, data.q), upstream, retain_graph=True),
        )
        return torch.tensor([memory.allocated(implementation.device, call)[0] for call in calls])

    data = sized(implementation)
    forward, backward = (
        peaks(data) if implementation.kernels else peaks(sized(implementation, 2)) - peaks(data)
    ).tolist()
    slack = 512 * 16 if implementation.device == "cuda" else 64  # the GPU allocator's rounding
    assert forward <= data.rows * (4 * fields + PER_ROW + 32 * -(-data.vocabulary // 32768)) + slack
    gradients = 2 * data.rows * data.vocabulary * data.p.element_size()
    assert gradients <= backward <= gradients + data.rows * PER_ROW + slack


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bytes_held_for_backward(implementation, name) -> None:
    """Beyond the inputs, at most 64 bytes per row."""
    data = sized(implementation)
    held = memory.saved(lambda: FUNCTIONS[name][0](data.p, data.q, data))
    own = {value.untyped_storage().data_ptr() for value in (data.p, data.q, data.tokens)}
    more = sum(size for address, size in held.items() if address not in own)
    assert 0 < more <= PER_ROW * data.rows


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_bytes_held_under_checkpointing(implementation, name, reentrant) -> None:
    """No memory beyond the results, and the factor of an exchanged divergence."""
    (function, fields), data = FUNCTIONS[name], sized(implementation)
    given, more = (function, data.p, data.q, data), {"preserve_rng_state": False}
    left = memory.allocated(
        implementation.device, lambda: checkpoint(*given, use_reentrant=reentrant, **more)
    )[1]
    assert left <= 4 * fields * data.rows + (512 * 8 if implementation.device == "cuda" else 8)
