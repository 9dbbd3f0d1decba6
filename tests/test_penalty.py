"""KLPenalty: its value, its gradient, its beta and what it keeps of the last call."""

import copy
import itertools
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastkl
from fastkl import testing

V = 17
REDUCTIONS = ("token_mean", "mean", "sequence_mean", "sum")
DIRECTIONS = ("policy||reference", "reference||policy")


def case(implementation, leading: tuple[int, ...] = (2, 3), dtype: torch.dtype = torch.float32):
    count, device = torch.Size(leading).numel(), implementation.device
    pair = testing.pair("normal3", count, V, 0.5, dtype=dtype, device=device)
    mask = (torch.arange(count) != 1).reshape(leading).to(device)
    return *(side.reshape(*leading, V).requires_grad_() for side in pair), mask


def plain(penalty: fastkl.KLPenalty, policy, reference, mask):
    """(loss, gradients, KL per token) of the definition, in fp64."""
    leaves = [testing.leaf(value.detach().double().cpu()) for value in (policy, reference)]
    log_p, log_q = ((value / penalty.temperature).log_softmax(-1) for value in leaves)
    log_p, log_q = (log_p, log_q) if penalty.direction == DIRECTIONS[0] else (log_q, log_p)
    kl = torch.where(mask.cpu(), (log_p.exp() * (log_p - log_q)).sum(-1), 0.0)
    rows = kl.reshape(-1, kl.shape[-1] if kl.dim() else 1)
    sums = {"sum": kl.sum(), "sequence_mean": rows.sum(-1).mean()}
    loss = penalty.beta * sums.get(penalty.reduction, kl.sum() / mask.sum().cpu())
    return loss.detach(), torch.autograd.grad(loss, leaves), kl.detach()


SETTINGS = [
    *itertools.product(DIRECTIONS, REDUCTIONS, [True, False], [(2, 3)], [torch.float32]),
    *itertools.product(DIRECTIONS[:1], REDUCTIONS, [False], [(), (4,), (2, 1, 3)], [torch.float32]),
    *itertools.product(
        DIRECTIONS[:1], REDUCTIONS[:1], [True], [(2, 3)], [torch.bfloat16, torch.half]
    ),
]


@pytest.mark.parametrize("direction, reduction, masked, leading, dtype", SETTINGS)
def test_value_and_gradient(implementation, direction, reduction, masked, leading, dtype) -> None:
    policy, reference, mask = case(implementation, leading, dtype)
    penalty = fastkl.KLPenalty(0.3, direction=direction, reduction=reduction, temperature=1.7)
    assert penalty.last == {}
    loss = penalty(policy, reference, mask) if masked else penalty(policy, reference)
    counted = mask if masked else torch.ones_like(mask)
    exact, exact_grads, kl = plain(penalty, policy, reference, counted)
    assert loss.shape == () and loss.dtype == torch.float32
    testing.assert_near(loss, exact, 2e-5, 0.0, "loss")
    tolerance = max(1e-5, torch.finfo(dtype).eps * (dtype != torch.float32))
    grads = torch.autograd.grad(loss, (policy, reference))
    for grad, value in zip(grads, exact_grads, strict=True):
        testing.assert_gradient(grad, value, "gradient", tolerance)
        assert grad.dtype == dtype and not bool(grad[~counted].any())
    last = penalty.last
    assert float(last["tokens"]) == int(counted.sum()) and torch.equal(last["loss"], loss.detach())
    testing.assert_near(last["kl"], kl.sum() / counted.sum().cpu(), 2e-5, 0.0, "last kl")
    testing.assert_near(last["max_kl"], kl.max(), 2e-5, 0.0, "last max_kl")
    assert float(last["beta"]) == pytest.approx(0.3, rel=1e-7)
    assert {"kl_per_sequence", "sequences"} < set(last)
    for value in last.values():
        assert value.shape == () and value.dtype == torch.float32 and value.device == policy.device
        assert not value.requires_grad and value.grad_fn is None


