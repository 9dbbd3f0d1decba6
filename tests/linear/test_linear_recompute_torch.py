"""recompute= inside PyTorch: retained graphs, hooks, checkpoints, compilers and transforms."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import test_linear_torch as linear_torch
import torch
from test_linear_costs import H, N, V, tensors
from test_linear_recompute import FIELDS, assert_same, backward, count, keeping, outcome, stats_of
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import fastkl
from fastkl.ops import lm_head


def test_create_graph_overwrites_nothing(implementation) -> None:
    """A graph for second derivatives raises when used; the logits are still there after it."""
    made = tensors(implementation.device, dtype=torch.float32)
    stats = stats_of(made, recompute=False)
    first = backward(stats, made, create_graph=True)
    assert first[0].requires_grad
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        torch.autograd.grad(first[0].sum(), made["hidden"], retain_graph=True)
    second = []
    assert count(lambda: second.extend(backward(stats, made))) == 2
    assert_same(second, [value.detach() for value in first])


def test_saved_tensor_hooks(implementation) -> None:
    """Offloaded logits come back as copies, in any layout, once and again."""
    made = tensors(implementation.device)
    expected = outcome(made, recompute=True)

    def transposed(value: torch.Tensor) -> torch.Tensor:
        if value.dim() < 2 or value.requires_grad:
            return value
        return value.transpose(-1, -2).contiguous().transpose(-1, -2)

    with torch.autograd.graph.saved_tensors_hooks(transposed, transposed):
        stats = stats_of(made, recompute=False)
    values = [value.detach() for value in stats.values()]
    for retain in (True, False):
        found = backward(stats, made, retain_graph=retain)
        assert_same([*values, *found], expected)
    with torch.autograd.graph.save_on_cpu():
        stats = stats_of(made, recompute=False)
    assert_same([*values, *backward(stats, made)], expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_and_a_retained_graph(implementation, reentrant) -> None:
    """Recomputed by torch.utils.checkpoint, twice where the graph is retained."""
    made = tensors(implementation.device)
    expected = outcome(made, recompute=True)

    def run(*leaves: torch.Tensor):
        given = dict(zip(made, leaves, strict=True))
        return tuple(stats_of(given, recompute=False).values())

    values = checkpoint(run, *made.values(), use_reentrant=reentrant)
    stats = dict(zip(FIELDS, values, strict=True))
    if reentrant:
        with pytest.raises(RuntimeError, match="autograd.grad|backward"):
            backward(stats, made)
        return
    for retain in (True, False):
        found = backward(stats, made, retain_graph=retain)
        assert_same([*(value.detach() for value in values), *found], expected)


def test_selective_checkpointing(implementation) -> None:
    """Logits that a policy caches, as it does the op's results, reach the one backward."""
    made = tensors(implementation.device)
    expected = outcome(made, recompute=True)
    policy = functools.partial(
        create_selective_checkpoint_contexts, lambda *_, **__: CheckpointPolicy.MUST_SAVE
    )
    values = checkpoint(
        lambda: tuple(stats_of(made, recompute=False).values()),
        use_reentrant=False,
        context_fn=policy,
    )
    found = backward(dict(zip(FIELDS, values, strict=True)), made)
    assert_same([*(value.detach() for value in values), *found], expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@keeping
def test_compiled(implementation, backend, recompute) -> None:
    """The same bits inside a graph, whose op overwrites nothing; two backwards."""
    made = tensors(implementation.device)
    expected = outcome(made, recompute=True)
    compiled = torch.compile(
        lambda given: stats_of(given, recompute=recompute), fullgraph=True, backend=backend
    )
    stats = compiled(made)
    for retain in (True, False):
        found = backward(stats, made, retain_graph=retain)
        assert_same([*(value.detach() for value in stats.values()), *found], expected)


def test_export_of_any_number_of_tokens() -> None:
    """The default puts no bound on a dynamic dimension of an exported graph."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(H, V, bias=False)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return fastkl.linear_kl_divergence(hidden, self.head.weight, hidden.detach())

    shapes = ({0: torch.export.Dim("tokens", min=2)},)
    program = torch.export.export(Model(), (torch.randn(3, H),), dynamic_shapes=shapes)
    assert program.module()(torch.randn(7, H)).shape == (7,)
    (bounds,) = program.range_constraints.values()
    assert bounds.upper > 2**40


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@keeping
def test_transforms(implementation, recompute) -> None:
    """torch.func inside and outside, and batched upstream gradients of kept logits."""
    made = tensors(implementation.device, dtype=torch.float32)
    hidden, weight, ref = (made[name].detach() for name in ("hidden", "weight", "ref_hidden"))

    def kl(states: torch.Tensor) -> torch.Tensor:
        return fastkl.linear_kl_divergence(states, weight, ref, recompute=recompute)

    leaf = hidden.clone().requires_grad_()
    (expected,) = torch.autograd.grad(kl(leaf).sum(), leaf)
    assert torch.equal(torch.func.grad(lambda states: kl(states).sum())(hidden), expected)
    mapped = torch.func.vmap(torch.func.grad(lambda s: kl(s).sum()))(torch.stack([hidden, hidden]))
    torch.testing.assert_close(mapped, torch.stack([expected, expected]))
    upstream = torch.stack([torch.ones(N), 2 * torch.ones(N)]).to(hidden)
    values = kl(leaf)
    gradient = functools.partial(torch.autograd.grad, values, leaf, retain_graph=True)
    for batched in (
        lambda: gradient(upstream, is_grads_batched=True),
        lambda: torch.func.vmap(gradient)(upstream),
    ):
        (found,) = batched()
        torch.testing.assert_close(found, torch.stack([expected, 2 * expected]))
    assert torch.equal(torch.autograd.grad(values.sum(), leaf)[0], expected)


def test_a_failed_backward_leaves_no_wrong_logits(monkeypatch) -> None:
    """What was half written over is computed again."""
    made = tensors("cpu")
    expected = outcome(made, recompute=True)
    stats = stats_of(made, recompute=False)

    def fails(self, grad_logits: torch.Tensor, *_: object) -> None:
        grad_logits.fill_(float("nan"))
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(lm_head.Head, "gather", fails)
        backward(stats, made, retain_graph=True)
    found = backward(stats, made)
    assert_same([*(value.detach() for value in stats.values()), *found], expected)


def test_the_direct_way_is_taken() -> None:
    """Plain eager calls write over what they kept."""
    made = tensors("cpu")
    seen = SimpleNamespace(kept=[])
    with torch.autograd.graph.saved_tensors_hooks(
        lambda value: seen.kept.append(value) or value, lambda value: value
    ):
        stats = stats_of(made, recompute=False)
    logits = [value for value in seen.kept if value.shape[-1] == lm_head.row_width(V)]
    assert len(logits) == 2
    before = [value.clone() for value in logits]
    backward(stats, made)
    assert not torch.equal(logits[0], before[0]) and torch.equal(logits[1], before[1])


@pytest.mark.parametrize("learns", [linear_torch.LEAVES, ("hidden",)], ids=["all", "frozen"])
@pytest.mark.parametrize("name", ["none", "stats"])
def test_bytes_saved_for_any_upstream_gradient(implementation, name, learns) -> None:
    """Beside the inputs 40 bytes per token, and of the vocabulary's size only kept logits."""
    data, addresses = linear_torch.sized(implementation, learns)
    held = linear_torch.saved_bytes(linear_torch.FUNCTIONS[name], data)
    saved = sum(size for address, size in held.items() if address not in addresses)
    assert saved == linear_torch.per_token(name, data) * data.mask.numel()
