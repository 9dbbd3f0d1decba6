"""What only the Triton kernels promise: the same bits in any batch, at any position and stride;
offsets beyond 2^31; no recompiles.
"""

from __future__ import annotations

import inspect
import math
import os
import random

import cases
import pytest
import torch

import fastkl
from fastkl import divergence, kl_divergence, testing, token_stats
from fastkl.ops import engine
from fastkl.ops.fields import SAVED

pytest.importorskip("triton")
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETING:
    cases.compute_as_a_gpu()

from fastkl.kernels import config, launch  # noqa: E402  (needs triton)

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
NAMES = (
    "kl_divergence",
    "its gradient to p",
    "its gradient to q",
    "logprob",
    "entropy",
    "ref_logprob",
    "kl",
    "ref_kl",
    "gradient to p",
    "gradient to q",
)
# Several segments per row, several tiles per segment, one 16-byte block per thread, fewer threads.
CONFIGS = {
    "128 threads, 4 blocks, 32768": config.RowConfig(128, 4, 32768, "test"),
    "128 threads, 2 blocks, 8192": config.RowConfig(128, 2, 8192, "test"),
    "256 threads, 1 block, 4096": config.RowConfig(256, 1, 4096, "test"),
    "64 threads, 1 block, 1024": config.RowConfig(64, 1, 1024, "test"),
}


@pytest.fixture(autouse=True)
def only_kernels(request: pytest.FixtureRequest) -> None:
    """The reference has its own tests."""
    if (
        "implementation" in request.fixturenames
        and not request.getfixturevalue("implementation").kernels
    ):
        pytest.skip("about the kernels")


@pytest.fixture(params=FLOATS.values(), ids=FLOATS)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """A type of logits, of 4 and of 2 bytes."""
    return request.param


def outcome(
    p: torch.Tensor, q: torch.Tensor, tokens: torch.Tensor, upstream: torch.Tensor
) -> list[torch.Tensor]:
    """All results and gradients of kl_divergence and token_stats, in the order of NAMES; upstream
    [5, N].
    """
    p, q = testing.leaf(p), testing.leaf(q)
    kl = kl_divergence(p, q)
    stats = token_stats(p, tokens, q)
    return [
        kl,
        *torch.autograd.grad(kl, (p, q), upstream[3]),
        *stats,
        *torch.autograd.grad(stats, (p, q), list(upstream)),
    ]


def data(
    vocabulary: int, dtype: torch.dtype, device: str, rows: int = 2
) -> tuple[torch.Tensor, ...]:
    """Contiguous p, q, tokens and upstream gradients of a few rows; the first row starts on a
    16-byte boundary.
    """
    p, q = testing.sizes_pair(
        "normal3", (0.03, 1.0, 0.3, 0.1)[:rows], (0.0, 50.0), vocabulary, dtype
    )
    tokens = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(1))
    upstream = testing.upstream_for(torch.empty(5, rows))
    return tuple(value.to(device) for value in (p, q, tokens, upstream))


def padded(rows: torch.Tensor, padding: int, offset: int) -> torch.Tensor:
    """The same rows with `padding` NaN after each and `offset` before all."""
    count, vocabulary = rows.shape
    storage = torch.full(
        (offset + count * (vocabulary + padding) + 16,),
        math.nan,
        dtype=rows.dtype,
        device=rows.device,
    )
    return storage.as_strided((count, vocabulary), (vocabulary + padding, 1), offset).copy_(rows)


def assert_rows_equal(
    results: list[torch.Tensor], alone: list[list[torch.Tensor]], order: list[int], what: str
) -> None:
    """Row i of every result has the bits of alone[order[i]]."""
    for name, result, *single in zip(NAMES, results, *alone, strict=True):
        testing.assert_same_bits(
            result, torch.cat([single[row] for row in order]), f"{what}: {name}"
        )


