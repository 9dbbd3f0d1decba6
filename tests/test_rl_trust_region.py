"""TrustRegion and EarlyStop: the step that is taken, put back to the bit, or shortened, and when the epochs end."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastkl
from fastkl import testing
from fastkl.rl.trust_region import EarlyStop, StepResult, TrustRegion

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.5, momentum=0.9, weight_decay=0.1),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.5, amsgrad=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.5, foreach=True),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.5),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.5),
}


class Policy(torch.nn.Module):
    """Two layers over 7 tokens, their logits on one batch of 8 rows, and the exact mean KL from where it was made."""

    def __init__(self, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first, self.second = (torch.nn.Parameter(torch.randn(*shape, generator=generator).to(device, dtype)) for shape in ((5, 6), (6, 7)))
        self.batch = torch.randn(8, 5, generator=generator).to(device, dtype)
        self.reward = torch.randn(8, 7, generator=generator).to(device, dtype)
        self.old = self().detach()

    def forward(self) -> torch.Tensor:
        return torch.tanh(self.batch @ self.first) @ self.second

    def kl(self) -> torch.Tensor:
        """Mean KL(old‖now) of float64."""
        return testing.truth(self.old, self()).kl.mean()

    def loss(self) -> torch.Tensor:
        """Minus the expected reward."""
        return -(self().softmax(-1) * self.reward).sum(-1).mean()

    def values(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters()]


class Calls(TorchDispatchMode):
    """Counts the calls of each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def after_plain_step(policy: Policy, make) -> tuple[list[torch.Tensor], dict]:
    """(parameters, optimizer state) after the optimizer's own step on a copy of the policy."""
    twin = copy.deepcopy(policy)
    optimizer = make(twin.parameters())
    twin.loss().backward()
    optimizer.step()
    return twin.values(), optimizer.state_dict()["state"]


def sgd(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)


def ones(count: int = 3) -> torch.nn.Parameter:
    """A parameter of ones whose gradient is ones: a step of sgd leads to 0."""
    parameter = torch.nn.Parameter(torch.ones(count))
    parameter.grad = torch.ones(count)
    return parameter


# ---- what becomes of a step


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_within_the_bound_is_the_optimizers_own(name, device) -> None:
    """Parameters to the bit, and the KL as measured."""
    policy = Policy(device=device)
    expected, _ = after_plain_step(policy, OPTIMIZERS[name])
    optimizer = OPTIMIZERS[name](policy.parameters())
    policy.loss().backward()
    result = TrustRegion(100.0).step(optimizer, policy.kl)
    assert result == StepResult("full", 1.0, float(policy.kl().detach())) and result.kl > 1e-3
    for value, own in zip(policy.values(), expected, strict=True):
        testing.assert_same_bits(value, own, name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shrink", [0.5, 0.8])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_is_too_long_is_shortened(name, shrink, device) -> None:
    """To the first of the fractions whose KL is within the bound, exactly that far along the optimizer's own step."""
    policy = Policy(device=device)
    old, (new, _) = policy.values(), after_plain_step(policy, OPTIMIZERS[name])
    optimizer = OPTIMIZERS[name](policy.parameters())
    policy.loss().backward()
    region = TrustRegion(0.01, shrink=shrink, tries=40)
    result = region.step(optimizer, policy.kl)
    attempt = round(math.log(result.fraction, shrink))
    assert result.accepted == "shrunk" and attempt >= 1 and result.fraction == shrink**attempt
    assert 0 < result.kl <= 0.01 and result.kl == float(policy.kl().detach())
    for value, start, end in zip(policy.values(), old, new, strict=True):
        # Three roundings: of the difference, of the product, of the sum.
        scale = torch.maximum(start.abs(), end.abs()) * 2
        assert bool(((value - (start + result.fraction * (end - start))).abs() <= 3 * torch.finfo(value.dtype).eps * scale).all())
    with torch.no_grad():  # the fraction before was too long
        for parameter, start, end in zip(policy.parameters(), old, new, strict=True):
            parameter.copy_(start + shrink ** (attempt - 1) * (end - start))
    assert float(policy.kl().detach()) > 0.01


def odd_bits(dtype: torch.dtype) -> torch.Tensor:
    """Values that arithmetic would not bring back: -0.0, a denormal, a NaN with a payload, both infinities, huge ones."""
    tiny = torch.finfo(dtype).smallest_normal / 4
    values = torch.tensor([-0.0, tiny, math.nan, math.inf, -math.inf, torch.finfo(dtype).max, 1 / 3], dtype=dtype)
    values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])[2] += 1
    return values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [0.5, math.nan, math.inf, -math.inf], ids=str)
