"""kernels/compile_plan.py describes what kernels/launch.py launches: the static costs and the
compile tests are about the real kernels.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from fastkl.kernels import compile_plan, launch, launch_fused
from fastkl.ops import engine
from fastkl.ops.fields import Scaling

ROWS, V = 2, compile_plan.VOCABULARY
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FIELDS = {
    "kl_divergence": ("kl",),
    "token_stats": launch.FIELDS,
    "token_stats_policy_only": ("logprob", "entropy"),
}


@pytest.fixture(autouse=True)
def fresh_variants():
    """None made for another architecture."""
    caches = (
        launch.forward_variants,
        launch.backward_variant,
        launch._forward_plan,
        launch._backward_plan,
        launch_fused.fused_variants,
        launch_fused._fused_plan,
    )
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def logits(dtype: str, start: int) -> torch.Tensor:
    """[ROWS, V] whose first row starts so many elements behind a 16-byte boundary; rows of odd
    length, unless start is 0.
    """
    width = V + (start > 0)
    memory = torch.empty(ROWS * width + 16, dtype=TYPES[dtype])
    assert memory.data_ptr() % 16 == 0
    return memory.as_strided((ROWS, V), (width, 1), start)


def launched(monkeypatch, arch: str, dtype: str, aligned: bool) -> set[tuple]:
    """The keys of what would be launched on `arch` with a mask; nothing is."""
    seen: set[tuple] = set()
    monkeypatch.setattr(
        launch.Variant,
        "start",
        lambda variant, *_: seen.add(key(variant.kernel, variant.constants, variant.options)),
    )
    for module in (launch, launch_fused):
        monkeypatch.setattr(
            module, "architecture", lambda device: (arch, 64 if arch.startswith("gfx") else 32)
        )
    tokens, mask, saved = (
        torch.zeros(ROWS, dtype=torch.int64),
        torch.ones(ROWS, dtype=torch.bool),
        torch.empty(ROWS, 10),
    )
    p, q, elsewhere = (logits(dtype, start) for start in ((0, 0, 0) if aligned else (1, 1, 2)))
    grads = [
        torch.empty_like(p, memory_format=torch.preserve_format) if aligned else logits(dtype, 1)
        for _ in "pq"
    ]
    for name, fields in FIELDS.items():
        values = {field: torch.empty(ROWS) for field in fields}
        reference = None if name.endswith("policy_only") else q
        rest = (tokens if "logprob" in fields else None, mask, 1.0)
        scalings = (
            [Scaling(), Scaling(30.0, 30.0), Scaling(ratio=0.5)]
            if aligned and reference is not None
            else [Scaling()]
        )
        for scaling in scalings:
            engine.forward("triton", p, reference, *rest, values, saved, scaling)
        if not aligned and reference is not None:
            engine.forward("triton", p, elsewhere, *rest, values, saved)
        for wrt in (
            ((True, False), (False, True), (True, True))
            if reference is not None
            else ((True, False),)
        ):
            asked = [grad if wanted else None for grad, wanted in zip(grads, wrt, strict=True)]
            for scaling in scalings:
                engine.backward("triton", p, reference, *rest, saved, values, *asked, scaling)
            if dtype == "fp32" and aligned:
                narrow = [
                    None if grad is None else torch.empty(ROWS, V, dtype=torch.bfloat16)
                    for grad in asked
                ]
                engine.backward("triton", p, reference, *rest, saved, values, *narrow)
    if aligned:
        for scaling in (Scaling(), Scaling(30.0, 30.0), Scaling(ratio=0.5)):
            ((_, problem),) = engine.problems(p, q, None, mask, 1.0, scaling)
            launch_fused.fused(problem, torch.ones(ROWS), torch.empty(ROWS), saved, grads[0])
    return seen


def key(kernel: object, constants: dict, options: dict) -> tuple:
    """What one compilation depends on, beside types."""
    return kernel, tuple(sorted(constants.items())), tuple(sorted(options.items()))


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_every_kernel_of_the_plan_is_one_that_is_launched(
    monkeypatch, arch, dtype, aligned
) -> None:
    """With the same compile-time values and compiler options, to the last."""
    seen = launched(monkeypatch, arch, dtype, aligned)
    plan = compile_plan.plan(dtype, aligned, arch)
    missing = [
        item.name
        for item in plan
        if key(item.kernel, item.constexprs, {**item.options, "num_warps": item.num_warps})
        not in seen
    ]
    assert not missing