def singles(p, q, tokens, upstream) -> list[list[torch.Tensor]]:
    """Each row's outcome in a call of its own, from memory of its own."""
    return [
        outcome(
            p[i : i + 1].clone(), q[i : i + 1].clone(), tokens[i : i + 1], upstream[:, i : i + 1]
        )
        for i in range(p.shape[0])
    ]


def assert_invariant(
    p, q, tokens, upstream, copies: int, layouts: tuple[tuple[int, int, int, int], ...]
) -> None:
    """The bits of rows do not change with their batch, position, alignment and strides: (padding,
    offset) of p and of q.
    """
    alone = singles(p, q, tokens, upstream)
    order = [i % p.shape[0] for i in range(copies)]
    for padding_p, offset_p, padding_q, offset_q in layouts:
        results = outcome(
            padded(p[order], padding_p, offset_p),
            padded(q[order], padding_q, offset_q),
            tokens[order],
            upstream[:, order],
        )
        assert_rows_equal(
            results,
            alone,
            order,
            f"padding {padding_p}, {padding_q}, offsets {offset_p}, {offset_q}",
        )


# ---- batch invariance


@pytest.mark.parametrize("vocabulary", [5003, 40001])
def test_same_bits_wherever_a_row_is(implementation, vocabulary, dtype) -> None:
    """Alone, or in a batch: rows of odd length one after the other start at every distance from a
    16-byte boundary; padded; sliced.

    5 rows of float32 and 9 of bfloat16 see every distance.
    """
    values = data(vocabulary, dtype, implementation.device)
    layouts = (
        (0, 0, 0, 0),
        (5, 2, 5, 2),
        (0, 0, 3, 1),
        (8 - vocabulary % 8, 0, 0, 0),
        (8 - vocabulary % 8, 3, 8 - vocabulary % 8, 4),
    )
    if not implementation.interpreted:
        assert_invariant(*values, 9, layouts)
    elif vocabulary == 5003:
        assert_invariant(*values, 5 if dtype == torch.float32 else 9, layouts[:1])
        assert_invariant(*values, 2, layouts[1:4])
    else:
        assert_invariant(*values, 2, layouts[:1])


@pytest.mark.parametrize("name", CONFIGS)
def test_each_configuration(implementation, name, dtype) -> None:
    """Right, and the same bits in any batch, for each way to cut a row; configurations may differ
    from each other in bits.
    """
    vocabulary = (
        70001 if not implementation.interpreted else 3001 if CONFIGS[name].threads == 64 else 9003
    )
    p, q, tokens, upstream = data(vocabulary, dtype, implementation.device)
    with config.override(CONFIGS[name], CONFIGS[name]):
        rows, layouts = (
            (2, ((7, 3, 0, 1),))
            if implementation.interpreted
            else (9, ((0, 0, 0, 0), (7, 3, 0, 1)))
        )
        assert_invariant(p, q, tokens, upstream, rows, layouts)
        kl, grad_p, grad_q = outcome(p, q, tokens, upstream)[:3]
    exact = testing.truth(p.cpu(), q.cpu())
    testing.assert_kl(kl, exact.kl)
    for grad, value in zip((grad_p, grad_q), testing.kl_gradients(exact, upstream[3]), strict=True):
        testing.assert_rounded_gradient(
            grad, value, "gradient", truncated=implementation.interpreted
        )


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_few_rows(implementation, rows) -> None:
    """Any number of rows gives the bits of each alone: 4 rows share a program of the slow path."""
    p, q, tokens, upstream = data(1003, torch.float32, implementation.device, 4)
    order = [i % 4 for i in range(rows)]
    alone = singles(p, q, tokens, upstream)
    assert_rows_equal(
        outcome(p[order], q[order], tokens[order], upstream[:, order]), alone, order, f"{rows} rows"
    )