def test_undone_to_the_bit(dtype, value) -> None:
    """When no fraction will do, the parameters are what they were, whatever they held; every fraction was tried."""
    parameter = torch.nn.Parameter(odd_bits(dtype))
    strided = torch.nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(dtype).t())
    before = [parameter.detach().clone(), strided.detach().clone()]
    for tensor in (parameter, strided):
        tensor.grad = torch.ones_like(tensor)
    measured = []

    def mean_kl() -> float:
        measured.append(strided.detach().clone())
        return value

    result = TrustRegion(0.1, tries=3).step(sgd([parameter, strided]), mean_kl)
    assert result.accepted == "undone" and result.fraction == 0.0 and (result.kl == value or math.isnan(value) and math.isnan(result.kl))
    assert len(measured) == 4
    for i, fraction in enumerate((1.0, 0.5, 0.25, 0.125)):
        exact = before[1].double() - fraction
        assert bool(((measured[i].double() - exact).abs() <= 2 * torch.finfo(dtype).eps * (exact.abs() + 1)).all()), fraction
    for tensor, expected in zip((parameter, strided), before, strict=True):
        testing.assert_same_bits(tensor, expected, "parameter")
        assert tensor.stride() == expected.stride()


def test_no_tries_is_full_or_nothing() -> None:
    parameter = ones()
    with Calls() as calls:
        assert TrustRegion(0.1, tries=0).step(sgd([parameter]), lambda: 0.2) == StepResult("undone", 0.0, 0.2)
    assert calls.counts["aten.clone.default"] == 1  # nothing to shorten: no second copy
    assert TrustRegion(0.1, tries=0).step(sgd([parameter]), lambda: 0.1) == StepResult("full", 1.0, 0.1)
    assert parameter.tolist() == [0, 0, 0]


def test_the_bound_itself_is_within_and_a_nan_is_not() -> None:
    """KL equal to max_kl is accepted; a NaN at the full step leads to the next fraction."""
    parameter, values = ones(), iter([math.nan, math.inf, 0.25])
    assert TrustRegion(0.25).step(sgd([parameter]), lambda: next(values)) == StepResult("shrunk", 0.25, 0.25)
    assert parameter.tolist() == [0.75] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_step_of_the_last_bit_can_be_shortened(dtype) -> None:
    """Halving 1 + eps in place would stay there or return at random; from both ends, less than half of the last bit is none."""
    eps = torch.finfo(dtype).eps
    parameter = torch.nn.Parameter(torch.tensor([1 + eps, 1.0], dtype=dtype))
    parameter.grad = torch.full((2,), -eps, dtype=dtype)
    seen = []

    def mean_kl() -> float:
        seen.append(parameter.tolist())
        return 1.0 if len(seen) < 3 else 0.0

    result = TrustRegion(0.1).step(sgd([parameter]), mean_kl)
    assert seen[0] == [1 + 2 * eps, 1 + eps] and seen[2] == [1 + eps, 1.0]
    assert result == StepResult("shrunk", 0.25, 0.0)


# ---- which parameters, and what else is kept


def test_groups_and_shared_parameters() -> None:
    """Every group with its own rate; a parameter listed twice, or two over the same memory, move as one."""
    first, second = (torch.nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2))
    alias = torch.nn.Parameter(second.detach())
    assert alias.data_ptr() == second.data_ptr()
    for parameter in (first, second, alias):
        parameter.grad = torch.full((3,), -1.0, dtype=torch.float64)
    optimizer = torch.optim.SGD([{"params": [first], "lr": 1.0}, {"params": [second], "lr": 10.0}, {"params": [alias], "lr": 0.5}], lr=0.0)
    optimizer.param_groups[0]["params"].append(first)  # what torch warns of, and code that ties weights still does
    values = iter([1.0, 1.0, 0.0])
    with Calls() as calls:
        result = TrustRegion(0.5).step(optimizer, lambda: next(values))
    # The full step: twice along the first, 10 + 0.5 along the shared memory; a quarter of it.
    assert result.fraction == 0.25 and first.tolist() == [0.5] * 3 and second.tolist() == [2.625] * 3 == alias.tolist()
    assert calls.counts["aten.clone.default"] == 6


