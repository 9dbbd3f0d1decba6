"""Promises of the Triton kernels alone: the same bits in any batch, at any position and stride;
offsets beyond 2^31; no recompiles.
"""

import inspect
import itertools
import math
from unittest import mock

import cases
import pytest
import torch
from cases import INTERPRETING, Rows, assert_gradients, assert_same, padded

import fastkl
from fastkl import testing, token_stats
from fastkl.ops.fields import FIELDS

pytest.importorskip("triton")
from fastkl.kernels import config, launch, launch_fused, launch_outside
from fastkl.kernels.variant import row_fallback

# Several segments per row, several tiles per segment, one 16-byte block per thread, one warp.
CONFIGS = {
    "256 threads, 1 block, 2048": config.RowConfig(256, 1, 2048, "test"),
    "64 threads, 1 block, 1024": config.RowConfig(64, 1, 1024, "test"),
    "32 threads, 2 blocks, 512": config.RowConfig(32, 2, 512, "test"),
}


def outcome(p, q, tokens, upstream) -> list[torch.Tensor]:
    both = (Rows(p, q), Rows(p, q, tokens))
    return [value for rows in both for value in cases.outcome(rows, p.device, upstream)]


# Contiguous p, q, tokens and upstream gradients of a few rows; the first row starts on a 16-byte
# boundary.
def data(
    vocabulary: int, dtype: torch.dtype, device: str, rows: int = 2
) -> tuple[torch.Tensor, ...]:
    sizes = (0.03, 1.0, 0.3, 0.1, 0.3)[:rows]
    p, q = testing.sizes_pair("normal3", sizes, (0.0, 50.0), vocabulary, dtype)
    tokens = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(1))
    upstream = testing.upstream_for(torch.empty(len(FIELDS), rows))
    return tuple(value.to(device) for value in (p, q, tokens, upstream))


ALIGNED = (0, 0, 0, 0)


# The bits of rows, in this order, do not change with their batch, position, alignment and strides:
# (padding, offset) of p and of q; the results of each row alone.
def assert_invariant(
    p, q, tokens, upstream, order: list[int], layouts: tuple[tuple[int, ...], ...] = (ALIGNED,)
) -> list[torch.Tensor]:
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


OTHERS = ((5, 2, 5, 2), (0, 0, 3, 1), (5, 0, 0, 0), (5, 3, 5, 4))
BATCHES = [(5003, 9, OTHERS), (40003, 9, OTHERS)]
if INTERPRETING:
    BATCHES = [(1003, 9, ()), (1003, 2, OTHERS[:3]), (9003, 2, ())]


# Alone, or in a batch: rows of odd length one after the other start at every distance from a
# 16-byte boundary; padded, to whole blocks too; sliced.
#
# 5 rows of float32 and 9 of bfloat16 see every distance.
@pytest.mark.parametrize("vocabulary, count, layouts", BATCHES)
def test_same_bits_wherever_a_row_is(kernels, vocabulary, count, layouts, dtype) -> None:
    order = [i % 2 for i in range(min(count, 5 if dtype == torch.float32 else 9))]
    assert_invariant(*data(vocabulary, dtype, kernels.device), order, (ALIGNED, *layouts))


# Right, and the same bits in any batch, for each way to cut a row, whether or not rows are read
# again: half masked, equal, far, peaked. Four rows share a program of the fallback.
@pytest.mark.parametrize(
    "name, dtype",
    itertools.product(CONFIGS, cases.FLOATS.values())
    if not INTERPRETING
    else zip(CONFIGS, (torch.float32, torch.bfloat16, torch.float32), strict=True),
)
def test_each_configuration(kernels, name, dtype) -> None:
    vocabulary = 2 * CONFIGS[name].segment + 9 if INTERPRETING else 70001
    p, q, tokens, upstream = data(vocabulary, dtype, kernels.device, 5)
    p[1, 1::2], q[1, 1::2], tokens[1], q[2] = -math.inf, -math.inf, 0, p[2]
    q[3] = -20 * q[3]
    p[4, -11] += 30
    order = [3, 1, 0, 2, 4] if INTERPRETING else [2, 3, 0, 1, 3, 1, 4, 0, 3, 3, 4, 2]
    with config.override(CONFIGS[name], CONFIGS[name]):
        results = assert_invariant(p, q, tokens, upstream, order, ((7, 3, 0, 1),))
    assert all(bool(value[1].isfinite().all()) for value in results), "-inf in both is finite"
    exact = testing.truth(p.cpu(), q.cpu())
    assert float(exact.kl[3]) > 32
    testing.assert_kl(results[0], exact.kl)
    assert_gradients(results[1:3], testing.kl_gradients(exact, upstream[3]))