@pytest.mark.parametrize("vocabulary", [1003, 5001])
def test_slow_rows_beside_fast_ones(implementation, vocabulary, dtype) -> None:
    """Rows that are read again (infinities, far apart) leave their neighbours' bits alone, and have
    the same bits alone as beside them.
    """
    p, q, tokens, upstream = data(vocabulary, dtype, implementation.device, 4)
    p[1, 1::2], q[1, 1::2] = -math.inf, -math.inf
    q[3] = -20 * q[3]
    tokens[1] = 0
    alone = singles(p, q, tokens, upstream)
    order = [0, 1, 2, 3, 1, 0, 3, 3, 2] if not implementation.interpreted else [2, 3, 0, 1]
    results = outcome(
        padded(p[order], 3, 1), padded(q[order], 3, 1), tokens[order], upstream[:, order]
    )
    assert_rows_equal(results, alone, order, "slow rows")
    exact = testing.truth(p[3].cpu(), q[3].cpu())
    assert float(exact.kl) > 32
    testing.assert_kl(alone[3][0], exact.kl[None])
    assert all(bool(value.isfinite().all()) for value in alone[1]), (
        "a row with -inf in both is finite"
    )


# ---- memory


def test_offsets_beyond_two_to_the_31(implementation) -> None:
    """Rows 1.2e9 elements apart, by either stride or by the storage offset: memory between them is
    never touched.
    """
    vocabulary, step = 515, 1_200_000_000
    p, q, tokens, upstream = data(vocabulary, torch.bfloat16, implementation.device, 3)
    expected = outcome(p, q, tokens, upstream)
    storage = torch.empty(2 * step + 4096, dtype=torch.bfloat16, device=implementation.device)
    views = [storage.as_strided((3, vocabulary), (step, 1), offset) for offset in (0, 1001)]
    for view, value in zip(views, (p, q), strict=True):
        view.copy_(value)
    for name, result, value in zip(NAMES, outcome(*views, tokens, upstream), expected, strict=True):
        testing.assert_same_bits(result, value, name)
    # Two leading dimensions that do not merge, the outer one far apart; and one row behind a large
    # offset.
    pairs = [
        storage.as_strided((2, 2, vocabulary), (2 * step, 0, 1), offset) for offset in (0, 1001)
    ]
    order = torch.tensor([[0, 0], [2, 2]], device=implementation.device)
    for name, result, value in zip(
        NAMES, outcome(*pairs, tokens[order], upstream[:, order]), expected, strict=True
    ):
        testing.assert_same_bits(result, value[order], name)
    last = [
        storage.as_strided((1, vocabulary), (vocabulary, 1), 2 * step + offset)
        for offset in (0, 1001)
    ]
    for name, result, value in zip(
        NAMES, outcome(*last, tokens[2:], upstream[:, 2:]), expected, strict=True
    ):
        testing.assert_same_bits(result, value[2:], name)


def test_gradients_beyond_two_to_the_31(implementation) -> None:
    """Gradients of more than 2^31 elements: the last rows have the bits of the first, which are the
    same rows.
    """
    if implementation.interpreted:
        pytest.skip("needs the memory and the speed of a GPU")
    vocabulary, rows = 128257, 17001
    p, q, tokens, upstream = data(vocabulary, torch.bfloat16, implementation.device, 1)
    p, q = (testing.leaf(value.expand(rows, -1)) for value in (p, q))
    stats = token_stats(p, tokens.expand(rows), q)
    for grad in torch.autograd.grad(stats, (p, q), [value.expand(rows) for value in upstream]):
        assert grad.numel() > 2**31
        for row in (1, 8191, rows - 2, rows - 1):
            testing.assert_same_bits(grad[row], grad[0], f"row {row}")


