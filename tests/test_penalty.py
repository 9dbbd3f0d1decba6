"""KLPenalty: its value, its gradient, its beta and what it keeps of the last call."""

import copy
import itertools
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from cases import waits
from torch._dynamo.testing import CompileCounterWithBackend

import fastkl
from fastkl import testing

V = 17
REDUCTIONS = ("token_mean", "mean", "sequence_mean", "sum")
DIRECTIONS = ("policy||reference", "reference||policy")


MASKS = {
    "all": lambda count: torch.ones(count, dtype=torch.bool),
    # The second sequence of three does not count.
    "some": lambda count: torch.arange(count) % 5 // 2 != 1,
    "none": lambda count: torch.zeros(count, dtype=torch.bool),
}


# Logits that require grad, NaN where they do not count, and a mask.
def case(implementation, leading=(3, 2), dtype: torch.dtype = torch.float32, masked: str = "some"):
    count, device = torch.Size(leading).numel(), implementation.device
    pair = testing.pair("normal3", count, V, 0.5, dtype=dtype, device=device)
    mask = MASKS[masked](count).reshape(leading).to(device)
    p, q = (side.reshape(*leading, V).masked_fill(~mask[..., None], math.nan) for side in pair)
    return p.requires_grad_(), q.requires_grad_(), mask


# (numbers as in `last`, gradients) of the definition, in fp64.
def plain(penalty: fastkl.KLPenalty, policy, reference, mask):
    leaves = [testing.leaf(value.detach().double().cpu()) for value in (policy, reference)]
    log_p, log_q = ((value / penalty.temperature).log_softmax(-1) for value in leaves)
    log_p, log_q = (log_p, log_q) if penalty.direction == DIRECTIONS[0] else (log_q, log_p)
    kl = torch.where(mask, (log_p.exp() * (log_p - log_q)).sum(-1), 0.0)
    total, tokens = kl.sum(), mask.sum().double()
    sequences = (mask.any(-1) if mask.dim() else mask).sum().double()
    mean, per_sequence = (total / count.clamp(min=1) for count in (tokens, sequences))
    reduced = {"sum": total, "sequence_mean": per_sequence}.get(penalty.reduction, mean)
    loss = penalty.beta * reduced
    numbers = {
        "loss": loss,
        "kl": mean,
        "max_kl": kl.max() if kl.numel() else kl.sum(),
        "tokens": tokens,
        "sequences": sequences,
        "kl_per_sequence": per_sequence,
        "beta": torch.tensor(penalty.beta),
    }
    return numbers, torch.autograd.grad(loss, leaves)


LEADING = [(), (4,), (2, 1, 3), (0,), (2, 0), (0, 3)]
SETTINGS = [
    *itertools.product(DIRECTIONS, REDUCTIONS, ["some", "all"], [(3, 2)], [torch.float32]),
    *itertools.product(DIRECTIONS[:1], REDUCTIONS, ["all"], LEADING, [torch.float32]),
    *itertools.product(DIRECTIONS[:1], REDUCTIONS, ["none"], [(3,), (2, 3)], [torch.float32]),
    *itertools.product(
        DIRECTIONS[:1], REDUCTIONS[:1], ["some"], [(3, 2)], [torch.bfloat16, torch.half]
    ),
]


# A float32 loss; a sequence is the last leading dimension; `last` holds plain numbers.
@pytest.mark.parametrize("direction, reduction, masked, leading, dtype", SETTINGS)
def test_value_and_gradient(implementation, direction, reduction, masked, leading, dtype) -> None:
    policy, reference, mask = case(implementation, leading, dtype, masked)
    penalty = fastkl.KLPenalty(0.3, direction=direction, reduction=reduction, temperature=1.7)
    assert penalty.last == {} and not penalty.state_dict() and not list(penalty.parameters())
    loss = penalty(policy, reference, None if masked == "all" else mask)
    numbers, exact_grads = plain(penalty, policy, reference, mask.cpu())
    assert loss.shape == () and loss.dtype == torch.float32
    tolerance = max(1e-5, torch.finfo(dtype).eps * (dtype != torch.float32))
    grads = torch.autograd.grad(loss, (policy, reference))
    for grad, value in zip(grads, exact_grads, strict=True):
        testing.assert_gradient(grad[mask], value[mask.cpu()], "gradient", tolerance)
        assert grad.dtype == dtype and not bool(grad[~mask].any())
    assert torch.equal(penalty.last["loss"], loss) and numbers.keys() == penalty.last.keys()
    for name, value in penalty.last.items():
        testing.assert_near(value, numbers[name], 2e-5, 0.0, name)
        assert (value.shape, value.dtype, value.device) == ((), torch.float32, policy.device)
        assert not value.requires_grad


def test_a_controller_is_read_at_each_call(implementation) -> None:
    policy, reference, _ = case(implementation, (2,))
    penalty = fastkl.KLPenalty(controller := SimpleNamespace(beta=0.5))
    first = penalty(policy, reference)
    for controller.beta in (2, 0.0):
        assert torch.equal(penalty(policy, reference), 2 * controller.beta * first)
        assert penalty.beta == float(penalty.last["beta"]) == controller.beta
    controller.beta = -1.0
    with pytest.raises(ValueError, match="beta: .*-1.0"):
        penalty(policy, reference)


# ---- as a module


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_synchronisation(implementation, reduction) -> None:
    policy, reference, mask = case(implementation)
    penalty = fastkl.KLPenalty(0.3, reduction=reduction)
    normalizer = None if reduction == "sum" else mask.sum()

    def steps() -> None:
        penalty(policy, reference, mask, normalizer=normalizer).backward()
        penalty(policy, reference).backward()

    assert waits(steps) == 0


def test_copies(implementation) -> None:
    given = case(implementation)
    settings = {"direction": DIRECTIONS[1], "temperature": 1.5, "reduction": "sum"}
    penalty = fastkl.KLPenalty(0.2, **settings)
    before, loss = copy.deepcopy(penalty), penalty(*given)
    after = pickle.loads(pickle.dumps(penalty))
    assert before.last == {} and torch.equal(after.last["loss"], loss)
    for module in (before, after):
        assert torch.equal(module(*given), loss)
        assert all(f"{name}={value!r}" in repr(module) for name, value in settings.items())


def test_a_compiled_step() -> None:
    policy, reference, mask = case(SimpleNamespace(device="cpu"))
    eye, controller = torch.eye(V), SimpleNamespace(beta=0.5)
    penalty, eager = fastkl.KLPenalty(controller), fastkl.KLPenalty(controller)

    def step(penalty: fastkl.KLPenalty, n: torch.Tensor) -> torch.Tensor:
        linear = fastkl.LinearKLPenalty(0.2, reduction="sequence_mean")
        more = {"weights": mask.float(), "reduction": "mean", "normalizer": n}
        mean = fastkl.kl_divergence(policy, reference, mask, **more)
        linear = linear(policy, eye, reference, mask=mask)
        return penalty(policy, reference, mask, normalizer=n) + linear + mean

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for controller.beta, count in ((0.5, 3), (0.75, 5), (1.25, 0), (2.5, 5)):
        losses = compiled(penalty, torch.tensor(count)), step(eager, torch.tensor(count))
        assert torch.equal(*losses)
        # Three gradients add up in another order.
        grads = (torch.autograd.grad(loss, policy)[0] for loss in losses)
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)
        assert all(torch.equal(value, eager.last[name]) for name, value in penalty.last.items())
    assert counter.frame_count <= 2


# From logits and hidden states: a loss of 0 with gradient 0, however beta was annealed.
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
