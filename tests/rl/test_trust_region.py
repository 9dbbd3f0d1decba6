"""TrustRegion: the step that is taken, put back to the bit, or shortened."""

import math
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.profiler import profile

import fastkl
from fastkl import testing
from fastkl.rl.trust_region import StepResult, TrustRegion

OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.5, momentum=0.9, weight_decay=0.1),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.5, amsgrad=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.5, foreach=True),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.5),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.5),
}


def calls(profiler: profile, name: str) -> int:
    return sum(event.count for event in profiler.key_averages() if event.key == f"aten::{name}")


def sgd(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)


def with_gradient(value: torch.Tensor, gradient: float = 1.0) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(value)
    parameter.grad = torch.full_like(value, gradient)
    return parameter


# ---- what becomes of a step


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "bound, shrink, accepted",
    [
        (1e6, 0.5, "full"),
        (0.01, 0.5, "shrunk"),
        (0.01, 0.8, "shrunk"),
        (1e-300, 0.5, "undone"),
    ],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_of_an_optimizer(name, bound, shrink, accepted, device) -> None:
    # Within the bound its own to the bit, else the first fraction within it, else none; its state
    # is kept in each case. The measure, a squared distance, grows with the square of the fraction.
    generator, tries = torch.Generator().manual_seed(0), 3 if accepted == "undone" else 40
    old = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64).to(device)
    moved, twins = ([with_gradient(each.clone(), 0.3) for each in old] for _ in range(2))
    optimizer, own = (OPTIMIZERS[name](each) for each in (moved, twins))

    def distance() -> torch.Tensor:
        return (torch.stack(moved) - old).square().sum()

    own.step()
    result = TrustRegion(bound, shrink=shrink, tries=tries).step(optimizer, distance)
    torch.testing.assert_close(
        optimizer.state_dict()["state"], own.state_dict()["state"], rtol=0, atol=0
    )
    with torch.no_grad():
        got, new = torch.stack(moved), torch.stack(twins)
    full, fractions = float((new - old).square().sum()), [shrink**i for i in range(tries + 1)]
    fraction = next((each for each in fractions if each**2 * full <= bound), 0.0)
    assert (result.accepted, result.fraction) == (accepted, fraction)
    assert accepted == "undone" or result.kl == float(distance().detach())
    exact = {"full": new, "undone": old}.get(accepted, old + fraction * (new - old))
    # Three roundings: of the difference, of the product, of the sum.
    allowed = 6 * torch.finfo(old.dtype).eps * torch.maximum(old.abs(), new.abs())
    assert bool(((got - exact).abs() <= (allowed if accepted == "shrunk" else 0)).all())


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("kl", [0.5, math.nan, math.inf, -math.inf], ids=str)
def test_undone_to_the_bit(dtype, kl) -> None:
    # When no fraction will do, the parameters are what they were, with values that arithmetic would
    # not bring back: -0.0, a denormal, a NaN with a payload, both infinities, huge ones.
    tiny, huge = torch.finfo(dtype).smallest_normal / 4, torch.finfo(dtype).max
    odd = torch.tensor([-0.0, tiny, math.nan, math.inf, -math.inf, huge, 1 / 3], dtype=dtype)
    testing.bits(odd)[2] += 1
    noise = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(dtype).t()
    parameters, mean_kl = [with_gradient(odd), with_gradient(noise)], mock.Mock(return_value=kl)
    before = [parameter.detach().clone() for parameter in parameters]
    result = TrustRegion(0.1, tries=3).step(sgd(parameters), mean_kl)
    assert (result.accepted, result.fraction, str(result.kl)) == ("undone", 0.0, str(kl))
    for parameter, expected in zip(parameters, before, strict=True):
        testing.assert_same_bits(parameter, expected, "parameter")
    assert mean_kl.call_count == 4 and parameters[1].stride() == noise.stride()


# Tries, the KLs that are measured, the result, where ones go with a gradient of ones, copies of the
# parameters.
@pytest.mark.parametrize(
    "tries, kls, result, value, copies",
    [
        (10, [0.1], ("full", 1.0, 0.1), 0.0, 1),
        (0, [0.1], ("full", 1.0, 0.1), 0.0, 1),
        (
            0,
            [0.2],
            ("undone", 0.0, 0.2),
            1.0,
            1,
        ),  # a second copy is not needed: it cannot be shortened
        (10, [math.nan, math.inf, 0.1], ("shrunk", 0.25, 0.1), 0.75, 2),
    ],
)
def test_measured_kls(tries, kls, result, value, copies) -> None:
    # A KL of max_kl is accepted, a NaN is not; one wait per measurement; frozen parameters
    # are neither copied nor moved.
    frozen, trained = (
        torch.nn.Parameter(torch.ones(1000), requires_grad=False),
        with_gradient(torch.ones(3)),
    )
    version, measured = frozen._version, iter(torch.tensor(kls, dtype=torch.float64))
    with profile() as seen:
        got = TrustRegion(0.1, tries=tries).step(sgd([frozen, trained]), lambda: next(measured))
    assert got == result and isinstance(got, StepResult) and trained.tolist() == [value] * 3
    assert calls(seen, "_local_scalar_dense") == len(kls)
    assert calls(seen, "clone") == copies and frozen._version == version


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_step_of_the_last_bit_can_be_shortened(dtype) -> None:
    # Halving 1 + eps in place would stay there or return at random; from both ends, less than
    # half of the last bit is none.
    eps, seen = torch.finfo(dtype).eps, []
    parameter = with_gradient(torch.tensor([1 + eps, 1.0], dtype=dtype), -eps)

    def mean_kl() -> float:
        seen.append(parameter.tolist())
        return 1.0 if len(seen) < 3 else 0.0

    assert TrustRegion(0.1).step(sgd([parameter]), mean_kl) == ("shrunk", 0.25, 0.0)
    assert seen[0] == [1 + 2 * eps, 1 + eps] and seen[2] == [1 + eps, 1.0]


