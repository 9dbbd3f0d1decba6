"""Promises of the Triton kernels alone: the same bits in any batch, at any position and stride;
offsets beyond 2^31; no recompiles.
"""

import inspect
import math
import random
from unittest import mock

import cases
import pytest
import torch
from cases import INTERPRETING, Rows, assert_gradients, assert_same, padded

import fastkl
from fastkl import divergence, kl_divergence, testing, token_stats
from fastkl.ops.fields import FIELDS

pytest.importorskip("triton")
from fastkl.kernels import config, launch

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Several segments per row, several tiles per segment, one 16-byte block per thread, fewer threads.
CONFIGS = {
    "128 threads, 4 blocks, 32768": config.RowConfig(128, 4, 32768, "test"),
    "128 threads, 2 blocks, 8192": config.RowConfig(128, 2, 8192, "test"),
    "256 threads, 1 block, 4096": config.RowConfig(256, 1, 4096, "test"),
    "64 threads, 1 block, 1024": config.RowConfig(64, 1, 1024, "test"),
}


@pytest.fixture(params=FLOATS.values(), ids=FLOATS)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """A type of logits, of 4 and of 2 bytes."""
    return request.param


def outcome(
    p: torch.Tensor, q: torch.Tensor, tokens: torch.Tensor, upstream: torch.Tensor
) -> list[torch.Tensor]:
    """kl_divergence and its gradients, the fields of token_stats and theirs; upstream [5, N]."""
    p, q = testing.leaf(p), testing.leaf(q)
    kl = kl_divergence(p, q)
    stats = token_stats(p, tokens, q)
    grads = torch.autograd.grad(kl, (p, q), upstream[3])
    return [kl, *grads, *stats, *torch.autograd.grad(stats, (p, q), list(upstream))]


def data(
    vocabulary: int, dtype: torch.dtype, device: str, rows: int = 2
) -> tuple[torch.Tensor, ...]:
    """Contiguous p, q, tokens and upstream gradients of a few rows; the first row starts on a
    16-byte boundary.
    """
    sizes = (0.03, 1.0, 0.3, 0.1)[:rows]
    p, q = testing.sizes_pair("normal3", sizes, (0.0, 50.0), vocabulary, dtype)
    tokens = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(1))
    upstream = testing.upstream_for(torch.empty(5, rows))
    return tuple(value.to(device) for value in (p, q, tokens, upstream))


ALIGNED = (0, 0, 0, 0)


def assert_invariant(
    p, q, tokens, upstream, order: list[int], layouts: tuple[tuple[int, ...], ...] = (ALIGNED,)
) -> list[torch.Tensor]:
    """The bits of rows, in this order, do not change with their batch, position, alignment and
    strides: (padding, offset) of p and of q; the results of each row alone.
    """
    alone = [
        outcome(p[[i]].clone(), q[[i]].clone(), tokens[[i]], upstream[:, [i]])
        for i in range(len(p))
    ]
    joined = [torch.cat(each) for each in zip(*alone, strict=True)]
    for layout in layouts:
        views = padded(p[order], *layout[:2]), padded(q[order], *layout[2:])
        results = outcome(*views, tokens[order], upstream[:, order])
        assert_same(results, [value[order] for value in joined], f"paddings, offsets {layout}:")
    return joined


# ---- batch invariance


@pytest.mark.parametrize("vocabulary", [1003, 9003] if INTERPRETING else [5003, 40001])
def test_same_bits_wherever_a_row_is(kernels, vocabulary, dtype) -> None:
    """Alone, or in a batch: rows of odd length one after the other start at every distance from a
    16-byte boundary; padded; sliced.

    5 rows of float32 and 9 of bfloat16 see every distance.
    """
    values, aligning = data(vocabulary, dtype, kernels.device), 8 - vocabulary % 8
    many = [i % 2 for i in range(5 if dtype == torch.float32 else 9)]
    others = ((5, 2, 5, 2), (0, 0, 3, 1), (aligning, 0, 0, 0), (aligning, 3, aligning, 4))
    if not INTERPRETING:
        assert_invariant(*values, many, (ALIGNED, *others))
    elif vocabulary == 1003:
        assert_invariant(*values, many)
        assert_invariant(*values, [0, 1], others[:3])
    else:
        assert_invariant(*values, [0, 1])


