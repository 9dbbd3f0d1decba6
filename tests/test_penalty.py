"""KLPenalty: its value, its gradient, its beta and what it keeps of the last call."""

from __future__ import annotations

import copy
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastkl
from fastkl import testing

REDUCTIONS = ("token_mean", "mean", "sequence_mean", "sum")
DIRECTIONS = ("policy||reference", "reference||policy")


def case(
    implementation,
    leading: tuple[int, ...] = (2, 3),
    size: float = 0.5,
    dtype: torch.dtype = torch.float32,
):
    """Policy and reference logits that require grad, and a mask that leaves out the second token."""
    count = torch.Size(leading).numel()
    policy, reference = testing.pair(
        "normal3", count, 17, size, dtype=dtype, device=implementation.device
    )
    mask = (torch.arange(count) != 1).reshape(leading).to(implementation.device)
    return (
        policy.reshape(*leading, 17).requires_grad_(),
        reference.reshape(*leading, 17).requires_grad_(),
        mask,
    )


def plain(policy, reference, mask, direction: str, reduction: str, beta: float, temperature: float):
    """(loss, gradients, KL per token) of the definition, in fp64."""
    policy, reference = (value.detach().double().requires_grad_() for value in (policy, reference))
    log_p, log_q = ((value / temperature).log_softmax(-1) for value in (policy, reference))
    log_p, log_q = (log_p, log_q) if direction == DIRECTIONS[0] else (log_q, log_p)
    kl = torch.where(mask, (log_p.exp() * (log_p - log_q)).sum(-1), 0.0)
    mean, sequence_mean = kl.sum() / mask.sum(), kl.reshape(-1, mask.shape[-1]).sum(-1).mean()
    loss = (
        beta
        * {"token_mean": mean, "mean": mean, "sequence_mean": sequence_mean, "sum": kl.sum()}[
            reduction
        ]
    )
    return loss.detach(), torch.autograd.grad(loss, (policy, reference)), kl.detach()


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_value_and_gradient(implementation, direction, reduction, masked) -> None:
    """The loss and both gradients are those of the definition in fp64."""
    policy, reference, mask = case(implementation)
    penalty = fastkl.KLPenalty(0.3, direction=direction, reduction=reduction, temperature=1.7)
    loss = penalty(policy, reference, mask) if masked else penalty(policy, reference)
    counted = mask if masked else torch.ones_like(mask)
    exact, exact_grads, kl = plain(policy, reference, counted, direction, reduction, 0.3, 1.7)
    assert loss.shape == () and loss.dtype == torch.float32
    testing.assert_near(loss, exact, 2e-5, 0.0, "loss")
    for grad, exact_grad, name in zip(
        torch.autograd.grad(loss, (policy, reference)),
        exact_grads,
        ("policy", "reference"),
        strict=True,
    ):
        testing.assert_gradient(grad, exact_grad, name)
        assert not bool(grad[~counted].any())
    testing.assert_near(penalty.last["kl"], kl.sum() / counted.sum(), 2e-5, 0.0, "last kl")
    testing.assert_near(penalty.last["max_kl"], kl.max(), 2e-5, 0.0, "last max_kl")
    assert float(penalty.last["tokens"]) == int(counted.sum()) and torch.equal(
        penalty.last["loss"], loss.detach()
    )
    assert float(penalty.last["beta"]) == pytest.approx(0.3, rel=1e-7)


