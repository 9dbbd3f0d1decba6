"""kernels/compile_plan.py describes what kernels/launch.py launches: the static costs and the
compile tests are about the real kernels.
"""

import itertools

import cases
import pytest
import torch
from cases import Rows

pytest.importorskip("triton")
from fastkl.kernels import compile_plan, launch, launch_fused
from fastkl.ops.fields import Scaling

ROWS, V = 2, compile_plan.VOCABULARY
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BOTH, POLICY = ("kl",), ("logprob", "entropy")
CACHES = (
    launch.forward_variants,
    launch.backward_variant,
    launch._forward_plan,
    launch._backward_plan,
    launch_fused.fused_variants,
    launch_fused._fused_plan,
)
SCALINGS = Scaling(), Scaling(30.0, 30.0), Scaling(ratio=0.5)


@pytest.fixture(autouse=True)
def fresh_variants():
    for turn in range(2):
        for cache in CACHES:
            cache.cache_clear()
        if turn == 0:
            yield


def logits(dtype: torch.dtype, start: int) -> torch.Tensor:
    """[ROWS, V] whose first row starts so many elements behind a 16-byte boundary; rows of odd
    length, unless start is 0.
    """
    width = V + (start > 0)
    memory = torch.empty(ROWS * width + 16, dtype=dtype)
    assert memory.data_ptr() % 16 == 0
    return memory.as_strided((ROWS, V), (width, 1), start)


def key(kernel: object, constants: dict, options: dict) -> tuple:
    return kernel, tuple(sorted(constants.items())), tuple(sorted(options.items()))


def launch_all(dtype: torch.dtype, aligned: bool) -> None:
    tokens, mask = torch.zeros(ROWS, dtype=torch.int64), torch.ones(ROWS, dtype=torch.bool)
    p, q, elsewhere = (logits(dtype, start) for start in ((0, 0, 0) if aligned else (1, 1, 2)))
    grads = [logits(dtype, int(not aligned)) for _ in "pq"]
    types = [grads]
    if dtype == torch.float32 and aligned:
        types.append([torch.empty(ROWS, V, dtype=torch.bfloat16) for _ in "pq"])
    for fields, ref in ((BOTH, q), (launch.FIELDS, q), (POLICY, None)):
        given = tokens if "logprob" in fields else None
        weights = {field: torch.empty(ROWS) for field in fields}
        sides = ((1, 0), (0, 1), (1, 1)) if ref is not None else ((1, 0),)
        scalings = SCALINGS if aligned and ref is not None else SCALINGS[:1]
        for scaling, wrt, places in itertools.product(scalings, sides, types):
            asked = [grad if on else None for grad, on in zip(places, wrt, strict=True)]
            cases.run("triton", Rows(p, ref, given, mask, 1.0, scaling), weights, asked)
        if not aligned and ref is not None:
            cases.forward("triton", Rows(p, elsewhere, given, mask), fields)
    for scaling in SCALINGS if aligned else ():
        rows, ones = Rows(p, q, None, mask, 1.0, scaling), torch.ones(ROWS)
        launch_fused.fused(cases.problem(rows), ones, ones, torch.empty(ROWS, 10), grads[0])


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("arch", ["sm_90", "sm_80", "gfx942"])
def test_every_kernel_of_the_plan_is_one_that_is_launched(
    monkeypatch, arch, dtype, aligned
) -> None:
    seen: set[tuple] = set()

    def note(variant, *_):
        seen.add(key(variant.kernel, variant.constants, variant.options))

    monkeypatch.setattr(launch.Variant, "start", note)
    for module in (launch, launch_fused):
        found = arch, 64 if arch.startswith("gfx") else 32
        monkeypatch.setattr(module, "architecture", lambda device, found=found: found)
    launch_all(TYPES[dtype], aligned)
    for item in compile_plan.plan(dtype, aligned, arch):
        options = {**item.options, "num_warps": item.num_warps}
        assert key(item.kernel, item.constexprs, options) in seen, item.name