@pytest.mark.parametrize("name", CONFIGS)
def test_each_configuration(kernels, name, dtype) -> None:
    """Right, and the same bits in any batch, for each way to cut a row; configurations may differ
    from each other in bits.
    """
    vocabulary = 70001
    if INTERPRETING:
        vocabulary = {1024: 2003, 4096: 5003}.get(CONFIGS[name].segment, 9003)
    p, q, tokens, upstream = data(vocabulary, dtype, kernels.device)
    order, layouts = [i % 2 for i in range(9)], (ALIGNED, (7, 3, 0, 1))
    if INTERPRETING:
        order, layouts = [0, 1], layouts[1:]
    with config.override(CONFIGS[name], CONFIGS[name]):
        kl, *grads = assert_invariant(p, q, tokens, upstream, order, layouts)[:3]
    exact = testing.truth(p.cpu(), q.cpu())
    testing.assert_kl(kl, exact.kl)
    assert_gradients(grads, testing.kl_gradients(exact, upstream[3]))


@pytest.mark.parametrize("vocabulary", [1003] if INTERPRETING else [1003, 5001])
def test_slow_rows_beside_fast_ones(kernels, vocabulary, dtype) -> None:
    """Rows that are read again (infinities, far apart) leave their neighbours' bits alone, and have
    the same bits alone as beside them.
    """
    p, q, tokens, upstream = data(vocabulary, dtype, kernels.device, 4)
    p[1, 1::2], q[1, 1::2] = -math.inf, -math.inf
    q[3] = -20 * q[3]
    tokens[1] = 0
    # 4 rows share a program of the slow path.
    order = [2, 3, 0, 1, 3] if INTERPRETING else [0, 1, 2, 3, 1, 0, 3, 3, 2]
    alone = assert_invariant(p, q, tokens, upstream, order, ((3, 1, 3, 1),))
    exact = testing.truth(p[3:].cpu(), q[3:].cpu())
    assert float(exact.kl) > 32
    testing.assert_kl(alone[0][3:], exact.kl)
    assert all(bool(value[1].isfinite().all()) for value in alone), "-inf in both is finite"


# ---- memory


def test_offsets_beyond_two_to_the_31(kernels) -> None:
    """Rows 1.2e9 elements apart, by either stride or by the storage offset: memory between them is
    never touched. Two leading dimensions that do not merge, the outer one far apart, and one row
    behind a large offset too.
    """
    vocabulary, step = 515, 1_200_000_000
    p, q, tokens, upstream = data(vocabulary, torch.bfloat16, kernels.device, 3)
    expected = outcome(p, q, tokens, upstream)
    storage = torch.empty(2 * step + 4096, dtype=torch.bfloat16, device=kernels.device)
    for start, value in ((0, p), (1001, q)):
        storage.as_strided((3, vocabulary), (step, 1), start).copy_(value)
    for order, leading, strides, offset in (
        ([0, 1, 2], (3,), (step,), 0),
        ([[0, 0], [2, 2]], (2, 2), (2 * step, 0), 0),
        ([2], (1,), (vocabulary,), 2 * step),
    ):
        views = [
            storage.as_strided((*leading, vocabulary), (*strides, 1), offset + start)
            for start in (0, 1001)
        ]
        index = torch.tensor(order, device=p.device)
        results = outcome(*views, tokens[index], upstream[:, index])
        assert_same(results, [value[index] for value in expected])


def test_gradients_beyond_two_to_the_31(kernels) -> None:
    """Gradients of more than 2^31 elements: the last rows have the bits of the first, which are the
    same rows.
    """
    if INTERPRETING:
        pytest.skip("needs the memory and the speed of a GPU")
    vocabulary, rows = 128257, 17001
    p, q, tokens, upstream = data(vocabulary, torch.bfloat16, kernels.device, 1)
    p, q = (testing.leaf(value.expand(rows, -1)) for value in (p, q))
    stats = token_stats(p, tokens.expand(rows), q)
    for grad in torch.autograd.grad(stats, (p, q), [value.expand(rows) for value in upstream]):
        assert grad.numel() > 2**31
        for row in (1, 8191, rows - 2, rows - 1):
            testing.assert_same_bits(grad[row], grad[0], f"row {row}")