# ---- memory


# Rows 1.2e9 elements apart, by either stride or by the storage offset: memory between them is never
# touched. Two leading dimensions that do not merge, the outer one far apart, and one row behind a
# large offset too.
def test_offsets_beyond_two_to_the_31(kernels) -> None:
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


# ---- segments

VOCABULARIES = (*range(1, 3001), 32000, 50257, 128256, 151936, 152064, 262144, 524288, 1_000_000)


# Segments cover a row, end at multiples of a sixteenth of it rounded up to 8, and are near the
# preferred length.
@pytest.mark.parametrize("preferred", [512, 1024, 8192, 16384, 32768])
def test_segment_lengths(preferred) -> None:
    for vocabulary in VOCABULARIES:
        segment = config.segment_length(vocabulary, preferred)
        what = f"V={vocabulary}, preferred {preferred}: {segment}"
        sixteenth = -(-vocabulary // 128) * 8
        assert segment % 8 == 0 and 8 <= segment <= config.LONGEST_SEGMENT, what
        if vocabulary <= 16 * config.LONGEST_SEGMENT:
            assert segment % sixteenth == 0 and 16 * sixteenth % segment == 0, what
            assert segment <= max(preferred, sixteenth), what
        assert 2 * segment > min(preferred, vocabulary), what


# Shards hold whole segments, the same for 1, 2, 4 and 8 ranks, and for large vocabularies those of
# a call without shards.
@pytest.mark.parametrize("preferred", [8192, 16384])
def test_segments_of_shards(preferred) -> None:
    for vocabulary in (1024, 32000, 4 * preferred, 4 * preferred + 128, 128256, 151936, 524288):
        (segment,) = {
            config.segment_length(vocabulary, preferred, vocabulary // ranks)
            for ranks in (1, 2, 4, 8)
        }
        assert vocabulary // 8 % segment == 0
        whole = config.segment_length(vocabulary, preferred, 0)
        assert (segment == whole) == (vocabulary >= config.SMALLEST_SHARED)
        assert config.segment_length(50257, preferred, 0) == config.segment_length(50257, preferred)


# ---- compilation

LAUNCHED = launch.row_forward, row_fallback, launch.row_backward
ALL_LAUNCHED = (
    *LAUNCHED,
    *(launch.row_divergence, launch.row_divergence_backward),
    *(launch_fused.row_fused, launch_outside.row_outside, launch_outside.row_topk),
)


@pytest.mark.skipif(INTERPRETING, reason="the interpreter does not specialize")
@pytest.mark.parametrize("kernel", ALL_LAUNCHED)
def test_numbers_are_not_specialized(kernel) -> None:
    for one in kernel.params:
        assert one.is_constexpr or one.name.endswith("_ptr") or one.do_not_specialize, one.name


def test_arguments_come_in_the_order_of_the_signatures(kernels) -> None:
    start = launch.Variant.start
    with mock.patch.object(launch.Variant, "start", autospec=True, side_effect=start) as spy:
        outcome(*data(300, torch.float32, kernels.device))
        p, q = testing.pair("normal3", 2, 304, 0.3, device=kernels.device)
        p, ids = p.requires_grad_(), torch.zeros(2, 1, dtype=torch.long, device=p.device)
        more = fastkl.topk_kl_divergence(p, ids - 1.0, ids).sum() + fastkl.js_divergence(p, q).sum()
        (more + fastkl.kl_divergence(p, q, reduction="mean")).backward()
    for variant, _, arguments in (call.args for call in spy.call_args_list):
        names = inspect.signature(variant.kernel.fn).parameters
        assert [*arguments, *variant.constants] == [*names]
    assert {call.args[0].kernel for call in spy.call_args_list} >= {*ALL_LAUNCHED}


# The first start goes through Triton, by name and with the compiler's options; the others start its
# compiled kernel, by position.
def test_a_variant_is_compiled_once() -> None:
    kernel = mock.MagicMock()
    variant = launch.Variant(kernel, {"SEGMENT": 8, "THREADS": 4}, {"num_warps": 2})
    for programs in (5, 6, 7):
        variant.start(programs, {"p_ptr": "p", "temperature": programs})
    named = {"p_ptr": "p", "temperature": 5, "SEGMENT": 8, "THREADS": 4, "num_warps": 2}
    kernel.__getitem__.assert_called_once_with((5, 1, 1))
    kernel[None].assert_called_once_with(**named)
    compiled = kernel[None].return_value
    assert compiled.__getitem__.call_args_list == [mock.call((6, 1, 1)), mock.call((7, 1, 1))]
    assert compiled[None].call_args_list == [mock.call("p", n, 8, 4) for n in (6, 7)]


# Other numbers of rows, vocabularies of as many segments, strides and temperatures.
@pytest.mark.gpu
def test_no_compilation_for_other_lengths() -> None:
    counts = set()
    for rows, vocabulary, temperature in (
        *((3, 4096, 1.0), (1, 4096, 1.0), (2, 4096, 0.7), (16, 4096, 1.0)),
        *((4097, 4096, 2.0), (5, 8192, 1.0), (7, 4112, 3.0)),
    ):
        p, q = testing.pair("normal1", rows, vocabulary, 0.3)
        cases.outcome(Rows(p, q, torch.zeros(rows).long(), None, temperature), "cuda")
        device = torch.cuda.current_device()
        counts.add(sum(len(kernel.device_caches[device][0]) for kernel in LAUNCHED))
    assert len(counts) == 1 and 0 not in counts


def test_the_rows_that_row_finish_leaves_to_the_fallback(kernels, monkeypatch) -> None:
    p, q = testing.pair("normal3", 15, 300, 0.3, device=kernels.device)
    # 8.4 nats in one direction, 10.5 in the other; KL(Q‖P) far below KL(P‖Q): this row is marked.
    for row, x, y in ((0, 0.0, 14.2), (13, -5.0, 10.0), (14, 0.0, -25.0)):
        p[row], q[row] = 0.0, 0.0
        p[row, 9], q[row, 9] = x, y
    p[8], q[8] = p[8] + 5e6, q[8] + 5e6
    p[1, 5], q[2, 5], p[3, 7], p[4, 8] = -math.inf, -math.inf, math.nan, -1e9
    p[6, :16], q[6, :16] = torch.finfo(torch.float32).min, torch.finfo(torch.float32).min
    p[11, 0], q[11, 1] = p[11].max() + 3.0, q[11].max() + 12.0
    q[5, 9], q[9], q[10], q[7] = q[5, 9] + 150.0, q[9] + 70.0, q[10] + 40.0, q[7] * 60.0
    q[12, p[12].argmax()] += 30.0
    # 16-bit logits 100 apart, at a temperature of 10.
    x, y = (
        side.bfloat16().to(kernels.device)
        for side in testing.pair("normal3", 1, 300, 0.1, shift=100.0)
    )
    monkeypatch.setattr(launch, "RUN_FALLBACK", False)
    marked = [1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 14]
    for rows, wanted, expected in (
        (Rows(p, q, torch.zeros(15, dtype=torch.long, device=p.device)), FIELDS, marked),
        (Rows(p[8:9], None), ("entropy",), [0]),
        (Rows(x, y, None, None, 10.0), ("kl",), [0]),
    ):
        saved = cases.forward("triton", rows, wanted).saved
        assert saved[:, 0].isnan().nonzero()[:, 0].tolist() == expected