def test_frozen_parameters_are_neither_copied_nor_moved() -> None:
    """Only what can change is held: one copy, a second once a step was too long."""
    frozen, trained = torch.nn.Parameter(torch.ones(1000), requires_grad=False), ones()
    version = frozen._version
    for values, copies in (([0.0], 1), ([1.0, 0.0], 2)):
        measured = iter(values)
        with Calls() as calls:
            TrustRegion(0.5).step(sgd([frozen, trained]), lambda measured=measured: next(measured))
        assert calls.counts["aten.clone.default"] == copies
    assert frozen._version == version


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_is_kept(name) -> None:
    """After an undone step the state is that of the optimizer's own step, and the next one goes on from it."""
    policy = Policy()
    _, state = after_plain_step(policy, OPTIMIZERS[name])
    optimizer = OPTIMIZERS[name](policy.parameters())
    policy.loss().backward()
    assert TrustRegion(0.1).step(optimizer, lambda: 1.0).accepted == "undone"
    kept = optimizer.state_dict()["state"]
    assert kept.keys() == state.keys() and len(kept) == 2
    for index, entries in state.items():
        for key, value in entries.items():
            assert torch.equal(torch.as_tensor(kept[index][key]), torch.as_tensor(value)), key
    assert TrustRegion(1e6).step(optimizer, policy.kl).accepted == "full"


def test_closure() -> None:
    """A closure is handed on and runs with gradient; mean_kl runs without; LBFGS calls the first several times."""
    policy = Policy()
    optimizer = torch.optim.LBFGS(policy.parameters(), lr=1.0, max_iter=5)
    modes = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = policy.loss()
        loss.backward()
        modes.append(loss.requires_grad)
        return loss

    def mean_kl() -> torch.Tensor:
        kl = policy.kl()
        assert not kl.requires_grad
        return kl

    before = float(policy.loss().detach())
    result = TrustRegion(1e-3, tries=30).step(optimizer, mean_kl, closure)
    assert len(modes) > 1 and all(modes)
    assert result.accepted == "shrunk" and result.kl <= 1e-3 and float(policy.loss().detach()) < before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("where", ["closure", "full", "shortened"])
def test_an_exception_puts_the_parameters_back(where) -> None:
    policy = Policy()
    before = policy.values()
    policy.loss().backward()
    calls = []

    def mean_kl() -> float:
        calls.append(0)
        if len(calls) == {"full": 1, "shortened": 3}.get(where):
            raise KeyboardInterrupt
        return 1.0

    def closure() -> float:
        with torch.no_grad():
            policy.first.add_(1.0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TrustRegion(0.1).step(sgd(policy.parameters()), mean_kl, closure if where == "closure" else None)
    assert len(calls) == {"closure": 0, "full": 1, "shortened": 3}[where]
    for value, expected in zip(policy.values(), before, strict=True):
        testing.assert_same_bits(value, expected, "parameter")


@pytest.mark.parametrize("values", [[0.0], [1.0, 1.0, 0.0]], ids=["full", "shrunk"])
def test_one_wait_per_measurement(values) -> None:
    """The only values read are those of mean_kl."""
    policy = Policy()
    policy.loss().backward()
    measured = iter(torch.tensor(values))
    with Calls() as calls:
        TrustRegion(0.5).step(sgd(policy.parameters()), lambda: next(measured))
    assert calls.counts["aten._local_scalar_dense.default"] == len(values)


def test_a_run_stays_within_the_bound() -> None:
    """With fastkl's own KL: at a rate that throws the policy 100 times too far, no step exceeds the bound, and it learns all the same."""
    policy = Policy(torch.float32)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1.0)
    first_loss, accepted, free = float(policy.loss().detach()), [], []
    for step in range(20):
        old = policy().detach()
        optimizer.zero_grad()
        policy.loss().backward()
        twin, twin_optimizer = copy.deepcopy((policy, optimizer))
        twin.loss().backward()
        twin_optimizer.step()
        free.append(float(testing.truth(old, twin().detach()).kl.mean()))
        result = TrustRegion(0.01, tries=20).step(optimizer, lambda old=old: fastkl.kl_divergence(old, policy()).mean())
        true = float(testing.truth(old, policy().detach()).kl.mean())
        assert result.kl <= 0.01 and result.kl == pytest.approx(true, rel=1e-4, abs=1e-8), step
        accepted.append(result.accepted)
    assert "shrunk" in accepted and max(free) > 1.0
    assert float(policy.loss().detach()) < first_loss - 0.3


# ---- EarlyStop