@pytest.mark.parametrize("leading", [(3,), (2, 3)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_token_that_counts(implementation, reduction, leading) -> None:
    penalty, nothing = fastkl.KLPenalty(0.3, reduction=reduction), torch.zeros(leading).bool()
    for shape in (leading, (0,), (2, 0), (0, 3)):
        nan = torch.full((*shape, V), math.nan, device=implementation.device, requires_grad=True)
        mask = nothing.to(nan.device) if shape == leading else None
        loss = penalty(nan, nan.detach(), mask)
        loss.backward()
        assert loss.item() == 0.0 and nan.grad.shape == nan.shape and not bool(nan.grad.any())
        assert {name for name, value in penalty.last.items() if float(value)} == {"beta"}


def test_only_the_logits_that_require_grad_get_one(implementation) -> None:
    policy, reference, mask = case(implementation)
    fastkl.KLPenalty(0.3)(policy, reference.detach(), mask).backward()
    assert policy.grad is not None and reference.grad is None
    assert not fastkl.KLPenalty(0.3)(policy.detach(), reference.detach(), mask).requires_grad


# ---- beta and wrong arguments


def test_a_controller_is_read_at_each_call(implementation) -> None:
    policy, reference, _ = case(implementation, (2,))
    controller = SimpleNamespace(beta=0.5)
    penalty = fastkl.KLPenalty(controller)
    first = penalty(policy, reference)
    for beta in (2, 0.0):
        controller.beta = beta
        assert torch.equal(penalty(policy, reference), 2 * beta * first)
        assert penalty.beta == float(penalty.last["beta"]) == beta
    controller.beta = -1.0
    with pytest.raises(ValueError, match="beta: .*-1.0"):
        penalty(policy, reference)


WRONG_BETAS = {
    **{str(value): (value, ValueError, f"got {value}") for value in (-0.1, math.nan, math.inf)},
    "huge": (10**400, ValueError, "got an integer of 1329 bits"),
    **{
        str(value): (value, TypeError, "number or a controller")
        for value in ("0.1", None, True, torch.tensor(0.1), [0.1])
    },
}


@pytest.mark.parametrize("wrap", [False, True], ids=["number", "controller"])
@pytest.mark.parametrize("beta, error, words", WRONG_BETAS.values(), ids=WRONG_BETAS)
def test_wrong_beta(beta, error, words, wrap) -> None:
    with pytest.raises(error, match=f"^beta: expected .*{words}"):
        fastkl.KLPenalty(SimpleNamespace(beta=beta) if wrap else beta)


WRONG = {
    r"ref_logits: expected the shape of policy_logits, \(2, 3, 17\), got \(2, 3, 16\)": {
        "ref_logits": torch.zeros(2, 3, 16)
    },
    "policy_logits: .*torch.int64": {"policy_logits": torch.zeros(2, 3, V).long()},
    "ref_logits: .*NoneType": {"ref_logits": None},
    r"mask: .*\(2, 3\).*got \(3, 2\)": {"mask": torch.ones(3, 2).bool()},
}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("words", WRONG)
def test_wrong_logits_are_named(words, direction) -> None:
    right = {"policy_logits": torch.zeros(2, 3, V), "ref_logits": torch.zeros(2, 3, V)}
    with pytest.raises((ValueError, TypeError), match=words):
        fastkl.KLPenalty(0.1, direction=direction)(**{**right, **WRONG[words]})


# ---- as a module


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_synchronisation(reduction) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    policy, reference = (
        torch.randn(2, 3, 1000, device="cuda", generator=generator, requires_grad=True)
        for _ in "pq"
    )
    mask = torch.tensor([[True, False, True]] * 2, device="cuda")
    penalty = fastkl.KLPenalty(0.3, reduction=reduction)
    normalizer = None if reduction == "sum" else mask.sum()
    for mode in ("default", "error"):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            penalty(policy, reference, mask, normalizer=normalizer).backward()
            penalty(policy, reference).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    expected = plain(penalty, policy, reference, torch.ones_like(mask))[0]
    testing.assert_near(penalty.last["loss"], expected, 2e-5, 0.0, "loss")


def test_in_a_model(implementation) -> None:
    penalty, device = fastkl.KLPenalty(0.3), implementation.device
    generator = torch.Generator().manual_seed(0)
    hidden, reference = (torch.randn(3, n, generator=generator).to(device) for n in (8, V))
    head = torch.nn.Linear(8, V, bias=False)
    model = torch.nn.ModuleDict({"head": head, "penalty": penalty}).to(device)
    assert list(model.state_dict()) == ["head.weight"] and not list(penalty.parameters())
    logits = head(hidden)
    model["penalty"](logits, reference).backward()
    exact = plain(penalty, logits, reference, torch.ones(3, dtype=torch.bool))[1][0]
    testing.assert_near(head.weight.grad, exact.T @ hidden.double().cpu(), 1e-4, 1e-6, "gradient")


MAKE = [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]


@pytest.mark.parametrize("make", MAKE, ids=["deepcopy", "pickle"])
def test_copies(implementation, make) -> None:
    policy, reference, mask = case(implementation)
    settings = {"direction": DIRECTIONS[1], "temperature": 1.5, "reduction": "sum"}
    penalty = fastkl.KLPenalty(0.2, **settings)
    before = make(penalty)
    loss = penalty(policy, reference, mask)
    after = make(penalty)
    assert before.last == {} and torch.equal(after.last["loss"], loss)
    for module in (before, after):
        assert torch.equal(module(policy, reference, mask), loss)
        assert all(f"{name}={value!r}" in repr(module) for name, value in settings.items())


def test_compiled(implementation) -> None:
    torch._dynamo.reset()
    policy, reference, mask = case(implementation, (1, 3))
    controller = SimpleNamespace(beta=0.5)
    penalty, eager = fastkl.KLPenalty(controller), fastkl.KLPenalty(controller)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(penalty, fullgraph=True, backend=counter)
    for beta in (0.5, 0.75, 1.25, 2.5):
        controller.beta = beta
        losses = compiled(policy, reference, mask), eager(policy, reference, mask)
        assert torch.equal(*losses)
        assert torch.equal(*(torch.autograd.grad(value, policy)[0] for value in losses))
        assert all(torch.equal(value, eager.last[name]) for name, value in penalty.last.items())
    assert counter.frame_count <= 2


def test_a_weight_of_0_leaves_an_infinite_kl_out(implementation) -> None:
    device = implementation.device
    weight, bias = torch.eye(2, device=device), torch.tensor([0.0, -math.inf], device=device)
    policy = torch.tensor([[0.0, 0.0], [0.0, 1.0]], device=device, requires_grad=True)
    states, reference = policy.detach(), torch.tensor([[0.0, -math.inf], [0.0, 2.0]], device=device)
    biases = {"bias": torch.zeros_like(bias), "ref_bias": bias}
    linear = fastkl.LinearKLPenalty(0.0)(policy, weight, states, weight.clone(), **biases)
    for loss in (fastkl.KLPenalty(0)(policy, reference), linear):
        assert loss == 0 and not bool(torch.autograd.grad(loss, policy)[0].any())
    assert fastkl.KLPenalty(0)(states, reference) == 0