def test_random_sweep(kernels) -> None:
    """Random vocabularies, paddings, offsets and types of either tensor, in NaN surroundings:
    right, and nothing else is written.
    """
    numbers, types = random.Random(0), [*FLOATS.values(), torch.float16]
    for trial in range(10 if INTERPRETING else 60):
        ranges = (1, 40), (41, 1500), (1501, 3000 if INTERPRETING else 9000)
        vocabulary, rows = numbers.randint(*numbers.choice(ranges)), numbers.randint(1, 4)
        sizes = (0.1, 1.0, 0.3, 3.0)[:rows]
        pair = testing.sizes_pair("normal3", sizes, (0.0, 50.0), vocabulary, seed=trial)
        views = [
            padded(
                value.to(numbers.choice(types)).to(kernels.device),
                numbers.randint(0, 9),
                numbers.randint(0, 9),
            )
            for value in pair
        ]
        storages = [
            view.as_strided((view.untyped_storage().nbytes() // view.element_size(),), (1,), 0)
            for view in views
        ]
        before, leaves = (
            [value.clone() for value in storages],
            [testing.leaf(view) for view in views],
        )
        kl = kl_divergence(*leaves)
        upstream = testing.upstream_for(kl, trial)
        grads = torch.autograd.grad(kl, leaves, upstream)
        exact = testing.truth(*(value.cpu() for value in views))
        what = f"V={vocabulary}, {[(v.dtype, v.stride(0), v.storage_offset()) for v in views]}"
        testing.assert_kl(kl, exact.kl, what)
        assert_gradients(grads, testing.kl_gradients(exact, upstream), what)
        assert_same(storages, before, f"{what}: an input was written to")


@pytest.mark.parametrize("fields", [("kl",), FIELDS], ids=["kl", "all"])
@pytest.mark.parametrize("vocabulary", [64, 1003, 9003 if INTERPRETING else 40001])
def test_backward_in_place(kernels, vocabulary, fields, dtype) -> None:
    """The gradients may be the logits' own memory: the same bits as in memory of their own."""
    p, q, tokens, upstream = data(vocabulary, dtype, kernels.device, 3)
    mask = torch.tensor([True, True, False], device=kernels.device)
    rows, weights = Rows(p, q, tokens, mask), dict(zip(fields, upstream, strict=False))
    made = cases.run("triton", rows, weights)
    cases.backward("triton", rows, made.saved, weights, (p, q))
    assert_same((p, q), made.grads)
    assert all(not bool(value[2].any()) and bool(value[:2].any()) for value in made.grads)


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

LAUNCHED = launch.row_forward, launch.row_fallback, launch.row_backward


@pytest.mark.skipif(INTERPRETING, reason="the interpreter does not specialize")
@pytest.mark.parametrize("kernel", LAUNCHED)
def test_numbers_are_not_specialized(kernel) -> None:
    """No number that changes from call to call takes part in a kernel's key: only pointers and
    compile-time values do.
    """
    for one in kernel.params:
        assert one.is_constexpr or one.name.endswith("_ptr") or one.do_not_specialize, one.name


def test_arguments_come_in_the_order_of_the_signatures(kernels, monkeypatch) -> None:
    """A compiled kernel takes its arguments by position."""
    start, seen = launch.Variant.start, set()

    def checked(variant, programs, arguments):
        names = list(inspect.signature(variant.kernel.fn).parameters)
        assert [*arguments, *variant.constants] == names
        seen.add(variant.kernel)
        start(variant, programs, arguments)

    monkeypatch.setattr(launch.Variant, "start", checked)
    outcome(*data(300, torch.float32, kernels.device))
    assert seen == {*LAUNCHED}


def test_a_variant_is_compiled_once() -> None:
    """The first start goes through Triton, by name and with the compiler's options; the others
    start its compiled kernel, by position.
    """
    kernel = mock.MagicMock()
    variant = launch.Variant(kernel, {"SEGMENT": 8, "THREADS": 4}, {"num_warps": 2})
    for programs, value in ((5, 1.0), (6, 2.0), (7, 3.0)):
        variant.start(programs, {"p_ptr": "p", "temperature": value})
    named = {"p_ptr": "p", "temperature": 1.0, "SEGMENT": 8, "THREADS": 4, "num_warps": 2}
    kernel.__getitem__.assert_called_once_with((5, 1, 1))
    kernel[None].assert_called_once_with(**named)
    compiled = kernel[None].return_value
    assert compiled.__getitem__.call_args_list == [mock.call((6, 1, 1)), mock.call((7, 1, 1))]
    assert compiled[None].call_args_list == [mock.call("p", v, 8, 4) for v in (2.0, 3.0)]


def on_gpu(dtype, rows: int, temperature: float, masked: bool, vocabulary: int = 515) -> list:
    pair = testing.pair("normal1", rows, vocabulary, 0.3, dtype=dtype, device="cuda")
    p, q = (testing.leaf(value) for value in pair)
    mask = torch.arange(rows, device="cuda") % 3 != 1 if masked else None
    tokens = torch.zeros(rows, dtype=torch.int64, device="cuda")
    stats = token_stats(p, tokens, q, temperature=temperature, mask=mask)
    return [*stats, *torch.autograd.grad(stats, (p, q), [torch.ones(rows, device="cuda")] * 5)]


@pytest.mark.gpu
def test_a_compiled_kernel_is_started_again(monkeypatch) -> None:
    """With other tensors, numbers, masks and types in between: the second call of each compiles
    nothing and has the bits of the first.
    """
    calls = [
        (dtype, rows, temperature, masked)
        for dtype in FLOATS.values()
        for rows, temperature in ((5, 1.0), (40, 0.5))
        for masked in (False, True)
    ]
    first = [on_gpu(*call) for call in calls]
    start, started = launch.Variant.start, []

    def compiled_before(variant, programs, arguments):
        assert variant.compiled is not None
        started.append(variant)
        start(variant, programs, arguments)

    monkeypatch.setattr(launch.Variant, "start", compiled_before)
    for call, results in zip(reversed(calls), reversed(first), strict=True):
        assert_same(on_gpu(*call), results, str(call))
    assert len(started) == 3 * len(calls)


@pytest.mark.gpu
def test_no_compilation_for_other_lengths() -> None:
    """Once compiled, other numbers of rows, vocabularies of as many segments, strides and
    temperatures compile nothing.
    """
    counts = set()
    for rows, vocabulary, temperature in (
        *((3, 4096, 1.0), (1, 4096, 1.0), (2, 4096, 0.7), (16, 4096, 1.0)),
        *((4097, 4096, 2.0), (5, 8192, 1.0), (7, 4112, 3.0)),
    ):
        on_gpu(torch.float32, rows, temperature, False, vocabulary)
        device = torch.cuda.current_device()
        counts.add(sum(len(kernel.device_caches[device][0]) for kernel in LAUNCHED))
    assert len(counts) == 1 and 0 not in counts


def test_slow_path_rows_are_those_that_row_finish_marks(kernels, monkeypatch) -> None:
    """fastkl.slow_path_rows against the marks of the kernels themselves, where they do not read
    rows again.
    """
    from fastkl.kernels import row_finish, row_math

    limits = row_finish.LARGE_KL, row_finish.LARGEST_DIFFERENCE
    limits += (
        row_math.LARGEST_D,
        row_math.LARGEST_FAR_D,
        row_math.FAR_SHARE,
        row_math.LARGEST_LOG2_SUM,
    )
    assert [limit.value for limit in limits] == [
        *(divergence.ONE_PASS_KL, divergence.ONE_PASS_DIFFERENCE),
        *(divergence.ONE_PASS_D, divergence.ONE_PASS_FAR_D),
        *(divergence.FAR_SHARE, divergence.ONE_PASS_LSE),
    ]
    p, q = testing.pair("normal3", 13, 300, 0.3, device=kernels.device)
    p[1, 5], q[2, 5], p[3, 7], p[4, 8] = -math.inf, -math.inf, math.nan, -1e9
    q[5, 9] += 150.0
    p[6, :16], q[6, :16] = torch.finfo(torch.float32).min, torch.finfo(torch.float32).min
    q[7] = q[7] * 60.0
    q[9], q[10] = q[9] + 70.0, q[10] + 40.0
    p[11, 0], q[11, 1] = p[11].max() + 3.0, q[11].max() + 12.0
    q[12, p[12].argmax()] += 30.0
    expected = fastkl.slow_path_rows(p, q)
    monkeypatch.setattr(launch, "RUN_FALLBACK", False)
    tokens = torch.zeros(13, dtype=torch.long, device=p.device)
    assert torch.equal(cases.forward("triton", Rows(p, q, tokens)).saved[:, 0].isnan(), expected)
    assert expected.nonzero()[:, 0].tolist() == [1, 2, 3, 4, 5, 7, 9, 11, 12]