@pytest.mark.parametrize("leading", [(), (4,), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_leading_shapes(implementation, leading, reduction) -> None:
    """One token, one sequence and more dimensions: a sequence is the last leading dimension."""
    policy, reference, _ = case(implementation, leading)
    mask = torch.ones(leading or (1,), dtype=torch.bool, device=implementation.device)
    flat = policy.reshape(*mask.shape, 17), reference.reshape(*mask.shape, 17)
    exact = plain(*flat, mask, DIRECTIONS[0], reduction, 0.5, 1.0)[0]
    testing.assert_near(
        fastkl.KLPenalty(0.5, reduction=reduction)(policy, reference), exact, 2e-5, 0.0, "loss"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_logits(implementation, dtype) -> None:
    """Half-precision logits give a float32 loss of their exact values, and gradients in their own
    type.
    """
    policy, reference, mask = case(implementation, dtype=dtype)
    loss = fastkl.KLPenalty(1.0)(policy, reference, mask)
    exact, exact_grads, _ = plain(policy, reference, mask, DIRECTIONS[0], "token_mean", 1.0, 1.0)
    testing.assert_near(loss, exact, 2e-5, 0.0, "loss")
    for grad, exact_grad in zip(
        torch.autograd.grad(loss, (policy, reference)), exact_grads, strict=True
    ):
        assert grad.dtype == dtype
        testing.assert_gradient(grad, exact_grad, "gradient", tolerance=torch.finfo(dtype).eps)


@pytest.mark.parametrize("leading", [(3,), (2, 3)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_token_that_counts(implementation, reduction, leading) -> None:
    """An all-False mask gives a loss and gradients of exactly 0 over rows of NaN; no rows give 0
    too.
    """
    nan = torch.full((*leading, 17), math.nan, device=implementation.device, requires_grad=True)
    penalty = fastkl.KLPenalty(0.3, reduction=reduction)
    loss = penalty(
        nan, nan.detach(), torch.zeros(leading, dtype=torch.bool, device=implementation.device)
    )
    loss.backward()
    assert loss.item() == 0.0 and bool((nan.grad == 0).all())
    assert {name for name, value in penalty.last.items() if float(value)} == {"beta"}
    for shape in ((0,), (2, 0), (0, 3)):
        empty = torch.zeros(*shape, 17, device=implementation.device, requires_grad=True)
        loss = penalty(empty, empty.detach())
        loss.backward()
        assert loss.item() == 0.0 and empty.grad.shape == empty.shape


def test_only_the_logits_that_require_grad_get_one(implementation) -> None:
    """A frozen reference takes no gradient and no memory for one; without any gradient the loss
    needs none.
    """
    policy, reference, mask = case(implementation)
    fastkl.KLPenalty(0.3)(policy, reference.detach(), mask).backward()
    assert policy.grad is not None and reference.grad is None
    assert not fastkl.KLPenalty(0.3)(policy.detach(), reference.detach(), mask).requires_grad


# ---- beta


def test_a_controller_is_read_at_each_call(implementation) -> None:
    """The loss follows the controller's beta; a wrong one that it comes to hold is an error at the
    next call.
    """
    policy, reference, _ = case(implementation, (2,))
    controller = SimpleNamespace(beta=0.5)
    penalty = fastkl.KLPenalty(controller)
    first = penalty(policy, reference)
    controller.beta = 2
    assert (
        torch.equal(penalty(policy, reference), 4 * first)
        and penalty.beta == 2.0
        and float(penalty.last["beta"]) == 2.0
    )
    controller.beta = 0.0
    assert penalty(policy, reference).item() == 0.0
    controller.beta = -1.0
    with pytest.raises(ValueError, match="beta: .*-1.0"):
        penalty(policy, reference)


@pytest.mark.parametrize("wrap", [False, True], ids=["number", "controller"])
@pytest.mark.parametrize(
    "beta, error, words",
    [
        (-0.1, ValueError, "at least 0, got -0.1"),
        (math.nan, ValueError, "got nan"),
        (math.inf, ValueError, "got inf"),
        ("0.1", TypeError, "number or a controller"),
        (None, TypeError, "number or a controller"),
        (True, TypeError, "number or a controller"),
        (10**400, ValueError, "got an integer of 1329 bits"),
        (torch.tensor(0.1), TypeError, "number or a controller"),
        ([0.1], TypeError, "number or a controller"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_wrong_beta(beta, error, words, wrap) -> None:
    """A beta that is no finite number of at least 0 is an error where the module is made."""
    with pytest.raises(error) as raised:
        fastkl.KLPenalty(SimpleNamespace(beta=beta) if wrap else beta)
    assert str(raised.value).startswith("beta: expected") and words in str(raised.value)


@pytest.mark.parametrize(
    "keywords, error",
    [
        ({"direction": "forward"}, ValueError),
        ({"direction": None}, ValueError),
        ({"reduction": "none"}, ValueError),
        ({"reduction": 1}, ValueError),
        ({"temperature": 0.0}, ValueError),
        ({"temperature": "1"}, TypeError),
        ({"temperature": torch.tensor(2.0)}, TypeError),
    ],
    ids=str,
)
def test_wrong_settings(keywords, error) -> None:
    """Every other setting is checked where the module is made; the temperature of a penalty is one
    number.
    """
    ((name, value),) = keywords.items()
    with pytest.raises(error, match=f"{name}: expected"):
        fastkl.KLPenalty(0.1, **keywords)


# ---- as a module


def test_wrong_logits_are_named(implementation) -> None:
    """Errors name policy_logits and ref_logits, whichever the direction."""
    policy, reference, mask = case(implementation)
    for direction in DIRECTIONS:
        penalty = fastkl.KLPenalty(0.1, direction=direction)
        with pytest.raises(
            ValueError,
            match=r"ref_logits: expected the shape of policy_logits, \(2, 3, 17\), got \(2, 3, "
            r"16\)",
        ):
            penalty(policy, reference[..., :16])
        with pytest.raises(TypeError, match="policy_logits: .*torch.int64"):
            penalty(policy.long(), reference)
        with pytest.raises(TypeError, match="ref_logits: .*NoneType"):
            penalty(policy, None)
        with pytest.raises(ValueError, match=r"mask: .*\(2, 3\).*got \(3, 2\)"):
            penalty(policy, reference, mask.reshape(3, 2))


def test_last_is_detached_and_on_the_device(implementation) -> None:
    """`last` keeps seven scalars of a call without a graph, on the logits' device; before the first
    call nothing.
    """
    policy, reference, mask = case(implementation)
    penalty = fastkl.KLPenalty(0.3)
    assert penalty.last == {}
    penalty(policy, reference, mask)
    assert set(penalty.last) == {
        "kl",
        "max_kl",
        "kl_per_sequence",
        "tokens",
        "sequences",
        "beta",
        "loss",
    }
    for value in penalty.last.values():
        assert value.shape == () and value.dtype == torch.float32 and value.device == policy.device
        assert not value.requires_grad and value.grad_fn is None


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_synchronisation(reduction) -> None:
    """Forward and backward never wait for the GPU."""
    generator = torch.Generator("cuda").manual_seed(0)
    policy, reference = (
        torch.randn(2, 3, 1000, device="cuda", generator=generator, requires_grad=True)
        for _ in "pq"
    )
    mask = torch.tensor([[True, False, True]] * 2, device="cuda")
    penalty = fastkl.KLPenalty(0.3, reduction=reduction)
    penalty(policy, reference, mask).backward()
    penalty(policy, reference).backward()
    normalizer = None if reduction == "sum" else mask.sum()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        penalty(policy, reference, mask, normalizer=normalizer).backward()
        penalty(policy, reference).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = plain(policy, reference, torch.ones_like(mask), DIRECTIONS[0], reduction, 0.3, 1.0)[
        0
    ]
    testing.assert_near(penalty.last["loss"], expected, 2e-5, 0.0, "loss")


def test_in_a_model(implementation) -> None:
    """Inside another module it holds no parameters and no state, and a training step through it
    moves the weights as plain torch does.
    """
    penalty = fastkl.KLPenalty(0.3)
    assert (
        not penalty.state_dict() and not list(penalty.parameters()) and not list(penalty.buffers())
    )
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 8, generator=generator).to(implementation.device)
    reference = torch.randn(3, 17, generator=generator).to(implementation.device)
    model = torch.nn.ModuleDict(
        {"head": torch.nn.Linear(8, 17, bias=False), "penalty": penalty}
    ).to(implementation.device)
    assert list(model.state_dict()) == ["head.weight"]
    logits = model["head"](hidden)
    model["penalty"](logits, reference).backward()
    exact = plain(
        logits,
        reference,
        torch.ones(3, dtype=torch.bool, device=hidden.device),
        DIRECTIONS[0],
        "token_mean",
        0.3,
        1.0,
    )[1][0]
    testing.assert_near(
        model["head"].weight.grad, exact.T @ hidden.double(), 1e-4, 1e-6, "weight gradient"
    )


def test_repr() -> None:
    """print(model) shows every setting."""
    assert (
        repr(fastkl.KLPenalty(0.1))
        == "KLPenalty(beta=0.1, direction='policy||reference', temperature=1, "
        "reduction='token_mean')"
    )
    shown = repr(
        fastkl.KLPenalty(
            SimpleNamespace(beta=2), direction=DIRECTIONS[1], temperature=0.7, reduction="sum"
        )
    )
    assert (
        shown
        == "KLPenalty(beta=2, direction='reference||policy', temperature=0.7, reduction='sum')"
    )


@pytest.mark.parametrize(
    "make",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["deepcopy", "pickle"],
)
def test_copies(implementation, make) -> None:
    """deepcopy and pickle, before and after a call, give a module that computes the same."""
    policy, reference, mask = case(implementation)
    penalty = fastkl.KLPenalty(0.2, reduction="sum", direction=DIRECTIONS[1], temperature=1.5)
    before = make(penalty)
    loss = penalty(policy, reference, mask)
    after = make(penalty)
    assert (
        repr(before) == repr(after) == repr(penalty)
        and before.last == {}
        and torch.equal(after.last["loss"], loss)
    )
    assert torch.equal(before(policy, reference, mask), loss) and torch.equal(
        after(policy, reference, mask), loss
    )


def test_compiled(implementation) -> None:
    """Under torch.compile(fullgraph=True) the loss, the gradient and `last` are eager's; a
    controller's beta is followed by at most two graphs.
    """
    torch._dynamo.reset()
    policy, reference, mask = case(implementation, (1, 3))
    controller = SimpleNamespace(beta=0.5)
    penalty, eager = fastkl.KLPenalty(controller), fastkl.KLPenalty(controller)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(penalty, fullgraph=True, backend=counter)
    for beta in (0.5, 0.75, 1.25, 2.5):
        controller.beta = beta
        loss, exact = compiled(policy, reference, mask), eager(policy, reference, mask)
        assert torch.equal(loss, exact)
        assert torch.equal(*(torch.autograd.grad(value, policy)[0] for value in (loss, exact)))
        assert all(torch.equal(value, eager.last[name]) for name, value in penalty.last.items())
    assert counter.frame_count <= 2


def test_a_weight_of_0_leaves_an_infinite_kl_out(implementation) -> None:
    """From logits and from hidden states: a loss of 0 with gradient 0, however beta was annealed."""
    weight = torch.eye(2, device=implementation.device)
    states = torch.tensor([[0.0, 0.0], [0.0, 1.0]], device=implementation.device)
    reference = torch.tensor([[0.0, -math.inf], [0.0, 2.0]], device=implementation.device)
    policy = states.clone().requires_grad_()
    loss = fastkl.KLPenalty(0)(policy, reference)
    (gradient,) = torch.autograd.grad(loss, policy)
    assert loss == 0 and not bool(gradient.any())
    policy = states.clone().requires_grad_()
    bias = torch.tensor([0.0, -math.inf], device=implementation.device)
    loss = fastkl.LinearKLPenalty(0.0)(
        policy, weight, states, weight.clone(), bias=torch.zeros_like(bias), ref_bias=bias
    )
    (gradient,) = torch.autograd.grad(loss, policy)
    assert loss == 0 and not bool(gradient.any())