@pytest.mark.parametrize("make", [float, torch.tensor, lambda kl: torch.tensor([kl], dtype=torch.float64)], ids=["float", "0-d", "1-d"])
def test_early_stop(make) -> None:
    """Beyond factor times the target, the bound itself not included; a NaN stops, a sampled estimate below 0 does not."""
    stop = EarlyStop(0.5)
    assert [stop.should_stop(make(kl)) for kl in (-1.0, 0.0, 0.5, 0.75, 0.7500001, 2.0)] == [False] * 4 + [True] * 2
    assert stop.should_stop(make(math.nan)) and stop.should_stop(make(math.inf))
    assert repr(stop) == "EarlyStop(target_kl=0.5, factor=1.5)" and repr(TrustRegion(1)) == "TrustRegion(max_kl=1, shrink=0.5, tries=10)"
    assert EarlyStop(0.5, factor=1.0).should_stop(make(0.6)) and not EarlyStop(0.5, factor=2.0).should_stop(make(0.9))


# ---- arguments


@pytest.mark.parametrize("make, error, words", [
    (lambda: TrustRegion("0.1"), TypeError, "max_kl: expected a positive finite number of nats, got str"),
    (lambda: TrustRegion(torch.tensor(0.1)), TypeError, r"pass float\(max_kl\)"),
    (lambda: TrustRegion(True), TypeError, "max_kl"),
    (lambda: TrustRegion(0.0), ValueError, "max_kl: expected a positive finite number of nats, got 0.0"),
    (lambda: TrustRegion(-1), ValueError, "max_kl"),
    (lambda: TrustRegion(math.inf), ValueError, "max_kl"),
    (lambda: TrustRegion(math.nan), ValueError, "max_kl"),
    (lambda: TrustRegion(0.1, shrink=1.0), ValueError, "shrink: expected a number between 0 and 1"),
    (lambda: TrustRegion(0.1, shrink=0), ValueError, "shrink"),
    (lambda: TrustRegion(0.1, tries=-1), ValueError, "tries: expected a whole number of at least 0, got -1"),
    (lambda: TrustRegion(0.1, tries=2.5), ValueError, "tries"),
    (lambda: TrustRegion(0.1, tries=None), TypeError, "tries"),
    (lambda: EarlyStop(0), ValueError, "target_kl: expected a positive finite number of nats, got 0"),
    (lambda: EarlyStop(None), TypeError, "target_kl"),
    (lambda: EarlyStop(0.1, 0.0), ValueError, "factor"),
    (lambda: EarlyStop(0.1).should_stop(torch.zeros(3)), ValueError, r"kl: expected one number .*got a tensor of shape \(3,\); reduce it"),
    (lambda: EarlyStop(0.1).should_stop("0.1"), TypeError, "kl: expected one number or a one-element tensor, got str; reduce"),
    (lambda: EarlyStop(0.1).should_stop(np.ones(3)), TypeError, "kl: expected one number or a one-element tensor, got ndarray; reduce"),
    (lambda: EarlyStop(0.1).should_stop(torch.ones(1, dtype=torch.complex64)), TypeError, "kl: expected one number .*got torch.complex64 tensor"),
    (lambda: TrustRegion(0.1).step([torch.zeros(3)], lambda: 0.0), TypeError, "optimizer: expected a torch optimizer, got list; pass"),
    (lambda: TrustRegion(0.1).step(sgd([torch.zeros(3)]), 0.1), TypeError, "mean_kl: expected a function without arguments.*got float; wrap"),
    (lambda: TrustRegion(0.1).step(sgd([torch.zeros(3)]), lambda: 0.0, 1), TypeError, "closure: expected a function or None, got int; pass"),
])
def test_wrong_arguments(make, error, words) -> None:
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("value, error, words", [
    (torch.zeros(2, 3), ValueError, r"mean_kl: expected one number or a one-element tensor, got a tensor of shape \(2, 3\); reduce it over"),
    (torch.zeros(0), ValueError, "mean_kl"),
    (None, TypeError, "mean_kl: expected one number or a one-element tensor, got NoneType"),
    (True, TypeError, "mean_kl: expected one number or a one-element tensor, got bool"),
])
def test_a_wrong_measurement_leaves_the_parameters(value, error, words) -> None:
    parameter = ones()
    with pytest.raises(error, match=words):
        TrustRegion(0.1).step(sgd([parameter]), lambda: value)
    assert parameter.tolist() == [1, 1, 1]