def test_random_sweep(implementation) -> None:
    """Random vocabularies, paddings, offsets and types of either tensor, in NaN surroundings:
    right, and nothing else is written.
    """
    numbers = random.Random(0)
    for trial in range(10 if implementation.interpreted else 60):
        vocabulary = numbers.choice(
            [numbers.randint(1, 40), numbers.randint(41, 3000), numbers.randint(3001, 9000)]
        )
        rows = numbers.randint(1, 4)
        p, q = testing.sizes_pair(
            "normal3",
            (0.1, 1.0, 0.3, 3.0)[:rows],
            (0.0, 50.0),
            vocabulary,
            torch.float32,
            seed=trial,
        )
        views = [
            padded(
                value.to(numbers.choice([*FLOATS.values(), torch.float16])).to(
                    implementation.device
                ),
                numbers.randint(0, 9),
                numbers.randint(0, 9),
            )
            for value in (p, q)
        ]
        before = [
            testing.bits(
                value.as_strided(
                    (value.untyped_storage().nbytes() // value.element_size(),), (1,), 0
                )
            ).clone()
            for value in views
        ]
        leaves = [testing.leaf(value) for value in views]
        kl = kl_divergence(*leaves)
        upstream = testing.upstream_for(kl, trial)
        grads = torch.autograd.grad(kl, leaves, upstream)
        exact = testing.truth(*(value.cpu() for value in views))
        what = f"V={vocabulary}, {[(value.dtype, value.stride(0), value.storage_offset()) for value in views]}"
        testing.assert_kl(kl, exact.kl, what)
        for grad, value in zip(grads, testing.kl_gradients(exact, upstream), strict=True):
            testing.assert_rounded_gradient(grad, value, what, truncated=implementation.interpreted)
        for value, kept in zip(views, before, strict=True):
            assert torch.equal(testing.bits(value.as_strided(kept.shape, (1,), 0)), kept), (
                f"{what}: an input was written to"
            )


@pytest.mark.parametrize(
    "fields", [("kl",), ("logprob", "entropy", "ref_logprob", "kl", "ref_kl")], ids=["kl", "all"]
)
@pytest.mark.parametrize("vocabulary", [64, 1003, 40001])
def test_backward_in_place(implementation, vocabulary, fields, dtype) -> None:
    """The gradients may be the logits' own memory: the same bits as in memory of their own."""
    p, q, tokens, upstream = data(vocabulary, dtype, implementation.device, 3)
    mask = torch.tensor([True, True, False], device=implementation.device)
    ((_, problem),) = engine.problems(p, q, tokens, mask, 1.0)
    saved = p.new_empty(3, SAVED, dtype=torch.float32)
    outputs = {name: torch.empty(3, device=implementation.device) for name in fields}
    launch.forward(problem, outputs, saved)
    weights = {name: upstream[i] for i, name in enumerate(fields)}
    expected = [torch.full_like(value, math.nan) for value in (p, q)]
    launch.backward(problem, saved, weights, *expected)
    launch.backward(problem, saved, weights, p, q)
    for result, value, name in zip((p, q), expected, "pq", strict=True):
        testing.assert_same_bits(result, value, f"gradient to {name}")
        assert bool((value[2] == 0).all()) and bool((value[:2] != 0).any())


# ---- segments

VOCABULARIES = (*range(1, 3001), 32000, 50257, 128256, 151936, 152064, 262144, 524288, 1_000_000)


@pytest.mark.parametrize("preferred", [512, 1024, 8192, 16384, 32768])
def test_segment_lengths(preferred) -> None:
    """Segments cover a row, end at multiples of a sixteenth of it rounded up to 8, and are near the
    preferred length.
    """
    for vocabulary in VOCABULARIES:
        segment = config.segment_length(vocabulary, preferred)
        what = f"V={vocabulary}, preferred {preferred}: {segment}"
        sixteenth = -(-vocabulary // 128) * 8
        assert segment % 8 == 0 and 8 <= segment <= config.LONGEST_SEGMENT, what
        if vocabulary <= 16 * config.LONGEST_SEGMENT:
            assert segment % sixteenth == 0 and 16 * sixteenth % segment == 0, what
            assert segment <= max(preferred, sixteenth), what
        assert 2 * segment > min(preferred, vocabulary), what


# ---- compilation


def kernels() -> dict:
    """The kernels that a call launches."""
    return {name: getattr(launch, name) for name in ("row_forward", "row_fallback", "row_backward")}


@pytest.mark.skipif(INTERPRETING, reason="the interpreter does not specialize")
@pytest.mark.parametrize("name", kernels())
def test_numbers_are_not_specialized(name) -> None:
    """No number that changes from call to call takes part in a kernel's key: only pointers and
    compile-time values do.
    """
    for parameter in kernels()[name].params:
        assert (
            parameter.is_constexpr or parameter.name.endswith("_ptr") or parameter.do_not_specialize
        ), parameter.name


def test_arguments_come_in_the_order_of_the_signatures(implementation, monkeypatch) -> None:
    """A compiled kernel takes its arguments by position."""
    start, seen = launch.Variant.start, set()

    def checked(variant, programs, arguments):
        assert [*arguments, *variant.constants] == list(
            inspect.signature(variant.kernel.fn).parameters
        )
        seen.add(variant.kernel)
        start(variant, programs, arguments)

    monkeypatch.setattr(launch.Variant, "start", checked)
    outcome(*data(300, torch.float32, implementation.device))
    assert seen == {launch.row_forward, launch.row_fallback, launch.row_backward}


class Kernel:
    """Stands for a Triton kernel: [grid](**arguments) compiles and launches, and returns what
    [grid](*arguments) launches.
    """

    def __init__(self) -> None:
        self.calls, self.grid = [], None

    def __getitem__(self, grid: tuple[int, int, int]) -> Kernel:
        self.grid = grid
        return self

    def __call__(self, *arguments, **named) -> Kernel:
        self.calls.append((self.grid, arguments, named))
        self.compiled = getattr(self, "compiled", None) or Kernel()
        return self.compiled


def test_a_variant_is_compiled_once() -> None:
    """The first start goes through Triton, by name and with the compiler's options; the others
    start what it compiled, by position.
    """
    kernel = Kernel()
    variant = launch.Variant(kernel, {"SEGMENT": 8, "THREADS": 4}, {"num_warps": 2})
    for programs, value in ((5, 1.0), (6, 2.0), (7, 3.0)):
        variant.start(programs, {"p_ptr": "p", "temperature": value})
    assert kernel.calls == [
        (
            (5, 1, 1),
            (),
            {"p_ptr": "p", "temperature": 1.0, "SEGMENT": 8, "THREADS": 4, "num_warps": 2},
        )
    ]
    assert kernel.compiled.calls == [
        ((6, 1, 1), ("p", 2.0, 8, 4), {}),
        ((7, 1, 1), ("p", 3.0, 8, 4), {}),
    ]


@pytest.mark.gpu
def test_a_compiled_kernel_is_started_again(monkeypatch) -> None:
    """With other tensors, numbers, masks and types in between: the second call of each compiles
    nothing and has the bits of the first.
    """

    def run(dtype: torch.dtype, rows: int, temperature: float, masked: bool) -> list[torch.Tensor]:
        p, q = (
            testing.leaf(value.cuda())
            for value in testing.pair("normal1", rows, 515, 0.3, dtype=dtype)
        )
        mask = torch.arange(rows, device="cuda") % 3 != 1 if masked else None
        stats = token_stats(
            p,
            torch.zeros(rows, dtype=torch.int64, device="cuda"),
            q,
            temperature=temperature,
            mask=mask,
        )
        return [*stats, *torch.autograd.grad(stats, (p, q), [torch.ones(rows, device="cuda")] * 5)]

    calls = [
        (dtype, rows, temperature, masked)
        for dtype in (torch.float32, torch.bfloat16)
        for rows, temperature in ((5, 1.0), (40, 0.5))
        for masked in (False, True)
    ]
    first = [run(*call) for call in calls]
    start, started = launch.Variant.start, []

    def compiled_before(variant, programs, arguments):
        assert variant.compiled is not None
        started.append(variant)
        start(variant, programs, arguments)

    monkeypatch.setattr(launch.Variant, "start", compiled_before)
    for call, results in zip(reversed(calls), reversed(first), strict=True):
        for name, again, before in zip(NAMES[3:], run(*call), results, strict=True):
            testing.assert_same_bits(again, before, f"{name} of {call}")
    assert len(started) == 3 * len(calls)


@pytest.mark.gpu
def test_no_compilation_for_other_lengths() -> None:
    """Once compiled, other numbers of rows, vocabularies of as many segments, strides and
    temperatures compile nothing.
    """

    def run(rows: int, vocabulary: int, temperature: float) -> int:
        p, q = (
            testing.leaf(value.cuda()) for value in testing.pair("normal1", rows, vocabulary, 0.3)
        )
        stats = token_stats(
            p, torch.zeros(rows, dtype=torch.int64, device="cuda"), q, temperature=temperature
        )
        torch.autograd.grad(stats, (p, q), [torch.ones(rows, device="cuda")] * 5)
        return sum(
            len(kernel.device_caches[torch.cuda.current_device()][0])
            for kernel in kernels().values()
        )

    compiled = run(3, 4096, 1.0)
    assert compiled > 0
    for rows, vocabulary, temperature in (
        (1, 4096, 1.0),
        (2, 4096, 0.7),
        (16, 4096, 1.0),
        (4097, 4096, 2.0),
        (5, 8192, 1.0),
        (7, 4112, 3.0),
    ):
        assert run(rows, vocabulary, temperature) == compiled, (
            f"{rows} rows of {vocabulary} at temperature {temperature}"
        )


def test_slow_path_rows_are_those_that_row_finish_marks(implementation, monkeypatch) -> None:
    """fastkl.slow_path_rows against the marks of the kernels themselves, where they do not read
    rows again.
    """
    if not implementation.kernels:
        pytest.skip("about the kernels")
    from fastkl.kernels import launch, row_finish, row_math

    assert (
        divergence.ONE_PASS_KL,
        divergence.ONE_PASS_DIFFERENCE,
        divergence.ONE_PASS_D,
        divergence.ONE_PASS_LSE,
    ) == (
        row_finish.LARGE_KL.value,
        row_finish.LARGEST_DIFFERENCE.value,
        row_math.LARGEST_D.value,
        row_math.LARGEST_LSE.value,
    )
    p, q = testing.pair("normal3", 12, 300, 0.3, device=implementation.device)
    p[1, 5], q[2, 5], p[3, 7], p[4, 8] = -float("inf"), -float("inf"), float("nan"), -1e9
    q[5, 9] += 150.0
    p[6, :16], q[6, :16] = torch.finfo(torch.float32).min, torch.finfo(torch.float32).min
    q[7] = q[7] * 60.0
    q[9], q[10] = q[9] + 70.0, q[10] + 40.0
    p[11, 0], q[11, 1] = p[11].max() + 3.0, q[11].max() + 12.0
    expected = fastkl.slow_path_rows(p, q)

    monkeypatch.setattr(launch, "READ_AGAIN", False)
    saved = torch.ops.fastkl.row_statistics(
        p,
        q,
        torch.zeros(12, dtype=torch.long, device=p.device),
        None,
        None,
        1.0,
        "logprob,entropy,ref_logprob,kl,ref_kl",
        "triton",
    )[-1]
    assert torch.equal(saved[:, 0].isnan(), expected)
    assert expected.tolist() == [
        False,
        True,
        True,
        True,
        True,
        True,
        False,
        True,
        False,
        True,
        False,
        True,
    ]
