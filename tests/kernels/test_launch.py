"""kernels/launch.py: cached plans equal newly computed ones and hold no tensor."""

import concurrent.futures
import gc
import itertools
import weakref

import cases
import pytest
import torch
from cases import Rows

pytest.importorskip("triton")
from fastkl.kernels import config, launch, launch_fused
from fastkl.kernels import variant as variants
from fastkl.ops import problems
from fastkl.ops.fields import FIELDS, Scaling

PLANS = (
    launch.layout,
    launch.forward_plan,
    launch.backward_plan,
    launch_fused.fused_plan,
    problems._described,
)
CACHES = (
    *PLANS,
    variants._variant,
)
SHAPES = ((3, 40), (2, 3, 40), (3, 2, 4, 40), (1, 40), (40,))


def clear() -> None:
    for cache in CACHES:
        cache.cache_clear()


@pytest.fixture
def started(monkeypatch, request) -> list[tuple]:
    """Record the launches, in order: kernel, compile-time values, options, programs and every
    argument that is no tensor.
    """
    starts: list[tuple] = []

    def note(variant, programs, arguments):
        numbers = {n: v for n, v in arguments.items() if not isinstance(v, torch.Tensor)}
        starts.append((variant.kernel, variant.constants, variant.options, programs, numbers))

    monkeypatch.setattr(launch.Variant, "start", note)
    clear()
    request.addfinalizer(clear)
    return starts


def placed(shape: tuple[int, ...], dtype: torch.dtype, start: int, turned: bool) -> torch.Tensor:
    """Uninitialised logits that start so many elements behind a boundary; `turned`: the leading
    dimensions in the other order in memory.
    """
    inner = (*shape[-2::-1], shape[-1]) if turned else shape
    count = torch.Size(shape).numel()
    value = torch.empty(64 + count, dtype=dtype)[start : start + count].view(inner)
    return value.permute(*range(len(shape) - 2, -1, -1), len(shape) - 1) if turned else value


def run(shape, dtypes, starts, turned, masked, per_row, scaling) -> None:
    places = zip(dtypes, starts, strict=True)
    p, q = (placed(shape, dtype, start, turned) for dtype, start in places)
    count = p.shape[:-1].numel()
    mask = torch.ones(count, dtype=torch.bool) if masked else None
    temperature = torch.ones(count) if per_row else 0.5
    rows = Rows(p, q, torch.zeros(count, dtype=torch.int64), mask, temperature, scaling)
    cases.run("triton", rows, dict.fromkeys(FIELDS, torch.empty(count)))


def kinds() -> list[tuple]:
    first = ((2, 3, 40), (torch.float32, torch.float32), (0, 0), False, False, False, Scaling())
    others = (
        SHAPES,
        itertools.product((torch.float32, torch.bfloat16), repeat=2),
        itertools.product((0, 1, 2, 4, 8), repeat=2),
        *((True,),) * 3,
        (Scaling(30.0), Scaling(0.0, 30.0), Scaling(ratio=0.5)),
    )
    found = [
        first[:i] + (value,) + first[i + 1 :] for i, values in enumerate(others) for value in values
    ]
    turned = [((3, 2, 4, 40), *one[1:3], True, *one[4:]) for one in found if one[0] == first[0]]
    return [first, *found, *turned, *found]


def test_a_call_looks_up_what_it_would_work_out(started) -> None:
    """Whatever was called before, and from several threads in any order."""

    def launches_of(kind: tuple) -> list[tuple]:
        started.clear()
        run(*kind)
        return [*started]

    expected = [(clear(), launches_of(kind))[1] for kind in kinds()]
    assert [launches_of(kind) for kind in kinds()] == expected
    assert len({str(launches) for launches in expected}) > 20
    clear()
    started.clear()
    orders = [kinds(), kinds()[::-1], kinds(), kinds()[::-1]]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda mine: [run(*kind) for kind in mine], orders))
    alone = [str(one) for launches in expected for one in launches]
    assert sorted(str(one) for one in started) == sorted(alone * 4)


def test_configurations_of_tests_and_of_the_tuner_count(started) -> None:
    kind, chosen = kinds()[0], config.RowConfig(32, 1, 128, "a test's")
    run(*kind)
    with config.override(chosen, chosen):
        run(*kind)
    run(*kind)
    third = len(started) // 3
    before, within, after = (started[i * third : (i + 1) * third] for i in range(3))
    assert before == after and before[0] != within[0] and before[-1] != within[-1]
    assert within[0][1]["THREADS"] == 32 and within[-1][1]["CHUNK"] == 128


def test_no_tensor_is_kept_and_the_number_is_bounded(started) -> None:
    p, q = torch.empty(3, 40), torch.empty(3, 40)
    made = cases.run("triton", Rows(p, q), {"kl": torch.ones(3)}, (torch.empty(3, 40), None))
    kept = [weakref.ref(value) for value in (p, q, made.saved)]
    started.clear()
    del p, q, made
    gc.collect()
    assert [value() for value in kept] == [None] * 3
    assert all(cache.cache_info().maxsize for cache in PLANS)