def test_groups_and_shared_parameters() -> None:
    # Every group with its own rate; a parameter listed twice, which torch warns of and code that
    # ties weights still does, or two over the same memory, move as one.
    first, second = (with_gradient(torch.zeros(3), -1.0) for _ in range(2))
    alias = torch.nn.Parameter(second.detach())
    alias.grad = second.grad.clone()
    rates, values = ((first, 1.0), (second, 10.0), (alias, 0.5)), iter([1.0, 1.0, 0.0])
    optimizer = torch.optim.SGD([{"params": [each], "lr": rate} for each, rate in rates], lr=0.0)
    optimizer.param_groups[0]["params"].append(first)
    with profile() as seen:
        result = TrustRegion(0.5).step(optimizer, lambda: next(values))
    # The full step: twice along the first, 10 + 0.5 along the shared memory; a quarter of it.
    assert result.fraction == 0.25 and first.tolist() == [0.5] * 3
    assert second.tolist() == alias.tolist() == [2.625] * 3
    assert calls(seen, "clone") == 6


def test_closure() -> None:
    # It is handed on and runs with gradient; mean_kl runs without.
    modes, optimizer = [], sgd([with_gradient(torch.ones(3))])
    closure, mean_kl = (
        lambda value=value: modes.append(torch.is_grad_enabled()) or value for value in (1.0, 0.0)
    )
    assert TrustRegion(0.1).step(optimizer, mean_kl, closure).accepted == "full"
    assert modes == [True, False] and torch.is_grad_enabled()


@pytest.mark.parametrize("wrong, error", [(torch.zeros(2, 3), ValueError), (None, TypeError)])
@pytest.mark.parametrize("calls", [0, 1, 3], ids=["closure", "full", "shortened"])
def test_an_error_restores_the_parameters(calls, wrong, error) -> None:
    parameter, left = with_gradient(torch.ones(3)), iter([*[1.0] * (calls - 1), wrong])

    def closure() -> None:
        parameter.data.add_(1.0)
        raise error("mean_kl: expected a closure, got an error; ")

    given = sgd([parameter]), lambda: next(left), None if calls else closure
    with pytest.raises(error, match="^mean_kl: expected .*, got .*; "):
        TrustRegion(0.1).step(*given)
    assert parameter.tolist() == [1.0] * 3


FSDP2 = """
import sys
import torch
from torch.distributed.fsdp import fully_shard
from fastkl import kl_divergence
from fastkl.rl.trust_region import TrustRegion

where = f"file://{sys.argv[1]}"
torch.distributed.init_process_group("gloo", init_method=where, rank=0, world_size=1)
mesh = torch.distributed.init_device_mesh("cpu", (1,))
batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))

def run(way):
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 5)
    if way:
        fully_shard(module, mesh=mesh, reshard_after_forward=way == "resharded")
    optimizer, old = torch.optim.Adam(module.parameters(), lr=1.0), module(batch).detach()
    module(batch).square().sum().backward()

    def mean_kl():
        kl = kl_divergence(old, module(batch)).mean()
        if way == "by hand":
            module.reshard()
        return kl

    results = [TrustRegion(bound, tries=6).step(optimizer, mean_kl) for bound in (0.01, 1e-12)]
    return results, [value.full_tensor() if way else value for value in module.parameters()]

results, values = run(None)
assert [result.accepted for result in results] == ["shrunk", "undone"], results
for way in ("resharded", "by hand"):
    sharded_results, sharded_values = run(way)
    assert sharded_results == results, (way, sharded_results, results)
    assert all(torch.equal(*pair) for pair in zip(sharded_values, values)), way
torch.distributed.destroy_process_group()
"""


def test_fsdp2(tmp_path) -> None:
    # Sharded parameters take the step that whole ones take, in both of the ways that the
    # docstring names.
    root, environment = Path(fastkl.__file__).parents[1], {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-c", FSDP2, str(tmp_path / "store")],
        cwd=root,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert run.returncode == 0, run.stdout + run.stderr
